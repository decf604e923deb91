"""Who may see and do what on the pages, and what the pages give away to whom."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from browser import Browser, hidden
from flask.sessions import SecureCookieSessionInterface
from forms import filled, rules
from inprocess import _CHEAP, Box, CheapSecret, Clock
from people import CONFIG, House, Person, cheaply, house, joined, person
from server import Answer

from core import clock, keys, ledger, members, passwords, sessions, users, vouchers
from core.audit import COMMAND_LINE, Actor
from core.keys import Terms

MARK = "<script>{0}()</script>\"'><img src=x onerror={0}()> javascript:{0}() {{{{7*7}}}}"
LABEL = '"><img src=x onerror=label()>{{7*7}}'
LIMITS = "requests_per_minute = 1000000\nfailed_auth_per_minute = 1000000"
ENVIRONMENT = f"""
[upstreams.remote]
kind = "http"
base_url = "http://127.0.0.1:9"

[[routes]]
path = "/api/v1/it's&quot"
methods = ["GET"]
upstream = "remote"
credits = 1

[oidc.home]
label = '''{LABEL}'''
server_metadata_url = "https://home.example.com/.well-known/openid-configuration"
client_id = "x"
client_secret = "a-secret-of-the-tests"
"""
TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
# What counts requests, and what writes down who did what.
ASIDE = ("rate_window", "audit")


@pytest.fixture(scope="module", autouse=True)
def cheap_hashes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passwords, "HASHER", _CHEAP)
        patch.setattr(passwords, "_NOBODYS", _CHEAP.hash("nobody's"))
        patch.setattr("blueprints.billing.NewSecret", CheapSecret)
        cheaply(patch)
        yield


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    config = CONFIG.replace("requests_per_minute = 1000000", LIMITS)
    with Box(tmp_path_factory.mktemp("instance"), config + ENVIRONMENT) as box:
        yield box


@pytest.fixture(scope="module")
def home(box: Box) -> House:
    return house(box)


@pytest.fixture(scope="module")
def operator(box: Box) -> Person:
    return person(box, operator=True)


# Words of these tests.


def at_browser(box: Box, who: Person, account: str | None = None, **options: Any) -> Browser:
    """A person at a browser of their own, looking at an account."""
    box.run("UPDATE user SET password_hash = :hash WHERE id = :id", hash=HASH, id=who.id)
    me = Browser(box, **options)
    assert me.sign_in(who.email, "a password").status == 303
    if account is not None:
        assert send(me, "/dashboard/account", account=account).status == 303
    return me


HASH = _CHEAP.hash("a password")


def send(me: Browser, path: str, **fields: str) -> Answer:
    """Post a form with this browser's form token."""
    page = me.get("/login") if "farebox" not in me.cookies else me.get("/dashboard")
    return me.post(path, hidden(me.follow(page), None) | fields)


def stored(box: Box, *aside: str) -> dict[str, list[tuple[Any, ...]]]:
    """All rows there are, but for those tables."""
    with box.instance.db.reading() as tx:
        names = tx.rows("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        return {
            name: sorted(tx.rows(f"SELECT * FROM {name}"), key=repr)
            for (name,) in names
            if name not in aside
        }


def changed(box: Box, work: Callable[[], Answer]) -> tuple[Answer, set[str]]:
    """The answer, and the tables that are not as they were, counts of requests aside."""
    before = stored(box, "rate_window")
    answer = work()
    after = stored(box, "rate_window")
    return answer, {name for name in after if after[name] != before[name]}


def pages_of_people(box: Box, method: str) -> list[str]:
    return [rule for rule in rules(box, method) if rule.startswith(("/dashboard", "/admin"))]


# Every page, every form, and everybody.

ROLES = ("nobody", "member", "second", "owner", "stranger", "operator")


def cast(box: Box, home: House, operator: Person) -> dict[str, Browser]:
    found = {"nobody": Browser(box), "operator": at_browser(box, operator)}
    for role in ("member", "second", "owner", "stranger"):
        account = None if role == "stranger" else home.account
        found[role] = at_browser(box, home[role], account)
    return found


def may_see(role: str, rule: str) -> int:
    """The status of a page about the owner's things."""
    if role == "nobody":
        return 303
    if rule.startswith("/admin"):
        return 200 if role == "operator" else 403
    if rule.endswith("/wallets/unlink"):
        return 200 if role == "owner" else 404
    is_inside = role in ("member", "second", "owner")
    if "<" in rule and not is_inside:
        return 404
    owners = "<key_id>" in rule or "<member_id>" in rule
    return 403 if owners and role == "member" else 200


