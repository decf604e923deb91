"""Payments at the same moment: one is taken once, for one request, whoever else sends it; and what
changes while one is being settled costs nobody their money.

Twenty rounds in every run; `FAREBOX_TORTURE=1` makes it two hundred.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import StartFarebox
from doubles import Exchange, Gone, Upstream, behaviour
from facilitator import DROP, Asked, Reply
from inprocess import Background, Box
from market import (
    TOP_UP,
    Books,
    Market,
    Submitter,
    Wallet,
    challenge_of,
    quick_market,
    receipt_of,
    x402_toml,
)
from payers import EvmWallet, decode
from server import Answer, Farebox, until
from settler import BASE, Settler
from test_races import TORTURE, at_once

from core import clock, keys, ledger
from core.audit import SYSTEM
from core.payments import reconciler
from models import Tx

ROUNDS = 200 if TORTURE else 20
AT_ONCE = 50
PRICE = 2
PAY_TO = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"


@behaviour("mends")
def _mends(server: Upstream, exchange: Exchange) -> None:
    """The first request to a target fails, every later one is served."""
    first = len(server.hits(exchange.hit.target)) == 1
    exchange.json(500 if first else 200, {"served": not first})


def routes_toml(upstream: Upstream) -> str:
    sections = [f'[upstreams.double]\nkind = "http"\nbase_url = "{upstream.url}"']
    for name in ("up", "twin"):
        sections.append(f"""
[[routes]]
path = "/api/v1/{name}/*"
methods = ["POST"]
upstream = "double"
upstream_path = "/*"
credits = {PRICE}
""")
    return "\n".join(sections)


@pytest.fixture(scope="module")
def the_market() -> Iterator[Market]:
    with quick_market() as place:
        yield place


@pytest.fixture
def place(the_market: Market) -> Market:
    the_market.submitter.forget()
    return the_market


@pytest.fixture(scope="module")
def box(start_farebox: StartFarebox, upstream_server: Upstream, the_market: Market) -> Farebox:
    limits = """
