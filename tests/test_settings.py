"""Settings: a password, an API key, who else is in the account, and where one is signed in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import PASSWORD, Browser
from html_pages import Page, Visit, account_of, cheaply, join, newcomer, user_of, visitor
from inprocess import Box, Clock
from people import CONFIG, audited

SETTINGS = "/dashboard/settings"
OTHER = "another-long-enough-pass-phrase"
NOW = "2027-03-05T12:00:00Z"
LIMIT = 5  # wrong passwords a minute
ECHO = "/api/v1/echo"


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
    with Box(
        tmp_path_factory.mktemp("settings") / "i",
        CONFIG + f"failed_auth_per_minute = {LIMIT}\n",
    ) as box:
        yield box


@pytest.fixture
def me(box: Box) -> Visit:
    return visitor(box, credits=100)


def change(me: Visit, current: str, new: str, status: int = 200) -> Page:
    typed = {"current": current, "password": new}
    return me.press(SETTINGS, "Change password", status=status, typed=typed)


def is_signed_in(me: Visit) -> bool:
    return me.open("/dashboard").h1 == "Overview"


# What the page has.


def test_headings_and_buttons_are_called_as_agreed(box: Box, me: Visit) -> None:
    box_key = me.press("/dashboard/billing", "Quick: Cursor / agent key").taken("secret")
    page = me.open(SETTINGS)
    assert page.headings() == [
        "Settings", "Profile", "Password", "API key", "Wallets", "Link a wallet", "Members",
        "Invite somebody", "Where you are signed in",
    ]  # fmt: skip
    assert page.buttons(page.section("API key")) == ["Regenerate"]
    assert page.buttons(page.section("Members")) == ["Change", "Invite"]
    assert page.facts() == {
        "Email": me.email,
        "User": user_of(box, me.email),
        "Account": f"{account_of(box, me.email)} · owner",
    }
    assert box_key not in page.answer.body.decode()
    operator = visitor(box, "--operator").open(SETTINGS)
    assert operator.facts()["User"].endswith("· runs this instance")


# The password.


def test_a_new_password_signs_every_other_browser_out(box: Box, me: Visit) -> None:
    other = Visit.sign_in(box, me.email)
    token, mine = other.browser.token(), me.browser.token()
    page = change(me, PASSWORD, OTHER)
    assert page.done() == ["The password is changed. Every other browser is signed out."]
    assert is_signed_in(me) and not is_signed_in(other)
    assert [box.get("/api/v1/account", t).status for t in (token, mine)] == [401, 401]
    assert Browser(box).sign_in(me.email, PASSWORD).status == 401
    assert is_signed_in(Visit.sign_in(box, me.email, OTHER))


@pytest.mark.parametrize(
    ("current", "new", "told"),
    [
        (OTHER, OTHER, "The current password is wrong."),
        ("", OTHER, "The current password is wrong."),
        (PASSWORD, "short", "A password has 12 to 128 characters."),
        (PASSWORD, "", "A password has 12 to 128 characters."),
        (PASSWORD, "x" * 129, "A password has 12 to 128 characters."),
        (PASSWORD, "password1234", "That password is too easy to guess."),
    ],
)
def test_a_password_that_is_refused_changes_nothing(
    box: Box, me: Visit, current: str, new: str, told: str
) -> None:
    other = Visit.sign_in(box, me.email)
    page = change(me, current, new, status=400)
    assert page.alert() == told
    field = "Current password" if "current" in told else "New password"
    assert page.field(field).get("aria-invalid") == "true"
    for typed in (current, new):
        assert len(typed) < 8 or typed not in page.answer.body.decode()
    assert is_signed_in(me) and is_signed_in(other)
    assert Browser(box, client="10.9.9.9").sign_in(me.email, PASSWORD).status == 303


def test_an_own_e_mail_is_no_password(me: Visit) -> None:
    page = change(me, PASSWORD, f"{me.email}-and-more", status=400)
    assert page.alert() == "That password is too easy to guess."


def test_guessing_the_current_password_is_throttled(box: Box, hand: Clock) -> None:
    me = visitor(box)  # signing in was the first attempt
    for _ in range(LIMIT - 1):
        assert change(me, "a wrong guess at it", OTHER, status=400).alert()
    page = change(me, PASSWORD, OTHER, status=429)
    assert page.alert() == "Too many attempts. Wait a minute."
    assert page.answer.headers["Retry-After"] == "60"
    hand.forward(seconds=60)
    assert change(me, PASSWORD, OTHER).done()


def test_who_has_no_password_sets_one(box: Box) -> None:
    email = newcomer(box, password=None)
    link = box.cli("users", "reset-link", email).output.strip()
    token = link.partition("?token=")[2]
    browser = Browser(box, client="10.9.9.8")
    assert browser.submit(f"/reset?token={token}", password=PASSWORD).status == 303
    box.run("UPDATE user SET password_hash = NULL WHERE email = :e", e=email)
    me = Visit(box, email, browser)
    page = me.open(SETTINGS)
    assert not any(node.text == "Current password" for node in page.main.all("label"))
    page = me.press(page, "Set password", password="short", status=400)
    assert page.alert().startswith("A password has")
    page = me.press(page, "Set password", password=OTHER)
    assert page.done() and "Change password" in page.buttons()
    assert is_signed_in(me) and is_signed_in(Visit.sign_in(box, email, OTHER))


# The API key.


def test_a_key_is_regenerated_without_grace_once_it_was_asked_for(box: Box, me: Visit) -> None:
    page = me.open(SETTINGS)
    assert "You have no key here that works." in page.section("API key").text
    old = me.press("/dashboard/billing", "Create key", name="first").taken("secret")
    newer = me.press("/dashboard/billing", "Create key", name="second").taken("secret")
    page = me.open(SETTINGS)
    assert page.section("API key").text.startswith("API key second ")
    page = me.press(page, "Regenerate")
    assert page.h1 == "Regenerate second?" and box.get(ECHO, newer).status == 200
    page = me.press(page, "Regenerate")
    assert page.h1 == "The new secret: second"
    assert "The earlier secret" not in page.text
    fresh = page.taken("secret")
    assert [box.get(ECHO, key).status for key in (old, newer, fresh)] == [200, 401, 200]
    me.press(me.press("/dashboard/billing", "Revoke", me.open("/dashboard/billing").item("second")),
             "Revoke")  # fmt: skip
    assert me.open(SETTINGS).section("API key").text.startswith("API key first ")


# Members.


def invite(me: Visit, email: str, **terms: Any) -> str:
    page = me.press(SETTINGS, "Invite", email=email, **terms)
    assert page.h1 == f"Invited {email}" and "it was not mailed" in page.notices()[0]
    link = page.taken("invite")
    assert link.startswith(f"{me.box.settings.public_url}/invite?token=")
    return link.removeprefix(me.box.settings.public_url)


def test_somebody_is_invited_joins_spends_up_to_their_limit_and_is_removed(
    box: Box, me: Visit, hand: Clock
) -> None:
    account = account_of(box, me.email)
    guest = "guest-of-settings@example.com"
    link = invite(me, guest, credit_limit="6", credit_period="week")
    page = me.open(SETTINGS)
    row = page.item(guest)
    assert row.text.startswith(f"{guest} invited member · 6 credits a week")
    assert page.buttons(row) == ["Change", "Remove"]

    browser = Browser(box, client="10.9.9.7")
    assert browser.submit(link, email=guest, password=PASSWORD).status == 303
    them = Visit(box, guest, browser)
    assert them.open(link, 404)
    page = them.press("/dashboard", "Switch", account=account)
    assert page.h1 == "Overview" and page.tiles()["Balance"].startswith("100 credits")
    page = them.open(SETTINGS)
    assert "Who may spend the credits of" in page.text and me.email in page.text
    assert page.buttons(page.section("Members")) == ["Leave"]
    key = them.press("/dashboard/billing", "Quick: Cursor / agent key").taken("secret")
    token = them.browser.token(account)
    assert [box.get(ECHO, key).status, box.get(ECHO, token).status] == [200, 200]
    assert [box.get(ECHO, who).code for who in (key, token)] == ["credit_limit_reached"] * 2
    # The owner gives them more.
    page = me.press(SETTINGS, "Change", me.open(SETTINGS).item(guest))
    form = page.main.one("form", class_="card").fields()
    assert (form["role"], form["credit_limit"], form["credit_period"]) == ("member", "6", "week")
    page = me.press(page, "Save", credit_limit="-3", status=400)
    assert page.alert() == "“-3” is not a whole number from 0 up."
    assert page.field("Credit limit").get("value") == "-3"
    page = me.press(page, "Save", credit_limit="9")
    assert page.done() == [f"Changed {guest}."] and "9 credits a week" in page.item(guest).text
    assert box.get(ECHO, key).status == 200
    assert box.get(ECHO, key).status == 403
    me.press(me.press(SETTINGS, "Change", me.open(SETTINGS).item(guest)), "Save", credit_limit="")
    assert box.get(ECHO, key).status == 200
    # And removes them.
    page = me.press(SETTINGS, "Remove", me.open(SETTINGS).item(guest))
    assert page.h1 == f"Remove {guest}?" and box.get(ECHO, key).status == 200
    page = me.press(page, "Remove")
    assert page.done() == [f"Removed {guest}."] and guest not in page.section("Members").text
    assert [box.get(ECHO, who).status for who in (key, token)] == [401, 401]
    assert them.open("/dashboard").tiles()["Balance"].startswith("0 credits")
    by_me = [
        action
        for action, actor in audited(box, "action", "actor")
        if actor == user_of(box, me.email) and action.startswith("member.")
    ]
    assert by_me == ["member.invited", "member.changed", "member.changed", "member.removed"]


def test_an_invitation_is_taken_back(box: Box, me: Visit) -> None:
    link = invite(me, "never@example.com")
    page = me.press(SETTINGS, "Remove", me.open(SETTINGS).item("never@example.com"))
    assert "The link of the invitation stops working." in page.text
    assert me.press(page, "Remove").done() == ["Removed never@example.com."]
    assert Browser(box).get(link).status == 404


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ({"email": "no address"}, None),
        ({"email": " "}, "The e-mail is missing."),
        ({"credit_limit": "x"}, "“x” is not a whole number from 0 up."),
        (
            {"credit_limit": "3", "credit_period": "year"},
            "A period is one of total, day, week, month.",
        ),
        ({"role": "king"}, "A role is one of owner, member."),
    ],
)
def test_a_bad_invitation_is_told_and_shown_again(
    me: Visit, typed: dict[str, str], told: str | None
) -> None:
    asked = {"email": "a@example.com", "credit_limit": "7", "credit_period": "day",
             "role": "owner"} | typed  # fmt: skip
    page = me.press(SETTINGS, "Invite", status=400, typed=asked)
    assert page.alert() == (told or "That is not an e-mail address.")
    (button,) = [node for node in page.main.all("button") if node.name == "Invite"]
    shown = button.around("form").fields()
    for name in ("email", "credit_limit"):
        assert shown[name] == asked[name]
    if "credit_period" not in typed:
        assert shown["credit_period"] == "day"
    if "role" not in typed:
        assert shown["role"] == "owner"


def test_nobody_is_invited_twice(box: Box, me: Visit) -> None:
    page = me.press(SETTINGS, "Invite", status=409, email=me.email)
    assert page.alert() == f"{me.email} is a member already."


def test_who_leaves_is_told_so_and_sees_their_own_account_again(box: Box, me: Visit) -> None:
    account, second = account_of(box, me.email), visitor(box, credits=7)
    join(box, account, me.email, second.email, role="owner")
    second.press("/dashboard", "Switch", account=account)
    page = second.open(SETTINGS)
    assert page.buttons(page.item(second.email)) == ["Change", "Leave"]
    assert page.buttons(page.item(me.email)) == ["Change", "Remove"]
    asked = second.press(page, "Leave")
    assert asked.h1 == f"Leave {me.email}’s account?" and "The keys you made" in asked.text
    page = second.press(asked, "Leave")
    assert page.done() == ["You have left that account."]
    assert page.facts()["Account"].startswith(account_of(box, second.email))
    assert second.open("/dashboard").tiles()["Balance"].startswith("7 credits")


def test_whose_account_it_is_stays_its_owner(box: Box, me: Visit) -> None:
    account, second = account_of(box, me.email), visitor(box)
    join(box, account, me.email, second.email, role="owner")
    second.press("/dashboard", "Switch", account=account)
    row = second.open(SETTINGS).item(me.email)
    page = second.press(second.press(SETTINGS, "Remove", row), "Remove", status=409)
    assert page.alert() == "The person whose account this is cannot leave it."
    page = second.press(second.press(SETTINGS, "Change", row), "Save", status=409, role="member")
    assert page.alert() == "The person whose account this is stays its owner."
    mine = me.open(SETTINGS)
    assert mine.buttons(mine.item(me.email)) == ["Change"]  # they cannot leave it


def test_a_member_manages_nobody(box: Box, me: Visit) -> None:
    account, guest = account_of(box, me.email), visitor(box)
    member_id = join(box, account, me.email, guest.email)
    guest.press("/dashboard", "Switch", account=account)
    page = guest.open(SETTINGS)
    assert "Invite" not in page.buttons()
    (owners,) = box.row("SELECT id FROM membership WHERE user_id = :u", u=user_of(box, me.email))
    for path in (f"members/{owners}/remove", f"members/{member_id}", "members/mem_none"):
        assert guest.browser.get(f"{SETTINGS}/{path}").status == 403, path
    assert guest.browser.get(f"{SETTINGS}/members/mem_none/remove").status == 404
    assert guest.browser.get(f"{SETTINGS}/members/{member_id}/remove").status == 200


# Where one is signed in.


def test_a_person_sees_where_they_are_signed_in_and_ends_one(box: Box, me: Visit) -> None:
    other = Visit.sign_in(box, me.email)
    page = me.open(SETTINGS)
    rows = page.items(page.section("Where you are signed in"))
    assert len(rows) == 2 and sum("this browser" in row.text for row in rows) == 1
    (theirs,) = [row for row in rows if "this browser" not in row.text]
    assert "password" in theirs.text and "TestBrowser/1.0" in theirs.text
    (button,) = theirs.all("button")
    page = me.press(page, button.name, theirs)
    assert len(page.items(page.section("Where you are signed in"))) == 1
    assert is_signed_in(me) and not is_signed_in(other)
    assert me.press(page, "Sign out everywhere").h1 == "Sign in"
    assert not is_signed_in(me)
