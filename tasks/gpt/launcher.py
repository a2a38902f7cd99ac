"""Start the workers of a distributed step by torch's elastic agent, and supervise them.

The agent starts the processes and restarts all of them when one is lost. Each reads its job from a file, and reports by
lines of JSON through a named pipe: rank 0 its progress and log, each its heartbeats, an error, the result, or that it
is done. Nothing that either side reads can be code. Nothing listens on a network: workers meet in a file, and talk over
the loopback.

    {"heartbeats": 12}   {"open": ["train", 90, "steps"]}   {"advance": [1, "loss 2.1"]}   {"close": null}
    {"log": [20, "train.plan: ..."]}   {"error": {...}}   {"result": ...}   {"done": null}
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from tasks.errors import RankLost, TreelineError
from tasks.gpt.interrupt import Interrupt, Interrupted
from tasks.progress import Bar, bar

log = logging.getLogger("treeline.train")
FOLDER = "TREELINE_WORKER_FOLDER"  # environment variable: where a worker finds its job and its pipe
POLL_SECONDS = 0.2
SETTLE_SECONDS = 1.0  # for the others to report or to exit, once one has failed or rank 0 has its result
GRACE_SECONDS = 60.0  # without progress, once asked to stop, until workers are killed
for name in ("agent.server.api", "agent.server.local_elastic_agent", "multiprocessing.api"):
    # What the agent warns of is reported here, with its cause.
    logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
HINT = "Run again: it resumes from the last checkpoint; if the same rank fails each time, check its device"


class _WorkerLost(Exception):
    """A worker died or made no progress."""


@dataclass
class _Worker:
    """What is known of a running worker."""

    rank: int
    pipe: int
    unread: bytes = b""
    heartbeats: int = -1
    progressed: float = field(default_factory=time.monotonic)
    error: dict[str, Any] | None = None
    done: bool = False  # its part: how it exits does not matter any more


def run_workers(
    command: Sequence[str],
    job: Mapping[str, Any],
    num_workers: int,
    *,
    location: str,
    interrupt: Interrupt,
    max_restarts: int = 2,
    heartbeat_timeout: float = 900.0,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run one job in several processes on this machine, and return the result that rank 0 reports.

    Args:
        command: Starts a worker, in the current folder.
        job: JSON values that each worker reads.
        num_workers: Number of processes.
        location: What they work on, for errors.
        interrupt: When asked, all workers are asked to save and exit.
        max_restarts: How often all are restarted after one was lost.
        heartbeat_timeout: Seconds without progress on any rank after which the group counts as hung.
        environment: Variables for the workers, besides this process's own.

    Raises:
        TreelineError: The error that a worker reported; `train.rank` if workers were lost too often.
        OSError: A system error that a worker reported.
        Interrupted: If the interrupt was asked.
    """
    with TemporaryDirectory(prefix="treeline-workers-") as folder:
        # Without signals to handle, the agent leaves the handlers of this process alone.
        own = {FOLDER: folder, "TORCHELASTIC_SIGNALS_TO_HANDLE": "", **_loopback()}
        (Path(folder) / "job.json").write_text(json.dumps({**job, "launcher": os.getpid()}), encoding="utf-8")
        with _environment({**own, **(environment or {})}):
            agent = _Agent(command, Path(folder), num_workers, max_restarts, interrupt, heartbeat_timeout)
            try:
                outcome = agent.run()
            finally:
                agent.close()
    if outcome.state == WorkerState.SUCCEEDED:
        return outcome.return_values[0]
    raise RankLost(f"{agent.loss}, and no restart is left", location, HINT) from agent.loss


