"""A model's answer as it streams: what the caller gets of it, and what it costs.

Every behaviour is one a server has been seen with, or one that could cheat the caller or the
operator. What each must cost is worked out here from what was said, by the contract's words.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import Payer
from llm_double import (
    CHAT,
    COMPLETIONS,
    DONE,
    EVENTS,
    MODEL,
    ORGANISATION,
    RATES,
    SECRET,
    Heard,
    LlmBox,
    LlmUpstream,
    Play,
    Told,
    Wait,
    chat,
    counted,
    event,
    routes_toml,
    said,
    size_of,
    upstream_toml,
    usage,
    whole,
)
from server import OPERATOR_KEY, Farebox, until

from core import sse
from core.adapters.llm import course

GRANTED = 1_000_000
SENT = Fraction(size_of(chat()["messages"]), 3)
HELD = RATES.price(RATES.most, SENT)
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def llm() -> Iterator[LlmUpstream]:
    with LlmUpstream() as server:
        yield server


def config(llm: LlmUpstream) -> str:
    return "\n".join(
        [
            upstream_toml("llm", llm.base_url),
            upstream_toml("impatient", llm.base_url, timeout_seconds=0.4),
            routes_toml(),
            RATES.toml(MODEL, upstream_model="qwen3:8b"),
            RATES.toml("impatient", upstream="impatient", upstream_model="qwen3:8b"),
        ]
    )


@pytest.fixture(scope="module")
def box(llm: LlmUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmBox]:
    folder = tmp_path_factory.mktemp("streams")
    with LlmBox(folder / "instance", config(llm)) as made:
        yield made


@pytest.fixture
def payer(box: LlmBox) -> Payer:
    return box.payer(GRANTED)


# What a server may do


@dataclass(frozen=True)
class Case:
    """What the upstream sends, and what that is worth. `sent` and `made` are the tokens of a usage
    that counts; where they are None, the estimate does. `text` is all that was said."""

    play: Play
    text: str = "Hello"
    sent: int | None = None
    made: int | None = None
    free: bool = False
    broke: bool = False
    done: int = 1
    more: dict[str, object] = field(default_factory=dict)  # of the request

    @property
    def tokens(self) -> tuple[Fraction, int]:
        """Of the input and of the output."""
        guess = ceil(Fraction(len(self.text.encode()), 4))
        sent = SENT if self.sent is None else Fraction(self.sent)
        return sent, guess if self.made is None else self.made

    @property
    def estimated(self) -> bool:
        return self.sent is None or self.made is None


def case(*pieces: bytes, ending: str = "whole", **more: Any) -> Case:
    return Case(Play(pieces, ending=ending), **more)


def counts(*pieces: bytes, ending: str = "whole", **more: Any) -> Case:
    """One whose usage counts: of 11 and 23 tokens."""
    return case(*pieces, ending=ending, sent=11, made=23, **more)


def free(*pieces: bytes, ending: str = "whole", **more: Any) -> Case:
    return case(*pieces, ending=ending, text="", free=True, **more)


def broken(*pieces: bytes, ending: str = "close", **more: Any) -> Case:
    return case(*pieces, ending=ending, broke=True, done=0, **more)


def cut_up(size: int, *pieces: bytes) -> list[bytes]:
    """The same bytes in pieces of another size."""
    everything = b"".join(pieces)
    return [everything[i : i + size] for i in range(0, len(everything), size)]


def changed(old: bytes, new: bytes) -> list[bytes]:
    """The good stream with other bytes in it."""
    return [piece.replace(old, new) for piece in GOOD]


def half(escape: str) -> bytes:
    """An event that says half a character."""
    return event(said("HALF")).replace(b"HALF", escape.encode())


def call(index: int, arguments: str, **more: object) -> dict[str, Any]:
    return said(tool_calls=[{"index": index, "function": {"arguments": arguments, **more}}])


HELLO = [event(said(role="assistant")), event(said("Hel")), event(said("lo"))]
USAGE = event(counted())
GOOD = [*HELLO, USAGE, DONE]
BOM = b"\xef\xbb\xbf"
PARTS = "Grüße, 世界 🙂 — a long one"
ERROR = event({"error": {"message": "overloaded"}})
VLLM_ERROR = event({"object": "error", "message": "overloaded", "type": "X", "code": 500})
NOT_JSON = b'{"index": 0, "delta": {"content": "Hello"}, "logprobs": NaN, "x": 1e400}'
WRONG = (-1, 1.0, 11.5, "11", True, 10**13, 10**40, None, [11], {"tokens": 11})

CASES = {
    "usage in the last chunk": counts(*GOOD),
    "usage in the last chunk, with choices": counts(
        *HELLO, event({**said(""), **usage(11, 23)}), DONE
    ),
    "usage in every chunk": counts(
        event({**said(role="assistant"), **usage(11, 0)}),
        event({**said("Hel"), **usage(11, 9)}),
        event({**said("lo"), **usage(11, 23)}),
        DONE,
    ),
    "usage in every chunk and in one of its own": counts(
        event({**said("Hello"), **usage(11, 9)}), USAGE, DONE
    ),
    "usage null in every chunk but the last": counts(
        event({**said("Hello"), "usage": None}), USAGE, DONE
    ),
    "usage missing": case(*HELLO, DONE),
    "usage of zero tokens": case(*HELLO, event(counted(0, 0)), DONE, sent=0, made=0),
    "more usage than was set aside": case(
        *HELLO, event(counted(11, 999_999)), DONE, sent=11, made=999_999
    ),
    "only the output counted": case(
        *HELLO, event({**counted(), "usage": {"completion_tokens": 23}}), DONE, made=23
    ),
    "only the input counted": case(
        *HELLO, event({**counted(), "usage": {"prompt_tokens": 11}}), DONE, sent=11
    ),
    "usage that is wrong of the input": case(*HELLO, event(counted(-1, 23)), DONE, made=23),
    "usage of half a character": case(
        *HELLO, event({**counted(), "usage": {"prompt_tokens": 11, "x": "\ud83d"}}), DONE, sent=11
    ),
    "usage that is a list": case(*HELLO, event({**counted(), "usage": [11, 23]}), DONE),
    "usage that is a number": case(*HELLO, event({**counted(), "usage": 34}), DONE),
    "usage that is empty": case(*HELLO, event({**counted(), "usage": {}}), DONE),
    **{
        f"usage of {json.dumps(wrong)[:20]} tokens": case(
            *HELLO, event(counted(wrong, wrong)), DONE
        )
        for wrong in WRONG
    },
    "two ends": counts(*GOOD, DONE),
    "no end": counts(*HELLO, USAGE, done=0),
    "no end, no usage": case(*HELLO, done=0),
    "an end without its empty line": counts(*HELLO, USAGE, b"data: [DONE]"),
    "an end and a space, without its empty line": counts(*HELLO, USAGE, b"data: [DONE] \n"),
    "a last event without its empty line": counts(*HELLO, event(counted(), end=b"\n"), done=0),
    "a last event without its line's end": counts(*HELLO, event(counted(), end=b""), done=0),
    "something after the end": counts(*GOOD, event(said(" there")), event(counted(99, 99))),
    "CRLF": counts(*changed(b"\n", b"\r\n")),
    "CR": counts(*changed(b"\n", b"\r")),
    "CRLF, a byte at a time": counts(*cut_up(1, *changed(b"\n", b"\r\n"))),
    "a byte at a time": counts(*cut_up(1, *GOOD)),
    "seven bytes at a time": counts(*cut_up(7, *GOOD)),
    "all at once": counts(b"".join(GOOD)),
    "characters cut in two": case(
        *cut_up(3, b"data: " + json.dumps(said(PARTS), ensure_ascii=False).encode(), b"\n\n", DONE),
        text=PARTS,
    ),
    "a character told in halves, an event each": counts(
        half("\\ud83d"), half("\\ude42"), USAGE, DONE, text="🙂"
    ),
    "a character told in halves, and no usage": case(
        *[half("\\ud83d"), half("\\ude42")] * 3, DONE, text="🙂🙂🙂"
    ),
    "an event of a mebibyte": case(event(said("x" * MIB)), DONE, text="x" * MIB),
    "comments": counts(b": hello\n\n", b": one\n: two\n\n", *HELLO, b": bye\n\n", USAGE, DONE),
    "comments within events": counts(b": a\n" + HELLO[1], b": b\n" + HELLO[2], USAGE, DONE),
    "names, ids and times to retry": counts(
        b"retry: 5000\n\n",
        b"event: message\nid: 1\n" + HELLO[1],
        b"id: 2\nretry: 7\n" + HELLO[2],
        USAGE,
        DONE,
    ),
    "no space after the colon": counts(*changed(b"data: ", b"data:")),
    "data over several lines": counts(
        *(
            b"data: " + json.dumps(value, indent=1).replace("\n", "\ndata: ").encode() + b"\n\n"
            for value in (said("Hel"), said("lo"), counted())
        ),
        DONE,
    ),
    "a byte order mark": counts(BOM + HELLO[1], HELLO[2], USAGE, DONE),
    "a byte order mark, a byte at a time": counts(
        *cut_up(1, BOM + HELLO[1], HELLO[2], USAGE, DONE)
    ),
    "empty lines": counts(b"\n\n\r\n", b"\n", *HELLO, USAGE, DONE),
    "data that is not JSON": case(b"data: hello\n\n", *HELLO, DONE),
    "data that is not an object": case(b"data: [1]\n\n", *HELLO, DONE),
    "numbers that JSON does not have": case(
        b'data: {"model": "qwen3:8b", "choices": [' + NOT_JSON + b"]}\n\n", DONE
    ),
    "errors that are none": case(
        *(event({**said(text), "error": none}) for text, none in (("Hel", ""), ("lo", {}))),
        event({**said(""), "error": None}),
        DONE,
    ),
    "an error in the middle": case(*HELLO, ERROR, DONE),
    "an error that counts": counts(
        *HELLO, event({"error": {"message": "overloaded"}, **usage(11, 23)}), DONE
    ),
    "an error in the middle, and no more": broken(*HELLO, ERROR),
    "an error in vLLM's shape in the middle": case(*HELLO, VLLM_ERROR, DONE),
    "an error at first": free(ERROR, DONE),
    "an error at first, with usage": free(ERROR, USAGE, DONE),
    "an error of a string at first": free(event({"error": "overloaded"}), done=0),
    "an error in vLLM's shape at first": free(VLLM_ERROR, DONE),
    "broken off in the middle of a line": broken(*HELLO, event(said(" there"))[:-20]),
    "broken off before an event's empty line": broken(*HELLO, event(said(" there"))[:-1]),
    "reset after content": broken(*HELLO, ending="reset"),
    "broken off after usage": broken(*HELLO, USAGE, sent=11, made=23),
    "broken off after the end": counts(*GOOD, ending="close"),
    "broken off before content": free(HELLO[0], ending="close", broke=True, done=0),
    "broken off before content, but after usage": free(
        event({**said(role="assistant"), **usage(11, 1)}), ending="close", broke=True, done=0
    ),
    "ended before content": free(HELLO[0], DONE),
    "no event at all": free(done=0),
    "the end alone": free(DONE),
    "half an event alone": free(HELLO[1][:30], done=0),
    "usage alone": case(event(counted(11, 0)), DONE, text="", sent=11, made=0),
    "the arguments of tools": case(
        event(call(0, "", name="f")),
        event(call(0, '{"city":')),
        event(call(1, '"Ulm"}')),
        DONE,
        text='{"city":"Ulm"}',
    ),
    "reasoning": case(
        event(said(reasoning_content="Hm, ")), event(said("Hello")), DONE, text="Hm, Hello"
    ),
    "reasoning that is told under two names": case(
        event(said(reasoning_content="Hm, ", reasoning="Hm, ")), DONE, text="Hm, "
    ),
    "a refusal": case(event(said(refusal="I will not.")), DONE, text="I will not."),
    "three choices": case(
        *(event(said(word, index)) for word in ("Hel", "lo") for index in range(3)),
        DONE,
        text="HelHelHellololo",
        more={"n": 3},
    ),
}


def asked(this: Case, llm: LlmUpstream, asks: bool) -> dict[str, Any]:
    options = {"stream_options": {"include_usage": True}} if asks else {}
    return chat(stream=True, play=llm.stage(this.play), **options, **this.more)


def held_for(this: Case) -> int:
    return RATES.price(RATES.most * int(str(this.more.get("n", 1))), SENT)


@pytest.mark.parametrize("asks", [False, True], ids=["no usage asked for", "usage asked for"])
@pytest.mark.parametrize("name", CASES)
def test_a_stream_costs_what_was_delivered_whatever_the_upstream_does(
    box: LlmBox, llm: LlmUpstream, payer: Payer, name: str, asks: bool
) -> None:
    this = CASES[name]
    told = box.tell(payer, asked(this, llm, asks))
    assert told.answer.status == 200
    assert told.answer.headers["X-Credits-Held"] == str(held_for(this))
    assert "X-Credits-Charged" not in told.answer.headers
    charged = check_record(this, told)
    assert box.standing(payer) == (GRANTED - charged, 0)
    check_what_was_heard(this, told, asks, charged)


def check_record(this: Case, told: Told) -> int:
    """The call's record says what it was; the credits it cost."""
    held = held_for(this)
    sent, made = this.tokens
    price = RATES.price(made, sent)
    record = told.record
    assert (record["model"], record["held"], record["route"]) == (MODEL, held, CHAT)
    assert record["upstream_status"] == 200
    if this.free:
        assert (record["status"], record["captured"], record["cost_usd"]) == ("voided", 0, None)
        return 0
    charged = min(price, held)
    assert (record["status"], record["captured"]) == ("captured", charged)
    assert (record["price"], record["estimated"]) == (price, this.estimated)
    assert (record["input_tokens"], record["output_tokens"]) == (ceil(sent), made)
    assert Fraction(record["cost_usd"]) == RATES.cost(made, ceil(sent))
    return charged


