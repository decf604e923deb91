"""Billing: keys do what their form said, the session token works, and months add up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    run,
    visitor,
)
from inprocess import Box, Clock
from people import CONFIG, audited

from core import clock, ledger

NOW = "2027-03-05T12:00:00Z"
BILLING = "/dashboard/billing"
DAY_MS = clock.DAY_MS
WORDS = {
    "grant": "Grant", "signup": "Welcome credits", "voucher": "Voucher", "capture": "Charge",
    "refund": "Refund", "adjustment": "Adjustment",
}  # fmt: skip


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
    with Box(tmp_path_factory.mktemp("billing") / "i", CONFIG) as box:
        yield box


@pytest.fixture
def me(box: Box) -> Visit:
    return visitor(box, credits=100)


def echo(box: Box, key: str) -> int:
    return box.get("/api/v1/echo", key).status


def made(me: Visit, name: str = "mine", **terms: Any) -> tuple[str, str]:
    """A key made by the form: the secret and its id."""
    page = me.press(BILLING, "Create key", name=name, **terms)
    assert page.h1 == f"Your new key: {name}"
    return page.taken("secret"), newest(me)["id"]


def newest(me: Visit) -> dict[str, Any]:
    keys = me.box.get("/api/v1/keys?limit=100", me.browser.token()).json()["data"]
    (key_id,) = me.box.row(
        "SELECT id FROM api_key WHERE account_id = :a ORDER BY number DESC LIMIT 1",
        a=account_of(me.box, me.email),
    )
    (found,) = [key for key in keys if key["id"] == key_id]
    return dict(found)


# What the page has.


def test_headings_and_buttons_are_called_as_agreed(me: Visit) -> None:
    page = me.open(BILLING)
    assert page.headings() == [
        "Billing", "Balance", "Add credits", "API Keys · permanent bearer", "In one click",
        "With a name and limits", "Session token · short-lived", "Ledger",
    ]  # fmt: skip
    assert page.buttons(page.main) == [
        "Redeem", "Quick: Cursor / agent key", "Create key", "Reveal session token",
    ]  # fmt: skip
    assert page.root.all("button", **{"data-copy": "token"}) == []
    _, key_id = made(me)
    page = me.open(BILLING)
    assert page.buttons(page.item("mine")) == ["Suspend", "Rotate", "Revoke"]
    me.press(me.press(page, "Suspend"), "Suspend")
    page = me.open(BILLING)
    assert page.buttons(page.item("mine")) == ["Resume", "Rotate", "Revoke"]
    one = me.open(f"{BILLING}/keys/{key_id}")
    assert one.buttons(one.main) == ["Save", "Resume", "Rotate", "Revoke"]
    page = me.press(BILLING, "Reveal session token")
    assert page.buttons(page.section("Session token · short-lived")) == [
        "Refresh", "Revoke this token",
    ]  # fmt: skip
    assert page.taken("token").startswith("eyJ")


def test_what_is_empty_says_what_to_do(box: Box) -> None:
    page = visitor(box).open(BILLING)
    assert "No keys yet." in page.section("API Keys · permanent bearer").text
    assert "Nothing has moved yet." in page.section("Ledger").text
    assert page.section("Balance").text == "Balance 0 credits Worth $0.00. Statement of account"
    assert "No code? The operator" in page.section("Add credits").text
    page = visitor(box, "--operator").open(BILLING)
    assert "You run this instance" in page.section("Add credits").text


def test_the_balance_is_the_accounts(box: Box, me: Visit) -> None:
    account = account_of(box, me.email)
    for held, told in (
        (0, ""), (1, " 1 more is set aside for calls in flight."),
        (2, " 3 more are set aside for calls in flight."),
    ):  # fmt: skip
        if held:
            begin(box, account, "/api/v1/echo", held)
        api = box.get("/api/v1/account", me.browser.token()).json()
        text = me.open(BILLING).section("Balance").text
        assert f"{api['credits']} credits Worth ${api['usd_value']}.{told} Statement" in text


# Keys.


def test_a_quick_key_works_at_once_as_the_page_that_shows_it_says(box: Box, me: Visit) -> None:
    page = me.press(BILLING, "Quick: Cursor / agent key")
    secret = page.taken("secret")
    assert re.fullmatch(r"fare_live_[A-Za-z0-9]{32}", secret)
    assert page.h1 == "Your new key: Cursor / agent" and "Take it now." in page.notices()[0]
    assert page.taken("export") == f"export FAREBOX_API_KEY={secret}"
    assert page.headings("h2") == ["In your shell", "A call"]  # nothing here speaks OpenAI's way
    assert run(box, page.taken("curl"))[0] == 200
    assert (newest(me)["scopes"], newest(me)["expires_at"]) == (None, None)
    assert newest(me)["credit_limit"] is newest(me)["rate_limit"] is None
    assert secret not in me.open(BILLING).answer.body.decode()
    assert box.record(secret, box.sms(secret))["user_id"] == newest(me)["user_id"]


def test_where_models_are_sold_the_lines_for_their_tools_are_shown(
    tmp_path: Path, hand: Clock
) -> None:
    config = CONFIG + (
        '\n[[routes]]\npath = "/v1/chat/completions"\nmethods = ["POST"]\nupstream = "sandbox"\n'
        'adapter = "chat"\n[[models]]\nid = "small"\ncredits_per_request = 1\n'
    )
    with Box(tmp_path / "i", config) as box:
        page = visitor(box).press(BILLING, "Quick: Cursor / agent key")
        base, secret = box.settings.public_url, page.taken("secret")
        lines = f"export OPENAI_BASE_URL={base}/v1\nexport OPENAI_API_KEY={secret}"
        assert page.taken("openai") == lines


def test_scopes_restrict_a_key_and_none_of_them_is_no_route(box: Box, me: Visit) -> None:
    free, _ = made(me, "free")
    only, key_id = made(me, "only", restricted="1", scopes=["sms:send"])
    none, none_id = made(me, "none", restricted="1")
    open_, _ = made(me, "ticked, but not restricted", scopes=["sms:send"])
    assert [(echo(box, key), box.sms(key).status) for key in (free, only, none, open_)] == [
        (200, 200), (403, 200), (403, 403), (200, 200),
    ]  # fmt: skip
    page = me.open(BILLING)
    assert "only sms:send" in page.item("only").text
    assert "may call nothing" in page.item("none").text
    assert "only" not in page.item("free").text
    secret = me.press(f"{BILLING}/keys/{none_id}/rotate", "Rotate")
    assert "There is no route that this key may call." in secret.text
    curl = me.press(f"{BILLING}/keys/{key_id}/rotate", "Rotate").taken("curl")
    status, answer = run(box, curl)
    assert (status, answer["success"]) == (200, True)


def test_a_key_ends_at_the_start_of_the_day_that_was_chosen(
    box: Box, me: Visit, hand: Clock
) -> None:
    key, _ = made(me, expires="2027-03-07")
    assert newest(me)["expires_at"] == "2027-03-07T00:00:00Z"
    assert "ends 2027-03-07 00:00 UTC" in me.open(BILLING).item("mine").text
    hand.now = clock.parse_rfc3339("2027-03-07T00:00:00Z") - 1
    assert echo(box, key) == 200
    hand.forward(ms=1)
    assert echo(box, key) == 401
    page = Visit.sign_in(box, me.email).open(BILLING)
    assert "expired" in page.item("mine").text
    assert page.buttons(page.item("mine")) == ["Revoke"]


@pytest.mark.parametrize(
    ("period", "told", "renewed"),
    [
        ("day", "a day", "2027-03-06T00:00:00Z"),
        ("week", "a week", "2027-03-08T00:00:00Z"),
        ("month", "a month", "2027-04-01T00:00:00Z"),
        ("total", "in total", None),
    ],
)
def test_a_credit_limit_holds_for_its_period(
    box: Box, me: Visit, hand: Clock, period: str, told: str, renewed: str | None
) -> None:
    key, _ = made(me, credit_limit="6", credit_period=period)
    assert f"6 credits {told}" in me.open(BILLING).item("mine").text
    assert [echo(box, key) for _ in range(3)] == [200, 200, 403]
    if renewed is None:
        hand.forward(days=300)
        assert echo(box, key) == 403
    else:
        hand.now = clock.parse_rfc3339(renewed) - 1
        assert echo(box, key) == 403
        hand.forward(ms=1)
        assert echo(box, key) == 200


def test_limits_of_one_and_none_are_limits_too(box: Box, me: Visit) -> None:
    key, _ = made(me, "poor", credit_limit="0", credit_period="total")
    assert echo(box, key) == 403
    slow, slow_id = made(me, "slow", rate_limit="1", credit_limit="1", credit_period="week")
    told = me.open(BILLING).item("slow").text
    assert "1 credit a week · 1 request a minute" in told
    assert [box.sms(slow).status for _ in range(2)] == [200, 429]
    never, _ = made(me, "never", rate_limit="0")
    assert box.sms(never).status == 429
    form = me.open(f"{BILLING}/keys/{slow_id}")
    assert form.field("Credit limit").get("value") == "1"
    assert form.field("Requests a minute").get("value") == "1"


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        ({"name": "x" * 101}, "A name has 1 to 100 printable characters."),
        ({"name": "   "}, "A name is missing."),
        ({"expires": "2027-03-05"}, "The expiry lies in the past."),
        ({"expires": "2027-02-30"},
         "Expected a day such as 2027-01-31, or a time such as 2027-01-31T00:00:00Z."),
        ({"credit_limit": "-1"}, "“-1” is not a whole number from 0 up."),
        ({"credit_limit": "1.5"}, "“1.5” is not a whole number from 0 up."),
        ({"credit_limit": "many"}, "“many” is not a whole number from 0 up."),
        ({"credit_limit": "9999999999999999"}, "A credit limit is 0 to 10^15 credits."),
        ({"credit_limit": "5", "credit_period": "year"},
         "A period is one of total, day, week, month."),
        ({"rate_limit": "9999999999"}, "A rate limit is 0 to 10^9 requests a minute."),
        ({"scopes": ["NO!"], "restricted": "1"}, "'NO!' is not a scope."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_terms_are_told_and_shown_again_as_typed(
    me: Visit, terms: dict[str, Any], told: str
) -> None:
    typed = {
        "name": "typed", "expires": "2027-09-01", "credit_limit": "7", "credit_period": "week",
        "rate_limit": "8", "restricted": "1", "scopes": ["sms:send"],
    } | terms  # fmt: skip
    key_id = made(me, "known")[1]
    for path, button in ((BILLING, "Create key"), (f"{BILLING}/keys/{key_id}", "Save")):
        page = me.press(path, button, status=400, typed=typed)
        assert page.alert() == told
        form = _form(page, button)
        shown = form.fields()
        for name in ("name", "expires", "credit_limit", "rate_limit"):
            assert shown[name] == typed[name], name
        assert form.one("input", name="restricted").is_checked
        if "scopes" not in terms:
            assert form.one("input", name="scopes").is_checked
        is_day = typed["expires"] != "2027-02-30"
        assert form.one("input", name="expires").get("type") == ("date" if is_day else "text")
        if "credit_period" not in terms:
            assert shown["credit_period"] == "week"
        if path == BILLING:
            assert "open" in form.one("details").attributes
    assert newest(me)["name"] == "known"


def _form(page: Page, button: str) -> Any:
    (found,) = [node for node in page.main.all("button") if node.name == button]
    return found.around("form")


def test_what_was_not_ticked_stays_so_when_the_form_is_shown_again(me: Visit) -> None:
    key_id = made(me, restricted="1", scopes=["sms:send"])[1]
    page = me.press(
        f"{BILLING}/keys/{key_id}", "Save", status=400,
        restricted=None, scopes=None, rate_limit="x",
    )  # fmt: skip
    form = _form(page, "Save")
    assert not form.one("input", name="restricted").is_checked
    assert not form.one("input", name="scopes").is_checked


def test_terms_that_are_not_touched_stay_to_the_millisecond(
    box: Box, me: Visit, hand: Clock
) -> None:
    account, at = account_of(box, me.email), clock.parse_rfc3339("2027-03-05T18:30:15.678Z")
    _, key_id = box.key(  # scopes in an order of their own
        account, name="exact", expires_at=at, scopes=["sms:send", "gone:scope"], rate_limit=0,
        credit_limit=0, credit_period="day",
    )  # fmt: skip
    before = box.row("SELECT * FROM api_key WHERE id = :id", id=key_id)
    known = len(audited(box, "id"))
    page = me.press(f"{BILLING}/keys/{key_id}", "Save")  # it ends later on this very day
    assert page.h1 == "Billing"
    assert box.row("SELECT * FROM api_key WHERE id = :id", id=key_id) == before
    assert len(audited(box, "id")) == known  # nothing was changed
    me.press(f"{BILLING}/keys/{key_id}", "Save", name="renamed")
    assert box.row("SELECT name, expires_at FROM api_key WHERE id = :id", id=key_id) == (
        "renamed", at,
    )  # fmt: skip
    assert audited(box, "action", "detail")[-1] == ("key.changed", '{"changed": ["name"]}')
    me.press(f"{BILLING}/keys/{key_id}", "Save", expires="")
    assert box.row("SELECT expires_at FROM api_key WHERE id = :id", id=key_id) == (None,)
    me.press(f"{BILLING}/keys/{key_id}", "Save", expires="2027-04-01", credit_limit="")
    found = box.row("SELECT expires_at, credit_limit, credit_period FROM api_key WHERE id = :id",
                    id=key_id)  # fmt: skip
    assert found == (clock.parse_rfc3339("2027-04-01T00:00:00Z"), None, None)


def test_changed_terms_hold_for_the_very_next_call(box: Box, me: Visit) -> None:
    key, key_id = made(me)
    assert echo(box, key) == 200
    page = me.press(f"{BILLING}/keys/{key_id}", "Save", restricted="1")
    assert page.done() == ["Changed mine."]
    assert echo(box, key) == 403
    me.press(f"{BILLING}/keys/{key_id}", "Save", restricted=None)
    assert echo(box, key) == 200


def test_a_key_is_suspended_resumed_and_revoked_once_it_was_asked_for(box: Box, me: Visit) -> None:
    key, key_id = made(me)
    page = me.press(BILLING, "Suspend")
    assert (page.h1, page.link("Leave it")) == ("Suspend mine?", BILLING)
    assert echo(box, key) == 200
    page = me.press(page, "Suspend", reason="left on a train")
    assert page.done() == ["Suspended mine."] and "left on a train" in page.item("mine").text
    refused = box.get("/api/v1/echo", key)
    assert (refused.code, refused.json()["reason"]) == ("key_suspended", "left on a train")
    page = me.press(page, "Resume")
    assert page.h1 == "Resume mine?" and echo(box, key) == 403
    assert me.press(page, "Resume").done() == ["Resumed mine."] and echo(box, key) == 200
    page = me.press(BILLING, "Revoke")
    assert page.h1 == "Revoke mine?" and echo(box, key) == 200
    page = me.press(page, "Revoke")
    assert page.done() == ["Revoked mine."] and echo(box, key) == 401
    assert page.buttons(page.item("mine")) == []
    one = me.open(f"{BILLING}/keys/{key_id}")
    assert "It is revoked, and stays so." in one.text and one.buttons(one.main) == []
    for verb, button in (("suspend", "Suspend"), ("resume", "Resume"), ("rotate", "Rotate")):
        page = me.press(f"{BILLING}/keys/{key_id}/{verb}", button, status=409)
        assert page.alert().startswith("The key is revoked")
    actions = [row[0] for row in audited(box, "action", "subject") if row[1] == key_id]
    assert actions == ["key.created", "key.suspended", "key.resumed", "key.revoked"]


def test_a_reason_that_is_too_long_is_shown_again(me: Visit) -> None:
    key_id = made(me)[1]
    page = me.press(f"{BILLING}/keys/{key_id}/suspend", "Suspend", status=400, reason="x" * 201)
    assert page.alert() == "A reason has 1 to 200 printable characters."
    assert page.field("Reason").get("value") == "x" * 201


@pytest.mark.parametrize(
    ("grace", "seconds"), [("0", 0), ("3600", 3600), ("86400", 86_400), ("604800", 604_800)]
)
def test_a_rotated_secret_goes_on_for_its_grace(
    box: Box, me: Visit, hand: Clock, grace: str, seconds: int
) -> None:
    old, key_id = made(me)
    form = me.open(f"{BILLING}/keys/{key_id}/rotate")
    options = [(o.get("value"), o.text) for o in form.field("The old secret stops").all("option")]
    assert options == [
        ("0", "at once"), ("3600", "in an hour"), ("86400", "in a day"), ("604800", "in a week"),
    ]  # fmt: skip
    page = me.press(form, "Rotate", grace_seconds=grace)
    new = page.taken("secret")
    assert page.h1 == "The new secret: mine" and echo(box, new) == 200
    if seconds:
        hand.forward(seconds=seconds, ms=-1)
        assert echo(box, old) == echo(box, new) == 200
        until = clock.rfc3339(hand.now + 1)[:16].replace("T", " ")
        assert f"The earlier secret works until {until} UTC." in page.text
        me = Visit.sign_in(box, me.email)
        told = f"its earlier secret works until {until} UTC"
        assert told in me.open(BILLING).item("mine").text
        hand.forward(ms=1)
        assert told not in me.open(BILLING).item("mine").text
    assert echo(box, old) == 401 and echo(box, new) == 200
    assert run(box, page.taken("curl"))[0] == 200


def test_bad_graces_are_refused(me: Visit) -> None:
    old, key_id = made(me)
    for grace in ("-1", "604801", "x", "9" * 16):
        page = me.press(
            f"{BILLING}/keys/{key_id}/rotate", "Rotate", status=400, grace_seconds=grace
        )
        assert page.status == 400
    assert echo(me.box, old) == 200


def test_keys_come_a_hundred_a_page_the_newest_first(box: Box) -> None:
    me = visitor(box)
    account = account_of(box, me.email)
    names = [f"k{at:03}" for at in range(201)]
    for name in names[:100]:
        box.key(account, name=name)
    assert not me.open(BILLING).has_link("Older keys")
    for name in names[100:]:
        box.key(account, name=name)
    found: list[str] = []
    page = me.open(BILLING)
    for _ in range(2):
        found += [item.all("strong")[0].text for item in page.items()]
        page = me.open(page.link("Older keys").partition("#")[0])
    found += [item.all("strong")[0].text for item in page.items()]
    assert found == names[::-1] and not page.has_link("Older keys")
    me.open(f"{BILLING}?before=x", 400)


def test_a_member_sees_and_changes_their_own_keys_alone(box: Box, me: Visit) -> None:
    guest, account = newcomer(box), account_of(box, me.email)
    join(box, account, me.email, guest)
    _, owners = made(me, "the owner's")
    them = Visit.sign_in(box, guest)
    them.press("/dashboard", "Switch", account=account)
    page = them.press(BILLING, "Create key", name="the guest's")
    assert echo(box, page.taken("secret")) == 200
    assert [item.all("strong")[0].text for item in them.open(BILLING).items()] == ["the guest's"]
    for verb in ("", "/revoke", "/suspend", "/rotate"):
        them.open(f"{BILLING}/keys/{owners}{verb}", 403)
    assert {item.all("strong")[0].text for item in me.open(BILLING).items()} == {
        "the owner's", "the guest's",
    }  # fmt: skip


# The session token.


def test_a_session_token_is_revealed_refreshed_and_revoked(
    box: Box, me: Visit, hand: Clock
) -> None:
    page = me.press(BILLING, "Reveal session token")
    first = page.taken("token")
    assert "Ends at 2027-03-05 13:00 UTC." in page.text
    assert page.main.one("div", id="token-card").get("data-left") == "3600000"
    assert box.get("/api/v1/keys", first).status == 200
    hand.forward(seconds=60)
    page = me.press(page, "Refresh")
    second = page.taken("token")
    assert second != first and "Ends at 2027-03-05 13:01 UTC." in page.text
    page = me.press(page, "Revoke this token")
    assert page.done() == ["That token has ended."]
    assert page.buttons(page.section("Session token · short-lived")) == ["Reveal session token"]
    assert [box.get("/api/v1/keys", token).status for token in (first, second)] == [200, 401]
    me.press(page, "Sign out")
    assert box.get("/api/v1/keys", first).status == 401


# Vouchers.


def test_a_code_becomes_credits_and_what_is_none_is_shown_again(box: Box, me: Visit) -> None:
    code = box.cli("vouchers", "add", "1").output.strip()
    page = me.press(BILLING, "Redeem", code=f" {code.lower()} ")
    assert page.done() == ["Added 1 credit."] and "101 credits" in page.section("Balance").text
    page = me.press(BILLING, "Redeem", status=404, code=code)
    assert page.alert() == "That code is not one of ours, or was used before."
    assert page.field("Voucher code").get("value") == code
    page = me.press(BILLING, "Redeem", status=400, code="  ")
    assert page.alert() == "The code is missing."
    code = box.cli("vouchers", "add", "1200").output.strip()
    assert me.press(BILLING, "Redeem", code=code).done() == ["Added 1,200 credits."]


# The ledger and its months.


def entries_told(page: Page) -> list[list[str]]:
    return page.table("When")


def as_row(entry: dict[str, Any], sign: str = "−") -> list[str]:
    amount = f"{entry['amount']:+,}".replace("-", sign)
    if entry["amount"] < 0:
        amount = amount.replace("+", "")
    what = WORDS[entry["kind"]] + (f" {entry['note']}" if entry["note"] else "")
    if entry["kind"] in ("capture", "refund"):
        what += " the call"
    when = entry["created_at"][:16].replace("T", " ") + " UTC"
    return [when, what, amount, f"{entry['balance']:,}".replace("-", sign)]


def test_the_ledger_is_the_apis_a_page_at_a_time(box: Box) -> None:
    me = visitor(box, credits=5000)
    key, _ = box.key(account_of(box, me.email), rate_limit=10**6)
    for _ in range(99):
        echo(box, key)
    page = me.open(f"{BILLING}/ledger")
    assert len(entries_told(page)) == 100 and not page.has_link("Older")
    for _ in range(101):
        echo(box, key)
    box.grant(account_of(box, me.email), -1)
    calls = me.api("/api/v1/usage")
    assert box.cli("credits", "refund", calls[3]["request_id"], "--note", "a mishap").exit_code == 0
    expected = [as_row(entry) for entry in me.api("/api/v1/ledger")]
    assert len(expected) == 203
    found, page = [], me.open(f"{BILLING}/ledger")
    while True:
        found += entries_told(page)
        if not page.has_link("Older"):
            break
        page = me.open(page.link("Older"))
    assert found == expected
    assert entries_told(me.open(BILLING)) == expected[:20]
    assert me.open(f"{BILLING}/ledger?before=1").text.endswith("No entries here.")
    call = next(a for a in me.open(f"{BILLING}/ledger").main.all("a") if a.text == "the call")
    assert me.open(call.get("href")).h1 == "Charged 3 credits"


MONTHS = {
    "2026-12": 31, "2027-01": 31, "2027-02": 28, "2028-02": 29, "2028-03": 31,
}  # fmt: skip
MOMENTS = [
    "2026-11-30T23:59:59.999Z", "2026-12-01T00:00:00Z", "2026-12-31T23:59:59.999Z",
    "2027-01-01T00:00:00Z", "2027-01-31T23:59:59.999Z", "2027-02-01T00:00:00Z",
    "2027-02-28T23:59:59.999Z", "2027-03-01T00:00:00Z", "2028-02-28T12:00:00Z",
    "2028-02-29T00:00:00Z", "2028-02-29T23:59:59.999Z", "2028-03-01T00:00:00Z",
    # The clock has stepped back: what comes now is entered after what is dated later.
    "2028-02-29T23:00:00Z", "2027-02-28T23:00:00Z", "2028-03-02T00:00:00Z",
]  # fmt: skip


@pytest.fixture(scope="module")
def years(box: Box, hand: Clock) -> Visit:
    """Who did something of each kind at the edges of months."""
    hand.set(MOMENTS[0])
    email = newcomer(box)
    account = account_of(box, email)
    key, _ = box.key(account)
    for at, moment in enumerate(MOMENTS):
        hand.set(moment)
        box.grant(account, 50 + at)
        echo(box, key)
        box.sms(key, text="y" * 200)
        assert box.get("/api/v1/echo?status=503", key).status == 502
        box.grant(account, -at - 1)
        (call,) = box.row(
            "SELECT id FROM call WHERE account_id = :a AND captured = 2"
            " ORDER BY number DESC LIMIT 1",
            a=account,
        )
        box.write(lambda tx, call=call: ledger.refund(tx, call, "=HYPERLINK(1)", hand.now))
    hand.set(MOMENTS[-1])
    return Visit.sign_in(box, email)


def test_a_month_opens_with_what_the_last_one_closed_with(
    box: Box, hand: Clock, years: Visit
) -> None:
    hand.set(MOMENTS[-1])
    me = Visit.sign_in(box, years.email)
    entries = me.api("/api/v1/ledger")
    month, seen, closing = "2028-03", [], None
    while True:
        page = me.open(f"{BILLING}/statement?month={month}")
        facts = page.facts()
        here = [entry for entry in entries if entry["created_at"][:7] == month]
        before = sum(entry["amount"] for entry in entries if entry["created_at"][:7] < month)
        assert number(facts.pop("Opening balance")) == before
        ends = number(facts.pop("Closing balance"))
        assert ends == before + sum(entry["amount"] for entry in here)
        if closing is not None:
            assert ends == closing
        closing = before
        kinds = Counter(entry["kind"] for entry in here)
        sums = {
            kind: sum(entry["amount"] for entry in here if entry["kind"] == kind) for kind in kinds
        }
        assert facts == {
            WORDS[kind]: f"{kinds[kind]} × {amount:+,}".replace("-", "−")
            for kind, amount in sums.items()
        }
        assert ("Nothing came or went." in page.text) is (not here)
        assert ("so far" in page.text) is (month == "2028-03")
        assert page.has_link("Month after") is (month != "2028-03")
        oldest_first = list(reversed(here))
        if sums.keys() - {"capture"}:
            assert page.table("Day")[: len(oldest_first)] == [
                [
                    entry["created_at"][:10],
                    WORDS[entry["kind"]] + (f" {entry['note']}" if entry["note"] else ""),
                    f"{entry['amount']:+,}".replace("-", "−"),
                ]
                for entry in oldest_first
                if entry["kind"] != "capture"
            ]
        by_day = Counter(e["created_at"][:10] for e in here if e["kind"] == "capture")
        if by_day:
            rows = _last_table(page)
            assert rows == [
                [day, str(count), str(-5 * (count // 2)).replace("-", "−")]
                for day, count in sorted(by_day.items())
            ]
        # In full, as a file.
        file = me.sheet(f"{BILLING}/statement.csv?month={month}")
        assert file == [
            {
                name: _cell(value) for name, value in entry.items()
            }
            for entry in here
        ]  # fmt: skip
        seen.append(month)
        if not page.has_link("Month before"):
            break
        earlier = query_of(page.link("Month before"))["month"]
        assert query_of(me.open(page.link("Month before")).link("Month after"))["month"] == month
        month = earlier
    assert len(seen) == 17 and seen[-1] == "2026-11"  # none before the first entry


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"'{value}" if str(value).startswith("=") else str(value)


def _last_table(page: Page) -> list[list[str]]:
    return [[cell.text for cell in row.all("td")] for row in page.main.all("tbody")[-1].all("tr")]


@pytest.mark.parametrize(
    "month",
    ["2027-13", "2027-00", "2027-1", "27-01", "x", "1969-12", "2027-01-01", "%EF%BC%92027-01"],
)
def test_what_is_no_month_is_refused(me: Visit, month: str) -> None:
    for path in ("statement", "statement.csv"):
        page = me.open(f"{BILLING}/{path}?month={month}", 400)
        assert page.h1 == "A month looks like 2026-11."


@pytest.mark.parametrize("month", ["1970-01", "9999-12", "2027-04", ""])
def test_a_month_of_nothing_is_empty(box: Box, hand: Clock, month: str) -> None:
    me = visitor(box)
    page = me.open(f"{BILLING}/statement?month={month}")
    assert "Nothing came or went." in page.text
    assert page.facts() == {"Opening balance": "0", "Closing balance": "0"}
    assert me.sheet(f"{BILLING}/statement.csv?month={month}") == []
    assert not page.has_link("Month before")


def test_a_statement_of_more_than_a_page_says_that_the_file_has_all(
    box: Box, hand: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = visitor(box)
    account = account_of(box, me.email)
    for _ in range(9):
        box.grant(account, 1)
    monkeypatch.setattr("blueprints.billing._PER_BATCH", 4)
    page = me.open(f"{BILLING}/statement")
    assert len(page.table("Day")) == 4 and "the CSV has all" in page.text
    assert [row["balance"] for row in me.sheet(f"{BILLING}/statement.csv")] == [
        str(n) for n in range(9, 0, -1)
    ]
