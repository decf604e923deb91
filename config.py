"""The one reader of `farebox.toml` and the environment. It refuses to start half-set.

Every problem is one `ConfigError` line that names the key path and what was expected.
"""

import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec

ROOT = Path(__file__).parent
FILE_NAME = "farebox.toml"

# Paths this instance answers itself. A route may stand beside them, never over them.
OWN_PATHS = frozenset(
    {
        "/", "/api/health", "/api/v1/account", "/api/v1/credits", "/api/v1/keys",
        "/api/v1/ledger", "/api/v1/members", "/api/v1/session-tokens", "/api/v1/usage",
        "/api/v1/wallets", "/v1/account", "/v1/models", "/v1/webhooks", "/healthz", "/metrics",
        "/login", "/logout", "/setup", "/reset", "/invite", "/dashboard", "/admin", "/oidc",
        "/docs", "/discovery", "/.well-known", "/openapi.json", "/llms.txt", "/llms-full.txt",
        "/static", "/favicon.ico",
    }
)  # fmt: skip

# Headers that belong to one connection (RFC 9110, 7.6.1) and to its framing.
_CONNECTION = frozenset(
    {"connection", "content-length", "host", "keep-alive", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade", "expect"}
)  # fmt: skip
# What a caller sends to us alone, and what only we say in an answer.
_CREDENTIALS = frozenset(
    {"authorization", "cookie", "proxy-authorization", "idempotency-key", "x-payment",
     "payment-signature", "payment-retry", "payment-recovery", "signature", "signature-input"}
)  # fmt: skip
_OURS = frozenset(
    {"cache-control", "content-security-policy", "date", "idempotent-replayed",
     "referrer-policy", "server", "set-cookie", "vary", "www-authenticate",
     "x-content-type-options", "x-request-id", "x-should-retry"}
)  # fmt: skip
_OUR_PREFIXES = ("access-control-", "payment-", "x-credits-", "x-payment", "x-ratelimit-")

S = TypeVar("S", bound="_Section")
Positive = Annotated[int, msgspec.Meta(ge=1)]
Credits = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Bytes = Annotated[int, msgspec.Meta(ge=1, le=64 * 1024 * 1024)]
Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


class ConfigError(Exception):
    """A setting that cannot be: `path: what is wrong and what was expected`."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file; a key it does not know is refused."""


class InstanceSection(_Section, frozen=True):
    key_prefix: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9]{0,15}\Z")] = "fare"
    usd_per_credit: str = "0.01"
    signup: Literal["closed", "open"] = "closed"
    signup_credits: Credits = 0
    cors_origins: list[str] = []
    hosts: list[str] = []


class UpstreamSection(_Section, frozen=True):
    """One upstream; which keys it takes depends on its kind, checked in `_check_upstream`."""

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


class UnitsSection(_Section, frozen=True):
    """Where an answer says how many units it was."""

    from_: Literal["json", "header"] = msgspec.field(name="from")
    max: Annotated[int, msgspec.Meta(ge=1, le=10**6)]
    pointer: str | None = None
    name: str | None = None


class RouteSection(_Section, frozen=True):
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


class LimitsSection(_Section, frozen=True):
    requests_per_minute: Positive = 600
    body_bytes: Bytes = 1024 * 1024
    failed_auth_per_minute: Positive = 30
    concurrent_calls: Positive = 128


class _File(_Section, frozen=True):
    instance: InstanceSection = InstanceSection()
    upstreams: dict[str, UpstreamSection] = {}
    routes: list[RouteSection] = []
    limits: LimitsSection = LimitsSection()


@dataclass(frozen=True)
class Settings:
    """Everything an instance was told, checked."""

    folder: Path
    bind: str
    public_url: str
    workers: int
    threads: int
    trusted_proxies: int
    operator_key: str | None
    secret_key: str
    usd_per_credit: Decimal
    instance: InstanceSection
    upstreams: dict[str, UpstreamSection]
    routes: list[RouteSection]
    limits: LimitsSection
    # What no log may show: the instance's keys, the upstreams', and all that came by ${NAME}.
    secrets: frozenset[str]

    @property
    def database_path(self) -> Path:
        return self.folder / "farebox.db"

    @property
    def incarnations(self) -> Path:
        return self.folder / "workers"

    @property
    def hosts(self) -> frozenset[str]:
        """The host names, without ports, this instance answers to."""
        named = {*self.instance.hosts, urlsplit(self.public_url).hostname or "", "localhost"}
        bind = urlsplit(f"//{self.bind}").hostname or ""
        named |= {bind, "127.0.0.1", "::1"} if bind in ("0.0.0.0", "::") else {bind}
        return frozenset(name.lower() for name in named if name)


