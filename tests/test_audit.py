"""Who did what, as it is kept and as it is read; and what the operator can do to people and
accounts, which is the most of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import apsw
import pytest
from browser import PASSWORD, Browser
from doubles import Upstream
from inprocess import STRANGERS_KEY, Background, Box
from people import (
    CONFIG,
    House,
    Person,
    audited,
    cheaply,
    house,
    invited,
    joined,
    minted,
    pages,
    person,
    token_for,
    told,
)  # fmt: skip
from server import OPERATOR_KEY

from core import clock, users
from core.audit import COMMAND_LINE

AUDIT = "/api/v1/audit"
ENTRY = ["id", "at", "actor", "address", "action", "account", "subject", "detail"]
CLIENT = "203.0.113.9"
NO = (403, "forbidden")
_numbers = count(1)

GATED = """
[upstreams.double]
kind = "http"
base_url = "{url}"

[[routes]]
path = "/api/v1/up/*"
methods = ["GET"]
upstream = "double"
upstream_path = "/*"
credits = 3
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, upstream_server: Upstream) -> Iterator[Box]:
    config = CONFIG + GATED.format(url=upstream_server.url)
    with Box(tmp_path_factory.mktemp("instance"), config) as box:
        yield box


@pytest.fixture(scope="module")
def home(box: Box) -> House:
    return house(box, 1_000)


@pytest.fixture(scope="module")
def operator(box: Box) -> Person:
    return person(box, operator=True)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    cheaply(monkeypatch)


def run(box: Box, *words: str, stdin: str | None = None) -> str:
    """The standard output of a command that succeeds."""
    done = box.cli(*words, stdin=stdin)
    assert done.exit_code == 0, done.output
    output: str = done.stdout.strip()
    return output


def fails(box: Box, *words: str) -> str:
    """What a command that is refused says; it is one line and changes nothing."""
    before = snapshot(box)
    done = box.cli(*words)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.output
    assert snapshot(box) == before
    line: str = done.stderr.strip()
    assert line.startswith("Error: ") and "\n" not in line
    return line


def snapshot(box: Box) -> list[list[tuple[Any, ...]]]:
    """People, accounts, entries, keys and the audit log."""
    with box.instance.db.reading() as tx:
        return [
            tx.rows(f"SELECT * FROM {table} ORDER BY id")
            for table in ("user", "account", "entry", "api_key", "membership", "audit")
        ]


def key_of(box: Box, who: Person) -> tuple[str, str]:
    """A new key of somebody's: itself and its id."""
    answer = box.post("/api/v1/keys", who.token, {"name": "k"})
    assert answer.status == 201, answer.body
    return answer.json()["key"], answer.json()["id"]


def echo(box: Box, credential: str) -> tuple[int, str | None]:
    return told(box.get("/api/v1/echo", credential))


def since(box: Box, work: Callable[[], object]) -> list[tuple[Any, ...]]:
    """What some work has left in the log: actor, address, action, account, subject, detail."""
    (last,) = box.row("SELECT MAX(number) FROM audit")
    work()
    columns = ("number", "actor", "address", "action", "account_id", "subject", "detail")
    return [
        (*row[1:-1], None if row[-1] is None else json.loads(row[-1]))
        for row in audited(box, *columns)
        if row[0] > last
    ]


# One entry each.


def over_http(
    box: Box, who: Person, method: str, path: str, value: object = None, status: int = 200
) -> Callable[[], object]:
    def work() -> object:
        answer = box.request(method, path, key=who.token, value=value, client=CLIENT)
        assert answer.status == status, answer.body
        return answer

    return work


