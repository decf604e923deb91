"""Signed requests (RFC 9421): what a wallet's signature opens, and that nothing else does.

Requests are signed by libraries that Farebox does not use for it (`signers.py`). Then one thing is
wrong with them: something was changed after it was signed, or what was signed is not what we ask
for. All of that is 401 `invalid_signature`; nothing is held, sent or used up by it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import apsw
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from doubles import Upstream
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import HOST, Background, Box, Clock, Payer
from llm_double import CHAT, EMBEDDINGS, LlmUpstream
from people import person
from server import OPERATOR_KEY, Answer
from signers import EvmKey, Key, SolanaKey, digest_of, signed

from core import clock, upkeep, users, wallets
from core.audit import Actor
from models import Tx

URL = f"http://{HOST}"
PRICE = 2
BODY = b'{"to": "+18148835337", "message": "hi"}'
KINDS: dict[str, Callable[[], Key]] = {"solana": SolanaKey, "eip155": EvmKey}
FLAT, OBJECT = "/api/v1/up", "/v1/up"

CONFIG = """
[instance]
signup = "open"
hosts = ["other.example"]

[upstreams.double]
kind = "http"
base_url = "{upstream}"
forward_headers = ["X-Trace"]

[upstreams.llm]
kind = "openai"
base_url = "{llm}"

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST", "PUT"]
upstream = "double"
upstream_path = "/*"
credits = 2

[[routes]]
path = "/v1/up/*"
methods = ["GET", "POST", "PUT"]
upstream = "double"
upstream_path = "/*"
credits = 2

[[routes]]
path = "/api/v1/scoped"
methods = ["GET"]
upstream = "double"
upstream_path = "/ok/scoped"
scope = "some"
credits = 2

[[routes]]
path = "/v1/chat/completions"
methods = ["POST"]
upstream = "llm"
adapter = "chat"

[[routes]]
path = "/v1/embeddings"
methods = ["POST"]
upstream = "llm"
adapter = "embeddings"

[[models]]
id = "qwen3-8b"
upstream = "llm"
upstream_model = "qwen3:8b"
credits_per_request = 8
included_output_tokens = 500
credits_per_1k_tokens = 4
max_output_tokens = 4096

[limits]
requests_per_minute = {rate}
concurrent_calls = {calls}
"""


@pytest.fixture(scope="module")
def llm() -> Iterator[LlmUpstream]:
    with LlmUpstream() as server:
        yield server


def config(upstream: Upstream, llm: LlmUpstream, rate: int = 10**6, calls: int = 128) -> str:
    return CONFIG.format(upstream=upstream.url, llm=llm.base_url, rate=rate, calls=calls)


@pytest.fixture(scope="module")
def box(
    tmp_path_factory: pytest.TempPathFactory, upstream_server: Upstream, llm: LlmUpstream
) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("signed")
    with Box(folder, config(upstream_server, llm)) as made:
        yield made


@pytest.fixture
def small_box(tmp_path: Path, upstream_server: Upstream, llm: LlmUpstream) -> Iterator[Box]:
    """Three requests a minute, two calls at once."""
    with Box(tmp_path / "small", config(upstream_server, llm, rate=3, calls=2)) as made:
        yield made


@dataclass(frozen=True)
class Holder:
    """A wallet of somebody's account, which has an API key too."""

    box: Box
    key: Key
    payer: Payer

    def ask(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        /,
        client: str = "127.0.0.1",
        **parts: Any,
    ) -> Answer:
        """One honestly signed request."""
        sent = signed(self.key, method, URL + target, body, **parts)
        return send(self.box, Asked(method, target, body, sent), client)

    def get(self, target: str, **parts: Any) -> Answer:
        return self.ask("GET", target, **parts)

    def post(self, target: str, value: object = None, **parts: Any) -> Answer:
        return self.ask("POST", target, json.dumps(value or {}).encode(), **parts)


@dataclass(frozen=True)
class Asked:
    """A request as it is sent."""

    method: str
    target: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    def having(self, **headers: str | None) -> Asked:
        """With other headers; None takes one away. Underscores in names become hyphens."""
        changed = self.headers | {k.replace("_", "-"): v for k, v in headers.items()}
        return replace(self, headers={k: v for k, v in changed.items() if v is not None})


def send(box: Box, asked: Asked, client: str = "127.0.0.1") -> Answer:
    headers = {"Content-Type": "application/json"} if asked.body else {}
    return box.request(
        asked.method, asked.target, body=asked.body or None, headers=headers | asked.headers,
        client=client,
    )  # fmt: skip


def link(box: Box, key: Key, account: str) -> None:
    """The wallet becomes the account's, as if it had signed for it."""
    namespace, _, address = key.wallet.partition(":")
    wallet = wallets.Wallet.of(namespace, address)
    box.write(lambda tx: wallets.add(tx, wallet, account, clock.now_ms()))


def holder(box: Box, kind: str, credits: int = 1000, **terms: Any) -> Holder:
    key, payer = KINDS[kind](), box.payer(credits, **terms)
    link(box, key, payer.account)
    return Holder(box, key, payer)


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def who(box: Box, kind: str) -> Holder:
    return holder(box, kind)


def refused(answer: Answer) -> bool:
    """Whether it is the one refusal for all that is wrong with a signature."""
    return (answer.status, answer.code) == (401, "invalid_signature")


def trace(box: Box, upstream: Upstream) -> list[object]:
    """All that a request could leave behind."""
    tables = ("call", "entry", "used_nonce", "rate_window", "idempotency", "audit")
    found: list[object] = [box.row(f"SELECT COUNT(*) FROM {table}")[0] for table in tables]
    return [
        *found,
        box.row("SELECT COALESCE(SUM(used), 0) FROM rate_window"),
        box.row("SELECT SUM(balance), SUM(held) FROM account"),
        len(upstream.hits()),
    ]


# What a signature opens


def test_a_wallet_reads_what_is_its_accounts(who: Holder) -> None:
    other = SolanaKey()
    link(who.box, other, who.payer.account)
    called = who.get(f"{FLAT}/ok/read")
    assert called.status == 200
    short = who.get("/v1/account").json()
    assert (short["wallet"], short["credits_remaining"]) == (who.key.address, 1000 - PRICE)
    assert short["api_key_created_at"] is None
    full = who.get("/api/v1/account").json()
    assert (full["account"], full["credits"]) == (who.payer.account, 1000 - PRICE)
    assert sorted(full["wallets"]) == sorted([who.key.wallet, other.wallet])
    record = who.get(f"/api/v1/usage/{called.request_id}").json()
    assert (record["payer"], record["key_id"]) == ("wallet", None)
    (owner,) = who.box.row("SELECT id FROM user WHERE account_id = :a", a=who.payer.account)
    assert (record["user_id"], record["captured"], record["status"]) == (owner, PRICE, "captured")
    assert who.get("/api/v1/usage?limit=1").json()["data"] == [record]
    entry = who.get("/api/v1/ledger?limit=1").json()["data"][0]
    assert (entry["kind"], entry["amount"]) == ("capture", -PRICE)
    models = who.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["qwen3-8b"]
    assert who.get("/v1/models/qwen3-8b").json()["id"] == "qwen3-8b"


def test_a_wallet_sees_all_calls_of_its_account_and_no_other(who: Holder) -> None:
    by_key = who.box.get(f"{FLAT}/ok/by-key", who.payer.key)
    stranger = holder(who.box, "solana")
    assert who.get(f"/api/v1/usage/{by_key.request_id}").json()["payer"] == "api_key"
    assert stranger.get(f"/api/v1/usage/{by_key.request_id}").status == 404


@pytest.mark.parametrize("door", [FLAT, OBJECT])
def test_a_wallet_pays_for_calls(who: Holder, upstream: Upstream, door: str) -> None:
    read = who.get(f"{door}/ok/paid?a=1&b=%20x")
    wrote = who.ask("POST", f"{door}/ok/paid", BODY)
    put = who.ask("PUT", f"{door}/ok/paid")
    left = [1000 - PRICE * n for n in (1, 2, 3)]
    for answer, remaining in zip((read, wrote, put), left, strict=True):
        assert answer.status == 200
        assert answer.headers["X-Credits-Charged"] == str(PRICE)
        assert answer.headers["X-Credits-Remaining"] == str(remaining)
        assert answer.headers["X-RateLimit-Limit"] == "1000000"
    hits = upstream.hits("/ok/paid")
    assert [hit.method for hit in hits] == ["GET", "POST", "PUT"]
    assert (hits[0].target, hits[1].body) == ("/ok/paid?a=1&b=%20x", BODY)
    assert who.box.standing(who.payer) == (1000 - 3 * PRICE, 0)


def test_nothing_of_a_signature_goes_upstream(who: Holder, upstream: Upstream) -> None:
    answer = who.ask("POST", f"{FLAT}/ok/quiet", BODY, headers={"X-Trace": "t"})
    assert answer.status == 200
    (hit,) = upstream.hits("/ok/quiet")
    told = hit.everything().lower()
    for secret in (b"signature", b"digest", who.key.address.lower().encode()):
        assert secret not in told
    assert hit.header("X-Trace") == "t"


