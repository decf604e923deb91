"""Members of an account: who may invite, change and remove whom, what each may spend; and what an
account's people can read of its calls."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import pytest
from browser import PASSWORD, Browser
from inprocess import STRANGERS_KEY, Box, Clock
from people import (
    CONFIG,
    House,
    Person,
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
from server import OPERATOR_KEY, Answer

from core import access, clock, ledger, members, tokens, users
from core.audit import COMMAND_LINE, Actor
from core.errors import Refusal
from core.ledger import Guard, NewCall, Outcome

MEMBERS = "/api/v1/members"
SHOWN = ["id", "user_id", "email", "role", "status", "credit_limit", "credit_period"]
SECOND, DAY_MS = 1000, 86_400_000
FULL = (403, "credit_limit_reached")
_emails = iter(f"guest{n}@example.org" for n in range(10**6))


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("instance"), CONFIG) as box:
        yield box


@pytest.fixture(scope="module")
def home(box: Box) -> House:
    return house(box, 10_000)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    cheaply(monkeypatch)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still at this moment, so that the module's tokens go on working."""
    return Clock(monkeypatch, clock.rfc3339(clock.now_ms()))


def do(box: Box, verb: str, member_id: str, token: str | None, value: object = None) -> Answer:
    if verb == "invite":
        value = {"email": next(_emails)} if value is None else value
        return box.request("POST", MEMBERS, key=token, value=value)
    if verb == "list":
        return box.request("GET", MEMBERS, key=token)
    method = {"change": "PATCH", "remove": "DELETE"}[verb]
    value = {"role": "member"} if value is None and verb == "change" else value
    return box.request(method, f"{MEMBERS}/{member_id}", key=token, value=value)


def everybody(box: Box) -> tuple[list[tuple[Any, ...]], int]:
    """All memberships, and how many actions were recorded."""
    with box.instance.db.reading() as tx:
        found = tx.rows("SELECT * FROM membership ORDER BY id")
        done = tx.row("SELECT COUNT(*) FROM audit WHERE action <> 'operator_key.used'")
    assert done is not None
    return found, done[0]


def refused(answer: Answer, status: int, code: str, param: str | None = None) -> None:
    assert told(answer) == (status, code), answer.body
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json().get("param") == param, answer.body


def listed(box: Box, who: Person) -> dict[str, dict[str, Any]]:
    answer = box.get(MEMBERS, who.token)
    assert answer.status == 200 and list(answer.json()) == ["data", "has_more", "next_cursor"]
    assert (answer.json()["has_more"], answer.json()["next_cursor"]) == (False, None)
    return {member["id"]: member for member in answer.json()["data"]}


def is_open(box: Box, link: str) -> bool:
    """Whether an invitation's link still opens its form."""
    status = Browser(box).get(f"/invite?token={link}").status
    assert status in (200, 404)
    return status == 200


# Who may.

PERSON = (409, "conflict")  # the person whose account it is
NO, UNKNOWN = (403, "forbidden"), (404, "not_found")


@pytest.mark.parametrize(
    ("verb", "whom", "outcomes"),
    # The outcomes for: the owner, the second owner, the member, the stranger.
    [
        ("change", "owner", (PERSON, PERSON, NO, UNKNOWN)),
        ("change", "second", (200, 200, NO, UNKNOWN)),
        ("change", "member", (200, 200, NO, UNKNOWN)),
        ("change", "another member", (200, 200, NO, UNKNOWN)),
        ("change", "invited", (200, 200, NO, UNKNOWN)),
        ("remove", "owner", (PERSON, PERSON, NO, UNKNOWN)),
        ("remove", "second", (204, 204, NO, UNKNOWN)),
        ("remove", "member", (204, 204, 204, UNKNOWN)),
        ("remove", "another member", (204, 204, NO, UNKNOWN)),
        ("remove", "invited", (204, 204, NO, UNKNOWN)),
        ("invite", "", (201, 201, NO, 201)),  # the stranger: into an account of their own
    ],
)
def test_owners_invite_change_and_remove_and_a_member_only_leaves(
    box: Box, verb: str, whom: str, outcomes: tuple[Any, ...]
) -> None:
    for who, outcome in zip(("owner", "second", "member", "stranger"), outcomes, strict=True):
        home = house(box)
        if whom == "another member":
            member_id = joined(box, home.owner).member_id
        elif whom == "invited":
            member_id = invited(box, home.owner, next(_emails))[0]["id"]
        else:
            member_id = home[whom].member_id if whom else ""
        before = everybody(box)
        answer = do(box, verb, member_id, home[who].token)
        if isinstance(outcome, int):
            assert answer.status == outcome, (who, answer.body)
            assert everybody(box) != before
            assert (member_id in listed(box, home.owner)) is (verb == "change")
        else:
            refused(answer, *outcome)
            assert everybody(box) == before


