"""Members of accounts: who may spend an account's credits, as owner or member, up to what."""

from typing import Any, NamedTuple

from core import audit, errors, keys, links, session_tokens, tokens
from core.audit import Actor
from core.limits import CreditLimit
from models import Tx

MOST = 200  # of one account, the invited counted
ROLES = ("owner", "member")
_COLUMNS = (
    "m.id, m.account_id, m.user_id, COALESCE(u.email, m.email), m.role, m.credit_limit,"
    " m.credit_period, m.created_at, u.status"
)
_FROM = " FROM membership m LEFT JOIN user u ON u.id = m.user_id"


class Member(NamedTuple):
    """A row of `membership`, with its person's e-mail and state."""

    id: str
    account_id: str
    user_id: str | None
    email: str | None
    role: str
    credit_limit: int | None
    credit_period: str | None
    created_at: int
    user_status: str | None

    @property
    def status(self) -> str:
        """`invited`, `active` or, while the operator keeps the person out, `suspended`."""
        if self.user_id is None:
            return "invited"
        return "suspended" if self.user_status == "suspended" else "active"

    def to_json(self) -> dict[str, Any]:
        """The member as the API shows it."""
        return {
            "id": self.id,
            "user_id": self.user_id,
            "email": self.email,
            "role": self.role,
            "status": self.status,
            "credit_limit": self.credit_limit,
            "credit_period": self.credit_period,
        }


class Terms(NamedTuple):
    """What a member is and may spend; None of a limit means no limit of their own."""

    role: str
    credit_limit: int | None
    credit_period: str | None

    def check(self) -> None:
        """Raises `validation_error` naming the first bad field."""
        if self.role not in ROLES:
            raise errors.invalid_body(f"A role is one of {', '.join(ROLES)}.", "role")
        keys.check_limit(self.credit_limit, self.credit_period)


def credit_limit(
    account_id: str, user_id: str | None, limit: int | None, period: str | None
) -> CreditLimit | None:
    """A person's own limit in an account: one count over all their keys and session tokens, which
    leaving and joining again does not start anew."""
    if user_id is None or limit is None or period is None:
        return None
    return CreditLimit(limit_subject(account_id, user_id), limit, period)


def limit_subject(account_id: str, user_id: str) -> str:
    """What a person's spending in an account is counted under."""
    return f"{account_id}:{user_id}"


# Finding


def of_account(tx: Tx, account_id: str) -> list[Member]:
    """All members, invited ones too, the oldest first."""
    rows = tx.rows(
        f"SELECT {_COLUMNS}{_FROM} WHERE m.account_id = :account ORDER BY m.created_at, m.id",
        {"account": account_id},
    )
    return [Member(*row) for row in rows]


def accounts_of(tx: Tx, user_id: str) -> list[Member]:
    """The memberships of a person, the oldest first."""
    rows = tx.rows(
        f"SELECT {_COLUMNS}{_FROM} WHERE m.user_id = :user ORDER BY m.created_at, m.id",
        {"user": user_id},
    )
    return [Member(*row) for row in rows]


def get(tx: Tx, member_id: str, account_id: str) -> Member:
    """A member of that account. Raises `not_found`."""
    row = tx.row(
        f"SELECT {_COLUMNS}{_FROM} WHERE m.id = :id AND m.account_id = :account",
        {"id": member_id, "account": account_id},
    )
    if row is None:
        raise errors.not_found()
    return Member(*row)


def find(tx: Tx, account_id: str, user_id: str) -> Member | None:
    """A person's membership of an account."""
    row = tx.row(
        f"SELECT {_COLUMNS}{_FROM} WHERE m.account_id = :account AND m.user_id = :user",
        {"account": account_id, "user": user_id},
    )
    return None if row is None else Member(*row)


def invited(tx: Tx, membership_id: str | None) -> Member:
    """The invitation a link fills. Raises `not_found` when it was taken back."""
    row = tx.row(
        f"SELECT {_COLUMNS}{_FROM} WHERE m.id = :id AND m.user_id IS NULL", {"id": membership_id}
    )
    if row is None:
        raise errors.Refusal("not_found", "This invitation was taken back.")
    return Member(*row)


# Changing


def enrol(tx: Tx, account_id: str, user_id: str, role: str, now: int) -> None:
    """Make a person a member of an account they have just got."""
    _insert(tx, account_id, user_id, None, Terms(role, None, None), now)


