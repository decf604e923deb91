"""What can be paid, told to whoever asks: exactly, on every network, in one answer for people and
machines, and only when nothing else is in the way."""

from __future__ import annotations

import ast
import html
import json
import re
import shlex
import sqlite3
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
from doubles import Upstream
from inprocess import STRANGERS_KEY, Box
from rpc_server import need
from server import OPERATOR_KEY, Answer
from settler import BASE, BASE_SEPOLIA, SOLANA, Json, Settler, section

need("eth_account", "solders", "x402")

from payers import EvmWallet, decode, offer  # noqa: E402
from solana_node import USDC  # noqa: E402
from solders.keypair import Keypair  # noqa: E402
from x402.http import decode_payment_required_header  # noqa: E402

from config import ConfigError  # noqa: E402
from core import clock  # noqa: E402

BASE_URL = "http://127.0.0.1:8402"
TOP_UP = "/api/v1/credits/top-up"
ORIGIN = "https://app.example"
HTML = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
PAYEE = EvmWallet().address
PAY_TO = {BASE: PAYEE, BASE_SEPOLIA: PAYEE, SOLANA: str(Keypair().pubkey())}
TEXT = {"to": "+18148835337", "message": "hi"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
UNITS = 10_000  # a credit of a cent, in millionths of a dollar
SANDBOX = '[upstreams.sandbox]\nkind = "sandbox"\n'
MODEL = """
[[models]]
id = "m"
credits_per_request = 8
included_output_tokens = 500
credits_per_1k_tokens = 4
max_output_tokens = 4096
[[models]]
id = "small"
credits_per_request = 2
max_output_tokens = 100
"""


def route(path: str, **changes: str) -> str:
    """A route for texts; others are TOML values."""
    lines = {
        "path": f'"{path}"', "methods": '["POST"]', "upstream": '"sandbox"', "adapter": '"sms"',
        "per": '"sms_segment"', "credits": "1",
    } | changes  # fmt: skip
    written = "".join(f"{key} = {value}\n" for key, value in lines.items() if value)
    return f"[[routes]]\n{written}\n"


def chat(path: str, **changes: str) -> str:
    return route(path, adapter='"chat"', per="", credits="", **changes)


def priced(folder: Path, settler: Settler, usd_per_credit: str, routes: str, **x402: str) -> Box:
    """A Box with routes, and credits worth that much."""
    config = f'[instance]\nusd_per_credit = "{usd_per_credit}"\n{SANDBOX}{routes}'
    return Box(folder / "instance", config + section(settler, PAY_TO, **x402))


@pytest.fixture(scope="module")
def settler() -> Iterator[Settler]:
    with Settler() as server:
        yield server


@pytest.fixture(scope="module")
def box(
    settler: Settler, upstream_server: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Box]:
    forward = {"adapter": '"forward"', "per": '"call"', "upstream": '"api"'}
    per_unit = forward | {
        "per": '"unit"', "credits": "3", "methods": '["GET", "HEAD", "POST"]',
        "upstream_path": '"/units/*"',
        "units": '{ from = "json", pointer = "/usage/pages", max = 20 }',
    }  # fmt: skip
    config = [
        f'[instance]\ncors_origins = ["{ORIGIN}"]',
        SANDBOX,
        f'[upstreams.api]\nkind = "http"\nbase_url = "{upstream_server.url}"',
        route("/api/v1/sms/send", scope='"sms:send"', body_bytes="2000"),
        route("/api/v1/objects", dialect='"object"'),
        route("/v1/sms", x402="true"),
        route("/v1/flat", x402="true", dialect='"flat"'),
        route("/v1/by-default"),
        route("/api/v1/never", x402="false"),
        route("/elsewhere"),
        route("/api/v1/free", **forward | {"credits": "0", "upstream_path": '"/ok/free"'}),
        route("/api/v1/units/*", **per_unit),
        chat("/v1/chat/completions", x402="true"),
        chat("/v1/chat/credits-only", upstream_path='"/v1/chat/completions"'),
        MODEL,
        "[limits]\nrequests_per_minute = 1000000",
        section(settler, PAY_TO),
    ]
    with Box(tmp_path_factory.mktemp("quotes") / "instance", "\n".join(config)) as made:
        yield made


def quote(answer: Answer) -> Json:
    """What is told to a machine in the header, which is what everybody is told in the body."""
    assert answer.status == 402, (answer.status, answer.body)
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["x-should-retry"] == "false"
    told: Json = decode(answer.headers["PAYMENT-REQUIRED"])
    assert decode_payment_required_header(answer.headers["PAYMENT-REQUIRED"]).x402_version == 2
    assert told.keys() == {"x402Version", "error", "resource", "accepts"}
    if answer.headers["Content-Type"] == "application/json":
        body = answer.json()
        assert told["error"] == answer.code
        assert {name: body[name] for name in ("x402Version", "resource", "accepts")} == {
            name: told[name] for name in ("x402Version", "resource", "accepts")
        }
    return told


def amounts(told: Json) -> set[str]:
    return {way["amount"] for way in told["accepts"]}


# How much.


@pytest.mark.parametrize(
    ("usd_per_credit", "of_one", "of_seven", "of_top_up"),
    [
        ("0.01", "10000", "70000", "1000000"),
        ("0.000001", "1", "7", "100"),
        ("0.0125", "12500", "87500", "1000000"),
        ("0.99", "990000", "6930000", "990000"),
        ("3", "3000000", "21000000", "3000000"),
        ("0.333333", "333333", "2333331", "999999"),
    ],
)
def test_the_price_is_exact_to_a_millionth_of_a_dollar(
    tmp_path: Path, settler: Settler, usd_per_credit: str, of_one: str, of_seven: str,
    of_top_up: str,
) -> None:  # fmt: skip
    routes = route("/api/v1/one") + route("/api/v1/seven", credits="7")
    with priced(tmp_path, settler, usd_per_credit, routes) as box:
        assert amounts(quote(box.post("/api/v1/one", value=TEXT))) == {of_one}
        assert amounts(quote(box.post("/api/v1/seven", value=TEXT))) == {of_seven}
        twice = {**TEXT, "message": "x" * 200}  # two segments
        assert amounts(quote(box.post("/api/v1/one", value=twice))) == {str(2 * int(of_one))}
        assert amounts(quote(box.post(TOP_UP, value={}))) == {of_top_up}


def test_every_network_is_offered_as_the_standard_has_it(box: Box, settler: Settler) -> None:
    answer = box.sms(None)
    assert answer.code == "payment_required"
    told = quote(answer)
    assert told["resource"] == {
        "url": f"{BASE_URL}/api/v1/sms/send",
        "description": "One call of /api/v1/sms/send",
        "mimeType": "application/json",
    }
    common = {"scheme": "exact", "amount": "10000", "maxTimeoutSeconds": 120}
    assert told["accepts"] == [
        common | {
            "network": BASE, "asset": "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913",
            "payTo": PAYEE, "extra": {"name": "USD Coin", "version": "2"},
        },
        common | {
            "network": BASE_SEPOLIA, "asset": "0x036CbD53842c5426634e7929541eC2318f3dCF7e",
            "payTo": PAYEE, "extra": {"name": "USDC", "version": "2"},
        },
        common | {
            "network": SOLANA, "asset": USDC, "payTo": PAY_TO[SOLANA],
            "extra": {"feePayer": settler.fee_payer},
        },
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/api/v1/sms/send", "flat"),
        ("/api/v1/objects", "object"),
        ("/v1/sms", "object"),
        ("/v1/flat", "flat"),
        ("/elsewhere", "flat"),
        (TOP_UP, "flat"),
    ],
)
def test_the_quote_speaks_the_dialect_of_its_path(box: Box, path: str, dialect: str) -> None:
    answer = box.post(path, value={} if path == TOP_UP else TEXT)
    told, body = quote(answer), answer.json()
    assert told["resource"]["url"] == BASE_URL + path
    if dialect == "flat":
        assert body["error"] == "payment_required"
        assert body["success"] is False
    else:
        assert body["error"]["code"] == "payment_required"
        assert body["error"]["type"] == "payment_error"
        assert body["error"]["docs"] == f"{BASE_URL}/docs/errors#payment_required"
        assert "success" not in body
    assert body["request_id"] == answer.request_id


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b"\xff", b'{"to": "+18148835337"}', b'{"to": 7, "message": "hi"}'],
)
def test_a_body_without_a_price_is_quoted_for_one_unit(box: Box, body: bytes) -> None:
    answer = box.request("POST", "/api/v1/sms/send", body=body)
    assert answer.code == "payment_required"
    assert amounts(quote(answer)) == {str(UNITS)}


