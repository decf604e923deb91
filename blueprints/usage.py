"""What an account's calls were: a list one can filter, each explained, all of them as CSV."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlencode

from flask import Blueprint, Response, request
from flask_login import login_required

from blueprints import pictures
from blueprints.api import moment
from blueprints.pages import before, cursor, day_name, names_of, seat, show
from blueprints.pictures import Bar
from blueprints.rendering import instance
from blueprints.tables import Cell, csv_response
from core import calls, clock, daily, errors, keys, ledger, rates
from core.calls import Filter, Total
from core.daily import Group
from core.errors import Refusal
from core.instance import Instance
from core.rates import Working
from core.sessions import Seat
from core.tariff import Model
from models import Tx

blueprint = Blueprint("usage", __name__, url_prefix="/dashboard")
blueprint.before_request(before)

_PER_PAGE = 50
_PER_BATCH = 1000
_DEFAULT_DAYS = 30
_MOST_DAYS = 366
_COLUMNS = (
    "request_id", "created_at", "route", "method", "payer", "key_id", "user_id", "model",
    "input_tokens", "output_tokens", "units", "price", "held", "captured", "status",
    "upstream_status", "duration_ms", "estimated", "cost_usd",
)  # fmt: skip


class Wish(NamedTuple):
    """What the form of the usage page asks for."""

    first_day: int
    last_day: int
    key: str | None
    route: str | None
    model: str | None
    status: str | None

    @property
    def filter(self) -> Filter:
        since, until = self.first_day * clock.DAY_MS, (self.last_day + 1) * clock.DAY_MS
        return Filter(self.key, self.route, self.model, self.status, since, until)

    @property
    def asked(self) -> dict[str, str]:
        """What its form says."""
        days = {"from": day_name(self.first_day), "to": day_name(self.last_day)}
        return days | {name: value for name, value in self._kept().items() if value}

    def query(self, **more: Any) -> str:
        """The same wish as the query of a link."""
        return urlencode(self.asked | more)

    def kept(self) -> str:
        """What a link to other days keeps."""
        kept = urlencode({name: value for name, value in self._kept().items() if value})
        return f"&{kept}" if kept else ""

    def _kept(self) -> dict[str, str | None]:
        return {
            "key": self.key, "route": self.route, "model": self.model, "status": self.status,
        }  # fmt: skip


@blueprint.get("/usage")
@login_required
def listed() -> Response:
    found, who = instance(), seat()
    try:
        wish, before_number = _wish(), cursor()
    except Refusal as refusal:
        return _not_understood(refusal)
    rows = calls.find(found.db, who.account_id, wish.filter, before_number, _PER_PAGE + 1)
    shown = rows[:_PER_PAGE]
    with found.db.snapshot() as tx:
        groups = _groups(tx, who.account_id, wish)
        key_names = _key_names(tx, who)
        people = names_of(tx, {call["user_id"] for _, call in shown if call["user_id"]})
        has_called = ledger.has_called(tx, who.account_id)
    older = wish.query(before=shown[-1][0]) if len(rows) > len(shown) else None
    return show(
        "dashboard/usage.html", wish=wish, asked=wish.asked,
        calls=shown, older=older, is_first=before_number is None,
        total=_total(calls.add_up(groups), wish.status), key_names=key_names, people=people,
        routes=_routes(groups), models=_models(groups), by_model=_by_model(groups, wish),
        statuses=STATUS_WORDS, has_called=has_called,
        days=pictures.by_day(
            groups, wish.first_day, wish.last_day, wish.status == "voided", wish.kept()
        ),
    )  # fmt: skip


def _not_understood(problem: Refusal) -> Response:
    """The form as it was filled in, what is wrong with it, and nothing that was not asked for."""
    with instance().db.reading() as tx:
        key_names = _key_names(tx, seat())
    return show(
        "dashboard/usage.html", problem=problem, asked=request.args, key_names=key_names,
        routes=_routes([]), models=_models([]), statuses=STATUS_WORDS,
    )  # fmt: skip


def _key_names(tx: Tx, who: Seat) -> dict[str, str]:
    """The names of the keys a person may see: who is no owner sees whose the others are."""
    return keys.names(tx, who.account_id, None if who.is_owner else who.user_id)


def _routes(groups: list[Group]) -> list[str]:
    """The routes to choose from: those there are, and those that were called."""
    served = {route.path for route in instance().catalog.routes}
    return sorted(served | {group.route for group in groups})


def _models(groups: list[Group]) -> list[str]:
    """The models to choose from, likewise."""
    return sorted({*instance().catalog.models, *(group.model for group in groups if group.model)})


def _by_model(groups: list[Group], wish: Wish) -> list[Bar]:
    """Which models the credits went to, where that is not what was asked."""
    if wish.model is not None or wish.status not in (None, "captured"):
        return []
    return pictures.by_model(groups, lambda model: wish.query(model=model))


def _groups(tx: Tx, account_id: str, wish: Wish) -> list[Group]:
    """What is counted and drawn: of ended calls when one way to end is wished for, else of all."""
    if wish.status in (None, "held"):
        return calls.groups(tx, account_id, wish.filter)
    found = daily.groups(tx, account_id, wish.first_day, wish.last_day, wish.filter.group)
    if wish.status == "captured":
        return [group._replace(calls=group.calls - group.failed, failed=0) for group in found]
    return found


# In people's words.
STATUS_WORDS = {"captured": "charged", "voided": "not charged", "held": "in flight"}


@blueprint.get("/usage/<request_id>")
@login_required
def explained(request_id: str) -> Response:
    """Why a call cost what it cost. Callers may give several calls one id, so our own links name
    the call's number too."""
    found, who, number = instance(), seat(), cursor("n")
    named = calls.named(found.db, who.account_id, None, request_id, number)
    if named is None:
        raise errors.not_found()
    call_id, call = named
    with found.db.reading() as tx:
        key_name = _key_names(tx, who).get(call["key_id"])
        people = names_of(tx, {call["user_id"]} - {None})
        entries = ledger.entries_about(tx, call_id)
    route = next(
        (
            route
            for route in found.catalog.routes
            if route.path == call["route"] and call["method"] in route.methods
        ),
        None,
    )
    model = found.catalog.models.get(call["model"] or "")
    return show(
        "dashboard/call.html",
        call=call, route=route, key_name=key_name, person=people.get(call["user_id"]),
        asked=model and rates.asked(model), working=model and _working(model, call),
        refund=next((entry for entry in entries if entry["kind"] == "refund"), None),
        entry=next((entry for entry in entries if entry["kind"] == "capture"), None),
    )  # fmt: skip


