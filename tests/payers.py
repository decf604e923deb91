"""Wallets that pay, honestly or not, and the official client in their hands.

A payment is built from a challenge as it came, and every part of it can be changed: before it is
signed, so that the payer has signed the wrong thing, or after, so that somebody else tampered with
it. Whatever takes changes lays them over what an honest payer would have put there.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evm_chain import DOMAIN, NETWORK
from rpc_server import need

need("eth_account", "solders", "x402")

import solana_node  # noqa: E402
from solana_node import TOKEN_PROGRAM, SolanaNode, token_account  # noqa: E402
from solders.address_lookup_table_account import AddressLookupTableAccount  # noqa: E402
from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price  # noqa: E402
from solders.hash import Hash  # noqa: E402
from solders.instruction import AccountMeta, Instruction  # noqa: E402
from solders.keypair import Keypair  # noqa: E402
from solders.message import Message, MessageV0, to_bytes_versioned  # noqa: E402
from solders.pubkey import Pubkey  # noqa: E402
from solders.signature import Signature  # noqa: E402
from solders.transaction import VersionedTransaction  # noqa: E402

if TYPE_CHECKING:
    import httpx
    import requests

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


MEMO_PROGRAM = Pubkey.from_string("MemoSq4gqABAXKb96qnH8TysNcWxMyWCqXgDLGmfcHr")


class SolanaWallet:
    """An account on Solana, which knows a node to ask for blockhashes."""

    network = solana_node.NETWORK

    def __init__(self, node: SolanaNode, keypair: Keypair | None = None) -> None:
        self.node = node
        self.keypair = keypair or Keypair()
        self.address = str(self.keypair.pubkey())

    # Instructions, to be put together rightly or wrongly.

    def transfer(self, accepted: Json, **changes: Any) -> Instruction:
        """TransferChecked, as this offer wants it.

        Changes: `amount`, `decimals`, `mint`, `to` (who owns the account that is paid), `source`
        and `destination` (the accounts themselves), `authority`, `program`.
        """
        said: Json = {
            "mint": accepted["asset"],
            "to": accepted["payTo"],
            "amount": accepted["amount"],
            "decimals": 6,
            "authority": self.keypair.pubkey(),
            "program": TOKEN_PROGRAM,
        } | changes
        source = said.get("source") or token_account(self.address, said["mint"])
        destination = said.get("destination") or token_account(said["to"], said["mint"])
        amount = int(said["amount"]).to_bytes(8, "little")
        return Instruction(
            said["program"],
            bytes([12]) + amount + bytes([said["decimals"]]),
            [
                AccountMeta(source, is_signer=False, is_writable=True),
                AccountMeta(Pubkey.from_string(said["mint"]), is_signer=False, is_writable=False),
                AccountMeta(destination, is_signer=False, is_writable=True),
                AccountMeta(said["authority"], is_signer=True, is_writable=False),
            ],
        )

    @staticmethod
    def memo(text: str | None = None) -> Instruction:
        """Something that tells this payment from others of the same amount."""
        return Instruction(MEMO_PROGRAM, (text or os.urandom(16).hex()).encode(), [])

    @staticmethod
    def budget(units: int = 60_000, price: int = 1) -> list[Instruction]:
        """How much work at most, and what is paid for it beside the fee. The official client allows
        20,000 units, which are too few for two transfers."""
        return [set_compute_unit_limit(units), set_compute_unit_price(price)]

    def instructions(self, accepted: Json, **changes: Any) -> list[Instruction]:
        """What the official client would have in a transaction, with a changed transfer."""
        return [*self.budget(), self.transfer(accepted, **changes), self.memo()]

    def transaction(
        self,
        instructions: Sequence[Instruction],
        fee_payer: str,
        *,
        blockhash: str | None = None,
        legacy: bool = False,
        tables: Sequence[AddressLookupTableAccount] = (),  # as `node.make_table` gives them
        signers: Sequence[Keypair] | None = None,
    ) -> str:
        """A transaction in base64, signed by all but the fee payer: by this wallet, or by
        `signers`; for others that should sign there is a signature of zeros."""
        payer = Pubkey.from_string(fee_payer)
        latest = Hash.from_string(blockhash or self.node.blockhash())
        message: Message | MessageV0
        if legacy:
            message = Message.new_with_blockhash(list(instructions), payer, latest)
        else:
            message = MessageV0.try_compile(payer, list(instructions), list(tables), latest)
        by_key = {each.pubkey(): each for each in ([self.keypair] if signers is None else signers)}
        wanted = message.account_keys[: message.header.num_required_signatures]
        signatures = [
            by_key[key].sign_message(to_bytes_versioned(message))
            if key in by_key
            else Signature.default()
            for key in wanted
        ]
        return base64.b64encode(bytes(VersionedTransaction.populate(message, signatures))).decode()

    def payment(
        self,
        challenge: Json,
        *,
        transfer: Changes = AS_IT_IS,
        instructions: Sequence[Instruction] | None = None,
        transaction: str | Changes = AS_IT_IS,
        fee_payer: str | None = None,
        accepted: Changes = AS_IT_IS,
        **changes: Any,
    ) -> Json:
        """A payment for this challenge.

        `transfer` changes the one instruction that pays, `instructions` replaces them all.
        `transaction` is a ready one, or the options of the method of that name. `accepted` changes
        the offer that is said to be taken; anything else the payment itself.
        """
        taken = offer(challenge, self.network)
        if not isinstance(transaction, str):
            transaction = self.transaction(
                self.instructions(taken, **transfer) if instructions is None else instructions,
                fee_payer or taken["extra"]["feePayer"],
                **transaction,
            )
        payload = {"transaction": transaction}
        return payment(challenge, taken | dict(accepted), payload, **changes)

    def header(self, challenge: Json, **changes: Any) -> str:
        """The same, as PAYMENT-SIGNATURE has it."""
        return encode(self.payment(challenge, **changes))


@contextlib.contextmanager
def requests_client(
    *wallets: EvmWallet | SolanaWallet, any_amount: bool = False
) -> Iterator[requests.Session]:
    """The official client with requests: it pays what it is asked, up to a dollar a time."""
    import requests
    from x402 import x402ClientSync
    from x402.http.clients import wrapRequestsWithPayment

    with contextlib.ExitStack() as stack:
        client = _register(x402ClientSync(), wallets, any_amount, stack)
        session = stack.enter_context(requests.Session())
        yield wrapRequestsWithPayment(session, client)


@contextlib.asynccontextmanager
async def httpx_client(
    *wallets: EvmWallet | SolanaWallet, any_amount: bool = False, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """The official client with httpx. `options` are those of httpx.AsyncClient."""
    from x402 import x402Client
    from x402.http.clients import wrapHttpxWithPayment

    with contextlib.ExitStack() as stack:
        client = _register(x402Client(), wallets, any_amount, stack)
        async with wrapHttpxWithPayment(client, **options) as session:
            yield session


def _register(
    client: Any, wallets: Sequence[Any], any_amount: bool, stack: contextlib.ExitStack
) -> Any:
    for wallet in wallets:
        if isinstance(wallet, EvmWallet):
            from x402.mechanisms.evm.exact import register_exact_evm_client

            register_exact_evm_client(client, wallet.account)
        else:
            client.register("solana:*", _solana_scheme(wallet, stack))
    if any_amount:
        client.set_spend_controls(False)
    return client


def _solana_scheme(wallet: SolanaWallet, stack: contextlib.ExitStack) -> Any:
    from solana.rpc.api import Client
    from x402.mechanisms.svm import KeypairSigner
    from x402.mechanisms.svm.exact import ExactSvmClientScheme

    scheme = ExactSvmClientScheme(KeypairSigner(wallet.keypair), wallet.node.url)
    with warnings.catch_warnings():
        # It would make this by itself in the midst of a payment, be warned that it is old, and
        # never close it.
        warnings.filterwarnings("ignore", "Client is deprecated")
        node = Client(wallet.node.url)
    stack.callback(node._provider.session.close)
    scheme._clients[wallet.network] = node
    return scheme
