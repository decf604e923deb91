"""People: who they are here, and as whom outside issuers know them. Each owns one account."""

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from core import (
    audit,
    errors,
    idempotency,
    keys,
    ledger,
    links,
    members,
    session_tokens,
    sessions,
    tokens,
    wallets,
)
from core.audit import Actor
from core.ledger import OPERATOR_ACCOUNT
from core.payments import records
from core.wallets import Wallet
from models import Tx

PRIVY = "privy.io"
# RFC 5322's dot-atom, without what a mail program would decode into another name (RFC 2047).
_EMAIL = re.compile(r"(?!.*=\?)[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9.-]{1,190}")
_COLUMNS = "id, email, is_operator, status, status_reason, account_id, created_at"


@dataclass(frozen=True, slots=True)
class User:
    """A row of `user`."""

    id: str
    email: str | None
    is_operator: bool
    status: str
    status_reason: str | None
    account_id: str
    created_at: int


def checked_email(text: str) -> str:
    """The address in lower case. Raises `validation_error`."""
    if not _EMAIL.fullmatch(text):
        raise errors.invalid_body("That is not an e-mail address.", "email")
    return text.lower()


# Making


def add(
    tx: Tx, email: str | None, password_hash: str | None, is_operator: bool, now: int, by: Actor,
    account_id: str | None = None,
) -> User:  # fmt: skip
    """A new user, owner of a new account or of one nobody owns. Raises `conflict`."""
    if email is not None and by_email(tx, email) is not None:
        raise errors.Refusal("conflict", f"{email} is a user already.")
    if account_id is None:
        account_id = ledger.open_account(tx, now)
    user = User(tokens.new_id("user"), email, is_operator, "active", None, account_id, now)
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
    members.enrol(tx, account_id, user.id, "owner", now)
    audit.note(
        tx, by, "user.added", now, account_id, user.id,
        email=email, operator=is_operator or None,
    )  # fmt: skip
    return user


def sign_up(
    tx: Tx, email: str | None, password_hash: str | None, credits: int, now: int, by: Actor
) -> User:
    """As `add`, with the credits every account that somebody signs up for begins with."""
    user = add(tx, email, password_hash, False, now, by)
    give_signup_credits(tx, user.account_id, credits, now)
    return user


def give_signup_credits(tx: Tx, account_id: str, credits: int, now: int) -> None:
    """Once per account, whoever asks how often."""
    if credits:
        ledger.add_credits(tx, account_id, "signup", credits, f"signup:{account_id}", None, now)


# Finding


def get(tx: Tx, user_id: str) -> User:
    """A user by id. Raises `not_found`."""
    row = tx.row(f"SELECT {_COLUMNS} FROM user WHERE id = :id", {"id": user_id})
    if row is None:
        raise errors.not_found()
    return _user(row)


def name_of(tx: Tx, user_id: str) -> str:
    """What a person is called: by e-mail, else by wallet, else by id."""
    row = tx.row("SELECT email, account_id FROM user WHERE id = :id", {"id": user_id})
    if row is None or row[0] is not None:
        return user_id if row is None else str(row[0])
    linked = wallets.of_account(tx, row[1])
    return linked[0].wallet.short if linked else user_id


def by_email(tx: Tx, email: str) -> User | None:
    row = tx.row(f"SELECT {_COLUMNS} FROM user WHERE email = :email", {"email": email})
    return None if row is None else _user(row)


def password_of(tx: Tx, email: str) -> tuple[User, str | None] | None:
    """A user by e-mail, with the hash of their password if they have one."""
    row = tx.row(
        f"SELECT {_COLUMNS}, password_hash FROM user WHERE email = :email", {"email": email}
    )
    return None if row is None else (_user(row[:-1]), row[-1])


def every(tx: Tx) -> list[User]:
    """All users by e-mail."""
    return [_user(row) for row in tx.rows(f"SELECT {_COLUMNS} FROM user ORDER BY email, id")]


