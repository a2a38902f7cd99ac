"""Remembering: the rows that a pure function gave for texts, by a hash of each text.

Nothing depends on it: a row that is not there is computed, and two that are there for one key are equal. So no lock is
needed, parts may be written and merged by several processes at once, and one that is broken is moved aside.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.store.canonical import canonical, sha256_file
from tasks.store.disk import mark, sync, write_whole
from tasks.store.integrity import identity, recall, remember_files
from tasks.store.parts import ABOUT, FOLDER, described, fault, memory_of, name_of, parts, united
from tasks.store.store import SHORT

log = logging.getLogger("treeline.store")
KEY = "key"  # the column of keys in a part
KEY_BYTES = 16  # of a hash: two of 10^9 texts share one with a chance of 10^-21
PART_BYTES = 32 << 20  # of rows that wait in memory to become a part
BATCH_ROWS, BATCH_BYTES = 1 << 16, 32 << 20  # of small batches that a merge unites
MOST = 32  # small parts of a memo, each an open file; more are merged
KEPT = 8  # of all, the largest, which a merge leaves alone: most rows are not copied again and again
FULL = 256  # parts in all, until then those of PART_BYTES are left alone, too: one run may write a hundred

Keys = NDArray[np.uint64]  # (N, 2): the two halves of each key
Places = NDArray[np.int64]


@dataclass(frozen=True)
class _Rows:
    """Some remembered rows: a batch of a part, or one that is not written yet.

    Attributes:
        high: (n,) first halves of the keys, sorted.
        low: (n,) second halves, in the same order.
        row: (n,) row of each key in the batch.
        read: Gives the batch.
    """

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    row: Places
    read: Callable[[], pa.RecordBatch]

    def find(self, keys: Keys) -> Places:
        """Return the row of each key, -1 where it has none."""
        found = np.full(len(keys), -1, np.int64)
        at = np.searchsorted(self.high, keys[:, 0])
        open_ = np.flatnonzero(at < len(self.high))
        while len(open_):  # once, but for keys whose first halves are equal
            open_ = open_[self.high[at[open_]] == keys[open_, 0]]
            hit = self.low[at[open_]] == keys[open_, 1]
            found[open_[hit]] = self.row[at[open_[hit]]]
            open_ = open_[~hit]
            at[open_] += 1
            open_ = open_[at[open_] < len(self.high)]
        return found


def _rows(keys: Keys, read: Callable[[], pa.RecordBatch]) -> _Rows:
    order = np.argsort(keys[:, 0], kind="stable")
    return _Rows(keys[order, 0], keys[order, 1], order, read)


class Memo:
    """The rows of one function that are remembered, those of this run among them.

    Raises, in any method that reads:
        OSError, pa.ArrowException: If a part cannot be read; whoever asks computes instead.
    """

    def __init__(self, root: Path, function: str, version: int, settings: Mapping[str, Any]) -> None:
        self.root, self.name = root, name_of(function, version, settings)
        self.folder = root / FOLDER / self.name
        self._new: list[tuple[Keys, pa.RecordBatch]] = []
        self._parts: dict[str, list[_Rows]] = {}
        self._writable = True
        about = self.folder / ABOUT
        with suppress(OSError):
            if not about.exists():
                write_whole(about, canonical(described(function, version, settings)))
            os.utime(about)
        self._open_all()

    def find(self, keys: Keys, least: float = 0.0) -> Iterator[tuple[Places, pa.RecordBatch | None]]:
        """Yield what is known of some keys: which of them, and their rows in that order.

        Args:
            keys: Of what is asked.
            least: Share of the rows of a batch that makes it worth reading; of one with fewer, None is yielded.
        """
        open_ = np.argsort(keys[:, 0])  # neighbours are looked for in one place: a third of the time
        waiting = [_rows(one, partial(_given, batch)) for one, batch in self._new]
        for rows in (*waiting, *(rows for part in self._parts.values() for rows in part)):
            if not len(open_):
                return
            found = rows.find(keys[open_])
            hit = found >= 0
            if hit.any():
                order = np.argsort(open_[hit])
                places, at = open_[hit][order], found[hit][order]
                yield places, taken(rows.read(), at) if len(at) >= least * len(rows.row) else None
                open_ = open_[~hit]

    def add(self, keys: Keys, rows: pa.RecordBatch) -> None:
        """Remember the rows of keys that were not known; they are on the disk after `close`, or once they are many."""
        if self._writable and len(keys):
            self._new.append((keys, rows))
            if sum(batch.nbytes for _, batch in self._new) >= PART_BYTES:
                self._flush()

    def forget(self) -> None:
        """Move all that is on the disk aside: some of it is not what the function gives."""
        for name in self._parts:
            self._set_aside(self.folder / name, "is not what its function gives")
        self._parts = {}
        self._note()

    def close(self) -> None:
        """Write what is not written, and merge small parts where there are too many."""
        self._flush()
        if self._writable and (small := self._small()):
            self._attempt(lambda: self._merge(small))

    def _flush(self) -> None:
        if self._new:
            self._attempt(lambda: self._publish(_keyed(keys, batch) for keys, batch in self._new))
            self._new = []

    def _attempt(self, write: Callable[[], object]) -> None:
        """Write; where that fails say so once, and remember no more: the run needs none of it."""
        try:
            write()
        except (OSError, pa.ArrowException) as error:
            self._writable = False
            log.warning("store.memo: %s cannot be written: %s; what it would hold is computed again", self.name, error)

    def _publish(self, batches: Iterator[pa.RecordBatch]) -> str:
        """Write a part: to the disk first, then under its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f".{mark()}.part"
        try:
            first = next(batches)
            with pa.OSFile(str(unfinished), "w") as file:
                writer = pa.ipc.new_file(file, first.schema)
                writer.write_batch(first)
                for batch in batches:
                    writer.write_batch(batch)
                writer.close()  # not after an error, which it would hide by one of its own
            sync(unfinished)
            path = self.folder / f"{sha256_file(unfinished)}.arrow"
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        sync(self.folder)
        self._parts[path.name] = _opened(path)
        self._note()
        return path.name

    def _small(self) -> list[str]:
        """Name the parts to merge; none, while they are few."""
        with suppress(OSError):  # another process merges them just now
            sizes = {name: (self.folder / name).stat().st_size for name in self._parts}
            found = sorted(sizes, key=sizes.__getitem__)[: max(len(sizes) - KEPT, 0)]
            if len(sizes) <= FULL:
                found = [name for name in found if sizes[name] < PART_BYTES]
            return found if len(found) > MOST - KEPT else []
        return []

    def _merge(self, small: list[str]) -> None:
        """Copy the rows of some parts into one, each key once; then these may go."""
        rows = _once([rows for name in small for rows in self._parts[name]])
        made = self._publish(united(rows, BATCH_ROWS, BATCH_BYTES))
        for name in small:
            if name != made:
                del self._parts[name]  # a process that reads it has it open
                (self.folder / name).unlink(missing_ok=True)
        self._note()

    def _open_all(self) -> None:
        """Open every part that is what its name says; move the others aside, and say so."""
        known = recall(self._memory)
        for path in parts(self.folder):
            what = fault(path, known.get(path.name, ("", []))[1])
            if what is None:
                try:
                    self._parts[path.name] = _opened(path)
                except (OSError, KeyError, pa.ArrowException) as error:
                    what = f"cannot be read: {error}"
            if what is not None:
                self._set_aside(path, what)
        self._note()

    def _set_aside(self, path: Path, what: str) -> None:
        log.warning("store.memo: part %s of %s %s; its rows are computed again", path.name[:SHORT], self.name, what)
        place = self.root / ".aside" / f"memo-{self.name}-{path.name[:SHORT]}.{mark()}"
        with suppress(OSError):  # gone meanwhile, or a store that cannot be written
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)

    @property
    def _memory(self) -> Path:
        return memory_of(self.root, self.name)

    def _note(self) -> None:
        with suppress(OSError):
            seen = {name: (name.removesuffix(".arrow"), identity(self.folder / name)) for name in self._parts}
            remember_files(self._memory, seen)


