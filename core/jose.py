"""JSON Web Tokens, read strictly (RFC 7515, RFC 7519, RFC 8725).

joserfc checks signatures; what a token may look like is decided here, before it is asked: it would
take a token without `exp`, and one without `kid` when there is but one key.
"""

import json
import re
from base64 import urlsafe_b64decode
from collections import OrderedDict
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

from core import errors, tokens

LONGEST = 8000  # characters; a header has no room for more
LEEWAY_SECONDS = 60  # for the clocks of others
_FORM = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
# Headers that would have us take a key, or a meaning, from the token itself.
_REFUSED_HEADERS = frozenset({"crit", "jku", "jwk", "x5u", "x5c", "b64", "zip", "enc", "cty"})
_REMEMBERED = 10_000
_found_good: OrderedDict[bytes, Any] = OrderedDict()
_SHORTEST_RSA = 342  # characters of base64url, which 2,048 bits take (RFC 7518, 3.3)
_CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}


class Parsed(NamedTuple):
    """What a token says of itself; nothing of it is believed yet."""

    token: str
    header: dict[str, Any]
    claims: dict[str, Any]

    @property
    def kid(self) -> str | None:
        kid = self.header.get("kid")
        return kid if isinstance(kid, str) else None

    @property
    def signed_part(self) -> bytes:
        """What the signature covers. A signature has twins that verify as well; this has none."""
        return self.token.rpartition(".")[0].encode()


@lru_cache(maxsize=2000)
def parse(token: str) -> Parsed:
    """A compact token taken apart. Raises `invalid_token`."""
    if len(token) > LONGEST or not _FORM.fullmatch(token):
        raise errors.invalid_token()
    header, claims, _ = token.split(".")
    parsed = Parsed(token, _json_object(header), _json_object(claims))
    if _REFUSED_HEADERS & parsed.header.keys():
        raise errors.invalid_token()
    return parsed


def is_signed_by(parsed: Parsed, key: Any) -> bool:
    """Whether the signature is this key's, made with an algorithm of this key's kind.

    Remembered for this very key, so that a token that is used again costs no public-key arithmetic.
    """
    digest = tokens.digest(parsed.token.encode())
    if _found_good.get(digest) is key:
        return True
    if not _verify(parsed, key):
        return False
    _found_good[digest] = key
    if len(_found_good) > _REMEMBERED:
        _found_good.popitem(last=False)
    return True


def _verify(parsed: Parsed, key: Any) -> bool:
    jws, joserfc_errors = _joserfc().jws, _joserfc().errors
    algorithm = parsed.header.get("alg")
    if algorithm not in algorithms(key):
        return False
    try:
        found = jws.extract_compact(parsed.token.encode())
        rules = jws.JWSRegistry(algorithms=[algorithm], strict_check_header=False)
        return bool(jws.validate_compact(found, key, registry=rules))
    except (joserfc_errors.JoseError, ValueError):
        return False


def algorithms(key: Any) -> tuple[str, ...]:
    """The algorithms a public key may be used with: one family, never a shared secret's."""
    kind = key.key_type
    if kind == "EC":
        found: tuple[str, ...] = (_CURVES.get(key.get("crv"), ""),)
    elif kind == "RSA":
        found = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
    elif kind == "OKP" and key.get("crv") == "Ed25519":
        found = ("EdDSA", "Ed25519")
    else:
        return ()
    named = key.get("alg")
    return found if named is None else tuple(name for name in found if name == named)


def key_from_pem(pem: str) -> Any:
    """The public key of a PEM file. Raises ValueError."""
    jwk, joserfc_errors = _joserfc().jwk, _joserfc().errors
    for kind in (jwk.ECKey, jwk.RSAKey, jwk.OKPKey):
        try:
            return kind.import_key(pem)
        except joserfc_errors.InvalidKeyTypeError:
            continue
    raise ValueError("not an EC, RSA or Ed25519 key")


def keys_from_set(document: str) -> dict[str, Any]:
    """The signing keys of a JWK Set (RFC 7517, 5) by `kid`. What we cannot use is left out.

    Raises ValueError when it is no such set.
    """
    jwk, joserfc_errors = _joserfc().jwk, _joserfc().errors
    try:
        listed = json.loads(document)["keys"]
        entries = [entry for entry in listed if isinstance(entry, dict)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a JWK Set") from error
    found = {}
    for entry in entries:
        kid = entry.get("kid")
        if not isinstance(kid, str) or entry.get("use", "sig") != "sig" or not _is_usable(entry):
            continue
        try:
            key = jwk.import_key(entry)
        except (joserfc_errors.JoseError, ValueError, TypeError, KeyError):
            continue  # of a kind we do not know, which is no reason to refuse the others
        if algorithms(key):
            found[kid] = key
    return found


def check_times(claims: dict[str, Any], now: int, longest_seconds: int, leeway: int) -> int:
    """When a token ends, in milliseconds, `leeway` seconds after it says. Raises `invalid_token`
    unless it has begun, give or take a minute (a clock may step), has not ended, and was made for
    no longer than `longest_seconds`."""
    issued, ends = _time(claims.get("iat")), _time(claims.get("exp"))
    begins = _time(claims.get("nbf", 0))
    seconds = now / 1000
    if not (
        0 <= ends - issued <= longest_seconds
        and max(issued, begins) <= seconds + LEEWAY_SECONDS
        and seconds < ends + leeway
    ):
        raise errors.invalid_token()
    return int((ends + leeway) * 1000)


def sign(header: dict[str, Any], claims: dict[str, Any], key: Any) -> str:
    """A compact token signed with one of our own keys."""
    payload = json.dumps(claims, separators=(",", ":"))
    token: str = _joserfc().jws.serialize_compact(header, payload, key, algorithms=["ES256"])
    return token


def new_signing_key() -> dict[str, Any]:
    """A fresh P-256 key pair as a private JWK whose `kid` is its thumbprint (RFC 7638)."""
    key = _joserfc().jwk.ECKey.generate_key("P-256")
    pair: dict[str, Any] = key.as_dict(private=True)
    return pair | {"kid": key.thumbprint(), "alg": "ES256", "use": "sig"}


def import_pair(pair: dict[str, Any]) -> Any:
    """A key to sign and verify with, from what `new_signing_key` made."""
    return _joserfc().jwk.ECKey.import_key(pair)


@cache
def _joserfc() -> ModuleType:
    """Loaded when first needed: no command but those about tokens has a use for it."""
    import joserfc
    import joserfc.errors
    import joserfc.jwk
    import joserfc.jws

    # The older name of Ed25519 (RFC 9864), no weaker for it and what issuers say: no warning.
    joserfc.jws.JWSRegistry.algorithms["EdDSA"].security_warning = None
    return joserfc


def _is_usable(entry: dict[str, Any]) -> bool:
    """Whether a key of a set is public and long enough. A shared secret is not even looked at."""
    kind, modulus = entry.get("kty"), entry.get("n")
    if kind == "RSA":
        return isinstance(modulus, str) and len(modulus) >= _SHORTEST_RSA
    return kind in ("EC", "OKP")


def _json_object(segment: str) -> dict[str, Any]:
    """The object in a segment, each name once (RFC 7515, 4). Raises `invalid_token`."""
    try:
        text = urlsafe_b64decode(segment + "=" * (-len(segment) % 4)).decode("utf-8")
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise errors.invalid_token() from error
    if not isinstance(value, dict):
        raise errors.invalid_token()
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _time(value: Any) -> float:
    """A NumericDate (RFC 7519, 2) of this era. Raises `invalid_token`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 10**11:
        return value
    raise errors.invalid_token()
