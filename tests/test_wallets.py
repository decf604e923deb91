"""A message is signed by a wallet and good once, here, for five minutes: then its person is in."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from inprocess import HOST, Box, Clock
from rpc_server import need
from server import Answer
from settler import BASE, BASE_SEPOLIA, SOLANA, Settler, section

need("eth_account", "solders")

from browser import Browser  # noqa: E402
from people import invited, minted, person, token_for, told  # noqa: E402
from signers import EvmKey, Key, SolanaKey, signed  # noqa: E402

from core import clock, members, users  # noqa: E402
from core.audit import Actor  # noqa: E402
from core.signed import nonces  # noqa: E402

CHALLENGE, TOKENS = "/api/v1/wallets/challenge", "/api/v1/session-tokens"
SIGNUP_CREDITS = 5
REFUSED = (401, "invalid_signature")
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_numbers = count(1)

CONFIG = """
[instance]
signup = "{signup}"
signup_credits = 5

[upstreams.sandbox]
kind = "sandbox"

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
credits = 1
per = "sms_segment"

[limits]
requests_per_minute = 1000000
failed_auth_per_minute = {most}
"""
OPEN, CLOSED = CONFIG.format(signup="open", most=10**6), CONFIG.format(signup="closed", most=10**6)

# EIP-4361's grammar, with what of RFC 3986 it refers to.
_AUTHORITY = r"(?:[A-Za-z0-9._~-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]*)?"
_TIME = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?(?:Z|[+-][0-9]{2}:[0-9]{2})"
)
_URI = r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9:/?#\[\]@!$&'()*+,;=._~%-]*"
SIWE = re.compile(
    r"(?:[A-Za-z][A-Za-z0-9+.-]*://)?"
    rf"(?P<domain>{_AUTHORITY}) wants you to sign in with your (?P<kind>Ethereum|Solana) account:\n"
    r"(?P<address>0x[0-9a-fA-F]{40}|[1-9A-HJ-NP-Za-km-z]{32,44})\n"
    r"\n"
    r"(?:(?P<statement>[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;= -]+)\n)?"
    r"\n"
    rf"URI: (?P<uri>{_URI})\n"
    r"Version: 1\n"
    r"Chain ID: (?P<chain>[0-9]+|mainnet|devnet|testnet|localnet)\n"
    r"Nonce: (?P<nonce>[A-Za-z0-9]{8,})\n"
    rf"Issued At: (?P<issued>{_TIME})"
    rf"(?:\nExpiration Time: (?P<expires>{_TIME}))?"
    rf"(?:\nNot Before: {_TIME})?"
    r"(?:\nRequest ID: [A-Za-z0-9._~:@!$&'()*+,;=%-]*)?"
    rf"(?:\nResources:(?:\n- {_URI})*)?"
)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with Box(tmp_path_factory.mktemp("wallets") / "instance", OPEN) as made:
        yield made


def new_key(kind: str) -> Key:
    return EvmKey() if kind == "eip155" else SolanaKey()


KINDS = pytest.mark.parametrize("kind", ["solana", "eip155"])


def challenged(box: Box, wallet: str, **options: Any) -> dict[str, str]:
    """What is to be signed."""
    answer = box.request("POST", CHALLENGE, value={"wallet": wallet}, **options)
    assert answer.status == 200, answer.body
    found: dict[str, str] = answer.json()
    return found


def message_of(box: Box, key: Key) -> dict[str, str]:
    """A fresh message, signed: the body that signs in or links."""
    text = challenged(box, key.wallet)["message"]
    return {"message": text, "signature": key.sign_text(text)}


def sign_in(box: Box, key: Key, **more: str) -> str:
    """A session token of a fresh sign-in."""
    answer = box.post(TOKENS, value=message_of(box, key) | more)
    assert answer.status == 201, answer.body
    token: str = answer.json()["token"]
    return token


def account_of(box: Box, token: str) -> dict[str, Any]:
    found: dict[str, Any] = box.get("/api/v1/account", token).json()
    return found


def used(box: Box) -> int:
    """How many messages and requests were used up."""
    (found,) = box.row("SELECT COUNT(*) FROM used_nonce")
    return int(found)


# The message


@KINDS
def test_a_message_is_of_the_form_that_wallets_know(box: Box, kind: str) -> None:
    key = new_key(kind)
    told = challenged(box, key.wallet)
    found = SIWE.fullmatch(told["message"])
    assert found is not None, told["message"]
    assert (found["domain"], found["uri"]) == (HOST, f"http://{HOST}")
    assert found["address"] == key.address
    assert found["kind"] == ("Ethereum" if kind == "eip155" else "Solana")
    assert found["chain"] == ("1" if kind == "eip155" else "mainnet")
    assert found["nonce"] == told["nonce"] and found["expires"] == told["expires_at"]
    issued, expires = map(datetime.fromisoformat, (found["issued"], found["expires"]))
    assert (expires - issued).total_seconds() == 300
    assert len(set(told)) == len({"message", "nonce", "expires_at"}) == len(told)


def test_no_two_messages_are_the_same(box: Box) -> None:
    wallet = SolanaKey().wallet
    assert len({challenged(box, wallet)["message"] for _ in range(20)}) == 20


@pytest.mark.parametrize("changed", [str.lower, str.upper, str.swapcase, str])
def test_an_ethereum_address_is_taken_in_any_case_and_written_in_its_own(
    box: Box, changed: Callable[[str], str]
) -> None:
    key = EvmKey()
    text = challenged(box, f"eip155:0x{changed(key.address[2:])}")["message"]
    assert text.splitlines()[1] == key.address
    answer = box.post(TOKENS, value={"message": text, "signature": key.sign_text(text)})
    assert account_of(box, answer.json()["token"])["wallets"] == [key.wallet]


ADDRESS = SolanaKey(bytes(32)).address


@pytest.mark.parametrize(
    "wallet",
    [
        "", ":", "solana", "solana:", ADDRESS, f"solana:{ADDRESS[:-2]}", f"solana:{ADDRESS}1",
        f"solana:{ADDRESS[:-1]}0", f"solana:{ADDRESS[:-1]}l", f"solana: {ADDRESS}",
        f"solana:{ADDRESS}\n", f"Solana:{ADDRESS}", f"solana:mainnet:{ADDRESS}",
        f"solana:{'1' * 31}", f"solana:{'1' * 33}", f"solana:{'z' * 44}", f"solana:{'1' * 10_000}",
        "solana:０" + "1" * 31,
        "eip155:", f"eip155:0x{'a' * 39}", f"eip155:0x{'a' * 41}", f"eip155:0X{'a' * 40}",
        f"eip155:{'a' * 40}", f"eip155:0x{'g' * 40}", f"eip155:1:0x{'a' * 40}",
        f"EIP155:0x{'a' * 40}",
        f"eip155:0x{'a' * 40}\n", f"eip155:{ADDRESS}", f"solana:0x{'a' * 40}", f"bip122:{'a' * 34}",
        "did:privy:abc", "person@example.com", "eip155:0x" + "٣" * 40,
    ],
)  # fmt: skip
def test_what_is_no_wallet_gets_no_message(box: Box, wallet: str) -> None:
    answer = box.post(CHALLENGE, value={"wallet": wallet})
    assert (told(answer), answer.json()["param"]) == ((400, "validation_error"), "wallet")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "wallet"), (b"{}", "wallet"), (b'{"wallet": 5}', "wallet"),
        (b'{"wallet": null}', "wallet"), (b'{"wallet": ["solana:x"]}', "wallet"),
        (b'{"wallet": "solana:x", "chain": 1}', "chain"), (b"solana:x", None), (b"[]", None),
    ],
)  # fmt: skip
def test_a_challenge_takes_a_wallet_and_nothing_else(
    box: Box, body: bytes, param: str | None
) -> None:
    answer = box.request("POST", CHALLENGE, body=body)
    assert (told(answer), answer.json().get("param")) == ((400, "validation_error"), param)


def test_asking_for_a_message_leaves_nothing_behind(box: Box) -> None:
    tables = ("wallet", "account", "user", "used_nonce", "rate_window", "audit")
    before = [box.row(f"SELECT COUNT(*) FROM {table}") for table in tables]
    challenged(box, EvmKey().wallet)
    assert [box.row(f"SELECT COUNT(*) FROM {table}") for table in tables] == before


def test_a_message_names_the_instance_and_not_how_it_was_reached(tmp_path: Path) -> None:
    key, url = SolanaKey(), "https://pay.example.com:8443/"
    made = Box(tmp_path / "i", OPEN, FAREBOX_PUBLIC_URL=url, FAREBOX_TRUSTED_PROXIES="1")
    with made as box:
        for host, more in (
            ("pay.example.com:8443", {}),
            (HOST, {}),
            (HOST, {"X-Forwarded-Host": "pay.example.com:8443", "X-Forwarded-Proto": "https"}),
        ):
            text = challenged(box, key.wallet, host=host, headers=more)["message"]
            found = SIWE.fullmatch(text)
            assert found is not None
            assert found["domain"] == "pay.example.com:8443"
            assert found["uri"] == url.rstrip("/")
            value = {"message": text, "signature": key.sign_text(text)}
            answer = box.request("POST", TOKENS, value=value, host=host, headers=more)
            assert answer.status == 201, answer.body
        elsewhere = box.request(
            "POST", CHALLENGE, value={"wallet": key.wallet}, host="evil.example"
        )
        assert told(elsewhere) == (400, "invalid_host")


def test_a_message_names_the_first_network_that_is_paid_on(tmp_path: Path) -> None:
    key = EvmKey()
    pay_to = {SOLANA: ADDRESS, BASE_SEPOLIA: key.address, BASE: key.address}
    with Settler() as settler, Box(tmp_path / "i", OPEN + section(settler, pay_to)) as box:
        assert "\nChain ID: 84532\n" in challenged(box, key.wallet)["message"]
        sign_in(box, key)


# Signing in


@KINDS
def test_a_wallet_nobody_knows_signs_up_with_the_credits_of_every_account(
    box: Box, kind: str
) -> None:
    key = new_key(kind)
    answer = box.post(TOKENS, value=message_of(box, key))
    assert answer.status == 201 and set(answer.json()) == {"token", "expires_at"}
    token = answer.json()["token"]
    mine = account_of(box, token)
    assert (mine["credits"], mine["wallets"]) == (SIGNUP_CREDITS, [key.wallet])
    assert box.sms(token).status == 200
    assert account_of(box, sign_in(box, key)) == mine | {
        "credits": SIGNUP_CREDITS - 1, "usd_value": "0.04"
    }  # fmt: skip
    made = box.row(
        "SELECT email, password_hash, is_operator FROM user WHERE account_id = :id",
        id=mine["account"],
    )
    assert made == (None, None, 0)
    shown = box.get("/v1/account", token).json()
    assert shown["wallet"] == key.address
    noted = box.instance.db.rows(
        "SELECT action, subject FROM audit WHERE account_id = :id ORDER BY number",
        {"id": mine["account"]},
    )
    assert ("wallet.linked", key.wallet.lower() if kind == "eip155" else key.wallet) in noted
    assert [action for action, _ in noted].count("session.started") == 2


def test_where_sign_up_is_closed_an_unknown_wallet_is_told_and_its_message_still_good(
    tmp_path: Path,
) -> None:
    key, folder = EvmKey(), tmp_path / "i"
    with Box(folder, CLOSED) as box:
        body = message_of(box, key)
        refused = box.post(TOKENS, value=body)
        assert told(refused) == (403, "signup_closed")
        assert refused.headers["x-should-retry"] == "false"
        assert box.row("SELECT COUNT(*) FROM wallet") == (0,) and used(box) == 0
    with Box(folder, OPEN) as box:  # and after a restart
        assert told(box.post(TOKENS, value=body)) == (201, None)
    with Box(folder, CLOSED) as box:  # it is known now
        assert told(box.post(TOKENS, value=body)) == REFUSED
        sign_in(box, key)


@KINDS
def test_a_message_is_good_once_for_whatever(box: Box, kind: str) -> None:
    key = new_key(kind)
    body = message_of(box, key)
    token = box.post(TOKENS, value=body).json()["token"]
    before = box.row("SELECT COUNT(*) FROM session")
    for other in (body, body | {"signature": key.sign_text(body["message"])}):
        answer = box.post(TOKENS, value=other)
        assert told(answer) == REFUSED and "used before" in answer.json()["message"]
    assert told(box.post("/api/v1/wallets", token, body)) == REFUSED
    again = message_of(box, key)
    assert box.post("/api/v1/wallets", token, again).status == 200
    assert told(box.post(TOKENS, value=again)) == REFUSED
    assert box.row("SELECT COUNT(*) FROM session") == before


def test_a_message_lives_five_minutes(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Clock(monkeypatch, datetime.now().astimezone().isoformat())
    for ahead, expected in (
        (0, 201), (299, 201), (300, 401), (3600, 401), (-299, 201), (-301, 401),
    ):  # fmt: skip
        key = SolanaKey()
        at.now = at.now // 1000 * 1000
        body = message_of(box, key)
        at.forward(seconds=ahead)
        answer = box.post(TOKENS, value=body)
        assert answer.status == expected, (ahead, answer.body)
        if expected == 401:
            assert answer.code == "invalid_signature" and "too old" in answer.json()["message"]
            at.forward(seconds=-ahead)
            assert box.post(TOKENS, value=body).status == 201  # nothing of it was used up
        else:
            at.forward(seconds=-ahead)


def test_a_message_that_was_used_is_remembered_for_longer_than_it_would_be_taken(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Clock(monkeypatch, datetime.now().astimezone().isoformat())
    key = SolanaKey()
    body = message_of(box, key)
    assert box.post(TOKENS, value=body).status == 201
    at.forward(seconds=301)
    box.write(lambda tx: nonces.prune(tx, at.now))
    at.forward(seconds=-301)  # a clock that steps back
    assert told(box.post(TOKENS, value=body)) == REFUSED
    kept = used(box)
    at.forward(days=1)
    assert box.write(lambda tx: nonces.prune(tx, at.now)) == kept > 0


LINES = range(11)


@KINDS
@pytest.mark.parametrize("line", LINES)
def test_a_message_that_was_changed_in_any_line_is_none_of_ours(
    box: Box, kind: str, line: int
) -> None:
    """Its own wallet signs what was changed, so it is not the signature that refuses it."""
    key = new_key(kind)
    text = challenged(box, key.wallet)["message"]
    lines = text.split("\n")
    assert len(lines) == len(LINES)
    variants = [
        [*lines[:line], lines[line] + "x", *lines[line + 1 :]],
        [*lines[:line], lines[line] + " ", *lines[line + 1 :]],
        [*lines[:line], lines[line][:-1] + "7", *lines[line + 1 :]],
        [*lines[:line], *lines[line + 1 :]],
        [*lines[: line + 1], lines[line], *lines[line + 1 :]],
        [*lines[:line], "Resources:", *lines[line:]],
    ]
    before = used(box)
    for variant in variants:
        changed = "\n".join(variant)
        if changed == text:
            continue
        answer = box.post(TOKENS, value={"message": changed, "signature": key.sign_text(changed)})
        assert told(answer) == REFUSED, changed
    assert used(box) == before
    answer = box.post(TOKENS, value={"message": text, "signature": key.sign_text(text)})
    assert answer.status == 201


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("127.0.0.1:8402 wants", "evil.example wants"), (" wants", "  wants"),
        ("URI: http:", "URI: https:"), ("Version: 1", "Version: 2"), ("Chain ID: 1", "Chain ID: 2"),
        ("costs nothing", "costs all"), ("\n", "\r\n"), ("Ethereum", "Solana"),
        ("Issued At: 20", "Issued At: 21"), ("Nonce: ", "Nonce: 0"), ("Z\n", "+00:00\n"),
        ("", "\n"), ("", " "), ("Sign", "Ѕign"), ("", "\x00"),
    ],
)  # fmt: skip
def test_a_message_that_says_something_else_is_none_of_ours(box: Box, old: str, new: str) -> None:
    key = EvmKey()
    text = challenged(box, key.wallet)["message"]
    changed = text.replace(old, new) if old else text + new
    assert changed != text
    answer = box.post(TOKENS, value={"message": changed, "signature": key.sign_text(changed)})
    assert told(answer) == REFUSED
    if old:
        changed = text.replace(old, new, 1)
        answer = box.post(TOKENS, value={"message": changed, "signature": key.sign_text(changed)})
        assert told(answer) == REFUSED


@KINDS
def test_a_message_is_not_made_anew_from_one_that_we_wrote(box: Box, kind: str) -> None:
    """Its wallet signs it, it names the right nonce by its form, and is of now."""
    key = new_key(kind)
    text = challenged(box, key.wallet)["message"]
    found = SIWE.fullmatch(text)
    assert found is not None
    nonce = found["nonce"]
    other = ("0" if nonce[0] != "0" else "1") + nonce[1:]
    later = text
    for name in ("issued", "expires"):
        moved = datetime.fromisoformat(found[name]) - timedelta(minutes=1)
        later = later.replace(found[name], f"{moved:%Y-%m-%dT%H:%M:%SZ}")
    for changed in (text.replace(nonce, other), later):
        assert changed != text and SIWE.fullmatch(changed)
        answer = box.post(TOKENS, value={"message": changed, "signature": key.sign_text(changed)})
        assert told(answer) == REFUSED and "none of ours" in answer.json()["message"]


def test_a_message_for_one_wallet_is_good_for_no_other(box: Box) -> None:
    mine, other = EvmKey(), EvmKey()
    text = challenged(box, mine.wallet)["message"]
    moved = text.replace(mine.address, other.address)
    for message, key in ((text, other), (moved, other), (moved, mine)):
        answer = box.post(TOKENS, value={"message": message, "signature": key.sign_text(message)})
        assert told(answer) == REFUSED
    # The same address in small letters is not what was handed out.
    small = text.replace(mine.address, mine.address.lower())
    assert (
        told(box.post(TOKENS, value={"message": small, "signature": mine.sign_text(small)}))
        == REFUSED
    )


def test_a_message_of_another_instance_or_of_a_former_secret_is_none_of_ours(
    box: Box, tmp_path: Path
) -> None:
    key, folder = SolanaKey(), tmp_path / "other"
    secrets = ("one" * 11, "two" * 11)
    with Box(folder, OPEN, FAREBOX_SECRET_KEY=secrets[0]) as other:
        theirs, spare = message_of(other, key), message_of(other, key)
        assert told(box.post(TOKENS, value=theirs)) == REFUSED
        assert other.post(TOKENS, value=theirs).status == 201
    with Box(folder, OPEN, FAREBOX_SECRET_KEY=secrets[1]) as other:
        assert told(other.post(TOKENS, value=spare)) == REFUSED
    with Box(folder, OPEN, FAREBOX_SECRET_KEY=secrets[0]) as other:
        assert other.post(TOKENS, value=spare).status == 201


# The signature


def evm_signature(key: EvmKey, text: str) -> tuple[bytes, int]:
    """r and s, and v."""
    whole = key.sign(text.encode())
    return whole[:64], whole[64]


def high_s(key: EvmKey, text: str) -> str:
    """The same signature's twin."""
    rs, v = evm_signature(key, text)
    s = ORDER - int.from_bytes(rs[32:], "big")
    return "0x" + (rs[:32] + s.to_bytes(32, "big") + bytes([55 - v])).hex()


