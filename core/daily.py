"""Daily sums of ended calls and of entries, kept in the transaction that ends or enters them, so
that they can never differ from what they add up; `ledger.verify` holds them against it."""

from collections.abc import Iterable, Iterator
from decimal import Decimal, InvalidOperation, localcontext
from typing import Any, NamedTuple

from core import clock
from models import Tx

_AT_ONCE = 10_000
_PLACES = 60  # digits a sum of costs may have; decimal's default of 28 could round it


class Ended(NamedTuple):
    """A call that has just ended, as its daily sum wants to know it."""

    account_id: str
    key_id: str | None
    user_id: str | None
    route: str
    model: str | None
    number: int
    created_at: int


class Group(NamedTuple):
    """What the calls of one day, key, person, route and model come to; '' stands for none."""

    day: int
    key_id: str
    user_id: str
    route: str
    model: str
    calls: int
    failed: int
    captured: int
    cost_usd: str  # a decimal, which only who wants it needs to read
    first_number: int
    last_number: int


def add_call(tx: Tx, call: Ended, captured: int, failed: bool, cost_usd: str | None) -> None:
    """Count one ended call."""
    group = {
        "account": call.account_id,
        "day": call.created_at // clock.DAY_MS,
        "key": call.key_id or "",
        "user": call.user_id or "",
        "route": call.route,
        "model": call.model or "",
    }
    tx.run(
        "INSERT INTO call_day (account_id, day, key_id, user_id, route, model, calls, failed,"
        " captured, cost_usd, first_number, last_number) VALUES (:account, :day, :key, :user,"
        " :route, :model, 1, :failed, :captured, '0', :number, :number)"
        " ON CONFLICT (account_id, day, key_id, user_id, route, model) DO UPDATE SET"
        " calls = call_day.calls + 1, failed = call_day.failed + :failed,"
        " captured = call_day.captured + :captured,"
        " first_number = CASE WHEN call_day.first_number < :number THEN call_day.first_number"
        " ELSE :number END,"
        " last_number = CASE WHEN call_day.last_number > :number THEN call_day.last_number"
        " ELSE :number END",
        group | {"failed": int(failed), "captured": captured, "number": call.number},
    )
    if cost_usd is not None:
        _add_cost(tx, group, cost_usd)


def _add_cost(tx: Tx, group: dict[str, Any], cost_usd: str) -> None:
    """Decimals are added here, because the database would add them as floats."""
    this = (
        " WHERE account_id = :account AND day = :day AND key_id = :key AND user_id = :user"
        " AND route = :route AND model = :model"
    )
    row = tx.row(f"SELECT cost_usd FROM call_day{this}", group)
    assert row is not None  # it was written a moment ago
    with localcontext(prec=_PLACES):
        total = Decimal(row[0]) + Decimal(cost_usd)
    tx.run(f"UPDATE call_day SET cost_usd = :cost{this}", group | {"cost": format(total, "f")})


def add_entry(tx: Tx, account_id: str, kind: str, amount: int, number: int, now: int) -> None:
    """Count one entry."""
    tx.run(
        "INSERT INTO entry_day (account_id, day, kind, entries, amount, first_number, last_number)"
        " VALUES (:account, :day, :kind, 1, :amount, :number, :number)"
        " ON CONFLICT (account_id, day, kind) DO UPDATE SET entries = entry_day.entries + 1,"
        # Numbers only grow, whatever the clock does.
        " amount = entry_day.amount + :amount, last_number = :number",
        {
            "account": account_id,
            "day": now // clock.DAY_MS,
            "kind": kind,
            "amount": amount,
            "number": number,
        },
    )


# Reading


class Narrowed(NamedTuple):
    """Of which key, route and model sums are wanted; None means any."""

    key_id: str | None = None
    route: str | None = None
    model: str | None = None

    def sql(self) -> tuple[str, dict[str, Any]]:
        """The same as conditions, and their parameters."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return "".join(f" AND {name} = :{name}" for name in given), given


def groups(
    tx: Tx, account_id: str, first_day: int, last_day: int, wanted: Narrowed | None = None
) -> list[Group]:
    """The sums of an account's days from the first to the last, both counted."""
    conditions, params = (wanted or Narrowed()).sql()
    rows = tx.rows(
        "SELECT day, key_id, user_id, route, model, calls, failed, captured, cost_usd,"
        " first_number, last_number FROM call_day"
        f" WHERE account_id = :account AND day >= :first AND day <= :last{conditions}",
        {"account": account_id, "first": first_day, "last": last_day} | params,
    )
    return [Group._make(row) for row in rows]


