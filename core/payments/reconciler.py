"""What became of payments that nobody heard the end of: found out, and their credits entered."""

import logging
from collections.abc import Iterator

from core import audit, clock, incarnation
from core.audit import Actor
from core.errors import Refusal
from core.instance import Instance
from core.payments import claims, deposits, records
from core.payments.facilitator import Verdict
from core.payments.records import Record
from models import Tx

log = logging.getLogger("farebox.payments")

AT_ONCE = 20
# Whoever looks has it for themselves so long, in case they do not come back.
_LEASE_MS = 3 * clock.MINUTE_MS
_SLOW_SECONDS = 15.0


def find_orphans(instance: Instance) -> int:
    """Note of every payment whose worker is gone that nobody knows how it ended; how many."""
    with instance.db.reading() as tx:
        settling = records.settling(tx)
    folder, now = instance.settings.incarnations, clock.now_ms()
    orphans = [
        record for record in settling if not incarnation.is_alive(folder, record.incarnation)
    ]
    for record in orphans:
        _lose_sight(instance, record, Verdict("unknown", None, "its worker is gone"), now)
    if orphans:
        log.warning("%d payments were being settled by workers that are gone", len(orphans))
    return len(orphans)


def reconcile(instance: Instance) -> None:
    """One round: what is due is looked for."""
    find_orphans(instance)
    with instance.db.reading() as tx:
        due = records.due(tx, clock.now_ms(), AT_ONCE)
    slow: set[str] = set()  # networks that have held up this round enough
    for payment_id, network in due:
        if network in slow:
            continue
        began = clock.monotonic()
        look_for(instance, payment_id)
        if clock.monotonic() - began > _SLOW_SECONDS:
            slow.add(network)


def look_for(instance: Instance, payment_id: str) -> Verdict | None:
    """Find out how a payment ended, and act on it; None when somebody else is at it."""
    assert instance.desk is not None  # without [x402] nobody looks
    now = clock.now_ms()
    record = instance.db.write(lambda tx: records.take(tx, payment_id, now, now + _LEASE_MS))
    if record is None:
        return None
    try:
        verdict = instance.desk.find_out(record)
    except Refusal:
        raise
    except Exception:
        log.exception("payment %s cannot be looked for", payment_id)
        verdict = Verdict("unknown", None, "our own fault; see the log")
    decide(instance, record, verdict)
    return verdict


def look_now(instance: Instance, payment_id: str | None = None) -> Iterator[tuple[str, Verdict]]:
    """Find out how an unknown payment ended, or all of them, whenever they are due."""
    find_orphans(instance)
    now = clock.now_ms()
    for found in instance.db.write(lambda tx: records.make_due(tx, payment_id, now)):
        verdict = look_for(instance, found)
        if verdict is not None:
            yield found, verdict


def overrule(instance: Instance, payment_id: str, verdict: Verdict, by: Actor) -> None:
    """Act on what the operator says became of a payment. Raises as `rule` does."""
    now = clock.now_ms()
    instance.db.write(lambda tx: rule(tx, payment_id, verdict, now, by), durable=True)


def rule(tx: Tx, payment_id: str, verdict: Verdict, now: int, by: Actor) -> None:
    """Note what the operator says became of a payment, and enter its credits if it was settled.
    Raises `not_found`, and `conflict` for one that is decided or still on its way; but that one was
    settled which is held for refused can be said."""
    record = records.get(tx, payment_id)
    may_be = ("unknown", "refused") if verdict.outcome == "settled" else ("unknown",)
    if record.status not in may_be:
        raise Refusal("conflict", f"The payment is {record.status}.")
    account_id = record.account_id
    if verdict.outcome == "settled":
        paid = record._replace(transaction_id=verdict.transaction)
        account_id, _ = deposits.deposit(tx, paid, now)
    else:
        claims.refuse(tx, record, verdict.reason, now)
    audit.note(
        tx, by, f"payment.{verdict.outcome}", now, account_id, payment_id,
        transaction=verdict.transaction,
    )  # fmt: skip


def decide(instance: Instance, record: Record, verdict: Verdict) -> bool:
    """Act on what became of a payment; whether that was news."""
    now = clock.now_ms()
    if verdict.outcome == "settled":
        paid = record._replace(transaction_id=verdict.transaction)
        _, is_news = instance.db.write(lambda tx: deposits.deposit(tx, paid, now), durable=True)
    elif verdict.outcome == "refused":
        is_news = instance.db.write(
            lambda tx: claims.refuse(tx, record, verdict.reason, now), durable=True
        )
    else:
        _lose_sight(instance, record, verdict, now)
        return False
    if is_news:
        log.info("payment %s: %s", record.id, verdict.outcome)
    return is_news


def _lose_sight(instance: Instance, record: Record, verdict: Verdict, now: int) -> None:
    transaction, reason = verdict.transaction, verdict.reason
    instance.db.write(
        lambda tx: records.lose_sight(tx, record, transaction, reason, now), durable=True
    )
