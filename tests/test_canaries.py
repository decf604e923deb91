"""Secrets stay where they belong: planted ones are looked for wherever anything is written.

Every secret of the instance and of its callers is a canary. Traffic then goes through success,
every error, an exception inside the gateway and plain garbage, and all that was logged, answered,
printed, stored or sent upstream is searched.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import StartFarebox
from doubles import TWILIO_BROKEN, TWILIO_BUSY, TWILIO_REFUSALS, Hit, Twilio, Upstream
from server import Answer, Farebox

OPERATOR = "operator-canary-7f3a9c51d2e84b60a1c9"
LOOKUP = "lookup-canary-51c09e7ab3d24f68"
SECRET = "instance-canary-0c4d8e21f7b3495a9d6e13"
PASSWORD = "password-canary-2e8b6d40"
COOKIE = "cookie-canary-93b1f0"
CLIENT_HEADER = "client-header-canary-6d27aa"
TWILIO_TOKEN = "twilio-canary-b8d3510e94f7"
PROVIDER = "provider-"  # What the double's /secrets answers: provider-key-canary and others.
PROVIDER_CANARY = re.compile(rb"provider-[a-z]+-canary")

# Raises inside the gateway, in a call's way to the upstream, with every secret at hand in the
# message: the worst that a bug, or a library's chatty exception, could do to the log.
SABOTAGE = """
import importlib.abc, importlib.util, os, sys

