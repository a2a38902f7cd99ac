"""What comparing asks of a text: a digest of it, its size, and the keys under which near copies of it are found.

A word is what stands between white space; in scripts that write without spaces (Chinese, Japanese, Thai, ...) it is
one character. Of a text's n-grams of words, MinHash keeps the least under each permutation; rows of minima make the key
of a band, and near copies agree in one band at least. All of it is numpy over UTF-8 bytes: a word is hashed eight bytes
at a time, so no word becomes a string.

Letters: N texts; W words and S n-grams of a block of them; K permutations.

Source: Broder 1997, "On the resemblance and containment of documents"; Leskovec, "Mining of Massive Datasets", 3.
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b, sha256
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.dialogue.normalize import blocks, points

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

DENSE = 3  # letters of an alphabet that take the place of one Han character or kana, roughly
_LANE = 8  # bytes of a word that are hashed at once
_LONG = (
    64  # bytes from which on a word is hashed on its own: a word of a megabyte would take as many turns as it has lanes
)
_MISSED = 1e-3  # share of the pairs at the threshold that the bands may miss
_ODD = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64; Source: Knuth, golden ratio
_HALF = np.uint64(32)
# Scripts without spaces, first and one past the last: Thai to Myanmar, Khmer, kana, Han and its extensions.
_SPACELESS = (0xE00, 0x10A0, 0x1780, 0x1800, 0x3040, 0x3100, 0x3400, 0x4DC0, 0x4E00, 0xA000, 0xF900, 0xFB00, 0x20000,
              0x40000)  # fmt: skip
_STEP = 32  # the greatest power of two that divides them all
_ALONE = np.searchsorted(_SPACELESS, np.arange(0, _SPACELESS[-1] + _STEP, _STEP), side="right") % 2 == 1


def compute(texts: pa.Array, ngram: int, permutations: int, threshold: float) -> pa.RecordBatch:
    """Return the fingerprint of each text.

    Args:
        texts: (N,) strings of any Arrow type.
        ngram: Words of an n-gram, at least 1; a shorter text is one n-gram.
        permutations: K, at least 1.
        threshold: Jaccard index from which on the keys find hardly fewer than all pairs, over 0 and up to 1.

    Returns:
        N rows: digest (16 bytes) of the normalised text, chars and ngrams (int32) that it has, repeated ones counted,
        a character of Chinese or Japanese as DENSE, and keys (fixed binary): of each band, four bytes.
    """
    count, rows = bands(permutations, threshold)
    digests, chars = [], [np.empty(0, dtype=np.int64)]
    sizes = [np.empty(0, dtype=np.int64)]
    keys = np.empty((len(texts), count), dtype=np.uint32)
    for block in blocks(texts):
        digests.append(_digests(block.data, block.ends))
        chars.append(block.chars + (DENSE - 1) * _dense(np.frombuffer(block.data, dtype=np.uint8), block.ends))
        hashes, offsets = ngrams(block.data, block.ends, ngram)
        sizes.append(np.diff(offsets))
        keys[block.start : block.start + len(block.ends)] = _keys(hashes, offsets[:-1], count, rows)
    return pa.record_batch({
        "digest": _fixed(np.frombuffer(b"".join(digests), dtype="V16")[::2].tobytes(), 16),
        "chars": pa.array(np.concatenate(chars).astype(np.int32)),
        "ngrams": pa.array(np.concatenate(sizes).astype(np.int32)),
        "keys": _fixed(keys.tobytes(), 4 * count),
    })  # fmt: skip


def bands(permutations: int, threshold: float) -> tuple[int, int]:
    """Return the bands and their rows: the longest rows that can miss hardly a pair, in as few bands as that takes.

    A pair of Jaccard index s agrees in a band of r rows with probability s ** r, and in none of b bands with
    (1 - s ** r) ** b.
    """
    rows = [r for r in range(1, permutations + 1) if (1 - threshold**r) ** (permutations // r) <= _MISSED]
    longest = max(rows, default=1)
    most = permutations // longest
    return next((b for b in range(1, most) if (1 - threshold**longest) ** b <= _MISSED), most), longest


def ngrams(data: bytes, ends: I64, ngram: int) -> tuple[U64, I64]:
    """Hash the n-grams of normalised texts.

    Args:
        data: UTF-8, a line end after each text; at least one text.
        ends: (texts,) where these line ends stand.
        ngram: Words of an n-gram.

    Returns:
        (S,) hashes, and (texts + 1,) where each text's begin; each has at least one.
    """
    starts, stops = _words(np.frombuffer(data, dtype=np.uint8), ends)
    words = _hashed(data, starts, stops - starts)  # (W,)
    last = np.searchsorted(stops, ends)  # (texts,)
    first = np.concatenate(([0], last[:-1] + 1))  # (texts,)
    hashes = words.copy()
    for ahead in range(1, ngram):
        hashes *= np.uint64(_ODD)
        hashes[:-ahead] += words[ahead:]
    opens = np.ones(len(words), dtype=np.bool_)  # (W,) where an n-gram of one text starts
    for back in range(ngram - 1):
        opens[(last - back)[last - back > first]] = False
    short = np.flatnonzero(last - first < ngram - 1)
    hashes[first[short]] = _short(words, first[short], last[short], ngram)
    return hashes[opens], np.concatenate(([0], np.cumsum(np.maximum(1, last - first + 2 - ngram))))


def mixed(x: U64) -> U64:
    """Return a bijection of 64 bits in which every bit depends on every other. Source: MurmurHash3's finalizer."""
    x = x ^ (x >> np.uint64(33))
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    x ^= x >> np.uint64(33)
    return x


