"""The claim on a payment: one request has it, whoever else sends it and when. And how it ended."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from core import clock, errors, tokens
from core.payments.payment import Payment
from models import Database, Tx

STATUSES = ("settling", "unknown", "settled", "refused")
UNDECIDED = ("settling", "unknown")
# As the index of them says it: the planner takes the index only for these very words.
_IS_UNDECIDED = "status IN ('settling', 'unknown')"
REFUSED_LIFE_MS = 7 * clock.DAY_MS
_NEWEST = 10**15
_FIRST_LOOK_MS, _LONGEST_WAIT_MS = 2_000, 10 * clock.MINUTE_MS
_COLUMNS = (
    "id, number, key, network, asset, wallet, wallet_name, pay_to, amount, credits, purpose,"
    " method, path, fingerprint, print, account_id, answer_key, call_id, status, reason,"
    " transaction_id, proof, expires_at, incarnation, claim, looks, next_look_at, created_at,"
    " decided_at"
)


class Record(NamedTuple):
    """A row of `payment`. `status` is `settling`, `unknown`, `settled` or `refused`."""

    id: str
    number: int
    key: str
    network: str
    asset: str
    wallet: str
    wallet_name: str
    pay_to: str
    amount: int  # in the token's smallest units
    credits: int
    purpose: str  # `call` or `topup`
    method: str
    path: str
    fingerprint: bytes
    print: bytes
    account_id: str | None
    answer_key: str
    call_id: str | None
    status: str
    reason: str | None
    transaction_id: str | None
    proof: str | None
    expires_at: int | None
    incarnation: str
    claim: int
    looks: int
    next_look_at: int | None
    created_at: int
    decided_at: int | None

    def told(self) -> dict[str, Any]:
        """What the operator is told: all but what was signed, by which it could be made again."""
        times = ("expires_at", "next_look_at", "created_at", "decided_at")
        hidden = (
            "number",
            "key",
            "fingerprint",
            "print",
            "proof",
            "answer_key",
            "wallet_name",
            "claim",
        )
        found = {name: value for name, value in self._asdict().items() if name not in hidden}
        found |= {name: clock.rfc3339_or_none(found[name]) for name in times}
        return found | {"wallet": self.wallet_name}

    @property
    def signed(self) -> dict[str, Any]:
        """What the payer has signed; it is kept until it is known how the payment ended."""
        found: dict[str, Any] = json.loads(self.proof or "{}")["signed"]
        return found

    @property
    def extra(self) -> dict[str, str]:
        """What the requirement says beside the price, where the payment meets it."""
        found: dict[str, str] = json.loads(self.proof or "{}")["extra"]
        return found


class Use(NamedTuple):
    """What a payment is claimed for."""

    purpose: str
    method: str
    path: str
    fingerprint: bytes
    print: bytes  # of the request alone, as stored answers know it
    credits: int
    account_id: str | None  # the Bearer's; None for the wallet's own
    idempotency_key: str | None


def claim(tx: Tx, payment: Payment, use: Use, incarnation: str, now: int) -> Record | None:
    """Claim a payment for one request, for good unless it is refused; None when it is claimed
    already. It must be on the disk before the payment leaves this machine.

    One that was refused is claimed anew as it is now: a payer may have signed another amount or
    another time under the same number. It stays known since when, because what the network took
    after it was first shown was paid for a request here.
    """
    made = tokens.new_id("pay")
    row = tx.row(
        "INSERT INTO payment (id, number, key, network, asset, wallet, wallet_name, pay_to, amount,"
        " credits, purpose, method, path, fingerprint, print, account_id, answer_key, status,"
        " proof, expires_at, incarnation, created_at)"
        " SELECT :id, COALESCE(MAX(number), 0) + 1, :key, :network, :asset, :wallet, :wallet_name,"
        " :pay_to, :amount, :credits, :purpose, :method, :path, :fingerprint, :print,"
        " :account, :answer_key, 'settling', :proof, :expires, :incarnation, :now"
        " FROM payment WHERE TRUE ON CONFLICT (key) DO UPDATE SET wallet_name = :wallet_name,"
        " pay_to = :pay_to, amount = :amount, credits = :credits, expires_at = :expires,"
        " purpose = :purpose, method = :method, path = :path, fingerprint = :fingerprint,"
        " print = :print, account_id = :account,"
        " answer_key = :answer_key, call_id = NULL, status = 'settling', reason = NULL,"
        " transaction_id = NULL, proof = :proof, incarnation = :incarnation,"
        " claim = payment.claim + 1, looks = 0,"
        " next_look_at = NULL, decided_at = NULL"
        " WHERE payment.status = 'refused'"
        f" RETURNING {_COLUMNS}",
        {
            "id": made,
            "key": payment.key,
            "network": payment.network.id,
            "asset": payment.network.asset,
            "wallet": payment.wallet.id,
            "wallet_name": payment.wallet.name,
            "pay_to": payment.network.pay_to,
            "amount": payment.amount,
            "credits": use.credits,
            "purpose": use.purpose,
            "method": use.method,
            "path": use.path,
            "fingerprint": use.fingerprint,
            "print": use.print,
            "account": use.account_id,
            "answer_key": use.idempotency_key or own_key(made),
            "proof": json.dumps({"signed": payment.signed, "extra": payment.extra}),
            "expires": payment.valid_before,
            "incarnation": incarnation,
            "now": now,
        },
    )
    return None if row is None else Record(*row)


def own_key(payment_id: str) -> str:
    """The key under which a payment's answer is kept when the caller has named none, with a space,
    which no caller's has."""
    return f"payment {payment_id}"


