"""The same Idempotency-Key and request give the same answer, and it is paid for once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from doubles import Upstream, ndjson_event, sse_event
from inprocess import Background, Box, Clock
from server import OPERATOR_KEY, Answer

from core import idempotency, tokens, upkeep

MIB = 1024 * 1024
# Headers that belong to one request and not to the answer.
OF_THE_REQUEST = {
    "X-Request-Id",
    "X-Credits-Charged",
    "X-Credits-Remaining",
    "X-Credits-Held",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
    "Idempotent-Replayed",
    "Content-Length",
}


def config(url: str) -> str:
    return f"""
[upstreams.double]
kind = "http"
base_url = "{url}"
timeout_seconds = 5
return_headers = ["X-Quota"]

[upstreams.sandbox]
kind = "sandbox"

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST", "PUT"]
upstream = "double"
upstream_path = "/*"
credits = 3

[[routes]]
path = "/api/v1/pages/*"
methods = ["POST"]
upstream = "double"
upstream_path = "/*"
credits = 1
per = "unit"
units = {{ from = "json", pointer = "/usage/pages", max = 10 }}

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
credits = 1
per = "sms_segment"

[limits]
requests_per_minute = 100000
body_bytes = 2000000
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, upstream_server: Upstream) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("instance")
    with Box(folder, config(upstream_server.url)) as box:
        yield box


def told(answer: Answer) -> tuple[int, str | None]:
    return answer.status, answer.code


def is_replay(answer: Answer) -> bool:
    replayed = answer.headers.get("Idempotent-Replayed")
    assert replayed in (None, "true")
    return replayed == "true"


def same_answer(first: Answer, again: Answer) -> None:
    """The repeat is the first answer again, marked, and free."""
    assert is_replay(again) and not is_replay(first)
    assert (again.status, again.body) == (first.status, first.body)
    kept = [
        {(k.lower(), v) for k, v in answer.headers.items() if k not in OF_THE_REQUEST}
        for answer in (first, again)
    ]
    assert kept[0] == kept[1]
    assert again.headers["X-Credits-Charged"] == "0"
    assert "X-Credits-Held" not in again.headers


def test_a_repeat_gets_the_stored_answer_and_is_not_charged_again(
    box: Box, upstream: Upstream
) -> None:
    payer = box.payer()
    first = box.post("/api/v1/up/ok", payer.key, {"a": 1}, Idempotency_Key="order-1")
    assert first.status == 200
    for _ in range(3):
        again = box.post("/api/v1/up/ok", payer.key, {"a": 1}, Idempotency_Key="order-1")
        same_answer(first, again)
        assert again.headers["X-Credits-Remaining"] == "97"
        assert again.request_id != first.request_id
    assert len(upstream.hits()) == 1
    assert box.standing(payer) == (97, 0)
    assert len(box.get("/api/v1/usage", payer.key).json()["data"]) == 1


def test_a_message_is_sent_once(box: Box) -> None:
    payer = box.payer()
    first = box.sms(payer.key, Idempotency_Key="m")
    same_answer(first, box.sms(payer.key, Idempotency_Key="m"))
    assert box.standing(payer) == (99, 0)


def test_the_stored_answer_keeps_its_status_and_headers(box: Box) -> None:
    payer = box.payer()
    for path in ("status/201?body=made", "empty", "secrets", "units/3"):
        first = box.post(f"/api/v1/up/{path}", payer.key, Idempotency_Key=path)
        assert 200 <= first.status < 300
        again = box.post(f"/api/v1/up/{path}", payer.key, Idempotency_Key=path)
        same_answer(first, again)
    assert again.headers.get("X-Quota") is None
    assert box.standing(payer) == (88, 0)


