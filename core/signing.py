"""The keys our session tokens are signed with: a 0600 file of the instance folder.

The newest signs. An older one is published, and its tokens accepted, until the last of them has
ended. Every process reads the file again when it has changed, so a rotation needs no restart.
"""

import json
import threading
from pathlib import Path
from typing import Any, NamedTuple

from core import clock, files, jose

FILE_NAME = "signing_keys.json"
LIFE_SECONDS = 3600  # of a session token
# How long a key that no longer signs is kept: its last token's life, and a little for slow hands.
_RETIRED_MS = (LIFE_SECONDS + 60) * 1000


class SigningKey(NamedTuple):
    """A key pair, and until when its tokens count; None for the one that signs."""

    kid: str
    pair: Any
    until: int | None


class SigningKeys:
    """The keys in the file, as this process last read them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._mutex = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, SigningKey] = {}

    def current(self) -> SigningKey:
        """The key that signs; made now if there is none yet."""
        return next(key for key in self._read().values() if key.until is None)

    def find(self, kid: str | None, now: int) -> SigningKey | None:
        """The key of that id, if tokens it signed can still be good."""
        key = self._read().get(kid or "")
        return None if key is None or (key.until is not None and key.until <= now) else key

    def public(self, now: int) -> list[dict[str, Any]]:
        """The public half of every key whose tokens can still be good, for a JWK Set."""
        return [
            key.pair.as_dict(private=False) | {"kid": key.kid, "alg": "ES256", "use": "sig"}
            for key in self._read().values()
            if key.until is None or key.until > now
        ]

    def rotate(self, now: int) -> str:
        """Sign with a new key from now on; its id. Keys whose tokens have all ended are dropped."""
        with files.locked(self._lock_path):
            kept = []
            for entry in self._stored():
                until = entry["until"]
                if until is None or until > now:
                    kept.append(entry | {"until": now + _RETIRED_MS if until is None else until})
            made = _new_entry()
            files.replace(self._path, _text([made, *kept]))
        return str(made["kid"])

    @property
    def _lock_path(self) -> Path:
        return self._path.with_suffix(".lock")

    def _stored(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        found: list[dict[str, Any]] = json.loads(self._path.read_text("utf-8"))["keys"]
        return found

    def _read(self) -> dict[str, SigningKey]:
        """The keys by id, read again when the file is another."""
        seen = self._stamp()
        if seen is None or seen != self._seen:
            with self._mutex:
                if seen is None:
                    with files.locked(self._lock_path):  # a rotation would lose what it cannot see
                        files.write_once(self._path, _text([_new_entry()]))
                    seen = self._stamp()
                if seen != self._seen:
                    self._keys = {
                        entry["kid"]: SigningKey(
                            entry["kid"], jose.import_pair(_without_ours(entry)), entry["until"]
                        )
                        for entry in self._stored()
                    }
                    self._seen = seen
        return self._keys

    def _stamp(self) -> tuple[int, int, int] | None:
        """What changes whenever the file does; None while there is none."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def _new_entry() -> dict[str, Any]:
    return jose.new_signing_key() | {"made_at": clock.rfc3339(clock.now_ms()), "until": None}


def _without_ours(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("made_at", "until")}


def _text(entries: list[dict[str, Any]]) -> str:
    return json.dumps({"keys": entries}, indent=1) + "\n"
