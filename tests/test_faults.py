"""Whatever an upstream does wrong, the caller gets one clear answer and keeps the credits.

Every fault goes through a real gateway to a real, misbehaving server; both error dialects are
checked, and after each fault the books must be exactly where they were.
"""

from __future__ import annotations

import gzip
import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from conftest import StartFarebox
from doubles import (
    TWILIO_BROKEN,
    TWILIO_BUSY,
    TWILIO_HANGS,
    TWILIO_REFUSALS,
    TWILIO_RESETS,
    Twilio,
    Upstream,
    ndjson_event,
    refused_port,
    sms_segments,
    sse_event,
)
from server import Answer, Farebox, until
from urllib3 import HTTPHeaderDict

PRICE = 3
UNITS_MAX = 20
TIMEOUT_SECONDS = 1
MAX_SECONDS = 3

FLAT, OBJECT = "/api/v1/up", "/v1/up"
DIALECTS = [FLAT, OBJECT]


def config(upstream: Upstream, twilio: Twilio) -> str:
    routes = "".join(
        f"""
[[routes]]
path = "{prefix}/{name}/*"
methods = ["GET", "POST"]
upstream = "{name}"
upstream_path = "/*"
credits = {PRICE}
"""
        for prefix in DIALECTS
        for name in ("double", "refusing")
    )
    messages = "".join(
        f"""
[upstreams.{name}]
kind = "twilio"
base_url = "{twilio.url}"
account_sid = "{twilio.account_sid}"
auth_token = "{token}"
from = "+15005550006"
timeout_seconds = {TIMEOUT_SECONDS}

[[routes]]
path = "{path}"
methods = ["POST"]
upstream = "{name}"
adapter = "sms"
credits = 1
per = "sms_segment"
"""
        for name, path, token in (
            ("texts", "/api/v1/sms/send", twilio.auth_token),
            ("stranger", "/api/v1/sms/stranger", "not-the-token"),
        )
    )
    return f"""
[upstreams.double]
kind = "http"
base_url = "{upstream.url}"
timeout_seconds = {TIMEOUT_SECONDS}
max_seconds = {MAX_SECONDS}
return_headers = ["X-Quota"]

[upstreams.refusing]
kind = "http"
base_url = "http://127.0.0.1:{refused_port()}"
timeout_seconds = {TIMEOUT_SECONDS}
{routes}
[[routes]]
path = "/api/v1/pages/*"
methods = ["GET", "POST"]
upstream = "double"
upstream_path = "/*"
credits = {PRICE}
per = "unit"
units = {{ from = "json", pointer = "/usage/pages", max = {UNITS_MAX} }}
{messages}
[limits]
requests_per_minute = 1000000
"""


@dataclass
class Payer:
    """A caller with credits, who counts them before and after."""

    box: Farebox
    key: str
    before: int = 0

    def charged(self) -> int:
        """What was charged since the last look, once nothing is held any more."""
        now = self.box.settled(self.key)
        spent, self.before = self.before - now, now
        return spent


@pytest.fixture(scope="module")
def box(start_farebox: StartFarebox, upstream_server: Upstream, twilio_server: Twilio) -> Farebox:
    return start_farebox(config(upstream_server, twilio_server))


@pytest.fixture(scope="module")
def key(box: Farebox) -> str:
    return box.account(credits=1_000_000)[1]


@pytest.fixture
def payer(box: Farebox, key: str, upstream: Upstream) -> Iterator[Payer]:
    yield Payer(box, key, box.settled(key))
    upstream.release()
    box.settled(key)


def assert_refunded(answer: Answer, prefix: str, status: int, code: str) -> None:
    """The answer is the contract's error for an upstream's failure, in the path's dialect."""
    assert (answer.status, answer.code) == (status, code), answer.body[:500]
    body = answer.json()
    if prefix == OBJECT:
        error = body["error"]
        assert error["type"] == "api_error"
        assert error["docs"].endswith(f"/docs/errors#{code}")
        assert error["message"]
        assert error["param"] is None
    else:
        assert body["success"] is False
        assert body["message"]
    assert body["refunded"] is True
    assert body["request_id"] == answer.request_id
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers.get("X-Credits-Charged", "0") == "0"


def assert_voided(payer: Payer, answer: Answer) -> None:
    record = payer.box.call(payer.key, answer.request_id)
    assert (record["status"], record["captured"], record["held"]) == ("voided", 0, PRICE)


