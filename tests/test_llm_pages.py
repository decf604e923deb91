"""Calls of language models as people see them: sums by model, what a charge is made of, margins,
keys for some models, and the lines to paste."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from browser import PASSWORD
from conftest import StartFarebox
from doubles import refused_port
from html_pages import Page, Visit, account_of, begin, cheaply, newcomer, number, run, visitor
from inprocess import Box, Clock
from screen import NARROW, WIDE, OpenScreen, look
from server import OPERATOR_KEY, Answer, Farebox

from core import ledger
from core.ledger import Outcome

NOW = "2027-03-05T12:00:00Z"
USAGE = "/dashboard/usage"
CHAT, EMBEDDINGS, SMS = "/v1/chat/completions", "/v1/embeddings", "/api/v1/sms/send"
NASTY = """<b>"x"&'=y"""
ROUTES = f"""
[upstreams.sandbox]
kind = "sandbox"
[upstreams.down]
kind = "openai"
base_url = "http://127.0.0.1:{refused_port()}/v1"

[[routes]]
path = "{SMS}"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
credits = 1
cost_usd = "0.004"
[[routes]]
path = "{CHAT}"
methods = ["POST"]
upstream = "sandbox"
adapter = "chat"
[[routes]]
path = "{EMBEDDINGS}"
methods = ["POST"]
upstream = "sandbox"
adapter = "embeddings"
scope = "embed"
"""
SMALL = """
[[models]]
id = "small"
upstream_model = "hidden-name"
credits_per_request = 8
included_output_tokens = 5
credits_per_1k_tokens = "400.5"
credits_per_1k_input_tokens = "0.25"
max_output_tokens = 1000
cost_usd_per_1m_input = "0.15"
cost_usd_per_1m_output = "0.60"
"""
OTHERS = f"""
[[models]]
id = "cheap"
tier = "thrifty"
credits_per_request = 1
max_output_tokens = 16384
cost_usd_per_1m_output = "15"
[[models]]
id = "elsewhere"
upstream = "down"
fallback = "sandbox"
credits_per_request = 20
[[models]]
id = {json.dumps(NASTY)}
credits_per_request = 2
[[models]]
id = "=1+1"
credits_per_request = 3
"""
CONFIG = ROUTES + SMALL + OTHERS
MODELS = ("small", "cheap", "elsewhere", NASTY, "=1+1")


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        cheaply(patch)
        yield patch


@pytest.fixture(scope="module")
def hand(cheap: pytest.MonkeyPatch) -> Clock:
    return Clock(cheap, NOW)


@pytest.fixture(autouse=True)
def it_is_now(hand: Clock) -> None:
    hand.set(NOW)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, hand: Clock) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("models") / "i", CONFIG) as box:
        yield box


def chat(box: Box | Farebox, key: str, model: str, text: str = "hi", **more: Any) -> Answer:
    messages = [{"role": "user", "content": text}]
    return box.post(CHAT, key, {"model": model, "messages": messages, **more})


def owner(box: Box, credits: int = 100_000) -> tuple[Visit, str]:
    """Who is signed in, and a key of theirs."""
    email = newcomer(box, credits=credits)
    key, _ = box.key(account_of(box, email), name="agent")
    return Visit.sign_in(box, email), key


def explained(me: Visit, answer: Answer) -> Page:
    return me.open(f"{USAGE}/{answer.request_id}")


def priced(output_tokens: int, input_tokens: int) -> int:
    """What `small` asks for, by the contract's formula."""
    exact = 8 + max(0, output_tokens - 5) * Fraction("400.5") / 1000
    return ceil(exact + input_tokens * Fraction("0.25") / 1000)


# Sums by model.


