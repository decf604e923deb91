"""The ledger's rules on real files: a model it must agree with, and every order of two operations.

`Books` is how this and the other storage tests speak to the ledger.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import config
import models
from app import create_app
from core import admission, catalog, clock, errors, idempotency, keys, ledger, limits, settlement
from core.access import Principal
from core.adapters import Inbound, Order
from core.audit import SYSTEM
from core.idempotency import Stored
from core.ledger import Guard, NewCall, Outcome, Resolved, Standing, Totals
from core.limits import CreditLimit
from models import Database, Row, Tx

TORTURE = os.environ.get("FAREBOX_TORTURE") == "1"
EXAMPLES, STEPS = (50_000, 50) if TORTURE else (1_000, 50)

NOW = 1_800_000_000_000  # 2027-01-15; the clock of these tests moves only when they say so
MOST = 10**15
ALWAYS = Guard("TRUE", {})
DONE = Outcome(upstream_status=200, duration_ms=1)


def wanted(call: NewCall) -> Order:
    """What a call is held for."""
    return Order(call.units, call.price, ())


_numbers = itertools.count(1)


def new_call(account: str, credits: int, **changes: Any) -> NewCall:
    number = next(_numbers)
    values: dict[str, Any] = {
        "id": f"req_{number:08}",
        "request_id": f"req_{number:08}",
        "account_id": account,
        "payer": "api_key",
        "key_id": None,
        "user_id": None,
        "route": "/api/v1/x",
        "method": "POST",
        "units": 1,
        "price": credits,
        "held": credits,
        "incarnation": "inc_of_a_test",
        "created_at": NOW,
    }
    return NewCall(**values | changes)


class Books:
    """One database with the ledger's verbs, each in a transaction of its own."""

    def __init__(self, path: Path) -> None:
        self.db = Database(path)
        self.db.migrate()

    def close(self) -> None:
        self.db.close()

    def account(self, credits: int = 0) -> str:
        def work(tx: Tx) -> str:
            account = ledger.open_account(tx, NOW)
            if credits:
                ledger.add_credits(tx, account, "grant", credits, account, None, NOW)
            return account

        return self.db.write(work)

    def add(self, account: str, kind: str, credits: int, reference: str = "") -> Standing | None:
        reference = reference or f"ref_{next(_numbers)}"
        return self.db.write(
            lambda tx: ledger.add_credits(tx, account, kind, credits, reference, None, NOW)
        )

    def hold(self, account: str, credits: int, **changes: Any) -> str | None:
        call = new_call(account, credits, **changes)
        held = self.db.write(lambda tx: ledger.hold(tx, call, ALWAYS, 10**6))
        return None if held is None else call.id

    def capture(self, call_id: str, credits: int, durable: bool = False) -> Resolved | None:
        return self.db.write(lambda tx: ledger.capture(tx, call_id, credits, DONE, NOW), durable)

    def void(self, call_id: str) -> Resolved | None:
        return self.db.write(lambda tx: ledger.void(tx, call_id, DONE))

    def refund(self, call_id: str) -> tuple[int, Standing]:
        return self.db.write(lambda tx: ledger.refund(tx, call_id, None, NOW))

    def captured_call(self, account: str, credits: int) -> str:
        call_id = self.hold(account, credits)
        assert call_id is not None
        assert self.capture(call_id, credits) is not None
        return call_id

    def standing(self, account: str) -> Standing:
        with self.db.reading() as tx:
            return ledger.standing(tx, account)

    def faults(self) -> list[str]:
        with self.db.snapshot() as tx:
            return ledger.verify(tx)[1]

    def moved(self) -> int:
        """The sum of all entries: what came in less what went out."""
        row = self.db.row("SELECT COALESCE(SUM(amount), 0) FROM entry")
        assert row is not None
        total: int = row[0]
        return total


def refused(code: str, act: Callable[[], object]) -> errors.Refusal:
    with pytest.raises(errors.Refusal) as caught:
        act()
    assert caught.value.code == code
    return caught.value


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    made = Books(tmp_path / "farebox.db")
    yield made
    assert made.faults() == []
    made.close()


# The model: an independent ledger in plain Python


@dataclass
class ModelAccount:
    active: bool = True
    balance: int = 0
    entries: list[tuple[str, int, int, str]] = field(default_factory=list)

    def enter(self, kind: str, amount: int, reference: str) -> None:
        self.balance += amount
        self.entries.append((kind, amount, self.balance, reference))


@dataclass
class ModelCall:
    id: str
    account: str
    held: int
    key: str | None
    window: tuple[str, int] | None
    idempotency: str | None
    status: str = "held"
    captured: int = 0
    refunded: bool = False


@dataclass
class ModelAnswer:
    body: bytes
    call: str
    created_at: int
    state: str = "running"


amounts = st.one_of(st.integers(-3, 40), st.sampled_from([MOST, MOST + 1, -MOST, -MOST - 1, 10**6]))
picks = st.integers(0, 15)
key_ids = st.sampled_from([None, "key_a", "key_b"])
repeats = st.sampled_from([None, None, "once", "twice"])
# So much more than is just allowed; None is for an amount of any size.
edges = st.sampled_from([None, None, None, 0, 1])
bodies = st.sampled_from([b"{}", b'{"n": 1}'])


