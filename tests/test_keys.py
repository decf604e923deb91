"""API keys: their form, their terms, their life; and that checking one is cheap."""

from __future__ import annotations

import http.client
import re
import string
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import argon2
import pytest
from conftest import StartFarebox
from doubles import Upstream
from inprocess import (
    STRANGERS_KEY,
    Background,
    Box,
    CheapSecret,
    Clock,
    Payer,
    everything,
    inbound,
)
from server import OPERATOR_KEY, Answer, until

import models
from core import access, clock, keys, tokens
from core.audit import COMMAND_LINE, Actor
from core.errors import Refusal
from core.keys import NewSecret

OWNER = Actor("user_of_the_tests")
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
path = "/api/v1/echo"
methods = ["GET", "POST"]
upstream = "sandbox"
credits = 3

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST"]
upstream = "double"
upstream_path = "/*"
credits = 3
scope = "up"

[[routes]]
path = "/api/v1/pages/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/*"
credits = 1
per = "unit"
units = {{ from = "json", pointer = "/usage/pages", max = 10 }}

[limits]
requests_per_minute = 60
failed_auth_per_minute = 5
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, upstream_server: Upstream) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("instance")
    with Box(folder, CONFIG.format(url=upstream_server.url)) as box:
        yield box


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A Wednesday, well inside its minute, day, week and month."""
    return Clock(monkeypatch, "2027-03-17T12:00:30Z")


def echo(box: Box, key: str) -> Answer:
    return box.get("/api/v1/echo", key)


def told(answer: Answer) -> tuple[int, str | None]:
    return answer.status, answer.code


# Form.


def test_a_key_is_its_prefix_and_32_letters_and_digits() -> None:
    seen = set()
    for _ in range(200):
        key, lookup = tokens.new_key("fare")
        assert re.fullmatch(r"fare_live_[A-Za-z0-9]{32}", key)
        assert tokens.key_lookup(key) == lookup
        seen.add(key)
    assert len(seen) == 200


def test_a_key_has_at_least_100_bits_of_secret() -> None:
    assert 62**tokens.SECRET_LENGTH >= 2**100
    total = tokens.LOOKUP_LENGTH + tokens.SECRET_LENGTH + tokens.CHECKSUM_LENGTH
    assert total == 32


def test_a_key_is_stored_only_as_an_argon2id_hash() -> None:
    secret = NewSecret("fare")
    parameters = argon2.extract_parameters(secret.hash)
    assert parameters.type is argon2.Type.ID
    # OWASP's minimum.
    assert parameters.memory_cost >= 19 * 1024 and parameters.time_cost >= 2
    assert secret.token.startswith(secret.start)
    assert len(secret.start) == len("fare_live_") + tokens.LOOKUP_LENGTH


def test_nothing_in_the_database_holds_the_secret_of_a_key(box: Box) -> None:
    payer = box.payer()
    assert echo(box, payer.key).status == 200
    secret = payer.key[len("fare_live_") + tokens.LOOKUP_LENGTH :]
    copy = box.folder / "copy.db"
    box.instance.db.backup(copy)
    assert secret.encode() not in copy.read_bytes()
    assert payer.key_id.encode() in copy.read_bytes()


class NoDatabase:
    """Fails the test when anybody reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def never(*args: object, **options: object) -> None:
            raise AssertionError("the database was asked")

        for name in ("row", "rows", "run"):
            monkeypatch.setattr(models.Tx, name, never)


