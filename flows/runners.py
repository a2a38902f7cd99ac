"""Task runners: where the texts of a step are worked on, on threads here or on the workers of a cluster.

On a cluster each task run of Prefect gets some thousand texts and sends rows back; the step that asked lays them out,
so its files are the same wherever they were worked on. Workers need this checkout and its packages, and no store.

A cluster is named by the environment, not by a setting: whoever may fill in a form must not choose whose code we trust.
Without a name, one is started on this machine, with the first texts that come.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

from tasks.errors import ParameterError, UnavailableError
from tasks.text_chunks import text_executor

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.text_chunks import ChunkFunction

Runner = Literal["threads", "dask", "ray"]
ADDRESS = {"dask": "TREELINE_DASK_SCHEDULER", "ray": "TREELINE_RAY_ADDRESS"}
_running: ContextVar[bool] = ContextVar("treeline_runner", default=False)
ROWS = 1 << 11  # texts of a task run: a step asks for 16,384 or more at a time, so that many workers have some


@contextmanager
def on(runner: Runner) -> Iterator[None]:
    """Work on texts there while the block runs; a cluster that this starts ends with it.

    Raises:
        ParameterError: If the runner is not installed.
    """
    # Threads of this process need no task runs: one for each chunk would cost more than it shows. And a flow of a flow
    # goes on with the outer one's cluster.
    if runner == "threads" or _running.get():
        yield
        return
    token = _running.set(True)
    try:
        with ExitStack() as stack, text_executor(_Cluster(runner, stack), ROWS):
            yield
    finally:
        _running.reset(token)


class _Cluster:
    """Maps chunks over a task runner, which starts when the first one comes."""

    def __init__(self, runner: Runner, stack: ExitStack) -> None:
        self.runner, self.make = runner, _made(runner)
        self.stack = stack
        self.started: Any = None

    def __call__(self, function: ChunkFunction, chunks: Iterable[pa.StringArray]) -> Iterator[pa.RecordBatch]:
        """Compute chunks on the workers, and yield their rows in order."""
        from prefect import task
        from prefect.cache_policies import NO_CACHE

        self.started = self.started or self._start()
        work = task(name="texts", cache_policy=NO_CACHE, persist_result=False)(_work)
        given = [{"compute": _Sealed(function), "texts": _packed([chunk])} for chunk in chunks]
        for future in [self.started.submit(work, parameters=one) for one in given]:
            yield from _unpacked(future.result())

    def _start(self) -> Any:
        """Start the task runner.

        Raises:
            UnavailableError: If its cluster does not answer.
        """
        try:
            return self.stack.enter_context(self.make())
        except (OSError, TimeoutError, RuntimeError, ConnectionError) as error:
            variable = ADDRESS[self.runner]
            where = os.environ.get(variable) or "a cluster of this machine"
            hint = f"Start it, mend ${variable}, or set runtime.runner to threads"
            raise UnavailableError(
                f"the {self.runner} cluster does not answer: {error}", where, hint, "runner"
            ) from error


class _Sealed:
    """Holds a function so that Prefect, which looks into parameters, leaves it as it is."""

    def __init__(self, compute: ChunkFunction) -> None:
        self.compute = compute

    def __repr__(self) -> str:
        return getattr(getattr(self.compute, "func", self.compute), "__name__", "a function")


def _work(compute: _Sealed, texts: bytes) -> bytes:
    """Compute some chunks; runs on a worker."""
    return _packed([compute.compute(batch.column(0)) for batch in _unpacked(texts)])


def _packed(parts: list[Any]) -> bytes:
    """Return arrays or record batches of one schema as an Arrow stream."""
    import pyarrow as pa

    batches = [
        part if isinstance(part, pa.RecordBatch) else pa.RecordBatch.from_arrays([part], ["text"]) for part in parts
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _unpacked(content: bytes) -> list[pa.RecordBatch]:
    import pyarrow as pa

    with pa.ipc.open_stream(content) as reader:
        return list(reader)


def _made(runner: Runner) -> Callable[[], Any]:
    """Return what starts a task runner: on the cluster that the environment names, else on one of this machine."""
    address = os.environ.get(ADDRESS[runner]) or None
    try:
        if runner == "dask":
            from prefect_dask.task_runners import DaskTaskRunner

            own = {"n_workers": os.cpu_count() or 1, "threads_per_worker": 1, "dashboard_address": None}
            return lambda: DaskTaskRunner(address=address, cluster_kwargs=None if address else own)
        from prefect_ray.task_runners import RayTaskRunner

        return lambda: RayTaskRunner(address=address)
    except ImportError as error:
        raise ParameterError(
            f"the task runner {runner} is not installed: {error}",
            "runtime.runner",
            f"pip install -c .constraints.txt '.[{runner}]', or set runtime.runner to threads",
            "param.runner",
        ) from error
