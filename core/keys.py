"""API keys: made, verified, changed. A key's secret is stored as an argon2id hash and shown once.

Verifying costs milliseconds of CPU and 19 MiB, so a process remembers which stored hash a token
has satisfied. The stored hash and the key's state are read from the database on every call, so a
revoked or rotated key is refused by the very next request without telling anyone.
"""

import json
import re
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import argon2

from core import audit, clock, errors, tokens
from core.audit import Actor
from core.ledger import Guard
from core.limits import CreditLimit
from core.session_tokens import Bearer
from core.sessions import Seat
from models import Tx

# OWASP Password Storage Cheat Sheet: argon2id, 19 MiB, two passes, one lane.
HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
PERIODS = ("total", "day", "week", "month")
MOST_KEYS = 1000  # of one account, revoked ones not counted
MOST_SCOPES = 100
LONGEST_GRACE_MS = 7 * clock.DAY_MS
EXPIRES_SOON_MS = 14 * clock.DAY_MS
UNUSED_MS = 90 * clock.DAY_MS
LAST_USED_EVERY_MS = 5 * clock.MINUTE_MS

_REMEMBERED = 10_000
_VERIFICATIONS = 2  # at once in this process; each fills a core
_making = threading.BoundedSemaphore(2)  # likewise, of new keys
_PATIENCE_SECONDS = 2.0
_SCOPE = re.compile(r"[a-z0-9][A-Za-z0-9._:/*-]{0,99}")
_COLUMNS = (
    "k.id, k.account_id, k.user_id, k.name, k.start, k.hash, k.previous_hash, k.previous_until,"
    " k.status, k.suspended_by, k.status_reason, k.scopes, k.expires_at, k.credit_limit,"
    " k.credit_period, k.rate_limit, k.number, k.created_at, k.last_used_at, a.status,"
    " a.status_reason, u.status, u.status_reason, m.credit_limit, m.credit_period"
)
_NO_PREVIOUS = "previous_hash = NULL, previous_lookup = NULL, previous_until = NULL"
_FROM = (
    " FROM api_key k JOIN account a ON a.id = k.account_id LEFT JOIN user u ON u.id = k.user_id"
    " LEFT JOIN membership m ON m.account_id = k.account_id AND m.user_id = k.user_id"
)


class Key(NamedTuple):
    """A row of `api_key`, with the state of its account and of the person it belongs to."""

    id: str
    account_id: str
    user_id: str | None
    name: str
    start: str
    hash: str
    previous_hash: str | None
    previous_until: int | None
    status: str
    suspended_by: str | None
    status_reason: str | None
    scopes_json: str | None
    expires_at: int | None
    credit_limit: int | None
    credit_period: str | None
    rate_limit: int | None
    number: int
    created_at: int
    last_used_at: int | None
    account_status: str
    account_reason: str | None
    user_status: str | None
    user_reason: str | None
    member_limit: int | None
    member_period: str | None

    @property
    def scopes(self) -> list[str] | None:
        return None if self.scopes_json is None else json.loads(self.scopes_json)

    @property
    def terms(self) -> "Terms":
        return Terms(
            self.name, self.scopes, self.expires_at, self.credit_limit, self.credit_period,
            self.rate_limit,
        )  # fmt: skip

    @property
    def limit(self) -> CreditLimit | None:
        if self.credit_limit is None or self.credit_period is None:
            return None
        return CreditLimit(self.id, self.credit_limit, self.credit_period)

    def status_at(self, now: int) -> str:
        """`active`, `suspended`, `revoked` or `expired` at that moment."""
        if self.status in ("active", "suspended") and self.expires_at is not None:
            return "expired" if self.expires_at <= now else self.status
        return self.status

    def to_json(self, now: int) -> dict[str, Any]:
        """The key as the API shows it, without its secret."""
        return {
            "id": self.id,
            "name": self.name,
            "start": self.start,
            "user_id": self.user_id,
            "scopes": self.scopes,
            "status": self.status_at(now),
            "expires_at": clock.rfc3339_or_none(self.expires_at),
            "credit_limit": self.credit_limit,
            "credit_period": self.credit_period,
            "rate_limit": self.rate_limit,
            "created_at": clock.rfc3339(self.created_at),
            "last_used_at": clock.rfc3339_or_none(self.last_used_at),
        }


