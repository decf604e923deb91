"""What types alone cannot say of a setting. Each check raises ConfigError with the key path."""

import re
from decimal import Decimal
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

import msgspec

from config.sections import (
    FILE_NAME,
    WELL_KNOWN,
    File,
    IssuerSection,
    ModelSection,
    OidcSection,
    RouteSection,
    SmtpSection,
    UpstreamSection,
    is_loopback,
)

# Paths this instance answers itself. A route may stand beside them, never over them.
OWN_PATHS = frozenset(
    {
        "/", "/api/health", "/api/v1/account", "/api/v1/audit", "/api/v1/credits", "/api/v1/keys",
        "/api/v1/ledger", "/api/v1/members", "/api/v1/session-tokens", "/api/v1/usage",
        "/api/v1/wallets", "/v1/account", "/v1/models", "/v1/webhooks", "/healthz", "/metrics",
        "/login", "/logout", "/signup", "/setup", "/forgot", "/reset", "/invite", "/dashboard",
        "/admin", "/oidc", "/docs", "/discovery", "/.well-known", "/openapi.json", "/llms.txt",
        "/llms-full.txt", "/static", "/favicon.ico",
    }
)  # fmt: skip

# Headers that belong to one connection (RFC 9110, 7.6.1) and to its framing.
_CONNECTION = frozenset(
    {"connection", "content-length", "host", "keep-alive", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade", "expect"}
)  # fmt: skip
# What a caller sends to us alone, and what only we say in an answer.
_CREDENTIALS = frozenset(
    {"authorization", "cookie", "proxy-authorization", "idempotency-key", "signature",
     "signature-input"}
)  # fmt: skip
_NOT_FORWARDED = ("payment-", "x-forwarded-", "x-payment")
_OURS = frozenset(
    {"cache-control", "content-security-policy", "date", "idempotent-replayed",
     "referrer-policy", "server", "set-cookie", "vary", "www-authenticate",
     "x-content-type-options", "x-request-id", "x-should-retry"}
)  # fmt: skip
_OUR_PREFIXES = ("access-control-", "payment-", "x-credits-", "x-payment", "x-ratelimit-")

_OF_MODELS = ("openai", "sandbox")  # kinds of upstream that serve language models
_DEAREST_RATE = 10**6  # credits for 1,000 tokens: the largest answer is within what accounts hold

_HOST = r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?|[0-9a-fA-F:]+"
# One character of a user or password in a URL, as itself or percent-encoded, printable ASCII.
_ESCAPED = r"(?:%[2-6][0-9A-Fa-f]|%7[0-9A-Ea-e]|[A-Za-z0-9._~!$&'()*+,;=-])"


class ConfigError(Exception):
    """A setting that cannot be: `path: what is wrong and what was expected`."""


def check(file: File) -> None:
    """Whether the sections of a file make sense, each by itself and together."""
    _check_decimal("$.instance.usd_per_credit", file.instance.usd_per_credit)
    for name, upstream in file.upstreams.items():
        _check_upstream(f"$.upstreams.{name}", upstream)
    for number, host in enumerate(file.instance.hosts):
        if not re.fullmatch(_HOST, host):
            fail(f"$.instance.hosts[{number}]", f"expected a host name, no port, got {host!r}")
    for number, origin in enumerate(file.instance.cors_origins):
        check_url(f"$.instance.cors_origins[{number}]", origin, path=False)
    taken: dict[tuple[str, str], str] = {}
    for number, route in enumerate(file.routes):
        at = f"$.routes[{number}]"
        _check_route(at, route, file.upstreams)
        if route.x402 and file.x402 is None:
            fail(f"{at}.x402", "needs an [x402] section")
        if route.x402 and not route.priced_by_model and not route.credits:
            fail(f"{at}.x402", "a call that costs nothing cannot be paid")
        for method in route.methods:
            if (route.path, method) in taken:
                fail(f"{at}.path", f"{method} {route.path} is already {taken[route.path, method]}")
            taken[route.path, method] = at
    _check_models(file)
    _check_issuers(file.issuers)
    for name, section in file.oidc.items():
        _check_oidc(name, section)
    if file.smtp is not None:
        _check_smtp(file.smtp)


def check_not_ours(issuers: list[IssuerSection], public_url: str) -> None:
    """Whether no issuer goes by this instance's own name, under which it issues tokens itself."""
    for number, section in enumerate(issuers):
        if section.issuer.rstrip("/") == public_url:
            fail(f"$.issuers[{number}].issuer", "expected an issuer other than this instance")


def _check_upstream(at: str, upstream: UpstreamSection) -> None:
    takes = {
        "sandbox": set(),
        "http": {"base_url", "headers", "forward_headers", "return_headers"},
        "openai": {"base_url", "headers", "forward_headers", "return_headers"},
        "twilio": {"base_url", "account_sid", "auth_token", "from_"},
    }[upstream.kind]
    needs = {
        "sandbox": set(),
        "http": {"base_url"},
        "openai": {"base_url"},
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
        check_header(f"{at}.headers.{name}", name, value)
    for key in ("forward_headers", "return_headers"):
        for number, name in enumerate(getattr(upstream, key)):
            _check_header_name(f"{at}.{key}[{number}]", name)
    for number, name in enumerate(upstream.return_headers):
        if name.lower() in _CONNECTION | _OURS or name.lower().startswith(_OUR_PREFIXES):
            fail(f"{at}.return_headers[{number}]", "this header of an answer is ours to set")
    for number, name in enumerate(upstream.forward_headers):
        if name.lower() in _CONNECTION | _CREDENTIALS or name.lower().startswith(_NOT_FORWARDED):
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
    if route.cost_usd is not None:
        _check_decimal(f"{at}.cost_usd", route.cost_usd)
    _check_units(at, route)
    kind = upstreams[route.upstream].kind
    if route.priced_by_model:
        _check_model_route(at, route, kind)
    elif route.credits is None:
        fail(f"{at}.credits", "required, and missing")
    if route.adapter == "sms" and route.methods != ["POST"]:
        fail(f"{at}.methods", 'the sms adapter speaks ["POST"] alone')
    if route.adapter != "sms" and kind == "twilio":
        fail(f"{at}.adapter", 'an upstream of kind "twilio" needs adapter = "sms"')


def _check_model_route(at: str, route: RouteSection, kind: str) -> None:
    adapter = f'adapter = "{route.adapter}"'
    for key in ("credits", "cost_usd"):
        if getattr(route, key) is not None:
            fail(f"{at}.{key}", f"{adapter} is priced by [[models]]")
    if route.path.endswith("/*"):
        fail(f"{at}.path", f"{adapter} needs an exact path")
    if route.methods != ["POST"]:
        fail(f"{at}.methods", f'{adapter} speaks ["POST"] alone')
    if kind not in _OF_MODELS:
        fail(f"{at}.upstream", f'{adapter} needs an upstream of kind "openai" or "sandbox"')


def _check_models(file: File) -> None:
    serving = [route for route in file.routes if route.priced_by_model]
    for number, route in enumerate(file.routes):
        if route in serving and not file.models:
            fail(f"$.routes[{number}]", f'adapter = "{route.adapter}" needs [[models]]')
    taken: dict[str, str] = {}
    for number, model in enumerate(file.models):
        at = f"$.models[{number}]"
        if model.id in taken:
            fail(f"{at}.id", f"{model.id} is already {taken[model.id]}")
        taken[model.id] = at
        _check_model(at, model, file.upstreams)
        firsts = {model.upstream or route.upstream for route in serving}
        if model.fallback is not None and model.fallback in firsts:
            fail(f"{at}.fallback", "expected an upstream other than the first")


def _check_model(at: str, model: ModelSection, upstreams: dict[str, UpstreamSection]) -> None:
    for key in ("upstream", "fallback"):
        name = getattr(model, key)
        if name is not None and name not in upstreams:
            fail(f"{at}.{key}", f"no [upstreams.{name}] is defined")
        if name is not None and upstreams[name].kind not in _OF_MODELS:
            fail(f"{at}.{key}", 'expected an upstream of kind "openai" or "sandbox"')
    for key in ("credits_per_1k_tokens", "credits_per_1k_input_tokens"):
        text = str(getattr(model, key))
        _check_decimal(f"{at}.{key}", text)
        if Decimal(text) > _DEAREST_RATE:
            fail(f"{at}.{key}", f"expected at most {_DEAREST_RATE}")
    for key in ("cost_usd_per_1m_input", "cost_usd_per_1m_output"):
        if getattr(model, key) is not None:
            _check_decimal(f"{at}.{key}", getattr(model, key))


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


def _check_issuers(issuers: list[IssuerSection]) -> None:
    taken: dict[str, str] = {}
    for number, section in enumerate(issuers):
        at = f"$.issuers[{number}]"
        if section.issuer in taken:
            fail(f"{at}.issuer", f"expected another than that of {taken[section.issuer]}")
        taken[section.issuer] = at
        _check_issuer(at, section)


def _check_issuer(at: str, section: IssuerSection) -> None:
    name, url = section.pem_file, section.jwks_url
    if name is None and url is None:
        fail(f"{at}.pem_file", "required, and missing; or jwks_url in its place")
    if name is not None and url is not None:
        fail(f"{at}.jwks_url", "expected pem_file or jwks_url, not both")
    # `backup` takes files of such names along, and no others.
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.pem", name):
        fail(
            f"{at}.pem_file",
            f"expected the name of a file in the instance folder, such as privy.pem, got {name!r}",
        )
    if url is not None:
        check_safe_url(f"{at}.jwks_url", url)


def _check_oidc(name: str, section: OidcSection) -> None:
    at = f"$.oidc.{name}"
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name):
        fail(at, "expected a name of at most 32 of a-z, 0-9, _ and -, a letter first")
    url = section.server_metadata_url
    check_safe_url(f"{at}.server_metadata_url", url)
    if not urlsplit(url).path.endswith(WELL_KNOWN):
        fail(
            f"{at}.server_metadata_url",
            f"expected a path that ends in {WELL_KNOWN}, got {url!r}",
        )
    if not section.label.isprintable() or section.label != section.label.strip():
        fail(f"{at}.label", f"expected printable text, got {section.label!r}")
    scope = section.scope.split(" ")
    if "openid" not in scope or not all(
        re.fullmatch(r"[\x21\x23-\x5b\x5d-\x7e]+", word) for word in scope
    ):
        fail(
            f"{at}.scope",
            f'expected words, one space apart, "openid" among them, got {section.scope!r}',
        )


def _check_smtp(smtp: SmtpSection) -> None:
    parts = _split(smtp.url)
    login, sign, _ = parts.netloc.rpartition("@") if parts else ("", "", "")
    if (
        parts is None
        or parts.scheme not in ("smtp", "smtps")
        or not re.fullmatch(_HOST, parts.hostname or "")
        or parts.path not in ("", "/")
        or re.search(r"[?#]", smtp.url)
        or (sign and not re.fullmatch(f"{_ESCAPED}+:({_ESCAPED}|:)+", login))
    ):
        # Without what it is: there may be a password in it.
        fail(
            "$.smtp.url",
            "expected smtp:// or smtps:// and a host, such as smtp://user:password@host:587, "
            "with user and password printable ASCII, percent-encoded",
        )
    if not re.fullmatch(
        r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?=.{1,190}\Z)[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*",
        smtp.from_,
    ):
        fail("$.smtp.from", f"expected an address such as a@example.com, got {smtp.from_!r}")


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
    parts = _split(url)
    if (
        parts is None
        or parts.scheme not in ("http", "https")
        or parts.query
        or parts.fragment
        or parts.username
        or parts.password
        or (parts.path and not path)
    ):
        fail(at, f"expected http:// or https:// and a host, got {url!r}")


def check_safe_url(at: str, url: str, secret: bool = False) -> None:
    """What it answers is believed, so nobody on the way may change it. A `secret` one, which may
    have a key in it, is not told."""
    parts = _split(url)
    if (
        parts is None
        or "@" in parts.netloc
        or parts.fragment
        or not (
            parts.scheme == "https"
            or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
        )
    ):
        got = "" if secret else f", got {url!r}"
        fail(at, f"expected https:// and a host, or http:// and a loopback address{got}")


def _split(url: str) -> SplitResult | None:
    """The parts of a URL of visible ASCII, with a host and a port that can be; None of others."""
    try:
        parts = urlsplit(url)
        sound = re.fullmatch(r"[\x21-\x7e]+", url) and parts.hostname and parts.port != 0
    except ValueError:
        return None
    return parts if sound else None


def check_header(at: str, name: str, value: str) -> None:
    """Whether a header may be sent with every request to somebody."""
    _check_header_name(at, name)
    if name.lower() in (_CONNECTION | {"x-request-id"}) - {"host"}:
        fail(at, "this header of a request is ours to set")
    if not re.fullmatch(r"[\x20-\x7e\t]*", value):
        fail(at, "expected a value of printable ASCII")


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
