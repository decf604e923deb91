"""API keys over HTTP: who may do what to which key, what is read strictly, what holds at once."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from browser import PASSWORD, Browser
from conftest import StartFarebox
from inprocess import STRANGERS_KEY, Box, Clock
from people import (
    CONFIG,
    House,
    Person,
    cheaply,
    house,
    joined,
    minted,
    pages,
    person,
    told,
)  # fmt: skip
from server import OPERATOR_KEY, Answer

from core import access, clock, keys, members
from core.audit import COMMAND_LINE, Actor

KEYS = "/api/v1/keys"
SHOWN = [
    "id", "name", "start", "user_id", "scopes", "status", "expires_at", "credit_limit",
    "credit_period", "rate_limit", "created_at", "last_used_at",
]  # fmt: skip
WITH_SECRET = [*SHOWN[:2], "key", *SHOWN[2:]]
# Every verb of one key, with a body that would do something.
VERBS: dict[str, tuple[str, str, object]] = {
    "show": ("GET", "", None),
    "change": ("PATCH", "", {"name": "another"}),
    "rotate": ("POST", "/rotate", {"grace_seconds": 60}),
    "suspend": ("POST", "/suspend", {"reason": "why"}),
    "resume": ("POST", "/resume", None),
    "revoke": ("DELETE", "", None),
}
CHANGING = [name for name in VERBS if name != "show"]
SECOND, DAY = 1000, 86_400


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


def do(box: Box, verb: str, key_id: str, token: str | None, **options: Any) -> Answer:
    method, suffix, value = VERBS[verb]
    sent: dict[str, Any] = {"value": value} | options
    return box.request(method, f"{KEYS}/{key_id}{suffix}", key=token, **sent)


def made(box: Box, who: Person, **terms: Any) -> dict[str, Any]:
    answer = box.post(KEYS, who.token, {"name": "k"} | terms)
    assert answer.status == 201, answer.body
    shown: dict[str, Any] = answer.json()
    return shown


def suspended_if_resumed(box: Box, verb: str, key_id: str, who: str = "user_of_the_tests") -> None:
    """What is to be resumed has to be suspended first, by somebody of its account."""
    if verb == "resume":
        by, now = Actor(who), clock.now_ms()
        box.write(lambda tx: keys.suspend(tx, key_id, None, now, by))


def shown(box: Box, who: Person, key_id: str) -> dict[str, Any]:
    answer = do(box, "show", key_id, who.token)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


def echo(box: Box, key: str) -> tuple[int, str | None]:
    return told(box.get("/api/v1/echo", key))


def change(box: Box, who: Person, key_id: str, **changes: object) -> Answer:
    return do(box, "change", key_id, who.token, value=changes)


def everything(box: Box) -> tuple[list[tuple[Any, ...]], int]:
    """All keys but for their last use, and how many actions were recorded."""
    with box.instance.db.reading() as tx:
        found = tx.rows(
            "SELECT id, account_id, user_id, name, lookup, start, hash, previous_hash,"
            " previous_until, status, suspended_by, status_reason, scopes, expires_at,"
            " credit_limit, credit_period, rate_limit, number FROM api_key ORDER BY id"
        )
        done = tx.row("SELECT COUNT(*) FROM audit WHERE action <> 'operator_key.used'")
    assert done is not None
    return found, done[0]


def refused(answer: Answer, status: int, code: str) -> None:
    """Refused with that code in the flat dialect, and no retry can mend it."""
    assert told(answer) == (status, code), answer.body
    assert list(answer.json())[:3] == ["success", "error", "message"]
    assert answer.headers["x-should-retry"] == "false"
    assert ("WWW-Authenticate" in answer.headers) is (status == 401)
    assert answer.headers["Cache-Control"] == "no-store"


# Who may.


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("who", "whose", "outcome"),
    [
        ("owner", "owner", 200),
        ("owner", "member", 200),
        ("owner", "nobody", 200),
        ("second", "owner", 200),
        ("second", "member", 200),
        ("member", "member", 200),
        ("member", "owner", (403, "forbidden")),
        ("member", "nobody", (403, "forbidden")),
        ("stranger", "owner", (404, "not_found")),
        ("stranger", "member", (404, "not_found")),
    ],
)
def test_owners_manage_all_keys_members_their_own_and_strangers_none(
    box: Box, home: House, verb: str, who: str, whose: str, outcome: Any
) -> None:
    key_id = box.key(home.account)[1] if whose == "nobody" else made(box, home[whose])["id"]
    suspended_if_resumed(box, verb, key_id, home[who].id)
    before = everything(box)
    answer = do(box, verb, key_id, home[who].token)
    if outcome == 200:
        assert answer.status == (204 if verb == "revoke" else 200), answer.body
        assert (everything(box) == before) is (verb == "show")
    else:
        refused(answer, *outcome)
        assert everything(box) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_key_of_another_account_is_as_unknown_as_none(box: Box, home: House, verb: str) -> None:
    theirs = do(box, verb, made(box, home.owner)["id"], home.stranger.token)
    nobodys = do(box, verb, "key_0123456789", home.stranger.token)
    hers = do(box, verb, "key_0123456789", home.owner.token)
    refused(nobodys, 404, "not_found")
    assert {k: v for k, v in theirs.json().items() if k != "request_id"} == {
        k: v for k, v in nobodys.json().items() if k != "request_id"
    }
    assert told(hers) == told(nobodys)


@pytest.fixture(scope="module")
def cookie(box: Box) -> str:
    """The Cookie header of somebody who is signed in at the dashboard."""
    email = "browser@example.com"
    added = box.cli("users", "add", email, "--password-stdin", stdin=PASSWORD + "\n")
    assert added.exit_code == 0, added.output
    browser = Browser(box)
    assert browser.sign_in(email).status == 303
    assert browser.get("/dashboard").status == 200
    return "; ".join(f"{name}={value}" for name, value in browser.cookies.items())


@pytest.mark.parametrize(
    ("credential", "status", "code"),
    [
        ("its own key", 403, "session_required"),
        ("another key of the account", 403, "session_required"),
        ("the operator key", 403, "session_required"),
        ("nothing", 401, "missing_api_key"),
        ("a cookie", 401, "missing_api_key"),
        ("Basic", 401, "missing_api_key"),
        ("a well-formed key", 401, "invalid_api_key"),
        ("a forged token", 401, "invalid_token"),
        ("a token cut short", 401, "invalid_token"),
    ],
)
@pytest.mark.parametrize("verb", [*VERBS, "list", "create"])
def test_only_a_session_token_manages_keys(
    box: Box, home: House, cookie: str, verb: str, credential: str, status: int, code: str
) -> None:
    subject, another = made(box, home.owner), made(box, home.owner)
    token = {
        "its own key": subject["key"],
        "another key of the account": another["key"],
        "the operator key": OPERATOR_KEY,
        "a well-formed key": STRANGERS_KEY,
        "a forged token": home.stranger.token.rpartition(".")[0] + "." + "A" * 86,
        "a token cut short": home.owner.token[:-10],
    }.get(credential)
    headers = {
        "a cookie": {"Cookie": cookie, "X-CSRF-Token": "x"},
        "Basic": {"Authorization": "Basic dTpw"},
    }.get(credential, {})
    before = everything(box)
    if verb in VERBS:
        answer = do(box, verb, subject["id"], token, headers=headers)
    else:
        method, value = ("GET", None) if verb == "list" else ("POST", {"name": "n"})
        answer = box.request(method, KEYS, key=token, value=value, headers=headers)
    refused(answer, status, code)
    assert everything(box) == before


@pytest.mark.parametrize("verb", [*VERBS, "list", "create"])
@pytest.mark.parametrize("what", ["account", "person"])
def test_whoever_is_suspended_manages_nothing(box: Box, verb: str, what: str) -> None:
    owner = person(box)
    subject = made(box, owner)["id"]
    if what == "account":
        box.cli("accounts", "suspend", owner.email, "--reason", "unpaid")
        expected = (403, "account_suspended")
    else:
        box.cli("users", "suspend", owner.email)
        expected = (401, "invalid_token")  # the sign-in ended, and its token with it
    before = everything(box)
    if verb in VERBS:
        answer = do(box, verb, subject, owner.token)
    else:
        value = None if verb == "list" else {"name": "n"}
        answer = box.request("POST" if value else "GET", KEYS, key=owner.token, value=value)
    refused(answer, *expected)
    if what == "account":
        assert answer.json()["reason"] == "unpaid"
    assert everything(box) == before


@pytest.mark.parametrize(
    ("path", "methods", "allowed"),
    [
        ("", ("PUT", "PATCH", "DELETE"), {"GET", "HEAD", "OPTIONS", "POST"}),
        ("/{id}", ("POST", "PUT"), {"GET", "HEAD", "OPTIONS", "PATCH", "DELETE"}),
        ("/{id}/rotate", ("GET", "PUT", "DELETE"), {"POST", "OPTIONS"}),
        ("/{id}/suspend", ("GET", "PATCH", "DELETE"), {"POST", "OPTIONS"}),
        ("/{id}/resume", ("GET", "PUT", "DELETE"), {"POST", "OPTIONS"}),
    ],
)
def test_other_methods_are_answered_with_those_that_are_allowed(
    box: Box, home: House, path: str, methods: tuple[str, ...], allowed: set[str]
) -> None:
    target = KEYS + path.replace("{id}", made(box, home.owner)["id"])
    before = everything(box)
    for method in methods:
        answer = box.request(method, target, key=home.owner.token)
        refused(answer, 405, "method_not_allowed")
        assert set(answer.headers["Allow"].split(", ")) == allowed
        assert told(box.request(method, target)) == (405, "method_not_allowed")
    assert everything(box) == before
    for unknown in ("/", "/x/y", "/x/rotate/", "//"):
        assert told(box.get(KEYS + unknown, home.owner.token)) == (404, "not_found")


# Shapes.


def test_a_key_is_made_with_all_its_terms_and_shown_in_the_contracts_order(
    box: Box, home: House, time: Clock
) -> None:
    answer = box.post(
        KEYS, home.owner.token,
        {
            "name": "for the shop · 1", "scopes": ["sms:send", "model:*"],
            "expires_at": "2999-01-31T01:00:00.750+01:00", "credit_limit": 0,
            "credit_period": "week", "rate_limit": 5,
        },
    )  # fmt: skip
    assert answer.status == 201
    found = answer.json()
    assert list(found) == WITH_SECRET
    secret = found.pop("key")
    assert secret.startswith(found["start"]) and len(found["start"]) < len(secret) - 20
    assert found == {
        "id": found["id"],
        "name": "for the shop · 1",
        "start": secret[: len(found["start"])],
        "user_id": home.owner.id,
        "scopes": ["sms:send", "model:*"],
        "status": "active",
        "expires_at": "2999-01-31T00:00:00Z",
        "credit_limit": 0,
        "credit_period": "week",
        "rate_limit": 5,
        "created_at": clock.rfc3339(time.now),
        "last_used_at": None,
    }
    assert found["id"].startswith("key_")
    assert shown(box, home.owner, found["id"]) == found
    assert answer.headers["X-RateLimit-Limit"] == "1000000"


def test_a_key_with_nothing_but_a_name_is_not_restricted(box: Box, home: House) -> None:
    found = made(box, home.member, name="x" * 100)
    assert (found["user_id"], found["status"]) == (home.member.id, "active")
    for term in ("scopes", "expires_at", "credit_limit", "credit_period", "rate_limit"):
        assert found[term] is None
    explicit = made(box, home.owner, scopes=None, expires_at=None, credit_limit=None)
    assert explicit["scopes"] is None
    assert made(box, home.owner, scopes=[])["scopes"] == []
    assert made(box, home.owner, scopes=["a"] * 2)["scopes"] == ["a", "a"]


def test_a_secret_is_shown_when_it_is_new_and_never_again(box: Box, home: House) -> None:
    new = made(box, home.owner)
    key_id = new["id"]
    rotated = do(box, "rotate", key_id, home.owner.token)
    assert rotated.status == 200 and list(rotated.json()) == WITH_SECRET
    secrets = [new["key"], rotated.json()["key"]]
    assert secrets[0] != secrets[1] and rotated.json()["start"] != new["start"]
    for verb in ("show", "change", "suspend", "resume", "revoke", "show"):
        answer = do(box, verb, key_id, home.owner.token)
        if verb == "revoke":
            assert (answer.status, answer.body) == (204, b"")
        else:
            assert answer.status == 200 and list(answer.json()) == SHOWN
        for secret in secrets:
            assert secret.encode() not in answer.body
            assert secret[18:36].encode() not in answer.body
    listed = box.get(KEYS, home.owner.token).body
    assert key_id.encode() in listed and all(s.encode() not in listed for s in secrets)


def test_a_created_key_pays_and_its_calls_name_the_person(box: Box, home: House) -> None:
    before = box.standing(home.account)[0]
    key = made(box, home.member, scopes=["sms:send"])
    answer = box.sms(key["key"])
    assert answer.status == 200 and answer.headers["X-Credits-Charged"] == "1"
    assert box.standing(home.account)[0] == before - 1
    record = box.record(home.owner.token, answer)
    assert (record["payer"], record["key_id"], record["user_id"]) == (
        "api_key", key["id"], home.member.id,
    )  # fmt: skip
    assert shown(box, home.member, key["id"])["last_used_at"] is not None


# What is read, strictly.


def each(field: str, *values: object) -> list[tuple[str, object]]:
    return [(field, value) for value in values]


BAD_FIELDS = [
    *each("name", "", "x" * 101, "a\x00", "a\nb", "\x7f", "a\u202eb", "\u2028"),
    *each("name", None, 1, True, 1.5, ["a"], {"a": 1}),
    *each("scopes", "sms:send", 1, True, {}, [1], [None], [["a"]], [True], ["a"] * 101),
    *each("scopes", [""], [" "], ["a b"], ["A"], ["é"], ["a,b"], ["-a"], ["a" * 101], ["a\n"]),
    *each(
        "expires_at",
        "2001-01-01T00:00:00Z", "1969-12-31T23:59:59Z", "0001-01-01T00:00:00+01:00", "",
        "soon", "2999-01-31", "2999-01-31T00:00:00", "2999-02-29T00:00:00Z",
        "2999-13-01T00:00:00Z", "2999-01-31T25:00:00Z", "2998-12-31T23:59:60Z",
        "9999-12-31T23:59:59-01:00", "2999-01-31T00:00:00+99:00", "٢٩٩٩-01-31T00:00:00Z",
        "2999-01-31T00:00:00Z\n", "12999-01-31T00:00:00Z", 32_472_144_000, 1.5, True, [], {},
    ),
    *each("credit_limit", True, 1.0, 1.5, 1e2, "5", [], {}, "٥", ""),
    *each("rate_limit", -1, 10**9 + 1, 10**30, True, 1.0, "5", [], {}),
    *each("credit_period", 1, True, [], {}),
]  # fmt: skip
BAD_LIMITS: list[tuple[dict[str, object], str]] = [
    ({"credit_limit": 5}, "credit_period"),
    ({"credit_period": "day"}, "credit_period"),
    ({"credit_limit": None, "credit_period": "day"}, "credit_period"),
    ({"credit_limit": 5, "credit_period": None}, "credit_period"),
]
for amount in (-1, 10**15 + 1, 2**63, -(2**63), 2**64, 10**30):
    BAD_LIMITS.append(({"credit_limit": amount, "credit_period": "day"}, "credit_limit"))
for period in ("", "Day", "year", "day ", "DAY"):
    BAD_LIMITS.append(({"credit_limit": 5, "credit_period": period}, "credit_period"))
BAD_UNKNOWN: list[dict[str, object]] = [
    {"nmae": "x"}, {"key": "fare_live_x"}, {"user_id": "user_x"}, {"status": "active"},
    {"account_id": "acct_x"}, {"id": "key_x"}, {"": 1}, {"Name": "x"}, {"grace_seconds": 0},
]  # fmt: skip


def fails(box: Box, who: Person, key_id: str, value: dict[str, object], param: str | None) -> None:
    """Neither a new key nor the change of one takes these fields."""
    before = everything(box)
    for answer in (
        box.post(KEYS, who.token, {"name": "k"} | value),
        change(box, who, key_id, **value),
    ):
        refused(answer, 400, "validation_error")
        assert (answer.json().get("param") or "").partition("[")[0] == (param or ""), answer.body
    assert everything(box) == before


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda v: ascii(v)[:40])
def test_a_bad_field_is_named(box: Box, home: House, field: str, value: object) -> None:
    fails(box, home.owner, subject(box, home), {field: value}, field)


@pytest.mark.parametrize(("value", "param"), BAD_LIMITS, ids=lambda v: ascii(v)[:60])
def test_a_limit_and_its_period_go_together(
    box: Box, home: House, value: dict[str, object], param: str
) -> None:
    fails(box, home.owner, subject(box, home), value, param)


@pytest.mark.parametrize("value", BAD_UNKNOWN, ids=lambda v: next(iter(v)))
def test_an_unknown_field_is_refused(box: Box, home: House, value: dict[str, object]) -> None:
    fails(box, home.owner, subject(box, home), value, next(iter(value)) or None)
    for verb in ("rotate", "suspend", "resume"):
        before = everything(box)
        wrong = {k: v for k, v in value.items() if k != "grace_seconds"} or {"grace": 1}
        refused(
            do(box, verb, subject(box, home), home.owner.token, value=wrong),
            400, "validation_error",
        )  # fmt: skip
        assert everything(box) == before


@pytest.fixture(scope="module")
def _subjects() -> dict[str, str]:
    return {}


def subject(box: Box, home: House) -> str:
    """One key of the owner's that no test of bad input changes."""
    (found,) = box.row(
        "SELECT MIN(id) FROM api_key WHERE account_id = :a AND name = 'subject'", a=home.account
    )
    return str(found or made(box, home.owner, name="subject")["id"])


