"""Laws of the cards: what comes from data is inert, and a server that is away costs nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from flows import ui
from tasks.artifacts import Dialogues, Messages
from tasks.report.funnel import WAYS
from tasks.report.markdown import inline_name, printable
from tasks.step import Outcome
from tasks.store.manifest import Manifest


def outcome(counts: dict[str, object]) -> Outcome:
    manifest = Manifest("f" * 64, "messages", {"step": "parse"}, {}, "0" * 64, counts)
    return Outcome("parse", Messages(Path("messages") / ("f" * 12), manifest), False, 1.25, "params.text: a|b -> `c`")


def test_a_card_holds_every_count_and_table_of_counts() -> None:
    card = ui.card(outcome({"trees": 1234, "share": 0.123456, "funnel": {"deleted": 90, "spam": 15}}))
    for line in ("| trees | 1,234 |", "| share | 0.1235 |", "| funnel | |", "| deleted | 90 |", "| spam | 15 |"):
        assert line in card
    assert "messages/ffffffffffff" in card


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a | b", "`x`\n# y", "<img onerror=x>"])
def test_text_of_the_data_can_neither_make_html_nor_leave_its_cell(text: str) -> None:
    line = next(line for line in ui.counts_table({text: 1}).splitlines() if line.endswith("| 1 |"))
    assert line.count("|") == 3
    assert {kind for kind, _ in pieces(line) if not kind.startswith(("paragraph", "inline"))} == {"text", "code_inline"}


HOSTILE = (
    "![px](http://evil.example/1.png)", "[click](http://evil.example)", "<http://evil.example>", "http://evil.example",
    "www.evil.example", "me@evil.example", "**b** _i_ ~~s~~", "# head", "- item", "1. item", "> said", "    code",
    "`code`", "`", "``a` b", "`|` \\|", "evil.example/x",
    "<b>", "&lt;b&gt;", "a | b", "\\[x](y)", "---", "[x]: http://evil.example", "![x][y]", "a\n\n# b",
)  # fmt: skip


def pieces(page: str) -> Iterator[tuple[str, str]]:
    """Kind and text of every piece of a page, as a parser that also links plain addresses sees it."""
    found = MarkdownIt("gfm-like", {"linkify": False}).parse(page)
    return ((piece.type, piece.content) for block in found for piece in (block, *(block.children or [])))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_the_data_is_text_and_nothing_else_in_markdown(text: str) -> None:
    """Also where a page links addresses by itself, after it has read escapes and references: nowhere in code."""
    shown = " ".join(printable(text).split()).replace("|", "\\x7c")
    assert [piece for piece in pieces(inline_name(text)) if not piece[0].startswith(("paragraph", "inline"))] == [
        ("code_inline", shown)
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_count_of_a_card_makes_a_link_or_an_image(text: str) -> None:
    counts = {"trees": 1, "unknown_fields": {text: 1}, text: {"a": 1}, "said": text}
    kinds = {kind for kind, _ in pieces(ui.card(outcome(counts)))}
    assert not kinds & {"link_open", "image", "html_inline", "html_block", "em_open", "strong_open", "bullet_list_open"}


def test_control_and_direction_marks_are_spelled_out() -> None:
    assert printable("\x1b[31m\x9b\u202e") == "\\x1b[31m\\x9b\\u202e"
    assert inline_name("\x1b\u202e").isascii()


def test_the_page_of_a_run_draws_the_chain() -> None:
    page = ui.summary("quick|start", [outcome({}), outcome({})])
    assert 'parse["messages/ffffffffffff"] --> parse["messages/ffffffffffff"]' in page
    assert "# Treeline: `quick\\x7cstart`" in page


def test_the_card_of_dialogues_shows_the_funnel_with_ids_and_evidence_but_no_texts(tmp_path: Path) -> None:
    counts: dict[str, Any] = {
        "trees": 1, "messages": 2, "read": {"trees": 2, "messages": 4}, "masked": 0, "funnel": {"spam": 2},
        "label_coverage": {"labels": 1.0, "detoxify": 1.0}, "facts": {},
        "shared_across_splits": {way: {"exact": 0, "near": 0} for way in WAYS},
    }  # fmt: skip
    case = {"lang": "en", "message_id": "m1", "evidence": "label_spam 0.9 > 0.5", "head": "BUY <b>NOW</b>"}
    told = {"counts": counts, "by_language": {"spam": {"en": 2}}, "cases": {"spam": [case]}}
    (tmp_path / "curation.json").write_text(json.dumps(told))
    made = Dialogues(tmp_path, Manifest("f" * 64, "dialogues", {"step": "curate"}, {}, "0" * 64, counts))
    card = ui.card(Outcome("curate", made, False, 1.0, "forced"))
    assert "m1  label_spam 0.9 > 0.5" in card
    assert "NOW" not in card
    assert "![funnel](data:image/svg+xml;base64," in card
