"""What a payment adds to a paid call: before its hold a deposit, around it the words of x402."""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from core import access, clock, idempotency, limits
from core.access import Principal
from core.adapters import Inbound, Order
from core.errors import Refusal
from core.instance import Instance
from core.limits import Rate
from core.payments import claims, deposits
from core.payments.claims import Tender
from core.payments.payment import Payment
from core.payments.records import Record, Use
from models import Tx

if TYPE_CHECKING:
    from core.payments.desk import Desk

log = logging.getLogger("farebox.payments")

T = TypeVar("T")

_LARGE_BODY = 64 * 1024  # to tell the price of one takes work


class Till:
    """One request that can be paid on the spot. `least` is the price where none can be told."""

    def __init__(
        self, instance: Instance, desk: "Desk", inbound: Inbound, client: str, purpose: str,
        least: int, about: str,
    ) -> None:  # fmt: skip
        self._instance = instance
        self._desk = desk
        self._inbound = inbound
        self._client = client
        self._purpose = purpose
        self._least = least
        self._about = about
        self._paid: Record | None = None  # what has paid for this request

    @cached_property
    def payment(self) -> Payment | Refusal | None:
        """The payment that came with the request, what is wrong with it, or None."""
        header = self._inbound.headers.get("payment-signature")
        if header is None:
            return None
        try:
            return self._desk.read(header)
        except Refusal as refusal:
            return refusal

    # Who

    def principal(self, order: Callable[[], Order | Refusal]) -> Principal:
        """Who sends the request: by their credential, or by the payment they have signed.

        Raises as `access.identify` does, and for somebody who says nothing of themselves what is to
        be paid, whatever else is wrong; `order` tells how much.
        """
        if not access.is_stranger(self._inbound.headers):
            return access.identify(self._instance, self._inbound, self._client)
        payment = self.payment
        if payment is None:
            self._count_quote()
            raise self._ask(payment_required(), order())
        if isinstance(payment, Refusal):
            if payment.code != "payment_invalid":
                raise payment
            self._count_quote()
            ordered = order()
            raise ordered if isinstance(ordered, Refusal) else self._ask(payment, ordered)
        is_fresh = payment.pays_us and not payment.is_over(clock.now_ms())
        found = access.by_wallet(self._instance, payment.wallet, self._client, is_fresh)
        if not found.account_id:  # so far it is a signature, which costs nothing
            self._count_quote()
        return found

    def _count_quote(self) -> None:
        """Raises `rate_limited` for somebody who has too many large bodies priced."""
        if len(self._inbound.body) > _LARGE_BODY:
            rate = self._count("quote", self._instance.settings.limits.requests_per_minute)
            if rate.exceeded:
                raise rate.refusal()

    def _comes_to_nothing(self) -> Refusal | None:
        """The refusal of somebody whose payments come to nothing again and again, whatever
        credential they have beside."""
        most, now = self._most_refused, clock.now_ms()
        rate = limits.look_at_rate(self._instance.db, self._subject("payment"), most, now)
        return rate.refusal() if rate.exceeded else None

    def _count(self, what: str, most: int) -> Rate:
        subject, now = self._subject(what), clock.now_ms()
        return self._instance.db.write(lambda tx: limits.spend_rate(tx, subject, most, now))

    def _subject(self, what: str) -> str:
        return f"{what}:{limits.network_of(self._client)}"

    @property
    def _most_refused(self) -> int:
        return self._instance.settings.limits.failed_auth_per_minute

    # Taking

    def tender(
        self, principal: Principal, order: Order | Refusal, idempotency_key: str | None
    ) -> Tender | Refusal | None:
        """The payment and what it is to pay for; why it is not taken; or None."""
        payment, inbound, desk = self.payment, self._inbound, self._desk
        if payment is None or isinstance(payment, Refusal):
            return payment
        refusal = self._comes_to_nothing()
        if refusal is not None:
            return refusal
        account = None if principal.payer == "x402" else principal.account_id
        print_ = idempotency.fingerprint(inbound.method, inbound.path, inbound.query, inbound.body)
        return Tender(
            payment,
            Use(
                self._purpose,
                inbound.method,
                inbound.path,
                claims.fingerprint(print_, account),
                print_,
                self._price(order),
                account,
                idempotency_key,
            ),
            desk.units(self._price(order)),
            desk.url(inbound.path),
            self._instance.incarnation(),
        )

    def collect(self, record: Record, then: Callable[[Tx, Record, int], T]) -> T:
        """Have a claimed payment settled; then what is done with it, in one durable transaction,
        at a moment.

        Raises `payment_invalid`, `facilitator_unavailable`, `payment_unconfirmed`, `overloaded`.
        """
        try:
            paid = record._replace(transaction_id=self._desk.collect(record))
        except Refusal as refusal:
            # One that nobody knows the end of costs the facilitator as much as one that is refused.
            if refusal.code in ("payment_invalid", "payment_unconfirmed"):
                self._count("payment", self._most_refused)
            raise
        now = clock.now_ms()
        try:
            done = self._instance.db.write(lambda tx: then(tx, paid, now), durable=True)
        except Exception as error:
            # The money has moved, so the credits will be entered.
            log.exception("payment %s, %s, is entered later", record.id, paid.transaction_id)
            self._instance.unsettled.append(lambda tx: deposits.deposit(tx, paid, now))
            raise claims.unconfirmed(record.id) from error
        self.paid_by(paid)
        return done

    def paid_by(self, record: Record | None) -> None:
        """What is answered was paid by this, now or when it was asked before."""
        self._paid = record

    # Answering

    def headers(self, status: int) -> dict[str, str]:
        """What an answer of that status says of the payment."""
        if self._paid is None:
            return {}
        found = {"PAYMENT-RESPONSE": claims.receipt(self._paid)}
        if status >= 400:  # an upstream's refusal, which is passed on and costs nothing
            found["X-Credits-Credited"] = str(self._paid.credits)
        return found

    @property
    def was_paid(self) -> bool:
        return self._paid is not None

    def refuse(self, refusal: Refusal, order: Order | Refusal) -> None:
        """Say with a refusal what can be paid, or what has become of what was."""
        if self._paid is not None:
            credits = self._paid.credits
            refusal.message += f" The {credits} credits of the payment are on your account."
            refusal.fields["credited"] = credits
            refusal.headers["X-Credits-Credited"] = str(credits)
            refusal.headers["PAYMENT-RESPONSE"] = claims.receipt(self._paid)
        elif refusal.code in ("insufficient_credits", "payment_required", "payment_invalid"):
            self._ask(refusal, order)

    def _ask(self, refusal: Refusal, order: Order | Refusal) -> Refusal:
        return self._desk.ask(refusal, self._inbound.path, self._price(order), self._about)

    def _price(self, order: Order | Refusal) -> int:
        return self._least if isinstance(order, Refusal) else max(1, order.price)


def payment_required() -> Refusal:
    return Refusal(
        "payment_required",
        "Pay for this on the spot, or send an API key as `Authorization: Bearer <key>`.",
    )
