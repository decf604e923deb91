"""Calls and credits paid on real chains by the official client, to a Farebox under gunicorn.

What moves on a chain is the price, to the unit; what a payment buys is one request; and what was
paid and not used stays on the payer's account.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import StartFarebox
from doubles import Exchange, Gone, Upstream, behaviour, sse_event
from inprocess import Box
from llm_double import (
    CHAT,
    DONE,
    EMBEDDINGS,
    MODEL,
    RATES,
    Heard,
    LlmUpstream,
    Play,
    chat,
    counted,
    event,
    routes_toml,
    said,
    size_of,
    upstream_toml,
)
from market import (
    CLIENTS,
    TOP_UP,
    UNITS_PER_CREDIT,
    Books,
    Market,
    Wallet,
    by_httpx,
    by_requests,
    challenge_of,
    market,
    receipt_of,
    who,
    x402_toml,
)
from payers import EvmWallet, encode
from server import Answer, Farebox, until
from settler import BASE, Settler
from signers import EvmKey, Key, SolanaKey
from signers import signed as signed_request
from x402.http.utils import decode_payment_required_header, decode_payment_response_header

from core import clock, ledger
from core.audit import SYSTEM

SMS = "/api/v1/sms/send"
TEXT = {"to": "+18148835337", "message": "hi"}
PER_MINUTE = 200


@behaviour("mending")
def _mending(server: Upstream, exchange: Exchange) -> None:
    """/mending/<how>/…: the first request to a target fails so, every later one is served."""
    how = exchange.parts[0]
    if len(server.hits(exchange.hit.target)) > 1:
        exchange.json(200, {"served": True})
    elif how == "hang":
        exchange.keep = False
        if not exchange.wait_until(server.released):
            raise Gone
    elif how == "reset":
        exchange.reset()
    else:
        exchange.json(int(how), {"why": "the double is told to"}, [("Retry-After", "7")])


def config(upstream: Upstream, llm: LlmUpstream, place: Market) -> str:
    return f"""
[upstreams.sandbox]
kind = "sandbox"

[upstreams.double]
kind = "http"
base_url = "{upstream.url}"
timeout_seconds = 1
forward_headers = ["X-Trace"]

[[routes]]
path = "{SMS}"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
credits = 1
per = "sms_segment"

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "HEAD", "POST"]
upstream = "double"
upstream_path = "/*"
credits = 2

[[routes]]
path = "/api/v1/pages/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/units/*"
credits = 3
per = "unit"
units = {{ from = "json", pointer = "/usage/pages", max = 20 }}

[[routes]]
path = "/api/v1/private"
methods = ["POST"]
upstream = "double"
upstream_path = "/ok/private"
credits = 2
x402 = false

[limits]
requests_per_minute = {PER_MINUTE}

{upstream_toml("llm", llm.base_url)}
{routes_toml("llm", x402=True)}
{RATES.toml(MODEL, upstream_model="qwen3:8b")}
{place.toml()}
""".replace("x402 = True", "x402 = true")


@pytest.fixture(scope="module")
def the_market() -> Iterator[Market]:
    with market() as place:
        yield place


@pytest.fixture
def place(the_market: Market) -> Market:
    the_market.facilitator.forget()
    the_market.facilitator.mended = True
    return the_market


@pytest.fixture(scope="module")
def llm() -> Iterator[LlmUpstream]:
    with LlmUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def box(
    start_farebox: StartFarebox, upstream_server: Upstream, llm: LlmUpstream, the_market: Market
) -> Farebox:
    return start_farebox(config(upstream_server, llm, the_market))


@pytest.fixture(scope="module")
def the_books(box: Farebox) -> Iterator[Books]:
    found = Books(box)
    yield found
    found.db.close()


@pytest.fixture
def books(the_books: Books, box: Farebox) -> Iterator[Books]:
    """The instance's books, which add up after the test too."""
    yield the_books
    box.books()


@pytest.fixture(params=["evm", "solana"])
def payer(request: pytest.FixtureRequest, place: Market) -> Wallet:
    """Somebody with ten dollars on a chain."""
    return place.wallet(request.param)


class Till:
    """What moves on the chains from here on."""

    def __init__(self, place: Market, wallet: Wallet) -> None:
        self._place, self._wallet = place, wallet
        self._left, self._earned = place.left(wallet), place.earned()

    def took(self) -> int:
        """The credits' worth that left the wallet, all of which the instance got."""
        spent = self._left - self._place.left(self._wallet)
        assert self._place.earned() - self._earned == spent
        credits, odd = divmod(spent, UNITS_PER_CREDIT)
        assert odd == 0
        return credits


def signed(box: Farebox, wallet: Wallet, path: str, method: str = "POST", **more: Any) -> str:
    """A PAYMENT-SIGNATURE for what this request asks for, honestly made."""
    asked = box.request(method, path, **more)
    assert asked.status == 402
    return wallet.header(challenge_of(asked))


def paid(
    box: Farebox, path: str, header: str, method: str = "POST", key: str | None = None, **more: Any
) -> Answer:
    headers = {"PAYMENT-SIGNATURE": header} | more.pop("headers", {})
    return box.request(method, path, key=key, headers=headers, **more)


def check_receipt(answer: Answer, wallet: Wallet) -> None:
    """The answer says in the official client's words who has paid, where and by what."""
    told = decode_payment_response_header(answer.headers["PAYMENT-RESPONSE"])
    assert (told.success, told.network, told.payer) == (True, wallet.network, wallet.address)
    assert told.transaction
    assert "no-store" in answer.headers["Cache-Control"]


# The price, to the unit


@pytest.mark.parametrize("client", sorted(CLIENTS))
def test_the_official_client_pays_for_a_call(
    box: Farebox, books: Books, place: Market, payer: Wallet, client: str
) -> None:
    till = Till(place, payer)
    long = {"to": "+18148835337", "message": "x" * 161}  # two segments
    answer = CLIENTS[client](box, payer, "POST", SMS, json=long)
    assert (answer.status, answer.json()["segments"]) == (200, 2)
    assert till.took() == 2
    assert answer.headers["X-Credits-Charged"] == "2"
    check_receipt(answer, payer)
    account = books.of(payer)
    assert account is not None
    assert (account.available, account.held) == (0, 0)
    assert books.entries(account.account) == [("topup", 2), ("capture", -2)]
    ((payer_of_call,),) = books.rows(
        "SELECT payer FROM call WHERE account_id = :a", a=account.account
    )
    assert payer_of_call == "x402"
    assert place.facilitator.calls["settle"] == 1
    (payment,) = books.payments(payer)
    told = receipt_of(answer)
    assert payment[1] == "settled"
    assert books.rows(
        "SELECT transaction_id, amount FROM payment WHERE id = :id", id=payment[0]
    ) == [(told["transaction"], 2 * UNITS_PER_CREDIT)]


