"""The gate: reads encoded data back from disk and refuses what must not reach training.

It trusts nothing of the writer: it sees only the arrays, the index, the exported tokenizer and the messages themselves,
and works out from these what must stand there. Structure is checked for every token. Texts are encoded again with the
`tokenizers` library, all of them up to `CHARS` characters; above that, messages drawn by a hash of their id, as many as
come to about that much (the library makes half a million tokens a second, a quarter of what tiktoken does).

Shapes: S sequences of T tokens; a chunk flattens some sequences to N tokens, and holds M messages of the index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NoReturn

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.errors import GateError
from tasks.progress import bar
from tasks.text.chat import ROLES, Dialect

Ints = NDArray[np.int64]
CHARS = 8_000_000  # about 2 million tokens, 4 seconds
CHUNK = 2_048  # sequences read at a time: 2 million tokens at a block of 1,024, some 100 MB of working arrays
DO = "Nothing was published. This is a fault of the encode step or of its input"


@dataclass(frozen=True)
class Written:
    """What the encode step wrote, as its readers will see it.

    Attributes:
        ids: (S, T) token ids.
        mask: (S, T) 1 where the token is a target of the loss.
        positions: (S, T) position in the conversation.
        ends: (S, T) token q sees token k when k <= q < ends[k].
        index: Token ranges of messages, by sequence and start.
        splits: Sequences of each split: (first, one past the last).
    """

    ids: NDArray[Any]
    mask: NDArray[Any]
    positions: NDArray[Any]
    ends: NDArray[Any]
    index: pl.DataFrame
    splits: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Said:
    """A message as it came in: text, role (prompter or assistant), parent's id, split."""

    text: str
    role: str
    parent: str | None
    split: str


@dataclass(frozen=True)
class Chunk:
    """Some sequences, flattened, with the messages in them; tokens and messages are numbered within the chunk.

    Attributes:
        ids: (N,) token ids; `mask`, `positions` and `ends` likewise.
        block: T.
        index: The rows of the index, M of them.
        start: (M,) first token of each message; `stop` one past its last.
        parent: (M,) message that holds the parent's tokens, -1 at a root, -2 for one of an earlier chunk.
    """

    ids: Ints
    mask: Ints
    positions: Ints
    ends: Ints
    block: int
    index: pl.DataFrame
    start: Ints
    stop: Ints
    parent: Ints

    @cached_property
    def names(self) -> list[str]:
        """Id of each message."""
        return self.index["message_id"].to_list()

    @cached_property
    def owner(self) -> Ints:
        """(N,) message of each token, -1 in padding."""
        owner = np.full(len(self.ids), -1, np.int64)
        owner[_ranges(self.start, self.stop)] = np.repeat(np.arange(len(self.start)), self.stop - self.start)
        return owner

    @cached_property
    def replies(self) -> NDArray[np.bool_]:
        """(M,) whether a message is an assistant's."""
        return (self.index["role"] == "assistant").to_numpy()

    @cached_property
    def leaves(self) -> NDArray[np.bool_]:
        """(M,) whether no message of the sequence goes on from this one."""
        leaves = np.ones(len(self.start), np.bool_)
        leaves[self.parent[self.parent >= 0]] = False
        return leaves

    def named(self, token: int) -> str:
        """Name the message of a token, or the last one before it, if it is padding."""
        place = int(np.searchsorted(self.start, token, side="right")) - 1
        return self.names[max(place, 0)] if self.names else "none"


def check(written: Written, dialect: Dialect, said: Mapping[tuple[str, str], Said]) -> int:
    """Return how many rows of the index were encoded again and found equal.

    Args:
        written: What the encode step wrote.
        dialect: Its exported tokenizer and template.
        said: The messages of the input, by tree id and message id.

    Raises:
        GateError: At the first fault; it names the message.
    """
    _sources(written, said)
    drawn = _drawn(written.index, said)
    again = lru_cache(maxsize=100_000)(dialect.encode)  # threads repeat their first messages
    with bar("gate", written.index.height, "messages") as shown:
        for chunk in _chunks(written):
            for rule in RULES:
                rule(chunk, dialect)
            _texts(chunk, dialect, again, said, drawn)
            shown.advance(len(chunk.start))
    return sum(name in drawn for name in written.index["message_id"])


