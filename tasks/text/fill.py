"""Filling: which pieces of trees share a sequence, and which are divided to fill the room that others leave.

Trees that are cut leave many pieces of more than half a sequence, and too few small ones to lie beside them. But a
piece may be divided after any leaf: what follows opens with its ancestors as context, as after every cut. So the part
that is taken next is the one that leaves the least to do: a whole piece, or as much of one as fits the room.

Letters: M messages of a piece; C places where it may be divided.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tasks.text.linearize import Forest
from tasks.text.pack import best_fit
from tasks.text.split_trees import Piece, Sizes, path_tokens

TRIED = 256  # sizes of pieces, the largest first, that are looked at for a part: more take longer than they save


def fill(pieces: Sequence[Piece], forest: Forest, sizes: Sizes) -> list[list[Piece]]:
    """Put pieces into few sequences, and divide some where that saves a sequence.

    Args:
        pieces: As `cut` makes them.
        forest: The trees.
        sizes: How long rows and sequences are.

    Returns:
        The pieces of each sequence. Sequences stand in the order of their first pieces, and pieces in their own, so
        that long ones do not gather at the front.
    """
    whole = [[pieces[number] for number in some] for some in best_fit([one.tokens for one in pieces], sizes.room)]
    if sum(one.tokens for one in pieces) > (len(whole) - 1) * sizes.room:  # one less could not hold them
        return whole
    return min(whole, _divided(pieces, forest, sizes), key=len)


class _Part(NamedTuple):
    """What is taken of a piece: from one of its places to a later one."""

    piece: int
    first: int
    last: int


@dataclass(frozen=True)
class _Places:
    """Where a piece may be divided: at its start, after each leaf where that leaves less to do, and at its end.

    Attributes:
        rows: (C,) messages before the place.
        filled: (C,) tokens before it.
        repeated: (C,) tokens of context that what follows it opens with. The difference of the two rises.
    """

    rows: list[int]
    filled: list[int]
    repeated: list[int]

    def tokens(self, first: int, last: int) -> int:
        """Return the tokens of the part from one place to another, the context that it opens with among them."""
        return self.repeated[first] + self.filled[last] - self.filled[first]

    def reached(self, first: int, room: int) -> int:
        """Return the last place that a part from `first` may have; `first` where nothing fits."""
        return bisect_right(self.filled, room - self.repeated[first] + self.filled[first], lo=first + 1) - 1


@dataclass
class _Waiting:
    """What is still to be laid: a rest of each piece, from a place to its end.

    Attributes:
        places: Of each piece.
        of_size: Tokens of a rest -> pieces and places.
        sizes: Bit s is set where there is a rest of s tokens.
    """

    places: list[_Places]
    of_size: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    sizes: int = 0

    def __post_init__(self) -> None:
        for piece in reversed(range(len(self.places))):
            self._add(piece, 0)

    def take(self, room: int) -> _Part | None:
        """Remove the part that fits the room and leaves the least to do; None: nothing fits."""
        most = size = (self.sizes & ((2 << room) - 1)).bit_length() - 1  # the largest rest that fits
        last, larger = None, self.sizes >> room + 1
        for _ in range(TRIED):
            if most == room or not larger:
                break
            bit = larger.bit_length() - 1
            larger ^= 1 << bit
            piece, first = self.of_size[bit + room + 1][-1]
            places = self.places[piece]
            place = places.reached(first, room)
            done = places.tokens(first, place) - places.repeated[place]
            if done > max(most, 0):
                most, size, last = done, bit + room + 1, place
        return None if size < 0 else self._remove(size, last)

    def _remove(self, size: int, last: int | None) -> _Part:
        same = self.of_size[size]
        piece, first = same.pop()
        if not same:
            self.sizes ^= 1 << size
        if last is None:
            return _Part(piece, first, len(self.places[piece].rows) - 1)
        self._add(piece, last)
        return _Part(piece, first, last)

    def _add(self, piece: int, first: int) -> None:
        places = self.places[piece]
        size = places.tokens(first, len(places.rows) - 1)
        self.of_size.setdefault(size, []).append((piece, first))
        self.sizes |= 1 << size


def _divided(pieces: Sequence[Piece], forest: Forest, sizes: Sizes) -> list[list[Piece]]:
    """Fill one sequence after another, the longest piece first, and divide what does not fit the room that is left."""
    paths = path_tokens(forest, sizes)
    waiting = _Waiting([_places(piece, forest.parents, paths, sizes) for piece in pieces])
    sequences = []
    while waiting.sizes:
        parts, room = [], sizes.room
        while part := waiting.take(room):
            parts.append(part)
            room -= waiting.places[part.piece].tokens(part.first, part.last)
        sequences.append(sorted(parts))
    return [[_piece(part, pieces, waiting.places, forest) for part in parts] for parts in sorted(sequences)]


def _places(piece: Piece, parents: Sequence[int], paths: Sequence[int], sizes: Sizes) -> _Places:
    """Find where a piece may be divided."""
    rows = piece.rows
    inner = {parents[row] for row in rows}
    tokens = paths[rows[piece.context - 1]] if piece.context else sizes.start
    found, most = _Places([0], [0], [0]), 0
    for place, row in enumerate(rows[piece.context :], start=piece.context + 1):
        tokens += sizes.rows[row] + (0 if row in inner else sizes.tail)
        above = paths[parents[rows[place]]] if place < len(rows) else 0
        if row not in inner and tokens - above > most:
            most = tokens - above
            found.rows.append(place)
            found.filled.append(tokens)
            found.repeated.append(above)
    return found


def _piece(part: _Part, pieces: Sequence[Piece], places: Sequence[_Places], forest: Forest) -> Piece:
    """Return a part as a piece of its own."""
    piece, here = pieces[part.piece], places[part.piece]
    start, stop = here.rows[part.first], here.rows[part.last]
    if not start:
        return Piece(piece.rows[:stop], here.filled[part.last], piece.context)
    above = forest.path(forest.parents[piece.rows[start]])
    return Piece((*above, *piece.rows[start:stop]), here.tokens(part.first, part.last), len(above))
