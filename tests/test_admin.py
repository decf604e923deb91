"""The operator's pages: what they show is so, what they do is in the books and in the audit log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from doubles import Upstream, refused_port
from html_pages import (
    Page,
    Visit,
    account_of,
    begin,
    cheaply,
    join,
    newcomer,
    number,
    user_of,
    visitor,
)
from inprocess import Box, Clock
from people import CONFIG, audited
from server import OPERATOR_KEY

from core import clock

NOW = "2027-03-05T12:00:00Z"
DAY_MS = clock.DAY_MS
ECHO, SMS = "/api/v1/echo", "/api/v1/sms/send"
ROUTES = """
[[routes]]
path = "/api/v1/both"
methods = ["GET"]
upstream = "sandbox"
credits = 1
cost_usd = "0.0200005"

[[routes]]
path = "/api/v1/both"
methods = ["POST"]
upstream = "sandbox"
credits = 4
"""


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
    with Box(tmp_path_factory.mktemp("admin") / "i", CONFIG + ROUTES) as box:
        yield box


@pytest.fixture(scope="module")
def boss(box: Box, hand: Clock) -> Visit:
    hand.set(NOW)
    return visitor(box, "--operator")


@pytest.fixture
def fresh(tmp_path: Path, hand: Clock) -> Iterator[Box]:
    """An instance of this test's own."""
    with Box(tmp_path / "fresh", CONFIG + ROUTES) as box:
        yield box


def customer(box: Box, credits: int = 100, **terms: Any) -> tuple[str, str, str]:
    """E-mail, account and key of a new user."""
    email = newcomer(box, credits=credits)
    account = account_of(box, email)
    return email, account, box.key(account, **terms)[0]


def ledger_of(box: Box, account: str) -> list[tuple[Any, ...]]:
    with box.instance.db.reading() as tx:
        return tx.rows(
            "SELECT kind, amount, balance, note FROM entry WHERE account_id = :a"
            " ORDER BY number DESC",
            {"a": account},
        )


def last_audited(box: Box) -> tuple[Any, ...]:
    return audited(box, "action", "actor", "account_id", "detail")[-1]


def asked(boss: Visit, account: str, button: str) -> Page:
    return boss.press(f"/admin/accounts/{account}", button)


# Credits.


def test_credits_are_granted_with_a_note(box: Box, boss: Visit) -> None:
    email, account, _ = customer(box, 5)
    page = boss.press(f"/admin?q={email}", "Grant")
    assert page.h1 == "Grant credits" and f"{email} · {account} · 5 credits" in page.text
    page = boss.press(page, "Grant", credits="1,000", note="for March")
    assert page.done() == ["Granted 1,000 credits."]
    assert page.tiles()["Balance"] == "1,005 credits · $10.05"
    assert ledger_of(box, account)[0] == ("grant", 1000, 1005, "for March")
    assert last_audited(box) == (
        "credits.grant", user_of(box, boss.email), account, '{"amount": 1000, "note": "for March"}',
    )  # fmt: skip
    rows = page.table("When")
    assert rows[0][1:] == ["Grant for March", "+1,000", "1,005"]


@pytest.mark.parametrize("typed", ["0", "-5", "", "x", "1.5", "9" * 16, "1e3"])
def test_what_cannot_be_granted_is_told(box: Box, boss: Visit, typed: str) -> None:
    _, account, _ = customer(box, 5)
    page = boss.press(f"/admin/accounts/{account}/grant", "Grant", status=400, credits=typed)
    assert page.alert() and page.field("Credits").get("value") == typed
    assert len(ledger_of(box, account)) == 1


