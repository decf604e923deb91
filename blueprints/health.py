"""Whether this instance can serve. Answers on any Host, to anybody."""

from flask import Blueprint, Response

from blueprints.rendering import instance, json_response

blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
@blueprint.get("/api/health")
def health() -> Response:
    """200 when the database answers, else 503."""
    instance().db.row("SELECT 1 FROM account LIMIT 1")
    return json_response({"status": "ok"})
