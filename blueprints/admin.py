"""The operator's pages: accounts, keys, vouchers, prices, what is in flight, who did what."""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import NamedTuple

from flask import Blueprint, Response, flash, redirect, request
from flask_login import current_user, login_required
from werkzeug.wrappers import Response as BaseResponse

from blueprints import pages, pictures
from blueprints.pages import (
    KINDS,
    counted,
    cursor,
    field,
    names_of,
    not_operator,
    number,
    once,
    operate,
    required,
    show,
    whole,
)
from blueprints.rendering import instance
from blueprints.visitors import visitor
from config import ModelSection
from core import (
    audit,
    calls,
    clock,
    daily,
    errors,
    keys,
    ledger,
    members,
    oversight,
    rates,
    upstream,
    vouchers,
)  # fmt: skip
from core.adapters.sms import TWILIO_URL
from core.audit import Actor
from core.daily import Sold
from core.errors import Refusal
from core.keys import Key
from core.oversight import AccountRow
from core.rates import Loss
from core.tariff import Model
from models import Tx

blueprint = Blueprint("admin", __name__, url_prefix="/admin")
blueprint.before_request(pages.before)

_PER_PAGE = 50
_DAYS = 30
_LONGEST_NOTE = 200
_NEWEST = (10**15, "")
_PATIENCE_SECONDS = 3
_DONE = {"revoke": "Revoked", "suspend": "Suspended", "resume": "Resumed"}


@blueprint.before_request
def _operators_only() -> None:
    if current_user.is_authenticated and not visitor().user.is_operator:
        raise not_operator()


# Accounts


@blueprint.get("")
@login_required
def home() -> Response:
    text, since = request.args.get("q", "").strip(), pictures.today() - _DAYS + 1
    with instance().db.snapshot() as tx:
        found = oversight.accounts(tx, text, _place(), since, _PER_PAGE + 1)
        totals = oversight.totals(tx)
        sold = daily.together(daily.sold(tx, since).values())
    shown = found[:_PER_PAGE]
    return show(
        "admin/accounts.html", accounts_found=shown, q=text, totals=totals,
        spent=sold.captured,
        older=_after(shown[-1].created_at, shown[-1].id) if len(found) > len(shown) else None,
    )  # fmt: skip


@blueprint.get("/accounts/<account_id>")
@login_required
def account(account_id: str) -> Response:
    return _account_page(account_id)


def _account_page(account_id: str, problem: Refusal | None = None) -> Response:
    found = _account(account_id)
    with instance().db.reading() as tx:
        people = members.of_account(tx, account_id)
        listed = keys.newest(tx, account_id, None, None, _PER_PAGE)
    entries = ledger.entries(instance().db, account_id, None, None, 20)
    return show(
        "admin/account.html", problem=problem, found=found, people=people, keys=listed,
        now=clock.now_ms(), entries=[entry for _, entry in entries], words=KINDS,
    )  # fmt: skip


@blueprint.route("/accounts/<account_id>/grant", methods=["GET", "POST"])
@login_required
def grant(account_id: str) -> BaseResponse:
    def do() -> str:
        credits = _amount(least=1)
        _move(account_id, "grant", credits, _note())
        return f"Granted {counted(credits, 'credit')}."

    return _asked("grant", account_id, do)


@blueprint.route("/accounts/<account_id>/adjust", methods=["GET", "POST"])
@login_required
def adjust(account_id: str) -> BaseResponse:
    """Correct a balance, up or down, with a reason."""

    def do() -> str:
        credits = _amount(least=-ledger.LARGEST_AMOUNT)
        required("note", "A reason")
        try:
            _move(account_id, "adjustment", credits, _note())
        except Refusal as refusal:
            if refusal.code == "insufficient_credits":
                left, wanted = refusal.fields["credits"], counted(-credits, "credit")
                refusal.message = f"{wanted} cannot be taken away: {number(left)} are available."
            raise
        sign = "+" if credits > 0 else ""
        return f"Adjusted by {sign}{counted(credits, 'credit')}."

    return _asked("adjust", account_id, do)


@blueprint.route("/accounts/<account_id>/refund", methods=["GET", "POST"])
@login_required
def refund(account_id: str) -> BaseResponse:
    """Give the credits of one of the account's calls back, once."""

    def do() -> str:
        request_id, note = required("request_id", "The request id"), _note()
        with instance().db.reading() as tx:
            here = calls.ids_of_request(tx, request_id, account_id)
        if not here:
            raise Refusal("not_found", "This account has no such call.")
        if len(here) > 1:
            raise Refusal("conflict", "Several calls have that id.")

        def work(tx: Tx, by: Actor, now: int) -> int:
            credits, _ = ledger.refund(tx, here[0], note, now)
            audit.note(
                tx, by, "credits.refund", now, account_id, here[0], amount=credits, note=note
            )
            return credits

        return f"Refunded {counted(operate(work), 'credit')}."

    return _asked("refund", account_id, do)


