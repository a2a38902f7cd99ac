"""Versions of a tree become one tree: message by message the later one wins, and what only the earlier had stays.

A message that a later file has in another tree moves there; what replied to it does not move along, and is lost.
A tree of flat messages is of the file where its first message stood, whatever others add to it: should one of its
messages have moved between two such trees, the second is refused.

A tree may come again in the same file, in another one, or in a later revision of the dataset. Here is decided what its
rows become; nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tasks.oasst.validators import Fault, shown


class Row(NamedTuple):
    """A message that was taken.

    Attributes:
        row: Its row of the table.
        tree_id: Its tree.
        message_id: Its id.
        parent_id: What it replies to; None for the first of a tree.
        digest: Of what it says and of its labels.
        extra: Digest of what else was published of it; None: nothing.
    """

    row: int
    tree_id: str
    message_id: str
    parent_id: str | None
    digest: bytes
    extra: bytes | None = None


class Placed(NamedTuple):
    """A row of a united tree, and its place in it."""

    row: int
    depth: int
    sibling: int


class Robbed(NamedTuple):
    """A tree of an earlier file that lost messages to a tree of a later one.

    Attributes:
        version: The version that has its place.
        tree_id: Its id.
        moved: Messages that are in the other tree now.
        lost: Messages that replied to these, and are not there.
        empty: Nothing is left of it.
    """

    version: int
    tree_id: str
    moved: int
    lost: int
    empty: bool


class Verdict(NamedTuple):
    """What a version is to the one before it.

    Attributes:
        repeats: It says nothing new, and is left out.
        replaces: The version that it takes the place of; None: it is the first, or repeats.
        same: Messages of the version before that are there again, unchanged.
        differ: Messages of the version before that are there again, changed: the later one wins.
        lost: Messages of the version before that are not there again, nor is what they reply to.
        robbed: Trees of earlier files that had some of its messages.
    """

    repeats: bool = False
    replaces: int | None = None
    same: int = 0
    differ: int = 0
    lost: int = 0
    robbed: tuple[Robbed, ...] = ()


@dataclass
class _Tree:
    version: int  # the one whose place it has
    rows: dict[str, Row]  # message id -> row; those of the later version first, each after its parent


class Versions:
    """The versions of some trees, judged one after another."""

    def __init__(self) -> None:
        self._owners: dict[str, tuple[str, int]] = {}  # message id -> its tree, and the last file that says so
        self._trees: dict[str, _Tree] = {}

    def judge(self, version: int, file: int, rows: Sequence[Row]) -> Verdict:
        """Judge the next version of a tree, and take it in.

        A message that an earlier file has in another tree moves to this one.

        Args:
            version: Its number.
            file: The file that it stands in; none of an earlier file may follow.
            rows: Its messages, depth first, parents before replies.

        Raises:
            Fault: If the same file has one of its messages in another tree (`id.duplicate`), or another first message
                for this tree (`tree.root`). Then it is not taken in.
        """
        tree_id = rows[0].tree_id
        self._refuse_other_root(file, rows[0])
        robbed = tuple(self._rob(other, ids) for other, ids in self._elsewhere(file, rows).items())
        self._owners.update((row.message_id, (tree_id, file)) for row in rows)
        later = {row.message_id: row for row in rows}
        before = self._trees.get(tree_id)
        if before is None:
            self._trees[tree_id] = _Tree(version, later)
            return Verdict(robbed=robbed)
        if all(row.message_id in before.rows and _alike(before.rows[row.message_id], row) for row in rows):
            return Verdict(repeats=True)  # so it has no message of another tree
        verdict, left = _compared(before, later)
        self._disown(before.rows.keys() - later.keys() - left.keys())
        self._trees[tree_id] = _Tree(version, {**later, **left})
        return verdict._replace(robbed=robbed)

    def _refuse_other_root(self, file: int, root: Row) -> None:
        """Refuse what is no later version of a tree, but another one by the same name: it would take its place."""
        if before := self._trees.get(root.tree_id):
            first = next(iter(before.rows))
            if first != root.message_id and self._owners[first][1] == file:
                said = f"expected {shown(first)} as first message of this tree, as before in this file"
                raise Fault("tree.root", f"{said}, got {shown(root.message_id)}; a tree has one, give each its own id")

    def _elsewhere(self, file: int, rows: Sequence[Row]) -> dict[str, set[str]]:
        """Return the messages that earlier files have in other trees, by tree."""
        found: dict[str, set[str]] = {}
        for row in rows:
            owner, since = self._owners.get(row.message_id, (row.tree_id, file))
            if owner != row.tree_id:
                if since == file:
                    said = f"expected {shown(row.message_id)} in one tree, got it in {shown(owner)}, too"
                    raise Fault("id.duplicate", said)
                found.setdefault(owner, set()).add(row.message_id)
        return found

    def _rob(self, tree_id: str, ids: set[str]) -> Robbed:
        """Take messages out of a tree, and with them what replies to them."""
        tree = self._trees[tree_id]
        left: dict[str, Row] = {}
        for name, row in tree.rows.items():  # parents first
            if name not in ids and (row.parent_id is None or row.parent_id in left):
                left[name] = row
        lost = tree.rows.keys() - left.keys() - ids
        self._disown(lost)
        robbed = Robbed(tree.version, tree_id, len(ids), len(lost), not left)
        if left:
            tree.rows = left
        else:
            del self._trees[tree_id]
        return robbed

    def _disown(self, lost: Iterable[str]) -> None:
        """Forget whose messages are that are in no tree any more: they bar no other tree."""
        for name in lost:
            del self._owners[name]

    def placed(self, tree_id: str, version: int) -> list[Placed] | None:
        """Return the rows of a tree where this version has its place; None if another has it."""
        tree = self._trees.get(tree_id)
        return _placed(tree.rows.values()) if tree and tree.version == version else None


def _alike(one: Row, other: Row) -> bool:
    return (one.digest, one.extra) == (other.digest, other.extra)


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
