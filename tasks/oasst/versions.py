"""Versions of a tree become one tree: message by message the later one wins, and what only the earlier had stays.

A tree may come again in the same file, in another one, or in a later revision of the dataset. Here is decided what its
rows become; nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tasks.oasst.fields import Fault, shown


class Row(NamedTuple):
    """A message that was taken: its row of the table, its ids, and a digest of what it says and of its labels."""

    row: int
    tree_id: str
    message_id: str
    parent_id: str | None
    digest: bytes


class Placed(NamedTuple):
    """A row of a united tree, and its place in it."""

    row: int
    depth: int
    sibling: int


class Verdict(NamedTuple):
    """What a version is to the one before it.

    Attributes:
        repeats: It says nothing new, and is left out.
        replaces: The version that it takes the place of; None: it is the first, or repeats.
        same: Messages of the version before that are there again, unchanged.
        differ: Messages of the version before that are there again, changed: the later one wins.
        lost: Messages of the version before that are not there again, nor is what they reply to.
    """

    repeats: bool = False
    replaces: int | None = None
    same: int = 0
    differ: int = 0
    lost: int = 0


@dataclass
class _Tree:
    version: int  # the one whose place it has
    rows: dict[str, Row]  # message id -> row; those of the later version first, each after its parent


class Versions:
    """The versions of some trees, judged one after another."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}  # message id -> its tree
        self._trees: dict[str, _Tree] = {}

    def judge(self, version: int, rows: Sequence[Row]) -> Verdict:
        """Judge the next version of a tree, and take it in; `rows` depth first, parents before replies.

        Raises:
            Fault: `id.duplicate`, if one of its messages is also in another tree. Then it is not taken in.
        """
        tree_id = rows[0].tree_id
        for row in rows:
            if (owner := self._owners.get(row.message_id, tree_id)) != tree_id:
                said = f"expected {shown(row.message_id)} in one tree, got it in {shown(owner)}, too"
                raise Fault("id.duplicate", said)
        self._owners.update((row.message_id, tree_id) for row in rows)
        later = {row.message_id: row for row in rows}
        before = self._trees.get(tree_id)
        if before is None:
            self._trees[tree_id] = _Tree(version, later)
            return Verdict()
        if all(row.message_id in before.rows and before.rows[row.message_id].digest == row.digest for row in rows):
            return Verdict(repeats=True)
        verdict, left = _compared(before, later)
        self._trees[tree_id] = _Tree(version, {**later, **left})
        return verdict

    def placed(self, tree_id: str, version: int) -> list[Placed] | None:
        """Return the rows of a tree where this version has its place; None if another has it."""
        tree = self._trees[tree_id]
        return _placed(tree.rows.values()) if tree.version == version else None


def _compared(before: _Tree, later: dict[str, Row]) -> tuple[Verdict, dict[str, Row]]:
    """Compare a version with the one before it, and return what is left of that one."""
    same = differ = lost = 0
    left: dict[str, Row] = {}
    for name, row in before.rows.items():  # parents first
        if name in later:
            same, differ = (same + 1, differ) if later[name].digest == row.digest else (same, differ + 1)
        elif row.parent_id in later or row.parent_id in left:
            left[name] = row
        else:
            lost += 1
    return Verdict(replaces=before.version, same=same, differ=differ, lost=lost), left


def _placed(rows: Iterable[Row]) -> list[Placed]:
    """Lay out a tree depth first, replies in the order of `rows`."""
    replies: dict[str | None, list[Row]] = {}
    for row in rows:
        replies.setdefault(row.parent_id, []).append(row)
    found: list[Placed] = []
    stack = [(root, 0, 0) for root in replies[None]]
    while stack:
        row, depth, sibling = stack.pop()
        found.append(Placed(row.row, depth, sibling))
        below = replies.get(row.message_id, ())
        stack.extend((below[place], depth + 1, place) for place in range(len(below) - 1, -1, -1))
    return found
