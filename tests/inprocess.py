"""Farebox without a server: the real application and database, called as WSGI in this process.

Fast enough for a test of every row of a table. What depends on the server itself (chunked bodies,
headers sent twice, several workers) is tested on `server.Farebox` instead.
"""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import unquote

import argon2
import pytest
from flask import Flask
from jinja2.bccache import Bucket, BytecodeCache
from server import OPERATOR_KEY, Answer
from urllib3 import HTTPHeaderDict
from werkzeug.test import run_wsgi_app

from app import create_app
from config import Settings, load
from core import clock, daily, firstrun, keys, ledger, tokens, users
from core.adapters import Inbound
from core.audit import COMMAND_LINE
from core.instance import Instance
from core.keys import NewSecret, Terms

T = TypeVar("T")

HOST = "127.0.0.1:8402"
STRANGERS_KEY = tokens.new_key("fare")[0]  # Well formed, and nobody's.
# Real argon2id, as cheap as it can be: most tests make keys and none of them guesses one.
_CHEAP = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
_numbers = count(1)


class _Compiled(BytecodeCache):
    """Templates as Python, compiled once for all applications of these tests, not once for each."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Any] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        bucket.code = self._known.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: Bucket) -> None:
        self._known[bucket.key, bucket.checksum] = bucket.code


_compiled = _Compiled()


class CheapSecret(NewSecret):
    """A `NewSecret` whose hash costs nothing to make or verify."""

    def __init__(self, prefix: str) -> None:
        self.token, self.lookup = tokens.new_key(prefix)
        self.start = self.token[: -(tokens.SECRET_LENGTH + tokens.CHECKSUM_LENGTH)]
        self.hash = _CHEAP.hash(self.token)


def inbound(**headers: str) -> Inbound:
    """A request of which only the headers matter."""
    return Inbound("GET", "/", "", headers, b"", "req_1")


@dataclass(frozen=True)
class Payer:
    """A user with an account and one key."""

    email: str
    account: str
    key: str
    key_id: str


class Box:
    """An application on an instance folder of its own. When it closes, the books must add up."""

    def __init__(self, folder: Path, config: str = "", **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        if config:
            (folder / "farebox.toml").write_text(config, "utf-8")
        firstrun.prepare_folder(folder)
        self.folder = folder
        self.settings: Settings = load(
            {
                "FAREBOX_INSTANCE": str(folder),
                "FAREBOX_OPERATOR_KEY": OPERATOR_KEY,
                **environment,
            }
        )
        self.app: Flask = create_app(self.settings)
        self.app.jinja_env.bytecode_cache = _compiled
        self.instance: Instance = self.app.extensions["farebox"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                assert self.faults() == []
        finally:
            self.instance.db.close()

    # What an operator does.

    def write(self, work: Callable[[Any], T]) -> T:
        return self.instance.db.write(work)

    def run(self, sql: str, **params: object) -> int:
        """Change rows behind the application's back."""
        changed: int = self.write(lambda tx: tx.run(sql, params))
        return changed

    def row(self, sql: str, **params: object) -> tuple[Any, ...]:
        found = self.instance.db.row(sql, params)
        assert found is not None, sql
        return found

    def sum_up(self) -> None:
        """Make the daily sums anew, after calls were changed behind the application's back."""
        ended = self.instance.db.rows(
            "SELECT account_id, key_id, user_id, route, model, number, created_at, captured,"
            " status = 'voided', cost_usd FROM call WHERE status <> 'held'"
        )

        def work(tx: Any) -> None:
            tx.run("DELETE FROM call_day")
            for *call, captured, failed, cost in ended:
                daily.add_call(tx, daily.Ended(*call), captured, bool(failed), cost)

        self.write(work)

    def payer(self, credits: int = 100, **terms: Any) -> Payer:
        """A new user with that many credits and a key on those `Terms`."""
        email = f"payer{next(_numbers)}@example.com"
        now = clock.now_ms()
        user = self.write(lambda tx: users.add(tx, email, None, False, now, COMMAND_LINE))
        if credits:
            self.grant(user.account_id, credits)
        key, key_id = self.key(user.account_id, **terms)
        return Payer(email, user.account_id, key, key_id)

    def grant(self, account: str, credits: int) -> None:
        reference = tokens.new_id("grant")
        now = clock.now_ms()
        kind = "grant" if credits > 0 else "adjustment"
        self.write(lambda tx: ledger.add_credits(tx, account, kind, credits, reference, None, now))

    def key(self, account: str, **terms: Any) -> tuple[str, str]:
        """Another key for an account: the key itself and its id."""
        secret = CheapSecret(self.settings.instance.key_prefix)
        made = Terms(terms.pop("name", f"key {next(_numbers)}"), **terms)
        now = clock.now_ms()
        key_id = self.write(lambda tx: keys.add(tx, account, None, made, secret, now, COMMAND_LINE))
        return secret.token, key_id

    def rotate(self, key_id: str, grace_ms: int = 0) -> str:
        """The key's new secret."""
        secret = CheapSecret(self.settings.instance.key_prefix)
        now = clock.now_ms()
        self.write(lambda tx: keys.rotate(tx, key_id, secret, grace_ms, now, COMMAND_LINE))
        return secret.token

    def suspend(self, key_id: str, reason: str | None = None) -> None:
        now = clock.now_ms()
        self.write(lambda tx: keys.suspend(tx, key_id, reason, now, COMMAND_LINE))

    def revoke(self, key_id: str) -> None:
        now = clock.now_ms()
        self.write(lambda tx: keys.revoke(tx, key_id, now, COMMAND_LINE))

    def suspend_account(self, account: str, reason: str | None = None) -> None:
        self.run(
            "UPDATE account SET status = 'suspended', status_reason = :reason WHERE id = :id",
            id=account,
            reason=reason,
        )

    def standing(self, who: Payer | str) -> tuple[int, int]:
        """(available, held) of an account, as the books have it."""
        account = who.account if isinstance(who, Payer) else who
        with self.instance.db.reading() as tx:
            found = ledger.standing(tx, account)
        return found.available, found.held

    def faults(self) -> list[str]:
        """What does not add up."""
        with self.instance.db.snapshot() as tx:
            return ledger.verify(tx)[1]

    def cli(self, *words: str, stdin: str | None = None) -> Any:
        """Run `flask …` in this process; click's result."""
        return self.app.test_cli_runner().invoke(args=list(words), input=stdin)

    # What a client does.

    def request(
        self,
        method: str,
        target: str,
        *,
        key: str | None = None,
        value: object = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        client: str = "127.0.0.1",
        host: str = HOST,
    ) -> Answer:
        """One request, as gunicorn would hand it on. `value` is sent as JSON."""
        sent = {"Host": host}
        if value is not None:
            body = json.dumps(value).encode()
            sent["Content-Type"] = "application/json"
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        if body is not None:
            sent["Content-Length"] = str(len(body))
        path, _, query = target.partition("?")
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote(path, "latin-1"),
            "QUERY_STRING": query,
            "RAW_URI": target,
            "REMOTE_ADDR": client,
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "8402",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body or b""),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
        }
        for name, text in (sent | dict(headers or {})).items():
            variable = name.upper().replace("-", "_")
            plain = variable in ("CONTENT_TYPE", "CONTENT_LENGTH")
            environ[variable if plain else f"HTTP_{variable}"] = text
        chunks, status, made = run_wsgi_app(self.app, environ, buffered=True)
        return Answer(int(status[:3]), HTTPHeaderDict(made.items()), b"".join(chunks))

    def get(self, target: str, key: str | None = None, **headers: str) -> Answer:
        """GET; underscores in header names become hyphens."""
        return self.request("GET", target, key=key, headers=_hyphened(headers))

    def post(
        self, target: str, key: str | None = None, value: object = None, **headers: str
    ) -> Answer:
        """POST a JSON value, `{}` if none; underscores in header names become hyphens."""
        value = {} if value is None else value
        return self.request("POST", target, key=key, value=value, headers=_hyphened(headers))

    def sms(
        self, key: str | None, to: str = "+18148835337", text: str = "hi", **headers: str
    ) -> Answer:
        return self.post("/api/v1/sms/send", key, {"to": to, "message": text}, **headers)

    def record(self, key: str, answer: Answer) -> dict[str, Any]:
        """The record of the call an answer came from."""
        found = self.get(f"/api/v1/usage/{answer.request_id}", key)
        assert found.status == 200, found.body
        record: dict[str, Any] = found.json()
        return record


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
        self.now = clock.parse_rfc3339(at)
        monkeypatch.setattr(clock, "now_ms", lambda: self.now)

    def set(self, at: str) -> None:
        self.now = clock.parse_rfc3339(at)

    def forward(self, *, ms: int = 0, seconds: float = 0, days: float = 0) -> None:
        self.now += ms + int(seconds * 1000) + int(days * clock.DAY_MS)


class Background:
    """One request on its way in a thread; `result` waits for its answer."""

    def __init__(self, work: Callable[[], Answer]) -> None:
        self._work = work
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._work()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, seconds: float = 15) -> Answer:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the request did not end"
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer


def everything(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    pieces = []
    while piece := sock.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def _hyphened(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): text for name, text in headers.items()}
