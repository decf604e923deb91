"""A facilitator on loopback that really settles, and can be made to misbehave at any moment.

What verifies and settles is the official SDK over the chains of the tests, in a process of its own
(tests/x402/serve.py). In front of it stands `Facilitator`, which counts, remembers, and lets a test
put itself before and after each settlement.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import evm_chain
import urllib3
from doubles import Exchange
from evm_chain import EvmChain
from rpc_server import Leaving, need

if TYPE_CHECKING:
    from solana_node import SolanaNode

START_SECONDS = 40.0
SCRIPT = Path(__file__).resolve().parent / "x402" / "serve.py"


@dataclass
class Reply:
    """What is answered instead.

    `declared` is the Content-Length, if it shall not be the body's. With `how` "close" nothing is
    answered and the connection closed, with "reset" it is reset.
    """

    status: int = 200
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)
    declared: int | None = None
    how: str = "answer"

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Reply:
        return cls(status, json.dumps(value).encode())


DROP = Reply(how="close")
RESET = Reply(how="reset")


@dataclass
class Asked:
    """One verification or settlement that was asked for."""

    verb: str
    payload: dict[str, Any]
    requirements: dict[str, Any]
    headers: list[tuple[str, str]]
    body: bytes
    answer: dict[str, Any] | None = None  # the SDK's; none if it was not asked, or not yet
    status: int = 0


Hook = Callable[[Asked], Reply | None]


class Facilitator(Leaving):
    """`with Facilitator(evm=chain, solana=node) as facilitator:`, over one of them or both.

    `before_settle` and `after_settle` are called with what is asked, the second when the chain has
    had its say (`asked.answer`). They may wait as long as they like, and what they return, if
    anything, is answered instead; before the settlement it then does not take place. The same for
    `before_verify` and `after_verify`. `supported` replaces the answer to that question.

    `mended` chooses between signers that are sound and the SDK's own, at any time.
    `confirm_seconds` is how long it waits for a transaction before it says that it is pending.
    """

    def __init__(
        self,
        *,
        evm: EvmChain | None = None,
        solana: SolanaNode | None = None,
        mended: bool = True,
        confirm_seconds: float = 2.0,
    ) -> None:
        need("x402", "web3", "solana")
        super().__init__()
        self._evm, self._solana = evm, solana
        self._confirm_seconds = confirm_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._sdk: urllib3.HTTPConnectionPool | None = None
        self.fee_payer = ""
        self.mended = mended
        self.forget()

    def forget(self) -> None:
        """As it was in the beginning: nothing counted, no hooks."""
        self.calls: Counter[str] = Counter()
        self.settles: list[Asked] = []
        self.verifies: list[Asked] = []
        self.before_settle: Hook | None = None
        self.after_settle: Hook | None = None
        self.before_verify: Hook | None = None
        self.after_verify: Hook | None = None
        self.supported: Reply | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        given: dict[str, Any] = {
            "evm_url": self._evm.facilitator_url if self._evm else None,
            "evm_keys": evm_chain.KEYS,
            "solana_url": self._solana.facilitator_url if self._solana else None,
            "confirm_seconds": self._confirm_seconds,
        }
        if self._solana is not None:
            self.fee_payer, given["solana_key"] = self._solana.fee_payer()
        self._errors = tempfile.TemporaryFile()  # `__exit__` closes it
        self._process = subprocess.Popen(
            [sys.executable, SCRIPT, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        url = self._process.stdout.readline().decode().strip() if ready else ""
        if not url:
            log = self.log()
            self.__exit__(None, None, None)
            raise AssertionError(f"the facilitator did not start:\n{log}")
        self._sdk = urllib3.HTTPConnectionPool(
            "127.0.0.1", int(url.rpartition(":")[2]), maxsize=64, retries=False, timeout=60
        )
        return self

    def log(self) -> str:
        """What the SDK's process wrote to standard error."""
        assert self._errors is not None
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._sdk is not None:
            self._sdk.close()
        process = self._process
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        if self._errors is not None:
            self._errors.close()
        super().__exit__(kind, value, trace)

    def respond(self, exchange: Exchange) -> None:
        verb = exchange.hit.path.rpartition("/")[2]
        with self._lock:
            self.calls[verb] += 1
        if exchange.hit.method == "GET" and verb == "supported":
            _say(exchange, self.supported or self._ask("GET", verb, None))
        elif exchange.hit.method == "POST" and verb in ("verify", "settle"):
            _say(exchange, self._conclude(verb, exchange))
        else:
            exchange.json(404, {"error": "there is no such thing here"})

    def _conclude(self, verb: str, exchange: Exchange) -> Reply:
        hit = exchange.hit
        body: Any = json.loads(hit.body)
        asked = Asked(
            verb, body["paymentPayload"], body["paymentRequirements"], hit.headers, hit.body
        )
        with self._lock:
            (self.settles if verb == "settle" else self.verifies).append(asked)
        before: Hook | None = getattr(self, f"before_{verb}")
        after: Hook | None = getattr(self, f"after_{verb}")
        instead = before(asked) if before else None
        if instead is not None:
            return instead
        reply = self._ask("POST", verb, hit.body)
        asked.answer, asked.status = json.loads(reply.body), reply.status
        instead = after(asked) if after else None
        return instead or reply

    def _ask(self, method: str, verb: str, body: bytes | None) -> Reply:
        path = f"/{'mended' if self.mended else 'stock'}/{verb}"
        assert self._sdk is not None
        answer = self._sdk.request(method, path, body=body)
        return Reply(answer.status, answer.data)


def _say(exchange: Exchange, reply: Reply) -> None:
    if reply.how == "close":
        exchange.close()
    elif reply.how == "reset":
        exchange.reset()
    elif reply.declared is None:
        exchange.answer(reply.status, reply.body, reply.headers)
    else:
        length = ("Content-Length", str(reply.declared))
        exchange.head(reply.status, [("Content-Type", "application/json"), length, *reply.headers])
        exchange.send(reply.body)
        exchange.close()
