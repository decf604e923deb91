"""Outside issuers: whose tokens are taken, by which keys, and what becomes of the person."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pytest
from bearers import (
    CONFIG,
    TYPE,
    Everywhere,
    Line,
    Said,
    Standstill,
    accepted,
    at_once,
    paid,
    refreshed,
    refused_well,
)
from conftest import StartFarebox
from cryptography.hazmat.primitives.asymmetric import rsa
from doubles import Upstream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import Box, Clock, inbound
from issuer import (
    Issuer,
    Mode,
    b64,
    changed,
    compact,
    forgeries,
    parts,
    public_jwk,
    seal,
    signature,
    stale,
    twin,
)
from server import Answer, Farebox, until

from core import access, issuers, jose, upkeep
from core.errors import Refusal

FUZZED = 20_000 if os.environ.get("FAREBOX_TORTURE") == "1" else 150
SIGNUP_CREDITS = 7
OK = {Said(200, None)}
REFUSED = {Said(401, "invalid_token")}
FAULTS: tuple[Mode, ...] = ("500", "garbage", "empty", "redirect", "huge", "drip", "hang")
Fault = Mode | Literal["stopped"]
_numbers = count(1)


def section(issuer: Issuer, pem_file: str | None = None, signup: bool = True) -> str:
    """An issuer in the configuration, by a file or by its address."""
    key = f'jwks_url = "{issuer.jwks_url}"' if pem_file is None else f'pem_file = "{pem_file}"'
    return f"""
[[issuers]]
issuer = "{issuer.issuer}"
audience = "{issuer.audience}"
{key}
signup = {str(signup).lower()}
"""


def config(upstream: Upstream, *sections: str, signup: str = "closed") -> str:
    instance = f"""
[instance]
signup = "{signup}"
signup_credits = {SIGNUP_CREDITS}
cors_origins = ["https://app.example"]
"""
    return CONFIG.format(url=upstream.url) + instance + "".join(sections)


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


@pytest.fixture(scope="module")
def by_pem() -> Issuer:
    """An issuer that publishes nothing; its key is in a file."""
    return Issuer(issuer="pem.example")


@pytest.fixture(scope="module")
def box(
    tmp_path_factory: pytest.TempPathFactory,
    upstream_server: Upstream,
    issuer: Issuer,
    by_pem: Issuer,
) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("instance")
    (folder / "issuer.pem").write_text(by_pem.pem)
    text = config(upstream_server, section(issuer), section(by_pem, "issuer.pem"))
    with Box(folder, text) as box:
        until(lambda: account(box, issuer.token()).status == 200, 10, "the keys are known")
        yield box
        settled()


@pytest.fixture
def fickle() -> Iterator[Issuer]:
    """An issuer of a test's own, to misbehave."""
    with Issuer() as running:
        yield running
        running.stop()
        settled()


OpenBox = Callable[..., Box]


@pytest.fixture
def open_box(tmp_path: Path, upstream_server: Upstream, fickle: Issuer) -> Iterator[OpenBox]:
    """Open an instance that takes the tokens of `fickle`; opened again, it is the same one."""
    with contextlib.ExitStack() as stack:
        yield lambda *sections, **options: stack.enter_context(
            Box(
                tmp_path / "instance",
                config(upstream_server, *(sections or [section(fickle)]), **options),
            )
        )
        fickle.stop()
        settled()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are fetched as often as anybody asks for it."""
    monkeypatch.setattr(issuers, "FETCH_AT_MOST_EVERY_MS", 0)
    monkeypatch.setattr(issuers, "REFRESH_EVERY_MS", 0)
    monkeypatch.setattr(issuers, "_FETCH_SECONDS", 0.5)


@pytest.fixture(scope="module")
def live_issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


@pytest.fixture(scope="module")
def server(start_farebox: StartFarebox, upstream_server: Upstream, live_issuer: Issuer) -> Farebox:
    return start_farebox(config(upstream_server, section(live_issuer)), workers=2, threads=16)


@pytest.fixture(scope="module")
def backstage(server: Farebox) -> Iterator[Box]:
    """The running instance's own rules beside it, as the command line calls them."""
    with Box(server.instance, FAREBOX_BIND=server.environment["FAREBOX_BIND"]) as box:
        yield box
        settled()


@pytest.fixture(scope="module")
def workers(server: Farebox, live_issuer: Issuer) -> Iterator[Everywhere]:
    """A connection to each worker, all of which know the issuer's keys."""
    with Everywhere(server) as workers:
        token = live_issuer.token()
        until(lambda: Said(503, "overloaded") not in workers.say(token), 20, "the keys are known")
        yield workers


