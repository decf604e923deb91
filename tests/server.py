"""Farebox as an operator runs it: gunicorn in a process group of its own, on a throw-away instance.

`Farebox` is for tests that need the real thing: several worker processes, real sockets, kill -9.
Everything it waits for is a condition with a bound; nothing sleeps and hopes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import urllib3

from app import create_app
from config import load
from core import firstrun, ledger
from models import Database

ROOT = Path(__file__).resolve().parent.parent
OPERATOR_KEY = "operator-key-for-tests-0123456789abcdef"
TRACEBACK = "Traceback (most recent call last)"
START_SECONDS = 20.0
STOP_SECONDS = 40.0  # Above gunicorn's own grace for requests in flight.

T = TypeVar("T")
_names = count(1)


def until(condition: Callable[[], T], seconds: float = 10.0, what: str = "") -> T:
    """The condition's first truthy value; fails, naming `what`, when none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass(frozen=True)
class Answer:
    """A whole answer from the gateway."""

    status: int
    headers: urllib3.HTTPHeaderDict
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The error code, from either dialect; None when the answer is no error."""
        try:
            error = self.json().get("error")
        except (ValueError, AttributeError):
            return None
        return error.get("code") if isinstance(error, dict) else error

    @property
    def request_id(self) -> str:
        return self.headers["X-Request-Id"]


class CommandFailed(AssertionError):
    """A `flask` command ended with an exit code that was not expected."""


class Farebox:
    """One running instance. `with Farebox(config) as box:` starts, checks and removes it.

    At the end the books must add up and the log must hold no traceback, unless the test said that
    trouble is expected.
    """

    running: ClassVar[list[Farebox]] = []

    def __init__(
        self,
        config: str = "",
        *,
        workers: int = 2,
        threads: int = 32,
        operator_key: str = OPERATOR_KEY,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.instance = Path(tempfile.mkdtemp(prefix="farebox-test-"))
        if config:
            (self.instance / "farebox.toml").write_text(config, "utf-8")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.operator_key = operator_key
        self.traceback_expected = False
        self._log_path = self.instance / "server-under-test.log"
        self._log_seen = 0
        self._process: subprocess.Popen[bytes] | None = None
        # Settings of whoever runs the tests must not leak into the instance.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FAREBOX_")}
        self.environment = inherited | {
            "FAREBOX_INSTANCE": str(self.instance),
            "FAREBOX_BIND": f"127.0.0.1:{self.port}",
            "FAREBOX_WORKERS": str(workers),
            "FAREBOX_THREADS": str(threads),
            "FAREBOX_OPERATOR_KEY": operator_key,
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        self._pool = self._new_pool()

    def _new_pool(self) -> urllib3.HTTPConnectionPool:
        return urllib3.HTTPConnectionPool(
            "127.0.0.1", self.port, maxsize=256, retries=False, timeout=30
        )

    # Its life.

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._end()
            self._remove()
            raise
        Farebox.running.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        Farebox.running.remove(self)
        self.hang_up()  # A stopping server waits a little for connections that are kept.
        try:
            if kind is None:
                if self._process is None:
                    self.start()
                self.stop()
                self.check()
                self.books()
            else:
                print(f"--- log of the instance ---\n{self.log()[-8000:]}")
        finally:
            self._end()
            self._remove()

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start gunicorn and wait for /healthz to answer 200."""
        assert self._process is None, "it runs already"
        gunicorn = Path(sys.executable).with_name("gunicorn")
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [str(gunicorn), "-c", "gunicorn.conf.py"],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until(self._answers_or_died, START_SECONDS, "/healthz answers after the start")

    def _answers_or_died(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"it ended while starting:\n{self.log()[-4000:]}"
        return self.healthy(timeout=2)

    def healthy(self, timeout: float = 30) -> bool:
        """Whether /healthz answers 200 on a fresh connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """SIGTERM to the master, as a service manager does; waits for the end."""
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not stop:\n{self.log()[-4000:]}") from None
        self._process = None
        self.hang_up()

    def kill(self) -> None:
        """SIGKILL to the whole process group; returns when nothing listens any more."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        self.hang_up()
        until(self._refuses, 10, "the killed instance's port is closed")

    def _refuses(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) != 0

    def restart(self) -> None:
        if self._process is not None:
            self.stop()
        self.start()

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _remove(self) -> None:
        self._pool.close()
        shutil.rmtree(self.instance, ignore_errors=True)

    # What an operator sees.

    def flask(self, *words: str, stdin: str | None = None, may_fail: bool = False) -> str:
        """Run `flask …` against the instance; its standard output, stripped."""
        return self.run_flask(*words, stdin=stdin, may_fail=may_fail).stdout.strip()

    def run_flask(
        self, *words: str, stdin: str | None = None, may_fail: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """As `flask`, but with the exit code and standard error too."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("flask")), *words],
            cwd=ROOT,
            env=self.environment,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode != 0 and not may_fail:
            raise CommandFailed(f"flask {' '.join(words)}: {done.returncode}\n{done.stderr}")
        return done

    def set_up(self, *words: str, stdin: str | None = None) -> str:
        """As `flask`, but in this process, without the half second that a command takes to start:
        for what a test needs and is not about."""
        with self._commands() as run:
            return run(*words, stdin=stdin)

    @contextlib.contextmanager
    def _commands(self) -> Iterator[Callable[..., str]]:
        """Runs commands in this process. They find what they would find in one of their own: the
        configuration as it is now, and a database that nobody here has open."""
        firstrun.prepare_folder(self.instance)
        app = create_app(load(self.environment))
        database: Database = app.extensions["farebox"].db

        def run(*words: str, stdin: str | None = None) -> str:
            done = app.test_cli_runner().invoke(args=list(words), input=stdin)
            if done.exit_code != 0:
                raise CommandFailed(f"flask {' '.join(words)}: {done.exit_code}\n{done.output}")
            return done.stdout.strip()

        try:
            yield run
        finally:
            with database.reading() as tx:
                tx._connection.close()
            database.close()

    def log(self) -> str:
        """Everything the instance wrote to standard output and standard error."""
        if not self._log_path.exists():
            return ""
        return self._log_path.read_text("utf-8", "replace")

    def check(self) -> None:
        """It has not died, and logged no traceback since the last check unless that is expected."""
        if self._process is not None:
            assert self._process.poll() is None, f"it died:\n{self.log()[-4000:]}"
        log = self.log()
        fresh, self._log_seen = log[self._log_seen :], len(log)
        if not self.traceback_expected:
            assert TRACEBACK not in fresh, fresh[-8000:]

    def ledger_ok(self) -> str:
        """`flask ledger verify` must succeed; its line of totals."""
        return self.flask("ledger", "verify")

    def books(self) -> None:
        """As `ledger_ok`, without the half second that a command takes to start."""
        database = Database(self.instance / "farebox.db")
        try:
            with database.snapshot() as tx:
                _, faults = ledger.verify(tx)
        finally:
            database.close()
        assert not faults, faults

    def account(self, credits: int = 57, *key_options: str) -> tuple[str, str]:
        """A new user with that many credits and an API key; their e-mail and key."""
        email = f"user{next(_names)}@example.com"
        with self._commands() as run:
            run("users", "add", email)
            if credits:
                run("credits", "grant", email, str(credits))
            return email, run("keys", "add", email, "--name", f"key {next(_names)}", *key_options)

    def key(self, email: str, *options: str) -> str:
        """Another API key for the user's account."""
        return self.set_up("keys", "add", email, "--name", f"key {next(_names)}", *options)

    def workers(self) -> list[int]:
        """The process ids of the workers, where the system has /proc; else none."""
        assert self._process is not None
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # The name in parentheses may hold anything, so count from its end.
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                if parent == self._process.pid:
                    found.append(int(stat.parent.name))
        return sorted(found)

    def worker_of(self, sock: socket.socket) -> int | None:
        """The worker that serves this (accepted) client connection; None where unknown."""
        local_port = sock.getsockname()[1]
        try:
            lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        except OSError:
            return None
        for fields in map(str.split, lines):
            server, client = (int(address.partition(":")[2], 16) for address in fields[1:3])
            if (server, client) == (self.port, local_port):
                wanted = f"socket:[{fields[9]}]"
                break
        else:
            return None
        for pid in self.workers():
            with contextlib.suppress(OSError):
                for handle in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        if os.readlink(handle) == wanted:
                            return pid
        return None

    # What a client sees.

    def request(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        value: object = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> Answer:
        """One request, never retried and never redirected. `value` is sent as JSON."""
        response = self._pool.request(
            method,
            path,
            body=json.dumps(value).encode() if value is not None else body,
            headers=_headers(key, value is not None, headers),
            timeout=timeout,
            redirect=False,
            retries=False,
        )
        return Answer(response.status, response.headers, response.data)

    def get(self, path: str, key: str | None = None, **headers: str) -> Answer:
        """GET; underscores in header names become hyphens."""
        return self.request("GET", path, key=key, headers=_hyphened(headers))

    def post(
        self, path: str, key: str | None = None, value: object = None, **headers: str
    ) -> Answer:
        """POST a JSON value, `{}` if none; underscores in header names become hyphens."""
        value = {} if value is None else value
        return self.request("POST", path, key=key, value=value, headers=_hyphened(headers))

    def sms(self, key: str | None, to: str = "+18148835337", text: str = "hi", **h: str) -> Answer:
        return self.post("/api/v1/sms/send", key, {"to": to, "message": text}, **h)

    @contextlib.contextmanager
    def stream(
        self, method: str, path: str, key: str | None = None, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """A response read as it comes, on a connection of its own; leaving the block hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sock: socket.socket | None = None
        try:
            body = b"{}" if method == "POST" else None
            made = _headers(key, body is not None, _hyphened(headers))
            connection.request(method, path, body, made)
            # Where the server says it will close, http.client lets go of the socket at once.
            sock = connection.sock
            yield connection.getresponse()
        finally:
            # A response still alive keeps its socket open: end the connection itself.
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    def hang_up(self) -> None:
        """Forget the kept connections, whose workers are gone or about to go."""
        self._pool.close()
        self._pool = self._new_pool()

    def connect(self, timeout: float = 30) -> socket.socket:
        """A raw connection, for clients that do not behave."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def standing(self, key: str) -> tuple[int, int]:
        """(available, held) of the key's account."""
        answer = self.get("/api/v1/account", key)
        assert answer.status == 200, answer.body
        body = answer.json()
        return body["credits"], body["held"]

    def settled(self, key: str, seconds: float = 5.0) -> int:
        """The available credits once nothing is held any more; fails when that takes longer."""
        last = (0, 0)

        def nothing_held() -> bool:
            nonlocal last
            last = self.standing(key)
            return last[1] == 0

        until(nothing_held, seconds, "nothing is held any more")
        return last[0]

    def call(self, key: str, request_id: str) -> dict[str, Any]:
        """The record of a call, as its payer sees it."""
        answer = self.get(f"/api/v1/usage/{request_id}", key)
        assert answer.status == 200, answer.body
        record: dict[str, Any] = answer.json()
        return record

    def calls(self, key: str) -> list[dict[str, Any]]:
        """All calls of the key, newest first, page by page."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            answer = self.get(f"/api/v1/usage?limit=100{cursor}", key)
            assert answer.status == 200, answer.body
            page = answer.json()
            found += page["data"]
            if not page["has_more"]:
                return found
            cursor = f"&cursor={page['next_cursor']}"


def _hyphened(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): text for name, text in headers.items()}


def _headers(key: str | None, has_json: bool, headers: Mapping[str, str] | None) -> dict[str, str]:
    made = {"Content-Type": "application/json"} if has_json else {}
    if key is not None:
        made["Authorization"] = f"Bearer {key}"
    return made | dict(headers or {})
