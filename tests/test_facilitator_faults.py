"""A facilitator that fails, lies or dies, and nodes that do: no payment is lost, none counts twice.

The money is real: it moves on the chains of the tests, or it does not, and that alone decides in
the end. `moved` says whether it did before the facilitator fell into its fault. One shop has nodes
to ask (`rpc`), the other is blind and has only the facilitator's word.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import StartFarebox
from doubles import Exchange, Server, Upstream
from evm_chain import ANYBODY, USDC, EvmChain
from facilitator import DROP, RESET, Asked, Facilitator, Hook, Reply
from payers import EvmWallet, SolanaWallet, decode
from rpc_server import RpcError, RpcServer
from server import Answer, until
from shop import PRICE, TOP_UP, TOP_UP_BODY, TOP_UP_UNITS, UNITS, Sale, Shop, Stall, config, rich
from solana_node import SolanaNode
from solders.signature import Signature
from urllib3.exceptions import HTTPError

import models
from core import clock, upkeep
from core.payments import chain, desk
from core.payments import facilitator as client

INVENTED = f"0x{'ab' * 32}"


class Node(RpcServer):
    """A node of an EVM chain, with a will of its own."""

    def __init__(self, evm: EvmChain) -> None:
        super().__init__()
        self.evm = evm
        self.instead: Reply | None = None  # of every answer
        self.lag_at: int | None = None  # the last block it knows
        self.lags: set[str] = set()  # the methods that lag

    def respond(self, exchange: Exchange) -> None:
        if self.instead is None:
            super().respond(exchange)
        elif self.instead.how == "close":
            exchange.close()
        else:
            exchange.answer(self.instead.status, self.instead.body)

    def handle(self, method: str, params: list[Any]) -> Any:
        if self.lag_at is not None and method in self.lags:
            if method == "eth_blockNumber":
                return hex(self.lag_at)
            blocks = [each for each in params if re.fullmatch("0x[0-9a-f]{1,16}", str(each))]
            if any(int(each, 16) > self.lag_at for each in blocks):
                raise RpcError("header not found")
            params = [hex(self.lag_at) if param == "latest" else param for param in params]
            if method == "eth_getTransactionReceipt":
                receipt = self.evm.rpc(method, *params)
                known = receipt is not None and int(receipt["blockNumber"], 16) <= self.lag_at
                return receipt if known else None
        return self.evm.rpc(method, *params)

    def be_well(self) -> None:
        self.instead, self.lag_at, self.lags = None, None, set()
        self.no_more_failures()


@pytest.fixture(scope="module")
def evm() -> Iterator[EvmChain]:
    with EvmChain() as chain:
        yield chain


@pytest.fixture(scope="module")
def later() -> Iterator[EvmChain]:
    """A chain of its own, whose clock goes on when a test says so."""
    with EvmChain() as chain:
        yield chain


@pytest.fixture(scope="module")
def solana_chain() -> Iterator[SolanaNode]:
    with SolanaNode() as node:
        yield node


@pytest.fixture(scope="module")
def nodes(evm: EvmChain, later: EvmChain) -> Iterator[dict[str, Node]]:
    with Node(evm) as here, Node(later) as there:
        yield {"rpc": here, "later": there}


@pytest.fixture(scope="module")
def facilitator_of_all(evm: EvmChain, solana_chain: SolanaNode) -> Iterator[Facilitator]:
    with Facilitator(evm=evm, solana=solana_chain, confirm_seconds=0.4) as facilitator:
        yield facilitator


@pytest.fixture(scope="module")
def shops(
    tmp_path_factory: pytest.TempPathFactory,
    evm: EvmChain,
    solana_chain: SolanaNode,
    nodes: dict[str, Node],
    facilitator_of_all: Facilitator,
    upstream_server: Upstream,
) -> Iterator[dict[str, Shop]]:
    """`rpc` and `blind`; `later`, whose node is of the chain of that name."""
    folder = tmp_path_factory.mktemp("shops")
    rpcs = {
        "rpc": {evm.network: nodes["rpc"].url, solana_chain.network: solana_chain.url},
        "blind": {},
        "later": {evm.network: nodes["later"].url},
    }
    with contextlib.ExitStack() as stack:
        made = {}
        for name, rpc in rpcs.items():
            payee = SolanaWallet(solana_chain).address
            solana_chain.set_tokens(payee, 0)
            pay_to = {evm.network: EvmWallet().address, solana_chain.network: payee}
            toml = config(upstream_server, facilitator_of_all.url, pay_to, rpc)
            made[name] = stack.enter_context(Shop(folder / name, toml, upstream_server))
        yield made


@pytest.fixture(autouse=True)
def nobody_waits_long(
    monkeypatch: pytest.MonkeyPatch, nodes: dict[str, Node], solana_chain: SolanaNode
) -> Iterator[None]:
    """Patience is a matter of seconds here and of tenths there; what happens after it is not."""
    assert client._SETTLE_SECONDS == 60.0
    monkeypatch.setattr(desk, "_CONFIRM_SECONDS", 0.2)
    monkeypatch.setattr(desk, "_CONFIRM_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(chain, "_PATIENCE_SECONDS", 1.0)
    yield
    for node in nodes.values():
        node.be_well()
    solana_chain.no_more_failures()
    solana_chain.before_landing = None
    solana_chain.resume()


@pytest.fixture
def facilitator(facilitator_of_all: Facilitator) -> Iterator[Facilitator]:
    facilitator_of_all.forget()
    yield facilitator_of_all
    facilitator_of_all.forget()
    facilitator_of_all.mended = True


@pytest.fixture
def shop(shops: dict[str, Shop]) -> Shop:
    """The one with nodes."""
    return shops["rpc"]


@pytest.fixture
def blind(shops: dict[str, Shop]) -> Shop:
    return shops["blind"]


@pytest.fixture
def solana(solana_chain: SolanaNode) -> SolanaNode:
    return solana_chain


def poor(solana: SolanaNode, units: int = 10 * UNITS) -> SolanaWallet:
    """Somebody new who can pay on Solana."""
    wallet = SolanaWallet(solana)
    solana.set_tokens(wallet.address, units)
    return wallet


def said(asked: Asked, **changes: Any) -> dict[str, Any]:
    """What the facilitator would say of a success, with changes."""
    told = asked.answer or {
        "success": True,
        "transaction": INVENTED,
        "network": asked.requirements["network"],
        "payer": "0x" + "0" * 40,
    }
    return {name: value for name, value in (told | changes).items() if value is not None}


def failed(reason: str | None, transaction: str = "") -> Hook:
    return lambda asked: Reply.json(
        {
            "success": False,
            "transaction": transaction,
            "network": asked.requirements["network"],
        }
        | ({} if reason is None else {"errorReason": reason})
    )


def cut(asked: Asked) -> Reply:
    body = json.dumps(said(asked)).encode()
    return Reply(200, body[:-9], declared=len(body))


def truncated(asked: Asked) -> Reply:
    return Reply(200, json.dumps(said(asked)).encode()[:-9])


# What a facilitator may answer, or do instead, that tells nobody what became of the payment.
VAGUE: dict[str, Hook] = {
    "closes": lambda asked: DROP,
    "resets": lambda asked: RESET,
    "502 and a page": lambda asked: Reply(502, b"<html><h1>Bad Gateway</h1></html>"),
    "500 and success": lambda asked: Reply.json(said(asked), 500),
    "500 and a reason": lambda asked: Reply.json(
        {"success": False, "errorReason": "insufficient_funds"}, 500
    ),
    "503 and nothing": lambda asked: Reply(503),
    "a body cut short": cut,
    "JSON cut short": truncated,
    "success as text": lambda asked: Reply.json(said(asked, success="true")),
    "success as a number": lambda asked: Reply.json(said(asked, success=1)),
    "success is null": lambda asked: Reply.json(said(asked) | {"success": None}),
    "success without a transaction": lambda asked: Reply.json(said(asked, transaction="")),
    "an unspeakable transaction": lambda asked: Reply.json(said(asked, transaction="a" * 100_000)),
    "another network": lambda asked: Reply.json(said(asked, network="eip155:1")),
    "the network's old name": lambda asked: Reply.json(said(asked, network="base")),
    "an empty body": lambda asked: Reply(200),
    "ten MiB": lambda asked: Reply(200, json.dumps(said(asked)).encode() + b" " * (10 << 20)),
    "a page": lambda asked: Reply(200, b"<html>It works!</html>"),
    "a list": lambda asked: Reply.json([said(asked)]),
    "a redirect": lambda asked: Reply(
        307, json.dumps(said(asked)).encode(), [("Location", "/settle")]
    ),
    "pending, with a transaction": lambda asked: Reply.json(
        said(asked, success=False, errorReason="settlement_pending")
    ),
    "pending, without": failed("settlement_pending"),
    "duplicate": failed("duplicate_settlement"),
    "a nonce already used": failed("invalid_exact_evm_nonce_already_used"),
    "a simulation that fails": failed("invalid_exact_evm_transaction_simulation_failed"),
    "an unknown reason": failed("the_moon_is_full"),
    "no reason": failed(None),
    "a refusal with a transaction": failed("invalid_payload", INVENTED),
}


def refuses_to_be_asked_again(sale: Sale, facilitator: Facilitator, payment_id: str) -> None:
    """Whatever is sent while nobody knows, no second payment is asked for or tried."""
    settles = facilitator.calls["settle"]
    again = sale.send()
    assert (again.status, again.code) == (503, "payment_unconfirmed")
    assert again.json()["payment"] == payment_id
    other = sale.send(sale.path + "-other")
    assert (other.status, other.code) == (409, "payment_already_used")
    for answer in (again, other):
        assert "PAYMENT-REQUIRED" not in answer.headers and "accepts" not in answer.json()
    assert facilitator.calls["settle"] == settles
    assert sale.served == 0 and sale.shop.deposits(payment_id) == 0


def left_open(sale: Sale, answer: Answer) -> str:
    """The id of a payment whose outcome is unknown, as the client is told."""
    assert (answer.status, answer.code) == (503, "payment_unconfirmed"), answer.body
    assert "PAYMENT-REQUIRED" not in answer.headers and "accepts" not in answer.json()
    assert "PAYMENT-RESPONSE" not in answer.headers and answer.headers["Retry-After"]
    record = sale.record
    assert (record.status, record.id) == ("unknown", answer.json()["payment"])
    return record.id


def is_served_once(sale: Sale, moved: int) -> None:
    """The payment has moved the money once, is entered once, and pays for its request once."""
    record = sale.record
    assert record.status == "settled" and moved == record.amount
    assert sale.shop.deposits(record.id) == 1
    for time in range(3):
        answer = sale.send()
        assert answer.status == 200, answer.body
        assert time == 0 or answer.headers["Idempotent-Replayed"] == "true"
        assert decode(answer.headers["PAYMENT-RESPONSE"])["transaction"] == record.transaction_id
    other = sale.send(sale.path + "-other")
    assert (other.status, other.code) == (409, "payment_already_used")
    assert sale.served == 1 and sale.shop.credits_of(sale.wallet) == 0
    assert sale.shop.deposits(record.id) == 1 and sale.shop.faults() == []


@pytest.mark.parametrize("fault", list(VAGUE)[::2])
def test_money_that_moved_is_seen_on_the_network_whatever_the_facilitator_says(
    shop: Shop, evm: EvmChain, facilitator: Facilitator, fault: str
) -> None:
    wallet = rich(evm, UNITS)
    sale = Sale(shop, wallet)
    facilitator.after_settle = VAGUE[fault]
    answer = sale.send()
    assert answer.status == 200, answer.body
    assert evm.authorization_used(wallet.address, facilitator.settles[-1].payload["payload"]
                                  ["authorization"]["nonce"])  # fmt: skip
    is_served_once(sale, UNITS - evm.balance(wallet.address))
    assert facilitator.calls["settle"] == 1


@pytest.mark.parametrize("fault", VAGUE)
def test_what_nobody_understands_stays_open_until_the_payment_is_settled(
    shop: Shop, evm: EvmChain, facilitator: Facilitator, fault: str
) -> None:
    wallet = rich(evm, UNITS)
    sale = Sale(shop, wallet)
    facilitator.before_settle = VAGUE[fault]
    payment_id = left_open(sale, sale.send())
    refuses_to_be_asked_again(sale, facilitator, payment_id)
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "unknown"
    refuses_to_be_asked_again(sale, facilitator, payment_id)
    assert evm.balance(wallet.address) == UNITS
    facilitator.forget()
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "settled"
    assert shop.look(payment_id) == []
    assert facilitator.calls["settle"] == 1 and sale.served == 0
    is_served_once(sale, UNITS - evm.balance(wallet.address))


ALMOST_A_SUCCESS = [
    "closes", "500 and success", "JSON cut short", "success as text", "success as a number",
    "success without a transaction", "an unspeakable transaction", "another network",
    "the network's old name", "ten MiB", "a list", "a redirect", "pending, with a transaction",
    "a nonce already used",
]  # fmt: skip


@pytest.mark.parametrize("fault", ALMOST_A_SUCCESS)
def test_without_a_node_only_a_success_ends_the_doubt(
    blind: Shop, evm: EvmChain, facilitator: Facilitator, fault: str
) -> None:
    wallet = rich(evm, UNITS)
    sale = Sale(blind, wallet)
    facilitator.after_settle = VAGUE[fault]
    payment_id = left_open(sale, sale.send())
    assert evm.balance(wallet.address) == 0
    answered = facilitator.settles[0].answer
    facilitator.forget()
    (verdict,) = blind.look(payment_id)  # it says that the nonce was used: so it was, by us
    assert verdict.outcome == "unknown"
    assert facilitator.settles[0].answer is not None
    assert facilitator.settles[0].answer["success"] is False
    refuses_to_be_asked_again(sale, facilitator, payment_id)
    facilitator.before_settle = lambda asked: Reply.json(answered)
    # Who has paid may have nothing left, and that is no reason not to ask for the end.
    facilitator.before_verify = lambda asked: Reply.json(
        {"isValid": False, "invalidReason": "insufficient_funds"}
    )
    (verdict,) = blind.look(payment_id)
    assert verdict.outcome == "settled"
    is_served_once(sale, UNITS)


def test_a_facilitator_is_waited_for_and_then_not_any_more(
    shop: Shop, blind: Shop, evm: EvmChain, facilitator: Facilitator, monkeypatch: Any
) -> None:
    monkeypatch.setattr(client, "_SETTLE_SECONDS", 0.3)
    over = threading.Event()

    def hang(asked: Asked) -> Reply | None:
        over.wait(20)
        return None

    try:
        sales = [Sale(where, rich(evm, UNITS)) for where in (shop, blind)]
        facilitator.before_settle = hang
        ids = [left_open(sale, sale.send()) for sale in sales]
        facilitator.before_settle, facilitator.after_settle = None, hang
        seen = Sale(shop, rich(evm, UNITS))
        assert seen.send().status == 200
    finally:
        over.set()
    # What hung is settled after all, when nobody listens any more.
    until(lambda: all(evm.balance(sale.wallet.address) == 0 for sale in sales))
    facilitator.forget()
    (verdict,) = shop.look(ids[0])
    assert verdict.outcome == "settled" and facilitator.calls["settle"] == 0
    is_served_once(sales[0], UNITS)
    (verdict,) = blind.look(ids[1])
    assert verdict.outcome == "unknown"


REASONS = [
    "invalid_payload",
    "invalid_exact_evm_insufficient_balance",
    "insufficient_funds",
    "invalid_exact_evm_payload_signature",
    "invalid_scheme",
    "unsupported_scheme",
    "network_mismatch",
    "missing_eip712_domain",
]


@pytest.mark.parametrize("where", ["rpc", "blind"])
@pytest.mark.parametrize("reason", REASONS)
def test_a_definite_refusal_is_told_and_the_payment_can_be_tried_again(
    shops: dict[str, Shop], evm: EvmChain, facilitator: Facilitator, reason: str, where: str
) -> None:
    shop = shops[where]
    wallet = rich(evm, UNITS)
    sale = Sale(shop, wallet)
    for status in (200, 400, 402):
        facilitator.before_settle = lambda asked, status=status: Reply.json(
            {"success": False, "errorReason": reason, "transaction": "", "network": evm.network},
            status,
        )
        answer = sale.send()
        assert (answer.status, answer.code) == (402, "payment_invalid")
        assert answer.json()["reason"] == reason
        assert decode(answer.headers["PAYMENT-REQUIRED"])["accepts"]
        told = decode(answer.headers["PAYMENT-RESPONSE"])
        assert told == {
            "success": False, "errorReason": reason, "transaction": "", "network": evm.network,
            "payer": wallet.address,
        }  # fmt: skip
        assert sale.record.status == "refused" and shop.look(sale.record.id) == []
        assert evm.balance(wallet.address) == UNITS and shop.credits_of(wallet) is None
    facilitator.forget()
    assert sale.send().status == 200
    is_served_once(sale, UNITS - evm.balance(wallet.address))


@pytest.mark.parametrize("where", ["rpc", "blind"])
def test_whoever_has_no_money_can_pay_with_the_same_signature_when_they_have(
    shops: dict[str, Shop], evm: EvmChain, facilitator: Facilitator, where: str
) -> None:
    """A transaction was made in vain where a node tells so; without one it is asked for before."""
    shop, wallet = shops[where], EvmWallet()
    sale = Sale(shop, wallet)
    answer = sale.send()
    assert (answer.status, answer.code) == (402, "payment_invalid")
    reasons = {"rpc": "transaction_failed", "blind": "invalid_exact_evm_insufficient_balance"}
    assert answer.json()["reason"] == reasons[where]
    assert facilitator.calls["settle"] == (where == "rpc")
    assert decode(answer.headers["PAYMENT-RESPONSE"])["success"] is False
    evm.mint(wallet.address, UNITS)
    assert sale.send().status == 200
    is_served_once(sale, UNITS)


@pytest.mark.parametrize("lie", ["another's", "its own, and it moved"])
def test_a_transaction_that_failed_proves_nothing_unless_it_was_this_payments(
    shop: Shop, evm: EvmChain, facilitator: Facilitator, lie: str
) -> None:
    broke = Sale(shop, EvmWallet())
    assert broke.send().code == "payment_invalid"
    answer = facilitator.settles[0].answer
    assert answer is not None
    sale = Sale(shop, rich(evm, UNITS))
    if lie == "another's":
        facilitator.before_settle = failed("transaction_failed", answer["transaction"])
        payment_id = left_open(sale, sale.send())
        facilitator.forget()
        shop.look(payment_id)
    else:
        facilitator.after_settle = lambda asked: Reply.json(
            said(asked, success=False, errorReason="transaction_failed")
        )
        assert sale.send().status == 200
    is_served_once(sale, UNITS)


def test_without_a_node_a_transaction_made_in_vain_is_not_believed(
    blind: Shop, evm: EvmChain, facilitator: Facilitator
) -> None:
    sale = Sale(blind, rich(evm, UNITS))
    facilitator.before_settle = failed("transaction_failed", INVENTED)
    refuses_to_be_asked_again(sale, facilitator, left_open(sale, sale.send()))


def invalid(reason: str | None, status: int = 200) -> Hook:
    return lambda asked: Reply.json({"isValid": False, "invalidReason": reason}, status)


# What `/verify` may answer that refuses nothing.
NO_OBJECTION: dict[str, Hook] = {
    "closes": VAGUE["closes"],
    "a page": VAGUE["a page"],
    "another shape": VAGUE["success as text"],
    "a number": lambda asked: Reply.json({"isValid": 0, "invalidReason": "invalid_payload"}),
    "no reason": invalid(None),
    "an unknown reason": invalid("the_moon_is_full"),
    "perhaps it was sent": invalid("invalid_exact_evm_nonce_already_used"),
    "its own fault": invalid("invalid_payload", 500),
    "valid for a reason": lambda asked: Reply.json(
        {"isValid": True, "invalidReason": "invalid_payload"}
    ),
}


@pytest.mark.parametrize("verifies", NO_OBJECTION)
def test_what_is_said_before_the_settlement_is_a_refusal_or_nothing(
    blind: Shop, evm: EvmChain, facilitator: Facilitator, verifies: str
) -> None:
    sale = Sale(blind, rich(evm, UNITS))
    facilitator.before_verify = NO_OBJECTION[verifies]
    assert sale.send().status == 200
    is_served_once(sale, UNITS)


def test_what_is_signed_anew_under_the_same_nonce_is_claimed_as_it_is_now(
    shop: Shop, evm: EvmChain, facilitator: Facilitator
) -> None:
    wallet = EvmWallet()
    nonce = f"0x{'5e' * 32}"
    soon = int(clock.now_ms() / 1000) + 30
    call = Sale(shop, wallet, signed={"nonce": nonce, "validBefore": str(soon)})
    assert call.send().code == "payment_invalid"
    before = call.record
    evm.mint(wallet.address, TOP_UP_UNITS)
    top_up = Sale(shop, wallet, TOP_UP, TOP_UP_BODY, signed={"nonce": nonce})
    assert top_up.send().json()["creditsAdded"] == 20
    after = top_up.record
    assert (after.id, after.created_at) == (before.id, before.created_at)
    assert (before.amount, before.credits) == (UNITS, PRICE)
    assert (after.amount, after.credits, after.status) == (TOP_UP_UNITS, 20, "settled")
    assert before.expires_at == soon * 1000 and after.expires_at != before.expires_at
    assert evm.balance(wallet.address) == 0 and shop.credits_of(wallet) == 20


def was_not_sent(shop: Shop, wallet: EvmWallet) -> bool:
    """Whether the claim was let go of a payment that never left."""
    return [(each.status, each.reason) for each in shop.payments(wallet)] == [
        ("refused", "not_sent")
    ]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 407, 429])
def test_a_facilitator_that_does_not_know_us_has_not_read_the_payment(
    shop: Shop, evm: EvmChain, facilitator: Facilitator, status: int
) -> None:
    wallet = rich(evm, UNITS)
    sale = Sale(shop, wallet)
    facilitator.before_settle = lambda asked: Reply.json({"success": True}, status)
    answer = sale.send()
    assert (answer.status, answer.code) == (503, "facilitator_unavailable")
    assert answer.headers["Retry-After"] and "PAYMENT-REQUIRED" not in answer.headers
    assert was_not_sent(shop, wallet)
    facilitator.forget()
    assert sale.send().status == 200
    is_served_once(sale, UNITS)


def test_a_facilitator_that_is_away_has_not_read_the_payment(
    shop: Shop, evm: EvmChain, facilitator: Facilitator
) -> None:
    wallet = rich(evm, UNITS)
    sale, top_up = Sale(shop, wallet), Sale(shop, rich(evm), TOP_UP, TOP_UP_BODY)
    with facilitator.unreachable():
        for refused in (sale, top_up):
            answer = refused.send(Idempotency_Key="k")
            assert (answer.status, answer.code) == (503, "facilitator_unavailable")
            assert answer.headers["Retry-After"] and was_not_sent(shop, refused.wallet)
    assert sale.send().status == top_up.send().status == 200
    is_served_once(sale, UNITS)


class Plain(Server):
    """What answers a greeting of TLS in plain words."""

    def _serve(self, sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        sock.close()


def test_a_facilitator_that_does_not_speak_tls_has_not_read_the_payment(
    tmp_path: Path, evm: EvmChain, upstream: Upstream
) -> None:
    pay_to = {evm.network: EvmWallet().address}
    with Plain() as plain:
        toml = config(upstream, plain.url.replace("http://", "https://"), pay_to, {})
        with Shop(tmp_path / "shop", toml, upstream) as shop:
            wallet = rich(evm)
            answer = Sale(shop, wallet).send()
            assert (answer.status, answer.code) == (503, "facilitator_unavailable")
            assert was_not_sent(shop, wallet)
        assert plain.accepted


# Lies.


def test_a_success_that_the_network_does_not_show_serves_nothing(
    shop: Shop, evm: EvmChain, facilitator: Facilitator
) -> None:
    wallet = rich(evm, UNITS)
    sale = Sale(shop, wallet)
    honest = Sale(shop, rich(evm, UNITS))
    assert honest.send().status == 200
    for transaction in (INVENTED, str(honest.record.transaction_id), "nonsense"):
        facilitator.before_settle = lambda asked, transaction=transaction: Reply.json(
            said(asked, transaction=transaction)
        )
        if sale.shop.payments(wallet):
            (verdict,) = shop.look(sale.record.id)
            assert verdict.outcome == "unknown"
        else:
            left_open(sale, sale.send())
        refuses_to_be_asked_again(sale, facilitator, sale.record.id)
    facilitator.forget()
    (verdict,) = shop.look(sale.record.id)
    assert verdict.outcome == "settled" and verdict.transaction != honest.record.transaction_id
    is_served_once(sale, UNITS)


@pytest.mark.parametrize("reason", ["invalid_payload", "insufficient_funds"])
def test_a_refusal_of_money_that_moved_is_found_out(
    shop: Shop, evm: EvmChain, facilitator: Facilitator, reason: str
) -> None:
    wallet = rich(evm, UNITS)
    sale = Sale(shop, wallet)
    facilitator.after_settle = failed(reason)
    assert sale.send().status == 200
    is_served_once(sale, UNITS - evm.balance(wallet.address))


@pytest.mark.parametrize("another", ["somebody's", "garbage"])
def test_the_transaction_is_the_payments_own_whatever_is_claimed(
    shop: Shop, evm: EvmChain, facilitator: Facilitator, another: str
) -> None:
    honest, sale = Sale(shop, rich(evm, UNITS)), Sale(shop, rich(evm, UNITS))
    assert honest.send().status == 200
    claimed = str(honest.record.transaction_id) if another == "somebody's" else "0xnothing"
    facilitator.after_settle = lambda asked: Reply.json(said(asked, transaction=claimed))
    assert sale.send().status == 200
    answer = facilitator.settles[-1].answer
    assert answer is not None and sale.record.transaction_id == answer["transaction"]
    is_served_once(sale, UNITS)


# Others who use what was signed.


def test_who_is_front_run_has_paid_all_the_same(
    shop: Shop, blind: Shop, evm: EvmChain, facilitator: Facilitator
) -> None:
    def front_run(asked: Asked) -> None:
        signed = asked.payload["payload"]
        evm.submit(signed["authorization"], signed["signature"])

    facilitator.before_settle = front_run
    sale = Sale(shop, rich(evm, UNITS))
    assert sale.send().status == 200
    answer = facilitator.settles[-1].answer
    assert answer is not None and answer["success"] is False
    is_served_once(sale, UNITS)
    unseen = Sale(blind, rich(evm, UNITS))
    left_open(unseen, unseen.send())


def test_who_front_runs_themselves_with_less_has_paid_nothing(
    shop: Shop, evm: EvmChain, facilitator: Facilitator
) -> None:
    """A second authorization under the same nonce, of one unit, and it is used first."""
    wallet, crony = rich(evm, 2 * UNITS), EvmWallet()
    for change in ({"value": "1"}, {"to": crony.address}, {"value": str(UNITS - 1)}):
        sale = Sale(shop, wallet)
        less = sale.signed["authorization"] | change

        def front_run(asked: Asked, less: Any = less) -> None:
            evm.submit(less, wallet.sign(less))

        facilitator.before_settle = front_run
        answer = sale.send()
        assert (answer.status, answer.code) == (402, "payment_invalid"), change
        assert sale.served == 0 and shop.credits_of(wallet) is None
        facilitator.forget()
        assert sale.send().code == "payment_invalid"
        evm.mint(wallet.address, UNITS)


@pytest.mark.parametrize("when", ["verify", "settle"])
def test_a_reason_says_what_can_be_printed(
    blind: Shop, evm: EvmChain, facilitator: Facilitator, when: str
) -> None:
    reason = "invalid_payload\x1b[2J\n\u202e" + "x" * 500
    hook: Hook = lambda asked: Reply.json(  # noqa: E731
        {"success": False, "errorReason": reason, "isValid": False, "invalidReason": reason}
    )
    setattr(facilitator, f"before_{when}", hook)
    sale = Sale(blind, rich(evm, UNITS))
    told = sale.send().json()["reason"]
    assert told == sale.record.reason and told.startswith("invalid_payload[2Jxxx")
    assert len(told) == 200 and told.isprintable()


def test_an_authorization_that_was_taken_back_pays_nothing(
    shop: Shop, blind: Shop, evm: EvmChain, facilitator: Facilitator
) -> None:
    wallet = rich(evm, UNITS)

    def take_back(asked: Asked) -> None:
        evm.cancel(wallet.account, asked.payload["payload"]["authorization"]["nonce"])

    facilitator.before_settle = take_back
    sale = Sale(shop, wallet)
    answer = sale.send()
    assert (answer.status, answer.code) == (402, "payment_invalid")
    assert sale.record.status == "refused" and sale.served == 0
    assert evm.balance(wallet.address) == UNITS
    facilitator.forget()
    again = sale.send()
    assert (again.status, again.code) == (402, "payment_invalid")
    assert Sale(shop, wallet).send().status == 200  # with another, they can pay
    facilitator.before_settle = take_back
    evm.mint(wallet.address, UNITS)
    unseen = Sale(blind, wallet)
    left_open(unseen, unseen.send())


def at_once(evm: EvmChain, *calls: str) -> None:
    """One transaction that makes these calls to the dollar: a contract that does so when it is
    made, and is nothing afterwards."""
    each, total = [], 0
    blobs = [bytes.fromhex(call.removeprefix("0x")) for call in calls]
    size = 50 * len(blobs) + 1
    for blob in blobs:
        length = len(blob).to_bytes(3)
        each.append(
            b"\x62" + length + b"\x62" + (size + total).to_bytes(3) + b"\x60\x00\x39"  # codecopy
            b"\x60\x00\x60\x00\x62" + length + b"\x60\x00\x60\x00"
            b"\x73" + bytes.fromhex(USDC[2:]) + b"\x5a\xf1\x50"  # call, pop
        )  # fmt: skip
        total += len(blob)
    code = b"".join(each)
    code += b"\x00" * (size - len(code)) + b"".join(blobs)
    sent = evm.rpc(
        "eth_sendTransaction",
        {"from": ANYBODY, "data": f"0x{code.hex()}", "gas": hex(2_000_000)},
    )
    receipt = until(lambda: evm.rpc("eth_getTransactionReceipt", sent))
    assert int(receipt["status"], 16) == 1


def test_one_transfer_does_not_pay_for_several_payments_of_its_transaction(
    shop: Shop, evm: EvmChain, facilitator: Facilitator
) -> None:
    """A payer signs two authorizations under each of two nonces, one to us and one to a crony, and
    has a transaction use both nonces: with the crony's for the first, with ours for the second."""
    wallet, crony = rich(evm, 2 * UNITS), EvmWallet()
    cheat, honest = Sale(shop, wallet), Sale(shop, wallet)
    nonce = cheat.signed["authorization"]["nonce"]
    others = wallet.authorization(
        cheat.challenge["accepts"][0], to=crony.address, nonce=nonce, value=str(UNITS)
    )
    ours = honest.signed["authorization"]

    def call(signed: dict[str, Any], signature: str) -> str:
        fields = [signed[name] for name in
                  ("from", "to", "value", "validAfter", "validBefore", "nonce")]  # fmt: skip
        return evm._call_data(
            "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,bytes)",
            *fields,
            bytes.fromhex(signature.removeprefix("0x")),
        )

    calls = [call(others, wallet.sign(others)), call(ours, wallet.sign(ours))]

    def cheating(asked: Asked) -> None:
        if evm.balance(wallet.address):
            at_once(evm, *calls)

    facilitator.before_settle = cheating
    answer = cheat.send()
    assert evm.balance(wallet.address) == 0 and evm.balance(crony.address) == UNITS
    assert (answer.status, answer.code) == (402, "payment_invalid"), answer.body
    assert honest.send().status == 200
    entered = [each.status for each in shop.payments(wallet)]
    assert entered == ["settled", "refused"] and (cheat.served, honest.served) == (0, 1)