def test_a_stream_and_a_model_are_held_and_captured(who: Holder) -> None:
    with_stream = who.get(f"{FLAT}/sse/3")
    assert with_stream.headers["X-Credits-Held"] == str(PRICE)
    assert with_stream.body.count(b"data:") == 3
    asked = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "Hello"}]}
    chat = who.post(CHAT, asked)
    assert (chat.status, chat.headers["X-Credits-Charged"]) == (200, "8")
    assert who.get(f"/api/v1/usage/{chat.request_id}").json()["model"] == "qwen3-8b"
    embedded = who.post(EMBEDDINGS, {"model": "qwen3-8b", "input": "Hello"})
    assert embedded.status == 200
    # What the wallet cannot cover is not asked for: the output is lowered, as for a key.
    left = who.box.standing(who.payer)[0]
    who.box.grant(who.payer.account, 9 - left)
    clamped = who.post(CHAT, asked)
    assert clamped.status == 200
    assert int(clamped.headers["X-Max-Tokens-Clamped"]) > 500
    assert who.box.standing(who.payer) == (1, 0)


def test_a_wallet_has_every_scope(who: Holder) -> None:
    key, _ = who.box.key(who.payer.account, scopes=["other"])
    assert who.box.get("/api/v1/scoped", key).code == "missing_scope"
    assert who.get("/api/v1/scoped").status == 200


def test_a_failed_upstream_costs_a_wallet_nothing(who: Holder) -> None:
    answer = who.get(f"{FLAT}/status/500")
    assert (answer.status, answer.code) == (502, "provider_error")
    assert who.get(f"{FLAT}/status/404").headers["X-Credits-Charged"] == "0"
    assert who.box.standing(who.payer) == (1000, 0)


def test_an_idempotency_key_is_the_accounts_whoever_signs(who: Holder, upstream: Upstream) -> None:
    """Each repeat is signed anew; and a key of the same account gets the same answer."""
    again = {"Idempotency-Key": f"again-{who.key.address}"}
    path = f"{FLAT}/ok/once"
    first = who.ask("POST", path, BODY, headers=again)
    second = who.ask("POST", path, BODY, headers=again)
    by_key = who.box.request(
        "POST",
        path,
        key=who.payer.key,
        body=BODY,
        headers=again | {"Content-Type": "application/json"},
    )
    for repeat in (second, by_key):
        assert (repeat.status, repeat.body) == (200, first.body)
        assert repeat.headers["Idempotent-Replayed"] == "true"
        assert repeat.headers["X-Credits-Charged"] == "0"
    assert len(upstream.hits("/ok/once")) == 1
    assert who.box.standing(who.payer) == (1000 - PRICE, 0)
    other = who.ask("POST", path, BODY + b" ", headers=again)
    assert (other.status, other.code) == (422, "idempotency_key_reused")
    # The same signature again is no repeat but a replay.
    asked = Asked("POST", path, BODY, signed(who.key, "POST", URL + path, BODY, headers=again))
    assert send(who.box, asked).headers["Idempotent-Replayed"] == "true"
    assert refused(send(who.box, asked))


def test_a_wallets_minute_is_its_accounts(small_box: Box, kind: str) -> None:
    who = holder(small_box, kind)
    second = holder(small_box, "solana")
    for left in (2, 1, 0):
        answer = who.get(f"{FLAT}/ok/rate")
        assert answer.status == 200
        assert answer.headers["X-RateLimit-Limit"] == "3"
        assert answer.headers["X-RateLimit-Remaining"] == str(left)
    over = who.get(f"{FLAT}/ok/rate")
    assert (over.status, over.code) == (429, "rate_limited")
    assert 0 < int(over.headers["Retry-After"]) <= 60
    # Reading has a minute of its own, and so has another account's wallet, and the key.
    assert who.get("/v1/account").headers["X-RateLimit-Remaining"] == "2"
    assert second.get(f"{FLAT}/ok/rate").status == 200
    assert small_box.get(f"{FLAT}/ok/rate", who.payer.key).status == 200
    assert small_box.standing(who.payer) == (1000 - 4 * PRICE, 0)


def test_two_wallets_of_one_account_share_its_minute(small_box: Box) -> None:
    one = holder(small_box, "solana")
    two = Holder(small_box, EvmKey(), one.payer)
    link(small_box, two.key, one.payer.account)
    assert [who.get(f"{FLAT}/ok/rate").status for who in (one, two, one, two)] == [200] * 3 + [429]


def test_a_wallet_has_the_owners_limit(box: Box, kind: str) -> None:
    owner = person(box, 100)
    who = Holder(box, KINDS[kind](), Payer(owner.email, owner.account, "", ""))
    link(box, who.key, owner.account)
    box.run(
        "UPDATE membership SET credit_limit = 5, credit_period = 'day' WHERE id = :id",
        id=owner.member_id,
    )
    assert [who.get(f"{FLAT}/ok/limit").status for _ in range(2)] == [200, 200]
    over = who.get(f"{FLAT}/ok/limit")
    assert (over.status, over.code, over.json()["limit"]) == (403, "credit_limit_reached", 5)
    # It is one limit with the person's keys and tokens.
    assert box.get(f"{FLAT}/ok/limit", owner.token).code == "credit_limit_reached"
    assert box.standing(owner.account) == (96, 0)


def test_a_wallet_has_no_more_calls_at_once_than_its_account(
    small_box: Box, upstream: Upstream
) -> None:
    who = holder(small_box, "solana")
    small_box.run("UPDATE rate_window SET used = 0")
    first = [Background(lambda: who.get(f"{FLAT}/gated/at-once")) for _ in range(2)]
    upstream.wait_for(2, "/gated/at-once")
    over = who.get(f"{FLAT}/gated/at-once")
    assert (over.status, over.code) == (429, "rate_limited")
    upstream.gate("at-once").open()
    assert [each.result().status for each in first] == [200, 200]


def test_credits_that_are_not_there_are_refused(box: Box, kind: str, upstream: Upstream) -> None:
    who = holder(box, kind, credits=PRICE - 1)
    answer = who.get(f"{FLAT}/ok/poor")
    assert (answer.status, answer.code) == (402, "insufficient_credits")
    assert (answer.json()["credits"], answer.json()["required"]) == (PRICE - 1, PRICE)
    assert answer.headers["x-should-retry"] == "false"
    assert upstream.hits("/ok/poor") == []


def test_a_suspended_account_or_person_is_refused_by_reason(box: Box, kind: str) -> None:
    who = holder(box, kind)
    box.suspend_account(who.payer.account, "unpaid")
    for target in (f"{FLAT}/ok/x", "/v1/account"):
        answer = who.get(target)
        assert (answer.status, answer.code) == (403, "account_suspended")
        assert "unpaid" in answer.body.decode()
    box.run("UPDATE account SET status = 'active' WHERE id = :id", id=who.payer.account)
    suspend = "UPDATE user SET status = 'suspended', status_reason = 'why' WHERE account_id = :id"
    box.run(suspend, id=who.payer.account)
    answer = who.get(f"{FLAT}/ok/x")
    assert (answer.status, answer.code, answer.json()["reason"]) == (
        403,
        "account_suspended",
        "why",
    )
    # Whoever has not signed is told nothing of that.
    stranger = signed(KINDS[kind](), "GET", f"{URL}{FLAT}/ok/x", keyid=who.key.wallet)
    assert refused(send(box, Asked("GET", f"{FLAT}/ok/x", b"", stranger)))


def test_a_wallet_of_a_closed_or_another_account_pays_nothing_of_the_old(
    box: Box, kind: str
) -> None:
    who = holder(box, kind)
    account, by = who.payer.account, Actor("operator", None, True)
    (user_id,) = box.row("SELECT id FROM user WHERE account_id = :a", a=account)
    box.write(lambda tx: users.close(tx, users.get(tx, user_id), clock.now_ms(), by))
    answer = who.get("/v1/account")
    assert refused(answer)
    assert "not known here" in answer.json()["error"]["message"]
    other = box.payer(10)
    link(box, who.key, other.account)
    assert who.get("/api/v1/account").json()["account"] == other.account


def test_an_account_without_a_person_is_spent_by_its_wallet(box: Box, kind: str) -> None:
    """Such as a payment has opened."""
    key = KINDS[kind]()
    namespace, _, address = key.wallet.partition(":")
    wallet = wallets.Wallet.of(namespace, address)
    account = box.write(lambda tx: wallets.take_in(tx, wallet, clock.now_ms()))
    box.grant(account, 2 * PRICE)
    who = Holder(box, key, Payer("", account, "", ""))
    assert [who.get(f"{FLAT}/ok/lone").status for _ in range(3)] == [200, 200, 402]
    record = who.get("/api/v1/usage?limit=1").json()["data"][0]
    assert (record["payer"], record["user_id"]) == ("wallet", None)
    assert who.get("/v1/account").json()["wallet"] == key.address


