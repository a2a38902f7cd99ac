"""Functions of one text: computed in chunks, side by side, and remembered by the hash of the text.

A noun gives the pure function, in Arrow and out of it; a step declares it (`Remembered`) and asks `per_text`. What is a
function of something else (of a pair of texts) is remembered by a name of that, with `per_name`. While a step builds,
`remembering` says where rows are kept; without it, and in a forced build, everything is computed, and what a forced
build finds remembered otherwise is replaced. The rows are the same in any case, so none of this enters a key.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tasks.store.parts import FOLDER, name_of, united

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import pyarrow as pa
    from numpy.typing import NDArray

    from tasks.remembered import Compute, Function, PerText
    from tasks.store.memo import Keys, Memo

    Places = NDArray[np.int64]
    ComputeAt = Callable[[Places], pa.RecordBatch]  # places, in order, each once -> their rows
    Making = Callable[[Places], Iterator[pa.RecordBatch]]

log = logging.getLogger("treeline.rows")
COLUMN_BYTES = 512 << 20  # of text looked up at a time, so that no offset of its rows outgrows 32 bits
WINDOW_ROWS, WINDOW_BYTES = 1 << 16, 64 << 20  # of rows remembered as one batch
CHUNK_ROWS, CHUNK_BYTES = 1 << 14, 1 << 23  # of text computed at a time: enough for a call to cost nothing
LEAST_ROWS = 1 << 10  # of a chunk that is made smaller so that every worker has one


@dataclass
class Tally:
    """Texts (or names) of one function, equal ones of a window counted once: asked = remembered + computed."""

    asked: int = 0
    remembered: int = 0
    computed: int = 0


class Mapper(Protocol):
    """Computes chunks, here or elsewhere, and yields the results in the order of the chunks."""

    def __call__(self, compute: Compute, chunks: Iterable[pa.StringArray]) -> Iterable[pa.RecordBatch]:
        """Map `compute` over chunks."""


@dataclass
class Desk:
    """Where a running step keeps the rows of its functions.

    Attributes:
        root: The store; None: nothing is remembered.
        workers: Threads that compute; 0: as many as there are cores.
        hold: Called with the name of each memo that is opened, so that nobody collects it meanwhile.
        fresh: Whether everything is computed; what is remembered is held against it, and mended.
        tallies: By name of the memo.
        agreed: Memos whose columns were found to be those of the function.
        latest: The texts asked about last, which several functions are asked about; nobody changes them in place.
    """

    root: Path | None = None
    workers: int = 0
    hold: Callable[[str], None] = lambda name: None
    fresh: bool = False
    tallies: dict[str, Tally] = field(default_factory=dict)
    memos: dict[str, Memo] = field(default_factory=dict)
    agreed: set[str] = field(default_factory=set)
    latest: tuple[pl.Series, list[tuple[pa.LargeStringArray, Keys]]] | None = None

    def keyed(self, texts: pl.Series) -> list[tuple[pa.LargeStringArray, Keys]]:
        """Return texts as columns of some size, with the keys of each; the same series is not hashed again."""
        if self.latest is None or self.latest[0] is not texts:
            self.latest = texts, list(_keyed(texts))
        return self.latest[1]

    def memo(self, function: Function) -> Memo | None:
        """Return the function's memo, opened once."""
        from tasks.store.memo import Memo

        if self.root is None:
            return None
        name = name_of(function.name, function.version, function.settings)
        if name not in self.memos:
            self.hold(f"{FOLDER}/{name}")
            self.memos[name] = Memo(self.root, function.name, function.version, function.settings)
        return self.memos[name]

    def tally(self, function: Function) -> Tally:
        """Return what is counted of a function."""
        name = name_of(function.name, function.version, function.settings)
        return self.tallies.setdefault(f"{FOLDER}/{name}", Tally())

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the tallies as JSON values."""
        return {name: asdict(tally) for name, tally in self.tallies.items()}

    def close(self) -> None:
        """Write what is not written yet."""
        for memo in self.memos.values():
            memo.close()


_desk: ContextVar[Desk] = ContextVar("treeline_desk")
_mapper: ContextVar[tuple[Mapper, int]] = ContextVar("treeline_mapper")


@contextmanager
def remembering(root: Path | None, workers: int, hold: Callable[[str], None], fresh: bool = False) -> Iterator[Desk]:
    """Keep rows in the store while the block runs; what was computed stays, even if the block fails."""
    desk = Desk(root, workers, hold, fresh)
    token = _desk.set(desk)
    try:
        yield desk
    finally:
        _desk.reset(token)
        desk.close()


@contextmanager
def mapping(mapper: Mapper, rows: int) -> Iterator[None]:
    """Let another executor compute the block's texts, so many at a time: it gets a function and Arrow arrays."""
    token = _mapper.set((mapper, rows))
    try:
        yield
    finally:
        _mapper.reset(token)