def owner_of(tx: Tx, account_id: str) -> User | None:
    """Whose account it is, if anybody's yet."""
    row = tx.row(
        f"SELECT {_COLUMNS} FROM user WHERE account_id = :account", {"account": account_id}
    )
    return None if row is None else _user(row)


def account_of(tx: Tx, who: str) -> str:
    """The account that WHO means: an e-mail or a `did:…` (the account its user owns), a wallet's
    `namespace:address`, or an `acct_…`. Raises `not_found`, and `conflict` for the operator key's
    record."""
    if who == OPERATOR_ACCOUNT:
        raise errors.Refusal(
            "conflict", f"{who} records the operator key's calls; it has no credits."
        )
    wallet = wallets.parse(who)
    if wallet is not None:
        return _holder(tx, wallet).account_id
    if "@" not in who and not who.startswith("did:"):
        ledger.standing(tx, who)
        return who
    return of_who(tx, who).account_id


def _holder(tx: Tx, wallet: Wallet) -> wallets.Owner:
    owner = wallets.owner_of(tx, wallet)
    if owner is None:
        raise errors.Refusal("not_found", f"There is no account of {wallet.name}.")
    return owner


def of_who(tx: Tx, who: str) -> User:
    """The user that WHO means: by e-mail, by `did:…`, by id, by wallet, or as the owner of an
    `acct_…`.

    Raises `not_found`, and `conflict` for a subject by which issuers mean different people.
    """
    if "@" in who:
        found = by_email(tx, who.lower())
    elif who.startswith("did:"):
        # Whoever chooses their own subject elsewhere is not thereby somebody of Privy's.
        privy = known_as(tx, PRIVY, who) if who.startswith("did:privy:") else None
        known = [privy.id] if privy is not None else known_by_subject(tx, who)
        if len(known) > 1:
            raise errors.Refusal("conflict", f"Several people are {who}: {', '.join(known)}.")
        found = get(tx, known[0]) if known else None
    elif who.startswith("user_"):
        found = get(tx, who)
    else:
        wallet = wallets.parse(who)
        found = owner_of(tx, who if wallet is None else _holder(tx, wallet).account_id)
    if found is None:
        raise errors.Refusal("not_found", f"There is no {who}, or nobody owns it yet.")
    return found


def first_seen(
    tx: Tx, issuer: str, subject: str, email: str | None, credits: int, now: int, by: Actor
) -> User:
    """The user an issuer's subject becomes. `email` only if the issuer has verified it; one that is
    taken is left to whoever has it, because an address proves nothing about a person."""
    if email is not None and by_email(tx, email) is not None:
        email = None
    user = sign_up(tx, email, None, credits, now, by)
    link_identity(tx, user, issuer, subject, now, by)
    return user


# Outside identities (OpenID Connect Core 1.0, 5.7: only issuer and subject together name a person)


def known_as(tx: Tx, issuer: str, subject: str) -> User | None:
    """The user an issuer means by that subject."""
    row = tx.row(
        "SELECT user_id FROM identity WHERE issuer = :issuer AND subject = :subject",
        {"issuer": issuer, "subject": subject},
    )
    return None if row is None else get(tx, row[0])


def known_by_subject(tx: Tx, subject: str) -> list[str]:
    """The ids of the users that any issuer means by that subject."""
    rows = tx.rows(
        "SELECT DISTINCT user_id FROM identity WHERE subject = :sub ORDER BY user_id",
        {"sub": subject},
    )
    return [row[0] for row in rows]


def link_identity(tx: Tx, user: User, issuer: str, subject: str, now: int, by: Actor) -> None:
    """Let an issuer's subject mean this user. Raises `conflict` when it means another."""
    known = known_as(tx, issuer, subject)
    if known is not None:
        if known.id == user.id:
            return
        raise errors.Refusal("conflict", "That identity belongs to another user.")
    tx.run(
        "INSERT INTO identity (issuer, subject, user_id, created_at)"
        " VALUES (:issuer, :subject, :user, :now)",
        {"issuer": issuer, "subject": subject, "user": user.id, "now": now},
    )
    audit.note(tx, by, "identity.linked", now, user.account_id, user.id, issuer=issuer, sub=subject)


