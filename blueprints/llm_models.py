"""Which language models there are, for whoever asks: `GET /v1/models` as OpenAI has it."""

from typing import Any

from flask import Blueprint, Response

from blueprints.api import reader
from blueprints.rendering import instance, json_response
from core import errors, scopes
from core.tariff import Model

blueprint = Blueprint("language_models", __name__)


@blueprint.get("/v1/models")
def all_models() -> Response:
    return json_response({"object": "list", "data": [_item(model) for model in _callable()]})


@blueprint.get("/v1/models/<path:model_id>")
def one_model(model_id: str) -> Response:
    for model in _callable():
        if model.id == model_id:
            return json_response(_item(model))
    raise errors.model_not_found(model_id)


def _callable() -> list[Model]:
    """The models this credential may call."""
    principal, catalog = reader(), instance().catalog
    found = scopes.callable_models(principal.scopes, catalog.routes)
    return [catalog.models[model_id] for model_id in found]


def _item(model: Model) -> dict[str, Any]:
    section = model.section
    farebox = {
        "tier": section.tier,
        "credits_per_request": section.credits_per_request,
        "credits_per_1k_tokens": section.credits_per_1k_tokens,
        "included_output_tokens": section.included_output_tokens,
        "context_window": section.context_window,
        "parameters": section.parameters,
    }
    if model.input_rate:
        farebox["credits_per_1k_input_tokens"] = section.credits_per_1k_input_tokens
    return {
        "id": model.id,
        "object": "model",
        "created": instance().settings.configured_at,
        "owned_by": section.owned_by,
        "farebox": farebox,
    }
