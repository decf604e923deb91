"""Which route a request is, what it costs, and how its answer comes back."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from conftest import StartFarebox
from doubles import Exchange, Upstream, ndjson_event, sse_event
from inprocess import Box, everything
from server import OPERATOR_KEY, Answer, Farebox

from core import gateway

MIB = 1024 * 1024


def config(url: str) -> str:
    return f"""
[upstreams.double]
kind = "http"
base_url = "{url}"
timeout_seconds = 5

[upstreams.under]
kind = "http"
base_url = "{url}/ok/base/"

[upstreams.sandbox]
kind = "sandbox"

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"]
upstream = "double"
upstream_path = "/*"
credits = 3
cost_usd = "0.0079"

[[routes]]
path = "/api/v1/tree/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/ok/wild/*"
credits = 1

[[routes]]
path = "/api/v1/tree/branch/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/ok/branch/*"
credits = 2

[[routes]]
path = "/api/v1/tree/branch/leaf"
methods = ["GET"]
upstream = "double"
upstream_path = "/ok/leaf"
credits = 7

[[routes]]
path = "/api/v1/tree/branch/leaf"
methods = ["POST"]
upstream = "double"
upstream_path = "/ok/post-leaf"
credits = 11

[[routes]]
path = "/api/v1/one/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/ok/only"
credits = 1

[[routes]]
path = "/ok/same"
methods = ["GET", "POST"]
upstream = "double"
credits = 1

[[routes]]
path = "/ok/wild-same/*"
methods = ["GET"]
upstream = "double"
credits = 1

[[routes]]
path = "/under/*"
methods = ["GET"]
upstream = "under"
upstream_path = "/*"
credits = 1

[[routes]]
path = "/api/v1/free/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/*"
credits = 0

[[routes]]
path = "/api/v1/priced/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/ok/priced/*"
credits = 1

[[routes]]
path = "/api/v1/priced/dear"
methods = ["GET"]
upstream = "double"
upstream_path = "/ok/priced/dear"
credits = 50

[[routes]]
path = "/api/v1/pages/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/*"
credits = 3
per = "unit"
units = {{ from = "json", pointer = "/usage/pages", max = 20 }}
cost_usd = "0.01"

[[routes]]
path = "/api/v1/rows/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/*"
credits = 2
per = "unit"
units = {{ from = "json", pointer = "/rows/1/a~1b~0c", max = 9 }}

[[routes]]
path = "/api/v1/header/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/*"
credits = 3
per = "unit"
units = {{ from = "header", name = "X-Units", max = 20 }}

[[routes]]
path = "/api/v1/narrow/*"
methods = ["POST"]
upstream = "double"
upstream_path = "/*"
credits = 1
body_bytes = 100

[[routes]]
path = "/api/v1/echo"
methods = ["GET", "POST"]
upstream = "sandbox"
credits = 1

[[routes]]
path = "/v1/chat/completions"
methods = ["POST"]
upstream = "sandbox"
credits = 2

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
credits = 2
per = "sms_segment"
cost_usd = "0.0079"

[limits]
requests_per_minute = 100000
body_bytes = 2000
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, upstream_server: Upstream) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("instance")
    with Box(folder, config(upstream_server.url)) as box:
        yield box


@pytest.fixture(scope="module")
def served(start_farebox: StartFarebox, upstream_server: Upstream) -> Farebox:
    return start_farebox(config(upstream_server.url), workers=1)


@pytest.fixture(scope="module")
def served_key(served: Farebox) -> str:
    return served.account(100_000)[1]


def told(answer: Answer) -> tuple[int, str | None]:
    return answer.status, answer.code


def charged(answer: Answer) -> int:
    return int(answer.headers["X-Credits-Charged"])


# Matching.