BAD_EVM: dict[str, Callable[[EvmKey, str], str]] = {
    "of another key": lambda key, text: EvmKey().sign_text(text),
    "of another text": lambda key, text: key.sign_text(text + " "),
    "with the high s": high_s,
    "with v from zero": lambda key, text: (
        "0x" + (evm_signature(key, text)[0] + bytes([evm_signature(key, text)[1] - 27])).hex()
    ),
    "with the other v": lambda key, text: (
        "0x" + (evm_signature(key, text)[0] + bytes([55 - evm_signature(key, text)[1]])).hex()
    ),
    "with v of a chain": lambda key, text: (
        "0x" + (evm_signature(key, text)[0] + bytes([evm_signature(key, text)[1] + 10])).hex()
    ),
    "compact": lambda key, text: "0x" + evm_signature(key, text)[0].hex(),
    "too long": lambda key, text: key.sign_text(text) + "00",
    "without 0x": lambda key, text: key.sign_text(text)[2:],
    "with 0X": lambda key, text: "0X" + key.sign_text(text)[2:],
    "with a space": lambda key, text: key.sign_text(text) + " ",
    "with a line feed": lambda key, text: key.sign_text(text) + "\n",
    "in base64": lambda key, text: base64.b64encode(key.sign(text.encode())).decode(),
    "all zeros": lambda key, text: "0x" + "00" * 64 + "1b",
    "empty": lambda key, text: "",
    "not in hexadecimal": lambda key, text: "0x" + "zz" * 65,
    "without the prefix": lambda key, text: (
        "0x" + bytes(key.account.unsafe_sign_hash(_keccak(text.encode())).signature).hex()
    ),
}


