"""Parse: published bytes -> messages.parquet and rejected.parquet, with the books balanced."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

import tasks.parse
from tasks.artifacts import (
    DETOXIFY,
    LABELS,
    MESSAGE_COLUMNS,
    REJECTED_COLUMNS,
    Counts,
    Messages,
    RawTrees,
    arrow_schema,
)
from tasks.errors import InputError
from tasks.notices import of_parse
from tasks.oasst.reader import Bad, Dump, loads
from tasks.oasst.strict_reader import Layout
from tasks.oasst.validators import Fault
from tasks.parse import ParseParams, parse
from tasks.store.manifest import FileEntry, Manifest
from tests.memory import taken

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
VALIDATION = SHARED / "data" / "oasst1_en_validation.trees.jsonl.gz"
EN_100 = SHARED / "data" / "en_100_tree.jsonl"
JSON_SUITE = sorted((SHARED / "corpora" / "JSONTestSuite" / "test_parsing").glob("*.json"))
NAUGHTY = SHARED / "corpora" / "big-list-of-naughty-strings" / "blns.json"
needs_data = pytest.mark.skipif(not VALIDATION.exists(), reason="the real trees (shared/data) are not here")
needs_corpora = pytest.mark.skipif(not NAUGHTY.exists(), reason="the bad input (shared/corpora) is not here")
MB = 1 << 20
ALL_BAD = ParseParams(max_bad_fraction=1)

Parsed = tuple[Counts, pl.DataFrame, pl.DataFrame]


def run(out: Path, files: Sequence[Path], params: ParseParams | None = None) -> Parsed:
    """Run the bare step over files of one folder; give its counts, messages and rejected rows."""
    out.mkdir(parents=True, exist_ok=True)
    entries = {file.name: FileEntry(file.stat().st_size, "") for file in files}
    raw = RawTrees(files[0].parent, Manifest("0" * 64, "raw", {}, entries, "0" * 64))
    counts = parse.function(out, raw, params or ParseParams())
    assert {file.name for file in out.iterdir()} == set(Messages.files)
    check_books(counts, made := Messages(out, raw.manifest))
    return counts, made.scan().collect(), made.rejected().collect()


def check_books(counts: Counts, made: Messages) -> None:
    """Hold the counts against each other and against the files."""
    messages, rejected = made.scan().collect(), made.rejected().collect()
    for unit in ("trees", "messages"):
        assert counts[f"{unit}_in"] == counts[unit] + counts[f"{unit}_rejected"] + counts[f"{unit}_repeated"]
        assert counts[f"{unit}_rejected"] == rejected[unit].sum()
    assert counts["messages"] == len(messages)
    assert counts["trees"] == messages["message_tree_id"].n_unique()
    assert counts["rejected"] == len(rejected)
    assert messages["message_id"].is_unique().all()


def parsed(folder: Path, content: bytes, params: ParseParams | None = None) -> Parsed:
    (folder / "raw").mkdir(exist_ok=True)
    file = folder / "raw" / "trees.jsonl.gz"
    file.write_bytes(content)
    return run(folder / "out", [file], params)


def united(folder: Path, *files: Sequence[Any], params: ParseParams | None = None) -> Parsed:
    """Run the bare step over several files, each of some trees or flat messages."""
    (folder / "raw").mkdir(exist_ok=True)
    paths = [folder / "raw" / f"{place}.jsonl" for place in range(len(files))]
    for path, trees in zip(paths, files, strict=True):
        path.write_bytes(lines(*trees))
    return run(folder / "out", paths, params)


def lines(*trees: Any) -> bytes:
    return b"".join(json.dumps(tree).encode() + b"\n" for tree in trees)


def message(name: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"message_id": name, "text": f"text of {name}", "role": "prompter", "replies": list(replies), **fields}


def tree(name: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"message_tree_id": name, "tree_state": "growing", "prompt": message(name, *replies, **fields)}


def published(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in content.splitlines()]


def flattened(trees: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The hub's flat form of nested trees, walked by recursion: an independent reference."""

    def walk(node: dict[str, Any], parent: str | None) -> Iterator[dict[str, Any]]:
        own = {name: value for name, value in node.items() if name != "replies"}
        place = {"message_tree_id": whole["message_tree_id"], "tree_state": whole["tree_state"], "parent_id": parent}
        yield {**own, **place}
        for reply in node["replies"]:
            yield from walk(reply, node["message_id"])

    for whole in trees:
        yield from walk(whole["prompt"], None)


# ------------------------------------------------------------------------------------------------- real trees


