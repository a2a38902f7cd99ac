"""Laws of notices: what a run loses, or takes otherwise than it stood, is said; of clean data nothing is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from flows import run_commands, store_commands, ui
from flows.__main__ import parser
from flows.recipe import Recipe, load
from tasks.artifacts import Artifact, Tokens
from tasks.curate import CurateRuntime, curate
from tasks.download import DownloadParams, DownloadRuntime, download
from tasks.encode import EncodeRuntime, encode
from tasks.notices import FEWEST, NAMED, told
from tasks.parse import parse
from tasks.report.markdown import printable
from tasks.report.page import _notices
from tasks.sources import ROOTS
from tasks.step import Outcome
from tasks.store.manifest import Manifest, Notice

WORDS = (
    "sea", "sun", "moon", "road", "ship", "tree", "bird", "door", "bread", "stone", "river", "light", "house", "garden",
    "market",
)  # fmt: skip


def turns(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """A row of one question and one answer, in English."""
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"lang": "en", "messages": said, **more}


def birds(count: int) -> list[dict[str, Any]]:
    """Rows in which nothing is wrong, each unlike the others."""

    def word(number: int) -> str:
        return f"{WORDS[number % 15]}{WORDS[number // 15 % 15]}{number}"

    return [
        turns(f"Where does {word(row)} {word(row + 7)} end?", f"At {word(row + 3)} {word(row + 5)}.")
        for row in range(count)
    ]


def lost(
    folder: Path, patch: pytest.MonkeyPatch, rows: Sequence[Mapping[str, Any]], *settings: str
) -> dict[str, Notice]:
    """Return what the data half of the quickstart tells of rows."""
    shares = ("curate.val_fraction=0.3", "curate.test_fraction=0.3")
    made = data_of(folder, patch, rows, load("quickstart", [*shares, *settings]))
    return {notice.code: notice for notice in told(one.manifest for one in made)}


def data_of(
    folder: Path, patch: pytest.MonkeyPatch, rows: Sequence[Mapping[str, Any]], recipe: Recipe
) -> list[Artifact]:
    """Return the artifacts of the data half."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    patch.setenv(ROOTS, str(folder))
    patch.setenv("TREELINE_ARTIFACTS", str(folder / "artifacts"))
    raw = download(DownloadParams(source="file", path=str(folder / "rows.jsonl")), DownloadRuntime())
    messages = parse(raw, recipe.parse)
    dialogues = curate(messages, recipe.curate, CurateRuntime(workers=1))
    return [raw, messages, dialogues, encode(dialogues, recipe.encode, EncodeRuntime(workers=1))]


def test_of_clean_data_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost(tmp_path, monkeypatch, birds(120)) == {}


TEMPLATE = (
    "You will be given a short review of a restaurant. Classify the review as positive, negative or neutral. Consider "
    "irony, and if the review praises the food but complains about the service, choose neutral. Do not explain your "
    "choice. Answer with one lower-case word. Review: "
)


def test_a_rule_that_takes_more_than_a_tenth_of_the_replies_is_said_with_number_and_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [turns(f"{TEMPLATE}The {WORDS[at % 15]} was {WORDS[at // 15]}{at}.", WORDS[at % 3]) for at in range(90)]
    rows += birds(60)
    found = lost(tmp_path, monkeypatch, rows, "curate.dedupe=false", "curate.near_dedupe=false")["curate.leak"]
    assert found.number > 15
    assert f"takes {found.number} of 150" in found.cause
    assert "template" in found.cause
    assert found.setting.startswith("curate.drop_cross_split_duplicates decides")


def test_equal_questions_of_many_personas_that_leak_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = birds(30)
    for at in range(60):
        row = turns("How old are you?", f"As a {WORDS[at % 15]} I say {at}.")
        rows.append({**row, "messages": [{"role": "system", "content": f"You are a {WORDS[at % 15]}."},
                                         *row["messages"]]})  # fmt: skip
    assert lost(tmp_path, monkeypatch, rows)["curate.leak"].number > 9


def test_a_split_that_is_empty_or_tiny_is_said_unless_none_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lost(tmp_path, monkeypatch, birds(30))
    assert set(found) <= {"curate.train", "curate.val", "curate.test"}
    assert all(0 <= notice.number < FEWEST for notice in found.values())
    assert "curate.val_fraction" in found["curate.val"].setting
    assert lost(tmp_path, monkeypatch, birds(30), "curate.val_fraction=0", "curate.test_fraction=0") == {}


@pytest.mark.parametrize(
    ("name", "place", "named", "hint"),
    [
        ("weight", "message", "weight 3", "every reply is trained on alike"),
        ("train", "message", "train 3", "every reply is trained on alike"),
        ("label", "message", "label 3", "is read"),
        ("tool_calls", "message", "tool_calls 3", "is read"),
        ("images", "row", "row.images 3", "is read"),
        ("system", "row", "row.system 3", "the role system"),
        ("split", "row", "row.split 3", "by curate.test_fraction and curate.val_fraction"),
    ],
)
def test_fields_that_no_step_reads_are_said_by_name_and_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str, named: str, hint: str
) -> None:
    rows = birds(120)
    for row in rows[:3]:
        (row if place == "row" else row["messages"][1])[name] = 0
    found = lost(tmp_path, monkeypatch, rows)
    assert [*found] == ["parse.fields"]
    assert found["parse.fields"].number == 3
    assert f"(name and count): {named};" in found["parse.fields"].cause
    assert hint.lower() in found["parse.fields"].setting.lower()


