"""Many at once: the last credit is sold once, a repeated call is made once, a revoked key is dead.

Sizes are small enough for every run; `FAREBOX_TORTURE=1` runs the long version.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import argon2
import pytest
from conftest import StartFarebox
from doubles import Upstream
from server import Answer, Farebox

from core import clock, errors, keys, ledger, tokens
from core.audit import SYSTEM
from models import Database, Tx

TORTURE = os.environ.get("FAREBOX_TORTURE") == "1"
REVOCATIONS = 10_000 if TORTURE else 200
ROUNDS = 500 if TORTURE else 20
STORMS = 50 if TORTURE else 5

T = TypeVar("T")


def config(upstream: Upstream) -> str:
    return f"""
[upstreams.double]
kind = "http"
base_url = "{upstream.url}"
timeout_seconds = 20

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST"]
upstream = "double"
upstream_path = "/*"
credits = 1

[limits]
requests_per_minute = 1000000
"""


@pytest.fixture(scope="module")
def box(start_farebox: StartFarebox, upstream_server: Upstream) -> Farebox:
    return start_farebox(config(upstream_server))


@pytest.fixture(scope="module")
def wide_box(start_farebox: StartFarebox, upstream_server: Upstream) -> Farebox:
    return start_farebox(config(upstream_server), workers=4)


class Backstage:
    """The instance's own rules, called beside the running server as the command line calls them.

    A `flask` command takes half a second to start, too long for hundreds of rounds.
    """

    def __init__(self, path: Path) -> None:
        self.db = Database(path)

    def account(self, credits: int = 0) -> str:
        return new_account(self.db, credits)

    def grant(self, account_id: str, credits: int) -> None:
        reference, now = tokens.new_id("grant"), clock.now_ms()
        self.db.write(
            lambda tx: ledger.add_credits(tx, account_id, "grant", credits, reference, None, now)
        )

    def key(self, account_id: str, terms: keys.Terms | None = None) -> tuple[str, str]:
        """A new key of the account: its id and the key itself."""
        secret = keys.NewSecret("fare")
        terms = terms or keys.Terms("race")
        now = clock.now_ms()
        key_id = self.db.write(
            lambda tx: keys.add(tx, account_id, None, terms, secret, now, SYSTEM)
        )
        return key_id, secret.token

    def revoke(self, key_id: str) -> None:
        self.db.write(lambda tx: keys.revoke(tx, key_id, clock.now_ms(), SYSTEM), durable=True)

    def standing(self, account_id: str) -> ledger.Standing:
        with self.db.reading() as tx:
            return ledger.standing(tx, account_id)


@pytest.fixture(autouse=True)
def keys_are_hashed_cheaply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of keys are made here, and verified by every worker: a hash says its own cost, so
    a cheap one takes the same way through the gateway in a fraction of the time."""
    cheap = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(keys, "HASHER", cheap)


@pytest.fixture(scope="module")
def backstage(box: Farebox) -> Iterator[Backstage]:
    stage = Backstage(box.instance / "farebox.db")
    yield stage
    stage.db.close()


def at_once(count: int, work: Callable[[int], T]) -> list[T]:
    """`work(0)` to `work(count - 1)`, each in a thread, all let go at the same moment."""
    results: dict[int, T] = {}
    failures: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            barrier.wait(30)
            results[index] = work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures[:3]
    assert len(results) == count, "a thread did not end"
    return [results[index] for index in range(count)]


# Spending


def storms(box: Farebox, stage: Backstage, upstream: Upstream) -> None:
    """200 calls at once on 57 credits, several times over, and all that must be true afterwards."""
    for number in range(STORMS):
        account = stage.account(credits=57)
        _, key = stage.key(account)
        marker = f"/ok/storm-{account}-{number}/"
        answers = at_once(200, partial(_storm_call, box, key, marker))
        assert Counter(answer.status for answer in answers) == {200: 57, 402: 143}
        for answer in answers:
            if answer.status == 402:
                assert answer.code == "insufficient_credits"
                assert answer.json()["required"] == 1
        assert len(upstream.hits(marker)) == 57, "a refused call sends nothing upstream"
        assert box.standing(key) == (0, 0)
        assert sum(call["captured"] for call in box.calls(key)) == 57
        box.books()
    assert box.flask("credits", "balance", account) == "0"
    box.ledger_ok()


def _storm_call(box: Farebox, key: str, marker: str, index: int) -> Answer:
    return box.post(f"/api/v1/up{marker}{index}", key)


