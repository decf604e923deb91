"""The instance folder, from nothing: config, secret, database; and what the first run prints."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from config import FILE_NAME, Settings
from core import clock, examples, files, keys, ledger, links, tokens
from core.audit import SYSTEM
from core.catalog import Catalog
from core.keys import NewSecret, Terms
from models import Database, Tx

STARTER_CREDITS = 100
EXAMPLE = Path(__file__).parent.parent / "templates" / FILE_NAME


class Welcome(NamedTuple):
    """What the first run has made for the person who started it."""

    setup_token: str
    starter_key: str


def prepare_folder(folder: Path) -> None:
    """Make what is missing of the instance folder. Safe when several processes do it at once."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.write_once(folder / FILE_NAME, EXAMPLE.read_text("utf-8"))
    files.write_once(folder / "secret_key", tokens.new_secret() + "\n")


def welcome(db: Database, settings: Settings) -> Welcome | None:
    """On the first run: an account with a starter key and a set-up link. None on any other."""
    secret = NewSecret(settings.instance.key_prefix)
    now = clock.now_ms()

    def work(tx: Tx) -> Welcome | None:
        if ledger.has_accounts(tx):
            return None
        account_id = ledger.open_account(tx, now)
        ledger.add_credits(
            tx,
            account_id,
            "grant",
            STARTER_CREDITS,
            f"starter:{account_id}",
            "starter credits",
            now,
        )
        keys.add(tx, account_id, None, Terms("starter"), secret, now, SYSTEM)
        token = links.make(tx, "setup", account_id, now)
        return Welcome(token, secret.token)

    return db.write(work, durable=True)


def greeting(settings: Settings, made: Welcome, environ: Mapping[str, str]) -> str:
    """What the first run prints: where to set up, what to paste."""
    base = settings.public_url
    lines = [
        "",
        "Farebox is running. Two things to do:",
        "",
        "1. Set up the dashboard's first user (this link works once, for 7 days):",
        f"   {base}/setup?token={made.setup_token}",
    ]
    host, _, port = settings.bind.rpartition(":")
    server = environ.get("SSH_CONNECTION", "").split(" ")
    if host in ("127.0.0.1", "[::1]", "localhost") and len(server) == 4:
        user = environ.get("USER") or "you"
        lines += [
            "   From your own machine, open a tunnel first:",
            f"   ssh -L {port}:{settings.bind} {user}@{server[2]}",
        ]
    routes = Catalog(settings).routes
    route = examples.first_for(routes, None)
    if route is None:
        lines += [
            "",
            f"2. Sell something: add [[routes]] to {settings.folder / FILE_NAME}, then restart.",
            f"   This key will have {STARTER_CREDITS} credits for it and is shown only now:",
            "",
            made.starter_key,
            "",
        ]
        return "\n".join(lines)
    lines += [
        "",
        f"2. Make a paid call. This key has {STARTER_CREDITS} credits and is shown only now:",
        "",
        examples.curl(base, route, made.starter_key),
        "",
    ]
    openai_base = examples.openai_base(base, routes, None)
    if openai_base is not None:
        lines += [
            "   Or give these to the OpenAI SDK, and whatever else reads them:",
            "",
            f"export OPENAI_BASE_URL={openai_base}",
            f"export OPENAI_API_KEY={made.starter_key}",
            "",
        ]
    return "\n".join(lines)
