"""Signing in through an OpenID provider: authorization code with PKCE, state and nonce.

OpenID Connect Core 1.0; RFC 7636 (PKCE); RFC 9207 (`iss` in the answer). The protocol is authlib's;
who somebody then is here, is decided below: by issuer and subject together, never by an address.
"""

import logging
from typing import Any

from flask import Blueprint, Flask, current_app, redirect, request, session
from flask_login import current_user
from flask_wtf.csrf import validate_csrf
from werkzeug.wrappers import Response as BaseResponse
from wtforms import ValidationError

from blueprints.rendering import client_address, instance
from blueprints.visitors import local_path, sign_in
from config import OidcSection, Settings
from core import clock, errors, members, users
from core.audit import Actor
from core.errors import Refusal
from core.issuers import checked_email
from core.users import User
from models import Tx

log = logging.getLogger("farebox.oidc")

blueprint = Blueprint("oidc", __name__, url_prefix="/oidc")

_BEGUN = "oidc"  # where the cookie keeps what a sign-in was begun for
_LONGEST_NEXT = 1000  # characters; a cookie holds only so much
_LEEWAY_SECONDS = 60  # for the provider's clock
_LONGEST_TROUBLE = 300  # characters of it in the log


def register(app: Flask, settings: Settings) -> None:
    """Make the configured providers known. Nothing is fetched until somebody signs in."""
    if not settings.oidc:
        return
    from authlib.integrations.flask_client import OAuth
    from authlib.integrations.flask_client.apps import FlaskOAuth2App

    from core.openid import Client

    class App(Client, FlaskOAuth2App):
        pass

    class Providers(OAuth):
        oauth2_client_cls = App

    providers = Providers(app)
    for name, section in settings.oidc.items():
        providers.register(
            name,
            client_id=section.client_id,
            client_secret=section.client_secret,
            server_metadata_url=section.server_metadata_url,
            client_kwargs={"scope": section.scope, "code_challenge_method": "S256"},
        )


@blueprint.get("/<name>")
def begin(name: str) -> BaseResponse:
    """Send the browser to the provider. With `link`, to add the identity to who is signed in, which
    takes the form token of their page: otherwise a stranger's link could add a stranger's."""
    _section(name)
    linking = "link" in request.args
    if linking:
        try:
            validate_csrf(request.args["link"])
        except ValidationError as error:
            raise Refusal("csrf_failed", "This link is too old. Load the page again.") from error
        if not current_user.is_authenticated:
            raise Refusal("csrf_failed", "Sign in first.")
    for key in [key for key in session if key.startswith("_state_")]:
        del session[key]  # of sign-ins that were begun and left
    session[_BEGUN] = {
        "name": name,
        "next": local_path(request.args.get("next", "")[:_LONGEST_NEXT]),
        "link": current_user.user.id if linking else None,
        "invite": request.args.get("invite", "")[:100],
    }
    try:
        answer: BaseResponse = _client(name).authorize_redirect(_redirect_uri(name))
    except Refusal:
        raise
    except Exception as error:
        raise _failed(name, error) from error
    return answer


@blueprint.get("/<name>/callback")
def finish(name: str) -> BaseResponse:
    """What the provider says of who came back."""
    section = _section(name)
    begun = session.pop(_BEGUN, None) or {}
    try:
        if begun.get("name") != name:
            raise ValueError("this browser has not begun to sign in there")
        claims = _verified(name, section)
    except Refusal:
        raise
    except Exception as error:
        raise _failed(name, error) from error
    user = _user(name, section, claims, begun)
    if begun["link"]:
        return redirect("/dashboard", 303)
    sign_in(user, f"oidc:{name}")
    return redirect(begun["next"], 303)


