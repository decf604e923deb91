"""A newcomer's first minutes: one command, a link, a curl; and the second start."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import free_port, until

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


class Run:
    """`make run` in a folder of the project's own, as a person would start it."""

    def __init__(self, folder: Path, instance: Path, **environ: str) -> None:
        self.port = free_port()
        self.output = instance.with_suffix(".log")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FAREBOX_", "SSH_"))}
        self.environ = clean | {
            "FAREBOX_INSTANCE": str(instance),
            "FAREBOX_BIND": f"127.0.0.1:{self.port}",
            **environ,
        }
        with self.output.open("wb") as log:
            self.process = subprocess.Popen(
                ["make", "run"], cwd=folder, env=self.environ, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def text(self) -> str:
        return self.output.read_text("utf-8", "replace")

    def curl(self, *words: str) -> str:
        done = subprocess.run(["curl", "-sS", *words], capture_output=True, text=True, timeout=20)
        return done.stdout

    def answers(self) -> bool:
        # Asked many times a second while pip works: a program of its own for each would slow it.
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", self.port)) != 0:
                return False
        return '"ok"' in self.curl("-m", "2", f"http://127.0.0.1:{self.port}/healthz")

    def interrupt(self) -> int:
        """Ctrl-C: the terminal signals the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(20)


@pytest.fixture
def started() -> Iterator[list[Run]]:
    runs: list[Run] = []
    yield runs
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait(10)


def test_the_first_run_prints_a_link_and_a_curl_that_works(
    tmp_path: Path, started: list[Run]
) -> None:
    run = Run(ROOT, tmp_path / "instance", SSH_CONNECTION="10.0.0.9 50000 10.0.0.1 22")
    started.append(run)
    until(lambda: "starter key" in run.text() or "This key has" in run.text(), 60, "the greeting")
    until(run.answers, 20, "an answer")
    text = run.text()
    link = re.search(r"http://127\.0\.0\.1:\d+/setup\?token=\S+", text)
    assert link is not None
    assert f"ssh -L {run.port}:127.0.0.1:{run.port}" in text
    command = text[text.index("curl -sS") :].split("\n\n")[0]
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20)
    answer = json.loads(done.stdout)
    assert answer["success"] is True
    assert answer["provider"] == "sandbox"
    assert re.fullmatch(r"msg_\w+", answer["messageId"])
    flask = ROOT / ".venv" / "bin" / "flask"
    verify = subprocess.run(
        [flask, "ledger", "verify"], cwd=ROOT, env=run.environ, capture_output=True, text=True
    )
    assert verify.returncode == 0, verify.stderr
    assert "balance 99, held 0" in verify.stdout

    jar = str(tmp_path / "cookies")
    page = run.curl(link[0], "-c", jar)
    hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]+)"', page))
    made = run.curl(
        f"http://127.0.0.1:{run.port}/setup", "-L", "-b", jar, "-c", jar,
        "--data-urlencode", f"token={hidden['token']}",
        "--data-urlencode", f"csrf_token={hidden['csrf_token']}",
        "--data-urlencode", "email=Founder@Example.com",
        "--data-urlencode", "password=a long enough password",
    )  # fmt: skip
    assert "founder@example.com" in made
    balance = subprocess.run(
        [flask, "credits", "balance", "founder@example.com"],
        cwd=ROOT, env=run.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert balance.stdout == "99\n"
    assert "does not work" in run.curl(link[0])

    folder = tmp_path / "instance"
    assert (folder.stat().st_mode & 0o777) == 0o700
    for name in ("farebox.toml", "secret_key", "farebox.db"):
        assert ((folder / name).stat().st_mode & 0o077) == 0, name

    run.interrupt()
    assert "Traceback" not in run.text()
    until(lambda: not run.answers(), 10, "the end")

    again = Run(ROOT, folder)
    started.append(again)
    begun = time.monotonic()
    until(again.answers, 20, "the second start")
    # A promise of 2 s on a free machine; the bound leaves room for whatever runs beside the test.
    assert time.monotonic() - begun < 6
    assert "setup?token" not in again.text()
    assert "fare_live_" not in again.text()


def test_a_clean_clone_installs_itself(tmp_path: Path, started: list[Run]) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.split(b"\0")  # fmt: skip
    for name in filter(None, files):
        source = ROOT / os.fsdecode(name)
        if source.is_file():
            target = clone / os.fsdecode(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    begun = time.monotonic()
    run = Run(clone, tmp_path / "instance")
    started.append(run)
    until(run.answers, 90, f"an answer; it said {run.text()}")
    assert time.monotonic() - begun < 90
    assert "setup?token=" in run.text()
    assert not (clone / "instance" / "farebox.db").exists()
