"""The members of an account: everyone may see them, owners invite, change and remove."""

import msgspec
from flask import Blueprint, Response

from blueprints import inviting
from blueprints.api import act, manager, managing, named, require_owner
from blueprints.inviting import Invitation
from blueprints.rendering import instance, json_response
from core import members
from core.audit import Actor
from core.members import Member, Terms
from core.session_tokens import Bearer
from models import Tx

blueprint = Blueprint("members", __name__, url_prefix="/api/v1/members")


class _Invitation(msgspec.Struct, forbid_unknown_fields=True):
    email: str
    role: str = "member"
    credit_limit: int | None = None
    credit_period: str | None = None


class _Changes(msgspec.Struct, forbid_unknown_fields=True):
    """What a PATCH names; what it leaves out stays."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    credit_limit: int | msgspec.UnsetType | None = msgspec.UNSET
    credit_period: str | msgspec.UnsetType | None = msgspec.UNSET


@blueprint.get("")
def every() -> Response:
    """All members and invitations; there are few enough for one page."""
    principal = manager()
    with instance().db.reading() as tx:
        found = members.of_account(tx, principal.account_id)
    shown = [member.to_json() for member in found]
    return json_response({"data": shown, "has_more": False, "next_cursor": None})


@blueprint.post("")
def invite() -> Response:
    """Invite somebody by a link that works once, shown here and, in measure, mailed."""
    principal, wish = managing(_Invitation)
    terms = Terms(wish.role, wish.credit_limit, wish.credit_period)

    def work(tx: Tx, bearer: Bearer, by: Actor, now: int) -> Invitation:
        require_owner(bearer)
        return inviting.invite(tx, bearer, wish.email, terms, now, by)

    made = act(principal, work)
    url, _ = inviting.deliver(made)
    return json_response(made.member.to_json() | {"invite_url": url}, 201)


@blueprint.patch("/<member_id>")
def change(member_id: str) -> Response:
    principal, changes = managing(_Changes)

    def work(tx: Tx, bearer: Bearer, by: Actor, now: int) -> Member:
        member = members.get(tx, member_id, bearer.account_id)
        require_owner(bearer)
        terms = Terms(member.role, member.credit_limit, member.credit_period)._replace(
            **named(changes)
        )
        return members.change(tx, member, terms, now, by)

    return json_response(act(principal, work).to_json())


@blueprint.delete("/<member_id>")
def remove(member_id: str) -> Response:
    """Remove a member, or take an invitation back. Whoever is no owner may remove themselves."""

    def work(tx: Tx, bearer: Bearer, by: Actor, now: int) -> None:
        member = members.get(tx, member_id, bearer.account_id)
        if member.user_id != bearer.user_id:
            require_owner(bearer)
        members.remove(tx, member, now, by)

    act(manager(), work)
    return Response(status=204)
