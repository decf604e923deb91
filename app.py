"""The application: wiring only."""

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

import cli
import config
from blueprints import (
    admin_accounts,
    admin_health,
    admin_keys,
    admin_payments,
    admin_prices,
    admin_vouchers,
    audit,
    auth,
    billing,
    cors,
    credits,
    dashboard,
    docs,
    health,
    keys,
    llm_models,
    members,
    oidc,
    pages,
    payments,
    rendering,
    session_tokens,
    usage,
    visitors,
    wallets,
)  # fmt: skip
from blueprints import (
    settings as settings_pages,
)
from blueprints.proxy import PaidRoutes
from config import Settings
from core import firstrun
from core.errors import Refusal
from core.instance import Instance

_ON_ANY_HOST = ("/healthz", "/api/health")


def create_app(settings: Settings | None = None) -> Flask:
    """A Farebox on its instance folder, which is made and migrated if need be.

    Paid routes are served in front of Flask, by `PaidRoutes`; Flask serves the rest.
    """
    if settings is None:
        firstrun.prepare_folder(config.instance_folder())
        settings = config.load_or_exit()
    app = Flask(__name__)
    app.secret_key = settings.secret_key
    app.url_map.merge_slashes = False
    app.config["MAX_CONTENT_LENGTH"] = 64 * 1024  # forms; paid routes have limits of their own
    instance = Instance(settings)
    instance.migrate()
    app.extensions["farebox"] = instance

    app.before_request(_check_host)
    app.before_request(_preflight)
    for module in (credits, llm_models, keys, members, session_tokens, payments, wallets, audit,
                   health, docs, auth, oidc, dashboard, billing, usage, settings_pages,
                   admin_accounts, admin_keys, admin_vouchers, admin_payments, admin_prices,
                   admin_health):  # fmt: skip
        app.register_blueprint(module.blueprint)
    visitors.register(app)
    pages.register(app)
    oidc.register(app, settings)
    app.after_request(_finish)
    app.register_error_handler(Refusal, rendering.refused)
    app.register_error_handler(HTTPException, rendering.http_error)
    app.register_error_handler(Exception, rendering.failed)
    cli.register(app)

    def challenge(environ: rendering.Environ, why: Refusal) -> tuple[int, dict[str, str], bytes]:
        """What a browser is shown that should pay."""
        with app.request_context(environ):
            answer = rendering.refused(why)
            return answer.status_code, dict(answer.headers), answer.get_data()

    app.wsgi_app = PaidRoutes(instance, app.wsgi_app, challenge)  # type: ignore[method-assign]
    proxies = settings.trusted_proxies
    if proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, proxies, proxies, proxies)  # type: ignore[method-assign]
    return app


def _check_host() -> None:
    if request.environ["PATH_INFO"] not in _ON_ANY_HOST:
        rendering.check_host(rendering.instance(), request.environ)


def _preflight() -> Response | None:
    permission = cors.preflight(rendering.instance(), request.environ)
    if permission is None or request.url_rule is None:
        return None
    return Response(status=204, headers=permission)


def _finish(response: Response) -> Response:
    """What every answer carries."""
    instance, environ, headers = rendering.instance(), request.environ, response.headers
    headers.update(rendering.finishing(instance, environ, response.content_type))
    headers.update(cors.sharing(instance, environ))
    headers.update(environ.get("farebox.rate_headers", {}))
    headers.setdefault("Cache-Control", "no-store")
    if response.status_code == 204:
        headers.pop("Content-Type", None)
    return response
