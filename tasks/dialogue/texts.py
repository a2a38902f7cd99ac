"""The texts of messages, read from disk a window at a time: all of them would fill the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

WINDOW = 1 << 16  # messages whose texts are in memory at once

Masks = Mapping[int, tuple[str, str]]  # row -> its text without what is personal, and what that was


@dataclass(frozen=True)
class Texts:
    """The texts of N messages.

    Attributes:
        messages: N rows with text.
        masks: What stands in place of some texts.
    """

    messages: pl.LazyFrame
    masks: Masks = field(default_factory=dict)

    def between(self, start: int, stop: int) -> pl.Series:
        """Return the texts of the rows from one on and up to another: (stop - start,) `text`."""
        return masked(self.messages.slice(start, stop - start).select("text").collect()["text"], self.masks, start)

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