@dataclass(frozen=True, slots=True)
class Terms:
    """What a new key is allowed. None of an option means no restriction of its own."""

    name: str
    scopes: list[str] | None = None
    expires_at: int | None = None
    credit_limit: int | None = None
    credit_period: str | None = None
    rate_limit: int | None = None

    def check(self, now: int) -> None:
        """Raises `validation_error` naming the first bad field."""
        if not 1 <= len(self.name) <= 100 or not self.name.isprintable():
            raise errors.invalid_body("A name has 1 to 100 printable characters.", "name")
        if len(self.scopes or ()) > MOST_SCOPES:
            raise errors.invalid_body(f"A key has at most {MOST_SCOPES} scopes.", "scopes")
        for scope in self.scopes or ():
            if not is_scope(scope):
                raise errors.invalid_body(f"{scope!r} is not a scope.", "scopes")
        if self.expires_at is not None and self.expires_at <= now:
            raise errors.invalid_body("The expiry lies in the past.", "expires_at")
        check_limit(self.credit_limit, self.credit_period)
        if self.rate_limit is not None and not 0 <= self.rate_limit <= 10**9:
            raise errors.invalid_body("A rate limit is 0 to 10^9 requests a minute.", "rate_limit")


def is_scope(text: str) -> bool:
    """Whether a key can have such a scope."""
    return _SCOPE.fullmatch(text) is not None


def check_limit(limit: int | None, period: str | None) -> None:
    """Raises `validation_error` for a credit limit without a period, and the like."""
    if (limit is None) != (period is None):
        raise errors.invalid_body(
            "A credit limit needs a period, and a period a limit.", "credit_period"
        )
    if limit is not None and not 0 <= limit <= 10**15:
        raise errors.invalid_body("A credit limit is 0 to 10^15 credits.", "credit_limit")
    if period is not None and period not in PERIODS:
        raise errors.invalid_body(f"A period is one of {', '.join(PERIODS)}.", "credit_period")


def check_grace(grace_ms: int) -> None:
    """Raises `validation_error` for a grace that is none."""
    if not 0 <= grace_ms <= LONGEST_GRACE_MS:
        raise errors.invalid_body("A grace is 0 to 7 days.", "grace_seconds")


def check_reason(reason: str | None) -> None:
    """Raises `validation_error` for a reason nobody could be shown."""
    if reason is not None and not (1 <= len(reason) <= 200 and reason.isprintable()):
        raise errors.invalid_body("A reason has 1 to 200 printable characters.", "reason")


class NewSecret:
    """A fresh key and its hash. Made before the transaction: hashing is slow."""

    def __init__(self, prefix: str) -> None:
        self.token, self.lookup = tokens.new_key(prefix)
        self.start = self.token[: -(tokens.SECRET_LENGTH + tokens.CHECKSUM_LENGTH)]
        if not _making.acquire(timeout=_PATIENCE_SECONDS):
            raise _overloaded()
        try:
            self.hash = HASHER.hash(self.token)
        finally:
            _making.release()


def add(
    tx: Tx, account_id: str, user_id: str | None, terms: Terms, secret: NewSecret, now: int,
    by: Actor, key_id: str | None = None,
) -> str:  # fmt: skip
    """A new active key of an account; its id, which whoever sends a form twice names, so that it is
    made once. Raises `validation_error` or `conflict`."""
    terms.check(now)
    if tx.row("SELECT 1 FROM api_key WHERE id = :id", {"id": key_id}):
        raise errors.Refusal(
            "conflict", "That key was made a moment ago, and its secret shown then. Make another."
        )
    count = tx.row(
        "SELECT COUNT(*) FROM api_key WHERE account_id = :account AND status <> 'revoked'",
        {"account": account_id},
    )
    if count is not None and count[0] >= MOST_KEYS:
        raise errors.Refusal("conflict", f"An account has at most {MOST_KEYS} keys.")
    key_id = key_id or tokens.new_id("key")
    tx.run(
        "INSERT INTO api_key (id, account_id, user_id, name, lookup, start, hash, scopes,"
        " expires_at, credit_limit, credit_period, rate_limit, created_at, number)"
        " SELECT :id, :account, :user, :name, :lookup, :start, :hash, :scopes, :expires_at,"
        " :credit_limit, :credit_period, :rate_limit, :now, COALESCE(MAX(number), 0) + 1"
        " FROM api_key WHERE account_id = :account",
        {
            "id": key_id,
            "account": account_id,
            "user": user_id,
            "name": terms.name,
            "lookup": secret.lookup,
            "start": secret.start,
            "hash": secret.hash,
            "scopes": None if terms.scopes is None else json.dumps(terms.scopes),
            "expires_at": terms.expires_at,
            "credit_limit": terms.credit_limit,
            "credit_period": terms.credit_period,
            "rate_limit": terms.rate_limit,
            "now": now,
        },
    )
    audit.note(tx, by, "key.created", now, account_id, key_id, name=terms.name, user=user_id)
    return key_id


