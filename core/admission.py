"""Transaction one of a paid call: everything that must be true before anything is sent."""

from typing import NamedTuple

from core import access, calls, idempotency, ledger, limits, wallets
from core.access import Principal
from core.adapters import Inbound, Order
from core.errors import Refusal
from core.idempotency import Stored
from core.ledger import NewCall, Standing
from core.limits import Rate
from core.payments import claims, deposits, records
from core.payments.claims import Answered, Tender
from core.payments.records import Record
from models import Tx


class Claimed(NamedTuple):
    """A call that is to be paid first."""

    call: NewCall
    order: Order
    print: bytes
    record: Record


class Admission(NamedTuple):
    """What was decided. Exactly one of `held`, `stored`, `claimed` and `refusal` is set; none of
    them means that the credential changed after it was verified."""

    rate: Rate | None
    standing: Standing | None = None
    held: tuple[NewCall, Order] | None = None  # for less than was asked, if need be
    stored: Stored | None = None
    claimed: Claimed | None = None
    refusal: Refusal | None = None
    payment: Record | None = None  # the one that has paid for what is held or stored


def admit(
    tx: Tx, principal: Principal, call: NewCall, order: Order | Refusal, inbound: Inbound,
    most_calls: int, tender: Tender | Refusal | None = None,
) -> Admission:  # fmt: skip
    """Count the attempt, look for a stored answer, spend the limit, hold the credits: in the order
    in which the contract says what wins. In place of an order there may be what was wrong with it,
    and in place of a payment too. One that came with the request is claimed when nothing else pays.

    A refusal is returned and not raised, so that the attempt stays counted.
    """
    now = call.created_at
    rate, too_many = access.arrive(tx, principal, principal.rate_subject, now)
    if too_many is not None:
        return Admission(rate, refusal=too_many)
    if isinstance(order, Refusal):
        return Admission(rate, refusal=order)
    shown = tender if isinstance(tender, Tender) else None
    if shown is not None and principal.payer == "x402":
        # The payer's account may have been opened since it was looked for, by this very payment.
        owner = wallets.owner_of(tx, shown.payment.wallet)
        call = call._replace(account_id="" if owner is None else owner.account_id)
    print_ = b""
    if shown is not None:
        print_ = shown.use.print
    elif call.idempotency_key is not None:
        print_ = idempotency.fingerprint(call.method, inbound.path, inbound.query, inbound.body)
    known = claims.known(tx, shown, call.account_id, call.idempotency_key, print_, now)
    if isinstance(known, Refusal):
        return Admission(rate, refusal=known)
    if isinstance(known, Answered):
        account_id = call.account_id if known.record is None else str(known.record.account_id)
        standing = ledger.standing(tx, account_id)
        return Admission(rate, standing, stored=known.stored, payment=known.record)
    paid = known  # before, for this very request
    if principal.payer == "x402" and paid is None:
        # A payment is not a signature for the request: it opens no credits but its own.
        return _claim(tx, call, order, print_, most_calls, tender, rate)
    if principal.payer == "x402" and paid is not None:
        # Whoever shows it may be anybody who has read the chain: it opens no credits but its own.
        since = paid.decided_at or now
        if paid.credits < order.price or calls.may_have_spent(tx, call.account_id, since):
            return Admission(rate, refusal=claims.already_used())
    asked = order
    if order.fit is not None and principal.pays and paid is None:
        order = order.fit(_spendable(tx, principal, call))
        call = call._replace(units=order.units, price=order.price, held=order.price)
    admission = _hold(tx, principal, call, order, print_, most_calls, rate, paid)
    if admission.refusal is None or admission.refusal.code != "insufficient_credits":
        return admission
    if paid is not None:
        return Admission(rate, refusal=claims.already_used())
    if tender is None:
        return admission
    units, price = asked.units, asked.price
    call = call._replace(units=units, price=price, held=price)
    return _claim(tx, call, asked, print_, most_calls, tender, rate)


