"""Averages of the weights along a run: measured, kept as the best and exported in place of the last weights.

    none    there is no average: the weights stand for themselves
    ema     a decaying mean follows every update
    last    a plain mean over the weights at the last few evaluations

Training itself goes on from the last weights, so it is the same whichever average is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Weights = Mapping[str, nn.Parameter]


class Average:
    """No average: the weights stand for themselves. The others are made of this one.

    Args:
        weights: Those that are trained, by name, as they stand before the first update.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def follow(self, step: int) -> None:
        """Take note of an update, the `step`th."""

    def note(self, step: int) -> None:
        """Take note of an evaluation after `step` updates; a second time, it changes nothing."""

    def mean(self) -> dict[str, Tensor]:
        """Return the average of each weight; empty where there is none."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold."""
        return {}

    def set_state(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""

    @contextmanager
    def standing_in(self, step: int) -> Iterator[None]:
        """Let the average stand in for the weights inside the block, which evaluates after `step` updates."""
        self.note(step)
        found = self.mean()
        held = {name: self.weights[name].data for name in found}
        self._put(found)
        try:
            yield
        finally:
            for name, data in held.items():
                self.weights[name].data = data

    def take_over(self) -> None:
        """Put the average in the place of the weights; what was there is not written over."""
        self._put(self.mean())

    def _put(self, found: Mapping[str, Tensor]) -> None:
        for name, weight in found.items():
            self.weights[name].data = weight.to(self.weights[name].device)


class Decaying(Average):
    """An exponential moving average; in a run's beginning it forgets faster, or it would be of the start for long.

    Source of the beginning: TensorFlow's ExponentialMovingAverage with `num_updates`.
    """

    def __init__(self, weights: Weights, decay: float) -> None:
        super().__init__(weights)
        self.decay, self.kept = decay, {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move towards the weights."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.kept.values()), list(self.weights.values()), share)

    def mean(self) -> dict[str, Tensor]:
        """Return the average of each weight."""
        return self.kept

    def state(self) -> dict[str, Tensor]:
        """Return the average."""
        return self.kept

    def set_state(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from an average."""
        for name, kept in self.kept.items():
            kept.copy_(saved[name])


class Last(Average):
    """The mean of the weights at the last evaluations, the start aside; they are held in the CPU's memory."""

    def __init__(self, weights: Weights, count: int) -> None:
        super().__init__(weights)
        self.count, self.kept = count, dict[int, dict[str, Tensor]]()

    def note(self, step: int) -> None:
        """Keep the weights, and let go of those that are too old."""
        if step == 0:
            return
        for old in sorted({*self.kept, step})[: -self.count]:
            self.kept.pop(old, None)
        self.kept[step] = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights.items()}

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of each weight over what is kept."""
        if not self.kept:
            return {}
        kept = [self.kept[step] for step in sorted(self.kept)]
        return {name: sum((one[name] for one in kept[1:]), start=kept[0][name]) / len(kept) for name in self.weights}

    def state(self) -> dict[str, Tensor]:
        """Return what is kept, by step and name: `00000120/transformer.wte.weight`."""
        return {f"{step:08}/{name}": weight for step, kept in self.kept.items() for name, weight in kept.items()}

    def set_state(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what was kept."""
        self.kept = {}
        for key, weight in saved.items():
            step, _, name = key.partition("/")
            self.kept.setdefault(int(step), {})[name] = weight.to("cpu")


def average_of(weights: Weights, kind: str, decay: float, count: int) -> Average:
    """Return the average of that kind: none, ema or last."""
    if kind == "ema":
        return Decaying(weights, decay)
    return Last(weights, count) if kind == "last" else Average(weights)


def copies(kind: str, count: int, on_cpu: bool) -> int:
    """Return how many times the weights are held for an average at most, where they are trained."""
    return {"none": 0, "ema": 1, "last": 1 + count * on_cpu}[kind]
