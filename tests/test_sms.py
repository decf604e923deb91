"""The SMS contract, whatever the upstream speaks: what a message costs, and what comes of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs

import gsm0338
import pytest
from doubles import (
    TWILIO_BROKEN,
    TWILIO_BUSY,
    TWILIO_REFUSALS,
    TWILIO_RESETS,
    Exchange,
    Server,
    Twilio,
    Upstream,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inprocess import Box
from server import Answer

from core import segments

NUMBER = "+18148835337"


class Provider(Server):
    """A provider that is not Twilio: takes JSON, and says what a test told it to say."""

    def __init__(self) -> None:
        super().__init__()
        self.status = 202
        self.body = b'{"id": "abc-1"}'
        self.headers: list[tuple[str, str]] = []

    def respond(self, exchange: Exchange) -> None:
        exchange.answer(self.status, self.body, self.headers)


@pytest.fixture(scope="module")
def provider_server() -> Iterator[Provider]:
    with Provider() as server:
        yield server


@pytest.fixture
def provider(provider_server: Provider) -> Provider:
    provider_server.clear()
    provider_server.status, provider_server.body = 202, b'{"id": "abc-1"}'
    provider_server.headers = []
    return provider_server


@pytest.fixture(scope="module")
def box(
    tmp_path_factory: pytest.TempPathFactory,
    twilio_server: Twilio,
    provider_server: Provider,
    upstream_server: Upstream,
) -> Iterator[Box]:
    routes = "".join(
        f"""
[[routes]]
path = "/api/v1/{path}"
methods = ["POST"]
upstream = "{name}"
adapter = "sms"
credits = {credits}
per = "{per}"
{more}
"""
        for path, name, credits, per, more in (
            ("sms/send", "texts", 2, "sms_segment", 'cost_usd = "0.0079"'),
            ("sms/flat", "texts", 5, "call", ""),
            ("sms/stranger", "stranger", 2, "sms_segment", ""),
            ("sms/other", "other", 2, "sms_segment", 'upstream_path = "/messages"'),
        )
    )
    config = f"""
[upstreams.texts]
kind = "twilio"
base_url = "{twilio_server.url}"
account_sid = "{twilio_server.account_sid}"
auth_token = "{twilio_server.auth_token}"
from = "+15005550006"
timeout_seconds = 5

[upstreams.stranger]
kind = "twilio"
base_url = "{twilio_server.url}/"
account_sid = "{twilio_server.account_sid}"
auth_token = "wrong"
from = "+15005550006"

