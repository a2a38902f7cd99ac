"""Exact copies, up to case, width and white space: within the data, and across splits.

Two messages are twins where everything said up to and including them is the same: the path from the root, role by role
and text by text. So the same answer to another question is no duplicate, and a prompt asked twice is one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import polars as pl

from tasks.dialogue.record import PROTECTION, Split
from tasks.dialogue.threads import holds


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


def leaks(
    messages: pl.DataFrame, texts: Sequence[str], kept: Sequence[bool], yielding: Split, chars: int
) -> dict[int, int]:
    """Return the messages of a split that a more protected split holds, too: row -> row there.

    First prompts are compared, and replies that are long enough to be copies: a short one ("Paris.") rightly answers
    many questions, of which some are held out.

    Args:
        messages: N rows: parent_id, role, split.
        texts: (N,) normalised.
        kept: (N,) the rows to look at.
        yielding: The split that gives way.
        chars: Characters from which on a normalised reply is compared.
    """
    guards = PROTECTION[: PROTECTION.index(yielding)]
    held: dict[tuple[str, str], int] = {}
    sought: dict[int, tuple[str, str]] = {}
    rows = messages.select("role", "split", pl.col("parent_id").is_null()).iter_rows()
    for row, (role, split, is_root) in enumerate(rows):
        compared = len(texts[row]) >= chars if role == "assistant" else is_root
        if not (kept[row] and compared):
            continue
        if split == yielding:
            sought[row] = (role, texts[row])
        elif split in guards:
            held.setdefault((role, texts[row]), row)
    return {row: held[said] for row, said in sought.items() if said in held}


def _worth(messages: pl.DataFrame) -> list[tuple[int, float, float, int]]:
    """Return what decides between twins, the smaller the better: split, rank, quality, place."""
    rows = messages.select("split", "rank", pl.col("label_quality").fill_nan(None)).iter_rows()
    return [
        (PROTECTION.index(split), float("inf") if rank is None else rank, -(quality or 0.0), row)
        for row, (split, rank, quality) in enumerate(rows)
    ]