def settled() -> None:
    """Nobody fetches keys any more in this process."""

    def nobody() -> bool:
        return not any("_fetch" in thread.name for thread in threading.enumerate())

    until(nobody, 20, "the fetches have ended")


def account(box: Box | Farebox, token: str) -> Answer:
    return box.get("/api/v1/account", token)


def somebody() -> str:
    """A subject nobody has seen yet."""
    return f"did:privy:{next(_numbers)}-{secrets.token_hex(4)}"


def rich(box: Box, issuer: Issuer, subject: str | None = None, **claims: Any) -> tuple[str, str]:
    """Somebody new with credits: their subject and a token."""
    subject = subject or somebody()
    token = issuer.token(subject, **claims)
    found = account(box, token)
    assert found.status == 200, found.body
    box.grant(found.json()["account"], 1000)
    return subject, token


def spoil(issuer: Issuer, fault: Fault) -> None:
    """Have an issuer misbehave from now on."""
    if fault == "stopped":
        issuer.stop()
    else:
        issuer.mode = fault


def mend(issuer: Issuer, fault: Fault) -> None:
    """Have it behave again."""
    if fault == "stopped":
        issuer.start()
    issuer.mode = "ok"


def refusal(answer: Answer) -> tuple[int, str | None]:
    return answer.status, answer.code


# What is refused


@pytest.mark.parametrize("way", ["jwks", "pem"])
def test_no_forged_token_of_an_issuer_is_taken(
    box: Box, issuer: Issuer, by_pem: Issuer, upstream: Upstream, way: str
) -> None:
    whose = issuer if way == "jwks" else by_pem
    _, token = rich(box, whose)
    assert paid(box, token).status == 200
    with Standstill(box, upstream):
        assert accepted(box, forgeries(token, whose.pem)) == {}
    assert paid(box, token).status == 200


@pytest.mark.parametrize("way", ["jwks", "pem"])
def test_no_token_of_an_issuer_is_taken_that_says_what_it_may_not(
    box: Box, issuer: Issuer, by_pem: Issuer, upstream: Upstream, way: str
) -> None:
    whose, other = (issuer, by_pem) if way == "jwks" else (by_pem, issuer)
    subject, _ = rich(box, whose)
    good = whose.claims(subject)
    assert paid(box, whose.sign(good, {})).status == 200
    now = int(time.time())
    lies: dict[str, dict[str, Any]] = {
        "a day and a second": good | {"exp": good["iat"] + 24 * 3600 + 1},
        "61 s ago": good | {"iat": now - 100, "exp": now - 61},
        "of the other issuer": good | {"iss": other.issuer},
        "of ours": good | {"iss": box.settings.public_url, "aud": box.settings.public_url},
        "of ours in part": good | {"aud": box.settings.public_url},
        "sub of 256 letters": good | {"sub": "s" * 256},
    }
    for value in (1, True, "", " ", ["x"], {"x": 1}, "x" * 256, "x\n", "\ud800"):
        lies[f"jti {value!r:.20}"] = good | {"jti": value}
    signed = {name: whose.sign(said, {}) for name, said in lies.items()}
    for typ in (TYPE, "dpop+jwt", "logout+jwt", "JWT ", "application/jwt"):
        signed[f"typ {typ}"] = whose.sign(good, {"typ": typ})
    if way == "jwks":
        for kid in (None, "", f"{whose.kid} ", 1, [whose.kid]):
            signed[f"kid {kid}"] = whose.sign(good, {"kid": kid})
    with Standstill(box, upstream):
        assert accepted(box, stale(whose.sign, good) | signed) == {}


def test_what_issuers_may_say_differently_is_taken(
    box: Box, issuer: Issuer, by_pem: Issuer
) -> None:
    for whose in (issuer, by_pem):
        subject, now = somebody(), int(time.time())
        aud = whose.audience
        for claims in (
            {"aud": [aud]},
            {"aud": ["another", aud]},
            {"exp": now + 24 * 3600 - 5, "iat": now - 4},
            {"exp": now - 30, "iat": now - 60},  # their clock may be slow
            {"iat": now + 30},  # or fast
            {"nbf": now + 30},
            {"iat": now + 0.5, "exp": now + 60.25},
            {"jti": "x" * 255},
            {"sid": None},
            {"sid": ["whatever"], "roles": ["admin"], "scope": 1, "acct": "acct_operator"},
        ):
            answer = account(box, whose.token(subject, **claims))
            assert answer.status == 200, (whose.issuer, claims, answer.body)
        for typ in (None, "JWT", "jwt", "at+jwt", "AT+JWT"):
            assert account(box, whose.token(subject, header={"typ": typ})).status == 200, typ
    for kid in (None, "", "whatever", issuer.kid):
        token = by_pem.token(header={"kid": kid})
        assert account(box, token).status == 200, "there is but one key in a file"


