"""The gate: reads encoded data back from disk and refuses what must not reach training.

It trusts nothing of the writer: it sees only the arrays, the index, the exported tokenizer and the messages themselves,
and works out from these what must stand there.

- Structure is checked for every token: ranges, masks, positions, who sees whom, special ids, padding.
- The bytes of every message are checked: its ids stand for as many of each byte as its text has. A text that was cut,
  exchanged or altered is found; one whose parts changed places is not.
- Texts are encoded again with the `tokenizers` library and compared id by id: all of them up to `SAMPLE` bytes; above
  that, messages drawn by a hash of their id, as many as come to about that much. The library makes half a million
  tokens a second, a quarter of what tiktoken does, so reading all again would take four times as long as encoding.

Shapes: S sequences of T tokens; a chunk flattens some sequences to N tokens, and holds M messages of the index.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NoReturn

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.errors import GateError
from tasks.progress import bar
from tasks.text.bpe import BYTE_OF
from tasks.text.chat import Dialect
from tasks.text.lay import ranges as spread

Ints = NDArray[np.int64]
SAMPLE = 500_000  # UTF-8 bytes: about 150,000 tokens, a third of a second
CHUNK = 256  # sequences read at a time: 2 MB an array at a block of 1,024, which caches hold
WINDOW = 1 << 16  # messages whose texts are in memory at a time
AT_ONCE = 1 << 10  # texts weighed at a time: half a MB, which caches hold
SAID = ("message_tree_id", "message_id", "parent_id", "role", "split", "text")  # what is asked of the input
WEIGHTS = bytes(np.random.default_rng(0).permutation(256).astype(np.uint8))  # of bytes, so that a swap shows in a sum
COUNT = 1 << 40  # weight that each byte has besides: sums of the others stay below it
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
        once: Whether each reply is to be trained exactly once, wherever else it stands as context.
    """

    ids: NDArray[Any]
    mask: NDArray[Any]
    positions: NDArray[Any]
    ends: NDArray[Any]
    index: pl.DataFrame
    splits: Mapping[str, tuple[int, int]]
    once: bool = False


@dataclass(frozen=True)
class Said:
    """The messages of the input as far as they are compared; R rows.

    Attributes:
        row: (rows of the index,) which row of the input each is.
        weight: (R,) sum of the `WEIGHTS` of the bytes of a text.
        drawn: (R,) whether the text is encoded again.
        text: Texts of the drawn rows.
    """

    row: Ints
    weight: Ints
    drawn: NDArray[np.bool_]
    text: Mapping[int, str]


@dataclass(frozen=True)
class Chunk:
    """Some sequences, flattened, with the messages in them; tokens and messages are numbered within the chunk.

    Attributes:
        ids: (N,) token ids; `mask`, `positions` and `ends` likewise, all of them as they lie on disk.
        block: T.
        index: The rows of the index, M of them.
        row: (M,) which row of the input each message is.
        start: (M,) first token of each message; `stop` one past its last.
        parent: (M,) message that holds the parent's tokens, -1 at a root, -2 for one of an earlier chunk.
    """

    ids: NDArray[Any]
    mask: NDArray[Any]
    positions: NDArray[Any]
    ends: NDArray[Any]
    block: int
    index: pl.DataFrame
    row: Ints
    start: Ints
    stop: Ints
    parent: Ints

    @cached_property
    def names(self) -> list[str]:
        """Id of each message."""
        return self.index["message_id"].to_list()

    @cached_property
    def tokens(self) -> Ints:
        """(n,) tokens that belong to messages, in order."""
        return spread(self.start, self.stop)

    @cached_property
    def targets(self) -> Ints:
        """(M,) tokens of each message that are targets of the loss."""
        return self.summed(self.mask)

    def summed(self, values: NDArray[Any]) -> Ints:
        """Return the sum of the values (N,) of each message's tokens: (M,)."""
        sums = np.cumsum(values, dtype=np.int64)
        summed: Ints = sums[self.stop - 1] - sums[self.start] + values[self.start]
        return summed

    @cached_property
    def replies(self) -> NDArray[np.bool_]:
        """(M,) whether a message is an assistant's."""
        return (self.index["role"] == "assistant").to_numpy()

    @cached_property
    def taught(self) -> NDArray[np.bool_]:
        """(M,) whether a message is an assistant's, and trained here: not context of what is."""
        taught: NDArray[np.bool_] = self.replies & (self.index["trained"] > 0).to_numpy()
        return taught

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


