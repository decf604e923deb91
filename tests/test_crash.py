"""kill -9 at any moment: nobody pays for nothing, nobody gets charged twice, nothing stays held.

The whole process group is killed under load and started again on the same instance folder; what
the clients saw, what the upstream saw and what the books say are then compared call by call.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from conftest import StartFarebox
from doubles import Upstream
from server import Answer, Farebox, until
from urllib3.exceptions import HTTPError

TORTURE = os.environ.get("FAREBOX_TORTURE") == "1"
KILLS = 50 if TORTURE else 10
CLIENTS = 24
GRANTED = 1_000_000
RESOLVED_WITHIN_SECONDS = 30  # The contract's bound for a hold after a crash.


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


@pytest.fixture(autouse=True)
def it_runs_again(box: Farebox, upstream: Upstream) -> None:
    """A test that failed between a kill and its restart must not fail the next one too."""
    if not box.is_running:
        box.start()


@pytest.fixture
def in_flight() -> Iterator[contextlib.ExitStack]:
    """Holds the connections of calls in flight; all are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield stack


@dataclass
class Load:
    """Clients that call as fast as they can, each call once, until the connection breaks."""

    box: Farebox
    key: str
    prefix: str
    answers: dict[int, Answer] = field(default_factory=dict)
    unanswered: set[int] = field(default_factory=set)
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a client hangs on a dead server"

    def path(self, number: int) -> str:
        # A few milliseconds at the upstream, so that a kill meets calls in every phase; every
        # tenth call fails there and must never be charged.
        if number % 10 == 9:
            return f"/api/v1/up/status/500?n={self.prefix}-{number}-"
        return f"/api/v1/up/slow/{number % 5}?n={self.prefix}-{number}-"

    def send(self, number: int, attempt: str = "first") -> Answer:
        return self.box.post(
            self.path(number),
            self.key,
            {"n": number},
            Idempotency_Key=f"{self.prefix}-{number}",
            X_Request_Id=f"{self.prefix}-{number}-{attempt}",
        )

    def _run(self) -> None:
        while True:
            with self._lock:
                number, self._next = self._next, self._next + 1
                self.unanswered.add(number)
            try:
                answer = self.send(number)
            except (HTTPError, OSError):
                return
            with self._lock:
                self.unanswered.discard(number)
                self.answers[number] = answer

    def wait_served(self, count: int) -> None:
        until(lambda: len(self.served()) >= count, 30, "answers come")

    def served(self) -> set[int]:
        with self._lock:
            return {number for number, answer in self.answers.items() if answer.status == 200}


def captured(box: Farebox, key: str, prefix: str) -> dict[str, int]:
    """Credits captured by request id, for the calls of one load."""
    return {
        call["request_id"]: call["captured"]
        for call in box.calls(key)
        if call["request_id"].startswith(f"{prefix}-") and call["status"] == "captured"
    }


