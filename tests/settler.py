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
    """`with Settler() as settler:`; `told` is what came to `/settle`, `asked` counts `/supported`.

    With `names_payer` off it does not say who pays Solana's fees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fee_payer = str(Keypair().pubkey())
        self.names_payer = True

    @property
    def told(self) -> list[Json]:
        return [json.loads(hit.body) for hit in self.hits("/settle")]

    @property
    def settles(self) -> int:
        return len(self.hits("/settle"))

    @property
    def asked(self) -> int:
        return len(self.hits("/supported"))

    def respond(self, exchange: Exchange) -> None:
        if exchange.hit.path.endswith("/supported"):
            exchange.json(200, {"kinds": self._kinds(), "extensions": [], "signers": {}})
            return
        asked = json.loads(exchange.hit.body)["paymentRequirements"]
        exchange.json(
            200,
            {
                "success": True,
                "transaction": f"0x{os.urandom(32).hex()}",
                "network": asked["network"],
            },
        )

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