def _keccak(data: bytes) -> bytes:
    from eth_utils import keccak

    return keccak(data)


@pytest.mark.parametrize("how", BAD_EVM)
def test_an_ethereum_signature_has_one_form(box: Box, how: str) -> None:
    key = EvmKey()
    text = challenged(box, key.wallet)["message"]
    answer = box.post(TOKENS, value={"message": text, "signature": BAD_EVM[how](key, text)})
    assert told(answer) == REFUSED
    assert f"not signed by {key.wallet}" in answer.json()["message"]
    capitals = "0x" + key.sign_text(text)[2:].upper()
    assert box.post(TOKENS, value={"message": text, "signature": capitals}).status == 201


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


BAD_SOLANA: dict[str, Callable[[SolanaKey, str], str]] = {
    "of another key": lambda key, text: SolanaKey().sign_text(text),
    "of another text": lambda key, text: key.sign_text(text + " "),
    "of Ethereum": lambda key, text: EvmKey().sign_text(text),
    "in hexadecimal": lambda key, text: key.sign(text.encode()).hex(),
    "without padding": lambda key, text: _base64(key.sign(text.encode())).rstrip("="),
    "for addresses": lambda key, text: base64.urlsafe_b64encode(
        key.sign(text.encode()) + b"\xff"
    ).decode(),
    "too short": lambda key, text: _base64(key.sign(text.encode())[:-1]) + "=",
    "too long": lambda key, text: _base64(key.sign(text.encode()) + b"\0\0\0"),
    "longer than any": lambda key, text: "1" * 3000,
    "with a space": lambda key, text: key.sign_text(text) + " ",
    "all zeros": lambda key, text: "1" * 64,
    "empty": lambda key, text: "",
    "with its second spelling": lambda key, text: _base64(_malleated(key.sign(text.encode()))),
    "of what a ledger signs": lambda key, text: _base64(
        key.sign(b"\xffsolana offchain\0\0\0" + text.encode())
    ),
}


