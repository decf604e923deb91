"""What crosses the gateway in headers, in both directions, and what never does."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import StartFarebox
from doubles import Exchange, Upstream
from inprocess import HOST, STRANGERS_KEY, Background, Box, everything
from server import OPERATOR_KEY, Answer, Farebox

from config import ConfigError

MIB = 1024 * 1024
# All that an upstream learns of a request when the config adds nothing.
TRANSPORT = {"host", "user-agent", "accept", "accept-encoding", "x-request-id"}
BODY = {"content-length", "content-type"}


def config(url: str) -> str:
    def route(path: str, upstream: str, more: str = "") -> str:
        return f"""
[[routes]]
path = "{path}/*"
methods = ["GET", "POST"]
upstream = "{upstream}"
upstream_path = "/*"
credits = 3
{more}
"""

    return f"""
[upstreams.plain]
kind = "http"
base_url = "{url}"

[upstreams.adding]
kind = "http"
base_url = "{url}"
headers = {{ X-Api-Key = "key-of-the-operator", Accept-Language = "de", X-Empty = "" }}
forward_headers = ["X-Trace", "traceparent"]
return_headers = ["X-Quota", "Set-Cookie2"]

[upstreams.sandbox]
kind = "sandbox"

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
credits = 1

{route("/api/v1/up", "plain")}
{route("/v1/up", "plain")}
{route("/api/v1/adding", "adding")}
{
        route(
            "/api/v1/pages",
            "plain",
            'per = "unit"' + chr(10) + 'units = { from = "header", name = "X-Units", max = 2 }',
        )
    }
[limits]
requests_per_minute = 100000
body_bytes = 1000
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, upstream_server: Upstream) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("instance")
    with Box(folder, config(upstream_server.url)) as box:
        yield box


@pytest.fixture(scope="module")
def served(start_farebox: StartFarebox, upstream_server: Upstream) -> Farebox:
    return start_farebox(config(upstream_server.url), workers=1)


# To the upstream.

# Nothing of these is the upstream's business, whatever a client sends.
PRIVATE = {
    "Cookie": "session=canary",
    "Proxy-Authorization": "Basic canary",
    "Idempotency-Key": "canary",
    "X-Api-Key": "canary",
    "X-CSRF-Token": "canary",
    "X-Forwarded-For": "198.51.100.7",
    "X-Forwarded-Host": "canary.example",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Prefix": "/canary",
    "X-Real-Ip": "198.51.100.7",
    "Forwarded": "for=canary",
    "Via": "1.1 canary",
    "PAYMENT-SIGNATURE": "canary",
    "PAYMENT-REQUIRED": "canary",
    "PAYMENT-RESPONSE": "canary",
    "Signature": "sig=:canary:",
    "Signature-Input": "sig=canary",
    "Content-Digest": "sha-256=:canary:",
    "Origin": "https://canary.example",
    "Referer": "https://canary.example/",
    "User-Agent": "canary/1.0",
    "Range": "bytes=0-canary",
    "If-None-Match": '"canary"',
    "X-Trace": "canary",
    "X-Http-Method-Override": "DELETE",
    "X-Original-Url": "/canary",
    "X-Rewrite-Url": "/canary",
    "Accept-Encoding": "gzip",
}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_upstream_learns_of_a_request_only_what_is_on_the_list(
    box: Box, upstream: Upstream, method: str
) -> None:
    key = box.payer().key
    shown = {
        "Accept": "application/vnd.x+json",
        "Accept-Language": "fr-CH",
        "Content-Type": "application/x-thing",
    }
    body = b"{}" if method == "POST" else None
    answer = box.request(method, "/api/v1/up/ok", key=key, headers=PRIVATE | shown, body=body)
    assert answer.status == 200
    (hit,) = upstream.hits()
    names = [name.lower() for name, _ in hit.headers]
    length = {"content-length"} if body else set()
    assert sorted(names) == sorted(TRANSPORT | {"accept-language", "content-type"} | length)
    for name, text in shown.items():
        assert hit.header(name) == text
    assert b"canary" not in hit.everything()
    assert b"198.51.100.7" not in hit.everything()
    assert key.encode() not in hit.everything()
    assert hit.header("Host") == upstream.url.removeprefix("http://")
    assert hit.header("Accept-Encoding") == "identity"


