"""OpenAI's own clients work by their `base_url` and `api_key` alone, and are charged rightly.

The clients are the official ones, unchanged; the server is gunicorn, and behind it a double.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import StartFarebox
from doubles import refused_port
from openai import AsyncOpenAI, OpenAI
from openai_double import (
    FINGERPRINT,
    OPERATORS_KEY,
    VECTOR,
    LossyWire,
    OpenAiDouble,
    order,
    said_to,
)
from server import Farebox

FOLDER = Path(__file__).resolve().parent / "openai"
PROGRAM_SECONDS = 60.0
MODEL, OTHER_MODEL, UNREACHED_MODEL = "acme/small", "other", "unreached"
BASE, INCLUDED, PER_OUTPUT, PER_INPUT, MOST_OUTPUT = 2, 2, Fraction(1), Fraction(1, 2), 40
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": {}}}
ASKED_USAGE: Any = {"include_usage": True}

CONFIG = """
[upstreams.llm]
kind = "openai"
base_url = "{url}/v1"
headers = {{ Authorization = "Bearer {secret}" }}
timeout_seconds = 10

[upstreams.nobody]
kind = "openai"
base_url = "http://127.0.0.1:{refused}/v1"

[[routes]]
path = "/v1/chat/completions"
methods = ["POST"]
upstream = "llm"
adapter = "chat"

[[routes]]
path = "/v1/completions"
methods = ["POST"]
upstream = "llm"
adapter = "completions"

[[routes]]
path = "/v1/embeddings"
methods = ["POST"]
upstream = "llm"
adapter = "embeddings"

[[models]]
id = "{model}"
upstream_model = "vendors-own-name"
owned_by = "acme"
credits_per_request = {base}
included_output_tokens = {included}
credits_per_1k_tokens = {per_output}
credits_per_1k_input_tokens = "{per_input}"
max_output_tokens = {most}

[[models]]
id = "{other}"
credits_per_request = 1

[[models]]
id = "{unreached}"
upstream = "nobody"
credits_per_request = 1
"""


def price(output_tokens: int, input_tokens: int) -> int:
    """The contract's price of the model, summed exactly and rounded up once."""
    beyond = max(0, output_tokens - INCLUDED)
    return math.ceil(BASE + beyond * PER_OUTPUT + input_tokens * PER_INPUT)


def estimated_input(text: str) -> int:
    """Tokens that are held for, for one message of a user."""
    return math.ceil(len(f"user{text}".encode()) / 3)


def held_for(text: str) -> int:
    return price(MOST_OUTPUT, estimated_input(text))


def output_tokens(text: str) -> int:
    return len(said_to(text).split())


def cost_of(text: str) -> int:
    """Credits for one message that is said back, as the double counts it."""
    return price(output_tokens(text), len(text.split()))


@pytest.fixture(scope="module")
def double() -> Iterator[OpenAiDouble]:
    with OpenAiDouble() as server:
        yield server


