import errno
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from tasks.errors import ParameterError, TrainingError
from tasks.gpt import checkpoint, loop, run_state
from tasks.gpt.batches import Plan, Split
from tasks.gpt.loop import train_model
from tasks.gpt.loss import token_nats
from tasks.gpt.schedule import learning_rate
from tasks.gpt.training_run import Machine, Progress, Settings
from tasks.gpt.weights import build_start, freeze, scratch_spec, set_dropout
from tasks.progress import listening

VOCABULARY, BLOCK, ROWS = 24, 12, 20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # to the bit means: at equal threads
    yield
    torch.set_num_threads(before)


def split(rows: int = ROWS, seed: int = 0) -> Split:
    """Counting up from a drawn number: learnable, with documents of 6 tokens and a mask that differs by row."""
    drawn = np.random.default_rng(seed)
    starts = drawn.integers(0, VOCABULARY, (rows, 2)).repeat(6, axis=1)
    places = np.tile(np.arange(6), 2)
    mask = (np.arange(BLOCK) % 6 > 0) & (drawn.random((rows, BLOCK)) < 0.7)
    ends = np.broadcast_to(np.repeat([6, 12], 6), (rows, BLOCK))
    return Split((starts + places) % VOCABULARY, mask, np.broadcast_to(places, (rows, BLOCK)), ends)


def start(dropout: float = 0.1) -> GPT2LMHeadModel:
    model = build_start(scratch_spec(layers=1, heads=2, width=16, positions=BLOCK, vocab_size=VOCABULARY, seed=0))
    set_dropout(model, dropout)
    return model


SETTINGS = Settings(
    seed=1, epochs=3, sequences=8, lr=1e-2, min_lr_ratio=0.1, warmup_ratio=0.1, weight_decay=0.1,
    max_grad_norm=1.0, evals_per_epoch=1, patience=None, precision="float32",
)  # fmt: skip
MACHINE = Machine(CPU, clock=lambda: 0.0, micro_batch=3, checkpoint_seconds=math.inf)
STEPS = 9


def run(
    folder: Path,
    settings: Settings = SETTINGS,
    machine: Machine = MACHINE,
    train: Split | None = None,
    val: Split | None = None,
    dropout: float = 0.1,
) -> tuple[dict[str, Tensor], Progress, list[dict[str, Any]]]:
    folder.mkdir(exist_ok=True)
    model = start(dropout)
    train = split() if train is None else train
    val = split(6, seed=1) if val is None else val
    progress = train_model(model, train, val, settings=settings, machine=machine, workplace=folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}, progress, log


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Killed(BaseException):
    """Ends a run as suddenly as an exception can."""


