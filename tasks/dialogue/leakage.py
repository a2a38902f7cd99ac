"""What crosses splits: messages of one split that a more protected one holds, too, or nearly, however many are alike.

`near.pairs` looks through a crowded bucket only so far, which is enough to thin it out but lets two splits share what
stands far apart in it. Here each message of the split that yields is compared with every guard that shares a bucket
with it, until one is found that is alike; so where thousands are alike, the first guards settle nearly all.

Letters: A messages that yield, G guards, P pairs of them, S n-grams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.dialogue.dedupe import Likeness, Twin
from tasks.dialogue.near_duplicates import Prints, TextsOf, jaccard, ngrams_of
from tasks.dialogue.settings import PROTECTION, SHINGLE_WORDS, DuplicateSettings, Split

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

_SMALL = 1 << 12  # pairs of a bucket up to which all are counted at once
_MOST = 1 << 12  # guards in a bucket that are compared; where more share one, whatever yields goes unread
_BLOCK = 1 << 12  # messages of a crowd whose n-grams are in memory at once
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Compared:
    """What is compared: N messages.

    Attributes:
        replies: (N,) whether each is a reply; prompts are compared with prompts only.
        splits: (N,) of each.
        prints: Of each text.
        texts_of: Gives the texts of rows.
        limits: What counts as alike.
    """

    replies: NDArray[np.bool_]
    splits: pl.Series
    prints: Prints
    texts_of: TextsOf
    limits: DuplicateSettings


def crossing(given: Compared, alike: Likeness, kept: Sequence[bool], yielding: Split) -> dict[int, Twin]:
    """Return the messages of a split that a more protected split holds, too, or nearly: row -> twin there.

    The pairs in `alike` are not looked at, so this finds what `leaks` missed. In a bucket of more guards than can be
    compared every message that yields is returned, with its similarity to the first, which may be below the threshold.

    Args:
        given: N messages.
        alike: Says which of them are compared.
        kept: (N,) the rows to look at.
        yielding: The split that gives way.
    """
    rows = alike.rows(np.array(kept, dtype=np.bool_))
    guarding = given.splits.is_in(PROTECTION[: PROTECTION.index(yielding)]).to_numpy()
    yields = (given.splits == yielding).to_numpy()
    found: dict[int, Twin] = {}
    for side in (False, True):
        own = rows[given.replies[rows] == side]
        asks, guards = own[yields[own]], own[guarding[own]]
        twins = _settled(given, _ones(alike.said, asks), _ones(alike.said, guards))
        of_text = {int(alike.said[row]): twin for row, twin in twins.items()}
        found |= {row: of_text[text] for row, text in zip(asks.tolist(), alike.said[asks].tolist(), strict=True)
                  if text in of_text}  # fmt: skip
    return found


def _ones(said: I64, rows: I64) -> I64:
    """Return the first of the rows that say each text, in the order of the texts' digests."""
    return rows[np.unique(said[rows], return_index=True)[1]]


def _settled(given: Compared, asks: I64, guards: I64) -> dict[int, Twin]:
    """Return the asks that a guard is like: row -> that guard."""
    found: dict[int, Twin] = {}
    if not len(asks) or not len(guards):
        return found
    small, large = [np.empty(0, dtype=np.uint64)], []
    for band_asks, band_guards in _buckets(given.prints.keys[asks], given.prints.keys[guards]):
        if len(band_asks) * len(band_guards) <= _SMALL:
            pairs = (band_asks.astype(np.uint64)[:, None] << _HALF) | band_guards.astype(np.uint64)
            small.append(pairs.ravel())
        else:
            large.append((asks[band_asks], guards[band_guards]))
    pairs = np.unique(np.concatenate(small))
    left, right = asks[(pairs >> _HALF).astype(np.int64)], guards[(pairs & _LOW).astype(np.int64)]
    similarity = jaccard(given.texts_of, SHINGLE_WORDS, left, right)
    for at in np.flatnonzero(similarity >= given.limits.jaccard_threshold).tolist():
        found.setdefault(int(left[at]), (int(right[at]), float(similarity[at])))
    for crowd, others in large:
        open_still = np.array([row for row in crowd.tolist() if row not in found], dtype=np.int64)
        for start in range(0, len(open_still), _BLOCK):
            found |= _crowd(given, np.sort(open_still[start : start + _BLOCK]), others)
    return found