def test_no_name_of_a_header_is_invented(box: Box, upstream: Upstream) -> None:
    box.get("/api/v1/up/ok", box.payer().key)
    (hit,) = upstream.hits()
    assert {name.lower() for name, _ in hit.headers} == TRANSPORT
    assert hit.header("Accept") == "*/*"


def test_a_body_without_a_type_is_sent_as_json(box: Box, upstream: Upstream) -> None:
    box.request("POST", "/api/v1/up/ok", key=box.payer().key, body=b"{}")
    (hit,) = upstream.hits()
    assert hit.header("Content-Type") == "application/json"
    assert {name.lower() for name, _ in hit.headers} == TRANSPORT | BODY


def test_the_config_adds_headers_and_its_own_win(box: Box, upstream: Upstream) -> None:
    sent = {
        "X-Trace": "trace-1",
        "Traceparent": "00-abc",
        "X-Api-Key": "of the caller",
        "Accept-Language": "fr",
        "X-Quota": "7",
        "Cookie": "canary",
    }
    box.request("GET", "/api/v1/adding/ok", key=box.payer().key, headers=sent)
    (hit,) = upstream.hits()
    names = [name.lower() for name, _ in hit.headers]
    assert len(names) == len(set(names))
    assert set(names) == TRANSPORT | {
        "x-trace", "traceparent", "x-api-key", "accept-language", "x-empty",
    }  # fmt: skip
    assert hit.header("X-Trace") == "trace-1"
    assert hit.header("Traceparent") == "00-abc"
    assert hit.header("X-Api-Key") == "key-of-the-operator"
    assert hit.header("Accept-Language") == "de"
    assert hit.header("X-Empty") == ""


def test_the_operator_key_never_reaches_an_upstream(box: Box, upstream: Upstream) -> None:
    assert box.post("/api/v1/up/ok", OPERATOR_KEY).status == 200
    assert OPERATOR_KEY.encode() not in upstream.hits()[0].everything()


def test_a_header_with_odd_bytes_breaks_nothing(served: Farebox, upstream: Upstream) -> None:
    _, key = served.account()
    for name in (b"Accept", b"Accept-Language", b"Content-Type", b"X-Trace"):
        for path in (b"/api/v1/up/ok", b"/api/v1/adding/ok"):
            with served.connect() as sock:
                sock.sendall(
                    b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                    b"Content-Length: 2\r\nAuthorization: Bearer " + key.encode() + b"\r\n"
                    + name + b": caf\xc3\xa9\xff\r\n\r\n{}"
                )  # fmt: skip
                answer = everything(sock)
            status = int(answer.split(b" ", 2)[1])
            assert status in (200, 400), (name, path, answer[:300])
    assert served.settled(key) == 57 - 3 * len(upstream.hits())


def test_a_header_sent_twice_stays_one_request(served: Farebox, upstream: Upstream) -> None:
    _, key = served.account()
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    connection.putrequest("GET", "/api/v1/up/ok")
    connection.putheader("Authorization", f"Bearer {key}")
    for text in ("text/html", "application/json"):
        connection.putheader("Accept", text)
    connection.endheaders()
    assert connection.getresponse().status == 200
    connection.close()
    (hit,) = upstream.hits()
    assert [v for n, v in hit.headers if n.lower() == "accept"] == ["text/html,application/json"]


# Back to the caller.

OURS = {
    "Content-Type", "Content-Length", "X-Request-Id", "X-Credits-Charged", "X-Credits-Remaining",
    "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "Cache-Control",
    "X-Content-Type-Options",
}  # fmt: skip


# A page's policy does no harm on an answer that is no page.
HARMLESS = {"Content-Security-Policy", "Referrer-Policy"}


