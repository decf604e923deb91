"""One paid call, broken at every point where it touches the world, one point at a time.

The n-th call to the database, to the network or to the clock fails, for n = 1, 2, 3 … until a run
comes through whole. After each, upkeep does its round, and then nothing may be held, nothing may
be charged that was not delivered, and the books must add up.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pycurl
import pytest
from test_ledger import Books

import config
import models
from core import clock, errors, gateway, keys, ledger, settlement, upkeep
from core.audit import SYSTEM
from core.errors import Refusal
from core.gateway import Reaction, Request
from core.instance import Instance
from core.upstream import Outbound
from models import Tx

CONFIG = """
[upstreams.demo]
kind = "sandbox"

[upstreams.far]
kind = "http"
base_url = "http://upstream.invalid"

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "demo"
adapter = "sms"
per = "sms_segment"
credits = 1

[[routes]]
path = "/api/v1/far"
methods = ["POST"]
upstream = "far"
credits = 3

[upstreams.llm]
kind = "openai"
base_url = "http://upstream.invalid/v1"

[[routes]]
path = "/v1/chat/completions"
methods = ["POST"]
upstream = "llm"
adapter = "chat"

[[models]]
id = "m"
credits_per_request = 3
credits_per_1k_tokens = 1000
"""
GRANTED = 1_000_000
SMS = json.dumps({"to": "+18148835337", "message": "hi"}).encode()
numbers = itertools.count(1)


class Points:
    """Counts the calls of one kind and fails the one it is told to."""

    def __init__(self) -> None:
        self.armed = False
        self.fail_at = 0
        self.seen = 0

    def arm(self, fail_at: int) -> None:
        self.armed, self.fail_at, self.seen = True, fail_at, 0

    def due(self) -> bool:
        """Whether the call that is now about to happen is the one that fails."""
        if not self.armed:
            return False
        self.seen += 1
        return self.seen == self.fail_at

    @property
    def failed(self) -> bool:
        return self.seen >= self.fail_at


@dataclass
class Far:
    """What the upstream answers in one scenario."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    chunks: list[bytes] = field(default_factory=lambda: [b"{}"])


class FakeReply:
    """An answer of the upstream; every call to it is a call to the network."""

    def __init__(self, far: Far, network: Points) -> None:
        self.status = far.status
        self.headers = far.headers
        self.closed = False
        self._chunks = list(far.chunks)
        self._network = network

    def _touch(self) -> None:
        if self._network.due():
            raise errors.provider_error("The upstream broke its answer off.")

    def read(self, limit: int) -> tuple[bytes, bool]:
        self._touch()
        body = b""
        while self._chunks and len(body) <= limit:
            body += self._chunks.pop(0)
        self.closed = not self._chunks  # an answer read to its end lets go by itself
        return body, self.closed

    def chunks(self, beat_seconds: float = 0, caller: int | None = None) -> Iterator[bytes]:
        while self._chunks:
            self._touch()
            yield self._chunks.pop(0)

    def finish(self, seconds: float) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True
        if self._network.due():
            raise pycurl.error(pycurl.E_FAILED_INIT, "cannot let go")


class Trouble(Exception):
    """A clock that cannot be read."""