def _fail(code: str, message: str, what: str) -> NoReturn:
    raise GateError(what, f"message {message}", DO, f"gate.{code}")


def _sources(written: Written, said: Mapping[tuple[str, str], Said]) -> None:
    """Every row of the index is a message of the input, in its split, and goes on from its own parent."""
    index = written.index
    split_of = {
        sequence: split for split, (first, last) in written.splits.items() for sequence in range(first, last)
    }  # fmt: skip
    names = index["message_id"].to_list()
    columns = ("message_tree_id", "sequence", "parent", "role", "split")
    for name, tree, sequence, parent, role, split in zip(names, *(index[c].to_list() for c in columns), strict=True):
        source = said.get((tree, name))
        if source is None:
            _fail("source", name, "is not in the input")
        above = None if parent is None else names[parent]
        found, expected = (above, role, split), (source.parent, source.role, source.split)
        if found != expected:
            _fail("source", name, f"expected parent, role and split {expected}, found {found}")
        if split_of.get(sequence) != split:
            _fail("split", name, f"belongs to {split} and lies in sequence {sequence} of {split_of.get(sequence)}")


def _drawn(index: pl.DataFrame, said: Mapping[tuple[str, str], Said]) -> set[str]:
    """Return the ids of the messages whose texts are encoded again."""
    ids = set(zip(index["message_tree_id"].to_list(), index["message_id"].to_list(), strict=True))
    chars = sum(len(said[key].text) for key in ids)
    share = min(1.0, CHARS / max(chars, 1))
    return {name for _, name in ids if _lot(name) <= share}


