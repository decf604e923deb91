"""The sandbox as a model's server: the shapes that clients read, and failures on purpose."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from inprocess import Box, Payer
from server import Answer

from core.adapters.llm.course import ModelCourse

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
CONFIG = """
[upstreams.sandbox]
kind = "sandbox"

[[models]]
id = "talk"
upstream_model = "talk:1"
credits_per_request = 2
credits_per_1k_tokens = 1000
max_output_tokens = 50
""" + "".join(
    f'[[routes]]\npath = "{path}"\nmethods = ["POST"]\nupstream = "sandbox"\nadapter = "{name}"\n'
    for path, name in ((CHAT, "chat"), (COMPLETIONS, "completions"), (EMBEDDINGS, "embeddings"))
)
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
FAILED = {
    "message": "The sandbox was asked to fail.", "type": "sandbox_error", "param": None,
    "code": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("sandbox") / "i", CONFIG) as box:
        yield box


@pytest.fixture
def payer(box: Box) -> Payer:
    return box.payer(1000)


def ask(box: Box, payer: Payer, text: object, **more: Any) -> Answer:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": text}]
    return box.post(CHAT, payer.key, {"model": "talk", "messages": messages, **more})


def events(answer: Answer) -> list[Any]:
    """The data of an answer's events, which must end as a stream of OpenAI's does."""
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    *found, last = answer.body.decode().split("\n\n")
    assert last == "" and found.pop() == "data: [DONE]"
    assert all(event.startswith("data: ") for event in found)
    return [json.loads(event.removeprefix("data: ")) for event in found]


# Shapes.


def test_a_chat_answer_has_what_clients_read(box: Box, payer: Payer) -> None:
    answer = ask(box, payer, "hello you").json()
    assert answer["id"].startswith("chatcmpl-") and isinstance(answer["created"], int)
    assert (answer["object"], answer["model"]) == ("chat.completion", "talk")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant", "content": "The sandbox heard: hello you", "refusal": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]  # fmt: skip
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}


def test_a_streamed_chat_begins_with_its_role_and_ends_with_its_reason(
    box: Box, payer: Payer
) -> None:
    first, *pieces, last = events(ask(box, payer, "hello you", stream=True))
    for chunk in (first, *pieces, last):
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert (chunk["object"], chunk["model"]) == ("chat.completion.chunk", "talk")
        assert chunk["id"] == first["id"] and len(chunk["choices"]) == 1
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    said = "".join(chunk["choices"][0]["delta"]["content"] for chunk in pieces)
    assert said == "The sandbox heard: hello you"
    assert [c["choices"][0]["finish_reason"] for c in (first, *pieces)] == [None] * 6
    assert last["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip


def test_usage_is_in_a_chunk_of_its_own_for_who_asked(box: Box, payer: Payer) -> None:
    *chunks, last = events(ask(box, payer, "a b", stream=True,
                               stream_options={"include_usage": True}))  # fmt: skip
    assert chunks and all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    assert last["farebox"] == {"credits_charged": 7, "credits_remaining": 993}


def test_several_choices_come_beside_each_other(box: Box, payer: Payer) -> None:
    whole = ask(box, payer, "x", n=3).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    chunks = events(ask(box, payer, "x", n=2, stream=True))
    assert [c["choices"][0]["index"] for c in chunks] == [0, 1] * (len(chunks) // 2)
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        said = "".join(choice["delta"].get("content", "") for choice in mine)
        assert said == "The sandbox heard: x" and mine[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_cuts_and_says_so(box: Box, payer: Payer, field: str) -> None:
    (choice,) = ask(box, payer, "hello", **{field: 2}).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("The sandbox", "length")
    assert events(ask(box, payer, "x", stream=True, **{field: 1}))[-1]["choices"][0][
        "finish_reason"
    ] == ("length")


def test_parts_of_a_message_are_heard_as_its_text(box: Box, payer: Payer) -> None:
    parts = [
        {"type": "text", "text": "look:"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "nice"},
    ]
    (choice,) = ask(box, payer, parts).json()["choices"]
    assert choice["message"]["content"] == "The sandbox heard: look: nice"


def test_a_tool_is_called_when_one_is_offered(box: Box, payer: Payer) -> None:
    (choice,) = ask(box, payer, "sandbox: tool", tools=TOOLS).json()["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "look_up", "arguments": "{}"}
    first, second, last = events(ask(box, payer, "sandbox: tool", tools=TOOLS, stream=True))
    (begun,) = first["choices"][0]["delta"]["tool_calls"]
    assert begun == {
        "index": 0, "id": call["id"], "type": "function",
        "function": {"name": "look_up", "arguments": ""},
    }  # fmt: skip
    assert second["choices"][0]["delta"]["tool_calls"] == [
        {"index": 0, "function": {"arguments": "{}"}}
    ]
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    (plain,) = ask(box, payer, "sandbox: tool").json()["choices"]
    assert plain["message"]["content"] == "The sandbox heard: sandbox: tool"


def test_completions_answer_each_prompt(box: Box, payer: Payer) -> None:
    body = {"model": "talk", "prompt": ["a", "b c"], "n": 2, "max_tokens": 12}
    answer = box.post(COMPLETIONS, payer.key, body).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert [(c["index"], c["text"].rpartition(": ")[2]) for c in answer["choices"]] == [
        (0, "a"), (1, "a"), (2, "b c"), (3, "b c"),
    ]  # fmt: skip
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 18, "total_tokens": 21}
    body |= {"prompt": "a", "n": 1, "stream": True}
    *pieces, last = events(box.post(COMPLETIONS, payer.key, body))
    assert {c["object"] for c in (*pieces, last)} == {"text_completion"}
    assert "".join(c["choices"][0]["text"] for c in pieces) == "The sandbox heard: a"
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "stop")


def test_embeddings_are_numbers_or_base64_as_clients_ask(box: Box, payer: Payer) -> None:
    def embed(**more: Any) -> Any:
        answer = box.post(EMBEDDINGS, payer.key, {"model": "talk", "input": ["a", "b"], **more})
        assert answer.status == 200, answer.body
        return answer.json()

    told = embed()
    assert (told["object"], told["model"]) == ("list", "talk")
    assert [(item["object"], item["index"]) for item in told["data"]] == [
        ("embedding", 0), ("embedding", 1),
    ]  # fmt: skip
    assert told["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    numbers = [item["embedding"] for item in told["data"]]
    assert numbers[0] != numbers[1] and all(len(found) == 8 for found in numbers)
    packed = [base64.b64decode(i["embedding"]) for i in embed(encoding_format="base64")["data"]]
    assert [list(struct.unpack("<8f", found)) for found in packed] == numbers
    assert [len(item["embedding"]) for item in embed(dimensions=3)["data"]] == [3, 3]
    assert embed(input=[1, 2, 3])["data"][0]["index"] == 0


# Failures on purpose.


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("order", "status", "code"),
    [
        ("400", 400, None),
        ("404", 404, None),
        ("429", 429, None),
        ("401", 502, "provider_error"),
        ("500", 502, "provider_error"),
        ("503", 502, "provider_error"),
        ("timeout", 504, "provider_timeout"),
    ],
)
def test_what_fails_before_its_first_word_is_free(
    box: Box, payer: Payer, order: str, status: int, code: str | None, streams: bool
) -> None:
    answer = ask(box, payer, f"sandbox: {order}", stream=streams)
    assert answer.status == status
    if code is None:
        assert answer.json() == {"error": FAILED}
        assert answer.headers.get("Retry-After") == ("7" if status == 429 else None)
    else:
        assert answer.code == code and answer.json()["refunded"] is True
    assert box.standing(payer) == (1000, 0)
    embedded = box.post(EMBEDDINGS, payer.key, {"model": "talk", "input": f"sandbox:{order}"})
    assert embedded.status == status


@pytest.mark.parametrize("order", ["break", "error"])
def test_a_whole_answer_that_breaks_or_is_an_error_is_free(
    box: Box, payer: Payer, order: str
) -> None:
    answer = ask(box, payer, f"sandbox: {order}")
    assert (answer.status, answer.code) == (502, "provider_error")
    assert box.standing(payer) == (1000, 0)


def test_a_stream_that_breaks_off_is_charged_for_what_came(box: Box, payer: Payer) -> None:
    with pytest.raises(ConnectionResetError):  # as the server tells a client
        ask(box, payer, "sandbox: break", stream=True)
    (call,) = box.get("/api/v1/usage", payer.key).json()["data"]
    # Two of six words: "The sandbox", eleven bytes, which are three tokens.
    assert (call["status"], call["estimated"], call["output_tokens"]) == ("captured", True, 3)
    assert box.standing(payer) == (1000 - (2 + 3), 0)


def test_an_error_among_the_words_is_told_and_what_came_is_charged(box: Box, payer: Payer) -> None:
    *words, told = events(ask(box, payer, "sandbox: error", stream=True))
    assert words and told["error"] == FAILED
    assert box.standing(payer) == (1000 - (2 + 3), 0)


def test_an_answer_without_usage_is_estimated(box: Box, payer: Payer) -> None:
    answer = ask(box, payer, "sandbox: no usage")
    assert "usage" not in answer.json()
    record = box.record(payer.key, answer)
    said = answer.json()["choices"][0]["message"]["content"]
    assert (record["estimated"], record["output_tokens"]) == (True, -(-len(said) // 4))


def test_an_answer_is_as_long_as_it_is_told_to_be(box: Box, payer: Payer) -> None:
    answer = ask(box, payer, "sandbox: words 40")
    assert answer.json()["usage"]["completion_tokens"] == 40
    assert answer.headers["X-Credits-Charged"] == "42"
    assert ask(box, payer, "sandbox: words").json()["usage"]["completion_tokens"] == 50  # its limit


def test_a_slow_answer_is_bridged_by_heartbeats(
    box: Box, payer: Payer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelCourse, "beat_seconds", 0.05)
    answer = ask(box, payer, "sandbox: slow 120", stream=True, max_tokens=1)
    pieces = answer.body.decode().split("\n\n")
    assert pieces.count(": still there") == 6  # two in each silence before three chunks
    assert [p[:6] for p in pieces if p].count("data: ") == 4


def test_what_is_no_order_is_said_back(box: Box, payer: Payer) -> None:
    for text in ("sandbox: dance", "sandbox: 99", "sandbox: 600", "the sandbox: 429", "sandbox"):
        (choice,) = ask(box, payer, text).json()["choices"]
        assert choice["message"]["content"] == f"The sandbox heard: {text}"
