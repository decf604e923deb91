"""Where a person lands: who they are here, their accounts, a session token, their sign-ins."""

from flask import Blueprint, Response, redirect, request
from flask_login import current_user, login_required
from werkzeug.wrappers import Response as BaseResponse

from blueprints.rendering import instance, page
from blueprints.visitors import check_csrf, sign_out
from core import access, clock, errors, ledger, members, session_tokens, sessions, users
from core.session_tokens import Issued
from models import Tx

blueprint = Blueprint("dashboard", __name__, url_prefix="/dashboard")
blueprint.before_request(check_csrf)


@blueprint.get("")
@login_required
def home() -> Response:
    return _home()


@blueprint.post("/session-token")
@login_required
def reveal() -> Response:
    """A fresh session token, shown on the page that asked for it."""
    found, visitor = instance(), current_user
    access.count_reading(found, visitor.user)
    account_id = request.form.get("account") or visitor.user.account_id
    issued = session_tokens.mint(
        found.db, found.signing_keys, found.settings.public_url, visitor.session, account_id,
        clock.now_ms(),
    )  # fmt: skip
    return _home(issued)


@blueprint.post("/sessions/<session_id>/end")
@login_required
def end_session(session_id: str) -> BaseResponse:
    """Sign one of the person's browsers out, with its tokens."""
    visitor, now = current_user, clock.now_ms()
    if session_id == visitor.session.id:
        sign_out()
        return redirect("/login", 303)

    def work(tx: Tx) -> bool:
        return sessions.end(tx, session_id, visitor.user.id, now, visitor.actor)

    if not instance().db.write(work, durable=True):
        raise errors.not_found()
    return redirect("/dashboard", 303)


@blueprint.post("/sessions/end-all")
@login_required
def end_sessions() -> BaseResponse:
    visitor, now = current_user, clock.now_ms()
    instance().db.write(
        lambda tx: sessions.end_all(tx, visitor.user.id, now, visitor.actor), durable=True
    )
    return redirect("/login", 303)


@blueprint.post("/identities/unlink")
@login_required
def unlink() -> BaseResponse:
    visitor, now = current_user, clock.now_ms()
    issuer, subject = request.form.get("issuer", ""), request.form.get("subject", "")
    providers = instance().settings.oidc_issuers

    def work(tx: Tx) -> None:
        users.unlink_identity(
            tx, visitor.user.id, issuer, subject, providers, visitor.session.id, now,
            visitor.actor,
        )  # fmt: skip

    instance().db.write(work, durable=True)
    return redirect("/dashboard", 303)


def _home(issued: Issued | None = None) -> Response:
    visitor, now, settings = current_user, clock.now_ms(), instance().settings
    with instance().db.reading() as tx:
        accounts = []
        for member in members.accounts_of(tx, visitor.user.id):
            owner = users.owner_of(tx, member.account_id)
            host = None if owner is None or owner.id == visitor.user.id else owner.email
            accounts.append((member, ledger.standing(tx, member.account_id), host))
        signed_in = sessions.of_user(tx, visitor.user.id, now)
        identities = users.identities_of(tx, visitor.user.id)
    return page(
        "dashboard/home.html",
        me=visitor.user, here=visitor.session, accounts=accounts, sessions=signed_in,
        identities=identities, issued=issued, when=_when, base=settings.public_url,
        providers={name: section.label for name, section in settings.oidc.items()},
    )  # fmt: skip


def _when(at_ms: int) -> str:
    """A time as people read it."""
    return f"{clock.rfc3339(at_ms)[:16].replace('T', ' ')} UTC"
