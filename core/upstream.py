"""The outbound call and its hygiene.

libcurl speaks HTTP; this module decides what it may do: no redirects, no proxies or credentials
from the environment, TLS verified, one attempt for anything that is not idempotent, and a bound on
every wait. A reply can be read whole or in chunks as they arrive.
"""

import logging
import math
import re
import select
import ssl
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import pycurl

from core import clock, errors

log = logging.getLogger("farebox.upstream")

_IDLE_WIRES = 256
_BUFFER_BYTES = 64 * 1024
_HEADERS_LIMIT = 128
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: .*)?\r?\n", re.DOTALL)
_SAFE_VALUE = re.compile(r"[\x20-\x7e\t]*")
_HANGS_UP = getattr(select, "POLLRDHUP", 0)  # elsewhere than on Linux it is seen a little later
_VERIFY = ssl.get_default_verify_paths()


class Outbound(NamedTuple):
    """A request to an upstream, complete."""

    method: str
    url: str
    headers: list[tuple[str, str]]
    body: bytes
    timeout_seconds: float  # to connect, to the first byte, and the longest silence after it
    max_seconds: float  # the whole call


class Unreached(errors.Refusal):
    """The upstream could not be reached: no part of the request was sent."""


class Reply(Protocol):
    """An upstream's answer whose head has arrived."""

    status: int
    headers: dict[str, str]  # by lower-case name; of a repeated one, the last

    def read(self, limit: int) -> tuple[bytes, bool]:
        """Up to about `limit` bytes of the body, and whether that was all of it.

        Raises `provider_error` or `provider_timeout` when the body breaks off.
        """

    def chunks(self, beat_seconds: float = math.inf, caller: int | None = None) -> Iterator[bytes]:
        """What `read` has not returned, as it arrives, and an empty chunk whenever nothing has come
        for `beat_seconds`. Raises as `read` does.

        Where that is a limit, an empty chunk comes too as soon as whoever is at the other end of
        the socket `caller` hangs up: to be spoken to is how they are found to have left.
        """

    def finish(self, seconds: float) -> None:
        """Close, after waiting so long at most for an end that must be near: a connection whose
        answer was read to its end can be used again."""

    def close(self) -> None:
        """Let the connection go; harmless when repeated."""


class Wires:
    """This process's kept connections to upstreams."""

    def __init__(self) -> None:
        self._idle: dict[str, deque[_Wire]] = {}

    def send(self, request: Outbound) -> Reply:
        """Send a request and wait for the head of the answer.

        Raises `provider_error` or `provider_timeout`. Never called inside a transaction.
        """
        idle = self._idle.setdefault(_origin(request.url), deque())
        return _HttpReply(idle, self._take(idle), request)

    def _take(self, idle: "deque[_Wire]") -> "_Wire":
        """The most recently used wire whose connection is alive, or a new one."""
        while True:
            try:
                wire = idle.pop()
            except IndexError:
                return _Wire()
            if wire.is_quiet():
                return wire
            wire.close()

    def close(self) -> None:
        """Close the connections that are kept."""
        for idle in self._idle.values():
            while idle:
                idle.pop().close()


def ask(request: Outbound, limit: int) -> tuple[int, bytes]:
    """Status and body of an answer of up to `limit` bytes; of a larger one, no body.

    Over a connection of its own, which is closed after it: one that was kept may be dead, and then
    nobody knows what was read. Raises as `Wires.send` does.
    """
    wires = Wires()
    try:
        reply = wires.send(request)
        try:
            body, whole = reply.read(limit)
        finally:
            reply.close()
        return reply.status, body if whole else b""
    finally:
        wires.close()