def test_a_request_that_would_be_refused_is_quoted_to_a_stranger_all_the_same(box: Box) -> None:
    for answer in (
        box.post("/api/v1/sms/send?a=%C3%A9\x7f", value=TEXT),
        box.post("/api/v1/sms/send", value=TEXT, Idempotency_Key="é"),
    ):
        assert amounts(quote(answer)) == {str(UNITS)}


def test_a_route_per_unit_asks_for_its_most(box: Box, upstream: Upstream) -> None:
    for method in ("GET", "POST"):
        told = quote(box.request(method, "/api/v1/units/7?q=1"))
        assert amounts(told) == {str(3 * 20 * UNITS)}
        assert told["resource"]["url"] == f"{BASE_URL}/api/v1/units/7"
    assert upstream.hits() == []


def test_a_question_for_the_head_gets_no_more_than_the_head(box: Box, upstream: Upstream) -> None:
    answer = box.request("HEAD", "/api/v1/units/7")
    assert (answer.status, answer.body) == (402, b"")
    assert amounts(decode(answer.headers["PAYMENT-REQUIRED"])) == {str(3 * 20 * UNITS)}
    assert answer.headers["Cache-Control"] == "no-store"
    page = box.request("HEAD", "/api/v1/units/7", headers={"Accept": HTML})
    assert (page.status, page.body) == (402, b"")
    assert upstream.hits() == []


