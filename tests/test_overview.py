"""The overview says what the calls and entries say, warns in time, and leads to the first call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from html_pages import Page, Visit, account_of, begin, cheaply, join, newcomer, number, run, visitor
from inprocess import Box, Clock
from people import CONFIG

from core import clock

NOW = "2027-03-05T12:00:00Z"
DAY_MS = clock.DAY_MS


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        cheaply(patch)
        yield patch


@pytest.fixture(scope="module")
def hand(cheap: pytest.MonkeyPatch) -> Clock:
    """The clock of this module's tests; each sets it first."""
    return Clock(cheap, NOW)


@pytest.fixture(autouse=True)
def it_is_now(hand: Clock) -> None:
    hand.set(NOW)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, hand: Clock) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("overview") / "i", CONFIG) as box:
        yield box


def owner(box: Box, credits: int = 1000) -> tuple[Visit, str]:
    """Who is signed in, and a key of theirs."""
    email = newcomer(box, credits=credits)
    key, _ = box.key(account_of(box, email))
    return Visit.sign_in(box, email), key


def echo(box: Box, key: str, status: int = 200) -> None:
    assert box.get(f"/api/v1/echo?status={status}", key).status == (502 if status > 499 else status)


def at_ms(call: dict[str, Any]) -> int:
    return clock.parse_rfc3339(call["created_at"])


# What it says.


