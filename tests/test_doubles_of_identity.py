"""The OpenID provider and the token issuer of the tests are what other tests take them for."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import urllib3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from issuer import Issuer, Mode, b64, forgeries, parts, sendable, stale, twin, unb64
from joserfc import jwk, jwt
from joserfc.errors import JoseError
from openid_provider import OpenIdProvider, the_openid_provider  # noqa: F401
from server import until

CALLBACK = "http://127.0.0.1:1/auth/callback"
KINDS = {"ES256": jwk.ECKey, "RS256": jwk.RSAKey, "EdDSA": jwk.OKPKey}
VERIFIER = "verifier-of-the-tests-0123456789-0123456789-abc"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


def fetch(url: str, timeout: float = 5, **options: Any) -> urllib3.BaseHTTPResponse:
    return urllib3.request("GET", url, timeout=timeout, retries=False, redirect=False, **options)


def authorize_url(provider: OpenIdProvider, client: str, **changes: str | None) -> str:
    metadata = fetch(provider.metadata_url).json()
    asked: dict[str, str | None] = {
        "client_id": client,
        "response_type": "code",
        "redirect_uri": CALLBACK,
        "scope": "openid email",
        "state": "a state",
        "nonce": "a nonce",
        "code_challenge": b64(sha256(VERIFIER.encode()).digest()),
        "code_challenge_method": "S256",
    }
    query = {name: value for name, value in (asked | changes).items() if value is not None}
    return f"{metadata['authorization_endpoint']}?{urlencode(query)}"


def answer_of(callback: str) -> dict[str, str]:
    assert callback.startswith(f"{CALLBACK}?")
    return {name: values[0] for name, values in parse_qs(urlsplit(callback).query).items()}


def exchange(
    provider: OpenIdProvider, client: str, code: str, verifier: str = VERIFIER
) -> urllib3.BaseHTTPResponse:
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": CALLBACK,
        "code_verifier": verifier,
    }
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    if client == provider.post_client_id:
        form |= {"client_id": client, "client_secret": provider.client_secret}
    else:
        secret = b64encode(f"{client}:{provider.client_secret}".encode()).decode()
        headers["Authorization"] = f"Basic {secret}"
    endpoint = fetch(provider.metadata_url).json()["token_endpoint"]
    return urllib3.request("POST", endpoint, body=urlencode(form), headers=headers)


@pytest.mark.parametrize(
    ("client", "alg"),
    [
        (OpenIdProvider.client_id, "RS256"),
        (OpenIdProvider.es256_client_id, "ES256"),
        (OpenIdProvider.post_client_id, "RS256"),
    ],
)
def test_someone_signs_in_at_the_provider(
    openid_provider: OpenIdProvider, client: str, alg: str
) -> None:
    openid_provider.allow_redirect(CALLBACK)
    callback = openid_provider.sign_in(authorize_url(openid_provider, client), "alice")
    answer = answer_of(callback)
    assert answer["state"] == "a state"
    assert answer["iss"] == openid_provider.issuer
    tokens = exchange(openid_provider, client, answer["code"])
    assert tokens.status == 200, tokens.data
    metadata = fetch(openid_provider.metadata_url).json()
    keys = jwk.KeySet.import_key_set(fetch(metadata["jwks_uri"]).json())
    token = jwt.decode(tokens.json()["id_token"], keys, algorithms=[alg])
    assert token.claims["iss"] == openid_provider.issuer
    assert token.claims["aud"] == client
    assert token.claims["sub"] == "alice"
    assert token.claims["nonce"] == "a nonce"
    assert token.claims["email"] == "alice@example.com"
    assert token.claims["email_verified"] is True
    again = exchange(openid_provider, client, answer["code"])
    assert again.json()["error"] == "invalid_grant"
    assert openid_provider.errors() == ""


def test_the_provider_demands_pkce_and_a_known_redirect_uri(
    openid_provider: OpenIdProvider,
) -> None:
    client = openid_provider.client_id
    openid_provider.allow_redirect(CALLBACK)
    bare = authorize_url(openid_provider, client, code_challenge=None, code_challenge_method=None)
    assert answer_of(openid_provider.sign_in(bare, "alice"))["error"] == "invalid_request"
    elsewhere = authorize_url(openid_provider, client, redirect_uri=f"{CALLBACK}/elsewhere")
    with pytest.raises(AssertionError, match="invalid_redirect_uri"):
        openid_provider.sign_in(elsewhere, "alice")
    right = authorize_url(openid_provider, client)
    code = answer_of(openid_provider.sign_in(right, "alice"))["code"]
    wrong = exchange(openid_provider, client, code, verifier="w" * 43)
    assert wrong.json()["error"] == "invalid_grant"


def test_users_of_the_provider_come_go_and_refuse(openid_provider: OpenIdProvider) -> None:
    openid_provider.allow_redirect(CALLBACK)
    url = authorize_url(openid_provider, openid_provider.client_id)
    assert answer_of(openid_provider.refuse(url))["error"] == "access_denied"
    with pytest.raises(AssertionError, match="Nobody has that login"):
        openid_provider.sign_in(url, "eve")
    openid_provider.set_user("eve", email="eve@example.com", email_verified="true")
    code = answer_of(openid_provider.sign_in(url, "eve"))["code"]
    tokens = exchange(openid_provider, openid_provider.client_id, code).json()
    _, claims, _ = parts(tokens["id_token"])
    assert (claims["email"], claims["email_verified"]) == ("eve@example.com", "true")
    openid_provider.remove_user("eve")
    with pytest.raises(AssertionError, match="Nobody has that login"):
        openid_provider.sign_in(url, "eve")


def test_the_provider_comes_back_on_its_port_with_new_keys(
    openid_provider: OpenIdProvider,
) -> None:
    """It takes the shared one, whose memory the other tests do not build upon."""
    openid_provider.set_user("dora", email="dora@example.com", email_verified=True)
    openid_provider.allow_redirect(CALLBACK)
    before = fetch(f"{openid_provider.issuer}/jwks").json()
    url = authorize_url(openid_provider, openid_provider.client_id)
    openid_provider.stop()
    with pytest.raises(urllib3.exceptions.HTTPError):
        fetch(openid_provider.metadata_url)
    began = time.monotonic()
    openid_provider.start()
    assert time.monotonic() - began < 10
    after = fetch(f"{openid_provider.issuer}/jwks").json()
    assert {key["kid"] for key in before["keys"]}.isdisjoint(key["kid"] for key in after["keys"])
    assert "code" in answer_of(openid_provider.sign_in(url, "dora"))


def test_the_lock_file_of_the_provider_names_no_registry() -> None:
    lock = json.loads((Path(__file__).parent / "openid" / "package-lock.json").read_text("utf-8"))
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert packages
    assert not [name for name, package in packages.items() if "resolved" in package]
    assert not [name for name, package in packages.items() if "integrity" not in package]


@pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")  # EdDSA has a newer name
@pytest.mark.parametrize("alg", ["ES256", "RS256", "EdDSA"])
def test_a_token_of_the_issuer_verifies(alg: str) -> None:
    with Issuer(alg) as issuer:
        token = issuer.token(sub="did:privy:xyz", sid=None, plan="pro")
        keys = jwk.KeySet.import_key_set(fetch(issuer.jwks_url).json())
        key = KINDS[alg].import_key(issuer.pem)
        for one in (keys, key):
            read = jwt.decode(token, one, algorithms=[alg])
            assert read.header == {"alg": alg, "typ": "JWT", "kid": issuer.kid}
            assert read.claims["iss"] == "privy.io"
            assert read.claims["aud"] == "farebox-test-app"
            assert read.claims["sub"] == "did:privy:xyz"
            assert read.claims["plan"] == "pro"
            assert read.claims["exp"] - read.claims["iat"] == 3600
            assert "sid" not in read.claims
        assert issuer.fetches == 1


def test_the_issuer_rotates_and_drops_its_keys(issuer: Issuer) -> None:
    first = issuer.kid
    second = issuer.rotate()
    assert issuer.kid == second != first
    assert [key["kid"] for key in issuer.jwks()["keys"]] == [first, second]
    assert parts(issuer.token())[0]["kid"] == second
    issuer.drop(first)
    served = fetch(issuer.jwks_url).json()
    assert [key["kid"] for key in served["keys"]] == [second]
    with pytest.raises(JoseError, match="No key for kid"):
        jwt.decode(issuer.token(kid=first), jwk.KeySet.import_key_set(served), algorithms=["ES256"])
    issuer.extra_keys.append({"kty": "oct", "k": "c2VjcmV0", "kid": "extra"})
    assert fetch(issuer.jwks_url).json()["keys"][-1]["kid"] == "extra"


def test_the_issuer_fails_in_each_way_it_is_told(issuer: Issuer) -> None:
    def served(mode: Mode) -> urllib3.BaseHTTPResponse:
        issuer.mode = mode
        return fetch(issuer.jwks_url)

    assert served("ok").json() == issuer.jwks()
    assert served("500").status == 500
    with pytest.raises(ValueError, match="codec"):
        served("garbage").json()
    assert served("empty").json() == {"keys": []}
    there = served("redirect")
    assert there.status == 302
    assert fetch(there.headers["Location"]).json() == issuer.jwks()
    assert (issuer.fetches, issuer.elsewhere_fetches) == (5, 1)
    issuer.mode = "hang"
    with pytest.raises(urllib3.exceptions.TimeoutError):
        fetch(issuer.jwks_url, timeout=0.3)
    issuer.mode = "drip"
    with fetch(issuer.jwks_url, preload_content=False) as answer:
        began = time.monotonic()
        assert answer.read(4) == b'{"ke'
        assert time.monotonic() - began > 0.2
    issuer.mode = "huge"
    with fetch(issuer.jwks_url, preload_content=False) as answer:
        assert answer.read(100_000).startswith(b'{"keys":[{')
    issuer.stop()
    with pytest.raises(urllib3.exceptions.HTTPError):
        fetch(issuer.jwks_url)
    issuer.start()
    assert served("ok").json() == issuer.jwks()
    assert issuer.fetches == 9


def test_a_request_that_hangs_ends_when_the_issuer_recovers(issuer: Issuer) -> None:
    issuer.mode = "hang"
    with socket.create_connection(("127.0.0.1", issuer.port), timeout=5) as sock:
        sock.sendall(b"GET /.well-known/jwks.json HTTP/1.0\r\n\r\n")
        until(lambda: issuer.fetches, what="the request arrived")
        issuer.mode = "ok"
        assert sock.recv(1) == b""


Verify = Callable[[str], Any]


@pytest.fixture
def verify(issuer: Issuer) -> Verify:
    """Accepts what a careful reader of signatures accepts, and raises for all else."""
    key = jwk.ECKey.import_key(issuer.pem, {"kid": issuer.kid})
    keys = jwk.KeySet([key])

    def check(token: str) -> Any:
        return jwt.decode(token, keys, algorithms=["ES256"])

    return check


def test_forgeries_are_many_distinct_and_forged(issuer: Issuer, verify: Verify) -> None:
    good = issuer.token()
    assert verify(good) and verify(twin(good)) and twin(good) != good
    forged = forgeries(good, issuer.pem)
    assert len(forged) >= 25
    assert len(set(forged.values())) == len(forged)
    assert good not in forged.values()
    assert max(map(len, forged.values())) < 8000
    assert sum(map(sendable, forged.values())) > 150
    accepted = []
    for name, token in forged.items():
        with contextlib.suppress(JoseError):
            verify(token)
            accepted.append(name)
    assert not accepted


def test_stale_tokens_are_signed_rightly(issuer: Issuer) -> None:
    tokens = stale(issuer.sign, issuer.claims())
    assert len(tokens) > 50
    assert len(set(tokens.values())) == len(tokens)
    key = issuer.key.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    for token in tokens.values():
        data, _, sealed = token.rpartition(".")
        pair = unb64(sealed)
        der = encode_dss_signature(
            int.from_bytes(pair[:32], "big"), int.from_bytes(pair[32:], "big")
        )
        key.verify(der, data.encode(), ec.ECDSA(hashes.SHA256()))  # raises when it is not