RAW = [
    b"[]", b"null", b'"name"', b"1", b"true", b"{", b'{"name":"a"', b'{"name":"a",}', b"{'name':1}",
    b'{"name":"a"} x', b'{"name":"a"}{}', b'{name:"a"}', b'\xef\xbb\xbf{"name":"a"}', b"\xff\xfe",
    b'{"name":"\xff"}', b'{"name":"\\ud800"}', b'{"name":"a","credit_limit":NaN}', b"\x00",
    b'{"name":"a","rate_limit":Infinity}', b'{"name":"a","rate_limit":1e999}', b"[" * 60_000,
    b'{"name":' * 7_000, b"name=a", '{"name":"a"}'.encode("utf-16"), b'{"name":"a" /**/}',
]  # fmt: skip


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: ascii(raw[:24]))
def test_what_is_not_a_json_object_is_refused_everywhere(box: Box, home: House, raw: bytes) -> None:
    key_id = subject(box, home)
    before = everything(box)
    answers = [
        do(box, verb, key_id, home.owner.token, value=None, body=raw)
        for verb in ("change", "rotate", "suspend", "resume")
    ]
    for answer in [box.request("POST", KEYS, key=home.owner.token, body=raw), *answers]:
        refused(answer, 400, "validation_error")
    assert everything(box) == before


