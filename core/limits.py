"""Rates per minute and credit limits per period: two counters, shared by all workers."""

import re
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from core import clock, errors
from models import Database, Tx

_PORT = re.compile(r"(?:([0-9.]+)|\[([0-9a-fA-F:.]+)\]):[0-9]+")


class Rate(NamedTuple):
    """What is left of a rate limit in the current UTC minute."""

    limit: int
    remaining: int
    reset_seconds: int
    exceeded: bool

    def headers(self) -> dict[str, str]:
        return {
            "X-RateLimit-Limit": str(self.limit),
            "X-RateLimit-Remaining": str(self.remaining),
            "X-RateLimit-Reset": str(self.reset_seconds),
        }

    def refusal(self) -> errors.Refusal:
        return errors.rate_limited(
            f"More than {self.limit} requests in this minute.", self.reset_seconds
        )


class CreditLimit(NamedTuple):
    """At most `limit` credits held and captured in each calendar period."""

    subject: str
    limit: int
    period: str


def spend_rate(tx: Tx, subject: str, limit: int, now: int) -> Rate:
    """Count one request of `subject` in the current UTC minute, refused or not."""
    minute = now // clock.MINUTE_MS
    row = tx.row(
        "INSERT INTO rate_window (subject, minute, used) VALUES (:subject, :minute, 1)"
        " ON CONFLICT (subject) DO UPDATE SET"
        " used = CASE WHEN rate_window.minute IN (:minute, :next) THEN rate_window.used + 1 ELSE 1"
        " END, minute = CASE WHEN rate_window.minute = :next THEN :next ELSE :minute END"
        " RETURNING used",
        # A request that was read in the last minute may be written in this one; were it to open its
        # own minute again, it would close this one's count.
        {"subject": subject, "minute": minute, "next": minute + 1},
    )
    assert row is not None  # the statement always writes a row
    return _rate(row[0], limit, now)


def look_at_rate(db: Database, subject: str, limit: int, now: int) -> Rate:
    """As `spend_rate`, counting nothing: `exceeded` says whether one more would be refused."""
    row = db.row(
        "SELECT used FROM rate_window WHERE subject = :subject AND minute = :minute",
        {"subject": subject, "minute": now // clock.MINUTE_MS},
    )
    return _rate((row[0] if row else 0) + 1, limit, now)


def _rate(used: int, limit: int, now: int) -> Rate:
    reset = clock.MINUTE_MS - now % clock.MINUTE_MS
    return Rate(limit, max(0, limit - used), -(-reset // 1000), used > limit)


def network_of(address: str) -> str:
    """What a client that guesses is counted under: its address or, of IPv6, the network of 2^64
    addresses that is one customer's (RFC 6177)."""
    try:
        # Some proxies put the client's port behind its address.
        with_port = _PORT.fullmatch(address)
        found = ip_address(with_port[1] or with_port[2] if with_port else address)
    except ValueError:
        return address
    if found.version == 4:
        return str(found)
    return str(found.ipv4_mapped or ip_network((int(found) >> 64 << 64, 64)))


def spend_credits(tx: Tx, limit: CreditLimit, credits: int, now: int) -> int | errors.Refusal:
    """Count `credits` under a limit: the start of the period they were counted in, or why not."""
    starts_at = clock.period_start_ms(limit.period, now)
    params = {
        "subject": limit.subject, "starts_at": starts_at, "n": credits, "most": limit.limit,
    }  # fmt: skip
    counted = tx.run(
        "INSERT INTO credit_window (subject, starts_at, used)"
        " SELECT :subject, :starts_at, :n WHERE :n <= :most"
        " ON CONFLICT (subject, starts_at) DO UPDATE SET used = credit_window.used + :n"
        " WHERE credit_window.used + :n <= :most",
        params,
    )
    if counted:
        return starts_at
    ends_at = clock.period_end_ms(limit.period, starts_at)
    return errors.Refusal(
        "credit_limit_reached",
        f"This would pass the limit of {limit.limit} credits per {limit.period}."
        if limit.period != "total"
        else f"This would pass the limit of {limit.limit} credits in total.",
        fields={
            "limit": limit.limit,
            "period": limit.period,
            "resets_at": clock.rfc3339_or_none(ends_at),
        },
    )


def left(tx: Tx, limit: CreditLimit, now: int) -> int:
    """The credits that are left under a limit in the present period."""
    row = tx.row(
        "SELECT used FROM credit_window WHERE subject = :subject AND starts_at = :starts_at",
        {"subject": limit.subject, "starts_at": clock.period_start_ms(limit.period, now)},
    )
    return limit.limit - (0 if row is None else int(row[0]))


def release_credits(tx: Tx, subject: str, starts_at: int, credits: int) -> None:
    """Take back `credits` that were counted in that period and not captured after all."""
    tx.run(
        "UPDATE credit_window SET used = used - :n"
        " WHERE subject = :subject AND starts_at = :starts_at",
        {"subject": subject, "starts_at": starts_at, "n": credits},
    )


def prune(tx: Tx, now: int) -> None:
    """Forget counters no request can read again; a day's grace covers a clock that steps back."""
    tx.run(
        "DELETE FROM rate_window WHERE minute < :minute",
        {"minute": (now - clock.DAY_MS) // clock.MINUTE_MS},
    )
    tx.run(
        "DELETE FROM credit_window WHERE starts_at > 0 AND starts_at < :oldest",
        {"oldest": now - 40 * clock.DAY_MS},
    )
