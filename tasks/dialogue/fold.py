"""Texts as they are compared: in Unicode's NFKC form, case folded, with single spaces between words.

Normalising a text at a time takes longer than all else that comparing needs. Nearly every character gives the same
wherever it stands, so a table of characters does it for blocks of many texts at once, in numpy. Texts with others
(combining marks, jamo, and what lies beyond the table) are normalised as a whole, in linear time.

Letters: N texts.

Source: Unicode Standard Annex 15, sections 9 and 10: a string of normalised pieces is normalised where each piece
starts with a character that combines with none before it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]

_BLOCK = 1 << 17  # bytes of text that are worked on at once, so that what is made of them stays in a core's cache
_TABLED = (*range(0xD800), *range(0xE000, 0x10000), *range(0x1F300, 0x1FB00))  # the first plane, and emoji
_SPACE, _END = 32, 10  # between words, and after each text
_LONGER, _ODD = 1 << 24, 1 << 25  # flags of a character that stands for several, and of one that the table cannot tell


@dataclass(frozen=True)
class Block:
    """Some texts in a row, normalised.

    Attributes:
        start: Row of the first.
        data: Their UTF-8, a line end after each; there is none within.
        chars: (N,) characters of each.
    """

    start: int
    data: bytes
    chars: I64


def blocks(texts: pa.Array) -> Iterator[Block]:
    """Yield all texts, strings of any Arrow type, in blocks of some size; a longer text is a block of its own."""
    trimmed = pc.utf8_trim_whitespace(texts.cast(pa.large_string()))
    ended = pc.binary_join_element_wise(trimmed, *(pa.scalar(text, pa.large_string()) for text in ("\n", "")))
    ends = np.cumsum(pc.utf8_length(ended).to_numpy())  # characters up to and with each text
    _, offsets, data = ended.buffers()
    edges = np.frombuffer(offsets, dtype=np.int64, count=len(ended) + 1)
    start, before = 0, 0
    while start < len(ended):
        stop = max(start + 1, int(np.searchsorted(edges, edges[start] + _BLOCK, side="right")) - 1)
        part = data[int(edges[start]) : int(edges[stop])].to_pybytes().decode()
        yield Block(start, *_normalised(part, ends[start:stop] - before - 1))
        start, before = stop, int(ends[stop - 1])


def normalised(texts: pa.Array) -> list[str]:
    """Return each text in Unicode's NFKC form, case folded, with single spaces: (N,)."""
    return [text for block in blocks(texts) for text in block.data.decode().split("\n")[:-1]]


def _normalised(text: str, ends: I64) -> tuple[bytes, I64]:
    """Normalise trimmed texts, given one after the other with a character after each, which stands at `ends`."""
    folded = _folded(text, ends)
    if int(folded.max()) >= _ODD:
        starts = np.concatenate(([0], ends[:-1] + 1))
        text, ends = _as_wholes(text, starts, ends, np.add.reduceat(folded >= _ODD, starts) > 0)
        folded = _folded(text, ends)
        folded &= _ODD - 1  # normalised by now: of such characters, the table gives themselves
    if int(folded.max()) >= _LONGER:
        folded = _expanded(folded)
    space = folded == _SPACE
    twice = space[1:] & space[:-1]
    if twice.any():
        folded = folded[np.concatenate(([True], ~twice))]
    chars = np.diff(np.flatnonzero(folded == _END), prepend=-1) - 1
    return folded.tobytes().decode("utf-32-le").encode(), chars


def _folded(text: str, ends: I64) -> U32:
    """Look up each character; all white space becomes spaces, and the ends line ends."""
    folded: U32 = _tables()[0].take(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), mode="clip")
    folded[ends] = _END
    return folded


def _as_wholes(text: str, starts: I64, ends: I64, odd: NDArray[np.bool_]) -> tuple[str, I64]:
    """Normalise the odd ones of some texts, each as a whole; return all of them and where they end.

    polars' NFKC, not the standard library's: that one takes time quadratic in a run of combining marks (80,000: 6 s).
    """
    parts = [text[first : last + 1] for first, last in zip(starts.tolist(), ends.tolist(), strict=True)]
    rows = np.flatnonzero(odd).tolist()
    composed = pl.Series([parts[row] for row in rows], dtype=pl.String).str.normalize("NFKC")
    folded = pl.Series([one.casefold() for one in composed], dtype=pl.String).str.normalize("NFKC")
    for row, one in zip(rows, folded, strict=True):
        parts[row] = " ".join(one.casefold().split()) + "\n"
    return "".join(parts), np.cumsum([len(part) for part in parts]) - 1


def _expanded(folded: U32) -> U32:
    """Put several characters in the place of each that stands for several."""
    at = np.flatnonzero(folded >= _LONGER).tolist()
    longer = _tables()[1]
    pieces = []
    for before, here in zip([-1, *at], at, strict=False):
        pieces += [folded[before + 1 : here], longer[int(folded[here]) - _LONGER]]
    return np.concatenate([*pieces, folded[at[-1] + 1 :]])


@cache
def _tables() -> tuple[U32, dict[int, U32]]:
    """Return what each character stands for, wherever it stands, with flags: (0x110000,); and where that is several."""
    composed = pl.Series([chr(point) for point in _TABLED], dtype=pl.String).str.normalize("NFKC").to_list()
    folded = pl.Series([text.casefold() for text in composed], dtype=pl.String).str.normalize("NFKC").to_list()
    entries = np.arange(0x110000, dtype=np.uint32) | np.uint32(_ODD)
    combining, longer = _combining(), {}
    for point, once, twice in zip(_TABLED, composed, folded, strict=True):
        if chr(point).isspace():
            entries[point] = _SPACE
        elif once[0] in combining or twice[0] in combining or twice.casefold() != twice:
            continue
        elif len(twice) == 1 and unicodedata.category(chr(point)) != "Cn":  # polars may know it and Python not
            entries[point] = ord(twice)
        elif len(twice) > 1 and not any(one.isspace() for one in twice):
            entries[point] = point | _LONGER
            longer[point] = np.array([ord(one) for one in twice], dtype=np.uint32)
    return entries, longer


def _combining() -> set[str]:
    """Return the characters that may change with what stands before them: marks, and seconds of a composition."""
    parts = (unicodedata.decomposition(chr(point)).split() for point in _TABLED)
    seconds = {chr(int(part[1], 16)) for part in parts if len(part) == 2 and not part[0].startswith("<")}
    jamo = {chr(point) for point in range(0x1100, 0x1200)}
    return seconds | jamo | {chr(point) for point in _TABLED if unicodedata.combining(chr(point))}
