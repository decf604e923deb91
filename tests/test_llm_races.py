"""Streams of language models, many at once: credits that race, clients that leave, connections.

The upstream is a double that does what the request's own `plan` says, field by field:

    chunks      so many events of content, `TOKENS` tokens each (10 unless said)
    tokens      so many in each of them instead
    gate        each event from number `free` on (0 unless said) waits for a pass of that gate, and
                so does what comes after the last one; the head, where `free` is -1
    usage       the output tokens it says it was; what `max_tokens` allows when it says "limit"
    early       the usage comes before the events, in a chunk that has a choice
    status      an error of that status, at once
    cut         closes the connection after the events
    late_ms     so long after [DONE] the answer ends; never, until released, when negative
    two         what the second upstream does instead, if it is asked
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import resource
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from conftest import StartFarebox
from doubles import Exchange, Gone, Server, refused_port
from inprocess import HOST, Box
from server import Farebox, until
from werkzeug.test import create_environ

from core import upstream
from core.adapters.llm.course import ModelCourse

BASE = 10  # credits a request, and one a token of output: the price can be had in one's head
TOKENS = 10  # in each event's content, at four bytes each
PATH = "/v1/chat/completions"

T = TypeVar("T")


class Model(Server):
    """An OpenAI-compatible upstream, at /one/v1 and at /two/v1."""

    @property
    def open_connections(self) -> int:
        with self._lock:
            return len(self._connections)

    @property
    def open_streams(self) -> int:
        return sum(hit.ended == "open" for hit in self.hits())

    def respond(self, exchange: Exchange) -> None:
        asked: Any = exchange.hit.json()
        plan = asked["plan"]
        if exchange.hit.path.startswith("/two/"):
            plan = plan.get("two", plan)
        status = plan.get("status", 200)
        if status != 200:
            exchange.json(status, {"error": {"message": "not now", "type": "busy"}})
            return
        self._pass(exchange, plan, -1)
        kind = ("Content-Type", "text/event-stream")
        exchange.head(200, [kind, ("Transfer-Encoding", "chunked")])
        tokens = plan.get("usage")
        usage = {"prompt_tokens": 1, "completion_tokens": tokens}
        if tokens == "limit":
            usage["completion_tokens"] = asked["max_tokens"]
        if plan.get("early"):
            exchange.chunk(event({"choices": [{"index": 0, "delta": {}}], "usage": usage}))
        for number in range(plan.get("chunks", 10)):
            self._pass(exchange, plan, number)
            words = "w" * 4 * plan.get("tokens", TOKENS)
            delta = {"role": "assistant", "content": words}
            is_last = number == plan.get("chunks", 10) - 1
            reason = "stop" if plan.get("finish") and is_last else None
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            exchange.chunk(event({"choices": [choice]}))
        self._pass(exchange, plan, plan.get("chunks", 10))
        if plan.get("cut"):
            exchange.close()
            return
        if tokens is not None and not plan.get("early"):
            exchange.chunk(event({"choices": [], "usage": usage}))
        exchange.chunk(b"data: [DONE]\n\n")
        late_ms = plan.get("late_ms", 0)
        if late_ms < 0 and not exchange.wait_until(self._released):
            raise Gone
        time.sleep(max(0, late_ms) / 1000)
        exchange.send(b"0\r\n\r\n")

    def _pass(self, exchange: Exchange, plan: dict[str, Any], number: int) -> None:
        gated = "gate" in plan and number >= plan.get("free", 0)
        if gated and not self.gate(plan["gate"]).wait(exchange.wanted):
            raise Gone


def event(more: dict[str, Any]) -> bytes:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return f"data: {json.dumps(head | more)}\n\n".encode()


LARGE = 1_700_000  # tokens: more content than the kernel's buffers take


def config(model: Model) -> str:
    sections = [
        f"""
