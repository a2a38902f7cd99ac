"""Laws of the pair step: a group's replies share one prompt, and see it and not each other."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from tasks.artifacts import DIALOGUE_COLUMNS, Dialogues, PreferenceGroups, Tokens, arrow_schema, parquet_writer
from tasks.encode import EncodeParams, EncodeRuntime, encode
from tasks.errors import InputError
from tasks.pair import PairParams, pair
from tasks.store.manifest import Manifest
from tasks.text.templates import load_dialect

Row = dict[str, Any]
manifest = partial(Manifest, key="0" * 64, recipe={}, files={}, digest="0" * 64)


def message(tree: str, name: str, parent: str | None, text: str, rank: int | None = None, split: str = "train") -> Row:
    return {
        "message_tree_id": tree, "message_id": name, "parent_id": parent, "depth": name.count("."), "sibling": 0,
        "text": text, "role": ("prompter", "assistant")[name.count(".") % 2], "rank": rank, "split": split,
    }  # fmt: skip


def paired(folder: Path, rows: list[Row], replies: int = 8, block: int = 256) -> PreferenceGroups:
    with parquet_writer(folder / "dialogues.parquet", DIALOGUE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=arrow_schema(DIALOGUE_COLUMNS)))
    dialogues = Dialogues(folder, manifest(kind="dialogues"))
    for name in ("tokens", "preference_groups"):
        (folder / name).mkdir()
    params = EncodeParams(tokenizer="trained", vocab_size=300, context_length=block, sequence_length=block)
    encode.function(folder / "tokens", dialogues, params, EncodeRuntime(workers=1))
    tokens = Tokens(folder / "tokens", manifest(kind="tokens"))
    counts = pair.function(folder / "preference_groups", dialogues, tokens, PairParams(max_replies=replies))
    return PreferenceGroups(folder / "preference_groups", manifest(kind="preference_groups", counts=counts))


ROWS = [
    message("t", "t", None, "Who?"),
    message("t", "t.a", "t", "Me, of course.", rank=1),
    message("t", "t.b", "t", "You.", rank=0),
    message("t", "t.a.p", "t.a", "Why?"),
    message("t", "t.a.p.x", "t.a.p", "So.", rank=0),
    message("t", "t.a.p.y", "t.a.p", "Because it is so.", rank=1),
    message("u", "u", None, "Where?"),
    message("u", "u.a", "u", "Nobody ranked this."),
    message("v", "v", None, "When?", split="val"),
    message("v", "v.a", "v", "Now.", rank=0, split="val"),
    message("v", "v.b", "v", "Then.", rank=3, split="val"),
]


def test_each_group_stands_once_with_what_is_above_it(tmp_path: Path) -> None:
    made = paired(tmp_path, ROWS)
    replies, dialect, ids = made.replies().collect(), load_dialect(made.path), made.ids()
    assert made.counts["preference_groups"] == 3
    assert made.counts["pairs"] == 3
    assert made.encoding().splits == {"train": (0, 1), "val": (1, 2), "test": (2, 2)}
    for _, group in replies.group_by("group"):
        assert group["rank"].to_list() == sorted(group["rank"].to_list())
    text_of = {row["message_id"]: row for row in ROWS}
    for row in replies.iter_rows(named=True):
        turns, above = [], text_of[row["message_id"]]["parent_id"]
        while above is not None:
            turns.append((("user", "assistant")[above.count(".") % 2], text_of[above]["text"]))
            above = text_of[above]["parent_id"]
        asked = dialect.prompt(turns[::-1])
        ends, positions = made.ends()[row["sequence"]], made.positions()[row["sequence"]]
        seen = [at for at in range(row["stop"] - 1) if ends[at] > row["stop"] - 1]
        assert ids[row["sequence"]][seen].tolist()[: len(asked)] == asked
        said = ids[row["sequence"], row["start"] : row["stop"]].tolist()
        assert dialect.decode(said) == text_of[row["message_id"]]["text"]
        assert positions[row["start"]] == len(asked) - 1
        mask = made.mask()[row["sequence"], row["start"] : row["stop"]]
        assert mask.sum() == row["trained"] == len(said) - 1
    assert made.mask().sum() == replies["trained"].sum()


def test_too_many_replies_lose_those_in_the_middle_and_long_ones_go(tmp_path: Path) -> None:
    rows = [message("t", "t", None, "Who?")]
    rows += [message("t", f"t.{rank}", "t", f"number {rank}", rank=rank) for rank in range(6)]
    rows.append(message("t", "t.long", "t", "long " * 400, rank=6))
    made = paired(tmp_path, rows, replies=3)
    assert made.replies().collect()["message_id"].to_list() == ["t.0", "t.1", "t.5"] or made.replies().collect()[
        "message_id"
    ].to_list() == ["t.0", "t.4", "t.5"]


def test_without_a_preference_there_is_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no two replies"):
        paired(tmp_path, ROWS[6:8] + ROWS[8:])


def test_the_arrays_are_those_that_a_reader_maps(tmp_path: Path) -> None:
    made = paired(tmp_path, ROWS)
    assert {path.name for path in made.path.iterdir()} == {*PreferenceGroups.files}
    assert made.ids("train").shape == (1, 256)
    assert made.ids().dtype == np.uint16
    assert made.replies().filter(pl.col("split") == "val").collect()["message_id"].to_list() == ["v.a", "v.b"]
