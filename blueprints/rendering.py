"""What all doors share: reading a WSGI request, and how answers and errors look.

The functions that take `environ` know no framework, because the paid routes are served without one.
"""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from flask import Response, current_app, render_template, request
from werkzeug.datastructures import MIMEAccept
from werkzeug.exceptions import HTTPException
from werkzeug.http import parse_accept_header

from core import errors, examples, tokens
from core.errors import Refusal
from core.instance import Instance

log = logging.getLogger("farebox.http")

Environ = dict[str, Any]
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# A name or an IPv6 address in brackets, and perhaps a port (RFC 9110, 7.2).
_HOST = re.compile(r"(?:([a-z0-9._-]+)|\[([0-9a-f:.]+)\])(?::[0-9]{1,5})?")


# A request


def request_ids(environ: Environ) -> tuple[str, str]:
    """The id of this request, the caller's own when it is sane; and one that is always ours."""
    ids: tuple[str, str] | None = environ.get("farebox.ids")
    if ids is None:
        ours = tokens.new_id("req")
        incoming = environ.get("HTTP_X_REQUEST_ID", "")
        ids = environ["farebox.ids"] = (incoming if _SANE_ID.fullmatch(incoming) else ours, ours)
    return ids


def headers(environ: Environ) -> Mapping[str, str]:
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


def client_address(environ: Environ) -> str:
    found: str = environ.get("REMOTE_ADDR") or "-"
    return found


def raw_target(environ: Environ) -> str:
    """What stood in the request line, before any decoding."""
    found: str = environ.get("RAW_URI") or environ.get("REQUEST_URI") or "/"
    return found


def raw_path(environ: Environ) -> str:
    """The path as it was sent, before any decoding."""
    return raw_target(environ).partition("?")[0].partition("#")[0]


def check_host(instance: Instance, environ: Environ) -> None:
    """Raises `invalid_host` for a Host not served here: it would end up in links and signatures."""
    host = _HOST.fullmatch(environ.get("HTTP_HOST", "").lower())
    if host is None or (host[1] or host[2]) not in instance.hosts:
        raise Refusal("invalid_host", "This host is not served here.")


# An answer


def finishing(instance: Instance, environ: Environ, content_type: str | None) -> dict[str, str]:
    """The headers that every answer has."""
    found = {"X-Request-Id": request_ids(environ)[0], "X-Content-Type-Options": "nosniff"}
    if content_type != "application/json":  # whatever a browser might show
        found["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        found["Referrer-Policy"] = "same-origin"
    return found


def refusal(
    instance: Instance, environ: Environ, why: Refusal
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to a refusal, in the dialect of its path."""
    dialect = instance.catalog.dialect_at(environ["REQUEST_METHOD"], raw_path(environ))
    docs = f"{instance.settings.public_url}/docs/errors"
    body = why.body(dialect, request_ids(environ)[0], docs)
    found = {"Content-Type": "application/json"} | why.all_headers()
    return why.kind.status, found, json.dumps(body).encode() + b"\n"


def unexpected(environ: Environ, error: BaseException) -> Refusal:
    """Our own fault: everything to the log, nothing to the client."""
    method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO")
    log.error("%s %r failed (%s)", method, path, request_ids(environ)[0], exc_info=error)
    return Refusal("internal_error", "Something went wrong here. Nothing was charged.")


# With Flask


def instance() -> Instance:
    """This process's instance."""
    found: Instance = current_app.extensions["farebox"]
    return found


def json_response(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value) + "\n", status, mimetype="application/json")


def page(template: str, status: int = 200, **values: Any) -> Response:
    """A page for a person."""
    return Response(render_template(template, **values), status, mimetype="text/html")


def is_challenge(why: Refusal) -> bool:
    """Whether a refusal says what can be paid."""
    return "PAYMENT-REQUIRED" in why.headers


def prefers_html(environ: Environ) -> bool:
    """Whether whoever asks would rather have a page than JSON."""
    accept = parse_accept_header(environ.get("HTTP_ACCEPT"), MIMEAccept)
    return accept.best_match(["application/json", "text/html"]) == "text/html"  # in doubt the first


def refused(why: Refusal) -> Response:
    """A refusal, for Flask: a page for people at their browser, JSON for everything else. Under the
    API's paths the only page is the one that says what can be paid."""
    of_api = request.path.startswith(("/api/", "/v1/"))
    if not prefers_html(request.environ) or (of_api and not is_challenge(why)):
        status, found, body = refusal(instance(), request.environ, why)
        return Response(body, status, found)
    request_id = request_ids(request.environ)[0]
    if is_challenge(why):
        answer = page(
            "payment.html", why.kind.status, why=why, request_id=request_id, **_how_to_pay(why)
        )
    else:
        answer = page("error.html", why.kind.status, why=why, request_id=request_id)
    answer.headers.update(why.all_headers())
    return answer


def _how_to_pay(why: Refusal) -> dict[str, Any]:
    """For a page: what calls what was asked for and pays for it, or has credits pay."""
    method, environ = request.method, request.environ
    routes = instance().catalog.methods_at(raw_path(environ))
    route = routes.get(method)
    body: dict[str, Any] | None = {} if method == "POST" else None
    if route is not None:
        body = examples.body(route, None) if method in ("POST", "PUT", "PATCH") else None
    url, query = why.fields["resource"]["url"], environ.get("QUERY_STRING", "")
    url += f"?{query}" if query else ""
    with_key = examples.curl_of(url, method, "$FAREBOX_API_KEY", body)
    accepts = why.fields["accepts"]
    if not accepts:
        return {"curl": with_key}
    terms = instance().settings.payments
    assert terms is not None  # or nothing would be asked for
    network, units = accepts[0]["network"], int(accepts[0]["amount"])
    return {
        "curl": with_key,
        "credits": units // terms.units_per_credit,
        "install": examples.paying_install(network),
        "program": examples.paying(url, method, body, network, units),
    }


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
    return failed(error)


def failed(error: Exception) -> Response:
    """An error nobody expected, for Flask."""
    return refused(unexpected(request.environ, error))
