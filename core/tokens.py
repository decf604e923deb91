"""The only randomness and the form of every public id and secret."""

import hashlib
import re
import secrets
import zlib

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # base32 without what people take for another

# An API key is `<prefix>_live_` and 32 characters: a public lookup id, the secret, a checksum.
LOOKUP_LENGTH = 8
SECRET_LENGTH = 18  # 62^18 is a little over 2^107
CHECKSUM_LENGTH = 6  # 62^6 is a little under 2^36, room for a CRC-32
PREFIX_PATTERN = r"[a-z][a-z0-9]{0,15}"
KEY_PATTERN = PREFIX_PATTERN + r"_live_[A-Za-z0-9]{32}"

_KEY = re.compile(rf"{PREFIX_PATTERN}_live_([A-Za-z0-9]{{{LOOKUP_LENGTH}}})[A-Za-z0-9]{{24}}")


def random_text(length: int, alphabet: str = ALPHABET) -> str:
    """`length` random letters and digits."""
    return "".join(secrets.choice(alphabet) for _ in range(length))


def new_id(kind: str) -> str:
    """A fresh public id such as `acct_…`: 96 random bits, which says nothing about its order."""
    return f"{kind}_{secrets.token_hex(12)}"


def new_key(prefix: str) -> tuple[str, str]:
    """A fresh API key and its public lookup id."""
    lookup = random_text(LOOKUP_LENGTH)
    body = f"{prefix}_live_{lookup}{random_text(SECRET_LENGTH)}"
    return body + _checksum(body), lookup


def key_lookup(token: str) -> str | None:
    """The lookup id of a well-formed API key; None when the form or the checksum is wrong.

    The checksum finds typing errors without a database read or a hash; it is no secret.
    """
    found = _KEY.fullmatch(token)
    if found is None or _checksum(token[:-CHECKSUM_LENGTH]) != token[-CHECKSUM_LENGTH:]:
        return None
    return found.group(1)


def new_secret() -> str:
    """A URL-safe secret of 256 bits, for one-time links and the instance's own key."""
    return secrets.token_urlsafe(32)


def digest(*parts: bytes) -> bytes:
    """A 256-bit digest of the parts. Their lengths are hashed too, so none can borrow a byte."""
    hasher = hashlib.blake2b(digest_size=32)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "big"))
        hasher.update(part)
    return hasher.digest()


def keyed_digest(key: bytes, text: str) -> bytes:
    """A 256-bit digest of `text` that nobody can make without `key`."""
    return hashlib.blake2b(text.encode(), key=key, digest_size=32).digest()


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = ""
    for _ in range(CHECKSUM_LENGTH):
        number, index = divmod(number, len(ALPHABET))
        digits = ALPHABET[index] + digits
    return digits
