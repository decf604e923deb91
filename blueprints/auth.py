"""Links that work once: set the instance up, choose a new password."""

from collections.abc import Callable

from flask import Blueprint, Response, render_template, request

from blueprints.rendering import instance
from core import clock, users
from core.errors import Refusal
from core.users import Link
from models import Tx

blueprint = Blueprint("auth", __name__)


@blueprint.get("/")
def home() -> str:
    return render_template("auth/home.html")


@blueprint.route("/setup", methods=["GET", "POST"])
def setup() -> Response:
    """The first user, who owns the starter key's account and runs the instance."""
    return _link_page("setup", _set_up)


@blueprint.route("/reset", methods=["GET", "POST"])
def reset() -> Response:
    """A new password for the user the operator made this link for."""
    return _link_page("reset", _reset)


def _link_page(purpose: str, act: Callable[[Link, str, str, str], str]) -> Response:
    """Show a link's form, or act on it. The token in the form is the proof that the poster has the
    link, so no cookie is involved and there is nothing to forge across sites."""
    token = request.values.get("token", "")
    with instance().db.reading() as tx:
        link = users.look_at_link(tx, purpose, token, clock.now_ms())
        email = users.email_of(tx, link.user_id) if link and link.user_id else ""
    if link is None:
        return _page("auth/used.html", 404)
    if request.method == "GET":
        return _page("auth/form.html", 200, purpose=purpose, token=token, email=email)
    typed = request.form.get("email", email)
    try:
        done = act(link, token, typed, request.form.get("password", ""))
    except Refusal as refusal:
        return _page(
            "auth/form.html", refusal.kind.status,
            purpose=purpose, token=token, email=typed, problem=refusal.message,
        )  # fmt: skip
    return _page("auth/done.html", 200, email=done, purpose=purpose)


def _set_up(link: Link, token: str, typed: str, password: str) -> str:
    email = users.checked_email(typed)
    hashed = users.hashed_password(password, email)
    now = clock.now_ms()

    def work(tx: Tx) -> None:
        used = users.use_link(tx, "setup", token, now)
        users.add(tx, email, hashed, True, now, used.account_id)

    instance().db.write(work, durable=True)
    return email


def _reset(link: Link, token: str, typed: str, password: str) -> str:
    assert link.user_id is not None  # a reset is always somebody's
    user_id = link.user_id
    with instance().db.reading() as tx:
        email = users.email_of(tx, user_id)
    hashed = users.hashed_password(password, email)
    now = clock.now_ms()

    def work(tx: Tx) -> None:
        users.use_link(tx, "reset", token, now)
        users.set_password(tx, user_id, hashed)

    instance().db.write(work, durable=True)
    return email


def _page(template: str, status: int, **values: str) -> Response:
    return Response(render_template(template, **values), status, mimetype="text/html")
