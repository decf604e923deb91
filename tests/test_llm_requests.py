"""A request to a language model: what is set aside for it, what is sent on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import STRANGERS_KEY, Payer
from llm_double import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MODEL,
    RATES,
    SECRET,
    LlmBox,
    LlmUpstream,
    Rates,
    chat,
    routes_toml,
    upstream_toml,
    whole,
)
from people import cheaply, joined, minted, person
from server import OPERATOR_KEY, Answer

from core.adapters.llm import adapter

GRANTED = 1_000_000
MIB = 1024 * 1024
SCOPED = "/v1/scoped/chat"
SLASHED = "meta/llama-3.1:8b"

# Each is called as its key says.
MODELS = {
    MODEL: RATES,
    "dear": Rates(1000, 0, "1500", "3000.5", 1000),
    "cheap": Rates(0, 0, "0.000000000001", "0", 10_000_000),
    "flat": Rates(8, 500, "0", "0", 4096),
    "by-input": Rates(2, 0, "0", "999.999999999999", 50),
    "included": Rates(3, 500, "4", "0.06", 4096),
    "tiny": Rates(0, 0, "1000", "0", 1),
    "extreme": Rates(10**9, 0, "1000000", "1000000", 10_000_000),
    SLASHED: RATES,
    "new-style": RATES,
    "deaf": RATES,
    "deaf-stream": RATES,
}
FIELDS = {"new-style": "max_completion_tokens"}


@pytest.fixture(scope="module")
def llm() -> Iterator[LlmUpstream]:
    with LlmUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def box(llm: LlmUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmBox]:
    scoped = (
        f'[[routes]]\npath = "{SCOPED}"\nupstream_path = "{CHAT}"\nmethods = ["POST"]\n'
        'upstream = "llm"\nadapter = "chat"\nscope = "llm:use"\n'
    )
    plain = '[[routes]]\npath = "/v1/plain"\nmethods = ["POST"]\nupstream = "llm"\ncredits = 1\n'
    config = [upstream_toml("llm", llm.base_url + "/"), routes_toml(), scoped, plain]
    for name, rates in MODELS.items():
        field = FIELDS.get(name, "max_tokens")
        config.append(rates.toml(name, upstream_model=f"up/{name}", max_tokens_field=field))
    folder = tmp_path_factory.mktemp("requests")
    with LlmBox(folder / "instance", "\n".join(config)) as made:
        yield made


@pytest.fixture
def payer(box: LlmBox) -> Payer:
    return box.payer(GRANTED)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    cheaply(monkeypatch)


def sent(llm: LlmUpstream, answer: Answer) -> dict[str, Any]:
    """What the upstream was asked for the call that was answered so."""
    [hit] = [hit for hit in llm.hits() if hit.header("X-Request-Id") == answer.request_id]
    found: dict[str, Any] = json.loads(hit.body)
    return found


# What is set aside, and the most of an answer that may cost so much


def read_by_the_model(value: Any) -> int:
    """Bytes of strings; files that come along are none."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, list):
        return sum(map(read_by_the_model, value))
    if not isinstance(value, dict):
        return 0
    if value.get("type") == "image_url" and value["image_url"]["url"].startswith("data:"):
        return len("image_url") + read_by_the_model(value["image_url"].get("detail"))
    return sum(map(read_by_the_model, value.values()))


def limit_of(body: Mapping[str, Any], rates: Rates) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return min(int(body[name]), rates.most)
    return rates.most


def names_limit(body: Mapping[str, Any]) -> bool:
    return any(body.get(name) is not None for name in ("max_completion_tokens", "max_tokens"))