def test_what_the_operator_sees_of_a_wallet(box: Farebox, books: Books, place: Market) -> None:
    wallet = place.wallet("evm")
    assert by_requests(box, wallet, "POST", TOP_UP, json={"credits": 10}).status == 200
    spelled = who(wallet).lower()  # case means nothing there
    assert box.set_up("credits", "balance", spelled) == "10"
    listed = box.set_up("payments", "list", who(wallet)).split()
    ((payment, _),) = books.payments(wallet)
    assert listed[0] == payment
    assert listed[2:6] == ["settled", "10", who(wallet), wallet.network]
    shown = box.set_up("payments", "show", payment)
    assert TOP_UP in shown
    assert listed[6] in shown
    assert box.ledger_ok().startswith("ok: ")


def test_a_call_by_units_asks_for_its_maximum_and_the_rest_stays(
    box: Farebox, books: Books, place: Market, payer: Wallet
) -> None:
    till = Till(place, payer)
    answer = by_requests(box, payer, "GET", "/api/v1/pages/7")
    assert (answer.status, answer.json()) == (200, {"usage": {"pages": 7}})
    assert till.took() == 60
    assert answer.headers["X-Credits-Charged"] == "21"
    assert books.credits(payer) == 39
    # A payment opens no credits but its own: the next call is paid again, and in full.
    again = by_requests(box, payer, "GET", "/api/v1/pages/1")
    assert (again.status, till.took()) == (200, 120)
    assert books.credits(payer) == 39 + 57


@pytest.mark.parametrize("payer", ["evm"], indirect=True)
def test_a_get_with_a_query_is_paid(
    box: Farebox, books: Books, place: Market, payer: Wallet, upstream: Upstream
) -> None:
    till = Till(place, payer)
    answer = by_httpx(box, payer, "GET", "/api/v1/up/ok/look?for=a%20b&page=2")
    assert answer.status == 200
    assert till.took() == 2
    check_receipt(answer, payer)
    assert [hit.target for hit in upstream.hits("/ok/look")] == ["/ok/look?for=a%20b&page=2"]
    assert books.credits(payer) == 0


