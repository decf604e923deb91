"""Who did what: an account's, for its owners; everything, for who runs the instance."""

from flask import Blueprint, Response, request

from blueprints.api import manager, page, require_owner, window
from blueprints.rendering import instance
from core import audit
from core.errors import Refusal

blueprint = Blueprint("audit", __name__)


@blueprint.get("/api/v1/audit")
def log() -> Response:
    """The account's log or, with `?account=all` or another's id, what the operator may see."""
    bearer = manager().bearer
    assert bearer is not None  # `manager` let nobody else in
    limit, before = window()
    account_id = request.args.get("account", bearer.account_id)
    if not bearer.is_operator:
        require_owner(bearer)
        if account_id != bearer.account_id:
            raise Refusal("forbidden", "Only the operator may see other accounts' logs.")
    whose = None if account_id == "all" else account_id
    return page(audit.page(instance().db, whose, before, limit + 1), limit)