def test_a_missing_name_is_named_and_an_empty_body_is_an_empty_object(
    box: Box, home: House
) -> None:
    bodies: list[dict[str, Any]] = [{"value": {}}, {"body": b""}, {}, {"value": {"scopes": []}}]
    for options in bodies:
        answer = box.request("POST", KEYS, key=home.owner.token, **options)
        refused(answer, 400, "validation_error")
        assert answer.json()["param"] == "name"
    key = made(box, home.owner, name="as it was")
    for verb in ("change", "rotate", "suspend", "resume"):
        answer = do(box, verb, key["id"], home.owner.token, value=None)
        assert answer.status == 200, answer.body
    assert answer.json()["name"] == "as it was"
    assert echo(box, key["key"])[0] == 401  # rotated without grace


def test_the_last_of_two_members_of_the_same_name_counts(box: Box, home: House) -> None:
    raw = b'{"name":"first","rate_limit":1,"name":"last","rate_limit":2}'
    found = box.request("POST", KEYS, key=home.owner.token, body=raw).json()
    assert (found["name"], found["rate_limit"]) == ("last", 2)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "application/jsonp"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "identity, gzip"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "Identity"}, 201),
        ({"Content-Type": "application/json; charset=utf-8"}, 201),
        ({"Content-Type": "Application/JSON"}, 201),
        ({}, 201),
    ],
    ids=str,
)
def test_only_plain_json_is_a_body(
    box: Box, home: House, headers: dict[str, str], status: int
) -> None:
    before = everything(box)
    body = b'{"name":"a"}'
    answer = box.request("POST", KEYS, key=home.owner.token, body=body, headers=headers)
    if status == 201:
        assert answer.status == 201, answer.body
        return
    refused(answer, 415, "unsupported_media_type")
    key_id = subject(box, home)
    before = everything(box)
    for verb in ("change", "rotate", "suspend", "resume"):
        answer = do(box, verb, key_id, home.owner.token, value=None, body=b"{}", headers=headers)
        refused(answer, 415, "unsupported_media_type")
    assert everything(box) == before


