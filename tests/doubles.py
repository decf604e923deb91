"""Stand-ins for the paid APIs behind Farebox: real servers on loopback, misbehaving on demand.

They speak HTTP/1.1 on raw sockets, because the faults worth testing (a reset, half a body, a status
line of noise) are ones an HTTP library would refuse to send. Every request that arrives is recorded
before it is answered, so a test can say what an upstream was really asked, and how often.

What `Upstream` does is chosen by the request's path, so one server serves every test at once:

    /ok/<anything>                200, JSON echo of the request
    /status/<n>                   status n; ?body= and ?retry_after= optional
    /reset                        TCP reset instead of an answer
    /close                        closed without an answer
    /close-reused                 as /close on a connection that served before; on a fresh one, 200
    /ok-then-close                200, then the connection is closed without having said so
    /hang                         no answer until `release()`, or until the client goes away
    /slow/<ms>                    200 after so many milliseconds
    /head-then-hang               status line and headers, then silence
    /drip/<ms>/<n>                n body bytes, one every so many milliseconds
    /cut/<declared>/<sent>        a body shorter than its Content-Length; ?how=reset|hang
    /cut-chunked/<k>              k chunks of a chunked body, then closed; ?how= too
    /bad-chunk                    a chunk size that is not a number
    /garbage-status               a status line of noise
    /garbage-headers              a header block without colons
    /huge-headers/<bytes>         one header of that size
    /many-headers/<n>             n headers
    /nul-header                   a NUL inside a header value
    /extra-bytes                  more body than Content-Length says, on a connection kept open;
                                  opens the gate `spilt` once it is sent
    /bad-length/<text>            Content-Length: <text>
    /two-lengths                  two Content-Length headers that disagree
    /interim                      100 and 103 before the 200
    /until-close/<bytes>          an HTTP/1.0 answer whose end is the connection's end
    /big/<bytes>                  a body of that size; ?cut=<k> stops after k bytes, ?chunked=1
    /sse/<n>, /ndjson/<n>         a stream of n events; ?delay_ms=, ?gate=<name> (one opening lets
                                  one event out, or the cut), ?cut=<k> after k events,
                                  ?how=close|reset|hang
    /redirect/<status>            a redirect to itself, or to ?to=
    /empty                        204
    /units/<n>                    {"usage": {"pages": n}} and X-Units: n; or ?json= and ?header=
    /gzip                         a gzip'd JSON body
    /secrets                      headers a client must not see, and two it may
    /leaky/<status>               quotes the X-Api-Key it was sent, as some providers' errors do
    /gated/<name>                 200 once `gate(name)` was opened
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import itertools
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import parse_qsl, unquote, urlsplit

HEAD_LIMIT = 256 * 1024
BODY_LIMIT = 64 * 1024 * 1024
WAIT_LIMIT_SECONDS = 60.0  # Nothing here may outlive a test run by more than this.

REASONS = {200: "OK", 201: "Created", 204: "No Content", 400: "Bad Request", 401: "Unauthorized"}


def refused_port() -> int:
    """A loopback port that nobody listens on, so a connection to it is refused.

    It is released again at once; the kernel hands out ephemeral ports in an order that makes
    meeting it again within a test unlikely.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass
class Hit:
    """One request an upstream received, as it came over the wire."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    at: float
    connection: int
    reused: bool
    raw_head: bytes
    ended: str = "open"  # "answered": the double did all it meant to; "gone": the peer left first.
    sent_bytes: int = 0

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    def header(self, name: str) -> str | None:
        """The first header of that name, whatever its case, or None."""
        return next((v for k, v in self.headers if k.lower() == name.lower()), None)

    def json(self) -> object:
        return json.loads(self.body)

    def everything(self) -> bytes:
        """Every byte that came, for tests that look for what must not be there."""
        return self.raw_head + b"\r\n\r\n" + self.body


class Gate:
    """Lets waiting events out one by one, when the test says so."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._passes = 0
        self._open = False

    def let(self, count: int = 1) -> None:
        with self._condition:
            self._passes += count
            self._condition.notify_all()

    def open(self) -> None:
        """Let everything out from now on."""
        with self._condition:
            self._open = True
            self._condition.notify_all()

    def wait(self, still_wanted: Callable[[], bool]) -> bool:
        """Wait for a pass; False when nobody wants the event any more."""
        deadline = time.monotonic() + WAIT_LIMIT_SECONDS
        with self._condition:
            while not (self._open or self._passes):
                if time.monotonic() > deadline or not still_wanted():
                    return False
                self._condition.wait(0.05)
            if self._passes:
                self._passes -= 1
            return True


