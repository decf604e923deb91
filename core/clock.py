"""The only time. Everything else asks here, so a test can freeze or step the clock."""

import re
import time
from datetime import UTC, datetime, timedelta

MINUTE_MS = 60_000
DAY_MS = 24 * 60 * MINUTE_MS
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def now_ms() -> int:
    """Wall-clock time in milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


def monotonic() -> float:
    """Seconds on a clock that never steps: for durations and time-outs, never for records."""
    return time.monotonic()


def rfc3339(at_ms: int) -> str:
    """`at_ms` as an RFC 3339 timestamp in UTC, whole seconds, with `Z`."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def rfc3339_or_none(at_ms: int | None) -> str | None:
    """As `rfc3339`, keeping None."""
    return None if at_ms is None else rfc3339(at_ms)


def parse_rfc3339(text: str) -> int:
    """The milliseconds of an RFC 3339 timestamp that names its offset. Raises ValueError."""
    if not _RFC3339.fullmatch(text):  # Python reads much more as a time than the RFC does
        raise ValueError("expected a time with its zone, for example 2027-01-31T00:00:00Z")
    at = datetime.fromisoformat(text)
    at_ms = (at - _EPOCH) // timedelta(milliseconds=1)
    rfc3339(at_ms)  # it can be written again: with its offset it may lie past the year 9999
    return at_ms


def period_start_ms(period: str, at_ms: int) -> int:
    """When the UTC period that holds `at_ms` began; 0 for `total`. Weeks start on Monday."""
    if period == "total":
        return 0
    day = datetime.fromtimestamp(at_ms / 1000, UTC).replace(
        hour=0, minute=0, second=0, microsecond=0
    )
    if period == "week":
        day -= timedelta(days=day.weekday())
    elif period == "month":
        day = day.replace(day=1)
    return int(day.timestamp() * 1000)


def period_end_ms(period: str, start_ms: int) -> int | None:
    """When the period that began at `start_ms` ends, or None for `total`, which never does."""
    if period == "total":
        return None
    start = datetime.fromtimestamp(start_ms / 1000, UTC)
    if period == "month":
        end = (start + timedelta(days=32)).replace(day=1)
    else:
        end = start + timedelta(days=7 if period == "week" else 1)
    return int(end.timestamp() * 1000)