def test_each_change_of_a_key_leaves_one_entry(box: Box, home: House) -> None:
    who, keys = home.member, "/api/v1/keys"
    answers: list[Any] = []
    create = over_http(box, who, "POST", keys, {"name": "my key"}, 201)
    (created,) = since(box, lambda: answers.append(create()))
    key_id = answers[0].json()["id"]
    by = (who.id, CLIENT)
    assert created == (
        *by, "key.created", home.account, key_id, {"name": "my key", "user": who.id},
    )  # fmt: skip
    one = f"{keys}/{key_id}"
    for method, path, value, action, detail in (
        ("PATCH", one, {"name": "n", "rate_limit": 1}, "changed",
         {"changed": ["name", "rate_limit"]}),
        ("POST", f"{one}/rotate", {"grace_seconds": 90}, "rotated", {"grace_seconds": 90}),
        ("POST", f"{one}/rotate", {}, "rotated", {"grace_seconds": 0}),
        ("POST", f"{one}/suspend", {"reason": "lost it"}, "suspended", {"reason": "lost it"}),
        ("POST", f"{one}/suspend", {}, "suspended", None),
        ("POST", f"{one}/resume", None, "resumed", None),
    ):  # fmt: skip
        (entry,) = since(box, over_http(box, who, method, path, value))
        assert entry == (*by, f"key.{action}", home.account, key_id, detail)
    (entry,) = since(box, over_http(box, who, "DELETE", one, None, 204))
    assert entry == (*by, "key.revoked", home.account, key_id, None)
    assert since(box, over_http(box, who, "DELETE", one, None, 204)) == []  # nothing was done
    assert since(box, over_http(box, who, "GET", keys)) == []


def test_each_change_of_a_member_leaves_one_entry(box: Box, home: House) -> None:
    members, by = "/api/v1/members", (home.owner.id, CLIENT)
    answers: list[Any] = []
    terms = {"role": "member", "credit_limit": 5, "credit_period": "day"}
    asked = {"email": "Guest@Example.net"} | terms
    invite = over_http(box, home.owner, "POST", members, asked, 201)
    (entry,) = since(box, lambda: answers.append(invite()))
    member_id = answers[0].json()["id"]
    assert entry == (
        *by, "member.invited", home.account, member_id, {"email": "guest@example.net"} | terms,
    )  # fmt: skip
    one = f"{members}/{member_id}"
    (entry,) = since(box, over_http(box, home.owner, "PATCH", one, {"credit_limit": 6}))
    assert entry == (
        *by, "member.changed", home.account, member_id, terms | {"credit_limit": 6},
    )  # fmt: skip
    (entry,) = since(box, over_http(box, home.owner, "DELETE", one, None, 204))
    assert entry == (
        *by, "member.removed", home.account, member_id, {"email": "guest@example.net"},
    )  # fmt: skip
    guest = joined(box, home.owner)
    _, key_id = key_of(box, guest)
    leave = over_http(box, guest, "DELETE", f"{members}/{guest.member_id}", None, 204)
    assert since(box, leave) == [
        (guest.id, CLIENT, "key.revoked", home.account, key_id, None),
        (guest.id, CLIENT, "member.removed", home.account, guest.member_id,
         {"user": guest.id, "email": guest.email}),
    ]  # fmt: skip


def test_following_an_invitation_and_signing_in_and_out_leave_one_entry_each(box: Box) -> None:
    host = person(box)
    shown, link = invited(box, host, "new.guest@example.net")
    browser, email = Browser(box, client=CLIENT), "new.guest@example.net"

    def follow() -> None:
        assert browser.submit(f"/invite?token={link}", email=email, password=PASSWORD).status == 303

    added, has_joined, started = since(box, follow)
    user_id, account = added[4], added[3]
    assert added[1:3] == (CLIENT, "user.added") and added[5] == {"email": email}
    assert has_joined == (
        user_id, CLIENT, "member.joined", host.account, shown["id"],
        {"user": user_id, "invited": email},
    )  # fmt: skip
    assert started[:4] == (user_id, CLIENT, "session.started", account)
    assert started[5] == {"method": "invite"}
    (ended,) = since(box, lambda: browser.submit("/dashboard", action="/logout"))
    assert ended == (user_id, CLIENT, "session.ended", account, started[4], None)
    (again,) = since(box, lambda: browser.sign_in(email))
    assert (again[:4], again[5]) == (started[:4], {"method": "password"})
    token = browser.token()
    revoke = "/api/v1/session-tokens/current"
    (revoked,) = since(box, lambda: box.request("DELETE", revoke, key=token, client=CLIENT))
    assert revoked[:4] == (user_id, CLIENT, "token.revoked", account)
    assert revoked[4].startswith("tok_") and revoked[5] is None


