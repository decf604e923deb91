"""A payment that is not exactly what was asked for is refused here: nobody is asked to settle it,
nothing is claimed, and the honest payment it was made from is still good."""

from __future__ import annotations

import base64
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import Box
from rpc_server import need
from server import Answer
from settler import BASE, BASE_SEPOLIA, SOLANA, Json, Settler, section

need("eth_account", "solders", "x402")

import payers  # noqa: E402
from payers import EvmWallet, SolanaWallet, decode, encode, offer  # noqa: E402
from solana_node import (  # noqa: E402
    ACCOUNTS_PROGRAM,
    TOKEN_PROGRAM,
    USDC,
    SolanaNode,
    token_account,
)
from solders.address_lookup_table_account import AddressLookupTableAccount  # noqa: E402
from solders.hash import Hash  # noqa: E402
from solders.instruction import AccountMeta, CompiledInstruction, Instruction  # noqa: E402
from solders.keypair import Keypair  # noqa: E402
from solders.message import MessageV0, to_bytes_versioned  # noqa: E402
from solders.pubkey import Pubkey  # noqa: E402
from solders.signature import Signature  # noqa: E402
from solders.transaction import VersionedTransaction  # noqa: E402

SMS, AGAIN, DEARER, FREE_OF_X402 = (
    "/api/v1/sms/send", "/api/v1/sms/again", "/api/v1/sms/dearer", "/api/v1/sms/credits-only",
)  # fmt: skip
TEXT = {"to": "+18148835337", "message": "hi"}
PRICE = 10_000  # a credit, in millionths of a dollar
PAYEE, SOLANA_PAYEE, ATTACKER = EvmWallet(), Keypair(), EvmWallet()
TOKEN_2022 = Pubkey.from_string("TokenzQdBNbLqP5VEhdkAS6EPFLC1PHnBqCXEpPxuEb")
SYSTEM = Pubkey.from_string("11111111111111111111111111111111")
MISSING = object()
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493


class Blockhashes:
    """What of a node a wallet needs to sign."""

    def blockhash(self) -> str:
        return str(Hash.new_unique())


NODE = cast(SolanaNode, Blockhashes())


def route(path: str, credits: int = 1, more: str = "") -> str:
    return (
        f'[[routes]]\npath = "{path}"\nmethods = ["POST"]\nupstream = "sandbox"\n'
        f'adapter = "sms"\nper = "sms_segment"\ncredits = {credits}\n{more}'
    )


