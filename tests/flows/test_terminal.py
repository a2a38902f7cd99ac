"""Laws of what the terminal shows."""

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flows import store_commands
from flows.__main__ import parser
from flows.terminal import Bars, amount_of, brief, console, json_text, table
from tasks.progress import bar, listening, track
from tasks.sources import ROOTS

HOSTILE = (
    '{"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": '
    '{"message_id": "t", "text": "\\u001b[31mred\\u0007", "role": "prompter"}}\n'
)


def test_amounts_are_counted_in_their_unit_and_bytes_in_megabytes() -> None:
    assert amount_of(894, 996, "steps") == "894/996 steps"
    assert amount_of(9_225_355, 9_225_355, "bytes") == "9.2/9.2 MB"
    assert amount_of(12_000, None, "rows") == "12,000 rows"


def test_brief_counts_are_plain_numbers() -> None:
    assert brief({"trees": 4569, "funnel": {"spam": 1}, "share": 0.12345}) == "trees 4,569, share 0.123"


def test_bars_move_and_nothing_to_do_has_none() -> None:
    bars = Bars()
    bars.progress.live.console = Console(file=io.StringIO())
    with listening(bars):
        assert list(track(range(3), "count", 3, "things")) == [0, 1, 2]
        with bar("open", None, "rows") as shown:
            shown.advance(5, note="so far")
        with bar("nothing", 0, "rows") as shown:
            shown.advance()
    assert [(task.description, task.completed, task.total) for task in bars.progress.tasks] == [
        ("count", 3, 3),
        ("open", 5, 5),
    ]


def test_an_escape_in_the_data_never_reaches_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trees.jsonl").write_text(HOSTILE)
    monkeypatch.setenv(ROOTS, str(tmp_path))
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / "artifacts"))
    from tasks.download import DownloadParams, DownloadRuntime, download
    from tasks.parse import ParseParams, parse

    raw = download(DownloadParams(source="file", path=str(tmp_path / "trees.jsonl")), DownloadRuntime())
    parse(raw, ParseParams())
    for kind in ("raw", "messages"):
        assert store_commands.show(parser().parse_args(["show", kind])) == 0
    shown = capsys.readouterr().out
    assert "red" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


MARKUP = "[INST] [/INST] [link=x]y[/] :smile: [red]\x1b[31m"


def test_a_text_is_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(table(f"{MARKUP} 1", (f"{MARKUP} 2", "step"), [(f"{MARKUP} 3", "cached")]))
    bars = Bars()
    with bars.shown(), bars.bar(f"{MARKUP} 4", 1, "things") as shown:
        shown.advance(note=f"{MARKUP} 5")
    console().print(f"{MARKUP} 6", markup=None)
    told = capsys.readouterr()
    for number, said in enumerate([told.out] * 3 + [told.err] * 2 + [told.out], 1):
        assert re.search(rf"\[INST\] \[/INST\] \[link=x\]y\[/\] :smile: \[red\]\S+ {number}", said)


STRANGE = st.text(st.characters() | st.sampled_from('\x1b\x7f\x9b\u202e\u2066\u2028\\"\n'))


@given(st.dictionaries(STRANGE, STRANGE))
def test_json_on_a_terminal_holds_no_character_that_it_would_obey_and_reads_the_same(value: dict[str, str]) -> None:
    said = json_text(value, on_terminal=True)
    assert all(character == "\n" or " " <= character <= "~" for character in said)
    assert json.loads(said) == value == json.loads(json_text(value, on_terminal=False))