class World:
    """An instance whose every call to the outside goes through points that can fail."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / config.FILE_NAME).write_text(CONFIG)
        environ = {"FAREBOX_INSTANCE": str(folder), "FAREBOX_SECRET_KEY": "s" * 40}
        self.instance = Instance(config.load(environ))
        self.instance.db.migrate()
        self.books = Books.__new__(Books)
        self.books.db = self.instance.db
        self.account = self.books.account(GRANTED)
        secret = keys.NewSecret("fare")
        terms = keys.Terms("k", None, None, GRANTED, "month", 10**9)
        self.instance.db.write(
            lambda tx: keys.add(tx, self.account, None, terms, secret, clock.now_ms(), SYSTEM)
        )
        self.token = secret.token
        self.far = Far()
        self.sent = 0
        self.reply: FakeReply | None = None
        self.points = {"database": Points(), "network": Points(), "clock": Points()}
        self._wire(monkeypatch)

    def _wire(self, monkeypatch: pytest.MonkeyPatch) -> None:
        database, network, time = (self.points[k] for k in ("database", "network", "clock"))

        def storage(name: str) -> Callable[..., Any]:
            real = getattr(Tx, name)

            def call(tx: Tx, sql: str, params: Any = None) -> Any:
                fails = database.due()
                if fails and sql == "ROLLBACK":
                    real(tx, sql, params)  # SQLite never stays in a transaction after this
                if fails:
                    raise apsw.IOError("a failpoint")
                return real(tx, sql, params)

            return call

        for name in ("run", "row", "rows"):
            monkeypatch.setattr(models.Tx, name, storage(name))
        for name in ("now_ms", "monotonic"):
            real = getattr(clock, name)

            def tell(real: Callable[[], Any] = real) -> Any:
                if time.due():
                    raise Trouble("a failpoint")
                return real()

            monkeypatch.setattr(clock, name, tell)

        def send(request: Outbound) -> FakeReply:
            if network.due():
                raise errors.provider_timeout()
            self.sent += 1
            self.reply = FakeReply(self.far, network)
            return self.reply

        monkeypatch.setattr(self.instance._wires, "send", send)
        real_sandbox = Instance.send

        def to_sandbox(instance: Instance, upstream: Any, request: Outbound) -> Any:
            if upstream.kind == "sandbox" and network.due():
                raise errors.provider_timeout()
            return real_sandbox(instance, upstream, request)

        monkeypatch.setattr(Instance, "send", to_sandbox)

    def call(self, path: str, body: bytes, key: str | None = None) -> Outcome:
        """One whole call as the blueprint makes it, to the end of its body and its close."""
        name = f"req_{next(numbers)}"
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        if key is not None:
            headers["idempotency-key"] = key
        request = Request(name, name, "POST", path, "", headers, "127.0.0.1", lambda limit: body)
        try:
            reaction = gateway.serve(self.instance, request)
        except Refusal as refusal:
            return Outcome(refusal.kind.status, b"", False, refusal.code, refusal.headers)
        except (Trouble, pycurl.error, apsw.Error) as error:
            return Outcome(500, b"", False, repr(error), {})
        return self._read(reaction)

    def _read(self, reaction: Reaction) -> Outcome:
        if isinstance(reaction.body, bytes):
            return Outcome(reaction.status, reaction.body, True, None, reaction.headers)
        arrived = b""
        whole = False
        try:
            for chunk in reaction.body:
                arrived += chunk
            whole = True
        except (OSError, Trouble, pycurl.error):
            pass
        finally:
            assert reaction.close is not None
            try:
                reaction.close()
            except (Trouble, pycurl.error, apsw.Error):
                whole = False
        return Outcome(reaction.status, arrived, whole, None, reaction.headers)

    def calm(self) -> None:
        """The trouble is over, and upkeep has been round."""
        for points in self.points.values():
            points.armed = False
        for duty in (upkeep.settle_late, upkeep.void_orphans, upkeep.tidy):
            duty(self.instance)

    def spent(self) -> int:
        return GRANTED - self.books.standing(self.account).balance


@dataclass
class Outcome:
    """What the caller saw."""

    status: int
    body: bytes
    whole: bool
    code: str | None
    headers: dict[str, str]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.calm()
    made.instance.db.close()


@dataclass(frozen=True)
class Scenario:
    path: str
    body: bytes
    price: int
    far: Far
    key: bool = False
    streamed: bool = False
    cut: frozenset[int] = frozenset()  # what it may cost when not all of it came, beside nothing


def told(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def said(text: str) -> bytes:
    return told(model="m", choices=[{"index": 0, "delta": {"content": text}}])


EVENTS = {"content-type": "text/event-stream"}
CHAT = "/v1/chat/completions"
ASKED = json.dumps({"model": "m", "messages": [], "stream": True}).encode()
# A credit a token: ten of them by the usage that comes last, and until then one for four letters.
TOLD = Far(
    200,
    EVENTS,
    [
        said("eight in"), said("four"), b": a comment\n\n",
        told(model="m", choices=[], usage={"prompt_tokens": 1, "completion_tokens": 10}),
        b"data: [DONE]\n\n",
    ],
)  # fmt: skip
PARTLY = frozenset({3 + 1, 3 + 2, 3 + 3, 3 + 10})  # a byte of the first, all of it, both, all
SCENARIOS = {
    "a message": Scenario("/api/v1/sms/send", SMS, 1, Far()),
    "a message with an idempotency key": Scenario("/api/v1/sms/send", SMS, 1, Far(), key=True),
    "an answer read whole": Scenario("/api/v1/far", b"{}", 3, Far()),
    "a stream": Scenario(
        "/api/v1/far", b"{}", 3, Far(200, EVENTS, [b"data: 1\n\n", b"data: 2\n\n"]), streamed=True
    ),
    "a stream with an idempotency key": Scenario(
        "/api/v1/far", b"{}", 3, Far(200, EVENTS, [b"data: 1\n\n", b"data: 2\n\n"]), True, True
    ),
    "an answer too large to be read whole": Scenario(
        "/api/v1/far", b"{}", 3,
        Far(200, {"content-type": "application/pdf"}, [b"x" * 700_000] * 3), streamed=True,
    ),
    "a model's stream": Scenario(CHAT, ASKED, 13, TOLD, streamed=True, cut=PARTLY),
    "a model's stream with an idempotency key": Scenario(
        CHAT, ASKED, 13, TOLD, True, True, PARTLY
    ),
    "a model's stream that tells an error alone": Scenario(
        CHAT, ASKED, 0, Far(200, EVENTS, [told(error={"message": "no"}), b"data: [DONE]\n\n"]),
        streamed=True,
    ),
    "an upstream that refuses": Scenario("/api/v1/far", b"{}", 0, Far(422)),
    "an upstream that fails": Scenario("/api/v1/far", b"{}", 0, Far(500)),
    "a body that is not good": Scenario("/api/v1/sms/send", b"{}", 0, Far()),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["database", "network", "clock"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_call_that_breaks_anywhere_leaves_nothing_held_and_charges_only_what_was_had(
    world: World, name: str, kind: str
) -> None:
    scenario = SCENARIOS[name]
    world.far = scenario.far
    world.call(scenario.path, scenario.body)  # so that the key's hash is remembered
    world.calm()
    points = world.points[kind]
    wrong: list[str] = []
    for fail_at in itertools.count(1):
        before, sent = world.spent(), world.sent
        key = f"key-{next(numbers)}" if scenario.key else None
        points.arm(fail_at)
        seen = world.call(scenario.path, scenario.body, key)
        failed = points.failed
        world.calm()
        at = f"{kind} call {fail_at} fails, answered {seen.status} {seen.code}"
        wrong += [f"{at}: {fault}" for fault in after(world, scenario, seen, before, sent)]
        if not failed:
            break
        release(world)
    assert fail_at > 1 or kind == "network", "nothing was there to fail"
    assert wrong == []


def after(world: World, scenario: Scenario, seen: Outcome, before: int, sent: int) -> Iterator[str]:
    """What is wrong after a call and a round of upkeep."""
    yield from world.books.faults()
    standing = world.books.standing(world.account)
    if standing.held:
        yield f"{standing.held} credits are still held"
    left = world.instance.db.rows("SELECT id, status FROM call WHERE status = 'held'")
    if left:
        yield f"{len(left)} calls are still open"
    if world.instance.db.rows("SELECT * FROM idempotency WHERE state = 'running'"):
        yield "an idempotency key is still taken"
    used = world.instance.db.rows("SELECT COALESCE(SUM(used), 0) FROM credit_window")[0][0]
    if used != world.spent():
        yield f"the limit counts {used} and {world.spent()} were spent"
    charged = world.spent() - before
    if scenario.streamed and seen.status == 200:
        # The first chunk counts as delivered once more is asked for.
        partly = {0, scenario.price, *scenario.cut} if seen.body else {0}
        allowed = {scenario.price} if seen.whole else partly
    else:
        allowed = {scenario.price if seen.status < 300 else 0}
    if charged not in allowed:
        yield f"{charged} credits were charged, not {allowed}"
    if charged and not scenario.path.endswith("send") and world.sent == sent:
        yield "a call was charged that never went out"
    if world.reply is not None and not world.reply.closed and world.sent > sent:
        yield "the upstream's connection was not let go"


def release(world: World) -> None:
    """Let go of what a failed run may have left, so that the next run is judged by itself."""
    for (call_id,) in world.instance.db.rows("SELECT id FROM call WHERE status = 'held'"):
        world.instance.db.write(
            lambda tx, call_id=call_id: settlement.void(tx, call_id, ledger.Outcome(None, None))
        )


def test_a_call_that_could_not_be_charged_may_be_repeated_under_its_key(world: World) -> None:
    """Wherever the database failed: the repeat is answered, and the two are charged as one."""
    world.call("/api/v1/sms/send", SMS)
    world.calm()
    for fail_at in itertools.count(1):
        before = world.spent()
        key = f"key-{next(numbers)}"
        world.points["database"].arm(fail_at)
        first = world.call("/api/v1/sms/send", SMS, key)
        failed = world.points["database"].failed
        world.calm()
        release(world)
        again = world.call("/api/v1/sms/send", SMS, key)
        assert again.status == 200, (fail_at, again)
        assert world.spent() - before == 1, fail_at
        if first.status == 200:
            assert again.headers["Idempotent-Replayed"] == "true"
            assert again.body == first.body
        if not failed:
            break


# The same below SQLite: the disk itself fails, and SQLite decides what that means


class BadDisk(apsw.VFS):
    """A file system whose n-th write or flush of the log fails."""

    def __init__(self, points: Points) -> None:
        self._base = apsw.vfs_names()[0]
        self.points = points
        super().__init__("bad-disk", self._base, makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _BadFile(self.points, self._base, name, flags)


class _BadFile(apsw.VFSFile):
    def __init__(self, points: Points, base: str, name: Any, flags: list[int]) -> None:
        super().__init__(base, name, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else name or ""
        self._points = points
        self._is_log = path.endswith("-wal")

    def xWrite(self, data: bytes, offset: int) -> None:
        if self._is_log and self._points.due():
            raise apsw.IOError("a failpoint")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        if self._is_log and self._points.due():
            raise apsw.IOError("a failpoint")
        super().xSync(flags)


@pytest.fixture
def disk() -> Iterator[Points]:
    points = Points()
    vfs = BadDisk(points)
    yield points
    vfs.unregister()


@pytest.mark.parametrize(
    "name", ["a message with an idempotency key", "a stream", "a model's stream"]
)
def test_a_disk_that_fails_at_any_write_or_flush_charges_nothing_wrongly(
    disk: Points, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    scenario = SCENARIOS[name]
    world = World(tmp_path, monkeypatch)
    world.points["disk"] = disk
    world.far = scenario.far
    world.call(scenario.path, scenario.body)
    wrong: list[str] = []
    for fail_at in itertools.count(1):
        before, sent = world.spent(), world.sent
        key = f"key-{next(numbers)}" if scenario.key else None
        disk.arm(fail_at)
        seen = world.call(scenario.path, scenario.body, key)
        failed = disk.failed
        world.calm()
        at = f"write {fail_at} fails, answered {seen.status} {seen.code}"
        wrong += [f"{at}: {fault}" for fault in after(world, scenario, seen, before, sent)]
        if not failed:
            break
    assert fail_at > 10
    assert wrong == []
    world.instance.db.close()
    assert models.check_database(world.instance.settings.database_path) is None
