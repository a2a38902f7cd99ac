"""The laws of packed trees, on real ones: a tree is trained as its paths are, with each message counted once."""

import gzip
import json
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from tasks.artifacts import DIALOGUE_COLUMNS, Dialogues, Tokens, arrow_schema, parquet_writer
from tasks.encode import EncodeParams, EncodeRuntime, encode
from tasks.gpt.attention import visible
from tasks.gpt.attention_flex import BLOCK, block_mask
from tasks.gpt.loss import supervised_nats
from tasks.gpt.weights import build_start, scratch_spec
from tasks.store.manifest import Manifest
from tasks.train import TrainParams, worth_of

PATH, PACK, TREES = 256, 300, 12  # so that most trees are cut, and ancestors repeated
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def rows_of(path: Path, most: int) -> list[dict[str, object]]:
    """Flatten the first trees of a published file, long texts shortened: the law is about branches."""
    rows: list[dict[str, object]] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line, _ in zip(lines, range(most), strict=False):
            tree = json.loads(line)
            todo = [(tree["prompt"], None, 0, 0)]
            while todo:
                node, parent, depth, sibling = todo.pop()
                rows.append(
                    {
                        "message_tree_id": tree["message_tree_id"], "message_id": node["message_id"],
                        "parent_id": parent, "depth": depth, "sibling": sibling, "text": node["text"][:120],
                        "role": node["role"], "rank": node.get("rank"), "split": "train",
                    }
                )  # fmt: skip
                todo += [(low, node["message_id"], depth + 1, at) for at, low in enumerate(node["replies"] or [])]
    return rows


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    found = Path(__file__).resolve().parents[3] / "shared" / "data" / "oasst1_en_validation.trees.jsonl.gz"
    if not found.is_file():
        pytest.skip("needs the real trees in ../shared")
    folder = tmp_path_factory.mktemp("trees")
    with parquet_writer(folder / "dialogues.parquet", DIALOGUE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(rows_of(found, TREES), schema=arrow_schema(DIALOGUE_COLUMNS)))
    manifest = Manifest("0" * 64, "", {}, {}, "0" * 64)
    (folder / "tokens").mkdir()
    params = EncodeParams(tokenizer="trained", vocab_size=512, context_length=PATH, sequence_length=PACK)
    counts = encode.function(folder / "tokens", Dialogues(folder, manifest), params, EncodeRuntime())
    return Tokens(folder / "tokens", Manifest("0" * 64, "", {}, {}, "0" * 64, counts))


@pytest.fixture(scope="module")
def model(tokens: Tokens) -> GPT2LMHeadModel:
    size = tokens.encoding().vocab_size
    return build_start(scratch_spec(layers=2, heads=2, width=16, positions=PATH, vocab_size=size, seed=3)).eval()


def packed(tokens: Tokens, rows: slice = slice(None)) -> Batch:
    ids, mask, positions, ends = (
        torch.from_numpy(array[rows].astype(np.int64))
        for array in (tokens.ids(), tokens.mask(), tokens.positions(), tokens.ends())
    )
    return ids, mask.bool(), positions, ends


def paths(tokens: Tokens) -> list[Batch]:
    """Spell out, for each trained reply, all that is above it and it: one plain causal sequence, its own loss only."""
    index, ids, mask = tokens.index().collect(), tokens.ids(), tokens.mask()
    found: list[Batch] = []
    for place in np.flatnonzero((index["trained"] > 0).to_numpy()).tolist():
        pieces, above = [], place
        while above is not None:
            row = index.row(above, named=True)
            at = (row["sequence"], slice(row["start"], row["stop"]))
            pieces.append((ids[at], mask[at] if above == place else np.zeros_like(mask[at])))
            above = row["parent"]
        said, taught = (np.concatenate(side).astype(np.int64) for side in zip(*reversed(pieces), strict=True))
        line = torch.arange(len(said))[None]
        found.append(
            (torch.tensor(said)[None], torch.tensor(taught).bool()[None], line, torch.full_like(line, len(said)))
        )
    return found