def test_a_wallet_that_is_unlinked_while_it_is_believed_pays_nothing(
    box: Box, kind: str, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between who it is and the hold lies a moment, in which all of these can happen."""
    from core import gateway

    real = gateway.admit
    changes = {
        "unlinked": "DELETE FROM wallet WHERE account_id = :a",
        "moved": "UPDATE wallet SET account_id = :other WHERE account_id = :a",
        "person suspended": "UPDATE user SET status = 'suspended' WHERE account_id = :a",
        "account suspended": "UPDATE account SET status = 'suspended' WHERE id = :a",
    }
    for name, change in changes.items():
        who, other = holder(box, kind), box.payer(1000)
        known = {"a": who.payer.account} | ({"other": other.account} if ":other" in change else {})

        def admit(tx: Tx, *rest: Any, change: str = change, known: Any = known) -> Any:
            tx.run(change, known)
            return real(tx, *rest)

        monkeypatch.setattr(gateway, "admit", admit)
        answer = who.get(f"{FLAT}/ok/between")
        monkeypatch.setattr(gateway, "admit", real)
        assert answer.status in (401, 403), name
        assert answer.code in ("invalid_signature", "account_suspended"), name
        assert box.standing(who.payer) == box.standing(other) == (1000, 0), name
    assert upstream.hits("/ok/between") == []


# What it does not open

# Who signs may read these; all others under the API's paths manage, or are for everybody.
READABLE = {
    "/api/v1/account", "/v1/account", "/api/v1/usage", "/api/v1/usage/<request_id>",
    "/api/v1/ledger", "/v1/models", "/v1/models/<path:model_id>",
}  # fmt: skip
FOR_ALL = {"/api/health", "/api/v1/wallets/challenge", "/api/v1/credits/top-up"}


def test_a_signature_manages_nothing(who: Holder) -> None:
    """Every endpoint there is, from the routes themselves."""
    managing = [
        (method, re.sub(r"<[^>]+>", "nothing", rule.rule))
        for rule in who.box.app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"OPTIONS", "HEAD"})
        if rule.rule.startswith(("/api/", "/v1/")) and rule.rule not in READABLE | FOR_ALL
    ]
    assert len(managing) >= 20
    for method, path in managing:
        body = b"" if method in ("GET", "DELETE") else b"{}"
        answer = who.ask(method, path, body)
        assert (answer.status, answer.code) == (403, "session_required"), (method, path)
    # A bad one hears of that first.
    forged = signed(KINDS[who.key.namespace](), "GET", f"{URL}/api/v1/keys", keyid=who.key.wallet)
    assert refused(send(who.box, Asked("GET", "/api/v1/keys", b"", forged)))


def test_what_is_readable_is_all_there_is(box: Box) -> None:
    rules = {rule.rule for rule in box.app.url_map.iter_rules()}
    assert rules >= READABLE | FOR_ALL


def test_a_bearer_decides_whatever_is_signed(who: Holder) -> None:
    path = f"{FLAT}/ok/beside"
    good = Asked("GET", path, b"", signed(who.key, "GET", URL + path))
    with_bad = send(who.box, good.having(Authorization="Bearer fare_live_nothing"))
    assert (with_bad.status, with_bad.code) == (401, "invalid_api_key")
    other = who.box.payer(10)
    with_other = send(who.box, good.having(Authorization=f"Bearer {other.key}"))
    assert with_other.status == 200
    assert who.box.standing(other) == (10 - PRICE, 0)
    forged = good.having(Signature="sig=:AAAA:", Authorization=f"Bearer {other.key}")
    assert send(who.box, forged).status == 200
    operator = send(who.box, good.having(Authorization=f"Bearer {OPERATOR_KEY}"))
    assert operator.status == 200
    # None of that has used the signature up; nor does another scheme stand before it.
    assert who.box.standing(who.payer) == (1000, 0)
    assert send(who.box, good.having(Authorization="Basic dTpw")).status == 200
    assert who.box.standing(who.payer) == (1000 - PRICE, 0)


# What was tampered with


@dataclass
class Honest:
    """A request as its wallet would sign it, and what somebody can make of it. Whatever is signed
    here has the same nonce and the same time."""

    key: Key
    other: Key  # of another account here, of the same kind
    stranger: Key  # nobody here knows it
    door: str
    nonce: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    body: bytes = BODY

    @property
    def target(self) -> str:
        return f"{self.door}/ok/{self.nonce}?a=1&b=2"

    @property
    def url(self) -> str:
        return URL + self.target

    def asked(self, url: str | None = None, **changes: Any) -> Asked:
        """Signed by its wallet; what is changed, is changed before."""
        signer, body = changes.pop("signer", self.key), changes.pop("body", self.body)
        said = {"created": self.created, "nonce": self.nonce} | changes
        sent = signed(signer, "POST", self.url if url is None else url, body, **said)
        return Asked("POST", self.target, body, sent)

    def by_hand(
        self, covered: str, parameters: str | None = None, lines: list[str] | None = None,
        end: str = "", label: str = "sig", mark: str = "",
    ) -> Asked:  # fmt: skip
        """As `asked`, of parts that no library would write: what is covered, to the letter, with
        the lines it stands for, and the parameters."""
        if parameters is None:
            parameters = self.parameters
        digest = digest_of(self.body)
        known = {
            '"@method"': "POST", '"@target-uri"': self.url, '"content-digest"': digest,
            '"@authority"': HOST, '"content-type"': "application/json",
        }  # fmt: skip
        if lines is None:
            lines = [f"{name}: {known.get(name, '')}" for name in covered.split()]
        base = "\n".join([*lines, f'"@signature-params": ({covered}){parameters}']) + end
        signature = base64.b64encode(self.key.sign(base.encode("latin-1"))).decode()
        return Asked(
            "POST", self.target, self.body,
            {
                "Content-Digest": digest,
                "Signature-Input": f"{label}={mark}({covered}){parameters}",
                "Signature": f"{label}=:{signature}:",
            },
        )  # fmt: skip

    @property
    def parameters(self) -> str:
        return (
            f';created={self.created};keyid="{self.key.wallet}";nonce="{self.nonce}";tag="farebox"'
        )

    @property
    def all(self) -> str:
        return '"@method" "@target-uri" "content-digest"'

    def said(self, old: str, new: str, covered: str | None = None) -> Asked:
        """Parameters of which something is put otherwise, and signed so."""
        assert old in self.parameters
        return self.by_hand(covered or self.all, self.parameters.replace(old, new))

    def input(self, old: str, new: str) -> Asked:
        """Signature-Input changed after it was signed."""
        asked = self.asked()
        assert old in asked.headers["Signature-Input"]
        changed = asked.headers["Signature-Input"].replace(old, new)
        return asked.having(Signature_Input=changed)

    def signature(self, change: Callable[[bytes], bytes]) -> Asked:
        """The signature's bytes changed."""
        asked = self.asked()
        raw = base64.b64decode(asked.headers["Signature"][5:-1])
        changed = change(raw)
        assert changed != raw
        return asked.having(Signature=f"sig=:{base64.b64encode(changed).decode()}:")

    def signature_text(self, change: Callable[[str], str]) -> Asked:
        """The header changed."""
        asked = self.asked()
        text = asked.headers["Signature"]
        changed = change(text)
        assert changed != text
        return asked.having(Signature=changed)


def flipped(place: int, bit: int = 1) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :]


def swapped_case(address: str) -> str:
    """With the case of one letter changed, so that it spells another address."""
    for place, letter in enumerate(address):
        other = letter.swapcase()
        if place > 5 and letter.isalpha() and other not in "IlO":
            return address[:place] + other + address[place + 1 :]
    raise AssertionError(address)


def elsewhere(start: str) -> Callable[[Honest], Asked]:
    """Signed for an address that begins otherwise."""
    return lambda honest: honest.asked(url=start + honest.target)


def moved(target: Callable[[str], str]) -> Callable[[Honest], Asked]:
    """Sent to another address than the one that was signed."""

    def change(honest: Honest) -> Asked:
        asked = honest.asked()
        assert target(asked.target) != asked.target
        return replace(asked, target=target(asked.target))

    return change


def digest(change: Callable[[str], str | None]) -> Callable[[Honest], Asked]:
    """Content-Digest changed after it was signed."""

    def tamper(honest: Honest) -> Asked:
        asked = honest.asked()
        return asked.having(Content_Digest=change(asked.headers["Content-Digest"]))

    return tamper


def digested(text: Callable[[bytes], str]) -> Callable[[Honest], Asked]:
    """Another Content-Digest, and signed so."""
    return lambda honest: honest.asked(headers={"Content-Digest": text(honest.body)})


def raw_digest(body: bytes, algorithm: str) -> str:
    return base64.b64encode(hashlib.new(algorithm, body).digest()).decode()


def padded_otherwise(text: str) -> str:
    """The same bytes in base64, in a spelling whose unused bits are not zero."""
    found = re.fullmatch(r"(.*)([A-Za-z0-9+/])(=+)(:)", text)
    assert found is not None
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    changed = f"{found[1]}{alphabet[alphabet.index(found[2]) + 1]}{found[3]}{found[4]}"
    before, after = (base64.b64decode(each.split(":")[1]) for each in (text, changed))
    assert before == after
    return changed


def twice(honest: Honest, first: str, second: str) -> Asked:
    """Two signatures in one request, both of them good, or the same."""
    one, two = (honest.asked(label=label, nonce=honest.nonce) for label in (first, second))
    return one.having(
        Signature_Input=f"{one.headers['Signature-Input']}, {two.headers['Signature-Input']}",
        Signature=f"{one.headers['Signature']}, {two.headers['Signature']}",
    )


def with_a_strangers(honest: Honest) -> Asked:
    one, two = honest.asked(), honest.asked(signer=honest.stranger, label="b")
    return one.having(
        Signature_Input=f"{two.headers['Signature-Input']}, {one.headers['Signature-Input']}",
        Signature=f"{two.headers['Signature']}, {one.headers['Signature']}",
    )