@blueprint.route("/accounts/<account_id>/suspend", methods=["GET", "POST"])
@login_required
def suspend(account_id: str) -> BaseResponse:
    def do() -> str:
        reason = field("reason")
        keys.check_reason(reason)
        operate(lambda tx, by, now: ledger.suspend_account(tx, account_id, reason, now, by))
        return "Suspended."

    return _asked("suspend", account_id, do)


@blueprint.route("/accounts/<account_id>/resume", methods=["GET", "POST"])
@login_required
def resume(account_id: str) -> BaseResponse:
    def do() -> str:
        operate(lambda tx, by, now: ledger.resume_account(tx, account_id, now, by))
        return "Resumed."

    return _asked("resume", account_id, do)


def _asked(verb: str, account_id: str, do: Callable[[], str]) -> BaseResponse:
    """Ask first, then do it and tell what was done."""
    found, problem = _account(account_id), None
    if request.method == "POST":
        try:
            flash(do())
        except Refusal as refusal:
            problem = refusal
        else:
            return redirect(f"/admin/accounts/{account_id}", 303)
    return show("admin/ask.html", problem=problem, found=found, verb=verb)


def _move(account_id: str, kind: str, credits: int, note: str | None) -> None:
    """Move credits, once for each form that was shown. Raises as `ledger.add_credits` does, and
    `conflict` for a form that was sent before."""
    reference = once(kind)

    def work(tx: Tx, by: Actor, now: int) -> None:
        if ledger.add_credits(tx, account_id, kind, credits, reference, note, now) is None:
            raise Refusal("conflict", "This form was sent before, and did what it says then.")
        audit.note(tx, by, f"credits.{kind}", now, account_id, reference, amount=credits, note=note)

    operate(work)


def _amount(least: int) -> int:
    """The credits a form asks for. Raises `validation_error`."""
    credits = whole("credits", least)
    if credits is None:
        raise errors.invalid_body("How many credits?", "credits")
    return credits


def _note() -> str | None:
    """What an entry is told to be for. Raises `validation_error`."""
    text = field("note")
    if text is not None and not (len(text) <= _LONGEST_NOTE and text.isprintable()):
        told = f"A note has 1 to {_LONGEST_NOTE} printable characters."
        raise errors.invalid_body(told, "note")
    return text


def _account(account_id: str) -> AccountRow:
    with instance().db.reading() as tx:
        found = oversight.account(tx, account_id, pictures.today() - _DAYS + 1)
    if found is None:
        raise errors.not_found()
    return found


# Keys of all accounts


