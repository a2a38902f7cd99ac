"""Laws of what is shown of an artifact's rows."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flows.views import aside_line, rows, text, verdict
from tasks.artifacts import (
    DIALOGUE_COLUMNS,
    Dialogues,
    PreferenceGroups,
    ReferenceLogprobs,
    Tokens,
    arrow_schema,
    parquet_writer,
)
from tasks.encode import EncodeParams, EncodeRuntime, encode
from tasks.pair import PairParams, pair
from tasks.store.manifest import Manifest

manifest = partial(Manifest, key="0" * 64, recipe={}, files={}, digest="0" * 64)

KEPT: dict[str, Any] = {
    "message_id": "m",
    "message_tree_id": "t",
    "role": "prompter",
    "text": "Write to [e-mail]",
    "split": "val",
}


def test_a_kept_message_says_where_it_is_and_what_was_masked_in_it() -> None:
    assert verdict(KEPT) == "prompter m: kept in val, tree t\n    Write to [e-mail]"
    assert verdict(KEPT | {"masked": "e-mail 1"}).splitlines()[0] == "prompter m: kept in val, tree t, masked: e-mail 1"


def test_what_was_set_aside_says_why_in_two_lines() -> None:
    bad = {"file": "a.jsonl", "line": 1_234, "code": "json.syntax", "message": "expected }", "head": '{"a'}
    assert aside_line(bad) == 'a.jsonl line 1,234: json.syntax: expected }\n    {"a'
    dropped = {"message_id": "m", "role": "assistant", "reason": "personal", "evidence": "phone 1", "text": "x\n" * 99}
    first, second = aside_line(dropped).splitlines()
    assert first == "assistant m: dropped by personal: phone 1"
    assert len(second) <= 104


def test_groups_show_the_prompt_once_and_the_replies_best_first(tmp_path: Path) -> None:
    def said(name: str, parent: str | None, words: str, rank: int | None = None) -> dict[str, Any]:
        role = "assistant" if name.count(".") % 2 else "prompter"
        links = {"message_tree_id": "t", "message_id": name, "parent_id": parent, "depth": name.count(".")}
        return {**links, "sibling": rank or 0, "text": words, "role": role, "rank": rank, "split": "train"}

    made = [said("t", None, "Who?"), said("t.a", "t", "You.", 1), said("t.b", "t", "Me.", 0)]
    made += [said("t.a.p", "t.a", "Why?"), said("t.a.p.x", "t.a.p", "No.", 3), said("t.a.p.y", "t.a.p", "So.", 2)]
    with parquet_writer(tmp_path / "dialogues.parquet", DIALOGUE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(made, schema=arrow_schema(DIALOGUE_COLUMNS)))
    dialogues = Dialogues(tmp_path, manifest(kind="dialogues"))
    for name in ("tokens", "preference_groups"):
        (tmp_path / name).mkdir()
    params = EncodeParams(tokenizer="trained", vocab_size=300, context_length=128)
    encode.function(tmp_path / "tokens", dialogues, params, EncodeRuntime(workers=1))
    tokens = Tokens(tmp_path / "tokens", manifest(kind="tokens"))
    pair.function(tmp_path / "preference_groups", dialogues, tokens, PairParams())
    preference_groups = PreferenceGroups(tmp_path / "preference_groups", manifest(kind="groups"))

    second = text(preference_groups, 5).split("── group 1 · train\n")[1]
    assert second.splitlines() == [
        "<|endoftext|><|user|>Who?<|end|><|assistant|>You.<|end|><|user|>Why?<|end|>",
        "rank 2 t.a.p.y: <|assistant|>So.<|end|>",
        "rank 3 t.a.p.x: <|assistant|>No.<|end|>",
    ]
    first = rows(preference_groups, 1)
    assert [len(first), len(first[0]["replies"]), first[0]["split"]] == [1, 2, "train"]


def test_references_show_a_number_a_reply(tmp_path: Path) -> None:
    np.array([-1.5, -2.25], "<f4").tofile(tmp_path / "logps.bin")
    made = ReferenceLogprobs(tmp_path, manifest(kind="logprobs"))
    assert rows(made, 1) == [{"reply": 0, "nats": -1.5}]
    assert text(made, 9).endswith("reply 0: -1.500 nats\nreply 1: -2.250 nats")
