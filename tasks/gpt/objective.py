"""Objectives: what a run makes small, as a mean over units: supervised tokens here, pairs of replies elsewhere.

Legend: S sequences of a split, B of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from tasks.gpt.batches import Array, Split
from tasks.gpt.distributed import SINGLE, ProcessGroup
from tasks.gpt.forward import Trunk
from tasks.gpt.loss import supervised_nats, token_nats
from tasks.gpt.loss_weights import LossWeights


class Objective(Protocol):
    """A sum over the units of some sequences, and its mean over the validation split.

    Attributes:
        train: The sequences that are trained on.
        val: Those that choose the best weights; may be empty.
    """

    @property
    def train(self) -> Split:
        """The sequences that are trained on."""

    @property
    def val(self) -> Split:
        """Those that choose the best weights; may be empty."""

    def units(self, rows: Array) -> int:
        """Count the units of some training sequences."""

    def weight(self, rows: Array) -> float:
        """Return what the units of some training sequences weigh together: their mean is over that."""

    def loss(self, model: GPT2LMHeadModel, rows: Array, share: float, device: torch.device, trunk: Trunk) -> Tensor:
        """Return the loss of some training sequences, summed over units, times `share`; ready for `backward`."""

    def filled(self, size: int) -> Objective:
        """Return the same over batches that are filled up to so many sequences, with empty ones."""

    def measure(
        self, model: GPT2LMHeadModel, at_once: int, device: torch.device, trunk: Trunk, world: ProcessGroup = SINGLE
    ) -> dict[str, float] | None:
        """Measure the validation split; `val_nll` is what the best weights have least of. None: there are no units.

        Each rank measures its share; what is returned is the same on all of them.
        """


@dataclass(frozen=True)
class EachToken:
    """The negative log-likelihood of each supervised token, nats.

    Attributes:
        train: The sequences that are trained on.
        val: Those that choose the best weights; may be empty.
        worth: What the tokens of `train` weigh. None: 1. Those of `val` always weigh 1, so that runs can be compared.
    """

    train: Split
    val: Split
    worth: LossWeights | None = None

    def units(self, rows: Array) -> int:
        """Count the supervised tokens of some training sequences."""
        return self.train.supervised(rows)

    def weight(self, rows: Array) -> float:
        """Return what these weigh together."""
        return self.units(rows) if self.worth is None else self.worth.total(rows)

    def loss(self, model: GPT2LMHeadModel, rows: Array, share: float, device: torch.device, trunk: Trunk) -> Tensor:
        """Return the summed loss of some training sequences, times `share`."""
        batch, weights = self.train.batch(rows, device), None
        if self.worth is not None:
            weights = torch.from_numpy(self.worth.spread(rows, batch.ids.shape)).to(device)
        return supervised_nats(model, *batch, weights=weights, share=share, trunk=trunk)

    def filled(self, size: int) -> EachToken:
        """Return the same over filled batches."""
        return replace(self, train=replace(self.train, fill=size), val=replace(self.val, fill=size))

    @torch.no_grad()
    def measure(
        self, model: GPT2LMHeadModel, at_once: int, device: torch.device, trunk: Trunk, world: ProcessGroup = SINGLE
    ) -> dict[str, float] | None:
        """Return the mean loss of the validation split's supervised tokens."""
        supervised = self.val.supervised() if len(self.val) else 0
        if not supervised:
            return None
        total = torch.zeros((), dtype=torch.float64)
        for rows, count in world.shard(np.arange(len(self.val)), at_once):
            total += token_nats(model, *self.val.batch(rows, device), trunk=trunk).cpu().double().sum() * count
        return {"val_nll": world.sum(total).item() / supervised}
