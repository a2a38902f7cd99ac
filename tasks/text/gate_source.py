"""What the messages of the input say, as far as the gate compares it: where each stands, and the bytes of its text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.text.bpe import BYTES
from tasks.text.gate_reader import Ints, Written, fail
from tasks.text.templates import Dialect

SAMPLE = 500_000  # UTF-8 bytes: about 150,000 tokens, a third of a second
WINDOW = 1 << 16  # messages whose texts are in memory at a time
SLICE = 1 << 19  # rows of the index looked up at a time: a join copies their names
AT_ONCE = 1 << 10  # texts weighed at a time: half a MB, which caches hold
SAID = ("message_tree_id", "message_id", "parent_id", "role", "split", "text")  # what is asked of the input
WEIGHTS = bytes(np.random.default_rng(0).permutation(256).astype(np.uint8))  # of bytes, so that a swap shows in a sum
COUNT = 1 << 40  # weight that each byte has besides: sums of the others stay below it


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
    text: pl.Series


def read_said(messages: pl.LazyFrame, row: Ints) -> Said:
    """Weigh the texts of the input, and keep those that are to be encoded again.

    Args:
        messages: The input.
        row: (rows of the index,) which row of the input each is.
    """
    count = messages.select(pl.len()).collect().item()
    texts = messages.select("text")
    windows = (texts.slice(first, WINDOW).collect() for first in range(0, count, WINDOW))
    weighed = [_weighed(some["text"]) for window in windows for some in window.iter_slices(AT_ONCE)]
    weight = np.concatenate([np.zeros(0, np.int64), *weighed])
    used = np.zeros(count, np.bool_)
    used[row] = True
    share = min(1.0, SAMPLE / max(int((weight[used] // COUNT).sum()), 1))
    drawn = used & (_lots(weight) <= share)
    return Said(row, weight, drawn, texts.filter(pl.lit(pl.Series(drawn))).collect()["text"])


def _lots(weight: Ints) -> NDArray[np.float64]:
    """Return a number from 0 to 1 for each text, which depends on its bytes alone."""
    mixed = weight.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # the high bits of which depend on all of it
    mixed ^= mixed >> np.uint64(32)
    return (mixed * np.uint64(0xD6E8FEB86659FD93)).astype(np.float64) / 2.0**64


def sources(written: Written, messages: pl.LazyFrame) -> Ints:
    """Every row of the index is a message of the input, in its split, and goes on from its own parent.

    Returns:
        (rows of the index,) rows of the input.
    """
    names = ["message_tree_id", "message_id"]
    theirs = messages.drop("text").collect().with_row_index("row")
    index = written.index
    keys, places = index.select(names), theirs.select(*names, "row")
    slices = (keys[first : first + SLICE] for first in range(0, max(len(keys), 1), SLICE))
    row = pl.concat([some.join(places, on=names, how="left", maintain_order="left")["row"] for some in slices])
    for place in np.flatnonzero(row.is_null().to_numpy())[:1]:
        fail("source", index["message_id"][int(place)], "is not in the input")
    found = index.select(pl.col("message_id").gather(pl.col("parent")).alias("parent_id"), "role", "split")
    expected = theirs[row].select(found.columns)
    same = pl.all_horizontal(pl.col(name).eq_missing(expected[name]) for name in found.columns)
    for place in np.flatnonzero(~found.select(same.alias("same"))["same"].to_numpy())[:1]:
        what = f"expected parent, role and split {expected.row(int(place))}, found {found.row(int(place))}"
        fail("source", index["message_id"][int(place)], what)
    _in_their_splits(written)
    return row.to_numpy().astype(np.int64)


def _in_their_splits(written: Written) -> None:
    sequence = written.index["sequence"].to_numpy()
    for split, (first, last) in written.splits.items():
        outside = (written.index["split"] == split).to_numpy() & ((sequence < first) | (sequence >= last))
        for place in np.flatnonzero(outside)[:1]:
            what = f"belongs to {split} and lies in sequence {sequence[place]}, outside {first} to {last}"
            fail("split", written.index["message_id"][int(place)], what)


def _weighed(texts: pl.Series) -> Ints:
    """Return the weight of each text."""
    column = texts.to_arrow(compat_level=pl.CompatLevel.oldest())  # one buffer of bytes, and where each text starts
    _, places, content = column.buffers()
    return _weight(content.to_pybytes(), np.frombuffer(places, np.int64)[column.offset :][: len(column) + 1])


def _weight(content: bytes, offsets: Ints) -> Ints:
    """Return the weight of each piece of some bytes: `COUNT` a byte, and the sum of the bytes' `WEIGHTS`."""
    values = np.frombuffer(content.translate(WEIGHTS), np.uint8)[: offsets[-1]]
    sizes: Ints = np.diff(offsets)
    full = sizes > 0  # `reduceat` would give an empty piece the byte that follows it
    sums = np.zeros(len(sizes), np.int64)
    sums[full] = np.add.reduceat(values, offsets[:-1][full], dtype=np.int64)
    return sums + sizes * COUNT


def weights(dialect: Dialect) -> Ints:
    """Return the weight of the bytes that each id stands for; special ones and those that pad the table: none."""
    plain = {number: token for token, number in dialect.vocabulary().items() if token not in dialect.specials}
    pieces = [token.translate(BYTES).encode("latin-1") for token in plain.values()]
    found = np.zeros(dialect.vocab_size, np.int64)
    found[list(plain)] = _weight(b"".join(pieces), np.append(0, np.cumsum([*map(len, pieces)])))
    return found
