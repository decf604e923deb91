"""What an account has, what it did with it: balance, calls, ledger."""

import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

from flask import Blueprint, Response, request

from blueprints.rendering import client_address, headers, instance, json_response
from core import access, calls, clock, errors, ledger
from core.access import Principal
from core.ledger import Standing

blueprint = Blueprint("credits", __name__)

MOST_PER_PAGE = 100


def reader() -> Principal:
    """Who is asking; its rate-limit headers go on the answer."""
    principal, rate = access.read(
        instance(), headers(request.environ), client_address(request.environ)
    )
    if rate is not None:
        request.environ["farebox.rate_headers"] = rate.headers()
    return principal


@blueprint.get("/api/v1/account")
def account() -> Response:
    principal = reader()
    standing = _standing(principal)
    return json_response(
        {
            "credits": standing.available,
            "held": standing.held,
            "account": principal.account_id,
            "privyUserId": None,
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


def _page(read: Callable[..., list[tuple[int, dict[str, Any]]]]) -> Response:
    """A page of numbered rows, newest first; the cursor is the number of the last one shown."""
    principal = reader()
    limit = _number("limit", MOST_PER_PAGE, default=50)
    before = _number("cursor", 10**15, default=None)
    rows = read(instance().db, principal.account_id, principal.key_id, before, (limit or 0) + 1)
    shown = rows[:limit]
    more = len(rows) > len(shown)
    return json_response(
        {
            "data": [row for _, row in shown],
            "has_more": more,
            "next_cursor": str(shown[-1][0]) if more else None,
        }
    )


def _number(name: str, most: int, default: int | None) -> int | None:
    text = request.args.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,15}", text, re.ASCII) or not 1 <= int(text) <= most:
        raise errors.invalid_body(f"`{name}` is a whole number from 1 to {most}.", name)
    return int(text)


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
