"""People and the accounts they own; passwords; links that work once."""

import re
from dataclasses import dataclass

from core import clock, errors, ledger, tokens
from core.keys import HASHER
from core.ledger import OPERATOR_ACCOUNT
from models import Tx

SETUP_LIFE_MS = 7 * clock.DAY_MS
RESET_LIFE_MS = clock.DAY_MS
SHORTEST_PASSWORD, LONGEST_PASSWORD = 12, 128
_EMAIL = re.compile(r"[^\s@<>()\[\],;:\\\"]{1,64}@[A-Za-z0-9.-]{1,190}")


@dataclass(frozen=True, slots=True)
class User:
    """A row of `user`."""

    id: str
    email: str
    is_operator: bool
    account_id: str
    created_at: int


@dataclass(frozen=True, slots=True)
class Link:
    """An unused one-time link."""

    purpose: str
    account_id: str
    user_id: str | None


def checked_email(text: str) -> str:
    """The address in lower case. Raises `validation_error`."""
    if not _EMAIL.fullmatch(text) or not text.isprintable():
        raise errors.invalid_body("That is not an e-mail address.", "email")
    return text.lower()


def hashed_password(password: str, email: str) -> str:
    """The argon2id hash of an acceptable password; slow. Raises `validation_error`."""
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise errors.invalid_body(
            f"A password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters.", "password"
        )
    name = email.partition("@")[0]
    if (len(name) > 3 and name in password.lower()) or len(set(password)) < 5:
        raise errors.invalid_body("That password is too easy to guess.", "password")
    return HASHER.hash(password)


def add(
    tx: Tx, email: str, password_hash: str | None, is_operator: bool, now: int,
    account_id: str | None = None,
) -> User:  # fmt: skip
    """A new user, with a new account or as the owner of one nobody owns. Raises `conflict`."""
    if tx.row("SELECT 1 FROM user WHERE email = :email", {"email": email}):
        raise errors.Refusal("conflict", f"{email} is a user already.")
    if account_id is None:
        account_id = ledger.open_account(tx, now)
    user = User(tokens.new_id("user"), email, is_operator, account_id, now)
    tx.run(
        "INSERT INTO user (id, email, password_hash, is_operator, account_id, created_at)"
        " VALUES (:id, :email, :hash, :operator, :account, :now)",
        {
            "id": user.id,
            "email": email,
            "hash": password_hash,
            "operator": int(is_operator),
            "account": account_id,
            "now": now,
        },
    )
    return user


def every(tx: Tx) -> list[User]:
    """All users by e-mail."""
    rows = tx.rows("SELECT id, email, is_operator, account_id, created_at FROM user ORDER BY email")
    return [User(row[0], row[1], bool(row[2]), row[3], row[4]) for row in rows]


def owner_of(tx: Tx, account_id: str) -> User | None:
    """Who owns an account, if anybody does yet."""
    row = tx.row(
        "SELECT id, email, is_operator, account_id, created_at FROM user"
        " WHERE account_id = :account",
        {"account": account_id},
    )
    return None if row is None else User(row[0], row[1], bool(row[2]), row[3], row[4])


def account_of(tx: Tx, who: str) -> str:
    """The account that WHO means: an e-mail (the account its user owns) or an `acct_…`.

    Raises `not_found`.
    """
    if who == OPERATOR_ACCOUNT:
        raise errors.Refusal(
            "conflict", f"{who} records the operator key's calls; it has no credits."
        )
    column = "email" if "@" in who else "id"
    table = "user" if "@" in who else "account"
    result = "account_id" if "@" in who else "id"
    row = tx.row(
        f"SELECT {result} FROM {table} WHERE {column} = :who",
        {"who": who.lower() if "@" in who else who},
    )
    if row is None:
        raise errors.Refusal("not_found", f"There is no {who}.")
    return str(row[0])


# Links


def make_link(tx: Tx, purpose: str, account_id: str, user_id: str | None, expires_at: int) -> str:
    """The token of a new one-time link. Only its digest is stored."""
    token = tokens.new_secret()
    tx.run(
        "INSERT INTO one_time_link (token_hash, purpose, account_id, user_id, expires_at)"
        " VALUES (:hash, :purpose, :account, :user, :expires_at)",
        {
            "hash": tokens.digest(token.encode()),
            "purpose": purpose,
            "account": account_id,
            "user": user_id,
            "expires_at": expires_at,
        },
    )
    return token


def look_at_link(tx: Tx, purpose: str, token: str, now: int) -> Link | None:
    """The link of a token if it can still be used; looking does not use it."""
    row = tx.row(
        "SELECT purpose, account_id, user_id FROM one_time_link WHERE token_hash = :hash"
        " AND purpose = :purpose AND used_at IS NULL AND expires_at > :now",
        {"hash": tokens.digest(token.encode()), "purpose": purpose, "now": now},
    )
    return None if row is None else Link(*row)


def use_link(tx: Tx, purpose: str, token: str, now: int) -> Link:
    """Use a link up. Raises `not_found` when it was used, has expired or never was."""
    row = tx.row(
        "UPDATE one_time_link SET used_at = :now WHERE token_hash = :hash AND purpose = :purpose"
        " AND used_at IS NULL AND expires_at > :now RETURNING purpose, account_id, user_id",
        {"hash": tokens.digest(token.encode()), "purpose": purpose, "now": now},
    )
    if row is None:
        raise errors.Refusal("not_found", "This link was used before, or is too old.")
    return Link(*row)


def latch_expired_links(tx: Tx, now: int) -> None:
    """Use up what has expired, so that a clock that steps back revives no link."""
    tx.run(
        "UPDATE one_time_link SET used_at = :now WHERE used_at IS NULL AND expires_at <= :now",
        {"now": now},
    )


def set_password(tx: Tx, user_id: str, password_hash: str) -> None:
    tx.run(
        "UPDATE user SET password_hash = :hash WHERE id = :id",
        {"id": user_id, "hash": password_hash},
    )


def email_of(tx: Tx, user_id: str) -> str:
    row = tx.row("SELECT email FROM user WHERE id = :id", {"id": user_id})
    if row is None:
        raise errors.not_found()
    return str(row[0])
