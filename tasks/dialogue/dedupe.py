"""Copies, up to case, width and white space, and near copies: within the data, and across splits.

Two messages are exact twins where everything said up to and including them is the same: the path from the root, role by
role and text by text. So the same answer to another question is no duplicate, and a prompt asked twice is one.

By their own text, wherever they stand, only first prompts and long replies are compared: a short reply ("Paris.")
rightly answers many questions, and what a later prompt means depends on what stands above it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import polars as pl

from tasks.dialogue.near import pairs
from tasks.dialogue.record import PROTECTION, CopyLimits, Split
from tasks.dialogue.threads import holds

Twin = tuple[int, float]  # row of the message that stays, and how similar the two are: 1 for equal texts


def normalised(texts: pl.Series) -> list[str]:
    """Return each text in Unicode's NFKC form, case folded, with single spaces: (N,).

    polars' NFKC, not the standard library's: that one takes time quadratic in a run of combining marks (80,000: 6 s).
    """
    plain: list[str] = texts.to_list()
    wide = [row for row, text in enumerate(plain) if not text.isascii()]  # of ASCII, NFKC changes nothing: 4x faster
    composed = pl.Series([plain[row] for row in wide], dtype=pl.String).str.normalize("NFKC")
    folded = pl.Series([text.casefold() for text in composed], dtype=pl.String).str.normalize("NFKC")
    for row, text in zip(wide, folded, strict=True):
        plain[row] = text
    return [" ".join(text.casefold().split()) for text in plain]


def path_keys(parents: Sequence[int], roles: Iterable[str], texts: Iterable[str]) -> list[bytes]:
    """Return a hash of everything said from the root to each message: (N,) of 16 bytes; twins have the same."""
    keys: list[bytes] = []
    for parent, role, text in zip(parents, roles, texts, strict=True):
        above = keys[parent] if parent >= 0 else b""
        said = f"{role}\0{text}".encode("utf-8", "surrogatepass")
        keys.append(blake2b(above + said, digest_size=16).digest())
    return keys


def duplicates(
    messages: pl.DataFrame, texts: Sequence[str], parents: Sequence[int], kept: Sequence[bool]
) -> dict[int, int]:
    """Return the messages that can go because the same is said elsewhere: row -> row of the twin that stays.

    Of twins the best stays: in the more protected split, below the twin of its parent that stays, of the best rank, of
    the best quality, first. Another stays only where its subtree holds what is said nowhere else, because nothing is
    moved to another parent. So no path is lost, and copies of whole trees go whole.

    Args:
        messages: N rows, parents first: role, split, rank, label_quality.
        texts: (N,) normalised.
        parents: (N,) row of each parent, -1 at a root.
        kept: (N,) the rows to look at; with a row, all its ancestors.
    """
    twins: dict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(path_keys(parents, messages["role"], texts)):
        if kept[row]:
            twins[key].append(row)
    worth = _worth(messages)
    best_of: dict[int, int] = {}
    for rows in twins.values():  # a key is first met after its parent's: the parents' best is known by then
        best = min(rows, key=lambda row: (worth[row][0], parents[row] in best_of, worth[row]))
        best_of.update((row, best) for row in rows if row != best)
    needed = holds(parents, [stays and row not in best_of for row, stays in enumerate(kept)])
    return {row: best for row, best in best_of.items() if not needed[row]}


@dataclass(frozen=True)
class Likeness:
    """Which of the compared messages say the same or nearly the same.

    Attributes:
        said: Row -> number of its text; equal texts of a role have one number.
        near: Number -> the numbers of texts that are alike but not equal, with their similarity.
    """

    said: Mapping[int, int]
    near: Mapping[int, Mapping[int, float]]

    def around(self, row: int) -> list[tuple[int, float]]:
        """Return the texts like a row's with their similarity: its own, then others, the most similar first."""
        own = self.said[row]
        return [(own, 1.0), *sorted(self.near.get(own, {}).items(), key=lambda found: (-found[1], found[0]))]


def likeness(messages: pl.DataFrame, texts: Sequence[str], kept: Sequence[bool], limits: CopyLimits) -> Likeness:
    """Compare first prompts with each other, and long replies with each other.

    Args:
        messages: N rows: parent_id, role.
        texts: (N,) normalised.
        kept: (N,) the rows to look at.
        limits: What is compared, and what counts as alike.
    """
    said: dict[int, int] = {}
    near: dict[int, dict[int, float]] = defaultdict(dict)
    is_root, replies = messages["parent_id"].is_null().to_list(), (messages["role"] == "assistant").to_list()
    first = 0
    for side in (False, True):
        numbers: dict[str, int] = {}
        for row, text in enumerate(texts):
            compared = len(text) >= limits.copy_chars if side else is_root[row]
            if kept[row] and replies[row] == side and compared:
                said[row] = numbers.setdefault(text, first + len(numbers))
        found = pairs([*numbers], limits.near_ngram, limits.near_permutations, limits.near_threshold)
        for one, other, similarity in zip(*(column.tolist() for column in found), strict=True):
            near[first + one][first + other] = near[first + other][first + one] = similarity
        first += len(numbers)
    return Likeness(said, near)


