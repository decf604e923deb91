"""Clients that stall: they may waste their own time, never everybody's."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from conftest import StartFarebox
from doubles import Upstream
from server import Farebox, until

HALF_SENT = 40
STALLED_READERS = 16
LINGERING = 40
PROMPT_SECONDS = 10.0
ANSWERS_WITHIN_SECONDS = 30.0
# More than the kernel buffers of both ends take, so that the writer must wait for the reader.
LARGE = 60_000_000
PRICE = 2


def config(upstream: Upstream) -> str:
    return f"""
[upstreams.double]
kind = "http"
base_url = "{upstream.url}"
timeout_seconds = 60

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST"]
upstream = "double"
upstream_path = "/*"
credits = {PRICE}

[limits]
requests_per_minute = 1000000
"""


@pytest.fixture(scope="module")
def box(start_farebox: StartFarebox, upstream_server: Upstream) -> Farebox:
    # The default's threads, in one worker: fewer than the clients that stall, which between two
    # workers could, by chance, find a free thread each without any time-out at all.
    return start_farebox(config(upstream_server), workers=1, threads=32)


@contextlib.contextmanager
def half_sent(box: Farebox, key: str, count: int) -> Iterator[list[socket.socket]]:
    """Clients that stop in the middle of their head, or of their body."""
    head = f"POST /api/v1/up/ok HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    with contextlib.ExitStack() as stack:
        socks = []
        for index in range(count):
            sock = stack.enter_context(box.connect())
            if index % 2:
                sock.sendall(f"{head}X-Half: se".encode())
            else:
                sock.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            socks.append(sock)
        yield socks


@contextlib.contextmanager
def stalled_readers(box: Farebox, key: str, count: int) -> Iterator[list[socket.socket]]:
    """Clients that ask for much and read nothing of it."""
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            # Before connecting: the window is agreed on then.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", box.port))
            sock.sendall(
                f"GET /api/v1/up/big/{LARGE} HTTP/1.1\r\nHost: localhost\r\n"
                f"Authorization: Bearer {key}\r\n\r\n".encode()
            )
            socks.append(sock)
        yield socks


def slowest_health(box: Farebox, askers: int = 4) -> float:
    """The longest of several clients' waits for /healthz; each must get its 200."""
    waits: list[float] = []

    def ask() -> None:
        began = time.monotonic()
        if box.healthy(timeout=ANSWERS_WITHIN_SECONDS):
            waits.append(time.monotonic() - began)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(askers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ANSWERS_WITHIN_SECONDS + 10)
    assert len(waits) == askers, "a healthy client got no answer"
    return max(waits)


def test_clients_that_never_hang_up_cost_nobody_else_anything(box: Farebox) -> None:
    # Each has its whole answer and is asked to close; a server that waits for that, in the thread
    # that also accepts everybody else, stands still for seconds per client.
    workers = box.workers()
    with contextlib.ExitStack() as stack:
        for _ in range(LINGERING):
            sock = stack.enter_context(box.connect())
            sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert slowest_health(box) < PROMPT_SECONDS
    assert box.workers() == workers, "a worker was killed for its clients' sake"


def test_stalled_clients_do_not_keep_healthz_from_answering(
    box: Farebox, upstream: Upstream
) -> None:
    _, key = box.account(credits=1000)
    workers = box.workers()
    with stalled_readers(box, key, STALLED_READERS):
        upstream.wait_for(STALLED_READERS, "/big/", 30)
        with half_sent(box, key, HALF_SENT) as socks:
            assert slowest_health(box) < ANSWERS_WITHIN_SECONDS
            # Nor do they keep paying clients out for longer.
            began = time.monotonic()
            assert box.post("/api/v1/up/ok/between", key).status == 200
            assert time.monotonic() - began < ANSWERS_WITHIN_SECONDS
            # Whoever never finishes a request is shown out in the end, uncharged.
            for sock in socks:
                sock.settimeout(90)
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(65536):
                        pass
        # Whoever never reads is given up too; the part that was delivered costs the price.
        assert box.settled(key, 90) == 1000 - PRICE * (STALLED_READERS + 1)
    for hit in upstream.hits("/big/"):
        assert upstream.wait_ended(hit) == "gone"
    assert box.workers() == workers, "a worker was killed for its clients' sake"
    # Half a body is no request: it was never sent on.
    assert {hit.path for hit in upstream.hits("/ok")} == {"/ok/between"}


def test_signals_that_overtake_each_other_still_end_a_worker() -> None:
    """Ctrl-C: the terminal signals every process, and the master its workers once more."""
    with Farebox("", workers=1) as box:
        (worker,) = box.workers()
        for _ in range(200):
            try:
                os.kill(worker, signal.SIGINT)
                os.kill(worker, signal.SIGQUIT)
            except ProcessLookupError:
                break
        until(lambda: worker not in box.workers(), 10, "the worker's end")
        until(box.healthy, 10, "its successor")


QUIT_IN_SUBMIT = """
import os, signal, threading
from concurrent.futures import ThreadPoolExecutor
from gunicorn.config import Config
import serving

worker = serving.Worker(1, os.getpid(), [], None, 30, Config(), None)
worker.tpool = ThreadPoolExecutor(1)
signal.signal(signal.SIGQUIT, worker.handle_quit)
start = threading.Thread.start

def interrupted(thread):
    os.kill(os.getpid(), signal.SIGQUIT)
    start(thread)

threading.Thread.start = interrupted  # the pool does so in submit, holding its lock
worker.tpool.submit(print)
print("went on")
"""


def test_a_worker_told_to_quit_while_it_hands_on_a_request_does_so() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", QUIT_IN_SUBMIT], timeout=30, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_who_is_new_has_a_turn_though_others_always_ask_again(
    start_farebox: StartFarebox, upstream_server: Upstream
) -> None:
    """Connections that are kept, and never idle, are more than there are threads."""
    box = start_farebox(config(upstream_server), workers=1, threads=2)
    _, key = box.account(10**6)
    ended = threading.Event()
    served = [0] * 8

    def ask(connection: http.client.HTTPConnection) -> None:
        connection.request("GET", "/api/v1/up/slow/30", headers={"Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200

    def ask_again_and_again(number: int, connection: http.client.HTTPConnection) -> None:
        while not ended.is_set():
            ask(connection)
            served[number] += 1

    with contextlib.ExitStack() as stack:
        kept = [http.client.HTTPConnection("127.0.0.1", box.port, timeout=30) for _ in served]
        for connection in kept:  # each is kept before the next one comes
            stack.callback(connection.close)
            ask(connection)
        busy = [threading.Thread(target=ask_again_and_again, args=each) for each in enumerate(kept)]
        for thread in busy:
            thread.start()
        try:
            until(lambda: min(served) > 2, what="all of them are served again and again")
            for _ in range(5):
                assert box.healthy(timeout=3)
        finally:
            ended.set()
            for thread in busy:
                thread.join()