@pytest.mark.parametrize("verb", ["change", "remove"])
def test_a_member_of_another_account_is_as_unknown_as_none(
    box: Box, home: House, verb: str
) -> None:
    theirs = do(box, verb, home.member.member_id, home.stranger.token).json()
    nobodys = do(box, verb, "mem_0123456789", home.stranger.token).json()
    assert theirs | {"request_id": ""} == nobodys | {"request_id": ""}
    assert told(do(box, verb, "mem_0123456789", home.owner.token)) == UNKNOWN


def test_all_members_see_all_and_a_stranger_none(box: Box) -> None:
    home = house(box)
    pending, _ = invited(box, home.owner, "Pending@Example.org")
    lists = [listed(box, home[who]) for who in ("owner", "second", "member")]
    assert lists[0] == lists[1] == lists[2]
    assert set(lists[0]) == {
        home.owner.member_id, home.second.member_id, home.member.member_id, pending["id"],
    }  # fmt: skip
    for shown, who, role in (
        (lists[0][home.owner.member_id], home.owner, "owner"),
        (lists[0][home.second.member_id], home.second, "owner"),
        (lists[0][home.member.member_id], home.member, "member"),
    ):
        assert list(shown) == SHOWN
        assert list(shown.values())[1:] == [who.id, who.email, role, "active", None, None]
    assert lists[0][pending["id"]] == {
        "id": pending["id"], "user_id": None, "email": "pending@example.org", "role": "member",
        "status": "invited", "credit_limit": None, "credit_period": None,
    }  # fmt: skip
    (alone,) = listed(box, home.stranger).values()
    assert (alone["id"], alone["user_id"]) == (home.stranger.member_id, home.stranger.id)


@pytest.mark.parametrize("verb", ["list", "invite", "change", "remove"])
@pytest.mark.parametrize(
    ("credential", "outcome"),
    [
        ("key", (403, "session_required")),
        (OPERATOR_KEY, (403, "session_required")),
        (None, (401, "missing_api_key")),
        (STRANGERS_KEY, (401, "invalid_api_key")),
        ("eyJ", (401, "invalid_token")),
    ],
    ids=["key", "operator key", "nothing", "unknown key", "bad token"],
)
def test_only_a_session_token_manages_members(
    box: Box, home: House, verb: str, credential: str | None, outcome: tuple[int, str]
) -> None:
    key = box.post("/api/v1/keys", home.owner.token, {"name": "k"}).json()["key"]
    before = everybody(box)
    token = key if credential == "key" else credential
    refused(do(box, verb, home.member.member_id, token), *outcome)
    assert everybody(box) == before