M, T, D = '"@method"', '"@target-uri"', '"content-digest"'
TAMPERED: dict[str, Callable[[Honest], Asked]] = {
    # The request
    "another method": lambda h: replace(h.asked(), method="PUT"),
    "another path": moved(lambda t: t.replace("/ok/", "/ok/x")),
    "a path in other case": moved(lambda t: t.replace("/ok/", "/OK/")),
    "a path with an escape": moved(lambda t: t.replace("/ok/", "/o%6b/")),
    "a path with a slash at its end": moved(lambda t: t.replace("?", "/?")),
    "the other dialect's path": moved(
        lambda t: t.removeprefix("/api") if t.startswith("/api") else f"/api{t}"
    ),
    "a query with something added": moved(lambda t: f"{t}&c=3"),
    "a query with an ampersand added": moved(lambda t: f"{t}&"),
    "a query with something removed": moved(lambda t: t.replace("&b=2", "")),
    "no query": moved(lambda t: t.partition("?")[0]),
    "a query in other order": moved(lambda t: t.replace("a=1&b=2", "b=2&a=1")),
    "a query with an escape": moved(lambda t: t.replace("a=1", "%61=1")),
    "a query with something changed": moved(lambda t: t.replace("b=2", "b=3")),
    "a query twice": moved(lambda t: f"{t}?{t.partition('?')[2]}"),
    "another host of ours": elsewhere("http://other.example"),
    "another name of this host": elsewhere("http://localhost:8402"),
    "another scheme": elsewhere(f"https://{HOST}"),
    "a scheme in other case": elsewhere(f"HTTP://{HOST}"),
    "another port": elsewhere("http://127.0.0.1:8403"),
    "no port": elsewhere("http://127.0.0.1"),
    "the default port beside ours": elsewhere("http://127.0.0.1:80"),
    "somebody's name before the host": elsewhere(f"http://me@{HOST}"),
    "no origin": elsewhere(""),
    "another origin's end": elsewhere(f"http://evil.example/{URL}"),
    "an address with a fragment": lambda h: h.asked(url=f"{h.url}#x"),
    "another authority": lambda h: h.by_hand(
        f'{h.all} "@authority"', None,
        [f"{M}: POST", f"{T}: {h.url}", f"{D}: {digest_of(h.body)}", '"@authority": localhost'],
    ),
    # The body
    "a byte of the body": lambda h: replace(h.asked(), body=BODY.replace(b"hi", b"ho")),
    "a byte more": lambda h: replace(h.asked(), body=BODY + b" "),
    "a byte less": lambda h: replace(h.asked(), body=BODY[:-1]),
    "no body": lambda h: replace(h.asked(), body=b""),
    "a body where there was none": lambda h: replace(h.asked(body=b""), body=BODY),
    "a body whose digest is not covered": lambda h: h.by_hand(f"{M} {T}"),
    "another body, its digest not covered": lambda h: replace(
        h.by_hand(f"{M} {T}"), body=b"{}"
    ).having(Content_Digest=digest_of(b"{}")),
    "another body with its digest": lambda h: replace(h.asked(), body=b"{}").having(
        Content_Digest=digest_of(b"{}")
    ),
    "another body's digest": digest(lambda _: digest_of(b"{}")),
    "the digest of nothing": digested(lambda _: digest_of(b"")),
    "no digest header": digest(lambda _: None),
    "an empty digest header": digested(lambda _: ""),
    "a digest of no algorithm of ours": digested(
        lambda b: f"sha=:{raw_digest(b, 'sha1')}:, md5=:{raw_digest(b, 'md5')}:"
    ),
    "a digest by its old name": digested(lambda b: f"SHA-256=:{raw_digest(b, 'sha256')}:"),
    "a digest as Digest had it": digested(lambda b: f"sha-256={raw_digest(b, 'sha256')}"),
    "a digest as a string": digested(lambda b: f'sha-256="{raw_digest(b, "sha256")}"'),
    "a digest in hexadecimal": digested(lambda b: f"sha-256=:{hashlib.sha256(b).hexdigest()}:"),
    "a digest cut short": digested(
        lambda b: f"sha-256=:{base64.b64encode(hashlib.sha256(b).digest()[:30]).decode()}:"
    ),
    "a digest of another length": digested(lambda b: f"sha-256=:{raw_digest(b, 'sha512')}:"),
    "a digest with a parameter": digested(lambda b: f"{digest_of(b)};x=1"),
    "a digest with a comma after it": digested(lambda b: f"{digest_of(b)},"),
    "a digest in another spelling": digested(lambda b: padded_otherwise(digest_of(b))),
    "a digest without its padding": digested(lambda b: digest_of(b).replace("=:", ":", 1)[:-2]),
    "a good digest and a bad one": digested(
        lambda b: f"{digest_of(b)}, {digest_of(b'{}', 'sha-512')}"
    ),
    "a bad digest and a good one": digested(
        lambda b: f"{digest_of(b'{}', 'sha-512')}, {digest_of(b)}"
    ),
    "two digests with two spaces": digested(
        lambda b: f"{digest_of(b)},  {digest_of(b, 'sha-512')}"
    ),
    "a digest twice": digested(lambda b: f"{digest_of(b)}, {digest_of(b)}"),
    "a digest added": digest(lambda d: f"{d}, {digest_of(BODY, 'sha-512')}"),
    # When
    "a stale one": lambda h: h.asked(created=h.created - 302),
    "one of the future": lambda h: h.asked(created=h.created + 330),
    "one of no time": lambda h: h.asked(created=None),
    "a time as a string": lambda h: h.asked(created=str(h.created)),
    "a time with a fraction": lambda h: h.said(f"{h.created}", f"{h.created}.5"),
    "a time before all": lambda h: h.asked(created=-h.created),
    "the beginning of time": lambda h: h.asked(created=0),
    "a time with zeros before it": lambda h: h.said(f"={h.created}", f"=00{h.created}"),
    "a time as a date": lambda h: h.said(f"={h.created}", f"=@{h.created}"),
    "a time that is too long": lambda h: h.said(f"={h.created}", "=1234567890123456"),
    "a number of its own that is too long": lambda h: h.said(
        ";keyid", ";own=1234567890123456;keyid"
    ),
    "a time in milliseconds": lambda h: h.asked(created=h.created * 1000),
    "only true that it was created": lambda h: h.said(f"created={h.created}", "created"),
    "another time after it was signed": lambda h: h.input(str(h.created), str(h.created - 1)),
    "no time after it was signed": lambda h: h.input(f";created={h.created}", ""),
    "one that has expired": lambda h: h.asked(expires=h.created - 1),
    "one that expires now": lambda h: h.asked(expires=h.created),
    "an end as a string": lambda h: h.asked(expires=str(h.created + 60)),
    "a later end after it was signed": lambda h: h.input(
        f";created={h.created}", f";created={h.created};expires={h.created + 60}"
    ),
    # The nonce
    "no nonce": lambda h: h.asked(nonce=None),
    "an empty nonce": lambda h: h.asked(nonce=""),
    "a nonce that is too long": lambda h: h.asked(nonce="n" * 256),
    "a nonce that is a number": lambda h: h.asked(nonce=12345),
    "a nonce that is a token": lambda h: h.said(f'"{h.nonce}"', "abc"),
    "another nonce after it was signed": lambda h: h.input(h.nonce, "another"),
    "no nonce after it was signed": lambda h: h.input(f';nonce="{h.nonce}"', ""),
    # Who
    "another's name after it was signed": lambda h: h.input(h.key.wallet, h.other.wallet),
    "another's name": lambda h: h.asked(keyid=h.other.wallet),
    "a signature of another": lambda h: h.asked(signer=h.other, keyid=h.key.wallet),
    "a stranger": lambda h: h.asked(signer=h.stranger, keyid=h.stranger.wallet),
    "a stranger by our name": lambda h: h.asked(signer=h.stranger, keyid=h.key.wallet),
    "no name": lambda h: h.asked(keyid=None),
    "an empty name": lambda h: h.asked(keyid=""),
    "a number for a name": lambda h: h.asked(keyid=7),
    "an address alone": lambda h: h.asked(keyid=h.key.address),
    "another namespace": lambda h: h.asked(
        keyid=f"{'solana' if h.key.namespace == 'eip155' else 'eip155'}:{h.key.address}"
    ),
    "a namespace in other case": lambda h: h.asked(
        keyid=f"{h.key.namespace.title()}:{h.key.address}"
    ),
    "a namespace with its network": lambda h: h.asked(
        keyid=f"{h.key.namespace}:8453:{h.key.address}"
    ),
    "a name with a space": lambda h: h.asked(keyid=f"{h.key.wallet} "),
    "a name with a letter too few": lambda h: h.asked(keyid=h.key.wallet[:-1]),
    "a name with a letter too many": lambda h: h.asked(keyid=f"{h.key.wallet}1"),
    "the key of all zeros": lambda h: h.asked(
        keyid=f"solana:{'1' * 32}" if h.key.namespace == "solana" else f"eip155:0x{'0' * 40}"
    ),
    # What for
    "no tag": lambda h: h.asked(tag=None),
    "another tag": lambda h: h.asked(tag="web-bot-auth"),
    "a tag in other case": lambda h: h.asked(tag="Farebox"),
    "a longer tag": lambda h: h.asked(tag="farebox-2"),
    "a tag that is a token": lambda h: h.said('tag="farebox"', "tag=farebox"),
    "no tag after it was signed": lambda h: h.input(';tag="farebox"', ""),
    "the other's algorithm": lambda h: h.asked(
        alg="ed25519" if h.key.namespace == "eip155" else "eip191"
    ),
    "an algorithm nobody here has": lambda h: h.asked(alg="hmac-sha256"),
    "an algorithm in other case": lambda h: h.asked(alg=h.key.algorithm.upper()),
    "an empty algorithm": lambda h: h.asked(alg=""),
    "a number for an algorithm": lambda h: h.asked(alg=1),
    "an algorithm after it was signed": lambda h: h.input(
        ';tag="farebox"', f';tag="farebox";alg="{h.key.algorithm}"'
    ),
    # What is covered
    "no method": lambda h: h.by_hand(f"{T} {D}"),
    "no address": lambda h: h.by_hand(f"{M} {D}"),
    "its parts for an address": lambda h: h.asked(
        components=["@method", "@authority", "@path", "@query", "content-digest"]
    ),
    "no digest": lambda h: h.by_hand(f"{M} {T}"),
    "nothing": lambda h: h.by_hand("", lines=[]),
    "the method alone": lambda h: h.by_hand(M),
    "the method twice": lambda h: h.by_hand(f"{M} {T} {D} {M}"),
    "the digest twice": lambda h: h.by_hand(f"{M} {T} {D} {D}"),
    "the list in other order after it was signed": lambda h: h.input(f"{M} {T}", f"{T} {M}"),
    "the list shortened after it was signed": lambda h: h.input(f"{M} {T} {D}", f"{M} {T}"),
    "something covered after it was signed": lambda h: h.input(D, f'{D} "content-type"'),
    "a component nobody knows": lambda h: h.by_hand(f'{h.all} "@scheme"'),
    "the whole target by its form": lambda h: h.by_hand(f'{h.all} "@request-target"'),
    "a status": lambda h: h.by_hand(f'{h.all} "@status"'),
    "a query's parameter": lambda h: h.by_hand(
        f'{h.all} "@query-param";name="a"', None,
        [f"{M}: POST", f"{T}: {h.url}", f"{D}: {digest_of(h.body)}", '"@query-param";name="a": 1'],
    ),
    "the signature's own parameters": lambda h: h.by_hand(f'{h.all} "@signature-params"'),
    "a component with a parameter": lambda h: h.by_hand(f"{M};req {T} {D}"),
    "a header in bytes": lambda h: h.by_hand(
        f"{M} {T} {D};bs", None,
        [f"{M}: POST", f"{T}: {h.url}", f"{D};bs: {digest_of(h.body)}"],
    ),
    "a header in capitals": lambda h: h.by_hand(
        f'{M} {T} "Content-Digest"', None,
        [f"{M}: POST", f"{T}: {h.url}", f'"Content-Digest": {digest_of(h.body)}'],
    ),
    "a header that is not there": lambda h: h.by_hand(f'{h.all} "x-nothing"'),
    "a header taken away": lambda h: h.asked(
        headers={"X-Told": "1"}, components=["@method", "@target-uri", "content-digest", "x-told"]
    ).having(X_Told=None),
    "a header changed": lambda h: h.asked(
        headers={"X-Told": "1"}, components=["@method", "@target-uri", "content-digest", "x-told"]
    ).having(X_Told="2"),
    "a list without quotes": lambda h: h.by_hand(h.all.replace('"', "")),
    # Labels
    "another label": lambda h: h.signature_text(lambda t: t.replace("sig=", "sig1=")),
    "a label in capitals": lambda h: h.asked(label="Sig"),
    "an empty label": lambda h: h.asked(label=""),
    "two signatures": lambda h: twice(h, "sig", "two"),
    "two signatures the other way round": lambda h: twice(h, "two", "sig"),
    "two signatures of one label": lambda h: twice(h, "sig", "sig"),
    "a stranger's signature before it": with_a_strangers,
    "a second list that nothing is signed by": lambda h: h.input(
        ';tag="farebox"', f';tag="farebox", two=({h.all}){h.parameters}'
    ),
    "something after the list": lambda h: h.input(';tag="farebox"', ';tag="farebox",'),
    "a second signature that nothing tells of": lambda h: h.signature_text(
        lambda t: f"{t}, two={t.removeprefix('sig=')}"
    ),
    "Signature-Input alone": lambda h: h.asked().having(Signature=None),
    "Signature alone": lambda h: h.asked().having(Signature_Input=None),
    "an empty Signature-Input": lambda h: h.asked().having(Signature_Input=""),
    "an empty Signature": lambda h: h.asked().having(Signature=""),
    # Spelled otherwise
    "a space after a semicolon": lambda h: h.said(";keyid", "; keyid"),
    "a space before a semicolon": lambda h: h.said(";keyid", " ;keyid"),
    "two spaces in the list": lambda h: h.by_hand(h.all.replace(" ", "  ")),
    "a space at the list's end": lambda h: h.by_hand(f"{h.all} "),
    "a space at its beginning": lambda h: h.by_hand(f" {h.all}"),
    "a comma in the list": lambda h: h.by_hand(
        f"{M}, {T}, {D}", None, [f"{M}: POST", f"{T}: {h.url}", f"{D}: {digest_of(h.body)}"]
    ),
    "a comma at the end": lambda h: h.said('tag="farebox"', 'tag="farebox",'),
    "a parameter without a value": lambda h: h.said(";keyid", ";x;keyid"),
    "a parameter of a list": lambda h: h.said(";keyid", ";x=(1);keyid"),
    "a parameter in capitals": lambda h: h.said(";nonce", ";Nonce"),
    "a parameter's escape": lambda h: h.said(f'"{h.nonce}"', f'"{h.nonce}\\""'),
    "a parameter's backslash": lambda h: h.said(f'"{h.nonce}"', f'"{h.nonce}\\\\"'),
    "other quotes": lambda h: h.said('"farebox"', "'farebox'"),
    "a letter that is not ASCII": lambda h: h.said(f'"{h.nonce}"', f'"{h.nonce}é"'),
    "a label with a space": lambda h: h.by_hand(h.all, mark=" "),
    "a time twice": lambda h: h.said(";keyid", f";created={h.created};keyid"),
    "two times": lambda h: h.said(";keyid", ";created=1;keyid"),
    "a nonce twice": lambda h: h.said(";tag", ';nonce="a";tag'),
    "two names": lambda h: h.said(";nonce", f';keyid="{h.other.wallet}";nonce'),
    "a line break in what was signed": lambda h: h.by_hand(h.all, end="\n"),
    "line breaks of another kind": lambda h: h.by_hand(
        h.all, None, ["\r\n".join([f"{M}: POST", f"{T}: {h.url}", f"{D}: {digest_of(h.body)}"])]
    ),
    "what was signed in other order": lambda h: h.by_hand(
        h.all, None, [f"{T}: {h.url}", f"{M}: POST", f"{D}: {digest_of(h.body)}"]
    ),
    "a method in small letters": lambda h: h.by_hand(
        h.all, None, [f"{M}: post", f"{T}: {h.url}", f"{D}: {digest_of(h.body)}"]
    ),
    # The signature itself
    "a signature cut short": lambda h: h.signature(lambda raw: raw[:-1]),
    "a signature cut at its beginning": lambda h: h.signature(lambda raw: raw[1:]),
    "half a signature": lambda h: h.signature(lambda raw: raw[:32]),
    "a byte after the signature": lambda h: h.signature(lambda raw: raw + b"\0"),
    "a byte before the signature": lambda h: h.signature(lambda raw: b"\0" + raw),
    "the signature twice": lambda h: h.signature(lambda raw: raw + raw),
    "zeros for a signature": lambda h: h.signature(lambda raw: bytes(len(raw))),
    "ones for a signature": lambda h: h.signature(lambda raw: b"\xff" * len(raw)),
    "no signature": lambda h: h.asked().having(Signature="sig=::"),
    "its halves exchanged": lambda h: h.signature(lambda raw: raw[32:64] + raw[:32] + raw[64:]),
    **{
        f"bit {bit} of byte {place}": (lambda p, b: lambda h: h.signature(flipped(p, 1 << b)))(
            place, bit
        )
        for place, bit in ((0, 0), (0, 7), (16, 3), (31, 7), (32, 0), (47, 5), (63, 0), (63, 5))
    },
    "a signature in another spelling": lambda h: h.signature_text(padded_otherwise),
    "a signature without its padding": lambda h: h.signature_text(
        lambda t: t.rstrip(":=") + ":"
    ),
    "a signature with too much padding": lambda h: h.signature_text(lambda t: t[:-1] + "==:"),
    "a signature for addresses": lambda h: h.asked().having(
        Signature="sig=:" + base64.urlsafe_b64encode(b"\xfb\xef" + secrets.token_bytes(62)).decode()
        + ":"
    ),
    "a signature without colons": lambda h: h.signature_text(lambda t: t.replace(":", "")),
    "a signature as a string": lambda h: h.signature_text(lambda t: t.replace(":", '"')),
    "a signature with a parameter": lambda h: h.signature_text(lambda t: f"{t};x=1"),
    "a signature with a comma": lambda h: h.signature_text(lambda t: f"{t},"),
    "another request's signature": lambda h: h.asked().having(
        Signature=h.asked(url=f"{h.url}x").headers["Signature"]
    ),
    "another request's list": lambda h: h.asked().having(
        Signature_Input=h.asked(nonce="another").headers["Signature-Input"]
    ),
    "what was signed was a digest of it": lambda h: h.signature(lambda raw: h.key.sign(raw)),
    # Too much
    "a Signature-Input that is too long": lambda h: h.asked(
        **{f"x{n}": "y" * 250 for n in range(40)}
    ),
    "a Signature that is too long": lambda h: h.signature_text(
        lambda t: t[:-1] + "A" * 10_000 + ":"
    ),
}  # fmt: skip