class Killer:
    """A listener that ends the run after a number of steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator["Killer"]:
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.left -= bool(note)
        if self.left == 0:
            raise Killed


def killed(folder: Path, after: int, machine: Machine) -> None:
    with listening(Killer(after)), pytest.raises(Killed):
        run(folder, machine=machine)


def ticking() -> Machine:
    """A machine whose clock moves by a second each time it is looked at, and which saves now and then."""
    seconds = iter(range(1_000_000))
    return replace(MACHINE, clock=lambda: float(next(seconds)), checkpoint_seconds=15.0)


def test_it_learns_and_logs_each_step_and_evaluation(tmp_path: Path) -> None:
    _, progress, log = run(tmp_path, replace(SETTINGS, epochs=30), dropout=0.0)
    assert [entry["step"] for entry in log] == list(range(91))
    assert set(log[0]) == {
        "step", "epoch", "tokens", "loss", "lr", "grad_norm", "val_nll", "seconds", "tokens_per_second",
    }  # fmt: skip
    assert [entry["step"] for entry in log if entry["val_nll"] is not None] == list(range(0, 91, 3))
    assert progress.start_nll == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert progress.best_nll is not None
    assert progress.best_nll < 1.0
    assert log[-1]["tokens"] == progress.tokens == 30 * ROWS * BLOCK
    assert progress.supervised == 30 * split().supervised()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    first, _, log = run(tmp_path / "a")
    again, _, same_log = run(tmp_path / "b")
    other, _, _ = run(tmp_path / "c", replace(SETTINGS, seed=2))
    assert equal(first, again)
    assert log == same_log
    assert not equal(first, other)


@pytest.mark.parametrize("after", range(1, STEPS))
def test_killed_after_any_step_and_resumed_it_ends_the_same_to_the_bit(tmp_path: Path, after: int) -> None:
    whole, told, log = run(tmp_path / "whole")
    killed(tmp_path / "cut", after, replace(MACHINE, checkpoint_seconds=0.0))
    resumed, progress, resumed_log = run(tmp_path / "cut")
    assert equal(resumed, whole)
    assert progress == told
    assert resumed_log == log


def test_killed_long_after_its_checkpoint_it_does_the_lost_steps_again(tmp_path: Path) -> None:
    whole, _, log = run(tmp_path / "whole")
    killed(tmp_path / "cut", 7, ticking())
    saved = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").glob("step-*"))
    assert saved
    assert saved[-1] < "step-00000007"
    resumed, _, resumed_log = run(tmp_path / "cut")
    assert equal(resumed, whole)
    assert [entry["loss"] for entry in resumed_log] == [entry["loss"] for entry in log]


@pytest.mark.parametrize("part", ["progress", "settings"])
def test_from_a_checkpoint_with_a_field_that_is_not_known_it_does_not_go_on_but_from_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    whole, _, log = run(tmp_path / "whole")
    killed(tmp_path / "cut", 5, replace(MACHINE, checkpoint_seconds=0.0))
    before, newest = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))
    body = json.loads((newest / checkpoint.NAME).read_bytes())
    body["state"][part]["mood"] = 7
    del body["seal"]
    (newest / checkpoint.NAME).write_text(json.dumps({"seal": checkpoint._seal(body), **body}))
    resumed, _, resumed_log = run(tmp_path / "cut")
    assert f"{newest} is of another version and passed over" in caplog.text
    assert str(before) not in caplog.text
    assert equal(resumed, whole)
    assert resumed_log == log


def test_killed_before_any_checkpoint_it_starts_over(tmp_path: Path) -> None:
    whole, _, log = run(tmp_path / "whole")
    killed(tmp_path / "cut", 2, MACHINE)
    resumed, _, resumed_log = run(tmp_path / "cut")
    assert equal(resumed, whole)
    assert resumed_log == log


@pytest.mark.parametrize(("failing", "ends"), [({3, 5}, None), ({3, 4}, 4)])
def test_a_checkpoint_that_cannot_be_written_is_said_and_two_in_a_row_end_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: set[int],
    ends: int | None,
) -> None:
    written = checkpoint.save

    def save(folder: Path, found: checkpoint.Checkpoint, **rest: Any) -> Path:
        if found.step in failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(folder, found, **rest)

    whole, _, log = run(tmp_path / "whole")
    monkeypatch.setattr(checkpoint, "save", save)
    every = replace(MACHINE, checkpoint_seconds=0.0)
    if ends:
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "full", machine=every)
        assert max((tmp_path / "full" / "checkpoints").glob("step-*")).name == "step-00000002"
        failing.clear()
    resumed, _, resumed_log = run(tmp_path / "full", machine=every)
    told = "could not be saved: [Errno 28] No space left on device; training continues"
    assert caplog.text.count(told) == 2 - bool(ends)
    assert equal(resumed, whole)
    assert resumed_log == log


def lose(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a run forget what it did in its first four steps."""
    rows, rate, seed = Plan.rows, learning_rate, loop._seed
    if what == "optimizer":
        monkeypatch.setattr(run_state, "set_moments", lambda *_: None)
    elif what == "data":
        monkeypatch.setattr(Plan, "rows", lambda plan, step: rows(plan, step - 4))
    elif what == "schedule":
        monkeypatch.setattr(loop, "learning_rate", lambda step, *rest, **named: rate(step - 4, *rest, **named))
    elif what == "dropout":
        monkeypatch.setattr(loop, "_seed", lambda base, step, rank: seed(base, step - 4, rank))


@pytest.mark.parametrize("lost", ["optimizer", "data", "schedule", "dropout"])
def test_a_resumed_run_that_lost_something_ends_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    whole, _, _ = run(tmp_path / "whole")
    killed(tmp_path / "cut", 4, replace(MACHINE, checkpoint_seconds=0.0))
    lose(lost, monkeypatch)
    resumed, _, _ = run(tmp_path / "cut")
    assert not equal(resumed, whole)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    killed(tmp_path, 2, replace(MACHINE, checkpoint_seconds=0.0))
    with pytest.raises(TrainingError, match="other settings"):
        run(tmp_path, replace(SETTINGS, lr=0.5))