def _dense(data: U8, ends: I64) -> I64:
    """Count the Han characters and kana of each text: (texts,)."""
    at = np.flatnonzero(data >= 0xE3)  # all others of the scripts without spaces begin below
    at = at[_ALONE.take(points(data, at) // _STEP, mode="clip")]
    return np.diff(np.searchsorted(at, ends), prepend=0)


def _digests(data: bytes, ends: I64) -> bytes:
    """Return the SHA-256 of each text, one after the other."""
    view, edges = memoryview(data), pairwise([-1, *ends.tolist()])
    return b"".join([sha256(view[before + 1 : end]).digest() for before, end in edges])


def _fixed(data: bytes, width: int) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(width), len(data) // width, [None, pa.py_buffer(data)])


def _words(data: U8, ends: I64) -> tuple[I64, I64]:
    """Return where words start, and one past where they end: (W,), (W,)."""
    apart = data == 32
    apart[ends] = True
    cuts = _cuts(data, apart)
    apart[cuts] = True
    stops = np.flatnonzero(apart)
    starts = np.concatenate(([0], stops[:-1] + 1))
    starts[np.searchsorted(stops, cuts) + 1] -= 1
    return starts, stops


def _cuts(data: U8, space: NDArray[np.bool_]) -> I64:
    """Return where one word ends and the next starts without a space: around characters of scripts without spaces."""
    at = np.flatnonzero(data >= 0xE0)
    at = at[data[at] != 0xE2]  # which leads quotes and dashes, not such scripts
    at = at[_ALONE.take(points(data, at) // _STEP, mode="clip")]
    edges = np.stack((at, at + 3 + (data[at] >= 0xF0)), axis=1).ravel()
    edges = edges[np.diff(edges, prepend=0) > 0]
    cuts: I64 = edges[~(space[edges - 1] | space[edges])]
    return cuts


def _hashed(data: bytes, starts: I64, sizes: I64) -> U64:
    """Hash words, eight bytes at a time: (W,)."""
    padded = data + bytes(_LANE)
    lanes = np.ndarray((len(data) + 1,), dtype="<u8", buffer=padded, strides=(1,))  # at each byte, the next eight
    made = lanes[starts]
    made &= _MASKS.take(sizes, mode="clip")
    made += sizes.view(np.uint64) * np.uint64(_ODD)
    longer = np.flatnonzero(sizes > _LANE)
    at, left = starts[longer], sizes[longer]
    for word in longer[left >= _LONG].tolist():
        said = data[starts[word] : starts[word] + sizes[word]]
        made[word] = int.from_bytes(blake2b(said, digest_size=8).digest(), "little")
    left[left >= _LONG] = 0
    hashed = made[longer]
    while True:
        on = np.flatnonzero(left > _LANE)
        if not len(on):
            return mixed(made)
        longer, at, left = longer[on], at[on] + _LANE, left[on] - _LANE
        hashed = mixed(hashed[on])
        hashed += lanes[at] & _MASKS.take(left, mode="clip")
        made[longer] = hashed


def _short(words: U64, first: I64, last: I64, ngram: int) -> U64:
    """Return the hash of texts of fewer words than an n-gram has, as if nothing followed: (texts,)."""
    made = np.zeros(len(first), dtype=np.uint64)
    for ahead in range(ngram):
        word = words[np.minimum(first + ahead, last)]
        made = made * np.uint64(_ODD) + np.where(first + ahead <= last, word, np.uint64(0))
    return made


def _keys(hashes: U64, starts: I64, count: int, rows: int) -> U32:
    """Return what each band of each text's minima hashes to: (texts, bands)."""
    minima = _minima((hashes >> _HALF).astype(np.uint32), starts, _factors(count * rows))
    folded = np.zeros((count, len(starts)), dtype=np.uint64)
    for row in range(rows):
        folded = folded * np.uint64(_ODD) + minima[row::rows]
    keys: U32 = (mixed(folded) >> _HALF).T.astype(np.uint32)
    return keys


def _minima(hashes: U32, starts: I64, factors: U32) -> U32:
    """Return the least of each text's hashes under each permutation: (K, texts).

    The hashes are well mixed, so multiplying by an odd number permutes them well enough.
    """
    minima = np.empty((len(factors), len(starts)), dtype=np.uint32)
    permuted = np.empty_like(hashes)
    for number, factor in enumerate(factors):
        np.multiply(hashes, factor, out=permuted)
        np.minimum.reduceat(permuted, starts, out=minima[number])
    return minima


@cache
def _factors(count: int) -> U32:
    """Return odd numbers that look random and are the same with every numpy: (count,). Source: SplitMix64."""
    drawn = mixed((np.arange(1, count + 1, dtype=np.uint64) + np.uint64(2 << 32)) * np.uint64(_ODD))
    return (drawn | np.uint64(1)).astype(np.uint32)


_MASKS = np.array([(1 << 8 * size) - 1 for size in range(_LANE + 1)], dtype=np.uint64)  # of a word's bytes in a lane
