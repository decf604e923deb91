"""What an operator is told of models on the command line, and what a first run prints."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from doubles import Upstream, refused_port
from html_pages import run
from inprocess import Box

from core import firstrun

CHAT = "/v1/chat/completions"
ROUTES = """
[upstreams.sandbox]
kind = "sandbox"

[[routes]]
path = "/v1/chat/completions"
methods = ["POST"]
upstream = "sandbox"
adapter = "chat"

[[routes]]
path = "/v1/embeddings"
methods = ["POST"]
upstream = "sandbox"
adapter = "embeddings"
"""
MODELS = """
[[models]]
id = "small"
credits_per_request = 8
included_output_tokens = 500
credits_per_1k_tokens = 4
credits_per_1k_input_tokens = "0.5"
max_output_tokens = 4096
cost_usd_per_1m_input = "0.15"
cost_usd_per_1m_output = "0.60"

[[models]]
id = "flat"
credits_per_request = 1
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("commands") / "i", ROUTES + MODELS) as box:
        yield box


def said(box: Box, *words: str, stdin: str | None = None) -> str:
    done = box.cli(*words, stdin=stdin)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    text: str = done.stdout
    return text


def price(box: Box, body: dict[str, Any], path: str = CHAT) -> dict[str, str]:
    """What `flask price` says of a call, by the first word of each line."""
    lines = said(box, "price", path, "--body", "-", stdin=json.dumps(body)).splitlines()
    return {words[0]: words[-1] for words in (line.split(None, 1) for line in lines)}


def held(output: int, size: int) -> int:
    """The contract's formula for `small`, for input of so many bytes."""
    beyond = max(0, output - 500) * Fraction(4, 1000)
    return ceil(8 + beyond + Fraction(size, 3) * Fraction("0.5") / 1000)


# Prices.


def test_without_a_body_each_models_price_is_told(box: Box) -> None:
    assert said(box, "price", CHAT) == (
        "small: 8 credits a request, 4 per 1,000 output tokens beyond 500,"
        " 0.5 per 1,000 input tokens\n"
        "flat: 1 credit a request\n"
        "With --body: what that call would hold and cost.\n"
    )


@pytest.mark.parametrize(
    ("asked", "output"),
    [
        ({}, 4096),
        ({"max_tokens": 100}, 100),
        ({"max_tokens": 1700, "n": 2}, 3400),
        ({"max_completion_tokens": 10**6}, 4096),
    ],
)
def test_a_body_is_priced_as_the_call_would_be(
    box: Box, asked: dict[str, int], output: int
) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "x" * 2996}], **asked}
    told = price(box, body)
    expected = held(output, 3000)  # the role is read too
    assert told["holds"] == f"{expected} credits (${expected / 100:.2f})"
    assert told["tokens"] == f"at most 1,000 in, {output:,} out"
    assert told["captures"] == f"8 to {expected} credits on success, nothing on failure"
    cost = Fraction(output * 60 + 1000 * 15, 10**8)
    assert told["costs"].startswith("you at most $")
    assert Fraction(told["costs"].removeprefix("you at most $")) == cost
    payer = box.payer(10_000)
    answer = box.post(CHAT, payer.key, body)
    assert box.record(payer.key, answer)["held"] == expected


def test_a_flat_price_is_one_number_and_an_unknown_cost_says_what_is_missing(box: Box) -> None:
    told = price(box, {"model": "flat", "messages": []})
    assert told["captures"] == "1 credits on success, nothing on failure"
    assert told["costs"] == "you unknown (no cost_usd_per_1m_input or _output)"


def test_an_embedding_is_priced_by_its_input_alone(box: Box) -> None:
    told = price(box, {"model": "small", "input": "x" * 30_000}, "/v1/embeddings")
    assert told["tokens"] == "at most 10,000 in, 0 out"
    assert told["holds"].startswith("13 credits") and told["captures"].startswith("8 to 13 ")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ('{"model": "none", "messages": []}', "none"),
        ('{"model": "small"}', "messages"),
        ("[]", "JSON object"),
        ("{", "JSON"),
    ],
)
def test_a_body_that_would_be_refused_is_refused(box: Box, body: str, word: str) -> None:
    done = box.cli("price", CHAT, "--body", "-", stdin=body)
    assert (done.exit_code, done.stdout) == (1, "")
    assert word in done.stderr and len(done.stderr.splitlines()) == 1


# The doctor.


def findings(box: Box, word: str) -> list[str]:
    return [line for line in box.cli("doctor").stdout.splitlines() if word in line]


def test_the_doctor_tries_the_upstreams_of_models_and_their_fallbacks(
    tmp_path: Path, upstream: Upstream
) -> None:
    config = f"""
[upstreams.up]
kind = "openai"
base_url = "{upstream.url}/v1"
headers = {{ Authorization = "Bearer a-key-of-the-operator" }}
[upstreams.spare]
kind = "openai"
base_url = "http://127.0.0.1:{refused_port()}/v1"
[upstreams.unused]
kind = "openai"
base_url = "{upstream.url}/v1"
[[routes]]
path = "{CHAT}"
methods = ["POST"]
upstream = "up"
adapter = "chat"
[[models]]
id = "small"
fallback = "spare"
credits_per_request = 1
"""
    with Box(tmp_path / "i", config) as box:
        done = box.cli("doctor")
        assert done.exit_code == 1 and "a-key-of-the-operator" not in done.output
        up, spare, unused, nobodys = findings(box, "upstream ")
    assert up == "ok    upstream up: reachable" and unused == "ok    upstream unused: reachable"
    assert spare.startswith("bad   upstream spare: ")
    assert nobodys == "warn  upstream unused: no route uses it"
    assert upstream.hits() == []


