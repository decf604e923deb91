"""Endings under trouble of every kind: what cannot be settled now is settled later, and alone."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from inprocess import Box

from core import clock, idempotency, ledger, limits, tokens, upkeep
from core.idempotency import Stored
from core.ledger import Guard, NewCall, Outcome, Resolved
from core.settlement import Settlement

ALWAYS = Guard("TRUE", {})
DONE = Outcome(200, None)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    with Box(tmp_path / "instance") as made:
        yield made


def held(box: Box, account: str, credits: int = 5, **more: Any) -> str:
    """A call in flight, of this process unless `more` says otherwise."""
    call_id = tokens.new_id("req")
    call = NewCall(
        call_id, call_id, account, "api_key", None, None, "/r", "POST", 1, credits, credits,
        box.instance.incarnation(), clock.now_ms(),
    )._replace(**more)  # fmt: skip
    assert box.write(lambda tx: ledger.hold(tx, call, ALWAYS, 10)) is not None
    return call_id


def one_failure(box: Box, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make the next write fail as a broken lock would, before it began."""
    write = box.instance.db.write

    def failing(work: Callable[[Any], Any], durable: bool = False) -> Any:
        monkeypatch.setattr(box.instance.db, "write", write)
        raise error

    monkeypatch.setattr(box.instance.db, "write", failing)