def most_within(rates: Rates, choices: int, size: Fraction, credits: int) -> int:
    """The most tokens for each choice that cost no more than `credits`; 0 when none do."""
    low, high = 0, rates.most
    while low < high:
        middle = (low + high + 1) // 2
        if rates.price(middle * choices, size) <= credits:
            low = middle
        else:
            high = middle - 1
    return low


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
url = st.one_of(text.map("data:image/png;base64,".__add__), text.map("https://x/".__add__))
image = st.builds(
    lambda url, detail: {"type": "image_url", "image_url": {"url": url, **detail}},
    url,
    st.sampled_from([{}, {"detail": "high"}, {"detail": None}]),
)
part = st.one_of(
    text.map(lambda words: {"type": "text", "text": words}),
    image,
    text.map(
        lambda words: {"type": "input_audio", "input_audio": {"data": words, "format": "mp3"}}
    ),
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool"])},
    optional={
        "content": st.one_of(
            text, text.map("data:".__add__), st.lists(part, max_size=3), st.none()
        ),
        "name": text,
        "weight": st.one_of(st.integers(), st.booleans()),
    },
)
tool = st.recursive(
    st.one_of(text, st.integers(), st.none(), st.booleans()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abcdef"), inner, max_size=3)
    ),
    max_leaves=5,
)
tokens = st.one_of(st.none(), st.integers(1, 20), st.integers(1, 10**9), st.just(10**30))
request = st.fixed_dictionaries(
    {"model": st.sampled_from(list(MODELS)), "messages": st.lists(message, max_size=3)},
    optional={
        "tools": st.lists(tool, max_size=2),
        "n": st.one_of(st.none(), st.integers(1, 5), st.just(128)),
        "max_tokens": tokens,
        "max_completion_tokens": tokens,
    },
)


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    body=request,
    credits=st.one_of(st.integers(0, 100), st.integers(0, 10**6), st.just(10**15)),
    key_limit=st.one_of(st.none(), st.integers(1, 100), st.integers(1, 10**6)),
)
def test_what_is_set_aside_and_the_limit_that_is_sent_are_the_contracts(
    box: LlmBox, llm: LlmUpstream, body: dict[str, Any], credits: int, key_limit: int | None
) -> None:
    rates = MODELS[body["model"]]
    size = Fraction(read_by_the_model([body["messages"], body.get("tools")]), 3)
    choices = body.get("n") or 1
    each = limit_of(body, rates)
    hold = rates.price(each * choices, size)
    spendable = min(credits, credits if key_limit is None else key_limit)
    lowered = None
    if hold > spendable and not names_limit(body):
        lowered = most_within(rates, choices, size, spendable) or None
    terms = {} if key_limit is None else {"credit_limit": key_limit, "credit_period": "month"}
    payer = box.payer(credits, **terms)
    told = box.tell(payer, body)
    if lowered is None and hold > spendable:
        if key_limit is not None and hold > key_limit:
            assert (told.answer.status, told.answer.code) == (403, "credit_limit_reached")
            assert told.answer.json()["limit"] == key_limit
        else:
            assert (told.answer.status, told.answer.code) == (402, "insufficient_credits")
            assert (told.answer.json()["required"], told.answer.json()["credits"]) == (
                hold,
                credits,
            )
            assert told.answer.headers["x-should-retry"] == "false"
        assert box.standing(payer) == (credits, 0)
        return
    if lowered is not None:
        each = lowered
        hold = rates.price(each * choices, size)
        assert hold <= spendable
    assert told.answer.status == 200
    assert told.record["held"] == hold
    assert told.answer.headers.get("X-Max-Tokens-Clamped") == (lowered and str(lowered))
    named = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    names = named or [FIELDS.get(body["model"], "max_tokens")]
    limits = {name: min(body.get(name) or each, each) for name in names}
    expected = {**body, **limits, "model": f"up/{body['model']}"}
    assert sent(llm, told.answer) == expected
    charged = min(rates.price(3, 7), hold)
    assert told.record["captured"] == charged
    assert box.standing(payer) == (credits - charged, 0)


@pytest.mark.parametrize("credits", [0, 7, 8])
def test_who_cannot_pay_for_what_was_asked_is_told_the_whole_price_of_it(
    box: LlmBox, credits: int
) -> None:
    """Eight credits are a request's price, but what is read costs a little too."""
    told = box.tell(box.payer(credits), chat())
    size = Fraction(read_by_the_model(chat()["messages"]), 3)
    assert (told.answer.status, told.answer.json()["required"]) == (402, RATES.price(4096, size))
    one_more = box.tell(box.payer(9), chat()).answer
    assert one_more.headers["X-Max-Tokens-Clamped"] == str(most_within(RATES, 1, size, 9))


def test_a_limit_of_the_member_lowers_an_answer_too(box: LlmBox, llm: LlmUpstream) -> None:
    owner = person(box, GRANTED)
    member = joined(box, owner, credit_limit=50, credit_period="month")
    size = Fraction(read_by_the_model(chat()["messages"]), 3)
    for left in (50, 50 - RATES.price(3, 7)):
        answer = box.post(CHAT, member.token, chat())
        most = most_within(RATES, 1, size, left)
        assert answer.headers["X-Max-Tokens-Clamped"] == str(most)
        assert sent(llm, answer)["max_tokens"] == most
    named = box.post(CHAT, member.token, chat(max_tokens=4096))
    assert (named.status, named.code) == (403, "credit_limit_reached")