UNARY_FAULTS: dict[str, tuple[str, int, str]] = {
    "resets": ("reset", 502, "provider_error"),
    "closes": ("close", 502, "provider_error"),
    "hangs": ("hang", 504, "provider_timeout"),
    "falls silent after its headers": ("head-then-hang", 504, "provider_timeout"),
    "answers 500": ("status/500", 502, "provider_error"),
    "answers 503 with Retry-After": ("status/503?retry_after=9", 502, "provider_error"),
    "answers 599": ("status/599", 502, "provider_error"),
    "refuses the operator (401)": ("status/401", 502, "provider_error"),
    "refuses the operator (403)": ("status/403", 502, "provider_error"),
    "wants a proxy's password (407)": ("status/407", 502, "provider_error"),
    "cuts the body": ("cut/5000/12", 502, "provider_error"),
    "sends no byte of the body": ("cut/5000/0", 502, "provider_error"),
    "cuts the body by a reset": ("cut/5000/12?how=reset", 502, "provider_error"),
    "falls silent in the body": ("cut/5000/12?how=hang", 504, "provider_timeout"),
    "cuts a chunked body": ("cut-chunked/2", 502, "provider_error"),
    "cuts a chunked body by a reset": ("cut-chunked/1?how=reset", 502, "provider_error"),
    "falls silent in a chunked body": ("cut-chunked/1?how=hang", 504, "provider_timeout"),
    "sends a chunk size of letters": ("bad-chunk", 502, "provider_error"),
    "sends a status line of noise": ("garbage-status", 502, "provider_error"),
    "sends headers of noise": ("garbage-headers", 502, "provider_error"),
    "sends a megabyte of headers": ("huge-headers/1000000", 502, "provider_error"),
    "sends a NUL in a header": ("nul-header", 502, "provider_error"),
    "sends a negative length": ("bad-length/-4", 502, "provider_error"),
    "sends a length in words": ("bad-length/many", 502, "provider_error"),
    "sends two lengths": ("two-lengths", 502, "provider_error"),
    "drips for longer than a call may take": ("drip/300/20", 504, "provider_timeout"),
}


# Every fault in one dialect; in the other one of each kind, since what differs is only the telling.
UNARY_CASES = [(fault, FLAT) for fault in UNARY_FAULTS] + [
    (fault, OBJECT) for fault in ("resets", "hangs", "answers 500", "cuts the body")
]


@pytest.mark.parametrize(("fault", "prefix"), UNARY_CASES)
def test_an_upstream_fault_costs_nothing(
    payer: Payer, upstream: Upstream, fault: str, prefix: str
) -> None:
    what, status, code = UNARY_FAULTS[fault]
    answer = payer.box.post(f"{prefix}/double/{what}", payer.key)
    assert_refunded(answer, prefix, status, code)
    assert payer.charged() == 0
    assert_voided(payer, answer)
    assert len(upstream.hits()) == 1, "an ambiguous failure must not be tried again"


@pytest.mark.parametrize("prefix", DIALECTS)
def test_a_refused_connection_costs_nothing(payer: Payer, prefix: str) -> None:
    answer = payer.box.post(f"{prefix}/refusing/ok", payer.key)
    assert_refunded(answer, prefix, 502, "provider_error")
    assert payer.charged() == 0
    assert_voided(payer, answer)


