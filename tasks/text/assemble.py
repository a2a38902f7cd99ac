"""Laying: packed conversations become arrays of sequences, without a Python step for each token.

Shapes: S sequences of T tokens; M messages, in the order in which they stand in the sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from tasks.text.linearize import Conversation
from tasks.text.templates import Tags

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
class MessageLayout:
    """The messages of all conversations, in the order in which they stand in the sequences.

    Attributes:
        row: (M,) row of the data.
        sequence: (M,) sequence that the message lies in, never falling.
        start: (M,) first token in its sequence.
        head: (M,) tokens before its text, `text` those of its text, `foot` those after it.
        trained: (M,) targets of the loss: the first of its text and on; 0 in a prompt.
        reply: (M,) whether it is an assistant's.
        parent: (M,) which of the messages it answers here, -1 at the first of a conversation.
        before: (M,) tokens above it in its conversation, which is the position of its first token.
        end: (M,) one past the last token of all that is below it, in its sequence.
        opens: (M,) whether it is the first of its conversation; `closes`: whether nothing is below it.
    """

    row: Ints
    sequence: Ints
    start: Ints
    head: Ints
    text: Ints
    foot: Ints
    trained: Ints
    parent: Ints
    before: Ints
    end: Ints
    reply: Flags
    opens: Flags
    closes: Flags

    @property
    def size(self) -> Ints:
        """(M,) tokens of the message, with what stands around its text."""
        return self.head + self.text + self.foot

    def of(self, first: int, last: int) -> MessageLayout:
        """Return the messages of the sequences from `first` to before `last`."""
        low, high = np.searchsorted(self.sequence, [first, last])
        return MessageLayout(*(getattr(self, name)[low:high] for name in self.__dataclass_fields__))


def around(replies: Flags, opens: Flags, closes: Flags, tags: Tags) -> tuple[Ints, Ints]:
    """Return the tokens before and after the text of each message: two of (M,)."""
    head = np.where(replies, len(tags.opens["assistant"]), len(tags.opens["user"])) + len(tags.start) * opens
    foot = np.where(replies, len(tags.closes["assistant"]), len(tags.closes["user"])) + len(tags.tail) * closes
    return head, foot


def turns(
    conversations: Sequence[Conversation],
    contexts: Sequence[int],
    packed: Sequence[Sequence[int]],
    parents: Ints,
    replies: Flags,
    lengths: Ints,
    tags: Tags,
) -> MessageLayout:
    """Give every message its place.

    Args:
        conversations: Rows of each conversation, depth first: a path, or a tree.
        contexts: How many rows at the start of each one are not trained, as another conversation trains them.
        packed: Numbers of the conversations of each sequence, as `best_fit` gives them.
        parents: (rows,) row of each row's parent.
        replies: (rows,) whether a row is an assistant's.
        lengths: (rows,) tokens of a row's text.
        tags: What stands around the texts.
    """
    order = [conversations[number] for numbers in packed for number in numbers]
    sizes = np.fromiter(map(len, order), np.int64, len(order))
    row = np.fromiter(chain.from_iterable(order), np.int64, int(sizes.sum()))
    in_sequence = np.fromiter(map(len, packed), np.int64, len(packed))
    sequence = np.repeat(np.repeat(np.arange(len(packed)), in_sequence), sizes)
    first = np.cumsum(sizes) - sizes
    parent = _above(row, parents, np.repeat(first, sizes))
    opens, closes = parent < 0, np.ones(len(row), np.bool_)
    closes[parent[~opens]] = False
    reply, text = replies[row], lengths[row]
    head, foot = around(reply, opens, closes, tags)
    size = head + text + foot
    start = np.cumsum(size) - size  # were there only one sequence
    start -= start[np.searchsorted(sequence, sequence)]
    skipped = np.fromiter((contexts[number] for numbers in packed for number in numbers), np.int64, len(order))
    taught = reply & (np.arange(len(row)) >= np.repeat(first + skipped, sizes))
    trained = np.where(taught, text + len(tags.closes["assistant"]), 0)
    before, end = _depths(parent, start, size)
    return MessageLayout(row, sequence, start, head, text, foot, trained, parent, before, end, reply, opens, closes)


def _above(row: Ints, parents: Ints, first: Ints) -> Ints:
    """Return where in the same conversation the parent of each row stands, -1 for the first row: (M,).

    Mostly that is the row before; of the others the latest such row is found by one sort.
    """
    place = np.arange(len(row))
    above = np.where(place == first, -1, place - 1)
    wanted = parents[row]
    other = np.flatnonzero((above >= 0) & (row[above] != wanted))
    if len(other):
        known = np.lexsort((row, first))
        key = first[known] * (len(parents) + 1) + row[known]
        above[other] = known[np.searchsorted(key, first[other] * (len(parents) + 1) + wanted[other])]
    return above


def _depths(parent: Ints, start: Ints, size: Ints) -> tuple[Ints, Ints]:
    """Return the tokens above each message, and where all that is below it ends: two of (M,)."""
    above, sizes = parent.tolist(), size.tolist()
    before, end = [0] * len(above), (start + size).tolist()
    for message, over in enumerate(above):
        if over >= 0:
            before[message] = before[over] + sizes[over]
    for message in range(len(above) - 1, -1, -1):
        over = above[message]
        if over >= 0 and end[over] < end[message]:
            end[over] = end[message]
    return np.array(before, np.int64), np.array(end, np.int64)


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


def lay(all_turns: MessageLayout, texts: Texts, tags: Tags, first: int, last: int, block: int, pad: int) -> Laid:
    """Write the sequences from `first` to before `last`: texts, what stands around them, and padding."""
    here = all_turns.of(first, last)
    begin = (here.sequence - first) * block + here.start
    count = (last - first) * block
    target = begin + here.head
    return Laid(
        ids=_ids(here, begin, texts, tags, np.full(count, pad, np.uint16)),
        mask=_between(target[here.trained > 0], (target + here.trained)[here.trained > 0], count),
        **_places(here, begin, last - first, block),
    )


def _ids(here: MessageLayout, begin: Ints, texts: Texts, tags: Tags, ids: NDArray[np.uint16]) -> NDArray[np.uint16]:
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


def _places(here: MessageLayout, begin: Ints, sequences: int, block: int) -> dict[str, NDArray[np.uint16]]:
    """Return positions and ends: a run of tokens a message, and one of padding at the end of each sequence."""
    stop = begin + here.size
    edges = np.arange(sequences) * block
    filled = edges.copy()  # where padding starts
    np.maximum.at(filled, begin // block, stop)
    edges += block
    after = np.searchsorted(begin, edges)
    runs, run_stops = np.insert(begin, after, filled), np.insert(stop, after, edges)
    sizes = run_stops - runs
    local = np.tile(np.arange(block, dtype=np.uint16), sequences)
    shift = np.insert(here.start - here.before, after, 0).astype(np.uint16)  # may wrap, and wraps back
    positions = local - np.repeat(shift, sizes)
    ends = np.repeat(np.insert(here.end, after, 0).astype(np.uint16), sizes)
    padding = ranges(filled, edges)
    positions[padding], ends[padding] = 0, local[padding] + 1
    return {"positions": positions, "ends": ends}


def ranges(start: Ints, stop: Ints) -> Ints:
    """Return all numbers of the ranges start[i]..stop[i], one range after another."""
    sizes = stop - start
    return np.repeat(start - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))
