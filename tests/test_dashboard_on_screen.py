"""The dashboard as people use it: in a browser, on gunicorn, at desktop and phone width, and
without scripts. And every page of it, looked at with axe-core, by keyboard, in light and dark."""

from __future__ import annotations

import base64
import json
import re
from urllib.parse import urlsplit

import pytest
from browser import PASSWORD
from conftest import StartFarebox
from playwright.sync_api import Page, expect
from screen import NARROW, WIDE, OpenScreen, Screen, look
from server import Farebox, until

from core import clock

OWNER, GUEST = "owner@example.com", "guest@example.com"
KINDS = [
    pytest.param({"width": WIDE}, id="desktop"),
    pytest.param({"width": NARROW, "scheme": "dark"}, id="phone"),
    pytest.param({"width": WIDE, "scripts": False}, id="no scripts"),
]


def setup_link(box: Farebox) -> str:
    found = re.search(r"/setup\?token=[\w-]+", box.log())
    assert found is not None, box.log()
    return found[0]


def button(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def row(page: Page, text: str) -> Page:
    found: Page = page.locator("li", has_text=text)  # type: ignore[assignment]  # a part of it
    return found


def tile(page: Page, name: str) -> str:
    """The number of a tile, without what stands below it."""
    shown = page.locator(".tile", has=page.get_by_text(name, exact=True)).locator("dd")
    return shown.inner_text().split()[0]


def claims(token: str) -> dict[str, object]:
    part = token.split(".")[1]
    found: dict[str, object] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


def taken(screen: Screen, what: str) -> str:
    """A secret of the page, as a person takes it away: with *Copy* where there are scripts."""
    shown = screen.page.locator(f"#{what}")
    if screen.scripts:
        screen.context.grant_permissions(["clipboard-read", "clipboard-write"])
        beside = screen.page.locator(f'[data-copy="{what}"]')
        beside.click()
        expect(beside).to_have_text("Copied")
        copied: str = screen.page.evaluate("() => navigator.clipboard.readText()")
        assert copied == shown.text_content()
        return copied
    assert screen.page.get_by_role("button", name="Copy").count() == 0
    return shown.inner_text()


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_set_up_link_to_a_key_that_pays_until_it_is_revoked(
    start_farebox: StartFarebox, open_screen: OpenScreen, kind: dict[str, object]
) -> None:
    box = start_farebox(workers=2)
    screen = open_screen(box, **kind)
    page = screen.open(setup_link(box))
    page.get_by_label("Email").fill(OWNER)
    page.get_by_label("Password").fill(PASSWORD)
    screen.press("Create the first user")
    assert urlsplit(page.url).path == "/dashboard"
    expect(page.get_by_role("heading", name="First steps")).to_be_visible()

    page.get_by_role("link", name="Billing").click()
    for heading in (
        "Balance", "Add credits", "API Keys · permanent bearer", "Session token · short-lived",
        "Ledger",
    ):  # fmt: skip
        expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
    button(page, "Quick: Cursor / agent key")
    expect(page.get_by_text("gone for good")).to_be_visible()
    key = taken(screen, "secret")
    assert page.locator("#export").inner_text() == f"export FAREBOX_API_KEY={key}"
    page.get_by_role("link", name="Overview").click()
    assert key not in page.content()

    assert box.sms(key).status == 200
    if screen.scripts:  # the page sees it arrive by itself
        expect(page.get_by_role("heading", name="First steps")).to_have_count(0)
    else:
        screen.open("/dashboard")
    assert (tile(page, "Balance"), tile(page, "Spent today")) == ("99", "1")

    page.get_by_role("link", name="Usage").click()
    call = page.get_by_role("row", name="POST /api/v1/sms/send")
    expect(call).to_contain_text("Cursor / agent")
    expect(call).to_contain_text("charged")
    call.get_by_role("link").click()
    expect(page.get_by_role("heading", name="Charged 1 credit")).to_be_visible()

    screen.open("/dashboard/billing")
    row(page, "Cursor / agent").get_by_role("button", name="Suspend").click()
    button(page, "Suspend")
    expect(page.get_by_role("status").first).to_have_text("Suspended Cursor / agent.")
    assert (box.sms(key).status, box.sms(key).code) == (403, "key_suspended")
    row(page, "Cursor / agent").get_by_role("button", name="Resume").click()
    button(page, "Resume")
    expect(page.get_by_role("status").first).to_have_text("Resumed Cursor / agent.")
    assert box.sms(key).status == 200

    row(page, "Cursor / agent").get_by_role("button", name="Rotate").click()
    page.get_by_label("The old secret stops").select_option("in an hour")
    button(page, "Rotate")
    newer = taken(screen, "secret")
    assert newer != key and [box.sms(each).status for each in (key, newer)] == [200, 200]

    screen.open("/dashboard/billing")
    row(page, "Cursor / agent").get_by_role("button", name="Revoke").click()
    assert box.sms(newer).status == 200  # it was only asked
    button(page, "Revoke")
    expect(page.get_by_role("status").first).to_have_text("Revoked Cursor / agent.")
    assert [box.sms(each).status for each in (key, newer)] == [401, 401]
    expect(row(page, "Cursor / agent")).to_contain_text("revoked")


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_token_is_revealed_refreshed_and_revoked(
    box: Farebox, open_screen: OpenScreen, kind: dict[str, object]
) -> None:
    screen = open_screen(box, **kind)
    screen.sign_in(OWNER)
    page = screen.open("/dashboard/billing")
    assert page.locator("#token").count() == 0
    screen.press("Reveal session token")
    first = taken(screen, "token")
    assert box.get("/api/v1/account", first).status == 200
    if screen.scripts:
        expect(page.locator("#token-left")).to_have_text(re.compile(r", (60:00|59:5\d) left"))
    screen.press("Refresh")
    second = taken(screen, "token")
    assert claims(second)["sid"] == claims(first)["sid"] and second != first
    assert box.get("/api/v1/keys", second).status == 200
    screen.press("Revoke this token")
    expect(page.get_by_role("status").first).to_have_text("That token has ended.")
    assert page.locator("#token").count() == 0
    assert box.get("/api/v1/account", second).code == "invalid_token"
    assert box.get("/api/v1/account", first).status == 200  # only the one that was shown


def test_an_open_page_renews_its_token_with_the_token(
    box: Farebox, open_screen: OpenScreen
) -> None:
    screen = open_screen(box, fresh=True)
    screen.context.clock.install()
    screen.sign_in(OWNER)
    page = screen.open("/dashboard/billing")
    screen.press("Reveal session token")
    first = page.locator("#token").inner_text()
    asked = []
    page.on("request", lambda request: asked.append(request))
    screen.context.clock.fast_forward(54 * 60 * 1000)
    page.wait_for_timeout(300)
    assert asked == []
    screen.context.clock.fast_forward(70 * 1000)
    until(lambda: page.wait_for_timeout(50) or page.locator("#token").inner_text() != first)
    (renewal,) = asked
    assert renewal.headers["authorization"] == f"Bearer {first}"
    assert "cookie" not in renewal.all_headers()
    second = page.locator("#token").inner_text()
    assert page.locator("#token-id").input_value() == claims(second)["jti"]
    assert box.get("/api/v1/account", second).status == 200
    screen.press("Revoke this token")
    assert box.get("/api/v1/account", second).status == 401


def test_a_page_says_so_when_its_token_can_be_renewed_no_more(
    box: Farebox, open_screen: OpenScreen
) -> None:
    screen = open_screen(box, fresh=True)
    screen.context.clock.install()
    screen.sign_in(OWNER)
    page = screen.open("/dashboard/billing")
    screen.press("Reveal session token")
    box.set_up("users", "sign-out", OWNER)
    with screen.expecting(401):
        screen.context.clock.fast_forward(56 * 60 * 1000)
        expect(page.locator("#token-news")).to_contain_text("It has ended")
    expect(page.locator("#token-left")).to_have_text(", ended")


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_is_invited_spends_and_is_stopped_by_the_operator(
    box: Farebox, open_screen: OpenScreen, kind: dict[str, object]
) -> None:
    guest_email = f"guest-{kind.get('width')}-{kind.get('scripts', True)}@example.com".lower()
    owner, guest = open_screen(box, **kind), open_screen(box, **kind)
    owner.sign_in(OWNER)
    page = owner.open("/dashboard/settings")
    page.get_by_label("Email").fill(guest_email)
    page.get_by_label("Credit limit").fill("3")
    page.get_by_label("Per", exact=True).select_option("day")
    owner.press("Invite")
    link = taken(owner, "invite")

    theirs = guest.open(link.removeprefix(box.url))
    theirs.get_by_label("Password").fill(PASSWORD)
    guest.press("Join")
    guest.open("/dashboard/billing")
    options = theirs.locator("#switch option").all_inner_texts()
    shared = next(text for text in options if text.startswith(OWNER))  # the balance follows
    theirs.get_by_label("Account", exact=True).select_option(label=shared)
    guest.press("Switch")
    guest.press("Quick: Cursor / agent key")
    key = taken(guest, "secret")
    assert [box.sms(key).status for _ in range(4)] == [200, 200, 200, 403]
    guest.open("/dashboard/settings")
    assert theirs.get_by_role("button", name="Invite").count() == 0
    guest.open("/admin", 403)

    page = owner.open("/dashboard")
    expect(page.get_by_role("row", name=guest_email)).to_contain_text("3 credits, 3 calls")
    owner.open("/admin/keys")
    row(page, guest_email).get_by_role("button", name="Suspend").click()
    page.get_by_label("Reason").fill("too loud")
    button(page, "Suspend")
    expect(row(page, guest_email)).to_contain_text("too loud")
    refused = box.sms(key)
    assert (refused.code, refused.json()["reason"]) == ("key_suspended", "too loud")

    # Only the operator resumes what the operator suspended; the account's member may not.
    guest.open("/dashboard/billing")
    row(theirs, "too loud").get_by_role("button", name="Resume").click()
    guest.press("Resume", 403)
    expect(theirs.get_by_role("alert")).to_contain_text("operator suspended this key")

    owner.open("/dashboard/settings")
    row(page, guest_email).get_by_role("button", name="Remove").click()
    button(page, "Remove")
    expect(page.get_by_role("status").first).to_have_text(f"Removed {guest_email}.")
    assert box.sms(key).status == 401
    guest.open("/dashboard/billing")
    assert theirs.locator("#switch").count() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_grants_and_suspends_and_somebody_redeems_a_voucher(
    box: Farebox, open_screen: OpenScreen, kind: dict[str, object]
) -> None:
    email, key = box.account(5)
    box.set_up("users", "add", f"x{email}")
    link = box.set_up("users", "reset-link", email)
    operator, person = open_screen(box, **kind), open_screen(box, **kind)
    theirs = person.open(link.removeprefix(box.url))
    theirs.get_by_label("Password").fill(PASSWORD)
    person.press("Set password")
    assert tile(theirs, "Balance") == "5"

    page = operator.sign_in(OWNER)
    operator.open("/admin")
    page.get_by_label("E-mail, wallet or account").fill(email)
    button(page, "Search")
    found = page.get_by_role("listitem").filter(
        has=page.get_by_role("link", name=email, exact=True)
    )
    found.get_by_role("button", name="Grant").click()
    page.get_by_label("Credits").fill("1,000")
    page.get_by_label("Note").fill("for trying")
    operator.press("Grant")
    assert tile(page, "Balance") == "1,005"

    operator.open("/admin/vouchers")
    page.get_by_label("Credits each").fill("50")
    operator.press("Make vouchers")
    code = taken(operator, "codes")
    person.open("/dashboard/billing")
    theirs.get_by_label("Voucher code").fill(code.lower())
    person.press("Redeem")
    expect(theirs.get_by_role("status").first).to_have_text("Added 50 credits.")
    expect(theirs.get_by_role("row", name="for trying")).to_contain_text("+1,000")
    theirs.get_by_label("Voucher code").fill(code)
    person.press("Redeem", 404)
    expect(theirs.get_by_role("alert")).to_contain_text("used before")

    operator.open(f"/admin?q={email}")
    found.get_by_role("button", name="Suspend").click()
    page.get_by_label("Reason").fill("unpaid")
    operator.press("Suspend")
    assert (box.sms(key).status, box.sms(key).json()["reason"]) == (403, "unpaid")
    person.open("/dashboard")
    expect(theirs.get_by_role("alert")).to_contain_text("This account is suspended: unpaid")
    operator.press("Resume")
    operator.press("Resume")
    assert box.sms(key).status == 200


# Every page


@pytest.fixture(scope="module")
def box(start_farebox: StartFarebox) -> Farebox:
    """An instance with people, keys in every state, and calls that were and were not charged."""
    box = start_farebox(workers=2)
    box.set_up("users", "add", OWNER, "--operator", "--password-stdin", stdin=PASSWORD)
    box.set_up("credits", "grant", OWNER, "5000", "--note", "to begin with")
    box.set_up("vouchers", "add", "20", "--count", "2", "--note", "from the fair")
    keys = [
        box.set_up("keys", "add", OWNER, "--name", name) for name in ("cron", "a" * 100, "gone")
    ]
    limited = ("--scope", "sms:send", "--credit-limit", "9", "--period", "day", "--rate", "60")
    box.set_up("keys", "add", OWNER, "--name", "narrow", "--expires", _soon(), *limited)
    for key in keys:
        assert box.sms(key).status == 200
    assert box.sms(keys[0], to="+15005550500").status == 502
    ids = {line.split()[-1]: line.split()[0] for line in box.set_up("keys", "list").splitlines()}
    box.set_up("keys", "suspend", ids["a" * 100], "--reason", "looked at")
    box.set_up("keys", "revoke", ids["gone"])
    return box


def _soon() -> str:
    return clock.rfc3339(clock.now_ms() + 3 * clock.DAY_MS)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"width": WIDE}, id="desktop, light"),
        pytest.param({"width": NARROW, "scheme": "dark"}, id="phone, dark"),
    ],
)
def test_every_page_can_be_read_and_reached_by_anybody(
    box: Farebox, open_screen: OpenScreen, kind: dict[str, object]
) -> None:
    screen = open_screen(box, **kind)
    page = screen.sign_in(OWNER)
    token = json.loads(
        page.request.post(
            "/api/v1/session-tokens",
            headers={"X-CSRF-Token": page.locator("[name=csrf_token]").first.input_value()},
        ).text()
    )["token"]
    account = box.get("/api/v1/account", token).json()["account"]
    (key, *_) = [k for k in box.get("/api/v1/keys", token).json()["data"] if k["name"] == "cron"]
    call = box.get("/api/v1/usage", token).json()["data"][0]["request_id"]
    member = box.get("/api/v1/members", token).json()["data"][0]["id"]
    at = f"/dashboard/billing/keys/{key['id']}"
    for path in [
        "/dashboard", "/dashboard/billing", "/dashboard/billing/ledger",
        "/dashboard/billing/statement", at, f"{at}/revoke", f"{at}/suspend", f"{at}/rotate",
        f"{at}/regenerate", "/dashboard/usage", "/dashboard/usage?status=voided",
        "/dashboard/usage?from=2020-01-01&to=2020-12-31", f"/dashboard/usage/{call}",
        "/dashboard/settings", f"/dashboard/settings/members/{member}",
        f"/dashboard/settings/members/{member}/remove", "/admin", f"/admin/accounts/{account}",
        f"/admin/accounts/{account}/grant", f"/admin/accounts/{account}/adjust",
        f"/admin/accounts/{account}/suspend", f"/admin/accounts/{account}/refund", "/admin/keys",
        f"/admin/keys/{key['id']}/revoke", "/admin/vouchers", "/admin/prices", "/admin/calls",
        "/admin/audit", "/admin/health",
    ]:  # fmt: skip
        look(screen, path)
    look(screen, "/dashboard/usage?from=yesterday", 400)
    look(screen, "/dashboard/usage/req_unknown", 404)
    # What is only an answer to a form.
    for path, press, status in [
        ("/dashboard/billing", "Quick: Cursor / agent key", 200),
        ("/dashboard/billing", "Reveal session token", 200),
        ("/dashboard/settings", "Change password", 400),
        ("/admin/vouchers", "Make vouchers", 200),
        ("/admin/health", "Check now", 200),
    ]:
        screen.open(path)
        if press == "Change password":
            page.get_by_label("Current password").fill("not this one")
            page.get_by_label("New password").fill("something else entirely")
        if press == "Make vouchers":
            page.get_by_label("Credits each").fill("5")
        screen.press(press, status)
        screen.picture()
        assert screen.sticking_out() == []
        assert screen.violations() == []


