"""A Farebox that is paid on two chains, with everybody it needs: facilitator, upstreams, payers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import evm_chain
import solana_node
from doubles import Exchange, Server
from evm_chain import EvmChain, Reverted
from facilitator import Asked, Facilitator, Hook
from payers import EvmWallet, SolanaWallet, decode, httpx_client, requests_client
from server import Answer, Farebox
from solana_node import SolanaNode
from urllib3 import HTTPHeaderDict

from core import ledger, wallets
from models import Database

UNITS_PER_CREDIT = 10_000  # a cent
TOP_UP = "/api/v1/credits/top-up"
Wallet = EvmWallet | SolanaWallet


def x402_toml(
    facilitator_url: str, pay_to: Mapping[str, str], rpc: Mapping[str, str], **more: object
) -> str:
    """The section."""
    settings: dict[str, object] = {"facilitator_url": facilitator_url, **more}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    for name, table in (("pay_to", pay_to), ("rpc", rpc)):
        entries = ", ".join(f'"{key}" = "{value}"' for key, value in table.items())
        lines.append(f"{name} = {{ {entries} }}")
    return "\n".join(["[x402]", *lines, ""])


class Submitter(Server):
    """A facilitator that sends on what it gets, and says what came of it: in no time, where the
    official one takes seconds to begin. `before_settle` and `calls` are as that one's."""

    def __init__(self, evm: EvmChain) -> None:
        super().__init__()
        self._evm = evm
        self.forget()

    def forget(self) -> None:
        self.calls: Counter[str] = Counter()
        self.before_settle: Hook | None = None

    def respond(self, exchange: Exchange) -> None:
        verb = exchange.hit.path.rpartition("/")[2]
        with self._lock:
            self.calls[verb] += 1
        if verb == "settle":
            body: Any = json.loads(exchange.hit.body)
            said, wanted = body["paymentPayload"], body["paymentRequirements"]
            asked = Asked(verb, said, wanted, exchange.hit.headers, exchange.hit.body)
            instead = self.before_settle(asked) if self.before_settle else None
            if instead is not None and instead.how == "close":
                exchange.close()
            else:
                exchange.json(200, json.loads(instead.body) if instead else self.settle(said))
        elif verb == "verify":
            exchange.json(200, {"isValid": True})
        else:
            kind = {"x402Version": 2, "scheme": "exact", "network": evm_chain.NETWORK}
            exchange.json(200, {"kinds": [kind], "extensions": [], "signers": {}})

    def settle(self, said: dict[str, Any]) -> dict[str, Any]:
        """What comes of a payment that is sent on."""
        told = {"network": evm_chain.NETWORK, "payer": said["payload"]["authorization"]["from"]}
        try:
            hash_ = self._evm.submit(said["payload"]["authorization"], said["payload"]["signature"])
        except Reverted as reverted:
            hash_, reason = reverted.transaction, "transaction_failed"
            return told | {"success": False, "transaction": hash_, "errorReason": reason}
        return told | {"success": True, "transaction": hash_}


class Market:
    """The chains, and who is paid on them. Balances are in the dollar's smallest units."""

    def __init__(self, evm: EvmChain, solana: SolanaNode | None, facilitator: Facilitator) -> None:
        self.evm = evm
        self._solana = solana
        self._facilitator = facilitator
        self._pay_to = {evm_chain.NETWORK: EvmWallet().address}
        self._rpc = {evm_chain.NETWORK: evm.url}
        if solana is not None:
            payee = SolanaWallet(solana).address
            solana.set_tokens(payee, 0)
            self._pay_to[solana_node.NETWORK] = payee
            self._rpc[solana_node.NETWORK] = solana.url

    @property
    def facilitator(self) -> Facilitator:
        """The official one."""
        assert isinstance(self._facilitator, Facilitator), "this market has no such facilitator"
        return self._facilitator

    @property
    def submitter(self) -> Submitter:
        """The quick one."""
        assert isinstance(self._facilitator, Submitter), "this market has no such facilitator"
        return self._facilitator

    @property
    def solana(self) -> SolanaNode:
        assert self._solana is not None, "this market has no Solana"
        return self._solana

    def toml(self, **more: object) -> str:
        """The section [x402] for this market."""
        return x402_toml(self._facilitator.url, self._pay_to, self._rpc, **more)

    def wallet(self, chain: str, credits: int = 1000) -> Wallet:
        """Somebody new with money enough for so many credits, on `evm` or `solana`."""
        wallet: Wallet = EvmWallet() if chain == "evm" else SolanaWallet(self.solana)
        self.fill(wallet, credits)
        return wallet

    def fill(self, wallet: Wallet, credits: int) -> None:
        units = credits * UNITS_PER_CREDIT
        if isinstance(wallet, EvmWallet):
            if units:
                self.evm.mint(wallet.address, units)
        else:
            self.solana.set_tokens(wallet.address, units)

    def left(self, wallet: Wallet) -> int:
        """What a wallet has."""
        return self._units(wallet.network, wallet.address)

    def earned(self) -> int:
        """What the instance has been paid on all chains."""
        return sum(self._units(network, payee) for network, payee in self._pay_to.items())

    def _units(self, network: str, address: str) -> int:
        if network == evm_chain.NETWORK:
            return self.evm.balance(address)
        return self.solana.tokens(address)


