"""The chains, the facilitator and the wallets that the tests of payments stand on are true ones."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import evm_chain
import pytest
import solana_node
import urllib3
from doubles import Exchange, Server
from evm_chain import EvmChain, Reverted
from facilitator import DROP, Facilitator, Reply
from payers import (
    EvmWallet,
    SolanaWallet,
    decode,
    encode,
    httpx_client,
    offer,
    requests_client,
)  # fmt: skip
from solana_node import SolanaNode, token_account

PRICE = 12_345


@pytest.fixture(scope="module")
def chain() -> Iterator[EvmChain]:
    with EvmChain() as running:
        yield running


@pytest.fixture(scope="module")
def node() -> Iterator[SolanaNode]:
    with SolanaNode() as running:
        yield running


@pytest.fixture(scope="module")
def one_facilitator(chain: EvmChain, node: SolanaNode) -> Iterator[Facilitator]:
    with Facilitator(evm=chain, solana=node, confirm_seconds=0.5) as running:
        yield running


@pytest.fixture
def facilitator(one_facilitator: Facilitator) -> Facilitator:
    one_facilitator.forget()
    one_facilitator.mended = True
    return one_facilitator


@pytest.fixture
def payer(chain: EvmChain) -> EvmWallet:
    """With money enough for ten payments."""
    wallet = EvmWallet()
    chain.mint(wallet.address, 10 * PRICE)
    return wallet


@pytest.fixture
def solana_payer(node: SolanaNode) -> SolanaWallet:
    wallet = SolanaWallet(node)
    node.set_tokens(wallet.address, 10 * PRICE)
    return wallet


def evm_challenge() -> dict[str, Any]:
    """For a payment to somebody new."""
    return _challenge(evm_chain.NETWORK, evm_chain.USDC, EvmWallet().address,
                      {"name": "USD Coin", "version": "2"})  # fmt: skip


def solana_challenge(node: SolanaNode, facilitator: Facilitator) -> dict[str, Any]:
    pay_to = SolanaWallet(node).address
    node.set_tokens(pay_to, 0)
    fee_payer = {"feePayer": facilitator.fee_payer}
    return _challenge(solana_node.NETWORK, solana_node.USDC, pay_to, fee_payer)


def _challenge(network: str, asset: str, pay_to: str, extra: Any) -> dict[str, Any]:
    return {
        "x402Version": 2,
        "error": "payment_required",
        "resource": {"url": "http://127.0.0.1/paid", "description": "", "mimeType": ""},
        "accepts": [
            {
                "scheme": "exact", "network": network, "asset": asset, "amount": str(PRICE),
                "payTo": pay_to, "maxTimeoutSeconds": 60, "extra": extra,
            }
        ],
    }  # fmt: skip


def paid_to(challenge: dict[str, Any]) -> str:
    return str(challenge["accepts"][0]["payTo"])


def ask(facilitator: Facilitator, verb: str, challenge: Any, payment: Any) -> Any:
    body = {
        "x402Version": 2,
        "paymentPayload": payment,
        "paymentRequirements": challenge["accepts"][0],
    }
    url = f"{facilitator.url}/{verb}"
    return urllib3.request("POST", url, json=body, retries=False, timeout=30).json()


def rpc(node: EvmChain | SolanaNode, method: str, *params: Any) -> Any:
    body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
    answer = urllib3.request("POST", node.url, json=body, retries=False, timeout=30).json()
    assert answer["id"] == 7
    return answer.get("result", answer.get("error"))


# The dollar on the EVM chain.


def test_an_authorization_moves_exactly_its_amount_and_once(
    chain: EvmChain, payer: EvmWallet
) -> None:
    challenge = evm_challenge()
    signed = payer.authorization(offer(challenge, chain.network))
    signature = payer.sign(signed)
    assert not chain.authorization_used(payer.address, signed["nonce"])

    transaction = chain.submit(signed, signature)

    assert chain.balance(paid_to(challenge)) == PRICE
    assert chain.balance(payer.address) == 9 * PRICE
    assert chain.authorization_used(payer.address, signed["nonce"])
    assert chain.transfers(to=paid_to(challenge)) == [(payer.address.lower(), PRICE)]
    receipt = rpc(chain, "eth_getTransactionReceipt", transaction)
    assert receipt["status"] == "0x1" and len(receipt["logs"]) == 2
    with pytest.raises(Reverted, match="authorization is used or canceled"):
        chain.submit(signed, signature)
    assert chain.balance(paid_to(challenge)) == PRICE


def test_both_forms_of_a_signature_move_money(chain: EvmChain, payer: EvmWallet) -> None:
    challenge = evm_challenge()
    signed = payer.authorization(offer(challenge, chain.network))
    chain.submit(signed, payer.sign(signed), parts=True)
    assert chain.balance(paid_to(challenge)) == PRICE


@pytest.mark.parametrize(
    ("signed", "reason"),
    [
        ({"validBefore": "1700000000"}, "FiatTokenV2: authorization is expired"),
        ({"validAfter": "4000000000"}, "FiatTokenV2: authorization is not yet valid"),
        ({"value": str(10 * PRICE + 1)}, "ERC20: transfer amount exceeds balance"),
        ({"from_": "0x" + "11" * 20}, "FiatTokenV2: invalid signature"),
    ],
    ids=["expired", "not yet valid", "more than there is", "of somebody else"],
)
def test_an_authorization_that_is_not_good_is_refused_in_circles_words(
    chain: EvmChain, payer: EvmWallet, signed: dict[str, str], reason: str
) -> None:
    challenge = evm_challenge()
    bad = payer.authorization(offer(challenge, chain.network), **signed)
    with pytest.raises(Reverted) as refused:
        chain.submit(bad, payer.sign(bad))
    assert refused.value.reason == reason
    assert rpc(chain, "eth_getTransactionReceipt", refused.value.transaction)["status"] == "0x0"
    assert chain.balance(paid_to(challenge)) == 0


def test_an_authorization_signed_for_another_chain_is_refused(
    chain: EvmChain, payer: EvmWallet
) -> None:
    signed = payer.authorization(offer(evm_challenge(), chain.network))
    with pytest.raises(Reverted, match="invalid signature"):
        chain.submit(signed, payer.sign(signed, chainId=1))


def test_a_cancelled_authorization_is_used_and_moves_nothing(
    chain: EvmChain, payer: EvmWallet
) -> None:
    challenge = evm_challenge()
    signed = payer.authorization(offer(challenge, chain.network))
    chain.cancel(payer.account, signed["nonce"])
    assert chain.authorization_used(payer.address, signed["nonce"])
    with pytest.raises(Reverted, match="used or canceled"):
        chain.submit(signed, payer.sign(signed))
    assert chain.balance(paid_to(challenge)) == 0


def test_time_passes_only_when_it_is_told_to() -> None:
    with EvmChain() as chain:
        wallet = EvmWallet()
        chain.mint(wallet.address, PRICE)
        signed = wallet.authorization(offer(evm_challenge(), chain.network))
        chain.mine(100)
        assert abs(chain.now() - time.time()) < 5
        chain.advance(61)
        with pytest.raises(Reverted, match="expired"):
            chain.submit(signed, wallet.sign(signed))


def test_a_paused_chain_keeps_what_is_sent_until_it_goes_on(
    chain: EvmChain, payer: EvmWallet
) -> None:
    challenge = evm_challenge()
    signed = payer.authorization(offer(challenge, chain.network))
    with chain.paused():
        transaction = chain.submit(signed, payer.sign(signed))
        assert chain.pending() == 1
        assert rpc(chain, "eth_getTransactionReceipt", transaction) is None
        assert chain.balance(paid_to(challenge)) == 0
    assert chain.pending() == 0
    assert chain.balance(paid_to(challenge)) == PRICE


# Nodes that fail.


def test_a_node_can_be_out_of_reach_silent_or_wrong_and_come_back(chain: EvmChain) -> None:
    before = chain.calls["eth_chainId"]
    with chain.unreachable(), pytest.raises(urllib3.exceptions.NewConnectionError):
        rpc(chain, "eth_chainId")
    assert rpc(chain, "eth_chainId") == "0x2105"
    asked = {"id": 7, "method": "eth_chainId"}
    with chain.frozen(), pytest.raises(urllib3.exceptions.ReadTimeoutError):
        urllib3.request("POST", chain.url, json=asked, retries=False, timeout=0.2)
    chain.fail("eth_chainId")
    assert rpc(chain, "eth_chainId")["code"] == -32000
    chain.fail("eth_chainId", how="cut")
    with pytest.raises(urllib3.exceptions.ProtocolError):
        rpc(chain, "eth_chainId")
    chain.fail("eth_chainId", of_facilitator=True)
    assert rpc(chain, "eth_chainId") == "0x2105"
    chain.no_more_failures()
    assert chain.calls["eth_chainId"] - before == 5


# Solana.


def test_a_transfer_on_solana_moves_exactly_its_amount_and_can_be_found(
    node: SolanaNode, solana_payer: SolanaWallet, facilitator: Facilitator
) -> None:
    challenge = solana_challenge(node, facilitator)
    settled = ask(facilitator, "settle", challenge, solana_payer.payment(challenge))
    signature = settled["transaction"]

    assert settled["success"] and settled["payer"] == solana_payer.address
    assert node.tokens(paid_to(challenge)) == PRICE
    assert node.tokens(solana_payer.address) == 9 * PRICE

    (status,) = _statuses(node, signature)
    assert status["err"] is None and status["confirmationStatus"] == "confirmed"
    account = str(token_account(paid_to(challenge)))
    (found,) = rpc(node, "getSignaturesForAddress", account, {"commitment": "confirmed"})
    assert (found["signature"], found["err"]) == (signature, None)
    assert rpc(node, "getSignaturesForAddress", account) == []  # nothing is finalized yet
    options = {"encoding": "base64", "commitment": "confirmed", "maxSupportedTransactionVersion": 0}
    whole = rpc(node, "getTransaction", signature, options)
    assert whole["meta"]["err"] is None and whole["slot"] == status["slot"] == found["slot"]
    raw, encoding = whole["transaction"]
    assert encoding == "base64" and base64.b64decode(raw) == node.landed()[-1].raw

    node.finalize()
    assert _statuses(node, signature)[0]["confirmationStatus"] == "finalized"
    (found,) = rpc(node, "getSignaturesForAddress", account, {"limit": 1})
    assert abs(found["blockTime"] - time.time()) < 60
    assert rpc(node, "getSignaturesForAddress", account, {"before": signature}) == []


def test_a_transaction_that_lands_and_fails_is_reported_as_failed(
    node: SolanaNode, solana_payer: SolanaWallet, facilitator: Facilitator
) -> None:
    challenge = solana_challenge(node, facilitator)
    node.before_landing = lambda: node.set_tokens(solana_payer.address, PRICE - 1)
    settled = ask(facilitator, "settle", challenge, solana_payer.payment(challenge))
    assert settled["success"] is False and settled["errorReason"] == "transaction_failed"
    (status,) = _statuses(node, settled["transaction"])
    assert status["err"] == {"InstructionError": [2, {"Custom": 1}]}
    assert status["status"] == {"Err": status["err"]}
    assert node.tokens(paid_to(challenge)) == 0


def test_the_official_signer_takes_a_failed_transaction_for_a_payment(
    node: SolanaNode, solana_payer: SolanaWallet, facilitator: Facilitator
) -> None:
    facilitator.mended = False
    challenge = solana_challenge(node, facilitator)
    node.before_landing = lambda: node.set_tokens(solana_payer.address, PRICE - 1)
    settled = ask(facilitator, "settle", challenge, solana_payer.payment(challenge))
    assert settled["success"] is True
    assert _statuses(node, settled["transaction"])[0]["err"] is not None
    assert node.tokens(paid_to(challenge)) == 0


def test_a_transaction_with_an_old_blockhash_never_lands(
    node: SolanaNode, solana_payer: SolanaWallet, facilitator: Facilitator
) -> None:
    challenge = solana_challenge(node, facilitator)
    good_once = node.blockhash()
    with node.paused():
        settled = ask(facilitator, "settle", challenge, solana_payer.payment(challenge))
        assert settled["errorReason"] == "settlement_pending" and node.waiting() == 1
        assert rpc(node, "isBlockhashValid", good_once)["value"] is True
        node.expire_blockhash()
    assert rpc(node, "isBlockhashValid", good_once)["value"] is False
    assert _statuses(node, settled["transaction"]) == [None]
    assert node.waiting() == 0 and node.tokens(paid_to(challenge)) == 0


def test_a_confirmation_that_nobody_sees_is_seen_when_it_is_asked_for_again(
    node: SolanaNode, solana_payer: SolanaWallet, facilitator: Facilitator
) -> None:
    challenge = solana_challenge(node, facilitator)
    payment = solana_payer.payment(challenge)
    node.drop_confirmations(1000)
    pending = ask(facilitator, "settle", challenge, payment)
    node.no_more_failures()
    assert pending["errorReason"] == "settlement_pending"
    assert _statuses(node, pending["transaction"])[0]["err"] is None
    settled = ask(facilitator, "settle", challenge, payment)
    assert settled["success"] and settled["transaction"] == pending["transaction"]
    assert node.tokens(paid_to(challenge)) == PRICE


def test_what_is_long_past_is_found_only_in_the_history(
    node: SolanaNode, solana_payer: SolanaWallet, facilitator: Facilitator
) -> None:
    challenge = solana_challenge(node, facilitator)
    signature = ask(facilitator, "settle", challenge, solana_payer.payment(challenge))[
        "transaction"
    ]
    node.expire_blockhash()
    assert rpc(node, "getSignatureStatuses", [signature])["value"] == [None]
    assert _statuses(node, signature)[0]["err"] is None


@pytest.mark.parametrize("form", ["legacy", "with a lookup table", "two transfers", "other mint"])
def test_transactions_of_any_form_can_be_made_and_land(
    node: SolanaNode, solana_payer: SolanaWallet, facilitator: Facilitator, form: str
) -> None:
    challenge = solana_challenge(node, facilitator)
    taken = offer(challenge, node.network)
    mint, units = solana_node.USDC, PRICE
    instructions = solana_payer.instructions(taken)
    options: dict[str, Any] = {}
    if form == "legacy":
        options["legacy"] = True
    elif form == "with a lookup table":
        options["tables"] = [node.make_table([token_account(paid_to(challenge))])]
    elif form == "two transfers":
        instructions.append(solana_payer.transfer(taken, amount=1))
        units += 1
    else:
        mint = node.make_mint()
        node.set_tokens(solana_payer.address, PRICE, mint)
        node.set_tokens(paid_to(challenge), 0, mint)
        instructions = solana_payer.instructions(taken, mint=mint)
    node.airdrop(solana_payer.address, 1_000_000)
    raw = solana_payer.transaction(instructions, solana_payer.address, **options)
    landed = node.land(base64.b64decode(raw))
    assert landed is not None and not landed.failed
    assert node.tokens(paid_to(challenge), mint) == units
    assert str(token_account(paid_to(challenge), mint)) in landed.accounts


def _statuses(node: SolanaNode, *signatures: str) -> Any:
    history = {"searchTransactionHistory": True}
    return rpc(node, "getSignatureStatuses", signatures, history)["value"]


# The facilitator.


def test_the_facilitator_says_what_it_settles(facilitator: Facilitator) -> None:
    answer = urllib3.request("GET", f"{facilitator.url}/supported").json()
    kinds = {kind["network"]: kind for kind in answer["kinds"] if kind["x402Version"] == 2}
    assert set(kinds) == {evm_chain.NETWORK, solana_node.NETWORK}
    assert kinds[solana_node.NETWORK]["extra"] == {"feePayer": facilitator.fee_payer}


def test_the_facilitator_moves_money_once_and_remembers_what_it_was_asked(
    chain: EvmChain, payer: EvmWallet, facilitator: Facilitator
) -> None:
    challenge = evm_challenge()
    payment = payer.payment(challenge)
    assert ask(facilitator, "verify", challenge, payment)["isValid"] is True
    assert ask(facilitator, "settle", challenge, payment)["success"] is True
    assert ask(facilitator, "settle", challenge, payment)["success"] is False
    assert chain.balance(paid_to(challenge)) == PRICE
    assert facilitator.calls == {"verify": 1, "settle": 2}
    assert [asked.payload for asked in facilitator.settles] == [payment, payment]
    first, second = (asked.answer for asked in facilitator.settles)
    assert first and first["success"] and second and not second["success"]


@pytest.mark.parametrize(
    "forged",
    [{"value": str(PRICE - 1)}, {"to": "0x" + "22" * 20}, {"nonce": "0x" + "33" * 32}],
    ids=lambda change: next(iter(change)),
)
def test_what_was_changed_after_it_was_signed_is_not_valid(
    payer: EvmWallet, facilitator: Facilitator, forged: dict[str, str]
) -> None:
    challenge = evm_challenge()
    payment = payer.payment(challenge, forged=forged)
    assert ask(facilitator, "verify", challenge, payment)["isValid"] is False


def test_an_answer_can_be_lost_after_the_money_has_moved_or_before(
    chain: EvmChain, payer: EvmWallet, facilitator: Facilitator
) -> None:
    challenge = evm_challenge()
    facilitator.before_settle = lambda asked: DROP
    with pytest.raises(urllib3.exceptions.ProtocolError):
        ask(facilitator, "settle", challenge, payer.payment(challenge))
    assert chain.balance(paid_to(challenge)) == 0
    facilitator.before_settle = None
    facilitator.after_settle = lambda asked: DROP
    with pytest.raises(urllib3.exceptions.ProtocolError):
        ask(facilitator, "settle", challenge, payer.payment(challenge))
    assert chain.balance(paid_to(challenge)) == PRICE
    facilitator.after_settle = lambda asked: Reply(200, b'{"succ', declared=100)
    with pytest.raises(urllib3.exceptions.ProtocolError):
        ask(facilitator, "settle", challenge, payer.payment(challenge))
    facilitator.after_settle = lambda asked: Reply.json({"success": "true"}, 502)
    answer = ask(facilitator, "settle", challenge, payer.payment(challenge))
    assert answer == {"success": "true"}
    assert chain.balance(paid_to(challenge)) == 3 * PRICE


def test_only_the_mended_signer_survives_a_transaction_that_was_not_sent(
    chain: EvmChain, payer: EvmWallet, facilitator: Facilitator
) -> None:
    challenge = evm_challenge()
    for mended, then in ((True, "success"), (False, "settlement_pending")):
        facilitator.mended = mended
        chain.fail("eth_sendRawTransaction", of_facilitator=True)
        lost = ask(facilitator, "settle", challenge, payer.payment(challenge))
        assert lost["errorReason"] == "transaction_failed"
        answer = ask(facilitator, "settle", challenge, payer.payment(challenge))
        assert answer.get("errorReason", "success") == then
    assert chain.balance(paid_to(challenge)) == PRICE


# The official client.


class Shop(Server):
    """Sells one thing for whatever the challenge of the moment wants."""

    def __init__(self, facilitator: Facilitator) -> None:
        super().__init__()
        self._facilitator = facilitator
        self.challenge: dict[str, Any] = {}

    def respond(self, exchange: Exchange) -> None:
        header = exchange.hit.header("PAYMENT-SIGNATURE")
        if header is None:
            exchange.json(402, {}, [("PAYMENT-REQUIRED", encode(self.challenge))])
            return
        settled = ask(self._facilitator, "settle", self.challenge, decode(header))
        status = 200 if settled["success"] else 402
        exchange.json(status, settled, [("PAYMENT-RESPONSE", encode(settled))])


@pytest.fixture
def shop(facilitator: Facilitator) -> Iterator[Shop]:
    with Shop(facilitator) as open_shop:
        yield open_shop


def with_requests(url: str, *wallets: EvmWallet | SolanaWallet) -> int:
    with requests_client(*wallets) as session:
        return session.post(url, json={}).status_code


def with_httpx(url: str, *wallets: EvmWallet | SolanaWallet) -> int:
    async def pay() -> int:
        async with httpx_client(*wallets) as session:
            return (await session.post(url, json={})).status_code

    with ThreadPoolExecutor(1) as aside:  # a browser kept open here has a loop running
        return aside.submit(lambda: asyncio.run(pay())).result(60)


@pytest.mark.parametrize("pay", [with_requests, with_httpx])
def test_the_official_client_pays_on_both_chains(
    chain: EvmChain, node: SolanaNode, payer: EvmWallet, solana_payer: SolanaWallet,
    facilitator: Facilitator, shop: Shop, pay: Callable[..., int],
) -> None:  # fmt: skip
    shop.challenge = evm_challenge()
    assert pay(shop.url, payer, solana_payer) == 200
    assert chain.balance(paid_to(shop.challenge)) == PRICE
    shop.challenge = solana_challenge(node, facilitator)
    assert pay(shop.url, payer, solana_payer) == 200
    assert node.tokens(paid_to(shop.challenge)) == PRICE


def test_the_official_client_pays_more_than_a_dollar_only_if_it_may(
    chain: EvmChain, payer: EvmWallet, shop: Shop
) -> None:
    shop.challenge = evm_challenge()
    shop.challenge["accepts"][0]["amount"] = "1000001"
    chain.mint(payer.address, 1_000_001)
    with requests_client(payer) as careful, pytest.raises(Exception, match="spend_controls"):
        careful.get(shop.url)
    with requests_client(payer, any_amount=True) as generous:
        assert generous.get(shop.url).status_code == 200
    assert chain.balance(paid_to(shop.challenge)) == 1_000_001