def test_the_doctor_names_a_model_that_no_route_serves(tmp_path: Path) -> None:
    config = ROUTES.partition("[[routes]]")[0] + MODELS
    with Box(tmp_path / "i", config) as box:
        assert findings(box, "model ") == [
            "warn  model small: no route serves it",
            "warn  model flat: no route serves it",
        ]
        assert box.cli("doctor").exit_code == 0


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        # A dollar a million tokens is 0.1 credits for 1,000.
        ('credits_per_1k_tokens = "0.1"\ncost_usd_per_1m_output = "1"', None),
        (
            'credits_per_1k_tokens = "0.099"\ncost_usd_per_1m_output = "20"',
            "1 tokens in and 4096 out cost $0.08192, bring $0.02",
        ),
        # What the request covers costs most beside what it brings.
        (
            "included_output_tokens = 2000\ncredits_per_1k_tokens = 100"
            '\ncost_usd_per_1m_output = "10"',
            "1 tokens in and 2000 out cost $0.02, bring $0.01",
        ),
        (
            'cost_usd_per_1m_output = "10000.5"',
            "1 tokens in and 1 out cost $0.0100005, bring $0.01",
        ),
        (
            'credits_per_1k_input_tokens = 1\ncost_usd_per_1m_input = "10"\n'
            "context_window = 100000",
            None,
        ),
        (
            'cost_usd_per_1m_input = "1"\ncontext_window = 100000\nmax_output_tokens = 1000',
            "99000 tokens in and 1000 out cost $0.099, bring $0.01",
        ),
        ('cost_usd_per_1m_input = "1"', None),  # nobody said how long a question may be
    ],
)
def test_the_doctor_finds_a_model_whose_calls_may_cost_more_than_they_bring(
    tmp_path: Path, terms: str, told: str | None
) -> None:
    model = f'\n[[models]]\nid = "m"\ncredits_per_request = 1\n{terms}\n'
    with Box(tmp_path / "i", ROUTES + model) as box:
        expected = [] if told is None else [f"warn  price m: {told}"]
        assert findings(box, "price m") == expected
        assert box.cli("doctor").exit_code == 0


# The first run.


def greeting(box: Box) -> tuple[str, str]:
    """What the first run prints, and the starter key."""
    made = firstrun.welcome(box.instance.db, box.settings)
    assert made is not None
    return firstrun.greeting(box.settings, made, {}), made.starter_key


def test_the_first_run_prints_a_call_of_what_is_sold(tmp_path: Path) -> None:
    with Box(tmp_path / "i", ROUTES + MODELS) as box:
        text, key = greeting(box)
        assert "sms" not in text and text.count(key) == 2
        status, answer = run(box, text[text.index("curl -sS") :].split("\n\n")[0])
        assert (status, answer["model"]) == (200, "small")
        exports = [line for line in text.splitlines() if line.startswith("export ")]
        assert [shlex.split(line)[1] for line in exports] == [
            f"OPENAI_BASE_URL={box.settings.public_url}/v1",
            f"OPENAI_API_KEY={key}",
        ]


def test_the_first_run_of_the_own_config_prints_a_message_and_no_model(tmp_path: Path) -> None:
    with Box(tmp_path / "i") as box:
        text, key = greeting(box)
        assert "OPENAI" not in text and text.count(key) == 1
        status, answer = run(box, text[text.index("curl -sS") :].split("\n\n")[0])
        assert (status, answer["provider"]) == (200, "sandbox")


def test_the_first_run_without_a_route_says_what_to_do(tmp_path: Path) -> None:
    with Box(tmp_path / "i", '[upstreams.sandbox]\nkind = "sandbox"\n') as box:
        text, key = greeting(box)
        assert "curl" not in text and "/setup?token=" in text
        assert f"add [[routes]] to {tmp_path}/i/farebox.toml, then restart" in text
        assert key in text.splitlines()


def test_the_example_of_a_model_in_the_first_config_can_be_tried_without_a_network(
    tmp_path: Path,
) -> None:
    """A newcomer takes the signs off the lines between the two headings, and calls."""
    lines = firstrun.EXAMPLE.read_text("utf-8").splitlines()
    first = next(at for at, line in enumerate(lines) if "a language model" in line)
    last = next(at for at in range(first, len(lines)) if not lines[at].startswith("#"))
    lines[first:last] = [line.removeprefix("# ") for line in lines[first:last]]
    folder = tmp_path / "i"
    folder.mkdir()
    (folder / "farebox.toml").write_text("\n".join(lines))
    with Box(folder) as box:
        payer = box.payer(100)
        model = box.settings.models[0].id
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        answer = box.post(CHAT, payer.key, body)
        assert answer.status == 200, answer.body
        assert int(answer.headers["X-Credits-Charged"]) > 0
