"""What happens without anyone asking: orphans, late endings, expiries, pruning; and a wrong clock.

The clock of these tests is `core.clock`, set by hand; workers are real processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from inprocess import inbound
from test_ledger import ALWAYS, DONE, NOW, Books, new_call, refused

import config
from core import (
    access,
    clock,
    errors,
    idempotency,
    incarnation,
    keys,
    ledger,
    limits,
    links,
    settlement,
    upkeep,
)
from core.audit import COMMAND_LINE, SYSTEM
from core.idempotency import Stored
from core.instance import Instance
from core.ledger import Outcome
from core.settlement import Settlement
from models import Tx

ROOT = Path(__file__).resolve().parent.parent
HOUR_MS = 60 * clock.MINUTE_MS
DAY_MS = clock.DAY_MS


class Clock:
    """The wall clock, which may be set to anything; the monotonic one goes on as it does."""

    def __init__(self) -> None:
        self.now = NOW

    def step(self, milliseconds: int) -> None:
        self.now += milliseconds


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(clock, "now_ms", lambda: made.now)
    return made


def settings_of(folder: Path) -> config.Settings:
    folder.mkdir(exist_ok=True)
    (folder / config.FILE_NAME).write_text("")
    return config.load({"FAREBOX_INSTANCE": str(folder), "FAREBOX_SECRET_KEY": "s" * 40})


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    made = Instance(settings_of(tmp_path / "instance"))
    made.db.migrate()
    yield made
    with made.db.snapshot() as tx:
        assert ledger.verify(tx)[1] == []
    made.db.close()


@pytest.fixture
def books(instance: Instance) -> Books:
    """The instance's books, for the test's own movements."""
    made = Books.__new__(Books)
    made.db = instance.db
    return made


# Orphans

WORKER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    sys.path[:0] = [sys.argv[2]]
    from test_upkeep import settings_of
    from test_ledger import ALWAYS, new_call
    from core import ledger
    from core.instance import Instance
    instance = Instance(settings_of(Path(sys.argv[1])))
    for number in range(int(sys.argv[4])):
        name = instance.incarnation()
        call = new_call(sys.argv[3], 3, id=f"{name}-{number}", incarnation=name)
        assert instance.db.write(lambda tx: ledger.hold(tx, call, ALWAYS, 10**6))
    print("held", flush=True)
    sys.stdin.read()
    """
)