class LedgerMachine(RuleBasedStateMachine):
    """Every rule acts on the ledger, then on the model, and compares what they answered."""

    template: Path
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        path = self.folder / f"{next(_numbers)}.db"
        shutil.copyfile(self.template, path)
        self.path = path
        self.db = Database(path)
        self.now = NOW
        self.accounts: dict[str, ModelAccount] = {}
        self.calls: list[ModelCall] = []
        self.limits: dict[str, CreditLimit] = {}
        self.windows: dict[tuple[str, int], int] = {}
        self.answers: dict[tuple[str, str], ModelAnswer] = {}
        self.references: set[tuple[str, str]] = set()
        self.seen: tuple[list[Row], tuple[Totals, list[str], list[Row], list[Row]]] | None = None

    # The model's own arithmetic.

    def in_flight(self, account: str) -> list[ModelCall]:
        return [c for c in self.calls if c.account == account and c.status == "held"]

    def held(self, account: str) -> int:
        return sum(call.held for call in self.in_flight(account))

    def available(self, account: str) -> int:
        return self.accounts[account].balance - self.held(account)

    def some(self, pick: int) -> str:
        return list(self.accounts)[pick % len(self.accounts)]

    def window_of(self, limit: CreditLimit) -> tuple[str, int]:
        day = 86_400_000
        return limit.subject, self.now // day * day if limit.period == "day" else 0

    # What may happen.

    @initialize(credits=st.integers(0, 200))
    def begin(self, credits: int) -> None:
        """Nothing can happen without an account."""
        self.open_account(credits)

    @precondition(lambda self: len(self.accounts) < 3)
    @rule(credits=st.integers(0, 60))
    def open_account(self, credits: int) -> None:
        account = self.db.write(lambda tx: ledger.open_account(tx, self.now))
        self.accounts[account] = ModelAccount()
        if credits:
            self.move(credits, list(self.accounts).index(account), "grant", None)

    @rule(
        credits=amounts,
        pick=picks,
        kind=st.sampled_from(["grant", "adjustment", "signup"]),
        again=st.none() | picks,
        edge=edges,
    )
    def move(
        self, credits: int, pick: int, kind: str, again: int | None, edge: int | None = None
    ) -> None:
        account = self.some(pick)
        if edge is not None and credits > 0:
            credits = MOST - self.accounts[account].balance + edge
        elif edge is not None:
            credits = -self.available(account) - edge
        known = sorted(self.references)
        reference = f"ref_{next(_numbers)}"
        if again is not None and known:
            kind, reference = known[again % len(known)]
        try:
            after = self.db.write(
                lambda tx: ledger.add_credits(tx, account, kind, credits, reference, None, self.now)
            )
            answer = "replay" if after is None else "moved"
        except errors.Refusal as refusal:
            answer = refusal.code
        model = self.accounts[account]
        if credits == 0 or abs(credits) > MOST:
            assert answer == "validation_error"
        elif (kind, reference) in self.references:
            assert answer == "replay"
        elif model.balance + credits < self.held(account):
            assert answer == "insufficient_credits"
        elif model.balance + credits > MOST:
            assert answer == "validation_error"
        else:
            assert answer == "moved"
            model.enter(kind, credits, reference)
            self.references.add((kind, reference))

    @rule(subject=st.sampled_from(["key_a", "key_b"]), most=st.integers(0, 60),
          period=st.sampled_from(["day", "total"]))  # fmt: skip
    def limit_a_key(self, subject: str, most: int, period: str) -> None:
        self.limits[subject] = CreditLimit(subject, most, period)

    @rule(
        credits=st.one_of(st.integers(0, 30), st.just(MOST)),
        pick=picks,
        key=key_ids,
        most_calls=st.sampled_from([1, 3, 100]),
        repeat=repeats,
        body=bodies,
        edge=edges,
    )
    def ask(
        self, credits: int, pick: int, key: str | None, most_calls: int, repeat: str | None,
        body: bytes, edge: int | None = None,
    ) -> None:  # fmt: skip
        account = self.some(pick)
        limit = self.limits.get(key) if key else None
        if edge is not None:
            credits = self.available(account)
            if limit is not None:
                credits = min(credits, limit.limit - self.windows.get(self.window_of(limit), 0))
            credits = max(0, credits + edge)
        call = new_call(
            account, credits, key_id=key, created_at=self.now, idempotency_key=repeat
        )  # fmt: skip
        who = Principal("api_key", account, None, "subject", None, ALWAYS, limit=limit)
        inbound = Inbound("POST", "/api/v1/x", "", {}, body, call.id)
        got = self.db.write(
            lambda tx: admission.admit(tx, who, call, wanted(call), inbound, most_calls)
        )
        answer = got.refusal.code if got.refusal else "stored" if got.stored else "held"
        expected = self.expect(account, credits, limit, most_calls, repeat, body)
        assert answer == expected
        if answer != "held":
            return
        window = None
        if limit is not None:
            window = self.window_of(limit)
            self.windows[window] = self.windows.get(window, 0) + credits
        if repeat is not None:
            self.answers[account, repeat] = ModelAnswer(body, call.id, self.now)
        self.calls.append(ModelCall(call.id, account, credits, key, window, repeat))
        assert got.standing == (self.accounts[account].balance, self.held(account))

    def expect(
        self, account: str, credits: int, limit: CreditLimit | None, most_calls: int,
        repeat: str | None, body: bytes,
    ) -> str:  # fmt: skip
        known = self.answers.get((account, repeat or ""))
        fresh = known and (known.state == "running" or self.now - known.created_at < 86_400_000)
        if known and fresh:
            if known.body != body:
                return "idempotency_key_reused"
            return {
                "running": "idempotency_in_progress",
                "lost": "idempotency_replay_unavailable",
                "stored": "stored",
            }[known.state]
        if limit and self.windows.get(self.window_of(limit), 0) + credits > limit.limit:
            return "credit_limit_reached"
        if not self.accounts[account].active:
            return "account_suspended"
        if len(self.in_flight(account)) >= most_calls:
            return "rate_limited"
        return "held" if credits <= self.available(account) else "insufficient_credits"

    @precondition(lambda self: self.calls)
    @rule(pick=picks, credits=st.integers(0, 40), answered=st.booleans())
    def capture(self, pick: int, credits: int, answered: bool) -> None:
        call = self.calls[-1 - pick % len(self.calls)]
        kept = Stored(200, [("Content-Type", "text/plain")], b"hi") if answered else None
        got = self.db.write(
            lambda tx: settlement.capture(tx, call.id, credits, DONE, kept, self.now)
        )
        assert (got is not None) == (call.status == "held")
        if got is None:
            return
        call.status, call.captured = "captured", min(credits, call.held)
        if call.captured:
            self.accounts[call.account].enter("capture", -call.captured, call.id)
        self.settle(call, got)
        if call.idempotency is not None:
            known = self.answers[call.account, call.idempotency]
            known.state = "stored" if answered else "lost"

    @rule(credits=st.integers(0, 12), pick=picks, key=key_ids, repeat=repeats, body=bodies,
          spent=st.none() | st.integers(0, 15), answered=st.booleans())  # fmt: skip
    def serve(
        self, credits: int, pick: int, key: str | None, repeat: str | None, body: bytes,
        spent: int | None, answered: bool,
    ) -> None:  # fmt: skip
        """Most calls end as they should. By chance alone few of fifty steps would see to that."""
        before = len(self.calls)
        self.ask(credits, pick, key, 100, repeat, body)
        if len(self.calls) > before:
            self.the_books_are_the_models()
            if spent is None:
                self.void(0)
            else:
                self.capture(0, spent, answered)

    @precondition(lambda self: self.calls)
    @rule(pick=picks)
    def void(self, pick: int) -> None:
        call = self.calls[-1 - pick % len(self.calls)]
        got = self.db.write(lambda tx: settlement.void(tx, call.id, DONE))
        assert (got is not None) == (call.status == "held")
        if got is None:
            return
        call.status = "voided"
        self.settle(call, got)
        if call.idempotency is not None:
            del self.answers[call.account, call.idempotency]

    def settle(self, call: ModelCall, got: Resolved) -> None:
        assert (got.captured, got.released) == (call.captured, call.held - call.captured)
        assert got.standing == (self.accounts[call.account].balance, self.held(call.account))
        if call.window is not None:
            self.windows[call.window] -= call.held - call.captured

    @precondition(lambda self: self.calls)
    @rule(pick=picks)
    def refund(self, pick: int) -> None:
        call = self.calls[-1 - pick % len(self.calls)]
        try:
            credits, _ = self.db.write(lambda tx: ledger.refund(tx, call.id, None, self.now))
            answer = "refunded"
        except errors.Refusal as refusal:
            answer = refusal.code
        if not call.captured or call.refunded:
            assert answer == "conflict"
        elif self.accounts[call.account].balance + call.captured > MOST:
            assert answer == "validation_error"
        else:
            assert (answer, credits) == ("refunded", call.captured)
            call.refunded = True
            self.references.add(("refund", call.id))
            self.accounts[call.account].enter("refund", call.captured, call.id)

    @rule(pick=picks, active=st.booleans())
    def suspend_or_resume(self, pick: int, active: bool) -> None:
        account = self.some(pick)
        status = "active" if active else "suspended"
        self.db.write(
            lambda tx: tx.run(
                "UPDATE account SET status = :status WHERE id = :id",
                {"status": status, "id": account},
            )
        )
        self.accounts[account].active = active

    @rule(hours=st.sampled_from([1, 23, 25, -24]))
    def time_passes(self, hours: int) -> None:
        self.now += hours * 3_600_000

    # What must always hold.

    def read(self) -> tuple[Totals, list[str], list[Row], list[Row]]:
        """What verify finds, the accounts and the windows; not again while the file is the same,
        which SQLite tells of every commit of other connections."""
        with self.db.snapshot() as tx:
            version = tx.rows("PRAGMA data_version")
            if self.seen is None or self.seen[0] != version:
                self.seen = (
                    version,
                    (
                        *ledger.verify(tx),
                        tx.rows(
                            "SELECT id, balance, held, open_calls, last_entry FROM account"
                            " WHERE id <> 'acct_operator'"
                        ),
                        tx.rows("SELECT subject, starts_at, used FROM credit_window"),
                    ),
                )
        return self.seen[1]

    @invariant()
    def the_books_are_the_models(self) -> None:
        totals, faults, rows, windows = self.read()
        assert faults == []
        assert {row[0]: row[1:] for row in rows} == {
            name: (
                model.balance, self.held(name), len(self.in_flight(name)), len(model.entries),
            )
            for name, model in self.accounts.items()
        }  # fmt: skip
        counted = {window: used for window, used in self.windows.items() if used}
        assert {(row[0], row[1]): row[2] for row in windows if row[2]} == counted
        assert totals.balance == sum(model.balance for model in self.accounts.values())
        assert totals.held == sum(call.held for call in self.calls if call.status == "held")

    def teardown(self) -> None:
        try:
            for account, model in self.accounts.items():
                entries = self.db.rows(
                    "SELECT kind, amount, balance, reference FROM entry WHERE account_id = :id"
                    " ORDER BY number",
                    {"id": account},
                )
                assert entries == model.entries
            calls = self.db.rows("SELECT id, status, held, captured FROM call ORDER BY id")
            assert calls == [(c.id, c.status, c.held, c.captured) for c in self.calls]
            answers = self.db.rows("SELECT account_id, key, state, call_id FROM idempotency")
            assert {(a, k): (state, call) for a, k, state, call in answers} == {
                name: (known.state, known.call) for name, known in self.answers.items()
            }
        finally:
            self.db.close()
            self.path.unlink()