def test_micro_batches_change_the_step_by_rounding_only(tmp_path: Path) -> None:
    found = [run(tmp_path / str(size), machine=replace(MACHINE, micro_batch=size), dropout=0.0) for size in (1, 3, 8)]
    losses = [[entry["loss"] for entry in log[1:]] for _, _, log in found]
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)


def test_the_first_loss_is_the_mean_over_supervised_tokens_of_the_whole_step(tmp_path: Path) -> None:
    train = split()
    _, _, log = run(tmp_path, replace(SETTINGS, sequences=ROWS), train=train, dropout=0.0)
    nats = token_nats(start(0.0).eval(), *train.batch(slice(0, ROWS), CPU))
    assert log[1]["loss"] == pytest.approx(nats.mean().item(), rel=1e-5)


def test_the_best_weights_are_kept_not_the_last(tmp_path: Path) -> None:
    val = split(6, seed=1)
    # from the second step on, a rate that ruins the model
    ruin = replace(SETTINGS, lr=3.0, warmup_ratio=0.9, max_grad_norm=None, epochs=6, weight_decay=0.0)
    weights, progress, log = run(tmp_path, ruin, val=val, dropout=0.0)
    nlls = {entry["step"]: entry["val_nll"] for entry in log if entry["val_nll"] is not None}
    assert progress.best_step == min(nlls, key=nlls.__getitem__) < progress.step
    model = start().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
    found = token_nats(model, *val.batch(slice(0, 6), CPU)).mean().item()
    assert found == pytest.approx(progress.best_nll, rel=1e-5)


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    ruin = replace(SETTINGS, lr=3.0, warmup_ratio=0.0, epochs=20, patience=2)
    _, progress, log = run(tmp_path, ruin)
    assert progress.waited == 2
    assert progress.step < 60
    assert log[-1]["val_nll"] is not None


def test_without_a_validation_split_the_last_weights_are_the_best(tmp_path: Path) -> None:
    _, progress, log = run(tmp_path, val=split(0))
    assert (progress.start_nll, progress.best_nll, progress.best_step) == (None, None, STEPS)
    assert all(entry["val_nll"] is None for entry in log)