def find(tx: Tx, key: str) -> Record | None:
    """What is known of a payment."""
    row = tx.row(f"SELECT {_COLUMNS} FROM payment WHERE key = :key", {"key": key})
    return None if row is None else Record(*row)


def by_id(tx: Tx, payment_id: str | None) -> Record | None:
    """The payment of that id, if there is one."""
    row = tx.row(f"SELECT {_COLUMNS} FROM payment WHERE id = :id", {"id": payment_id})
    return None if row is None else Record(*row)


def get(tx: Tx, payment_id: str) -> Record:
    """A payment by its id. Raises `not_found`."""
    found = by_id(tx, payment_id)
    if found is None:
        raise errors.Refusal("not_found", f"There is no payment {payment_id}.")
    return found


# Whoever found something out may come late: meanwhile the payment may have been refused and claimed
# again. Only what was not known yet of the same claim is noted.
_OF_CLAIM = "id = :id AND claim = :claim"


def refuse(tx: Tx, record: Record, reason: str, now: int) -> bool:
    """Note that no money moved, and will not; whether it was undecided until now."""
    return _decide(tx, record, "refused", None, None, reason, now)


def settle(tx: Tx, record: Record, account_id: str, now: int) -> bool:
    """Note that the money moved; whether that is news. Whoever gets True enters the credits, in the
    same transaction. That it was settled is a fact, and stands over what was said before."""
    return _decide(tx, record, "settled", account_id, record.transaction_id, None, now)


def _decide(
    tx: Tx, record: Record, status: str, account_id: str | None, transaction: str | None,
    reason: str | None, now: int,
) -> bool:  # fmt: skip
    before = _IS_UNDECIDED if status == "refused" else "status <> 'settled'"
    decided = tx.run(
        "UPDATE payment SET status = :status, account_id = COALESCE(:account, account_id),"
        " transaction_id = COALESCE(:transaction, transaction_id), reason = :reason, proof = NULL,"
        f" next_look_at = NULL, decided_at = :now WHERE {_OF_CLAIM} AND {before}",
        {
            "id": record.id, "claim": record.claim, "status": status, "account": account_id,
            "transaction": transaction, "reason": reason, "now": now,
        },
    )  # fmt: skip
    return decided > 0


def lose_sight(tx: Tx, record: Record, transaction: str | None, reason: str, now: int) -> None:
    """Note that nobody knows yet how it ended, and when to look next: soon, then ever later."""
    tx.run(
        "UPDATE payment SET status = 'unknown', reason = :reason, looks = looks + 1,"
        " transaction_id = COALESCE(:transaction, transaction_id),"
        " next_look_at = :now + CASE WHEN looks < 9 THEN :first * (1 << looks) ELSE :most END"
        f" WHERE {_OF_CLAIM} AND {_IS_UNDECIDED} AND (status = :was OR status = 'settling')",
        {
            "id": record.id, "claim": record.claim, "was": record.status,
            "transaction": transaction, "reason": reason, "now": now,
            "first": _FIRST_LOOK_MS, "most": _LONGEST_WAIT_MS,
        },
    )  # fmt: skip


def settling(tx: Tx) -> list[Record]:
    """The payments that a worker settles, or was settling when it died."""
    return [
        Record(*row)
        for row in tx.rows(
            f"SELECT {_COLUMNS} FROM payment WHERE {_IS_UNDECIDED} AND status = 'settling'"
        )
    ]