@needs_data
def test_the_real_trees_are_read_whole(tmp_path: Path) -> None:
    counts, messages, rejected = run(tmp_path, [VALIDATION])
    assert (counts["trees"], counts["messages"], counts["rejected"]) == (188, 2_019, 0)
    assert counts["unknown_fields"] == {}
    assert counts["lines"] == 188
    assert counts["bytes"] == len(gzip.decompress(VALIDATION.read_bytes()))
    reference = list(flattened(published(VALIDATION)))
    for column in ("message_id", "parent_id", "text", "role", "rank", "message_tree_id", "review_result"):
        assert messages[column].to_list() == [row[column] for row in reference]
    humor = [(row["labels"] or {}).get("humor", {}).get("value") for row in reference]
    assert messages["label_humor"].to_list() == pl.Series(humor, dtype=pl.Float32).to_list()
    assert rejected.is_empty()
    for file, columns in (("messages.parquet", MESSAGE_COLUMNS), ("rejected.parquet", REJECTED_COLUMNS)):
        assert pq.read_schema(tmp_path / file) == arrow_schema(columns)


@needs_data
def test_the_older_export_without_nulls_is_read_whole(tmp_path: Path) -> None:
    counts, messages, _ = run(tmp_path, [EN_100])
    assert (counts["trees"], counts["messages"]) == (100, 1_167)
    assert dict(messages["role"].value_counts().iter_rows()) == {"assistant": 687, "prompter": 480}
    assert messages["label_spam"].null_count() == 1_167


@needs_data
def test_parents_come_first_and_trees_lie_together(tmp_path: Path) -> None:
    _, messages, _ = run(tmp_path, [VALIDATION])
    place = {name: row for row, name in enumerate(messages["message_id"])}
    for row, (parent, depth) in enumerate(messages.select("parent_id", "depth").iter_rows()):
        assert (parent is None) == (depth == 0)
        assert parent is None or place[parent] < row
    assert messages["message_tree_id"].rle().len() == 188


@needs_data
@pytest.mark.parametrize("form", ["jsonl", "parquet", "jsonl apart"])
def test_the_flat_forms_give_the_same_table_as_the_nested_one(tmp_path: Path, form: str) -> None:
    _, nested, _ = run(tmp_path / "nested", [VALIDATION])
    rows = list(flattened(published(VALIDATION)))
    file = tmp_path / "raw.bin"
    if form == "parquet":
        write_as_the_hub(file, rows)
    elif form == "jsonl":
        file.write_bytes(lines(*rows))
    else:  # siblings stay in order, all else is dealt out anew: trees' rows lie apart, replies before parents
        depth = dict(zip(nested["message_id"], nested["depth"], strict=True))
        rows.sort(key=lambda row: -depth[row["message_id"]])
        file.write_bytes(lines(*rows))
    counts, flat, _ = run(tmp_path / "flat", [file])
    if form == "jsonl apart":  # then the trees come in another order
        flat, nested = (table.sort("message_tree_id", maintain_order=True) for table in (flat, nested))
    assert_frame_equal(flat, nested)
    assert counts["lines"] == 2_019