def high_s(raw: bytes) -> bytes:
    """The twin of a signature on secp256k1: the other root, and the other sign."""
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    s = order - int.from_bytes(raw[32:64], "big")
    return raw[:32] + s.to_bytes(32, "big") + bytes([27 + 28 - raw[64]])


def with_v(v: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:64] + bytes([v])


def compact(raw: bytes) -> bytes:
    """EIP-2098: 64 bytes, the sign in the highest bit of s."""
    s = int.from_bytes(raw[32:64], "big") | (raw[64] - 27) << 255
    return raw[:32] + s.to_bytes(32, "big")


def without_prefix(honest: Honest) -> Asked:
    """Signed as it is, where `personal_sign` says what it is first."""
    from eth_keys import keys  # type: ignore[attr-defined]

    assert isinstance(honest.key, EvmKey)
    private = keys.PrivateKey(bytes(honest.key.account.key))
    plain = _Plain(honest.key, lambda m: private.sign_msg(m).to_bytes()[:64], private)
    return honest.asked(signer=plain)


@dataclass
class _Plain:
    """A key that signs in another way."""

    key: Key
    how: Callable[[bytes], bytes]
    private: Any = None

    @property
    def wallet(self) -> str:
        return self.key.wallet

    def sign(self, message: bytes) -> bytes:
        if self.private is not None:
            found = self.private.sign_msg(message)
            return self.how(message) + bytes([27 + found.v])
        return self.how(message)


ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493
OF_EVM: dict[str, Callable[[Honest], Asked]] = {
    "the twin with the high s": lambda h: h.signature(high_s),
    "the high s with the same sign": lambda h: h.signature(
        lambda raw: high_s(raw)[:64] + raw[64:]
    ),
    **{
        f"a sign of {v}": (lambda n: lambda h: h.signature(with_v(n)))(v)
        for v in (0, 1, 2, 26, 29, 30, 31, 35, 36, 255)
    },
    "the other sign": lambda h: h.signature(lambda raw: raw[:64] + bytes([55 - raw[64]])),
    "no sign": lambda h: h.signature(lambda raw: raw[:64]),
    "the compact form": lambda h: h.signature(compact),
    "the sign first": lambda h: h.signature(lambda raw: raw[64:] + raw[:64]),
    "an r of zero": lambda h: h.signature(lambda raw: bytes(32) + raw[32:]),
    "an s of zero": lambda h: h.signature(lambda raw: raw[:32] + bytes(32) + raw[64:]),
    "a signature without the prefix": without_prefix,
    "a signature of Solana's": lambda h: h.asked(
        signer=SolanaKey(bytes(h.key.account.key)), keyid=h.key.wallet
    ),
    "a name without 0x": lambda h: h.asked(keyid=f"eip155:{h.key.address[2:]}"),
    "a name with 0X": lambda h: h.asked(keyid=f"eip155:0X{h.key.address[2:]}"),
}  # fmt: skip
OF_SOLANA: dict[str, Callable[[Honest], Asked]] = {
    "the twin with s + L": lambda h: h.signature(
        lambda raw: raw[:32]
        + (int.from_bytes(raw[32:], "little") + ED25519_ORDER).to_bytes(32, "little")
    ),
    "a signature of Ethereum's": lambda h: h.asked(
        signer=EvmKey(bytes(h.key.keypair.secret())), keyid=h.key.wallet
    ),
    "a name in other case": lambda h: h.asked(keyid=f"solana:{swapped_case(h.key.address)}"),
    "a name in small letters": lambda h: h.asked(keyid=h.key.wallet.lower()),
    "a name with a 1 before it": lambda h: h.asked(keyid=f"solana:1{h.key.address}"),
    "a signed digest": lambda h: h.asked(
        signer=_Plain(h.key, lambda m: h.key.sign(hashlib.sha512(m).digest()))
    ),
}  # fmt: skip
OF = {"eip155": OF_EVM, "solana": OF_SOLANA}


