"""Calls to paste: a curl of a route, with a key or a place for one; a program that pays on the
spot."""

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
# The key of a wallet, in the hands of x402's client for Python, by the namespace of its network.
_WALLETS = {
    "eip155": (
        "from eth_account import Account",
        "from x402.mechanisms.evm.exact import register_exact_evm_client",
        'wallet = Account.from_key(os.environ["WALLET_KEY"])',
        "register_exact_evm_client(client, wallet)",
    ),
    "solana": (
        "from solders.keypair import Keypair",
        "from x402.mechanisms.svm import KeypairSigner\n"
        "from x402.mechanisms.svm.exact import register_exact_svm_client",
        'wallet = Keypair.from_base58_string(os.environ["WALLET_KEY"])',
        "register_exact_svm_client(client, KeypairSigner(wallet))",
    ),
}
_EXTRAS = {"eip155": "evm", "solana": "svm"}
TOP_UP = "/api/v1/credits/top-up"
_UNASKED_UNITS = 10**6  # a dollar: what that client pays without being told to


def curl(base_url: str, route: Route, bearer: str, of_key: list[str] | None = None) -> str:
    """A curl that calls a route once, with a key of these scopes."""
    method = "POST" if "POST" in route.methods else sorted(route.methods)[0]
    sent = body(route, of_key) if method in ("POST", "PUT", "PATCH") else None
    return curl_of(base_url + route.path.replace("*", "example"), method, bearer, sent)


def curl_of(url: str, method: str, bearer: str, body: dict[str, Any] | None) -> str:
    """A curl of a URL, with that Bearer and what is sent, if anything."""
    lines = [f"curl -sS {shlex.quote(url)}"]
    if method == "HEAD":
        lines[0] += " --head"
    elif method not in ("GET", "POST"):
        lines[0] += f" -X {method}"
    lines.append(f'-H "Authorization: Bearer {bearer}"')  # so that it may be a variable
    if body is not None:
        lines.append("-H 'Content-Type: application/json'")
        lines.append(f"-d {shlex.quote(json.dumps(body))}")
    return " \\\n  ".join(lines)


def paying_install(network: str) -> str:
    """What installs what `paying` imports, to pay on that network."""
    return f"pip install 'x402[requests,{_EXTRAS[_namespace(network)]}]'"


def paying(
    url: str, method: str, body: dict[str, Any] | None, network: str, units: int,
    bearer: str | None = None,
) -> str:  # fmt: skip
    """A program in Python that calls a URL and pays so many millionths of a dollar for it on that
    network, with x402's own client. `bearer` names the variable with the key of who is credited."""
    account, scheme, wallet, register = _WALLETS[_namespace(network)]
    lines = [
        "import os",
        "",
        account,
        "from x402 import x402ClientSync",
        "from x402.http.clients import x402_requests",
        scheme,
        "",
        wallet,
        "client = x402ClientSync()",
        register,
    ]
    if units > _UNASKED_UNITS:
        most = f"${-(-units // _UNASKED_UNITS)}"
        lines.append("# Without this it pays a dollar at most.")
        lines.append(f'client.set_spend_controls({{"max_amount_per_payment": "{most}"}})')
    arguments = [json.dumps(url)]
    if method not in ("GET", "POST"):
        arguments = [json.dumps(method), *arguments]
    if body is not None:
        arguments.append(f"json={json.dumps(body)}")
    if bearer is not None:
        lines.append(f"""bearer = {{"Authorization": f"Bearer {{os.environ['{bearer}']}}"}}""")
        arguments.append("headers=bearer")
    verb = method.lower() if method in ("GET", "POST") else "request"
    return "\n".join(
        [
            *lines,
            "with x402_requests(client) as session:",
            f"    answer = session.{verb}({', '.join(arguments)})",
            "print(answer.status_code, answer.text)",
        ]
    )


def _namespace(network: str) -> str:
    return network.partition(":")[0]


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
