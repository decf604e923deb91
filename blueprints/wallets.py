"""Wallets over HTTP: the message to sign, and what a signed one is good for."""

from collections.abc import Callable
from typing import TypeVar

import msgspec
from flask import Blueprint, Response, request

from blueprints.api import act, manager, managing, parsed, raw_body
from blueprints.rendering import client_address, instance, json_response
from blueprints.visitors import throttle
from core import clock, errors, users, wallets
from core.audit import Actor
from core.errors import Refusal
from core.limits import network_of
from core.session_tokens import Bearer
from core.sessions import Seat
from core.signed import messages, nonces
from core.users import User
from core.wallets import Linked, Wallet
from models import Tx

blueprint = Blueprint("wallets", __name__)

T = TypeVar("T")


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
    def work(tx: Tx, bearer: Bearer, by: Actor, now: int) -> None:
        unlinking(name, bearer.session_id or "")(tx, bearer, by, now)

    act(manager(), work)
    return Response(status=204)


# For pages and endpoints alike


def with_message(message: str, signature: str, then: Callable[[Tx, Wallet, User, int], T]) -> T:
    """What is done for whoever signs in with a signed message, in one durable transaction.

    Raises `invalid_signature`, `signup_closed`, `account_suspended`, and `rate_limited` for a
    network that signs too many people up.
    """
    found, now, client = instance(), clock.now_ms(), client_address(request.environ)
    wallet, nonce = messages.read(found.settings, message, signature, now)
    section, most = found.settings.instance, found.settings.limits.failed_auth_per_minute
    with found.db.reading() as tx:
        is_known = wallets.owner_of(tx, wallet) is not None
    if not is_known and section.signup == "open":
        throttle((f"signup:{network_of(client)}", most))

    def work(tx: Tx) -> T:
        _use(tx, nonce)
        is_open, credits = section.signup == "open", section.signup_credits
        user = users.by_wallet(tx, wallet, is_open, credits, now, client)
        users.require_active(user)
        return then(tx, wallet, user, now)

    return found.db.write(work, durable=True)


def linking(
    message: str, signature: str
) -> Callable[[Tx, Bearer | Seat, Actor, int], tuple[Linked, bool]]:
    """What links the wallet that has signed a message to the account of whoever acts: the wallet,
    and whether it is new there. Raises `invalid_signature`."""
    wallet, nonce = messages.read(instance().settings, message, signature, clock.now_ms())

    def work(tx: Tx, who: Bearer | Seat, by: Actor, now: int) -> tuple[Linked, bool]:
        user = _own(tx, who)
        _use(tx, nonce)
        is_new = users.link_wallet(tx, wallet, user, now, by)
        mine = wallets.of_account(tx, user.account_id)
        return next(each for each in mine if each.wallet.id == wallet.id), is_new

    return work


def unlinking(name: str, here: str) -> Callable[[Tx, Bearer | Seat, Actor, int], None]:
    """What unlinks a wallet of whoever acts from the session `here`. Raises `not_found`."""
    wallet = wallets.parse(name)
    if wallet is None:
        raise errors.not_found()
    providers = instance().settings.oidc_issuers

    def work(tx: Tx, who: Bearer | Seat, by: Actor, now: int) -> None:
        users.unlink_wallet(tx, wallet, _own(tx, who), providers, here, now, by)

    return work


def _own(tx: Tx, who: Bearer | Seat) -> User:
    """Whoever acts, in the account they own: a wallet signs in as the one whose account has it."""
    user = users.get(tx, who.user_id)
    if user.account_id != who.account_id:
        raise Refusal("forbidden", "A wallet belongs to the account you own, not to this one.")
    return user


def _use(tx: Tx, nonce: nonces.Nonce) -> None:
    if not nonces.use(tx, nonce):
        raise errors.invalid_signature("This message was used before; ask for another.")


def _told(found: Linked) -> dict[str, str]:
    return {"id": found.wallet.name, "created_at": clock.rfc3339(found.created_at)}