def test_what_was_used_before_it_was_shown_here_paid_for_something_else(
    shops: dict[str, Shop], later: EvmChain, facilitator: Facilitator, monkeypatch: Any
) -> None:
    """As when two instances have one address to be paid at, which they must not: what is shown to
    both within the seconds by which clocks may differ is not told apart, and counts twice."""
    shop = shops["later"]
    sale = Sale(shop, rich(later))
    signed = sale.signed
    later.submit(signed["authorization"], signed["signature"])
    now = clock.now_ms
    monkeypatch.setattr(clock, "now_ms", lambda: now() + 30_000)
    facilitator.before_settle = VAGUE["a nonce already used"]
    # As long as the network seems to be behind, it may be our clock that is wrong.
    payment_id = left_open(sale, sale.send())
    later.advance(30)
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "refused"
    answer = sale.send()
    assert (answer.status, answer.code) == (402, "payment_invalid")
    assert shop.credits_of(sale.wallet) is None and sale.served == 0


# Time.


def test_what_is_not_mined_yet_is_waited_for(
    shop: Shop, evm: EvmChain, facilitator: Facilitator
) -> None:
    wallet = rich(evm, UNITS)
    sale = Sale(shop, wallet)
    with evm.paused():
        payment_id = left_open(sale, sale.send())
        answer = facilitator.settles[0].answer
        assert answer is not None and answer["errorReason"] == "settlement_pending"
        assert sale.record.transaction_id == answer["transaction"]
        (verdict,) = shop.look(payment_id)
        assert verdict.outcome == "unknown"
        refuses_to_be_asked_again(sale, facilitator, payment_id)
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "settled"
    is_served_once(sale, UNITS - evm.balance(wallet.address))