def _lot(name: str) -> float:
    """Return a number from 0 to 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 0xFFFFFFFF


def _chunks(written: Written) -> Iterator[Chunk]:
    """Yield the sequences in chunks, each with its rows of the index."""
    count, block = written.ids.shape
    sequence = written.index["sequence"].to_numpy()
    if len(sequence) and (np.any(np.diff(sequence) < 0) or sequence[0] < 0 or sequence[-1] >= count):
        raise GateError(f"the index is not sorted by sequence, 0 to {count - 1}", "", DO, "gate.index")
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        low, high = np.searchsorted(sequence, [first, last])
        index = written.index[int(low) : int(high)]
        base = (index["sequence"].to_numpy().astype(np.int64) - first) * block
        start, stop = (base + index[name].to_numpy() for name in ("start", "stop"))
        parent = (index["parent"] - int(low)).clip(lower_bound=-2).fill_null(-1).to_numpy()
        yield Chunk(
            ids=_flat(written.ids[first:last]),
            mask=_flat(written.mask[first:last]),
            positions=_flat(written.positions[first:last]),
            ends=_flat(written.ends[first:last]),
            block=block,
            index=index,
            start=start,
            stop=stop,
            parent=parent,
        )


def _flat(array: NDArray[Any]) -> Ints:
    return array.reshape(-1).astype(np.int64)


def _ranges(start: Ints, stop: Ints) -> Ints:
    """Return all numbers of the ranges start[i]..stop[i], one range after another."""
    sizes = stop - start
    return np.repeat(start - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))


def known_ids(chunk: Chunk, dialect: Dialect) -> None:
    """Every id stands for something: the rows that only pad the table are never used."""
    for token in np.flatnonzero(chunk.ids >= dialect.used)[:1]:
        _fail("id", chunk.named(token), f"holds id {chunk.ids[token]}, the vocabulary ends at {dialect.used - 1}")


def ranges(chunk: Chunk, dialect: Dialect) -> None:
    """Messages lie in order, apart, inside one sequence, each after the parent that it names."""
    sequence = chunk.index["sequence"].to_numpy()
    inside = chunk.start // chunk.block == (chunk.stop - 1) // chunk.block
    good = (chunk.start < chunk.stop) & inside
    good[1:] &= chunk.start[1:] >= chunk.stop[:-1]
    good &= (chunk.parent >= -1) & (chunk.parent < np.arange(len(good)))
    replies = np.flatnonzero(good & (chunk.parent >= 0))
    good[replies] = sequence[chunk.parent[replies]] == sequence[replies]
    for message in np.flatnonzero(~good)[:1]:
        row = chunk.index.row(int(message))
        _fail("range", chunk.names[message], f"has a range that is empty, overlaps or leaves its sequence: {row}")


def padding(chunk: Chunk, dialect: Dialect) -> None:
    """What belongs to no message is padding, which is never trained on and sees only itself."""
    rest = np.flatnonzero(chunk.owner < 0)
    good = (chunk.ids[rest] == dialect.pad) & (chunk.mask[rest] == 0) & (chunk.positions[rest] == 0)
    good &= chunk.ends[rest] == rest % chunk.block + 1
    for token in rest[~good][:1]:
        place = token % chunk.block
        _fail("padding", chunk.named(token), f"is followed by token {place}, which is neither text nor padding")


def only_replies(chunk: Chunk, dialect: Dialect) -> None:
    """Only an assistant's tokens are trained on, and never the first token of a conversation."""
    targets = np.flatnonzero(chunk.mask)
    targets = targets[chunk.owner[targets] >= 0]
    for token in targets[~chunk.replies[chunk.owner[targets]]][:1]:
        _fail("mask", chunk.named(token), "is not an assistant's, and one of its tokens is trained on")
    roots = np.flatnonzero(chunk.parent < 0)
    for message in roots[chunk.mask[chunk.start[roots]] != 0][:1]:
        _fail("first", chunk.names[message], "has its first token trained on, which nothing comes before")


def turns_end(chunk: Chunk, dialect: Dialect) -> None:
    """Every conversation teaches something, and every reply teaches to stop."""
    targets = np.append(0, np.cumsum(chunk.mask))
    trained = targets[chunk.stop] - targets[chunk.start]
    document = np.cumsum(chunk.parent < 0) - 1
    roots = np.flatnonzero(chunk.parent < 0)
    for place in np.flatnonzero(np.bincount(document, trained, len(roots)) == 0)[:1]:
        _fail("untrained", chunk.names[roots[place]], "opens a conversation with nothing to train on")
    latest = np.maximum.accumulate(np.where(chunk.mask != 0, np.arange(len(chunk.ids)), 0))[chunk.stop - 1]
    for message in np.flatnonzero(chunk.replies & ((trained == 0) | (chunk.ids[latest] != dialect.stop)))[:1]:
        found = chunk.ids[latest[message]] if trained[message] else "nothing"
        what = f"must have the end of its turn, id {dialect.stop}, trained on last; found {found}"
        _fail("stop", chunk.names[message], what)
    noted = chunk.index["trained"].to_numpy()
    for message in np.flatnonzero(trained != noted)[:1]:
        what = f"has {trained[message]} trained tokens, its index says {noted[message]}"
        _fail("mask", chunk.names[message], what)


def whole_replies(chunk: Chunk, dialect: Dialect) -> None:
    """A reply is trained on from the first token of its text to the end of its turn, without a gap."""
    tags = dialect.tags
    head = len(tags.opens["assistant"]) + len(tags.start) * (chunk.parent < 0)
    first, last = chunk.start + head, chunk.stop - len(tags.tail) * chunk.leaves
    expected = np.zeros(len(chunk.ids), np.int64)
    expected[_ranges(first[chunk.replies], last[chunk.replies])] = 1
    for token in np.flatnonzero(expected != chunk.mask)[:1]:
        what = f"token {token % chunk.block}: expected mask {expected[token]}, found {chunk.mask[token]}"
        _fail("mask", chunk.named(token), what)


