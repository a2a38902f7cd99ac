"""Together: a step that many processes do at once, started here, or there already because of a user's own torchrun.

    processes = 4, started here:  this process waits, four `python -m tasks.rank` do the step's function, rank 0 writes
    torchrun ... -m flows run:    rank 0 runs the recipe; the others follow it, and join in steps that many can do

All do the function of the step, from the same artifacts and settings, up to the end of training; rank 0 goes on alone.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import ParameterError, RankLost
from tasks.signals import kept_signals
from tasks.step import ROOT, home

if TYPE_CHECKING:
    from tasks.artifacts import Artifact, Counts
    from tasks.tuning import TuningParams, TuningRuntime

_performing: ContextVar[bool] = ContextVar("treeline_performing", default=False)
PATIENCE = 1.5  # times the silence that is allowed: whoever supervises is to speak before the ranks do
OVER = "over"
LOST = re.compile("gloo|nccl|connection|peer|timed out|timeout", re.IGNORECASE)  # what torch says of a lost rank


@contextmanager
def performing() -> Iterator[None]:
    """Do a step as one rank of many while the block runs."""
    token = _performing.set(True)
    try:
        yield
    finally:
        _performing.reset(token)


def together(
    step: str, out: Path, inputs: Mapping[str, Artifact], params: TuningParams, run: TuningRuntime
) -> Counts | None:
    """Let many processes do a step, if that is wanted, and return its counts; None: go on, alone or as one of them.

    Args:
        step: Its name.
        out: The folder that its rank 0 writes into.
        inputs: Its artifacts, by argument.
        params: What decides the outcome.
        run: Says how many.

    Raises:
        ParameterError: If an average is asked for of weights that no process would hold whole.
    """
    from tasks.gpt.world import here

    if _performing.get():
        return None
    size = processes(run) if here().alone else here().size
    if size > 1:
        refuse_parted_average(step, params, run)
    folders = {name: str(artifact.path.absolute()) for name, artifact in inputs.items()}
    asked = params.model_dump(mode="json")
    if asked.get("folder"):
        asked["folder"] = str(Path(asked["folder"]).absolute())
    settings = {"params": asked, "run": run.model_dump(mode="json")}
    order = {"step": step, "out": str(out.absolute()), "inputs": folders, **settings}
    if not here().alone:
        here().told(order)
        return None
    return None if size == 1 else _launched(order, size, run)


def processes(run: TuningRuntime) -> int:
    """Return how many processes a runtime asks for."""
    from tasks.gpt.device import count_of, device_of

    device = device_of(run.device)
    there = count_of(device)
    size = there if run.processes == "auto" else run.processes
    if device.type != "cpu" and size > there:
        raise ParameterError(
            f"expected at most {there} processes, one a GPU, found {size}",
            "processes",
            "Set it to auto",
            "param.processes",
        )
    return size


def refuse_parted_average(step: str, params: TuningParams, run: TuningRuntime) -> None:
    """Raise an error if each process would hold a part of the weights that an average is asked for of."""
    if run.sharding == "full" and params.average != "none":
        raise ParameterError(
            f"an average ({params.average}) is of whole weights, and each process would hold a part",
            f"{step}.sharding = full",
            f"Set it to none, or {step}.average to none",
            "param.sharding",
        )


def _launched(order: Mapping[str, Any], size: int, run: TuningRuntime) -> Counts:
    """Start processes for an order, and wait until it is done; asked to stop, they save first."""
    from tasks.gpt.interrupt import Interrupt
    from tasks.gpt.launch import done_by_many

    interrupt = Interrupt()
    threads = str(max(1, (os.cpu_count() or 1) // size))  # else each would take all cores
    with kept_signals(interrupt.ask):
        counts: Counts = done_by_many(
            [sys.executable, "-m", "tasks.rank"],
            {**order, "patience": PATIENCE * run.silence_seconds},
            size,
            where=str(order["out"]),
            folder=ROOT,
            interrupt=interrupt,
            restarts=run.restarts,
            silence=run.silence_seconds,
            environment={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), **folders_named()},
        )
    return counts


def folders_named() -> dict[str, str]:
    """Return the environment's variables that name our folders, made absolute: ranks start in another folder."""
    roots = {
        name: os.pathsep.join(str(Path(root).absolute()) for root in value.split(os.pathsep) if root)
        for name, value in os.environ.items()
        if name.startswith("TREELINE_") and name.endswith("_ROOTS")
    }
    return {**roots, "TREELINE_ARTIFACTS": str(home())}


@contextmanager
def in_torchrun() -> Iterator[bool]:
    """Meet the processes that a user's own torchrun has started; yield whether this one is to run the recipe.

    Without torchrun, it is. Of its processes, rank 0 is; the others do here what it orders, until it is done.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield True
        return
    from tasks.gpt.interrupt import Interrupted
    from tasks.gpt.world import here, joined
    from tasks.rank import tie_to

    tie_to(os.getppid())  # killed, torchrun leaves its workers alive
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local, neighbours = (int(os.environ[name]) for name in names)
    try:
        with joined(rank, size, local, neighbours=neighbours):
            if rank == 0:
                yield True
                here().told(OVER)
            else:
                _follow()
                yield False
    except Interrupted:  # another rank was asked to stop, and this one by it
        raise SystemExit(128 + signal.SIGTERM) from None


def _follow() -> None:
    """Do what rank 0 orders, until it says that all is over."""
    from tasks.gpt.world import here
    from tasks.rank import perform

    while True:
        with _loss_named("rank 0 has ended without a word"):
            order = here().told()
        if order == OVER:
            return
        with _loss_named("another rank has ended in the midst of a step"):
            perform(order)


@contextmanager
def _loss_named(what: str) -> Iterator[None]:
    """Turn torch's way to say that the other end is closed into an error that says whose words to look for."""
    from tasks.gpt.world import here

    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise RankLost(what, f"rank {here().rank}", "What stopped it is among what it said") from error
