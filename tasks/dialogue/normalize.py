"""Texts as they are compared: in Unicode's NFKC form, case folded, with single spaces between words.

Normalising a text at a time takes longer than all else that comparing needs. Nearly every character gives the same
wherever it stands, and in UTF-8 most give as many bytes as they have: these are changed where they stand, for blocks of
many texts at once, in numpy. The few others ("…", "ß", wide commas) are spliced in. Texts with characters that a table
cannot tell (combining marks, jamo, what lies beyond it) are normalised word by word, in linear time.

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

_BLOCK = 1 << 20  # bytes of text that are worked on at once; of 2**17 to 2**22 the fastest: less is more calls
_TABLED = (*range(0xD800), *range(0xE000, 0x10000), *range(0x1F300, 0x1FB00))  # the first plane, and emoji
_SPACE, _END = 32, 10  # between words, and after each text
_ASCII = bytes(_SPACE if chr(at).isspace() else ord(chr(at).lower()) for at in range(128)) + bytes(range(128, 256))
_WIDER = (0x80, 0x800, 0x10000)  # first characters of 2, 3 and 4 bytes
_LONGER = 9  # the way of a character that changes, but not in its place

Span = tuple[int, int, bytes]  # from one byte up to another, and what comes in their place


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
    lead = data[at]
    made: U32 = ((lead & 0x1F).astype(np.uint32) << 6 | data[at + 1] & 0x3F).astype(np.uint32, copy=False)
    three = np.flatnonzero(lead >= 0xE0)
    if len(three):
        made[three] = made[three] << 6 & 0xFFFF | data[at[three] + 2] & 0x3F
        four = three[lead[three] >= 0xF0]
        made[four] = made[four] << 6 & 0x3FFFF | data[at[four] + 3] & 0x3F
        made[four] |= (lead[four] & 0x07).astype(np.uint32) << 18
    return made


def _normalised(data: bytes, ends: I64) -> U8:
    """Normalise trimmed texts, given one after the other with a byte after each, which stands at `ends`."""
    folded = np.frombuffer(bytearray(data).translate(_ASCII), dtype=np.uint8)
    folded[ends] = _END
    at, found = _changed(folded)
    if len(at):
        folded = _spliced(folded, _instead(data, folded, ends, at, found))
    space = folded == _SPACE
    twice = space[1:] & space[:-1]
    return folded[np.concatenate(([True], ~twice))] if twice.any() else folded


def _changed(folded: U8) -> tuple[I64, U32]:
    """Change the characters of several bytes that stay as long, in place; return where the others start, and these."""
    at = np.flatnonzero(folded >= 0xC0)
    if not len(at):
        return at, np.empty(0, dtype=np.uint32)
    found = points(folded, at)
    ways = _tables().ways.take(found, mode="clip")
    changed = np.flatnonzero(ways)
    at, found, ways = at[changed], found[changed], ways[changed]
    for width, lead in ((2, 0xC0), (3, 0xE0)):
        here = ways == width
        rest = _tables().folded[found[here]]
        for place in range(width - 1, 0, -1):
            folded[at[here] + place] = 0x80 | rest & 0x3F
            rest = rest >> 6
        folded[at[here]] = lead | rest
    return at[ways >= _LONGER], found[ways >= _LONGER]


def _instead(data: bytes, folded: U8, ends: I64, at: I64, found: U32) -> list[Span]:
    """Say what stands in place of characters: of each, or of the whole word where the table cannot tell."""
    told = [_tables().longer.get(point) for point in found.tolist()]
    leans = np.array([one is None for one in told], dtype=np.bool_)
    words = _around(folded, ends, at[leans])
    anew = _as_wholes([data[start:stop].decode() for start, stop in words])
    within = np.searchsorted(np.ravel(words), at, side="right") % 2 == 1
    stops = (at + 1 + np.digitize(found, _WIDER)).tolist()
    apart = [(start, stops[one], told[one] or b"") for one, start in enumerate(at.tolist()) if not within[one]]
    return sorted([*((*word, said) for word, said in zip(words, anew, strict=True)), *apart])


def _around(folded: U8, ends: I64, at: I64) -> list[tuple[int, int]]:
    """Return where the words start and stop in which some places lie: each once, in order."""
    data, found, done = folded.tobytes(), [], 0
    texts = np.searchsorted(ends, at)
    firsts = np.concatenate(([0], ends + 1))[texts]
    for place, first, last in zip(at.tolist(), firsts.tolist(), ends[texts].tolist(), strict=True):
        if place >= done:
            start = max(first, data.rfind(b" ", first, place) + 1)
            done = data.find(b" ", place, last)
            done = last if done < 0 else done
            found.append((start, done))
    return found


def _spliced(folded: U8, spans: list[Span]) -> U8:
    """Put bytes in the place of some spans, which stand in order."""
    view, pieces, done = memoryview(folded.data), list[bytes | memoryview](), 0
    for start, stop, anew in spans:
        pieces += [view[done:start], anew]
        done = stop
    return np.frombuffer(b"".join([*pieces, view[done:]]), dtype=np.uint8)


def _as_wholes(words: list[str]) -> list[bytes]:
    """Normalise words, which may be of several by then; nothing combines with the white space around them.

    polars' NFKC, not the standard library's: that one takes time quadratic in a run of combining marks (80,000: 6 s).
    """
    return [" ".join(word.split()).encode() for word in _folded(_folded(words))] if words else []


def _folded(texts: list[str]) -> list[str]:
    return [text.casefold() for text in pl.Series(texts, dtype=pl.String).str.normalize("NFKC")]


@dataclass(frozen=True)
class _Tables:
    """What the characters beyond ASCII give, wherever they stand.

    Attributes:
        ways: (0x110000,) how each changes: 0 not at all, 2 or 3 in so many bytes of its place, else `_LONGER`.
        folded: (0x110000,) what those give that change in place.
        longer: What others give; those that are not here depend on what stands around them.
    """

    ways: U8
    folded: U32
    longer: dict[int, bytes]


@cache
def _tables() -> _Tables:
    """Ask polars and the standard library of each character once."""
    composed = pl.Series([chr(point) for point in _TABLED], dtype=pl.String).str.normalize("NFKC").to_list()
    twice = pl.Series([text.casefold() for text in composed], dtype=pl.String).str.normalize("NFKC").to_list()
    made = _Tables(np.full(0x110000, _LONGER, np.uint8), np.arange(0x110000, dtype=np.uint32), {})
    combining = _combining()
    for point, once, last in zip(_TABLED, composed, twice, strict=True):
        own = chr(point)
        said = " " if own.isspace() else last
        leans = {once[0], last[0]} & combining or last.casefold() != last or any(one.isspace() for one in last)
        unknown = len(last) == 1 and unicodedata.category(own) == "Cn"  # polars may know it and Python not
        if not own.isspace() and (leans or unknown):
            continue
        if said == own:
            made.ways[point] = 0
        elif len(said) == 1 and len(said.encode()) == len(own.encode()) in {2, 3}:
            made.ways[point], made.folded[point] = len(own.encode()), ord(said)
        else:
            made.longer[point] = said.encode()
    return made


def _combining() -> set[str]:
    """Return the characters that may change with what stands before them: marks, and seconds of a composition."""
    parts = (unicodedata.decomposition(chr(point)).split() for point in _TABLED)
    seconds = {chr(int(part[1], 16)) for part in parts if len(part) == 2 and not part[0].startswith("<")}
    jamo = {chr(point) for point in range(0x1100, 0x1200)}
    return seconds | jamo | {chr(point) for point in _TABLED if unicodedata.combining(chr(point))}