def instance_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where the database, the config and the generated secrets live."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("FAREBOX_INSTANCE") or ROOT / "instance").resolve()


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the instance folder and the environment. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    folder = instance_folder(environ)
    interpolated: set[str] = set()
    try:
        file = _read_file(folder / FILE_NAME, environ, interpolated)
        _check(file)
    except ConfigError as error:
        # What came from the environment may be a secret, and this line goes to a log.
        text = str(error)
        for value in sorted(interpolated, key=len, reverse=True):
            text = text.replace(value, "…")
        raise ConfigError(text) from None
    bind = environ.get("FAREBOX_BIND") or "127.0.0.1:8402"
    bound = re.fullmatch(r"(?:\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", bind)
    if bound is None or not 1 <= int(bound[1]) <= 65_535:
        raise ConfigError(f"FAREBOX_BIND: expected host:port, got {bind!r}")
    public_url = (environ.get("FAREBOX_PUBLIC_URL") or f"http://{bind}").rstrip("/")
    _check_url("FAREBOX_PUBLIC_URL", public_url)
    operator_key = environ.get("FAREBOX_OPERATOR_KEY")
    if operator_key is not None and not re.fullmatch(
        r"[\x21-\x2b\x2d-\x7e]{32,8000}", operator_key
    ):
        raise ConfigError(
            "FAREBOX_OPERATOR_KEY: expected at least 32 visible ASCII characters and no comma"
        )
    secret_key = environ.get("FAREBOX_SECRET_KEY") or _stored_secret(folder)
    if len(secret_key) < 32:
        raise ConfigError("FAREBOX_SECRET_KEY: expected at least 32 characters")
    return Settings(
        folder=folder,
        bind=bind,
        public_url=public_url,
        workers=_number(environ, "FAREBOX_WORKERS", 2, 1, 64),
        threads=_number(environ, "FAREBOX_THREADS", 32, 1, 1000),
        trusted_proxies=_number(environ, "FAREBOX_TRUSTED_PROXIES", 0, 0, 10),
        operator_key=operator_key,
        secret_key=secret_key,
        usd_per_credit=Decimal(file.instance.usd_per_credit),
        instance=file.instance,
        upstreams=file.upstreams,
        routes=file.routes,
        limits=file.limits,
        secrets=frozenset(filter(None, {secret_key, operator_key, *interpolated, *_written(file)})),
    )


def load_or_exit() -> Settings:
    """As `load`; a problem is one line on standard error and exit code 2."""
    try:
        return load()
    except ConfigError as error:
        exit_with(str(error))


def exit_with(problem: str) -> NoReturn:
    """End the process for a problem of configuration: one line, exit code 2."""
    print(f"farebox: {problem}", file=sys.stderr)
    raise SystemExit(2)


# The file


def _read_file(path: Path, environ: Mapping[str, str], interpolated: set[str]) -> _File:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; `make run` writes a first one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name}: not TOML: {error}") from error
    raw = _interpolate(raw, "$", environ, interpolated)
    upstreams = raw.get("upstreams")
    if isinstance(upstreams, dict):
        # One by one, because msgspec's path does not say which entry of a table it means.
        for name, table in upstreams.items():
            _convert(table, UpstreamSection, f"$.upstreams.{name}")
    return _convert(raw, _File, "$")


def _convert(raw: Any, shape: type[S], at: str) -> S:
    try:
        return msgspec.convert(raw, shape)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{FILE_NAME}: {_explain(str(error), at)}") from error