[[models]]
id = "{name}"
upstream = "{upstream}"
fallback = "two"
credits_per_request = {BASE}
credits_per_1k_tokens = 1000
max_output_tokens = {most}
"""
        for name, upstream, most in (
            ("m", "one", 1000),
            ("short", "one", 40),
            ("gone", "nobody", 40),
            ("large", "one", LARGE),
        )
    ]
    upstreams = {
        "one": f"{model.url}/one/v1",
        "two": f"{model.url}/two/v1",
        "nobody": f"http://127.0.0.1:{refused_port()}/v1",
    }
    sections += [
        f'[upstreams.{name}]\nkind = "openai"\nbase_url = "{url}"\ntimeout_seconds = 20\n'
        for name, url in upstreams.items()
    ]
    return (
        "\n".join(sections)
        + f"""
[[routes]]
path = "{PATH}"
methods = ["POST"]
upstream = "one"
adapter = "chat"

[limits]
requests_per_minute = 1000000
concurrent_calls = 1000
"""
    )


@pytest.fixture(scope="module")
def model_server() -> Iterator[Model]:
    with Model() as server:
        yield server


@pytest.fixture
def model(model_server: Model) -> Model:
    model_server.clear()
    return model_server


@pytest.fixture(scope="module")
def box(start_farebox: StartFarebox, model_server: Model) -> Farebox:
    return start_farebox(config(model_server), workers=2, threads=128)


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
    yield
    while Client.made:
        Client.made.pop().sock.close()


def asking(plan: dict[str, Any], **fields: Any) -> bytes:
    """The body of a request."""
    fields = {"model": "m", "messages": [], "stream": True, "plan": plan, **fields}
    return json.dumps(fields).encode()


class Client:
    """One request on a connection of its own, read as bytes and left in the way that is wanted."""

    made: ClassVar[list[Client]] = []

    def __init__(self, box: Farebox, key: str, plan: dict[str, Any], **fields: Any) -> None:
        self.made.append(self)
        self.sock = box.connect()
        self.seen = b""
        body = asking(plan, **fields)
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
            f"Connection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.sock.sendall(head.encode() + body)

    @property
    def status(self) -> int:
        return int(self._head()[0].split()[1])

    @property
    def has_an_answer(self) -> bool:
        return bool(select.select([self.sock], [], [], 0)[0])

    @property
    def is_put_off(self) -> bool:
        """Whether a server that must verify a key for the first time, on a machine that has much
        to do, asks to try again."""
        return self.status == 503 and b'"overloaded"' in self.rest()

    def header(self, name: str) -> str | None:
        found = (line.partition(": ") for line in self._head()[1:])
        return next((value for at, _, value in found if at.lower() == name.lower()), None)

    def _head(self) -> list[str]:
        self.read_until(b"\r\n\r\n")
        return self.seen.partition(b"\r\n\r\n")[0].decode().split("\r\n")

    @property
    def events(self) -> int:
        """The events of content that came so far."""
        return self.seen.count(b'"content":')

    def read_events(self, count: int) -> None:
        self._read(lambda: self.events >= count)

    def rest(self) -> bytes:
        """Everything that came, once the answer has ended, in whichever way."""
        while piece := self.sock.recv(65536):
            self.seen += piece
        return self.seen

    def leave(self, abruptly: bool = False) -> None:
        """Close the connection, or reset it."""
        if abruptly:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def read_until(self, mark: bytes) -> None:
        self._read(lambda: mark in self.seen)

    def _read(self, enough: Callable[[], bool]) -> None:
        while not enough():
            piece = self.sock.recv(65536)
            assert piece, f"the answer ended too soon: {self.seen!r}"
            self.seen += piece


def admitted(box: Farebox, key: str, plan: dict[str, Any], **fields: Any) -> Client:
    """A client whose answer's head has come, and is not that it may try again."""
    client = Client(box, key, plan, **fields)
    while client.is_put_off:
        client = Client(box, key, plan, **fields)
    return client