def test_what_is_never_mined_is_refused_when_it_cannot_be_any_more(
    shops: dict[str, Shop], later: EvmChain, facilitator: Facilitator
) -> None:
    shop = shops["later"]
    wallet = rich(later)
    ahead = later.now() - clock.now_ms() // 1000
    end = str(clock.now_ms() // 1000 + ahead + 60)
    sale = Sale(shop, wallet, signed={"validBefore": end})
    facilitator.before_settle = VAGUE["pending, without"]
    payment_id = left_open(sale, sale.send())
    later.advance(100)  # over, but not clearly
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "unknown"
    refuses_to_be_asked_again(sale, facilitator, payment_id)
    later.advance(60)
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "refused"
    answer = sale.send()
    assert (answer.status, answer.code) == (402, "payment_invalid")
    assert later.balance(wallet.address) == 10 * UNITS

    def by_hand(asked: Asked) -> Reply:
        signed = asked.payload["payload"]
        transaction = later.submit(signed["authorization"], signed["signature"])
        return Reply.json(said(asked, transaction=transaction))

    facilitator.before_settle = by_hand
    again = Sale(shop, wallet, signed={"validBefore": str(later.now() + 3600)})
    assert again.send().status == 200
    assert later.balance(wallet.address) == 9 * UNITS and shop.credits_of(wallet) == 0


@pytest.mark.parametrize("lagging", ["eth_call", "all"])
def test_a_node_that_lags_ends_no_payment(
    shops: dict[str, Shop],
    nodes: dict[str, Node],
    later: EvmChain,
    facilitator: Facilitator,
    lagging: str,
) -> None:
    """Behind one address there may be two nodes: one tells how late it is, the other what it knew
    long ago."""
    shop, node = shops["later"], nodes["later"]
    wallet = rich(later, UNITS)
    end = str(later.now() + 60)
    sale = Sale(shop, wallet, signed={"validBefore": end})
    node.lag_at = int(later.rpc("eth_blockNumber"), 16)
    node.lags = {"eth_call"} if lagging == "eth_call" else {
        "eth_call", "eth_getBlockByNumber", "eth_blockNumber", "eth_getTransactionReceipt",
    }  # fmt: skip

    def by_hand(asked: Asked) -> Reply:
        signed = asked.payload["payload"]
        later.submit(signed["authorization"], signed["signature"])
        return DROP

    facilitator.before_settle = by_hand
    payment_id = left_open(sale, sale.send())
    facilitator.before_settle = VAGUE["closes"]
    later.advance(200)
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "unknown"
    node.be_well()
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "settled"
    is_served_once(sale, UNITS)


# Nodes.

SICK: dict[str, Callable[[Node], object]] = {
    "away": lambda node: setattr(node, "instead", DROP),
    "a page": lambda node: setattr(node, "instead", Reply(200, b"<html>cloudy</html>")),
    "429": lambda node: setattr(node, "instead", Reply(429, b"{}")),
    "nothing": lambda node: setattr(node, "instead", Reply(200, b"")),
    "a list": lambda node: setattr(node, "instead", Reply(200, b"[]")),
    "a result of null": lambda node: setattr(node, "instead", Reply(200, b'{"result": null}')),
    "another shape": lambda node: setattr(node, "instead", Reply(200, b'{"result": {"a": 1}}')),
    "a text": lambda node: setattr(node, "instead", Reply(200, b'{"result": "0x"}')),
    "a number": lambda node: setattr(node, "instead", Reply(200, b'{"result": 7}')),
    "an error": lambda node: setattr(
        node, "instead", Reply(200, b'{"result": "0x0", "error": {"code": -32000}}')
    ),
    "no blocks": lambda node: node.fail("eth_getBlockByNumber", 99, how="null"),
    "no calls": lambda node: node.fail("eth_call", 99),
    "no receipts": lambda node: node.fail("eth_getTransactionReceipt", 99),
    "receipts unknown": lambda node: node.fail("eth_getTransactionReceipt", 99, how="null"),
    "answers cut off": lambda node: node.fail("eth_call", 99, how="cut"),
}


@pytest.mark.parametrize("sick", SICK)
def test_where_there_is_a_node_a_settlement_counts_when_the_node_shows_it(
    shop: Shop, nodes: dict[str, Node], evm: EvmChain, facilitator: Facilitator, sick: str
) -> None:
    wallet = rich(evm, UNITS)
    sale = Sale(shop, wallet)
    SICK[sick](nodes["rpc"])
    payment_id = left_open(sale, sale.send())
    assert evm.balance(wallet.address) == 0
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "unknown"
    refuses_to_be_asked_again(sale, facilitator, payment_id)
    nodes["rpc"].be_well()
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "settled" and facilitator.calls["settle"] == 1
    is_served_once(sale, UNITS)


def test_a_frozen_network_ends_no_payment(
    shop: Shop, evm: EvmChain, facilitator: Facilitator, monkeypatch: Any
) -> None:
    monkeypatch.setattr(chain, "_PATIENCE_SECONDS", 0.2)
    wallet = rich(evm, UNITS)
    sale = Sale(shop, wallet)
    with contextlib.ExitStack() as frozen:

        def freeze(asked: Asked) -> None:
            frozen.enter_context(evm.frozen())

        facilitator.after_settle = freeze
        payment_id = left_open(sale, sale.send())
        (verdict,) = shop.look(payment_id)
        assert verdict.outcome == "unknown"
    facilitator.forget()
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "settled"
    is_served_once(sale, UNITS)


def test_a_node_of_another_network_proves_nothing(
    shops: dict[str, Shop], nodes: dict[str, Node], later: EvmChain, facilitator: Facilitator
) -> None:
    shop, node = shops["later"], nodes["later"]
    sale = Sale(shop, rich(later), signed={"validBefore": str(clock.now_ms() // 1000 + 30)})
    later.advance(200)
    facilitator.before_settle = VAGUE["closes"]
    later.rpc("anvil_setChainId", 84532)
    try:
        payment_id = left_open(sale, sale.send())
        assert sale.record.reason is not None
        (verdict,) = shop.look(payment_id)
        assert verdict.outcome == "unknown" and "another network" in verdict.reason
    finally:
        later.rpc("anvil_setChainId", 8453)
    assert node.calls["eth_chainId"]
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "refused"


# Solana.


@pytest.mark.parametrize(
    "fault", ["closes", "502 and a page", "success as text", "success without a transaction",
              "pending, without", "duplicate", "another network", "no reason"]
)  # fmt: skip
@pytest.mark.parametrize("moved", [True, False], ids=["moved", "not moved"])
def test_a_payment_on_solana_is_found_by_what_was_signed(
    shop: Shop, solana: SolanaNode, facilitator: Facilitator, fault: str, moved: bool
) -> None:
    wallet = poor(solana, UNITS)
    sale = Sale(shop, wallet)
    if moved:
        facilitator.after_settle = VAGUE[fault]
        assert sale.send().status == 200
    else:
        facilitator.before_settle = VAGUE[fault]
        payment_id = left_open(sale, sale.send())
        refuses_to_be_asked_again(sale, facilitator, payment_id)
        facilitator.forget()
        (verdict,) = shop.look(payment_id)
        assert verdict.outcome == "settled"
    is_served_once(sale, UNITS - solana.tokens(wallet.address))


@pytest.mark.parametrize("claimed", ["invented", "somebody's", "nonsense"])
def test_a_success_on_solana_that_the_network_does_not_show_serves_nothing(
    shop: Shop, solana: SolanaNode, facilitator: Facilitator, claimed: str
) -> None:
    transaction = str(Signature.from_bytes(b"\7" * 64)) if claimed == "invented" else claimed
    if claimed == "somebody's":
        honest = Sale(shop, poor(solana, UNITS))
        assert honest.send().status == 200
        transaction = str(honest.record.transaction_id)
    sale = Sale(shop, poor(solana, UNITS))
    facilitator.before_settle = lambda asked: Reply.json(said(asked, transaction=transaction))
    payment_id = left_open(sale, sale.send())
    facilitator.forget()
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "settled"
    is_served_once(sale, UNITS)


@pytest.mark.parametrize("mended", [True, False], ids=["mended", "stock"])
def test_what_lands_and_fails_serves_nothing(
    shop: Shop, solana: SolanaNode, facilitator: Facilitator, mended: bool
) -> None:
    facilitator.mended = mended
    wallet = poor(solana, UNITS)
    sale = Sale(shop, wallet)
    solana.before_landing = lambda: solana.set_tokens(wallet.address, 0)
    answer = sale.send()
    assert (answer.status, answer.code) == (402, "payment_invalid")
    answered = facilitator.settles[0].answer
    assert answered is not None and answered["success"] is not mended
    told = decode(answer.headers["PAYMENT-RESPONSE"])
    assert not told["success"] and told["transaction"] == solana.landed()[-1].signature
    assert sale.record.status == "refused" and sale.served == 0
    solana.set_tokens(wallet.address, UNITS)
    assert Sale(shop, wallet).send().status == 200


def test_a_confirmation_that_is_late_is_waited_for(
    shop: Shop, solana: SolanaNode, facilitator: Facilitator
) -> None:
    wallet = poor(solana, UNITS)
    sale = Sale(shop, wallet)
    solana.drop_confirmations(2, of_facilitator=False)
    assert sale.send().status == 200
    is_served_once(sale, UNITS - solana.tokens(wallet.address))
    late = Sale(shop, poor(solana, UNITS))
    solana.drop_confirmations(99, of_facilitator=False)
    payment_id = left_open(late, late.send())
    solana.no_more_failures()
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "settled" and facilitator.calls["settle"] == 2
    is_served_once(late, UNITS)


def test_what_cannot_land_any_more_is_refused_after_a_while(
    shop: Shop, solana: SolanaNode, facilitator: Facilitator
) -> None:
    wallet = poor(solana, UNITS)
    sale = Sale(shop, wallet)
    solana.pause()
    payment_id = left_open(sale, sale.send())
    assert solana.waiting() == 1
    shop.shift(payment_id, 200)
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "unknown", "its blockhash is good"
    shop.shift(payment_id, -200)
    solana.expire_blockhash()
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "unknown", "a node may not know the newest"
    refuses_to_be_asked_again(sale, facilitator, payment_id)
    shop.shift(payment_id, 200)
    solana.fail("getSignaturesForAddress", 1)
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "unknown", "nobody said that it has not landed"
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "refused"
    solana.resume()
    assert solana.tokens(wallet.address) == UNITS
    facilitator.forget()
    assert Sale(shop, wallet).send().status == 200


def test_what_landed_is_found_among_all_that_a_busy_payer_does(
    shop: Shop, solana: SolanaNode, facilitator: Facilitator, monkeypatch: Any
) -> None:
    monkeypatch.setattr(chain, "_SIGNATURES_AT_ONCE", 2)
    wallet = poor(solana)
    sale = Sale(shop, wallet)
    solana.fail("getSignaturesForAddress", 99)
    facilitator.after_settle = VAGUE["closes"]
    payment_id = left_open(sale, sale.send())
    solana.no_more_failures()
    facilitator.forget()
    others = [Sale(shop, wallet) for _ in range(5)]
    assert {other.send().status for other in others} == {200}
    solana.expire_blockhash()
    shop.shift(payment_id, 200)
    solana.fail("getTransaction", 3, how="null")
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "unknown" and "does not know" in verdict.reason
    solana.no_more_failures()
    monkeypatch.setattr(chain, "_MOST_SIGNATURES", 4)
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "unknown" and "too many" in verdict.reason
    monkeypatch.setattr(chain, "_MOST_SIGNATURES", 1000)
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "settled"
    assert shop.deposits(payment_id) == 1 and solana.tokens(wallet.address) == 4 * UNITS


def test_what_landed_before_it_was_shown_here_paid_for_something_else(
    shop: Shop, solana: SolanaNode, facilitator: Facilitator
) -> None:
    sale = Sale(shop, poor(solana, UNITS))
    facilitator.before_settle = VAGUE["closes"]
    payment_id = left_open(sale, sale.send())
    facilitator.forget()
    shop.shift(payment_id, -60)  # it is as if it were shown in a minute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "now_ms", lambda now=clock.now_ms: now() + 60_000)
        (verdict,) = shop.look(payment_id)
        assert verdict.outcome == "unknown" and "clock" in sale.record.reason  # type: ignore[operator]
    (verdict,) = shop.look(payment_id)
    assert verdict.outcome == "refused" and sale.served == 0


# A database in trouble.


@pytest.mark.parametrize("chain_name", ["evm", "solana"])
@pytest.mark.parametrize("purpose", ["call", "topup"])
def test_a_deposit_that_the_database_cannot_take_is_made_later(
    shop: Shop,
    evm: EvmChain,
    solana: SolanaNode,
    facilitator: Facilitator,
    monkeypatch: pytest.MonkeyPatch,
    purpose: str,
    chain_name: str,
) -> None:
    wallet = rich(evm) if chain_name == "evm" else poor(solana)
    where = () if purpose == "call" else (TOP_UP, TOP_UP_BODY)
    sale = Sale(shop, wallet, *where)
    real = models.Tx.run
    full = threading.Event()

    def run(tx: models.Tx, sql: str, params: Any = None) -> int:
        if full.is_set() and sql.startswith("INSERT INTO entry"):
            raise apsw.FullError("database or disk is full")
        return real(tx, sql, params)

    monkeypatch.setattr(models.Tx, "run", run)
    full.set()
    answer = sale.send()
    assert (answer.status, answer.code) == (503, "payment_unconfirmed")
    assert "PAYMENT-REQUIRED" not in answer.headers
    upkeep.settle_late(shop.instance)
    assert len(shop.instance.unsettled) == 1  # it is not given up
    again = sale.send()
    assert (again.status, again.code) == (409, "payment_in_progress")
    assert shop.credits_of(wallet) is None
    full.clear()
    upkeep.settle_late(shop.instance)
    assert not shop.instance.unsettled and facilitator.calls["settle"] == 1
    credits = PRICE if purpose == "call" else 20
    assert shop.credits_of(wallet) == credits and shop.deposits(sale.record.id) == 1
    answer = sale.send()
    assert answer.status == 200
    if purpose == "call":
        is_served_once(sale, UNITS)
    else:
        assert answer.headers["Idempotent-Replayed"] == "true"
        assert answer.json() == {"success": True, "creditsAdded": 20, "credits": 20}
    assert shop.faults() == []


@pytest.mark.parametrize(
    ("purpose", "fault"), [("call", ""), ("topup", "closes"), ("call", "a refusal")]
)
def test_a_database_that_fails_at_any_statement_loses_no_payment_and_doubles_none(
    shop: Shop,
    evm: EvmChain,
    facilitator: Facilitator,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    purpose: str,
) -> None:
    where = () if purpose == "call" else (TOP_UP, TOP_UP_BODY)
    units = UNITS if purpose == "call" else TOP_UP_UNITS
    left = itertools.count()
    armed = False

    def failing(name: str) -> Callable[..., Any]:
        real = getattr(models.Tx, name)

        def call(tx: models.Tx, sql: str, params: Any = None) -> Any:
            if armed and sql != "ROLLBACK" and next(left) == fail_at:
                raise apsw.IOError("a failpoint")
            return real(tx, sql, params)

        return call

    for name in ("run", "row", "rows"):
        monkeypatch.setattr(models.Tx, name, failing(name))
    by_hand: list[str] = []

    def settle(asked: Asked) -> Reply | None:
        if fault == "a refusal":
            return failed("invalid_payload")(asked)
        signed = asked.payload["payload"]
        if not evm.authorization_used(wallet.address, signed["authorization"]["nonce"]):
            by_hand.append(evm.submit(signed["authorization"], signed["signature"]))
        return DROP if fault else Reply.json(said(asked, transaction=by_hand[-1]))

    for fail_at in itertools.count(0 if purpose == "call" else 1):
        wallet = rich(evm, units)
        sale = Sale(shop, wallet, *where)
        facilitator.before_settle = settle
        left, armed = itertools.count(), True
        answer = sale.send()
        armed = False
        came_through = next(left) <= fail_at
        upkeep.settle_late(shop.instance)
        upkeep.void_orphans(shop.instance)
        for each in shop.payments(wallet):
            shop.look(each.id)
        at = f"statement {fail_at} fails, answered {answer.status} {answer.code}"
        moved = units - evm.balance(wallet.address)
        found = shop.payments(wallet)
        statuses = [each.status for each in found]
        if moved:
            assert statuses == ["settled"] and shop.deposits(found[0].id) == 1, at
            assert answer.code not in ("payment_required", "payment_invalid"), at
        else:
            assert statuses in ([], ["refused"]), at
            assert shop.credits_of(wallet) is None, at
        facilitator.before_settle = None
        assert sale.send().status == 200, at
        assert evm.balance(wallet.address) == 0 and shop.deposits(sale.record.id) == 1, at
        assert shop.credits_of(wallet) == (0 if purpose == "call" else 20), at
        if came_through:
            break
    assert fail_at >= 15
    assert shop.faults() == []


# kill -9.


@pytest.fixture
def stall(
    start_farebox: StartFarebox,
    shops: dict[str, Shop],
    upstream: Upstream,
) -> Iterator[Stall]:
    toml = (shops["rpc"].folder / "farebox.toml").read_text("utf-8")
    found = Stall(start_farebox(toml, workers=1, threads=32), upstream)
    yield found
    found.db.close()


def test_kill_9_wherever_a_payment_is_loses_none_and_doubles_none(
    stall: Stall, evm: EvmChain, solana: SolanaNode, facilitator: Facilitator, upstream: Upstream
) -> None:
    """A call and a top-up at each of four points: before the money moves, after it, when the
    facilitator has answered, and when the credits are entered."""
    points = ("before", "after", "answered", "entered")
    sales: dict[tuple[str, str], Sale] = {}
    for number, point in enumerate(points):
        for purpose in ("call", "topup"):
            wallet = rich(evm) if (number % 2 == 0) == (purpose == "call") else poor(solana)
            path = f"/api/v1/far/gated/{point}" if purpose == "call" else TOP_UP
            body = b"" if purpose == "call" else TOP_UP_BODY
            sales[point, purpose] = Sale(stall, wallet, path, body)
    point_of = {repr(sale.signed): point for (point, _), sale in sales.items()}
    reached: list[str] = []
    over, locked = threading.Event(), threading.Event()

    def before(asked: Asked) -> Reply | None:
        if point_of[repr(asked.payload["payload"])] != "before":
            return None
        reached.append("before")
        over.wait(30)
        return DROP

    def after(asked: Asked) -> Reply | None:
        point = point_of[repr(asked.payload["payload"])]
        if point == "entered":
            return None
        reached.append(point)
        (over if point == "after" else locked).wait(30)
        return None

    facilitator.before_settle, facilitator.after_settle = before, after
    for sale in sales.values():
        threading.Thread(target=lambda sale=sale: _ignored(sale.send), daemon=True).start()
    until(lambda: len(reached) == 6, 20, "all are where they should be")
    upstream.wait_for(1, "/gated/entered")
    until(lambda: sales["entered", "topup"].record.status == "settled")
    answered = sum(hit.ended == "answered" for hit in facilitator.hits("/settle"))
    # Nobody writes from now on, so nothing that is answered now is entered.
    with _nobody_writes(stall):
        locked.set()
        until(
            lambda: (
                sum(hit.ended == "answered" for hit in facilitator.hits("/settle")) == answered + 2
            )
        )
        stall.box.kill()
    over.set()
    facilitator.forget()
    assert {sale.record.status for (point, _), sale in sales.items() if point != "entered"} == {
        "settling"
    }
    moved = {key: sale.wallet.network for key, sale in sales.items() if _paid(sale, evm, solana)}
    assert set(moved) == {key for key in sales if key[0] != "before"}
    for point in points:
        upstream.gate(point).open()
    stall.box.start()
    for sale in sales.values():
        answer = sale.send()
        if answer.status != 200:
            assert answer.code in ("payment_unconfirmed", "payment_in_progress"), answer.body
            assert "PAYMENT-REQUIRED" not in answer.headers
    settled = lambda: all(sale.record.status == "settled" for sale in sales.values())  # noqa: E731
    until(settled, 40, "the reconciler has found out about all")
    for (point, purpose), sale in sales.items():
        answer = until(lambda sale=sale: _once_it_is_over(sale), 20, "it is served")
        assert answer.status == 200, (point, purpose, answer.body)
        assert _paid(sale, evm, solana) == sale.record.amount
        assert stall.deposits(sale.record.id) == 1
        again = sale.send()
        assert (again.status, again.headers["Idempotent-Replayed"]) == (200, "true")
        if purpose == "call":
            assert sale.served == (2 if point == "entered" else 1)
            assert stall.credits_of(sale.wallet) == 0
        else:
            assert answer.json()["creditsAdded"] == stall.credits_of(sale.wallet) == 20
    assert stall.faults() == []


def _ignored(work: Callable[[], object]) -> None:
    with contextlib.suppress(HTTPError, OSError):
        work()


def _once_it_is_over(sale: Sale) -> Answer | None:
    answer = sale.send()
    return None if answer.code == "payment_in_progress" else answer


def _paid(sale: Sale, evm: EvmChain, solana: SolanaNode) -> int:
    if isinstance(sale.wallet, EvmWallet):
        return 10 * UNITS - evm.balance(sale.wallet.address)
    return 10 * UNITS - solana.tokens(sale.wallet.address)


@contextlib.contextmanager
def _nobody_writes(stall: Stall) -> Iterator[None]:
    """Whoever writes to the database waits for this to end, or for their own."""
    with (stall.box.instance / "writer.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
