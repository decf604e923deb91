"""The section [x402]: what cannot be is refused in one line, what is secret stays so, and who does
not have it does not pay for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doubles import refused_port
from inprocess import Box
from rpc_server import need
from server import ROOT, Farebox
from settler import BASE, BASE_SEPOLIA, SOLANA, Settler
from test_config import refused, told

need("eth_account", "solders", "x402")

from payers import EvmWallet, SolanaWallet, decode  # noqa: E402
from test_payment_checks import NODE  # noqa: E402

from config import Settings  # noqa: E402

# EIP-55's own examples.
MIXED = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
ADDRESS = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"
TYPO = "0x70997970C51812dc3A010C7d01b50e0d17dc79c8"
SOLANA_ADDRESS = "7xKXtg2CW87d97TXJSDpbD5jBkheTqA83TZRuJosgAsU"
USDC = "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913"
URL = "https://x402.example/facilitator"
SEPARATE = f'{{ "{BASE}" = "https://a.example", "{SOLANA}" = "https://b.example" }}'
SMS = (
    '[upstreams.sandbox]\nkind = "sandbox"\n[[routes]]\npath = "/api/v1/sms/send"\n'
    'methods = ["POST"]\nupstream = "sandbox"\nadapter = "sms"\nper = "sms_segment"\n'
)
TEXTS = SMS + "credits = 1\n"
CANARY = "canary-4f1d6c"
PACKAGES = ("solders",)


def x402(**changes: str | None) -> str:
    """A good section, changed: TOML values by key, None to leave one out."""
    lines = {
        "facilitator_url": f'"{URL}"',
        "pay_to": f'{{ "{BASE}" = "{ADDRESS}", "{SOLANA}" = "{SOLANA_ADDRESS}" }}',
    } | changes
    written = (f"{key} = {value}" for key, value in lines.items() if value is not None)
    return "\n".join(["[x402]", *written, ""])


def paid_to(network: str, address: str, **changes: str | None) -> str:
    return x402(pay_to=f'{{ "{network}" = "{address}" }}', **changes)


# What is written · the key path the refusal must name · what it must say.
REFUSED: dict[str, tuple[str, str, str]] = {
    "an unknown key": (x402(price="3"), "$.x402.price", "unknown key"),
    "no facilitator": (x402(facilitator_url=None), "$.x402.facilitator_url", "required"),
    "nobody to pay": (x402(pay_to=None), "$.x402.pay_to", "required"),
    "an empty table": (x402(pay_to="{}"), "$.x402.pay_to", "length >= 1"),
    "an address for all": (x402(pay_to=f'"{ADDRESS}"'), "$.x402.pay_to", "object"),
    # Networks.
    "a network by its name": (
        paid_to("base", ADDRESS), "$.x402.pay_to.base", "expected a network by its CAIP-2 name",
    ),
    "a namespace alone": (paid_to("eip155", ADDRESS), "$.x402.pay_to.eip155", "CAIP-2"),
    "a wildcard": (paid_to("eip155:*", ADDRESS), "$.x402.pay_to.eip155:*", "CAIP-2"),
    "a leading zero": (paid_to("eip155:08453", ADDRESS), "$.x402.pay_to.eip155:08453", "CAIP-2"),
    "chain 0": (paid_to("eip155:0", ADDRESS), "$.x402.pay_to.eip155:0", "CAIP-2"),
    "a chain in hexadecimal": (
        paid_to("eip155:0x2105", ADDRESS), "$.x402.pay_to.eip155:0x2105", "CAIP-2",
    ),
    "Solana by name": (
        paid_to("solana:mainnet", SOLANA_ADDRESS), "$.x402.pay_to.solana:mainnet", "CAIP-2",
    ),
    "another namespace": (
        paid_to("cosmos:cosmoshub-4", ADDRESS), "$.x402.pay_to.cosmos:cosmoshub-4", "CAIP-2",
    ),
    "a network with a line's end": (
        paid_to(f"{BASE}\\n", ADDRESS), f"$.x402.pay_to.{BASE}\\n", "CAIP-2",
    ),
    # Addresses.
    "a typing error": (paid_to(BASE, TYPO), f"$.x402.pay_to.{BASE}", "EIP-55"),
    "two letters swapped": (
        paid_to(BASE, MIXED.replace("aAeb", "aAbe")), f"$.x402.pay_to.{BASE}", "EIP-55",
    ),
    "a digit too few": (
        paid_to(BASE, ADDRESS[:-1]), f"$.x402.pay_to.{BASE}", "0x and 40 hexadecimal digits",
    ),
    "a digit too many": (paid_to(BASE, ADDRESS + "0"), f"$.x402.pay_to.{BASE}", "40 hexadecimal"),
    "no 0x": (paid_to(BASE, ADDRESS[2:]), f"$.x402.pay_to.{BASE}", "40 hexadecimal"),
    "0X": (paid_to(BASE, "0X" + ADDRESS[2:]), f"$.x402.pay_to.{BASE}", "40 hexadecimal"),
    "a name": (paid_to(BASE, "vitalik.eth"), f"$.x402.pay_to.{BASE}", "40 hexadecimal"),
    "nobody's address": (paid_to(BASE, "0x" + "0" * 40), f"$.x402.pay_to.{BASE}", "not all zero"),
    "no address": (paid_to(BASE, ""), f"$.x402.pay_to.{BASE}", "40 hexadecimal"),
    "an address of Solana": (paid_to(BASE, SOLANA_ADDRESS), f"$.x402.pay_to.{BASE}", "40 hex"),
    "the token's address": (paid_to(BASE, USDC), f"$.x402.pay_to.{BASE}", "the token's"),
    "the token's address in small letters": (
        paid_to(BASE, USDC.lower()), f"$.x402.pay_to.{BASE}", "the token's",
    ),
    "the mint's address": (
        paid_to(SOLANA, "EPjFWdd5AufqSSqeM2qN1xzybapC8G4wEGGkZwyTDt1v"),
        f"$.x402.pay_to.{SOLANA}", "the token's",
    ),
    "an address of Ethereum": (
        paid_to(SOLANA, ADDRESS), f"$.x402.pay_to.{SOLANA}", "32 bytes in base58",
    ),
    "31 bytes": (
        paid_to(SOLANA, "2XnsJMzdQfxw3BGgkxRpXATFJKEJsXCWCSHxheFMir5"),
        f"$.x402.pay_to.{SOLANA}", "32 bytes",
    ),
    "33 bytes": (paid_to(SOLANA, "z" * 44), f"$.x402.pay_to.{SOLANA}", "32 bytes"),
    "a letter that base58 does not have": (
        paid_to(SOLANA, SOLANA_ADDRESS[:-1] + "l"), f"$.x402.pay_to.{SOLANA}", "base58",
    ),
    "nobody's account": (paid_to(SOLANA, "1" * 32), f"$.x402.pay_to.{SOLANA}", "not all zero"),
    # Tokens.
    "a network whose token nobody knows": (
        paid_to("eip155:31337", ADDRESS), "$.x402.asset.eip155:31337", "required",
    ),
    "another Solana": (
        paid_to(f"solana:{'4' * 32}", SOLANA_ADDRESS), f"$.x402.asset.solana:{'4' * 32}",
        "required",
    ),
    "a mistyped token": (
        paid_to(BASE, ADDRESS, asset=f'{{ "{BASE}" = "{TYPO}" }}'), f"$.x402.asset.{BASE}",
        "EIP-55",
    ),
    "a token by its symbol": (
        paid_to(BASE, ADDRESS, asset=f'{{ "{BASE}" = "USDC" }}'), f"$.x402.asset.{BASE}", "40 hex",
    ),
    "a token without address": (
        paid_to(BASE, ADDRESS, asset=f'{{ "{BASE}" = {{ name = "Dollar" }} }}'),
        "$.x402.asset[...].address", "required",
    ),
    "a token with decimals": (
        paid_to(BASE, ADDRESS, asset=f'{{ "{BASE}" = {{ address = "{MIXED}", decimals = 18 }} }}'),
        "$.x402.asset[...].decimals", "unknown key",
    ),
    "a mistyped mint": (
        paid_to(SOLANA, SOLANA_ADDRESS, asset=f'{{ "{SOLANA}" = "{USDC}" }}'),
        f"$.x402.asset.{SOLANA}", "base58",
    ),
    # Tables of networks that are not paid on.
    "a token of no network": (
        x402(asset=f'{{ "{BASE_SEPOLIA}" = "{MIXED}" }}'), f"$.x402.asset.{BASE_SEPOLIA}",
        "expected a network of pay_to",
    ),
    "a node of no network": (
        x402(rpc='{ "eip155:1" = "https://node.example" }'), "$.x402.rpc.eip155:1",
        "expected a network of pay_to",
    ),
    "a facilitator of no network": (
        x402(facilitator_url=SEPARATE[:-1] + ', "eip155:1" = "https://c.example" }'),
        "$.x402.facilitator_url.eip155:1", "expected a network of pay_to",
    ),
    "headers of no network": (
        x402(facilitator_url=SEPARATE, facilitator_headers='{ "eip155:1" = { A = "b" } }'),
        "$.x402.facilitator_headers.eip155:1", "expected a network of pay_to",
    ),
    # Facilitators and nodes.
    "a network without facilitator": (
        x402(facilitator_url=f'{{ "{BASE}" = "https://a.example" }}'),
        f"$.x402.facilitator_url.{SOLANA}", "required",
    ),
    "a facilitator that anybody can play": (
        x402(facilitator_url='"http://x402.example"'), "$.x402.facilitator_url",
        "expected https:// and a host, or http:// and a loopback address",
    ),
    "one of two that anybody can play": (
        x402(facilitator_url=SEPARATE.replace("https://b", "http://b")),
        f"$.x402.facilitator_url.{SOLANA}", "expected https://",
    ),
    "a facilitator almost on loopback": (
        x402(facilitator_url='"http://127.0.0.1.example"'), "$.x402.facilitator_url", "https://",
    ),
    "a facilitator in the house": (
        x402(facilitator_url='"http://10.0.0.1:4021"'), "$.x402.facilitator_url", "https://",
    ),
    "a facilitator without host": (
        x402(facilitator_url='"https://"'), "$.x402.facilitator_url", "https://",
    ),
    "a facilitator that is a path": (
        x402(facilitator_url='"/facilitator"'), "$.x402.facilitator_url", "https://",
    ),
    "a facilitator with a password": (
        x402(facilitator_url='"https://me:secret@x402.example"'), "$.x402.facilitator_url",
        "https://",
    ),
    "a facilitator with a query": (
        x402(facilitator_url='"https://x402.example/?key=1"'), "$.x402.facilitator_url",
        "without a query",
    ),
    "one of two with a query": (
        x402(facilitator_url=SEPARATE.replace("a.example", "a.example/?k=1")),
        f"$.x402.facilitator_url.{BASE}", "without a query",
    ),
    "a facilitator with a fragment": (
        x402(facilitator_url='"https://x402.example/#a"'), "$.x402.facilitator_url", "https://",
    ),
    "a facilitator that is a number": (
        x402(facilitator_url="402"), "$.x402.facilitator_url", "expected",
    ),
    "a node that anybody can play": (
        x402(rpc=f'{{ "{BASE}" = "http://node.example" }}'), f"$.x402.rpc.{BASE}", "https://",
    ),
    "a node over WebSockets": (
        x402(rpc=f'{{ "{BASE}" = "wss://node.example" }}'), f"$.x402.rpc.{BASE}", "https://",
    ),
    "a node for all": (x402(rpc='"https://node.example"'), "$.x402.rpc", "object"),
    "a header of two lines": (
        x402(facilitator_headers='{ Authorization = "a\\r\\nb" }'),
        "$.x402.facilitator_headers.Authorization", "printable ASCII",
    ),
    "a header that is no name": (
        x402(facilitator_headers='{ "Bad Name" = "a" }'), "$.x402.facilitator_headers.Bad Name",
        "header name",
    ),
    "a header that is ours": (
        x402(facilitator_headers='{ Content-Length = "1" }'),
        "$.x402.facilitator_headers.Content-Length", "ours to set",
    ),
    "a header of one of two": (
        x402(
            facilitator_url=SEPARATE,
            facilitator_headers=f'{{ "{SOLANA}" = {{ "Bad Name" = "a" }} }}',
        ),
        f"$.x402.facilitator_headers.{SOLANA}.Bad Name", "header name",
    ),
    "headers by network for one facilitator": (
        x402(facilitator_headers=f'{{ "{BASE}" = {{ A = "b" }} }}'),
        f"$.x402.facilitator_headers.{BASE}", "one facilitator",
    ),
    "headers for all of two facilitators": (
        x402(facilitator_url=SEPARATE, facilitator_headers='{ Authorization = "secret" }'),
        "$.x402.facilitator_headers.Authorization", "expected a network of pay_to",
    ),
    "a header where a facilitator's table is": (
        x402(facilitator_url=SEPARATE, facilitator_headers=f'{{ "{BASE}" = "secret" }}'),
        f"$.x402.facilitator_headers.{BASE}", "expected a table",
    ),
    "a header that is a number": (
        x402(facilitator_headers="{ A = 7 }"), "$.x402.facilitator_headers[...]", "expected",
    ),
    # Top-ups.
    "no credits by default": (x402(topup_credits="0"), "$.x402.topup_credits", ">= 1"),
    "fewer than none": (x402(topup_min="-1"), "$.x402.topup_min", ">= 1"),
    "half a credit": (x402(topup_credits="1.5"), "$.x402.topup_credits", "int"),
    "credits in quotes": (x402(topup_credits='"100"'), "$.x402.topup_credits", "int"),
    "no most": (x402(topup_max="0"), "$.x402.topup_max", ">= 1"),
    "a most beyond reason": (x402(topup_max="1000000001"), "$.x402.topup_max", "<= 1000000000"),
    "a default below the least": (
        x402(topup_credits="10", topup_min="11"), "$.x402.topup_credits",
        "from topup_min to topup_max",
    ),
    "a default above the most": (
        x402(topup_credits="101", topup_max="100"), "$.x402.topup_credits",
        "from topup_min to topup_max",
    ),
    "a least above the most": (
        x402(topup_min="200", topup_max="100"), "$.x402.topup_credits",
        "from topup_min to topup_max",
    ),
    # Prices.
    "a credit finer than a millionth of a dollar": (
        '[instance]\nusd_per_credit = "0.0000001"\n' + x402(), "$.instance.usd_per_credit",
        "whole number of millionths",
    ),
    "a credit that is no whole number of them": (
        '[instance]\nusd_per_credit = "0.0000015"\n' + x402(), "$.instance.usd_per_credit",
        "whole number of millionths",
    ),
    "the finest credit there can be": (
        '[instance]\nusd_per_credit = "999999999.000000000001"\n' + x402(),
        "$.instance.usd_per_credit", "whole number of millionths",
    ),
    "a route without the section": (
        TEXTS + "x402 = true\n", "$.routes[0].x402", "needs an [x402] section",
    ),
    "a route that costs nothing": (
        SMS + "credits = 0\nx402 = true\n" + x402(), "$.routes[0].x402",
        "a call that costs nothing cannot be paid",
    ),
    "a route over that of the top-up": (
        TEXTS.replace("/api/v1/sms/send", "/api/v1/credits/top-up") + x402(), "$.routes[0].path",
        "",
    ),
    "a route over the list of what can be paid": (
        TEXTS.replace("/api/v1/sms/send", "/discovery/*") + x402(), "$.routes[0].path", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_its_key_path(tmp_path: Path, name: str) -> None:
    config, path, says = REFUSED[name]
    line = refused(tmp_path / "i", config)
    assert line.startswith(f"farebox.toml: {path}: "), line
    assert says in line


@pytest.mark.parametrize(
    "config",
    [
        x402(),
        paid_to(BASE, MIXED),
        paid_to(BASE, ADDRESS.lower()),
        paid_to(BASE, "0x" + ADDRESS[2:].upper()),
        paid_to(BASE, "0x" + "1" * 40),
        paid_to("eip155:1", ADDRESS),
        paid_to("eip155:31337", ADDRESS, asset=f'{{ "eip155:31337" = "{MIXED}" }}'),
        paid_to(SOLANA, "1" * 31 + "2"),
        x402(facilitator_url='"http://127.0.0.1:4021/"'),
        x402(facilitator_url='"http://[::1]:4021"'),
        x402(facilitator_url='"http://localhost:4021"'),
        x402(rpc=f'{{ "{BASE}" = "https://node.example/v2/key?x=1" }}'),
        x402(topup_credits="5", topup_min="5", topup_max="5"),
        x402(topup_max="1"),
    ],
)
def test_what_can_be_is_taken(tmp_path: Path, config: str) -> None:
    assert told(tmp_path / "i", TEXTS + config).payments is not None


# Defaults.


@pytest.mark.parametrize(
    ("usd_per_credit", "credits", "units"),
    [
        ("0.000001", 100, 100),
        ("0.0001", 100, 10_000),
        ("0.01", 100, 1_000_000),
        ("0.0125", 80, 1_000_000),
        ("0.03", 33, 990_000),
        ("0.333333", 3, 999_999),
        ("0.5", 2, 1_000_000),
        ("0.500001", 1, 500_001),
        ("0.99", 1, 990_000),
        ("1", 1, 1_000_000),
        ("3", 1, 3_000_000),  # which is the least there is
    ],
)
def test_a_top_up_that_names_no_amount_is_within_what_a_stock_client_pays(
    tmp_path: Path, usd_per_credit: str, credits: int, units: int
) -> None:
    config = f'[instance]\nusd_per_credit = "{usd_per_credit}"\n' + TEXTS + x402()
    payments = told(tmp_path / "i", config).payments
    assert payments is not None
    assert payments.topup_credits == credits
    assert payments.topup_credits * payments.units_per_credit == units
    assert payments.topup_min <= payments.topup_credits <= payments.topup_max


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({}, (100, 10, 100_000)),
        ({"topup_credits": "500"}, (500, 10, 100_000)),
        ({"topup_credits": "5"}, (5, 5, 100_000)),
        ({"topup_min": "1"}, (100, 1, 100_000)),
        ({"topup_min": "100"}, (100, 100, 100_000)),
        ({"topup_max": "50"}, (50, 10, 50)),
        ({"topup_max": "5"}, (5, 5, 5)),
        ({"topup_credits": "20", "topup_min": "20", "topup_max": "20"}, (20, 20, 20)),
    ],
)
def test_the_bounds_of_a_top_up(
    tmp_path: Path, changes: dict[str, str], terms: tuple[int, int, int]
) -> None:
    payments = told(tmp_path / "i", TEXTS + x402(**changes)).payments
    assert payments is not None
    assert (payments.topup_credits, payments.topup_min, payments.topup_max) == terms


def test_the_dollar_of_each_network_is_known(tmp_path: Path) -> None:
    """As Circle lists them."""
    networks = {
        "eip155:1": ("0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48", "USD Coin"),
        "eip155:10": ("0x0b2C639c533813f4Aa9D7837CAf62653d097Ff85", "USD Coin"),
        "eip155:137": ("0x3c499c542cEF5E3811e1192ce70d8cC03d5c3359", "USD Coin"),
        "eip155:8453": ("0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913", "USD Coin"),
        "eip155:42161": ("0xaf88d065e77c8cC2239327C5EDb3A432268e5831", "USD Coin"),
        "eip155:43114": ("0xB97EF9Ef8734C71904D8002F8b6Bc66Dd9c48a6E", "USD Coin"),
        "eip155:43113": ("0x5425890298aed601595a70AB815c96711a31Bc65", "USD Coin"),
        "eip155:84532": ("0x036CbD53842c5426634e7929541eC2318f3dCF7e", "USDC"),
        "eip155:11155111": ("0x1c7D4B196Cb0C7B01d743Fbc6116a902379C7238", "USDC"),
    }
    pay_to = ", ".join(f'"{network}" = "{ADDRESS}"' for network in networks)
    payments = told(tmp_path / "i", TEXTS + x402(pay_to=f"{{ {pay_to} }}")).payments
    assert payments is not None
    for network, (asset, name) in networks.items():
        found = payments.networks[network]
        assert (found.asset, found.asset_name, found.asset_version) == (asset, name, "2")
        assert EvmWallet().address != asset
        # The capitals guard our own table too.
        from eth_utils.address import to_checksum_address

        assert to_checksum_address(asset.lower()) == asset


def test_another_token_can_be_named(tmp_path: Path) -> None:
    asset = (
        f'{{ "{BASE}" = {{ address = "{MIXED}", name = "Dollar", version = "1" }},'
        f' "{BASE_SEPOLIA}" = "{MIXED}", "{SOLANA}" = "{SOLANA_ADDRESS}" }}'
    )
    pay_to = (
        f'{{ "{BASE}" = "{ADDRESS}", "{BASE_SEPOLIA}" = "{ADDRESS}",'
        f' "{SOLANA}" = "4zMMC9srt5Ri5X14GAgXhaHii3GnPAEERYPJgZJDncDU" }}'
    )
    payments = told(tmp_path / "i", TEXTS + x402(asset=asset, pay_to=pay_to)).payments
    assert payments is not None
    assert payments.networks[BASE][1:4] == (MIXED, "Dollar", "1")
    assert payments.networks[BASE_SEPOLIA][1:4] == (MIXED, "USDC", "2")
    assert payments.networks[SOLANA][1:4] == (SOLANA_ADDRESS, "", "")


def test_routes_take_payments_unless_they_are_free_or_under_v1(tmp_path: Path) -> None:
    routes = [("/api/v1/a", 1, None), ("/b", 1, None), ("/v1/c", 1, None), ("/api/v1/d", 0, None),
              ("/v1/e", 1, True), ("/api/v1/f", 1, False)]  # fmt: skip
    config = '[upstreams.api]\nkind = "http"\nbase_url = "https://api.example.com"\n'
    for path, credits, payable in routes:
        config += (
            f'[[routes]]\npath = "{path}"\nmethods = ["GET"]\nupstream = "api"\n'
            f"credits = {credits}\n"
        )
        config += "" if payable is None else f"x402 = {str(payable).lower()}\n"
    with Box(tmp_path / "i", config + x402()) as box:
        payable_ones = {route.path for route in box.instance.catalog.routes if route.x402}
    assert payable_ones == {"/api/v1/a", "/b", "/v1/e"}


# Whose credentials are whose.


@pytest.fixture
def settlers() -> Iterator[tuple[Settler, Settler]]:
    with Settler() as one, Settler() as other:
        yield one, other


def test_one_facilitators_credentials_are_never_sent_to_the_other(
    tmp_path: Path, settlers: tuple[Settler, Settler]
) -> None:
    one, other = settlers
    config = x402(
        facilitator_url=f'{{ "{BASE}" = "{one.url}/one/", "{SOLANA}" = "{other.url}" }}',
        facilitator_headers=(
            f'{{ "{BASE}" = {{ Authorization = "Bearer {CANARY}-one" }},'
            f' "{SOLANA}" = {{ X-Key = "{CANARY}-other" }} }}'
        ),
    )
    with Box(tmp_path / "i", TEXTS + config) as box:
        challenge = decode(box.sms(None).headers["PAYMENT-REQUIRED"])
        for wallet in (EvmWallet(), SolanaWallet(NODE)):
            assert box.sms(None, PAYMENT_SIGNATURE=wallet.header(challenge)).status == 200
        assert box.cli("doctor").output.count("settles payments") == 2
    assert {hit.path for hit in one.hits()} >= {"/one/settle", "/one/supported"}
    assert {hit.path for hit in other.hits()} >= {"/settle", "/supported"}
    assert (one.settles, other.settles) == (1, 1)
    for hit in one.hits():
        assert hit.header("Authorization") == f"Bearer {CANARY}-one"
        assert f"{CANARY}-other".encode() not in hit.everything()
    for hit in other.hits():
        assert hit.header("X-Key") == f"{CANARY}-other"
        assert f"{CANARY}-one".encode() not in hit.everything()


def test_a_facilitator_for_all_is_sent_its_headers_for_all(
    tmp_path: Path, settlers: tuple[Settler, Settler]
) -> None:
    one, _ = settlers
    config = x402(
        facilitator_url=f'"{one.url}"', facilitator_headers=f'{{ X-Key = "${{{"KEY_OF_IT"}}}" }}'
    )
    with Box(tmp_path / "i", TEXTS + config, KEY_OF_IT=CANARY) as box:
        challenge = decode(box.sms(None).headers["PAYMENT-REQUIRED"])
        for wallet in (EvmWallet(), SolanaWallet(NODE)):
            assert box.sms(None, PAYMENT_SIGNATURE=wallet.header(challenge)).status == 200
    assert {hit.header("X-Key") for hit in one.hits()} == {CANARY}
    assert one.settles == 2


# What nobody is shown.


@pytest.mark.parametrize(
    "config",
    [
        x402(rpc=f'{{ "{BASE}" = "http://node.example/{CANARY}" }}'),
        x402(rpc=f'{{ "{BASE}" = "https://user:{CANARY}@node.example" }}'),
        x402(rpc=f'{{ "{BASE}" = "{CANARY}" }}'),
        x402(facilitator_url=f'"http://x402.example/{CANARY}"'),
        x402(facilitator_url=f'"https://x402.example/?key={CANARY}"'),
        x402(facilitator_url=f'{{ "{BASE}" = "ftp://x402.example/{CANARY}" }}'),
        x402(facilitator_headers=f'{{ Authorization = "{CANARY}é" }}'),
        x402(facilitator_headers=f'{{ "{BASE}" = {{ X-Key = "{CANARY}" }} }}'),
        x402(facilitator_headers=f'{{ X-Key = "{CANARY}" }}', topup_max="0"),
        x402(facilitator_url=SEPARATE, facilitator_headers=f'{{ "{BASE}" = "{CANARY}" }}'),
        # A private key, where its address should be.
        paid_to(BASE, f"0x{CANARY}{'1' * 51}"),
        paid_to(SOLANA, f"{CANARY}{'1' * 74}"),
    ],
)
def test_what_may_be_secret_is_in_no_refusal(tmp_path: Path, config: str) -> None:
    assert CANARY not in refused(tmp_path / "i", TEXTS + config)


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FAREBOX_")}
    return subprocess.run(
        command, cwd=ROOT, env=inherited | {"FAREBOX_INSTANCE": str(folder)} | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def libraries(pid: int) -> str:
    """What a process has mapped, by path."""
    return Path(f"/proc/{pid}/maps").read_text()


def test_a_server_with_payments_keeps_its_secrets_and_one_without_has_nothing_of_them(
    settlers: tuple[Settler, Settler],
) -> None:
    """One server that takes payments and can settle none, and one that takes none."""
    gone = refused_port()
    one, _ = settlers
    config = x402(
        facilitator_url=(
            f'{{ "{BASE}" = "http://127.0.0.1:{gone}/{CANARY}-a", "{SOLANA}" = "{one.url}" }}'
        ),
        facilitator_headers=(
            f'{{ "{BASE}" = {{ Authorization = "Bearer {CANARY}-b" }},'
            f' "{SOLANA}" = {{ X-Key = "{CANARY}-c" }} }}'
        ),
        rpc=(
            f'{{ "{BASE}" = "http://127.0.0.1:{gone}/{CANARY}-d",'
            f' "{SOLANA}" = "http://127.0.0.1:{gone}/{CANARY}-e" }}'
        ),
    )
    with Farebox(TEXTS + config, workers=1) as box:
        challenge = decode(box.sms(None).headers["PAYMENT-REQUIRED"])
        refused_ = box.sms(None, PAYMENT_SIGNATURE=EvmWallet().header(challenge))
        assert (refused_.status, refused_.code) == (503, "facilitator_unavailable")
        told_ = [box.run_flask("doctor", may_fail=True), box.run_flask("payments", "list")]
        seen = "".join(done.stdout + done.stderr for done in told_) + box.log()
        assert "could not be reached" in seen
        assert CANARY not in seen + refused_.body.decode()
        (worker,) = box.workers()
        with_it = libraries(worker)
        # Two headers of that name are one that is no payment.
        header = EvmWallet().header(challenge)
        with box.connect() as sock:
            body = b'{"to": "+18148835337", "message": "hi"}'
            sock.sendall(
                b"POST /api/v1/sms/send HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n"
                % len(body)
                + f"PAYMENT-SIGNATURE: {header}\r\n".encode() * 2
                + b"\r\n"
                + body
            )
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert b"PAYMENT-SIGNATURE" in answer
    with Farebox(TEXTS, workers=1) as box:
        assert box.sms(box.account(5)[1]).status == 200
        (worker,) = box.workers()
        without = libraries(worker)
    for package in PACKAGES:
        assert f"/{package}/" in with_it, package
        assert f"/{package}/" not in without, package


LOADED = """
import sys
from app import create_app
app = create_app()
names = ("coincurve", "nacl", "Crypto", "solders", "x402", "web3", "eth_account", "solana", "httpx")
print(" ".join(name for name in names if name in sys.modules))
"""


def test_only_an_instance_that_takes_payments_loads_what_they_need(tmp_path: Path) -> None:
    """And none loads the official packages, which are for clients."""
    for name, config, loaded in (
        ("with", TEXTS + x402(), "Crypto solders\n"),
        ("without", TEXTS, "\n"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "farebox.toml").write_text(config, "utf-8")
        done = run([sys.executable, "-c", LOADED], folder)
        assert (done.returncode, done.stdout) == (0, loaded), done.stderr


@pytest.fixture(scope="module")
def plain_installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed packages, but for those that only payments need."""
    folder = tmp_path_factory.mktemp("site-packages")
    left_out = re.compile(r"(coincurve|Crypto|pycryptodome|solders)([.-].*)?")
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if not left_out.fullmatch(entry.name):
            (folder / entry.name).symlink_to(entry)
    return folder


