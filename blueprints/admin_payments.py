"""The operator's pages of payments on the spot: what became of each, and a word on those nobody
heard the end of."""

import logging
import re
import threading
from typing import Any, NamedTuple

from flask import Response, flash, redirect, request
from flask_login import login_required
from werkzeug.wrappers import Response as BaseResponse

from blueprints.admin import PER_PAGE, section
from blueprints.pages import PAYMENTS, cursor, operate, required, show
from blueprints.rendering import instance
from core import audit, clock, errors, users, wallets
from core.errors import Refusal
from core.instance import Instance
from core.payments import reconciler, records
from core.payments.facilitator import Verdict
from core.wallets import Wallet
from models import Tx

log = logging.getLogger("farebox.payments")

blueprint = section("admin_payments")

# A network may take minutes to tell; the look goes on, and the page is not kept waiting.
_PATIENCE_SECONDS = 15
_looking = threading.Lock()
_BASE58 = "[1-9A-HJ-NP-Za-km-z]"
# What a network calls a transaction; elsewhere it is not known how that looks.
_TRANSACTIONS = {"eip155": r"0x[0-9a-fA-F]{64}", "solana": rf"{_BASE58}{{64,88}}"}


class Whose(NamedTuple):
    """What a list of payments is narrowed to: an account, or a wallet by its id."""

    account_id: str | None = None
    wallet: str | None = None


@blueprint.get("/payments")
@login_required
def all_payments() -> BaseResponse:
    who, status = request.args.get("who", "").strip(), request.args.get("status") or None
    if re.fullmatch("pay_[0-9a-f]{24}", who):
        return redirect(f"/admin/payments/{who}", 303)
    if status is not None and status not in records.STATUSES:
        raise errors.invalid_body("A payment has no such status.", "status")
    before, problem, found = cursor(), None, []
    try:
        with instance().db.reading() as tx:
            whose = _whose(tx, who)
    except Refusal as refusal:
        problem = refusal
    else:
        found = records.page(
            instance().db, before, PER_PAGE + 1, whose.account_id, status, whose.wallet
        )
    shown = found[:PER_PAGE]
    return show(
        "admin/payments.html", payments=[payment.told() for payment in shown], who=who,
        chosen=status or "", words=PAYMENTS, nobody=problem and problem.message,
        older=shown[-1].number if len(found) > len(shown) else None,
    )  # fmt: skip


def _whose(tx: Tx, who: str) -> Whose:
    """Whom a text means: a wallet with or without its namespace, or as the command line has it.
    Raises `not_found`, `conflict`."""
    wallet = wallets.parse(who)
    if re.fullmatch("0x[0-9a-fA-F]{40}", who):
        wallet = Wallet.of("eip155", who)
    elif re.fullmatch(f"{_BASE58}{{32,44}}", who):
        wallet = Wallet.of("solana", who)
    if wallet is not None:
        return Whose(wallet=wallet.id)
    return Whose(users.account_of(tx, who)) if who else Whose()


@blueprint.get("/payments/<payment_id>")
@login_required
def payment(payment_id: str) -> Response:
    """All that is known of a payment, but for what was signed."""
    told = _told(payment_id)
    with instance().db.reading() as tx:
        wallet = wallets.parse(told["wallet"])
        owner = wallet and wallets.owner_of(tx, wallet)
    return show(
        "admin/payment.html", payment=told, words=PAYMENTS, can_look=instance().desk is not None,
        account_id=told["account_id"] or (owner and owner.account_id),
    )  # fmt: skip


@blueprint.post("/payments/<payment_id>/look")
@login_required
def look(payment_id: str) -> BaseResponse:
    """Ask the network or the facilitator once more, for as long as a page can wait."""
    account_id = _told(payment_id)["account_id"]
    operate(lambda tx, by, now: audit.note(tx, by, "payment.look", now, account_id, payment_id))
    found = instance()
    if found.desk is None:
        flash("There is no [x402] in the config, so nobody can be asked.")
    elif _is_found_out(found, payment_id):
        told = _told(payment_id)
        reason = f": {told['reason']}" if told["reason"] else ""
        flash(f"It is {PAYMENTS[told['status']]}{reason}.")
    else:
        flash("The look goes on: the network takes its time. Load this page again in a minute.")
    return redirect(f"/admin/payments/{payment_id}", 303)


def _is_found_out(found: Instance, payment_id: str) -> bool:
    """Find out how a payment ended; whether that has come to an end yet. One look at a time: who
    presses again gets no second thread."""
    if not _looking.acquire(blocking=False):
        return False

    def ask() -> None:
        try:
            for _ in reconciler.look_now(found, payment_id):
                pass
        except Refusal as refusal:  # the database was busy: it is looked for again by itself
            log.warning("payment %s cannot be looked for: %s", payment_id, refusal.message)
        finally:
            _looking.release()

    thread = threading.Thread(target=ask, name="look", daemon=True)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    return not thread.is_alive()


@blueprint.route("/payments/<payment_id>/<any(settled, refused):verdict>", methods=["GET", "POST"])
@login_required
def say(payment_id: str, verdict: str) -> BaseResponse:
    """Ask first, then take the operator's word for what became of a payment."""
    told, problem = _told(payment_id), None
    if request.method == "POST":
        try:
            if verdict == "settled":
                ruling = Verdict("settled", _transaction(told["network"]))
            else:
                ruling = Verdict("refused", None, "the operator says so")
            operate(lambda tx, by, now: reconciler.rule(tx, payment_id, ruling, now, by))
        except Refusal as refusal:
            problem = refusal
        else:
            flash("The credits are entered." if verdict == "settled" else "No money moved, it is.")
            return redirect(f"/admin/payments/{payment_id}", 303)
    return show(
        "admin/ask_payment.html", problem=problem, payment=told, verdict=verdict,
        now=clock.rfc3339(clock.now_ms()),
    )  # fmt: skip


def _transaction(network: str) -> str:
    """The transaction a form names. Raises `validation_error`."""
    text = required("transaction", "The transaction")
    pattern = _TRANSACTIONS.get(network.partition(":")[0], "[!-~]{1,200}")
    if not re.fullmatch(pattern, text):
        raise errors.invalid_body("A transaction on that network looks otherwise.", "transaction")
    return text


def _told(payment_id: str) -> dict[str, Any]:
    with instance().db.reading() as tx:
        return records.get(tx, payment_id).told()
