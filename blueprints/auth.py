"""Signing in and out, and the links that work once: set-up, a new password, an invitation."""

from collections.abc import Callable

from flask import Blueprint, Response, flash, redirect, request, session
from flask_login import current_user
from werkzeug.wrappers import Response as BaseResponse

from blueprints.rendering import client_address, instance, page
from blueprints.signing import with_message
from blueprints.visitors import (
    CHOICE,
    check_csrf,
    local_path,
    origin,
    sign_in,
    sign_out,
    signed_message,
    take_seat,
    throttle,
    visitor,
    with_password,
)
from core import clock, links, mail, members, passwords, sessions, tokens, users
from core.audit import Actor
from core.errors import Refusal
from core.limits import network_of
from core.links import Link
from core.sessions import Session
from core.users import User
from core.wallets import Wallet
from models import Tx

# What a form does with its e-mail and the hash of its password; the person it makes or changes.
Work = Callable[[Tx, str, str, int], User]

blueprint = Blueprint("auth", __name__)
blueprint.before_request(check_csrf)


@blueprint.get("/")
def home() -> Response:
    return page("auth/home.html")


@blueprint.route("/login", methods=["GET", "POST"])
def login() -> BaseResponse:
    """Sign in with a password, or find the links to other ways."""
    wish = local_path(request.values.get("next"), "")
    if request.method != "POST":
        if current_user.is_authenticated:
            return redirect(wish or "/dashboard", 303)
        return _login_page(200, wish)
    typed = request.form.get("email", "").strip()
    try:
        found = with_password(typed.lower(), request.form.get("password", ""))
    except Refusal as refusal:
        answer = _login_page(refusal.kind.status, wish, typed, refusal.message)
        answer.headers.update(refusal.all_headers())
        return answer
    if found is None or not sign_in(found[0], "password", found[1]):
        return _login_page(401, wish, typed, "E-mail or password is wrong.")
    return redirect(wish or "/dashboard", 303)


def _login_page(status: int, wish: str, email: str = "", problem: str = "") -> Response:
    return page("auth/login.html", status, next=wish, email=email, problem=problem, **_ways())


@blueprint.post("/logout")
def logout() -> BaseResponse:
    sign_out()
    return redirect("/login", 303)


@blueprint.route("/signup", methods=["GET", "POST"])
def signup() -> BaseResponse:
    """A new person with an account of their own, where the operator lets anybody in."""
    if instance().settings.instance.signup != "open":
        raise Refusal("signup_closed", "This instance does not take in new people by itself.")
    if request.method != "POST":
        return _form("signup")
    client, credits = client_address(request.environ), instance().settings.instance.signup_credits

    def work(tx: Tx, email: str, hashed: str, now: int) -> User:
        return users.sign_up(tx, email, hashed, credits, now, Actor(email, client))

    return _submitted("signup", work)


@blueprint.route("/setup", methods=["GET", "POST"])
def setup() -> BaseResponse:
    """The first user, who owns the starter key's account and runs the instance."""
    token, link = _link("setup")
    if link is None:
        return _dead_link()
    if request.method != "POST":
        return _form("setup", token)
    by = Actor("setup", client_address(request.environ))

    def work(tx: Tx, email: str, hashed: str, now: int) -> User:
        used = links.use(tx, "setup", token, now)
        return users.add(tx, email, hashed, True, now, by, used.account_id)

    return _submitted("setup", work, token)


@blueprint.route("/reset", methods=["GET", "POST"])
def reset() -> BaseResponse:
    """A new password for the person a link was made for; their other sign-ins end."""
    token, link = _link("reset")
    if link is None or link.user_id is None:
        return _dead_link()
    with instance().db.reading() as tx:
        user = users.get(tx, link.user_id)
    if request.method != "POST":
        return _form("reset", token, user.email or user.id)
    by = Actor(user.id, client_address(request.environ))

    def work(tx: Tx, email: str, hashed: str, now: int) -> User:
        links.use(tx, "reset", token, now)
        users.set_password(tx, user.id, hashed, now, by)
        return users.get(tx, user.id)

    return _submitted("reset", work, token, user.email or user.id)


@blueprint.route("/login/wallet", methods=["GET", "POST"])
def wallet_login() -> BaseResponse:
    """Sign in with a message that a wallet has signed; where the answer is shown may be loaded
    again."""
    if request.method != "POST":
        return redirect("/login", 303)
    secret = tokens.new_secret()

    here = origin("wallet")

    def started(tx: Tx, wallet: Wallet, user: User, now: int) -> tuple[User, Session]:
        how = here._replace(method=f"wallet:{wallet.id}")
        return user, sessions.start(tx, user.id, how, now, secret)

    try:
        user, made = with_message(*signed_message(), started)
    except Refusal as refusal:
        if refusal.kind.status >= 500:
            raise
        if request.form.get("from") == "signup":
            answer = _form("signup", problem=refusal.message, status=refusal.kind.status)
        else:
            wish = local_path(request.form.get("next"), "")
            answer = _login_page(refusal.kind.status, wish, problem=refusal.message)
        answer.headers.update(refusal.all_headers())
        return answer
    take_seat(user, made, secret)
    return redirect(local_path(request.form.get("next")), 303)


