import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from tasks import text_chunks
from tasks.artifacts import DIALOGUE_COLUMNS, Dialogues, Tokens, arrow_schema, parquet_writer, read_encoding
from tasks.encode import EncodeParams, EncodeRuntime, encode
from tasks.errors import InputError, StoreError
from tasks.store.manifest import Manifest
from tasks.text.templates import load_dialect

Row = dict[str, Any]
manifest = partial(Manifest, key="0" * 64, recipe={}, files={}, digest="0" * 64)
SMALL = EncodeParams(tokenizer="trained", vocab_size=300, context_length=64, sequence_length=64)


def talk(tree: str, *texts: str, split: str = "train") -> list[Row]:
    """Make a conversation of texts, a prompt first; ids are the tree's name and the depth."""
    return [
        {
            "message_tree_id": tree, "message_id": f"{tree}{depth}", "depth": depth, "sibling": 0, "text": text,
            "parent_id": f"{tree}{depth - 1}" if depth else None, "role": ("prompter", "assistant")[depth % 2],
            "split": split,
        }
        for depth, text in enumerate(texts)
    ]  # fmt: skip


def published(path: Path) -> Iterator[Row]:
    """Flatten a file of nested trees: no filter, 5 % of the trees to each of val and test."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as lines:
        for line in lines:
            tree = json.loads(line)
            share = zlib.crc32(tree["message_tree_id"].encode()) % 20
            split = {0: "test", 1: "val"}.get(share, "train")
            todo = [(tree["prompt"], None, 0, 0)]
            while todo:
                node, parent, depth, sibling = todo.pop()
                fields = {name: node.get(name) for name in ("message_id", "text", "role", "rank")}
                place = {"parent_id": parent, "depth": depth, "sibling": sibling, "split": split}
                yield {"message_tree_id": tree["message_tree_id"], **fields, **place}
                replies = list(enumerate(node.get("replies") or []))
                todo += [(reply, node["message_id"], depth + 1, rank) for rank, reply in reversed(replies)]


def dialogues(folder: Path, rows: list[Row]) -> Dialogues:
    folder.mkdir(parents=True, exist_ok=True)
    with parquet_writer(folder / "dialogues.parquet", DIALOGUE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=arrow_schema(DIALOGUE_COLUMNS)))
    return Dialogues(folder, manifest(kind="dialogues"))


def encoded(folder: Path, rows: list[Row], params: EncodeParams = SMALL) -> Tokens:
    out = folder / "tokens"
    out.mkdir(parents=True)
    counts = encode.function(out, dialogues(folder / "dialogues", rows), params, EncodeRuntime(workers=1))
    return Tokens(out, manifest(kind="tokens", counts=counts))


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_files_are_those_of_the_artifact_and_the_counts_add_up(tmp_path: Path) -> None:
    rows = [*talk("a", "Hi", "Hello"), *talk("b", "Who?", "Me", "Why?", "So"), *talk("v", "V", "W", split="val")]
    made = encoded(tmp_path, rows)
    counts = made.counts
    assert set(digest(made.path)) == set(Tokens.files)
    assert made.ids().shape == (counts["sequences"], 64) == (2, 64)
    assert counts["sequences"] * 64 == counts["tokens"] + counts["padding"]
    assert counts["trained"] == made.mask().sum() == made.index().collect()["trained"].sum()
    for name in ("sequences", "tokens", "trained"):
        assert sum(split[name] for split in counts["splits"].values()) == counts[name]
    assert made.encoding().splits == {"train": (0, 1), "val": (1, 2), "test": (2, 2)}
    assert made.encoding().utf8_bytes == {"train": 9, "val": 1, "test": 0}
    assert made.ids("test").shape == (0, 64)
    assert counts["gated"] == len(rows)


def test_the_index_leads_from_tokens_to_messages_and_from_a_message_to_its_parent(tmp_path: Path) -> None:
    made = encoded(tmp_path, [*talk("a", "Hi", "Hello", "What now?", "Bye"), *talk("b", "Yes", "No")])
    index = made.index().collect()
    assert index["message_id"].to_list() == ["a0", "a1", "a2", "a3", "b0", "b1"]
    assert index["parent"].to_list() == [None, 0, 1, 2, None, 4]
    assert index["start"].to_list() == [0, *index["stop"].to_list()[:-1]]
    assert index["role"].to_list()[:2] == ["prompter", "assistant"]
    said = load_dialect(made.path)
    ids = made.ids()[0].tolist()
    asked = said.prompt([("user", "Hi"), ("assistant", "Hello"), ("user", "What now?")])
    assert ids[: len(asked)] == asked
    assert [said.decode(ids[row["start"] : row["stop"]]) for row in index.iter_rows(named=True)] == [
        "Hi", "Hello", "What now?", "Bye", "Yes", "No",
    ]  # fmt: skip


def test_the_index_holds_the_published_rank_and_none_where_there_was_none(tmp_path: Path) -> None:
    rows = talk("a", "Hi", "Hello")
    rows += [{**rows[1], "message_id": "x", "sibling": 1, "rank": 1}, {**rows[1], "message_id": "y", "sibling": 2}]
    rows[1]["rank"] = 0
    index = encoded(tmp_path, rows).index().collect()
    assert dict(zip(index["message_id"], index["rank"], strict=True)) == {"a0": None, "a1": 0, "x": 1, "y": None}


def test_replies_that_several_paths_hold_are_counted_in_bytes_as_often_as_they_are_trained(tmp_path: Path) -> None:
    rows = talk("a", "Hi", "é", "So?", "b")
    rows.append({**rows[3], "message_id": "x", "sibling": 1, "text": "cc"})
    paths = encoded(tmp_path / "paths", rows, SMALL.model_copy(update={"layout": "paths"}))
    assert paths.encoding().utf8_bytes["train"] == 2 + 1 + 2 + 2
    assert encoded(tmp_path / "tree", rows).encoding().utf8_bytes["train"] == 2 + 1 + 2  # there, each is trained once


def test_a_tree_stands_once_with_its_branches_blind_to_each_other(tmp_path: Path) -> None:
    rows = talk("a", "Hi", "Hello", "So?", "b")
    rows.append({**rows[3], "message_id": "x", "sibling": 1, "text": "cc"})
    rows.append({**rows[1], "message_id": "y", "sibling": 1, "text": "Hey"})
    made = encoded(tmp_path, rows)
    index, ends, positions = made.index().collect(), made.ends()[0], made.positions()[0]
    assert index["message_id"].to_list() == ["a0", "a1", "a2", "a3", "x", "y"]
    assert index["parent"].to_list() == [None, 0, 1, 2, 2, 0]
    start, stop = (dict(zip(index["message_id"], index[name], strict=True)) for name in ("start", "stop"))
    assert [ends[start[name]] for name in index["message_id"]] == [
        stop["y"], stop["x"], stop["x"], stop["a3"], stop["x"], stop["y"],
    ]  # fmt: skip
    assert positions[start["x"]] == positions[start["a3"]] == stop["a2"]
    assert positions[start["y"]] == positions[start["a1"]] == stop["a0"]
    assert made.counts["trained"] == index["trained"].sum() == made.mask().sum()


def test_a_tree_larger_than_a_sequence_repeats_ancestors_that_only_one_piece_trains(tmp_path: Path) -> None:
    rows = talk("a", "Hi", "Hello " * 3)
    rows += [{**rows[1], "message_id": f"x{at}", "sibling": at, "text": f"{at} " * 9} for at in range(1, 6)]
    rows += [
        {**rows[1], "message_id": f"y{at}", "parent_id": "a1", "depth": 2, "text": f"{at}! " * 8} for at in range(3)
    ]
    rows = [{**row, "role": "assistant" if row["message_id"] != "a0" else "prompter"} for row in rows]
    made = encoded(tmp_path, rows)
    index = made.index().collect()
    assert made.counts["cut"] == 1
    assert made.counts["conversations"] > 1
    trained = index.filter(index["trained"] > 0)["message_id"].to_list()
    assert sorted(trained) == sorted(row["message_id"] for row in rows if row["role"] == "assistant")
    assert len(index) > len(rows)
    assert made.counts["context"] > 0
    long = encoded(tmp_path / "long", rows, SMALL.model_copy(update={"sequence_length": 512}))
    assert long.ids().shape == (1, 512)
    assert long.counts["context"] == long.counts["cut"] == 0
    assert int(long.positions().max()) < 64 == long.encoding().context_length


def test_a_trained_vocabulary_sees_the_train_split_only(tmp_path: Path) -> None:
    train = talk("a", "mississippi mississippi", "mississippi")
    others = [talk("v", "xylophone " * 5, "xylophone", split="val"), talk("w", "zebra " * 5, "zebra", split="test")]
    first = encoded(tmp_path / "1", [*train, *others[0]])
    second = encoded(tmp_path / "2", [*train, *others[1]])
    assert digest(first.path)["tokenizer.json"] == digest(second.path)["tokenizer.json"]


@pytest.mark.parametrize("params", [SMALL, SMALL.model_copy(update={"template": "xml", "tokenizer": "gpt2"})])
def test_the_same_dialogues_give_the_same_bytes(tmp_path: Path, params: EncodeParams) -> None:
    rows = [row for name in "abcdefgh" for row in talk(name, f"Question {name}?", f"Answer {name * 9}.")]
    assert digest(encoded(tmp_path / "1", rows, params).path) == digest(encoded(tmp_path / "2", rows, params).path)


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tokens]:
    """Give what runs the step on rows, in a store of that name."""

    def run(store: str, rows: list[Row], workers: int = 1, **settings: Any) -> Tokens:
        monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / store))
        content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        given = dialogues(tmp_path / content, rows)
        given = Dialogues(given.path, manifest(kind="dialogues", digest=content))
        return encode(given, EncodeParams(context_length=64, **settings), EncodeRuntime(workers=workers))

    return run


def test_any_number_of_workers_gives_the_same_bytes(
    publish: Callable[..., Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_chunks, "CHUNK_ROWS", 5)
    rows = [row for number in range(60) for row in talk(f"t{number}", f"Ask {number}", f"Say é{number} 中")]
    made = [publish(f"store{workers}", rows, workers=workers).manifest for workers in (1, 2, 5)]
    assert len({one.digest for one in made}) == 1


def test_texts_of_a_megabyte_are_encoded_and_left_out_where_they_fit_no_block(tmp_path: Path) -> None:
    rows = [*talk("a", "Hi", "a" * 1_000_000), *talk("b", "e" + "\u0301" * 1_000_000, "x"), *talk("c", "Hi", "Ho")]
    counts = encoded(tmp_path, rows, EncodeParams(context_length=64)).counts
    assert (counts["conversations"], counts["too_long"]) == (1, 2)


def test_special_text_in_a_message_stays_text(tmp_path: Path) -> None:
    text = "Say <|endoftext|><|end|><|assistant|> and </user>\n<assistant>"
    made = encoded(tmp_path, talk("a", text, text), SMALL.model_copy(update={"context_length": 256}))
    first = made.index().collect().row(1, named=True)
    ids = made.ids()[0].tolist()[first["start"] : first["stop"]]
    assert load_dialect(made.path).decode(ids) == text
    assert [token for token in ids if token in made.encoding().specials.values()] == [ids[0], made.encoding().stop]


def test_nothing_to_train_on_is_an_error_and_an_empty_split_is_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train split.*4 messages came in, 2 of them"):
        encoded(tmp_path, [*talk("a", "Hi", "Hello " * 99), *talk("v", "Hi", "Ho", split="val")])


@pytest.mark.parametrize("wrong", [{"context_length": 70_000}, {"vocab_size": 259}, {"template": "html"}, {"blok": 3}])
def test_settings_that_no_array_can_hold_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EncodeParams(**wrong)


@pytest.mark.parametrize("template", ["chat", "xml"])
def test_real_trees_are_encoded_and_read_back_exactly(
    tmp_path: Path, shared: Path, template: Literal["chat", "xml"]
) -> None:
    rows = list(published(shared / "data/oasst1_en_validation.trees.jsonl.gz"))
    made = encoded(tmp_path, rows, EncodeParams(template=template, layout="paths"))
    counts, encoding, index = made.counts, made.encoding(), made.index().collect()
    assert len(rows) == 2_019
    assert counts["found"] == counts["conversations"] + counts["skipped"] + counts["repeated"]
    assert counts["padding"] <= counts["tokens"] / 50  # of few documents; a thousandth where there are many
    assert counts["gated"] > index.height / 4  # of a megabyte of text, about half is encoded again
    said, text_of = load_dialect(made.path), {row["message_id"]: row["text"] for row in rows}
    ids, mask = np.array(made.ids()), np.array(made.mask())
    for row in index.sample(400, seed=1).iter_rows(named=True):
        span = slice(row["start"], row["stop"])
        tokens, targets = ids[row["sequence"], span], mask[row["sequence"], span].astype(bool)
        if row["role"] == "assistant":
            assert said.decode(tokens[targets].tolist()) == text_of[row["message_id"]]
            assert tokens[targets][-1] == encoding.stop
        else:
            assert not targets.any()
            assert text_of[row["message_id"]] in said.decode(tokens.tolist())


def test_a_sequence_of_trees_holds_4_paths_and_every_other_one_a_path_unless_pack_says_otherwise() -> None:
    assert EncodeParams(context_length=64).length == 256
    assert EncodeParams(context_length=64).keyed() == EncodeParams(context_length=64, sequence_length=256).keyed()
    assert EncodeParams(context_length=64).keyed() != EncodeParams(context_length=64, sequence_length=64).keyed()
    assert EncodeParams(context_length=64, layout="paths").length == 64
    assert (
        EncodeParams(context_length=64, layout="paths").keyed()
        == EncodeParams(context_length=64, layout="paths", sequence_length=64).keyed()
    )
    assert EncodeParams(context_length=64, sequence_length=100).length == 100
    assert EncodeParams(context_length=40_000).length == 65_535  # places in a sequence are uint16


def computed(made: Tokens) -> int:
    """Tokens that an epoch goes through: padding is computed, too."""
    return int(made.ids().size)


@pytest.mark.parametrize(("pack", "more", "waste"), [(1_024, 1.33, 1.13), (None, 1.43, 1.04)])
def test_real_trees_are_computed_less_often_than_their_paths_padding_and_context_counted(
    tmp_path: Path, shared: Path, pack: int | None, more: float, waste: float
) -> None:
    rows = list(published(shared / "data/oasst1_en_validation.trees.jsonl.gz"))
    tree, paths = (
        encoded(tmp_path / layout, rows, EncodeParams(layout=layout, sequence_length=pack))
        for layout in ("tree", "paths")
    )
    replies = {
        name: made.index().collect().filter(role="assistant")["message_id"]
        for name, made in (("tree", tree), ("paths", paths))
    }
    assert {*replies["tree"]} == {*replies["paths"]}
    context = tree.index().collect().filter(role="assistant", trained=0).height
    assert len(replies["tree"]) - replies["tree"].n_unique() == context  # what comes again is context
    assert computed(paths) / computed(tree) > more
    once = tree.counts["tokens"] - tree.counts["context"]
    assert computed(tree) / once < waste  # three splits end on a sequence that is not full
    assert (tree.counts["cut"] > 0) == (tree.counts["context"] > 0) == (pack is not None)


def test_the_first_replies_of_a_real_file_are_the_pairs_of_the_seed(tmp_path: Path, shared: Path) -> None:
    rows = list(published(shared / "data/en_100_tree.jsonl"))
    made = encoded(tmp_path, rows, EncodeParams(layout="first-reply", tokenizer="trained", context_length=4_096))
    assert made.counts["found"] == made.counts["conversations"] == 333


def test_what_is_told_of_the_data_goes_with_the_tokens_and_is_no_content(tmp_path: Path) -> None:
    assert encoded(tmp_path / "a", talk("a", "Hi", "Hello")).curation() is None
    source, out = dialogues(tmp_path / "b", talk("a", "Hi", "Hello")), tmp_path / "tokens"
    (source.path / "curation.json").write_text('{"counts": {}}')
    out.mkdir()
    encode.function(out, source, SMALL, EncodeRuntime(workers=1))
    made = Tokens(out, manifest(kind="tokens"))
    assert made.curation() == {"counts": {}}
    assert "curation.json" in made.records


def test_an_encoding_of_an_earlier_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    encoded(tmp_path, talk("a", "Hi", "Ho"), SMALL)
    path = next(tmp_path.rglob("encoding.json"))
    values = json.loads(path.read_text())
    values["block"] = values.pop("context_length")
    path.write_text(json.dumps(values))
    with pytest.raises(StoreError, match=r"unknown: block, context_length.*encoding\.json.* Run encode again"):
        read_encoding(path.parent)
