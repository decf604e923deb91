"""`flask …`: administration, usable while the instance serves."""

import functools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from flask import Flask, current_app
from flask.cli import AppGroup, with_appcontext

import config
from core import (
    audit,
    calls,
    clock,
    doctor,
    issuers,
    keys,
    ledger,
    mail,
    passwords,
    rates,
    session_tokens,
    sessions,
    tokens,
    users,
    vouchers,
    wallets,
)  # fmt: skip
from core import backup as backups
from core.adapters import Inbound
from core.adapters.llm.request import Wish
from core.audit import COMMAND_LINE
from core.errors import Refusal
from core.gateway import ADAPTERS
from core.instance import Instance
from core.keys import NewSecret, Terms
from core.payments import reconciler, records
from core.payments.facilitator import Verdict
from core.sessions import Origin
from models import Tx


class WholeNumber(click.ParamType[int]):
    """An integer in ASCII digits; Python's own `int` would also read `1_0` and `٣`."""

    name = "integer"

    def __init__(self, least: int | None = None) -> None:
        self._least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        if not re.fullmatch(r"[+-]?[0-9]{1,40}", value):
            self.fail(f"{value!r} is not a whole number.", param, ctx)
        if self._least is not None and int(value) < self._least:
            self.fail(f"{value} is less than {self._least}.", param, ctx)
        return int(value)


F = TypeVar("F", bound=Callable[..., Any])

users_group = AppGroup("users", help="People who sign in.")
accounts_group = AppGroup(
    "accounts", help="Accounts. WHO is an e-mail, a did:…, a wallet or an acct_…."
)
tokens_group = AppGroup("tokens", help="Session tokens, ours and outside issuers'.")
keys_group = AppGroup("keys", help="API keys.")
credits_group = AppGroup(
    "credits", help="Balances. WHO is an e-mail, a did:…, a wallet or an acct_…."
)
vouchers_group = AppGroup("vouchers", help="Codes that become credits, once.")
payments_group = AppGroup("payments", help="Payments on the spot (x402).")
ledger_group = AppGroup("ledger", help="The books.")


def register(app: Flask) -> None:
    """Give the app its commands."""
    for group in (users_group, accounts_group, tokens_group, keys_group, credits_group,
                  vouchers_group, payments_group, ledger_group):  # fmt: skip
        app.cli.add_command(group)
    for single in (audit_command, backup, restore, doctor_command, price):
        app.cli.add_command(single)


def instance() -> Instance:
    """The instance, with a database that can be used."""
    found: Instance = current_app.extensions["farebox"]
    if found.trouble is not None:
        config.exit_with(found.trouble)
    return found


