"""Payments on Ethereum's networks: an EIP-3009 transfer authorization, signed as EIP-712 says.

Who pays, whom, how much, when and once only is all inside what the payer has signed, and is read
from nowhere else.
"""

from typing import Annotated

import msgspec

from config import Network
from config.eip55 import checksummed
from core.payments.payment import Payment, refused
from core.payments.wire import Payload, Shape, part
from core.signed.signatures import keccak, signer
from core.wallets import Wallet

Address = Annotated[str, msgspec.Meta(pattern=r"^0x[0-9a-fA-F]{40}\Z")]
Number = Annotated[str, msgspec.Meta(pattern=r"^(0|[1-9][0-9]{0,77})\Z")]
_UINT256 = 2**256
_LATEST_SECOND = 10**11  # still a date for everybody who may read it
_DOMAIN = b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
_TRANSFER = (
    b"TransferWithAuthorization(address from,address to,uint256 value,uint256 validAfter,"
    b"uint256 validBefore,bytes32 nonce)"
)


class Authorization(Shape, frozen=True):
    """EIP-3009, `transferWithAuthorization`."""

    from_: Address = msgspec.field(name="from")
    to: Address
    value: Number
    valid_after: Number
    valid_before: Number
    nonce: Annotated[str, msgspec.Meta(pattern=r"^0x[0-9a-fA-F]{64}\Z")]


class Signed(Shape, frozen=True):
    """The payload of scheme `exact` on these networks."""

    authorization: Authorization
    signature: Annotated[str, msgspec.Meta(pattern=r"^0x([0-9a-fA-F]{2}){1,2048}\Z")]


def read(network: Network, payload: Payload) -> Payment:
    """The payment, authentic: its payer has signed it, with a key of their own.

    Raises `validation_error` for what is malformed and `payment_invalid` for a signature that is
    not the payer's. Wallets that are contracts (EIP-1271) are refused: nothing here could tell
    their signatures from others'.
    """
    signed = part(payload.payload, Signed)
    told = signed.authorization
    if any(int(number) >= _UINT256 for number in (told.value, told.valid_after, told.valid_before)):
        raise refused("malformed_authorization", "A number of the authorization is too large.")
    if signer(_digest(network, told), bytes.fromhex(signed.signature[2:])) != told.from_.lower():
        raise refused("invalid_signature", "The payment is not signed by its payer.")
    nonce = told.nonce.lower()
    return Payment(
        key=":".join((network.id, network.asset.lower(), told.from_.lower(), nonce)),
        network=network,
        wallet=Wallet.of("eip155", checksummed(told.from_)),
        pays_us=told.to.lower() == network.pay_to.lower(),
        amount=int(told.value),
        valid_after=min(int(told.valid_after), _LATEST_SECOND) * 1000,
        valid_before=min(int(told.valid_before), _LATEST_SECOND) * 1000,
        accepted=payload.accepted,
        resource=None if payload.resource is None else payload.resource.url,
        signed={
            "authorization": {
                "from": told.from_,
                "to": told.to,
                "value": told.value,
                "validAfter": told.valid_after,
                "validBefore": told.valid_before,
                "nonce": nonce,
            },
            "signature": signed.signature,
        },
        extra={"name": network.asset_name, "version": network.asset_version},
    )


def _digest(network: Network, told: Authorization) -> bytes:
    """What is signed (EIP-712)."""
    domain = keccak(
        keccak(_DOMAIN)
        + keccak(network.asset_name.encode())
        + keccak(network.asset_version.encode())
        + _word(int(network.id.partition(":")[2]))
        + _word(int(network.asset, 16))
    )
    transfer = keccak(
        keccak(_TRANSFER)
        + _word(int(told.from_, 16))
        + _word(int(told.to, 16))
        + _word(int(told.value))
        + _word(int(told.valid_after))
        + _word(int(told.valid_before))
        + bytes.fromhex(told.nonce[2:])
    )
    return keccak(b"\x19\x01" + domain + transfer)


def _word(number: int) -> bytes:
    return number.to_bytes(32, "big")