def _malleated(signature: bytes) -> bytes:
    """The same with the group's order added to its second half."""
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(signature[32:], "little") + order
    return signature[:32] + s.to_bytes(32, "little")


@pytest.mark.parametrize("how", BAD_SOLANA)
def test_a_solana_signature_is_of_the_text_in_base58_or_base64(box: Box, how: str) -> None:
    key = SolanaKey()
    text = challenged(box, key.wallet)["message"]
    bad = {"message": text, "signature": BAD_SOLANA[how](key, text)}
    assert told(box.post(TOKENS, value=bad)) == REFUSED
    good = {"message": text, "signature": _base64(key.sign(text.encode()))}
    assert box.post(TOKENS, value=good).status == 201


# With what else is sent


def test_a_credential_and_a_message_are_not_sent_together(box: Box) -> None:
    key, payer = SolanaKey(), box.payer()
    token, body = sign_in(box, SolanaKey()), message_of(box, key)
    for value in (body, {"message": body["message"]}, {"signature": body["signature"]}):
        answer = box.post(TOKENS, token, value)
        assert (told(answer), answer.json()["param"]) == ((400, "validation_error"), "message")
    assert told(box.post(TOKENS, payer.key, body)) == (403, "session_required")
    assert told(box.post(TOKENS, "eyJhbGciOiJub25lIn0.e30.", body)) == (401, "invalid_token")
    assert told(box.post(TOKENS, "nonsense", body)) == (401, "invalid_api_key")
    assert box.post(TOKENS, value=body).status == 201  # nothing of it was used up


