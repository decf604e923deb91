"""Session tokens: signed, an hour long, each with a row here, so that it can be ended at once.

Ours are rows from their minting on, an outside issuer's from their first use on. A request reads
the row and what it hangs on (session, person, membership, account), so no worker is ever told.
"""

import re
from typing import NamedTuple

from core import audit, clock, errors, jose, sessions, signing, tokens
from core.audit import Actor
from core.jose import Parsed
from core.ledger import Guard
from core.sessions import Session
from core.signing import SigningKeys
from models import Database, Tx

# Ours alone, so that no token made for something else is taken for one (RFC 8725, 3.11).
TYPE = "farebox-session+jwt"
LIFE_MS = signing.LIFE_SECONDS * 1000
_ID = re.compile(r"[a-z]+_[0-9a-f]{24}")  # as `tokens.new_id` makes them
_KEPT_MS = 2 * clock.DAY_MS  # after its end: a clock that steps back a day revives nothing
_ALIVE = (
    " JOIN user u ON u.id = t.user_id"
    " JOIN membership m ON m.account_id = t.account_id AND m.user_id = t.user_id"
    " LEFT JOIN session s ON s.id = t.session_id"
    " WHERE t.id = :token_id AND t.ended_at IS NULL AND t.expires_at > :token_now"
    " AND (t.session_id IS NULL OR (s.ended_at IS NULL AND s.expires_at > :token_now))"
    " AND u.status <> 'closed'"
)


class Bearer(NamedTuple):
    """Whoever holds a token that has not ended: a person, in an account they are a member of."""

    token_id: str
    session_id: str | None  # None for an outside issuer's token
    user_id: str
    account_id: str
    expires_at: int
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


class Issued(NamedTuple):
    """A new token, its id, and when it ends."""

    token: str
    id: str
    expires_at: int


def find(tx: Tx, token_id: str, now: int) -> Bearer | None:
    """Who holds a token, unless it has ended, or its session, or the membership."""
    row = tx.row(
        "SELECT t.id, t.session_id, t.user_id, t.account_id, t.expires_at, m.role, u.is_operator,"
        " m.credit_limit, m.credit_period, u.status, u.status_reason, a.status, a.status_reason"
        f" FROM session_token t JOIN account a ON a.id = t.account_id{_ALIVE}",
        {"token_id": token_id, "token_now": now},
    )
    return None if row is None else Bearer(*row)


def still_valid(token_id: str, now: int) -> Guard:
    """What must still hold in the transaction that acts on a token."""
    return Guard(
        f"EXISTS (SELECT 1 FROM session_token t{_ALIVE} AND u.status = 'active')",
        {"token_id": token_id, "token_now": now},
    )


# Ours


def mint(
    db: Database, keys: SigningKeys, issuer: str, session: Session, account_id: str, now: int
) -> Issued:
    """A token of a session, to spend an account the person is a member of.

    Raises `not_found` for any other account, `invalid_token` when the session has ended.
    """
    expires_at = min(now + LIFE_MS, session.expires_at) // 1000 * 1000
    token_id = tokens.new_id("tok")
    claims = {
        "iss": issuer,
        "aud": issuer,
        "sub": session.user_id,
        "sid": session.id,
        "jti": token_id,
        "acct": account_id,
        "iat": now // 1000,
        "exp": expires_at // 1000,
    }
    key = keys.current()
    token = jose.sign({"alg": "ES256", "kid": key.kid, "typ": TYPE}, claims, key.pair)

    def work(tx: Tx) -> None:
        row = {"id": token_id, "expires_at": expires_at, "account": account_id}
        alive = {"session": session.id, "now": now}
        made = tx.run(
            "INSERT INTO session_token (id, session_id, user_id, account_id, expires_at)"
            " SELECT :id, s.id, s.user_id, m.account_id, :expires_at FROM session s"
            " JOIN membership m ON m.user_id = s.user_id AND m.account_id = :account"
            " WHERE s.id = :session AND s.ended_at IS NULL AND s.expires_at > :now",
            row | alive,
        )
        if made:
            return
        if tx.row(
            "SELECT 1 FROM session WHERE id = :session AND ended_at IS NULL AND expires_at > :now",
            alive,
        ):
            raise errors.not_found()
        raise errors.invalid_token()

    db.write(work, durable=True)
    return Issued(token, token_id, expires_at)


