"""Whoever settles payments on the network and pays its fees: any x402 v2 facilitator, by URL.

What it answers is one of four things: the money moved; it did not and will not; it never heard of
the payment; nobody knows. Only what is said in so many words is believed, the rest is the last.
"""

import json
import logging
import re
from typing import Any, Literal, NamedTuple

from config import Network
from core import strict_json, upstream
from core.errors import Refusal
from core.payments import wire
from core.upstream import Outbound, Unreached

log = logging.getLogger("farebox.payments")

_SETTLE_SECONDS = 60.0  # a busy network takes its time, and a broken wait is an unknown outcome
_ASK_SECONDS = 5.0
_LARGEST_ANSWER = 256 * 1024
# It, or what stands in front of it, refuses the operator, not the payment, and has not read it.
_OPERATORS_FAULT = frozenset({401, 403, 404, 405, 407, 429})
# Reasons that are about the payment as it is, before anything is sent to the network, and those
# among them that may mean that it was sent before: then the money has moved all the same.
# (https://github.com/coinbase/x402, specs and SDK)
_BEFORE_SENDING = (
    "invalid_", "unsupported_", "insufficient_", "missing_", "undeployed_", "network_mismatch",
    "fee_payer_not_managed", "asset_not_deployed",
)  # fmt: skip
_PERHAPS_SENT = ("nonce", "used", "already", "simulation", "event", "state", "pending", "duplicate")
# On Solana only the facilitator can send a payment, so one that cannot succeed was not sent.
_BEFORE_SENDING_ON_SOLANA = ("transaction_simulation_failed",)


# What it calls a transaction goes into headers and books, and to nodes.
_TRANSACTION = re.compile(r"[0-9A-Za-z]{1,128}")


class Verdict(NamedTuple):
    """What a facilitator says of a payment."""

    outcome: Literal["settled", "refused", "unheard", "unknown"]
    transaction: str | None = None
    reason: str = ""


class _Verification(wire.Shape, frozen=True):
    """Its answer to `/verify`."""

    is_valid: bool
    invalid_reason: str | None = None


def settle(
    network: Network, signed: dict[str, Any], requirement: dict[str, Any], resource: str,
    first: bool = False,
) -> Verdict:  # fmt: skip
    """Have a payment settled. It may be asked again for the same: the network takes it once.

    For the first time, and where no node will tell how it ended, it is asked before whether it
    could be settled: what it says of a transaction that it has made in vain proves nothing.
    Never called inside a transaction.
    """
    payload = {
        "x402Version": wire.VERSION,
        "resource": {"url": resource},
        "accepted": requirement,
        "payload": signed,
    }
    body = {
        "x402Version": wire.VERSION,
        "paymentPayload": payload,
        "paymentRequirements": requirement,
    }
    reason = _objection(network, body) if first and network.rpc is None else None
    if reason is not None:
        return Verdict("refused", None, reason)
    try:
        status, answer = _ask(network, "POST", "/settle", json.dumps(body), _SETTLE_SECONDS)
    except Unreached as error:
        return Verdict("unheard", reason=error.message)
    except Refusal as error:
        return Verdict("unknown", reason=f"the facilitator: {error.message}")
    verdict = _verdict(network, status, answer)
    if verdict.outcome != "settled":
        log.warning("facilitator: %s: %s, %s", status, verdict.outcome, verdict.reason)
    return verdict


def _objection(network: Network, body: dict[str, Any]) -> str | None:
    """Why a payment cannot be settled, if it says so in so many words."""
    try:
        status, answer = _ask(network, "POST", "/verify", json.dumps(body), _ASK_SECONDS)
        said = strict_json.decode(answer, _Verification)
    except (Refusal, ValueError):
        return None
    reason = _printable(said.invalid_reason)
    if said.is_valid or status >= 500 or not _is_before_sending(network, reason):
        return None
    return reason


def _verdict(network: Network, status: int, answer: bytes) -> Verdict:
    if status in _OPERATORS_FAULT:
        return Verdict("unheard", reason=f"the facilitator refused us with status {status}")
    try:
        said = strict_json.decode(answer, wire.Settlement)
    except ValueError:
        return Verdict("unknown", reason=f"the facilitator's answer of status {status} is none")
    called = said.transaction or ""
    transaction = called if _TRANSACTION.fullmatch(called) else None
    reason = _printable(said.error_reason) or "no reason given"
    if said.success:
        if not 200 <= status < 300:
            return Verdict("unknown", transaction, f"success with status {status}")
        if said.network != network.id:
            return Verdict("unknown", transaction, f"settled on {str(said.network)[:100]!r}")
        if transaction is None:
            return Verdict("unknown", None, "settled without a transaction")
        return Verdict("settled", transaction)
    if transaction is None and status < 500 and _is_before_sending(network, reason):
        return Verdict("refused", None, reason)
    return Verdict("unknown", transaction, reason)


def _printable(reason: str | None) -> str:
    """A reason, as logs, terminals and callers may see it."""
    return "".join(letter for letter in reason or "" if letter.isprintable())[:200]


def _is_before_sending(network: Network, reason: str) -> bool:
    if network.namespace == "solana" and reason in _BEFORE_SENDING_ON_SOLANA:
        return True
    return reason.startswith(_BEFORE_SENDING) and not any(word in reason for word in _PERHAPS_SENT)


class Support(NamedTuple):
    """What a facilitator does on a network."""

    settles: bool
    fee_payers: tuple[str, ...]  # who pays the network's fees; the one to name is the first


def supported(network: Network) -> Support:
    """Ask a facilitator what it does on a network. Raises a Refusal when it does not say."""
    status, answer = _ask(network, "GET", "/supported", "", _ASK_SECONDS)
    try:
        said = strict_json.decode(answer, wire.Supported)
    except ValueError as error:
        raise Refusal("facilitator_unavailable", f"its answer cannot be read: {error}") from None
    if status != 200:
        raise Refusal("facilitator_unavailable", f"it answers with status {status}")
    kinds = [
        kind
        for kind in said.kinds
        if (kind.x402_version, kind.scheme, kind.network) == (wire.VERSION, wire.SCHEME, network.id)
    ]
    named = [(kind.extra or {}).get("feePayer") for kind in kinds]
    others = [*said.signers.get(network.id, ()), *said.signers.get(f"{network.namespace}:*", ())]
    payers = dict.fromkeys(payer for payer in [*named, *others] if isinstance(payer, str))
    return Support(bool(kinds), tuple(payers))


def _ask(
    network: Network, method: str, path: str, body: str, seconds: float
) -> tuple[int, bytes]:  # fmt: skip
    """Status and body of an answer. Raises as `Wires.send` does."""
    headers = [("Accept", "application/json"), *network.facilitator_headers.items()]
    if body:
        headers.append(("Content-Type", "application/json"))
    url = network.facilitator_url + path
    return upstream.ask(
        Outbound(method, url, headers, body.encode(), seconds, seconds), _LARGEST_ANSWER
    )