def test_the_ledger_agrees_with_a_plain_model_of_it(tmp_path: Path) -> None:
    template = Books(tmp_path / "template.db")
    template.db.close()
    # A copy through SQLite itself: one file, without a log beside it.
    source = apsw.Connection(str(tmp_path / "template.db"))
    models.copy_database(source, tmp_path / "fresh.db")
    source.close()

    class Machine(LedgerMachine):
        folder = tmp_path
        template = tmp_path / "fresh.db"

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Two operations at once: every place where one can be interrupted by the other


class Paused:
    """A transaction that stops before its n-th statement until it is told to go on."""

    def __init__(self, tx: Tx, at: int, reached: threading.Event, go_on: threading.Event) -> None:
        self._tx = tx
        self._left = at
        self._reached = reached
        self._go_on = go_on
        self.stopped = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._tx, name)

        def call(*args: Any) -> Any:
            self._left -= 1
            if self._left < 0 and not self.stopped:
                self.stopped = True
                self._reached.set()
                assert self._go_on.wait(30)
            return method(*args)

        return call


Operation = Callable[[Tx], object]


def outcome(db: Database, operation: Operation) -> object:
    """What an operation answered; a refusal as its code."""
    try:
        result = db.write(operation)
    except errors.Refusal as refusal:
        return refusal.code
    return result


