"""One payment, one request: what a payment gets that is shown, for the first time or again."""

from typing import Any, NamedTuple

from core import calls, idempotency, ledger, tokens, wallets
from core.errors import Refusal
from core.idempotency import Stored
from core.payments import payment as payments
from core.payments import records, wire
from core.payments.payment import Payment
from core.payments.records import UNDECIDED, Record, Use
from core.wallets import Wallet
from models import Tx


class Tender(NamedTuple):
    """A payment that came with a request, and what it is to pay for."""

    payment: Payment
    use: Use
    units: int  # the price, in the token's smallest units
    resource: str
    incarnation: str


class Answered(NamedTuple):
    """This very request was answered before."""

    stored: Stored
    record: Record | None = None  # what has paid for it, where the payment tells


def fingerprint(print_: bytes, bearer_account: str | None) -> bytes:
    """What makes two requests the same for a payment: the request, and who is credited."""
    return tokens.digest(print_, (bearer_account or "").encode())


def known(
    tx: Tx, tender: Tender | None, account_id: str, key: str | None, print_: bytes, now: int
) -> Refusal | Answered | Record | None:
    """What is known of a request by its payment or the caller's Idempotency-Key: why it gets
    nothing now; its answer; a settled payment whose credits were not spent on it, so that it may be
    tried again; or None, and it is new."""
    record = None if tender is None else records.find(tx, tender.payment.key)
    if record is not None and record.status == "refused":
        record = None
    is_its = (
        tender is not None and record is not None and (record.fingerprint == tender.use.fingerprint)
    )
    if record is not None and is_its and record.status in UNDECIDED:
        return unconfirmed(record.id) if record.status == "unknown" else in_progress()
    if key is not None:
        for scope in _scopes(tx, tender, account_id):
            found = idempotency.find(tx, scope, key, print_, now)
            if isinstance(found, Stored):
                has_paid = record is not None and is_its and record.answer_key == key
                return Answered(found, record if has_paid else None)
            if found is not None:
                return _unless_unconfirmed(tx, scope, key, found)
    if record is None:
        return None
    return _settled(tx, record, print_, now) if is_its else already_used()


def _scopes(tx: Tx, tender: Tender | None, account_id: str) -> list[str]:
    """Under whom an Idempotency-Key may be kept: the account, and the wallet as long as a payment
    under the key is being settled, because there may be no account before."""
    if tender is None or tender.use.account_id is not None:
        return [account_id]
    owner = wallets.owner_of(tx, tender.payment.wallet)
    return [tender.payment.wallet.id, *([] if owner is None else [owner.account_id])]


def _unless_unconfirmed(tx: Tx, scope: str, key: str, refusal: Refusal) -> Refusal:
    """The refusal of a key that is taken; or, when a payment has it whose end nobody knows, that:
    nobody shall pay a second time under it."""
    if refusal.code == "idempotency_in_progress":
        holder = records.by_id(tx, idempotency.holder(tx, scope, key))
        if holder is not None and holder.status == "unknown":
            return unconfirmed(holder.id)
    return refusal


def _settled(tx: Tx, record: Record, print_: bytes, now: int) -> Refusal | Answered | Record:
    """What a settled payment gets that is shown again with its request."""
    assert record.account_id is not None and record.decided_at is not None  # it is settled
    if record.decided_at + idempotency.LIFE_MS <= now:
        return already_used()
    found = idempotency.find(tx, record.account_id, record.answer_key, print_, now)
    if found is None and record.fingerprint == fingerprint(print_, None):
        # The wallet's own account, which may have been merged into another since, answers and all.
        owner = wallets.owner_of(tx, Wallet(record.wallet, record.wallet_name))
        if owner is not None and ledger.status_of(tx, record.account_id) == "closed":
            found = idempotency.find(tx, owner.account_id, record.answer_key, print_, now)
    if isinstance(found, Stored):
        return Answered(found, record)
    if isinstance(found, Refusal):
        return in_progress() if found.code == "idempotency_in_progress" else found
    was_spent = record.purpose == "topup" or (
        record.call_id is not None and calls.status_of(tx, record.call_id) == "captured"
    )
    return already_used() if was_spent else record


def claim(tx: Tx, tender: Tender, now: int) -> Record | Refusal:
    """Claim a payment of which nothing is known, and with it the caller's Idempotency-Key, so that
    no second payment is taken under it; or say what is wrong with it."""
    wrong = payments.fault(tender.payment, tender.units, tender.resource, now)
    if wrong is not None:
        return wrong
    record = records.claim(tx, tender.payment, tender.use, tender.incarnation, now)
    if record is None:
        return in_progress()
    if tender.use.idempotency_key is not None:
        idempotency.claim(tx, _scope(record), record.answer_key, tender.use.print, record.id, now)
    return record


def refuse(tx: Tx, record: Record, reason: str, now: int) -> bool:
    """No money moved, and will not: the payment can be claimed again, and the Idempotency-Key it
    was claimed under is free. Whether that is news."""
    is_news = records.refuse(tx, record, reason, now)
    if is_news:
        let_go(tx, record)
    return is_news


def let_go(tx: Tx, record: Record) -> None:
    """Free the Idempotency-Key under which a payment was being settled."""
    idempotency.release(tx, _scope(record), record.answer_key, record.id)


def _scope(record: Record) -> str:
    """Under whom the Idempotency-Key is kept until there are credits: there may be no account."""
    return record.account_id or record.wallet


def in_progress() -> Refusal:
    return Refusal(
        "payment_in_progress",
        "A request with this payment is being served.",
        headers={"Retry-After": "1"},
    )


def already_used() -> Refusal:
    return Refusal("payment_already_used", "This payment was spent before.")


def unconfirmed(payment_id: str) -> Refusal:
    """Nobody knows how a payment ended."""
    return Refusal(
        "payment_unconfirmed",
        "Whether the payment was settled is not known yet. Do not pay again: send the same request"
        " with the same payment.",
        headers={"Retry-After": "5"},
        fields={"payment": payment_id},
    )


def receipt(record: Record, reason: str | None = None) -> str:
    """PAYMENT-RESPONSE: how a payment ended; `reason` is why it did not go through."""
    told: dict[str, Any] = {
        "success": reason is None,
        "payer": Wallet(record.wallet, record.wallet_name).address,
        "transaction": record.transaction_id or "",
        "network": record.network,
    }
    return wire.encode(told if reason is None else told | {"errorReason": reason})
