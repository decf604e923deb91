"""Who is at the browser: sign-in cookies, and proof that a form is ours.

The cookie holds a secret that opens a session kept in the database (`core/sessions.py`); whatever
else Flask keeps in it is short-lived and of no use to anybody else: a form token, a sign-in begun.
"""

import re
from urllib.parse import quote, urlsplit

from flask import Flask, g, redirect, request, session
from flask_login import LoginManager, current_user, login_user, logout_user
from flask_wtf.csrf import CSRFError, CSRFProtect
from werkzeug.wrappers import Response as BaseResponse

from blueprints.rendering import client_address, instance
from core import clock, errors, passwords, sessions, tokens, users
from core.audit import Actor
from core.errors import Refusal
from core.instance import Instance
from core.limits import Rate, network_of, spend_rate
from core.sessions import Origin, Session
from core.users import User
from models import Tx

CHOICE = "account"  # in the cookie: which of their accounts a person looks at
_csrf = CSRFProtect()
# Failures of one address against everybody, for one that tries a password on many names.
_NAMES_AT_ONCE = 10
_HERE = re.compile(r"/(?!/)[\x21-\x5b\x5d-\x7e]*")  # a path of ours: no host, no backslash


class Visitor:
    """A person who is signed in, as flask-login wants to see them."""

    is_authenticated = True
    is_active = True
    is_anonymous = False

    def __init__(self, user: User, found: Session, secret: str) -> None:
        self.user = user
        self.session = found
        self.actor = Actor(user.id, client_address(request.environ))
        self._secret = secret

    def get_id(self) -> str:
        """What the cookie holds: not who it is, but what opens the session."""
        return self._secret


def register(app: Flask) -> None:
    """Make cookies ours and tell flask-login who is who."""
    found: Instance = app.extensions["farebox"]
    is_https = found.settings.public_url.startswith("https://")
    app.config.update(
        # The prefix has browsers refuse it from another host or path (RFC 6265bis, 4.1.3.2).
        SESSION_COOKIE_NAME="__Host-farebox" if is_https else "farebox",
        SESSION_COOKIE_SECURE=is_https,
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        WTF_CSRF_CHECK_DEFAULT=False,  # `check_csrf` is called where a cookie counts
        WTF_CSRF_HEADERS=["X-CSRF-Token"],
        WTF_CSRF_TIME_LIMIT=None,  # good for as long as the sign-in
        WTF_CSRF_SSL_STRICT=False,  # we look at Origin, which is not left out for privacy
    )
    _csrf.init_app(app)
    login = LoginManager(app)
    login.session_protection = None  # a session is ended by who owns it, not by a new address
    login.user_loader(_load)
    login.unauthorized_handler(_to_sign_in)


def visitor() -> Visitor:
    """Who is signed in, if anybody is. Themselves, and not flask-login's stand-in for whoever it is
    where it is asked: transactions run wherever a commit is led from."""
    found: Visitor = current_user._get_current_object()
    return found


def sign_in(user: User, method: str, password_hash: str | None = None) -> bool:
    """Start a session for this browser, in place of any before. `password_hash` is what a password
    was found to satisfy; False when it has been replaced since. Raises `account_suspended`."""
    secret, now, how = tokens.new_secret(), clock.now_ms(), origin(method)

    def work(tx: Tx) -> Session | None:
        # Asked again here: checking takes a while, and what ends all sign-ins ends this one too.
        current = users.get(tx, user.id)
        users.require_active(current)
        if password_hash is not None:
            found = users.password_of(tx, current.email or "")
            if found is None or found[1] != password_hash:
                return None
        return sessions.start(tx, user.id, how, now, secret)

    started = instance().db.write(work, durable=True)
    if started is None:
        return False
    take_seat(user, started, secret)
    return True


def take_seat(user: User, started: Session, secret: str) -> None:
    """This browser's session is from now on the one that was just started with that secret."""
    sign_out()
    login_user(Visitor(user, started, secret))


