"""The adapter that passes requests and answers through as they are."""

from core.adapters import Answer, Inbound, Order
from core.catalog import Route, units_in_header, units_in_json
from core.upstream import Outbound, Reply

# What an upstream learns of a request, and a caller of an answer, unless the config adds to it.
FORWARDED = ("accept", "accept-language", "content-type")
RETURNED = (
    "content-type", "content-encoding", "content-language", "content-disposition", "retry-after",
)  # fmt: skip
STREAMED = ("text/event-stream", "application/x-ndjson")
LARGEST_JSON = 8 * 1024 * 1024


class Forward:
    """Implements `Adapter`."""

    def check_media_type(self, content_type: str) -> None:
        """Every type is passed on."""

    def order(self, route: Route, inbound: Inbound) -> Order:
        route.target(inbound.path)  # a path that is not passed on is refused before it is priced
        return Order(route.most_units)

    def outbound(self, route: Route, inbound: Inbound, order: Order) -> Outbound:
        upstream = route.upstream
        names = [*FORWARDED, *(name.lower() for name in upstream.forward_headers)]
        fixed = {name.lower() for name in upstream.headers}
        headers = [
            (name, inbound.headers[name])
            for name in dict.fromkeys(names)
            if name in inbound.headers and name not in fixed
        ]
        if inbound.body and "content-type" not in inbound.headers and "content-type" not in fixed:
            headers.append(("content-type", "application/json"))
        headers += [("X-Request-Id", inbound.request_id), *upstream.headers.items()]
        query = f"?{inbound.query}" if inbound.query else ""
        return Outbound(
            inbound.method,
            route.url(inbound.path) + query,
            headers,
            inbound.body,
            upstream.timeout_seconds,
            upstream.max_seconds,
        )

    def streams(self, route: Route, reply: Reply) -> bool:
        media_type = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        return self.most_bytes(route) is None and media_type in STREAMED

    def most_bytes(self, route: Route) -> int | None:
        from_json = route.units is not None and route.units.from_ == "json"
        return LARGEST_JSON if from_json else None

    def answer(self, route: Route, order: Order, reply: Reply, body: bytes) -> Answer:
        units = 1
        estimated = False
        if route.units is not None:
            found = (
                units_in_json(route.units, body)
                if route.units.from_ == "json"
                else units_in_header(
                    route.units, reply.headers.get((route.units.name or "").lower())
                )
            )
            units, estimated = (1, True) if found is None else (found, False)
        return Answer(reply.status, self._headers(route, reply), body, units, estimated)

    def refusal(self, route: Route, order: Order, reply: Reply, body: bytes) -> Answer:
        return Answer(reply.status, self._headers(route, reply), body)

    def _headers(self, route: Route, reply: Reply) -> list[tuple[str, str]]:
        names = dict.fromkeys(
            [*RETURNED, *(name.lower() for name in route.upstream.return_headers)]
        )
        return [(name.title(), reply.headers[name]) for name in names if name in reply.headers]
