"""Distribute a step over several processes: started here, or present already because of a user's own torchrun.

    processes = 4, started here:  this process waits; four `python -m tasks.worker` run the step, and rank 0 writes
    torchrun ... -m flows run:    rank 0 runs the recipe; the others join in the steps that can be distributed

All ranks call the step's function, with the same artifacts and settings, until training ends; rank 0 goes on alone.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import ParameterError, RankLost
from tasks.signals import kept_signals
from tasks.step import ROOT
from tasks.worker import CONNECTION_ERROR, exit_with_parent, in_job, run_job

if TYPE_CHECKING:
    from tasks.artifacts import Artifact, Counts
    from tasks.tuning import TuningParams, TuningRuntime

COLLECTIVE_TIMEOUT = 1.5  # times the heartbeat timeout: the launcher is to report a hang before the ranks give up
FINISHED = "finished"
WORKER = "import sys; sys.path.insert(0, sys.argv[1]); from tasks.worker import main; main()"


def run_distributed(
    step: str, out: Path, inputs: Mapping[str, Artifact], params: TuningParams, run: TuningRuntime
) -> Counts | None:
    """Run a step in several processes and return its counts; None: go on in this one, alone or as one rank.

    Args:
        step: Its name.
        out: The folder that rank 0 writes to.
        inputs: Its artifacts, by argument.
        params: What decides the outcome.
        run: Sets the number of processes.

    Raises:
        ParameterError: If `ema_decay` is set, and no process would hold whole weights.
    """
    from tasks.gpt.distributed import current_group

    if in_job():
        return None
    group = current_group()
    size = num_processes(run) if group.is_single else group.size
    if size == 1:
        return None
    refuse_sharded_ema(step, params, run)
    values = params.model_dump(mode="json")
    if values.get("folder"):
        values["folder"] = str(Path(values["folder"]).absolute())
    job = {
        "step": step,
        "out": str(out.absolute()),
        "inputs": {name: str(artifact.path.absolute()) for name, artifact in inputs.items()},
        "params": values,
        "run": run.model_dump(mode="json"),
    }
    if group.is_single:
        return _launch(job, size, run)
    group.broadcast(job)
    return None


def num_processes(run: TuningRuntime) -> int:
    """Return the number of processes that a runtime asks for.

    Raises:
        ParameterError: If there are fewer GPUs.
    """
    from tasks.gpt.device import count_of, device_of

    device = device_of(run.device)
    devices = count_of(device)
    size = devices if run.num_processes == "auto" else run.num_processes
    if device.type != "cpu" and size > devices:
        raise ParameterError(
            f"expected at most {devices} processes, one a GPU, found {size}",
            "num_processes",
            "Set it to auto",
            "param.num_processes",
        )
    return size


def refuse_sharded_ema(step: str, params: TuningParams, run: TuningRuntime) -> None:
    """Raise `ParameterError` if each process would hold a shard of weights that are to be averaged."""
    if run.sharding == "full" and params.ema_decay is not None:
        raise ParameterError(
            "ema_decay needs whole weights, and each process would hold a shard",
            "runtime.sharding = full",
            f"Set it to none, or leave {step}.ema_decay out",
            "param.sharding",
        )


def _launch(job: Mapping[str, Any], size: int, run: TuningRuntime) -> Counts:
    """Start the workers and wait for them; asked to stop, they save first."""
    from tasks.gpt.interrupt import Interrupt
    from tasks.gpt.launcher import run_workers

    interrupt = Interrupt()
    timeout = COLLECTIVE_TIMEOUT * run.heartbeat_timeout
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size))}  # else each would take all cores
    if loopback := next((name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}), None):
        environment |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    with kept_signals(interrupt.ask):
        counts: Counts = run_workers(
            [sys.executable, "-P", "-c", WORKER, str(ROOT)],
            {**job, "timeout": timeout, "environment": environment},
            size,
            interrupt=interrupt,
            max_restarts=run.max_restarts,
            heartbeat_timeout=run.heartbeat_timeout,
        )
    return counts


@contextmanager
def torchrun_group() -> Iterator[bool]:
    """Join the processes that a user's own torchrun has started; yield whether this one runs the recipe.

    Without torchrun, it does. Of torchrun's processes, rank 0 does; the others run its jobs here until it has finished.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield True
        return
    from tasks.gpt.distributed import current_group, join_group
    from tasks.gpt.interrupt import Interrupted

    exit_with_parent(os.getppid())  # killed, torchrun leaves its workers alive
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    try:
        with join_group(rank, size, local_rank, local_size=local_size):
            if rank == 0:
                yield True
                current_group().broadcast(FINISHED)
            else:
                _run_jobs()
                yield False
    except Interrupted:  # another rank was asked to stop, and this one by it
        raise SystemExit(128 + signal.SIGTERM) from None


def _run_jobs() -> None:
    """Run the jobs that rank 0 broadcasts, until it has finished.

    Raises:
        RankLost: If torch reports that another rank is gone.
    """
    from tasks.gpt.distributed import current_group

    group = current_group()
    try:
        while (job := group.broadcast()) != FINISHED:
            run_job(job)
    except RuntimeError as error:
        if not CONNECTION_ERROR.search(str(error)):
            raise
        raise RankLost("another rank exited", f"rank {group.rank}", "See that rank's log for the cause") from error
