"""A payment as its payer has signed it, and what must be right about it before it is settled."""

from typing import Any, NamedTuple

from config import Network
from core.errors import Refusal
from core.payments import wire
from core.payments.wire import Requirement
from core.wallets import Wallet

_SOON_MS = 6_000  # a signature that ends sooner may end before the network has taken it
# One that ends later keeps an outcome open for as long when nobody tells it.
_LATEST_MS = 24 * 60 * 60 * 1000
MOST_UNITS = 10**18


class Payment(NamedTuple):
    """A payment that is authentic: what is here has been signed by whoever owns the wallet."""

    key: str  # what is unique about it: the network takes another with the same for a repeat
    network: Network
    wallet: Wallet
    pays_us: bool
    amount: int  # in the token's smallest units
    valid_after: int | None  # milliseconds, where the network knows such a thing
    valid_before: int | None
    accepted: Requirement  # the requirement the client says it meets
    resource: str | None  # what the client says it pays for
    signed: dict[str, Any]  # for the facilitator: only what was read
    extra: dict[str, str]  # of the requirement it meets
    is_settleable: bool = True  # False where whoever is to pay the network's fees is nobody known

    def is_over(self, now: int) -> bool:
        """Whether the network would not take it any more, as far as the payment says."""
        return self.valid_before is not None and self.valid_before <= now


def requirement(network: Network, units: int, extra: dict[str, str]) -> dict[str, Any]:
    """What is asked for on a network, as clients and facilitators are told."""
    return {
        "scheme": wire.SCHEME,
        "network": network.id,
        "asset": network.asset,
        "amount": str(units),
        "payTo": network.pay_to,
        "maxTimeoutSeconds": wire.VALID_SECONDS,
        "extra": extra,
    }


def refused(reason: str, message: str) -> Refusal:
    """The refusal of a payment for what is wrong with it; no money moved."""
    return Refusal("payment_invalid", message, fields={"reason": reason})


def fault(payment: Payment, units: int, resource: str, now: int) -> Refusal | None:
    """Why a payment does not pay so many units for that resource, or None when it does.

    What counts is inside the signature. What the client says of it must fit too, so that nobody
    settles a payment under another name than it was made for.
    """
    network, said = payment.network, payment.accepted
    if units > MOST_UNITS:
        return refused("too_large", "This costs more than can be paid on the spot.")
    if said.scheme != wire.SCHEME:
        return refused("unsupported_scheme", f"The scheme is {wire.SCHEME}.")
    if not payment.pays_us or _plain(said.pay_to) != _plain(network.pay_to):
        return refused("wrong_recipient", f"The payment does not go to {network.pay_to}.")
    if payment.wallet.id.endswith(f":{_plain(network.pay_to)}"):
        return refused("pays_itself", "Whoever is paid cannot pay.")
    if _plain(said.asset) != _plain(network.asset):
        return refused("wrong_asset", f"The payment is not in {network.asset}.")
    if payment.amount != units or said.amount != str(units):
        return refused("wrong_amount", f"The price is {units} units, to the unit.")
    if payment.resource is not None and payment.resource != resource:
        return refused("wrong_resource", "The payment was made for another resource.")
    if not payment.is_settleable:
        return refused("wrong_fee_payer", f"{payment.extra['feePayer']} does not pay fees here.")
    if payment.valid_before is not None:
        if payment.valid_before < now + _SOON_MS:
            return refused("expired", "The payment's time is over, or all but.")
        if payment.valid_before > now + _LATEST_MS:
            return refused("valid_too_long", "The payment would be good for more than a day.")
    if payment.valid_after is not None and payment.valid_after > now:
        return refused("not_yet_valid", "The payment is not good yet.")
    return None


def _plain(address: str) -> str:
    """An address as it compares: case means nothing in one of 0x…."""
    return address.lower() if address.startswith("0x") else address
