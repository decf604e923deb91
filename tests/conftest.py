"""What every test may ask for: upstream doubles, and running instances that are checked."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

# Tests import the application's modules, and each other's helpers, by their plain names.
for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from doubles import Twilio, Upstream  # noqa: E402
from openid_provider import OpenIdProvider, the_openid_provider  # noqa: E402, F401
from screen import chromium, left_screens, open_screen  # noqa: E402, F401
from server import Farebox  # noqa: E402

StartFarebox = Callable[..., Farebox]

# They begin first: a file stays in one process, and one that began last would keep the others idle.
LONGEST = [
    "test_dashboard_on_screen.py", "test_ledger.py", "test_pages_basics.py", "test_llm_pages.py",
    "test_first_run.py", "test_faults.py", "test_crash.py", "test_payments_pages.py",
    "test_facilitator_faults.py", "test_payment_races.py", "test_wallet_pages.py",
]  # fmt: skip


@pytest.fixture(scope="session")
def upstream_server() -> Iterator[Upstream]:
    """The one `Upstream` of the run, for fixtures that write its address into a configuration."""
    with Upstream() as server:
        yield server


@pytest.fixture
def upstream(upstream_server: Upstream) -> Upstream:
    """The same server with a clean memory, for the test itself."""
    upstream_server.clear()
    return upstream_server


@pytest.fixture(scope="session")
def twilio_server() -> Iterator[Twilio]:
    with Twilio(account_sid="AC" + "5" * 32, auth_token="twilio-token-of-the-tests") as server:
        yield server


@pytest.fixture
def twilio(twilio_server: Twilio) -> Twilio:
    """The Twilio double with a clean memory."""
    twilio_server.clear()
    twilio_server.sent.clear()
    return twilio_server


@pytest.fixture(scope="module")
def start_farebox() -> Iterator[StartFarebox]:
    """`start_farebox(config, workers=…)`: an instance that lives until the module's last test.

    Starting one takes a second or two, so a module's tests share it and use accounts of their own.
    """
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(Farebox(*args, **options))


@pytest.fixture(autouse=True)
def every_instance_stays_sound() -> Iterator[None]:
    """After each test, no instance that runs may have logged a traceback."""
    yield
    for box in Farebox.running:
        box.check()


# What is imported here and there raises the limit for all (py_ecc, to 100,000), and JSON that is
# nested too deeply then ends the process and not the request.
_RECURSION_LIMIT = sys.getrecursionlimit()


def pytest_runtest_setup() -> None:
    sys.setrecursionlimit(_RECURSION_LIMIT)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others, and the tests of each, in the order they have."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under CI nothing may be skipped: what could not run there has not been checked anywhere."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the instances logged beside a failure."""
    report = yield
    if report.failed:
        for box in Farebox.running:
            report.sections.append((f"log of {box.url}", box.log()[-4000:]))
    return report