def test_a_lowered_answer_is_told_so_on_a_stream_and_in_its_repeat(box: LlmBox) -> None:
    payer = box.payer(50)
    request = chat(stream=True)
    first = box.tell(payer, request, Idempotency_Key="k").answer
    again = box.tell(payer, request, Idempotency_Key="k").answer
    assert int(first.headers["X-Max-Tokens-Clamped"]) > 5
    assert again.headers["X-Max-Tokens-Clamped"] == first.headers["X-Max-Tokens-Clamped"]
    assert again.headers["Idempotent-Replayed"] == "true"


def test_the_operators_calls_are_not_lowered(box: LlmBox, llm: LlmUpstream) -> None:
    told = box.tell(OPERATOR_KEY, chat())
    assert "X-Max-Tokens-Clamped" not in told.answer.headers
    assert sent(llm, told.answer)["max_tokens"] == RATES.most
    assert (told.record["captured"], told.record["price"]) == (0, RATES.price(3, 7))


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ("data:text/plain,hello", 21),
        ([{"type": "text", "text": "data:,hello"}], 4 + 11),
        ([{"type": "image_url", "image_url": "data:,x"}], 9),
        ([{"type": "images", "image_url": ["data:,x", "data:,y"]}, "data:,z"], 6 + 7),
        ([{"type": "image_url", "image_url": {"url": "DATA:image/png;base64,AAAA"}}], 9),
        ([{"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}], 4),
        ([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}], 9 + 25),
        ("é🙂", 6),
        (["a", ["b", {"c": ["d"]}]], 3),
        ({"deep": {"deeper": "abc"}}, 3),
    ],
    ids=repr,
)
def test_only_the_data_of_files_is_left_out_of_the_input(
    box: LlmBox, payer: Payer, content: object, size: int
) -> None:
    """Words that begin like a data URL are words, which a model reads."""
    told = box.tell(
        payer, {"model": "by-input", "messages": [{"role": "user", "content": content}]}
    )
    assert told.record["held"] == MODELS["by-input"].price(0, Fraction(size + 4, 3))


@pytest.mark.parametrize(
    ("prompt", "more", "choices", "input_tokens"),
    [
        ("Say hello", {}, 1, Fraction(9, 3)),
        ("", {}, 1, Fraction(0)),
        (["Say", "hello"], {}, 2, Fraction(8, 3)),
        ([1, 2, 3, 4], {}, 1, Fraction(4)),
        ([[1, 2], [3, 4, 5]], {}, 2, Fraction(5)),
        (["Say"], {"n": 3}, 3, Fraction(1)),
        (["Say", "hello"], {"n": 2, "best_of": 5}, 10, Fraction(8, 3)),
        ("Say", {"n": 5, "best_of": 2}, 5, Fraction(1)),
        ("Say", {"n": None, "best_of": None}, 1, Fraction(1)),
        ("Say", {"n_cmpl": 4}, 4, Fraction(1)),
    ],
    ids=repr,
)
def test_each_prompt_of_a_completion_is_an_answer_of_its_own(
    box: LlmBox, llm: LlmUpstream, payer: Payer, prompt: object, more: dict[str, Any], choices: int,
    input_tokens: Fraction,
) -> None:  # fmt: skip
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 10, **more}
    told = box.tell(payer, body, COMPLETIONS)
    assert told.record["held"] == RATES.price(10 * choices, input_tokens)
    assert sent(llm, told.answer) == {**body, "model": f"up/{MODEL}"}


@pytest.mark.parametrize(
    ("given_input", "input_tokens"),
    [
        ("Say hello", Fraction(9, 3)),
        (["Say", "hello"], Fraction(8, 3)),
        ([1, 2, 3], Fraction(3)),
        ([[1, 2], [3, 4, 5]], Fraction(5)),
    ],
    ids=repr,
)
def test_an_embedding_is_held_for_by_its_input_alone(
    box: LlmBox, llm: LlmUpstream, payer: Payer, given_input: object, input_tokens: Fraction
) -> None:
    body = {"model": "by-input", "input": given_input, "dimensions": 8}
    told = box.tell(payer, body, EMBEDDINGS)
    assert told.record["held"] == MODELS["by-input"].price(0, input_tokens)
    assert sent(llm, told.answer) == {**body, "model": "up/by-input"}


def test_an_embedding_that_cannot_be_paid_for_is_refused_and_not_lowered(box: LlmBox) -> None:
    told = box.tell(box.payer(3), {"model": "by-input", "input": "x" * 12}, EMBEDDINGS)
    assert (told.answer.status, told.answer.json()["required"]) == (402, 6)


