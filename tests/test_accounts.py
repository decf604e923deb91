"""What a caller can read: balance, calls, ledger; and that it is only ever their own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from doubles import Upstream
from inprocess import STRANGERS_KEY, Background, Box, Clock
from server import OPERATOR_KEY, Answer

from core import ledger

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
CALL = {
    "request_id", "created_at", "route", "method", "payer", "key_id", "user_id", "model",
    "input_tokens", "output_tokens", "units", "price", "held", "captured", "status",
    "upstream_status", "duration_ms", "estimated", "cost_usd",
}  # fmt: skip
ENTRY = {"id", "created_at", "kind", "amount", "balance", "reference", "note"}


def config(url: str) -> str:
    return f"""
[upstreams.double]
kind = "http"
base_url = "{url}"

[upstreams.sandbox]
kind = "sandbox"

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST"]
upstream = "double"
upstream_path = "/*"
credits = 3

[[routes]]
path = "/api/v1/echo"
methods = ["GET"]
upstream = "sandbox"
credits = 1

[limits]
requests_per_minute = 100000
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, upstream_server: Upstream) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("instance")
    with Box(folder, config(upstream_server.url)) as box:
        yield box


def told(answer: Answer) -> tuple[int, str | None]:
    return answer.status, answer.code


def pages(box: Box, path: str, key: str, limit: int) -> list[list[dict[str, Any]]]:
    """All pages of a list, checked for shape."""
    found = []
    cursor = ""
    while True:
        answer = box.get(f"{path}?limit={limit}{cursor}", key)
        assert answer.status == 200, answer
        page = answer.json()
        assert set(page) == {"data", "has_more", "next_cursor"}
        assert page["has_more"] is (page["next_cursor"] is not None)
        assert len(page["data"]) <= limit
        found.append(page["data"])
        if not page["has_more"]:
            return found
        assert isinstance(page["next_cursor"], str)
        cursor = f"&cursor={page['next_cursor']}"


# The balance.


def test_what_is_held_is_not_available(box: Box, upstream: Upstream) -> None:
    payer = box.payer(10)
    call = Background(lambda: box.get("/api/v1/up/gated/balance", payer.key))
    upstream.wait_for(1, "balance")
    account = box.get("/api/v1/account", payer.key).json()
    assert (account["credits"], account["held"], account["usd_value"]) == (7, 3, "0.07")
    short = box.get("/v1/account", payer.key).json()
    assert (short["credits_remaining"], short["usdc_value"]) == (7, 0.07)
    (record,) = box.get("/api/v1/usage", payer.key).json()["data"]
    assert (record["status"], record["held"], record["captured"]) == ("held", 3, 0)
    assert (record["upstream_status"], record["duration_ms"]) == (None, None)
    upstream.gate("balance").open()
    assert call.result().status == 200
    account = box.get("/api/v1/account", payer.key).json()
    assert (account["credits"], account["held"]) == (7, 0)


@pytest.mark.parametrize(
    ("usd_per_credit", "credits", "worth"),
    [
        ("0.01", 0, "0.00"),
        ("0.01", 1, "0.01"),
        ("0.01", 100, "1.00"),
        ("0.01", 9384, "93.84"),
        ("0.01", 10**15, "10000000000000.00"),
        ("1", 1420, "1420.00"),
        ("2.5", 3, "7.50"),
        ("0.001", 9384, "9.384"),
        ("0.001", 1000, "1.00"),
        ("0.0079", 3, "0.0237"),
        ("0.000001", 1, "0.000001"),
        ("0.000001", 10**15, "1000000000.00"),
        ("0.000000000001", 7, "0.000000000007"),
        ("0.10", 3, "0.30"),
        ("0.0100", 3, "0.03"),
        ("123456789.123456789012", 999_999_999_999_999, "123456789123456665555210.876543210988"),
    ],
)
def test_the_worth_of_an_account_is_exact(
    tmp_path: Path, usd_per_credit: str, credits: int, worth: str
) -> None:
    with Box(tmp_path / "i", f'[instance]\nusd_per_credit = "{usd_per_credit}"\n') as box:
        payer = box.payer(credits)
        answer = box.get("/api/v1/account", payer.key)
        assert answer.status == 200, answer
        shown = answer.json()["usd_value"]
        assert Decimal(shown) == Decimal(worth)
        assert re.fullmatch(r"[0-9]+\.[0-9]{2,}", shown)
        if usd_per_credit not in ("0.001", "0.000001", "0.0100"):
            assert shown == worth  # those may show zeros at the end
        short = box.get("/v1/account", payer.key).json()["usdc_value"]
        assert short == float(worth)


