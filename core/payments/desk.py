"""Where payments are taken, in one process: what is asked for, what is shown, what became of it."""

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

from config import Network, Settings
from core import clock
from core.errors import Refusal
from core.payments import chain, claims, evm, facilitator, records, svm, wire
from core.payments.facilitator import Support, Verdict
from core.payments.payment import MOST_UNITS, Payment, refused, requirement
from core.payments.records import Record
from models import Database, Tx

log = logging.getLogger("farebox.payments")

_RETRY_SECONDS = "5"
# So long a node may take to learn of what a facilitator says has happened.
_CONFIRM_SECONDS = 10.0
_CONFIRM_EVERY_SECONDS = 0.25
# A facilitator is asked who pays the fees at most so often, and every so often unasked.
_ASK_AGAIN_SECONDS, _FRESH_SECONDS = 10.0, 300.0
_FIRST_ANSWER_SECONDS = 1.0  # so long its first answer is waited for while another asks
_READERS = {"eip155": evm.read, "solana": svm.read}


class Desk:
    """Takes payments. `later` has what the database could not take now done when it can."""

    def __init__(
        self, settings: Settings, db: Database, later: Callable[[Callable[[Tx], object]], None]
    ) -> None:
        assert settings.payments is not None  # without [x402] there is no desk
        self.terms = settings.payments
        self._public_url = settings.public_url
        self._db = db
        self._later = later
        # Settling takes seconds; the other threads serve those who have paid before.
        self._places = threading.BoundedSemaphore(max(1, settings.threads // 2))
        self._fee_payers = {
            network.id: _FeePayers(network)
            for network in self.terms.networks.values()
            if network.namespace == "solana"
        }

    # Asking

    def url(self, path: str) -> str:
        """What is paid for, by its address."""
        return self._public_url + path

    def units(self, credits: int) -> int:
        """What so many credits cost, in the token's smallest units."""
        return credits * self.terms.units_per_credit

    def accepts(self, credits: int) -> list[dict[str, Any]]:
        """All ways to pay so many credits now."""
        units = self.units(credits)
        if units > MOST_UNITS:
            return []
        extras = ((network, self._extra(network)) for network in self.terms.networks.values())
        return [requirement(network, units, extra) for network, extra in extras if extra]

    def ask(self, refusal: Refusal, path: str, credits: int, about: str) -> Refusal:
        """The refusal, with what can be paid instead: in a header for machines and in the body for
        everybody. Becomes `facilitator_unavailable` when nothing else was asked and nothing can be
        paid just now; more than can be paid at once has no way to be paid."""
        accepts = self.accepts(credits)
        is_too_much = self.units(credits) > MOST_UNITS
        if not accepts and not is_too_much and refusal.code == "payment_required":
            return _unavailable("Nothing can be paid just now.")
        told = {
            "x402Version": wire.VERSION,
            "resource": {
                "url": self.url(path), "description": about, "mimeType": "application/json",
            },
            "accepts": accepts,
        }  # fmt: skip
        refusal.headers["PAYMENT-REQUIRED"] = wire.encode({"error": refusal.code, **told})
        refusal.fields.update(told)
        return refusal

    def _extra(self, network: Network) -> dict[str, str] | None:
        if network.namespace != "solana":
            return {"name": network.asset_name, "version": network.asset_version}
        payer = self._fee_payers[network.id].current()
        return None if payer is None else {"feePayer": payer}

    # Reading

    def read(self, header: str) -> Payment:
        """The payment in a PAYMENT-SIGNATURE, signed by its payer. Whether it pays enough, and us,
        is another question. Raises `validation_error`, `payment_invalid`."""
        payload = wire.decode_payload(header)
        if payload.x402_version != wire.VERSION:
            raise refused("unsupported_version", f"Version {wire.VERSION} of x402 is spoken here.")
        network = self.terms.networks.get(payload.accepted.network)
        if network is None:
            raise refused("unknown_network", "Nothing is paid on that network here.")
        payment = _READERS[network.namespace](network, payload)
        fee_payers = self._fee_payers.get(network.id)
        if fee_payers is not None and not fee_payers.knows(payment.extra["feePayer"]):
            payment = payment._replace(is_settleable=False)
        return payment

    # Settling

    def collect(self, record: Record) -> str:
        """Have a claimed payment settled: the network's transaction.

        Raises `payment_invalid` when no money moved, `facilitator_unavailable` when nothing was
        sent, `payment_unconfirmed` when nobody knows; what became of the claim is noted.
        """
        if not self._places.acquire(blocking=False):
            self._not_sent(record)
            raise Refusal(
                "overloaded", "Too many payments are being settled.", headers={"Retry-After": "1"}
            )
        try:
            verdict = self._settle(self.terms.networks[record.network], record, first=True)
        except BaseException:
            self._lose_sight(record, Verdict("unknown", reason="it was broken off"))
            raise
        finally:
            self._places.release()
        if verdict.outcome == "settled" and verdict.transaction is not None:
            # Where no node tells, this line may be all that is left of it if the worker dies now.
            log.info("payment %s is settled: %s", record.id, verdict.transaction)
            return verdict.transaction
        if verdict.outcome == "refused":
            now = clock.now_ms()
            self._note(lambda tx: claims.refuse(tx, record, verdict.reason, now))
            refusal = refused(verdict.reason, "The payment was not settled, and no money moved.")
            told = record._replace(transaction_id=verdict.transaction)
            refusal.headers["PAYMENT-RESPONSE"] = claims.receipt(told, verdict.reason)
            raise refusal
        if verdict.outcome == "unheard":
            log.warning("payment %s was not sent: %s", record.id, verdict.reason)
            self._not_sent(record)
            raise _unavailable("The payment could not be sent to be settled.")
        self._lose_sight(record, verdict)
        raise claims.unconfirmed(record.id)

    def find_out(self, record: Record) -> Verdict:
        """What became of a payment that nobody heard the end of. Where a node can be asked it is;
        elsewhere, or as long as the payment can still be made, the facilitator settles it again,
        which does no harm: the network takes a payment once. `refused` only if a node says so: that
        it is refused now does not tell what happened before."""
        network = self.terms.networks.get(record.network)
        if network is None or network.pay_to != record.pay_to or network.asset != record.asset:
            return Verdict("unknown", reason="the config has no such network, asset and pay_to")
        if network.rpc is not None:
            try:
                found = chain.look(network, record)
            except chain.Silent as silent:
                return Verdict("unknown", reason=str(silent))
            if found.outcome == "settled":
                return Verdict("settled", found.transaction)
            if found.outcome == "never":
                return Verdict("refused", reason="the network has not taken it, and will not")
            if record.expires_at is not None and record.expires_at < clock.now_ms():
                return Verdict("unknown", reason="the network's clock is not past its end yet")
        verdict = self._settle(network, record)
        if verdict.outcome in ("settled", "unknown"):
            return verdict
        return Verdict("unknown", reason=verdict.reason)

    def _settle(self, network: Network, record: Record, first: bool = False) -> Verdict:
        """What the facilitator says, and the network where a node tells."""
        asked = requirement(network, record.amount, record.extra)
        url = self.url(record.path)
        verdict = facilitator.settle(network, record.signed, asked, url, first)
        if network.rpc is None or verdict.outcome == "unheard":
            return verdict
        record = record._replace(transaction_id=verdict.transaction or record.transaction_id)
        until = clock.monotonic() + _CONFIRM_SECONDS
        while True:
            why = "the network does not show it yet"
            try:
                found = chain.look(network, record)
            except chain.Silent as silent:
                found, why = chain.Finding("open"), str(silent)
            if found.outcome == "settled":
                return Verdict("settled", found.transaction)
            if found.outcome == "never":
                return Verdict("refused", found.transaction, "the_network_refused_it")
            if found.outcome == "failed":
                return Verdict("refused", found.transaction, verdict.reason or "transaction_failed")
            if verdict.outcome != "settled":
                return verdict
            if clock.monotonic() > until:
                return Verdict("unknown", verdict.transaction, why)
            threading.Event().wait(_CONFIRM_EVERY_SECONDS)

    def _not_sent(self, record: Record) -> None:
        """Let the claim go of a payment that never left this machine."""
        now = clock.now_ms()
        self._note(lambda tx: claims.refuse(tx, record, "not_sent", now))

    def _lose_sight(self, record: Record, verdict: Verdict) -> None:
        log.warning("payment %s is unconfirmed: %s", record.id, verdict.reason)
        transaction, reason, now = verdict.transaction, verdict.reason, clock.now_ms()
        self._note(lambda tx: records.lose_sight(tx, record, transaction, reason, now))

    def _note(self, work: Callable[[Tx], object]) -> None:
        """Write something down, now or as soon as it can be."""
        try:
            self._db.write(work, durable=True)
        except Exception:
            log.exception("what became of a payment could not be noted; it will be tried again")
            self._later(work)

    # Care

    def refresh(self) -> None:
        """Have at hand what facilitators say of themselves."""
        for fee_payers in self._fee_payers.values():
            fee_payers.refresh(_FRESH_SECONDS if fee_payers.is_known else _ASK_AGAIN_SECONDS)


class _FeePayers:
    """Who pays a network's fees, as the facilitator says. What it said once stays known: somebody
    may have been quoted it."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._known: set[str] = set()
        self._current: str | None = None
        self._asked_at = -math.inf
        self._asking = threading.Lock()
        self._has_answered = False  # or failed to

    @property
    def is_known(self) -> bool:
        """Whether it has ever said."""
        return self._current is not None

    def current(self) -> str | None:
        """Whom to name; None when the facilitator does not say."""
        if self._current is None:
            self.refresh()
        return self._current

    def knows(self, payer: str) -> bool:
        """Whether the facilitator has ever named them."""
        if payer not in self._known:
            self.refresh()
        return payer in self._known

    def refresh(self, after_seconds: float = _ASK_AGAIN_SECONDS) -> None:
        """Ask, but not if somebody has asked so short a while ago. Whoever comes while another asks
        goes on with what is known, so that a facilitator that hangs holds up one thread and not
        all; only its very first answer is waited for a moment."""
        if not self._asking.acquire(timeout=0 if self._has_answered else _FIRST_ANSWER_SECONDS):
            return
        try:
            if clock.monotonic() >= self._asked_at + after_seconds:
                self._asked_at = clock.monotonic()
                self._ask()
        finally:
            self._has_answered = True
            self._asking.release()

    def _ask(self) -> None:
        try:
            found: Support = facilitator.supported(self._network)
        except Refusal as error:
            log.warning("facilitator of %s: %s", self._network.id, error.message)
            return
        if found.settles and found.fee_payers:
            self._known.update(found.fee_payers)
            self._current = found.fee_payers[0]


def _unavailable(message: str) -> Refusal:
    return Refusal("facilitator_unavailable", message, headers={"Retry-After": _RETRY_SECONDS})
