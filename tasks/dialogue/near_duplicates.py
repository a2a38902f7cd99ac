"""Near copies: texts whose sets of word n-grams overlap, found by their fingerprints and verified by counting.

Two texts are alike by the Jaccard index of their sets of word n-grams. MinHash only proposes pairs; counting decides,
so nothing is reported on an estimate.

Letters: N texts; S n-grams; P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.dialogue.minhash import ngrams
from tasks.dialogue.normalize import blocks

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]
TextsOf = Callable[[I64], pa.Array]  # rows, in order, each once -> their texts

_WINDOW = 64  # neighbours in a bucket that a text is compared with: a bucket of thousands would cost their square
_PART = 1 << 20  # n-grams of pairs that are counted at once
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class Prints:
    """The fingerprints of N texts, as `fingerprint.compute` makes them.

    Attributes:
        digests: (N, 2) of the normalised texts.
        chars: (N,) characters of these.
        keys: (N, bands) under which near copies are found.
    """

    digests: U64
    chars: NDArray[np.int32]
    keys: U32

    @classmethod
    def of(cls, made: pa.RecordBatch | pa.Table) -> Prints:
        """View a batch or a table of fingerprints."""
        table = pa.table(made).combine_chunks()
        width = table.schema.field("keys").type.byte_width // 4
        return cls(
            np.frombuffer(_bytes(table["digest"]), dtype="<u8").reshape(-1, 2),
            table["chars"].to_numpy(),
            np.frombuffer(_bytes(table["keys"]), dtype="<u4").reshape(-1, width),
        )

    def take(self, rows: I64) -> Prints:
        """Return those of some rows."""
        return Prints(self.digests[rows], self.chars[rows], self.keys[rows])


@dataclass(frozen=True)
class Pairs:
    """Texts that are alike, each pair once, in order.

    Attributes:
        left: (P,) texts.
        right: (P,) the later text of each pair.
        similarity: (P,) their Jaccard index.
        crowded: Whether a bucket held more texts than are looked through, so that pairs may be missing.
    """

    left: I64
    right: I64
    similarity: F64
    crowded: bool


def numbered(prints: Prints, rows: I64) -> tuple[I64, I64]:
    """Number the texts of some rows in the order of their digests; equal texts have one number.

    Returns:
        (rows,) numbers, and of each number the first row.
    """
    head, tail = prints.digests[rows].T
    order = np.lexsort((tail, head))  # stable: the first row of a text first
    fresh = np.ones(len(rows), dtype=np.bool_)
    fresh[1:] = (head[order][1:] != head[order][:-1]) | (tail[order][1:] != tail[order][:-1])
    number = np.empty(len(rows), dtype=np.int64)
    number[order] = np.cumsum(fresh) - 1
    return number, rows[order[fresh]]


def pairs(prints: Prints, texts_of: TextsOf, ngram: int, threshold: float) -> Pairs:
    """Find texts that are alike.

    Args:
        prints: Fingerprints of N different texts, in the order of their digests, so that how far a crowded bucket is
            looked through does not depend on the order of the data.
        texts_of: Gives the texts that have to be compared.
        ngram: Words of an n-gram, at least 1; a shorter text is one n-gram.
        threshold: Jaccard index from which on texts are alike, over 0 and up to 1.
    """
    left, right, crowded = _candidates(prints.keys)
    similarity = jaccard(texts_of, ngram, left, right)
    alike = similarity >= threshold
    return Pairs(left[alike], right[alike], similarity[alike], crowded)


def _bytes(column: pa.ChunkedArray) -> bytes:
    """Return the values of a column of fixed width, one after the other."""
    parts = [chunk for chunk in column.chunks if len(chunk)]
    width = column.type.byte_width
    return b"".join(part.buffers()[1][part.offset * width : (part.offset + len(part)) * width] for part in parts)


def _candidates(keys: U32) -> tuple[I64, I64, bool]:
    """Return pairs of texts that agree in a band, each once, in order, (P,) twice, and whether some are missing."""
    found, crowded = [np.empty(0, dtype=np.uint64)], False
    for band in np.ascontiguousarray(keys.T):
        rows = _crowded(band)
        packed = band[rows].astype(np.uint64)
        packed <<= _HALF
        packed |= rows.astype(np.uint64)
        packed.sort()  # equal keys side by side, earlier texts first
        at = np.flatnonzero((packed[:-1] ^ packed[1:]) <= _LOW)
        for distance in range(1, _WINDOW + 1):
            if not len(at):
                break
            found.append((packed[at] << _HALF) | (packed[at + distance] & _LOW))
            at = at[: np.searchsorted(at, len(packed) - distance - 1)]  # what is equal further apart is so closer, too
            at = at[(packed[at] ^ packed[at + distance + 1]) <= _LOW]
        crowded |= len(at) > 0
    unique = _distinct(np.concatenate(found))
    return (unique >> _HALF).astype(np.int64), (unique & _LOW).astype(np.int64), crowded


def _crowded(keys: U32) -> I64:
    """Return where keys stand of which there may be several: to sort all of them takes ten times as long."""
    slots = keys >> np.uint32(max(0, 30 - len(keys).bit_length()))
    return np.flatnonzero(np.bincount(slots)[slots] > 1)


def jaccard(texts_of: TextsOf, ngram: int, left: I64, right: I64) -> F64:
    """Count what pairs of texts share: (P,) the Jaccard index of their sets of n-grams.

    Args:
        texts_of: Gives the texts that have to be compared.
        ngram: Words of an n-gram.
        left: (P,) texts.
        right: (P,) the other text of each pair.
    """
    similarity = np.empty(len(left), dtype=np.float64)
    if not len(left):
        return similarity
    chosen = np.sort(np.concatenate((left, right)))
    chosen = chosen[np.concatenate(([True], chosen[1:] != chosen[:-1]))]
    hashes, offsets = ngrams_of(texts_of(chosen), ngram)
    first, second = np.searchsorted(chosen, left), np.searchsorted(chosen, right)
    sizes = np.diff(offsets)
    part = np.cumsum(sizes[first] + sizes[second]) // _PART
    edges = np.flatnonzero(np.diff(part, prepend=-1, append=-1))
    for start, stop in pairwise(edges.tolist()):
        similarity[start:stop] = _overlap(hashes, offsets, first[start:stop], second[start:stop])
    return similarity


def ngrams_of(texts: pa.Array, ngram: int) -> tuple[U64, I64]:
    """Return the n-grams of each text: (S,) hashes, and where each text's begin."""
    made = [ngrams(block.data, block.ends, ngram) for block in blocks(texts)]
    sizes = np.concatenate([np.diff(offsets) for _, offsets in made])
    return np.concatenate([hashes for hashes, _ in made]), np.concatenate(([0], np.cumsum(sizes)))


