"""Keys of wallets that sign messages and requests, honestly or not.

Everything is signed by libraries that Farebox does not use for it: `solders` and `eth-account`. The
base of a signed request is written here by hand; any part of it can be changed before it is signed
(`signed(…, method="GET")`), and what comes out can be changed after.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from rpc_server import need

need("eth_account", "solders")

from solders.keypair import Keypair  # noqa: E402


class SolanaKey:
    """A wallet on Solana."""

    namespace, algorithm = "solana", "ed25519"

    def __init__(self, seed: bytes | None = None) -> None:
        self.keypair = Keypair.from_seed(seed or os.urandom(32))
        self.address = str(self.keypair.pubkey())
        self.wallet = f"solana:{self.address}"

    def sign(self, message: bytes) -> bytes:
        return bytes(self.keypair.sign_message(message))

    def sign_text(self, message: str) -> str:
        """As a wallet gives it back: base58."""
        return str(self.keypair.sign_message(message.encode()))


class EvmKey:
    """A wallet on Ethereum's networks."""

    namespace, algorithm = "eip155", "eip191"

    def __init__(self, key: str | bytes | None = None) -> None:
        from eth_account import Account  # a second of importing

        self.account = Account.from_key(key or os.urandom(32))
        self.address: str = self.account.address
        self.wallet = f"eip155:{self.address}"

    def sign(self, message: bytes) -> bytes:
        from eth_account.messages import encode_defunct

        return bytes(self.account.sign_message(encode_defunct(message)).signature)

    def sign_text(self, message: str) -> str:
        """As a wallet gives it back: hexadecimal."""
        return f"0x{self.sign(message.encode()).hex()}"


Key = SolanaKey | EvmKey


def digest_of(body: bytes, algorithm: str = "sha-256") -> str:
    """Content-Digest (RFC 9530)."""
    found = hashlib.new(algorithm.replace("-", ""), body).digest()
    return f"{algorithm}=:{base64.b64encode(found).decode()}:"


def signed(
    key: Key,
    method: str,
    url: str,
    body: bytes = b"",
    *,
    label: str = "sig",
    components: list[str] | None = None,
    headers: dict[str, str] | None = None,
    **parameters: Any,
) -> dict[str, str]:
    """The headers of a signed request (RFC 9421). `headers` are sent too and may be covered;
    parameters are changed by name, or left out with None."""
    sent = dict(headers or {})
    if body:
        sent.setdefault("Content-Digest", digest_of(body))
    parts = urlsplit(url)
    values = {
        "@method": method,
        "@target-uri": url,
        "@authority": parts.netloc,
        "@path": parts.path,
        "@query": f"?{parts.query}",
    } | {name.lower(): value for name, value in sent.items()}
    if components is None:
        components = ["@method", "@target-uri", *(["content-digest"] if body else [])]
    told = {
        "created": int(time.time()),
        "keyid": key.wallet,
        "nonce": secrets.token_hex(12),
        "tag": "farebox",
    } | parameters
    written = "".join(
        f";{name}={value}" if isinstance(value, int) else f';{name}="{value}"'
        for name, value in told.items()
        if value is not None
    )
    covered = " ".join(f'"{name}"' for name in components)
    lines = [f'"{name}": {values[name]}' for name in components]
    base = "\n".join([*lines, f'"@signature-params": ({covered}){written}'])
    signature = base64.b64encode(key.sign(base.encode())).decode()
    return sent | {
        "Signature-Input": f"{label}=({covered}){written}",
        "Signature": f"{label}=:{signature}:",
    }
