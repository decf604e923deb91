"""Signed requests: HTTP Message Signatures (RFC 9421), with the wallet's key in place of a secret.

Taken is what RFC 8941 calls the canonical form of `Signature-Input`, `Signature` and
`Content-Digest` (RFC 9530), which is what libraries write. A request has one signature.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import NamedTuple

from core import clock, errors, wallets
from core.adapters import Inbound
from core.errors import Refusal
from core.signed import signatures
from core.signed.nonces import Nonce
from core.wallets import Wallet

SKEW_SECONDS = 300
_LONGEST = 8192  # characters of a header
_LONGEST_NONCE = 255
_ALGORITHMS = {"solana": "ed25519", "eip155": "eip191"}
_DIGESTS = {"sha-256": hashlib.sha256, "sha-512": hashlib.sha512}

_KEY = r"[a-z*][a-z0-9_.*-]*"
_PARAMETER = rf';({_KEY})=(?:(0|-?[1-9][0-9]{{0,14}})|"([ !#-\[\]-~]*)")'
_INPUT = re.compile(
    rf'({_KEY})=(\(("@?[a-z][a-z0-9-]*"(?: "@?[a-z][a-z0-9-]*")*)\)((?:{_PARAMETER})+))'
)
_PARAMETERS = re.compile(_PARAMETER)
_MEMBER = re.compile(rf"({_KEY})=:([A-Za-z0-9+/]+={{0,2}}):")  # of the two others


class Signed(NamedTuple):
    """A request that its wallet has signed."""

    wallet: Wallet
    nonce: Nonce


def is_signed(headers: Mapping[str, str]) -> bool:
    """Whether a request says that it is signed, by headers in lower-case names."""
    return "signature-input" in headers or "signature" in headers


def read(inbound: Inbound, here: str, now: int) -> Signed:
    """Whose request it is, and the nonce it uses up. What was signed is the whole request: method,
    body if there is one, and address, which begins with `here`. Raises `invalid_signature`."""
    given = inbound.headers.get("signature-input", "")
    if len(given) > _LONGEST:
        raise _bad("Signature-Input is too long")
    found = _INPUT.fullmatch(given)
    if found is None:
        raise _bad("Signature-Input is not of one signature, in canonical form")
    components = found[3].replace('"', "").split(" ")
    written = _PARAMETERS.findall(found[4])
    parameters: dict[str, int | str] = {
        name: int(number) if number else text for name, number, text in written
    }
    if len(parameters) != len(written) or len(set(components)) != len(components):
        raise _bad("Signature-Input says something twice")
    wallet, nonce = _checked(parameters, now)
    needed = {"@method", "@target-uri"} | ({"content-digest"} if inbound.body else set())
    missing = sorted(needed - set(components))
    if missing:
        raise _bad(f"it does not cover {', '.join(missing)}")
    lines = [f'"{name}": {_value(inbound, here, name)}' for name in components]
    base = "\n".join([*lines, f'"@signature-params": {found[2]}'])
    signature = _signature(inbound.headers.get("signature", ""), found[1])
    if not signatures.has_signed(wallet, base.encode("latin-1"), signature):
        raise _bad(f"it is not of {wallet.name} and this request; our addresses begin with {here}")
    if "content-digest" in components:  # last, because only a body takes long
        _check_body(inbound)
    return Signed(wallet, nonce)


def _checked(parameters: dict[str, int | str], now: int) -> tuple[Wallet, Nonce]:
    """Who signs, and the nonce, from the signature's parameters (RFC 9421, 2.3)."""
    if parameters.get("tag") != "farebox":
        raise _bad('its tag is not "farebox"')
    key_id = parameters.get("keyid")
    wallet = wallets.parse(key_id) if isinstance(key_id, str) else None
    if wallet is None:
        raise _bad('its keyid is not "solana:<address>" or "eip155:<address>"')
    if parameters.get("alg", expected := _ALGORITHMS[wallet.namespace]) != expected:
        raise _bad(f'its alg is not "{expected}"')
    created, expires = parameters.get("created"), parameters.get("expires")
    if not isinstance(created, int) or abs(now // 1000 - created) > SKEW_SECONDS:
        told = clock.rfc3339(now)
        raise _bad(f"it was not created within {SKEW_SECONDS} seconds of now, which is {told} here")
    if expires is not None and not (isinstance(expires, int) and now // 1000 < expires):
        raise _bad("it has expired")
    nonce = parameters.get("nonce")
    if not isinstance(nonce, str) or not 1 <= len(nonce) <= _LONGEST_NONCE:
        raise _bad(f"it needs a nonce of 1 to {_LONGEST_NONCE} characters")
    until = (created + SKEW_SECONDS + 1) * 1000
    return wallet, Nonce.of("request", wallet.id, nonce, until)


def _check_body(inbound: Inbound) -> None:
    """The body is the one whose digest was signed."""
    digests: dict[str, bytes] = {}
    for written in re.split(r", ?", inbound.headers.get("content-digest", "")):
        found = _MEMBER.fullmatch(written)
        if found is None or found[1] in digests:
            raise _bad("Content-Digest is malformed")
        digests[found[1]] = _bytes(found[2])
    known = digests.keys() & _DIGESTS.keys()
    if not known:
        raise _bad(f"Content-Digest has none of {', '.join(_DIGESTS)}")
    for name in known:
        if not hmac.compare_digest(digests[name], _DIGESTS[name](inbound.body).digest()):
            raise _bad("Content-Digest is not the body's")


def _value(inbound: Inbound, here: str, component: str) -> str:
    """What a component of the request is (RFC 9421, 2.1 and 2.2). Its address is the one by which
    we are known, whatever a proxy before us has made of it."""
    if component == "@method":
        return inbound.method
    if component == "@target-uri":
        return here + inbound.target
    if component == "@authority":
        return here.partition("://")[2]
    if component == "@path":
        return inbound.path
    if component == "@query":
        return f"?{inbound.query}"
    value = None if component.startswith("@") else inbound.headers.get(component)
    if value is None:
        raise _bad(f"it covers {component}, which is not there or not known here")
    return value.strip(" \t")


def _signature(header: str, label: str) -> bytes:
    found = _MEMBER.fullmatch(header) if len(header) <= _LONGEST else None
    if found is None or found[1] != label:
        raise _bad("Signature is not the one that Signature-Input tells of")
    return _bytes(found[2])


def _bytes(text: str) -> bytes:
    found = signatures.from_base64(text)
    if found is None:
        raise _bad("it holds something that is not base64")
    return found


def _bad(why: str) -> Refusal:
    return errors.invalid_signature(f"The request’s signature is not taken: {why}.")
