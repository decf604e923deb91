"""Routes and prices: match a request, say what it would cost."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from config import RouteSection, Settings, UnitsSection, UpstreamSection
from core import errors, strict_json
from core.tariff import Model

MIB = 1024 * 1024
_MODELS_BODY_BYTES = 20 * MIB  # images come in the body
# What may follow a wildcard. Dot segments, encoded separators and empty segments could reach
# another path upstream than the one that was priced.
_SAFE_SUFFIX = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:%/-]*", re.ASCII)
_UNSAFE = re.compile(
    r"//|%2f|%5c|%00|%40|%(?![0-9a-f]{2})"
    # A letter, digit or -._~ written as %XX means the same to the upstream (RFC 3986, 6.2.2.2),
    # and could spell a path with a price of its own.
    r"|%(?:2d|2e|3[0-9]|4[1-9a-f]|5[0-9a]|5f|6[1-9a-f]|7[0-9a]|7e)",
    re.ASCII | re.IGNORECASE,
)
# `..;x` is a dot segment too to servers that read path parameters.
_DOTS = re.compile(r"(?:\.|%2e){1,2}(?:(?:;|%3b).*)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Route:
    """A priced path, with the upstream that serves it."""

    path: str
    methods: frozenset[str]
    upstream_name: str
    upstream: UpstreamSection
    upstream_path: str
    adapter: str
    scope: str | None
    credits: int
    per: str
    units: UnitsSection | None
    dialect: str
    cost_usd: Decimal | None
    body_bytes: int
    x402: bool = False  # whether a call can be paid on the spot
    models: Mapping[str, Model] = field(default_factory=dict)  # by id, where they say the price

    @property
    def most_units(self) -> int:
        """The units a call is held for when only its answer says how many it was."""
        return 1 if self.units is None else self.units.max

    def target(self, path: str) -> str:
        """The upstream's path for a request's path, which this route matched.

        Raises `validation_error` for a suffix that could mean another path to the upstream.
        """
        if not self.path.endswith("/*"):
            return self.upstream_path
        suffix = path[len(self.path) - 1 :]
        segments = suffix.split("/")
        if (
            not _SAFE_SUFFIX.fullmatch(suffix)
            or suffix.startswith("/")
            or _UNSAFE.search(suffix)
            or any(_DOTS.fullmatch(segment) for segment in segments)
        ):
            raise errors.invalid_body("The path has a part that is not passed on.")
        if self.upstream_path.endswith("/*"):
            return self.upstream_path[:-1] + suffix
        return self.upstream_path

    def url(self, path: str, upstream: UpstreamSection | None = None) -> str:
        """Where a request's path goes, to the route's upstream or another, without its query.

        Raises as `target` does.
        """
        upstream = upstream or self.upstream
        target = self.target(path)
        if upstream.kind == "openai":
            target = target.removeprefix("/v1")  # its base URL ends in the version
        return (upstream.base_url or "http://sandbox").rstrip("/") + target

    def price(self, units: int) -> int:
        """What so many units cost, in credits."""
        return self.credits if self.per == "call" else self.credits * units

    @property
    def least_price(self) -> int:
        """What the smallest call asks for, in credits: who cannot be told a price is told this."""
        if self.models:
            least = min(model.section.credits_per_request for model in self.models.values())
        else:
            least = self.price(self.most_units)
        return max(1, least)

    def cost(self, units: int) -> str | None:
        """What `units` cost the operator in dollars, as a decimal string, if the route says."""
        return None if self.cost_usd is None else format(self.cost_usd * units, "f")


class Catalog:
    """The route table: exact paths win over `/*`, longer ones over shorter."""

    def __init__(self, settings: Settings) -> None:
        self._exact: dict[str, dict[str, Route]] = {}
        self._wild: list[tuple[str, dict[str, Route]]] = []
        wild: dict[str, dict[str, Route]] = {}
        self.routes = [_route(section, settings) for section in settings.routes]
        # Every route that has models has them all.
        self.models = next((route.models for route in self.routes if route.models), {})
        for route in self.routes:
            table = wild if route.path.endswith("/*") else self._exact
            by_method = table.setdefault(route.path.removesuffix("*"), {})
            by_method.update(dict.fromkeys(route.methods, route))
        self._wild = sorted(wild.items(), key=lambda item: -len(item[0]))

    def methods_at(self, path: str) -> dict[str, Route]:
        """The routes at a path as it was sent, undecoded, by method; empty when there is none."""
        exact = self._exact.get(path)
        if exact is not None:
            return exact
        for prefix, by_method in self._wild:
            if path.startswith(prefix):
                return by_method
        return {}

    def dialect_at(self, method: str, path: str) -> str:
        """The dialect in which errors of such a request are told."""
        by_method = self.methods_at(path)
        route = by_method.get(method) or next(iter(by_method.values()), None)
        return errors.dialect_of(path) if route is None else route.dialect

    def match(self, method: str, path: str) -> Route:
        """The route of a request. Raises `not_found` or `method_not_allowed`."""
        by_method = self.methods_at(path)
        if not by_method:
            raise errors.not_found()
        if method not in by_method:
            raise errors.method_not_allowed(by_method)
        return by_method[method]


def _route(section: RouteSection, settings: Settings) -> Route:
    return Route(
        path=section.path,
        methods=frozenset(section.methods),
        upstream_name=section.upstream,
        upstream=settings.upstreams[section.upstream],
        upstream_path=section.upstream_path or section.path,
        adapter=section.adapter,
        scope=section.scope,
        credits=section.credits or 0,
        per=section.per,
        units=section.units,
        dialect=section.dialect or errors.dialect_of(section.path),
        cost_usd=None if section.cost_usd is None else Decimal(section.cost_usd),
        body_bytes=section.body_bytes
        or (_MODELS_BODY_BYTES if section.priced_by_model else settings.limits.body_bytes),
        x402=_is_payable(section, settings),
        models=_models(section.upstream, settings) if section.priced_by_model else {},
    )


def _is_payable(section: RouteSection, settings: Settings) -> bool:
    if settings.payments is None:
        return False
    if section.x402 is None:
        costs = section.priced_by_model or bool(section.credits)
        return costs and not section.path.startswith("/v1/")
    return section.x402


def _models(first: str, settings: Settings) -> dict[str, Model]:
    """What a route of such an upstream serves, in the order of the file."""
    found = {}
    for section in settings.models:
        names = [section.upstream or first, *filter(None, [section.fallback])]
        upstreams = tuple(settings.upstreams[name] for name in names)
        found[section.id] = Model.of(section, upstreams)
    return found


def units_in_json(units: UnitsSection, body: bytes) -> int | None:
    """The whole number at the pointer (RFC 6901) in a JSON answer, within 1 and `max`, or None."""
    try:
        value = strict_json.decode(body)
    except ValueError:
        return None
    for part in (units.pointer or "").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and re.fullmatch(r"0|[1-9][0-9]{0,8}", name):
            value = value[int(name)] if int(name) < len(value) else None
        else:
            return None
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return _within(value, units.max)


def units_in_header(units: UnitsSection, value: str | None) -> int | None:
    """The whole number in a response header, within 1 and `max`, or None."""
    found = re.fullmatch(r"[ \t]*(-?)0*([0-9]+)[ \t]*", value or "", re.ASCII)
    if found is None:
        return None
    return 1 if found[1] else _within(int(found[2][:15]), units.max)


def _within(value: int, most: int) -> int:
    return max(1, min(most, value))
