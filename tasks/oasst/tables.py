"""Tables that grow in memory and are written to Parquet by row groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import msgpack
from msgspec.structs import astuple

from tasks.oasst import timestamps
from tasks.oasst.fast_reader import NO_SCORES, NO_VOTES, Arranged, Message, Rest, Votes
from tasks.oasst.strict_reader import DEPTH

PIECE = 500  # rows held as Python objects: these take several times the memory of arrays, and no cache holds more


class Table(ABC):
    """A Parquet file that is written by row groups.

    Attributes:
        rows: Rows added so far.
    """

    def __init__(self, writer: pq.ParquetWriter, group: int) -> None:
        """Write with `writer`, which knows the schema, row groups of `group` rows."""
        self._writer, self._group = writer, group
        self._schema, self._kinds = writer.schema, writer.schema.types  # asked for once: each answer is made anew
        self._pieces: list[pa.Table] = []
        self._held = 0  # rows of the pieces
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the table; after an error, write no more of it."""
        if error is None:
            self.close()
        else:
            self._writer.__exit__(kind, error, trace)

    def close(self) -> None:
        """Write what waits, and the end of the file; a second call does nothing."""
        if self._writer.is_open:
            self._turn()
            if self._held:
                self._flush()
            self._writer.close()

    @abstractmethod
    def _turn(self) -> None:
        """Turn the rows that wait into a piece."""

    def _hold(self, columns: Iterable[Sequence[Any] | pa.Array]) -> None:
        """Hold a piece, and write a row group if there is one."""
        made = [_array(values, kind) for values, kind in zip(columns, self._kinds, strict=True)]
        self._pieces.append(pa.Table.from_arrays(made, schema=self._schema))
        self._held += len(made[0])
        while self._held >= self._group:
            self._flush()

    def _flush(self) -> None:
        """Write a row group, in one piece: pages end where pieces do, and the same rows shall give the same bytes."""
        held = pa.concat_tables(self._pieces)
        self._writer.write_table(held.slice(0, self._group).combine_chunks())
        self._pieces = [held.slice(self._group)]
        self._held = len(self._pieces[0])


class MessageTable(Table):
    """A table of messages, added tree by tree."""

    def __init__(self, writer: pq.ParquetWriter, group: int) -> None:
        super().__init__(writer, group)
        self._waiting = Arranged([], [], [], {})

    def add(self, tree: Arranged) -> None:
        """Add a tree's messages."""
        self.rows += tree.size
        for part in tree.parts(PIECE):
            self._waiting.append(part)
            if self._waiting.size >= PIECE:
                self._turn()

    def _turn(self) -> None:
        if self._waiting.messages:
            self._hold(columns(self._waiting))
            self._waiting = Arranged([], [], [], {})


class RowTable(Table):
    """A table added row by row."""

    def __init__(self, writer: pq.ParquetWriter, group: int) -> None:
        super().__init__(writer, group)
        self._waiting: list[Sequence[Any]] = []

    def add(self, row: Sequence[Any]) -> None:
        """Add a row, in the order of the columns."""
        self._waiting.append(row)
        self.rows += 1
        if len(self._waiting) >= PIECE:
            self._turn()

    def _turn(self) -> None:
        if self._waiting:
            self._hold(zip(*self._waiting, strict=True))
            self._waiting = []


def columns(found: Arranged) -> list[Sequence[Any] | pa.Array]:
    """Return the columns of a table of messages, in order: (M,) each."""
    own = list(zip(*map(astuple, found.messages), strict=True))
    emojis, labels, detoxify = own[_EMOJIS : _EMOJIS + 3]
    means, counts = _votes([votes or NO_VOTES for votes in labels])
    scores = np.fromiter(chain.from_iterable([astuple(one or NO_SCORES) for one in detoxify]), np.float32)
    rest: list[list[str | None]] = [[None] * len(labels) for _ in Rest._fields]
    for place, kept in found.rest.items():
        for column, value in zip(rest, kept, strict=True):
            column[place] = value
    return [
        *own[:DEPTH], np.array(found.depths, np.int32), np.array(found.siblings, np.int32),
        *own[DEPTH:_CREATED], timestamps.column(own[_CREATED]), *own[_CREATED + 1 : _EMOJIS], _maps(emojis),
        *_nullable(means), *_nullable(counts), *_nullable(scores.reshape(len(labels), -1).T), *rest,
    ]  # fmt: skip


def _maps(emojis: Sequence[dict[str, int] | None]) -> pa.Array:
    """Return a column of maps, made of its parts: three times as fast as from lists of pairs."""
    ends = list(accumulate([len(one) if one else 0 for one in emojis], initial=0))
    starts = [end if one is not None else None for end, one in zip(ends, emojis, strict=False)]
    given = [one for one in emojis if one]
    keys = pa.array(list(chain.from_iterable(given)), pa.string())
    counts = pa.array(list(chain.from_iterable(map(dict.values, given))), pa.int32())
    return pa.MapArray.from_arrays(pa.array([*starts, ends[-1]], pa.int32()), keys, counts)


_CREATED, _EMOJIS = (Message.__struct_fields__.index(name) for name in ("created_date", "emojis"))
_LABELS = Votes.__struct_fields__
_pack = msgpack.Encoder().encode
# `Votes` in MessagePack while no count is over 127: each label is a name, an object's head and two named numbers.
_PACKED_VOTE = np.dtype([("head", "V8"), ("value", ">f8"), ("name", "V6"), ("count", "i1")])
_PACKED = np.dtype(
    [("head", "V1")]
    + [part for label in _LABELS for part in ((f"{label}:", f"V{1 + len(label)}"), (label, _PACKED_VOTE))]
)


def _votes(labels: list[Votes]) -> tuple[np.ndarray, np.ndarray]:
    """Return means (labels, M) float32 and counts (labels, M) int32.

    Packed, all `Votes` have one length while no count is over 127, and numpy can look at them as one table: five
    times as fast as to ask each object.
    """
    packed = _pack(labels)
    head = 1 if len(labels) < 16 else 3 if len(labels) < 65_536 else 5  # bytes that say how long the list is
    if len(packed) == head + len(labels) * _PACKED.itemsize:
        table = np.frombuffer(packed, _PACKED, offset=head)
        means = np.array([table[label]["value"] for label in _LABELS], np.float32)
        return means, np.array([table[label]["count"] for label in _LABELS], np.int32)
    votes = [vote for one in labels for vote in astuple(one)]
    means = np.array([vote.value for vote in votes], np.float32).reshape(len(labels), -1).T
    return means, np.array([vote.count for vote in votes], np.int32).reshape(len(labels), -1).T


def _nullable(table: np.ndarray) -> list[pa.Array]:
    """Return the rows of a table of numbers as columns; what is MISSING becomes null. Faster than from lists."""
    table = np.ascontiguousarray(table)
    return [pa.array(column, mask=missing) for column, missing in zip(table, table < 0, strict=True)]


def _array(values: Sequence[Any] | pa.Array, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    return pa.array(values, kind)