def _buckets(asks: NDArray[np.uint32], guards: NDArray[np.uint32]) -> Iterator[tuple[I64, I64]]:
    """Yield of each bucket that holds both the places of its asks and of its guards."""
    for bands in zip(np.ascontiguousarray(asks.T), np.ascontiguousarray(guards.T), strict=True):
        fewer = np.unique(min(bands, key=len))  # what the others are looked for in: most share no bucket with any
        shared = [_found_in(fewer, keys) for keys in bands]
        common = np.intersect1d(*(keys[places] for keys, places in zip(bands, shared, strict=True)))
        if not len(common):
            continue
        sides = []
        for keys, places in zip(bands, shared, strict=True):
            order = places[np.argsort(keys[places], kind="stable")]
            edges = [np.searchsorted(keys[order], common, side=edge) for edge in ("left", "right")]
            sides.append([order[start:stop] for start, stop in zip(*(edge.tolist() for edge in edges), strict=True)])
        yield from zip(*sides, strict=True)


def _found_in(known: NDArray[np.uint32], keys: NDArray[np.uint32]) -> I64:
    """Return the places of keys that are among the known ones, which are sorted and at least one."""
    places: I64 = np.flatnonzero(known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys)
    return places


def _crowd(given: Compared, asks: I64, guards: I64) -> dict[int, Twin]:
    """Compare asks, in order, with one guard after the other, and each only until one is alike."""
    ngram, threshold = SHINGLE_WORDS, given.limits.jaccard_threshold
    if len(guards) > _MOST:
        similarity = jaccard(given.texts_of, ngram, asks, np.full_like(asks, guards[0]))
        return {row: (int(guards[0]), index) for row, index in zip(asks.tolist(), similarity.tolist(), strict=True)}
    (held, ends), (sought, sizes) = _sets(given, np.sort(guards)), _sets(given, asks)
    ids = np.unique(np.concatenate((held, sought)), return_inverse=True)[1]
    held, sought, sizes = ids[: len(held)], ids[len(held) :], np.diff(sizes)
    marked, places = np.zeros(len(ids), dtype=np.bool_), np.searchsorted(np.sort(guards), guards)
    found: dict[int, Twin] = {}
    for guard, place in zip(guards.tolist(), places.tolist(), strict=True):
        own = held[ends[place] : ends[place + 1]]
        marked[own] = True
        both = np.add.reduceat(marked[sought], np.cumsum(sizes) - sizes, dtype=np.int64)
        marked[own] = False
        similarity = both / (sizes + len(own) - both)
        stays = similarity < threshold
        found |= {row: (guard, index) for row, index in zip(asks[~stays].tolist(), similarity[~stays].tolist(),
                                                            strict=True)}  # fmt: skip
        if not stays.any():
            break
        if not stays.all():
            asks, sought, sizes = asks[stays], sought[np.repeat(stays, sizes)], sizes[stays]
    return found


def _sets(given: Compared, rows: I64) -> tuple[I64 | U64, I64]:
    """Return the sets of n-grams of rows, which stand in order: (S,) hashes, and (rows + 1,) where each one's begin."""
    hashes, offsets = ngrams_of(given.texts_of(rows), SHINGLE_WORDS)
    owner = np.repeat(np.arange(len(rows)), np.diff(offsets))
    order = np.lexsort((hashes, owner))
    hashes = hashes[order]  # owners stand in order already
    fresh = np.ones(len(hashes), dtype=np.bool_)
    fresh[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    return hashes[fresh], np.searchsorted(owner[fresh], np.arange(len(rows) + 1))
