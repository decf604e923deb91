"""What the pictures of the dashboard show: bars, scaled here and drawn as SVG by a template."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import NamedTuple

from blueprints.pages import counted, day_name, number
from core import calls, clock
from core.calls import Total
from core.daily import Group

MOST_DAYS = 62  # that are drawn one by one; more are drawn by month
_MOST_RANKED = 12


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


def ranked(
    groups: list[Group], by: str, names: Callable[[str], str], link: Callable[[str], str | None]
) -> list[Bar]:
    """Who or what the most credits went to; the most that is shown is twelve."""
    totals = {value: calls.add_up(those) for value, those in calls.split(groups, by).items()}
    first = sorted(totals.items(), key=lambda item: (-item[1].captured, item[0]))[:_MOST_RANKED]
    return bars(
        (
            names(value), total.captured,
            f"{counted(total.captured, 'credit')}, {counted(total.calls, 'call')}", link(value),
        )
        for value, total in first
    )  # fmt: skip


def by_model(groups: list[Group], link: Callable[[str], str]) -> list[Bar]:
    """The same of models; nothing where none was called. `link` is the query of a model's link."""
    of_models = [group for group in groups if group.model]
    return ranked(of_models, "model", str, lambda model: f"/dashboard/usage?{link(model)}")


def by_day(
    groups: list[Group], first_day: int, last_day: int, of_failed: bool, query: str = ""
) -> list[Bar]:
    """Credits, or failed calls, by day or, of a long time, by month. `query` is what the links of
    the bars keep beside their days."""
    by_month = last_day - first_day >= MOST_DAYS
    spans: dict[str, list[int]] = {}
    for day in range(first_day, last_day + 1):
        spans.setdefault(day_name(day)[: 7 if by_month else 10], []).append(day)
    of_day = {day: calls.add_up(those) for day, those in calls.split(groups, "day").items()}
    nothing = Total(0, 0, 0)
    found = []
    for name, days in spans.items():
        totals = [of_day.get(day, nothing) for day in days]
        count, failed, captured = (sum(column) for column in zip(*totals, strict=True))
        told = f"{counted(captured, 'credit')}, {counted(count, 'call')}"
        if of_failed:
            told = f"{number(failed)} failed of {counted(count, 'call')}"
        href = f"/dashboard/usage?from={day_name(days[0])}&to={day_name(days[-1])}{query}"
        found.append((name, failed if of_failed else captured, f"{name}: {told}", href))
    return bars(found)


def today() -> int:
    """This UTC day, in days since the epoch."""
    return clock.now_ms() // clock.DAY_MS


def day_of(text: str) -> int:
    """The day since the epoch of a date."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) // 86_400
