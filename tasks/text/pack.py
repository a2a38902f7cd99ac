"""Packing: which documents share a sequence of one length; none is ever cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
    sequence_of = [0] * len(lengths)
    opened = 0
    with_room: list[list[int]] = [[] for _ in range(block + 1)]  # room left -> sequences
    rooms = 0  # bit r is set where a sequence has room r
    sizes = np.array(lengths, np.int64)
    order = np.argsort(-sizes, kind="stable")  # ties keep their order
    for document, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = block, opened
            opened += 1
        sequence_of[document] = sequence
        if left := room - length:
            with_room[left].append(sequence)
            rooms |= 1 << left
    together = np.argsort(np.array(sequence_of, np.int64), kind="stable")
    counts = np.bincount(sequence_of, minlength=opened) if opened else np.zeros(0, np.int64)
    stops = np.cumsum(counts)
    first = together[stops - counts]
    documents, edges = together.tolist(), np.append(0, stops).tolist()
    return [documents[edges[sequence] : edges[sequence + 1]] for sequence in np.argsort(first).tolist()]
