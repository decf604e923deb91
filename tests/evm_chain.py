"""A real EVM chain on loopback, with a dollar at the address that USDC has on Base.

The chain is anvil's, with Base's number. The dollar is tests/x402/FiatToken.sol, so a configuration
for Base works here unchanged.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import pytest
import urllib3
from rpc_server import RpcError, RpcServer
from server import until

FOLDER = Path(__file__).resolve().parent / "x402"
ANVIL = FOLDER / "node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil"
NETWORK = "eip155:8453"
CHAIN_ID = 8453
USDC = "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913"
DOMAIN = {
    "name": "USD Coin", "version": "2", "chainId": CHAIN_ID, "verifyingContract": USDC,
}  # fmt: skip
# The accounts anvil starts with, all of them rich in ether; everybody knows their keys.
KEYS = (
    "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80",
    "0x59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d",
)
# The third, which is neither of a facilitator's, sends what the tests send.
ANYBODY = "0x3c44cdddb6a900fa2b585dd299e03d12fa4293bc"
TRANSFER = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"
_ERROR_STRING = "0x08c379a0"


class Account(Protocol):
    """What of eth_account's LocalAccount is needed to sign."""

    address: str

    def sign_typed_data(self, **parts: Any) -> Any: ...


class Reverted(Exception):
    """The contract refused. `reason` is its word, `transaction` the hash of what landed."""

    def __init__(self, reason: str, transaction: str) -> None:
        super().__init__(f"{reason} ({transaction})")
        self.reason = reason
        self.transaction = transaction


