"""One rank of a step that many processes do together: it does the step's function, and rank 0 does so to its end.

`tasks.together` starts it as `python -m tasks.rank`, gives it an order, and reads what it says, in the forms that
`tasks.gpt.launch` shows. Under a user's own torchrun the processes are there, and need no more of this than `perform`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import Counts
from tasks.errors import ConfigurationError, TreelineError
from tasks.gpt.interrupt import Interrupted
from tasks.gpt.launch import PARENT, TELL, error_said
from tasks.progress import listening
from tasks.step import Step
from tasks.store.manifest import read_manifest
from tasks.together import LOST, performing

if TYPE_CHECKING:
    from tasks.gpt.world import World

BEAT = 1.0  # seconds between two signs of life
ORDERED = ("train", "prefer")  # the steps that many processes can do together
PR_SET_PDEATHSIG = 1


def perform(order: Mapping[str, Any]) -> Counts | None:
    """Do a step's function as ordered; return its counts, on rank 0.

    Args:
        order: `step` is its name, `inputs` the folders of its artifacts, `params` and `run` its settings, `out` the
            folder that rank 0 writes into.
    """
    from tasks.gpt.world import Done

    if order["step"] not in ORDERED:
        raise ConfigurationError(f"no step {order['step']!r} can be done by many", "an order to a rank")
    made_by: Step[Any, Any] = getattr(importlib.import_module(f"tasks.{order['step']}"), order["step"])
    bound: dict[str, Any] = {
        name: made_by.inputs[name](Path(folder), read_manifest(Path(folder)))
        for name, folder in order["inputs"].items()
    }
    bound[made_by.params_name] = made_by.params_type(**order["params"])
    bound[made_by.runtime_name] = made_by.runtime_type(**order["run"])
    with performing():
        try:
            counts: Counts = made_by.function(Path(order["out"]), **bound)
        except Done:
            return None
    return counts


def tie_to(parent: int) -> None:
    """Let this process be killed when its parent ends, however that ends. Only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before we could ask
            os._exit(128 + signal.SIGKILL)


class _Mouth:
    """Says things to the parent; also shows bars, by saying what they show."""

    def __init__(self, number: int) -> None:
        self.file, self.turn = os.fdopen(number, "w", encoding="utf-8"), threading.Lock()

    def say(self, **one: Any) -> None:
        """Say one thing."""
        with self.turn:
            self.file.write(json.dumps(one) + "\n")
            self.file.flush()

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[_Mouth]:
        """Open a bar."""
        self.say(open=[label, total, unit])
        yield self
        self.say(close=None)

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move the bar that was opened last."""
        self.say(advance=[amount, note])


class _Told(logging.Handler):
    """Sends what is logged to the parent."""

    def __init__(self, mouth: _Mouth) -> None:
        super().__init__()
        self.mouth = mouth

    def emit(self, record: logging.LogRecord) -> None:
        self.mouth.say(log=[record.levelno, record.getMessage()])


def _watch(parent: _Mouth, beats: Callable[[], int]) -> None:
    """Give signs of life from now on, and end when the parent is gone: its end of our input is closed then."""

    def beat() -> None:
        while True:
            parent.say(beat=beats())
            time.sleep(BEAT)

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(128 + signal.SIGKILL)

    for work in (beat, wait):
        threading.Thread(target=work, daemon=True).start()


def main() -> int:
    """Be a rank, and return the exit code."""
    if PARENT not in os.environ or TELL not in os.environ:
        lost = ConfigurationError(
            "a rank was started by hand",
            "python -m tasks.rank",
            "Set train.processes, and run the recipe",
            "config.rank",
        )
        sys.stderr.write(f"{lost}\n")
        return lost.exit_code
    tie_to(int(os.environ[PARENT]))
    mouth, order = _Mouth(int(os.environ[TELL])), json.loads(sys.stdin.buffer.readline())
    worlds: list[World] = []
    _watch(mouth, lambda: worlds[0].beats if worlds else 0)
    first = order["rank"] == 0
    logger = logging.getLogger("treeline")
    logger.addHandler(_Told(mouth) if first else logging.NullHandler())
    logger.setLevel(logging.INFO)
    try:
        with _joined(order) as world, listening(mouth) if first else nullcontext():
            worlds.append(world)
            world.begin()
            counts = perform(order)
            mouth.say(**{"result": counts} if first else {"done": None})  # before the ranks part: that may fail
    except Exception as error:
        mouth.say(error=error_said(error))
        if not isinstance(error, TreelineError | OSError) and not LOST.search(str(error)):
            traceback.print_exc()  # a bug; what the parent says in a line, or came of another rank's end, is none
        return error.exit_code if isinstance(error, TreelineError) else 70
    except Interrupted:
        return 128 + signal.SIGTERM
    return 0


def _joined(order: Mapping[str, Any]) -> AbstractContextManager[World]:
    from tasks.gpt.world import joined

    return joined(order["rank"], order["size"], order["rank"], order["meeting"], order["patience"])


if __name__ == "__main__":
    ended = main()
    sys.stderr.flush()
    os._exit(ended)  # torch's threads may wait for ranks that are gone