@pytest.mark.parametrize(
    ("path", "target", "price"),
    [
        ("/api/v1/tree/", "/ok/wild/", 1),
        ("/api/v1/tree/x", "/ok/wild/x", 1),
        ("/api/v1/tree/x/y/z", "/ok/wild/x/y/z", 1),
        ("/api/v1/tree/branch", "/ok/wild/branch", 1),
        ("/api/v1/tree/branchy", "/ok/wild/branchy", 1),
        ("/api/v1/tree/branch/", "/ok/branch/", 2),
        ("/api/v1/tree/branch/x", "/ok/branch/x", 2),
        ("/api/v1/tree/branch/leaf", "/ok/leaf", 7),
        ("/api/v1/tree/branch/leaf/x", "/ok/branch/leaf/x", 2),
        ("/api/v1/tree/branch/leafy", "/ok/branch/leafy", 2),
        ("/api/v1/one/whatever/it/is", "/ok/only", 1),
        ("/ok/same", "/ok/same", 1),
        ("/ok/wild-same/a/b", "/ok/wild-same/a/b", 1),
        ("/under/x", "/ok/base/x", 1),
    ],
)
def test_exact_paths_win_over_wildcards_and_longer_over_shorter(
    box: Box, upstream: Upstream, path: str, target: str, price: int
) -> None:
    answer = box.get(path, box.payer().key)
    assert answer.status == 200, answer
    assert answer.json()["target"] == target
    assert charged(answer) == price
    assert [hit.target for hit in upstream.hits()] == [target]


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/tree",
        "/api/v1/treex",
        "/api/v1",
        "/ok/same/",
        "/ok/same/x",
        "/OK/SAME",
        "/ok/wild-same",
        "/api/v1/TREE/x",
        "/ok/same;x",
        "/ok/same.json",
        "/v1/free/ok",
        "/nothing",
        "/metrics",
    ],
)
def test_what_no_route_names_is_404(box: Box, upstream: Upstream, path: str) -> None:
    assert told(box.get(path, box.payer().key)) == (404, "not_found")
    assert upstream.hits() == []


def test_the_query_goes_along_as_it_came(box: Box, upstream: Upstream) -> None:
    key = box.payer().key
    for query in ("a=1&a=2&b", "q=%2F%20+x&e=", "%3f", "a=b?c=d", "==&&", "x='\"<>|{}"):
        box.get(f"/ok/same?{query}", key)
        assert upstream.hits()[-1].target == f"/ok/same?{query}"
    box.get("/ok/same?", key)
    assert upstream.hits()[-1].target == "/ok/same"
    count = len(upstream.hits())
    assert told(box.get("/ok/same?q=\xe9", key)) == (400, "validation_error")
    assert len(upstream.hits()) == count


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("body", [None, b"", b'{"a": 1}', b"\x00\xff" * 500])
def test_a_method_and_its_body_arrive_as_they_were_sent(
    box: Box, upstream: Upstream, method: str, body: bytes | None
) -> None:
    answer = box.request(method, "/api/v1/up/ok", key=box.payer().key, body=body)
    assert answer.status == 200
    hit = upstream.hits()[-1]
    assert (hit.method, hit.body) == (method, body or b"")
    assert charged(answer) == 3


def test_a_method_a_route_lacks_is_405_with_those_it_has(box: Box, upstream: Upstream) -> None:
    payer = box.payer()
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT", "BREW"):
        answer = box.request(method, "/api/v1/tree/branch/leaf", key=payer.key)
        assert told(answer)[0] == 405
        assert answer.headers["Allow"] == "GET, POST"
    assert upstream.hits() == []
    assert box.standing(payer) == (100, 0)
    assert charged(box.post("/api/v1/tree/branch/leaf", payer.key)) == 11


def test_a_head_that_a_route_names_is_sent_as_head_and_charged(
    box: Box, upstream: Upstream
) -> None:
    payer = box.payer()
    answer = box.request("HEAD", "/api/v1/up/empty", key=payer.key)
    assert (answer.status, answer.body) == (204, b"")
    assert upstream.hits()[-1].method == "HEAD"
    assert box.standing(payer) == (97, 0)


def test_a_head_says_no_length_that_a_get_would_not(box: Box) -> None:
    # RFC 9110 8.6: the length a GET's body would have, or none at all.
    answer = box.request("HEAD", "/api/v1/up/ok", key=box.payer().key)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers.get("Content-Length") != "0"


# Other ways to write a path, through the real server: what it decodes is part of the question.

ALIASES = [
    "//ok/same",
    "/ok//same",
    "/ok/same//",
    "/ok/same/",
    "/ok/./same",
    "/ok/x/../same",
    "/ok/%2e/same",
    "/ok/x/%2e%2e/same",
    "/ok%2fsame",
    "/ok%2Fsame",
    "/ok%5csame",
    "/ok\\same",
    "/%6fk/same",
    "/ok/s%61me",
    "/ok/same%20",
    "/ok/same%00",
    "/ok/same%3f",
    "/ok/same%23",
    "/ok/same;",
    "/./ok/same",
    "/../ok/same",
    "http://127.0.0.1/ok/same",
    "http://evil.example/ok/same",
    "///ok/same",
]


