"""Session tokens: given to who is signed in or holds one, ended one by one, checked by anyone."""

from collections.abc import Callable

import msgspec
from flask import Blueprint, Response, request
from flask_login import current_user

from blueprints.api import inbound, manager, parsed, raw_body
from blueprints.rendering import client_address, instance, json_response
from blueprints.signing import with_message
from blueprints.visitors import check_csrf, origin
from core import access, clock, errors, session_tokens, sessions
from core.audit import Actor
from core.errors import Refusal
from core.session_tokens import Bearer
from core.sessions import Session
from core.signed import requests as signed_requests
from core.users import User
from core.wallets import Wallet
from models import Tx

blueprint = Blueprint("session_tokens", __name__)


class _Wish(msgspec.Struct, forbid_unknown_fields=True):
    account: str | None = None
    message: str | None = None  # that a wallet has signed, in place of a credential
    signature: str | None = None


@blueprint.post("/api/v1/session-tokens")
def mint() -> Response:
    """A fresh token: of the same session, or of a new one for whose wallet has signed a message;
    for the account that is named, or the same as before, or their own."""
    raw = raw_body()
    if "Authorization" in request.headers or signed_requests.is_signed(inbound().headers):
        bearer = manager().bearer
        assert bearer is not None  # `manager` let nobody else in
        wish, account_id = _wish(raw), bearer.account_id
        session = _session_of(bearer)
    elif (signed := _signed_wish(raw)) is not None:
        wish = signed
        message, signature = signed.message or "", signed.signature or ""
        user, session = with_message(message, signature, _signing_in(signed.account))
        account_id = user.account_id
    elif current_user.is_authenticated:
        check_csrf()
        wish, account_id = _wish(raw), current_user.user.account_id
        session = current_user.session
        access.count_reading(instance(), current_user.user)
    else:
        raise Refusal("missing_api_key", "Sign in, or send a session token or a signed message.")
    found = instance()
    issued = session_tokens.mint(
        found.db, found.signing_keys, found.settings.public_url, session,
        wish.account or account_id, clock.now_ms(),
    )  # fmt: skip
    expires_at = clock.rfc3339(issued.expires_at)
    return json_response({"token": issued.token, "expires_at": expires_at}, 201)


@blueprint.delete("/api/v1/session-tokens/current")
def revoke() -> Response:
    """End the token that is sent, and no other."""
    principal = manager()
    bearer, now = principal.bearer, clock.now_ms()
    assert bearer is not None  # `manager` let nobody else in
    by = Actor(bearer.user_id, client_address(request.environ))
    instance().db.write(lambda tx: session_tokens.revoke(tx, bearer, now, by), durable=True)
    return Response(status=204)


@blueprint.get("/.well-known/jwks.json")
def jwks() -> Response:
    """The public keys our tokens verify with (RFC 7517)."""
    response = json_response({"keys": instance().signing_keys.public(clock.now_ms())})
    response.headers["Cache-Control"] = "public, max-age=300"
    return response


def _wish(raw: bytes) -> _Wish:
    """What is wanted by whoever has a credential already. Raises `validation_error`."""
    wish = parsed(raw, _Wish)
    if wish.message is not None or wish.signature is not None:
        raise errors.invalid_body("Send a credential or a signed message, not both.", "message")
    return wish


def _signed_wish(raw: bytes) -> _Wish | None:
    """What is wanted by whoever has signed a message; None when nobody has."""
    try:
        wish = parsed(raw, _Wish)
    except Refusal:
        return None  # to be said only to who has a credential
    if wish.message is None and wish.signature is None:
        return None
    if wish.message is None or wish.signature is None:
        missing = "message" if wish.message is None else "signature"
        raise errors.invalid_body("A message and its signature go together.", missing)
    return wish


def _signing_in(account_id: str | None) -> Callable[[Tx, Wallet, User, int], tuple[User, Session]]:
    """What starts a session for that account, or for their own. Raises `not_found`, before the
    message is used up."""
    here = origin("wallet")

    def work(tx: Tx, wallet: Wallet, user: User, now: int) -> tuple[User, Session]:
        how = here._replace(method=f"wallet:{wallet.id}")
        session = sessions.start(tx, user.id, how, now)
        if account_id and sessions.seat(tx, session.id, account_id, now) is None:
            raise errors.not_found()
        return user, session

    return work


def _session_of(bearer: Bearer) -> Session:
    """The session of a token; an outside one is traded for a session that ends when it does."""
    now = clock.now_ms()
    if bearer.session_id is not None:
        with instance().db.reading() as tx:
            return sessions.get(tx, bearer.session_id, now)
    traded = origin("token")._replace(token_id=bearer.token_id, expires_at=bearer.expires_at)

    def work(tx: Tx) -> Session:
        if session_tokens.find(tx, bearer.token_id, now) is None:
            raise errors.invalid_token()
        known = sessions.traded_for(tx, bearer.token_id, now)
        return known or sessions.start(tx, bearer.user_id, traded, now)

    return instance().db.write(work)