def admit_paid(
    tx: Tx, principal: Principal, claimed: Claimed, record: Record, most_calls: int, now: int
) -> Admission:
    """Enter what a settled payment has paid and hold it, in one transaction. What cannot be held
    any more, because something changed meanwhile, stays on the account: that is returned, not
    raised."""
    account_id, is_new = deposits.deposit(tx, record, now)
    if not is_new:
        return Admission(None, refusal=claims.in_progress())
    call = claimed.call._replace(account_id=account_id, created_at=now)
    return _hold(tx, principal, call, claimed.order, claimed.print, most_calls, None, record)


def _claim(
    tx: Tx, call: NewCall, order: Order, print_: bytes, most_calls: int,
    tender: Tender | Refusal | None, rate: Rate | None,
) -> Admission:  # fmt: skip
    """Claim the payment, unless the request would be refused even with the credits."""
    why: Refusal | Record | None = tender if not isinstance(tender, Tender) else None
    if why is None and call.account_id:
        why = ledger.why_not_held(tx, call.account_id, 0, most_calls)
    if why is None and isinstance(tender, Tender):
        why = claims.claim(tx, tender, call.created_at)
    if isinstance(why, Refusal):
        return Admission(rate, refusal=why)
    assert why is not None  # whoever is no stranger and has no payment was refused before
    return Admission(rate, claimed=Claimed(call, order, print_, why))


def _hold(
    tx: Tx, principal: Principal, call: NewCall, order: Order, print_: bytes, most_calls: int,
    rate: Rate | None, payment: Record | None,
) -> Admission:  # fmt: skip
    """Spend the limits and hold the credits."""
    if payment is not None and call.idempotency_key is None:
        call = call._replace(idempotency_key=payment.answer_key)
    counted = _count(tx, principal, call)
    if isinstance(counted, Refusal):
        return Admission(rate, refusal=counted)
    call = call._replace(credit_window_at=counted[0], member_window_at=counted[1])
    standing = ledger.hold(tx, call, principal.guard, most_calls)
    if standing is None:
        _uncount(tx, principal, call)
        why = ledger.why_not_held(tx, call.account_id, call.held, most_calls)
        return Admission(rate, refusal=why)
    if call.idempotency_key is not None:
        idempotency.claim(
            tx, call.account_id, call.idempotency_key, print_, call.id, call.created_at
        )
        if payment is not None:
            records.use(tx, payment.id, call.id, call.idempotency_key)
    return Admission(rate, standing, held=(call, order), payment=payment)


def _spendable(tx: Tx, principal: Principal, call: NewCall) -> int:
    """The most a call may hold: what the account, the key and the member have left."""
    found = [ledger.standing(tx, call.account_id).available]
    for limit in (principal.limit, principal.member_limit):
        if limit is not None:
            found.append(limits.left(tx, limit, call.created_at))
    return min(found)


def _count(tx: Tx, principal: Principal, call: NewCall) -> tuple[int | None, int | None] | Refusal:
    """Count the call under the key's limit and the member's: the periods it was counted in."""
    of_key: int | None = None
    if principal.limit is not None:
        counted = limits.spend_credits(tx, principal.limit, call.held, call.created_at)
        if isinstance(counted, Refusal):
            return counted
        of_key = counted
    if principal.member_limit is None:
        return of_key, None
    of_member = limits.spend_credits(tx, principal.member_limit, call.held, call.created_at)
    if isinstance(of_member, Refusal):
        _uncount(tx, principal, call._replace(credit_window_at=of_key))
        return of_member
    return of_key, of_member


def _uncount(tx: Tx, principal: Principal, call: NewCall) -> None:
    if principal.limit is not None and call.credit_window_at is not None:
        limits.release_credits(tx, principal.limit.subject, call.credit_window_at, call.held)
    if principal.member_limit is not None and call.member_window_at is not None:
        subject = principal.member_limit.subject
        limits.release_credits(tx, subject, call.member_window_at, call.held)