def numbers(tx: Tx, account_id: str, first_day: int, last_day: int) -> tuple[int, int] | None:
    """The first and last number of the calls that began in those days and have ended."""
    row = tx.row(
        "SELECT MIN(first_number), MAX(last_number) FROM call_day"
        " WHERE account_id = :account AND day >= :first AND day <= :last",
        {"account": account_id, "first": first_day, "last": last_day},
    )
    return None if row is None or row[0] is None else (row[0], row[1])


class Sold(NamedTuple):
    """What all accounts' calls of something come to."""

    calls: int = 0
    failed: int = 0
    captured: int = 0
    cost_usd: Decimal = Decimal(0)


def sold(tx: Tx, first_day: int) -> dict[tuple[str, str], Sold]:
    """What was called since that day, by route and model ('' for none), over all accounts."""
    costs: dict[tuple[str, str], list[Decimal]] = {}
    for route, model, cost, count in tx.rows(
        "SELECT route, model, cost_usd, COUNT(*) FROM call_day WHERE day >= :day"
        " GROUP BY route, model, cost_usd",
        {"day": first_day},
    ):
        costs.setdefault((route, model), []).append(times(cost, count))
    rows = tx.rows(
        "SELECT route, model, SUM(calls), SUM(failed), SUM(captured) FROM call_day"
        " WHERE day >= :day GROUP BY route, model ORDER BY route, model",
        {"day": first_day},
    )
    return {
        (row[0], row[1]): Sold._make((*row[2:], added(iter(costs[row[0], row[1]])))) for row in rows
    }


def together(found: Iterable[Sold]) -> Sold:
    """The total of several."""
    calls, failed, captured, costs = 0, 0, 0, []
    for each in found:
        calls, failed, captured = calls + each.calls, failed + each.failed, captured + each.captured
        costs.append(each.cost_usd)
    return Sold(calls, failed, captured, added(iter(costs)))


def spans(
    tx: Tx, account_id: str, first_day: int, last_day: int, wanted: Narrowed, status: str | None
) -> list[tuple[int, int]]:
    """For each of those days with calls that are wanted and ended so (in any way, if None): between
    which numbers they lie, with others."""
    conditions, params = wanted.sql()
    conditions += {"voided": " AND failed > 0", "captured": " AND failed < calls"}.get(
        status or "", ""
    )
    rows = tx.rows(
        "SELECT MIN(first_number), MAX(last_number) FROM call_day WHERE account_id = :account"
        f" AND day >= :first AND day <= :last{conditions} GROUP BY day",
        {"account": account_id, "first": first_day, "last": last_day} | params,
    )
    return [(row[0], row[1]) for row in rows]


def added(costs: Iterator[Decimal]) -> Decimal:
    """The exact sum of costs."""
    with localcontext(prec=_PLACES):
        return sum(costs, Decimal(0))


def times(cost_usd: str | None, count: int) -> Decimal:
    """The exact cost of so many calls; one that is not known counts as none."""
    with localcontext(prec=_PLACES):
        return Decimal(cost_usd or 0) * count


class Kind(NamedTuple):
    """What an account's entries of one kind come to in some days."""

    kind: str
    entries: int
    amount: int
    first_number: int
    last_number: int


def kinds(tx: Tx, account_id: str, first_day: int, last_day: int) -> list[Kind]:
    """An account's entries of those days by kind."""
    rows = tx.rows(
        "SELECT kind, SUM(entries), SUM(amount), MIN(first_number), MAX(last_number)"
        " FROM entry_day WHERE account_id = :account AND day >= :first AND day <= :last"
        " GROUP BY kind ORDER BY kind",
        {"account": account_id, "first": first_day, "last": last_day},
    )
    return [Kind(*row) for row in rows]


def entered_by_day(tx: Tx, account_id: str, kind: str, first_day: int, last_day: int
) -> list[tuple[int, int, int]]:  # fmt: skip
    """Day, count and amount of an account's entries of one kind, in order."""
    rows = tx.rows(
        "SELECT day, entries, amount FROM entry_day WHERE account_id = :account"
        " AND kind = :kind AND day >= :first AND day <= :last ORDER BY day",
        {"account": account_id, "kind": kind, "first": first_day, "last": last_day},
    )
    return [(row[0], row[1], row[2]) for row in rows]


