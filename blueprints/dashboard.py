"""The first page of who is signed in: what is left, what was spent and by whom, what needs care."""

from urllib.parse import urlencode

from flask import Blueprint, Response, redirect, request
from flask_login import login_required
from werkzeug.wrappers import Response as BaseResponse

from blueprints import pictures
from blueprints.pages import before, choose, day_name, names_of, seat, show
from blueprints.rendering import instance
from blueprints.visitors import local_path
from core import calls, clock, daily, examples, keys, ledger
from core.calls import Filter, Total
from core.daily import Group
from core.ledger import Standing

blueprint = Blueprint("dashboard", __name__, url_prefix="/dashboard")
blueprint.before_request(before)

_DAYS = 30
_DAYS_OF_YEAR = 365
_NOBODYS = "Keys without an owner"
_LOOKED_AT = 100  # keys, for one that works
_ENOUGH_DAYS = 3  # with credits for less at the pace of the last seven, they run low


@blueprint.get("")
@login_required
def home() -> Response:
    found, who, now = instance(), seat(), clock.now_ms()
    today = pictures.today()
    whose = None if who.is_owner else who.user_id
    with found.db.snapshot() as tx:
        groups = calls.groups(tx, who.account_id, Filter(since=(today - _DAYS + 1) * clock.DAY_MS))
        kinds = daily.kinds(tx, who.account_id, today - _DAYS + 1, today)
        standing = ledger.standing(tx, who.account_id)
        expiring, unused = keys.in_need_of_care(tx, who.account_id, whose, now)
        is_new = not ledger.has_called(tx, who.account_id)
        mine = keys.newest(tx, who.account_id, whose, None, _LOOKED_AT) if is_new else []
        names = names_of(tx, {group.user_id for group in groups if group.user_id})
    spent = {days: _since(groups, today - days + 1) for days in (1, 7, _DAYS)}
    routes = found.catalog.routes
    example = examples.first_for(routes, None) if is_new else None
    return show(
        "dashboard/home.html",
        spent=spent,
        refunds=next((kind for kind in kinds if kind.kind == "refund"), None),
        a_year_ago=day_name(today - _DAYS_OF_YEAR),
        days=pictures.by_day(groups, today - _DAYS + 1, today, of_failed=False),
        people=pictures.ranked(
            groups, "member", lambda user: names.get(user, user) or _NOBODYS, lambda user: None
        ),
        routes=pictures.ranked(
            groups, "route", str, lambda route: f"/dashboard/usage?{urlencode({'route': route})}"
        ),
        models=pictures.by_model(groups, lambda model: urlencode({"model": model})),
        expiring=expiring, unused=unused, low=_runs_low(standing, spent[7].captured),
        is_new=is_new,
        has_key=any(key.status_at(now) == "active" for key in mine),
        curl=example and examples.curl(found.settings.public_url, example, "$FAREBOX_API_KEY"),
        openai_base=examples.openai_base(found.settings.public_url, routes, None),
    )  # fmt: skip


@blueprint.post("/account")
@login_required
def switch() -> BaseResponse:
    """Look at another account from now on."""
    choose(request.form.get("account", ""))
    return redirect(local_path(request.form.get("next")), 303)


def _since(groups: list[Group], day: int) -> Total:
    return calls.add_up(group for group in groups if group.day >= day)


def _runs_low(standing: Standing, spent_in_week: int) -> bool:
    """Whether it is time to add credits: below what the operator says or, without a word, when they
    would last less than three days at the pace of the last seven."""
    at_most = instance().settings.credit_low
    if at_most is not None:
        return standing.available <= at_most
    return standing.available <= 0 or standing.available * 7 < spent_in_week * _ENOUGH_DAYS