def test_each_command_leaves_one_entry(box: Box) -> None:
    email = f"commanded{next(_numbers)}@example.com"
    (added,) = since(box, lambda: run(box, "users", "add", email))
    user_id, account = added[4], added[3]
    by = ("operator", None)
    assert added == (*by, "user.added", account, user_id, {"email": email})
    (started,) = since(box, lambda: minted(box, email))
    assert started[2:4] == ("session.started", account) and started[5] == {"method": "cli"}
    (made,) = since(box, lambda: run(box, "keys", "add", email, "--name", "n"))
    key_id = made[4]
    assert made == (*by, "key.created", account, key_id, {"name": "n", "user": user_id})
    for words, action, subject, detail in (
        (("credits", "grant", email, "9", "--note", "thanks"), "credits.grant", None,
         {"amount": 9, "note": "thanks"}),
        (("credits", "adjust", email, "-2", "--note", "oops"), "credits.adjustment", None,
         {"amount": -2, "note": "oops"}),
        (("keys", "suspend", key_id, "--reason", "r"), "key.suspended", key_id, {"reason": "r"}),
        (("keys", "resume", key_id), "key.resumed", key_id, None),
        (("keys", "revoke", key_id), "key.revoked", key_id, None),
        (("users", "reset-link", email), "password.reset_link", user_id, None),
        (("users", "sign-out", email), "session.all_ended", user_id, {"count": 1}),
        (("users", "suspend", email, "--reason", "r"), "user.suspended", user_id, {"reason": "r"}),
        (("users", "resume", email), "user.resumed", user_id, None),
        (("users", "operator", email), "user.operator", user_id, {"operator": True}),
        (("users", "operator", email, "--remove"), "user.operator", user_id, {"operator": False}),
        (("accounts", "suspend", email, "--reason", "r"), "account.suspended", account,
         {"reason": "r"}),
        (("accounts", "resume", email), "account.resumed", account, None),
        (("accounts", "close", email), "account.closed", account, None),
    ):  # fmt: skip
        (entry,) = since(box, partial(run, box, *words))
        assert entry == (*by, action, account, subject or entry[4], detail), words
    (entry,) = since(box, lambda: run(box, "tokens", "rotate-key"))
    assert (entry[:4], entry[5]) == ((*by, "signing_key.rotated", None), None)


def test_a_refund_names_the_call_and_the_account(box: Box) -> None:
    payer = box.payer(5)
    call = box.sms(payer.key)
    run_it = ("credits", "refund", call.request_id, "--note", "sorry")
    (entry,) = since(box, lambda: run(box, *run_it))
    assert entry == (
        "operator", None, "credits.refund", payer.account, call.request_id,
        {"amount": 1, "note": "sorry"},
    )  # fmt: skip
    assert "refunded before" in fails(box, *run_it)


def test_what_fails_leaves_no_entry(box: Box, home: House) -> None:
    _, key_id = key_of(box, home.owner)
    run(box, "keys", "suspend", key_id)
    one, members = f"/api/v1/keys/{key_id}", "/api/v1/members"

    def all_of_it() -> None:
        for who, method, path, value, status in (
            (home.owner, "POST", "/api/v1/keys", {"name": ""}, 400),
            (home.owner, "POST", f"{one}/resume", None, 403),
            (home.owner, "POST", f"{one}/suspend", {}, 409),
            (home.owner, "PATCH", one, {"credit_limit": 1}, 400),
            (home.owner, "POST", f"{one}/rotate", {"grace_seconds": -1}, 400),
            (home.member, "PATCH", one, {"name": "n"}, 403),
            (home.stranger, "DELETE", one, None, 404),
            (home.owner, "POST", members, {"email": home.member.email}, 409),
            (home.owner, "POST", members, {"email": "nobody"}, 400),
            (home.member, "POST", members, {"email": "x@example.org"}, 403),
            (home.owner, "DELETE", f"{members}/{home.owner.member_id}", None, 409),
            (home.second, "PATCH", f"{members}/{home.owner.member_id}", {"role": "member"}, 409),
            (home.stranger, "DELETE", f"{members}/{home.member.member_id}", None, 404),
        ):
            over_http(box, who, method, path, value, status)()
        for words in (
            ("users", "add", home.owner.email), ("users", "add", "nobody"),
            ("users", "resume", home.owner.email), ("users", "suspend", "nobody@example.com"),
            ("users", "close", home.owner.email), ("accounts", "resume", home.owner.email),
            ("accounts", "close", "acct_nobody"), ("accounts", "suspend", "acct_operator"),
            ("keys", "add", home.owner.email, "--name", ""), ("keys", "revoke", "key_nobody"),
            ("keys", "resume", home.owner.email), ("credits", "refund", "req_nobody"),
            ("credits", "adjust", home.owner.email, "-100000", "--note", "n"),
            ("credits", "grant", home.owner.email, str(10**15), "--note", "n"),
            ("tokens", "mint", "nobody@example.com"), ("users", "reset-link", "acct_nobody"),
        ):  # fmt: skip
            fails(box, *words)

    assert since(box, all_of_it) == []