@pytest.fixture(scope="module")
def box(double: OpenAiDouble, start_farebox: StartFarebox) -> Farebox:
    return start_farebox(
        CONFIG.format(
            url=double.url, secret=OPERATORS_KEY, refused=refused_port(), model=MODEL,
            other=OTHER_MODEL, unreached=UNREACHED_MODEL, base=BASE, included=INCLUDED,
            per_output=int(PER_OUTPUT * 1000), per_input=int(PER_INPUT * 1000), most=MOST_OUTPUT,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def wire(box: Farebox) -> Iterator[LossyWire]:
    with LossyWire(box.port) as server:
        yield server


@pytest.fixture(scope="module")
def payer(box: Farebox) -> tuple[str, str]:
    """An account that can pay for everything here; its e-mail and key."""
    return box.account(100_000)


@pytest.fixture(scope="module")
def key(payer: tuple[str, str]) -> str:
    return payer[1]


@pytest.fixture(scope="module")
def client(box: Farebox, key: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{box.url}/v1", api_key=key) as client:
        yield client


@pytest.fixture(scope="module")
def through_the_wire(wire: LossyWire, client: OpenAI) -> OpenAI:
    """The same client, whose requests can be counted and whose answers can be lost."""
    return client.with_options(base_url=f"{wire.url}/v1")


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def ask(client: OpenAI, text: str, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=user(text), **more)


def ask_raw(client: OpenAI, text: str, **more: Any) -> Any:
    return client.chat.completions.with_raw_response.create(
        model=MODEL, messages=user(text), **more
    )


# What is answered


def test_the_list_of_models_is_a_page_of_models_with_their_prices(client: OpenAI) -> None:
    found = list(client.models.list())

    assert [model.id for model in found] == [MODEL, OTHER_MODEL, UNREACHED_MODEL]
    assert found[0].owned_by == "acme" and found[0].object == "model" and found[0].created > 0
    assert found[0].farebox["credits_per_request"] == BASE  # type: ignore[attr-defined]


def test_a_model_is_retrieved_by_an_id_with_a_slash(client: OpenAI) -> None:
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_chat_is_answered_and_says_what_it_cost(
    client: OpenAI, box: Farebox, key: str, double: OpenAiDouble
) -> None:
    before, _ = box.standing(key)

    raw = ask_raw(client, "good morning", temperature=0.5, user="me")
    answer = raw.parse()

    assert answer.choices[0].message.content == said_to("good morning")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL and answer.system_fingerprint == FINGERPRINT
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == output_tokens("good morning")
    assert raw.headers["X-Credits-Charged"] == str(cost_of("good morning"))
    assert raw.headers["X-Credits-Remaining"] == str(before - cost_of("good morning"))
    sent = double.asked("good morning")[-1]
    assert sent["model"] == "vendors-own-name" and sent["max_tokens"] == MOST_OUTPUT
    assert sent["temperature"] == 0.5 and sent["user"] == "me"


def test_the_request_id_of_an_answer_finds_its_call(client: OpenAI, box: Farebox, key: str) -> None:
    answer = ask(client, "which call was it")

    call = box.call(key, answer._request_id)
    assert call["model"] == MODEL and call["status"] == "captured" and not call["estimated"]
    assert call["captured"] == cost_of("which call was it")
    assert call["held"] == held_for("which call was it")


def test_three_choices_are_three_answers_and_all_are_charged(client: OpenAI) -> None:
    raw = ask_raw(client, "and so say all", n=3)

    texts = [choice.message.content for choice in raw.parse().choices]
    assert texts == [said_to("and so say all")] * 3
    made = 3 * output_tokens("and so say all")
    assert raw.headers["X-Credits-Charged"] == str(price(made, 4))


def test_a_limit_of_the_caller_goes_on_in_its_own_field(
    client: OpenAI, box: Farebox, key: str, double: OpenAiDouble
) -> None:
    answer = ask(client, "limited", max_completion_tokens=7)

    sent = double.asked("limited")[-1]
    assert sent["max_completion_tokens"] == 7 and "max_tokens" not in sent
    assert box.call(key, answer._request_id)["held"] == price(7, estimated_input("limited"))


def test_a_text_is_completed(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="once upon a time")

    answer = raw.parse()
    assert answer.choices[0].text == said_to("once upon a time") and answer.model == MODEL
    assert raw.headers["X-Credits-Charged"] == str(cost_of("once upon a time"))


def test_embeddings_come_as_numbers_though_they_travel_as_base64(
    client: OpenAI, double: OpenAiDouble
) -> None:
    raw = client.embeddings.with_raw_response.create(model=MODEL, input=["good day", "good night"])

    assert [item.embedding for item in raw.parse().data] == [list(VECTOR)] * 2
    assert raw.headers["X-Credits-Charged"] == str(price(0, 4))
    assert double.asked("good night")[-1]["encoding_format"] == "base64"


def test_a_tool_call_keeps_its_arguments(client: OpenAI) -> None:
    answer = ask(client, "how is the weather", tools=[WEATHER])

    [call] = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo", "unit": "°C"}


def test_a_balance_that_does_not_cover_the_most_gets_a_shorter_answer(box: Farebox) -> None:
    credits = price(INCLUDED + 5, estimated_input("short of money"))
    _, key = box.account(credits)
    with OpenAI(base_url=f"{box.url}/v1", api_key=key) as client:
        raw = ask_raw(client, "short of money")

    assert raw.headers["X-Max-Tokens-Clamped"] == str(INCLUDED + 5)
    assert raw.headers["X-Credits-Charged"] == str(cost_of("short of money"))


def test_a_session_token_is_an_api_key_too(box: Farebox, payer: tuple[str, str]) -> None:
    token = box.set_up("tokens", "mint", payer[0])
    with OpenAI(base_url=f"{box.url}/v1", api_key=token) as client:
        raw = ask_raw(client, "by token")
        models = [model.id for model in client.models.list()]

    assert raw.parse().choices[0].message.content == said_to("by token")
    assert raw.headers["X-Credits-Charged"] == str(cost_of("by token"))
    assert MODEL in models


def test_the_asynchronous_client_is_served_likewise(box: Farebox, key: str) -> None:
    async def talk() -> tuple[str, str, int]:
        async with AsyncOpenAI(base_url=f"{box.url}/v1", api_key=key) as client:
            whole, stream = await asyncio.gather(
                client.chat.completions.create(model=MODEL, messages=user("one of two")),
                client.chat.completions.create(
                    model=MODEL, messages=user("two of two"), stream=True,
                    stream_options=ASKED_USAGE,
                ),
            )  # fmt: skip
            parts, charged = [], 0
            async for chunk in stream:
                parts += [choice.delta.content or "" for choice in chunk.choices]
                if chunk.usage is not None:
                    charged = chunk.farebox["credits_charged"]  # type: ignore[attr-defined]
        return whole.choices[0].message.content or "", "".join(parts), charged

    # In a thread: a browser that is open for other tests keeps a loop running in this one.
    with ThreadPoolExecutor(1) as pool:
        whole, streamed, charged = pool.submit(lambda: asyncio.run(talk())).result(60)
    assert (whole, streamed) == (said_to("one of two"), said_to("two of two"))
    assert charged == cost_of("two of two")


# What is streamed


def test_a_stream_says_nothing_of_usage_to_those_who_did_not_ask(
    client: OpenAI, box: Farebox, key: str, double: OpenAiDouble
) -> None:
    with ask(client, "a stream of words", stream=True) as stream:
        held = stream.response.headers["X-Credits-Held"]
        request_id = stream.response.headers["X-Request-Id"]
        chunks = list(stream)

    assert "".join(c.choices[0].delta.content or "" for c in chunks) == said_to("a stream of words")
    assert not any("usage" in c.model_fields_set for c in chunks)
    assert {c.model for c in chunks} == {MODEL}
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert held == str(held_for("a stream of words"))
    assert double.asked("a stream of words")[-1]["stream_options"] == ASKED_USAGE
    call = box.call(key, request_id)
    assert call["captured"] == cost_of("a stream of words") and not call["estimated"]


def test_a_stream_says_its_usage_and_its_price_last_to_those_who_asked(
    client: OpenAI, box: Farebox, key: str
) -> None:
    before, _ = box.standing(key)

    with ask(client, "what does it cost", stream=True, stream_options=ASKED_USAGE) as stream:
        chunks = list(stream)

    *others, last = chunks
    assert all(c.usage is None and c.choices for c in others) and not last.choices
    assert last.usage.completion_tokens == output_tokens("what does it cost")
    cost = cost_of("what does it cost")
    assert last.farebox == {"credits_charged": cost, "credits_remaining": before - cost}
    assert box.standing(key) == (before - cost, 0)


def test_streamed_choices_are_told_apart(client: OpenAI) -> None:
    said = ["", "", ""]
    charged = None
    with ask(client, "in turn", n=3, stream=True, stream_options=ASKED_USAGE) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
            if chunk.usage is not None:
                charged = chunk.farebox["credits_charged"]

    assert said == [said_to("in turn")] * 3
    assert charged == price(3 * output_tokens("in turn"), 2)


def test_a_streamed_tool_call_is_put_together_by_the_client(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=user("weather, piece by piece"), tools=[WEATHER]
    ) as stream:
        answer = stream.get_final_completion()

    [call] = answer.choices[0].message.tool_calls or []
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo", "unit": "°C"}


def test_a_streamed_completion_is_charged_like_a_whole_one(
    client: OpenAI, box: Farebox, key: str
) -> None:
    with client.completions.create(model=MODEL, prompt="word for word", stream=True) as stream:
        request_id = stream.response.headers["X-Request-Id"]
        text = "".join(chunk.choices[0].text for chunk in stream)

    assert text == said_to("word for word")
    assert box.call(key, request_id)["captured"] == cost_of("word for word")


@pytest.mark.parametrize(
    ("how", "code"),
    [("cut", "provider_error"), ("fail", "told_to")],
    ids=["breaks off", "tells an error"],
)
def test_a_stream_that_fails_is_an_exception_and_is_charged_for_what_came(
    client: OpenAI, box: Farebox, key: str, how: str, code: str
) -> None:
    text = order(**{how: 5})
    heard: list[str] = []
    stream = ask(client, text, stream=True)

    with pytest.raises(openai.APIError) as caught, stream:
        heard += (chunk.choices[0].delta.content or "" for chunk in stream)

    # The first event has the role alone, each of the other four a piece.
    assert caught.value.code == code
    spoken = " ".join(said_to(text).split(" ")[:4])
    assert "".join(heard) == spoken
    box.settled(key)
    call = box.call(key, stream.response.headers["X-Request-Id"])
    expected = price(math.ceil(len(spoken.encode()) / 4), estimated_input(text))
    assert (call["captured"], call["estimated"]) == (expected, True)


# What is refused


def test_an_unknown_key_is_an_authentication_error(box: Farebox) -> None:
    with (
        OpenAI(base_url=f"{box.url}/v1", api_key="fare_live_nobody") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        ask(client, "hi")

    assert caught.value.code == "invalid_api_key" and caught.value.type == "authentication_error"
    assert caught.value.request_id


def test_a_key_for_other_models_is_denied_this_one(
    box: Farebox, payer: tuple[str, str], wire: LossyWire
) -> None:
    limited = box.key(payer[0], "--scope", "model:oth*")
    wire.clear()
    with OpenAI(base_url=f"{wire.url}/v1", api_key=limited) as client:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            ask(client, "hi")
        listed = [model.id for model in client.models.list()]

    assert caught.value.code == "missing_scope"
    assert caught.value.response.json()["required"] == f"model:{MODEL}"
    assert listed == [OTHER_MODEL]
    assert len(wire.hits("/chat/completions")) == 1


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as asked:
        client.chat.completions.create(model="no-such", messages=user("hi"))
    with pytest.raises(openai.NotFoundError) as looked_up:
        client.models.retrieve("no-such")

    assert [asked.value.code, looked_up.value.code] == ["model_not_found"] * 2
    assert asked.value.param == "model"


def test_a_bad_field_is_a_bad_request_that_names_it(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hi", max_tokens=-1)

    assert caught.value.code == "validation_error" and caught.value.param == "max_tokens"


def test_what_the_upstream_refuses_is_refused_in_its_words_and_free(
    client: OpenAI, box: Farebox, key: str
) -> None:
    before = box.standing(key)

    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, order(status=400, error="vendors-own-name cannot do that."))

    assert caught.value.code == "told_to"
    assert caught.value.body["message"] == f"{MODEL} cannot do that."  # type: ignore[index]
    assert caught.value.response.headers["X-Credits-Charged"] == "0"
    assert box.standing(key) == before


def test_too_little_credit_is_told_once_and_not_retried(box: Farebox, wire: LossyWire) -> None:
    _, key = box.account(1)
    wire.clear()
    with (
        OpenAI(base_url=f"{wire.url}/v1", api_key=key) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        ask(client, "hi")

    assert caught.value.status_code == 402
    assert caught.value.code == "insufficient_credits" and caught.value.type == "payment_error"
    told = caught.value.response.json()
    assert (told["credits"], told["required"]) == (1, held_for("hi"))
    assert len(wire.hits()) == 1


def test_a_credit_limit_is_told_once_and_not_retried(
    box: Farebox, payer: tuple[str, str], wire: LossyWire
) -> None:
    limited = box.key(payer[0], "--credit-limit", "1", "--period", "day")
    wire.clear()
    with (
        OpenAI(base_url=f"{wire.url}/v1", api_key=limited) as client,
        pytest.raises(openai.PermissionDeniedError) as caught,
    ):
        ask(client, "hi")

    assert caught.value.code == "credit_limit_reached"
    assert len(wire.hits()) == 1


def test_our_rate_limit_is_a_rate_limit_error_that_says_when(
    box: Farebox, payer: tuple[str, str]
) -> None:
    slow = box.key(payer[0], "--rate", "1")

    def ask_often(client: OpenAI) -> None:
        for _ in range(3):  # a minute may end in between
            ask(client, "too often")

    with (
        OpenAI(base_url=f"{box.url}/v1", api_key=slow, max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        ask_often(client)

    assert caught.value.code == "rate_limited"
    assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60


@pytest.mark.parametrize("status", [500, 503, 401])
def test_a_failure_of_the_upstream_is_a_server_error_refunded_before_it_is_told(
    client: OpenAI, box: Farebox, key: str, status: int
) -> None:
    before = box.standing(key)

    with pytest.raises(openai.InternalServerError) as caught:
        ask(client.with_options(max_retries=0), order(status=status))

    assert box.standing(key) == before
    assert caught.value.status_code == 502 and caught.value.code == "provider_error"
    assert caught.value.response.json()["refunded"] is True
    assert OPERATORS_KEY not in caught.value.response.text


# What is tried again


def test_a_busy_upstream_is_asked_again_after_as_long_as_it_said(
    client: OpenAI, double: OpenAiDouble
) -> None:
    text = order(status=429, retry_after=1, times=1)

    assert ask(client, text).choices[0].message.content == said_to(text)

    first, second = (hit for hit in double.hits() if json.dumps(text).encode() in hit.body)
    assert second.at - first.at >= 1.0


def test_a_busy_upstream_is_a_rate_limit_error_to_those_who_do_not_retry(client: OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client.with_options(max_retries=0), order(status=429, retry_after=9))

    assert caught.value.response.headers["Retry-After"] == "9"


def test_a_retry_can_spend_what_the_failure_before_it_gave_back(
    box: Farebox, double: OpenAiDouble
) -> None:
    text = order(status=500, times=1)
    _, key = box.account(held_for(text))  # enough to hold for one call at a time
    with OpenAI(base_url=f"{box.url}/v1", api_key=key, max_retries=1) as client:
        raw = ask_raw(client, text, max_tokens=MOST_OUTPUT)

    assert raw.retries_taken == 1
    assert raw.headers["X-Credits-Charged"] == str(cost_of(text))
    assert [call["status"] for call in box.calls(key)] == ["captured", "voided"]
    assert len(double.asked(text)) == 2


def test_an_unreachable_upstream_is_tried_again_and_costs_nothing(
    client: OpenAI, box: Farebox, key: str, wire: LossyWire, through_the_wire: OpenAI
) -> None:
    before = box.standing(key)
    wire.clear()

    with pytest.raises(openai.InternalServerError):
        through_the_wire.with_options(max_retries=1).chat.completions.create(
            model=UNREACHED_MODEL, messages=user("hi")
        )

    assert len(wire.hits()) == 2
    assert box.standing(key) == before


# Idempotency-Key


def test_an_answer_lost_on_the_way_is_had_again_and_charged_once(
    through_the_wire: OpenAI, wire: LossyWire, box: Farebox, key: str, double: OpenAiDouble
) -> None:
    before, _ = box.standing(key)
    wire.clear()
    wire.lose(1)

    raw = ask_raw(through_the_wire, "lost once", extra_headers={"Idempotency-Key": "lost-once"})

    assert raw.parse().choices[0].message.content == said_to("lost once")
    assert raw.headers["Idempotent-Replayed"] == "true" and raw.headers["X-Credits-Charged"] == "0"
    assert len(wire.hits()) == 2 and len(double.asked("lost once")) == 1
    assert box.standing(key) == (before - cost_of("lost once"), 0)


def test_a_client_that_lost_patience_gets_the_answer_it_did_not_wait_for(
    through_the_wire: OpenAI, wire: LossyWire, box: Farebox, key: str, double: OpenAiDouble
) -> None:
    before, _ = box.standing(key)
    text = order(gate="patience")
    wire.clear()

    def answer_late() -> None:
        wire.wait_ended(wire.wait_for(2)[1])  # it was told that the first is still running
        double.gate("patience").open()

    with ThreadPoolExecutor() as helper:
        late = helper.submit(answer_late)
        raw = ask_raw(
            through_the_wire.with_options(timeout=1.5, max_retries=5), text,
            extra_headers={"Idempotency-Key": "impatient"},
        )  # fmt: skip
        late.result()

    assert raw.parse().choices[0].message.content == said_to(text)
    assert raw.headers["Idempotent-Replayed"] == "true" and raw.retries_taken >= 2
    assert len(double.asked(text)) == 1
    assert box.standing(key) == (before - cost_of(text), 0)


def test_without_an_idempotency_key_the_retry_is_another_call(
    through_the_wire: OpenAI, wire: LossyWire, box: Farebox, key: str
) -> None:
    before, _ = box.standing(key)
    wire.lose(1)

    ask(through_the_wire, "lost and paid twice")

    assert box.standing(key) == (before - 2 * cost_of("lost and paid twice"), 0)


def test_a_stream_lost_on_the_way_is_had_again_and_charged_once(
    through_the_wire: OpenAI, wire: LossyWire, box: Farebox, key: str, double: OpenAiDouble
) -> None:
    before, _ = box.standing(key)
    wire.lose(1)

    with ask(
        through_the_wire, "a lost stream", stream=True, stream_options=ASKED_USAGE,
        extra_headers={"Idempotency-Key": "lost-stream"},
    ) as stream:  # fmt: skip
        replayed = stream.response.headers["Idempotent-Replayed"]
        chunks = list(stream)

    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    cost = cost_of("a lost stream")
    assert said == said_to("a lost stream") and replayed == "true"
    assert chunks[-1].farebox == {"credits_charged": cost, "credits_remaining": before - cost}
    assert len(double.asked("a lost stream")) == 1
    assert box.standing(key) == (before - cost, 0)


def test_an_idempotency_key_used_for_something_else_is_told_once(
    through_the_wire: OpenAI, wire: LossyWire
) -> None:
    again = {"Idempotency-Key": "two-questions"}
    ask(through_the_wire, "one question", extra_headers=again)
    wire.clear()

    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(through_the_wire, "another question", extra_headers=again)

    assert caught.value.code == "idempotency_key_reused"
    assert len(wire.hits()) == 1


def test_an_answer_too_large_to_keep_is_told_once_to_those_who_want_it_again(
    through_the_wire: OpenAI, wire: LossyWire
) -> None:
    again = {"Idempotency-Key": "a-large-answer"}
    large = order(size=1024 * 1024)
    ask(through_the_wire, large, extra_headers=again)
    wire.clear()

    with pytest.raises(openai.ConflictError) as caught:
        ask(through_the_wire, large, extra_headers=again)

    assert caught.value.code == "idempotency_replay_unavailable"
    assert len(wire.hits()) == 1


# The JavaScript client


def why_no_javascript() -> str | None:
    """What is missing to run OpenAI's client for JavaScript here; None when nothing is."""
    if shutil.which("node") is None:
        return "OpenAI's client for JavaScript needs Node 18 or later and npm"
    if not (FOLDER / "node_modules" / "openai").is_dir():
        return "OpenAI's client for JavaScript is not installed: `make test` does that by npm"
    return None


def run(*program: str, **environment: str) -> str:
    """What one of the programs in the folder prints."""
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=PROGRAM_SECONDS, cwd=FOLDER,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def orders() -> dict[str, str]:
    return {
        "busy": order(status=429, retry_after=9),
        "failing": order(status=500),
        "failingOnce": order(status=500, times=1),
        "cut": order(cut=5),
    }


@pytest.fixture(scope="module")
def javascript(
    box: Farebox, payer: tuple[str, str], wire: LossyWire, orders: dict[str, str]
) -> dict[str, Any]:
    """What the client for JavaScript made of every scene of its program, in one run of it."""
    missing = why_no_javascript()
    if missing is not None:
        pytest.skip(missing)
    wire.lose(1)
    told = {
        "url": f"{box.url}/v1",
        "lossyUrl": f"{wire.url}/v1",
        "key": payer[1],
        "otherModelsKey": box.key(payer[0], "--scope", "model:oth*"),
        "poorKey": box.account(1)[1],
        "model": MODEL,
        **orders,
    }
    found: dict[str, Any] = json.loads(run("node", "client.mjs", json.dumps(told)))
    return found


def test_javascript_lists_models_and_retrieves_one(javascript: dict[str, Any]) -> None:
    found = javascript["list"]

    assert found["ids"] == [MODEL, OTHER_MODEL, UNREACHED_MODEL]
    assert found["one"]["id"] == MODEL
    assert found["one"]["farebox"]["credits_per_request"] == BASE


def test_javascript_chats_and_sees_what_it_cost(
    javascript: dict[str, Any], box: Farebox, key: str
) -> None:
    found = javascript["chat"]

    assert (found["text"], found["model"]) == (said_to("good day"), MODEL)
    assert found["usage"]["completion_tokens"] == output_tokens("good day")
    assert found["charged"] == str(cost_of("good day"))
    assert box.call(key, found["id"])["captured"] == cost_of("good day")


def test_javascript_gets_three_choices(javascript: dict[str, Any], box: Farebox, key: str) -> None:
    found = javascript["choices"]

    assert found["texts"] == [said_to("good day")] * 3
    assert box.call(key, found["id"])["captured"] == price(3 * output_tokens("good day"), 2)


def test_javascript_streams_without_usage_and_with_it(
    javascript: dict[str, Any], box: Farebox, key: str
) -> None:
    without, with_usage = javascript["stream"], javascript["streamWithUsage"]

    assert without["text"] == with_usage["text"] == said_to("good day")
    assert without["usages"] == [] and without["farebox"] is None
    assert [u["completion_tokens"] for u in with_usage["usages"]] == [output_tokens("good day")]
    assert with_usage["farebox"]["credits_charged"] == cost_of("good day")
    assert with_usage["held"] == str(held_for("good day"))
    assert box.call(key, with_usage["id"])["captured"] == cost_of("good day")


def test_javascript_gets_tool_calls_whole_and_in_pieces(javascript: dict[str, Any]) -> None:
    found = javascript["tools"]

    assert found["whole"]["name"] == "weather"
    assert found["whole"]["arguments"] == found["parts"]
    assert json.loads(found["parts"]) == {"city": "Oslo", "unit": "°C"}


def test_javascript_completes_and_embeds(javascript: dict[str, Any]) -> None:
    assert javascript["completion"] == said_to("good day")
    assert javascript["embedding"] == [list(VECTOR)] * 2


@pytest.mark.parametrize(
    ("kind", "status", "code", "type_"),
    [
        ("AuthenticationError", 401, "invalid_api_key", "authentication_error"),
        ("PermissionDeniedError", 403, "missing_scope", "permission_error"),
        ("NotFoundError", 404, "model_not_found", "invalid_request_error"),
        ("BadRequestError", 400, "validation_error", "invalid_request_error"),
        ("APIError", 402, "insufficient_credits", "payment_error"),
        ("UnprocessableEntityError", 422, "idempotency_key_reused", "invalid_request_error"),
        ("RateLimitError", 429, "told_to", "invalid_request_error"),
        ("InternalServerError", 502, "provider_error", "api_error"),
    ],
)
def test_javascript_throws_its_typed_error_after_one_request(
    javascript: dict[str, Any], kind: str, status: int, code: str, type_: str
) -> None:
    found = javascript["errors"][kind]

    assert (found["kind"], found["status"], found["code"], found["type"]) == (
        kind, status, code, type_,
    )  # fmt: skip
    assert found["requests"] == 1 and found["hasId"]
    assert found["retryAfter"] == ("9" if status == 429 else None)


def test_javascript_tries_a_failure_again(
    javascript: dict[str, Any], orders: dict[str, str], double: OpenAiDouble
) -> None:
    assert javascript["retry"] == {"text": said_to(orders["failingOnce"]), "requests": 2}
    assert len(double.asked(orders["failingOnce"])) == 2


def test_javascript_gets_a_lost_answer_again_and_pays_once(
    javascript: dict[str, Any], double: OpenAiDouble
) -> None:
    assert javascript["lostAnswer"] == {
        "text": said_to("is it lost"), "charged": "0", "replayed": "true", "requests": 2,
    }  # fmt: skip
    assert len(double.asked("is it lost")) == 1


def test_javascript_throws_when_a_stream_breaks_off(javascript: dict[str, Any]) -> None:
    found = javascript["broken"]

    assert found["isApiError"] and found["code"] == "provider_error" and found["requests"] == 1


# The programs of the documentation


@pytest.mark.parametrize("program", ["example.py", "example.mjs"])
def test_the_examples_of_the_documentation_run_and_say_what_they_cost(
    box: Farebox, program: str
) -> None:
    if program.endswith(".mjs") and why_no_javascript() is not None:
        pytest.skip(str(why_no_javascript()))
    _, key = box.account(1000)
    interpreter = sys.executable if program.endswith(".py") else "node"

    printed = run(interpreter, program, FAREBOX_URL=box.url, FAREBOX_KEY=key, FAREBOX_MODEL=MODEL)

    first, second = cost_of("Good morning"), cost_of("Good evening")
    assert printed.splitlines() == [
        said_to("Good morning"), f"{first} charged, {1000 - first} left",
        said_to("Good evening"), f"{second} charged",
    ]  # fmt: skip
    assert box.standing(key) == (1000 - first - second, 0)