# What is sent on


def test_what_is_not_ours_is_sent_on_byte_for_byte(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    odd = b'"x":[1e400, 9223372036854775808,  "\\u00e9\\/\\ud83d\\ude42",-0.0,{"a":1,"a":2}]'
    messages = b'[ {"role" :"user","content":"\xf0\x9f\x99\x82\\n", "b":1.10} ]'
    body = b'{"messages":' + messages + b"," + odd + b',"model":"qwen3-8b","max_tokens":7}'
    answer = box.request("POST", CHAT, key=payer.key, body=body)
    assert answer.status == 200
    [hit] = [hit for hit in llm.hits() if hit.header("X-Request-Id") == answer.request_id]
    assert hit.body == body.replace(b"qwen3-8b", b"up/qwen3-8b")


def test_the_upstream_learns_its_own_key_and_nothing_of_the_callers(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    headers = {
        "Cookie": "a=b", "X-Api-Key": "mine", "Idempotency_Key": "mine-too", "Accept": "text/html",
        "OpenAI_Organization": "org-mine", "X_Stainless_Lang": "python",
    }  # fmt: skip
    answer = box.post(CHAT, payer.key, chat(), **headers)
    [hit] = [hit for hit in llm.hits() if hit.header("X-Request-Id") == answer.request_id]
    assert (hit.method, hit.target) == ("POST", CHAT)
    assert hit.header("Authorization") == f"Bearer {SECRET}"
    assert (hit.header("Accept"), hit.header("Content-Type")) == (("application/json",) * 2)
    for word in (payer.key, "mine", "a=b", "python"):
        assert word.encode() not in hit.everything()
    streamed = box.post(CHAT, payer.key, chat(stream=True))
    [hit] = [hit for hit in llm.hits() if hit.header("X-Request-Id") == streamed.request_id]
    assert hit.header("Accept") == "text/event-stream"


@pytest.mark.parametrize(
    ("path", "limits", "expected"),
    [
        (CHAT, {}, {"max_tokens": 4096}),
        (CHAT, {"max_tokens": 7}, {"max_tokens": 7}),
        (CHAT, {"max_tokens": 10**6}, {"max_tokens": 4096}),
        (CHAT, {"max_tokens": 2**70}, {"max_tokens": 4096}),
        (CHAT, {"max_completion_tokens": 7}, {"max_completion_tokens": 7}),
        (CHAT, {"max_completion_tokens": 7, "max_tokens": 9},
         {"max_completion_tokens": 7, "max_tokens": 7}),
        (CHAT, {"max_completion_tokens": 7, "max_tokens": 5},
         {"max_completion_tokens": 7, "max_tokens": 5}),
        (CHAT, {"max_completion_tokens": None, "max_tokens": 9},
         {"max_completion_tokens": None, "max_tokens": 9}),
        (CHAT, {"max_tokens": None}, {"max_tokens": 4096}),
        # One server takes this before ours, and another number of answers.
        (CHAT, {"max_tokens": 7, "n_predict": 100_000}, {"max_tokens": 7, "n_predict": 7}),
        (CHAT, {"max_tokens": 7, "n_predict": 3}, {"max_tokens": 7, "n_predict": 3}),
        (CHAT, {"n_predict": -1}, {"max_tokens": 4096, "n_predict": 4096}),
        (CHAT, {"n_predict": "9"}, {"max_tokens": 4096, "n_predict": 4096}),
        (CHAT, {"n_predict": None}, {"max_tokens": 4096, "n_predict": 4096}),
        (COMPLETIONS, {}, {"max_tokens": 4096}),
        (COMPLETIONS, {"max_tokens": 7}, {"max_tokens": 7}),
        # Servers know one limit of completions, and pass over the other.
        (COMPLETIONS, {"max_completion_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": 7}),
        (COMPLETIONS, {"n_predict": 100_000}, {"max_tokens": 4096, "n_predict": 4096}),
    ],
    ids=repr,
)  # fmt: skip
def test_a_limit_is_always_sent(
    box: LlmBox, llm: LlmUpstream, payer: Payer, path: str, limits: dict[str, Any],
    expected: dict[str, Any],
) -> None:  # fmt: skip
    subject = {"messages": []} if path == CHAT else {"prompt": "Say"}
    answer = box.tell(payer, {"model": MODEL, **subject, **limits}, path).answer
    assert sent(llm, answer) == {"model": f"up/{MODEL}", **subject, **expected}


def test_the_limit_goes_into_the_field_the_model_knows(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    answer = box.tell(payer, chat(model="new-style")).answer
    assert sent(llm, answer) == chat(model="up/new-style", max_completion_tokens=4096)
    answer = box.tell(payer, chat(model="new-style", max_tokens=5)).answer
    assert sent(llm, answer) == chat(model="up/new-style", max_tokens=5)


@pytest.mark.parametrize("counts", [True, False])
def test_a_server_that_passes_over_a_limit_is_told_by_its_older_name(
    box: LlmBox, llm: LlmUpstream, payer: Payer, counts: bool
) -> None:
    """Else an answer of any length would be had for the price of one token."""
    model = "deaf" if counts else "deaf-stream"
    told: dict[str, Any] = {"usage": {"prompt_tokens": 7, "completion_tokens": 100}}
    choice = {"index": 0, "message": {"content": "long words " * 100}, "finish_reason": "stop"}
    play = llm.stage(whole({"choices": [choice], **(told if counts else {})}))
    asked = chat(model=model, max_completion_tokens=1)
    assert sent(llm, box.tell(payer, asked).answer) == asked | {"model": f"up/{model}"}
    assert box.tell(payer, asked | {"play": play}).record["captured"] == RATES.price(
        1, Fraction(read_by_the_model(chat()["messages"]), 3)
    )
    now = box.tell(payer, asked).answer
    assert sent(llm, now) == asked | {"model": f"up/{model}", "max_tokens": 1}


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"stream": True}, {"include_usage": True}),
        ({"stream": True, "stream_options": None}, {"include_usage": True}),
        ({"stream": True, "stream_options": {}}, {"include_usage": True}),
        ({"stream": True, "stream_options": {"include_usage": False}}, {"include_usage": True}),
        ({"stream": True, "stream_options": {"include_usage": "no"}}, {"include_usage": True}),
        (
            {"stream": True, "stream_options": {"a": 1, "include_usage": True, "Include_Usage": 0}},
            {"a": 1, "include_usage": True},
        ),
        ({"stream": False, "stream_options": {"include_usage": False}}, {"include_usage": False}),
        ({"stream": None}, None),
    ],
    ids=repr,
)
def test_usage_is_always_asked_of_a_stream_and_of_nothing_else(
    box: LlmBox,
    llm: LlmUpstream,
    payer: Payer,
    more: dict[str, Any],
    options: dict[str, Any] | None,
) -> None:
    answer = box.tell(payer, chat(**more)).answer
    assert sent(llm, answer).get("stream_options") == options
    assert sent(llm, answer)["stream"] == more["stream"]