def test_200_calls_on_57_credits_sell_each_credit_once(
    box: Farebox, backstage: Backstage, upstream: Upstream
) -> None:
    storms(box, backstage, upstream)


def test_200_calls_on_57_credits_sell_each_credit_once_with_4_workers(
    wide_box: Farebox, upstream: Upstream
) -> None:
    stage = Backstage(wide_box.instance / "farebox.db")
    storms(wide_box, stage, upstream)
    stage.db.close()


def test_the_last_credit_is_sold_once(
    box: Farebox, backstage: Backstage, upstream: Upstream
) -> None:
    account = backstage.account()
    tokens_of_account = [backstage.key(account)[1] for _ in range(2)]
    for number in range(ROUNDS):
        backstage.grant(account, 1)

        def call(index: int, path: str = f"/api/v1/up/ok/last-{number}/") -> Answer:
            return box.post(path, tokens_of_account[index % 2])

        answers = at_once(8, call)
        assert sorted(answer.status for answer in answers) == [200] + [402] * 7
        assert len(upstream.hits(f"/last-{number}/")) == 1
        assert backstage.standing(account) == (0, 0)
    box.books()


def test_a_keys_credit_limit_is_not_passed_by_many_at_once(
    box: Farebox, backstage: Backstage, upstream: Upstream
) -> None:
    account = backstage.account(credits=1000)
    _, key = backstage.key(account, keys.Terms("race", credit_limit=10, credit_period="total"))
    answers = at_once(50, lambda index: box.post(f"/api/v1/up/ok/limited/{index}", key))
    assert Counter((answer.status, answer.code) for answer in answers) == {
        (200, None): 10,
        (403, "credit_limit_reached"): 40,
    }
    assert len(upstream.hits("/limited/")) == 10
    assert backstage.standing(account) == (990, 0)
    box.books()


def test_a_keys_rate_is_not_passed_by_many_at_once(
    box: Farebox, backstage: Backstage, upstream: Upstream
) -> None:
    account = backstage.account(credits=1000)
    for _ in range(3):
        _, key = backstage.key(account, keys.Terms("race", rate_limit=10))
        minute = clock.now_ms() // clock.MINUTE_MS

        def call(index: int, key: str = key) -> Answer:
            return box.post("/api/v1/up/ok/rated", key)

        answers = at_once(50, call)
        # A storm that saw the minute change tells nothing: send another.
        if minute == clock.now_ms() // clock.MINUTE_MS:
            assert Counter((answer.status, answer.code) for answer in answers) == {
                (200, None): 10,
                (429, "rate_limited"): 40,
            }
            break
    else:
        pytest.fail("three storms in a row saw the minute change")
    box.books()


# Repeating


def test_50_calls_with_one_idempotency_key_are_one_call(
    box: Farebox, backstage: Backstage, upstream: Upstream
) -> None:
    account = backstage.account(credits=1000)
    _, key = backstage.key(account)
    for number in range(ROUNDS):
        # Slow enough that most of them come while the first still runs.
        path = f"/api/v1/up/slow/100?same={number}-"

        def call(index: int, path: str = path, number: int = number) -> Answer:
            return box.post(path, key, {"n": number}, Idempotency_Key=f"same-{number}")

        answers = at_once(50, call)
        served = [answer for answer in answers if answer.status == 200]
        refused = [answer for answer in answers if answer.status != 200]
        assert len(upstream.hits(f"same={number}-")) == 1
        assert backstage.standing(account) == (1000 - number - 1, 0)
        assert len({answer.body for answer in served}) == 1
        replayed = [answer.headers.get("Idempotent-Replayed") for answer in served]
        assert Counter(replayed) == Counter({None: 1, "true": len(served) - 1})
        for answer in refused:
            assert (answer.status, answer.code) == (409, "idempotency_in_progress")
            assert int(answer.headers["Retry-After"]) >= 1
            # An SDK must come back for the answer, so nothing may tell it not to.
            assert answer.headers.get("x-should-retry") != "false"
        again = call(0)
        assert (again.status, again.body) == (200, served[0].body)
        assert again.headers["Idempotent-Replayed"] == "true"
    assert backstage.standing(account) == (1000 - ROUNDS, 0)
    box.books()


def test_one_idempotency_key_never_serves_two_requests(
    box: Farebox, backstage: Backstage, upstream: Upstream
) -> None:
    account = backstage.account(credits=1000)
    _, key = backstage.key(account)
    for number in range(ROUNDS):

        def call(index: int, number: int = number) -> Answer:
            path = f"/api/v1/up/slow/20?other={number}-"
            return box.post(path, key, {"n": index}, Idempotency_Key=f"other-{number}")

        answers = at_once(8, call)
        assert Counter((answer.status, answer.code) for answer in answers) == {
            (200, None): 1,
            (422, "idempotency_key_reused"): 7,
        }
        assert len(upstream.hits(f"other={number}-")) == 1
    assert backstage.standing(account) == (1000 - ROUNDS, 0)
    box.books()