def check(written: Written, dialect: Dialect, messages: pl.LazyFrame) -> int:
    """Return how many rows of the index were encoded again and found equal.

    Args:
        written: What the encode step wrote.
        dialect: Its exported tokenizer and template.
        messages: The input: the columns `SAID`.

    Raises:
        GateError: At the first fault; it names the message.
    """
    said = _said(messages, _sources(written, messages))
    again = lru_cache(maxsize=10_000)(dialect.encode)  # paths of a tree repeat their first messages
    weights = _weights(dialect)
    with bar("gate", written.index.height, "messages") as shown:
        for chunk in _chunks(written, said.row):
            for rule in RULES:
                rule(chunk, dialect)
            _encoded_again(chunk, dialect, again, said)
            _same_bytes(chunk, dialect, weights, said)
            shown.advance(len(chunk.start))
    _trained_as_often(written, said.row)
    return int(said.drawn[said.row].sum())


def _fail(code: str, message: str, what: str) -> NoReturn:
    raise GateError(what, f"message {message}", DO, f"gate.{code}")


def _sources(written: Written, messages: pl.LazyFrame) -> Ints:
    """Every row of the index is a message of the input, in its split, and goes on from its own parent.

    Returns:
        (rows of the index,) rows of the input.
    """
    names = ["message_tree_id", "message_id"]
    theirs = messages.drop("text").collect().with_row_index("row")
    index = written.index
    row = index.select(names).join(theirs.select(*names, "row"), on=names, how="left", maintain_order="left")["row"]
    for place in np.flatnonzero(row.is_null().to_numpy())[:1]:
        _fail("source", index["message_id"][int(place)], "is not in the input")
    found = index.select(pl.col("message_id").gather(pl.col("parent")).alias("parent_id"), "role", "split")
    expected = theirs[row].select(found.columns)
    same = pl.all_horizontal(pl.col(name).eq_missing(expected[name]) for name in found.columns)
    for place in np.flatnonzero(~found.select(same.alias("same"))["same"].to_numpy())[:1]:
        what = f"expected parent, role and split {expected.row(int(place))}, found {found.row(int(place))}"
        _fail("source", index["message_id"][int(place)], what)
    _in_their_splits(written)
    return row.to_numpy().astype(np.int64)


def _trained_as_often(written: Written, row: Ints) -> None:
    """Every reply is trained where it stands; of those that are to be trained once, one is, the others are context."""
    replies, trained = (written.index["role"] == "assistant").to_numpy(), (written.index["trained"] > 0).to_numpy()
    if written.once:
        times = np.bincount(row[trained], minlength=int(row.max(initial=-1)) + 1)
        odd = np.flatnonzero(replies & (times[row] != 1))
        wanted = "exactly once"
    else:
        odd, wanted, times = np.flatnonzero(replies & ~trained), "wherever it stands", trained
    for place in odd[:1]:
        found = times[row[place]] if written.once else "not"
        _fail("untrained", written.index["message_id"][int(place)], f"is to be trained {wanted}; found: {found}")


def _in_their_splits(written: Written) -> None:
    sequence = written.index["sequence"].to_numpy()
    for split, (first, last) in written.splits.items():
        outside = (written.index["split"] == split).to_numpy() & ((sequence < first) | (sequence >= last))
        for place in np.flatnonzero(outside)[:1]:
            what = f"belongs to {split} and lies in sequence {sequence[place]}, outside {first} to {last}"
            _fail("split", written.index["message_id"][int(place)], what)


