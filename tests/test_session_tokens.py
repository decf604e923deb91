"""Session tokens of our own: who gets one, what it says, what is refused, and how it ends.

Sizes are small enough for every run; `FAREBOX_TORTURE=1` runs the long version of the race.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bearers import (
    CONFIG,
    TYPE,
    Everywhere,
    Line,
    OwnKey,
    Said,
    Standstill,
    accepted,
    at_once,
    mint,
    paid,
    refreshed,
    refused_well,
)
from browser import PASSWORD, Browser
from conftest import StartFarebox
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from doubles import Upstream
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from inprocess import HOST, Background, Box, Clock, Payer, inbound
from issuer import b64, compact, forgeries, parts, seal, signature, stale, twin, unb64
from joserfc import jwk, jwt
from server import OPERATOR_KEY, ROOT, Answer, Farebox

from core import access, clock, jose, members, upkeep
from core.errors import Refusal

TORTURE = os.environ.get("FAREBOX_TORTURE") == "1"
ROUNDS = 10_000 if TORTURE else 200
FUZZED = 20_000 if TORTURE else 200
HOUR_MS = 3_600_000
SMS = b'{"to": "+18148835337", "message": "hi"}'
OK = {Said(200, None)}
REFUSED = {Said(401, "invalid_token")}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, upstream_server: Upstream) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("instance"), config(upstream_server)) as box:
        yield box


@pytest.fixture
def fresh_box(tmp_path: Path, upstream_server: Upstream) -> Iterator[Box]:
    """An instance of a test's own, for tests that change its keys or its time."""
    with Box(tmp_path / "instance", config(upstream_server)) as box:
        yield box


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A Wednesday, well inside its minute, day, week and month."""
    return Clock(monkeypatch, "2027-03-17T12:00:30Z")


@pytest.fixture(scope="module")
def server(start_farebox: StartFarebox, upstream_server: Upstream) -> Farebox:
    return start_farebox(config(upstream_server), workers=4, threads=8)


@pytest.fixture(scope="module")
def backstage(server: Farebox) -> Iterator[Box]:
    """The running instance's own rules beside it, as the command line calls them: a `flask` command
    takes half a second to start, too long for hundreds of rounds."""
    bind = server.environment["FAREBOX_BIND"]
    with Box(server.instance, FAREBOX_BIND=bind) as box:
        yield box


@pytest.fixture(scope="module")
def workers(server: Farebox) -> Iterator[Everywhere]:
    """A connection to each of the four workers, and one more."""
    with Everywhere(server, each=2) as workers:
        yield workers


def config(upstream: Upstream) -> str:
    return (
        CONFIG.format(url=upstream.url) + '\n[instance]\ncors_origins = ["https://app.example"]\n'
    )


def claims_of(token: str) -> dict[str, Any]:
    return parts(token)[1]


_people = itertools.count(1)


def person(box: Box) -> str:
    """Somebody new with a password; their e-mail."""
    email = f"person{next(_people)}@example.com"
    made = box.cli("users", "add", email, "--password-stdin", stdin=f"{PASSWORD}\n")
    assert made.exit_code == 0, made.output
    return email


def enrol(box: Box, account: str, who: Payer) -> str:
    """Make a person a member of somebody's account; the id of the membership."""
    user_id = box.row("SELECT id FROM user WHERE email = :email", email=who.email)[0]
    box.write(lambda tx: members.enrol(tx, account, user_id, "member", clock.now_ms()))
    return str(
        box.row(
            "SELECT id FROM membership WHERE account_id = :account AND user_id = :user",
            account=account,
            user=user_id,
        )[0]
    )


def refusal(answer: Answer) -> tuple[int, str | None]:
    return answer.status, answer.code


# Getting one


def test_somebody_signed_in_gets_a_token_that_spends_their_credits(
    box: Box, upstream: Upstream
) -> None:
    email = person(box)
    account = box.cli("users", "list").stdout.split(f"{email} ")[1].split()[0]
    box.grant(account, 5)
    browser = Browser(box)
    assert browser.sign_in(email).status == 303
    token = browser.token()
    assert claims_of(token)["acct"] == account
    assert paid(box, token).status == 200
    assert box.standing(account) == (4, 0)
    call = box.get("/api/v1/usage", token).json()["data"][0]
    assert (call["payer"], call["user_id"], call["captured"]) == (
        "session", claims_of(token)["sub"], 1,
    )  # fmt: skip
    assert token not in upstream.hits()[-1].everything().decode()


def test_a_cookie_alone_mints_nothing(box: Box) -> None:
    browser = Browser(box)
    browser.sign_in(person(box))
    right = browser.csrf()
    for headers in (
        {},
        {"X-CSRF-Token": "guessed"},
        {"X-CSRF-Token": right, "Origin": "https://app.example"},
    ):
        answer = browser.request("POST", "/api/v1/session-tokens", headers, value={})
        assert refusal(answer) == (403, "csrf_failed"), headers
    assert refusal(box.post("/api/v1/session-tokens")) == (401, "missing_api_key")
    stranger = Browser(box)
    stranger.get("/login")
    answer = stranger.request("POST", "/api/v1/session-tokens", {"X-CSRF-Token": right}, value={})
    assert refusal(answer) == (401, "missing_api_key")


def test_a_cookie_is_no_credential_for_anything_else_of_the_api(box: Box) -> None:
    browser = Browser(box)
    browser.sign_in(person(box))
    headers = {"X-CSRF-Token": browser.csrf()}
    for method, path in (
        ("DELETE", "/api/v1/session-tokens/current"),
        ("GET", "/api/v1/account"),
        ("POST", "/api/v1/up/ok/cookie"),
    ):
        assert refusal(browser.request(method, path, headers)) == (401, "missing_api_key"), path


