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
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import unquote, urlsplit

import msgspec

from config.checks import OWN_PATHS, ConfigError, check, check_not_ours, check_url
from config.pem import read_public_keys
from config.sections import (
    FILE_NAME,
    WELL_KNOWN,
    File,
    InstanceSection,
    IssuerSection,
    LimitsSection,
    Method,
    ModelSection,
    OidcSection,
    RouteSection,
    Section,
    SmtpSection,
    UnitsSection,
    UpstreamSection,
)
from config.x402 import Network, Payments, payments, urls_and_headers

__all__ = [
    "FILE_NAME",
    "OWN_PATHS",
    "ROOT",
    "ConfigError",
    "InstanceSection",
    "IssuerSection",
    "LimitsSection",
    "ModelSection",
    "Network",
    "OidcSection",
    "Payments",
    "RouteSection",
    "Settings",
    "SmtpSection",
    "UnitsSection",
    "UpstreamSection",
    "exit_with",
    "instance_folder",
    "load",
    "load_or_exit",
]

ROOT = Path(__file__).parent.parent

S = TypeVar("S", bound=Section)


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
    models: list[ModelSection]
    configured_at: int  # when the file was last changed, in seconds
    limits: LimitsSection
    payments: Payments | None  # None when nobody can pay on the spot
    issuers: list[IssuerSection]
    issuer_pems: dict[str, str]  # `iss` → the text of its pem_file, of issuers that have one
    oidc: dict[str, OidcSection]
    smtp: SmtpSection | None
    credit_low: int | None  # at or below so many credits people are told that they run low
    # What no log may show: the instance's keys, what others are sent, and all that came by ${NAME}.
    secrets: frozenset[str]

    @cached_property
    def origin(self) -> str:
        """Scheme, host and port of our addresses, in normal form (RFC 9110, 4.2.3)."""
        parts = urlsplit(self.public_url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        default = {"http": 80, "https": 443}[parts.scheme]
        port = "" if parts.port in (None, default) else f":{parts.port}"
        return f"{parts.scheme}://{host}{port}"

    @property
    def database_path(self) -> Path:
        return self.folder / "farebox.db"

    @property
    def incarnations(self) -> Path:
        return self.folder / "workers"

    @property
    def oidc_issuers(self) -> frozenset[str]:
        """The providers one can sign in with, by `iss` without a slash at its end."""
        urls = (section.server_metadata_url for section in self.oidc.values())
        return frozenset(url.partition("?")[0].removesuffix(WELL_KNOWN).rstrip("/") for url in urls)

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
        check(file)
        usd_per_credit = file.instance.usd_per_credit
        payable = None if file.x402 is None else payments(file.x402, usd_per_credit)
        issuer_pems = read_public_keys(folder, file.issuers)
    except ConfigError as error:
        # What came from the environment may be a secret, and this line goes to a log.
        text = str(error)
        # As it is, and as `!r` shows it: alone, or in a text with quotes of both kinds.
        shown = {form for value in interpolated
                 for form in (value, repr(value)[1:-1], repr("'\"" + value)[4:-1])}  # fmt: skip
        for form in sorted(shown, key=len, reverse=True):
            text = text.replace(form, "…")
        # The name of a table may have a newline in it.
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        raise ConfigError(text) from None
    bind = environ.get("FAREBOX_BIND") or "127.0.0.1:8402"
    bound = re.fullmatch(r"(?:\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", bind)
    if bound is None or not 1 <= int(bound[1]) <= 65_535:
        raise ConfigError(f"FAREBOX_BIND: expected host:port, got {bind!r}")
    public_url = (environ.get("FAREBOX_PUBLIC_URL") or f"http://{bind}").rstrip("/")
    check_url("FAREBOX_PUBLIC_URL", public_url)
    check_not_ours(file.issuers, public_url)
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
        usd_per_credit=Decimal(usd_per_credit),
        instance=file.instance,
        upstreams=file.upstreams,
        routes=file.routes,
        models=file.models,
        configured_at=int((folder / FILE_NAME).stat().st_mtime),
        limits=file.limits,
        payments=payable,
        issuers=file.issuers,
        issuer_pems=issuer_pems,
        oidc={name: _labelled(name, section) for name, section in file.oidc.items()},
        smtp=file.smtp,
        credit_low=file.alerts.credit_low,
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


def _read_file(path: Path, environ: Mapping[str, str], interpolated: set[str]) -> File:
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
    # One by one, because msgspec's path does not say which entry of a table it means.
    _convert_each(raw, "upstreams", UpstreamSection)
    _convert_each(raw, "oidc", OidcSection)
    return _convert(raw, File, "$")


def _convert_each(raw: dict[str, Any], key: str, shape: type[Section]) -> None:
    tables = raw.get(key)
    if isinstance(tables, dict):
        for name, table in tables.items():
            _convert(table, shape, f"$.{key}.{name}")


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
    for section in (InstanceSection, UpstreamSection, UnitsSection, RouteSection, ModelSection):
        hints = get_type_hints(section)
        for field in msgspec.structs.fields(section):
            for hint in (hints[field.name], *get_args(hints[field.name])):
                if get_origin(hint) is Literal:
                    found[field.encode_name] = get_args(hint)
    return found


def _written(file: File) -> set[str]:
    """The secrets that others are sent, wherever they came from."""
    sections = file.upstreams.values()
    values = {value for section in sections for value in section.headers.values()}
    values |= {section.auth_token for section in sections if section.auth_token}
    values |= {section.client_secret for section in file.oidc.values()}
    values |= set() if file.x402 is None else urls_and_headers(file.x402)
    password = urlsplit(file.smtp.url).password if file.smtp else None
    return values | {password, unquote(password)} if password else values


def _labelled(name: str, section: OidcSection) -> OidcSection:
    return section if section.label else msgspec.structs.replace(section, label=name.capitalize())


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