@pytest.fixture(scope="module")
def crowd(box: Box) -> dict[str, tuple[Holder, Holder, Key]]:
    """For each kind of wallet one who signs, another, and a stranger."""
    return {
        kind: (holder(box, kind, 10**6), holder(box, kind), make()) for kind, make in KINDS.items()
    }


def test_there_are_enough_ways_to_tamper() -> None:
    for kind in KINDS:
        assert len(TAMPERED) + len(OF[kind]) > 150


def refused_at(target: str, answer: Answer) -> bool:
    """Whether it is refused in the words that are spoken there."""
    if not refused(answer) or not answer.headers["WWW-Authenticate"].startswith("Bearer"):
        return False
    told = answer.json()
    if target.startswith(OBJECT):
        return bool(told["error"]["type"] == "authentication_error")
    return told["error"] == "invalid_signature" and told["success"] is False


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_whatever_was_tampered_with_is_refused_and_uses_nothing_up(
    box: Box, upstream: Upstream, crowd: dict[str, tuple[Holder, Holder, Key]], kind: str
) -> None:
    """And the request as it was signed is served after that, once."""
    who, other, stranger = crowd[kind]
    faults = []
    for number, (name, tamper) in enumerate((TAMPERED | OF[kind]).items()):
        honest = Honest(who.key, other.key, stranger, (FLAT, OBJECT)[number % 2])
        before = trace(box, upstream)
        asked = tamper(honest)
        answer = send(box, asked)
        if not refused_at(asked.target, answer) or trace(box, upstream) != before:
            faults.append((name, answer.status))
        untampered = honest.asked()
        once = [send(box, untampered).status for _ in range(1 if number % 8 else 2)]
        if once != [200, 401][: len(once)]:
            faults.append((name, *once))
    assert not faults, "\n".join(map(str, faults))
    assert box.standing(other.payer) == (1000, 0)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_both_dialects_refuse_alike(
    box: Box, crowd: dict[str, tuple[Holder, Holder, Key]], kind: str
) -> None:
    who, other, stranger = crowd[kind]
    faults = []
    for number, (name, tamper) in enumerate((TAMPERED | OF[kind]).items()):
        asked = tamper(Honest(who.key, other.key, stranger, (OBJECT, FLAT)[number % 2]))
        if not refused_at(asked.target, send(box, asked)):
            faults.append(name)
    assert not faults


# What may be said otherwise