def race_at(
    first_db: Database, second_db: Database, first: Operation, second: Operation, at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[bool, list[object]]:  # fmt: skip
    """Stop `first` before its statement `at`, let `second` run as far as it can, then both finish.

    False when `first` has no such statement. The two databases stand for two processes; `second`
    is known to have asked for its turn when it locks the writers' file.
    """
    reached, go_on, asked = threading.Event(), threading.Event(), threading.Event()
    answers: list[object] = [None, None]
    stops: list[Paused] = []

    def run_first() -> None:
        def paused(tx: Tx) -> object:
            stops.append(Paused(tx, at, reached, go_on))
            return first(stops[-1])  # type: ignore[arg-type]  # it stands in for a Tx

        answers[0] = outcome(first_db, paused)
        reached.set()

    real = fcntl.flock

    def flock(handle: int, operation: int) -> None:
        if threading.current_thread() is second_thread:
            asked.set()
        real(handle, operation)

    def run_second() -> None:
        answers[1] = outcome(second_db, second)
        asked.set()

    first_thread = threading.Thread(target=run_first)
    second_thread = threading.Thread(target=run_second)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        first_thread.start()
        assert reached.wait(30)
        second_thread.start()
        assert asked.wait(30)
        go_on.set()
        first_thread.join(30)
        second_thread.join(30)
    assert not first_thread.is_alive() and not second_thread.is_alive()
    return stops[0].stopped, answers


def in_one_batch(db: Database, operations: list[Operation]) -> list[object]:
    """Run operations of one process that wait together, in that order, and share a commit."""
    entered, go_on = threading.Event(), threading.Event()

    def occupy(tx: Tx) -> None:
        entered.set()
        assert go_on.wait(30)

    answers: list[object] = [None] * len(operations)
    threads = [threading.Thread(target=db.write, args=(occupy,))]
    threads[0].start()
    assert entered.wait(30)
    for number, operation in enumerate(operations):

        def run(number: int = number, operation: Operation = operation) -> None:
            answers[number] = outcome(db, operation)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        while len(db._queue) <= number:  # there is no other way to see who waits
            threading.Event().wait(0.0005)
    go_on.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return answers


@dataclass
class Duel:
    """Two operations on one fresh account, and what must be true however they met."""

    first: Operation
    second: Operation
    after: Callable[[list[object]], None]


def holding(account: str, credits: int, **changes: Any) -> Operation:
    call = new_call(account, credits, **changes)
    return lambda tx: ledger.hold(tx, call, ALWAYS, 10**6) is not None


def admitting(account: str, credits: int, body: bytes = b"{}", **changes: Any) -> Operation:
    call = new_call(account, credits, **changes)
    limit = CreditLimit(call.key_id, 1, "day") if call.key_id else None
    who = Principal("api_key", account, None, account, None, ALWAYS, limit=limit)
    inbound = Inbound("POST", "/api/v1/x", "", {}, body, call.id)

    def work(tx: Tx) -> str:
        got = admission.admit(tx, who, call, wanted(call), inbound, 100)
        return got.refusal.code if got.refusal else "held" if got.held else "stored"

    return work


def capturing(call_id: str, credits: int) -> Operation:
    return lambda tx: settlement.capture(tx, call_id, credits, DONE, None, NOW)


def voiding(call_id: str) -> Operation:
    return lambda tx: settlement.void(tx, call_id, DONE)


def adding(account: str, kind: str, credits: int, reference: str) -> Operation:
    return lambda tx: ledger.add_credits(tx, account, kind, credits, reference, None, NOW)


def refunding(call_id: str) -> Operation:
    return lambda tx: ledger.refund(tx, call_id, None, NOW)


def two_holds_of_the_last_credits(books: Books) -> Duel:
    account = books.account(7)

    def after(answers: list[object]) -> None:
        assert sorted(map(bool, answers)) == [False, True]
        assert books.standing(account) == (7, 5)

    return Duel(holding(account, 5), holding(account, 5), after)


def a_hold_and_a_withdrawal_of_the_last_credits(books: Books) -> Duel:
    account = books.account(7)

    def after(answers: list[object]) -> None:
        held, withdrawn = answers
        assert held in (True, False)
        assert withdrawn == ("insufficient_credits" if held else Standing(2, 0))
        assert books.standing(account) == ((7, 5) if held else (2, 0))

    return Duel(holding(account, 5), adding(account, "adjustment", -5, f"{account}-out"), after)


def a_capture_and_a_void(books: Books) -> Duel:
    account = books.account(9)
    call_id = books.hold(account, 5) or ""

    def after(answers: list[object]) -> None:
        winners = [answer for answer in answers if isinstance(answer, Resolved)]
        assert len(winners) == 1
        assert books.standing(account) == (9 - winners[0].captured, 0)

    return Duel(capturing(call_id, 4), voiding(call_id), after)


def two_captures_of_one_call(books: Books) -> Duel:
    account = books.account(9)
    call_id = books.hold(account, 5) or ""

    def after(answers: list[object]) -> None:
        winners = [answer for answer in answers if isinstance(answer, Resolved)]
        assert len(winners) == 1
        assert books.standing(account) == (9 - winners[0].captured, 0)
        assert winners[0].captured in (2, 5)

    return Duel(capturing(call_id, 2), capturing(call_id, 5), after)


def two_voids_of_one_call(books: Books) -> Duel:
    account = books.account(9)
    call_id = books.hold(account, 5) or ""

    def after(answers: list[object]) -> None:
        assert sum(isinstance(answer, Resolved) for answer in answers) == 1
        assert books.standing(account) == (9, 0)

    return Duel(voiding(call_id), voiding(call_id), after)


def two_refunds_of_one_call(books: Books) -> Duel:
    account = books.account(9)
    call_id = books.captured_call(account, 5)

    def after(answers: list[object]) -> None:
        assert (5, Standing(9, 0)) in answers and "conflict" in answers
        assert books.standing(account) == (9, 0)

    return Duel(refunding(call_id), refunding(call_id), after)


def a_refund_and_a_grant_that_would_pass_the_largest_balance(books: Books) -> Duel:
    account = books.account(MOST)
    call_id = books.captured_call(account, 5)

    def after(answers: list[object]) -> None:
        assert answers.count("validation_error") == 1
        assert books.standing(account) == (MOST, 0)

    return Duel(refunding(call_id), adding(account, "grant", 5, f"{account}-in"), after)


def one_grant_sent_twice(books: Books) -> Duel:
    account = books.account(1)

    def after(answers: list[object]) -> None:
        assert Standing(11, 0) in answers and None in answers
        assert books.standing(account) == (11, 0)

    again = f"{account}-again"
    return Duel(adding(account, "grant", 10, again), adding(account, "grant", 10, again), after)


def two_calls_with_one_idempotency_key(books: Books) -> Duel:
    account = books.account(9)

    def after(answers: list[object]) -> None:
        assert sorted(map(str, answers)) == ["held", "idempotency_in_progress"]
        assert books.standing(account) == (9, 4)

    key: dict[str, Any] = {"idempotency_key": "once"}
    return Duel(admitting(account, 4, **key), admitting(account, 4, **key), after)


def two_requests_with_one_idempotency_key(books: Books) -> Duel:
    account = books.account(9)

    def after(answers: list[object]) -> None:
        assert sorted(map(str, answers)) == ["held", "idempotency_key_reused"]
        assert books.standing(account) == (9, 4)

    key: dict[str, Any] = {"idempotency_key": "once"}
    return Duel(admitting(account, 4, b"1", **key), admitting(account, 4, b"2", **key), after)


def two_calls_on_the_last_credit_of_a_limit(books: Books) -> Duel:
    account = books.account(9)

    def after(answers: list[object]) -> None:
        assert sorted(map(str, answers)) == ["credit_limit_reached", "held"]
        assert books.standing(account) == (9, 1)
        used = books.db.row("SELECT used FROM credit_window WHERE subject = :s", {"s": subject})
        assert used == (1,)

    subject = f"key-of-{account}"
    return Duel(admitting(account, 1, key_id=subject), admitting(account, 1, key_id=subject), after)


def a_release_and_a_spending_of_one_limit(books: Books) -> Duel:
    account = books.account(9)
    subject = f"key-of-{account}"
    start = clock.period_start_ms("day", NOW)
    assert outcome(books.db, admitting(account, 1, key_id=subject)) == "held"
    rows = books.db.rows("SELECT id FROM call WHERE account_id = :a", {"a": account})

    def after(answers: list[object]) -> None:
        used = books.db.row(
            "SELECT used FROM credit_window WHERE subject = :s AND starts_at = :t",
            {"s": subject, "t": start},
        )
        spent = answers[1] == "held"
        assert answers[1] in ("held", "credit_limit_reached")
        assert used == (int(spent),)
        assert books.standing(account) == (9, int(spent))

    return Duel(voiding(rows[0][0]), admitting(account, 1, key_id=subject), after)


DUELS = [
    two_holds_of_the_last_credits,
    a_hold_and_a_withdrawal_of_the_last_credits,
    a_capture_and_a_void,
    two_captures_of_one_call,
    two_voids_of_one_call,
    two_refunds_of_one_call,
    a_refund_and_a_grant_that_would_pass_the_largest_balance,
    one_grant_sent_twice,
    two_calls_with_one_idempotency_key,
    two_requests_with_one_idempotency_key,
    two_calls_on_the_last_credit_of_a_limit,
    a_release_and_a_spending_of_one_limit,
]
duels = pytest.mark.parametrize("duel", DUELS, ids=lambda duel: duel.__name__)


@duels
def test_two_processes_agree_wherever_one_is_interrupted(
    duel: Callable[[Books], Duel], books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Database(books.db.path)
    places = 0
    for swapped in (False, True):
        for at in itertools.count():
            made = duel(books)
            pair = (made.second, made.first) if swapped else (made.first, made.second)
            paused, answers = race_at(books.db, other, *pair, at, monkeypatch)
            made.after(answers[::-1] if swapped else answers)
            assert books.faults() == []
            places += paused
            if not paused:
                break
    assert places >= 4, "the operations were not interrupted anywhere"
    other.close()


@duels
def test_two_threads_agree_when_they_share_a_commit(
    duel: Callable[[Books], Duel], books: Books
) -> None:
    made = duel(books)
    made.after(in_one_batch(books.db, [made.first, made.second]))
    made = duel(books)
    made.after(in_one_batch(books.db, [made.second, made.first])[::-1])


def test_every_order_of_two_whole_calls_sells_the_last_credits_once(books: Books) -> None:
    """Hold, then an ending, then a refund, each step of one call before each of the other."""
    for endings in itertools.product(("capture", "void"), repeat=2):
        for order in sorted(set(itertools.permutations([0, 0, 0, 1, 1, 1]))):
            account = books.account(5)
            calls: list[str | None] = [None, None]
            steps = [0, 0]
            balance, promised = 5, 0
            for who in order:
                call_id = calls[who]
                if steps[who] == 0:
                    calls[who] = books.hold(account, 4)
                    assert (calls[who] is not None) == (balance - promised >= 4)
                    promised += 4 if calls[who] else 0
                elif call_id and steps[who] == 1:
                    capture = endings[who] == "capture"
                    assert books.capture(call_id, 4) if capture else books.void(call_id)
                    promised -= 4
                    balance -= 4 if capture else 0
                elif call_id and endings[who] == "capture":
                    assert books.refund(call_id)[0] == 4
                    balance += 4
                steps[who] += 1
                assert books.standing(account) == (balance, promised)


# Rules one by one


def test_the_last_credit_is_sold_once(books: Books) -> None:
    account = books.account(1)
    assert books.hold(account, 1)
    assert books.hold(account, 1) is None
    assert books.standing(account).available == 0


def test_a_hold_needs_what_it_would_cost_and_says_so(books: Books) -> None:
    account = books.account(3)
    call = new_call(account, 4)

    def work(tx: Tx) -> errors.Refusal | None:
        assert ledger.hold(tx, call, ALWAYS, 10) is None
        return ledger.why_not_held(tx, account, 4, 10)

    refusal = books.db.write(work)
    assert refusal is not None and refusal.code == "insufficient_credits"
    assert refusal.fields == {"credits": 3, "required": 4}
    assert books.db.rows("SELECT * FROM call") == []


def test_a_free_call_is_recorded_and_moves_nothing(books: Books) -> None:
    account = books.account(0)
    call_id = books.hold(account, 0)
    assert call_id
    assert books.capture(call_id, 0) is not None
    assert books.db.rows("SELECT * FROM entry") == []
    refused("conflict", lambda: books.refund(call_id))


@pytest.mark.parametrize(("credits", "captured"), [(0, 0), (3, 3), (5, 5), (6, 5), (MOST, 5)])
def test_a_capture_never_passes_its_hold(books: Books, credits: int, captured: int) -> None:
    account = books.account(9)
    call_id = books.hold(account, 5) or ""
    resolved = books.capture(call_id, credits)
    assert resolved is not None
    assert (resolved.captured, resolved.released) == (captured, 5 - captured)
    assert books.standing(account) == (9 - captured, 0)


def test_a_capture_of_less_than_nothing_is_impossible(books: Books) -> None:
    call_id = books.hold(books.account(9), 5) or ""
    with pytest.raises(apsw.ConstraintError):
        books.capture(call_id, -1)
    assert books.void(call_id) is not None


def test_a_suspended_account_gets_no_hold_but_its_calls_still_end(books: Books) -> None:
    account = books.account(9)
    call_id = books.hold(account, 5) or ""
    suspend = "UPDATE account SET status = 'suspended', status_reason = 'unpaid' WHERE id = :id"
    books.db.write(lambda tx: tx.run(suspend, {"id": account}))
    assert books.hold(account, 1) is None
    why = books.db.write(lambda tx: ledger.why_not_held(tx, account, 1, 10))
    assert why is not None and why.code == "account_suspended"
    assert books.capture(call_id, 5) is not None


def test_a_revoked_key_sets_nothing_aside(books: Books) -> None:
    account = books.account(9)
    secret = keys.NewSecret("fare")
    terms = keys.Terms("k")
    key_id = books.db.write(lambda tx: keys.add(tx, account, None, terms, secret, NOW, SYSTEM))
    with books.db.reading() as tx:
        key = keys.get(tx, key_id)
    guard = keys.still_valid(key, key.hash, NOW)
    assert books.db.write(lambda tx: ledger.hold(tx, new_call(account, 1), guard, 10))
    books.db.write(lambda tx: keys.revoke(tx, key_id, NOW, SYSTEM))
    assert books.db.write(lambda tx: ledger.hold(tx, new_call(account, 1), guard, 10)) is None
    assert books.standing(account) == (9, 1)


def test_a_replayed_reference_moves_nothing(books: Books) -> None:
    account = books.account(5)
    assert books.add(account, "grant", 10, "invoice 7") == (15, 0)
    assert books.add(account, "grant", 10, "invoice 7") is None
    assert books.add(account, "grant", 99, "invoice 7") is None
    assert books.add(books.account(0), "grant", 10, "invoice 7") is None
    assert books.standing(account) == (15, 0)
    # Another kind of movement has references of its own.
    assert books.add(account, "adjustment", 10, "invoice 7") == (25, 0)


def test_a_refund_is_given_once_and_of_what_was_captured(books: Books) -> None:
    account = books.account(9)
    call_id = books.hold(account, 5) or ""
    refused("conflict", lambda: books.refund(call_id))
    books.capture(call_id, 3)
    assert books.refund(call_id) == (3, (9, 0))
    refused("conflict", lambda: books.refund(call_id))
    voided = books.hold(account, 5) or ""
    books.void(voided)
    refused("conflict", lambda: books.refund(voided))
    refused("not_found", lambda: books.refund("req_unknown"))
    assert books.standing(account) == (9, 0)


def test_credits_are_conserved(books: Books) -> None:
    accounts = [books.account(100) for _ in range(3)]
    for number, account in enumerate(accounts):
        for credits in (3, 5, 7):
            call_id = books.hold(account, credits) or ""
            if credits == 5:
                books.void(call_id)
            else:
                books.capture(call_id, 4)
        books.add(account, "adjustment", -number - 1)
        books.refund(books.captured_call(account, 11))
    balances = sum(books.standing(account).balance for account in accounts)
    assert balances == books.moved() == 300 - 3 * (3 + 4) - (1 + 2 + 3)


@pytest.mark.parametrize("credits", [0, MOST + 1, -MOST - 1, 2**63])
def test_an_amount_is_a_number_from_1_to_10_to_the_15th(books: Books, credits: int) -> None:
    account = books.account(5)
    refused("validation_error", lambda: books.add(account, "grant", credits))
    assert books.standing(account) == (5, 0)


def test_a_balance_ends_at_10_to_the_15th(books: Books) -> None:
    account = books.account(MOST - 1)
    assert books.add(account, "grant", 1) == (MOST, 0)
    refused("validation_error", lambda: books.add(account, "grant", 1))
    call_id = books.hold(account, MOST)
    assert call_id
    assert books.standing(account) == (MOST, MOST)
    assert books.capture(call_id, MOST) is not None
    assert books.refund(call_id) == (MOST, (MOST, 0))
    assert books.add(account, "adjustment", -MOST) == (0, 0)


def test_credits_of_an_unknown_account_do_not_move(books: Books) -> None:
    refused("not_found", lambda: books.add("acct_nobody", "grant", 5))
    refused("not_found", lambda: books.add("acct_nobody", "adjustment", -5))
    assert books.hold("acct_nobody", 0) is None


def test_what_is_held_cannot_be_withdrawn(books: Books) -> None:
    account = books.account(10)
    books.hold(account, 7)
    refusal = refused("insufficient_credits", lambda: books.add(account, "adjustment", -4))
    assert refusal.fields == {"credits": 3, "required": 4}
    assert books.add(account, "adjustment", -3) == (7, 7)


def test_entries_are_numbered_by_account_and_not_by_the_clock(books: Books) -> None:
    account = books.account(5)
    for number, at in enumerate((NOW, NOW - clock.DAY_MS, NOW + clock.DAY_MS)):
        books.db.write(
            lambda tx, number=number, at=at: ledger.add_credits(
                tx, account, "adjustment", number + 1, f"{account}-{number}", None, at
            )
        )
    found = ledger.entries(books.db, account, None, None, 10)
    assert [(number, entry["amount"]) for number, entry in found] == [
        (4, 3),
        (3, 2),
        (2, 1),
        (1, 5),
    ]
    assert [entry["balance"] for _, entry in found] == [11, 8, 6, 5]


# The law in the schema


def raw(books: Books) -> apsw.Connection:
    """The file as someone with a SQLite shell has it."""
    connection = apsw.Connection(str(books.db.path))
    connection.set_busy_timeout(5000)
    return connection


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET amount = 6, balance = 6",
        "UPDATE entry SET note = 'a remark'",
        "DELETE FROM entry",
        "INSERT OR REPLACE INTO entry SELECT id, account_id, number, kind, 9, 9, reference, note,"
        " key_id, created_at FROM entry",
        "UPDATE account SET balance = -1",
        f"UPDATE account SET balance = {MOST + 1}",
        "UPDATE account SET held = balance + 1",
        "UPDATE account SET held = -1",
        "UPDATE account SET open_calls = -1",
        "UPDATE account SET status = 'rich'",
        "UPDATE call SET captured = held + 1",
        "UPDATE call SET captured = -1",
        "UPDATE call SET status = 'free'",
        "INSERT INTO entry SELECT 'ent_2', account_id, 2, kind, 0, 5, 'r', note, key_id, 0"
        " FROM entry",
        "INSERT INTO entry SELECT 'ent_2', account_id, 2, 'gift', 1, 6, 'r', note, key_id, 0"
        " FROM entry",
        "INSERT INTO entry SELECT 'ent_2', account_id, 1, kind, 1, 6, 'r', note, key_id, 0"
        " FROM entry",
        "INSERT INTO entry SELECT 'ent_2', account_id, 2, kind, 1, 6, reference, note, key_id, 0"
        " FROM entry",
    ],
)
def test_the_schema_refuses_what_the_rules_never_do(books: Books, statement: str) -> None:
    account = books.account(5)
    books.hold(account, 1)
    connection = raw(books)
    with pytest.raises(apsw.ConstraintError):
        connection.execute(statement)
    connection.close()
    assert books.standing(account) == (5, 1)
    assert books.moved() == 5


