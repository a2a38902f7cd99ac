"""The gate: reads encoded data back from disk and refuses what must not reach training.

It trusts nothing of the writer: it sees only the arrays, the index, the exported tokenizer and the messages themselves,
and works out from these what must stand there.

- Structure is checked for every token: ranges, masks, positions, who sees whom, special ids, padding.
- The bytes of every message are checked: its ids stand for as many of each byte as its text has. A text that was cut,
  exchanged or altered is found; one whose parts changed places is not.
- Texts are encoded again with the `tokenizers` library and compared id by id: all of them up to `SAMPLE` bytes; above
  that, texts drawn by a hash of their bytes, as many as come to about that much. The library makes half a million
  tokens a second, a quarter of what tiktoken does, so reading all again would take four times as long as encoding.

Texts are encoded again by `Again`, over threads or a cluster. Structure is in `rules`, the input's side in `said`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import polars as pl
import pyarrow as pa
from tokenizers import Tokenizer

from tasks.progress import bar
from tasks.text.gate_checks import RULES, trained_as_often
from tasks.text.gate_reader import Chunk, Ints, Written, chunks, fail
from tasks.text.gate_source import Said, read_said, sources, weights
from tasks.text.templates import Dialect, sound

Again = Callable[[pl.Series], pa.Table]  # texts -> `ids`, a list for each, of the exported tokenizer


def check(written: Written, dialect: Dialect, messages: pl.LazyFrame, again: Again | None = None) -> int:
    """Return how many rows of the index were encoded again and found equal.

    Args:
        written: What the encode step wrote.
        dialect: Its exported tokenizer and template.
        messages: The input: the columns `SAID`.
        again: What encodes texts again; None: the dialect, here and now.

    Raises:
        GateError: At the first fault; it names the message.
    """
    said = read_said(messages, sources(written, messages))
    expected = _expected(said, again or partial(_again, dialect))
    of_id = weights(dialect)
    with bar("gate", written.index.height, "messages") as shown:
        for chunk in chunks(written, said.row):
            for rule in RULES:
                rule(chunk, dialect)
            _encoded_again(chunk, dialect, expected, said)
            _same_bytes(chunk, dialect, of_id, said)
            shown.advance(len(chunk.start))
    trained_as_often(written, said.row)
    return int(said.drawn[said.row].sum())


def ids_again(tokenizer: str, texts: pa.StringArray) -> pa.RecordBatch:
    """Encode texts as the `tokenizers` library does: `ids`, a list of uint16 for each.

    Args:
        tokenizer: What `tokenizer.json` holds.
        texts: N plain texts.
    """
    if not len(texts):  # asked for the columns alone: the tokenizer need not be made for that
        return pa.record_batch({"ids": pa.array([], pa.list_(pa.uint16()))})
    plain = [sound(text) for text in texts.to_pylist()]
    ids = [one.ids for one in engine(tokenizer).encode_batch_fast(plain, add_special_tokens=False)]
    return pa.record_batch({"ids": pa.array(ids, pa.list_(pa.uint16()))})


@lru_cache(maxsize=1)
def engine(tokenizer: str) -> Tokenizer:
    """Return what `tokenizer.json` describes; one is kept, since it takes a tenth of a second to make."""
    made = Tokenizer.from_str(tokenizer)
    made.encode_special_tokens = True  # as `Dialect` has it
    return made


def _again(dialect: Dialect, texts: pl.Series) -> pa.Table:
    return pa.table({"ids": pa.array([dialect.encode(text) for text in texts], pa.list_(pa.uint16()))})


def _expected(said: Said, again: Again) -> dict[int, list[int]]:
    """Return the ids of the drawn texts, by row of the input."""
    return dict(zip(np.flatnonzero(said.drawn).tolist(), again(said.text).column("ids").to_pylist(), strict=True))


def _encoded_again(chunk: Chunk, dialect: Dialect, of_row: dict[int, list[int]], said: Said) -> None:
    """The ids are those of the exported tokenizer, so a prompt's ids are an exact prefix of the whole."""
    tags = dialect.tags
    for message in np.flatnonzero(said.drawn[chunk.row]).tolist():
        role = "assistant" if chunk.replies[message] else "user"
        head = (tags.start if chunk.parent[message] < 0 else []) + tags.opens[role]
        foot = tags.closes[role] + (tags.tail if chunk.leaves[message] else [])
        expected = head + of_row[int(chunk.row[message])] + foot
        found = chunk.ids[chunk.start[message] : chunk.stop[message]].tolist()
        if found == expected:
            continue
        name = chunk.names[message]
        if role == "user" or found[: len(head)] != head:
            what = "has ids that no prompt would have: they differ from those that a model is asked with"
            fail("prefix", name, what)
        what = f"has ids that the exported tokenizer does not give its text, from token {_differ(found, expected)} on"
        fail("tokenizer", name, what)


def _same_bytes(chunk: Chunk, dialect: Dialect, of_id: Ints, said: Said) -> None:
    """The ids of a message stand for the bytes of its text."""
    tags = dialect.tags

    def weight(ids: list[int]) -> int:
        return int(of_id[ids].sum())

    of_role = {role: weight(tags.opens[role]) + weight(tags.closes[role]) for role in tags.opens}
    around = np.where(chunk.replies, of_role["assistant"], of_role["user"])
    around = around + weight(tags.start) * (chunk.parent < 0) + weight(tags.tail) * chunk.leaves
    found = chunk.summed(of_id[chunk.ids]) - around
    for message in np.flatnonzero(found != said.weight[chunk.row])[:1]:
        fail("bytes", chunk.names[message], "has ids that stand for other bytes than those of its text")


def _differ(found: list[int], expected: list[int]) -> int:
    pairs = enumerate(zip(found, expected, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(found), len(expected)))
