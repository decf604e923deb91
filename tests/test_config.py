"""An instance that was told something impossible says what, in one line, and does not start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import apsw
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from inprocess import Box
from server import OPERATOR_KEY, ROOT

from config import ConfigError, Settings, load
from core import firstrun

Key = (
    dsa.DSAPrivateKey
    | ec.EllipticCurvePrivateKey
    | ed448.Ed448PrivateKey
    | ed25519.Ed25519PrivateKey
    | rsa.RSAPrivateKey
    | x25519.X25519PrivateKey
)
SANDBOX = '[upstreams.sandbox]\nkind = "sandbox"\n'
HTTP = '[upstreams.api]\nkind = "http"\nbase_url = "https://api.example.com"\n'
ROUTE = '[[routes]]\npath = "/api/v1/x"\nmethods = ["GET"]\nupstream = "sandbox"\ncredits = 1\n'
GOOD = SANDBOX + ROUTE


def told(folder: Path, config: str, **environment: str) -> Settings:
    """The settings of an instance with this config, and nothing else in its environment."""
    folder.mkdir(exist_ok=True)
    (folder / "farebox.toml").write_text(config, "utf-8")
    firstrun.prepare_folder(folder)
    return load({"FAREBOX_INSTANCE": str(folder), **environment})


def refused(folder: Path, config: str, **environment: str) -> str:
    """Why this config is refused: one line."""
    with pytest.raises(ConfigError) as error:
        told(folder, config, **environment)
    line = str(error.value)
    assert "\n" not in line
    return line


def route(**changes: str | None) -> str:
    """A good instance with one route, changed: TOML values by key, None to leave one out."""
    lines = {
        "path": '"/api/v1/x"',
        "methods": '["POST"]',
        "upstream": '"api"',
        "credits": "1",
    } | changes
    body = "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None)
    return f"{SANDBOX}{HTTP}[[routes]]\n{body}"


def api(**changes: str | None) -> str:
    """A good instance with one HTTP upstream, changed."""
    lines = {"kind": '"http"', "base_url": '"https://api.example.com"'} | changes
    body = "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None)
    return f"[upstreams.api]\n{body}"


def twilio(**changes: str | None) -> str:
    lines = {
        "kind": '"twilio"',
        "account_sid": '"AC1"',
        "auth_token": '"t"',
        "from": '"+15005550006"',
    } | changes
    body = "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None)
    return f"[upstreams.sms]\n{body}"


def issuer(**changes: str | None) -> str:
    """An issuer of session tokens, changed; its keys are at an address."""
    lines = {
        "issuer": '"privy.io"',
        "audience": '"app"',
        "jwks_url": '"https://privy.example/jwks.json"',
    } | changes
    body = "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None)
    return f"[[issuers]]\n{body}"


def oidc(name: str = "google", **changes: str | None) -> str:
    lines = {
        "server_metadata_url": f'"https://id.example{METADATA}"',
        "client_id": '"client"',
        "client_secret": '"canary-of-the-client"',
    } | changes
    body = "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None)
    return f"[oidc.{name}]\n{body}"


def smtp(**changes: str | None) -> str:
    lines = {"url": '"smtp://mail.example:587"', "from": '"farebox@example.com"'} | changes
    body = "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None)
    return f"[smtp]\n{body}"


def pem(key: Callable[[], Key], form: str = "public") -> str:
    """A new key as PEM: its public half, in PKCS #1 too, or all of it."""
    made = key()
    if form == "private":
        return made.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode()
    shape = serialization.PublicFormat
    return (
        made.public_key()
        .public_bytes(
            serialization.Encoding.PEM,
            shape.PKCS1 if form == "pkcs1" else shape.SubjectPublicKeyInfo,
        )
        .decode()
    )


METADATA = "/.well-known/openid-configuration"
PEM_FILE = {"jwks_url": None, "pem_file": '"privy.pem"'}
UNIT = {"per": '"unit"', "units": '{ from = "json", pointer = "/usage/pages", max = 20 }'}