def is_remembering() -> bool:
    """Tell whether rows are kept, so that hashing pays."""
    desk = _desk.get(None)
    return desk is not None and desk.root is not None


def threads(workers: int) -> Mapper:
    """Return a mapper of threads; 0: as many as there are cores."""
    count = workers or _cores()

    def over(compute: Compute, chunks: Iterable[pa.StringArray]) -> Iterator[pa.RecordBatch]:
        if count == 1:
            yield from map(compute, chunks)
            return
        with ThreadPoolExecutor(count) as pool:
            yield from pool.map(compute, chunks)

    return over


def _cores() -> int:
    """Return the cores that this process may use, which may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def per_text(function: PerText, texts: pl.Series) -> pa.Table:
    """Return the rows of texts: row i is what the function gives for texts[i].

    Args:
        function: What is asked; texts that it has not seen are computed and remembered.
        texts: Strings, none of them null.
    """
    import pyarrow as pa

    if texts.null_count():
        raise ValueError(f"{function.name}: a text is null")
    desk = _desk.get(None) or Desk()
    batches = [_rows_of(function, column, keys, desk) for column, keys in desk.keyed(texts)]
    return pa.Table.from_batches(batches or [function.compute(pa.array([], pa.string()))])


def per_name(function: Function, names: NDArray[np.uint64], compute: ComputeAt) -> pa.RecordBatch:
    """Return the rows of what has names: row i is the function's for what names[i] names.

    Args:
        function: What is asked.
        names: (N, any) whatever tells apart what the function is of; not the places, which change with the data.
        compute: Gives the rows of places in `names`; it is called with none if there are none.
    """
    import numpy as np

    if not len(names):
        return compute(np.arange(0))
    desk = _desk.get(None) or Desk()
    edges = range(0, names.nbytes + 1, names.nbytes // len(names))
    keys = _hashed(memoryview(names.tobytes()), edges)

    def made(places: Places) -> Iterator[pa.RecordBatch]:
        yield _checked(function, compute(places), len(places))

    return _looked_up(function, keys, made, lambda: compute(np.arange(0)), desk)


def _keyed(texts: pl.Series) -> Iterator[tuple[pa.LargeStringArray, Keys]]:
    """Yield texts as Arrow columns of at most `COLUMN_BYTES`, with the keys of each."""
    import polars as pl
    import pyarrow as pa

    column = texts.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
    for first, last in _cuts(column, len(column), COLUMN_BYTES):
        yield column[first:last], keys_of(column[first:last])


def _rows_of(function: PerText, texts: pa.LargeStringArray, keys: Keys, desk: Desk) -> pa.RecordBatch:
    """Return the rows of a column of texts."""
    import pyarrow as pa

    def made(places: Places) -> Iterator[pa.RecordBatch]:
        asked = texts if len(places) == len(texts) else texts.take(pa.array(places))
        return united(_computed(function, asked, desk.workers), WINDOW_ROWS, WINDOW_BYTES)

    return _looked_up(function, keys, made, lambda: function.compute(pa.array([], pa.string())), desk)


def _looked_up(
    function: Function, keys: Keys, compute: Making, none: Callable[[], pa.RecordBatch], desk: Desk
) -> pa.RecordBatch:
    """Return the rows of keys: those known, and those computed now.

    Args:
        function: What is asked.
        keys: Of all that it is asked of.
        compute: Places -> their rows, in order, a batch at a time, each remembered as it comes.
        none: Gives the rows of nothing, which have the columns that any have.
        desk: Where rows are kept.
    """
    import numpy as np

    from tasks.store.memo import first_places

    first, which = first_places(keys)
    memo, tally = desk.memo(function), desk.tally(function)
    found, unread = _known(None if desk.fresh else memo, keys[first], function.least)
    if memo is not None and found and memo.name not in desk.agreed:
        schema = none().schema
        if any(rows.schema != schema for _, rows in found):
            log.warning("rows.schema: what is remembered of %s has other columns; raise its version", function.name)
            memo, found = None, []
        else:
            desk.agreed.add(memo.name)
    missing = np.ones(len(first), np.bool_)
    for places, _ in found:
        missing[places] = False
    new = np.ones(len(first), np.bool_)
    new[unread] = False
    unseen, done = np.flatnonzero(missing), 0
    for made in compute(first[unseen]) if len(unseen) else ():
        places = unseen[done : done + len(made)]
        if memo is not None:
            _remember(memo, keys[first[places]], made, new[places], desk.fresh)
        found.append((places, made))
        done += len(made)
    tally.asked, tally.computed = tally.asked + len(first), tally.computed + len(unseen)
    tally.remembered = tally.asked - tally.computed
    return _in_order(found, which)


def _remember(memo: Memo, keys: Keys, made: pa.RecordBatch, new: NDArray[np.bool_], fresh: bool) -> None:
    """Add new rows to a memo; fresh, hold what it knows against what was made, and trust it no more if any differ."""
    import pyarrow as pa

    for places, rows in _known(memo, keys)[0] if fresh else ():
        if not rows.equals(made.take(pa.array(places))):
            log.warning("store.memo: %s holds rows that its function does not give; they are made anew", memo.name)
            memo.forget()
            new[:] = True
            break
        new[places] = False
    memo.add(keys[new], made if new.all() else made.filter(pa.array(new)))


def _known(memo: Memo | None, keys: Keys, least: float = 0.0) -> tuple[list[tuple[Places, pa.RecordBatch]], list[int]]:
    """Return what is remembered of keys, and which are not worth reading; nothing, where the memo cannot be read."""
    import pyarrow as pa

    if memo is None:
        return [], []
    try:
        found = list(memo.find(keys, least))
    except (OSError, pa.ArrowException) as error:
        log.warning("store.memo: %s cannot be read: %s; its rows are computed again", memo.name, error)
        return [], []
    unread = [place for places, rows in found if rows is None for place in places.tolist()]
    return [(places, rows) for places, rows in found if rows is not None], unread


def _computed(function: PerText, texts: pa.LargeStringArray, workers: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of texts, a chunk at a time."""
    import pyarrow as pa

    fair = max(LEAST_ROWS, -(-len(texts) // (workers or _cores())))
    over, rows = _mapper.get((threads(workers), fair))
    cuts = list(_cuts(texts, min(rows, CHUNK_ROWS), CHUNK_BYTES))
    chunks = (texts[first:last].cast(pa.string()) for first, last in cuts)
    for (first, last), made in zip(cuts, over(function.compute, chunks), strict=True):
        yield _checked(function, made, last - first)


def _checked(function: Function, made: pa.RecordBatch, rows: int) -> pa.RecordBatch:
    if len(made) != rows:
        raise ValueError(f"{function.name} gave {len(made):,} rows for {rows:,}")
    return made


def _in_order(found: list[tuple[Places, pa.RecordBatch]], which: Places) -> pa.RecordBatch:
    """Put rows of distinct texts where these are asked for."""
    import numpy as np
    import pyarrow as pa

    together = found[0][1] if len(found) == 1 else pa.concat_batches([batch for _, batch in found])
    place = np.empty(together.num_rows, np.int64)
    place[np.concatenate([places for places, _ in found])] = np.arange(together.num_rows)
    wanted = place[which]
    return together if np.array_equal(wanted, np.arange(together.num_rows)) else together.take(pa.array(wanted))


def keys_of(texts: pa.LargeStringArray) -> Keys:
    """Return the first 16 bytes of the sha256 of each text's UTF-8: (N, 2) uint64."""
    return _hashed(memoryview(texts.buffers()[2] or b""), _offsets(texts).tolist())


def _hashed(content: memoryview, edges: Iterable[int]) -> Keys:
    """Return the first 16 bytes of the sha256 of what stands between edges: (N, 2) uint64."""
    import numpy as np

    hashed = (hashlib.sha256(content[start:end]).digest()[:16] for start, end in pairwise(edges))
    return np.frombuffer(b"".join(hashed), np.uint64).reshape(-1, 2)


def _offsets(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """Return where each text starts in the buffer of bytes, and where the last one ends."""
    import numpy as np

    if not len(texts):
        return np.zeros(1, np.int64)
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _cuts(texts: pa.LargeStringArray, rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut texts into ranges of at most so many rows and, beyond the first row of each, so many bytes."""
    import numpy as np

    offsets, first = _offsets(texts), 0
    while first < len(texts):
        last = int(np.searchsorted(offsets, offsets[first] + size, side="right")) - 1
        last = min(max(last, first + 1), first + rows, len(texts))
        yield first, last
        first = last
