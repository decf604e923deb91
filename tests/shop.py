"""A shop that is paid on the spot, in this process: what it sells, who pays, and its books.

The upstream is a real one over HTTP and counts; the chains and the facilitator are those of
evm_chain.py, solana_node.py and facilitator.py, or whatever has such URLs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import evm_chain
from doubles import Upstream
from inprocess import Box
from payers import EvmWallet, SolanaWallet, decode
from server import Answer, Farebox

from core import ledger
from core.payments import reconciler, records
from core.payments.facilitator import Verdict
from core.payments.records import Record
from core.wallets import Wallet as Owner
from models import Database

Wallet = EvmWallet | SolanaWallet
PRICE = 5
UNITS = PRICE * 10_000  # a credit is a cent
TOP_UP = "/api/v1/credits/top-up"
TOP_UP_BODY = b'{"credits": 20}'
TOP_UP_UNITS = 20 * 10_000
_numbers = count(1)


def config(
    upstream: Upstream, facilitator_url: str, pay_to: Mapping[str, str], rpc: Mapping[str, str]
) -> str:
    """Routes that cost PRICE, and [x402]."""
    return f"""
[upstreams.far]
kind = "http"
base_url = "{upstream.url}"

[[routes]]
path = "/api/v1/far/*"
methods = ["GET", "POST"]
upstream = "far"
upstream_path = "/*"
credits = {PRICE}
x402 = true

[limits]
requests_per_minute = 1000000
failed_auth_per_minute = 1000000

[x402]
facilitator_url = "{facilitator_url}"
pay_to = {_table(pay_to)}
rpc = {_table(rpc)}
"""


def _table(values: Mapping[str, str]) -> str:
    pairs = ", ".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in values.items())
    return f"{{ {pairs} }}"


class Books(Protocol):
    """What a seller sold, as its database has it."""

    @property
    def db(self) -> Database: ...

    def payments(self, wallet: Wallet) -> list[Record]:
        """All payments of a wallet."""
        found = Owner.of(wallet.network.partition(":")[0], wallet.address).id
        return records.page(self.db, None, 500, wallet=found)

    def credits_of(self, wallet: Wallet) -> int | None:
        """What the wallet's account has, all told; None when it has none. Nothing is held."""
        found = self.db.row(
            "SELECT a.balance, a.held FROM wallet w JOIN account a ON a.id = w.account_id"
            " WHERE w.name = :name",
            {"name": f"{wallet.network.partition(':')[0]}:{wallet.address}"},
        )
        if found is None:
            return None
        balance, held = found
        assert held == 0
        return int(balance)

    def deposits(self, payment_id: str) -> int:
        """How often a payment was entered."""
        asked = "SELECT COUNT(*) FROM entry WHERE reference = :id"
        found = self.db.row(asked, {"id": payment_id})
        assert found is not None
        return int(found[0])

    def faults(self) -> list[str]:
        """What does not add up."""
        with self.db.snapshot() as tx:
            return ledger.verify(tx)[1]


class Seller(Books, Protocol):
    """Who is paid, in this process or another."""

    upstream: Upstream

    def request(
        self, method: str, path: str, /, *, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer: ...


class Sale:
    """One payment for one request, which can be sent again and again."""

    def __init__(
        self,
        shop: Seller,
        wallet: Wallet,
        path: str | None = None,
        body: bytes = b"",
        **change: Any,
    ) -> None:
        self.shop = shop
        self.path = path or f"/api/v1/far/ok/sale-{next(_numbers)}"
        self.body = body
        self.wallet = wallet
        asked = shop.request("POST", self.path, body=body, headers={})
        assert asked.status == 402, asked.body
        self.challenge: dict[str, Any] = decode(asked.headers["PAYMENT-REQUIRED"])
        self.header = wallet.header(self.challenge, **change)

    def send(self, path: str | None = None, **headers: str) -> Answer:
        sent = {name.replace("_", "-"): text for name, text in headers.items()}
        return self.shop.request(
            "POST",
            path or self.path,
            body=self.body,
            headers={"PAYMENT-SIGNATURE": self.header} | sent,
        )

    @property
    def signed(self) -> dict[str, Any]:
        """What the payer has signed."""
        found: dict[str, Any] = decode(self.header)["payload"]
        return found

    @property
    def record(self) -> Record:
        """What the books know of it."""
        found = self.shop.payments(self.wallet)
        assert len(found) == 1, found
        return found[0]

    @property
    def served(self) -> int:
        """How often the upstream was asked."""
        return len(self.shop.upstream.hits(self.path.removeprefix("/api/v1/far")))


class Shop(Box, Books):
    """`with Shop(folder, config, upstream) as shop:`."""

    def __init__(self, folder: Path, config: str, upstream: Upstream, **environment: str) -> None:
        super().__init__(folder, config, **environment)
        self.upstream = upstream

    @property
    def db(self) -> Database:
        return self.instance.db

    def look(self, payment_id: str) -> list[Verdict]:
        """What the reconciler finds out now of a payment; nothing of one that is decided."""
        return [verdict for _, verdict in reconciler.look_now(self.instance, payment_id)]

    def shift(self, payment_id: str, seconds: float) -> None:
        """The payment was shown so much earlier."""
        self.run(
            "UPDATE payment SET created_at = created_at - :ms WHERE id = :id",
            id=payment_id,
            ms=int(seconds * 1000),
        )


class Stall(Books):
    """A Farebox under gunicorn as a seller; its database is read beside it."""

    def __init__(self, box: Farebox, upstream: Upstream) -> None:
        self.box = box
        self.upstream = upstream
        self._db = Database(box.instance / "farebox.db")

    @property
    def db(self) -> Database:
        return self._db

    def request(
        self, method: str, path: str, /, *, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        return self.box.request(method, path, body=body, headers=headers)


def rich(evm: evm_chain.EvmChain, units: int = 10 * UNITS) -> EvmWallet:
    """Somebody new who can pay."""
    wallet = EvmWallet()
    evm.mint(wallet.address, units)
    return wallet