def _verified(name: str, section: OidcSection) -> dict[str, Any]:
    """The claims of the ID token the code was good for. Raises whatever is wrong."""
    metadata = _client(name).load_server_metadata()
    answered_by = request.args.get("iss")
    named = metadata["authorization_response_iss_parameter_supported"]
    if answered_by != metadata["issuer"] and (named or answered_by is not None):
        raise ValueError("the answer came from another issuer")
    token = _client(name).authorize_access_token(
        claims_options={
            "iss": {"essential": True, "values": [metadata["issuer"]]},
            "aud": {"essential": True, "values": [section.client_id]},
            "sub": {"essential": True},
        },
        leeway=_LEEWAY_SECONDS,
    )
    claims: dict[str, Any] = dict(token["userinfo"])
    subject = claims["sub"]
    if not (isinstance(subject, str) and 1 <= len(subject) <= 255 and subject.isprintable()):
        raise ValueError("the subject is no name")
    return claims


def _user(name: str, section: OidcSection, claims: dict[str, Any], begun: dict[str, Any]) -> User:
    """Who an identity is here, made or linked if need be.

    Raises `signup_closed`, and `conflict` when the identity or the address is somebody else's.
    """
    issuer, subject, now = claims["iss"], claims["sub"], clock.now_ms()
    email = checked_email(claims.get("email")) if claims.get("email_verified") is True else None
    client, settings = client_address(request.environ), instance().settings.instance
    if begun["link"] and not (
        current_user.is_authenticated and current_user.user.id == begun["link"]
    ):
        raise Refusal("conflict", "Somebody else has signed in meanwhile. Try again.")

    def work(tx: Tx) -> User:
        # Not the subject: a provider could call somebody what the audit calls the operator.
        by = Actor(f"oidc:{name}", client)
        if begun["link"]:
            linking = users.get(tx, begun["link"])
            users.link_identity(tx, linking, issuer, subject, now, Actor(linking.id, client))
            return linking
        known = users.known_as(tx, issuer, subject)
        if known is not None:
            return known
        namesake = None if email is None else users.by_email(tx, email)
        if namesake is not None:
            return _namesake(tx, section, namesake, issuer, subject, now, by)
        if begun["invite"]:
            user = users.add(tx, email, None, False, now, by)
            users.link_identity(tx, user, issuer, subject, now, by)
            members.join(tx, begun["invite"], user.id, now, Actor(user.id, client))
            begun["next"] = "/dashboard"  # the invitation, where it led, is used up
            return user
        if settings.signup != "open":
            raise Refusal("signup_closed", "This instance does not take in new people by itself.")
        credits = settings.signup_credits
        return users.first_seen(tx, issuer, subject, email, credits, now, by)

    return instance().db.write(work, durable=True)


def _namesake(
    tx: Tx, section: OidcSection, user: User, issuer: str, subject: str, now: int, by: Actor
) -> User:
    """The user whose address a provider has verified for somebody we do not know.

    Somebody the operator added and who has no way to sign in yet, is them. Anybody else may have
    taken the address without owning it, waiting for its owner to move in with them.
    """
    if users.has_a_credential(tx, user.id):
        raise Refusal(
            "conflict",
            f"{user.email} is a user already. Sign in as you did before, then add {section.label}.",
        )
    users.link_identity(tx, user, issuer, subject, now, by)
    return user


def _section(name: str) -> OidcSection:
    section = instance().settings.oidc.get(name)
    if section is None:
        raise errors.not_found()
    return section


def _client(name: str) -> Any:
    return current_app.extensions["authlib.integrations.flask_client"].create_client(name)


def _redirect_uri(name: str) -> str:
    return f"{instance().settings.public_url}/oidc/{name}/callback"


def _failed(name: str, error: Exception) -> Refusal:
    """Whatever went wrong between us and a provider: the log says what, the page does not.

    Its words may be the provider's, or those of whoever wrote the link, and quote what was sent.
    """
    words, section = f"{type(error).__name__}: {error}", _section(name)
    for secret in (request.args.get("code"), request.args.get("state"), section.client_secret):
        words = words.replace(secret, "[masked]") if secret else words
    log.warning("signing in through %s failed: %s", name, ascii(words[:_LONGEST_TROUBLE]))
    return errors.invalid_body(f"Signing in with {section.label} did not work. Try again.")