NO_TRIGGERS = "DROP TRIGGER entry_is_never_edited; DROP TRIGGER entry_is_never_deleted;"
# An account of 100 granted and 20 granted, with a captured (30), a refunded (7), a voided and an
# open call (5).
TAMPERINGS = {
    "a balance": "UPDATE account SET balance = balance + 1 WHERE id = :account",
    "what is held": "UPDATE account SET held = held + 1 WHERE id = :account",
    "the count of open calls": "UPDATE account SET open_calls = 2 WHERE id = :account",
    "an entry's amount": "UPDATE entry SET amount = amount + 1 WHERE kind = 'grant'",
    "an entry's balance": "UPDATE entry SET balance = balance + 1 WHERE kind = 'grant'",
    "a deleted entry": "DELETE FROM entry WHERE kind = 'grant' AND number = 1",
    "the newest entry deleted and the balance with it": (
        "UPDATE account SET balance = balance - (SELECT amount FROM entry WHERE number = 5)"
        " WHERE id = :account; DELETE FROM entry WHERE number = 5 AND account_id = :account"
    ),
    "an entry moved to another account": (
        "UPDATE entry SET account_id = :other, number = 1, balance = amount WHERE number = 5"
    ),
    "an entry and its credits moved to another account": (
        "UPDATE account SET balance = balance - 20 WHERE id = :account;"
        "UPDATE account SET balance = balance + 20 WHERE id = :other;"
        "UPDATE entry SET account_id = :other, number = 1, balance = amount WHERE number = 5"
    ),
    "what a call captured": "UPDATE call SET captured = captured - 1 WHERE id = :captured",
    "a captured call called voided": "UPDATE call SET status = 'voided' WHERE id = :captured",
    "a captured call called held": "UPDATE call SET status = 'held' WHERE id = :captured",
    "an open call called voided": "UPDATE call SET status = 'voided' WHERE id = :open",
    "an open call called captured": "UPDATE call SET status = 'captured' WHERE id = :open",
    "a voided call called captured": (
        "UPDATE call SET status = 'captured', captured = held WHERE id = :voided"
    ),
    "what an open call holds": "UPDATE call SET held = held - 1 WHERE id = :open",
    "an open call deleted": "DELETE FROM call WHERE id = :open",
    "a captured call deleted": "DELETE FROM call WHERE id = :captured",
    "an open call moved to another account": (
        "UPDATE call SET account_id = :other, number = 1 WHERE id = :open"
    ),
    "a captured call moved to another account": (
        "UPDATE call SET account_id = :other, number = 1 WHERE id = :captured"
    ),
    "a charge for a call that never was": (
        "INSERT INTO entry SELECT 'ent_false', id, 6, 'capture', -1, balance - 1, 'req_false',"
        " NULL, NULL, 0 FROM account WHERE id = :account;"
        "UPDATE account SET balance = balance - 1, last_entry = 6 WHERE id = :account"
    ),
    "a refund of a call that was never charged": (
        "INSERT INTO entry SELECT 'ent_false', id, 6, 'refund', 5, balance + 5, :voided, NULL,"
        " NULL, 0 FROM account WHERE id = :account;"
        "UPDATE account SET balance = balance + 5, last_entry = 6 WHERE id = :account"
    ),
    "a refund of more than was charged": (
        "INSERT INTO entry SELECT 'ent_false', id, 6, 'refund', 31, balance + 31, :captured, NULL,"
        " NULL, 0 FROM account WHERE id = :account;"
        "UPDATE account SET balance = balance + 31, last_entry = 6 WHERE id = :account"
    ),
    "an account deleted": "DELETE FROM account WHERE id = :account",
}