class EvmChain(RpcServer):
    """`with EvmChain() as chain:`. Each transaction is a block at once, unless paused."""

    network = NETWORK
    asset = USDC

    def __init__(self) -> None:
        if not ANVIL.exists():
            pytest.skip("anvil is not installed: make test says why")
        super().__init__()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._anvil: urllib3.HTTPConnectionPool | None = None
        self._artifact = json.loads((FOLDER / "FiatToken.json").read_text("utf-8"))
        self._mining = True

    def __enter__(self) -> Self:
        super().__enter__()
        self._log = tempfile.TemporaryFile()  # `__exit__` closes it
        self._process = subprocess.Popen(
            [ANVIL, "--port", "0", "--chain-id", str(CHAIN_ID), "--accounts", "3",
             "--slots-in-an-epoch", "1"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            port = until(self._port, what="anvil listens")
            self._anvil = urllib3.HTTPConnectionPool(
                "127.0.0.1", port, maxsize=64, retries=False, timeout=60
            )
            self.rpc("anvil_setCode", USDC, self._artifact["runtime"])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._anvil is not None:
            self._anvil.close()
        if self._log is not None:
            self._log.close()
        super().__exit__(kind, value, trace)

    def _port(self) -> int:
        assert self._process is not None and self._log is not None
        self._log.seek(0)
        log = self._log.read().decode("utf-8", "replace")
        assert self._process.poll() is None, f"anvil did not start:\n{log}"
        _, listens, rest = log.partition("Listening on 127.0.0.1:")
        return int(rest.split()[0]) if listens and "\n" in rest else 0

    # The node.

    def handle(self, method: str, params: list[Any]) -> Any:
        return self.rpc(method, *params)

    def rpc(self, method: str, *params: Any) -> Any:
        """Ask anvil, past everything that was told to fail. Raises RpcError."""
        assert self._anvil is not None
        asked = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        answer = self._anvil.request("POST", "/", json=asked).json()
        if "error" in answer:
            error = answer["error"]
            raise RpcError(error["message"], error["code"], error.get("data"))
        return answer["result"]

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Meanwhile the node takes connections and requests, and says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        until(self._is_stopped, what="every thread has stopped")
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _is_stopped(self) -> bool:
        assert self._process is not None
        threads = Path(f"/proc/{self._process.pid}/task").glob("*/stat")
        return all(each.read_text().rpartition(")")[2].split()[0] == "T" for each in threads)

    # Time.

    def now(self) -> int:
        """The latest block's time, in seconds since 1970."""
        return int(self.rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)

    def mine(self, blocks: int = 1) -> None:
        """So many blocks more; the first takes what is pending."""
        if blocks == 1:
            self.rpc("evm_mine")
        else:
            self.rpc("anvil_mine", hex(blocks))

    def advance(self, seconds: int) -> None:
        """The chain's clock goes on, for good, and a block is made."""
        self.rpc("evm_increaseTime", seconds)
        self.mine()

    def pause(self) -> None:
        """From now on what is sent stays pending, until `mine` or `resume`."""
        self.rpc("evm_setAutomine", False)
        self._mining = False

    def resume(self) -> None:
        """Take what is pending into blocks, and what comes at once."""
        self._mining = True
        self.rpc("evm_setAutomine", True)
        until(lambda: int(self.rpc("txpool_status")["pending"], 16) == 0, what="it is mined")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pending(self) -> int:
        """How many transactions wait for a block."""
        return int(self.rpc("txpool_status")["pending"], 16)

    # The dollar. Amounts are its units, of which it has a million.

    def mint(self, address: str, units: int) -> str:
        """Give somebody so many. Answers with the transaction's hash, as all that follow."""
        return self._send(self._call_data("mint(address,uint256)", address, units))

    def burn(self, address: str, units: int) -> str:
        """Take from somebody so many."""
        return self._send(self._call_data("burn(address,uint256)", address, units))

    def balance(self, address: str) -> int:
        return int(self._read("balanceOf(address)", address), 16)

    def authorization_used(self, from_: str, nonce: str) -> bool:
        """Whether the authorization was used or cancelled."""
        return int(self._read("authorizationState(address,bytes32)", from_, nonce), 16) == 1

    def submit(self, authorization: dict[str, Any], signature: str, *, parts: bool = False) -> str:
        """Send what a payer signed, as anybody may who has seen it. Raises Reverted.

        The contract takes the signature whole, or in its three `parts`.
        """
        fields = [authorization[name] for name in
                  ("from", "to", "value", "validAfter", "validBefore", "nonce")]  # fmt: skip
        signed = bytes.fromhex(signature.removeprefix("0x"))
        function = "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,"
        if parts:
            fields += [signed[64], int.from_bytes(signed[:32]), int.from_bytes(signed[32:64])]
            return self._send(self._call_data(f"{function}uint8,bytes32,bytes32)", *fields))
        return self._send(self._call_data(f"{function}bytes)", *fields, signed))

    def cancel(self, account: Account, nonce: str) -> str:
        """Have the payer take an authorization back. Raises Reverted."""
        signed = account.sign_typed_data(
            domain_data=DOMAIN,
            message_types={
                "CancelAuthorization": [
                    {"name": "authorizer", "type": "address"},
                    {"name": "nonce", "type": "bytes32"},
                ]
            },
            message_data={"authorizer": account.address, "nonce": nonce},
        )
        call = self._call_data(
            "cancelAuthorization(address,bytes32,bytes)",
            account.address,
            nonce,
            bytes(signed.signature),
        )
        return self._send(call)

    def transfers(self, *, to: str) -> list[tuple[str, int]]:
        """Who has paid somebody, and how much, oldest first. What was minted is not among them."""
        logs = self.rpc("eth_getLogs", {
            "fromBlock": "0x0", "address": USDC,
            "topics": [TRANSFER, None, f"0x{_word(to).hex()}"],
        })  # fmt: skip
        found = [("0x" + log["topics"][1][-40:], int(log["data"], 16)) for log in logs]
        return [(who, units) for who, units in found if int(who, 16)]

    # How it is spoken to.

    def _call_data(self, function: str, *arguments: Any) -> str:
        """The call as the ABI has it: words, then bytes if the last argument is bytes."""
        words = b"".join(_word(each) for each in arguments if not isinstance(each, bytes))
        if arguments and isinstance(arguments[-1], bytes):
            tail = arguments[-1]
            words += _word(len(arguments) * 32) + _word(len(tail)) + tail + bytes(-len(tail) % 32)
        return f"0x{self._artifact['selectors'][function]}{words.hex()}"

    def _read(self, function: str, *arguments: Any) -> str:
        call = {"to": USDC, "data": self._call_data(function, *arguments)}
        answer = self.rpc("eth_call", call, "latest")
        assert isinstance(answer, str)
        return answer

    def _send(self, data: str) -> str:
        call = {"from": ANYBODY, "to": USDC, "data": data, "gas": hex(300_000)}
        transaction: str = self.rpc("eth_sendTransaction", call)
        if self._mining:
            receipt = until(lambda: self.rpc("eth_getTransactionReceipt", transaction))
            if int(receipt["status"], 16) != 1:
                raise Reverted(self._reason(call), transaction)
        return transaction

    def _reason(self, call: dict[str, str]) -> str:
        """Why a call that was refused would be refused again."""
        try:
            self.rpc("eth_call", call, "latest")
        except RpcError as refused:
            data = str(refused.error["data"])
            if data.startswith(_ERROR_STRING):
                text = bytes.fromhex(data.removeprefix(_ERROR_STRING))
                return text[64 : 64 + int.from_bytes(text[32:64])].decode()
            return str(refused)
        return ""


def _word(value: Any) -> bytes:
    """A number, an address or 32 bytes in hexadecimal, as one word of 32 bytes."""
    number = int(value, 16) if isinstance(value, str) and value.startswith("0x") else int(value)
    return number.to_bytes(32)
