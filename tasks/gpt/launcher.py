"""Start the workers of a distributed step by torch's elastic agent, and supervise them.

The agent starts the processes and restarts all of them when one is lost. Each reads its job from a file, and reports by
lines of JSON through a named pipe: rank 0 its progress, its log and its result, each its heartbeats and an error. What
either side reads is never code. No port is opened: workers meet in a file, and talk over the loopback.

    {"bar": ["train", 90, "steps"]}   {"advance": [1, "loss 2.1"]}   {"log": [20, "train.plan: ..."]}
    {"heartbeats": 12}   {"error": {...}}   {"result": {...}}
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from tasks import errors
from tasks.gpt.interrupt import Interrupt, Interrupted
from tasks.progress import bar

log = logging.getLogger("treeline.train")
POLL_SECONDS = 0.2
SETTLE_SECONDS = 1.0  # for the other ranks to report or to exit, once one has failed
GRACE_SECONDS = 60.0  # without progress, once asked to stop, until workers are killed
HINT = "Run again: it resumes from the last checkpoint; if the same rank fails each time, check its device"
os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "")  # the agent leaves this process's signal handlers alone
for module in ("agent.server.api", "agent.server.local_elastic_agent", "multiprocessing.api"):
    # What the agent warns of is reported here, with its cause.
    logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)


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
    error: dict[str, Any] = field(default_factory=dict)


def run_workers(
    command: Sequence[str],
    job: Mapping[str, Any],
    num_workers: int,
    *,
    interrupt: Interrupt,
    max_restarts: int = 2,
    heartbeat_timeout: float = 900.0,
) -> Any:
    """Run one job in several processes of this machine, and return the result that rank 0 reports.

    Args:
        command: Starts a worker, in the current folder; the folder that holds `job.json` and the pipes is appended.
        job: JSON values for each worker.
        num_workers: Number of processes.
        interrupt: When asked, all workers are asked to save and exit.
        max_restarts: How often all are restarted after one was lost.
        heartbeat_timeout: Seconds without progress on any rank after which the group counts as hung.

    Raises:
        TreelineError: The error that a worker reported; `train.rank` if workers were lost too often.
        OSError: A system error that a worker reported.
        Interrupted: If the interrupt was asked.
    """
    with TemporaryDirectory(prefix="treeline-workers-") as folder:
        (Path(folder) / "job.json").write_text(json.dumps({**job, "launcher": os.getpid()}), encoding="utf-8")
        rendezvous = _LocalRendezvous("localhost", 0, 0, 1, "treeline", timeout=60)
        spec = WorkerSpec(
            "rank", num_workers, rendezvous, entrypoint=command[0], args=(*command[1:], folder),
            max_restarts=max_restarts, monitor_interval=POLL_SECONDS,
        )  # fmt: skip
        agent = _Agent(spec, Path(folder), interrupt, heartbeat_timeout)
        try:
            outcome = agent.run()
        finally:
            agent.close()
    if outcome.state == WorkerState.SUCCEEDED:
        return outcome.return_values[0]
    raise errors.RankLost(f"{agent.loss}, and no restart is left", "", HINT) from agent.loss


class _LocalRendezvous(StaticTCPRendezvous):
    """The rendezvous of a single agent: with itself, in memory."""

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("localhost", 0))


class _Agent(LocalElasticAgent):
    """Torch's agent with our supervision: reports, heartbeats, errors that end the run, and a stop that saves."""

    def __init__(self, spec: WorkerSpec, folder: Path, interrupt: Interrupt, heartbeat_timeout: float) -> None:
        super().__init__(spec, DefaultLogsSpecs(os.devnull))
        self.size, self.folder = spec.local_world_size, folder
        self.interrupt, self.heartbeat_timeout = interrupt, heartbeat_timeout
        self.workers: list[_Worker] = []
        self.results: list[Any] = []
        self.loss: _WorkerLost | None = None
        self.stop_requested: float | None = None
        self.bars = ExitStack()

    def close(self) -> None:
        """Close the pipes and the bar of the last attempt."""
        self.bars.close()
        while self.workers:
            os.close(self.workers.pop().pipe)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.close()
        attempt = worker_group.spec.max_restarts - self._remaining_restarts
        for rank in range(self.size):
            os.mkfifo(path := self.folder / f"{attempt}-{rank}.pipe", 0o600)
            self.workers.append(_Worker(rank, os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
        pids: dict[int, Any] = super()._start_workers(worker_group)
        return pids

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Kill what still runs: by now, it has saved, or waits for a rank that is gone."""
        super()._shutdown(signal.SIGKILL, timeout)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = self._exit_codes()
        self._read_reports()
        if self.results:
            values = {**dict.fromkeys(range(self.size)), 0: self.results[0]}
            return RunResult(WorkerState.SUCCEEDED, return_values=values)
        try:
            if self.interrupt.requested:
                self._stop(codes)
            elif any(codes) or None not in codes:
                self._fail()
            elif 0 not in codes:  # else rank 0 is about to finish alone, and nobody waits for it
                self._check_progress(codes, self.heartbeat_timeout)
        except _WorkerLost as loss:
            self.loss = loss
            if left := self._remaining_restarts:
                what = "train.rank: %s; all ranks resume from the last checkpoint (restarts left: %d)"
                log.warning(what, loss, left - 1)
            return RunResult(WorkerState.FAILED)
        return RunResult(WorkerState.HEALTHY)

    def _exit_codes(self) -> list[int | None]:
        assert isinstance(self._pcontext, SubprocessContext)
        return [self._pcontext.subprocess_handlers[rank].proc.poll() for rank in range(self.size)]

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
            worker.error = value
        elif kind == "result":
            self.results.append(value)
        elif kind == "log":
            log.log(*value)
        elif kind == "bar":
            self.bars.close()
            self.bar = self.bars.enter_context(bar(*value))
        elif kind == "advance":
            self.bar.advance(*value)

    def _stop(self, codes: Sequence[int | None]) -> None:
        """Ask all workers to save and exit; wait for as long as they make progress, since large models save slowly."""
        now = time.monotonic()
        if self.stop_requested is None:
            self.stop_requested = now
            assert isinstance(self._pcontext, SubprocessContext)
            for worker in self.workers:
                worker.progressed = now
                self._pcontext.subprocess_handlers[worker.rank].proc.terminate()
        if None not in codes:
            raise Interrupted
        try:
            self._check_progress(codes, GRACE_SECONDS)
        except _WorkerLost as loss:
            log.warning("train.rank: asked to stop, %s; killed", loss)
            raise Interrupted from loss

    def _check_progress(self, codes: Sequence[int | None], timeout: float) -> None:
        """Raise an error if no rank makes progress; the one that is behind is to blame, the others wait for it."""
        running, now = [worker for worker in self.workers if codes[worker.rank] is None], time.monotonic()
        if all(now - worker.progressed > timeout for worker in running):
            behind = min(running, key=lambda worker: worker.heartbeats).rank
            what = f"rank {behind} of {self.size} made no progress for {timeout:g} s"
            raise _WorkerLost(f"{what}; the other ranks are blocked on it")

    def _fail(self) -> None:
        """Raise what went wrong first: an error that would recur, else a killed worker, else the earliest report."""
        time.sleep(SETTLE_SECONDS)  # the first seen need not be the cause
        codes = [code or 0 for code in self._exit_codes()]
        self._read_reports()
        if self.results:
            return
        failed = [worker for worker in self.workers if codes[worker.rank]]
        for worker in failed:
            if worker.error.get("arguments"):
                raise error_from_json(worker.error)
        if not failed:
            raise _WorkerLost(f"all {self.size} ranks exited without a result")
        worker = min(failed, key=lambda worker: (codes[worker.rank] > 0, worker.error.get("time", 0.0)))
        code, reported = codes[worker.rank], worker.error.get("message", "")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        raise _WorkerLost(f"rank {worker.rank} of {self.size} {how}{reported and f': {reported}'}")


def error_to_json(error: Exception) -> dict[str, Any]:
    """Return an error as JSON values; with `arguments`, if it is one that a restart would only meet again."""
    arguments: list[Any] = []
    if isinstance(error, errors.TreelineError):
        arguments = [error.what, error.where, error.hint, error.code]
    elif isinstance(error, OSError) and error.errno:
        arguments = [error.errno, error.strerror, error.filename and str(error.filename)]
    message = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    return {"time": time.time(), "message": message, "class": type(error).__name__, "arguments": arguments}


def error_from_json(values: Mapping[str, Any]) -> Exception:
    """Return the error that `error_to_json` has described."""
    error: Exception = getattr(errors, values["class"], OSError)(*values["arguments"])
    return error