@pytest.mark.parametrize(
    ("changes", "credits"),
    [
        ({"max_tokens": 1}, 8),
        ({"max_tokens": 500}, 8),
        ({"max_tokens": 501}, 9),
        ({"max_tokens": 1000}, 10),
        ({"max_completion_tokens": 1500}, 12),
        ({}, 23),  # 4,096 tokens
        ({"max_tokens": 10**9}, 23),
        ({"max_tokens": 1000, "n": 3}, 18),
        ({"max_tokens": 1000, "stream": True}, 10),
        ({"model": "small"}, 2),
        # What cannot be priced is quoted for the cheapest.
        ({"model": "nobody"}, 2),
        ({"messages": 7}, 2),
    ],
)
def test_a_language_model_asks_for_what_it_would_set_aside(
    box: Box, changes: Json, credits: int
) -> None:
    told = quote(box.post("/v1/chat/completions", value=CHAT | changes))
    assert amounts(told) == {str(credits * UNITS)}


def test_under_v1_nothing_is_paid_on_the_spot_unless_the_config_says_so(box: Box) -> None:
    for path, body in (("/v1/by-default", TEXT), ("/v1/chat/credits-only", CHAT)):
        answer = box.post(path, value=body)
        assert (answer.status, answer.code) == (401, "missing_api_key")
        assert "PAYMENT-REQUIRED" not in answer.headers


@pytest.mark.parametrize("path", ["/api/v1/never", "/api/v1/free"])
def test_a_route_that_takes_no_payments_or_costs_nothing_quotes_nothing(
    box: Box, path: str
) -> None:
    answer = box.post(path, value=TEXT)
    assert (answer.status, answer.code) == (401, "missing_api_key")
    assert "PAYMENT-REQUIRED" not in answer.headers
    poor = box.post(path, box.payer(0).key, TEXT)
    assert "PAYMENT-REQUIRED" not in poor.headers
    assert poor.status == (402 if path.endswith("never") else 200)


def test_what_costs_more_than_can_be_signed_is_not_offered(
    tmp_path: Path, settler: Settler
) -> None:
    """2^63 units and more are no amount of any token's."""
    routes = route("/api/v1/dear", credits="10000") + route("/api/v1/dearer", credits="10000001")
    with priced(tmp_path, settler, "100000000", routes) as box:
        assert amounts(quote(box.post("/api/v1/dear", value=TEXT))) == {str(10**18)}
        refused = box.post("/api/v1/dearer", value=TEXT)
        assert refused.status in (402, 503), refused.body
        wallet = EvmWallet()
        there = decode(box.post("/api/v1/dear", value=TEXT).headers["PAYMENT-REQUIRED"])
        # Whoever signs for it anyway is refused, and nothing breaks.
        price = str(10_000_001 * 10**14)
        before = settler.shown
        header = wallet.header(
            there, signed={"value": price}, accepted={"amount": price}, resource=None
        )
        paid = box.post("/api/v1/dearer", value=TEXT, PAYMENT_SIGNATURE=header)
        assert (paid.status, paid.code) == (402, "payment_invalid"), paid.body
        assert settler.shown == before


# To whom.


def test_whoever_has_too_few_credits_is_told_what_can_be_paid_instead(box: Box) -> None:
    payer = box.payer(1)
    answer = box.sms(payer.key, text="x" * 200)
    assert answer.code == "insufficient_credits"
    told, body = quote(answer), answer.json()
    assert (body["credits"], body["required"]) == (1, 2)
    assert amounts(told) == {str(2 * UNITS)}  # the whole price: a payment is for one call
    assert "X-RateLimit-Limit" in answer.headers
    answer = box.post("/v1/chat/completions", payer.key, CHAT)
    assert amounts(quote(answer)) == {str(23 * UNITS)}
    assert answer.json()["error"]["code"] == "insufficient_credits"


def test_a_top_up_asks_for_what_the_body_names(box: Box) -> None:
    assert amounts(quote(box.post(TOP_UP, value={}))) == {"1000000"}
    assert amounts(quote(box.request("POST", TOP_UP))) == {"1000000"}
    assert amounts(quote(box.post(TOP_UP, value={"credits": 10}))) == {"100000"}
    assert amounts(quote(box.post(TOP_UP, value={"credits": 100_000}))) == {"1000000000"}
    told = quote(box.post(TOP_UP, box.payer(0).key, {"credits": 250}))
    assert amounts(told) == {"2500000"}
    assert told["resource"]["url"] == BASE_URL + TOP_UP


@pytest.mark.parametrize(
    "body",
    [
        b'{"credits": 9}', b'{"credits": 100001}', b'{"credits": -10}', b'{"credits": 10.5}',
        b'{"credits": "10"}', b'{"credits": true}', b'{"credits": 1e2}', b'{"credit": 10}',
        b'{"credits": 100000000000000000000000}', b"[]", b"{", b"\xff",
    ],
)  # fmt: skip
def test_a_top_up_is_within_its_bounds(box: Box, settler: Settler, body: bytes) -> None:
    stranger = box.request("POST", TOP_UP, body=body)
    assert amounts(quote(stranger)) == {"1000000"}
    header = EvmWallet().header(quote(stranger))
    before = settler.shown
    for headers in (
        {"PAYMENT-SIGNATURE": header},
        {"Authorization": f"Bearer {box.payer(0).key}"},
        {"PAYMENT-SIGNATURE": header, "Authorization": f"Bearer {box.payer(0).key}"},
    ):
        answer = box.request("POST", TOP_UP, body=body, headers=headers)
        assert (answer.status, answer.code) == (400, "validation_error"), answer.body
    assert settler.shown == before