def test_tiles_picture_and_rankings_are_what_the_calls_come_to(box: Box, hand: Clock) -> None:
    email, guest = newcomer(box, credits=500), newcomer(box)
    account = account_of(box, email)
    join(box, account, email, guest)
    me, them = Visit.sign_in(box, email), Visit.sign_in(box, guest)
    nobodys, _ = box.key(account)
    mine = me.press("/dashboard/billing", "Quick: Cursor / agent key").taken("secret")
    start = clock.parse_rfc3339("2027-03-05T00:00:00Z")
    for back in (0, 1, 6, 7, 29, 30, 45):  # the days that are counted in one and not in another
        for moment in (start - back * DAY_MS, start - (back - 1) * DAY_MS - 1):
            hand.now = moment
            echo(box, mine)
            box.sms(nobodys, text="x" * 200)  # two segments
            echo(box, mine, 404)
            box.sms(mine, to="+15005550500")
    hand.now = start - DAY_MS
    box.post("/api/v1/echo", them.browser.token(account))
    hand.set(NOW)
    begin(box, account, "/api/v1/echo", 3)
    calls = me.api("/api/v1/usage")
    (refunded,) = [call for call in calls if call["created_at"] == "2027-03-04T00:00:00Z"
                   and call["route"] == "/api/v1/sms/send" and call["captured"]]  # fmt: skip
    assert box.cli("credits", "refund", refunded["request_id"]).exit_code == 0
    today = hand.now // DAY_MS
    within = {
        days: [call for call in calls if at_ms(call) // DAY_MS > today - days]
        for days in (1, 7, 30)
    }

    page = me.open("/dashboard")
    tiles = page.tiles()
    assert list(tiles) == [
        "Balance", "Set aside", "Spent today", "7 days", "30 days", "Failed, 30 days",
    ]  # fmt: skip
    told = box.get("/api/v1/account", me.browser.token()).json()
    assert tiles["Balance"] == f"{told['credits']} credits · ${told['usd_value']}"
    assert tiles["Set aside"] == "3 for calls in flight" and told["held"] == 3
    for name, days in (("Spent today", 1), ("7 days", 7), ("30 days", 30)):
        spent = sum(call["captured"] for call in within[days])
        assert tiles[name] == f"{spent} in {len(within[days])} calls", name
    failed = sum(call["status"] == "voided" for call in within[30])
    assert tiles["Failed, 30 days"] == f"{failed} not charged · 2 credits refunded"

    by_day: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for call in within[30]:
        by_day[call["created_at"][:10]].append(call)
    days = [clock.rfc3339((today - back) * DAY_MS)[:10] for back in range(29, -1, -1)]
    assert [bar.partition(":")[0] for bar in page.bars()] == days
    for bar, day in zip(page.bars(), days, strict=True):
        spent, calls_ = sum(call["captured"] for call in by_day[day]), len(by_day[day])
        plural = "s" if calls_ != 1 else ""
        assert bar == f"{day}: {spent} credits, {calls_} call{plural}"

    token = me.browser.token()
    query = f"from={days[0]}"
    for by, first, name in (("member", "Person", "user_id"), ("route", "Route", "route")):
        rows = box.get(f"/api/v1/usage/summary?by={by}&{query}", token).json()["data"]
        names = {None: "Keys without an owner"} | {
            row[by]: row[by] for row in rows if row[by] is not None
        }
        for person in (email, guest):
            (found,) = box.row("SELECT id FROM user WHERE email = :e", e=person)
            names[found] = person
        expected = [
            [names[row[by]], f"{row['captured']} credits, {row['calls']} call"
             + ("" if row["calls"] == 1 else "s")]
            for row in rows
        ]  # fmt: skip
        assert page.table(first) == expected, name
        assert len(rows) == (3 if by == "member" else 2)
    assert [number(row[1]) for row in page.table("Route")] == sorted(
        (number(row[1]) for row in page.table("Route")), reverse=True
    )

    # The links of the picture and the routes show what they are made of.
    for link in page.root.all("a"):
        if link.get("href").startswith("/dashboard/usage?from="):
            day = link.text.partition(":")[0]
            shown = me.open(link.get("href"))
            assert number(shown.tiles()["Calls"]) == len(by_day[day])
        elif "route=" in link.get("href"):
            spent = number(link.around("tr").one("td").text)
            assert number(me.open(link.get("href")).tiles()["Credits"]) == spent


def test_a_clock_that_stepped_back_loses_no_call(box: Box, hand: Clock) -> None:
    me, key = owner(box)
    hand.forward(days=1)
    echo(box, key)
    hand.forward(days=-1)
    echo(box, key)
    page = me.open("/dashboard")
    assert page.tiles()["30 days"] == "6 in 2 calls"
    assert len(page.bars()) == 30 and page.bars()[-1] == "2027-03-05: 3 credits, 1 call"


def test_what_is_one_is_told_as_one(box: Box, hand: Clock) -> None:
    me, key = owner(box, 3)
    assert box.sms(key).status == 200
    calls = me.api("/api/v1/usage")
    assert box.cli("credits", "refund", calls[0]["request_id"]).exit_code == 0
    assert box.sms(key).status == box.sms(key).status == 200
    tiles = me.open("/dashboard").tiles()
    assert tiles["Balance"] == "1 credit · $0.01"
    assert tiles["Spent today"] == "3 in 3 calls"
    assert tiles["Failed, 30 days"] == "0 not charged · 1 credit refunded"
    assert me.open("/dashboard").bars()[-1] == "2027-03-05: 3 credits, 3 calls"
    told = me.open("/dashboard").notices()[0]
    assert told.startswith("Credits run low. 1 is left, and the last seven days took 3.")
    billing = me.open("/dashboard/billing").section("Balance").text
    assert "Balance 1 credit Worth $0.01." in billing


@pytest.mark.parametrize(
    "today",
    [
        "2027-01-01", "2027-01-10", "2027-01-30", "2027-01-31", "2027-12-31", "2028-02-28",
        "2028-02-29", "2028-03-01", "2028-12-31", "2029-02-28", "2029-03-01",
    ],
)  # fmt: skip
def test_whoever_rested_for_a_month_can_look_a_year_back(box: Box, hand: Clock, today: str) -> None:
    hand.now = clock.parse_rfc3339(f"{today}T12:00:00Z") - 40 * DAY_MS
    email = newcomer(box, credits=10)
    echo(box, box.key(account_of(box, email))[0])
    hand.set(f"{today}T12:00:00Z")
    me = Visit.sign_in(box, email)
    page = me.open("/dashboard")
    assert page.tiles()["30 days"] == "0 in 0 calls" and page.bars() == []
    assert "First steps" not in page.headings()
    found = me.open(page.link("Look further back"))
    assert found.tiles()["Calls"] == "1" and len(found.table("When")) == 1


# When credits run low.


def low(page: Page) -> bool:
    return any(told.startswith("Credits run low.") for told in page.notices())


@pytest.mark.parametrize(
    ("credits", "spent_on", "is_low"),
    [
        # 21 in seven days are 9 in three: with 9 left it lasts exactly as long.
        (21 + 9, 0, False),
        (21 + 8, 0, True),
        (21 + 8, 6, True),
        (21 + 8, 7, False),  # eight days ago no more
        (21, 7, True),  # none left
        (22, 7, False),
    ],
)
def test_credits_run_low_when_they_last_less_than_three_days(
    box: Box, hand: Clock, credits: int, spent_on: int, is_low: bool
) -> None:
    email = newcomer(box, credits=credits)
    key, _ = box.key(account_of(box, email))
    hand.now = clock.parse_rfc3339("2027-03-05T00:00:00Z") - spent_on * DAY_MS
    for _ in range(7):
        echo(box, key)
    hand.set(NOW)
    page = Visit.sign_in(box, email).open("/dashboard")
    assert low(page) is is_low
    if is_low:
        assert page.link("Add credits") == "/dashboard/billing#add-credits"


@pytest.mark.parametrize(("left", "is_low"), [(0, True), (5, True), (6, False), (100, False)])
def test_the_operator_says_what_low_is(
    tmp_path: Path, hand: Clock, left: int, is_low: bool
) -> None:
    with Box(tmp_path / "i", f"{CONFIG}\n[alerts]\ncredit_low = 5\n") as box:
        me, key = owner(box, left + 3)
        assert not low(me.open("/dashboard"))  # who has not begun is shown the first steps
        echo(box, key)
        page = me.open("/dashboard")
        assert low(page) is is_low
        if is_low:
            begin(box, account_of(box, me.email), "/api/v1/echo", 0)
            assert low(me.open("/dashboard"))
        else:
            begin(box, account_of(box, me.email), "/api/v1/echo", left - 5)
            assert low(me.open("/dashboard"))  # what is set aside is not there to be spent


# Keys that need care.


def test_keys_are_named_from_the_moment_they_need_care(box: Box, hand: Clock) -> None:
    me, key = owner(box)
    account, now = account_of(box, me.email), hand.now
    echo(box, key)
    fortnight, quarter = 14 * DAY_MS, 90 * DAY_MS
    for name, expires_at in (
        ("gone", now + 1), ("ends soon", now + fortnight + 1), ("ends later", now + fortnight + 2),
    ):  # fmt: skip
        box.key(account, name=name, expires_at=expires_at)
    hand.forward(ms=1)
    (told,) = me.open("/dashboard").notices()
    assert told == "Ending within two weeks: ends soon on 2027-03-19 12:00 UTC."
    hand.forward(ms=1)
    (told,) = me.open("/dashboard").notices()
    assert "ends soon" in told and "ends later" in told and "gone" not in told
    # Ninety days later.
    hand.now = now + quarter - 1
    me = Visit.sign_in(box, me.email)
    assert me.open("/dashboard").notices() == []
    hand.now = now + quarter
    first = box.row("SELECT name FROM api_key WHERE account_id = :a", a=account)[0]
    (told,) = me.open("/dashboard").notices()
    assert told == f"Not used for 90 days: {first}. Revoke what nobody needs."
    echo(box, key)
    assert me.open("/dashboard").notices() == []


def test_of_many_keys_that_need_care_five_are_named(box: Box, hand: Clock) -> None:
    me, key = owner(box)
    echo(box, key)
    account = account_of(box, me.email)
    for at in range(1, 8):
        box.key(account, name=f"k{at}", expires_at=hand.now + at * DAY_MS)
    told = me.open("/dashboard").notices()[-1]
    assert told.endswith("k5 on 2027-03-10 12:00 UTC and 2 more.") and "k6" not in told


def test_a_member_is_told_of_their_own_keys_alone(box: Box, hand: Clock) -> None:
    email, guest = newcomer(box, credits=9), newcomer(box)
    account = account_of(box, email)
    join(box, account, email, guest)
    key, _ = box.key(account, name="the owner's", expires_at=hand.now + DAY_MS)
    echo(box, key)
    them = Visit.sign_in(box, guest)
    them.press("/dashboard", "Switch", account=account)
    assert them.open("/dashboard").notices() == []
    assert len(Visit.sign_in(box, email).open("/dashboard").notices()) == 1


# The first steps.


def test_who_is_new_is_led_to_the_first_call(box: Box) -> None:
    me = visitor(box, credits=10)
    page = me.open("/dashboard")
    assert page.headings("h2", "h3") == [
        "First steps", "Get an API key", "Paste a call", "Watch it arrive",
    ]  # fmt: skip
    assert page.bars() == [] and not page.has_link("Look further back")
    assert "It is shown once, so have a place for it." in page.text
    secret = me.press(page, "Quick: Cursor / agent key")
    page = me.open("/dashboard")
    assert "You have one." in page.text
    curl = page.taken("curl")
    assert "$FAREBOX_API_KEY" in curl and '"Authorization: Bearer $FAREBOX_API_KEY"' in curl
    assert run(box, curl, secret.taken("secret"))[0] == 200
    page = me.open("/dashboard")
    assert "First steps" not in page.headings() and "first-steps" not in page.answer.body.decode()
    assert page.tiles()["Spent today"] == "3 in 1 call"


def test_a_key_that_was_revoked_is_none_to_begin_with(box: Box) -> None:
    me = visitor(box, credits=10)
    me.press("/dashboard", "Quick: Cursor / agent key")
    assert "You have one." in me.open("/dashboard").text
    me.press(me.press("/dashboard/billing", "Revoke"), "Revoke")
    page = me.open("/dashboard")
    assert "You have one." not in page.text and "It is shown once" in page.text


def test_an_instance_that_sells_nothing_says_what_its_operator_does(
    tmp_path: Path, hand: Clock
) -> None:
    with Box(tmp_path / "i", '[upstreams.sandbox]\nkind = "sandbox"\n') as box:
        page = visitor(box).open("/dashboard")
        assert "This instance sells nothing yet." in page.text
        assert not page.main.all("code", id="curl")


# Around it.


def test_every_link_leads_to_a_page(box: Box, hand: Clock) -> None:
    me, key = owner(box)
    echo(box, key)
    seen = me.crawl("/dashboard")
    for path in ("/dashboard/billing", "/dashboard/usage", "/dashboard/settings"):
        assert path in seen
    assert any(path.startswith("/dashboard/billing/keys/") for path in seen)
    fresh = visitor(box)
    assert "/dashboard/billing/ledger" not in fresh.crawl("/dashboard")
    admin = visitor(box, "--operator")
    assert "/admin/health" in admin.crawl("/admin")


@pytest.mark.parametrize("path", ["", "/billing", "/usage", "/settings", "/billing/statement"])
def test_every_page_says_who_is_signed_in_and_lets_them_out(box: Box, path: str) -> None:
    me = visitor(box)
    page = me.open(f"/dashboard{path}")
    assert page.root.one("span", class_="who").text == me.email
    assert page.buttons().count("Sign out") == 1
    assert "Admin" not in page.root.one("header").text
    out = me.press(page, "Sign out")
    assert out.h1 == "Sign in"
    assert me.open(f"/dashboard{path}").h1 == "Sign in"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/dashboard/usage/req_nobodys", "not_found"),
        ("/dashboard/billing/keys/key_nobodys", "not_found"),
        ("/admin", "forbidden"),
    ],
)
def test_what_is_refused_is_a_page_that_names_the_request(box: Box, path: str, code: str) -> None:
    me = visitor(box)
    page = me.open(path, 403 if code == "forbidden" else 404)
    assert page.answer.request_id in page.text
    assert page.link(code) == f"/docs/errors#{code}"
    # They are signed in already.
    assert page.has_link("Overview") and not page.has_link("Sign in")


def test_a_page_of_an_account_that_is_suspended_says_so(box: Box) -> None:
    me, _ = owner(box)
    box.suspend_account(account_of(box, me.email), "unpaid")
    for path in ("", "/billing", "/usage", "/settings"):
        told = me.open(f"/dashboard{path}").alert()
        assert told.startswith("This account is suspended: unpaid. Calls are refused")
    page = me.press("/dashboard/billing", "Quick: Cursor / agent key", status=403)
    assert "This account is suspended." in page.main.all("p", role="alert")[-1].text
