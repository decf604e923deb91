"""What really happened, read from a network's node over JSON-RPC.

A node is believed in what it says of a transaction that is there, and of time: that a payment is
not there says nothing until the network cannot take it any more.
"""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from config import Network
from core import clock, strict_json, upstream
from core.errors import Refusal
from core.payments import svm
from core.payments.records import Record
from core.upstream import Outbound

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
# So it landed this near to when it was shown here, whatever is wrong with our clock.
_AROUND_MS = 30 * clock.MINUTE_MS
_BLOCKS_AT_ONCE = 2_000  # nodes refuse to search more
_MOST_SEARCHES = 60
_SIGNATURES_AT_ONCE = 1_000
_MOST_SIGNATURES = 10_000
# What transactions are called; a facilitator may say anything.
_EVM_TRANSACTION = re.compile(r"0x[0-9a-fA-F]{64}")
_SOLANA_TRANSACTION = re.compile(r"[1-9A-HJ-NP-Za-km-z]{64,90}")


class Finding(NamedTuple):
    """`settled`, with the transaction; `never`, now or later; or `open`, which is `failed` when a
    transaction was made for it in vain, though another could be."""

    outcome: Literal["settled", "never", "open", "failed"]
    transaction: str | None = None


class Silent(Exception):
    """A node did not say, and why."""


def look(network: Network, record: Record) -> Finding:
    """What became of a payment. Raises Silent. Never called inside a transaction."""
    assert network.rpc is not None  # whoever has no node asks nobody
    look_there = _look_on_solana if network.namespace == "solana" else _look_on_evm
    try:
        found = look_there(network.rpc, record)
        if found.outcome == "never" and not _is_node_of(network, network.rpc):
            raise Silent("the node is one of another network")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Silent(f"the node's answer has another shape: {error!r}") from None
    return found


def problem(network: Network) -> str | None:
    """What is wrong with a network's node, if anything."""
    assert network.rpc is not None  # whoever has no node asks nobody
    try:
        return None if _is_node_of(network, network.rpc) else "it is a node of another network"
    except Silent as silent:
        return str(silent)
    except (AttributeError, TypeError, ValueError):
        return "it is no node of such a network"


def _is_node_of(network: Network, url: str) -> bool:
    """Whether a node is one of that network. On another's nothing of ours is ever found."""
    name = network.id.partition(":")[2]
    if network.namespace == "solana":
        genesis: str = _ask(url, "getGenesisHash", [])
        return genesis.startswith(name)
    return int(_ask(url, "eth_chainId", []), 16) == int(name)


def _happened_since_shown(record: Record, at: int, network_now: int) -> bool:
    """Whether what happened then happened since the payment was shown here. Raises Silent when that
    cannot be told, because our clock is ahead."""
    if at >= record.created_at - _CLOCKS_MS:
        return True
    if clock.now_ms() - network_now > _CLOCKS_MS:
        raise Silent("it was made before it was shown here, or our clock is wrong")
    return False


# Ethereum's networks


def _look_on_evm(url: str, record: Record) -> Finding:
    told = record.signed["authorization"]
    payer, nonce = _topic(told["from"]), told["nonce"]
    transaction = record.transaction_id or ""
    if not _EVM_TRANSACTION.fullmatch(transaction):
        transaction = ""
    # All is asked of one block: behind an address there may be several nodes, and one that lags
    # knows nothing of what happened before the moment that another says it is.
    block = _ask(url, "eth_getBlockByNumber", ["latest", False])
    call = {"to": record.asset, "data": _AUTHORIZATION_STATE + payer[2:] + nonce[2:]}
    if int(_ask(url, "eth_call", [call, block["number"]]), 16) == 0:
        if _time_of(block) > (record.expires_at or 0) + _CLEARLY_OVER_MS:
            return Finding("never")
        failed = transaction and _failed_on_evm(url, transaction, nonce, block["number"])
        return Finding("failed", transaction) if failed else Finding("open")
    at = _paid_on_evm(url, record, transaction) if transaction else None
    if not at:
        ended = _search_on_evm(url, record, int(block["number"], 16), call)
        if ended is None or ended[0] == _AUTHORIZATION_CANCELED:
            return Finding("never")
        transaction = ended[1]
        at = _paid_on_evm(url, record, transaction)
    if at is None:
        raise Silent("the node does not know a transaction that it has told of")
    if at and _happened_since_shown(record, at, _time_of(block)):
        return Finding("settled", transaction)
    return Finding("never")


def _search_on_evm(
    url: str, record: Record, last: int, is_used: dict[str, str]
) -> tuple[str, str] | None:
    """What ended an authorization, and in which transaction: from that block back to when it was
    shown here. None when it had ended before that, which `is_used` asks."""
    told = record.signed["authorization"]
    for _ in range(_MOST_SEARCHES):
        first = max(0, last - _BLOCKS_AT_ONCE + 1)
        wanted = {
            "address": record.asset,
            "topics": [
                [_AUTHORIZATION_USED, _AUTHORIZATION_CANCELED], _topic(told["from"]), told["nonce"],
            ],
            "fromBlock": hex(first),
            "toBlock": hex(last),
        }  # fmt: skip
        logs = _ask(url, "eth_getLogs", [wanted])
        if logs:
            return logs[0]["topics"][0].lower(), logs[0]["transactionHash"]
        block = _ask(url, "eth_getBlockByNumber", [hex(first), False])
        if first == 0 or _time_of(block) < record.created_at - _CLOCKS_MS:
            if first and int(_ask(url, "eth_call", [is_used, hex(first)]), 16) == 1:
                return None
            break
        last = first - 1
    raise Silent("what ended the authorization is not found")


