"""People sign in through OpenID providers: a certified one, and one that lies."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, parse_qsl, quote, unquote_plus, urlencode, urlsplit

import pytest
from browser import PASSWORD, Browser
from conftest import StartFarebox
from flask.sessions import SecureCookieSessionInterface
from inprocess import HOST, Background, Box
from issuer import PrivateKey, b64, changed, compact, forgeries, new_key, pem_of, public_jwk, seal
from openid_provider import OpenIdProvider, why_not
from server import ROOT, Answer, Farebox, until

from core import clock, errors
from models import Database

BASE = f"http://{HOST}"
SECRET = OpenIdProvider.client_secret
ODD_CLIENT, ODD_SECRET = "odd client:1", "p+q%41 /=&:-secret-of-the-tests-0123456"
DEAD = "http://127.0.0.1:1"
LARGEST_COOKIE = 4096
SIGNUP_CREDITS = 7
NAMES = ("rs", "es", "post", "odd", "second", "liar", "rs_es")
METADATA = "/.well-known/openid-configuration"
TABLES = ("user", "account", "identity", "session", "membership", "entry")
_numbers = count(1)


# The instances and those who sign in


def section(name: str, metadata_url: str, client_id: str, secret: str = SECRET) -> str:
    return (
        f'[oidc.{name}]\nserver_metadata_url = "{metadata_url}"\n'
        f'client_id = "{client_id}"\nclient_secret = "{secret}"\nlabel = "Provider {name}"\n'
    )


def instance_section(signup: str) -> str:
    return f'[instance]\nsignup = "{signup}"\nsignup_credits = {SIGNUP_CREDITS}\n'


def configuration(first: OpenIdProvider, second: OpenIdProvider, liar: Liar, signup: str) -> str:
    return instance_section(signup) + "".join(
        [
            section("rs", first.metadata_url, first.client_id),
            section("es", first.metadata_url, first.es256_client_id),
            section("post", first.metadata_url, first.post_client_id),
            section("odd", second.metadata_url, ODD_CLIENT, ODD_SECRET),
            section("second", second.metadata_url, second.client_id),
            section("liar", liar.metadata_url, Liar.client_id),
            section("rs_es", first.metadata_url, first.es256_client_id),
        ]
    )


@pytest.fixture(scope="module")
def second_provider() -> Iterator[OpenIdProvider]:
    """Another provider, that has a client whose id and secret need encoding."""
    missing = why_not()
    if missing is not None:
        pytest.skip(missing)
    odd = {"client_id": ODD_CLIENT, "client_secret": ODD_SECRET}
    with OpenIdProvider(clients=[odd]) as provider:
        yield provider


@pytest.fixture(scope="module")
def the_liar() -> Iterator[Liar]:
    with Liar() as liar:
        yield liar


@pytest.fixture
def liar(the_liar: Liar) -> Iterator[Liar]:
    """The lying provider, honest until it is told otherwise."""
    the_liar.reset()
    yield the_liar
    the_liar.reset()


@pytest.fixture(scope="module")
def open_box(
    tmp_path_factory: pytest.TempPathFactory,
    openid_provider: OpenIdProvider,
    second_provider: OpenIdProvider,
    the_liar: Liar,
) -> Iterator[Box]:
    """An instance that takes everybody in."""
    callbacks = [f"{BASE}/oidc/{name}/callback" for name in NAMES]
    openid_provider.allow_redirect(*callbacks)
    second_provider.allow_redirect(*callbacks)
    config = configuration(openid_provider, second_provider, the_liar, "open")
    with Box(tmp_path_factory.mktemp("oidc") / "open", config) as box:
        yield box


@pytest.fixture(scope="module")
def closed_box(
    open_box: Box,
    tmp_path_factory: pytest.TempPathFactory,
    openid_provider: OpenIdProvider,
    second_provider: OpenIdProvider,
    the_liar: Liar,
) -> Iterator[Box]:
    """An instance that takes in nobody by itself, which is how one begins."""
    config = configuration(openid_provider, second_provider, the_liar, "closed")
    with Box(tmp_path_factory.mktemp("oidc") / "closed", config) as box:
        yield box


@pytest.fixture(autouse=True)
def no_secret_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does, the log tells neither codes nor secrets nor tokens."""
    yield
    for phase in ("setup", "call"):
        for record in caplog.get_records(phase):
            if record.name.startswith(("farebox", "authlib")):
                text = logging.Formatter().format(record)
                assert "canary" not in text, text
                assert SECRET not in text, text
                assert not re.search(r"eyJ[\w-]{8}", text), text
                assert not re.search(r"[?&](code|state|nonce)=", text), text


@dataclass(frozen=True)
class Person:
    """Somebody the providers know."""

    sub: str
    email: str


def person(*providers: OpenIdProvider, email: str | None = None, verified: Any = True) -> Person:
    """Somebody new, known to these providers by the same login."""
    sub = f"person-{next(_numbers)}"
    made = Person(sub, email or f"{sub}@example.com")
    for provider in providers:
        provider.set_user(sub, email=made.email, email_verified=verified)
    return made


def press(browser: Browser, page: str, words: str) -> Answer:
    """Follow the link of a page that says `words`."""
    shown = browser.get(page)
    links = re.findall(r'<a\b[^>]*href="([^"]+)"[^>]*>([^<]+)</a>', shown.body.decode())
    found = [html.unescape(href) for href, text in links if html.unescape(text) == words]
    assert len(found) == 1, f"{words!r} on {page}: {shown.status} {links}"
    return browser.get(found[0])


def begin(browser: Browser, name: str, query: str = "") -> str:
    """Begin to sign in; the provider's address that the browser is sent to."""
    answer = browser.get(f"/oidc/{name}{query}")
    assert answer.status == 302, answer.body
    return answer.headers["Location"]


def sign_in(
    browser: Browser, provider: OpenIdProvider, name: str, who: Person | str, query: str = ""
) -> Answer:
    """Sign in through the provider; the answer to the browser that comes back."""
    login = who.sub if isinstance(who, Person) else who
    return browser.get(provider.sign_in(begin(browser, name, query), login))


def parameters(url: str) -> dict[str, str]:
    found = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    assert len(found) == len(dict(found)), f"said twice: {url}"
    return dict(found)


def altered(url: str, **changes: str | None) -> str:
    """The URL with parameters changed or, for None, removed."""
    query = {**parameters(url), **changes}
    kept = {name: value for name, value in query.items() if value is not None}
    return f"{url.partition('?')[0]}?{urlencode(kept)}"


def is_signed_in(browser: Browser) -> bool:
    answer = browser.get("/dashboard")
    assert answer.status in (200, 303), answer.body
    return answer.status == 200


def account_of(browser: Browser) -> str:
    """The account that who is signed in owns, which names the person."""
    assert is_signed_in(browser), "nobody is signed in"
    answer = browser.request(
        "GET", "/api/v1/account", {"Authorization": f"Bearer {browser.token()}"}
    )
    assert answer.status == 200, answer.body
    return str(answer.json()["account"])


def identities(browser: Browser) -> list[tuple[str, str]]:
    """What Settings offers to unlink: issuer and subject."""
    text = browser.get("/dashboard/settings").body.decode()
    found = [
        [html.unescape(value) for value in re.findall(rf'name="{name}" value="([^"]*)"', text)]
        for name in ("issuer", "subject")
    ]
    return list(zip(*found, strict=True))


def population(box: Box) -> list[int]:
    return [box.row(f"SELECT COUNT(*) FROM {table}")[0] for table in TABLES]


@contextlib.contextmanager
def nobody_made(box: Box) -> Iterator[None]:
    """Neither a user nor an identity nor a session comes of what happens inside."""
    before = population(box)
    yield
    assert population(box) == before


def is_page(answer: Answer, status: int) -> str:
    """A page for a person, which tells nothing of the machinery; its text."""
    text = html.unescape(answer.body.decode())
    assert answer.status == status, (answer.status, text)
    assert answer.headers["Content-Type"].startswith("text/html")
    for secret in (SECRET, "canary", "Traceback", "authlib", "joserfc", "Error:", "127.0.0.1:"):
        assert secret not in text
    return text


def refused(browser: Browser, answer: Answer, status: int = 400) -> None:
    text = is_page(answer, status)
    if status == 400:
        assert re.search(r"Signing in with Provider \w+ did not work", text)
    assert not is_signed_in(browser)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of sign-ins that failed."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "farebox.oidc" and record.levelno == logging.WARNING
    ]


