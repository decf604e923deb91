"""The clients of docs/clients, as people copy them: they read, pay, stream, repeat and sign in with
a wallet's key, through gunicorn; and so do libraries that know nothing of us."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import StartFarebox
from doubles import Upstream, sse_event
from inprocess import Box, Clock
from rpc_server import need
from server import Farebox

need("eth_account", "httpx", "solders")

import httpx  # noqa: E402
import requests  # noqa: E402
from signers import EvmKey, SolanaKey, signed  # noqa: E402
from test_wallets import sign_in  # noqa: E402

from core.errors import KINDS  # noqa: E402

CLIENTS = Path(__file__).resolve().parent.parent / "docs" / "clients"
FOLDER = Path(__file__).resolve().parent / "wallets"
sys.path.insert(0, str(CLIENTS))

import farebox_wallet  # noqa: E402
from farebox_wallet import EthereumWallet, SolanaWallet, WalletAuth, session_token  # noqa: E402

TEXT = {"to": "+18148835337", "message": "hi"}
SMS = "/api/v1/sms/send"
CREDITS = 1000
CONFIG = """
[instance]
signup = "open"
signup_credits = 1000

[upstreams.sandbox]
kind = "sandbox"

[upstreams.double]
kind = "http"
base_url = "{url}"

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
credits = 1
per = "sms_segment"

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST", "DELETE"]
upstream = "double"
upstream_path = "/*"
credits = 2

[[routes]]
path = "/v1/chat/completions"
methods = ["POST"]
upstream = "sandbox"
adapter = "chat"