# Revoking


class Line:
    """One kept connection, and so one worker: gunicorn's threads keep a connection to the end."""

    def __init__(self, box: Farebox) -> None:
        self.box = box
        self.worker: int | None = None
        self.connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=30)

    def call(self, key: str) -> int:
        """One paid call; its status."""
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        if self.connection.sock is None:
            self.worker = None
        self.connection.request("POST", "/api/v1/up/ok/revoke", b"{}", headers)
        response = self.connection.getresponse()
        response.read()
        if self.worker is None and self.connection.sock is not None:
            self.worker = self.box.worker_of(self.connection.sock)
        return response.status


@contextlib.contextmanager
def lines_to_every_worker(box: Farebox, key: str, each: int) -> Iterator[list[Line]]:
    """Kept connections, `each` to every worker; as many in all where workers cannot be told."""
    lines: list[Line] = []
    try:
        yield _lines_to_every_worker(box, key, each, lines)
    finally:
        for line in lines:
            line.connection.close()


def _lines_to_every_worker(box: Farebox, key: str, each: int, made: list[Line]) -> list[Line]:
    chosen: dict[int | None, list[Line]] = {}
    spare: list[Line] = []
    wanted = box.workers()
    for _ in range(20):
        lines = [Line(box) for _ in range(16)]
        made += lines

        def call(index: int, lines: list[Line] = lines) -> int:
            return lines[index].call(key)

        # Connected all at once, or one idle worker would take them all.
        assert set(at_once(len(lines), call)) == {200}
        for line in lines:
            if line.worker in wanted:
                chosen.setdefault(line.worker, []).append(line)
            else:
                spare.append(line)
        if not wanted:
            return spare[: 2 * each]
        if all(len(chosen.get(worker, [])) >= each for worker in wanted):
            return [line for worker in wanted for line in chosen[worker][:each]]
    raise AssertionError(f"no connection to one of the workers {wanted}: {list(chosen)}")


@dataclass
class Hammer:
    """Calls with one key until it is refused, and remembers when each call began."""

    line: Line
    key: str
    served: int = 0
    last_start_served: float = 0.0
    refusal: int = 0
    _thread: threading.Thread = field(init=False)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.refusal:
            began = time.monotonic()
            status = self.line.call(self.key)
            if status == 200:
                self.last_start_served = began
                self.served += 1
            else:
                self.refusal = status

    def join(self) -> None:
        self._thread.join(30)
        assert self.refusal, "the key was never refused"


def test_a_revoked_key_is_refused_by_the_next_request_on_every_worker(
    box: Farebox, backstage: Backstage
) -> None:
    account = backstage.account(credits=10**9)
    _, lasting = backstage.key(account)
    with lines_to_every_worker(box, lasting, each=1) as lines:
        for number in range(REVOCATIONS):
            key_id, key = backstage.key(account)
            hammers = [Hammer(line, key) for line in lines]
            for hammer in hammers:
                hammer.start()
            # Half of the time every worker has verified the key, and remembers it, before it is
            # revoked; the other half is revoked while they are at it.
            deadline = time.monotonic() + 20
            while number % 2 and not all(hammer.served for hammer in hammers):
                assert time.monotonic() < deadline, hammers
                assert not any(hammer.refusal for hammer in hammers), hammers
                time.sleep(0.001)
            backstage.revoke(key_id)
            revoked_at = time.monotonic()
            for hammer in hammers:
                hammer.join()
                assert hammer.refusal == 401
                assert hammer.last_start_served < revoked_at, "served after it was revoked"
            assert {line.call(key) for line in lines} == {401}
    box.books()
    assert backstage.standing(account).held == 0


def test_the_command_line_revokes_suspends_and_resumes_at_once(
    box: Farebox, backstage: Backstage
) -> None:
    account = backstage.account(credits=1000)
    _, lasting = backstage.key(account)
    key_id, key = backstage.key(account)
    with lines_to_every_worker(box, lasting, each=1) as lines:
        assert {line.call(key) for line in lines} == {200}
        box.flask("keys", "suspend", key_id, "--reason", "under review")
        assert {line.call(key) for line in lines} == {403}
        box.flask("keys", "resume", key_id)
        assert {line.call(key) for line in lines} == {200}
        box.flask("keys", "revoke", key_id)
        assert {line.call(key) for line in lines} == {401}