def write_as_the_hub(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write flat rows with labels and emojis as {name[], value[], count[]}, in small row groups."""

    def lists(row: dict[str, Any]) -> dict[str, Any]:
        labels, emojis = row["labels"], row.get("emojis")
        votes = labels and {
            "name": list(labels),
            "value": [vote["value"] for vote in labels.values()],
            "count": [vote["count"] for vote in labels.values()],
        }
        counted = None if emojis is None else {"name": list(emojis), "count": list(emojis.values())}
        return {**row, "labels": votes, "emojis": counted, "events": None}

    pq.write_table(pa.Table.from_pylist([lists(row) for row in rows]), file, row_group_size=300)


@needs_data
def test_the_same_bytes_give_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name, [EN_100])
    for file in Messages.files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# ------------------------------------------------------------------------------------------------- bad input


def test_a_bad_line_is_named_with_place_code_and_content(tmp_path: Path) -> None:
    bad = b'{"message_tree_id": "\xc3\xa4", "prompt": {"message_id": "b", "text": 5, "role": "prompter"}}'
    content = lines(tree("a")) + b"\n" + bad + b"\n" + b'{"x": NaN}' + b"\n" + lines(tree("c"))
    counts, messages, rejected = parsed(tmp_path, content, ALL_BAD)
    assert messages["message_id"].to_list() == ["a", "c"]
    first, second = rejected.rows(named=True)
    assert first == {
        "file": "trees.jsonl.gz",
        "line": 3,
        "byte_offset": content.index(bad),
        "code": "schema.text",
        "message": "expected string, got integer 5, in message string 'b'",
        "line_sha256": hashlib.sha256(bad).hexdigest(),
        "head": ascii(bad.decode())[1:-1],
        "message_tree_id": "ä",
        "trees": 1,
        "messages": 1,
    }
    assert (second["line"], second["code"], second["messages"]) == (4, "json.syntax", 0)
    assert (counts["trees_in"], counts["messages_in"]) == (4, 3)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (b"\xff", "json.syntax utf8.invalid"),
        (b'{"prompt": "\xed\xa0\x80"}', "utf8.invalid"),
        (b'{"prompt": "\xc0\xaf"}', "utf8.invalid"),
        (b'{"prompt": "\\ud83d"}', "json.syntax"),
        (b'{"prompt": "a\x00b"}', "json.syntax"),
        (b'{"prompt": 1e400}', "json.number"),
        (b'{"prompt": ' + b"9" * 10_000 + b"}", "json.number"),
        (b'{"prompt": ' + b"[" * 100_000, "json.depth"),
        (b'{"prompt":{"replies":[' * 100_000, "json.depth"),
        (b'{"prompt": {"message_id": "m"', "json.syntax"),
        (b"[]", "schema.line"),
        (b"{}", "schema.line"),
        (b"null", "schema.line"),
        (b'{"message_id": "m", "parent_id": "n"}', "schema.message_tree_id"),
        (b'{"message_id": "m", "text": 1, "role": "prompter"}', "schema.text"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_line_is_rejected_wherever_it_stands_and_the_rest_goes_on(
    tmp_path: Path, bad: bytes, code: str, place: int
) -> None:
    good = [lines(tree("a"))[:-1], lines(tree("c"))[:-1]]
    content = b"\n".join([*good[:place], bad, *good[place:]])
    _, messages, rejected = parsed(tmp_path, content, ALL_BAD)
    assert messages["message_id"].to_list() == ["a", "c"]
    assert rejected["line"].to_list() == [place + 1]
    assert rejected["code"][0] in code.split()


def test_too_many_bad_lines_fail_the_step_and_the_first_are_named(tmp_path: Path) -> None:
    content = lines(*(tree(f"t{n}") for n in range(98))) + b"{\n" + lines({"prompt": 1})
    parsed(tmp_path, content, ParseParams(max_bad_fraction=0.02))
    with pytest.raises(InputError) as caught:
        parsed(tmp_path, content)
    said = str(caught.value)
    assert caught.value.code == "input.bad"
    assert "2 of 100 trees" in said
    assert "trees.jsonl.gz:99 json.syntax" in said
    assert "trees.jsonl.gz:100 schema.prompt" in said


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_that_is_one_array_is_told_to_be_written_one_object_a_line(tmp_path: Path, indent: int | None) -> None:
    with pytest.raises(InputError, match=r"one JSON array.*one object a line.*jq -c '\.\[\]'") as caught:
        parsed(tmp_path, json.dumps([tree("a"), tree("b")], indent=indent).encode())
    assert caught.value.code == "input.bad"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (gzip.compress(lines(tree("a")), mtime=0)[:-1], "gzip.truncated"),
        (gzip.compress(lines(tree("a")), mtime=0)[:-8] + b"\1" * 8, "gzip.corrupt"),
        (b"", "input.empty"),
        (lines(tree("a")).decode().encode("utf-16"), "input.utf16"),
        (lines(tree("a" * 2_000)), "line.too_long"),
        (b"PAR1" + b"\0" * 100, "parquet.corrupt"),
    ],
)
def test_a_fault_of_the_stream_fails_the_step_whatever_may_be_bad(tmp_path: Path, content: bytes, code: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(tmp_path, content, ParseParams(max_bad_fraction=1, max_line_mb=0.001))
    assert caught.value.code == code


def test_a_parquet_file_of_another_table_is_refused_by_the_column(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    file = tmp_path / "raw" / "other.parquet"
    pq.write_table(pa.table({"message_id": ["a"], "role": ["prompter"]}), file)
    with pytest.raises(
        InputError, match="has the columns `message_id`, `role`; expected `messages`, or message_id, text, role"
    ):
        run(tmp_path / "out", [file])


@needs_corpora
def test_no_file_of_the_json_suite_is_taken_for_a_tree() -> None:
    assert len(JSON_SUITE) == 318
    refused = {}
    for file in JSON_SUITE:
        try:
            found = list(Dump([file], Layout(LABELS, DETOXIFY)))
        except InputError as error:
            refused[file.stem] = error.code
        else:
            assert found, file.name
            assert all(isinstance(one, Bad) for one in found), file.name
    assert refused == {
        "i_string_UTF-16LE_with_BOM": "input.utf16",
        "i_string_utf16BE_no_BOM": "input.utf16",
        "i_string_utf16LE_no_BOM": "input.utf16",
        "n_single_space": "input.empty",
        "n_structure_no_data": "input.empty",
        "n_structure_UTF8_BOM_no_data": "input.empty",
    }


@needs_corpora
def test_what_is_no_json_is_not_read_as_json() -> None:
    for file in JSON_SUITE:
        if file.name.startswith("n_"):
            with pytest.raises(Fault, match=r"json|utf8"):
                loads(file.read_bytes())


@needs_corpora
def test_no_line_of_the_json_suite_changes_its_neighbours(tmp_path: Path) -> None:
    content = [piece for file in JSON_SUITE for piece in (*file.read_bytes().split(b"\n"), b"")]
    good = [f"t{n}" for n in range(len(content))]
    mixed = b"".join(lines(tree(name)) + bad + b"\n" for name, bad in zip(good, content, strict=True))
    _, messages, rejected = parsed(tmp_path, mixed, ALL_BAD)
    assert messages["message_id"].to_list() == good
    assert len(rejected) == sum(1 for bad in content if bad.strip(b" \t\r"))


@needs_corpora
def test_naughty_strings_come_through_unchanged(tmp_path: Path) -> None:
    texts = [*json.loads(NAUGHTY.read_bytes()), "\0", "a\0b", "\u2028", "<|endoftext|>", "\ufeff"]
    _, messages, _ = parsed(tmp_path, lines(*(tree(f"t{n}", text=text) for n, text in enumerate(texts))))
    assert messages["text"].to_list() == texts


# ------------------------------------------------------------------------------------------------- trees again


def test_a_tree_that_comes_again_is_counted_and_left_out(tmp_path: Path) -> None:
    one = {**tree("a", message("b")), "unknown": 1}
    again = dict(reversed(one.items()))  # in other words
    counts, messages, rejected = parsed(tmp_path, lines(one, tree("c"), again))
    assert messages["message_id"].to_list() == ["a", "b", "c"]
    assert (counts["trees_repeated"], counts["messages_repeated"], counts["trees_in"]) == (1, 2, 3)
    assert rejected.is_empty()


@pytest.mark.parametrize("group", [1, 3, 20_000])
def test_of_two_versions_the_later_message_wins_and_what_only_the_earlier_had_stays(
    tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.parse, "GROUP", group)
    content = lines(
        tree("a", message("b"), message("x", message("y"))), tree("c"), tree("a", message("d")), tree("e"),
        tree("a", message("b", message("n"), text="new")),
    )  # fmt: skip
    counts, messages, rejected = parsed(tmp_path, content)
    assert messages.select("message_id", "parent_id", "depth", "sibling", "text").rows() == [
        ("c", None, 0, 0, "text of c"),
        ("e", None, 0, 0, "text of e"),
        ("a", None, 0, 0, "text of a"),
        ("b", "a", 1, 0, "new"),
        ("n", "b", 2, 0, "text of n"),
        ("d", "a", 1, 1, "text of d"),
        ("x", "a", 1, 2, "text of x"),
        ("y", "x", 2, 0, "text of y"),
    ]
    # the second version only added to the first one; the third changed `b`
    assert rejected.select("line", "code", "message_tree_id", "trees", "messages").rows() == [
        (3, "tree.replaced", "a", 1, 1),
        (5, "tree.replaces", "a", 0, 0),
    ]
    raw = [hashlib.sha256(line).hexdigest() for line in content.splitlines()]
    assert rejected["line_sha256"].to_list() == [raw[2], raw[4]]
    assert (counts["trees_replaced"], counts["trees_repeated"], counts["conflicts"]) == (1, 1, 1)


def test_what_hangs_on_a_message_that_moved_moves_with_it_and_a_lost_parent_takes_its_replies_along(
    tmp_path: Path,
) -> None:
    moved = tree("a", message("b"), message("c", message("d", text="new")))
    content = lines(tree("a", message("b", message("d", message("e"))), message("c")), moved)
    counts, messages, _ = parsed(tmp_path, content)
    assert dict(messages.select("message_id", "depth").rows()) == {"a": 0, "b": 1, "c": 1, "d": 2, "e": 3}
    assert dict(messages.select("message_id", "parent_id").rows())["d"] == "c"
    other_root = {"message_tree_id": "a", "prompt": message("r")}
    counts, messages, rejected = united(tmp_path, [tree("a", message("b"))], [other_root])
    assert messages["message_id"].to_list() == ["r"]
    assert counts["messages_rejected"] == 2
    assert "2 lost what they reply to" in rejected["message"][0]


VERSIONS = st.lists(  # of one tree: message -> (parent, salt); a parent comes before its replies
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(0, 1)), max_size=6), min_size=1, max_size=4
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VERSIONS, st.booleans())
def test_versions_unite_message_by_message_as_in_a_dictionary(tmp_path: Path, found: list[Any], apart: bool) -> None:
    united: dict[str, tuple[str | None, int]] = {}
    trees = []
    for number, version in enumerate(found):
        links: dict[str, tuple[str | None, int]] = {"m0": (None, 0)}
        for own, parent, salt in version:
            if f"m{parent}" in links and own != parent:
                links.setdefault(f"m{own}", (f"m{parent}", salt))
        nodes = {name: message(name, rank=salt) for name, (_, salt) in links.items()}
        for name, (parent_id, _) in links.items():
            if parent_id:
                nodes[parent_id]["replies"].append(nodes[name])
        trees.append({"message_tree_id": "m0", "prompt": nodes["m0"]})
        united = {**united, **links}  # parents of the later version's messages are there again, too
        trees.append(tree(f"between {number}"))
    files = [tmp_path / "raw" / f"{place}.jsonl" for place in range(len(trees) if apart else 1)]
    files[0].parent.mkdir(exist_ok=True)
    for place, file in enumerate(files):
        file.write_bytes(lines(*(trees[place : place + 1] if apart else trees)))
    _, messages, _ = run(tmp_path / "out", files)
    own = messages.filter(pl.col("message_tree_id") == "m0")
    rows = own.select("message_id", "parent_id", "rank").rows()
    assert {name: (parent, salt) for name, parent, salt in rows} == united
    position = {name: row for row, (name, *_) in enumerate(rows)}
    depth = dict(own.select("message_id", "depth").rows())
    for name, parent, _ in rows:
        assert parent is None or (position[parent] < position[name] and depth[name] == depth[parent] + 1)
    for _, below in own.filter(pl.col("parent_id").is_not_null()).group_by("parent_id", maintain_order=True):
        assert below["sibling"].to_list() == list(range(len(below)))


def test_a_message_id_of_another_tree_rejects_the_later_tree(tmp_path: Path) -> None:
    content = lines(tree("a", message("x")), tree("b", message("x")), tree("c"))
    _, messages, rejected = parsed(tmp_path, content, ALL_BAD)
    assert messages["message_id"].to_list() == ["a", "x", "c"]
    assert rejected.select("line", "code", "message_tree_id", "messages").rows() == [(2, "id.duplicate", "b", 2)]


def links(messages: pl.DataFrame) -> set[tuple[str, str, str | None]]:
    return set(messages.select("message_tree_id", "message_id", "parent_id").iter_rows())


@pytest.mark.parametrize("tree_first", [True, False])
def test_a_message_that_a_later_file_has_in_another_tree_moves_there(tmp_path: Path, tree_first: bool) -> None:
    earlier = [tree("u", message("moved", message("below")), message("stays"))]
    later = [tree("u", message("other")), tree("v", message("moved"))]
    counts, messages, rejected = united(tmp_path, earlier, later if tree_first else later[::-1])
    assert links(messages) == {
        ("u", "u", None), ("u", "other", "u"), ("u", "stays", "u"), ("v", "v", None), ("v", "moved", "v"),
    }  # fmt: skip
    assert counts["conflicts"] == 1
    (row,) = rejected.rows(named=True)
    assert (row["code"], row["message_tree_id"], row["trees"], row["messages"]) == ("tree.replaced", "u", 0, 2)
    assert "1 messages of this tree are in tree string 'v'" in row["message"]
    assert "1 lost what they reply to" in row["message"]


def test_a_tree_whose_first_message_moved_is_replaced(tmp_path: Path) -> None:
    counts, messages, rejected = united(tmp_path, [tree("u", message("x"))], [tree("v", message("u", message("y")))])
    assert links(messages) == {("v", "v", None), ("v", "u", "v"), ("v", "y", "u")}
    assert rejected.select("message_tree_id", "trees", "messages").rows() == [("u", 1, 2)]
    assert counts["trees_replaced"] == 1


def test_a_message_that_was_lost_bars_no_other_tree(tmp_path: Path) -> None:
    later = {"message_tree_id": "a", "prompt": message("r")}
    _, messages, rejected = united(tmp_path, [tree("a", message("b"))], [later, tree("c", message("b"))])
    assert links(messages) == {("a", "r", None), ("c", "c", None), ("c", "b", "c")}
    assert set(rejected["code"]) == {"tree.replaced", "tree.replaces"}


@pytest.mark.parametrize("order", ["later", "again"])
def test_what_a_later_version_says_in_unknown_fields_alone_is_taken_from_there(tmp_path: Path, order: str) -> None:
    versions = {"later": [[tree("a", note="old")], [tree("a", note="new")]]}
    versions["again"] = [[*versions["later"][0], *versions["later"][1]]]
    counts, messages, rejected = united(tmp_path, *versions[order])
    assert messages["extra"].to_list() == ['{"note":"new"}']
    assert (counts["trees_repeated"], counts["conflicts"], len(rejected)) == (1, 0, 0)


def test_another_first_message_in_the_same_file_is_no_later_version(tmp_path: Path) -> None:
    other = {"message_tree_id": "a", "prompt": message("r", message("s"))}
    _, messages, rejected = parsed(tmp_path, lines(tree("a", message("b")), other), ALL_BAD)
    assert messages["message_id"].to_list() == ["a", "b"]
    assert rejected.select("line", "code", "messages").rows() == [(2, "tree.root", 2)]


def test_it_is_said_when_later_versions_replace_much(tmp_path: Path) -> None:
    files = [[tree(f"t{n}", rank=rank) for n in range(10)] for rank in (0, 1)]
    counts, *_ = united(tmp_path, *files)
    (said,) = of_parse(counts, ParseParams())
    assert "took the place of 10 of 20 (50.0%) messages" in str(said)
    assert [*of_parse(counts, ParseParams(max_bad_fraction=0.6))] == []


def test_files_are_read_by_name_and_trees_may_come_again_in_another(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    two, one = tmp_path / "raw" / "2.jsonl", tmp_path / "raw" / "1.jsonl.gz"
    one.write_bytes(gzip.compress(lines(tree("a"), tree("b"))))
    two.write_bytes(lines(tree("b"), tree("a", rank=1)))
    counts, messages, rejected = run(tmp_path / "out", [two, one])
    assert messages["message_id"].to_list() == ["b", "a"]
    assert rejected.select("file", "line").rows() == [("1.jsonl.gz", 1), ("2.jsonl", 2)]
    assert counts["lines"] == 4


def test_a_smoke_run_takes_the_first_trees(tmp_path: Path) -> None:
    counts, messages, _ = parsed(tmp_path, lines(tree("a"), tree("b"), tree("c")), ParseParams(max_trees=2))
    assert messages["message_id"].to_list() == ["a", "b"]
    assert counts["lines"] == 2


def test_unknown_fields_are_counted_never_fatal(tmp_path: Path) -> None:
    counts, messages, _ = parsed(tmp_path, lines(tree("a", mood="good"), tree("b", mood="bad")))
    assert counts["unknown_fields"] == {"mood": 2}
    assert messages["extra"].to_list() == ['{"mood":"good"}', '{"mood":"bad"}']


# ------------------------------------------------------------------------------------------------- odd texts

ODD = {
    "equal characters": "a" * 10**6,
    "combining marks": "a" + "\u0301" * 10**6,
    "control characters, each six bytes of JSON": "\x01" * 10**6,
    "no spaces": "\u4e2d" * 300_000,
    "lines": "\n" * 10**6,
    "quotes": '"' * 10**6,
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_a_text_of_a_million_characters_comes_through_or_is_named(tmp_path: Path, text: str) -> None:
    params = ParseParams(max_text_mb=4)
    content = lines(tree("a", message("b", text=text)), tree("c"))
    _, messages, _ = parsed(tmp_path, content, params)
    assert messages["text"].to_list() == ["text of a", text, "text of c"]
    _, messages, rejected = parsed(tmp_path, content, ParseParams(max_text_mb=0.5, max_bad_fraction=1))
    assert messages["message_id"].to_list() == ["c"]
    assert rejected["code"].to_list() == ["text.too_long"]


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_a_text_four_times_as_long_costs_about_four_times_as_much(tmp_path: Path, text: str) -> None:
    """By the calls that the interpreter makes, which no load of the machine changes: no loop here goes over a text."""

    def calls(content: bytes, folder: Path) -> int:
        folder.mkdir()
        found = 0

        def count(*_: object) -> None:
            nonlocal found
            found += 1

        sys.setprofile(count)
        try:
            parsed(folder, content, ParseParams(max_text_mb=16))
        finally:
            sys.setprofile(None)
        return found

    parsed(tmp_path, lines(tree("a")))  # what is loaded once is loaded now
    one, four = (calls(lines(tree("a", text=text * times)), tmp_path / f"x{times}") for times in (1, 4))
    assert four < 4.4 * one


@pytest.mark.parametrize("quick", [True, False])
def test_of_a_key_that_stands_twice_in_an_object_the_last_is_taken_as_python_does(
    tmp_path: Path, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reader here sees that a key was there before; to look for it would cost a tenth of parse, or more."""
    if not quick:
        monkeypatch.setattr("tasks.oasst.reader.read", lambda raws, _: [None] * len(raws))
    reply = json.dumps(message("b"))
    raw = (
        '{"message_tree_id": "a", "prompt": {"message_id": "x", "text": "first", "text": "last", "message_id": "a",'
        ' "role": 5, "role": "prompter", "rank": 1, "rank": 0, "replies": [' + reply + '], "replies": []}}'
    )
    _, messages, rejected = parsed(tmp_path, raw.encode())
    expected = json.loads(raw)["prompt"]
    assert messages.select(expected.keys() - {"replies"}).to_dicts() == [
        {name: value for name, value in expected.items() if name != "replies"}
    ]
    assert rejected.is_empty()


# ------------------------------------------------------------------------------------------------- flat form


def test_a_bad_row_rejects_its_flat_tree_and_an_unreadable_one_makes_orphans(tmp_path: Path) -> None:
    rows = list(flattened([tree("a", message("b")), tree("c", message("d", message("e"))), tree("f")]))
    rows[1]["role"] = "system"
    content = lines(*rows[:3]) + b'{"message_id": "d", \n' + lines(*rows[4:])
    counts, messages, rejected = parsed(tmp_path, content, ALL_BAD)
    assert messages["message_id"].to_list() == ["f"]
    assert rejected.sort("line").select("line", "code", "message_tree_id", "trees", "messages").rows() == [
        (2, "schema.role", "a", 1, 2),
        (3, "tree.orphan", "c", 1, 2),
        (4, "json.syntax", None, 0, 0),
    ]
    assert (counts["trees_in"], counts["messages_in"]) == (3, 5)


def messages_of(path: Path) -> int:
    """Parse a file, and return how many messages it has."""
    counts, *_ = run(path.parent / "out", [path])
    return int(counts["messages"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shape", ["chain", "siblings"])
def test_one_great_tree_of_flat_messages_takes_little_memory(tmp_path: Path, shape: str) -> None:
    """Measured: 1.1 KB a message; it was 2.2 to 2.6, and 6 seconds of 1.1."""
    rows: list[dict[str, Any]] = [
        {"message_id": f"m{n}", "message_tree_id": "m0", "text": f"text {n}", "role": "prompter"}
        | {"parent_id": (f"m{n - 1}" if shape == "chain" else "m0") if n else None}
        for n in range(100_000)
    ]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "great.jsonl").write_bytes(lines(*rows))
    messages, took = taken(messages_of, tmp_path / "raw" / "great.jsonl")
    assert messages == len(rows)
    assert took < 250 * MB


def test_a_flat_row_that_is_there_twice_is_taken_once(tmp_path: Path) -> None:
    rows = list(flattened([tree("a", message("b"))]))
    counts, messages, _ = parsed(tmp_path, lines(*rows, rows[1]))
    assert messages["message_id"].to_list() == ["a", "b"]
    assert (counts["trees_in"], counts["messages_in"], counts["messages_repeated"]) == (1, 3, 1)


@pytest.mark.parametrize("forms", ["flat flat", "flat nested", "nested flat"])
def test_a_later_file_wins_whichever_form_the_files_have(tmp_path: Path, forms: str) -> None:
    one = tree("a", message("b", message("x")), message("c"))
    two = tree("a", message("b", text="new"), message("d"))
    (tmp_path / "raw").mkdir()
    files = [tmp_path / "raw" / name for name in ("1.jsonl", "2.jsonl")]
    for file, whole, form in zip(files, (one, two), forms.split(), strict=True):
        file.write_bytes(lines(*(flattened([whole]) if form == "flat" else [whole])))
    counts, messages, rejected = run(tmp_path / "out", files)
    texts = dict(messages.select("message_id", "text").rows())
    assert texts["b"] == "new"
    assert sorted(texts) == ["a", "b", "c", "d", "x"]
    assert counts["conflicts"] == 1
    assert rejected["messages"].sum() == counts["messages_rejected"] == 1


# ------------------------------------------------------------------------------------------------- properties

NAMES = st.sampled_from("abcdef")
REPLIES: st.SearchStrategy[list[Any]] = st.recursive(
    st.just([]),
    lambda below: st.lists(st.builds(lambda name, replies: (name, replies), NAMES, below), max_size=3),
    max_leaves=6,
)
TREES = st.builds(lambda name, replies, salt: (name, replies, salt), NAMES, REPLIES, st.integers(0, 1))
FAULTS = st.sampled_from([b"{", b"\xff", b"[]", b"{}", b'{"prompt": null}', b'{"message_id": "x", "parent_id": "y"}'])


MOVES = st.lists(  # files of trees: tree -> messages below its first one, each with what it replies to
    st.dictionaries(
        st.integers(0, 2),
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 1)), max_size=5),
        min_size=1,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MOVES)
