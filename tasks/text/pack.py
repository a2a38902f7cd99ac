"""Packing: which documents share a sequence of one length; none is ever cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MANY = 100  # documents that an array sorts faster


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
    with_room: dict[int, list[int]] = {}  # room left -> sequences
    rooms = 0  # bit r is set where a sequence has room r
    for document in _longest_first(lengths):
        length = lengths[document]
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            waiting = with_room[room]
            sequence = waiting.pop()
            if not waiting:
                rooms ^= 1 << room
        else:
            room, sequence = block, opened
            opened += 1
        sequence_of[document] = sequence
        if left := room - length:
            with_room.setdefault(left, []).append(sequence)
            rooms |= 1 << left
    documents: dict[int, list[int]] = {}
    for document, sequence in enumerate(sequence_of):
        documents.setdefault(sequence, []).append(document)
    return list(documents.values())


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """Return the numbers of documents by falling length; ties keep their order."""
    if len(lengths) < MANY:
        return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    order: list[int] = np.argsort(-np.array(lengths, np.int64), kind="stable").tolist()
    return order