def check_what_was_heard(this: Case, told: Told, asks: bool, charged: int) -> None:
    heard = told.heard
    assert told.broke == this.broke
    if this.broke:
        check_apology(told, "provider_error")
    assert heard.done == this.done
    assert heard.text == this.text
    assert this.done == 0 or heard.events[-1][1] == "[DONE]"
    told_errors = sum(b"overloaded" in piece for piece in this.play.pieces if type(piece) is bytes)
    assert sum(bool(value.get("error")) for value in heard.values) == told_errors + this.broke
    said_by_model = [value for value in heard.values if "error" not in value]
    assert {value["model"] for value in said_by_model if "model" in value} <= {MODEL}
    final = [value for value in heard.values if "farebox" in value]
    if not asks or this.broke or this.free:
        assert final == []
    if not asks:
        assert not [
            value for value in heard.values if "usage" in value or not value.get("choices", 1)
        ]
    elif not this.broke and not this.free:
        check_final(this, final, charged)
        assert heard.values[-1] == final[0]


def check_apology(told: Told, code: str) -> None:
    """The last event says that the rest will not come, as an error of OpenAI's shape."""
    last = told.heard.values[-1]
    assert last["request_id"] == told.answer.request_id
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert (last["error"]["code"], last["error"]["type"]) == (code, "api_error")


