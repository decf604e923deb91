"""Calls to paste: a curl of a route, with a key or a place for one."""

import shlex
from collections.abc import Sequence

from core.catalog import Route

_SMS = """{"to": "+18148835337", "message": "hi"}"""


def curl(base_url: str, route: Route, bearer: str) -> str:
    """A curl that calls a route once."""
    method = "POST" if "POST" in route.methods else sorted(route.methods)[0]
    lines = [f"curl -sS {shlex.quote(base_url + route.path.replace('*', 'example'))}"]
    if method == "HEAD":
        lines[0] += " --head"
    elif method not in ("GET", "POST"):
        lines[0] += f" -X {method}"
    lines.append(f'-H "Authorization: Bearer {bearer}"')  # so that it may be a variable
    if method in ("POST", "PUT", "PATCH"):
        lines.append("-H 'Content-Type: application/json'")
        lines.append(f"-d '{_SMS if route.adapter == 'sms' else '{}'}'")
    return " \\\n  ".join(lines)


def first_for(routes: Sequence[Route], scopes: list[str] | None) -> Route | None:
    """The first route a key of these scopes may call."""
    for route in routes:
        if scopes is None or (route.scope is not None and route.scope in scopes):
            return route
    return None