def test_the_short_answer_says_when_credits_were_last_bought(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, "2026-06-15T09:43:00.789Z")
    payer = box.payer()
    box.run(
        "UPDATE account SET last_topup_at = :at WHERE id = :id",
        id=payer.account,
        at=1_781_516_580_000,
    )
    answer = box.get("/v1/account", payer.key).json()
    assert answer["last_topup_at"] == "2026-06-15T09:43:00Z"
    assert answer["api_key_created_at"] == "2026-06-15T09:43:00Z"


def test_the_operator_key_reads_an_account_of_nobody(box: Box) -> None:
    answer = box.get("/api/v1/account", OPERATOR_KEY)
    assert (answer.status, answer.json()["credits"], answer.json()["held"]) == (200, 0, 0)
    assert box.get("/v1/account", OPERATOR_KEY).json()["api_key_created_at"] is None


# Calls.


def test_calls_are_listed_newest_first_with_all_the_contract_names(box: Box) -> None:
    payer = box.payer()
    answers = [box.get(f"/api/v1/echo?n={n}", payer.key) for n in range(4)]
    answers.append(box.get("/api/v1/up/status/500", payer.key))
    (listed,) = pages(box, "/api/v1/usage", payer.key, 100)
    assert [call["request_id"] for call in listed] == [a.request_id for a in reversed(answers)]
    for call in listed:
        assert set(call) == CALL
        assert TIME.fullmatch(call["created_at"])
        assert call["payer"] == "api_key"
        assert call["key_id"] == payer.key_id
        assert box.get(f"/api/v1/usage/{call['request_id']}", payer.key).json() == call
    assert [call["status"] for call in listed] == ["voided", *["captured"] * 4]


def test_refused_calls_are_not_among_them(box: Box) -> None:
    payer = box.payer(0)
    assert box.get("/api/v1/echo", payer.key).status == 402
    assert box.get("/api/v1/nothing", payer.key).status == 404
    assert pages(box, "/api/v1/usage", payer.key, 100) == [[]]


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7, 8, 100])
def test_pages_follow_each_other_without_gap_or_repeat(box: Box, limit: int) -> None:
    payer = box.payer()
    asked = [box.get("/api/v1/echo", payer.key).request_id for _ in range(7)]
    found = pages(box, "/api/v1/usage", payer.key, limit)
    assert [call["request_id"] for page in found for call in page] == asked[::-1]
    assert len(found) == -(-7 // limit)
    entries = pages(box, "/api/v1/ledger", payer.key, limit)
    assert [entry["reference"] for page in entries for entry in page] == asked[::-1]


def test_what_comes_meanwhile_does_not_move_a_page(box: Box) -> None:
    payer = box.payer()
    asked = [box.get("/api/v1/echo", payer.key).request_id for _ in range(4)]
    first = box.get("/api/v1/usage?limit=2", payer.key).json()
    assert box.get("/api/v1/echo", payer.key).status == 200
    second = box.get(f"/api/v1/usage?limit=2&cursor={first['next_cursor']}", payer.key).json()
    seen = [call["request_id"] for call in first["data"] + second["data"]]
    assert seen == asked[::-1]


def test_the_clock_does_not_decide_the_order(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    payer = box.payer()
    time = Clock(monkeypatch, "2027-03-17T12:00:00Z")
    asked = []
    for _ in range(4):
        asked.append(box.get("/api/v1/echo", payer.key).request_id)
        time.forward(days=-1)
    listed = [c["request_id"] for p in pages(box, "/api/v1/usage", payer.key, 2) for c in p]
    assert listed == asked[::-1]


def test_a_page_without_a_limit_is_bounded(box: Box) -> None:
    payer = box.payer(200)
    for _ in range(105):
        box.get("/api/v1/echo", payer.key)
    page = box.get("/api/v1/usage", payer.key).json()
    assert 1 <= len(page["data"]) <= 100
    assert page["has_more"] is True
    assert len(box.get("/api/v1/usage?limit=100", payer.key).json()["data"]) == 100


@pytest.mark.parametrize("path", ["/api/v1/usage", "/api/v1/ledger"])
@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=-1", "limit"),
        ("limit=", "limit"),
        ("limit=ten", "limit"),
        ("limit=1.0", "limit"),
        ("limit=1e1", "limit"),
        ("limit=1_0", "limit"),
        ("limit=%2B1", "limit"),
        ("limit=%201", "limit"),
        ("limit=1%0A", "limit"),
        ("limit=%D9%A1", "limit"),
        ("limit=99999999999999999999", "limit"),
        ("cursor=", "cursor"),
        ("cursor=abc", "cursor"),
        ("cursor=0", "cursor"),
        ("cursor=-5", "cursor"),
        ("cursor=1%27%20OR%201=1", "cursor"),
        ("cursor=99999999999999999999", "cursor"),
        ("limit=5&cursor=x", "cursor"),
    ],
)
def test_a_bad_limit_or_cursor_is_400_and_named(
    box: Box, path: str, query: str, param: str
) -> None:
    answer = box.get(f"{path}?{query}", box.payer().key)
    assert told(answer) == (400, "validation_error")
    assert answer.json()["param"] == param


