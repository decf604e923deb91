"""A Solana node on loopback: solders' LiteSVM, which runs the real programs, behind JSON-RPC.

USDC's mint is where it is on the main network, so a configuration for Solana works here unchanged.
Each transaction that lands takes a slot of its own. What is 32 slots old is finalized, as on the
real chain; `finalize` lets them pass.
"""

from __future__ import annotations

import base64
import contextlib
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from rpc_server import RpcError, RpcServer, need

need("solders")

from solders.account import Account  # noqa: E402
from solders.address_lookup_table_account import AddressLookupTableAccount  # noqa: E402
from solders.keypair import Keypair  # noqa: E402
from solders.litesvm import LiteSVM  # noqa: E402
from solders.message import Message  # noqa: E402
from solders.pubkey import Pubkey  # noqa: E402
from solders.transaction import VersionedTransaction  # noqa: E402
from solders.transaction_metadata import FailedTransactionMetadata  # noqa: E402
from solders.transaction_status import (  # noqa: E402
    InstructionErrorCustom,
    TransactionErrorInstructionError,
)

NETWORK = "solana:5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp"
USDC = "EPjFWdd5AufqSSqeM2qN1xzybapC8G4wEGGkZwyTDt1v"
TOKEN_PROGRAM = Pubkey.from_string("TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA")
ACCOUNTS_PROGRAM = Pubkey.from_string("ATokenGPvbdGVxr1b2hvZbsiqW5xWH25efTNsLJA8knL")
TABLES_PROGRAM = Pubkey.from_string("AddressLookupTab1e1111111111111111111111111")
FINAL_SLOTS = 32
BLOCKHASH_SLOTS = 150
RECENT_SLOTS = 150  # How far back a node looks for a signature without its history.
# Of the errors that a transaction can have, those with which it does not land.
NEVER_LANDS = {
    "AccountNotFound", "AlreadyProcessed", "BlockhashNotFound", "InsufficientFundsForFee",
    "InvalidAccountForFee", "SanitizeFailure", "SignatureFailure", "AddressLookupTableNotFound",
    "InvalidAddressLookupTableIndex",
}  # fmt: skip

T = TypeVar("T")


def token_account(owner: str | Pubkey, mint: str | Pubkey = USDC) -> Pubkey:
    """Where the tokens of that mint are that belong to somebody."""
    seeds = [bytes(_key(owner)), bytes(TOKEN_PROGRAM), bytes(_key(mint))]
    return Pubkey.find_program_address(seeds, ACCOUNTS_PROGRAM)[0]


@dataclass
class Landed:
    """A transaction that is part of the chain, whether it did what it should or failed."""

    signature: str
    slot: int
    at: int
    raw: bytes
    error: Any
    accounts: frozenset[str]
    logs: list[str]

    @property
    def failed(self) -> bool:
        return self.error is not None