def unlink_identity(
    tx: Tx, user_id: str, issuer: str, subject: str, providers: Container[str], here: str, now: int,
    by: Actor,
) -> None:  # fmt: skip
    """An identity means this person no more, and what it let in ends: outside tokens, and sign-ins
    through providers but for the session `here`. `providers` are the issuers one can sign in with.

    Raises `not_found`, or `conflict` when there would be no way left to sign in.
    """
    _require_another_way(tx, get(tx, user_id), providers, issuer.rstrip("/") in providers)
    removed = tx.run(
        "DELETE FROM identity WHERE user_id = :user AND issuer = :issuer AND subject = :subject",
        {"user": user_id, "issuer": issuer, "subject": subject},
    )
    if not removed:
        raise errors.not_found()
    for token_id in session_tokens.outside_of(tx, user_id):
        session_tokens.end_outside(tx, token_id, now)
    sessions.end_alike(tx, user_id, "oidc:", now, by, keep=here)
    user = get(tx, user_id)
    audit.note(
        tx, by, "identity.unlinked", now, user.account_id, user_id, issuer=issuer, sub=subject
    )


def require_active(user: User) -> None:
    """Raises `account_suspended` for a person who is not let in."""
    if user.status != "active":
        told = f"You are not let in: this user is {user.status}."
        raise errors.Refusal("account_suspended", told, fields={"reason": user.status_reason})


def has_password(tx: Tx, user_id: str) -> bool:
    """Whether a person can sign in with a password."""
    row = tx.row("SELECT password_hash IS NOT NULL FROM user WHERE id = :id", {"id": user_id})
    return bool(row and row[0])


def has_a_credential(tx: Tx, user_id: str) -> bool:
    """Whether anybody could come in as this person: with a password, any identity or a wallet."""
    linked = wallets.of_account(tx, get(tx, user_id).account_id)
    return has_password(tx, user_id) or bool(identities_of(tx, user_id) or linked)


def _require_another_way(
    tx: Tx, user: User, providers: Container[str], is_a_way: bool = True
) -> None:
    """Raises `conflict` when there would be no way left to sign in at a browser."""
    by_provider = [name for name, _ in identities_of(tx, user.id) if name.rstrip("/") in providers]
    linked = wallets.of_account(tx, user.account_id)
    if has_password(tx, user.id) + len(by_provider) + len(linked) < 1 + is_a_way:
        raise errors.Refusal("conflict", "That is the only way left to sign in.")


def identities_of(tx: Tx, user_id: str) -> list[tuple[str, str]]:
    """Issuer and subject of each outside identity, the oldest first."""
    rows = tx.rows(
        "SELECT issuer, subject FROM identity WHERE user_id = :user ORDER BY created_at, issuer",
        {"user": user_id},
    )
    return [(row[0], row[1]) for row in rows]


# Wallets


def let_in(tx: Tx, wallet: Wallet, is_open: bool) -> wallets.Owner | None:
    """Whose a wallet is that somebody signs in with; None for one nobody knows, which is let in if
    sign-up `is_open`. Raises `signup_closed`, `account_suspended`."""
    owner = wallets.owner_of(tx, wallet)
    if owner is None and not is_open:
        raise errors.Refusal(
            "signup_closed", "This wallet is not known here, and sign-up is closed."
        )
    if owner is not None:
        wallets.require_active(owner)
    return owner