# What is written · the key path the refusal must name.
REFUSED: list[tuple[str, str]] = [
    # Keys nobody knows.
    ("nonsense = 1", "$.nonsense"),
    ("[nonsense]", "$.nonsense"),
    # A section that this version does not have yet.
    ("[webhooks]\nallow_private = true", "$.webhooks"),
    ("[x402]\ntopup_credits = 100", "$.x402.facilitator_url"),
    ("[[models]]\nid = 'm'", "$.models[0].credits_per_request"),
    ("[instance]\nkey_prefx = 'a'", "$.instance.key_prefx"),
    ("[limits]\nper_hour = 1", "$.limits.per_hour"),
    (api(bass_url='"https://x.example"'), "$.upstreams.api.bass_url"),
    (route(price="3"), "$.routes[0].price"),
    (GOOD + ROUTE.replace("/x", "/y") + "typo = 1\n", "$.routes[1].typo"),
    (route(per='"unit"', units='{ from = "json", pointer = "/a", max = 2, min = 1 }'),
     "$.routes[0].units.min"),
    # Keys that must be there.
    (route(credits=None), "$.routes[0].credits"),
    (route(path=None), "$.routes[0].path"),
    (route(methods=None), "$.routes[0].methods"),
    (route(upstream=None), "$.routes[0].upstream"),
    ("[upstreams.api]\nbase_url = 'https://x.example'", "$.upstreams.api.kind"),
    (api(base_url=None), "$.upstreams.api.base_url"),
    (twilio(account_sid=None), "$.upstreams.sms.account_sid"),
    (twilio(auth_token=None), "$.upstreams.sms.auth_token"),
    (twilio(**{"from": None}), "$.upstreams.sms.from"),
    # Keys of another kind.
    ("[upstreams.s]\nkind = 'sandbox'\nbase_url = 'https://x.example'", "$.upstreams.s.base_url"),
    (api(account_sid='"AC1"'), "$.upstreams.api.account_sid"),
    (twilio(headers='{ A = "b" }'), "$.upstreams.sms.headers"),
    # Bad values.
    ("[instance]\nkey_prefix = 'Fare'", "$.instance.key_prefix"),
    ("[instance]\nkey_prefix = ''", "$.instance.key_prefix"),
    ("[instance]\nkey_prefix = '9fare'", "$.instance.key_prefix"),
    ("[instance]\nkey_prefix = 'fare_live'", "$.instance.key_prefix"),
    ("[instance]\nkey_prefix = 'a23456789012345678'", "$.instance.key_prefix"),
    ("[instance]\nkey_prefix = \"fare\\n\"", "$.instance.key_prefix"),
    ("[instance]\nusd_per_credit = 0.01", "$.instance.usd_per_credit"),
    ("[instance]\nusd_per_credit = '0'", "$.instance.usd_per_credit"),
    ("[instance]\nusd_per_credit = '0.000'", "$.instance.usd_per_credit"),
    ("[instance]\nusd_per_credit = '-0.01'", "$.instance.usd_per_credit"),
    ("[instance]\nusd_per_credit = '1e-2'", "$.instance.usd_per_credit"),
    ("[instance]\nusd_per_credit = '0,01'", "$.instance.usd_per_credit"),
    ("[instance]\nusd_per_credit = '.5'", "$.instance.usd_per_credit"),
    ("[instance]\nusd_per_credit = 'NaN'", "$.instance.usd_per_credit"),
    ("[instance]\nusd_per_credit = ' 1'", "$.instance.usd_per_credit"),
    ("[instance]\nusd_per_credit = '1_0'", "$.instance.usd_per_credit"),
    ("[instance]\nusd_per_credit = '٠.١'", "$.instance.usd_per_credit"),
    ("[instance]\nsignup = 'maybe'", "$.instance.signup"),
    ("[instance]\nsignup_credits = -1", "$.instance.signup_credits"),
    ("[instance]\nhosts = 'example.com'", "$.instance.hosts"),
    ("[instance]\nhosts = [1]", "$.instance.hosts"),
    ("[instance]\nhosts = ['https://example.com']", "$.instance.hosts[0]"),
    ("[instance]\nhosts = ['a.example', 'b.example:443']", "$.instance.hosts[1]"),
    ("[instance]\nhosts = ['*.example.com']", "$.instance.hosts[0]"),
    ("[instance]\nhosts = ['']", "$.instance.hosts[0]"),
    ("[instance]\ncors_origins = ['*']", "$.instance.cors_origins[0]"),
    ("[instance]\ncors_origins = ['https://a.example', 'b.example']",
     "$.instance.cors_origins[1]"),
    ("[instance]\ncors_origins = ['https://a.example/']", "$.instance.cors_origins[0]"),
    ("[limits]\nrequests_per_minute = 0", "$.limits.requests_per_minute"),
    ("[limits]\nrequests_per_minute = -5", "$.limits.requests_per_minute"),
    ("[limits]\nrequests_per_minute = '600'", "$.limits.requests_per_minute"),
    ("[limits]\nrequests_per_minute = 600.5", "$.limits.requests_per_minute"),
    ("[limits]\nrequests_per_minute = true", "$.limits.requests_per_minute"),
    ("[limits]\nbody_bytes = 0", "$.limits.body_bytes"),
    ("[limits]\nbody_bytes = 10000000000", "$.limits.body_bytes"),
    ("[limits]\nfailed_auth_per_minute = 0", "$.limits.failed_auth_per_minute"),
    ("[limits]\nconcurrent_calls = 0", "$.limits.concurrent_calls"),
    ("[upstreams.x]\nkind = 'smtp'", "$.upstreams.x.kind"),
    ("upstreams = 5", "$.upstreams"),
    ("routes = 5", "$.routes"),
    ("limits = []", "$.limits"),
    (api(base_url='"api.example.com"'), "$.upstreams.api.base_url"),
    (api(base_url='"ftp://api.example.com"'), "$.upstreams.api.base_url"),
    (api(base_url='"https://"'), "$.upstreams.api.base_url"),
    (api(base_url='"https://api.example.com?key=1"'), "$.upstreams.api.base_url"),
    (api(base_url='"https://api.example.com#x"'), "$.upstreams.api.base_url"),
    (api(base_url='"https://user:pass@api.example.com"'), "$.upstreams.api.base_url"),
    (api(base_url='"https://api.example.com:99999"'), "$.upstreams.api.base_url"),
    (api(base_url='"https://api.example.com:0"'), "$.upstreams.api.base_url"),
    (api(base_url='"https://api.example.com/a b"'), "$.upstreams.api.base_url"),
    (api(base_url='"https://[::1"'), "$.upstreams.api.base_url"),
    (api(base_url='"https://é.example"'), "$.upstreams.api.base_url"),
    (api(timeout_seconds="0"), "$.upstreams.api.timeout_seconds"),
    (api(timeout_seconds="-1"), "$.upstreams.api.timeout_seconds"),
    (api(timeout_seconds="nan"), "$.upstreams.api.timeout_seconds"),
    (api(timeout_seconds="inf"), "$.upstreams.api.timeout_seconds"),
    (api(timeout_seconds='"2"'), "$.upstreams.api.timeout_seconds"),
    (api(max_seconds="nan"), "$.upstreams.api.max_seconds"),
    (api(headers='{ "Bad Name" = "x" }'), "$.upstreams.api.headers.Bad Name"),
    (api(headers='{ X-Key = "a\\r\\nb" }'), "$.upstreams.api.headers.X-Key"),
    (api(headers='{ X-Key = "é" }'), "$.upstreams.api.headers.X-Key"),
    (api(headers="{ X-Key = 7 }"), "$.upstreams.api.headers"),
    (api(forward_headers='["X Trace"]'), "$.upstreams.api.forward_headers[0]"),
    (api(forward_headers='["X-Trace", "Authorization"]'), "$.upstreams.api.forward_headers[1]"),
    (api(forward_headers='["cookie"]'), "$.upstreams.api.forward_headers[0]"),
    (api(forward_headers='["Proxy-Authorization"]'), "$.upstreams.api.forward_headers[0]"),
    (api(forward_headers='["idempotency-key"]'), "$.upstreams.api.forward_headers[0]"),
    (api(forward_headers='["Payment-Response"]'), "$.upstreams.api.forward_headers[0]"),
    (api(forward_headers='["X-Payment-Response"]'), "$.upstreams.api.forward_headers[0]"),
    (api(return_headers='["X-Quota:"]'), "$.upstreams.api.return_headers[0]"),
    # Prices.
    (route(credits="-1"), "$.routes[0].credits"),
    (route(credits="1.5"), "$.routes[0].credits"),
    (route(credits='"1"'), "$.routes[0].credits"),
    (route(credits="true"), "$.routes[0].credits"),
    (route(credits="nan"), "$.routes[0].credits"),
    (route(credits="10000000000000000"), "$.routes[0].credits"),
    (route(cost_usd="0.01"), "$.routes[0].cost_usd"),
    (route(cost_usd='"-1"'), "$.routes[0].cost_usd"),
    (route(cost_usd='"cheap"'), "$.routes[0].cost_usd"),
    (route(per='"minute"'), "$.routes[0].per"),
    (route(per='"sms_segment"'), "$.routes[0].per"),
    (route(per='"unit"'), "$.routes[0].units"),
    (route(units=UNIT["units"]), "$.routes[0].units"),
    (route(per='"unit"', units='{ from = "json", max = 2 }'), "$.routes[0].units.pointer"),
    (route(per='"unit"', units='{ from = "json", pointer = "usage", max = 2 }'),
     "$.routes[0].units.pointer"),
    (route(per='"unit"', units='{ from = "json", pointer = "/a~2", max = 2 }'),
     "$.routes[0].units.pointer"),
    (route(per='"unit"', units='{ from = "json", pointer = "/a", name = "X", max = 2 }'),
     "$.routes[0].units.pointer"),
    (route(per='"unit"', units='{ from = "header", max = 2 }'), "$.routes[0].units.name"),
    (route(per='"unit"', units='{ from = "header", name = "X Units", max = 2 }'),
     "$.routes[0].units.name"),
    (route(per='"unit"', units='{ from = "header", name = "X", pointer = "/a", max = 2 }'),
     "$.routes[0].units.name"),
    (route(per='"unit"', units='{ from = "body", max = 2 }'), "$.routes[0].units.from"),
    (route(per='"unit"', units='{ from = "header", name = "X", max = 0 }'),
     "$.routes[0].units.max"),
    (route(per='"unit"', units='{ from = "header", name = "X" }'), "$.routes[0].units.max"),
    (route(adapter='"sms"', **UNIT), "$.routes[0].per"),
    (route(body_bytes="0"), "$.routes[0].body_bytes"),
    # Paths and methods.
    (route(path='""'), "$.routes[0].path"),
    (route(path='"api/v1/x"'), "$.routes[0].path"),
    (route(path='"/api/v1/x*"'), "$.routes[0].path"),
    (route(path='"/api/*/x"'), "$.routes[0].path"),
    (route(path='"/api/v1/*/*"'), "$.routes[0].path"),
    (route(path='"/api/v1/**"'), "$.routes[0].path"),
    (route(path='"//api/v1/x"'), "$.routes[0].path"),
    (route(path='"/api//x"'), "$.routes[0].path"),
    (route(path='"/api/v1/../x"'), "$.routes[0].path"),
    (route(path='"/api/v1/./x"'), "$.routes[0].path"),
    (route(path='"/api/v1/.."'), "$.routes[0].path"),
    (route(path='"/api/v1/x?y=1"'), "$.routes[0].path"),
    (route(path='"/api/v1/x#y"'), "$.routes[0].path"),
    (route(path='"/api/v1/%78"'), "$.routes[0].path"),
    (route(path='"/api/v1/x y"'), "$.routes[0].path"),
    (route(path='"/api/v1/é"'), "$.routes[0].path"),
    (route(path='"/api\\\\x"'), "$.routes[0].path"),
    (route(path='"https://x.example/y"'), "$.routes[0].path"),
    (route(upstream_path='"y"'), "$.routes[0].upstream_path"),
    (route(upstream_path='""'), "$.routes[0].upstream_path"),
    (route(upstream_path='"/../y"'), "$.routes[0].upstream_path"),
    (route(upstream_path='"/y/*"'), "$.routes[0].upstream_path"),
    (route(upstream_path='"/y?key=1"'), "$.routes[0].upstream_path"),
    (route(methods="[]"), "$.routes[0].methods"),
    (route(methods='"POST"'), "$.routes[0].methods"),
    (route(methods='["post"]'), "$.routes[0].methods"),
    (route(methods='["OPTIONS"]'), "$.routes[0].methods"),
    (route(methods='["CONNECT"]'), "$.routes[0].methods"),
    (route(methods='["POST", "POST"]'), "$.routes[0].methods"),
    (route(upstream='"nobody"'), "$.routes[0].upstream"),
    (route(adapter='"fax"'), "$.routes[0].adapter"),
    (route(adapter='"sms"', methods='["GET"]'), "$.routes[0].methods"),
    (route(adapter='"sms"', methods='["GET", "POST"]'), "$.routes[0].methods"),
    (twilio() + route(upstream='"sms"'), "$.routes[0].adapter"),
    (route(scope='"Bad Scope"'), "$.routes[0].scope"),
    (route(scope='""'), "$.routes[0].scope"),
    (route(dialect='"xml"'), "$.routes[0].dialect"),
    (route(x402="true"), "$.routes[0].x402"),
    # One path and method, two routes.
    (GOOD + ROUTE, "$.routes[1].path"),
    (GOOD + ROUTE.replace('["GET"]', '["POST", "GET"]'), "$.routes[1].path"),
    # Issuers of session tokens.
    ("issuers = 5", "$.issuers"),
    ("[issuers]\nissuer = 'a'", "$.issuers"),
    (issuer(typo="1"), "$.issuers[0].typo"),
    (issuer(issuer=None), "$.issuers[0].issuer"),
    (issuer(issuer='""'), "$.issuers[0].issuer"),
    (issuer(issuer='"privy io"'), "$.issuers[0].issuer"),
    (issuer(issuer='"privé.io"'), "$.issuers[0].issuer"),
    (issuer(issuer='"privy.io\\n"'), "$.issuers[0].issuer"),
    (issuer(issuer=f'"{"x" * 256}"'), "$.issuers[0].issuer"),
    (issuer(issuer='"http://127.0.0.1:8402"'), "$.issuers[0].issuer"),
    (issuer(issuer='"http://127.0.0.1:8402/"'), "$.issuers[0].issuer"),
    (issuer() + issuer(audience='"other"'), "$.issuers[1].issuer"),
    (issuer(audience=None), "$.issuers[0].audience"),
    (issuer(audience='""'), "$.issuers[0].audience"),
    (issuer(audience='["app"]'), "$.issuers[0].audience"),
    (issuer(signup='"open"'), "$.issuers[0].signup"),
    (issuer(jwks_url=None), "$.issuers[0].pem_file"),
    (issuer(pem_file='"privy.pem"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='""'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"privy.example/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"ftp://privy.example/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"http://privy.example/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"http://10.0.0.1/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"http://128.0.0.1/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"http://[::2]/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"http://[::ffff:127.0.0.1]/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"http://localhost.example/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"http://127.0.0.1.example/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"http://127.0.0.1@privy.example/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"https://user@privy.example/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"https://privy.example/jwks#x"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"https://privy.example:0/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url='"https://[::1/jwks"'), "$.issuers[0].jwks_url"),
    (issuer(jwks_url=None, pem_file='""'), "$.issuers[0].pem_file"),
    (issuer(jwks_url=None, pem_file='"keys/privy.pem"'), "$.issuers[0].pem_file"),
    (issuer(jwks_url=None, pem_file='"/etc/privy.pem"'), "$.issuers[0].pem_file"),
    (issuer(jwks_url=None, pem_file='"../privy.pem"'), "$.issuers[0].pem_file"),
    (issuer(jwks_url=None, pem_file='".pem"'), "$.issuers[0].pem_file"),
    (issuer(jwks_url=None, pem_file='".privy.pem"'), "$.issuers[0].pem_file"),
    (issuer(jwks_url=None, pem_file='"privy.PEM"'), "$.issuers[0].pem_file"),
    (issuer(jwks_url=None, pem_file='"privy.key"'), "$.issuers[0].pem_file"),
    (issuer(jwks_url=None, pem_file='"privy.pem\\u0000"'), "$.issuers[0].pem_file"),
    (issuer(jwks_url=None, pem_file='"missing.pem"'), "$.issuers[0].pem_file"),
    (issuer(jwks_url=None, pem_file=f'"{"x" * 300}.pem"'), "$.issuers[0].pem_file"),
    # Sign-in with somebody else.
    ("oidc = 5", "$.oidc"),
    ("[oidc]\ngoogle = 5", "$.oidc.google"),
    (oidc(typo="1"), "$.oidc.google.typo"),
    (oidc("Google"), "$.oidc.Google"),
    (oidc("9oogle"), "$.oidc.9oogle"),
    (oidc("-google"), "$.oidc.-google"),
    (oidc("g" * 33), "$.oidc." + "g" * 33),
    (oidc('"goo gle"'), "$.oidc.goo gle"),
    (oidc('"goo/gle"'), "$.oidc.goo/gle"),
    (oidc('"google\\n"'), "$.oidc.google\\n"),
    (oidc('"google\\n"', client_id=None), "$.oidc.google\\n.client_id"),
    (oidc(server_metadata_url=None), "$.oidc.google.server_metadata_url"),
    (oidc(server_metadata_url='"https://id.example"'), "$.oidc.google.server_metadata_url"),
    (oidc(server_metadata_url=f'"id.example{METADATA}"'), "$.oidc.google.server_metadata_url"),
    (oidc(server_metadata_url=f'"http://id.example{METADATA}"'),
     "$.oidc.google.server_metadata_url"),
    (oidc(server_metadata_url=f'"https://a:b@id.example{METADATA}"'),
     "$.oidc.google.server_metadata_url"),
    (oidc(client_id=None), "$.oidc.google.client_id"),
    (oidc(client_id='""'), "$.oidc.google.client_id"),
    (oidc(client_id='"é"'), "$.oidc.google.client_id"),
    (oidc(client_secret=None), "$.oidc.google.client_secret"),
    (oidc(client_secret='""'), "$.oidc.google.client_secret"),
    (oidc(client_secret='"a\\n"'), "$.oidc.google.client_secret"),
    (oidc(label='""'), "$.oidc.google.label"),
    (oidc(label='"  "'), "$.oidc.google.label"),
    (oidc(label='"Goo\\ngle"'), "$.oidc.google.label"),
    (oidc(label=f'"{"x" * 65}"'), "$.oidc.google.label"),
    (oidc(scope='""'), "$.oidc.google.scope"),
    (oidc(scope='"email profile"'), "$.oidc.google.scope"),
    (oidc(scope='"openidx"'), "$.oidc.google.scope"),
    (oidc(scope='"openid  email"'), "$.oidc.google.scope"),
    (oidc(scope='"openid, email"'), "$.oidc.google.scope"),
    (oidc(scope='["openid"]'), "$.oidc.google.scope"),
    # When to warn.
    ("alerts = 100", "$.alerts"),
    ("[[alerts]]\ncredit_low = 100", "$.alerts"),
    ("[alerts]\ncredits_low = 100", "$.alerts.credits_low"),
    ("[alerts]\ncredit_low = -1", "$.alerts.credit_low"),
    ("[alerts]\ncredit_low = 1.5", "$.alerts.credit_low"),
    ("[alerts]\ncredit_low = '100'", "$.alerts.credit_low"),
    ("[alerts]\ncredit_low = true", "$.alerts.credit_low"),
    ("[alerts]\ncredit_low = 10000000000000000", "$.alerts.credit_low"),
    # Mail.
    ("smtp = 5", "$.smtp"),
    (smtp(typo="1"), "$.smtp.typo"),
    (smtp(url=None), "$.smtp.url"),
    (smtp(url='""'), "$.smtp.url"),
    (smtp(url='"mail.example:587"'), "$.smtp.url"),
    (smtp(url='"https://mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://"'), "$.smtp.url"),
    (smtp(url='"smtp://:587"'), "$.smtp.url"),
    (smtp(url='"smtp://mail.example:0"'), "$.smtp.url"),
    (smtp(url='"smtp://mail.example:x"'), "$.smtp.url"),
    (smtp(url='"smtp://mail.example/inbox"'), "$.smtp.url"),
    (smtp(url='"smtp://mail.example?tls=no"'), "$.smtp.url"),
    (smtp(url='"smtp://mail.example#x"'), "$.smtp.url"),
    (smtp(url='"smtp://mail_%41.example"'), "$.smtp.url"),
    (smtp(url='"smtp://@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://:canary@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:canary@7@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:canary/7@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:7/canary@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:canary#7@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:canary%@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:canary%zz@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:canary%0A@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:canary%7F@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:canary%C3%A9@mail.example"'), "$.smtp.url"),
    (smtp(url='"smtp://user:canary é@mail.example"'), "$.smtp.url"),
    (smtp(**{"from": None}), "$.smtp.from"),
    (smtp(**{"from": '""'}), "$.smtp.from"),
    (smtp(**{"from": '"farebox"'}), "$.smtp.from"),
    (smtp(**{"from": '"@example.com"'}), "$.smtp.from"),
    (smtp(**{"from": '"farebox@"'}), "$.smtp.from"),
    (smtp(**{"from": '"farebox@example..com"'}), "$.smtp.from"),
    (smtp(**{"from": '"a@b@example.com"'}), "$.smtp.from"),
    (smtp(**{"from": '"Farebox <farebox@example.com>"'}), "$.smtp.from"),
    (smtp(**{"from": '"farebox@example.com\\nBcc: a@b.example"'}), "$.smtp.from"),
    # Not TOML at all.
    ("[instance", "farebox.toml"),
    ("a = ", "farebox.toml"),
    ("[instance]\n[instance]", "farebox.toml"),
]  # fmt: skip

# Every path of ours, and what would lie over it.
OWN = [
    "/", "/*", "/api/*", "/api/v1/*", "/v1/*", "/healthz", "/healthz/*", "/api/health",
    "/api/v1/account", "/api/v1/account/", "/api/v1/account/*", "/v1/account", "/v1/account/x",
    "/api/v1/usage", "/api/v1/usage/*", "/api/v1/usage/summary", "/api/v1/ledger",
    "/api/v1/keys", "/api/v1/keys/*", "/api/v1/members", "/api/v1/members/*",
    "/api/v1/session-tokens", "/api/v1/session-tokens/current", "/api/v1/credits/top-up",
    "/api/v1/credits/redeem", "/api/v1/credits/*", "/api/v1/wallets", "/api/v1/wallets/challenge",
    "/v1/models", "/v1/models/*", "/v1/webhooks", "/v1/webhooks/x", "/metrics", "/login",
    "/setup", "/dashboard", "/dashboard/billing", "/admin", "/admin/*", "/docs", "/docs/*",
    "/docs/errors", "/openapi.json", "/llms.txt", "/llms-full.txt", "/.well-known/*",
    "/.well-known/jwks.json", "/.well-known/x402", "/discovery/resources", "/discovery/*",
    "/static/*", "/static/x.css", "/signup", "/signup/*", "/forgot", "/api/v1/audit",
    "/api/v1/audit/*",
]  # fmt: skip
BESIDE = [
    "/api/v1/accounts", "/api/v1/usages/*", "/v1/modelsx", "/v1/chat/completions", "/docs2",
    "/api/v1/sms/send", "/healthz2", "/metrics-of-mine", "/administration/*", "/v2/*", "/api/v2/*",
]  # fmt: skip


@pytest.mark.parametrize(("config", "path"), REFUSED)
def test_a_refusal_names_the_key_path(tmp_path: Path, config: str, path: str) -> None:
    line = refused(tmp_path / "i", config)
    assert line.startswith("farebox.toml: ")
    if path.startswith("$"):
        named = line.removeprefix("farebox.toml: ")
        # A list's bad item may be named by its number.
        assert re.match(re.escape(path) + r"(\[[0-9.]+\])?: ", named), line
    assert "canary" not in line
    assert len(line.rpartition(": ")[2]) > 10 or "missing" in line or "unknown" in line


@pytest.mark.parametrize("path", OWN)
def test_a_route_over_a_path_of_ours_is_refused(tmp_path: Path, path: str) -> None:
    line = refused(tmp_path / "i", route(path=f'"{path}"'))
    assert line.startswith("farebox.toml: $.routes[0].path: "), line
    assert "itself" in line


@pytest.mark.parametrize("path", BESIDE)
def test_a_route_beside_a_path_of_ours_is_not(tmp_path: Path, path: str) -> None:
    assert told(tmp_path / "i", route(path=f'"{path}"')).routes[0].path == path


def test_every_path_the_application_has_is_closed_to_routes(tmp_path: Path) -> None:
    with Box(tmp_path / "i") as box:
        rules = [rule.rule.partition("<")[0] for rule in box.app.url_map.iter_rules()]
    assert "/api/v1/usage/" in rules
    for number, rule in enumerate(rules):
        line = refused(tmp_path / str(number), route(path=f'"{rule.rstrip("/") or "/"}"'))
        assert "$.routes[0].path" in line


def test_what_was_expected_is_said(tmp_path: Path) -> None:
    assert 'such as "0.01"' in refused(tmp_path / "a", "[instance]\nusd_per_credit = 'free'")
    signup = refused(tmp_path / "b", "[instance]\nsignup = 'maybe'")
    assert "closed" in signup and "open" in signup
    method = refused(tmp_path / "e", route(methods='["post"]'))
    assert "POST" in method
    assert "int" in refused(tmp_path / "c", route(credits='"1"'))
    assert "host" in refused(tmp_path / "d", api(base_url='"x"'))


# ${NAME} and the environment.


def test_a_variable_is_taken_from_the_environment_and_kept_secret(tmp_path: Path) -> None:
    config = api(headers='{ X-Key = "Bearer ${LOOKUP_KEY} ${OTHER}" }')
    settings = told(tmp_path / "i", config, LOOKUP_KEY="s3cret-value", OTHER="two")
    assert settings.upstreams["api"].headers == {"X-Key": "Bearer s3cret-value two"}
    assert {"s3cret-value", "two"} <= settings.secrets
    # What it brings is a value, never more TOML and never another variable.
    odd = '"]\nx = 1 ${OTHER}'
    with pytest.raises(ConfigError):
        told(tmp_path / "i", config, LOOKUP_KEY=odd, OTHER="two")


@pytest.mark.parametrize(
    ("config", "path", "name"),
    [
        (api(headers='{ X-Key = "${LOOKUP_KEY}" }'), "$.upstreams.api.headers.X-Key", "LOOKUP_KEY"),
        (twilio(auth_token='"${TOKEN}"'), "$.upstreams.sms.auth_token", "TOKEN"),
        ('[instance]\nhosts = ["a.example", "${HOST_2}"]', "$.instance.hosts[1]", "HOST_2"),
        (GOOD + ROUTE.replace("/x", "/${P}"), "$.routes[1].path", "P"),
    ],
)
def test_an_unset_variable_is_refused_by_name(
    tmp_path: Path, config: str, path: str, name: str
) -> None:
    for environment in ({}, {name: ""}):
        line = refused(tmp_path / "i", config, **environment)
        assert line.startswith(f"farebox.toml: {path}: "), line
        assert name in line


@pytest.mark.parametrize("secret", ["canary\\x", "canary\tx", 'it\'s "canary"', "canary\x00é"])
def test_a_refusal_never_shows_a_secret_that_python_would_write_otherwise(
    tmp_path: Path, secret: str
) -> None:
    for config in (
        api(base_url='"${SECRET}"'),
        api(base_url='"https://\\"a b\\"${SECRET}"'),
        route(path='"/x${SECRET}"'),
    ):
        assert "canary" not in refused(tmp_path / "i", config, SECRET=secret)


def test_a_refusal_never_shows_a_secret(tmp_path: Path) -> None:
    for config in (
        api(base_url='"${SECRET}"'),
        api(headers='{ X-Key = "${SECRET}\\u00e9" }'),
        route(path='"${SECRET}"'),
        '[instance]\nusd_per_credit = "${SECRET}"',
        '[instance]\ncors_origins = ["${SECRET}"]',
        api(forward_headers='["${SECRET} x"]'),
    ):
        line = refused(tmp_path / "i", config, SECRET="canary-of-the-config")
        assert "canary" not in line, line
    line = refused(tmp_path / "i", GOOD, FAREBOX_OPERATOR_KEY="canary-too-short")
    assert "canary" not in line
    line = refused(tmp_path / "i", GOOD, FAREBOX_SECRET_KEY="canary-too-short")
    assert "canary" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FAREBOX_OPERATOR_KEY", ""),
        ("FAREBOX_OPERATOR_KEY", "short"),
        ("FAREBOX_OPERATOR_KEY", "x" * 31),
        ("FAREBOX_OPERATOR_KEY", "x" * 31 + " "),
        ("FAREBOX_OPERATOR_KEY", "x" * 32 + "é"),
        ("FAREBOX_OPERATOR_KEY", "x" * 32 + ",y"),
        ("FAREBOX_OPERATOR_KEY", "x" * 32 + "\n"),
        ("FAREBOX_OPERATOR_KEY", "x" * 9000),
        ("FAREBOX_SECRET_KEY", "short"),
        ("FAREBOX_BIND", "8402"),
        ("FAREBOX_BIND", "127.0.0.1"),
        ("FAREBOX_BIND", "127.0.0.1:"),
        ("FAREBOX_BIND", "127.0.0.1:http"),
        ("FAREBOX_BIND", "127.0.0.1:99999"),
        ("FAREBOX_BIND", "127.0.0.1:0"),
        ("FAREBOX_BIND", "http://127.0.0.1:8402"),
        ("FAREBOX_BIND", "127.0.0.1:8402 "),
        ("FAREBOX_WORKERS", "0"),
        ("FAREBOX_WORKERS", "-1"),
        ("FAREBOX_WORKERS", "many"),
        ("FAREBOX_WORKERS", "1.5"),
        ("FAREBOX_WORKERS", "1000000"),
        ("FAREBOX_THREADS", "0"),
        ("FAREBOX_THREADS", "٣"),
        ("FAREBOX_TRUSTED_PROXIES", "-1"),
        ("FAREBOX_TRUSTED_PROXIES", "all"),
        ("FAREBOX_PUBLIC_URL", "pay.example.com"),
        ("FAREBOX_PUBLIC_URL", "ftp://pay.example.com"),
        ("FAREBOX_PUBLIC_URL", "https://"),
        ("FAREBOX_PUBLIC_URL", "https://pay.example.com?x=1"),
        ("FAREBOX_PUBLIC_URL", "https://user@pay.example.com"),
    ],
)
def test_a_bad_variable_of_ours_is_refused_by_its_name(
    tmp_path: Path, name: str, value: str
) -> None:
    line = refused(tmp_path / "i", GOOD, **{name: value})
    assert line.startswith(f"{name}: "), line
    assert "expected" in line


