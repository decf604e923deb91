"""People at a browser: signing in and out, links and mail, and forms that nobody else can send."""

from __future__ import annotations

import contextlib
import re
import socket
import time
import unicodedata
from collections.abc import Callable, Iterator
from email import message_from_bytes, policy
from email.message import EmailMessage
from functools import partial
from http.cookies import SimpleCookie
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from aiosmtpd.controller import Controller
from browser import PASSWORD, Browser, hidden
from conftest import StartFarebox
from doubles import refused_port
from flask import Flask
from flask.sessions import SecureCookieSessionInterface
from flask_login import encode_cookie
from forms import ONLY_SHOWN, filled, rules
from inprocess import _CHEAP, HOST, STRANGERS_KEY, Background, Box, Clock
from people import Person
from server import OPERATOR_KEY, TRACEBACK, Answer, Farebox, free_port, until

from core import clock, errors, firstrun, keys, members, passwords, upkeep, users
from core.audit import Actor
from models import Database

LIMIT = 5  # wrong passwords a minute, in these tests
NAMES = 10  # times as many for one address that tries many names
CREDITS = 7
CONFIG = f"""
[instance]
signup = "open"
signup_credits = {CREDITS}

[limits]
failed_auth_per_minute = {LIMIT}

[upstreams.sandbox]
kind = "sandbox"

[[routes]]
path = "/api/v1/echo"
methods = ["GET", "POST"]
upstream = "sandbox"
credits = 1
"""
OTHER = "another-long-enough-pass-phrase"
NOON = "2027-03-17T12:00:00Z"
MINUTE = clock.MINUTE_MS
REAL_NOBODYS = passwords._NOBODYS
XSS = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
_numbers = count(1)


@pytest.fixture(scope="module", autouse=True)
def cheap_hashes() -> Iterator[pytest.MonkeyPatch]:
    """Real argon2id, as cheap as it can be: the tests here sign in hundreds of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passwords, "HASHER", _CHEAP)
        patch.setattr(passwords, "_NOBODYS", _CHEAP.hash("nobody's"))
        yield patch


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("instance"), CONFIG) as box:
        yield box


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Box]:
    """An instance of this test's own, for those that move the clock."""
    with Box(tmp_path / "fresh", CONFIG) as box:
        yield box


# Words of these tests.


def address() -> str:
    """A network address nobody came from yet."""
    number = next(_numbers)
    return f"10.1.{number // 250}.{number % 250 + 1}"


def browser(site: Box, agent: str = "TestBrowser/1.0", **options: Any) -> Browser:
    return Browser(site, agent, **({"client": address()} | options))


def name() -> str:
    return f"person{next(_numbers)}@example.com"


def person(box: Box, *options: str, password: str | None = PASSWORD) -> str:
    """The e-mail of a new user."""
    email = name()
    if password is not None:
        options += ("--password-stdin",)
    said(box, "users", "add", email, *options, stdin=password and password + "\n")
    return email


def signed_in(box: Box, email: str | None = None, **options: Any) -> Browser:
    made = browser(box, **options)
    answer = made.sign_in(email or person(box))
    assert (answer.status, answer.headers["Location"]) == (303, "/dashboard"), answer.body
    return made


def said(box: Box, *words: str, stdin: str | None = None) -> str:
    done = box.cli(*words, stdin=stdin)
    assert done.exit_code == 0, (words, done.output, done.exception)
    text: str = done.stdout
    return text.removesuffix("\n")


def is_signed_in(who: Browser) -> bool:
    answer = who.get("/dashboard")
    if answer.status == 200:
        return True
    assert (answer.status, answer.headers["Location"]) == (303, "/login?next=%2Fdashboard")
    return False


def with_cookie(box: Box, value: str, cookie: str = "farebox") -> Browser:
    """A browser whose owner has somebody's cookie."""
    thief = browser(box)
    thief.cookies[cookie] = value
    return thief


def refused(page: Answer, status: int, code: str) -> str:
    """The text of an error page for a person."""
    text = page.body.decode()
    assert page.status == status, (page.status, text)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert f'href="/docs/errors#{code}"' in text
    assert page.request_id in text
    return text


def problem(page: Answer) -> str:
    found = re.search(r'role="alert">([^<]+)<', page.body.decode())
    assert found, page.body
    return found[1]


def without_tokens(page: Answer) -> str:
    """A page without what differs each time it is loaded."""
    return re.sub(r'name="csrf_token" value="[^"]+"', "", page.body.decode())


def token_of(link: str) -> str:
    return link.partition("?token=")[2]


def who_am_i(box: Box, token: str) -> Answer:
    return box.get("/api/v1/account", token)


