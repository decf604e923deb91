"""The record of calls, read. (`core/ledger.py` writes it, because a call is a hold.)"""

from typing import Any

from core import clock
from models import Database, Tx

_COLUMNS = (
    "number, request_id, created_at, route, method, payer, key_id, user_id, model, input_tokens,"
    " output_tokens, units, price, held, captured, status, upstream_status, duration_ms, estimated,"
    " cost_usd"
)
_NAMES = _COLUMNS.replace(" ", "").split(",")
_NEWEST = 10**15


def page(
    db: Database, account_id: str, key_id: str | None, before: int | None, limit: int
) -> list[tuple[int, dict[str, Any]]]:
    """An account's calls, newest first, each with its number; of one key only, if given."""
    rows = db.rows(
        f"SELECT {_COLUMNS} FROM call WHERE {_of(key_id)} AND number < :before"
        " ORDER BY number DESC LIMIT :limit",
        {
            "account": account_id,
            "key_id": key_id,
            "before": _NEWEST if before is None else before,
            "limit": limit,
        },
    )
    return [(row[0], _to_json(row)) for row in rows]


def get(
    db: Database, account_id: str, key_id: str | None, request_id: str
) -> dict[str, Any] | None:
    """The call of that id, or else the newest whose caller chose it; None when there is none."""
    row = db.row(
        f"SELECT {_COLUMNS} FROM call WHERE {_of(key_id)}"
        " AND (id = :request OR (request_id = :request AND request_id <> id))"
        " ORDER BY CASE WHEN id = :request THEN 0 ELSE 1 END, number DESC LIMIT 1",
        {"account": account_id, "key_id": key_id, "request": request_id},
    )
    return None if row is None else _to_json(row)


def ids_of_request(tx: Tx, request_id: str) -> list[str]:
    """The ids of the calls a request id names: its own, or else all whose callers chose it."""
    rows = tx.rows(
        "SELECT id FROM call WHERE id = :request OR (request_id = :request AND request_id <> id)",
        {"request": request_id},
    )
    found = [row[0] for row in rows]
    return [request_id] if request_id in found else found


def in_flight(tx: Tx) -> list[tuple[str, str]]:
    """The id and incarnation of every call that is still held."""
    rows = tx.rows("SELECT id, incarnation FROM call WHERE status = 'held'")
    return [(row[0], row[1]) for row in rows]


def _of(key_id: str | None) -> str:
    return "account_id = :account AND key_id = :key_id" if key_id else "account_id = :account"


def _to_json(row: tuple[Any, ...]) -> dict[str, Any]:
    call = dict(zip(_NAMES, row, strict=True))
    del call["number"]
    call["created_at"] = clock.rfc3339(call["created_at"])
    call["estimated"] = bool(call["estimated"])
    return call