def names(answer: Answer) -> set[str]:
    return set(answer.headers) - HARMLESS


def test_of_an_answers_headers_only_those_on_the_list_come_back(box: Box) -> None:
    payer = box.payer()
    answer = box.get("/api/v1/up/secrets", payer.key)
    assert answer.status == 200
    assert names(answer) == OURS | {"Content-Language"}
    assert "canary" not in str(answer.headers)
    # What the upstream says of credits is not what happened.
    assert answer.headers["X-Credits-Charged"] == "3"
    assert answer.headers["X-Credits-Remaining"] == "97"
    for name, _ in answer.headers.items():
        assert len(answer.headers.getlist(name)) == 1, name


def test_the_config_adds_what_comes_back(box: Box) -> None:
    answer = box.get("/api/v1/adding/secrets", box.payer().key)
    assert names(answer) == OURS | {"Content-Language", "X-Quota"}
    assert answer.headers["X-Quota"] == "41"
    assert "canary" not in str(answer.headers)


@pytest.mark.parametrize("status", [400, 404, 429])
def test_a_passed_on_refusal_has_no_more_headers_than_an_answer(box: Box, status: int) -> None:
    answer = box.get(f"/api/v1/up/status/{status}?retry_after=9", box.payer().key)
    assert names(answer) == OURS | {"Retry-After"}


def test_a_streamed_answer_has_no_more_headers_than_a_whole_one(box: Box) -> None:
    answer = box.get("/api/v1/up/sse/2", box.payer().key)
    held = OURS - {"X-Credits-Charged", "X-Credits-Remaining", "Content-Length"}
    assert names(answer) == held | {"X-Credits-Held"}


def test_the_server_names_no_version_and_sends_nothing_twice(served: Farebox) -> None:
    _, key = served.account()
    with served.stream("GET", "/api/v1/up/secrets", key) as response:
        sent = [name.lower() for name, _ in response.getheaders()]
        text = str(response.getheaders())
        response.read()
    assert len(sent) == len(set(sent)), sent
    assert "canary" not in text
    assert "27." not in text and "Werkzeug" not in text and "Python" not in text


CLAIMS = {
    "X-Credits-Charged": "999",
    "X-Credits-Remaining": "999",
    "X-Credits-Held": "999",
    "X-RateLimit-Limit": "999",
    "X-RateLimit-Remaining": "999",
    "X-Request-Id": "req_999",
    "X-Content-Type-Options": "sniff",
    "Idempotent-Replayed": "true",
    "WWW-Authenticate": "Basic realm=999",
    "Content-Encoding": "gzip",
    "Transfer-Encoding": "chunked",
    "Connection": "upgrade",
    "Content-Length": "999",
}


@pytest.mark.parametrize("added", list(CLAIMS))
def test_a_config_cannot_let_an_upstream_speak_in_our_name(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, added: str
) -> None:
    """Such a header is refused at the start, or what we say of it stands alone."""

    def claim(server: Upstream, exchange: Exchange) -> None:
        framing = ("Content-Length", "Transfer-Encoding", "Connection")
        exchange.json(200, {}, [(n, v) for n, v in CLAIMS.items() if n not in framing])

    monkeypatch.setitem(Upstream.behaviours, "claim", claim)
    text = config(upstream.url).replace('"Set-Cookie2"', f'"{added}"')
    try:
        box = Box(tmp_path / "i", text)
    except ConfigError as error:
        assert "return_headers" in str(error)
        return
    with box:
        payer = box.payer()
        plain = box.get("/api/v1/up/claim", payer.key)
        answer = box.get("/api/v1/adding/claim", payer.key)
        assert answer.status == 200
        if added in ("WWW-Authenticate", "Content-Encoding"):
            return  # an operator may know that these are right
        assert answer.headers.getlist(added) in ([], plain.headers.getlist(added)) or (
            added in ("X-Request-Id", "X-Credits-Remaining", "X-RateLimit-Remaining")
            and len(answer.headers.getlist(added)) == 1
            and "999" not in answer.headers[added]
        )


