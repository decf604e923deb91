"""Signed requests on a real server: a signature is good once, whichever worker it comes to and
however many times at once; and requests signed by libraries that are not ours are taken.

Twenty rounds in every run; `FAREBOX_TORTURE=1` makes it two hundred.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

import pytest
import requests
from bearers import at_once
from conftest import StartFarebox
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from doubles import Upstream
from http_message_signatures import HTTPMessageSigner, HTTPSignatureKeyResolver, algorithms
from server import Answer, Farebox
from signers import EvmKey, Key, SolanaKey, signed
from test_races import TORTURE

ROUNDS = 200 if TORTURE else 20
AT_ONCE = 50
PRICE = 2
CREDITS = 10_000
BODY = b'{"n": 1}'

CONFIG = """
[instance]
signup = "open"

[upstreams.double]
kind = "http"
base_url = "{url}"

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST"]
upstream = "double"
upstream_path = "/*"
credits = 2

[limits]
requests_per_minute = 1000000
concurrent_calls = 1000
"""


@pytest.fixture(scope="module")
def box(start_farebox: StartFarebox, upstream_server: Upstream) -> Farebox:
    return start_farebox(CONFIG.format(url=upstream_server.url))


@pytest.fixture(scope="module")
def wide_box(start_farebox: StartFarebox, upstream_server: Upstream) -> Farebox:
    return start_farebox(CONFIG.format(url=upstream_server.url), workers=4)


class Holder(NamedTuple):
    """A wallet that has signed in, and has credits."""

    box: Farebox
    key: Key
    token: str

    def headers(self, method: str, path: str, body: bytes = b"", **parts: Any) -> dict[str, str]:
        return signed(self.key, method, self.box.url + path, body, **parts)

    def send(self, method: str, path: str, body: bytes = b"", **parts: Any) -> Answer:
        """One request, signed anew."""
        return self.again(method, path, body, self.headers(method, path, body, **parts))

    def again(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        """As it was signed."""
        headers = headers | ({"Content-Type": "application/json"} if body else {})
        return self.box.request(method, path, body=body or None, headers=headers)

    def left(self) -> int:
        """The credits, once nothing is held any more."""
        return self.box.settled(self.token)


def message_for(box: Farebox, key: Key) -> dict[str, str]:
    """A message of ours, signed."""
    asked = box.post("/api/v1/wallets/challenge", value={"wallet": key.wallet})
    assert asked.status == 200, asked.body
    text = asked.json()["message"]
    return {"message": text, "signature": key.sign_text(text)}


def holder(box: Farebox, key: Key, credits: int = CREDITS) -> Holder:
    got = box.post("/api/v1/session-tokens", value=message_for(box, key))
    assert got.status == 201, got.body
    box.set_up("credits", "grant", key.wallet, str(credits))
    return Holder(box, key, got.json()["token"])


@pytest.fixture(scope="module")
def holders(box: Farebox, wide_box: Farebox) -> dict[str, Holder]:
    keys: dict[str, Callable[[], Key]] = {"solana": SolanaKey, "eip155": EvmKey}
    return {
        f"{each.environment['FAREBOX_WORKERS']} {kind}": holder(each, make())
        for each in (box, wide_box)
        for kind, make in keys.items()
    }


# Once


@pytest.mark.parametrize("workers", ["2", "4"])
def test_one_signature_sent_50_times_at_once_is_one_request(
    holders: dict[str, Holder], upstream: Upstream, workers: str
) -> None:
    """Of calls, of calls with an Idempotency-Key, and of what is free, in turn."""
    for number in range(ROUNDS // 2):
        who = holders[f"{workers} {('solana', 'eip155')[number % 2]}"]
        before = who.left()
        kind, name = ("call", "repeatable call", "read")[number % 3], f"{workers}-{number}"
        method, path, body, more = "POST", f"/api/v1/up/ok/once-{name}", BODY, {}
        if kind == "repeatable call":
            more = {"headers": {"Idempotency-Key": f"key-{name}"}}
        if kind == "read":
            method, path, body = "GET", "/api/v1/account", b""
        headers = who.headers(method, path, body, **more)
        answers = at_once(AT_ONCE, lambda _, sent=(who, method, path, body, headers): send(*sent))
        told = Counter((answer.status, answer.code) for answer in answers)
        assert told == {(200, None): 1, (401, "invalid_signature"): AT_ONCE - 1}, (kind, told)
        assert before - who.left() == (0 if kind == "read" else PRICE)
        if kind != "read":
            assert len(upstream.hits(f"/once-{name}")) == 1
    upstream.clear()


def send(
    who: Holder, method: str, path: str, body: bytes, headers: dict[str, str], _: object = None
) -> Answer:
    return who.again(method, path, body, headers)


def test_many_signatures_under_one_idempotency_key_are_one_call(
    holders: dict[str, Holder], upstream: Upstream
) -> None:
    who, path = holders["4 solana"], "/api/v1/up/ok/one-key"
    before = who.left()
    sent = [
        who.headers("POST", path, BODY, headers={"Idempotency-Key": "one"}) for _ in range(AT_ONCE)
    ]
    answers = at_once(AT_ONCE, lambda index: who.again("POST", path, BODY, sent[index]))
    assert {answer.status for answer in answers} <= {200, 409}
    assert all(a.code == "idempotency_in_progress" for a in answers if a.status == 409)
    assert len({answer.body for answer in answers if answer.status == 200}) == 1
    assert len(upstream.hits("/one-key")) == 1
    assert before - who.left() == PRICE


def test_a_wallet_that_is_unlinked_signs_nothing_after(box: Farebox, upstream: Upstream) -> None:
    """Whatever is on its way meanwhile: what was served was paid, and what is sent after the answer
    is refused on every worker."""
    owner = holder(box, SolanaKey())
    for number in range(4):
        spare = Holder(box, (SolanaKey, EvmKey)[number % 2](), owner.token)
        linked = box.post("/api/v1/wallets", owner.token, message_for(box, spare.key))
        assert linked.status == 201, linked.body
        before, served, stop = owner.left(), Counter[int](), threading.Event()
        late: list[Answer] = []
        gone = threading.Event()

        def call(
            spare: Holder = spare,
            number: int = number,
            served: Counter[int] = served,
            stop: threading.Event = stop,
            gone: threading.Event = gone,
            late: list[Answer] = late,
        ) -> None:
            while not stop.is_set():
                after = gone.is_set()
                answer = spare.send("POST", f"/api/v1/up/ok/unlinked-{number}", BODY)
                served[answer.status] += 1
                if after:
                    late.append(answer)
                    if len(late) >= 12:
                        stop.set()

        threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        upstream.wait_for(5, f"/unlinked-{number}")
        ended = box.request("DELETE", f"/api/v1/wallets/{spare.key.wallet}", key=owner.token)
        assert ended.status == 204, ended.body
        gone.set()
        for thread in threads:
            thread.join(30)
        assert len(late) >= 12
        assert {(answer.status, answer.code) for answer in late} == {(401, "invalid_signature")}
        assert set(served) <= {200, 401}
        assert before - owner.left() == served[200] * PRICE
        assert len(upstream.hits(f"/unlinked-{number}")) == served[200]


# Signed by others


class Eip191(algorithms.HTTPSignatureAlgorithm):
    """Ours for Ethereum's keys: `personal_sign` of the base, by eth-account."""

    algorithm_id = "eip191"

    def __init__(self, public_key: Any = None, private_key: Any = None, **_: Any) -> None:
        self.private_key = private_key

    def sign(self, message: bytes) -> bytes:
        from eth_account import Account
        from eth_account.messages import encode_defunct

        signature = Account.sign_message(encode_defunct(message), self.private_key).signature
        return bytes(signature)

    def verify(self, signature: bytes, message: bytes) -> None:
        raise NotImplementedError


