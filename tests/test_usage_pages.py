"""Usage: what is listed, counted, drawn and exported is what the API says, for any filter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from html_pages import (
    Page,
    Visit,
    account_of,
    begin,
    cheaply,
    join,
    newcomer,
    number,
    query_of,
    user_of,
    visitor,
)
from inprocess import Box, Clock
from people import CONFIG

from core import clock, ledger
from core.ledger import Outcome

NOW = "2028-03-02T12:00:00Z"
USAGE = "/dashboard/usage"
DAY_MS = clock.DAY_MS
ECHO, SMS, PAGES = "/api/v1/echo", "/api/v1/sms/send", "/api/v1/pages"
UNITS = f"""
[[routes]]
path = "{PAGES}"
methods = ["POST"]
upstream = "sandbox"
credits = 2
per = "unit"
units = {{ from = "json", pointer = "/json/pages", max = 5 }}
cost_usd = "0.001"

[[routes]]
path = "/api/v1/both"
methods = ["GET"]
upstream = "sandbox"
credits = 1

[[routes]]
path = "/api/v1/both"
methods = ["POST"]
upstream = "sandbox"
credits = 4
"""
NO_DAY = "Expected a day such as 2027-01-31, or a time such as 2027-01-31T00:00:00Z."
STATUS = {"captured": "charged", "voided": "not charged", "held": "in flight"}


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        cheaply(patch)
        yield patch


@pytest.fixture(scope="module")
def hand(cheap: pytest.MonkeyPatch) -> Clock:
    return Clock(cheap, NOW)


@pytest.fixture(autouse=True)
def it_is_now(hand: Clock) -> None:
    hand.set(NOW)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, hand: Clock) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("usage") / "i", CONFIG + UNITS) as box:
        yield box


class World:
    """An account with calls over a year: two keys, two people, three routes, every ending."""

    MOMENTS = (
        "2027-03-03T00:00:00Z", "2027-12-31T23:59:59.999Z", "2028-01-01T00:00:00Z",
        "2028-02-01T23:59:59.999Z", "2028-02-02T00:00:00Z", "2028-02-28T23:59:59.999Z",
        "2028-02-29T00:00:00Z", "2028-02-29T23:59:59.999Z", "2028-03-01T00:00:00Z",
        "2028-03-03T00:00:00Z",  # and then the clock stepped back
        "2028-03-02T00:00:00Z", "2028-03-02T11:00:00Z",
    )  # fmt: skip

    def __init__(self, box: Box, hand: Clock) -> None:
        hand.set(self.MOMENTS[0])
        self.box, self.owner, self.guest = box, newcomer(box, credits=10_000), newcomer(box)
        self.account = account_of(box, self.owner)
        join(box, self.account, self.owner, self.guest)
        self.key, self.key_id = box.key(self.account, name="of nobody")
        me = Visit.sign_in(box, self.owner)
        self.mine = me.press("/dashboard/billing", "Create key", name="mine & yours")
        mine = self.mine.taken("secret")
        (self.mine_id,) = box.row("SELECT id FROM api_key WHERE name = 'mine & yours'")
        for at, moment in enumerate(self.MOMENTS):
            hand.set(moment)
            box.get(ECHO, self.key)
            box.sms(mine, text="z" * 200)
            box.sms(self.key, to="+15005550500")
            box.post(PAGES, mine, {"pages": at % 5 + 1})
            if at % 2:
                box.get(f"{ECHO}?status=404", mine)
            if at % 3 == 0:
                them = Visit.sign_in(box, self.guest)
                box.post(ECHO, them.browser.token(self.account), {"at": at})
            if at in (1, 6, 11):
                begin(box, self.account, ECHO, 3, key_id=self.key_id)
                begin(
                    box, self.account, PAGES, 10, user_id=user_of(box, self.guest), payer="session"
                )
        hand.set(NOW)
        self.me = Visit.sign_in(box, self.owner)
        self.calls = self.me.api("/api/v1/usage")  # the newest first
        self.names = {self.key_id: "of nobody", self.mine_id: "mine & yours"}

    def passing(
        self, first: str, last: str, key: str = "", route: str = "", status: str = ""
    ) -> list[dict[str, Any]]:
        return [
            call
            for call in self.calls
            if first <= call["created_at"][:10] <= last
            and key in ("", call["key_id"])
            and route in ("", call["route"])
            and status in ("", call["status"])
        ]


@pytest.fixture(scope="module")
def world(box: Box, hand: Clock) -> World:
    return World(box, hand)


def as_row(world: World, call: dict[str, Any]) -> list[str]:
    by = world.names.get(call["key_id"], f"{world.guest} session token")
    status = STATUS[call["status"]]
    if call["status"] == "voided":
        status += f" {call['upstream_status']}"
    credits = f"({call['held']})" if call["status"] == "held" else str(call["captured"])
    when = call["created_at"][:16].replace("T", " ") + " UTC"
    return [when, f"{call['method']} {call['route']}", by, status, credits]


def listed(me: Visit, path: str) -> tuple[Page, list[list[str]]]:
    """The first page of a list, and the rows of all of them."""
    first = page = me.open(path)
    rows: list[list[str]] = []
    while page.main.all("table"):
        rows += page.table("When")
        if not page.has_link("Older"):
            break
        page = me.open(page.link("Older"))
    return first, rows


SPANS = [
    ("2028-02-02", "2028-03-02"), ("2028-02-29", "2028-02-29"), ("2028-02-28", "2028-03-01"),
    ("2027-12-31", "2028-01-01"), ("2027-03-03", "2028-03-02"), ("2028-03-02", "2028-03-04"),
    ("2027-06-01", "2027-06-30"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "last"), SPANS)
def test_every_filter_alone_and_with_others(world: World, first: str, last: str) -> None:
    me = world.me
    keys = ("", world.key_id, world.mine_id)
    for key, route, status in product(keys, ("", ECHO, PAGES), ("", *STATUS)):
        asked = {"from": first, "to": last, "key": key, "route": route, "status": status}
        expected = world.passing(first, last, key, route, status)
        page, rows = listed(me, f"{USAGE}?{urlencode(asked)}")
        assert rows == [as_row(world, call) for call in expected], asked
        tiles = page.tiles()
        if status == "held":
            assert tiles == {} and page.bars() == []
        else:
            assert number(tiles["Calls"]) == len(expected), asked
            assert number(tiles["Credits"]) == sum(call["captured"] for call in expected)
            failed = sum(call["status"] == "voided" for call in expected)
            assert number(tiles["Not charged"]) == failed, asked
            ended = world.passing(first, last, key, route)
            check_picture(page, expected, ended, first, last, status)
        form = page.main.one("form", action=USAGE).fields()
        assert form == asked
        assert page.headings() == ["Usage"]
        if not expected:
            assert "No calls like that in these days." in page.text
            assert not page.has_link("Export CSV")
        if key == "" or status == "":
            continue
        file = me.sheet(f"{USAGE}.csv?{urlencode(asked)}")
        assert [row["request_id"] for row in file] == [call["request_id"] for call in expected]


def check_picture(
    page: Page,
    expected: list[dict[str, Any]],
    of: list[dict[str, Any]],
    first: str,
    last: str,
    status: str,
) -> None:
    """Whether each bar says what the calls of its days come to."""
    if not expected:
        assert page.bars() == []
        return
    by_month = last[:4] != first[:4] and first[5:7] != "12"
    size = 7 if by_month else 10
    seen = 0
    for text in page.bars():
        name, _, told = text.partition(": ")
        assert len(name) == size
        here = [call for call in expected if call["created_at"].startswith(name)]
        seen += len(here)
        if status == "voided":
            ended = sum(c["created_at"].startswith(name) and c["status"] != "held" for c in of)
            assert told == f"{len(here)} failed of {_counted(ended, 'call')}"
        else:
            spent = sum(call["captured"] for call in here)
            assert told == f"{_counted(spent, 'credit')}, {_counted(len(here), 'call')}", text
    assert seen == len(expected)
    heights = [float(rect.get("height")) for rect in page.main.one("ol").all("rect")]
    assert max(heights) <= 100 and len(heights) == len(page.bars())


def _counted(value: int, thing: str) -> str:
    return f"{value:,} {thing}{'' if value == 1 else 's'}"


def test_a_year_is_drawn_by_months_that_lead_to_their_days(world: World) -> None:
    page = world.me.open(f"{USAGE}?from=2027-03-03&to=2028-03-02&key={world.mine_id}")
    links = [node.get("href") for node in page.main.one("ol").all("a")]
    assert len(links) == 13
    asked = [query_of(link) for link in links]
    assert all(query["key"] == world.mine_id for query in asked)
    spans = [(query["from"], query["to"]) for query in asked]
    assert spans[0] == ("2027-03-03", "2027-03-31") and spans[-1] == ("2028-03-01", "2028-03-02")
    assert ("2028-02-01", "2028-02-29") in spans and ("2027-12-01", "2027-12-31") in spans
    for text, link in zip(page.bars(), links, strict=True):
        assert text.endswith(f"{world.me.open(link).tiles()['Calls']} calls") or "1 call" in text


@pytest.mark.parametrize(("days", "bars"), [(62, 62), (63, 4)])
def test_two_months_are_drawn_by_days_and_more_by_months(
    world: World, days: int, bars: int
) -> None:
    last = clock.parse_rfc3339("2028-03-02T00:00:00Z")
    first = clock.rfc3339(last - (days - 1) * DAY_MS)[:10]
    assert len(world.me.open(f"{USAGE}?from={first}&to=2028-03-02").bars()) == bars


def test_without_a_wish_the_last_thirty_days_are_shown(world: World) -> None:
    page, rows = listed(world.me, USAGE)
    form = page.main.one("form", action=USAGE).fields()
    assert (form["from"], form["to"]) == ("2028-02-02", "2028-03-02")
    assert rows == [as_row(world, call) for call in world.passing("2028-02-02", "2028-03-02")]
    page = world.me.open(f"{USAGE}?to=2028-02-01")
    assert page.main.one("form", action=USAGE).fields()["from"] == "2028-01-03"
    page = world.me.press(page, "Filter", typed={"status": "voided"})
    assert page.main.one("form", action=USAGE).fields() == {
        "from": "2028-01-03", "to": "2028-02-01", "key": "", "route": "", "status": "voided",
    }  # fmt: skip


def test_the_file_is_the_apis_rows_however_many(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in (1000, 7):
        monkeypatch.setattr("blueprints.usage._PER_BATCH", batch)
        for asked in ({"from": "2027-03-03", "to": "2028-03-02"}, {"key": world.mine_id}, {}):
            page = world.me.open(f"{USAGE}?{urlencode(asked)}")
            file = world.me.sheet(page.link("Export CSV"))
            form = page.main.one("form", action=USAGE).fields()
            expected = world.passing(form["from"], form["to"], asked.get("key", ""))
            assert file == [
                {
                    name: "" if value is None else json.dumps(value).strip('"')
                    for name, value in call.items()
                }
                for call in expected
            ]
    assert world.me.sheet(f"{USAGE}.csv?from=2027-06-01&to=2027-06-02") == []


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("from", "yesterday", NO_DAY),
        ("to", "2027-02-29", NO_DAY),
        ("from", "2028-03-03", "The first day lies before the last, by a year at most."),
        ("from", "2027-03-02", "The first day lies before the last, by a year at most."),
        ("from", "0001-01-01", "The first day lies before the last, by a year at most."),
        ("status", "lost", "A status is one of held, captured, voided."),
        ("before", "x", "That is not a place in this list."),
        ("before", "-1", "That is not a place in this list."),
        ("before", "9" * 16, "That is not a place in this list."),
    ],
)
def test_a_bad_wish_is_told_and_shown_again(world: World, name: str, value: str, told: str) -> None:
    asked = {"from": "2028-02-28", "to": "2028-03-02", "key": world.key_id, "route": ECHO,
             "status": "voided"} | {name: value}  # fmt: skip
    page = world.me.open(f"{USAGE}?{urlencode(asked)}", 400)
    assert page.alert() == told
    form = page.main.one("form", action=USAGE)
    shown = form.fields()
    for field, typed in asked.items():
        if field not in ("before", "status") or typed == "voided":
            assert shown[field] == typed, field
    if name in ("from", "to"):
        field = form.one("input", name=name)
        assert field.get("aria-invalid") == "true"
        # A calendar shows days alone, and would hide what else was typed.
        assert field.get("type") == ("text" if told == NO_DAY else "date")
    # Nothing is listed under words that were not understood.
    assert not page.main.all("table") and page.tiles() == {} and page.bars() == []
    if name != "before":
        refused = world.me.open(f"{USAGE}.csv?{urlencode(asked)}", 400)
        assert refused.h1 == told


def test_days_before_there_were_any_are_refused(world: World) -> None:
    for span in ("from=0001-01-01&to=0001-01-05", "from=1969-12-31&to=1970-01-01"):
        assert world.me.open(f"{USAGE}?{span}", 400).alert()
    page = world.me.open(f"{USAGE}?from=9999-12-01&to=9999-12-31")
    assert "No calls like that" in page.text
    assert "No calls like that" in world.me.open(f"{USAGE}?from=1970-01-01&to=1970-01-05").text
    assert "No calls like that" in world.me.open(f"{USAGE}?to=1970-01-05").text


def test_a_key_or_route_of_nobody_here_finds_nothing(box: Box, world: World) -> None:
    other = visitor(box, credits=10)
    key, key_id = box.key(account_of(box, other.email), name="theirs")
    box.get(ECHO, key)
    for wish in (f"key={key_id}", "key=nonsense", "route=/nowhere"):
        page = world.me.open(f"{USAGE}?{wish}")
        assert "No calls like that" in page.text and number(page.tiles()["Calls"]) == 0
        assert world.me.sheet(f"{USAGE}.csv?{wish}") == []
        assert "theirs" not in page.text
    page = other.open(f"{USAGE}?key={world.key_id}")
    assert "of nobody" not in page.answer.body.decode() and page.tiles()["Calls"] == "0"
    for call in world.calls[:3]:
        other.open(f"{USAGE}/{call['request_id']}", 404)


# Pages.


@pytest.mark.parametrize("count", [1, 49, 50, 51, 100, 101])
def test_pages_hold_fifty_and_the_last_one_ends(box: Box, count: int) -> None:
    me = visitor(box, credits=1000)
    key, _ = box.key(account_of(box, me.email))
    for _ in range(count):
        box.sms(key)
    sizes, path, ids = [], USAGE, []
    while True:
        page = me.open(path)
        assert (page.tiles() == {}) is (path != USAGE)  # sums are of all, so they stand once
        sizes.append(len(page.table("When")))
        ids += [a.get("href") for a in page.main.all("a") if a.get("href").startswith(f"{USAGE}/")]
        if not page.has_link("Older"):
            break
        path = page.link("Older")
    assert (
        sum(sizes) == count
        and sizes[:-1] == [50] * (len(sizes) - 1)
        and len(sizes) == -(-count // 50)
    )
    assert len(set(ids)) == count
    assert [link.partition("?")[0] for link in ids] == [
        f"{USAGE}/{call['request_id']}" for call in me.api("/api/v1/usage")
    ]
    page = me.open(f"{USAGE}?before=1")
    assert page.text.endswith("That was the last of them. Back to the newest")
    assert me.open(page.link("Back to the newest")).tiles()["Calls"] == str(count)


def test_what_is_listed_does_not_shift_while_calls_are_made(box: Box) -> None:
    me = visitor(box, credits=1000)
    key, _ = box.key(account_of(box, me.email))
    for _ in range(60):
        box.sms(key)
    page = me.open(USAGE)
    before = {call["request_id"] for call in me.api("/api/v1/usage")}
    box.sms(key)
    second = me.open(page.link("Older"))
    links = {
        a.get("href").rpartition("/")[2].partition("?")[0]
        for shown in (page, second)
        for a in shown.main.all("a")
        if a.get("href").startswith(f"{USAGE}/req")
    }
    assert links == before


def test_who_has_never_called_is_led_to_the_first_steps(box: Box) -> None:
    me = visitor(box)
    page = me.open(USAGE)
    assert "No calls yet." in page.text and page.link("The first steps") == "/dashboard"
    assert page.tiles()["Calls"] == "0" and not page.has_link("Export CSV")


# One call, explained.


def explained(me: Visit, call: dict[str, Any]) -> Page:
    page = me.open(f"{USAGE}/{call['request_id']}")
    facts = page.facts()
    assert facts["Request id"] == call["request_id"]
    assert facts["Call"] == f"{call['method']} {call['route']}"
    assert facts["When"].startswith(call["created_at"][:16].replace("T", " "))
    assert number(facts["Set aside"]) == call["held"]
    assert number(facts["Charged"]) == call["captured"]
    assert number(facts["Price"]) == call["price"]
    return page


def test_every_call_of_the_world_is_explained(world: World) -> None:
    entries = {e["reference"]: e for e in world.me.api("/api/v1/ledger") if e["kind"] == "capture"}
    for call in world.calls:
        page = explained(world.me, call)
        facts = page.facts()
        heading = {
            "captured": f"Charged {_counted(call['captured'], 'credit')}",
            "voided": "Not charged", "held": "In flight",
        }[call["status"]]  # fmt: skip
        assert page.h1 == heading
        if call["status"] == "captured":
            entry = entries[call["request_id"]]
            assert facts["Ledger"] == (
                f"{entry['created_at'][:16].replace('T', ' ')} UTC, balance after it"
                f" {entry['balance']:,} {entry['id']}"
            )
        else:
            assert "Ledger" not in facts
        paid_by = "session token, " + world.guest
        if call["key_id"] == world.key_id:
            paid_by = "key of nobody"
        elif call["key_id"]:
            paid_by = f"key mine & yours, {world.owner}"
        assert facts["Paid by"] == paid_by
        upstream = call["upstream_status"]
        none = "no answer yet" if call["status"] == "held" else "no answer"
        assert facts["Upstream"] == (f"status {upstream}" if upstream else none)


def test_what_was_set_aside_and_came_back_is_told(box: Box) -> None:
    me = visitor(box, credits=1000)
    key, _ = box.key(account_of(box, me.email))

    def made(answer: Any) -> Page:
        return explained(me, box.record(key, answer))

    page = made(box.post(PAGES, key, {"pages": 3}))
    assert page.h1 == "Charged 6 credits"
    assert (
        "The upstream served this call (status 200). 10 credits had been set aside for it,"
        " and 4 came back." in page.text
    )
    assert page.facts()["Price"] == "6 credits for 3 units Today’s price: 2 per unit"
    assert "estimate" not in page.text
    page = made(box.post(PAGES, key, {"pages": "?"}))
    assert "The answer did not say how much it was, so the charge is an estimate." in page.text
    assert page.facts()["Price"] == "2 credits for 1 unit Today’s price: 2 per unit"
    page = made(box.post(PAGES, key, {"pages": 5}))
    assert "came back" not in page.text
    page = made(box.sms(key))
    assert page.h1 == "Charged 1 credit"
    assert "1 credit had been set aside for it." in page.text
    assert page.facts()["Price"] == "1 credit for 1 SMS segment Today’s price: 1 per SMS segment"
    assert page.facts()["Charged"] == "1 ($0.01)"
    page = made(box.sms(key, to="+15005550500"))
    assert (
        "The upstream answered with status 500, so the 1 credit set aside came back." in page.text
    )
    page = made(box.sms(key, to="+15005550504"))
    assert "The upstream gave no answer, so the 1 credit set aside came back." in page.text
    page = made(box.get(f"{ECHO}?status=404", key))
    assert "status 404, so the 3 credits set aside came back." in page.text


def test_a_call_in_flight_says_what_is_set_aside(box: Box) -> None:
    me = visitor(box, credits=100)
    for held, told in ((1, "1 credit is set aside"), (3, "3 credits are set aside")):
        call_id = begin(box, account_of(box, me.email), ECHO, held)
        page = me.open(f"{USAGE}/{call_id}")
        assert page.h1 == "In flight" and f"{told} until it ends." in page.text


def test_an_answer_that_did_not_come_whole_is_not_called_a_success(box: Box) -> None:
    me = visitor(box, credits=100)
    call_id = begin(box, account_of(box, me.email), ECHO, 3)
    box.write(lambda tx: ledger.void(tx, call_id, Outcome(200, 5)))
    page = me.open(f"{USAGE}/{call_id}")
    assert page.h1 == "Not charged"
    assert "The upstream’s answer (status 200) did not come whole" in page.text


def test_a_refund_stands_beside_its_call(box: Box, hand: Clock) -> None:
    me = visitor(box, credits=100)
    key, _ = box.key(account_of(box, me.email))
    for answer, told in ((box.sms(key), "1 credit"), (box.get(ECHO, key), "3 credits")):
        done = box.cli("credits", "refund", answer.request_id, "--note", "it never came")
        assert done.exit_code == 0
        page = me.open(f"{USAGE}/{answer.request_id}")
        assert page.notices() == [f"Refunded {told}, 2028-03-02 12:00 UTC: it never came."]


def test_todays_price_is_that_of_the_method(box: Box) -> None:
    me = visitor(box, credits=100)
    key, _ = box.key(account_of(box, me.email))
    for answer, price in (
        (box.get("/api/v1/both", key), 1), (box.post("/api/v1/both", key), 4),
    ):  # fmt: skip
        facts = me.open(f"{USAGE}/{answer.request_id}").facts()
        assert number(facts["Price"]) == price
        assert facts["Price"].endswith(f"Today’s price: {price} per call")


def test_calls_whose_callers_gave_them_one_id_are_told_apart(box: Box) -> None:
    me = visitor(box, credits=100)
    key, _ = box.key(account_of(box, me.email))
    box.get(ECHO, key, X_Request_Id="mine")
    box.sms(key, X_Request_Id="mine")
    page = me.open(USAGE)
    told = []
    for row in page.main.one("tbody").all("tr"):
        path = row.all("a")[0].get("href")
        told.append((me.open(path).facts()["Call"], row.all("td")[4].text))
    assert told == [(f"POST {SMS}", "1"), (f"GET {ECHO}", "3")]
    # The id that a caller knows leads to the newest, as in the API.
    assert me.open(f"{USAGE}/mine").facts()["Call"] == f"POST {SMS}"
    me.open(f"{USAGE}/mine?n=3", 404)
    me.open(f"{USAGE}/mine?n=x", 400)


def test_a_call_of_a_route_and_a_key_that_are_gone_is_explained(
    tmp_path: Path, hand: Clock
) -> None:
    with Box(tmp_path / "i", CONFIG + UNITS) as box:
        me = visitor(box, credits=100)
        key, key_id = box.key(account_of(box, me.email), name="gone")
        call = box.record(key, box.post(PAGES, key, {"pages": 2}))
        box.revoke(key_id)
        email = me.email
    with Box(tmp_path / "i", CONFIG) as box:
        (tmp_path / "i" / "farebox.toml").write_text(CONFIG)
        me = Visit.sign_in(box, email)
        facts = explained(me, call).facts()
        assert facts["Price"] == "4 credits for 2 units" and facts["Paid by"] == "key gone"
        page = me.open(f"{USAGE}?key={key_id}&route={PAGES}")
        assert len(page.table("When")) == 1
        assert page.main.one("form", action=USAGE).fields()["route"] == PAGES


def test_a_call_nobody_made_is_not_there(box: Box) -> None:
    page = visitor(box).open(f"{USAGE}/req_none", 404)
    assert "req_none" not in page.text
