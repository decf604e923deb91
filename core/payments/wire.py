"""What crosses in x402: three headers of base64 of JSON, and a facilitator's answers.

The shapes are strict: `"true"` is not `true`. They know no more fields than are used here, and what
is passed on is written anew, so nobody downstream reads a field that was not checked.
"""

import base64
import binascii
import json
from typing import Any, TypeVar

import msgspec

from core import errors, strict_json

VERSION = 2
SCHEME = "exact"
LONGEST_HEADER = 12 * 1024  # a Solana transaction has at most 1,232 bytes
# How long a signature is good for: settling takes seconds, and until then an outcome can be open.
VALID_SECONDS = 120

T = TypeVar("T")


class Shape(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """JSON with names in camel case; fields that are not known are not looked at."""


class Requirement(Shape, frozen=True):
    """One way to pay, as far as a payer must repeat it."""

    scheme: str
    network: str
    asset: str
    amount: str
    pay_to: str


class Resource(Shape, frozen=True):
    """What is paid for."""

    url: str


class Payload(Shape, frozen=True):
    """PAYMENT-SIGNATURE: the requirement a client chose and what it signed for it."""

    x402_version: int = msgspec.field(name="x402Version")
    accepted: Requirement
    payload: msgspec.Raw
    resource: Resource | None = None


class Settlement(Shape, frozen=True):
    """A facilitator's answer to `/settle`."""

    success: bool
    transaction: str | None = None
    network: str | None = None
    error_reason: str | None = None
    payer: str | None = None


class Kind(Shape, frozen=True):
    """What a facilitator can settle."""

    x402_version: int = msgspec.field(name="x402Version")
    scheme: str
    network: str
    extra: dict[str, Any] | None = None


class Supported(Shape, frozen=True):
    """A facilitator's answer to `/supported`."""

    kinds: list[Kind]
    signers: dict[str, list[str]] = {}


def encode(value: dict[str, Any]) -> str:
    """A header's value."""
    return base64.b64encode(json.dumps(value, separators=(",", ":")).encode()).decode()


def decode_payload(header: str) -> Payload:
    """What a PAYMENT-SIGNATURE says. Raises `validation_error` for what is no such header."""
    if len(header) > LONGEST_HEADER:
        raise _malformed(f"is longer than {LONGEST_HEADER} characters")
    try:
        text = base64.b64decode(header.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise _malformed("is not base64") from None
    try:
        return strict_json.decode(text, Payload)
    except strict_json.NotJson:
        raise _malformed("is not base64 of JSON") from None
    except strict_json.WrongShape as error:
        raise _malformed(f"is not a payment: {error}") from None


def part(raw: msgspec.Raw, shape: type[T]) -> T:
    """The signed part of a payment. Raises `validation_error`."""
    try:
        return strict_json.decode(bytes(raw), shape)
    except strict_json.NotJson:
        raise _malformed("is not base64 of JSON") from None
    except strict_json.WrongShape as error:
        raise _malformed(f"has no such payload: {error}") from None


def _malformed(problem: str) -> errors.Refusal:
    return errors.invalid_body(f"PAYMENT-SIGNATURE {problem}.", "payment-signature")