def test_of_each_message_the_last_file_that_has_it_decides(tmp_path: Path, found: list[dict[int, Any]]) -> None:
    """However messages move between the trees of several files: no tree of the last file is lost."""
    files, used, last = [], set[int](), dict[str, tuple[str, str | None, int | None]]()
    for spec in found:
        used, trees = set(), []
        for number, below in spec.items():
            nodes = {f"t{number}": message(f"t{number}")}
            last[f"t{number}"] = (f"t{number}", None, None)
            for own, parent, salt in below:
                if own not in used:
                    used.add(own)
                    above = f"m{parent}" if f"m{parent}" in nodes else f"t{number}"
                    nodes[f"m{own}"] = message(f"m{own}", rank=salt)
                    nodes[above]["replies"].append(nodes[f"m{own}"])
                    last[f"m{own}"] = (f"t{number}", above, salt)
            trees.append({"message_tree_id": f"t{number}", "prompt": nodes[f"t{number}"]})
        files.append(trees)
    _, messages, rejected = united(tmp_path, *files)
    assert set(rejected["code"]) <= {"tree.replaced", "tree.replaces"}

    def stands(name: str | None) -> bool:
        """Tell whether a message and all above it are of one tree still, each as the last file that has it says."""
        tree_id = last[name][0] if name else None
        while name:
            if last[name][0] != tree_id:
                return False
            name = last[name][1]
        return True

    columns = ("message_id", "message_tree_id", "parent_id", "rank")
    kept = {row[0]: row[1:] for row in messages.select(columns).iter_rows()}
    assert all(kept[name] == last[name] for name in kept)
    assert {f"m{number}" for number in used} | {f"t{number}" for number in found[-1]} <= kept.keys()
    assert kept.keys() <= {name for name in last if stands(name)}