[upstreams.other]
kind = "http"
base_url = "{provider_server.url}/base"
headers = {{ X-Api-Key = "secret-of-the-provider" }}
timeout_seconds = 5
{routes}
[limits]
requests_per_minute = 100000
"""
    with Box(tmp_path_factory.mktemp("instance"), config) as box:
        yield box


def send(box: Box, key: str, to: str = NUMBER, text: str = "hi", to_path: str = "send") -> Answer:
    return box.post(f"/api/v1/sms/{to_path}", key, {"to": to, "message": text})


def told(answer: Answer) -> tuple[int, str | None]:
    return answer.status, answer.code


# Segments.

GSM = gsm0338.Codec()


def _septets(character: str) -> bytes:
    if character == "\x1b":
        raise UnicodeError("an escape is not a character")
    septets: bytes = GSM.encode(character)[0]
    return septets


def counted_another_way(text: str) -> int:
    """Segments by an independent alphabet, and by filling real parts with real characters."""
    try:
        characters = [_septets(character) for character in text]
        alone, part = 160, 153
    except UnicodeError:
        characters = [character.encode("utf-16-be") for character in text]
        alone, part = 140, 134
    if len(b"".join(characters)) <= alone:
        return 1
    parts = [b""]
    for character in characters:
        if len(parts[-1] + character) > part:
            parts.append(b"")
        parts[-1] += character
    return len(parts)


ESCAPE = 27
ALPHABET = "".join(GSM.decode(bytes([code]))[0] for code in range(128) if code != ESCAPE)
EXTENSION = "^{}\\[~]|€\f"


def test_the_two_alphabets_are_the_same() -> None:
    assert len(set(ALPHABET)) == 127
    everything = [chr(p) for p in range(0x10000) if not 0xD800 <= p < 0xE000] + ["😀", "𝒳"]
    # 81 characters are one segment only if each takes one septet.
    assert {c for c in everything if segments.count(c * 81) == 1} == set(ALPHABET)
    assert {c for c in everything if segments.count(c * 80) == 1} == set(ALPHABET + EXTENSION)


TEXTS = st.one_of(
    st.text(st.sampled_from(ALPHABET), max_size=700),
    st.text(st.sampled_from(ALPHABET[:20] + EXTENSION), max_size=700),
    st.text(max_size=400),
    st.text(st.sampled_from("aé漢😀€ß"), max_size=400),
    st.builds(
        lambda head, body: head + body,
        st.text(st.sampled_from("a[😀"), max_size=4),
        st.integers(60, 170).flatmap(
            lambda size: st.sampled_from(["x", "€", "漢", "😀"]).map(lambda c: c * size)
        ),
    ),
)


@given(TEXTS)
@settings(max_examples=600, deadline=None)
@example("a" * 160)
@example("a" * 161)
@example("€" * 80)
@example("a" * 152 + "€" + "a" * 152)
@example("😀" * 35)
@example("😀" * 36)
@example("漢" * 66 + "😀" + "漢" * 60)
def test_segments_agree_with_an_independent_count(text: str) -> None:
    assert segments.count(text) == counted_another_way(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hi", 1),
        ("a" * 160, 1),
        ("a" * 161, 2),
        ("a" * 306, 2),
        ("a" * 307, 3),
        ("a" * 459, 3),
        ("a" * 460, 4),
        ("漢" * 70, 1),
        ("漢" * 71, 2),
        ("漢" * 134, 2),
        ("漢" * 135, 3),
        ("a" * 69 + "漢", 1),
        ("a" * 70 + "漢", 2),
        # One character outside the alphabet makes all of it UCS-2.
        ("a" * 159 + "ç", 3),
        ("’" + "a" * 160, 3),
        # An escape and what it escapes take two septets and stay together.
        ("€" * 80, 1),
        ("a" * 159 + "€", 2),
        ("a" * 152 + "€" + "a" * 6, 1),
        ("a" * 152 + "€" + "a" * 7, 2),
        ("a" * 152 + "€" + "a" * 151, 2),
        ("a" * 152 + "€" + "a" * 152, 3),
        ("€" * 81, 2),
        ("€" * 152, 2),
        ("€" * 153, 3),
        # So do the halves of an emoji.
        ("😀" * 35, 1),
        ("😀" * 36, 2),
        ("😀" * 66, 2),
        ("😀" * 67, 3),
        ("漢" * 66 + "😀" + "漢" * 4, 2),
        ("漢" * 66 + "😀" + "漢" * 65, 2),
        ("漢" * 66 + "😀" + "漢" * 66, 3),
        ("\n" * 160, 1),
        ("\x00", 1),
        ("\x1b" + "a" * 159, 3),
    ],
)
def test_the_bounds_of_a_segment(text: str, expected: int) -> None:
    assert segments.count(text) == expected
    assert counted_another_way(text) == expected


@pytest.mark.parametrize(("size", "parts"), [(160, 1), (161, 2), (306, 2), (307, 3), (1600, 11)])
def test_a_message_costs_its_segments(box: Box, twilio: Twilio, size: int, parts: int) -> None:
    payer = box.payer()
    answer = send(box, payer.key, text="a" * size)
    assert answer.status == 200
    assert answer.json()["segments"] == parts
    assert answer.headers["X-Credits-Charged"] == str(2 * parts)
    record = box.record(payer.key, answer)
    assert (record["units"], record["price"], record["held"]) == (parts, 2 * parts, 2 * parts)
    assert (record["captured"], record["estimated"]) == (2 * parts, False)
    assert box.standing(payer) == (100 - 2 * parts, 0)


def test_a_message_of_several_segments_may_cost_one_price(box: Box, twilio: Twilio) -> None:
    payer = box.payer()
    answer = send(box, payer.key, text="a" * 500, to_path="flat")
    assert (answer.json()["segments"], answer.headers["X-Credits-Charged"]) == (4, "5")
    assert box.standing(payer) == (95, 0)


def test_too_few_credits_for_all_segments_send_none(box: Box, twilio: Twilio) -> None:
    payer = box.payer(5)
    answer = send(box, payer.key, text="a" * 400)
    assert told(answer) == (402, "insufficient_credits")
    assert (answer.json()["credits"], answer.json()["required"]) == (5, 6)
    assert twilio.hits() == []


# What a caller may ask.


@pytest.mark.parametrize(
    "to",
    ["+18148835337", "+4915123456789", "+33612345678", "+447911123456", "+15005550006",
     "+861065529988", "+6421123456"],
)  # fmt: skip
def test_a_number_in_e164_is_sent_to(box: Box, twilio: Twilio, to: str) -> None:
    answer = send(box, box.payer().key, to)
    assert (answer.status, answer.json()["to"]) == (200, to)
    assert twilio.sent[-1]["To"] == to


@pytest.mark.parametrize(
    "to",
    ["", "+", "911", "8148835337", "18148835337", "0018148835337", "+1 814 883 5337",
     "+1-814-883-5337", "+1(814)8835337", " +18148835337", "+18148835337 ", "+18148835337\n",
     "+1814883533a", "++18148835337", "+08148835337", "+1", "+12345", "+1814883533712345678",
     "+１８１４８８３５３３７", "+١٨١٤٨٨٣٥٣٣٧", "tel:+18148835337", "+18148835337;ext=5",
     "+9991234567890", "mailbox@example.com", "+18148835337,+18148835338", "+1814883533\x00"],
)  # fmt: skip
def test_anything_else_is_no_number(box: Box, twilio: Twilio, to: str) -> None:
    payer = box.payer()
    answer = send(box, payer.key, to)
    assert told(answer) == (400, "validation_error")
    assert answer.json()["param"] == "to"
    assert twilio.hits() == []
    assert box.standing(payer) == (100, 0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"to": NUMBER}, "message"),
        ({"message": "hi"}, "to"),
        ({}, "to"),
        ({"to": NUMBER, "message": ""}, "message"),
        ({"to": NUMBER, "message": "a" * 1601}, "message"),
        ({"to": NUMBER, "message": 7}, "message"),
        ({"to": NUMBER, "message": None}, "message"),
        ({"to": NUMBER, "message": ["hi"]}, "message"),
        ({"to": 18148835337, "message": "hi"}, "to"),
        ({"to": None, "message": "hi"}, "to"),
        ({"to": [NUMBER], "message": "hi"}, "to"),
        ({"to": NUMBER, "message": "hi", "from": "+1"}, "from"),
        ({"to": NUMBER, "message": "hi", "Body": "x"}, "Body"),
        ([], None),
        ([NUMBER, "hi"], None),
        ("hi", None),
        (7, None),
        (True, None),
    ],
)
def test_a_bad_body_names_its_field(box: Box, twilio: Twilio, body: Any, param: str | None) -> None:
    payer = box.payer()
    answer = box.request("POST", "/api/v1/sms/send", key=payer.key, body=json.dumps(body).encode())
    assert told(answer) == (400, "validation_error")
    assert answer.json().get("param") == param
    assert twilio.hits() == []
    assert box.standing(payer) == (100, 0)


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b"to=%2B18148835337&message=hi", b"\xff\xfe{}", b"null garbage",
     b'{"to": "+18148835337", "message": "hi"} trailing', b'{"to": "+18148835337", "message": NaN}',
     b'{"to": "+18148835337", "message": "\xff"}', b'{"to": "+18148835337", "message": "\\ud83d"}',
     b"[" * 2000, b'{"a":' * 2000],
)  # fmt: skip
def test_what_is_not_json_is_400(box: Box, twilio: Twilio, body: bytes) -> None:
    payer = box.payer()
    answer = box.request("POST", "/api/v1/sms/send", key=payer.key, body=body)
    assert told(answer) == (400, "validation_error")
    assert twilio.hits() == []
    assert box.standing(payer) == (100, 0)


def test_a_body_without_a_type_counts_as_json_and_another_type_is_415(
    box: Box, twilio: Twilio
) -> None:
    payer = box.payer()
    body = json.dumps({"to": NUMBER, "message": "hi"}).encode()

    def sent(media_type: str | None) -> int:
        header = {} if media_type is None else {"Content-Type": media_type}
        return box.request(
            "POST", "/api/v1/sms/send", key=payer.key, body=body, headers=header
        ).status

    for good in (None, "application/json", "application/json; charset=utf-8", "Application/JSON"):
        assert sent(good) == 200, good
    for bad in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "json"):
        assert sent(bad) == 415, bad
    assert len(twilio.sent) == 4


@pytest.mark.parametrize(
    "text", ["naïve €5 {x}", "日本語", "😀 & = + % ?", "a\nb\r\nc", "\x00", "  "]
)
def test_the_text_arrives_as_it_was_written(box: Box, twilio: Twilio, text: str) -> None:
    assert send(box, box.payer().key, text=text).status == 200
    assert twilio.sent[-1]["Body"] == text


# Twilio.


def test_twilio_is_asked_as_its_api_wants_it(box: Box, twilio: Twilio) -> None:
    payer = box.payer()
    answer = send(box, payer.key, text="hi & more")
    assert answer.status == 200
    (hit,) = twilio.hits()
    assert hit.method == "POST"
    assert hit.target == f"/2010-04-01/Accounts/{twilio.account_sid}/Messages.json"
    secret = f"{twilio.account_sid}:{twilio.auth_token}".encode()
    assert hit.header("Authorization") == f"Basic {base64.b64encode(secret).decode()}"
    assert hit.header("Content-Type") == "application/x-www-form-urlencoded"
    assert hit.header("Content-Length") == str(len(hit.body))
    assert parse_qs(hit.body.decode()) == {
        "To": [NUMBER],
        "From": ["+15005550006"],
        "Body": ["hi & more"],
    }
    assert payer.key.encode() not in hit.everything()
    said = answer.json()
    assert said == {
        "success": True,
        "provider": "texts",
        "messageId": f"msg_SM{1:032x}",
        "to": NUMBER,
        "segments": 1,
    }
    assert answer.headers["Content-Type"] == "application/json"
    assert box.record(payer.key, answer)["cost_usd"] == "0.0079"


@pytest.mark.parametrize("to", list(TWILIO_REFUSALS))
def test_a_number_twilio_refuses_is_the_callers_mistake(box: Box, twilio: Twilio, to: str) -> None:
    payer = box.payer()
    answer = send(box, payer.key, to)
    assert told(answer) == (400, "validation_error")
    assert answer.json()["param"] == "to"
    assert str(TWILIO_REFUSALS[to][0]) in answer.json()["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["X-Credits-Charged"] == "0"
    assert box.record(payer.key, answer)["status"] == "voided"
    assert box.standing(payer) == (100, 0)


def test_a_busy_twilio_says_when_to_come_back(box: Box, twilio: Twilio) -> None:
    payer = box.payer()
    answer = send(box, payer.key, TWILIO_BUSY)
    assert told(answer) == (429, "rate_limited")
    assert answer.headers["Retry-After"] == "7"
    assert "x-should-retry" not in answer.headers
    assert box.standing(payer) == (100, 0)


@pytest.mark.parametrize("to", [TWILIO_BROKEN, TWILIO_RESETS])
def test_a_broken_twilio_is_502_and_asked_once(box: Box, twilio: Twilio, to: str) -> None:
    payer = box.payer()
    assert send(box, payer.key).status == 200  # so that there is a kept connection to break
    answer = send(box, payer.key, to)
    assert told(answer) == (502, "provider_error")
    assert answer.json()["refunded"] is True
    assert len(twilio.hits()) == 2
    assert box.standing(payer) == (98, 0)


def test_the_operators_wrong_password_is_502_and_says_nothing_of_it(
    box: Box, twilio: Twilio
) -> None:
    payer = box.payer()
    answer = send(box, payer.key, to_path="stranger")
    assert told(answer) == (502, "provider_error")
    assert b"20003" not in answer.body and b"Authenticate" not in answer.body
    assert box.standing(payer) == (100, 0)


# Any other provider.


def test_an_http_provider_gets_the_message_as_json(box: Box, provider: Provider) -> None:
    payer = box.payer()
    answer = send(box, payer.key, text="héllo", to_path="other")
    (hit,) = provider.hits()
    assert (hit.method, hit.target) == ("POST", "/base/messages")
    assert hit.json() == {"to": NUMBER, "message": "héllo"}
    assert hit.header("Content-Type") == "application/json"
    assert hit.header("X-Api-Key") == "secret-of-the-provider"
    assert hit.header("X-Request-Id") == answer.request_id
    assert payer.key.encode() not in hit.everything()
    assert answer.status == 200
    assert answer.json() == {
        "success": True,
        "provider": "other",
        "messageId": "msg_abc-1",
        "to": NUMBER,
        "segments": 1,
    }
    assert box.standing(payer) == (98, 0)


@pytest.mark.parametrize(
    ("body", "message_id"),
    [
        ({"messageId": "msg_42"}, "msg_42"),
        ({"message_id": "42"}, "msg_42"),
        ({"sid": "SM42"}, "msg_SM42"),
        ({"id": "a.b:c_d-e"}, "msg_a.b:c_d-e"),
        ({"id": "x", "sid": "y"}, "msg_y"),
    ],
)
def test_the_providers_id_comes_back_in_our_form(
    box: Box, provider: Provider, body: dict[str, str], message_id: str
) -> None:
    provider.body = json.dumps(body).encode()
    assert send(box, box.payer().key, to_path="other").json()["messageId"] == message_id


@pytest.mark.parametrize("body", [{}, {"id": 42}, {"id": "<b>"}, {"id": None}, {"id": "x" * 200}])
def test_a_message_always_has_an_id(box: Box, provider: Provider, body: dict[str, Any]) -> None:
    provider.body = json.dumps(body).encode()
    answer = send(box, box.payer().key, to_path="other")
    assert answer.status == 200
    message_id = answer.json()["messageId"]
    assert isinstance(message_id, str) and message_id.startswith("msg_"), message_id


@pytest.mark.parametrize(
    "body", [b"", b"OK", b"[]", b"null", b"7", b'"sent"', b"{", b'{"id": "\xff"}']
)
def test_an_answer_that_cannot_be_read_is_502(box: Box, provider: Provider, body: bytes) -> None:
    provider.body = body
    payer = box.payer()
    answer = send(box, payer.key, to_path="other")
    assert told(answer) == (502, "provider_error")
    assert box.standing(payer) == (100, 0)


@pytest.mark.parametrize(
    ("status", "body", "expected", "param"),
    [
        (400, b"{}", (400, "validation_error"), None),
        (422, b"no", (400, "validation_error"), None),
        (400, b'{"code": 21211}', (400, "validation_error"), "to"),
        (400, b'{"code": 21617}', (400, "validation_error"), "message"),
        (429, b"{}", (429, "rate_limited"), None),
        (401, b"{}", (502, "provider_error"), None),
        (403, b"{}", (502, "provider_error"), None),
        (402, b"{}", (502, "provider_error"), None),
        (404, b"{}", (502, "provider_error"), None),
        (301, b"{}", (502, "provider_error"), None),
        (500, b"{}", (502, "provider_error"), None),
    ],
)
def test_what_an_http_provider_refuses_is_told_in_our_words(
    box: Box, provider: Provider, status: int, body: bytes, expected: tuple[int, str],
    param: str | None,
) -> None:  # fmt: skip
    provider.status, provider.body = status, body
    payer = box.payer()
    answer = send(box, payer.key, to_path="other")
    assert told(answer) == expected
    assert answer.json().get("param") == param
    assert box.standing(payer) == (100, 0)


@pytest.mark.parametrize(
    ("says", "passed_on"),
    [("7", "7"), ("0", "0"), ("99999", "99999"), ("soon", "1"), ("-3", "1"), ("1e9", "1"),
     ("Wed, 21 Oct 2015 07:28:00 GMT", "1"), (None, "1")],
)  # fmt: skip
def test_a_busy_provider_is_passed_on_with_a_wait_in_seconds(
    box: Box, provider: Provider, says: str | None, passed_on: str
) -> None:
    provider.status, provider.body = 429, b"{}"
    provider.headers = [] if says is None else [("Retry-After", says)]
    answer = send(box, box.payer().key, to_path="other")
    assert told(answer) == (429, "rate_limited")
    assert answer.headers["Retry-After"] == passed_on