class Gone(Exception):
    """The other side of the connection left."""


@dataclass
class Exchange:
    """One request and the means to answer it, properly or not."""

    sock: socket.socket
    hit: Hit
    keep: bool = True
    parts: list[str] = field(default_factory=list)

    def number(self, index: int, default: int = 0) -> int:
        return int(self.parts[index]) if len(self.parts) > index else default

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise Gone from error
        self.hit.sent_bytes += len(data)

    def head(self, status: int, headers: list[tuple[str, str]], reason: str | None = None) -> None:
        lines = [f"HTTP/1.1 {status} {reason or REASONS.get(status, 'Whatever')}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")

    def answer(
        self,
        status: int,
        body: bytes = b"",
        headers: list[tuple[str, str]] | None = None,
        content_type: str = "application/json",
    ) -> None:
        """A whole, correct answer, sent at once."""
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Whatever')}"]
        if status != 204:
            lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers or []]
        self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    def json(
        self, status: int, value: object, headers: list[tuple[str, str]] | None = None
    ) -> None:
        self.answer(status, json.dumps(value).encode(), headers)

    def chunk(self, data: bytes) -> None:
        self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def reset(self) -> None:
        """End the connection with a TCP reset: the peer's read fails instead of ending."""
        self.keep = False
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        self.keep = False

    def wanted(self) -> bool:
        """Whether the other side is still there, as far as the kernel knows."""
        try:
            readable, _, _ = select.select([self.sock], [], [], 0)
            return not readable or self.sock.recv(1, socket.MSG_PEEK) != b""
        except (OSError, ValueError):
            return False

    def wait_until(self, event: threading.Event) -> bool:
        """Wait for the event; False when the other side left (or a test forgot us)."""
        deadline = time.monotonic() + WAIT_LIMIT_SECONDS
        while not event.wait(0.05):
            if time.monotonic() > deadline or not self.wanted():
                return False
        return True

    def end(self, how: str, released: threading.Event) -> None:
        """Break off: by closing, by a reset, or by falling silent."""
        self.keep = False
        if how == "reset":
            self.reset()
        elif how == "hang":
            self.wait_until(released)


