"""What every blueprint shares: the instance, the request's id and headers, and how errors look."""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from flask import Response, current_app, request
from werkzeug.exceptions import HTTPException

from core import errors, tokens
from core.errors import Refusal
from core.instance import Instance

log = logging.getLogger("farebox.http")

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def instance() -> Instance:
    """This process's instance."""
    found: Instance = current_app.extensions["farebox"]
    return found


def request_id() -> str:
    """The id of this request: the caller's own when it is sane, else one of ours."""
    return request_ids(request.environ)[0]


def request_ids(environ: dict[str, Any]) -> tuple[str, str]:
    """As `request_id`, and beside it one that is always ours."""
    ids: tuple[str, str] | None = environ.get("farebox.ids")
    if ids is None:
        ours = tokens.new_id("req")
        incoming = environ.get("HTTP_X_REQUEST_ID", "")
        ids = environ["farebox.ids"] = (incoming if _SANE_ID.fullmatch(incoming) else ours, ours)
    return ids


def headers(environ: dict[str, Any]) -> Mapping[str, str]:
    """The request's headers by lower-case name."""
    found = {
        name[5:].replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(name):
            found[name.replace("_", "-").lower()] = environ[name]
    return found


def client_address(environ: dict[str, Any]) -> str:
    found: str = environ.get("REMOTE_ADDR") or "-"
    return found


def raw_path(environ: dict[str, Any]) -> str:
    """The path as it was sent, before any decoding."""
    target: str = environ.get("RAW_URI") or environ.get("REQUEST_URI") or "/"
    return target.partition("?")[0].partition("#")[0]


def json_response(value: Any, status: int = 200, **extra: str) -> Response:
    response = Response(json.dumps(value) + "\n", status, mimetype="application/json")
    response.headers.update(extra)
    return response


def refused(refusal: Refusal) -> Response:
    """The answer to a refusal, in the dialect of the path."""
    settings = instance().settings
    dialect = instance().catalog.dialect_at(request.method, raw_path(request.environ))
    body = refusal.body(dialect, request_id(), f"{settings.public_url}/docs/errors")
    response = json_response(body, refusal.kind.status)
    response.headers.update(refusal.all_headers())
    return response


def http_error(error: HTTPException) -> Response:
    """Flask's and Werkzeug's own errors, told as ours."""
    if error.code == 404:
        return refused(errors.not_found())
    if error.code == 405:
        allowed = set(getattr(error, "valid_methods", None) or ())
        return refused(errors.method_not_allowed(allowed))
    if error.code == 413:
        return refused(Refusal("body_too_large", "The body is too large."))
    if error.code is not None and 400 <= error.code < 500:
        return refused(errors.invalid_body("The request is malformed."))
    return unexpected(error)


def unexpected(error: Exception) -> Response:
    """Our own fault: everything to the log, nothing to the client."""
    log.error("%s %s failed (%s)", request.method, request.path, request_id(), exc_info=error)
    return refused(Refusal("internal_error", "Something went wrong here. Nothing was charged."))
