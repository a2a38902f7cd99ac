"""What the encode step wrote, as its readers will see it, in chunks that caches hold.

Shapes: S sequences of T tokens; a chunk flattens some sequences to N tokens, and holds M messages of the index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.errors import GateError
from tasks.text.assemble import ranges

Ints = NDArray[np.int64]
CHUNK = 256  # sequences read at a time: 2 MB an array at a block of 1,024, which caches hold
DO = "Nothing was published. This is a fault of the encode step or of its input"


@dataclass(frozen=True)
class Stored:
    """An array on disk. What is read of it does not stay in memory, as pages of a map would."""

    array: Any  # an np.memmap

    @property
    def shape(self) -> tuple[int, int]:
        """S and T."""
        count, block = self.array.shape
        return count, block

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """Read some sequences."""
        first, last, _ = rows.indices(len(self.array))
        dtype, (_, block) = self.array.dtype, self.array.shape
        offset = self.array.offset + first * block * dtype.itemsize
        found = np.fromfile(str(self.array.filename), dtype, (last - first) * block, offset=offset)
        return found.reshape(last - first, block)


@dataclass(frozen=True)
class Written:
    """What the encode step wrote, as its readers will see it; the four are arrays, or `Stored`.

    Attributes:
        ids: (S, T) token ids.
        mask: (S, T) 1 where the token is a target of the loss.
        positions: (S, T) position in the conversation.
        ends: (S, T) token q sees token k when k <= q < ends[k].
        index: Token ranges of messages, by sequence and start.
        splits: Sequences of each split: (first, one past the last).
        once: Whether each reply is to be trained exactly once, wherever else it stands as context.
    """

    ids: Any
    mask: Any
    positions: Any
    ends: Any
    index: pl.DataFrame
    splits: Mapping[str, tuple[int, int]]
    once: bool = False


@dataclass(frozen=True)
class Chunk:
    """Some sequences, flattened, with the messages in them; tokens and messages are numbered within the chunk.

    Attributes:
        ids: (N,) token ids; `mask`, `positions` and `ends` likewise, all of them as they lie on disk.
        block: T.
        index: The rows of the index, M of them.
        row: (M,) which row of the input each message is.
        start: (M,) first token of each message; `stop` one past its last.
        parent: (M,) message that holds the parent's tokens, -1 at a root, -2 for one of an earlier chunk.
    """

    ids: NDArray[Any]
    mask: NDArray[Any]
    positions: NDArray[Any]
    ends: NDArray[Any]
    block: int
    index: pl.DataFrame
    row: Ints
    start: Ints
    stop: Ints
    parent: Ints

    @cached_property
    def names(self) -> list[str]:
        """Id of each message."""
        return self.index["message_id"].to_list()

    @cached_property
    def tokens(self) -> Ints:
        """(n,) tokens that belong to messages, in order."""
        return ranges(self.start, self.stop)

    @cached_property
    def targets(self) -> Ints:
        """(M,) tokens of each message that are targets of the loss."""
        return self.summed(self.mask)

    def summed(self, values: NDArray[Any]) -> Ints:
        """Return the sum of the values (N,) of each message's tokens: (M,)."""
        sums = np.cumsum(values, dtype=np.int64)
        summed: Ints = sums[self.stop - 1] - sums[self.start] + values[self.start]
        return summed

    @cached_property
    def replies(self) -> NDArray[np.bool_]:
        """(M,) whether a message is an assistant's."""
        return (self.index["role"] == "assistant").to_numpy()

    @cached_property
    def taught(self) -> NDArray[np.bool_]:
        """(M,) whether a message is an assistant's, and trained here: not context of what is."""
        taught: NDArray[np.bool_] = self.replies & (self.index["trained"] > 0).to_numpy()
        return taught

    @cached_property
    def leaves(self) -> NDArray[np.bool_]:
        """(M,) whether no message of the sequence goes on from this one."""
        leaves = np.ones(len(self.start), np.bool_)
        leaves[self.parent[self.parent >= 0]] = False
        return leaves

    def named(self, token: int) -> str:
        """Name the message of a token, or the last one before it, if it is padding."""
        place = int(np.searchsorted(self.start, token, side="right")) - 1
        return self.names[max(place, 0)] if self.names else "none"


def fail(code: str, message: str, what: str) -> NoReturn:
    """Refuse what was written: at which message, and why."""
    raise GateError(what, f"message {message}", DO, f"gate.{code}")


def chunks(written: Written, row: Ints) -> Iterator[Chunk]:
    """Yield the sequences in chunks, each with its rows of the index."""
    count, block = written.ids.shape
    sequence = written.index["sequence"].to_numpy()
    if len(sequence) and (np.any(np.diff(sequence) < 0) or sequence[0] < 0 or sequence[-1] >= count):
        raise GateError(f"the index is not sorted by sequence, 0 to {count - 1}", "", DO, "gate.index")
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        low, high = np.searchsorted(sequence, [first, last])
        index = written.index[int(low) : int(high)]
        base = (index["sequence"].to_numpy().astype(np.int64) - first) * block
        start, stop = (base + index[name].to_numpy() for name in ("start", "stop"))
        parent = (index["parent"] - int(low)).clip(lower_bound=-2).fill_null(-1).to_numpy()
        yield Chunk(
            ids=written.ids[first:last].reshape(-1),
            mask=written.mask[first:last].reshape(-1),
            positions=written.positions[first:last].reshape(-1),
            ends=written.ends[first:last].reshape(-1),
            block=block,
            index=index,
            row=row[int(low) : int(high)],
            start=start,
            stop=stop,
            parent=parent,
        )
