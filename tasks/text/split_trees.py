"""Branches: which messages of a tree share a piece, so that each is trained once and a piece fits a sequence.

A tree that fits is one piece. A larger one is cut between whole subtrees: every piece but the first opens with the
ancestors of what it holds, as context that the loss leaves out. So each message is trained in exactly one piece, and
everything that is said above it stands there, too.

    root                     piece 1: root, a, a1        (a1 and a2 do not fit together with root and a)
     |- a                    piece 2: (root, a), a2
     |   |- a1               piece 3: (root), b          in brackets: context
     |   `- a2
     `- b

Letters: R rows of the data; a piece holds M of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tasks.text.linearize import Forest
from tasks.text.pack import best_fit


@dataclass(frozen=True)
class Piece:
    """A part of a tree that is laid out as one run of tokens.

    Attributes:
        rows: (M,) its messages, depth first: a parent before its replies, siblings the best first.
        tokens: What they take together, with the start of the conversation and the tail after each leaf.
        context: The first so many are the ancestors of the others, and trained in another piece. 0: nothing is.
    """

    rows: tuple[int, ...]
    tokens: int
    context: int = 0


@dataclass
class Cut:
    """Trees as pieces that fit.

    Attributes:
        pieces: In the order of the trees.
        trees: Trees that have a piece.
        divided: Trees that have more than one.
        skipped: Trees without a reply that fits.
        too_long: Replies left out, as they or what stands above them do not fit the block.
    """

    pieces: list[Piece] = field(default_factory=list)
    trees: int = 0
    divided: int = 0
    skipped: int = 0
    too_long: int = 0


@dataclass(frozen=True)
class Sizes:
    """How long things are, in tokens.

    Attributes:
        rows: (R,) of a row, with all that stands around it wherever it stands.
        start: What stands before a root.
        tail: What stands after a row that nothing is below.
        block: What a path may have, from its root to its end.
        room: What a piece may have, at least `block`.
    """

    rows: Sequence[int]
    start: int
    tail: int
    block: int
    room: int


def cut(forest: Forest, replies: Sequence[bool], sizes: Sizes) -> Cut:
    """Cut trees into pieces.

    Args:
        forest: The trees.
        replies: (R,) whether a row is an assistant's.
        sizes: How long its rows are, and paths and pieces may be. A path that is too long loses its last messages.
    """
    made, paths = Cut(), path_tokens(forest, sizes)
    stays = _staying(forest, replies, paths, sizes.block - sizes.tail)
    made.too_long = sum(reply and not kept for reply, kept in zip(replies, stays, strict=True))
    children = _best_first(forest, stays)
    for root in forest.roots:
        if not stays[root]:
            made.skipped += 1
            continue
        pieces = _pieces(root, forest, children, paths, sizes)
        made.pieces += pieces
        made.trees += 1
        made.divided += len(pieces) > 1
    return made


def path_tokens(forest: Forest, sizes: Sizes) -> list[int]:
    """Return the tokens from the start to the end of each row: (R,); parents stand before their children."""
    paths: list[int] = []
    for parent, length in zip(forest.parents, sizes.rows, strict=True):
        paths.append(length + (paths[parent] if parent >= 0 else sizes.start))
    return paths


def _staying(forest: Forest, replies: Sequence[bool], paths: Sequence[int], block: int) -> list[bool]:
    """Return which rows can be laid: their path fits, and they are, or lead to, a reply that can be: (R,)."""
    stays = [reply and path <= block for reply, path in zip(replies, paths, strict=True)]
    for row in range(len(stays) - 1, -1, -1):
        if stays[row] and forest.parents[row] >= 0:
            stays[forest.parents[row]] = True
    return stays


def _best_first(forest: Forest, stays: Sequence[bool]) -> list[Sequence[int]]:
    """Return the rows below each row that stay, the best first; most have none, and cost no list."""
    places = forest.places.tolist().__getitem__
    return [sorted((row for row in below if stays[row]), key=places) if below else () for below in forest.children]


def _pieces(
    root: int, forest: Forest, children: Sequence[Sequence[int]], paths: Sequence[int], sizes: Sizes
) -> list[Piece]:
    """Cut one tree: bottom up, what does not fit beside its siblings becomes a piece of its own.

    Of what is below a row, the emptiest of the bins that it fills goes on with the row, so that the most may join it
    further up; each other bin becomes a piece, which repeats the path to the row.
    """
    size: dict[int, int] = {}  # row -> tokens of the row and of what goes on with it
    onward: dict[int, Sequence[int]] = {}  # row -> its children that go on with it
    closed: list[tuple[int, list[int]]] = []  # a row, and children of it in a piece of their own
    for row in reversed(_depth_first(root, children)):
        below = children[row]
        together = sum(map(size.__getitem__, below))
        if together <= sizes.room - paths[row]:  # by far the most rows, so not by way of bins
            size[row], onward[row] = sizes.rows[row] + (together if below else sizes.tail), below
            continue
        bins = best_fit([size[child] for child in below], sizes.room - paths[row])
        loads = [sum(size[below[place]] for place in places) for places in bins]
        least = min(range(len(bins)), key=loads.__getitem__)
        size[row] = sizes.rows[row] + loads[least]
        onward[row] = [below[place] for place in bins[least]]
        closed += [(row, [below[place] for place in places]) for number, places in enumerate(bins) if number != least]
    pieces = [Piece(tuple(_depth_first(root, onward)), sizes.start + size[root])]
    for row, tops in reversed(closed):
        above = forest.path(row)
        rows = (*above, *(low for top in tops for low in _depth_first(top, onward)))
        pieces.append(Piece(rows, paths[row] + sum(size[top] for top in tops), len(above)))
    return pieces


def _depth_first(top: int, children: Sequence[Sequence[int]] | Mapping[int, Sequence[int]]) -> list[int]:
    """Return a row and all below it, depth first."""
    order, todo = [], [top]
    while todo:
        row = todo.pop()
        order.append(row)
        todo += reversed(children[row])
    return order