class Server:
    """An HTTP/1.1 server on a free loopback port, a thread per connection.

    Subclasses say how to answer. Everything it received is in `hits`; `with` starts and stops it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._hits: list[Hit] = []
        self._connections: set[socket.socket] = set()
        self._numbers = itertools.count(1)
        self._gates: dict[str, Gate] = {}
        self._released = threading.Event()
        self._closing = False
        self.accepted = 0
        self.faults: list[str] = []  # Exceptions in the double itself; a test run must have none.
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(1024)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    # What a test asks.

    def hits(self, containing: str = "") -> list[Hit]:
        """The requests so far whose target contains the text, oldest first."""
        with self._lock:
            return [hit for hit in self._hits if containing in hit.target]

    def wait_for(self, count: int, containing: str = "", seconds: float = 15.0) -> list[Hit]:
        """The matching requests once there are at least `count`; fails when they do not come."""
        deadline = time.monotonic() + seconds
        while True:
            with self._changed:
                found = [hit for hit in self._hits if containing in hit.target]
                if len(found) >= count:
                    return found
                if not self._changed.wait(max(0.0, min(0.5, deadline - time.monotonic()))):
                    assert time.monotonic() < deadline, (
                        f"{len(found)} of {count} requests for {containing!r} came"
                    )

    def wait_ended(self, hit: Hit, seconds: float = 15.0) -> str:
        """How the exchange ended, once it has: "answered" or "gone"."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while hit.ended == "open":
                assert time.monotonic() < deadline, f"{hit.target} never ended"
                self._changed.wait(0.1)
            return hit.ended

    def clear(self) -> None:
        """Forget the past: recorded requests, gates and releases."""
        with self._lock:
            self._hits.clear()
            self._gates.clear()
            self._released.set()
            self._released = threading.Event()

    def gate(self, name: str) -> Gate:
        with self._lock:
            return self._gates.setdefault(name, Gate())

    def release(self) -> None:
        """End everything that hangs now; what hangs later hangs again after `clear()`."""
        self._released.set()

    # How it serves.

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="double-accept", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing = True
        self._released.set()
        # A blocked accept() is woken by shutdown, not by close.
        for sock in [self._listener, *self._connections]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if kind is None:
            assert not self.faults, self.faults

    def respond(self, exchange: Exchange) -> None:
        raise NotImplementedError

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add(sock)
                self.accepted += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        number = next(self._numbers)
        try:
            for exchange in self._requests(sock, number):
                how = "answered"
                try:
                    self.respond(exchange)
                except Gone:
                    how, exchange.keep = "gone", False
                # Whoever waits for the exchange's end may rely on the connection's end too.
                if not exchange.keep:
                    sock.close()
                self._end(exchange.hit, how)
                if not exchange.keep:
                    return
        except (OSError, Gone):
            pass
        except Exception as error:
            # A thread's exception would otherwise vanish and the test blame the gateway.
            self.faults.append(repr(error))
        finally:
            with self._lock:
                self._connections.discard(sock)
            sock.close()

    def _end(self, hit: Hit, how: str) -> None:
        with self._changed:
            hit.ended = how
            self._changed.notify_all()

    def _requests(self, sock: socket.socket, number: int) -> Iterator[Exchange]:
        buffer = b""
        for served in itertools.count():
            while b"\r\n\r\n" not in buffer:
                data = sock.recv(65536)
                if not data or len(buffer) > HEAD_LIMIT:
                    return
                buffer += data
            raw_head, _, buffer = buffer.partition(b"\r\n\r\n")
            request_line, *lines = raw_head.decode("latin-1").split("\r\n")
            method, target, _ = request_line.split(" ", 2)
            headers = [(k.strip(), v.strip()) for k, _, v in (li.partition(":") for li in lines)]
            fields = {name.lower(): value for name, value in headers}
            if fields.get("expect", "").lower() == "100-continue":
                sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if "chunked" in fields.get("transfer-encoding", "").lower():
                body, buffer = _read_chunked(sock, buffer)
            else:
                body, buffer = _read_exactly(sock, buffer, int(fields.get("content-length", "0")))
            hit = Hit(method, target, headers, body, time.monotonic(), number, served > 0, raw_head)
            with self._changed:
                self._hits.append(hit)
                self._changed.notify_all()
            yield Exchange(sock, hit, keep=fields.get("connection", "").lower() != "close")


def _read_exactly(sock: socket.socket, buffer: bytes, size: int) -> tuple[bytes, bytes]:
    if size > BODY_LIMIT:
        raise Gone
    pieces = [buffer]
    have = len(buffer)
    while have < size:
        data = sock.recv(65536)
        if not data:
            raise Gone
        pieces.append(data)
        have += len(data)
    whole = b"".join(pieces)
    return whole[:size], whole[size:]


