"""A finished table of messages, read back and put in another order: for trees that came more than once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import msgpack

from tasks.oasst.merge import Placed, Row

Move = tuple[range, Sequence[Placed]]  # rows of a version -> what stands there instead
UNTOLD = {"depth", "sibling", "extra"}  # columns that are no part of what a message says; `extra` is looked at alone


def told(path: Path, spans: Sequence[range]) -> Iterator[list[Row]]:
    """Read what some spans of rows say, span by span; they are in order and do not overlap."""
    wanted = _flat(spans)
    rows = _rows(path, wanted)
    for span in spans:
        yield [next(rows) for _ in span]


def _rows(path: Path, wanted: np.ndarray) -> Iterator[Row]:
    encode = msgpack.Encoder().encode
    for first, table in _taken(path, wanted):
        found = table.drop_columns([name for name in table.column_names if name in UNTOLD])
        ids = [table[name].to_pylist() for name in ("message_tree_id", "message_id", "parent_id")]
        said = zip(*(column.to_pylist() for column in found.columns), strict=True)
        rows = wanted[first : first + len(table)].tolist()
        extras = [None if extra is None else _digest(extra.encode()) for extra in table["extra"].to_pylist()]
        for row, values, extra, tree_id, message_id, parent_id in zip(rows, said, extras, *ids, strict=True):
            yield Row(row, tree_id, message_id, parent_id, _digest(encode(values)), extra)


def _digest(said: bytes) -> bytes:
    return hashlib.sha256(said).digest()[:16]


def rearrange(path: Path, moves: Sequence[Move], writer: Callable[[Path], pq.ParquetWriter], group: int) -> None:
    """Write a table again, with other rows where some spans were; all else stays in order.

    Args:
        path: The table.
        moves: The spans, in order.
        writer: Opens a file for it.
        group: Rows of a row group.
    """
    new = path.with_suffix(".new")
    order, places = _order(moves, pq.read_metadata(path).num_rows)
    strays = np.unique(order[order < np.maximum.accumulate(order)])  # rows that stand behind a later one
    aside = [table for _, table in _taken(path, strays)]
    with writer(new) as made:
        for start in range(0, len(order), group):
            made.write_table(_gathered(path, order[start : start + group], strays, aside, places))
    new.replace(path)


def _order(moves: Sequence[Move], total: int) -> tuple[np.ndarray, dict[int, Placed]]:
    """Return the rows in their new order, and the new places of those that were moved."""
    parts, end = list[np.ndarray](), 0
    for span, instead in moves:
        parts += [np.arange(end, span.start), np.array([placed.row for placed in instead], np.int64)]
        end = span.stop
    places = {placed.row: placed for _, instead in moves for placed in instead}
    return np.concatenate([*parts, np.arange(end, total)]), places


def _gathered(
    path: Path, rows: np.ndarray, strays: np.ndarray, aside: list[pa.Table], places: dict[int, Placed]
) -> pa.Table:
    """Return some rows, in this order; strays come from `aside`."""
    near = np.sort(np.setdiff1d(rows, strays))
    tables = [*aside, *(table for _, table in _taken(path, near))]
    found = np.concatenate([strays, near])
    sorter = np.argsort(found)
    table = pa.concat_tables(tables).take(sorter[np.searchsorted(found, rows, sorter=sorter)])
    for name in ("depth", "sibling"):
        values = table[name].to_numpy().copy()
        for at, row in enumerate(rows.tolist()):
            if row in places:
                values[at] = getattr(places[row], name)
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(values))
    return table.combine_chunks()


def _taken(path: Path, wanted: np.ndarray) -> Iterator[tuple[int, pa.Table]]:
    """Yield the wanted rows, in order, a row group at a time; before each, how many came before."""
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            low, high = np.searchsorted(wanted, [first, end])
            if low < high:
                yield int(low), file.read_row_group(group, use_threads=False).take(wanted[low:high] - first)
            first = end


def _flat(spans: Sequence[range]) -> np.ndarray:
    return np.concatenate([np.arange(span.start, span.stop) for span in spans] or [np.arange(0)])
