"""The operator's pages of accounts: what each has, and what is done to them."""

from collections.abc import Callable

from flask import Response, flash, redirect, request
from flask_login import login_required
from werkzeug.wrappers import Response as BaseResponse

from blueprints import pictures
from blueprints.admin import DAYS, PER_PAGE, after, amount, place, section
from blueprints.pages import (
    KINDS,
    counted,
    field,
    number,
    once,
    operate,
    payments_of,
    required,
    show,
)
from blueprints.rendering import instance
from core import audit, calls, clock, daily, errors, keys, ledger, members, oversight, wallets
from core.audit import Actor
from core.errors import Refusal
from core.oversight import AccountRow
from models import Tx

blueprint = section("admin_accounts")

_LONGEST_NOTE = 200


@blueprint.get("")
@login_required
def home() -> Response:
    text, since = request.args.get("q", "").strip(), pictures.today() - DAYS + 1
    with instance().db.snapshot() as tx:
        found = oversight.accounts(tx, text, place(), since, PER_PAGE + 1)
        totals = oversight.totals(tx)
        sold = daily.together(daily.sold(tx, since).values())
    shown = found[:PER_PAGE]
    return show(
        "admin/accounts.html", accounts_found=shown, q=text, totals=totals,
        spent=sold.captured,
        older=after(shown[-1].created_at, shown[-1].id) if len(found) > len(shown) else None,
    )  # fmt: skip


@blueprint.get("/accounts/<account_id>")
@login_required
def account(account_id: str) -> Response:
    return _account_page(account_id)


def _account_page(account_id: str, problem: Refusal | None = None) -> Response:
    found = _account(account_id)
    with instance().db.reading() as tx:
        people = members.of_account(tx, account_id)
        listed = keys.newest(tx, account_id, None, None, PER_PAGE)
        linked = wallets.of_account(tx, account_id)
    entries = [entry for _, entry in ledger.entries(instance().db, account_id, None, None, 20)]
    with instance().db.reading() as tx:
        payments = payments_of(tx, entries)
    return show(
        "admin/account.html", problem=problem, found=found, people=people, keys=listed,
        now=clock.now_ms(), entries=entries, words=KINDS, wallets=linked, payments=payments,
    )  # fmt: skip


@blueprint.route("/accounts/<account_id>/grant", methods=["GET", "POST"])
@login_required
def grant(account_id: str) -> BaseResponse:
    def do() -> str:
        credits = amount(least=1)
        _move(account_id, "grant", credits, _note())
        return f"Granted {counted(credits, 'credit')}."

    return _asked("grant", account_id, do)


@blueprint.route("/accounts/<account_id>/adjust", methods=["GET", "POST"])
@login_required
def adjust(account_id: str) -> BaseResponse:
    """Correct a balance, up or down, with a reason."""

    def do() -> str:
        credits = amount(least=-ledger.LARGEST_AMOUNT)
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


def _note() -> str | None:
    """What an entry is told to be for. Raises `validation_error`."""
    text = field("note")
    if text is not None and not (len(text) <= _LONGEST_NOTE and text.isprintable()):
        told = f"A note has 1 to {_LONGEST_NOTE} printable characters."
        raise errors.invalid_body(told, "note")
    return text


def _account(account_id: str) -> AccountRow:
    with instance().db.reading() as tx:
        found = oversight.account(tx, account_id, pictures.today() - DAYS + 1)
    if found is None:
        raise errors.not_found()
    return found
