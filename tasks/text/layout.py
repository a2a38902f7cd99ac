"""Layouts: which paths of the trees become conversations, and where a long one is cut.

A conversation is a tuple of row numbers, a prompt first, each row the parent of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tasks.errors import InputError

Conversation = tuple[int, ...]


@dataclass(frozen=True)
class Forest:
    """Trees of messages, by row number.

    Attributes:
        parents: Row of each message's parent, -1 at a root.
        children: Rows of each message's replies, in the order of the data.
        places: What sorts siblings, best first: ranked before unranked, then by rank, then as published.
    """

    parents: list[int]
    children: list[list[int]]
    places: list[tuple[bool, int, int]]

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


def forest(
    trees: Sequence[str],
    ids: Sequence[str],
    parents: Sequence[str | None],
    ranks: Sequence[int | None],
    siblings: Sequence[int],
) -> Forest:
    """Link rows to trees by message id; parents stand before their children.

    Raises:
        InputError: If a parent is not in the data.
    """
    rows: dict[tuple[str, str], int] = {}
    linked: list[int] = []
    children: list[list[int]] = [[] for _ in ids]
    for row, (tree, message, parent) in enumerate(zip(trees, ids, parents, strict=True)):
        above = -1 if parent is None else rows.get((tree, parent), -2)
        if above == -2:
            what = f"message {message} answers {parent}, which does not stand before it"
            raise InputError(what, f"tree {tree}", "Curate the data again; parents come first", "encode.orphan")
        if above >= 0:
            children[above].append(row)
        linked.append(above)
        rows[tree, message] = row
    places = [(rank is None, rank or 0, sibling) for rank, sibling in zip(ranks, siblings, strict=True)]
    return Forest(linked, children, places)


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


def fit(found: Iterable[Conversation], replies: Sequence[bool], lengths: Sequence[int], room: int) -> Fitted:
    """End each conversation on the last reply that fits.

    Args:
        found: Conversations of any length, each a path from a root, so that its last row names it.
        replies: Whether a row is an assistant's.
        lengths: Tokens of a row, tags included.
        room: Tokens that the turns of a conversation may take together.
    """
    made = Fitted()
    ends: set[int] = set()
    lost: set[int] = set()
    for rows in found:
        last = max((place for place, row in enumerate(rows) if replies[row]), default=-1)
        kept = _fitting(rows, replies, lengths, room)
        lost.update(row for row in rows[kept:] if replies[row])
        if kept == 0:
            made.skipped += 1
        elif rows[kept - 1] in ends:
            made.repeated += 1
        else:
            ends.add(rows[kept - 1])
            made.conversations.append(rows[:kept])
            made.cut += kept <= last
    made.too_long = len(lost)
    return made


def _fitting(rows: Conversation, replies: Sequence[bool], lengths: Sequence[int], room: int) -> int:
    """Return how many rows may stay: up to the last reply that still fits."""
    kept, taken = 0, 0
    for place, row in enumerate(rows):
        taken += lengths[row]
        if taken > room:
            break
        if replies[row]:
            kept = place + 1
    return kept
