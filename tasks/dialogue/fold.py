"""Texts as they are compared: in Unicode's NFKC form, case folded, with single spaces between words.

Normalising a text at a time takes longer than all else that comparing needs. Nearly every character gives the same
wherever it stands, and in UTF-8 most give as many bytes as they have: these are changed where they stand, for blocks of
many texts at once, in numpy. Texts with others ("…", "ß", wide commas) are made anew from a table of characters; those
with any that the table cannot tell (combining marks, jamo, what lies beyond it) are normalised whole, in linear time.

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

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]

_BLOCK = 1 << 20  # bytes of text that are worked on at once, so that what is made of them stays in a core's cache
_TABLED = (*range(0xD800), *range(0xE000, 0x10000), *range(0x1F300, 0x1FB00))  # the first plane, and emoji
_SPACE, _END = 32, 10  # between words, and after each text
_ASCII = bytes(_SPACE if chr(at).isspace() else ord(chr(at).lower()) for at in range(128)) + bytes(range(128, 256))
_LONGER_WAY = 9  # of a character that gives another number of bytes, or several, or what the table cannot tell
_LONGER, _ODD = 1 << 24, 1 << 25  # flags of a character that stands for several, and of one that the table cannot tell


@dataclass(frozen=True)
class Block:
    """Some texts in a row, normalised.

    Attributes:
        start: Row of the first.
        data: Their UTF-8, a line end after each; there is none within.
        ends: (N,) where these line ends stand.
    """

    start: int
    data: bytes
    ends: I64

    @property
    def chars(self) -> I64:
        """Count the characters of each text: (N,)."""
        edges = pa.py_buffer(np.concatenate(([-1], self.ends)) + 1)
        texts = pa.LargeStringArray.from_buffers(len(self.ends), edges, pa.py_buffer(self.data))
        chars: I64 = pc.utf8_length(texts).to_numpy() - 1
        return chars


def blocks(texts: pa.Array) -> Iterator[Block]:
    """Yield all texts, strings of any Arrow type, in blocks of some size; a longer text is a block of its own."""
    trimmed = pc.utf8_trim_whitespace(texts.cast(pa.large_string()))
    ended = pc.binary_join_element_wise(trimmed, *(pa.scalar(text, pa.large_string()) for text in ("\n", "")))
    _, offsets, data = ended.buffers()
    edges = np.frombuffer(offsets, dtype=np.int64, count=len(ended) + 1)
    start = 0
    while start < len(ended):
        stop = max(start + 1, int(np.searchsorted(edges, edges[start] + _BLOCK, side="right")) - 1)
        part = data[int(edges[start]) : int(edges[stop])].to_pybytes()
        folded = _normalised(part, edges[start + 1 : stop + 1] - edges[start] - 1)
        yield Block(start, folded.tobytes(), np.flatnonzero(folded == _END))
        start = stop


def normalised(texts: pa.Array) -> list[str]:
    """Return each text in Unicode's NFKC form, case folded, with single spaces: (N,)."""
    return [text for block in blocks(texts) for text in block.data.decode().split("\n")[:-1]]


def points(data: U8, at: I64) -> U32:
    """Decode the characters of several bytes that start at some places of UTF-8: (places,) code points."""
    lead, more = data[at], data[at + 1]
    made = (lead & 0x1F).astype(np.uint32) << 6 | (more & 0x3F)
    wide = np.flatnonzero(lead >= 0xE0)
    if len(wide):
        lead, third = lead[wide], data[at[wide] + 2]
        made[wide] = made[wide] << 6 & 0xFFFF | (third & 0x3F)
        wide = wide[lead >= 0xF0]
        made[wide] = (made[wide] << 6 | (data[at[wide] + 3] & 0x3F)) & 0x3FFFF | (data[at[wide]] & 0x07).astype(
            np.uint32
        ) << 18
    return made


def _normalised(data: bytes, ends: I64) -> U8:
    """Normalise trimmed texts, given one after the other with a byte after each, which stands at `ends`."""
    folded = np.frombuffer(bytearray(data).translate(_ASCII), dtype=np.uint8)
    folded[ends] = _END
    odd = _changed(folded)
    if len(odd):
        folded = _spliced(folded, data, ends, np.unique(np.searchsorted(ends, odd)))
    space = folded == _SPACE
    twice = space[1:] & space[:-1]
    return folded[np.concatenate(([True], ~twice))] if twice.any() else folded


def _changed(folded: U8) -> I64:
    """Change the characters of several bytes that stay as long, in place, and return where the others start."""
    at = np.flatnonzero(folded >= 0xC0)
    if not len(at):
        return at
    found = points(folded, at)
    ways = _ways().take(found, mode="clip")
    changed = np.flatnonzero(ways)
    at, found, ways = at[changed], found[changed], ways[changed]
    for width in (2, 3):
        here = ways == width
        point = _tables()[0][found[here]]
        for place in range(width):
            lead = (0, 0, 0xC0, 0xE0)[width] if place == 0 else 0x80
            folded[at[here] + place] = lead | point >> 6 * (width - 1 - place) & (0x3F if place else 0x1F)
    return at[ways == _LONGER_WAY]


def _spliced(folded: U8, data: bytes, ends: I64, rows: I64) -> U8:
    """Put some rows' texts, made anew from their characters, in the place of what they were folded to."""
    starts = np.concatenate(([0], ends[:-1] + 1))
    spans = list(zip(starts[rows].tolist(), (ends[rows] + 1).tolist(), strict=True))
    texts = [data[start:stop].decode() for start, stop in spans]
    anew = _from_characters("".join(texts), np.cumsum([len(text) for text in texts]) - 1)
    pieces, done = [], 0
    for (start, stop), text in zip(spans, anew.split(b"\n"), strict=False):
        pieces += [folded[done:start], np.frombuffer(text + b"\n", dtype=np.uint8)]
        done = stop
    return np.concatenate([*pieces, folded[done:]])


def _from_characters(text: str, ends: I64) -> bytes:
    """Normalise texts, but for several spaces in a row, from the table and where need be as wholes."""
    folded = _folded(text, ends)
    if int(folded.max()) >= _ODD:
        starts = np.concatenate(([0], ends[:-1] + 1))
        text, ends = _as_wholes(text, starts, ends, np.add.reduceat(folded >= _ODD, starts) > 0)
        folded = _folded(text, ends)
        folded &= _ODD - 1  # normalised by now: of such characters, the table gives themselves
    if int(folded.max()) >= _LONGER:
        folded = _expanded(folded)
    return folded.tobytes().decode("utf-32-le").encode()


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


@cache
def _ways() -> U8:
    """Return how each character beyond ASCII changes: (0x110000,) 0 not at all, 2 or 3 in place, else it may not fit."""
    folded = _tables()[0]
    own = np.arange(len(folded), dtype=np.uint32)
    width = np.digitize(own, (0x80, 0x800, 0x10000)).astype(np.uint8) + 1
    fits = (folded < _LONGER) & (width == width.take(folded, mode="clip")) & (width < 4)
    return np.where(folded == own, 0, np.where(fits, width, _LONGER_WAY)).astype(np.uint8)


def _combining() -> set[str]:
    """Return the characters that may change with what stands before them: marks, and seconds of a composition."""
    parts = (unicodedata.decomposition(chr(point)).split() for point in _TABLED)
    seconds = {chr(int(part[1], 16)) for part in parts if len(part) == 2 and not part[0].startswith("<")}
    jamo = {chr(point) for point in range(0x1100, 0x1200)}
    return seconds | jamo | {chr(point) for point in _TABLED if unicodedata.combining(chr(point))}
