"""Every error a client can meet, in both dialects, and which one wins when several are due."""

from __future__ import annotations

import ast
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pytest
from doubles import Upstream
from inprocess import STRANGERS_KEY, Background, Box, Payer
from server import OPERATOR_KEY, ROOT, Answer

import models
from core import keys, tokens
from core.adapters.forward import Forward
from core.adapters.sms import SmsAdapter
from core.errors import KINDS

# Where a route's errors are told in which dialect.
DIALECTS = {
    "/api/v1": "flat",
    "/v1": "object",
    "/api/v1/as-object": "object",
    "/v1/as-flat": "flat",
}
PREFIXES = list(DIALECTS)
JSON = {"Content-Type": "application/json"}


def config(upstream: Upstream) -> str:
    routes = "".join(
        f"""
[[routes]]
path = "{prefix}/up/*"
methods = ["GET", "POST"]
upstream = "double"
upstream_path = "/*"
credits = 3
body_bytes = 1000
{override}
[[routes]]
path = "{prefix}/sms"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
scope = "sms:send"
credits = 1
per = "sms_segment"
body_bytes = 1000
{override}
[[routes]]
path = "{prefix}/chat"
methods = ["POST"]
upstream = "sandbox"
adapter = "chat"
{override}
"""
        for prefix, override in (
            ("/api/v1", ""),
            ("/v1", ""),
            ("/api/v1/as-object", 'dialect = "object"'),
            ("/v1/as-flat", 'dialect = "flat"'),
        )
    )
    return f"""
[upstreams.double]
kind = "http"
base_url = "{upstream.url}"
timeout_seconds = 5

[upstreams.sandbox]
kind = "sandbox"
{routes}
[[models]]
id = "m"
credits_per_request = 1

[limits]
requests_per_minute = 100000
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, upstream_server: Upstream) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("instance")
    with Box(folder, config(upstream_server)) as box:
        yield box


@dataclass(frozen=True)
class Told:
    """What a client must be told."""

    status: int
    type: str
    fields: dict[str, Any] = field(default_factory=dict)
    param: str | None = None
    retry: bool = False  # whether a retry can mend it
    headers: dict[str, str] = field(default_factory=dict)  # values are regular expressions


def check(answer: Answer, code: str, dialect: str, told: Told) -> None:
    """The whole answer, body and headers, is what the contract says."""
    assert answer.status == told.status, answer
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json()
    if dialect == "object":
        message = body["error"]["message"]
        expected: dict[str, Any] = {
            "error": {
                "code": code,
                "message": message,
                "type": told.type,
                "param": told.param,
                "docs": f"http://127.0.0.1:8402/docs/errors#{code}",
            }
        }
    else:
        message = body["message"]
        expected = {"success": False, "error": code, "message": message}
        if told.param is not None:
            expected["param"] = told.param
    assert isinstance(message, str) and len(message) > 10
    assert body == expected | {"request_id": answer.headers["X-Request-Id"]} | told.fields
    assert answer.headers.get("x-should-retry") == (None if told.retry else "false")
    challenge = "Bearer" if told.status == 401 else None
    assert answer.headers.get("WWW-Authenticate") == challenge
    for name, pattern in told.headers.items():
        assert re.fullmatch(pattern, answer.headers[name]), (name, answer.headers[name])
    if told.status != 405:
        assert "Allow" not in answer.headers
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


Provoke = Callable[[Box, Upstream, str, pytest.MonkeyPatch], Answer]
CASES: list[tuple[str, str, Told, Provoke]] = []

REQUEST, AUTH, PAYMENT = "invalid_request_error", "authentication_error", "payment_error"
PERMISSION, RATE, API = "permission_error", "rate_limit_error", "api_error"
SECONDS = "[1-9][0-9]?"


def case(code: str, told: Told) -> Callable[[Provoke], Provoke]:
    """Register a way to meet an error."""

    def register(provoke: Provoke) -> Provoke:
        CASES.append((provoke.__name__, code, told, provoke))
        return provoke

    return register


def hello(box: Box, key: str | None, prefix: str) -> Answer:
    return box.post(f"{prefix}/sms", key, {"to": "+18148835337", "message": "hi"})


@case("validation_error", Told(400, REQUEST))
def a_body_that_is_no_json(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    key = box.payer().key
    return box.request("POST", f"{prefix}/sms", key=key, body=b"{oops", headers=JSON)


@case("validation_error", Told(400, REQUEST, param="to"))
def a_bad_field(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.post(f"{prefix}/sms", box.payer().key, {"to": "911", "message": "hi"})


@case("validation_error", Told(400, REQUEST, param="authorization"))
def a_malformed_credential(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.get(f"{prefix}/up/ok", f"{STRANGERS_KEY}, {STRANGERS_KEY}")


@case("invalid_host", Told(400, REQUEST))
def a_host_of_others(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.get(f"{prefix}/up/ok", box.payer().key, Host="evil.example")


@case("missing_api_key", Told(401, AUTH))
def no_credential(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.get(f"{prefix}/up/ok")


@case("invalid_api_key", Told(401, AUTH))
def an_unknown_key(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.get(f"{prefix}/up/ok", STRANGERS_KEY)


@case("invalid_token", Told(401, AUTH))
def a_bad_session_token(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.get(f"{prefix}/up/ok", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJtZSJ9.")


@case("insufficient_credits", Told(402, PAYMENT, {"credits": 2, "required": 3}))
def too_few_credits(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.get(f"{prefix}/up/ok", box.payer(2).key)


@case("key_suspended", Told(403, PERMISSION, {"reason": "leaked, it seems"}))
def a_suspended_key(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    payer = box.payer()
    box.suspend(payer.key_id, "leaked, it seems")
    return box.get(f"{prefix}/up/ok", payer.key)


@case("key_suspended", Told(403, PERMISSION, {"reason": None}))
def a_key_suspended_silently(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    payer = box.payer()
    box.suspend(payer.key_id)
    return box.get(f"{prefix}/up/ok", payer.key)


@case("account_suspended", Told(403, PERMISSION, {"reason": "unpaid"}))
def a_suspended_account(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    payer = box.payer()
    box.suspend_account(payer.account, "unpaid")
    return box.get(f"{prefix}/up/ok", payer.key)


@case("missing_scope", Told(403, PERMISSION, {"required": "sms:send"}))
def a_key_without_the_scope(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return hello(box, box.payer(scopes=["lookup"]).key, prefix)


@case(
    "credit_limit_reached",
    Told(403, PERMISSION, {"limit": 2, "period": "total", "resets_at": None}),
)
def a_key_past_its_limit(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.get(f"{prefix}/up/ok", box.payer(credit_limit=2, credit_period="total").key)


@case("not_found", Told(404, REQUEST))
def nothing_there(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    # A path without a route speaks the dialect of its path.
    return box.get(f"{prefix.removesuffix('/as-object').removesuffix('/as-flat')}/nothing")


@case("method_not_allowed", Told(405, REQUEST, headers={"Allow": "GET, POST"}))
def another_method(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.request("DELETE", f"{prefix}/up/ok", key=box.payer().key)


@case("body_too_large", Told(413, REQUEST))
def too_large_a_body(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.request("POST", f"{prefix}/up/ok", key=box.payer().key, body=b"x" * 1001)


@case("unsupported_media_type", Told(415, REQUEST))
def a_body_of_another_type(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    xml = {"Content-Type": "application/xml"}
    key = box.payer().key
    return box.request("POST", f"{prefix}/sms", key=key, body=b"<sms/>", headers=xml)


@case("unsupported_media_type", Told(415, REQUEST))
def a_compressed_body(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    coded = {"Content-Encoding": "gzip"}
    return box.request("POST", f"{prefix}/up/ok", key=box.payer().key, body=b"?", headers=coded)


@case(
    "idempotency_in_progress",
    Told(409, REQUEST, retry=True, headers={"Retry-After": SECONDS}),
)
def a_repeat_too_early(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    key, name = box.payer().key, tokens.new_id("gate")
    path = f"{prefix}/up/gated/{name}"
    first = Background(lambda: box.post(path, key, Idempotency_Key="one"))
    up.wait_for(1, name)
    answer = box.post(path, key, Idempotency_Key="one")
    up.gate(name).open()
    assert first.result().status == 200
    return answer


@case("idempotency_replay_unavailable", Told(409, REQUEST))
def a_repeat_of_a_large_answer(
    box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch
) -> Answer:
    key = box.payer().key
    path = f"{prefix}/up/big/1200000"
    assert box.post(path, key, Idempotency_Key="one").status == 200
    return box.post(path, key, Idempotency_Key="one")


@case("idempotency_key_reused", Told(422, REQUEST))
def another_request_under_the_key(
    box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch
) -> Answer:
    key = box.payer().key
    assert box.post(f"{prefix}/up/ok", key, {"a": 1}, Idempotency_Key="one").status == 200
    return box.post(f"{prefix}/up/ok", key, {"a": 2}, Idempotency_Key="one")


@case("rate_limited", Told(429, RATE, retry=True, headers={"Retry-After": SECONDS}))
def too_many_in_a_minute(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.get(f"{prefix}/up/ok", box.payer(rate_limit=0).key)


@case("rate_limited", Told(429, RATE, retry=True, headers={"Retry-After": "7"}))
def a_busy_provider(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    key = box.payer().key
    return box.post(f"{prefix}/sms", key, {"to": "+15005550429", "message": "hi"})


def _bug(*args: object) -> None:
    raise RuntimeError("SELECT secret FROM account; open('/etc/passwd')")


@case("model_not_found", Told(404, REQUEST, param="model"))
def a_model_nobody_has(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    asked = {"model": "n", "messages": [{"role": "user", "content": "hi"}]}
    return box.post(f"{prefix}/chat", box.payer().key, asked)


@case("internal_error", Told(500, API, retry=True))
def a_bug_of_ours(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    m.setattr(Forward, "outbound", _bug)
    return box.get(f"{prefix}/up/ok", box.payer().key)


@case("provider_error", Told(502, API, {"refunded": True}, retry=True))
def a_failing_upstream(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    return box.get(f"{prefix}/up/status/500", box.payer().key)


def _no_disk(*args: object) -> None:
    raise apsw.IOError("IOERR: disk I/O error reading /srv/farebox.db")


@case(
    "storage_unavailable",
    Told(503, API, retry=True, headers={"Retry-After": SECONDS}),
)
def a_broken_disk(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    payer = box.payer()
    m.setattr(models.Tx, "row", _no_disk)
    return box.get(f"{prefix}/up/ok", payer.key)


@case("overloaded", Told(503, API, retry=True, headers={"Retry-After": SECONDS}))
def too_many_new_keys(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    m.setattr(keys, "_VERIFICATIONS", 0)
    m.setattr(keys, "_PATIENCE_SECONDS", 0.01)
    m.setattr(box.instance, "verifier", keys.Verifier())
    return box.get(f"{prefix}/up/ok", box.payer().key)


@case("provider_timeout", Told(504, API, {"refunded": True}, retry=True))
def a_silent_provider(box: Box, up: Upstream, prefix: str, m: pytest.MonkeyPatch) -> Answer:
    key = box.payer().key
    return box.post(f"{prefix}/sms", key, {"to": "+15005550504", "message": "hi"})


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("name", "code", "told", "provoke"), CASES, ids=[c[0] for c in CASES])
def test_an_error_looks_as_the_contract_says(
    box: Box, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, prefix: str, name: str,
    code: str, told: Told, provoke: Provoke,
) -> None:  # fmt: skip
    answer = provoke(box, upstream, prefix, monkeypatch)
    monkeypatch.undo()
    dialect = DIALECTS[prefix]
    if name in ("nothing_there",):
        dialect = "object" if prefix.startswith("/v1") else "flat"
    check(answer, code, dialect, told)
    assert box.faults() == []


def test_every_error_of_a_paid_route_is_among_the_cases() -> None:
    # What people and pages meet has tests of its own, beside what refuses.
    elsewhere = {"conflict", "csrf_failed", "forbidden", "session_required", "signup_closed"}
    elsewhere |= {"invalid_signature", "wallet_linked"}
    elsewhere |= {code for code in KINDS if code.startswith(("payment_", "facilitator_"))}
    assert {code for _, code, _, _ in CASES} == set(KINDS) - elsewhere


def test_no_code_is_raised_that_the_table_of_errors_lacks() -> None:
    raised: dict[str, str] = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("core/**/*.py"), *ROOT.glob("blueprints/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            first = node.args[0]
            if name == "Refusal" and isinstance(first, ast.Constant):
                raised[str(first.value)] = path.name
    assert "insufficient_credits" in raised
    assert {code: where for code, where in raised.items() if code not in KINDS} == {}


@pytest.mark.parametrize(
    ("path", "dialect"), [("/api/v1/account", "flat"), ("/v1/account", "object")]
)
def test_our_own_paths_tell_errors_in_the_dialect_of_their_path(
    box: Box, path: str, dialect: str
) -> None:
    check(box.get(path), "missing_api_key", dialect, Told(401, AUTH))
    check(box.get(path, STRANGERS_KEY), "invalid_api_key", dialect, Told(401, AUTH))
    answer = box.post(path, box.payer().key)
    told = Told(405, REQUEST, headers={"Allow": "GET, HEAD, OPTIONS"})
    check(answer, "method_not_allowed", dialect, told)


def test_two_methods_of_one_path_may_speak_two_dialects(tmp_path: Path) -> None:
    config = """