def test_a_body_may_have_64_kib_and_not_a_byte_more(box: Box, home: House) -> None:
    body = b'{"name":"padded"}'.ljust(64 * 1024)
    assert box.request("POST", KEYS, key=home.owner.token, body=body).status == 201
    before = everything(box)
    refused(
        box.request("POST", KEYS, key=home.owner.token, body=body + b" "), 413, "body_too_large"
    )
    answer = do(box, "change", subject(box, home), home.owner.token, value=None, body=body + b" ")
    refused(answer, 413, "body_too_large")
    assert everything(box) == before


# Changes.

TERMS: dict[str, Any] = {
    "name": "old", "scopes": ["sms:send"], "expires_at": "2999-01-31T00:00:00Z",
    "credit_limit": 50, "credit_period": "month", "rate_limit": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "new"},
        {"scopes": ["up", "sms:send"]},
        {"scopes": []},
        {"scopes": None},
        {"expires_at": "2998-01-01T00:00:00Z"},
        {"expires_at": None},
        {"credit_limit": 7},
        {"credit_limit": 10**15},
        {"credit_period": "total"},
        {"credit_limit": None, "credit_period": None},
        {"rate_limit": 0},
        {"rate_limit": None},
        {"name": "n", "scopes": None, "expires_at": None, "rate_limit": 1},
    ],
    ids=str,
)
def test_a_change_leaves_what_it_does_not_name_and_null_clears(
    box: Box, home: House, changes: dict[str, Any]
) -> None:
    key = made(box, home.owner, **TERMS)
    answer = change(box, home.owner, key["id"], **changes)
    assert answer.status == 200 and list(answer.json()) == SHOWN
    del key["key"]
    assert answer.json() == key | changes
    assert shown(box, home.owner, key["id"]) == key | changes