def stopped(folder: Path, model: GPT2LMHeadModel, train: Split, val: Split) -> str:
    """Train until it stops; check that no weight was changed."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(TrainingError) as caught:
        train_model(model, train, val, settings=SETTINGS, machine=MACHINE, workplace=folder)
    assert (caught.value.code, caught.value.exit_code) == ("train.nonfinite", 70)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name], rtol=0, atol=0, equal_nan=True)
    return str(caught.value)


def poisoned() -> GPT2LMHeadModel:
    """A model with no number at the last position, which no conversation of the toy data is long enough for."""
    model = start(0.0)
    with torch.no_grad():
        model.transformer.wpe.weight[-1] = math.nan
    return model


def at_the_last_position(given: Split, row: int) -> Split:
    positions = np.array(given.positions)
    positions[row, 3] = BLOCK - 1
    return replace(given, positions=positions)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_step_and_sequence(tmp_path: Path) -> None:
    row = int(Plan(ROWS, SETTINGS.sequences, SETTINGS.epochs, SETTINGS.seed).rows(0)[2])
    said = stopped(tmp_path, poisoned(), at_the_last_position(split(), row), split(0))
    assert said.startswith("error[train.nonfinite]: loss is nan, gradient norm is nan, weight transformer.wpe.weight")
    assert f"is not finite at step 1. sequences {row} of the training split." in said


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "grad_norm_squared", lambda *_: torch.tensor(math.inf))
    assert "gradient norm is inf at step 1" in stopped(tmp_path, start(0.0), split(), split(0))


def test_a_weight_that_an_update_ruins_is_in_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = run(tmp_path / "whole")
    step = torch.optim.AdamW.step
    done = []

    def ruin(optimizer: torch.optim.AdamW) -> None:
        step(optimizer)
        done.append(1)
        if len(done) == 5:
            optimizer.param_groups[0]["params"][0].data[0, 0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    every = replace(MACHINE, checkpoint_seconds=0.0)
    with pytest.raises(TrainingError, match=r"weight transformer\.wte\.weight is not finite at step 5"):
        run(tmp_path / "cut", machine=every)
    monkeypatch.undo()
    assert (tmp_path / "cut" / "checkpoints" / "LATEST").read_text() == "step-00000004\n"
    assert equal(run(tmp_path / "cut")[0], whole)


def test_a_validation_loss_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    said = stopped(tmp_path, poisoned(), split(), at_the_last_position(split(6), 4))
    assert "validation loss is nan after step 0" in said


def test_the_global_generator_is_given_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_trains_too(tmp_path: Path) -> None:
    weights, progress, _ = run(tmp_path, replace(SETTINGS, precision="bfloat16", epochs=10), dropout=0.0)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert progress.best_nll is not None
    assert progress.start_nll is not None
    assert progress.best_nll < progress.start_nll - 0.3


def test_weights_that_the_last_update_ruined_are_never_the_outcome(tmp_path: Path) -> None:
    """Without a validation split nothing else would look at them again."""
    ruinous = replace(SETTINGS, lr=1e38, warmup_ratio=0.0, epochs=1 / 3)
    with pytest.raises(TrainingError, match="not finite"):
        train_model(start(), split(), split(0), settings=ruinous, machine=MACHINE, workplace=tmp_path)


@pytest.mark.parametrize("frozen", [1, 2])
def test_what_is_frozen_stays_as_it_is_and_costs_no_state(tmp_path: Path, frozen: int) -> None:
    before = dict(deep().named_parameters())
    model = deep()
    freeze(model, frozen)
    val = split(6, seed=1)
    every = replace(MACHINE, checkpoint_seconds=0.0)
    train_model(model, split(), val, settings=SETTINGS, machine=every, workplace=tmp_path)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {
        name for name in before if name.startswith(("transformer.h.1", "transformer.ln_f")[frozen - 1 :])
    }
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None
    assert set(found.tensors["model"]) == set(found.tensors["best"]) == changed
    assert {name.partition("/")[2] for name in found.tensors["optimizer"]} == changed


def deep() -> GPT2LMHeadModel:
    model = build_start(scratch_spec(layers=2, heads=2, width=16, positions=BLOCK, vocab_size=VOCABULARY, seed=0))
    set_dropout(model, 0.1)
    return model


def test_a_run_with_frozen_blocks_killed_and_resumed_ends_the_same_to_the_bit(tmp_path: Path) -> None:
    ends = []
    for name, after in (("whole", None), ("cut", 4)):
        for left in (after, None):
            (tmp_path / name).mkdir(exist_ok=True)
            model = deep()
            freeze(model, 1)
            with listening(Killer(left or -1)), pytest.raises(Killed) if left else nullcontext():
                every = replace(MACHINE, checkpoint_seconds=0.0)
                train_model(model, split(), split(6), settings=SETTINGS, machine=every, workplace=tmp_path / name)
        ends.append({name: weight.detach() for name, weight in model.named_parameters()})
    assert equal(*ends)


def test_more_blocks_than_there_are_cannot_stay_as_they_are() -> None:
    with pytest.raises(ParameterError, match="3 blocks are to stay as they are, the model has 2") as caught:
        freeze(deep(), 3)
    assert caught.value.code == "param.freeze_layers"


def test_a_compiled_run_compiles_once_for_training_and_once_for_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def counting(graph: torch.fx.GraphModule, given: list[Tensor]) -> Any:
        compiled.append(len(given))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    plain, model = start(0.0), start(0.0)
    val = split(4, seed=1)
    (tmp_path / "plain").mkdir()
    (tmp_path / "compiled").mkdir()
    expected = train_model(plain, split(), val, settings=SETTINGS, machine=MACHINE, workplace=tmp_path / "plain")
    torch._dynamo.reset()
    machine = replace(MACHINE, compile=True)
    found = train_model(model, split(), val, settings=SETTINGS, machine=machine, workplace=tmp_path / "compiled")
    assert len(compiled) == 2  # batches of 3, 2 and 1 are of one shape
    assert found.best_nll == pytest.approx(expected.best_nll, rel=1e-5)
    assert found.supervised == expected.supervised
