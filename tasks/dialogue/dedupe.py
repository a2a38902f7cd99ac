"""Copies, up to case, width and white space, and near copies: within the data, and across splits.

Two messages are exact twins where everything said up to and including them is the same: the path from the root, role by
role and text by text. So the same answer to another question is no duplicate, and a prompt asked twice is one.

What is in the test or the val split never goes for a copy, or these would lose messages as the data grows; only
`leaks` takes from val what test holds, too.

By their own text, wherever they stand, only first prompts and what is long are compared: a short reply ("Paris.")
rightly answers many questions, and what a short later prompt ("Shorter!") means depends on what stands above it. A long
later prompt goes for a copy only in another split: within one, what stands above it may be other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from tasks.dialogue.near_duplicates import Prints, TextsOf, numbered, pairs
from tasks.dialogue.settings import PROTECTION, SHINGLE_WORDS, DuplicateSettings, Split
from tasks.dialogue.tree import holds

Twin = tuple[int, float]  # row of the message that stays, and how similar the two are: 1 for equal texts
_TRAIN = PROTECTION.index("train")
Bools = NDArray[np.bool_]
I64 = NDArray[np.int64]


def duplicates(messages: pl.DataFrame, prints: Prints, parents: Sequence[int], kept: Sequence[bool]) -> dict[int, int]:
    """Return the messages that can go because the same is said elsewhere: row -> row of the twin that stays.

    Of twins the best stays: in the more protected split, below the twin of its parent that stays, of the best rank, of
    the best quality, first. Another stays only where its subtree holds what is said nowhere else, because nothing is
    moved to another parent. So no path is lost, and copies of whole trees go whole.

    Args:
        messages: N rows, parents first: role, split, rank, label_quality.
        prints: Of N texts; those of rows that are not kept are not looked at.
        parents: (N,) row of each parent, -1 at a root.
        kept: (N,) the rows to look at; with a row, all its ancestors.
    """
    twins = _same_paths(messages["role"] == "assistant", prints, parents, np.flatnonzero(np.array(kept, dtype=bool)))
    worth = _worth(messages, [row for rows in twins for row in rows])
    best_of: dict[int, int] = {}
    for rows in twins:  # in the order of their first rows, so after their parents: the best of these is known by then
        best = min(rows, key=lambda row: (worth[row][0], parents[row] in best_of, worth[row]))
        best_of.update((row, best) for row in rows if row != best and worth[row][0] == _TRAIN)
    if not best_of:
        return {}
    needed = holds(parents, [stays and row not in best_of for row, stays in enumerate(kept)])
    return {row: best for row, best in best_of.items() if not needed[row]}


def _same_paths(replies: pl.Series, prints: Prints, parents: Sequence[int], rows: I64) -> list[list[int]]:
    """Return the rows up to and with which the same is said, where there are several: in the order of the first.

    What is said by one message only has no twin and is a path of its own: few rows are left to look at.
    """
    number = numbered(prints, rows)[0] * 2 + replies.to_numpy()[rows]
    again = np.bincount(number, minlength=1)[number] > 1
    path_of: dict[int, int] = {}  # row -> first row of the same path
    first: dict[tuple[int, int], int] = {}  # first row of the parent's path, what is said -> first row of this path
    paths: dict[int, list[int]] = defaultdict(list)
    for row, said in zip(rows[again].tolist(), number[again].tolist(), strict=True):
        above = path_of.get(parents[row], parents[row])
        path_of[row] = first.setdefault((above, said), row)
        paths[path_of[row]].append(row)
    return [found for found in paths.values() if len(found) > 1]


@dataclass(frozen=True)
class Likeness:
    """Which of the compared messages say the same or nearly the same.

    Attributes:
        said: (N,) number of each row's text, -1 where it is not compared; equal texts of a role have one number.
        near: Number -> the numbers of texts alike but not equal, with their similarity, the most similar first.
        crowded: Whether so many were candidates for each other that not all were compared.
    """

    said: I64
    near: Mapping[int, Sequence[tuple[int, float]]]
    crowded: bool = False

    def around(self, text: int) -> list[tuple[int, float]]:
        """Return the texts like one with their similarity: itself, then others, the most similar first."""
        return [(text, 1.0), *self.near.get(text, ())]

    def rows(self, kept: Bools) -> I64:
        """Return the compared rows among some."""
        return np.flatnonzero(kept & (self.said >= 0))

    def related(self, rows: I64) -> I64:
        """Return those rows of which a copy or a near copy is among the rows, or could be."""
        if not len(rows):
            return rows
        several = np.bincount(self.said[rows]) > 1
        several[[text for text in self.near if text < len(several)]] = True
        return rows[several[self.said[rows]]]


def likeness(
    messages: pl.DataFrame,
    prints: Prints,
    texts_of: TextsOf,
    kept: Sequence[bool],
    limits: DuplicateSettings,
) -> Likeness:
    """Compare first prompts and long later ones with each other, and long replies with each other.

    Args:
        messages: N rows: parent_id, role.
        prints: Of N texts; those of rows that are not kept are not looked at.
        texts_of: Gives the texts of rows.
        kept: (N,) the rows to look at.
        limits: What is compared, and what counts as alike.
    """
    said = np.full(len(messages), -1, dtype=np.int64)
    near: dict[int, list[tuple[int, float]]] = defaultdict(list)
    replies = (messages["role"] == "assistant").to_numpy()
    compared = (prints.chars >= limits.dedupe_min_chars) | (~replies & messages["parent_id"].is_null().to_numpy())
    compared &= np.array(kept, dtype=np.bool_)
    first, crowded = 0, False
    for side in (False, True):
        rows = np.flatnonzero(compared & (replies == side))
        number, one_of = numbered(prints, rows)
        said[rows] = first + number
        found = pairs(prints.take(one_of), _places(texts_of, one_of), SHINGLE_WORDS, limits.jaccard_threshold)
        columns = (first + found.left, first + found.right, found.similarity)
        for one, other, similarity in zip(*(column.tolist() for column in columns), strict=True):
            near[one].append((other, similarity))
            near[other].append((one, similarity))
        first, crowded = first + len(one_of), crowded or found.crowded
    ordered = {text: sorted(others, key=lambda one: (-one[1], one[0])) for text, others in near.items()}
    return Likeness(said, ordered, crowded)


def _places(texts_of: TextsOf, rows: I64) -> TextsOf:
    """Return what gives the texts at places in a list of rows; it asks for rows in order."""

    def found(places: I64) -> pa.Array:
        order = np.argsort(rows[places])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return texts_of(rows[places][order]).take(pa.array(back))

    return found


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
    replies = (messages["role"] == "assistant").to_numpy()
    compared = alike.rows(np.array(kept, dtype=np.bool_))
    found = _worse(messages, alike, parents, compared[replies[compared]])
    own = np.array(kept, dtype=np.bool_) & replies
    own[[*found]] = False
    needed = holds(parents, own.tolist())
    roots = compared[~replies[compared] & (np.array(parents)[compared] < 0)].tolist()
    yields = dict(zip(roots, (messages["split"].gather(roots) == "train").to_list(), strict=True))
    answered: dict[int, int] = {}
    for row in roots:
        if needed[row]:
            answered.setdefault(int(alike.said[row]), row)
    left = {
        row: _first(alike.around(int(alike.said[row])), answered) for row in roots if yields[row] and not needed[row]
    }
    gone = {row: twin for row, twin in found.items() if not needed[row]}
    return gone | {row: twin for row, twin in left.items() if twin}


def repeated_prompts(
    messages: pl.DataFrame, alike: Likeness, parents: Sequence[int], kept: Sequence[bool]
) -> dict[int, Twin]:
    """Return the first prompts that a better one nearly repeats, whatever stands below them; as `near_duplicates`."""
    prompts = (messages["role"] == "prompter").to_numpy() & (np.array(parents) < 0)  # a root can be a reply, too
    return _worse(messages, alike, parents, alike.rows(np.array(kept, dtype=np.bool_) & prompts))


def leaks(messages: pl.DataFrame, alike: Likeness, kept: Sequence[bool], yielding: Split) -> dict[int, Twin]:
    """Return the messages of a split that a more protected split holds, too, or nearly: row -> twin there.

    Args:
        messages: N rows: split.
        alike: What is similar.
        kept: (N,) the rows to look at.
        yielding: The split that gives way.
    """
    rows = alike.related(alike.rows(np.array(kept, dtype=np.bool_)))
    guards, splits = PROTECTION[: PROTECTION.index(yielding)], messages["split"].gather(rows).to_list()
    said = list(zip(rows.tolist(), alike.said[rows].tolist(), splits, strict=True))
    held: dict[int, int] = {}
    for row, text, split in said:
        if split in guards:
            held.setdefault(text, row)
    found = {row: _first(alike.around(text), held) for row, text, split in said if split == yielding}
    return {row: twin for row, twin in found.items() if twin}


def shared(alike: Likeness, splits: Sequence[str] | Mapping[int, str], kept: Sequence[bool]) -> set[int]:
    """Return the compared rows of which a copy or a near copy stands in another split.

    Args:
        alike: What is similar.
        splits: Of each row; of those in `alike.rows(kept)` at least.
        kept: (N,) the rows to look at.
    """
    where: dict[int, set[str]] = defaultdict(set)
    rows = alike.related(alike.rows(np.array(kept, dtype=np.bool_)))
    said = list(zip(rows.tolist(), alike.said[rows].tolist(), strict=True))
    for row, text in said:
        where[text].add(splits[row])
    return {row for row, text in said if any(where.get(near, set()) - {splits[row]} for near, _ in alike.around(text))}


def _worse(messages: pl.DataFrame, alike: Likeness, parents: Sequence[int], rows: I64) -> dict[int, Twin]:
    """Go through rows, the best first: of train, each goes if one like it stays; of equals the lesser id stays."""
    related = alike.related(rows)  # others neither go nor make others go
    chosen = related.tolist()
    worth = _worth(messages, chosen)
    names = [messages[name].gather(related).to_list() for name in ("message_id", "message_tree_id")]
    ids, trees = (dict(zip(chosen, column, strict=True)) for column in names)
    beside: dict[tuple[int, int], int] = {}  # text, parent -> the row that stays
    stays: dict[int, list[int]] = defaultdict(list)  # text -> the best of two trees: one of them is another's
    found: dict[int, Twin] = {}
    for row in sorted(chosen, key=lambda row: (worth[row][:3], ids[row], trees[row])):
        own = int(alike.said[row])
        for text, similarity in alike.around(own) if worth[row][0] == _TRAIN else ():
            near = [beside[text, parents[row]]] if (text, parents[row]) in beside else []
            near += [other for other in stays[text] if trees[other] != trees[row]]
            if near:
                found[row] = near[0], similarity
                break
        else:
            beside.setdefault((own, parents[row]), row)
            if len(stays[own]) < 2 and trees[row] not in {trees[other] for other in stays[own]}:
                stays[own].append(row)
    return found


def _first(texts: Iterable[tuple[int, float]], held: Mapping[int, int]) -> Twin | None:
    return next(((held[text], similarity) for text, similarity in texts if text in held), None)


def _worth(messages: pl.DataFrame, rows: Sequence[int]) -> dict[int, tuple[int, float, float, int]]:
    """Return what decides between twins among some rows, the smaller the better: split, rank, quality, place."""
    table = messages.select("split", "rank", pl.col("label_quality").fill_nan(None))[list(rows)]
    return {
        row: (PROTECTION.index(split), float("inf") if rank is None else rank, -(quality or 0.0), row)
        for row, (split, rank, quality) in zip(rows, table.iter_rows(), strict=True)
    }