class Keys(HTTPSignatureKeyResolver):
    """The private key, whatever it is asked for."""

    def __init__(self, private: Any) -> None:
        self._private = private

    def resolve_private_key(self, key_id: str) -> Any:
        return self._private

    def resolve_public_key(self, key_id: str) -> Any:
        raise NotImplementedError


def library(key: Key) -> HTTPMessageSigner:
    """The signer of `http-message-signatures` for that wallet."""
    if isinstance(key, EvmKey):
        return HTTPMessageSigner(signature_algorithm=Eip191, key_resolver=Keys(key.account.key))
    private = Ed25519PrivateKey.from_private_bytes(bytes(key.keypair.secret()))
    return HTTPMessageSigner(signature_algorithm=algorithms.ED25519, key_resolver=Keys(private))


COVERED = ("@method", "@target-uri")
LIBRARY_SAYS: dict[str, dict[str, Any]] = {
    "what we ask for": {"covered_component_ids": COVERED},
    "all it covers by itself": {},
    "more": {"covered_component_ids": (*COVERED, "@path", "@query", "user-agent", "host")},
    "no algorithm": {"covered_component_ids": COVERED, "include_alg": False},
    "a label and an end": {
        "covered_component_ids": COVERED, "label": "sig1", "expires": datetime(2099, 1, 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["eip155", "solana"])
def test_requests_signed_by_a_library_are_taken(
    holders: dict[str, Holder], upstream: Upstream, kind: str
) -> None:
    """`http-message-signatures` makes the base and the headers, `requests` sends them."""
    who = holders[f"2 {kind}"]
    signer, url = library(who.key), who.box.url
    before, calls = who.left(), 0
    with requests.Session() as session:
        for number, (name, said) in enumerate(LIBRARY_SAYS.items()):
            for method, path, value in (
                ("GET", "/v1/account", None),
                ("GET", "/api/v1/up/ok/library?a=1&b=x%20y", None),
                ("POST", "/api/v1/up/ok/library", {"text": "ü" * number}),
            ):
                host = {"Host": url.removeprefix("http://")}
                prepared = session.prepare_request(
                    requests.Request(method, url + path, json=value, headers=host)
                )
                signer.sign(
                    prepared,
                    key_id=who.key.wallet,
                    nonce=f"{name} {method} {path}",
                    tag="farebox",
                    **({"body": prepared.body} if prepared.body else {}),
                    **said,
                )
                answer = session.send(prepared, timeout=30)
                assert answer.status_code == 200, (name, method, path, answer.text)
                again = session.send(prepared, timeout=30)
                assert again.status_code == 401, (name, method, path)
                calls += path != "/v1/account"
    assert before - who.left() == calls * PRICE
    assert json.loads(upstream.hits("/ok/library")[-1].body) == {
        "text": "ü" * (len(LIBRARY_SAYS) - 1)
    }


def test_what_a_server_makes_of_a_request_is_refused_or_is_what_was_sent(
    holders: dict[str, Holder],
) -> None:
    """Headers that are sent twice, with an underscore, in other capitals, and a target that is
    written otherwise: as a raw client may."""
    who = holders["2 solana"]

    def ask(*lines: str, headers: dict[str, str], target: str = "/v1/account") -> int:
        head = [f"{name}: {value}" for name, value in headers.items()]
        first = [f"GET {target} HTTP/1.1", f"Host: 127.0.0.1:{who.box.port}", "Connection: close"]
        with who.box.connect() as sock:
            sock.sendall("\r\n".join([*first, *head, *lines, "", ""]).encode("latin-1"))
            with sock.makefile("rb") as answer:
                return int(answer.readline()[9:12])

    def fresh() -> dict[str, str]:
        return who.headers("GET", "/v1/account")

    for name in ("Signature", "Signature-Input"):
        sent = fresh()
        assert ask(f"{name}: {sent[name]}", headers=sent) == 401
        other = fresh()
        assert ask(f"{name}: {other[name]}", headers=sent) == 401
        spelled = {name.upper(): f"  {value}\t" for name, value in fresh().items()}
        assert ask(headers=spelled) == 200
    for target in (
        "/v1/account?", "/v1/account#x", "/v1/account?#", "/v1/accoun%74", "//v1/account",
        f"{who.box.url}/v1/account", "/v1/./account", "/v1/account;x",
    ):  # fmt: skip
        sent = fresh()
        assert ask(headers=sent, target=target) in (400, 401, 404), target
        assert ask(headers=sent) == 200, target
    # A proxy may not tell the two apart, so that nobody may say one and mean the other.
    sent, other = fresh(), fresh()["Signature-Input"]
    assert ask(f"Signature_Input: {other}", headers=sent) in (200, 400)
    sent = fresh()
    sent["Signature_Input"] = sent.pop("Signature-Input")
    assert ask(headers=sent) in (400, 401)


def test_a_body_that_comes_in_chunks_is_signed_too(
    holders: dict[str, Holder], upstream: Upstream
) -> None:
    who, path = holders["2 eip155"], "/api/v1/up/ok/chunks"

    def send_chunks(*chunks: bytes, headers: dict[str, str]) -> int:
        sent = headers | {"Content-Type": "application/json"}
        with requests.Session() as session:
            url = who.box.url + path
            return session.post(url, iter(chunks), headers=sent, timeout=30).status_code

    headers = who.headers("POST", path, b'{"n": 12}')
    assert send_chunks(b'{"n"', b": 13}", headers=headers) == 401
    assert send_chunks(b'{"n"', b": 12}", headers=headers) == 200
    bare = who.headers("POST", path)
    assert send_chunks(b"{}", headers=bare) == 401
    assert send_chunks(headers=bare) == 200
    assert [hit.body for hit in upstream.hits("/chunks")] == [b'{"n": 12}', b""]


def test_a_signature_is_used_after_the_server_was_killed(
    box: Farebox, holders: dict[str, Holder], upstream: Upstream
) -> None:
    """The last test here, because nothing of its server is left."""
    path = "/api/v1/up/ok/killed"
    sent = []
    for who in (holders["2 solana"], holders["2 eip155"]):
        call, read = who.headers("POST", path, BODY), who.headers("GET", "/v1/account")
        assert who.again("POST", path, BODY, call).status == 200
        assert who.again("GET", "/v1/account", b"", read).status == 200
        sent.append((who, call, read))
    box.kill()
    box.start()
    for who, call, read in sent:
        for answer in (
            who.again("POST", path, BODY, call), who.again("GET", "/v1/account", b"", read)
        ):  # fmt: skip
            assert (answer.status, answer.code) == (401, "invalid_signature")
        assert who.send("POST", path, BODY).status == 200
    assert len(upstream.hits("/killed")) == 4
