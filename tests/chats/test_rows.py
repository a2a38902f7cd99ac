"""Rows of `messages`: what a row says is what its tree says, and rows that begin alike are one tree."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.exporting import messages as export
from tasks.artifacts import Counts, Dialogues, Messages, RawTrees
from tasks.chats.rows import tree_of
from tasks.errors import InputError
from tasks.oasst.advice import as_messages
from tasks.oasst.validators import Fault
from tasks.parse import ParseParams, parse
from tasks.store.manifest import FileEntry, Manifest

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
REAL = SHARED / "oasst1_en_validation.trees.jsonl.gz"
TURN = {"user": "prompter", "assistant": "assistant"}


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)], **fields}


def parsed(folder: Path, *files: Path, **settings: Any) -> tuple[Counts, pl.DataFrame, pl.DataFrame]:
    folder.mkdir(exist_ok=True)
    raw = RawTrees(files[0].parent, Manifest("0" * 64, "raw", {}, {f.name: FileEntry(0, "") for f in files}, "0" * 64))
    counts = parse.function(folder, raw, ParseParams(**settings))
    made = Messages(folder, raw.manifest)
    return counts, made.scan().collect(), made.rejected().collect()


def lines(folder: Path, *rows: Any) -> Path:
    file = folder / "chats.jsonl"
    file.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return file


def paths(table: pl.DataFrame) -> list[list[tuple[str, str]]]:
    """Every path from a root to a leaf, as (role, text), by walking up from the leaves: an independent reference."""
    rows = {row["message_id"]: row for row in table.iter_rows(named=True)}
    found = []
    for leaf in rows.keys() - {row["parent_id"] for row in rows.values()}:
        path, at = [], leaf
        while at:
            path.append((rows[at]["role"], rows[at]["text"]))
            at = rows[at]["parent_id"]
        found.append(path[::-1])
    return sorted(found)


def test_a_row_becomes_a_tree_with_one_branch(tmp_path: Path) -> None:
    counts, messages, rejected = parsed(tmp_path / "out", lines(tmp_path, chat("Hello", "Hi", "Bye", lang="en")))
    assert messages.select("text", "role", "depth", "sibling", "lang").rows() == [
        ("Hello", "prompter", 0, 0, "en"), ("Hi", "assistant", 1, 0, "en"), ("Bye", "prompter", 2, 0, "en"),
    ]  # fmt: skip
    assert messages["message_tree_id"].unique().to_list() == messages["message_id"].to_list()[:1]
    assert (counts["trees"], counts["messages"], len(rejected), counts["unknown_fields"]) == (1, 3, 0, {})


CHATS = st.lists(st.lists(st.sampled_from(["", "a", "b", "\u2028"]), min_size=1, max_size=4), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHATS)
def test_rows_that_begin_alike_are_branches_of_one_tree(tmp_path: Path, found: list[list[str]]) -> None:
    counts, messages, _ = parsed(tmp_path / "out", lines(tmp_path, *(chat(*texts) for texts in found)))
    prefixes = {tuple(texts[: end + 1]) for texts in found for end in range(len(texts))}
    assert len(messages) == len(prefixes)
    assert counts["trees"] == len({texts[0] for texts in found})
    longest = [texts for texts in prefixes if not any(p[:-1] == texts for p in prefixes)]
    assert [[text for _, text in path] for path in paths(messages)] == sorted(map(list, longest))
    assert counts["conflicts"] == 0
    assert counts["messages_in"] == counts["messages"] + counts["messages_repeated"]


def test_a_system_message_is_put_before_the_users(tmp_path: Path) -> None:
    row = chat("Hello", "Hi")
    row["messages"].insert(0, {"role": "system", "content": "Be kind."})
    _, messages, _ = parsed(tmp_path / "out", lines(tmp_path, row, chat("Hello", "Hi")))
    assert messages["text"].to_list() == ["Be kind.\n\nHello", "Hi", "Hello", "Hi"]


def test_published_fields_of_a_message_are_taken_and_all_else_is_kept(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x", "rank": 0, "name": "Al"}], "source": "mine", "id": "1"}
    counts, messages, _ = parsed(tmp_path / "out", lines(tmp_path, row))
    assert messages["rank"].to_list() == [0]
    assert json.loads(messages["extra"][0]) == {"name": "Al", "row.source": "mine"}
    assert counts["unknown_fields"] == {"name": 1, "row.source": 1}


def test_rows_that_begin_alike_keep_each_their_own_columns(tmp_path: Path) -> None:
    rows = [chat("Write a haiku.", f"Haiku {n}", model=f"m{n}", score=n, split="test") for n in range(3)]
    counts, messages, rejected = parsed(tmp_path / "out", lines(tmp_path, *rows))
    assert (counts["trees"], counts["messages"], counts["conflicts"], len(rejected)) == (1, 4, 0, 0)
    kept = sorted((json.loads(extra) for extra in messages["extra"][1:]), key=lambda extra: extra["row.score"])
    assert kept == [{"row.model": f"m{n}", "row.score": n, "row.split": "test"} for n in range(3)]
    assert messages["extra"][0] is None
    assert counts["unknown_fields"] == {"row.model": 3, "row.score": 3, "row.split": 3}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_names_that_a_tree_needs_for_itself_are_kept_under_others(tmp_path: Path, form: str) -> None:
    taken = {"message_id": "m", "text": "t", "replies": 3, "parent_id": "p", "message_tree_id": "z", "system_chars": 1}
    row = {
        "messages": [
            {"role": "system", "content": "Be kind.", "name": "house"},
            {"role": "user", "content": "x", **taken, "message.text": "u", "system.name": "v", "tree.prompt": "w",
             "row.prompt": "r"},
        ],
        "message_tree_id": "9", "prompt": "x", "tree_id": 5,
    }  # fmt: skip
    file = lines(tmp_path, row)
    if form == "parquet":
        file = tmp_path / "chats.parquet"
        pq.write_table(pa.Table.from_pylist([{**row, "messages": [{**m, **taken} for m in row["messages"]]}]), file)  # type: ignore[attr-defined]
    counts, messages, rejected = parsed(tmp_path / "out", file)
    assert messages["text"].to_list() == ["Be kind.\n\nx"]
    assert rejected.is_empty()
    extra = json.loads(messages["extra"][0])
    own = {f"message.{name}": value for name, value in taken.items()}
    more = {
        "message.message.text": "u", "message.system.name": "v", "message.tree.prompt": "w", "message.row.prompt": "r",
        "system.name": "house",
    }  # fmt: skip
    noted = {"system_chars": 10, "row.message_tree_id": "9", "row.prompt": "x", "tree.tree_id": 5}
    assert {name: extra[name] for name in own | more | noted} == own | more | noted
    assert "system_chars" not in counts["unknown_fields"]


def test_rows_of_messages_may_have_a_prompt_of_their_own_kind(tmp_path: Path) -> None:
    tree = {"message_tree_id": "t", "prompt": {"message_id": "t", "text": "x", "role": "prompter", "replies": []}}
    rows = [chat("q", "a", prompt="q"), {**tree, "messages": []}, {**tree, "messages": 5}, chat("r", prompt=None)]
    file = lines(tmp_path, *rows, {"prompt": "p", "messages": "m"})
    _, messages, rejected = parsed(tmp_path / "out", file, max_bad_fraction=1)
    assert messages["text"].to_list() == ["q", "a", "x", "r"]
    assert rejected.select("line", "code").rows() == [(5, "schema.prompt")]


@pytest.mark.parametrize("tree_id", [5, "5"])
def test_a_tree_id_may_be_a_number(tmp_path: Path, tree_id: Any) -> None:
    row = chat("q", "a", tree_id=tree_id, message_ids=["5", "6"])
    _, messages, _ = parsed(tmp_path / "out", lines(tmp_path, row))
    assert messages["message_tree_id"].to_list() == ["5", "5"]


def test_how_many_characters_are_those_of_the_system_is_noted_where_the_user_says_something(tmp_path: Path) -> None:
    noted = []
    for number, (system, user) in enumerate([("Sei nett \U0001f600", "x"), ("Be kind.", " "), ("", "x")]):
        row = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}
        _, messages, _ = parsed(tmp_path / str(number), lines(tmp_path, row))
        noted.append(json.loads(messages["extra"][0] or "{}").get("system_chars"))
    assert noted == [12, None, None]


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        ({"messages": []}, "schema.messages", "not empty"),
        ({"messages": None}, "schema.messages", "array"),
        ({"messages": ["x"]}, "schema.messages", "objects, got string 'x'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "schema.role", "got string 'tool'"),
        ({"messages": [{"role": [], "content": "x"}]}, "schema.role", "got array"),
        ({"messages": [{"role": "user", "content": None}]}, "schema.content", "string, got null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "schema.content", "got array"),
        ({"messages": [{"role": "system", "content": "x"}]}, "schema.role", "after that of the system"),
        (chat("a", message_ids=["1", "2"]), "schema.message_ids", "one for each of 1"),
        (chat("a", message_ids=[""]), "schema.message_ids", "not empty"),
        (chat("a", "b", message_ids=["1", "1"]), "id.duplicate", "each message once"),
        (chat("a", lang=5), "schema.lang", "got integer 5"),
        (chat("a", "b", langs=["en"]), "schema.langs", "one for each of 2"),
        (chat("a", langs=[5]), "schema.lang", "got integer 5"),
        (chat("a", langs="en"), "schema.langs", "array"),
        (chat("a", tree_id=True), "schema.tree_id", "got boolean True"),
    ],
)
def test_a_bad_row_is_rejected_with_its_line_and_a_reason(
    tmp_path: Path, row: dict[str, Any], code: str, words: str
) -> None:
    counts, messages, rejected = parsed(
        tmp_path / "out", lines(tmp_path, chat("good"), row, chat("too")), max_bad_fraction=1
    )
    assert messages["text"].to_list() == ["good", "too"]
    (bad,) = rejected.rows(named=True)
    assert (bad["line"], bad["code"]) == (2, code)
    assert words in bad["message"]
    assert bad["messages"] == counts["messages_rejected"] == len(row["messages"] or [])


def test_a_system_message_in_the_middle_is_refused() -> None:
    with pytest.raises(Fault, match="first place only"):
        tree_of({"messages": [{"role": role, "content": ""} for role in ("user", "system")]})


def test_a_chat_of_100_000_messages_is_one_branch(tmp_path: Path) -> None:
    _, messages, _ = parsed(tmp_path / "out", lines(tmp_path, chat(*map(str, range(100_000)))))
    assert messages["depth"].to_list() == list(range(100_000))


def test_each_message_keeps_its_language_and_a_row_has_that_of_its_last(tmp_path: Path) -> None:
    turns = [("p", None, 0, "prompter", "en"), ("r", "p", 1, "assistant", "de"), ("s", "p", 1, "assistant", None)]
    names = ("message_id", "parent_id", "depth", "role", "lang")
    table = pl.DataFrame([dict(zip(names, turn, strict=True)) for turn in turns])
    table = table.with_columns(message_tree_id=pl.lit("p"), text="message_id", sibling=pl.Series([0, 0, 1]),
                               split=pl.lit("train"), rank=pl.lit(None, pl.Int32),
                               extra=pl.lit(None, pl.String))  # fmt: skip
    dialogues = Dialogues(tmp_path, Manifest("0" * 64, "dialogues", {}, {}, "0" * 64))
    table.write_parquet(tmp_path / "dialogues.parquet")
    (tmp_path / "rows").mkdir()
    export(dialogues, tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows" / "train.jsonl").read_bytes().splitlines()]
    assert [(row["lang"], row["langs"]) for row in rows] == [("de", ["en", "de"]), (None, ["en", None])]
    counts, back, rejected = parsed(tmp_path / "back", tmp_path / "rows" / "train.jsonl")
    assert back.select("message_id", "lang").rows() == [("p", "en"), ("s", None), ("r", "de")]
    assert (counts["conflicts"], len(rejected)) == (0, 0)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.skipif(not REAL.exists(), reason="the real trees (shared/data) are not here")
def test_what_was_exported_comes_back_as_the_same_trees(tmp_path: Path, form: str) -> None:
    _, published, _ = parsed(tmp_path / "one", REAL)
    dialogues = Dialogues(tmp_path / "dialogues", Manifest("0" * 64, "dialogues", {}, {}, "0" * 64))
    dialogues.path.mkdir()
    published.with_columns(split=pl.lit("train")).write_parquet(dialogues.path / "dialogues.parquet")
    (tmp_path / "rows").mkdir()
    export(dialogues, tmp_path / "rows")
    counts, back, rejected = parsed(tmp_path / "two", tmp_path / "rows" / f"train.{form}")
    assert rejected.is_empty()
    columns = ["message_tree_id", "message_id", "parent_id", "depth", "text", "role", "lang"]
    assert back.select(columns).sort("message_id").equals(published.select(columns).sort("message_id"))
    assert paths(back) == paths(published)
    assert (counts["conflicts"], [*counts["unknown_fields"]]) == (0, ["row.split"])


def test_chats_and_trees_may_come_together(tmp_path: Path) -> None:
    tree = {"message_tree_id": "t", "prompt": {"message_id": "t", "text": "x", "role": "prompter", "replies": []}}
    later = chat("x", "y", message_ids=["t", "u"], tree_id="t")
    counts, messages, _ = parsed(tmp_path / "out", lines(tmp_path, tree, chat("q"), later))
    assert messages["text"].to_list() == ["q", "x", "y"]
    assert (counts["trees"], counts["trees_repeated"], counts["conflicts"]) == (2, 1, 0)


def test_rows_of_one_tree_id_that_begin_otherwise_are_trees_of_their_own(tmp_path: Path) -> None:
    rows = [chat(f"question {n}", f"answer {n}", tree_id="same") for n in range(1_000)]
    counts, messages, rejected = parsed(
        tmp_path / "out", lines(tmp_path, *rows, chat("question 7", "B", tree_id="same"))
    )
    assert (counts["trees"], counts["messages"], len(rejected)) == (1_000, 2_001, 0)
    assert set(messages["text"]) == {message["content"] for row in rows for message in row["messages"]} | {"B"}
    assert json.loads(messages["extra"][0]) == {"tree.tree_id": "same"}


def test_rows_of_two_tree_ids_that_begin_alike_are_two_trees(tmp_path: Path) -> None:
    rows = [chat("hello", "a", tree_id="one"), chat("hello", "b", tree_id="two"), chat("hello", "c", tree_id="two")]
    counts, messages, rejected = parsed(tmp_path / "out", lines(tmp_path, *rows))
    assert rejected.is_empty()
    assert counts["trees"] == 2
    assert sorted(messages["text"]) == ["a", "b", "c", "hello", "hello"]


def test_a_tree_id_with_ids_of_another_first_message_is_refused_and_not_taken_for_a_later_version(
    tmp_path: Path,
) -> None:
    rows = [chat(f"q{n}", f"a{n}", tree_id="same", message_ids=[f"q{n}", f"a{n}"]) for n in range(3)]
    counts, messages, rejected = parsed(tmp_path / "out", lines(tmp_path, *rows), max_bad_fraction=1)
    assert messages["text"].to_list() == ["q0", "a0"]
    assert rejected.select("line", "code", "messages").rows() == [(2, "tree.root", 2), (3, "tree.root", 2)]
    assert counts["messages_rejected"] == 4
    with pytest.raises(InputError, match="2 of 3 trees cannot be used"):
        parsed(tmp_path / "again", lines(tmp_path, *rows))


def test_a_table_of_neither_form_is_refused_by_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"conversations": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"has the columns `conversations`; expected `messages`, .*polars.*jq"):
        parsed(tmp_path / "out", tmp_path / "other.parquet")


def test_a_field_of_a_message_that_has_a_name_of_ours_for_something_else_is_kept_aside(tmp_path: Path) -> None:
    own: dict[str, Any] = {
        "labels": ["funny", "short"], "rank": "best", "created_date": "Tuesday", "user_id": 5, "emojis": [1],
        "detoxify": "low", "deleted": "no", "tree_state": 7,
    }  # fmt: skip
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", **own}]}
    counts, messages, rejected = parsed(tmp_path / "out", lines(tmp_path, row))
    assert rejected.is_empty()
    assert json.loads(messages["extra"][1]) == {f"message.{name}": value for name, value in own.items()}
    assert counts["unknown_fields"] == {f"message.{name}": 1 for name in own}
    assert messages["text"].to_list() == ["x", "y"]
    assert messages["rank"].to_list() == [None, None]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": [], "id": 5}, r"got `conversations`, `id`.*`messages` of `conversations`: jq -c"),
        ({"instruction": "q", "output": "a"}, r"got `instruction`, `output`.*`messages` of `instruction`, `output`"),
        ({"prompt": "q", "completion": "a"}, r"schema.prompt.*`messages` of `prompt`, `completion`"),
        ({"a": 1, "b\n[x]": 2}, r"got `a`, `b\\n\[x\]`\. Write each row as"),
        ({}, r"got no field"),
    ],
)
def test_a_row_of_another_form_is_named_by_its_fields_with_how_to_make_messages_of_it(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        parsed(tmp_path / "out", lines(tmp_path, row))


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not here")
@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
    ],
)
def test_what_the_advice_makes_is_read(tmp_path: Path, row: dict[str, Any]) -> None:
    file, made = lines(tmp_path, row), tmp_path / "made.jsonl"
    script = as_messages(row).partition("jq -c '")[2].partition("'")[0]
    made.write_bytes(subprocess.run(["jq", "-c", script, str(file)], capture_output=True, check=True).stdout)
    _, messages, _ = parsed(tmp_path / "out", made)
    assert messages["text"].to_list() == ["q", "a"]