def by_wallet(tx: Tx, wallet: Wallet, is_open: bool, credits: int, now: int, client: str) -> User:
    """Who signs in with a wallet: the person whose account has it. An account that a payment has
    opened becomes theirs with its credits; for a wallet nobody knows there is a new one, with
    `credits`. Raises as `let_in` does."""
    owner, by = let_in(tx, wallet, is_open), Actor(wallet.name, client)
    if owner is None:
        user = sign_up(tx, None, None, credits, now, by)
        wallets.add(tx, wallet, user.account_id, now)
    elif owner.user_id is not None:
        return get(tx, owner.user_id)
    else:
        user = add(tx, None, None, False, now, by, account_id=owner.account_id)
    _note_linked(tx, wallet, user, now, by)
    return user


def link_wallet(tx: Tx, wallet: Wallet, user: User, now: int, by: Actor) -> bool:
    """A wallet whose owner has signed for it becomes the person's; False if it was already. The
    account that a payment had opened for it is merged into theirs: credits, wallets and stored
    answers, but no keys.

    Raises `wallet_linked` when it is somebody else's, and `conflict`, `account_suspended` when its
    own account cannot be merged now.
    """
    owner = wallets.owner_of(tx, wallet)
    if owner is not None and owner.account_id == user.account_id:
        return False
    if owner is not None and owner.user_id is not None:
        raise errors.Refusal("wallet_linked", "This wallet belongs to another account.")
    if owner is None:
        wallets.add(tx, wallet, user.account_id, now)
    else:
        if records.has_undecided(tx, owner.account_id):
            raise errors.Refusal(
                "conflict", "A payment for this wallet's account is being settled. Try again later."
            )
        ledger.merge(tx, owner.account_id, user.account_id, wallet.name, now, by)
        records.move(tx, owner.account_id, user.account_id)
        keys.revoke_all(tx, now, by, account_id=owner.account_id)
        idempotency.move(tx, owner.account_id, user.account_id)
        wallets.move(tx, owner.account_id, user.account_id)
    _note_linked(tx, wallet, user, now, by)
    return True


def unlink_wallet(
    tx: Tx, wallet: Wallet, user: User, providers: Container[str], here: str, now: int, by: Actor
) -> None:
    """A wallet is the person's no more: it signs nothing here, and what it had signed in ends, but
    for the session `here`. `providers` are the issuers one can sign in with.

    Raises `not_found`, or `conflict` when there would be no way left to sign in.
    """
    owner = wallets.owner_of(tx, wallet)
    if owner is None or owner.account_id != user.account_id:
        raise errors.not_found()
    _require_another_way(tx, user, providers)
    wallets.remove(tx, wallet)
    sessions.end_alike(tx, user.id, f"wallet:{wallet.id}", now, by, keep=here)
    audit.note(tx, by, "wallet.unlinked", now, user.account_id, wallet.id)


def _note_linked(tx: Tx, wallet: Wallet, user: User, now: int, by: Actor) -> None:
    audit.note(tx, by, "wallet.linked", now, user.account_id, wallet.id)


def privy_id(tx: Tx, user_id: str | None) -> str | None:
    """The `did:privy:…` of a person, if Privy knows them."""
    row = tx.row(
        "SELECT subject FROM identity WHERE user_id = :user AND issuer = :privy",
        {"user": user_id, "privy": PRIVY},
    )
    return None if row is None else row[0]


# Changing


def reset_link(tx: Tx, user: User, now: int, by: Actor) -> str:
    """The token of a link to choose a new password. Raises `conflict` for who is not let in."""
    if user.status != "active":
        raise errors.Refusal("conflict", f"That user is {user.status}.")
    if user.email is None:
        raise errors.Refusal("conflict", "That user has no e-mail to sign in with.")
    audit.note(tx, by, "password.reset_link", now, user.account_id, user.id)
    return links.make(tx, "reset", user.account_id, now, user_id=user.id)