def plainly(command: F) -> F:
    """Tell a refusal as one line and exit code 1."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except Refusal as refusal:
            raise click.ClickException(refusal.message) from refusal

    return wrapper  # type: ignore[return-value]  # same signature, by functools.wraps


def write(work: Callable[[Tx], Any]) -> Any:
    return instance().db.write(work, durable=True)


# users


@users_group.command("add")
@click.argument("email")
@click.option("--operator", is_flag=True, help="May run this instance.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@plainly
def add_user(email: str, operator: bool, password_stdin: bool) -> None:
    """Add a user, with an account of their own."""
    address = users.checked_email(email)
    hashed = None
    if password_stdin:
        hashed = passwords.hashed(sys.stdin.readline().rstrip("\r\n"), address)
    now = clock.now_ms()
    granted = instance().settings.instance.signup_credits

    def work(tx: Tx) -> users.User:
        user = users.add(tx, address, hashed, operator, now, COMMAND_LINE)
        users.give_signup_credits(tx, user.account_id, granted, now)
        return user

    user = write(work)
    click.echo(f"{user.email} {user.account_id}")


@users_group.command("list")
@plainly
def list_users() -> None:
    """One user a line: e-mail, or wallet, or id; account, whether operator, state if not active."""
    with instance().db.reading() as tx:
        for user in users.every(tx):
            linked = [] if user.email else wallets.of_account(tx, user.account_id)
            name = linked[0].wallet.name if linked else user.email or user.id
            fields = [name, user.account_id]
            fields += ["operator"] * user.is_operator
            fields += [user.status] * (user.status != "active")
            click.echo(" ".join(fields))


@users_group.command("reset-link")
@click.argument("who")
@plainly
def reset_link(who: str) -> None:
    """Print a link, good once and for a day, to choose a new password; mail it if [smtp] is set."""
    settings, now = instance().settings, clock.now_ms()

    def work(tx: Tx) -> tuple[str, str | None]:
        user = users.of_who(tx, who)
        return users.reset_link(tx, user, now, COMMAND_LINE), user.email

    token, email = write(work)
    url = f"{settings.public_url}/reset?token={token}"
    click.echo(url)
    if settings.smtp is not None and email is not None:
        try:
            mail.send(settings.smtp, email, "A new password", mail.reset_text(url))
        except OSError as error:
            raise click.ClickException(f"the link could not be mailed: {error}") from error
        click.echo(f"mailed to {email}", err=True)


@users_group.command("suspend")
@click.argument("who")
@click.option("--reason")
@plainly
def suspend_user(who: str, reason: str | None) -> None:
    """Keep a person out: sign-ins end, their keys and tokens are refused."""
    now = clock.now_ms()
    write(lambda tx: users.suspend(tx, users.of_who(tx, who), reason, now, COMMAND_LINE))


@users_group.command("resume")
@click.argument("who")
@plainly
def resume_user(who: str) -> None:
    """Let a suspended person in again."""
    now = clock.now_ms()
    write(lambda tx: users.resume(tx, users.of_who(tx, who), now, COMMAND_LINE))


@users_group.command("operator")
@click.argument("who")
@click.option("--remove", is_flag=True, help="Not any more.")
@plainly
def make_operator(who: str, remove: bool) -> None:
    """Let a person run this instance."""
    now = clock.now_ms()

    def work(tx: Tx) -> None:
        users.set_operator(tx, users.of_who(tx, who), not remove, now, COMMAND_LINE)

    write(work)


@users_group.command("sign-out")
@click.argument("who")
@plainly
def sign_out_user(who: str) -> None:
    """End every sign-in of a person, and the session tokens they gave."""
    now = clock.now_ms()
    ended = write(lambda tx: sessions.end_all(tx, users.of_who(tx, who).id, now, COMMAND_LINE))
    click.echo(f"{ended} sign-ins ended")


@users_group.command("close")
@click.argument("who")
@plainly
def close_user(who: str) -> None:
    """End a person and the account they own, for good; the books keep what was paid."""
    now = clock.now_ms()
    write(lambda tx: users.close(tx, users.of_who(tx, who), now, COMMAND_LINE))


# accounts


@accounts_group.command("suspend")
@click.argument("who")
@click.option("--reason")
@plainly
def suspend_account(who: str, reason: str | None) -> None:
    """Stop an account's calls until it is resumed."""
    now = clock.now_ms()

    def work(tx: Tx) -> None:
        ledger.suspend_account(tx, users.account_of(tx, who), reason, now, COMMAND_LINE)

    write(work)


@accounts_group.command("resume")
@click.argument("who")
@plainly
def resume_account(who: str) -> None:
    """Let a suspended account spend again."""
    now = clock.now_ms()
    write(lambda tx: ledger.resume_account(tx, users.account_of(tx, who), now, COMMAND_LINE))


@accounts_group.command("close")
@click.argument("who")
@plainly
def close_account(who: str) -> None:
    """End an account for good, with its keys and tokens; its balance stays in the books."""
    now = clock.now_ms()
    write(lambda tx: users.close_account(tx, users.account_of(tx, who), now, COMMAND_LINE))


# session tokens