@pytest.mark.parametrize("way", ["jwks", "pem"])
@pytest.mark.parametrize("alg", ["ES256", "ES384", "ES512", "RS256", "PS256", "RS512", "EdDSA"])
def test_issuers_sign_as_they_like(
    tmp_path: Path, upstream_server: Upstream, upstream: Upstream, alg: str, way: str
) -> None:
    with Issuer(alg) as issuer:
        folder = tmp_path / "instance"
        folder.mkdir()
        (folder / "issuer.pem").write_text(issuer.pem)
        pem_file = "issuer.pem" if way == "pem" else None
        with Box(folder, config(upstream_server, section(issuer, pem_file))) as box:
            token = issuer.token()
            until(lambda: account(box, token).status == 200, 10, "the keys are known")
            assert paid(box, token).status == 200
            head, body, _ = token.split(".")
            sealed = parts(token)[2]
            touched = f"{head}.{body}.{b64(bytes([sealed[0] ^ 1]) + sealed[1:])}"
            named = parts(token)[0] | {"alg": "none"}
            others = [a for a in ("ES256", "ES384", "RS256", "EdDSA", "HS256") if a != alg]
            tokens = {"touched": touched, "none": f"{b64(compact(named))}.{body}.{b64(sealed)}"}
            for other in others:
                tokens[other] = issuer.token(header={"alg": other})
            with Standstill(box, upstream):
                assert accepted(box, tokens) == {}
        settled()


def test_a_key_is_used_for_the_algorithm_it_is_published_for(
    fickle: Issuer, open_box: OpenBox, upstream: Upstream
) -> None:
    kid = fickle.rotate("RS256")
    box = open_box()
    token = fickle.token()
    until(lambda: account(box, token).status == 200, 10, "the keys are known")
    head = {"alg": "PS256", "typ": "JWT", "kid": kid}
    data = f"{b64(compact(head))}.{b64(compact(fickle.claims()))}"
    other = f"{data}.{b64(signature(fickle.key, 'PS256', data.encode()))}"
    with Standstill(box, upstream):
        assert accepted(box, {"PS256": other}) == {}


# First sight


def test_an_issuers_subject_becomes_a_user_with_an_account(box: Box, issuer: Issuer) -> None:
    subject = somebody()
    users = box.row("SELECT COUNT(*) FROM user")[0]
    token = issuer.token(subject)
    found = account(box, token).json()
    assert found["privyUserId"] == subject
    assert found["credits"] == SIGNUP_CREDITS
    assert paid(box, token).status == 200
    assert box.standing(found["account"]) == (SIGNUP_CREDITS - 1, 0)
    for again in (token, twin(token), issuer.token(subject), issuer.token(subject, jti="other")):
        shown = account(box, again).json()
        assert (shown["account"], shown["credits"]) == (found["account"], SIGNUP_CREDITS - 1)
    assert box.row("SELECT COUNT(*) FROM user")[0] == users + 1
    assert box.cli("credits", "balance", subject).stdout.strip() == str(SIGNUP_CREDITS - 1)
    call = box.get("/api/v1/usage", token).json()["data"][0]
    assert (call["payer"], call["key_id"]) == ("session", None)


def test_only_privys_subjects_are_shown_as_privys(box: Box, by_pem: Issuer) -> None:
    assert account(box, by_pem.token("did:privy:pretender")).json()["privyUserId"] is None


def test_one_subject_of_two_issuers_is_two_people(box: Box, issuer: Issuer, by_pem: Issuer) -> None:
    subject = somebody()
    accounts = {account(box, whose.token(subject)).json()["account"] for whose in (issuer, by_pem)}
    assert len(accounts) == 2


def test_one_jti_of_two_subjects_is_two_tokens(box: Box, issuer: Issuer) -> None:
    """An issuer should not give one twice, but what it gives one person is never another's."""
    jti = secrets.token_hex(8)
    one, other = (issuer.token(somebody(), jti=jti) for _ in range(2))
    first, second = account(box, one).json(), account(box, other).json()
    assert first["account"] != second["account"]
    assert first["privyUserId"] != second["privyUserId"]
    assert box.request("DELETE", "/api/v1/session-tokens/current", key=one).status == 204
    assert refused_well(one, account(box, one))
    assert account(box, other).status == 200
    assert box.cli("tokens", "deny", "--jti", jti).exit_code == 0
    assert refused_well(other, account(box, other))