def test_the_operator_key_buys_no_credits(box: Box) -> None:
    answer = box.post(TOP_UP, OPERATOR_KEY)
    assert (answer.status, answer.code) == (403, "forbidden")
    assert box.sms(OPERATOR_KEY).status == 200


# What wins.

Spoil = Callable[[Box], dict[str, Any]]
_SMS = {"method": "POST", "target": "/api/v1/sms/send", "value": TEXT}


def _suspended_key(box: Box) -> str:
    payer = box.payer(5)
    box.suspend(payer.key_id)
    return payer.key


def _suspended_account(box: Box) -> str:
    payer = box.payer(5)
    box.suspend_account(payer.account)
    return payer.key


def _revoked(box: Box) -> str:
    payer = box.payer(5)
    box.revoke(payer.key_id)
    return payer.key


def _too_fast(box: Box) -> str:
    payer = box.payer(5, rate_limit=1)
    assert box.sms(payer.key).status == 200
    return payer.key


def _key_used(box: Box) -> dict[str, Any]:
    payer = box.payer(5)
    assert box.sms(payer.key, text="before", Idempotency_Key="k").status == 200
    box.grant(payer.account, -4)
    return {"key": payer.key, "headers": {"Idempotency-Key": "k"}}


def _limit_reached(box: Box, credits: int = 5) -> str:
    payer = box.payer(credits, credit_limit=1, credit_period="total")
    box.grant(payer.account, 1)
    assert box.sms(payer.key).status == 200
    return payer.key


# What is wrong beside the payment · how it is told, with a payment and without.
WINS: dict[str, tuple[Spoil, int, str]] = {
    "no such path": (lambda box: {"target": "/api/v1/sms/sent"}, 404, "not_found"),
    "another spelling of the path": (lambda box: {"target": "/api/v1/sms/send/"}, 404, "not_found"),
    "a doubled slash": (lambda box: {"target": "/api/v1//sms/send"}, 404, "not_found"),
    "no such method": (lambda box: {"method": "GET"}, 405, "method_not_allowed"),
    "HEAD": (lambda box: {"method": "HEAD"}, 405, ""),
    "too large a body": (
        lambda box: {"value": {**TEXT, "message": "x" * 3000}}, 413, "body_too_large",
    ),
    "a compressed body": (
        lambda box: {"headers": {"Content-Encoding": "gzip"}}, 415, "unsupported_media_type",
    ),
    "a form": (
        lambda box: {"value": None, "body": b"to=1", "headers": {"Content-Type": "text/plain"}},
        415, "unsupported_media_type",
    ),
    "a malformed credential": (
        lambda box: {"headers": {"Authorization": "Bearer a, Bearer b"}}, 400, "validation_error",
    ),
    "no key at all": (
        lambda box: {"headers": {"Authorization": "Bearer "}}, 401, "invalid_api_key",
    ),
    "a key of nobody's": (lambda box: {"key": STRANGERS_KEY}, 401, "invalid_api_key"),
    "a word": (lambda box: {"key": "hello"}, 401, "invalid_api_key"),
    "a token of nobody's": (lambda box: {"key": "eyJhbGciOiJub25lIn0.e30."}, 401, "invalid_token"),
    "a revoked key": (lambda box: {"key": _revoked(box)}, 401, "invalid_api_key"),
    "a suspended key": (lambda box: {"key": _suspended_key(box)}, 403, "key_suspended"),
    "a suspended account": (
        lambda box: {"key": _suspended_account(box)}, 403, "account_suspended",
    ),
    "a key of another scope": (
        lambda box: {"key": box.payer(0, scopes=["lookup"]).key}, 403, "missing_scope",
    ),
    "too many requests": (lambda box: {"key": _too_fast(box)}, 429, "rate_limited"),
    "a wrong body": (
        lambda box: {"key": box.payer(0).key, "value": {"to": 7}}, 400, "validation_error",
    ),
    "a wrong Idempotency-Key": (
        lambda box: {"key": box.payer(0).key, "headers": {"Idempotency-Key": "a b"}},
        400, "validation_error",
    ),
    "an Idempotency-Key of another request": (_key_used, 422, "idempotency_key_reused"),
    "a limit reached, with credits": (
        lambda box: {"key": _limit_reached(box)}, 403, "credit_limit_reached",
    ),
    "a limit reached, without credits": (
        lambda box: {"key": _limit_reached(box, 0)}, 403, "credit_limit_reached",
    ),
}  # fmt: skip


def send(box: Box, request: dict[str, Any], **headers: str) -> Answer:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    whole = _SMS | request
    whole["headers"] = {**request.get("headers", {}), **sent}
    method, target = whole.pop("method"), whole.pop("target")
    if method in ("GET", "HEAD"):
        whole.pop("value")
    return box.request(method, target, **whole)


