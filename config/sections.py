"""The sections of `farebox.toml`: each key's name, type, bounds and default."""

from ipaddress import IPv4Network, IPv6Address, ip_address
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

import msgspec

FILE_NAME = "farebox.toml"
WELL_KNOWN = "/.well-known/openid-configuration"  # OpenID Connect Discovery 1.0, 4

Positive = Annotated[int, msgspec.Meta(ge=1)]
Credits = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Bytes = Annotated[int, msgspec.Meta(ge=1, le=64 * 1024 * 1024)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=10**8)]
Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file; a key it does not know is refused."""


class InstanceSection(Section, frozen=True):
    key_prefix: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9]{0,15}\Z")] = "fare"
    usd_per_credit: str = "0.01"
    signup: Literal["closed", "open"] = "closed"
    signup_credits: Credits = 0
    cors_origins: list[str] = []
    hosts: list[str] = []


class UpstreamSection(Section, frozen=True):
    """One upstream; which keys it takes depends on its kind, checked in `checks.py`."""

    kind: Literal["sandbox", "http", "openai", "twilio"]
    base_url: str | None = None
    headers: dict[str, str] = {}
    forward_headers: list[str] = []
    return_headers: list[str] = []
    account_sid: str | None = None
    auth_token: str | None = None
    from_: str | None = msgspec.field(name="from", default=None)
    timeout_seconds: Seconds = 120.0
    max_seconds: Seconds = 3600.0


class UnitsSection(Section, frozen=True):
    """Where an answer says how many units it was."""

    from_: Literal["json", "header"] = msgspec.field(name="from")
    max: Annotated[int, msgspec.Meta(ge=1, le=10**6)]
    pointer: str | None = None
    name: str | None = None


class RouteSection(Section, frozen=True):
    path: str
    methods: Annotated[list[Method], msgspec.Meta(min_length=1)]
    upstream: str
    credits: Credits | None = None  # required, but where [[models]] say the price
    adapter: Literal["forward", "sms", "chat", "completions", "embeddings"] = "forward"
    upstream_path: str | None = None
    scope: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][A-Za-z0-9._:/-]{0,99}\Z")] | None = None
    per: Literal["call", "sms_segment", "unit"] = "call"
    units: UnitsSection | None = None
    dialect: Literal["flat", "object"] | None = None
    x402: bool | None = None  # whether a call can be paid on the spot
    cost_usd: str | None = None
    body_bytes: Bytes | None = None

    @property
    def priced_by_model(self) -> bool:
        """Whether the body names a model, which says the price."""
        return self.adapter in ("chat", "completions", "embeddings")


class ModelSection(Section, frozen=True):
    """A language model, as callers name it, and its price. Rates are whole numbers or decimals."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]{1,200}\Z")]
    credits_per_request: Credits
    upstream: str | None = None
    fallback: str | None = None
    upstream_model: Annotated[str, msgspec.Meta(pattern=r"^[\x20-\x7e]{1,200}\Z")] | None = None
    owned_by: Text = "farebox"
    tier: Text = "standard"
    included_output_tokens: Tokens = 0
    credits_per_1k_tokens: int | str = 0
    credits_per_1k_input_tokens: int | str = 0
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=10**7)] = 4096
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    context_window: Tokens | None = None
    parameters: Text | None = None
    cost_usd_per_1m_input: str | None = None
    cost_usd_per_1m_output: str | None = None


class LimitsSection(Section, frozen=True):
    requests_per_minute: Positive = 600
    body_bytes: Bytes = 1024 * 1024
    failed_auth_per_minute: Positive = 30
    concurrent_calls: Positive = 128


class IssuerSection(Section, frozen=True):
    """Somebody else whose session tokens are taken; its key is in a file or at an address."""

    issuer: Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]{1,255}\Z")]
    audience: Text
    pem_file: str | None = None
    jwks_url: str | None = None
    signup: bool = False


class OidcSection(Section, frozen=True):
    """Somebody else with whom people sign in to the dashboard."""

    server_metadata_url: str
    client_id: Annotated[str, msgspec.Meta(pattern=r"^[\x20-\x7e]+\Z")]
    client_secret: Annotated[str, msgspec.Meta(pattern=r"^[\x20-\x7e]+\Z")]
    # What the button says. Settings has the section's name where the file has nothing.
    label: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] = ""
    scope: str = "openid email profile"


class SmtpSection(Section, frozen=True):
    """How mail is sent. What the URL says is had from the properties."""

    url: str
    from_: str = msgspec.field(name="from")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or (465 if self.implicit_tls else 587)

    @property
    def implicit_tls(self) -> bool:
        """Whether the connection begins with TLS."""
        return urlsplit(self.url).scheme == "smtps"

    @property
    def needs_starttls(self) -> bool:
        """Whether nothing may be said before STARTTLS."""
        return not self.implicit_tls and not is_loopback(self.host)

    @property
    def login(self) -> tuple[str, str] | None:
        """User and password, decoded: printable ASCII. None to send without."""
        parts = urlsplit(self.url)
        if parts.username is None or parts.password is None:
            return None
        return unquote(parts.username), unquote(parts.password)


class AssetSection(Section, frozen=True):
    """A token other than a network's USDC. It too has six decimals and is worth a dollar."""

    address: str
    name: str = "USD Coin"  # of its EIP-712 domain
    version: str = "2"


class X402Section(Section, frozen=True):
    """Payments on the spot. What is not by network is a table by network or one for all."""

    facilitator_url: str | dict[str, str]
    pay_to: Annotated[dict[str, str], msgspec.Meta(min_length=1)]
    facilitator_headers: dict[str, str | dict[str, str]] = {}
    rpc: dict[str, str] = {}
    asset: dict[str, str | AssetSection] = {}
    topup_credits: Positive | None = None
    topup_min: Positive | None = None
    topup_max: Annotated[int, msgspec.Meta(ge=1, le=10**9)] = 100_000


class AlertsSection(Section, frozen=True):
    """When people are told of something before it stops them."""

    credit_low: Credits | None = None


class File(Section, frozen=True):
    """The whole of it."""

    instance: InstanceSection = InstanceSection()
    upstreams: dict[str, UpstreamSection] = {}
    routes: list[RouteSection] = []
    models: list[ModelSection] = []
    limits: LimitsSection = LimitsSection()
    issuers: list[IssuerSection] = []
    oidc: dict[str, OidcSection] = {}
    x402: X402Section | None = None
    smtp: SmtpSection | None = None
    alerts: AlertsSection = AlertsSection()


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own, so that what is sent there stays on it."""
    try:
        address = ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    return address == IPv6Address("::1") or address in IPv4Network("127.0.0.0/8")