def everything_stored(box: Box) -> dict[str, list[tuple[Any, ...]]]:
    with box.instance.db.reading() as tx:
        tables = tx.rows("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        return {table: sorted(tx.rows(f"SELECT * FROM {table}"), key=repr) for (table,) in tables}


def invitation(box: Box, host: Browser, email: str, **terms: Any) -> str:
    """The path of a new invitation's link."""
    wish = {"email": email} | terms
    answer = box.post("/api/v1/members", host.token(), wish)
    assert answer.status == 201, answer.body
    url: str = answer.json()["invite_url"]
    assert url.startswith(f"http://{HOST}/invite?token=")
    return url.removeprefix(f"http://{HOST}")


def balance(box: Box, email: str) -> int:
    return int(said(box, "credits", "balance", email))


def at_once(work: list[Callable[[], Answer]]) -> list[Answer]:
    return [request.result(60) for request in [Background(one) for one in work]]


# Signing in and out.


def test_who_follows_the_set_up_link_is_signed_in(fresh: Box) -> None:
    welcome = firstrun.welcome(fresh.instance.db, fresh.settings)
    assert welcome is not None
    link, me = f"/setup?token={welcome.setup_token}", browser(fresh)
    answer = me.submit(link, email="First@Example.com", password=PASSWORD)
    assert (answer.status, answer.headers["Location"]) == (303, "/dashboard")
    assert '<span class="who">first@example.com</span>' in me.follow(answer).body.decode()
    assert me.get(link).status == browser(fresh).get(link).status == 404
    assert is_signed_in(signed_in(fresh, "first@example.com"))


@pytest.mark.parametrize("typed", ["{}", "  {} ", "\t{}\r\n"])
@pytest.mark.parametrize("change", [str, str.upper, str.title])
def test_a_person_signs_in_however_they_type_their_address(
    box: Box, typed: str, change: Callable[[str], str]
) -> None:
    email, me = person(box), browser(box)
    assert me.sign_in(typed.format(change(email))).status == 303
    page = me.get("/dashboard")
    assert f'<span class="who">{email}</span>' in page.body.decode()
    assert "Sign out" in page.body.decode()


def test_every_failed_sign_in_is_the_same_page(box: Box) -> None:
    email, bare, suspended = person(box), person(box, password=None), person(box)
    said(box, "users", "suspend", suspended)
    pages = []
    for who, password in [
        (email, OTHER),
        (email, ""),
        (email, f"{PASSWORD} "),
        (suspended, OTHER),  # only who knows the password learns of the suspension
        (bare, PASSWORD),
        (bare, ""),
        (name(), PASSWORD),
        ("no address", PASSWORD),
        ("", ""),
    ]:
        me = browser(box)
        page = me.sign_in(who, password)
        assert (page.status, problem(page)) == (401, "E-mail or password is wrong.")
        assert "WWW-Authenticate" not in page.headers  # a browser would ask by itself
        assert not is_signed_in(me)
        pages.append(without_tokens(page).replace(f'value="{who}"', 'value=""'))
    assert len(set(pages)) == 1


def test_a_failed_sign_in_takes_as_long_whoever_it_is_for(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passwords, "HASHER", keys.HASHER)
    monkeypatch.setattr(passwords, "_NOBODYS", REAL_NOBODYS)
    takes: dict[str, list[float]] = {
        person(box): [],
        person(box, password=None): [],
        name(): [],
    }
    me = browser(box)
    csrf = me.csrf("/login")
    for _ in range(LIMIT):
        for email, times in takes.items():
            began = time.thread_time()  # in this process, so all of it
            answer = me.post("/login", {"csrf_token": csrf, "email": email, "password": OTHER})
            times.append(time.thread_time() - began)
            assert answer.status == 401
    middle = [median(times) for times in takes.values()]
    assert max(middle) < 3 * min(middle), middle


def test_who_is_signed_in_is_not_asked_again(box: Box) -> None:
    me = signed_in(box)
    for path, target in [("/login", "/dashboard"), ("/login?next=/docs/errors", "/docs/errors")]:
        answer = me.get(path)
        assert (answer.status, answer.headers["Location"]) == (303, target)


def test_who_is_asked_to_sign_in_lands_where_they_wanted_to_go(box: Box) -> None:
    email, me = person(box), browser(box)
    asked = me.get("/dashboard?x=1&y=a%20b")
    assert (asked.status, asked.headers["Location"][:12]) == (303, "/login?next=")
    done = me.submit(asked.headers["Location"], email=email, password=PASSWORD)
    assert done.headers["Location"] == "/dashboard?x=1&y=a%20b"


ELSEWHERE = [
    "//evil.example",
    "///evil.example",
    "/\\evil.example",
    "\\\\evil.example",
    "/a\\..\\evil",
    "https://evil.example/dashboard",
    f"http://{HOST}@evil.example/",
    "https:evil.example",
    "javascript:alert(1)",
    "data:text/html,x",
    "evil.example",
    "/\t/evil.example",
    " //evil.example",
    "/\r\nLocation: //evil.example",
    "\r//evil.example",
    "/\x00",
    "/\u2028",
    "",
]


@pytest.mark.parametrize("wish", ELSEWHERE)
def test_next_never_leads_away_from_here(box: Box, wish: str) -> None:
    me, email = browser(box), person(box)
    page = f"/login?next={quote(wish, safe='')}"
    shown = me.get(page)
    assert hidden(shown, "/login")["next"] == ""
    typed = {"email": email, "password": PASSWORD, "next": wish}
    answers = [me.post("/login", hidden(shown, "/login") | typed), me.get(page)]
    assert [answer.headers["Location"] for answer in answers] == ["/dashboard"] * 2


@pytest.mark.parametrize("wish", ["/", "/docs/errors#a", "/invite?token=a-_b&c=%2F%0d", "/a//b"])
def test_next_leads_to_any_path_here(box: Box, wish: str) -> None:
    me = browser(box)
    page = f"/login?next={quote(wish, safe='')}"
    done = me.submit(page, email=person(box), password=PASSWORD)
    assert done.headers["Location"] == me.get(page).headers["Location"] == wish


def test_signing_out_ends_the_cookie_and_its_tokens(box: Box) -> None:
    me = signed_in(box)
    cookie, token = me.cookies["farebox"], me.token()
    answer = me.submit("/dashboard", "/logout")
    assert (answer.status, answer.headers["Location"]) == (303, "/login")
    assert me.cookies == {}
    assert not is_signed_in(me)
    assert not is_signed_in(with_cookie(box, cookie))
    assert who_am_i(box, token).code == "invalid_token"
    assert me.post("/logout", {"csrf_token": me.csrf("/login")}).status == 303  # again


def test_a_new_sign_in_in_a_browser_ends_the_one_before(box: Box) -> None:
    email = person(box)
    me = signed_in(box, email)
    stolen, token = me.cookies["farebox"], me.token()
    assert is_signed_in(with_cookie(box, stolen))
    fields = {"csrf_token": me.csrf(), "email": email, "password": PASSWORD}
    assert me.post("/login", fields).status == 303
    assert is_signed_in(me)
    assert not is_signed_in(with_cookie(box, stolen))
    assert who_am_i(box, token).code == "invalid_token"


def test_a_cookie_planted_before_a_sign_in_opens_nothing_after_it(box: Box) -> None:
    attacker, email = browser(box), person(box)
    before = attacker.csrf("/login")
    planted = attacker.cookies["farebox"]
    victim = with_cookie(box, planted)
    assert victim.sign_in(email).status == 303
    assert victim.cookies["farebox"] != planted
    assert not is_signed_in(with_cookie(box, planted))
    # Nor is a form that was prepared then any good now.
    page = victim.post("/dashboard/billing/session-token", {"csrf_token": before})
    refused(page, 403, "csrf_failed")
    # One that signs the victim in as the attacker is the attacker's no more.
    mallory = signed_in(box)
    victim = with_cookie(box, mallory.cookies["farebox"])
    fields = {"csrf_token": victim.csrf(), "email": email, "password": PASSWORD}
    assert victim.post("/login", fields).status == 303
    assert not is_signed_in(mallory)


# The cookie.


def set_cookies(answer: Answer) -> dict[str, Any]:
    return {
        made: morsel
        for line in answer.headers.getlist("Set-Cookie")
        for made, morsel in SimpleCookie(line).items()
    }


@pytest.mark.parametrize(
    ("url", "host", "cookie"),
    [("", HOST, "farebox"), ("https://pay.example.com", "pay.example.com", "__Host-farebox")],
)
def test_the_cookie_is_for_this_host_and_no_script(
    tmp_path: Path, url: str, host: str, cookie: str
) -> None:
    environment = {"FAREBOX_PUBLIC_URL": url} if url else {}
    with Box(tmp_path / "i", CONFIG, **environment) as box:
        me = browser(box, host=host)
        csrf = me.csrf("/login")
        fields = {"csrf_token": csrf, "email": person(box), "password": PASSWORD, "remember": "1"}
        made = me.post("/login", fields)
        assert made.status == 303
        for answer in (browser(box, host=host).get("/login"), made):
            ((found, morsel),) = set_cookies(answer).items()
            assert found == cookie
            assert (morsel["path"], morsel["samesite"], morsel["httponly"]) == ("/", "Lax", True)
            assert morsel["domain"] == morsel["max-age"] == morsel["expires"] == ""
            assert bool(morsel["secure"]) is bool(url)
        assert set(me.cookies) == {cookie}
        assert is_signed_in(me)
        left = me.submit("/dashboard", "/logout")
        assert set(set_cookies(left)) == {cookie}


def signer(secret: str) -> Any:
    app = Flask("elsewhere")
    app.secret_key = secret
    serializer = SecureCookieSessionInterface().get_signing_serializer(app)
    assert serializer is not None
    return serializer


def test_nothing_but_the_secret_it_was_made_with_makes_a_cookie(box: Box) -> None:
    email = person(box)
    me = signed_in(box, email)
    cookie, ours = me.cookies["farebox"], signer(box.settings.secret_key)
    held = ours.loads(cookie)
    row = "SELECT s.id, s.cookie_hash, u.id FROM session s JOIN user u ON u.id = s.user_id"
    sid, digest, user_id = box.row(f"{row} WHERE u.email = :email", email=email)
    assert is_signed_in(with_cookie(box, ours.dumps(held)))  # this way of forging does work
    assert not is_signed_in(with_cookie(box, signer("x" * 43).dumps(held)))
    assert not is_signed_in(with_cookie(box, cookie[:-4] + "AAAA"))
    # Even who has the instance's key, and can read a backup, signs nobody in.
    for guess in (sid, digest.hex(), digest.decode("latin-1"), user_id, email, ""):
        assert not is_signed_in(with_cookie(box, ours.dumps(held | {"_user_id": guess})))


def test_nothing_remembers_a_person_beyond_the_session(box: Box) -> None:
    email = person(box)
    me = signed_in(box, email)
    held = signer(box.settings.secret_key).loads(me.cookies["farebox"])
    sid, user_id = box.row(
        "SELECT s.id, u.id FROM session s JOIN user u ON u.id = s.user_id WHERE email = :email",
        email=email,
    )
    with box.app.app_context():
        forged = [encode_cookie(value) for value in (user_id, email, sid, f"{held['_id']}")]
    for value in [*forged, f"{user_id}|{'0' * 128}", "x", ""]:
        thief = with_cookie(box, value, "remember_token")
        assert not is_signed_in(thief)
        answer = thief.get("/login")
        assert "remember_token" not in set_cookies(answer)
        fields = {"csrf_token": hidden(answer, None)["csrf_token"], "email": name(), "password": ""}
        assert thief.post("/login", fields).status == 401


# Guessing.


def test_guessing_one_persons_password_is_throttled_without_locking_them_out(
    fresh: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Clock(monkeypatch, NOON)
    email, guesser = person(fresh), browser(fresh)
    csrf = guesser.csrf("/login")

    def guess(password: str) -> Answer:
        fields = {"csrf_token": csrf, "email": email, "password": password}
        return guesser.post("/login", fields)

    pages = [guess(f"{OTHER}{number}") for number in range(100)]
    assert [page.status for page in pages] == [401] * LIMIT + [429] * (100 - LIMIT)
    for page in pages[LIMIT:]:
        assert page.headers["Retry-After"] == "60"
        assert problem(page) == "Too many attempts. Wait a minute."
        assert not [header for header in page.headers if header.lower().startswith("x-ratelimit")]
    assert guess(PASSWORD).status == 429
    assert is_signed_in(signed_in(fresh, email))  # from elsewhere
    hand.forward(ms=MINUTE - 1)
    last = guess(PASSWORD)
    assert (last.status, last.headers["Retry-After"]) == (429, "1")
    hand.forward(ms=1)
    assert guess(PASSWORD).status == 303


def test_a_customers_ipv6_network_guesses_as_one(
    fresh: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, NOON)
    email = person(fresh)

    def guess(client: str) -> int:
        guesser = Browser(fresh, client=client)
        return guesser.submit("/login", email=email, password=OTHER).status

    found = [guess(f"2001:db8:0:1::{number:x}") for number in range(1, LIMIT + 2)]
    assert found == [401] * LIMIT + [429]
    assert guess("2001:db8:0:2::1") == 401
    found = [guess(f"192.0.2.1:{port}") for port in range(1000, 1000 + LIMIT)]
    assert found == [401] * LIMIT
    assert guess("192.0.2.1") == guess("::ffff:192.0.2.1") == guess("[::ffff:192.0.2.1]:9") == 429
    assert guess("192.0.2.2") == 401


def test_one_address_cannot_try_a_password_on_everybody(
    fresh: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, NOON)
    guesser = browser(fresh)
    csrf = guesser.csrf("/login")
    found = []
    for number in range(LIMIT * NAMES + 10):
        who = {"email": f"somebody{number}@example.com", "password": PASSWORD}
        found.append(guesser.post("/login", {"csrf_token": csrf} | who).status)
    assert found == [401] * LIMIT * NAMES + [429] * 10
    names = fresh.row("SELECT COUNT(*) FROM rate_window WHERE subject LIKE 'password:%:%'")[0]
    assert names == LIMIT * NAMES  # what is refused for its address is not written down
    assert is_signed_in(signed_in(fresh))


@pytest.mark.parametrize(
    ("path", "limit", "fields"),
    [
        ("/signup", LIMIT, {"email": "no address", "password": PASSWORD}),
        ("/signup", LIMIT, {"email": "somebody@example.com", "password": "short"}),
    ],
)
def test_sign_up_is_throttled(
    fresh: Box, monkeypatch: pytest.MonkeyPatch, path: str, limit: int, fields: dict[str, str]
) -> None:
    hand, me = Clock(monkeypatch, NOON), browser(fresh)
    form = fields | {"csrf_token": me.csrf(path)}
    found = [me.post(path, form) for _ in range(limit + 3)]
    assert [page.status for page in found] == [400] * limit + [429] * 3
    assert found[-1].headers["Retry-After"] == "60"
    assert problem(found[-1]) == "Too many attempts. Wait a minute."
    assert browser(fresh).submit(path, **fields).status == 400
    hand.forward(ms=MINUTE)
    assert me.post(path, form).status == 400


# Passwords.


def sign_up(box: Box, password: str, email: str | None = None) -> Answer:
    return browser(box).submit("/signup", email=email or name(), password=password)


@pytest.mark.parametrize(
    ("password", "why"),
    [
        ("", "12 to 128"),
        ("xk3-Vq9-mZ7", "12 to 128"),
        ("xk3-Vq9-mZ7" * 12, "12 to 128"),
        ("password1234", "too easy"),
        ("PassWord1234", "too easy"),
        ("qwertyuiop12", "too easy"),
        ("123456789012", "too easy"),
        ("aaaaaaaaaaaa", "too easy"),
        ("abcabcabcabcabc", "too easy"),
        ("p@ssw0rdp@ssw0rd", "too easy"),
        ("my joanna-k pass phrase", "too easy"),
        ("JOANNA-K@example.com", "too easy"),
        ("k@example.com" + " and a long phrase", None),
    ],
)
def test_a_password_that_is_guessed_soon_is_refused(
    box: Box, password: str, why: str | None
) -> None:
    page = sign_up(box, password, f"joanna-k@host{next(_numbers)}.example")
    if why is None:
        assert page.status == 303
        return
    assert (page.status, why in problem(page)) == (400, True)
    assert not password or password not in page.body.decode()


def test_a_password_that_holds_a_short_address_is_refused(box: Box) -> None:
    for password in ("jo@short.example", "My-JO@short.Example-x7"):
        page = sign_up(box, password, "jo@short.example")
        assert (page.status, "too easy" in problem(page)) == (400, True)
    assert sign_up(box, "Banjo-Cheddar-x7", "jo@short.example").status == 303


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Zoë trägt Öl") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("password", "others"),
    [
        ("xk3-Vq9-mZ7.", ["XK3-Vq9-mZ7.", "xk3-Vq9-mZ7", "xk3-Vq9-mZ7. "]),
        ("xk3-Vq9-" * 16, ["xk3-Vq9-" * 15 + "xk3-Vq9.", "xk3-Vq9-" * 9]),  # 128 count to the end
        ("  two spaces at each end  ", ["two spaces at each end", " two spaces at each end "]),
        (COMPOSED, [DECOMPOSED, "Zoe tragt Ol", COMPOSED.lower()]),
        (DECOMPOSED, [COMPOSED]),
        ("пароль 密码 🔑 ключ", ["пароль 密码 ключ", "?????? ?? ? ????"]),
        ("a+b%20c&d=e%00;f", ["a b c&d=e\x00;f", "a+b%20c"]),
    ],
)
def test_a_password_is_kept_exactly(box: Box, password: str, others: list[str]) -> None:
    email = name()
    assert sign_up(box, password, email).status == 303
    me = browser(box)
    for other in others:
        assert me.sign_in(email, other).status == 401
    assert me.sign_in(email, password).status == 303


def test_a_huge_password_or_form_does_no_harm(box: Box) -> None:
    email = person(box)
    for size, statuses in [(60_000, (401, 400)), (64 * 1024, (413, 413)), (10**6, (413, 413))]:
        for page, status in zip(("/login", "/signup"), statuses, strict=True):
            began = time.monotonic()
            answer = browser(box).submit(page, email=email, password="x" * size)
            assert answer.status == status
            assert b"<h1>" in answer.body
            assert b"xxxx" not in answer.body
            assert time.monotonic() - began < 2
    refused(answer, 413, "body_too_large")
    fields = urlencode([(f"field{number}", "x") for number in range(4000)]).encode()
    assert browser(box).request("POST", "/login", body=fields).status == 403
    assert is_signed_in(signed_in(box, email))


def test_judging_a_password_never_takes_long(box: Box) -> None:
    sign_up(box, "warm up the judge")
    began = time.thread_time()  # of this thread, whatever else the machine does
    sign_up(box, ("4@8({[<369&#!1/|0$5+7%2" * 6)[:128])
    sign_up(box, ("4a@8b({[<c369g&#h!1i/|l0o$5s+7t%x2z" * 4)[:128])
    assert time.thread_time() - began < 2.5


# The life of a sign-in.


def test_a_sign_in_ends_after_half_an_hour_without_a_page(
    fresh: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Clock(monkeypatch, NOON)
    me = signed_in(fresh)
    for path in ("/dashboard", "/", "/login", "/dashboard"):  # any page will do
        hand.forward(ms=30 * MINUTE - 1)
        assert me.get(path).status in (200, 303)
    assert is_signed_in(me)
    hand.forward(ms=30 * MINUTE)
    assert not is_signed_in(me)
    hand.forward(ms=-1)
    assert is_signed_in(me)


def test_a_sign_in_ends_after_twelve_hours_whatever_happens(
    fresh: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Clock(monkeypatch, NOON)
    me = signed_in(fresh)
    for _ in range(48):
        assert is_signed_in(me)
        hand.forward(ms=15 * MINUTE - 100)
    token = me.token()
    assert who_am_i(fresh, token).status == 200
    hand.forward(ms=48 * 100 - 1)
    assert is_signed_in(me) and who_am_i(fresh, token).status == 200
    hand.forward(ms=1)
    assert not is_signed_in(me)
    assert who_am_i(fresh, token).code == "invalid_token"


@pytest.mark.parametrize("quarters", [1, 47])  # it ends for idleness, or whatever happens
def test_a_clock_that_steps_back_revives_no_sign_in(
    fresh: Box, monkeypatch: pytest.MonkeyPatch, quarters: int
) -> None:
    hand = Clock(monkeypatch, NOON)
    me = signed_in(fresh)
    for _ in range(quarters):
        hand.forward(ms=15 * MINUTE)
        assert is_signed_in(me)
    hand.forward(ms=(30 if quarters == 1 else 15) * MINUTE)
    upkeep.tidy(fresh.instance)
    hand.forward(ms=-10 * MINUTE)
    assert not is_signed_in(me)
    hand.forward(days=-1)
    assert not is_signed_in(me)


def test_a_clock_that_steps_back_keeps_no_sign_in_awake(
    fresh: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Clock(monkeypatch, NOON)
    me = signed_in(fresh)
    hand.forward(days=-1)
    assert is_signed_in(me)
    hand.forward(ms=30 * MINUTE)
    assert not is_signed_in(me)


def test_the_fifty_first_sign_in_ends_the_oldest(
    fresh: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand, email = Clock(monkeypatch, NOON), person(fresh)
    bystander = signed_in(fresh)
    mine = []
    for _ in range(50):
        mine.append(signed_in(fresh, email))
        hand.forward(ms=1)
    assert is_signed_in(mine[0])
    mine.append(signed_in(fresh, email))
    assert [is_signed_in(one) for one in mine] == [False] + [True] * 50
    mine.append(signed_in(fresh, email))
    assert [is_signed_in(one) for one in mine[:3]] == [False, False, True]
    assert is_signed_in(mine[-1]) and is_signed_in(bystander)


def forms_to(page: Answer, pattern: str) -> list[str]:
    return re.findall(rf'<form method="post" action="({pattern})"', page.body.decode())


ENDINGS = r"/dashboard/settings/sessions/sess_[0-9a-f]{24}/end"


def test_a_person_sees_their_sign_ins_and_ends_one(box: Box) -> None:
    email = person(box)
    away = signed_in(box, email, agent=f"Away {XSS}")
    token = away.token()
    here = signed_in(box, email, agent="x" * 5000)
    page = here.get("/dashboard/settings")
    text = page.body.decode()
    assert "Away &lt;script&gt;" in text and "<script>" not in text and "<img" not in text
    assert "x" * 200 in text and "x" * 201 not in text
    assert text.count("<strong>this browser</strong>") == 1
    assert re.search(r"password · <strong>this browser</strong><br>\s*<span[^>]*>10\.1\.", text)
    newest, oldest = forms_to(page, ENDINGS)
    ended = here.submit("/dashboard/settings", oldest)
    assert (ended.status, ended.headers["Location"]) == (303, "/dashboard/settings")
    assert not is_signed_in(away)
    assert who_am_i(box, token).code == "invalid_token"
    assert forms_to(here.get("/dashboard/settings"), ENDINGS) == [newest]
    refused(here.post(oldest, {"csrf_token": here.csrf()}), 404, "not_found")
    left = here.submit("/dashboard/settings", newest)  # its own
    assert (left.status, left.headers["Location"]) == (303, "/login")
    assert here.cookies == {} and not is_signed_in(here)


def test_a_person_signs_out_everywhere(box: Box) -> None:
    email = person(box)
    mine = [signed_in(box, email) for _ in range(3)]
    bystander, token = signed_in(box), mine[0].token()
    answer = mine[1].submit("/dashboard/settings", "/dashboard/settings/sessions/end-all")
    assert (answer.status, answer.headers["Location"]) == (303, "/login")
    assert not any(is_signed_in(one) for one in mine)
    assert who_am_i(box, token).code == "invalid_token"
    assert is_signed_in(bystander)


def test_nobody_ends_the_sign_in_of_another(box: Box) -> None:
    theirs, me = signed_in(box), signed_in(box, person(box, "--operator"))
    (ending,) = forms_to(theirs.get("/dashboard/settings"), ENDINGS)
    before = everything_stored(box)
    for path in (
        ending,
        "/dashboard/settings/sessions/sess_0/end",
        "/dashboard/settings/sessions/%00/end",
    ):
        refused(me.post(path, {"csrf_token": me.csrf()}), 404, "not_found")
    after = everything_stored(box)
    assert [table for table in after if after[table] != before[table]] == ["rate_window"]
    assert is_signed_in(theirs)


def test_a_suspended_person_is_out_until_resumed(box: Box) -> None:
    email = person(box)
    me = signed_in(box, email)
    token = me.token()
    said(box, "users", "suspend", email, "--reason", f"unpaid {XSS}")
    assert not is_signed_in(me)
    assert who_am_i(box, token).status in (401, 403)
    again = browser(box)
    text = refused(again.sign_in(email), 403, "account_suspended")
    assert "unpaid &lt;script&gt;" in text and "<script>" not in text
    assert not is_signed_in(again)
    assert again.sign_in(email, OTHER).status == 401
    said(box, "users", "resume", email)
    assert not is_signed_in(me)  # what has ended stays so
    assert is_signed_in(signed_in(box, email))


def test_a_closed_person_is_nobody_any_more(box: Box) -> None:
    email = person(box)
    me = signed_in(box, email)
    reset = said(box, "users", "reset-link", email)
    said(box, "users", "close", email)
    assert not is_signed_in(me)
    assert browser(box).sign_in(email).status == 401
    assert browser(box).get(f"/reset?token={token_of(reset)}").status == 404
    assert is_signed_in(signed_in(box, person(box)))


def test_trouble_with_the_database_signs_nobody_out(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = signed_in(box)

    def out_of_order(self: Database) -> None:
        raise errors.Refusal("storage_unavailable", "Later.", headers={"Retry-After": "1"})

    with monkeypatch.context() as patch:
        patch.setattr(Database, "reading", out_of_order)
        for path in ("/", "/dashboard", "/login", "/docs/errors"):
            page = me.get(path)
            refused(page, 503, "storage_unavailable")
            assert page.headers["Retry-After"] == "1"
        refused(me.get("/nowhere"), 404, "not_found")
    assert is_signed_in(me)


# Forms, and who may send them.


def operator(box: Box) -> tuple[Person, Browser]:
    """Somebody who may do everything, signed in."""
    email = person(box, "--operator")
    with box.instance.db.reading() as tx:
        user = users.of_who(tx, email)
    return Person(email, user.id, user.account_id, "", ""), signed_in(box, email)


def test_a_form_that_was_not_sent_from_here_changes_nothing(box: Box) -> None:
    stranger, stale = browser(box), browser(box).csrf("/login")
    strange = stranger.csrf("/login")
    for rule in rules(box):
        who, me = operator(box)
        path, fields = filled(box, rule, who)
        good = me.csrf()
        wrong: list[tuple[str | None, dict[str, str]]] = [
            (None, {}),
            ("", {}),
            (good[:-1], {}),
            (stale, {}),
            (strange, {}),
            (None, {"Origin": f"http://{HOST}"}),
            (strange, {"X-CSRF-Token": good[:-1]}),
            (good, {"Origin": "https://evil.example"}),
            (good, {"Origin": "http://127.0.0.1:9"}),
            (good, {"Origin": f"http://{HOST}.evil.example"}),
            (good, {"Origin": f"http://{HOST}@evil.example"}),
            (good, {"Origin": "null"}),
            (good, {"Origin": ""}),
            (good, {"Origin": "http://["}),
        ]
        before = everything_stored(box)
        for token, headers in wrong:
            sent = fields if token is None else fields | {"csrf_token": token}
            headers = {"Content-Type": "application/x-www-form-urlencoded"} | headers
            page = me.request("POST", path, headers, body=urlencode(sent).encode())
            refused(page, 403, "csrf_failed")
            assert "Set-Cookie" not in page.headers
        assert everything_stored(box) == before, path
        assert is_signed_in(me)
        # The very same form, sent from here, does something.
        before = everything_stored(box)
        sent = fields | {"csrf_token": me.csrf()}
        page = me.post(path, sent, Origin=f"http://{HOST}")
        assert page.status in (200, 303), (path, page.status, page.body)
        after = everything_stored(box)
        changed = [table for table in after if after[table] != before[table]]
        assert (set(changed) - {"rate_window"} == set()) is (rule in ONLY_SHOWN), (rule, changed)


def test_a_request_that_only_looks_changes_nothing(box: Box) -> None:
    """What asks whether a page is there, or what may be done with it, sends no form token."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    for rule in rules(box):
        who, me = operator(box)
        path, fields = filled(box, rule, who)
        query = f"?token={quote(fields['token'])}" if "token" in fields else ""
        me.get("/dashboard")
        before = everything_stored(box)
        for method in ("GET", "HEAD", "OPTIONS"):
            me.request(method, path + query, headers, body=urlencode(fields).encode())
        after = everything_stored(box)
        changed = {table for table in after if after[table] != before[table]}
        assert changed <= {"rate_window"}, (rule, changed)


def test_every_form_of_every_page_carries_its_token(box: Box) -> None:
    who, me = operator(box)
    now, seen = clock.now_ms(), set()
    reset = said(box, "users", "reset-link", person(box))
    invite = invitation(box, me, name())
    # What it takes for each form to be on a page: keys in two states, another way to sign in.
    for rule in rules(box):
        if rule.startswith("/dashboard") and "resume" not in rule:
            filled(box, rule, who)
    filled(box, "/dashboard/billing/keys/<key_id>/resume", who)
    filled(box, "/admin/vouchers/<voucher_id>/cancel", who)
    other, terms = person(box), members.Terms("member", None, None)
    with box.instance.db.reading() as tx:
        account = users.of_who(tx, other).account_id
    by, email = Actor("x"), name()
    _, joining, _ = box.write(lambda tx: members.invite(tx, account, email, terms, now, by))
    box.write(lambda tx: members.join(tx, joining, who.id, now, by))  # so that one can switch
    pages = [me.get(path) for path in ("/", invite, "/nowhere")]
    for rule in rules(box, "GET"):
        if rule.startswith(("/dashboard", "/admin", "/docs")):
            pages.append(me.get(filled(box, rule, who)[0]))
    pages.append(me.post("/dashboard/billing/session-token", {"csrf_token": me.csrf()}))
    for path in ("/login", "/signup", "/forgot", f"/reset?token={token_of(reset)}", invite):
        pages.append(browser(box).get(path))
    for page in pages:
        for form in re.findall(r"<form\b.*?</form>", page.body.decode(), re.S):
            head = re.match(r'<form method="(post|get)" action="(/[^"/][^"]*)"(?: class="|>)', form)
            assert head, form
            assert "<button" in form or 'name="signature"' in form  # which a wallet sends
            is_post = head[1] == "post"
            assert form.count('name="csrf_token" value="') == is_post, form
            if is_post:
                assert box.app.url_map.bind("").match(head[2].partition("#")[0], "POST")
                ids = r"\b(?:acct|key|mem|sess|vch)_[0-9a-z]+"
                seen.add(re.sub(ids, "<>", head[2].partition("#")[0]))
    assert {re.sub(r"<[^>]+>", "<>", rule) for rule in rules(box)} - seen <= {
        "/setup",  # of the first run
        "/forgot",  # there is no mail here
        # There are no payments here; their forms are tried in test_payments_pages.py.
        *(f"/admin/payments/<>/{verb}" for verb in ("look", "settled", "refused")),
    }


def test_the_api_knows_no_cookies(box: Box) -> None:
    me = signed_in(box)
    headers = {"X-CSRF-Token": me.csrf(), "Origin": f"http://{HOST}"}
    rules = {
        (method, re.sub(r"<[^>]+>", "x", rule.rule))
        for rule in box.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.rule.startswith(("/api/v1/", "/v1/"))
    }
    rules |= {("GET", "/api/v1/echo"), ("POST", "/api/v1/echo")}
    rules.remove(("POST", "/api/v1/session-tokens"))
    rules.remove(("POST", "/api/v1/wallets/challenge"))  # which anybody gets
    rules.remove(("POST", "/api/v1/credits/top-up"))  # nothing is paid on the spot here
    assert len(rules) > 15
    before = everything_stored(box)
    for method, path in rules:
        answer = me.request(method, path, headers, value={})
        assert (answer.status, answer.code) == (401, "missing_api_key"), (method, path)
        assert answer.headers["Content-Type"] == "application/json"
        assert "Set-Cookie" not in answer.headers
    assert everything_stored(box) == before


def test_a_cookie_gets_a_token_only_with_a_form_token(box: Box) -> None:
    me, path = signed_in(box), "/api/v1/session-tokens"
    good, other = me.csrf(), browser(box).csrf("/login")
    here, there = {"Origin": f"http://{HOST}"}, {"Origin": "https://evil.example"}
    wrong = [{}, here, {"X-CSRF-Token": other}, {"X-CSRF-Token": good} | there]
    for headers in [*wrong, {"X-CSRF-Token": good, "Origin": "null"}]:
        answer = me.request("POST", path, headers, value={})
        assert (answer.status, answer.code) == (403, "csrf_failed")
    answer = me.request("POST", path, {"X-CSRF-Token": good} | here, value={})
    assert answer.status == 201
    assert who_am_i(box, answer.json()["token"]).status == 200
    stranger = browser(box)
    headers = {"X-CSRF-Token": stranger.csrf("/login")}
    assert stranger.request("POST", path, headers, value={}).code == "missing_api_key"


@pytest.mark.parametrize(
    ("bearer", "code"),
    [
        ("Bearer eyJ.x.y", "invalid_token"),
        pytest.param(f"Bearer {STRANGERS_KEY}", "invalid_api_key", id="a key"),
        ("Bearer ", "invalid_api_key"),
        ("Bearer nonsense", "invalid_api_key"),
        ("Basic eDp5", "missing_api_key"),
        ("", "missing_api_key"),
    ],
)
def test_a_bad_bearer_beside_a_cookie_is_refused(box: Box, bearer: str, code: str) -> None:
    me = signed_in(box)
    headers = {"X-CSRF-Token": me.csrf(), "Authorization": bearer}
    answer = me.request("POST", "/api/v1/session-tokens", headers, value={})
    assert (answer.status, answer.code) == (401, code)
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert me.get("/dashboard", Authorization=bearer).status == 200  # pages know no Bearer


# Signing up.


def test_nobody_signs_up_where_sign_up_is_closed(tmp_path: Path) -> None:
    with Box(tmp_path / "i", CONFIG.replace('"open"', '"closed"')) as box:
        me = browser(box)
        csrf = me.csrf("/login")
        fields = {"csrf_token": csrf, "email": name(), "password": PASSWORD}
        for page in (me.get("/signup"), me.post("/signup", fields)):
            refused(page, 403, "signup_closed")
        assert said(box, "users", "list") == ""
        assert b"/signup" not in me.get("/login").body


def test_whoever_signs_up_gets_an_account_with_the_first_credits(box: Box) -> None:
    assert b'href="/signup"' in browser(box).get("/login").body
    me, email = browser(box), name()
    answer = me.submit("/signup", email=f" {email.upper()}", password=PASSWORD)
    assert (answer.status, answer.headers["Location"]) == (303, "/dashboard")
    assert f'<span class="who">{email}</span>' in me.follow(answer).body.decode()
    assert balance(box, email) == CREDITS
    assert who_am_i(box, me.token()).json()["credits"] == CREDITS
    assert not said(box, "users", "list").endswith("operator")


def test_an_address_that_is_taken_is_told_on_the_page(box: Box) -> None:
    email = person(box)
    before = everything_stored(box)["user"]
    page = browser(box).submit("/signup", email=email.upper(), password=OTHER)
    assert (page.status, email in problem(page)) == (409, True)
    assert everything_stored(box)["user"] == before
    assert is_signed_in(signed_in(box, email))


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "nobody",
        "@example.com",
        "a@",
        "a@b@c",
        "a b@example.com",
        f"{XSS}@example.com",
        "a@example.com\r\nBcc: evil@example.com",
        "a\n@example.com",
        "a@example.com,evil@example.com",
        "<a@example.com>",
        "a\x00@example.com",
        "a\u202e@example.com",
        "x" * 300 + "@example.com",
        "=?utf-8?q?a=0aBcc=3aevil=40x?=@example.com",  # a mail program would decode it
        "é@example.com",
    ],
)
def test_what_is_no_address_is_told_on_the_page(box: Box, typed: str) -> None:
    page = browser(box).submit("/signup", email=typed, password=PASSWORD)
    assert (page.status, problem(page)) == (400, "That is not an e-mail address.")
    assert b"<script>" not in page.body and b"<img" not in page.body


# New passwords.


def test_without_a_mail_server_the_page_says_what_to_do(box: Box) -> None:
    me = browser(box)
    page = me.get("/forgot")
    assert "flask users reset-link" in page.body.decode()
    assert "<form" not in page.body.decode()
    fields = {"csrf_token": me.csrf("/login"), "email": person(box)}
    before = everything_stored(box)
    again = me.post("/forgot", fields)
    assert (again.status, again.body) == (200, page.body)
    assert everything_stored(box) == before


class Mail:
    """A mail server on loopback, and what it was given."""

    def __init__(self) -> None:
        self.letters: list[tuple[list[str], EmailMessage]] = []
        self._server = Controller(self, hostname="127.0.0.1", port=free_port())

    def __enter__(self) -> Mail:
        self._server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        message = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        self.letters.append((envelope.rcpt_tos, message))
        return "250 Kept"

    @property
    def config(self) -> str:
        return f"""{CONFIG}
[smtp]
url = "smtp://127.0.0.1:{self._server.port}"
from = "farebox@example.org"
"""

    def letter(self, to: str, number: int = 1) -> EmailMessage:
        """The latest of that many letters to somebody, once they have come."""

        def come() -> list[EmailMessage]:
            found = [letter for whom, letter in self.letters if whom == [to]]
            return found if len(found) >= number else []

        found = until(come, 10, f"{number} letters to {to} come")
        assert len(found) == number
        return found[-1]


@pytest.fixture(scope="module")
def mail() -> Iterator[Mail]:
    with Mail() as mail:
        yield mail


@pytest.fixture
def mailing(mail: Mail, tmp_path: Path) -> Iterator[Box]:
    """An instance that mails."""
    with Box(tmp_path / "mailing", mail.config) as box:
        yield box


def link_in(letter: EmailMessage) -> str:
    found = re.search(r"http://127\.0\.0\.1:\d+(/\S+)", letter.get_content())
    assert found, letter
    return found[1]


def test_a_forgotten_password_is_replaced_by_a_link_that_is_mailed(
    mailing: Box, mail: Mail
) -> None:
    email = person(mailing)
    me = signed_in(mailing, email)
    token = me.token()
    asked = browser(mailing).submit("/forgot", email=f" {email.upper()} ")
    assert asked.status == 200
    letter = mail.letter(email)
    others = said(mailing, "users", "reset-link", email)
    assert (letter["To"], letter["From"]) == (email, "farebox@example.org")
    link, visitor = link_in(letter), browser(mailing)
    assert visitor.submit(link, password="password1234").status == 400
    assert is_signed_in(me)
    done = visitor.submit(link, password=OTHER)
    assert (done.status, done.headers["Location"]) == (303, "/dashboard")
    assert is_signed_in(visitor)
    assert not is_signed_in(me)
    assert who_am_i(mailing, token).code == "invalid_token"
    for dead in (link, f"/reset?token={token_of(others)}"):
        assert browser(mailing).get(dead).status == 404
        fields = {"csrf_token": visitor.csrf(), "token": token_of(dead), "password": PASSWORD}
        assert visitor.post("/reset", fields).status == 404
    assert browser(mailing).sign_in(email, PASSWORD).status == 401
    assert is_signed_in(visitor)
    assert browser(mailing).sign_in(email, OTHER).status == 303


def test_of_many_who_follow_a_reset_link_at_once_one_has_followed_it(box: Box) -> None:
    email = person(box)
    token = token_of(said(box, "users", "reset-link", email))
    crowd, typed = [browser(box) for _ in range(10)], [f"{OTHER} {n}" for n in range(10)]
    fields = [
        {"token": token, "csrf_token": one.csrf("/login"), "password": password}
        for one, password in zip(crowd, typed, strict=True)
    ]
    answers = at_once(
        [partial(one.post, "/reset", sent) for one, sent in zip(crowd, fields, strict=True)]
    )
    done = [answer.status == 303 for answer in answers]
    assert done.count(True) == 1
    assert [is_signed_in(one) for one in crowd] == done
    assert [browser(box).sign_in(email, password).status == 303 for password in typed] == done


def test_a_password_that_is_replaced_while_it_is_checked_lets_nobody_in(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    email = person(box)
    link = f"/reset?token={token_of(said(box, 'users', 'reset-link', email))}"
    owner, thief = browser(box), browser(box)
    check = passwords.is_right

    def meanwhile(password: str, stored: str | None) -> bool:
        right = check(password, stored)
        assert owner.submit(link, password=OTHER).status == 303
        return right

    csrf = thief.csrf("/login")
    monkeypatch.setattr(passwords, "is_right", meanwhile)
    page = thief.post("/login", {"csrf_token": csrf, "email": email, "password": PASSWORD})
    assert (page.status, problem(page)) == (401, "E-mail or password is wrong.")
    assert not is_signed_in(thief)
    assert is_signed_in(owner)


def test_a_person_who_is_suspended_while_signing_in_stays_out(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    email, me, check = person(box), browser(box), passwords.is_right

    def meanwhile(password: str, stored: str | None) -> bool:
        said(box, "users", "suspend", email)
        return check(password, stored)

    with monkeypatch.context() as patch:
        patch.setattr(passwords, "is_right", meanwhile)
        refused(me.sign_in(email), 403, "account_suspended")
    said(box, "users", "resume", email)
    assert not is_signed_in(me)


def test_who_asks_for_a_link_learns_nothing_about_anybody(mailing: Box, mail: Mail) -> None:
    suspended, known = person(mailing), person(mailing)
    said(mailing, "users", "suspend", suspended)
    injected = f"{known}\r\nBcc: evil@example.com"
    asked = [suspended, name(), "no address", injected, f"{known}, evil@example.com", "", known]
    pages = [browser(mailing).submit("/forgot", email=who) for who in asked]
    assert {(page.status, page.body) for page in pages} == {(200, pages[0].body)}
    letter = mail.letter(known)
    assert letter["Bcc"] is letter["Cc"] is None
    assert not [whom for whom, _ in mail.letters if whom[0] in asked[:-1] or len(whom) > 1]


def test_asking_for_links_is_throttled(
    mailing: Box, mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Clock(monkeypatch, NOON)
    me = browser(mailing)
    pages = [me.submit("/forgot", email=name()) for _ in range(12)]
    assert [page.status for page in pages] == [200] * 10 + [429] * 2
    refused(pages[-1], 429, "rate_limited")
    hand.forward(ms=MINUTE)
    assert me.submit("/forgot", email=name()).status == 200


def test_a_stranger_who_asks_for_links_neither_fills_a_mailbox_nor_locks_its_owner_out(
    mailing: Box, mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand, email = Clock(monkeypatch, NOON), person(mailing)
    pages = [browser(mailing).submit("/forgot", email=email) for _ in range(8)]
    assert {(page.status, page.body) for page in pages} == {(200, pages[0].body)}
    letter = mail.letter(email)  # fails when there is a second
    assert browser(mailing).get(link_in(letter)).status == 200
    hand.forward(ms=10 * MINUTE)
    browser(mailing).submit("/forgot", email=email)
    mail.letter(email, 2)


def test_invitations_are_mailed_in_measure(mailing: Box, mail: Mail) -> None:
    host, guest = signed_in(mailing), name()
    links = [invitation(mailing, host, guest) for _ in range(3)]
    assert len(set(links)) == 3 and link_in(mail.letter(guest)) == links[0]
    others = [name() for _ in range(10)]
    for other in others:
        invitation(mailing, host, other)
    until(lambda: [whom for whom, _ in mail.letters if whom[0] in others], 10, "a letter comes")
    owner = signed_in(mailing)
    last = name()
    invitation(mailing, owner, last)  # another account's has its own measure
    mail.letter(last)
    assert len([whom for whom, _ in mail.letters if whom[0] in others]) < 5


def test_the_operators_reset_link_is_mailed_too(mailing: Box, mail: Mail) -> None:
    email = person(mailing, password=None)
    printed = said(mailing, "users", "reset-link", email)
    assert link_in(mail.letter(email)) == printed.removeprefix(f"http://{HOST}")


@pytest.mark.parametrize("answers", [False, True])
def test_a_mail_server_that_is_down_keeps_nobody_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answers: bool
) -> None:
    with contextlib.ExitStack() as stack:
        port = refused_port()
        if answers:  # or rather: takes the call, and says nothing
            silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = silent.getsockname()[1]
        smtp = f'[smtp]\nurl = "smtp://127.0.0.1:{port}"\nfrom = "f@example.org"\n'
        box = stack.enter_context(Box(tmp_path / "i", CONFIG + smtp))
        email, known = person(box), person(box)
        began = time.monotonic()
        page = browser(box).submit("/forgot", email=email)
        assert (page.status, time.monotonic() - began < 2) == (200, True)
        host = signed_in(box, known)
        assert invitation(box, host, name()).startswith("/invite")
        assert time.monotonic() - began < 4
        if answers:
            for _ in range(2):
                silent.accept()[0].close()
        until(lambda: caplog.text.count("a mail could not be handed to 127.0.0.1") == 2, 10)
        assert "/reset?" not in caplog.text and "/invite?" not in caplog.text
        if not answers:
            done = box.cli("users", "reset-link", email)
            assert (done.exit_code, "could not be mailed" in done.stderr) == (1, True)
            assert browser(box).get(f"/reset?token={token_of(done.stdout.strip())}").status == 200


# Invitations.


def test_an_invitation_is_mailed_and_makes_a_member(mailing: Box, mail: Mail) -> None:
    owner, guest = person(mailing), name()
    host = signed_in(mailing, owner)
    link = invitation(mailing, host, guest.upper(), credit_limit=9, credit_period="day")
    letter = mail.letter(guest)
    assert link_in(letter) == link
    assert owner in letter.get_content()
    me = browser(mailing)
    page = me.get(link).body.decode()
    assert f"Join {owner}" in page and f'value="{guest}"' in page
    answer = me.submit(link, email=guest, password=PASSWORD)
    assert (answer.status, answer.headers["Location"]) == (303, "/dashboard")
    text = me.follow(answer).body.decode()
    assert f"{owner}’s account" in text and "Your account" in text  # and one can switch
    assert balance(mailing, guest) == 0  # no credits for signing up: nobody did
    account = who_am_i(mailing, host.token()).json()["account"]
    spend = who_am_i(mailing, me.token(account)).json()
    assert (spend["account"], spend["credits"]) == (account, balance(mailing, owner))
    members = mailing.get("/api/v1/members", host.token()).json()["data"]
    assert [(one["email"], one["role"], one["status"]) for one in members] == [
        (owner, "owner", "active"),
        (guest, "member", "active"),
    ]
    assert members[1]["credit_limit"] == 9


def test_an_invitation_works_once_however_many_follow_it(box: Box) -> None:
    owner = person(box)
    host = signed_in(box, owner)
    link = invitation(box, host, name())
    form = {"token": token_of(link), "password": PASSWORD}
    crowd = [browser(box) for _ in range(50)]
    fields = [
        form | {"email": name(), "csrf_token": hidden(one.get(link), "/invite")["csrf_token"]}
        for one in crowd
    ]
    answers = at_once(
        [partial(one.post, "/invite", sent) for one, sent in zip(crowd, fields, strict=True)]
    )
    joined = [one for one, answer in zip(crowd, answers, strict=True) if answer.status == 303]
    assert len(joined) == 1
    # The others are told, or asked to come back: passwords are checked one at a time.
    assert {answer.status for answer in answers} <= {303, 404, 503}
    assert len(box.get("/api/v1/members", host.token()).json()["data"]) == 2
    listed = said(box, "users", "list")
    for one, sent in zip(crowd, fields, strict=True):
        assert (sent["email"] in listed) is (one in joined)
    assert browser(box).get(link).status == 404
    assert browser(box).post("/invite", fields[0]).status == 403


def test_an_invitation_ends_after_a_week(fresh: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Clock(monkeypatch, NOON)
    link, me = invitation(fresh, signed_in(fresh), name()), browser(fresh)
    hand.forward(days=7, ms=-1)
    fields = hidden(me.get(link), "/invite") | {"email": name(), "password": PASSWORD}
    hand.forward(ms=1)
    assert me.get(link).status == me.post("/invite", fields).status == 404
    upkeep.tidy(fresh.instance)
    hand.forward(days=-1)
    assert me.get(link).status == me.post("/invite", fields).status == 404


def test_an_invitation_that_is_renewed_or_taken_back_is_dead(box: Box) -> None:
    host, guest = signed_in(box), name()
    first = invitation(box, host, guest)
    second = invitation(box, host, guest)
    me = browser(box)
    sent = {"csrf_token": me.csrf("/login"), "email": guest, "password": PASSWORD}
    assert me.get(second).status == 200
    for dead in (first, second):
        if dead is second:
            listed = box.get("/api/v1/members", host.token()).json()["data"]
            (invited,) = [one["id"] for one in listed if one["status"] == "invited"]
            gone = box.request("DELETE", f"/api/v1/members/{invited}", key=host.token())
            assert gone.status == 204
        assert me.get(dead).status == 404
        assert me.post("/invite", sent | {"token": token_of(dead)}).status == 404
        # For who is signed in too.
        assert host.get(dead).status == 404
    assert guest not in said(box, "users", "list")


def test_who_is_signed_in_joins_as_who_they_are(box: Box) -> None:
    owner, guest = person(box), person(box)
    host, me = signed_in(box, owner), signed_in(box, guest)
    link = invitation(box, host, name())
    page = me.get(link)
    assert f"Join {owner}" in page.body.decode() and guest in page.body.decode()
    assert "password" not in page.body.decode().lower()
    answer = me.submit(link)
    assert (answer.status, answer.headers["Location"]) == (303, "/dashboard")
    assert f"{owner}’s" in me.follow(answer).body.decode()
    assert is_signed_in(me) and me.get(link).status == 404
    # Nobody joins twice, and the invitation is not used up by trying.
    again = invitation(box, host, name())
    for one in (me, host):
        refused(one.submit(again), 409, "conflict")
    assert browser(box).submit(again, email=name(), password=PASSWORD).status == 303


def test_an_invited_person_who_is_a_user_is_asked_to_sign_in(box: Box) -> None:
    owner, guest = person(box), person(box)
    link, me = invitation(box, signed_in(box, owner), guest), browser(box)
    page = me.submit(link, email=guest, password=PASSWORD)
    assert (page.status, guest in problem(page)) == (409, True)
    assert not is_signed_in(me)
    found = re.search(r'<a href="(/login\?next=[^"]+)">Sign in', page.body.decode())
    assert found
    answer = me.submit(found[1], email=guest, password=PASSWORD)
    assert answer.headers["Location"] == link
    assert me.submit(link).status == 303
    assert f"{owner}’s" in me.get("/dashboard").body.decode()


def test_an_invitation_shows_nothing_unescaped(box: Box) -> None:
    owner, guest = "o'h&lt;b@example.com", "g'h&lt;b@example.com"
    for email in (owner, guest):
        assert sign_up(box, PASSWORD, email).status == 400  # `;` is no part of an address
    owner, guest = owner.replace(";", ""), guest.replace(";", "")
    assert sign_up(box, PASSWORD, owner).status == 303
    host = signed_in(box, owner)
    link, me = invitation(box, host, guest), browser(box)
    for page in (me.get(link), signed_in(box).get(link), host.get("/dashboard")):
        assert "o&#39;h&amp;lt" in page.body.decode()
        assert "o'h" not in page.body.decode() and "h&ltb" not in page.body.decode()
    assert 'value="g&#39;h&amp;ltb@example.com"' in me.get(link).body.decode()
    page = me.submit(link, email=f"{XSS}@example.com", password=PASSWORD)
    assert page.status == 400
    assert b"<script>" not in page.body and b"<img" not in page.body
    dead = me.get(f"/invite?token={quote(XSS)}")
    assert dead.status == 404 and b"<script" not in dead.body


# Pages.

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def test_every_page_is_whole_and_gives_nothing_away(mailing: Box) -> None:
    box, email = mailing, person(mailing)
    me, visitor = signed_in(box, email), browser(box)
    welcome = said(box, "users", "reset-link", person(box))
    reset, invite = f"/reset?token={token_of(welcome)}", invitation(box, me, name())
    csrf = visitor.csrf("/login")
    with_form: dict[str, Any] = {"csrf_token": csrf, "email": email}
    pages: list[tuple[int, str, Answer]] = [
        (200, "This is a Farebox", visitor.get("/")),
        (200, "This is a Farebox", me.get("/")),
        (200, "Sign in", visitor.get("/login")),
        (401, "Sign in", visitor.post("/login", with_form | {"password": OTHER})),
        (200, "Create an account", visitor.get("/signup")),
        (400, "Create an account", visitor.post("/signup", with_form | {"password": "short"})),
        (409, "Create an account", visitor.post("/signup", with_form | {"password": PASSWORD})),
        (200, "Forgot the password?", visitor.get("/forgot")),
        (200, "Forgot the password?", visitor.post("/forgot", with_form)),
        (200, "Choose a new password", visitor.get(reset)),
        (200, f"Join {email}", visitor.get(invite)),
        (200, f"Join {email}", me.get(invite)),
        (404, "This link does not work", visitor.get("/setup")),
        (404, "This link does not work", visitor.get("/reset?token=x")),
        (404, "This link does not work", visitor.get("/invite?token=x")),
        (200, "Overview", me.get("/dashboard")),
        (403, "This form is too old, or was not sent from here. Load it again.",
         me.post("/logout", {})),
        (404, "There is nothing here",
         me.post("/dashboard/settings/sessions/x/end", {"csrf_token": me.csrf()})),
        (404, "There is nothing here", me.get("/nowhere")),
        (405, "Use one of: ", me.get("/logout")),
    ]  # fmt: skip
    held = signer(box.settings.secret_key).loads(me.cookies["farebox"])
    secrets = [
        PASSWORD, OTHER, OPERATOR_KEY, box.settings.secret_key, me.cookies["farebox"],
        visitor.cookies["farebox"], held["_user_id"], held["csrf_token"],
    ]  # fmt: skip
    for status, heading, page in pages:
        text = page.body.decode()
        (found,) = re.findall(r"<h1>(.*?)</h1>", text)
        assert found == heading or (status > 401 and found.startswith(heading))
        assert page.status == status, heading
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert page.headers["Cache-Control"] == "no-store"
        assert page.headers["Content-Security-Policy"] == CSP
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert page.headers["Referrer-Policy"] == "same-origin"
        ours = r'<script type="module" src="/static/[a-z]+[.]js"></script>'
        assert "<script" not in re.sub(ours, "", text) and "style=" not in text
        assert not re.search(r'(?:src|href|action)="(?:[a-z]+:|//)', text)
        assert [secret for secret in secrets if secret in text] == []
        assert (token_of(reset) in text) is (heading == "Choose a new password")
        assert (token_of(invite) in text) is (heading == f"Join {email}")
        if heading in ("Sign in", "Create an account", "Choose a new password"):
            for label, field in (("Email", "email"), ("Password", "password")):
                assert f'<label for="{field}">{label}</label>' in text
                assert text.count(f'id="{field}" name="{field}"') == 1
        if heading == "Sign in":
            assert "<button>Sign in</button>" in text
        if status in (403, 405) or "/nowhere" in text:
            assert page.request_id in text


# On a real server.


@pytest.fixture(scope="module")
def served(start_farebox: StartFarebox, mail: Mail) -> Farebox:
    limit = f"failed_auth_per_minute = {LIMIT}"
    return start_farebox(mail.config.replace(limit, "failed_auth_per_minute = 10"))


def newcomer(served: Farebox) -> tuple[str, Browser]:
    email, me = name(), Browser(served)
    assert me.submit("/signup", email=email, password=PASSWORD).status == 303
    return email, me


def test_fifty_guesses_at_once_are_no_more_than_the_limit(served: Farebox) -> None:
    email, me = newcomer(served)
    guesser = Browser(served)
    fields = {"csrf_token": guesser.csrf("/login"), "email": email, "password": OTHER}
    began = clock.now_ms() // MINUTE
    answers = at_once([partial(guesser.post, "/login", fields) for _ in range(50)])
    minutes = clock.now_ms() // MINUTE - began + 1
    found = [answer.status for answer in answers]
    assert set(found) <= {401, 429, 503}  # 503: they waited too long for their turn
    assert 1 <= found.count(401) <= 10 * minutes
    assert found.count(429) >= 50 - 10 * minutes
    assert me.get("/dashboard").status == 200


def test_a_form_that_is_too_large_is_answered_by_a_page(served: Farebox) -> None:
    me = Browser(served)
    for size in (65 * 1024, 10**6):
        refused(me.submit("/login", email=name(), password="x" * size), 413, "body_too_large")
        served.hang_up()  # the rest of the body is read by nobody


def test_no_secret_of_a_person_is_logged(served: Farebox, mail: Mail) -> None:
    email, me = newcomer(served)
    guest = name()
    csrf, token = me.csrf(), me.token()
    wish = {"email": guest}
    invite = token_of(served.post("/api/v1/members", token, wish).json()["invite_url"])
    other = Browser(served)
    other.submit("/forgot", email=email)
    reset = token_of(link_in(mail.letter(email)))
    cookie, typed = me.cookies["farebox"], "a-typing-error-of-mine"
    fields = {"csrf_token": other.csrf("/login"), "email": email, "password": typed}
    assert other.post("/login", fields).status == 401
    assert other.post("/reset", fields | {"token": reset, "password": "x"}).status == 400
    assert me.post("/logout", {"csrf_token": csrf[:-1]}).status == 403
    with served.connect() as raw:  # what the server itself refuses
        head = f"POST /login?token={reset} HTTP/1.1\r\nCookie: farebox={cookie}\r\nno header\r\n"
        raw.sendall(f"{head}\r\npassword={typed}".encode())
        assert b" 400 " in raw.recv(65536)
    served.check()
    served.traceback_expected = True
    broken = "UPDATE user SET password_hash = 'broken' WHERE email = :email"
    database = Database(served.instance / "farebox.db")
    try:
        database.write(lambda tx: tx.run(broken, {"email": email}))
        page = other.post("/login", fields | {"password": PASSWORD})
        text = refused(page, 500, "internal_error")
        assert "broken" not in text and "argon" not in text
        database.write(lambda tx: tx.run("ALTER TABLE session RENAME TO gone"))
        refused(me.get("/dashboard"), 503, "storage_unavailable")
        refused(
            other.post(f"/reset?token={reset}", fields | {"password": OTHER}),
            503,
            "storage_unavailable",
        )
        database.write(lambda tx: tx.run("ALTER TABLE gone RENAME TO session"))
    finally:
        database.close()
        served.check()
        served.traceback_expected = False
    assert me.get("/dashboard").status == 200
    log = served.log()
    assert TRACEBACK in log and "the database refused" in log
    for secret in (
        PASSWORD,
        OTHER,
        typed,
        csrf,
        token,
        invite,
        reset,
        cookie,
        other.cookies["farebox"],
    ):
        assert secret not in log
