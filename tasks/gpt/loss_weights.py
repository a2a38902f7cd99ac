"""Per-reply loss weights, for splits whose replies do not all weigh the same.

A reply weighs `decay ** rank`; where the replies to one prompt share, these are scaled to sum to 1 for each prompt.
So a prompt with five replies can count as one with a single reply, and better replies more than worse ones.

Legend: M messages that are trained, in the order of the index; S sequences of a split; B of a batch, T tokens in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

UNRANKED = -1
# Of a weight: decay ** rank would be 0 in float32 somewhere, and a reply that weighs nothing is not trained.
LEAST = 1e-6


def weights_of(prompt: Ints, rank: Ints, decay: float, shared: bool) -> Floats:
    """Return what trained replies weigh.

    A reply that nobody ranked weighs as much as the best: there is nothing to hold against it. A reply that several
    sequences train (as in paths) stands here as often, and where replies share, its copies do, too.

    Args:
        prompt: (M,) replies of one number answer one prompt, in whatever sequences they are.
        rank: (M,) 0 = best, `UNRANKED` where there is none.
        decay: What a rank weighs against the one above it, 0..1, not 0.
        shared: Whether all replies to a prompt weigh 1 together.

    Returns:
        (M,) float32, over 0, at most 1.
    """
    weight = np.maximum(decay ** np.maximum(rank, 0).astype(np.float64), LEAST)
    if shared:
        _, group = np.unique(prompt, return_inverse=True)
        weight /= np.bincount(group, weight)[group]
    return weight.astype(np.float32)


@dataclass(frozen=True)
class LossWeights:
    """What the trained messages of a split weigh, and where they lie, by sequence and start.

    Attributes:
        sequence: (M,) sequence of the split.
        start: (M,) first token of the message in it.
        stop: (M,) one past its last.
        trained: (M,) supervised tokens in the range.
        weight: (M,) of each of these tokens in the loss; over 0.
    """

    sequence: Ints
    start: Ints
    stop: Ints
    trained: Ints
    weight: Floats

    @cached_property
    def _sums(self) -> NDArray[np.float64]:
        """(S,) what the supervised tokens of each sequence weigh together; the last ones may be left out."""
        sums = np.bincount(self.sequence, self.trained * self.weight.astype(np.float64))
        return np.asarray(sums, np.float64)

    def total(self, rows: Ints) -> float:
        """Return what the supervised tokens of some sequences weigh together."""
        return float(self._sums[rows[rows < len(self._sums)]].sum())

    def spread(self, rows: Ints, shape: tuple[int, ...]) -> Floats:
        """Return what each token of some sequences weighs, in a batch of at least so many: (B, T), elsewhere 0."""
        weights = np.zeros(shape, np.float32)
        low, high = np.searchsorted(self.sequence, [rows, rows + 1])
        for row, (first, last) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            for message in range(first, last):
                weights[row, self.start[message] : self.stop[message]] = self.weight[message]
        return weights