def test_the_environment_has_the_contracts_defaults(tmp_path: Path) -> None:
    settings = told(tmp_path / "i", GOOD)
    assert settings.bind == "127.0.0.1:8402"
    assert settings.public_url == "http://127.0.0.1:8402"
    assert (settings.workers, settings.threads, settings.trusted_proxies) == (2, 32, 0)
    assert settings.operator_key is None
    assert settings.secret_key == (tmp_path / "i" / "secret_key").read_text().strip()
    assert settings.folder == tmp_path / "i"
    assert settings.hosts == {"127.0.0.1", "localhost"}


def test_the_environment_is_taken(tmp_path: Path) -> None:
    settings = told(
        tmp_path / "i",
        GOOD,
        FAREBOX_BIND="0.0.0.0:80",
        FAREBOX_PUBLIC_URL="https://pay.example.com/",
        FAREBOX_WORKERS="4",
        FAREBOX_THREADS="8",
        FAREBOX_TRUSTED_PROXIES="1",
        FAREBOX_OPERATOR_KEY=OPERATOR_KEY,
        FAREBOX_SECRET_KEY="s" * 40,
    )
    assert (settings.bind, settings.public_url) == ("0.0.0.0:80", "https://pay.example.com")
    assert (settings.workers, settings.threads, settings.trusted_proxies) == (4, 8, 1)
    assert (settings.operator_key, settings.secret_key) == (OPERATOR_KEY, "s" * 40)
    assert {"pay.example.com", "localhost", "127.0.0.1"} <= settings.hosts
    assert {OPERATOR_KEY, "s" * 40} <= settings.secrets
    ipv6 = told(tmp_path / "j", GOOD, FAREBOX_BIND="[::1]:8402")
    assert "::1" in ipv6.hosts