def test_an_address_links_nobody(box: Box, issuer: Issuer) -> None:
    taken = box.payer()
    lies: list[dict[str, Any]] = [
        {"email": taken.email, "email_verified": True},
        {"email": taken.email},
        {"email": "Unverified@Example.com"},
        {"email": "unverified@example.com", "email_verified": "true"},
        {"email": ["x"], "email_verified": True},
        {"email": "not an address", "email_verified": True},
    ]
    for claims in lies:
        found = account(box, issuer.token(somebody(), **claims)).json()
        assert found["account"] != taken.account, claims
        row = box.row("SELECT email FROM user WHERE account_id = :id", id=found["account"])
        assert row == (None,), claims
    token = issuer.token(somebody(), email="Verified@Example.com", email_verified=True)
    found = account(box, token).json()
    row = box.row("SELECT email FROM user WHERE account_id = :id", id=found["account"])
    assert row == ("verified@example.com",)


def test_fifty_first_uses_at_once_make_one_user(
    server: Farebox, backstage: Box, workers: Everywhere, live_issuer: Issuer
) -> None:
    for same in (True, False):
        subject = somebody()
        users = backstage.row("SELECT COUNT(*) FROM user")[0]
        tokens = [live_issuer.token(subject) for _ in range(50)]

        def use(n: int, tokens: list[str] = tokens, same: bool = same) -> Answer:
            return account(server, tokens[0 if same else n])

        answers = at_once(50, use)
        assert [answer.status for answer in answers] == [200] * 50
        assert len({answer.json()["account"] for answer in answers}) == 1
        assert {answer.json()["credits"] for answer in answers} == {SIGNUP_CREDITS}
        assert backstage.row("SELECT COUNT(*) FROM user")[0] == users + 1
    server.books()


def test_while_sign_up_is_closed_no_stranger_comes_in(
    fickle: Issuer, open_box: OpenBox, upstream: Upstream
) -> None:
    box = open_box(section(fickle, signup=False))
    token = fickle.token(somebody())
    until(lambda: account(box, token).status != 503, 10, "the keys are known")
    with Standstill(box, upstream):
        for answer in (
            paid(box, token), account(box, token), box.post("/api/v1/session-tokens", token)
        ):  # fmt: skip
            assert refusal(answer) == (403, "signup_closed")
    forged = f"{token.rpartition('.')[0]}.{'A' * 86}"
    assert refusal(paid(box, forged)) == (401, "invalid_token"), "a forger learns nothing"


def test_who_was_let_in_may_come_back_when_sign_up_is_closed(
    fickle: Issuer, open_box: OpenBox
) -> None:
    known = somebody()
    box = open_box(section(fickle, signup=False), signup="open")
    until(lambda: account(box, fickle.token(known)).status == 200, 10, "the keys are known")
    box = open_box(section(fickle, signup=False))
    assert account(box, fickle.token(known)).status == 200
    assert refusal(account(box, fickle.token(somebody()))) == (403, "signup_closed")
    box = open_box(section(fickle, signup=True))
    assert account(box, fickle.token(somebody())).status == 200, "the issuer's own word counts"


def test_whom_the_operator_keeps_out_is_out_by_every_token(box: Box, issuer: Issuer) -> None:
    subject, token = rich(box, issuer)
    assert box.cli("users", "suspend", subject, "--reason", "fraud").exit_code == 0
    for tried in (token, issuer.token(subject)):
        answer = paid(box, tried)
        assert refusal(answer) == (403, "account_suspended")
        assert answer.json()["reason"] == "fraud"
    assert box.cli("users", "resume", subject).exit_code == 0
    assert paid(box, token).status == 200
    users = box.row("SELECT COUNT(*) FROM user")
    assert box.cli("users", "close", subject).exit_code == 0
    for tried in (token, issuer.token(subject)):
        assert refused_well(tried, paid(box, tried))
    assert box.row("SELECT COUNT(*) FROM user") == users, "nor do they begin anew"


# Its keys


def test_known_keys_go_on_while_the_issuer_is_down_and_over_a_restart(
    fickle: Issuer, open_box: OpenBox, impatient: None
) -> None:
    box = open_box()
    until(lambda: account(box, fickle.token()).status == 200, 10, "the keys are known")
    fickle.stop()
    assert account(box, fickle.token(somebody())).status == 200
    again = open_box()
    assert account(again, fickle.token(somebody())).status == 200
    again.instance.issuers.refresh()
    settled()
    assert account(again, fickle.token(somebody())).status == 200


