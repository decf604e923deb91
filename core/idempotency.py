"""Stored answers by the caller's Idempotency-Key: claimed with the hold, kept with the capture.

The idea is the IETF draft's (draft-ietf-httpapi-idempotency-key-header): the same key and request
give the same answer, and the work is done and charged once. Only charged answers are kept, so a
call that failed may be tried again under its key.
"""

import json
import re
from dataclasses import dataclass

from core import clock, errors, tokens
from models import Tx

LIFE_MS = clock.DAY_MS
LARGEST_ANSWER = 1024 * 1024
PRUNED_AT_ONCE = 500
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer as it was given."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


def check_key(key: str | None) -> None:
    """Raises `validation_error` for a key that is anything but visible ASCII."""
    if key is not None and not _KEY.fullmatch(key):
        raise errors.invalid_body(
            "An Idempotency-Key has 1 to 255 visible ASCII characters.", "idempotency-key"
        )


def fingerprint(method: str, path: str, query: str, body: bytes) -> bytes:
    """What makes two requests the same request."""
    return tokens.digest(method.encode(), path.encode(), query.encode(), body)


def find(
    tx: Tx, account_id: str, key: str, print_: bytes, now: int
) -> Stored | errors.Refusal | None:
    """What a repeat of this key gets: the stored answer, a refusal, or None when it may run."""
    row = tx.row(
        "SELECT fingerprint, state, status, headers, body, created_at FROM idempotency"
        " WHERE account_id = :account AND key = :key",
        {"account": account_id, "key": key},
    )
    if row is None:
        return None
    known, state, status, headers, body, created_at = row
    if state != "running" and created_at + LIFE_MS <= now:
        return None
    if known != print_:
        return errors.Refusal(
            "idempotency_key_reused", "This Idempotency-Key was used with another request."
        )
    if state == "running":
        return in_progress()
    if state == "lost":
        return errors.Refusal(
            "idempotency_replay_unavailable",
            "The first call was charged, but its answer was not kept. Nothing was charged now.",
        )
    return Stored(status, [(name, value) for name, value in json.loads(headers)], body)


def in_progress() -> errors.Refusal:
    return errors.Refusal(
        "idempotency_in_progress",
        "The first call with this Idempotency-Key is still running.",
        headers={"Retry-After": "1"},
    )


def holder(tx: Tx, account_id: str, key: str) -> str | None:
    """What the key was claimed for: a call, or a payment that is being settled."""
    row = tx.row(
        "SELECT call_id FROM idempotency WHERE account_id = :account AND key = :key",
        {"account": account_id, "key": key},
    )
    return None if row is None else row[0]


def claim(tx: Tx, account_id: str, key: str, print_: bytes, call_id: str, now: int) -> None:
    """Mark the key as running for this call, in the transaction that holds its credits."""
    tx.run(
        "INSERT INTO idempotency (account_id, key, fingerprint, call_id, state, created_at)"
        " VALUES (:account, :key, :print, :call, 'running', :now)"
        " ON CONFLICT (account_id, key) DO UPDATE SET fingerprint = :print, call_id = :call,"
        " state = 'running', status = NULL, headers = NULL, body = NULL, created_at = :now",
        {"account": account_id, "key": key, "print": print_, "call": call_id, "now": now},
    )


def keep(tx: Tx, account_id: str, key: str, call_id: str, answer: Stored | None) -> None:
    """Keep a charged call's answer; None, or one over 1 MiB, is remembered as lost."""
    kept = answer if answer is not None and len(answer.body) <= LARGEST_ANSWER else None
    tx.run(
        "UPDATE idempotency SET state = :state, status = :status, headers = :headers, body = :body"
        " WHERE account_id = :account AND key = :key AND call_id = :call",
        {
            "state": "stored" if kept else "lost",
            "status": kept.status if kept else None,
            "headers": json.dumps(kept.headers) if kept else None,
            "body": kept.body if kept else None,
            "account": account_id,
            "key": key,
            "call": call_id,
        },
    )


def release(tx: Tx, account_id: str, key: str, call_id: str) -> None:
    """Free the key of a call that was not charged, so that it can be tried again."""
    tx.run(
        "DELETE FROM idempotency WHERE account_id = :account AND key = :key AND call_id = :call",
        {"account": account_id, "key": key, "call": call_id},
    )


def move(tx: Tx, account_id: str, to: str) -> None:
    """The keys of an account become another's, but for those it has used itself."""
    tx.run(
        "UPDATE idempotency SET account_id = :to WHERE account_id = :account AND NOT EXISTS"
        " (SELECT 1 FROM idempotency i WHERE i.account_id = :to AND i.key = idempotency.key)",
        {"account": account_id, "to": to},
    )


def prune(tx: Tx, now: int) -> int:
    """Forget answers older than a day, a batch at a time; how many."""
    return tx.run(
        "DELETE FROM idempotency WHERE (account_id, key) IN"
        " (SELECT account_id, key FROM idempotency"
        "  WHERE created_at < :oldest AND state <> 'running' LIMIT :batch)",
        {"oldest": now - LIFE_MS, "batch": PRUNED_AT_ONCE},
    )