def test_what_was_captured_by_the_unit_is_replayed_free(box: Box) -> None:
    payer = box.payer()
    first = box.post("/api/v1/pages/units/4", payer.key, Idempotency_Key="p")
    assert first.headers["X-Credits-Charged"] == "4"
    same_answer(first, box.post("/api/v1/pages/units/4", payer.key, Idempotency_Key="p"))
    assert box.standing(payer) == (96, 0)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/v1/up/ok", b'{"a": 2}'),
        ("POST", "/api/v1/up/ok", b'{"a": 1} '),
        ("POST", "/api/v1/up/ok", b""),
        ("POST", "/api/v1/up/ok/", b'{"a": 1}'),
        ("POST", "/api/v1/up/ok/b", b'{"a": 1}'),
        ("POST", "/api/v1/up/ok?x=1", b'{"a": 1}'),
        ("POST", "/api/v1/pages/ok", b'{"a": 1}'),
        ("POST", "/api/v1/sms/send", b'{"to": "+18148835337", "message": "hi"}'),
    ],
)
def test_the_same_key_with_another_request_is_422(
    box: Box, upstream: Upstream, method: str, path: str, body: bytes
) -> None:
    payer = box.payer()
    header = {"Idempotency-Key": "one"}
    first = box.request("POST", "/api/v1/up/ok", key=payer.key, body=b'{"a": 1}', headers=header)
    assert first.status == 200
    other = box.request(method, path, key=payer.key, body=body, headers=header)
    assert told(other) == (422, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    assert len(upstream.hits()) == 1
    assert box.standing(payer) == (97, 0)
    again = box.request("POST", "/api/v1/up/ok", key=payer.key, body=b'{"a": 1}', headers=header)
    same_answer(first, again)


def test_path_query_and_body_do_not_run_into_each_other(box: Box) -> None:
    payer = box.payer()
    path = "/api/v1/up/ok/ab?c=d"
    assert box.post(path, payer.key, Idempotency_Key="k").status == 200
    for other in ("/api/v1/up/ok/a?bc=d", "/api/v1/up/ok/abc?=d", "/api/v1/up/ok/ab%3Fc=d"):
        assert box.post(other, payer.key, Idempotency_Key="k").status in (400, 422)


def test_while_the_first_is_running_a_repeat_is_told_to_wait(box: Box, upstream: Upstream) -> None:
    payer = box.payer()
    path = "/api/v1/up/gated/running"
    first = Background(lambda: box.post(path, payer.key, Idempotency_Key="k"))
    upstream.wait_for(1, "running")
    for _ in range(2):
        early = box.post(path, payer.key, Idempotency_Key="k")
        assert told(early) == (409, "idempotency_in_progress")
        assert int(early.headers["Retry-After"]) >= 1
        assert "x-should-retry" not in early.headers
    other = box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k")
    assert told(other) == (422, "idempotency_key_reused")
    assert box.standing(payer) == (97, 3)
    upstream.gate("running").open()
    answer = first.result()
    same_answer(answer, box.post(path, payer.key, Idempotency_Key="k"))
    assert len(upstream.hits("running")) == 1
    assert box.standing(payer) == (97, 0)


@pytest.mark.parametrize(
    "failure",
    ["status/500", "status/400", "status/429", "reset", "cut/10/5", "redirect/302", "status/401"],
)
def test_a_call_that_was_not_charged_may_be_tried_again(
    box: Box, upstream: Upstream, failure: str
) -> None:
    payer = box.payer()
    for attempt in range(1, 3):
        failed = box.post(f"/api/v1/up/{failure}", payer.key, Idempotency_Key="k")
        assert failed.status >= 400
        assert not is_replay(failed)
        assert len(upstream.hits()) == attempt
    # Nothing was charged, so the key is free for another request too.
    assert box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k").status == 200
    assert box.standing(payer) == (97, 0)


def test_a_call_that_was_refused_here_leaves_its_key_free(box: Box) -> None:
    payer = box.payer(0)
    assert box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k").status == 402
    bad = box.post("/api/v1/sms/send", payer.key, {"to": "me"}, Idempotency_Key="k")
    assert bad.status == 400
    box.grant(payer.account, 3)
    assert box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k").status == 200
    assert box.standing(payer) == (0, 0)


def test_an_answer_over_a_mebibyte_repeats_as_409_uncharged(box: Box, upstream: Upstream) -> None:
    payer = box.payer()
    for path in (f"/api/v1/up/big/{MIB + 1}", f"/api/v1/pages/big/{MIB + 1}"):
        first = box.post(path, payer.key, Idempotency_Key=path)
        assert (first.status, len(first.body)) == (200, MIB + 1)
        before = box.standing(payer)
        for _ in range(2):
            again = box.post(path, payer.key, Idempotency_Key=path)
            assert told(again) == (409, "idempotency_replay_unavailable")
            assert again.headers["x-should-retry"] == "false"
        assert box.standing(payer) == before
    assert len(upstream.hits()) == 2
    assert box.standing(payer) == (96, 0)


@pytest.mark.parametrize("path", [f"big/{MIB}", f"big/{MIB}?chunked=1"])
def test_an_answer_of_a_mebibyte_is_kept(box: Box, path: str) -> None:
    payer = box.payer()
    first = box.post(f"/api/v1/up/{path}", payer.key, Idempotency_Key="k")
    same_answer(first, box.post(f"/api/v1/up/{path}", payer.key, Idempotency_Key="k"))
    assert box.standing(payer) == (97, 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("sse/9", b"".join(map(sse_event, range(9)))),
        ("ndjson/9", b"".join(map(ndjson_event, range(9)))),
    ],
)
def test_a_stream_is_replayed_whole(box: Box, upstream: Upstream, path: str, body: bytes) -> None:
    payer = box.payer()
    first = box.post(f"/api/v1/up/{path}", payer.key, Idempotency_Key="k")
    assert first.headers["X-Credits-Held"] == "3"
    again = box.post(f"/api/v1/up/{path}", payer.key, Idempotency_Key="k")
    same_answer(first, again)
    assert again.body == body
    assert len(upstream.hits()) == 1
    assert box.standing(payer) == (97, 0)