def test_without_its_packages_the_section_is_refused_in_one_line_and_all_else_works(
    tmp_path: Path, plain_installation: Path
) -> None:
    python = [sys.executable, "-S"]  # no site-packages but those of PYTHONPATH
    serve = [*python, "-m", "gunicorn", "-c", "gunicorn.conf.py"]
    doctor = [*python, "-m", "flask", "doctor"]
    folders = {"with": TEXTS + x402(), "without": TEXTS}
    for name, config in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "farebox.toml").write_text(config, "utf-8")
    environment = {"PYTHONPATH": str(plain_installation), "FAREBOX_BIND": "127.0.0.1:1"}
    for command in (serve, doctor):
        done = run(command, tmp_path / "with", **environment)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("farebox: farebox.toml: $.x402: needs packages"), line
        assert all(package in line for package in PACKAGES)
        assert "make run" in line
    done = run(doctor, tmp_path / "without", **environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_refusal_of_the_section_ends_every_command_with_2(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    folder.mkdir()
    (folder / "farebox.toml").write_text(TEXTS + paid_to(BASE, TYPO), "utf-8")
    bin_ = Path(sys.executable).parent
    for command in (
        [str(bin_ / "flask"), "payments", "list"],
        [str(bin_ / "gunicorn"), "-c", "gunicorn.conf.py"],
    ):
        done = run(command, folder)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert f"$.x402.pay_to.{BASE}" in line
    assert not (folder / "farebox.db").exists()


def test_the_settings_say_what_no_log_may_show(tmp_path: Path) -> None:
    config = x402(
        facilitator_url=SEPARATE.replace("a.example", f"a.example/{CANARY}"),
        facilitator_headers=f'{{ "{BASE}" = {{ Authorization = "Bearer {CANARY}" }} }}',
        rpc=f'{{ "{SOLANA}" = "https://node.example/{CANARY}" }}',
    )
    settings: Settings = told(tmp_path / "i", TEXTS + config)
    assert {
        f"https://a.example/{CANARY}", f"Bearer {CANARY}", f"https://node.example/{CANARY}",
    } <= settings.secrets  # fmt: skip
    assert json.dumps(sorted(settings.secrets)).count(CANARY) == 3
