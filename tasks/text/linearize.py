"""Layouts: which paths of the trees become conversations, and where a long one is cut.

A conversation is a tuple of row numbers, a prompt first, each row the parent of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.errors import InputError

Conversation = tuple[int, ...]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
LINKS = ("message_tree_id", "message_id", "parent_id", "rank", "sibling")  # what makes rows a forest


@dataclass(frozen=True)
class Forest:
    """Trees of messages, by row number.

    Attributes:
        parents: Row of each message's parent, -1 at a root.
        children: Rows of each message's replies, in the order of the data.
        places: (rows,) what sorts siblings, best first: ranked before unranked, then by rank, then as published.
    """

    parents: list[int]
    children: list[Sequence[int]]
    places: Ints

    @property
    def roots(self) -> list[int]:
        """Rows without a parent."""
        return [row for row, parent in enumerate(self.parents) if parent < 0]

    def best(self, row: int) -> int:
        """Return the best child of a row that has one."""
        return min(self.children[row], key=self.places.__getitem__)

    def path(self, row: int) -> Conversation:
        """Return the rows from the root to this one."""
        rows = [row]
        while (row := self.parents[row]) >= 0:
            rows.append(row)
        return tuple(reversed(rows))


def forest(rows: pl.DataFrame) -> Forest:
    """Link rows to trees by message id; parents stand before their children.

    Args:
        rows: The columns `LINKS`.

    Raises:
        InputError: If a parent is not in the data.
    """
    parents = _parents(rows)
    ranks, siblings = rows["rank"], rows["sibling"].to_numpy()
    order = np.lexsort((siblings, ranks.fill_null(0).to_numpy(), ranks.is_null().to_numpy()))
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return Forest(parents.tolist(), _children(parents), places)


def _parents(rows: pl.DataFrame) -> Ints:
    """Return the row of each message's parent, -1 at a root."""
    tree, above = "message_tree_id", pl.col("above")
    named = rows.select(tree, parent_id="message_id").with_row_index("above").unique([tree, "parent_id"], keep="first")
    found = rows.select(tree, "parent_id").join(named, on=[tree, "parent_id"], how="left", maintain_order="left")
    found = found.with_row_index("row")
    astray = found.filter(pl.col("parent_id").is_not_null() & (above.is_null() | (above >= pl.col("row"))))
    for row in astray.head(1).iter_rows(named=True):
        what = f"message {rows['message_id'][row['row']]} answers {row['parent_id']}, which does not stand before it"
        raise InputError(what, f"tree {row[tree]}", "Curate the data again; parents come first", "encode.orphan")
    return found["above"].cast(pl.Int64).fill_null(-1).to_numpy()


def _children(parents: Ints) -> list[Sequence[int]]:
    order = np.argsort(parents, kind="stable")
    order = order[np.searchsorted(parents[order], 0) :]
    above, first = np.unique(parents[order], return_index=True)
    children: list[Sequence[int]] = [()] * len(parents)  # most have none, and share it
    ordered, edges = order.tolist(), [*first.tolist(), len(order)]
    for parent, (start, stop) in zip(above.tolist(), pairwise(edges), strict=True):
        children[parent] = ordered[start:stop]
    return children


def paths(trees: Forest) -> Iterator[Conversation]:
    """Yield every path from a root to a leaf, depth first."""
    todo = trees.roots[::-1]
    while todo:
        row = todo.pop()
        if not trees.children[row]:
            yield trees.path(row)
        todo += reversed(trees.children[row])


def top1(trees: Forest) -> Iterator[Conversation]:
    """Yield one path a tree, the best child each time; prompts have no rank, so the first goes on."""
    for row in trees.roots:
        rows = [row]
        while trees.children[rows[-1]]:
            rows.append(trees.best(rows[-1]))
        yield tuple(rows)


def first_reply(trees: Forest) -> Iterator[Conversation]:
    """Yield each first prompt with each of its replies, as the seed did."""
    for row in trees.roots:
        for reply in trees.children[row]:
            yield (row, reply)


LAYOUTS: Mapping[str, Callable[[Forest], Iterator[Conversation]]] = {
    "paths": paths,
    "top1": top1,
    "first-reply": first_reply,
}


@dataclass
class Fitted:
    """Conversations that end on a whole reply and fit the block, each once.

    All that came = conversations + skipped + repeated.

    Attributes:
        conversations: As they are trained.
        cut: How many of them lost whole turns at their end, because the rest does not fit.
        skipped: Conversations left out, as they hold no reply or none that fits.
        repeated: Conversations that ended like an earlier one, once their last prompts or long turns were gone.
        too_long: Replies that no conversation holds, because they do not fit.
    """

    conversations: list[Conversation] = field(default_factory=list)
    cut: int = 0
    skipped: int = 0
    repeated: int = 0
    too_long: int = 0


def fit(found: Iterable[Conversation], replies: Flags, lengths: Ints, room: int) -> Fitted:
    """End each conversation on the last reply that fits.

    Args:
        found: Conversations of any length, each a path from a root, so that its last row names it.
        replies: (rows,) whether a row is an assistant's.
        lengths: (rows,) tokens of a row, tags included.
        room: Tokens that the turns of a conversation may take together.
    """
    whole = [*found]
    rows, stops = flat(whole)
    starts = stops - np.fromiter(map(len, whole), np.int64, len(whole))
    number = np.repeat(np.arange(len(whole)), stops - starts)
    taken = np.cumsum(lengths[rows])
    taken -= np.append(0, taken)[starts][number]
    reply = np.flatnonzero(replies[rows])
    fits = reply[taken[reply] <= room]
    last = np.zeros(len(whole), np.int64)  # size up to the last reply
    kept = np.zeros(len(whole), np.int64)  # size up to the last one that fits
    np.maximum.at(last, number[reply], reply + 1 - starts[number[reply]])
    np.maximum.at(kept, number[fits], fits + 1 - starts[number[fits]])
    full = np.flatnonzero(kept)
    named = rows[starts[full] + kept[full] - 1]
    once = full[np.sort(np.unique(named, return_index=True)[1])]
    return Fitted(
        conversations=[whole[one][:size] for one, size in zip(once.tolist(), kept[once].tolist(), strict=True)],
        cut=int(np.count_nonzero(kept[once] < last[once])),
        skipped=len(whole) - len(full),
        repeated=len(full) - len(once),
        too_long=len(np.unique(rows[reply[taken[reply] > room]])),
    )


def longest(trees: Forest, replies: Flags, lengths: Ints) -> Ints:
    """Return the tokens of the longest path to a reply of each tree that has one: (trees,).

    Args:
        trees: The trees, parents before their children.
        replies: (rows,) whether a row is a reply that is looked at.
        lengths: (rows,) tokens of a row, tags included.
    """
    ends, roots = list[int](), list[int]()
    for row, (parent, length) in enumerate(zip(trees.parents, lengths.tolist(), strict=True)):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
        roots.append(roots[parent] if parent >= 0 else row)
    found = np.zeros(len(ends), np.int64)
    np.maximum.at(found, np.array(roots, np.int64)[replies], np.array(ends, np.int64)[replies])
    return found[found > 0]


def flat(conversations: Sequence[Conversation]) -> tuple[Ints, Ints]:
    """Return the rows of conversations, one after another, and where each conversation stops."""
    stops = np.cumsum(np.fromiter(map(len, conversations), np.int64, len(conversations)))
    count = int(stops[-1]) if len(stops) else 0
    return np.fromiter(chain.from_iterable(conversations), np.int64, count), stops
