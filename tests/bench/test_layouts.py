"""Layouts: what they compute and, at equal targets, with the seed's recipe beside them, the loss on held-out replies.

    pytest -m bench -n 0 -s tests/bench/test_layouts.py

Real trees of `../shared`; a small model from scratch, `$BENCH_SEEDS` seeds an arm, `$BENCH_TARGETS` targets of the loss
each. All arms are judged on the validation tokens of the layout `tree`, each reply once, at their best evaluation. The
seed's recipe is nanoGPT's fine-tuning of prompts and first replies: random crops across conversations, no end of text
between them that attention would respect, the loss on every token. It gets the same vocabulary, template and trees, so
that its losses can be compared; its own split by characters would put the judge's trees into training.
"""

import os
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from flows import chain, recipe
from tasks.artifacts import Tokens
from tasks.gpt.batches import Split
from tasks.gpt.device import at_work
from tasks.gpt.loop import train_model
from tasks.gpt.training_run import Machine
from tasks.gpt.weights import build_start, scratch_spec, set_dropout
from tasks.train import TrainParams
from tasks.tuning import read_split

SEEDS, TARGETS = int(os.environ.get("BENCH_SEEDS", "3")), int(os.environ.get("BENCH_TARGETS", "400000"))
BLOCK = 512
MODEL = {"layers": 2, "heads": 2, "width": 64}
TUNING: dict[str, Any] = {
    "lr": 3e-3,
    "batch_tokens": 4_096,
    "dropout": 0.0,
    "target_tokens": TARGETS,
    "evals_per_epoch": 2,
}
LAYOUTS = ("tree", "paths", "top1", "first-reply")
RAW = [
    *("curate.rules=[]", "curate.require_reply=false", "curate.pii=off", "curate.dedupe=false"),
    *(
        "curate.near_dedupe=false",
        "curate.drop_cross_split_duplicates=false",
        "curate.val_fraction=0",
        "curate.test_fraction=0",
    ),
]  # all trees, in one split


def encoded(layout: str, source: Path) -> Tokens:
    """Make the tokens of a layout; all come from the same dialogues."""
    settings = [
        "download.source=file",
        f"download.path={source}",
        "encode.vocab_size=2048",
        f"encode.context_length={BLOCK}",
    ]
    settings += [f"encode.layout={layout}", "curate.val_fraction=0.15", "encode.tokenizer=trained"]
    tokens = chain.run(recipe.load("quickstart", settings), chain.DATA)[Tokens]
    assert isinstance(tokens, Tokens)
    return tokens


@pytest.mark.bench
@pytest.mark.parametrize("curated", [False, True])
def test_what_layouts_compute(curated: bool, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(os.environ.get("TREELINE_BENCH_TREES", shared / "data" / "oasst1_en_validation.trees.jsonl.gz"))
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / "store"))
    monkeypatch.setenv("TREELINE_SOURCE_ROOTS", str(source.parent))
    settings = [
        "download.source=file",
        f"download.path={source}",
        "encode.tokenizer=gpt2",
        "encode.context_length=1024",
    ]
    settings += [] if curated else RAW
    for pack in (1_024, 4_096):
        computed, once = {}, 0
        for layout in ("tree", "paths"):
            asked = [*settings, f"encode.sequence_length={pack}", f"encode.layout={layout}"]
            counts = chain.run(recipe.load("quickstart", asked), chain.DATA)[Tokens].counts
            computed[layout] = counts["sequences"] * pack
            once = once or counts["tokens"] - counts["context"]  # of trees: each message once
            print(
                f"{'curated' if curated else 'raw'} {layout:5} in {pack:,}: {computed[layout]:,} tokens computed for "
                f"{once:,}, {once / computed[layout]:.1%} of them; padding {counts['padding']:,}, "
                f"context {counts.get('context', 0):,}"
            )
        print(f"paths compute {computed['paths'] / computed['tree']:.2f} times the tokens of trees")
        assert computed["paths"] > 1.2 * computed["tree"]


def crops(tokens: Tokens, seed: int) -> Split:
    """Cut a stream of conversations at random places, every token a target."""
    ids, ends = tokens.ids("train"), tokens.ends("train")
    at = np.arange(ids.shape[1])
    stream = ids[(ends > at + 1) | (tokens.mask("train") > 0)]  # padding sees only itself
    starts = np.random.default_rng(seed).integers(0, len(stream) - BLOCK, -(-TARGETS // (BLOCK - 1)))
    cut = stream[starts[:, None] + at[:BLOCK]]
    every = np.ones_like(cut)
    return Split(cut, every, np.broadcast_to(at[:BLOCK], cut.shape), np.full_like(cut, BLOCK))


@pytest.mark.bench
@pytest.mark.timeout(6_000)
def test_layouts_and_the_seeds_recipe_at_equal_targets(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shared / "data" / "oasst1_en_validation.trees.jsonl.gz"
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / "store"))
    monkeypatch.setenv("TREELINE_SOURCE_ROOTS", str(source.parent))
    tokens = {layout: encoded(layout, source) for layout in LAYOUTS}
    judge = read_split(tokens["tree"], "val")
    found: dict[str, list[float]] = {}
    for seed in range(1_337, 1_337 + SEEDS):
        for arm in (*LAYOUTS, "seed's recipe"):
            train = read_split(tokens[arm], "train") if arm in LAYOUTS else crops(tokens["first-reply"], seed)
            params = TrainParams(**TUNING, seed=seed)
            settings = params.settings(train.sequence_length, train.supervised())
            size = tokens["tree"].encoding().vocab_size
            model = build_start(scratch_spec(**MODEL, positions=BLOCK, vocab_size=size, seed=seed))
            set_dropout(model, 0.0)
            place = tmp_path / f"{arm} {seed}"
            place.mkdir()
            machine = Machine(torch.device("cpu"), time.monotonic, checkpoint_seconds=1e9)
            with at_work(machine.device, 1, MODEL["width"]):
                made = train_model(model, train, judge, settings=settings, machine=machine, workplace=place)
            assert made.best_nll is not None
            found.setdefault(arm, []).append(made.best_nll)
            told = f"{made.supervised:,} targets, {made.tokens:,} tokens computed, NLL {made.best_nll:.4f}"
            print(f"{arm:14} seed {seed}: {told}")
    print(f"\nNLL of {judge.supervised():,} held-out targets of {len(judge)} sequences, {SEEDS} seeds:")
    for arm, nlls in sorted(found.items(), key=lambda one: fmean(one[1])):
        print(f"| {arm:14} | {fmean(nlls):.3f} | {min(nlls):.3f}-{max(nlls):.3f} |")
