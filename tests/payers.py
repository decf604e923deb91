"""Wallets that pay, honestly or not, and the official client in their hands.

A payment is built from a challenge as it came, and every part of it can be changed: before it is
signed, so that the payer has signed the wrong thing, or after, so that somebody else tampered with
it. Whatever takes changes lays them over what an honest payer would have put there.
"""

from __future__ import annotations

import base64
import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evm_chain import DOMAIN, NETWORK
from rpc_server import need

need("eth_account", "solders", "x402")

if TYPE_CHECKING:
    import httpx
    import requests
    from solana_wallet import SolanaWallet

Json = dict[str, Any]
Changes = Mapping[str, Any]
AS_IT_IS: Changes = {}

_TRANSFER = {
    "TransferWithAuthorization": [
        {"name": "from", "type": "address"},
        {"name": "to", "type": "address"},
        {"name": "value", "type": "uint256"},
        {"name": "validAfter", "type": "uint256"},
        {"name": "validBefore", "type": "uint256"},
        {"name": "nonce", "type": "bytes32"},
    ]
}


def encode(value: Any) -> str:
    """A header's value: base64 of JSON."""
    return base64.b64encode(json.dumps(value).encode()).decode()


def decode(header: str) -> Any:
    return json.loads(base64.b64decode(header, validate=True))


def offer(challenge: Json, network: str) -> Json:
    """The entry of `accepts` for that network."""
    (found,) = [each for each in challenge["accepts"] if each["network"] == network]
    return dict(found)


def payment(challenge: Json, accepted: Json, payload: Json, **changes: Any) -> Json:
    """What goes into PAYMENT-SIGNATURE; a change to None takes the field away."""
    whole = {
        "x402Version": 2,
        "payload": payload,
        "accepted": accepted,
        "resource": challenge.get("resource"),
    } | changes
    return {name: value for name, value in whole.items() if value is not None}


class EvmWallet:
    """An account on any EVM chain."""

    network = NETWORK

    def __init__(self, key: str | None = None) -> None:
        from eth_account import Account  # a second of importing

        self.account = Account.from_key(key or os.urandom(32))
        self.address: str = self.account.address

    def authorization(self, accepted: Json, **changes: Any) -> Json:
        """What an honest payer of this offer would sign; `from_` changes the payer."""
        if "from_" in changes:
            changes["from"] = changes.pop("from_")
        return {
            "from": self.address,
            "to": accepted["payTo"],
            "value": accepted["amount"],
            "validAfter": "0",
            "validBefore": str(int(time.time()) + accepted["maxTimeoutSeconds"]),
            "nonce": f"0x{os.urandom(32).hex()}",
        } | changes

    def sign(self, authorization: Json, **domain: Any) -> str:
        """The signature, in Base USDC's domain but for what is changed (`chainId=1`, …)."""
        message = dict(authorization)
        for name in ("value", "validAfter", "validBefore"):
            message[name] = int(message[name])
        signed = self.account.sign_typed_data(
            domain_data=DOMAIN | domain, message_types=_TRANSFER, message_data=message
        )
        return f"0x{signed.signature.hex().removeprefix('0x')}"

    def payment(
        self,
        challenge: Json,
        *,
        signed: Changes = AS_IT_IS,
        forged: Changes = AS_IT_IS,
        accepted: Changes = AS_IT_IS,
        domain: Changes = AS_IT_IS,
        signature: str | None = None,
        **changes: Any,
    ) -> Json:
        """A payment for this challenge.

        `signed` changes the authorization before it is signed, `forged` after; `accepted` the
        offer that is said to be taken (the authorization is for the true one), `domain` what it is
        signed for; anything else the payment itself.
        """
        taken = offer(challenge, self.network)
        authorization = self.authorization(taken, **signed)
        payload = {
            "authorization": authorization | dict(forged),
            "signature": signature or self.sign(authorization, **domain),
        }
        return payment(challenge, taken | dict(accepted), payload, **changes)

    def header(self, challenge: Json, **changes: Any) -> str:
        """The same, as PAYMENT-SIGNATURE has it."""
        return encode(self.payment(challenge, **changes))


def requests_client(
    *wallets: EvmWallet | SolanaWallet, any_amount: bool = False
) -> requests.Session:
    """The official client with requests: it pays what it is asked, up to a dollar a time."""
    import requests
    from x402 import x402ClientSync
    from x402.http.clients import wrapRequestsWithPayment

    client = _register(x402ClientSync(), wallets, any_amount)
    return wrapRequestsWithPayment(requests.Session(), client)


def httpx_client(
    *wallets: EvmWallet | SolanaWallet, any_amount: bool = False, **options: Any
) -> httpx.AsyncClient:
    """The official client with httpx. `options` are those of httpx.AsyncClient."""
    from x402 import x402Client
    from x402.http.clients import wrapHttpxWithPayment

    client = _register(x402Client(), wallets, any_amount)
    return wrapHttpxWithPayment(client, **options)


def _register(client: Any, wallets: Sequence[Any], any_amount: bool) -> Any:
    for wallet in wallets:
        if isinstance(wallet, EvmWallet):
            from x402.mechanisms.evm.exact import register_exact_evm_client

            register_exact_evm_client(client, wallet.account)
        else:
            client.register("solana:*", _solana_scheme(wallet))
    if any_amount:
        client.set_spend_controls(False)
    return client


def _solana_scheme(wallet: SolanaWallet) -> Any:
    from solana.rpc.api import Client
    from x402.mechanisms.svm import KeypairSigner
    from x402.mechanisms.svm.exact import ExactSvmClientScheme

    scheme = ExactSvmClientScheme(KeypairSigner(wallet.keypair), wallet.node.url)
    with warnings.catch_warnings():
        # It would make this by itself, in the midst of a payment, and be warned that it is old.
        warnings.filterwarnings("ignore", "Client is deprecated", DeprecationWarning)
        scheme._clients[wallet.network] = Client(wallet.node.url)
    return scheme
