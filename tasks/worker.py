"""A worker: one rank of a distributed step. Each calls the step's function; rank 0 alone does so to its end.

`tasks.gpt.launcher` starts it and documents its reports. Under a user's own torchrun the processes exist already, and
need no more of this module than `run_job`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any, cast

from tasks.artifacts import Counts
from tasks.errors import ConfigurationError, TreelineError
from tasks.gpt.interrupt import Interrupted
from tasks.progress import listening
from tasks.step import Step
from tasks.store.manifest import read_manifest

HEARTBEAT_SECONDS = 1.0
STEPS = ("train", "prefer")  # the steps that can be distributed
PR_SET_PDEATHSIG = 1
CONNECTION_ERROR = re.compile("gloo|nccl|connection|peer|timed out|timeout", re.IGNORECASE)  # torch's, of a lost rank
_in_job: ContextVar[bool] = ContextVar("treeline_in_job", default=False)


def in_job() -> bool:
    """Return whether this process runs a job as one of several ranks."""
    return _in_job.get()


def run_job(job: Mapping[str, Any]) -> Counts | None:
    """Call a step's function as one rank; return its counts on rank 0, None on the others.

    Args:
        job: `step` is its name, `inputs` the folders of its artifacts, `params` and `run` its settings, `out` the
            folder that rank 0 writes to.

    Raises:
        ConfigurationError: If the step cannot be distributed.
    """
    from tasks.gpt.distributed import WorkerDone

    if job["step"] not in STEPS:
        raise ConfigurationError(f"step {job['step']!r} cannot be distributed", "a worker's job")
    step: Step[Any, Any] = getattr(importlib.import_module(f"tasks.{job['step']}"), job["step"])
    arguments: dict[str, Any] = {
        name: step.inputs[name](Path(folder), read_manifest(Path(folder))) for name, folder in job["inputs"].items()
    }
    arguments[step.params_name] = step.params_type(**job["params"])
    arguments[step.runtime_name] = step.runtime_type(**job["run"])
    token = _in_job.set(True)
    try:
        counts: Counts = step.function(Path(job["out"]), **arguments)
    except WorkerDone:
        return None
    finally:
        _in_job.reset(token)
    return counts


def exit_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends, however that ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we could ask
            os._exit(128 + signal.SIGKILL)


class _Pipe:
    """Sends reports to the launcher: also as a progress listener, and as the queue of a `QueueHandler`."""

    def __init__(self, path: Path) -> None:
        self.file, self.lock = path.open("w", encoding="utf-8"), threading.Lock()

    def send(self, **report: Any) -> None:
        with self.lock:
            self.file.write(json.dumps(report) + "\n")
            self.file.flush()

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[_Pipe]:
        self.send(bar=[label, total, unit])
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.send(advance=[amount, note])

    def put_nowait(self, record: logging.LogRecord) -> None:
        self.send(log=[record.levelno, record.getMessage()])


def main() -> None:
    """Run the job in the folder that the last argument names, and exit."""
    folder, rank = Path(sys.argv[-1]), int(os.environ["RANK"])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    exit_with_parent(job["launcher"])
    for name, value in job["environment"].items():
        os.environ.setdefault(name, value)
    from tasks.gpt.launcher import error_to_json  # torch reads the environment

    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    pipe, code = _Pipe(folder / f"{attempt}-{rank}.pipe"), 0
    try:
        _work(job, rank, f"file://{folder}/rendezvous-{attempt}", pipe)
    except Exception as error:
        pipe.send(error=error_to_json(error))
        if not isinstance(error, TreelineError | OSError) and not CONNECTION_ERROR.search(str(error)):
            traceback.print_exc()  # a bug; the launcher reports all others in a line
        code = error.exit_code if isinstance(error, TreelineError) else 70
    except Interrupted:
        code = 128 + signal.SIGTERM
    sys.stderr.flush()
    os._exit(code)  # torch's threads may wait for ranks that are gone


def _work(job: Mapping[str, Any], rank: int, init_method: str, pipe: _Pipe) -> None:
    """Join the process group, send heartbeats, and run the job; rank 0 sends its log, progress and result, too."""
    from tasks.gpt.distributed import join_group

    is_main = rank == 0
    logger = logging.getLogger("treeline")
    logger.setLevel(logging.INFO)
    logger.addHandler(QueueHandler(cast(Any, pipe)) if is_main else logging.NullHandler())
    with join_group(rank, int(os.environ["WORLD_SIZE"]), rank, init_method, job["timeout"]) as group:

        def send_heartbeats() -> None:
            while True:
                pipe.send(heartbeats=group.heartbeats)
                time.sleep(HEARTBEAT_SECONDS)

        group.heartbeat()
        threading.Thread(target=send_heartbeats, daemon=True).start()
        with listening(pipe) if is_main else nullcontext():
            counts = run_job(job)
        if is_main:
            pipe.send(result=counts)
