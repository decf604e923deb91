"""How gunicorn serves Farebox. Everything an operator may set comes from the environment."""

import contextlib
import os
import resource
import socket
import sys

import serving
from config import exit_with, instance_folder, load_or_exit
from core import firstrun, upkeep
from core.instance import Instance

# A call in flight takes six descriptors. The usual limit of 1,024 is there for programs that could
# not bear more, of which this is none.
_most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
with contextlib.suppress(OSError, ValueError):  # macOS has a limit that it does not tell
    resource.setrlimit(resource.RLIMIT_NOFILE, (_most, _most))

firstrun.prepare_folder(instance_folder())
_settings = load_or_exit()

wsgi_app = "app:create_app()"
bind = _settings.bind
workers = _settings.workers
threads = _settings.threads
worker_class = "serving.Worker"
logger_class = "serving.Logger"
worker_connections = 1000 + threads
keepalive = 65  # longer than the idle time of the usual proxies in front
graceful_timeout = 30
limit_request_line = 8190
limit_request_field_size = 16 * 1024
# Only FAREBOX_TRUSTED_PROXIES decides whose X-Forwarded-* count.
forwarded_allow_ips = ""
forwarder_headers = ""
secure_scheme_headers = {}
control_socket_disable = True
proc_name = "farebox"
logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "masked": {
            "()": "core.masking.MaskingFormatter",
            "secrets": sorted(_settings.secrets),
            "fmt": "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s",
        }
    },
    "filters": {"calm": {"()": lambda: serving.calm}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "masked"}},
    "root": {"level": "WARNING", "handlers": ["stderr"]},
    "loggers": {
        "gunicorn.error": {
            "level": "INFO",
            "handlers": ["stderr"],
            "filters": ["calm"],
            "propagate": False,
        },
        "farebox": {"level": "INFO"},
    },
}

# A peer that stops sending or reading in the middle of a message gives its thread back after
# this long. Accepted sockets inherit the option from the listener.
_STALLED_SECONDS = 7


def when_ready(server):
    timeout = _STALLED_SECONDS.to_bytes(8, sys.byteorder) + bytes(8)  # struct timeval
    for listener in server.LISTENERS:
        if listener.sock.family == socket.AF_UNIX:
            continue
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.sock.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_SECONDS * 1000
            )
    _greet()


def post_worker_init(worker):
    worker.instance = instance = worker.wsgi.extensions["farebox"]
    instance.incarnation()  # from now on `restore` knows that somebody serves
    worker.upkeep = upkeep.begin(instance)


def worker_exit(server, worker):
    if hasattr(worker, "upkeep"):
        for each in worker.upkeep:
            each.stop()


def _greet():
    """On the first run: the set-up link and a curl that works."""
    instance = Instance(_settings)
    instance.migrate()
    if instance.trouble is not None:
        exit_with(instance.trouble)
    found = firstrun.welcome(instance.db, _settings)
    instance.db.close()
    if found is not None:
        print(firstrun.greeting(_settings, found, os.environ), flush=True)