def test_generated_secrets_are_made_once_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    first = told(folder, GOOD).secret_key
    assert len(first) >= 43
    assert told(folder, GOOD).secret_key == first
    assert told(tmp_path / "j", GOOD).secret_key != first
    assert (folder / "secret_key").stat().st_mode & 0o777 == 0o600


# Others: whose tokens are taken, with whom people sign in, who sends the mail.

KEYS: dict[str, Callable[[], Key]] = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
NOT_A_KEY = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"


@pytest.mark.parametrize(("kind", "form"), [*((kind, "public") for kind in KEYS), ("RSA", "pkcs1")])
def test_an_issuers_public_key_is_read_from_its_file(tmp_path: Path, kind: str, form: str) -> None:
    text = pem(KEYS[kind], form)
    folder = tmp_path / "i"
    folder.mkdir()
    (folder / "privy.pem").write_text(text)
    settings = told(folder, issuer(**PEM_FILE) + issuer(issuer='"other.example"'))
    assert settings.issuer_pems == {"privy.io": text}
    assert [(other.issuer, other.pem_file) for other in settings.issuers] == [
        ("privy.io", "privy.pem"),
        ("other.example", None),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (lambda: "", "public key"),
        (lambda: "not a key", "public key"),
        (lambda: "clé", "public key"),
        (lambda: NOT_A_KEY, "public key"),
        (lambda: pem(KEYS["P-256"]) * 2, "one public key"),
        (lambda: pem(KEYS["P-256"], "private"), "private key"),
        (lambda: pem(KEYS["P-256"]) + pem(KEYS["P-256"], "private"), "private key"),
        (lambda: CERTIFICATE, "certificate"),
        (lambda: pem(KEYS["P-256"]) + CERTIFICATE, "certificate"),
        (lambda: pem(lambda: rsa.generate_private_key(65537, 1024)), "at least 2048"),
        (lambda: pem(lambda: ec.generate_private_key(ec.SECP256K1())), "P-256"),
        (lambda: pem(lambda: ec.generate_private_key(ec.SECP224R1())), "P-256"),
        (lambda: pem(ed448.Ed448PrivateKey.generate), "Ed25519"),
        (lambda: pem(x25519.X25519PrivateKey.generate), "Ed25519"),
        (lambda: pem(lambda: dsa.generate_private_key(1024)), "Ed25519"),
    ],
)
def test_a_file_without_a_public_key_of_use_is_refused(
    tmp_path: Path, text: Callable[[], str], expected: str
) -> None:
    folder = tmp_path / "i"
    folder.mkdir()
    written = text()
    (folder / "privy.pem").write_text(written, "utf-8")
    line = refused(folder, issuer(**PEM_FILE))
    assert line.startswith("farebox.toml: $.issuers[0].pem_file: privy.pem: "), line
    assert expected in line and "expected" in line
    # Nothing of what may be a private key.
    assert not any(part in line for part in re.findall(r"^[A-Za-z0-9+/=]{10,}$", written, re.M))