# The Host.


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8402", "127.0.0.1", "127.0.0.1:9", "localhost", "localhost:8402", "LOCALHOST",
     "pay.example.com", "pay.example.com:443", "Pay.Example.COM", "other.example.com:1"],
)  # fmt: skip
def test_hosts_we_serve_are_served(hosted: Box, host: str) -> None:
    answer = hosted.request("GET", "/docs/errors", host=host)
    assert answer.status == 200, host


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("instance")
    text = '[instance]\nhosts = ["Other.example.com"]\n'
    with Box(folder, text, FAREBOX_PUBLIC_URL="https://pay.example.com") as box:
        yield box


FOREIGN = [
    "evil.example",
    "evil.example:8402",
    "127.0.0.1.evil.example",
    "evil-localhost",
    "localhost.evil.example",
    "pay.example.com.evil.example",
    "xpay.example.com",
    "example.com",
    "0.0.0.0",
    "127.0.0.2",
    "[::2]:8402",
    "user@localhost",
    "localhost/evil",
    "localhost@evil.example",
    "localhost:80@evil.example",
    "localhost:80:80",
    "localhost, evil.example",
    "local host",
    "",
    " ",
    "\xe9",
]


@pytest.mark.parametrize("host", FOREIGN)
def test_any_other_host_is_400_whatever_is_asked(hosted: Box, host: str) -> None:
    key = hosted.payer().key
    for method, path in (
        ("GET", "/"),
        ("GET", "/docs/errors"),
        ("GET", "/setup?token=x"),
        ("GET", "/api/v1/account"),
        ("GET", "/v1/account"),
        ("POST", "/api/v1/sms/send"),
        ("GET", "/nothing"),
    ):
        answer = hosted.request(method, path, key=key, host=host)
        if host == "":
            assert answer.status != 500
            continue
        assert (answer.status, answer.code) == (400, "invalid_host"), (host, path)
        assert answer.headers["x-should-retry"] == "false"
        assert "evil" not in str(answer.headers)
        assert b"evil" not in answer.body


@pytest.mark.parametrize("host", FOREIGN)
def test_health_answers_on_any_host(hosted: Box, host: str) -> None:
    for path in ("/healthz", "/api/health"):
        answer = hosted.request("GET", path, host=host)
        assert answer.status == 200, answer


def test_the_host_is_checked_by_the_real_server_too(served: Farebox) -> None:
    _, key = served.account()
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost:80@evil.example"):
        answer = served.get("/api/v1/up/ok", key, Host=host)
        assert (answer.status, answer.code) == (400, "invalid_host")
        assert served.get("/healthz", Host=host).status == 200
        assert served.get("/api/health", Host=host).status == 200
    assert served.get("/api/v1/up/ok", key, X_Forwarded_Host="evil.example").status == 200


def test_a_forwarded_host_counts_only_from_a_proxy_we_trust(tmp_path: Path) -> None:
    sent = {"X-Forwarded-Host": "evil.example", "X-Forwarded-For": "198.51.100.7"}
    with Box(tmp_path / "alone") as box:
        assert box.request("GET", "/docs/errors", headers=sent).status == 200
    with Box(tmp_path / "behind", FAREBOX_TRUSTED_PROXIES="1") as box:
        answer = box.request("GET", "/docs/errors", headers=sent)
        assert (answer.status, answer.code) == (400, "invalid_host")
        asked = {"X-Forwarded-Host": "evil.example, localhost"}
        assert box.request("GET", "/docs/errors", headers=asked).status == 200
        assert box.request("GET", "/docs/errors", host="evil.example").status == 400
        assert box.request("GET", "/docs/errors").status == 200


def throttled(box: Box, client: Callable[[int], dict[str, str]]) -> bool:
    """Whether wrong secrets from these addresses run into the limit of one."""
    from core import tokens

    payer = box.payer()
    start = payer.key[: len("fare_live_") + tokens.LOOKUP_LENGTH]
    answer: Answer | None = None
    for number in range(6):
        body = start + tokens.random_text(tokens.SECRET_LENGTH)
        guess = body + tokens._checksum(body)
        answer = box.request("GET", "/api/v1/account", key=guess, headers=client(number))
    assert answer is not None
    return answer.status == 429


