"""The bare side's gunicorn settings: what Farebox's own file says of speed, none of its hooks."""

import runpy

farebox = runpy.run_path("gunicorn.conf.py")
worker_class = "gthread"
control_socket_disable = True  # it would be shared with Farebox's, in the user's home
for name in ("workers", "threads", "keepalive", "backlog", "timeout", "worker_connections"):
    if name in farebox:
        globals()[name] = farebox[name]
