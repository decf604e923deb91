"""What a key's scopes let it call.

None means every paid route, an empty list none. `model:<id or pattern>` limits a key to those
models; in a pattern `*` stands for anything (no scope has the other signs of fnmatch).
"""

from fnmatch import fnmatchcase

from core.catalog import Route

MODEL = "model:"


def allow_route(scopes: list[str] | None, route: Route) -> bool:
    """Whether a key may call a route, whatever model it asks for. A route without a scope of its
    own is open to keys that are not restricted, and a route with models to those that are by
    models alone."""
    if scopes is None or (route.scope is not None and route.scope in scopes):
        return True
    of_models_alone = bool(scopes) and all(scope.startswith(MODEL) for scope in scopes)
    return of_models_alone and bool(route.models)


def allow_model(scopes: list[str] | None, model_id: str) -> bool:
    """Whether a key that may call a route may ask for this model there."""
    patterns = [scope.removeprefix(MODEL) for scope in scopes or () if scope.startswith(MODEL)]
    return not patterns or any(fnmatchcase(model_id, pattern) for pattern in patterns)


def callable_models(scopes: list[str] | None, routes: list[Route]) -> list[str]:
    """The ids of the models a key may call on some route, in the order of the config."""
    found = {
        model: None for route in routes if allow_route(scopes, route) for model in route.models
    }
    return [model for model in found if allow_model(scopes, model)]
