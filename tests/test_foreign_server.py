"""A server of language models that others wrote, behind the gateway: llama.cpp's.

The same is asked of it directly, so what it says and counts is known from elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import openai
import pytest
from conftest import StartFarebox
from llama_server import FIRST_WORD, KEY, SPOKEN, SPOKEN_TOKENS, WORDS, LlamaServer, why_not
from openai import OpenAI
from openai.types import CompletionUsage
from server import Farebox

MODEL, LOCKED_MODEL = "counting", "locked"
WRONG_KEY = "not-the-key-of-the-server-0123456789"
BASE, INCLUDED, PER_OUTPUT, PER_INPUT = 3, 2, Fraction(3, 10), Fraction(7, 100)
COST_INPUT, COST_OUTPUT = Fraction("0.15"), Fraction("0.60")  # dollars for 10^6 tokens
ASKED_USAGE: Any = {"include_usage": True}
AT_ONCE = 12

CONFIG = """
[upstreams.llama]
kind = "openai"
base_url = "{url}/v1"
headers = {{ Authorization = "Bearer {key}" }}

[upstreams.locked]
kind = "openai"
base_url = "{url}/v1"
headers = {{ Authorization = "Bearer {wrong_key}" }}

[[routes]]
path = "/v1/chat/completions"
methods = ["POST"]
upstream = "llama"
adapter = "chat"

[[routes]]
path = "/v1/completions"
methods = ["POST"]
upstream = "llama"
adapter = "completions"

[[routes]]
path = "/v1/embeddings"
methods = ["POST"]
upstream = "llama"
adapter = "embeddings"

[[models]]
id = "{model}"
credits_per_request = {base}
included_output_tokens = {included}
credits_per_1k_tokens = {per_output}
credits_per_1k_input_tokens = "{per_input}"
max_output_tokens = 100
cost_usd_per_1m_input = "0.15"
cost_usd_per_1m_output = "0.60"

[[models]]
id = "{locked}"
upstream = "locked"
credits_per_request = 1
"""


def price(usage: Any) -> int:
    """The contract's price for a usage, summed exactly and rounded up once."""
    beyond = max(0, getattr(usage, "completion_tokens", 0) - INCLUDED)
    return math.ceil(BASE + beyond * PER_OUTPUT + usage.prompt_tokens * PER_INPUT)


def cost(usage: Any) -> Fraction:
    """What it costs the operator in dollars."""
    millionths = COST_INPUT * usage.prompt_tokens + COST_OUTPUT * usage.completion_tokens
    return millionths / 10**6


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaServer]:
    missing = why_not()
    if missing is not None:
        pytest.skip(missing)
    with LlamaServer() as server:
        yield server