# The operator key.


def test_every_use_of_the_operator_key_leaves_an_entry_with_its_address(box: Box) -> None:
    expected = ("operator_key", CLIENT, "operator_key.used", None, None, None)
    for method, path, value, status in (
        ("POST", "/api/v1/sms/send", {"to": "+18148835337", "message": "hi"}, 200),
        ("GET", "/api/v1/echo", None, 200),
        ("GET", "/api/v1/echo?status=500", None, 502),
        ("POST", "/api/v1/sms/send", {"to": 5}, 400),
        ("GET", "/api/v1/account", None, 200),
        ("GET", "/api/v1/usage?limit=0", None, 400),
        ("GET", "/api/v1/usage/req_nobody", None, 404),
        ("GET", "/api/v1/keys", None, 403),
        ("POST", "/api/v1/members", {"email": "x@example.org"}, 403),
        ("GET", AUDIT, None, 403),
    ):
        use = partial(box.request, method, path, key=OPERATOR_KEY, value=value, client=CLIENT)
        answers: list[int] = []
        found = since(box, lambda use=use, to=answers: to.append(use().status))  # type: ignore[misc]
        assert (answers, found) == ([status], [expected]), path
    for almost in (OPERATOR_KEY[:-1], OPERATOR_KEY[:-1] + "X", OPERATOR_KEY.upper()):
        assert since(box, partial(box.get, "/api/v1/account", almost)) == []


def test_behind_a_proxy_the_address_is_the_clients(tmp_path: Path) -> None:
    with Box(tmp_path / "i", CONFIG, FAREBOX_TRUSTED_PROXIES="1") as box:
        box.get("/api/v1/account", OPERATOR_KEY, X_Forwarded_For="198.51.100.1, 203.0.113.7")
        assert audited(box, "actor", "address") == [("operator_key", "203.0.113.7")]


# Reading it.


@pytest.mark.parametrize(
    ("who", "query", "outcome"),
    [
        ("owner", "", 200),
        ("second", "", 200),
        ("owner", "?account={account}", 200),
        ("member", "", NO),
        ("member", "?account={account}", NO),
        ("owner", "?account=all", NO),
        ("owner", "?account=", NO),
        ("owner", "?account={strangers}", NO),
        ("stranger", "?account={account}", NO),
        ("stranger", "?account=all", NO),
        ("operator", "", 200),
        ("operator", "?account=all", 200),
        ("operator", "?account={account}", 200),
        ("operator as member", "", 200),
        ("operator as member", "?account={account}", 200),
        ("operator as member", "?account=all", 200),
        ("key", "", (403, "session_required")),
        ("operator key", "?account=all", (403, "session_required")),
        ("stranger's key", "", (401, "invalid_api_key")),
        ("nobody", "", (401, "missing_api_key")),
    ],
)
def test_owners_read_their_log_and_the_operator_all(
    box: Box, home: House, operator: Person, who: str, query: str, outcome: Any
) -> None:
    token: str | None
    if who in ("owner", "second", "member", "stranger"):
        token = home[who].token
    elif who == "operator as member":
        guest = joined(box, home.owner, operator)
        token = guest.token
    else:
        token = {
            "operator": operator.token,
            "key": key_of(box, home.owner)[0],
            "operator key": OPERATOR_KEY,
            "stranger's key": STRANGERS_KEY,
        }.get(who)
    target = query.format(account=home.account, strangers=home.stranger.account)
    answer = box.get(AUDIT + target, token)
    if who == "operator as member":
        box.request("DELETE", f"/api/v1/members/{guest.member_id}", key=guest.token)
    if outcome != 200:
        assert told(answer) == outcome
        assert answer.headers["x-should-retry"] == "false"
        return
    assert answer.status == 200, answer.body
    accounts = {entry["account"] for entry in answer.json()["data"]}
    if "all" in query:
        assert len(accounts) > 1
    elif who == "operator":
        assert accounts == {home.account if query else operator.account}
    else:
        assert accounts == {home.account}