def hold_of(body: dict[str, Any]) -> int:
    """What such a chat asks for."""
    return RATES.price(body["max_tokens"], -(-size_of(body["messages"]) // 3))


def test_a_chat_asks_for_its_hold_and_what_is_not_captured_stays(
    box: Farebox, books: Books, place: Market, payer: Wallet
) -> None:
    till = Till(place, payer)
    body = chat(max_tokens=100)
    answer = by_requests(box, payer, "POST", CHAT, json=body)
    assert (answer.status, answer.json()["model"]) == (200, MODEL)
    hold, price = till.took(), RATES.price(3, 7)
    assert 40 < hold == hold_of(body)
    assert answer.headers["X-Credits-Charged"] == str(price)
    assert books.credits(payer) == hold - price
    check_receipt(answer, payer)


@pytest.mark.parametrize("payer", ["solana"], indirect=True)
def test_a_streamed_chat_says_at_its_end_what_it_cost(
    box: Farebox, books: Books, place: Market, payer: Wallet, llm: LlmUpstream
) -> None:
    pieces = (event(said("Hel")), event(said("lo")), event(counted(11, 23)), DONE)
    body = chat(
        play=llm.stage(Play(pieces)), stream=True, stream_options={"include_usage": True},
        max_tokens=100,
    )  # fmt: skip
    till = Till(place, payer)
    answer = by_httpx(box, payer, "POST", CHAT, json=body)
    hold, price = till.took(), RATES.price(23, 11)
    assert hold == hold_of(body)
    assert answer.headers["X-Credits-Held"] == str(hold)
    check_receipt(answer, payer)
    heard = Heard.of(answer.body)
    assert heard.text == "Hello"
    (told,) = [value["farebox"] for value in heard.values if "farebox" in value]
    assert told == {"credits_charged": price, "credits_remaining": hold - price}
    assert books.credits(payer) == hold - price


def test_embeddings_are_paid(box: Farebox, books: Books, place: Market) -> None:
    wallet = place.wallet("solana")
    till = Till(place, wallet)
    answer = by_requests(box, wallet, "POST", EMBEDDINGS, json={"model": MODEL, "input": "hello"})
    assert answer.status == 200
    charged = int(answer.headers["X-Credits-Charged"])
    assert books.credits(wallet) == till.took() - charged


@pytest.mark.parametrize("path", [SMS, CHAT, TOP_UP])
def test_the_official_client_reads_the_challenge_and_its_body_says_the_same(
    box: Farebox, place: Market, path: str
) -> None:
    value = {SMS: TEXT, CHAT: chat(max_tokens=100), TOP_UP: {}}[path]
    answer = box.post(path, None, value)
    assert (answer.status, answer.code) == (402, "payment_required")
    read = decode_payment_required_header(answer.headers["PAYMENT-REQUIRED"])
    plain = read.model_dump(by_alias=True, exclude_none=True, mode="json")
    told, body = challenge_of(answer), answer.json()
    assert plain["accepts"] == told["accepts"] == body["accepts"]
    assert plain["resource"]["url"] == told["resource"]["url"] == box.url + path
    assert told["resource"] == body["resource"]
    assert plain["x402Version"] == told["x402Version"] == body["x402Version"] == 2
    assert [each["network"].partition(":")[0] for each in told["accepts"]] == ["eip155", "solana"]
    assert plain["error"] == "payment_required"
    assert "no-store" in answer.headers["Cache-Control"]


# Credits bought


def test_a_wallet_buys_credits_for_itself(
    box: Farebox, books: Books, place: Market, payer: Wallet
) -> None:
    till = Till(place, payer)
    answer = by_requests(box, payer, "POST", TOP_UP, json={})
    assert (answer.status, answer.json()) == (
        200,
        {"success": True, "creditsAdded": 100, "credits": 100},
    )
    assert till.took() == 100  # a dollar, which a stock client pays unasked
    check_receipt(answer, payer)
    more = by_httpx(box, payer, "POST", TOP_UP, json={"credits": 17})
    assert more.json() == {"success": True, "creditsAdded": 17, "credits": 117}
    dear = by_requests(box, payer, "POST", TOP_UP, json={"credits": 250}, any_amount=True)
    assert dear.json() == {"success": True, "creditsAdded": 250, "credits": 367}
    assert till.took() == books.credits(payer) == 367


@pytest.mark.parametrize(
    ("credential", "payer"), [("key", "evm"), ("session", "solana")], indirect=["payer"]
)
def test_whoever_has_a_bearer_buys_credits_for_that_account(
    box: Farebox, books: Books, place: Market, payer: Wallet, credential: str
) -> None:
    email, key = box.account(credits=5)
    bearer = key if credential == "key" else box.set_up("tokens", "mint", email)
    till = Till(place, payer)
    headers = {"Authorization": f"Bearer {bearer}"}
    answer = by_requests(box, payer, "POST", TOP_UP, json={}, headers=headers)
    assert answer.json() == {"success": True, "creditsAdded": 100, "credits": 105}
    more = by_httpx(box, payer, "POST", TOP_UP, json={"credits": 20}, headers=headers)
    assert more.json() == {"success": True, "creditsAdded": 20, "credits": 125}
    assert till.took() == 120
    assert box.standing(key) == (125, 0)
    assert books.of(payer) is None, "nothing was credited to the wallet"


@pytest.mark.parametrize("payer", ["solana"], indirect=True)
def test_a_top_up_again_gets_its_answer_and_adds_nothing(
    box: Farebox, books: Books, place: Market, payer: Wallet
) -> None:
    header = signed(box, payer, TOP_UP, value={"credits": 30})
    first = paid(box, TOP_UP, header, value={"credits": 30})
    again = paid(box, TOP_UP, header, value={"credits": 30})
    assert first.status == again.status == 200
    assert (again.body, again.headers["Idempotent-Replayed"]) == (first.body, "true")
    assert again.headers["PAYMENT-RESPONSE"] == first.headers["PAYMENT-RESPONSE"]
    _, key = box.account(credits=0)
    for other in (
        paid(box, TOP_UP, header, value={"credits": 30}, key=key),
        paid(box, f"{TOP_UP}?a", header, value={"credits": 30}),
        paid(box, TOP_UP, header, body=b'{"credits":30}'),
    ):
        assert (other.status, other.code) == (409, "payment_already_used")
    assert books.credits(payer) == 30
    assert place.facilitator.calls["settle"] == 1


# A Bearer that cannot pay


@pytest.mark.parametrize(
    ("client", "payer"), [("requests", "evm"), ("httpx", "solana")], indirect=["payer"]
)
def test_the_client_of_a_bearer_without_credits_steps_in(
    box: Farebox, books: Books, place: Market, payer: Wallet, client: str
) -> None:
    _, key = box.account(credits=1)
    headers = {"Authorization": f"Bearer {key}"}
    till = Till(place, payer)
    path = "/api/v1/up/ok/stepped-in"
    answer = CLIENTS[client](box, payer, "GET", path, headers=headers)
    assert answer.status == 200
    assert till.took() == 2, "the price, and not what was missing of it"
    check_receipt(answer, payer)
    assert box.standing(key) == (1, 0)
    assert box.calls(key)[0]["payer"] == "api_key"
    assert books.of(payer) is None
    # With credits enough nobody is asked, so nobody pays.
    box.set_up("credits", "grant", box_owner(books, key), "5")
    answer = CLIENTS[client](box, payer, "GET", path, headers=headers)
    assert (answer.status, till.took()) == (200, 2)
    assert box.standing(key) == (4, 0)


def box_owner(books: Books, key: str) -> str:
    """The account of a key."""
    ((account,),) = books.rows(
        "SELECT account_id FROM api_key WHERE :key LIKE start || '%' ORDER BY created_at DESC"
        " LIMIT 1",
        key=key,
    )
    return str(account)


@pytest.mark.parametrize("payer", ["evm"], indirect=True)
def test_a_bearer_with_credits_leaves_the_payment_alone(
    box: Farebox, books: Books, place: Market, payer: Wallet
) -> None:
    _, key = box.account(credits=1)
    header = signed(box, payer, SMS, value=TEXT)
    answer = paid(box, SMS, header, value=TEXT, key=key)
    assert answer.status == 200
    assert "PAYMENT-RESPONSE" not in answer.headers
    assert box.standing(key) == (0, 0)
    assert place.facilitator.calls["settle"] == 0
    # The payment was not claimed: without credits it pays.
    till = Till(place, payer)
    assert paid(box, SMS, header, value=TEXT, key=key).status == 200
    assert till.took() == 1


def test_the_operator_pays_nothing(box: Farebox, books: Books, place: Market) -> None:
    wallet = place.wallet("evm")
    header = signed(box, wallet, SMS, value=TEXT)
    answer = paid(box, SMS, header, value=TEXT, key=box.operator_key)
    assert (answer.status, answer.headers["X-Credits-Charged"]) == (200, "0")
    top_up = signed(box, wallet, TOP_UP, value={})
    answer = paid(box, TOP_UP, top_up, value={}, key=box.operator_key)
    assert (answer.status, answer.code) == (403, "forbidden")
    assert place.facilitator.calls["settle"] == 0


@pytest.mark.parametrize("payer", ["solana"], indirect=True)
def test_a_bearer_that_is_bad_does_not_fall_through_to_its_payment(
    box: Farebox, books: Books, place: Market, payer: Wallet
) -> None:
    header = signed(box, payer, SMS, value=TEXT)
    for bad in ("nonsense", "eyJnonsense"):
        assert paid(box, SMS, header, value=TEXT, key=bad).status == 401
    assert place.facilitator.calls["settle"] == 0
    assert books.payments(payer) == []


# One payment, one request


def check_repeat(first: Answer, again: Answer) -> None:
    assert first.status == again.status == 200
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["PAYMENT-RESPONSE"] == first.headers["PAYMENT-RESPONSE"]
    assert again.headers["X-Credits-Charged"] == "0"
    assert again.body == first.body


@pytest.mark.parametrize(
    ("method", "path", "payer"),
    [
        ("POST", "/api/v1/up/ok/again", "evm"),
        ("GET", "/api/v1/up/ok/again?x=1", "solana"),
        ("GET", "/api/v1/up/sse/3", "evm"),
        ("POST", "/api/v1/up/ndjson/3", "solana"),
    ],
    indirect=["payer"],
)
def test_the_same_payment_again_gets_the_stored_answer(
    box: Farebox, books: Books, place: Market, payer: Wallet, upstream: Upstream, method: str,
    path: str,
) -> None:  # fmt: skip
    value = {"n": 1} if method == "POST" else None
    header = signed(box, payer, path, method, value=value)
    first = paid(box, path, header, method, value=value)
    again = paid(box, path, header, method, value=value)
    check_repeat(first, again)
    assert len(upstream.hits()) == 1
    assert place.facilitator.calls["settle"] == 1
    if "sse" in path:
        assert again.body == b"".join(map(sse_event, range(3)))
        assert again.headers["Content-Type"].startswith("text/event-stream")
    # And with a stranger's Idempotency-Key it is still what was paid for.
    keyed = paid(box, path, header, method, value=value, headers={"Idempotency-Key": "other"})
    check_repeat(first, keyed)
    assert books.credits(payer) == 0


def test_the_same_payment_again_gets_the_whole_streamed_chat(
    box: Farebox, books: Books, place: Market, llm: LlmUpstream
) -> None:
    wallet = place.wallet("evm")
    play = llm.stage(Play((event(said("Hello")), event(counted(11, 23)), DONE)))
    body = chat(play=play, stream=True, max_tokens=100)
    header = signed(box, wallet, CHAT, value=body)
    first = paid(box, CHAT, header, value=body)
    left = books.credits(wallet)
    again = paid(box, CHAT, header, value=body)
    assert Heard.of(first.body).text == "Hello"
    assert again.body == first.body
    assert (again.headers["Idempotent-Replayed"], len(llm.heard(play))) == ("true", 1)
    assert books.credits(wallet) == left


def test_a_stream_that_its_payer_left_is_paid_for_and_not_played_again(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm"), "/api/v1/up/sse/3?gate=left"
    header = signed(box, wallet, path, "GET")
    upstream.gate("left").let()
    with box.stream("GET", path, PAYMENT_SIGNATURE=header) as response:
        assert response.headers["PAYMENT-RESPONSE"]
        assert response.read(5) == b"data:"
    charged = "SELECT captured FROM call WHERE account_id = :a"
    account = books.of(wallet)
    assert account is not None
    until(lambda: books.rows(charged, a=account.account) == [(2,)], what="it is charged")
    for _ in range(2):
        again = paid(box, path, header, "GET")
        assert (again.status, again.code) == (409, "idempotency_replay_unavailable")
    assert len(upstream.hits("gate=left")) == 1
    assert place.facilitator.calls["settle"] == 1


@pytest.mark.parametrize("payer", ["solana"], indirect=True)
def test_a_payment_opens_no_other_request(
    box: Farebox, books: Books, place: Market, payer: Wallet, upstream: Upstream
) -> None:
    path, value = "/api/v1/up/ok/mine", {"n": 1}
    header = signed(box, payer, path, value=value)
    assert paid(box, path, header, value=value).status == 200
    _, key = box.account(credits=0)
    others: dict[str, Callable[[], Answer]] = {
        "method": lambda: paid(box, path, header, "GET"),
        "method without a body": lambda: paid(box, path, header, "HEAD"),
        "path": lambda: paid(box, "/api/v1/up/ok/other", header, value=value),
        "route": lambda: paid(box, TOP_UP, header, value={"credits": 10}),
        "query": lambda: paid(box, f"{path}?x=1", header, value=value),
        "empty query": lambda: paid(box, f"{path}?&", header, value=value),
        "body": lambda: paid(box, path, header, value={"n": 2}),
        "bytes": lambda: paid(box, path, header, body=b'{"n":1}'),
        "no body": lambda: paid(box, path, header),
        "Bearer": lambda: paid(box, path, header, value=value, key=key),
    }
    for what, send in others.items():
        answer = send()
        assert answer.status == 409, (what, answer.body)
        if what != "method without a body":
            assert answer.code == "payment_already_used", what
        assert answer.headers["x-should-retry"] == "false", what
    assert len(upstream.hits("/ok/")) == 1
    assert place.facilitator.calls["settle"] == 1
    assert books.credits(payer) == 0
    assert box.standing(key) == (0, 0)


@pytest.mark.parametrize("payer", ["evm"], indirect=True)
def test_a_payment_for_a_bearers_account_is_that_accounts_alone(
    box: Farebox, books: Books, place: Market, payer: Wallet
) -> None:
    _, key = box.account(credits=0)
    _, stranger = box.account(credits=0)
    header = signed(box, payer, SMS, value=TEXT)
    first = paid(box, SMS, header, value=TEXT, key=key)
    check_repeat(first, paid(box, SMS, header, value=TEXT, key=key))
    for other in (None, stranger):
        answer = paid(box, SMS, header, value=TEXT, key=other)
        assert (answer.status, answer.code) == (409, "payment_already_used")
    assert box.standing(key) == box.standing(stranger) == (0, 0)


@pytest.mark.parametrize("payer", ["evm"], indirect=True)
def test_an_idempotency_key_takes_one_payment(
    box: Farebox, books: Books, place: Market, payer: Wallet, upstream: Upstream
) -> None:
    path, value, mine = "/api/v1/up/ok/keyed", {"n": 1}, {"Idempotency-Key": "mine"}
    headers = [signed(box, payer, path, value=value) for _ in range(2)]
    till = Till(place, payer)
    first = paid(box, path, headers[0], value=value, headers=mine)
    second = paid(box, path, headers[1], value=value, headers=mine)
    assert first.status == second.status == 200
    assert second.body == first.body
    assert second.headers["Idempotent-Replayed"] == "true"
    assert "PAYMENT-RESPONSE" not in second.headers, "the second payment was not taken"
    again = paid(box, path, headers[0], value=value, headers=mine)
    assert again.headers["PAYMENT-RESPONSE"] == first.headers["PAYMENT-RESPONSE"]
    assert till.took() == 2
    assert len(upstream.hits("/ok/keyed")) == 1
    other = paid(box, path, headers[1], value={"n": 2}, headers=mine)
    assert (other.status, other.code) == (422, "idempotency_key_reused")
    # So the second is still good for something else.
    assert paid(box, path, headers[1], value={"n": 2}).status == 200
    assert till.took() == 4


@pytest.mark.parametrize("payer", ["solana"], indirect=True)
def test_an_idempotency_key_takes_one_payment_of_a_top_up(
    box: Farebox, books: Books, place: Market, payer: Wallet
) -> None:
    mine = {"Idempotency-Key": "top-up"}
    headers = [signed(box, payer, TOP_UP, value={}) for _ in range(2)]
    first, second = (paid(box, TOP_UP, each, value={}, headers=mine) for each in headers)
    assert first.status == second.status == 200
    assert second.body == first.body
    assert second.headers["Idempotent-Replayed"] == "true"
    assert place.facilitator.calls["settle"] == 1
    assert books.credits(payer) == 100


# What was paid and not served


FAILURES = [
    ("500", 502, "provider_error"),
    ("401", 502, "provider_error"),
    ("302", 502, "provider_error"),
    ("reset", 502, "provider_error"),
    ("hang", 504, "provider_timeout"),
]


@pytest.mark.parametrize(("how", "status", "code"), FAILURES, ids=[each[0] for each in FAILURES])
def test_credits_stay_when_the_upstream_fails_and_the_same_payment_is_served_on_them_once(
    box: Farebox, books: Books, place: Market, upstream: Upstream, how: str, status: int, code: str
) -> None:
    wallet = place.wallet("evm" if how in ("500", "hang", "302") else "solana")
    path, till = f"/api/v1/up/mending/{how}/x", Till(place, wallet)
    header = signed(box, wallet, path, value={})
    named = {"Idempotency-Key": f"mine-{how}"} if how in ("500", "reset") else {}
    failed = paid(box, path, header, value={}, headers=named)
    assert (failed.status, failed.code) == (status, code)
    body = failed.json()
    assert (body["refunded"], body["credited"]) == (True, 2)
    assert failed.headers["X-Credits-Credited"] == "2"
    assert failed.headers["X-Credits-Charged"] == "0"
    assert "PAYMENT-REQUIRED" not in failed.headers
    check_receipt(failed, wallet)
    assert (till.took(), books.credits(wallet)) == (2, 2)
    # Another request of the same price is not what it was paid for.
    other = paid(box, "/api/v1/up/ok/other", header, value={})
    assert (other.status, other.code) == (409, "payment_already_used")
    served = paid(box, path, header, value={}, headers=named)
    assert (served.status, served.json()) == (200, {"served": True})
    assert served.headers["X-Credits-Charged"] == "2"
    assert "Idempotent-Replayed" not in served.headers
    check_repeat(served, paid(box, path, header, value={}))
    if named:
        again = paid(box, path, header, value={}, headers=named)
        assert (again.body, again.headers["Idempotent-Replayed"]) == (served.body, "true")
    assert len(upstream.hits("/mending/")) == 2
    assert (till.took(), books.credits(wallet)) == (2, 0)
    assert place.facilitator.calls["settle"] == 1


@pytest.mark.parametrize("bearer", [False, True], ids=["stranger", "bearer"])
def test_a_refusal_that_is_passed_on_says_where_the_credits_are(
    box: Farebox, books: Books, place: Market, upstream: Upstream, bearer: bool
) -> None:
    wallet = place.wallet("evm")
    key = box.account(credits=0)[1] if bearer else None
    path = "/api/v1/up/mending/404/x"
    header = signed(box, wallet, path, "GET")
    refused = paid(box, path, header, "GET", key=key)
    assert (refused.status, refused.json()) == (404, {"why": "the double is told to"})
    assert refused.headers["Retry-After"] == "7"
    assert refused.headers["X-Credits-Credited"] == "2"
    assert refused.headers["X-Credits-Charged"] == "0"
    check_receipt(refused, wallet)
    assert (box.standing(key)[0] if key else books.credits(wallet)) == 2
    served = paid(box, path, header, "GET", key=key)
    assert (served.status, served.headers["X-Credits-Charged"]) == (200, "2")
    assert (box.standing(key)[0] if key else books.credits(wallet)) == 0
    assert place.facilitator.calls["settle"] == 1


def test_credits_that_went_elsewhere_do_not_serve_a_payment_again(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet = place.wallet("evm")
    _, key = box.account(credits=0)
    path = "/api/v1/up/mending/500/spent"
    header = signed(box, wallet, path, value={})
    assert paid(box, path, header, value={}, key=key).status == 502
    assert box.post("/api/v1/up/ok/elsewhere", key).status == 200  # on those very credits
    again = paid(box, path, header, value={}, key=key)
    assert (again.status, again.code) == (409, "payment_already_used")
    assert len(upstream.hits("/mending/")) == 1
    assert box.standing(key) == (0, 0)


# What wins over a payment


def test_whoever_asks_too_often_does_not_pay(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm"), "/api/v1/up/ok/often"
    first, fresh = (signed(box, wallet, path, value={}) for _ in range(2))
    assert paid(box, path, first, value={}).status == 200
    for _ in range(3):  # a minute may end in the midst of one round, not of two
        minute = clock.now_ms() // clock.MINUTE_MS
        while (limited := paid(box, path, first, value={})).status == 200:
            assert limited.headers["X-RateLimit-Limit"] == str(PER_MINUTE)
        settles = place.facilitator.calls["settle"]
        late = paid(box, path, fresh, value={})
        if minute == clock.now_ms() // clock.MINUTE_MS:
            break
    assert (limited.status, limited.code) == (429, "rate_limited")
    assert (late.status, late.code) == (429, "rate_limited")
    assert int(late.headers["Retry-After"]) <= 60
    assert place.facilitator.calls["settle"] == settles == 1
    assert len(books.payments(wallet)) == 1


def test_a_key_that_asks_too_often_does_not_pay(box: Farebox, books: Books, place: Market) -> None:
    wallet = place.wallet("evm")
    _, key = box.account(0, "--rate", "1")
    header = signed(box, wallet, SMS, value=TEXT)
    for _ in range(3):
        minute = clock.now_ms() // clock.MINUTE_MS
        asked = box.post(SMS, key, TEXT)
        late = paid(box, SMS, header, value=TEXT, key=key)
        if minute == clock.now_ms() // clock.MINUTE_MS:
            break
    assert (asked.status, asked.code) == (402, "insufficient_credits")
    assert (late.status, late.code) == (429, "rate_limited")
    assert place.facilitator.calls["settle"] == 0


@pytest.mark.parametrize("payer", ["evm"], indirect=True)
def test_whoever_is_suspended_does_not_pay(
    box: Farebox, books: Books, place: Market, payer: Wallet
) -> None:
    headers = [signed(box, payer, SMS, value=TEXT) for _ in range(2)]
    assert paid(box, SMS, headers[0], value=TEXT).status == 200
    account = books.of(payer)
    assert account is not None
    now = clock.now_ms()
    books.db.write(lambda tx: ledger.suspend_account(tx, account.account, "abuse", now, SYSTEM))
    top_up = signed(box, payer, TOP_UP, value={})
    for answer in (
        paid(box, SMS, headers[1], value=TEXT),
        paid(box, SMS, headers[0], value=TEXT),
        paid(box, TOP_UP, top_up, value={}),
    ):
        assert (answer.status, answer.code) == (403, "account_suspended")
        assert answer.json()["reason"] == "abuse"
    assert place.facilitator.calls["settle"] == 1
    books.db.write(lambda tx: ledger.resume_account(tx, account.account, now, SYSTEM))
    assert paid(box, SMS, headers[1], value=TEXT).status == 200


@pytest.mark.parametrize("path", [SMS, "/api/v1/up/ok/%2e%2e/x", CHAT, TOP_UP])
def test_nobody_pays_for_a_request_that_is_refused_anyway(
    box: Farebox, books: Books, place: Market, path: str
) -> None:
    wallet = place.wallet("evm")
    value = {"to": "nobody", "model": "nobody's", "credits": 3}
    header = signed(box, wallet, path, value=value)
    answer = paid(box, path, header, value=value)
    assert answer.status in (400, 404), answer.body
    assert answer.code in ("validation_error", "model_not_found")
    assert place.facilitator.calls["settle"] == 0
    assert books.payments(wallet) == []
    # Nor does a key that lacks the scope, or that has used up its limit.
    _, key = box.account(0, "--scope", "other:thing")
    answer = paid(box, path, header, value=value, key=key)
    assert (answer.status, place.facilitator.calls["settle"]) in ((403, 0), (400, 0), (404, 0))


def test_a_key_at_its_own_limit_does_not_pay(box: Farebox, books: Books, place: Market) -> None:
    wallet = place.wallet("evm")
    _, key = box.account(0, "--credit-limit", "1", "--period", "total")
    header = signed(box, wallet, "/api/v1/up/ok/limit", value={})
    answer = paid(box, "/api/v1/up/ok/limit", header, value={}, key=key)
    assert (answer.status, answer.code) == (403, "credit_limit_reached")
    assert place.facilitator.calls["settle"] == 0


def test_a_key_that_could_not_hold_what_was_paid_does_not_pay(
    box: Farebox, books: Books, place: Market
) -> None:
    # With credits the answer would be made short enough for the limit; a payment is for all of it.
    wallet, body = place.wallet("evm", credits=5000), chat()
    _, key = box.account(0, "--credit-limit", "20", "--period", "total")
    header = signed(box, wallet, CHAT, value=body)
    answer = paid(box, CHAT, header, value=body, key=key)
    assert (answer.status, answer.code) == (403, "credit_limit_reached")
    assert place.facilitator.calls["settle"] == 0
    assert books.payments(wallet) == []
    assert box.standing(key) == (0, 0)


def test_a_bearer_without_credits_pays_for_the_longest_answer(
    box: Farebox, books: Books, place: Market
) -> None:
    wallet, body = place.wallet("evm", credits=5000), chat()
    _, key = box.account(credits=1)
    headers = {"Authorization": f"Bearer {key}"}
    till = Till(place, wallet)
    answer = by_requests(box, wallet, "POST", CHAT, json=body, headers=headers, any_amount=True)
    assert (answer.status, answer.headers["X-Credits-Charged"]) == (200, str(RATES.price(3, 7)))
    assert "X-Max-Tokens-Clamped" not in answer.headers
    hold = till.took()
    assert hold == hold_of(body | {"max_tokens": RATES.most})
    assert box.standing(key) == (1 + hold - RATES.price(3, 7), 0)


class Fruitless(Settler):
    """Settles nothing: it says so, or is not heard."""

    def __init__(self, says_so: bool) -> None:
        super().__init__()
        self._says_so = says_so

    def respond(self, exchange: Exchange) -> None:
        if not exchange.hit.path.endswith("/settle"):
            super().respond(exchange)
        elif self._says_so:
            told = {"success": False, "errorReason": "invalid_exact_evm_payload"}
            exchange.json(200, told | {"transaction": "", "network": BASE})
        else:
            exchange.close()


SMALL = f"""
[upstreams.sandbox]
kind = "sandbox"
[[routes]]
path = "{SMS}"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
credits = 1
[limits]
"""


@pytest.mark.parametrize(
    ("says_so", "code"), [(True, "payment_invalid"), (False, "payment_unconfirmed")]
)
def test_whoever_pays_with_bad_money_again_and_again_is_turned_away(
    tmp_path: Path, says_so: bool, code: str
) -> None:
    with Fruitless(says_so) as settler:
        toml = x402_toml(settler.url, {BASE: EvmWallet().address}, {})
        with Box(tmp_path / "instance", f"{SMALL}failed_auth_per_minute = 5\n{toml}") as box:
            challenges = {SMS: challenge_of(box.post(SMS)), TOP_UP: challenge_of(box.post(TOP_UP))}

            def try_it(path: str, client: str) -> Answer:
                headers = {"PAYMENT-SIGNATURE": EvmWallet().header(challenges[path])}
                value = TEXT if path == SMS else {}
                return box.request("POST", path, value=value, headers=headers, client=client)

            for _ in range(3):  # a minute may end in the midst of one round, not of two
                minute, before = clock.now_ms() // clock.MINUTE_MS, len(settler.hits("/settle"))
                codes = [try_it((SMS, TOP_UP)[n % 2], "192.0.2.1").code for n in range(7)]
                settles = len(settler.hits("/settle")) - before
                other = try_it(SMS, "198.51.100.1")
                if minute == clock.now_ms() // clock.MINUTE_MS:
                    break
            assert codes == [code] * 5 + ["rate_limited"] * 2
            assert settles == 5, "nobody has a facilitator asked on and on"
            assert other.code == code
            assert box.post(SMS).status == 402, "to ask what it costs is another thing"


@pytest.mark.parametrize("how", ["unpaid", "bad", "signed"])
def test_nobody_has_large_bodies_priced_on_and_on(tmp_path: Path, how: str) -> None:
    with Settler() as settler:
        toml = x402_toml(settler.url, {BASE: EvmWallet().address}, {})
        with Box(tmp_path / "instance", f"{SMALL}requests_per_minute = 5\n{toml}") as box:
            challenge = challenge_of(box.post(SMS))
            large = b'{"to": "+18148835337", "message": "hi"' + b" " * 70_000 + b"}"
            changes = {"accepted": {"network": "eip155:1"}} if how == "bad" else {}

            def ask() -> Answer:
                header = EvmWallet().header(challenge, **changes)  # a new wallet costs nothing
                headers = {} if how == "unpaid" else {"PAYMENT-SIGNATURE": header}
                return box.request("POST", SMS, body=large, headers=headers)

            for _ in range(3):
                minute = clock.now_ms() // clock.MINUTE_MS
                codes = [ask().code for _ in range(7)]
                if minute == clock.now_ms() // clock.MINUTE_MS:
                    break
            expected = {"unpaid": "payment_required", "bad": "payment_invalid", "signed": None}
            assert codes == [expected[how]] * 5 + ["rate_limited"] * 2


# Payments that come to nothing


def test_a_wallet_without_money_is_told_so_and_may_try_again(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("solana", credits=0), "/api/v1/up/ok/broke"
    mine = {"Idempotency-Key": "broke"}  # which a refused payment does not use up
    refused = by_requests(box, wallet, "POST", path, json={}, headers=mine)
    assert (refused.status, refused.code) == (402, "payment_invalid")
    told = decode_payment_response_header(refused.headers["PAYMENT-RESPONSE"])
    assert (told.success, told.error_reason) == (False, refused.json()["reason"])
    assert challenge_of(refused)["accepts"] == refused.json()["accepts"]
    assert place.facilitator.calls["settle"] == 1, "the client does not go on and on"
    header = signed(box, wallet, path, value={})
    assert paid(box, path, header, value={}, headers=mine).code == "payment_invalid"
    assert [status for _, status in books.payments(wallet)] == ["refused"] * 2
    place.fill(wallet, 2)
    assert paid(box, path, header, value={}, headers=mine).status == 200
    assert (place.left(wallet), books.credits(wallet)) == (0, 0)
    assert len(upstream.hits("/ok/broke")) == 1


def test_an_authorization_that_came_to_nothing_and_is_used_later_pays_when_it_is_shown_again(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    # The facilitator sent it without looking, and it failed for want of money. But now it is public
    # and good until its time is over: anybody can send it again.
    wallet, path = place.wallet("evm", credits=0), "/api/v1/up/ok/public"
    header = signed(box, wallet, path, value={})
    answer = paid(box, path, header, value={})
    assert (answer.status, answer.code) == (402, "payment_invalid")
    assert answer.json()["reason"] == "transaction_failed"
    assert upstream.hits("/ok/public") == []
    assert books.of(wallet) is None
    told = place.facilitator.settles[0].payload["payload"]
    place.fill(wallet, 2)
    place.evm.submit(told["authorization"], told["signature"])
    assert paid(box, path, header, value={}).status == 200
    assert (place.left(wallet), books.credits(wallet)) == (0, 0)
    assert len(upstream.hits("/ok/public")) == 1


@pytest.mark.parametrize("mended", [True, False], ids=["sound-facilitator", "stock-facilitator"])
@pytest.mark.parametrize("path", ["/api/v1/up/ok/failed", TOP_UP])
def test_a_transaction_that_lands_and_fails_serves_nothing(
    box: Farebox, books: Books, place: Market, upstream: Upstream, mended: bool, path: str
) -> None:
    wallet, earned = place.wallet("solana"), place.earned()
    place.facilitator.mended = mended
    header = signed(box, wallet, path, value={})
    place.solana.before_landing = lambda: place.fill(wallet, 0)
    answer = paid(box, path, header, value={})
    landed = place.solana.landed()[-1]
    assert landed.failed
    if not mended:  # it is told that all is well, and does not believe it
        (asked,) = place.facilitator.settles
        assert asked.answer is not None
        assert asked.answer["success"] is True
    assert (answer.status, answer.code) == (402, "payment_invalid")
    assert upstream.hits("/ok/failed") == []
    assert books.of(wallet) is None
    assert [status for _, status in books.payments(wallet)] == ["refused"]
    assert place.earned() == earned


# Doors that are not doors


def raw(box: Farebox, method: str, target: str, *headers: str) -> bytes:
    """The answer to a request line as it is."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{box.port}", "Connection: close"]
    with box.connect() as sock:
        sock.sendall("\r\n".join([*lines, "Content-Length: 0", *headers, "", ""]).encode())
        found = b""
        while data := sock.recv(65536):
            found += data
    return found


ALIASES = [
    "{path}", "/{path}", "{path}/", "{path};x", "{path}?", "{path}?paid=1", "{path}%20",
    "{path}%00",
    "/api%2Fv1/{tail}", "/api//v1/{tail}", "/api/./v1/{tail}", "/api/v1/../v1/{tail}",
    "/API/V1/{tail}", "/api/v1/{upper}", "/api;x/v1/{tail}", "/api/v1//{tail}", "/x/..{path}",
    "http://127.0.0.1:{port}{path}", "HTTP://127.0.0.1:{port}{path}", "http://127.0.0.1:{port}/{path}",
    "http://other.example{path}", "/api/v1/%{first:02x}{rest}", "\\api\\v1\\{tail}", "{path}#x",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/api/v1/up/ok/alias", CHAT])
def test_no_spelling_of_a_path_and_no_method_is_served_unpaid(
    box: Farebox, books: Books, place: Market, upstream: Upstream, llm: LlmUpstream, path: str
) -> None:
    tail = path.removeprefix("/api").removeprefix("/v1/")
    calls = books.rows("SELECT COUNT(*) FROM call")
    asked = len(llm.hits())
    for alias in ALIASES:
        target = alias.format(
            path=path, tail=tail, upper=tail.upper(), port=box.port, first=ord(tail[0]),
            rest=tail[1:],
        )  # fmt: skip
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE", "CONNECT", "post"):
            answer = raw(box, method, target, "X-HTTP-Method-Override: POST")
            status = int(answer.split(b" ", 2)[1])
            assert 400 <= status < 500, (method, target, answer[:200])
    assert upstream.hits() == []
    assert len(llm.hits()) == asked
    assert books.rows("SELECT COUNT(*) FROM call") == calls
    box.check()


def test_what_is_paid_for_with_head_is_what_head_costs(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm"), "/api/v1/up/ok/head"
    unpaid = box.request("HEAD", path)
    assert (unpaid.status, unpaid.body) == (402, b"")
    assert challenge_of(unpaid)["accepts"][0]["amount"] == str(2 * UNITS_PER_CREDIT)
    header = wallet.header(challenge_of(unpaid))
    served = paid(box, path, header, "HEAD")
    assert (served.status, served.body) == (200, b"")
    assert served.headers["X-Credits-Charged"] == "2"
    assert [hit.method for hit in upstream.hits("/ok/head")] == ["HEAD"]
    assert paid(box, path, header, "GET").status == 409


def test_a_route_that_takes_no_payments_takes_none(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet = place.wallet("evm")
    header = signed(box, wallet, "/api/v1/up/ok/private", value={})
    answer = paid(box, "/api/v1/private", header, value={})
    assert (answer.status, answer.code) == (401, "missing_api_key")
    assert "PAYMENT-REQUIRED" not in answer.headers
    _, key = box.account(credits=0)
    answer = paid(box, "/api/v1/private", header, value={}, key=key)
    assert (answer.status, answer.code) == (402, "insufficient_credits")
    assert "PAYMENT-REQUIRED" not in answer.headers
    assert upstream.hits() == []
    assert place.facilitator.calls["settle"] == 0


# What an upstream learns, and what the client says of itself


def test_nothing_of_a_payment_reaches_the_upstream(
    box: Farebox, books: Books, place: Market, upstream: Upstream, payer: Wallet
) -> None:
    said_too = {
        "X-PAYMENT": encode({"x402Version": 1}),
        "X-Payment-Response": "x",
        "PAYMENT-REQUIRED": "x",
        "PAYMENT-RESPONSE": "x",
        "Payment-Recovery": "0",
        "X-Trace": "passed-on",
    }
    answer = by_requests(box, payer, "POST", "/api/v1/up/ok/clean", json={}, headers=said_too)
    assert answer.status == 200
    (hit,) = upstream.hits("/ok/clean")
    assert hit.header("X-Trace") == "passed-on"
    everything = hit.everything().lower()
    assert b"payment" not in everything
    assert payer.address.lower().encode() not in everything


def test_what_a_client_says_of_its_tries_changes_nothing(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm"), "/api/v1/up/ok/tries"
    for tries in ({"Payment-Retry": "1"}, {"Payment-Recovery": "1"}, {"X-PAYMENT": "e30="}):
        unpaid = box.request("POST", path, value={}, headers=tries)
        assert (unpaid.status, unpaid.code) == (402, "payment_required")
        header = wallet.header(challenge_of(unpaid))
        served = paid(box, path, header, value={}, headers=tries)
        check_repeat(served, paid(box, path, header, value={}))
    assert len(upstream.hits("/ok/tries")) == 3
    assert books.credits(wallet) == 0


def test_only_what_was_checked_reaches_the_facilitator(
    box: Farebox, books: Books, place: Market, payer: Wallet
) -> None:
    asked = box.post(SMS, None, TEXT)
    whole = payer.payment(challenge_of(asked), extensions={"canary": 1}, canary=2)
    whole["payload"]["canary"] = 3
    whole["accepted"]["extra"]["canary"] = 4
    assert paid(box, SMS, encode(whole), value=TEXT).status == 200
    (settle,) = place.facilitator.settles
    assert b"canary" not in settle.body
    assert settle.payload["accepted"] == settle.requirements
    (offered,) = [
        each for each in challenge_of(asked)["accepts"] if each["network"] == payer.network
    ]
    assert settle.requirements == offered
    assert json.loads(settle.body)["x402Version"] == 2
    assert payer.address not in json.dumps(settle.headers)


# What is left, spent by signing


def key_of(wallet: Wallet) -> Key:
    """The key that has signed a wallet's payments, to sign requests with."""
    if isinstance(wallet, EvmWallet):
        return EvmKey(bytes(wallet.account.key))
    return SolanaKey(bytes(wallet.keypair.secret()))


def test_what_a_failed_call_has_left_is_spent_by_signing_and_then_paid_for_again(
    box: Farebox, books: Books, place: Market, upstream: Upstream, payer: Wallet
) -> None:
    key, till, path = key_of(payer), Till(place, payer), "/api/v1/up/ok/left"

    def ask(method: str, target: str, body: bytes = b"", **headers: str) -> Answer:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers |= {"Content-Type": "application/json"} if body else {}
        sent = headers | signed_request(key, method, box.url + target, body)
        return box.request(method, target, body=body or None, headers=sent)

    unknown = ask("GET", "/v1/account")
    assert (unknown.status, unknown.code) == (401, "invalid_signature")
    failed = by_requests(box, payer, "POST", "/api/v1/up/status/500", json={})
    assert (failed.status, failed.json()["credited"], till.took()) == (502, 2, 2)
    account = ask("GET", "/v1/account").json()
    assert (account["wallet"], account["credits_remaining"]) == (payer.address, 2)
    served = ask("POST", path, b"{}")
    assert (served.status, served.headers["X-Credits-Remaining"]) == (200, "0")
    assert "PAYMENT-RESPONSE" not in served.headers
    short = ask("POST", path, b"{}")
    assert (short.status, short.code) == (402, "insufficient_credits")
    assert till.took() == 2
    # One request that is signed and paid, as a Bearer's would be.
    header = payer.header(challenge_of(short))
    bought = ask("POST", path, b"{}", PAYMENT_SIGNATURE=header)
    assert (bought.status, bought.headers["X-Credits-Charged"]) == (200, "2")
    check_receipt(bought, payer)
    again = ask("POST", path, b"{}", PAYMENT_SIGNATURE=header)
    assert (again.status, again.headers["Idempotent-Replayed"]) == (200, "true")
    assert (till.took(), books.credits(payer)) == (4, 0)
    assert len(upstream.hits("/ok/left")) == 2
    offered = ask("POST", TOP_UP, b"{}")
    assert (offered.status, offered.code) == (402, "payment_required")
    more = ask("POST", TOP_UP, b"{}", PAYMENT_SIGNATURE=payer.header(challenge_of(offered)))
    assert more.json() == {"success": True, "creditsAdded": 100, "credits": 100}
    found = books.of(payer)
    assert found is not None
    moved = [("topup", 2), ("capture", -2)]
    assert books.entries(found.account) == [*moved, *moved, ("topup", 100)]
    payers = books.rows(
        "SELECT payer, status FROM call WHERE account_id = :a ORDER BY number", a=found.account
    )
    assert payers == [("x402", "voided"), ("wallet", "captured"), ("wallet", "captured")]
