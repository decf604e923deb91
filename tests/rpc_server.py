"""JSON-RPC on loopback that can be made to fail, and servers that can be away for a while."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from doubles import Exchange, Server


def need(*modules: str) -> None:
    """Skip what needs them, be it a test or a file of tests, where make could not install them."""
    for module in modules:
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: make test says why", allow_module_level=True)


class Leaving(Server):
    """A server that can go away and come back at the same address."""

    @contextlib.contextmanager
    def unreachable(self) -> Iterator[None]:
        """Meanwhile connections to it are refused, and those it had are broken off."""
        address = self._listener.getsockname()
        self._listener.shutdown(socket.SHUT_RDWR)  # which ends the thread that accepts
        self._listener.close()
        # Bound but not listening: nobody else gets the port, and who comes is refused.
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(address)
        with self._lock:
            open_ones = list(self._connections)
        for sock in open_ones:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        try:
            yield
        finally:
            self._listener.listen(1024)
            threading.Thread(target=self._accept, name="double-accept", daemon=True).start()


class RpcError(Exception):
    """What a node answers instead of a result."""

    def __init__(self, message: str, code: int = -32000, data: Any = None) -> None:
        super().__init__(message)
        self.error = {"code": code, "message": message, "data": data}


class RpcServer(Leaving):
    """A node of some chain. Subclasses say what the methods do.

    It has two addresses, so that one side can be failed while the other sees the chain: `url` for
    the gateway and whoever else, `facilitator_url` for the facilitator. `calls` counts what came to
    the first by method, `facilitator_calls` what came to the second.
    """

    def __init__(self) -> None:
        super().__init__()
        self.facilitator_url = f"{self.url}/facilitator"
        self.calls: Counter[str] = Counter()
        self.facilitator_calls: Counter[str] = Counter()
        self._failures: list[tuple[str, bool, str]] = []

    def fail(
        self, method: str, times: int = 1, *, of_facilitator: bool = False, how: str = "error"
    ) -> None:
        """The next calls of the method come to nothing.

        They are answered with an error and not carried out; with `how="cut"` they are carried out
        and the connection is closed instead of an answer; with `how="null"` the result knows of
        nothing.
        """
        with self._lock:
            self._failures += [(method, of_facilitator, how)] * times

    def no_more_failures(self) -> None:
        with self._lock:
            self._failures.clear()

    def handle(self, method: str, params: list[Any]) -> Any:
        """The result, or RpcError."""
        raise NotImplementedError

    def nothing(self, method: str, params: list[Any]) -> Any:
        """A result that knows of nothing."""
        return None

    def respond(self, exchange: Exchange) -> None:
        of_facilitator = exchange.hit.path == "/facilitator"
        asked = json.loads(exchange.hit.body)
        answers = [self._answer(each, of_facilitator) for each in _each(asked)]
        if None in answers:
            exchange.keep = False
            return
        exchange.json(200, answers if isinstance(asked, list) else answers[0])

    def _answer(self, asked: dict[str, Any], of_facilitator: bool) -> dict[str, Any] | None:
        method, how = asked["method"], ""
        with self._lock:
            (self.facilitator_calls if of_facilitator else self.calls)[method] += 1
            for due in self._failures:
                if due[:2] == (method, of_facilitator):
                    how = due[2]
                    self._failures.remove(due)
                    break
        answer = {"jsonrpc": "2.0", "id": asked.get("id")}
        try:
            if how == "error":
                raise RpcError("the node was told to fail")
            params = asked.get("params") or []
            if how == "null":
                return answer | {"result": self.nothing(method, params)}
            result = self.handle(method, params)
        except RpcError as failed:
            return answer | {"error": failed.error}
        if how == "cut":
            return None
        return answer | {"result": result}


def _each(asked: Any) -> list[dict[str, Any]]:
    return asked if isinstance(asked, list) else [asked]