def test_everybody_sees_what_is_theirs(box: Box, home: House, operator: Person) -> None:
    who = cast(box, home, operator)
    told = f"told to {home.account}"
    now = clock.now_ms()
    box.write(lambda tx: ledger.add_credits(tx, home.account, "grant", 9, told, told, now))
    key, key_id = box.key(home.account, name="name of a key of the house")
    assert box.get("/api/v1/echo", key, X_Request_Id="call-of-the-house").status == 200
    theirs = [
        home.account, home.owner.email, home.second.email, home.member.email, told, key_id,
        "name of a key of the house", "call-of-the-house", home.owner.id, home.member.id,
    ]  # fmt: skip
    for rule in pages_of_people(box, "GET"):
        path, _ = filled(box, rule, home.owner)
        for role in ROLES:
            answer = who[role].get(path)
            assert answer.status == may_see(role, rule), (role, path, answer.body)
            assert answer.headers["Cache-Control"] == "no-store"
            if role == "nobody":
                assert answer.headers["Location"] == f"/login?next={quote(path, safe='')}"
            if role in ("nobody", "stranger") or (role, rule[:6]) == ("operator", "/dashb"):
                text = answer.body.decode()
                assert [secret for secret in theirs if secret in text] == [], (role, path)
    # The rest of the query says nothing about whose account it is.
    for path in ("", "/usage", "/usage.csv", "/billing", "/billing/ledger", "/billing/statement"):
        for name, value in (("account", home.account), ("key", key_id), ("user", home.owner.id)):
            answer = who["stranger"].get(f"/dashboard{path}?{name}={value}")
            text = answer.body.decode().replace(value, "")
            assert answer.status == 200
            assert [secret for secret in theirs if secret in text] == []


THEIR_OWN = {"/dashboard/settings/password", "/dashboard/settings/sessions/end-all"}
ONLY_ITS_OWNERS = ("/sessions/<session_id>/end", "/identities/unlink")


def may_do(role: str, rule: str) -> tuple[int, bool]:
    """The status of a form about the owner's things, and whether it changes anything."""
    if role == "nobody":
        return 303, False
    if rule.startswith("/admin"):
        return (-1, rule != "/admin/health") if role == "operator" else (403, False)
    if rule.endswith("/session-token/revoke"):
        return 303, role == "owner"
    if rule.endswith(ONLY_ITS_OWNERS):
        return (303, True) if role == "owner" else (404, False)
    if role in ("stranger", "operator"):
        return 404, False
    if role == "member" and ("<key_id>" in rule or "/settings/members" in rule):
        return 403, False
    if role != "owner" and "/settings/wallets" in rule:
        return 403, False
    return -1, rule != "/dashboard/account"


@pytest.mark.parametrize("role", ROLES)
def test_everybody_does_what_they_may_and_nothing_else(
    box: Box, home: House, operator: Person, role: str
) -> None:
    me = cast(box, home, operator)[role]
    csrf = me.csrf("/login" if role == "nobody" else "/dashboard")
    tried = [rule for rule in pages_of_people(box, "POST") if rule not in THEIR_OWN]
    assert len(tried) > 25
    for rule in tried:
        path, fields = filled(box, rule, home.owner)
        fields["csrf_token"] = csrf
        if rule.startswith("/admin"):
            fields["account"] = operator.account
        answer, tables = changed(box, lambda p=path, f=fields: me.post(p, f))
        status, does = may_do(role, rule)
        expected = (200, 303) if status == -1 else (status,)
        assert answer.status in expected, (rule, answer.status, answer.body)
        assert bool(tables) is does, (rule, tables)
        if role == "nobody":
            assert answer.headers["Location"].startswith("/login")
        elif answer.status == 303:
            assert me.get(answer.headers["Location"]).status == 200
        if role == "stranger" and "<" in rule and not rule.startswith("/admin"):
            del fields["account"]  # with an id alone it is their own account that is meant
            answer, tables = changed(box, lambda p=path, f=fields: me.post(p, f))
            assert (answer.status, tables) == (404, set()), rule


def test_a_member_manages_their_own_keys(box: Box, home: House) -> None:
    me = at_browser(box, home.member, home.account)
    for rule in pages_of_people(box, "POST"):
        if "<key_id>" in rule and rule.startswith("/dashboard"):
            path, fields = filled(box, rule, home.member)
            assert me.get(path).status == 200
            answer, tables = changed(box, lambda p=path, f=fields: send(me, p, **f))
            assert answer.status in (200, 303), (rule, answer.body)
            assert tables == {"api_key", "audit"}, rule


def test_a_password_of_anothers_account_is_not_in_reach(box: Box, home: House) -> None:
    """These two forms act on who sends them, whatever account they name."""
    for rule in THEIR_OWN:
        me = at_browser(box, home.stranger)
        before = box.row("SELECT password_hash FROM user WHERE id = :id", id=home.owner.id)
        theirs = at_browser(box, home.owner)
        _, fields = filled(box, rule, home.owner)
        fields["current"] = "a password"
        assert send(me, rule, **fields).status == 303
        assert theirs.get("/dashboard").status == 200
        assert box.row("SELECT password_hash FROM user WHERE id = :id", id=home.owner.id) == (
            before if before[0] is None else (HASH,)
        )


# What happens between a page and its form's transaction.