def raw(served: Farebox, method: str, target: str, key: str | None, body: bytes = b"") -> bytes:
    """The whole answer to a request line that no client library would send."""
    credential = f"Authorization: Bearer {key}\r\n" if key else ""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    head = (
        f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{credential}{length}"
        "Connection: close\r\n\r\n"
    )
    with served.connect() as sock:
        sock.sendall(head.encode("latin-1") + body)
        return everything(sock)


@pytest.mark.parametrize("alias", ALIASES)
def test_no_other_way_to_write_a_path_is_served_unpaid(
    served: Farebox, served_key: str, upstream: Upstream, alias: str
) -> None:
    before = served.settled(served_key)
    for method in ("GET", "POST", "HEAD", "OPTIONS"):
        for key in (None, served_key):
            status = int(raw(served, method, alias, key).split(b" ", 2)[1])
            hits = upstream.hits()
            # Either it reaches nothing, or it is the route itself, with its key and its price.
            assert status in (400, 401, 404, 405) or (status, len(hits)) == (200, 1), (method, hits)
            if hits:
                assert key is not None
                assert {hit.target for hit in hits} == {"/ok/same"}
                assert before - served.settled(served_key) == len(hits)
                before = served.settled(served_key)
                upstream.clear()


@pytest.mark.parametrize(
    "suffix",
    [
        "..",
        "../x",
        "x/..",
        "x/../y",
        "./x",
        "x/.",
        "%2e",
        "%2e%2e",
        "%2E%2e/x",
        ".%2e/x",
        "x/%2e./y",
        "%2fx",
        "x%2Fy",
        "x%5cy",
        "x%5Cy",
        "x\\y",
        "/x",
        "x//y",
        "//x",
        "%00",
        "x%00y",
        "@evil.example",
        "%40evil.example",
        "x%",
        "x%4",
        "x%zz",
        "x\xe9",
        'x"y',
        "x<y>",
        "x|y",
        "x^y",
        "x`y",
        "x{y}",
        "x[y]",
    ],
)
def test_a_wildcards_rest_reaches_only_what_it_says(
    served: Farebox, served_key: str, upstream: Upstream, suffix: str
) -> None:
    before = served.settled(served_key)
    status = int(raw(served, "GET", f"/api/v1/tree/{suffix}", served_key).split(b" ", 2)[1])
    assert status in (400, 404), status
    assert upstream.hits() == []
    assert served.settled(served_key) == before


@pytest.mark.parametrize(
    "suffix", ["x/", "a.b", "a..b", "...", "a%20b", "~x!$&'()*+,;=:y", "%C3%A9"]
)
def test_a_wildcards_ordinary_rest_is_passed_on_as_it_was_written(
    served: Farebox, served_key: str, upstream: Upstream, suffix: str
) -> None:
    answer = raw(served, "GET", f"/api/v1/tree/{suffix}", served_key)
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:100]
    assert [hit.target for hit in upstream.hits()] == [f"/ok/wild/{suffix}"]


@pytest.mark.parametrize("alias", ["%64ear", "dea%72", "%64%65%61%72", "d%65ar"])
def test_a_dear_path_written_with_encoded_letters_is_not_sold_at_the_wildcards_price(
    box: Box, upstream: Upstream, alias: str
) -> None:
    # RFC 3986 6.2.2.2: to the upstream, an encoded letter is that letter.
    payer = box.payer()
    assert charged(box.get("/api/v1/priced/dear", payer.key)) == 50
    upstream.clear()
    answer = box.get(f"/api/v1/priced/{alias}", payer.key)
    assert answer.status in (400, 404) or charged(answer) == 50, (answer, upstream.hits())


def test_an_alias_of_our_own_path_is_never_a_paid_route(box: Box, upstream: Upstream) -> None:
    for path in ("/api/v1/tree/../account", "/api/v1/tree/%2e%2e/account"):
        assert told(box.get(path, box.payer().key)) == (400, "validation_error")
    assert upstream.hits() == []


def test_options_and_head_answer_nothing_that_is_paid(
    served: Farebox, served_key: str, upstream: Upstream
) -> None:
    before = served.settled(served_key)
    for method in ("OPTIONS", "HEAD", "TRACE"):
        for path in ("/ok/same", "/api/v1/tree/x", "/api/v1/sms/send", "/api/v1/echo"):
            for key in (None, served_key):
                answer = raw(served, method, path, key)
                assert int(answer.split(b" ", 2)[1]) in (401, 405), answer[:200]
    assert raw(served, "OPTIONS", "*", served_key).split(b" ", 2)[1] in (b"400", b"404")
    assert upstream.hits() == []
    assert served.settled(served_key) == before


# Prices.


