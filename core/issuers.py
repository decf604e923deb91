"""Outside issuers: whose tokens are taken beside ours, their keys, and who they are to us.

A request never waits for an issuer. Keys are fetched in the background and kept in the database, so
that all workers share one fetch and known keys go on working while the issuer is down.
"""

import logging
import threading
from typing import Any, NamedTuple

from config import IssuerSection, Settings
from core import audit, clock, errors, jose, session_tokens, sessions, tokens, users
from core.audit import Actor
from core.errors import Refusal
from core.jose import Parsed
from core.upstream import Outbound, Wires
from models import Database, Tx

log = logging.getLogger("farebox.issuers")

LONGEST_LIFE_SECONDS = 24 * 3600
FETCH_AT_MOST_EVERY_MS = clock.MINUTE_MS
REFRESH_EVERY_MS = 5 * clock.MINUTE_MS
_FETCH_SECONDS = 5.0
_LARGEST_SET = 256 * 1024
# How long a request with an unknown key id waits for a fetch it has set off: an issuer that has
# just changed keys may answer in time, and one that is down holds nobody up.
_PATIENCE_SECONDS = 0.025
_TYPES = (None, "jwt", "at+jwt")  # RFC 9068 for the last; never `logout+jwt`


class Outsider(NamedTuple):
    """A person an issuer vouches for, by a token whose signature and claims are in order."""

    issuer: IssuerSection
    subject: str
    jti: str | None
    email: str | None  # only when the issuer has verified it
    token_id: str
    expires_at: int


class Issuers:
    """The outside issuers of the configuration, in one process."""

    def __init__(self, settings: Settings, db: Database, wires: Wires) -> None:
        self._sections = {section.issuer: section for section in settings.issuers}
        self._pems = {name: jose.key_from_pem(pem) for name, pem in settings.issuer_pems.items()}
        self._sets = {
            section.issuer: KeySet(section.jwks_url, db, wires)
            for section in settings.issuers
            if section.jwks_url is not None
        }

    def check(self, parsed: Parsed, now: int) -> Outsider:
        """Whom a token stands for. Raises `invalid_token`, or `overloaded` while an issuer's keys
        have never been had."""
        name = parsed.claims.get("iss")
        section = self._sections.get(name) if isinstance(name, str) else None
        kind = parsed.header.get("typ")
        if section is None or (kind.lower() if isinstance(kind, str) else kind) not in _TYPES:
            raise errors.invalid_token()
        claims = parsed.claims
        subject, audience, jti = claims.get("sub"), claims.get("aud"), claims.get("jti")
        if not _is_name(subject) or not (jti is None or _is_name(jti)):
            raise errors.invalid_token()
        if section.audience not in (audience if isinstance(audience, list) else [audience]):
            raise errors.invalid_token()
        ends = jose.check_times(claims, now, LONGEST_LIFE_SECONDS, jose.LEEWAY_SECONDS)
        key = self._key(section.issuer, parsed, now)
        if key is None or not jose.is_signed_by(parsed, key):
            raise errors.invalid_token()
        email = claims.get("email") if claims.get("email_verified") is True else None
        return Outsider(
            section, str(subject), jti, checked_email(email),
            token_id(section.issuer, str(subject), jti, parsed.signed_part), ends,
        )  # fmt: skip

    def refresh(self) -> None:
        """See to it that every issuer's keys are fetched when due. Returns at once."""
        for keys in self._sets.values():
            keys.refresh(REFRESH_EVERY_MS)

    def names(self) -> list[str]:
        return list(self._sections)

    def _key(self, issuer: str, parsed: Parsed, now: int) -> Any:
        """The key a token says it was signed with; with a PEM file the one there is."""
        pem = self._pems.get(issuer)
        if pem is not None:
            return pem
        return None if parsed.kid is None else self._sets[issuer].find(parsed.kid)


