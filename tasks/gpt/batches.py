"""Batches: which sequences an optimizer step trains on, and their tensors.

The order is a pure function of seed and step, so where a run stands in its data is one number: the step.

Legend: S sequences of a split, B of a batch, T tokens in a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]


class Batch(NamedTuple):
    """What the loss wants, in the order of its arguments: all (B, T)."""

    ids: Tensor  # int64
    mask: Tensor  # bool; in the computer's memory, as its places are looked up there without waiting for a GPU
    positions: Tensor  # int64
    ends: Tensor  # int64


@dataclass(frozen=True)
class Split:
    """The sequences of a split as they lie on disk: (S, T) arrays, usually memmaps, of any integer type.

    Attributes:
        fill: Batches of fewer sequences get empty ones up to so many: compiled code is for one shape. 0: none.
    """

    ids: Array
    mask: Array
    positions: Array
    ends: Array
    fill: int = field(default=0, kw_only=True)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sequence_length(self) -> int:
        """T, tokens in a sequence."""
        return int(self.ids.shape[1])

    def supervised(self, rows: Array | slice = slice(None)) -> int:
        """Count the tokens of some sequences that the loss is over; the first has nothing to be predicted from."""
        return int(np.count_nonzero(self.mask[rows, 1:]))

    def batch(self, rows: Array | slice, device: torch.device) -> Batch:
        """Copy some sequences to a device, all but the mask.

        That takes a millisecond for 8,192 tokens. No thread does it ahead: a GPU is still at the batch before, as
        nothing waits for it until the end of the step.
        """
        return Batch(
            _tensor(self.ids[rows], np.int64, self.fill, device),
            _tensor(self.mask[rows], np.bool_, self.fill, torch.device("cpu")),
            _tensor(self.positions[rows], np.int64, self.fill, device),
            _tensor(self.ends[rows], np.int64, self.fill, device),
        )

    def in_order(self, size: int, device: torch.device) -> Iterator[Batch]:
        """Yield the whole split, `size` sequences at once."""
        for first in range(0, len(self), size):
            yield self.batch(slice(first, first + size), device)


@dataclass(frozen=True)
class Plan:
    """Which sequences each optimizer step trains on.

    Every epoch goes through all sequences once, in an order of its own; its last step takes what is left.

    Attributes:
        count: S, sequences in the training split; at least one.
        size: Sequences of an optimizer step.
        epochs: How often to go through them; a fraction ends in the middle.
        seed: Of the order.
    """

    count: int
    size: int
    epochs: float
    seed: int

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.count / self.size)

    @property
    def total(self) -> int:
        """Steps of the run."""
        return max(1, round(self.epochs * self.per_epoch))

    def rows(self, step: int) -> Array:
        """Return the sequences of a step, counted from 0: at most `size` row numbers, int64."""
        epoch, place = divmod(step, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return order[place * self.size : (place + 1) * self.size]

    def evaluations(self, per_epoch: int) -> frozenset[int]:
        """Return after how many updates the validation split is evaluated: at 0, evenly in each epoch, at the end."""
        evenly = (round(k * self.per_epoch / per_epoch) for k in range(1, math.ceil(self.epochs * per_epoch) + 1))
        return frozenset({0, self.total, *(step for step in evenly if step < self.total)})


def _tensor(rows: Array, dtype: type[np.generic], fill: int, device: torch.device) -> Tensor:
    filled = rows.astype(dtype, order="C")  # a copy: memmaps are read-only, and torch has no arithmetic on uint16
    if len(filled) < fill:
        filled = np.pad(filled, ((0, fill - len(filled)), (0, 0)))  # ends of 0: tokens that see themselves alone
    tensor = torch.from_numpy(filled)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
