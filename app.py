"""The application: wiring only."""

import sys

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

import cli
import config
from blueprints import auth, cors, credits, docs, health, proxy, rendering
from config import Settings
from core import firstrun
from core.errors import Refusal
from core.instance import Instance
from models import SchemaTooNew

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


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
    try:
        instance.db.migrate()
    except SchemaTooNew as error:
        config.exit_with(str(error))
    app.extensions["farebox"] = instance

    app.before_request(_check_host)
    for blueprint in (cors, proxy, credits, health, auth, docs):
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
    if request.path in ("/healthz", "/api/health"):
        return
    host = request.host.lower()
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    if name.strip("[]") not in rendering.instance().settings.hosts:
        raise Refusal("invalid_host", "This host is not served here.")


def _finish(response: Response) -> Response:
    """What every answer carries."""
    response.headers["X-Request-Id"] = rendering.request_id()
    response.headers.update(g.get("rate_headers", {}))
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["X-Content-Type-Options"] = "nosniff"
    if response.mimetype == "text/html" and not request.path.startswith(("/api/", "/v1/")):
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        response.headers["Referrer-Policy"] = "same-origin"
    return response