def test_every_single_typo_is_refused_without_a_database_read_or_a_hash(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = box.payer().key
    NoDatabase(monkeypatch)
    monkeypatch.setattr(box.instance.verifier, "verify", None)
    with pytest.raises(AssertionError, match="the database was asked"):
        access.identify(box.instance, inbound(authorization=f"Bearer {key}"), "-")
    tried = 0
    for place, right in enumerate(key):
        for wrong in string.ascii_letters + string.digits + "_-":
            if wrong == right:
                continue
            mistyped = key[:place] + wrong + key[place + 1 :]
            with pytest.raises(Refusal) as refused:
                access.identify(box.instance, inbound(authorization=f"Bearer {mistyped}"), "-")
            assert refused.value.code == "invalid_api_key"
            tried += 1
    assert tried == len(key) * 63


def test_swapped_dropped_and_doubled_letters_are_refused_without_a_database_read(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = box.payer().key
    NoDatabase(monkeypatch)
    wrong = {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)} - {key}
    wrong |= {key[:i] + key[i + 1 :] for i in range(len(key))}
    wrong |= {key[:i] + key[i] + key[i:] for i in range(len(key))}
    wrong |= {key.lower(), key.upper(), key[::-1], key.removeprefix("fare_live_")} - {key}
    wrong |= {key.replace("live", "test"), key + key}
    for mistyped in wrong:
        assert told(echo(box, mistyped)) == (401, "invalid_api_key"), mistyped


def test_letters_that_only_look_like_letters_are_not(box: Box) -> None:
    key = box.payer().key
    full_width = key[:-1] + chr(ord(key[-1]) + 0xFEE0)
    assert tokens.key_lookup(full_width) is None
    assert tokens.key_lookup(key + "\n") is None
    assert tokens.key_lookup(key) is not None


def test_a_new_prefix_is_for_new_keys_and_the_old_ones_still_work(tmp_path: Path) -> None:
    config = CONFIG.format(url="http://127.0.0.1:1")
    with Box(tmp_path / "i", config) as box:
        old = box.payer()
    with Box(tmp_path / "i", '[instance]\nkey_prefix = "toll2"\n' + config) as box:
        assert echo(box, old.key).status == 200
        new, _ = box.key(old.account)
        assert re.fullmatch(r"toll2_live_[A-Za-z0-9]{32}", new)
        assert echo(box, new).status == 200
        rotated = box.rotate(old.key_id)
        assert rotated.startswith("toll2_live_")
        assert echo(box, rotated).status == 200


# Where a key may stand.


def test_a_key_in_the_address_or_the_body_is_no_key(box: Box) -> None:
    key = box.payer().key
    names = ("key", "api_key", "apikey", "access_token", "token", "authorization", "Authorization")
    for name in names:
        for path in ("/api/v1/echo", "/api/v1/account", "/v1/account"):
            assert box.get(f"{path}?{name}={key}").code == "missing_api_key"
            assert box.get(f"{path}?{name}=Bearer%20{key}").code == "missing_api_key"
        assert box.post("/api/v1/echo", None, {name: key}).code == "missing_api_key"
    for header in ("X-Api-Key", "Api-Key", "Proxy-Authorization", "X-Authorization", "Cookie"):
        for text in (key, f"Bearer {key}", f"authorization={key}"):
            answer = box.request("GET", "/api/v1/echo", headers={header: text})
            assert answer.code == "missing_api_key", header
    other = box.payer().key
    answer = box.get(f"/api/v1/account?api_key={other}", key)
    assert answer.json()["account"] != box.get("/api/v1/account", other).json()["account"]


@pytest.mark.parametrize(
    ("form", "status", "code"),
    [
        ("Bearer {key}", 200, None),
        ("bearer {key}", 200, None),
        ("BEARER {key}", 200, None),
        ("Bearer   {key}", 200, None),
        ("Bearer {key} ", 200, None),
        ("Bearer {key},", 400, "validation_error"),
        ("Bearer {key}, Bearer {key}", 400, "validation_error"),
        ("Bearer {key},{key}", 400, "validation_error"),
        ("Basic dXNlcg==, Bearer {key}", 400, "validation_error"),
        ("Bearer {key}\t", 400, "validation_error"),
        ("Bearer\t{key}", 400, "validation_error"),
        ("Bearer {key}\x00", 400, "validation_error"),
        ("Bearer {key}\x7f", 400, "validation_error"),
        ("Bearer {key}\x1b[0m", 400, "validation_error"),
        ("Bearer {key}\xa0", 400, "validation_error"),
        ("Bearer {key}\xff", 400, "validation_error"),
        ("Bearer " + "x" * 8193, 400, "validation_error"),
        ("Basic " + "x" * 8193, 400, "validation_error"),
        ("Bearer {key}" + " " * 8192, 400, "validation_error"),
        ("Bearer " + "x" * 8185, 401, "invalid_api_key"),
        ("Bearer {key} {key}", 401, "invalid_api_key"),
        ("Bearer", 401, "invalid_api_key"),
        ("Bearer ", 401, "invalid_api_key"),
        ("Bearer Bearer {key}", 401, "invalid_api_key"),
        ("Bearer '{key}'", 401, "invalid_api_key"),
        ('Bearer "{key}"', 401, "invalid_api_key"),
        ("", 401, "missing_api_key"),
        ("{key}", 401, "missing_api_key"),
        ("Basic dXNlcjpwYXNz", 401, "missing_api_key"),
        ("Basic {key}", 401, "missing_api_key"),
        ("Token {key}", 401, "missing_api_key"),
        ("Bearer{key}", 401, "missing_api_key"),
        ("Bearer:{key}", 401, "missing_api_key"),
    ],
)  # fmt: skip
def test_an_authorization_header_is_read_strictly(
    box: Box, form: str, status: int, code: str | None
) -> None:
    key = box.payer().key
    for path in ("/api/v1/echo", "/api/v1/account"):
        header = {"Authorization": form.format(key=key)}
        answer = box.request("GET", path, headers=header)
        assert (answer.status, answer.code) == (status, code), answer


def test_an_empty_bearer_is_never_the_operator(tmp_path: Path) -> None:
    with Box(tmp_path / "i", FAREBOX_OPERATOR_KEY=OPERATOR_KEY) as box:
        without = box.settings.__class__(
            **{n: getattr(box.settings, n) for n in box.settings.__dataclass_fields__}
            | {"operator_key": None}
        )
        box.instance.settings = without
        for form in ("Bearer", "Bearer ", "Bearer None", "Bearer null"):
            answer = box.request("GET", "/api/v1/account", headers={"Authorization": form})
            assert told(answer) == (401, "invalid_api_key")


@pytest.fixture(scope="module")
def served(start_farebox: StartFarebox, upstream_server: Upstream) -> Any:
    return start_farebox(CONFIG.format(url=upstream_server.url), workers=1)


def test_two_authorization_headers_are_refused_whatever_they_say(served: Any) -> None:
    _, key = served.account()
    for second in (f"Bearer {key}", "Basic dXNlcjpwYXNz", f"Bearer {STRANGERS_KEY}", ""):
        for pair in ((f"Bearer {key}", second), (second, f"Bearer {key}")):
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
            connection.putrequest("GET", "/api/v1/echo")
            for text in pair:
                connection.putheader("Authorization", text)
            connection.endheaders()
            answer = connection.getresponse()
            assert answer.status == 400, pair
            assert b"validation_error" in answer.read()
            connection.close()
    assert served.standing(key) == (57, 0)


def test_odd_bytes_in_an_authorization_header_are_refused_by_the_server_too(served: Any) -> None:
    _, key = served.account()
    for odd in (b"\xc3\xa9", b"\xff", b"\x01", b"\x7f"):
        with served.connect() as sock:
            sock.sendall(
                b"GET /api/v1/echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                b"Authorization: Bearer " + key.encode() + odd + b"\r\n\r\n"
            )
            head = everything(sock)
        assert head.startswith(b"HTTP/1.1 400 "), head[:200]
    assert served.standing(key) == (57, 0)


# Scopes.


def test_scopes_open_what_they_name_and_nothing_else(box: Box) -> None:
    def tried(scopes: list[str] | None) -> tuple[str | None, ...]:
        key = box.payer(scopes=scopes).key
        return box.sms(key).code, box.get("/api/v1/up/ok", key).code, echo(box, key).code

    closed = "missing_scope"
    assert tried(None) == (None, None, None)
    assert tried([]) == (closed, closed, closed)
    assert tried(["sms:send"]) == (None, closed, closed)
    assert tried(["up", "sms:send"]) == (None, None, closed)
    assert tried(["other"]) == (closed, closed, closed)
    # A scope is a whole word: no prefix, no case, no pattern of our own invention.
    assert tried(["sms", "sms:*", "u"]) == (closed, closed, closed)


def test_a_missing_scope_is_named_and_nothing_is_sent(box: Box, upstream: Upstream) -> None:
    payer = box.payer(scopes=["sms:send"])
    answer = box.get("/api/v1/up/ok/scoped", payer.key)
    assert told(answer) == (403, "missing_scope")
    assert answer.json()["required"] == "up"
    assert upstream.hits("scoped") == []
    assert box.standing(payer) == (100, 0)


def test_a_key_without_scopes_of_its_account_still_reads_its_account(box: Box) -> None:
    key = box.payer(scopes=[]).key
    for path in ("/api/v1/account", "/v1/account", "/api/v1/usage", "/api/v1/ledger"):
        assert box.get(path, key).status == 200


# Expiry and state.


def test_a_key_works_until_the_moment_it_expires(box: Box, frozen: Clock) -> None:
    payer = box.payer(expires_at=frozen.now + 60_000)
    frozen.forward(ms=59_999)
    assert echo(box, payer.key).status == 200
    frozen.forward(ms=1)
    assert told(echo(box, payer.key)) == (401, "invalid_api_key")
    assert told(box.get("/api/v1/account", payer.key)) == (401, "invalid_api_key")
    frozen.forward(days=400)
    assert told(echo(box, payer.key)) == (401, "invalid_api_key")


def test_a_clock_that_steps_back_revives_no_key_that_was_seen_expired(
    box: Box, frozen: Clock
) -> None:
    from core import upkeep

    payer = box.payer(expires_at=frozen.now + 60_000)
    frozen.forward(seconds=61)
    upkeep.tidy(box.instance)
    frozen.forward(days=-1)
    assert told(echo(box, payer.key)) == (401, "invalid_api_key")


def test_a_suspended_key_says_why_and_works_again_when_resumed(box: Box) -> None:
    payer = box.payer()
    assert echo(box, payer.key).status == 200
    box.suspend(payer.key_id, "seen in a public repository")
    for path in ("/api/v1/echo", "/api/v1/account"):
        answer = box.get(path, payer.key)
        assert told(answer) == (403, "key_suspended")
        assert answer.json()["reason"] == "seen in a public repository"
    box.write(lambda tx: keys.resume(tx, payer.key_id, clock.now_ms(), COMMAND_LINE))
    assert echo(box, payer.key).status == 200
    assert box.standing(payer) == (94, 0)


def test_what_the_operator_suspended_only_the_operator_resumes(box: Box) -> None:
    payer = box.payer()
    box.write(lambda tx: keys.suspend(tx, payer.key_id, "mine", clock.now_ms(), OWNER))
    box.write(lambda tx: keys.resume(tx, payer.key_id, clock.now_ms(), OWNER))
    assert echo(box, payer.key).status == 200
    box.suspend(payer.key_id, "the operator's")
    with pytest.raises(Refusal) as refused:
        box.write(lambda tx: keys.resume(tx, payer.key_id, clock.now_ms(), OWNER))
    assert refused.value.code in ("forbidden", "conflict")
    # The owner's own suspension does not take the operator's over.
    with pytest.raises(Refusal):
        box.write(lambda tx: keys.suspend(tx, payer.key_id, "mine", clock.now_ms(), OWNER))
    assert echo(box, payer.key).json()["reason"] == "the operator's"
    # The operator's does take the owner's over.
    other = box.payer()
    box.write(lambda tx: keys.suspend(tx, other.key_id, "mine", clock.now_ms(), OWNER))
    box.suspend(other.key_id, "the operator's")
    with pytest.raises(Refusal):
        box.write(lambda tx: keys.resume(tx, other.key_id, clock.now_ms(), OWNER))


def test_a_revoked_key_stays_revoked(box: Box) -> None:
    payer = box.payer()
    assert echo(box, payer.key).status == 200
    box.revoke(payer.key_id)
    assert told(echo(box, payer.key)) == (401, "invalid_api_key")
    box.revoke(payer.key_id)  # once more changes nothing
    for change in (
        lambda tx: keys.resume(tx, payer.key_id, clock.now_ms(), COMMAND_LINE),
        lambda tx: keys.suspend(tx, payer.key_id, None, clock.now_ms(), COMMAND_LINE),
        lambda tx: keys.rotate(
            tx, payer.key_id, CheapSecret("fare"), 0, clock.now_ms(), COMMAND_LINE
        ),
    ):
        with pytest.raises(Refusal) as refused:
            box.write(change)
        assert refused.value.code == "conflict"
    assert told(echo(box, payer.key)) == (401, "invalid_api_key")


def test_a_suspended_key_that_is_revoked_or_expired_is_simply_invalid(
    box: Box, frozen: Clock
) -> None:
    payer = box.payer(expires_at=frozen.now + 1000)
    box.suspend(payer.key_id, "a secret reason")
    frozen.forward(seconds=2)
    assert told(echo(box, payer.key)) == (401, "invalid_api_key")
    other = box.payer()
    box.suspend(other.key_id, "a secret reason")
    box.revoke(other.key_id)
    assert told(echo(box, other.key)) == (401, "invalid_api_key")


# Credit limits.

PERIOD_ENDS = {
    "day": ("2027-03-17T23:59:59.999Z", "2027-03-18T00:00:00Z"),
    "week": ("2027-03-21T23:59:59.999Z", "2027-03-22T00:00:00Z"),  # a Sunday, a Monday
    "month": ("2027-03-31T23:59:59.999Z", "2027-04-01T00:00:00Z"),
}


@pytest.mark.parametrize("period", list(PERIOD_ENDS))
def test_a_credit_limit_holds_until_its_period_ends_in_utc(
    box: Box, frozen: Clock, period: str
) -> None:
    last, first = PERIOD_ENDS[period]
    payer = box.payer(credit_limit=7, credit_period=period)
    assert [echo(box, payer.key).status for _ in range(2)] == [200, 200]
    answer = echo(box, payer.key)
    assert told(answer) == (403, "credit_limit_reached")
    body = answer.json()
    assert (body["limit"], body["period"], body["resets_at"]) == (7, period, first)
    assert box.sms(payer.key).status == 200  # the one credit that is left of it
    assert told(box.sms(payer.key)) == (403, "credit_limit_reached")
    frozen.set(last)
    assert told(box.sms(payer.key)) == (403, "credit_limit_reached")
    frozen.set(first)
    assert [echo(box, payer.key).status for _ in range(3)] == [200, 200, 403]
    assert box.standing(payer) == (100 - 13, 0)


def test_the_week_begins_on_monday_and_not_on_sunday(box: Box, frozen: Clock) -> None:
    frozen.set("2027-03-20T12:00:00Z")
    payer = box.payer(credit_limit=3, credit_period="week")
    assert echo(box, payer.key).status == 200
    frozen.set("2027-03-21T12:00:00Z")
    assert told(echo(box, payer.key)) == (403, "credit_limit_reached")
    frozen.set("2027-03-22T00:00:00Z")
    assert echo(box, payer.key).status == 200


def test_periods_end_right_in_leap_years_and_at_the_years_end(box: Box, frozen: Clock) -> None:
    for at, period, ends in (
        ("2028-02-28T23:00:00Z", "day", "2028-02-29T00:00:00Z"),
        ("2028-02-29T12:00:00Z", "month", "2028-03-01T00:00:00Z"),
        ("2027-12-31T23:59:59Z", "month", "2028-01-01T00:00:00Z"),
        ("2027-12-31T23:59:59Z", "week", "2028-01-03T00:00:00Z"),
        ("2027-12-31T23:59:59Z", "day", "2028-01-01T00:00:00Z"),
    ):
        frozen.set(at)
        payer = box.payer(credit_limit=0, credit_period=period)
        assert echo(box, payer.key).json()["resets_at"] == ends, (at, period)


def test_a_total_limit_never_ends(box: Box, frozen: Clock) -> None:
    payer = box.payer(credit_limit=3, credit_period="total")
    assert echo(box, payer.key).status == 200
    frozen.forward(days=4000)
    answer = echo(box, payer.key)
    assert told(answer) == (403, "credit_limit_reached")
    assert answer.json()["resets_at"] is None


def test_a_failed_call_gives_its_part_of_the_limit_back(box: Box) -> None:
    payer = box.payer(credit_limit=3, credit_period="day")
    for path in ("status/500", "status/404", "reset", "cut/10/5", "redirect/302"):
        assert box.get(f"/api/v1/up/{path}", payer.key).status >= 400
    assert box.get("/api/v1/up/ok", payer.key).status == 200
    assert told(box.get("/api/v1/up/ok", payer.key)) == (403, "credit_limit_reached")


def test_a_call_the_balance_refuses_does_not_use_the_limit_up(box: Box) -> None:
    payer = box.payer(0, credit_limit=3, credit_period="total")
    for _ in range(3):
        assert told(echo(box, payer.key)) == (402, "insufficient_credits")
    box.grant(payer.account, 3)
    assert echo(box, payer.key).status == 200


def test_what_was_held_and_not_captured_comes_back_to_the_limit(box: Box) -> None:
    payer = box.payer(credit_limit=11, credit_period="month")
    assert box.get("/api/v1/pages/units/1", payer.key).status == 200  # held 10, captured 1
    assert box.get("/api/v1/pages/units/1", payer.key).status == 200
    assert told(box.get("/api/v1/pages/units/1", payer.key)) == (403, "credit_limit_reached")
    assert box.standing(payer) == (98, 0)


def test_what_is_held_counts_against_the_limit(box: Box, upstream: Upstream) -> None:
    payer = box.payer(credit_limit=4, credit_period="day")
    first = Background(lambda: box.get("/api/v1/up/gated/held", payer.key))
    upstream.wait_for(1, "held")
    assert told(echo(box, payer.key)) == (403, "credit_limit_reached")
    assert box.sms(payer.key).status == 200
    upstream.gate("held").open()
    assert first.result().status == 200


def test_what_was_held_before_midnight_and_failed_after_it_leaves_both_days_right(
    box: Box, upstream: Upstream, frozen: Clock
) -> None:
    frozen.set("2027-03-17T23:59:59Z")
    payer = box.payer(credit_limit=6, credit_period="day")
    first = Background(lambda: box.get("/api/v1/up/hang/midnight", payer.key))
    hit = upstream.wait_for(1, "midnight")[0]
    frozen.set("2027-03-18T00:00:01Z")
    assert [echo(box, payer.key).status for _ in range(3)] == [200, 200, 403]
    upstream.release()
    assert first.result().status == 502
    assert upstream.wait_ended(hit) == "answered"
    assert echo(box, payer.key).status == 403


def test_a_replayed_answer_counts_against_no_limit(box: Box) -> None:
    payer = box.payer(credit_limit=3, credit_period="day")
    for _ in range(3):
        answer = box.post("/api/v1/echo", payer.key, Idempotency_Key="again")
        assert answer.status == 200
    assert box.standing(payer) == (97, 0)


def test_each_key_has_a_limit_of_its_own(box: Box) -> None:
    payer = box.payer(credit_limit=3, credit_period="day")
    other, _ = box.key(payer.account, credit_limit=3, credit_period="day")
    free, _ = box.key(payer.account)
    assert [echo(box, k).status for k in (payer.key, other, payer.key, other)] == [
        200,
        200,
        403,
        403,
    ]
    assert echo(box, free).status == 200


def test_a_limit_survives_rotation(box: Box) -> None:
    payer = box.payer(credit_limit=3, credit_period="day")
    assert echo(box, payer.key).status == 200
    rotated = box.rotate(payer.key_id)
    assert told(echo(box, rotated)) == (403, "credit_limit_reached")


# Rate limits.


def rate(answer: Answer) -> tuple[str, str, str]:
    return tuple(answer.headers[f"X-RateLimit-{name}"] for name in ("Limit", "Remaining", "Reset"))  # type: ignore[return-value]


def test_a_rate_is_counted_in_fixed_utc_minutes(box: Box, frozen: Clock) -> None:
    payer = box.payer(rate_limit=2)
    assert rate(echo(box, payer.key)) == ("2", "1", "30")
    frozen.forward(seconds=10)
    assert rate(echo(box, payer.key)) == ("2", "0", "20")
    answer = echo(box, payer.key)
    assert told(answer) == (429, "rate_limited")
    assert rate(answer) == ("2", "0", "20")
    assert answer.headers["Retry-After"] == "20"
    frozen.set("2027-03-17T12:00:59.999Z")
    answer = echo(box, payer.key)
    assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    frozen.set("2027-03-17T12:01:00Z")
    assert rate(echo(box, payer.key)) == ("2", "1", "60")
    assert box.standing(payer) == (91, 0)


def test_refused_attempts_count_too(box: Box, frozen: Clock) -> None:
    payer = box.payer(2, rate_limit=3)
    assert told(echo(box, payer.key)) == (402, "insufficient_credits")
    answer = box.post("/api/v1/sms/send", payer.key, {"to": "nobody"})
    assert told(answer) == (400, "validation_error")
    assert rate(answer) == ("3", "1", "30")
    assert rate(box.get("/api/v1/up/status/500", payer.key)) == ("3", "0", "30")
    assert [echo(box, payer.key).status for _ in range(5)] == [429] * 5
    frozen.forward(seconds=30)
    assert echo(box, payer.key).status == 402


def test_a_key_without_a_rate_has_the_instances(box: Box, frozen: Clock) -> None:
    payer = box.payer()
    assert rate(echo(box, payer.key)) == ("60", "59", "30")
    more = box.payer(rate_limit=5000)
    assert rate(echo(box, more.key)) == ("5000", "4999", "30")


def test_reading_has_a_minute_of_its_own(box: Box, frozen: Clock) -> None:
    payer = box.payer(rate_limit=2)
    assert [echo(box, payer.key).status for _ in range(3)] == [200, 200, 429]
    assert rate(box.get("/api/v1/account", payer.key)) == ("2", "1", "30")
    assert rate(box.get("/v1/account", payer.key)) == ("2", "0", "30")
    for path in ("/api/v1/account", "/v1/account", "/api/v1/usage", "/api/v1/ledger"):
        answer = box.get(path, payer.key)
        assert told(answer) == (429, "rate_limited")
        assert answer.headers["Retry-After"] == "30"
        assert rate(answer) == ("2", "0", "30")
    other = box.payer(rate_limit=1)
    assert [box.get("/api/v1/account", other.key).status for _ in range(2)] == [200, 429]
    assert echo(box, other.key).status == 200


def test_each_key_has_a_minute_of_its_own_and_keeps_it_when_rotated(
    box: Box, frozen: Clock
) -> None:
    payer = box.payer(rate_limit=1)
    other, _ = box.key(payer.account, rate_limit=1)
    assert [echo(box, k).status for k in (payer.key, other, payer.key)] == [200, 200, 429]
    assert echo(box, box.rotate(payer.key_id)).status == 429


def test_the_operator_has_no_rate(box: Box) -> None:
    assert "X-RateLimit-Limit" not in echo(box, OPERATOR_KEY).headers
    assert "X-RateLimit-Limit" not in box.get("/api/v1/account", OPERATOR_KEY).headers


# Last use.


def last_used(box: Box, payer: Payer) -> int | None:
    used: int | None = box.row("SELECT last_used_at FROM api_key WHERE id = :id", id=payer.key_id)[
        0
    ]
    return used


def test_the_last_use_is_written_at_most_every_five_minutes(box: Box, frozen: Clock) -> None:
    payer = box.payer()
    assert last_used(box, payer) is None
    start = frozen.now
    assert echo(box, payer.key).status == 200
    assert last_used(box, payer) == start
    frozen.forward(seconds=299.999)
    assert echo(box, payer.key).status == 200
    assert box.get("/api/v1/account", payer.key).status == 200
    assert last_used(box, payer) == start
    frozen.forward(ms=1)
    assert box.get("/api/v1/account", payer.key).status == 200
    assert last_used(box, payer) == start + 300_000


def test_a_refused_key_was_not_used(box: Box) -> None:
    payer = box.payer()
    box.suspend(payer.key_id)
    assert echo(box, payer.key).status == 403
    assert last_used(box, payer) is None


# Rotation.


def test_after_a_rotation_the_old_secret_works_for_its_grace_alone(box: Box, frozen: Clock) -> None:
    payer = box.payer()
    new = box.rotate(payer.key_id, grace_ms=60_000)
    assert new != payer.key
    assert (echo(box, payer.key).status, echo(box, new).status) == (200, 200)
    frozen.forward(ms=59_999)
    assert (echo(box, payer.key).status, echo(box, new).status) == (200, 200)
    frozen.forward(ms=1)
    assert told(echo(box, payer.key)) == (401, "invalid_api_key")
    assert told(box.get("/api/v1/account", payer.key)) == (401, "invalid_api_key")
    assert echo(box, new).status == 200
    records = box.get("/api/v1/usage", new).json()["data"]
    assert {record["key_id"] for record in records} == {payer.key_id}


def test_a_rotation_without_grace_ends_the_old_secret_at_once(box: Box) -> None:
    payer = box.payer()
    assert echo(box, payer.key).status == 200  # so that this process remembers it
    new = box.rotate(payer.key_id)
    assert told(echo(box, payer.key)) == (401, "invalid_api_key")
    assert echo(box, new).status == 200


def test_a_second_rotation_ends_the_first_secret(box: Box) -> None:
    payer = box.payer()
    second = box.rotate(payer.key_id, grace_ms=60_000)
    third = box.rotate(payer.key_id, grace_ms=60_000)
    assert [echo(box, k).status for k in (payer.key, second, third)] == [401, 200, 200]
    fourth = box.rotate(payer.key_id)
    assert [echo(box, k).status for k in (payer.key, second, third, fourth)] == [401, 401, 401, 200]


def test_the_grace_never_passes_the_keys_own_expiry(box: Box, frozen: Clock) -> None:
    ends = frozen.now + 10_000
    payer = box.payer(expires_at=ends)
    new = box.rotate(payer.key_id, grace_ms=60_000)
    until = box.row("SELECT previous_until FROM api_key WHERE id = :id", id=payer.key_id)
    assert until == (ends,)
    frozen.forward(ms=9_999)
    assert (echo(box, payer.key).status, echo(box, new).status) == (200, 200)
    frozen.forward(ms=1)
    assert (echo(box, payer.key).status, echo(box, new).status) == (401, 401)
    with pytest.raises(Refusal) as refused:
        box.rotate(payer.key_id)
    assert refused.value.code == "conflict"


@pytest.mark.parametrize("grace_ms", [-1, 7 * 86_400_000 + 1, 10**12])
def test_a_grace_is_at_most_seven_days(box: Box, grace_ms: int) -> None:
    payer = box.payer()
    with pytest.raises(Refusal) as refused:
        box.rotate(payer.key_id, grace_ms)
    assert (refused.value.code, refused.value.param) == ("validation_error", "grace_seconds")
    assert echo(box, payer.key).status == 200


def test_revoking_ends_the_secret_in_its_grace_too(box: Box) -> None:
    payer = box.payer()
    new = box.rotate(payer.key_id, grace_ms=7 * 86_400_000)
    box.revoke(payer.key_id)
    assert (echo(box, payer.key).status, echo(box, new).status) == (401, 401)


def test_a_suspended_key_in_its_grace_is_suspended_with_both_secrets(box: Box) -> None:
    payer = box.payer()
    new = box.rotate(payer.key_id, grace_ms=60_000)
    box.suspend(payer.key_id, "both")
    assert [echo(box, k).code for k in (payer.key, new)] == ["key_suspended"] * 2


def test_a_grace_that_ended_does_not_come_back_with_the_clock(box: Box, frozen: Clock) -> None:
    from core import upkeep

    payer = box.payer()
    box.rotate(payer.key_id, grace_ms=60_000)
    frozen.forward(seconds=61)
    upkeep.tidy(box.instance)
    frozen.forward(days=-1)
    assert echo(box, payer.key).status == 401


# Terms.


@pytest.mark.parametrize(
    ("terms", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "bell\x07"}, "name"),
        ({"scopes": ["Bad Scope"]}, "scopes"),
        ({"scopes": [""]}, "scopes"),
        ({"expires_at": 1}, "expires_at"),
        ({"credit_limit": 5}, "credit_period"),
        ({"credit_period": "day"}, "credit_period"),
        ({"credit_limit": -1, "credit_period": "day"}, "credit_limit"),
        ({"credit_limit": 10**15 + 1, "credit_period": "day"}, "credit_limit"),
        ({"credit_limit": 5, "credit_period": "year"}, "credit_period"),
        ({"rate_limit": -1}, "rate_limit"),
    ],
)
def test_terms_that_cannot_be_name_their_field(box: Box, terms: dict[str, Any], param: str) -> None:
    account = box.payer().account
    with pytest.raises(Refusal) as refused:
        box.key(account, **terms)
    assert (refused.value.code, refused.value.param) == ("validation_error", param)