def balance_before(tx: Tx, account_id: str, day: int) -> int:
    """What an account's entries up to that day come to."""
    row = tx.row(
        "SELECT COALESCE(SUM(amount), 0) FROM entry_day WHERE account_id = :account AND day < :day",
        {"account": account_id, "day": day},
    )
    assert row is not None  # an aggregate always answers
    return int(row[0])


def has_entries_before(tx: Tx, account_id: str, day: int) -> bool:
    """Whether anything came or went before that day."""
    query = "SELECT 1 FROM entry_day WHERE account_id = :account AND day < :day LIMIT 1"
    return tx.row(query, {"account": account_id, "day": day}) is not None


# Proof


def faults(tx: Tx) -> list[str]:
    """Sums that differ from what they are of. A backup of an earlier version has none."""
    if not tx.row("SELECT 1 FROM sqlite_master WHERE name = 'call_day'"):
        return []
    days = {
        (account, day)
        for account, day in tx.rows(
            "SELECT DISTINCT account_id, day FROM (SELECT * FROM ("
            "SELECT account_id, created_at / 86400000 AS day, COALESCE(key_id, '') AS k,"
            " COALESCE(user_id, '') AS u, route, COALESCE(model, '') AS m, COUNT(*) AS n,"
            " SUM(CASE WHEN status = 'voided' THEN 1 ELSE 0 END), SUM(captured), MIN(number),"
            " MAX(number) FROM call WHERE status <> 'held' GROUP BY 1, 2, 3, 4, 5, 6"
            " UNION ALL SELECT account_id, day, key_id, user_id, route, model, calls, failed,"
            " captured, first_number, last_number FROM call_day) b"
            # What is on both sides is there twice.
            " GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 HAVING COUNT(*) <> 2) t"
        )
    }
    for (account,) in tx.rows("SELECT DISTINCT account_id FROM call_day"):
        days |= {(account, day) for day in _days_of_wrong_cost(tx, account)}
    wrong = [
        f"{account}: day {day} of its calls is not summed up rightly"
        for account, day in sorted(days)
    ]
    wrong += [
        f"{account}: day {day} of its entries is not summed up rightly"
        for account, day in tx.rows(
            "SELECT DISTINCT account_id, day FROM (SELECT * FROM ("
            "SELECT account_id, created_at / 86400000 AS day, kind, COUNT(*) AS n, SUM(amount),"
            " MIN(number), MAX(number) FROM entry GROUP BY 1, 2, 3"
            " UNION ALL SELECT account_id, day, kind, entries, amount, first_number, last_number"
            " FROM entry_day) b GROUP BY 1, 2, 3, 4, 5, 6, 7 HAVING COUNT(*) <> 2) t"
        )
    ]
    return wrong


def _days_of_wrong_cost(tx: Tx, account_id: str) -> Iterator[int]:
    """The days on which the costs of an account's calls are not what their sums say."""
    costs: dict[tuple[Any, ...], Decimal | None] = {}
    for *group, cost, count in _costs(tx, account_id):
        known, this = costs.get(tuple(group), Decimal(0)), _decimal(cost)
        with localcontext(prec=_PLACES):
            valid = known is not None and this is not None
            costs[tuple(group)] = known + this * count if valid else None
    for *group, cost in tx.rows(
        "SELECT day, key_id, user_id, route, model, cost_usd FROM call_day"
        " WHERE account_id = :account",
        {"account": account_id},
    ):
        expected = costs.get(tuple(group), Decimal(0))
        if expected is None or _decimal(cost) != expected:
            yield group[0]


def _costs(tx: Tx, account_id: str) -> Iterator[tuple[Any, ...]]:
    """Each cost that an account's ended calls had, its group before it, how many times after it.
    A span of numbers at a time, for every call of an account may have had another."""
    row = tx.row(
        "SELECT COALESCE(MAX(number), 0) FROM call WHERE account_id = :id", {"id": account_id}
    )
    assert row is not None  # an aggregate always answers
    for low in range(0, row[0] + 1, _AT_ONCE):
        yield from tx.rows(
            "SELECT created_at / 86400000, COALESCE(key_id, ''), COALESCE(user_id, ''), route,"
            " COALESCE(model, ''), cost_usd, COUNT(*) FROM call"
            " WHERE account_id = :account AND number >= :low AND number < :high"
            " AND status <> 'held' AND cost_usd IS NOT NULL GROUP BY 1, 2, 3, 4, 5, 6",
            {"account": account_id, "low": low, "high": low + _AT_ONCE},
        )


def _decimal(text: str) -> Decimal | None:
    """The number a text is; None of one that is none."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