class World:
    """An account that has called models on three days, and something that has none."""

    def __init__(self, box: Box, hand: Clock) -> None:
        self.me, self.key = owner(box)
        self.other, self.other_id = box.key(account_of(box, self.me.email), name="other")
        for day in ("2027-02-01T12:00:00Z", "2027-03-04T23:59:59Z", NOW):
            hand.set(day)
            for at, model in enumerate(MODELS):
                for _ in range(1 + at // 2):
                    assert chat(box, self.key, model).status == 200
            assert chat(box, self.other, "small", "sandbox: words 20").status == 200
            assert chat(box, self.other, "small", "sandbox: 500").status == 502
            assert box.post(EMBEDDINGS, self.key, {"model": "cheap", "input": "x"}).status == 200
            box.sms(self.key)
        hand.set(NOW)
        begin(box, account_of(box, self.me.email), CHAT, 3)
        self.calls = self.me.api("/api/v1/usage")

    def since(self, day: str) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["created_at"] >= day]


@pytest.fixture(scope="module")
def world(box: Box, hand: Clock) -> World:
    hand.set(NOW)
    return World(box, hand)


def by_model(calls: list[dict[str, Any]]) -> list[list[str]]:
    """A ranking of these calls, as it is written."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for call in calls:
        if call["model"] is not None:
            totals[call["model"]][0] += call["captured"]
            totals[call["model"]][1] += 1
    ranked = sorted(totals.items(), key=lambda item: (-item[1][0], item[0]))
    return [
        [model, f"{_counted(spent, 'credit')}, {_counted(count, 'call')}"]
        for model, (spent, count) in ranked
    ]


def _counted(value: int, thing: str) -> str:
    return f"{value:,} {thing}{'' if value == 1 else 's'}"


def test_the_overview_ranks_models_and_leads_to_their_calls(world: World) -> None:
    page = world.me.open("/dashboard")
    expected = by_model(world.since("2027-02-04"))
    assert page.table("Model") == expected and len(expected) == len(MODELS)
    assert page.headings("h2") == ["By person", "By route", "By model"]
    for model in MODELS:
        shown = world.me.open(page.link(model))
        spent, count = (number(words) for words in dict(expected)[model].split(", "))
        assert (number(shown.tiles()["Credits"]), number(shown.tiles()["Calls"])) == (spent, count)


def test_the_summary_by_model_is_what_the_overview_says(box: Box, world: World) -> None:
    token = world.me.browser.token()
    asked = "/api/v1/usage/summary?by=model&from=2027-02-04"
    rows = box.get(asked, token).json()["data"]
    named = [row for row in rows if row["model"] is not None]
    told = [[r["model"], f"{r['captured']:,} credits, {r['calls']} calls"] for r in named]
    assert told == world.me.open("/dashboard").table("Model")
    (nameless,) = [row for row in rows if row["model"] is None]
    assert nameless["calls"] == 3  # two messages, and the call in flight of no model
    (small,) = [row for row in rows if row["model"] == "small"]
    costs = [c["cost_usd"] for c in world.since("2027-02-04") if c["model"] == "small"]
    assert Decimal(small["cost_usd"]) == sum(Decimal(cost or 0) for cost in costs) > 0
    assert small["failed"] == 2


@pytest.mark.parametrize("first", ["2027-02-01", "2027-03-05"])
@pytest.mark.parametrize("status", ["", "captured", "voided", "held"])
@pytest.mark.parametrize("key", ["", "other"])
@pytest.mark.parametrize("model", ["", "small", "=1+1", "gone"])
def test_usage_is_filtered_by_model(
    world: World, first: str, status: str, key: str, model: str
) -> None:
    key_id = world.other_id if key else ""
    asked = {"from": first, "to": "2027-03-05", "key": key_id, "route": "", "model": model,
             "status": status}  # fmt: skip
    page = world.me.open(f"{USAGE}?{urlencode(asked)}")
    assert page.main.one("form", action=USAGE).fields() == asked
    expected = [
        call
        for call in world.since(first)
        if key_id in ("", call["key_id"])
        and status in ("", call["status"])
        and model in ("", call["model"])
    ]
    rows = page.table("When") if expected else []
    assert len(rows) == len(expected)
    for row, call in zip(rows, expected, strict=True):
        words = row[1].removeprefix(f"{call['method']} {call['route']}").strip()
        tokens = ""
        if call["status"] == "captured" and call["model"]:
            plural = "" if call["input_tokens"] == 1 else "s"
            tokens = f" · {call['input_tokens']} token{plural} in, {call['output_tokens']} out"
        assert words == (call["model"] or "") + tokens
    if status != "held":
        assert number(page.tiles()["Calls"]) == len(expected)
        assert number(page.tiles()["Credits"]) == sum(call["captured"] for call in expected)
    ranked = by_model(expected) if model == "" and status in ("", "captured") else []
    told = page.table("Model") if ranked else []
    assert told == ranked
    assert ("By model" in page.headings()) is bool(ranked)
    file = world.me.sheet(f"{USAGE}.csv?{urlencode(asked)}")
    assert [row["request_id"] for row in file] == [call["request_id"] for call in expected]
    assert {row["model"] for row in file} == {
        f"'{call['model']}" if call["model"] == "=1+1" else call["model"] or "" for call in expected
    }


def test_a_ranking_on_the_usage_page_keeps_what_was_asked(world: World) -> None:
    asked = f"{USAGE}?from=2027-02-01&to=2027-03-05&key={world.other_id}"
    page = world.me.open(asked)
    shown = world.me.open(page.link("small"))
    fields = shown.main.one("form", action=USAGE).fields()
    assert (fields["model"], fields["key"]) == ("small", world.other_id)
    assert (fields["from"], fields["to"]) == ("2027-02-01", "2027-03-05")
    assert shown.tiles()["Calls"] == page.tiles()["Calls"] == "6"


def test_a_bar_keeps_the_model(world: World) -> None:
    page = world.me.open(f"{USAGE}?model=small")
    (last,) = page.main.one("ol").all("a")[-1:]
    assert world.me.open(last.get("href")).main.one("form", action=USAGE).fields()["model"] == (
        "small"
    )


def test_where_no_model_is_sold_or_was_called_none_is_asked_for(tmp_path: Path) -> None:
    sms = ROUTES.partition(f'[[routes]]\npath = "{CHAT}"')[0]
    with Box(tmp_path / "i", sms) as box:
        me, key = owner(box)
        box.sms(key)
        assert "model" not in me.open(USAGE).main.one("form", action=USAGE).fields()
        assert "By model" not in me.open("/dashboard").headings() + me.open(USAGE).headings()
        assert "Models" not in visitor(box, "--operator").open("/admin/prices").headings()


# What a call cost, and why.


def test_a_charge_beyond_what_the_request_covers_is_worked_out(box: Box) -> None:
    me, key = owner(box)
    answer = chat(box, key, "small", "sandbox: words 640", max_tokens=900)
    charged = priced(640, 3)
    assert answer.headers["X-Credits-Charged"] == str(charged) == "263"
    page = explained(me, answer)
    assert page.h1 == "Charged 263 credits"
    facts = page.facts()
    assert facts["Model"] == "small" and facts["Tokens"] == "3 in, 640 out"
    assert facts["Price"] == (
        "263 credits 8 for the request + 254.3175 for the 635 output tokens it does not cover"
        " + 0.00075 for the input = 262.31825, rounded up Today’s price: 8 credits a request,"
        " 400.5 per 1,000 output tokens beyond 5, 0.25 per 1,000 input tokens"
    )
    held = box.record(key, answer)["held"]
    assert facts["Set aside"].startswith(f"{held} What it would cost with the longest answer")
    assert f"{held} credits had been set aside for it, and {held - charged} came back." in page.text
    assert "hidden-name" not in page.answer.body.decode()


def test_a_charge_of_the_request_alone_needs_no_sum(box: Box) -> None:
    me, key = owner(box)
    facts = explained(me, chat(box, key, "cheap")).facts()
    assert facts["Price"] == "1 credit Today’s price: 1 credit a request"


@pytest.mark.parametrize("text", ["sandbox: no usage", "sandbox: break"])
def test_an_estimate_says_that_it_is_one_and_of_what(box: Box, text: str) -> None:
    me, key = owner(box)
    sent = box.post(
        CHAT, key, {"model": "small", "messages": [{"role": "user", "content": text}]}
        | ({"stream": True} if text.endswith("usage") else {}),
    )  # fmt: skip
    if text.endswith("break"):  # whole, so nothing came
        assert sent.status == 502
        page = explained(me, sent)
        assert page.h1 == "Not charged" and "Tokens" not in page.facts()
        assert "answer (status 200) failed or broke off before it said anything" in page.text
        assert page.facts()["Price"].startswith("at most ")
        return
    page = explained(me, sent)
    assert page.facts()["Tokens"].endswith(", estimated")
    assert "What it left open is estimated: a token for every four bytes" in page.text
    assert me.open(USAGE).table("When")[0][1].endswith("out, estimated")


def test_an_embedding_is_told_without_an_answers_length(box: Box) -> None:
    me, key = owner(box)
    answer = box.post(EMBEDDINGS, key, {"model": "small", "input": "a b c"})
    facts = explained(me, answer).facts()
    assert facts["Tokens"] == "3 in, 0 out"
    assert facts["Set aside"] == f"{priced(0, 2)} What its input may cost at most."
    assert "8 for the request + 0.00075 for the input = 8.00075, rounded up" in facts["Price"]


def test_what_an_upstream_refused_is_told_with_what_it_might_have_cost(box: Box) -> None:
    me, key = owner(box)
    answer = chat(box, key, "small", "sandbox: 429")
    page, held = explained(me, answer), box.record(key, answer)["held"]
    assert page.h1 == "Not charged" and page.facts()["Price"].startswith(f"at most {held} credits")
    assert f"status 429, so the {held} credits set aside came back." in page.text


def test_a_call_of_nobody_sets_nothing_aside(box: Box) -> None:
    boss = visitor(box, "--operator")
    answer = chat(box, OPERATOR_KEY, "small", "sandbox: words 10")
    record = box.record(OPERATOR_KEY, answer)
    assert (record["price"], record["captured"]) == (priced(10, 3), 0)
    assert boss.open(f"{USAGE}/{answer.request_id}", 404)  # it is in no account that has a page


def test_a_price_that_has_changed_says_so_and_a_model_that_is_gone_too(
    tmp_path: Path, hand: Clock
) -> None:
    folder = tmp_path / "i"
    with Box(folder, CONFIG) as box:
        email = newcomer(box, credits=1000)
        key, _ = box.key(account_of(box, email))
        small = chat(box, key, "small", "sandbox: words 7")
        gone = chat(box, key, "cheap")
    dearer = SMALL.replace("credits_per_request = 8", "credits_per_request = 80")
    (folder / "farebox.toml").write_text(ROUTES + dearer)
    with Box(folder) as box:
        me = Visit.sign_in(box, email)
        price = explained(me, small).facts()["Price"]
        assert price.startswith(f"{priced(7, 3)} credits Today’s price: 80 credits a request, ")
        assert price.endswith(f"which would be {priced(7, 3) + 72} credits."
                              " It has changed since the call.")  # fmt: skip
        assert "for the request" not in price
        assert explained(me, gone).facts()["Price"] == "1 credit The model is not served any more."
        # What was called can still be asked for, and counts among what was sold.
        options = [
            node.text for node in me.open(USAGE).main.one("select", id="model").all("option")
        ]
        assert options == ["Any", "cheap", "small"]
        row = visitor(box, "--operator").open("/admin/prices").table("Model")[-1]
        assert row[0] == "cheap not served any more" and row[1:5] == ["–", "not known", "1", "0"]


# Nothing a caller says is shown.


def test_a_model_that_is_not_the_configs_is_shown_nowhere(box: Box) -> None:
    me, key = owner(box)
    for name in ("<script>alert(1)</script>", "small<script>", "x" * 5000):
        answer = chat(box, key, name)
        assert (answer.status, answer.code) == (404, "model_not_found")
        assert answer.headers["Content-Type"] == "application/json"
    assert me.api("/api/v1/usage") == []
    for path in ("/dashboard", USAGE, "/admin/prices", "/admin/audit", "/admin/calls"):
        assert "script>alert" not in visitor(box, "--operator").open(path).answer.body.decode()
    asked = me.open(f"{USAGE}?{urlencode({'model': '<script>alert(1)</script>'})}")
    assert "<script>alert" not in asked.answer.body.decode()
    assert asked.main.one("form", action=USAGE).fields()["model"] == "<script>alert(1)</script>"


def test_a_models_id_is_text_wherever_it_stands(box: Box, world: World) -> None:
    boss = visitor(box, "--operator")
    call = next(call for call in world.calls if call["model"] == NASTY)
    form = world.me.press("/dashboard/billing", "Quick: Cursor / agent key")
    for page in (
        world.me.open("/dashboard"), world.me.open(USAGE), form, boss.open("/admin/prices"),
        world.me.open(f"{USAGE}/{call['request_id']}"), boss.open("/admin/health"),
    ):  # fmt: skip
        body = page.answer.body.decode()
        assert "<b>" not in body and NASTY not in body
        assert page is form or NASTY in page.text, page.h1


# For the operator.


def test_margins_of_models_and_of_their_routes_are_exact(tmp_path: Path, hand: Clock) -> None:
    with Box(tmp_path / "i", CONFIG) as box:
        me, key = owner(box)
        hand.now -= 30 * 86_400_000
        chat(box, key, "small", "sandbox: words 900")  # too long ago to count
        hand.set(NOW)
        first = chat(box, key, "small", "sandbox: words 640", max_tokens=900)
        another, _ = box.key(account_of(box, me.email))  # so that there are several sums to add
        chat(box, another, "small", "sandbox: words 30")
        chat(box, key, "small", "sandbox: 500")
        second = chat(box, key, "cheap", "sandbox: words 5000")
        box.post(EMBEDDINGS, key, {"model": "small", "input": "a b c d"})
        box.sms(key)
        calls = [c for c in me.api("/api/v1/usage") if c["created_at"] >= "2027-03-05"]
        for answer in (first, second):
            assert box.cli("credits", "refund", answer.request_id).exit_code == 0
        page = visitor(box, "--operator").open("/admin/prices")
        refunded = {"small": priced(640, 3), "cheap": 1, CHAT: priced(640, 3) + 1}
        for part, rows in (("route", page.table("Route")), ("model", page.table("Model"))):
            for row in rows:
                name = row[0].split()[0]
                mine = [call for call in calls if call[part] == name]
                back = refunded.get(name, 0)
                spent = sum(call["captured"] for call in mine) - back
                cost = sum((Decimal(call["cost_usd"] or 0) for call in mine), Decimal(0))
                margin = spent * Decimal("0.01") - cost
                assert row[3:5] == [
                    str(len(mine)), str(sum(call["status"] == "voided" for call in mine)),
                ]  # fmt: skip
                told = f"${spent * Decimal('0.01'):.2f} {spent:,} cr"
                assert row[5] == told + (f", {back} refunded" if back else "")
                assert row[6] == f"${_places(cost)}"
                assert row[7] == f"{'−' if margin < 0 else ''}${_places(abs(margin))}"
        routes = {row[0].split()[0]: row for row in page.table("Route")}
        assert routes[CHAT][:3] == [f"{CHAT} POST · sandbox", "by model", "by model"]
        assert routes[SMS][1:3] == ["1 per call $0.01", "$0.004 each"]
        models = {row[0].split()[0]: row for row in page.table("Model")}
        assert models["small"][:3] == [
            "small standard",
            "8 credits a request, 400.5 per 1,000 output tokens beyond 5,"
            " 0.25 per 1,000 input tokens",
            "$0.15 per million tokens in, $0.60 per million tokens out",
        ]
        assert models["cheap"][:3] == [
            "cheap thrifty",
            "1 credit a request",
            "$15 per million tokens out can be more than the price"
            " 1 token in and 16,384 out cost $0.24576 and bring $0.01",
        ]
        assert models["elsewhere"][0] == "elsewhere standard · down · else sandbox"
        assert models["elsewhere"][2] == "not known"


def _places(amount: Decimal) -> str:
    text = f"{amount:,.4f}"
    return text[:-2] if text.endswith("00") else text


def test_a_call_in_flight_is_listed_with_its_model(box: Box) -> None:
    boss = visitor(box, "--operator", credits=5)
    call = begin(box, account_of(box, boss.email), CHAT, 3)
    box.run("UPDATE call SET model = 'small' WHERE id = :id", id=call)
    (row,) = [row for row in boss.open("/admin/calls").table("For") if call in row[1]]
    assert row[1] == f"{CHAT} small {call}"
    box.write(lambda tx: ledger.void(tx, call, Outcome(None, None)))


def test_health_knows_who_serves_a_model_and_who_stands_in(tmp_path: Path, hand: Clock) -> None:
    idle = '[upstreams.idle]\nkind = "sandbox"\n'
    with Box(tmp_path / "i", idle + CONFIG) as box:
        _, key = owner(box)
        assert chat(box, key, "elsewhere").status == 200  # by the fallback
        assert chat(box, key, "elsewhere", "sandbox: 500").status == 502
        chat(box, key, "small")
        box.sms(key)
        boss = visitor(box, "--operator")
        page = boss.open("/admin/health")
        told = {item.all("strong")[0].text: item.text for item in page.items()}
        others = f"small, cheap, {NASTY}, =1+1"
        assert told == {
            "idle": "idle sandbox no route uses it no calls",
            "sandbox": f"sandbox sandbox {SMS}, {CHAT}, {EMBEDDINGS} models {others}"
            " stands in for elsewhere 2 of 2 served",
            "down": f"down openai {CHAT}, {EMBEDDINGS} models elsewhere 1 of 2 served 1 failed",
        }
        assert "counts where it went first" in page.text
        page = boss.press(page, "Check now")
        assert "connect" in page.item("down openai").text.lower()


# Keys for some models, and what to paste.


def test_a_key_for_some_models_is_made_by_ticking_them(box: Box) -> None:
    me, _ = owner(box)
    form = me.open("/dashboard/billing")
    offered = [n.get("value") for n in form.main.all("input", name="scopes")]
    assert offered == ["embed", *sorted(f"model:{m}" for m in ("small", "cheap", "elsewhere"))]
    only = {"restricted": "1", "scopes": ["model:small"]}
    page = me.press(form, "Create key", name="one model", typed=only)
    key = page.taken("secret")
    assert chat(box, key, "small").status == 200
    assert chat(box, key, "cheap").code == "missing_scope"
    assert box.sms(key).code == "missing_scope"
    assert "only model:small" in me.open("/dashboard/billing").item("one model").text


def test_a_pattern_stays_ticked_and_can_be_taken_away(box: Box) -> None:
    me, _ = owner(box)
    key, key_id = box.key(account_of(box, me.email), name="some", scopes=["model:s*", "embed"])
    page = me.open(f"/dashboard/billing/keys/{key_id}")
    boxes = {n.get("value"): n.is_checked for n in page.main.all("input", name="scopes")}
    assert [scope for scope, is_checked in boxes.items() if is_checked] == ["embed", "model:s*"]
    me.press(page, "Save", typed={"name": "renamed"})
    assert box.row("SELECT scopes FROM api_key WHERE id = :id", id=key_id) == (
        '["model:s*", "embed"]',
    )
    me.press(me.open(f"/dashboard/billing/keys/{key_id}"), "Save", typed={"scopes": ["embed"]})
    assert chat(box, key, "small").code == "missing_scope"


def test_a_new_keys_page_has_lines_that_work_for_what_it_may_call(box: Box) -> None:
    me, _ = owner(box)
    page = me.press("/dashboard/billing", "Quick: Cursor / agent key")
    secret = page.taken("secret")
    base = box.settings.public_url
    assert page.taken("openai") == (
        f"export OPENAI_BASE_URL={base}/v1\nexport OPENAI_API_KEY={secret}"
    )
    for models, path, model in (
        (["model:cheap"], CHAT, "cheap"), (["model:e*", "embed"], EMBEDDINGS, "elsewhere"),
    ):  # fmt: skip
        _, key_id = box.key(account_of(box, me.email), scopes=models)
        page = me.press(f"/dashboard/billing/keys/{key_id}/rotate", "Rotate")
        curl = page.taken("curl")
        assert path in curl and page.taken("secret") in curl
        assert page.taken("openai").splitlines()[0] == f"export OPENAI_BASE_URL={base}/v1"
        status, answer = run(box, curl)
        assert (status, answer["model"]) == (200, model)
    _, key_id = box.key(account_of(box, me.email), scopes=["nothing:here"])
    page = me.press(f"/dashboard/billing/keys/{key_id}/rotate", "Rotate")
    assert not page.main.all("code", id="openai")


MODELS_ALONE = ROUTES.replace(ROUTES.split("[[routes]]")[1], "", 1).replace("[[routes]]", "", 1)


@pytest.mark.parametrize("prefix", ["/v1", "/llm/v1"])
def test_the_first_steps_lead_to_a_model(tmp_path: Path, prefix: str) -> None:
    config = (MODELS_ALONE + SMALL).replace('"/v1/', f'"{prefix}/')
    with Box(tmp_path / "i", config) as box:
        me = visitor(box, credits=100)
        page = me.open("/dashboard")
        lines = page.taken("openai").splitlines()
        assert lines == [
            f"export OPENAI_BASE_URL={box.settings.public_url}{prefix}",
            "export OPENAI_API_KEY=$FAREBOX_API_KEY",
        ]
        key = me.press(page, "Quick: Cursor / agent key").taken("secret")
        status, answer = run(box, page.taken("curl"), key)
        assert status == 200 and answer["object"] == "chat.completion"
        assert answer["model"] == "small"


# On a screen.


@pytest.fixture(scope="module")
def served(start_farebox: StartFarebox) -> tuple[Farebox, str]:
    long = "meta-llama/a-very-long-name-of-a-model-that-goes-on-and-on-2026-01-31"
    more = "".join(
        f'[[models]]\nid = "{name}"\ncredits_per_request = 5\n'
        for name in (long, *(f"m{at}" for at in range(12)))
    )
    served = start_farebox(CONFIG + more, workers=1)
    email = "screen@example.com"
    served.set_up("users", "add", email, "--operator", "--password-stdin", stdin=PASSWORD)
    served.set_up("credits", "grant", email, "100000")
    key = served.key(email, "--scope", "model:*")
    assert chat(served, key, long).status == 200
    assert chat(served, key, "cheap", "sandbox: words 5000").status == 200
    chat(served, key, "small", "sandbox: no usage", stream=True)
    return served, key


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        pytest.param({"width": WIDE, "scheme": "dark"}, (USAGE,), id="desktop, dark"),
        pytest.param({"width": NARROW}, ("/dashboard", "/admin/prices"), id="phone, light"),
    ],
)
def test_pages_with_models_can_be_read_by_anybody(
    served: tuple[Farebox, str],
    open_screen: OpenScreen,
    kind: dict[str, object],
    paths: tuple[str, ...],
) -> None:
    box, key = served
    screen = open_screen(box, **kind)
    screen.sign_in("screen@example.com")
    for path in paths:
        look(screen, path)
    call = box.get("/api/v1/usage", key).json()["data"][0]["request_id"]
    for path in (f"{USAGE}/{call}", "/admin/health", "/admin/prices", "/dashboard"):
        screen.open(path)
        assert screen.sticking_out() == []
    page = screen.open("/dashboard/billing")
    page.locator("summary").first.click()
    screen.picture()
    assert screen.sticking_out() == [] and screen.violations() == []