@pytest.mark.parametrize("fault", ["stopped", *FAULTS])
def test_as_long_as_no_keys_were_ever_had_a_token_is_asked_to_wait(
    fickle: Issuer, open_box: OpenBox, impatient: None, upstream: Upstream, fault: Fault
) -> None:
    box = open_box()
    spoil(fickle, fault)
    token = fickle.token()
    with Standstill(box, upstream):
        for _ in range(3):
            answer = paid(box, token)
            assert refusal(answer) == (503, "overloaded")
            assert int(answer.headers["Retry-After"]) >= 1
    assert fickle.elsewhere_fetches == 0, "a redirect is not followed"
    settled()
    assert refusal(paid(box, token)) == (503, "overloaded")
    mend(fickle, fault)
    until(lambda: account(box, token).status == 200, 10, "the keys are known")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_key_set_that_is_none_leaves_the_known_keys(
    fickle: Issuer, open_box: OpenBox, impatient: None, fault: Fault
) -> None:
    box = open_box()
    until(lambda: account(box, fickle.token()).status == 200, 10, "the keys are known")
    settled()
    spoil(fickle, fault)
    old = fickle.kid
    fickle.rotate()
    before = fickle.fetches
    box.instance.issuers.refresh()
    settled()
    assert fickle.fetches == before + 1
    assert fickle.elsewhere_fetches == 0, "a redirect is not followed"
    for known in (box, open_box()):
        assert account(known, fickle.token(somebody(), kid=old)).status == 200
        new = fickle.token(somebody())
        assert refused_well(new, account(known, new)), "nor is anything of it taken"


def test_keys_that_come_with_an_error_are_none(
    fickle: Issuer, tmp_path: Path, upstream_server: Upstream, upstream: Upstream
) -> None:
    for status, code in ((500, "overloaded"), (404, "overloaded"), (200, None)):
        body = quote(json.dumps(fickle.jwks()))
        url = f"{upstream_server.url}/status/{status}?body={body}"
        listed = section(fickle).replace(fickle.jwks_url, url)
        with Box(tmp_path / str(status), config(upstream_server, listed)) as box:
            account(box, fickle.token())
            settled()
            assert len(upstream.hits(f"/status/{status}")) == 1
            assert account(box, fickle.token()).code == code


def test_a_new_key_is_taken_within_moments_and_a_dropped_one_no_longer(
    fickle: Issuer, open_box: OpenBox, impatient: None, upstream: Upstream
) -> None:
    box = open_box()
    until(lambda: account(box, fickle.token()).status == 200, 10, "the keys are known")
    old = fickle.kid
    fickle.rotate()
    new = fickle.token(somebody())
    until(lambda: account(box, new).status == 200, 5, "the new key is known")
    assert account(box, fickle.token(somebody(), kid=old)).status == 200, "both are published"
    fickle.drop(old)
    upkeep.refresh_issuers(box.instance)
    settled()
    upkeep.refresh_issuers(box.instance)  # takes over what the first has fetched
    tokens = {"dropped": fickle.token(somebody(), kid=old)}
    with Standstill(box, upstream):
        assert accepted(box, tokens) == {}
    assert account(box, fickle.token(somebody())).status == 200
    settled()


def test_what_cannot_be_used_in_a_key_set_harms_nothing(
    fickle: Issuer, open_box: OpenBox, upstream: Upstream
) -> None:
    secret = b"shared-secret-of-nobody-0123456789"
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    encrypting = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    fickle.extra_keys = [
        {"kty": "oct", "kid": "oct", "k": b64(secret), "alg": "HS256", "use": "sig"},
        {"kty": "oct", "kid": "bare", "k": b64(secret)},
        {"kty": "future", "kid": "future", "z": "x"},
        {"kty": "EC", "kid": "off", "crv": "P-256", "x": b64(b"\1" * 32), "y": b64(b"\2" * 32)},
        {"kty": "EC", "kid": "odd", "crv": "P-256", "x": 1, "y": None},
        {"kty": "EC", "kid": "curve", "crv": "P-999", "x": "AA", "y": "AA"},
        {"kty": "OKP", "kid": "x", "crv": "X25519", "x": b64(b"\3" * 32)},
        {"kty": "RSA", "kid": "tiny", "n": "AQAB", "e": "AQAB"},
        public_jwk(weak.public_key(), kid="weak"),
        public_jwk(encrypting.public_key(), kid="enc", use="enc"),
        public_jwk(encrypting.public_key()),
        {"kty": ["RSA"], "kid": "list"},
        {"kid": "bare-kid"},
        {},
    ]
    box = open_box()
    until(lambda: account(box, fickle.token()).status == 200, 10, "the keys are known")
    claims = fickle.claims(somebody())
    tokens = {
        f"HS256 by {kid}": seal({"alg": "HS256", "typ": "JWT", "kid": kid}, claims, secret)
        for kid in ("oct", "bare", "future")
    }
    for kid, key in (("weak", weak), ("enc", encrypting), ("None", encrypting)):
        tokens[f"RS256 by {kid}"] = seal({"alg": "RS256", "typ": "JWT", "kid": kid}, claims, key)
    with Standstill(box, upstream):
        assert accepted(box, tokens) == {}