def nested(spec: tuple[str, list[Any], int]) -> dict[str, Any]:
    """A tree whose message ids are its own or, by `*`, shared with other trees."""
    whole, replies, salt = spec

    def grow(found: list[Any]) -> list[dict[str, Any]]:
        ids = ((f"*{name}" if name == "f" else f"{whole}.{name}", below) for name, below in found)
        return [message(name, *grow(below)) for name, below in ids]

    return tree(whole, *grow(replies), rank=salt)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TREES | FAULTS, min_size=1, max_size=12), st.booleans(), st.randoms(use_true_random=False))
def test_whatever_comes_in_the_books_balance(
    tmp_path: Path, found: list[Any], flat: bool, order: random.Random
) -> None:
    content: list[bytes] = []
    for one in found:
        if isinstance(one, bytes):
            content.append(one)
        else:
            rows = flattened([nested(one)]) if flat else [nested(one)]
            content += lines(*rows).splitlines()
    if flat:
        order.shuffle(content)
    parsed(tmp_path, b"\n".join(content), ALL_BAD)  # `run` checks the books


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(st.just([]), lambda below: st.lists(st.tuples(st.text(), below), max_size=4), max_leaves=20))
def test_what_was_published_is_what_the_table_says(tmp_path: Path, replies: list[Any]) -> None:
    numbers = iter(range(10_000))

    def grow(text: str, below: list[Any]) -> dict[str, Any]:
        return message(f"m{next(numbers)}", *(grow(*one) for one in below), text=text)

    whole = {"message_tree_id": "t", "tree_state": None, "prompt": grow("", replies)}
    _, messages, _ = parsed(tmp_path, json.dumps(whole).encode())
    columns = ["message_id", "parent_id", "text"]
    assert messages.select(columns).rows() == [tuple(row[name] for name in columns) for row in flattened([whole])]


