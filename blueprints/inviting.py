"""Inviting somebody into an account, whichever door the owner came through."""

from typing import NamedTuple

from blueprints.rendering import instance
from core import limits, mail, members, users
from core.audit import Actor
from core.members import Member, Terms
from core.session_tokens import Bearer
from core.sessions import Seat
from models import Tx

_MAILS_PER_MINUTE = 5  # that an account's owners have sent to others


class Invitation(NamedTuple):
    """An invitation that was made, with the token of its link."""

    member: Member
    token: str
    is_worth_a_mail: bool
    inviter: str | None


def invite(tx: Tx, who: Bearer | Seat, email: str, terms: Terms, now: int, by: Actor) -> Invitation:
    """Invite an address. Raises as `checked_email` and `members.invite` do."""
    address = users.checked_email(email)
    member, token, is_worth = members.invite(tx, who.account_id, address, terms, now, by)
    rate = limits.spend_rate(tx, f"mail:{who.account_id}", _MAILS_PER_MINUTE, now)
    inviter = users.get(tx, who.user_id).email
    return Invitation(member, token, is_worth and not rate.exceeded, inviter)


def deliver(made: Invitation) -> tuple[str, bool]:
    """The link, which works once, and whether it is mailed too."""
    settings, to = instance().settings, made.member.email
    url = f"{settings.public_url}/invite?token={made.token}"
    if settings.smtp is None or to is None or not made.is_worth_a_mail:
        return url, False
    text = mail.invitation_text(url, made.inviter)
    mail.send_later(settings.smtp, to, "An invitation", text)
    return url, True