@pytest.fixture(scope="module")
def box(llama: LlamaServer, start_farebox: StartFarebox) -> Farebox:
    return start_farebox(
        CONFIG.format(
            url=llama.url, key=KEY, wrong_key=WRONG_KEY, model=MODEL, locked=LOCKED_MODEL,
            base=BASE, included=INCLUDED, per_output=int(PER_OUTPUT * 1000),
            per_input=int(PER_INPUT * 1000),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def key(box: Farebox) -> str:
    return box.account(100_000)[1]


@pytest.fixture(scope="module")
def client(box: Farebox, key: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{box.url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def direct(llama: LlamaServer) -> Iterator[OpenAI]:
    """The server without the gateway, as whoever runs it sees it."""
    with OpenAI(base_url=f"{llama.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def ask(client: OpenAI, text: str, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=user(text), **more)


def ask_raw(client: OpenAI, text: str, **more: Any) -> Any:
    return client.chat.completions.with_raw_response.create(
        model=MODEL, messages=user(text), **more
    )


def spoken(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_the_models_are_ours_and_not_those_the_server_lists(
    client: OpenAI, direct: OpenAI, llama: LlamaServer
) -> None:
    assert [model.id for model in direct.models.list()] == [llama.model_path]
    assert [model.id for model in client.models.list()] == [MODEL, LOCKED_MODEL]


def test_a_chat_says_what_the_server_says_and_costs_what_it_counts(
    client: OpenAI, direct: OpenAI, box: Farebox, key: str
) -> None:
    expected = ask(direct, "How far can you count?")

    raw = ask_raw(client, "How far can you count?")
    answer = raw.parse()

    assert answer.choices == expected.choices and answer.model == MODEL
    assert answer.choices[0].message.content == SPOKEN
    assert answer.usage.completion_tokens == expected.usage.completion_tokens == SPOKEN_TOKENS
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert raw.headers["X-Credits-Charged"] == str(price(expected.usage))
    call = box.call(key, answer._request_id)
    assert (call["input_tokens"], call["output_tokens"], call["estimated"]) == (
        expected.usage.prompt_tokens, SPOKEN_TOKENS, False,
    )  # fmt: skip
    assert Fraction(call["cost_usd"]) == cost(expected.usage)
    assert call["held"] >= call["captured"] == price(expected.usage)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_cuts_the_answer_and_what_is_held(
    client: OpenAI, box: Farebox, key: str, field: str
) -> None:
    answer = ask(client, "Count to three!", **{field: 3})

    assert answer.choices[0].message.content == " one two three"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3
    call = box.call(key, answer._request_id)
    held = price(CompletionUsage(
        completion_tokens=3, prompt_tokens=math.ceil(len("userCount to three!") / 3),
        total_tokens=0,
    ))  # fmt: skip
    # To this model every byte is a token, which are more than are held for.
    assert price(answer.usage) > held
    assert (call["held"], call["captured"]) == (held, held)


def test_a_stream_without_usage_is_charged_by_the_usage_nobody_saw(
    client: OpenAI, direct: OpenAI, box: Farebox, key: str
) -> None:
    expected = ask(direct, "Count slowly.").usage

    with ask(client, "Count slowly.", stream=True) as stream:
        request_id = stream.response.headers["X-Request-Id"]
        chunks = list(stream)

    assert spoken(chunks) == SPOKEN and len(chunks) >= len(WORDS)
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    call = box.call(key, request_id)
    assert (call["captured"], call["estimated"]) == (price(expected), False)
    assert call["input_tokens"] == expected.prompt_tokens


def test_a_stream_with_usage_ends_with_what_it_cost(client: OpenAI, box: Farebox, key: str) -> None:
    before, _ = box.standing(key)

    with ask(client, "And the bill?", stream=True, stream_options=ASKED_USAGE) as stream:
        *others, last = list(stream)

    assert spoken(others) == SPOKEN and all(chunk.usage is None for chunk in others)
    assert last.usage.completion_tokens == SPOKEN_TOKENS and not last.choices
    charged = price(last.usage)
    assert last.farebox == {"credits_charged": charged, "credits_remaining": before - charged}
    assert box.standing(key) == (before - charged, 0)


def test_a_stream_of_several_choices_has_one_bill_though_the_server_sends_several(
    client: OpenAI, direct: OpenAI, box: Farebox, key: str
) -> None:
    more: Any = {"n": 3, "stream": True, "stream_options": ASKED_USAGE}
    with ask(direct, "Count, all of you!", **more) as stream:
        bills = [chunk.usage for chunk in stream if chunk.usage is not None]
    before, _ = box.standing(key)

    with ask(client, "Count, all of you!", **more) as stream:
        *others, last = list(stream)

    # One for each choice, and each counts its own choice alone: the price is by the last one.
    assert [bill.completion_tokens for bill in bills] == [SPOKEN_TOKENS] * 3
    assert all(chunk.usage is None for chunk in others)
    for number in range(3):
        said = [
            c.delta.content or "" for chunk in others for c in chunk.choices if c.index == number
        ]
        assert "".join(said) == SPOKEN
    assert last.farebox["credits_charged"] == price(last.usage) == price(bills[-1])
    assert box.standing(key) == (before - price(bills[-1]), 0)


def test_texts_are_completed_whole_and_streamed(
    client: OpenAI, direct: OpenAI, box: Farebox, key: str
) -> None:
    expected = direct.completions.create(model=MODEL, prompt="Zero,")

    whole = client.completions.with_raw_response.create(model=MODEL, prompt="Zero,")
    with client.completions.create(model=MODEL, prompt="Zero,", stream=True) as stream:
        request_id = stream.response.headers["X-Request-Id"]
        streamed = "".join(chunk.choices[0].text for chunk in stream)

    assert whole.parse().choices[0].text == streamed == expected.choices[0].text == SPOKEN
    assert whole.headers["X-Credits-Charged"] == str(price(expected.usage))
    assert box.call(key, request_id)["captured"] == price(expected.usage)


def test_embeddings_are_the_servers_and_cost_their_input(client: OpenAI, direct: OpenAI) -> None:
    # Given as tokens, of which there are as many as are held for.
    words = [[FIRST_WORD, FIRST_WORD + 1, FIRST_WORD + 2], [FIRST_WORD + 3]]
    expected = direct.embeddings.create(model=MODEL, input=words)

    raw = client.embeddings.with_raw_response.create(model=MODEL, input=words)

    found = [item.embedding for item in raw.parse().data]
    assert found == [item.embedding for item in expected.data] and found[0] != found[1]
    assert raw.headers["X-Credits-Charged"] == str(price(expected.usage))


def test_what_the_server_refuses_is_told_in_its_words_and_is_free(
    client: OpenAI, direct: OpenAI, box: Farebox, key: str
) -> None:
    too_long = "too long " * 200
    before = box.standing(key)
    with pytest.raises(openai.BadRequestError) as expected:
        ask(direct, too_long)

    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, too_long)
    with pytest.raises(openai.BadRequestError):
        ask(client, too_long, stream=True)

    told, meant = caught.value.response.json()["error"], expected.value.response.json()["error"]
    assert {name: told[name] for name in meant} == meant and "context size" in meant["message"]
    assert caught.value.response.headers["X-Credits-Charged"] == "0"
    assert box.standing(key) == before


def test_a_wrong_key_of_the_operator_is_the_operators_affair(
    client: OpenAI, box: Farebox, key: str
) -> None:
    before = box.standing(key)

    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=LOCKED_MODEL, messages=user("open up"))

    assert caught.value.status_code == 502 and caught.value.code == "provider_error"
    assert caught.value.response.json()["refunded"] is True
    assert box.standing(key) == before


@pytest.mark.parametrize(
    "more",
    [{}, {"stream": True}, {"stream": True, "stream_options": ASKED_USAGE}, {"model": LOCKED_MODEL},
     {"messages": user("too long " * 200)}, {"messages": "no list"}],
    ids=["whole", "stream", "stream with usage", "wrong key", "too long", "malformed"],
)  # fmt: skip
def test_no_answer_knows_the_servers_key_file_or_address(
    box: Farebox, key: str, llama: LlamaServer, more: dict[str, Any]
) -> None:
    answer = box.post(
        "/v1/chat/completions", key, {"model": MODEL, "messages": user("Who are you?"), **more}
    )

    told = answer.body.decode() + json.dumps(dict(answer.headers))
    for secret in (KEY, WRONG_KEY, llama.model_path, llama.url.removeprefix("http://")):
        assert secret not in told


def test_many_streams_at_once_are_all_served_and_all_charged(
    client: OpenAI, box: Farebox, key: str
) -> None:
    before, _ = box.standing(key)

    def one(number: int) -> Any:
        text = f"Number {number}, please."
        with ask(client, text, stream=True, stream_options=ASKED_USAGE) as stream:
            chunks = list(stream)
        assert spoken(chunks) == SPOKEN
        return chunks[-1].usage

    with ThreadPoolExecutor(AT_ONCE) as crowd:
        usages = list(crowd.map(one, range(AT_ONCE)))

    assert box.standing(key) == (before - sum(map(price, usages)), 0)