def test_the_log_is_paged_newest_first_and_holds_all_there_is(
    box: Box, home: House, operator: Person
) -> None:
    found = [row for page in pages(box, AUDIT, home.owner.token, 7) for row in page]
    kept = audited(box, *ENTRY[:1], "at", "actor", "address", "action", "account_id", "subject")
    ours = [row for row in kept if row[5] == home.account][::-1]
    assert [list(entry) for entry in found] == [ENTRY] * len(ours) and len(ours) > 14
    assert [tuple(entry.values())[:-1] for entry in found] == [
        (row[0], clock.rfc3339(row[1]), *row[2:]) for row in ours
    ]
    all_of_it = pages(box, f"{AUDIT}?account=all", operator.token, 100)
    everything = [entry["id"] for page in all_of_it for entry in page]
    assert everything == [row[0] for row in audited(box, "id")][::-1]
    for bad in ("limit=0", "limit=101", "cursor=x", "cursor=-1"):
        answer = box.get(f"{AUDIT}?{bad}", home.owner.token)
        assert told(answer) == (400, "validation_error")
        assert answer.json()["param"] == bad.partition("=")[0]
    assert told(box.post(AUDIT, home.owner.token)) == (405, "method_not_allowed")


def test_the_command_line_shows_the_log_of_all_or_of_one_account(box: Box) -> None:
    owner = person(box, 10)
    _, key_id = key_of(box, owner)
    run(box, "keys", "suspend", key_id, "--reason", "two\u00a0words · x")
    shown = run(box, "audit", owner.email).splitlines()
    assert run(box, "audit", owner.account).splitlines() == shown
    when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(f"{when} operator - key.suspended {key_id} {{.+}}", shown[0])
    assert re.fullmatch(f"{when} {owner.id} 127.0.0.1 key.created {key_id} {{.+}}", shown[1])
    assert shown[-1].split()[3] == "user.added"
    everything = run(box, "audit", "--limit", "100000").splitlines()
    assert len(everything) == len(audited(box, "id")) and set(shown) <= set(everything)
    assert everything[0] == shown[0]
    assert run(box, "audit", owner.email, "--limit", "1").splitlines() == shown[:1]
    assert len(run(box, "audit").splitlines()) == 50
    fails(box, "audit", "nobody@example.com")
    assert box.cli("audit", "--limit", "0").exit_code == 2


# Kept for good.


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'x'",
        "UPDATE audit SET detail = NULL WHERE number = 1",
        "UPDATE OR REPLACE audit SET number = 1 WHERE number = 2",
        "DELETE FROM audit",
        "DELETE FROM audit WHERE number = 1",
        "INSERT OR REPLACE INTO audit (id, number, at, actor, action)"
        " SELECT id, 10000000, 0, 'x', 'x' FROM audit WHERE number = 1",
        "REPLACE INTO audit (id, number, at, actor, action) VALUES ('aud_new', 1, 0, 'x', 'x')",
        "INSERT INTO audit (id, number, at, actor, action) VALUES ('aud_new', 1, 0, 'x', 'x')"
        " ON CONFLICT (number) DO UPDATE SET actor = 'x'",
    ],
)
def test_an_entry_is_never_edited_replaced_or_deleted(
    box: Box, home: House, statement: str
) -> None:
    before = audited(box, "*")
    with pytest.raises(apsw.ConstraintError, match="the audit log is never"):
        box.run(statement)
    assert audited(box, "*") == before