def test_other_methods_are_answered_with_those_that_are_allowed(box: Box, home: House) -> None:
    for method, path, allowed in (
        ("PUT", "", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("DELETE", "", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("GET", f"/{home.member.member_id}", {"PATCH", "DELETE", "OPTIONS"}),
        ("POST", f"/{home.member.member_id}", {"PATCH", "DELETE", "OPTIONS"}),
    ):
        answer = box.request(method, MEMBERS + path, key=home.owner.token)
        refused(answer, 405, "method_not_allowed")
        assert set(answer.headers["Allow"].split(", ")) == allowed


def test_an_account_keeps_the_person_whose_it_is(box: Box) -> None:
    home = house(box)
    for who in (home.owner, home.second):
        refused(do(box, "remove", home.owner.member_id, who.token), *PERSON)
        refused(do(box, "change", home.owner.member_id, who.token), *PERSON)
    limited = {"credit_limit": 5, "credit_period": "day"}
    answer = do(box, "change", home.owner.member_id, home.second.token, limited)
    assert (answer.status, answer.json()["credit_limit"]) == (200, 5)
    assert do(box, "remove", home.second.member_id, home.second.token).status == 204
    refused(do(box, "remove", home.owner.member_id, home.owner.token), *PERSON)


def test_a_change_of_role_holds_for_the_very_next_request(box: Box) -> None:
    home = house(box)
    assert told(do(box, "invite", "", home.member.token)) == NO
    promoted = do(box, "change", home.member.member_id, home.owner.token, {"role": "owner"})
    assert promoted.json()["role"] == "owner"
    assert do(box, "invite", "", home.member.token).status == 201
    demoted = do(box, "change", home.second.member_id, home.second.token, {"role": "member"})
    assert demoted.json()["role"] == "member"
    refused(do(box, "change", home.second.member_id, home.second.token, {"role": "owner"}), *NO)


# Invitations.


def test_an_invitation_is_shown_with_its_link_once(box: Box, home: House) -> None:
    answer = box.post(
        MEMBERS, home.owner.token,
        {"email": "Ada.L@Example.org", "role": "owner", "credit_limit": 9, "credit_period": "week"},
    )  # fmt: skip
    assert answer.status == 201
    shown = answer.json()
    assert list(shown) == [*SHOWN, "invite_url"]
    url = shown.pop("invite_url")
    assert re.fullmatch(re.escape(box.settings.public_url) + r"/invite\?token=[\w-]{40,}", url)
    assert list(shown.values())[1:] == [None, "ada.l@example.org", "owner", "invited", 9, "week"]
    assert listed(box, home.owner)[shown["id"]] == shown
    changed = do(box, "change", shown["id"], home.owner.token, {"credit_limit": 10})
    assert changed.json() == shown | {"credit_limit": 10}


def test_a_newcomer_follows_an_invitation_and_owns_an_account_too(box: Box) -> None:
    owner = person(box)
    shown, link = invited(box, owner, "newcomer@example.org", credit_limit=3, credit_period="total")
    browser = Browser(box)
    email = "another.address@example.org"  # the link is what counts
    answer = browser.submit(f"/invite?token={link}", email=email, password=PASSWORD)
    assert (answer.status, answer.headers["Location"]) == (303, "/dashboard")
    now = listed(box, owner)[shown["id"]]
    user_id = now["user_id"]
    del shown["invite_url"]
    assert now == shown | {"user_id": user_id, "email": email, "status": "active"}
    assert (user_id[:5], now["credit_limit"], now["credit_period"]) == ("user_", 3, "total")
    own, hosts = browser.token(), browser.token(owner.account)
    accounts = [box.get("/api/v1/account", t).json()["account"] for t in (own, hosts)]
    assert accounts[0] not in (None, owner.account) and accounts[1] == owner.account
    assert not is_open(box, link)
    (mine,) = box.get(MEMBERS, own).json()["data"]
    assert (mine["user_id"], mine["role"]) == (user_id, "owner")


def test_inviting_again_renews_the_link_and_the_terms(box: Box) -> None:
    owner, email = person(box), next(_emails)
    first, old = invited(box, owner, email, role="owner", credit_limit=1, credit_period="day")
    assert is_open(box, old)
    second, new = invited(box, owner, email.upper())
    assert second["id"] == first["id"] and old != new
    assert (second["role"], second["credit_limit"]) == ("member", None)
    assert (is_open(box, old), is_open(box, new)) == (False, True)
    assert len(listed(box, owner)) == 2


def test_an_invitation_that_was_taken_back_opens_nothing(box: Box) -> None:
    owner = person(box)
    shown, link = invited(box, owner, next(_emails))
    assert do(box, "remove", shown["id"], owner.token).status == 204
    assert not is_open(box, link)
    with pytest.raises(Refusal):
        box.write(lambda tx: members.join(tx, link, owner.id, clock.now_ms(), COMMAND_LINE))
    assert list(listed(box, owner)) == [owner.member_id]
    again, _ = invited(box, owner, shown["email"])
    assert again["id"] != shown["id"]


def test_an_invitation_lasts_seven_days(box: Box, time: Clock) -> None:
    _, link = invited(box, person(box), next(_emails))
    time.forward(ms=7 * DAY_MS - 1)
    assert is_open(box, link)
    time.forward(ms=1)
    assert not is_open(box, link)


def test_whoever_is_a_member_is_not_invited_again(box: Box) -> None:
    home = house(box)
    for who in (home.owner, home.second, home.member):
        before = everybody(box)
        refused(do(box, "invite", "", home.owner.token, {"email": who.email.title()}), *PERSON)
        assert everybody(box) == before
    box.cli("users", "suspend", home.member.email)
    refused(do(box, "invite", "", home.owner.token, {"email": home.member.email}), *PERSON)
    # Nor do they join twice by an invitation that went to another address.
    _, link = invited(box, home.owner, next(_emails))
    with pytest.raises(Refusal) as twice:
        box.write(lambda tx: members.join(tx, link, home.second.id, clock.now_ms(), COMMAND_LINE))
    assert twice.value.code == "conflict"
    assert is_open(box, link)


def test_an_account_has_at_most_two_hundred_members(box: Box) -> None:
    owner = person(box)
    joined(box, owner)
    box.run(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 197)"
        " INSERT INTO membership (id, account_id, email, role, created_at)"
        " SELECT 'mem_' || :a || i, :a, i || '@example.net', 'member', 0 FROM n",
        a=owner.account,
    )
    last, _ = invited(box, owner, next(_emails))
    assert len(listed(box, owner)) == 200
    refused(do(box, "invite", "", owner.token), 409, "conflict")
    invited(box, owner, last["email"])  # renewing needs no room
    assert do(box, "remove", last["id"], owner.token).status == 204
    assert do(box, "invite", "", owner.token).status == 201


# What is read, strictly.

EMAILS = [
    "", " ", "x", "@example.org", "a@", "a b@example.org", "a@b@example.org", "a@exa mple.org",
    "a@example.org ", "a@example.org\n", "a\x00@example.org", "<a@example.org>", "a,b@example.org",
    "a;b@example.org", '"a"@example.org', "a@exämple.org", "a@[127.0.0.1]", "a" * 65 + "@x.org",
    "a@" + "x" * 191, "\u202ea@example.org", "a(b)@example.org", "a:b@example.org",
    "Ann <a@example.org>", "a\\@example.org",
]  # fmt: skip
TERMS: list[tuple[dict[str, object], str]] = [
    ({"role": "admin"}, "role"), ({"role": ""}, "role"), ({"role": "Owner"}, "role"),
    ({"role": None}, "role"), ({"role": 1}, "role"), ({"role": ["owner"]}, "role"),
    ({"credit_limit": 5}, "credit_period"), ({"credit_period": "day"}, "credit_period"),
    ({"credit_limit": -1, "credit_period": "day"}, "credit_limit"),
    ({"credit_limit": 10**15 + 1, "credit_period": "day"}, "credit_limit"),
    ({"credit_limit": 10**30, "credit_period": "day"}, "credit_limit"),
    ({"credit_limit": True, "credit_period": "day"}, "credit_limit"),
    ({"credit_limit": 1.0, "credit_period": "day"}, "credit_limit"),
    ({"credit_limit": "5", "credit_period": "day"}, "credit_limit"),
    ({"credit_limit": 5, "credit_period": "year"}, "credit_period"),
    ({"credit_limit": 5, "credit_period": 1}, "credit_period"),
    ({"status": "active"}, "status"), ({"user_id": "user_x"}, "user_id"), ({"id": "x"}, "id"),
    ({"account": "acct_x"}, "account"), ({"": 1}, ""),
]  # fmt: skip


@pytest.mark.parametrize("email", [*EMAILS, None, 1, True, [], {}], ids=lambda v: ascii(v)[:30])
def test_an_invitation_goes_to_an_address(box: Box, home: House, email: object) -> None:
    before = everybody(box)
    answer = do(box, "invite", "", home.owner.token, {"email": email})
    refused(answer, 400, "validation_error", "email")
    assert everybody(box) == before


@pytest.mark.parametrize(("value", "param"), TERMS, ids=str)
def test_terms_that_cannot_be_are_named(
    box: Box, home: House, value: dict[str, object], param: str
) -> None:
    member_id = home.member.member_id
    before = everybody(box)
    email = next(_emails)
    for answer in (
        do(box, "invite", "", home.owner.token, {"email": email} | value),
        do(box, "change", member_id, home.owner.token, value),
    ):
        refused(answer, 400, "validation_error", param or None)
    refused(
        do(box, "change", member_id, home.owner.token, {"email": email}),
        400, "validation_error", "email",
    )  # fmt: skip
    assert everybody(box) == before


@pytest.mark.parametrize(
    ("body", "headers", "outcome"),
    [
        (b"", {}, (400, "validation_error", "email")),
        (b"[]", {}, (400, "validation_error", None)),
        (b'{"role":"owner",}', {}, (400, "validation_error", None)),
        (b'{"credit_limit":NaN}', {}, (400, "validation_error", None)),
        (b"{}", {"Content-Type": "text/plain"}, (415, "unsupported_media_type", None)),
        (b"{}", {"Content-Encoding": "gzip"}, (415, "unsupported_media_type", None)),
        (b"{}".ljust(64 * 1024 + 1), {}, (413, "body_too_large", None)),
    ],
    ids=lambda v: str(v)[:24],
)
def test_a_body_is_plain_json_of_64_kib_at_most(
    box: Box, home: House, body: bytes, headers: dict[str, str],
    outcome: tuple[int, str, str | None],
) -> None:  # fmt: skip
    before = everybody(box)
    options: dict[str, Any] = {"key": home.owner.token, "body": body, "headers": headers}
    refused(box.request("POST", MEMBERS, **options), *outcome)
    if body:
        answer = box.request("PATCH", f"{MEMBERS}/{home.member.member_id}", **options)
        refused(answer, *outcome)
    assert everybody(box) == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"role": "owner"},
        {"credit_limit": 0},
        {"credit_period": "total"},
        {"credit_limit": None, "credit_period": None},
        {"role": "owner", "credit_limit": 10**15, "credit_period": "month"},
    ],
    ids=str,
)
def test_a_change_leaves_what_it_does_not_name_and_null_clears(
    box: Box, home: House, changes: dict[str, Any]
) -> None:
    guest = joined(box, home.owner, credit_limit=7, credit_period="week")
    before = listed(box, home.owner)[guest.member_id]
    answer = do(box, "change", guest.member_id, home.owner.token, changes)
    assert (answer.status, list(answer.json())) == (200, SHOWN)
    assert answer.json() == before | changes == listed(box, home.owner)[guest.member_id]


