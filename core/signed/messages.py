"""The message a wallet signs to sign in or to be linked: Sign-In with Ethereum (EIP-4361) and its
sibling for Solana (SIWS).

Nothing is kept of a message that was handed out: its nonce proves that we wrote all of it. Kept is
what was used, so that a message is good once.
"""

import hashlib
import hmac
import re
from typing import NamedTuple, NoReturn

from config import Settings, base58
from config.eip55 import checksummed
from core import clock, errors, tokens, wallets
from core.signed import signatures
from core.signed.nonces import Nonce
from core.wallets import Wallet

LIFE_MS = 5 * clock.MINUTE_MS
LONGEST = 4096  # characters of a message; ours are far shorter
_NOT_OURS = "This message is none of ours: sign the one that you were given, as it is."
_CHAINS = {"eip155": "Ethereum", "solana": "Solana"}
_RANDOM, _PROOF = 16, 32  # hexadecimal digits of the two parts of a nonce
_WRITTEN = re.compile(
    r".*\nNonce: (?P<random>[0-9a-f]{16})[0-9a-f]{32}\nIssued At: (?P<issued>[0-9TZ:-]{20})\n.*",
    re.DOTALL,
)
_SIGNER = re.compile(
    r"[^\n]* wants you to sign in with your (Ethereum|Solana) account:\n([^\n]*)\n"
)


class Challenge(NamedTuple):
    """A message to sign, as it is."""

    message: str
    nonce: str
    expires_at: int


def challenge(settings: Settings, wallet: Wallet, now: int) -> Challenge:
    """A message that the wallet may sign within five minutes."""
    issued_at = now // 1000 * 1000
    random = tokens.random_text(_RANDOM, "0123456789abcdef")
    message, nonce = _written(settings, wallet, random, issued_at)
    return Challenge(message, nonce, issued_at + LIFE_MS)


def read(settings: Settings, message: str, signature: str, now: int) -> tuple[Wallet, Nonce]:
    """The wallet that has signed one of our messages, and the nonce it uses up.

    Raises `invalid_signature` unless the message is ours to the letter, not older than five minutes
    and signed by the wallet it names.
    """
    signer, written = _SIGNER.match(message), _WRITTEN.fullmatch(message)
    if len(message) > LONGEST or signer is None or written is None:
        _refuse(_NOT_OURS)
    namespace = next(key for key, chain in _CHAINS.items() if chain == signer[1])
    wallet = wallets.parse(f"{namespace}:{signer[2]}")
    issued_at = _time(written["issued"])
    if wallet is None or issued_at is None:
        _refuse(_NOT_OURS)
    if not issued_at - LIFE_MS <= now < issued_at + LIFE_MS:
        _refuse("This message is too old; ask for another.")
    ours, nonce = _written(settings, wallet, written["random"], issued_at)
    if not hmac.compare_digest(ours.encode(), message.encode()):
        _refuse(_NOT_OURS)
    raw = _signature(wallet, signature)
    if raw is None or not signatures.has_signed(wallet, message.encode(), raw):
        _refuse(f"The message is not signed by {wallet.name}.")
    return named(wallet), Nonce.of("message", wallet.id, nonce, issued_at + LIFE_MS)


def named(wallet: Wallet) -> Wallet:
    """The wallet with its name as people write it (EIP-55)."""
    if wallet.namespace != "eip155":
        return wallet
    return Wallet.of("eip155", checksummed(wallet.address))


def _written(settings: Settings, wallet: Wallet, random: str, issued_at: int) -> tuple[str, str]:
    """The message with that much chance in it, and its nonce."""
    address, issued = named(wallet).address, clock.rfc3339(issued_at)
    key = hashlib.blake2b(settings.secret_key.encode(), person=b"wallet sign-in").digest()
    proof = tokens.keyed_digest(key, f"{wallet.id} {random} {issued}").hex()[:_PROOF]
    nonce = random + proof
    message = (
        f"{settings.origin.partition('://')[2]} wants you to sign in with your"
        f" {_CHAINS[wallet.namespace]} account:\n{address}\n\n"
        "Sign in to Farebox, or link this wallet to your account there. This costs nothing.\n\n"
        f"URI: {settings.public_url}\nVersion: 1\nChain ID: {_chain(settings, wallet)}\n"
        f"Nonce: {nonce}\nIssued At: {issued}\n"
        f"Expiration Time: {clock.rfc3339(issued_at + LIFE_MS)}"
    )
    return message, nonce


def _chain(settings: Settings, wallet: Wallet) -> str:
    """The chain the message names: the first Ethereum network that is paid on here, or the main
    one. A signature is the same on all of them."""
    if wallet.namespace == "solana":
        return "mainnet"
    paid_on = () if settings.payments is None else settings.payments.networks
    ours = (network.partition(":")[2] for network in paid_on if network.startswith("eip155:"))
    return next(ours, "1")


def _time(text: str) -> int | None:
    try:
        return clock.parse_rfc3339(text)
    except ValueError:
        return None


def _signature(wallet: Wallet, text: str) -> bytes | None:
    """A signature's bytes: hexadecimal for Ethereum, base58 or base64 for Solana."""
    if wallet.namespace == "eip155":
        found = re.fullmatch(r"0x([0-9a-fA-F]{130})", text)
        return None if found is None else bytes.fromhex(found[1])
    if text.endswith("=="):  # as 64 bytes in base64 always do
        return signatures.from_base64(text)
    return base58.decode(text, 64)


def _refuse(why: str) -> NoReturn:
    raise errors.invalid_signature(why)
