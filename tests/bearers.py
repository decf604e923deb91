"""What tests of session tokens share: our own signing key, every worker, and that nothing moved."""

from __future__ import annotations

import json
import re
import select
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from doubles import Upstream
from inprocess import Box, Payer
from issuer import changed, pem_of, seal, unb64
from server import Answer, Farebox
from urllib3 import HTTPHeaderDict

T = TypeVar("T")
TYPE = "farebox-session+jwt"
LONGEST_CREDENTIAL = 8192
CONFIG = """
[upstreams.sandbox]
kind = "sandbox"

[upstreams.double]
kind = "http"
base_url = "{url}"

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
scope = "sms:send"
credits = 1
per = "sms_segment"

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST"]
upstream = "double"
upstream_path = "/*"
credits = 1
scope = "up"

[limits]
requests_per_minute = 1000000
concurrent_calls = 1000
"""


def mint(box: Box | Farebox, who: Payer | str) -> str:
    """A session token of a new sign-in, as the operator gives it."""
    name = who.email if isinstance(who, Payer) else who
    if isinstance(box, Farebox):
        return box.set_up("tokens", "mint", name)
    made = box.cli("tokens", "mint", name)
    assert made.exit_code == 0, made.output
    token: str = made.stdout.strip()
    return token


def refreshed(box: Box | Farebox, token: str, account: str | None = None) -> str:
    """Another token of the same sign-in."""
    wish = {} if account is None else {"account": account}
    answer = box.post("/api/v1/session-tokens", token, wish)
    assert answer.status == 201, answer.body
    made: str = answer.json()["token"]
    return made


def paid(box: Box | Farebox, token: str | None, path: str = "/ok/paid") -> Answer:
    """One paid call."""
    return box.post(f"/api/v1/up{path}", token)


class OwnKey:
    """The key an instance signs its tokens with, read from its folder: to lie with it."""

    def __init__(self, folder: Path, number: int = 0) -> None:
        listed = json.loads((folder / "signing_keys.json").read_text("utf-8"))["keys"]
        self.kid: str = listed[number]["kid"]
        secret = int.from_bytes(unb64(listed[number]["d"]), "big")
        self.key = ec.derive_private_key(secret, ec.SECP256R1())
        self.pem = pem_of(self.key.public_key())

    def sign(self, claims: dict[str, Any], header_changes: dict[str, Any]) -> str:
        header = {"alg": "ES256", "kid": self.kid, "typ": TYPE}
        return seal(changed(header, header_changes), claims, self.key)


class Standstill:
    """`with Standstill(box, upstream):` nobody is charged, recorded, made or asked meanwhile."""

    _TABLES = ("call", "entry", "session_token", "session", "user", "account", "api_key", "audit")

    def __init__(self, box: Box, upstream: Upstream) -> None:
        self._box = box
        self._upstream = upstream

    def __enter__(self) -> Self:
        self._before = self._look()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            assert self._look() == self._before

    def _look(self) -> list[object]:
        found: list[object] = [
            self._box.row(f"SELECT COUNT(*) FROM {table}")[0] for table in self._TABLES
        ]
        found.append(self._box.row("SELECT SUM(balance), SUM(held) FROM account"))
        found.append(len(self._upstream.hits()))
        return found


def refused_well(token: str, answer: Answer) -> bool:
    """Whether a bad token got the answer that such a token gets, and no other."""
    visible = all(" " <= letter <= "~" and letter != "," for letter in token)
    if not visible or len(f"Bearer {token}") > LONGEST_CREDENTIAL:
        return (answer.status, answer.code) == (400, "validation_error")
    wanted = "invalid_token" if token.startswith("eyJ") else "invalid_api_key"
    challenge = answer.headers.get("WWW-Authenticate", "")
    return (answer.status, answer.code) == (401, wanted) and challenge.startswith("Bearer")


def accepted(box: Box, tokens: dict[str, str]) -> dict[str, tuple[int, str | None]]:
    """Those of the bad tokens that a paid route did not refuse as it should."""
    found = {}
    for name, token in tokens.items():
        answer = paid(box, token)
        if not refused_well(token, answer):
            found[name] = (answer.status, answer.code)
    return found


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


class Said(NamedTuple):
    """What one worker answered."""

    status: int
    code: str | None


class Line:
    """One kept connection, and so one worker: gunicorn's threads keep a connection to the end.

    It speaks as little HTTP as will do, so that many of them leave the processor to the server.
    """

    def __init__(self, box: Farebox) -> None:
        self._sock = box.connect()
        self._host = f"127.0.0.1:{box.port}"
        self.is_open = True
        self.ask(None, "/healthz", None)
        self.worker = box.worker_of(self._sock)

    def ask(
        self, token: str | None, path: str = "/api/v1/up/ok/line", body: bytes | None = b"{}"
    ) -> Said:
        """What the worker answers to a POST of the body, or to a GET without one."""
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {self._host}"]
        lines += [] if token is None else [f"Authorization: Bearer {token}"]
        lines += [] if body is None else [f"Content-Length: {len(body)}"]
        self._sock.sendall("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        head, _, text = self._receive(b"\r\n\r\n", b"").partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
        assert length is not None, head
        while len(text) < int(length[1]):
            text += self._sock.recv(65536)
        if b"\r\nconnection: close" in head.lower():
            self.close()
        status = int(head[9:12])
        return Said(status, Answer(status, HTTPHeaderDict(), text).code)

    def _receive(self, end: bytes, found: bytes) -> bytes:
        while end not in found:
            more = self._sock.recv(65536)
            assert more, f"hung up after {found!r}"
            found += more
        return found

    def hung_up(self) -> bool:
        """Whether the other side has ended the connection, as it does after a while of silence."""
        readable, _, _ = select.select([self._sock], [], [], 0) if self.is_open else ([1], 0, 0)
        return bool(readable)

    def close(self) -> None:
        self.is_open = False
        self._sock.close()


class Everywhere:
    """Kept connections, `each` to every worker of an instance; `with` closes them."""

    def __init__(self, box: Farebox, each: int = 1) -> None:
        self._box = box
        self._each = each
        self._made: list[Line] = []
        self.lines: list[Line] = []

    def __enter__(self) -> Self:
        self._connect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for line in self._made:
            line.close()

    def say(self, token: str | None) -> set[Said]:
        """What the workers answer to one paid call each."""
        self.ready()
        return {line.ask(token) for line in self.lines}

    def ready(self) -> None:
        """Connect again where the server hung up, as it does after a while."""
        if any(line.hung_up() for line in self.lines):
            self._connect()

    def _connect(self) -> None:
        wanted = self._box.workers()
        chosen: dict[int | None, list[Line]] = {}
        for _ in range(20):
            # Connected all at once, or one idle worker would take them all.
            lines = at_once(16, lambda index: Line(self._box))
            self._made += lines
            for line in lines:
                chosen.setdefault(line.worker, []).append(line)
            if not wanted:  # the system does not tell
                self.lines = lines
                return
            if all(len(chosen.get(worker, [])) >= self._each for worker in wanted):
                self.lines = [line for pid in wanted for line in chosen[pid][: self._each]]
                return
        raise AssertionError(f"no connection to one of the workers {wanted}: {list(chosen)}")