def set_password(tx: Tx, user_id: str, password_hash: str, now: int, by: Actor) -> None:
    """A new password, which ends every sign-in, session token and reset link of the person."""
    tx.run(
        "UPDATE user SET password_hash = :hash WHERE id = :id",
        {"id": user_id, "hash": password_hash},
    )
    links.cancel(tx, now, user_id=user_id)
    sessions.end_all(tx, user_id, now, by)
    session_tokens.end(tx, now, user_id=user_id)
    audit.note(tx, by, "password.changed", now, get(tx, user_id).account_id, user_id)


def set_operator(tx: Tx, user: User, is_operator: bool, now: int, by: Actor) -> None:
    """Let a person run the instance, or not any more. Raises `conflict` for one who is closed."""
    changed = tx.run(
        "UPDATE user SET is_operator = :operator WHERE id = :id AND status <> 'closed'",
        {"id": user.id, "operator": int(is_operator)},
    )
    if not changed:
        raise errors.Refusal("conflict", "That user is closed.")
    audit.note(tx, by, "user.operator", now, user.account_id, user.id, operator=is_operator)


def suspend(tx: Tx, user: User, reason: str | None, now: int, by: Actor) -> None:
    """Keep a person out: sign-ins end, their keys and tokens are refused. Raises `conflict`."""
    changed = tx.run(
        "UPDATE user SET status = 'suspended', status_reason = :reason"
        " WHERE id = :id AND status <> 'closed'",
        {"id": user.id, "reason": reason},
    )
    if not changed:
        raise errors.Refusal("conflict", "That user is closed.")
    sessions.end_all(tx, user.id, now, by)
    audit.note(tx, by, "user.suspended", now, user.account_id, user.id, reason=reason)


def resume(tx: Tx, user: User, now: int, by: Actor) -> None:
    """Let a suspended person in again. Raises `conflict`."""
    changed = tx.run(
        "UPDATE user SET status = 'active', status_reason = NULL"
        " WHERE id = :id AND status = 'suspended'",
        {"id": user.id},
    )
    if not changed:
        raise errors.Refusal("conflict", f"That user is {user.status}, not suspended.")
    audit.note(tx, by, "user.resumed", now, user.account_id, user.id)


def close(tx: Tx, user: User, now: int, by: Actor) -> None:
    """End a person here for good, with the account they own. Their e-mail, password and wallets are
    forgotten and may be used again; what they paid for stays in the books.

    Raises `conflict` while others are members of the account.
    """
    if user.status == "closed":
        raise errors.Refusal("conflict", "That user is closed already.")
    here = members.of_account(tx, user.account_id)
    if any(member.user_id not in (None, user.id) for member in here):
        raise errors.Refusal("conflict", "Others are members of their account; remove them first.")
    sessions.end_all(tx, user.id, now, by)
    if ledger.status_of(tx, user.account_id) != "closed":
        close_account(tx, user.account_id, now, by)
    keys.revoke_all(tx, now, by, user_id=user.id)
    session_tokens.end(tx, now, user_id=user.id)
    members.leave_all(tx, user.id, now, by)
    links.cancel(tx, now, user_id=user.id)
    wallets.remove_all(tx, user.account_id)
    tx.run(
        "UPDATE user SET status = 'closed', email = NULL, password_hash = NULL, is_operator = 0"
        " WHERE id = :id",
        {"id": user.id},
    )
    audit.note(tx, by, "user.closed", now, user.account_id, user.id)


def close_account(tx: Tx, account_id: str, now: int, by: Actor) -> None:
    """End an account for good: its keys are revoked, its tokens ended, its invitations taken back.
    Its balance stays recorded.

    Raises `not_found`, `conflict`.
    """
    ledger.close_account(tx, account_id, now, by)
    for member in members.of_account(tx, account_id):
        if member.user_id is None:
            members.remove(tx, member, now, by)
    keys.revoke_all(tx, now, by, account_id=account_id)
    session_tokens.end(tx, now, account_id=account_id)


def _user(row: tuple[Any, ...]) -> User:
    return User(row[0], row[1], bool(row[2]), *row[3:])