def test_a_call_costs_its_price_and_the_record_says_all_about_it(box: Box) -> None:
    payer = box.payer()
    answer = box.post("/api/v1/up/ok", payer.key)
    assert answer.headers["X-Credits-Charged"] == "3"
    assert answer.headers["X-Credits-Remaining"] == "97"
    record = box.record(payer.key, answer)
    duration = record.pop("duration_ms")
    assert isinstance(duration, int) and duration >= 0
    assert record.pop("created_at").endswith("Z")
    assert record == {
        "request_id": answer.request_id,
        "route": "/api/v1/up/*",
        "method": "POST",
        "payer": "api_key",
        "key_id": payer.key_id,
        "user_id": None,
        "model": None,
        "input_tokens": None,
        "output_tokens": None,
        "units": 1,
        "price": 3,
        "held": 3,
        "captured": 3,
        "status": "captured",
        "upstream_status": 200,
        "estimated": False,
        "cost_usd": "0.0079",
    }


def test_a_failed_call_is_recorded_and_costs_nothing(box: Box) -> None:
    payer = box.payer()
    record = box.record(payer.key, box.get("/api/v1/up/status/503", payer.key))
    assert (record["status"], record["captured"], record["held"]) == ("voided", 0, 3)
    assert (record["upstream_status"], record["cost_usd"]) == (503, None)
    record = box.record(payer.key, box.get("/api/v1/up/status/404", payer.key))
    assert (record["status"], record["upstream_status"]) == ("voided", 404)
    assert box.standing(payer) == (100, 0)


def test_a_route_may_be_free_and_is_still_recorded(box: Box) -> None:
    payer = box.payer(0)
    answer = box.get("/api/v1/free/ok", payer.key)
    assert (answer.status, charged(answer)) == (200, 0)
    assert answer.headers["X-Credits-Remaining"] == "0"
    record = box.record(payer.key, answer)
    assert (record["status"], record["price"], record["captured"]) == ("captured", 0, 0)
    assert box.get("/api/v1/ledger", payer.key).json()["data"] == []


def test_the_cost_of_a_call_is_its_units_times_what_one_costs(box: Box) -> None:
    payer = box.payer(1000)
    answer = box.sms(payer.key, text="x" * 400)
    assert box.record(payer.key, answer)["cost_usd"] == "0.0237"
    record = box.record(payer.key, box.get("/api/v1/pages/units/7", payer.key))
    assert (record["cost_usd"], record["units"]) == ("0.07", 7)
    assert box.record(payer.key, box.get("/api/v1/tree/x", payer.key))["cost_usd"] is None


JSON_UNITS = [
    # what the answer says · units · estimated
    ('{"usage": {"pages": 5}}', 5, False),
    ('{"usage": {"pages": 1}}', 1, False),
    ('{"usage": {"pages": 20}}', 20, False),
    ('{"usage": {"pages": 21}}', 20, False),
    ('{"usage": {"pages": 0}}', 1, False),
    ('{"usage": {"pages": -4}}', 1, False),
    ('{"usage": {"pages": 9223372036854775807}}', 20, False),
    ('{"usage": {"pages": 9223372036854775808}}', 20, False),
    ('{"usage": {"pages": 18446744073709551616}}', 20, False),
    ('{"usage": {"pages": 1000000000000000000000000000000}}', 20, False),
    ('{"usage": {"pages": -1000000000000000000000000000000}}', 1, False),
    ('{"usage": {"pages": 2.5}}', 1, True),
    ('{"usage": {"pages": 1e400}}', 1, True),
    ('{"usage": {"pages": "7"}}', 1, True),
    ('{"usage": {"pages": true}}', 1, True),
    ('{"usage": {"pages": false}}', 1, True),
    ('{"usage": {"pages": null}}', 1, True),
    ('{"usage": {"pages": [7]}}', 1, True),
    ('{"usage": {"pages": {"n": 7}}}', 1, True),
    ('{"usage": {}}', 1, True),
    ('{"usage": 7}', 1, True),
    ('{"usage": [7]}', 1, True),
    ('{"pages": 7}', 1, True),
    ("{}", 1, True),
    ("[]", 1, True),
    ("7", 1, True),
    ("not json", 1, True),
    ('{"usage": {"pages": NaN}}', 1, True),
    ('{"usage": {"pages": 7}', 1, True),
    ("[" * 5000, 1, True),
    (" ", 1, True),
]