def test_a_forwarded_address_counts_only_from_proxies_we_trust(tmp_path: Path) -> None:
    limits = "[limits]\nfailed_auth_per_minute = 5\n"

    def spoofed(number: int) -> dict[str, str]:
        return {"X-Forwarded-For": f"198.51.100.{number}"}

    def behind_one(number: int) -> dict[str, str]:
        return {"X-Forwarded-For": f"192.0.2.{number}, 198.51.100.7"}

    def behind_two(number: int) -> dict[str, str]:
        return {"X-Forwarded-For": f"192.0.2.{number}, 198.51.100.7, 10.0.0.1"}

    with Box(tmp_path / "none", limits) as box:
        assert throttled(box, spoofed)
    with Box(tmp_path / "one", limits, FAREBOX_TRUSTED_PROXIES="1") as box:
        assert not throttled(box, spoofed)  # the proxy's word: they are different clients
        assert throttled(box, behind_one)  # and what a client wrote before it is not
    with Box(tmp_path / "two", limits, FAREBOX_TRUSTED_PROXIES="2") as box:
        assert not throttled(box, behind_one)
        assert throttled(box, behind_two)


# What every answer carries.

Asked = tuple[str, str, str | None]
ANSWERS: list[Asked] = [
    ("GET", "/", None),
    ("GET", "/docs/errors", None),
    ("GET", "/healthz", None),
    ("GET", "/api/health", None),
    ("GET", "/nothing", None),
    ("PUT", "/healthz", None),
    ("GET", "/setup?token=x", None),
    ("GET", "/reset", None),
    ("POST", "/setup", None),
    ("OPTIONS", "/api/v1/account", None),
    ("GET", "/api/v1/account", None),
    ("GET", "/v1/account", STRANGERS_KEY),
    ("GET", "/api/v1/account", OPERATOR_KEY),
    ("GET", "/api/v1/usage", OPERATOR_KEY),
    ("GET", "/api/v1/ledger", OPERATOR_KEY),
    ("GET", "/api/v1/up/ok", OPERATOR_KEY),
    ("GET", "/api/v1/up/sse/2", OPERATOR_KEY),
    ("GET", f"/api/v1/up/big/{2 * MIB}", OPERATOR_KEY),
    ("GET", "/api/v1/up/status/500", OPERATOR_KEY),
    ("GET", "/api/v1/up/status/404", OPERATOR_KEY),
    ("GET", "/api/v1/up/ok", None),
    ("DELETE", "/api/v1/up/ok", None),
    ("POST", "/api/v1/sms/send", OPERATOR_KEY),
]


@pytest.mark.parametrize("asked", ANSWERS, ids=lambda asked: f"{asked[0]} {asked[1]}")
def test_every_answer_is_uncached_unsniffed_and_numbered(box: Box, asked: Asked) -> None:
    method, path, key = asked
    answer = box.request(method, path, key=key)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Request-Id"].startswith("req_")
    assert "Set-Cookie" not in answer.headers
    assert answer.headers.get("Server") is None


@pytest.mark.parametrize("path", ["/", "/docs/errors", "/setup?token=x", "/reset?token=x"])
def test_a_page_has_the_headers_of_a_page(box: Box, path: str) -> None:
    answer = box.get(path)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Content-Security-Policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
        " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )
    assert answer.headers["Referrer-Policy"] == "same-origin"


def test_what_an_upstream_calls_html_can_do_nothing_here(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        Upstream.behaviours,
        "html",
        lambda server, exchange: exchange.answer(
            200, b"<script>alert(1)</script>", content_type="text/html"
        ),
    )
    answer = box.get("/api/v1/up/html", box.payer().key)
    assert answer.headers["Content-Type"] == "text/html"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


