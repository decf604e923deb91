"""The daily sums say what the calls and entries themselves say, whatever is asked of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from itertools import count
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from inprocess import Box, Clock
from people import CONFIG, Person, person

from core import calls, clock, daily, ledger, tokens
from core.calls import Filter
from core.clock import DAY_MS
from core.ledger import Guard, NewCall, Outcome
from models import Tx

NOW = clock.parse_rfc3339("2027-03-05T12:00:00Z")
FIRST_DAY = clock.parse_rfc3339("2027-03-01T00:00:00Z") // DAY_MS
DAYS = 8  # the last of them after NOW: the clock has stepped back since
KEYS, USERS = (None, "key_a", "key_b"), (None, "user_a", "user_b")
ROUTES, MODELS = ("/api/v1/echo", "/api/v1/sms/send"), (None, "big", "small")
COSTS = (None, "0", "0.1", "0.10", "0.0079", "1e-12", "0.2", "123456789.000000000001")
_numbers = count(1)

# The beginning and the end of a day, and moments in it.
moments = st.builds(
    lambda day, part: (FIRST_DAY + day) * DAY_MS + part,
    st.integers(0, DAYS - 1),
    st.sampled_from((0, 1, DAY_MS // 3, DAY_MS // 2, DAY_MS - 1)),
)
bounds = st.one_of(st.none(), moments, st.sampled_from((-5, 0, FIRST_DAY * DAY_MS * 2)))


@dataclass
class Made:
    """A call, as whoever made it knows it."""

    created_at: int
    key_id: str | None
    user_id: str | None
    route: str
    model: str | None
    price: int
    ending: str
    cost_usd: str | None
    ended: int  # those with less end first
    number: int = 0
    id: str = ""

    @property
    def captured(self) -> int:
        return self.price if self.ending == "captured" else 0

    @property
    def cost(self) -> Decimal:
        return Decimal(self.cost_usd or 0) if self.ending == "captured" else Decimal(0)

    @property
    def group(self) -> tuple[Any, ...]:
        none = self.key_id or "", self.user_id or "", self.route, self.model or ""
        return (self.created_at // DAY_MS, *none)


plans = st.lists(
    st.builds(
        Made,
        moments,
        st.sampled_from(KEYS),
        st.sampled_from(USERS),
        st.sampled_from(ROUTES),
        st.sampled_from(MODELS),
        st.integers(0, 4),
        st.sampled_from(("held", "captured", "captured", "voided")),
        st.sampled_from(COSTS),
        st.integers(0, 9),
    ),
    max_size=14,
)
filters = st.builds(
    Filter,
    st.sampled_from((None, None, "key_a", "key_b", "key_c")),
    st.sampled_from((None, None, *ROUTES, "/nowhere")),
    st.sampled_from((None, None, "big", "small", "tiny")),
    st.sampled_from((None, None, "held", "captured", "voided")),
    bounds,
    bounds,
)
often = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """An instance on which it is always `NOW`."""
    with pytest.MonkeyPatch.context() as patches:
        Clock(patches, clock.rfc3339(NOW))
        with Box(tmp_path_factory.mktemp("daily") / "i", CONFIG) as box:
            yield box


def opened(box: Box) -> str:
    """A new account with credits enough."""

    def work(tx: Tx) -> str:
        account = ledger.open_account(tx, NOW)
        ledger.add_credits(tx, account, "grant", 10**6, tokens.new_id("grant"), None, NOW)
        return account

    return box.write(work)


def hold(tx: Tx, box: Box, account: str, call: Made) -> None:
    """Begin a call."""
    call.id = tokens.new_id("req")
    new = NewCall(
        call.id, call.id, account, "session", call.key_id, call.user_id, call.route, "POST", 1,
        call.price, call.price, box.instance.incarnation(), call.created_at,
    )  # fmt: skip
    assert ledger.hold(tx, new, Guard("TRUE", {}), 100) is not None
    tx.run("UPDATE call SET model = :m WHERE id = :id", {"m": call.model, "id": call.id})


def end(tx: Tx, call: Made) -> None:
    """End a call as planned; one that is to be held goes on."""
    if call.ending == "captured":
        outcome = Outcome(200, 1, cost_usd=call.cost_usd)
        assert ledger.capture(tx, call.id, call.price, outcome, call.created_at)
    elif call.ending == "voided":
        assert ledger.void(tx, call.id, Outcome(502, 1))


def made(box: Box, account: str, plan: list[Made]) -> list[Made]:
    """The calls of a plan, all begun and then ended in the order in which they end."""

    def work(tx: Tx) -> None:
        for number, call in enumerate(plan, start=1):
            call.number = number
            hold(tx, box, account, call)
        for call in sorted(plan, key=lambda call: call.ended):
            end(tx, call)

    box.write(work)
    return plan


def passing(plan: list[Made], wanted: Filter) -> list[Made]:
    """The calls that pass a filter, newest first."""
    return [
        call
        for call in sorted(plan, key=lambda call: -call.number)
        if wanted.key_id in (None, call.key_id)
        and wanted.route in (None, call.route)
        and wanted.model in (None, call.model)
        and wanted.status in (None, call.ending)
        and (wanted.since is None or call.created_at >= wanted.since)
        and (wanted.until is None or call.created_at < wanted.until)
    ]


class Sums:
    """What some calls come to, added up plainly."""

    def __init__(self) -> None:
        self.calls = self.failed = self.captured = 0
        self.cost = Decimal(0)
        self.numbers: list[int] = []

    def add(
        self, calls: int, failed: int, captured: int, cost: Decimal | str, *numbers: int
    ) -> None:
        with localcontext(prec=200):
            self.cost += Decimal(cost)
        self.calls, self.failed = self.calls + calls, self.failed + failed
        self.captured += captured
        self.numbers += numbers

    @property
    def total(self) -> tuple[Any, ...]:
        span = min(self.numbers), max(self.numbers)
        return self.calls, self.failed, self.captured, self.cost, *span


def plainly(found: list[Made]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Calls by group."""
    sums: dict[tuple[Any, ...], Sums] = defaultdict(Sums)
    for call in found:
        failed = int(call.ending == "voided")
        sums[call.group].add(1, failed, call.captured, call.cost, call.number)
    return {group: sum_.total for group, sum_ in sums.items()}


