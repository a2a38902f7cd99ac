"""Laws of the exports: what other programs read is what the artifact holds, and a folder is whole or not there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from flows import exporting
from flows.exporting import export
from tasks.artifacts import DIALOGUE_COLUMNS, Dialogues, Tokens, arrow_schema, parquet_writer
from tasks.encode import EncodeParams, EncodeRuntime, encode
from tasks.errors import InputError, ParameterError, StoreError
from tasks.store.manifest import Manifest

MANIFEST = Manifest(key="0" * 64, kind="dialogues", recipe={}, files={}, digest="0" * 64)


def rows(tree: str, split: str) -> list[dict[str, Any]]:
    """Make a tree of two paths: 0 -> 1 -> 2, and 0 -> 3."""
    return [
        {
            "message_tree_id": tree, "message_id": f"{tree}{number}", "parent_id": parent and f"{tree}{parent}",
            "depth": depth, "sibling": sibling, "text": f"Text {number} of\u2028{tree} …", "role": role, "split": split,
            "lang": "en",
        }
        for number, parent, depth, sibling, role in (
            (0, None, 0, 0, "prompter"), (1, "0", 1, 0, "assistant"), (2, "1", 2, 0, "prompter"),
            (3, "0", 1, 1, "assistant"),
        )
    ]  # fmt: skip


@pytest.fixture
def dialogues(tmp_path: Path) -> Dialogues:
    made = [*rows("a", "train"), *rows("b", "train"), *rows("v", "val")]
    with parquet_writer(tmp_path / "dialogues.parquet", DIALOGUE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(made, schema=arrow_schema(DIALOGUE_COLUMNS)))
    return Dialogues(tmp_path, MANIFEST)


@pytest.fixture
def tokens(dialogues: Dialogues, tmp_path: Path) -> Tokens:
    out = tmp_path / "tokens"
    out.mkdir()
    encode.function(
        out,
        dialogues,
        EncodeParams(tokenizer="trained", vocab_size=300, context_length=64, layout="paths"),
        EncodeRuntime(),
    )
    return Tokens(out, MANIFEST)


def test_nanogpt_gets_the_paths_of_packed_trees(dialogues: Dialogues, tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    encode.function(
        tmp_path / "tree",
        dialogues,
        EncodeParams(tokenizer="trained", vocab_size=300, context_length=64, sequence_length=128),
        EncodeRuntime(),
    )
    export("nanogpt", Tokens(tmp_path / "tree", MANIFEST), tmp_path / "of-trees")
    export("nanogpt", tokens, tmp_path / "of-paths")
    start = tokens.ids()[0, 0]

    def talks(name: str) -> list[tuple[int, ...]]:
        ids = np.fromfile(tmp_path / name / "train.bin", np.uint16)
        return sorted(tuple(talk.tolist()) for talk in np.split(ids, np.flatnonzero(ids == start)[1:]))

    assert talks("of-trees") == talks("of-paths")


def test_nanogpt_reads_the_conversations_without_their_padding(tokens: Tokens, tmp_path: Path) -> None:
    counts = export("nanogpt", tokens, tmp_path / "data" / "talk")
    index = tokens.index().collect()
    for split in ("train", "val"):
        data = np.memmap(tmp_path / "data" / "talk" / f"{split}.bin", dtype=np.uint16, mode="r")  # as train.py does
        ours = index.filter(pl.col("split") == split).rows(named=True)
        ids = tokens.ids()
        assert data.tolist() == [
            token for row in ours for token in ids[row["sequence"], row["start"] : row["stop"]].tolist()
        ]
        assert len(data) == counts[split]


def test_nanogpt_gets_the_vocabulary_as_json_and_never_a_pickle(tokens: Tokens, tmp_path: Path) -> None:
    export("nanogpt", tokens, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"train.bin", "val.bin", "meta.json", "tokenizer.json"}
    meta = json.loads((tmp_path / "out" / "meta.json").read_bytes())
    assert meta["vocab_size"] == max(tokens.encoding().specials.values()) + 1
    assert int(tokens.ids().max()) < meta["vocab_size"]
    assert any("meta.pkl" in note for note in meta["notes"])


def test_a_split_that_nanogpt_could_not_open_is_refused(tmp_path: Path) -> None:
    with parquet_writer(tmp_path / "dialogues.parquet", DIALOGUE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(rows("a", "train"), schema=arrow_schema(DIALOGUE_COLUMNS)))
    (tmp_path / "tokens").mkdir()
    params = EncodeParams(tokenizer="trained", vocab_size=300, context_length=64)
    encode.function(tmp_path / "tokens", Dialogues(tmp_path, MANIFEST), params, EncodeRuntime())
    with pytest.raises(InputError, match="val split holds no tokens"):
        export("nanogpt", Tokens(tmp_path / "tokens", MANIFEST), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_messages_are_the_paths_from_root_to_leaf(dialogues: Dialogues, tmp_path: Path) -> None:
    assert export("messages", dialogues, tmp_path / "out") == {"train": 4, "val": 2}
    lines = (tmp_path / "out" / "train.jsonl").read_bytes().splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["message_ids"] for row in found] == [["a0", "a1", "a2"], ["a0", "a3"], ["b0", "b1", "b2"], ["b0", "b3"]]
    assert found[1] == {
        "id": "a3", "tree_id": "a", "split": "train", "lang": "en", "message_ids": ["a0", "a3"],
        "langs": ["en", "en"], "messages": [
            {"role": "user", "content": "Text 0 of\u2028a …"}, {"role": "assistant", "content": "Text 3 of\u2028a …"},
        ],
    }  # fmt: skip
    assert pl.read_parquet(tmp_path / "out" / "train.parquet").to_dicts() == found
    assert not (tmp_path / "out" / "test.jsonl").exists()


def test_datasets_reads_both_forms_back(dialogues: Dialogues, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    out, cache = tmp_path / "out", str(tmp_path / "cache")
    export("messages", dialogues, out)
    files = {"train": str(out / "train.jsonl"), "validation": str(out / "val.jsonl")}
    for loaded in (
        datasets.load_dataset(str(out), cache_dir=cache),
        datasets.load_dataset("json", data_files=files, cache_dir=cache),
    ):
        for split, name in (("train", "train"), ("validation", "val")):
            lines = (out / f"{name}.jsonl").read_bytes().splitlines()
            assert loaded[split].to_list() == [json.loads(line) for line in lines]


def test_a_folder_with_something_in_it_is_refused_and_left_alone(dialogues: Dialogues, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for taken in (tmp_path / "out", tmp_path / "out" / "mine.txt"):
        with pytest.raises(ParameterError, match="not empty"):
            export("messages", dialogues, taken)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(dialogues: Dialogues, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export("messages", dialogues, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").exists()


def test_a_failed_export_leaves_nothing(dialogues: Dialogues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_card", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StoreError, match="No space left"):
        export("messages", dialogues, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_form_is_for_one_kind_of_artifact(dialogues: Dialogues, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="nanogpt is a form of tokens"):
        export("nanogpt", dialogues, tmp_path / "out")