def test_a_token_says_what_it_must_and_nothing_else(box: Box, frozen: Clock) -> None:
    payer = box.payer()
    header, claims, signature = parts(mint(box, payer))
    kid = box.get("/.well-known/jwks.json").json()["keys"][0]["kid"]
    assert header == {"alg": "ES256", "kid": kid, "typ": TYPE}
    assert set(claims) == {"iss", "aud", "sub", "sid", "jti", "iat", "exp", "acct"}
    assert claims["iss"] == claims["aud"] == box.settings.public_url
    assert claims["acct"] == payer.account
    assert claims["iat"] == frozen.now // 1000
    assert claims["exp"] - claims["iat"] == 3600
    assert len(signature) == 64
    user, session = (
        box.row(f"SELECT id FROM {table} WHERE id = :id", id=claims[name])[0]
        for table, name in (("user", "sub"), ("session", "sid"))
    )
    assert (user[:5], session[:5]) == ("user_", "sess_")


def test_the_answer_says_when_the_token_ends(box: Box) -> None:
    answer = box.post("/api/v1/session-tokens", mint(box, box.payer()))
    assert answer.status == 201
    assert set(answer.json()) == {"token", "expires_at"}
    claims = claims_of(answer.json()["token"])
    assert answer.json()["expires_at"] == clock.rfc3339(claims["exp"] * 1000)
    assert answer.headers["Cache-Control"] == "no-store"