# What is refused


BAD_EVERYWHERE: dict[str, list[object]] = {"model": [None, 1, ["qwen3-8b"], {}, True]}
BAD_IN_BOTH = {
    "n": [0, -1, 129, 1.0, 1.5, "1", True, [1], 10**30],
    "max_tokens": [0, -1, 1.0, 7.5, "7", True, [7], {}, -(10**30)],
    "max_completion_tokens": [0, -1, 1.0, "7", False, [7]],
    "stream": ["true", 1, 0, [], {}],
    "stream_options": [True, [], "include_usage", 1],
    "n_cmpl": [0, 129, "2"],
}
TEXTS: list[object] = [None, 1, True, {}, []]
BAD: dict[str, dict[str, list[object]]] = {
    CHAT: {**BAD_EVERYWHERE, **BAD_IN_BOTH, "messages": [None, "hi", {}, 1, True]},
    COMPLETIONS: {**BAD_EVERYWHERE, **BAD_IN_BOTH, "prompt": TEXTS, "best_of": [0, 129, 1.0, "2"]},
    EMBEDDINGS: {**BAD_EVERYWHERE, "input": TEXTS},
}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: chat(), COMPLETIONS: {"model": MODEL, "prompt": "hi"},
    EMBEDDINGS: {"model": MODEL, "input": "hi"},
}  # fmt: skip


def check_refused(
    box: LlmBox, llm: LlmUpstream, payer: Payer, path: str, body: bytes, param: str | None
) -> None:
    before = len(llm.hits())
    answer = box.request("POST", path, key=payer.key, body=body)
    assert (answer.status, answer.code) == (400, "validation_error"), answer.body
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert answer.headers["x-should-retry"] == "false"
    assert (len(llm.hits()), box.standing(payer)) == (before, (GRANTED, 0))
    assert box.call(payer.key, answer) == {}


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, fields in BAD.items() for name in fields]
)
def test_a_field_that_is_malformed_is_named(
    box: LlmBox, llm: LlmUpstream, payer: Payer, path: str, name: str
) -> None:
    for value in BAD[path][name]:
        check_refused(box, llm, payer, path, json.dumps({**GOOD[path], name: value}).encode(), name)
    if name in GOOD[path]:
        missing = {k: v for k, v in GOOD[path].items() if k != name}
        check_refused(box, llm, payer, path, json.dumps(missing).encode(), name)