def check(parsed: Parsed, keys: SigningKeys, issuer: str, now: int) -> str:
    """The id of a token that we have signed and that is in its time. Raises `invalid_token`."""
    key = keys.find(parsed.kid, now)
    if key is None or parsed.header.get("typ") != TYPE or parsed.header.get("alg") != "ES256":
        raise errors.invalid_token()
    claims = parsed.claims
    named = [claims.get(name) for name in ("sub", "sid", "jti", "acct")]
    if (
        claims.get("iss") != issuer
        or claims.get("aud") != issuer
        or not all(isinstance(value, str) and _ID.fullmatch(value) for value in named)
    ):
        raise errors.invalid_token()
    jose.check_times(claims, now, signing.LIFE_SECONDS, leeway=0)
    if not jose.is_signed_by(parsed, key.pair):
        raise errors.invalid_token()
    return str(claims["jti"])


# Outsiders'


def admit(tx: Tx, token_id: str, user_id: str, account_id: str, expires_at: int) -> None:
    """Take an outside token in; one that was here before stays as it is, ended or not."""
    tx.run(
        "INSERT INTO session_token (id, user_id, account_id, expires_at)"
        " VALUES (:id, :user, :account, :expires_at) ON CONFLICT (id) DO NOTHING",
        {"id": token_id, "user": user_id, "account": account_id, "expires_at": expires_at},
    )


def outside_of(tx: Tx, user_id: str) -> list[str]:
    """The ids of a person's outside tokens that have not ended."""
    rows = tx.rows(
        "SELECT id FROM session_token"
        " WHERE user_id = :user AND session_id IS NULL AND ended_at IS NULL",
        {"user": user_id},
    )
    return [row[0] for row in rows]


def outside_beginning(tx: Tx, beginning: str) -> list[str]:
    """The ids of outside tokens that have not ended and whose ids begin so."""
    rows = tx.rows(
        "SELECT id FROM session_token WHERE id >= :beginning AND id < :after AND ended_at IS NULL",
        {"beginning": beginning, "after": beginning + "~"},
    )
    return [row[0] for row in rows]


# Ending


def end(
    tx: Tx, now: int, *,
    token_id: str | None = None, account_id: str | None = None, user_id: str | None = None,
) -> int:  # fmt: skip
    """End one token, or all of an account, of a person, or of a person in an account."""
    wanted = {"id": token_id, "account_id": account_id, "user_id": user_id}
    given = {column: value for column, value in wanted.items() if value is not None}
    assert given, "whose?"  # a name that is missing by mistake must not stand for everybody
    conditions = "".join(f" AND {column} = :{column}" for column in given)
    return tx.run(
        f"UPDATE session_token SET ended_at = :now WHERE ended_at IS NULL{conditions}",
        given | {"now": now},
    )


def end_every(tx: Tx, now: int) -> None:
    """End every token there is."""
    tx.run("UPDATE session_token SET ended_at = :now WHERE ended_at IS NULL", {"now": now})


def end_outside(tx: Tx, token_id: str, now: int) -> None:
    """End an outside token, and the sessions it was traded for."""
    end(tx, now, token_id=token_id)
    sessions.end_traded(tx, now, token_id)


def revoke(tx: Tx, bearer: Bearer, now: int, by: Actor) -> None:
    """End the token somebody has just used."""
    if bearer.session_id is None:
        end_outside(tx, bearer.token_id, now)
    else:
        end(tx, now, token_id=bearer.token_id)
    audit.note(tx, by, "token.revoked", now, bearer.account_id, bearer.token_id)


def revoke_own(tx: Tx, token_id: str, user_id: str, now: int, by: Actor) -> bool:
    """End a token of ours by its id; False when the person has no such token any more."""
    row = tx.row(
        "UPDATE session_token SET ended_at = :now WHERE id = :id AND user_id = :user"
        " AND session_id IS NOT NULL AND ended_at IS NULL RETURNING account_id",
        {"now": now, "id": token_id, "user": user_id},
    )
    if row is not None:
        audit.note(tx, by, "token.revoked", now, row[0], token_id)
    return row is not None


def latch_expired(tx: Tx, now: int) -> None:
    """Write down what has ended, so that a clock that steps back revives nothing."""
    tx.run(
        "UPDATE session_token SET ended_at = :now WHERE ended_at IS NULL AND expires_at <= :now",
        {"now": now},
    )


def prune(tx: Tx, now: int) -> None:
    """Forget some of the tokens whose own claims refuse them."""
    tx.run(
        "DELETE FROM session_token WHERE id IN"
        " (SELECT id FROM session_token WHERE expires_at < :before LIMIT :most)",
        {"before": now - _KEPT_MS, "most": sessions.PRUNED_AT_ONCE},
    )