class _Wire:
    """One libcurl multi handle with one transfer, driven by poll(2): no limit on descriptors."""

    def __init__(self) -> None:
        self.easy = pycurl.Curl()
        self._multi = pycurl.CurlMulti()
        self._poll = select.poll()
        self._timer: float | None = None
        self._descriptor = -1
        self._watched: int | None = None
        self.hung_up = False  # whoever is watched did, and nobody has looked yet
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._on_socket)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._on_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, 1)

    def is_quiet(self) -> bool:
        """Whether nothing came over the kept connection since its last answer, not even its end.

        What came would be read as the answer to the next request. libcurl looks for itself, but at
        most once a second.
        """
        if self._descriptor < 0:
            return True
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        self._multi.close()
        self.easy.close()

    def start(self) -> None:
        self._multi.add_handle(self.easy)

    def watch(self, descriptor: int) -> None:
        """Until `stop`, look also for the other side of this socket to hang up."""
        self._watched = descriptor
        self._poll.register(descriptor, _HANGS_UP)

    def _look(self, event: int) -> None:
        """What came of the watched socket: first, perhaps, that the other side says no more, which
        one who still reads may do; then that there is nobody."""
        assert self._watched is not None
        self.hung_up = True
        if event & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
            self._poll.unregister(self._watched)
            self._watched = None
        else:
            self._poll.modify(self._watched, 0)

    def stop(self) -> None:
        if self._watched is not None:
            self._poll.unregister(self._watched)
        self._watched, self.hung_up = None, False
        self._descriptor = self.easy.getinfo(pycurl.ACTIVESOCKET)  # -1 when it is closed
        self._multi.remove_handle(self.easy)
        self.easy.reset()  # also lets go of the callbacks, and so of the reply

    def step(self, patience_ms: int) -> tuple[int, str] | bool:
        """Wait for the network at most `patience_ms` and let libcurl act.

        True: go on. False: the transfer is complete. A pair: libcurl's error code and words.
        """
        left_ms = patience_ms
        if self._timer is not None:
            left_ms = min(patience_ms, math.ceil((self._timer - clock.monotonic()) * 1000))
        if left_ms <= 0:
            self._expire()
        else:
            events = self._poll.poll(left_ms)
            for descriptor, event in events:
                if descriptor == self._watched:
                    self._look(event)
                    continue
                readable = pycurl.CSELECT_IN if event & ~select.POLLOUT else 0
                writable = pycurl.CSELECT_OUT if event & select.POLLOUT else 0
                self._multi.socket_action(descriptor, readable | writable)
            if not events and left_ms < patience_ms:
                self._expire()
        _, done, failed = self._multi.info_read()
        if failed:
            return failed[0][1], failed[0][2]
        return not done

    def _on_socket(self, what: int, descriptor: int, _multi: object, _data: object) -> None:
        if what == pycurl.POLL_REMOVE:
            self._poll.unregister(descriptor)
            return
        events = select.POLLIN if what & pycurl.POLL_IN else 0
        self._poll.register(descriptor, events | (select.POLLOUT if what & pycurl.POLL_OUT else 0))

    def _on_timer(self, milliseconds: int) -> None:
        self._timer = None if milliseconds < 0 else clock.monotonic() + milliseconds / 1000

    def _expire(self) -> None:
        """Tell libcurl that the moment it asked for has come."""
        self._timer = None
        self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)