def test_a_balance_is_corrected_with_a_reason(box: Box, boss: Visit) -> None:
    _, account, _ = customer(box, 10)
    begin(box, account, ECHO, 3)
    page = boss.press(asked(boss, account, "Adjust"), "Adjust", credits="-7", note="typing error")
    assert page.done() == ["Adjusted by −7 credits."]
    assert ledger_of(box, account)[0] == ("adjustment", -7, 3, "typing error")
    assert last_audited(box)[:3] == ("credits.adjustment", user_of(box, boss.email), account)
    page = boss.press(asked(boss, account, "Adjust"), "Adjust", status=402, credits="-1", note="x")
    assert page.alert() == "1 credit cannot be taken away: 0 are available."
    assert page.field("Reason").get("value") == "x"
    page = boss.press(asked(boss, account, "Adjust"), "Adjust", status=400, credits="5", note=" ")
    assert page.alert() == "A reason is missing."
    page = boss.press(asked(boss, account, "Adjust"), "Adjust", status=400, credits="x", note="y")
    assert page.alert() == "“x” is not a whole number."
    # A minus as our own pages write it is one.
    page = boss.press(asked(boss, account, "Adjust"), "Adjust", credits="+9", note="back")
    page = boss.press(asked(boss, account, "Adjust"), "Adjust", credits="−2", note="copied")
    assert ledger_of(box, account)[0][:3] == ("adjustment", -2, 10)


def test_a_call_is_refunded_once_and_to_its_own_account(box: Box, boss: Visit) -> None:
    _, account, key = customer(box)
    _, other, _ = customer(box)
    request_id = box.get(ECHO, key).request_id
    page = boss.press(
        f"/admin/accounts/{other}/refund", "Refund", status=404, request_id=request_id
    )
    assert page.alert() == "This account has no such call."
    page = boss.press(
        asked(boss, account, "Refund a call"), "Refund", request_id=f" {request_id} ", note="sorry"
    )
    assert page.done() == ["Refunded 3 credits."]
    assert ledger_of(box, account)[0] == ("refund", 3, 100, "sorry")
    assert last_audited(box)[:3] == ("credits.refund", user_of(box, boss.email), account)
    again = asked(boss, account, "Refund a call")
    page = boss.press(again, "Refund", status=409, request_id=request_id)
    assert page.alert() == "This call was refunded before."
    assert page.field("Request id").get("value") == request_id
    free = box.get(f"{ECHO}?status=404", key).request_id
    page = boss.press(again, "Refund", status=409, request_id=free)
    assert page.alert() == "Nothing was captured for this call."
    for _ in range(2):
        box.get(ECHO, key, X_Request_Id="twice")
    page = boss.press(again, "Refund", status=409, request_id="twice")
    assert page.alert() == "Several calls have that id."


# Standing.


def test_an_account_is_suspended_and_resumed(box: Box, boss: Visit) -> None:
    email, account, key = customer(box)
    page = boss.press(asked(boss, account, "Suspend"), "Suspend", reason="unpaid")
    assert page.done() == ["Suspended."] and "suspended: unpaid" in page.text
    assert page.h1 == f"{email} suspended"
    refused = box.get(ECHO, key)
    assert (refused.code, refused.json()["reason"]) == ("account_suspended", "unpaid")
    assert last_audited(box) == (
        "account.suspended", user_of(box, boss.email), account, '{"reason": "unpaid"}',
    )  # fmt: skip
    row = boss.open(f"/admin?q={account}").item(email)
    assert "unpaid" in row.text and boss.open("/admin").buttons(row) == ["Grant", "Resume"]
    boss.press(boss.press(f"/admin?q={account}", "Resume"), "Resume")
    assert box.get(ECHO, key).status == 200
    page = boss.press(f"/admin/accounts/{account}/resume", "Resume", status=409)
    assert page.alert() == "The account is active."
    assert last_audited(box)[:3] == ("account.resumed", user_of(box, boss.email), account)


def test_a_key_the_operator_suspended_only_the_operator_resumes(box: Box, boss: Visit) -> None:
    email, account, _ = customer(box)
    them = Visit.sign_in(box, email)
    key = them.press("/dashboard/billing", "Create key", name=f"of {email}").taken("secret")
    page = boss.open(f"/admin/keys?q=of {email}")
    assert f"{email} · {account}" in page.text
    page = boss.press(boss.press(page, "Suspend"), "Suspend", reason="abuse")
    assert page.done() == [f"Suspended of {email}."]
    assert box.get(ECHO, key).json()["reason"] == "abuse"
    row = them.open("/dashboard/billing").item(f"of {email}")
    assert "abuse" in row.text
    page = them.press(them.press("/dashboard/billing", "Resume", row), "Resume", status=403)
    assert page.alert() == "The operator suspended this key."
    assert box.get(ECHO, key).status == 403
    page = boss.press(boss.press(f"/admin/keys?q=of {email}", "Resume"), "Resume")
    assert page.done() == [f"Resumed of {email}."] and box.get(ECHO, key).status == 200
    # What its owner suspended the operator may suspend too, and resume.
    them.press(
        them.press("/dashboard/billing", "Suspend", row_of(them, f"of {email}")), "Suspend",
        reason="mine",
    )  # fmt: skip
    assert "mine, by its account" in boss.open(f"/admin/keys?q=of {email}").text
    boss.press(boss.press(f"/admin/keys?q=of {email}", "Resume"), "Resume")
    boss.press(boss.press(f"/admin/keys?q=of {email}", "Revoke"), "Revoke")
    assert box.get(ECHO, key).status == 401
    actors = [r[1] for r in audited(box, "action", "actor") if r[0] == "key.revoked"]
    assert actors[-1] == user_of(box, boss.email)


