"""gunicorn's threaded worker, less trusting of clients."""

import json
import logging
import socket
from typing import Any

from gunicorn.workers import gthread

_DRAIN_BYTES = 1024 * 1024
_BAD_REQUEST = {
    "success": False,
    "error": "validation_error",
    "message": "The request is not HTTP as it is understood here.",
}


class _Connection(gthread.TConn):  # type: ignore[misc]  # gunicorn has no types
    """A connection whose end is not waited for."""

    def close(self, graceful: bool = False) -> None:
        """Close without waiting for the peer.

        gunicorn waits up to two seconds, on the thread that accepts for the whole worker, for each
        client that does not hang up. What has arrived is read, so that no reset overtakes the
        answer; what the client may still send is its own affair.
        """
        try:
            if graceful:
                self.sock.shutdown(socket.SHUT_WR)
                self.sock.setblocking(False)
                drained = 0
                while drained < _DRAIN_BYTES and (data := self.sock.recv(65536)):
                    drained += len(data)
        except OSError:
            pass  # the peer is gone, or has nothing more to say
        finally:
            self.sock.close()


gthread.TConn = _Connection  # the worker makes its connections by this name


class Worker(gthread.ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """The worker that serves Farebox."""

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Refuse what is not HTTP, in JSON; gunicorn's own page repeats what was sent."""
        self.log.warning("not HTTP: %s", type(exc).__name__)
        body = json.dumps(_BAD_REQUEST).encode() + b"\n"
        head = (
            "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Cache-Control: no-store\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            client.sendall(head.encode() + body)
        except OSError:
            self.log.debug("the client did not wait for its refusal")


def calm(record: logging.LogRecord) -> bool:
    """A logging filter: a client that stalled past its time-out is a line, not a traceback."""
    if record.exc_info and isinstance(record.exc_info[1], BlockingIOError):
        record.exc_info = record.exc_text = None
        record.msg, record.args = "a client stalled and was let go", ()
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True
