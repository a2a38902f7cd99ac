"""Trees that lie in Arrow already, because they are remembered: taken as they are, without an object a message."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Self

import pyarrow as pa


class Laid(NamedTuple):
    """Trees that lie one after another among the rows of messages.

    Attributes:
        rows: Structs of the table's columns; those from `first` to before `last` are meant.
        first: Of them.
        last: One past them.
        ids: Id of each message.
    """

    rows: pa.StructArray
    first: int
    last: int
    ids: list[str]

    @property
    def size(self) -> int:
        """M, their messages."""
        return self.last - self.first

    def followed_by(self, other: Self) -> Laid | None:
        """Return both, where the other begins where this ends; the ids are not needed any more."""
        together = self.rows is other.rows and self.last == other.first
        return Laid(self.rows, self.first, other.last, []) if together else None

    def columns(self) -> list[pa.Array]:
        """Return the columns of the messages."""
        found: list[pa.Array] = self.rows.slice(self.first, self.size).flatten()
        return found


def trees_in(lines: pa.ListArray) -> list[tuple[str, Laid] | None]:
    """Return id and messages of the tree of each line; None where it is null.

    Args:
        lines: (N,) lists of structs, message_id and message_tree_id among them; none is empty.
    """
    ends = lines.offsets.to_pylist()
    begin = ends[0]
    rows = lines.values.slice(begin, ends[-1] - begin)
    ids, names = (rows.field(name).to_pylist() for name in ("message_id", "message_tree_id"))
    return [
        (names[first], Laid(rows, first, last, ids[first:last])) if last > first else None
        for first, last in pairwise(end - begin for end in ends)
    ]