@pytest.mark.parametrize(("says", "units", "estimated"), JSON_UNITS)
def test_units_in_json_are_what_the_answer_says_within_bounds(
    box: Box, says: str, units: int, estimated: bool
) -> None:
    payer = box.payer()
    if len(says) > 1000:
        says = says[:1000]
    answer = box.get(f"/api/v1/pages/units/1?json={quote(says)}", payer.key)
    assert (answer.status, answer.body) == (200, says.encode())
    record = box.record(payer.key, answer)
    assert (record["units"], record["estimated"]) == (units, estimated)
    assert (record["held"], record["captured"], record["price"]) == (60, 3 * units, 3 * units)
    assert charged(answer) == 3 * units
    assert answer.headers["X-Credits-Remaining"] == str(100 - 3 * units)
    assert box.standing(payer) == (100 - 3 * units, 0)


def test_units_in_an_answer_that_is_not_utf_8_are_estimated(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_latin_1(server: Upstream, exchange: Exchange) -> None:
        exchange.answer(200, b'{"usage": {"pages": 4}, "by": "Andr\xe9"}')

    monkeypatch.setitem(Upstream.behaviours, "latin", in_latin_1)
    payer = box.payer()
    answer = box.get("/api/v1/pages/latin", payer.key)
    assert answer.status == 200, answer
    record = box.record(payer.key, answer)
    assert (record["units"], record["estimated"], record["captured"]) == (1, True, 3)


@pytest.mark.parametrize(
    ("says", "units", "estimated"),
    [
        ('{"rows": [1, {"a/b~c": 4}]}', 4, False),
        ('{"rows": [{"a/b~c": 4}]}', 1, True),
        ('{"rows": {"1": {"a/b~c": 4}}}', 4, False),
        ('{"rows": [1, {"a": {"b~c": 4}}]}', 1, True),
    ],
)
def test_a_pointer_walks_lists_and_unescapes_names(
    box: Box, says: str, units: int, estimated: bool
) -> None:
    key = box.payer().key
    record = box.record(key, box.get(f"/api/v1/rows/units/1?json={quote(says)}", key))
    assert (record["units"], record["estimated"]) == (units, estimated)
    assert (record["held"], record["captured"]) == (18, 2 * units)


@pytest.mark.parametrize(
    ("says", "units", "estimated"),
    [
        ("5", 5, False),
        ("05", 5, False),
        ("20", 20, False),
        ("21", 20, False),
        ("0", 1, False),
        ("-4", 1, False),
        ("999999999999999", 20, False),
        ("9999999999999999", 20, False),
        ("1000000000000000000000000000000", 20, False),
        ("-1000000000000000000000000000000", 1, False),
        ("2.5", 1, True),
        ("5.0", 1, True),
        ("1e1", 1, True),
        ("0x10", 1, True),
        ("1_0", 1, True),
        ("5, 6", 1, True),
        ("five", 1, True),
        ("true", 1, True),
        ("", 1, True),
        ("+", 1, True),
    ],
)
def test_units_in_a_header_are_what_it_says_within_bounds(
    box: Box, says: str, units: int, estimated: bool
) -> None:
    payer = box.payer(1000)
    answer = box.get(f"/api/v1/header/units/1?header={quote(says)}", payer.key)
    assert answer.status == 200
    record = box.record(payer.key, answer)
    assert (record["units"], record["estimated"]) == (units, estimated)
    assert (record["held"], record["captured"]) == (60, 3 * units)
    assert charged(answer) == 3 * units
    missing = box.get("/api/v1/header/ok", payer.key)
    record = box.record(payer.key, missing)
    assert (record["units"], record["estimated"], record["captured"]) == (1, True, 3)


def test_a_call_by_the_unit_needs_its_maximum_to_be_there(box: Box, upstream: Upstream) -> None:
    payer = box.payer(59)
    answer = box.get("/api/v1/pages/units/1", payer.key)
    assert told(answer) == (402, "insufficient_credits")
    assert (answer.json()["credits"], answer.json()["required"]) == (59, 60)
    assert upstream.hits() == []
    box.grant(payer.account, 1)
    assert box.get("/api/v1/pages/units/20", payer.key).status == 200
    assert box.standing(payer) == (0, 0)


def test_the_operators_calls_are_served_recorded_and_debit_nobody(box: Box) -> None:
    before = box.row("SELECT SUM(balance), SUM(held), COUNT(*) FROM account")
    entries = box.row("SELECT COUNT(*) FROM entry")
    for path, price in (
        ("/api/v1/up/ok", 3),
        ("/api/v1/pages/units/4", 12),
        ("/api/v1/header/units/4", 12),
    ):
        answer = box.get(path, OPERATOR_KEY)
        assert (answer.status, charged(answer)) == (200, 0)
        assert "X-Credits-Remaining" not in answer.headers
        record = box.record(OPERATOR_KEY, answer)
        assert (record["payer"], record["price"], record["captured"]) == ("operator", price, 0)
        assert (record["held"], record["status"], record["key_id"]) == (0, "captured", None)
    message = box.sms(OPERATOR_KEY, text="x" * 161)
    assert box.record(OPERATOR_KEY, message)["price"] == 4
    failed = box.get("/api/v1/up/status/500", OPERATOR_KEY)
    record = box.record(OPERATOR_KEY, failed)
    assert (failed.status, record["status"], record["captured"]) == (502, "voided", 0)
    assert box.row("SELECT SUM(balance), SUM(held), COUNT(*) FROM account") == before
    assert box.row("SELECT COUNT(*) FROM entry") == entries
    assert box.get("/api/v1/account", OPERATOR_KEY).json()["credits"] == 0


# What a failure costs, and what of it comes back.


@pytest.mark.parametrize("status", [400, 402, 404, 405, 409, 410, 418, 422, 429, 451, 499])
def test_an_upstreams_4xx_is_passed_on_with_its_body_and_costs_nothing(
    box: Box, status: int
) -> None:
    payer = box.payer()
    answer = box.get(f"/api/v1/up/status/{status}?body=no+more&retry_after=17", payer.key)
    assert (answer.status, answer.body) == (status, b"no more")
    assert answer.headers["Retry-After"] == "17"
    assert charged(answer) == 0
    assert answer.headers["X-Credits-Remaining"] == "100"
    assert box.standing(payer) == (100, 0)


@pytest.mark.parametrize(
    "status", [300, 301, 302, 303, 304, 307, 308, 401, 403, 407, 500, 501, 502, 503, 504, 599]
)
def test_what_is_the_operators_or_the_upstreams_fault_is_502(box: Box, status: int) -> None:
    payer = box.payer()
    answer = box.get(f"/api/v1/up/status/{status}?body=secret+details&retry_after=17", payer.key)
    assert told(answer) == (502, "provider_error")
    assert answer.json()["refunded"] is True
    assert b"secret" not in answer.body
    assert (charged(answer), answer.headers["X-Credits-Remaining"]) == (0, "100")
    assert box.standing(payer) == (100, 0)


@pytest.mark.parametrize("status", [200, 201, 202, 203, 204, 206, 226, 299])
def test_every_2xx_is_a_success(box: Box, status: int) -> None:
    payer = box.payer()
    answer = box.get(f"/api/v1/up/status/{status}?body=fine", payer.key)
    assert answer.status == status
    assert answer.body == (b"" if status == 204 else b"fine")
    assert charged(answer) == 3


# Streamed or whole.


def is_streamed(answer: Answer) -> bool:
    """Whether the answer went out before its price was known."""
    assert ("X-Credits-Held" in answer.headers) != ("X-Credits-Charged" in answer.headers)
    return "X-Credits-Held" in answer.headers


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("sse/3", b"".join(map(sse_event, range(3)))),
        ("ndjson/3", b"".join(map(ndjson_event, range(3)))),
        (f"big/{MIB + 1}", b"B" * (MIB + 1)),
        (f"big/{3 * MIB}?chunked=1", b"B" * (3 * MIB)),
    ],
)
def test_events_lines_and_large_answers_are_streamed(box: Box, path: str, body: bytes) -> None:
    payer = box.payer()
    answer = box.get(f"/api/v1/up/{path}", payer.key)
    assert (answer.status, answer.body) == (200, body)
    assert is_streamed(answer)
    assert answer.headers["X-Credits-Held"] == "3"
    record = box.record(payer.key, answer)
    assert (record["status"], record["captured"]) == ("captured", 3)
    assert box.standing(payer) == (97, 0)