def test_kill_9_under_load_loses_nothing_and_charges_nothing_twice(
    box: Farebox, upstream: Upstream
) -> None:
    chance = random.Random(20)
    lost_answers = 0
    _, key = box.account(credits=GRANTED)
    before = GRANTED
    for turn in range(KILLS):
        load = Load(box, key, f"crash{turn}")
        load.start()
        load.wait_served(chance.randint(20, 150))
        box.kill()
        load.join()
        box.start()

        balance = box.settled(key, RESOLVED_WITHIN_SECONDS)
        charged = captured(box, key, load.prefix)
        hits = {hit.query["n"] for hit in upstream.hits(f"?n={load.prefix}-")}
        # Nothing is left open, and the books say what the records of the calls say.
        assert {call["status"] for call in box.calls(key)} <= {"captured", "voided"}
        assert before - balance == sum(charged.values()) == len(charged)
        box.books()
        # Whoever has an answer was charged for it; whoever was charged was served by the upstream.
        served = {f"{load.prefix}-{number}-first" for number in load.served()}
        assert served <= set(charged)
        assert {request_id.removesuffix("first") for request_id in charged} <= hits
        assert {answer.status for answer in load.answers.values()} <= {200, 502}

        # Charged, but the answer never came: the repeat gives it, free and without the upstream.
        lost = [n for n in load.unanswered if f"{load.prefix}-{n}-first" in charged]
        lost_answers += len(lost)
        repeats = lost + chance.sample(sorted(load.served()), 5)
        for number in repeats:
            again = load.send(number, "again")
            assert again.status == 200
            assert again.headers["Idempotent-Replayed"] == "true"
            assert f"n={load.prefix}-{number}-" in again.json()["target"]
            assert len(upstream.hits(f"?n={load.prefix}-{number}-")) == 1
        assert box.settled(key) == balance
        # Not charged: the same key may be tried again, and is charged then, once.
        open_ends = [n for n in load.unanswered if n not in lost and n % 10 != 9]
        for number in open_ends:
            again = load.send(number, "again")
            assert again.status == 200, again.body
            assert "Idempotent-Replayed" not in again.headers
        before = box.settled(key)
        assert before == balance - len(open_ends)
    print(f"{lost_answers} answers were lost after they were charged")


def test_an_answer_lost_in_a_crash_is_given_again_free(
    box: Farebox, upstream: Upstream, in_flight: contextlib.ExitStack
) -> None:
    _, key = box.account(credits=10)
    body = b'{"lost": true}'
    sock = in_flight.enter_context(box.connect())
    sock.sendall(
        "\r\n".join(
            [
                "POST /api/v1/up/ok/lost HTTP/1.1",
                "Host: localhost",
                f"Authorization: Bearer {key}",
                "Content-Type: application/json",
                "Idempotency-Key: lost-1",
                "X-Request-Id: lost-1-first",
                f"Content-Length: {len(body)}",
                "\r\n",
            ]
        ).encode()
        + body
    )

    def charged() -> bool:
        answer = box.get("/api/v1/usage/lost-1-first", key)
        return answer.status == 200 and answer.json()["status"] == "captured"

    until(charged, 10, "the call is charged")
    box.kill()  # The client never reads: its answer is lost with the server.
    box.start()
    again = box.request(
        "POST",
        "/api/v1/up/ok/lost",
        key=key,
        body=body,
        headers={"Content-Type": "application/json", "Idempotency-Key": "lost-1"},
    )
    assert again.status == 200
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json()["body"] == body.decode()
    assert box.standing(key) == (9, 0)
    assert len(upstream.hits("/ok/lost")) == 1


def begin(
    box: Farebox, in_flight: contextlib.ExitStack, key: str, path: str, request_id: str
) -> socket.socket:
    """Send a call and leave it in flight."""
    sock = in_flight.enter_context(box.connect())
    sock.sendall(
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"X-Request-Id: {request_id}\r\n\r\n".encode()
    )
    return sock


def test_calls_cut_down_in_flight_are_given_back(
    box: Farebox, upstream: Upstream, in_flight: contextlib.ExitStack
) -> None:
    _, key = box.account(credits=10)
    still = ["/api/v1/up/hang", "/api/v1/up/head-then-hang"]
    # Each stream has a gate of its own, or one of them could take both events.
    paths = [path for gate in "ab" for path in (*still, f"/api/v1/up/sse/9?gate=crash-{gate}")]
    socks = [begin(box, in_flight, key, path, f"cut-{index}") for index, path in enumerate(paths)]
    upstream.wait_for(len(socks))
    # One event of each stream is out: delivered, but its success is not recorded.
    upstream.gate("crash-a").let(1)
    upstream.gate("crash-b").let(1)
    for sock in socks[2::3]:
        received = b""
        while b"data:" not in received:
            received += sock.recv(65536)
    assert box.standing(key) == (10 - len(socks), len(socks))
    box.kill()
    in_flight.close()
    box.start()
    assert box.settled(key, RESOLVED_WITHIN_SECONDS) == 10
    for index in range(len(socks)):
        assert box.call(key, f"cut-{index}")["status"] == "voided"


