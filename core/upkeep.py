"""What must happen without anyone asking: orphans voided, late endings made, old rows pruned."""

import logging
import random
import threading
from collections.abc import Callable, Sequence

from core import (
    calls,
    clock,
    errors,
    idempotency,
    incarnation,
    keys,
    limits,
    links,
    session_tokens,
    sessions,
    settlement,
)  # fmt: skip
from core.instance import Instance
from core.ledger import Outcome
from core.payments import reconciler, records
from core.signed import nonces
from models import Tx

log = logging.getLogger("farebox.upkeep")

EVERY_SECONDS = 5.0
ORPHANS_AT_ONCE = 200


def void_orphans(instance: Instance) -> int:
    """Void every hold of a worker that is gone, whatever took it; how many there were."""
    with instance.db.reading() as tx:
        held = calls.in_flight(tx)
    folder = instance.settings.incarnations
    gone = {name for name in {name for _, name in held} if not incarnation.is_alive(folder, name)}
    orphans = [call_id for call_id, name in held if name in gone]
    for start in range(0, len(orphans), ORPHANS_AT_ONCE):
        batch = orphans[start : start + ORPHANS_AT_ONCE]
        try:
            _void_all(instance, batch)
        except errors.Refusal:
            raise
        except Exception:
            # One that cannot be voided must not keep the others.
            for call_id in batch:
                try:
                    _void_all(instance, [call_id])
                except Exception:
                    log.exception("the orphan hold of call %s cannot be voided", call_id)
    if orphans:
        log.warning("voided %d holds of workers that are gone", len(orphans))
    return len(orphans)


def _void_all(instance: Instance, call_ids: list[str]) -> None:
    def work(tx: Tx) -> None:
        for call_id in call_ids:
            settlement.void(tx, call_id, Outcome(None, None))

    instance.db.write(work)


def settle_late(instance: Instance) -> None:
    """Try again what the database could not take when a call ended."""
    for _ in range(len(instance.unsettled)):
        work = instance.unsettled.popleft()
        try:
            instance.db.write(work, durable=True)
        except errors.Refusal:
            instance.unsettled.append(work)
            return
        except Exception:
            instance.unsettled.append(work)
            log.exception("a late ending failed; trying again")


def tidy(instance: Instance) -> None:
    """Write down what expired, forget what no request can read again."""
    now = clock.now_ms()
    instance.db.write(lambda tx: _latch(tx, now))
    while instance.db.write(lambda tx: idempotency.prune(tx, now)) == idempotency.PRUNED_AT_ONCE:
        pass  # another batch: sustained traffic must not outrun the pruning
    while instance.db.write(lambda tx: nonces.prune(tx, now)) == nonces.PRUNED_AT_ONCE:
        pass
    instance.db.write(lambda tx: _prune(tx, now))
    instance.db.checkpoint()


def _latch(tx: Tx, now: int) -> None:
    keys.latch_expired(tx, now)
    links.latch_expired(tx, now)
    sessions.latch_expired(tx, now)
    session_tokens.latch_expired(tx, now)


def _prune(tx: Tx, now: int) -> None:
    limits.prune(tx, now)
    links.prune(tx, now)
    session_tokens.prune(tx, now)
    sessions.prune(tx, now)
    records.prune(tx, now)


def refresh_issuers(instance: Instance) -> None:
    """Have the outside issuers' keys at hand before they are needed."""
    instance.issuers.refresh()


def reconcile_payments(instance: Instance) -> None:
    """Find out how payments ended, and ask facilitators what they do."""
    assert instance.desk is not None  # `begin` has looked
    instance.desk.refresh()
    reconciler.reconcile(instance)


class Upkeep(threading.Thread):
    """Does the rounds in one worker for as long as it lives. Two workers at it do no harm."""

    def __init__(self, instance: Instance, name: str = "upkeep") -> None:
        super().__init__(name=name, daemon=True)
        self._instance = instance
        self._stopped = threading.Event()

    def duties(self) -> Sequence[Callable[[Instance], object]]:
        """What is done in each round."""
        return settle_late, void_orphans, tidy, refresh_issuers

    def run(self) -> None:
        while not self._stopped.is_set():
            for duty in self.duties():
                try:
                    duty(self._instance)
                except errors.Refusal:
                    log.warning("%s: the database is in trouble; trying again", duty.__name__)
                except Exception:
                    log.exception("%s failed; trying again", duty.__name__)
            self._stopped.wait(EVERY_SECONDS * random.uniform(0.8, 1.2))

    def stop(self) -> None:
        """End after the round in progress. An interpreter that ends under a thread in the middle of
        a statement can wait for ever for the lock that thread holds."""
        self._stopped.set()
        self.join(timeout=5)


class PaymentUpkeep(Upkeep):
    """The rounds that wait for others' networks, apart from those that are promised in seconds."""

    def __init__(self, instance: Instance) -> None:
        super().__init__(instance, "payments")

    def duties(self) -> Sequence[Callable[[Instance], object]]:
        return (reconcile_payments,)


def begin(instance: Instance) -> list[Upkeep]:
    """Start the rounds of a worker."""
    found = [Upkeep(instance)]
    if instance.desk is not None:
        found.append(PaymentUpkeep(instance))
    for each in found:
        each.start()
    return found