class Worker:
    """A process that holds credits and then waits, alive, for an answer that never comes."""

    def __init__(self, folder: Path, account: str, holds: int = 1) -> None:
        arguments = [str(folder), str(Path(__file__).parent), account, str(holds)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"held\n"

    def end(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.communicate(timeout=30)


@pytest.fixture
def hire(instance: Instance) -> Iterator[Callable[..., Worker]]:
    """Starts workers of this instance; those still alive end with the test."""
    workers: list[Worker] = []

    def start(account: str, holds: int = 1) -> Worker:
        workers.append(Worker(instance.settings.folder, account, holds))
        return workers[-1]

    yield start
    for worker in workers:
        if worker.process.poll() is None:
            worker.end(signal.SIGKILL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_holds_of_a_dead_worker_are_voided_at_once(
    instance: Instance, books: Books, hire: Callable[..., Worker], how: signal.Signals
) -> None:
    account = books.account(10)
    worker = hire(account)
    assert books.standing(account) == (10, 3)
    assert upkeep.void_orphans(instance) == 0
    worker.end(how)
    assert upkeep.void_orphans(instance) == 1
    assert books.standing(account) == (10, 0)
    assert instance.db.rows("SELECT status, captured FROM call") == [("voided", 0)]
    assert upkeep.void_orphans(instance) == 0


def test_the_holds_of_a_live_worker_stay_however_long_they_take(
    instance: Instance, books: Books, hire: Callable[..., Worker], wall: Clock
) -> None:
    account = books.account(10)
    living, dead = hire(account), hire(account)
    assert books.standing(account) == (10, 6)
    dead.end(signal.SIGKILL)
    wall.step(30 * DAY_MS)
    assert upkeep.void_orphans(instance) == 1
    upkeep.tidy(instance)
    assert books.standing(account) == (10, 3)
    living.end(signal.SIGKILL)
    assert upkeep.void_orphans(instance) == 1
    assert books.standing(account) == (10, 0)


def test_a_workers_own_holds_are_never_orphans(instance: Instance, books: Books) -> None:
    account = books.account(10)
    books.hold(account, 3, incarnation=instance.incarnation())
    assert upkeep.void_orphans(instance) == 0
    assert books.standing(account) == (10, 3)
    instance._incarnation.end()
    assert upkeep.void_orphans(instance) == 1


def test_more_orphans_than_one_round_takes_are_all_voided(
    instance: Instance, books: Books, hire: Callable[..., Worker]
) -> None:
    account = books.account(10_000)
    count = upkeep.ORPHANS_AT_ONCE * 2 + 1
    hire(account, count).end(signal.SIGKILL)
    assert books.standing(account) == (10_000, 3 * count)
    assert upkeep.void_orphans(instance) == count
    assert books.standing(account) == (10_000, 0)


def test_two_workers_that_void_the_same_orphans_do_no_harm(
    instance: Instance, books: Books, hire: Callable[..., Worker]
) -> None:
    account = books.account(10)
    hire(account).end(signal.SIGKILL)
    other = Instance(instance.settings)
    upkeep.void_orphans(other)
    upkeep.void_orphans(instance)
    assert books.standing(account) == (10, 0)
    other.db.close()


def test_an_orphan_gives_back_its_limit_and_frees_its_idempotency_key(
    instance: Instance, books: Books
) -> None:
    account = books.account(10)
    limit = limits.CreditLimit("key_1", 5, "day")
    window = clock.period_start_ms("day", NOW)
    assert instance.db.write(lambda tx: limits.spend_credits(tx, limit, 3, NOW)) == window
    call = new_call(
        account, 3, key_id="key_1", credit_window_at=window, idempotency_key="k",
        incarnation="inc_of_nobody",
    )  # fmt: skip

    def hold(tx: Tx) -> None:
        assert ledger.hold(tx, call, ALWAYS, 10)
        idempotency.claim(tx, account, "k", b"print", call.id, NOW)

    instance.db.write(hold)
    assert upkeep.void_orphans(instance) == 1
    assert instance.db.rows("SELECT used FROM credit_window") == [(0,)]
    assert instance.db.rows("SELECT * FROM idempotency") == []


# Late endings


class Trouble:
    """A database that refuses to commit while `on`, as when the disk is full."""

    def __init__(self, instance: Instance) -> None:
        self.on = False
        self._real = instance.db.write
        instance.db.write = self._write  # type: ignore[method-assign]

    def _write(self, work: Callable[[Tx], Any], durable: bool = False) -> Any:
        if self.on:
            raise errors.storage_unavailable()
        return self._real(work, durable)


@pytest.fixture
def trouble(instance: Instance) -> Trouble:
    return Trouble(instance)


def held_call(instance: Instance, books: Books, account: str) -> str:
    call_id = books.hold(account, 3, incarnation=instance.incarnation())
    assert call_id is not None
    return call_id


def test_a_charge_that_could_not_be_made_is_given_up_because_the_caller_was_told_so(
    instance: Instance, books: Books, trouble: Trouble
) -> None:
    account = books.account(10)
    ending = Settlement(instance, held_call(instance, books, account))
    trouble.on = True
    refused("storage_unavailable", lambda: ending.capture(3, DONE, None))
    upkeep_settles_nothing(instance)
    trouble.on = False
    assert books.standing(account) == (10, 3)
    upkeep.settle_late(instance)
    assert books.standing(account) == (10, 0)
    assert not instance.unsettled


def test_a_charge_for_a_delivered_answer_is_made_later(
    instance: Instance, books: Books, trouble: Trouble
) -> None:
    account = books.account(10)
    ending = Settlement(instance, held_call(instance, books, account))
    trouble.on = True
    ending.capture_sent(2, DONE, None)
    upkeep_settles_nothing(instance)
    trouble.on = False
    upkeep.settle_late(instance)
    assert books.standing(account) == (8, 0)
    upkeep.settle_late(instance)
    assert books.standing(account) == (8, 0)


def test_a_void_that_could_not_be_made_is_made_later(
    instance: Instance, books: Books, trouble: Trouble
) -> None:
    account = books.account(10)
    ending = Settlement(instance, held_call(instance, books, account))
    trouble.on = True
    assert ending.void(502) is None
    upkeep_settles_nothing(instance)
    trouble.on = False
    upkeep.settle_late(instance)
    assert books.standing(account) == (10, 0)
    assert instance.db.rows("SELECT status, upstream_status FROM call") == [("voided", 502)]


def upkeep_settles_nothing(instance: Instance) -> None:
    before = len(instance.unsettled)
    assert before > 0
    upkeep.settle_late(instance)  # the database is still in trouble
    assert len(instance.unsettled) == before


def test_endings_are_not_lost_when_one_of_them_cannot_be_made(
    instance: Instance, books: Books
) -> None:
    account = books.account(10)
    first, second = (held_call(instance, books, account) for _ in range(2))

    def impossible(tx: Tx) -> None:
        raise apsw.ConstraintError("a rule of the schema")

    instance.unsettled.append(impossible)
    instance.unsettled.append(lambda tx: settlement.void(tx, first, DONE))
    instance.unsettled.append(lambda tx: settlement.capture(tx, second, 3, DONE, None, NOW))
    for _ in range(3):  # as the upkeep thread does: log it, try again
        with contextlib.suppress(apsw.ConstraintError):
            upkeep.settle_late(instance)
    assert books.standing(account) == (7, 0)


def test_a_call_ends_once_whatever_is_asked_after(instance: Instance, books: Books) -> None:
    account = books.account(10)
    ending = Settlement(instance, held_call(instance, books, account))
    resolved = ending.capture(2, DONE, None)
    assert resolved is not None
    assert (resolved.captured, resolved.released, resolved.standing) == (2, 1, (8, 0))
    assert ending.void() is None
    assert ending.capture(3, DONE, None) is None
    ending.capture_sent(3, DONE, None)
    assert books.standing(account) == (8, 0)


# What expired stays expired


@pytest.fixture
def owner(instance: Instance, books: Books) -> tuple[str, str]:
    """An account and the token of a key that expires an hour from now."""
    account = books.account(10)
    return account, new_key(instance, account, expires_at=NOW + HOUR_MS)[1]


def new_key(instance: Instance, account: str, **terms: Any) -> tuple[str, str]:
    secret = keys.NewSecret("fare")
    made = keys.Terms("k", **terms)
    key_id = instance.db.write(lambda tx: keys.add(tx, account, None, made, secret, NOW, SYSTEM))
    return key_id, secret.token


def identify(instance: Instance, token: str) -> access.Principal:
    return access.identify(instance, inbound(authorization=f"Bearer {token}"), "127.0.0.1")


def test_an_expired_key_stays_expired_when_the_clock_steps_back(
    instance: Instance, owner: tuple[str, str], wall: Clock
) -> None:
    _, token = owner
    assert identify(instance, token).payer == "api_key"
    wall.step(HOUR_MS)
    refused("invalid_api_key", lambda: identify(instance, token))
    upkeep.tidy(instance)
    wall.step(-DAY_MS)
    refused("invalid_api_key", lambda: identify(instance, token))
    assert instance.db.rows("SELECT status FROM api_key") == [("expired",)]


def test_a_suspended_key_that_expired_is_not_resumed_when_the_clock_steps_back(
    instance: Instance, books: Books, wall: Clock
) -> None:
    key_id, token = new_key(instance, books.account(1), expires_at=NOW + HOUR_MS)
    instance.db.write(lambda tx: keys.suspend(tx, key_id, "why", NOW, COMMAND_LINE))
    wall.step(HOUR_MS)
    upkeep.tidy(instance)
    wall.step(-DAY_MS)
    refused(
        "conflict", lambda: instance.db.write(lambda tx: keys.resume(tx, key_id, NOW, COMMAND_LINE))
    )
    refused("invalid_api_key", lambda: identify(instance, token))


def test_a_rotated_secret_stays_dead_when_the_clock_steps_back(
    instance: Instance, books: Books, wall: Clock
) -> None:
    key_id, token = new_key(instance, books.account(1))
    fresh = keys.NewSecret("fare")
    instance.db.write(lambda tx: keys.rotate(tx, key_id, fresh, HOUR_MS, wall.now, SYSTEM))
    assert identify(instance, token).key_id == identify(instance, fresh.token).key_id == key_id
    wall.step(HOUR_MS)
    refused("invalid_api_key", lambda: identify(instance, token))
    upkeep.tidy(instance)
    wall.step(-DAY_MS)
    refused("invalid_api_key", lambda: identify(instance, token))
    assert identify(instance, fresh.token).key_id == key_id


@pytest.mark.parametrize("purpose", ["reset", "setup"])
def test_an_expired_link_stays_dead_when_the_clock_steps_back(
    instance: Instance, books: Books, wall: Clock, purpose: str
) -> None:
    account = books.account(1)
    token = instance.db.write(lambda tx: links.make(tx, purpose, account, wall.now))
    wall.step(links.LIFE_MS[purpose])
    refused("not_found", lambda: use(instance, purpose, token, wall.now))
    upkeep.tidy(instance)
    wall.step(-DAY_MS)
    refused("not_found", lambda: use(instance, purpose, token, wall.now))


def use(instance: Instance, purpose: str, token: str, now: int) -> links.Link:
    return instance.db.write(lambda tx: links.use(tx, purpose, token, now))


def test_a_forgotten_answer_is_not_found_again_when_the_clock_steps_back(
    instance: Instance, books: Books, wall: Clock
) -> None:
    account = books.account(10)
    answer = stored_answer(instance, books, account)
    assert find(instance, account, wall.now) == answer
    wall.step(DAY_MS)
    assert find(instance, account, wall.now) is None
    wall.step(1)
    upkeep.tidy(instance)
    wall.step(-DAY_MS)
    assert find(instance, account, wall.now) is None


def stored_answer(instance: Instance, books: Books, account: str) -> Stored:
    call = new_call(account, 3, idempotency_key="k", incarnation=instance.incarnation())
    answer = Stored(200, [("Content-Type", "text/plain")], b"hello")

    def work(tx: Tx) -> None:
        assert ledger.hold(tx, call, ALWAYS, 10)
        idempotency.claim(tx, account, "k", b"print", call.id, clock.now_ms())
        settlement.capture(tx, call.id, 3, DONE, answer, clock.now_ms())

    instance.db.write(work)
    return answer


def find(instance: Instance, account: str, now: int) -> Stored | errors.Refusal | None:
    with instance.db.reading() as tx:
        return idempotency.find(tx, account, "k", b"print", now)


# A clock that steps


@pytest.mark.parametrize("step", [DAY_MS, -DAY_MS])
def test_a_call_that_is_in_flight_when_the_clock_steps_ends_as_any_other(
    instance: Instance, books: Books, wall: Clock, step: int
) -> None:
    account = books.account(10)
    limit = limits.CreditLimit("key_1", 5, "day")
    window = instance.db.write(lambda tx: limits.spend_credits(tx, limit, 5, wall.now))
    call = new_call(
        account, 5, key_id="key_1", credit_window_at=window, incarnation=instance.incarnation(),
        idempotency_key="k",
    )  # fmt: skip

    def hold(tx: Tx) -> None:
        assert ledger.hold(tx, call, ALWAYS, 10)
        idempotency.claim(tx, account, "k", b"print", call.id, wall.now)

    instance.db.write(hold)
    ending = Settlement(instance, call.id)
    wall.step(step)
    upkeep.tidy(instance)
    assert upkeep.void_orphans(instance) == 0
    # A repeat that comes meanwhile is not charged again.
    found = find(instance, account, wall.now)
    assert isinstance(found, errors.Refusal) and found.code == "idempotency_in_progress"
    resolved = ending.capture(2, Outcome(200, None), None)
    assert resolved is not None
    assert resolved.standing == (8, 0)
    # What is given back goes back to the day it was taken from.
    assert instance.db.rows("SELECT starts_at, used FROM credit_window") == [(window, 2)]
    assert instance.db.rows("SELECT COUNT(*) FROM entry WHERE kind = 'capture'") == [(1,)]


@pytest.mark.parametrize("step", [DAY_MS, -DAY_MS])
def test_a_clock_that_steps_charges_nothing_and_keeps_the_order(
    instance: Instance, books: Books, wall: Clock, step: int
) -> None:
    account = books.account(10)
    books.captured_call(account, 2)
    before = books.standing(account)
    wall.step(step)
    for duty in (upkeep.settle_late, upkeep.void_orphans, upkeep.tidy):
        duty(instance)
    assert books.standing(account) == before
    call_id = books.captured_call(account, 1)
    newest = ledger.entries(instance.db, account, None, None, 1)[0][1]
    assert newest["reference"] == call_id


def test_a_limit_used_up_stays_used_up_when_the_clock_steps_back_and_forth(
    instance: Instance, wall: Clock
) -> None:
    limit = limits.CreditLimit("key_1", 5, "day")

    def spend(credits: int) -> int | errors.Refusal:
        return instance.db.write(lambda tx: limits.spend_credits(tx, limit, credits, wall.now))

    today = spend(5)
    wall.step(-DAY_MS)
    yesterday = spend(5)
    assert today != yesterday
    for step in (DAY_MS, -DAY_MS, DAY_MS):
        wall.step(step)
        upkeep.tidy(instance)
        assert isinstance(spend(1), errors.Refusal)


# Pruning


def test_answers_older_than_a_day_are_forgotten_a_batch_at_a_time(
    instance: Instance, books: Books, wall: Clock
) -> None:
    account = books.account(10)

    def fill(tx: Tx) -> None:
        for number in range(1200):
            idempotency.claim(tx, account, f"old{number}", b"p", "call", wall.now)
        tx.run("UPDATE idempotency SET state = 'lost'")

    instance.db.write(fill)
    wall.step(DAY_MS + 1)
    instance.db.write(lambda tx: idempotency.claim(tx, account, "new", b"p", "call", wall.now))
    pruned = instance.db.write(lambda tx: idempotency.prune(tx, wall.now))
    assert pruned == idempotency.PRUNED_AT_ONCE
    assert instance.db.rows("SELECT COUNT(*) FROM idempotency") == [(701,)]
    upkeep.tidy(instance)  # a round forgets all of them, so that traffic cannot outrun it
    assert instance.db.rows("SELECT key FROM idempotency") == [("new",)]


def test_keys_of_calls_in_flight_are_never_pruned_and_do_not_keep_others(
    instance: Instance, books: Books, wall: Clock
) -> None:
    account = books.account(10)

    def fill(tx: Tx) -> None:
        for number in range(600):
            idempotency.claim(tx, account, f"a{number:04}", b"p", "call", wall.now)
        idempotency.claim(tx, account, "z", b"p", "call", wall.now)
        tx.run("UPDATE idempotency SET state = 'lost' WHERE key = 'z'")

    instance.db.write(fill)
    wall.step(DAY_MS + 1)
    upkeep.tidy(instance)
    states: dict[str, int] = dict(
        instance.db.rows("SELECT state, COUNT(*) FROM idempotency GROUP BY state")
    )
    assert states == {"running": 600}


def test_counters_that_can_still_be_read_are_kept(instance: Instance, wall: Clock) -> None:
    month = limits.CreditLimit("key_m", 5, "month")
    total = limits.CreditLimit("key_t", 5, "total")

    def spend(tx: Tx) -> None:
        limits.spend_rate(tx, "key_m", 10, wall.now)
        for limit in (month, total):
            assert isinstance(limits.spend_credits(tx, limit, 5, wall.now), int)

    wall.now = clock.period_start_ms("month", wall.now)
    instance.db.write(spend)
    wall.step(31 * DAY_MS - 1)  # the last moment of January
    upkeep.tidy(instance)
    for limit in (month, total):
        found = instance.db.write(
            lambda tx, limit=limit: limits.spend_credits(tx, limit, 1, wall.now)
        )
        assert isinstance(found, errors.Refusal)
    assert instance.db.rows("SELECT * FROM rate_window") == []
    wall.step(30 * DAY_MS)
    upkeep.tidy(instance)
    assert instance.db.rows("SELECT subject FROM credit_window") == [("key_t",)]


def test_upkeep_goes_on_when_the_database_is_in_trouble(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round of the thread itself: each duty is tried, whatever became of the one before."""
    done: list[str] = []

    class Over(BaseException):
        pass

    def duty(name: str, error: Exception | None) -> Callable[[Instance], None]:
        def run(instance: Instance) -> None:
            done.append(name)
            if error is not None:
                raise error

        run.__name__ = name
        return run

    class Pause:
        def is_set(self) -> bool:
            return False

        def wait(self, seconds: float) -> None:
            assert 0 < seconds < 10
            if len(done) >= 6:
                raise Over

    monkeypatch.setattr(upkeep, "settle_late", duty("settle", errors.storage_unavailable()))
    monkeypatch.setattr(upkeep, "void_orphans", duty("void", ValueError("a surprise")))
    monkeypatch.setattr(upkeep, "tidy", duty("tidy", None))
    monkeypatch.setattr(threading, "Event", Pause)
    with pytest.raises(Over):
        upkeep.Upkeep(instance).run()
    assert done == ["settle", "void", "tidy"] * 2


def test_an_incarnation_is_alive_exactly_as_long_as_its_process(
    instance: Instance, books: Books, hire: Callable[..., Worker]
) -> None:
    folder = instance.settings.incarnations
    account = books.account(10)
    worker = hire(account)
    (name,) = os.listdir(folder)
    assert incarnation.is_alive(folder, name)
    assert incarnation.any_alive(folder)
    worker.end(signal.SIGKILL)
    assert not incarnation.any_alive(folder)
    assert os.listdir(folder) == []
    assert not incarnation.is_alive(folder, name)
    assert not incarnation.is_alive(folder, "inc_that_never_was")
    assert upkeep.void_orphans(instance) == 1