@pytest.mark.parametrize(
    "path", ["ok", "empty", f"big/{MIB}", f"big/{MIB}?chunked=1", "big/0", "until-close/9000"]
)
def test_every_other_answer_is_read_whole_first(box: Box, path: str) -> None:
    answer = box.get(f"/api/v1/up/{path}", box.payer().key)
    assert 200 <= answer.status < 300
    assert not is_streamed(answer)
    if "Content-Length" in answer.headers:
        assert answer.headers["Content-Length"] == str(len(answer.body))


@pytest.mark.parametrize("path", ["cut/1000/999", "cut/10/0", "cut-chunked/2", "bad-chunk"])
def test_a_whole_answer_that_is_cut_is_502_and_free(box: Box, path: str) -> None:
    payer = box.payer()
    answer = box.get(f"/api/v1/up/{path}", payer.key)
    assert told(answer) == (502, "provider_error")
    assert box.standing(payer) == (100, 0)


def test_units_from_json_are_read_whole_whatever_they_are_called(box: Box) -> None:
    payer = box.payer(1000)
    assert not is_streamed(box.get("/api/v1/pages/sse/3", payer.key))
    large = box.get(f"/api/v1/pages/big/{8 * MIB}", payer.key)
    assert (large.status, len(large.body)) == (200, 8 * MIB)
    assert not is_streamed(large)
    assert charged(large) == 3
    too_large = box.get(f"/api/v1/pages/big/{8 * MIB + 1}", payer.key)
    assert told(too_large) == (502, "provider_error")
    assert box.standing(payer) == (994, 0)