CONFIG = "\n".join(
    [
        '[upstreams.sandbox]\nkind = "sandbox"',
        route(SMS), route(AGAIN), route(DEARER, 2), route(FREE_OF_X402, 1, "x402 = false\n"),
        "[limits]\nrequests_per_minute = 1000000",
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def settler() -> Iterator[Settler]:
    with Settler() as server:
        yield server


@pytest.fixture(scope="module")
def box(settler: Settler, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    pay_to = {
        BASE: PAYEE.address,
        BASE_SEPOLIA: PAYEE.address,
        SOLANA: str(SOLANA_PAYEE.pubkey()),
    }
    config = CONFIG + "\n" + section(settler, pay_to)
    with Box(tmp_path_factory.mktemp("checks") / "instance", config) as made:
        yield made


@pytest.fixture(scope="module")
def challenge(box: Box) -> Json:
    """What a stranger is told to pay for a text."""
    return asked(box, SMS)


def asked(box: Box, path: str) -> Json:
    found: Json = decode(box.post(path, value=TEXT).headers["PAYMENT-REQUIRED"])
    return found


def pay(box: Box, header: str, path: str = SMS, text: Json = TEXT, **headers: str) -> Answer:
    return box.post(path, value=text, PAYMENT_SIGNATURE=header, **headers)


def books(box: Box) -> tuple[Any, ...]:
    """Everything that paying would change."""
    return box.row(
        "SELECT (SELECT COUNT(*) FROM payment), (SELECT COUNT(*) FROM wallet),"
        " (SELECT COUNT(*) FROM account), (SELECT COUNT(*) FROM entry),"
        " (SELECT COUNT(*) FROM call), (SELECT COUNT(*) FROM idempotency)"
    )


def must_be_refused(
    box: Box, settler: Settler, sent: Json | str, reason: str | None, path: str = SMS
) -> None:
    """402 for that reason, or without one 400; and nothing has happened."""
    before = (books(box), settler.shown)
    answer = pay(box, sent if isinstance(sent, str) else encode(sent), path)
    if reason is None:
        assert (answer.status, answer.code) == (400, "validation_error"), answer.body
        assert answer.json()["param"] == "payment-signature"
        assert "PAYMENT-REQUIRED" not in answer.headers
    else:
        assert (answer.status, answer.code) == (402, "payment_invalid"), answer.body
        assert answer.json()["reason"] == reason
        # What would have been taken instead, for machines and for people.
        told = decode(answer.headers["PAYMENT-REQUIRED"])
        assert {way["network"] for way in told["accepts"]} == {BASE, BASE_SEPOLIA, SOLANA}
        assert answer.json()["accepts"] == told["accepts"]
    assert answer.headers["x-should-retry"] == "false"
    assert "PAYMENT-RESPONSE" not in answer.headers
    assert (books(box), settler.shown) == before


def must_be_taken(box: Box, settler: Settler, sent: Json | str) -> Answer:
    """It is settled, and the call served on it."""
    before = settler.settles
    answer = pay(box, sent if isinstance(sent, str) else encode(sent))
    assert answer.status == 200, answer.body
    assert decode(answer.headers["PAYMENT-RESPONSE"])["success"] is True
    assert settler.settles == before + 1
    return answer


def changed(whole: Json, **changes: Any) -> Json:
    """A copy with other values at some places (`accepted__payTo`), or without them."""
    found = copy.deepcopy(whole)
    for place, value in changes.items():
        *way, last = place.split("__")
        table = found
        for name in way:
            table = table[name]
        if value is MISSING:
            del table[last]
        else:
            table[last] = value
    return found


class EvmBid:
    """An honest payment on Base, and what can be made of it."""

    def __init__(self, challenge: Json, wallet: EvmWallet | None = None) -> None:
        self.challenge = challenge
        self.wallet = wallet or EvmWallet()
        self.good = self.wallet.payment(challenge)
        self.told: Json = self.good["payload"]["authorization"]
        self.signature: str = self.good["payload"]["signature"]

    def say(self, **changes: Any) -> Json:
        """The same, with other words about it."""
        return changed(self.good, **changes)

    def forge(self, **changes: Any) -> Json:
        """Changed after it was signed."""
        places = {f"payload__authorization__{name}": value for name, value in changes.items()}
        return changed(self.good, **places)

    def sign(
        self, *, domain: Json | None = None, by: EvmWallet | None = None, **changes: Any
    ) -> Json:
        """Changed before it was signed: `from_` for `from`."""
        if "from_" in changes:
            changes["from"] = changes.pop("from_")
        told = self.told | changes
        signature = (by or self.wallet).sign(told, **domain or {})
        return changed(self.good, payload={"authorization": told, "signature": signature})

    def signature_of(self, raw: bytes) -> Json:
        return changed(self.good, payload__signature=f"0x{raw.hex()}")

    @property
    def raw(self) -> bytes:
        return bytes.fromhex(self.signature[2:])

    def text(self, old: str, new: str) -> str:
        """The header with something else in its JSON, which need not be any after that."""
        whole = json.dumps(self.good)
        assert whole.count(old) == 1, (old, whole)
        return base64.b64encode(whole.replace(old, new).encode()).decode()

    def number(self, name: str, written: str) -> Json:
        """A number of the authorization in another writing, signed as the number it is."""
        told = self.told | {name: written}
        plain = self.told | {name: str(int(written))}
        payload = {"authorization": told, "signature": self.wallet.sign(plain)}
        return changed(self.good, payload=payload)


def now(seconds: int) -> str:
    return str(int(time.time()) + seconds)


def twin(raw: bytes) -> bytes:
    """The other signature that the same key makes of the same words."""
    s = int.from_bytes(raw[32:64], "big")
    return raw[:32] + (ORDER - s).to_bytes(32, "big") + bytes([55 - raw[64]])


EvmMutant = Callable[[EvmBid], Json | str]

# Made from an honest payment · why it is refused; None for what is malformed.
ON_EVM: dict[str, tuple[EvmMutant, str | None]] = {
    # How much.
    "a unit short": (lambda b: b.sign(value=str(PRICE - 1)), "wrong_amount"),
    "a unit more": (lambda b: b.sign(value=str(PRICE + 1)), "wrong_amount"),
    "nothing": (lambda b: b.sign(value="0"), "wrong_amount"),
    "a unit short, and says so": (
        lambda b: changed(b.sign(value=str(PRICE - 1)), accepted__amount=str(PRICE - 1)),
        "wrong_amount",
    ),
    "says a smaller price": (lambda b: b.say(accepted__amount="1"), "wrong_amount"),
    "says a greater price": (lambda b: b.say(accepted__amount="50000"), "wrong_amount"),
    "in cents": (lambda b: b.sign(value="1"), "wrong_amount"),
    "as if of 18 decimals": (lambda b: b.sign(value=str(10**16)), "wrong_amount"),
    "more than there is": (lambda b: b.sign(value=str(2**256 - 1)), "wrong_amount"),
    "value changed": (lambda b: b.forge(value=str(PRICE * 5)), "invalid_signature"),
    "value beyond 256 bits": (
        lambda b: b.forge(value=str(2**256 + PRICE)), "malformed_authorization",
    ),
    "value of 2^256": (lambda b: b.forge(value=str(2**256)), "malformed_authorization"),
    "a beginning of 2^256": (
        lambda b: b.forge(validAfter=str(2**256)), "malformed_authorization",
    ),
    "an end of 2^256": (lambda b: b.forge(validBefore=str(2**256)), "malformed_authorization"),
    # In what, where.
    "says another token": (lambda b: b.say(accepted__asset=ATTACKER.address), "wrong_asset"),
    "signed for another token": (
        lambda b: b.sign(domain={"verifyingContract": ATTACKER.address}), "invalid_signature",
    ),
    "signed for another chain": (lambda b: b.sign(domain={"chainId": 1}), "invalid_signature"),
    "signed for another name": (lambda b: b.sign(domain={"name": "USDC"}), "invalid_signature"),
    "signed for another version": (lambda b: b.sign(domain={"version": "1"}), "invalid_signature"),
    "on another network of ours": (
        lambda b: b.say(accepted__network=BASE_SEPOLIA), "invalid_signature",
    ),
    "on a network of another kind": (lambda b: b.say(accepted__network=SOLANA), None),
    "on a network that is not ours": (
        lambda b: b.say(accepted__network="eip155:1"), "unknown_network",
    ),
    "on the same network by another name": (
        lambda b: b.say(accepted__network="base"), "unknown_network",
    ),
    "on a network with a leading zero": (
        lambda b: b.say(accepted__network="eip155:08453"), "unknown_network",
    ),
    # To whom.
    "says it goes to somebody else": (
        lambda b: b.say(accepted__payTo=ATTACKER.address), "wrong_recipient",
    ),
    "goes to somebody else": (lambda b: b.sign(to=ATTACKER.address), "wrong_recipient"),
    "goes to somebody else, and says so": (
        lambda b: changed(b.sign(to=ATTACKER.address), accepted__payTo=ATTACKER.address),
        "wrong_recipient",
    ),
    "recipient changed": (lambda b: b.forge(to=ATTACKER.address), "invalid_signature"),
    "goes to nobody": (lambda b: b.sign(to="0x" + "0" * 40), "wrong_recipient"),
    "goes to the token": (
        lambda b: b.sign(to=offer(b.challenge, BASE)["asset"]), "wrong_recipient",
    ),
    "goes back to the payer": (lambda b: b.sign(to=b.wallet.address), "wrong_recipient"),
    "pays itself": (lambda b: b.sign(from_=PAYEE.address, by=PAYEE), "pays_itself"),
    # When.
    "expired": (lambda b: b.sign(validBefore=now(-1)), "expired"),
    "expired long ago": (lambda b: b.sign(validBefore="1"), "expired"),
    "expires in two seconds": (lambda b: b.sign(validBefore=now(2)), "expired"),
    "good for a year": (lambda b: b.sign(validBefore=now(365 * 86_400)), "valid_too_long"),
    "good for ever": (lambda b: b.sign(validBefore=str(2**256 - 1)), "valid_too_long"),
    "not good yet": (lambda b: b.sign(validAfter=now(60)), "not_yet_valid"),
    "never good": (
        lambda b: b.sign(validAfter=str(2**256 - 1), validBefore=now(60)), "not_yet_valid",
    ),
    "in milliseconds": (
        lambda b: b.sign(validBefore=str(int(time.time() + 60) * 1000)), "valid_too_long",
    ),
    "end changed": (lambda b: b.forge(validBefore=now(3600)), "invalid_signature"),
    "beginning changed": (lambda b: b.forge(validAfter="1"), "invalid_signature"),
    "nonce changed": (lambda b: b.forge(nonce=f"0x{os.urandom(32).hex()}"), "invalid_signature"),
    # By whom.
    "payer changed": (lambda b: b.forge(**{"from": ATTACKER.address}), "invalid_signature"),
    "signed by somebody else": (lambda b: b.sign(by=ATTACKER), "invalid_signature"),
    "the signature's twin": (lambda b: b.signature_of(twin(b.raw)), "invalid_signature"),
    "v as a parity of 0 or 1": (
        lambda b: b.signature_of(b.raw[:64] + bytes([b.raw[64] - 27])), "invalid_signature",
    ),
    "v of the other parity": (
        lambda b: b.signature_of(b.raw[:64] + bytes([55 - b.raw[64]])), "invalid_signature",
    ),
    "v = 29": (lambda b: b.signature_of(b.raw[:64] + b"\x1d"), "invalid_signature"),
    "v = 31": (lambda b: b.signature_of(b.raw[:64] + b"\x1f"), "invalid_signature"),
    "64 bytes": (lambda b: b.signature_of(b.raw[:64]), "invalid_signature"),
    "66 bytes": (lambda b: b.signature_of(b.raw + b"\x00"), "invalid_signature"),
    "one byte": (lambda b: b.signature_of(b"\x00"), "invalid_signature"),
    "a signature of zeros": (lambda b: b.signature_of(bytes(64) + b"\x1b"), "invalid_signature"),
    "r is no point": (
        lambda b: b.signature_of(b"\xff" * 32 + b.raw[32:]), "invalid_signature",
    ),
    "s = 0": (lambda b: b.signature_of(b.raw[:32] + bytes(32) + b"\x1b"), "invalid_signature"),
    "a contract's signature": (
        lambda b: b.signature_of(os.urandom(65 + 96)), "invalid_signature",
    ),
    "a contract's that is not there yet": (
        lambda b: b.signature_of(os.urandom(320) + bytes.fromhex("6492" * 16)),
        "invalid_signature",
    ),
    "two signatures": (lambda b: b.signature_of(b.raw + b.raw), "invalid_signature"),
    "no signature": (lambda b: b.say(payload__signature="0x"), None),
    "half a byte": (lambda b: b.say(payload__signature=b.signature[:-1]), None),
    "a signature without 0x": (lambda b: b.say(payload__signature=b.signature[2:]), None),
    "a signature with a line's end": (lambda b: b.say(payload__signature=b.signature + "\n"), None),
    "a signature of kilobytes": (lambda b: b.say(payload__signature="0x" + "00" * 2049), None),
    "a signature that is null": (lambda b: b.say(payload__signature=None), None),
    # For what.
    "for another site": (
        lambda b: b.say(resource__url="https://evil.example/api/v1/sms/send"), "wrong_resource",
    ),
    "for another of our routes": (
        lambda b: b.say(resource__url=b.challenge["resource"]["url"].replace(SMS, AGAIN)),
        "wrong_resource",
    ),
    "for the route with a query": (
        lambda b: b.say(resource__url=b.challenge["resource"]["url"] + "?x=1"), "wrong_resource",
    ),
    "for nothing": (lambda b: b.say(resource__url=""), "wrong_resource"),
    "for a number": (lambda b: b.say(resource__url=7), None),
    "scheme upto": (lambda b: b.say(accepted__scheme="upto"), "unsupported_scheme"),
    "scheme in capitals": (lambda b: b.say(accepted__scheme="EXACT"), "unsupported_scheme"),
    # In another writing.
    "version 1": (lambda b: b.say(x402Version=1), "unsupported_version"),
    "version 3": (lambda b: b.say(x402Version=3), "unsupported_version"),
    'version "2"': (lambda b: b.say(x402Version="2"), None),
    "version 2.0": (lambda b: b.say(x402Version=2.0), None),
    "version true": (lambda b: b.say(x402Version=True), None),
    "no version": (lambda b: b.say(x402Version=MISSING), None),
    "a negative value": (lambda b: b.forge(value=f"-{PRICE}"), None),
    "a value with a point": (lambda b: b.forge(value=f"{PRICE}.0"), None),
    "a value with an exponent": (lambda b: b.forge(value="1e4"), None),
    "a hexadecimal value": (lambda b: b.forge(value=hex(PRICE)), None),
    "a value that is a number": (lambda b: b.forge(value=PRICE), None),
    "a value of 79 digits": (lambda b: b.forge(value="1" * 79), None),
    "a value of a million digits": (lambda b: b.forge(value="9" * 8_000), None),
    "an empty value": (lambda b: b.forge(value=""), None),
    "a value with _": (lambda b: b.number("value", "1_0000"), None),
    "a value with +": (lambda b: b.number("value", "+10000"), None),
    "a value with a leading zero": (lambda b: b.number("value", "010000"), None),
    "a value with spaces": (lambda b: b.number("value", " 10000 "), None),
    "a value with a line's end": (lambda b: b.number("value", "10000\n"), None),
    "a value in Arabic digits": (lambda b: b.number("value", "١٠٠٠٠"), None),
    "an end in full-width digits": (
        lambda b: b.number("validBefore", "".join(chr(0xFF10 + int(d)) for d in now(60))), None,
    ),
    "a beginning with a leading zero": (lambda b: b.number("validAfter", "00"), None),
    "says a price with _": (lambda b: b.say(accepted__amount="10_000"), "wrong_amount"),
    "says a price with a leading zero": (
        lambda b: b.say(accepted__amount="010000"), "wrong_amount",
    ),
    "says a price in Arabic digits": (
        lambda b: b.say(accepted__amount="١٠٠٠٠"), "wrong_amount",
    ),
    "says a price that is a number": (lambda b: b.say(accepted__amount=PRICE), None),
    "a time-out that is NaN": (
        lambda b: b.text('"maxTimeoutSeconds": 120', '"maxTimeoutSeconds": NaN'), None,
    ),
    "a version that is infinite": (
        lambda b: b.text('"x402Version": 2', '"x402Version": 1e999'), None,
    ),
    "a payer that is no address": (lambda b: b.forge(**{"from": "vitalik.eth"}), None),
    "a payer with 39 digits": (lambda b: b.forge(**{"from": b.wallet.address[:-1]}), None),
    "a payer with 41 digits": (lambda b: b.forge(**{"from": b.wallet.address + "0"}), None),
    "a payer of 32 bytes": (
        lambda b: b.forge(**{"from": "0x" + "0" * 24 + b.wallet.address[2:]}), None,
    ),
    "a payer with 0X": (lambda b: b.forge(**{"from": "0X" + b.wallet.address[2:]}), None),
    "a payer and a line's end": (lambda b: b.forge(**{"from": b.wallet.address + "\n"}), None),
    "a nonce of 31 bytes": (lambda b: b.forge(nonce=b.told["nonce"][:-2]), None),
    "a nonce of 33 bytes": (lambda b: b.forge(nonce=b.told["nonce"] + "00"), None),
    "no nonce": (lambda b: b.forge(nonce=MISSING), None),
    "no recipient": (lambda b: b.forge(to=MISSING), None),
    "no end": (lambda b: b.forge(validBefore=MISSING), None),
    "no authorization": (lambda b: b.say(payload__authorization=MISSING), None),
    "an authorization in a list": (lambda b: b.say(payload__authorization=[b.told]), None),
    "another kind of authorization": (
        lambda b: b.say(payload={"permit2Authorization": b.told, "signature": b.signature}), None,
    ),
    "no payload": (lambda b: b.say(payload=MISSING), None),
    "a payload that is null": (lambda b: b.say(payload=None), None),
    "a payload that is text": (lambda b: b.say(payload=json.dumps(b.good["payload"])), None),
    "no offer": (lambda b: b.say(accepted=MISSING), None),
    "an offer in a list": (lambda b: b.say(accepted=[b.good["accepted"]]), None),
    "all of the offers": (lambda b: b.say(accepted=b.challenge["accepts"]), None),
    "an offer without recipient": (lambda b: b.say(accepted__payTo=MISSING), None),
    "a payment in a list": (lambda b: encode([b.good]), None),
    # The price twice: whoever reads the first and whoever reads the last must not differ.
    "a value twice, the wrong one last": (
        lambda b: b.text(f'"value": "{PRICE}"', f'"value": "{PRICE}", "value": "1"'),
        "invalid_signature",
    ),
    "an offer twice, the wrong one last": (
        lambda b: b.text(f'"amount": "{PRICE}"', f'"amount": "{PRICE}", "amount": "1"'),
        "wrong_amount",
    ),
    "a name written with an escape": (
        lambda b: b.text('"value": "', '"value": "1", "v\\u0061lue": "2'), "invalid_signature",
    ),
    "a recipient twice, the wrong one last": (
        lambda b: b.text(
            f'"to": "{PAYEE.address}"',
            f'"to": "{PAYEE.address}", "to": "{ATTACKER.address}"',
        ),
        "invalid_signature",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_EVM)
def test_a_payment_on_an_ethereum_network_must_be_what_was_asked(
    box: Box, settler: Settler, challenge: Json, name: str
) -> None:
    make, reason = ON_EVM[name]
    bid = EvmBid(challenge)
    must_be_refused(box, settler, make(bid), reason)
    must_be_taken(box, settler, bid.good)


def test_the_tables_of_wrong_payments_are_long() -> None:
    assert len(ON_EVM) + len(ON_SOLANA) + len(AS_BYTES) >= 150


# The header, as bytes.


def _padded(bid: EvmBid, size: int) -> str:
    text = json.dumps(bid.good)
    return base64.b64encode(text.ljust(size).encode()).decode()


AS_BYTES: dict[str, EvmMutant] = {
    "nothing": lambda b: "",
    "not base64": lambda b: json.dumps(b.good),
    "a word": lambda b: "null",
    "base64 of nothing": lambda b: "====",
    "base64 without its padding": lambda b: _padded(b, 2000).rstrip("="),
    "base64 for addresses": lambda b: base64.urlsafe_b64encode(
        json.dumps(b.good).replace('"USD Coin"', '"???>>>~~~"').encode()
    ).decode(),
    "a space before": lambda b: f" {encode(b.good)}",
    "a space within": lambda b: f"{encode(b.good)[:40]} {encode(b.good)[40:]}",
    "a tab within": lambda b: f"{encode(b.good)[:40]}\t{encode(b.good)[40:]}",
    "a line's end after": lambda b: f"{encode(b.good)}\n",
    "sent twice": lambda b: f"{encode(b.good)},{encode(b.good)}",
    "sent twice, with a space": lambda b: f"{encode(b.good)}, {encode(b.good)}",
    "one after the other": lambda b: f"{_padded(b, 3000)}{_padded(b, 3000)}",
    "letters of Latin-1": lambda b: f"{encode(b.good)}é",
    "13 KiB": lambda b: _padded(b, 10_000),
    "over by one group": lambda b: _padded(b, 9_217),
    "a payload nested deep": lambda b: b.text('"payload": {', f'"payload": {"[" * 3000}{{'),
    "two values": lambda b: base64.b64encode(json.dumps(b.good).encode() * 2).decode(),
    "a byte order mark": lambda b: base64.b64encode(
        b"\xef\xbb\xbf" + json.dumps(b.good).encode()
    ).decode(),
    "UTF-16": lambda b: base64.b64encode(json.dumps(b.good).encode("utf-16")).decode(),
    "half a character": lambda b: base64.b64encode(
        json.dumps(b.good).encode().replace(b'"exact"', b'"exac\xf4"')
    ).decode(),
    "a lone surrogate": lambda b: b.text('"scheme": "exact"', '"scheme": "\\ud800"'),
    "a NUL": lambda b: base64.b64encode(json.dumps(b.good).encode() + b"\x00").decode(),
    "a comment": lambda b: base64.b64encode(json.dumps(b.good).encode() + b"//x").decode(),
    "a comma at the end": lambda b: base64.b64encode(
        json.dumps(b.good).encode()[:-1] + b",}"
    ).decode(),
    "cut short": lambda b: encode(b.good)[:400],
    "base64 twice": lambda b: base64.b64encode(encode(b.good).encode()).decode(),
    "null": lambda b: encode(None),
    "a number": lambda b: encode(2),
    "a text": lambda b: encode("x402"),
    "an empty object": lambda b: encode({}),
}


@pytest.mark.parametrize("name", AS_BYTES)
def test_a_header_that_is_no_payment_is_malformed(
    box: Box, settler: Settler, challenge: Json, name: str
) -> None:
    bid = EvmBid(challenge)
    must_be_refused(box, settler, AS_BYTES[name](bid), None)


def test_a_field_nobody_reads_may_be_nested_deep(
    box: Box, settler: Settler, challenge: Json
) -> None:
    """How deep it may be depends on the machine's stack; how it ends does not."""
    for depth in (100, 1_000, 4_000):
        bid = EvmBid(challenge)
        before = settler.settles
        sent = bid.text('"name": "USD Coin"', f'"name": {"[" * depth}{"]" * depth}')
        answer = pay(box, sent)
        assert answer.status in (200, 400), answer.body
        assert settler.settles == before + (answer.status == 200)


def test_a_header_of_exactly_the_longest_size_is_read(
    box: Box, settler: Settler, challenge: Json
) -> None:
    header = _padded(EvmBid(challenge), 9_216)
    assert len(header) == 12 * 1024
    must_be_taken(box, settler, header)


# What is as good.

HARMLESS: dict[str, EvmMutant] = {
    "addresses in small letters": lambda b: changed(
        b.good,
        payload__authorization=b.told
        | {"from": b.told["from"].lower(), "to": b.told["to"].lower()},
        accepted__asset=b.good["accepted"]["asset"].lower(),
        accepted__payTo=b.good["accepted"]["payTo"].lower(),
    ),
    "addresses in capitals": lambda b: b.forge(
        **{"from": f"0x{b.told['from'][2:].upper()}", "to": f"0x{b.told['to'][2:].upper()}"}
    ),
    "a nonce and signature in capitals": lambda b: changed(
        b.forge(nonce=f"0x{b.told['nonce'][2:].upper()}"),
        payload__signature=f"0x{b.signature[2:].upper()}",
    ),
    "no resource": lambda b: b.say(resource=MISSING),
    "fields nobody knows": lambda b: b.say(
        extensions={"x": 1}, payload__more=1, accepted__more=[1], resource__more={}
    ),
    "other extras": lambda b: b.say(accepted__extra={"name": "Other", "feePayer": "x"}),
    "extras in a list": lambda b: b.say(accepted__extra=[None]),
    "no extras": lambda b: b.say(accepted__extra=MISSING),
    "another time-out": lambda b: b.say(accepted__maxTimeoutSeconds="for ever"),
    "a value twice, the right one last": lambda b: b.text(
        f'"value": "{PRICE}"', f'"value": "1", "value": "{PRICE}"'
    ),
    "a payload twice, the right one last": lambda b: b.text(
        '"payload": {', f'"payload": {json.dumps(b.sign(value="1")["payload"])}, "payload": {{'
    ),
    "ends in ten seconds": lambda b: b.sign(validBefore=now(10)),
    "ends almost in a day": lambda b: b.sign(validBefore=now(86_390)),
    "begins now": lambda b: b.sign(validAfter=now(-1)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_handed_on_is_what_was_checked_and_nothing_else(
    box: Box, settler: Settler, challenge: Json, name: str
) -> None:
    bid = EvmBid(challenge)
    sent = HARMLESS[name](bid)
    must_be_taken(box, settler, sent)

    (body,) = [hit.body for hit in settler.hits("/settle")[-1:]]
    told = json.loads(body, object_pairs_hook=no_name_twice)
    payment = told["paymentPayload"]
    assert told.keys() == {"x402Version", "paymentPayload", "paymentRequirements"}
    assert payment.keys() == {"x402Version", "accepted", "payload", "resource"}
    ours = offer(challenge, BASE)
    assert payment["accepted"] == told["paymentRequirements"] == ours
    assert payment["resource"] == {"url": challenge["resource"]["url"]}
    assert payment["payload"].keys() == {"authorization", "signature"}
    given = payment["payload"]["authorization"]
    assert given.keys() == {"from", "to", "value", "validAfter", "validBefore", "nonce"}
    assert given["value"] == str(PRICE)
    assert given["to"].lower() == PAYEE.address.lower()
    assert given["from"].lower() == bid.wallet.address.lower()
    assert payment["payload"]["signature"].startswith("0x")


def no_name_twice(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    assert len(found) == len(pairs), pairs
    return found


# Solana.


class SolanaBid:
    """An honest payment on Solana, and what can be made of it."""

    def __init__(self, challenge: Json, wallet: SolanaWallet | None = None) -> None:
        self.challenge = challenge
        self.wallet = wallet or SolanaWallet(NODE)
        self.offer = offer(challenge, SOLANA)
        self.good = self.wallet.payment(challenge)

    @property
    def me(self) -> Pubkey:
        return self.wallet.keypair.pubkey()

    @property
    def transaction(self) -> bytes:
        return base64.b64decode(self.good["payload"]["transaction"])

    def say(self, **changes: Any) -> Json:
        return changed(self.good, **changes)

    def raw(self, data: bytes) -> Json:
        return self.say(payload__transaction=base64.b64encode(data).decode())

    def move(self, **changes: Any) -> Json:
        """Another transfer, signed."""
        return self.wallet.payment(self.challenge, transfer=changes)

    def do(self, *instructions: Instruction, **options: Any) -> Json:
        """These in place of what an honest payer would do, signed."""
        fee_payer = options.pop("fee_payer", None)
        return self.wallet.payment(
            self.challenge, instructions=instructions, transaction=options, fee_payer=fee_payer
        )

    def beside(self, *instructions: Instruction, **options: Any) -> Json:
        """The honest transfer, and these."""
        return self.do(self.pays(), *instructions, **options)

    def pays(self, **changes: Any) -> Instruction:
        return self.wallet.transfer(self.offer, **changes)

    def token(self, data: bytes, *accounts: tuple[Pubkey, bool]) -> Instruction:
        """An instruction of the Token program: accounts, and whether they sign."""
        metas = [AccountMeta(where, signs, is_writable=True) for where, signs in accounts]
        return Instruction(TOKEN_PROGRAM, data, metas)

    @property
    def mine(self) -> Pubkey:
        return token_account(self.me)

    @property
    def theirs(self) -> Pubkey:
        return token_account(self.offer["payTo"])

    @property
    def mint(self) -> Pubkey:
        return Pubkey.from_string(USDC)

    def signature(self, made: Signature) -> Json:
        found = VersionedTransaction.from_bytes(self.transaction)
        return self.raw(
            bytes(VersionedTransaction.populate(found.message, [found.signatures[0], made]))
        )

    def message(self) -> bytes:
        return to_bytes_versioned(VersionedTransaction.from_bytes(self.transaction).message)


OTHER_MINT = Keypair().pubkey()
SOMEBODY = Keypair()
AMOUNT = PRICE.to_bytes(8, "little")


def own(program: Pubkey, *signers: Pubkey) -> Instruction:
    return Instruction(program, b"\x01", [AccountMeta(key, True, False) for key in signers])


def token_2022_account(owner: Pubkey) -> Pubkey:
    seeds = [bytes(owner), bytes(TOKEN_2022), bytes(Pubkey.from_string(USDC))]
    return Pubkey.find_program_address(seeds, ACCOUNTS_PROGRAM)[0]


def system_transfer(source: Pubkey, to: Pubkey) -> Instruction:
    data = (2).to_bytes(4, "little") + (1).to_bytes(8, "little")
    return Instruction(
        SYSTEM, data, [AccountMeta(source, True, True), AccountMeta(to, False, True)]
    )


def nonce_advance(authority: Pubkey) -> Instruction:
    recent = Pubkey.from_string("SysvarRecentB1ockHashes11111111111111111111")
    account = Keypair().pubkey()
    metas = [
        AccountMeta(account, False, True), AccountMeta(recent, False, False),
        AccountMeta(authority, True, False),
    ]  # fmt: skip
    return Instruction(SYSTEM, (4).to_bytes(4, "little"), metas)


def small_order(bid: SolanaBid) -> Json:
    """Paid by the neutral point, for which R and s = 0 sign everything to whoever is not strict."""
    nobody = Pubkey(bytes([1]) + bytes(31))
    made = bid.wallet.transaction(
        [bid.pays(authority=nobody, source=token_account(nobody))], bid.offer["extra"]["feePayer"]
    )
    found = VersionedTransaction.from_bytes(base64.b64decode(made))
    signature = Signature.from_bytes(bytes([1]) + bytes(63))
    signed = VersionedTransaction.populate(found.message, [found.signatures[0], signature])
    return bid.raw(bytes(signed))


def ed25519_twin(bid: SolanaBid) -> Json:
    raw = bytes(VersionedTransaction.from_bytes(bid.transaction).signatures[1])
    s = int.from_bytes(raw[32:], "little") + ED25519_ORDER
    return bid.signature(Signature.from_bytes(raw[:32] + s.to_bytes(32, "little")))


def by_table(bid: SolanaBid) -> Json:
    hidden = AddressLookupTableAccount(Keypair().pubkey(), [bid.theirs, bid.mint])
    return bid.do(bid.pays(), tables=[hidden])


def beyond(bid: SolanaBid, program: bool) -> Json:
    """An instruction that names an account which is not there: its program, or another."""
    message = VersionedTransaction.from_bytes(bid.transaction).message
    assert isinstance(message, MessageV0)
    *others, memo = message.instructions
    wrong = (
        CompiledInstruction(len(message.account_keys), memo.data, memo.accounts)
        if program
        else CompiledInstruction(
            memo.program_id_index, memo.data, bytes([len(message.account_keys)])
        )
    )
    made = MessageV0(
        message.header, message.account_keys, message.recent_blockhash, [*others, wrong], []
    )
    signature = bid.wallet.keypair.sign_message(to_bytes_versioned(made))
    return bid.raw(bytes(VersionedTransaction.populate(made, [Signature.default(), signature])))


def with_paid_memo(bid: SolanaBid, size: int) -> Json:
    return bid.beside(bid.wallet.memo("x" * size))


def of_size(bid: SolanaBid, size: int) -> Json:
    """A transaction of exactly so many bytes."""
    # 128 is the least length that is written in two bytes.
    made = with_paid_memo(bid, 200)
    short = size - len(base64.b64decode(made["payload"]["transaction"]))
    made = with_paid_memo(bid, 200 + short)
    assert len(base64.b64decode(made["payload"]["transaction"])) == size
    return made


SolanaMutant = Callable[[SolanaBid], Json | str]

ON_SOLANA: dict[str, tuple[SolanaMutant, str | None]] = {
    # How much.
    "a unit short": (lambda b: b.move(amount=PRICE - 1), "wrong_amount"),
    "a unit more": (lambda b: b.move(amount=PRICE + 1), "wrong_amount"),
    "nothing": (lambda b: b.move(amount=0), "wrong_amount"),
    "all there can be": (lambda b: b.move(amount=2**64 - 1), "wrong_amount"),
    "says a smaller price": (lambda b: b.say(accepted__amount="1"), "wrong_amount"),
    "nine decimals": (lambda b: b.move(decimals=9), "wrong_decimals"),
    "no decimals": (lambda b: b.move(decimals=0), "wrong_decimals"),
    # In what.
    "another mint": (lambda b: b.move(mint=str(OTHER_MINT)), "wrong_asset"),
    "another mint, and says so": (
        lambda b: changed(b.move(mint=str(OTHER_MINT)), accepted__asset=str(OTHER_MINT)),
        "wrong_asset",
    ),
    "another mint between the right accounts": (
        lambda b: b.move(mint=str(OTHER_MINT), source=b.mine, destination=b.theirs),
        "wrong_asset",
    ),
    "says another mint": (lambda b: b.say(accepted__asset=str(OTHER_MINT)), "wrong_asset"),
    "says the mint in small letters": (
        lambda b: b.say(accepted__asset=USDC.lower()), "wrong_asset",
    ),
    # To whom.
    "to somebody else": (lambda b: b.move(to=str(SOMEBODY.pubkey())), "wrong_recipient"),
    "to somebody else, and says so": (
        lambda b: changed(
            b.move(to=str(SOMEBODY.pubkey())), accepted__payTo=str(SOMEBODY.pubkey())
        ),
        "wrong_recipient",
    ),
    "to another account": (lambda b: b.move(destination=Keypair().pubkey()), "wrong_recipient"),
    "to the owner in place of the tokens' account": (
        lambda b: b.move(destination=SOLANA_PAYEE.pubkey()), "wrong_recipient",
    ),
    "to the payer's own account": (lambda b: b.move(destination=b.mine), "wrong_recipient"),
    "to the account of another mint": (
        lambda b: b.move(destination=token_account(b.offer["payTo"], OTHER_MINT)),
        "wrong_recipient",
    ),
    "says it goes to somebody else": (
        lambda b: b.say(accepted__payTo=str(SOMEBODY.pubkey())), "wrong_recipient",
    ),
    "says it goes to us in small letters": (
        lambda b: b.say(accepted__payTo=b.offer["payTo"].lower()), "wrong_recipient",
    ),
    "from the account that is paid": (lambda b: b.move(source=b.theirs), "wrong_recipient"),
    "pays itself": (
        lambda b: SolanaWallet(NODE, SOLANA_PAYEE).payment(
            b.challenge, transfer={"source": Keypair().pubkey()}
        ),
        "pays_itself",
    ),
    # What else it does.
    "two transfers": (lambda b: b.beside(b.pays(amount=1)), "not_one_transfer"),
    "the same transfer twice": (lambda b: b.beside(b.pays()), "not_one_transfer"),
    "a second transfer back": (
        lambda b: b.beside(b.pays(source=b.theirs, destination=b.mine)), "not_one_transfer",
    ),
    "no transfer": (
        lambda b: b.do(b.wallet.memo(), own(payers.MEMO_PROGRAM, b.me)), "not_one_transfer",
    ),
    "no instruction": (lambda b: b.do(), "not_one_transfer"),
    "a plain Transfer": (
        lambda b: b.do(
            b.token(b"\x03" + AMOUNT, (b.mine, False), (b.theirs, False), (b.me, True))
        ),
        "not_a_transfer",
    ),
    "a plain Transfer with the mint": (
        lambda b: b.do(
            b.token(
                b"\x03" + AMOUNT + b"\x06",
                (b.mine, False), (b.mint, False), (b.theirs, False), (b.me, True),
            )
        ),
        "not_a_transfer",
    ),
    "an approval beside": (
        lambda b: b.beside(
            b.token(b"\x04" + AMOUNT, (b.mine, False), (b.theirs, False), (b.me, True))
        ),
        "not_a_transfer",
    ),
    "an approval in its place": (
        lambda b: b.do(
            b.token(
                b"\x0d" + AMOUNT + b"\x06",
                (b.mine, False), (b.mint, False), (b.theirs, False), (b.me, True),
            )
        ),
        "not_a_transfer",
    ),
    "a burning in its place": (
        lambda b: b.do(
            b.token(
                b"\x0f" + AMOUNT + b"\x06",
                (b.mine, False), (b.mint, False), (b.theirs, False), (b.me, True),
            )
        ),
        "not_a_transfer",
    ),
    "an authority set": (
        lambda b: b.beside(
            b.token(b"\x06\x02\x01" + bytes(SOMEBODY.pubkey()), (b.theirs, False), (b.me, True))
        ),
        "not_a_transfer",
    ),
    "the account closed": (
        lambda b: b.beside(b.token(b"\x09", (b.mine, False), (b.me, False), (b.me, True))),
        "not_a_transfer",
    ),
    "an instruction without data": (
        lambda b: b.do(b.token(b"", (b.mine, False))), "not_a_transfer",
    ),
    "a byte too many": (
        lambda b: b.do(
            b.token(
                b"\x0c" + AMOUNT + b"\x06\x00",
                (b.mine, False), (b.mint, False), (b.theirs, False), (b.me, True),
            )
        ),
        "not_a_transfer",
    ),
    "a byte too few": (
        lambda b: b.do(
            b.token(
                b"\x0c" + AMOUNT,
                (b.mine, False), (b.mint, False), (b.theirs, False), (b.me, True),
            )
        ),
        "not_a_transfer",
    ),
    "an authority of several": (
        lambda b: b.do(
            b.token(
                b"\x0c" + AMOUNT + b"\x06",
                (b.mine, False), (b.mint, False), (b.theirs, False),
                (SOMEBODY.pubkey(), False), (b.me, True),
            )
        ),
        "not_a_transfer",
    ),
    "no authority": (
        lambda b: b.do(
            b.token(
                b"\x0c" + AMOUNT + b"\x06", (b.mine, False), (b.mint, False), (b.theirs, False)
            )
        ),
        "not_a_transfer",
    ),
    "an authority that does not sign": (
        lambda b: b.do(
            b.token(
                b"\x0c" + AMOUNT + b"\x06",
                (b.mine, False), (b.mint, False), (b.theirs, False), (SOMEBODY.pubkey(), False),
            ),
            own(payers.MEMO_PROGRAM, b.me),
        ),
        "wrong_signers",
    ),
    "the younger Token program": (lambda b: b.move(program=TOKEN_2022), "wrong_token_program"),
    "the younger Token program, with its own accounts": (
        lambda b: b.move(
            program=TOKEN_2022,
            source=token_2022_account(b.me),
            destination=token_2022_account(SOLANA_PAYEE.pubkey()),
        ),
        "wrong_token_program",
    ),
    "the younger Token program beside": (
        lambda b: b.beside(b.pays(program=TOKEN_2022)), "wrong_token_program",
    ),
    "some SOL beside": (
        lambda b: b.beside(system_transfer(b.me, SOMEBODY.pubkey())), "unknown_instruction",
    ),
    "some of the facilitator's SOL": (
        lambda b: b.beside(
            system_transfer(Pubkey.from_string(b.offer["extra"]["feePayer"]), b.me)
        ),
        "unknown_instruction",
    ),
    "a program nobody knows": (
        lambda b: b.beside(own(Keypair().pubkey())), "unknown_instruction",
    ),
    "an account made on the way": (
        lambda b: b.beside(own(ACCOUNTS_PROGRAM, b.me)), "unknown_instruction",
    ),
    "a durable nonce": (
        lambda b: b.do(nonce_advance(b.me), b.pays()), "unknown_instruction",
    ),
    "too much": (
        lambda b: b.beside(*(b.wallet.memo("x") for _ in range(8))), "too_many_instructions",
    ),
    "accounts from a table": (by_table, "unknown_accounts"),
    # By whom.
    "somebody else signs too": (
        lambda b: b.beside(
            own(payers.MEMO_PROGRAM, SOMEBODY.pubkey()), signers=[b.wallet.keypair, SOMEBODY]
        ),
        "wrong_signers",
    ),
    "the payer pays the fees": (
        lambda b: b.do(b.pays(), fee_payer=b.wallet.address), "wrong_signers",
    ),
    "the facilitator's own tokens": (
        lambda b: b.do(
            b.pays(
                authority=Pubkey.from_string(b.offer["extra"]["feePayer"]),
                source=token_account(b.offer["extra"]["feePayer"]),
            ),
            own(payers.MEMO_PROGRAM, b.me),
        ),
        "wrong_signers",
    ),
    "the facilitator's own tokens, and nobody else": (
        lambda b: b.do(
            b.pays(
                authority=Pubkey.from_string(b.offer["extra"]["feePayer"]),
                source=token_account(b.offer["extra"]["feePayer"]),
            )
        ),
        "wrong_signers",
    ),
    "the fees are paid by somebody else": (
        lambda b: b.do(
            b.pays(), fee_payer=str(SOMEBODY.pubkey()), signers=[b.wallet.keypair, SOMEBODY]
        ),
        "wrong_fee_payer",
    ),
    "the fees are paid by somebody else, and it says so": (
        lambda b: changed(
            b.do(b.pays(), fee_payer=str(SOMEBODY.pubkey())),
            accepted__extra={"feePayer": str(SOMEBODY.pubkey())},
        ),
        "wrong_fee_payer",
    ),
    "not signed": (lambda b: b.do(b.pays(), signers=[]), "invalid_signature"),
    "signed by somebody else": (
        lambda b: b.signature(SOMEBODY.sign_message(b.message())), "invalid_signature",
    ),
    "signed for something else": (
        lambda b: b.signature(b.wallet.keypair.sign_message(b"hello")), "invalid_signature",
    ),
    "signed in the fee payer's place": (
        lambda b: b.raw(
            bytes(
                VersionedTransaction.populate(
                    VersionedTransaction.from_bytes(b.transaction).message,
                    VersionedTransaction.from_bytes(b.transaction).signatures[::-1],
                )
            )
        ),
        "invalid_signature",
    ),
    "changed after it was signed": (
        lambda b: b.raw(b.transaction.replace(b"\x0c" + AMOUNT, b"\x0c" + bytes(7) + b"\x01")),
        "invalid_signature",
    ),
    "a payer for whom anything is signed": (small_order, "invalid_signature"),
    "the signature's twin": (ed25519_twin, "invalid_signature"),
    # In another writing.
    "a byte more": (lambda b: b.raw(b.transaction + b"\x00"), "malformed_transaction"),
    "a byte less": (lambda b: b.raw(b.transaction[:-1]), "malformed_transaction"),
    "half of it": (lambda b: b.raw(b.transaction[:200]), "malformed_transaction"),
    "the message alone": (lambda b: b.raw(b.message()), "malformed_transaction"),
    "two of them": (lambda b: b.raw(b.transaction * 2), "malformed_transaction"),
    "one signature too few": (
        lambda b: b.raw(b"\x01" + b.transaction[65:]), "malformed_transaction",
    ),
    "one signature too many": (
        lambda b: b.raw(b"\x03" + bytes(64) + b.transaction[1:]), "malformed_transaction",
    ),
    "a length in two bytes": (
        lambda b: b.raw(b"\x82\x00" + b.transaction[1:]), "malformed_transaction",
    ),
    "a program that is not there": (lambda b: beyond(b, True), "malformed_transaction"),
    "an account that is not there": (lambda b: beyond(b, False), "malformed_transaction"),
    "another version": (
        lambda b: b.raw(b.transaction.replace(b"\x80\x02", b"\x81\x02", 1)),
        "malformed_transaction",
    ),
    "1,233 bytes": (lambda b: of_size(b, 1_233), "malformed_transaction"),
    "8 KB": (lambda b: with_paid_memo(b, 6_000), "malformed_transaction"),
    "no bytes": (lambda b: b.raw(b""), "malformed_transaction"),
    "zeros": (lambda b: b.raw(bytes(500)), "malformed_transaction"),
    "noise": (lambda b: b.raw(b"\xff" * 500), "malformed_transaction"),
    "base58": (lambda b: b.say(payload__transaction="3" * 500), "malformed_transaction"),
    "a space in the base64": (
        lambda b: b.say(payload__transaction=b.good["payload"]["transaction"] + " "),
        "malformed_transaction",
    ),
    "letters beyond ASCII": (
        lambda b: b.say(payload__transaction=b.good["payload"]["transaction"] + "é"),
        "malformed_transaction",
    ),
    "a number": (lambda b: b.say(payload__transaction=7), None),
    "a list of bytes": (lambda b: b.say(payload__transaction=list(b.transaction)), None),
    "no transaction": (lambda b: b.say(payload={}), None),
    "a signature of Ethereum": (
        lambda b: b.say(payload=EvmWallet().payment(b.challenge)["payload"]), None,
    ),
    # Where, for what.
    "on the network for tests": (
        lambda b: b.say(accepted__network="solana:EtWTRABZaYq6iMfeYKouRu166VU2xqa1"),
        "unknown_network",
    ),
    "on a network of another kind": (lambda b: b.say(accepted__network=BASE), None),
    "for another of our routes": (
        lambda b: b.say(resource__url=b.challenge["resource"]["url"].replace(SMS, AGAIN)),
        "wrong_resource",
    ),
    "scheme upto": (lambda b: b.say(accepted__scheme="upto"), "unsupported_scheme"),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_SOLANA)
def test_a_payment_on_solana_must_be_what_was_asked(
    box: Box, settler: Settler, challenge: Json, name: str
) -> None:
    make, reason = ON_SOLANA[name]
    bid = SolanaBid(challenge)
    must_be_refused(box, settler, make(bid), reason)
    must_be_taken(box, settler, bid.good)


SOUND: dict[str, SolanaMutant] = {
    "as the official client makes it": lambda b: b.good,
    "nothing but the transfer": lambda b: b.do(b.pays()),
    "an older message": lambda b: b.wallet.payment(b.challenge, transaction={"legacy": True}),
    "a memo that the payer signs": lambda b: b.beside(own(payers.MEMO_PROGRAM, b.me)),
    "a wallet's own guard": lambda b: b.beside(
        own(Pubkey.from_string("L2TExMFKdjpN9kozasaurPirfHy9P8sbXoAN1qA3S95"))
    ),
    "another account of the payer's": lambda b: b.move(source=Keypair().pubkey()),
    "eight instructions": lambda b: b.beside(*(b.wallet.memo("x") for _ in range(7))),
    "1,232 bytes": lambda b: of_size(b, 1_232),
    "fields nobody knows": lambda b: b.say(payload__signature="0x", accepted__extra={}),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_transaction_that_does_nothing_but_pay_is_handed_on_as_it_was_signed(
    box: Box, settler: Settler, challenge: Json, name: str
) -> None:
    bid = SolanaBid(challenge)
    sent = cast(Json, SOUND[name](bid))
    must_be_taken(box, settler, sent)
    told = settler.told[-1]
    assert told["paymentPayload"]["payload"] == {"transaction": sent["payload"]["transaction"]}
    assert told["paymentRequirements"] == bid.offer
    assert told["paymentRequirements"]["extra"] == {"feePayer": settler.fee_payer}


def test_the_fee_payers_empty_place_makes_no_other_payment(
    box: Box, settler: Settler, challenge: Json
) -> None:
    """Anybody can fill it with what they like, without the payer."""
    bid = SolanaBid(challenge)
    first = must_be_taken(box, settler, bid.good)
    before = settler.settles
    with_noise = bid.transaction[:1] + os.urandom(64) + bid.transaction[65:]
    again = pay(box, encode(bid.raw(with_noise)))
    assert (again.status, again.body) == (200, first.body)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert pay(box, encode(bid.raw(with_noise)), AGAIN).code == "payment_already_used"
    assert settler.settles == before


# One payment, one request.


def test_a_payment_opens_no_dearer_route(box: Box, settler: Settler, challenge: Json) -> None:
    for bid in (EvmBid(challenge), SolanaBid(challenge)):
        dearer = changed(bid.good, resource=MISSING)
        must_be_refused(box, settler, dearer, "wrong_amount", DEARER)
        says_so = changed(dearer, accepted__amount=str(2 * PRICE))
        must_be_refused(box, settler, says_so, "wrong_amount", DEARER)
        must_be_taken(box, settler, bid.good)
        for path in (DEARER, AGAIN):
            answer = pay(box, encode(dearer), path)
            assert (answer.status, answer.code) == (409, "payment_already_used")
            assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("bid_on", [EvmBid, SolanaBid])
def test_a_payment_that_was_spent_buys_nothing_else(
    box: Box, settler: Settler, challenge: Json, bid_on: type[EvmBid] | type[SolanaBid]
) -> None:
    bid = bid_on(challenge)
    header = encode(changed(bid.good, resource=MISSING))
    first = must_be_taken(box, settler, header)
    payer = box.payer(0)
    before = (books(box), settler.shown)
    others = [
        pay(box, header, AGAIN),
        pay(box, header, SMS + "?x=1"),
        pay(box, header, SMS, {"to": "+18148835337", "message": "ho"}),
        pay(box, header, "/api/v1/credits/top-up", {"credits": 1}),
        box.post(SMS, payer.key, TEXT, PAYMENT_SIGNATURE=header),
    ]
    assert [(each.status, each.code) for each in others[:3] + others[4:]] == [
        (409, "payment_already_used")
    ] * 4
    assert others[3].status in (400, 409)
    assert (books(box), settler.shown) == before
    again = pay(box, header)
    assert (again.status, again.body) == (200, first.body)
    assert settler.shown == before[1]


def test_the_same_authorization_signed_again_is_the_same_payment(
    box: Box, settler: Settler, challenge: Json
) -> None:
    """The network takes a nonce once, whatever else is signed with it."""
    bid = EvmBid(challenge)
    must_be_taken(box, settler, bid.good)
    for again in (
        bid.sign(validBefore=now(100)),
        bid.forge(nonce=f"0x{bid.told['nonce'][2:].upper()}"),
        bid.sign(value=str(PRICE * 2)),
    ):
        before = settler.settles
        answer = pay(box, encode(changed(again, resource=MISSING)), AGAIN)
        assert (answer.status, answer.code) == (409, "payment_already_used")
        assert settler.settles == before


def test_a_payment_for_one_of_our_networks_is_none_on_another(
    box: Box, settler: Settler, challenge: Json
) -> None:
    """Who is paid has the same address on both."""
    sepolia = offer(challenge, BASE_SEPOLIA)
    bid = EvmBid(challenge)
    domain = {
        "name": "USDC", "version": "2", "chainId": 84532, "verifyingContract": sepolia["asset"],
    }  # fmt: skip
    there = changed(bid.sign(domain=domain), accepted=sepolia)
    must_be_refused(
        box, settler, changed(there, accepted=bid.good["accepted"]), "invalid_signature"
    )
    must_be_taken(box, settler, there)
    assert settler.told[-1]["paymentRequirements"] == sepolia
    # The same nonce, and another network: another payment.
    must_be_taken(box, settler, bid.good)


# Who has paid.


def test_the_account_is_that_of_whoever_signed(box: Box, settler: Settler, challenge: Json) -> None:
    evm, solana = EvmBid(challenge), SolanaBid(challenge)
    for bid, name in (
        (evm, f"eip155:{evm.wallet.address}"),
        (solana, f"solana:{solana.wallet.address}"),
    ):
        answer = must_be_taken(box, settler, bid.good)
        assert decode(answer.headers["PAYMENT-RESPONSE"])["payer"] == bid.wallet.address
        wallet, account = box.row(
            "SELECT w.name, w.account_id FROM wallet w WHERE w.name = :name", name=name
        )
        assert wallet == name
        assert box.row(
            "SELECT wallet_name, account_id, amount, credits FROM payment"
            " WHERE wallet_name = :name", name=name,
        ) == (name, account, PRICE, 1)  # fmt: skip
        assert box.standing(account) == (0, 0)


def test_case_means_nothing_in_an_ethereum_wallet(
    box: Box, settler: Settler, challenge: Json
) -> None:
    wallet = EvmWallet()
    told = wallet.address
    for address in (told, told.lower(), f"0x{told[2:].upper()}"):
        bid = EvmBid(challenge, wallet)
        answer = must_be_taken(box, settler, bid.forge(**{"from": address}))
        assert decode(answer.headers["PAYMENT-RESPONSE"])["payer"] == told
    assert box.row(
        "SELECT COUNT(*), MIN(name), MIN(id) FROM wallet WHERE lower(id) = :id",
        id=f"eip155:{told.lower()}",
    ) == (1, f"eip155:{told}", f"eip155:{told.lower()}")
    for address in (told, told.lower(), f"0x{told[2:].upper()}"):
        assert box.cli("credits", "balance", f"eip155:{address}").output == "0\n"


def test_case_means_everything_in_a_wallet_on_solana(
    box: Box, settler: Settler, challenge: Json
) -> None:
    bid = SolanaBid(challenge)
    must_be_taken(box, settler, bid.good)
    assert box.cli("credits", "balance", f"solana:{bid.wallet.address}").output == "0\n"
    other = box.cli("credits", "balance", f"solana:{bid.wallet.address.swapcase()}")
    assert other.exit_code != 0


def test_a_payment_is_no_credential_where_none_is_taken(
    box: Box, settler: Settler, challenge: Json
) -> None:
    before = settler.settles
    header = EvmWallet().header(challenge)
    for answer in (
        pay(box, header, FREE_OF_X402),
        box.get("/api/v1/account", PAYMENT_SIGNATURE=header),
    ):
        assert (answer.status, answer.code) == (401, "missing_api_key")
    assert settler.settles == before


# Anything at all.

_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["0", str(PRICE), "exact", BASE, SOLANA, "0x", "0x" + "0" * 40, USDC]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
_often = settings(
    max_examples=300, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
_AT_ONCE = 5  # what is drawn byte by byte takes longer than what it tests


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, (*way, name))


def put(whole: Any, way: tuple[Any, ...], value: Any) -> Any:
    if not way:
        return value
    found = copy.deepcopy(whole)
    table = found
    for name in way[:-1]:
        table = table[name]
    table[way[-1]] = value
    return found


class Counter:
    """A counter where anybody pays with whatever they like."""

    def __init__(self, box: Box, settler: Settler, challenge: Json) -> None:
        self._box, self._settler, self._challenge = box, settler, challenge
        self.seen: set[str] = set()
        self.renew()

    def renew(self) -> None:
        self.bids = (EvmBid(self._challenge), SolanaBid(self._challenge))

    def show(self, header: str) -> None:
        """Never our fault, and nobody is asked to settle what nobody has signed."""
        before = (books(self._box), self._settler.shown)
        answer = pay(self._box, header)
        self.seen.add(f"{answer.status} {answer.code}")
        assert answer.status in (200, 400, 402), (answer.status, answer.body, header)
        if answer.status != 200:
            assert (books(self._box), self._settler.shown) == before, header
            return
        assert self._settler.shown > before[1]
        handed = self._settler.told[-1]["paymentPayload"]["payload"]
        evm, solana = (bid.good["payload"] for bid in self.bids)
        if "transaction" in handed:
            assert blank(handed["transaction"]) == blank(solana["transaction"]), header
        else:
            assert _plain(handed) == _plain(evm), header
        self.renew()


def blank(transaction: str) -> bytes:
    """Without what is in the fee payer's place, which nobody has signed yet."""
    raw = base64.b64decode(transaction)
    return raw[:1] + raw[65:]


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True).lower()


@pytest.fixture(scope="module")
def counter(box: Box, settler: Settler, challenge: Json) -> Counter:
    return Counter(box, settler, challenge)


@given(
    which=st.integers(0, 1),
    changes=st.lists(st.tuples(st.integers(0, 99), _ANY_JSON), min_size=1, max_size=2),
)
@_often
def test_a_field_with_anything_in_it_is_never_our_fault(
    counter: Counter, which: int, changes: list[tuple[int, Any]]
) -> None:
    whole: Any = counter.bids[which].good
    for number, value in changes:
        ways = list(places(whole))
        whole = put(whole, ways[number % len(ways)], value)
    counter.show(encode(whole))


def garbled(raw: bytes, random: Random) -> bytes:
    """With some bytes changed, left out or put in."""
    found = bytearray(raw)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(found))
        some = random.choice(
            [random.randbytes(random.randint(0, 3)), bytes([random.choice(_EDGES)])]
        )
        found[at : at + random.randint(0, 3)] = some
    return bytes(found)


_EDGES = (0, 1, 2, 3, 127, 128, 129, 255)


@given(seed=st.integers(0, 2**32))
@_often
def test_a_header_with_any_bytes_in_it_is_never_our_fault(counter: Counter, seed: int) -> None:
    random = Random(seed)
    for _ in range(_AT_ONCE):
        whole = json.dumps(random.choice(counter.bids).good).encode()
        sent = base64.b64encode(garbled(whole, random)).decode()
        if random.random() < 0.3:
            at = random.randrange(len(sent))
            sent = sent[:at] + random.choice("=+/-_aZ9 \t,\xe9") + sent[at + 1 :]
        counter.show(sent)


@given(seed=st.integers(0, 2**32))
@_often
def test_a_transaction_of_any_bytes_is_never_our_fault(counter: Counter, seed: int) -> None:
    random = Random(seed)
    for _ in range(_AT_ONCE):
        bid = counter.bids[1]
        counter.show(encode(bid.raw(garbled(bid.transaction, random))))


@given(seed=st.integers(0, 2**32))
@_often
def test_a_message_of_any_bytes_that_is_signed_is_never_our_fault(
    box: Box, settler: Settler, challenge: Json, seed: int
) -> None:
    """What can be wrong behind a good signature."""
    random = Random(seed)
    bid = SolanaBid(challenge)
    message = bytearray(bid.message())
    message[random.randrange(len(message))] = random.choice(_EDGES)
    signature = bytes(bid.wallet.keypair.sign_message(bytes(message)))
    before = (books(box), settler.shown)
    answer = pay(box, encode(bid.raw(b"\x02" + bytes(64) + signature + bytes(message))))
    assert answer.status in (200, 402), answer.body
    if answer.status == 402:
        assert (books(box), settler.shown) == before
    else:
        # The blockhash, the memo, the account it is taken from: whatever does not matter to us.
        assert settler.shown > before[1]


def test_the_fuzz_has_seen_all_kinds_of_answers(counter: Counter) -> None:
    assert {"200 None", "400 validation_error", "402 payment_invalid"} <= counter.seen
