"""The operator's pages of all accounts' keys."""

from flask import Response, flash, redirect, request
from flask_login import login_required
from werkzeug.wrappers import Response as BaseResponse

from blueprints.admin import PER_PAGE, after, place, section
from blueprints.pages import field, names_of, operate, show
from blueprints.rendering import instance
from core import clock, keys
from core.errors import Refusal
from core.keys import Key

blueprint = section("admin_keys")

_DONE = {"revoke": "Revoked", "suspend": "Suspended", "resume": "Resumed"}


@blueprint.get("/keys")
@login_required
def all_keys() -> Response:
    text = request.args.get("q", "").strip()
    with instance().db.reading() as tx:
        found = keys.search(tx, text, place(), PER_PAGE + 1)
        names = names_of(tx, {key.user_id for key in found if key.user_id})
    shown = found[:PER_PAGE]
    return show(
        "admin/keys.html", keys=shown, q=text, names=names, now=clock.now_ms(),
        older=after(shown[-1].created_at, shown[-1].id) if len(found) > len(shown) else None,
    )  # fmt: skip


@blueprint.route("/keys/<key_id>/<any(revoke, suspend, resume):verb>", methods=["GET", "POST"])
@login_required
def change_key(key_id: str, verb: str) -> BaseResponse:
    """Ask first, then revoke, suspend or resume anybody's key."""
    problem = None
    with instance().db.reading() as tx:
        key = keys.get(tx, key_id)
    if request.method == "POST":
        try:
            _change_key(key, verb)
        except Refusal as refusal:
            problem = refusal
        else:
            flash(f"{_DONE[verb]} {key.name}.")
            return redirect("/admin/keys", 303)
    return show("admin/ask_key.html", problem=problem, key=key, verb=verb)


def _change_key(key: Key, verb: str) -> None:
    if verb == "suspend":
        reason = field("reason")
        keys.check_reason(reason)
        operate(lambda tx, by, now: keys.suspend(tx, key.id, reason, now, by))
    elif verb == "resume":
        operate(lambda tx, by, now: keys.resume(tx, key.id, now, by))
    else:
        operate(lambda tx, by, now: keys.revoke(tx, key.id, now, by))