def _interpolate(value: Any, path: str, environ: Mapping[str, str], found: set[str]) -> Any:
    """Replace `${NAME}` in every string by the environment's variable of that name."""
    if isinstance(value, dict):
        return {k: _interpolate(v, f"{path}.{k}", environ, found) for k, v in value.items()}
    if isinstance(value, list):
        return [_interpolate(v, f"{path}[{i}]", environ, found) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        text = environ.get(match[1])
        if not text:
            raise ConfigError(f"{FILE_NAME}: {path}: environment variable {match[1]} is not set")
        found.add(text)
        return text

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", variable, value)


def _explain(message: str, at: str) -> str:
    """msgspec's `problem - at $.path` as `$.path: problem`, with what was expected."""
    problem, _, path = message.partition(" - at ")
    path = at + path.strip("`").removeprefix("$")
    if problem.startswith("Invalid enum value"):
        key = re.sub(r"\[[0-9]+\]", "", path).rpartition(".")[2]
        problem += f", expected one of {', '.join(_choices()[key])}"
    unknown = re.search(r"unknown field `(.+)`", problem)
    if unknown:
        return f"{path}.{unknown[1]}: unknown key"
    missing = re.search(r"missing required field `(.+)`", problem)
    if missing:
        return f"{path}.{missing[1]}: required, and missing"
    return f"{path}: {problem[0].lower()}{problem[1:]}"


def _choices() -> dict[str, tuple[str, ...]]:
    """The values a key may have, for keys that are one of a few."""
    found: dict[str, tuple[str, ...]] = {"methods": get_args(Method)}
    for section in (InstanceSection, UpstreamSection, UnitsSection, RouteSection):
        hints = get_type_hints(section)
        for field in msgspec.structs.fields(section):
            for hint in (hints[field.name], *get_args(hints[field.name])):
                if get_origin(hint) is Literal:
                    found[field.encode_name] = get_args(hint)
    return found


def _written(file: _File) -> set[str]:
    """The secrets that upstreams are sent, wherever they came from."""
    sections = file.upstreams.values()
    values = {value for section in sections for value in section.headers.values()}
    return values | {section.auth_token for section in sections if section.auth_token}


# What types alone cannot say


def _check(file: _File) -> None:
    _check_decimal("$.instance.usd_per_credit", file.instance.usd_per_credit)
    for name, upstream in file.upstreams.items():
        _check_upstream(f"$.upstreams.{name}", upstream)
    for number, host in enumerate(file.instance.hosts):
        if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?|[0-9a-fA-F:]+", host):
            _fail(f"$.instance.hosts[{number}]", f"expected a host name, no port, got {host!r}")
    for number, origin in enumerate(file.instance.cors_origins):
        _check_url(f"$.instance.cors_origins[{number}]", origin, path=False)
    taken: dict[tuple[str, str], str] = {}
    for number, route in enumerate(file.routes):
        at = f"$.routes[{number}]"
        _check_route(at, route, file.upstreams)
        for method in route.methods:
            if (route.path, method) in taken:
                _fail(f"{at}.path", f"{method} {route.path} is already {taken[route.path, method]}")
            taken[route.path, method] = at


def _check_upstream(at: str, upstream: UpstreamSection) -> None:
    takes = {
        "sandbox": set(),
        "http": {"base_url", "headers", "forward_headers", "return_headers"},
        "twilio": {"base_url", "account_sid", "auth_token", "from_"},
    }[upstream.kind]
    needs = {
        "sandbox": set(),
        "http": {"base_url"},
        "twilio": {"account_sid", "auth_token", "from_"},
    }[upstream.kind]
    for field in msgspec.structs.fields(UpstreamSection):
        value = getattr(upstream, field.name)
        if field.name in ("kind", "timeout_seconds", "max_seconds"):
            continue
        if value and field.name not in takes:
            _fail(f"{at}.{field.encode_name}", f"not a key of kind {upstream.kind!r}")
        if not value and field.name in needs:
            _fail(f"{at}.{field.encode_name}", f"required for kind {upstream.kind!r}")
    if upstream.base_url is not None:
        _check_url(f"{at}.base_url", upstream.base_url)
    for name, value in upstream.headers.items():
        _check_header_name(f"{at}.headers.{name}", name)
        if name.lower() in (_CONNECTION | {"x-request-id"}) - {"host"}:
            _fail(f"{at}.headers.{name}", "this header of a request is ours to set")
        if not re.fullmatch(r"[\x20-\x7e\t]*", value):
            _fail(f"{at}.headers.{name}", "expected a value of printable ASCII")
    for key in ("forward_headers", "return_headers"):
        for number, name in enumerate(getattr(upstream, key)):
            _check_header_name(f"{at}.{key}[{number}]", name)
    for number, name in enumerate(upstream.return_headers):
        if name.lower() in _CONNECTION | _OURS or name.lower().startswith(_OUR_PREFIXES):
            _fail(f"{at}.return_headers[{number}]", "this header of an answer is ours to set")
    for number, name in enumerate(upstream.forward_headers):
        if name.lower() in _CONNECTION | _CREDENTIALS or name.lower().startswith("x-forwarded-"):
            _fail(f"{at}.forward_headers[{number}]", "this header is never passed on")


def _check_route(at: str, route: RouteSection, upstreams: dict[str, UpstreamSection]) -> None:
    for key in ("path", "upstream_path"):
        value = getattr(route, key)
        if value is not None and not re.fullmatch(
            r"(/[A-Za-z0-9._~!$&'()+,;=:-]+)*(/\*|/)?", value
        ):
            _fail(f"{at}.{key}", f"expected a path such as /api/v1/x or /api/v1/x/*, got {value!r}")
        if value is not None and (not value or "/./" in value + "/" or "/../" in value + "/"):
            _fail(f"{at}.{key}", f"expected a plain absolute path, got {value!r}")
    own = _own_path_under(route.path)
    if own is not None:
        _fail(f"{at}.path", f"{route.path} lies over {own}, which this instance answers itself")
    if len(set(route.methods)) < len(route.methods):
        _fail(f"{at}.methods", "a method is listed twice")
    if route.upstream not in upstreams:
        _fail(f"{at}.upstream", f"no [upstreams.{route.upstream}] is defined")
    if route.upstream_path and route.upstream_path.endswith("/*") > route.path.endswith("/*"):
        _fail(f"{at}.upstream_path", "ends in /* but the path does not")
    if route.x402:
        _fail(f"{at}.x402", "needs an [x402] section")
    if route.cost_usd is not None:
        _check_decimal(f"{at}.cost_usd", route.cost_usd)
    _check_units(at, route)
    kind = upstreams[route.upstream].kind
    if route.adapter == "sms" and route.methods != ["POST"]:
        _fail(f"{at}.methods", 'the sms adapter speaks ["POST"] alone')
    if route.adapter != "sms" and kind == "twilio":
        _fail(f"{at}.adapter", 'an upstream of kind "twilio" needs adapter = "sms"')


def _check_units(at: str, route: RouteSection) -> None:
    if route.per == "sms_segment" and route.adapter != "sms":
        _fail(f"{at}.per", 'sms_segment needs adapter = "sms"')
    if route.per == "unit" and route.adapter != "forward":
        _fail(f"{at}.per", 'unit needs adapter = "forward"')
    if (route.per == "unit") != (route.units is not None):
        _fail(f"{at}.units", 'goes with per = "unit", and per = "unit" with it')
    if route.units is None:
        return
    if route.units.from_ == "json":
        if not re.fullmatch(r"(/([^~/]|~[01])*)+", route.units.pointer or "") or route.units.name:
            _fail(f"{at}.units.pointer", "expected a JSON pointer such as /usage/pages (RFC 6901)")
    elif not route.units.name or route.units.pointer:
        _fail(f"{at}.units.name", "expected the name of a response header")
    else:
        _check_header_name(f"{at}.units.name", route.units.name)


def _own_path_under(path: str) -> str | None:
    """The path of ours that `path`, exact or ending in `/*`, would reach."""
    stem = path.removesuffix("*").rstrip("/")
    for own in sorted(OWN_PATHS):
        if stem == own or (stem.startswith(own.rstrip("/") + "/") and own != "/"):
            return own
        if path.endswith("/*") and (own == stem or own.startswith(stem + "/")):
            return own
    return "/" if not stem else None


def _check_url(at: str, url: str, path: bool = True) -> None:
    try:
        parts = urlsplit(url)
        valid = (
            re.fullmatch(r"[\x21-\x7e]+", url)
            and parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and not (parts.query or parts.fragment or parts.username or parts.password)
            and (path or not parts.path)
        )
    except ValueError:
        valid = False
    if not valid:
        _fail(at, f"expected http:// or https:// and a host, got {url!r}")


def _check_header_name(at: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
        _fail(at, f"expected a header name, got {name!r}")


def _check_decimal(at: str, text: str) -> None:
    form = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,12})?", text)
    if form is None or (Decimal(text) == 0 and at.endswith("usd_per_credit")):
        _fail(at, f'expected a positive decimal string such as "0.01", got {text!r}')


def _fail(at: str, problem: str) -> NoReturn:
    file = f"{FILE_NAME}: " if at.startswith("$") else ""
    raise ConfigError(f"{file}{at}: {problem}")


# The environment


def _number(environ: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = environ.get(name)
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,6}", text) or not least <= int(text) <= most:
        raise ConfigError(f"{name}: expected a whole number from {least} to {most}, got {text!r}")
    return int(text)


def _stored_secret(folder: Path) -> str:
    path = folder / "secret_key"
    try:
        return path.read_text("ascii").strip()
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; `make run` makes one") from None
