"""The application: wiring only."""

import re
import sys

from flask import Flask, Request, Response, request
from flask.sessions import NullSession, SessionInterface, SessionMixin
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

import cli
import config
from blueprints import auth, cors, credits, docs, health, proxy, rendering
from config import Settings
from core import firstrun
from core.errors import Refusal
from core.instance import Instance

# A name or an IPv6 address in brackets, and perhaps a port (RFC 9110, 7.2).
_HOST = re.compile(r"(?:([a-z0-9._-]+)|\[([0-9a-f:.]+)\])(?::[0-9]{1,5})?")
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


class NoSessions(SessionInterface):
    """No request has a cookie session, so none is read, signed or sent."""

    def open_session(self, app: Flask, request: Request) -> SessionMixin:
        return NullSession()

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """Never called: a NullSession is not saved."""


def create_app(settings: Settings | None = None) -> Flask:
    """A Farebox on its instance folder, which is made and migrated if need be."""
    if settings is None:
        firstrun.prepare_folder(config.instance_folder())
        settings = config.load_or_exit()
    # Threads hand the interpreter to each other at every statement of a transaction; at the
    # default of 5 ms a busy worker would hold the write lock that long each time.
    sys.setswitchinterval(0.0005)
    app = Flask(__name__)
    app.secret_key = settings.secret_key
    app.url_map.merge_slashes = False
    instance = Instance(settings)
    instance.migrate()
    app.extensions["farebox"] = instance

    app.session_interface = NoSessions()
    app.before_request(_check_host)
    if settings.instance.cors_origins:
        app.register_blueprint(cors.blueprint)
    for blueprint in (proxy, credits, health, auth, docs):
        app.register_blueprint(blueprint.blueprint)
    app.after_request(_finish)
    app.register_error_handler(Refusal, rendering.refused)
    app.register_error_handler(HTTPException, rendering.http_error)
    app.register_error_handler(Exception, rendering.unexpected)
    cli.register(app)

    proxies = settings.trusted_proxies
    if proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, proxies, proxies, proxies)  # type: ignore[method-assign]
    return app


def _check_host() -> None:
    """Refuse a Host this instance does not serve: it would end up in links and signatures."""
    environ = request.environ
    host = _HOST.fullmatch(environ.get("HTTP_HOST", "").lower())
    if host is not None and (host[1] or host[2]) in rendering.instance().hosts:
        return
    if environ["PATH_INFO"] not in ("/healthz", "/api/health"):
        raise Refusal("invalid_host", "This host is not served here.")


def _finish(response: Response) -> Response:
    """What every answer carries."""
    headers, environ = response.headers, request.environ
    headers.add("X-Request-Id", rendering.request_ids(environ)[0])
    headers.add("X-Content-Type-Options", "nosniff")
    if response.content_type != "application/json":  # whatever a browser might show
        headers.add("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        headers.add("Referrer-Policy", "same-origin")
    if "Cache-Control" not in headers:
        headers.add("Cache-Control", "no-store")
    for name, value in environ.get("farebox.rate_headers", {}).items():
        headers.add(name, value)
    return response