@pytest.mark.parametrize("name", WINS)
def test_nobody_pays_for_a_request_that_would_be_refused_anyway(
    box: Box, settler: Settler, name: str
) -> None:
    spoil, status, code = WINS[name]
    header = EvmWallet().header(quote(box.sms(None)))
    request = spoil(box)
    before = (settler.shown, box.row("SELECT COUNT(*) FROM payment"))
    for headers in ({"PAYMENT-SIGNATURE": header}, {"PAYMENT-SIGNATURE": "nonsense"}, {}):
        answer = send(box, request, **headers)
        assert answer.status == status, (headers, answer.body)
        assert answer.code == code or not answer.body
        assert "PAYMENT-REQUIRED" not in answer.headers
    assert (settler.shown, box.row("SELECT COUNT(*) FROM payment")) == before
    # And it can be used for something else still.
    assert box.sms(None, PAYMENT_SIGNATURE=header).status == 200


def test_a_wallet_whose_account_is_suspended_cannot_pay(box: Box, settler: Settler) -> None:
    wallet = EvmWallet()
    assert box.sms(None, PAYMENT_SIGNATURE=wallet.header(quote(box.sms(None)))).status == 200
    (account,) = box.row(
        "SELECT account_id FROM wallet WHERE id = :id", id=f"eip155:{wallet.address.lower()}"
    )
    box.suspend_account(account, "not paid for")
    before = settler.shown
    for body in (TEXT, {"to": 7}):
        header = wallet.header(quote(box.sms(None)))
        answer = box.post("/api/v1/sms/send", value=body, PAYMENT_SIGNATURE=header)
        assert (answer.status, answer.code) == (403, "account_suspended")
        assert answer.json()["reason"] == "not paid for"
    assert box.post(TOP_UP, PAYMENT_SIGNATURE=wallet.header(quote(box.post(TOP_UP)))).status == 403
    assert settler.shown == before


def test_what_is_wrong_with_the_request_is_told_before_what_is_wrong_with_the_payment(
    box: Box, settler: Settler
) -> None:
    wallet, before = EvmWallet(), settler.shown
    told = quote(box.sms(None))
    wrong = wallet.header(told, signed={"value": "1"})
    forged = wallet.header(told, forged={"value": "1"})
    for header in (wallet.header(told), wrong, forged):
        answer = box.post("/api/v1/sms/send", value={"to": 7}, PAYMENT_SIGNATURE=header)
        assert (answer.status, answer.code) == (400, "validation_error"), answer.body
        assert answer.json()["param"] != "payment-signature"
    for header in (wrong, forged):
        answer = box.sms(None, PAYMENT_SIGNATURE=header)
        assert (answer.status, answer.code) == (402, "payment_invalid")
        assert amounts(quote(answer)) == {str(UNITS)}
    malformed = box.post("/api/v1/sms/send", value={"to": 7}, PAYMENT_SIGNATURE="nonsense")
    assert malformed.json()["param"] == "payment-signature"
    assert settler.shown == before


def test_a_bearer_with_credits_leaves_a_payment_alone(box: Box, settler: Settler) -> None:
    payer, before = box.payer(3), settler.shown
    told = quote(box.sms(None))
    good = EvmWallet().header(told)
    for header in (good, EvmWallet().header(told, signed={"value": "1"}), "nonsense"):
        answer = box.sms(payer.key, PAYMENT_SIGNATURE=header)
        assert answer.status == 200
        assert answer.headers["X-Credits-Charged"] == "1"
        assert "PAYMENT-RESPONSE" not in answer.headers
    assert box.standing(payer) == (0, 0)
    assert settler.shown == before
    # Without credits it is what is wrong with the payment that counts.
    answer = box.sms(payer.key, PAYMENT_SIGNATURE="nonsense")
    assert (answer.status, answer.code) == (400, "validation_error")
    answer = box.sms(payer.key, PAYMENT_SIGNATURE=EvmWallet().header(told, signed={"value": "1"}))
    assert (answer.status, answer.code) == (402, "payment_invalid")
    assert settler.shown == before
    settles = settler.settles
    assert box.sms(payer.key, PAYMENT_SIGNATURE=good).status == 200
    assert settler.settles == settles + 1


# How it looks.


@pytest.mark.parametrize(
    ("method", "path", "key"),
    [
        ("POST", "/api/v1/sms/send", False),
        ("GET", "/api/v1/units/7", False),
        ("POST", "/v1/sms", False),
        ("POST", TOP_UP, False),
        ("POST", "/api/v1/sms/send", True),
        ("POST", TOP_UP, True),
    ],
)
def test_somebody_at_a_browser_gets_a_page_that_says_what_to_pay(
    box: Box, method: str, path: str, key: bool
) -> None:
    bearer = box.payer(0).key if key else None
    value = {} if path == TOP_UP else TEXT
    answer = box.request(method, path, value=value, key=bearer, headers={"Accept": HTML})
    told = quote(answer)
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    page = answer.body.decode()
    dollars = int(told["accepts"][0]["amount"]) / 10**6
    assert re.search(rf"\b{dollars:g}0*\b", page)
    assert all(way["payTo"] in page for way in told["accepts"])
    assert told["resource"]["url"] in page


