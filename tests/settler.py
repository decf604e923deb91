"""A facilitator that settles nothing and says it has, for tests of what comes before and after.

It counts, and remembers every word it was told. Where money has to move, there is
`facilitator.Facilitator`.
"""

from __future__ import annotations

import json
import os
from typing import Any

from doubles import Exchange, Server
from rpc_server import need

need("solders")

import solana_node  # noqa: E402
from solders.keypair import Keypair  # noqa: E402

Json = dict[str, Any]
BASE = "eip155:8453"
BASE_SEPOLIA = "eip155:84532"
SOLANA = solana_node.NETWORK


class Settler(Server):
    """`with Settler() as settler:`. With `names_payer` off it does not say who pays Solana's fees.

    `told` is what came to `/settle`, and `settles` how often; `shown` counts how often a payment
    came at all, `asked` the questions for what is supported.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fee_payer = str(Keypair().pubkey())
        self.names_payer = True
        self.told: list[Json] = []
        self.shown = self.asked = 0

    @property
    def settles(self) -> int:
        return len(self.told)

    def respond(self, exchange: Exchange) -> None:
        if exchange.hit.path.endswith("/supported"):
            with self._lock:
                self.asked += 1
            exchange.json(200, {"kinds": self._kinds(), "extensions": [], "signers": {}})
            return
        asked: Json = json.loads(exchange.hit.body)
        with self._lock:
            self.shown += 1
        if exchange.hit.path.endswith("/verify"):
            exchange.json(200, {"isValid": True})
            return
        with self._lock:
            self.told.append(asked)
        network = asked["paymentRequirements"]["network"]
        transaction = f"0x{os.urandom(32).hex()}"
        exchange.json(200, {"success": True, "transaction": transaction, "network": network})

    def _kinds(self) -> list[Json]:
        found: list[Json] = [
            {"x402Version": 2, "scheme": "exact", "network": network}
            for network in (BASE, BASE_SEPOLIA, SOLANA)
        ]
        if self.names_payer:
            found[-1]["extra"] = {"feePayer": self.fee_payer}
        return found


def section(settler: Settler, pay_to: dict[str, str], **more: str) -> str:
    """[x402], paid to those; `more` are TOML values."""
    receivers = ", ".join(f'"{network}" = "{address}"' for network, address in pay_to.items())
    lines = [f'facilitator_url = "{settler.url}"', f"pay_to = {{ {receivers} }}"]
    return "\n".join(["[x402]", *lines, *(f"{key} = {value}" for key, value in more.items()), ""])