def get(tx: Tx, key_id: str) -> Key:
    """A key by its id. Raises `not_found`."""
    row = tx.row(f"SELECT {_COLUMNS}{_FROM} WHERE k.id = :id", {"id": key_id})
    if row is None:
        raise errors.not_found()
    return Key(*row)


def owned(tx: Tx, key_id: str, who: Bearer | Seat) -> Key:
    """A key of the account somebody acts for, if it is theirs to see and change: owners may with
    all of the account's, members with those they made.

    Raises `not_found` for another account's, `forbidden` for another person's.
    """
    row = tx.row(
        f"SELECT {_COLUMNS}{_FROM} WHERE k.id = :id AND k.account_id = :account",
        {"id": key_id, "account": who.account_id},
    )
    if row is None:
        raise errors.not_found()
    key = Key(*row)
    if not who.is_owner and key.user_id != who.user_id:
        raise errors.Refusal("forbidden", "Only an owner of the account may see this key.")
    return key


def by_lookup(tx: Tx, lookup: str, now: int) -> tuple[Key, str] | None:
    """The key found by the public part of a token, and the stored hash that token must satisfy."""
    row = tx.row(
        f"SELECT {_COLUMNS}, k.lookup{_FROM}"
        " WHERE k.lookup = :lookup OR k.previous_lookup = :lookup",
        {"lookup": lookup},
    )
    if row is None:
        return None
    key = Key(*row[:-1])
    if row[-1] == lookup:
        return key, key.hash
    if key.previous_hash is not None and key.previous_until is not None:
        return (key, key.previous_hash) if key.previous_until > now else None
    return None


def page(tx: Tx, account_id: str | None, after: str, limit: int) -> list[Key]:
    """Keys in the order of their ids, of one account or, for the operator, of all."""
    condition = "" if account_id is None else " AND k.account_id = :account"
    rows = tx.rows(
        f"SELECT {_COLUMNS}{_FROM} WHERE k.id > :after{condition} ORDER BY k.id LIMIT :limit",
        {"after": after, "limit": limit} | ({"account": account_id} if account_id else {}),
    )
    return [Key(*row) for row in rows]


def newest(
    tx: Tx, account_id: str, user_id: str | None, before: int | None, limit: int
) -> list[Key]:
    """An account's keys, the newest first; of one person only, if given."""
    condition = "" if user_id is None else " AND k.user_id = :user"
    rows = tx.rows(
        f"SELECT {_COLUMNS}{_FROM} WHERE k.account_id = :account AND k.number < :before{condition}"
        " ORDER BY k.number DESC LIMIT :limit",
        {"account": account_id, "before": 10**15 if before is None else before, "limit": limit}
        | ({} if user_id is None else {"user": user_id}),
    )
    return [Key(*row) for row in rows]


def search(tx: Tx, text: str, before: tuple[int, str], limit: int) -> list[Key]:
    """Keys of all accounts, the newest first, whose name, start, id or account holds `text`;
    `before` is when the last one was made, and its id."""
    rows = tx.rows(
        f"SELECT {_COLUMNS}{_FROM}"
        " WHERE (k.created_at < :at OR (k.created_at = :at AND k.id < :id))"
        " AND (:text = '' OR k.name LIKE :like ESCAPE '!' OR k.start LIKE :like ESCAPE '!'"
        " OR k.id = :text OR k.account_id = :text)"
        " ORDER BY k.created_at DESC, k.id DESC LIMIT :limit",
        {"at": before[0], "id": before[1], "text": text, "like": holding(text), "limit": limit},
    )
    return [Key(*row) for row in rows]


