"""What Farebox is compared with: Flask and urllib3 passing a POST through, and nothing else.

What streams is passed on as it arrives.
"""

import os

import urllib3
from flask import Flask, Response, request

UPSTREAM = os.environ["BENCH_UPSTREAM"]
pool = urllib3.PoolManager(maxsize=64)
app = Flask(__name__)


@app.post("/<path:path>")
def forward(path: str) -> Response:
    """The upstream's status, body and content type for the request's body."""
    headers = {"Content-Type": request.content_type or "application/json"}
    answer = pool.request(
        "POST", f"{UPSTREAM}/{path}", body=request.get_data(), headers=headers,
        preload_content=False,
    )  # fmt: skip
    kind = answer.headers["Content-Type"]
    body = answer.stream() if kind.startswith("text/event-stream") else answer.data
    return Response(body, answer.status, content_type=kind)
