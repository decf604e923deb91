"""What an account has and who may spend it: balance, vouchers, keys, session token, ledger."""

from calendar import monthrange
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

from flask import Blueprint, Response, flash, redirect, request
from flask_login import login_required
from werkzeug.wrappers import Response as BaseResponse

from blueprints import pictures
from blueprints.api import moment
from blueprints.pages import (
    KINDS,
    act,
    before,
    counted,
    cursor,
    day_name,
    field,
    month_of,
    once,
    payments_of,
    required,
    seat,
    show,
    whole,
)
from blueprints.rendering import client_address, instance
from blueprints.tables import Cell, csv_response
from blueprints.visitors import visitor
from core import (
    access,
    clock,
    daily,
    errors,
    examples,
    keys,
    ledger,
    scopes,
    session_tokens,
    vouchers,
)
from core.audit import Actor
from core.errors import Refusal
from core.instance import Instance
from core.keys import Key, NewSecret, Terms
from core.payments.payment import MOST_UNITS
from core.session_tokens import Issued
from core.sessions import Seat
from models import Tx

blueprint = Blueprint("billing", __name__, url_prefix="/dashboard/billing")
blueprint.before_request(before)

QUICK_NAME = "Cursor / agent"
GRACES = {"0": "at once", "3600": "in an hour", "86400": "in a day", "604800": "in a week"}
_ENTRIES = 20
_PER_PAGE = 100
_PER_BATCH = 1000
_COLUMNS = ("id", "created_at", "kind", "amount", "balance", "reference", "note")


@blueprint.get("")
@blueprint.get("/keys")  # where the answers to forms are shown, and may be loaded again
@blueprint.get("/keys/quick")
@blueprint.get("/redeem")
@blueprint.get("/session-token")
@login_required
def home() -> Response:
    return _home()


def _home(problem: Refusal | None = None, issued: Issued | None = None) -> Response:
    found, who, now = instance(), seat(), clock.now_ms()
    whose = None if who.is_owner else who.user_id
    with found.db.reading() as tx:
        listed = keys.newest(tx, who.account_id, whose, cursor(), _PER_PAGE + 1)
    entries = [entry for _, entry in ledger.entries(found.db, who.account_id, None, None, _ENTRIES)]
    with found.db.reading() as tx:
        payments = payments_of(tx, entries)
    shown = listed[:_PER_PAGE]
    return show(
        "dashboard/billing.html", problem=problem, issued=issued,
        keys=shown, now=now, older=shown[-1].number if len(listed) > len(shown) else None,
        scopes=_scopes([]),
        entries=entries, payments=payments, words=KINDS, month=f"{month_of(None):%Y-%m}",
        buying=_buying(found), paying=_paying(found),
    )  # fmt: skip


# Adding credits


class Buying(NamedTuple):
    """How a program with a wallet buys credits."""

    networks: list[str]
    units_per_credit: int
    least: int
    most: int
    curl: str
    install: str
    program: str


def _buying(found: Instance) -> Buying | None:
    """The same for this account; None where nothing is paid on the spot."""
    terms = found.settings.payments
    if terms is None:
        return None
    credits, url = terms.topup_credits, found.settings.public_url + examples.TOP_UP
    network, units = next(iter(terms.networks)), credits * terms.units_per_credit
    body = {"credits": credits}
    return Buying(
        list(terms.networks), terms.units_per_credit, terms.topup_min, terms.topup_max,
        examples.curl_of(url, "POST", "$FAREBOX_API_KEY", body), examples.paying_install(network),
        examples.paying(url, "POST", body, network, units, "FAREBOX_API_KEY"),
    )  # fmt: skip


class Paying(NamedTuple):
    """What a person with a wallet in their browser can buy, and where they can pay it."""

    networks: list[str]
    units_per_credit: int
    least: int
    most: int
    usual: int