def all_at_once(count: int, work: Callable[[int], T]) -> list[T]:
    """What `work` returns for each number below `count`, each in a thread, begun together."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> T:
        barrier.wait(30)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


class Watch:
    """Reads an account's standing again and again, and keeps what must not be."""

    def __init__(self, box: Farebox, key: str, most: int) -> None:
        self.readings = 0
        self.wrong: list[tuple[int, int]] = []
        self._look = (box, key, most)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        box, key, most = self._look
        while not self._over.is_set():
            available, held = box.standing(key)
            self.readings += 1
            if available < 0 or held < 0 or available + held > most:
                self.wrong.append((available, held))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)
        assert self.readings > 0 and self.wrong == []


# More streams than credits


def test_of_a_hundred_streams_just_those_are_served_that_the_balance_covers(
    box: Farebox, model: Model
) -> None:
    each = BASE + 40
    _, key = box.account(40 * each)
    plan = {"chunks": 4, "gate": "rush", "free": 1, "usage": "limit"}
    with Watch(box, key, 40 * each):
        clients = all_at_once(100, lambda _: admitted(box, key, plan, max_tokens=40))
        # Every stream that is served is still open.
        assert Counter(client.status for client in clients) == {200: 40, 402: 60}
        assert model.open_streams == 40
        assert box.standing(key) == (0, 40 * each)
        model.gate("rush").open()
        served = [client for client in clients if client.status == 200]
        assert all(b"[DONE]" in client.rest() for client in served)
        assert box.settled(key) == 0
    assert {client.header("X-Credits-Held") for client in served} == {str(each)}
    assert Counter((c["captured"], c["estimated"]) for c in box.calls(key)) == {(each, False): 40}
    box.ledger_ok()


def test_what_is_left_for_no_whole_stream_is_sold_as_a_shorter_one(
    box: Farebox, model: Model
) -> None:
    each, less = BASE + 40, BASE + 15
    _, key = box.account(40 * each + less)
    plan = {"chunks": 2, "gate": "rush", "free": 1, "usage": "limit"}
    with Watch(box, key, 40 * each + less):
        clients = all_at_once(100, lambda _: admitted(box, key, plan, model="short"))
        assert Counter(client.status for client in clients) == {200: 41, 402: 59}
        assert box.standing(key) == (0, 40 * each + less)
        model.gate("rush").open()
        served = [client for client in clients if client.status == 200]
        assert all(b"[DONE]" in client.rest() for client in served)
        assert box.settled(key) == 0
    said = Counter(
        (client.header("X-Credits-Held"), client.header("X-Max-Tokens-Clamped"))
        for client in served
    )
    assert said == {(str(each), None): 40, (str(less), "15"): 1}
    sent: Counter[Any] = Counter(hit.json()["max_tokens"] for hit in model.hits())  # type: ignore[call-overload,index]
    assert sent == {40: 40, 15: 1}
    box.ledger_ok()


def test_streams_that_end_in_every_way_at_once_leave_the_books_in_order(
    box: Farebox, model: Model
) -> None:
    each = BASE + 40
    _, key = box.account(40 * each)
    plans: list[dict[str, Any]] = [
        {"chunks": 4, "usage": 25},  # whole, and shorter than was held for
        {"chunks": 3, "cut": True},  # broken off by the upstream
        {"chunks": 0, "cut": True},  # broken off before anything was said
        {"status": 503, "two": {"status": 500}},
        {"chunks": 2, "gate": "never", "free": 2},  # whose client leaves
    ]
    prices = [BASE + 25, BASE + 3 * TOKENS, 0, 0, BASE + 2 * TOKENS]

    def go(number: int) -> tuple[int, int, str | None]:
        kind = number % len(plans)
        client = admitted(box, key, plans[kind], max_tokens=40)
        if client.status == 200 and kind == 4:
            client.read_events(2)
            client.leave(abruptly=number % 2 == 0)
        else:
            client.rest()
        return kind, client.status, client.header("X-Request-Id")

    with Watch(box, key, 40 * each):
        ended = all_at_once(100, go)
        left = box.settled(key)
    charged = {call["request_id"]: call["captured"] for call in box.calls(key)}
    assert sum(charged.values()) == 40 * each - left
    for kind, status, request_id in ended:
        if status == 402:
            assert request_id not in charged
        else:
            assert charged[request_id] == prices[kind], plans[kind]
            assert status == (502 if prices[kind] == 0 else 200)
    assert {kind for kind, status, _ in ended if status != 402} == {0, 1, 2, 3, 4}
    assert box.standing(key) == (left, 0)
    until(lambda: model.open_streams == 0, what="no generation goes on")
    box.ledger_ok()