def test_a_folder_is_not_a_key(tmp_path: Path) -> None:
    (tmp_path / "i" / "privy.pem").mkdir(parents=True)
    assert "not found" in refused(tmp_path / "i", issuer(**PEM_FILE))


def test_no_issuer_is_this_instance_itself(tmp_path: Path) -> None:
    config = issuer(issuer='"https://pay.example.com"')
    line = refused(tmp_path / "i", config, FAREBOX_PUBLIC_URL="https://pay.example.com/")
    assert line.startswith("farebox.toml: $.issuers[0].issuer: expected an issuer other"), line
    assert told(tmp_path / "i", config).issuers[0].issuer == "https://pay.example.com"


@pytest.mark.parametrize(
    "url",
    [
        "https://privy.example/jwks.json?app=1",
        "https://privy.example:8443",
        "http://localhost:9000/jwks",
        "http://127.0.0.1/jwks",
        "http://127.8.9.10:9000/jwks",
        "http://[::1]:9000/jwks",
    ],
)
def test_keys_come_over_tls_or_from_this_machine(tmp_path: Path, url: str) -> None:
    (section,) = told(tmp_path / "i", issuer(jwks_url=f'"{url}"')).issuers
    assert (section.jwks_url, section.pem_file) == (url, None)
    assert (section.issuer, section.audience, section.signup) == ("privy.io", "app", False)