@blueprint.get("/keys")
@login_required
def all_keys() -> Response:
    text = request.args.get("q", "").strip()
    with instance().db.reading() as tx:
        found = keys.search(tx, text, _place(), _PER_PAGE + 1)
        names = names_of(tx, {key.user_id for key in found if key.user_id})
    shown = found[:_PER_PAGE]
    return show(
        "admin/keys.html", keys=shown, q=text, names=names, now=clock.now_ms(),
        older=_after(shown[-1].created_at, shown[-1].id) if len(found) > len(shown) else None,
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


# Vouchers


@blueprint.route("/vouchers", methods=["GET", "POST"])
@login_required
def all_vouchers() -> Response:
    """The vouchers there are; those just made show their codes, only now."""
    codes: list[str] = []
    problem, before = None, cursor()

    if request.method == "POST":
        try:
            codes = _make_vouchers()
        except Refusal as refusal:
            problem = refusal
    with instance().db.reading() as tx:
        found = vouchers.page(tx, before, _PER_PAGE + 1)
        names = names_of(tx, {voucher.created_by for voucher in found})
    shown = found[:_PER_PAGE]
    return show(
        "admin/vouchers.html", problem=problem, codes=codes, vouchers=shown, names=names,
        older=shown[-1].number if len(found) > len(shown) else None,
    )  # fmt: skip


def _make_vouchers() -> list[str]:
    credits, count, note = _amount(least=1), whole("count", least=1) or 1, field("note")
    first_id = once("vch")
    return operate(lambda tx, by, now: vouchers.make(tx, credits, count, note, now, by, first_id))


@blueprint.route("/vouchers/<voucher_id>/cancel", methods=["GET", "POST"])
@login_required
def cancel_voucher(voucher_id: str) -> BaseResponse:
    """Ask first, then make a code worthless."""
    if request.method != "POST":
        return show("admin/cancel_voucher.html", voucher_id=voucher_id)
    operate(lambda tx, by, now: vouchers.cancel(tx, voucher_id, now, by))
    flash("The voucher is worth nothing any more.")
    return redirect("/admin/vouchers", 303)


# Prices


class Margin(NamedTuple):
    """What something brought, and what it cost in dollars."""

    total: Sold
    refunded: int  # credits given back
    margin: Decimal  # dollars


class Priced(NamedTuple):
    """A model: what it asks for and costs, in words, and a call that costs more than it brings."""

    section: ModelSection
    asked: str
    costs: str | None
    loss: Loss | None


@blueprint.get("/prices")
@login_required
def prices() -> Response:
    """What is asked for each route and model, what it costs, and what was left of it."""
    catalog, usd = instance().catalog, instance().settings.usd_per_credit
    since = pictures.today() - _DAYS + 1
    with instance().db.snapshot() as tx:
        sold, refunds = daily.sold(tx, since), ledger.refunded(tx, since * clock.DAY_MS)
    called = [*sold, *refunds]

    def margin(part: int, name: str) -> Margin:
        """Of a route (part 0 of what was called) or of a model (part 1)."""
        total = daily.together(each for key, each in sold.items() if key[part] == name)
        refunded = sum(credits for key, credits in refunds.items() if key[part] == name)
        return Margin(total, refunded, usd * (total.captured - refunded) - total.cost_usd)

    paths = dict.fromkeys([route.path for route in catalog.routes] + [key[0] for key in called])
    ids = dict.fromkeys([*catalog.models, *(key[1] for key in called if key[1])])
    return show(
        "admin/prices.html", usd=usd,
        routes=[(p, [r for r in catalog.routes if r.path == p], margin(0, p)) for p in paths],
        models=[(i, _priced(catalog.models.get(i), usd), margin(1, i)) for i in ids],
    )  # fmt: skip


def _priced(model: Model | None, usd: Decimal) -> Priced | None:
    if model is None:
        return None
    return Priced(model.section, rates.asked(model), rates.costs(model), rates.loss(model, usd))


# What goes on


@blueprint.get("/calls")
@login_required
def in_flight() -> Response:
    with instance().db.reading() as tx:
        found = calls.open_now(tx, 200)
        totals = oversight.totals(tx)
    return show("admin/calls.html", calls=found, totals=totals, now=clock.now_ms())


@blueprint.get("/audit")
@login_required
def audited() -> Response:
    """Who did what, in one account or in all."""
    account_id = request.args.get("account") or None
    rows = audit.page(instance().db, account_id, cursor(), _PER_PAGE + 1)
    shown = rows[:_PER_PAGE]
    with instance().db.reading() as tx:
        people = {done["actor"] for _, done in shown if done["actor"].startswith("user_")}
        names = names_of(tx, people)
    return show(
        "admin/audit.html", rows=[done for _, done in shown], names=names, account_id=account_id,
        older=shown[-1][0] if len(rows) > len(shown) else None,
    )  # fmt: skip


@blueprint.route("/health", methods=["GET", "POST"])
@login_required
def health() -> Response:
    """How upstreams have done of late; asked for, whether they can be reached now."""
    found = instance()
    with found.db.reading() as tx:
        lately = daily.sold(tx, pictures.today() - 1)
    reached = {}
    if request.method == "POST":
        for name, section in found.settings.upstreams.items():
            url = section.base_url or (TWILIO_URL if section.kind == "twilio" else None)
            reached[name] = None if url is None else upstream.reach(url, _PATIENCE_SECONDS)
    rows = [_served(name, lately) for name in found.settings.upstreams]
    return show("admin/health.html", rows=rows, reached=reached)


class Served(NamedTuple):
    """What an upstream is there for, and how the calls that went to it first have ended."""

    name: str
    kind: str
    paths: list[str]
    models: list[str]
    stands_in: list[str]  # models whose first upstream is another
    total: Sold


def _served(name: str, lately: dict[tuple[str, str], Sold]) -> Served:
    catalog, settings = instance().catalog, instance().settings
    by_model = [route for route in catalog.routes if route.models]
    # A model goes to its own upstream, or to that of the route.
    firsts = {
        (route.path, section.id)
        for route in by_model
        for section in settings.models
        if name == (section.upstream or route.upstream_name)
    }
    plain = {route.path for route in catalog.routes if route.upstream_name == name}
    plain -= {route.path for route in by_model}
    ids = [section.id for section in settings.models]
    return Served(
        name,
        settings.upstreams[name].kind,
        [r.path for r in catalog.routes if r.path in plain | {path for path, _ in firsts}],
        [model_id for model_id in ids if any(model_id == found for _, found in firsts)],
        [section.id for section in settings.models if by_model and section.fallback == name],
        daily.together(each for key, each in lately.items() if key in firsts or key[0] in plain),
    )


# Places in lists that are ordered by time


def _place() -> tuple[int, str]:
    text = request.args.get("before")
    if text is None:
        return _NEWEST
    found = re.fullmatch(r"([0-9]{1,15})\.([a-z]+_[0-9a-z]{1,40})", text, re.ASCII)
    if found is None:
        raise errors.invalid_body("That is not a place in this list.", "before")
    return int(found[1]), found[2]


def _after(created_at: int, row_id: str) -> str:
    return f"{created_at}.{row_id}"