# Clients that leave


def test_whoever_leaves_pays_for_what_was_delivered_and_no_more(box: Farebox, model: Model) -> None:
    chunks, hold = 50, BASE + 400  # less than the whole answer would be
    _, key = box.account(hold * 2 * (chunks + 1))

    def under_way(gate: str) -> Client:
        plan = {"chunks": chunks, "gate": gate}
        client = Client(box, key, plan, max_tokens=400)

        def is_asked() -> bool:
            nonlocal client
            if client.has_an_answer and client.is_put_off:
                client = Client(box, key, plan, max_tokens=400)
            return any(f'"{gate}"'.encode() in hit.body for hit in model.hits())

        until(is_asked, 30, "the upstream is asked")
        return client

    def leave_after(number: int) -> tuple[int, str]:
        count, gate = number // 2, f"after {number}"
        client = under_way(gate)
        model.gate(gate).let(count)
        client.read_events(count)
        client.leave(abruptly=number % 2 == 1)
        return count, gate

    left = all_at_once(2 * (chunks + 1), leave_after)
    # Nothing more was let out, so it is not the next event that shows that nobody listens.
    until(lambda: model.open_streams == 0, 10, "every generation is given up")
    box.settled(key)
    by_gate = {hit.json()["plan"]["gate"]: hit for hit in model.hits()}  # type: ignore[call-overload,index]
    assert {by_gate[gate].ended for _, gate in left} == {"gone"}
    calls = sorted((call["captured"], call["status"], call["estimated"]) for call in box.calls(key))
    expected = sorted(
        (min(BASE + TOKENS * count, hold), "captured", True) if count else (0, "voided", False)
        for count, _ in left
    )
    assert calls == expected
    box.ledger_ok()


def test_of_what_is_too_large_to_be_sent_at_once_the_part_counts_that_was(
    box: Farebox, model: Model
) -> None:
    _, key = box.account(BASE + LARGE)
    client = Client(box, key, {"chunks": 1, "tokens": LARGE}, model="large", max_tokens=LARGE)
    while len(client.seen) < 400_000:
        client.seen += client.sock.recv(65536)
    client.leave(abruptly=True)
    left = box.settled(key)
    (call,) = box.calls(key)
    assert call["captured"] == BASE + LARGE - left == BASE + call["output_tokens"]
    assert 50_000 < call["output_tokens"] < LARGE and call["estimated"]


def test_whoever_leaves_when_the_usage_is_known_pays_by_it(box: Farebox, model: Model) -> None:
    _, key = box.account(2000)
    plan = {"chunks": 5, "gate": "early", "free": 3, "usage": 27, "early": True}
    client = Client(box, key, plan, max_tokens=100)
    client.read_events(3)
    client.leave()
    assert box.settled(key) == 2000 - BASE - 27
    (call,) = box.calls(key)
    assert (call["output_tokens"], call["estimated"]) == (27, False)


def test_whoever_leaves_between_the_last_word_and_what_it_was_pays_by_that(
    box: Farebox, model: Model
) -> None:
    """Reasoning that is not shown would be free to who hangs up at the right moment."""
    _, key = box.account(2000)
    plan = {"chunks": 2, "gate": "said", "free": 2, "usage": 99, "finish": True}
    client = Client(box, key, plan, max_tokens=100)
    client.read_events(2)
    client.leave()
    model.gate("said").open()
    assert box.settled(key) == 2000 - BASE - 99
    (call,) = box.calls(key)
    assert (call["output_tokens"], call["estimated"]) == (99, False)


