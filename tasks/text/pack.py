"""Packing: documents into sequences of one length, never cut, each blind to its neighbours.

Shapes: T tokens in a sequence, n tokens in a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Put documents into as few sequences as best-fit decreasing finds.

    The longest document goes first, each into the fullest sequence that still has room. Which amounts of room are to be
    had is one integer, a bit for each, so the tightest is the lowest bit from `length` on: no tree, no search.

    Args:
        lengths: Tokens of each document, 1 to `block`.
        block: Tokens of a sequence.

    Returns:
        Numbers of the documents of each sequence. Sequences stand in the order of their first documents, and documents
        in their own, so that long ones do not gather at the front.

    Raises:
        ValueError: If a document does not fit the block.
    """
    if lengths and not 1 <= min(lengths) <= max(lengths) <= block:
        raise ValueError(f"lengths must be 1 to {block}, found {min(lengths)} to {max(lengths)}")
    sequences: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(block + 1)]  # room left -> sequences
    rooms = 0  # bit r is set where a sequence has room r
    for document in sorted(range(len(lengths)), key=lambda number: -lengths[number]):  # stable: ties keep their order
        length = lengths[document]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, sequence = block, len(sequences)
            sequences.append([])
        sequences[sequence].append(document)
        if left := room - length:
            with_room[left].append(sequence)
            rooms |= 1 << left
    return sorted(sorted(documents) for documents in sequences)


@dataclass(frozen=True)
class Packed:
    """One sequence: its documents, then padding.

    Attributes:
        ids: (T,) uint16, token ids.
        mask: (T,) uint8, 1 where the token is a target of the loss.
        positions: (T,) uint16, position in its document.
        ends: (T,) uint16; token q sees token k when k <= q < ends[k].
        starts: First token of each document.
    """

    ids: NDArray[np.uint16]
    mask: NDArray[np.uint8]
    positions: NDArray[np.uint16]
    ends: NDArray[np.uint16]
    starts: list[int]


def lay(documents: Sequence[tuple[Sequence[int], Sequence[int]]], block: int, pad: int) -> Packed:
    """Lay documents (ids, mask) one after another into a sequence; padding sees only itself and is never a target."""
    ids = np.full(block, pad, np.uint16)
    mask = np.zeros(block, np.uint8)
    positions = np.zeros(block, np.uint16)
    ends = np.arange(1, block + 1, dtype=np.uint16)
    starts, start = [], 0
    for tokens, targets in documents:
        stop = start + len(tokens)
        ids[start:stop] = tokens
        mask[start:stop] = targets
        positions[start:stop] = np.arange(stop - start)
        ends[start:stop] = stop
        starts.append(start)
        start = stop
    return Packed(ids, mask, positions, ends, starts)