ACCEPTED: dict[str, Callable[[Honest], Asked]] = {
    "as it is": lambda h: h.asked(),
    "by another label": lambda h: h.asked(label="*a.b_c-1"),
    "with its algorithm": lambda h: h.asked(alg=h.key.algorithm),
    "with an end": lambda h: h.asked(expires=h.created + 60),
    "with something of the sender's own": lambda h: h.asked(own="x;y=(z", number=-7, zero=0),
    "parameters in another order": lambda h: h.by_hand(
        h.all,
        f';tag="farebox";nonce="{h.nonce}";keyid="{h.key.wallet}";created={h.created}',
    ),
    "the list in another order": lambda h: h.asked(
        components=["content-digest", "@target-uri", "@method"]
    ),
    "with parts of the address too": lambda h: h.asked(
        components=["@method", "@target-uri", "content-digest", "@authority", "@path", "@query"]
    ),
    "with a header": lambda h: h.asked(
        headers={"X-Told": "one, two"},
        components=["x-told", "@method", "@target-uri", "content-digest"],
    ).having(X_Told="  one, two\t"),
    "with a header of other letters": lambda h: h.by_hand(
        f'{h.all} "x-told"', None,
        [f"{M}: POST", f"{T}: {h.url}", f"{D}: {digest_of(h.body)}", '"x-told": \xe9t\xe9'],
    ).having(X_Told="\xe9t\xe9"),
    "with its type": lambda h: h.by_hand(f'{h.all} "content-type"'),
    "by sha-512": digested(lambda b: digest_of(b, "sha-512")),
    "by both digests": digested(lambda b: f"{digest_of(b)}, {digest_of(b, 'sha-512')}"),
    "by both digests without a space": digested(
        lambda b: f"{digest_of(b, 'sha-512')},{digest_of(b)}"
    ),
    "by a digest beside one nobody here knows": digested(
        lambda b: f"md5=:{raw_digest(b, 'md5')}:, {digest_of(b)}"
    ),
    "a nonce of one sign": lambda h: h.asked(nonce=secrets.choice("!#$%&'()*+,-./:;<=>?@[]^_`{|}")),
    "a nonce of 255 signs": lambda h: h.asked(nonce=f"{h.nonce}{'n' * 255}"[:255]),
    "a nonce with spaces": lambda h: h.asked(nonce=f" {h.nonce} "),
    "no body": lambda h: h.asked(body=b""),
    "no body, by its digest": lambda h: h.asked(
        body=b"", headers={"Content-Digest": digest_of(b"")},
        components=["@method", "@target-uri", "content-digest"],
    ),
    "no body beside a digest that was not signed": lambda h: h.asked(
        body=b"", headers={"Content-Digest": "anything"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_may_be_signed_otherwise_is_served_once(
    box: Box, crowd: dict[str, tuple[Holder, Holder, Key]], kind: str
) -> None:
    who, other, stranger = crowd[kind]
    faults = []
    for name, sign in ACCEPTED.items():
        asked = sign(Honest(who.key, other.key, stranger, FLAT))
        answers = [send(box, asked) for _ in range(2)]
        if [answer.status for answer in answers] != [200, 401]:
            faults.append((name, answers[0].body))
    assert not faults


def test_an_ethereum_address_is_the_same_in_any_case(box: Box) -> None:
    """And so is its nonce."""
    who = holder(box, "eip155")
    address, nonces = who.key.address, []
    for spelled in (address.lower(), f"0x{address[2:].upper()}", address):
        nonces.append(who.get("/v1/account", keyid=f"eip155:{spelled}"))
    assert [answer.status for answer in nonces] == [200, 200, 200]
    assert {answer.json()["wallet"] for answer in nonces} == {address}
    first = who.get("/v1/account", keyid=f"eip155:{address.lower()}", nonce="the same")
    second = who.get("/v1/account", keyid=f"eip155:{address}", nonce="the same")
    assert first.status == 200
    assert refused(second)


def test_a_nonce_is_each_wallets_own(box: Box, kind: str) -> None:
    one, two = holder(box, kind), holder(box, kind)
    nonce, now = secrets.token_hex(8), int(time.time())
    assert one.get("/v1/account", nonce=nonce, created=now).status == 200
    assert two.get("/v1/account", nonce=nonce, created=now).status == 200
    # Once is once: at another time, for another request and another door too.
    assert refused(one.get("/v1/account", nonce=nonce, created=now - 1))
    assert refused(one.get(f"{FLAT}/ok/nonce", nonce=nonce))
    assert refused(one.get("/v1/account", nonce=nonce, label="other"))


def test_a_body_is_signed_wherever_there_is_one(who: Holder) -> None:
    """Also where nobody reads it."""
    target, url = "/v1/account", f"{URL}/v1/account"
    asked = Asked("GET", target, BODY, signed(who.key, "GET", url, BODY))
    assert refused(send(who.box, replace(asked, body=BODY + b" ")))
    assert refused(send(who.box, replace(asked, body=b"")))
    assert send(who.box, asked).status == 200
    uncovered = signed(who.key, "GET", url)
    assert refused(send(who.box, Asked("GET", target, BODY, uncovered)))
    assert send(who.box, Asked("GET", target, b"", uncovered)).status == 200


def test_a_request_that_is_refused_for_another_reason_has_used_its_signature(
    small_box: Box, kind: str
) -> None:
    who = holder(small_box, kind, credits=PRICE - 1)
    reasons = {
        402: (f"{FLAT}/ok/poor", b""),
        404: (CHAT, b'{"model": "no such", "messages": []}'),
        400: (CHAT, b"{"),
    }
    for status, (target, body) in reasons.items():
        asked = Asked("POST", target, body, signed(who.key, "POST", URL + target, body))
        assert send(small_box, asked).status == status
        assert refused(send(small_box, asked)), status
    # But for nothing at all nothing is kept: who comes too soon may come again.
    target = f"{FLAT}/ok/poor"
    asked = Asked("GET", target, b"", signed(who.key, "GET", URL + target))
    assert [send(small_box, asked).status for _ in range(2)] == [429, 429]
    small_box.run("UPDATE rate_window SET used = 0")
    assert [send(small_box, asked).status for _ in range(2)] == [402, 401]


@pytest.mark.parametrize("path", [f"{FLAT}/ok/mark", "/v1/account"])
def test_the_address_is_what_stood_in_the_request_line(who: Holder, path: str) -> None:
    """An empty query is none, and yet it is another address."""
    with_mark = Asked("GET", f"{path}?", b"", signed(who.key, "GET", f"{URL}{path}?"))
    without = Asked("GET", path, b"", signed(who.key, "GET", f"{URL}{path}"))
    assert refused(send(who.box, replace(with_mark, target=path)))
    assert refused(send(who.box, replace(without, target=f"{path}?")))
    assert send(who.box, with_mark).status == send(who.box, without).status == 200


@pytest.mark.parametrize(
    ("public_url", "begins", "else_begins"),
    [
        ("https://Pay.Example:443", "https://pay.example", "https://pay.example:443"),
        ("http://pay.example:80/", "http://pay.example", "http://pay.example:80"),
        ("https://pay.example:80", "https://pay.example:80", "https://pay.example"),
        ("http://[::1]:8402", "http://[::1]:8402", "http://::1:8402"),
    ],
)
def test_an_address_begins_as_the_instance_is_known_by(
    tmp_path: Path, upstream: Upstream, llm: LlmUpstream,
    public_url: str, begins: str, else_begins: str,
) -> None:  # fmt: skip
    """Scheme and host in small letters, no port that goes without saying (RFC 9110, 4.2.3);
    whatever the Host by which it was called."""
    with Box(tmp_path, config(upstream, llm), FAREBOX_PUBLIC_URL=public_url) as box:
        who, target = holder(box, "solana"), "/v1/account"
        for start, taken in ((begins, True), (else_begins, False), (URL, False)):
            sent = signed(who.key, "GET", f"{start}{target}")
            answer = send(box, Asked("GET", target, b"", sent))
            assert (answer.status == 200) is taken, start
            assert taken or refused(answer)
        covered = ["@method", "@target-uri", "@authority"]
        sent = signed(who.key, "GET", f"{begins}{target}", components=covered)
        assert send(box, Asked("GET", target, b"", sent)).status == 200


def test_a_request_cannot_use_up_the_nonce_of_a_message(who: Holder) -> None:
    made = who.box.post("/api/v1/wallets/challenge", value={"wallet": who.key.wallet}).json()
    assert who.get("/v1/account", nonce=made["nonce"]).status == 200
    signature = who.key.sign_text(made["message"])
    body = {"message": made["message"], "signature": signature}
    assert who.box.post("/api/v1/session-tokens", value=body).status == 201


def test_a_large_body_is_signed_as_a_small_one(who: Holder, upstream: Upstream) -> None:
    body, target = secrets.token_bytes(500_000), f"{FLAT}/ok/large"
    asked = Asked("POST", target, body, signed(who.key, "POST", URL + target, body))
    asked = asked.having(Content_Type="application/octet-stream")
    assert refused(send(who.box, replace(asked, body=body[:-1] + bytes([body[-1] ^ 1]))))
    assert send(who.box, asked).status == 200
    (hit,) = upstream.hits("/ok/large")
    assert hit.body == body


def test_who_signs_is_told_what_is_wrong(who: Holder) -> None:
    def message(answer: Answer) -> str:
        assert refused(answer)
        return str(answer.json()["message"])

    target, path = f"{FLAT}/ok/told", f"{URL}{FLAT}/ok/told"
    assert "not created within 300 seconds of now, which is 2" in message(
        who.get(target, created=1)
    )
    elsewhere_ = signed(who.key, "GET", "https://proxy.example/ok/told")
    told = message(send(who.box, Asked("GET", target, b"", elsewhere_)))
    assert f"our addresses begin with {URL}" in told
    assert who.key.wallet in told
    uncovered = signed(who.key, "GET", path, components=["@target-uri"])
    assert "does not cover @method" in message(send(who.box, Asked("GET", target, b"", uncovered)))
    assert 'its tag is not "farebox"' in message(who.get(target, tag="x"))
    assert "it needs a nonce" in message(who.get(target, nonce=None))
    assert f'alg is not "{who.key.algorithm}"' in message(who.get(target, alg="x"))
    assert "it has expired" in message(who.get(target, expires=1))
    assert "keyid" in message(who.get(target, keyid="x"))
    stranger = Holder(who.box, KINDS[who.key.namespace](), who.payer)
    assert "not known here" in message(stranger.get(target))
    nonce = secrets.token_hex(8)
    assert who.get(target, nonce=nonce).status == 200
    assert "was used before" in message(who.get(target, nonce=nonce))


# Time


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, "2027-03-01T12:00:00Z")


def test_a_signature_is_taken_within_300_seconds(box: Box, kind: str, hand: Clock) -> None:
    who, now = holder(box, kind), hand.now // 1000
    hand.forward(ms=999)  # the second has not passed
    for created, taken in {-301: False, -300: True, 0: True, 300: True, 301: False}.items():
        answer = who.get("/v1/account", created=now + created)
        assert (answer.status == 200) is taken, created
        assert taken or refused(answer)
    for expires, taken in {-1: False, 0: False, 1: True}.items():
        answer = who.get("/v1/account", created=now, expires=now + expires)
        assert (answer.status == 200) is taken, expires


def kept(box: Box) -> int:
    found: int = box.row("SELECT COUNT(*) FROM used_nonce")[0]
    return found


def test_a_used_signature_is_refused_at_any_time_after(box: Box, kind: str, hand: Clock) -> None:
    """Its nonce is kept for as long as its time would be taken; and when it is forgotten, its time
    is over."""
    who = holder(box, kind)
    box.run("DELETE FROM used_nonce")
    for early in (300, 0, -300):  # how far its clock is ahead of ours
        created = hand.now // 1000 + early
        asked = Asked(
            "GET", "/v1/account", b"", signed(who.key, "GET", f"{URL}/v1/account", created=created)
        )
        assert send(box, asked).status == 200
        was_kept = []
        for _ in range(36):
            upkeep.tidy(box.instance)
            assert refused(send(box, asked))
            was_kept.append(kept(box))
            hand.forward(seconds=125)
        assert was_kept[0] == 1
        assert was_kept[-1] == 0  # it was forgotten


def test_a_clock_that_steps_back_an_hour_takes_no_signature_twice(
    box: Box, kind: str, hand: Clock
) -> None:
    who, at = holder(box, kind), hand.now
    asked = Asked(
        "GET", "/v1/account", b"",
        signed(who.key, "GET", f"{URL}/v1/account", created=hand.now // 1000),
    )  # fmt: skip
    assert send(box, asked).status == 200
    hand.forward(seconds=300 + 3600)  # an hour after it would have been taken
    upkeep.tidy(box.instance)
    hand.now = at
    assert refused(send(box, asked))


# Failures


class Trouble:
    """The database fails at one call to it, in `with`: the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = 0  # none
        self.seen = 0
        for name in ("run", "row", "rows"):
            real = getattr(Tx, name)

            def call(tx: Tx, sql: str, params: Any = None, real: Any = real) -> Any:
                self.seen += 1
                fails = self.at != 0 and self.seen == self.at
                if fails and sql == "ROLLBACK":
                    real(tx, sql, params)  # SQLite never stays in a transaction after this
                if fails:
                    raise apsw.IOError("a failpoint")
                return real(tx, sql, params)

            monkeypatch.setattr(Tx, name, call)

    def during(self, at: int, work: Callable[[], Answer]) -> tuple[Answer, bool]:
        """What comes of it, and whether the failure came."""
        self.at, self.seen = at, 0
        try:
            return work(), self.seen >= at
        finally:
            self.at = 0


@pytest.mark.parametrize("target", ["/v1/account", f"{FLAT}/ok/fails"], ids=["read", "call"])
def test_a_transaction_that_fails_uses_no_nonce(
    box: Box, kind: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the database fails: either nothing has happened, and the same request is served when
    it is sent again; or its call was taken on, and then its signature is used."""
    who, trouble = holder(box, kind), Trouble(monkeypatch)
    count = "SELECT (SELECT COUNT(*) FROM used_nonce), (SELECT COUNT(*) FROM call)"
    sent_again = 0
    for at in range(1, 100):
        asked = Asked("GET", target, b"", signed(who.key, "GET", URL + target))
        nonces_before, calls_before = box.row(count)
        answer, failed = trouble.during(at, lambda asked=asked: send(box, asked))  # type: ignore[misc]
        for duty in (upkeep.settle_late, upkeep.void_orphans):
            duty(box.instance)
        if not failed:
            assert answer.status == 200
            break
        nonces_after, calls_after = box.row(count)
        was_used = nonces_after - nonces_before
        if target == "/v1/account":
            assert answer.status == 503 or was_used
        else:
            assert was_used == calls_after - calls_before, at
        again = send(box, asked)
        assert again.status == (401 if was_used else 200), at
        sent_again += not was_used
    else:
        raise AssertionError("it never came through")
    assert sent_again >= 2
    assert box.standing(who.payer)[1] == 0


# Keys of small order

_P, _D = 2**255 - 19, -121665 * pow(121666, -1, 2**255 - 19)
_EIGHTH = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
Point = tuple[int, int]


def _add(one: Point, two: Point) -> Point:
    """Of two points on the curve, as the textbook has it."""
    (x1, y1), (x2, y2) = one, two
    both = _D * x1 * x2 * y1 * y2
    x = (x1 * y2 + x2 * y1) * pow(1 + both, -1, _P)
    y = (y1 * y2 + x1 * x2) * pow(1 - both, -1, _P)
    return x % _P, y % _P


def _spelled(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def _torsion() -> list[bytes]:
    """The eight points of small order, each the sum of the one before it and a generator."""
    y = int.from_bytes(_EIGHTH, "little")
    squared = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    x = pow(squared, (_P + 3) // 8, _P)
    if x * x % _P != squared:
        x = x * pow(2, (_P - 1) // 4, _P) % _P
    generator = (x if x % 2 == 0 else _P - x, y)
    points = [(0, 1)]
    while len(points) < 8:
        points.append(_add(points[-1], generator))
    assert _add(points[-1], generator) == (0, 1)
    return [_spelled(point) for point in points]


TORSION = _torsion()
# The same points, written in ways in which no point should be.
MISSPELLED = {
    0: ["0100000000000000000000000000000000000000000000000000000000000080",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"],
    4: ["ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"],
    2: ["edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"],
}  # fmt: skip


class SmallKey:
    """A wallet whose key is a point of small order: nobody has its secret, and everybody can sign
    for it, one message in eight."""

    namespace, algorithm = "solana", "ed25519"

    def __init__(self, spelled: bytes, times: int) -> None:
        from solders.pubkey import Pubkey

        self.raw, self._times = spelled, times
        self.address = str(Pubkey.from_bytes(spelled))
        self.wallet = f"solana:{self.address}"

    def forged(self, message: bytes) -> bytes | None:
        """A signature over the message that holds in the equation of Ed25519, if there is one: s is
        0, and R is minus the challenge times the key."""
        for times, point in enumerate(TORSION):
            challenge = hashlib.sha512(point + self.raw + message).digest()
            if (times + int.from_bytes(challenge, "little") % ED25519_ORDER * self._times) % 8 == 0:
                return point + bytes(32)
        return None

    def sign(self, message: bytes) -> bytes:
        return self.forged(message) or bytes(64)


def small_keys() -> list[SmallKey]:
    spelled = [(point, times) for times, point in enumerate(TORSION)]
    spelled += [(bytes.fromhex(each), times) for times, many in MISSPELLED.items() for each in many]
    return [SmallKey(*each) for each in spelled]


def holds_elsewhere(key: SmallKey, message: bytes, signature: bytes) -> bool:
    """Whether a library takes the signature that refuses no key for its order."""
    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def base_of(asked: Asked) -> bytes:
    """What was signed of a GET."""
    told = asked.headers["Signature-Input"].removeprefix("sig=")
    lines = [f'"@method": {asked.method}', f'"@target-uri": {URL}{asked.target}']
    return "\n".join([*lines, f'"@signature-params": {told}']).encode()


def test_a_key_of_small_order_signs_no_request(box: Box) -> None:
    """Its wallet is entered by hand, so that nothing but the signature stands in the way; and that
    is a forgery another library takes."""
    taken_elsewhere = 0
    for key in small_keys():
        payer = box.payer(10)
        link(box, key, payer.account)  # type: ignore[arg-type]
        for _ in range(40):
            asked = Asked("GET", "/v1/account", b"", signed(key, "GET", f"{URL}/v1/account"))  # type: ignore[arg-type]
            base = base_of(asked)
            if (forged := key.forged(base)) is None:
                continue
            assert base64.b64encode(forged).decode() in asked.headers["Signature"]
            assert refused(send(box, asked)), key.wallet
            if holds_elsewhere(key, base, forged):
                taken_elsewhere += 1
                break
    assert taken_elsewhere >= len(TORSION)


def test_a_key_of_small_order_signs_no_message(box: Box) -> None:
    """Neither in nor to be linked: whoever asks for a message is given one, and can forge."""
    before, person_ = box.row("SELECT COUNT(*) FROM wallet"), person(box)
    forgeries = 0
    for key in small_keys():
        for _ in range(40):
            asked = box.post("/api/v1/wallets/challenge", value={"wallet": key.wallet})
            if asked.status == 400:
                break
            text = asked.json()["message"]
            if (forged := key.forged(text.encode())) is None:
                continue
            forgeries += 1
            body = {"message": text, "signature": base64.b64encode(forged).decode()}
            assert refused(box.post("/api/v1/session-tokens", value=body)), key.wallet
            assert refused(box.post("/api/v1/wallets", person_.token, body)), key.wallet
            break
    assert forgeries >= len(TORSION)
    assert box.row("SELECT COUNT(*) FROM wallet") == before


# Anything at all

_pieces = st.sampled_from(
    ["sig=", "(", ")", '"@method"', '"@target-uri"', '"content-digest"', ";created=1", ";", "=",
     ":", ";keyid=", '"', "\\", ",", " ", "\t", "sha-256=:", "AAAA", "é", "\x7f",
     ";tag=\"farebox\"", ";nonce=\"n\"", "1" * 20, "@", "*", "?", "-0", "solana:", "eip155:0x"]
)  # fmt: skip
_texts = st.lists(_pieces | st.text(st.characters(max_codepoint=255), max_size=8), max_size=30).map(
    "".join
)


@settings(max_examples=100, database=None, deadline=None)
@given(_texts, _texts, _texts, st.binary(max_size=8))
def test_headers_that_are_anything_are_refused(
    box: Box, told: str, signature: str, digest_: str, body: bytes
) -> None:
    headers = {"Signature-Input": told, "Signature": signature, "Content-Digest": digest_}
    for path in (f"{FLAT}/ok/fuzz", f"{OBJECT}/ok/fuzz"):
        assert refused(send(box, Asked("POST", path, body, headers)))
    assert refused(send(box, Asked("GET", "/v1/account", b"", headers)))


@settings(max_examples=150, database=None, deadline=None)
@given(
    st.sampled_from(["Signature-Input", "Signature", "Content-Digest"]),
    st.integers(0, 400),
    st.integers(0, 3),
    _pieces | st.text(st.characters(max_codepoint=255), max_size=3),
)
def test_a_header_that_is_not_the_one_that_was_sent_is_refused(
    box: Box,
    crowd: dict[str, tuple[Holder, Holder, Key]],
    name: str,
    start: int,
    length: int,
    instead: str,
) -> None:
    who, other, stranger = crowd["solana"]
    asked = Honest(who.key, other.key, stranger, FLAT).asked()
    text = asked.headers[name]
    start %= len(text) + 1
    changed = text[:start] + instead + text[start + length :]
    answer = send(box, asked.having(**{name: changed}))
    if changed == text:
        assert answer.status == 200
    else:
        assert refused(answer), (text, changed)