class KeySet:
    """An issuer's published keys (RFC 7517), shared by all workers through the database."""

    def __init__(self, url: str, db: Database, wires: Wires) -> None:
        self._url = url
        self._db = db
        self._wires = wires
        self._keys: dict[str, Any] = {}
        self._fetched_at: int | None = None
        self._fetching: threading.Thread | None = None
        self._mutex = threading.Lock()

    def find(self, kid: str) -> Any:
        """The key of that id, or None. Raises `overloaded` when no keys were ever had."""
        if kid in self._keys:
            return self._keys[kid]
        self._load()
        if kid not in self._keys:
            self.refresh(FETCH_AT_MOST_EVERY_MS, _PATIENCE_SECONDS)
        if self._fetched_at is None:
            raise Refusal(
                "overloaded", "The keys of this token's issuer are not known yet.",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        return self._keys.get(kid)

    def refresh(self, every_ms: int, patience_seconds: float = 0) -> None:
        """Take over what another worker fetched; fetch in the background if that is `every_ms` old
        and nobody has just tried. Waits for a fetch no longer than `patience_seconds`."""
        now = clock.now_ms()
        last = self._load()
        if self._fetched_at is None:
            every_ms = FETCH_AT_MOST_EVERY_MS  # there is nothing to go on with meanwhile
        if last is not None and abs(now - last) < every_ms:
            return
        with self._mutex:
            if self._fetching is None or not self._fetching.is_alive():
                if not self._claim(now):
                    return
                self._fetching = threading.Thread(target=self._fetch, daemon=True)
                self._fetching.start()
            fetching = self._fetching
        if patience_seconds:
            fetching.join(patience_seconds)
            self._load()

    def _load(self) -> int | None:
        """Read the shared keys if they are newer than ours; when somebody last tried to fetch."""
        row = self._db.row(
            "SELECT fetched_at, attempted_at FROM issuer_keys WHERE url = :url", {"url": self._url}
        )
        if row is None:
            return None
        if row[0] is not None and row[0] != self._fetched_at:
            document = self._db.row(
                "SELECT document, fetched_at FROM issuer_keys WHERE url = :url", {"url": self._url}
            )
            assert document is not None  # the row is never deleted
            self._keys = jose.keys_from_set(document[0])
            self._fetched_at = document[1]
        return int(row[1])

    def _claim(self, now: int) -> bool:
        """Whether this process may fetch now. One does, of all workers, whose `now` may be a moment
        before another's; a clock that has stepped back is no reason to wait for a day."""

        def work(tx: Tx) -> int:
            return tx.run(
                "INSERT INTO issuer_keys (url, attempted_at) VALUES (:url, :now)"
                " ON CONFLICT (url) DO UPDATE SET attempted_at = :now"
                " WHERE issuer_keys.attempted_at <= :before OR issuer_keys.attempted_at > :after",
                {
                    "url": self._url,
                    "now": now,
                    "before": now - FETCH_AT_MOST_EVERY_MS,
                    "after": now + FETCH_AT_MOST_EVERY_MS,
                },
            )

        return bool(self._db.write(work))

    def _fetch(self) -> None:
        """Fetch and keep the keys. What goes wrong is logged, and the known keys stay."""
        request = Outbound(
            "GET", self._url, [("Accept", "application/json")], b"", _FETCH_SECONDS, _FETCH_SECONDS
        )
        try:
            reply = self._wires.send(request)
            try:
                body, whole = reply.read(_LARGEST_SET)
            finally:
                reply.close()
            if reply.status != 200 or not whole:
                raise ValueError(f"status {reply.status}, {len(body)} bytes")
            document = body.decode("utf-8")
            if not jose.keys_from_set(document):
                raise ValueError("it holds no key that can be used")
        except (Refusal, ValueError) as error:
            log.warning("no keys from %s, the known ones stay: %s", self._url, error)
            return
        except Exception:
            log.exception("no keys from %s, the known ones stay", self._url)
            return
        fetched_at = clock.now_ms()

        def work(tx: Tx) -> None:
            tx.run(
                "UPDATE issuer_keys SET document = :document, fetched_at = :now WHERE url = :url",
                {"url": self._url, "document": document, "now": fetched_at},
            )

        try:
            self._db.write(work)
        except Refusal:
            log.warning("the keys of %s could not be kept; they are fetched again", self._url)


def token_id(issuer: str, subject: str, jti: str | None, signed_part: bytes) -> str:
    """What an outside token is known by here: its `jti` or, without one, what was signed. The
    subject counts too: an issuer that gives one `jti` twice makes nobody somebody else."""
    if jti is not None:
        return _beginning(issuer, jti) + tokens.digest(subject.encode())[:16].hex()
    return "out_" + tokens.digest(issuer.encode(), b"signed", signed_part).hex()


def _beginning(issuer: str, jti: str) -> str:
    """How the ids of an issuer's tokens of that `jti` begin, whoever's they are."""
    return "out_" + tokens.digest(issuer.encode(), b"jti", jti.encode()).hex() + "_"


def take_in(tx: Tx, outsider: Outsider, is_open: bool, credits: int, now: int, client: str) -> None:
    """Take an outsider's token in, and the person if they are new.

    Raises `invalid_token` when it is denied or the person is no more, and `signup_closed`.
    """
    if tx.row(
        "SELECT 1 FROM denied_token WHERE (claim = 'sub' AND value = :sub)"
        " OR (claim = 'jti' AND value = :jti)",
        {"sub": outsider.subject, "jti": outsider.jti},
    ):
        raise errors.invalid_token()
    issuer = outsider.issuer.issuer
    user = users.known_as(tx, issuer, outsider.subject)
    if user is None:
        if not (is_open or outsider.issuer.signup):
            raise Refusal("signup_closed", "This instance does not take in new people by itself.")
        # Not the subject: an issuer could call somebody what the audit calls the operator.
        by = Actor(f"issuer:{issuer}", client)
        user = users.first_seen(tx, issuer, outsider.subject, outsider.email, credits, now, by)
    session_tokens.admit(tx, outsider.token_id, user.id, user.account_id, outsider.expires_at)


def deny(
    tx: Tx, issuers: list[str], now: int, by: Actor, sub: str | None = None, jti: str | None = None
) -> None:
    """Refuse, from now on, the outside tokens of a subject or that one token; and what they were
    traded for. One of our own is ended by its `jti` too."""
    claim, value = ("sub", sub) if sub is not None else ("jti", jti)
    tx.run(
        "INSERT INTO denied_token (claim, value, created_at) VALUES (:claim, :value, :now)"
        " ON CONFLICT (claim, value) DO NOTHING",
        {"claim": claim, "value": value, "now": now},
    )
    if jti is not None:
        session_tokens.end(tx, now, token_id=jti)
        for issuer in issuers:
            for ended in session_tokens.outside_beginning(tx, _beginning(issuer, jti)):
                session_tokens.end_outside(tx, ended, now)
    else:
        for user_id in users.known_by_subject(tx, str(sub)):
            sessions.end_alike(tx, user_id, "token", now, by)
            for ended in session_tokens.outside_of(tx, user_id):
                session_tokens.end_outside(tx, ended, now)
    audit.note(tx, by, "token.denied", now, None, value, claim=claim)


def allow(tx: Tx, now: int, by: Actor, sub: str | None = None, jti: str | None = None) -> None:
    """Take a denial back. Raises `not_found`."""
    claim, value = ("sub", sub) if sub is not None else ("jti", jti)
    lifted = tx.run(
        "DELETE FROM denied_token WHERE claim = :claim AND value = :value",
        {"claim": claim, "value": value},
    )
    if not lifted:
        raise Refusal("not_found", f"No {claim} {value} is denied.")
    audit.note(tx, by, "token.allowed", now, None, value, claim=claim)


def checked_email(text: object) -> str | None:
    """An address an issuer names, if it is one we would take."""
    try:
        return users.checked_email(text) if isinstance(text, str) else None
    except Refusal:
        return None


def _is_name(value: object) -> bool:
    """Whether it can name a person or a token: OpenID Connect Core 1.0, 2, allows a subject of 255
    ASCII characters. One that cannot be seen names nobody."""
    if not isinstance(value, str) or not 1 <= len(value) <= 255:
        return False
    return value.isprintable() and bool(value.strip())