@pytest.mark.parametrize(
    "path",
    ["/api/v1/units/$(id);`id`'id'|id&id", '/api/v1/units/"+id()+"', "/api/v1/units/<b>\\"],
)
def test_a_page_to_paste_from_holds_a_strange_path_as_text(box: Box, path: str) -> None:
    """A link can be made by anybody, and what it shows is at our address."""
    page = box.request("GET", path, headers={"Accept": HTML}).body.decode()
    assert "<b>" not in page
    blocks = [
        html.unescape(found) for found in re.findall(r"<pre.*?<code.*?>(.*?)</code>", page, re.S)
    ]
    (curl,) = [block for block in blocks if block.startswith("curl ")]
    (program,) = [block for block in blocks if block.startswith("import ")]
    assert BASE_URL + path in shlex.split(curl)
    texts = [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)]
    assert BASE_URL + path in texts


@pytest.mark.parametrize(
    "accept", [None, "*/*", "application/json", "application/json, text/html;q=0.9", "text/plain"]
)
def test_everybody_else_gets_json(box: Box, accept: str | None) -> None:
    headers = {} if accept is None else {"Accept": accept}
    for path, value in (("/api/v1/sms/send", TEXT), (TOP_UP, {})):
        answer = box.request("POST", path, value=value, headers=headers)
        assert answer.headers["Content-Type"] == "application/json"
        quote(answer)


def test_a_browser_gets_json_for_everything_that_cannot_be_paid(box: Box) -> None:
    for answer in (
        box.post("/api/v1/sms/send", "hello", TEXT, Accept=HTML),
        box.post(TOP_UP, "hello", Accept=HTML),
        box.post("/api/v1/sms/send", value=TEXT, PAYMENT_SIGNATURE="nonsense", Accept=HTML),
    ):
        assert answer.status in (400, 401)
        assert answer.headers["Content-Type"] == "application/json"


def test_a_page_of_a_listed_origin_may_read_the_quote_and_send_the_payment(
    box: Box, settler: Settler
) -> None:
    for path, value in (("/api/v1/sms/send", TEXT), (TOP_UP, {})):
        for accept in ("*/*", HTML):
            answer = box.post(path, value=value, Origin=ORIGIN, Accept=accept)
            quote(answer)
            assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
            exposed = answer.headers["Access-Control-Expose-Headers"]
            assert {"PAYMENT-REQUIRED", "PAYMENT-RESPONSE"} <= set(exposed.split(", "))
            assert "Access-Control-Allow-Credentials" not in answer.headers
        asks = box.request(
            "OPTIONS", path,
            headers={
                "Origin": ORIGIN, "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "payment-signature, content-type",
            },
        )  # fmt: skip
        assert asks.status == 204
        allowed = asks.headers["Access-Control-Allow-Headers"].lower().split(", ")
        assert "payment-signature" in allowed
        header = EvmWallet().header(quote(box.post(path, value=value)))
        paid = box.post(path, value=value, Origin=ORIGIN, PAYMENT_SIGNATURE=header)
        assert paid.status == 200
        assert paid.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "PAYMENT-RESPONSE" in paid.headers
        assert paid.headers["Cache-Control"] == "no-store"


def test_other_origins_may_not(box: Box) -> None:
    answer = box.post("/api/v1/sms/send", value=TEXT, Origin="https://evil.example")
    quote(answer)
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert answer.headers["Vary"] == "Origin"


def test_a_quote_writes_nothing(box: Box) -> None:
    """Anybody can ask, as often as they like."""
    box.sms(None)
    with sqlite3.connect(box.settings.database_path) as seen:

        def version() -> Any:
            return seen.execute("PRAGMA data_version").fetchone()

        before = version()
        for _ in range(3):
            for path, value in (("/api/v1/sms/send", TEXT), (TOP_UP, {}), ("/v1/sms", {})):
                quote(box.post(path, value=value))
                quote(box.post(path, value=value, Accept=HTML))
            quote(box.request("GET", "/api/v1/units/7"))
            quote(box.post("/v1/chat/completions", value=CHAT))
            forged = EvmWallet().header(quote(box.sms(None)), forged={"value": "1"})
            assert box.sms(None, PAYMENT_SIGNATURE=forged).code == "payment_invalid"
            assert box.sms(None, PAYMENT_SIGNATURE="nonsense").status == 400
            assert box.get("/.well-known/x402").status == 200
            assert box.get("/discovery/resources").status == 200
        assert version() == before
        box.payer(1)
        assert version() != before
    seen.close()


def test_a_stranger_cannot_have_large_bodies_priced_for_ever(
    tmp_path: Path, settler: Settler
) -> None:
    routes = chat("/v1/chat/completions", x402="true") + MODEL
    limits = "[limits]\nrequests_per_minute = 3\n"
    large = {**CHAT, "messages": [{"role": "user", "content": "x" * 70_000}]}
    with priced(tmp_path, settler, "0.01", routes + limits) as box:

        def ask(value: Json, client: str = "192.0.2.7") -> Answer:
            return box.request("POST", "/v1/chat/completions", value=value, client=client)

        assert [ask(large).status for _ in range(5)] == [402, 402, 402, 429, 429]
        assert ask(large).headers["Retry-After"]
        assert ask(large, "192.0.2.8").status == 402
        # What is small is told to everybody.
        assert [ask(CHAT).status for _ in range(8)] == [402] * 8


