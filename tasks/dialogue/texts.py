"""The texts of messages, read from disk a window at a time: all of them would fill the memory.

They are asked for some seven times, by rules, by comparisons and by what is written. So the first ones stay in memory,
as many as a dataset like OASST2 has; of a larger one the rest is read each time.

What is compared are the user's own words: what a system message put before them stands before a thousand others, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from tasks.dialogue import pii

WINDOW = 1 << 16  # messages whose texts are in memory at once
HELD = 128 << 20  # bytes of texts that stay there: those of OASST2 are 75 MB

BETWEEN = "\n\n"  # the words of a system message and the user's

I64 = NDArray[np.int64]
Masks = Mapping[int, tuple[str, str]]  # row -> its text without what is personal, and what that was


@dataclass(frozen=True)
class Texts:
    """The texts of N messages.

    Attributes:
        messages: N rows with text.
        masks: What stands in place of some texts.
        held: By number, windows that stay in memory, as published.
        opens: (N,) where the user's own words open, and texts are given from; None: whole texts are given.
    """

    messages: pl.LazyFrame
    masks: Masks = field(default_factory=dict)
    held: dict[int, pl.Series] = field(default_factory=dict)
    opens: I64 | None = None

    def between(self, start: int, stop: int) -> pl.Series:
        """Return the texts of the rows from one on and up to another: (stop - start,) `text`."""
        numbers = range(start // WINDOW, max(-(-stop // WINDOW), start // WINDOW + 1))
        parts = [self._window(number, start, stop) for number in numbers]
        texts = pl.concat(parts) if len(parts) > 1 else parts[0]
        if self.opens is not None:
            texts = own_words(texts, self.opens[start : start + len(texts)])
        return masked(texts, self.masks, start)

    def _window(self, number: int, start: int, stop: int) -> pl.Series:
        """Return those texts of a window that stand in a range."""
        first = number * WINDOW
        start, stop = max(start, first), min(stop, first + WINDOW)
        if number not in self.held:
            if sum(texts.estimated_size() for texts in self.held.values()) >= HELD:
                return self._read(start, stop)
            self.held[number] = self._read(first, first + WINDOW)
        return self.held[number].slice(start - first, stop - start)

    def _read(self, start: int, stop: int) -> pl.Series:
        return self.messages.slice(start, stop - start).select("text").collect()["text"]

    def of(self, rows: I64) -> pa.Array:
        """Return the texts of some rows, which stand in order: (rows,)."""
        found = [part.gather(within).to_arrow().cast(pa.large_string()) for part, within in self.parts(rows)]
        return pa.concat_arrays(found) if found else pa.array([], pa.large_string())

    def parts(self, rows: I64) -> Iterator[tuple[pl.Series, I64]]:
        """Yield windows of texts and the places of the asked rows in them; windows without any are not read."""
        for window in np.split(rows, np.flatnonzero(np.diff(rows // WINDOW)) + 1) if len(rows) else []:
            start = int(window[0] // WINDOW) * WINDOW
            yield self.between(start, start + WINDOW), window - start


def masked(texts: pl.Series, masks: Masks, first: int) -> pl.Series:
    """Put what stands in their place into the texts of the rows from `first` on."""
    here = [row for row in range(first, first + len(texts)) if row in masks] if masks else []
    if not here:
        return texts
    return texts.scatter([row - first for row in here], pl.Series([masks[row][0] for row in here], dtype=pl.String))


def opening(messages: pl.LazyFrame, name: str) -> I64 | None:
    """Return how many characters stand before the user's own words in first prompts, as `extra` says under a name.

    Args:
        messages: N rows: parent_id, extra.
        name: Of the number.

    Returns:
        (N,), 0 where nothing is said; None: nowhere. A file may say what it likes: `own_words` looks whether it is so.
    """
    said = pl.col("extra").str
    noted = pl.col("parent_id").is_null() & said.contains(f'"{name}":', literal=True)
    table = messages.select("parent_id", "extra").with_row_index("row").filter(noted)
    whole = said.json_path_match(f"$.{name}").str.extract("^([1-9][0-9]{0,8})$").cast(pl.Int64)
    found = table.select("row", whole.alias("opens")).drop_nulls().collect()
    if found.is_empty():
        return None
    opens = np.zeros(messages.select(pl.len()).collect().item(), np.int64)
    opens[found["row"].to_numpy()] = found["opens"].to_numpy()
    return opens


def opening_once_masked(texts: Texts, masks: Masks, name: str) -> dict[int, int]:
    """Return how many characters will stand before the user's own words in what is masked: by row, where any do.

    Args:
        texts: As published; of its messages, `extra` says under `name` how many there are.
        masks: What will stand in place of some texts.
        name: Of the number.
    """
    opens = opening(texts.messages, name)
    if opens is None:
        return {}
    rows = sorted(row for row in masks if opens[row])
    said = texts.of(np.array(rows, np.int64)).to_pylist()
    return {row: len(pii.masked(text[: opens[row]])[0]) for row, text in zip(rows, said, strict=True)}


def noted(extra: pl.Series, numbers: Mapping[int, int], first: int, name: str) -> pl.Series:
    """Put other numbers under a name into `extra` of the rows from `first` on."""
    here = [row for row in numbers if first <= row < first + len(extra)]
    if not here:
        return extra
    new = [re.sub(rf'"{name}":\d+', f'"{name}":{numbers[row]}', extra[row - first], count=1) for row in here]
    return extra.scatter([row - first for row in here], pl.Series(new, dtype=pl.String))


def own_words(texts: pl.Series, opens: I64) -> pl.Series:
    """Leave out what stands before the user's words, if it ends in an empty line and they follow.

    Args:
        texts: (N,).
        opens: (N,) characters to leave out.
    """
    at = np.flatnonzero(opens)
    if not len(at):
        return texts
    own = [
        text[start:] if start < len(text) and text[:start].endswith(BETWEEN) else text
        for text, start in zip(texts.gather(at).to_list(), opens[at].tolist(), strict=True)
    ]
    return texts.scatter(at, pl.Series(own, dtype=pl.String))


def said(texts: Texts, own: Texts, start: int, stop: int) -> pl.DataFrame:
    """Return texts, and of each what the user said, null where that is all: (stop - start,) `text` and `own`."""
    window = texts.between(start, stop).to_frame("text")
    if own.opens is None:
        return window.with_columns(own=pl.lit(None, pl.String))
    part = own.between(start, stop)
    return window.with_columns(own=pl.when(part != window["text"]).then(part))


def compared(own: Texts, masks: Masks, personal: Callable[[pl.Series], pl.DataFrame]) -> Texts:
    """Return the texts that are compared: what the user said, without what is personal in it.

    Args:
        own: What the user said.
        masks: What stands in place of whole texts.
        personal: Gives `masked`, a text without what is personal, or null, and `personal`, what that was.
    """
    if own.opens is None:
        return replace(own, masks=masks)
    found = {row: mask for row, mask in masks.items() if not own.opens[row]}
    cut = np.array(sorted(masks.keys() - found.keys()), np.int64)
    done = 0
    for part, within in own.parts(cut):
        rows = pl.Series("row", cut[done : done + len(within)])
        hit = personal(part.gather(within)).with_columns(rows).drop_nulls("masked")
        found |= {row: (text, what) for row, text, what in hit.select("row", "masked", "personal").iter_rows()}
        done += len(within)
    return replace(own, masks=found)