[upstreams.sandbox]
kind = "sandbox"
[[routes]]
path = "/api/v1/echo"
methods = ["GET"]
upstream = "sandbox"
credits = 1
dialect = "object"
[[routes]]
path = "/api/v1/echo"
methods = ["POST"]
upstream = "sandbox"
credits = 1
"""
    with Box(tmp_path / "i", config) as box:
        check(box.get("/api/v1/echo"), "missing_api_key", "object", Told(401, AUTH))
        check(box.post("/api/v1/echo"), "missing_api_key", "flat", Told(401, AUTH))


# The seeds: two answers that were there before anything else.


def test_the_seed_answer_to_an_empty_balance(box: Box) -> None:
    answer = box.post("/api/v1/sms", box.payer(0).key, {"to": "+18148835337", "message": "hi"})
    assert answer.status == 402
    seed = {"success": False, "error": "insufficient_credits", "credits": 0, "required": 1}
    assert seed.items() <= answer.json().items()
    assert set(answer.json()) == {*seed, "message", "request_id"}
    assert answer.headers["x-should-retry"] == "false"


def test_the_seed_answers_to_who_asks_for_the_account(box: Box) -> None:
    payer = box.payer(9384)
    long, short = box.get("/api/v1/account", payer.key), box.get("/v1/account", payer.key)
    assert (long.status, short.status) == (200, 200)
    assert long.json() == {
        "credits": 9384,
        "held": 0,
        "account": payer.account,
        "privyUserId": None,
        "wallets": [],
        "usd_value": "93.84",
    }
    made = short.json().pop("api_key_created_at")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made)
    assert short.json() | {"api_key_created_at": None} == {
        "wallet": None,
        "credits_remaining": 9384,
        "usdc_value": 93.84,
        "last_topup_at": None,
        "api_key_created_at": None,
    }


# One answer for every bad key.


def bad_keys(box: Box) -> dict[str, str]:
    """One token for every way a key can be bad."""
    good, revoked, expired, suspended = (box.payer() for _ in range(4))
    box.revoke(revoked.key_id)
    box.run("UPDATE api_key SET expires_at = 1 WHERE id = :id", id=expired.key_id)
    box.suspend(suspended.key_id, "only the holder may know")
    rotated = box.payer()
    box.rotate(rotated.key_id)

    def with_another_secret(token: str) -> str:
        body = token[:18] + "".join("B" if c == "A" else "A" for c in token[18:36])
        return body + tokens._checksum(body)

    return {
        "malformed": "fare_live_tooshort",
        "mistyped": good.key[:-1] + ("1" if good.key[-1] == "0" else "0"),
        "unknown": STRANGERS_KEY,
        "revoked": revoked.key,
        "expired": expired.key,
        "rotated": rotated.key,
        "wrong secret": with_another_secret(good.key),
        "wrong secret of a suspended key": with_another_secret(suspended.key),
        "unknown kind": "sk-proj-something-else-entirely",
        "nothing": "",
        "almost the operator's": OPERATOR_KEY[:-1] + "0",
        "very long": "x" * 8000,
    }


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_revoked_key_and_an_unknown_key_get_the_same_bytes(box: Box, prefix: str) -> None:
    seen = {}
    for name, token in bad_keys(box).items():
        for path in (f"{prefix}/up/ok", f"{prefix}/sms"):
            answer = box.post(path, token, X_Request_Id="the-same")
            assert answer.status == 401, (name, answer)
            seen[name, path] = (answer.body, sorted(answer.headers.items()))
    assert len({str(told) for told in seen.values()}) == 1, seen
    check(answer, "invalid_api_key", DIALECTS[prefix], Told(401, AUTH))


def test_a_bad_key_gets_the_same_bytes_where_an_account_is_read(box: Box) -> None:
    for path in ("/api/v1/account", "/v1/account", "/api/v1/usage", "/api/v1/ledger"):
        answers = {
            box.get(path, token, X_Request_Id="the-same").body for token in bad_keys(box).values()
        }
        assert len(answers) == 1, path


# What wins when several things are wrong.

# In the order of the contract. Each entry: the fault's name, the status and code it gives.
FAULTS = {
    "path": (404, "not_found"),
    "method": (405, "method_not_allowed"),
    "size": (413, "body_too_large"),
    "encoding": (415, "unsupported_media_type"),
    "header": (400, "validation_error"),
    "revoked": (401, "invalid_api_key"),
    "suspended": (403, "key_suspended"),
    "scope": (403, "missing_scope"),
    "rate": (429, "rate_limited"),
    "body": (400, "validation_error"),
    "idempotency": (422, "idempotency_key_reused"),
    "limit": (403, "credit_limit_reached"),
    "credits": (402, "insufficient_credits"),
}
# Neither of these is said to come before the other.
SIDE_BY_SIDE = {("size", "encoding")}


def ask_with(box: Box, faults: set[str], prefix: str = "/api/v1") -> Answer:
    """A call with all of these faults at once."""
    terms: dict[str, Any] = {}
    if "rate" in faults:
        terms["rate_limit"] = 0
    if "scope" in faults:
        terms["scopes"] = []
    if "limit" in faults:
        terms |= {"credit_limit": 0, "credit_period": "total"}
    payer = box.payer(1, **terms)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {payer.key}"}
    if "idempotency" in faults:
        other, _ = box.key(payer.account)
        headers["Idempotency-Key"] = "used"
        sms = {"to": "+18148835337", "message": "another"}
        done = box.post(f"{prefix}/sms", other, sms, Idempotency_Key="used")
        assert done.status == 200, done
        if "credits" not in faults:
            box.grant(payer.account, 1)
    elif "credits" in faults:
        box.grant(payer.account, -1)
    if "suspended" in faults:
        box.suspend(payer.key_id)
    if "revoked" in faults:
        box.revoke(payer.key_id)
    if "header" in faults:
        headers["Authorization"] += ", and more"
    if "encoding" in faults:
        headers["Content-Encoding"] = "gzip"
    body = b'{"to": "+18148835337", "message": "hi"}'
    if "body" in faults:
        body = b'{"to": "911", "message": "hi"}'
    if "size" in faults:
        body += b" " * 1000
    path = f"{prefix}/sms"
    if "path" in faults:
        path += "/and/beyond"
    return box.request("PUT" if "method" in faults else "POST", path, body=body, headers=headers)


def test_each_fault_alone_is_told_as_itself(box: Box) -> None:
    for fault, told in FAULTS.items():
        answer = ask_with(box, {fault})
        assert (answer.status, answer.code) == told, (fault, answer)


@pytest.mark.parametrize("first", list(FAULTS))
def test_of_two_faults_the_contract_says_which_is_told(box: Box, first: str) -> None:
    order = list(FAULTS)
    for second in order[order.index(first) + 1 :]:
        if (first, second) in SIDE_BY_SIDE:
            continue
        answer = ask_with(box, {first, second})
        assert (answer.status, answer.code) == FAULTS[first], (first, second, answer)
        if first == "body":
            assert answer.json()["param"] == "to"
        if first == "header":
            assert answer.json()["param"] == "authorization"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_with_everything_wrong_the_faults_are_told_one_by_one(box: Box, prefix: str) -> None:
    for left in range(len(FAULTS)):
        faults = list(itertools.islice(FAULTS, left, None))
        if prefix.endswith(("as-object", "as-flat")) and faults[0] == "path":
            continue  # a path without a route has no dialect of its own
        answer = ask_with(box, set(faults), prefix)
        assert (answer.status, answer.code) == FAULTS[faults[0]], (faults[0], answer)


def test_an_unknown_path_is_404_even_with_a_query_that_cannot_be(box: Box) -> None:
    assert box.get("/api/v1/nothing?q=\x80").status == 404
    answer = box.request("PUT", "/api/v1/sms?q=\x80")
    assert answer.status == 405


def test_no_credential_is_told_after_a_missing_path_and_before_a_bad_body(box: Box) -> None:
    assert box.request("POST", "/api/v1/nothing", body=b"{").status == 404
    assert box.request("PUT", "/api/v1/sms", body=b"{").status == 405
    assert box.request("POST", "/api/v1/sms", body=b"{" * 2000).status == 413
    assert box.request("POST", "/api/v1/sms", body=b"{").code == "missing_api_key"


# What an error never says.


def leaks(answer: Answer) -> list[str]:
    """Words in an answer that only our inside knows."""
    told = answer.body.decode() + str(answer.headers)
    words = ("Traceback", "SELECT", "/etc", "/srv", "passwd", ".py", "apsw", "IOERR", "Error(")
    return [word for word in words if word in told]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "place",
    [(Forward, "outbound"), (Forward, "answer"), (Forward, "order"), (keys, "by_lookup")],
    ids=lambda place: place[1],
)
def test_a_bug_of_ours_tells_nothing_and_charges_nothing(
    box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, prefix: str,
    place: tuple[object, str],
) -> None:  # fmt: skip
    payer = box.payer(9)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(place[0], place[1], _bug)
        answer = box.get(f"{prefix}/up/ok", payer.key)
    check(answer, "internal_error", DIALECTS[prefix], Told(500, API, retry=True))
    assert leaks(answer) == []
    assert "RuntimeError" in caplog.text  # the operator is told everything
    assert answer.request_id in caplog.text
    assert box.standing(payer) == (9, 0)


def test_a_bug_in_the_sms_adapter_charges_nothing(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    payer = box.payer(9)
    with monkeypatch.context() as patch:
        patch.setattr(SmsAdapter, "answer", _bug)
        answer = hello(box, payer.key, "/api/v1")
    assert (answer.status, answer.code, leaks(answer)) == (500, "internal_error", [])
    assert box.standing(payer) == (9, 0)


@pytest.mark.parametrize(
    "error",
    [
        apsw.IOError("disk I/O error in /srv/farebox.db"),
        apsw.FullError("database or disk is full"),
        apsw.BusyError("database is locked"),
        apsw.CorruptError("database disk image is malformed"),
        apsw.CantOpenError("unable to open /srv/farebox.db"),
        apsw.NotADBError("file is not a database"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["row", "rows", "run", "connect"])
def test_database_trouble_is_503_and_never_401(
    box: Box, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, place: str, error: apsw.Error
) -> None:
    payer = box.payer(9)

    def trouble(*args: object) -> None:
        raise error

    asked = ["/api/v1/up/ok", "/v1/up/ok", "/api/v1/account", "/v1/account", "/api/v1/usage"]
    tokens_ = [payer.key, STRANGERS_KEY]
    with monkeypatch.context() as patch:
        if place == "connect":
            patch.setattr(box.instance, "db", models.Database(box.settings.database_path))
            patch.setattr(apsw, "Connection", trouble)
        else:
            patch.setattr(models.Tx, place, trouble)
        answers = [box.get(path, token) for path in asked for token in tokens_]
    for answer in answers:
        assert answer.status in (200, 401, 503)  # what reads nothing that fails may answer
        if answer.status == 503:
            assert (answer.code, answer.headers["Retry-After"]) == ("storage_unavailable", "1")
        assert leaks(answer) == []
    with_a_good_key = [answer.status for answer in answers[::2]]
    if place == "rows":
        assert with_a_good_key == [200, 200, 503, 503, 503]
    else:
        assert set(with_a_good_key) == {503}
    if place in ("row", "connect"):
        assert {answer.status for answer in answers} == {503}
        assert upstream.hits("/ok") == []
        assert box.standing(payer) == (9, 0)


def test_health_says_when_the_database_does_not_answer(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("/healthz", "/api/health"):
        assert box.get(path).status == 200
    monkeypatch.setattr(models.Tx, "row", _no_disk)
    for path in ("/healthz", "/api/health"):
        answer = box.get(path)
        check(answer, "storage_unavailable", "flat", Told(503, API, retry=True))
        assert answer.headers["Retry-After"] == "1"


def test_a_capture_the_database_cannot_take_is_503_and_given_back(
    box: Box, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    payer = box.payer(9)
    with monkeypatch.context() as patch:
        run = models.Tx.run

        def run_until_capture(tx: models.Tx, sql: str, params: Any = None) -> int:
            if "UPDATE idempotency" in sql:
                _no_disk()
            return run(tx, sql, params)

        patch.setattr(models.Tx, "run", run_until_capture)
        answer = box.post("/api/v1/up/ok", payer.key, Idempotency_Key="one")
    check(answer, "storage_unavailable", "flat", Told(503, API, retry=True))
    assert len(box.instance.unsettled) == 1
    from core import upkeep

    upkeep.settle_late(box.instance)
    assert box.standing(payer) == (9, 0)
    assert box.post("/api/v1/up/ok", payer.key, Idempotency_Key="one").status == 200


# Where an error leads.


def test_the_page_of_errors_has_an_anchor_for_every_code(box: Box) -> None:
    page = box.get("/docs/errors")
    assert page.status == 200
    assert page.headers["Content-Type"].startswith("text/html")
    ids = re.findall(r'id="([^"]+)"', page.body.decode())
    assert len(set(ids)) == len(ids)
    assert {code for _, code, _, _ in CASES} <= set(ids)
    assert set(KINDS) <= set(ids)


def test_the_link_in_an_error_uses_the_public_address(tmp_path: Path) -> None:
    with Box(tmp_path / "i", FAREBOX_PUBLIC_URL="https://pay.example.com/") as box:
        error = box.get("/v1/account", Host="pay.example.com").json()["error"]
    assert error["docs"] == "https://pay.example.com/docs/errors#missing_api_key"


def test_too_many_calls_at_once_are_told_to_wait(tmp_path: Path, upstream: Upstream) -> None:
    text = config(upstream) + "concurrent_calls = 1\n"
    with Box(tmp_path / "i", text) as box:
        payer: Payer = box.payer()
        first = Background(lambda: box.get("/v1/up/gated/crowd", payer.key))
        upstream.wait_for(1, "crowd")
        answer = box.get("/v1/up/ok", payer.key)
        told = Told(429, RATE, retry=True, headers={"Retry-After": SECONDS})
        check(answer, "rate_limited", "object", told)
        assert box.get("/v1/up/ok", OPERATOR_KEY).status == 200  # nobody's account is the limit
        upstream.gate("crowd").open()
        assert first.result().status == 200
        assert box.get("/v1/up/ok", payer.key).status == 200