def test_a_signed_request_mints_no_session_token(box: Box) -> None:
    key = SolanaKey()
    sign_in(box, key)
    url, raw = f"http://{HOST}{TOKENS}", b"{}"
    answer = box.request("POST", TOKENS, body=raw, headers=signed(key, "POST", url, raw))
    assert told(answer) == (403, "session_required")


@pytest.mark.parametrize("left", ["message", "signature"])
def test_a_message_and_its_signature_go_together(box: Box, left: str) -> None:
    body = message_of(box, SolanaKey())
    (missing,) = {"message", "signature"} - {left}
    for value in ({left: body[left]}, {left: body[left], missing: None}):
        answer = box.post(TOKENS, value=value)
        assert (told(answer), answer.json()["param"]) == ((400, "validation_error"), missing)


def test_without_anything_a_session_token_is_refused_and_not_explained(box: Box) -> None:
    for value in ({}, {"account": "acct_x"}, {"mesage": "x", "signature": "y"}, {"message": 5}):
        answer = box.post(TOKENS, value=value)
        assert told(answer) == (401, "missing_api_key")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_message_counts_before_the_cookie_and_needs_no_form_token(box: Box) -> None:
    somebody, key, browser = SolanaKey(), SolanaKey(), Browser(box)
    fields = message_of(box, somebody)
    assert browser.submit("/login", "/login/wallet", **fields).status == 303
    assert browser.get("/dashboard").status == 200
    answer = browser.request("POST", TOKENS, value=message_of(box, key))
    assert account_of(box, answer.json()["token"])["wallets"] == [key.wallet]
    # Without a message the cookie counts, and needs one.
    assert told(browser.request("POST", TOKENS, value={})) == (403, "csrf_failed")