def check_final(this: Case, final: list[Any], charged: int) -> None:
    """The last chunk says what was counted and what was charged."""
    [value] = final
    assert value["choices"] == []
    assert value["farebox"] == {
        "credits_charged": charged,
        "credits_remaining": GRANTED - charged,
    }
    sent, made = this.tokens
    assert value["usage"]["prompt_tokens"] == ceil(sent)
    assert value["usage"]["completion_tokens"] == made


def test_the_upstreams_signs_of_life_are_passed_on(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    play = Play([b": working\n\n", Wait("life"), b"retry: 9\n\n", *HELLO, USAGE, DONE])
    with box.opened(payer, chat(stream=True, play=llm.stage(play))) as (_, body):
        arrived = next(body) + next(body)
        assert Heard.of(arrived) == Heard(1, [])
        llm.gate("life").let()
        assert Heard.of(arrived + b"".join(body)).comments == 2


# How bytes become events; in what pieces the network brings them cannot be told to it.

fragments = st.sampled_from(
    [b"data: a", b"data:b", b"data", b"data:  c ", b": d", b":", b"event: e", b"event", b"id: 1",
     b"x", BOM, b"\xc3", b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(fragments, max_size=20).map(b"".join), st.lists(st.integers(0, 60), max_size=8))
def test_events_are_the_same_however_their_bytes_are_cut(stream: bytes, cuts: list[int]) -> None:
    parser = sse.Parser()
    marks = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    found = [e for a, b in itertools.pairwise(marks) for e in parser.feed(stream[a:b])]
    assert [tuple(e) for e in (*found, *parser.finish())] == events_of(stream)


def events_of(stream: bytes) -> list[tuple[bytes, bytes | None]]:
    """What stands in a whole stream, as the standard reads it, and its unended last event."""
    found: list[tuple[bytes, bytes | None]] = []
    block: list[bytes] = []
    for line in [*re.split(rb"\r\n|\n|\r", stream.removeprefix(BOM)), b""]:
        if line:
            block.append(line)
            continue
        fields = [(name, value.removeprefix(b" ")) for name, _, value in map(_parted, block)]
        data = [value for name, value in fields if name == b"data"]
        names = [value for name, value in fields if name == b"event"]
        if block:
            found.append((names[-1] if names else b"", b"\n".join(data) if data else None))
        block = []
    return found


def _parted(line: bytes) -> tuple[bytes, bytes, bytes]:
    return line.partition(b":")


def test_usage_of_every_chunk_is_shown_to_who_asked_for_usage(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    told = box.tell(payer, asked(CASES["usage in every chunk"], llm, True))
    shown = [value["usage"]["completion_tokens"] for value in told.heard.values]
    assert shown == [0, 9, 23, 23]


def test_what_an_event_says_beside_its_model_and_usage_arrives_byte_for_byte(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    odd = b'"x":[1e400,  9223372036854775808, "\\u00e9\\/", -0.0],"y":{"model":"qwen3:8b"},"z":null'
    first = b'{"model":"qwen3:8b","choices":[ {"delta":{"content":"Hello"}} ],' + odd + b"}"
    last = b'{"usage":{"prompt_tokens":11,"completion_tokens":23,"odd":  1e400},"choices":[],' + odd
    play = Play([b"event: x\ndata: " + first + b"\n\n", b"data: " + last + b"}\n\n", DONE])
    told = box.tell(payer, asked(Case(play), llm, True))
    expected = b"event: x\ndata: " + first.replace(b"qwen3:8b", MODEL.encode(), 1) + b"\n\n"
    assert told.answer.body.startswith(expected)
    assert odd in told.answer.body.removeprefix(expected)
    assert b'"odd":  1e400' in told.answer.body


def test_an_error_within_a_stream_has_the_shape_of_openais_and_no_secret(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    secrets = [
        SECRET,
        llm.base_url,
        f"127.0.0.1:{llm.port}",
        "qwen3:8b",
        ORGANISATION,
        "sk-abc***xyz9",
    ]
    words = f"no {' '.join(secrets)}; see {llm.base_url}/chat/completions"
    errors: list[dict[str, Any]] = [
        {"error": {"message": words, "metadata": {SECRET: [words]}}, "trace": [words]},
        {"error": words, "provider": words},
        {"object": "error", "message": words, "code": 404},
        {"error": {"message": [words]}},
        {"error": {"message": "cut \ud83d"}, "detail": words},
    ]
    pieces = [HELLO[1], *map(event, errors), b"data: " + words.encode() + b"\n\n", DONE]
    told = box.tell(payer, asked(Case(Play(pieces)), llm, False))
    body = told.answer.body.decode()
    for secret in secrets:
        assert secret not in body
    assert "see …/chat/completions" in body
    for value in told.heard.values[1:]:
        assert {"message", "type", "param", "code"} <= set(value["error"])
        assert isinstance(value["error"]["message"], str)
    assert told.record["captured"] == RATES.price(1, SENT)


@pytest.mark.parametrize("first", [[], HELLO], ids=["at first", "after content"])
def test_an_event_without_end_breaks_the_stream_off(
    box: LlmBox, llm: LlmUpstream, payer: Payer, first: list[bytes]
) -> None:
    pieces = [b"data: ", *[b"x" * MIB] * 8, b"x" * 100_000]
    endless = broken(*first, *pieces, ending="whole")
    this = replace(endless, text="Hello" if first else "", free=not first)
    told = box.tell(payer, asked(this, llm, True))
    check_record(this, told)
    if first:
        check_what_was_heard(this, told, True, 0)
    else:
        assert (told.answer.status, told.broke) == (200, True)


def test_a_stream_may_be_as_large_as_it_likes_in_events_that_are_not(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    this = case(*[event(said("x" * MIB))] * 9, DONE, text="x" * MIB * 9)
    told = box.tell(payer, asked(this, llm, False))
    check_record(this, told)
    assert (told.broke, told.heard.done) == (False, 1)


def test_a_large_event_in_small_pieces_takes_time_in_proportion() -> None:
    """Four times as much takes about four times as long; gathered anew with each piece it would
    take sixteen times."""

    def seconds(mebibytes: int) -> float:
        pieces = [b"data: ", *[b"x" * 128] * (mebibytes * MIB // 128), b"\n\n"]
        best = 1e9
        for _ in range(3):
            parser, began = sse.Parser(), time.process_time()
            for piece in pieces:
                found = parser.feed(piece)
            best = min(best, time.process_time() - began)
            assert len(found[0].data or b"") == mebibytes * MIB
        return best

    assert seconds(4) < 9 * seconds(1)


# What comes in place of a stream


FAILURES = {
    "a 429": (whole({"error": {"message": "slow down"}}, 429, ("Retry-After", "7")), 429, None),
    "a 400": (whole({"error": {"message": "too long", "code": "x"}}, 400), 400, "x"),
    "a 404 of a string": (whole({"error": "model not found"}, 404), 404, None),
    "a 422 with a detail": (whole({"detail": "no such field"}, 422), 422, None),
    "a 400 of no JSON": (Play([b"<h1>no</h1>"], 400, "text/html"), 400, None),
    "a 400 of events": (Play([ERROR], 400), 400, None),
    "a 401": (whole({"error": {"message": SECRET}}, 401), 502, "provider_error"),
    "a 403": (whole({"error": {"message": SECRET}}, 403), 502, "provider_error"),
    "a 500": (whole({"error": {"message": "oh"}}, 500), 502, "provider_error"),
    "a 503": (whole({"error": {"message": "oh"}}, 503), 502, "provider_error"),
    "a redirect": (whole({}, 307, ("Location", "/elsewhere")), 502, "provider_error"),
    "a 200 of no JSON": (Play([b"<h1>yes</h1>"], 200, "text/html"), 502, "provider_error"),
    "a 200 of nothing": (Play([], 200, "application/json"), 502, "provider_error"),
    "a 200 with an error": (whole({"error": {"message": "oh"}}), 502, "provider_error"),
    "a 200 with vLLM's error": (whole({"object": "error", "message": "oh"}), 502, "provider_error"),
    "a 200 cut": (Play([b"{"], 200, "application/json", ending="close"), 502, "provider_error"),
    "events that are packed": (
        Play([gzip.compress(b"".join(GOOD))], headers=(("Content-Encoding", "gzip"),)),
        502,
        "provider_error",
    ),
    "a head, and then the end of the connection": (Play(ending="close"), 502, "provider_error"),
    "a head, and then a reset": (Play(ending="reset"), 502, "provider_error"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_stream_that_never_began_is_an_error_and_free(
    box: LlmBox, llm: LlmUpstream, payer: Payer, name: str
) -> None:
    play, status, code = FAILURES[name]
    told = box.tell(payer, chat(stream=True, play=llm.stage(play)))
    assert told.answer.status == status
    error = told.answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert (error["code"], isinstance(error["message"], str)) == (code, True)
    assert SECRET.encode() not in told.answer.body
    assert told.answer.headers.get("Retry-After") == ("7" if status == 429 else None)
    assert told.answer.headers["X-Credits-Charged"] == "0"
    assert told.answer.headers["X-Credits-Remaining"] == str(GRANTED)
    assert status != 502 or told.answer.json()["refunded"] is True
    assert (told.record["status"], told.record["captured"]) == ("voided", 0)
    assert box.standing(payer) == (GRANTED, 0)


def test_a_whole_answer_to_who_wanted_a_stream_is_charged_as_one(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    told = box.tell(payer, chat(stream=True))
    charged = RATES.price(3, 7)
    assert told.answer.headers["Content-Type"] == "application/json"
    assert told.answer.headers["X-Credits-Charged"] == str(charged)
    assert (told.answer.json()["model"], told.record["captured"]) == (MODEL, charged)


def test_a_stream_for_who_did_not_want_one_is_an_error_and_free(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    told = box.tell(payer, chat(play=llm.stage(Play(GOOD))))
    assert (told.answer.status, told.record["captured"]) == (502, 0)


@pytest.mark.parametrize("where", ["before the head", "after the head"])
def test_an_upstream_that_stays_silent_from_the_start_is_a_timeout_and_free(
    box: LlmBox, llm: LlmUpstream, payer: Payer, where: str
) -> None:
    gate = f"never {where}"
    play = Play(before_head=gate) if where == "before the head" else Play([Wait(gate)])
    told = box.tell(payer, chat(stream=True, play=llm.stage(play), model="impatient"))
    assert (told.answer.status, told.answer.code) == (504, "provider_timeout")
    assert (told.record["status"], told.record["captured"]) == ("voided", 0)


def test_an_upstream_that_falls_silent_is_charged_for_what_it_said(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    play = Play([*HELLO, Wait("never after content")])
    told = box.tell(payer, chat(stream=True, play=llm.stage(play), model="impatient"))
    assert (told.heard.text, told.broke) == ("Hello", True)
    check_apology(told, "provider_timeout")
    assert told.record["captured"] == RATES.price(2, SENT)
    assert told.record["estimated"] is True


def test_a_completion_streams_too(box: LlmBox, llm: LlmUpstream, payer: Payer) -> None:
    def text(words: str) -> bytes:
        return event({"model": "qwen3:8b", "choices": [{"index": 0, "text": words}]})

    play = Play([text("Hello"), text(" there"), DONE])
    asks = {"model": MODEL, "prompt": "Say", "stream": True, "play": llm.stage(play)}
    told = box.tell(payer, asks, COMPLETIONS)
    assert (told.heard.text, told.heard.done) == ("Hello there", 1)
    assert told.record["captured"] == RATES.price(3, Fraction(len("Say"), 3))


# Silence, and clients that leave


@pytest.mark.parametrize("said_before", [0, 2], ids=["before the first byte", "after content"])
def test_a_silence_is_bridged_by_comments(
    box: LlmBox, llm: LlmUpstream, payer: Payer, monkeypatch: pytest.MonkeyPatch, said_before: int
) -> None:
    monkeypatch.setattr(course.ModelCourse, "beat_seconds", 0.05)
    gate = f"silence {said_before}"
    play = Play([*HELLO[:said_before], Wait(gate), *HELLO[said_before:], USAGE, DONE])
    with box.opened(payer, chat(stream=True, play=llm.stage(play))) as (answer, body):
        assert answer.headers["Content-Type"].startswith(EVENTS)
        arrived = b""
        while arrived.count(b": still there\n\n") < 3:
            arrived += next(body)
        assert Heard.of(arrived).text == ("Hel" if said_before else "")
        llm.gate(gate).let()
        arrived += b"".join(body)
    heard = Heard.of(arrived)
    assert (heard.text, heard.done, heard.comments >= 3) == ("Hello", 1, True)
    assert box.call(payer.key, answer)["captured"] == RATES.price(23, 11)
    assert box.standing(payer)[1] == 0


def test_who_leaves_pays_for_what_was_delivered_and_no_more(box: LlmBox, llm: LlmUpstream) -> None:
    words = [*["One ", "and two, ", "and three, and four. "] * 3, "x" * 40_000]
    pieces = [HELLO[0], *(event(said(word)) for word in words), DONE]
    name = llm.stage(Play([pieces[0], *(p for piece in pieces[1:] for p in (Wait("k"), piece))]))
    llm.gate("k").open()
    paid = []  # in no order: how much was delivered to who left is between the two bounds below
    for reads in itertools.count():
        payer = box.payer(GRANTED)
        with box.opened(payer, chat(stream=True, play=name)) as (answer, body):
            arrived = list(itertools.islice(body, reads))
            ended = len(arrived) < reads
        record = box.call(payer.key, answer)
        assert box.standing(payer) == (GRANTED - record["captured"], 0)
        if ended:
            break
        # Whoever asked for one more piece has had those before it. Of one that was not sent whole,
        # no more than its bytes can have been said.
        had = b"".join(arrived[:-1])
        assert estimate(text_in(had)) <= record["captured"] <= estimate(len(had))
        assert record["status"] == ("captured" if record["captured"] else "voided")
        paid.append(record["captured"])
    assert record["captured"] == estimate(len("".join(words)))
    assert (paid[0], paid[-1] > 2 * RATES.request) == (0, True)


def text_in(stream: bytes) -> int:
    """The bytes of what was said in whole events."""
    whole_events = stream.rpartition(b"\n\n")[0]
    return len(Heard.of(whole_events + b"\n\n" if whole_events else b"").text.encode())


def estimate(size: int) -> int:
    return min(RATES.price(ceil(Fraction(size, 4)), SENT), HELD) if size else 0


# Idempotency-Key, the operator's key


def test_a_repeat_of_a_stream_gets_it_byte_for_byte_and_free(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    request = asked(CASES["usage in the last chunk"], llm, True)
    first = box.tell(payer, request, Idempotency_Key="again")
    again = box.tell(payer, request, Idempotency_Key="again")
    assert again.answer.body == first.answer.body
    charged = RATES.price(23, 11)
    assert again.heard.values[-1]["farebox"] == {
        "credits_charged": charged,
        "credits_remaining": GRANTED - charged,
    }
    assert again.answer.headers["Idempotent-Replayed"] == "true"
    assert again.answer.headers["Content-Type"] == first.answer.headers["Content-Type"]
    assert again.answer.headers["X-Credits-Charged"] == "0"
    assert again.answer.headers["X-Credits-Remaining"] == str(GRANTED - charged)
    assert len(llm.heard(request["play"])) == 1
    assert box.standing(payer) == (GRANTED - charged, 0)


@pytest.mark.parametrize(
    "name", ["reset after content", "broken off after usage", "more than can be kept"]
)
def test_a_repeat_of_a_stream_that_was_not_kept_is_refused(
    box: LlmBox, llm: LlmUpstream, payer: Payer, name: str
) -> None:
    large = case(*[event(said("x" * 300_000))] * 4, DONE)
    request = asked(large if name == "more than can be kept" else CASES[name], llm, False)
    first = box.tell(payer, request, Idempotency_Key="again")
    again = box.tell(payer, request, Idempotency_Key="again")
    assert (again.answer.status, again.answer.code) == (409, "idempotency_replay_unavailable")
    assert len(llm.heard(request["play"])) == 1
    assert first.record["captured"] > 0
    assert box.standing(payer) == (GRANTED - first.record["captured"], 0)


@pytest.mark.parametrize("name", ["an error at first", "broken off before content"])
def test_a_stream_that_was_free_may_be_tried_again_under_its_key(
    box: LlmBox, llm: LlmUpstream, payer: Payer, name: str
) -> None:
    request = asked(CASES[name], llm, False)
    for _ in range(2):
        told = box.tell(payer, request, Idempotency_Key="again")
        assert (told.answer.status, told.record["captured"]) == (200, 0)
    assert len(llm.heard(request["play"])) == 2


def test_the_operators_key_is_served_and_pays_nothing(box: LlmBox, llm: LlmUpstream) -> None:
    told = box.tell(OPERATOR_KEY, asked(CASES["usage in the last chunk"], llm, True))
    record = told.record
    assert (record["payer"], record["captured"], record["held"]) == ("operator", 0, 0)
    assert (record["price"], record["status"]) == (RATES.price(23, 11), "captured")
    assert (record["input_tokens"], record["output_tokens"]) == (11, 23)
    farebox = told.heard.values[-1]["farebox"]
    assert farebox == {"credits_charged": 0, "credits_remaining": None}
    assert told.answer.headers["X-Credits-Held"] == "0"


# On the real server


@pytest.fixture(scope="module")
def server(llm: LlmUpstream) -> Iterator[Farebox]:
    with Farebox(config(llm), workers=1) as running:
        yield running


@dataclass
class Silence:
    """A stream that is silent, in a thread: what comes, and after how long."""

    key: str
    gate: str
    thread: threading.Thread
    body: bytes = b""
    first_beat: float | None = None


@pytest.fixture(scope="module", autouse=True)
def silences(llm: LlmUpstream, server: Farebox) -> Iterator[list[Silence]]:
    """Two streams that are silent all the while the other tests of this file run."""
    found = []
    for number, pieces in enumerate(([], HELLO[:2])):
        gate = f"a real silence {number}"
        name = llm.stage(Play([*pieces, Wait(gate), *HELLO[len(pieces) :], USAGE, DONE]))
        silence = Silence(server.account(GRANTED)[1], gate, threading.Thread())
        silence.thread = threading.Thread(target=listen, args=(server, silence, name), daemon=True)
        silence.thread.start()
        found.append(silence)
    yield found
    for silence in found:
        llm.gate(silence.gate).open()
        silence.thread.join(5)


def listen(server: Farebox, silence: Silence, play: str) -> None:
    started = time.monotonic()
    with open_stream(server, silence.key, chat(stream=True, play=play)) as response:
        while piece := response.read1(65536):
            silence.body += piece
            if silence.first_beat is None and b": still there" in silence.body:
                silence.first_beat = time.monotonic() - started


def test_what_the_upstream_says_arrives_before_it_says_more(
    llm: LlmUpstream, server: Farebox
) -> None:
    _, key = server.account(GRANTED)
    play = llm.stage(
        Play([HELLO[0], Wait("step"), HELLO[1], Wait("step"), *HELLO[2:], USAGE, DONE])
    )
    with open_stream(server, key, chat(stream=True, play=play)) as response:
        assert response.headers["X-Accel-Buffering"] == "no"
        body = b""
        for text in ("", "Hel"):
            while body.count(b"\n\n") < (2 if text else 1):
                body += response.read1(65536)
            assert Heard.of(body).text == text
            llm.gate("step").let()
        body += response.read()
    heard = Heard.of(body)
    assert (heard.text, heard.done) == ("Hello", 1)
    assert server.settled(key) == GRANTED - RATES.price(23, 11)


def test_a_stream_that_broke_off_is_seen_to_be_broken(llm: LlmUpstream, server: Farebox) -> None:
    _, key = server.account(GRANTED)
    play = llm.stage(Play(HELLO, ending="close"))
    with (
        open_stream(server, key, chat(stream=True, play=play)) as response,
        pytest.raises((http.client.IncompleteRead, ConnectionResetError)),
    ):
        response.read()
    assert server.settled(key) == GRANTED - RATES.price(2, SENT)


def test_an_upstream_that_is_silent_for_fifteen_seconds_is_spoken_for(
    llm: LlmUpstream, server: Farebox, silences: list[Silence]
) -> None:
    """The last test of this file, so that most of the time has passed with the others."""
    for silence in silences:
        until(lambda silence=silence: silence.first_beat, 25, "a comment in the silence")  # type: ignore[misc]
        assert silence.first_beat is not None
        assert 14.5 < silence.first_beat < 22
        llm.gate(silence.gate).let()
        silence.thread.join(10)
        heard = Heard.of(silence.body)
        assert (heard.text, heard.done) == ("Hello", 1)
        assert server.settled(silence.key) == GRANTED - RATES.price(23, 11)


@contextlib.contextmanager
def open_stream(server: Farebox, key: str, value: object) -> Iterator[http.client.HTTPResponse]:
    """An answer read as it comes, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", CHAT, json.dumps(value), headers)
        yield connection.getresponse()
    finally:
        connection.close()
