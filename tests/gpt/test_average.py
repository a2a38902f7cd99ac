"""Averages of weights: what they are, what a run does with them, and that a killed run loses nothing of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tasks.gpt.average import Average, Decaying, Last, average_of
from tasks.gpt.loss import token_nats
from tasks.gpt.run import Settings
from tasks.progress import listening
from tests.gpt.test_loop import CPU, MACHINE, SETTINGS, STEPS, Killed, Killer, equal, run, split, start

EMA = replace(SETTINGS, average="ema", average_decay=0.5)
LAST = replace(SETTINGS, average="last", average_count=2)


def moving(average: Average, weight: nn.Parameter, values: list[float]) -> list[float]:
    """Return the average after each of some updates, each of which is evaluated."""
    found = []
    for step, value in enumerate(values, 1):
        weight.data = torch.full((2,), value)
        average.follow(step)
        with average.standing_in(step):
            found.append(weight.data[0].item())
        assert weight.data.tolist() == [value] * 2
    return found


def test_a_decaying_mean_follows_every_update_faster_in_the_beginning() -> None:
    weight = nn.Parameter(torch.zeros(2))
    shares = [1 - min(0.25, (1 + step) / (10 + step)) for step in (1, 2, 3)]
    expected, mean = [], 0.0
    for share, value in zip(shares, (1.0, 5.0, 2.0), strict=True):
        mean += share * (value - mean)
        expected.append(mean)
    assert moving(Decaying({"w": weight}, 0.25), weight, [1.0, 5.0, 2.0]) == pytest.approx(expected)
    assert shares[0] == 1 - 2 / 11


def test_the_mean_of_the_last_is_over_so_many_evaluations_and_not_the_start() -> None:
    weight = nn.Parameter(torch.full((2,), 100.0))
    average = Last({"w": weight}, 2)
    with average.standing_in(0):
        assert weight.data[0] == 100.0
    assert moving(average, weight, [1.0, 5.0, 2.0]) == [1.0, 3.0, 3.5]
    average.note(3)  # again, as after an evaluation that was interrupted
    assert average.mean()["w"].tolist() == [3.5, 3.5]


@pytest.mark.parametrize("kind", ["none", "ema", "last"])
def test_an_average_given_its_state_goes_on_to_the_bit(kind: str) -> None:
    weight = nn.Parameter(torch.zeros(2))
    whole, cut = (average_of({"w": weight}, kind, 0.9, 3) for _ in range(2))
    moving(whole, weight, [0.5, 0.75])
    cut.set_state({name: tensor.clone() for name, tensor in whole.state().items()})
    weight.data = torch.full((2,), 0.9)
    for average in (whole, cut):
        average.follow(3)
        average.note(3)
    assert [*map(torch.Tensor.tolist, whole.mean().values())] == [*map(torch.Tensor.tolist, cut.mean().values())]


@pytest.mark.parametrize("settings", [EMA, LAST], ids=["ema", "last"])
def test_training_goes_the_same_way_but_its_average_is_measured_and_kept(tmp_path: Path, settings: Settings) -> None:
    _, _, plain = run(tmp_path / "plain")
    weights, progress, log = run(tmp_path / "averaged", settings)
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in plain]
    assert [entry["val_nll"] for entry in log] != [entry["val_nll"] for entry in plain]
    model, val = start().eval(), split(6, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
    found = token_nats(model, *val.batch(slice(0, 6), CPU)).mean().item()
    assert found == pytest.approx(progress.best_nll, rel=1e-5)


@pytest.mark.parametrize("validated", [6, 0])
@pytest.mark.parametrize("after", range(1, STEPS))
@pytest.mark.parametrize("settings", [EMA, LAST], ids=["ema", "last"])
def test_killed_after_any_step_and_resumed_it_ends_the_same_to_the_bit(
    tmp_path: Path, settings: Settings, after: int, validated: int
) -> None:
    val = split(validated, seed=1)
    whole, told, log = run(tmp_path / "whole", settings, val=val)
    with listening(Killer(after)), pytest.raises(Killed):
        run(tmp_path / "cut", settings, replace(MACHINE, checkpoint_seconds=0.0), val=val)
    resumed, progress, resumed_log = run(tmp_path / "cut", settings, val=val)
    assert equal(resumed, whole)
    assert (progress, resumed_log) == (told, log)


def test_without_a_validation_split_the_average_is_the_outcome(tmp_path: Path) -> None:
    plain, averaged = (run(tmp_path / s.average, s, val=split(0))[0] for s in (SETTINGS, EMA))
    assert not equal(plain, averaged)