def no_forged_ids(chunk: Chunk, dialect: Dialect) -> None:
    """No special id comes out of a text: a message holds those of its template and no more."""
    special = np.isin(chunk.ids, list(dialect.specials.values()))
    seen = np.append(0, np.cumsum(special))
    tags, ours = dialect.tags, set(dialect.specials.values())

    def count(ids: list[int]) -> int:
        return sum(token in ours for token in ids)

    of_role = {role: count(tags.opens[role]) + count(tags.closes[role]) for role in tags.opens}
    expected = np.where(chunk.replies, of_role["assistant"], of_role["user"])
    expected = expected + count(tags.start) * (chunk.parent < 0) + count(tags.tail) * chunk.leaves
    found = seen[chunk.stop] - seen[chunk.start]
    for message in np.flatnonzero(found != expected)[:1]:
        what = f"holds {found[message]} special ids, its template writes {expected[message]}"
        _fail("special", chunk.names[message], what)


def visibility(chunk: Chunk, dialect: Dialect) -> None:
    """A token sees what came before it in its conversation and nothing else; positions count along that."""
    sizes = (chunk.stop - chunk.start).tolist()
    before, end, parent = [0] * len(sizes), chunk.stop.tolist(), chunk.parent.tolist()
    for message, above in enumerate(parent):
        before[message] = before[above] + sizes[above] if above >= 0 else 0
    for message in range(len(parent) - 1, -1, -1):
        if (above := parent[message]) >= 0:
            end[above] = max(end[above], end[message])
    tokens = np.flatnonzero(chunk.owner >= 0)
    owner = chunk.owner[tokens]
    positions = tokens - chunk.start[owner] + np.array(before, np.int64)[owner]
    ends = np.array(end, np.int64)[owner] - tokens // chunk.block * chunk.block
    for name, all_found, expected in (("positions", chunk.positions, positions), ("ends", chunk.ends, ends)):
        found = all_found[tokens]
        for place in np.flatnonzero(found != expected)[:1]:
            token = int(tokens[place])
            what = f"token {token % chunk.block}: expected {name} {expected[place]}, found {found[place]}"
            _fail(name, chunk.named(token), what)


RULES: tuple[Callable[[Chunk, Dialect], None], ...] = (
    ranges, known_ids, padding, only_replies, turns_end, no_forged_ids, whole_replies, visibility,
)  # fmt: skip


def _texts(
    chunk: Chunk,
    dialect: Dialect,
    again: Callable[[str], list[int]],
    said: Mapping[tuple[str, str], Said],
    drawn: set[str],
) -> None:
    """The ids are those of the exported tokenizer, so a prompt's ids are an exact prefix of the whole."""
    tags = dialect.tags
    trees = chunk.index["message_tree_id"].to_list()
    for message, name in enumerate(chunk.names):
        if name not in drawn:
            continue
        source = said[trees[message], name]
        role = ROLES[source.role]
        head = (tags.start if chunk.parent[message] < 0 else []) + tags.opens[role]
        foot = tags.closes[role] + (tags.tail if chunk.leaves[message] else [])
        found = chunk.ids[chunk.start[message] : chunk.stop[message]].tolist()
        text = again(source.text)
        if found == head + text + foot:
            continue
        kept = found[: len(head)] == head and (role == "assistant" or found[len(head) :] == text + foot)
        if not kept:
            _fail(
                "prefix", name, "has ids that no prompt would have: they differ from those that a model is asked with"
            )
        place = _differ(found, head + text + foot)
        _fail("tokenizer", name, f"has ids that the exported tokenizer does not give its text, from token {place} on")


def _differ(found: list[int], expected: list[int]) -> int:
    pairs = enumerate(zip(found, expected, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(found), len(expected)))
