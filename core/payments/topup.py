"""Credits, bought on the spot: for a Bearer's account or for the payer's own."""

from typing import NamedTuple

import msgspec

from core import access, clock, errors, idempotency, ledger, strict_json
from core.access import Principal
from core.adapters import Inbound, Order
from core.errors import Refusal
from core.idempotency import Stored
from core.instance import Instance
from core.limits import Rate
from core.payments import claims, deposits
from core.payments.claims import Answered, Tender
from core.payments.records import Record
from core.payments.till import Till, payment_required
from models import Tx


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """How many credits; the default of the config when it does not say."""

    credits: int | None = None


class _Admission(NamedTuple):
    """What was decided. Exactly one of `claimed`, `stored` and `refusal` is set."""

    rate: Rate | None
    claimed: Record | None = None
    stored: Stored | None = None
    refusal: Refusal | None = None
    payment: Record | None = None  # the one that has paid for what is stored


def top_up(instance: Instance, inbound: Inbound, client: str) -> tuple[Stored, dict[str, str]]:
    """Sell credits: the answer, and the headers of this time. Raises Refusal for everything a
    client can be refused, `not_found` where nothing is paid on the spot."""
    if instance.desk is None:
        raise errors.not_found()
    least = instance.desk.terms.topup_credits
    till = Till(instance, instance.desk, inbound, client, "topup", least, "Credits for an account")
    order = _order(instance, inbound)
    principal = till.principal(lambda: order)
    if not principal.pays:
        raise Refusal("forbidden", "The operator key has no account to buy credits for.")
    key = inbound.headers.get("idempotency-key")
    tender, now = till.tender(principal, order, key), clock.now_ms()
    admission = instance.db.write(
        lambda tx: _admit(tx, principal, order, tender, key, inbound, now),
        durable=isinstance(tender, Tender),
    )
    rate_headers = {} if admission.rate is None else admission.rate.headers()
    try:
        if admission.refusal is not None:
            raise admission.refusal
        if admission.claimed is not None:
            answer = till.collect(admission.claimed, _finish)
            return answer, rate_headers | till.headers(answer.status)
    except Refusal as refusal:
        refusal.headers.update(rate_headers)
        till.refuse(refusal, order)
        raise
    assert admission.stored is not None  # one of the three is
    till.paid_by(admission.payment)
    replayed = {"Idempotent-Replayed": "true"}
    return admission.stored, rate_headers | replayed | till.headers(admission.stored.status)


def _order(instance: Instance, inbound: Inbound) -> Order | Refusal:
    assert instance.desk is not None  # `top_up` has looked
    terms = instance.desk.terms
    try:
        idempotency.check_key(inbound.headers.get("idempotency-key"))
        wanted = strict_json.decode(inbound.body or b"{}", Body).credits
    except Refusal as refusal:
        return refusal
    except strict_json.WrongShape as error:
        return errors.invalid_body(f"{error}.", error.field)
    except strict_json.NotJson:
        return errors.invalid_body("The body is not JSON.")
    credits = terms.topup_credits if wanted is None else wanted
    if not terms.topup_min <= credits <= terms.topup_max:
        bounds = f"{terms.topup_min} to {terms.topup_max}"
        return errors.invalid_body(f"`credits` is a whole number from {bounds}.", "credits")
    return Order(1, credits, ())


def _admit(
    tx: Tx, principal: Principal, order: Order | Refusal, tender: Tender | Refusal | None,
    key: str | None, inbound: Inbound, now: int,
) -> _Admission:  # fmt: skip
    """Count the attempt, look for a stored answer, claim the payment: in the order of a call."""
    rate, too_many = access.arrive(tx, principal, principal.rate_subject, now)
    if too_many is not None:
        return _Admission(rate, refusal=too_many)
    if isinstance(order, Refusal):
        return _Admission(rate, refusal=order)
    shown, print_ = (tender, tender.use.print) if isinstance(tender, Tender) else (None, b"")
    if shown is None and key is not None:
        print_ = idempotency.fingerprint(inbound.method, inbound.path, inbound.query, inbound.body)
    known = claims.known(tx, shown, principal.account_id, key, print_, now)
    if isinstance(known, Answered):
        return _Admission(rate, stored=known.stored, payment=known.record)
    if isinstance(known, Refusal):
        return _Admission(rate, refusal=known)
    if not isinstance(tender, Tender):
        return _Admission(rate, refusal=tender or payment_required())
    if principal.account_id:
        closed = ledger.why_not_held(tx, principal.account_id, 0, ledger.NO_LIMIT)
        if closed is not None:
            return _Admission(rate, refusal=closed)
    claimed = claims.claim(tx, tender, now)
    if isinstance(claimed, Refusal):
        return _Admission(rate, refusal=claimed)
    return _Admission(rate, claimed=claimed)


def _finish(tx: Tx, record: Record, now: int) -> Stored:
    """Enter the credits of a settled payment; the answer, which is kept."""
    account_id, _ = deposits.deposit(tx, record, now)
    found = idempotency.find(tx, account_id, record.answer_key, record.print, now)
    assert isinstance(found, Stored)  # the deposit has kept it
    return found