@tokens_group.command("mint")
@click.argument("who")
@plainly
def mint_token(who: str) -> None:
    """Print a fresh session token of the person who owns WHO's account, alone."""
    found, now = instance(), clock.now_ms()

    def work(tx: Tx) -> tuple[sessions.Session, str]:
        user = users.of_who(tx, who)
        if user.status != "active":
            raise Refusal("conflict", f"That user is {user.status}.")
        return sessions.start(tx, user.id, Origin("cli"), now, by=COMMAND_LINE), user.account_id

    session, account_id = write(work)
    issued = session_tokens.mint(
        found.db, found.signing_keys, found.settings.public_url, session, account_id, now
    )
    click.echo(issued.token)


@tokens_group.command("rotate-key")
@plainly
def rotate_key() -> None:
    """Sign session tokens with a new key; the old one is published until its tokens have ended."""
    now = clock.now_ms()
    kid = instance().signing_keys.rotate(now)
    write(lambda tx: audit.note(tx, COMMAND_LINE, "signing_key.rotated", now, None, kid))
    click.echo(kid)


def one_claim(command: F) -> F:
    """The options that name outside tokens by a claim: one of the two."""

    @click.option("--sub", help="All tokens of this subject.")
    @click.option("--jti", help="This one token.")
    @functools.wraps(command)
    def wrapper(sub: str | None, jti: str | None) -> Any:
        if (sub is None) == (jti is None):
            raise click.UsageError("Give one of --sub and --jti.")
        return command(sub, jti)

    return wrapper  # type: ignore[return-value]  # click fills the parameters


@tokens_group.command("deny")
@one_claim
@plainly
def deny_token(sub: str | None, jti: str | None) -> None:
    """Refuse outside issuers' tokens from now on, and what they were traded for."""
    names, now = instance().issuers.names(), clock.now_ms()
    write(lambda tx: issuers.deny(tx, names, now, COMMAND_LINE, sub, jti))


@tokens_group.command("allow")
@one_claim
@plainly
def allow_token(sub: str | None, jti: str | None) -> None:
    """Take a denial back. Tokens it has ended stay ended."""
    now = clock.now_ms()
    write(lambda tx: issuers.allow(tx, now, COMMAND_LINE, sub, jti))


# keys


@keys_group.command("add")
@click.argument("who")
@click.option("--name", required=True)
@click.option(
    "--scope", "scopes", multiple=True, help="Repeat for several; none means every route."
)
@click.option("--expires", metavar="RFC3339")
@click.option("--credit-limit", type=WholeNumber())
@click.option("--period", type=click.Choice(keys.PERIODS))
@click.option("--rate", type=WholeNumber(), help="Requests per minute, instead of the default.")
@plainly
def add_key(
    who: str, name: str, scopes: tuple[str, ...], expires: str | None, credit_limit: int | None,
    period: str | None, rate: int | None,
) -> None:  # fmt: skip
    """Print a new API key, alone. It is not shown again."""
    try:
        expires_at = None if expires is None else clock.parse_rfc3339(expires)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--expires") from error
    terms = Terms(name, list(scopes) or None, expires_at, credit_limit, period, rate)
    secret = NewSecret(instance().settings.instance.key_prefix)
    now = clock.now_ms()

    def work(tx: Tx) -> None:
        account_id = users.account_of(tx, who)
        owner = users.owner_of(tx, account_id)
        user_id = owner.id if owner else None
        keys.add(tx, account_id, user_id, terms, secret, now, COMMAND_LINE)

    write(work)
    click.echo(secret.token)


@keys_group.command("list")
@click.argument("who", required=False)
@plainly
def list_keys(who: str | None) -> None:
    """One key a line: id, start, status, account, name."""
    now = clock.now_ms()
    with instance().db.reading() as tx:
        account_id = None if who is None else users.account_of(tx, who)
        after = ""
        while page := keys.page(tx, account_id, after, 500):
            for key in page:
                fields = (key.id, f"{key.start}…", key.status_at(now), key.account_id, key.name)
                click.echo(" ".join(fields))
            after = page[-1].id


@keys_group.command("revoke")
@click.argument("key_id", metavar="ID")
@plainly
def revoke_key(key_id: str) -> None:
    """End a key for good, for the very next request."""
    now = clock.now_ms()
    write(lambda tx: keys.revoke(tx, key_id, now, COMMAND_LINE))


