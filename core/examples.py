"""Calls to paste: a curl of a route, with a key or a place for one."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from core import scopes
from core.catalog import Route

# What the OpenAI SDK appends to its base URL.
_OF_OPENAI = ("/chat/completions", "/completions", "/embeddings")
_ALL_OF_OPENAI = "/v1/*"  # passed through
_SMS = {"to": "+18148835337", "message": "hi"}


def curl(base_url: str, route: Route, bearer: str, of_key: list[str] | None = None) -> str:
    """A curl that calls a route once, with a key of these scopes."""
    method = "POST" if "POST" in route.methods else sorted(route.methods)[0]
    lines = [f"curl -sS {shlex.quote(base_url + route.path.replace('*', 'example'))}"]
    if method == "HEAD":
        lines[0] += " --head"
    elif method not in ("GET", "POST"):
        lines[0] += f" -X {method}"
    lines.append(f'-H "Authorization: Bearer {bearer}"')  # so that it may be a variable
    if method in ("POST", "PUT", "PATCH"):
        lines.append("-H 'Content-Type: application/json'")
        lines.append(f"-d {shlex.quote(json.dumps(body(route, of_key)))}")
    return " \\\n  ".join(lines)


def openai_base(base_url: str, routes: Sequence[Route], of_key: list[str] | None) -> str | None:
    """Where the OpenAI SDK finds what a key of these scopes may call there; None when nothing."""
    for route in routes:
        if not _may_call(route, of_key):
            continue
        if route.path.endswith(_ALL_OF_OPENAI):
            return base_url + route.path.removesuffix("/*")
        for path in _OF_OPENAI:
            if route.path.endswith(path):
                return base_url + route.path.removesuffix(path)
    return None


def body(route: Route, of_key: list[str] | None) -> dict[str, Any]:
    """What a first call of a route would send, with a key of these scopes."""
    if route.adapter == "sms":
        return _SMS
    if not route.models:
        return {}
    model = next(iter(scopes.callable_models(of_key, [route])), next(iter(route.models)))
    if route.adapter == "chat":
        return {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    return {"model": model, "input" if route.adapter == "embeddings" else "prompt": "hi"}


def first_for(routes: Sequence[Route], of_key: list[str] | None) -> Route | None:
    """The first route a key of these scopes may call."""
    return next((route for route in routes if _may_call(route, of_key)), None)


def _may_call(route: Route, of_key: list[str] | None) -> bool:
    if not scopes.allow_route(of_key, route):
        return False
    return not route.models or bool(scopes.callable_models(of_key, [route]))
