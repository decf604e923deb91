"""Who a person is here, how they sign in, and who else is in the account."""

from flask import Blueprint, Response, flash, redirect, request
from flask_login import login_required
from werkzeug.wrappers import Response as BaseResponse

from blueprints import inviting
from blueprints.api import require_owner
from blueprints.inviting import Invitation
from blueprints.pages import act, before, field, person, required, seat, show, whole
from blueprints.rendering import instance
from blueprints.signing import linking, unlinking
from blueprints.visitors import sign_in, sign_out, signed_message, visitor, with_password
from core import clock, errors, keys, members, passwords, sessions, users, wallets
from core.audit import Actor
from core.errors import Refusal
from core.members import Member, Terms
from core.sessions import Seat
from models import Tx

blueprint = Blueprint("settings", __name__, url_prefix="/dashboard/settings")
blueprint.before_request(before)


@blueprint.get("")
@blueprint.get("/members")  # where the answers to forms are shown, and may be loaded again
@blueprint.get("/password")
@blueprint.get("/wallets")
@login_required
def home() -> Response:
    return _home()


def _home(problem: Refusal | None = None) -> Response:
    me, who, now, settings = visitor(), seat(), clock.now_ms(), instance().settings
    with instance().db.reading() as tx:
        mine = keys.newest(tx, who.account_id, who.user_id, None, 100)
        return show(
            "dashboard/settings.html", problem=problem, here=me.session, now=now,
            key=next((key for key in mine if key.status_at(now) == "active"), None),
            members=members.of_account(tx, who.account_id),
            wallets=wallets.of_account(tx, who.account_id),
            own_wallets=wallets.of_account(tx, me.user.account_id),
            sessions=sessions.of_user(tx, who.user_id, now),
            identities=users.identities_of(tx, who.user_id),
            has_password=users.has_password(tx, who.user_id),
            privy_id=users.privy_id(tx, who.user_id),
            providers={name: section.label for name, section in settings.oidc.items()},
        )  # fmt: skip


@blueprint.post("/password")
@login_required
def password() -> BaseResponse:
    """A new password, for who knows the old one; every other browser is signed out."""
    me, now = visitor(), clock.now_ms()
    email = me.user.email
    try:
        if email is None:
            raise Refusal("conflict", "You have no e-mail to sign in with.")
        with instance().db.reading() as tx:
            had_one = users.has_password(tx, me.user.id)
        if had_one and with_password(email, request.form.get("current", "")) is None:
            raise errors.invalid_body("The current password is wrong.", "current")
        hashed = passwords.hashed(request.form.get("password", ""), email)
    except Refusal as refusal:
        return _home(refusal)

    def work(tx: Tx) -> users.User:
        sessions.get(tx, me.session.id, now)  # who was signed out meanwhile changes nothing
        if users.has_password(tx, me.user.id) != had_one:
            raise Refusal("conflict", "The password was changed meanwhile.")
        users.set_password(tx, me.user.id, hashed, now, me.actor)
        return users.get(tx, me.user.id)

    if not sign_in(instance().db.write(work, durable=True), "password", hashed):
        return redirect("/login", 303)  # it was replaced a moment later
    flash("The password is changed. Every other browser is signed out.")
    return redirect("/dashboard/settings", 303)


# Members


@blueprint.post("/members")
@login_required
def invite() -> Response:
    """Invite somebody by a link that works once, shown here and, in measure, mailed."""

    def work(tx: Tx, who: Seat, by: Actor, now: int) -> Invitation:
        require_owner(who)
        return inviting.invite(tx, who, email, terms, now, by)

    try:
        email, terms = required("email", "The e-mail"), _terms()
        made = act(work)
    except Refusal as refusal:
        return _home(refusal)
    url, mailed = inviting.deliver(made)
    return show("dashboard/invited.html", member=made.member, url=url, mailed=mailed)


@blueprint.route("/members/<member_id>", methods=["GET", "POST"])
@login_required
def member_terms(member_id: str) -> BaseResponse:
    """A member's role and limit, to be looked at and changed."""
    require_owner(seat())
    member = _member(member_id)
    if request.method != "POST":
        return show("dashboard/member.html", member=member)

    def work(tx: Tx, who: Seat, by: Actor, now: int) -> Member:
        require_owner(who)
        return members.change(tx, members.get(tx, member_id, who.account_id), terms, now, by)

    try:
        terms = _terms()
        act(work)
    except Refusal as refusal:
        return show("dashboard/member.html", problem=refusal, member=member)
    flash(f"Changed {_called(member)}.")
    return redirect("/dashboard/settings", 303)