def test_no_secret_is_in_the_log(box: Box, home: House) -> None:
    key, key_id = key_of(box, home.owner)
    rotated = box.post(f"/api/v1/keys/{key_id}/rotate", home.owner.token).json()["key"]
    _, link = invited(box, home.owner, "secret.guest@example.net")
    email = "with.password@example.com"
    run(box, "users", "add", email, "--password-stdin", stdin=PASSWORD)
    browser = Browser(box)
    assert browser.sign_in(email).status == 303
    reset = run(box, "users", "reset-link", email).partition("token=")[2]
    printed = run(box, "keys", "add", email, "--name", "n")
    assert (
        browser.submit(f"/reset?token={reset}", password="another-long-pass-phrase").status == 303
    )
    cookies = browser.cookies.values()
    box.get("/api/v1/account", OPERATOR_KEY)
    log = json.dumps(audited(box, "*"))
    assert key_id in log and email in log
    for secret in (
        key, rotated, printed, link, reset, PASSWORD, "another-long-pass-phrase", OPERATOR_KEY,
        home.owner.token, *cookies,
    ):  # fmt: skip
        assert secret not in log and secret[-16:] not in log
    assert not re.search(r"fare_live_|eyJ|\$argon2|token=", log)


# People: kept out, signed out, closed.


def did(box: Box, who: Person, subject: str, issuer: str = "privy.io") -> str:
    """Another name of somebody, as an outside issuer has it."""
    with box.instance.db.reading() as tx:
        user = users.get(tx, who.id)
    now = clock.now_ms()
    box.write(lambda tx: users.link_identity(tx, user, issuer, subject, now, COMMAND_LINE))
    return subject


WHO: dict[str, Callable[[Box, Person], str]] = {
    "e-mail": lambda box, who: who.email,
    "E-MAIL": lambda box, who: who.email.upper(),
    "acct": lambda box, who: who.account,
    "did": lambda box, who: did(box, who, f"did:privy:{who.name}"),
}


@pytest.mark.parametrize("name", WHO)
def test_who_is_an_email_an_account_or_a_did(box: Box, name: str) -> None:
    who = person(box, 5)
    word = WHO[name](box, who)
    key, _ = key_of(box, who)
    for group, code in (("users", "key_suspended"), ("accounts", "account_suspended")):
        run(box, group, "suspend", word)
        assert echo(box, key) == (403, code)
        run(box, group, "resume", word)
    assert echo(box, key) == (200, None)
    assert run(box, "credits", "balance", word) == "2"
    run(box, "users", "close", word)
    assert echo(box, key) == (401, "invalid_api_key")


@pytest.mark.parametrize("command", ["suspend", "resume", "sign-out", "close"])
@pytest.mark.parametrize(
    "word", ["nobody@example.com", "acct_nobody", "did:privy:nobody", "user_nobody", "x", ""]
)
def test_an_unknown_who_is_refused_in_one_line(box: Box, command: str, word: str) -> None:
    fails(box, "users", command, word)
    if command != "sign-out":
        fails(box, "accounts", command, word)


def test_a_did_that_two_issuers_know_as_different_people_names_nobody(box: Box) -> None:
    first, second = person(box), person(box)
    did(box, first, "did:web:both", "https://one.example")
    run(box, "users", "suspend", "did:web:both")
    run(box, "users", "resume", "did:web:both")
    did(box, second, "did:web:both", "https://two.example")
    for words in (("users", "suspend"), ("accounts", "close"), ("credits", "balance")):
        assert "did:web:both" in fails(box, *words, "did:web:both")
    did(box, first, "did:web:same", "https://one.example")
    did(box, first, "did:web:same", "https://two.example")
    assert run(box, "credits", "balance", "did:web:same") == "0"


def test_the_operator_keys_account_is_nobodys(box: Box) -> None:
    for command in ("suspend", "resume", "close"):
        fails(box, "accounts", command, "acct_operator")
        fails(box, "users", command, "acct_operator")