def invite(tx: Tx, account_id: str, email: str, terms: Terms, now: int, by: Actor
) -> tuple[Member, str, bool]:  # fmt: skip
    """An invitation, the token of its link, and whether it is worth a mail. Inviting an address
    again renews the invitation: the earlier link stops, and mails are minutes apart.

    Raises `validation_error`, or `conflict` for a member.
    """
    terms.check()
    here = of_account(tx, account_id)
    known = [member for member in here if member.email == email]
    if known and known[0].user_id is not None:
        raise errors.Refusal("conflict", f"{email} is a member already.")
    mailed_lately = False
    if known:
        member_id = known[0].id
        mailed_lately = links.was_made_lately(tx, now, membership_id=member_id)
        links.cancel(tx, now, membership_id=member_id)
        _write_terms(tx, member_id, terms)
    else:
        if len(here) >= MOST:
            raise errors.Refusal("conflict", f"An account has at most {MOST} members.")
        member_id = _insert(tx, account_id, None, email, terms, now)
    token = links.make(tx, "invite", account_id, now, membership_id=member_id)
    audit.note(tx, by, "member.invited", now, account_id, member_id, email=email, **terms._asdict())
    return get(tx, member_id, account_id), token, not mailed_lately


def join(tx: Tx, token: str, user_id: str, now: int, by: Actor) -> Member:
    """Follow an invitation. Raises `not_found`, or `conflict` for somebody who is a member."""
    link = links.use(tx, "invite", token, now)
    member = invited(tx, link.membership_id)
    if find(tx, member.account_id, user_id) is not None:
        raise errors.Refusal("conflict", "You are a member of that account already.")
    tx.run(
        "UPDATE membership SET user_id = :user, email = NULL WHERE id = :id AND user_id IS NULL",
        {"id": member.id, "user": user_id},
    )
    audit.note(
        tx, by, "member.joined", now, member.account_id, member.id,
        user=user_id, invited=member.email,
    )  # fmt: skip
    return get(tx, member.id, member.account_id)


def change(tx: Tx, member: Member, terms: Terms, now: int, by: Actor) -> Member:
    """New terms for a member. Raises `validation_error`, or `conflict` for the last word on whose
    account it is: the person who owns it stays an owner."""
    terms.check()
    if terms.role != "owner" and _is_theirs(tx, member):
        raise errors.Refusal("conflict", "The person whose account this is stays its owner.")
    _write_terms(tx, member.id, terms)
    audit.note(tx, by, "member.changed", now, member.account_id, member.id, **terms._asdict())
    return get(tx, member.id, member.account_id)


def remove(tx: Tx, member: Member, now: int, by: Actor) -> None:
    """End a membership or an invitation, with the keys the person made here and the tokens they
    hold for it. Raises `conflict` for the person whose account it is."""
    if _is_theirs(tx, member):
        raise errors.Refusal("conflict", "The person whose account this is cannot leave it.")
    _delete(tx, member, now, by)


def leave_all(tx: Tx, user_id: str, now: int, by: Actor) -> None:
    """End every membership of a person who is no more."""
    for member in accounts_of(tx, user_id):
        _delete(tx, member, now, by)


def _delete(tx: Tx, member: Member, now: int, by: Actor) -> None:
    tx.run("DELETE FROM membership WHERE id = :id", {"id": member.id})
    links.cancel(tx, now, membership_id=member.id)
    if member.user_id is not None:
        account_id, user_id = member.account_id, member.user_id
        keys.revoke_all(tx, now, by, account_id=account_id, user_id=user_id)
        session_tokens.end(tx, now, account_id=account_id, user_id=user_id)
    audit.note(
        tx, by, "member.removed", now, member.account_id, member.id,
        user=member.user_id, email=member.email,
    )  # fmt: skip


def _insert(
    tx: Tx, account_id: str, user_id: str | None, email: str | None, terms: Terms, now: int
) -> str:
    member_id = tokens.new_id("mem")
    tx.run(
        "INSERT INTO membership"
        " (id, account_id, user_id, email, role, credit_limit, credit_period, created_at)"
        " VALUES (:id, :account, :user, :email, :role, :credit_limit, :credit_period, :now)",
        {"id": member_id, "account": account_id, "user": user_id, "email": email, "now": now}
        | terms._asdict(),
    )
    return member_id


def _write_terms(tx: Tx, member_id: str, terms: Terms) -> None:
    tx.run(
        "UPDATE membership SET role = :role, credit_limit = :credit_limit,"
        " credit_period = :credit_period WHERE id = :id",
        {"id": member_id} | terms._asdict(),
    )


def _is_theirs(tx: Tx, member: Member) -> bool:
    return tx.row(
        "SELECT 1 FROM user WHERE id = :user AND account_id = :account",
        {"user": member.user_id, "account": member.account_id},
    ) is not None  # fmt: skip
