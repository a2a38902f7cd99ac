"""An exponential moving average of the weights: measured, kept as the best and exported in place of the weights.

Training itself goes on from the weights, so it is the same with and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightEma:
    """The average of some weights. Early in a run it forgets faster, or it would resemble the start for long.

    Source of the warm-up: TensorFlow's ExponentialMovingAverage with `num_updates`.

    Args:
        weights: The trained weights, by name, before the first update.
        decay: Per update. None: there is no average, and the weights stand for themselves.

    Attributes:
        average: By name; empty without a decay. This is what a checkpoint must hold.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float | None) -> None:
        self.weights, self.decay = weights, decay or 0.0
        clones = {name: weight.detach().clone() for name, weight in weights.items()} if decay is not None else {}
        self.average: dict[str, Tensor] = clones

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights, after `step` updates of them."""
        if self.average:
            share = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), share)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the average in the place of the weights, inside the block."""
        trained = {name: self.weights[name].data for name in self.average}
        self.swap_in()
        try:
            yield
        finally:
            for name, data in trained.items():
                self.weights[name].data = data

    def swap_in(self) -> None:
        """Put the average in the place of the weights."""
        for name, average in self.average.items():
            self.weights[name].data = average

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Set the average to one that was saved."""
        for name, average in self.average.items():
            average.copy_(saved[name])