def holding(text: str) -> str:
    """The LIKE pattern, escaped by `!`, of what holds a text."""
    return "%" + re.sub("([%_!])", r"!\1", text) + "%"


def in_need_of_care(
    tx: Tx, account_id: str, user_id: str | None, now: int
) -> tuple[list[Key], list[Key]]:
    """The keys that end within two weeks, and those nobody has used for ninety days; of one person
    only, if given."""
    condition = "" if user_id is None else " AND k.user_id = :user"
    rows = tx.rows(
        f"SELECT {_COLUMNS}{_FROM} WHERE k.account_id = :account"
        " AND k.status IN ('active', 'suspended')"
        " AND (k.expires_at > :now AND k.expires_at <= :soon"
        " OR COALESCE(k.last_used_at, k.created_at) <= :long_ago)"
        f" AND (k.expires_at IS NULL OR k.expires_at > :now){condition} ORDER BY k.number",
        {
            "account": account_id,
            "now": now,
            "soon": now + EXPIRES_SOON_MS,
            "long_ago": now - UNUSED_MS,
        }
        | ({} if user_id is None else {"user": user_id}),
    )
    found = [Key(*row) for row in rows]
    expiring = [key for key in found if _is_soon(key, now)]
    unused = [key for key in found if (key.last_used_at or key.created_at) <= now - UNUSED_MS]
    return expiring, unused


def _is_soon(key: Key, now: int) -> bool:
    return key.expires_at is not None and key.expires_at <= now + EXPIRES_SOON_MS


def names(tx: Tx, account_id: str, user_id: str | None) -> dict[str, str]:
    """The names of an account's keys by id, revoked ones too, the newest first; of one person only,
    if given."""
    condition = "" if user_id is None else " AND user_id = :user"
    rows = tx.rows(
        f"SELECT id, name FROM api_key WHERE account_id = :account{condition} ORDER BY number DESC",
        {"account": account_id} | ({} if user_id is None else {"user": user_id}),
    )
    return dict(rows)


# Changes of state. Each names what it may start from; anything else is a `conflict`.


def change(tx: Tx, key: Key, changes: dict[str, Any], now: int, by: Actor) -> None:
    """Other `Terms` for a key, those that are named. Raises `validation_error`, and `conflict` for
    a revoked or expired key."""
    terms, key_id = replace(key.terms, **changes), key.id
    if key.status_at(now) not in ("active", "suspended"):
        raise errors.Refusal("conflict", f"The key is {key.status_at(now)}; it cannot change.")
    terms.check(now)
    tx.run(
        "UPDATE api_key SET name = :name, scopes = :scopes, expires_at = :expires_at,"
        " credit_limit = :credit_limit, credit_period = :credit_period, rate_limit = :rate_limit,"
        # A secret that was rotated out never outlives the key.
        " previous_until = CASE WHEN previous_until > :expires_at THEN :expires_at"
        " ELSE previous_until END"
        " WHERE id = :id",
        {
            "id": key_id,
            "name": terms.name,
            "scopes": None if terms.scopes is None else json.dumps(terms.scopes),
            "expires_at": terms.expires_at,
            "credit_limit": terms.credit_limit,
            "credit_period": terms.credit_period,
            "rate_limit": terms.rate_limit,
        },
    )
    audit.note(tx, by, "key.changed", now, key.account_id, key_id, changed=sorted(changes))


def revoke(tx: Tx, key_id: str, now: int, by: Actor) -> None:
    """End a key for good; revoking again changes nothing. Raises `not_found`."""
    key = get(tx, key_id)
    changed = tx.run(
        f"UPDATE api_key SET status = 'revoked', {_NO_PREVIOUS}"
        " WHERE id = :id AND status <> 'revoked'",
        {"id": key_id},
    )
    if changed:
        audit.note(tx, by, "key.revoked", now, key.account_id, key_id)