def test_a_change_holds_for_the_very_next_call(box: Box, home: House, time: Clock) -> None:
    key = made(box, home.owner)
    call = partial(echo, box, key["key"])
    set_to = partial(change, box, home.owner, key["id"])
    steps: list[tuple[dict[str, object], tuple[int, str | None]]] = [
        ({"scopes": []}, (403, "missing_scope")),
        ({"scopes": ["sms:send"]}, (403, "missing_scope")),
        ({"scopes": None}, (200, None)),
        ({"rate_limit": 1}, (429, "rate_limited")),
        ({"rate_limit": None}, (200, None)),
        ({"credit_limit": 2, "credit_period": "day"}, (403, "credit_limit_reached")),
        ({"credit_limit": None, "credit_period": None}, (200, None)),
        ({"expires_at": clock.rfc3339(time.now + 5 * SECOND)}, (200, None)),
    ]
    assert call() == (200, None)
    for changes, expected in steps:
        assert set_to(**changes).status == 200
        assert call() == expected, changes
    time.forward(seconds=6)
    assert call() == (401, "invalid_api_key")
    refused(set_to(expires_at=None), 409, "conflict")


def test_a_changed_limit_does_not_start_its_count_anew(box: Box, home: House, time: Clock) -> None:
    key = made(box, home.owner, credit_limit=7, credit_period="day")
    call = partial(echo, box, key["key"])
    set_to = partial(change, box, home.owner, key["id"])
    full = (403, "credit_limit_reached")
    assert [call(), call(), call()] == [(200, None), (200, None), full]
    set_to(credit_limit=9)
    assert [call(), call()] == [(200, None), full]
    set_to(credit_limit=3)
    assert call() == full
    set_to(credit_limit=12, name="renamed")
    assert [call(), call()] == [(200, None), full]
    answer = box.get("/api/v1/echo", key["key"]).json()
    day_end = clock.period_start_ms("day", time.now) + DAY * SECOND
    assert (answer["limit"], answer["period"], answer["resets_at"]) == (
        12, "day", clock.rfc3339(day_end),
    )  # fmt: skip
    do(box, "rotate", key["id"], home.owner.token)
    assert call() == full


def test_an_expiry_moved_forward_ends_the_rotated_out_secret_too(
    box: Box, home: House, time: Clock
) -> None:
    key = made(box, home.owner)
    rotated = do(
        box, "rotate", key["id"], home.owner.token, value={"grace_seconds": 7 * DAY}
    ).json()["key"]
    in_a_minute = clock.rfc3339(time.now + 60 * SECOND)
    assert change(box, home.owner, key["id"], expires_at=in_a_minute).status == 200
    assert change(box, home.owner, key["id"], expires_at=None).status == 200
    assert (echo(box, key["key"]), echo(box, rotated)) == ((200, None), (200, None))
    time.forward(seconds=61)
    assert echo(box, key["key"]) == (401, "invalid_api_key")
    assert echo(box, rotated) == (200, None)


# Rotation.


@pytest.mark.parametrize("grace", [1, 3600, 7 * DAY])
def test_a_rotated_out_secret_works_for_its_grace_and_no_longer(
    box: Box, time: Clock, grace: int
) -> None:
    owner = person(box, 100)
    key = made(box, owner)
    answer = do(box, "rotate", key["id"], owner.token, value={"grace_seconds": grace})
    assert answer.status == 200
    new = answer.json()["key"]
    assert answer.json() == key | {"key": new, "start": answer.json()["start"]}
    time.forward(ms=grace * SECOND - 1)
    assert (echo(box, key["key"]), echo(box, new)) == ((200, None), (200, None))
    time.forward(ms=1)
    assert (echo(box, key["key"]), echo(box, new)) == ((401, "invalid_api_key"), (200, None))
    assert told(box.get("/api/v1/account", key["key"])) == (401, "invalid_api_key")


