r"""Words: where GPT-2's pattern cuts text before byte pairs are merged, worked out in columns.

    '(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s

Read as rules, the pattern says: a word is a run of letters, of digits, of white space, or of anything else; of white
space before a word the last character stands apart, and a space goes to that word; and an apostrophe takes s, d, m, t,
ll, ve or re from the letters that follow it. Each rule is a few operations on arrays, so finding all words costs a
tenth of what matching them one by one does, and of the words of a corpus few are distinct: only these are encoded.

Which characters are letters, digits and spaces is asked of the engine that encodes, so both know the same Unicode.

Shapes: m texts of n characters together, W words.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import tiktoken
from numpy.typing import NDArray

OTHER, LETTER, DIGIT, SPACE = range(4)
CLASSES = {LETTER: r"\p{L}++", DIGIT: r"\p{N}++", SPACE: r"\s++"}
PLANE = 1 << 16  # characters of a plane of Unicode
S, D, M, T, L, V, R, E = map(ord, "sdmtlvre")
BLOCK = 1 << 18  # bytes looked at at a time: their arrays fit caches

Places = NDArray[np.int64]
Flags = NDArray[np.bool_]


@lru_cache(maxsize=17)
def classes(planes: int) -> NDArray[np.uint8]:
    """Return the class of each character of the first so many planes of Unicode."""
    return np.concatenate([_plane(number) for number in range(planes)])


@lru_cache(maxsize=17)
def _plane(number: int) -> NDArray[np.uint8]:
    first = number * PLANE
    text = "".join(chr(code) for code in range(first, first + PLANE) if not 0xD800 <= code < 0xE000)
    found = np.full(PLANE, OTHER, np.uint8)
    for kind, pattern in CLASSES.items():
        engine = tiktoken.Encoding(
            "treeline-class", pat_str=pattern, mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={},
        )  # fmt: skip
        matched = bytes(engine.encode_ordinary(text)).decode()  # what the pattern does not match is left out
        found[_codes(matched) - first] = kind
    return found


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def words(content: NDArray[np.uint8], starts: Places) -> Places:
    """Find the words of texts.

    Args:
        content: UTF-8 of the texts, one after another.
        starts: (m + 1,) where each text starts, and where the last one ends; the first is 0.

    Returns:
        (W + 1,) where each word starts, and where the last one ends. No word is in two texts.
    """
    found, first = [], 0
    while first < len(starts) - 1:
        last = max(int(np.searchsorted(starts, starts[first] + BLOCK, side="right")) - 1, first + 1)
        begin = int(starts[first])
        block = _words(content[begin : int(starts[last])], starts[first : last + 1] - begin)
        found.append(block[:-1] + begin)
        first = last
    return np.concatenate([*found, starts[-1:]])


def _words(content: NDArray[np.uint8], starts: Places) -> Places:
    raw = content.tobytes()
    if raw.isascii():
        return np.flatnonzero(_edges(content, starts))
    leads = np.append(np.flatnonzero((content & 0xC0) != 0x80), len(content))  # first byte of each character
    edges = _edges(_codes(raw.decode()), np.searchsorted(leads, starts))
    places: Places = leads[edges]
    return places


def _edges(codes: NDArray[np.uint8] | NDArray[np.uint32], starts: Places) -> Flags:
    """Tell where words start: (n + 1,), the end among them.

    Args:
        codes: (n,) characters of the texts.
        starts: (m + 1,) first character of each text, and n.
    """
    count = len(codes)
    outer = np.zeros(count + 1, np.bool_)  # where texts start and end
    outer[starts] = True
    if not count:
        return outer
    kinds = classes(int(codes.max()) // PLANE + 1).take(codes)
    edges = outer.copy()
    edges[1:count] |= kinds[1:] != kinds[:-1]
    _share_spaces(edges, outer, codes, kinds)
    _shorten(edges, outer, codes, kinds)
    return edges


def _share_spaces(edges: Flags, outer: Flags, codes: NDArray[np.generic], kinds: NDArray[np.uint8]) -> None:
    """The last white space before a word of its text stands apart; if it is a space, it goes to that word."""
    word = np.flatnonzero(edges[1:-1] & (kinds[:-1] == SPACE)) + 1
    word = word[~outer[word]]
    edges[word - 1] = True
    edges[word[codes[word - 1] == ord(" ")]] = False


def _shorten(edges: Flags, outer: Flags, codes: NDArray[np.generic], kinds: NDArray[np.uint8]) -> None:
    """An apostrophe that starts a word, letters after it, takes those of 's, 'd, 'm, 't, 'll, 've, 're."""
    mark = np.flatnonzero(codes == ord("'"))
    mark = mark[edges[mark]]
    mark = mark[~outer[mark + 1]]
    mark = mark[kinds[mark + 1] == LETTER]
    after = codes[mark + 1]
    one = (after == S) | (after == D) | (after == M) | (after == T)
    rest = mark[~one]
    rest = rest[~outer[rest + 2]]
    after, second = codes[rest + 1], codes[rest + 2]
    two = rest[((after == L) & (second == L)) | (((after == V) | (after == R)) & (second == E))]
    one = mark[one]
    edges[one + 1], edges[two + 1] = False, False
    edges[one + 2], edges[two + 3] = True, True