class Saboteur(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "core.adapters.forward":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_break(module):
            execute(module)
            outbound = module.Forward.outbound

            def broken(self, route, inbound, order, upstream):
                if "/break" in inbound.path:
                    raise RuntimeError(
                        f"sabotage: {inbound.headers.get('authorization')}"
                        f" {upstream.headers}"
                        f" {os.environ['FAREBOX_OPERATOR_KEY']} {os.environ['TWILIO_CANARY']}"
                        f" {os.environ['FAREBOX_SECRET_KEY']}"
                    )
                return outbound(self, route, inbound, order, upstream)

            module.Forward.outbound = broken

        spec.loader.exec_module = execute_and_break
        return spec

sys.meta_path.insert(0, Saboteur())
"""


def config(upstream: Upstream, twilio_url: str) -> str:
    routes = "".join(
        f"""
[[routes]]
path = "{prefix}/up/*"
methods = ["GET", "POST"]
upstream = "lookup"
upstream_path = "/*"
credits = 1
scope = "lookup"
"""
        for prefix in ("/api/v1", "/v1")
    )
    return f"""
[upstreams.lookup]
kind = "http"
base_url = "{upstream.url}"
headers = {{ X-Api-Key = "${{LOOKUP_CANARY}}" }}
timeout_seconds = 1
{routes}
[[routes]]
path = "/api/v1/small/*"
methods = ["POST"]
upstream = "lookup"
upstream_path = "/*"
credits = 1
body_bytes = 100

[upstreams.texts]
kind = "twilio"
base_url = "{twilio_url}"
account_sid = "AC{"7" * 32}"
auth_token = "${{TWILIO_CANARY}}"
from = "+15005550006"
timeout_seconds = 1

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "texts"
adapter = "sms"
credits = 1
per = "sms_segment"

[limits]
requests_per_minute = 1000000
failed_auth_per_minute = 1000000
"""


@dataclass
class Findings:
    """Everything that was written anywhere, with where it was."""

    seen: list[tuple[str, bytes]] = field(default_factory=list)

    def answer(self, what: str, answer: Answer) -> Answer:
        head = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
        self.seen.append((f"answer to {what}", head.encode() + b"\n\n" + answer.body))
        return answer

    def hits(self, hits: list[Hit], allowed: dict[str, str]) -> None:
        """Requests an upstream received, without the one header in which its secret belongs."""
        for hit in hits:
            kept = [
                (name, value) for name, value in hit.headers if allowed.get(name.lower()) != value
            ]
            text = f"{hit.method} {hit.target}\n" + "\n".join(f"{n}: {v}" for n, v in kept)
            self.seen.append((f"upstream request {hit.target}", text.encode() + hit.body))

    def leaks(self, secrets: dict[str, str]) -> list[str]:
        """Where which secret was found, in clear or in base64."""
        return [
            f"{name} in {where}: …{_around(text, found[0])}…"
            for where, text in self.seen
            for name, secret in secrets.items()
            if (found := [form for form in _forms(secret) if form in text])
        ]


def _forms(secret: str) -> list[bytes]:
    """How a secret could be written: as it is, its latter half, or as a Basic credential."""
    raw = secret.encode()
    return [raw, raw[-20:], base64.b64encode(raw), base64.b64encode(raw + b":")[:-4]]


def _around(text: bytes, form: bytes) -> str:
    index = text.index(form)
    return text[max(0, index - 60) : index + len(form) + 20].decode("utf-8", "replace")


@dataclass
class Cast:
    """Who calls: each with a key of its own kind."""

    email: str
    rich: str
    poor: str
    narrow: str
    slow: str
    suspended: str
    revoked: str

    def keys(self) -> dict[str, str]:
        return {f"the {name} key": key for name, key in vars(self).items() if name != "email"}


@pytest.fixture(scope="module")
def twilio_with_canary() -> Iterator[Twilio]:
    with Twilio(account_sid="AC" + "7" * 32, auth_token=TWILIO_TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def box(
    start_farebox: StartFarebox,
    upstream_server: Upstream,
    twilio_with_canary: Twilio,
    tmp_path_factory: pytest.TempPathFactory,
) -> Farebox:
    folder = tmp_path_factory.mktemp("sabotage")
    (folder / "sitecustomize.py").write_text(SABOTAGE)
    box = start_farebox(
        config(upstream_server, twilio_with_canary.url),
        operator_key=OPERATOR,
        environment={
            "FAREBOX_SECRET_KEY": SECRET,
            "LOOKUP_CANARY": LOOKUP,
            "TWILIO_CANARY": TWILIO_TOKEN,
            "PYTHONPATH": str(folder),
        },
    )
    box.traceback_expected = True  # The sabotage is our own doing.
    return box


@pytest.fixture(scope="module")
def cast(box: Farebox) -> Cast:
    email, rich = box.account(credits=10_000)
    _, poor = box.account(credits=0)
    box.set_up("users", "add", "pat@example.com", "--password-stdin", stdin=f"{PASSWORD}\n")
    suspended, revoked = box.key(email), box.key(email)
    listed = box.set_up("keys", "list", email)
    for key, verb in ((suspended, "suspend"), (revoked, "revoke")):
        # The list shows a key's public beginning, which is enough to find its id.
        (line,) = [li for li in listed.splitlines() if key[: len("fare_live_") + 4] in li]
        found = re.search(r"key_\w+", line)
        assert found
        box.set_up("keys", verb, found[0])
    return Cast(
        email=email,
        rich=rich,
        poor=poor,
        narrow=box.key(email, "--scope", "something:else"),
        slow=box.key(email, "--rate", "1"),
        suspended=suspended,
        revoked=revoked,
    )


@pytest.fixture(scope="module")
def secrets(cast: Cast) -> dict[str, str]:
    return cast.keys() | {
        "the operator key": OPERATOR,
        "the upstream's key": LOOKUP,
        "the instance's secret": SECRET,
        "the password": PASSWORD,
        "the client's cookie": COOKIE,
        "the client's own header": CLIENT_HEADER,
        "Twilio's token": TWILIO_TOKEN,
        "Twilio's Basic credential": base64.b64encode(
            f"AC{'7' * 32}:{TWILIO_TOKEN}".encode()
        ).decode(),
    }


@pytest.fixture
def findings(
    box: Farebox, upstream: Upstream, twilio_with_canary: Twilio, secrets: dict[str, str]
) -> Iterator[Findings]:
    """What a test gathers; afterwards the log and the upstreams are searched with it."""
    twilio_with_canary.clear()
    found = Findings()
    logged = len(box.log())
    yield found
    basic = secrets["Twilio's Basic credential"]
    found.hits(upstream.hits(), {"x-api-key": LOOKUP})
    found.hits(twilio_with_canary.hits(), {"authorization": f"Basic {basic}"})
    found.seen += [("the log", line.encode()) for line in box.log()[logged:].splitlines()]
    leaks = found.leaks(secrets)
    assert not leaks, "\n".join(leaks[:40])


PLANTED = {"Cookie": f"session={COOKIE}", "X-Api-Key": CLIENT_HEADER, "X-Private": CLIENT_HEADER}

SUCCESSES = ["units/1", "secrets", "sse/2", "ndjson/2", "big/2000000", "empty", "status/404"]
FAILURES = {
    "reset": 502,
    "close": 502,
    "hang": 504,
    "garbage-status": 502,
    "garbage-headers": 502,
    "cut/5000/3": 502,
    "status/500": 502,
    "leaky/401": 502,
    "leaky/403": 502,
    "leaky/407": 502,
    "leaky/302": 502,
    "leaky/503": 502,
    "break": 500,
}


@pytest.mark.parametrize("payer", ["rich", "operator"])
@pytest.mark.parametrize("prefix", ["/api/v1/up", "/v1/up"])
def test_no_secret_shows_in_calls_that_succeed_or_fail_upstream(
    box: Farebox, cast: Cast, findings: Findings, payer: str, prefix: str
) -> None:
    key = OPERATOR if payer == "operator" else cast.rich
    for what in SUCCESSES:
        answer = box.request("GET", f"{prefix}/{what}", key=key, headers=PLANTED)
        findings.answer(what, answer)
        assert answer.status in (200, 204, 404)
        for name, value in answer.headers.items():
            assert not PROVIDER_CANARY.search(f"{name}: {value}".encode())
    for what, status in FAILURES.items():
        answer = box.request("POST", f"{prefix}/{what}", key=key, headers=PLANTED, value={})
        assert answer.status == status, (what, answer.body)
        findings.answer(what, answer)
    assert box.settled(cast.rich) > 0


@pytest.mark.parametrize("to", ["+18148835337", *TWILIO_REFUSALS, TWILIO_BUSY, TWILIO_BROKEN])
def test_no_secret_shows_in_messages(box: Farebox, cast: Cast, findings: Findings, to: str) -> None:
    findings.answer(f"a message to {to}", box.sms(cast.rich, to=to, Cookie=COOKIE))


def test_no_secret_shows_when_a_call_is_refused(
    box: Farebox, cast: Cast, findings: Findings, upstream: Upstream
) -> None:
    good = cast.rich
    broken = good[:-1] + ("A" if good[-1] != "A" else "B")
    unknown = good[:10] + good[10:][::-1]
    refusals: list[tuple[int, str, str, dict[str, str], object]] = [
        (404, "POST", "/nowhere", {"Authorization": f"Bearer {good}"}, {}),
        (405, "DELETE", "/api/v1/up/ok", {"Authorization": f"Bearer {good}"}, None),
        (413, "POST", "/api/v1/small/ok", {"Authorization": f"Bearer {good}"}, "x" * 500),
        (
            415,
            "POST",
            "/api/v1/up/ok",
            {"Authorization": f"Bearer {good}", "Content-Encoding": "gzip"},
            {},
        ),
        (400, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {good}, Bearer {good}"}, {}),
        (400, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {good}{'x' * 9000}"}, {}),
        (400, "POST", "/api/v1/up/..%2fok", {"Authorization": f"Bearer {good}"}, {}),
        (
            400,
            "POST",
            "/api/v1/up/ok",
            {"Authorization": f"Bearer {good}", "Idempotency-Key": "x" * 300},
            {},
        ),
        (400, "POST", "/api/v1/sms/send", {"Authorization": f"Bearer {good}"}, {"to": good}),
        (
            400,
            "POST",
            "/api/v1/sms/send",
            {"Authorization": f"Bearer {good}"},
            {"to": good, "message": "hi"},
        ),
        (401, "POST", "/api/v1/up/ok", {}, {}),
        (401, "POST", f"/api/v1/up/ok?api_key={good}", {}, {}),
        (401, "POST", f"/api/v1/up/ok?key={OPERATOR}", {}, {}),
        (401, "POST", "/api/v1/up/ok", {"X-Api-Key": good}, {}),
        (401, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {broken}"}, {}),
        (401, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {unknown}"}, {}),
        (401, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {good}{good}"}, {}),
        (401, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {OPERATOR}x"}, {}),
        (401, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {OPERATOR[:-1]}"}, {}),
        (401, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer eyJ{good}.{good}.{good}"}, {}),
        (401, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {cast.revoked}"}, {}),
        (402, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {cast.poor}"}, {}),
        (403, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {cast.narrow}"}, {}),
        (403, "POST", "/api/v1/up/ok", {"Authorization": f"Bearer {cast.suspended}"}, {}),
    ]
    for status, method, path, headers, value in refusals:
        body = None if value is None else json.dumps(value).encode()
        sent = {"Content-Type": "application/json"} | headers
        answer = box.request(method, path, headers=sent, body=body)
        what = f"{method} {path[:20]} with {list(headers)}"
        assert answer.status == status, (what, answer.status, answer.body)
        findings.answer(what, answer)
    basic = base64.b64encode(f"{good}:".encode()).decode()
    for credential in (f"Basic {basic}", good, f"Token {good}", f"bearer  {broken}", "Bearer"):
        answer = box.post("/api/v1/up/ok", Authorization=credential)
        assert answer.status in (400, 401), (credential[:8], answer.body)
        findings.answer(credential[:8], answer)
    for _ in range(3):
        findings.answer("too often", box.post("/api/v1/up/empty", cast.slow))
    assert [hit.path for hit in upstream.hits()] in ([], ["/empty"], ["/empty"] * 2)


def test_no_secret_shows_in_repeated_calls(box: Farebox, cast: Cast, findings: Findings) -> None:
    for value, status in (({"a": 1}, 200), ({"a": 1}, 200), ({"a": 2}, 422)):
        answer = box.post("/api/v1/up/secrets", cast.rich, value, Idempotency_Key="canary-repeat")
        assert answer.status == status
        findings.answer("a repeated call", answer)
        assert not PROVIDER_CANARY.search(str(answer.headers).encode())


def test_no_secret_shows_to_readers(box: Farebox, cast: Cast, findings: Findings) -> None:
    for path in (
        "/",
        "/healthz",
        "/api/health",
        "/metrics",
        "/docs",
        "/docs/errors",
        "/openapi.json",
        "/api/v1/account",
        "/v1/account",
        "/api/v1/usage?limit=100",
        "/api/v1/ledger?limit=100",
        "/api/v1/keys",
        "/api/v1/usage/none",
        "/api/v1/usage?cursor=x'--",
        "/static/../config.py",
        "/static/%2e%2e/config.py",
    ):
        for key in (None, cast.rich, OPERATOR):
            answer = findings.answer(path, box.get(path, key))
            assert answer.status < 500, (path, answer.body)


def test_no_secret_shows_on_the_command_line(box: Farebox, cast: Cast, findings: Findings) -> None:
    for words in (
        ["keys", "list"],
        ["keys", "list", cast.email],
        ["users", "list"],
        ["credits", "balance", cast.email],
        ["credits", "balance", "nobody@example.com"],
        ["ledger", "verify"],
        ["doctor"],
        ["price", "/api/v1/up/*"],
    ):
        done = box.run_flask(*words, may_fail=True)
        findings.seen.append((f"flask {' '.join(words)}", (done.stdout + done.stderr).encode()))


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send bytes and read until the server closes, or says nothing more."""
    received = b""
    with contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while piece := sock.recv(65536):
            received += piece
    return received


def test_no_secret_shows_in_answers_to_garbage(
    box: Farebox, cast: Cast, findings: Findings, upstream: Upstream
) -> None:
    for key in (cast.rich, OPERATOR):
        k = key.encode()
        host = b"Host: localhost\r\n"
        for garbage in (
            k + b"\r\n\r\n",
            b"GET /api/v1/up/ok?k=" + k + b"\r\n\r\n",
            b"GET /api/v1/up/ok " + k + b"\r\n\r\n",
            b"GET / HTTP/9.9\r\nAuthorization: Bearer " + k + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + host + b"Authorization : Bearer " + k + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + host + b"Authorization: Bearer " + k + b"\0\r\n\r\n",
            b"GET / HTTP/1.1\r\n Bearer " + k + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + host + b"Authorization:\r\n Bearer " + k + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + host + b"Bearer " + k + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + host + k + b": x\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + host + k + b"\xff: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: " + k + b"\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + host + b"Content-Length: " + k + b"\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + host + b"Transfer-Encoding: " + k + b"\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\n" + k + b"\r\n",
            k + b" / HTTP/1.1\r\n" + host + b"\r\n",
            b"GET /" + b"a" * 9000 + k + b" HTTP/1.1\r\n" + host + b"\r\n",
            b"\x16\x03\x01\x02\x00" + k + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\nAuthorization: Bearer " + k,
        ):
            with box.connect(timeout=10) as sock:
                findings.seen.append((f"answer to {garbage[:30]!r}", exchange(sock, garbage)))
    assert not upstream.hits()
    assert box.healthy()


def test_no_secret_is_stored_in_the_clear(
    box: Farebox, cast: Cast, findings: Findings, secrets: dict[str, str]
) -> None:
    # Stopped, so that reading the database's file cannot disturb SQLite's locks.
    box.stop()
    for path in sorted(Path(box.instance).rglob("*")):
        if path.is_file():
            findings.seen.append((f"file {path.name}", path.read_bytes()))
            assert path.stat().st_mode & 0o077 == 0 or path.suffix in (".toml", ".log"), path
    box.start()
