"""Laws of waiting: it lasts while something gets on, and nothing that a test starts outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import waiting
from tests.waiting import guarded, processor_time, run, started, until

ROOT = Path(__file__).parents[1]
SLEEPS = [sys.executable, "-c", "import time; time.sleep(1000)"]
# One that starts another, in a session of its own, tells its number, and does what it is asked.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
print(child.pid, flush=True)
"""


def test_a_wait_gives_what_the_condition_gave() -> None:
    found = iter([0, None, "", "here"])
    assert until(lambda: next(found)) == "here"


def test_a_wait_lasts_while_the_process_works_and_not_while_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "STALL", 0.3)
    monkeypatch.setattr(waiting, "LOOK", 0.05)
    works = "import time\nend = time.process_time() + 1.5\nwhile time.process_time() < end: pass"
    assert run([sys.executable, "-c", works]).returncode == 0
    with started(SLEEPS) as process, pytest.raises(AssertionError, match=r"waited 0.3 s"):
        until(lambda: False, process)


def test_a_wait_ends_with_the_process_that_it_waits_for() -> None:
    with started([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        with pytest.raises(AssertionError, match=r"returncode: 3.* has ended meanwhile"):
            until(lambda: False, process)
        assert until(lambda: "so at last", process) == "so at last"


def test_a_promise_is_stretched_by_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0 * (os.cpu_count() or 1), 0.0, 0.0))
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"waited 0.05 s of an idle machine"):
        until(lambda: False, seconds=0.05, pause=0.001)
    assert time.monotonic() - began >= 0.5


def test_the_work_of_a_child_counts() -> None:
    works = "while True: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {works!r}])"
    with started([sys.executable, "-c", code]) as process:
        before = until(lambda: processor_time(process.pid), process)
        until(lambda: processor_time(process.pid) > before + 0.5, process)


@pytest.mark.parametrize("more", ["", "child.wait()"])
def test_what_a_process_started_ends_with_the_block_also_where_that_fails(tmp_path: Path, more: str) -> None:
    said = tmp_path / "said"

    def fail() -> None:
        with said.open("w") as opened, started([sys.executable, "-c", PARENT + more], stdout=opened) as process:
            until(lambda: said.read_text().endswith("\n"), None if more else process)
            assert not gone(int(said.read_text()))
            raise ZeroDivisionError

    pytest.raises(ZeroDivisionError, fail)
    assert gone(int(said.read_text()))


def test_what_was_started_ends_with_a_killed_pytest(tmp_path: Path) -> None:
    said = tmp_path / "said"
    code = (
        "import sys, subprocess, time\nfrom tests.waiting import guarded, started\n"
        f"with guarded(), started([sys.executable, '-c', {PARENT!r}], stdout=open({str(said)!r}, 'w')):\n"
        "    time.sleep(1000)"
    )
    with started([sys.executable, "-c", code], cwd=ROOT) as killed:
        until(lambda: said.exists() and said.read_text().endswith("\n"), killed)
        child = int(said.read_text())
        killed.send_signal(signal.SIGKILL)
        until(lambda: gone(child))


def test_a_guard_ends_with_what_it_guards() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with guarded():
        left = subprocess.Popen(SLEEPS, env={**os.environ})
    assert left.wait() == -signal.SIGKILL
    assert {child.pid for child in psutil.Process().children()} <= before


def gone(pid: int) -> bool:
    """Whether a process has ended, fetched by its parent or not."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
