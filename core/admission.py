"""Transaction one of a paid call: everything that must be true before anything is sent."""

from typing import NamedTuple

from core import idempotency, keys, ledger, limits
from core.access import Principal
from core.adapters import Inbound, Order
from core.errors import Refusal
from core.idempotency import Stored
from core.ledger import NewCall, Standing
from core.limits import Rate
from models import Tx


class Admission(NamedTuple):
    """What was decided. Exactly one of `held`, `stored` and `refusal` is set; none of them means
    that the credential changed after it was verified."""

    rate: Rate | None
    standing: Standing | None = None
    held: tuple[NewCall, Order] | None = None  # for less than was asked, if need be
    stored: Stored | None = None
    refusal: Refusal | None = None


def admit(
    tx: Tx, principal: Principal, call: NewCall, order: Order | Refusal, inbound: Inbound,
    most_calls: int,
) -> Admission:  # fmt: skip
    """Count the attempt, look for a stored answer, spend the limit, hold the credits: in the order
    in which the contract says what wins. In place of an order there may be what was wrong with it.

    A refusal is returned and not raised, so that the attempt stays counted.
    """
    now = call.created_at
    rate = None
    if principal.rate_limit is not None:
        rate = limits.spend_rate(tx, principal.rate_subject, principal.rate_limit, now)
        if rate.exceeded:
            return Admission(rate, refusal=rate.refusal())
    if principal.key is not None:
        keys.note_use(tx, principal.key, now)
    if isinstance(order, Refusal):
        return Admission(rate, refusal=order)
    fingerprint = b""
    if call.idempotency_key is not None:
        fingerprint = idempotency.fingerprint(
            call.method, inbound.path, inbound.query, inbound.body
        )
        found = idempotency.find(tx, call.account_id, call.idempotency_key, fingerprint, now)
        if isinstance(found, Refusal):
            return Admission(rate, refusal=found)
        if found is not None:
            return Admission(rate, ledger.standing(tx, call.account_id), stored=found)
    if order.fit is not None and principal.pays:
        order = order.fit(_spendable(tx, principal, call))
        call = call._replace(units=order.units, price=order.price, held=order.price)
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
        idempotency.claim(tx, call.account_id, call.idempotency_key, fingerprint, call.id, now)
    return Admission(rate, standing, held=(call, order))


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
