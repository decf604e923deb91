"""The record of calls, read. (`core/ledger.py` writes it, because a call is a hold.)"""

from collections.abc import Iterable
from decimal import Decimal
from typing import Any, NamedTuple

from core import clock, daily
from core.daily import Group
from models import Database, Tx

_COLUMNS = (
    "number, request_id, created_at, route, method, payer, key_id, user_id, model, input_tokens,"
    " output_tokens, units, price, held, captured, status, upstream_status, duration_ms, estimated,"
    " cost_usd"
)
_NAMES = _COLUMNS.replace(" ", "").split(",")
_NEWEST = 10**15
_NEAR = 100  # numbers; it costs less to read as many calls in vain than to ask once more
_RECENT = 1000  # calls of an account that are looked through for whether credits were spent
_END_OF_TIME = 10**7 * clock.DAY_MS  # past every year that RFC 3339 can write
STATUSES = ("held", "captured", "voided")
SUMMARIES = ("member", "key", "route", "model", "day")  # what `summary` can group by


class Filter(NamedTuple):
    """Which calls are wanted; None of a field means any. Times are milliseconds."""

    key_id: str | None = None
    route: str | None = None
    model: str | None = None
    status: str | None = None
    since: int | None = None
    until: int | None = None  # not counted itself

    @property
    def group(self) -> daily.Narrowed:
        """What the sums can tell apart."""
        return daily.Narrowed(self.key_id, self.route, self.model)


def page(
    db: Database, account_id: str, key_id: str | None, before: int | None, limit: int
) -> list[tuple[int, dict[str, Any]]]:
    """An account's calls, newest first, each with its number; of one key only, if given."""
    return find(db, account_id, Filter(key_id), before, limit)


def find(
    db: Database, account_id: str, wanted: Filter, before: int | None, limit: int
) -> list[tuple[int, dict[str, Any]]]:
    """An account's calls that pass a filter, newest first, each with its number."""
    conditions, params = _conditions(account_id, wanted)
    found: list[tuple[Any, ...]] = []
    # One moment: a call that ends in between must be in flight, or ended, for all of it.
    with db.snapshot() as tx:
        newest = _NEWEST if before is None else before - 1
        for low, high in _spans(tx, account_id, wanted, newest):
            found += tx.rows(
                f"SELECT {_COLUMNS} FROM call WHERE {conditions}"
                " AND number >= :low AND number <= :high ORDER BY number DESC LIMIT :limit",
                params | {"low": low, "high": high, "limit": limit - len(found)},
            )
            if len(found) >= limit:
                break
    return [(row[0], _to_json(row)) for row in found]


def get(
    db: Database, account_id: str, key_id: str | None, request_id: str
) -> dict[str, Any] | None:
    """The call of that id, or else the newest whose caller chose it; None when there is none."""
    found = named(db, account_id, key_id, request_id)
    return None if found is None else found[1]


def named(
    db: Database, account_id: str, key_id: str | None, request_id: str, number: int | None = None
) -> tuple[str, dict[str, Any]] | None:
    """As `get`, with the id that is the call's alone; of that number, if given."""
    condition = "" if number is None else " AND number = :number"
    row = db.row(
        f"SELECT id, {_COLUMNS} FROM call WHERE {_of(key_id)}"
        f" AND (id = :request OR (request_id = :request AND request_id <> id)){condition}"
        " ORDER BY CASE WHEN id = :request THEN 0 ELSE 1 END, number DESC LIMIT 1",
        {"account": account_id, "key_id": key_id, "request": request_id}
        | ({} if number is None else {"number": number}),
    )
    return None if row is None else (row[0], _to_json(row[1:]))


def ids_of_request(tx: Tx, request_id: str, account_id: str | None = None) -> list[str]:
    """The ids of the calls a request id names, of one account only, if given: its own, or else all
    whose callers chose it."""
    condition = "" if account_id is None else " AND account_id = :account"
    rows = tx.rows(
        "SELECT id FROM call WHERE (id = :request OR (request_id = :request AND request_id <> id))"
        f"{condition}",
        {"request": request_id} | ({} if account_id is None else {"account": account_id}),
    )
    found = [row[0] for row in rows]
    return [request_id] if request_id in found else found


