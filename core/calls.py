"""The record of calls, read. (`core/ledger.py` writes it, because a call is a hold.)"""

from decimal import Decimal, localcontext
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
# What `summary` can group by: the expression of each.
SUMMARIES = {
    "member": "user_id",
    "key": "key_id",
    "route": "route",
    "model": "model",
    "day": f"created_at / {clock.DAY_MS}",
}


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


def summary(db: Database, account_id: str, by: str, since: int, until: int) -> list[dict[str, Any]]:
    """What an account's calls of a span of time come to, by one of `SUMMARIES`: the most credits
    first, or the days in order. Calls in flight count as calls."""
    # Costs are exact decimals kept as text, so equal ones are counted here and added up below.
    rows = db.rows(
        f"SELECT {SUMMARIES[by]}, cost_usd, COUNT(*), SUM(captured),"
        " SUM(CASE WHEN status = 'voided' THEN 1 ELSE 0 END) FROM call"
        " WHERE account_id = :account AND created_at >= :since AND created_at < :until"
        " GROUP BY 1, 2",
        {"account": account_id, "since": since, "until": until},
    )
    found: dict[Any, dict[str, Any]] = {}
    for value, cost, count, captured, failed in rows:
        name = clock.rfc3339(value * clock.DAY_MS)[:10] if by == "day" else value
        total = found.setdefault(
            name, {by: name, "calls": 0, "captured": 0, "failed": 0, "cost_usd": Decimal(0)}
        )
        total["calls"] += count
        total["captured"] += captured
        total["failed"] += failed
        with localcontext(prec=60):
            total["cost_usd"] += Decimal(cost or 0) * count
    totals = list(found.values())
    for total in totals:
        total["cost_usd"] = format(total["cost_usd"], "f")
    if by == "day":
        return sorted(totals, key=lambda total: str(total["day"]))
    return sorted(totals, key=lambda total: (-total["captured"], str(total[by])))


def account_of(tx: Tx, call_id: str) -> str | None:
    """Whose call it is."""
    row = tx.row("SELECT account_id FROM call WHERE id = :id", {"id": call_id})
    return None if row is None else row[0]


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
