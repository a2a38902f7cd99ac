"""Near copies: texts whose sets of word n-grams overlap, found by MinHash and verified by counting.

A word is what stands between white space; in scripts that write without spaces (Chinese, Japanese, Thai, ...) it is one
character. Two texts are alike by the Jaccard index of their sets of word n-grams. MinHash only proposes pairs; counting
decides, so nothing is reported on an estimate.

All of it is numpy over UTF-8 bytes. A prefix sum of a polynomial in the bytes gives the hash of any n-gram as one
difference, so no word becomes a string, and permutations run over blocks that fit a core's cache. Nothing has to be
compiled, installed or cached for it.

Letters: N texts; B bytes, W words and S n-grams of a block of them; K permutations; P pairs.

Source: Broder 1997, "On the resemblance and containment of documents"; Leskovec, "Mining of Massive Datasets", 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

# Scripts without spaces: Thai and Lao, Tibetan, Myanmar, Khmer, kana, Han and its extensions.
_SPACELESS = "([\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
_BLOCK = 1 << 17  # characters that are worked on at once, so that their n-grams and a permutation stay in the cache
_WINDOW = 64  # neighbours in a bucket that a text is compared with: a bucket of thousands would cost their square
_MISSED = 1e-3  # share of the pairs at the threshold that the bands may miss
_ODD = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64; Source: Knuth, golden ratio
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def pairs(texts: Sequence[str], ngram: int, permutations: int, threshold: float) -> tuple[I64, I64, F64]:
    """Find texts that are alike.

    Args:
        texts: (N,) different texts with single spaces between words.
        ngram: Words of an n-gram, at least 1; a shorter text is one n-gram.
        permutations: K, at least 1.
        threshold: Jaccard index from which on texts are alike, over 0 and up to 1.

    Returns:
        (P,) texts, (P,) the later text of each pair, and (P,) their Jaccard index; in order, each pair once.
    """
    texts = _spaced(texts)
    keys, sizes = _band_keys(texts, ngram, *bands(permutations, threshold))
    left, right = _candidates(keys)
    similarity = _jaccard(texts, ngram, sizes, left, right)
    alike = similarity >= threshold
    return left[alike], right[alike], similarity[alike]


def bands(permutations: int, threshold: float) -> tuple[int, int]:
    """Return the bands and their rows: the longest rows that miss hardly a pair at the threshold.

    A pair of Jaccard index s agrees in a band of r rows with probability s ** r, and in none of b bands with
    (1 - s ** r) ** b.
    """
    rows = [r for r in range(1, permutations + 1) if (1 - threshold**r) ** (permutations // r) <= _MISSED]
    longest = max(rows, default=1)
    return permutations // longest, longest


def _mix(x: U64) -> U64:
    """Return a bijection of 64 bits in which every bit depends on every other. Source: MurmurHash3's finalizer."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def _drawn(count: int, stream: int) -> U64:
    """Return numbers that look random and are the same with every numpy: (count,). Source: SplitMix64."""
    return _mix((np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 32)) * np.uint64(_ODD))


_VALUES = _drawn(256, 1)  # of the bytes, in the polynomial


@cache
def _powers(size: int) -> tuple[U64, U64]:
    """Return the powers of the polynomial's base and of its inverse, modulo 2**64: (size,) each."""
    made = [np.full(size, base, dtype=np.uint64) for base in (_ODD, pow(_ODD, -1, 1 << 64))]
    for powers in made:
        powers[0] = 1
        np.multiply.accumulate(powers, out=powers)
    return made[0], made[1]


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield ranges of texts of about one block; a longer text is a block of its own."""
    start, size = 0, 0
    for at, text in enumerate(texts):
        size += len(text) + 1
        if size >= _BLOCK:
            yield start, at + 1
            start, size = at + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _spaced(texts: Sequence[str]) -> list[str]:
    """Set the characters of scripts without spaces apart, so that each is a word."""
    apart = [*texts]
    wide = [row for row, text in enumerate(texts) if not text.isascii()]
    found = []
    for start, stop in _blocks([texts[row] for row in wide]):
        data = _encoded([texts[row] for row in wide[start:stop]])
        leads = (data >= 0xE0) & (data != 0xE2)  # of such scripts, and of few others: E2 leads quotes and dashes
        starts = np.concatenate(([0], np.flatnonzero(data[:-1] == 10) + 1))
        found += [wide[start + at] for at in np.flatnonzero(np.logical_or.reduceat(leads, starts)).tolist()]
    column = pl.Series([texts[row] for row in found], dtype=pl.String).str.replace_all(_SPACELESS, " $1 ")
    for row, text in zip(found, column.to_list(), strict=True):
        apart[row] = " ".join(text.split())
    return apart


def _encoded(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Return texts as UTF-8, a line end after each: (B,)."""
    return np.frombuffer("\n".join((*texts, "")).encode("utf-8", "surrogatepass"), dtype=np.uint8)


