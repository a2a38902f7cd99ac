"""The tally of curation: what was kept, where the rest went, and what a report says of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from tasks.dialogue.pii import masked
from tasks.dialogue.settings import PROTECTION
from tasks.dialogue.texts import Texts
from tasks.dialogue.tree import parent_rows
from tasks.dialogue.verdicts import Verdicts

TOP_LANGUAGES = 20  # what a summary can show
CASES = 3  # shown of each rule and language
HEAD = 80  # characters of a case's text
COLUMNS = 6  # languages that have a column of their own in a report, and cases of a rule


def counts(table: pl.DataFrame, verdicts: Verdicts) -> dict[str, Any]:
    """Count what was read and what is kept; `trees` and `messages` are the kept ones.

    Args:
        table: N messages with message_tree_id, role, lang and split.
        verdicts: Of each.
    """
    kept = table.filter(pl.Series(verdicts.kept(), dtype=pl.Boolean))
    return {
        "trees": kept["message_tree_id"].n_unique(),
        "messages": len(kept),
        "dropped": len(table) - len(kept),
        "read": _sizes(table),
        "splits": {name: _sizes(kept.filter(pl.col("split") == name)) for name in reversed(PROTECTION)},
        "languages": _languages(table),
    }


def funnel(verdicts: Verdicts, rules: Iterable[str]) -> dict[str, int]:
    """Return the messages dropped by each rule, in the order of the rules."""
    found = Counter(verdicts.reasons)
    return {name: found[name] for name in rules}


def replies_dropped(table: pl.DataFrame, verdicts: Verdicts) -> dict[str, int]:
    """Return the replies that went by each rule; those below what was dropped count for the rule that dropped that."""
    found = [*verdicts.reasons]
    for row, parent in enumerate(parent_rows(table)):
        if found[row] == "parent":
            found[row] = found[parent]
    replies = (table["role"] == "assistant").to_list()
    return dict(Counter(rule for rule, reply in zip(found, replies, strict=True) if reply and rule).most_common())


def _sizes(kept: pl.DataFrame) -> dict[str, int]:
    replies = int((kept["role"] == "assistant").sum())
    return {"trees": kept["message_tree_id"].n_unique(), "messages": len(kept), "replies": replies}


def coverage(messages: pl.LazyFrame, groups: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Return the share of messages that have a value in any column of each group: rules on them see no others."""
    shares = {
        name: pl.any_horizontal(pl.col(column).is_not_null() for column in columns).mean()
        for name, columns in groups.items()
    }
    found = messages.select(**shares).collect().row(0, named=True)
    return {name: round(share or 0.0, 4) for name, share in found.items()}


def _languages(table: pl.DataFrame) -> dict[str, int]:
    """Return messages read of each of the most frequent languages; `unknown` where none is given."""
    table = table.select(pl.col("lang").fill_null("unknown")).group_by("lang").len()
    return dict(table.sort("len", "lang", descending=[True, False]).head(TOP_LANGUAGES).iter_rows())


def told(table: pl.DataFrame, verdicts: Verdicts, found: pl.DataFrame) -> int:
    """Return how many facts the kept replies of the train split tell; `found` holds `row` and `fact`."""
    stays = pl.Series(verdicts.kept(), dtype=pl.Boolean) & (table["split"] == "train")
    return int(found.filter(stays.gather(found["row"]))["fact"].n_unique())


def summed(reasons: Sequence[str | None], langs: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """Count what each rule dropped, by language, the most frequent first; `unknown` where no language is given."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for reason, lang in zip(reasons, langs, strict=True):
        if reason is not None:
            found[reason][lang or "unknown"] += 1
    return {reason: dict(sorted(by.items(), key=lambda one: (-one[1], one[0]))) for reason, by in found.items()}


def cases(reasons: Sequence[str | None], langs: Sequence[str | None]) -> dict[str, list[int]]:
    """Return the first rows that each rule dropped of each of its most frequent languages, the most frequent first."""
    found: dict[str, dict[str, list[int]]] = {
        rule: {lang: [] for lang in [*by][:COLUMNS]} for rule, by in summed(reasons, langs).items()
    }
    for row, (reason, lang) in enumerate(zip(reasons, langs, strict=True)):
        rows = found[reason].get(lang or "unknown") if reason is not None else None
        if rows is not None and len(rows) < CASES:
            rows.append(row)
    return {rule: [row for rows in by.values() for row in rows] for rule, by in found.items()}


def curation(table: pl.DataFrame, texts: Texts, verdicts: Verdicts, counts: Mapping[str, Any]) -> dict[str, Any]:
    """Return curation.json: the counts, the funnel by language, and the first cases of each rule, in each language.

    What is personal is masked in the beginnings of texts, also of what went before it was looked for, because a report
    is passed on.
    """
    langs = table["lang"].to_list()
    first = cases(verdicts.reasons, langs)
    shown = sorted({row for rows in first.values() for row in rows})
    heads = {
        row: " ".join(masked(text.as_py())[0][: 4 * HEAD].split())[:HEAD]
        for row, text in zip(shown, texts.of(np.array(shown, dtype=np.int64)), strict=True)
    }
    ids, evidence = table["message_id"], verdicts.evidence
    found = {
        rule: [
            {"lang": langs[row] or "unknown", "message_id": ids[row], "evidence": evidence[row], "head": heads[row]}
            for row in rows
        ]
        for rule, rows in first.items()
    }
    by_language = summed(verdicts.reasons, langs)
    order = [rule for rule in counts["funnel"] if rule in found]
    return {
        "counts": counts,
        "by_language": {rule: by_language[rule] for rule in order},
        "cases": {rule: found[rule] for rule in order},
    }