def test_a_stranger_can_verify_a_token_with_the_published_keys_alone(box: Box) -> None:
    token = mint(box, box.payer())
    answer = box.get("/.well-known/jwks.json")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    keys = answer.json()
    decoded = jwt.decode(token, jwk.KeySet.import_key_set(keys), algorithms=["ES256"])
    assert decoded.claims == claims_of(token)
    # And with nothing but a curve.
    head, body, _ = token.split(".")
    found = next(key for key in keys["keys"] if key["kid"] == parts(token)[0]["kid"])
    x, y = (int.from_bytes(unb64(found[name]), "big") for name in "xy")
    public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    sealed = parts(token)[2]
    der = encode_dss_signature(*(int.from_bytes(s, "big") for s in (sealed[:32], sealed[32:])))
    public.verify(der, f"{head}.{body}".encode(), ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        public.verify(der, f"{head}.{body}x".encode(), ec.ECDSA(hashes.SHA256()))
    assert found == {
        "kty": "EC", "crv": "P-256", "x": found["x"], "y": found["y"],
        "kid": found["kid"], "alg": "ES256", "use": "sig",
    }, "a published key holds nothing private, and nothing of ours"  # fmt: skip


def test_a_refreshed_token_keeps_its_session_and_leaves_the_old_one_alive(box: Box) -> None:
    payer = box.payer()
    old = mint(box, payer)
    new = refreshed(box, old)
    assert claims_of(new)["jti"] != claims_of(old)["jti"]
    for name in ("iss", "aud", "sub", "sid", "acct"):
        assert claims_of(new)[name] == claims_of(old)[name]
    assert [paid(box, token).status for token in (old, new)] == [200, 200]


def test_a_token_spends_the_account_it_was_asked_for(box: Box) -> None:
    payer, host = box.payer(), box.payer()
    enrol(box, host.account, payer)
    own = mint(box, payer)
    token = refreshed(box, own, host.account)
    assert claims_of(token)["acct"] == host.account
    assert claims_of(token)["sid"] == claims_of(own)["sid"]
    assert paid(box, token).status == 200
    assert (box.standing(payer), box.standing(host)) == ((100, 0), (99, 0))
    assert box.get("/api/v1/account", token).json()["account"] == host.account
    again = refreshed(box, token)
    assert claims_of(again)["acct"] == host.account, "a refresh stays where it was"
    assert claims_of(refreshed(box, token, payer.account))["acct"] == payer.account


def test_no_token_is_to_be_had_for_an_account_of_others(box: Box, upstream: Upstream) -> None:
    token, other = mint(box, box.payer()), box.payer()
    browser = Browser(box)
    browser.sign_in(person(box))
    csrf = {"X-CSRF-Token": browser.csrf()}
    with Standstill(box, upstream):
        for account in (other.account, "acct_operator", "acct_000000000000000000000000", "%", " "):
            wish = {"account": account}
            answer = box.post("/api/v1/session-tokens", token, wish)
            assert refusal(answer) == (404, "not_found"), account
            answer = browser.request("POST", "/api/v1/session-tokens", csrf, value=wish)
            assert refusal(answer) == (404, "not_found"), account


@pytest.mark.parametrize(
    "body",
    [
        b'{"acct": "x"}',
        b'{"account": "x", "sub": "user_1"}',
        b'{"account": 1}',
        b'{"account": ["acct_1"]}',
        b"[]",
        b'"acct_1"',
        b"{",
        b'{"account": "\xff"}',
    ],
)
def test_a_wish_that_is_not_understood_is_refused(
    box: Box, body: bytes, upstream: Upstream
) -> None:
    token = mint(box, box.payer())
    with Standstill(box, upstream):
        answer = box.request("POST", "/api/v1/session-tokens", key=token, body=body)
        assert refusal(answer) == (400, "validation_error")


def test_a_wish_may_be_left_out(box: Box) -> None:
    token = mint(box, box.payer())
    for body in (None, b"", b"{}", b'{"account": null}'):
        assert box.request("POST", "/api/v1/session-tokens", key=token, body=body).status == 201


def test_only_people_mint_and_revoke(box: Box) -> None:
    payer = box.payer()
    for key in (payer.key, OPERATOR_KEY):
        answer = box.post("/api/v1/session-tokens", key)
        assert refusal(answer) == (403, "session_required")
        answer = box.request("DELETE", "/api/v1/session-tokens/current", key=key)
        assert refusal(answer) == (403, "session_required")
    assert refusal(box.post("/api/v1/session-tokens", "fare_live_x")) == (401, "invalid_api_key")


def test_a_session_is_kept_fresh_for_twelve_hours_and_no_longer(box: Box, frozen: Clock) -> None:
    token = mint(box, box.payer())
    ends = claims_of(token)["iat"] + 12 * 3600
    for _ in range(14):
        frozen.forward(seconds=3000)
        token = refreshed(box, token)
        claims = claims_of(token)
        assert claims["exp"] - claims["iat"] == min(3600, ends - claims["iat"])
    assert claims["exp"] == ends
    frozen.forward(ms=ends * 1000 - frozen.now - 1)
    assert paid(box, token).status == 200
    frozen.forward(ms=1)
    assert refusal(paid(box, token)) == (401, "invalid_token")
    assert refusal(box.post("/api/v1/session-tokens", token)) == (401, "invalid_token")


def test_a_token_ends_after_an_hour_to_the_second(box: Box, frozen: Clock) -> None:
    token = mint(box, box.payer())
    frozen.forward(seconds=3600, ms=-1 - frozen.now % 1000)
    assert paid(box, token).status == 200
    frozen.forward(ms=1)
    assert refusal(paid(box, token)) == (401, "invalid_token")
    # The row knows it too, were the claims to be believed.
    assert (
        box.row("SELECT expires_at FROM session_token WHERE id = :id", id=claims_of(token)["jti"])[
            0
        ]
        == claims_of(token)["exp"] * 1000
    )


# What is refused


def test_no_forged_token_of_ours_is_taken(box: Box, upstream: Upstream) -> None:
    token = mint(box, box.payer())
    assert paid(box, token).status == 200
    with Standstill(box, upstream):
        assert accepted(box, forgeries(token, OwnKey(box.folder).pem)) == {}
    assert paid(box, token).status == 200


def test_no_token_of_ours_is_taken_that_says_what_ours_never_say(
    box: Box, upstream: Upstream
) -> None:
    token = mint(box, box.payer())
    claims = claims_of(token)
    own = OwnKey(box.folder)
    assert paid(box, own.sign(claims, {})).status == 200
    now = int(time.time())
    lies: dict[str, dict[str, Any]] = {
        f"{name} {value!r}": {**claims, name: value}
        for name in ("sid", "jti", "acct")
        for value in (None, "", " ", 1, True, ["x"], {"x": 1}, "x" * 3000, f"{claims[name]}\n")
    }
    lies |= {
        f"{name} missing": {k: v for k, v in claims.items() if k != name}
        for name in ("sid", "jti", "acct")
    }
    lies["an hour and a second"] = {**claims, "exp": claims["iat"] + 3601}
    lies["expired a second ago"] = {**claims, "iat": now - 100, "exp": now - 1}
    lies["begins in two minutes"] = {**claims, "nbf": now + 120}
    lies["jti of nobody"] = {**claims, "jti": "tok_" + "0" * 24}
    lies["jti of SQL"] = {**claims, "jti": "' OR 1=1 --"}
    lies["aud in a list"] = {**claims, "aud": [claims["aud"]]}
    signed = {name: own.sign(said, {}) for name, said in lies.items()}
    for typ in (None, "JWT", "at+jwt", TYPE.upper(), f"application/{TYPE}"):
        signed[f"typ {typ}"] = own.sign(claims, {"typ": typ})
    for kid in (None, "", "another", f"{own.kid} ", 1, [own.kid]):
        signed[f"kid {kid}"] = own.sign(claims, {"kid": kid})
    with Standstill(box, upstream):
        assert accepted(box, stale(own.sign, claims) | signed) == {}


def test_a_token_of_ours_without_its_row_is_refused(box: Box, upstream: Upstream) -> None:
    token = mint(box, box.payer())
    assert paid(box, token).status == 200
    box.run("DELETE FROM session_token WHERE id = :id", id=claims_of(token)["jti"])
    with Standstill(box, upstream):
        assert refused_well(token, paid(box, token))
        assert refused_well(token, box.get("/api/v1/account", token))
        assert refused_well(token, box.post("/api/v1/session-tokens", token))


def test_a_token_of_another_farebox_is_refused(
    box: Box, tmp_path: Path, upstream_server: Upstream, upstream: Upstream
) -> None:
    token = mint(box, box.payer())
    own, claims = OwnKey(box.folder), claims_of(token)
    theirs = "https://other.example"
    tokens = {
        "another aud": own.sign(claims | {"aud": theirs}, {}),
        "another iss": own.sign(claims | {"iss": theirs}, {}),
        "another of both": own.sign(claims | {"aud": theirs, "iss": theirs}, {}),
    }
    # One with keys of its own, and one that was restored from the same backup under another name.
    for name, folder, url in (
        ("another instance", tmp_path / "other", box.settings.public_url),
        ("a copy elsewhere", tmp_path / "copy", theirs),
    ):
        with Box(folder, config(upstream_server), FAREBOX_PUBLIC_URL=url) as other:
            if name.startswith("a copy"):
                (folder / "signing_keys.json").write_bytes(
                    (box.folder / "signing_keys.json").read_bytes()
                )
            payer = other.payer()
            tokens[name] = mint(other, payer)
            box.run(  # even if its row were here
                "INSERT INTO session_token SELECT :id, session_id, user_id, account_id, expires_at,"
                " NULL FROM session_token WHERE id = :like",
                id=claims_of(tokens[name])["jti"],
                like=claims["jti"],
            )
            # And ours is as strange to it.
            host = "other.example" if url == theirs else HOST
            answer = other.request("GET", "/api/v1/account", key=token, host=host)
            assert refusal(answer) == (401, "invalid_token"), name
            good = other.request("GET", "/api/v1/account", key=tokens[name], host=host)
            assert good.status == 200, name
    with Standstill(box, upstream):
        assert accepted(box, tokens) == {}


def test_a_token_needs_no_scope_and_no_other_claim_gives_it_anything(
    box: Box, upstream: Upstream
) -> None:
    payer, host = box.payer(), box.payer()
    enrol(box, host.account, payer)
    token = refreshed(box, mint(box, payer), host.account)
    assert box.sms(token).status == 200
    assert paid(box, token).status == 200
    claims = claims_of(token) | {
        "scope": "", "scopes": [], "role": "owner", "roles": ["owner", "operator"],
        "is_operator": True, "account": payer.account, "credit_limit": 0, "user_id": "user_x",
        "email": "operator@example.com", "cnf": {"jkt": "x"},
    }  # fmt: skip
    told = OwnKey(box.folder).sign(claims, {})
    assert box.sms(told).status == 200
    assert box.standing(payer) == (100, 0)
    answer = box.post("/api/v1/members", told, {"email": "friend@example.com"})
    assert refusal(answer) == (403, "forbidden")


def test_a_token_in_a_query_a_cookie_or_a_body_is_none(box: Box, upstream: Upstream) -> None:
    token = mint(box, box.payer())
    with Standstill(box, upstream):
        for path, headers in (
            (f"?access_token={token}&token={token}", {}),
            ("", {"Cookie": f"token={token}; farebox={token}"}),
            ("", {"X-Api-Key": token, "Proxy-Authorization": f"Bearer {token}"}),
        ):
            body = json.dumps({"access_token": token}).encode()
            answer = box.request("POST", f"/api/v1/up/ok/x{path}", body=body, headers=headers)
            assert refusal(answer) == (401, "missing_api_key")
        answer = box.request("POST", "/api/v1/up/ok/x", headers={"Authorization": f"Basic {token}"})
        assert answer.status == 401


def test_a_token_too_long_for_a_header_is_refused_and_the_server_lives(
    server: Farebox, backstage: Box, upstream: Upstream
) -> None:
    payer = backstage.payer()
    token = mint(backstage, payer)
    head, body, _ = token.split(".")
    statuses = {}
    for name, made, wanted in (
        ("8000", f"{head}.{body}.{'A' * (8000 - len(head) - len(body) - 2)}", 401),
        ("8185", f"{head}.{body}.{'A' * (8185 - len(head) - len(body) - 2)}", 401),
        ("8186", f"{head}.{body}.{'A' * (8186 - len(head) - len(body) - 2)}", 400),
        ("12000", "eyJ" + "A" * 12000, 400),
    ):
        answer = paid(server, made)
        statuses[name] = answer.status
        assert answer.status == wanted, (name, answer.body)
    with server.connect() as sock:
        request = b"POST /api/v1/up/ok/x HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
        flood = threading.Thread(target=_pour, args=(sock, request + b"eyJ" + b"A" * 3_000_000))
        flood.start()
        first = sock.recv(65536)
        sock.close()
        flood.join(30)
    assert re.match(rb"HTTP/1\.1 4\d\d ", first), first
    assert not upstream.hits()
    assert paid(server, token).status == 200
    assert backstage.standing(payer) == (99, 0)


def _pour(sock: Any, data: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(data)


# How it ends, on every worker


def test_one_token_is_revoked_everywhere_and_the_others_of_its_session_live(
    server: Farebox, backstage: Box, workers: Everywhere
) -> None:
    token = mint(backstage, backstage.payer())
    sibling = refreshed(server, token)
    other = twin(token)
    assert other != token
    assert [workers.say(known) for known in (token, sibling, other)] == [OK, OK, OK]
    answer = server.request("DELETE", "/api/v1/session-tokens/current", key=token)
    assert (answer.status, answer.body) == (204, b"")
    assert workers.say(token) == REFUSED
    assert workers.say(other) == REFUSED
    assert workers.say(sibling) == OK
    for dead in (token, other):
        assert refused_well(dead, server.post("/api/v1/session-tokens", dead))
        answer = server.request("DELETE", "/api/v1/session-tokens/current", key=dead)
        assert refused_well(dead, answer)
    claims = claims_of(token)
    again = OwnKey(server.instance).sign(claims | {"exp": claims["exp"] - 1}, {})
    assert workers.say(again) == REFUSED, "signed anew it is the same token"
    # Its twin revokes it as well.
    last = refreshed(server, sibling)
    assert workers.say(last) == OK
    answer = server.request("DELETE", "/api/v1/session-tokens/current", key=twin(last))
    assert answer.status == 204
    assert workers.say(last) == REFUSED


def test_signing_out_ends_the_tokens_of_that_session_and_no_other(
    server: Farebox, backstage: Box, workers: Everywhere
) -> None:
    email = person(backstage)
    account = backstage.row("SELECT account_id FROM user WHERE email = :email", email=email)[0]
    backstage.grant(account, 1000)
    here, there = Browser(server), Browser(server)
    for browser in (here, there):
        assert browser.sign_in(email).status == 303
    token, elsewhere = here.token(), there.token()
    later = refreshed(server, token)
    assert [workers.say(known) for known in (token, later, elsewhere)] == [OK, OK, OK]
    assert here.post("/logout", {"csrf_token": here.csrf()}).status == 303
    assert [workers.say(known) for known in (token, later)] == [REFUSED, REFUSED]
    assert workers.say(elsewhere) == OK
    assert refused_well(later, server.post("/api/v1/session-tokens", later))
    # And from the other browser's list.
    token = mint(backstage, email)
    assert workers.say(token) == OK
    path = f"/dashboard/settings/sessions/{claims_of(token)['sid']}/end"
    ended = there.post(path, {"csrf_token": there.csrf()})
    assert ended.status == 303, ended.body
    assert workers.say(token) == REFUSED
    assert workers.say(elsewhere) == OK


def test_the_operator_signs_a_person_out_everywhere(
    server: Farebox, backstage: Box, workers: Everywhere
) -> None:
    payer, other = backstage.payer(), mint(backstage, backstage.payer())
    tokens = [mint(backstage, payer), mint(backstage, payer)]
    tokens.append(refreshed(server, tokens[0]))
    assert [workers.say(token) for token in tokens] == [OK] * 3
    assert server.flask("users", "sign-out", payer.email) == "2 sign-ins ended"
    assert [workers.say(token) for token in tokens] == [REFUSED] * 3
    assert workers.say(other) == OK
    assert workers.say(mint(backstage, payer)) == OK, "they may sign in again"
    assert workers.say(payer.key) == OK, "a key is no sign-in"


@pytest.mark.parametrize(
    ("words", "otherwise"),
    [
        (("users", "suspend"), REFUSED),
        (("users", "close"), REFUSED),
        (("accounts", "close"), REFUSED),
        (("accounts", "suspend"), {Said(403, "account_suspended")}),
    ],
    ids=["users suspend", "users close", "accounts close", "accounts suspend"],
)
def test_what_the_operator_ends_is_ended_everywhere_at_once(
    backstage: Box,
    workers: Everywhere,
    words: tuple[str, ...],
    otherwise: set[Said],
) -> None:
    payer, other = backstage.payer(), mint(backstage, backstage.payer())
    token = mint(backstage, payer)
    assert workers.say(token) == OK
    done = backstage.cli(*words, payer.account)
    assert done.exit_code == 0, done.output
    assert workers.say(token) == otherwise
    assert workers.say(other) == OK
    if words[-1] == "suspend":
        assert backstage.cli(words[0], "resume", payer.account).exit_code == 0
        assert workers.say(token) == (OK if words[0] == "accounts" else REFUSED)
        assert workers.say(mint(backstage, payer)) == OK


def test_a_suspended_account_says_why(server: Farebox, backstage: Box) -> None:
    payer = backstage.payer()
    token = mint(backstage, payer)
    backstage.cli("accounts", "suspend", payer.email, "--reason", "unpaid")
    for answer in (
        paid(server, token),
        server.get("/api/v1/account", token),
        server.post("/api/v1/session-tokens", token),
    ):
        assert refusal(answer) == (403, "account_suspended")
        assert answer.json()["reason"] == "unpaid"


def test_a_removed_member_is_out_of_that_account_everywhere(
    server: Farebox, backstage: Box, workers: Everywhere
) -> None:
    host, guest = backstage.payer(), backstage.payer()
    member_id = enrol(backstage, host.account, guest)
    own = mint(backstage, guest)
    token = refreshed(server, own, host.account)
    assert workers.say(token) == OK
    hosts = mint(backstage, host)
    answer = server.request("DELETE", f"/api/v1/members/{member_id}", key=hosts)
    assert answer.status == 204, answer.body
    assert workers.say(token) == REFUSED
    assert refused_well(token, server.post("/api/v1/session-tokens", token))
    assert refusal(server.post("/api/v1/session-tokens", own, {"account": host.account})) == (
        404, "not_found",
    )  # fmt: skip
    assert workers.say(own) == OK
    # Joining again is no way back for what was ended.
    enrol(backstage, host.account, guest)
    assert workers.say(token) == REFUSED
    assert workers.say(refreshed(server, own, host.account)) == OK


# The keys


def test_after_a_rotation_old_tokens_go_on_and_new_ones_have_the_new_key(
    server: Farebox, backstage: Box, workers: Everywhere
) -> None:
    payer = backstage.payer()
    old = mint(backstage, payer)
    assert workers.say(old) == OK
    kid = server.flask("tokens", "rotate-key")
    assert workers.say(old) == OK
    listed = [key["kid"] for key in server.get("/.well-known/jwks.json").json()["keys"]]
    assert listed[0] == kid
    assert parts(old)[0]["kid"] in listed[1:]
    for _ in range(8):  # whichever worker mints, and none was restarted
        new = refreshed(server, old)
        assert parts(new)[0]["kid"] == kid
        assert workers.say(new) == OK
    keys = jwk.KeySet.import_key_set(server.get("/.well-known/jwks.json").json())
    for token in (old, new):
        jwt.decode(token, keys, algorithms=["ES256"])


def test_an_old_key_is_good_for_an_hour_and_forgotten_at_the_next_rotation(
    fresh_box: Box, frozen: Clock
) -> None:
    payer = fresh_box.payer()
    token = mint(fresh_box, payer)
    old = OwnKey(fresh_box.folder)
    first = fresh_box.cli("tokens", "rotate-key").stdout.strip()
    assert _published(fresh_box) == [first, old.kid]
    frozen.forward(seconds=3599)
    assert paid(fresh_box, token).status == 200
    frozen.forward(seconds=120)
    assert _published(fresh_box) == [first]
    good = mint(fresh_box, payer)
    stolen = old.sign(claims_of(good), {})
    assert refused_well(stolen, paid(fresh_box, stolen)), "the old key signs nothing any more"
    stored = [key["kid"] for key in _stored(fresh_box)]
    assert stored == [first, old.kid]
    second = fresh_box.cli("tokens", "rotate-key").stdout.strip()
    assert [key["kid"] for key in _stored(fresh_box)] == [second, first]
    assert _published(fresh_box) == [second, first]
    assert paid(fresh_box, good).status == 200
    # Rotating twice within the hour keeps all whose tokens live, each for its own hour.
    third = fresh_box.cli("tokens", "rotate-key").stdout.strip()
    assert _published(fresh_box) == [third, second, first]
    assert paid(fresh_box, good).status == 200


def _published(box: Box) -> list[str]:
    return [key["kid"] for key in box.get("/.well-known/jwks.json").json()["keys"]]


def _stored(box: Box) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads((box.folder / "signing_keys.json").read_text())[
        "keys"
    ]
    return listed


def test_the_keys_are_for_their_owners_eyes(fresh_box: Box) -> None:
    mint(fresh_box, fresh_box.payer())
    path = fresh_box.folder / "signing_keys.json"
    assert path.stat().st_mode & 0o777 == 0o600
    fresh_box.cli("tokens", "rotate-key")
    assert path.stat().st_mode & 0o777 == 0o600
    assert not [left for left in fresh_box.folder.iterdir() if left.name.startswith(".signing")]
    secret = _stored(fresh_box)[0]["d"]
    assert secret not in fresh_box.get("/.well-known/jwks.json").body.decode()


_MAKE_THE_FIRST = """
import sys, time
from pathlib import Path
from core.signing import SigningKeys
root, start = Path(sys.argv[1]), float(sys.argv[2])
for number in range(40):
    while time.time() < start + number * 0.02:
        pass
    print(SigningKeys(root / str(number)).current().kid)
"""


def test_processes_that_make_the_first_key_at_once_end_with_one(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / str(number)).mkdir()
    command = [sys.executable, "-c", _MAKE_THE_FIRST, str(tmp_path), str(time.time() + 1.5)]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert len(said[0]) == 40
    assert said[0] == said[1]
    for number, kid in enumerate(said[0]):
        path = tmp_path / str(number) / "signing_keys.json"
        assert [key["kid"] for key in json.loads(path.read_text())["keys"]] == [kid]


_ROTATE_THE_FIRST = """
import sys, time
from pathlib import Path
from core import clock
from core.signing import SigningKeys
root, start, rotates = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "rotate"
for number in range(60):
    keys = SigningKeys(root / str(number))
    while time.time() < start + number * 0.02:
        pass
    print(keys.rotate(clock.now_ms()) if rotates else keys.current().kid)
"""


def test_a_rotation_beside_the_first_use_loses_no_key(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / str(number)).mkdir()
    start = str(time.time() + 1.5)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _ROTATE_THE_FIRST, str(tmp_path), start, what],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for what in ("rotate", "use")
    ]  # fmt: skip
    said = [process.communicate(timeout=60)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    for number in range(60):
        path = tmp_path / str(number) / "signing_keys.json"
        listed = [key["kid"] for key in json.loads(path.read_text())["keys"]]
        assert {said[0][number], said[1][number]} <= set(listed), "what has signed verifies"


def test_a_backup_carries_the_keys(tmp_path: Path, upstream_server: Upstream) -> None:
    saved = tmp_path / "saved.tar"
    with Box(tmp_path / "instance", config(upstream_server)) as box:
        token = mint(box, payer := box.payer())
        kids = [key["kid"] for key in box.get("/.well-known/jwks.json").json()["keys"]]
        assert box.cli("backup", str(saved)).exit_code == 0
    with Box(tmp_path / "elsewhere") as empty:
        done = empty.cli("restore", str(saved))
        assert done.exit_code == 0, done.output
    assert (tmp_path / "elsewhere" / "signing_keys.json").stat().st_mode & 0o777 == 0o600
    with Box(tmp_path / "elsewhere") as restored:
        shown = restored.get("/.well-known/jwks.json").json()["keys"]
        assert [key["kid"] for key in shown] == kids
        # What was ended after the backup must not live again; so nobody is signed in.
        assert paid(restored, token).code == "invalid_token"
        assert paid(restored, mint(restored, payer)).status == 200


# Races


@dataclass
class Hammer:
    """Calls with one token until it is refused, and remembers when each call began.

    With a `gate` it waits there after the first call that was served.
    """

    line: Line
    token: str
    gate: threading.Barrier | None
    served: int = 0
    last_start_served: float = 0.0
    refusal: Said | None = None
    _thread: threading.Thread = field(init=False)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self.refusal is None:
            began = time.monotonic()
            said = self.line.ask(self.token, "/api/v1/sms/send", SMS)
            if said.status == 200:
                self.last_start_served = began
                self.served += 1
                if self.gate is not None and self.served == 1:
                    self.gate.wait(20)
            else:
                self.refusal = said

    def join(self) -> None:
        self._thread.join(30)
        assert self.refusal is not None, "the token was never refused"


def test_no_request_sent_after_a_token_was_ended_is_served(
    server: Farebox, backstage: Box, workers: Everywhere
) -> None:
    payer = backstage.payer(credits=10**9)

    def revoke(token: str) -> None:
        answer = server.request("DELETE", "/api/v1/session-tokens/current", key=token)
        assert answer.status == 204, answer.body

    def sign_out(token: str) -> None:
        done = backstage.cli("users", "sign-out", payer.email)
        assert done.exit_code == 0, done.output

    ways: list[Callable[[str], None]] = [revoke, sign_out]
    served = 0
    for number in range(ROUNDS):
        token = mint(backstage, payer)
        if number % 4 > 1:
            token = refreshed(server, token)
        workers.ready()
        assert len(workers.lines) >= 8
        # In every other round every worker has accepted the token before it is ended; in the
        # others it is ended while they are at it.
        gate = threading.Barrier(len(workers.lines) + 1) if number // 2 % 2 else None
        hammers = [Hammer(line, token, gate) for line in workers.lines]
        for hammer in hammers:
            hammer.start()
        if gate is not None:
            gate.wait(20)
        ways[number % 2](token)
        ended_at = time.monotonic()
        for hammer in hammers:
            hammer.join()
            assert hammer.refusal == Said(401, "invalid_token")
            assert hammer.last_start_served < ended_at, "served after it was ended"
            served += hammer.served
    assert backstage.standing(payer) == (10**9 - served, 0)
    server.books()


def test_a_token_that_ends_between_its_reading_and_the_hold_spends_nothing(
    box: Box, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    payer = box.payer()
    spare = mint(box, payer)
    user_id, session_id = claims_of(spare)["sub"], claims_of(spare)["sid"]
    endings: dict[str, tuple[str, str]] = {
        "token": ("UPDATE session_token SET ended_at = 1 WHERE id = :jti", "invalid_token"),
        "session": ("UPDATE session SET ended_at = 1 WHERE id = :sid", "invalid_token"),
        "person": ("UPDATE user SET status = 'suspended' WHERE id = :sub", "account_suspended"),
        "account": (
            "UPDATE account SET status = 'suspended' WHERE id = :acct",
            "account_suspended",
        ),
        "membership": ("DELETE FROM membership WHERE account_id = :acct", "invalid_token"),
    }
    authorize = access.authorize
    for name, (sql, code) in endings.items():
        token = mint(box, payer)
        claims = claims_of(token)
        params = {key: claims[key] for key in ("jti", "sid", "sub", "acct") if f":{key}" in sql}

        def end_it(
            principal: access.Principal,
            scope: str | None,
            sql: str = sql,
            params: dict[str, str] = params,
        ) -> None:
            authorize(principal, scope)
            box.run(sql, **params)

        with monkeypatch.context() as patched, Standstill(box, upstream):
            patched.setattr(access, "authorize", end_it)
            answer = paid(box, token)
        assert answer.code == code, (name, answer.body)
        box.run("UPDATE user SET status = 'active' WHERE id = :id", id=user_id)
        box.run("UPDATE account SET status = 'active' WHERE id = :id", id=payer.account)
    assert box.row("SELECT ended_at FROM session WHERE id = :id", id=session_id) == (None,)
    assert box.standing(payer) == (100, 0)


# The clock


def test_a_clock_that_steps_back_revives_no_ended_token(fresh_box: Box, frozen: Clock) -> None:
    box, payer = fresh_box, fresh_box.payer()
    frozen.forward(days=1)
    expired, revoked, signed_out = (mint(box, payer) for _ in range(3))
    minted_at = frozen.now
    box.request("DELETE", "/api/v1/session-tokens/current", key=revoked)
    session = claims_of(signed_out)["sid"]
    box.run("UPDATE session SET ended_at = :now WHERE id = :id", now=frozen.now, id=session)
    frozen.forward(seconds=3601)
    upkeep.tidy(box.instance)
    # A day back they had not begun; half an hour after their minting they would be in their time.
    for then in (frozen.now - clock.DAY_MS, minted_at + HOUR_MS // 2):
        frozen.now = then
        upkeep.tidy(box.instance)
        for token in (expired, revoked, signed_out):
            assert refused_well(token, paid(box, token))
            assert refused_well(token, box.post("/api/v1/session-tokens", token))
    assert box.standing(payer) == (100, 0)


def test_a_clock_that_steps_forth_and_back_revives_no_session(
    fresh_box: Box, frozen: Clock
) -> None:
    token = mint(fresh_box, fresh_box.payer())
    frozen.forward(days=1)
    upkeep.tidy(fresh_box.instance)
    assert refused_well(token, paid(fresh_box, token))
    frozen.forward(days=-1)
    assert refused_well(token, paid(fresh_box, token))


def test_rows_are_kept_as_long_as_a_stepping_clock_could_ask_for_them(
    fresh_box: Box, frozen: Clock
) -> None:
    token = mint(fresh_box, fresh_box.payer())
    jti = claims_of(token)["jti"]
    count = "SELECT COUNT(*) FROM session_token WHERE id = :id"
    frozen.forward(seconds=3600, days=1.5)
    upkeep.tidy(fresh_box.instance)
    assert fresh_box.row(count, id=jti) == (1,)
    frozen.forward(days=1)
    upkeep.tidy(fresh_box.instance)
    assert fresh_box.row(count, id=jti) == (0,)
    frozen.now = (claims_of(token)["iat"] + 60) * 1000
    assert refused_well(token, paid(fresh_box, token))


def test_a_clock_that_steps_a_day_on_charges_nothing_wrongly(
    fresh_box: Box, frozen: Clock, upstream: Upstream
) -> None:
    box = fresh_box
    host, guest = box.payer(), box.payer()
    member_id = enrol(box, host.account, guest)
    answer = box.request(
        "PATCH", f"/api/v1/members/{member_id}", key=mint(box, host),
        value={"credit_limit": 3, "credit_period": "day"},
    )  # fmt: skip
    assert answer.status == 200, answer.body
    token = refreshed(box, mint(box, guest), host.account)
    going = [
        Background(lambda: paid(box, token, "/gated/good")),
        Background(lambda: paid(box, token, "/gated/bad?cut")),
    ]
    upstream.wait_for(2, "/gated/")
    assert box.standing(host) == (98, 2)
    frozen.forward(days=1)
    upkeep.tidy(box.instance)
    assert refused_well(token, paid(box, token))
    upstream.gate("good").open()
    upstream.gate("bad").open()
    assert [sent.result().status for sent in going] == [200, 200]
    assert box.standing(host) == (98, 0)
    # What was held yesterday weighs on yesterday alone.
    token = refreshed(box, mint(box, guest), host.account)
    assert [paid(box, token).status for _ in range(4)] == [200, 200, 200, 403]
    assert box.standing(host) == (95, 0)
    assert box.standing(guest) == (100, 0)


# A member's limit


def limited(box: Box, limit: int, period: str = "total") -> tuple[Payer, str, str, str]:
    """A member of somebody's account with a limit: the host, a token and a key, the membership."""
    host, guest = box.payer(credits=1000), box.payer()
    member_id = enrol(box, host.account, guest)
    answer = box.request(
        "PATCH", f"/api/v1/members/{member_id}", key=mint(box, host),
        value={"credit_limit": limit, "credit_period": period},
    )  # fmt: skip
    assert answer.status == 200, answer.body
    token = refreshed(box, mint(box, guest), host.account)
    made = box.post("/api/v1/keys", token, {"name": "theirs"})
    assert made.status == 201, made.body
    return host, token, made.json()["key"], member_id


def test_a_members_limit_counts_keys_and_tokens_together(box: Box) -> None:
    host, token, key, _ = limited(box, 4)
    other = refreshed(box, token)
    statuses = [paid(box, bearer).status for bearer in (token, key, other, key, token, key, other)]
    assert statuses == [200] * 4 + [403] * 3
    answer = paid(box, token)
    assert refusal(answer) == (403, "credit_limit_reached")
    found = answer.json()
    assert (found["limit"], found["period"], found["resets_at"]) == (4, "total", None)
    assert box.standing(host) == (996, 0)
    assert paid(box, mint(box, host)).status == 200, "the owner has no limit"
    assert paid(box, refreshed(box, token, _own_account(box, token))).status == 200


def _own_account(box: Box, token: str) -> str:
    user_id = claims_of(token)["sub"]
    return str(box.row("SELECT account_id FROM user WHERE id = :id", id=user_id)[0])


def test_a_members_limit_is_given_back_when_the_upstream_fails(
    box: Box, upstream: Upstream
) -> None:
    host, token, key, _ = limited(box, 1)
    for path in ("/status/500", "/reset", "/status/404", "/garbage-status"):
        assert paid(box, token, path).status in (404, 502)
        assert paid(box, key, path).status in (404, 502)
    held = Background(lambda: paid(box, token, "/gated/limit"))
    upstream.wait_for(1, "/gated/limit")
    assert refusal(paid(box, key)) == (403, "credit_limit_reached"), "what is held counts"
    upstream.gate("limit").open()
    assert held.result().status == 200
    assert refusal(paid(box, key)) == (403, "credit_limit_reached")
    assert box.standing(host) == (999, 0)


def test_a_members_limit_is_not_passed_by_many_at_once(box: Box, upstream: Upstream) -> None:
    for _ in range(3):
        host, token, key, _ = limited(box, 10)
        bearers = [token, key, refreshed(box, token)]
        path = f"/ok/many-{host.account}"

        def call(n: int, bearers: list[str] = bearers, path: str = path) -> Answer:
            return paid(box, bearers[n % 3], path)

        answers = at_once(50, call)
        assert Counter(refusal(answer) for answer in answers) == {
            (200, None): 10,
            (403, "credit_limit_reached"): 40,
        }
        assert len(upstream.hits(path)) == 10
        assert box.standing(host) == (990, 0)


# From a page of another origin


@pytest.mark.parametrize("path", ["/api/v1/up/ok/cors", "/api/v1/session-tokens"])
def test_a_page_of_a_listed_origin_may_use_a_token(box: Box, path: str) -> None:
    token = mint(box, box.payer())
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    preflight = box.request("OPTIONS", path, headers=asked)
    assert preflight.status == 204
    answer = box.request("POST", path, key=token, value={}, headers=asked)
    assert answer.status in (200, 201)
    refused = box.request("POST", path, key="eyJ", value={}, headers=asked)
    assert refusal(refused) == (401, "invalid_token")
    for found in (preflight, answer, refused):
        assert found.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert "Origin" in found.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in found.headers
    allowed = preflight.headers["Access-Control-Allow-Headers"].lower()
    assert {"authorization", "idempotency-key", "x-stainless-lang"} <= set(
        re.split(r", ?", allowed)
    )
    assert "X-Max-Tokens-Clamped" in answer.headers["Access-Control-Expose-Headers"]
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]


@pytest.mark.parametrize("path", ["/api/v1/up/ok/cors", "/api/v1/session-tokens"])
@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "https://app.example.evil.example", "http://app.example"],
)
def test_a_page_of_another_origin_is_told_nothing(box: Box, path: str, origin: str) -> None:
    token = mint(box, box.payer())
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for method, headers in (("OPTIONS", asked), ("POST", {"Origin": origin})):
        answer = box.request(method, path, key=token, value={}, headers=headers)
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


