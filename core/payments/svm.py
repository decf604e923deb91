"""Payments on Solana: a transaction with one `TransferChecked`, signed by whoever pays.

The facilitator adds its signature as the one who pays the network's fees. What the transaction does
is read from its message, which is what the payer has signed.
"""

import base64
import binascii
import hashlib
from typing import NamedTuple

from solders.instruction import CompiledInstruction
from solders.message import Message, MessageV0, to_bytes_versioned
from solders.pubkey import Pubkey
from solders.transaction import VersionedTransaction

from config import Network
from core.payments.payment import Payment, refused
from core.payments.wire import Payload, Shape, part
from core.wallets import Wallet

_DECIMALS = 6
_TRANSFER_CHECKED = 12
_LONGEST = 1232  # bytes; the network takes no longer transaction
_TOKEN, _TOKEN_2022, _ATA, _BUDGET, _MEMO, _LIGHTHOUSE = map(
    Pubkey.from_string,
    (
        "TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA",
        "TokenzQdBNbLqP5VEhdkAS6EPFLC1PHnBqCXEpPxuEb",
        "ATokenGPvbdGVxr1b2hvZbsiqW5xWH25efTNsLJA8knL",
        "ComputeBudget111111111111111111111111111111",
        "MemoSq4gqABAXKb96qnH8TysNcWxMyWCqXgDLGmfcHr",
        "L2TExMFKdjpN9kozasaurPirfHy9P8sbXoAN1qA3S95",
    ),
)
# Programs that move nothing. Lighthouse is what wallets put in to guard what they sign.
_HARMLESS = (_BUDGET, _MEMO, _LIGHTHOUSE)
_MOST_INSTRUCTIONS = 8


class Signed(Shape, frozen=True):
    """The payload of scheme `exact` on Solana."""

    transaction: str


class Transfer(NamedTuple):
    """What a transaction moves."""

    source: Pubkey
    mint: Pubkey
    destination: Pubkey
    authority: Pubkey
    amount: int


def read(network: Network, payload: Payload) -> Payment:
    """The payment, authentic: its payer has signed it.

    Raises `validation_error` for what is no transaction, `payment_invalid` for one that does
    anything else than pay.
    """
    transaction = _decode(part(payload.payload, Signed).transaction)
    message = transaction.message
    transfer = _transfer(message)
    _check_signers(transaction, transfer.authority)
    pay_to, asset = Pubkey.from_string(network.pay_to), Pubkey.from_string(network.asset)
    if transfer.mint != asset:
        raise refused("wrong_asset", f"The payment is not in {network.asset}.")
    fee_payer = str(message.account_keys[0])
    signed_bytes = to_bytes_versioned(message)
    return Payment(
        key=f"{network.id}:{hashlib.sha256(signed_bytes).hexdigest()}",
        network=network,
        wallet=Wallet.of("solana", str(transfer.authority)),
        pays_us=transfer.source != transfer.destination == token_account(pay_to, asset),
        amount=transfer.amount,
        valid_after=None,
        valid_before=None,
        accepted=payload.accepted,
        resource=None if payload.resource is None else payload.resource.url,
        signed={
            "transaction": base64.b64encode(bytes(transaction)).decode(),
        },
        extra={"feePayer": fee_payer},
    )


def token_account(owner: Pubkey, mint: Pubkey) -> Pubkey:
    """The address where an owner's tokens are (SPL's associated token account)."""
    seeds = [bytes(owner), bytes(_TOKEN), bytes(mint)]
    return Pubkey.find_program_address(seeds, _ATA)[0]


class Trace(NamedTuple):
    """How a transaction is found again on the network."""

    digest: str  # of its message
    source: str  # the account it takes the tokens from
    blockhash: str  # as long as this is valid it can still land


def trace(transaction_base64: str) -> Trace:
    """How one that was read before is found again."""
    message = _decode(transaction_base64).message
    digest = hashlib.sha256(to_bytes_versioned(message)).hexdigest()
    return Trace(digest, str(_transfer(message).source), str(message.recent_blockhash))


def digest_of(transaction_base64: str) -> str | None:
    """The digest of a landed transaction's message; None when it cannot be read."""
    try:
        raw = base64.b64decode(transaction_base64, validate=True)
        message = VersionedTransaction.from_bytes(raw).message
    except ValueError:
        return None
    return hashlib.sha256(to_bytes_versioned(message)).hexdigest()


def _decode(text: str) -> VersionedTransaction:
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
        transaction = VersionedTransaction.from_bytes(raw)
        whole = bytes(transaction) == raw
    except (binascii.Error, UnicodeEncodeError, ValueError):
        raise refused("malformed_transaction", "The transaction cannot be read.") from None
    if not whole or len(raw) > _LONGEST:
        raise refused("malformed_transaction", "There is more than a transaction.")
    return transaction


def _transfer(message: Message | MessageV0) -> Transfer:
    """The one transfer of a transaction that does nothing else."""
    if isinstance(message, MessageV0) and message.address_table_lookups:
        raise refused("unknown_accounts", "The transaction refers to accounts it does not name.")
    instructions, keys = message.instructions, message.account_keys
    if len(instructions) > _MOST_INSTRUCTIONS:
        raise refused("too_many_instructions", "The transaction does too much.")
    transfers = []
    for instruction in instructions:
        if instruction.program_id_index >= len(keys) or any(
            index >= len(keys) for index in instruction.accounts
        ):
            raise refused("malformed_transaction", "An instruction names no account.")
        program = keys[instruction.program_id_index]
        if program == _TOKEN_2022:  # USDC is not there, and tokens that are may cost to transfer
            raise refused("wrong_token_program", f"The payment must be made with {_TOKEN}.")
        if program == _TOKEN:
            transfers.append(_one_transfer(instruction, keys))
        elif program not in _HARMLESS:
            raise refused("unknown_instruction", f"The transaction calls {program}.")
    if len(transfers) != 1:
        raise refused("not_one_transfer", "The transaction must make exactly one transfer.")
    return transfers[0]


def _one_transfer(instruction: CompiledInstruction, keys: list[Pubkey]) -> Transfer:
    data, accounts = bytes(instruction.data), list(instruction.accounts)
    if len(data) != 10 or data[0] != _TRANSFER_CHECKED or len(accounts) != 4:
        raise refused("not_a_transfer", "The transaction's transfer is no plain TransferChecked.")
    if data[9] != _DECIMALS:
        raise refused("wrong_decimals", f"The token has {_DECIMALS} decimals.")
    source, mint, destination, authority = (keys[index] for index in accounts)
    amount = int.from_bytes(data[1:9], "little")
    return Transfer(source, mint, destination, authority, amount)


def _check_signers(transaction: VersionedTransaction, authority: Pubkey) -> None:
    """Whether the payer has signed, and nobody else needs to but whoever pays the fees."""
    message = transaction.message
    signers = message.account_keys[: message.header.num_required_signatures]
    if len(transaction.signatures) != len(signers):
        raise refused("malformed_transaction", "The transaction has not the signatures it needs.")
    if len(signers) != 2 or signers[1] != authority:
        raise refused(
            "wrong_signers", "The payer signs, and the facilitator pays the fees; nobody else."
        )
    if not transaction.signatures[1].verify(authority, to_bytes_versioned(message)):
        raise refused("invalid_signature", "The payment is not signed by its payer.")
