"""Calendar periods and timestamps, checked against plain date arithmetic."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import clock

PERIODS = ("day", "week", "month")
FIRST = datetime(1970, 1, 5, tzinfo=UTC)  # A Monday, so that no week begins before the epoch.
LAST = datetime(2199, 12, 31, tzinfo=UTC)
moments = st.integers(int(FIRST.timestamp() * 1000), int(LAST.timestamp() * 1000))


def ms(text: str) -> int:
    """The milliseconds of `2027-01-31 12:00`, without the code under test."""
    at = datetime.fromisoformat(text).replace(tzinfo=UTC)
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def day_of(at_ms: int) -> date:
    return date(1970, 1, 1) + timedelta(days=at_ms // clock.DAY_MS)


@pytest.mark.parametrize(
    ("period", "at", "start", "end"),
    [
        ("day", "2026-12-31 23:59:59.999", "2026-12-31", "2027-01-01"),
        ("day", "2027-01-01 00:00:00.000", "2027-01-01", "2027-01-02"),
        ("day", "2028-02-29 12:00", "2028-02-29", "2028-03-01"),
        ("week", "2027-01-01 00:00", "2026-12-28", "2027-01-04"),  # a Friday
        ("week", "2027-01-03 23:59:59.999", "2026-12-28", "2027-01-04"),  # the Sunday
        ("week", "2027-01-04 00:00", "2027-01-04", "2027-01-11"),  # the Monday itself
        ("week", "2024-12-31 18:00", "2024-12-30", "2025-01-06"),
        ("month", "2026-12-31 23:59:59.999", "2026-12-01", "2027-01-01"),
        ("month", "2027-01-01 00:00", "2027-01-01", "2027-02-01"),
        ("month", "2027-01-31 12:00", "2027-01-01", "2027-02-01"),
        ("month", "2028-02-29 23:59:59.999", "2028-02-01", "2028-03-01"),
        ("month", "2027-02-28 23:59:59.999", "2027-02-01", "2027-03-01"),
    ],
)
def test_a_period_is_a_calendar_period_in_utc(period: str, at: str, start: str, end: str) -> None:
    begun = clock.period_start_ms(period, ms(at))
    assert begun == ms(start)
    assert clock.period_end_ms(period, begun) == ms(end)


def test_total_is_one_period_without_an_end() -> None:
    assert clock.period_start_ms("total", ms("2027-06-15")) == 0
    assert clock.period_end_ms("total", 0) is None


@given(moments, st.sampled_from(PERIODS))
@settings(max_examples=500, database=None, deadline=None)
def test_every_moment_lies_in_exactly_one_period(at_ms: int, period: str) -> None:
    start = clock.period_start_ms(period, at_ms)
    end = clock.period_end_ms(period, start)
    assert end is not None
    assert start <= at_ms < end
    # Whoever asks at its first and last millisecond gets the same period; at its end, the next.
    assert clock.period_start_ms(period, start) == start
    assert clock.period_start_ms(period, end - 1) == start
    assert clock.period_start_ms(period, end) == end


@given(moments, st.sampled_from(PERIODS))
@settings(max_examples=500, database=None, deadline=None)
def test_a_period_begins_at_midnight_of_its_first_day(at_ms: int, period: str) -> None:
    start = clock.period_start_ms(period, at_ms)
    today = day_of(at_ms)
    first = {
        "day": today,
        "week": today - timedelta(days=today.isoweekday() - 1),
        "month": date(today.year, today.month, 1),
    }[period]
    assert start == (first - date(1970, 1, 1)).days * clock.DAY_MS


def test_a_timestamp_is_utc_with_z_and_whole_seconds() -> None:
    assert clock.rfc3339(ms("2026-06-15 09:43:00")) == "2026-06-15T09:43:00Z"
    assert clock.rfc3339(ms("2026-06-15 09:43:00.999")) == "2026-06-15T09:43:00Z"
    assert clock.rfc3339(0) == "1970-01-01T00:00:00Z"
    assert clock.rfc3339_or_none(None) is None
    assert clock.rfc3339_or_none(0) == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2027-01-31T00:00:00Z", "2027-01-31 00:00"),
        ("2027-01-31T00:00:00+00:00", "2027-01-31 00:00"),
        ("2027-01-01T01:30:00+02:00", "2026-12-31 23:30"),
        ("2026-12-31T20:00:00-05:30", "2027-01-01 01:30"),
        ("2027-01-31T00:00:00.250Z", "2027-01-31 00:00:00.250"),
    ],
)
def test_a_timestamp_is_read_with_its_offset(text: str, at: str) -> None:
    assert clock.parse_rfc3339(text) == ms(at)


@pytest.mark.parametrize(
    "text",
    ["", "now", "2027-01-31", "2027-01-31T00:00:00", "2027-02-29T00:00:00Z", "1801353600", "Z"],
)
def test_a_timestamp_without_a_zone_or_a_real_date_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        clock.parse_rfc3339(text)


@given(moments)
@settings(max_examples=2000, database=None, deadline=None)
def test_a_timestamp_is_read_to_the_millisecond(at_ms: int) -> None:
    whole = clock.rfc3339(at_ms)
    assert clock.parse_rfc3339(whole) == at_ms // 1000 * 1000
    assert clock.parse_rfc3339(f"{whole[:-1]}.{at_ms % 1000:03}Z") == at_ms


def test_a_timestamp_that_was_accepted_can_be_written_again() -> None:
    latest = "9999-12-31T23:59:59-23:59"  # lies in the year 10000 in UTC
    try:
        at_ms = clock.parse_rfc3339(latest)
    except ValueError:
        return
    assert clock.rfc3339(at_ms)