def test_units_from_a_header_can_be_streamed_at_their_price(box: Box) -> None:
    payer = box.payer(1000)
    answer = box.get("/api/v1/header/sse/2", payer.key)
    assert is_streamed(answer)
    assert answer.headers["X-Credits-Held"] == "60"
    assert box.standing(payer) == (997, 0)


def test_the_bound_between_whole_and_streamed_is_one_mebibyte() -> None:
    assert gateway.WHOLE_BYTES == MIB


# Bodies.


def chunked(served: Farebox, path: str, key: str, size: int) -> tuple[int, bytes]:
    """POST so many bytes in chunks, without saying how many."""
    with served.connect() as sock:
        sock.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
            "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
        )
        piece = b"y" * 40
        try:
            for _ in range(size // 40):
                sock.sendall(b"28\r\n" + piece + b"\r\n")
            sock.sendall(b"0\r\n\r\n")
        except OSError:
            pass
        answer = everything(sock)
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def test_a_chunked_body_is_limited_and_never_silently_cut(
    served: Farebox, served_key: str, upstream: Upstream
) -> None:
    status, body = chunked(served, "/api/v1/up/ok/fits", served_key, 2000)
    assert status == 200
    assert len(json.loads(body)["body"]) == 2000
    status, body = chunked(served, "/api/v1/up/ok/over", served_key, 2040)
    assert status == 413
    assert json.loads(body)["error"] == "body_too_large"
    status, _ = chunked(served, "/api/v1/up/ok/over", served_key, 400_000)
    assert status == 413
    assert upstream.hits("over") == []
    assert len(upstream.hits("fits")) == 1


def test_a_body_is_limited_by_its_route_or_by_the_instance(box: Box, upstream: Upstream) -> None:
    payer = box.payer()

    def sent(path: str, size: int) -> tuple[int, str | None]:
        return told(box.request("POST", path, key=payer.key, body=b"x" * size))

    assert sent("/api/v1/narrow/ok", 100) == (200, None)
    assert sent("/api/v1/narrow/ok", 101) == (413, "body_too_large")
    assert sent("/api/v1/up/ok", 2000) == (200, None)
    assert sent("/api/v1/up/ok", 2001) == (413, "body_too_large")
    assert [len(hit.body) for hit in upstream.hits()] == [100, 2000]


def test_a_body_shorter_than_it_says_reaches_nobody(
    served: Farebox, served_key: str, upstream: Upstream
) -> None:
    with served.connect() as sock:
        sock.sendall(
            f"POST /api/v1/up/ok/short HTTP/1.1\r\nHost: localhost\r\n"
            f"Authorization: Bearer {served_key}\r\nContent-Length: 10\r\n\r\nfour".encode()
        )
        sock.shutdown(socket.SHUT_WR)
        answer = everything(sock)
    assert not answer.startswith(b"HTTP/1.1 2")
    assert upstream.hits("short") == []


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "gzip, identity", "aes128gcm", "x"])
def test_a_coded_body_is_415(box: Box, upstream: Upstream, coding: str) -> None:
    for path in ("/api/v1/up/ok", "/api/v1/sms/send"):
        answer = box.request(
            "POST", path, key=box.payer().key, body=b"{}", headers={"Content-Encoding": coding}
        )
        assert told(answer) == (415, "unsupported_media_type")
    assert upstream.hits() == []


def test_identity_is_no_coding(box: Box) -> None:
    answer = box.post("/api/v1/up/ok", box.payer().key, Content_Encoding="Identity")
    assert answer.status == 200


# The sandbox: an upstream that answers by itself.