# Credits and rates.

PAID = [
    # path · charged · whether the upstream answered with success
    ("/api/v1/up/ok", 3),
    ("/v1/up/ok", 3),
    ("/api/v1/pages/units/2", 6),
    ("/api/v1/pages/units/1", 3),
    ("/api/v1/up/empty", 3),
    ("/api/v1/up/status/404", 0),
    ("/api/v1/up/status/429", 0),
    ("/api/v1/up/status/500", 0),
    ("/api/v1/up/status/401", 0),
    ("/api/v1/up/redirect/302", 0),
    ("/api/v1/up/reset", 0),
    ("/api/v1/up/cut/10/5", 0),
    ("/v1/up/status/503", 0),
]


@pytest.mark.parametrize(("path", "price"), PAID)
def test_every_paid_answer_says_what_it_cost_and_what_is_left(
    box: Box, path: str, price: int
) -> None:
    payer = box.payer(50, rate_limit=9)
    answer = box.get(path, payer.key)
    assert answer.headers["X-Credits-Charged"] == str(price)
    assert answer.headers["X-Credits-Remaining"] == str(50 - price)
    assert "X-Credits-Held" not in answer.headers
    assert answer.headers["X-RateLimit-Limit"] == "9"
    assert answer.headers["X-RateLimit-Remaining"] == "8"
    assert 1 <= int(answer.headers["X-RateLimit-Reset"]) <= 60
    assert box.standing(payer) == (50 - price, 0)


@pytest.mark.parametrize("path", ["sse/3", "ndjson/3", f"big/{2 * MIB}"])
def test_a_streamed_answer_says_what_is_held_instead(box: Box, path: str) -> None:
    payer = box.payer(50, rate_limit=9)
    answer = box.get(f"/api/v1/up/{path}", payer.key)
    assert answer.headers["X-Credits-Held"] == "3"
    assert "X-Credits-Charged" not in answer.headers
    assert answer.headers["X-RateLimit-Remaining"] == "8"


def test_what_remains_leaves_out_what_is_held(box: Box, upstream: Upstream) -> None:
    payer = box.payer(50)
    call = Background(lambda: box.get("/api/v1/up/gated/remains", payer.key))
    upstream.wait_for(1, "remains")
    answer = box.get("/api/v1/up/ok", payer.key)
    assert answer.headers["X-Credits-Remaining"] == "44"
    upstream.gate("remains").open()
    assert call.result().headers["X-Credits-Remaining"] == "44"


def test_refusals_of_a_known_key_show_its_rate(box: Box) -> None:
    payer = box.payer(2, rate_limit=4)
    broke = box.get("/api/v1/up/ok", payer.key)
    invalid = box.post("/api/v1/sms/send", payer.key, {"to": "x"})
    limited, _ = box.key(payer.account, rate_limit=4, credit_limit=0, credit_period="day")
    past = box.get("/api/v1/up/ok", limited)
    seen = [
        (a.status, a.headers["X-RateLimit-Limit"], a.headers["X-RateLimit-Remaining"])
        for a in (broke, invalid, past)
    ]
    assert seen == [(402, "4", "3"), (400, "4", "2"), (403, "4", "3")]
    replayed = [box.post("/api/v1/sms/send", payer.key, {"to": "+18148835337", "message": "hi"},
                         Idempotency_Key="k") for _ in range(2)]  # fmt: skip
    assert [a.headers["X-RateLimit-Remaining"] for a in replayed] == ["1", "0"]
    assert replayed[1].headers["Idempotent-Replayed"] == "true"


def test_a_stranger_is_shown_no_rate(box: Box) -> None:
    for key in (None, STRANGERS_KEY, "nonsense"):
        for path in ("/api/v1/up/ok", "/api/v1/account"):
            answer = box.get(path, key)
            assert not [n for n in answer.headers if n.startswith(("X-RateLimit", "X-Credits"))]


def test_the_default_host_of_these_tests_is_the_bind_address(box: Box) -> None:
    assert box.settings.bind == HOST