@pytest.mark.parametrize("body", [{}, {"grace_seconds": 0}], ids=str)
def test_without_grace_the_old_secret_is_refused_at_once(
    box: Box, home: House, body: dict[str, int]
) -> None:
    key = made(box, home.owner)
    new = do(box, "rotate", key["id"], home.owner.token, value=body).json()["key"]
    assert echo(box, key["key"]) == (401, "invalid_api_key")
    assert echo(box, new) == (200, None)


def test_only_the_last_rotated_out_secret_has_a_grace(box: Box, home: House) -> None:
    key = made(box, home.owner)
    first, second = (do(box, "rotate", key["id"], home.owner.token).json()["key"] for _ in range(2))
    assert echo(box, key["key"]) == (401, "invalid_api_key")
    assert (echo(box, first), echo(box, second)) == ((200, None), (200, None))
    third = do(box, "rotate", key["id"], home.owner.token, value={}).json()["key"]
    assert [echo(box, secret)[0] for secret in (first, second, third)] == [401, 401, 200]


@pytest.mark.parametrize(
    "grace", [-1, 7 * DAY + 1, 10**30, -(10**30), True, 0.0, 1.5, "0", None, [], {}]
)
def test_a_grace_is_whole_seconds_up_to_seven_days(box: Box, home: House, grace: object) -> None:
    before = everything(box)
    answer = do(box, "rotate", subject(box, home), home.owner.token, value={"grace_seconds": grace})
    refused(answer, 400, "validation_error")
    assert answer.json()["param"] == "grace_seconds"
    assert everything(box) == before


def test_a_rotation_lifts_no_suspension(box: Box, home: House) -> None:
    key = made(box, home.owner)
    do(box, "suspend", key["id"], home.owner.token)
    rotated = do(box, "rotate", key["id"], home.owner.token)
    assert (rotated.status, rotated.json()["status"]) == (200, "suspended")
    for secret in (key["key"], rotated.json()["key"]):
        assert echo(box, secret) == (403, "key_suspended")


# Suspension.


@pytest.mark.parametrize("reason", [None, "x", "it leaked · ask Ann", "x" * 200])
def test_a_suspended_key_is_refused_with_the_reason_until_it_is_resumed(
    box: Box, home: House, reason: str | None
) -> None:
    key = made(box, home.member)
    value = {} if reason is None else {"reason": reason}
    answer = do(box, "suspend", key["id"], home.member.token, value=value)
    assert (answer.status, answer.json()["status"]) == (200, "suspended")
    for refusal in (box.get("/api/v1/echo", key["key"]), box.get("/api/v1/account", key["key"])):
        refused(refusal, 403, "key_suspended")
        assert refusal.json()["reason"] == reason
    answer = do(box, "resume", key["id"], home.member.token)
    assert (answer.status, answer.json()["status"]) == (200, "active")
    assert echo(box, key["key"]) == (200, None)
    refused(do(box, "resume", key["id"], home.member.token), 409, "conflict")


@pytest.mark.parametrize("reason", ["", "x" * 201, "a\nb", "\x00", 1, True, [], {}, 1.5])
def test_a_reason_is_something_that_can_be_shown(box: Box, home: House, reason: object) -> None:
    before = everything(box)
    answer = do(box, "suspend", subject(box, home), home.owner.token, value={"reason": reason})
    refused(answer, 400, "validation_error")
    assert answer.json()["param"] == "reason"
    assert everything(box) == before


@pytest.mark.parametrize("first_by_owner", [False, True])
def test_what_the_operator_suspended_only_the_operator_resumes(
    box: Box, home: House, first_by_owner: bool
) -> None:
    key = made(box, home.owner)
    if first_by_owner:
        do(box, "suspend", key["id"], home.owner.token)
    assert box.cli("keys", "suspend", key["id"], "--reason", "abuse").exit_code == 0
    for who in (home.owner, home.second):
        refused(do(box, "resume", key["id"], who.token), 403, "forbidden")
        refused(do(box, "suspend", key["id"], who.token), 409, "conflict")
    assert change(box, home.owner, key["id"], name="still").json()["status"] == "suspended"
    answer = box.get("/api/v1/echo", key["key"])
    assert (answer.code, answer.json()["reason"]) == ("key_suspended", "abuse")
    assert box.cli("keys", "resume", key["id"]).exit_code == 0
    assert echo(box, key["key"]) == (200, None)
    # What the owner suspended, the operator resumes too.
    do(box, "suspend", key["id"], home.owner.token)
    assert box.cli("keys", "resume", key["id"]).exit_code == 0
    assert echo(box, key["key"]) == (200, None)


# The end.


def test_a_revoked_key_is_gone_for_good(box: Box, home: House) -> None:
    key = made(box, home.owner)
    rotated = do(box, "rotate", key["id"], home.owner.token).json()["key"]
    assert do(box, "revoke", key["id"], home.owner.token).status == 204
    after = everything(box)
    for secret in (key["key"], rotated):
        assert echo(box, secret) == (401, "invalid_api_key")
    again = do(box, "revoke", key["id"], home.owner.token)
    assert (again.status, again.body) == (204, b"")
    for verb in ("change", "rotate", "suspend", "resume"):
        refused(do(box, verb, key["id"], home.owner.token), 409, "conflict")
    assert everything(box) == after
    assert shown(box, home.owner, key["id"])["status"] == "revoked"