# What a member may spend.


def key_of(box: Box, who: Person, **terms: object) -> str:
    answer = box.post("/api/v1/keys", who.token, {"name": "k"} | terms)
    assert answer.status == 201, answer.body
    key: str = answer.json()["key"]
    return key


def echo(box: Box, token: str) -> tuple[int, str | None]:
    """A call of three credits."""
    return told(box.get("/api/v1/echo", token))


def test_a_members_limit_counts_all_their_keys_and_tokens_together(
    box: Box, home: House, time: Clock
) -> None:
    guest = joined(box, home.owner, credit_limit=9, credit_period="day")
    ways = [key_of(box, guest), key_of(box, guest), token_for(box, guest, home.account)]
    assert [echo(box, way) for way in ways] == [(200, None)] * 3
    for way in [*ways, guest.token]:
        answer = box.get("/api/v1/echo", way)
        refused(answer, *FULL)
        assert list(answer.json())[-3:] == ["limit", "period", "resets_at"]
        tomorrow = clock.period_start_ms("day", time.now) + DAY_MS
        assert list(answer.json().values())[-3:] == [9, "day", clock.rfc3339(tomorrow)]
    assert box.get("/api/v1/account", guest.token).status == 200  # reading is free
    # Neither the others nor the person in an account of their own are concerned.
    for other in (home.owner, home.member):
        assert echo(box, key_of(box, other)) == (200, None)
    assert echo(box, minted(box, guest.email)) == (402, "insufficient_credits")