def due(tx: Tx, now: int, limit: int) -> list[tuple[str, str]]:
    """The payments whose end is unknown and is to be looked for now, each with its network."""
    rows = tx.rows(
        f"SELECT id, network FROM payment WHERE {_IS_UNDECIDED} AND status = 'unknown'"
        " AND next_look_at <= :now ORDER BY next_look_at LIMIT :limit",
        {"now": now, "limit": limit},
    )
    return [(row[0], row[1]) for row in rows]


def make_due(tx: Tx, payment_id: str | None, now: int) -> list[str]:
    """Have the end of an unknown payment, or of all, looked for at once: their ids."""
    condition = "" if payment_id is None else " AND id = :id"
    params = {"now": now} | ({} if payment_id is None else {"id": payment_id})
    rows = tx.rows(
        f"UPDATE payment SET next_look_at = :now WHERE {_IS_UNDECIDED} AND status = 'unknown'"
        f"{condition} RETURNING id",
        params,
    )
    return [row[0] for row in rows]


def take(tx: Tx, payment_id: str, now: int, until: int) -> Record | None:
    """An unknown payment that is due, for one who looks for its end: nobody else gets it for a
    while."""
    row = tx.row(
        "UPDATE payment SET next_look_at = :until WHERE id = :id AND status = 'unknown'"
        f" AND next_look_at <= :now RETURNING {_COLUMNS}",
        {"id": payment_id, "now": now, "until": until},
    )
    return None if row is None else Record(*row)


def use(tx: Tx, payment_id: str, call_id: str | None, answer_key: str) -> None:
    """Note the call that is made on a settled payment's credits, if any, and under which key its
    answer will be."""
    tx.run(
        "UPDATE payment SET call_id = :call, answer_key = :key WHERE id = :id",
        {"id": payment_id, "call": call_id, "key": answer_key},
    )


def has_undecided(tx: Tx, account_id: str) -> bool:
    """Whether it is not known yet how a payment for that account ends."""
    return bool(
        tx.row(
            f"SELECT 1 FROM payment WHERE {_IS_UNDECIDED} AND account_id = :account LIMIT 1",
            {"account": account_id},
        )
    )


def move(tx: Tx, account_id: str, to: str) -> None:
    """What may still be settled for an account that has moved into another is for that one."""
    tx.run(
        "UPDATE payment SET account_id = :to WHERE account_id = :account AND status <> 'settled'",
        {"account": account_id, "to": to},
    )


def by_ids(tx: Tx, ids: Iterable[str]) -> dict[str, Record]:
    """Those of these payments that there are, by id."""
    found = (by_id(tx, payment_id) for payment_id in ids)
    return {record.id: record for record in found if record is not None}


def unconfirmed(tx: Tx) -> int:
    """How many payments' end is unknown."""
    row = tx.row(f"SELECT COUNT(*) FROM payment WHERE {_IS_UNDECIDED} AND status = 'unknown'")
    assert row is not None  # an aggregate always answers
    count: int = row[0]
    return count


def page(
    db: Database, before: int | None, limit: int, account_id: str | None = None,
    status: str | None = None, wallet: str | None = None,
) -> list[Record]:  # fmt: skip
    """Payments, the last first: of one account, of one status, of one wallet (by its id), if
    given."""
    params: dict[str, Any] = {"before": _NEWEST if before is None else before, "limit": limit}
    conditions = ["number < :before"]
    if account_id is not None:
        conditions.append("account_id = :account")
        params["account"] = account_id
    if wallet is not None:
        conditions.append("wallet = :wallet")
        params["wallet"] = wallet
    if status in UNDECIDED:  # there are few among all
        conditions.append(f"number IN (SELECT number FROM payment WHERE {_IS_UNDECIDED})")
    if status is not None:
        conditions.append("status = :status")
        params["status"] = status
    rows = db.rows(
        f"SELECT {_COLUMNS} FROM payment WHERE {' AND '.join(conditions)}"
        " ORDER BY number DESC LIMIT :limit",
        params,
    )
    return [Record(*row) for row in rows]


def prune(tx: Tx, now: int) -> None:
    """Forget payments that were refused a while ago; the others are part of the books."""
    tx.run(
        "DELETE FROM payment WHERE status = 'refused' AND decided_at < :oldest",
        {"oldest": now - REFUSED_LIFE_MS},
    )
