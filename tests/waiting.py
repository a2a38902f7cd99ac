"""Waiting in tests: as long as a process gets on, not for so many seconds; and no process that outlives its test.

A busy machine is no failure: a wait ends in one when the process that it waits for has ended or uses no processor any
more, or when what the product promises for an idle machine takes longer than that, stretched by the load.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from typing import Any, TypeVar
from unittest.mock import patch
from uuid import uuid4

import psutil

T = TypeVar("T")
OWNER = "PYTEST_OWNER"  # the variable that tells whose a process is, whatever session or parent it has moved to
STALL = 60.0  # seconds of an idle machine without progress, after which a process counts as stuck
LOOK = 1.0  # seconds between two looks at the progress: each reads all of /proc


def until(
    condition: Callable[[], T | None],
    process: subprocess.Popen[Any] | None = None,
    seconds: float = 0.0,
    pause: float = 0.02,
) -> T:
    """Wait until a condition holds, and return what it gave.

    Args:
        condition: Called again and again; holds where it gives something true.
        process: The wait lasts while this process, or any that it has started, uses the processor.
        seconds: A promise of the product on an idle machine; 0: none.
        pause: Seconds between two calls.

    Raises:
        AssertionError: If the process has ended or is stuck, or the promise is broken.
    """
    left, last, looked, used = seconds or STALL, time.monotonic(), 0.0, -1.0
    while True:
        ended = process is not None and process.poll() is not None
        if found := condition():
            return found
        assert not ended, f"{process} has ended meanwhile"
        time.sleep(pause)
        now = time.monotonic()
        left, last = left - (now - last) / stretch(), now
        if process and not seconds and now - looked > LOOK and (spent := processor_time(process.pid)) != used:
            left, looked, used = STALL, now, spent
        assert left > 0, f"waited {seconds or STALL:g} s of an idle machine for {process or 'a condition'}"


def stretch() -> float:
    """Return how many times longer work may take now than on an idle machine."""
    return 1.0 + os.getloadavg()[0] / (os.cpu_count() or 1)


def patience(seconds: float) -> float:
    """Return the seconds that may now pass for some of an idle machine: for timeouts that others keep."""
    return seconds * stretch()


def processor_time(pid: int) -> float:
    """Return the processor seconds of a process and of all that it has started."""
    spent = 0.0
    with suppress(psutil.Error):
        for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.Error):
                spent += sum(one.cpu_times()[:4])  # of itself and of children that have ended
    return spent


@contextmanager
def started(command: Sequence[str], **more: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process as `subprocess.Popen` does; with the block it ends, and whatever it has started."""
    owner = _new_owner()
    with subprocess.Popen(command, **{**more, "env": {**(more.get("env") or os.environ), OWNER: owner}}) as process:
        try:
            yield process
        finally:
            kill_all_of(owner)


def ended(process: subprocess.Popen[Any], seconds: float = 0.0) -> int:
    """Wait until a process has ended, as `until` does, and return its exit code."""
    until(lambda: process.poll() is not None, process, seconds)
    return int(process.returncode)


def run(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, for as long as it gets on, and return what it printed."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        try:
            with started(command, stdout=out, stderr=err, **more) as process:
                code = ended(process)
        except AssertionError as error:
            error.add_note(_whole(err)[-3000:])
            raise
        return subprocess.CompletedProcess(command, code, _whole(out), _whole(err))


def _whole(file: Any) -> str:
    file.seek(0)
    return str(file.read())


@contextmanager
def guarded() -> Iterator[None]:
    """Let nothing that is started in the block outlive this process, also where that is killed."""
    owner = _new_owner()
    guard = subprocess.Popen([sys.executable, "-P", __file__, owner], stdin=subprocess.PIPE, start_new_session=True)
    with guard, patch.dict(os.environ, {OWNER: owner}):  # the guard's pipe is closed here, as a kill would close it
        yield


def _new_owner() -> str:
    return f"{os.environ.get(OWNER, '')}.{uuid4().hex}"


def kill_all_of(owner: str) -> None:
    """Kill the processes of an owner, until there are none."""
    while found := [one for one in psutil.process_iter() if _owner(one).startswith(owner)]:
        for one in found:
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(found, timeout=LOOK)


def _owner(process: psutil.Process) -> str:
    with suppress(psutil.Error, OSError):
        return str(process.environ().get(OWNER, ""))
    return ""


if __name__ == "__main__":
    sys.stdin.read()
    kill_all_of(sys.argv[1])
