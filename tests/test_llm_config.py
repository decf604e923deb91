"""Settings of language models: what cannot be is refused by its key path, and what is not said has
its documented value."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from test_config import refused, told

from core.catalog import Catalog

UPSTREAMS = """
[upstreams.llm]
kind = "openai"
base_url = "http://127.0.0.1:1/v1"
[upstreams.other]
kind = "openai"
base_url = "https://llm.example/v1"
[upstreams.sandbox]
kind = "sandbox"
[upstreams.api]
kind = "http"
base_url = "https://api.example.com"
[upstreams.sms]
kind = "twilio"
account_sid = "AC1"
auth_token = "t"
from = "+15005550006"
"""


def table(name: str, settings: dict[str, str | None]) -> str:
    """A table of TOML values; None leaves a key out."""
    lines = [f"{key} = {value}" for key, value in settings.items() if value is not None]
    return "\n".join([f"[[{name}]]", *lines, ""])


def route(**changes: str | None) -> str:
    """A good route of a chat, changed."""
    good = {
        "path": '"/v1/chat/completions"',
        "methods": '["POST"]',
        "upstream": '"llm"',
        "adapter": '"chat"',
    }
    return table("routes", {**good, **changes})


def model(**changes: str | None) -> str:
    """A good model, changed."""
    return table("models", {"id": '"m"', "credits_per_request": "8", **changes})


def with_model(**changes: str | None) -> str:
    return UPSTREAMS + route() + model(**changes)


def with_route(**changes: str | None) -> str:
    return UPSTREAMS + route(**changes) + model()


BAD_MODELS: list[tuple[str, str]] = [
    ("id", "1"),
    ("id", '""'),
    ("id", '"a b"'),
    ("id", '"é"'),
    ("id", f'"{"x" * 201}"'),
    ("id", '"a\\n"'),
    ("credits_per_request", "-1"),
    ("credits_per_request", "1.5"),
    ("credits_per_request", '"8"'),
    ("credits_per_request", "true"),
    ("credits_per_request", "1000000001"),
    ("included_output_tokens", "-1"),
    ("included_output_tokens", "1.0"),
    ("included_output_tokens", "100000001"),
    ("max_output_tokens", "0"),
    ("max_output_tokens", "10000001"),
    ("max_output_tokens", '"4096"'),
    ("context_window", "-1"),
    ("max_tokens_field", '"max_new_tokens"'),
    ("upstream_model", '""'),
    ("upstream_model", '"é"'),
    ("owned_by", '""'),
    ("tier", '""'),
    ("parameters", "8"),
    ("upstream", '"nobody"'),
    ("upstream", '"api"'),
    ("upstream", '"sms"'),
    ("fallback", '"nobody"'),
    ("fallback", '"api"'),
    ("fallback", '"llm"'),
    ("price", "1"),
    *(
        (f"credits_per_1k_{kind}", value)
        for kind in ("tokens", "input_tokens")
        for value in (
            "-1", "0.06", "true", '""', '"-1"', '"1e3"', '".5"', '"1."', '" 1"', '"0,5"', '"1_0"',
            '"NaN"', '"0.0000000000001"', '"1000000.000001"', "1000001", '"\u0661"',
        )
    ),
    *(
        (f"cost_usd_per_1m_{kind}", value)
        for kind in ("input", "output")
        for value in ("1", "0.15", '"-1"', '"x"', '"1e3"')
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_MODELS)
def test_a_model_that_cannot_be_is_refused_by_the_key_that_is_wrong(
    tmp_path: Path, key: str, value: str
) -> None:
    assert refused(tmp_path, with_model(**{key: value})).startswith(
        f"farebox.toml: $.models[0].{key}: "
    )


@pytest.mark.parametrize("key", ["id", "credits_per_request"])
def test_a_model_needs_a_name_and_a_price(tmp_path: Path, key: str) -> None:
    assert f"$.models[0].{key}: required" in refused(tmp_path, with_model(**{key: None}))


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    assert "$.models[1].id: m is already $.models[0]" in refused(tmp_path, with_model() + model())


def test_a_fallback_is_another_upstream_than_the_first_of_any_route(tmp_path: Path) -> None:
    same = with_model(upstream='"other"', fallback='"other"')
    assert "$.models[0].fallback: expected an upstream other" in refused(tmp_path, same)
    second = route(path='"/v1/embeddings"', adapter='"embeddings"', upstream='"other"')
    of_second = UPSTREAMS + route() + second + model(fallback='"other"')
    assert "$.models[0].fallback: expected an upstream other" in refused(tmp_path, of_second)
    named = UPSTREAMS + route() + second + model(upstream='"llm"', fallback='"other"')
    assert told(tmp_path, named).models[0].fallback == "other"


BAD_ROUTES: list[tuple[str, str, str]] = [
    ("credits", "1", "is priced by [[models]]"),
    ("credits", "0", "is priced by [[models]]"),
    ("cost_usd", '"0.01"', "is priced by [[models]]"),
    ("path", '"/v1/chat/*"', "needs an exact path"),
    ("path", '"/v1/models"', "lies over /v1/models"),
    ("path", '"/v1/models/x"', "lies over /v1/models"),
    ("methods", '["GET"]', 'speaks ["POST"] alone'),
    ("methods", '["POST", "PUT"]', 'speaks ["POST"] alone'),
    ("upstream", '"api"', 'needs an upstream of kind "openai" or "sandbox"'),
    ("upstream", '"nobody"', "no [upstreams.nobody] is defined"),
    ("adapter", '"responses"', "expected one of forward, sms, chat, completions, embeddings"),
    ("per", '"unit"', 'unit needs adapter = "forward"'),
    ("per", '"sms_segment"', 'sms_segment needs adapter = "sms"'),
    ("units", '{ from = "header", name = "x", max = 2 }', 'goes with per = "unit"'),
    ("upstream_path", '"/v1/*"', "ends in /* but the path does not"),
    ("x402", "true", "needs an [x402] section"),
    ("body_bytes", "0", ""),
    ("body_bytes", "67108865", ""),
]


@pytest.mark.parametrize("adapter", ["chat", "completions", "embeddings"])
@pytest.mark.parametrize(("key", "value", "why"), BAD_ROUTES)
def test_a_route_of_models_that_cannot_be_is_refused_by_the_key_that_is_wrong(
    tmp_path: Path, adapter: str, key: str, value: str, why: str
) -> None:
    line = refused(tmp_path, with_route(**{"adapter": f'"{adapter}"', key: value}))
    assert line.startswith(f"farebox.toml: $.routes[0].{key}: ")
    assert why in line


def test_a_route_of_models_needs_models(tmp_path: Path) -> None:
    line = refused(tmp_path, UPSTREAMS + route())
    assert line.startswith("farebox.toml: $.routes[0]: ")
    assert "[[models]]" in line


def test_two_routes_of_models_at_one_path_are_refused(tmp_path: Path) -> None:
    line = refused(tmp_path, with_route() + route(adapter='"completions"'))
    assert line.startswith("farebox.toml: $.routes[1].path: POST /v1/chat/completions is already")


@pytest.mark.parametrize("key", ["account_sid", "auth_token", "from"])
def test_an_upstream_of_models_takes_no_keys_of_others(tmp_path: Path, key: str) -> None:
    changed = UPSTREAMS.replace(
        'base_url = "http://127.0.0.1:1/v1"', f'base_url = "http://127.0.0.1:1/v1"\n{key} = "x"'
    )
    assert f"$.upstreams.llm.{key}: not a key of kind 'openai'" in refused(tmp_path, changed)


def test_an_upstream_of_models_needs_an_address(tmp_path: Path) -> None:
    line = refused(tmp_path, '[upstreams.llm]\nkind = "openai"\n')
    assert "$.upstreams.llm.base_url: required" in line


def test_what_is_not_said_has_its_value(tmp_path: Path) -> None:
    found = Catalog(told(tmp_path, with_model()))
    [served] = found.routes
    assert served.body_bytes == 20 * 1024 * 1024
    section = found.models["m"].section
    assert (section.included_output_tokens, section.max_output_tokens) == (0, 4096)
    assert (section.credits_per_1k_tokens, section.credits_per_1k_input_tokens) == (0, 0)
    assert (section.max_tokens_field, section.tier, section.owned_by) == (
        "max_tokens", "standard", "farebox",
    )  # fmt: skip
    assert (section.context_window, section.parameters, section.upstream_model) == (None,) * 3
    assert [upstream.base_url for upstream in found.models["m"].upstreams] == [
        "http://127.0.0.1:1/v1"
    ]


def test_what_may_be_said_is_taken(tmp_path: Path) -> None:
    config = UPSTREAMS + route(body_bytes="1000", dialect='"flat"', scope='"llm:use"') + model(
        id='"meta/llama-3.1:8b"', upstream='"sandbox"', fallback='"other"',
        upstream_model='"Llama 3"', owned_by='"meta"', tier='"big"', included_output_tokens="500",
        credits_per_1k_tokens='"0.06"', credits_per_1k_input_tokens="1000000",
        max_output_tokens="10000000", max_tokens_field='"max_completion_tokens"',
        context_window="32768", parameters='"8B"', cost_usd_per_1m_input='"0.15"',
        cost_usd_per_1m_output='"0"',
    )  # fmt: skip
    found = Catalog(told(tmp_path, config))
    made = found.models["meta/llama-3.1:8b"]
    assert [upstream.kind for upstream in made.upstreams] == ["sandbox", "openai"]
    assert (made.upstream_id, found.routes[0].body_bytes) == ("Llama 3", 1000)
    assert (made.price(600, 0), made.price(500, 1)) == (9, 8 + 1000)
    assert Decimal(made.cost(10**6, 10**6) or "NaN") == Decimal("0.15")