def test_whoever_leaves_when_all_is_said_is_not_waited_for_long(box: Farebox, model: Model) -> None:
    _, key = box.account(2000)
    plan = {"chunks": 2, "gate": "never", "free": 2, "usage": 99, "finish": True}
    client = Client(box, key, plan, max_tokens=100)
    client.read_events(2)
    client.leave()
    assert box.settled(key) == 2000 - BASE - 2 * TOKENS
    assert model.wait_ended(model.hits()[-1]) == "gone"


def test_whoever_leaves_before_a_word_was_delivered_pays_nothing(
    box: Farebox, model: Model
) -> None:
    _, key = box.account(2000)
    # Gone before the answer began, in both ways; and with the usage known, but nothing said yet.
    for number in (1, 2):
        plan = {"gate": f"head {number}", "free": -1, "usage": 27}
        client = Client(box, key, plan, max_tokens=100)
        hit = model.wait_for(number)[-1]
        client.leave(abruptly=number == 1)
        model.gate(f"head {number}").open()
        model.wait_ended(hit)
    client = Client(box, key, {"gate": "known", "usage": 27, "early": True}, max_tokens=100)
    client.read_until(b'"delta"')
    client.leave()
    assert box.settled(key) == 2000
    assert [call["status"] for call in box.calls(key)] == ["voided"] * 3


def test_a_client_that_only_stops_sending_has_not_left(box: Farebox, model: Model) -> None:
    _, key = box.account(1000)
    client = Client(box, key, {"chunks": 3, "gate": "half", "free": 1, "usage": 30}, max_tokens=50)
    client.read_events(1)
    client.sock.shutdown(socket.SHUT_WR)
    # A word of the server in the silence, which shows that it has noticed.
    client.read_until(b": still there")
    model.gate("half").open()
    assert b"[DONE]" in client.rest()
    assert client.events == 3
    assert client.seen.count(b": still there") == 1, "it is not spoken to without end"
    assert box.settled(key) == 1000 - BASE - 30


# Another upstream in between


def test_under_load_each_stream_finds_the_upstream_that_answers(box: Farebox, model: Model) -> None:
    each = BASE + 40
    _, key = box.account(60 * each)
    plans = [
        ("m", {"status": 503, "two": {"chunks": 4, "usage": "limit"}}),
        ("m", {"status": 429, "two": {"chunks": 4, "usage": "limit"}}),
        ("gone", {"chunks": 4, "usage": "limit"}),
    ]

    def go(number: int) -> bytes:
        name, plan = plans[number % 3]
        client = admitted(box, key, plan, model=name, max_tokens=40)
        assert client.status == 200, client.seen
        return client.rest()

    assert all(b"[DONE]" in answer for answer in all_at_once(60, go))
    assert box.settled(key) == 0
    assert len(model.hits("/one/")) == 40
    assert len(model.hits("/two/")) == 60


# Connections


def one_after_another(box: Farebox, key: str, count: int, plan: dict[str, Any]) -> None:
    """Streams over one connection, and so in one worker."""
    connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=30)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    for _ in range(count):
        connection.request("POST", PATH, asking(plan, max_tokens=40), headers)
        answer = connection.getresponse()
        assert answer.status == 200
        assert b"[DONE]" in answer.read()
    connection.close()


def test_streams_one_after_another_share_one_connection_to_the_upstream(
    box: Farebox, model: Model
) -> None:
    _, key = box.account(10_000)
    one_after_another(box, key, 20, {"chunks": 3, "usage": 3})
    assert len({hit.connection for hit in model.hits()}) == 1


def test_an_answer_that_ends_a_moment_after_its_last_event_gives_its_connection_back(
    box: Farebox, model: Model
) -> None:
    _, key = box.account(10_000)
    one_after_another(box, key, 12, {"chunks": 1, "usage": 3, "late_ms": 10})
    # Waited for in vain, one or the other time, on a machine that has much to do.
    assert len({hit.connection for hit in model.hits()}) <= 6


def test_an_upstream_that_never_ends_its_answer_keeps_nobody_waiting(
    box: Farebox, model: Model
) -> None:
    _, key = box.account(1000)
    client = Client(box, key, {"chunks": 1, "usage": 3, "late_ms": -1}, max_tokens=40)
    client.read_until(b"\r\n0\r\n\r\n")
    (hit,) = model.hits()
    assert model.wait_ended(hit) == "gone", "the connection is not kept for ever either"
    assert box.settled(key) == 1000 - BASE - 3