def _read_chunked(sock: socket.socket, buffer: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        while b"\r\n" not in buffer:
            data = sock.recv(65536)
            if not data:
                raise Gone
            buffer += data
        line, _, buffer = buffer.partition(b"\r\n")
        size = int(line.split(b";")[0], 16)
        data, buffer = _read_exactly(sock, buffer, size + 2)
        if size == 0:
            return body, buffer
        body += data[:-2]


Behaviour = Callable[["Upstream", Exchange], None]


class Upstream(Server):
    """A paid API that answers, or fails, the way the path asks it to (see the module's list)."""

    behaviours: ClassVar[dict[str, Behaviour]] = {}

    def respond(self, exchange: Exchange) -> None:
        words = [unquote(word) for word in exchange.hit.path.split("/") if word]
        # A route may forward under a prefix of its own (/api/v1/…): the first known word counts.
        for index, word in enumerate(words):
            if word in self.behaviours:
                exchange.parts = words[index + 1 :]
                self.behaviours[word](self, exchange)
                return
        exchange.json(404, {"error": "the double knows no such behaviour", "path": words})

    @property
    def released(self) -> threading.Event:
        return self._released


def behaviour(name: str) -> Callable[[Behaviour], Behaviour]:
    """Register what `Upstream` does for a path word."""

    def register(function: Behaviour) -> Behaviour:
        Upstream.behaviours[name] = function
        return function

    return register


def _echo(hit: Hit) -> dict[str, object]:
    return {
        "method": hit.method,
        "target": hit.target,
        "headers": hit.headers,
        "body": hit.body.decode("utf-8", "replace"),
    }


@behaviour("ok")
def _ok(server: Upstream, exchange: Exchange) -> None:
    exchange.json(200, _echo(exchange.hit))


@behaviour("status")
def _status(server: Upstream, exchange: Exchange) -> None:
    status = exchange.number(0)
    query = exchange.hit.query
    headers = [("Retry-After", query["retry_after"])] if "retry_after" in query else []
    body = query.get("body", json.dumps({"upstream": "says", "status": status}))
    exchange.answer(status, b"" if status == 204 else body.encode(), headers)


@behaviour("reset")
def _reset(server: Upstream, exchange: Exchange) -> None:
    exchange.reset()


@behaviour("close")
def _close(server: Upstream, exchange: Exchange) -> None:
    exchange.close()


@behaviour("close-reused")
def _close_reused(server: Upstream, exchange: Exchange) -> None:
    if exchange.hit.reused:
        exchange.close()
    else:
        exchange.json(200, {"fresh": True})


@behaviour("ok-then-close")
def _ok_then_close(server: Upstream, exchange: Exchange) -> None:
    exchange.json(200, _echo(exchange.hit))
    exchange.close()


@behaviour("hang")
def _hang(server: Upstream, exchange: Exchange) -> None:
    exchange.keep = False
    if not exchange.wait_until(server.released):
        raise Gone


@behaviour("slow")
def _slow(server: Upstream, exchange: Exchange) -> None:
    time.sleep(exchange.number(0) / 1000)
    exchange.json(200, _echo(exchange.hit))


@behaviour("head-then-hang")
def _head_then_hang(server: Upstream, exchange: Exchange) -> None:
    exchange.head(200, [("Content-Type", "application/json"), ("Content-Length", "100")])
    exchange.keep = False
    if not exchange.wait_until(server.released):
        raise Gone


@behaviour("drip")
def _drip(server: Upstream, exchange: Exchange) -> None:
    count = exchange.number(1)
    exchange.head(200, [("Content-Type", "text/plain"), ("Content-Length", str(count))])
    for _ in range(count):
        time.sleep(exchange.number(0) / 1000)
        exchange.send(b".")


@behaviour("cut")
def _cut(server: Upstream, exchange: Exchange) -> None:
    declared, sent = exchange.number(0), exchange.number(1)
    exchange.head(200, [("Content-Type", "application/json"), ("Content-Length", str(declared))])
    exchange.send(b"x" * sent)
    exchange.end(exchange.hit.query.get("how", "close"), server.released)


@behaviour("cut-chunked")
def _cut_chunked(server: Upstream, exchange: Exchange) -> None:
    exchange.head(200, [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")])
    for _ in range(exchange.number(0)):
        exchange.chunk(b'{"half": ')
    exchange.end(exchange.hit.query.get("how", "close"), server.released)


@behaviour("bad-chunk")
def _bad_chunk(server: Upstream, exchange: Exchange) -> None:
    exchange.head(200, [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")])
    exchange.send(b"five\r\nhello\r\n0\r\n\r\n")
    exchange.close()


@behaviour("garbage-status")
def _garbage_status(server: Upstream, exchange: Exchange) -> None:
    exchange.send(b"\x16\x03\x01 ICY nonsense \xff\xfe\r\nmore\r\n\r\n")
    exchange.close()


@behaviour("garbage-headers")
def _garbage_headers(server: Upstream, exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nthis is no header\r\n: nor this\r\n\xff\xfe\r\n\r\nhello")
    exchange.close()


@behaviour("huge-headers")
def _huge_headers(server: Upstream, exchange: Exchange) -> None:
    huge = "h" * exchange.number(0, 1_000_000)
    exchange.answer(200, b"{}", [("X-Quota", huge)])
    exchange.close()


@behaviour("many-headers")
def _many_headers(server: Upstream, exchange: Exchange) -> None:
    exchange.answer(200, b"{}", [(f"X-{n}", "h") for n in range(exchange.number(0, 10_000))])
    exchange.close()


@behaviour("nul-header")
def _nul_header(server: Upstream, exchange: Exchange) -> None:
    exchange.answer(200, b"{}", [("X-Quota", "before\0after")])
    exchange.close()


@behaviour("extra-bytes")
def _extra_bytes(server: Upstream, exchange: Exchange) -> None:
    # Whoever reuses this connection without noticing would take the rest for the next answer.
    exchange.answer(200, b'{"mine": true}')
    try:
        exchange.send(b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"stolen": true}\n')
    finally:
        server.gate("spilt").let()


@behaviour("bad-length")
def _bad_length(server: Upstream, exchange: Exchange) -> None:
    length = exchange.parts[0] if exchange.parts else "many"
    exchange.head(200, [("Content-Type", "application/json"), ("Content-Length", length)])
    exchange.send(b'{"how": "long"}')
    exchange.close()


@behaviour("two-lengths")
def _two_lengths(server: Upstream, exchange: Exchange) -> None:
    exchange.head(
        200,
        [("Content-Type", "application/json"), ("Content-Length", "2"), ("Content-Length", "9")],
    )
    exchange.send(b'{"a": 12}')
    exchange.close()


@behaviour("interim")
def _interim(server: Upstream, exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    exchange.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n")
    exchange.json(200, _echo(exchange.hit))


@behaviour("until-close")
def _until_close(server: Upstream, exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    exchange.send(b"z" * exchange.number(0))
    exchange.close()


@behaviour("big")
def _big(server: Upstream, exchange: Exchange) -> None:
    size = exchange.number(0, 2 * 1024 * 1024)
    query = exchange.hit.query
    stop = min(size, int(query.get("cut", size)))
    chunked = "chunked" in query
    length = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(size))
    exchange.head(200, [("Content-Type", "application/octet-stream"), length])
    for start in range(0, stop, 65536):
        piece = b"B" * min(65536, stop - start)
        if chunked:
            exchange.chunk(piece)
        else:
            exchange.send(piece)
    if stop < size:
        exchange.end(query.get("how", "close"), server.released)
    elif chunked:
        exchange.send(b"0\r\n\r\n")


def sse_event(index: int) -> bytes:
    """The index-th event `/sse` sends."""
    return f'data: {{"event": {index}}}\n\n'.encode()


def ndjson_event(index: int) -> bytes:
    """The index-th line `/ndjson` sends."""
    return f'{{"event": {index}}}\n'.encode()


def _events(
    server: Upstream, exchange: Exchange, content_type: str, event: Callable[[int], bytes]
) -> None:
    query = exchange.hit.query
    count = exchange.number(0)
    cut = int(query.get("cut", count))
    gate = server.gate(query["gate"]) if "gate" in query else None
    exchange.head(200, [("Content-Type", content_type), ("Transfer-Encoding", "chunked")])
    for index in range(min(count, cut)):
        if gate and not gate.wait(exchange.wanted):
            raise Gone
        time.sleep(int(query.get("delay_ms", "0")) / 1000)
        exchange.chunk(event(index))
    if cut < count:
        if gate and not gate.wait(exchange.wanted):
            raise Gone
        exchange.end(query.get("how", "close"), server.released)
    else:
        exchange.send(b"0\r\n\r\n")


@behaviour("sse")
def _sse(server: Upstream, exchange: Exchange) -> None:
    _events(server, exchange, "text/event-stream; charset=utf-8", sse_event)


@behaviour("ndjson")
def _ndjson(server: Upstream, exchange: Exchange) -> None:
    _events(server, exchange, "application/x-ndjson", ndjson_event)


@behaviour("redirect")
def _redirect(server: Upstream, exchange: Exchange) -> None:
    to = exchange.hit.query.get("to", f"{server.url}{exchange.hit.target}")
    exchange.answer(exchange.number(0, 302), b"{}", [("Location", to)])


@behaviour("empty")
def _empty(server: Upstream, exchange: Exchange) -> None:
    exchange.answer(204)


@behaviour("units")
def _units(server: Upstream, exchange: Exchange) -> None:
    query = exchange.hit.query
    count = exchange.parts[0] if exchange.parts else "1"
    body = query.get("json", f'{{"usage": {{"pages": {count}}}}}')
    exchange.answer(200, body.encode(), [("X-Units", query.get("header", count))])


@behaviour("gzip")
def _gzip(server: Upstream, exchange: Exchange) -> None:
    body = gzip.compress(json.dumps(_echo(exchange.hit)).encode())
    exchange.answer(200, body, [("Content-Encoding", "gzip")])


@behaviour("secrets")
def _secrets(server: Upstream, exchange: Exchange) -> None:
    exchange.json(
        200,
        {"ok": True},
        [
            ("Set-Cookie", "provider_session=provider-cookie-canary; Path=/"),
            ("X-Api-Key", "provider-key-canary"),
            ("Authorization", "Bearer provider-bearer-canary"),
            ("X-Amz-Security-Token", "provider-token-canary"),
            ("Server", "provider-server-canary"),
            ("X-Quota", "41"),
            ("Access-Control-Allow-Origin", "*"),
            ("Strict-Transport-Security", "max-age=1"),
            ("Content-Security-Policy", "default-src *"),
            ("X-Credits-Charged", "999"),
            ("X-Credits-Remaining", "999"),
            ("Content-Language", "en"),
        ],
    )


@behaviour("leaky")
def _leaky(server: Upstream, exchange: Exchange) -> None:
    key = exchange.hit.header("X-Api-Key")
    exchange.json(
        exchange.number(0),
        {"error": {"message": f"Incorrect API key provided: {key}."}},
        [("Location", f"/ok/moved?key={key}"), ("X-Quota", f"0 left for {key}")],
    )


@behaviour("gated")
def _gated(server: Upstream, exchange: Exchange) -> None:
    if not server.gate(exchange.parts[0]).wait(exchange.wanted):
        raise Gone
    exchange.json(200, _echo(exchange.hit))


# What Twilio answers for its documented magic numbers, and for a few of our own choosing.
TWILIO_REFUSALS = {
    "+15005550001": (21211, "The 'To' number {to} is not a valid phone number."),
    "+15005550002": (21612, "The 'To' phone number: {to}, is not currently reachable via SMS."),
    "+15005550003": (
        21408,
        "Permission to send an SMS has not been enabled for the region indicated by the 'To' "
        "number: {to}",
    ),
    "+15005550004": (21610, "Attempt to send to unsubscribed recipient"),
    "+15005550009": (21614, "To number: {to}, is not a mobile number"),
}
TWILIO_BUSY = "+15005550429"  # 429 with Retry-After: 7
TWILIO_BROKEN = "+15005550500"  # 500
TWILIO_RESETS = "+15005550502"  # the connection is reset: nobody knows whether it was sent
TWILIO_HANGS = "+15005550504"  # no answer until released

_GSM_BASIC = frozenset(
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?"
    "¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà"
)
_GSM_EXTENDED = frozenset("^{}\\[~]|€\f")


def sms_segments(text: str) -> int:
    """How many segments a text takes: GSM 03.38 at 160/153 septets, else UCS-2 at 70/67 units."""
    if all(char in _GSM_BASIC or char in _GSM_EXTENDED for char in text):
        widths = [2 if char in _GSM_EXTENDED else 1 for char in text]
        single, joined = 160, 153
    else:
        widths = [2 if ord(char) > 0xFFFF else 1 for char in text]
        single, joined = 70, 67
    if sum(widths) <= single:
        return 1
    # A two-unit character is never split between segments, so count them as they are filled.
    segments, used = 1, 0
    for width in widths:
        if used + width > joined:
            segments, used = segments + 1, 0
        used += width
    return segments


class Twilio(Server):
    """Twilio's Messages resource: Basic auth, a form in, the real JSON out, magic numbers."""

    def __init__(self, account_sid: str = "AC" + "0" * 32, auth_token: str = "token") -> None:
        super().__init__()
        self.account_sid = account_sid
        self.auth_token = auth_token
        self.sent: list[dict[str, str]] = []  # The messages accepted, as their form fields.

    def respond(self, exchange: Exchange) -> None:
        hit = exchange.hit
        if hit.path != f"/2010-04-01/Accounts/{self.account_sid}/Messages.json":
            self._refuse(exchange, 404, 20404, f"The requested resource {hit.path} was not found")
            return
        secret = base64.b64encode(f"{self.account_sid}:{self.auth_token}".encode()).decode()
        if hit.header("Authorization") != f"Basic {secret}":
            self._refuse(exchange, 401, 20003, "Authenticate")
            return
        if hit.method != "POST":
            self._refuse(exchange, 405, 20004, "Method not allowed")
            return
        form = dict(parse_qsl(hit.body.decode(), keep_blank_values=True))
        to, sender, text = form.get("To", ""), form.get("From", ""), form.get("Body", "")
        if hit.header("Content-Type") != "application/x-www-form-urlencoded" or not to:
            self._refuse(exchange, 400, 21604, "A 'To' phone number is required.")
        elif not sender:
            self._refuse(exchange, 400, 21603, "A 'From' phone number is required.")
        elif not text:
            self._refuse(exchange, 400, 21602, "Message body is required.")
        elif to in TWILIO_REFUSALS:
            code, message = TWILIO_REFUSALS[to]
            self._refuse(exchange, 400, code, message.format(to=to))
        elif to == TWILIO_BUSY:
            self._refuse(exchange, 429, 20429, "Too Many Requests", [("Retry-After", "7")])
        elif to == TWILIO_BROKEN:
            self._refuse(exchange, 500, 20500, "An internal server error has occurred")
        elif to == TWILIO_RESETS:
            exchange.reset()
        elif to == TWILIO_HANGS:
            exchange.keep = False
            if not exchange.wait_until(self._released):
                raise Gone
        else:
            self._send(exchange, form)

    def _refuse(
        self,
        exchange: Exchange,
        status: int,
        code: int,
        message: str,
        headers: list[tuple[str, str]] | None = None,
    ) -> None:
        info = f"https://www.twilio.com/docs/errors/{code}"
        exchange.json(
            status,
            {"code": code, "message": message, "more_info": info, "status": status},
            headers,
        )

    def _send(self, exchange: Exchange, form: dict[str, str]) -> None:
        with self._lock:
            self.sent.append(form)
            sid = f"SM{len(self.sent):032x}"
        uri = f"/2010-04-01/Accounts/{self.account_sid}/Messages/{sid}"
        date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime())
        exchange.json(
            201,
            {
                "account_sid": self.account_sid,
                "api_version": "2010-04-01",
                "body": form["Body"],
                "date_created": date,
                "date_sent": None,
                "date_updated": date,
                "direction": "outbound-api",
                "error_code": None,
                "error_message": None,
                "from": form["From"],
                "messaging_service_sid": None,
                "num_media": "0",
                "num_segments": str(sms_segments(form["Body"])),
                "price": None,
                "price_unit": "USD",
                "sid": sid,
                "status": "queued",
                "subresource_uris": {"media": f"{uri}/Media.json"},
                "to": form["To"],
                "uri": f"{uri}.json",
            },
            [("Twilio-Request-Id", f"RQ{len(self.sent):032x}"), ("X-Powered-By", "AT-5000")],
        )