[[models]]
id = "small"
credits_per_request = 3
"""


@pytest.fixture(scope="module")
def box(upstream_server: Upstream, start_farebox: StartFarebox) -> Farebox:
    return start_farebox(CONFIG.format(url=upstream_server.url), workers=1)


def solana_secret(key: SolanaKey) -> list[int]:
    """As id.json has it: the seed and the public key."""
    return list(bytes(key.keypair))


def new_wallet(kind: str) -> SolanaWallet | EthereumWallet:
    if kind == "ethereum":
        return EthereumWallet(os.urandom(32).hex())
    return SolanaWallet(solana_secret(SolanaKey()))


# The one for Python


@pytest.mark.parametrize("seed", [bytes(31) + b"\x01", bytes(range(32)), b"\xff" * 32])
def test_a_solana_key_is_read_in_the_forms_in_which_people_have_it(seed: bytes) -> None:
    key = SolanaKey(seed)
    forms: list[Any] = [
        str(key.keypair), f" {key.keypair}\n", solana_secret(key), bytes(key.keypair),
        json.dumps(solana_secret(key)),
    ]  # fmt: skip
    for form in forms:
        wallet = SolanaWallet(form)
        assert wallet.id == key.wallet
        assert wallet.sign(b"something") == key.sign(b"something")


def test_an_address_that_begins_with_zeros_is_spelled_with_ones() -> None:
    seed = next(
        seed
        for number in range(100_000)
        if bytes(SolanaKey(seed := number.to_bytes(32, "big")).keypair)[32] == 0
    )
    assert SolanaWallet(solana_secret(SolanaKey(seed))).id == SolanaKey(seed).wallet


@pytest.mark.parametrize("kind", ["solana", "ethereum"])
def test_a_wallet_signs_in_and_then_signs_each_request_of_requests(box: Farebox, kind: str) -> None:
    wallet = new_wallet(kind)

    token = session_token(box.url, wallet)

    mine = box.get("/api/v1/account", token).json()
    assert (mine["credits"], mine["wallets"]) == (CREDITS, [wallet.id])
    with requests.Session() as session:
        session.auth = WalletAuth(wallet)
        read = session.get(f"{box.url}/api/v1/account")
        assert (read.status_code, read.json()) == (200, mine)
        paid = session.post(f"{box.url}{SMS}", json=TEXT)
        assert paid.status_code == 200 and paid.headers["X-Credits-Charged"] == "1"
        odd = session.get(f"{box.url}/api/v1/up/ok/a b/ü", params={"q": "ö &?", "n": ["1", "2"]})
        assert odd.status_code == 200, odd.text
        for path in ("/ok/a?", "/ok/a#b", "/ok/a;b/c?c=%2f&d"):
            assert session.get(f"{box.url}/api/v1/up{path}").status_code == 200, path
        form = session.post(f"{box.url}/api/v1/up/ok/form", data="a text")
        assert form.status_code == 415 or form.json()["body"] == "a text"
        with session.get(f"{box.url}/api/v1/up/sse/3", stream=True) as stream:
            assert b"".join(stream.iter_content()) == b"".join(map(sse_event, range(3)))
        again = {"Idempotency-Key": "again"}
        first, second = (
            session.post(f"{box.url}{SMS}", json=TEXT, headers=again) for _ in range(2)
        )
        assert second.headers["Idempotent-Replayed"] == "true" and first.text == second.text
    record = box.call(token, paid.headers["X-Request-Id"])
    assert (record["payer"], record["captured"]) == ("wallet", 1)


@pytest.mark.parametrize("kind", ["solana", "ethereum"])
def test_httpx_signs_with_the_same_auth(box: Farebox, kind: str) -> None:
    wallet = new_wallet(kind)
    session_token(box.url, wallet)

    with httpx.Client(auth=WalletAuth(wallet), base_url=box.url) as client:
        assert client.get("/api/v1/account").json()["wallets"] == [wallet.id]
        assert client.post(SMS, json=TEXT).status_code == 200
        odd = client.get("/api/v1/up/ok/a b/ü", params={"q": "ö &?"})
        assert odd.status_code == 200, odd.text
        for path in ("/api/v1/up/ok/a?", "/api/v1/up/ok/a#b", "/api/v1/up/ok/a;b/c?c=%2f&d"):
            assert client.get(path).status_code == 200, path

    async def at_once() -> list[int]:
        async with httpx.AsyncClient(auth=WalletAuth(wallet), base_url=box.url) as client:
            answers = await asyncio.gather(*(client.post(SMS, json=TEXT) for _ in range(5)))
            return [answer.status_code for answer in answers]

    with ThreadPoolExecutor(1) as aside:  # a browser of other tests may have its loop in this one
        assert aside.submit(lambda: asyncio.run(at_once())).result(60) == [200] * 5


def test_the_openai_client_pays_with_a_wallet_in_place_of_a_key(box: Farebox) -> None:
    from openai import DefaultHttpxClient, OpenAI

    wallet = new_wallet("solana")
    session_token(box.url, wallet)
    with OpenAI(
        base_url=f"{box.url}/v1", api_key="unused",
        http_client=DefaultHttpxClient(auth=WalletAuth(wallet)),
    ) as client:  # fmt: skip
        assert [model.id for model in client.models.list()] == ["small"]
        asked: Any = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
        answer = client.chat.completions.with_raw_response.create(**asked)
        assert answer.headers["X-Credits-Charged"] == "3"
        whole = answer.parse().choices[0].message.content
        with client.chat.completions.create(**asked, stream=True) as stream:
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == whole
        left = requests.get(f"{box.url}/v1/account", auth=WalletAuth(wallet)).json()
    assert left["credits_remaining"] == CREDITS - 6


def test_a_request_for_another_origin_is_refused_and_so_is_a_message(box: Farebox) -> None:
    wallet = new_wallet("solana")
    session_token(box.url, wallet)
    elsewhere = "https://elsewhere.example.com"
    answer = requests.get(f"{box.url}/api/v1/account", auth=WalletAuth(wallet, elsewhere))
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_signature")
    with pytest.raises(ValueError, match="somewhere else"):
        session_token(box.url, wallet, elsewhere)


@pytest.mark.parametrize("name", ["farebox_wallet.py", "farebox-wallet.mjs"])
def test_they_are_short_enough_to_be_read(name: str) -> None:
    assert len((CLIENTS / name).read_text("utf-8").splitlines()) < 100


def test_nothing_but_what_signs_is_needed_beside_python() -> None:
    program = f"import sys; sys.path.insert(0, {str(CLIENTS)!r}); import farebox_wallet"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert farebox_wallet.__doc__


# The one for JavaScript


@pytest.fixture(scope="module")
def keys() -> tuple[SolanaKey, EvmKey]:
    return SolanaKey(), EvmKey()


@pytest.fixture(scope="module")
def javascript(box: Farebox, keys: tuple[SolanaKey, EvmKey]) -> dict[str, Any]:
    """What every scene of its program came to, in one run of it."""
    if shutil.which("node") is None or not (FOLDER / "node_modules" / "viem").is_dir():
        pytest.skip("needs Node 18 or later, and what `make test` installs by npm")
    solana, evm = keys
    told = {
        "url": box.url,
        "solana": {
            "id": solana.wallet, "text": str(solana.keypair), "array": solana_secret(solana),
        },
        "ethereum": {"key": f"0x{evm.account.key.hex().removeprefix('0x')}"},
    }  # fmt: skip
    done = subprocess.run(
        ["node", "client.mjs", json.dumps(told)],
        capture_output=True, text=True, timeout=60, cwd=FOLDER,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


SIGNERS = ["solanaText", "tweetnacl", "viem"]


def test_javascript_reads_a_solana_key_in_the_forms_in_which_people_have_it(
    javascript: dict[str, Any], keys: tuple[SolanaKey, EvmKey]
) -> None:
    assert javascript["forms"] == [keys[0].wallet] * 2 and javascript["aSignature"] == 200


@pytest.mark.parametrize("name", SIGNERS)
def test_javascript_signs_in_reads_pays_and_streams(
    javascript: dict[str, Any], keys: tuple[SolanaKey, EvmKey], name: str
) -> None:
    found, wallet = javascript[name], keys[name == "viem"].wallet
    assert found["id"] == wallet
    assert found["signedIn"]["wallets"] == [wallet]
    assert found["before"] == found["signedIn"]["credits"] > 0
    assert (found["paid"]["status"], found["paid"]["charged"]) == (200, "1")
    assert found["paid"]["body"]["provider"] == "sandbox"
    assert found["odd"]["target"] == "/ok/a%20b/%C3%BC?x=1&y=a+b%26&z"
    assert (found["bare"], found["deleted"]) == (200, 200)
    assert found["stream"] == b"".join(map(sse_event, range(3))).decode()


@pytest.mark.parametrize("name", SIGNERS)
def test_javascript_repeats_under_a_key_of_its_own_and_pays_once(
    javascript: dict[str, Any], name: str
) -> None:
    assert javascript[name]["same"]
    assert javascript[name]["again"] == [200, 200, "true"]


def test_javascript_signs_nothing_for_another_origin(javascript: dict[str, Any]) -> None:
    assert javascript["elsewhere"] == "that message signs in somewhere else"
    for name in SIGNERS:
        assert javascript[name]["refused"] == [401, "invalid_signature"]


@pytest.mark.parametrize("name", ["tweetnacl", "viem"])
def test_a_library_for_message_signatures_is_understood(
    javascript: dict[str, Any], name: str
) -> None:
    assert javascript["libraries"][name] == [200, 401, "invalid_signature"]


@pytest.fixture(autouse=True, scope="module")
def the_folder_of_the_clients_is_forgotten() -> Iterator[None]:
    yield
    sys.path.remove(str(CLIENTS))


# docs/wallets.md


def blocks(language: str) -> list[str]:
    text = (CLIENTS.parent / "wallets.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("number", range(3))
def test_the_programs_of_the_document_run(
    box: Farebox, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = blocks("python")[number]
    key, is_evm = os.urandom(32), "EthereumWallet(" in program
    secret = key.hex() if is_evm else str(SolanaKey(key).keypair)
    session_token(box.url, EthereumWallet(secret) if is_evm else SolanaWallet(secret))
    monkeypatch.setenv("WALLET_KEY", secret)
    assert "http://127.0.0.1:8402" in program
    exec(compile(program.replace("http://127.0.0.1:8402", box.url), "wallets.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.fullmatch([r"eyJ\S+\n", r"200 1\n", r"\['small'\]\n"][number], printed), printed


def test_the_program_in_javascript_runs(box: Farebox, tmp_path: Path) -> None:
    if shutil.which("node") is None or not (FOLDER / "node_modules" / "viem").is_dir():
        pytest.skip("needs Node 18 or later, and what `make test` installs by npm")
    (program,) = blocks("js")
    key = EvmKey()
    secret = f"0x{key.account.key.hex().removeprefix('0x')}"
    session_token(box.url, EthereumWallet(secret))
    (tmp_path / "node_modules").symlink_to(FOLDER / "node_modules")
    shutil.copy(CLIENTS / "farebox-wallet.mjs", tmp_path)
    (tmp_path / "program.mjs").write_text(program.replace("http://127.0.0.1:8402", box.url))
    done = subprocess.run(
        ["node", "program.mjs"], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env=os.environ | {"WALLET_KEY": secret},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("200 1\n", "")


def test_the_worked_example_is_right_to_the_byte_and_would_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (CLIENTS.parent / "wallets.md").read_text("utf-8")
    ((request,), (base,)) = blocks("http"), blocks("text")
    base = base.rstrip("\n")
    head, _, body = request.rstrip("\n").partition("\n\n")
    first, *lines = head.split("\n")
    method, path, _ = first.split()
    headers = dict(line.split(": ", 1) for line in lines)
    secret = re.findall(r"`(0x[0-9a-f]{64})`", text)[0]
    evm, solana = EvmKey(secret), SolanaKey(bytes(range(32)))
    assert f"`{len(base)}`" in text.partition("```text")[0].splitlines()[-2]

    mine = signed(
        evm, method, f"https://{headers['Host']}{path}", body.encode(),
        created=1_800_000_000, nonce="b3k2pp5k7z-1",
    )  # fmt: skip
    assert {name: headers[name] for name in mine} == mine
    assert base.splitlines()[-1].endswith(mine["Signature-Input"].removeprefix("sig="))
    signature = base64.b64encode(evm.sign(base.encode())).decode()
    assert headers["Signature"] == f"sig=:{signature}:"
    theirs = base.replace(evm.wallet, solana.wallet)
    other = base64.b64encode(solana.sign(theirs.encode())).decode()
    assert f"`Signature: sig=:{other}:`" in text and f'keyid="{solana.wallet}"' in text

    Clock(monkeypatch, "2027-01-15T08:00:00Z")
    toml = CONFIG.format(url="http://127.0.0.1:9")
    with Box(tmp_path / "i", toml, FAREBOX_PUBLIC_URL="https://api.example.com") as there:
        for key, change in ((evm, {}), (solana, {"Signature": f"sig=:{other}:"})):
            sign_in(there, key)
            sent = {
                name: each.replace(evm.wallet, key.wallet) for name, each in headers.items()
            } | change
            answer = there.request(
                method, path, body=body.encode(), headers=sent, host="api.example.com"
            )
            assert answer.status == 200, answer.body


def test_the_errors_of_the_document_are_those_there_are() -> None:
    text = (CLIENTS.parent / "wallets.md").read_text("utf-8")
    table = text.partition("## When it does not work")[2].partition("\n## ")[0]
    named = re.findall(r"^\| ([45]\d\d) `([a-z_]+)` \|", table, re.M)
    assert {code: int(status) for status, code in named} == {
        code: KINDS[code].status for _, code in named
    }
    assert {"invalid_signature", "wallet_linked", "signup_closed"} <= {code for _, code in named}
