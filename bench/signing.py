"""Calls that a wallet has signed (RFC 9421), each with a nonce of its own.

They are signed before they are sent, because the client shares two cores with what it measures.
"""

import base64
import hashlib
import json
import secrets
import time
import urllib.request
from collections.abc import Callable

from coincurve import PrivateKey
from Crypto.Hash import keccak
from load import post
from nacl.signing import SigningKey

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
Sign = Callable[[bytes], bytes]


class Wallet:
    """A wallet of a namespace; its calls are all the same but for nonce and time."""

    def __init__(self, namespace: str, port: int, path: str, body: bytes) -> None:
        address, self._sign = _solana() if namespace == "solana" else _ethereum()
        self._is_evm = namespace == "eip155"
        self._id = f"{namespace}:{address}"
        self._port, self._path, self._body = port, path, body
        self._ready: list[bytes] = []
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        self._digest = f"sha-256=:{digest}:"

    def prepare(self, count: int) -> None:
        """Sign so many now, in place of any that were left and grow old."""
        self._ready = [self._call() for _ in range(count)]

    def __call__(self) -> bytes:
        """The next call. One that was not prepared is signed now."""
        return self._ready.pop() if self._ready else self._call()

    def link(self, token: str) -> None:
        """Become a wallet of the token's account."""
        asked = self._ask("/api/v1/wallets/challenge", {"wallet": self._id}, None)
        text = str(asked["message"])
        signature = self._sign(text.encode())
        spelled = f"0x{signature.hex()}" if self._is_evm else base64.b64encode(signature).decode()
        self._ask("/api/v1/wallets", {"message": text, "signature": spelled}, token)

    def _ask(self, path: str, value: dict[str, str], token: str | None) -> dict[str, object]:
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        url = f"http://127.0.0.1:{self._port}{path}"
        call = urllib.request.Request(url, json.dumps(value).encode(), headers)
        with urllib.request.urlopen(call, timeout=30) as answer:
            found: dict[str, object] = json.loads(answer.read())
            return found

    def _call(self) -> bytes:
        told = (
            '("@method" "@target-uri" "content-digest")'
            f';created={int(time.time())};keyid="{self._id}"'
            f';nonce="{secrets.token_hex(12)}";tag="farebox"'
        )
        base = (
            '"@method": POST\n'
            f'"@target-uri": http://127.0.0.1:{self._port}{self._path}\n'
            f'"content-digest": {self._digest}\n'
            f'"@signature-params": {told}'
        )
        signature = base64.b64encode(self._sign(base.encode())).decode()
        headers = {
            "Content-Digest": self._digest,
            "Signature-Input": f"sig={told}",
            "Signature": f"sig=:{signature}:",
        }
        return post(self._port, self._path, self._body, headers)


def _solana() -> tuple[str, Sign]:
    key = SigningKey.generate()
    number, address = int.from_bytes(key.verify_key.encode(), "big"), ""
    while number:
        number, digit = divmod(number, 58)
        address = _ALPHABET[digit] + address
    return address, lambda message: key.sign(message).signature


def _ethereum() -> tuple[str, Sign]:
    key = PrivateKey()

    def sign(message: bytes) -> bytes:
        prefix = b"\x19Ethereum Signed Message:\n%d" % len(message)
        made = key.sign_recoverable(_keccak(prefix + message), hasher=None)
        return made[:64] + bytes([27 + made[64]])

    return f"0x{_keccak(key.public_key.format(compressed=False)[1:])[-20:].hex()}", sign


def _keccak(data: bytes) -> bytes:
    return keccak.new(digest_bits=256, data=data).digest()