def test_a_wallet_signs_in_to_whichever_account_its_person_is_a_member_of(box: Box) -> None:
    host, key, stranger = person(box, 40), EvmKey(), person(box)
    sign_in(box, key)
    mine = account_of(box, sign_in(box, key))["account"]
    _, link = invited(box, host, "wallet@example.com")
    now = clock.now_ms()
    box.write(
        lambda tx: members.join(tx, link, users.of_who(tx, key.wallet).id, now, Actor("test"))
    )
    assert account_of(box, sign_in(box, key, account=host.account))["credits"] == 40
    assert account_of(box, sign_in(box, key, account=mine))["account"] == mine
    before = box.row("SELECT COUNT(*) FROM session")
    for account in (stranger.account, "acct_nobody", "acct_operator"):
        body = message_of(box, key)
        answer = box.post(TOKENS, value=body | {"account": account})
        assert told(answer) == (404, "not_found")
        assert box.row("SELECT COUNT(*) FROM session") == before
        assert box.post(TOKENS, value=body).status == 201  # a slip of the pen uses nothing up
        before = box.row("SELECT COUNT(*) FROM session")
    new = SolanaKey()
    assert box.post(TOKENS, value=message_of(box, new) | {"account": mine}).status == 404
    assert box.instance.db.row("SELECT 1 FROM wallet WHERE id = :id", {"id": new.wallet}) is None