# Noise

_fuzzed = settings(
    max_examples=FUZZED,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_letters = st.characters(min_codepoint=0, max_codepoint=0x2FF)
_b64 = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", max_size=60)
_plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["ES256", "none", "HS256", TYPE, "JWT", 10**400, -(10**30)])
)
_json = (
    _plain
    | st.lists(_plain, max_size=3)
    | st.dictionaries(st.text(max_size=5), st.lists(_plain, max_size=2), max_size=3)
)
_names = st.sampled_from(
    ["alg", "kid", "typ", "crit", "b64", "iss", "aud", "sub", "sid", "jti", "acct", "iat", "exp",
     "nbf", "x"]
)  # fmt: skip
_CODES = {"invalid_token", "validation_error", "invalid_api_key"}


def _refusal_of(box: Box, token: str) -> str | None:
    """The code of the refusal a token gets; None when it is taken. Anything else is raised."""
    try:
        access.identify(box.instance, inbound(authorization=f"Bearer {token}"), "127.0.0.1")
    except Refusal as refusal:
        assert refusal.code in _CODES, refusal.code
        return refusal.code
    return None


@given(
    st.text(_letters, max_size=200)
    | st.lists(_b64, min_size=1, max_size=5).map(".".join)
    | st.lists(st.binary(max_size=60).map(b64), min_size=3, max_size=3).map(".".join)
    | st.lists(_json, min_size=3, max_size=3).map(lambda v: ".".join(b64(compact(x)) for x in v))
)
@_fuzzed
def test_noise_is_refused_and_nothing_else(box: Box, noise: str) -> None:
    for token in (noise, f"eyJ{noise}"):
        assert _refusal_of(box, token) is not None
        with contextlib.suppress(Refusal):
            jose.parse(token)


