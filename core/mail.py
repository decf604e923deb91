"""Mail, when the operator has configured a server; otherwise links are passed on by hand."""

import logging
import smtplib
import ssl
import threading
from email.message import EmailMessage

from config import SmtpSection

log = logging.getLogger("farebox.mail")

_PATIENCE_SECONDS = 10
_AT_ONCE = 8
_in_flight = threading.BoundedSemaphore(_AT_ONCE)


def send(smtp: SmtpSection, to: str, subject: str, text: str) -> None:
    """Hand a message to the server. Raises OSError (smtplib's errors are among them)."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = smtp.from_, to, subject
    message.set_content(text)
    secure = ssl.create_default_context()
    server: smtplib.SMTP
    if smtp.implicit_tls:
        server = smtplib.SMTP_SSL(smtp.host, smtp.port, timeout=_PATIENCE_SECONDS, context=secure)
    else:
        server = smtplib.SMTP(smtp.host, smtp.port, timeout=_PATIENCE_SECONDS)
    with server:
        if smtp.needs_starttls:
            server.starttls(context=secure)
        if smtp.login is not None:
            server.login(*smtp.login)
        server.send_message(message)


def send_later(smtp: SmtpSection, to: str, subject: str, text: str) -> None:
    """As `send`, behind the caller's back: how long an answer takes tells nobody whether an address
    is known. What goes wrong is logged; the links in our mails can be asked for again."""
    if not _in_flight.acquire(blocking=False):
        log.error("a mail was dropped: %d others are on their way", _AT_ONCE)
        return
    threading.Thread(target=_deliver, args=(smtp, to, subject, text), daemon=True).start()


def _deliver(smtp: SmtpSection, to: str, subject: str, text: str) -> None:
    try:
        send(smtp, to, subject, text)
    except Exception:
        log.exception("a mail could not be handed to %s", smtp.host)
    finally:
        _in_flight.release()


def reset_text(url: str) -> str:
    return (
        "Somebody, probably you, asked for a new password. This link works once, for a day:\n\n"
        f"{url}\n\nIf it was not you, there is nothing to do.\n"
    )


def invitation_text(url: str, inviter: str | None) -> str:
    return (
        f"{inviter or 'The owner of an account'} invites you to share their credits. This link"
        f" works once, for 7 days:\n\n{url}\n"
    )