def test_a_members_limit_changes_at_once_and_does_not_start_its_count_anew(
    box: Box, home: House, time: Clock
) -> None:
    guest = joined(box, home.owner, credit_limit=3, credit_period="total")
    key = key_of(box, guest)
    assert [echo(box, key), echo(box, guest.token)] == [(200, None), FULL]
    answer = box.get("/api/v1/echo", key).json()
    assert (answer["limit"], answer["period"], answer["resets_at"]) == (3, "total", None)
    for limit, outcomes in ((6, [(200, None), FULL]), (5, [FULL]), (9, [(200, None), FULL])):
        assert do(
            box, "change", guest.member_id, home.owner.token, {"credit_limit": limit}
        ).status == 200  # fmt: skip
        assert [echo(box, key) for _ in outcomes] == outcomes
    # Leaving and coming back does not start it anew either.
    assert do(box, "remove", guest.member_id, guest.token).status == 204
    back = joined(box, home.owner, guest, credit_limit=10, credit_period="total")
    assert echo(box, back.token) == FULL
    cleared = {"credit_limit": None, "credit_period": None}
    assert do(box, "change", back.member_id, home.owner.token, cleared).status == 200
    assert echo(box, back.token) == (200, None)


def test_what_somebody_spends_in_one_account_does_not_count_in_another(
    box: Box, home: House
) -> None:
    guest = joined(box, home.owner, credit_limit=3, credit_period="day")
    elsewhere = joined(box, person(box, 100), guest, credit_limit=3, credit_period="day")
    assert [echo(box, guest.token), echo(box, elsewhere.token)] == [(200, None)] * 2
    assert [echo(box, guest.token), echo(box, elsewhere.token)] == [FULL] * 2


@pytest.mark.parametrize(
    ("period", "start", "end"),
    [
        ("day", "2027-03-17T12:00:00Z", "2027-03-18T00:00:00Z"),
        ("week", "2027-03-17T12:00:00Z", "2027-03-22T00:00:00Z"),
        ("month", "2027-03-17T12:00:00Z", "2027-04-01T00:00:00Z"),
    ],
)
def test_a_members_limit_starts_anew_with_its_period(
    box: Box, monkeypatch: pytest.MonkeyPatch, period: str, start: str, end: str
) -> None:
    time = Clock(monkeypatch, start)
    guest = joined(box, person(box, 100), credit_limit=4, credit_period=period)
    key = key_of(box, guest)
    assert [echo(box, key), echo(box, key)] == [(200, None), FULL]
    assert box.get("/api/v1/echo", key).json()["resets_at"] == end
    time.set(end)
    time.forward(ms=-1)
    assert echo(box, key) == FULL
    time.set(end)
    assert [echo(box, key), echo(box, key)] == [(200, None), FULL]


def test_what_was_not_charged_does_not_count_under_a_members_limit(box: Box, home: House) -> None:
    guest = joined(box, home.owner, credit_limit=3, credit_period="total")
    for way in (guest.token, key_of(box, guest)):
        assert told(box.get("/api/v1/echo?status=500", way)) == (502, "provider_error")
    assert [echo(box, guest.token), echo(box, guest.token)] == [(200, None), FULL]