def test_a_cursor_past_the_end_is_an_empty_page(box: Box) -> None:
    payer = box.payer()
    box.get("/api/v1/echo", payer.key)
    for path in ("/api/v1/usage", "/api/v1/ledger"):
        answer = box.get(f"{path}?cursor=1", payer.key).json()
        assert answer == {"data": [], "has_more": False, "next_cursor": None}


# The ledger.


def test_every_movement_is_an_entry_and_they_add_up(box: Box) -> None:
    payer = box.payer(100)
    call = box.get("/api/v1/up/ok", payer.key)
    box.grant(payer.account, 5)
    box.grant(payer.account, -7)
    box.write(lambda tx: ledger.refund(tx, call.request_id, "sorry", 1_800_000_000_000))
    box.get("/api/v1/up/status/500", payer.key)
    # A key sees its own captures; the account's whole ledger belongs to its owner's session.
    rows = box.instance.db.rows(
        "SELECT kind, amount, balance FROM entry WHERE account_id = :id ORDER BY number",
        {"id": payer.account},
    )
    assert rows == [
        ("grant", 100, 100),
        ("capture", -3, 97),
        ("grant", 5, 102),
        ("adjustment", -7, 95),
        ("refund", 3, 98),
    ]
    (entries,) = pages(box, "/api/v1/ledger", payer.key, 100)
    for entry in entries:
        assert set(entry) == ENTRY
        assert TIME.fullmatch(entry["created_at"])
    capture = entries[-1]
    assert (capture["kind"], capture["amount"], capture["balance"]) == ("capture", -3, 97)
    assert (capture["reference"], capture["note"]) == (call.request_id, None)
    assert {entry["kind"] for entry in entries} <= {"capture", "refund"}
    assert box.standing(payer) == (98, 0)


def test_entries_can_be_neither_changed_nor_deleted(box: Box) -> None:
    payer = box.payer()
    for sql in ("UPDATE entry SET amount = 1", "DELETE FROM entry", "UPDATE entry SET note = 'x'"):
        with pytest.raises(Exception, match="a ledger entry is never"):
            box.run(f"{sql} WHERE account_id = :id", id=payer.account)


# Whose they are.


def test_a_key_sees_its_own_calls_and_captures_alone(box: Box) -> None:
    payer = box.payer()
    other, other_id = box.key(payer.account)
    mine = [box.get("/api/v1/echo", payer.key).request_id for _ in range(2)]
    theirs = [box.get("/api/v1/echo", other).request_id for _ in range(3)]

    def seen(path: str, field: str, key: str) -> list[str]:
        return [row[field] for page in pages(box, path, key, 2) for row in page]

    assert seen("/api/v1/usage", "request_id", payer.key) == mine[::-1]
    assert seen("/api/v1/usage", "request_id", other) == theirs[::-1]
    assert seen("/api/v1/ledger", "reference", payer.key) == mine[::-1]
    assert seen("/api/v1/ledger", "reference", other) == theirs[::-1]
    assert told(box.get(f"/api/v1/usage/{theirs[0]}", payer.key)) == (404, "not_found")
    assert box.get(f"/api/v1/usage/{theirs[0]}", other).json()["key_id"] == other_id
    # The balance is the account's, whichever key asks.
    assert box.get("/api/v1/account", other).json()["credits"] == 95