def revoke_all(
    tx: Tx, now: int, by: Actor, *, account_id: str | None = None, user_id: str | None = None
) -> None:
    """End every key of an account, of a person, or of a person in an account."""
    wanted = {"account_id": account_id, "user_id": user_id}
    given = {column: value for column, value in wanted.items() if value is not None}
    assert given, "whose?"  # a name that is missing by mistake must not stand for everybody
    conditions = "".join(f" AND {column} = :{column}" for column in given)
    revoked = tx.rows(
        f"UPDATE api_key SET status = 'revoked', {_NO_PREVIOUS}"
        f" WHERE status <> 'revoked'{conditions} RETURNING id, account_id",
        given,
    )
    for key_id, owner in revoked:
        audit.note(tx, by, "key.revoked", now, owner, key_id)


def suspend(tx: Tx, key_id: str, reason: str | None, now: int, by: Actor) -> None:
    """Stop a key for a while. Raises `not_found`, `conflict`."""
    key = get(tx, key_id)
    changed = tx.run(
        "UPDATE api_key SET status = 'suspended', suspended_by = :by, suspended_by_user = :person,"
        " status_reason = :reason"
        " WHERE id = :id AND (expires_at IS NULL OR expires_at > :now) AND (status = 'active'"
        # The operator's word stands over the owner's, never the other way round.
        " OR (status = 'suspended' AND (suspended_by = 'owner' OR :by = 'operator')))",
        {
            "id": key_id,
            "by": _side(by),
            "person": None if by.is_operator else by.name,
            "reason": reason,
            "now": now,
        },
    )
    if not changed:
        is_now = key.status_at(now)
        raise errors.Refusal("conflict", f"The key is {is_now}; it cannot be suspended.")
    audit.note(tx, by, "key.suspended", now, key.account_id, key_id, reason=reason)


def resume(tx: Tx, key_id: str, now: int, by: Actor, is_owner: bool = True) -> None:
    """Let a suspended key work again. Only the operator resumes what the operator suspended, and
    who is no owner of the account what they suspended themselves."""
    key = get(tx, key_id)
    changed = tx.run(
        "UPDATE api_key SET status = 'active', suspended_by = NULL, suspended_by_user = NULL,"
        " status_reason = NULL"
        " WHERE id = :id AND status = 'suspended' AND (suspended_by = 'owner' OR :by = 'operator')"
        " AND (:is_owner OR suspended_by_user = :person)"
        " AND (expires_at IS NULL OR expires_at > :now)",
        {
            "id": key_id,
            "by": _side(by),
            "is_owner": is_owner,
            "person": by.name,
            "now": now,
        },
    )
    if not changed:
        is_now = key.status_at(now)
        if is_now == "suspended":
            who = "The operator" if key.suspended_by == "operator" else "An owner"
            raise errors.Refusal("forbidden", f"{who} suspended this key.")
        raise errors.Refusal("conflict", f"The key is {is_now}, not suspended.")
    audit.note(tx, by, "key.resumed", now, key.account_id, key_id)


def _side(by: Actor) -> str:
    return "operator" if by.is_operator else "owner"


