"""A module that is run as a program of its own, and ends when whoever started it does, however that ends.

    python -P flows/tied.py uvicorn --port 4200 ...     with a pipe as standard input, which the starter never closes

The system closes the pipe with the process that holds its other end, `kill -9` included. A parent-death signal would
not do: it comes with the end of the thread that started the program, and Prefect starts its server from any.
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
from typing import Any

PATIENCE = 3.0  # seconds that the program has to end tidily


def tied(args: Sequence[str], **more: Any) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE ...`, so that it ends with this process; in a session of its own, away from Ctrl-C."""
    python, flag, *rest = args
    assert flag == "-m"
    return subprocess.Popen([python, "-P", __file__, *rest], stdin=subprocess.PIPE, start_new_session=True, **more)


def _watch() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_watch, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