def within_a_minute(work: Callable[[], list[int]], expected: list[int]) -> None:
    """It comes to that where no minute ends in its midst, which happens once at most."""
    found = work()
    if found != expected:
        found = work()
    assert found == expected


def test_sign_ups_of_one_network_and_sign_ins_of_one_wallet_are_counted(tmp_path: Path) -> None:
    with Box(tmp_path / "i", CONFIG.format(signup="open", most=2)) as box:

        def in_from(client: str, key: Key) -> Answer:
            return box.request("POST", TOKENS, value=message_of(box, key), client=client)

        networks = (f"10.0.{n // 250}.{n % 250}" for n in count(1))

        def three_strangers() -> list[int]:
            network = next(networks)
            keys = [SolanaKey() for _ in range(3)]
            found = [in_from(network, key).status for key in keys]
            # Who is known by then comes in from there all the same, and strangers from elsewhere.
            assert in_from(network, keys[0]).status == 201
            assert in_from(next(networks), SolanaKey()).status == 201
            return found

        within_a_minute(three_strangers, [201, 201, 429])

        def one_wallet() -> list[int]:
            key = SolanaKey()
            found = [in_from(next(networks), key) for _ in range(3)]
            assert found[2].status == 201 or 0 < int(found[2].headers["Retry-After"]) <= 60
            return [answer.status for answer in found]

        within_a_minute(one_wallet, [201, 201, 429])

        def known_ones() -> list[int]:
            network, keys = next(networks), [SolanaKey() for _ in range(22)]
            for key in keys:
                in_from(next(networks), key)
            return [in_from(network, key).status for key in keys]

        within_a_minute(known_ones, [201] * 20 + [429] * 2)
        # What is not signed counts for nothing.
        bad = message_of(box, SolanaKey()) | {"signature": SolanaKey().sign_text("something")}
        for _ in range(8):
            answer = box.request("POST", TOKENS, value=bad, client="198.51.100.4")
            assert told(answer) == REFUSED