@pytest.mark.parametrize("prefix", DIALECTS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_and_is_never_followed(
    payer: Payer, upstream: Upstream, prefix: str, status: int
) -> None:
    target = f"{upstream.url}/ok/landed"
    answer = payer.box.post(f"{prefix}/double/redirect/{status}?to={target}", payer.key)
    assert_refunded(answer, prefix, 502, "provider_error")
    assert "Location" not in answer.headers
    assert [hit.path for hit in upstream.hits()] == [f"/redirect/{status}"]
    assert payer.charged() == 0


def test_a_redirect_to_itself_ends(payer: Payer, upstream: Upstream) -> None:
    answer = payer.box.get(f"{FLAT}/double/redirect/302", payer.key)
    assert_refunded(answer, FLAT, 502, "provider_error")
    assert len(upstream.hits()) == 1


@pytest.mark.parametrize("prefix", DIALECTS)
@pytest.mark.parametrize("status", [400, 402, 404, 409, 422, 429])
def test_an_upstreams_refusal_of_the_request_is_passed_on_uncharged(
    payer: Payer, prefix: str, status: int
) -> None:
    answer = payer.box.post(f"{prefix}/double/status/{status}?body=as-is&retry_after=7", payer.key)
    assert (answer.status, answer.body) == (status, b"as-is")
    assert answer.headers["Retry-After"] == "7"
    assert payer.charged() == 0
    record = payer.box.call(payer.key, answer.request_id)
    assert (record["status"], record["upstream_status"]) == ("voided", status)


def test_a_whole_answer_is_charged_and_says_so(payer: Payer) -> None:
    answer = payer.box.post(f"{FLAT}/double/ok/whole", payer.key, {"a": 1})
    assert answer.status == 200
    assert json.loads(answer.json()["body"]) == {"a": 1}
    assert payer.charged() == PRICE
    assert answer.headers["X-Credits-Charged"] == str(PRICE)
    assert answer.headers["X-Credits-Remaining"] == str(payer.before)


def test_an_answer_without_a_body_is_charged(payer: Payer) -> None:
    answer = payer.box.post(f"{FLAT}/double/empty", payer.key)
    assert (answer.status, answer.body) == (204, b"")
    assert payer.charged() == PRICE


def test_a_slow_answer_within_the_time_is_charged(payer: Payer) -> None:
    # Longer than one time-out in all, but never silent for that long.
    answer = payer.box.get(f"{FLAT}/double/drip/400/4", payer.key)
    assert (answer.status, answer.body) == (200, b"....")
    assert payer.charged() == PRICE


def test_interim_answers_are_not_the_answer(payer: Payer) -> None:
    answer = payer.box.post(f"{FLAT}/double/interim", payer.key)
    assert answer.status == 200
    assert answer.json()["method"] == "POST"
    assert payer.charged() == PRICE


def test_the_rest_of_one_answer_is_never_the_next_one(payer: Payer, upstream: Upstream) -> None:
    for turn in range(20):
        first = payer.box.get(f"{FLAT}/double/extra-bytes", payer.key)
        assert upstream.gate("spilt").wait(lambda: True)  # what comes later nobody can know
        second = payer.box.get(f"{FLAT}/double/ok/after-{turn}", payer.key)
        assert b"stolen" not in first.body + second.body
        if first.status == 200:
            assert first.json() == {"mine": True}
        # The spoilt connection may cost the next call its answer, never give it a wrong one.
        if second.status == 200:
            assert second.json()["target"] == f"/ok/after-{turn}"
        charged = [answer.status for answer in (first, second)].count(200) * PRICE
        assert payer.charged() == charged


def test_an_answer_compressed_against_our_wish_stays_readable(
    payer: Payer, upstream: Upstream
) -> None:
    with payer.box.stream("GET", f"{FLAT}/double/gzip", payer.key) as response:
        body = response.read()
        if response.status == 200:
            if response.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert json.loads(body)["method"] == "GET"
    assert payer.charged() == (PRICE if response.status == 200 else 0)
    assert upstream.hits()[0].header("Accept-Encoding") == "identity"


# Connections that were kept


def test_a_post_is_not_sent_twice_when_a_kept_connection_dies(
    payer: Payer, upstream: Upstream
) -> None:
    # Which thread, and so which kept connection, serves a call is chance: try until one was reused.
    died = 0
    for turn in range(400):
        path = f"/close-reused/{turn}/"
        answer = payer.box.post(f"{FLAT}/double{path}", payer.key)
        (hit,) = upstream.hits(path)
        if hit.reused:
            died += 1
            assert_refunded(answer, FLAT, 502, "provider_error")
            assert payer.charged() == 0
        else:
            assert answer.status == 200
            assert payer.charged() == PRICE
        if died == 5:
            return
    pytest.fail("no connection to the upstream was ever kept")


def test_a_connection_the_upstream_closed_while_idle_is_not_used(
    payer: Payer, upstream: Upstream
) -> None:
    for turn in range(40):
        path = f"/ok-then-close/{turn}/"
        assert payer.box.post(f"{FLAT}/double{path}", payer.key).status == 200
        # Its end has reached the gateway's kernel when the double has ended the exchange.
        (hit,) = upstream.hits(path)
        upstream.wait_ended(hit)
    assert payer.charged() == 40 * PRICE


# Streams

STREAM_CUTS = ["close", "reset", "hang"]
STREAMS = {"sse": sse_event, "ndjson": ndjson_event}


def read_events(response: http.client.HTTPResponse) -> tuple[bytes, bool]:
    """All that came, and whether it looked complete."""
    received = b""
    try:
        while piece := response.read1(65536):
            received += piece
    except (http.client.HTTPException, ConnectionResetError):
        return received, False
    return received, True


@pytest.mark.parametrize("prefix", DIALECTS)
@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_comes_through_event_by_event_and_is_charged_once(
    payer: Payer, upstream: Upstream, kind: str, prefix: str
) -> None:
    gate = upstream.gate(f"{kind}-ok")
    path = f"{prefix}/double/{kind}/3?gate={kind}-ok"
    gate.let()  # An answer need not begin before its first byte is there.
    with payer.box.stream("GET", path, payer.key) as response:
        received = b""
        for index in range(3):
            event = STREAMS[kind](index)
            while not received.endswith(event):
                piece = response.read1(65536)
                assert piece, "the stream ended early"
                received += piece
            if index < 2:
                assert payer.box.standing(payer.key)[1] == PRICE, "held while it runs"
                gate.let()
        assert read_events(response) == (b"", True)
        assert response.headers["X-Credits-Held"] == str(PRICE)
        assert "X-Credits-Charged" not in response.headers
    assert payer.charged() == PRICE


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("how", STREAM_CUTS)
def test_a_stream_cut_after_its_first_events_costs_its_price(
    payer: Payer, upstream: Upstream, kind: str, how: str
) -> None:
    events = STREAMS[kind](0) + STREAMS[kind](1)
    gate = upstream.gate(f"{kind}-{how}")
    gate.let(2)
    path = f"{FLAT}/double/{kind}/9?cut=2&how={how}&gate={kind}-{how}"
    with payer.box.stream("GET", path, payer.key) as response:
        assert response.status == 200
        received = b""
        while len(received) < len(events):
            piece = response.read1(65536)
            assert piece, "the stream ended early"
            received += piece
        gate.let()
        rest, complete = read_events(response)
        request_id = response.headers["X-Request-Id"]
    assert received + rest == events
    assert not complete, "a cut stream must not look whole"
    assert payer.charged() == PRICE
    record = payer.box.call(payer.key, request_id)
    assert (record["status"], record["captured"]) == ("captured", PRICE)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_stream_that_comes_together_with_its_cut_costs_what_was_delivered(
    payer: Payer, kind: str, how: str
) -> None:
    events = STREAMS[kind](0) + STREAMS[kind](1)
    path = f"{FLAT}/double/{kind}/9?cut=2&how={how}"
    with payer.box.stream("GET", path, payer.key) as response:
        status = response.status
        received, complete = read_events(response)
    if status == 200:
        assert events.startswith(received)
        assert not complete, "a cut stream must not look whole"
        assert payer.charged() == (PRICE if received else 0)
    else:
        # A reset may overtake what was sent before it; then nothing was delivered.
        assert status == 502
        assert payer.charged() == 0
    if how == "close":
        assert received == events, "what came before an orderly end is passed on"


@pytest.mark.parametrize(("kind", "prefix"), list(zip(STREAMS, DIALECTS, strict=True)))
@pytest.mark.parametrize("how", STREAM_CUTS)
def test_a_stream_cut_before_its_first_byte_costs_nothing(
    payer: Payer, kind: str, how: str, prefix: str
) -> None:
    path = f"{prefix}/double/{kind}/9?cut=0&how={how}"
    with payer.box.stream("GET", path, payer.key) as response:
        body, _ = read_events(response)
        request_id = response.headers["X-Request-Id"]
        if response.status != 200:
            expected = {"hang": (504, "provider_timeout")}.get(how, (502, "provider_error"))
            answer = Answer(response.status, HTTPHeaderDict(response.headers.items()), body)
            assert_refunded(answer, prefix, *expected)
    assert payer.charged() == 0
    assert payer.box.call(payer.key, request_id)["status"] == "voided"


@pytest.mark.parametrize("kind", STREAMS)
def test_a_client_that_leaves_mid_stream_is_charged_and_its_hold_closed(
    payer: Payer, upstream: Upstream, kind: str
) -> None:
    path = f"{FLAT}/double/{kind}/100000?delay_ms=10"
    with payer.box.stream("GET", path, payer.key) as response:
        request_id = response.headers["X-Request-Id"]
        assert response.read1(65536)
        assert payer.box.call(payer.key, request_id)["status"] == "held"
    left_at = time.monotonic()
    assert payer.charged() == PRICE
    assert time.monotonic() - left_at < 5
    record = payer.box.call(payer.key, request_id)
    assert (record["status"], record["captured"]) == ("captured", PRICE)
    # Nobody reads any more, so the upstream must not be kept busy either.
    assert upstream.wait_ended(upstream.hits(f"/{kind}/")[0], 5) == "gone"


def test_a_client_that_leaves_before_the_answer_frees_its_hold(
    payer: Payer, upstream: Upstream
) -> None:
    sock = payer.box.connect()
    path = f"{FLAT}/double/hang"
    sock.sendall(
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {payer.key}\r\n\r\n"
        "".encode()
    )
    upstream.wait_for(1, "/hang")
    sock.close()
    assert payer.charged() == 0


def test_a_streams_hold_is_its_price_and_no_more_than_that(payer: Payer) -> None:
    poor = payer.box.account(credits=PRICE)[1]
    with payer.box.stream("GET", f"{FLAT}/double/sse/2", poor) as response:
        assert response.status == 200
        assert read_events(response) == (sse_event(0) + sse_event(1), True)
    assert payer.box.settled(poor) == 0
    refused = payer.box.get(f"{FLAT}/double/sse/2", poor)
    assert (refused.status, refused.code) == (402, "insufficient_credits")


@pytest.mark.parametrize("framing", ["", "?chunked=1"])
def test_a_large_answer_comes_whole_and_is_charged_once(payer: Payer, framing: str) -> None:
    answer = payer.box.get(f"{FLAT}/double/big/3000000{framing}", payer.key)
    assert answer.status == 200
    assert answer.body == b"B" * 3_000_000
    assert payer.charged() == PRICE


def test_an_answer_that_ends_with_its_connection_comes_whole(payer: Payer) -> None:
    answer = payer.box.get(f"{FLAT}/double/until-close/2000000", payer.key)
    assert (answer.status, len(answer.body)) == (200, 2_000_000)
    assert payer.charged() == PRICE


@pytest.mark.parametrize("how", STREAM_CUTS)
@pytest.mark.parametrize("framing", ["", "chunked=1&"])
def test_a_large_answer_cut_after_it_began_costs_its_price(
    payer: Payer, framing: str, how: str
) -> None:
    path = f"{FLAT}/double/big/3000000?{framing}cut=2000000&how={how}"
    with payer.box.stream("GET", path, payer.key) as response:
        received, complete = read_events(response)
    # A reset may overtake all that was sent before it; then it is an ordinary failure.
    if how == "reset" and response.status == 502:
        assert payer.charged() == 0
        return
    assert response.status == 200
    assert received == b"B" * len(received)
    if how != "reset":
        assert len(received) == 2_000_000
    # A body shorter than the length that was announced shows by itself.
    assert not complete or response.headers.get("Content-Length") == "3000000"
    assert received
    assert payer.charged() == PRICE


def test_a_large_answer_cut_before_its_first_byte_costs_nothing(payer: Payer) -> None:
    with payer.box.stream("GET", f"{FLAT}/double/big/3000000?cut=0", payer.key) as response:
        read_events(response)
    assert payer.charged() == 0


def test_an_answer_that_might_still_be_small_is_read_whole_before_it_is_charged(
    payer: Payer,
) -> None:
    answer = payer.box.get(f"{FLAT}/double/big/3000000?chunked=1&cut=100000", payer.key)
    assert_refunded(answer, FLAT, 502, "provider_error")
    assert payer.charged() == 0


# Units


def test_units_are_charged_by_what_the_answer_says(payer: Payer) -> None:
    cases = [
        ("units/7", 7, False),
        ("units/1", 1, False),
        (f"units/{UNITS_MAX}", UNITS_MAX, False),
        (f"units/{UNITS_MAX + 5}", UNITS_MAX, None),  # Whether a bound was an estimate is not said.
        ("units/0", 1, None),
        ("units/0?json=%7B%7D", 1, True),
        ("units/0?json=%7B%22usage%22%3A%7B%22pages%22%3A%227%22%7D%7D", 1, True),
        ("units/0?json=%7B%22usage%22%3A%7B%22pages%22%3A7.5%7D%7D", 1, True),
        ("units/0?json=%7B%22usage%22%3A%7B%22pages%22%3Atrue%7D%7D", 1, True),
        ("units/0?json=%7B%22usage%22%3A%7B%22pages%22%3A1e400%7D%7D", 1, True),
        ("units/0?json=not%20json", 1, True),
    ]
    for path, units, estimated in cases:
        answer = payer.box.get(f"/api/v1/pages/{path}", payer.key)
        assert answer.status == 200, path
        assert payer.charged() == PRICE * units, path
        assert answer.headers["X-Credits-Charged"] == str(PRICE * units)
        record = payer.box.call(payer.key, answer.request_id)
        assert record["held"] == PRICE * UNITS_MAX
        assert record["units"] == units, path
        if estimated is not None:
            assert bool(record["estimated"]) is estimated, path


@pytest.mark.parametrize(
    ("what", "status", "code"),
    [
        ("cut/5000/12", 502, "provider_error"),
        ("big/3000000?cut=2000000", 502, "provider_error"),
        ("big/9000000", 502, "provider_error"),
        ("big/9000000?chunked=1", 502, "provider_error"),
        ("status/500", 502, "provider_error"),
        ("hang", 504, "provider_timeout"),
    ],
)
def test_an_answer_whose_units_cannot_be_read_whole_costs_nothing(
    payer: Payer, what: str, status: int, code: str
) -> None:
    answer = payer.box.get(f"/api/v1/pages/{what}", payer.key)
    assert_refunded(answer, FLAT, status, code)
    assert payer.charged() == 0


# Messages


def test_a_message_reaches_twilio_as_twilio_wants_it(payer: Payer, twilio: Twilio) -> None:
    text = "naïve € [brackets] " * 12
    answer = payer.box.sms(payer.key, text=text)
    assert answer.status == 200, answer.body
    body = answer.json()
    assert body["success"] is True
    assert body["provider"] == "texts"
    assert body["messageId"].startswith("msg_")
    assert body["to"] == "+18148835337"
    assert body["segments"] == sms_segments(text)
    assert payer.charged() == sms_segments(text)
    assert twilio.sent == [{"To": "+18148835337", "From": "+15005550006", "Body": text}]


@pytest.mark.parametrize("number", TWILIO_REFUSALS)
def test_a_number_the_provider_refuses_is_the_callers_mistake(
    payer: Payer, twilio: Twilio, number: str
) -> None:
    answer = payer.box.sms(payer.key, to=number)
    assert (answer.status, answer.code) == (400, "validation_error")
    assert payer.charged() == 0
    assert len(twilio.hits()) == 1


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [
        (TWILIO_BROKEN, 502, "provider_error"),
        (TWILIO_RESETS, 502, "provider_error"),
        (TWILIO_HANGS, 504, "provider_timeout"),
    ],
)
def test_a_message_that_may_have_been_sent_is_not_sent_again(
    payer: Payer, twilio: Twilio, number: str, status: int, code: str
) -> None:
    answer = payer.box.sms(payer.key, to=number)
    assert_refunded(answer, FLAT, status, code)
    assert payer.charged() == 0
    assert len(twilio.hits()) == 1
    twilio.release()


