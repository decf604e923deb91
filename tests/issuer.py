"""An outside token issuer that misbehaves on demand, and tokens that nobody may accept.

`Issuer` is a service like Privy: it signs its users' tokens and publishes its public keys on
loopback. `forgeries` and `stale` make the tokens to be refused: the former needs no private key,
the latter has one and lies with it.

All of it is written with `cryptography` alone, so no fault of a token library can hide here.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey
Mode = Literal["ok", "500", "garbage", "empty", "redirect", "hang", "drip", "huge"]
Sign = Callable[[dict[str, Any], dict[str, Any]], str]

HUGE_BYTES = 64 * 1024 * 1024
DRIP_SECONDS = 0.1
WAIT_LIMIT_SECONDS = 60.0
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

_HASHES: dict[str, hashes.HashAlgorithm] = {
    "256": hashes.SHA256(),
    "384": hashes.SHA384(),
    "512": hashes.SHA512(),
}
_CURVES = {"secp256r1": ("P-256", 32), "secp384r1": ("P-384", 48), "secp521r1": ("P-521", 66)}


# JOSE, in its plainest form.


def b64(data: bytes) -> str:
    """Base64url without padding, as in a token."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def compact(value: object) -> bytes:
    """JSON without spaces. NaN, Infinity and lone surrogates are written as Python does."""
    return json.dumps(value, separators=(",", ":")).encode()


def new_key(alg: str) -> PrivateKey:
    """A fresh private key for the algorithm: ES256, ES384, ES512, RS…, PS… or EdDSA."""
    if alg == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    if alg.startswith("ES"):
        curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
        return ec.generate_private_key(curves[alg])
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def signature(key: PrivateKey | bytes, alg: str, data: bytes) -> bytes:
    """The signature of an algorithm over the bytes; a `bytes` key is a secret, for HS…."""
    kind = alg[-3:]
    if isinstance(key, bytes):
        return hmac.digest(key, data, f"sha{kind}")
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(data)
    if isinstance(key, rsa.RSAPrivateKey):
        digest = _HASHES[kind]
        if alg.startswith("PS"):
            return key.sign(data, padding.PSS(padding.MGF1(digest), digest.digest_size), digest)
        return key.sign(data, padding.PKCS1v15(), digest)
    _, size = _CURVES[key.curve.name]
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(_HASHES[kind])))
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def seal(header: Mapping[str, Any] | bytes, payload: object, key: PrivateKey | bytes) -> str:
    """A compact token. A payload or header of bytes is taken as it is; else it becomes JSON.

    It is signed as the header's `alg` says, or by ES256 where the header is no object with one.
    """
    alg = header.get("alg") if isinstance(header, Mapping) else "ES256"
    head = header if isinstance(header, bytes) else compact(header)
    body = payload if isinstance(payload, bytes) else compact(payload)
    data = f"{b64(head)}.{b64(body)}"
    return f"{data}.{b64(signature(key, alg or 'ES256', data.encode()))}"