def summary(
    db: Database, account_id: str, by: str, since: int, until: int | None
) -> list[dict[str, Any]]:
    """What an account's calls of a span of time come to, by one of `SUMMARIES`: the most credits
    first, or the days in order. Calls in flight count as calls."""
    with db.snapshot() as tx:
        found = groups(tx, account_id, Filter(since=since, until=until))
    totals = []
    for value, those in split(found, by).items():
        total = add_up(those)
        cost = daily.added(Decimal(group.cost_usd) for group in those)
        name = clock.rfc3339(value * clock.DAY_MS)[:10] if by == "day" else value or None
        totals.append(
            {
                by: name,
                "calls": total.calls,
                "captured": total.captured,
                "failed": total.failed,
                "cost_usd": format(cost, "f"),
            }
        )
    if by == "day":
        return sorted(totals, key=lambda total: str(total["day"]))
    return sorted(totals, key=lambda total: (-total["captured"], str(total[by])))


class Total(NamedTuple):
    """What some calls come to."""

    calls: int
    failed: int
    captured: int


def add_up(found: Iterable[Group]) -> Total:
    """The total of some groups."""
    calls = failed = captured = 0
    for group in found:
        calls += group.calls
        failed += group.failed
        captured += group.captured
    return Total(calls, failed, captured)