# A provider that lies


class Liar:
    """A small provider that says what it is told to. `with Liar() as liar:` serves it on loopback.

    `modes` says by path how it answers: `ok`, `500`, `garbage`, `list`, `huge`, `hang`, `drip`,
    `redirect`, `reset`, or the bytes of an answer. `claims` and `header` change its ID tokens;
    `id_token` makes one of its claims in its own way.
    """

    client_id = "liar-client"
    client_secret = "canary-client-secret"

    def __init__(self) -> None:
        self.key: PrivateKey = new_key("ES256")
        self.lock = threading.Lock()
        self.port = 0
        self.reset()
        self._server: _LiarServer | None = None

    def reset(self) -> None:
        self.modes: dict[str, Any] = {}
        self.metadata: dict[str, Any] = {}
        self.keys: list[dict[str, Any]] | None = None
        self.header: dict[str, Any] = {}
        self.claims: dict[str, Any] = {}
        self.answer: dict[str, Any] = {}
        self.id_token: Callable[[dict[str, Any]], Any] | None = None
        self.wants_form = False
        self.sent = 0
        self.asked: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self._nonces: dict[str, str] = {}
        with self.lock:
            waiting = getattr(self, "moved_on", None)
            self.moved_on = threading.Event()
        if waiting is not None:
            waiting.set()

    def __enter__(self) -> Self:
        self._server = _LiarServer(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self.reset()
        self._server.shutdown()
        self._server.server_close()

    @property
    def issuer(self) -> str:
        return f"http://127.0.0.1:{self.port}/tenant"

    @property
    def metadata_url(self) -> str:
        return self.issuer + METADATA

    def allow(self, authorize_url: str, **claims: Any) -> str:
        """Let whoever was sent to that address in; the callback URL of their browser."""
        asked = parameters(authorize_url)
        code = f"canary-code-{next(_numbers)}"
        self._nonces[code] = asked["nonce"]
        self.claims = {"sub": f"liar-{next(_numbers)}", **self.claims, **claims}
        return f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"

    def public(self, key: PrivateKey | None = None, **members: Any) -> dict[str, Any]:
        named = {"kid": "liar-key", "use": "sig", "alg": "ES256", **members}
        return changed(public_jwk((key or self.key).public_key()), named)

    def document(self, path: str, form: dict[str, str]) -> dict[str, Any]:
        if path.endswith(METADATA):
            root = f"http://127.0.0.1:{self.port}"
            usual = {
                "issuer": self.issuer,
                "authorization_endpoint": f"{root}/authorize",
                "token_endpoint": f"{root}/token",
                "jwks_uri": f"{root}/jwks",
                "response_types_supported": ["code"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
            }
            return changed(usual, self.metadata)
        if path == "/jwks":
            return {"keys": [self.public()] if self.keys is None else self.keys}
        now = int(time.time())
        usual_claims = {
            "iss": self.issuer,
            "aud": self.client_id,
            "iat": now,
            "exp": now + 300,
            "nonce": self._nonces.get(form.get("code", "")),
        }
        claims = changed(usual_claims, self.claims)
        head = changed({"alg": "ES256", "typ": "JWT", "kid": "liar-key"}, self.header)
        token = self.id_token(claims) if self.id_token else seal(head, claims, self.key)
        usual_answer = {"access_token": "canary-access", "token_type": "Bearer", "id_token": token}
        return changed(usual_answer, self.answer)


class _LiarServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # An answer that hangs for a client that left holds no test up.
    request_queue_size = 64  # With the usual 5, some of many at once wait a second or more.

    def __init__(self, address: tuple[str, int], liar: Liar) -> None:
        self.liar = liar
        super().__init__(address, _LiarHandler)


class _LiarHandler(BaseHTTPRequestHandler):
    """HTTP/1.0: no connection outlives its request."""

    server: _LiarServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test's output is for its own words."""

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._serve({name: values[0] for name, values in parse_qs(body).items()})

    def _serve(self, form: dict[str, str]) -> None:
        liar = self.server.liar
        path = self.path.removeprefix("/tenant").partition("?")[0]
        with liar.lock:
            moved_on = liar.moved_on
            liar.asked.append((path, dict(self.headers), form))
        body = compact(liar.document(path, form))
        mode = liar.modes.get(path, "ok")
        with contextlib.suppress(OSError):  # The client left, as some modes want it to.
            if path == "/token" and liar.wants_form and "Authorization" in self.headers:
                self._answer(401, b'{"error": "invalid_client"}')
            elif mode == "ok":
                self._answer(200, body)
            elif mode == "500":
                self._answer(500, b'{"error":"canary-details"}')
            elif mode == "garbage":
                self._answer(200, b"<html>\x00\xff canary {not JSON")
            elif mode == "list":
                self._answer(200, b"[" + body + b"]")
            elif mode == "deep":
                self._answer(200, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
            elif mode == "redirect":
                self._answer(302, body, Location=f"http://127.0.0.1:{liar.port}/elsewhere")
            elif mode == "hang":
                moved_on.wait(30)
            elif mode == "drip":
                self._head(200, {"Content-Length": str(len(body))})
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if moved_on.wait(0.03):
                        return
            elif mode == "huge":
                self._head(200, {})
                self.wfile.write(body)
                for _ in range(64):
                    self.wfile.write(b" " * (1 << 20))
                    liar.sent += 1 << 20
            elif mode == "reset":
                self.close_connection = True
            else:
                status, answer = mode
                self._answer(status, answer)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self._head(status, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)


def liars_only(liar: Liar) -> str:
    return instance_section("open") + section("liar", liar.metadata_url, Liar.client_id)


@pytest.fixture(scope="module")
def one_liars_box(tmp_path_factory: pytest.TempPathFactory, the_liar: Liar) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("oidc") / "liars", liars_only(the_liar)) as box:
        yield box


@pytest.fixture
def liars_box(one_liars_box: Box, liar: Liar) -> Iterator[Box]:
    """An instance that has not asked the lying provider anything for hours."""
    hours = next(_numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.clock.monotonic", lambda: time.monotonic() + hours * 4000)
        yield one_liars_box


# Signing in


@pytest.mark.parametrize("name", ["rs", "es", "post"])
def test_somebody_new_signs_in_with_the_button_of_a_provider(
    open_box: Box, openid_provider: OpenIdProvider, name: str
) -> None:
    who, browser = person(openid_provider), Browser(open_box)
    sent = press(browser, "/login", f"Sign in with Provider {name}")
    assert sent.status == 302
    authorize = sent.headers["Location"]
    asked = parameters(authorize)
    assert authorize.startswith(f"{openid_provider.issuer}/")
    assert asked["response_type"] == "code"
    assert asked["code_challenge_method"] == "S256"
    assert re.fullmatch(r"[\w-]{43}", asked["code_challenge"])
    assert len(asked["state"]) >= 22
    assert len(asked["nonce"]) >= 20
    assert asked["redirect_uri"] == f"{BASE}/oidc/{name}/callback"
    assert asked["scope"] == "openid email profile"
    assert "code_verifier" not in authorize
    back = browser.get(openid_provider.sign_in(authorize, who.sub))
    assert back.status == 303
    assert back.headers["Location"] == "/dashboard"
    shown = browser.follow(back)
    text = shown.body.decode()
    assert f'<span class="who">{who.email}</span>' in text
    assert f"oidc:{name}" in browser.get("/dashboard/settings").body.decode()
    assert identities(browser) == [(openid_provider.issuer, who.sub)]
    token = browser.token()
    account = open_box.get("/api/v1/account", token).json()
    assert account["credits"] == SIGNUP_CREDITS
    assert account["account"] == account_of(browser)


def test_every_sign_in_has_its_own_state_nonce_and_challenge(open_box: Box) -> None:
    browser = Browser(open_box)
    asked = [parameters(begin(browser, "rs")) for _ in range(3)]
    for name in ("state", "nonce", "code_challenge"):
        assert len({one[name] for one in asked}) == 3


def test_signing_in_again_is_the_same_person_who_is_given_credits_once(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    who, first, second = person(openid_provider), Browser(open_box), Browser(open_box)
    assert sign_in(first, openid_provider, "rs", who).status == 303
    before = population(open_box)
    # Another client of the same provider means the same person: issuer and subject are the same.
    assert sign_in(second, openid_provider, "es", who).status == 303
    assert population(open_box)[:3] == before[:3]
    assert account_of(first) == account_of(second)
    token = second.token()
    assert open_box.get("/api/v1/account", token).json()["credits"] == SIGNUP_CREDITS
    entries = open_box.get("/api/v1/ledger", token).json()["data"]
    assert [entry["amount"] for entry in entries] == [SIGNUP_CREDITS]


def test_the_same_subject_at_another_provider_is_somebody_else(
    open_box: Box, openid_provider: OpenIdProvider, second_provider: OpenIdProvider
) -> None:
    who = person(openid_provider, second_provider, verified=False)
    one, other = Browser(open_box), Browser(open_box)
    sign_in(one, openid_provider, "rs", who)
    sign_in(other, second_provider, "second", who)
    assert account_of(one) != account_of(other)


def test_a_client_id_and_secret_with_signs_in_them_are_sent_encoded(
    open_box: Box, second_provider: OpenIdProvider
) -> None:
    """RFC 6749, 2.3.1: both are form-encoded before they are joined by a colon."""
    browser = Browser(open_box)
    assert sign_in(browser, second_provider, "odd", person(second_provider)).status == 303
    assert is_signed_in(browser)


def test_who_signs_in_over_another_sign_in_ends_that_one(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    browser = Browser(open_box)
    sign_in(browser, openid_provider, "rs", person(openid_provider))
    earlier, account = dict(browser.cookies), account_of(browser)
    sign_in(browser, openid_provider, "rs", person(openid_provider))
    assert account_of(browser) != account
    browser.cookies = earlier
    assert not is_signed_in(browser)


def test_a_sign_in_leads_to_the_page_that_asked_for_it(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    browser = Browser(open_box)
    asked = browser.get("/docs/errors?x=1")
    assert asked.status == 200
    page = f"/login?next={quote('/docs/errors?x=1', safe='')}"
    authorize = press(browser, page, "Sign in with Provider rs").headers["Location"]
    back = browser.get(openid_provider.sign_in(authorize, person(openid_provider).sub))
    assert (back.status, back.headers["Location"]) == (303, "/docs/errors?x=1")


@pytest.mark.parametrize(
    "wish",
    [
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example",
        "\\\\evil.example",
        "javascript:alert(1)",
        "/\t/evil.example",
        "/\r\nLocation: https://evil.example",
        " //evil.example",
        "dashboard",
    ],
)
def test_a_sign_in_never_leads_to_another_site(open_box: Box, liar: Liar, wish: str) -> None:
    browser = Browser(open_box)
    back = browser.get(liar.allow(begin(browser, "liar", f"?next={quote(wish, safe='')}")))
    assert (back.status, back.headers["Location"]) == (303, "/dashboard")


def test_the_cookie_stays_small_whatever_is_begun_and_left(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    browser = Browser(open_box)
    long = base64.urlsafe_b64encode(os.urandom(6000)).decode()
    for number in range(20):
        name = NAMES[number % 4]
        begin(browser, name, f"?next=/{long[number:]}&invite={long[number:]}")
        assert len(f"farebox={browser.cookies['farebox']}") < LARGEST_COOKIE
    who = person(openid_provider)
    assert sign_in(browser, openid_provider, "rs", who).status == 303
    assert len(browser.cookies["farebox"]) < 1000


def test_what_a_sign_in_was_begun_for_is_forgotten_when_it_is_done(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    browser = Browser(open_box)
    sign_in(browser, openid_provider, "rs", person(openid_provider))
    cookies = SecureCookieSessionInterface().get_signing_serializer(open_box.app)
    assert cookies is not None
    kept = cookies.loads(browser.cookies["farebox"])
    assert "_user_id" in kept
    assert not [name for name in kept if name == "oidc" or name.startswith("_state_")]


# Tampering


def test_a_callback_is_refused_unless_its_state_is_this_browsers(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    who = person(openid_provider)

    def callback(browser: Browser) -> str:
        return openid_provider.sign_in(begin(browser, "rs"), who.sub)

    with nobody_made(open_box):
        for state in ("x" * 30, "", None):
            browser = Browser(open_box)
            refused(browser, browser.get(altered(callback(browser), state=state)))
        mine, theirs = Browser(open_box), Browser(open_box)
        refused(
            mine, mine.get(altered(callback(mine), state=parameters(callback(theirs))["state"]))
        )
        mine, theirs = Browser(open_box), Browser(open_box)
        callback(mine)
        refused(mine, mine.get(callback(theirs)))  # log-in CSRF: all of it is another browser's
        browser = Browser(open_box)
        begun = callback(browser)
        browser.cookies.clear()
        refused(browser, browser.get(begun))
        refused(browser, browser.get("/oidc/rs/callback"))


def test_an_earlier_sign_in_that_was_left_is_good_no_longer(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    browser, who = Browser(open_box), person(openid_provider)
    first = begin(browser, "rs")
    begin(browser, "rs")
    with nobody_made(open_box):
        refused(browser, browser.get(openid_provider.sign_in(first, who.sub)))


def test_a_callback_is_good_once(open_box: Box, openid_provider: OpenIdProvider) -> None:
    browser = Browser(open_box)
    callback = openid_provider.sign_in(begin(browser, "rs"), person(openid_provider).sub)
    begun = dict(browser.cookies)
    assert browser.get(callback).status == 303
    browser.post("/logout", {"csrf_token": browser.csrf()})
    with nobody_made(open_box):
        refused(browser, browser.get(callback))
        browser.cookies = begun  # even with the cookie of before: the code is used up
        refused(browser, browser.get(callback))


def test_a_callback_without_its_code_is_refused(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    with nobody_made(open_box):
        for code in (None, "", "x" * 43):
            browser = Browser(open_box)
            callback = openid_provider.sign_in(begin(browser, "rs"), person(openid_provider).sub)
            refused(browser, browser.get(altered(callback, code=code)))


def test_codes_swapped_between_browsers_are_refused(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    one, other = Browser(open_box), Browser(open_box)
    first = openid_provider.sign_in(begin(one, "rs"), person(openid_provider).sub)
    second = openid_provider.sign_in(begin(other, "rs"), person(openid_provider).sub)
    with nobody_made(open_box):
        refused(one, one.get(altered(first, code=parameters(second)["code"])))
        refused(other, other.get(altered(second, code=parameters(first)["code"])))


def test_the_code_of_another_client_is_refused(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    one, other, who = Browser(open_box), Browser(open_box), person(openid_provider)
    first = openid_provider.sign_in(begin(one, "rs"), who.sub)
    second = openid_provider.sign_in(begin(other, "es"), who.sub)
    with nobody_made(open_box):
        refused(one, one.get(altered(first, code=parameters(second)["code"])))


@pytest.mark.parametrize("change", ["nonce", "code_challenge"])
def test_an_authorize_url_that_was_changed_on_its_way_signs_nobody_in(
    open_box: Box, openid_provider: OpenIdProvider, change: str
) -> None:
    """The nonce is held against the ID token, the challenge against this browser's verifier."""
    browser = Browser(open_box)
    authorize = altered(begin(browser, "rs"), **{change: "A" * 43})
    with nobody_made(open_box):
        refused(
            browser, browser.get(openid_provider.sign_in(authorize, person(openid_provider).sub))
        )


def test_the_code_of_somebody_elses_flow_is_refused_for_its_nonce(
    open_box: Box, liar: Liar
) -> None:
    """At a provider without PKCE the nonce alone is what ties a code to a browser."""
    mine, theirs = Browser(open_box), Browser(open_box)
    stolen = parameters(liar.allow(begin(theirs, "liar")))["code"]
    callback = liar.allow(begin(mine, "liar"))
    with nobody_made(open_box):
        refused(mine, mine.get(altered(callback, code=stolen)))


@pytest.mark.parametrize("change", ["redirect_uri", "client_id"])
def test_the_provider_refuses_an_authorize_url_to_somewhere_else(
    open_box: Box, openid_provider: OpenIdProvider, change: str
) -> None:
    authorize = altered(begin(Browser(open_box), "rs"), **{change: "https://evil.example/cb"})
    with pytest.raises(AssertionError, match="the OpenID provider showed 400"):
        openid_provider.sign_in(authorize, person(openid_provider).sub)


def test_an_answer_of_another_issuer_is_refused(
    open_box: Box, openid_provider: OpenIdProvider, second_provider: OpenIdProvider
) -> None:
    """RFC 9207: the provider says in its metadata that it names itself in every answer."""
    with nobody_made(open_box):
        for issuer in (second_provider.issuer, openid_provider.issuer + "/", "", None):
            browser = Browser(open_box)
            callback = openid_provider.sign_in(begin(browser, "rs"), person(openid_provider).sub)
            assert parameters(callback)["iss"] == openid_provider.issuer
            refused(browser, browser.get(altered(callback, iss=issuer)))


def test_an_issuer_in_an_answer_is_looked_at_though_it_was_not_announced(
    open_box: Box, liar: Liar
) -> None:
    browser = Browser(open_box)
    with nobody_made(open_box):
        callback = liar.allow(begin(browser, "liar"))
        refused(browser, browser.get(f"{callback}&iss=https%3A%2F%2Fevil.example"))
    callback = liar.allow(begin(browser, "liar"))
    assert browser.get(f"{callback}&iss={quote(liar.issuer, safe='')}").status == 303


def test_a_sign_in_that_the_person_refuses_is_refused_here(
    open_box: Box, openid_provider: OpenIdProvider, caplog: pytest.LogCaptureFixture
) -> None:
    browser = Browser(open_box)
    callback = openid_provider.refuse(begin(browser, "rs"))
    assert parameters(callback)["error"] == "access_denied"
    with nobody_made(open_box):
        refused(browser, browser.get(callback))
    assert any("access_denied" in line for line in warnings(caplog))


def test_a_callback_at_another_providers_address_is_refused(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    browser = Browser(open_box)
    callback = openid_provider.sign_in(begin(browser, "rs"), person(openid_provider).sub)
    with nobody_made(open_box):
        refused(browser, browser.get(callback.replace("/oidc/rs/", "/oidc/es/")))


def test_a_name_that_begins_like_another_takes_no_callback_of_that(
    tmp_path: Path, liar: Liar
) -> None:
    """The state of `a_b` would else be found at `a`, by a state that begins with `b_`."""
    config = instance_section("open") + "".join(
        section(name, liar.metadata_url, Liar.client_id) for name in ("a", "a_b")
    )
    with Box(tmp_path / "instance", config) as box:
        browser = Browser(box)
        callback = liar.allow(begin(browser, "a_b"))
        state = parameters(callback)["state"]
        confused = altered(callback, state=f"b_{state}").replace("/oidc/a_b/", "/oidc/a/")
        with nobody_made(box):
            refused(browser, browser.get(confused))


def test_a_provider_nobody_configured_is_not_there(open_box: Box) -> None:
    browser = Browser(open_box)
    for path in ("/oidc/nobody", "/oidc/nobody/callback?code=1&state=2", "/oidc/", "/oidc/RS"):
        is_page(browser.get(path), 404)
    for path in ("/oidc/rs", "/oidc/rs/callback"):
        assert browser.post(path, {}).status == 405


def test_a_stray_callback_never_makes_a_link_a_sign_in(
    open_box: Box, openid_provider: OpenIdProvider, second_provider: OpenIdProvider
) -> None:
    """Another site can send the browser here with any state, and what was begun is forgotten."""
    browser, who = Browser(open_box), person(second_provider)
    sign_in(browser, openid_provider, "rs", person(openid_provider))
    mine = account_of(browser)
    authorize = press(browser, "/dashboard/settings", "Add Provider second").headers["Location"]
    callback = second_provider.sign_in(authorize, who.sub)
    with nobody_made(open_box):
        browser.get("/oidc/second/callback?state=of-a-stranger&code=1")
        browser.get("/oidc/rs/callback?error=access_denied")
        is_page(browser.get(callback), 400)
    assert account_of(browser) == mine


def test_what_a_stranger_writes_into_a_callback_stays_on_one_line_of_the_log(
    open_box: Box, liar: Liar, caplog: pytest.LogCaptureFixture
) -> None:
    browser = Browser(open_box)
    begin(browser, "liar")
    forged = quote("canary-1 denied\n2030-01-01 all is well\x1b[2J" + "x" * 5000, safe="")
    callback = f"/oidc/liar/callback?error=e&error_description={forged}&code=canary-1"
    refused(browser, browser.get(callback))
    (line,) = warnings(caplog)
    assert "[masked] denied" in line
    assert line.isprintable()
    assert len(line) < 500


# A provider that lies


def test_the_lying_provider_is_believed_while_it_is_honest(open_box: Box, liar: Liar) -> None:
    """Else the refusals below would prove nothing."""
    browser = Browser(open_box)
    assert browser.get(liar.allow(begin(browser, "liar"), sub="honest")).status == 303
    assert identities(browser) == [(liar.issuer, "honest")]
    headers, form = next(asked[1:] for asked in liar.asked if asked[0] == "/token")
    pair = base64.b64decode(headers["Authorization"].removeprefix("Basic ")).decode()
    assert [unquote_plus(part) for part in pair.split(":")] == [liar.client_id, SECRET]
    assert form["grant_type"] == "authorization_code"
    assert form["redirect_uri"] == f"{BASE}/oidc/liar/callback"
    assert re.fullmatch(r"[\w.~-]{43,128}", form["code_verifier"])
    assert "client_secret" not in form


NOW = int(time.time())
CLAIMS: dict[str, dict[str, Any]] = {
    "another issuer": {"iss": "https://evil.example"},
    "the issuer with a slash": {"iss": "SLASH"},
    "no issuer": {"iss": None},
    "a list of issuers": {"iss": ["ISSUER"]},
    "another audience": {"aud": "somebody-else"},
    "no audience": {"aud": None},
    "an empty audience": {"aud": []},
    "audiences without an authorized party": {"aud": ["liar-client", "somebody-else"]},
    "another authorized party": {"azp": "somebody-else"},
    "expired": {"exp": NOW - 90, "iat": NOW - 400},
    "expired long ago": {"exp": 1, "iat": 0},
    "no end": {"exp": None},
    "an end that is text": {"exp": "2999-01-01"},
    "made in the future": {"iat": NOW + 3600, "exp": NOW + 7200},
    "no time": {"iat": None},
    "not valid yet": {"nbf": NOW + 3600},
    "no nonce": {"nonce": None},
    "another nonce": {"nonce": "of-another-flow"},
    "a list of nonces": {"nonce": ["of-another-flow"]},
    "no subject": {"sub": None},
    "an empty subject": {"sub": ""},
    "a subject that is a number": {"sub": 12345},
    "a subject that is an object": {"sub": {"a": 1}},
    "a long subject": {"sub": "s" * 256},
    "a subject of half a letter": {"sub": "\ud800"},
    "a subject with a line end": {"sub": "somebody\nelse"},
    "a subject with a NUL": {"sub": "somebody\0else"},
    "the hash of another access token": {"at_hash": "AAAAAAAAAAAAAAAAAAAAAA"},
}


@pytest.mark.parametrize("what", CLAIMS)
def test_an_id_token_whose_claims_are_not_for_us_is_refused(
    open_box: Box, liar: Liar, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    real = {"SLASH": liar.issuer + "/", "ISSUER": liar.issuer}
    claims = json.loads(compact(CLAIMS[what]))
    for word, value in real.items():
        claims = json.loads(json.dumps(claims).replace(f'"{word}"', json.dumps(value)))
    browser = Browser(open_box)
    with nobody_made(open_box):
        refused(browser, browser.get(liar.allow(begin(browser, "liar"), **claims)))
    assert len(warnings(caplog)) == 1


def test_an_id_token_of_a_clock_a_little_wrong_is_taken(open_box: Box, liar: Liar) -> None:
    browser, now = Browser(open_box), int(time.time())
    for times in ({"exp": now - 30, "iat": now - 60}, {"iat": now + 30}):
        assert browser.get(liar.allow(begin(browser, "liar"), **times)).status == 303


@pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")
@pytest.mark.parametrize("announced", [True, False])
def test_an_id_token_that_another_could_have_signed_is_refused(
    tmp_path: Path, liar: Liar, announced: bool
) -> None:
    """Not even where the provider announces such algorithms."""
    algorithms = ["none", "HS256", "ES256"] if announced else ["ES256"]
    liar.metadata = {"id_token_signing_alg_values_supported": algorithms}
    liar.keys = [liar.public(), {"kty": "oct", "kid": "open-secret", "k": b64(b"s" * 32)}]
    stranger, pem = new_key("ES256"), pem_of(liar.key.public_key()).encode()
    rsa = new_key("RS256")

    def unsigned(head: dict[str, Any], claims: dict[str, Any]) -> str:
        return f"{b64(compact(head))}.{b64(compact(claims))}."

    ways: dict[str, Callable[[dict[str, Any]], Any]] = {
        "none": lambda c: unsigned({"alg": "none", "kid": "liar-key"}, c),
        "none, without a key's name": lambda c: unsigned({"alg": "none"}, c),
        "the client's secret": lambda c: seal(
            {"alg": "HS256", "kid": "liar-key"}, c, SECRET.encode()
        ),
        "the client's secret, unnamed": lambda c: seal({"alg": "HS256"}, c, SECRET.encode()),
        "the public key as a secret": lambda c: seal({"alg": "HS256", "kid": "liar-key"}, c, pem),
        "a published secret": lambda c: seal({"alg": "HS256", "kid": "open-secret"}, c, b"s" * 32),
        "another key": lambda c: seal({"alg": "ES256", "kid": "liar-key"}, c, stranger),
        "another kind of key": lambda c: seal({"alg": "RS256", "kid": "liar-key"}, c, rsa),
        "an unknown key": lambda c: seal({"alg": "ES256", "kid": "unknown"}, c, stranger),
        "its own key": lambda c: seal(
            {"alg": "ES256", "kid": "own", "jwk": public_jwk(stranger.public_key())}, c, stranger
        ),
        "a critical extension": lambda c: seal(
            {"alg": "ES256", "kid": "liar-key", "crit": ["x"], "x": 1}, c, liar.key
        ),
        "nothing": lambda c: "",
        "no text": lambda c: {"claims": c},
        "nothing at all": lambda c: None,
    }
    with Box(tmp_path / "instance", liars_only(liar)) as box:
        browser = Browser(box)
        assert browser.get(liar.allow(begin(browser, "liar"))).status == 303
        for name, way in ways.items():
            browser, liar.id_token = Browser(box), way
            with nobody_made(box):
                answer = browser.get(liar.allow(begin(browser, "liar")))
                assert answer.status == 400, name
                refused(browser, answer)


@pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")
def test_forged_id_tokens_are_refused(open_box: Box, liar: Liar) -> None:
    pem = pem_of(liar.key.public_key())

    def good(claims: dict[str, Any]) -> str:
        return seal({"alg": "ES256", "typ": "JWT", "kid": "liar-key"}, claims, liar.key)

    usual = {"iss": liar.issuer, "aud": liar.client_id, "sub": "x", "nonce": "x"}
    names = list(forgeries(good({**usual, "iat": NOW, "exp": NOW + 300}), pem))
    # A few of each kind: all of them are tried on session tokens.
    for name in names[::20]:
        browser = Browser(open_box)
        liar.id_token = lambda claims, name=name: forgeries(good(claims), pem)[name]
        with nobody_made(open_box):
            answer = browser.get(liar.allow(begin(browser, "liar")))
            assert answer.status == 400, name


@pytest.mark.parametrize(
    "metadata",
    [
        {"issuer": "https://evil.example"},
        {"issuer": None},
        {"issuer": ["x"]},
        {"issuer": 5},
        {"authorization_endpoint": None},
        {"authorization_endpoint": "javascript:alert(1)"},
        {"authorization_endpoint": ["http://127.0.0.1/"]},
        {"token_endpoint": None},
        {"token_endpoint": "file:///etc/passwd"},
        {"token_endpoint": "http://192.0.2.1/token"},
        {"token_endpoint": "http://[::1/token"},
        {"jwks_uri": None},
        {"jwks_uri": "gopher://127.0.0.1/"},
        {"id_token_signing_alg_values_supported": ["none", "HS256"]},
        {"id_token_signing_alg_values_supported": 5},
    ],
    ids=lambda metadata: json.dumps(metadata)[1:-1],
)
def test_metadata_that_cannot_be_the_providers_is_refused_and_not_kept(
    liars_box: Box, liar: Liar, metadata: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    liar.metadata, browser = metadata, Browser(liars_box)
    refused(browser, browser.get("/oidc/liar"))
    assert len(warnings(caplog)) == 1
    liar.metadata = {}
    assert browser.get(liar.allow(begin(browser, "liar"))).status == 303


def test_metadata_does_not_configure_us(liars_box: Box, liar: Liar) -> None:
    liar.metadata = {
        "client_id": "evil",
        "scope": "everything",
        "code_challenge_method": "plain",
        "response_type": "token",
        "verify": False,
        "proxies": {"http": DEAD},
        "trust_env": True,
        "token_endpoint_auth_method": "none",
        "jwks": {"keys": [liar.public(new_key("ES256"))]},
        "_loaded_at": 0,
    }
    browser = Browser(liars_box)
    authorize = begin(browser, "liar")
    asked = parameters(authorize)
    assert asked["client_id"] == liar.client_id
    assert asked["scope"] == "openid email profile"
    assert asked["code_challenge_method"] == "S256"
    assert asked["response_type"] == "code"
    assert browser.get(liar.allow(authorize)).status == 303
    assert "Authorization" in next(asked[1] for asked in liar.asked if asked[0] == "/token")


@pytest.mark.parametrize("announced", [True, False])
def test_a_provider_that_wants_the_secret_in_the_form_is_given_it_there(
    liars_box: Box, liar: Liar, announced: bool
) -> None:
    """What it knows it announces; what it wants of this client it says nowhere."""
    ways = ["client_secret_post"] if announced else ["client_secret_basic", "client_secret_post"]
    liar.metadata = {"token_endpoint_auth_methods_supported": ways}
    liar.wants_form = True
    browser = Browser(liars_box)
    assert browser.get(liar.allow(begin(browser, "liar"))).status == 303
    *refused_ones, (headers, form) = [asked[1:] for asked in liar.asked if asked[0] == "/token"]
    assert len(refused_ones) == (0 if announced else 1)
    assert "Authorization" not in headers
    assert (form["client_id"], form["client_secret"]) == (liar.client_id, SECRET)


def test_a_client_secret_that_is_wrong_is_sent_no_third_time(
    liars_box: Box, liar: Liar, caplog: pytest.LogCaptureFixture
) -> None:
    ways = ["client_secret_basic", "client_secret_post", "private_key_jwt"]
    liar.metadata = {"token_endpoint_auth_methods_supported": ways}
    liar.modes["/token"] = (401, b'{"error": "invalid_client"}')
    browser = Browser(liars_box)
    refused(browser, browser.get(liar.allow(begin(browser, "liar"))))
    assert [path for path, *_ in liar.asked].count("/token") == 2
    assert len(warnings(caplog)) == 1


FAULTS = ["500", "garbage", "list", "deep", "huge", "hang", "drip", "redirect", "reset"]


@pytest.mark.parametrize("path", [METADATA, "/token", "/jwks"])
@pytest.mark.parametrize("mode", FAULTS)
def test_a_provider_in_trouble_is_a_page_and_a_line_in_the_log(
    liars_box: Box,
    liar: Liar,
    path: str,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    browser = Browser(liars_box)
    callback = None if path == METADATA else liar.allow(begin(browser, "liar"))
    liar.modes[path] = mode
    if mode in ("hang", "drip"):
        monkeypatch.setattr("core.openid.PATIENCE_SECONDS", 0.15)
    began = time.monotonic()
    with nobody_made(liars_box):
        refused(browser, browser.get(callback or "/oidc/liar"))
    assert time.monotonic() - began < 5
    assert len(warnings(caplog)) == 1
    assert liar.sent < 16 << 20
    assert "/elsewhere" not in [asked[0] for asked in liar.asked]
    # Nothing of it is kept: as soon as the provider is well, people sign in.
    liar.modes.clear()
    monkeypatch.setattr("core.openid.PATIENCE_SECONDS", 10.0)
    assert browser.get(liar.allow(begin(browser, "liar"))).status == 303


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/token", (200, b"{}")),
        ("/token", (200, b"null")),
        ("/token", (200, b'{"access_token": "canary-access", "token_type": "Bearer"}')),
        ("/token", (200, b'{"id_token": 5, "access_token": "canary-access"}')),
        ("/token", (400, b'{"error": "invalid_grant"}')),
        ("/token", (400, b'{"error": ["x"]}')),
        ("/token", (401, b'{"error": "invalid_client"}')),
        ("/token", (429, b"canary: slow down")),
        ("/jwks", (200, b"{}")),
        ("/jwks", (200, b'{"keys": []}')),
        ("/jwks", (200, b'{"keys": 5}')),
        ("/jwks", (200, b'{"keys": [5, {}, {"kty": "EC", "kid": "liar-key"}]}')),
        ("/jwks", (404, b"{}")),
        (METADATA, (200, b"{}")),
        (METADATA, (404, b"{}")),
    ],
)
def test_an_answer_that_says_something_else_is_refused_and_not_kept(
    liars_box: Box,
    liar: Liar,
    path: str,
    answer: tuple[int, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    browser = Browser(liars_box)
    callback = None if path == METADATA else liar.allow(begin(browser, "liar"))
    liar.modes[path] = answer
    with nobody_made(liars_box):
        refused(browser, browser.get(callback or "/oidc/liar"))
    assert len(warnings(caplog)) == 1
    liar.modes.clear()
    assert browser.get(liar.allow(begin(browser, "liar"))).status == 303


def test_the_log_does_not_repeat_what_a_provider_repeats(
    open_box: Box, liar: Liar, caplog: pytest.LogCaptureFixture
) -> None:
    browser = Browser(open_box)
    callback = liar.allow(begin(browser, "liar"))
    code = parameters(callback)["code"]
    told = f"redirect_uri differs: {code} {SECRET}\nand more"
    liar.modes["/token"] = (400, compact({"error": "invalid_grant", "error_description": told}))
    refused(browser, browser.get(callback))
    (line,) = warnings(caplog)
    assert "redirect_uri differs" in line  # which is what an operator needs to know
    assert "\n" not in line  # the rest is looked at after every test


def test_a_key_the_provider_publishes_later_is_fetched_and_one_it_drops_is_trusted_no_longer(
    liars_box: Box, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser, old, new = Browser(liars_box), liar.key, new_key("ES256")
    assert browser.get(liar.allow(begin(browser, "liar"))).status == 303
    liar.keys = [liar.public(new, kid="new-key"), {"kty": "of the future", "kid": "x"}]
    liar.id_token = lambda claims: seal({"alg": "ES256", "kid": "new-key"}, claims, new)
    assert browser.get(liar.allow(begin(browser, "liar"))).status == 303
    liar.id_token = lambda claims: seal({"alg": "ES256", "kid": "liar-key"}, claims, old)
    stranger = Browser(liars_box)
    refused(stranger, stranger.get(liar.allow(begin(stranger, "liar"))))


def test_what_a_provider_says_of_itself_is_asked_again_after_an_hour(
    liars_box: Box, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was stolen keeps its name when it is dropped, so nothing else would tell."""
    browser = Browser(liars_box)
    assert browser.get(liar.allow(begin(browser, "liar"))).status == 303
    asked = len(liar.asked)
    assert browser.get(liar.allow(begin(browser, "liar"))).status == 303
    assert [path for path, *_ in liar.asked[asked:]] == ["/token"]
    liar.keys = [liar.public(new_key("ES256"), kid="new-key")]
    now = clock.monotonic()
    monkeypatch.setattr("core.clock.monotonic", lambda: now + 3700)
    stranger = Browser(liars_box)
    refused(stranger, stranger.get(liar.allow(begin(stranger, "liar"))))


def test_providers_that_hang_hold_only_a_few_at_a_time(
    liars_box: Box, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else anybody could hold every thread that paid calls need."""
    monkeypatch.setattr("core.openid.PATIENCE_SECONDS", 30)
    liar.modes[METADATA] = "hang"
    held = [Background(lambda: Browser(liars_box).get("/oidc/liar")) for _ in range(8)]
    until(lambda: len(liar.asked) == 8, what="eight wait for the provider")
    began = time.monotonic()
    answer = Browser(liars_box).get("/oidc/liar")
    assert time.monotonic() - began < 5
    is_page(answer, 503)
    assert answer.headers["Retry-After"] == "1"
    liar.reset()
    assert {waiting.result().status for waiting in held} == {400}
    begin(Browser(liars_box), "liar")


def test_a_provider_that_is_down_is_told_apart_from_one_that_is_back(
    open_box: Box, second_provider: OpenIdProvider, tmp_path: Path
) -> None:
    """It comes back with new keys, as after an accident."""
    browser, who = Browser(open_box), person(second_provider)
    callback = second_provider.sign_in(begin(browser, "second"), who.sub)
    second_provider.stop()
    with nobody_made(open_box):
        refused(browser, browser.get(callback))
    with Box(
        tmp_path / "new", section("second", second_provider.metadata_url, second_provider.client_id)
    ) as box:
        visitor = Browser(box)
        refused(visitor, visitor.get("/oidc/second"))
    second_provider.start()
    assert sign_in(browser, second_provider, "second", who).status == 303


def test_a_database_that_cannot_answer_is_our_trouble_and_not_the_providers(
    open_box: Box, openid_provider: OpenIdProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser, who = Browser(open_box), person(openid_provider)
    callback = openid_provider.sign_in(begin(browser, "rs"), who.sub)

    def broken(*args: Any, **options: Any) -> Any:
        raise errors.storage_unavailable()

    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", broken)
        answer = browser.get(callback)
    is_page(answer, 503)
    assert answer.headers["Retry-After"] == "1"
    sign_in(browser, openid_provider, "rs", who)
    authorize = f"/oidc/rs?link={browser.csrf()}"
    with monkeypatch.context() as patch:
        patch.setattr(Database, "reading", broken)
        is_page(browser.get(authorize), 503)


# Who somebody is here


def test_an_unknown_person_is_not_taken_in_where_sign_up_is_closed(
    closed_box: Box, openid_provider: OpenIdProvider
) -> None:
    browser, who = Browser(closed_box), person(openid_provider)
    with nobody_made(closed_box):
        answer = sign_in(browser, openid_provider, "rs", who)
        refused(browser, answer, 403)
    assert "signup_closed" in answer.body.decode()


@pytest.mark.parametrize("verified", [True, False, "true", 1, None])
def test_only_an_address_the_provider_has_verified_is_kept(
    open_box: Box, openid_provider: OpenIdProvider, verified: Any
) -> None:
    browser, who = Browser(open_box), person(openid_provider, verified=verified)
    assert sign_in(browser, openid_provider, "rs", who).status == 303
    kept = who.email in browser.get("/dashboard").body.decode()
    assert kept is (verified is True)


@pytest.mark.parametrize(
    "email", ["no address", "", "a@b\nBcc: c@d", "two@example.com,three@example.com", "a" * 300]
)
def test_an_address_that_is_none_is_not_kept(
    open_box: Box, openid_provider: OpenIdProvider, email: str
) -> None:
    browser, sub = Browser(open_box), f"person-{next(_numbers)}"
    openid_provider.set_user(sub, email=email, email_verified=True)
    assert sign_in(browser, openid_provider, "rs", sub).status == 303
    assert '<span class="who">user_' in browser.get("/dashboard").body.decode()


def test_a_verified_address_of_a_user_with_a_password_takes_nobody_over(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    owner, browser = person(openid_provider), Browser(open_box)
    # Whoever took the address first may not own it, and waits for its owner to move in.
    signed_up = Browser(open_box)
    signed_up.submit("/signup", email=owner.email, password=PASSWORD)
    assert is_signed_in(signed_up)
    with nobody_made(open_box):
        answer = sign_in(browser, openid_provider, "rs", owner)
        refused(browser, answer, 409)
    text = answer.body.decode()
    assert owner.email in text
    assert "then add Provider rs" in text
    # Whoever has the password may add the provider, as the page says.
    authorize = press(signed_up, "/dashboard/settings", "Add Provider rs").headers["Location"]
    assert signed_up.get(openid_provider.sign_in(authorize, owner.sub)).status == 303
    assert sign_in(browser, openid_provider, "rs", owner).status == 303
    assert account_of(browser) == account_of(signed_up)


def test_a_verified_address_of_a_user_of_another_provider_takes_nobody_over(
    open_box: Box, openid_provider: OpenIdProvider, second_provider: OpenIdProvider
) -> None:
    who, browser = person(openid_provider, second_provider), Browser(open_box)
    assert sign_in(Browser(open_box), openid_provider, "rs", who).status == 303
    with nobody_made(open_box):
        answer = sign_in(browser, second_provider, "second", who)
        refused(browser, answer, 409)
    assert "password" not in answer.body.decode()  # they have none


def test_somebody_the_operator_added_becomes_that_user(
    closed_box: Box, openid_provider: OpenIdProvider, second_provider: OpenIdProvider
) -> None:
    who, browser = person(openid_provider, second_provider), Browser(closed_box)
    assert closed_box.cli("users", "add", who.email.upper()).exit_code == 0
    before = population(closed_box)
    assert sign_in(browser, openid_provider, "rs", who).status == 303
    assert population(closed_box)[:2] == before[:2]
    assert f'<span class="who">{who.email}</span>' in browser.get("/dashboard").body.decode()
    assert identities(browser) == [(openid_provider.issuer, who.sub)]
    # From then on there is a way in, and no other provider's word is taken.
    refused(other := Browser(closed_box), sign_in(other, second_provider, "second", who), 409)


def test_an_address_nobody_verified_is_not_the_user_the_operator_added(
    closed_box: Box, openid_provider: OpenIdProvider
) -> None:
    for verified in (False, "true", None):
        who, browser = person(openid_provider, verified=verified), Browser(closed_box)
        assert closed_box.cli("users", "add", who.email).exit_code == 0
        with nobody_made(closed_box):
            refused(browser, sign_in(browser, openid_provider, "rs", who), 403)


@pytest.mark.parametrize("command", ["suspend", "close"])
def test_somebody_kept_out_does_not_come_in_through_a_provider(
    open_box: Box, openid_provider: OpenIdProvider, command: str
) -> None:
    browser, who = Browser(open_box), person(openid_provider)
    sign_in(browser, openid_provider, "rs", who)
    done = open_box.cli("users", command, account_of(browser))
    assert done.exit_code == 0, done.output
    assert not is_signed_in(browser)
    with nobody_made(open_box):
        answer = sign_in(browser, openid_provider, "rs", who)
        refused(browser, answer, 403)
    assert "account_suspended" in answer.body.decode()


def test_the_audit_says_who_came_and_never_takes_a_providers_word_for_a_name(
    open_box: Box, liar: Liar
) -> None:
    """A subject may be `operator`, which is what the audit calls the operator."""
    browser = Browser(open_box)
    assert browser.get(liar.allow(begin(browser, "liar"), sub="operator")).status == 303
    token = browser.token()
    entries = open_box.get("/api/v1/audit", token).json()["data"]
    linked = next(entry for entry in entries if entry["action"] == "identity.linked")
    assert linked["actor"] == "oidc:liar"
    assert linked["detail"] == {"issuer": liar.issuer, "sub": "operator"}
    assert not [entry for entry in entries if entry["actor"] == "operator"]


# Adding a provider


def test_two_providers_lead_to_one_user(
    open_box: Box, openid_provider: OpenIdProvider, second_provider: OpenIdProvider
) -> None:
    one, other = person(openid_provider), person(second_provider)
    browser, elsewhere = Browser(open_box), Browser(open_box)
    sign_in(browser, openid_provider, "rs", one)
    mine, before = account_of(browser), population(open_box)
    sent = press(browser, "/dashboard/settings", "Add Provider second")
    back = browser.get(second_provider.sign_in(sent.headers["Location"], other.sub))
    assert (back.status, back.headers["Location"]) == (303, "/dashboard")
    assert population(open_box)[:2] == before[:2]
    assert account_of(browser) == mine
    both = [(openid_provider.issuer, one.sub), (second_provider.issuer, other.sub)]
    assert sorted(identities(browser)) == sorted(both)
    sign_in(elsewhere, second_provider, "second", other)
    assert account_of(elsewhere) == mine
    text = elsewhere.get("/dashboard/settings").body.decode()
    assert "oidc:rs" in text
    assert "oidc:second" in text


def test_a_link_that_is_not_of_this_browsers_page_is_refused(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    """Else a stranger's link could add the stranger's identity to who follows it."""
    mine, theirs = Browser(open_box), Browser(open_box)
    sign_in(mine, openid_provider, "rs", person(openid_provider))
    sign_in(theirs, openid_provider, "rs", person(openid_provider))
    for token in ("", "x", theirs.csrf()):
        is_page(mine.get(f"/oidc/rs?link={quote(token, safe='')}"), 403)
    stranger = Browser(open_box)
    for token in ("", mine.csrf(), stranger.csrf("/login")):
        is_page(stranger.get(f"/oidc/rs?link={quote(token, safe='')}"), 403)
    assert len(identities(mine)) == 1


def test_an_identity_of_another_user_is_not_added(
    open_box: Box, openid_provider: OpenIdProvider, second_provider: OpenIdProvider
) -> None:
    mine, theirs = Browser(open_box), Browser(open_box)
    owner = person(second_provider)
    sign_in(mine, openid_provider, "rs", person(openid_provider))
    sign_in(theirs, second_provider, "second", owner)
    account = account_of(mine)
    authorize = press(mine, "/dashboard/settings", "Add Provider second").headers["Location"]
    with nobody_made(open_box):
        is_page(mine.get(second_provider.sign_in(authorize, owner.sub)), 409)
    assert account_of(mine) == account
    assert len(identities(mine)) == len(identities(theirs)) == 1


def test_an_identity_one_has_already_can_be_added_again(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    browser, who = Browser(open_box), person(openid_provider)
    sign_in(browser, openid_provider, "rs", who)
    authorize = press(browser, "/dashboard/settings", "Add Provider rs").headers["Location"]
    with nobody_made(open_box):
        assert browser.get(openid_provider.sign_in(authorize, who.sub)).status == 303
    assert len(identities(browser)) == 1


@pytest.mark.parametrize("meanwhile", ["signed out", "ended elsewhere", "somebody else"])
def test_an_identity_is_added_only_to_who_asked_and_is_still_there(
    open_box: Box,
    openid_provider: OpenIdProvider,
    second_provider: OpenIdProvider,
    meanwhile: str,
) -> None:
    browser, mine = Browser(open_box), person(openid_provider)
    sign_in(browser, openid_provider, "rs", mine)
    authorize = press(browser, "/dashboard/settings", "Add Provider second").headers["Location"]
    callback = second_provider.sign_in(authorize, person(second_provider).sub)
    begun = browser.cookies["farebox"]
    if meanwhile == "ended elsewhere":
        elsewhere = Browser(open_box)
        sign_in(elsewhere, openid_provider, "rs", mine)
        elsewhere.post("/dashboard/settings/sessions/end-all", {"csrf_token": elsewhere.csrf()})
    else:
        browser.post("/logout", {"csrf_token": browser.csrf()})
        if meanwhile == "somebody else":
            sign_in(browser, openid_provider, "rs", other := person(openid_provider))
        with nobody_made(open_box):
            is_page(browser.get(callback), 400)  # the cookie has forgotten what was begun
    if meanwhile == "signed out":
        browser.cookies["farebox"] = begun
    elif meanwhile == "somebody else":
        assert identities(browser) == [(openid_provider.issuer, other.sub)]
        # No browser of ours comes to hold both. It is the last door, so it is tried all the same.
        cookies = SecureCookieSessionInterface().get_signing_serializer(open_box.app)
        assert cookies is not None
        old, new = cookies.loads(begun), cookies.loads(browser.cookies["farebox"])
        kept = {name: old[name] for name in old if name == "oidc" or name.startswith("_state_")}
        browser.cookies["farebox"] = str(cookies.dumps({**new, **kept}))
    with nobody_made(open_box):
        is_page(browser.get(callback), 409)
    elsewhere = Browser(open_box)
    sign_in(elsewhere, openid_provider, "rs", mine)
    assert identities(elsewhere) == [(openid_provider.issuer, mine.sub)]


def unlink(browser: Browser, issuer: str, subject: str) -> Answer:
    form = {"csrf_token": browser.csrf(), "issuer": issuer, "subject": subject}
    return browser.post("/dashboard/settings/identities/unlink", form)


def test_an_identity_can_be_unlinked_unless_it_is_the_last_way_in(
    open_box: Box, openid_provider: OpenIdProvider, second_provider: OpenIdProvider
) -> None:
    one, other = person(openid_provider), person(second_provider)
    browser, stranger = Browser(open_box), Browser(open_box)
    sign_in(browser, openid_provider, "rs", one)
    is_page(unlink(browser, openid_provider.issuer, one.sub), 409)
    authorize = press(browser, "/dashboard/settings", "Add Provider second").headers["Location"]
    browser.get(second_provider.sign_in(authorize, other.sub))
    # Somebody else's identity, and one nobody has.
    sign_in(stranger, openid_provider, "rs", who := person(openid_provider))
    is_page(unlink(browser, openid_provider.issuer, who.sub), 404)
    is_page(unlink(browser, openid_provider.issuer, "nobody"), 404)
    without = browser.post(
        "/dashboard/settings/identities/unlink",
        {"issuer": openid_provider.issuer, "subject": one.sub},
    )
    is_page(without, 403)
    assert len(identities(browser)) == 2
    # The first goes, by the page's own form; what is left is the last.
    unlinked = browser.submit("/dashboard/settings", "/dashboard/settings/identities/unlink")
    assert unlinked.status == 303
    ((issuer, subject),) = identities(browser)
    is_page(unlink(browser, issuer, subject), 409)
    mine = account_of(browser)
    again = Browser(open_box)
    if issuer == openid_provider.issuer:
        sign_in(again, openid_provider, "rs", subject)
    else:
        sign_in(again, second_provider, "second", subject)
    assert account_of(again) == mine


def test_an_identity_that_was_unlinked_is_nobodys(
    closed_box: Box, openid_provider: OpenIdProvider
) -> None:
    who, browser = person(openid_provider), Browser(closed_box)
    added = closed_box.cli("users", "add", who.email, "--password-stdin", stdin=PASSWORD)
    assert added.exit_code == 0, added.output
    browser.sign_in(who.email)
    authorize = press(browser, "/dashboard/settings", "Add Provider rs").headers["Location"]
    browser.get(openid_provider.sign_in(authorize, who.sub))
    assert unlink(browser, openid_provider.issuer, who.sub).status == 303
    assert identities(browser) == []
    refused(other := Browser(closed_box), sign_in(other, openid_provider, "rs", who), 409)


# Invitations


def inviter(box: Box, email: str) -> Browser:
    """Somebody who is signed in and may invite."""
    added = box.cli("users", "add", email, "--password-stdin", stdin=PASSWORD)
    assert added.exit_code == 0, added.output
    browser = Browser(box)
    browser.sign_in(email)
    assert is_signed_in(browser)
    return browser


def invitation(host: Browser, email: str) -> str:
    """The path of an invitation to the host's account."""
    answer = host.request(
        "POST", "/api/v1/members", {"Authorization": f"Bearer {host.token()}"},
        value={"email": email},
    )  # fmt: skip
    assert answer.status == 201, answer.body
    return str(answer.json()["invite_url"]).removeprefix(BASE)


def belongs_to(browser: Browser, account: str) -> bool:
    """Whether who is signed in may act in the account."""
    answer = browser.request(
        "POST", "/api/v1/session-tokens", {"X-CSRF-Token": browser.csrf()},
        value={"account": account},
    )  # fmt: skip
    assert answer.status in (201, 403, 404), answer.body
    return answer.status == 201


def test_somebody_new_joins_an_account_through_a_provider(
    closed_box: Box, openid_provider: OpenIdProvider
) -> None:
    host = inviter(closed_box, f"host-{next(_numbers)}@example.com")
    who, browser = person(openid_provider), Browser(closed_box)
    path = invitation(host, who.email)
    sent = press(browser, path, "Join with Provider rs")
    back = browser.get(openid_provider.sign_in(sent.headers["Location"], who.sub))
    assert back.status == 303
    shown = browser.follow(back)
    assert shown.status == 200
    assert f'<span class="who">{who.email}</span>' in shown.body.decode()
    assert belongs_to(browser, account_of(host))
    assert account_of(browser) != account_of(host)  # which they have beside it
    # The invitation is used up, by them and for everybody.
    assert Browser(closed_box).get(path).status == 404
    late, other = Browser(closed_box), person(openid_provider)
    with nobody_made(closed_box):
        query = f"?invite={path.partition('=')[2]}"
        refused(late, sign_in(late, openid_provider, "rs", other, query), 404)


def test_somebody_known_signs_in_and_then_joins(
    open_box: Box, openid_provider: OpenIdProvider
) -> None:
    host = inviter(open_box, f"host-{next(_numbers)}@example.com")
    who, browser = person(openid_provider), Browser(open_box)
    sign_in(Browser(open_box), openid_provider, "rs", who)
    path = invitation(host, "another-address@example.com")
    sent = press(browser, path, "Join with Provider rs")
    shown = browser.follow(browser.get(openid_provider.sign_in(sent.headers["Location"], who.sub)))
    assert shown.status == 200
    assert "<button>Join</button>" in shown.body.decode()
    assert not belongs_to(browser, account_of(host))
    assert browser.submit(path, "/invite").status == 303
    assert belongs_to(browser, account_of(host))


def test_an_invitation_that_was_made_up_takes_nobody_in(
    closed_box: Box, openid_provider: OpenIdProvider
) -> None:
    for query in ("?invite=made-up", "?invite=" + "x" * 5000):
        browser = Browser(closed_box)
        with nobody_made(closed_box):
            answer = sign_in(browser, openid_provider, "rs", person(openid_provider), query)
            refused(browser, answer, 404)


def test_an_invitation_that_was_taken_back_meanwhile_takes_nobody_in(
    closed_box: Box, openid_provider: OpenIdProvider
) -> None:
    host = inviter(closed_box, f"host-{next(_numbers)}@example.com")
    who, browser = person(openid_provider), Browser(closed_box)
    sent = press(browser, invitation(host, who.email), "Join with Provider rs")
    callback = openid_provider.sign_in(sent.headers["Location"], who.sub)
    token = host.token()
    members = closed_box.get("/api/v1/members", token).json()["data"]
    invited = next(member for member in members if member["status"] == "invited")
    assert closed_box.request("DELETE", f"/api/v1/members/{invited['id']}", key=token).status == 204
    with nobody_made(closed_box):
        refused(browser, browser.get(callback), 404)


# The real server


def test_nothing_of_the_environment_gets_between_an_instance_and_its_provider(
    start_farebox: StartFarebox, openid_provider: OpenIdProvider
) -> None:
    dead = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), DEAD)
    environment = {**dead, "NO_PROXY": "", "no_proxy": ""}
    config = instance_section("open") + "".join(
        section(name, openid_provider.metadata_url, client)
        for name, client in (
            ("rs", openid_provider.client_id),
            ("post", openid_provider.post_client_id),
        )
    )
    box: Farebox = start_farebox(config, workers=1, environment=environment)
    openid_provider.allow_redirect(f"{box.url}/oidc/rs/callback", f"{box.url}/oidc/post/callback")
    codes = []
    for name in ("rs", "post"):
        browser = Browser(box)
        callback = openid_provider.sign_in(
            begin(browser, name), (who := person(openid_provider)).sub
        )
        codes.append(parameters(callback)["code"])
        assert browser.get(callback).status == 303
        assert who.email in browser.get("/dashboard").body.decode()
        assert box.get("/api/v1/account", browser.token()).json()["credits"] == SIGNUP_CREDITS
    browser = Browser(box)
    callback = openid_provider.sign_in(begin(browser, "rs"), who.sub)
    codes.append(parameters(callback)["code"])
    refused(browser, browser.get(altered(callback, iss=None)))
    log = box.log()
    assert "WARNING" in log and "signing in through rs failed" in log
    for secret in (*codes, SECRET, parameters(callback)["state"]):
        assert secret not in log


def test_no_password_of_a_netrc_file_is_sent_to_a_provider(
    liars_box: Box, liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login evil password canary-of-netrc\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", DEAD)
    browser = Browser(liars_box)
    assert browser.get(liar.allow(begin(browser, "liar"))).status == 303
    sent = {path: headers.get("Authorization", "") for path, headers, _ in liar.asked}
    assert list(sent) == [METADATA, "/token", "/jwks"]
    assert (sent[METADATA], sent["/jwks"]) == ("", "")
    assert b"evil" not in base64.b64decode(sent["/token"].removeprefix("Basic "))


# Started without


def test_nothing_of_it_is_loaded_where_no_provider_is_configured(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from inprocess import Box; from pathlib import Path\n"
        "box = Box(Path(sys.argv[1])); assert box.get('/login').status == 200\n"
        "assert box.get('/oidc/rs').status == 404\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'authlib', 'requests'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "instance")],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_starting_asks_no_provider(tmp_path: Path, liar: Liar) -> None:
    with Box(tmp_path / "instance", liars_only(liar)) as box:
        browser = Browser(box)
        assert "Sign in with Provider liar" in browser.get("/login").body.decode()
        assert browser.get("/healthz").status == 200
        assert liar.asked == []
        begin(browser, "liar")
        assert [path for path, *_ in liar.asked] == [METADATA]