def tamper(books: Books, what: str) -> None:
    account, other = books.account(100), books.account()
    captured = books.captured_call(account, 30)
    refunded = books.captured_call(account, 7)
    books.refund(refunded)
    books.add(account, "grant", 20)
    voided = books.hold(account, 5) or ""
    books.void(voided)
    names = {
        "account": account, "other": other, "captured": captured, "voided": voided,
        "open": books.hold(account, 5),
    }  # fmt: skip
    assert books.faults() == []
    connection = raw(books)
    connection.execute(NO_TRIGGERS)
    for statement in TAMPERINGS[what].split(";"):
        used = {name: value for name, value in names.items() if f":{name}" in statement}
        connection.execute(statement, used)
        assert connection.changes(), "this tampering changes nothing"
    connection.close()


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Books]:
    """Books that a test is about to spoil."""
    made = Books(tmp_path / "farebox.db")
    yield made
    made.close()


@pytest.mark.parametrize("what", TAMPERINGS)
def test_verify_finds_what_was_changed_behind_its_back(victim: Books, what: str) -> None:
    tamper(victim, what)
    assert victim.faults() != []


def test_verify_names_the_account_and_both_numbers(victim: Books) -> None:
    account = victim.account(100)
    raw(victim).execute("UPDATE account SET balance = 101 WHERE id = ?", (account,))
    assert victim.faults() == [f"{account}: balance 101 but its entries add up to 100"]


