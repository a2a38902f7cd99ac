"""The texts of messages, read from disk a window at a time: all of them would fill the memory.

They are asked for some seven times, by rules, by comparisons and by what is written. So the first ones stay in memory,
as many as a dataset like OASST2 has; of a larger one the rest is read each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

WINDOW = 1 << 16  # messages whose texts are in memory at once
HELD = 128 << 20  # bytes of texts that stay there: those of OASST2 are 75 MB

Masks = Mapping[int, tuple[str, str]]  # row -> its text without what is personal, and what that was


@dataclass(frozen=True)
class Texts:
    """The texts of N messages.

    Attributes:
        messages: N rows with text.
        masks: What stands in place of some texts.
        held: By number, windows that stay in memory, as published.
    """

    messages: pl.LazyFrame
    masks: Masks = field(default_factory=dict)
    held: dict[int, pl.Series] = field(default_factory=dict)

    def between(self, start: int, stop: int) -> pl.Series:
        """Return the texts of the rows from one on and up to another: (stop - start,) `text`."""
        numbers = range(start // WINDOW, max(-(-stop // WINDOW), start // WINDOW + 1))
        parts = [self._window(number, start, stop) for number in numbers]
        return masked(pl.concat(parts) if len(parts) > 1 else parts[0], self.masks, start)

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

    def of(self, rows: NDArray[np.int64]) -> pa.Array:
        """Return the texts of some rows, which stand in order: (rows,)."""
        found = [part.gather(within).to_arrow().cast(pa.large_string()) for part, within in self.parts(rows)]
        return pa.concat_arrays(found) if found else pa.array([], pa.large_string())

    def parts(self, rows: NDArray[np.int64]) -> Iterator[tuple[pl.Series, NDArray[np.int64]]]:
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