def row_of(who: Visit, words: str) -> Any:
    return who.open("/dashboard/billing").item(words)


# Finding.


def test_accounts_are_found_by_what_is_typed_and_nothing_else(fresh: Box) -> None:
    boss = visitor(fresh, "--operator")
    emails = ["a_b@example.com", "axb@example.com", "a%b@example.com", "a!b@example.com"]
    for email in emails:
        assert fresh.cli("users", "add", email).exit_code == 0

    def found(text: str) -> list[str]:
        page = boss.press("/admin", "Search", q=text)
        assert page.field("E-mail, wallet or account").get("value") == text.strip()
        return sorted(item.all("strong")[0].text for item in page.items())

    assert found("") == sorted([*emails, boss.email])
    assert found("a_b") == ["a_b@example.com"]
    assert found("A%B") == ["a%b@example.com"]
    assert found("a!b") == ["a!b@example.com"]
    assert found("%") == ["a%b@example.com"] and found("_") == ["a_b@example.com"]
    assert found(" axb@ ") == ["axb@example.com"]
    assert found(account_of(fresh, emails[1])) == [emails[1]]
    assert found(user_of(fresh, emails[1])) == [emails[1]]
    assert found("acct_") == []
    assert "No such account." in boss.open("/admin?q=nobody").text


