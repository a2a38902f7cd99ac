"""Relations in trees of messages that are laid out as a table, parents before their children.

A table of N messages becomes `parents`, the row of each one's parent and -1 at a root. One pass forwards sees every
message after its ancestors, one pass backwards after its descendants: no recursion, so depth costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from tasks.errors import InputError


def parent_rows(messages: pl.DataFrame) -> list[int]:
    """Return the row of each message's parent, -1 at a root: (N,).

    Args:
        messages: message_tree_id, message_id and parent_id, parents first.

    Raises:
        InputError: If a parent does not stand before its child in the same tree.
    """
    names = ("message_tree_id", "message_id", "parent_id")
    trees, own, wanted = (messages[name] for name in names)
    salt = trees.hash(1).to_numpy()
    held, sought = salt ^ own.hash(2).to_numpy(), salt ^ wanted.hash(2).to_numpy()
    order = np.argsort(held, kind="stable")
    place = np.searchsorted(held, sought, side="right", sorter=order) - 1
    above = np.where(wanted.is_null().to_numpy(), -1, order[place] if len(order) else place)
    rows = np.flatnonzero(above >= 0)
    found, below = messages.select(names)[above[rows]], messages.select(names)[rows]
    same = (found["message_tree_id"] == below["message_tree_id"]) & (found["message_id"] == below["parent_id"])
    if same.all() and bool((above < np.arange(len(messages))).all()):
        parents: list[int] = above.tolist()
        return parents
    return _parents_by_name(messages)  # an id that stands twice, or out of order: seldom, worth an error that names it


def _parents_by_name(messages: pl.DataFrame) -> list[int]:
    """As `parent_rows`, a row at a time, each id the last that stood before; some 300 bytes a message."""
    row_of: dict[tuple[str, str], int] = {}
    parents = []
    rows = messages.select("message_tree_id", "message_id", "parent_id").iter_rows()
    for row, (tree, message, parent) in enumerate(rows):
        above = -1 if parent is None else row_of.get((tree, parent))
        if above is None:
            raise InputError(
                f"the parent {parent} of message {message} does not stand before it",
                f"tree {tree}, row {row:,}",
                "Rebuild the messages: python -m flows run --force parse",
                "curate.order",
            )
        row_of[tree, message] = row
        parents.append(above)
    return parents


def roots(parents: Sequence[int]) -> list[int]:
    """Return the row of each message's root, its own at a root: (N,)."""
    found: list[int] = []
    for row, parent in enumerate(parents):
        found.append(row if parent < 0 else found[parent])
    return found


def is_below(parents: Sequence[int], marked: Sequence[bool]) -> list[bool]:
    """Return whether an ancestor of each message, itself not counted, is marked: (N,)."""
    below: list[bool] = []
    for parent in parents:
        below.append(parent >= 0 and (below[parent] or marked[parent]))
    return below


def nearest_above(parents: Sequence[int], marked: Sequence[bool]) -> list[int]:
    """Return the row of each message's nearest marked ancestor, itself not counted, or -1: (N,)."""
    nearest: list[int] = []
    for parent in parents:
        nearest.append(parent if parent < 0 or marked[parent] else nearest[parent])
    return nearest


def holds(parents: Sequence[int], marked: Sequence[bool]) -> list[bool]:
    """Return whether the subtree of each message, itself counted, holds a marked one: (N,)."""
    found = list(marked)
    for row in range(len(parents) - 1, -1, -1):
        if found[row] and parents[row] >= 0:
            found[parents[row]] = True
    return found


def windows(parents: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of at least `size` rows, the last of what is left, that no message's parent stands before."""
    least = np.array(parents, dtype=np.int64)
    least[least < 0] = len(least)
    whole = np.minimum.accumulate(least[::-1])[::-1] >= np.arange(len(least))  # from here on, no parent before
    cuts = np.append(np.flatnonzero(whole), len(least))
    start = 0
    while start < len(least):
        stop = int(cuts[min(int(np.searchsorted(cuts, start + size)), len(cuts) - 1)])
        yield start, stop
        start = stop
