"""Laying: packed conversations become arrays of sequences, without a Python step for each token.

Shapes: S sequences of T tokens; M messages, in the order in which they stand in the sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from tasks.text.chat import Tags
from tasks.text.layout import Conversation

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Texts:
    """Ids of the texts of all rows, in pieces of `window` rows each, so that no piece is ever moved to grow.

    Attributes:
        window: Rows of a piece.
        ids: Of each piece: token ids, uint16.
        starts: (rows,) first id of a row's text in its piece.
        lengths: (rows,) tokens of a row's text; 0 where nobody asked for it.
    """

    window: int
    ids: list[NDArray[np.uint16]]
    starts: Ints
    lengths: Ints


@dataclass(frozen=True)
class Turns:
    """The messages of all conversations, in the order in which they stand in the sequences.

    Attributes:
        row: (M,) row of the data.
        sequence: (M,) sequence that the message lies in, never falling.
        start: (M,) first token in its sequence.
        head: (M,) tokens before its text, `text` those of its text, `foot` those after it.
        trained: (M,) targets of the loss: the first of its text and on; 0 in a prompt.
        reply: (M,) whether it is an assistant's.
        opens: (M,) whether it is the first of its conversation; `closes`: the last.
    """

    row: Ints
    sequence: Ints
    start: Ints
    head: Ints
    text: Ints
    foot: Ints
    trained: Ints
    reply: Flags
    opens: Flags
    closes: Flags

    @property
    def size(self) -> Ints:
        """(M,) tokens of the message, with what stands around its text."""
        return self.head + self.text + self.foot

    def of(self, first: int, last: int) -> Turns:
        """Return the messages of the sequences from `first` to before `last`."""
        low, high = np.searchsorted(self.sequence, [first, last])
        return Turns(*(getattr(self, name)[low:high] for name in self.__dataclass_fields__))


def around(replies: Flags, opens: Flags, closes: Flags, tags: Tags) -> tuple[Ints, Ints]:
    """Return the tokens before and after the text of each message: two of (M,)."""
    head = np.where(replies, len(tags.opens["assistant"]), len(tags.opens["user"])) + len(tags.start) * opens
    foot = np.where(replies, len(tags.closes["assistant"]), len(tags.closes["user"])) + len(tags.tail) * closes
    return head, foot


def turns(
    conversations: Sequence[Conversation], packed: Sequence[Sequence[int]], replies: Flags, lengths: Ints, tags: Tags
) -> Turns:
    """Give every message its place.

    Args:
        conversations: Rows of each conversation.
        packed: Numbers of the conversations of each sequence, as `best_fit` gives them.
        replies: (rows,) whether a row is an assistant's.
        lengths: (rows,) tokens of a row's text.
        tags: What stands around the texts.
    """
    order = [conversations[number] for numbers in packed for number in numbers]
    sizes = np.fromiter(map(len, order), np.int64, len(order))
    row = np.fromiter(chain.from_iterable(order), np.int64, int(sizes.sum()))
    in_sequence = np.fromiter(map(len, packed), np.int64, len(packed))
    sequence = np.repeat(np.repeat(np.arange(len(packed)), in_sequence), sizes)
    opens, closes = np.zeros(len(row), np.bool_), np.zeros(len(row), np.bool_)
    last = np.cumsum(sizes) - 1
    opens[last - sizes + 1], closes[last] = True, True
    reply, text = replies[row], lengths[row]
    head, foot = around(reply, opens, closes, tags)
    size = head + text + foot
    start = np.cumsum(size) - size  # were there only one sequence
    start -= start[np.searchsorted(sequence, sequence)]
    trained = np.where(reply, text + len(tags.closes["assistant"]), 0)
    return Turns(row, sequence, start, head, text, foot, trained, reply, opens, closes)


@dataclass(frozen=True)
class Laid:
    """Some sequences, one after another; each holds its conversations, then padding.

    Attributes:
        ids: (S * T,) uint16, token ids.
        mask: (S * T,) uint8, 1 where the token is a target of the loss.
        positions: (S * T,) uint16, position in its conversation; 0 in padding.
        ends: (S * T,) uint16; token q sees token k when k <= q < ends[k], within a sequence. Padding sees only itself.
    """

    ids: NDArray[np.uint16]
    mask: NDArray[np.uint8]
    positions: NDArray[np.uint16]
    ends: NDArray[np.uint16]


def lay(all_turns: Turns, texts: Texts, tags: Tags, first: int, last: int, block: int, pad: int) -> Laid:
    """Write the sequences from `first` to before `last`: texts, what stands around them, and padding."""
    here = all_turns.of(first, last)
    begin = (here.sequence - first) * block + here.start
    count = (last - first) * block
    target = begin + here.head
    return Laid(
        ids=_ids(here, begin, texts, tags, np.full(count, pad, np.uint16)),
        mask=_between(target[here.reply], (target + here.trained)[here.reply], count),
        **_places(here, begin, last - first, block),
    )


def _ids(here: Turns, begin: Ints, texts: Texts, tags: Tags, ids: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Write the tokens of messages over padding; a copy a text, which is as fast as memory, and a store a tag token."""
    text = begin + here.head
    stop = text + here.text
    source = texts.starts[here.row]
    window = here.row // texts.window
    columns = (text, stop, window, source, source + here.text)
    for low, high, piece, start, end in zip(*(column.tolist() for column in columns), strict=True):
        ids[low:high] = texts.ids[piece][start:end]
    _put(ids, begin[here.opens], tags.start)
    for role, chosen in (("assistant", here.reply), ("user", ~here.reply)):
        _put(ids, text[chosen] - len(tags.opens[role]), tags.opens[role])
        _put(ids, stop[chosen], tags.closes[role])
    _put(ids, (stop + here.foot)[here.closes] - len(tags.tail), tags.tail)
    return ids


def _put(ids: NDArray[np.uint16], at: Ints, tokens: Sequence[int]) -> None:
    for offset, token in enumerate(tokens):
        ids[at + offset] = token


def _between(start: Ints, stop: Ints, count: int) -> NDArray[np.uint8]:
    """Return 1 from each start to before its stop, and 0 elsewhere; no range is empty, and they lie apart."""
    steps = np.zeros(count + 1, np.int8)
    steps[start] += 1
    steps[stop] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8)


def _places(here: Turns, begin: Ints, sequences: int, block: int) -> dict[str, NDArray[np.uint16]]:
    """Return positions and ends: a run of tokens a conversation, and one of padding at the end of each sequence."""
    start, stop = begin[here.opens], (begin + here.size)[here.closes]  # of conversations
    edges = np.arange(sequences) * block
    filled = edges.copy()  # where padding starts
    np.maximum.at(filled, (stop - 1) // block, stop)
    edges += block
    after = np.searchsorted(start, edges)
    runs, run_stops = np.insert(start, after, filled), np.insert(stop, after, edges)
    local = np.tile(np.arange(block, dtype=np.uint16), sequences)
    positions = local - np.repeat((runs % block).astype(np.uint16), run_stops - runs)
    ends = np.repeat(((run_stops - 1) % block + 1).astype(np.uint16), run_stops - runs)
    padding = ranges(filled, edges)
    positions[padding], ends[padding] = 0, local[padding] + 1
    return {"positions": positions, "ends": ends}


def ranges(start: Ints, stop: Ints) -> Ints:
    """Return all numbers of the ranges start[i]..stop[i], one range after another."""
    sizes = stop - start
    return np.repeat(start - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))