def _opened(path: Path) -> list[_Rows]:
    """Index the batches of a part, of which only the keys are read.

    It stays open: one that is merged away meanwhile can still be read.
    """
    file = pa.OSFile(str(path), "r")  # read, not mapped: a file cut under a map kills the process
    whole = pa.ipc.open_file(file)
    only = pa.ipc.IpcReadOptions(included_fields=[whole.schema.get_field_index(KEY)])
    keys = pa.ipc.open_file(file, options=only)
    numbers = range(whole.num_record_batches)
    return [_rows(_keys_in(keys.get_batch(number)), partial(_read, whole, number)) for number in numbers]


def _read(reader: Any, number: int) -> pa.RecordBatch:
    return reader.get_batch(number).drop_columns([KEY])


def _given(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch


def _keys_in(batch: pa.RecordBatch) -> Keys:
    column = batch.column(KEY)
    width = KEY_BYTES * column.offset
    content = np.frombuffer(column.buffers()[1], np.uint64, 2 * len(column), width)
    return content.reshape(-1, 2)


def _keyed(keys: Keys, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Put keys before their rows."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(keys))]
    column = pa.Array.from_buffers(pa.binary(KEY_BYTES), len(keys), buffers)
    schema = pa.schema([pa.field(KEY, column.type), *batch.schema])
    return pa.RecordBatch.from_arrays([column, *batch.columns], schema=schema)


def _once(remembered: Sequence[_Rows]) -> Iterator[pa.RecordBatch]:
    """Yield batches with their keys, leaving out the keys that an earlier one has."""
    sizes = [len(rows.row) for rows in remembered]
    keys = np.empty((sum(sizes), 2), np.uint64)
    ends = np.cumsum(sizes)
    for end, rows in zip(ends, remembered, strict=True):
        here = keys[end - len(rows.row) : end]
        here[rows.row, 0], here[rows.row, 1] = rows.high, rows.low
    first = first_places(keys)[0]
    for end, size, rows in zip(ends, sizes, remembered, strict=True):
        mine = first[np.searchsorted(first, end - size) : np.searchsorted(first, end)]
        if len(mine):
            yield _keyed(keys[mine], taken(rows.read(), mine - (end - size)))


def taken(rows: pa.RecordBatch, places: Places) -> pa.RecordBatch:
    """Return some rows; those that stand in a row, as when data comes again in its order, without copying them."""
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places) and bool((np.diff(places) == 1).all()):
        return rows.slice(first, len(places))
    return rows.take(pa.array(places))


def first_places(keys: Keys) -> tuple[Places, Places]:
    """Find equal keys.

    Returns:
        Where each distinct key stands first, in that order; and (N,) which of the distinct keys each one is.
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: among equal ones the first stands first
    ordered = keys[order]
    new = np.ones(len(keys), np.bool_)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[new]
    by_place = np.argsort(first)
    number = np.empty(len(first), np.int64)
    number[by_place] = np.arange(len(first))
    which = np.empty(len(keys), np.int64)
    which[order] = number[np.cumsum(new) - 1]
    return first[by_place], which