# Verification: seldom, bounded, and deaf to guessers.


class CountingHasher:
    """argon2, counted, and stopped at will."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real = keys.HASHER
        self.calls = 0
        self.most_at_once = 0
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Semaphore(0)
        self._at_once = 0
        self._lock = threading.Lock()
        monkeypatch.setattr(keys, "HASHER", self)

    def hash(self, token: str) -> str:
        return self.real.hash(token)

    def verify(self, stored: str, token: str) -> bool:
        with self._lock:
            self.calls += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        self.entered.release()
        try:
            assert self.go.wait(15)
            return self.real.verify(stored, token)
        finally:
            with self._lock:
                self._at_once -= 1


@pytest.fixture
def hasher(monkeypatch: pytest.MonkeyPatch) -> CountingHasher:
    return CountingHasher(monkeypatch)


def test_a_key_is_hashed_once_and_remembered(box: Box, hasher: CountingHasher) -> None:
    payer = box.payer()
    for _ in range(5):
        assert echo(box, payer.key).status == 200
    assert hasher.calls == 1


def test_a_hundred_first_calls_with_one_key_make_one_hash(
    box: Box, hasher: CountingHasher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_PATIENCE_SECONDS", 30.0)
    payer = box.payer(rate_limit=1000)
    hasher.go.clear()
    calls = [Background(lambda: box.get("/api/v1/account", payer.key)) for _ in range(100)]
    assert hasher.entered.acquire(timeout=10)
    hasher.go.set()
    assert [call.result().status for call in calls] == [200] * 100
    assert hasher.calls == 1


def test_bad_keys_cost_no_hash_before_form_lookup_and_state_pass(
    box: Box, hasher: CountingHasher
) -> None:
    revoked, expired, rotated = box.payer(), box.payer(), box.payer()
    box.revoke(revoked.key_id)
    box.run("UPDATE api_key SET expires_at = 1 WHERE id = :id", id=expired.key_id)
    box.rotate(rotated.key_id)
    for token in (STRANGERS_KEY, revoked.key, expired.key, rotated.key, "nonsense", ""):
        assert echo(box, token).status == 401
    assert hasher.calls == 0


def test_when_verification_is_full_new_keys_wait_and_known_ones_do_not(
    box: Box, hasher: CountingHasher, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, new = box.payer(), [box.payer() for _ in range(6)]
    assert echo(box, known.key).status == 200
    calls_before = hasher.calls
    hasher.go.clear()
    monkeypatch.setattr(keys, "_PATIENCE_SECONDS", 0.2)
    waiting = [Background(partial(echo, box, p.key)) for p in new]
    for _ in range(2):
        assert hasher.entered.acquire(timeout=10)
    assert echo(box, known.key).status == 200
    assert told(echo(box, STRANGERS_KEY)) == (401, "invalid_api_key")
    late = echo(box, box.payer().key)
    assert told(late) == (503, "overloaded")
    assert late.headers["Retry-After"] == "1"
    until(lambda: sum(call.done for call in waiting) == 4, 10, "four gave up waiting")
    hasher.go.set()
    refused = [answer for call in waiting if (answer := call.result()).status != 200]
    assert {told(answer) for answer in refused} == {(503, "overloaded")}
    assert len(refused) == 4
    assert hasher.calls - calls_before == 2
    assert hasher.most_at_once == 2
    for payer in new:
        assert echo(box, payer.key).status == 200  # and nothing is stuck afterwards


def guess(token: str) -> str:
    """A well-formed key with another's lookup id and a secret of one's own."""
    body = token[: len("fare_live_") + tokens.LOOKUP_LENGTH] + tokens.random_text(18)
    return body + tokens._checksum(body)


def test_guesses_at_a_key_are_throttled_by_address_and_key_together(
    box: Box, hasher: CountingHasher, frozen: Clock
) -> None:
    payer, other = box.payer(), box.payer()

    def attempt(token: str, client: str) -> tuple[int, str | None]:
        return told(box.request("GET", "/api/v1/echo", key=token, client=client))

    for _ in range(5):
        assert attempt(guess(payer.key), "198.51.100.7") == (401, "invalid_api_key")
    assert hasher.calls == 5
    throttled = box.request("GET", "/api/v1/echo", key=guess(payer.key), client="198.51.100.7")
    assert told(throttled) == (429, "rate_limited")
    assert throttled.headers["Retry-After"] == "30"
    assert hasher.calls == 5
    # The owner, elsewhere, notices nothing; nor does the guesser's neighbour key.
    assert attempt(payer.key, "203.0.113.9") == (200, None)
    assert attempt(other.key, "198.51.100.7") == (200, None)
    # A key this process knows is not even asked who sent it.
    assert attempt(payer.key, "198.51.100.7") == (200, None)
    frozen.forward(seconds=30)
    assert attempt(guess(payer.key), "198.51.100.7") == (401, "invalid_api_key")


def test_good_keys_never_use_the_guessers_minute_up(box: Box, frozen: Clock) -> None:
    payer = box.payer()
    for _ in range(20):
        box.instance.verifier = keys.Verifier()  # as if each call met a fresh worker
        assert echo(box, payer.key).status == 200


def test_a_guess_with_the_right_beginning_is_not_taken_for_the_key(box: Box) -> None:
    payer = box.payer()
    assert echo(box, payer.key).status == 200
    body = payer.key[:-7]
    body += "A" if payer.key[-7] != "A" else "B"
    almost = body + tokens._checksum(body)
    assert almost[:35] == payer.key[:35]
    assert told(echo(box, almost)) == (401, "invalid_api_key")


def test_a_key_changed_between_its_check_and_its_hold_is_refused(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard stands in the hold's own transaction, not in the read before it."""
    authorize = access.authorize
    for change, expected in (
        (box.revoke, (401, "invalid_api_key")),
        (box.rotate, (401, "invalid_api_key")),
        (box.suspend, (403, "key_suspended")),
    ):
        payer = box.payer()
        assert echo(box, payer.key).status == 200

        def meanwhile(*args: Any, change: Any = change, payer: Payer = payer) -> None:
            authorize(*args)
            change(payer.key_id)

        with monkeypatch.context() as patch:
            patch.setattr(access, "authorize", meanwhile)
            assert told(echo(box, payer.key)) == expected
        assert box.standing(payer) == (97, 0)


def test_an_account_suspended_between_the_check_and_the_hold_is_refused(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    authorize = access.authorize
    payer = box.payer()
    assert echo(box, payer.key).status == 200

    def meanwhile(*args: Any) -> None:
        authorize(*args)
        box.suspend_account(payer.account, "unpaid")

    monkeypatch.setattr(access, "authorize", meanwhile)
    answer = echo(box, payer.key)
    assert told(answer) == (403, "account_suspended")
    assert answer.json()["reason"] == "unpaid"
    assert box.standing(payer) == (97, 0)


def test_an_account_has_a_bounded_number_of_keys(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MOST_KEYS", 3)
    payer = box.payer()
    box.key(payer.account)
    _, third = box.key(payer.account)
    with pytest.raises(Refusal) as refused:
        box.key(payer.account)
    assert refused.value.code == "conflict"
    box.revoke(third)
    box.key(payer.account)