def test_people_of_an_issuer_may_be_let_in(tmp_path: Path) -> None:
    config = issuer(signup="true", issuer=f'"{"x" * 255}"')
    assert told(tmp_path / "i", config).issuers[0].signup is True


def test_sign_in_with_others_is_told_by_name(tmp_path: Path) -> None:
    config = oidc("okta-2_x") + oidc(
        label='"Google for us"',
        scope='"openid"',
        client_secret='"${OIDC_SECRET}"',
        server_metadata_url=f'"http://localhost:9000/realm{METADATA}?p=1"',
    )
    settings = told(tmp_path / "i", config, OIDC_SECRET="s3cret-of-google")
    okta, google = settings.oidc["okta-2_x"], settings.oidc["google"]
    assert (okta.label, okta.scope) == ("Okta-2_x", "openid email profile")
    assert (google.label, google.scope) == ("Google for us", "openid")
    assert (google.client_id, google.client_secret) == ("client", "s3cret-of-google")
    assert {"s3cret-of-google", "canary-of-the-client"} <= settings.secrets


@pytest.mark.parametrize(
    ("url", "host", "port", "login", "implicit_tls", "needs_starttls"),
    [
        ("smtp://mail.example", "mail.example", 587, None, False, True),
        ("smtp://mail.example:25/", "mail.example", 25, None, False, True),
        ("smtps://mail.example", "mail.example", 465, None, True, False),
        ("smtps://u:p@mail.example:1465", "mail.example", 1465, ("u", "p"), True, False),
        ("smtp://a%40b.example:p%2Fw%20:1@m.example", "m.example", 587,
         ("a@b.example", "p/w :1"), False, True),
        ("smtp://localhost:2525", "localhost", 2525, None, False, False),
        ("smtp://127.0.0.1:2525", "127.0.0.1", 2525, None, False, False),
        ("smtp://u:p@[::1]:2525", "::1", 2525, ("u", "p"), False, False),
    ],
)  # fmt: skip
def test_the_mail_servers_url_is_read(
    tmp_path: Path,
    url: str,
    host: str,
    port: int,
    login: tuple[str, str] | None,
    implicit_tls: bool,
    needs_starttls: bool,
) -> None:
    section = told(tmp_path / "i", smtp(url=f'"{url}"')).smtp
    assert section is not None
    assert (section.host, section.port, section.login) == (host, port, login)
    assert (section.implicit_tls, section.needs_starttls) == (implicit_tls, needs_starttls)
    assert section.from_ == "farebox@example.com"


