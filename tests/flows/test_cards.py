"""Laws of the cards: what comes from data is inert, and a server that is away costs nothing."""

from pathlib import Path

import pytest

from flows import cards
from tasks.artifacts import Messages
from tasks.step import Outcome
from tasks.store.manifest import Manifest


def outcome(counts: dict[str, object]) -> Outcome:
    manifest = Manifest("f" * 64, "messages", {"step": "parse"}, {}, "0" * 64, counts)
    return Outcome("parse", Messages(Path("messages") / ("f" * 12), manifest), False, 1.25, "params.text: a|b -> `c`")


def test_a_card_holds_every_count_and_table_of_counts() -> None:
    card = cards.card(outcome({"trees": 1234, "share": 0.123456, "funnel": {"deleted": 90, "spam": 15}}))
    for line in ("| trees | 1,234 |", "| share | 0.1235 |", "| funnel | |", "| deleted | 90 |", "| spam | 15 |"):
        assert line in card
    assert "messages/ffffffffffff" in card


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a | b", "`x`\n# y", "<img onerror=x>"])
def test_text_of_the_data_can_neither_make_html_nor_leave_its_cell(text: str) -> None:
    line = next(line for line in cards.counts_table({text: 1}).splitlines() if line.endswith("| 1 |"))
    assert line.count("|") == 3
    assert not set("<>`") & set(line)


def test_a_failure_to_publish_is_said_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ConnectionError("the server is away")

    assert cards.best_effort(fail) is None
    assert "the server is away" in caplog.text


def test_the_page_of_a_run_draws_the_chain() -> None:
    page = cards.summary("quick|start", [outcome({}), outcome({})])
    assert 'parse["messages/ffffffffffff"] --> parse["messages/ffffffffffff"]' in page
    assert "quick&#124;start" in page