NESTED = b"[" * 700 + b"1" + b"]" * 700
ABYSS = b"[" * 100_000


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"null", None),
        (b"[]", None),
        (b'"x"', None),
        (b"{", None),
        (b"{} {}", None),
        (b"\xef\xbb\xbf{}", None),
        (b'{"model": "qwen3-8b", "messages": [], "x": NaN}', None),
        (b'{"model": "qwen3-8b", "messages": [], "x": "\\ud83d"}', None),
        (b'{"model": "qwen3-8b", "messages": [],}', None),
        (b'{"model": "qwen3-8b", "messages": ' + ABYSS, None),
        (b'{"model": "qwen3-8b", "x": ' + ABYSS, None),
        (b'{"model": "qwen3-8b", "messages": [1e400]}', "messages"),
        (b'{"model": "qwen3-8b", "messages": ["\xff"]}', "messages"),
        (b'{"model": "qwen3-8b", "messages": [], "tools": ["\xff"]}', "tools"),
        (b'{"messages": []}', "model"),
        (b'{"model": "qwen3-8b", "messages": [], "n": 1' + b"0" * 5000 + b"}", "n"),
        (b'{"model": "qwen3-8b", "messages": [1' + b"0" * 5000 + b"]}", "messages"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_body_that_is_no_request_is_refused(
    box: LlmBox, llm: LlmUpstream, payer: Payer, body: bytes, param: str | None
) -> None:
    check_refused(box, llm, payer, CHAT, body, param)


@pytest.mark.parametrize(("path", "name"), [(COMPLETIONS, "prompt"), (EMBEDDINGS, "input")])
def test_tokens_nested_without_reason_are_counted_or_refused_but_no_fault_of_ours(
    box: LlmBox, payer: Payer, path: str, name: str
) -> None:
    body = b'{"model": "qwen3-8b", "' + name.encode() + b'": [' + NESTED + b"]}"
    answer = box.request("POST", path, key=payer.key, body=body)
    assert answer.status in (200, 400)


@pytest.mark.parametrize(
    "name",
    ["Model", "MODEL", "Messages", "Max_Tokens", "max_to\u212aens", "N", "\u017ftream", "Tools",
     "Stream_Options", "Max_Completion_Tokens", "N_Predict"],
    ids=ascii,
)  # fmt: skip
def test_a_name_that_another_server_would_take_for_ours_is_refused(
    box: LlmBox, llm: LlmUpstream, payer: Payer, name: str
) -> None:
    """There are servers that read names without regard to case, the last one winning: the caller
    would get another model than was priced, or more than was set aside for."""
    body = json.dumps({**chat(max_tokens=1), name: "dear"}).encode()
    check_refused(box, llm, payer, CHAT, body, name)


def test_of_a_field_that_is_sent_twice_the_last_is_priced_and_sent(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    body = b'{"model":"tiny","max_tokens":1,"model":"qwen3-8b","messages":[],"max_tokens":10}'
    answer = box.request("POST", CHAT, key=payer.key, body=body)
    [hit] = [hit for hit in llm.hits() if hit.header("X-Request-Id") == answer.request_id]
    assert hit.body == b'{"model":"up/qwen3-8b","max_tokens":10,"messages":[]}'
    assert box.call(payer.key, answer)["held"] == RATES.price(10, 0)


def test_a_model_nobody_has_is_not_found(box: LlmBox, llm: LlmUpstream, payer: Payer) -> None:
    for name in ("gpt-9", "up/qwen3-8b", "", "x" * 100_000, "<script>"):
        before = len(llm.hits())
        answer = box.post(CHAT, payer.key, chat(model=name))
        assert (answer.status, answer.code) == (404, "model_not_found")
        assert answer.json()["error"]["param"] == "model"
        assert len(answer.body) < 1000
        assert (len(llm.hits()), box.standing(payer)) == (before, (GRANTED, 0))


def test_a_price_beyond_all_reason_is_refused_like_any_other(box: LlmBox, payer: Payer) -> None:
    prompts = b'["",' + b"1," * 900_000 + b'""]'
    body = b'{"model":"extreme","n":128,"prompt":' + prompts + b"}"
    answer = box.request("POST", COMPLETIONS, key=payer.key, body=body)
    assert (answer.status, answer.code) == (402, "insufficient_credits")


def test_a_body_of_millions_of_parts_is_refused_unread(
    box: LlmBox, llm: LlmUpstream, payer: Payer
) -> None:
    parts = b'{"model":"qwen3-8b","messages":[' + b"[]," * 6_000_000 + b"1]}"
    check_refused(box, llm, payer, CHAT, parts, None)


def test_a_body_may_have_twenty_mebibytes(box: LlmBox, payer: Payer) -> None:
    head = b'{"model":"qwen3-8b","messages":[],"image":"'
    for size, status in ((20 * MIB, 200), (20 * MIB + 1, 413)):
        body = head + b"x" * (size - len(head) - 2) + b'"}'
        answer = box.request("POST", CHAT, key=payer.key, body=body)
        assert (len(body), answer.status) == (size, status)


@pytest.mark.parametrize(
    "field",
    ["fallbacks", "models", "route", "Fallbacks", "mock_testing_fallbacks", "api_base", "preset"],
)
def test_who_answers_is_not_the_callers_to_choose(
    box: LlmBox, llm: LlmUpstream, payer: Payer, field: str
) -> None:
    """A key of one model would reach the others of a server that stands in front of many."""
    body = chat() | {field: [{"model": "dear"}]}
    check_refused(box, llm, payer, CHAT, json.dumps(body).encode(), field)


def test_text_full_of_commas_and_brackets_is_read(box: LlmBox, payer: Payer) -> None:
    text = "a,b,c;f(x[0],{y})\n" * 40_000
    body = chat(max_tokens=1) | {"messages": [{"role": "user", "content": text}]}
    assert box.post(CHAT, payer.key, body).status == 200


def test_a_large_body_past_the_rate_limit_is_not_read(
    box: LlmBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = box.payer(GRANTED, rate_limit=1).key
    assert box.post(CHAT, key, chat()).status == 200
    # Were it read, this would be an error of ours.
    monkeypatch.setattr(adapter, "parse", None)
    answer = box.request("POST", CHAT, key=key, body=json.dumps(chat()).encode() + b" " * 10**5)
    assert (answer.status, answer.code) == (429, "rate_limited")
    assert answer.headers["X-RateLimit-Remaining"] == "0"


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", "application/xml"])
def test_a_body_of_another_type_is_refused(box: LlmBox, payer: Payer, content_type: str) -> None:
    body, headers = json.dumps(chat()).encode(), {"Content-Type": content_type}
    answer = box.request("POST", CHAT, key=payer.key, body=body, headers=headers)
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


def test_what_wins_when_several_things_are_wrong(box: LlmBox) -> None:
    payer = box.payer(GRANTED, rate_limit=2, scopes=["model:qwen3-*", "model:none"])
    forbidden, unknown, bad = chat(model="dear"), chat(model="none"), chat(n=0)

    def said(body: object, key: str = payer.key, path: str = CHAT) -> tuple[int, str | None]:
        answer = box.post(path, key, body)
        return answer.status, answer.code

    assert said(bad) == (400, "validation_error")
    assert said(unknown) == (404, "model_not_found")
    assert said(forbidden) == (403, "missing_scope")
    assert said(bad) == (429, "rate_limited")
    assert said(unknown) == (429, "rate_limited")
    assert said(chat()) == (429, "rate_limited")
    assert said(bad, STRANGERS_KEY) == (401, "invalid_api_key")
    assert said(bad, path="/v1/responses") == (404, "not_found")
    assert box.request("PUT", CHAT, value=bad).status == 405


def test_a_bad_body_wins_over_the_key_it_was_sent_with_and_that_over_credits(box: LlmBox) -> None:
    payer = box.payer(100)
    dear = chat(max_tokens=4096)
    assert box.post(CHAT, payer.key, chat(max_tokens=5), Idempotency_Key="k").status == 200
    assert box.post(CHAT, payer.key, chat(n=0), Idempotency_Key="k").status == 400
    assert box.post(CHAT, payer.key, dear, Idempotency_Key="k").code == "idempotency_key_reused"
    limited, _ = box.key(payer.account, credit_limit=10, credit_period="day")
    assert box.post(CHAT, limited, dear).code == "credit_limit_reached"
    assert box.post(CHAT, payer.key, dear).code == "insufficient_credits"


# Scopes, and the list of models


ALL = list(MODELS)
SCOPES: list[tuple[list[str] | None, list[str], bool, bool]] = [
    # scopes, the models, whether on the route without a scope, on the one with `llm:use`
    (None, ALL, True, True),
    ([], [], False, False),
    (["sms:send"], [], False, False),
    (["llm:use"], ALL, False, True),
    (["model:qwen3-8b"], ["qwen3-8b"], True, True),
    (["model:qwen3-*"], ["qwen3-8b"], True, True),
    (["model:*"], ALL, True, True),
    (["model:d*r", "model:flat"], ["dear", "flat"], True, True),
    (["model:meta/*"], [SLASHED], True, True),
    (["model:Dear", "model:up/dear", "model:dea"], [], True, True),
    (["model:dear", "sms:send"], [], False, False),
    (["model:dear", "llm:use"], ["dear"], False, True),
    (["model:*8b", "llm:use"], ["qwen3-8b", SLASHED], False, True),
]


@pytest.mark.parametrize(("scopes", "models", "plain", "scoped"), SCOPES, ids=repr)
def test_a_keys_scopes_say_which_models_it_may_call(
    box: LlmBox, scopes: list[str] | None, models: list[str], plain: bool, scoped: bool
) -> None:
    payer = box.payer(10**15, scopes=scopes)
    listed = box.get("/v1/models", payer.key).json()
    assert [item["id"] for item in listed["data"]] == models
    for path, is_open in ((CHAT, plain), (SCOPED, scoped)):
        for name in ("dear", "qwen3-8b", "flat", SLASHED):
            answer = box.post(path, payer.key, chat(model=name, max_tokens=1))
            may = is_open and name in models
            assert (answer.status == 200) == may, (path, name)
            if not may:
                assert (answer.status, answer.code) == (403, "missing_scope")
                needs_model = is_open
                route_scope = "llm:use" if path == SCOPED else "*"
                assert answer.json()["required"] == (
                    f"model:{name}" if needs_model else route_scope
                )
    for path, body in ((COMPLETIONS, {"prompt": "hi"}), (EMBEDDINGS, {"input": "hi"})):
        answer = box.post(path, payer.key, {"model": "dear", **body})
        assert (answer.status == 200) == (plain and "dear" in models)
    if scopes:
        assert box.post("/v1/plain", payer.key).status == 403
    for name in ALL:
        assert (box.get(f"/v1/models/{name}", payer.key).status == 200) == (name in models)


def test_a_session_token_and_the_operators_key_may_call_every_model(box: LlmBox) -> None:
    who = person(box, GRANTED)
    for bearer in (who.token, minted(box, who.email), OPERATOR_KEY):
        listed = box.get("/v1/models", bearer)
        assert [item["id"] for item in listed.json()["data"]] == ALL
        assert box.post(CHAT, bearer, chat()).status == 200


def test_a_model_is_shown_as_openai_shows_it_with_its_price(box: LlmBox, payer: Payer) -> None:
    listed = box.get("/v1/models", payer.key).json()
    assert listed["object"] == "list"
    by_id = {item["id"]: item for item in listed["data"]}
    item = by_id["included"]
    assert set(item) == {"id", "object", "created", "owned_by", "farebox"}
    assert (item["object"], item["owned_by"]) == ("model", "farebox")
    assert isinstance(item["created"], int)
    assert item["farebox"] == {
        "tier": "standard",
        "credits_per_request": 3,
        "credits_per_1k_tokens": "4",
        "credits_per_1k_input_tokens": "0.06",
        "included_output_tokens": 500,
        "context_window": None,
        "parameters": None,
    }
    assert box.get("/v1/models/included", payer.key).json() == item
    assert "up/" not in json.dumps(listed)


def test_a_model_is_found_by_its_id_however_its_slash_is_written(box: LlmBox, payer: Payer) -> None:
    for path in ("meta/llama-3.1:8b", "meta%2Fllama-3.1:8b", "meta%2fllama-3.1%3A8b"):
        assert box.get(f"/v1/models/{path}", payer.key).json()["id"] == SLASHED


def test_a_model_that_is_not_there_or_not_allowed_is_not_found_alike(box: LlmBox) -> None:
    payer = box.payer(0, scopes=["model:flat"])
    answers = [box.get(f"/v1/models/{name}", payer.key) for name in ("dear", "none", "a/b", "FLAT")]
    for answer in answers:
        assert (answer.status, answer.code) == (404, "model_not_found")
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert box.get("/v1/models").code == "missing_api_key"
    assert box.get("/v1/models", STRANGERS_KEY).code == "invalid_api_key"