def test_of_many_fields_the_most_frequent_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**row, **{f"f{at}": 1 for at in range(NAMED + 5)}} for row in birds(120)]
    assert " and 5 others" in lost(tmp_path, monkeypatch, rows)["parse.fields"].cause


def test_a_tree_id_is_no_field_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost(tmp_path, monkeypatch, [{**row, "tree_id": at} for at, row in enumerate(birds(120))]) == {}


def test_messages_without_a_language_are_said_where_languages_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = birds(120)
    del rows[0]["lang"], rows[1]["lang"]
    found = lost(tmp_path, monkeypatch, rows)
    assert [*found] == ["curate.untagged"]
    assert "4 of 240 (1.7%) messages have no language" in found["curate.untagged"].cause
    assert lost(tmp_path, monkeypatch, rows, "curate.languages=[]") == {}


def test_conversations_that_do_not_fit_are_said_with_the_block_that_would_fit_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = birds(120)
    for at, row in enumerate(rows[:30]):
        row["messages"][0]["content"] += f" {at} ".join(WORDS * (4 + at))
    found = lost(tmp_path, monkeypatch, rows)["encode.context_length"]
    block = int(found.setting.removeprefix("encode.context_length=").split()[0])
    assert found.setting == f"encode.context_length={block} would fit 90% of them"
    assert f"{found.number} of 120" in found.cause
    assert "encode.context_length=128" in found.cause
    recipe = load(
        "quickstart", [f"encode.context_length={block}", "curate.val_fraction=0.3", "curate.test_fraction=0.3"]
    )
    room = data_of(tmp_path, monkeypatch, rows, recipe)[-1].counts["room"]
    assert room["conversations"] - room["too_long"] == 108


@pytest.mark.parametrize("layout", ["tree", "paths", "first-reply"])
def test_any_layout_tells_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    rows = birds(120)
    for row in rows[:30]:
        row["messages"][0]["content"] *= 30
    assert lost(tmp_path, monkeypatch, rows, f"encode.layout={layout}")["encode.context_length"].number == 30


def test_rejected_input_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lost(tmp_path, monkeypatch, [*birds(120), {"messages": []}])
    assert found["parse.rejected"].number == 1
    assert "--rejected" in found["parse.rejected"].setting


def test_dates_that_name_no_offset_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = birds(120)
    rows[0]["messages"][0]["created_date"] = "2023-02-07 17:29:24"
    found = lost(tmp_path, monkeypatch, rows)
    assert [*found] == ["parse.naive_dates"]
    assert found["parse.naive_dates"].number == 1


HOSTILE = Notice("parse.fields", 1, "no step reads [red]\x1b[31m<b>`x` | ![y](z)", "Drop it")


def manifest(step: str, *notices: Notice) -> Manifest:
    return Manifest("0" * 64, "tokens", {"step": step}, {}, "0" * 64, notices=notices)


def test_cards_and_the_report_show_notices_and_names_in_them_are_inert() -> None:
    made = Tokens(Path(), manifest("parse", HOSTILE))
    outcome = Outcome("parse", made, True, 1.0, "nothing changed")
    for page in (ui.card(outcome), ui.summary("quickstart", [outcome])):
        (block,) = [piece.content for piece in MarkdownIt("gfm-like", {"linkify": False}).parse(page)
                    if piece.type == "fence" and piece.info == "text"]  # fmt: skip
        assert block.split() == f"{HOSTILE.code} {printable(HOSTILE.cause)}. {HOSTILE.setting}.".split()
    report = {"notices": [{"code": HOSTILE.code, "cause": HOSTILE.cause, "setting": HOSTILE.setting}]}
    head, body = _notices(report)
    assert head.startswith("## ")
    assert body.startswith("```text\n")
    assert "\x1b" not in body
    assert [*_notices({"notices": []})] == [*_notices({})] == []


def test_of_a_step_of_the_run_its_own_manifest_speaks() -> None:
    new, old = Notice("curate.leak", 2, "new", "s"), Notice("curate.leak", 9, "old", "s")
    block = Notice("encode.context_length", 1, "c", "s")
    assert told([manifest("curate", new), manifest("encode", old, block)]) == (new, block)
    assert told([manifest("encode", old, block), manifest("train", old, block)]) == (old, block)


def test_a_run_says_last_what_was_lost_also_where_all_is_cached_and_so_does_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = birds(120)
    rows[0]["[red]wei\x1bght"] = 0
    settings = ["curate.val_fraction=0.3", "curate.test_fraction=0.3", "download.source=file",
                f"download.path={tmp_path / 'rows.jsonl'}"]  # fmt: skip
    monkeypatch.setenv(ROOTS, str(tmp_path))
    messages = data_of(tmp_path, monkeypatch, rows, load("quickstart", settings))[1]
    asked = [part for setting in settings for part in ("--set", setting)]
    assert run_commands.run(parser().parse_args(["run", "--until", "encode", *asked])) == 0
    *_, said, last = capsys.readouterr().out.splitlines()
    assert last.startswith("tokens/")
    assert said.startswith(
        r"warning[parse.fields]: no step reads these fields (name and count): row.[red]wei\x1bght 1;"
    )
    assert run_commands.plan(parser().parse_args(["plan", "--json", "--until", "encode", *asked])) == 0
    planned = {entry["step"]: entry["notices"] for entry in json.loads(capsys.readouterr().out)}
    assert planned.pop("parse") == [asdict(notice) for notice in messages.manifest.notices]
    assert not any(planned.values())
    assert store_commands.show(parser().parse_args(["show", messages.id])) == 0
    assert "warning[parse.fields]" in capsys.readouterr().out
