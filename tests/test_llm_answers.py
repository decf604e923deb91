"""A model's answer that comes whole: its price, what the caller gets, and from which upstream."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from doubles import refused_port
from inprocess import HOST, Payer
from llm_double import (
    COMPLETIONS,
    EMBEDDINGS,
    MODEL,
    ORGANISATION,
    RATES,
    SECRET,
    LlmBox,
    LlmUpstream,
    Play,
    Told,
    Wait,
    chat,
    event,
    message,
    routes_toml,
    said,
    size_of,
    upstream_toml,
    whole,
)

GRANTED = 1_000_000
SENT = Fraction(size_of(chat()["messages"]), 3)
HELD = RATES.price(RATES.most, SENT)
PART, REST = "canary-of-a-header", "and-its-rest"
SPARE_SECRET = "Spare-credential-98765"
LARGEST = 32 * 1024 * 1024


@pytest.fixture(scope="module")
def llm() -> Iterator[LlmUpstream]:
    with LlmUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def spare() -> Iterator[LlmUpstream]:
    with LlmUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def box(
    llm: LlmUpstream, spare: LlmUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmBox]:
    nobody = f"http://127.0.0.1:{refused_port()}/v1"
    config = [
        upstream_toml("llm", llm.base_url),
        upstream_toml("impatient", llm.base_url, timeout_seconds=0.4),
        upstream_toml("refuses", nobody),
        upstream_toml("unknown", "http://nobody.invalid/v1", timeout_seconds=5),
        upstream_toml("spare", spare.base_url).replace(
            f'"Bearer {SECRET}"', f'"Bearer {SPARE_SECRET}", X-A = "{PART}", X-B = "{PART}{REST}"'
        ),
        routes_toml(),
        RATES.toml(MODEL, upstream_model="qwen3:8b"),
    ]
    for first in ("llm", "impatient", "refuses", "unknown"):
        for second in ("spare", "refuses"):
            if first != second:
                name = f"{first}-{second}"
                terms = {"upstream": first, "fallback": second, "upstream_model": "qwen3:8b"}
                config.append(RATES.toml(name, **terms))
    folder = tmp_path_factory.mktemp("answers")
    with LlmBox(folder / "instance", "\n".join(config)) as made:
        yield made


@pytest.fixture
def payer(box: LlmBox) -> Payer:
    return box.payer(GRANTED)


def answer(*contents: str | None, **more: object) -> dict[str, Any]:
    """A chat completion with so many choices."""
    choices = [
        {"index": index, "finish_reason": "stop", "message": message(content)}
        for index, content in enumerate(contents)
    ]
    return {"id": "chatcmpl-1", "model": "qwen3:8b", "choices": choices, **more}


def tokens(sent: object, made: object) -> dict[str, Any]:
    return {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": 0}


def check(box: LlmBox, payer: Payer, told: Told, made: int, sent: int | Fraction) -> None:
    """It cost the price of so many tokens, and everything says so."""
    price = RATES.price(made, sent)
    charged = min(price, told.record["held"])
    assert told.answer.status == 200
    assert told.answer.headers["X-Credits-Charged"] == str(charged)
    assert told.answer.headers["X-Credits-Remaining"] == str(GRANTED - charged)
    assert "X-Credits-Held" not in told.answer.headers
    record = told.record
    assert (record["status"], record["captured"], record["price"]) == ("captured", charged, price)
    assert (record["input_tokens"], record["output_tokens"]) == (ceil(sent), made)
    assert Fraction(record["cost_usd"]) == RATES.cost(made, ceil(sent))
    assert box.standing(payer) == (GRANTED - charged, 0)


def check_free(box: LlmBox, payer: Payer, told: Told, status: int, code: str | None) -> None:
    """It cost nothing, and is an error as OpenAI tells them."""
    assert told.answer.status == status
    error = told.answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert (isinstance(error["message"], str), error["code"]) == (True, code)
    assert told.answer.headers["X-Credits-Charged"] == "0"
    assert (told.record["status"], told.record["captured"]) == ("voided", 0)
    assert told.record["cost_usd"] is None
    assert box.standing(payer) == (GRANTED, 0)


# What it costs


COUNTED = {
    "usage": (tokens(11, 23), 11, 23),
    "usage of zero tokens": (tokens(0, 0), 0, 0),
    "usage of a part of a token": (tokens(11.0, 23.0), None, None),
    "usage that is negative": (tokens(-11, -23), None, None),
    "usage that is a string": (tokens("11", "23"), None, None),
    "usage that is true": (tokens(True, True), None, None),
    "usage that is huge": (tokens(10**13, 10**40), None, None),
    "usage of the output alone": ({"completion_tokens": 23}, None, 23),
    "usage of the input alone": ({"prompt_tokens": 11}, 11, None),
    "usage that is wrong of the output": (tokens(11, None), 11, None),
    "usage that is null": (None, None, None),
    "usage that is a list": ([11, 23], None, None),
    "usage beyond what was set aside": (tokens(11, 999_999), 11, 999_999),
}


@pytest.mark.parametrize("name", COUNTED)
def test_an_answer_costs_what_its_usage_says_and_else_an_estimate(
    box: LlmBox, llm: LlmUpstream, payer: Payer, name: str
) -> None:
    usage, sent, made = COUNTED[name]
    text = "Grüße, 世界 🙂"
    told = box.tell(payer, chat(play=llm.stage(whole(answer(text, usage=usage)))))
    guess = ceil(Fraction(len(text.encode()), 4))
    check(box, payer, told, guess if made is None else made, SENT if sent is None else sent)
    assert told.record["estimated"] == (sent is None or made is None)
    assert told.record["held"] == HELD
    assert told.answer.json()["usage"] == usage


CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"city":"Ulm"}'}}
CUSTOM = {"id": "c", "type": "custom", "custom": {"name": "f", "input": "Ulm, tomorrow"}}
SPOKEN: dict[str, tuple[dict[str, Any], int]] = {
    "text": (answer("Hello"), 5),
    "text, and an error that is none": ({**answer("Hello"), "error": ""}, 5),
    "text without usage": ({"choices": answer("Hello")["choices"]}, 5),
    "text in parts": (
        {"choices": [{"message": {"content": [{"type": "text", "text": "Hello"}, {"x": 1}, 2]}}]},
        5,
    ),
    "three choices": (answer("Hello", "Hi", "Good day"), 15),
    "reasoning": ({"choices": [{"message": message("Hi", reasoning_content="Hm, ")}]}, 6),
    "reasoning under another name": ({"choices": [{"message": message("", reasoning="Hm, ")}]}, 4),
    "reasoning under both": (
        {"choices": [{"message": message("", reasoning="Hm, ", reasoning_content="Hm, ")}]}, 4,
    ),
    "a refusal": ({"choices": [{"message": message(None, refusal="I will not.")}]}, 11),
    "the arguments of tools": (
        {"choices": [{"message": message(None, tool_calls=[CALLED, CALLED])}]}, 28,
    ),
    "the words for a tool of another kind": (
        {"choices": [{"message": message(None, tool_calls=[CUSTOM])}]}, 13,
    ),
    "the arguments of a function": (
        {"choices": [{"message": message(None, function_call={"arguments": "{}"})}]}, 2,
    ),
    "what is spoken aloud": (
        {"choices": [{"message": message(None, audio={"data": "AAAA", "transcript": "Hello"})}]}, 5,
    ),
    "things in odd places": (
        {"choices": [1, None, {"message": 1}, {"message": message("Hi", tool_calls={"a": 1})},
                     {"message": message(None, tool_calls=[1, {"function": 2}], refusal=3)}]},
        2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOKEN)
def test_without_usage_four_bytes_of_what_was_said_are_a_token(
    box: LlmBox, llm: LlmUpstream, payer: Payer, name: str
) -> None:
    value, size = SPOKEN[name]
    told = box.tell(payer, chat(play=llm.stage(whole(value))))
    check(box, payer, told, ceil(Fraction(size, 4)), SENT)
    assert told.record["estimated"] is True


def test_an_answer_without_a_word_is_one_if_the_upstream_counted_it(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    told = box.tell(payer, chat(play=llm.stage(whole(answer("", usage=tokens(11, 0))))))
    check(box, payer, told, 0, 11)


WORDS = b'{"choices": [{"message": {"content": "Hello"}}]'
DEEP = b'{"choices": ' + b"[" * 5000 + b"]" * 5000 + b"}"
NONE = {
    "choices of nothing": whole(answer("")),
    "no choices": whole(answer()),
    "an empty object": whole({}),
    "null": whole(None),
    "a list": whole([answer("Hello")]),
    "a string": whole("Hello"),
    "nothing": whole(b""),
    "HTML": Play([b"<h1>Hello</h1>"], content_type="text/html"),
    "half of an object": whole(b'{"choices": ['),
    "an object and more": whole(WORDS + b"} {}"),
    "an object with a comma too many": whole(WORDS + b",}"),
    "an object with another sign for a comma": whole(WORDS + b'; "x": 1}'),
    "an object with another sign for a colon": whole(WORDS + b', "x", 1}'),
    "an object that is nested without end": whole(DEEP),
    "an object whose names are no strings": whole(b'{1: NaN}'),
    "an error": whole({"error": {"message": "oh"}, "usage": tokens(11, 23)}),
    "an error of a string": whole({"error": "oh", **answer("Hello")}),
    "an error in vLLM's shape": whole({"object": "error", "message": "oh"}),
    "data, which is another endpoint's": whole({"data": [{"embedding": [1]}]}),
    "events": Play([event(said("Hello"))]),
    "something packed": whole(gzip.compress(json.dumps(answer("Hello")).encode()), 200,
                              ("Content-Encoding", "gzip")),
    "a cut answer": Play([b'{"choices": '], content_type="application/json", ending="close"),
    "an answer without end": Play(
        [b'{"choices": "', *[b"x" * 2**20] * 33], content_type="application/json"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
def test_a_success_that_is_no_answer_is_the_providers_error_and_free(
    box: LlmBox, llm: LlmUpstream, payer: Payer, name: str
) -> None:
    told = box.tell(payer, chat(play=llm.stage(NONE[name])))
    check_free(box, payer, told, 502, "provider_error")
    assert told.answer.json()["refunded"] is True
    assert told.record["upstream_status"] == 200


def test_an_answer_of_many_mebibytes_is_charged_by_its_usage(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    play = whole(answer("x" * 4_000_000, usage=tokens(11, 23)))
    request = chat(play=llm.stage(play))
    told = box.tell(payer, request, Idempotency_Key="large")
    check(box, payer, told, 23, 11)
    again = box.tell(payer, request, Idempotency_Key="large")
    assert (again.answer.status, again.answer.code) == (409, "idempotency_replay_unavailable")


# What the caller gets


def test_only_the_models_name_is_changed_in_an_answer(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    odd = (
        b'"x":{"a":  1e400, "b" :9223372036854775808,"c":-0.0, "d":[1.10, "\\u00e9\\/"]},'
        b'"y":[ {"model":"qwen3:8b"} ],"\xc3\xa9":"\xf0\x9f\x99\x82","z":null'
    )
    head, tail = b'{"id":"x","model":', b',"choices":[{"message": {"content":"Hi"} }],' + odd + b"}"
    told = box.tell(payer, chat(play=llm.stage(whole(head + b'"qwen3:8b"' + tail))))
    assert told.answer.body == head + b'"qwen3-8b"' + tail
    assert told.answer.headers["Content-Type"] == "application/json"


def test_what_clients_read_though_it_is_no_json_is_an_answer(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    body = (
        b'{ "choices" : [{"message": {"content": "Hi \\ud83d"}, "p": NaN}] ,\n"b":\t-Infinity }\n'
    )
    told = box.tell(payer, chat(play=llm.stage(whole(body))))
    check(box, payer, told, 2, SENT)  # "Hi " and half of four bytes
    read = json.loads(told.answer.body)
    assert read["choices"][0]["message"]["content"] == "Hi \ud83d"
    assert b'[{"message": {"content": "Hi \\ud83d"}, "p": NaN}]' in told.answer.body


def test_bytes_that_are_no_text_are_counted_and_passed_on(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    body = b'{"choices":[{"message":{"content":"12345678\xff"}}]}'
    told = box.tell(payer, chat(play=llm.stage(whole(body))))
    assert told.answer.body == body
    assert told.record["captured"] >= RATES.price(3, SENT)


def test_a_model_that_an_answer_does_not_name_is_not_put_into_it(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    told = box.tell(payer, chat(play=llm.stage(whole({"choices": answer("Hi")["choices"]}))))
    assert set(told.answer.json()) == {"choices"}


def test_a_repeat_gets_the_same_answer_free(box: LlmBox, llm: LlmUpstream, payer: Payer) -> None:
    request = chat(play=llm.stage(whole(answer("Hi", usage=tokens(11, 23)))))
    first = box.tell(payer, request, Idempotency_Key="k")
    again = box.tell(payer, request, Idempotency_Key="k")
    assert again.answer.body == first.answer.body
    assert again.answer.headers["Idempotent-Replayed"] == "true"
    assert again.answer.headers["X-Credits-Charged"] == "0"
    assert len(llm.heard(request["play"])) == 1
    assert box.standing(payer) == (GRANTED - first.record["captured"], 0)


# The other endpoints


def test_an_embedding_costs_its_input(box: LlmBox, llm: LlmUpstream, payer: Payer) -> None:
    value = {"object": "list", "model": "qwen3:8b", "data": [{"index": 0, "embedding": [0.25]}]}
    play = whole(value | {"usage": {"prompt_tokens": 9, "total_tokens": 9}})
    request = {"model": MODEL, "input": ["one", "two"], "play": llm.stage(play)}
    told = box.tell(payer, request, EMBEDDINGS)
    check(box, payer, told, 0, 9)
    assert (told.record["estimated"], told.record["route"]) == (False, EMBEDDINGS)
    assert told.answer.json()["model"] == MODEL


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": -1}, {"total_tokens": 9}], ids=repr)
def test_an_embedding_without_usage_costs_what_was_set_aside(
    box: LlmBox, llm: LlmUpstream, payer: Payer, usage: object
) -> None:
    play = whole({"data": [{"embedding": "AAAA"}], "usage": usage})
    request = {"model": MODEL, "input": ["one", "twenty"], "play": llm.stage(play)}
    told = box.tell(payer, request, EMBEDDINGS)
    check(box, payer, told, 0, Fraction(9, 3))
    assert told.record["captured"] == told.record["held"]
    assert told.record["estimated"] is True


def test_an_embedding_of_nothing_is_free(box: LlmBox, llm: LlmUpstream, payer: Payer) -> None:
    play = whole({"object": "list", "data": []})
    request = {"model": MODEL, "input": "one", "play": llm.stage(play)}
    check_free(box, payer, box.tell(payer, request, EMBEDDINGS), 502, "provider_error")


@pytest.mark.parametrize("counted", [True, False])
def test_a_completion_costs_its_tokens(
    box: LlmBox, llm: LlmUpstream, payer: Payer, counted: bool
) -> None:
    value: dict[str, Any] = {"model": "qwen3:8b", "choices": [{"text": "Hello"}, {"text": "Hi!"}]}
    play = whole(value | ({"usage": tokens(11, 23)} if counted else {}))
    request = {"model": MODEL, "prompt": ["Say", "it"], "play": llm.stage(play)}
    told = box.tell(payer, request, COMPLETIONS)
    check(box, payer, told, *((23, 11) if counted else (2, Fraction(5, 3))))
    assert told.record["held"] == RATES.price(2 * RATES.most, Fraction(5, 3))


# Errors of the provider


def leaks(llm: LlmUpstream, spare: LlmUpstream) -> list[str]:
    """What of the operator's no caller may see."""
    return [
        SECRET,
        SPARE_SECRET,
        f"{PART}{REST}",
        f"127.0.0.1:{llm.port}",
        f"127.0.0.1:{spare.port}",
        "127.0.0.1",
        "qwen3:8b",
        ORGANISATION,
        "proj_0123456789abcdef",
        "sk-abc***wxyz",
    ]