def test_a_bar_of_a_picture_tells_its_number_when_it_has_the_focus(
    box: Farebox, open_screen: OpenScreen
) -> None:
    screen = open_screen(box)
    page = screen.sign_in(OWNER)
    bar = page.locator(".bars a").last
    words = bar.locator(".tip")
    expect(words).to_have_css("opacity", "0")
    bar.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")  # as a person comes there
    expect(words).to_have_css("opacity", "1")
    assert re.search(r": \d+ credits, \d+ calls$", words.inner_text())
    page.mouse.move(0, 0)
    page.locator("h1").click()
    expect(words).to_have_css("opacity", "0")
    bar.hover()
    expect(words).to_have_css("opacity", "1")
    with screen.leads():
        bar.click()
    assert urlsplit(page.url).path == "/dashboard/usage"


@pytest.mark.parametrize("scripts", [True, False])
def test_a_key_is_made_and_revoked_by_keyboard_alone(
    box: Farebox, open_screen: OpenScreen, scripts: bool
) -> None:
    screen = open_screen(box, scripts=scripts)
    screen.sign_in(OWNER)
    page, keys = screen.open("/dashboard/billing"), screen.page.keyboard
    name = f"typed {scripts}"
    screen.tab_to('[name="name"]')
    keys.type(name)
    screen.tab_to("summary")
    keys.press("Enter")
    screen.tab_to('[name="credit_limit"]')
    keys.type("2")
    screen.tab_to("button:has-text('Create key')")
    with screen.leads():
        keys.press("Enter")
    key = page.locator("#secret").inner_text()
    assert [box.sms(key).status for _ in range(3)] == [200, 200, 403]
    screen.open("/dashboard/billing")
    screen.tab_to(f"li:has-text('{name}') button:has-text('Revoke')")
    with screen.leads():
        keys.press("Enter")
    screen.tab_to("button:has-text('Revoke')")
    with screen.leads():
        keys.press("Enter")
    assert box.sms(key).status == 401


def test_a_statement_prints_without_what_is_for_the_screen(
    box: Farebox, open_screen: OpenScreen
) -> None:
    screen = open_screen(box, fresh=True)
    screen.sign_in(OWNER)
    page = screen.open("/dashboard/billing/statement")
    page.emulate_media(media="print")
    for hidden in ("header", "nav", "a.button"):
        assert not any(each.is_visible() for each in page.locator(hidden).all()), hidden
    expect(page.get_by_role("row", name="Closing balance")).to_be_visible()
    assert screen.sticking_out() == []
    screen.picture()