@keys_group.command("suspend")
@click.argument("key_id", metavar="ID")
@click.option("--reason")
@plainly
def suspend_key(key_id: str, reason: str | None) -> None:
    """Stop a key until the operator resumes it."""
    now = clock.now_ms()
    write(lambda tx: keys.suspend(tx, key_id, reason, now, COMMAND_LINE))


@keys_group.command("resume")
@click.argument("key_id", metavar="ID")
@plainly
def resume_key(key_id: str) -> None:
    """Let a suspended key work again."""
    now = clock.now_ms()
    write(lambda tx: keys.resume(tx, key_id, now, COMMAND_LINE))


# credits


def _move(who: str, kind: str, credits: int, note: str | None) -> None:
    now = clock.now_ms()
    reference = tokens.new_id(kind)

    def work(tx: Tx) -> ledger.Standing | None:
        account_id = users.account_of(tx, who)
        after = ledger.add_credits(tx, account_id, kind, credits, reference, note, now)
        audit.note(
            tx, COMMAND_LINE, f"credits.{kind}", now, account_id, reference,
            amount=credits, note=note,
        )  # fmt: skip
        return after

    after = write(work)
    click.echo(f"{credits:+} credits; {after.available} available")


@credits_group.command("grant")
@click.argument("who")
@click.argument("credits", metavar="N", type=WholeNumber(least=1))
@click.option("--note")
@plainly
def grant(who: str, credits: int, note: str | None) -> None:
    """Add credits to an account."""
    _move(who, "grant", credits, note)


@credits_group.command("adjust", context_settings={"ignore_unknown_options": True})
@click.argument("who")
@click.argument("credits", metavar="±N", type=WholeNumber())
@click.option("--note", required=True)
@plainly
def adjust(who: str, credits: int, note: str) -> None:
    """Correct a balance, up or down, never below what is available."""
    _move(who, "adjustment", credits, note)


@credits_group.command("refund")
@click.argument("request_id")
@click.option("--note")
@plainly
def refund(request_id: str, note: str | None) -> None:
    """Give the credits of one captured call back, once."""
    now = clock.now_ms()

    def work(tx: Tx) -> tuple[int, ledger.Standing]:
        found = calls.ids_of_request(tx, request_id)
        if not found:
            raise Refusal("not_found", f"There is no call {request_id}.")
        if len(found) > 1:
            raise Refusal("conflict", f"Several calls have that id: {', '.join(found)}.")
        returned = ledger.refund(tx, found[0], note, now)
        account_id = calls.account_of(tx, found[0])
        audit.note(
            tx, COMMAND_LINE, "credits.refund", now, account_id, found[0],
            amount=returned[0], note=note,
        )  # fmt: skip
        return returned

    credits, after = write(work)
    click.echo(f"{credits:+} credits; {after.available} available")


@credits_group.command("balance")
@click.argument("who")
@plainly
def balance(who: str) -> None:
    """Print the available credits, the number alone."""
    with instance().db.reading() as tx:
        click.echo(ledger.standing(tx, users.account_of(tx, who)).available)


# vouchers


@vouchers_group.command("add")
@click.argument("credits", metavar="N", type=WholeNumber(least=1))
@click.option("--count", type=WholeNumber(least=1), default=1, show_default=True)
@click.option("--note", help="Who or what they are for; shown to operators alone.")
@plainly
def add_vouchers(credits: int, count: int, note: str | None) -> None:
    """Print codes worth N credits each, one a line, alone. They are not shown again."""
    now = clock.now_ms()
    for code in write(lambda tx: vouchers.make(tx, credits, count, note, now, COMMAND_LINE)):
        click.echo(code)


@vouchers_group.command("list")
@plainly
def list_vouchers() -> None:
    """One voucher a line, newest first: id, credits, status, the account it went to, note."""
    before = None
    with instance().db.reading() as tx:
        while page := vouchers.page(tx, before, 500):
            for voucher in page:
                fields = [voucher.id, str(voucher.credits), voucher.status]
                fields += [text for text in (voucher.account_id, voucher.note) if text is not None]
                click.echo(" ".join(fields))
            before = page[-1].number


