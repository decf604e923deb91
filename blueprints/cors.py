"""Cross-origin calls from the origins the operator lists, without cookies (Fetch standard)."""

from flask import Blueprint, Response, request

from blueprints.rendering import instance, raw_path
from core import errors

blueprint = Blueprint("cors", __name__)

_EXPOSED = (
    "Idempotent-Replayed, Retry-After, X-Credits-Charged, X-Credits-Held, X-Credits-Remaining,"
    " X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-Request-Id, x-should-retry"
)
_ACCEPTED = "Authorization, Content-Type, Idempotency-Key, X-Request-Id"
_REMEMBER_SECONDS = "600"


@blueprint.before_app_request
def preflight() -> Response | None:
    """Answer a browser's question before the call; never reaches a route, so it is never paid."""
    wanted = request.headers.get("Access-Control-Request-Method")
    if request.method != "OPTIONS" or wanted is None or not _allowed():
        return None
    known = request.url_rule is not None or instance().catalog.methods_at(raw_path(request.environ))
    if not known:
        raise errors.not_found()
    response = Response(status=204)
    response.headers["Access-Control-Allow-Methods"] = "GET, HEAD, POST, PUT, PATCH, DELETE"
    response.headers["Access-Control-Allow-Headers"] = _ACCEPTED
    response.headers["Access-Control-Max-Age"] = _REMEMBER_SECONDS
    return response


@blueprint.after_app_request
def share(response: Response) -> Response:
    """Let a listed origin read the answer."""
    if _allowed():
        response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
    if instance().settings.instance.cors_origins:
        response.vary.add("Origin")
    return response


def _allowed() -> bool:
    origins = instance().settings.instance.cors_origins
    api = request.path.startswith(("/api/", "/v1/"))
    return api and request.headers.get("Origin") in origins
