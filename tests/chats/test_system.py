"""Chats with a system message: what is trained on has it, what is compared is what the user said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.exporting import messages as export
from tasks.artifacts import Counts, Dialogues, Messages, RawTrees
from tasks.curate import CurateParams, CurateRuntime, curate
from tasks.parse import ParseParams, parse
from tasks.store.manifest import FileEntry, Manifest

LONG = " ".join(f"rule{number}" for number in range(300))
ASKED = "Why do the tides rise twice a day in most places of the world though the moon passes once"


def sealed(*files: str) -> Manifest:
    return Manifest("0" * 64, "any", {}, {name: FileEntry(0, "0" * 64) for name in files}, "0" * 64)


def chat(system: str, *texts: str, **fields: Any) -> dict[str, Any]:
    turns = zip(("system", *("user", "assistant") * len(texts)), (system, *texts), strict=False)
    return {"messages": [{"role": role, "content": text} for role, text in turns if text], "lang": "en", **fields}


def words(name: str, count: int = 12) -> str:
    return " ".join(f"{name}{number}" for number in range(count))


def curated(tmp: Path, *rows: dict[str, Any], **settings: Any) -> tuple[Dialogues, Counts]:
    raw, parsed, out = (tmp / name for name in ("raw", "messages", "dialogues"))
    for folder in (raw, parsed, out):
        folder.mkdir(parents=True)
    (raw / "chats.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    parse.function(parsed, RawTrees(raw, sealed("chats.jsonl")), ParseParams())
    params = CurateParams(**{"tree_states": (), **settings})
    return Dialogues(out, sealed()), curate.function(out, Messages(parsed, sealed()), params, CurateRuntime(workers=1))


def dropped(made: Dialogues) -> list[tuple[str, str]]:
    return made.dropped().select("text", "reason").collect().rows()


TRAIN = {"test_fraction": 0.0, "val_fraction": 0.0}


def test_questions_behind_one_long_system_message_neither_leak_nor_are_copies(tmp_path: Path) -> None:
    rows = [chat(LONG, words(f"q{n}x"), words(f"a{n}x")) for n in range(400)]
    made, counts = curated(tmp_path, *rows, keep_duplicate_prompts=False)
    _, alone = curated(tmp_path / "alone", *rows[:1], **TRAIN)
    assert (counts["dropped"], alone["messages"]) == (0, 2)
    assert all(sizes["messages"] for sizes in counts["splits"].values())
    assert counts["shared_across_splits"]["by_tree"] == {"exact": 0, "near": 0}
    texts = made.scan().filter(pl.col("parent_id").is_null()).collect()["text"].to_list()
    assert sorted(texts) == sorted(f"{LONG}\n\n{words(f'q{n}x')}" for n in range(400))


def test_one_question_behind_two_system_messages_is_one_question(tmp_path: Path) -> None:
    rows = [chat(system, words("q"), words(f"a{n}x")) for n, system in enumerate(("", "Be kind.", LONG))]
    made, _ = curated(tmp_path, *rows, keep_duplicate_prompts=False, **TRAIN)
    gone = made.dropped().filter(pl.col("parent_id").is_null()).collect()
    assert gone["reason"].to_list() == ["near_duplicate"] * 2
    assert all(seen.endswith(" 1.000") for seen in gone["evidence"])


@pytest.mark.parametrize("panel", ["Who art thou?", ASKED])
def test_a_system_message_hides_no_question_of_an_evaluation_and_may_hold_none(tmp_path: Path, panel: str) -> None:
    rows = [
        chat("You are a helpful assistant.", panel, "No."),
        chat(f"Answer this: {ASKED}", words("q"), "Well."),
        chat("You are a helpful assistant.", words("r"), "Yes."),
    ]
    made, _ = curated(tmp_path, *rows, sample_prompts=(panel,), **TRAIN)
    gone = [text.partition("\n\n")[2] for text, reason in dropped(made) if reason == "contaminated"]
    assert gone == ([panel] if panel != ASKED else [panel, words("q")])


def test_what_is_personal_is_masked_on_both_sides_and_copies_are_found_whatever_it_was(tmp_path: Path) -> None:
    systems = ("Sign as ann@somewhere.org, always.", "Sign as al@elsewhere.org, and be brief.", "Be kind.")
    mails = ("me@here.org", "us@there.org", "them@nowhere.org")
    rows = [
        chat(system, f"{words('q')} {mail}", words(f"a{n}x"))
        for n, (system, mail) in enumerate(zip(systems, mails, strict=True))
    ]
    rows.append(chat(systems[0], words("r"), words("b")))
    made, _ = curated(tmp_path, *rows, keep_duplicate_prompts=False, **TRAIN)
    gone = made.dropped().filter(pl.col("parent_id").is_null()).collect()
    assert [seen.rpartition(" ")[2] for seen in gone["evidence"]] == ["1.000"] * 2
    kept = made.scan().filter(pl.col("parent_id").is_null()).collect()["text"].to_list()
    assert not any("@" in text for text in kept)
    assert f"Sign as [e-mail], always.\n\n{words('r')}" in kept


def test_what_was_exported_and_read_again_has_the_texts_that_were_kept(tmp_path: Path) -> None:
    made, _ = curated(tmp_path / "one", *(chat("Be kind.", words(f"q{n}x"), "Well.") for n in range(3)), **TRAIN)
    (tmp_path / "rows").mkdir()
    export(made, tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows" / "train.jsonl").read_bytes().splitlines()]
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == "Be kind."
        assert len(row["message_ids"]) == 2
    back, _ = curated(tmp_path / "two", *rows, **TRAIN)
    columns = ["message_tree_id", "message_id", "text", "role"]
    assert back.scan().select(columns).collect().equals(made.scan().select(columns).collect())


def test_a_system_message_is_exported_without_what_is_personal_in_it(tmp_path: Path) -> None:
    system, asked = "Sign as ann@somewhere.org, always.\n\nBe kind.", "I am al@elsewhere.org, who are you?"
    made, _ = curated(tmp_path / "one", chat(system, asked, "Ann."), chat("Be brief.", "Why?", "So."), **TRAIN)
    (tmp_path / "rows").mkdir()
    export(made, tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows" / "train.jsonl").read_bytes().splitlines()]
    assert [message["content"] for message in rows[0]["messages"]] == [
        "Sign as [e-mail], always.\n\nBe kind.", "I am [e-mail], who are you?", "Ann.",
    ]  # fmt: skip
    assert [message["content"] for message in rows[1]["messages"]] == ["Be brief.", "Why?", "So."]
