"""The average of weights: what it is, what a run does with it, and that a killed run loses nothing of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tasks.gpt.ema import WeightEma
from tasks.gpt.loss import token_nats
from tasks.progress import listening
from tests.gpt.test_loop import CPU, MACHINE, SETTINGS, STEPS, Killed, Killer, equal, run, split, start

EMA = replace(SETTINGS, ema_decay=0.5)


def averages(ema: WeightEma, weight: nn.Parameter, values: list[float], first: int = 1) -> list[float]:
    """Return the average after each of some updates."""
    averaged = []
    for step, value in enumerate(values, first):
        weight.data = torch.full((2,), value)
        ema.update(step)
        with ema.swapped_in():
            averaged.append(weight.data[0].item())
        assert weight.data.tolist() == [value] * 2
    return averaged


def test_the_average_follows_every_update_faster_in_the_beginning() -> None:
    weight = nn.Parameter(torch.zeros(2))
    shares = [1 - min(0.25, (1 + step) / (10 + step)) for step in (1, 2, 3)]
    expected, mean = [], 0.0
    for share, value in zip(shares, (1.0, 5.0, 2.0), strict=True):
        mean += share * (value - mean)
        expected.append(mean)
    assert averages(WeightEma({"w": weight}, 0.25), weight, [1.0, 5.0, 2.0]) == pytest.approx(expected)
    assert shares[0] == 1 - 2 / 11


def test_without_a_decay_the_weights_stand_for_themselves() -> None:
    weight = nn.Parameter(torch.zeros(2))
    ema = WeightEma({"w": weight}, None)
    assert averages(ema, weight, [1.0, 5.0]) == [1.0, 5.0]
    assert not ema.average


def test_a_saved_average_goes_on_to_the_bit() -> None:
    weight = nn.Parameter(torch.zeros(2))
    whole, resumed = (WeightEma({"w": weight}, 0.9) for _ in range(2))
    averages(whole, weight, [0.5, 0.75])
    resumed.load({name: tensor.clone() for name, tensor in whole.average.items()})
    assert averages(whole, weight, [0.875], first=3) == averages(resumed, weight, [0.875], first=3)


def test_training_goes_the_same_way_but_its_average_is_measured_and_kept(tmp_path: Path) -> None:
    _, _, plain = run(tmp_path / "plain")
    weights, progress, log = run(tmp_path / "averaged", EMA)
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
def test_killed_after_any_step_and_resumed_it_ends_the_same_to_the_bit(
    tmp_path: Path, after: int, validated: int
) -> None:
    val = split(validated, seed=1)
    whole, told, log = run(tmp_path / "whole", EMA, val=val)
    with listening(Killer(after)), pytest.raises(Killed):
        run(tmp_path / "cut", EMA, replace(MACHINE, checkpoint_seconds=0.0), val=val)
    resumed, progress, resumed_log = run(tmp_path / "cut", EMA, val=val)
    assert equal(resumed, whole)
    assert (progress, resumed_log) == (told, log)


def test_without_a_validation_split_the_average_is_the_outcome(tmp_path: Path) -> None:
    plain, averaged = (run(tmp_path / str(s.ema_decay), s, val=split(0))[0] for s in (SETTINGS, EMA))
    assert not equal(plain, averaged)