@pytest.mark.parametrize("reason", [None, "chargeback · see mail"])
def test_a_suspended_person_is_kept_out_everywhere_and_only_they(
    box: Box, reason: str | None
) -> None:
    host, guest = person(box, 100), person(box, 100)
    member = joined(box, host, guest)
    keys = [key_of(box, guest)[0], key_of(box, member)[0]]
    others = key_of(box, joined(box, guest))[0]
    run(box, "users", "suspend", guest.email, *(["--reason", reason] if reason else []))
    for key in keys:
        for answer in (box.get("/api/v1/echo", key), box.get("/api/v1/usage", key)):
            assert told(answer) == (403, "key_suspended")
            assert answer.json()["reason"] == reason
    for token in (guest.token, member.token):
        assert echo(box, token) == (401, "invalid_token")
        assert told(box.get("/api/v1/keys", token)) == (401, "invalid_token")
    assert echo(box, others) == (200, None)
    assert "suspended" in run(box, "users", "list").partition(guest.email)[2].splitlines()[0]
    fails(box, "tokens", "mint", guest.email)
    fails(box, "users", "reset-link", guest.email)
    run(box, "users", "suspend", guest.email, "--reason", "and more")
    assert box.get("/api/v1/echo", keys[0]).json()["reason"] == "and more"
    run(box, "users", "resume", guest.email)
    assert [echo(box, key) for key in keys] == [(200, None)] * 2
    assert echo(box, guest.token) == (401, "invalid_token")  # what ended stays ended
    assert echo(box, minted(box, guest.email)) == (200, None)
    fails(box, "users", "resume", guest.email)


def test_signing_out_ends_every_token_and_no_key(box: Box) -> None:
    who = person(box, 100)
    tokens = [who.token, minted(box, who.email), token_for(box, who, who.account)]
    key, _ = key_of(box, who)
    assert run(box, "users", "sign-out", who.email) == "2 sign-ins ended"
    assert [echo(box, token) for token in tokens] == [(401, "invalid_token")] * 3
    assert echo(box, key) == (200, None)
    assert run(box, "users", "sign-out", who.email) == "0 sign-ins ended"
    assert echo(box, minted(box, who.email)) == (200, None)


def test_closing_a_person_ends_all_they_had_but_the_books(box: Box) -> None:
    host, who = person(box, 100), person(box, 10)
    member = joined(box, host, who)
    keys = [key_of(box, who)[0], key_of(box, member)[0]]
    call = box.get("/api/v1/echo", keys[0])
    assert call.status == 200
    subject = did(box, who, f"did:privy:{who.name}")
    run(box, "users", "close", who.email)
    assert [echo(box, key) for key in keys] == [(401, "invalid_api_key")] * 2
    assert [echo(box, token) for token in (who.token, member.token)] == [(401, "invalid_token")] * 2
    assert box.standing(who.account) == (7, 0)
    for words in (
        ("credits", "grant", who.account, "5"), ("credits", "refund", call.request_id),
        ("credits", "adjust", who.account, "-7", "--note", "n"), ("users", "close", who.account),
        ("users", "suspend", subject), ("users", "resume", who.account),
        ("accounts", "resume", who.account), ("accounts", "suspend", who.account),
        ("accounts", "close", who.account), ("tokens", "mint", who.account),
        ("users", "reset-link", who.account), ("users", "suspend", who.email),
    ):  # fmt: skip
        fails(box, *words)
    assert box.standing(who.account) == (7, 0)
    listed = {m["email"] for m in box.get("/api/v1/members", host.token).json()["data"]}
    assert listed == {host.email}
    run(box, "users", "add", who.email)  # the address is free again
    assert run(box, "credits", "balance", who.email) == "0"
    assert run(box, "ledger", "verify").startswith("ok: ")
    names = run(box, "users", "list").splitlines()
    assert f"{who.id} {who.account} closed" in names


@pytest.mark.parametrize("what", ["accounts", "users"])
def test_closing_takes_invitations_back(box: Box, what: str) -> None:
    host = person(box)
    shown, link = invited(box, host, f"late{next(_numbers)}@example.net")
    assert Browser(box).get(f"/invite?token={link}").status == 200
    actions = [entry[2] for entry in since(box, lambda: run(box, what, "close", host.email))]
    assert actions.count("member.removed") == (1 if what == "accounts" else 2)
    assert Browser(box).get(f"/invite?token={link}").status == 404
    with box.instance.db.reading() as tx:
        assert tx.row("SELECT 1 FROM membership WHERE id = :id", {"id": shown["id"]}) is None


def test_running_the_instance_is_given_and_taken_back_at_once(box: Box) -> None:
    who = person(box)
    for words, status in (((), 403), (("operator",), 200), (("operator", "--remove"), 403)):
        if words:
            run(box, "users", *words, who.email)
        assert box.get(f"{AUDIT}?account=all", who.token).status == status
    run(box, "users", "close", who.email)
    fails(box, "users", "operator", who.account)