def test_the_command_says_ok_or_what_is_wrong_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.setswitchinterval", lambda seconds: None)
    (tmp_path / config.FILE_NAME).write_text("")
    environ = {"FAREBOX_INSTANCE": str(tmp_path), "FAREBOX_SECRET_KEY": "s" * 40}
    runner = create_app(config.load(environ)).test_cli_runner()
    books = Books(tmp_path / "farebox.db")
    account = books.account(100)
    books.hold(account, 4)
    sound = runner.invoke(args=["ledger", "verify"])
    assert sound.exit_code == 0
    assert sound.output == "ok: 2 accounts, 1 entries, 1 calls, balance 100, held 4\n"

    raw(books).execute("UPDATE account SET held = 5 WHERE id = ?", (account,))
    spoiled = runner.invoke(args=["ledger", "verify"])
    assert spoiled.exit_code == 1
    assert f"{account}: 5 held in 1 calls but its open calls hold 4 in 1" in spoiled.stderr
    books.close()


# What the ledger leaves to others, and must not break


def test_an_answer_is_kept_with_the_charge_and_only_then(books: Books) -> None:
    account = books.account(9)
    assert outcome(books.db, admitting(account, 4, idempotency_key="k")) == "held"
    call_id = books.db.rows("SELECT id FROM call")[0][0]
    kept = Stored(201, [("A", "b")], b"body")
    books.db.write(lambda tx: settlement.capture(tx, call_id, 4, DONE, kept, NOW))
    row = books.db.row("SELECT state, status, headers, body FROM idempotency")
    assert row is not None
    assert (row[0], row[1], json.loads(row[2]), row[3]) == ("stored", 201, [["A", "b"]], b"body")

    assert outcome(books.db, admitting(account, 4, idempotency_key="other")) == "held"
    other = books.db.rows("SELECT id FROM call WHERE status = 'held'")[0][0]
    books.db.write(lambda tx: settlement.void(tx, other, DONE))
    assert books.db.rows("SELECT key FROM idempotency") == [("k",)]