@given(data=st.data())
@_fuzzed
def test_a_good_token_that_was_touched_anywhere_is_refused(box: Box, data: st.DataObject) -> None:
    good = _good_token(box)
    start = data.draw(st.integers(0, len(good) - 1))
    length = data.draw(st.integers(0, 3))
    new = data.draw(_b64.filter(bool) | st.text(_letters, max_size=5) | st.just("."))
    token = good[:start] + new + good[start + length :]
    assume(token.strip(" ") != good)
    assert _refusal_of(box, token) is not None


@given(
    header=st.dictionaries(_names, _json, max_size=3),
    claims=st.dictionaries(_names, _json, max_size=4),
)
@_fuzzed
def test_whatever_a_signed_token_says_it_is_taken_or_refused_and_nothing_else(
    box: Box, header: dict[str, Any], claims: dict[str, Any]
) -> None:
    own, good = OwnKey(box.folder), claims_of(_good_token(box))
    head = {"alg": "ES256", "kid": own.kid, "typ": TYPE} | header
    data = f"{b64(compact(head))}.{b64(compact(good | claims))}"
    sealed = seal({"alg": "ES256"}, b"x", own.key)  # a signature of something else
    _refusal_of(box, f"{data}.{sealed.rpartition('.')[2]}")
    signed = _sealed(data, own)
    if _refusal_of(box, signed) is None:
        assert head["alg"] == "ES256"
        assert (head["kid"], head["typ"]) == (own.kid, TYPE)
        said = good | claims
        assert [said[name] for name in ("iss", "aud", "jti")] == [
            good[name] for name in ("iss", "aud", "jti")
        ]


def _sealed(data: str, own: OwnKey) -> str:
    return f"{data}.{b64(signature(own.key, 'ES256', data.encode()))}"


def _good_token(box: Box) -> str:
    """One token for all examples, made anew only when it ended."""
    token: str | None = getattr(box, "_good", None)
    if token is None or _refusal_of(box, token) is not None:
        token = mint(box, box.payer())
        box._good = token  # type: ignore[attr-defined]
    return token