def _ngrams(texts: Sequence[str], ngram: int) -> tuple[U64, I64]:
    """Hash the n-grams of some texts: (S,) hashes, and (texts + 1,) where each text's begin; each has at least one.

    The hash of the bytes i to j is the sum of value[byte] * base**k for i <= k < j, divided by base**i, and mixed.
    """
    data = _encoded(texts)
    powers, inverses = _powers(1 << max(18, len(data).bit_length()))
    sums = np.zeros(len(data) + 1, dtype=np.uint64)  # (B + 1,)
    np.cumsum(_VALUES[data] * powers[: len(data)], out=sums[1:])
    ends = np.flatnonzero((data == 32) | (data == 10))  # (W,) one past each word's last byte
    starts = np.concatenate(([0], ends[:-1] + 1))  # (W,)
    last = np.flatnonzero(data[ends] == 10)  # (texts,) each text's last word
    first = np.concatenate(([0], last[:-1] + 1))  # (texts,)
    until = np.concatenate((sums[ends[ngram - 1 :]], np.zeros(min(ngram - 1, len(ends)), dtype=np.uint64)))  # (W,)
    short = last - first < ngram - 1
    until[first[short]] = sums[ends[last[short]]]
    opens = np.ones(len(ends), dtype=np.bool_)  # (W,) where an n-gram of one text starts
    for back in range(ngram - 1):
        opens[(last - back)[last - back > first]] = False
    hashes = _mix(((until - sums[starts]) * inverses[starts])[opens])
    counts = np.maximum(1, last - first + 2 - ngram)
    return hashes, np.concatenate(([0], np.cumsum(counts)))


def _band_keys(texts: Sequence[str], ngram: int, count: int, rows: int) -> tuple[U32, I64]:
    """Return what each band of a text's minima hashes to, (N, bands), and its n-grams, repeated ones counted, (N,)."""
    factors = (_drawn(count * rows, 2) | np.uint64(1)).astype(np.uint32)
    keys = np.empty((len(texts), count), dtype=np.uint32)
    sizes = np.empty(len(texts), dtype=np.int64)
    for start, stop in _blocks(texts):
        hashes, offsets = _ngrams(texts[start:stop], ngram)
        sizes[start:stop] = np.diff(offsets)
        minima = _minima((hashes >> _HALF).astype(np.uint32), offsets[:-1], factors)
        folded = np.zeros((count, stop - start), dtype=np.uint64)
        for row in range(rows):
            folded = folded * np.uint64(_ODD) + minima[row::rows]
        keys[start:stop] = (_mix(folded) >> _HALF).T
    return keys, sizes


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


def _candidates(keys: U32) -> tuple[I64, I64]:
    """Return pairs of texts that agree in a band, each once, in order: (P,) texts and (P,) later texts."""
    found = [np.empty(0, dtype=np.uint64)]
    own = np.arange(len(keys), dtype=np.uint64)
    for band in keys.T:
        packed = np.sort((band.astype(np.uint64) << _HALF) | own)  # equal keys side by side, earlier texts first
        for distance in range(1, _WINDOW + 1):
            near, far = packed[:-distance], packed[distance:]
            same = (near ^ far) <= _LOW
            if not same.any():
                break
            found.append((near[same] << _HALF) | (far[same] & _LOW))
    unique = _distinct(np.concatenate(found))
    return (unique >> _HALF).astype(np.int64), (unique & _LOW).astype(np.int64)


def _jaccard(texts: Sequence[str], ngram: int, sizes: I64, left: I64, right: I64) -> F64:
    """Count what pairs of texts share: (P,) the Jaccard index of their sets of n-grams."""
    similarity = np.empty(len(left), dtype=np.float64)
    block = np.cumsum(sizes[left] + sizes[right]) // _BLOCK  # an n-gram is some six bytes
    edges = np.flatnonzero(np.diff(block, prepend=-1, append=-1))
    for start, stop in pairwise(edges.tolist()):
        part = slice(start, stop)
        chosen, place = np.unique(np.concatenate((left[part], right[part])), return_inverse=True)
        hashes, offsets = _ngrams([texts[at] for at in chosen], ngram)
        similarity[part] = _overlap(hashes, offsets, *place.reshape(2, -1))
    return similarity


def _distinct(numbers: U64) -> U64:
    """Return each number once, in order; np.unique hashes, which takes seven times as long here."""
    ordered = np.sort(numbers)
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))] if len(ordered) else ordered


def _overlap(hashes: U64, offsets: I64, left: I64, right: I64) -> F64:
    """Return the Jaccard index of pairs of sets, given as bags one after the other: (P,)."""
    number = np.searchsorted(_distinct(hashes), hashes).astype(np.uint64)
    bag = np.repeat(np.arange(len(offsets) - 1, dtype=np.uint64), np.diff(offsets))
    members = _distinct((bag << _HALF) | number)
    sizes = np.bincount((members >> _HALF).astype(np.int64), minlength=len(offsets) - 1)
    first = np.concatenate(([0], np.cumsum(sizes)))[:-1]
    sides = []
    for side in (left, right):
        pair = np.repeat(np.arange(len(side)), sizes[side])
        within = np.arange(len(pair)) - np.repeat(np.cumsum(sizes[side]) - sizes[side], sizes[side])
        member = members[first[side][pair] + within] & _LOW
        sides.append((pair.astype(np.uint64) << _HALF) | member)
    both = np.sort(np.concatenate(sides))
    shared = both[:-1][both[:-1] == both[1:]] >> _HALF
    common = np.bincount(shared.astype(np.int64), minlength=len(left))
    return common / (sizes[left] + sizes[right] - common)