def summed(box: Box, account: str, wanted: Filter) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What `calls.groups` says; a group may come in several parts."""
    with box.instance.db.snapshot() as tx:
        found = calls.groups(tx, account, wanted)
    sums: dict[tuple[Any, ...], Sums] = defaultdict(Sums)
    for group in found:
        sums[tuple(group[:5])].add(*group[5:])
    return {group: sum_.total for group, sum_ in sums.items()}


def numbers(box: Box, account: str, wanted: Filter, *window: Any) -> list[int]:
    found = calls.find(box.instance.db, account, wanted, *(window or (None, 1000)))
    return [number for number, _ in found]


@often
@given(plan=plans, asked=st.lists(filters, min_size=1, max_size=8))
def test_any_filter_finds_and_adds_up_what_passes_it(
    box: Box, plan: list[Made], asked: list[Filter]
) -> None:
    account = opened(box)
    made(box, account, plan)
    made(box, opened(box), [Made(NOW, None, None, ROUTES[0], None, 1, "captured", "1", 0)])
    for wanted in asked:
        expected = [call.number for call in passing(plan, wanted)]
        assert numbers(box, account, wanted) == expected, wanted
        if expected:
            middle = expected[len(expected) // 2]
            after = [number for number in expected if number < middle][:2]
            assert numbers(box, account, wanted, middle, 2) == after, wanted
        of_any_status = passing(plan, wanted._replace(status=None))
        assert summed(box, account, wanted) == plainly(of_any_status), wanted


@often
@given(plan=plans, by=st.sampled_from(calls.SUMMARIES), since=bounds, until=bounds)
def test_a_summary_is_what_its_calls_come_to(
    box: Box, plan: list[Made], by: str, since: int | None, until: int | None
) -> None:
    account = opened(box)
    made(box, account, plan)
    found = calls.summary(box.instance.db, account, by, since or 0, until)
    check_summary(found, by, passing(plan, Filter(since=since, until=until)))


def check_summary(found: list[dict[str, Any]], by: str, of: list[Made]) -> None:
    """Whether a summary adds up these calls, and is in order."""
    value: dict[str, Callable[[Made], Any]] = {
        "member": lambda call: call.user_id,
        "key": lambda call: call.key_id,
        "route": lambda call: call.route,
        "model": lambda call: call.model,
        "day": lambda call: clock.rfc3339(call.created_at)[:10],
    }
    sums: dict[Any, Sums] = defaultdict(Sums)
    for call in of:
        failed = int(call.ending == "voided")
        sums[value[by](call)].add(1, failed, call.captured, call.cost, 0)
    assert {
        row[by]: (row["calls"], row["failed"], row["captured"], Decimal(row["cost_usd"]), 0, 0)
        for row in found
    } == {name: sum_.total for name, sum_ in sums.items()}
    assert len(found) == len(sums)
    assert all("E" not in row["cost_usd"] for row in found)
    if by == "day":
        assert [row["day"] for row in found] == sorted(row["day"] for row in found)
    else:
        order = [(-row["captured"], str(row[by])) for row in found]
        assert order == sorted(order)


def rfc3339_ms(at: int) -> str:
    return f"{clock.rfc3339(at)[:-1]}.{at % 1000:03}Z"


@settings(often, max_examples=60)
@given(plan=plans, since=st.none() | moments, until=st.none() | moments)
def test_over_http_a_summary_says_the_same(
    box: Box, plan: list[Made], since: int | None, until: int | None
) -> None:
    end_ms = NOW + 1 if until is None else until
    assume(since is None or since <= end_ms)
    who: Person = person(box, 1000)
    made(box, who.account, plan)
    query = "".join(
        f"&{name}={quote(rfc3339_ms(at))}"
        for name, at in (("from", since), ("to", until))
        if at is not None
    )
    if since is None:
        since = end_ms - 30 * DAY_MS
    for by in calls.SUMMARIES:
        answer = box.get(f"/api/v1/usage/summary?by={by}{query}", who.token)
        assert answer.status == 200, answer.body
        found = passing(plan, Filter(since=since, until=until))
        check_summary(answer.json()["data"], by, found)


def test_every_span_of_quarter_days_over_a_few_calls(box: Box) -> None:
    """As above, but all of them: nothing depends on what was drawn."""
    account, quarter = opened(box), DAY_MS // 4
    start = FIRST_DAY * DAY_MS
    endings = ("captured", "voided", "held")
    plan = made(box, account, [
        Made(start + at * quarter + off, KEYS[at % 3], None, ROUTES[at % 2], None, 1,
             endings[at % 3], "0.1", -at)
        for at in (9, 4, 0, 8, 3, 5, 12) for off in (0, quarter - 1)
    ])  # fmt: skip
    marks = [None, *(start + at * quarter for at in range(-1, 15))]
    for since in marks:
        for until in marks:
            for status in (None, "held", "voided"):
                wanted = Filter(status=status, since=since, until=until)
                expected = [call.number for call in passing(plan, wanted)]
                assert numbers(box, account, wanted) == expected, wanted
            wanted = Filter(since=since, until=until)
            assert summed(box, account, wanted) == plainly(passing(plan, wanted)), wanted


def test_a_call_that_ends_while_calls_are_looked_for_is_found(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = opened(box)
    (call,) = made(box, account, [Made(NOW, None, None, ROUTES[0], None, 1, "held", None, 0)])
    call.ending, real = "captured", daily.numbers

    def and_it_ends(*given: Any) -> tuple[int, int] | None:
        span = real(*given)
        box.write(lambda tx: end(tx, call))
        return span

    monkeypatch.setattr(daily, "numbers", and_it_ends)
    assert numbers(box, account, Filter(since=0)) == [1]


# Costs.


def test_costs_are_added_up_to_the_last_place(box: Box) -> None:
    account = opened(box)
    costs = ["0.1", "0.2", "0.10", "999999999.999999999999", "0.000000000001"] * 3
    made(box, account, [
        Made(NOW, None, None, ROUTES[0], None, 1, "captured", cost, 0) for cost in costs
    ])  # fmt: skip
    (day,) = calls.summary(box.instance.db, account, "day", NOW - 2 * DAY_MS, None)
    assert day["cost_usd"] == "3000000001.200000000000"
    with box.instance.db.snapshot() as tx:
        (group,) = daily.groups(tx, account, NOW // DAY_MS, NOW // DAY_MS)
    assert group.cost_usd == "3000000001.200000000000"


def test_a_cost_that_is_not_known_is_none(box: Box) -> None:
    account = opened(box)
    made(box, account, [Made(NOW, None, None, ROUTES[0], None, 1, "captured", None, 0)])
    (day,) = calls.summary(box.instance.db, account, "day", 0, None)
    assert day["cost_usd"] == "0"


# Entries.


@often
@given(
    moves=st.lists(
        st.tuples(
            moments,
            st.sampled_from(("grant", "voucher", "adjustment", "signup", "capture")),
            st.integers(-5, 5).filter(bool),
        ),
        max_size=14,
    ),
    first=st.integers(FIRST_DAY - 1, FIRST_DAY + DAYS),
    last=st.integers(FIRST_DAY - 1, FIRST_DAY + DAYS),
)
def test_entries_are_summed_up_by_day_and_kind(
    box: Box, moves: list[tuple[int, str, int]], first: int, last: int
) -> None:
    account = opened(box)
    entered = [(NOW // DAY_MS, "grant", 10**6, 1)]

    def work(tx: Tx) -> None:
        for at, kind, amount in moves:
            if kind == "capture":
                amount = -abs(amount)
                call = Made(at, None, None, ROUTES[0], None, -amount, "captured", None, 0)
                hold(tx, box, account, call)
                end(tx, call)
            else:
                amount = amount if kind == "adjustment" else abs(amount)
                ledger.add_credits(tx, account, kind, amount, tokens.new_id("x"), None, at)
            entered.append((at // DAY_MS, kind, amount, len(entered) + 1))

    box.write(work)
    inside = [entry for entry in entered if first <= entry[0] <= last]
    with box.instance.db.snapshot() as tx:
        assert daily.kinds(tx, account, first, last) == [
            (kind, len(those), sum(entry[2] for entry in those), those[0][3], those[-1][3])
            for kind in sorted({entry[1] for entry in inside})
            for those in [[entry for entry in inside if entry[1] == kind]]
        ]
        for kind in ("grant", "capture", "refund"):
            assert daily.entered_by_day(tx, account, kind, first, last) == [
                (day, len(those), sum(entry[2] for entry in those))
                for day in range(first, last + 1)
                for those in [[e for e in inside if e[1] == kind and e[0] == day]]
                if those
            ]
        before = sum(entry[2] for entry in entered if entry[0] < first)
        assert daily.balance_before(tx, account, first) == before
        balance = ledger.standing(tx, account).balance
        assert daily.balance_before(tx, account, FIRST_DAY + 2 * DAYS) == balance


def test_nobody_has_no_sums(box: Box) -> None:
    with box.instance.db.snapshot() as tx:
        assert daily.kinds(tx, "acct_nobody", 0, 10**6) == []
        assert daily.balance_before(tx, "acct_nobody", 10**6) == 0
        assert daily.numbers(tx, "acct_nobody", 0, 10**6) is None
        assert calls.groups(tx, "acct_nobody", Filter()) == []


# Proof.

_OF_A_CALL_DAY = (
    "day = day + 1", "key_id = 'key_x'", "key_id = ''", "user_id = 'user_x'", "route = '/x'",
    "model = 'x'", "account_id = 'acct_operator'", "calls = calls + 1", "calls = calls - 1",
    "failed = failed + 1", "captured = captured + 1", "captured = -captured",
    "first_number = first_number + 1", "first_number = first_number - 1",
    "last_number = last_number + 1", "last_number = last_number - 1", "cost_usd = '0'",
    "cost_usd = '0.3000000000000000000000001'", "cost_usd = '-0.3'", "cost_usd = ''",
    "cost_usd = 'x'", "cost_usd = 'NaN'", "cost_usd = 'sNaN'",
)  # fmt: skip
_OF_AN_ENTRY_DAY = (
    "day = day - 1", "kind = 'signup'", "account_id = 'acct_operator'", "entries = entries + 1",
    "entries = entries - 1", "amount = amount + 1", "amount = -amount",
    "first_number = first_number + 1", "last_number = last_number + 1",
    "last_number = last_number - 1",
)  # fmt: skip


@pytest.fixture(scope="module")
def proven(box: Box) -> tuple[str, str]:
    """An account and a condition for the sum of three of its calls, one of them failed."""
    account = opened(box)
    made(box, account, [
        Made(NOW, "key_a", "user_a", ROUTES[0], "big", 2, ending, cost, 0)
        for ending, cost in (("captured", "0.1"), ("voided", None), ("captured", "0.2"))
    ] + [Made(NOW + DAY_MS, None, None, ROUTES[0], None, 2, "voided", None, 0)])  # fmt: skip
    return account, "account_id = :account AND key_id = 'key_a'"


class _Undone(Exception):
    pass


def faults_after(box: Box, statement: str, **params: object) -> list[str]:
    """What is found wrong after a statement, which is then undone."""
    found: list[str] = []

    def work(tx: Tx) -> None:
        assert tx.run(statement, params) == 1
        found.extend(ledger.verify(tx)[1])
        raise _Undone

    with pytest.raises(_Undone):
        box.write(work)
    assert box.faults() == []
    return found


@pytest.mark.parametrize("damage", _OF_A_CALL_DAY)
def test_a_sum_of_calls_that_was_tampered_with_is_found(
    box: Box, proven: tuple[str, str], damage: str
) -> None:
    account, this = proven
    found = faults_after(box, f"UPDATE call_day SET {damage} WHERE {this}", account=account)
    assert any(account in fault and "calls" in fault for fault in found), found


@pytest.mark.parametrize("damage", _OF_AN_ENTRY_DAY)
def test_a_sum_of_entries_that_was_tampered_with_is_found(
    box: Box, proven: tuple[str, str], damage: str
) -> None:
    account, _ = proven
    this = "account_id = :account AND kind = 'capture'"
    found = faults_after(box, f"UPDATE entry_day SET {damage} WHERE {this}", account=account)
    assert any(account in fault and "entries" in fault for fault in found), found


@pytest.mark.parametrize("table", ["call_day", "entry_day"])
def test_a_sum_that_is_missing_or_of_nothing_is_found(
    box: Box, proven: tuple[str, str], table: str
) -> None:
    account, this = proven
    one = this if table == "call_day" else "account_id = :account AND kind = 'grant'"
    assert faults_after(box, f"DELETE FROM {table} WHERE {one}", account=account)
    with box.instance.db.reading() as tx:
        columns = [row[1] for row in tx.rows(f"PRAGMA table_info({table})")]
    other = ", ".join("day + 100" if name == "day" else name for name in columns)
    copy = f"INSERT INTO {table} SELECT {other} FROM {table} WHERE {one}"
    found = faults_after(box, copy, account=account)
    assert any(str(NOW // DAY_MS + 100) in fault for fault in found), found


@pytest.mark.parametrize(
    "damage",
    [
        "key_id = NULL", "user_id = 'user_x'", "route = '/x'", "model = NULL",
        "created_at = created_at + 86400000", "cost_usd = NULL", "cost_usd = '0.11'",
        "cost_usd = 'x'", "cost_usd = 'sNaN'",
    ],
)  # fmt: skip
def test_a_call_that_was_tampered_with_is_found_by_its_sum(
    box: Box, proven: tuple[str, str], damage: str
) -> None:
    account, _ = proven
    statement = f"UPDATE call SET {damage} WHERE account_id = :account AND number = 1"
    found = faults_after(box, statement, account=account)
    assert any(account in fault for fault in found), found


def test_one_fault_is_told_for_each_day(box: Box, proven: tuple[str, str]) -> None:
    account, this = proven
    statement = f"UPDATE call_day SET calls = 9, cost_usd = '7' WHERE {this}"
    day = NOW // DAY_MS
    assert faults_after(box, statement, account=account) == [
        f"{account}: day {day} of its calls is not summed up rightly"
    ]


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 5, 6])
def test_costs_are_proven_a_span_of_calls_at_a_time(
    box: Box, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(daily, "_AT_ONCE", at_once)
    account = opened(box)
    made(box, account, [
        Made(NOW, None, None, ROUTES[0], None, 1, "captured", f"0.{number}", 0)
        for number in range(1, 6)
    ])  # fmt: skip
    assert box.faults() == []
    for number in range(1, 6):
        damage = "UPDATE call SET cost_usd = '7' WHERE account_id = :account AND number = :number"
        assert faults_after(box, damage, account=account, number=number) == [
            f"{account}: day {NOW // DAY_MS} of its calls is not summed up rightly"
        ]
