"""What the pictures of the dashboard show: bars, scaled here and drawn as SVG by a template."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import NamedTuple

from blueprints.pages import counted, day_name, number
from core import clock
from core.daily import Group

MOST_DAYS = 62  # that are drawn one by one; more are drawn by month


class Bar(NamedTuple):
    """One bar: what it is called, its exact value in words, and how high it is in percent."""

    name: str
    value: int
    text: str
    height: float
    href: str | None = None


def bars(found: Iterable[tuple[str, int, str, str | None]]) -> list[Bar]:
    """Bars of (name, value, text, link), the highest of which fills the picture."""
    rows = list(found)
    most = max((value for _, value, _, _ in rows), default=0)
    return [
        Bar(name, value, text, 0 if most == 0 else round(100 * value / most, 2), href)
        for name, value, text, href in rows
    ]


def by_day(
    groups: list[Group], first_day: int, last_day: int, of_failed: bool, query: str = ""
) -> list[Bar]:
    """Credits, or failed calls, by day or, of a long time, by month. `query` is what the links of
    the bars keep beside their days."""
    spans: dict[str, tuple[int, int]] = {}
    by_month = last_day - first_day >= MOST_DAYS
    for day in range(first_day, last_day + 1):
        name = day_name(day)[:7] if by_month else day_name(day)
        start, _ = spans.get(name, (day, day))
        spans[name] = (start, day)
    credits, calls, failed = (dict.fromkeys(spans, 0) for _ in range(3))
    for group in groups:
        name = day_name(group.day)[: 7 if by_month else 10]
        if name in spans:  # a clock that stepped back leaves calls in the future
            credits[name] += group.captured
            calls[name] += group.calls
            failed[name] += group.failed
    return bars(
        (
            name,
            failed[name] if of_failed else credits[name],
            f"{name}: {number(failed[name])} failed of {counted(calls[name], 'call')}"
            if of_failed
            else f"{name}: {counted(credits[name], 'credit')}, {counted(calls[name], 'call')}",
            f"/dashboard/usage?from={day_name(start)}&to={day_name(end)}{query}",
        )
        for name, (start, end) in spans.items()
    )


def today() -> int:
    """This UTC day, in days since the epoch."""
    return clock.now_ms() // clock.DAY_MS


def day_of(text: str) -> int:
    """The day since the epoch of a date."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) // 86_400