def test_a_call_the_member_may_not_make_does_not_count_under_the_keys_limit(
    box: Box, home: House
) -> None:
    guest = joined(box, home.owner, credit_limit=0, credit_period="day")
    key = key_of(box, guest, credit_limit=3, credit_period="day")
    assert [echo(box, key), echo(box, key)] == [FULL, FULL]
    assert box.get("/api/v1/echo", key).json()["limit"] == 0  # the member's, not the key's
    unlimited = {"credit_limit": None, "credit_period": None}
    do(box, "change", guest.member_id, home.owner.token, unlimited)
    assert [echo(box, key), echo(box, key)] == [(200, None), FULL]
    assert box.get("/api/v1/echo", key).json()["limit"] == 3


def test_whoever_is_kept_out_is_shown_as_suspended(box: Box, home: House) -> None:
    guest = joined(box, home.owner)
    box.cli("users", "suspend", guest.email)
    assert listed(box, home.owner)[guest.member_id]["status"] == "suspended"
    box.cli("users", "resume", guest.email)
    assert listed(box, home.owner)[guest.member_id]["status"] == "active"


def test_leaving_ends_the_tokens_for_that_account_and_no_others(box: Box) -> None:
    host = person(box)
    guest = joined(box, host)
    at_home = minted(box, guest.email)
    assert do(box, "remove", guest.member_id, guest.token).status == 204
    refused(do(box, "list", "", guest.token), 401, "invalid_token")
    assert do(box, "list", "", at_home).status == 200
    answer = box.post("/api/v1/session-tokens", at_home, {"account": host.account})
    refused(answer, *UNKNOWN)
    back = joined(box, host, guest)
    assert do(box, "list", "", back.token).status == 200
    refused(do(box, "list", "", guest.token), 401, "invalid_token")  # what ended stays ended


# Between asking and acting.


def sign_out(box: Box, who: Person) -> None:
    assert box.cli("users", "sign-out", who.email).exit_code == 0


def leave(box: Box, who: Person) -> None:
    with box.instance.db.reading() as tx:
        member = members.get(tx, who.member_id, who.account)
    box.write(lambda tx: members.remove(tx, member, clock.now_ms(), COMMAND_LINE))


def demote(box: Box, who: Person) -> None:
    box.run("UPDATE membership SET role = 'member' WHERE id = :id", id=who.member_id)


