"""The funnel: where the messages went, rule by rule and language by language, with the first cases of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.dialogue.stats import CASES, COLUMNS
from tasks.report.markdown import fenced, inline_name, markdown_table, printable

WAYS = {  # name in counts["shared_across_splits"] -> what a reader is told
    "kept": "what was written",
    "by_tree": "by tree, splits not separated",
    "by_row": "by message at random",
    "by_file_order": "in the order of the file",
}


def render_funnel(curation: Mapping[str, Any], heads: bool, picture: str) -> Iterator[str]:
    """Render curation.json as parts of a page.

    Args:
        curation: `counts` of the curate step, `by_language` as `summed` returns it, and `cases`.
        heads: Whether the beginnings of texts are shown. They are strangers' words; ids and evidence are not.
        picture: Where the plot of the funnel lies.
    """
    counts = curation["counts"]
    read, coverage = counts["read"], counts["label_coverage"]
    yield "## Data"
    yield (
        f"Of {read['messages']:,} messages in {read['trees']:,} trees, {counts['messages']:,} in {counts['trees']:,}"
        f" are kept. {coverage['labels']:.1%} have labels, {coverage['detoxify']:.1%} Detoxify's scores; rules on these"
        f" see no others. Personal data is masked in {counts['masked']:,} of the kept texts."
    )
    yield f"![funnel]({picture})"
    yield _funnel(counts["funnel"], curation["by_language"])
    yield from _shared(counts["shared_across_splits"])
    yield from _facts(counts["facts"])
    yield from _cases(curation["cases"], heads)


def _funnel(funnel: Mapping[str, int], by_language: Mapping[str, Mapping[str, int]]) -> str:
    """Return the table of rules and languages; rules that dropped nothing are left out."""
    total: Counter[str] = Counter()
    for languages in by_language.values():
        total.update(languages)
    langs = [lang for lang, _ in sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))[:COLUMNS]]
    rows = []
    for rule, dropped in funnel.items():
        if dropped:
            languages = by_language.get(rule, {})
            shown = [languages.get(lang, 0) for lang in langs]
            rows.append((inline_name(rule), *(f"{number:,}" for number in (dropped, *shown, dropped - sum(shown)))))
    return markdown_table(("dropped by", "all", *map(inline_name, langs), "others"), rows)


def _shared(shared: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Tell how many first prompts and long messages stand in two splits, under each way to split."""
    yield (
        "First prompts and long messages of which a copy, or else a near copy, stands in another split, as written"
        " here, and as three ways to split what the filters left would share them. Copies within a split go from train"
        " alone, so the test split only grows as data does:"
    )
    rows = [(label, *(f"{shared[way][kind]:,}" for kind in ("exact", "near"))) for way, label in WAYS.items()]
    yield markdown_table(("split", "exact", "near"), rows)


def _facts(facts: Mapping[str, int]) -> Iterator[str]:
    if facts:
        yield (
            f"Of {facts['asked']:,} facts that the evaluation asks for, {facts['told_in_train']:,} are told in the"
            " train split: it measures what is remembered of them."
        )


def _cases(cases: Mapping[str, Sequence[Mapping[str, str]]], heads: bool) -> Iterator[str]:
    """Show the first cases of each rule, in a fence: ids and evidence hold what stands in the data, too."""
    lines = []
    for rule, shown in cases.items():
        lines.append(inline_name(rule))
        for case in shown:
            fields = [case["lang"], case["message_id"], case["evidence"], *([case["head"]] if heads else [])]
            lines.append("  " + "  ".join(" ".join(printable(part).split()) for part in fields))
    if lines:
        beginning = ", with the beginning of each text, personal data masked" if heads else ""
        yield f"The first {CASES} cases of each rule in each of its {COLUMNS} most frequent languages{beginning}:"
        yield fenced("\n".join(lines))
