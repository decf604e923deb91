"""Wallets over HTTP: the message to sign, and what a signed one is good for."""

import msgspec
from flask import Blueprint, Response

from blueprints.api import act, manager, managing, parsed, raw_body
from blueprints.rendering import instance, json_response
from blueprints.signing import linking, unlinking
from core import clock, errors, wallets
from core.signed import messages
from core.wallets import Linked

blueprint = Blueprint("wallets", __name__)


class _Asked(msgspec.Struct, forbid_unknown_fields=True):
    wallet: str


class _SignedMessage(msgspec.Struct, forbid_unknown_fields=True):
    message: str
    signature: str


@blueprint.post("/api/v1/wallets/challenge")
def challenge() -> Response:
    """A message for a wallet to sign. Asking for one proves nothing, and nothing is kept of it."""
    wallet = wallets.parse(parsed(raw_body(), _Asked).wallet)
    if wallet is None:
        raise errors.invalid_body("Expected solana:<address> or eip155:<address>.", "wallet")
    made = messages.challenge(instance().settings, wallet, clock.now_ms())
    return json_response(made._asdict() | {"expires_at": clock.rfc3339(made.expires_at)})


@blueprint.get("/api/v1/wallets")
def linked() -> Response:
    """The wallets of the token's account."""
    account_id = manager().account_id
    with instance().db.reading() as tx:
        found = wallets.of_account(tx, account_id)
    return json_response(
        {"data": [_told(each) for each in found], "has_more": False, "next_cursor": None}
    )


@blueprint.post("/api/v1/wallets")
def link() -> Response:
    """Link the wallet that has signed a message to the person's account."""
    principal, body = managing(_SignedMessage)
    told, is_new = act(principal, linking(body.message, body.signature))
    return json_response(_told(told), 201 if is_new else 200)


@blueprint.delete("/api/v1/wallets/<name>")
def unlink(name: str) -> Response:
    principal = manager()
    assert principal.bearer is not None  # `manager` let nobody else in
    act(principal, unlinking(name, principal.bearer.session_id or ""))
    return Response(status=204)


def _told(found: Linked) -> dict[str, str]:
    return {"id": found.wallet.name, "created_at": clock.rfc3339(found.created_at)}
