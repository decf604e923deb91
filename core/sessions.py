"""Sign-ins: kept here and not in a cookie, so that each can be seen, and ended at once."""

from typing import NamedTuple

from core import audit, clock, errors, tokens
from core.audit import Actor
from models import Tx

IDLE_MS = 30 * clock.MINUTE_MS  # without a page, a cookie opens nothing any more
LIFE_MS = 12 * 60 * clock.MINUTE_MS  # a sign-in and its tokens end, whatever happens
MOST = 50  # of one person with a cookie, and as many without; the oldest ends for another
_SEEN_EVERY_MS = clock.MINUTE_MS
_KEPT_MS = 30 * clock.DAY_MS  # after its end, for whoever asks what happened
_LONGEST_AGENT = 200
PRUNED_AT_ONCE = 1000
_COLUMNS = (
    "s.id, s.user_id, s.method, s.address, s.user_agent, s.created_at, s.last_seen_at, s.expires_at"
)


class Session(NamedTuple):
    """A sign-in that has not ended."""

    id: str
    user_id: str
    method: str
    address: str | None
    user_agent: str | None
    created_at: int
    last_seen_at: int
    expires_at: int


class Origin(NamedTuple):
    """How and from where somebody signs in."""

    method: str
    address: str | None = None
    user_agent: str | None = None
    token_id: str | None = None  # the outside token it is traded for
    expires_at: int | None = None  # when that token ends, and so the session


class Seat(NamedTuple):
    """A person at a browser, acting in an account they are a member of."""

    user_id: str
    account_id: str
    role: str
    is_operator: int
    credit_limit: int | None
    credit_period: str | None
    user_status: str
    user_reason: str | None
    account_status: str
    account_reason: str | None

    @property
    def is_owner(self) -> bool:
        return self.role == "owner"


def start(
    tx: Tx, user_id: str, origin: Origin, now: int, secret: str | None = None,
    by: Actor | None = None,
) -> Session:  # fmt: skip
    """A new session; `secret` is what its cookie will hold, None for one without a cookie. `by` is
    who starts it when that is not the person."""
    expires_at = now + LIFE_MS
    if origin.expires_at is not None:
        expires_at = min(expires_at, origin.expires_at)
    agent = None if origin.user_agent is None else origin.user_agent[:_LONGEST_AGENT]
    session = Session(
        tokens.new_id("sess"), user_id, origin.method, origin.address, agent, now, now, expires_at
    )
    tx.run(
        "INSERT INTO session (id, user_id, cookie_hash, method, origin, address, user_agent,"
        " created_at, last_seen_at, expires_at) VALUES (:id, :user_id, :hash, :method, :origin,"
        " :address, :user_agent, :created_at, :last_seen_at, :expires_at)",
        session._asdict()
        | {
            "hash": None if secret is None else tokens.digest(secret.encode()),
            "origin": origin.token_id,
        },
    )
    # Browsers make room for browsers and scripts for scripts: neither signs the other out.
    alike = (
        f"user_id = :user AND ended_at IS NULL AND cookie_hash IS {'NOT ' if secret else ''}NULL"
    )
    tx.run(
        f"UPDATE session SET ended_at = :now, cookie_hash = NULL WHERE {alike} AND id <> :id AND id"
        f" NOT IN (SELECT id FROM session WHERE {alike} ORDER BY created_at DESC, id LIMIT :most)",
        {"now": now, "user": user_id, "most": MOST, "id": session.id},
    )
    audit.note(
        tx, by or Actor(user_id, origin.address), "session.started", now, _account(tx, user_id),
        session.id, method=origin.method,
    )  # fmt: skip
    return session


def get(tx: Tx, session_id: str, now: int) -> Session:
    """A session that has not ended. Raises `invalid_token`."""
    row = tx.row(
        f"SELECT {_COLUMNS} FROM session s"
        " WHERE s.id = :id AND s.ended_at IS NULL AND s.expires_at > :now",
        {"id": session_id, "now": now},
    )
    if row is None:
        raise errors.invalid_token()
    return Session(*row)


def by_cookie(tx: Tx, secret: str, now: int) -> Session | None:
    """The session a cookie opens, of a person who is let in; None when there is none any more."""
    row = tx.row(
        f"SELECT {_COLUMNS} FROM session s JOIN user u ON u.id = s.user_id"
        " WHERE s.cookie_hash = :hash AND s.ended_at IS NULL AND s.expires_at > :now"
        " AND s.last_seen_at > :idle_since AND u.status = 'active'",
        {"hash": tokens.digest(secret.encode()), "now": now, "idle_since": now - IDLE_MS},
    )
    return None if row is None else Session(*row)