def test_connections_that_are_too_many_to_keep_are_closed_at_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "_IDLE_WIRES", 2)
    before = model.open_connections
    wires, body = upstream.Wires(), asking({"chunks": 1, "gate": "kept"})
    request = upstream.Outbound("POST", f"{model.url}/one/v1{PATH}", [], body, 20, 20)
    replies = [wires.send(request) for _ in range(5)]
    model.gate("kept").open()
    gc.disable()  # it would find them in the end
    try:
        for reply in replies:
            assert reply.read(100_000)[1]
        until(lambda: model.open_connections == before + 2, what="three are closed")
    finally:
        gc.enable()
    assert wires.send(request).status == 200
    assert len({hit.connection for hit in model.hits()}) == 5, "the others are used again"


# Silence


def test_what_is_said_in_a_silence_stands_between_events(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelCourse, "beat_seconds", 0.05)
    with Box(tmp_path / "instance", config(model)) as box:
        payer = box.payer(1000)
        plan = {"chunks": 3, "gate": "quiet", "usage": 3}
        headers = {"Authorization": f"Bearer {payer.key}", "Host": HOST}
        environ = create_environ(
            PATH, method="POST", headers=headers, content_type="application/json",
            data=asking(plan, max_tokens=40),
        )  # fmt: skip
        answer: Any = box.app(environ, lambda *_: None)
        said = b""
        for piece in answer:
            said += piece
            if said.endswith(b": still there\n\n" * 2):
                model.gate("quiet").let()
        answer.close()
        events = [part for part in said.decode().split("\n\n") if part]
        # Before each event, and after the last one, the silence was long enough for two.
        spoken = ["" if part == ": still there" else part for part in events]
        assert sum(part == "" for part in spoken) >= 8
        others = [part for part in spoken if part]
        assert all(part.startswith("data: {") and "wwww" in part for part in others[:3])
        assert others[3:] == ["data: [DONE]"]
        assert box.standing(payer) == (1000 - BASE - 3, 0)


# As many as there are threads


@contextlib.contextmanager
def one_descriptor_fewer() -> Iterator[int]:
    """What starts now may have one file less than it could ask for: the number of those."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_thread_of_every_worker_serves_a_stream(
    start_farebox: StartFarebox, model: Model
) -> None:
    # Whichever worker accepts it: one that is full must leave a client to the other.
    with one_descriptor_fewer() as most:
        box = start_farebox(config(model), workers=2, threads=30)
    for worker in box.workers():
        assert resource.prlimit(worker, resource.RLIMIT_NOFILE) == (most, most)
    _, key = box.account(60 * (BASE + 40))
    plan = {"chunks": 2, "gate": "idle", "free": 1, "usage": "limit"}
    clients = all_at_once(60, lambda _: admitted(box, key, plan, max_tokens=40))
    for client in clients:
        client.read_events(1)
    assert model.open_streams == 60
    model.gate("idle").open()
    assert all(b"[DONE]" in client.rest() for client in clients)
    assert box.settled(key) == 0


def test_a_stream_that_a_restart_breaks_off_is_charged(
    start_farebox: StartFarebox, model: Model
) -> None:
    box = start_farebox(config(model), workers=1)
    _, key = box.account(10_000)
    client = Client(box, key, {"gate": "on and on", "chunks": 1000}, max_tokens=9000)
    model.gate("on and on").let(1)
    client.read_events(1)
    over = threading.Event()

    def speak() -> None:
        while not over.wait(0.2):
            model.gate("on and on").let(1)

    with ThreadPoolExecutor() as pool:
        pool.submit(speak)
        box.stop()
        over.set()
    assert b'"overloaded"' in client.rest() and b"[DONE]" not in client.seen
    assert client.events > 10, "it went on for a while"
    box.start()
    assert box.settled(key) == 10_000 - BASE - client.events * TOKENS
    box.ledger_ok()