def _said(messages: pl.LazyFrame, row: Ints) -> Said:
    """Weigh the texts of the input, and keep those that are to be encoded again."""
    ids = messages.select("message_id").collect()["message_id"]
    texts = messages.select("text")
    windows = (texts.slice(first, WINDOW).collect() for first in range(0, len(ids), WINDOW))
    weight = np.concatenate([_weighed(some["text"]) for window in windows for some in window.iter_slices(AT_ONCE)])
    used = np.zeros(len(ids), np.bool_)
    used[row] = True
    share = min(1.0, SAMPLE / max(int((weight[used] // COUNT).sum()), 1))
    drawn = used & (np.fromiter(map(_lot, ids), np.float64, len(ids)) <= share)
    kept = texts.filter(pl.lit(pl.Series(drawn))).collect()["text"]
    return Said(row, weight, drawn, dict(zip(np.flatnonzero(drawn).tolist(), kept, strict=True)))


def _lot(name: str) -> float:
    """Return a number from 0 to 1 that depends on the name alone."""
    mixed = zlib.crc32(name.encode()) * 0x9E3779B1  # of names that differ in a digit, the sums alone lie close together
    return (mixed & 0xFFFFFFFF) / 0xFFFFFFFF


def _weighed(texts: pl.Series) -> Ints:
    """Return the weight of each text: `COUNT` a byte, and the sum of the bytes' `WEIGHTS`."""
    column = texts.to_arrow(compat_level=pl.CompatLevel.oldest())  # one buffer of bytes, and where each text starts
    _, places, content = column.buffers()
    offsets = np.frombuffer(places, np.int64)[column.offset : column.offset + len(column) + 1]
    weights = np.frombuffer(content.to_pybytes().translate(WEIGHTS), np.uint8)[: offsets[-1]]
    sizes: Ints = np.diff(offsets)
    full = sizes > 0  # `reduceat` would give an empty text the byte that follows it
    sums = np.zeros(len(sizes), np.int64)
    sums[full] = np.add.reduceat(weights, offsets[:-1][full], dtype=np.int64)
    return sums + sizes * COUNT


def _weights(dialect: Dialect) -> Ints:
    """Return the weight of the bytes that each id stands for; special ones and those that pad the table: none."""
    weights = np.zeros(dialect.vocab_size, np.int64)
    of_char = {char: COUNT + WEIGHTS[byte] for char, byte in BYTE_OF.items()}.__getitem__
    for token, number in dialect.vocabulary().items():
        if token not in dialect.specials:
            weights[number] = sum(map(of_char, token))
    return weights


def _chunks(written: Written, row: Ints) -> Iterator[Chunk]:
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
            ids=written.ids[first:last].reshape(-1),
            mask=written.mask[first:last].reshape(-1),
            positions=written.positions[first:last].reshape(-1),
            ends=written.ends[first:last].reshape(-1),
            block=block,
            index=index,
            row=row[int(low) : int(high)],
            start=start,
            stop=stop,
            parent=parent,
        )


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
    free = np.ones(len(chunk.ids), np.bool_)
    free[chunk.tokens] = False
    rest = np.flatnonzero(free)
    good = (chunk.ids[rest] == dialect.pad) & (chunk.mask[rest] == 0) & (chunk.positions[rest] == 0)
    good &= chunk.ends[rest] == rest % chunk.block + 1
    for token in rest[~good][:1]:
        place = token % chunk.block
        _fail("padding", chunk.named(token), f"is followed by token {place}, which is neither text nor padding")


def only_replies(chunk: Chunk, dialect: Dialect) -> None:
    """Only an assistant's tokens are trained on, and never the first token of a conversation."""
    for message in np.flatnonzero(~chunk.replies & (chunk.targets > 0))[:1]:
        _fail("mask", chunk.names[message], "is not an assistant's, and one of its tokens is trained on")
    roots = np.flatnonzero(chunk.parent < 0)
    for message in roots[chunk.mask[chunk.start[roots]] != 0][:1]:
        _fail("first", chunk.names[message], "has its first token trained on, which nothing comes before")


def turns_end(chunk: Chunk, dialect: Dialect) -> None:
    """Every conversation teaches something, and every reply teaches to stop."""
    trained = chunk.targets
    document = np.cumsum(chunk.parent < 0) - 1
    roots = np.flatnonzero(chunk.parent < 0)
    for place in np.flatnonzero(np.bincount(document, trained, len(roots)) == 0)[:1]:
        _fail("untrained", chunk.names[roots[place]], "opens a conversation with nothing to train on")
    marked = np.append(-1, np.flatnonzero(chunk.mask))
    latest = marked[np.searchsorted(marked, chunk.stop) - 1]
    for message in np.flatnonzero(chunk.taught & ((trained == 0) | (chunk.ids[latest] != dialect.stop)))[:1]:
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
    expected = np.zeros(len(chunk.ids), np.uint8)
    expected[spread(first[chunk.taught], last[chunk.taught])] = 1
    for token in np.flatnonzero(expected != chunk.mask)[:1]:
        what = f"token {token % chunk.block}: expected mask {expected[token]}, found {chunk.mask[token]}"
        _fail("mask", chunk.named(token), what)


def no_forged_ids(chunk: Chunk, dialect: Dialect) -> None:
    """No special id comes out of a text: a message holds those of its template and no more."""
    special = np.zeros(1 << 16, np.bool_)
    special[list(dialect.specials.values())] = True
    tags, ours = dialect.tags, set(dialect.specials.values())

    def count(ids: list[int]) -> int:
        return sum(token in ours for token in ids)

    of_role = {role: count(tags.opens[role]) + count(tags.closes[role]) for role in tags.opens}
    expected = np.where(chunk.replies, of_role["assistant"], of_role["user"])
    expected = expected + count(tags.start) * (chunk.parent < 0) + count(tags.tail) * chunk.leaves
    found = chunk.summed(special[chunk.ids])
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
    depth = np.array(before, np.int64)
    last = np.array(end, np.int64) - chunk.start // chunk.block * chunk.block
    expected = {"positions": spread(depth, depth + chunk.stop - chunk.start), "ends": np.repeat(last, sizes)}
    for name, values in expected.items():
        found = getattr(chunk, name)[chunk.tokens]
        for place in np.flatnonzero(found != values)[:1]:
            token = int(chunk.tokens[place])
            what = f"token {token % chunk.block}: expected {name} {values[place]}, found {found[place]}"
            _fail(name, chunk.named(token), what)


RULES: tuple[Callable[[Chunk, Dialect], None], ...] = (
    ranges, known_ids, padding, only_replies, turns_end, no_forged_ids, whole_replies, visibility,
)  # fmt: skip


def _encoded_again(chunk: Chunk, dialect: Dialect, again: Callable[[str], list[int]], said: Said) -> None:
    """The ids are those of the exported tokenizer, so a prompt's ids are an exact prefix of the whole."""
    tags = dialect.tags
    for message in np.flatnonzero(said.drawn[chunk.row]).tolist():
        role = "assistant" if chunk.replies[message] else "user"
        head = (tags.start if chunk.parent[message] < 0 else []) + tags.opens[role]
        foot = tags.closes[role] + (tags.tail if chunk.leaves[message] else [])
        expected = head + again(said.text[int(chunk.row[message])]) + foot
        found = chunk.ids[chunk.start[message] : chunk.stop[message]].tolist()
        if found == expected:
            continue
        name = chunk.names[message]
        if role == "user" or found[: len(head)] != head:
            what = "has ids that no prompt would have: they differ from those that a model is asked with"
            _fail("prefix", name, what)
        what = f"has ids that the exported tokenizer does not give its text, from token {_differ(found, expected)} on"
        _fail("tokenizer", name, what)


def _same_bytes(chunk: Chunk, dialect: Dialect, weights: Ints, said: Said) -> None:
    """The ids of a message stand for the bytes of its text."""
    tags = dialect.tags

    def weight(ids: list[int]) -> int:
        return int(weights[ids].sum())

    of_role = {role: weight(tags.opens[role]) + weight(tags.closes[role]) for role in tags.opens}
    around = np.where(chunk.replies, of_role["assistant"], of_role["user"])
    around = around + weight(tags.start) * (chunk.parent < 0) + weight(tags.tail) * chunk.leaves
    found = chunk.summed(weights[chunk.ids]) - around
    for message in np.flatnonzero(found != said.weight[chunk.row])[:1]:
        _fail("bytes", chunk.names[message], "has ids that stand for other bytes than those of its text")


def _differ(found: list[int], expected: list[int]) -> int:
    pairs = enumerate(zip(found, expected, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(found), len(expected)))
