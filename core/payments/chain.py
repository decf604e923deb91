"""What really happened, read from a network's node over JSON-RPC.

A node is believed in what it says of a transaction that is there, and of time: that a payment is
not there says nothing until the network cannot take it any more.
"""

import json
from typing import Any, Literal, NamedTuple

from config import Network
from core import clock, strict_json
from core.errors import Refusal
from core.payments import svm
from core.payments.records import Record
from core.upstream import Outbound, Wires

_PATIENCE_SECONDS = 10.0
_LARGEST_ANSWER = 4 * 1024 * 1024

# keccak-256 of the events' signatures, and the first four bytes of the function's.
_TRANSFER = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"
_AUTHORIZATION_USED = "0x98de503528ee59b575ef0c0a2576a82497bfc029a5685b209e9ec333479b10a5"
_AUTHORIZATION_CANCELED = "0x1cdd46ff242716cdaa72d159d339a485b3438398348d68f09d7c8c0a59353d81"
_AUTHORIZATION_STATE = "0xe94a0102"
# By so much a network's clock must be past a payment's end before it counts as over.
_CLEARLY_OVER_MS = 60_000
# A payment that was made before it was shown here was not made for a request here.
_CLOCKS_MS = 15_000
# A transaction lives for 150 slots of Solana, about a minute; and a node that lags behind does not
# know the newest blockhashes yet.
_LIFE_ON_SOLANA_MS = 180_000
_BLOCKS_AT_ONCE = 2_000  # nodes refuse to search more
_MOST_SEARCHES = 60
_SIGNATURES_AT_ONCE = 100


class Finding(NamedTuple):
    """`settled`, with the transaction; `never`, now or later; or `open`."""

    outcome: Literal["settled", "never", "open"]
    transaction: str | None = None


class Silent(Exception):
    """A node did not say, and why."""


