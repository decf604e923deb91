"""Links that work once: to set the instance up, choose a new password, or join an account.

A link's token is 256 random bits, and only its digest is stored, so there is no signing key whose
loss would let somebody write links of their own.
"""

from typing import NamedTuple

from core import clock, errors, tokens
from models import Tx

LIFE_MS = {"setup": 7 * clock.DAY_MS, "reset": clock.DAY_MS, "invite": 7 * clock.DAY_MS}
_LATELY_MS = 10 * clock.MINUTE_MS
_KEPT_MS = 30 * clock.DAY_MS
_PRUNED_AT_ONCE = 1000


class Link(NamedTuple):
    """An unused one-time link."""

    purpose: str
    account_id: str
    user_id: str | None  # whose password a `reset` replaces
    membership_id: str | None  # what an `invite` fills


def make(
    tx: Tx, purpose: str, account_id: str, now: int,
    user_id: str | None = None, membership_id: str | None = None,
) -> str:  # fmt: skip
    """The token of a new link, good for the time of its purpose."""
    token = tokens.new_secret()
    tx.run(
        "INSERT INTO one_time_link"
        " (token_hash, purpose, account_id, user_id, membership_id, expires_at)"
        " VALUES (:hash, :purpose, :account, :user, :membership, :expires_at)",
        {
            "hash": tokens.digest(token.encode()),
            "purpose": purpose,
            "account": account_id,
            "user": user_id,
            "membership": membership_id,
            "expires_at": now + LIFE_MS[purpose],
        },
    )
    return token


def look_at(tx: Tx, purpose: str, token: str, now: int) -> Link | None:
    """The link of a token if it can still be used; looking does not use it."""
    row = tx.row(
        "SELECT purpose, account_id, user_id, membership_id FROM one_time_link"
        " WHERE token_hash = :hash AND purpose = :purpose AND used_at IS NULL"
        " AND expires_at > :now",
        {"hash": tokens.digest(token.encode()), "purpose": purpose, "now": now},
    )
    return None if row is None else Link(*row)


def use(tx: Tx, purpose: str, token: str, now: int) -> Link:
    """Use a link up. Raises `not_found` when it was used, has expired or never was."""
    row = tx.row(
        "UPDATE one_time_link SET used_at = :now WHERE token_hash = :hash AND purpose = :purpose"
        " AND used_at IS NULL AND expires_at > :now"
        " RETURNING purpose, account_id, user_id, membership_id",
        {"hash": tokens.digest(token.encode()), "purpose": purpose, "now": now},
    )
    if row is None:
        raise errors.Refusal("not_found", "This link was used before, or is too old.")
    return Link(*row)


def cancel(
    tx: Tx, now: int, *, user_id: str | None = None, membership_id: str | None = None
) -> None:
    """Use up, unfollowed, every link that would act on this person or fill this membership."""
    tx.run(
        "UPDATE one_time_link SET used_at = :now WHERE used_at IS NULL"
        " AND (user_id = :user OR membership_id = :membership)",
        {"now": now, "user": user_id, "membership": membership_id},
    )


def was_made_lately(
    tx: Tx, now: int, *, user_id: str | None = None, membership_id: str | None = None
) -> bool:
    """Whether an unused link for that person or membership is so new that its mail may still be on
    its way: whoever asks again and again fills no mailbox."""
    row = tx.row(
        "SELECT 1 FROM one_time_link WHERE used_at IS NULL"
        " AND ((user_id = :user AND expires_at > :reset)"
        " OR (membership_id = :membership AND expires_at > :invite))",
        {
            "user": user_id,
            "membership": membership_id,
            "reset": now + LIFE_MS["reset"] - _LATELY_MS,
            "invite": now + LIFE_MS["invite"] - _LATELY_MS,
        },
    )
    return row is not None


def prune(tx: Tx, now: int) -> None:
    """Forget some of the links that were used, or expired, long ago."""
    tx.run(
        "DELETE FROM one_time_link WHERE token_hash IN"
        " (SELECT token_hash FROM one_time_link WHERE used_at < :before LIMIT :most)",
        {"before": now - _KEPT_MS, "most": _PRUNED_AT_ONCE},
    )


def latch_expired(tx: Tx, now: int) -> None:
    """Use up what has expired, so that a clock that steps back revives no link."""
    tx.run(
        "UPDATE one_time_link SET used_at = :now WHERE used_at IS NULL AND expires_at <= :now",
        {"now": now},
    )