def test_a_stream_too_large_to_keep_repeats_as_409(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert idempotency.LARGEST_ANSWER == MIB
    monkeypatch.setattr(idempotency, "LARGEST_ANSWER", 100 * len(ndjson_event(10)))
    payer = box.payer()
    for name, count, kept in (("fits", 90, True), ("over", 120, False)):
        path = f"/api/v1/up/ndjson/{count}"
        first = box.post(path, payer.key, Idempotency_Key=name)
        assert first.status == 200
        again = box.post(path, payer.key, Idempotency_Key=name)
        if kept:
            same_answer(first, again)
        else:
            assert told(again) == (409, "idempotency_replay_unavailable")
    assert box.standing(payer) == (94, 0)


def test_the_scope_of_a_key_is_the_account_whichever_api_key_asks(box: Box) -> None:
    payer = box.payer()
    other, _ = box.key(payer.account)
    first = box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k")
    same_answer(first, box.post("/api/v1/up/ok", other, Idempotency_Key="k"))
    rotated = box.rotate(payer.key_id)
    same_answer(first, box.post("/api/v1/up/ok", rotated, Idempotency_Key="k"))
    box.revoke(payer.key_id)
    same_answer(first, box.post("/api/v1/up/ok", other, Idempotency_Key="k"))
    assert box.standing(payer) == (97, 0)


def test_a_stranger_with_the_same_key_makes_a_call_of_their_own(
    box: Box, upstream: Upstream
) -> None:
    payer, stranger = box.payer(), box.payer()
    for key in (payer.key, stranger.key, OPERATOR_KEY):
        assert not is_replay(box.post("/api/v1/up/ok", key, Idempotency_Key="order-1"))
    assert len(upstream.hits()) == 3
    assert (box.standing(payer), box.standing(stranger)) == ((97, 0), (97, 0))
    assert is_replay(box.post("/api/v1/up/ok", OPERATOR_KEY, Idempotency_Key="order-1"))


def test_a_key_that_may_not_call_gets_no_stored_answer(box: Box) -> None:
    payer = box.payer()
    assert box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k").status == 200
    closed, _ = box.key(payer.account, scopes=[])
    assert box.post("/api/v1/up/ok", closed, Idempotency_Key="k").code == "missing_scope"
    slow, _ = box.key(payer.account, rate_limit=0)
    assert box.post("/api/v1/up/ok", slow, Idempotency_Key="k").code == "rate_limited"
    box.suspend(payer.key_id)
    assert box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k").code == "key_suspended"


def test_a_stored_answer_needs_no_credits_and_no_limit(box: Box) -> None:
    payer = box.payer(3)
    assert box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k").status == 200
    assert is_replay(box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k"))
    limited, _ = box.key(payer.account, credit_limit=0, credit_period="day")
    assert is_replay(box.post("/api/v1/up/ok", limited, Idempotency_Key="k"))


@pytest.mark.parametrize("name", ["x", "a" * 255, "".join(map(chr, range(0x21, 0x7F)))])
def test_any_visible_ascii_is_a_key(box: Box, name: str) -> None:
    payer = box.payer()
    first = box.post("/api/v1/up/ok", payer.key, Idempotency_Key=name)
    same_answer(first, box.post("/api/v1/up/ok", payer.key, Idempotency_Key=name))


@pytest.mark.parametrize("name", ["", " ", "a b", "a" * 256, "\t", "é", "a\x7f", "a\x00", "a\x80"])
def test_anything_else_is_400(box: Box, upstream: Upstream, name: str) -> None:
    payer = box.payer()
    answer = box.post("/api/v1/up/ok", payer.key, Idempotency_Key=name)
    assert told(answer) == (400, "validation_error")
    assert answer.json()["param"].lower() == "idempotency-key"
    assert upstream.hits() == []
    assert box.standing(payer) == (100, 0)


def test_keys_are_compared_to_the_letter(box: Box) -> None:
    payer = box.payer()
    for name in ("Key", "key", "KEY", "key.", "key%20"):
        assert not is_replay(box.post("/api/v1/up/ok", payer.key, Idempotency_Key=name))
    assert box.standing(payer) == (85, 0)


def test_other_methods_than_post_ignore_it(box: Box, upstream: Upstream) -> None:
    payer = box.payer()
    for method in ("GET", "GET", "PUT", "PUT"):
        answer = box.request(
            method, "/api/v1/up/ok", key=payer.key, headers={"Idempotency-Key": "k"}
        )
        assert answer.status == 200
        assert not is_replay(answer)
    assert len(upstream.hits()) == 4
    assert box.standing(payer) == (88, 0)
    assert not is_replay(box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k"))


def test_other_methods_than_post_ignore_a_bad_one_too(box: Box) -> None:
    payer = box.payer()
    answer = box.get("/api/v1/up/ok", payer.key, Idempotency_Key="a" * 300)
    assert answer.status == 200, answer
    assert box.get("/api/v1/account", payer.key, Idempotency_Key="a" * 300).status == 200


def test_a_day_later_the_call_runs_again(
    box: Box, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Clock(monkeypatch, "2027-03-17T12:00:00Z")
    payer = box.payer()
    first = box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k")
    time.forward(ms=86_400_000 - 1)
    upkeep.tidy(box.instance)
    same_answer(first, box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k"))
    time.forward(ms=1)
    again = box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k")
    assert not is_replay(again)
    assert len(upstream.hits()) == 2
    same_answer(again, box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k"))
    time.forward(days=1)
    # Or another request takes the key.
    assert box.post("/api/v1/up/ok/other", payer.key, Idempotency_Key="k").status == 200
    assert box.standing(payer) == (91, 0)


def test_old_answers_are_forgotten_and_running_calls_are_not(
    box: Box, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Clock(monkeypatch, "2027-03-17T12:00:00Z")
    payer = box.payer()
    assert box.post("/api/v1/up/ok", payer.key, Idempotency_Key="old").status == 200
    path = "/api/v1/up/gated/long"
    slow = Background(lambda: box.post(path, payer.key, Idempotency_Key="long"))
    upstream.wait_for(1, "long")
    time.forward(days=2)
    upkeep.tidy(box.instance)
    rows = box.instance.db.rows(
        "SELECT key FROM idempotency WHERE account_id = :id", {"id": payer.account}
    )
    assert rows == [("long",)]
    early = box.post(path, payer.key, Idempotency_Key="long")
    assert told(early) == (409, "idempotency_in_progress")
    upstream.gate("long").open()
    assert slow.result().status == 200


def test_a_clock_that_steps_back_runs_nothing_twice(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Clock(monkeypatch, "2027-03-17T12:00:00Z")
    payer = box.payer()
    first = box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k")
    time.forward(days=-1)
    same_answer(first, box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k"))
    assert box.standing(payer) == (97, 0)


def test_a_stored_answer_says_nothing_of_the_first_caller(box: Box) -> None:
    payer = box.payer()
    name = tokens.new_id("mine")
    first = box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k", X_Request_Id=name)
    again = box.post("/api/v1/up/ok", payer.key, Idempotency_Key="k")
    assert first.request_id == name
    assert name not in str(again.headers)


def test_two_keys_at_once_do_not_wait_for_each_other(box: Box, upstream: Upstream) -> None:
    payer = box.payer()
    path = "/api/v1/up/gated/apart"
    calls = [
        Background(partial(box.post, path, payer.key, Idempotency_Key=f"k{n}")) for n in range(3)
    ]
    upstream.wait_for(3, "apart")
    upstream.gate("apart").open()
    assert [is_replay(call.result()) for call in calls] == [False] * 3
    assert box.standing(payer) == (91, 0)