def pem_of(key: PublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def public_jwk(key: PublicKey, **members: Any) -> dict[str, Any]:
    """The key as a JSON Web Key, with further members such as `kid`."""
    jwk: dict[str, Any]
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        e, n = (i.to_bytes((i.bit_length() + 7) // 8, "big") for i in (numbers.e, numbers.n))
        jwk = {"kty": "RSA", "e": b64(e), "n": b64(n)}
    elif isinstance(key, ed25519.Ed25519PublicKey):
        raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        jwk = {"kty": "OKP", "crv": "Ed25519", "x": b64(raw)}
    else:
        curve, size = _CURVES[key.curve.name]
        point = key.public_numbers()
        x, y = (i.to_bytes(size, "big") for i in (point.x, point.y))
        jwk = {"kty": "EC", "crv": curve, "x": b64(x), "y": b64(y)}
    return jwk | members


def thumbprint(key: PublicKey) -> str:
    """The key's name by its content (RFC 7638), with SHA-256."""
    sorted_jwk = json.dumps(public_jwk(key), separators=(",", ":"), sort_keys=True)
    return b64(hashlib.sha256(sorted_jwk.encode()).digest())


def parts(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, claims and signature of a good token, unverified."""
    head, body, sealed = token.split(".")
    return json.loads(unb64(head)), json.loads(unb64(body)), unb64(sealed)


def changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with the changes made; a None removes its member."""
    return {k: v for k, v in {**base, **changes}.items() if v is not None}


# The issuer.


class Issuer:
    """A token issuer like Privy. `with Issuer() as issuer:` serves its keys on loopback.

    `mode` says how the key set is served, from the next request on:

        ok          as it should be
        500         an error
        garbage     200, but not JSON
        empty       200, a key set without keys
        redirect    302 to `elsewhere_url`, where the key set is served
        hang        no answer until the mode changes, the issuer stops, or a minute is over
        drip        a right answer, a byte every 0.1 s
        huge        a right key set followed by 64 MiB of spaces, without a Content-Length

    `extra_keys` are served behind the issuer's own, as they are.
    """

    def __init__(
        self,
        alg: str = "ES256",
        *,
        issuer: str = "privy.io",
        audience: str = "farebox-test-app",
    ) -> None:
        self.alg = alg
        self.issuer = issuer
        self.audience = audience
        self.extra_keys: list[Mapping[str, Any]] = []
        self.fetches = 0  # Requests for the key set that arrived, in every mode.
        self.elsewhere_fetches = 0
        self.port = 0
        self._lock = threading.Lock()
        self._mode: Mode = "ok"
        self._moved_on = threading.Event()
        self._keys: dict[str, tuple[str, PrivateKey]] = {}
        self._published: list[str] = []
        self._server: _KeyServer | None = None
        self._thread: threading.Thread | None = None
        self.kid = self.rotate()

    # Its life.

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Serve; the port is chosen at the first start and kept ever after."""
        assert self._server is None, "it serves already"
        self._server = _KeyServer(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Serve no longer: connections are refused. Keys, mode and counts are kept."""
        if self._server is None or self._thread is None:
            return
        self._let_go()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        self._let_go()

    def _let_go(self) -> None:
        """Wake every request that waits, and let later ones wait anew."""
        with self._lock:
            waiting, self._moved_on = self._moved_on, threading.Event()
        waiting.set()

    @property
    def jwks_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/.well-known/jwks.json"

    @property
    def elsewhere_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/elsewhere/jwks.json"

    # Its keys.

    def rotate(self, alg: str | None = None) -> str:
        """Sign by a new key from now on and publish it beside the older ones; its kid."""
        alg = alg or self.alg
        key = new_key(alg)
        kid = secrets.token_urlsafe(32)
        with self._lock:
            self._keys[kid] = (alg, key)
            self._published.append(kid)
        self.kid = kid
        return kid

    def drop(self, kid: str) -> None:
        """Publish the key no longer. `token(kid=…)` can still sign by it."""
        with self._lock:
            self._published.remove(kid)

    @property
    def key(self) -> PrivateKey:
        """The current private key."""
        return self._keys[self.kid][1]

    @property
    def pem(self) -> str:
        """The current public key."""
        return pem_of(self.key.public_key())

    def jwks(self) -> dict[str, Any]:
        with self._lock:
            made: list[Mapping[str, Any]] = [
                public_jwk(self._keys[kid][1].public_key(), kid=kid, use="sig", alg=alg)
                for kid in self._published
                for alg in [self._keys[kid][0]]
            ]
        return {"keys": [*made, *self.extra_keys]}

    # Its tokens.

    def claims(self, sub: object = "did:privy:abc", **changes: Any) -> dict[str, Any]:
        """What a good token says, good for an hour; a None removes its claim."""
        now = int(time.time())
        good = {
            "sid": secrets.token_hex(12),
            "iss": self.issuer,
            "iat": now,
            "aud": self.audience,
            "sub": sub,
            "exp": now + 3600,
        }
        return changed(good, changes)

    def token(
        self,
        sub: object = "did:privy:abc",
        *,
        header: Mapping[str, Any] | None = None,
        kid: str | None = None,
        **claims: Any,
    ) -> str:
        """A signed token; `header` and `claims` change what is usual, and a None removes.

        `kid` chooses an older key to sign by.
        """
        return self._signed(self.claims(sub, **claims), header or {}, kid or self.kid)

    def sign(self, claims: dict[str, Any], header_changes: dict[str, Any]) -> str:
        """Sign exactly these claims by the current key, for `stale`."""
        return self._signed(claims, header_changes, self.kid)

    def _signed(self, claims: object, header: Mapping[str, Any], kid: str) -> str:
        alg, key = self._keys[kid]
        head = changed({"alg": alg, "typ": "JWT", "kid": kid}, header)
        # Signed as the key does even where the header is made to say otherwise.
        data = f"{b64(compact(head))}.{b64(compact(claims))}"
        return f"{data}.{b64(signature(key, alg, data.encode()))}"


class _KeyServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # An answer that hangs for a client that left must not hold a test up.

    def __init__(self, address: tuple[str, int], issuer: Issuer) -> None:
        self.issuer = issuer
        super().__init__(address, _KeyHandler)


class _KeyHandler(BaseHTTPRequestHandler):
    """HTTP/1.0, so that no connection outlives its request and a stopped issuer is gone."""

    server: _KeyServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test's output is for its own words."""

    def do_GET(self) -> None:
        issuer = self.server.issuer
        elsewhere = self.path == "/elsewhere/jwks.json"
        if not elsewhere and self.path != "/.well-known/jwks.json":
            self._answer(404, b"{}")
            return
        with issuer._lock:
            moved_on, mode = issuer._moved_on, issuer._mode
            if elsewhere:
                issuer.elsewhere_fetches += 1
                mode = "ok"
            else:
                issuer.fetches += 1
        keys = compact(issuer.jwks())
        try:
            if mode == "ok":
                self._answer(200, keys)
            elif mode == "500":
                self._answer(500, b'{"error":"out of order"}')
            elif mode == "garbage":
                self._answer(200, b"<html>\x00\xff {not JSON")
            elif mode == "empty":
                self._answer(200, b'{"keys":[]}')
            elif mode == "redirect":
                self._answer(302, b"", Location=issuer.elsewhere_url)
            elif mode == "hang":
                moved_on.wait(WAIT_LIMIT_SECONDS)
            elif mode == "drip":
                self._head(200, {"Content-Length": str(len(keys))})
                for byte in keys:
                    self.wfile.write(bytes([byte]))
                    if moved_on.wait(DRIP_SECONDS):
                        return
            else:
                self._head(200, {})
                self.wfile.write(keys)
                spaces = b" " * (1024 * 1024)
                for _ in range(HUGE_BYTES // len(spaces)):
                    self.wfile.write(spaces)
        except OSError:
            self.close_connection = True  # The client left, as some modes want it to.

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self._head(status, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)


# Tokens that nobody may accept.


@functools.cache
def _attacker(alg: str) -> PrivateKey:
    return new_key(alg)


def sendable(token: str) -> bool:
    """Whether an HTTP client can put the token into a header as it is."""
    return bool(token) and all("!" <= letter <= "~" for letter in token)


def twin(token: str) -> str:
    """Another spelling of a good ES256 token: its signature's mirror image, which is as valid.

    Anyone can make it. It is no forgery, but what was done to the token must hold for it too.
    """
    data, _, sealed = token.rpartition(".")
    r, s = unb64(sealed)[:32], int.from_bytes(unb64(sealed)[32:], "big")
    return f"{data}.{b64(r + (P256_ORDER - s).to_bytes(32, 'big'))}"


def forgeries(token: str, public_pem: str) -> dict[str, str]:
    """Forged tokens by name, made from a good one without its private key.

    `token` is an ES256 token whose header has a kid, and `public_pem` its public key. Each forgery
    must be refused, and none is the good token. Some are not `sendable` in a header.
    """
    header, claims, good = parts(token)
    assert header["alg"] == "ES256" and len(good) == 64, "a good ES256 token is needed"
    head, body, sealed = token.split(".")
    public = load_pem_public_key(public_pem.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    p256 = _attacker("ES256")
    edited = changed(claims, {"sub": "somebody-else"})

    def by_attacker(alg: str = "ES256", payload: object = claims, **changes: Any) -> str:
        return seal(changed(header, {"alg": alg, **changes}), payload, _attacker(alg))

    def relabelled(payload: object = claims, **changes: Any) -> str:
        """A header or payload that the old signature does not fit."""
        made = payload if isinstance(payload, bytes) else compact(payload)
        return f"{b64(compact({**header, **changes}))}.{b64(made)}.{sealed}"

    def raw_header(text: str | bytes) -> str:
        """The header's bytes as they are, signed by the attacker."""
        return seal(text.encode() if isinstance(text, str) else text, claims, p256)

    def resealed(made: bytes) -> str:
        return f"{head}.{body}.{b64(made)}"

    found: dict[str, str] = {}

    # Nothing signs it.
    for alg in ("none", "None", "NONE", "nOnE", ""):
        unsigned = f"{b64(compact({**header, 'alg': alg}))}.{b64(compact(edited))}."
        found[f"alg {alg!r} without signature"] = unsigned
        found[f"alg {alg!r} with the old signature"] = unsigned + sealed
    found["alg none without typ and kid"] = f"{b64(compact({'alg': 'none'}))}.{body}."
    found["alg none in two segments"] = f"{b64(compact({'alg': 'none'}))}.{body}"
    found["alg missing"] = f"{b64(compact(changed(header, {'alg': None})))}.{body}.{sealed}"
    for name, value in {
        "null": None,
        "a number": 256,
        "true": True,
        "a list": ["ES256"],
        "an object": {"ES256": "ES256"},
        "in lower case": "es256",
        "with a space": "ES256 ",
        "of 2000 letters": "ES256" * 400,
        "unheard of": "ES257",
    }.items():
        found[f"alg {name}"] = relabelled(alg=value)

    # The public key as a shared secret.
    jwk = public_jwk(public)
    numbers = public.public_numbers()
    point = b"".join(i.to_bytes(32, "big") for i in (numbers.x, numbers.y))
    kid = str(header.get("kid", ""))
    for name, secret in {
        "the PEM": public_pem.strip().encode() + b"\n",
        "the PEM without its last newline": public_pem.strip().encode(),
        "the PEM with Windows newlines": public_pem.replace("\n", "\r\n").encode(),
        "the PEM's base64 alone": "".join(public_pem.split("\n")[1:-2]).encode(),
        "the DER": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "the point": b"\x04" + point,
        "the point without its mark": point,
        "the JWK": compact(jwk),
        "the JWK with spaces": json.dumps(jwk).encode(),
        "the JWK with kid": compact({**jwk, "kid": kid, "use": "sig", "alg": "ES256"}),
        "the kid": kid.encode(),
        "nothing": b"",
    }.items():
        found[f"HS256 with {name} as secret"] = seal({**header, "alg": "HS256"}, edited, secret)
    pem = public_pem.encode()
    for alg in ("HS384", "HS512"):
        found[f"{alg} with the PEM as secret"] = seal({**header, "alg": alg}, edited, pem)

    # A key of the attacker's, offered in every way there is.
    for alg in ("ES256", "ES384", "ES512", "RS256", "RS512", "PS256", "EdDSA"):
        found[f"{alg} by an attacker under the same kid"] = by_attacker(alg, edited)
    p384 = signature(_attacker("ES384"), "ES384", f"{head}.{body}".encode())
    found["ES384's signature under alg ES256"] = resealed(p384)
    theirs = public_jwk(p256.public_key())
    their_kid = thumbprint(p256.public_key())
    their_pem = pem_of(p256.public_key())
    der = p256.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    found["jwk of the attacker"] = by_attacker(jwk=theirs)
    found["jwk of the attacker, with the kid"] = by_attacker(jwk={**theirs, "kid": kid})
    found["jwk and kid of the attacker"] = by_attacker(jwk=theirs, kid=their_kid)
    found["jwk that is a shared secret"] = seal(
        {**header, "alg": "HS256", "jwk": {"kty": "oct", "k": b64(b"s" * 32)}}, claims, b"s" * 32
    )
    found["jwk that is the real key"] = by_attacker(jwk={**jwk, "kid": kid})
    # Port 9 of loopback: whoever follows it gets nowhere, and no farther.
    found["jku of the attacker"] = by_attacker(jku="http://127.0.0.1:9/jwks.json")
    found["jku with a kid of the attacker"] = by_attacker(
        jku="http://127.0.0.1:9/jwks.json", kid=their_kid
    )
    found["jku of a file"] = by_attacker(jku="file:///etc/passwd")
    found["x5u of the attacker"] = by_attacker(x5u="http://127.0.0.1:9/key.pem")
    found["x5c of the attacker"] = by_attacker(x5c=[base64.b64encode(der).decode()])
    found["x5c that is text"] = by_attacker(x5c=their_pem)
    found["x5t of the attacker"] = by_attacker(x5t=b64(hashlib.sha256(der).digest()[:20]))
    found["the good token within, by an attacker"] = by_attacker(
        payload=token.encode(), cty="JWT", typ="JWT"
    )

    # Header members that change what a token means.
    found["crit that nobody knows"] = by_attacker(crit=["farebox"], farebox=1)
    found["crit added to the old signature"] = relabelled(crit=["exp"], exp=1)
    found["crit empty"] = by_attacker(crit=[])
    found["crit that is text"] = by_attacker(crit="b64", b64=True)
    found["b64 false"] = by_attacker(b64=False, crit=["b64"])
    found["b64 false without crit"] = by_attacker(b64=False)
    unencoded = compact({**header, "b64": False, "crit": ["b64"]})
    data = f"{b64(unencoded)}.".encode() + compact(claims).replace(b".", b"")
    found["b64 false, payload as it is"] = f"{data.decode()}.{b64(signature(p256, 'ES256', data))}"
    found["zip DEF"] = by_attacker(payload=zlib.compress(compact(claims))[2:-4], zip="DEF")
    # Spaces deflate to almost nothing.
    bomb = zlib.compress(b" " * 1_000_000 + compact(claims), 9)[2:-4]
    found["zip DEF that unpacks to a megabyte"] = by_attacker(payload=bomb, zip="DEF")
    found["header edited under the old signature"] = relabelled(typ="jwt", extra="x")

    # Kids that reach for something else.
    kids: dict[str, Any] = {
        "unknown": "no-such-key",
        "empty": "",
        "a path": "../../../../../../dev/null",
        "a path with a NUL": "../../etc/passwd\x00.pem",
        "a URL": "http://127.0.0.1:9/key",
        "SQL": "x' OR '1'='1' --",
        "SQL that selects a secret": "x' UNION SELECT 'secret' --",
        "a command": "$(id)|/bin/sh;`id`",
        "a template": "{{7*7}}%s%n{0.__class__}",
        "of 3000 letters": "k" * 3000,
        "two lines": "a\r\nX-Admin: 1",
        "a lone surrogate": "\ud800",
        "a NUL": "\x00",
        "a number": 1,
        "true": True,
        "null": None,
        "a list": [kid],
        "an object": {"kid": kid},
        "not a number": float("nan"),
    }
    for name, value in kids.items():
        made = {**header, "kid": value}
        found[f"kid {name}"] = seal(made, claims, p256)
        if name.startswith(("a path", "empty", "null")):
            # The classic: the file that kid leads to is empty, and so is the secret.
            found[f"kid {name}, HS256 with nothing"] = seal({**made, "alg": "HS256"}, claims, b"")
    found["kid missing"] = by_attacker(kid=None)
    found["kid missing, old signature"] = (
        f"{b64(compact(changed(header, {'kid': None})))}.{body}.{sealed}"
    )
    found["kid with a space"] = relabelled(kid=f"{kid} ")

    # Signatures.
    zero, one, order = (i.to_bytes(32, "big") for i in (0, 1, P256_ORDER))
    r, s = good[:32], good[32:]
    for name, pair in {
        "r = s = 0": zero + zero,
        "r = 0": zero + s,
        "s = 0": r + zero,
        "r = s = 1": one + one,
        "r = s = n": order + order,
        "r = n": order + s,
        "s = n": r + order,
        "r = n, s = 0": order + zero,
        "all bits set": b"\xff" * 64,
        "r and s swapped": s + r,
        "one bit flipped": good[:40] + bytes([good[40] ^ 1]) + good[41:],
    }.items():
        found[f"signature with {name}"] = resealed(pair)
    as_numbers = (int.from_bytes(r, "big"), int.from_bytes(s, "big"))
    found["signature in DER"] = resealed(encode_dss_signature(*as_numbers))
    found["signature in DER with r = s = 0"] = resealed(encode_dss_signature(0, 0))
    found["signature empty"] = f"{head}.{body}."
    found["signature missing"] = f"{head}.{body}"
    found["signature without its last byte"] = resealed(good[:-1])
    found["signature without its last half"] = resealed(good[:32])
    found["signature of one byte"] = resealed(good[:1])
    found["signature with a byte more"] = resealed(good + b"\x00")
    found["signature with a zero before"] = resealed(b"\x00" + good)
    found["signature with each half widened"] = resealed(b"\x00" + r + b"\x00" + s)
    found["signature twice"] = resealed(good + good)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    found["signature with its spare bits set"] = (
        token[:-1] + alphabet[alphabet.index(token[-1]) | 1]
    )

    # The old signature on other words.
    found["payload edited"] = relabelled(edited)
    later = {"exp": int(time.time()) + 7200}
    found["payload with a later exp"] = relabelled({**claims, **later})
    found["payload with spaces"] = relabelled(json.dumps(claims, indent=1).encode())
    twice = b'{"sub":"somebody-else",' + compact(claims)[1:]
    found["claims twice"] = relabelled(twice)
    found["claims twice, the good last"] = by_attacker(payload=twice)
    for name, payload in {
        "not JSON": b"not JSON at all",
        "empty": b"",
        "an array": b"[]",
        "an array of the claims": compact([claims]),
        "null": b"null",
        "text": b'"sub"',
        "a number": b"1",
        "not UTF-8": b'{"sub":"\xff\xfe"}',
        "nested 1500 deep": b"[" * 1500,
        "a number of 4500 digits": b'{"exp":' + b"9" * 4500 + b"}",
    }.items():
        found[f"payload {name}"] = by_attacker(payload=payload)

    # Headers that are not headers.
    ok = compact(header).decode()
    for name, text in {
        "an array": "[]",
        "an array of itself": f"[{ok}]",
        "text": '"ES256"',
        "a number": "1",
        "null": "null",
        "empty": "",
        "an empty object": "{}",
        "not JSON": "alg=ES256",
        "cut short": ok[:-1],
        "followed by more": f"{ok}{{}}",
        "nested 1500 deep": '{"alg":"ES256","kid":' + "[" * 1500,
        "nested 700 deep and closed": '{"alg":"ES256","kid":' + "[" * 700 + "]" * 700 + "}",
        "with a number of 4500 digits": '{"alg":"ES256","kid":' + "9" * 4500 + "}",
        "with alg twice": '{"alg":"none",' + ok[1:],
        "with alg twice, none last": ok[:-1] + ',"alg":"none"}',
        "with kid twice": '{"kid":"x",' + ok[1:],
        "with a comment": ok[:-1] + "/**/}",
    }.items():
        found[f"header {name}"] = raw_header(text)
    found["header not UTF-8"] = raw_header(b'{"alg":"ES256","kid":"\xff"}')
    found["header in UTF-16"] = raw_header(ok.encode("utf-16"))
    found["header after a byte order mark"] = raw_header(b"\xef\xbb\xbf" + ok.encode())

    # Not three segments of base64url.
    found["cut after the header"] = head
    found["cut after the header's point"] = f"{head}."
    found["cut within the header"] = head[: len(head) // 2]
    found["cut within the payload"] = f"{head}.{body[: len(body) // 2]}"
    found["cut within the signature"] = token[:-40]
    found["cut by one letter"] = token[:-1]
    found["without header"] = f".{body}.{sealed}"
    found["without payload"] = f"{head}..{sealed}"
    found["only points"] = ".."
    found["only a point"] = "."
    found["a fourth segment"] = f"{token}.{sealed}"
    found["an empty fourth segment"] = f"{token}."
    found["an empty first segment"] = f".{token}"
    found["five segments"] = f"{token}.{sealed}.{sealed}"
    for alg, enc in (("dir", "A256GCM"), ("ECDH-ES", "A128CBC-HS256"), ("RSA-OAEP", "A256GCM")):
        encrypted = b64(compact({**header, "alg": alg, "enc": enc}))
        found[f"encrypted by {alg}"] = f"{encrypted}..{b64(bytes(12))}.{body}.{b64(bytes(16))}"
    found["flattened JSON"] = compact(
        {"protected": head, "payload": body, "signature": sealed}
    ).decode()
    found["general JSON"] = compact(
        {"payload": body, "signatures": [{"protected": head, "signature": sealed}]}
    ).decode()
    found["the token twice"] = f"{token}{token}"
    found["the token twice with a comma"] = f"{token},{token}"
    found["a space within"] = f"{head}.{body[:8]} {body[8:]}.{sealed}"
    found["a newline within"] = f"{head}.{body[:8]}\n{body[8:]}.{sealed}"
    found["a NUL within"] = f"{head}.{body[:8]}\x00{body[8:]}.{sealed}"
    found["a newline after"] = f"{token}\n"
    found["spaces around the points"] = f"{head} . {body} . {sealed}"
    found["a star within"] = f"{head}.{body[:8]}*{body[8:]}.{sealed}"
    found["a percent sign within"] = f"{head}.{body}%2e{sealed}"
    found["letters beyond ASCII"] = f"{head}.{body[:-1]}é.{sealed}"
    found["quotes around"] = f'"{token}"'
    found["padding after the signature"] = f"{token}=="
    found["padding after the payload"] = f"{head}.{body}{'=' * (-len(body) % 4 or 4)}.{sealed}"
    found["padding after the header"] = f"{head}{'=' * (-len(head) % 4 or 4)}.{body}.{sealed}"
    found["a plus and a slash"] = f"{head}.{body}.+/{sealed[2:]}"
    found["7 KiB of letters"] = "A" * 7168
    found["7 KiB of points"] = "." * 7168
    found["7 KiB of segments"] = "AA.BB." * 1194
    found["7 KiB of signature"] = (f"{head}.{body}." + "A" * 7168)[:7168]
    return found


def stale(sign: Sign, claims: Mapping[str, Any]) -> dict[str, str]:
    """Tokens by name whose signature is right, and which must be refused for what they say.

    `sign(claims, header_changes)` signs exactly these claims by the real key; a None in the header
    changes removes a member. `claims` are good ones, with iss, aud, sub, iat and exp.
    """
    now = int(time.time())
    hour = 3600
    issuer, audience, sub = (str(claims[name]) for name in ("iss", "aud", "sub"))
    cases: dict[str, dict[str, Any]] = {}

    def case(name: str, **changes: Any) -> None:
        cases[name] = {**claims, **changes}

    def without(*names: str) -> dict[str, Any]:
        return {k: v for k, v in claims.items() if k not in names}

    nan, infinity = float("nan"), float("inf")
    for name in ("exp", "iat", "iss", "aud", "sub"):
        cases[f"{name} missing"] = without(name)
        case(f"{name} null", **{name: None})
    cases["nothing said"] = {}

    case("exp 120 s ago", iat=now - 720, exp=now - 120)
    case("exp at the beginning of time", exp=0)
    case("exp negative", exp=-now)
    case("exp in two days", exp=now + 2 * 24 * hour)
    case("exp before iat", iat=now + 20, exp=now + 10)
    case("iat in an hour", iat=now + hour, exp=now + hour + 600)
    case("nbf in an hour", nbf=now + hour, exp=now + 2 * hour)
    for name in ("exp", "iat", "nbf"):
        moment = now + 600 if name == "exp" else now
        case(f"{name} as text", **{name: str(moment)})
        case(f"{name} as a date", **{name: "2099-01-01T00:00:00Z"})
        case(f"{name} true", **{name: True})
        case(f"{name} in a list", **{name: [moment]})
        case(f"{name} in an object", **{name: {"value": moment}})
        case(f"{name} NaN", **{name: nan})
        case(f"{name} infinite", **{name: infinity})
    case("iat minus infinite", iat=-infinity)
    case("exp of 40 digits", exp=10**39)
    case("exp in milliseconds", exp=(now + 600) * 1000)
    case("exp of 4000 digits", exp=10**3999)  # too large for a float

    case("iss another", iss="https://issuer.example.com")
    case("iss with a slash", iss=f"{issuer}/")
    case("iss with a space", iss=f" {issuer}")
    case("iss in upper case", iss=issuer.swapcase())
    case("iss longer", iss=f"{issuer}.example.com")
    case("iss cut short", iss=issuer[:-1])
    case("iss empty", iss="")
    case("iss in a list", iss=[issuer])
    case("iss in an object", iss={issuer: issuer})
    case("iss a number", iss=1)

    case("aud another", aud="somebody-else")
    case("aud longer", aud=f"{audience}2")
    case("aud cut short", aud=audience[:-1])
    case("aud in upper case", aud=audience.swapcase())
    case("aud empty", aud="")
    case("aud an empty list", aud=[])
    case("aud a list of others", aud=["somebody-else", "another"])
    case("aud a list within a list", aud=[[audience]])
    case("aud an object", aud={audience: True})
    case("aud a number", aud=1)
    case("aud true", aud=True)
    case("aud all in one text", aud=f"{audience} somebody-else")

    case("sub empty", sub="")
    case("sub of spaces", sub="   ")
    case("sub a number", sub=1)
    case("sub true", sub=True)
    case("sub in a list", sub=[sub])
    case("sub in an object", sub={"id": sub})
    case("sub with a newline", sub=f"{sub}\nadmin")
    case("sub with a NUL", sub=f"{sub}\x00")
    case("sub with an escape", sub=f"\x1b[2J{sub}")
    case("sub with a delete", sub=f"{sub}\x7f")
    case("sub with a lone surrogate", sub=f"{sub}\ud800")
    case("sub of 301 letters", sub="s" * 301)
    case("sub of 3000 letters", sub="s" * 3000)

    found = {name: sign(said, {}) for name, said in cases.items()}

    good = dict(claims)
    for typ in (
        "logout+jwt",
        "JOSE",
        "JOSE+JSON",
        "secevent+jwt",
        "dpop+jwt",
        "JWE",
        "",
        1,
        ["JWT"],
    ):
        found[f"typ {typ!r}"] = sign(good, {"typ": typ})
    found["crit that nobody knows"] = sign(good, {"crit": ["farebox"], "farebox": 1})
    found["crit of a member that is absent"] = sign(good, {"crit": ["farebox"]})
    found["crit of exp"] = sign(good, {"crit": ["exp"], "exp": now + hour})
    found["crit empty"] = sign(good, {"crit": []})
    found["crit that is text"] = sign(good, {"crit": "alg"})
    return found