@pytest.mark.parametrize(
    "value",
    [
        {"credit_limit": 10**30},
        {"rate_limit": -1},
        {"name": ""},
    ],
    ids=str,
)
@pytest.mark.parametrize("ended", ["revoked", "expired"])
def test_a_bad_change_of_an_ended_key_is_refused_like_any_other(
    box: Box, home: House, time: Clock, ended: str, value: dict[str, object]
) -> None:
    key = made(box, home.owner, expires_at=clock.rfc3339(time.now + 2 * SECOND))
    if ended == "revoked":
        do(box, "revoke", key["id"], home.owner.token)
    else:
        time.forward(seconds=3)
    before = everything(box)
    assert told(change(box, home.owner, key["id"], **value))[0] in (400, 409)
    assert everything(box) == before


def test_an_expired_key_neither_changes_nor_rotates_and_can_be_revoked(
    box: Box, home: House, time: Clock
) -> None:
    key = made(box, home.owner, expires_at=clock.rfc3339(time.now + 2 * SECOND))
    time.forward(seconds=3)
    assert shown(box, home.owner, key["id"])["status"] == "expired"
    assert echo(box, key["key"]) == (401, "invalid_api_key")
    before = everything(box)
    for verb in ("change", "rotate"):
        refused(do(box, verb, key["id"], home.owner.token), 409, "conflict")
    refused(change(box, home.owner, key["id"], expires_at="2999-01-01T00:00:00Z"), 409, "conflict")
    assert everything(box) == before
    assert do(box, "revoke", key["id"], home.owner.token).status == 204
    assert shown(box, home.owner, key["id"])["status"] == "revoked"


def test_a_members_keys_die_with_the_membership(box: Box, home: House) -> None:
    guest = joined(box, home.owner)
    theirs, ours = made(box, guest), made(box, home.owner)
    elsewhere = box.post(KEYS, minted(box, guest.email), {"name": "k"}).json()
    assert echo(box, theirs["key"]) == (200, None)
    assert box.request("DELETE", f"/api/v1/members/{guest.member_id}", key=home.owner.token)
    assert echo(box, theirs["key"]) == (401, "invalid_api_key")
    refused(do(box, "show", theirs["id"], guest.token), 401, "invalid_token")
    assert shown(box, home.owner, theirs["id"])["status"] == "revoked"
    assert echo(box, ours["key"]) == (200, None)
    assert echo(box, elsewhere["key"]) == (402, "insufficient_credits")  # alive, on their own


# Lists.


def test_keys_are_listed_newest_first_page_by_page(box: Box, time: Clock) -> None:
    owner = person(box)
    made_ids = [made(box, owner, name=f"key {n}")["id"] for n in range(5)]  # in one millisecond
    assert do(box, "revoke", made_ids[2], owner.token).status == 204
    for limit, lengths in ((1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (100, [5])):
        found = list(pages(box, KEYS, owner.token, limit))
        assert [len(page) for page in found] == lengths
        listed = [key for page in found for key in page]
        assert [key["id"] for key in listed] == made_ids[::-1]
        assert all(list(key) == SHOWN for key in listed)
    assert [key["status"] for key in listed] == ["active"] * 2 + ["revoked"] + ["active"] * 2
    first = box.get(f"{KEYS}?limit=2", owner.token).json()
    made(box, owner)  # a new one does not disturb whoever is turning pages
    second = box.get(f"{KEYS}?limit=2&cursor={first['next_cursor']}", owner.token).json()
    assert [key["id"] for key in second["data"]] == [made_ids[2], made_ids[1]]
    assert box.get(f"{KEYS}?cursor=1", owner.token).json() == {
        "data": [], "has_more": False, "next_cursor": None,
    }  # fmt: skip


def test_a_page_has_fifty_keys_unless_told(box: Box) -> None:
    owner = person(box)
    many(box, owner, 51)
    page = box.get(KEYS, owner.token).json()
    assert (len(page["data"]), page["has_more"]) == (50, True)


@pytest.mark.parametrize("name", ["limit", "cursor"])
@pytest.mark.parametrize("text", ["0", "-1", "+1", "1.0", "x", "", "1_0", "%D9%A1", "9" * 16])
def test_a_bad_limit_or_cursor_is_named(box: Box, home: House, name: str, text: str) -> None:
    answer = box.get(f"{KEYS}?{name}={text}", home.owner.token)
    refused(answer, 400, "validation_error")
    assert answer.json()["param"] == name
    assert told(box.get(f"{KEYS}?limit=101", home.owner.token)) == (400, "validation_error")


def test_a_member_lists_their_own_keys_and_an_owner_all(box: Box) -> None:
    owner = person(box)
    member, other = joined(box, owner), joined(box, owner)
    _, nobodys = box.key(owner.account)
    ids = [made(box, who)["id"] for who in (member, other, owner, member)]
    lists = {
        who.id: [key["id"] for page in pages(box, KEYS, who.token, 1) for key in page]
        for who in (owner, member, other)
    }
    assert lists == {
        owner.id: [*ids[::-1], nobodys],
        member.id: [ids[3], ids[0]],
        other.id: [ids[1]],
    }
    at_home = minted(box, member.email)  # a token for the account they own
    assert box.get(KEYS, at_home).json()["data"] == []
    assert told(do(box, "show", ids[0], at_home)) == (404, "not_found")


def many(box: Box, owner: Person, count: int) -> None:
    """Keys behind the application's back."""
    box.run(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)"
        " INSERT INTO api_key (id, account_id, user_id, name, lookup, start, hash, created_at,"
        " number) SELECT 'key_' || :account || i, :account, :user, 'n', :account || i, 's', 'h',"
        " 0, i FROM n",
        count=count, account=owner.account, user=owner.id,
    )  # fmt: skip