@pytest.mark.parametrize("verb", ["invite", "change", "remove"])
@pytest.mark.parametrize(
    ("event", "expected"),
    [(sign_out, (401, "invalid_token")), (leave, (401, "invalid_token")), (demote, NO)],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_who_was_let_in_and_may_not_any_more_changes_nothing(
    box: Box, home: House, monkeypatch: pytest.MonkeyPatch, verb: str,
    event: Callable[[Box, Person], None], expected: tuple[int, str],
) -> None:  # fmt: skip
    guest, other = joined(box, home.owner, role="owner"), joined(box, home.owner)
    identify = access.identify
    after: list[object] = []

    def interrupted(*args: Any) -> access.Principal:
        principal = identify(*args)
        event(box, guest)
        after.append(everybody(box))
        return principal

    monkeypatch.setattr(access, "identify", interrupted)
    refused(do(box, verb, other.member_id, guest.token, value={
        "invite": {"email": next(_emails)}, "change": {"role": "owner"},
    }.get(verb)), *expected)  # fmt: skip
    assert after == [everybody(box)]


# What an account's people read.


class Books:
    """An account with calls of every kind, and the tokens of its people."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.home = house(box, 1_000)
        keys = {who: key_of(box, self.home[who]) for who in ("owner", "member")}
        for way in (*keys.values(), self.home.member.token, self.home.owner.token):
            assert box.sms(way).status == 200
            assert box.sms(way, text="x" * 200).status == 200
            assert echo(box, way) == (200, None)
        for way in (keys["member"], self.home.second.token):
            assert box.get("/api/v1/echo?status=503", way).status == 502
        _, self.nobodys_key = box.key(self.home.account)
        self.held = tokens.new_id("req")
        call = NewCall(
            self.held, self.held, self.home.account, "session", None, self.home.owner.id,
            "/api/v1/echo", "GET", 1, 3, 3, box.instance.incarnation(), clock.now_ms(),
        )  # fmt: skip
        assert box.write(lambda tx: ledger.hold(tx, call, Guard("TRUE", {}), 100)) is not None
        for number, model in ((1, "big"), (2, "big"), (3, "small")):
            self.set(number, "model", model)

    def set(self, number: int, column: str, value: object) -> None:
        """Change the record of the account's n-th call."""
        assert self.box.run(
            f"UPDATE call SET {column} = :v WHERE account_id = :a AND number = :n",
            v=value, a=self.home.account, n=number,
        )  # fmt: skip
        self.box.sum_up()

    def calls(self) -> list[dict[str, Any]]:
        """All calls, as the owner reads them."""
        found = pages(self.box, "/api/v1/usage", self.home.owner.token, 100)
        return [call for page in found for call in page]

    def summary(self, query: str, token: str | None = None) -> Answer:
        return self.box.get(f"/api/v1/usage/summary{query}", token or self.home.owner.token)

    def data(self, query: str) -> list[dict[str, Any]]:
        answer = self.summary(query)
        assert answer.status == 200 and list(answer.json()) == ["data"], answer.body
        found: list[dict[str, Any]] = answer.json()["data"]
        return found


@pytest.fixture(scope="module")
def books(box: Box) -> Iterator[Books]:
    with pytest.MonkeyPatch.context() as patches:
        cheaply(patches)
        made = Books(box)
    yield made
    assert box.write(lambda tx: ledger.void(tx, made.held, Outcome(None, None)))


def test_a_session_token_reads_all_the_accounts_calls_and_entries(box: Box, books: Books) -> None:
    home, calls = books.home, books.calls()
    assert len(calls) == 15 and {call["payer"] for call in calls} == {"api_key", "session"}
    assert [call["status"] for call in calls].count("voided") == 2
    for who in (home.second, home.member):
        for path in ("/api/v1/usage", "/api/v1/ledger"):
            theirs = [list(page) for page in pages(box, path, who.token, 4)]
            owners = [list(page) for page in pages(box, path, home.owner.token, 4)]
            assert theirs == owners and len(theirs) > 1
    entries = [row for page in pages(box, "/api/v1/ledger", home.owner.token, 100) for row in page]
    assert [entry["kind"] for entry in entries] == ["capture"] * 12 + ["grant"]
    for call in calls:
        target = f"/api/v1/usage/{call['request_id']}"
        assert box.get(target, home.member.token).json() == call
        assert told(box.get(target, home.stranger.token)) == UNKNOWN
    assert box.get("/api/v1/usage", home.stranger.token).json()["data"] == []


def test_a_session_token_reads_the_balance_of_its_account(box: Box, books: Books) -> None:
    home, (available, held) = books.home, box.standing(books.home.account)
    assert held == 3
    for who in (home.owner, home.second, home.member):
        assert box.get("/api/v1/account", who.token).json() == {
            "credits": available, "held": 3, "account": home.account, "privyUserId": None,
            "wallets": [], "usd_value": str(Decimal(available) / 100),
        }  # fmt: skip
        short = box.get("/v1/account", who.token).json()
        assert (short["credits_remaining"], short["api_key_created_at"]) == (available, None)
    with box.instance.db.reading() as tx:
        member = users.get(tx, home.member.id)
    box.write(
        lambda tx: users.link_identity(
            tx, member, "privy.io", "did:privy:abc", clock.now_ms(), Actor(member.id)
        )
    )
    seen = [box.get("/api/v1/account", home[who].token).json() for who in ("member", "owner")]
    assert [account["privyUserId"] for account in seen] == ["did:privy:abc", None]


@pytest.mark.parametrize(
    ("by", "field"),
    [
        ("member", "user_id"), ("key", "key_id"), ("route", "route"), ("model", "model"),
        ("day", "created_at"),
    ],
)  # fmt: skip
def test_a_summary_adds_up_what_the_calls_say(books: Books, by: str, field: str) -> None:
    expected: dict[Any, list[Any]] = defaultdict(lambda: [0, 0, 0, Decimal(0)])
    for call in books.calls():
        total = expected[call[field][:10] if by == "day" else call[field]]
        total[0] += 1
        total[1] += call["captured"]
        total[2] += call["status"] == "voided"
        total[3] += Decimal(call["cost_usd"] or 0)
    found = books.data(f"?by={by}")
    assert all(list(row) == [by, "calls", "captured", "failed", "cost_usd"] for row in found)
    assert all(re.fullmatch(r"\d+(\.\d+)?", row["cost_usd"]) for row in found)
    assert {
        row[by]: [row["calls"], row["captured"], row["failed"], Decimal(row["cost_usd"])]
        for row in found
    } == expected
    assert sum(row["calls"] for row in found) == 15
    if by != "day":
        assert [row["captured"] for row in found] == sorted(
            (row["captured"] for row in found), reverse=True
        )
        assert len(found) >= 2


def test_a_summary_by_member_counts_calls_in_flight_and_failures(books: Books) -> None:
    home = books.home
    found = {row["member"]: row for row in books.data("?by=member")}
    assert set(found) == {home.owner.id, home.second.id, home.member.id}
    # Two calls of an SMS (one and two segments) and an echo, each by key and by token.
    assert found[home.owner.id] == {
        "member": home.owner.id, "calls": 7, "captured": 12, "failed": 0, "cost_usd": "0.0474",
    }  # fmt: skip
    assert (found[home.member.id]["calls"], found[home.member.id]["failed"]) == (7, 1)
    assert list(found[home.second.id].values())[1:] == [1, 0, 1, "0"]
    assert {row["model"] for row in books.data("?by=model")} == {"big", "small", None}


def test_costs_are_added_up_exactly(box: Box) -> None:
    books = Books(box)
    for number, cost in enumerate(
        ["0.1", "0.2", "0.10", "123456789012345678901234567890.000000000000000001", None], start=1
    ):
        books.set(number, "cost_usd", cost)
    total = sum((Decimal(row["cost_usd"]) for row in books.data("?by=key")), Decimal(0))
    (day,) = books.data("")
    assert day["cost_usd"] == "123456789012345678901234567890.447400000000000001"
    assert total  # the sum over the keys is Python's own, and rounded


def test_the_days_of_a_summary_are_utc_and_in_order(box: Box) -> None:
    books = Books(box)
    moments = [
        "2026-02-28T23:59:59.999Z", "2026-03-01T00:00:00Z", "2026-03-01T23:59:59.999Z",
        "2026-03-02T00:00:00Z", "2025-12-31T12:00:00Z",
    ]  # fmt: skip
    for number, at in enumerate(moments, start=1):
        books.set(number, "created_at", clock.parse_rfc3339(at))
    for number in range(6, 16):
        books.set(number, "created_at", 0)

    def days(query: str) -> list[tuple[str, int]]:
        return [(row["day"], row["calls"]) for row in books.data(query)]

    everything = [("2025-12-31", 1), ("2026-02-28", 1), ("2026-03-01", 2), ("2026-03-02", 1)]
    assert days("?from=2025-12-01&to=2026-04-01") == everything
    assert days("?by=day&from=2026-03-01&to=2026-03-02") == [("2026-03-01", 2)]
    assert days("?from=2026-03-01&to=2026-03-01") == []
    assert days("?to=2026-03-02T00:00:00.001Z") == everything[1:]  # thirty days before `to`
    assert days("?to=2026-03-02T00:00:00Z") == everything[1:3]
    east, west = quote("2026-03-01T02:00:00+02:00"), quote("2026-03-01T19:00:00-05:00")
    assert days(f"?from={east}&to={west}") == [("2026-03-01", 2)]
    assert days("?from=2026-02-28T23:59:59.999Z&to=2026-03-01") == [("2026-02-28", 1)]
    assert days("?from=2025-03-01&to=2026-03-02") == everything[:3]  # 366 days
    assert days("") == []  # the last thirty days, as wherever only the end is named
    assert days("?to=2026-03-30T23:59:59.999Z") == everything[1:]
    assert days("?to=2026-03-31") == everything[2:]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("by=", "by"), ("by=account", "by"), ("by=Day", "by"), ("by=user_id", "by"),
        ("by=day%20", "by"), ("from=", "from"), ("from=yesterday", "from"), ("to=x", "to"),
        ("from=2026-02-29", "from"), ("from=2026-01-01T00:00:00", "from"),
        ("to=2026-01-01T00:00:00%2B99:00", "to"), ("to=9999-12-31T23:59:59-01:00", "to"),
        ("from=1767225600", "from"), ("from=2026-03-02&to=2026-03-01", "from"),
        ("from=2025-03-01&to=2026-03-02T00:00:00.001Z", "from"), ("from=2001-01-01", "from"),
        ("from=2999-01-01", "from"), ("from=%D9%A2%D9%A0%D9%A2%D9%A6-01-01", "from"),
        ("to=2026-13-01", "to"),
    ],
)  # fmt: skip
def test_a_bad_question_is_named(books: Books, query: str, param: str) -> None:
    refused(books.summary(f"?{query}"), 400, "validation_error", param)


def test_only_a_session_token_gets_a_summary_and_only_of_its_account(
    box: Box, books: Books
) -> None:
    home = books.home
    key = key_of(box, home.owner)
    for token, outcome in (
        (key, (403, "session_required")),
        (OPERATOR_KEY, (403, "session_required")),
        (STRANGERS_KEY, (401, "invalid_api_key")),
    ):
        refused(books.summary("", token), *outcome)
    refused(box.get("/api/v1/usage/summary"), 401, "missing_api_key")
    for who in (home.second, home.member):
        assert books.summary("?by=key", who.token).json() == {"data": books.data("?by=key")}
    assert books.summary("?by=key", home.stranger.token).json() == {"data": []}