def _distinct(numbers: U64) -> U64:
    """Return each number once, in order; np.unique hashes, which takes seven times as long here."""
    ordered = np.sort(numbers)
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))] if len(ordered) else ordered


def _overlap(hashes: U64, offsets: I64, left: I64, right: I64) -> F64:
    """Return the Jaccard index of pairs of texts, given one after the other: (P,).

    All n-grams are sorted at once, as one number each: the pair, as many bits of the hash as are left, and the side.
    What differs from the one before is of the union; what differs but for the side, of the intersection.
    """
    texts = np.stack((left, right), axis=1).ravel()  # (2 P,)
    sizes = np.diff(offsets)[texts]
    ends = np.cumsum(sizes)
    bits = max(1, (len(left) - 1).bit_length())
    keys = hashes[np.arange(ends[-1]) + np.repeat(offsets[texts] - ends + sizes, sizes)] >> np.uint64(bits)
    keys &= ~np.uint64(1)
    names = (np.arange(len(texts), dtype=np.uint64) >> np.uint64(1)) << np.uint64(64 - bits)
    keys |= np.repeat(names | (np.arange(len(texts), dtype=np.uint64) & np.uint64(1)), sizes)
    keys.sort()
    differs = np.ones((2, len(keys)), dtype=np.bool_)
    differs[0, 1:] = keys[1:] != keys[:-1]
    keys >>= np.uint64(1)
    differs[1, 1:] = keys[1:] != keys[:-1]
    sided, union = np.add.reduceat(differs, np.concatenate(([0], ends[1:-1:2])), axis=1, dtype=np.int64)
    index: F64 = (sided - union) / union
    return index