def _working(model: Model, call: dict[str, Any]) -> Working | None:
    """How a call's price comes about at the rates of now; None while its tokens are not known."""
    if call["input_tokens"] is None:
        return None
    return rates.working(model, call["output_tokens"] or 0, call["input_tokens"])


@blueprint.get("/usage.csv")
@login_required
def exported() -> Response:
    """All calls of the filter, however many."""
    wish, account_id = _wish(), seat().account_id
    name = f"usage-{day_name(wish.first_day)}-{day_name(wish.last_day)}.csv"
    return csv_response(name, _COLUMNS, _batches(instance(), account_id, wish.filter))


def _batches(found: Instance, account_id: str, wanted: Filter) -> Iterator[list[Sequence[Cell]]]:
    before_number = None
    while rows := calls.find(found.db, account_id, wanted, before_number, _PER_BATCH):
        yield [[call[column] for column in _COLUMNS] for _, call in rows]
        before_number = rows[-1][0]


def _wish() -> Wish:
    """What is asked for; the last thirty days if nothing is. Raises `validation_error`."""
    asked = request.args.get
    until, since = moment(asked("to") or None, "to"), moment(asked("from") or None, "from")
    last = pictures.today() if until is None else until // clock.DAY_MS
    first = max(0, last - _DEFAULT_DAYS + 1) if since is None else since // clock.DAY_MS
    if first < 0 or not 0 <= last - first < _MOST_DAYS:
        raise errors.invalid_body("The first day lies before the last, by a year at most.", "from")
    status = asked("status") or None
    if status is not None and status not in calls.STATUSES:
        raise errors.invalid_body(f"A status is one of {', '.join(calls.STATUSES)}.", "status")
    key, route, model = (asked(name) or None for name in ("key", "route", "model"))
    return Wish(first, last, key, route, model, status)


def _total(total: Total, status: str | None) -> Total:
    """The part of a total that has a status."""
    return total._replace(calls=total.failed, captured=0) if status == "voided" else total