@vouchers_group.command("cancel")
@click.argument("voucher_id", metavar="ID")
@plainly
def cancel_voucher(voucher_id: str) -> None:
    """End a voucher nobody has redeemed."""
    now = clock.now_ms()
    write(lambda tx: vouchers.cancel(tx, voucher_id, now, COMMAND_LINE))


# payments


@payments_group.command("list")
@click.argument("who", required=False)
@click.option("--status", type=click.Choice(records.STATUSES))
@plainly
def list_payments(who: str | None, status: str | None) -> None:
    """One payment a line, the last first: id, when, status, credits, wallet, network, and what the
    network calls it."""
    before, account_id = None, None
    if who is not None:
        with instance().db.reading() as tx:
            account_id = users.account_of(tx, who)
    while page := records.page(instance().db, before, 500, account_id, status):
        for payment in page:
            fields = [payment.id, clock.rfc3339(payment.created_at), payment.status]
            fields += [str(payment.credits), payment.wallet_name, payment.network]
            fields += [payment.transaction_id] if payment.transaction_id else []
            click.echo(" ".join(fields))
        before = page[-1].number


@payments_group.command("show")
@click.argument("payment_id", metavar="ID")
@plainly
def show_payment(payment_id: str) -> None:
    """All that is known of a payment, one thing a line."""
    with instance().db.reading() as tx:
        payment = records.get(tx, payment_id)
    for name, value in payment.told().items():
        click.echo(f"{name:<15} {'-' if value is None else value}")


@payments_group.command("reconcile")
@click.argument("payment_id", metavar="ID", required=False)
@click.option("--settled", metavar="TRANSACTION", help="It was: you have seen it on the network.")
@click.option("--refused", is_flag=True, help="It was not, and will not be.")
@plainly
def reconcile_payments(payment_id: str | None, settled: str | None, refused: bool) -> None:
    """Find out now how payments ended that nobody heard the end of; or say how one did."""
    says = settled is not None or refused
    if says and (payment_id is None or (settled is not None and refused)):
        raise click.UsageError("Give one ID, and one of --settled and --refused.")
    if settled is not None and not re.fullmatch(r"[0-9A-Za-z]{1,128}", settled):
        raise click.BadParameter(f"{settled!r} names no transaction.", param_hint="--settled")
    if says:
        verdict = Verdict("refused", None, "the operator says so")
        if settled is not None:
            verdict = Verdict("settled", settled)
        reconciler.overrule(instance(), str(payment_id), verdict, COMMAND_LINE)
        click.echo(f"{payment_id} {verdict.outcome}")
        return
    if instance().desk is None:
        raise click.ClickException("there is no [x402] in the config, so nobody can be asked")
    looked, still_unknown = False, 0
    for found, verdict in reconciler.look_now(instance(), payment_id):
        looked = True
        click.echo(f"{found} {verdict.outcome} {verdict.transaction or verdict.reason}")
        still_unknown += verdict.outcome not in ("settled", "refused")
    if payment_id is not None and not looked:
        with instance().db.reading() as tx:
            payment = records.get(tx, payment_id)
        click.echo(f"{payment.id} {payment.status} {payment.transaction_id or payment.reason}")
        still_unknown += payment.status in records.UNDECIDED
    if still_unknown:
        raise click.ClickException(f"{still_unknown} payments are still unknown")


# the books


@ledger_group.command("verify")
@plainly
def verify() -> None:
    """Recompute every balance from its entries; exit 1 and say what does not add up."""
    with instance().db.snapshot() as tx:
        totals, faults = ledger.verify(tx)
    for fault in faults:
        click.echo(fault, err=True)
    if faults:
        raise click.ClickException(f"{len(faults)} faults: the books do not add up")
    click.echo(
        f"ok: {totals.accounts} accounts, {totals.entries} entries, {totals.calls} calls,"
        f" balance {totals.balance}, held {totals.held}"
    )