@pytest.mark.parametrize("error", [OSError("no locks left"), RuntimeError("odd"), MemoryError()])
def test_a_void_that_fails_for_any_reason_is_made_later(
    box: Box, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    payer = box.payer(10)
    ending = Settlement(box.instance, held(box, payer.account))
    one_failure(box, monkeypatch, error)
    assert ending.void() is None
    assert box.standing(payer) == (5, 5)
    upkeep.settle_late(box.instance)
    assert box.standing(payer) == (10, 0)


def test_a_charge_for_a_delivered_answer_that_fails_for_any_reason_is_made_later(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    payer = box.payer(10)
    ending = Settlement(box.instance, held(box, payer.account))
    one_failure(box, monkeypatch, OSError("no locks left"))
    ending.capture_sent(5, DONE, None)
    one_failure(box, monkeypatch, OSError("still none"))
    upkeep.settle_late(box.instance)
    assert box.standing(payer) == (5, 5)
    upkeep.settle_late(box.instance)
    assert box.standing(payer) == (5, 0)


def test_a_charge_does_not_hang_on_whether_its_answer_can_be_kept(box: Box) -> None:
    payer = box.payer(10)
    call_id = held(box, payer.account, idempotency_key="again")
    box.write(lambda tx: idempotency.claim(tx, payer.account, "again", b"", call_id, 0))

    def spoilt(resolved: Resolved) -> Stored:
        raise ValueError("no such text")

    Settlement(box.instance, call_id).capture_sent(5, DONE, spoilt)
    assert box.standing(payer) == (5, 0)
    state = box.row("SELECT state FROM idempotency WHERE call_id = :id", id=call_id)
    assert state == ("lost",)


def test_a_charge_the_caller_was_told_had_failed_is_not_made(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    payer = box.payer(10)
    ending = Settlement(box.instance, held(box, payer.account))
    one_failure(box, monkeypatch, OSError("no locks left"))
    with pytest.raises(OSError, match="no locks"):
        ending.capture(5, DONE, None)
    upkeep.settle_late(box.instance)
    assert box.standing(payer) == (10, 0)


def test_an_orphan_that_cannot_be_voided_does_not_keep_the_others(box: Box) -> None:
    payer = box.payer(20)
    good = [held(box, payer.account, incarnation="inc_gone") for _ in range(2)]
    # Its credits were never counted under the limit it claims, so giving them back breaks a CHECK.
    bad = held(box, payer.account, incarnation="inc_gone", key_id=payer.key_id, credit_window_at=7)
    box.run(
        "INSERT INTO credit_window (subject, starts_at, used) VALUES (:key, 7, 0)",
        key=payer.key_id,
    )
    upkeep.void_orphans(box.instance)
    for call_id in good:
        assert box.row("SELECT status FROM call WHERE id = :id", id=call_id) == ("voided",)
    assert box.row("SELECT status FROM call WHERE id = :id", id=bad) == ("held",)
    box.run("DELETE FROM credit_window")
    upkeep.void_orphans(box.instance)
    assert box.standing(payer) == (20, 0)


def test_requests_out_of_order_at_the_end_of_a_minute_do_not_reset_the_rate(box: Box) -> None:
    last, first = 60_000 - 1, 60_000
    refused = []
    for now in (first, last, first, last, first, last):
        rate = box.write(lambda tx, now=now: limits.spend_rate(tx, "s", 3, now))
        refused.append(rate.exceeded)
    assert refused == [False, False, False, True, True, True]


def test_a_call_is_found_by_its_own_id_though_another_borrowed_it(box: Box) -> None:
    payer = box.payer(10)
    first = box.sms(payer.key)
    own = first.headers["X-Request-Id"]
    second = box.sms(payer.key, text="again", X_Request_Id=own)
    assert second.headers["X-Request-Id"] == own
    newer, older = box.get("/api/v1/ledger", payer.key).json()["data"]
    assert older["reference"] == own != newer["reference"]
    done = box.cli("credits", "refund", own)
    assert done.exit_code == 0, done.output
    entry = box.get("/api/v1/ledger", payer.key).json()["data"][0]
    assert (entry["kind"], entry["reference"]) == ("refund", own)
    newest = box.get("/api/v1/usage", payer.key).json()["data"][0]
    assert newest["request_id"] == own
    assert box.get(f"/api/v1/usage/{newer['reference']}", payer.key).status == 200


# Upstreams that say what cannot be


@contextmanager
def upstream_saying(*pieces: bytes, endless: bytes = b"") -> Iterator[tuple[int, list[int]]]:
    """A server that answers every connection with the same bytes; and how many went out."""
    listener = socket.create_server(("127.0.0.1", 0))
    sent = [0]

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.recv(65536)
                try:
                    for piece in pieces:
                        peer.sendall(piece)
                        sent[0] += len(piece)
                    while endless and sent[0] < 64 * 1024 * 1024:
                        peer.sendall(endless)
                        sent[0] += len(endless)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], sent
    finally:
        listener.close()


def through(tmp_path: Path, port: int, more: str = "") -> Box:
    return Box(
        tmp_path / "through",
        f"""
[upstreams.up]
kind = "http"
base_url = "http://127.0.0.1:{port}"
timeout_seconds = 1
max_seconds = 2
[[routes]]
path = "/api/v1/up"
methods = ["GET"]
upstream = "up"
credits = 3
[upstreams.texts]
kind = "twilio"
base_url = "http://127.0.0.1:{port}"
account_sid = "AC1"
auth_token = "token-of-the-texts"
from = "+15005550006"
[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "texts"
adapter = "sms"
credits = 1
per = "sms_segment"
{more}
""",
    )


def test_a_status_that_does_not_exist_is_given_up_at_once(tmp_path: Path) -> None:
    head = b"HTTP/1.1 600 Odd\r\nContent-Length: 99999999\r\n\r\n"
    with (
        upstream_saying(head, endless=b"x" * 65536) as (port, sent),
        through(tmp_path, port) as box,
    ):
        payer = box.payer(10)
        answer = box.get("/api/v1/up", payer.key)
        assert (answer.status, answer.code) == (502, "provider_error")
        assert box.standing(payer) == (10, 0)
        assert sent[0] < 16 * 1024 * 1024


def test_a_length_beside_a_transfer_coding_is_not_passed_on(tmp_path: Path) -> None:
    said = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 5000\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    with upstream_saying(said) as (port, _), through(tmp_path, port) as box:
        answer = box.get("/api/v1/up", box.payer(10).key)
        assert answer.body == b"abc"
        assert answer.headers.get("Content-Length") != "5000"


@pytest.mark.parametrize("code", [["21211"], {"a": 1}, None, 1.5, True])
def test_a_refusal_with_a_code_of_any_kind_is_the_providers_failure(
    tmp_path: Path, code: object
) -> None:
    body = json.dumps({"code": code, "message": "no"}).encode()
    said = b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body
    with upstream_saying(said) as (port, _), through(tmp_path, port) as box:
        payer = box.payer(10)
        answer = box.sms(payer.key)
        assert (answer.status, answer.code) == (502, "provider_error")
        assert box.standing(payer) == (10, 0)


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding", "Connection", "TE"])
def test_an_upstreams_own_headers_cannot_frame_the_request(name: str, tmp_path: Path) -> None:
    from config import ConfigError

    more = f'[upstreams.framed]\nkind = "http"\nbase_url = "http://h"\nheaders = {{ {name} = "5" }}'
    with pytest.raises(ConfigError, match=rf"\$\.upstreams\.framed\.headers\.{name}"):
        through(tmp_path, 1, more)


def test_the_operator_keys_account_takes_no_credits_and_no_keys(box: Box) -> None:
    for words in (("credits", "grant", "acct_operator", "5"),
                  ("keys", "add", "acct_operator", "--name", "x")):  # fmt: skip
        assert box.cli(*words).exit_code == 1
    assert box.standing("acct_operator") == (0, 0)
