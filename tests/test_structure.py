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
