"""gunicorn's threaded worker, less trusting of clients."""

import json
import logging
import socket
from http import HTTPStatus
from typing import Any

from gunicorn import glogging
from gunicorn.http.errors import ParseException
from gunicorn.workers import base, gthread

from core import clock, errors, tokens
from core.instance import Instance

_DRAIN_BYTES = 1024 * 1024
# After a worker is told to stop. A silent stream is looked at every 15 seconds, and all must be
# over before gunicorn's graceful_timeout is.
STREAMS_GO_ON_SECONDS = 10.0


class _Connection(gthread.TConn):
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


# The worker makes its connections by this name, and offers no other way to choose their class.
gthread.TConn = _Connection  # type: ignore[misc]


class Worker(gthread.ThreadWorker):
    """The worker that serves Farebox."""

    _quitting = False
    _busy = 0  # connections given to the threads
    _owes_a_turn = False  # whether a request has ended since a connection was accepted
    instance: Instance | None = None  # what is served, once it is

    def enqueue_req(self, conn: Any) -> None:
        self._busy += 1
        if self._busy >= self.cfg.threads:
            self.set_accept_enabled(False)
        super().enqueue_req(conn)

    def finish_request(self, conn: Any, fs: Any) -> None:
        self._busy -= 1
        self._owes_a_turn = True
        super().finish_request(conn, fs)

    def set_accept_enabled(self, enabled: bool | None) -> None:
        """Accept no more than there are threads for; and one more whenever a request has ended.

        What a worker has accepted waits for its threads alone: while they are busy with streams
        for minutes, those of another worker may be idle. But where requests end, connections that
        are kept would have every thread again before a new one had its turn. Asked in every turn
        of the loop, which the end of a request begins anew.
        """
        has_room = self._busy < self.cfg.threads or self._owes_a_turn
        super().set_accept_enabled(bool(enabled) and has_room)

    def accept(self, listener: Any) -> None:
        self._owes_a_turn = False
        super().accept(listener)

    def handle_exit(self, sig: Any, frame: Any) -> None:
        """Stop when what is in flight has ended. A stream is ended early enough to be charged."""
        super().handle_exit(sig, frame)
        if self.instance is not None:
            self.instance.streams_end_at = clock.monotonic() + STREAMS_GO_ON_SECONDS

    def handle_quit(self, sig: Any, frame: Any) -> None:
        """Stop at once, once.

        Ctrl-C reaches a worker twice, from the terminal and from the master. The threaded worker's
        own handler asks the thread pool to stop, and so waits for a lock that the code it
        interrupts may hold: it hands requests to the pool. The pool ends with the interpreter.
        """
        if not self._quitting:
            self._quitting = True
            base.Worker.handle_quit(self, sig, frame)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Refuse what is not HTTP, in JSON; gunicorn's own page repeats what was sent."""
        if isinstance(exc, ParseException):
            why = errors.invalid_body("The request is not HTTP as it is understood here.")
            self.log.warning("not HTTP: %s", type(exc).__name__)
        else:
            why = errors.Refusal("internal_error", "Something went wrong here.")
            self.log.error("a request failed outside the application", exc_info=exc)
        request_id = tokens.new_id("req")
        body = json.dumps(why.body("flat", request_id, "")).encode() + b"\n"
        status = HTTPStatus(why.kind.status)
        head = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            "Connection: close",
            "Content-Type: application/json",
            "Cache-Control: no-store",
            f"Content-Length: {len(body)}",
            f"X-Request-Id: {request_id}",
            *(f"{name}: {value}" for name, value in why.all_headers().items()),
        ]
        try:
            client.sendall("\r\n".join([*head, "", ""]).encode() + body)
        except OSError:
            self.log.debug("the client did not wait for its refusal")


class Logger(glogging.Logger):
    """gunicorn's logger without an access log: every paid call has a record of its own."""

    def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
        """Write nothing, and gather nothing for it."""


def calm(record: logging.LogRecord) -> bool:
    """A logging filter: a client whose connection stalled or broke is a line, not a traceback."""
    if record.msg == "Socket error processing request." and record.exc_info:
        record.msg, record.args = "a client was let go: %s", (record.exc_info[1],)
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.exc_info = record.exc_text = None
    return True
