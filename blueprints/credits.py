"""What an account has, what it did with it: balance, calls, ledger."""

from collections.abc import Callable
from typing import Any

import msgspec
from flask import Blueprint, Response, request

from blueprints.api import act, manager, moment, page, parsed, raw_body, reader, window
from blueprints.rendering import client_address, instance, json_response
from core import calls, clock, errors, ledger, users, vouchers, wallets
from core.access import Principal
from core.ledger import Standing

blueprint = Blueprint("credits", __name__)

_DEFAULT_SPAN_MS = 30 * clock.DAY_MS
_LONGEST_SPAN_MS = 366 * clock.DAY_MS


class _Code(msgspec.Struct, forbid_unknown_fields=True):
    code: str


@blueprint.get("/api/v1/account")
def account() -> Response:
    principal = reader()
    standing = _standing(principal)
    with instance().db.reading() as tx:
        privy_id = users.privy_id(tx, principal.user_id)
        linked = wallets.of_account(tx, principal.account_id)
    return json_response(
        {
            "credits": standing.available,
            "held": standing.held,
            "account": principal.account_id,
            "privyUserId": privy_id,
            "wallets": [found.wallet.name for found in linked],
            "usd_value": instance().worth(standing.available),
        }
    )


@blueprint.get("/v1/account")
def account_in_short() -> Response:
    principal = reader()
    standing = _standing(principal)
    made = None if principal.key is None else principal.key.created_at
    with instance().db.reading() as tx:
        last_topup = ledger.last_topup_at(tx, principal.account_id)
        mine = [found.wallet for found in wallets.of_account(tx, principal.account_id)]
    if principal.wallet is not None:  # whoever signs is told of the wallet that did
        mine = [wallet for wallet in mine if wallet.id == principal.wallet.id]
    return json_response(
        {
            "wallet": mine[0].address if mine else None,
            "credits_remaining": standing.available,
            "usdc_value": float(instance().worth(standing.available)),
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
    until, since = (moment(request.args.get(name), name) for name in ("to", "from"))
    end = clock.now_ms() + 1 if until is None else until
    since = end - _DEFAULT_SPAN_MS if since is None else since
    if not 0 <= end - since <= _LONGEST_SPAN_MS:
        raise errors.invalid_body("`from` lies before `to`, by a year at most.", "from")
    rows = calls.summary(instance().db, principal.account_id, by, since, until)
    return json_response({"data": rows})


@blueprint.post("/api/v1/credits/redeem")
def redeem() -> Response:
    """Turn a voucher's code into credits of the token's account."""
    raw = raw_body()
    principal = manager()
    _count_attempt(principal)
    code = parsed(raw, _Code).code
    credits, after = act(
        principal,
        lambda tx, bearer, by, now: vouchers.redeem(tx, code, bearer.account_id, now, by),
    )
    return json_response({"success": True, "creditsAdded": credits, "credits": after.available})


def _count_attempt(principal: Principal) -> None:
    """Whoever guesses codes is soon told to wait. Raises `rate_limited`."""
    client, now = client_address(request.environ), clock.now_ms()
    most = instance().settings.limits.failed_auth_per_minute
    rate = instance().db.write(
        lambda tx: vouchers.count_attempt(tx, client, principal.account_id, most, now)
    )
    if rate.exceeded:
        raise errors.rate_limited("Too many codes were tried in this minute.", rate.reset_seconds)


def _page(read: Callable[..., list[tuple[int, dict[str, Any]]]]) -> Response:
    principal = reader()
    limit, before = window()
    rows = read(instance().db, principal.account_id, principal.key_id, before, limit + 1)
    return page(rows, limit)


def _standing(principal: Principal) -> Standing:
    with instance().db.reading() as tx:
        return ledger.standing(tx, principal.account_id)