@contextlib.contextmanager
def market() -> Iterator[Market]:
    """A market of both chains with the official facilitator, open meanwhile."""
    with (
        EvmChain() as evm,
        SolanaNode() as solana,
        Facilitator(evm=evm, solana=solana) as facilitator,
    ):
        yield Market(evm, solana, facilitator)


@contextlib.contextmanager
def quick_market() -> Iterator[Market]:
    """A market of one chain with a quick facilitator."""
    with EvmChain() as evm, Submitter(evm) as submitter:
        yield Market(evm, None, submitter)


def who(wallet: Wallet) -> str:
    """A wallet as commands name it."""
    return f"{wallet.network.partition(':')[0]}:{wallet.address}"


def challenge_of(answer: Answer) -> dict[str, Any]:
    """What a refusal says can be paid."""
    found: dict[str, Any] = decode(answer.headers["PAYMENT-REQUIRED"])
    return found


def receipt_of(answer: Answer) -> dict[str, Any]:
    """What an answer says of its payment."""
    found: dict[str, Any] = decode(answer.headers["PAYMENT-RESPONSE"])
    return found


@dataclass(frozen=True)
class Standing:
    """An account of a wallet, as the books have it."""

    account: str
    available: int
    held: int


class Books:
    """The database of a running instance, read beside it."""

    def __init__(self, box: Farebox) -> None:
        self.db = Database(box.instance / "farebox.db")

    def of(self, wallet: Wallet) -> Standing | None:
        """The account of a wallet, if it has one."""
        namespace, _, address = who(wallet).partition(":")
        with self.db.reading() as tx:
            owner = wallets.owner_of(tx, wallets.Wallet.of(namespace, address))
            if owner is None:
                return None
            found = ledger.standing(tx, owner.account_id)
        return Standing(owner.account_id, found.available, found.held)

    def credits(self, wallet: Wallet) -> int:
        """What a wallet's account has available; nothing may be held any more."""
        found = self.of(wallet)
        assert found is not None, "the wallet has no account"
        assert found.held == 0
        return found.available

    def entries(self, account: str) -> list[tuple[str, int]]:
        """Kind and amount of all that moved on an account, oldest first."""
        return self.rows(
            "SELECT kind, amount FROM entry WHERE account_id = :a ORDER BY number", a=account
        )

    def payments(self, wallet: Wallet) -> list[tuple[str, str]]:
        """Id and status of a wallet's payments, oldest first."""
        name = wallets.Wallet.of(*who(wallet).split(":", 1)).id
        return self.rows(
            "SELECT id, status FROM payment WHERE wallet = :wallet ORDER BY number", wallet=name
        )

    def rows(self, sql: str, **params: object) -> list[tuple[Any, ...]]:
        return list(self.db.rows(sql, params))


# The official client


def by_requests(
    box: Farebox, wallet: Wallet, method: str, path: str, any_amount: bool = False, **sent: Any
) -> Answer:
    """One request by the official client with requests, which pays what it is asked."""
    with requests_client(wallet, any_amount=any_amount) as session:
        got = session.request(method, box.url + path, timeout=30, **sent)
        return Answer(got.status_code, HTTPHeaderDict(got.headers), got.content)


def by_httpx(
    box: Farebox, wallet: Wallet, method: str, path: str, any_amount: bool = False, **sent: Any
) -> Answer:
    """The same with httpx."""

    async def send() -> Answer:
        async with httpx_client(wallet, any_amount=any_amount, timeout=30) as client:
            got = await client.request(method, box.url + path, **sent)
            return Answer(got.status_code, HTTPHeaderDict(got.headers.multi_items()), got.content)

    with ThreadPoolExecutor(1) as aside:  # a browser kept open here has a loop running
        return aside.submit(lambda: asyncio.run(send())).result(60)


CLIENTS = {"requests": by_requests, "httpx": by_httpx}