class _Agent(LocalElasticAgent):
    """Torch's agent, which restarts the group, with our supervision: reports, heartbeats, and a stop that saves."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        num_workers: int,
        max_restarts: int,
        interrupt: Interrupt,
        heartbeat_timeout: float,
    ) -> None:
        spec = WorkerSpec(
            "rank",
            num_workers,
            _LocalRendezvous(),
            entrypoint=command[0],
            args=tuple(command[1:]),
            max_restarts=max_restarts,
            monitor_interval=POLL_SECONDS,
        )
        super().__init__(spec, DefaultLogsSpecs(os.devnull))
        self.folder, self.size = folder, num_workers
        self.interrupt, self.heartbeat_timeout = interrupt, heartbeat_timeout
        self.workers: list[_Worker] = []
        self.bars: list[tuple[ExitStack, Bar]] = []
        self.results: list[Any] = []
        self.loss: _WorkerLost | None = None
        self.stop_requested: float | None = None
        self.warned = False

    def close(self) -> None:
        """Close the pipes and bars of the last attempt."""
        while self.workers:
            os.close(self.workers.pop().pipe)
        while self.bars:
            self.bars.pop()[0].close()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.close()
        attempt = worker_group.spec.max_restarts - self._remaining_restarts
        for rank in range(self.size):
            path = pipe_path(self.folder, attempt, rank)
            os.mkfifo(path, 0o600)
            self.workers.append(_Worker(rank, os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
        pids: dict[int, Any] = super()._start_workers(worker_group)
        return pids

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Kill what still runs: by now, workers have saved, or wait for one that is gone."""
        super()._shutdown(signal.SIGKILL, timeout)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._read_reports()
        if self.results:
            self._settle(lambda: all(code is not None for code in self._exit_codes().values()))
            values = {**dict.fromkeys(range(self.size)), 0: self.results[0]}
            return RunResult(WorkerState.SUCCEEDED, return_values=values)
        if self.interrupt.asked:
            self._stop_gracefully()
            return RunResult(WorkerState.HEALTHY)
        try:
            self._check_exits()
            self._check_heartbeats()
        except _WorkerLost as loss:
            self.loss = loss
            if left := self._remaining_restarts:
                what = "train.rank: %s; all ranks resume from the last checkpoint (restarts left: %d)"
                log.warning(what, loss, left - 1)
            return RunResult(WorkerState.FAILED)
        return RunResult(WorkerState.HEALTHY)

    def _exit_codes(self) -> dict[int, int | None]:
        assert isinstance(self._pcontext, SubprocessContext)
        return {rank: handler.proc.poll() for rank, handler in self._pcontext.subprocess_handlers.items()}

    def _settle(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, but no longer than a moment."""
        end = time.monotonic() + SETTLE_SECONDS
        while not condition() and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 4)
            self._read_reports()

    def _read_reports(self) -> None:
        for worker in self.workers:
            with suppress(BlockingIOError):
                while block := os.read(worker.pipe, 1 << 16):
                    *lines, worker.unread = (worker.unread + block).split(b"\n")
                    for line in lines:
                        self._handle(worker, json.loads(line))

    def _handle(self, worker: _Worker, report: dict[str, Any]) -> None:
        ((kind, value),) = report.items()
        if kind == "heartbeats" and value != worker.heartbeats:
            worker.heartbeats, worker.progressed = value, time.monotonic()
        elif kind == "error":
            worker.error = worker.error or value
        elif kind == "result":
            self.results.append(value)
        elif kind == "done":
            worker.done = True
        elif kind == "log":
            log.log(*value)
        elif kind == "open":
            stack = ExitStack()
            self.bars.append((stack, stack.enter_context(bar(*value))))
        elif kind == "advance":
            self.bars[-1][1].advance(*value)
        elif kind == "close":
            self.bars.pop()[0].close()

    def _stop_gracefully(self) -> None:
        """Ask all workers to save and exit, and wait for as long as they make progress: a large model saves slowly.

        Raises:
            Interrupted: Once all have exited, or make no progress any more.
        """
        now, codes = time.monotonic(), self._exit_codes()
        if self.stop_requested is None:
            self.stop_requested = now
            assert isinstance(self._pcontext, SubprocessContext)
            for handler in self._pcontext.subprocess_handlers.values():
                handler.proc.terminate()
        if all(code is not None for code in codes.values()):
            raise Interrupted
        waited = now - self.stop_requested
        idle = now - max(self.stop_requested, *(worker.progressed for worker in self.workers))
        if idle > GRACE_SECONDS or waited > max(GRACE_SECONDS, self.heartbeat_timeout):
            log.warning("train.rank: not all ranks stopped within %.0f s: killed", waited)
            raise Interrupted
        if waited > GRACE_SECONDS and not self.warned:
            self.warned = True
            log.warning("train.rank: the ranks are still saving %g s after the request to stop; waiting", waited)

    def _check_exits(self) -> None:
        """Raise an error if a worker failed, or if all exited without a result."""
        if self._failed():
            self._settle(lambda: bool(self.results))  # the first seen need not be the cause, nor have reported all
            if not self.results and self._failed():
                raise self._cause()
        elif all(code is not None for code in self._exit_codes().values()):
            self._read_reports()
            if not self.results:
                raise _WorkerLost(f"rank 0 of {self.size} exited without a result")

    def _failed(self) -> list[_Worker]:
        codes = self._exit_codes()
        return [worker for worker in self.workers if codes[worker.rank] and not worker.done]

    def _check_heartbeats(self) -> None:
        """Raise an error if no rank makes progress; the one that is behind is to blame, the others wait for it."""
        codes, now = self._exit_codes(), time.monotonic()
        if any(worker.done for worker in self.workers):
            return  # rank 0 goes on alone, and nobody waits for it but us
        running = [worker for worker in self.workers if codes[worker.rank] is None]
        if running and all(now - worker.progressed > self.heartbeat_timeout for worker in running):
            behind = min(running, key=lambda worker: worker.heartbeats)
            raise _WorkerLost(
                f"rank {behind.rank} of {self.size} made no progress for {self.heartbeat_timeout:g} s; "
                "the other ranks are blocked on it"
            )

    def _cause(self) -> Exception:
        """Return what went wrong first: an error that would recur, else a killed worker, else the earliest report."""
        codes, failed = self._exit_codes(), self._failed()
        for worker in self.workers:
            if worker.error and not worker.done and (error := error_from_json(worker.error)):
                return error
        killed = [worker for worker in failed if (codes[worker.rank] or 0) < 0]
        by_time = sorted(failed, key=lambda worker: worker.error["time"] if worker.error else 0.0)
        worker = (killed or by_time)[0]
        code = codes[worker.rank] or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        reported = f": {worker.error['message']}" if worker.error else ""
        return _WorkerLost(f"rank {worker.rank} of {self.size} {how}{reported}")


class _LocalRendezvous(RendezvousHandler):
    """The rendezvous of a single agent: with itself, in memory, so that no port is opened."""

    def get_backend(self) -> str:
        return "local"

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("localhost", 0))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: nobody else could join."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "treeline"

    def shutdown(self) -> bool:
        return True


def pipe_path(folder: Path, attempt: int, rank: int) -> Path:
    """Return the path of the named pipe that a rank of an attempt reports through."""
    return folder / f"{attempt}-{rank}.pipe"


def _loopback() -> dict[str, str]:
    """Return the variables that keep the workers' traffic on this machine, where the user has not set them."""
    interface = next((name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}), None)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: interface for name in names if interface and name not in os.environ}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block, since the agent's workers inherit this process's own."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def error_to_json(error: Exception) -> dict[str, Any]:
    """Return an error as JSON values."""
    message = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    values: dict[str, Any] = {"time": time.time(), "message": message}
    if isinstance(error, TreelineError):
        values |= {"type": type(error).__name__, "arguments": [error.what, error.where, error.do, error.code]}
    elif isinstance(error, OSError) and error.errno:
        filename = error.filename and str(error.filename)
        values |= {"type": "OSError", "arguments": [error.errno, error.strerror, filename]}
    return values


def error_from_json(values: Mapping[str, Any]) -> Exception | None:
    """Return a reported error, if it is one that a restart would only meet again."""
    if values.get("type") == "OSError":
        return OSError(*values["arguments"])
    classes: list[type[TreelineError]] = [TreelineError]
    while classes:
        candidate = classes.pop()
        if candidate.__name__ == values.get("type"):
            return candidate(*values["arguments"])
        classes += candidate.__subclasses__()
    return None