def seat(tx: Tx, session_id: str, account_id: str, now: int) -> Seat | None:
    """Who is signed in, as a member of that account; None when either is no more."""
    row = tx.row(
        "SELECT s.user_id, m.account_id, m.role, u.is_operator, m.credit_limit, m.credit_period,"
        " u.status, u.status_reason, a.status, a.status_reason FROM session s"
        " JOIN user u ON u.id = s.user_id"
        " JOIN membership m ON m.user_id = s.user_id AND m.account_id = :account"
        " JOIN account a ON a.id = m.account_id"
        " WHERE s.id = :id AND s.ended_at IS NULL AND s.expires_at > :now AND u.status <> 'closed'",
        {"id": session_id, "account": account_id, "now": now},
    )
    return None if row is None else Seat(*row)


def is_due(session: Session, now: int) -> bool:
    """Whether its use should be written down again; always after the clock has stepped back."""
    return not 0 <= now - session.last_seen_at < _SEEN_EVERY_MS


def touch(tx: Tx, session_id: str, now: int) -> None:
    """Note that its cookie was used."""
    tx.run(
        "UPDATE session SET last_seen_at = :now WHERE id = :id AND ended_at IS NULL",
        {"id": session_id, "now": now},
    )


def of_user(tx: Tx, user_id: str, now: int) -> list[Session]:
    """A person's sessions that have not ended, the newest first."""
    rows = tx.rows(
        f"SELECT {_COLUMNS} FROM session s WHERE s.user_id = :user AND s.ended_at IS NULL"
        " AND s.expires_at > :now ORDER BY s.created_at DESC, s.id",
        {"user": user_id, "now": now},
    )
    return [Session(*row) for row in rows]


def end(tx: Tx, session_id: str, user_id: str, now: int, by: Actor) -> bool:
    """Sign out: the cookie and every token of the session are refused from now on.

    False when the person has no such session any more.
    """
    ended = tx.run(
        "UPDATE session SET ended_at = :now, cookie_hash = NULL"
        " WHERE id = :id AND user_id = :user AND ended_at IS NULL",
        {"id": session_id, "user": user_id, "now": now},
    )
    if ended:
        audit.note(tx, by, "session.ended", now, _account(tx, user_id), session_id)
    return bool(ended)


def end_all(tx: Tx, user_id: str, now: int, by: Actor) -> int:
    """End every session of a person; how many there were."""
    return end_alike(tx, user_id, "", now, by)


def end_every(tx: Tx, now: int) -> None:
    """End every session there is."""
    tx.run(
        "UPDATE session SET ended_at = :now, cookie_hash = NULL WHERE ended_at IS NULL",
        {"now": now},
    )


def traded_for(tx: Tx, token_id: str, now: int) -> Session | None:
    """The session an outside token was traded for before, if it has not ended."""
    row = tx.row(
        f"SELECT {_COLUMNS} FROM session s"
        " WHERE s.origin = :token AND s.ended_at IS NULL AND s.expires_at > :now LIMIT 1",
        {"token": token_id, "now": now},
    )
    return None if row is None else Session(*row)


def end_alike(
    tx: Tx, user_id: str, method: str, now: int, by: Actor, keep: str | None = None
) -> int:
    """End a person's sessions that began that way (`oidc:` for whichever provider), but for one;
    how many there were."""
    ended = tx.run(
        "UPDATE session SET ended_at = :now, cookie_hash = NULL WHERE user_id = :user"
        " AND ended_at IS NULL AND substr(method, 1, :length) = :method AND id <> :keep",
        {
            "now": now, "user": user_id, "method": method, "length": len(method),
            "keep": keep or "",
        },
    )  # fmt: skip
    if ended:
        audit.note(tx, by, "session.all_ended", now, _account(tx, user_id), user_id, count=ended)
    return ended


def end_traded(tx: Tx, now: int, token_id: str) -> None:
    """End the sessions that an outside token was traded for."""
    tx.run(
        "UPDATE session SET ended_at = :now WHERE origin = :token AND ended_at IS NULL",
        {"token": token_id, "now": now},
    )


def latch_expired(tx: Tx, now: int) -> None:
    """Write down what has ended, so that a clock that steps back revives nothing."""
    tx.run(
        "UPDATE session SET ended_at = :now, cookie_hash = NULL"
        " WHERE ended_at IS NULL AND expires_at <= :now",
        {"now": now},
    )
    tx.run(
        "UPDATE session SET cookie_hash = NULL"
        " WHERE cookie_hash IS NOT NULL AND last_seen_at <= :idle_since",
        {"idle_since": now - IDLE_MS},
    )


def prune(tx: Tx, now: int) -> None:
    """Forget some of what ended long ago, once its tokens are forgotten."""
    tx.run(
        "DELETE FROM session WHERE id IN (SELECT id FROM session WHERE ended_at < :before"
        " AND NOT EXISTS (SELECT 1 FROM session_token t WHERE t.session_id = session.id)"
        " LIMIT :most)",
        {"before": now - _KEPT_MS, "most": PRUNED_AT_ONCE},
    )


def _account(tx: Tx, user_id: str) -> str | None:
    """The account a person owns: its owners may read of their sign-ins."""
    row = tx.row("SELECT account_id FROM user WHERE id = :id", {"id": user_id})
    return None if row is None else row[0]
