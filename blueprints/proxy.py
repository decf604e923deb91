"""The paid routes: a request in, `gateway.serve`, an answer out.

A WSGI application in front of Flask's, because what Flask does for a request costs as much as what
the ledger does, and a paid call needs none of it.
"""

from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from werkzeug.wsgi import ClosingIterator

from blueprints import cors
from blueprints.bodies import read_body
from blueprints.rendering import (
    Environ,
    check_host,
    client_address,
    finishing,
    headers,
    is_challenge,
    prefers_html,
    raw_path,
    raw_target,
    refusal,
    request_ids,
    unexpected,
)
from core import gateway
from core.errors import Refusal
from core.gateway import Reaction
from core.instance import Instance

Wsgi = Callable[[Environ, Any], Iterable[bytes]]
# What somebody at their browser is shown in place of a refusal that says what to pay.
Challenge = Callable[[Environ, Refusal], tuple[int, dict[str, str], bytes]]

_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class PaidRoutes:
    """Serves what is in the catalog; everything else goes on to `otherwise`."""

    def __init__(self, instance: Instance, otherwise: Wsgi, challenge: Challenge) -> None:
        self._instance = instance
        self._otherwise = otherwise
        self._challenge = challenge

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        # The path as it was sent is what counts, so no other spelling of it is the same route.
        if not self._instance.catalog.methods_at(raw_path(environ)):
            return self._otherwise(environ, start_response)
        reaction = self._react(environ)
        found = reaction.headers
        found.update(finishing(self._instance, environ, found.get("Content-Type")))
        found.update(cors.sharing(self._instance, environ))
        found["Cache-Control"] = "no-store"
        body = reaction.body
        silent = environ["REQUEST_METHOD"] == "HEAD" or reaction.status == 204
        if isinstance(body, bytes) and not silent:
            found["Content-Length"] = str(len(body))
        status = _STATUS_LINES.get(reaction.status, f"{reaction.status} Unknown")
        start_response(status, list(found.items()))
        if isinstance(body, bytes):
            return [] if silent else [body]
        return ClosingIterator(body, reaction.close)

    def _react(self, environ: Environ) -> Reaction:
        """The answer, whatever happens."""
        try:
            check_host(self._instance, environ)
            permission = cors.preflight(self._instance, environ)
            if permission is not None:
                return Reaction(204, dict(permission), b"")
            request_id, call_id = request_ids(environ)
            caller = environ.get("gunicorn.socket")
            return gateway.serve(
                self._instance,
                gateway.Request(
                    request_id, call_id, environ["REQUEST_METHOD"], raw_path(environ),
                    environ.get("QUERY_STRING", ""), headers(environ), client_address(environ),
                    lambda limit: read_body(environ, limit),
                    None if caller is None else caller.fileno(), raw_target(environ),
                ),
            )  # fmt: skip
        except Refusal as why:
            if is_challenge(why) and prefers_html(environ):
                return Reaction(*self._challenge(environ, why))
            return Reaction(*refusal(self._instance, environ, why))
        except Exception as error:
            return Reaction(*refusal(self._instance, environ, unexpected(environ, error)))