@click.command("audit")
@click.argument("who", required=False)
@click.option("--limit", type=WholeNumber(least=1), default=50, show_default=True)
@with_appcontext
@plainly
def audit_command(who: str | None, limit: int) -> None:
    """Who did what, newest first, one action a line; of one account, or of all."""
    with instance().db.reading() as tx:
        account_id = None if who is None else users.account_of(tx, who)
    for _, done in audit.page(instance().db, account_id, None, limit):
        fields = [done["at"], done["actor"], done["address"], done["action"], done["subject"]]
        detail = json.dumps(done["detail"]) if done["detail"] else ""
        click.echo(" ".join([str(field or "-") for field in fields] + [detail]).rstrip())


# the instance


@click.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
@with_appcontext
@plainly
def backup(file: Path) -> None:
    """Write one file with the database, the config and the generated secrets."""
    try:
        backups.backup(instance().db, instance().settings, file)
    except (backups.BackupError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"wrote {file}")


@click.command("restore")
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@with_appcontext
@plainly
def restore(file: Path) -> None:
    """Put an instance back from a backup. The server must be stopped."""
    broken: Instance = current_app.extensions["farebox"]  # or not; it is about to be replaced
    folder = broken.settings.folder
    broken.db.close()
    try:
        aside = backups.restore(folder, file)
    except (backups.BackupError, OSError) as error:
        raise click.ClickException(str(error)) from error
    moved = f"; what it replaced is in {aside}" if aside else ""
    click.echo(f"restored into {folder}{moved}")


@click.command("doctor")
@with_appcontext
@plainly
def doctor_command() -> None:
    """Check config, database, upstreams and prices: one line each; exit 1 when one is bad."""
    findings = list(doctor.examine(current_app.extensions["farebox"]))
    for finding in findings:
        click.echo(f"{finding.verdict:<5} {finding.what}")
    if any(finding.verdict == "bad" for finding in findings):
        raise SystemExit(1)


@click.command("price")
@click.argument("route_path")
@click.option("--method", help="When the path has several.")
@click.option("--body", type=click.File("rb"), help="The body of the call; - for standard input.")
@with_appcontext
@plainly
def price(route_path: str, method: str | None, body: Any) -> None:
    """What a call would hold and cost."""
    by_method = instance().catalog.methods_at(route_path)
    if not by_method:
        raise click.ClickException(f"there is no route at {route_path}")
    chosen = method or sorted(by_method)[0]
    route = instance().catalog.match(chosen, route_path)
    content = body.read() if body else b""
    inbound = Inbound(chosen, route_path, "", {}, content, "price")
    if route.models and body is None:
        for model in route.models.values():
            click.echo(f"{model.id}: {rates.asked(model)}")
        click.echo("With --body: what that call would hold and cost.")
        return
    order = ADAPTERS[route.adapter].order(route, inbound)
    usd = instance().settings.usd_per_credit
    if order.model is None:
        terms = [f"per {route.per}, {route.credits} credits", f"units     {order.units}"]
        least = route.price(1) if route.per == "unit" else order.price
        cost, unknown = route.cost(order.units), "cost_usd"
    else:
        wish: Wish = order.details
        sent, most = math.ceil(wish.input_tokens), wish.output_tokens
        tokens = f"{sent:,} in, {most:,} out"
        terms = [f"{order.model}, {rates.asked(wish.model)}", f"tokens    at most {tokens}"]
        least, cost = wish.model.price(0, 0), wish.model.cost(most, sent)
        unknown = "cost_usd_per_1m_input or _output"
    click.echo(f"route     {chosen} {route.path} " + "\n".join(terms))
    click.echo(f"holds     {order.price} credits (${usd * order.price:f})")
    captured = f"{order.price}" if least == order.price else f"{least} to {order.price}"
    click.echo(f"captures  {captured} credits on success, nothing on failure")
    about = "" if order.model is None else "at most "
    click.echo(f"costs you {f'{about}${cost}' if cost else f'unknown (no {unknown})'}")
