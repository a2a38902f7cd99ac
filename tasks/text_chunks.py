"""Per-text work: chunks of texts -> chunks of rows, over threads here or the workers of a cluster.

The function is pure and sees one text at a time, so the rows are the same bytes wherever and however they are computed,
and nothing of this enters a key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    # N texts -> N rows in the same order, whatever else is in the chunk; 0 texts -> 0 rows. It can be pickled: a
    # function of a module, or a `functools.partial` of one.
    ChunkFunction = Callable[[pa.StringArray], pa.RecordBatch]
    TextFunction = Callable[[pl.Series], pa.Table]  # the same of any number of texts: `map_texts`, bound to a function

CHUNK_ROWS, CHUNK_BYTES = 1 << 14, 1 << 23  # most texts of a chunk: enough for a call to cost nothing
MIN_CHUNK_ROWS = 1 << 10  # of a chunk that is made smaller so that every worker has one


class Executor(Protocol):
    """Computes chunks, here or elsewhere, and yields the results in the order of the chunks."""

    def __call__(self, function: ChunkFunction, chunks: Iterable[pa.StringArray]) -> Iterable[pa.RecordBatch]:
        """Map `function` over chunks."""


_executor: ContextVar[tuple[Executor, int]] = ContextVar("treeline_text_executor")


@contextmanager
def text_executor(executor: Executor, chunk_rows: int) -> Iterator[None]:
    """Let another executor than threads compute the block's texts, at most `chunk_rows` at a time."""
    token = _executor.set((executor, chunk_rows))
    try:
        yield
    finally:
        _executor.reset(token)


def map_texts(texts: pl.Series, function: ChunkFunction, workers: int = 0) -> pa.Table:
    """Return the rows of texts: row i is what the function gives for texts[i].

    Args:
        texts: N strings, none of them null.
        function: Gives the rows of a chunk.
        workers: Threads that compute, unless `text_executor` says otherwise; 0: one a core.

    Returns:
        N rows, a record batch a chunk.

    Raises:
        ValueError: If a text is null, or the function gives another number of rows than it was given texts.
    """
    import polars as pl
    import pyarrow as pa

    if texts.null_count():
        raise ValueError(f"text {int(texts.is_null().arg_max() or 0):,} of {len(texts):,} is null")
    workers = workers or _cores()
    executor, chunk_rows = _executor.get((_threads(workers), max(MIN_CHUNK_ROWS, -(-len(texts) // workers))))
    column = texts.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
    ranges = list(_ranges(column, min(chunk_rows, CHUNK_ROWS)))
    chunks = (column[start:stop].cast(pa.string()) for start, stop in ranges)
    batches = []
    for (start, stop), batch in zip(ranges, executor(function, chunks), strict=True):
        if len(batch) != stop - start:
            raise ValueError(f"{function} gave {len(batch):,} rows for {stop - start:,} texts")
        batches.append(batch)
    return pa.Table.from_batches(batches or [function(pa.array([], pa.string()))])


def _threads(workers: int) -> Executor:
    def execute(function: ChunkFunction, chunks: Iterable[pa.StringArray]) -> Iterator[pa.RecordBatch]:
        if workers == 1:
            yield from map(function, chunks)
            return
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(function, chunks)

    return execute


def _cores() -> int:
    """Return the cores that this process may use, which may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ranges(texts: pa.LargeStringArray, most_rows: int) -> Iterator[tuple[int, int]]:
    """Cut texts into ranges of at most so many rows and, beyond the first row of each, `CHUNK_BYTES`."""
    import numpy as np

    if not len(texts):
        return
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    start = 0
    while start < len(texts):
        stop = int(np.searchsorted(offsets, offsets[start] + CHUNK_BYTES, side="right")) - 1
        stop = min(max(stop, start + 1), start + most_rows, len(texts))
        yield start, stop
        start = stop