@blueprint.route("/members/<member_id>/remove", methods=["GET", "POST"])
@login_required
def remove_member(member_id: str) -> BaseResponse:
    """Remove a member, or take an invitation back. Whoever is no owner may remove themselves."""
    member = _member(member_id)
    if member.user_id != seat().user_id:
        require_owner(seat())
    if request.method != "POST":
        return show("dashboard/remove_member.html", member=member)

    def work(tx: Tx, who: Seat, by: Actor, now: int) -> None:
        current = members.get(tx, member_id, who.account_id)
        if current.user_id != who.user_id:
            require_owner(who)
        members.remove(tx, current, now, by)

    try:
        act(work)
    except Refusal as refusal:
        return show("dashboard/remove_member.html", problem=refusal, member=member)
    leaves = member.user_id == visitor().user.id
    flash("You have left that account." if leaves else f"Removed {_called(member)}.")
    return redirect("/dashboard/settings", 303)


def _member(member_id: str) -> Member:
    with instance().db.reading() as tx:
        return members.get(tx, member_id, seat().account_id)


def _called(member: Member) -> str:
    return member.email or person(member.user_id or "")


def _terms() -> Terms:
    """The terms a form asks for. Raises `validation_error`."""
    limit = whole("credit_limit")
    return Terms(
        field("role") or "member", limit, field("credit_period") if limit is not None else None
    )


# Wallets


@blueprint.post("/wallets")
@login_required
def link_wallet() -> BaseResponse:
    """Link the wallet that has signed a message."""
    try:
        work = linking(*signed_message())
        found, is_new = act(work)
    except Refusal as refusal:
        return _home(refusal)
    name = found.wallet.short
    flash(f"Linked {name}." if is_new else f"{name} was linked already.")
    return redirect("/dashboard/settings", 303)


@blueprint.route("/wallets/unlink", methods=["GET", "POST"])
@login_required
def unlink_wallet() -> BaseResponse:
    """Ask first; then the wallet is the person's no more."""
    named = request.values.get("wallet", "")
    with instance().db.reading() as tx:
        mine = wallets.of_account(tx, visitor().user.account_id)
    found = next((each.wallet for each in mine if each.wallet == wallets.parse(named)), None)
    if request.method != "POST":
        if found is None:
            raise errors.not_found()
        return show("dashboard/unlink_wallet.html", wallet=found)
    try:
        act(unlinking(named, visitor().session.id))
    except Refusal as refusal:
        return _home(refusal)
    flash(f"Unlinked {found.short if found else named}. It signs nothing here any more.")
    return redirect("/dashboard/settings", 303)


# Sign-ins


@blueprint.post("/sessions/<session_id>/end")
@login_required
def end_session(session_id: str) -> BaseResponse:
    """Sign one of the person's browsers out, with its tokens."""
    me, now = visitor(), clock.now_ms()
    if session_id == me.session.id:
        sign_out()
        return redirect("/login", 303)

    def work(tx: Tx) -> bool:
        return sessions.end(tx, session_id, me.user.id, now, me.actor)

    if not instance().db.write(work, durable=True):
        raise errors.not_found()
    return redirect("/dashboard/settings", 303)


@blueprint.post("/sessions/end-all")
@login_required
def end_sessions() -> BaseResponse:
    me, now = visitor(), clock.now_ms()
    instance().db.write(lambda tx: sessions.end_all(tx, me.user.id, now, me.actor), durable=True)
    return redirect("/login", 303)


@blueprint.post("/identities/unlink")
@login_required
def unlink() -> BaseResponse:
    me, now = visitor(), clock.now_ms()
    issuer, subject = request.form.get("issuer", ""), request.form.get("subject", "")
    providers = instance().settings.oidc_issuers

    def work(tx: Tx) -> None:
        sessions.get(tx, me.session.id, now)
        users.unlink_identity(
            tx, me.user.id, issuer, subject, providers, me.session.id, now, me.actor
        )

    instance().db.write(work, durable=True)
    return redirect("/dashboard/settings", 303)