def look(network: Network, record: Record) -> Finding:
    """What became of a payment. Raises Silent. Never called inside a transaction."""
    assert network.rpc is not None  # whoever has no node asks nobody
    look_there = _look_on_solana if network.namespace == "solana" else _look_on_evm
    try:
        return look_there(network.rpc, record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Silent(f"the node's answer has another shape: {error!r}") from None


# Ethereum's networks


def _look_on_evm(url: str, record: Record) -> Finding:
    told = record.signed["authorization"]
    payer, nonce = _topic(told["from"]), told["nonce"]
    call = {"to": record.asset, "data": _AUTHORIZATION_STATE + payer[2:] + nonce[2:]}
    if int(_ask(url, "eth_call", [call, "latest"]), 16) == 0:
        now = _time_of_block(url, "latest")
        over = (record.expires_at or 0) + _CLEARLY_OVER_MS
        return Finding("never" if now > over else "open")
    if record.transaction_id is not None:
        paid = _pays_on_evm(url, record, record.transaction_id)
        if paid:
            return Finding("settled", record.transaction_id)
    topic, transaction = _search_on_evm(url, record, payer, nonce)
    if topic == _AUTHORIZATION_CANCELED:
        return Finding("never")
    paid = _pays_on_evm(url, record, transaction)
    if paid is None:
        raise Silent("the node does not know a transaction that it has told of")
    return Finding("settled", transaction) if paid else Finding("never")


def _search_on_evm(url: str, record: Record, payer: str, nonce: str) -> tuple[str, str]:
    """What ended an authorization, and in which transaction: from now back to when it was shown
    here."""
    last = int(_ask(url, "eth_blockNumber", []), 16)
    for _ in range(_MOST_SEARCHES):
        first = max(0, last - _BLOCKS_AT_ONCE + 1)
        wanted = {
            "address": record.asset,
            "topics": [[_AUTHORIZATION_USED, _AUTHORIZATION_CANCELED], payer, nonce],
            "fromBlock": hex(first),
            "toBlock": hex(last),
        }
        logs = _ask(url, "eth_getLogs", [wanted])
        if logs:
            return logs[0]["topics"][0].lower(), logs[0]["transactionHash"]
        if first == 0:
            break
        last = first - 1
    raise Silent("what ended the authorization is not found")


def _pays_on_evm(url: str, record: Record, transaction: str) -> bool | None:
    """Whether a transaction used this authorization, paid us in full, and did so since the payment
    was shown here; None when the node does not know it."""
    receipt = _ask(url, "eth_getTransactionReceipt", [transaction])
    if receipt is None:
        return None
    told = record.signed["authorization"]
    payer, payee = _topic(told["from"]), _topic(record.pay_to)
    used = paid = False
    for log in receipt["logs"] if int(receipt["status"], 16) == 1 else []:
        if log["address"].lower() != record.asset.lower():
            continue
        topics = [topic.lower() for topic in log["topics"]]
        if topics == [_AUTHORIZATION_USED, payer, told["nonce"]]:
            used = True
        elif topics == [_TRANSFER, payer, payee]:
            paid = paid or int(log["data"], 16) == record.amount
    at = _time_of_block(url, receipt["blockNumber"])
    return used and paid and at >= record.created_at - _CLOCKS_MS


def _time_of_block(url: str, number: str) -> int:
    return int(_ask(url, "eth_getBlockByNumber", [number, False])["timestamp"], 16) * 1000


def _topic(address: str) -> str:
    """An address as a word of 32 bytes."""
    return "0x" + address[2:].lower().rjust(64, "0")


# Solana


def _look_on_solana(url: str, record: Record) -> Finding:
    trace = svm.trace(record.signed["transaction"])
    # Asked first: what is not found after the network would not take it any more will never be.
    is_old = clock.now_ms() > record.created_at + _LIFE_ON_SOLANA_MS
    asked = [trace.blockhash, {"commitment": "processed"}]
    is_over = is_old and _ask(url, "isBlockhashValid", asked)["value"] is False
    known = [] if record.transaction_id is None else [record.transaction_id]
    for signature in (*known, *_signatures_of(url, trace.source, record.created_at)):
        if _is_this(url, trace, signature):
            return _status_on_solana(url, signature)
    return Finding("never" if is_over else "open")


def _status_on_solana(url: str, signature: str) -> Finding:
    """How a transaction ended."""
    asked = [[signature], {"searchTransactionHistory": True}]
    status = _ask(url, "getSignatureStatuses", asked)["value"][0]
    if status is None or status["confirmationStatus"] not in ("confirmed", "finalized"):
        return Finding("open")
    # One that has landed and failed is confirmed too.
    return Finding("settled" if status["err"] is None else "never", signature)


def _signatures_of(url: str, address: str, since: int) -> list[str]:
    """The transactions of a token account since a moment, the last first."""
    asked = [address, {"limit": _SIGNATURES_AT_ONCE, "commitment": "confirmed"}]
    return [
        row["signature"]
        for row in _ask(url, "getSignaturesForAddress", asked)
        if row["blockTime"] is None or row["blockTime"] * 1000 >= since - _CLOCKS_MS
    ]


def _is_this(url: str, trace: svm.Trace, signature: str) -> bool:
    """Whether a transaction on the network is the one that was signed."""
    asked = {"encoding": "base64", "commitment": "confirmed", "maxSupportedTransactionVersion": 0}
    found = _ask(url, "getTransaction", [signature, asked])
    return found is not None and svm.digest_of(found["transaction"][0]) == trace.digest


# JSON-RPC


def _ask(url: str, method: str, params: list[Any]) -> Any:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
    headers = [("Content-Type", "application/json"), ("Accept", "application/json")]
    patience = _PATIENCE_SECONDS
    try:
        reply = Wires().send(Outbound("POST", url, headers, body.encode(), patience, patience))
        try:
            answer, whole = reply.read(_LARGEST_ANSWER)
        finally:
            reply.close()
    except Refusal as error:
        raise Silent(f"{method}: {error.message}") from None
    try:
        said = strict_json.decode(answer) if whole else None
    except ValueError:
        said = None
    if not isinstance(said, dict) or "result" not in said or said.get("error") is not None:
        raise Silent(f"{method}: no result, status {reply.status}")
    return said["result"]
