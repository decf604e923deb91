"""Vouchers: codes that whoever holds one turns into credits, once.

A code has 100 random bits and only its digest is stored, so nobody who reads the database can
redeem one.
"""

import re
from typing import NamedTuple

from core import audit, errors, ledger, limits, tokens
from core.audit import Actor
from core.ledger import Standing
from core.limits import Rate
from models import Tx

MOST_AT_ONCE = 1000
LARGEST = ledger.LARGEST_AMOUNT
_LONGEST_NOTE = 200
_NEWEST = 10**15
_PREFIX = "FB"
_GROUPS, _GROUP_LENGTH = 4, 5  # 32^20 is 2^100

_COLUMNS = (
    "id, number, credits, note, created_at, created_by, account_id, redeemed_at, cancelled_at"
)
_CODE = re.compile(rf"{_PREFIX}[{tokens.CROCKFORD}]{{{_GROUPS * _GROUP_LENGTH}}}")
# What people and programs put between the groups, the dashes of word processors included.
_BETWEEN = re.compile(r"[\s\u00ad\u200b\u2010-\u2015\u2212\ufeff-]+")
_MISREAD = str.maketrans("OIL", "011")  # Crockford's base32 has none of the three


class Voucher(NamedTuple):
    """A row of `voucher`, without what its code is known by."""

    id: str
    number: int
    credits: int
    note: str | None
    created_at: int
    created_by: str
    account_id: str | None
    redeemed_at: int | None
    cancelled_at: int | None

    @property
    def status(self) -> str:
        """`open`, `redeemed` or `cancelled`."""
        if self.redeemed_at is not None:
            return "redeemed"
        return "open" if self.cancelled_at is None else "cancelled"


def make(
    tx: Tx, credits: int, count: int, note: str | None, now: int, by: Actor,
    first_id: str | None = None,
) -> list[str]:  # fmt: skip
    """The codes of `count` new vouchers of `credits` each, which nobody can be told again.

    `first_id` is the id of the first of them, so that whoever sends a form twice makes them once.
    Raises `validation_error` naming `credits`, `count` or `note`; `conflict` for the second time.
    """
    _check(credits, count, note)
    if tx.row("SELECT 1 FROM voucher WHERE id = :id", {"id": first_id}):
        raise errors.Refusal(
            "conflict", "These were made before, and their codes shown then. Cancel them below."
        )
    made = [(tokens.new_id("vch"), _new_code()) for _ in range(count)]
    made[0] = (first_id or made[0][0], made[0][1])
    for voucher_id, code in made:
        tx.run(
            "INSERT INTO voucher (id, code_hash, number, credits, note, created_at, created_by)"
            " SELECT :id, :hash, COALESCE(MAX(number), 0) + 1, :credits, :note, :now, :by"
            " FROM voucher",
            {
                "id": voucher_id,
                "hash": _digest(code),
                "credits": credits,
                "note": note,
                "now": now,
                "by": by.name,
            },
        )
    audit.note(
        tx, by, "voucher.made", now, None, made[0][0], credits=credits, count=count, note=note
    )
    return [code for _, code in made]


def redeem(tx: Tx, code: str, account_id: str, now: int, by: Actor) -> tuple[int, Standing]:
    """Turn a code into credits of an account: how many, and the account after it.

    Raises `not_found`, the same for a code that is unknown, spent or cancelled, and what
    `ledger.add_credits` raises, such as `conflict` for a closed account; the code is then still
    open, because the transaction is undone.
    """
    row = tx.row(
        "UPDATE voucher SET account_id = :account, redeemed_at = :now WHERE code_hash = :hash"
        " AND redeemed_at IS NULL AND cancelled_at IS NULL RETURNING id, credits",
        {"hash": _digest(code), "account": account_id, "now": now},
    )
    if row is None:
        raise errors.Refusal("not_found", "This code is unknown, or was used before.")
    voucher_id, credits = row
    after = ledger.add_credits(tx, account_id, "voucher", credits, voucher_id, None, now)
    assert after is not None  # it was open, so nothing refers to it yet
    audit.note(tx, by, "voucher.redeemed", now, account_id, voucher_id, credits=credits)
    return credits, after


def count_attempt(tx: Tx, client: str, account_id: str, most: int, now: int) -> Rate:
    """Count one attempt to redeem, by the client's network and by the account: the rate of which
    less is left. Done in a transaction of its own, since a refusal undoes the one that redeems."""
    rates = [
        limits.spend_rate(tx, f"voucher:{subject}", most, now)
        for subject in (limits.network_of(client), account_id)
    ]
    return min(rates, key=lambda rate: (not rate.exceeded, rate.remaining))


def cancel(tx: Tx, voucher_id: str, now: int, by: Actor) -> None:
    """End a voucher nobody has redeemed. Raises `not_found`, `conflict`."""
    cancelled = tx.run(
        "UPDATE voucher SET cancelled_at = :now"
        " WHERE id = :id AND redeemed_at IS NULL AND cancelled_at IS NULL",
        {"id": voucher_id, "now": now},
    )
    if not cancelled:
        status = _get(tx, voucher_id).status
        raise errors.Refusal("conflict", f"The voucher is {status}.")
    audit.note(tx, by, "voucher.cancelled", now, None, voucher_id)


def page(tx: Tx, before: int | None, limit: int) -> list[Voucher]:
    """Vouchers, newest first: those with a number below `before`, or from the newest on."""
    rows = tx.rows(
        f"SELECT {_COLUMNS} FROM voucher WHERE number < :before ORDER BY number DESC LIMIT :limit",
        {"before": _NEWEST if before is None else before, "limit": limit},
    )
    return [Voucher(*row) for row in rows]


def _get(tx: Tx, voucher_id: str) -> Voucher:
    row = tx.row(f"SELECT {_COLUMNS} FROM voucher WHERE id = :id", {"id": voucher_id})
    if row is None:
        raise errors.Refusal("not_found", f"There is no voucher {voucher_id}.")
    return Voucher(*row)


def _check(credits: int, count: int, note: str | None) -> None:
    if not 1 <= credits <= LARGEST:
        raise errors.invalid_body(f"A voucher is of 1 to {LARGEST} credits.", "credits")
    if not 1 <= count <= MOST_AT_ONCE:
        raise errors.invalid_body(f"1 to {MOST_AT_ONCE} vouchers are made at once.", "count")
    if note is not None and not (1 <= len(note) <= _LONGEST_NOTE and note.isprintable()):
        raise errors.invalid_body(f"A note has 1 to {_LONGEST_NOTE} printable characters.", "note")


def _new_code() -> str:
    groups = (tokens.random_text(_GROUP_LENGTH, tokens.CROCKFORD) for _ in range(_GROUPS))
    return "-".join((_PREFIX, *groups))


def _digest(code: str) -> bytes | None:
    """What a code is known by, however it was typed; None, which no row has, for what is none."""
    plain = _BETWEEN.sub("", code).upper().translate(_MISREAD)
    return tokens.digest(plain.encode()) if _CODE.fullmatch(plain) else None