def test_keys_are_fetched_once_for_all_workers(
    server: Farebox, backstage: Box, workers: Everywhere, live_issuer: Issuer
) -> None:
    fetches = live_issuer.fetches
    assert fetches <= 2, "at the start, and once more for who came before"
    _, token = rich(backstage, live_issuer)
    good = live_issuer.claims(somebody())
    # As if a minute had passed, so that the next may ask again.
    backstage.run("UPDATE issuer_keys SET attempted_at = attempted_at - 120000")
    answers = at_once(
        8,
        lambda _: [
            paid(server, live_issuer.sign(good, {"kid": secrets.token_hex(8)})).status
            for _ in range(125)
        ],
    )
    assert [status for some in answers for status in some] == [401] * 1000
    assert live_issuer.fetches == fetches + 1
    assert workers.say(token) == OK


def test_workers_that_look_at_the_same_moment_fetch_once(fickle: Issuer, open_box: OpenBox) -> None:
    boxes = [open_box() for _ in range(4)]
    for fetches in range(1, 26):
        boxes[0].run("UPDATE issuer_keys SET attempted_at = attempted_at - 600000")
        at_once(4, lambda n: boxes[n].instance.issuers.refresh())
        settled()
        assert fickle.fetches == fetches


@pytest.mark.parametrize("fault", ["stopped", "hang", "drip", "ok"])
def test_a_token_of_an_unknown_key_is_refused_in_50_ms_whatever_its_issuer_does(
    server: Farebox,
    backstage: Box,
    workers: Everywhere,
    live_issuer: Issuer,
    fault: Fault,
    record_property: Callable[[str, object], None],
) -> None:
    claims = live_issuer.claims()
    spoil(live_issuer, fault)

    def slowest(line: Line) -> float:
        found = []
        for _ in range(20):
            # Each may set a fetch off, as the first of a minute does.
            backstage.run("UPDATE issuer_keys SET attempted_at = attempted_at - 120000")
            token = live_issuer.sign(claims, {"kid": secrets.token_hex(8)})
            began = time.perf_counter()
            said = line.ask(token)
            found.append(time.perf_counter() - began)
            assert said == Said(401, "invalid_token")
        return max(found)

    try:
        # A machine that is busy with something else may be slow for a moment, but not each time.
        measured: list[float] = []
        while not measured or (min(measured) >= 0.05 and len(measured) < 5):
            workers.ready()
            measured.append(slowest(workers.lines[len(measured) % 2]))
        record_property("slowest_ms", [round(1000 * seconds, 1) for seconds in measured])
        print(f"{fault}: {[round(1000 * seconds, 1) for seconds in measured]} ms")
        assert min(measured) < 0.05, measured
    finally:
        mend(live_issuer, fault)


# Ended


def test_a_denied_subject_is_out_on_every_worker_with_all_it_was_traded_for(
    server: Farebox, backstage: Box, workers: Everywhere, live_issuer: Issuer
) -> None:
    subject, token = rich(backstage, live_issuer)
    named = live_issuer.token(subject, jti="one-of-theirs")
    traded = refreshed(server, token)
    again = refreshed(server, traded)
    _, other = rich(backstage, live_issuer)
    others = refreshed(server, other)
    theirs = [token, twin(token), named, traded, again]
    assert [workers.say(known) for known in [*theirs, other, others]] == [OK] * 7
    server.flask("tokens", "deny", "--sub", subject)
    for known in [*theirs, live_issuer.token(subject), live_issuer.token(subject, jti="new")]:
        assert workers.say(known) == REFUSED
        assert refused_well(known, server.post("/api/v1/session-tokens", known))
    assert [workers.say(known) for known in (other, others)] == [OK, OK]
    server.flask("tokens", "allow", "--sub", subject)
    assert workers.say(live_issuer.token(subject)) == OK
    assert [workers.say(known) for known in theirs] == [REFUSED] * 5, "what has ended stays so"
    log = server.flask("audit", "--limit", "20")
    assert "token.denied" in log
    assert "token.allowed" in log


