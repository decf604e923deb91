"""Clients at the edge of the protocol, over real sockets: nothing free, nothing unbounded."""

import json
import socket
import struct
import time
from collections.abc import Callable

import pytest
from doubles import Upstream
from server import Farebox, until

PRICE = 5
MAX_SECONDS = 2
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, no time: close() sends RST


@pytest.fixture(scope="module")
def farebox(start_farebox: Callable[..., Farebox], upstream_server: Upstream) -> Farebox:
    return start_farebox(
        f"""
[upstreams.up]
kind = "http"
base_url = "{upstream_server.url}"
timeout_seconds = 1.5
max_seconds = {MAX_SECONDS}

[[routes]]
path = "/api/v1/up/*"
methods = ["GET", "POST"]
upstream = "up"
upstream_path = "/*"
credits = {PRICE}
body_bytes = 1000
"""
    )


def exchange(farebox: Farebox, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes and read until the server closes: status, headers, body."""
    with farebox.connect() as sock:
        sock.sendall(sent)
        received = b""
        while part := sock.recv(65536):
            received += part
            head, found, body = received.partition(b"\r\n\r\n")
            if found and b"Content-Length: %d\r\n" % len(body) in head + b"\r\n":
                break
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(lines[0].split(" ")[1]), headers, body


@pytest.mark.parametrize("taken", [1, 20_000, 60_000])
def test_a_client_that_takes_some_of_a_large_answer_and_hangs_up_pays_for_it(
    farebox: Farebox, upstream: Upstream, taken: int
) -> None:
    _, key = farebox.account(50)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", farebox.port))
        sock.sendall(
            b"GET /api/v1/up/big/1048577 HTTP/1.1\r\nHost: localhost\r\n"
            b"Authorization: Bearer " + key.encode() + b"\r\n\r\n"
        )
        received = b""
        while b"\r\n\r\n" not in received or len(received.partition(b"\r\n\r\n")[2]) < taken:
            received += sock.recv(1024)
        assert received.startswith(b"HTTP/1.1 200")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    assert farebox.settled(key, 15) == 50 - PRICE


@pytest.mark.parametrize(
    "chunks",
    [b"zz\r\nabc\r\n0\r\n\r\n", b"3\r\nabcX\r\n0\r\n\r\n", b"-3\r\nabc\r\n0\r\n\r\n"],
)
def test_a_body_in_broken_chunks_is_the_clients_mistake(
    farebox: Farebox, upstream: Upstream, chunks: bytes
) -> None:
    status, headers, body = exchange(
        farebox,
        b"POST /api/v1/up/ok HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: close\r\n\r\n" + chunks,
    )
    assert (status, json.loads(body)["error"]) == (400, "validation_error")
    assert headers["x-request-id"] == json.loads(body)["request_id"]
    assert upstream.hits() == []


def test_what_is_not_http_is_refused_with_a_request_id(farebox: Farebox) -> None:
    status, headers, body = exchange(farebox, b"NOT HTTP AT ALL\r\n\r\n")
    assert (status, json.loads(body)["error"]) == (400, "validation_error")
    assert headers["x-request-id"] == json.loads(body)["request_id"]
    assert headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", ["/setup", "/reset"])
def test_a_form_is_not_read_without_end(farebox: Farebox, path: str) -> None:
    edge = b"--b\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n"
    part = b"x" * 10_000
    chunk = b"%x\r\n" % len(part) + part + b"\r\n"
    with farebox.connect() as sock:
        sock.sendall(
            b"POST " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        sock.sendall(b"%x\r\n" % len(edge) + edge + b"\r\n")
        sent = 0
        answer = b""
        sock.settimeout(0.05)
        deadline = time.monotonic() + 20
        while not answer and time.monotonic() < deadline and sent < 50_000_000:
            try:
                sock.sendall(chunk)
                sent += len(part)
                answer = sock.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
    assert sent < 5_000_000
    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]


def test_a_body_that_stops_short_past_the_limit_is_still_too_large(farebox: Farebox) -> None:
    with farebox.connect() as sock:
        sock.sendall(
            b"POST /api/v1/up/ok HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n"
            + b"x" * 2000
        )
        sock.shutdown(socket.SHUT_WR)
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]


def test_a_whole_call_ends_when_its_time_is_up_however_it_dribbles(
    farebox: Farebox, upstream: Upstream
) -> None:
    _, key = farebox.account(50)
    begun = time.monotonic()
    # A byte every 1.3 s never falls silent for 1.5 s, so only the whole call's limit ends it.
    answer = farebox.get("/api/v1/up/drip/1300/10", key)
    assert (answer.status, answer.code) == (504, "provider_timeout")
    assert time.monotonic() - begun < MAX_SECONDS + 1
    assert farebox.settled(key) == 50
    until(lambda: all(hit.ended != "open" for hit in upstream.hits()), 10)
