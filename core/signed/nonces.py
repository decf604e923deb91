"""What may be used once, by whichever worker: the nonces of signed requests and messages."""

from typing import NamedTuple

from core import clock, tokens
from models import Tx

# They are kept for a while after nobody would take them any more, because a clock may step back.
_GRACE_MS = 60 * clock.MINUTE_MS
PRUNED_AT_ONCE = 10_000


class Nonce(NamedTuple):
    """Something that may be used once, and until when it would be taken at all."""

    digest: bytes
    expires_at: int

    @classmethod
    def of(cls, purpose: str, owner: str, text: str, expires_at: int) -> "Nonce":
        """The nonce an owner chose for that purpose: others may choose the same."""
        parts = (part.encode() for part in (purpose, owner, text))
        return cls(tokens.digest(*parts)[:16], expires_at)


def is_used(tx: Tx, nonce: Nonce) -> bool:
    """Whether somebody was before."""
    query = "SELECT 1 FROM used_nonce WHERE digest = :digest"
    return tx.row(query, {"digest": nonce.digest}) is not None


def use(tx: Tx, nonce: Nonce) -> bool:
    """Use it up; False if somebody was before."""
    used = tx.run(
        "INSERT INTO used_nonce (digest, expires_at) VALUES (:digest, :expires_at)"
        " ON CONFLICT (digest) DO NOTHING",
        {"digest": nonce.digest, "expires_at": nonce.expires_at},
    )
    return bool(used)


def prune(tx: Tx, now: int) -> int:
    """Forget some that nobody would take any more; how many."""
    return tx.run(
        "DELETE FROM used_nonce WHERE digest IN"
        " (SELECT digest FROM used_nonce WHERE expires_at < :before LIMIT :most)",
        {"before": now - _GRACE_MS, "most": PRUNED_AT_ONCE},
    )