def test_a_denied_jti_is_out_on_every_worker_and_its_siblings_live(
    server: Farebox, backstage: Box, workers: Everywhere, live_issuer: Issuer
) -> None:
    jti = secrets.token_hex(8)
    subject, token = rich(backstage, live_issuer, jti=jti)
    sibling = live_issuer.token(subject, jti=secrets.token_hex(8))
    traded, siblings = refreshed(server, token), refreshed(server, sibling)
    assert [workers.say(known) for known in (token, sibling, traded, siblings)] == [OK] * 4
    assert backstage.cli("tokens", "deny", "--jti", jti).exit_code == 0
    again = live_issuer.token(subject, jti=jti)
    assert [workers.say(known) for known in (token, twin(token), traded, again)] == [REFUSED] * 4
    assert [workers.say(known) for known in (sibling, siblings)] == [OK, OK]
    # One that nobody has seen yet.
    unseen = live_issuer.token(subject, jti="never-seen")
    backstage.cli("tokens", "deny", "--jti", "never-seen")
    assert workers.say(unseen) == REFUSED
    backstage.cli("tokens", "allow", "--jti", "never-seen")
    assert workers.say(unseen) == OK
    # One of our own by its jti.
    ours = refreshed(server, siblings)
    assert workers.say(ours) == OK
    backstage.cli("tokens", "deny", "--jti", parts(ours)[1]["jti"])
    assert workers.say(ours) == REFUSED
    assert workers.say(siblings) == OK


def test_the_words_of_deny_and_allow_are_checked(backstage: Box) -> None:
    for words in (["deny"], ["allow"], ["deny", "--sub", "x", "--jti", "y"]):
        assert backstage.cli("tokens", *words).exit_code == 2, words
    assert backstage.cli("tokens", "allow", "--sub", "did:privy:unheard-of").exit_code == 1


@pytest.mark.parametrize("jti", [None, "named"])
def test_whoever_holds_an_outside_token_can_end_it_and_what_it_was_traded_for(
    server: Farebox, backstage: Box, workers: Everywhere, live_issuer: Issuer, jti: str | None
) -> None:
    subject = somebody()
    name = {} if jti is None else {"jti": f"{jti}-{subject}"}
    _, token = rich(backstage, live_issuer, subject, **name)
    sibling = live_issuer.token(subject)
    traded = refreshed(server, token)
    again = refreshed(server, traded)
    assert [workers.say(known) for known in (token, traded, again, sibling)] == [OK] * 4
    # Ending ours ends ours alone.
    assert server.request("DELETE", "/api/v1/session-tokens/current", key=traded).status == 204
    assert [workers.say(known) for known in (traded, again, token)] == [REFUSED, OK, OK]
    ended = server.request("DELETE", "/api/v1/session-tokens/current", key=twin(token))
    assert ended.status == 204
    for known in (token, twin(token), again):
        assert workers.say(known) == REFUSED
        assert refused_well(known, server.post("/api/v1/session-tokens", known))
    assert workers.say(sibling) == OK