ERRORS = ("error", "string", "vllm", "detail", "bare", "nested", "key", "list", "text", "half")


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
@pytest.mark.parametrize("shape", ERRORS)
def test_an_error_of_the_provider_says_nothing_of_the_operator(
    box: LlmBox, llm: LlmUpstream, spare: LlmUpstream, payer: Payer, shape: str, status: int
) -> None:
    secrets = leaks(llm, spare)
    words = f"Sorry: {' and '.join(secrets)}, at {llm.base_url}/chat/completions."
    bodies: dict[str, Any] = {
        "error": {"error": {"message": words, "type": "t", "code": "c", "param": "p"}},
        "string": {"error": words},
        "vllm": {"object": "error", "message": words, "type": "t", "code": 400},
        "detail": {"detail": words},
        "bare": {"message": words, "trace": [words]},
        "nested": {"error": {"message": {"a": words}, "metadata": [{"raw": words}]}},
        "key": {"error": {"message": "m", "metadata": {words: 1, SECRET: {SPARE_SECRET: 2}}}},
        "list": [{"error": {"message": words}}],
        "text": words.encode(),
        "half": ('{"error": {"message": "\\ud83d ' + words + '"}}').encode(),
    }
    play = whole(bodies[shape], status, ("Retry-After", "7"), ("X-Api-Key", SECRET))
    name = llm.stage(play)
    spare.plays[name] = play
    told = box.tell(payer, chat(play=name, model="llm-spare"))
    seen = told.answer.body.decode() + json.dumps(dict(told.answer.headers))
    seen = seen.replace(HOST, "")  # our own
    for secret in secrets:
        assert secret not in seen
    assert REST not in seen  # what would be left if its part were taken out first
    passed_on = status not in (401, 403, 500, 503)
    assert told.answer.status == (status if passed_on else 502)
    error = told.answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert isinstance(error["message"], str) and error["message"]
    if passed_on:
        assert told.answer.headers["Retry-After"] == "7"
        readable = shape in ("error", "string", "vllm", "detail", "bare", "half")
        assert ("Sorry" in error["message"]) == readable
        assert (error["type"], error["param"]) == (
            ("t", "p") if shape == "error" else ("t", None) if shape == "vllm" else (None, None)
        )
    assert box.standing(payer) == (GRANTED, 0)