def rotate(
    tx: Tx, key_id: str, secret: NewSecret, grace_ms: int, now: int, by: Actor,
    start: str | None = None,
) -> None:  # fmt: skip
    """Give a key a new secret; the old one works for `grace_ms`, never past the key's expiry.

    `start` is how the secret begins that is to be replaced, so that whoever sends a form twice
    rotates once. Raises `not_found`, `validation_error`, and `conflict` for a revoked or expired
    key, or when another secret was there.
    """
    check_grace(grace_ms)
    key = get(tx, key_id)
    until = now + grace_ms
    if key.expires_at is not None:
        until = min(until, key.expires_at)
    changed = tx.run(
        "UPDATE api_key SET"
        " previous_hash = CASE WHEN :until > :now THEN hash ELSE NULL END,"
        " previous_until = CASE WHEN :until > :now THEN :until ELSE NULL END,"
        " previous_lookup = CASE WHEN :until > :now THEN lookup ELSE NULL END,"
        " hash = :hash, lookup = :lookup, start = :start"
        " WHERE id = :id AND status IN ('active', 'suspended') AND start = :replaced"
        " AND (expires_at IS NULL OR expires_at > :now)",
        {
            "id": key_id,
            "hash": secret.hash,
            "lookup": secret.lookup,
            "start": secret.start,
            "replaced": key.start if start is None else start,
            "until": until,
            "now": now,
        },
    )
    if not changed and start not in (None, key.start):
        raise errors.Refusal("conflict", "It was rotated a moment ago, and the secret shown then.")
    if not changed:
        raise errors.Refusal("conflict", f"The key is {key.status_at(now)}; it cannot rotate.")
    audit.note(tx, by, "key.rotated", now, key.account_id, key_id, grace_seconds=grace_ms // 1000)


def note_use(tx: Tx, key: Key, now: int) -> None:
    """Remember when a key was used, to within five minutes, so that most calls write nothing."""
    if key.last_used_at is None or now - key.last_used_at >= LAST_USED_EVERY_MS:
        tx.run("UPDATE api_key SET last_used_at = :now WHERE id = :id", {"id": key.id, "now": now})


def latch_expired(tx: Tx, now: int) -> None:
    """Write down what has expired, so that a clock that steps back revives nothing."""
    tx.run(
        f"UPDATE api_key SET status = 'expired', {_NO_PREVIOUS}"
        " WHERE status IN ('active', 'suspended') AND expires_at <= :now",
        {"now": now},
    )
    tx.run(
        f"UPDATE api_key SET {_NO_PREVIOUS} WHERE previous_until <= :now",
        {"now": now},
    )


def still_valid(key: Key, verified_hash: str, now: int) -> Guard:
    """What must hold when credits are set aside: the key is active and this is still its secret."""
    return Guard(
        "EXISTS (SELECT 1 FROM api_key WHERE id = :key_id AND status = 'active'"
        " AND (expires_at IS NULL OR expires_at > :key_now)"
        " AND (hash = :key_hash OR (previous_hash = :key_hash AND previous_until > :key_now))"
        " AND NOT EXISTS (SELECT 1 FROM user u WHERE u.id = api_key.user_id"
        " AND u.status <> 'active'))",
        {"key_id": key.id, "key_hash": verified_hash, "key_now": now},
    )


class Verifier:
    """Decides whether a token is a key's secret, hashing as seldom as it can."""

    def __init__(self) -> None:
        self._memory_key = secrets.token_bytes(32)
        self._satisfied: OrderedDict[bytes, str] = OrderedDict()
        self._underway: dict[bytes, threading.Lock] = {}
        self._mutex = threading.Lock()
        self._slots = threading.BoundedSemaphore(_VERIFICATIONS)

    def remembers(self, token: str, stored: str) -> bool:
        """Whether this token is known to satisfy this stored hash."""
        return self._satisfied.get(tokens.keyed_digest(self._memory_key, token)) == stored

    def verify(self, token: str, stored: str) -> bool:
        """Whether the token satisfies the stored hash. Raises `overloaded` when too many wait.

        Callers with the same token wait for one verification instead of each making its own.
        """
        digest = tokens.keyed_digest(self._memory_key, token)
        with self._mutex:
            lock = self._underway.setdefault(digest, threading.Lock())
        if not lock.acquire(timeout=_PATIENCE_SECONDS):
            raise _overloaded()
        try:
            if self._satisfied.get(digest) == stored:
                return True
            if not self._slots.acquire(timeout=_PATIENCE_SECONDS):
                raise _overloaded()
            try:
                HASHER.verify(stored, token)
            except argon2.exceptions.VerifyMismatchError:
                return False
            finally:
                self._slots.release()
            with self._mutex:
                self._satisfied[digest] = stored
                if len(self._satisfied) > _REMEMBERED:
                    self._satisfied.popitem(last=False)
            return True
        finally:
            lock.release()
            with self._mutex:
                self._underway.pop(digest, None)


def _overloaded() -> errors.Refusal:
    return errors.Refusal(
        "overloaded",
        "Too many keys are being verified at this moment.",
        headers={"Retry-After": "1"},
    )