def test_a_late_ending_does_not_touch_the_key_of_the_call_after_it(books: Books) -> None:
    """A voided call's key is used again; a second ending of the first call changes nothing."""
    account = books.account(9)
    assert outcome(books.db, admitting(account, 4, idempotency_key="k")) == "held"
    first = books.db.rows("SELECT id FROM call")[0][0]
    assert outcome(books.db, voiding(first))
    assert outcome(books.db, admitting(account, 4, idempotency_key="k")) == "held"
    assert outcome(books.db, voiding(first)) is None
    assert outcome(books.db, capturing(first, 4)) is None
    assert outcome(books.db, admitting(account, 4, idempotency_key="k")) == (
        "idempotency_in_progress"
    )
    with books.db.reading() as tx:
        print_ = idempotency.fingerprint("POST", "/api/v1/x", "", b"{}")
        found = idempotency.find(tx, account, "k", print_, NOW + 2 * clock.DAY_MS)
    assert isinstance(found, errors.Refusal)  # a call in flight keeps its key however long it takes


def test_a_limit_counts_holds_and_captures_and_gives_the_rest_back(books: Books) -> None:
    account = books.account(100)
    limit = CreditLimit("key_1", 10, "month")

    def spend(credits: int, at: int) -> int | errors.Refusal:
        return books.db.write(lambda tx: limits.spend_credits(tx, limit, credits, at))

    start = clock.period_start_ms("month", NOW)
    end = clock.period_end_ms("month", start)
    assert end is not None
    assert spend(11, NOW) != start and spend(7, NOW) == start and spend(3, NOW) == start
    refusal = spend(1, NOW)
    assert isinstance(refusal, errors.Refusal)
    assert refusal.fields == {"limit": 10, "period": "month", "resets_at": clock.rfc3339(end)}
    assert spend(10, end) == end  # the next month begins with nothing used
    books.db.write(lambda tx: limits.release_credits(tx, "key_1", start, 4))
    assert spend(4, NOW) == start
    assert isinstance(spend(1, NOW), errors.Refusal)
    assert books.standing(account) == (100, 0)


def test_no_priced_call_can_cost_more_than_a_balance_may_hold() -> None:
    """The dearest route the configuration takes, times the most units, is within the bounds."""
    section = config.RouteSection(
        path="/api/v1/x", methods=["POST"], upstream="u", credits=10**9, per="unit",
        units=config.UnitsSection(from_="json", max=10**6, pointer="/n"),
    )  # fmt: skip
    upstream = config.UpstreamSection(kind="sandbox")
    route = catalog.Route(
        section.path, frozenset(section.methods), "u", upstream, section.path, "forward", None,
        section.credits, section.per, section.units, "flat", None, 1,
    )  # fmt: skip
    assert route.price(route.most_units) <= ledger.LARGEST_AMOUNT