def test_an_idempotency_key_is_free_again_after_its_call_was_cut_down(
    box: Farebox, upstream: Upstream
) -> None:
    _, key = box.account(credits=10)
    done = threading.Event()

    def call() -> None:
        try:
            box.post("/api/v1/up/gated/cut", key, Idempotency_Key="cut-down")
        except (HTTPError, OSError):
            done.set()

    threading.Thread(target=call, daemon=True).start()
    upstream.wait_for(1, "/gated/cut")
    running = box.post("/api/v1/up/gated/cut", key, Idempotency_Key="cut-down")
    assert (running.status, running.code) == (409, "idempotency_in_progress")
    box.kill()
    assert done.wait(10)
    box.start()
    upstream.gate("cut").open()

    def tried_again() -> Answer | None:
        answer = box.post("/api/v1/up/gated/cut", key, Idempotency_Key="cut-down")
        return answer if answer.code != "idempotency_in_progress" else None

    again = until(tried_again, RESOLVED_WITHIN_SECONDS, "the key is free again")
    assert again is not None
    assert again.status == 200
    assert "Idempotent-Replayed" not in again.headers
    assert box.settled(key) == 9


def test_a_killed_workers_holds_are_given_back_while_the_others_go_on(
    box: Farebox, upstream: Upstream, in_flight: contextlib.ExitStack
) -> None:
    _, key = box.account(credits=100)
    workers = box.workers()
    if not workers:
        pytest.skip("this system does not tell which process serves a connection")
    by_worker: dict[int | None, list[tuple[str, socket.socket]]] = {}
    total = 0
    # Both workers must have some; which of them accepts is chance.
    while len(by_worker) < len(workers):
        assert total < 64, "one worker accepts everything"
        for _ in range(8):
            request_id = f"worker-{total}"
            sock = begin(box, in_flight, key, "/api/v1/up/gated/worker", request_id)
            total += 1
            upstream.wait_for(total, "/gated/worker")
            by_worker.setdefault(box.worker_of(sock), []).append((request_id, sock))
    assert None not in by_worker
    killed, spared = workers
    os.kill(killed, signal.SIGKILL)
    box.hang_up()
    until(
        lambda: all(box.call(key, r)["status"] == "voided" for r, _ in by_worker[killed]),
        RESOLVED_WITHIN_SECONDS,
        "the killed worker's holds are given back",
    )
    assert all(box.call(key, r)["status"] == "held" for r, _ in by_worker[spared])
    upstream.gate("worker").open()
    for request_id, sock in by_worker[spared]:
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        assert box.call(key, request_id)["status"] == "captured"
    assert box.settled(key) == 100 - len(by_worker[spared])
    until(lambda: len(box.workers()) == len(workers), 20, "the killed worker is replaced")


def test_a_stop_lets_calls_in_flight_finish(
    box: Farebox, upstream: Upstream, in_flight: contextlib.ExitStack
) -> None:
    _, key = box.account(credits=10)
    sock = begin(box, in_flight, key, "/api/v1/up/gated/stop", "stop-1")
    upstream.wait_for(1, "/gated/stop")
    stopping = threading.Thread(target=box.stop, daemon=True)
    stopping.start()
    until(lambda: not box.healthy(timeout=1), 20, "it takes no new work")
    upstream.gate("stop").open()
    assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    stopping.join(60)
    assert not stopping.is_alive()
    box.start()
    assert box.call(key, "stop-1")["status"] == "captured"
    assert box.standing(key) == (9, 0)


def test_it_starts_again_at_once_after_a_kill(box: Farebox) -> None:
    box.kill()
    began = time.monotonic()
    box.start()
    # Generous for a busy machine; a start that waits for locks or leases would take longer.
    assert time.monotonic() - began < 10
