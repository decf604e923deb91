"""A facilitator built from the official SDK, in a process of its own; see tests/facilitator.py.

    serve.py '{"evm_url": "http://…", "evm_keys": ["0x…", "0x…"], "solana_url": …, "solana_key": …,
               "confirm_seconds": 3}'

It prints its address and ends when its standard input does. What is asked under /mended/ is
answered with signers that do better than the SDK's own, under /stock/ with the SDK's.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from x402 import x402FacilitatorSync
from x402.schemas import PaymentRequirements, parse_payment_payload

EVM = "eip155:8453"
SOLANA = "solana:5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp"


def main() -> None:
    given = json.loads(sys.argv[1])
    facilitators = {"mended": x402FacilitatorSync(), "stock": x402FacilitatorSync()}
    if given["evm_url"]:
        _add_evm(facilitators, given)
    failed: set[str] = set()
    if given["solana_url"]:
        _add_solana(facilitators, given, failed)
    server = _server(facilitators, failed)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    threading.Thread(target=_until_left_alone, daemon=True).start()
    server.serve_forever()


def _until_left_alone() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _add_evm(facilitators: dict[str, x402FacilitatorSync], given: dict[str, Any]) -> None:
    from x402.mechanisms.evm.exact import register_exact_evm_facilitator
    from x402.mechanisms.evm.signers import FacilitatorWeb3Signer

    class Mended(FacilitatorWeb3Signer):
        """The SDK's takes a number for a transaction and never gives it back, so that after one
        that could not be sent all that follow wait for ever. This one asks the chain again."""

        sending = threading.Lock()

        def write_contract(self, *args: Any, **options: Any) -> str:
            return self._in_turn(super().write_contract, *args, **options)

        def send_transaction(self, *args: Any, **options: Any) -> str:
            return self._in_turn(super().send_transaction, *args, **options)

        def _in_turn(self, send: Callable[..., str], *args: Any, **options: Any) -> str:
            with self.sending:
                try:
                    return send(*args, **options)
                except Exception:
                    with self._nonce_lock:
                        self._next_nonce = None
                    raise

    # An account each: two that number the transactions of one would be in each other's way.
    kinds: dict[str, type[FacilitatorWeb3Signer]] = {
        "mended": Mended,
        "stock": FacilitatorWeb3Signer,
    }
    for (name, kind), key in zip(kinds.items(), given["evm_keys"], strict=True):
        signer = kind(key, given["evm_url"], confirmation_timeout_seconds=given["confirm_seconds"])
        register_exact_evm_facilitator(facilitators[name], signer, [EVM])


def _add_solana(
    facilitators: dict[str, x402FacilitatorSync], given: dict[str, Any], failed: set[str]
) -> None:
    from solders.keypair import Keypair
    from solders.signature import Signature
    from x402.mechanisms.svm import FacilitatorKeypairSigner
    from x402.mechanisms.svm.exact import register_exact_svm_facilitator

    class Stock(FacilitatorKeypairSigner):
        """The SDK's, which has no other way to be told how long to wait."""

        def confirm_transaction(
            self, signature: str, network: str, timeout_seconds: float = given["confirm_seconds"]
        ) -> None:
            super().confirm_transaction(signature, network, timeout_seconds)  # type: ignore[arg-type]

    class Mended(FacilitatorKeypairSigner):
        """The SDK's takes a transaction that landed and failed for a payment."""

        def confirm_transaction(
            self, signature: str, network: str, timeout_seconds: float = given["confirm_seconds"]
        ) -> None:
            node = self._get_client(network)
            end = time.monotonic() + timeout_seconds
            while time.monotonic() < end:
                status = node.get_signature_statuses(
                    [Signature.from_string(signature)], search_transaction_history=True
                ).value[0]
                if status is not None and status.err is not None:
                    failed.add(signature)
                    raise RuntimeError(f"the transaction failed: {status.err}")
                if status is not None and status.confirmation_status is not None:
                    return
                time.sleep(0.05)
            raise RuntimeError("the transaction was not confirmed in time")

    # They share an account, because the challenge names who pays the fee.
    kinds: dict[str, type[FacilitatorKeypairSigner]] = {"mended": Mended, "stock": Stock}
    for name, kind in kinds.items():
        signer = kind(Keypair.from_base58_string(given["solana_key"]), given["solana_url"])
        register_exact_svm_facilitator(facilitators[name], signer, [SOLANA])


def _server(facilitators: dict[str, x402FacilitatorSync], failed: set[str]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            _, name, verb = self.path.split("/")
            assert verb == "supported"
            self._answer(200, _plain(facilitators[name].get_supported()))

        def do_POST(self) -> None:
            _, name, verb = self.path.split("/")
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                payload = parse_payment_payload(asked["paymentPayload"])
                wanted = PaymentRequirements.model_validate(asked["paymentRequirements"])
            except (ValueError, KeyError, TypeError) as error:
                self._answer(400, _unreadable(verb, str(error)))
                return
            try:
                found = _plain(getattr(facilitators[name], verb)(payload, wanted))
            except Exception as error:
                self._answer(500, {"error": repr(error)})
                return
            if name == "mended" and found.get("transaction") in failed:
                # It will not change any more, which "pending" would say.
                found["errorReason"] = "transaction_failed"
            self._answer(200, found)

        def _answer(self, status: int, value: dict[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    class Threads(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    return Threads(("127.0.0.1", 0), Handler)


def _plain(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_dump(by_alias=True, exclude_none=True, mode="json")
    return found


def _unreadable(verb: str, why: str) -> dict[str, Any]:
    if verb == "verify":
        return {"isValid": False, "invalidReason": "invalid_payload", "invalidMessage": why}
    return {
        "success": False, "errorReason": "invalid_payload", "errorMessage": why,
        "transaction": "", "network": "",
    }  # fmt: skip


if __name__ == "__main__":
    main()