# Where.


@pytest.fixture(scope="module")
def bazaar(box: Box) -> Any:
    """The official client of such lists, over the Box. Its file alone: the package around it wants
    more installed than the rest of the client does."""
    import x402

    file = Path(x402.__file__).parent / "extensions" / "bazaar" / "facilitator_client.py"
    spec = spec_from_file_location("x402_bazaar_client", file)
    assert spec is not None and spec.loader is not None
    module: Any = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    client: Any = _OfBox(box)
    return SimpleNamespace(
        list_resources=module.with_bazaar(client).extensions.bazaar.list_resources,
        Params=module.ListDiscoveryResourcesParams,
    )


class _OfBox:
    """What the SDK's bazaar asks of its client, over a Box."""

    _auth_provider = None
    url = ""

    def __init__(self, box: Box) -> None:
        self._box = box

    def _get_client(self) -> _OfBox:
        return self

    def get(self, url: str, headers: dict[str, str], params: dict[str, str] | None) -> Any:
        query = f"?{urlencode(params)}" if params else ""
        answer = self._box.get(url + query, **headers)
        return SimpleNamespace(
            status_code=answer.status, text=answer.body.decode(), json=answer.json
        )


# By path and method, what a call asks for at least, in credits.
PAYABLE = {
    ("/api/v1/sms/send", "POST"): 1,
    ("/api/v1/objects", "POST"): 1,
    ("/v1/sms", "POST"): 1,
    ("/v1/flat", "POST"): 1,
    ("/elsewhere", "POST"): 1,
    ("/api/v1/units/*", "GET"): 60,
    ("/api/v1/units/*", "HEAD"): 60,
    ("/api/v1/units/*", "POST"): 60,
    ("/v1/chat/completions", "POST"): 2,
    (TOP_UP, "POST"): 100,
}


def test_the_official_bazaar_client_finds_everything_that_can_be_paid(bazaar: Any) -> None:
    found = bazaar.list_resources()
    assert found.x402_version == 2
    assert [item.resource for item in found.items] == [BASE_URL + path for path, _ in PAYABLE]
    for item, credits in zip(found.items, PAYABLE.values(), strict=True):
        assert (item.type, item.x402_version) == ("http", 2)
        assert item.accepts is not None
        assert {way["network"] for way in item.accepts} == {BASE, BASE_SEPOLIA, SOLANA}
        assert {way["amount"] for way in item.accepts} == {str(credits * UNITS)}
        assert item.last_updated is not None
        assert clock.parse_rfc3339(item.last_updated)


def test_what_is_found_is_what_is_asked(box: Box) -> None:
    """The first call of each costs what the list says, body and all."""
    for item in box.get("/discovery/resources").json()["items"]:
        told = item["metadata"]["input"]
        path = item["resource"].removeprefix(BASE_URL).replace("*", "7")
        answer = box.request(told["method"], path, value=told.get("body"))
        asked = decode(answer.headers["PAYMENT-REQUIRED"])
        if "chat" not in path:  # of which the cheapest is told
            assert asked["accepts"] == item["accepts"], item
        assert item["metadata"]["credits"] * UNITS == int(item["accepts"][0]["amount"])


def test_the_list_is_paged(box: Box, bazaar: Any) -> None:
    pages = [
        bazaar.list_resources(bazaar.Params(type="http", limit=4, offset=start))
        for start in (0, 4, 8, 12)
    ]
    assert [len(page.items) for page in pages] == [4, 4, 2, 0]
    assert [page.pagination.offset for page in pages] == [0, 4, 8, 12]
    assert {(page.pagination.limit, page.pagination.total) for page in pages} == {(4, 10)}
    seen = [item.resource for page in pages for item in page.items]
    assert seen == [BASE_URL + path for path, _ in PAYABLE]
    for wrong in ("limit=0", "limit=101", "limit=-1", "limit=1_0", "limit=x", "offset=-1"):
        assert box.get(f"/discovery/resources?{wrong}").code == "validation_error"


def test_the_well_known_file_lists_the_same(box: Box) -> None:
    answer = box.get("/.well-known/x402")
    assert answer.headers["Content-Type"] == "application/json"
    told = answer.json()
    assert told["x402Version"] == 2
    assert told["resources"] == list(dict.fromkeys(BASE_URL + path for path, _ in PAYABLE))
    assert told["accepts"] == quote(box.post(TOP_UP))["accepts"]
    assert told["topUp"] == BASE_URL + TOP_UP
    assert told["discovery"] == f"{BASE_URL}/discovery/resources"