def test_the_sandbox_says_what_it_was_asked(box: Box) -> None:
    key = box.payer().key
    assert box.post("/api/v1/echo?a=1&a=2", key, {"deep": [1, "é"]}).json() == {
        "method": "POST",
        "path": "/api/v1/echo",
        "query": {"a": ["1", "2"]},
        "json": {"deep": [1, "é"]},
        "body": None,
    }
    for body in (b"\x00plain", b"{", b'{"name": "Andr\xe9"}'):
        plain = box.request("POST", "/api/v1/echo", key=key, body=body)
        assert plain.status == 200, plain
        said = plain.json()
        assert (said["json"], base64.b64decode(said["body"])) == (None, body)


@pytest.mark.parametrize(
    ("status", "seen"), [(200, 200), (201, 201), (404, 404), (429, 429), (500, 502), (302, 502)]
)
def test_the_sandbox_fails_when_asked_to(box: Box, status: int, seen: int) -> None:
    payer = box.payer()
    assert box.get(f"/api/v1/echo?status={status}", payer.key).status == seen
    assert box.standing(payer) == (99 if seen < 300 else 100, 0)


@pytest.mark.parametrize("status", ["", "x", "99", "600", "1e3", "-200", "200200", "٢٠٠"])
def test_a_status_the_sandbox_cannot_give_is_200(box: Box, status: str) -> None:
    assert box.get(f"/api/v1/echo?status={quote(status)}", box.payer().key).status == 200


@pytest.mark.parametrize(
    ("to", "status", "code", "param"),
    [
        ("+15005550006", 200, None, None),
        ("+15005550001", 400, "validation_error", "to"),
        ("+15005550002", 400, "validation_error", "to"),
        ("+15005550003", 400, "validation_error", "to"),
        ("+15005550004", 400, "validation_error", "to"),
        ("+15005550009", 400, "validation_error", "to"),
        ("+15005550429", 429, "rate_limited", None),
        ("+15005550500", 502, "provider_error", None),
        ("+15005550503", 502, "provider_error", None),
        ("+15005550504", 504, "provider_timeout", None),
    ],
)
def test_the_sandboxs_magic_numbers_fail_as_a_provider_would(
    box: Box, to: str, status: int, code: str | None, param: str | None
) -> None:
    payer = box.payer()
    answer = box.sms(payer.key, to)
    assert told(answer) == (status, code)
    assert answer.json().get("param") == param
    assert box.standing(payer) == (98 if status == 200 else 100, 0)
    if status == 429:
        assert answer.headers["Retry-After"] == "7"


def test_the_sandboxs_message_ids_depend_on_the_message_alone(box: Box) -> None:
    key = box.payer().key
    first, again, other = box.sms(key), box.sms(key), box.sms(key, text="ho")
    assert first.json() == again.json()
    assert first.json()["messageId"] != other.json()["messageId"]
    assert first.json()["messageId"].startswith("msg_")


def chat(box: Box, key: str, **options: Any) -> Answer:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello you"},
    ]
    return box.post("/v1/chat/completions", key, {"model": "m", "messages": messages} | options)


def test_the_sandboxs_chat_looks_like_openais(box: Box) -> None:
    payer = box.payer()
    answer = chat(box, payer.key).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "m"
    choice = answer["choices"][0]
    said = {"role": "assistant", "content": "The sandbox heard: hello you", "refusal": None}
    assert choice["message"] == said
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert chat(box, payer.key).json() == answer
    short = chat(box, payer.key, max_tokens=2).json()
    assert short["choices"][0]["message"]["content"] == "The sandbox"
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 2


def test_the_sandboxs_chat_streams_when_asked(box: Box) -> None:
    payer = box.payer()
    answer = chat(box, payer.key, stream=True, stream_options={"include_usage": True})
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert is_streamed(answer)
    events = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    parsed = [json.loads(event) for event in events[:-2]]
    assert {event["object"] for event in parsed} == {"chat.completion.chunk"}
    said = "".join(e["choices"][0]["delta"].get("content", "") for e in parsed if e["choices"])
    assert said == "The sandbox heard: hello you"
    assert parsed[-1]["usage"]["completion_tokens"] == 5
    assert box.standing(payer) == (98, 0)
    without = chat(box, payer.key, stream=True)
    assert b'"usage"' not in without.body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"{",
        b'{"messages": null}',
        b'{"messages": ["x", 1, {}]}',
        b'{"messages": 7}',
        b'{"messages": {"a": 1}}',
        b'{"messages": "text"}',
        b'{"messages": [{"content": [{"type": "text"}]}]}',
        b'{"max_tokens": -1}',
        b'{"max_tokens": "9"}',
    ],
)
def test_no_body_makes_the_sandbox_stumble(box: Box, body: bytes) -> None:
    answer = box.request("POST", "/v1/chat/completions", key=box.payer().key, body=body)
    assert answer.status == 200, answer
