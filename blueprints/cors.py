"""Cross-origin calls from the origins the operator lists, without cookies (Fetch standard)."""

import re

from blueprints.rendering import Environ
from core.instance import Instance

_EXPOSED = (
    "Idempotent-Replayed, PAYMENT-REQUIRED, PAYMENT-RESPONSE, Retry-After, X-Credits-Charged,"
    " X-Credits-Credited, X-Credits-Held, X-Credits-Remaining,"
    " X-Max-Tokens-Clamped, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset,"
    " X-Request-Id, x-should-retry"
)
_NAMES = re.compile(r"[A-Za-z0-9-]+(?: ?, ?[A-Za-z0-9-]+){0,63}")
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key,"
    " PAYMENT-SIGNATURE, X-Request-Id",
    "Access-Control-Max-Age": "600",
}


def preflight(instance: Instance, environ: Environ) -> dict[str, str] | None:
    """The headers that answer a browser's question before a call; None when it asks nothing."""
    asks = environ["REQUEST_METHOD"] == "OPTIONS" and (
        "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
    )
    if not asks or not _origin(instance, environ):
        return None
    # A listed origin may send what it likes, as everybody else may: OpenAI's client in a browser
    # tells of itself in a dozen headers.
    asked = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
    wanted = asked if _NAMES.fullmatch(asked) else ""
    allowed = ", ".join(filter(None, (_PREFLIGHT["Access-Control-Allow-Headers"], wanted)))
    return _PREFLIGHT | {"Access-Control-Allow-Headers": allowed}


def sharing(instance: Instance, environ: Environ) -> dict[str, str]:
    """The headers that let a listed origin read an answer."""
    if not instance.settings.instance.cors_origins:
        return {}
    origin = _origin(instance, environ)
    if origin is None:
        return {"Vary": "Origin"}
    return {
        "Vary": "Origin",
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": _EXPOSED,
    }


def _origin(instance: Instance, environ: Environ) -> str | None:
    """The origin that asks, if it is listed and asks for the API."""
    origin: str | None = environ.get("HTTP_ORIGIN")
    if not environ["PATH_INFO"].startswith(("/api/", "/v1/")):
        return None
    return origin if origin in instance.settings.instance.cors_origins else None
