"""Whether a wallet has signed something: Ed25519 for Solana, secp256k1 for Ethereum.

The libraries are loaded when the first wallet signs: an instance without wallets pays nothing.
"""

import base64

from config import base58
from core.wallets import Wallet

# Above it the same signature has a twin (EIP-2).
_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


def has_signed(wallet: Wallet, message: bytes, signature: bytes) -> bool:
    """Whether the signature is the wallet's own over these bytes: Ed25519 (RFC 8032) for Solana,
    `personal_sign` (EIP-191, version 0x45) for Ethereum."""
    if wallet.namespace == "eip155":
        prefix = b"\x19Ethereum Signed Message:\n%d" % len(message)
        return signer(keccak(prefix + message), signature) == wallet.id.partition(":")[2]
    return _is_of_key(base58.decode(wallet.address, 32) or b"", message, signature)


def signer(digest: bytes, signature: bytes) -> str | None:
    """The Ethereum address whose key has signed a digest, in lower case; None if there is none."""
    from coincurve import PublicKey

    if len(signature) != 65 or signature[64] not in (27, 28):
        return None
    if int.from_bytes(signature[32:64], "big") > _HALF_ORDER:
        return None
    try:
        key = PublicKey.from_signature_and_message(
            signature[:64] + bytes([signature[64] - 27]), digest, hasher=None
        )
    except ValueError:
        return None
    return "0x" + keccak(key.format(compressed=False)[1:])[-20:].hex()


def from_base64(text: str) -> bytes | None:
    """The bytes that a text spells; each has one spelling."""
    try:
        found = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return found if base64.b64encode(found).decode() == text else None


def keccak(data: bytes) -> bytes:
    """Keccak-256, which is not SHA3-256."""
    from Crypto.Hash import keccak as implementation

    found: bytes = implementation.new(digest_bits=256, data=data).digest()
    return found


def _is_of_key(key: bytes, message: bytes, signature: bytes) -> bool:
    """libsodium refuses keys and points of small order, under which a signature proves nothing, and
    the second spelling of a signature."""
    from nacl.exceptions import BadSignatureError
    from nacl.signing import VerifyKey

    if len(signature) != 64:
        return False
    try:
        VerifyKey(key).verify(message, signature)
    except BadSignatureError:
        return False
    return True