def test_the_mail_servers_password_is_kept_secret_in_both_its_forms(tmp_path: Path) -> None:
    for url in ("smtp://u:pass%2Fword@m.example", "smtp://u:${PASS}@m.example"):
        settings = told(tmp_path / "i", smtp(url=f'"{url}"'), PASS="pass%2Fword")
        assert {"pass/word", "pass%2Fword"} <= settings.secrets
    # One that was not encoded is refused, and not shown.
    line = refused(tmp_path / "i", smtp(url='"smtp://u:${PASS}@m.example"'), PASS="canary/word")
    assert line.startswith("farebox.toml: $.smtp.url: ") and "percent-encoded" in line
    assert "canary" not in line


def test_nobody_else_is_known_unless_it_was_said(tmp_path: Path) -> None:
    settings = told(tmp_path / "i", GOOD)
    assert (settings.issuers, settings.issuer_pems) == ([], {})
    assert (settings.oidc, settings.smtp) == ({}, None)


@pytest.mark.parametrize(
    ("config", "credits"),
    [
        ("", None), ("[alerts]\n", None), ("[alerts]\ncredit_low = 100", 100),
        ("[alerts]\ncredit_low = 0", 0), ("[alerts]\ncredit_low = 1000000000", 10**9),
    ],
)  # fmt: skip
def test_when_credits_run_low_is_told_or_left_to_their_pace(
    tmp_path: Path, config: str, credits: int | None
) -> None:
    assert told(tmp_path / "i", GOOD + config).credit_low == credits


def test_only_an_issuers_file_needs_cryptography(tmp_path: Path) -> None:
    told(tmp_path / "i", issuer() + oidc() + smtp())
    program = "import config, sys; config.load(); sys.exit('cryptography' in sys.modules)"
    done = run(["python", "-c", program], tmp_path / "i")
    assert done.returncode == 0, done.stderr


# What must load.


def test_the_config_of_the_first_run_loads_and_says_what_it_does(tmp_path: Path) -> None:
    firstrun.prepare_folder(tmp_path / "i")
    text = (tmp_path / "i" / "farebox.toml").read_text("utf-8")
    assert text == (ROOT / "templates" / "farebox.toml").read_text("utf-8")
    assert text.count("#") > 20
    settings = load({"FAREBOX_INSTANCE": str(tmp_path / "i")})
    (sms,) = settings.routes
    assert (sms.path, sms.credits, sms.per) == ("/api/v1/sms/send", 1, "sms_segment")
    assert (tmp_path / "i" / "farebox.toml").stat().st_mode & 0o777 == 0o600