def groups(tx: Tx, account_id: str, wanted: Filter) -> list[Group]:
    """What the calls that pass a filter, its status aside, come to by day, key, person, route and
    model. Whole days are read from their sums, what is cut off and what is in flight from the calls
    themselves."""
    wanted = wanted._replace(status=None)
    since = 0 if wanted.since is None else max(0, wanted.since)
    # Not only until now: a clock that has stepped back leaves calls in its future.
    until = max(since, _END_OF_TIME if wanted.until is None else wanted.until)
    first, last = -(-since // clock.DAY_MS), until // clock.DAY_MS - 1
    if first > last + 1:  # within one day
        return _counted(tx, account_id, wanted._replace(since=since, until=until))
    found = daily.groups(tx, account_id, first, last, wanted.group)
    edges = [(since, first * clock.DAY_MS), ((last + 1) * clock.DAY_MS, until)]
    for start, end in edges:
        if start < end:
            found += _counted(tx, account_id, wanted._replace(since=start, until=end))
    whole = wanted._replace(since=first * clock.DAY_MS, until=(last + 1) * clock.DAY_MS)
    return found + _counted(tx, account_id, whole._replace(status="held"))


def _counted(tx: Tx, account_id: str, wanted: Filter) -> list[Group]:
    """The sums of calls, from the calls themselves."""
    conditions, params = _conditions(account_id, wanted)
    rows = [
        row
        for low, high in _spans(tx, account_id, wanted, _NEWEST)
        for row in tx.rows(
            f"SELECT created_at / {clock.DAY_MS}, COALESCE(key_id, ''), COALESCE(user_id, ''),"
            " route, COALESCE(model, ''), cost_usd, COUNT(*),"
            " SUM(CASE WHEN status = 'voided' THEN 1 ELSE 0 END), SUM(captured), MIN(number),"
            f" MAX(number) FROM call WHERE {conditions} AND number >= :low AND number <= :high"
            " GROUP BY 1, 2, 3, 4, 5, 6",
            params | {"low": low, "high": high},
        )
    ]
    # Costs are exact decimals kept as text, so equal ones are counted there and multiplied here.
    return [
        Group._make((*row[:5], *row[6:9], f"{daily.times(row[5], row[6]):f}", *row[9:]))
        for row in rows
    ]


def split(found: Iterable[Group], by: str) -> dict[Any, list[Group]]:
    """Groups by one of `SUMMARIES`; '' stands for none."""
    field = {"member": "user_id", "key": "key_id"}.get(by, by)
    parts: dict[Any, list[Group]] = {}
    for group in found:
        parts.setdefault(getattr(group, field), []).append(group)
    return parts


def _conditions(account_id: str, wanted: Filter) -> tuple[str, dict[str, Any]]:
    """A filter as SQL."""
    found: list[tuple[str, dict[str, Any]]] = [("account_id = :account", {"account": account_id})]
    if wanted.key_id is not None:
        found.append(("key_id = :key_id", {"key_id": wanted.key_id}))
    if wanted.route is not None:
        found.append(("route = :route", {"route": wanted.route}))
    if wanted.model is not None:
        found.append(("model = :model", {"model": wanted.model}))
    if wanted.status in STATUSES:  # a literal, so that the partial indexes serve
        found.append((f"status = '{wanted.status}'", {}))
    if wanted.since is not None or wanted.until is not None:
        since, until = _moments(wanted)
        span = {"since": since, "until": until}
        found.append(("created_at >= :since AND created_at < :until", span))
    params: dict[str, Any] = {}
    for _, given in found:
        params |= given
    return " AND ".join(sql for sql, _ in found), params


def _moments(wanted: Filter) -> tuple[int, int]:
    return wanted.since or 0, _END_OF_TIME if wanted.until is None else wanted.until


def _spans(tx: Tx, account_id: str, wanted: Filter, newest: int) -> list[tuple[int, int]]:
    """Where the calls that pass a filter are among an account's numbers up to `newest`: spans that
    lie apart, the newest first, with little else in them.

    No index serves every filter, and the database cannot know which one serves it best. The daily
    sums do: each has the numbers between which its calls lie.
    """
    is_of_time = wanted.since is not None or wanted.until is not None
    is_narrow = (wanted.route, wanted.model, wanted.status) != (None, None, None)
    if not is_of_time and not is_narrow:
        return [(1, newest)]  # an index has just these, by number
    first, last = (moment // clock.DAY_MS for moment in _moments(wanted))
    known: list[tuple[int, int]] = []
    if not is_narrow and wanted.key_id is None:
        whole = daily.numbers(tx, account_id, first, last)
        known += [] if whole is None else [whole]
    elif wanted.status != "held":
        known += daily.spans(tx, account_id, first, last, wanted.group, wanted.status)
    if wanted.status in (None, "held"):  # which no sum counts yet
        known += [
            (row[0], row[0])
            for row in tx.rows(
                "SELECT number FROM call WHERE account_id = :account AND status = 'held'",
                {"account": account_id},
            )
        ]
    spans: list[tuple[int, int]] = []
    for low, high in sorted(known, key=lambda span: -span[1]):
        high = min(high, newest)
        if low > high:
            continue
        if spans and high >= spans[-1][0] - _NEAR:
            spans[-1] = min(low, spans[-1][0]), spans[-1][1]
        else:
            spans.append((low, high))
    return spans


def may_have_spent(tx: Tx, account_id: str, since: int) -> bool:
    """Whether an account has spent, or set aside, credits since then on calls that were not paid on
    the spot, so that what a payment had left may be gone. In doubt, after very many calls, it has.
    """
    row = tx.row(
        "SELECT 1 FROM account a"
        " JOIN call c ON c.account_id = a.id AND c.number >= a.last_call - :n"
        " WHERE a.id = :account AND c.created_at >= :since"
        " AND (c.payer <> 'x402' AND c.status <> 'voided' OR c.number = a.last_call - :n) LIMIT 1",
        {"account": account_id, "since": since, "n": _RECENT},
    )
    return row is not None


def account_of(tx: Tx, call_id: str) -> str | None:
    """Whose call it is."""
    row = tx.row("SELECT account_id FROM call WHERE id = :id", {"id": call_id})
    return None if row is None else row[0]


def status_of(tx: Tx, call_id: str) -> str | None:
    """`held`, `captured` or `voided`."""
    row = tx.row("SELECT status FROM call WHERE id = :id", {"id": call_id})
    return None if row is None else row[0]


def in_flight(tx: Tx) -> list[tuple[str, str]]:
    """The id and incarnation of every call that is still held."""
    rows = tx.rows("SELECT id, incarnation FROM call WHERE status = 'held'")
    return [(row[0], row[1]) for row in rows]


class Open(NamedTuple):
    """A call in flight."""

    request_id: str
    account_id: str
    route: str
    payer: str
    key_id: str | None
    user_id: str | None
    held: int
    created_at: int
    incarnation: str
    model: str | None


def open_now(tx: Tx, most: int) -> list[Open]:
    """The calls in flight, the oldest first."""
    rows = tx.rows(
        "SELECT request_id, account_id, route, payer, key_id, user_id, held, created_at,"
        " incarnation, model FROM call WHERE status = 'held' ORDER BY created_at LIMIT :most",
        {"most": most},
    )
    return [Open(*row) for row in rows]


def _of(key_id: str | None) -> str:
    return "account_id = :account AND key_id = :key_id" if key_id else "account_id = :account"


def _to_json(row: tuple[Any, ...]) -> dict[str, Any]:
    call = dict(zip(_NAMES, row, strict=True))
    del call["number"]
    call["created_at"] = clock.rfc3339(call["created_at"])
    call["estimated"] = bool(call["estimated"])
    return call