@pytest.mark.parametrize("what", ["users", "accounts"])
def test_who_is_suspended_does_not_come_in_by_wallet(box: Box, what: str) -> None:
    key = EvmKey()
    token, body = sign_in(box, key), message_of(box, key)
    done = box.cli(what, "suspend", key.wallet.lower(), "--reason", "unpaid")
    assert done.exit_code == 0, done.output
    answer = box.post(TOKENS, value=body)
    assert (told(answer), answer.json()["reason"]) == ((403, "account_suspended"), "unpaid")
    assert box.sms(token).status in (401, 403)
    assert box.cli(what, "resume", key.wallet).exit_code == 0
    assert box.post(TOKENS, value=body).status == 201


def test_signing_out_ends_a_wallets_tokens_and_so_does_the_person(box: Box) -> None:
    key = SolanaKey()
    first, second = sign_in(box, key), sign_in(box, key)
    fresh = box.post(TOKENS, first).json()["token"]
    mine = account_of(box, first)["account"]
    known = box.instance.db.rows(
        "SELECT s.method FROM session s JOIN user u ON u.id = s.user_id"
        " WHERE u.account_id = :id AND s.ended_at IS NULL",
        {"id": mine},
    )
    assert known == [(f"wallet:{key.wallet}",)] * 2
    assert box.request("DELETE", f"{TOKENS}/current", key=second).status == 204
    assert told(box.get("/api/v1/account", second)) == (401, "invalid_token")
    assert box.get("/api/v1/account", fresh).status == 200
    done = box.cli("users", "sign-out", key.wallet)
    assert done.stdout.strip() == "2 sign-ins ended"
    for token in (first, fresh):
        assert told(box.get("/api/v1/account", token)) == (401, "invalid_token")
    assert account_of(box, sign_in(box, key))["account"] == mine


def test_a_token_for_another_account_is_no_way_around_the_members(box: Box) -> None:
    key, stranger = SolanaKey(), person(box)
    token = sign_in(box, key)
    assert told(box.post(TOKENS, token, {"account": stranger.account})) == (404, "not_found")
    with pytest.raises(AssertionError):
        token_for(box, stranger, account_of(box, token)["account"])
    assert account_of(box, minted(box, key.wallet))["wallets"] == [key.wallet]