def test_a_strangers_call_is_404_like_one_that_never_was(box: Box) -> None:
    payer, stranger = box.payer(), box.payer()
    call = box.get("/api/v1/echo", payer.key).request_id
    same_id = {"X_Request_Id": "same"}
    theirs = box.get(f"/api/v1/usage/{call}", stranger.key, **same_id)
    nobodys = box.get("/api/v1/usage/req_000000000000000000000000", stranger.key, **same_id)
    assert told(theirs) == (404, "not_found")
    assert theirs.body == nobodys.body
    assert told(box.get(f"/api/v1/usage/{call}", OPERATOR_KEY)) == (404, "not_found")
    assert told(box.get(f"/api/v1/usage/{call}", STRANGERS_KEY)) == (401, "invalid_api_key")
    assert told(box.get(f"/api/v1/usage/{call}")) == (401, "missing_api_key")


def test_a_key_keeps_its_calls_through_rotation(box: Box) -> None:
    payer = box.payer()
    call = box.get("/api/v1/echo", payer.key).request_id
    rotated = box.rotate(payer.key_id)
    assert box.get(f"/api/v1/usage/{call}", rotated).status == 200


# Request ids.


@pytest.mark.parametrize(
    "name",
    ["a", "7f3c2d9e-1b4a-4c8e-9d2f-0a1b2c3d4e5f", "req_mine", "A.b_c-d", "0", "x" * 128],
)
def test_a_sane_request_id_is_kept_everywhere(box: Box, upstream: Upstream, name: str) -> None:
    payer = box.payer()
    answer = box.get("/api/v1/up/ok", payer.key, X_Request_Id=name)
    assert answer.headers["X-Request-Id"] == name
    assert upstream.hits()[-1].header("X-Request-Id") == name
    record = box.get(f"/api/v1/usage/{name}", payer.key).json()
    assert record["request_id"] == name
    refused = box.get("/api/v1/up/ok", None, X_Request_Id=name)
    assert (refused.headers["X-Request-Id"], refused.json()["request_id"]) == (name, name)
    assert box.get("/healthz", X_Request_Id=name).headers["X-Request-Id"] == name


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "x" * 129, "é", "a\x7f", "<script>", "a/b", "a?b", "a%20b", "../x", "-a", ".a",
     "a,b", "a;b", 'a"b', "a\tb"],
)  # fmt: skip
def test_any_other_request_id_is_replaced_by_one_of_ours(box: Box, name: str) -> None:
    payer = box.payer()
    answer = box.get("/api/v1/echo", payer.key, X_Request_Id=name)
    assert re.fullmatch(r"req_[0-9a-f]{24}", answer.request_id)
    assert box.record(payer.key, answer)["request_id"] == answer.request_id


def test_a_request_id_used_twice_finds_the_newest_call(box: Box) -> None:
    payer, stranger = box.payer(), box.payer()
    for path in ("/api/v1/echo", "/api/v1/up/ok"):
        assert box.get(path, payer.key, X_Request_Id="twice").status == 200
    assert box.get("/api/v1/usage/twice", payer.key).json()["route"] == "/api/v1/up/*"
    assert told(box.get("/api/v1/usage/twice", stranger.key)) == (404, "not_found")
    assert box.get("/api/v1/echo", stranger.key, X_Request_Id="twice").status == 200
    assert box.get("/api/v1/usage/twice", stranger.key).json()["route"] == "/api/v1/echo"
    assert box.standing(payer) == (96, 0)


def test_a_request_id_that_is_anothers_call_id_hides_nothing(box: Box) -> None:
    payer, stranger = box.payer(), box.payer()
    call = box.get("/api/v1/up/ok", payer.key).request_id
    assert box.get("/api/v1/echo", stranger.key, X_Request_Id=call).request_id == call
    assert box.get(f"/api/v1/usage/{call}", payer.key).json()["route"] == "/api/v1/up/*"
    assert box.get(f"/api/v1/usage/{call}", stranger.key).json()["route"] == "/api/v1/echo"
