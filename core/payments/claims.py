"""One payment, one request: what a payment gets that is shown, for the first time or again."""

from typing import Any, NamedTuple

from core import calls, idempotency, tokens, wallets
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
    """The payment was taken for this very request before, and this was the answer."""

    record: Record
    stored: Stored


def fingerprint(print_: bytes, bearer_account: str | None) -> bytes:
    """What makes two requests the same for a payment: the request, and who is credited."""
    return tokens.digest(print_, (bearer_account or "").encode())


def known(tx: Tx, tender: Tender, now: int) -> Refusal | Answered | Record | None:
    """What is known of a payment: why it does nothing now; its answer; a settled one whose credits
    were not spent on its request, which may be tried again; or None, and it can be claimed."""
    record = records.find(tx, tender.payment.key)
    if record is None or record.status == "refused":
        return None
    if record.fingerprint != tender.use.fingerprint:
        return already_used()
    if record.status == "unknown":
        return unconfirmed(record.id)
    if record.status in UNDECIDED:
        return in_progress()
    assert record.account_id is not None and record.decided_at is not None  # it is settled
    if record.decided_at + idempotency.LIFE_MS <= now:
        return already_used()
    found = idempotency.find(tx, record.account_id, record.answer_key, tender.use.print, now)
    if isinstance(found, Stored):
        return Answered(record, found)
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


def running(tx: Tx, tender: Tender, now: int) -> Refusal | None:
    """Whether another payment of the same payer is being settled under the caller's
    Idempotency-Key, or was a moment ago, when the payer's account was not there to be looked at."""
    key = tender.use.idempotency_key
    if key is None:
        return None
    scopes = [tender.use.account_id or tender.payment.wallet.id]
    owner = wallets.owner_of(tx, tender.payment.wallet)
    if tender.use.account_id is None and owner is not None:
        scopes.append(owner.account_id)
    for scope in scopes:
        found = idempotency.find(tx, scope, key, tender.use.print, now)
        if isinstance(found, Refusal):
            return found
        if found is not None:
            return idempotency.in_progress()
    return None


def refuse(tx: Tx, record: Record, reason: str, now: int) -> bool:
    """No money moved, and will not; whether that is news."""
    is_news = records.refuse(tx, record, reason, now)
    let_go(tx, record)
    return is_news


def release(tx: Tx, record: Record) -> None:
    """The payment never left this machine: it was not claimed."""
    records.release(tx, record.id)
    let_go(tx, record)


def lose_sight(tx: Tx, record: Record, transaction: str | None, reason: str, now: int) -> None:
    """Nobody knows how it ended; it is looked for."""
    records.lose_sight(tx, record, transaction, reason, now)
    let_go(tx, record)


def let_go(tx: Tx, record: Record) -> None:
    """Free the Idempotency-Key under which a payment was being settled."""
    idempotency.release(tx, _scope(record), record.answer_key, record.id)


def _scope(record: Record) -> str:
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