def test_a_busy_provider_says_when_to_come_back(payer: Payer, twilio: Twilio) -> None:
    answer = payer.box.sms(payer.key, to=TWILIO_BUSY)
    assert answer.status == 429
    assert answer.headers["Retry-After"] == "7"
    assert payer.charged() == 0


def test_an_operators_wrong_password_is_not_the_callers_business(
    payer: Payer, twilio: Twilio
) -> None:
    value = {"to": "+18148835337", "message": "hi"}
    answer = payer.box.post("/api/v1/sms/stranger", payer.key, value)
    assert_refunded(answer, FLAT, 502, "provider_error")
    assert b"20003" not in answer.body
    assert payer.charged() == 0


# The same key after a failure


def test_after_a_failure_the_same_idempotency_key_may_be_tried_again(
    payer: Payer, upstream: Upstream
) -> None:
    path = f"{FLAT}/double/status/500"
    for attempt in range(1, 3):
        answer = payer.box.post(path, payer.key, Idempotency_Key="again-after-failure")
        assert_refunded(answer, FLAT, 502, "provider_error")
        assert "Idempotent-Replayed" not in answer.headers
        assert len(upstream.hits("/status/500")) == attempt
    assert payer.charged() == 0


def test_a_charged_stream_is_replayed_free(payer: Payer, upstream: Upstream) -> None:
    path = f"{FLAT}/double/sse/4"
    first = payer.box.post(path, payer.key, Idempotency_Key="replayed-stream")
    assert first.status == 200
    assert payer.charged() == PRICE

    # The answer is stored with the capture, which may end a moment after the stream does.
    def replayed() -> Answer | None:
        answer = payer.box.post(path, payer.key, Idempotency_Key="replayed-stream")
        return answer if answer.code != "idempotency_in_progress" else None

    again = until(replayed, 5)
    assert again is not None
    assert (again.status, again.body) == (200, first.body)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert payer.charged() == 0
    assert len(upstream.hits("/sse/4")) == 1
