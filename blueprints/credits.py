"""What an account has, what it did with it: balance, calls, ledger."""

import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

from flask import Blueprint, Response, request

from blueprints.api import manager, page, reader, timestamp, window
from blueprints.rendering import instance, json_response
from core import calls, clock, errors, ledger, users
from core.access import Principal
from core.ledger import Standing

blueprint = Blueprint("credits", __name__)

_DEFAULT_SPAN_MS = 30 * clock.DAY_MS
_LONGEST_SPAN_MS = 366 * clock.DAY_MS


@blueprint.get("/api/v1/account")
def account() -> Response:
    principal = reader()
    standing = _standing(principal)
    with instance().db.reading() as tx:
        privy_id = users.privy_id(tx, principal.user_id)
    return json_response(
        {
            "credits": standing.available,
            "held": standing.held,
            "account": principal.account_id,
            "privyUserId": privy_id,
            "wallets": [],
            "usd_value": _dollars(standing.available),
        }
    )


@blueprint.get("/v1/account")
def account_in_short() -> Response:
    principal = reader()
    standing = _standing(principal)
    made = None if principal.key is None else principal.key.created_at
    with instance().db.reading() as tx:
        last_topup = ledger.last_topup_at(tx, principal.account_id)
    return json_response(
        {
            "wallet": None,
            "credits_remaining": standing.available,
            "usdc_value": float(_dollars(standing.available)),
            "last_topup_at": clock.rfc3339_or_none(last_topup),
            "api_key_created_at": clock.rfc3339_or_none(made),
        }
    )


@blueprint.get("/api/v1/usage")
def usage() -> Response:
    return _page(calls.page)


@blueprint.get("/api/v1/usage/<request_id>")
def one_call(request_id: str) -> Response:
    principal = reader()
    call = calls.get(instance().db, principal.account_id, principal.key_id, request_id)
    if call is None:
        raise errors.not_found()
    return json_response(call)


@blueprint.get("/api/v1/ledger")
def entries() -> Response:
    return _page(ledger.entries)


@blueprint.get("/api/v1/usage/summary")
def summary() -> Response:
    """What an account's calls come to, by one of a few things, in a span of time."""
    principal = manager()
    by = request.args.get("by", "day")
    if by not in calls.SUMMARIES:
        raise errors.invalid_body(f"`by` is one of {', '.join(calls.SUMMARIES)}.", "by")
    until, since = _moment("to"), _moment("from")
    end = clock.now_ms() + 1 if until is None else until
    since = end - _DEFAULT_SPAN_MS if since is None else since
    if not 0 <= end - since <= _LONGEST_SPAN_MS:
        raise errors.invalid_body("`from` lies before `to`, by a year at most.", "from")
    rows = calls.summary(instance().db, principal.account_id, by, since, until)
    return json_response({"data": rows})


def _moment(name: str) -> int | None:
    """A time of the query, or a day, which is its first moment in UTC."""
    text = request.args.get(name)
    if text is not None and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text, re.ASCII):
        text += "T00:00:00Z"
    return timestamp(text, name)


def _page(read: Callable[..., list[tuple[int, dict[str, Any]]]]) -> Response:
    principal = reader()
    limit, before = window()
    rows = read(instance().db, principal.account_id, principal.key_id, before, limit + 1)
    return page(rows, limit)


def _standing(principal: Principal) -> Standing:
    with instance().db.reading() as tx:
        return ledger.standing(tx, principal.account_id)


def _dollars(credits: int) -> str:
    """The exact worth of so many credits, with at least the two places of a cent."""
    with localcontext(prec=60):  # the default of 28 digits could round the largest balances
        worth = instance().settings.usd_per_credit * credits
        exponent = worth.as_tuple().exponent
        assert isinstance(exponent, int)  # a finite number's is
        return format(worth.quantize(Decimal("0.01")) if exponent > -2 else worth, "f")