[limits]
requests_per_minute = 1000000
failed_auth_per_minute = 1000000
concurrent_calls = 2
"""
    return start_farebox(routes_toml(upstream_server) + limits + the_market.toml())


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


def sign(box: Farebox, wallet: Wallet, path: str, count: int = 1) -> list[str]:
    """So many payments for a request, each good for itself."""
    challenge = challenge_of(box.post(path))
    return [wallet.header(challenge) for _ in range(count)]


def pay(box: Farebox, path: str, header: str, key: str | None = None, **headers: str) -> Answer:
    return box.post(path, key, PAYMENT_SIGNATURE=header, **headers)


def served_once(answers: list[Answer], *codes: str) -> Answer:
    """The one answer that was served first. All others have the same, or one of these codes, which
    say how a retry would end."""
    served = [answer for answer in answers if answer.status == 200]
    (first,) = [answer for answer in served if "Idempotent-Replayed" not in answer.headers]
    assert {answer.body for answer in served} == {first.body}
    for answer in answers:
        if answer.status != 200:
            assert (answer.status, answer.code in codes) == (409, True), answer.body
            may_retry = answer.code in ("payment_in_progress", "idempotency_in_progress")
            assert (answer.headers.get("x-should-retry") != "false") == may_retry
            assert ("Retry-After" in answer.headers) == may_retry
        assert "PAYMENT-REQUIRED" not in answer.headers, "nobody is asked to pay again"
    return first


# One payment


def test_one_payment_sent_50_times_at_once_is_one_call(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, codes = place.wallet("evm", ROUNDS * PRICE), set()
    for number in range(ROUNDS):
        # Slow enough that some come while the call runs, and others while the payment is settled.
        path = f"/api/v1/up/slow/30/one-{number}-"
        (header,) = sign(box, wallet, path)
        answers = at_once(AT_ONCE, lambda _, path=path, header=header: pay(box, path, header))
        first = served_once(answers, "payment_in_progress")
        codes |= {answer.code for answer in answers}
        assert receipt_of(first)["success"] is True
        assert len(upstream.hits(f"/one-{number}-")) == 1
        assert place.submitter.calls["settle"] == number + 1
        assert books.credits(wallet) == 0
        again = pay(box, path, header)
        assert (again.status, again.body) == (200, first.body)
    assert codes == {None, "payment_in_progress"}, "they did come at once"
    assert (place.left(wallet), len(books.payments(wallet))) == (0, ROUNDS)
    captured = books.rows("SELECT SUM(captured), COUNT(*) FROM call WHERE status = 'captured'"
                          " AND route = '/api/v1/up/*'")  # fmt: skip
    assert captured == [(ROUNDS * PRICE, ROUNDS)]


@pytest.mark.parametrize("bearer", [False, True], ids=["wallet", "bearer"])
def test_one_payment_sent_50_times_at_once_is_one_top_up(
    box: Farebox, books: Books, place: Market, bearer: bool
) -> None:
    rounds = ROUNDS // 2
    wallet = place.wallet("evm", rounds * 100)
    key = box.account(credits=0)[1] if bearer else None
    for number in range(rounds):
        (header,) = sign(box, wallet, TOP_UP)
        answers = at_once(AT_ONCE, lambda _, header=header: pay(box, TOP_UP, header, key))
        first = served_once(answers, "payment_in_progress")
        expected = {"success": True, "creditsAdded": 100, "credits": 100 * (number + 1)}
        assert first.json() == expected
        assert place.submitter.calls["settle"] == number + 1
    assert (box.standing(key)[0] if key else books.credits(wallet)) == 100 * rounds
    assert place.left(wallet) == 0


def test_one_payment_at_once_on_two_routes_opens_one(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    rounds = ROUNDS // 4
    wallet = place.wallet("evm", rounds * PRICE)
    for number in range(rounds):
        paths = [f"/api/v1/{name}/slow/10/{name}-{number}-" for name in ("up", "twin")]
        challenge = challenge_of(box.post(paths[0]))
        # A client may leave out what it pays for. The two prices are one.
        header = wallet.header(challenge, resource=None)
        answers = at_once(20, lambda n, h=header, paths=paths: pay(box, paths[n % 2], h))
        served_once(answers, "payment_in_progress", "payment_already_used")
        hits = [len(upstream.hits(f"/{name}-{number}-")) for name in ("up", "twin")]
        assert sorted(hits) == [0, 1]
        winner = hits.index(1)
        for index, answer in enumerate(answers):
            if index % 2 != winner:
                assert answer.code == "payment_already_used", "and it says so, not `in progress`"
        assert pay(box, paths[winner], header).status == 200
        assert pay(box, paths[1 - winner], header).code == "payment_already_used"
        assert place.submitter.calls["settle"] == number + 1
    assert (books.credits(wallet), place.left(wallet)) == (0, 0)


def test_one_payment_for_two_accounts_credits_one(
    box: Farebox, books: Books, place: Market
) -> None:
    wallet = place.wallet("evm", 100)
    names = [None, *(box.account(credits=0)[1] for _ in range(3))]
    (header,) = sign(box, wallet, TOP_UP)
    answers = at_once(40, lambda n: pay(box, TOP_UP, header, names[n % 4]))
    served_once(answers, "payment_in_progress", "payment_already_used")
    bought = [box.standing(key)[0] for key in names if key]
    bought.append(books.credits(wallet) if books.of(wallet) else 0)
    assert sorted(bought) == [0, 0, 0, 100]
    assert place.submitter.calls["settle"] == 1


def test_credits_of_a_call_that_failed_serve_it_once_however_many_try_again(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    rounds = ROUNDS // 5
    wallet = place.wallet("evm", rounds * PRICE)
    for number in range(rounds):
        path = f"/api/v1/up/mends/{number}-"
        (header,) = sign(box, wallet, path)
        assert pay(box, path, header).status == 502
        assert books.credits(wallet) == PRICE
        answers = at_once(20, lambda _, path=path, header=header: pay(box, path, header))
        first = served_once(answers, "payment_in_progress")
        assert first.json() == {"served": True}
        assert len(upstream.hits(path.removeprefix("/api/v1/up"))) == 2
        assert books.credits(wallet) == 0
        assert place.submitter.calls["settle"] == number + 1


def test_a_payment_whose_end_nobody_heard_serves_once_however_many_ask_as_it_is_found(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm", PRICE), "/api/v1/up/ok/unheard"
    (header,) = sign(box, wallet, path)

    def take_and_fall_silent(asked: Asked) -> Reply:
        place.submitter.settle(asked.payload)
        return DROP

    place.submitter.before_settle = take_and_fall_silent
    place.evm.fail("eth_getBlockByNumber", 1000)  # so the chain does not tell either
    assert pay(box, path, header).code == "payment_unconfirmed"
    assert place.left(wallet) == 0
    ((payment, status),) = books.payments(wallet)
    assert status == "unknown"
    seen: list[Answer] = []

    def ask(index: int) -> Answer:
        if index == 0:
            place.evm.no_more_failures()
            box.set_up("payments", "reconcile", payment)
        return until(lambda: _once_served(pay(box, path, header), seen), 30, "it is served")

    served = at_once(20, ask)
    served_once(served)
    assert {answer.code for answer in seen} <= {"payment_unconfirmed", "payment_in_progress"}
    assert len(upstream.hits("/ok/unheard")) == 1
    assert place.submitter.calls["settle"] == 1
    assert (books.credits(wallet), books.payments(wallet)) == (0, [(payment, "settled")])


def _once_served(answer: Answer, others: list[Answer]) -> Answer | None:
    if answer.status == 200:
        return answer
    others.append(answer)
    assert "PAYMENT-REQUIRED" not in answer.headers
    return None


# One Idempotency-Key


@pytest.mark.parametrize("bearer", [False, True], ids=["wallet", "bearer"])
def test_50_payments_under_one_idempotency_key_are_one_payment_and_one_call(
    box: Farebox, books: Books, place: Market, upstream: Upstream, bearer: bool
) -> None:
    key = box.account(credits=0)[1] if bearer else None
    for number in range(ROUNDS // 2):
        # New to the instance: its account is opened in the midst of it.
        wallet = place.wallet("evm", AT_ONCE * PRICE)
        path = f"/api/v1/up/slow/5/keyed-{bearer}-{number}-"
        headers = sign(box, wallet, path, AT_ONCE)
        mine = f"mine-{number}"
        calls = [partial(pay, box, path, each, key, Idempotency_Key=mine) for each in headers]
        answers = at_once(AT_ONCE, lambda n, calls=calls: calls[n]())
        first = served_once(answers, "idempotency_in_progress")
        assert len(upstream.hits(f"/keyed-{bearer}-{number}-")) == 1
        assert place.submitter.calls["settle"] == number + 1
        assert len(books.payments(wallet)) == 1
        assert place.left(wallet) == (AT_ONCE - 1) * PRICE * 10_000
        assert (box.standing(key)[0] if key else books.credits(wallet)) == 0
        again = calls[0]()
        assert (again.status, again.body) == (200, first.body)
        assert again.headers["Idempotent-Replayed"] == "true"
    # What was not taken is still good.
    other = f"/api/v1/up/slow/0/keyed-{bearer}-other"
    payments = books.rows("SELECT key FROM payment")
    unused = next(h for h in headers if not _is_claimed(h, payments))
    assert pay(box, other, unused, key).code == "payment_invalid", "for what it says it pays"
    assert pay(box, path, unused, key).status == 200


def _is_claimed(header: str, payments: list[tuple[str]]) -> bool:
    nonce = decode(header)["payload"]["authorization"]["nonce"]
    return any(key.endswith(nonce) for (key,) in payments)


def test_50_payments_under_one_idempotency_key_are_one_top_up(
    box: Farebox, books: Books, place: Market
) -> None:
    for number in range(ROUNDS // 5):
        wallet = place.wallet("evm", AT_ONCE * 100)
        headers = sign(box, wallet, TOP_UP, AT_ONCE)

        def buy(n: int, headers: list[str] = headers) -> Answer:
            return pay(box, TOP_UP, headers[n], Idempotency_Key="top-up")

        first = served_once(at_once(AT_ONCE, buy), "idempotency_in_progress")
        assert first.json() == {"success": True, "creditsAdded": 100, "credits": 100}
        assert place.submitter.calls["settle"] == number + 1
        assert books.credits(wallet) == 100
        assert buy(0).body == first.body


# More payments than can be settled


def test_payments_wait_for_a_facilitator_in_half_of_the_threads_and_no_more(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm", PRICE), "/api/v1/up/ok/crowd"
    _, key = box.account(credits=PRICE)
    go, many = threading.Event(), 40  # two workers with 32 threads each

    def refuse_late(asked: Asked) -> Reply:
        assert go.wait(30)
        told = {"success": False, "errorReason": "invalid_payload", "transaction": ""}
        return Reply.json(told | {"network": wallet.network})

    place.submitter.before_settle = refuse_late
    headers = sign(box, wallet, path, many)
    sent = [Background(partial(pay, box, path, header)) for header in headers]
    # All have come so far as they can when the rest was turned away.
    until(lambda: sum(each.done for each in sent) + place.submitter.calls["settle"] == many)
    turned_away = [n for n, each in enumerate(sent) if each.done]
    assert many - 32 <= len(turned_away) < many
    assert box.post("/api/v1/up/ok/beside", key).status == 200, "who has credits is served"
    go.set()
    answers = [each.result() for each in sent]
    for number, answer in enumerate(answers):
        if number in turned_away:
            assert (answer.status, answer.code) == (503, "overloaded")
            assert answer.headers["Retry-After"] == "1"
        else:
            assert (answer.status, answer.code) == (402, "payment_invalid")
    assert {status for _, status in books.payments(wallet)} == {"refused"}, "no claim is left"
    place.submitter.before_settle = None
    assert pay(box, path, headers[turned_away[0]]).status == 200
    assert (books.credits(wallet), place.left(wallet)) == (0, 0)


# What changes while a payment is being settled


class Held:
    """A request whose payment is with the facilitator, until it is let go."""

    def __init__(self, facilitator: Submitter, send: Callable[[], Answer]) -> None:
        self._arrived, self._go = threading.Event(), threading.Event()
        facilitator.before_settle = self._hold
        self._send = Background(send)
        assert self._arrived.wait(10), "the payment did not get to the facilitator"
        facilitator.before_settle = None

    def _hold(self, asked: Asked) -> Reply | None:
        self._arrived.set()
        assert self._go.wait(30)
        return None

    def answer(self) -> Answer:
        self._go.set()
        return self._send.result()


def check_credited(answer: Answer, status: int, code: str, credits: int = PRICE) -> None:
    """A refusal that says where the money is."""
    assert (answer.status, answer.code) == (status, code), answer.body
    body = answer.json()
    assert body["credited"] == credits
    assert f"{credits} credits" in body["message"]
    assert answer.headers["X-Credits-Credited"] == str(credits)
    assert receipt_of(answer)["success"] is True
    assert "PAYMENT-REQUIRED" not in answer.headers


def account_of(books: Books, email: str) -> str:
    ((found,),) = books.rows("SELECT account_id FROM user WHERE email = :e", e=email)
    return str(found)


def key_id_of(books: Books, account: str) -> str:
    ((found,),) = books.rows("SELECT id FROM api_key WHERE account_id = :a", a=account)
    return str(found)


def balance(books: Books, account: str) -> tuple[int, int]:
    with books.db.reading() as tx:
        found = ledger.standing(tx, account)
    return found.available, found.held


def test_a_key_that_is_revoked_while_its_payment_is_settled_loses_no_money(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm", PRICE), "/api/v1/up/ok/revoked"
    email, key = box.account(credits=0)
    account = account_of(books, email)
    (header,) = sign(box, wallet, path)
    held = Held(place.submitter, lambda: pay(box, path, header, key))
    books.db.write(lambda tx: keys.revoke(tx, key_id_of(books, account), clock.now_ms(), SYSTEM))
    check_credited(held.answer(), 401, "invalid_api_key")
    assert balance(books, account) == (PRICE, 0)
    assert upstream.hits("/ok/revoked") == []
    # Another key of the account spends it on the very request it was paid for.
    served = pay(box, path, header, box.key(email))
    assert (served.status, balance(books, account)) == (200, (0, 0))
    assert place.submitter.calls["settle"] == 1


def test_a_key_that_is_suspended_while_its_payment_is_settled_loses_no_money(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm", PRICE), "/api/v1/up/ok/suspended-key"
    email, key = box.account(credits=0)
    account = account_of(books, email)
    (header,) = sign(box, wallet, path)
    held = Held(place.submitter, lambda: pay(box, path, header, key))
    key_id, now = key_id_of(books, account), clock.now_ms()
    books.db.write(lambda tx: keys.suspend(tx, key_id, "lost", now, SYSTEM))
    check_credited(held.answer(), 403, "key_suspended")
    assert balance(books, account) == (PRICE, 0)
    assert pay(box, path, header, key).code == "key_suspended"
    books.db.write(lambda tx: keys.resume(tx, key_id, now, SYSTEM))
    assert pay(box, path, header, key).status == 200
    assert balance(books, account) == (0, 0)
    assert len(upstream.hits("/ok/suspended-key")) == 1


@pytest.mark.parametrize("bearer", [False, True], ids=["wallet", "bearer"])
def test_an_account_that_is_suspended_while_its_payment_is_settled_loses_no_money(
    box: Farebox, books: Books, place: Market, upstream: Upstream, bearer: bool
) -> None:
    wallet, path = place.wallet("evm", 2 * PRICE), f"/api/v1/up/ok/suspended-{bearer}"
    key = None
    if bearer:
        email, key = box.account(credits=0)
        account = account_of(books, email)
    else:
        assert pay(box, path, sign(box, wallet, path)[0]).status == 200
        found = books.of(wallet)
        assert found is not None
        account = found.account
    (header,) = sign(box, wallet, path)
    before, now = len(upstream.hits(path[11:])), clock.now_ms()
    held = Held(place.submitter, lambda: pay(box, path, header, key))
    books.db.write(lambda tx: ledger.suspend_account(tx, account, "abuse", now, SYSTEM))
    check_credited(held.answer(), 403, "account_suspended")
    assert balance(books, account) == (PRICE, 0)
    books.db.write(lambda tx: ledger.resume_account(tx, account, now, SYSTEM))
    assert pay(box, path, header, key).status == 200
    assert balance(books, account) == (0, 0)
    assert len(upstream.hits(path[11:])) == before + 1


def test_a_limit_that_is_used_up_while_a_payment_is_settled_loses_no_money(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm", PRICE), "/api/v1/up/ok/limit"
    email, key = box.account(0, "--credit-limit", str(PRICE), "--period", "total")
    account = account_of(books, email)
    (header,) = sign(box, wallet, path)
    held = Held(place.submitter, lambda: pay(box, path, header, key))
    box.set_up("credits", "grant", email, str(PRICE))
    assert box.post("/api/v1/up/ok/elsewhere", key).status == 200
    check_credited(held.answer(), 403, "credit_limit_reached")
    assert balance(books, account) == (PRICE, 0)
    assert upstream.hits("/ok/limit") == []
    assert pay(box, path, header, box.key(email)).status == 200
    assert balance(books, account) == (0, 0)


def test_who_signs_out_while_their_payment_is_settled_loses_no_money(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm", PRICE), "/api/v1/up/ok/signed-out"
    email, key = box.account(credits=0)
    token = box.set_up("tokens", "mint", email)
    (header,) = sign(box, wallet, path)
    held = Held(place.submitter, lambda: pay(box, path, header, token))
    assert box.request("DELETE", "/api/v1/session-tokens/current", key=token).status == 204
    check_credited(held.answer(), 401, "invalid_token")
    assert upstream.hits("/ok/signed-out") == []
    assert balance(books, account_of(books, email)) == (PRICE, 0)
    assert pay(box, path, header, key).status == 200, "it is the account that has paid"
    assert balance(books, account_of(books, email)) == (0, 0)


@pytest.mark.parametrize("what", ["revoked", "suspended", "closed"])
def test_a_top_up_is_credited_whatever_happens_to_the_account_meanwhile(
    box: Farebox, books: Books, place: Market, what: str
) -> None:
    wallet = place.wallet("evm", 100)
    email, key = box.account(credits=0)
    account, now = account_of(books, email), clock.now_ms()
    (header,) = sign(box, wallet, TOP_UP)
    held = Held(place.submitter, lambda: pay(box, TOP_UP, header, key))
    changes: dict[str, Callable[[Tx], object]] = {
        "revoked": lambda tx: keys.revoke(tx, key_id_of(books, account), now, SYSTEM),
        "suspended": lambda tx: ledger.suspend_account(tx, account, "abuse", now, SYSTEM),
        "closed": lambda tx: ledger.close_account(tx, account, now, SYSTEM),
    }
    books.db.write(changes[what])
    answer = held.answer()
    assert (answer.status, answer.json()["creditsAdded"]) == (200, 100)
    assert receipt_of(answer)["success"] is True
    assert balance(books, account) == (100, 0)


def test_an_account_with_too_many_calls_when_its_payment_is_settled_loses_no_money(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm", 2 * PRICE), "/api/v1/up/ok/many"
    email, key = box.account(credits=0)
    account = account_of(books, email)
    late, header = sign(box, wallet, path, 2)
    held = Held(place.submitter, lambda: pay(box, path, header, key))
    box.set_up("credits", "grant", email, str(2 * PRICE))
    others = [Background(partial(box.post, f"/api/v1/up/gated/many/{n}", key)) for n in range(2)]
    upstream.wait_for(2, "/gated/many")
    # Whoever has too many calls already is not let pay at all.
    assert pay(box, path, late, key).code == "rate_limited"
    check_credited(held.answer(), 429, "rate_limited")
    upstream.gate("many").open()
    assert [other.result().status for other in others] == [200, 200]
    assert balance(books, account) == (PRICE, 0)
    assert place.submitter.calls["settle"] == 1
    assert pay(box, path, header, key).status == 200
    assert balance(books, account) == (0, 0)


def test_a_wallet_with_too_many_calls_is_not_let_pay_for_another(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm", 3 * PRICE), "/api/v1/up/ok/third"
    running = []
    for number in range(2):
        gated = f"/api/v1/up/gated/two/{number}"
        (header,) = sign(box, wallet, gated)
        running.append(Background(partial(pay, box, gated, header)))
        upstream.wait_for(number + 1, "/gated/two")
    (header,) = sign(box, wallet, path)
    refused = pay(box, path, header)
    assert (refused.status, refused.code) == (429, "rate_limited")
    assert place.submitter.calls["settle"] == 2
    upstream.gate("two").open()
    assert [call.result().status for call in running] == [200, 200]
    assert pay(box, path, header).status == 200
    assert (books.credits(wallet), place.left(wallet)) == (0, 0)


def test_whoever_leaves_while_their_payment_is_settled_gets_their_answer_later(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm", PRICE), "/api/v1/up/ok/left"
    (header,) = sign(box, wallet, path)
    connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=30)

    def send_and_leave() -> Answer:
        sent = {"PAYMENT-SIGNATURE": header, "Content-Type": "application/json"}
        connection.request("POST", path, b"{}", sent)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.getresponse()
        return Answer(0, box.get("/healthz").headers, b"")

    held = Held(place.submitter, send_and_leave)
    assert connection.sock is not None
    connection.sock.shutdown(2)
    held.answer()
    until(lambda: pay(box, path, header).status == 200, what="the answer can be had")
    connection.close()
    assert len(upstream.hits("/ok/left")) == 1
    assert (books.credits(wallet), place.left(wallet)) == (0, 0)


def test_credits_that_come_meanwhile_do_not_make_a_payment_pay_twice(
    box: Farebox, books: Books, place: Market, upstream: Upstream
) -> None:
    wallet, path = place.wallet("evm", PRICE), "/api/v1/up/ok/granted"
    email, key = box.account(credits=0)
    (header,) = sign(box, wallet, path)
    held = Held(place.submitter, lambda: pay(box, path, header, key))
    box.set_up("credits", "grant", email, "10")
    # The same again could be paid with credits now; but its payment is being taken for it.
    assert pay(box, path, header, key).code == "payment_in_progress"
    assert held.answer().status == 200
    assert balance(books, account_of(books, email)) == (10, 0)
    assert pay(box, path, header, key).headers["Idempotent-Replayed"] == "true"
    assert len(upstream.hits("/ok/granted")) == 1


# A payer whose account is opened between two looks at it


class Wavering(Settler):
    """Says nothing of a payment the first time, and later waits for the gate `settle`."""

    def respond(self, exchange: Exchange) -> None:
        if exchange.hit.path.endswith("/settle"):
            if len(self.hits("/settle")) == 1:
                exchange.close()
                return
            if not self.gate("settle").wait(exchange.wanted):
                raise Gone
        super().respond(exchange)


class Queue:
    """Keeps everybody waiting who wants to write, in the order in which they came."""

    def __init__(self, box: Box) -> None:
        self._db = box.instance.db
        self._entered, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: self._db.write(self._wait), daemon=True)
        self._thread.start()
        assert self._entered.wait(10)

    def _wait(self, tx: object) -> None:
        self._entered.set()
        assert self._go.wait(30)

    def until_waiting(self, count: int) -> None:
        until(lambda: len(self._db._queue) >= count, what=f"{count} wait to write")

    def go(self) -> None:
        self._go.set()
        self._thread.join(10)


def test_a_payment_shown_again_as_its_credits_are_entered_is_served(
    tmp_path: Path, upstream: Upstream
) -> None:
    with Wavering() as settler:
        toml = routes_toml(upstream) + x402_toml(settler.url, {BASE: PAY_TO}, {})
        with Box(tmp_path / "instance", toml) as box:
            path = "/api/v1/up/ok/again"
            header = EvmWallet().header(challenge_of(box.post(path)))
            assert box.post(path, PAYMENT_SIGNATURE=header).code == "payment_unconfirmed"
            looking = threading.Thread(target=lambda: list(reconciler.look_now(box.instance)))
            looking.start()
            settler.wait_for(2, "/settle")
            queue = Queue(box)
            settler.gate("settle").open()
            queue.until_waiting(1)  # the credits
            # Who pays has no account yet, and will have one when it is this request's turn.
            again = Background(lambda: box.post(path, PAYMENT_SIGNATURE=header))
            queue.until_waiting(2)
            queue.go()
            looking.join(10)
            answer = again.result()
            assert (answer.status, len(upstream.hits("/ok/again"))) == (200, 1), answer.body
