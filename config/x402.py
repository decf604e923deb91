"""The section `[x402]`: who is paid, in what, on which networks, and who settles it."""

import re
from decimal import Decimal
from importlib.util import find_spec
from typing import Any, NamedTuple

from config import base58
from config.checks import check_header, check_safe_url, fail
from config.eip55 import checksummed, is_mistyped
from config.sections import AssetSection, X402Section

USD_UNITS = 10**6  # USDC has six decimals
# What a stock client pays at most without being told to: a top-up that names no amount is within.
_COMMON_LIMIT_UNITS = USD_UNITS
_TOPUP_CREDITS, _TOPUP_MIN = 100, 10

# Circle's USDC by network (https://developers.circle.com/stablecoins/usdc-contract-addresses): the
# token's address and, where it is an EIP-3009 contract, the name and version of its EIP-712 domain.
_USDC = {
    "eip155:1": ("0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48", "USD Coin", "2"),
    "eip155:10": ("0x0b2C639c533813f4Aa9D7837CAf62653d097Ff85", "USD Coin", "2"),
    "eip155:137": ("0x3c499c542cEF5E3811e1192ce70d8cC03d5c3359", "USD Coin", "2"),
    "eip155:8453": ("0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913", "USD Coin", "2"),
    "eip155:42161": ("0xaf88d065e77c8cC2239327C5EDb3A432268e5831", "USD Coin", "2"),
    "eip155:43114": ("0xB97EF9Ef8734C71904D8002F8b6Bc66Dd9c48a6E", "USD Coin", "2"),
    "eip155:43113": ("0x5425890298aed601595a70AB815c96711a31Bc65", "USD Coin", "2"),
    "eip155:84532": ("0x036CbD53842c5426634e7929541eC2318f3dCF7e", "USDC", "2"),
    "eip155:11155111": ("0x1c7D4B196Cb0C7B01d743Fbc6116a902379C7238", "USDC", "2"),
    "solana:5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp": (
        "EPjFWdd5AufqSSqeM2qN1xzybapC8G4wEGGkZwyTDt1v", "", "",
    ),
    "solana:EtWTRABZaYq6iMfeYKouRu166VU2xqa1": (
        "4zMMC9srt5Ri5X14GAgXhaHii3GnPAEERYPJgZJDncDU", "", "",
    ),
}  # fmt: skip
# What requirements-x402.txt installs; only an instance that takes payments has them.
_PACKAGES = ("solders",)


class Network(NamedTuple):
    """A network one can pay on."""

    id: str  # CAIP-2
    asset: str
    asset_name: str  # of its EIP-712 domain; nothing on Solana
    asset_version: str
    pay_to: str
    facilitator_url: str
    facilitator_headers: dict[str, str]
    rpc: str | None

    @property
    def namespace(self) -> str:
        """`eip155` or `solana`."""
        return self.id.partition(":")[0]


class Payments(NamedTuple):
    """How this instance is paid on the spot."""

    networks: dict[str, Network]
    units_per_credit: int
    topup_credits: int
    topup_min: int
    topup_max: int


