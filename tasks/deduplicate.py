"""Copies: the part of curation that compares texts, drops what is said twice, and counts what splits share.

No step, but the curate step's own: it stands between the nouns, which compare, and `text_chunks`, which maps them
over all texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import polars as pl

from tasks.dialogue.dedupe import (
    Likeness,
    duplicates,
    leaks,
    likeness,
    near_duplicates,
    repeated_prompts,
    shared,
)
from tasks.dialogue.leakage import Compared, crossing
from tasks.dialogue.minhash import bands, compute
from tasks.dialogue.near_duplicates import Prints, jaccard
from tasks.dialogue.settings import MINHASH_PERMUTATIONS, PROTECTION, SHINGLE_WORDS, DuplicateSettings
from tasks.dialogue.split import in_order, splits
from tasks.dialogue.texts import Texts
from tasks.dialogue.tree import nearest_above
from tasks.dialogue.verdicts import Verdicts, near_evidence
from tasks.text_chunks import map_texts


def prints_of(texts: Texts, kept: list[bool], limits: DuplicateSettings, workers: int = 0) -> Prints:
    """Return the fingerprints of the kept messages' texts; zeros stand for those of the others.

    Args:
        texts: Of N messages.
        kept: (N,) the rows to look at.
        limits: What counts as alike.
        workers: Threads, as in `map_texts`.
    """
    rows = np.flatnonzero(kept)
    count, _ = bands(MINHASH_PERMUTATIONS, limits.jaccard_threshold)
    made = Prints(
        np.zeros((len(kept), 2), dtype=np.uint64),
        np.zeros(len(kept), dtype=np.int32),
        np.zeros((len(kept), count), dtype=np.uint32),
    )
    threshold = limits.jaccard_threshold
    fingerprint = partial(compute, ngram=SHINGLE_WORDS, permutations=MINHASH_PERMUTATIONS, threshold=threshold)
    done = 0
    for part, within in texts.parts(rows):
        found = Prints.of(map_texts(part.gather(within), fingerprint, workers))
        own = rows[done : done + len(within)]
        made.digests[own], made.chars[own], made.keys[own] = found.digests, found.chars, found.keys
        done += len(within)
    return made


@dataclass(frozen=True)
class Copies:
    """Drops copies from N judged messages.

    Attributes:
        table: The messages, parents first: message_id, parent_id, role, split, rank, label_quality, message_tree_id.
        parents: (N,) row of each parent, -1 at a root.
        verdicts: Of each; what is dropped enters here.
        given: What is compared.
        alike: What was found alike of what the filters left.
        drop_stranded: Drops what cannot stay after others were dropped.
    """

    table: pl.DataFrame
    parents: list[int]
    verdicts: Verdicts
    given: Compared
    alike: Likeness
    drop_stranded: Callable[[], None]

    def separate(self) -> None:
        """Drop what two splits share from the less protected one; first, so that no copy goes for one that leaks."""
        verdicts, ids = self.verdicts, self.table["message_id"]
        for yielding in PROTECTION[1:]:
            verdicts.drop_copies("leak", leaks(self.table, self.alike, verdicts.kept(), yielding), ids)
            if self.alike.crowded:
                verdicts.drop_copies("leak", crossing(self.given, self.alike, verdicts.kept(), yielding), ids)
            self.drop_stranded()

    def thin(self) -> None:
        """Drop copies and near copies from the train split; where many are alike, until no more are found."""
        table, verdicts, given, alike, limits = self.table, self.verdicts, self.given, self.alike, self.given.limits
        ids = table["message_id"]  # no list: of a million, strings of Python take 110 MB
        if not limits.keep_duplicate_prompts:
            found = repeated_prompts(table, alike, self.parents, verdicts.kept())
            verdicts.drop_copies("near_duplicate", found, ids)
            self.drop_stranded()
        if limits.dedupe:
            twins = duplicates(table, given.prints, self.parents, verdicts.kept())
            verdicts.drop_copies("duplicate", {row: (twin, 1.0) for row, twin in twins.items()}, ids)
        while limits.near_dedupe:
            found = near_duplicates(table, alike, self.parents, verdicts.kept())
            verdicts.drop_copies("near_duplicate", found, ids)
            self.drop_stranded()
            if not found or not alike.crowded:
                break
            alike = likeness(table, given.prints, given.texts_of, verdicts.kept(), limits)

    def follow(self) -> None:
        """Let evidence name messages that are kept: a twin may have gone for its own twin, or with what stood above."""
        verdicts, given, ids = self.verdicts, self.given, self.table["message_id"]
        moved = verdicts.outlived()
        if not moved:
            return
        rows, ends = (np.array([*side], dtype=np.int64) for side in (moved.keys(), moved.values()))
        similarity = jaccard(given.texts_of, SHINGLE_WORDS, rows, ends).tolist()
        above = nearest_above(self.parents, [not stays for stays in verdicts.kept()])
        for (row, last), index in zip(moved.items(), similarity, strict=True):
            if verdicts.reasons[last] is None:
                told = "near_duplicate", near_evidence(ids[last], index)
            elif above[row] >= 0:
                told = "parent", ids[above[row]]
            else:
                continue
            verdicts.reasons[row], verdicts.evidence[row] = told


def shared_across_splits(
    copies: Copies, filtered: list[bool], shares: tuple[float, float]
) -> dict[str, dict[str, int]]:
    """Count the first prompts and long messages of which a copy, or else a near copy, stands in another split.

    `kept` is what is written, 0 if splits are separated: what is kept is compared once more, in every bucket, so that
    this would find what separating missed. The others are what three ways to split would share of what the filters
    left: by tree as here, by row at random, and by the order of the file.

    Args:
        copies: After all were dropped.
        filtered: (N,) what the filters left.
        shares: Of the trees, for test and for val.
    """
    table, alike, kept = copies.table, copies.alike, copies.verdicts.kept()
    equal, by_tree = replace(alike, near={}), table["split"].to_list()
    compared = alike.related(alike.rows(np.array(filtered, dtype=np.bool_)))
    drawn = splits(table["message_id"].gather(compared), *shares).to_list()
    ways: dict[str, tuple[Sequence[str] | Mapping[int, str], list[bool]]] = {
        "kept": (by_tree, kept),
        "by_tree": (by_tree, filtered),
        "by_row": (dict(zip(compared.tolist(), drawn, strict=True)), filtered),
        "by_file_order": (in_order(len(table), *shares), filtered),
    }
    exact = {way: len(shared(equal, *one)) for way, one in ways.items()}
    near = {way: shared(alike, *one) for way, one in ways.items()}
    for yielding in PROTECTION[1:]:
        near["kept"] |= crossing(copies.given, alike, kept, yielding).keys()
    return {way: {"exact": exact[way], "near": len(near[way]) - exact[way]} for way in ways}
