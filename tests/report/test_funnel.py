"""Laws of the funnel: it adds up, and strangers' words stay words."""

import copy
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tasks.report.funnel import render_funnel

CURATION: dict[str, Any] = {
    "counts": {
        "trees": 40, "messages": 100, "read": {"trees": 60, "messages": 1_150}, "masked": 3,
        "funnel": {"language": 1_000, "spam": 0, "contaminated": 50}, "facts": {"asked": 275, "told_in_train": 9},
        "label_coverage": {"labels": 0.5, "detoxify": 1.0},
        "shared_across_splits": {
            "kept": {"exact": 0, "near": 0}, "by_tree": {"exact": 36, "near": 1}, "by_row": {"exact": 28, "near": 2},
            "by_file_order": {"exact": 30, "near": 3},
        },
    },
    "by_language": {"language": {"de": 600, "es": 400}, "contaminated": {"en": 50}},
    "cases": {"language": [{"lang": "de", "message_id": "m1", "evidence": "lang de is not en", "head": "Guten Tag"}]},
}  # fmt: skip


def page(curation: dict[str, Any], heads: bool = True) -> str:
    return "\n\n".join(render_funnel(curation, heads, "funnel.svg"))


def test_the_page_tells_every_rule_that_dropped_something_by_language() -> None:
    told = [" ".join(line.split()) for line in page(CURATION).splitlines()]
    assert "| dropped by | all | de | es | en | others |" in told
    assert "| language | 1,000 | 600 | 400 | 0 | 0 |" in told
    assert "| contaminated | 50 | 0 | 0 | 50 | 0 |" in told
    assert not any("spam" in line for line in told)
    assert "| in the order of the file | 30 | 3 |" in told
    assert "| what was written | 0 | 0 |" in told
    assert "de m1 lang de is not en Guten Tag" in told
    assert "9 are told in the train" in page(CURATION)


def test_texts_are_shown_only_where_they_may_be() -> None:
    assert "Guten Tag" not in page(CURATION, heads=False)
    assert "lang de is not en" in page(CURATION, heads=False)


def test_more_languages_than_columns_are_summed_as_others() -> None:
    many = CURATION | {"by_language": {"language": {f"l{number}": 100 for number in range(10)}}}
    many["counts"] = CURATION["counts"] | {"funnel": {"language": 1_000}}
    assert [line.split()[-2] for line in page(many).splitlines() if line.startswith("| language")] == ["400"]


@pytest.mark.parametrize(
    "text", ["```\n# Owned\n```", "<script>x</script>", "| a |\n|---|", "\x1b[31m", "`" * 40, "[x](y)"]
)
@pytest.mark.parametrize("place", ["message_id", "evidence", "head", "lang", "rule"])
def test_whatever_stands_in_the_data_adds_nothing_to_the_page_but_text(text: str, place: str) -> None:
    hostile = copy.deepcopy(CURATION)
    if place == "lang":
        hostile["by_language"]["language"] = {text: 1_000}
    elif place == "rule":
        hostile["cases"] = {text: CURATION["cases"]["language"]}
    else:
        hostile["cases"]["language"][0][place] = text

    def kinds(made: str) -> list[str]:
        tokens = MarkdownIt("commonmark", {"html": True}).enable(["table"]).parse(made)
        found = [token.type for block in tokens for token in (block, *(block.children or []))]
        return [kind for kind in found if not kind.startswith(("th_", "td_", "text", "inline", "code_inline"))]

    assert kinds(page(hostile)) == kinds(page(CURATION))
    assert "\x1b" not in page(hostile)


@pytest.mark.parametrize("lang", ["http://evil.example", "www.evil.example", "evil.example/`a`"])
def test_a_language_tag_is_no_address_that_a_page_would_link_by_itself(lang: str) -> None:
    told = copy.deepcopy(CURATION)
    told["by_language"]["language"] = {lang: 1_000}
    blocks = MarkdownIt("commonmark").enable(["table"]).parse(page(told))
    found = [piece for block in blocks for piece in block.children or [] if "evil" in piece.content]
    assert [(piece.type, piece.content) for piece in found] == [("code_inline", lang)]