def _failed_on_evm(url: str, transaction: str, nonce: str, last: str) -> bool:
    """Whether a transaction was to use this authorization, and came to nothing by that block."""
    receipt = _ask(url, "eth_getTransactionReceipt", [transaction])
    if receipt is None or int(receipt["status"], 16) != 0:
        return False
    if int(receipt["blockNumber"], 16) > int(last, 16):
        return False
    sent = _ask(url, "eth_getTransactionByHash", [transaction])
    return sent is not None and nonce[2:] in sent["input"].lower()


def _paid_on_evm(url: str, record: Record, transaction: str) -> int | None:
    """When a transaction used this authorization and paid us in full with it; 0 if it did not, None
    when the node does not know it.

    The token tells of the transfer in the very next event. Any other transfer in the transaction
    belongs to another authorization: one payment would pay for several, whose own money went
    elsewhere.
    """
    receipt = _ask(url, "eth_getTransactionReceipt", [transaction])
    if receipt is None:
        return None
    payer, payee = _topic(record.signed["authorization"]["from"]), _topic(record.pay_to)
    used = [_AUTHORIZATION_USED, payer, record.signed["authorization"]["nonce"]]
    for log, following in itertools.pairwise(receipt["logs"]):
        if (
            _topics_of(log, record.asset) == used
            and _topics_of(following, record.asset) == [_TRANSFER, payer, payee]
            and int(following["data"], 16) == record.amount
        ):
            block = _ask(url, "eth_getBlockByNumber", [receipt["blockNumber"], False])
            return _time_of(block)
    return 0


def _topics_of(log: dict[str, Any], asset: str) -> list[str]:
    """What an event of the token is; of another's event, nothing."""
    if log["address"].lower() != asset.lower():
        return []
    return [topic.lower() for topic in log["topics"]]


def _time_of(block: dict[str, Any]) -> int:
    return int(block["timestamp"], 16) * 1000


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
    known = record.transaction_id or ""
    if _SOLANA_TRANSACTION.fullmatch(known):
        landed = _transaction(url, known)
        if landed is not None and svm.digest_of(landed["transaction"][0]) == trace.digest:
            return _ending_on_solana(url, record, known, landed)
    for signature in _signatures_of(url, trace.source, record.created_at):
        landed = _transaction(url, signature)
        if landed is None:
            if is_over:
                raise Silent("the node does not know a transaction that it has told of")
        elif svm.digest_of(landed["transaction"][0]) == trace.digest:
            return _ending_on_solana(url, record, signature, landed)
    return Finding("never" if is_over else "open")


def _ending_on_solana(url: str, record: Record, signature: str, landed: dict[str, Any]) -> Finding:
    """How a transaction ended."""
    asked = [[signature], {"searchTransactionHistory": True}]
    status = _ask(url, "getSignatureStatuses", asked)["value"][0]
    if status is None or status["confirmationStatus"] not in ("confirmed", "finalized"):
        return Finding("open")
    if status["err"] is not None:  # one that has landed and failed is confirmed too
        return Finding("never", signature)
    at = (landed["blockTime"] or 0) * 1000
    if at and at < record.created_at - _CLOCKS_MS:
        slot = _ask(url, "getSlot", [{"commitment": "confirmed"}])
        if not _happened_since_shown(record, at, _ask(url, "getBlockTime", [slot]) * 1000):
            return Finding("never", signature)
    return Finding("settled", signature)


def _signatures_of(url: str, address: str, around: int) -> Iterator[str]:
    """The transactions of a token account around a moment, the last first. Raises Silent when there
    are too many to look through."""
    before: dict[str, str] = {}
    for _ in range(_MOST_SIGNATURES // _SIGNATURES_AT_ONCE):
        asked = {"limit": _SIGNATURES_AT_ONCE, "commitment": "confirmed"} | before
        rows = _ask(url, "getSignaturesForAddress", [address, asked])
        for row in rows:
            at = around if row["blockTime"] is None else row["blockTime"] * 1000
            if at < around - _AROUND_MS:
                return
            if at <= around + _AROUND_MS:
                yield row["signature"]
        if len(rows) < _SIGNATURES_AT_ONCE:
            return
        before = {"before": rows[-1]["signature"]}
    raise Silent("the payer's account has too many transactions")


def _transaction(url: str, signature: str) -> dict[str, Any] | None:
    """A transaction that has landed, if the node knows it."""
    asked = {"encoding": "base64", "commitment": "confirmed", "maxSupportedTransactionVersion": 0}
    found: dict[str, Any] | None = _ask(url, "getTransaction", [signature, asked])
    return found


# JSON-RPC


def _ask(url: str, method: str, params: list[Any]) -> Any:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
    headers = [("Content-Type", "application/json"), ("Accept", "application/json")]
    patience = _PATIENCE_SECONDS
    asked = Outbound("POST", url, headers, body.encode(), patience, patience)
    try:
        status, answer = upstream.ask(asked, _LARGEST_ANSWER)
    except Refusal as error:
        raise Silent(f"{method}: {error.message}") from None
    try:
        said = strict_json.decode(answer)
    except ValueError:
        said = None
    if not isinstance(said, dict) or "result" not in said or said.get("error") is not None:
        raise Silent(f"{method}: no result, status {status}")
    return said["result"]