@blueprint.route("/forgot", methods=["GET", "POST"])
def forgot() -> BaseResponse:
    """Mail a reset link, if there is a server to mail it and none is on its way; the answer is the
    same for everybody."""
    smtp = instance().settings.smtp
    if request.method != "POST" or smtp is None:
        return page("auth/forgot.html", has_mail=smtp is not None)
    email, client = request.form.get("email", "").strip().lower(), client_address(request.environ)
    throttle((f"forgot:{network_of(client)}", 10))
    now = clock.now_ms()

    def work(tx: Tx) -> str | None:
        user = users.by_email(tx, email)
        if user is None or user.status != "active":
            return None
        if links.was_made_lately(tx, now, user_id=user.id):
            return None
        return users.reset_link(tx, user, now, Actor(user.id, client))

    token = instance().db.write(work)
    if token is not None:
        url = f"{instance().settings.public_url}/reset?token={token}"
        mail.send_later(smtp, email, "A new password", mail.reset_text(url))
    return page("auth/forgot.html", has_mail=True, asked=True)


@blueprint.route("/invite", methods=["GET", "POST"])
def invite() -> BaseResponse:
    """Join an account: as who is signed in, or as a new person with an account of their own too."""
    token, link = _link("invite")
    if link is None:
        return _dead_link()
    with instance().db.reading() as tx:
        invitation = members.invited(tx, link.membership_id)
        owner = users.owner_of(tx, link.account_id)
        host = None if owner is None else users.name_of(tx, owner.id)
    if owner is not None and host == owner.id:
        host = None  # which says nothing to anybody
    asked = invitation.email or ""
    if request.method != "POST" and not current_user.is_authenticated:
        return _form("invite", token, asked, host=host)
    if request.method != "POST":
        return page("auth/join.html", token=token, host=host, me=current_user.user)
    if current_user.is_authenticated:
        me, now = visitor(), clock.now_ms()
        instance().db.write(
            lambda tx: members.join(tx, token, me.user.id, now, me.actor), durable=True
        )
        return _joined(link.account_id, host)
    by = Actor("invite", client_address(request.environ))

    def work(tx: Tx, email: str, hashed: str, now: int) -> User:
        user = users.add(tx, email, hashed, False, now, by)
        members.join(tx, token, user.id, now, Actor(user.id, by.address))
        return user

    answer = _submitted("invite", work, token, asked, host=host)
    return _joined(link.account_id, host) if answer.status_code == 303 else answer


def _joined(account_id: str, host: str | None) -> BaseResponse:
    """On to the account that was joined."""
    session[CHOICE] = account_id
    flash(f"You have joined {host}’s account." if host else "You have joined.")
    return redirect("/dashboard", 303)


# Forms that ask for an e-mail and a password


def _link(purpose: str) -> tuple[str, Link | None]:
    """The token that was sent, and the link it is, if it can still be used."""
    token = request.values.get("token", "")
    with instance().db.reading() as tx:
        return token, links.look_at(tx, purpose, token, clock.now_ms())


def _form(
    purpose: str, token: str = "", email: str = "", problem: str = "", status: int = 200,
    host: str | None = None,
) -> Response:  # fmt: skip
    return page(
        "auth/form.html", status,
        purpose=purpose, token=token, email=email, problem=problem, host=host, **_ways(),
    )  # fmt: skip


def _submitted(
    purpose: str, work: Work, token: str = "", fixed: str = "", host: str | None = None
) -> BaseResponse:
    """Act on a form and sign its person in, or show what is wrong with it. A reset's e-mail is
    given (`fixed`); an invitation's only suggested."""
    typed = fixed if purpose == "reset" else request.form.get("email", "").strip()
    network = network_of(client_address(request.environ))
    try:
        throttle((f"{purpose}:{network}", instance().settings.limits.failed_auth_per_minute))
        email = typed if purpose == "reset" else users.checked_email(typed)
        hashed = passwords.hashed(request.form.get("password", ""), email)
        now = clock.now_ms()
        user = instance().db.write(lambda tx: work(tx, email, hashed, now), durable=True)
    except Refusal as refusal:
        if refusal.kind.status >= 500:
            raise
        answer = _form(purpose, token, typed, refusal.message, refusal.kind.status, host)
        answer.headers.update(refusal.headers)
        return answer
    if not sign_in(user, purpose, hashed):
        return redirect("/login", 303)  # it was replaced a moment later
    return redirect("/dashboard", 303)


def _dead_link() -> Response:
    return page("auth/used.html", 404)


def _ways() -> dict[str, object]:
    """What a sign-in page offers besides a password."""
    settings = instance().settings
    return {
        "providers": {name: section.label for name, section in settings.oidc.items()},
        "signup_open": settings.instance.signup == "open",
    }
