"""Laws of leases: a run is told alive or dead by what it does, whatever its host, its clock and its number are."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest

from tasks.errors import StoreError
from tasks.store import lease as leases
from tasks.store.collect import garbage
from tasks.store.lease import given_up, held, lease
from tasks.store.store import Store

ROOT = Path(__file__).parents[2]
KEY = "a" * 64
KEPT = ("checkpoints",)
# Builds a model, and says so; then waits until it is killed, or told to end.
BUILDS = f"""
import sys
from pathlib import Path
from tasks.store import lease as leases
from tasks.store.store import Store
if sys.argv[2]: leases._kernel = lambda path: sys.argv[2]
with leases.lease(Path(sys.argv[1])) as mine, Store(Path(sys.argv[1])).scratch("model", {KEY!r}, {KEPT!r}) as out:
    mine.hold("tokens/bbbbbbbbbbbb")
    (out / "checkpoints" / "step-7").mkdir(parents=True, exist_ok=True)
    print("ready", flush=True)
    sys.stdin.read(1)
"""
Build = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Start builds; they end with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(before: Sequence[str] = (), kernel: str = "") -> "subprocess.Popen[str]":
        asked = [*before, sys.executable, "-c", BUILDS, str(tmp_path), kernel]
        pipe = subprocess.PIPE
        one = subprocess.Popen(asked, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        started.append(one)
        assert one.stdout
        if one.stdout.readline() != "ready\n":
            pytest.skip(f"{before} is not allowed here")
        return one

    yield start
    for one in started:
        if one.poll() is None:
            os.killpg(one.pid, signal.SIGKILL)
        one.communicate()


@pytest.fixture
def no_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a lock could tell, and a lease is watched even so."""
    monkeypatch.setattr("tasks.store.lease.time.sleep", Mock(side_effect=AssertionError("it waits")))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENCE", 1.0)
    monkeypatch.setattr(leases, "POLL", 0.05)


def steps(store: Store) -> list[str]:
    """Go on with the build, and return the checkpoints that it inherits."""
    with store.scratch("model", KEY, KEPT) as out:
        return [path.name for path in out.glob("checkpoints/step-*")]


OTHERS = {"here": (), "host": ("unshare", "--uts", "sh", "-c", 'hostname pod-a; exec "$0" "$@"')}
NAMESPACES = {**OTHERS, "pid": ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")}


@pytest.mark.usefixtures("no_watching")
@pytest.mark.parametrize("place", NAMESPACES)
def test_who_lives_or_is_stopped_keeps_what_it_has_wherever_it_is(tmp_path: Path, build: Build, place: str) -> None:
    one, store = build(NAMESPACES[place]), Store(tmp_path)
    for stop in (signal.SIGCONT, signal.SIGSTOP):
        os.killpg(one.pid, stop)
        assert garbage(store, 0, time.time() + 86_400 * 30) == []
        assert held(leases.leases(tmp_path)[0]) + held(leases.leases(tmp_path)[1]) == ["tokens/bbbbbbbbbbbb"]
        assert steps(store) == [], "it is built beside"
        for left in (tmp_path / ".scratch").glob("*.left"):
            shutil.rmtree(left)


@pytest.mark.usefixtures("no_watching")
@pytest.mark.parametrize("place", NAMESPACES)
def test_the_next_try_goes_on_at_once_after_a_kill_wherever_the_first_one_was(
    tmp_path: Path, build: Build, place: str
) -> None:
    one = build(NAMESPACES[place])
    os.killpg(one.pid, signal.SIGKILL)
    one.wait()
    wait_for(lambda: given_up(leases.leases(tmp_path)) == {*leases.leases(tmp_path)})  # a namespace ends a bit later
    assert steps(Store(tmp_path)) == ["step-7"]


def wait_for(said: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not said():
        assert time.monotonic() < until
        os.sched_yield()


@pytest.mark.usefixtures("short")
def test_a_run_of_another_host_keeps_what_it_has_while_it_renews_and_loses_its_scratch_when_it_is_silent(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leases, "SILENCE", 30.0)
    one = build(kernel="another")
    found = leases.leases(tmp_path)
    unlocked(monkeypatch)
    assert given_up(found) == set(), "it was renewed while we watched"
    assert "watching 30 s" in caplog.text
    os.kill(one.pid, signal.SIGKILL)
    one.wait()
    monkeypatch.setattr(leases, "SILENCE", 1.0)
    assert steps(Store(tmp_path)) == ["step-7"]


def unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no lock tell anything, as on another host."""
    monkeypatch.setattr(leases, "try_lock", lambda file, shared=False: None)


@pytest.mark.usefixtures("short")
def test_on_another_host_two_hours_ahead_nothing_goes_of_a_run_that_is_stopped_and_all_of_one_that_is_long_dead(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, ahead = build(kernel="another"), time.time() + 7_200
    os.kill(one.pid, signal.SIGSTOP)
    unlocked(monkeypatch)
    monkeypatch.setattr("tasks.store.disk.time.time", lambda: ahead)
    assert garbage(Store(tmp_path), 0) == []
    for path in leases.leases(tmp_path):
        os.utime(path, (ahead - 3 * 86_400,) * 2)
    assert {path.parent.name for path in garbage(Store(tmp_path), 0, ahead + 8 * 86_400)} == {".leases", ".scratch"}


def test_a_lease_that_cannot_be_written_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with lease(tmp_path) as mine:
        monkeypatch.setattr("tasks.store.lease.os.write", lambda file, content: 0)
        with pytest.raises(StoreError, match=r"error\[store.write\].*No space left.*MB free"):
            mine.hold("raw/aaaaaaaaaaaa")
        monkeypatch.setattr("tasks.store.lease.os.write", full)
        with pytest.raises(StoreError, match="No space left") as refused, lease(tmp_path):
            pass
    assert refused.value.exit_code == 74
    assert list((tmp_path / ".leases").iterdir()) == []


def test_a_lease_that_is_lost_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.01)
    said = Mock()
    monkeypatch.setattr(leases.log, "warning", said)
    with lease(tmp_path) as mine:
        mine.path.unlink()
        wait_for(lambda: bool(said.call_count))


@pytest.mark.parametrize("content", [b"", b"[" * 200_000, b'["raw/aaaaaaaaaaaa"]\n', b"{}\n", b"\xff\n"])
def test_an_odd_file_among_the_leases_is_refused_until_it_is_a_day_old_and_then_goes(
    tmp_path: Path, content: bytes, short: None
) -> None:
    odd = tmp_path / ".leases" / "odd"
    odd.parent.mkdir()
    odd.write_bytes(content)
    if content == b"{}\n":
        assert garbage(Store(tmp_path), 0, time.time() + 1) == []
    else:
        with pytest.raises(StoreError, match=r"error\[store.roots\].*nothing was removed"):
            garbage(Store(tmp_path), 0, time.time() + 1)
    os.utime(odd, (time.time() - 2 * 86_400,) * 2)
    assert garbage(Store(tmp_path), 0, time.time() + 1) == [odd]


def test_what_a_line_being_written_says_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "one").write_text(json.dumps({"kernel": None}) + "\nraw/aaaaaaaaaaaa\nraw/bbb")
    assert held(tmp_path / "one") == ["raw/aaaaaaaaaaaa"]
    assert held(tmp_path / "none") == []