def payments(section: X402Section, usd_per_credit: str) -> Payments:
    """The section, checked and with its defaults. Raises ConfigError."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        fail(
            "$.x402",
            f"needs packages that are not installed ({', '.join(missing)}): `make run` installs"
            " what is in requirements-x402.lock",
        )
    units = Decimal(usd_per_credit) * USD_UNITS
    if units != int(units):
        fail(
            "$.instance.usd_per_credit",
            f"with [x402], expected a whole number of millionths of a dollar, got {usd_per_credit}",
        )
    networks = {network: _network(section, network) for network in section.pay_to}
    for key in ("facilitator_url", "facilitator_headers", "rpc", "asset"):
        table = getattr(section, key)
        by_network = isinstance(table, dict) and (
            key != "facilitator_headers" or isinstance(section.facilitator_url, dict)
        )
        for network in table if by_network else ():
            if network not in networks:
                fail(f"$.x402.{key}.{network}", "expected a network of pay_to")
    units_per_credit = int(units)
    common = max(1, min(_TOPUP_CREDITS, _COMMON_LIMIT_UNITS // units_per_credit))
    default = section.topup_credits or min(common, section.topup_max)
    least = section.topup_min or min(_TOPUP_MIN, default)
    if not least <= default <= section.topup_max:
        fail("$.x402.topup_credits", "expected an amount from topup_min to topup_max")
    return Payments(networks, units_per_credit, default, least, section.topup_max)


def urls_and_headers(section: X402Section) -> set[str]:
    """What no log may show: headers, and addresses, which may have keys in their paths."""
    urls = section.facilitator_url
    found = set(section.rpc.values()) | ({urls} if isinstance(urls, str) else set(urls.values()))
    for value in section.facilitator_headers.values():
        found |= {value} if isinstance(value, str) else set(value.values())
    return found


def _network(section: X402Section, network: str) -> Network:
    namespace = network.partition(":")[0]
    if not re.fullmatch(r"eip155:[1-9][0-9]{0,18}|solana:[1-9A-HJ-NP-Za-km-z]{32}", network):
        fail(
            f"$.x402.pay_to.{network}",
            "expected a network by its CAIP-2 name, such as eip155:8453 or"
            " solana:5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp",
        )
    at, pay_to = f"$.x402.pay_to.{network}", section.pay_to[network]
    _check_address(at, namespace, pay_to)
    asset, name, version = _asset(section, network, namespace)
    if pay_to.lower() == asset.lower():
        fail(at, "expected an address of yours: this one is the token's, where money is lost")
    url, headers = _facilitator(section, network)
    rpc = section.rpc.get(network)
    if rpc is not None:
        check_safe_url(f"$.x402.rpc.{network}", rpc, secret=True)
    if namespace == "eip155":  # the official clients take no other spelling
        asset, pay_to = checksummed(asset), checksummed(pay_to)
    return Network(network, asset, name, version, pay_to, url.rstrip("/"), headers, rpc)


def _asset(section: X402Section, network: str, namespace: str) -> tuple[str, str, str]:
    """The token's address, and the name and version of its EIP-712 domain."""
    configured = section.asset.get(network)
    known = _USDC.get(network)
    if configured is None:
        if known is None:
            fail(f"$.x402.asset.{network}", "required: the USDC of this network is not known here")
        return known
    given = AssetSection(address=configured) if isinstance(configured, str) else configured
    _check_address(f"$.x402.asset.{network}", namespace, given.address)
    if namespace == "solana":
        return given.address, "", ""
    if isinstance(configured, str) and known is not None:
        return given.address, known[1], known[2]
    return given.address, given.name, given.version


def _facilitator(section: X402Section, network: str) -> tuple[str, dict[str, str]]:
    given, headers = section.facilitator_url, section.facilitator_headers
    at, at_headers = "$.x402.facilitator_url", "$.x402.facilitator_headers"
    # One facilitator's credentials are none of another's business.
    table: Any = headers
    if isinstance(given, dict):
        at, at_headers = f"{at}.{network}", f"{at_headers}.{network}"
        table = headers.get(network, {})
        if not isinstance(table, dict):
            fail(at_headers, "expected a table: there is a facilitator for each network")
    url = given if isinstance(given, str) else given.get(network)
    if url is None:
        fail(at, "required, and missing")
    check_safe_url(at, url, secret=True)
    if "?" in url:
        fail(at, "expected a URL without a query")
    found = {}
    for name, value in table.items():
        here = f"{at_headers}.{name}"
        if not isinstance(value, str):
            fail(here, "expected one value: there is one facilitator")
        check_header(here, name, value)
        found[name] = value
    return url, found


def _check_address(at: str, namespace: str, address: str) -> None:
    """What is no address is not told: it may be a key, taken for one."""
    if namespace == "eip155":
        if not re.fullmatch(r"0x[0-9a-fA-F]{40}", address) or int(address, 16) == 0:
            fail(at, "expected an address of 0x and 40 hexadecimal digits, not all zero")
        if is_mistyped(address):
            fail(
                at, f"the capitals of {address} do not fit (EIP-55): there is a typing error in it"
            )
    elif not any(base58.decode(address, 32) or b""):
        fail(at, "expected an address of 32 bytes in base58, not all zero")
