"""The house stands as docs/architecture.md says: which floor may know which."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted((ROOT / "core").rglob("*.py"))
BLUEPRINTS = sorted((ROOT / "blueprints").glob("*.py"))
SQL = re.compile(
    r"\b(SELECT\s.+\sFROM|INSERT\s+INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|CREATE\s+TABLE)\b", re.S
)
OWNERS = {
    "account": {"core/ledger.py"},
    "entry": {"core/ledger.py"},
    "call": {"core/ledger.py", "core/calls.py"},
    "call_day": {"core/daily.py"},
    "entry_day": {"core/daily.py"},
    "voucher": {"core/vouchers.py"},
    "api_key": {"core/keys.py"},
    "user": {"core/users.py"},
    "identity": {"core/users.py"},
    "membership": {"core/members.py"},
    "one_time_link": {"core/links.py"},
    "session": {"core/sessions.py"},
    "session_token": {"core/session_tokens.py"},
    "denied_token": {"core/issuers.py"},
    "issuer_keys": {"core/issuers.py"},
    "audit": {"core/audit.py"},
    "rate_window": {"core/limits.py"},
    "credit_window": {"core/limits.py"},
    "idempotency": {"core/idempotency.py"},
    "wallet": {"core/wallets.py"},
    "used_nonce": {"core/signed/nonces.py"},
    "payment": {"core/payments/records.py"},
}


def imports(path: Path) -> set[str]:
    """The full names of what a module imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def strings(path: Path) -> list[str]:
    """Every string of a module with adjacent parts joined, f-strings' fixed parts included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [p.value for p in node.values if isinstance(p, ast.Constant)]
            found.append(" ".join(str(part) for part in parts))
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_the_rules_know_no_http_framework_and_nothing_above_them(path: Path) -> None:
    above = ("flask", "werkzeug", "gunicorn", "click", "blueprints", "app", "cli")
    assert not {name for name in imports(path) if name.split(".")[0] in above}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.name)
def test_blueprints_do_not_know_the_application_or_each_other(path: Path) -> None:
    shared = (
        "rendering",
        "cors",
        "bodies",
        "api",
        "visitors",
        "pages",
        "pictures",
        "tables",
        "inviting",
        "signing",
        "admin",
    )
    allowed = {"blueprints", *(f"blueprints.{name}" for name in shared)}
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in ("app", "cli", "apsw"), name
        if top == "blueprints":
            assert ".".join(name.split(".")[:2]) in allowed, name


def test_only_storage_and_its_care_speak_to_the_driver() -> None:
    users = {p.relative_to(ROOT).as_posix() for p in CORE if "apsw" in imports(p)}
    assert users <= {"core/backup.py", "core/doctor.py", "core/instance.py"}


def test_sql_stays_with_the_module_that_owns_the_table() -> None:
    for path in [*CORE, *BLUEPRINTS, ROOT / "cli.py", ROOT / "app.py"]:
        name = path.relative_to(ROOT).as_posix()
        for text in strings(path):
            for table in re.findall(r"(?:INTO|UPDATE|DELETE FROM) (\w+)\b", text):
                if table in OWNERS and SQL.search(text):
                    assert name in OWNERS[table], f"{name} writes {table}: {text[:80]}"


def test_only_the_ledger_writes_balances_and_entries() -> None:
    for path in [*CORE, *BLUEPRINTS, ROOT / "cli.py"]:
        if path.name == "ledger.py":
            continue
        for text in strings(path):
            assert not re.search(r"UPDATE account\b", text), path.name
            assert not re.search(r"INTO entry\b", text), path.name


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_time_and_randomness_have_one_door_each(path: Path) -> None:
    found = imports(path)
    if path.name != "clock.py":
        assert "time" not in found, "ask core.clock"
    if path.name not in ("tokens.py", "keys.py"):
        assert "secrets" not in found, "ask core.tokens"


# What a transaction may ask. It runs in the thread that leads the commit, which may be anybody's.

LOCALS = {"request", "current_user", "session", "g", "current_app"}


def asked_of(path: Path) -> dict[str, str]:
    """The names in a blueprint that stand for Flask's context, or for what another module of ours
    may ask of it: each with where it comes from."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in ("flask", "flask_login"):
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            found |= {name: "flask" for name, real in names.items() if real in LOCALS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blueprints"):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def mentions(node: ast.AST) -> set[str]:
    """The names in a piece of code, `inviting.invite` as one."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            found.add(f"{part.value.id}.{part.attr}")
    return found


def askers(paths: list[Path]) -> set[str]:
    """The full names of all functions that ask Flask who or what, themselves or through others."""
    uses: dict[str, set[str]] = {}
    for path in paths:
        here, known = f"blueprints.{path.stem}", asked_of(path)
        tree = ast.parse(path.read_text("utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        local = {node.name: f"{here}.{node.name}" for node in functions}
        for node in functions:
            uses[local[node.name]] = full_names(mentions(node), known | local)
    found, more = set[str](), {name for name, used in uses.items() if "flask" in used}
    while more:
        found |= more
        more = {name for name, used in uses.items() if used & found} - found
    return found


def full_names(names: set[str], known: dict[str, str]) -> set[str]:
    return {
        known[head] + (f".{tail}" if tail and known[head] != "flask" else "")
        for head, _, tail in (name.partition(".") for name in names)
        if head in known
    }


def transactions(tree: ast.AST) -> list[ast.AST]:
    """What is carried out by whoever leads: functions of these names, or handed over."""
    found: list[ast.AST] = []
    handed = {"work", "transaction"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in ("act", "operate", "write", "with_message"):
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                found += [part for part in given if isinstance(part, ast.Lambda)]
                handed |= {part.id for part in given if isinstance(part, ast.Name)}
    named = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return found + [node for node in named if node.name in handed]


def offences(path: Path, asking: set[str]) -> list[str]:
    tree, here = ast.parse(path.read_text("utf-8")), f"blueprints.{path.stem}"
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    known = {name: f"{here}.{name}" for name in functions} | asked_of(path)
    found = []
    for node in transactions(tree):
        arguments = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
        named = {name for name in mentions(node) if name.partition(".")[0] not in arguments}
        for name in sorted(named):
            if full_names({name}, known) & (asking | {"flask"}):
                found.append(f"{path.name}:{node.lineno} asks {name}")  # type: ignore[attr-defined]
    return found


def test_a_transaction_asks_nothing_of_the_thread_that_leads_it() -> None:
    """Who is signed in and what their form says is found out before, and handed over."""
    asking = askers(BLUEPRINTS)
    assert [found for path in BLUEPRINTS for found in offences(path, asking)] == []


def test_it_is_known_who_asks(tmp_path: Path) -> None:
    asking = askers(BLUEPRINTS)
    for name in ("field", "whole", "required", "seat", "once", "act", "operate", "show"):
        assert f"blueprints.pages.{name}" in asking
    for name in ("visitors.visitor", "rendering.instance", "settings._terms", "admin.amount"):
        assert f"blueprints.{name}" in asking
    assert "blueprints.api.require_owner" not in asking
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from flask import request as asked\n"
        "from blueprints import pages\n"
        "from blueprints.pages import act, whole as number\n"
        "def _note(): return asked.form['note']\n"
        "def form():\n"
        "    act(lambda tx, who, by, now: number('x'))\n"
        "    act(lambda tx, who, by, now: pages.field('x'))\n"
        "    instance().db.write(work=lambda tx: _note())\n"
        "    act(lambda tx, who, by, asked: asked)\n"
        "    def work(tx): return _note\n"
        "    def transaction(tx): return asked.args\n"
        "    def other(tx): return asked.args\n"
        "    act(other)\n"
    )
    made = askers([*BLUEPRINTS, bad])
    assert sorted(offences(bad, made)) == [
        "bad.py:10 asks _note",
        "bad.py:11 asks asked",
        "bad.py:11 asks asked.args",
        "bad.py:12 asks asked",
        "bad.py:12 asks asked.args",
        "bad.py:6 asks number",
        "bad.py:7 asks pages.field",
        "bad.py:8 asks _note",
    ]