def test_nobody_is_closed_while_others_are_members_of_their_account(box: Box) -> None:
    host = person(box)
    guest = joined(box, host)
    assert "members" in fails(box, "users", "close", host.email)
    run(box, "users", "close", guest.email)
    run(box, "users", "close", host.email)


def test_a_call_in_flight_is_settled_though_its_account_closes(
    box: Box, upstream: Upstream
) -> None:
    who = person(box, 10)
    key, _ = key_of(box, who)
    calls = [
        Background(lambda k=k, g=g: box.get(f"/api/v1/up/gated/{g}", k))  # type: ignore[misc]
        for k, g in ((key, "closing-a"), (who.token, "closing-b"))
    ]
    for gate in ("closing-a", "closing-b"):
        upstream.wait_for(1, gate)
    assert box.standing(who.account) == (4, 6)
    run(box, "users", "close", who.email)
    for gate in ("closing-a", "closing-b"):
        upstream.gate(gate).open()
    assert [call.result().status for call in calls] == [200, 200]
    assert box.standing(who.account) == (4, 0)
    assert calls[0].result().headers["X-Credits-Charged"] == "3"
    assert run(box, "ledger", "verify").startswith("ok: ")


# Accounts.


def test_a_suspended_account_spends_nothing_until_it_is_resumed(box: Box) -> None:
    who = person(box, 100)
    member = joined(box, who)
    ways = [key_of(box, who)[0], key_of(box, member)[0], who.token, member.token]
    run(box, "accounts", "suspend", who.account, "--reason", "unpaid")
    for way in ways:
        answer = box.get("/api/v1/echo", way)
        assert told(answer) == (403, "account_suspended")
        assert answer.json()["reason"] == "unpaid"
    run(box, "credits", "grant", who.account, "5")  # what is suspended can still be paid for
    fails(box, "users", "resume", who.email)  # the person never was
    run(box, "accounts", "suspend", who.email, "--reason", "still unpaid")
    assert box.get("/api/v1/echo", ways[0]).json()["reason"] == "still unpaid"
    run(box, "accounts", "resume", who.account)
    assert [echo(box, way) for way in ways] == [(200, None)] * 4
    fails(box, "accounts", "resume", who.account)


@pytest.mark.parametrize("suspended_first", [False, True])
def test_a_closed_account_is_over_and_its_people_are_not(box: Box, suspended_first: bool) -> None:
    who = person(box, 100)
    member = joined(box, who)
    ways = [key_of(box, who)[0], key_of(box, member)[0], who.token, member.token]
    if suspended_first:
        run(box, "accounts", "suspend", who.account)
    run(box, "accounts", "close", who.account)
    assert [echo(box, way)[0] for way in ways] == [401] * 4
    for command in ("close", "suspend", "resume"):
        fails(box, "accounts", command, who.account)
    fails(box, "credits", "grant", who.account, "5")
    assert box.standing(who.account) == (100, 0)
    assert told(box.get("/api/v1/account", minted(box, member.email))) == (200, None)
    run(box, "users", "close", member.email)
    run(box, "users", "close", who.email)


def test_credits_for_signing_up_are_given_once(tmp_path: Path) -> None:
    config = '[instance]\nsignup = "open"\nsignup_credits = 25\n' + CONFIG
    with Box(tmp_path / "i", config) as box:
        run(box, "users", "add", "a@example.com")
        browser = Browser(box)
        assert browser.submit("/signup", email="b@example.com", password=PASSWORD).status == 303
        for email in ("a@example.com", "b@example.com"):
            assert run(box, "credits", "balance", email) == "25"
            token = minted(box, email)
            account = box.get("/api/v1/account", token).json()["account"]
            again = partial(
                users.give_signup_credits, account_id=account, credits=25, now=clock.now_ms()
            )
            box.write(again)
            (entry,) = box.get("/api/v1/ledger", token).json()["data"]
            assert (entry["kind"], entry["amount"], entry["balance"]) == ("signup", 25, 25)
        Browser(box).submit("/signup", email="b@example.com", password=PASSWORD)
        assert run(box, "credits", "balance", "b@example.com") == "25"
        fails(box, "users", "add", "a@example.com")
        assert box.row("SELECT COUNT(*), SUM(amount) FROM entry") == (2, 50)