class SolanaNode(RpcServer):
    """`with SolanaNode() as node:`. A transaction lands at once, unless paused.

    `before_landing`, if set, is called once, when the next transaction has been sent and before it
    lands; it may do to the chain what it likes.
    """

    network = NETWORK
    asset = USDC

    def __init__(self) -> None:
        super().__init__()
        self.before_landing: Callable[[], object] | None = None
        self._jobs: queue.SimpleQueue[Callable[[LiteSVM], None] | None] = queue.SimpleQueue()
        self._slot = 1
        self._blockhashes: dict[str, int] = {}  # and the last slot in which it is good
        self._landed: dict[str, Landed] = {}
        self._paused = False
        self._waiting: list[bytes] = []

    def __enter__(self) -> Self:
        super().__enter__()
        threading.Thread(target=self._live, name="litesvm", daemon=True).start()
        self.make_mint(USDC)
        self._in_vm(self._note_blockhash)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._jobs.put(None)
        super().__exit__(kind, value, trace)

    # The machine, which lives and dies in a thread of its own.

    def _live(self) -> None:
        machine = LiteSVM()
        machine.warp_to_slot(self._slot)
        while (job := self._jobs.get()) is not None:
            job(machine)

    def _in_vm(self, work: Callable[[LiteSVM], T]) -> T:
        """What the work comes to, done there. It runs alone: nothing lands meanwhile."""
        done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def job(machine: LiteSVM) -> None:
            try:
                done.put((work(machine), None))
            except BaseException as error:
                done.put((None, error))

        self._jobs.put(job)
        result, error = done.get(timeout=30)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def _note_blockhash(self, machine: LiteSVM) -> str:
        found = str(machine.latest_blockhash())
        self._blockhashes.setdefault(found, self._slot + BLOCKHASH_SLOTS)
        return found

    # What a test does to the chain.

    def airdrop(self, owner: str | Pubkey, lamports: int) -> None:
        """Give somebody SOL, in its billionths."""
        outcome = self._in_vm(lambda machine: machine.airdrop(_key(owner), lamports))
        assert _error(outcome) is None, outcome

    def set_tokens(
        self,
        owner: str | Pubkey,
        units: int,
        mint: str | Pubkey = USDC,
        *,
        at: Pubkey | None = None,
    ) -> Pubkey:
        """Somebody has so many from now on, and an account for them: the one that is theirs by
        rule, or any other `at` that address. Answers where it is."""
        where = at or token_account(owner, mint)
        data = struct.pack(
            "<32s32sQI32sBIQQI32s",
            bytes(_key(mint)), bytes(_key(owner)), units, 0, b"", 1, 0, 0, 0, 0, b"",
        )  # fmt: skip
        account = Account(2_039_280, data, TOKEN_PROGRAM, False, 0)
        self._in_vm(lambda machine: machine.set_account(where, account))
        return where

    def tokens(self, owner: str | Pubkey, mint: str | Pubkey = USDC) -> int:
        """How many somebody has; without an account, none."""
        account = self._in_vm(lambda machine: machine.get_account(token_account(owner, mint)))
        return 0 if account is None else _units(account)

    def make_mint(self, address: str | Pubkey | None = None, decimals: int = 6) -> str:
        """Another token. Answers with its address."""
        where = Keypair().pubkey() if address is None else _key(address)
        authority = bytes(Keypair().pubkey())
        data = struct.pack("<I32sQBBI32s", 1, authority, 10**15, decimals, 1, 0, b"")
        account = Account(1_461_600, data, TOKEN_PROGRAM, False, 0)
        self._in_vm(lambda machine: machine.set_account(where, account))
        return str(where)

    def make_table(self, addresses: Sequence[Pubkey]) -> AddressLookupTableAccount:
        """An address lookup table, which stands for these in a message."""
        where = Keypair().pubkey()
        head = struct.pack("<IQQBB32sH", 1, 2**64 - 1, 0, 0, 0, b"", 0)
        data = head + b"".join(bytes(each) for each in addresses)
        account = Account(10_000_000, data, TABLES_PROGRAM, False, 0)
        self._in_vm(lambda machine: machine.set_account(where, account))
        return AddressLookupTableAccount(where, list(addresses))

    def fee_payer(self) -> tuple[str, str]:
        """Address and secret key of somebody new with SOL enough for many fees."""
        keypair = Keypair()
        self.airdrop(keypair.pubkey(), 10**9)
        return str(keypair.pubkey()), str(keypair)

    def blockhash(self) -> str:
        """The latest, with which a transaction can land."""
        return self._in_vm(self._note_blockhash)

    def expire_blockhash(self) -> None:
        """What was signed with the blockhashes so far cannot land any more."""

        def work(machine: LiteSVM) -> None:
            machine.expire_blockhash()
            self._pass(machine, BLOCKHASH_SLOTS + 1)
            self._note_blockhash(machine)

        self._in_vm(work)

    def finalize(self) -> None:
        """Slots pass, until all that landed is finalized."""
        self._in_vm(lambda machine: self._pass(machine, FINAL_SLOTS))

    def _pass(self, machine: LiteSVM, slots: int) -> None:
        self._slot += slots
        machine.warp_to_slot(self._slot)

    def drop_confirmations(self, times: int, *, of_facilitator: bool = True) -> None:
        """The next questions for signatures are answered as if nobody knew them."""
        self.fail("getSignatureStatuses", times, of_facilitator=of_facilitator, how="null")

    def pause(self) -> None:
        """From now on what is sent waits, and lands with `resume`, if it then still can."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for raw in waiting:
            self.land(raw)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def waiting(self) -> int:
        """How many transactions were sent and have not landed yet."""
        return len(self._waiting)

    def land(self, raw: bytes) -> Landed | None:
        """The transaction lands now, or never: None. One that did before is not done again."""
        return self._in_vm(lambda machine: self._land(machine, raw))

    def landed(self) -> list[Landed]:
        """All that did, oldest first."""
        return list(self._landed.values())

    def _land(self, machine: LiteSVM, raw: bytes) -> Landed | None:
        transaction = VersionedTransaction.from_bytes(raw)
        signature = str(transaction.signatures[0])
        if signature in self._landed:
            return self._landed[signature]
        outcome = machine.send_transaction(transaction)
        error = _error(outcome)
        if error is not None and _name(error) in NEVER_LANDS:
            return None
        accounts = {str(key) for key in transaction.message.account_keys}
        for table in getattr(transaction.message, "address_table_lookups", []):
            found = machine.get_account(table.account_key)
            listed = b"" if found is None else bytes(found.data)[56:]
            places = [*table.writable_indexes, *table.readonly_indexes]
            accounts |= {str(Pubkey(listed[32 * at : 32 * at + 32])) for at in places}
        self._pass(machine, 1)
        landed = Landed(
            signature, self._slot, int(time.time()), raw, error, frozenset(accounts), _logs(outcome)
        )
        self._landed[signature] = landed
        return landed

    # What a node is asked.

    def handle(self, method: str, params: list[Any]) -> Any:
        answer = getattr(self, f"_{method}", None)
        if answer is None or not method.startswith(("get", "is", "send", "simulate")):
            raise RpcError("Method not found", -32601)
        try:
            return answer(*params)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise RpcError(f"Invalid params: {error}", -32602) from error

    def nothing(self, method: str, params: list[Any]) -> Any:
        if method == "getSignatureStatuses":
            return self._with_context([None] * len(params[0]))
        return None

    def _with_context(self, value: Any) -> Any:
        return {"context": {"slot": self._slot, "apiVersion": "2.3.0"}, "value": value}

    def _is_final(self, slot: int) -> bool:
        return self._slot - slot >= FINAL_SLOTS

    def _getHealth(self) -> str:
        return "ok"

    def _getVersion(self) -> dict[str, Any]:
        return {"solana-core": "2.3.0", "feature-set": 1}

    def _getGenesisHash(self) -> str:
        return "5eykt4UsFv8P8NJdTREpY1vzqKqZKvdpKuc147dw2N9d"

    def _getSlot(self, config: dict[str, Any] | None = None) -> int:
        final = _commitment(config) == "finalized"
        return max(0, self._slot - FINAL_SLOTS) if final else self._slot

    _getBlockHeight = _getSlot

    def _getBlockTime(self, slot: int) -> int | None:
        times = [landed.at for landed in self.landed() if landed.slot <= slot]
        return times[-1] if times else int(time.time())

    def _getLatestBlockhash(self, config: dict[str, Any] | None = None) -> Any:
        found = self.blockhash()
        return self._with_context(
            {"blockhash": found, "lastValidBlockHeight": self._blockhashes[found]}
        )

    def _isBlockhashValid(self, blockhash: str, config: dict[str, Any] | None = None) -> Any:
        return self._with_context(blockhash == self.blockhash())

    def _getMinimumBalanceForRentExemption(
        self, size: int, config: dict[str, Any] | None = None
    ) -> int:
        return self._in_vm(lambda machine: machine.minimum_balance_for_rent_exemption(size))

    def _getAccountInfo(self, address: str, config: dict[str, Any] | None = None) -> Any:
        return self._with_context(self._account(address))

    def _getMultipleAccounts(self, addresses: list[str], config: Any = None) -> Any:
        return self._with_context([self._account(each) for each in addresses])

    def _account(self, address: str) -> dict[str, Any] | None:
        found = self._in_vm(lambda machine: machine.get_account(_key(address)))
        if found is None:
            return None
        return {
            "data": [base64.b64encode(bytes(found.data)).decode(), "base64"],
            "executable": found.executable,
            "lamports": found.lamports,
            "owner": str(found.owner),
            "rentEpoch": 0,
            "space": len(bytes(found.data)),
        }

    def _getBalance(self, address: str, config: dict[str, Any] | None = None) -> Any:
        balance = self._in_vm(lambda machine: machine.get_balance(_key(address)))
        return self._with_context(balance or 0)

    def _getTokenAccountBalance(self, address: str, config: dict[str, Any] | None = None) -> Any:
        found = self._in_vm(lambda machine: machine.get_account(_key(address)))
        if found is None:
            raise RpcError("Invalid param: could not find account", -32602)
        units = _units(found)
        return self._with_context(
            {
                "amount": str(units), "decimals": 6, "uiAmount": units / 1e6,
                "uiAmountString": f"{units / 1e6:.6f}".rstrip("0").rstrip("."),
            }
        )  # fmt: skip

    def _simulateTransaction(self, encoded: str, config: dict[str, Any] | None = None) -> Any:
        transaction = VersionedTransaction.from_bytes(base64.b64decode(encoded))
        outcome = self._in_vm(lambda machine: machine.simulate_transaction(transaction))
        meta = outcome.meta()
        return self._with_context(
            {
                "err": _error(outcome), "logs": meta.logs(), "accounts": None, "returnData": None,
                "unitsConsumed": meta.compute_units_consumed(),
            }
        )  # fmt: skip

    def _sendTransaction(self, encoded: str, config: dict[str, Any] | None = None) -> str:
        """Like a real one, it says nothing of what will become of the transaction, unless it is to
        try it first."""
        raw = base64.b64decode(encoded)
        transaction = VersionedTransaction.from_bytes(raw)
        if not (config or {}).get("skipPreflight"):
            error = _error(self._in_vm(lambda machine: machine.simulate_transaction(transaction)))
            if error is not None:
                raise RpcError("Transaction simulation failed", -32002, {"err": error})
        with self._lock:
            before, self.before_landing = self.before_landing, None
        if before is not None:
            before()
        if self._paused:
            with self._lock:
                self._waiting.append(raw)
        else:
            self.land(raw)
        return str(transaction.signatures[0])

    def _getSignatureStatuses(
        self, signatures: list[str], config: dict[str, Any] | None = None
    ) -> Any:
        everything = (config or {}).get("searchTransactionHistory", False)
        found: list[dict[str, Any] | None] = []
        for signature in signatures:
            landed = self._landed.get(signature)
            if landed is None or not (everything or self._slot - landed.slot <= RECENT_SLOTS):
                found.append(None)
                continue
            final = self._is_final(landed.slot)
            found.append(
                {
                    "slot": landed.slot,
                    "confirmations": None if final else self._slot - landed.slot,
                    "err": landed.error,
                    "status": {"Err": landed.error} if landed.failed else {"Ok": None},
                    "confirmationStatus": "finalized" if final else "confirmed",
                }
            )
        return self._with_context(found)

    def _getSignaturesForAddress(
        self, address: str, config: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        config = config or {}
        known = [each for each in reversed(self.landed()) if self._shown(each, config)]
        if "before" in config:
            at = [each.signature for each in known].index(config["before"])
            known = known[at + 1 :]
        if "until" in config:
            after = [each.signature for each in known]
            known = known[: after.index(config["until"])] if config["until"] in after else known
        found = [each for each in known if str(_key(address)) in each.accounts]
        return [
            {
                "signature": each.signature, "slot": each.slot, "err": each.error, "memo": None,
                "blockTime": each.at,
                "confirmationStatus": "finalized" if self._is_final(each.slot) else "confirmed",
            }
            for each in found[: config.get("limit", 1000)]
        ]  # fmt: skip

    def _shown(self, landed: Landed, config: dict[str, Any] | None) -> bool:
        return _commitment(config) != "finalized" or self._is_final(landed.slot)

    def _getTransaction(self, signature: str, config: dict[str, Any] | None = None) -> Any:
        landed = self._landed.get(signature)
        if landed is None or not self._shown(landed, config):
            return None
        assert (config or {}).get("encoding") == "base64", "the node knows base64 alone"
        message = VersionedTransaction.from_bytes(landed.raw).message
        versioned = not isinstance(message, Message)
        if versioned and "maxSupportedTransactionVersion" not in (config or {}):
            raise RpcError("Transaction version (0) is not supported", -32015)
        return {
            "slot": landed.slot,
            "blockTime": landed.at,
            "transaction": [base64.b64encode(landed.raw).decode(), "base64"],
            "version": 0 if versioned else "legacy",
            "meta": {
                "err": landed.error,
                "status": {"Err": landed.error} if landed.failed else {"Ok": None},
                "fee": 5000,
                "logMessages": landed.logs,
            },
        }


def _commitment(config: dict[str, Any] | None) -> str:
    """What a node assumes when it is not told is the safest."""
    return str((config or {}).get("commitment", "finalized"))


def _key(address: str | Pubkey) -> Pubkey:
    return Pubkey.from_string(address) if isinstance(address, str) else address


def _units(account: Account) -> int:
    return int.from_bytes(bytes(account.data)[64:72], "little")


def _error(outcome: Any) -> Any:
    """What went wrong, as JSON-RPC says it; None if nothing did."""
    if not isinstance(outcome, FailedTransactionMetadata):
        return None
    error = outcome.err()
    if isinstance(error, TransactionErrorInstructionError):
        return {"InstructionError": [error.index, _what_failed(error.err)]}
    return _last_word(error)


def _what_failed(error: Any) -> Any:
    return (
        {"Custom": error.code} if isinstance(error, InstructionErrorCustom) else _last_word(error)
    )


def _last_word(error: Any) -> str:
    return repr(error).partition("(")[0].rpartition(".")[2]


def _name(error: Any) -> str:
    return next(iter(error)) if isinstance(error, dict) else str(error)


def _logs(outcome: Any) -> list[str]:
    logs: list[str] = (
        outcome.meta().logs() if isinstance(outcome, FailedTransactionMetadata) else outcome.logs()
    )
    return logs