@needs_data
def test_the_quick_reader_changes_no_byte_of_what_the_careful_reader_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, *_ = run(tmp_path / "quick", [VALIDATION])
    monkeypatch.setattr("tasks.oasst.reader.read", lambda raws, _: [None] * len(raws))
    careful, *_ = run(tmp_path / "careful", [VALIDATION])
    assert quick == careful
    for file in Messages.files:
        assert (tmp_path / "quick" / file).read_bytes() == (tmp_path / "careful" / file).read_bytes()


@pytest.mark.parametrize("quick_first", [True, False])
def test_a_tree_that_comes_again_is_known_whichever_reader_took_it(tmp_path: Path, quick_first: bool) -> None:
    fields = {
        "labels": {"spam": {"value": 1, "count": 200}},
        "emojis": {"+1": 2},
        "created_date": "2023-02-07T17:29:24Z",
    }
    usual = {**fields, "created_date": "2023-02-07T17:29:24.000000+00:00", "detoxify": {}}
    one, two = tree("a", message("b", **usual)), tree("a", message("b", **fields), unknown=1)
    counts, messages, _ = parsed(tmp_path, lines(*([one, two] if quick_first else [two, one])))
    assert (counts["trees"], counts["trees_repeated"], counts["trees_replaced"]) == (1, 1, 0)
    assert messages["label_spam_count"].to_list() == [None, 200]