@pytest.mark.parametrize("count", [49, 50, 51, 101])
def test_accounts_made_in_one_moment_come_once_each(fresh: Box, count: int) -> None:
    boss = visitor(fresh, "--operator")
    for at in range(count - 1):
        fresh.payer(0, name=f"key {at}")
    expected = {row[0] for row in fresh.instance.db.rows("SELECT id FROM account")}
    for path, name in (("/admin", "code"), ("/admin/keys", "code")):
        found: list[str] = []
        page, sizes = boss.open(path), []
        while True:
            items = page.items()
            sizes.append(len(items))
            found += [
                node.text for item in items for node in item.all(name)
                if node.text.startswith("acct_")
            ]  # fmt: skip
            if not page.has_link("Older"):
                break
            page = boss.open(page.link("Older"))
        total = count if path == "/admin" else count - 1
        assert sizes[:-1] == [50] * (len(sizes) - 1) and len(sizes) == -(-total // 50)
        assert len(found) == len(set(found)) == total and set(found) <= expected


def test_keys_are_found_by_what_is_typed(box: Box, boss: Visit) -> None:
    _, account, _ = customer(box)
    for name in ("50%_off", "50x_off", "50%xoff"):
        box.key(account, name=name)
    (key_id, start) = box.row("SELECT id, start FROM api_key WHERE name = '50%_off'")

    def found(text: str) -> list[str]:
        page = boss.press("/admin/keys", "Search", q=text)
        return [item.all("strong")[0].text for item in page.items()]

    assert found("50%_") == found(key_id) == found(start) == ["50%_off"]
    assert len(found(account)) == 4
    assert "No such key." in boss.open("/admin/keys?q=nothing").text


@pytest.mark.parametrize("path", ["/admin", "/admin/keys", "/admin/vouchers", "/admin/audit"])
def test_what_is_no_place_in_a_list_is_refused(boss: Visit, path: str) -> None:
    for place in ("x", "1.x", ".", "9" * 16):
        assert boss.open(f"{path}?before={place}", 400).h1 == "That is not a place in this list."


# Sums.


def test_the_tiles_are_the_sums_of_all_accounts(fresh: Box, hand: Clock) -> None:
    hand.now -= 30 * DAY_MS
    early, _, key = customer(fresh, 50)
    fresh.get(ECHO, key)  # thirty-one days ago, counting today
    hand.forward(days=1)
    fresh.get(ECHO, key)
    hand.set(NOW)
    email, second, other = customer(fresh, 70)
    fresh.sms(other, text="z" * 200)
    begin(fresh, second, ECHO, 3)
    fresh.get(ECHO, OPERATOR_KEY)
    begin(fresh, "acct_operator", ECHO, 3, payer="operator", held=0)
    boss = visitor(fresh, "--operator")
    page = boss.open("/admin")
    assert page.tiles() == {
        "Accounts": "3", "Credits out": "112 $1.12", "In flight": "2 3 set aside",
        "Spent, 30 days": "5 $0.05",
    }  # fmt: skip
    assert "65 credits 3 set aside · 2 in 30 days" in page.item(email).text
    assert "44 credits 0 set aside · 3 in 30 days" in page.item(early).text
    one = boss.open(f"/admin/accounts/{second}")
    assert one.tiles() == {
        "Balance": "65 credits · $0.65", "Set aside": "3 in 1 call", "Spent, 30 days": "2",
    }  # fmt: skip


def test_margins_are_exact(fresh: Box, hand: Clock) -> None:
    _, _, key = customer(fresh, 1000)
    hand.now -= 30 * DAY_MS
    fresh.get("/api/v1/both", key)  # too long ago to count
    hand.set(NOW)
    for at in range(7):
        fresh.sms(key, text="z" * (1 + 200 * (at % 2)))
        fresh.get("/api/v1/both", key)
    fresh.sms(key, to="+15005550500")
    fresh.post("/api/v1/both", key)
    fresh.get(ECHO, key)
    fresh.get("/api/v1/both", OPERATOR_KEY)
    boss = visitor(fresh, "--operator")
    calls = [
        dict(zip(("route", "status", "captured", "cost"), row, strict=True))
        for row in fresh.instance.db.rows(
            "SELECT route, status, captured, cost_usd FROM call WHERE created_at > :t",
            {"t": hand.now - 29 * DAY_MS},
        )
    ]
    sums: dict[str, list[Any]] = defaultdict(lambda: [0, 0, 0, Decimal(0)])
    for call in calls:
        sums[call["route"]][0] += 1
        sums[call["route"]][1] += call["status"] == "voided"
        sums[call["route"]][2] += call["captured"]
        sums[call["route"]][3] += Decimal(call["cost"] or 0)
    rows = {row[0].split()[0]: row for row in boss.open("/admin/prices").table("Route")}
    assert set(rows) == {ECHO, SMS, "/api/v1/both"}
    for path, row in rows.items():
        count, failed, captured, cost = sums[path]
        earned = Decimal("0.01") * captured
        assert row[3:5] == [str(count), str(failed)]
        assert row[5] == f"${earned:.2f} {captured} cr"
        assert row[6] == f"${_places(cost)}"
        margin = earned - cost
        assert row[7] == (f"−${_places(-margin)}" if margin < 0 else f"${_places(margin)}")
    assert rows["/api/v1/both"][7].startswith("−$")
    assert rows[SMS][1:3] == ["1 per SMS segment $0.01", "$0.0079 each"]
    assert rows[ECHO][1:3] == ["3 per call $0.03", "not known"]
    # Two routes of one path have two prices.
    both = rows["/api/v1/both"]
    assert both[1] == "1 per call $0.01 4 per call $0.04"
    assert both[2] == "$0.0200005 each more than the price not known"
    assert both[0] == "/api/v1/both GET · sandbox POST · sandbox"


def _places(amount: Decimal) -> str:
    text = f"{amount:,.4f}"
    return text[:-2] if text.endswith("00") else text


def test_a_route_that_is_gone_keeps_its_sums(tmp_path: Path, hand: Clock) -> None:
    with Box(tmp_path / "i", CONFIG + ROUTES) as box:
        _, _, key = customer(box)
        box.post("/api/v1/both", key)
        boss = newcomer(box, "--operator")
    (tmp_path / "i" / "farebox.toml").write_text(CONFIG)
    with Box(tmp_path / "i") as box:
        row = Visit.sign_in(box, boss).open("/admin/prices").table("Route")[-1]
        assert row == [
            "/api/v1/both not served any more", "–", "not known", "1", "0", "$0.04 4 cr", "$0.00",
            "$0.04",
        ]  # fmt: skip


# What goes on.


def test_calls_in_flight_are_listed_with_their_age(fresh: Box, hand: Clock) -> None:
    boss = visitor(fresh, "--operator")
    assert "None. A call is here" in boss.open("/admin/calls").text
    _, account, _ = customer(fresh)
    started = hand.now
    call_id = begin(fresh, account, ECHO, 3)
    theirs = begin(fresh, "acct_operator", SMS, 1, payer="operator", held=0, at=started + 65_000)
    hand.now = started + 125_999
    page = boss.open("/admin/calls")
    assert page.text.startswith("Accounts Keys")
    assert "2 at this moment, with 3 credits set aside." in page.text
    assert page.table("For") == [
        ["125 s", f"{ECHO} {call_id}", account, "api key", "3"],
        ["60 s", f"{SMS} {theirs}", "–", "operator", "0"],
    ]
    assert "/admin/health" in boss.crawl("/admin/calls")
    hand.now = started - 5_000  # the clock has stepped back
    assert [row[0] for row in boss.open("/admin/calls").table("For")] == ["0 s", "0 s"]


def test_the_audit_log_says_who_did_what_where(box: Box, boss: Visit) -> None:
    _, account, _ = customer(box)
    boss.press(asked(boss, account, "Grant"), "Grant", credits="7", note="a=b & c")
    page = boss.open(f"/admin/accounts/{account}")
    page = boss.open(page.link("Who did what here"))
    rows = page.table("When")
    assert (
        rows[0][1].startswith(boss.email) and rows[0][2] == "credits.grant amount: 7, note: a=b & c"
    )
    with box.instance.db.reading() as tx:
        ((count,),) = tx.rows("SELECT COUNT(*) FROM audit WHERE account_id = :a", {"a": account})
    assert len(rows) == count
    for row, known in zip(
        rows, reversed([r for r in audited(box, "action", "account_id") if r[1] == account]),
        strict=True,
    ):  # fmt: skip
        assert row[2].split()[0] == known[0]
    seen, page = 0, boss.open("/admin/audit")
    while True:
        seen += len(page.table("When"))
        if not page.has_link("Older"):
            break
        page = boss.open(page.link("Older"))
    assert seen == len(audited(box, "id"))


def test_health_counts_since_yesterday_and_looks_when_asked(
    tmp_path: Path, hand: Clock, upstream: Upstream
) -> None:
    def route(name: str, credits: int) -> str:
        return (
            f'[[routes]]\npath = "/api/v1/{name}/*"\nmethods = ["GET"]\nupstream = "{name}"\n'
            f'upstream_path = "/*"\ncredits = {credits}\n'
        )

    config = CONFIG + (
        f'\n[upstreams.up]\nkind = "http"\nbase_url = "{upstream.url}"\n'
        f'\n[upstreams.down]\nkind = "http"\nbase_url = "http://127.0.0.1:{refused_port()}"\n'
        f'\n[upstreams.idle]\nkind = "http"\nbase_url = "{upstream.url}"\n'
        f"\n{route('up', 1)}\n{route('down', 1)}"
    )
    with Box(tmp_path / "i", config) as box:
        boss = visitor(box, "--operator")
        _, account, key = customer(box)
        hand.now -= 2 * DAY_MS
        box.get("/api/v1/up/ok/x", key)  # the day before yesterday
        hand.set("2027-03-04T00:00:00Z")
        box.get("/api/v1/up/ok/x", key)
        hand.set(NOW)
        box.get("/api/v1/up/ok/x", key)
        box.get("/api/v1/up/status/500", key)
        assert box.get("/api/v1/down/x", key).status == 502
        box.get(ECHO, key)
        page = boss.open("/admin/health")
        told = {item.all("strong")[0].text: item.text for item in page.items()}
        assert list(told) == ["sandbox", "up", "down", "idle"]
        assert told["up"] == "up http /api/v1/up/* 2 of 3 served 1 failed"
        assert told["down"] == "down http /api/v1/down/* 0 of 1 served 1 failed"
        assert told["idle"] == "idle http no route uses it no calls"
        assert told["sandbox"].endswith("1 of 1 served")
        page = boss.press(page, "Check now")
        told = {item.all("strong")[0].text: item.text for item in page.items()}
        assert told["up"].endswith("reachable now") and told["idle"].endswith("reachable now")
        assert "reachable now" not in told["down"] and "connect" in told["down"].lower()
        assert told["sandbox"].endswith("answers by itself")
        # Something that is in flight has not failed.
        begin(box, account, "/api/v1/up/*", 1)
        assert "2 of 3 served" in boss.open("/admin/health").item("up http").text


# Vouchers.


def test_vouchers_are_made_shown_once_and_cancelled(box: Box, boss: Visit) -> None:
    page = boss.press("/admin/vouchers", "Make vouchers", credits="5", count="3", note="fair")
    codes = page.taken("codes").split("\n")
    assert len(set(codes)) == 3 and "Take them now." in page.notices()[0]
    items = boss.open("/admin/vouchers").items()
    assert [item.text.startswith("5 credits open fair") for item in items[:3]] == [True] * 3
    assert all(code not in boss.open("/admin/vouchers").answer.body.decode() for code in codes)
    email, account, _ = customer(box, 0)
    assert Visit.sign_in(box, email).press("/dashboard/billing", "Redeem", code=codes[0]).done()
    page = boss.open("/admin/vouchers")
    (used,) = [item for item in page.items() if "redeemed" in item.text and account in item.text]
    assert page.buttons(used) == []
    (left, *_) = [item for item in page.items() if "open fair" in item.text]
    page = boss.press(page, "Cancel", left)
    assert "worth nothing from now on" in page.main.text
    page = boss.press(page, "Cancel the voucher")
    assert page.done() and sum("cancelled fair" in item.text for item in page.items()) == 1
    for typed, told in (
        ({"credits": "0"}, "“0” is not a whole number from 1 up."),
        ({"credits": "5", "count": "1001"}, "1 to 1000 vouchers are made at once."),
        ({"credits": ""}, "How many credits?"),
    ):  # fmt: skip
        page = boss.press("/admin/vouchers", "Make vouchers", status=400, typed=typed)
        assert page.alert() == told
        assert page.field("Credits each").get("value") == typed["credits"]


# Around them.


def test_every_link_leads_to_a_page(fresh: Box) -> None:
    boss = visitor(fresh, "--operator")
    email, account, key = customer(fresh)
    fresh.get(ECHO, key)
    begin(fresh, account, ECHO, 3)
    begin(fresh, "acct_operator", ECHO, 3, payer="operator", held=0)
    boss.press("/admin/vouchers", "Make vouchers", credits="5")
    join(fresh, account, email, newcomer(fresh))
    boss.press(f"/admin/accounts/{account}/grant", "Grant", credits="5")
    seen = boss.crawl("/admin", most=20)
    for path in ("keys", "vouchers", "prices", "calls", "audit", "health"):
        assert f"/admin/{path}" in seen
    assert f"/admin/accounts/{account}/refund" in seen


def test_pages_of_an_empty_instance_teach(tmp_path: Path, hand: Clock) -> None:
    with Box(tmp_path / "i", "") as box:
        (tmp_path / "i" / "farebox.toml").write_text("")
    with Box(tmp_path / "i") as box:
        boss = visitor(box, "--operator")
        assert "This instance sells nothing yet." in boss.open("/admin/prices").text
        assert "There are none in farebox.toml." in boss.open("/admin/health").text
        assert "No keys yet." in boss.open("/admin/keys").text
        assert "None yet. A voucher is a code" in boss.open("/admin/vouchers").text
        assert "Check now" not in boss.open("/admin/health").buttons()


@pytest.mark.parametrize("path", ["accounts/acct_none", "accounts/acct_operator",
                                  "keys/key_none/revoke", "accounts/acct_none/grant"])  # fmt: skip
def test_what_is_not_there_is_a_page_of_its_own(boss: Visit, path: str) -> None:
    page = boss.open(f"/admin/{path}", 404)
    assert page.answer.request_id in page.text


def test_numbers_are_written_for_people(box: Box, boss: Visit) -> None:
    email, _, _ = customer(box, 1_234_567)
    assert "1,234,567 credits" in boss.open(f"/admin?q={email}").text
    assert number("1,234,567 credits") == 1_234_567