def test_without_the_section_there_is_nothing_to_pay(tmp_path: Path) -> None:
    header = EvmWallet().header(
        {"accepts": [{
            "scheme": "exact", "network": BASE, "asset": USDC, "amount": "10000", "payTo": PAYEE,
            "maxTimeoutSeconds": 60, "extra": {},
        }]}
    )  # fmt: skip
    with Box(tmp_path / "instance", SANDBOX + route("/api/v1/sms/send")) as box:
        for answer in (
            box.get("/.well-known/x402"), box.get("/discovery/resources"), box.post(TOP_UP),
            box.post(TOP_UP, PAYMENT_SIGNATURE=header), box.post(TOP_UP, box.payer(0).key),
        ):  # fmt: skip
            assert (answer.status, answer.code) == (404, "not_found")
            assert "PAYMENT-REQUIRED" not in answer.headers
        for headers in ({}, {"PAYMENT_SIGNATURE": header}, {"PAYMENT_SIGNATURE": "nonsense"}):
            answer = box.sms(None, **headers)
            assert (answer.status, answer.code) == (401, "missing_api_key")
            assert "PAYMENT-REQUIRED" not in answer.headers
        poor = box.sms(box.payer(0).key, PAYMENT_SIGNATURE=header)
        assert (poor.status, poor.code) == (402, "insufficient_credits")
        assert "PAYMENT-REQUIRED" not in poor.headers


# Who pays Solana's fees.


class Minutes:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead = 0.0
        honest = clock.monotonic
        monkeypatch.setattr(clock, "monotonic", lambda: honest() + self._ahead)

    def pass_(self, seconds: float) -> None:
        self._ahead += seconds


@pytest.fixture
def silent() -> Iterator[Settler]:
    """One that does not say who pays the fees."""
    with Settler() as server:
        server.names_payer = False
        yield server


def test_solana_is_left_out_as_long_as_nobody_says_who_pays_the_fees(
    tmp_path: Path, silent: Settler, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = Minutes(monkeypatch)
    with priced(tmp_path, silent, "0.01", route("/api/v1/sms/send")) as box:

        def networks() -> set[str]:
            return {way["network"] for way in quote(box.sms(None))["accepts"]}

        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(lambda _: networks(), range(40)):
                assert found == {BASE, BASE_SEPOLIA}
        for path in ("/.well-known/x402", "/discovery/resources"):
            assert SOLANA not in json.dumps(box.get(path).json())
        assert silent.asked == 1
        minutes.pass_(9)
        assert networks() == {BASE, BASE_SEPOLIA}
        assert silent.asked == 1
        minutes.pass_(2)
        silent.names_payer = True
        assert networks() == {BASE, BASE_SEPOLIA, SOLANA}
        assert silent.asked == 2
        # Once it was said it is known, and nobody waits for the facilitator any more.
        silent.names_payer = False
        minutes.pass_(3600)
        assert networks() == {BASE, BASE_SEPOLIA, SOLANA}
        assert silent.asked == 2


def test_a_payment_for_another_fee_payer_does_not_have_the_facilitator_asked_each_time(
    tmp_path: Path, settler: Settler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from payers import SolanaWallet
    from test_payment_checks import NODE

    minutes = Minutes(monkeypatch)
    with priced(tmp_path, settler, "0.01", route("/api/v1/sms/send")) as box:
        told, before = quote(box.sms(None)), settler.asked
        wallet = SolanaWallet(NODE)
        for _ in range(5):
            header = wallet.header(told, fee_payer=str(Keypair().pubkey()))
            answer = box.sms(None, PAYMENT_SIGNATURE=header)
            assert answer.json()["reason"] == "wrong_fee_payer"
        assert settler.asked == before
        minutes.pass_(11)
        old, settler.fee_payer = settler.fee_payer, str(Keypair().pubkey())
        # A new one is learned of when it is first seen, and what was quoted before still counts.
        for payer in (settler.fee_payer, old):
            header = wallet.header(told, fee_payer=payer)
            assert box.sms(None, PAYMENT_SIGNATURE=header).status == 200
            assert settler.told[-1]["paymentRequirements"]["extra"] == {"feePayer": payer}
        assert settler.asked == before + 1
        assert offer(quote(box.sms(None)), SOLANA)["extra"] == {"feePayer": settler.fee_payer}


def test_when_nothing_can_be_paid_the_answer_says_to_come_back(
    tmp_path: Path, silent: Settler, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = Minutes(monkeypatch)
    only = section(silent, {SOLANA: PAY_TO[SOLANA]})
    with Box(tmp_path / "instance", SANDBOX + route("/api/v1/sms/send") + only) as box:
        for answer in (box.sms(None), box.post(TOP_UP), box.sms(None, Accept=HTML)):
            assert (answer.status, answer.code) == (503, "facilitator_unavailable")
            assert int(answer.headers["Retry-After"]) > 0
            assert answer.headers["Cache-Control"] == "no-store"
            assert "PAYMENT-REQUIRED" not in answer.headers
        # Whoever has an account and no credits is told of those, as ever.
        poor = box.sms(box.payer(0).key)
        assert (poor.status, poor.code) == (402, "insufficient_credits")
        assert box.sms(box.payer(1).key).status == 200
        assert silent.asked == 1
        silent.names_payer = True
        minutes.pass_(11)
        assert {way["network"] for way in quote(box.sms(None))["accepts"]} == {SOLANA}


def test_a_price_finer_than_a_millionth_of_a_dollar_cannot_be_quoted(
    tmp_path: Path, settler: Settler
) -> None:
    for finer in ("0.0000001", "0.0100000000000000000000000000000000001"):
        with pytest.raises(ConfigError, match="usd_per_credit"):
            priced(tmp_path, settler, finer, route("/api/v1/sms/send"))
