"""What types alone cannot say of a setting. Each check raises ConfigError with the key path."""

import re
from decimal import Decimal
from typing import NoReturn
from urllib.parse import urlsplit

import msgspec

from config.sections import FILE_NAME, File, RouteSection, UpstreamSection

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


class ConfigError(Exception):
    """A setting that cannot be: `path: what is wrong and what was expected`."""


def check(file: File) -> None:
    """Whether the sections of a file make sense, each by itself and together."""
    _check_decimal("$.instance.usd_per_credit", file.instance.usd_per_credit)
    for name, upstream in file.upstreams.items():
        _check_upstream(f"$.upstreams.{name}", upstream)
    for number, host in enumerate(file.instance.hosts):
        if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?|[0-9a-fA-F:]+", host):
            fail(f"$.instance.hosts[{number}]", f"expected a host name, no port, got {host!r}")
    for number, origin in enumerate(file.instance.cors_origins):
        check_url(f"$.instance.cors_origins[{number}]", origin, path=False)
    taken: dict[tuple[str, str], str] = {}
    for number, route in enumerate(file.routes):
        at = f"$.routes[{number}]"
        _check_route(at, route, file.upstreams)
        for method in route.methods:
            if (route.path, method) in taken:
                fail(f"{at}.path", f"{method} {route.path} is already {taken[route.path, method]}")
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
            fail(f"{at}.{field.encode_name}", f"not a key of kind {upstream.kind!r}")
        if not value and field.name in needs:
            fail(f"{at}.{field.encode_name}", f"required for kind {upstream.kind!r}")
    if upstream.base_url is not None:
        check_url(f"{at}.base_url", upstream.base_url)
    for name, value in upstream.headers.items():
        _check_header_name(f"{at}.headers.{name}", name)
        if name.lower() in (_CONNECTION | {"x-request-id"}) - {"host"}:
            fail(f"{at}.headers.{name}", "this header of a request is ours to set")
        if not re.fullmatch(r"[\x20-\x7e\t]*", value):
            fail(f"{at}.headers.{name}", "expected a value of printable ASCII")
    for key in ("forward_headers", "return_headers"):
        for number, name in enumerate(getattr(upstream, key)):
            _check_header_name(f"{at}.{key}[{number}]", name)
    for number, name in enumerate(upstream.return_headers):
        if name.lower() in _CONNECTION | _OURS or name.lower().startswith(_OUR_PREFIXES):
            fail(f"{at}.return_headers[{number}]", "this header of an answer is ours to set")
    for number, name in enumerate(upstream.forward_headers):
        if name.lower() in _CONNECTION | _CREDENTIALS or name.lower().startswith("x-forwarded-"):
            fail(f"{at}.forward_headers[{number}]", "this header is never passed on")


def _check_route(at: str, route: RouteSection, upstreams: dict[str, UpstreamSection]) -> None:
    for key in ("path", "upstream_path"):
        value = getattr(route, key)
        if value is not None and not re.fullmatch(
            r"(/[A-Za-z0-9._~!$&'()+,;=:-]+)*(/\*|/)?", value
        ):
            fail(f"{at}.{key}", f"expected a path such as /api/v1/x or /api/v1/x/*, got {value!r}")
        if value is not None and (not value or "/./" in value + "/" or "/../" in value + "/"):
            fail(f"{at}.{key}", f"expected a plain absolute path, got {value!r}")
    own = _own_path_under(route.path)
    if own is not None:
        fail(f"{at}.path", f"{route.path} lies over {own}, which this instance answers itself")
    if len(set(route.methods)) < len(route.methods):
        fail(f"{at}.methods", "a method is listed twice")
    if route.upstream not in upstreams:
        fail(f"{at}.upstream", f"no [upstreams.{route.upstream}] is defined")
    if route.upstream_path and route.upstream_path.endswith("/*") > route.path.endswith("/*"):
        fail(f"{at}.upstream_path", "ends in /* but the path does not")
    if route.x402:
        fail(f"{at}.x402", "needs an [x402] section")
    if route.cost_usd is not None:
        _check_decimal(f"{at}.cost_usd", route.cost_usd)
    _check_units(at, route)
    kind = upstreams[route.upstream].kind
    if route.adapter == "sms" and route.methods != ["POST"]:
        fail(f"{at}.methods", 'the sms adapter speaks ["POST"] alone')
    if route.adapter != "sms" and kind == "twilio":
        fail(f"{at}.adapter", 'an upstream of kind "twilio" needs adapter = "sms"')


def _check_units(at: str, route: RouteSection) -> None:
    if route.per == "sms_segment" and route.adapter != "sms":
        fail(f"{at}.per", 'sms_segment needs adapter = "sms"')
    if route.per == "unit" and route.adapter != "forward":
        fail(f"{at}.per", 'unit needs adapter = "forward"')
    if (route.per == "unit") != (route.units is not None):
        fail(f"{at}.units", 'goes with per = "unit", and per = "unit" with it')
    if route.units is None:
        return
    if route.units.from_ == "json":
        if not re.fullmatch(r"(/([^~/]|~[01])*)+", route.units.pointer or "") or route.units.name:
            fail(f"{at}.units.pointer", "expected a JSON pointer such as /usage/pages (RFC 6901)")
    elif not route.units.name or route.units.pointer:
        fail(f"{at}.units.name", "expected the name of a response header")
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


def check_url(at: str, url: str, path: bool = True) -> None:
    """Whether a URL is one of http or https, with no query, fragment or user in it."""
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
        fail(at, f"expected http:// or https:// and a host, got {url!r}")


def _check_header_name(at: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
        fail(at, f"expected a header name, got {name!r}")


def _check_decimal(at: str, text: str) -> None:
    form = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,12})?", text)
    if form is None or (Decimal(text) == 0 and at.endswith("usd_per_credit")):
        fail(at, f'expected a positive decimal string such as "0.01", got {text!r}')


def fail(at: str, problem: str) -> NoReturn:
    """Refuse a setting; `at` is a key path of the file, or the name of a variable."""
    file = f"{FILE_NAME}: " if at.startswith("$") else ""
    raise ConfigError(f"{file}{at}: {problem}")