class Meanwhile:
    """Has something happen just before each durable transaction of a request."""

    def __init__(self, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write = box.instance.db.write
        self.happens: Callable[[Any], object] | None = None
        monkeypatch.setattr(box.instance.db, "write", self.write)

    def write(self, work: Callable[[Any], Any], durable: bool = False) -> Any:
        if durable and self.happens is not None:
            happens, self.happens = self.happens, None
            self._write(happens)
        return self._write(work, durable=durable)


def signed_out(who: Person) -> Callable[[Any], object]:
    return lambda tx: sessions.end_all(tx, who.id, clock.now_ms(), COMMAND_LINE)


# They only end what is one's own.
HARMLESS = (
    "/sessions/<session_id>/end", "/sessions/end-all", "/session-token/revoke", "/account",
    "/admin/health",
)  # fmt: skip


@pytest.mark.parametrize("what", ["signed out", "demoted"])
def test_an_operator_is_asked_once_more_in_the_transaction(
    box: Box, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    meanwhile = Meanwhile(box, monkeypatch)
    for rule in pages_of_people(box, "POST"):
        if not rule.startswith("/admin") or rule in HARMLESS:
            continue
        who = person(box, operator=True)
        me = at_browser(box, who)
        path, fields = filled(box, rule, who)
        fields["csrf_token"] = me.csrf()
        before = stored(box, *ASIDE, "user", "session")
        if what == "signed out":
            meanwhile.happens = signed_out(who)
        else:
            meanwhile.happens = lambda tx, who=who: users.set_operator(
                tx, users.get(tx, who.id), False, clock.now_ms(), COMMAND_LINE
            )
        answer = me.post(path, fields)
        assert meanwhile.happens is None, rule
        assert answer.status == (401 if what == "signed out" else 403), (rule, answer.status)
        assert stored(box, *ASIDE, "user", "session") == before, rule
        assert b'class="tabs"' not in answer.body, f"{rule}: a page of operators"


@pytest.mark.parametrize("what", ["signed out", "removed", "suspended"])
def test_a_person_is_asked_once_more_in_the_transaction(
    box: Box, home: House, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    meanwhile = Meanwhile(box, monkeypatch)
    for rule in pages_of_people(box, "POST"):
        is_personal = not re.search("/billing/|/members", rule)
        if rule.startswith("/admin") or rule.endswith(HARMLESS):
            continue
        if is_personal and what != "signed out":
            continue
        if rule.endswith("/session-token") and what == "suspended":
            continue  # what it mints then is refused as long as that lasts
        who = joined(box, home.owner, role="owner")
        me = at_browser(box, who, home.account)
        path, fields = filled(box, rule, who)
        fields |= {"csrf_token": me.csrf(), "current": "a password"}
        aside: tuple[str, ...] = (*ASIDE, "user", "membership", "session_token", "api_key")
        if what == "removed":
            meanwhile.happens = lambda tx, who=who: members.remove(
                tx, members.get(tx, who.member_id, home.account), clock.now_ms(), COMMAND_LINE
            )
        elif what == "suspended":
            meanwhile.happens = lambda tx: ledger.suspend_account(
                tx, home.account, "unpaid", clock.now_ms(), COMMAND_LINE
            )
            aside = (*ASIDE, "account")
        else:
            meanwhile.happens = signed_out(who)
            aside = (*ASIDE, "session", "session_token")
        before = stored(box, *aside)
        passwords_before = box.row("SELECT password_hash FROM user WHERE id = :id", id=who.id)
        answer = me.post(path, fields)
        assert meanwhile.happens is None, rule
        if what == "suspended":
            box.write(
                lambda tx: ledger.resume_account(tx, home.account, clock.now_ms(), COMMAND_LINE)
            )
        expected = {"signed out": {401}, "removed": {401, 404}, "suspended": {403}}[what]
        assert answer.status in expected, (rule, answer.status, answer.body)
        assert stored(box, *aside) == before, rule
        assert box.row("SELECT password_hash FROM user WHERE id = :id", id=who.id) == (
            passwords_before
        )
        if what != "suspended":
            assert home.account not in answer.body.decode(), rule
            assert home.second.email not in answer.body.decode(), rule


def test_an_owner_who_is_made_a_member_meanwhile_does_nothing_of_owners(
    box: Box, home: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile = Meanwhile(box, monkeypatch)
    who = joined(box, home.owner, role="owner")
    me = at_browser(box, who, home.account)
    for rule in pages_of_people(box, "POST"):
        if rule.startswith("/admin") or not re.search("<key_id>|/members", rule):
            continue
        path, fields = filled(box, rule, home.owner)
        fields["csrf_token"] = me.csrf()
        before = stored(box, *ASIDE, "membership")

        def demote(tx: Any) -> None:
            member = members.get(tx, who.member_id, home.account)
            terms = members.Terms("member", None, None)
            members.change(tx, member, terms, clock.now_ms(), COMMAND_LINE)

        meanwhile.happens = demote
        answer = me.post(path, fields)
        assert (answer.status, meanwhile.happens) == (403, None), (rule, answer.body)
        assert stored(box, *ASIDE, "membership") == before, rule
        box.run("UPDATE membership SET role = 'owner' WHERE id = :id", id=who.member_id)


def test_an_operator_never_makes_what_cannot_be_shown(box: Box, operator: Person) -> None:
    """A form that names an account one has left, or a place in the list that is none: the codes
    would be lost."""
    me = at_browser(box, operator)
    for query, fields in (("", {"account": "acct_0"}), ("?before=x", {})):
        sent = {"credits": "5", "count": "1"} | fields
        answer, tables = changed(
            box,
            lambda q=query, s=sent: send(me, f"/admin/vouchers{q}", **s),
        )
        assert answer.status in (400, 404)
        assert tables == set()


# Whose account.


def account_shown(page: Answer) -> str:
    found = re.search(r'name="account" value="(acct_\w+)"', page.body.decode())
    assert found, page.body
    return found[1]


def test_nobody_chooses_the_account_of_another(box: Box, home: House, operator: Person) -> None:
    for who in (home.stranger, operator):
        me = at_browser(box, who)
        for account in (home.account, "acct_operator", "operator", "", "x" * 5000, "%00", "acct_0"):
            assert send(me, "/dashboard/account", account=account).status == 404
            assert account_shown(me.get("/dashboard/billing")) == who.account


def test_who_has_left_an_account_looks_at_their_own_again(box: Box, home: House) -> None:
    who = joined(box, home.owner)
    me = at_browser(box, who, home.account)
    assert account_shown(me.get("/dashboard/billing")) == home.account
    left = send(me, f"/dashboard/settings/members/{who.member_id}/remove", account=home.account)
    assert left.status == 303
    page = me.follow(left)
    with box.instance.db.reading() as tx:
        own = users.get(tx, who.id).account_id
    assert page.status == 200 and own in page.body.decode()
    assert (
        home.account not in page.body.decode() and b'action="/dashboard/account"' not in page.body
    )
    # A page that was open before still names the account that was left.
    made, tables = changed(
        box, lambda: send(me, "/dashboard/billing/keys/quick", account=home.account)
    )
    assert (made.status, tables) == (404, set())


def test_a_form_acts_on_the_account_its_page_was_about(box: Box, home: House) -> None:
    """Two tabs of one browser: a choice in one changes nothing for a page open in the other."""
    who = joined(box, home.owner, role="owner")
    me = at_browser(box, who, home.account)
    open_before = {
        path: hidden(me.get("/dashboard/billing"), path)
        for path in ("/dashboard/billing/keys", "/dashboard/billing/redeem")
    }
    with box.instance.db.reading() as tx:
        own = users.get(tx, who.id).account_id
    assert send(me, "/dashboard/account", account=own).status == 303
    assert account_shown(me.get("/dashboard/billing")) == own
    keys_sent = open_before["/dashboard/billing/keys"] | {"name": "from another tab"}
    assert me.post("/dashboard/billing/keys", keys_sent).status == 200
    found = box.row("SELECT account_id FROM api_key WHERE name = 'from another tab'")
    assert found == (home.account,)
    before = box.standing(home.account)[0], box.standing(own)[0]
    _, fields = filled(box, "/dashboard/billing/redeem", who)
    sent = open_before["/dashboard/billing/redeem"] | {"code": fields["code"]}
    assert me.post("/dashboard/billing/redeem", sent).status == 303
    assert (box.standing(home.account)[0], box.standing(own)[0]) == (before[0] + 5, before[1])


ELSEWHERE = [
    "//evil.example", "https://evil.example", "/\\evil.example", "\\\\evil.example",
    "/%0d%0aLocation:x\r\nX: y", "javascript:alert(1)", " /dashboard", "/\tevil", "", "///evil",
    "http:evil.example", "/dashboard\n",
]  # fmt: skip


@pytest.mark.parametrize("wish", ELSEWHERE)
def test_the_switch_never_leads_away_from_here(box: Box, home: House, wish: str) -> None:
    me = at_browser(box, home.member)
    answer = send(me, "/dashboard/account", account=home.account, next=wish)
    assert (answer.status, answer.headers["Location"]) == (303, "/dashboard")
    assert "X" not in answer.headers


# Suspended.


def test_a_suspended_account_can_be_read_and_not_changed(box: Box) -> None:
    here = house(box)
    me = at_browser(box, here.owner, here.account)
    told, now = f"unpaid {MARK.format('s')}", clock.now_ms()
    box.write(lambda tx: ledger.suspend_account(tx, here.account, told, now, COMMAND_LINE))
    for rule in pages_of_people(box, "GET"):
        if rule.startswith("/dashboard") and "<request_id>" not in rule:
            page = me.get(filled(box, rule, here.owner)[0])
            assert page.status == 200, rule
            if page.headers["Content-Type"].startswith("text/html"):
                assert "This account is suspended: unpaid <script>" in Read(page).text
    for rule in pages_of_people(box, "POST"):
        is_own = not re.search("/billing/|/members", rule)
        if rule.startswith("/admin") or is_own or rule.endswith("/session-token/revoke"):
            continue
        path, fields = filled(box, rule, here.owner)
        answer, tables = changed(box, lambda p=path, f=fields: send(me, p, **f))
        assert answer.status == 403, (rule, answer.status)
        assert "unpaid <script>" in Read(answer).text, rule
        assert tables == set(), rule


def test_a_suspended_person_is_signed_out(box: Box, home: House) -> None:
    who = joined(box, home.owner)
    me = at_browser(box, who, home.account)

    def suspend(tx: Any) -> None:
        users.suspend(tx, users.get(tx, who.id), "rude", clock.now_ms(), COMMAND_LINE)

    box.write(suspend)
    for rule in pages_of_people(box, "GET"):
        assert me.get(filled(box, rule, home.owner)[0]).headers["Location"].startswith("/login")


# What people, callers, upstreams and the operator have written, in pages.

TAGS = {
    "html", "head", "meta", "title", "link", "script", "body", "a", "header", "nav", "form",
    "input", "span", "button", "main", "p", "h1", "h2", "h3", "strong", "code", "pre", "table",
    "thead", "tbody", "tr", "th", "td", "ul", "ol", "li", "div", "section", "dl", "dt", "dd",
    "small", "details", "summary", "label", "select", "option", "fieldset", "legend", "figure",
    "figcaption", "svg", "rect", "br", "time", "em",
}  # fmt: skip
LINKS = re.compile(r"(/(?!/)[\x21-\x7e]*|#[a-z-]+)?")


class Read(HTMLParser):
    """A page's text and values as a browser has them, held against what templates may write."""

    def __init__(self, page: Answer) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.feed(page.body.decode())
        self.close()
        self.text = "\n".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag in TAGS, tag
        assert len(given) == len(attrs), attrs
        for name, value in attrs:
            assert re.fullmatch("[a-zA-Z-]+", name) and not name.startswith("on"), name
            assert name not in ("style", "srcdoc", "formaction", "background"), name
            if name in ("href", "action"):
                assert LINKS.fullmatch(value or ""), value
            self.texts.append(value or "")
        if tag == "script":
            assert re.fullmatch("/static/[a-z]+[.]js", given["src"] or ""), given
        else:
            assert "src" not in given

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def marked(name: str) -> str:
    found = MARK.format(name)
    assert len(found) <= 100
    return found


@pytest.fixture(scope="module")
def eve(box: Box) -> Person:
    """An operator who writes into whatever they can write into."""
    who, now = person(box, 100, operator=True), clock.now_ms()
    by, account = Actor(who.id), who.account
    email = "o'h&lt<br=+1@example.com".replace("<", "")
    box.run("UPDATE user SET email = :email WHERE id = :id", email=email, id=who.id)
    who = replace(who, email=email)
    key, _ = box.key(account, name=marked("kn"))

    def write(tx: Any) -> None:
        for kind, credits in (("grant", 5), ("adjustment", -1)):
            ledger.add_credits(tx, account, kind, credits, f"m:{kind}", marked(kind[:2]), now)
        terms = members.Terms("member", None, None)
        members.invite(tx, account, "i'n&gt@example.com", terms, now, by)
        vouchers.make(tx, 5, 2, marked("vn"), now, by)
        users.link_identity(tx, users.get(tx, who.id), marked("ii"), marked("is"), now, by)
        secret = CheapSecret("fare")
        suspended = keys.add(tx, account, who.id, Terms(marked("sk")), secret, now, by)
        keys.suspend(tx, suspended, marked("kr"), now, COMMAND_LINE)

    box.write(write)
    for _ in range(2):
        assert box.get("/api/v1/echo", key, X_Request_Id="a-_.javascript").status == 200
    (call_id,) = box.row(
        "SELECT id FROM call WHERE account_id = :a ORDER BY number LIMIT 1", a=account
    )
    box.write(lambda tx: ledger.refund(tx, call_id, marked("rn"), now))
    # What adapters and other configurations may write there.
    box.run("UPDATE call SET model = :model WHERE id = :id", model=marked("mo"), id=call_id)
    box.run("UPDATE call SET route = :route WHERE id = :id", route=marked("ro"), id=call_id)
    box.sum_up()
    victim = person(box)
    box.write(lambda tx: ledger.suspend_account(tx, victim.account, marked("ar"), now, by))
    return who


QUERIES = ("q", "before", "from", "to", "key", "route", "status", "month", "next", "account")


def test_nothing_that_was_written_becomes_a_part_of_a_page(box: Box, eve: Person) -> None:
    me = at_browser(box, eve, agent=marked("ua"))
    (call_id,) = box.row(
        "SELECT id FROM call WHERE account_id = :a ORDER BY number LIMIT 1", a=eve.account
    )
    (suspended,) = box.row(
        "SELECT account_id FROM user u JOIN account a ON a.id = u.account_id"
        " WHERE a.status_reason = :r", r=marked("ar"),
    )  # fmt: skip
    listed = box.instance.db.rows(
        "SELECT id FROM api_key WHERE account_id = :a", {"a": eve.account}
    )
    paths = [
        filled(box, rule, eve)[0] for rule in pages_of_people(box, "GET") if ".csv" not in rule
    ]
    paths += [f"/dashboard/usage/{call_id}", f"/admin/accounts/{eve.account}"]
    paths += [f"/admin/accounts/{suspended}/{verb}" for verb in ("grant", "resume")]
    paths += [f"/dashboard/billing/keys/{key_id}" for (key_id,) in listed]
    paths += [f"/admin/keys/{key_id}/revoke" for (key_id,) in listed]
    paths += [f"/dashboard/billing/statement?month={clock.rfc3339(clock.now_ms())[:7]}"]
    seen = []
    for path in paths:
        answer = me.get(path)
        assert answer.status == 200, (path, answer.body)
        seen.append(Read(answer).text)
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    for rule in ("/", "/usage", "/billing", "/billing/ledger", "/billing/statement", "/settings"):
        path = f"/dashboard{rule.rstrip('/')}"
        for name in QUERIES:
            answer = me.get(f"{path}?{urlencode({name: marked('qp')})}")
            assert answer.status in (200, 400), (path, name)
            seen.append(Read(answer).text)
    for rule in pages_of_people(box, "GET"):
        if rule.startswith("/admin") and "<" not in rule:
            for name in QUERIES:
                answer = me.get(f"{rule}?{urlencode({name: marked('qp')})}")
                assert answer.status in (200, 400), (rule, name)
                seen.append(Read(answer).text)
    # A form that is refused is shown again as it was typed.
    for path, sent in (
        ("/dashboard/billing/keys", {"name": "x" * 101}),
        ("/dashboard/billing/redeem", {"code": marked("co")}),
        ("/dashboard/settings/members", {"email": marked("em")}),
        (f"/admin/accounts/{eve.account}/grant", {"credits": marked("cr"), "note": marked("ty")}),
        (f"/admin/accounts/{eve.account}/refund", {"request_id": marked("ri")}),
        ("/admin/vouchers", {"credits": "1", "count": marked("cn")}),
    ):
        fields = {"expires": marked("ex"), "credit_limit": marked("cl"), "role": marked("rl")}
        if path == "/dashboard/settings/members":
            fields = {"role": marked("rl")}
        answer = send(me, path, **fields | sent)
        assert answer.status in (400, 404), (path, answer.status)
        seen.append(Read(answer).text)
    seen.append(Read(Browser(box).get("/login")).text)
    everything = "\n".join(seen)
    names = [
        "kn", "gr", "ad", "ii", "is", "sk", "kr", "rn", "mo", "ro", "ar", "vn", "ua", "qp", "co",
        "em", "cr", "ty", "ri", "cn", "ex", "cl",
    ]  # fmt: skip
    assert [name for name in names if marked(name) not in everything] == []
    for text in (LABEL, eve.email, "i'n&gt@example.com", "/api/v1/it's&quot", "a-_.javascript"):
        assert text in everything, text
    assert "49" not in re.findall(r"\{\{(.*?)\}\}", everything)


def test_no_template_writes_what_the_policy_forbids_or_what_is_not_escaped() -> None:
    """Read as they are written, so that no branch of one is missed."""
    found = sorted(TEMPLATES.rglob("*.html"))
    assert len(found) > 30
    for path in found:
        text = path.read_text("utf-8")
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", text), path
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", text), path
        assert all(' src="/static/' in tag for tag in re.findall("<script[^>]*>", text)), path
        assert re.findall("<script[^>]*>[^<]", text) == [], path
        links = re.findall(r'\b(?:href|src|action)="([^"]*)"', text)
        assert [link for link in links if not re.match(r"/(?!/)|#|[{][{]", link)] == [], path
        # A whole address is only ever one that is made here, never what somebody has written.
        whole = {link for link in links if link.startswith("{{")}
        assert whole <= {"{{ href }}", "{{ path }}", "{{ bar.href }}", "{{ "}, (path, whole)
        # An attribute is quoted, or what is in it could begin another.
        inside = re.sub(r"[{][%#].*?[%#][}]", "", text, flags=re.S)
        assert not re.search(r"<[a-z][^<>]*\s[\w-]+=[{][{]", inside), path


FORMULAS = [
    "=1+1", "+1+1", "-1+1", "@SUM(1)", "=HYPERLINK(\"http://evil.example\")", "\uff1d1+1",
    "\uff0b1", "\uff0d1", "\uff201", "-", "+", "=", "\u22121+1",
]  # fmt: skip


def test_no_cell_of_a_csv_begins_a_formula(box: Box) -> None:
    who = person(box, 100)
    me, now = at_browser(box, who), clock.now_ms()
    key, _ = box.key(who.account)
    for number, text in enumerate(FORMULAS):
        reference = f"{who.id}:{number}"
        box.write(
            lambda tx, t=text, r=reference: ledger.add_credits(
                tx, who.account, "grant", 1, r, t, now
            )
        )
        call = box.get("/api/v1/echo", key).request_id
        box.run("UPDATE call SET model = :m WHERE id = :id", m=text, id=call)
    box.write(lambda tx: ledger.add_credits(tx, who.account, "adjustment", -2, who.id, None, now))
    box.sum_up()
    month = clock.rfc3339(now)[:7]
    for path, column in (
        ("/dashboard/usage.csv", "model"),
        (f"/dashboard/billing/statement.csv?month={month}", "note"),
    ):
        answer = me.get(path)
        assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Disposition"].startswith("attachment; filename=")
        rows = list(csv.DictReader(io.StringIO(answer.body.decode(), newline="")))
        found = {row[column] for row in rows}
        for text in FORMULAS:
            if text[0] == "\u2212":
                assert text in found  # a sign of print, which begins none
            else:
                assert text not in found and f"'{text}" in found, text
        for row in rows:
            for cell in row.values():
                assert not re.match(r"[=+@\t\r\n\uff1d\uff0b\uff0d\uff20]|-(?!\d+$)", cell), cell
        if column == "note":
            assert "-2" in {row["amount"] for row in rows}  # a number stays one


# What is shown once.


def test_a_secret_is_in_the_one_answer_it_was_made_for(
    box: Box, home: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    who = person(box, 10, operator=True)
    me = at_browser(box, who)
    billing = "/dashboard/billing"
    answers: list[Answer] = []
    found: dict[str, str] = {}

    def take(what: str, path: str, pattern: str, **fields: str) -> Answer:
        answer = send(me, path, **fields)
        assert answer.status == 200, answer.body
        assert answer.headers["Cache-Control"] == "no-store"
        (secret,) = set(re.findall(pattern, answer.body.decode()))
        assert secret not in str(answer.headers)
        found[what] = secret
        for other, text in found.items():
            assert other == what or text not in answer.body.decode(), (other, what)
        return answer

    key = r"fare_live_\w{32}"
    made = take("quick", f"{billing}/keys/quick", key)
    take("key", f"{billing}/keys", key, name="mine")
    (key_id,) = box.row("SELECT id FROM api_key WHERE name = 'mine'")
    take("rotated", f"{billing}/keys/{key_id}/rotate", key, grace_seconds="3600")
    take("regenerated", f"{billing}/keys/{key_id}/regenerate", key)
    take("token", f"{billing}/session-token", r"eyJ[\w-]+\.[\w-]+\.[\w-]+")
    take("voucher", "/admin/vouchers", r"FB(?:-\w{5}){4}", credits="3")
    invite = r"/invite\?token=([\w-]+)"
    take("invitation", "/dashboard/settings/members", invite, email="guest@example.com")
    assert made.headers["Content-Type"] == "text/html; charset=utf-8"
    # Whatever comes after them: pages, redirects, errors, downloads.
    for rule in pages_of_people(box, "GET"):
        answers.append(me.get(filled(box, rule, who)[0]))
    for query in ("fare_live_", "mine", key_id):
        answers.append(me.get(f"/admin/keys?q={query}"))
    answers += [me.get(f"{billing}/keys/{key_id}"), me.get("/nowhere"), me.get("/")]
    answers.append(send(me, f"{billing}/redeem", code=found["voucher"]))
    assert answers[-1].status == 303
    answers.append(me.follow(answers[-1]))
    answers.append(send(me, f"{billing}/keys", name=""))
    assert len(answers) > 30
    # A code as it is stored for those who type it otherwise.
    forms = set(found.values()) | {found["voucher"].replace("-", "")}
    for answer in answers:
        text = answer.body.decode() + str(answer.headers)
        assert [secret for secret in forms if secret in text] == []
    signer = SecureCookieSessionInterface().get_signing_serializer(box.app)
    assert signer is not None
    cookie = str(signer.loads(me.cookies["farebox"]))
    with box.instance.db.reading() as tx:
        tables = tx.rows("SELECT name FROM sqlite_master WHERE type = 'table'")
        kept = "".join(str(tx.rows(f"SELECT * FROM {name}")) for (name,) in tables)
    for place in (cookie, kept, caplog.text, "".join(me.cookies.values())):
        assert [secret for secret in forms if secret in place] == []
    # They are what they are said to be.
    assert box.get("/api/v1/account", found["quick"]).status == 200
    assert box.get("/api/v1/account", found["regenerated"]).status == 200
    assert box.get("/api/v1/account", found["rotated"]).status == 401
    assert box.get("/api/v1/account", found["token"]).status == 200


def test_a_password_is_never_shown_again(box: Box) -> None:
    me = at_browser(box, person(box))
    typed = {"current": "what was typed here", "password": "and what was chosen there"}
    answer = send(me, "/dashboard/settings/password", **typed)
    assert answer.status == 400
    assert not any(text in answer.body.decode() for text in typed.values())


# Sent twice, sent often, sent badly.


def test_a_form_that_is_sent_twice(box: Box, operator: Person) -> None:
    """A code adds its credits once. A key and a grant are made anew, each as an entry of its own
    with its own name in the audit log: a browser asks before it sends a form again."""
    who = person(box)
    me, boss = at_browser(box, who), at_browser(box, operator)
    _, fields = filled(box, "/dashboard/billing/redeem", who)
    first = send(me, "/dashboard/billing/redeem", code=fields["code"])
    again, tables = changed(box, lambda: send(me, "/dashboard/billing/redeem", code=fields["code"]))
    assert (first.status, again.status, tables) == (303, 404, set())
    assert box.standing(who.account) == (5, 0)
    for _ in range(2):
        assert send(me, "/dashboard/billing/keys", name="twice").status == 200
    assert box.row("SELECT COUNT(*) FROM api_key WHERE name = 'twice'") == (2,)
    path = f"/admin/accounts/{who.account}/grant"
    for _ in range(2):
        answer = send(boss, path, credits="7")
        assert (answer.status, answer.headers["Location"]) == (303, path.removesuffix("/grant"))
    assert box.standing(who.account) == (19, 0)
    call = filled(box, "/admin/accounts/<account_id>/refund", who)
    assert send(boss, call[0], request_id=call[1]["request_id"]).status == 303
    again, tables = changed(box, lambda: send(boss, call[0], request_id=call[1]["request_id"]))
    assert (again.status, tables) == (409, set())


def test_a_loop_over_pages_is_bounded(tmp_path: Path) -> None:
    config = CONFIG.replace("requests_per_minute = 1000000", "requests_per_minute = 12")
    with Box(tmp_path / "instance", config) as box:
        who, other = person(box), person(box)
        me, bystander = at_browser(box, who), at_browser(box, other)
        now = clock.now_ms()
        if now % clock.MINUTE_MS > 50_000:  # a new minute would begin the count anew
            box.run("DELETE FROM rate_window")
        tried = [me.get("/dashboard/usage") for _ in range(30)]
        statuses = [page.status for page in tried]
        assert statuses.count(200) <= 24 and statuses[-1] == 429
        assert tried[-1].headers["Content-Type"].startswith("text/html")
        assert 1 <= int(tried[-1].headers["Retry-After"]) <= 60
        assert "Sign out" in tried[-1].body.decode()
        # Forms are requests too, other people and signing out are not concerned.
        csrf = hidden(tried[-1], None)["csrf_token"]
        answer = me.post("/dashboard/billing/keys/quick", {"csrf_token": csrf})
        assert answer.status == 429
        assert box.row("SELECT COUNT(*) FROM api_key WHERE user_id = :id", id=who.id) == (0,)
        assert bystander.get("/dashboard").status == 200
        assert me.post("/logout", {"csrf_token": csrf}).status == 303


def test_guesses_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of codes, and of the password of who left a browser open."""
    config = CONFIG.replace("[limits]", "[limits]\nfailed_auth_per_minute = 3")
    with Box(tmp_path / "instance", config) as box:
        time = Clock(monkeypatch, "2027-03-17T12:00:30Z")
        who = person(box)
        me = at_browser(box, who)
        time.forward(seconds=60)
        code = filled(box, "/dashboard/billing/redeem", who)[1]["code"]
        guesses = ["FB-00000-00000-00000-00000"] * 3
        tried = [send(me, "/dashboard/billing/redeem", code=each) for each in [*guesses, code]]
        assert [page.status for page in tried] == [404, 404, 404, 429]
        assert tried[-1].headers["Retry-After"] == "30"
        elsewhere = at_browser(box, who, client="192.0.2.7")  # the account is counted too
        assert send(elsewhere, "/dashboard/billing/redeem", code=code).status == 429
        assert box.standing(who.account) == (0, 0)
        time.forward(seconds=60)
        assert send(me, "/dashboard/billing/redeem", code=code).status == 303
        typed = {"password": "another-long-enough-pass-phrase"}
        for current, status in (("x", 400), ("y", 400), ("z", 400), ("a password", 429)):
            answer = send(me, "/dashboard/settings/password", current=current, **typed)
            assert answer.status == status
        assert elsewhere.get("/dashboard").status == 200  # nothing was changed


ODD = [
    "", "0", "-1", "1" * 400, "%00", "\x00", "\ud7ff", "%ff", "'", "0001-01-01", "9999-12-31",
    "1969-12", "9999-12", "0000-00", "1970-01", "2027-13", "9999-12-31T23:59:59-23:59",
    "0001-01-01T00:00:00+23:59", "999999999999999.acct_0", "999999999999999", "1e9", "[]", "held",
]  # fmt: skip


READ = {  # what each page reads of its query
    "/dashboard/usage": "from to key route status before",
    "/dashboard/usage.csv": "from to",
    "/dashboard/billing": "before",
    "/dashboard/billing/ledger": "before",
    "/dashboard/billing/statement": "month",
    "/dashboard/billing/statement.csv": "month",
    "/admin": "q before",
    "/admin/keys": "q before",
    "/admin/vouchers": "before",
    "/admin/audit": "account before",
}


def test_whatever_is_asked_no_page_fails(box: Box, operator: Person) -> None:
    me = at_browser(box, operator)
    for rule in pages_of_people(box, "GET"):
        path = re.sub("<[^>]+>", "x%00y", rule)
        queries = [f"{name}={quote(odd)}" for name in READ.get(rule, "").split() for odd in ODD]
        if "from=" in "".join(queries):
            times = ODD[9:18]
            queries += [f"from={quote(one)}&to={quote(one)}" for one in times]
            queries += [f"from={quote(one)}&to={quote(two)}" for one, two in pairwise(times)]
        for query in [*queries, "before=%ff&q=%ff%fe", "a=1&a=2&a"]:
            answer = me.get(f"{path}?{query}")
            assert answer.status in (200, 400, 404), (path, query, answer.status)


def test_whatever_is_typed_no_form_fails(box: Box, operator: Person) -> None:
    me = at_browser(box, operator)
    csrf = me.csrf()
    names = "credits count credit_limit rate_limit grace_seconds expires role credit_period note"
    names += " reason code email name request_id token_id scopes issuer subject"
    for rule in pages_of_people(box, "POST"):
        if rule.endswith(("/sessions/end-all", "/sessions/<session_id>/end")):
            continue
        for odd in (
            "",
            "\x00",
            "-0",
            "9" * 16,
            "9" * 17,
            "\u0661",
            "1,0",
            "x\ny",
            "\u202ex",
            "é" * 300,
        ):
            path, fields = filled(box, rule, operator)
            sent = fields | dict.fromkeys(names.split(), odd) | {"csrf_token": csrf}
            answer = me.post(path, sent)
            assert answer.status < 500, (rule, odd, answer.status, answer.body)


def test_a_note_or_reason_is_text_that_can_be_shown(box: Box, operator: Person) -> None:
    me = at_browser(box, operator)
    for verb, name in (
        ("grant", "note"),
        ("adjust", "note"),
        ("refund", "note"),
        ("suspend", "reason"),
    ):
        for text in ("x" * 201, "a\x00b", "a\nb", "\u202egnirts", "a\x1b[31m"):
            path, fields = filled(box, f"/admin/accounts/<account_id>/{verb}", operator)
            sent = fields | {name: text}
            answer, tables = changed(box, lambda p=path, s=sent: send(me, p, **s))
            assert (answer.status, tables) == (400, set()), (verb, text)