# The ledger itself, without HTTP in between


@pytest.fixture
def two_processes(tmp_path: Path) -> Iterator[list[Database]]:
    """Two `Database` objects on one new file: apart, they queue as two processes do."""
    path = tmp_path / "farebox.db"
    databases = [Database(path), Database(path)]
    databases[0].migrate()
    yield databases
    with databases[0].snapshot() as tx:
        _, faults = ledger.verify(tx)
    assert not faults
    for database in databases:
        database.close()


def new_account(db: Database, credits: int) -> str:
    """An account with that many credits."""

    def open_it(tx: Tx) -> str:
        now = clock.now_ms()
        account_id = ledger.open_account(tx, now)
        if credits:
            ledger.add_credits(tx, account_id, "grant", credits, account_id, None, now)
        return account_id

    return db.write(open_it)


def hold(db: Database, account: str, credits: int) -> str | None:
    """Set credits aside; the call's id, or None when the account refused."""
    call_id = tokens.new_id("call")
    call = ledger.NewCall(
        id=call_id,
        request_id=call_id,
        account_id=account,
        payer="api_key",
        key_id=None,
        user_id=None,
        route="/api/v1/up/*",
        method="POST",
        units=1,
        price=credits,
        held=credits,
        incarnation="inc_of_a_test",
        created_at=clock.now_ms(),
    )
    unconditional = ledger.Guard("1 = 1", {})
    held = db.write(lambda tx: ledger.hold(tx, call, unconditional, 10**6))
    return call_id if held else None


ENDED = ledger.Outcome(upstream_status=200, duration_ms=1)


def capture(db: Database, call_id: str, credits: int) -> ledger.Resolved | None:
    """Charge a held call; None when it was resolved before."""
    now = clock.now_ms()
    return db.write(lambda tx: ledger.capture(tx, call_id, credits, ENDED, now), durable=True)


def test_capture_and_void_at_once_have_one_winner(two_processes: list[Database]) -> None:
    account = new_account(two_processes[0], credits=10**6)
    balance = 10**6
    for _ in range(ROUNDS * 10):
        call_id = hold(two_processes[0], account, 7)
        assert call_id

        def end(index: int, call_id: str = call_id) -> ledger.Resolved | None:
            db = two_processes[index % 2]
            if index < 2:
                return capture(db, call_id, 5)
            return db.write(lambda tx: ledger.void(tx, call_id, ENDED))

        winners = [resolved for resolved in at_once(4, end) if resolved is not None]
        assert len(winners) == 1
        balance -= winners[0].captured
        assert winners[0].captured in (0, 5)
        assert winners[0].captured + winners[0].released == 7
        assert winners[0].standing == (balance, 0)


def test_a_refund_asked_for_twice_at_once_is_given_once(two_processes: list[Database]) -> None:
    account = new_account(two_processes[0], credits=100)
    for _ in range(ROUNDS):
        call_id = hold(two_processes[0], account, 10)
        assert call_id
        capture(two_processes[0], call_id, 10)

        def refund(index: int, call_id: str = call_id) -> bool:
            try:
                two_processes[index % 2].write(
                    lambda tx: ledger.refund(tx, call_id, None, clock.now_ms())
                )
            except errors.Refusal as refusal:
                assert refusal.code == "conflict"
                return False
            return True

        assert sum(at_once(4, refund)) == 1
        with two_processes[0].reading() as tx:
            assert ledger.standing(tx, account) == (100, 0)


def test_holds_and_withdrawals_at_once_never_spend_a_credit_twice(
    two_processes: list[Database],
) -> None:
    for number in range(ROUNDS):
        account = new_account(two_processes[0], credits=10)

        def spend(index: int, account: str = account, number: int = number) -> bool:
            db = two_processes[index % 2]
            if index < 4:
                return hold(db, account, 4) is not None
            reference = f"withdrawal-{number}-{index}"
            try:
                db.write(
                    lambda tx: ledger.add_credits(
                        tx, account, "adjustment", -4, reference, None, clock.now_ms()
                    )
                )
            except errors.Refusal as refusal:
                assert refusal.code == "insufficient_credits"
                return False
            return True

        won = at_once(8, spend)
        assert sum(won) == 2, "10 credits cover two times 4"
        with two_processes[0].reading() as tx:
            standing = ledger.standing(tx, account)
        assert standing == (10 - 4 * sum(won[4:]), 4 * sum(won[:4]))
