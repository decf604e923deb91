"""Who did what to which key, member, session or grant, and from where. Never edited."""

import json
from typing import Any, NamedTuple

from core import clock, tokens
from models import Database, Tx

_NEWEST = 10**15


class Actor(NamedTuple):
    """Who does something: a person by their id, or one of the names below."""

    name: str
    address: str | None = None  # from where, when it came over HTTP
    is_operator: bool = False  # acts for the whole instance, not for an account


COMMAND_LINE = Actor("operator", None, True)
SYSTEM = Actor("system")


def note(
    tx: Tx, by: Actor, action: str, now: int,
    account_id: str | None = None, subject: str | None = None, **detail: Any,
) -> None:  # fmt: skip
    """Record an action in the transaction that carries it out. `account_id` says whose owners may
    read of it; a detail that is None is left out."""
    told = {name: value for name, value in detail.items() if value is not None}
    tx.run(
        "INSERT INTO audit (id, number, at, actor, address, action, account_id, subject, detail)"
        " SELECT :id, COALESCE(MAX(number), 0) + 1, :now, :actor, :address, :action, :account,"
        " :subject, :detail FROM audit",
        {
            "id": tokens.new_id("aud"),
            "now": now,
            "actor": by.name,
            "address": by.address,
            "action": action,
            "account": account_id,
            "subject": subject,
            "detail": json.dumps(told) if told else None,
        },
    )


def page(
    db: Database, account_id: str | None, before: int | None, limit: int
) -> list[tuple[int, dict[str, Any]]]:
    """What was done, newest first, each with its number; in one account or, for None, in all."""
    condition = "" if account_id is None else " AND account_id = :account"
    rows = db.rows(
        "SELECT number, id, at, actor, address, action, account_id, subject, detail FROM audit"
        f" WHERE number < :before{condition} ORDER BY number DESC LIMIT :limit",
        {"before": _NEWEST if before is None else before, "limit": limit}
        | ({} if account_id is None else {"account": account_id}),
    )
    return [
        (
            number,
            {
                "id": entry_id,
                "at": clock.rfc3339(at),
                "actor": actor,
                "address": address,
                "action": action,
                "account": account,
                "subject": subject,
                "detail": None if detail is None else json.loads(detail),
            },
        )
        for number, entry_id, at, actor, address, action, account, subject, detail in rows
    ]
