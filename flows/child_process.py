"""Programs that end when whoever started them does, however that ends: `kill -9` included.

    python -P flows/child_process.py MODULE ...     with a pipe as standard input, which the starter never closes

The system closes the pipe with the process that holds its other end. A parent-death signal would not do: it comes with
the end of the thread that started the program. Where Prefect starts the program we hold no pipe: `follow_parent` is
for these.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

PARENT = "TREELINE_SERVED_BY"  # number of the process that runs started by the UI must not outlive
PATIENCE = 3.0  # seconds that a program has to end tidily
SAVING = 30.0  # seconds that a run has: training writes a checkpoint, and Prefect has nobody to tell
EVERY = 0.5  # seconds between two looks at who the parent is


def tied(args: Sequence[str], **more: Any) -> subprocess.Popen[bytes]:
    """Start a module with arguments, so that it ends with this process; in a session of its own, away from Ctrl-C."""
    command = [sys.executable, "-P", __file__, *args]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **more)


@cache
def follow_parent() -> None:
    """In a run that `serve` has started, end when it does; else do nothing."""
    if os.environ.get(PARENT):
        threading.Thread(target=_watch_parent, args=[int(os.environ[PARENT])], daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    _end(SAVING)


def _watch_pipe() -> None:
    while os.read(0, 1):
        pass
    _end(PATIENCE)


def _end(patience: float) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)
    os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_watch_pipe, daemon=True).start()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