def near_duplicates(
    messages: pl.DataFrame, alike: Likeness, parents: Sequence[int], kept: Sequence[bool]
) -> dict[int, Twin]:
    """Return the replies that can go because a better one nearly says the same, and first prompts left without any.

    Of similar replies the best stays, by split, rank and quality. A reply may repeat one of its own conversation,
    changed as was asked: there, only siblings are compared. A reply with other replies below it that stay, stays. A
    first prompt goes where no reply is left below it and a prompt like it is answered elsewhere; without such a twin
    others judge it.

    Args:
        messages: N rows: role, split, rank, label_quality, message_tree_id, message_id.
        alike: What is similar.
        parents: (N,) row of each parent, -1 at a root.
        kept: (N,) the rows to look at; with a row, all its ancestors.
    """
    replies = (messages["role"] == "assistant").to_list()
    found = _worse(messages, alike, parents, [row for row in alike.said if kept[row] and replies[row]])
    own = [kept[row] and replies[row] and row not in found for row in range(len(messages))]
    needed = holds(parents, own)
    answered: dict[int, int] = {}
    roots = [row for row in alike.said if kept[row] and not replies[row]]
    for row in roots:
        if needed[row]:
            answered.setdefault(alike.said[row], row)
    left = {row: _first(alike.around(row), answered) for row in roots if not needed[row]}
    gone = {row: twin for row, twin in found.items() if not needed[row]}
    return gone | {row: twin for row, twin in left.items() if twin}


def repeated_prompts(
    messages: pl.DataFrame, alike: Likeness, parents: Sequence[int], kept: Sequence[bool]
) -> dict[int, Twin]:
    """Return the first prompts that a better one nearly repeats, whatever stands below them; as `near_duplicates`."""
    roots = [row for row in alike.said if kept[row] and parents[row] < 0]
    return _worse(messages, alike, parents, roots)


def leaks(messages: pl.DataFrame, alike: Likeness, kept: Sequence[bool], yielding: Split) -> dict[int, Twin]:
    """Return the messages of a split that a more protected split holds, too, or nearly: row -> twin there.

    Args:
        messages: N rows: split.
        alike: What is similar.
        kept: (N,) the rows to look at.
        yielding: The split that gives way.
    """
    guards, splits = PROTECTION[: PROTECTION.index(yielding)], messages["split"].to_list()
    held: dict[int, int] = {}
    for row, text in alike.said.items():
        if kept[row] and splits[row] in guards:
            held.setdefault(text, row)
    sought = [row for row in alike.said if kept[row] and splits[row] == yielding]
    found = {row: _first(alike.around(row), held) for row in sought}
    return {row: twin for row, twin in found.items() if twin}


def shared(alike: Likeness, splits: Sequence[str], kept: Sequence[bool]) -> int:
    """Count the compared messages of which a copy or a near copy stands in another split."""
    where: dict[int, set[str]] = defaultdict(set)
    for row, text in alike.said.items():
        if kept[row]:
            where[text].add(splits[row])
    rows = [row for row in alike.said if kept[row]]
    return sum(any(where.get(text, set()) - {splits[row]} for text, _ in alike.around(row)) for row in rows)


def _worse(messages: pl.DataFrame, alike: Likeness, parents: Sequence[int], rows: Sequence[int]) -> dict[int, Twin]:
    """Go through rows, the best first: each goes if one like it stays; of equals the one with the lesser id stays."""
    trees, ids, worth = messages["message_tree_id"].to_list(), messages["message_id"].to_list(), _worth(messages)
    beside: dict[tuple[int, int], int] = {}  # text, parent -> the row that stays
    stays: dict[int, list[int]] = defaultdict(list)  # text -> the best of two trees: one of them is another's
    found: dict[int, Twin] = {}
    for row in sorted(rows, key=lambda row: (worth[row][:3], ids[row], trees[row])):
        for text, similarity in alike.around(row):
            near = [beside[text, parents[row]]] if (text, parents[row]) in beside else []
            near += [other for other in stays[text] if trees[other] != trees[row]]
            if near:
                found[row] = near[0], similarity
                break
        else:
            own = alike.said[row]
            beside.setdefault((own, parents[row]), row)
            if len(stays[own]) < 2 and trees[row] not in {trees[other] for other in stays[own]}:
                stays[own].append(row)
    return found


def _first(texts: Iterable[tuple[int, float]], held: Mapping[int, int]) -> Twin | None:
    return next(((held[text], similarity) for text, similarity in texts if text in held), None)


def _worth(messages: pl.DataFrame) -> list[tuple[int, float, float, int]]:
    """Return what decides between twins, the smaller the better: split, rank, quality, place."""
    rows = messages.select("split", "rank", pl.col("label_quality").fill_nan(None)).iter_rows()
    return [
        (PROTECTION.index(split), float("inf") if rank is None else rank, -(quality or 0.0), row)
        for row, (split, rank, quality) in enumerate(rows)
    ]