def _paying(found: Instance) -> Paying | None:
    """The same for this account; None where nothing is paid on Ethereum's networks."""
    terms = found.settings.payments
    if terms is None:
        return None
    networks = [each.id for each in terms.networks.values() if each.namespace == "eip155"]
    most = min(terms.topup_max, MOST_UNITS // terms.units_per_credit)
    if not networks or most < terms.topup_credits:
        return None
    return Paying(networks, terms.units_per_credit, terms.topup_min, most, terms.topup_credits)


@blueprint.post("/redeem")
@login_required
def redeem() -> BaseResponse:
    """Turn a voucher's code into credits."""
    most = instance().settings.limits.failed_auth_per_minute
    account_id, now = seat().account_id, clock.now_ms()
    client = client_address(request.environ)

    def work(tx: Tx, who: Seat, by: Actor, now: int) -> int:
        return vouchers.redeem(tx, code, who.account_id, now, by)[0]

    try:
        code = required("code", "The code")
        rate = instance().db.write(
            lambda tx: vouchers.count_attempt(tx, client, account_id, most, now)
        )
        if rate.exceeded:
            raise errors.rate_limited("Too many attempts. Wait a minute.", rate.reset_seconds)
        added = act(work)
    except Refusal as refusal:
        if refusal.code == "not_found":
            refusal.message = "That code is not one of ours, or was used before."
        return _home(refusal)
    flash(f"Added {counted(added, 'credit')}.")
    return redirect("/dashboard/billing", 303)


# Keys


@blueprint.post("/keys/quick")
@login_required
def quick() -> Response:
    """A key for an editor or an agent, in one click."""
    return _create(lambda: Terms(QUICK_NAME))


@blueprint.post("/keys")
@login_required
def create() -> Response:
    return _create(_terms)


def _create(wish: Callable[[], Terms]) -> Response:
    try:
        terms = wish()
        terms.check(clock.now_ms())  # before the hash, which takes its time
        access.require_active(seat())
        secret, key_id = NewSecret(instance().settings.instance.key_prefix), once("key")

        def work(tx: Tx, who: Seat, by: Actor, now: int) -> Key:
            keys.add(tx, who.account_id, who.user_id, terms, secret, now, by, key_id)
            return keys.get(tx, key_id)

        return _secret(act(work), secret, "Your new key")
    except Refusal as refusal:
        return _home(refusal)


@blueprint.route("/keys/<key_id>", methods=["GET", "POST"])
@login_required
def one(key_id: str) -> BaseResponse:
    """A key's terms, to be looked at and changed."""
    key = _owned(key_id)
    if request.method != "POST":
        return _one(key)

    def work(tx: Tx, who: Seat, by: Actor, now: int) -> None:
        mine = keys.owned(tx, key_id, who)
        changes = {
            name: value for name, value in wanted.items() if value != getattr(mine.terms, name)
        }
        if changes:
            keys.change(tx, mine, changes, now, by)

    try:
        terms = _terms()
        if field("expires") == _day(key.expires_at):  # a day says less than a time
            terms = replace(terms, expires_at=key.expires_at)
        if set(terms.scopes or ()) == set(key.scopes or ()) and None not in (
            terms.scopes,
            key.scopes,
        ):
            terms = replace(terms, scopes=key.scopes)  # a form knows no order
        wanted = {name: getattr(terms, name) for name in Terms.__slots__}
        act(work)
    except Refusal as refusal:
        return _one(key, refusal)
    flash(f"Changed {terms.name}.")
    return redirect("/dashboard/billing", 303)


def _one(key: Key, problem: Refusal | None = None) -> Response:
    now = clock.now_ms()
    return show(
        "dashboard/key.html", problem=problem, key=key, now=now, is_now=key.status_at(now),
        expires=_day(key.expires_at),
        scopes=_scopes(key.scopes or []),
    )  # fmt: skip


@blueprint.route("/keys/<key_id>/revoke", methods=["GET", "POST"])
@login_required
def revoke(key_id: str) -> BaseResponse:
    def work(tx: Tx, who: Seat, by: Actor, now: int) -> None:
        keys.revoke(tx, keys.owned(tx, key_id, who).id, now, by)

    return _confirmed("revoke", key_id, work, "Revoked")


@blueprint.route("/keys/<key_id>/suspend", methods=["GET", "POST"])
@login_required
def suspend(key_id: str) -> BaseResponse:
    reason = field("reason")

    def work(tx: Tx, who: Seat, by: Actor, now: int) -> None:
        keys.check_reason(reason)
        keys.suspend(tx, keys.owned(tx, key_id, who).id, reason, now, by)

    return _confirmed("suspend", key_id, work, "Suspended")


@blueprint.route("/keys/<key_id>/resume", methods=["GET", "POST"])
@login_required
def resume(key_id: str) -> BaseResponse:
    def work(tx: Tx, who: Seat, by: Actor, now: int) -> None:
        key = keys.owned(tx, key_id, who)
        keys.resume(tx, key.id, now, by, is_owner=who.is_owner)

    return _confirmed("resume", key_id, work, "Resumed")


def _confirmed(
    verb: str, key_id: str, work: Callable[[Tx, Seat, Actor, int], None], done: str
) -> BaseResponse:
    """Ask first; then do it."""
    key = _owned(key_id)
    if request.method != "POST":
        return show("dashboard/confirm_key.html", key=key, verb=verb, now=clock.now_ms())
    try:
        act(work)
    except Refusal as refusal:
        return show(
            "dashboard/confirm_key.html", problem=refusal, key=key, verb=verb, now=clock.now_ms()
        )
    flash(f"{done} {key.name}.")
    return redirect("/dashboard/billing", 303)


@blueprint.route("/keys/<key_id>/rotate", methods=["GET", "POST"])
@login_required
def rotate(key_id: str) -> Response:
    """A new secret; the old one works for the grace that was chosen."""
    key = _owned(key_id)
    if request.method != "POST":
        return show("dashboard/rotate.html", key=key, graces=GRACES)
    grace_ms = int(whole("grace_seconds") or 0) * 1000
    try:
        return _rotated(key, grace_ms)
    except Refusal as refusal:
        return show("dashboard/rotate.html", problem=refusal, key=key, graces=GRACES)


@blueprint.route("/keys/<key_id>/regenerate", methods=["GET", "POST"])
@login_required
def regenerate(key_id: str) -> Response:
    """A new secret at once, for whoever fears that the old one is known."""
    key, problem = _owned(key_id), None
    if request.method == "POST":
        try:
            return _rotated(key, 0)
        except Refusal as refusal:
            problem = refusal
    return show(
        "dashboard/confirm_key.html", problem=problem, key=key, verb="regenerate",
        now=clock.now_ms(),
    )  # fmt: skip


def _rotated(key: Key, grace_ms: int) -> Response:
    """The page with a key's new secret. Raises as `keys.rotate` does."""
    keys.check_grace(grace_ms)
    secret, start = NewSecret(instance().settings.instance.key_prefix), field("start")

    def work(tx: Tx, who: Seat, by: Actor, now: int) -> Key:
        mine = keys.owned(tx, key.id, who)
        keys.rotate(tx, mine.id, secret, grace_ms, now, by, start)
        return keys.get(tx, mine.id)

    return _secret(act(work), secret, "The new secret")


def _secret(key: Key, secret: NewSecret, title: str) -> Response:
    """A key with its secret: only here and now."""
    found = instance()
    base, routes = found.settings.public_url, found.catalog.routes
    example = examples.first_for(routes, key.scopes)
    return show(
        "dashboard/secret.html", title=title, key=key, secret=secret.token,
        curl=example and examples.curl(base, example, secret.token, key.scopes),
        openai_base=examples.openai_base(base, routes, key.scopes),
    )  # fmt: skip


def _day(at_ms: int | None) -> str:
    return "" if at_ms is None else day_name(at_ms // clock.DAY_MS)


def _owned(key_id: str) -> Key:
    with instance().db.reading() as tx:
        return keys.owned(tx, key_id, seat())


def _terms() -> Terms:
    """The terms a form asks for. Raises `validation_error`."""
    limit, period = whole("credit_limit"), field("credit_period")
    chosen = request.form.getlist("scopes") if field("restricted") else None
    return Terms(
        required("name", "A name"), chosen, moment(field("expires"), "expires"),
        limit, period if limit is not None else None, whole("rate_limit"),
    )  # fmt: skip


class Scopes(NamedTuple):
    """What a form offers to tick: the scopes that routes ask for, and those that name models."""

    of_routes: list[str]
    of_models: list[str]


def _scopes(has: list[str]) -> Scopes:
    """The scopes there are, and those a key has already."""
    catalog = instance().catalog
    found = {route.scope for route in catalog.routes if route.scope is not None} | set(has)
    found |= {f"{scopes.MODEL}{model}" for model in catalog.models}
    known = sorted(scope for scope in found if keys.is_scope(scope))
    of_models = [scope for scope in known if scope.startswith(scopes.MODEL)]
    return Scopes([scope for scope in known if scope not in of_models], of_models)


# The session token


@blueprint.post("/session-token")
@login_required
def reveal() -> Response:
    """A fresh session token, shown on the page that asked for it."""
    found, me = instance(), visitor()
    try:
        access.require_active(seat())
        issued = session_tokens.mint(
            found.db, found.signing_keys, found.settings.public_url, me.session,
            seat().account_id, clock.now_ms(),
        )  # fmt: skip
    except Refusal as refusal:
        return _home(refusal)
    return _home(issued=issued)


@blueprint.post("/session-token/revoke")
@login_required
def revoke_token() -> BaseResponse:
    """End the token that the page shows."""
    token_id, me, now = request.form.get("token_id", ""), visitor(), clock.now_ms()
    ended = instance().db.write(
        lambda tx: session_tokens.revoke_own(tx, token_id, me.user.id, now, me.actor), durable=True
    )
    flash("That token has ended." if ended else "That token had ended before.")
    return redirect("/dashboard/billing", 303)


# The ledger


@blueprint.get("/ledger")
@login_required
def entries() -> Response:
    """All that moved the balance, newest first."""
    rows = ledger.entries(instance().db, seat().account_id, None, cursor(), _PER_PAGE + 1)
    shown = [entry for _, entry in rows[:_PER_PAGE]]
    older = rows[_PER_PAGE - 1][0] if len(rows) > len(shown) else None
    with instance().db.reading() as tx:
        payments = payments_of(tx, shown)
    return show("dashboard/ledger.html", entries=shown, older=older, words=KINDS,
                payments=payments)  # fmt: skip


@blueprint.get("/statement")
@login_required
def statement() -> Response:
    """What a month began with, what came and went, what it ended with."""
    account_id, month = seat().account_id, month_of(request.args.get("month"))
    first, last = _days(month.year, month.month)
    with instance().db.snapshot() as tx:
        opening = daily.balance_before(tx, account_id, first)
        has_earlier = daily.has_entries_before(tx, account_id, first)
        kinds = daily.kinds(tx, account_id, first, last)
        captures = daily.entered_by_day(tx, account_id, "capture", first, last)
        aside = [kind for kind in kinds if kind.kind != "capture"]
        others = ledger.entries_aside(
            tx, account_id, min((kind.first_number for kind in aside), default=1),
            max((kind.last_number for kind in aside), default=0), _PER_BATCH,
        )  # fmt: skip
    days, is_cut = {day_name(day) for day in range(first, last + 1)}, len(others) == _PER_BATCH
    others = [entry for entry in others if entry["created_at"][:10] in days]
    is_over = last < pictures.today()
    return show(
        "dashboard/statement.html", month=month, opening=opening, kinds=kinds,
        by_day=[(day_name(day), count, amount) for day, count, amount in captures],
        closing=opening + sum(kind.amount for kind in kinds), others=others,
        is_cut=is_cut, is_over=is_over, words=KINDS, made_at=clock.now_ms(),
        earlier=f"{month - timedelta(days=1):%Y-%m}" if has_earlier else None,
        later=f"{month + timedelta(days=31):%Y-%m}" if is_over else None,
    )  # fmt: skip


@blueprint.get("/statement.csv")
@login_required
def statement_csv() -> Response:
    """Every entry of a month, newest first."""
    month = month_of(request.args.get("month"))
    first, last = _days(month.year, month.month)
    rows = _entries_of(instance(), seat().account_id, first, last)
    return csv_response(f"statement-{month:%Y-%m}.csv", _COLUMNS, rows)


def _entries_of(
    found: Instance, account_id: str, first: int, last: int
) -> Iterator[list[Sequence[Cell]]]:
    with found.db.reading() as tx:
        kinds = daily.kinds(tx, account_id, first, last)
    if not kinds:
        return
    low = min(kind.first_number for kind in kinds)
    number = max(kind.last_number for kind in kinds) + 1
    days = {day_name(day) for day in range(first, last + 1)}
    while rows := ledger.entries(found.db, account_id, None, number, _PER_BATCH):
        yield [
            [entry[column] for column in _COLUMNS]
            for own, entry in rows
            if own >= low and entry["created_at"][:10] in days
        ]
        number = rows[-1][0]
        if number <= low:
            return


def _days(year: int, month: int) -> tuple[int, int]:
    """The first and last day of a month, in days since the epoch."""
    first = pictures.day_of(f"{year:04}-{month:02}-01")
    return first, first + monthrange(year, month)[1] - 1