def test_a_traded_session_ends_when_the_outside_token_does(
    fickle: Issuer, open_box: OpenBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = Clock(monkeypatch, "2027-03-17T12:00:30Z")
    box, now = open_box(), frozen.now // 1000
    until(lambda: account(box, fickle.token(iat=now, exp=now + 60)).status == 200, 10, "keys known")
    _, token = rich(box, fickle, iat=now, exp=now + 5400)
    traded = refreshed(box, token)
    claims = parts(traded)[1]
    assert claims["iss"] == box.settings.public_url
    assert claims["exp"] - claims["iat"] == 3600
    frozen.forward(seconds=3000)
    traded = refreshed(box, traded)
    claims = parts(traded)[1]
    assert now + 5400 <= claims["exp"] <= now + 5400 + jose.LEEWAY_SECONDS
    frozen.forward(ms=claims["exp"] * 1000 - 1 - frozen.now)
    assert paid(box, traded).status == 200
    frozen.forward(ms=1)
    for known in (traded, token):
        assert refused_well(known, paid(box, known))
        assert refused_well(known, box.post("/api/v1/session-tokens", known))


def test_a_clock_that_steps_back_a_day_revives_no_outside_token(
    fickle: Issuer, open_box: OpenBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = Clock(monkeypatch, "2027-03-17T12:00:30Z")
    box, now = open_box(), frozen.now // 1000
    day = 24 * 3600
    until(lambda: account(box, fickle.token(iat=now, exp=now + 60)).status == 200, 10, "keys known")
    _, expired = rich(box, fickle, iat=now, exp=now + day)
    _, ended = rich(box, fickle, iat=now, exp=now + day)
    traded = refreshed(box, ended)
    box.request("DELETE", "/api/v1/session-tokens/current", key=ended)
    frozen.forward(seconds=day + 120)
    upkeep.tidy(box.instance)
    for _ in range(2):
        for token in (expired, ended, traded):
            assert refused_well(token, paid(box, token))
        frozen.forward(seconds=-day)
        upkeep.tidy(box.instance)
    settled()


def test_a_clock_that_steps_back_a_day_stops_no_key_from_being_fetched(
    fickle: Issuer, open_box: OpenBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = Clock(monkeypatch, "2027-03-17T12:00:30Z")
    box = open_box()

    def token() -> str:
        return fickle.token(iat=frozen.now // 1000, exp=frozen.now // 1000 + 60)

    until(lambda: account(box, token()).status == 200, 10, "the keys are known")
    settled()
    fickle.rotate()
    assert refused_well(token(), account(box, token())), "not twice within a minute"
    frozen.forward(days=-1)
    until(lambda: account(box, token()).status == 200, 10, "the new key is known")


# From a page


def test_a_page_of_a_listed_origin_may_use_an_issuers_token(box: Box, issuer: Issuer) -> None:
    _, token = rich(box, issuer)
    for path in ("/api/v1/up/ok/cors", "/api/v1/session-tokens"):
        asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        preflight = box.request("OPTIONS", path, headers=asked)
        answer = box.request("POST", path, key=token, value={}, headers=asked)
        assert (preflight.status, answer.status // 100) == (204, 2)
        for found in (preflight, answer):
            assert found.headers["Access-Control-Allow-Origin"] == "https://app.example"
            assert "Access-Control-Allow-Credentials" not in found.headers
        evil = asked | {"Origin": "https://evil.example"}
        for method in ("OPTIONS", "POST"):
            found = box.request(method, path, key=token, value={}, headers=evil)
            assert not [name for name in found.headers if name.lower().startswith("access-c")]


# Noise

_fuzzed = settings(
    max_examples=FUZZED,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    header=st.dictionaries(st.sampled_from(["typ", "kid", "alg", "crit", "x"]), _json, max_size=2),
    claims=st.dictionaries(
        st.sampled_from(["iss", "aud", "sub", "jti", "iat", "exp", "nbf", "email"]), _json,
        max_size=3,
    ),
)  # fmt: skip
@_fuzzed
def test_whatever_an_issuer_signs_is_taken_or_refused_and_nothing_else(
    box: Box, by_pem: Issuer, header: dict[str, Any], claims: dict[str, Any]
) -> None:
    token = by_pem.sign(by_pem.claims() | claims, header)
    try:
        access.identify(box.instance, inbound(authorization=f"Bearer {token}"), "127.0.0.1")
    except Refusal as refusal:
        assert refusal.code in ("invalid_token", "validation_error"), refusal.code


_GOOD_KEYS = [
    public_jwk(Issuer(alg).key.public_key(), kid=alg, use="sig", alg=alg)
    for alg in ("ES256", "RS256", "EdDSA")
]


@given(
    changes=st.lists(
        st.dictionaries(
            st.sampled_from(
                ["kty", "kid", "use", "key_ops", "alg", "crv", "x", "y", "n", "e", "d", "x5c"]
            ),
            _json
            | st.sampled_from(
                ["EC", "RSA", "OKP", "oct", "P-256", "P-521", "secp256k1", "Ed25519", "Ed448",
                 "AQAB", "AA", "sig", ["verify"], ["sign"], ["x"], "AAAA" * 90]
            ),
            min_size=1, max_size=3,
        ),
        min_size=3, max_size=3,
    ),
)  # fmt: skip
@_fuzzed
def test_a_key_set_that_was_touched_is_read_as_far_as_it_goes(
    changes: list[dict[str, Any]],
) -> None:
    touched = [changed(key, made) for key, made in zip(_GOOD_KEYS, changes, strict=True)]
    good = _GOOD_KEYS[0] | {"kid": "the good one"}
    found = jose.keys_from_set(json.dumps({"keys": [*touched, good]}))
    assert "the good one" in found
    token = seal({"alg": "ES256", "kid": "the good one"}, {}, Issuer().key)
    for key in found.values():
        assert jose.algorithms(key)
        assert not jose.is_signed_by(jose.parse(token), key)


@given(_json.map(json.dumps) | _json.map(lambda v: json.dumps({"keys": v})) | st.text(max_size=99))
@_fuzzed
def test_what_is_no_key_set_is_said_to_be_none(document: str) -> None:
    try:
        assert jose.keys_from_set(document) == {}
    except ValueError as error:
        assert re.search("JWK", str(error))
