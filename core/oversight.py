"""What the operator sees over all accounts. It only reads."""

from typing import NamedTuple

from core.keys import holding
from core.ledger import OPERATOR_ACCOUNT, Standing
from models import Tx


class AccountRow(NamedTuple):
    """An account, with its owner and what it spent of late."""

    id: str
    status: str
    status_reason: str | None
    standing: Standing
    open_calls: int
    created_at: int
    owner: str | None  # an e-mail, else a wallet, else an id
    spent: int


_COLUMNS = (
    "a.id, a.status, a.status_reason, a.balance, a.held, a.open_calls, a.created_at,"
    " COALESCE(u.email, (SELECT w.name FROM wallet w WHERE w.account_id = a.id"
    " ORDER BY w.created_at, w.id LIMIT 1), u.id),"
    " (SELECT COALESCE(SUM(d.captured), 0) FROM call_day d"
    " WHERE d.account_id = a.id AND d.day >= :day)"
    " FROM account a LEFT JOIN user u ON u.account_id = a.id"
)


def accounts(
    tx: Tx, text: str, before: tuple[int, str], spent_since: int, limit: int
) -> list[AccountRow]:
    """Accounts, the newest first, whose id is `text` or whose owner's e-mail or wallet holds it;
    `before` is when the last one was made, and its id. `spent_since` is a day."""
    rows = tx.rows(
        f"SELECT {_COLUMNS} WHERE a.id <> :operator"
        " AND (a.created_at < :at OR (a.created_at = :at AND a.id < :id))"
        " AND (:text = '' OR a.id = :text OR u.id = :text OR u.email LIKE :like ESCAPE '!'"
        " OR EXISTS (SELECT 1 FROM wallet w WHERE w.account_id = a.id"
        " AND LOWER(w.name) LIKE :like ESCAPE '!'))"
        " ORDER BY a.created_at DESC, a.id DESC LIMIT :limit",
        {
            "operator": OPERATOR_ACCOUNT, "at": before[0], "id": before[1], "text": text,
            "like": holding(text.lower()), "day": spent_since, "limit": limit,
        },
    )  # fmt: skip
    return [_account(row) for row in rows]


def account(tx: Tx, account_id: str, spent_since: int) -> AccountRow | None:
    """One account, if there is such a one that has credits."""
    row = tx.row(
        f"SELECT {_COLUMNS} WHERE a.id = :id AND a.id <> :operator",
        {"id": account_id, "operator": OPERATOR_ACCOUNT, "day": spent_since},
    )
    return None if row is None else _account(row)


class Totals(NamedTuple):
    """The whole instance at one moment, in credits; calls of the operator key are open too."""

    accounts: int
    balance: int
    held: int
    open_calls: int


def totals(tx: Tx) -> Totals:
    """What all accounts have together."""
    row = tx.row(
        "SELECT COUNT(CASE WHEN id <> :operator THEN 1 END), COALESCE(SUM(balance), 0),"
        " COALESCE(SUM(held), 0), COALESCE(SUM(open_calls), 0) FROM account",
        {"operator": OPERATOR_ACCOUNT},
    )
    assert row is not None  # an aggregate always answers
    return Totals(*row)


def _account(row: tuple[object, ...]) -> AccountRow:
    identity, status, reason, balance, held, *rest = row
    return AccountRow._make((identity, status, reason, Standing._make((balance, held)), *rest))
