"""x402: credits bought on the spot, and what can be paid here, for whoever looks for it."""

from typing import Any

from flask import Blueprint, Response, request

from blueprints.api import number, raw_body
from blueprints.rendering import (
    client_address,
    headers,
    instance,
    json_response,
    raw_target,
    request_ids,
)
from core import clock, errors, examples
from core.adapters import Inbound
from core.payments import topup, wire

blueprint = Blueprint("payments", __name__)

_MOST_ITEMS = 100


@blueprint.post(examples.TOP_UP)
def top_up() -> Response:
    """Credits for the Bearer's account or, without one, for the payer's wallet's."""
    inbound = Inbound(
        "POST", examples.TOP_UP, request.environ.get("QUERY_STRING", ""), headers(request.environ),
        raw_body(), request_ids(request.environ)[0], raw_target(request.environ),
    )  # fmt: skip
    answer, told = topup.top_up(instance(), inbound, client_address(request.environ))
    return Response(answer.body, answer.status, dict(answer.headers) | told)


@blueprint.get("/.well-known/x402")
def well_known() -> Response:
    """Everything that can be paid here, by address; and what a top-up asks for."""
    desk = instance().desk
    if desk is None:
        raise errors.not_found()
    return json_response(
        {
            "x402Version": wire.VERSION,
            "resources": list(dict.fromkeys(item["resource"] for item in _items())),
            "accepts": desk.accepts(desk.terms.topup_credits),
            "topUp": desk.url(examples.TOP_UP),
            "discovery": desk.url("/discovery/resources"),
        }
    )


@blueprint.get("/discovery/resources")
def resources() -> Response:
    """Everything that can be paid here, with its price: the shape of x402's bazaar."""
    if instance().desk is None:
        raise errors.not_found()
    items = _items()
    limit, offset = number("limit", _MOST_ITEMS, 20), number("offset", 10**6, 0, least=0)
    assert limit is not None and offset is not None  # they have defaults
    return json_response(
        {
            "x402Version": wire.VERSION,
            "items": items[offset : offset + limit],
            "pagination": {"limit": limit, "offset": offset, "total": len(items)},
        }
    )


def _items() -> list[dict[str, Any]]:
    payable = [route for route in instance().catalog.routes if route.x402]
    found = [
        _item(
            route.path,
            method,
            route.least_price,
            f"One call of {route.path}",
            examples.body(route, None),
        )
        for route in payable
        for method in sorted(route.methods)
    ]
    desk = instance().desk
    assert desk is not None  # whoever asks has looked
    credits = desk.terms.topup_credits
    return [
        *found,
        _item(examples.TOP_UP, "POST", credits, "Credits for an account", {"credits": credits}),
    ]


def _item(path: str, method: str, credits: int, about: str, body: dict[str, Any]) -> dict[str, Any]:
    found = instance()
    assert found.desk is not None  # whoever asks has looked
    told: dict[str, Any] = {"type": "http", "method": method}
    if method in ("POST", "PUT", "PATCH"):
        told |= {"bodyType": "json", "body": body}
    return {
        "resource": found.desk.url(path),
        "type": "http",
        "x402Version": wire.VERSION,
        "accepts": found.desk.accepts(credits),
        "lastUpdated": clock.rfc3339(found.settings.configured_at * 1000),
        "metadata": {"description": about, "input": told, "credits": credits},
    }
