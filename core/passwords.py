"""Passwords: which are acceptable, and whether one is right."""

import threading

import argon2

from core import errors
from core.keys import HASHER

SHORTEST, LONGEST = 12, 128
_AT_ONCE = 1  # in this process; each hash fills a core and 19 MiB
_PATIENCE_SECONDS = 2.0
# zxcvbn's scale: below this, fewer than 10^6 guesses find it.
_LEAST_SCORE = 2
_LOOKED_AT = 24  # characters; with 72 that were chosen for it, zxcvbn takes seconds
# Of a password nobody knows, with today's parameters: an unknown user costs the same time.
_NOBODYS = (
    "$argon2id$v=19$m=19456,t=2,p=1$rcgLRfqOHJNmvPj6B7J"
    "2yg$v8+PAgRqJex7XqFtJ3neMrEYdxU6RqVfSJNeMnqaZQk"
)
_slots = threading.BoundedSemaphore(_AT_ONCE)
# Of a process's threads: who guesses must leave the others to paid calls.
_places = threading.BoundedSemaphore(_AT_ONCE + 15)


def hashed(password: str, email: str) -> str:
    """The argon2id hash of an acceptable password; slow. Raises `validation_error`.

    Refused are the commonest passwords, what is guessed as fast, and what holds the e-mail.
    """
    if not SHORTEST <= len(password) <= LONGEST:
        raise errors.invalid_body(f"A password has {SHORTEST} to {LONGEST} characters.", "password")
    name, _, domain = email.partition("@")
    lower = password.lower()
    holds_it = email in lower or (len(name) > 3 and name in lower)
    with _Slot():
        if holds_it or _is_common(password, [email, name, domain]):
            raise errors.invalid_body("That password is too easy to guess.", "password")
        return HASHER.hash(password)


def is_right(password: str, stored: str | None) -> bool:
    """Whether a password satisfies a hash; for None it never does, and takes as long to say so.

    Raises `overloaded` when too many wait.
    """
    with _Slot():
        try:
            HASHER.verify(stored or _NOBODYS, password)
        except argon2.exceptions.VerifyMismatchError:
            return False
    return stored is not None


def _is_common(password: str, about: list[str]) -> bool:
    from zxcvbn import zxcvbn  # takes a while to load, and is needed seldom

    return bool(zxcvbn(password[:_LOOKED_AT], user_inputs=about)["score"] < _LEAST_SCORE)


class _Slot:
    """Room for one hash at a time, or `overloaded`."""

    def __enter__(self) -> None:
        if not _places.acquire(blocking=False):
            raise _overloaded()
        if not _slots.acquire(timeout=_PATIENCE_SECONDS):
            _places.release()
            raise _overloaded()

    def __exit__(self, *error: object) -> None:
        _slots.release()
        _places.release()


def _overloaded() -> errors.Refusal:
    return errors.Refusal(
        "overloaded",
        "Too many passwords are being checked at this moment.",
        headers={"Retry-After": "1"},
    )