class _HttpReply:
    """A reply over the network. One thread at a time reads it."""

    def __init__(self, idle: "deque[_Wire]", wire: _Wire, request: Outbound) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._idle = idle
        self._wire: _Wire | None = wire
        self._request = request
        self._sent = 0
        self._head_done = False
        self._complete = False
        self._failure: errors.Refusal | None = None
        self._arrived: list[bytes] = []
        self._quiet_until = 0.0
        self._set_up(wire.easy)
        wire.start()
        try:
            self._touch()
            while not self._head_done:
                self._advance()
                if not self._head_done and self._failure is not None:
                    raise self._failure
                if not self._head_done and self._complete:
                    raise errors.provider_error("The upstream's answer has no head.")
        except BaseException:
            self.close()
            raise

    def read(self, limit: int) -> tuple[bytes, bool]:
        size = sum(map(len, self._arrived))
        while not self._ended and size <= limit:
            have = len(self._arrived)
            self._advance()
            size += sum(map(len, self._arrived[have:]))
        # Whether an answer is too large is decided by its size alone, never by how it arrived.
        if self._failure is not None and size <= limit:
            raise self._failure
        body, self._arrived = b"".join(self._arrived), []
        return body, self._complete and size <= limit

    def chunks(self, beat_seconds: float = math.inf, caller: int | None = None) -> Iterator[bytes]:
        if caller is not None and beat_seconds < math.inf and self._wire is not None:
            self._wire.watch(caller)
        while True:
            arrived, self._arrived = self._arrived, []
            if arrived:
                yield b"".join(arrived)  # libcurl gives each part of a chunked body by itself
            self._touch()  # what the client took to read is not the upstream's silence
            beat_at = clock.monotonic() + beat_seconds
            while not self._arrived:
                if self._failure is not None:
                    raise self._failure
                if self._complete:
                    return
                if clock.monotonic() >= beat_at or self._hung_up():
                    began = clock.monotonic()
                    yield b""
                    beat_at = clock.monotonic() + beat_seconds
                    self._quiet_until += clock.monotonic() - began
                self._advance(beat_at)

    def finish(self, seconds: float) -> None:
        until = clock.monotonic() + seconds
        while not self._ended and clock.monotonic() < until:
            self._advance(until)
            self._arrived = []
        self.close()

    def close(self) -> None:
        wire, self._wire = self._wire, None
        if wire is None:
            return
        wire.stop()  # closes the connection too when the answer was not read to its end
        if len(self._idle) < _IDLE_WIRES:
            self._idle.append(wire)
        else:
            wire.close()

    def _hung_up(self) -> bool:
        """Whether the caller did, since this was asked last."""
        wire = self._wire
        if wire is None or not wire.hung_up:
            return False
        wire.hung_up = False
        return True

    @property
    def _ended(self) -> bool:
        return self._complete or self._failure is not None

    def _advance(self, until: float = math.inf) -> None:
        """Let the transfer go on until something happens, or that moment. A failure is kept, to be
        raised by whoever has taken what arrived before it."""
        if self._wire is None:
            self._failure = errors.provider_error("The upstream's answer was given up.")
            return
        now = clock.monotonic()
        if now >= self._quiet_until:
            self._fail(pycurl.E_OPERATION_TIMEDOUT, "silence")
            return
        state = self._wire.step(max(1, int((min(self._quiet_until, until) - now) * 1000)))
        if isinstance(state, tuple):
            self._fail(*state)
        elif state is False:
            self._complete = True
            self.close()

    def _fail(self, code: int, words: str) -> None:
        log.warning("upstream %s: curl %d: %s", _origin(self._request.url), code, words)
        wire = self._wire
        was_reached = wire is None or wire.easy.getinfo(pycurl.REQUEST_SIZE) > 0
        self.close()
        if code == pycurl.E_OPERATION_TIMEDOUT:
            failure = errors.provider_timeout()
        elif self._head_done:
            failure = errors.provider_error("The upstream broke its answer off.")
        else:
            failure = errors.provider_error("The upstream could not be reached.")
        if not was_reached:
            failure = Unreached(failure.code, failure.message, fields=failure.fields)
        self._failure = failure

    def _touch(self) -> None:
        self._quiet_until = clock.monotonic() + self._request.timeout_seconds

    # libcurl's callbacks

    def _on_header(self, line: bytes) -> None:
        self._touch()
        if self._head_done:
            return  # a trailer
        start = _STATUS_LINE.fullmatch(line)
        if start:
            self.status = int(start[1])
            self.headers = {}
        elif line.strip():
            name, _, value = line.decode("latin-1").partition(":")
            value = value.strip()
            # What could not be sent on as a header is not kept.
            if _SAFE_VALUE.fullmatch(value) and len(self.headers) < _HEADERS_LIMIT:
                self.headers[name.strip().lower()] = value
        elif self.status >= 200:  # the heads before it were 1xx
            self._head_done = True

    def _on_body(self, data: bytes) -> int:
        if not self._head_done:
            return 0  # a body without a head we understand: libcurl gives up
        self._touch()
        self._arrived.append(data)
        return len(data)

    def _on_send(self, size: int) -> bytes:
        self._touch()
        part = self._request.body[self._sent : self._sent + size]
        self._sent += len(part)
        return part

    def _set_up(self, easy: pycurl.Curl) -> None:
        request = self._request
        set_option = easy.setopt
        set_option(pycurl.URL, request.url)
        set_option(pycurl.CUSTOMREQUEST, request.method)
        headers = [
            # Latin-1 gives the caller's bytes back as they came (PEP 3333).
            (f"{name}: {value}" if value else f"{name};").encode("latin-1")
            for name, value in request.headers
        ]
        headers += [b"Accept-Encoding: identity", b"Expect:"]
        if request.method == "HEAD":
            set_option(pycurl.NOBODY, 1)
        elif request.body or request.method not in ("GET", "DELETE"):
            set_option(pycurl.POST, 1)
            set_option(pycurl.POSTFIELDSIZE_LARGE, len(request.body))
            # The body comes from a callback that cannot be rewound. libcurl would otherwise send
            # it again by itself when a kept connection dies, and a message would go out twice.
            set_option(pycurl.READFUNCTION, self._on_send)
            if not request.body:
                set_option(pycurl.FRESH_CONNECT, 1)  # no body to rewind: no kept connection to die
        elif request.method != "GET":
            set_option(pycurl.FRESH_CONNECT, 1)
        if not any(name.lower() == "content-type" for name, _ in request.headers):
            headers.append(b"Content-Type:")
        set_option(pycurl.HTTPHEADER, headers)
        set_option(pycurl.HEADERFUNCTION, self._on_header)
        set_option(pycurl.WRITEFUNCTION, self._on_body)
        set_option(pycurl.CONNECTTIMEOUT_MS, int(request.timeout_seconds * 1000))
        set_option(pycurl.TIMEOUT_MS, int(request.max_seconds * 1000))
        set_option(pycurl.BUFFERSIZE, _BUFFER_BYTES)
        set_option(pycurl.PATH_AS_IS, 1)
        set_option(pycurl.USERAGENT, "farebox")
        set_option(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        _trust(easy)


def _origin(url: str) -> str:
    """Scheme and host of a URL: all of it that a log may have."""
    return "/".join(url.split("/", 3)[:3])


def reach(url: str, patience_seconds: int) -> str | None:
    """Connect to an upstream, with TLS if it has it, and send nothing: the problem, or None."""
    easy = pycurl.Curl()
    easy.setopt(pycurl.URL, url)
    easy.setopt(pycurl.CONNECT_ONLY, 1)
    easy.setopt(pycurl.CONNECTTIMEOUT, patience_seconds)
    _trust(easy)
    try:
        easy.perform()
    except pycurl.error as error:
        return easy.errstr() or str(error)
    finally:
        easy.close()
    return None


def _trust(easy: pycurl.Curl) -> None:
    """How every connection is made: no proxy from the environment, the system's certificates."""
    easy.setopt(pycurl.NOSIGNAL, 1)
    easy.setopt(pycurl.PROXY, "")
    easy.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
    if _VERIFY.cafile:
        easy.setopt(pycurl.CAINFO, _VERIFY.cafile)
    if _VERIFY.capath:
        easy.setopt(pycurl.CAPATH, _VERIFY.capath)