def test_an_account_has_at_most_a_thousand_keys_that_are_not_revoked(box: Box) -> None:
    owner = person(box)
    many(box, owner, 999)
    last = made(box, owner)["id"]
    before = everything(box)
    refused(box.post(KEYS, owner.token, {"name": "n"}), 409, "conflict")
    assert everything(box) == before
    assert do(box, "rotate", last, owner.token).status == 200  # what is there can be managed
    do(box, "revoke", last, owner.token)
    assert made(box, owner)["status"] == "active"


# Between asking and acting.


def sign_out(box: Box, who: Person) -> None:
    assert box.cli("users", "sign-out", who.email).exit_code == 0


def revoke_token(box: Box, who: Person) -> None:
    box.run("UPDATE session_token SET ended_at = 1 WHERE user_id = :id", id=who.id)


def suspend_person(box: Box, who: Person) -> None:
    assert box.cli("users", "suspend", who.email).exit_code == 0


def suspend_without_signing_out(box: Box, who: Person) -> None:
    box.run("UPDATE user SET status = 'suspended' WHERE id = :id", id=who.id)


def remove(box: Box, who: Person) -> None:
    with box.instance.db.reading() as tx:
        member = members.get(tx, who.member_id, who.account)
    box.write(lambda tx: members.remove(tx, member, clock.now_ms(), COMMAND_LINE))


def demote(box: Box, who: Person) -> None:
    box.run("UPDATE membership SET role = 'member' WHERE id = :id", id=who.member_id)


@pytest.mark.parametrize("verb", [*CHANGING, "create"])
@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (sign_out, (401, "invalid_token")),
        (revoke_token, (401, "invalid_token")),
        (suspend_person, (401, "invalid_token")),
        (suspend_without_signing_out, (403, "account_suspended")),
        (remove, (401, "invalid_token")),
        (demote, (403, "forbidden")),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_who_was_let_in_and_may_not_any_more_changes_nothing(
    box: Box, home: House, monkeypatch: pytest.MonkeyPatch, verb: str,
    event: Callable[[Box, Person], None], expected: tuple[int, str],
) -> None:  # fmt: skip
    guest = joined(box, home.owner, role="owner")
    key_id = made(box, home.owner)["id"]
    suspended_if_resumed(box, verb, key_id)
    identify = access.identify
    after: list[object] = []

    def interrupted(*args: Any) -> access.Principal:
        principal = identify(*args)
        event(box, guest)
        after.append(everything(box))
        return principal

    monkeypatch.setattr(access, "identify", interrupted)
    if verb == "create":
        answer = box.post(KEYS, guest.token, {"name": "n"})
        if event is demote:
            assert (answer.status, answer.json()["user_id"]) == (201, guest.id)  # as a member may
            return
    else:
        answer = do(box, verb, key_id, guest.token)
    refused(answer, *expected)
    assert after == [everything(box)]


# With the real server.


def test_bodies_sent_in_chunks_are_read_whole_or_refused(start_farebox: StartFarebox) -> None:
    farebox = start_farebox(CONFIG, workers=1, threads=8)
    farebox.set_up("users", "add", "chunks@example.com")
    token = farebox.set_up("tokens", "mint", "chunks@example.com")
    connection = http.client.HTTPConnection("127.0.0.1", farebox.port, timeout=30)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def post(path: str, *chunks: bytes) -> Answer:
        connection.request("POST", path, iter(chunks), headers, encode_chunked=True)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())  # type: ignore[arg-type]

    answer = post(KEYS, b'{"na', b'me":"in chu', b'nks"}')
    assert answer.status == 201 and answer.json()["name"] == "in chunks"
    secret, key_id = answer.json()["key"], answer.json()["id"]
    assert farebox.get("/api/v1/account", secret).status == 200  # argon2id as it is
    assert told(post(KEYS, *[b" " * 4096] * 16, b"{}")) == (413, "body_too_large")
    assert told(post(KEYS, b'{"name"', b':"x"')) == (400, "validation_error")
    assert told(post(f"{KEYS}/{key_id}/rotate", b"[", b"]")) == (400, "validation_error")
    assert farebox.get("/api/v1/account", secret).status == 200
    rotated = post(f"{KEYS}/{key_id}/rotate", b'{"grace_', b'seconds":0}')
    assert rotated.status == 200
    assert told(farebox.get("/api/v1/account", secret)) == (401, "invalid_api_key")
    assert farebox.get("/api/v1/account", rotated.json()["key"]).status == 200
    assert len(farebox.get(KEYS, token).json()["data"]) == 1
    with farebox.connect() as sock:
        sock.sendall(
            f"POST {KEYS} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
            'Transfer-Encoding: chunked\r\n\r\n5\r\n{"nam\r\nxx\r\n'.encode()
        )
        assert b" 400 " in sock.recv(4096).partition(b"\r\n")[0]
    connection.close()
