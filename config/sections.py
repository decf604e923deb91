"""The sections of `farebox.toml`: each key's name, type, bounds and default."""

from typing import Annotated, Literal

import msgspec

FILE_NAME = "farebox.toml"

Positive = Annotated[int, msgspec.Meta(ge=1)]
Credits = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Bytes = Annotated[int, msgspec.Meta(ge=1, le=64 * 1024 * 1024)]
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

    kind: Literal["sandbox", "http", "twilio"]
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
    credits: Credits
    adapter: Literal["forward", "sms"] = "forward"
    upstream_path: str | None = None
    scope: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][A-Za-z0-9._:/-]{0,99}\Z")] | None = None
    per: Literal["call", "sms_segment", "unit"] = "call"
    units: UnitsSection | None = None
    dialect: Literal["flat", "object"] | None = None
    x402: bool = False
    cost_usd: str | None = None
    body_bytes: Bytes | None = None


class LimitsSection(Section, frozen=True):
    requests_per_minute: Positive = 600
    body_bytes: Bytes = 1024 * 1024
    failed_auth_per_minute: Positive = 30
    concurrent_calls: Positive = 128


class File(Section, frozen=True):
    """The whole of it."""

    instance: InstanceSection = InstanceSection()
    upstreams: dict[str, UpstreamSection] = {}
    routes: list[RouteSection] = []
    limits: LimitsSection = LimitsSection()
