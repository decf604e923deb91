"""Messages that wallets have signed, for pages and endpoints alike."""

from collections.abc import Callable
from typing import TypeVar

from flask import request

from blueprints.rendering import client_address, instance
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

T = TypeVar("T")

# Sign-ins of one network, with however many wallets, for one wallet's.
_WALLETS_AT_ONCE = 10


def with_message(message: str, signature: str, then: Callable[[Tx, Wallet, User, int], T]) -> T:
    """What is done for whoever signs in with a signed message, in one durable transaction.

    Raises `invalid_signature`, `signup_closed`, `account_suspended`, and `rate_limited` for a
    wallet, or a network, that signs in too often, or a network that signs too many people up.
    """
    found, now, client = instance(), clock.now_ms(), client_address(request.environ)
    wallet, nonce = messages.read(found.settings, message, signature, now)
    section, most = found.settings.instance, found.settings.limits.failed_auth_per_minute
    is_open, network = section.signup == "open", network_of(client)
    # What is refused in a transaction has others' repeated that are committed with it, so what will
    # be is found before.
    with found.db.reading() as tx:
        is_known = users.let_in(tx, wallet, is_open) is not None
        if nonces.is_used(tx, nonce):
            raise _used()
    throttle(
        (f"wallet:{network}", most * _WALLETS_AT_ONCE),
        (f"wallet:{wallet.id}", most),
        *([] if is_known else [(f"signup:{network}", most)]),
    )

    def work(tx: Tx) -> T:
        user = users.by_wallet(tx, wallet, is_open, section.signup_credits, now, client)
        _use(tx, nonce)
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
        raise _used()


def _used() -> Refusal:
    return errors.invalid_signature("This message was used before; ask for another.")
