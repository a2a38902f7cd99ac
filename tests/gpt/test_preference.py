"""Laws of preferences: one packed group is worth its pairs taken apart, and the loss is the published one."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer, GPT2LMHeadModel

from tasks.artifacts import (
    DIALOGUE_COLUMNS,
    Dialogues,
    Model,
    PreferenceGroups,
    ReferenceLogprobs,
    Tokens,
    arrow_schema,
    parquet_writer,
)
from tasks.encode import EncodeParams, EncodeRuntime, encode
from tasks.errors import InputError, ParameterError, TrainingError
from tasks.gpt.preference import Replies, Side, compare_pairs, reply_logps
from tasks.gpt.weights import load_model, set_dropout
from tasks.pair import PairParams, pair
from tasks.prefer import PreferParams, PreferRuntime, prefer, refuse_other_precision
from tasks.score import ScoreParams, ScoreRuntime, score
from tasks.store.manifest import Manifest
from tasks.train import TrainParams, TrainRuntime, train
from tasks.tuning import read_split

manifest = partial(Manifest, key="0" * 64, recipe={}, files={}, digest="0" * 64)
TUNING: dict[str, Any] = {"epochs": 8, "batch_tokens": 512, "lr": 1e-3, "evals_per_epoch": 1, "dropout": 0.0}


def rows() -> list[dict[str, Any]]:
    """Make preference groups in which the polite reply always wins."""
    made = []
    for tree in range(24):
        split = "val" if tree % 6 == 5 else "train"
        said = [(f"{tree}", None, f"Question {tree}?", None), (f"{tree}.a", f"{tree}", f"Yes, please, {tree}.", 0)]
        said += [(f"{tree}.b", f"{tree}", f"Go away {tree}!", 2), (f"{tree}.c", f"{tree}", f"Hm, {tree}.", 1)]
        for name, parent, text, rank in said:
            made.append(
                {
                    "message_tree_id": f"t{tree}", "message_id": name, "parent_id": parent, "sibling": rank or 0,
                    "depth": int(rank is not None), "role": "prompter" if parent is None else "assistant",
                    "text": text, "rank": rank, "split": split,
                }
            )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreferenceGroups, Model, ReferenceLogprobs]:
    folder = tmp_path_factory.mktemp("preferences")
    with parquet_writer(folder / "dialogues.parquet", DIALOGUE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(rows(), schema=arrow_schema(DIALOGUE_COLUMNS)))
    for name in ("tokens", "preference_groups", "model", "reference_logprobs"):
        (folder / name).mkdir()
    dialogues = Dialogues(folder, manifest(kind="dialogues"))
    params = EncodeParams(tokenizer="trained", vocab_size=300, context_length=64, sequence_length=128)
    encode.function(folder / "tokens", dialogues, params, EncodeRuntime(workers=1))
    tokens = Tokens(folder / "tokens", manifest(kind="tokens"))
    pair.function(folder / "preference_groups", dialogues, tokens, PairParams())
    train.function(
        folder / "model",
        tokens,
        TrainParams(**TUNING, layers=2, heads=2, width=32),
        TrainRuntime(device="cpu", threads=1),
    )
    preference_groups, model = (
        PreferenceGroups(folder / "preference_groups", manifest(kind="groups")),
        Model(folder / "model", manifest(kind="model")),
    )
    score.function(
        folder / "reference_logprobs", preference_groups, model, ScoreParams(), ScoreRuntime(device="cpu", threads=1)
    )
    return (
        preference_groups,
        model,
        ReferenceLogprobs(folder / "reference_logprobs", manifest(kind="logprobs")),
    )


def alone(model: GPT2LMHeadModel, preference_groups: PreferenceGroups, row: dict[str, int]) -> Tensor:
    """Spell a reply out with all that it sees, as one plain sequence: its log-probability."""
    ids, ends = preference_groups.ids()[row["sequence"]], preference_groups.ends()[row["sequence"]]
    seen = [at for at in range(row["stop"]) if ends[at] >= row["stop"]]
    logits = log_softmax(model(torch.tensor(ids[seen].astype(np.int64))[None]).logits[0], dim=1)
    first = len(seen) - row["trained"]
    return torch.stack([logits[at - 1, int(ids[seen[at]])] for at in range(first, len(seen))]).sum()


def test_a_packed_group_gives_each_reply_the_probability_it_has_alone(
    made: tuple[PreferenceGroups, Model, ReferenceLogprobs],
) -> None:
    preference_groups, model, reference_logprobs = made
    loaded, table = load_model(model.path).eval(), preference_groups.replies().collect()
    with torch.no_grad():
        expected = torch.stack([alone(loaded, preference_groups, row) for row in table.iter_rows(named=True)])
    torch.testing.assert_close(torch.from_numpy(reference_logprobs.logps()), expected, rtol=1e-5, atol=1e-4)


def test_with_little_memory_fewer_are_asked_at_once_where_that_is_left_to_it_and_else_that_is_said(
    made: tuple[PreferenceGroups, Model, ReferenceLogprobs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preference_groups, model, reference_logprobs = made
    tried: list[int] = []

    def short(loaded: object, split: object, replies: object, at_once: int, *rest: object, **how: object) -> np.ndarray:
        tried.append(at_once)
        if at_once > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return reference_logprobs.logps()

    monkeypatch.setattr("tasks.gpt.preference.all_logps", short)
    score.function(
        tmp_path, preference_groups, model, ScoreParams(), ScoreRuntime(device="cpu", threads=1, micro_batch="auto")
    )
    assert tried[-1] == 1
    assert len(tried) > 1
    with pytest.raises(TrainingError, match=r"runtime\.micro_batch"):
        score.function(
            tmp_path, preference_groups, model, ScoreParams(), ScoreRuntime(device="cpu", threads=1, micro_batch=4)
        )


def test_a_start_that_was_asked_in_other_numbers_is_refused(
    made: tuple[PreferenceGroups, Model, ReferenceLogprobs],
) -> None:
    *_, reference_logprobs = made
    with pytest.raises(ParameterError, match=r"score\.precision"):
        refuse_other_precision(reference_logprobs, PreferParams(precision="bfloat16"))
    refuse_other_precision(reference_logprobs, PreferParams())


def test_gradients_of_packed_replies_are_those_of_plain_sequences(
    made: tuple[PreferenceGroups, Model, ReferenceLogprobs],
) -> None:
    preference_groups, model, _ = made
    loaded, table = load_model(model.path).eval(), preference_groups.replies().filter(sequence=0).collect()
    trained = table["trained"].to_numpy().astype(np.int64)
    weight = torch.linspace(-1, 1, len(trained))  # any function of the log-probabilities will do
    batch = read_split(preference_groups, None).batch(np.array([0]), torch.device("cpu"))
    (reply_logps(loaded, batch, trained, chunk=7) * weight).sum().backward()  # type: ignore[no-untyped-call]
    together = {name: one.grad.to_dense() for name, one in loaded.named_parameters() if one.grad is not None}
    loaded.zero_grad()
    apart = torch.stack([alone(loaded, preference_groups, row) for row in table.iter_rows(named=True)])
    (apart * weight).sum().backward()  # type: ignore[no-untyped-call]
    for name, one in loaded.named_parameters():
        assert one.grad is not None
        assert (together[name] - one.grad).norm() <= 1e-5 * max(float(one.grad.norm()), 1e-2), name


def test_the_loss_is_that_of_the_paper() -> None:
    logps, reference = torch.tensor([-4.0, -9.0, -2.0]), torch.tensor([-5.0, -8.0, -2.5])
    found = compare_pairs(logps, reference, torch.tensor([0, 0]), torch.tensor([1, 2]), beta=0.5)
    margins = [0.5 * ((-4 + 5) - (-9 + 8)), 0.5 * ((-4 + 5) - (-2 + 2.5))]
    assert found.margin.tolist() == pytest.approx(margins)
    assert found.loss.tolist() == pytest.approx([np.log1p(np.exp(-margin)) for margin in margins])
    assert found.chosen.tolist() == [-4.0, -4.0]


def spelled(preference_groups: PreferenceGroups, row: dict[str, int]) -> tuple[list[int], list[int]]:
    """Return the ids of what a reply sees, and those of it that are trained."""
    ids, ends = preference_groups.ids()[row["sequence"]], preference_groups.ends()[row["sequence"]]
    seen = [int(ids[at]) for at in range(row["stop"]) if ends[at] >= row["stop"]]
    return seen[: -row["trained"]], seen[-row["trained"] :]


def test_loss_and_gradients_are_those_of_trls_trainer(
    made: tuple[PreferenceGroups, Model, ReferenceLogprobs], tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", reason="needs the package trl")
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    preference_groups, model, reference_logprobs = made
    table = preference_groups.replies().filter(split="train").sort("sequence", "start")
    columns = table.select("sequence", "trained", "group", "rank").collect()
    replies = Replies(*(columns[name].to_numpy().astype(np.int64) for name in columns.columns))
    sequences, rows = read_split(preference_groups, "train"), np.unique(replies.sequence)[:3]
    tuned = load_model(model.path)
    with torch.no_grad():
        for weight in tuned.parameters():  # away from the start, or the loss would be log 2 whatever is computed
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    set_dropout(tuned, 0.0)
    theirs = copy.deepcopy(tuned)

    side = Side(sequences, replies, reference_logprobs.logps()[: len(columns)])
    loss = side.compare(tuned, rows, 0.3, torch.device("cpu")).loss.mean()
    loss.backward()  # type: ignore[no-untyped-call]

    each = list(table.collect().iter_rows(named=True))
    numbers = replies.of(rows)
    pairs = []
    for better, worse in zip(*replies.pairs(numbers), strict=True):
        (prompt, chosen), (_, rejected) = (
            spelled(preference_groups, each[numbers[place]]) for place in (better, worse)
        )
        pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    assert len(pairs) > 3
    words = AutoTokenizer.from_pretrained(model.path)
    how = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False
    )
    asked = datasets.Dataset.from_list([{"prompt": "Question?", "chosen": "Yes.", "rejected": "No."}])
    trainer = trl.DPOTrainer(
        model=theirs, ref_model=load_model(model.path), args=how, train_dataset=asked, processing_class=words
    )
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(pairs))
    expected.backward()
    assert abs(loss.item() - np.log(2)) > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    known = dict(theirs.named_parameters())
    for name, weight in tuned.named_parameters():
        assert weight.grad is not None
        assert known[name].grad is not None
        assert (weight.grad.to_dense() - known[name].grad).norm() <= 1e-5 * known[name].grad.norm(), name


def test_pairs_are_within_groups_and_never_between_equals() -> None:
    replies = Replies(
        np.array([0, 0, 0, 1, 1]), np.array([2, 2, 2, 3, 3]), np.array([0, 0, 0, 1, 1]), np.array([0, 1, 1, 2, 5])
    )
    better, worse = replies.pairs(replies.of(np.array([1, 0])))
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (2, 3), (2, 4)]


def test_a_model_learns_to_prefer_what_people_ranked_higher(
    made: tuple[PreferenceGroups, Model, ReferenceLogprobs], tmp_path: Path
) -> None:
    preference_groups, model, reference_logprobs = made
    params = PreferParams(**TUNING | {"lr": 3e-3, "epochs": 12.0, "beta": 0.3})
    counts = prefer.function(
        tmp_path,
        preference_groups,
        reference_logprobs,
        model,
        params,
        PreferRuntime(device="cpu", threads=1, deterministic=True),
    )
    assert counts["loss_start"] == pytest.approx(np.log(2), abs=1e-5)  # the start prefers nothing to itself
    assert counts["loss_best"] < counts["loss_start"] / 2
    assert counts["accuracy_best"] == 1.0
    assert {path.name for path in tmp_path.iterdir()} >= {*Model.files}


def test_scores_of_other_groups_are_refused(
    made: tuple[PreferenceGroups, Model, ReferenceLogprobs], tmp_path: Path
) -> None:
    preference_groups, model, reference_logprobs = made
    reference_logprobs.logps()[:-1].tofile(tmp_path / "logps.bin")
    short = ReferenceLogprobs(tmp_path, manifest(kind="logprobs"))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="expected reference log-probabilities of"):
        prefer.function(tmp_path / "out", preference_groups, short, model, PreferParams(), PreferRuntime(device="cpu"))