def with_password(email: str, password: str) -> tuple[User, str | None] | None:
    """The user of that e-mail, with the hash of their password, if that is what was typed; who does
    not exist takes as long.

    Every attempt counts, by address and name together, so that nobody can lock a person out from
    elsewhere. Raises `rate_limited`.
    """
    client = network_of(client_address(request.environ))
    most = instance().settings.limits.failed_auth_per_minute
    name = tokens.digest(email.encode()).hex()
    throttle((f"password:{client}", most * _NAMES_AT_ONCE), (f"password:{client}:{name}", most))
    with instance().db.reading() as tx:
        found = users.password_of(tx, email)
    return found if passwords.is_right(password, found and found[1]) else None


def throttle(*limits: tuple[str, int]) -> None:
    """Count one attempt under each name, the widest first. Raises `rate_limited` past a limit a
    minute; what comes after that one is not counted, so nobody fills the database with names."""
    now = clock.now_ms()

    def work(tx: Tx) -> Rate | None:
        for subject, most in limits:
            rate = spend_rate(tx, subject, most, now)
            if rate.exceeded:
                return rate
        return None

    exceeded = instance().db.write(work)
    if exceeded is not None:
        raise errors.rate_limited("Too many attempts. Wait a minute.", exceeded.reset_seconds)


def sign_out() -> None:
    """End this browser's session, if it has one, and forget all its cookie held."""
    if current_user.is_authenticated:
        me, now = visitor(), clock.now_ms()

        def work(tx: Tx) -> bool:
            return sessions.end(tx, me.session.id, me.user.id, now, me.actor)

        instance().db.write(work, durable=True)
        logout_user()
    session.clear()


def origin(method: str) -> Origin:
    """How and from where this request signs somebody in."""
    agent = request.headers.get("User-Agent")
    return Origin(method, client_address(request.environ), agent)


def check_csrf() -> None:
    """Raises `csrf_failed` unless an unsafe request comes from a page of ours in this browser."""
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    sent_from = request.headers.get("Origin")
    try:
        if sent_from is not None and urlsplit(sent_from).netloc not in _our_hosts():
            raise _forged()
        _csrf.protect()
    except (ValueError, CSRFError) as error:  # ValueError: an Origin that is no URL
        raise _forged() from error


def signed_message() -> tuple[str, str]:
    """The message a form brings and its signature. Browsers end lines in CR LF on the way here
    (HTML, form submission), and what was signed has none."""
    message = request.form.get("message", "").replace("\r\n", "\n")
    return message, request.form.get("signature", "")


def local_path(wish: str | None, otherwise: str = "/dashboard") -> str:
    """Where to go next, if it is a path here: never another site."""
    return wish if wish and _HERE.fullmatch(wish) else otherwise


def _our_hosts() -> set[str]:
    return {request.host, urlsplit(instance().settings.public_url).netloc}


def _forged() -> Refusal:
    return Refusal("csrf_failed", "This form is too old, or was not sent from here. Load it again.")


def _load(secret: str) -> Visitor | None:
    """Who has this cookie. Every page asks, and the one that says what went wrong must not go wrong
    in the same way."""
    try:
        return _visitor(secret)
    except Exception:
        if g.get("visitor_unknown") or request.routing_exception is not None:
            return None
        g.visitor_unknown = True
        raise


def _visitor(secret: str) -> Visitor | None:
    found, now = instance(), clock.now_ms()
    with found.db.reading() as tx:
        opened = sessions.by_cookie(tx, secret, now)
        user = None if opened is None else users.get(tx, opened.user_id)
    if opened is None or user is None:
        return None
    if sessions.is_due(opened, now):
        found.db.write(lambda tx: sessions.touch(tx, opened.id, now))
    return Visitor(user, opened, secret)


def _to_sign_in() -> BaseResponse:
    target = request.full_path.rstrip("?") if request.method == "GET" else "/dashboard"
    return redirect(f"/login?next={quote(target, safe='')}", 303)