def gradients(
    model: GPT2LMHeadModel, batches: list[Batch], weights: list[Tensor | None] | None = None
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch, weight in zip(batches, weights or [None] * len(batches), strict=True):
        nats = supervised_nats(model, *batch, weights=weight)
        nats.backward()  # type: ignore[no-untyped-call]
        total += nats.item()
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_a_packed_tree_has_the_loss_and_gradients_of_its_paths_each_message_once(
    tokens: Tokens, model: GPT2LMHeadModel
) -> None:
    together, apart = gradients(model, [packed(tokens)]), gradients(model, paths(tokens))
    assert together[0] == pytest.approx(apart[0], rel=1e-5)
    assert {*together[1]} == {*apart[1]}
    for name, found in together[1].items():
        difference = (found - apart[1][name]).norm() / apart[1][name].norm()
        assert difference < 1e-5, name


@pytest.mark.parametrize(("siblings", "decay"), [("shared", 1.0), ("each", 0.5), ("shared", 0.5)])
def test_a_weighed_tree_has_the_weighed_loss_and_gradients_of_its_paths_each_message_once(
    tokens: Tokens, model: GPT2LMHeadModel, siblings: Literal["each", "shared"], decay: float
) -> None:
    worth = worth_of(tokens, TrainParams(reply_weighting=siblings, rank_weight_decay=decay))
    assert worth is not None
    rows, each = np.arange(len(tokens.ids())), paths(tokens)
    spread = torch.from_numpy(worth.spread(rows, (len(rows), PACK)))
    weights = [
        torch.full(mask.shape, float(weight)) for (_, mask, _, _), weight in zip(each, worth.weight, strict=True)
    ]
    together, apart = gradients(model, [packed(tokens)], [spread]), gradients(model, each, [*weights])
    assert together[0] == pytest.approx(apart[0], rel=1e-5)
    for name, found in together[1].items():
        difference = (found - apart[1][name]).norm() / apart[1][name].norm()
        assert difference < 1e-5, name
    assert worth.total(rows) == pytest.approx(
        sum(int(mask.sum()) * float(one.max()) for (_, mask, _, _), one in zip(each, weights, strict=True))
    )


def test_siblings_share_a_weight_of_1_though_a_cut_parts_them(tokens: Tokens) -> None:
    worth = worth_of(tokens, TrainParams(reply_weighting="shared", rank_weight_decay=0.5))
    assert worth is not None
    index = tokens.index().collect()
    above = index["message_id"].gather(index["parent"])
    trained = index.with_columns(prompt=above).filter(index["trained"] > 0).with_columns(weight=worth.weight)
    by_prompt = trained.group_by("prompt").agg(pl.col("weight").sum(), pl.col("sequence").n_unique(), pl.len())
    assert by_prompt["weight"].to_list() == pytest.approx([1.0] * len(by_prompt), abs=1e-5)
    assert (by_prompt["sequence"] > 1).sum() > 3
    better, worse = (trained.filter(pl.col("rank") == rank).select("prompt", "weight") for rank in (0, 1))
    pairs = better.join(worse, on="prompt")
    assert len(pairs) > 10
    assert (pairs["weight"] / pairs["weight_right"]).to_list() == pytest.approx([2.0] * len(pairs))


def test_both_ways_to_attend_see_the_same_in_real_trees(tokens: Tokens) -> None:
    _, _, _, ends = packed(tokens)
    seen, found, at = visible(ends), block_mask(ends), torch.arange(PACK)
    assert found.mask_mod is not None
    each = found.mask_mod(torch.arange(len(ends))[:, None, None], torch.tensor(0), at[:, None], at[None, :])
    assert torch.equal(each, seen[:, 0])
    whole = torch.nn.functional.pad(seen, (0, -PACK % BLOCK, 0, -PACK % BLOCK))
    blocks = whole.unflatten(2, (-1, BLOCK)).unflatten(4, (-1, BLOCK)).sum(dim=(3, 5))  # type: ignore[no-untyped-call]
    assert torch.equal(found.to_dense(), (blocks > 0).int())
    assert found.full_kv_num_blocks is not None
    assert torch.equal(found.full_kv_num_blocks, (blocks == BLOCK**2).sum(dim=3).int())


def test_every_supervised_token_is_trained_exactly_once_an_epoch(tokens: Tokens) -> None:
    index = tokens.index().collect()
    trained = index.filter(index["trained"] > 0)
    assert trained["message_id"].n_unique() == len(trained)
    assert tokens.counts["trained"] == int(tokens.mask().sum())
    assert tokens.counts["cut"] > 3
    assert tokens.counts["context"] > 500
    assert int(tokens.mask().sum()) == sum(int(mask.sum()) for _, mask, _, _ in paths(tokens))


def test_a_token_changes_no_logit_outside_of_its_own_subtree(tokens: Tokens, model: GPT2LMHeadModel) -> None:
    ids, _, positions, ends = packed(tokens, slice(0, 1))
    draw = np.random.default_rng(0)

    def logits(ids: Tensor) -> Tensor:
        out: Tensor = model(ids, attention_mask=visible(ends), position_ids=positions).logits[0]
        return out

    with torch.no_grad():
        before = logits(ids)
        for token in draw.integers(0, ids.shape[1], 12).tolist():
            other = ids.clone()
            other[0, token] = (other[0, token] + 1) % 500
            changed = (logits(other) != before).any(dim=1)
            last = max(int(ends[0, token]), token + 1)
            assert not changed[:token].any()
            assert not changed[last:].any()
            assert changed[token]


def test_a_tree_of_one_branch_is_an_isolated_document(tmp_path: Path) -> None:
    rows = [
        {
            "message_tree_id": f"t{tree}", "message_id": f"{tree}-{depth}", "depth": depth, "sibling": 0,
            "parent_id": f"{tree}-{depth - 1}" if depth else None, "role": ("prompter", "assistant")[depth % 2],
            "text": f"text {tree} {depth} " * (1 + tree % 3), "split": "train",
        }
        for tree in range(12) for depth in range(2 + 2 * (tree % 2))
    ]  # fmt: skip
    with parquet_writer(tmp_path / "dialogues.parquet", DIALOGUE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=arrow_schema(DIALOGUE_COLUMNS)))
    made = []
    for layout in ("tree", "paths"):
        (tmp_path / layout).mkdir()
        params = EncodeParams(
            tokenizer="trained", vocab_size=300, context_length=128, sequence_length=128, layout=layout
        )
        encode.function(
            tmp_path / layout, Dialogues(tmp_path, Manifest("0" * 64, "", {}, {}, "0" * 64)), params, EncodeRuntime()
        )
        made.append([(tmp_path / layout / f"{name}.bin").read_bytes() for name in ("ids", "mask", "positions", "ends")])
    assert made[0] == made[1]