def test_the_commented_lines_of_the_first_config_load_too(tmp_path: Path) -> None:
    pytest.importorskip("coincurve")  # what [x402] needs
    text = (ROOT / "templates" / "farebox.toml").read_text("utf-8")
    lines = [re.sub(r"^# (?=\[|[a-z0-9_]+ =)", "", line) for line in text.splitlines()]
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "privy.pem").write_text(pem(ed25519.Ed25519PrivateKey.generate))
    settings = told(
        tmp_path / "i",
        "\n".join(lines).replace("0x…", "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"),
        TWILIO_ACCOUNT_SID="AC1",
        TWILIO_AUTH_TOKEN="t",
        LOOKUP_KEY="k",
        OPENAI_API_KEY="o",
        SMTP_PASSWORD="p",
        GOOGLE_SECRET="g",
    )
    assert set(settings.upstreams) == {"sandbox", "sms", "lookup", "llm"}
    assert len(settings.routes) == 3
    assert [model.id for model in settings.models] == ["qwen3-8b"]
    assert [section.issuer for section in settings.issuers] == ["privy.io"]
    assert set(settings.oidc) == {"google"}
    assert settings.smtp is not None
    assert settings.credit_low == 100
    assert settings.payments is not None and list(settings.payments.networks) == ["eip155:84532"]


CONTRACT = """
[instance]
key_prefix = "fare"
usd_per_credit = "0.01"           # a decimal string
signup = "closed"                 # or "open"
signup_credits = 0                # granted to every new account
cors_origins = []
hosts = []

[upstreams.sandbox]
kind = "sandbox"
[upstreams.sms]
kind = "twilio"
account_sid = "${TWILIO_ACCOUNT_SID}"
auth_token = "${TWILIO_AUTH_TOKEN}"
from = "+15005550006"
[upstreams.lookup]
kind = "http"
base_url = "https://api.example.com"
headers = { X-Api-Key = "${LOOKUP_KEY}" }
forward_headers = ["X-Trace"]
return_headers = ["X-Quota"]
timeout_seconds = 120
max_seconds = 3600

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
scope = "sms:send"
credits = 1
per = "sms_segment"
cost_usd = "0.0079"
body_bytes = 1048576

[[routes]]
path = "/api/v1/lookup/*"
methods = ["GET", "POST"]
upstream = "lookup"
upstream_path = "/v2/*"
credits = 3
per = "unit"
units = { from = "json", pointer = "/usage/pages", max = 20 }

[limits]
requests_per_minute = 600
body_bytes = 1048576
failed_auth_per_minute = 30
concurrent_calls = 128
"""


def test_the_contracts_example_loads(tmp_path: Path) -> None:
    secrets = {"TWILIO_ACCOUNT_SID": "AC1", "TWILIO_AUTH_TOKEN": "t0", "LOOKUP_KEY": "k0"}
    settings = told(tmp_path / "i", CONTRACT, **secrets)
    assert settings.usd_per_credit == Decimal("0.01")
    assert settings.upstreams["sms"].auth_token == "t0"
    lookup = settings.routes[1]
    assert lookup.units is not None
    assert (lookup.units.pointer, lookup.units.max) == ("/usage/pages", 20)
    # And it is what one gets without saying it.
    bare = told(tmp_path / "j", "")
    assert (bare.limits, bare.instance) == (settings.limits, settings.instance)
    assert bare.usd_per_credit == settings.usd_per_credit
    minimal = told(tmp_path / "k", api() + ROUTE.replace("sandbox", "api"))
    assert minimal.upstreams["api"].timeout_seconds == 120
    assert minimal.upstreams["api"].max_seconds == 3600
    assert (minimal.routes[0].adapter, minimal.routes[0].per) == ("forward", "call")


def test_the_same_path_may_have_a_route_for_each_method(tmp_path: Path) -> None:
    config = GOOD + ROUTE.replace('"GET"', '"POST", "PUT"') + ROUTE.replace("/x", "/x/*")
    assert len(told(tmp_path / "i", config).routes) == 3


# What an operator sees.


def environment(folder: Path, **changes: str) -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith("FAREBOX_")}
    return ours | {"FAREBOX_INSTANCE": str(folder), "FAREBOX_BIND": "127.0.0.1:1"} | changes


def run(command: list[str], folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name(command[0])
    return subprocess.run(
        [str(program), *command[1:]],
        cwd=ROOT,
        env=environment(folder, **changes),
        capture_output=True,
        text=True,
        timeout=30,
    )


SERVE = ["gunicorn", "-c", "gunicorn.conf.py"]


@pytest.mark.parametrize(
    ("command", "config", "changes", "names"),
    [
        (SERVE, route(credits=None), {}, "$.routes[0].credits"),
        (SERVE, GOOD, {"FAREBOX_OPERATOR_KEY": "short"}, "FAREBOX_OPERATOR_KEY"),
        (["flask", "users", "list"], route(credits=None), {}, "$.routes[0].credits"),
        (["flask", "doctor"], "[limits]\nper_hour = 1", {}, "$.limits.per_hour"),
        (["flask", "credits", "balance", "a@b.example"], api(base_url='"${UNSET_HERE}"'), {},
         "UNSET_HERE"),
        (["flask", "users", "list"], issuer(**PEM_FILE), {}, "$.issuers[0].pem_file"),
        (["flask", "users", "list"], issuer(issuer='"http://127.0.0.1:1"'), {},
         "$.issuers[0].issuer"),
        (["flask", "users", "list"], oidc("Google"), {}, "$.oidc.Google"),
        (["flask", "users", "list"], smtp(url='"smtp://u:p"'), {}, "$.smtp.url"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_on_standard_error_and_exit_code_2(
    tmp_path: Path, command: list[str], config: str, changes: dict[str, str], names: str
) -> None:
    folder = tmp_path / "i"
    folder.mkdir()
    (folder / "farebox.toml").write_text(config, "utf-8")
    done = run(command, folder, **changes)
    assert done.returncode == 2, done
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert names in lines[0]
    assert "Traceback" not in done.stderr
    assert not (folder / "farebox.db").exists()


def test_a_schema_from_the_future_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    with Box(folder) as box:
        box.instance.db.row("SELECT 1")
    connection = apsw.Connection(str(folder / "farebox.db"))
    connection.pragma("user_version", 9999)
    connection.close()
    for command in (["flask", "users", "list"], SERVE):
        done = run(command, folder)
        assert done.returncode == 2, done
        assert "9999" in done.stderr
        assert "Traceback" not in done.stderr
        if command is not SERVE:
            assert len(done.stderr.strip().splitlines()) == 1