def test_an_error_nested_without_reason_is_cut_and_not_ours(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    deep = b'{"error": {"message": "deep", "x": ' + b"[" * 900 + b"]" * 900 + b"}}"
    told = box.tell(payer, chat(play=llm.stage(whole(deep, 400))))
    assert (told.answer.status, told.answer.json()["error"]["message"]) == (400, "deep")


def test_numbers_in_an_error_may_be_of_any_size(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    play = whole(b'{"error": {"message": "odd", "code": 1' + b"0" * 400 + b', "x": 1e999}}', 400)
    told = box.tell(payer, chat(play=llm.stage(play)))
    assert (told.answer.status, told.answer.json()["error"]["message"]) == (400, "odd")


# The second upstream


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("first", ["refuses", "unknown"])
def test_an_upstream_that_cannot_be_reached_is_stood_in_for(
    box: LlmBox, spare: LlmUpstream, payer: Payer, first: str, streams: bool
) -> None:
    pieces = [event(said("Hello"))]
    name = spare.stage(Play(pieces) if streams else whole(answer("Hello")))
    told = box.tell(payer, chat(play=name, model=f"{first}-spare", stream=streams))
    assert told.answer.status == 200
    assert told.record["captured"] == RATES.price(2, SENT)
    [hit] = spare.heard(name)
    assert hit.header("Authorization") == f"Bearer {SPARE_SECRET}"
    assert json.loads(hit.body)["model"] == "qwen3:8b"
    assert f'"model": "{first}-spare"' in told.answer.body.decode().replace('":"', '": "')


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
def test_an_upstream_that_is_overloaded_or_broken_is_stood_in_for(
    box: LlmBox, llm: LlmUpstream, spare: LlmUpstream, payer: Payer, status: int
) -> None:
    name = llm.stage(whole({"error": {"message": "no"}}, status))
    told = box.tell(payer, chat(play=name, model="llm-spare"))
    check(box, payer, told, 3, 7)
    assert len(llm.heard(name)) == 1
    [hit] = spare.heard(name)
    assert SECRET.encode() not in hit.everything()


NO_SECOND = {
    "a 400": ("llm", whole({"error": {"message": "no"}}, 400), 400),
    "a 404": ("llm", whole({"error": {"message": "no"}}, 404), 404),
    "a 401": ("llm", whole({}, 401), 502),
    "a redirect": ("llm", whole({}, 302), 502),
    "a success that is none": ("llm", whole({"error": {"message": "no"}}), 502),
    "a cut answer": ("llm", Play([b"{"], content_type="application/json", ending="reset"), 502),
    "a head alone": ("llm", Play(ending="reset"), 502),
    "silence": ("impatient", Play(before_head="never 1"), 504),
    "silence after the head": ("impatient", Play([Wait("never 2")]), 504),
}


@pytest.mark.parametrize("name", NO_SECOND)
def test_a_call_that_may_have_been_carried_out_is_not_made_again(
    box: LlmBox, llm: LlmUpstream, spare: LlmUpstream, payer: Payer, name: str
) -> None:
    first, play, status = NO_SECOND[name]
    staged = llm.stage(play)
    told = box.tell(payer, chat(play=staged, model=f"{first}-spare"))
    assert told.answer.status == status
    assert (len(llm.heard(staged)), spare.heard(staged)) == (1, [])
    assert (told.record["status"], box.standing(payer)) == ("voided", (GRANTED, 0))


SECOND_FAILS = {
    "is overloaded": (whole({"error": {"message": "no"}}, 429, ("Retry-After", "9")), 429),
    "refuses": (whole({"error": {"message": "no"}}, 400), 400),
    "is broken": (whole({"error": {"message": "no"}}, 503), 502),
    "knows no key": (whole({}, 401), 502),
}


@pytest.mark.parametrize("name", SECOND_FAILS)
def test_when_the_second_fails_too_its_failure_is_the_answer(
    box: LlmBox, llm: LlmUpstream, spare: LlmUpstream, payer: Payer, name: str
) -> None:
    play, status = SECOND_FAILS[name]
    staged = llm.stage(whole({"error": {"message": "no"}}, 500))
    spare.plays[staged] = play
    told = box.tell(payer, chat(play=staged, model="llm-spare"))
    check_free(box, payer, told, status, "provider_error" if status == 502 else None)
    assert told.answer.headers.get("Retry-After") == ("9" if status == 429 else None)
    assert (len(llm.heard(staged)), len(spare.heard(staged))) == (1, 1)


def test_when_no_upstream_can_be_reached_the_call_is_free(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    overloaded = llm.stage(whole({"error": {"message": "no"}}, 429))
    told = box.tell(payer, chat(play=overloaded, model="llm-refuses"))
    check_free(box, payer, told, 502, "provider_error")
    check_free(box, payer, box.tell(payer, chat(model="unknown-refuses")), 502, "provider_error")
