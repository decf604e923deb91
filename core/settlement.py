"""One ending for every call, whichever way it leaves: captured or voided, once."""

import logging
import sys
from collections.abc import Callable

from core import clock, idempotency, ledger, limits, members
from core.idempotency import Stored
from core.instance import Instance
from core.ledger import Outcome, Resolved, Standing
from models import Tx

log = logging.getLogger("farebox.settlement")


# An answer to keep for repeats. One that tells what it was charged is made in the transaction
# that charges.
Answering = Stored | Callable[[Resolved], Stored | None] | None


def capture(
    tx: Tx, call_id: str, credits: int, outcome: Outcome, answer: Answering, now: int
) -> Resolved | None:
    """Charge a held call and keep its answer for repeats, in one transaction."""
    resolved = ledger.capture(tx, call_id, credits, outcome, now)
    if resolved is not None:
        _release_limit(tx, resolved)
        if resolved.idempotency_key is not None:
            key = resolved.idempotency_key
            if callable(answer):
                answer = _made(answer, resolved)
            idempotency.keep(tx, resolved.call.account_id, key, call_id, answer)
    return resolved


def _made(answer: Callable[[Resolved], Stored | None], resolved: Resolved) -> Stored | None:
    """The answer to keep. A charge does not fail for it: that would leave its hold for ever."""
    try:
        return answer(resolved)
    except Exception:
        log.exception("the answer to a repeat could not be made")
        return None


def void(tx: Tx, call_id: str, outcome: Outcome) -> Resolved | None:
    """Give a held call's credits back and free its idempotency key, in one transaction."""
    resolved = ledger.void(tx, call_id, outcome)
    if resolved is not None:
        _release_limit(tx, resolved)
        if resolved.idempotency_key is not None:
            account_id = resolved.call.account_id
            idempotency.release(tx, account_id, resolved.idempotency_key, call_id)
    return resolved


def _release_limit(tx: Tx, resolved: Resolved) -> None:
    """Uncount what was not captured, from the key's limit and from the member's."""
    if not resolved.released:
        return
    call = resolved.call
    if resolved.credit_window_at is not None and call.key_id is not None:
        limits.release_credits(tx, call.key_id, resolved.credit_window_at, resolved.released)
    if resolved.member_window_at is not None and call.user_id is not None:
        subject = members.limit_subject(call.account_id, call.user_id)
        limits.release_credits(tx, subject, resolved.member_window_at, resolved.released)


class Settlement:
    """The ending of one call in this process. Whatever is asked after the first does nothing."""

    def __init__(self, instance: Instance, call_id: str) -> None:
        self.call_id = call_id
        self._instance = instance
        self._settled = False
        self._started = clock.monotonic()

    def capture(self, credits: int, outcome: Outcome, answer: Answering) -> Resolved | None:
        """Charge; how it ended, on the disk when this returns. None when it had ended before.

        Raises `storage_unavailable`, or what else went wrong, when the database cannot; the hold is
        then voided as soon as it can, because the caller is told that nothing was charged.
        """
        if self._settled:
            return None
        outcome, now = self._timed(outcome), clock.now_ms()
        self._settled = True
        try:
            resolved = self._instance.db.write(
                lambda tx: capture(tx, self.call_id, credits, outcome, answer, now), durable=True
            )
        except Exception:
            self._later(lambda tx: void(tx, self.call_id, outcome))
            raise
        if resolved is None:
            log.error("call %s was resolved before its answer came; it is free", self.call_id)
        return resolved

    def capture_sent(self, credits: int, outcome: Outcome, answer: Answering) -> Resolved | None:
        """Charge for an answer that is already delivered; how it ended. None when it had ended
        before, or when the charge must be made later, because the database cannot take it now."""
        if self._settled:
            return None
        outcome, now = self._timed(outcome), clock.now_ms()
        self._settled = True

        def work(tx: Tx) -> Resolved | None:
            return capture(tx, self.call_id, credits, outcome, answer, now)

        try:
            return self._instance.db.write(work, durable=True)
        except Exception:
            self._later(work)
            return None

    def void(self, upstream_status: int | None = None) -> Standing | None:
        """Give everything back; the account after it, or None when that must wait."""
        if self._settled:
            return None
        outcome = self._timed(Outcome(upstream_status, None))
        self._settled = True

        def work(tx: Tx) -> Resolved | None:
            return void(tx, self.call_id, outcome)

        try:
            resolved = self._instance.db.write(work)
        except Exception:
            self._later(work)
            return None
        return None if resolved is None else resolved.standing

    def __del__(self) -> None:
        # Nobody ended the call and nobody can any more: an error lost the answer on its way out.
        # Only noted here, because this may run inside a transaction of the same thread.
        if not self._settled:
            call_id, outcome = self.call_id, Outcome(None, None)
            self._later(lambda tx: void(tx, call_id, outcome))

    def _later(self, work: Callable[[Tx], object]) -> None:
        log.error(
            "call %s could not be settled; it will be tried again",
            self.call_id,
            exc_info=sys.exc_info()[1],
        )
        self._instance.unsettled.append(work)

    def _timed(self, outcome: Outcome) -> Outcome:
        return outcome._replace(duration_ms=int((clock.monotonic() - self._started) * 1000))
