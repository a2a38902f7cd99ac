"""Preferences: how likely a model finds each reply, and the loss that makes better ones likelier than worse ones.

Direct preference optimisation: of two replies to one prompt, with log-probabilities p under the model and r under the
model that it started from, the loss is -log sigmoid(beta ((p - r of the better) - (p - r of the worse))).

Legend: B sequences, T tokens in a sequence, N supervised tokens, R replies, P pairs.

Source: Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel

from tasks.gpt.batches import Array, Batch, Split
from tasks.gpt.distributed import SINGLE, ProcessGroup
from tasks.gpt.forward import Trunk, hidden_states
from tasks.gpt.loss import predictors
from tasks.gpt.memory_model import CHUNK
from tasks.progress import track

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Replies:
    """Where the replies of a split lie, by sequence and start, and which are better than which.

    Attributes:
        sequence: (R,) sequence of the split.
        trained: (R,) supervised tokens.
        group: (R,) replies of one number answer one prompt, in one sequence.
        rank: (R,) 0 = best.
    """

    sequence: Ints
    trained: Ints
    group: Ints
    rank: Ints

    def of(self, rows: Ints) -> Ints:
        """Return the numbers of the replies of some sequences, in the order of those: a batch has them so."""
        low, high = np.searchsorted(self.sequence, [rows, rows + 1])
        return np.concatenate([np.arange(*pair) for pair in zip(low, high, strict=True)]) if len(rows) else low

    def pairs(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Return all pairs of a better and a worse reply among some, as places in `numbers`: two of (P,)."""
        better, worse = [], []
        group, rank = self.group[numbers], self.rank[numbers]
        for number in np.unique(group):
            places = np.flatnonzero(group == number)
            above = rank[places][:, None] < rank[places][None, :]
            first, second = np.nonzero(above)
            better.append(places[first])
            worse.append(places[second])
        nobody = np.zeros(0, np.int64)
        return np.concatenate([nobody, *better]), np.concatenate([nobody, *worse])


def reply_logps(
    model: GPT2LMHeadModel, batch: Batch, trained: Ints, *, chunk: int = CHUNK, trunk: Trunk = hidden_states
) -> Tensor:
    """Return how likely the model finds each reply of a batch, given all that is above it.

    Args:
        model: The model; its mode is the caller's business.
        batch: Sequences whose supervised tokens are those of the replies, and no others.
        trained: (R,) supervised tokens of each reply, in the order of the batch.
        chunk: Rows that reach the head at once; the backward pass computes their logits again.
        trunk: `hidden_states`, or what was compiled of it.

    Returns:
        (R,) float32 nats, summed over the reply's tokens; at most 0.
    """
    hidden, targets, weight = predictors(model, *batch, trunk)  # (N, D), (N,), (V, D)
    parts = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    nats = torch.cat([checkpoint(_nats, rows, weight, wanted, use_reentrant=False) for rows, wanted in parts])  # (N,)
    sizes = torch.from_numpy(trained).to(nats.device)  # (R,)
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=nats.device), sizes)  # (N,)
    return -torch.zeros(len(sizes), device=nats.device).index_add(0, owner, nats)


@torch.no_grad()
def all_logps(
    model: GPT2LMHeadModel,
    split: Split,
    replies: Replies,
    at_once: int,
    device: torch.device,
    *,
    half: bool = False,
    label: str = "score",
) -> Floats:
    """Return how likely the model finds each reply of a split: (R,) nats, by sequence and start.

    `half`: products in bfloat16; `label`: name of the progress bar.
    """
    model.eval()
    parts = [np.zeros(0, np.float32)]
    for first in track(range(0, len(split), at_once), label, -(-len(split) // at_once), "batches"):
        rows = np.arange(first, min(first + at_once, len(split)))
        numbers = replies.of(rows)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            logps = reply_logps(model, split.batch(rows, device), replies.trained[numbers])
        parts.append(logps.float().cpu().numpy())
    return np.concatenate(parts)


def _nats(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (rows @ weight.T).float()  # (C, V)
    return logits.logsumexp(dim=1) - logits.gather(1, targets[:, None]).squeeze(1)  # (C,)


class PairComparison(NamedTuple):
    """What a model makes of pairs; each (P,).

    Attributes:
        loss: Of the pair, nats.
        margin: beta times how much more the better reply has gained on the start than the worse one; over 0 is right.
        chosen: Log-probability of the better reply, nats: where it falls, the model unlearns to speak.
    """

    loss: Tensor
    margin: Tensor
    chosen: Tensor


def compare_pairs(logps: Tensor, reference: Tensor, better: Tensor, worse: Tensor, beta: float) -> PairComparison:
    """Compare pairs of replies.

    Args:
        logps: (R,) under the model.
        reference: (R,) under the model that it started from.
        better: (P,) int64, which replies are the better ones of the pairs.
        worse: (P,) int64.
        beta: How hard the model is held to its start; larger is harder.
    """
    gained = logps - reference  # (R,)
    margin = beta * (gained[better] - gained[worse])
    return PairComparison(-logsigmoid(margin), margin, logps[better])


@dataclass(frozen=True)
class Side:
    """A split of preference groups, and what the model that is started from makes of its replies.

    Attributes:
        sequences: The split.
        replies: Its replies.
        reference: (R,) log-probability of each under the start, nats.
    """

    sequences: Split
    replies: Replies
    reference: Floats

    def compare(
        self, model: GPT2LMHeadModel, rows: Ints, beta: float, device: torch.device, trunk: Trunk = hidden_states
    ) -> PairComparison:
        """Compare all pairs of some sequences."""
        numbers = self.replies.of(rows)
        better, worse = (torch.from_numpy(side).to(device) for side in self.replies.pairs(numbers))
        reference = torch.from_numpy(self.reference[numbers]).to(device)
        trained = self.replies.trained[numbers]
        logps = reply_logps(model, self.sequences.batch(rows, device), trained, trunk=trunk)
        return compare_pairs(logps, reference, better, worse, beta)


@dataclass(frozen=True)
class EachPair:
    """The loss of each pair of a better and a worse reply, nats: an `Objective` whose units are pairs.

    Attributes:
        fitted: PreferenceGroups that are trained on.
        held: PreferenceGroups that choose the best weights.
        beta: How hard the model is held to its start.
    """

    fitted: Side
    held: Side
    beta: float

    @property
    def train(self) -> Split:
        """The sequences that are trained on."""
        return self.fitted.sequences

    @property
    def val(self) -> Split:
        """Those that choose the best weights."""
        return self.held.sequences

    def units(self, rows: Array) -> int:
        """Count the pairs of some training sequences."""
        replies = self.fitted.replies
        return len(replies.pairs(replies.of(rows))[0])

    def weight(self, rows: Array) -> float:
        """Count them again: each weighs 1."""
        return self.units(rows)

    def loss(self, model: GPT2LMHeadModel, rows: Array, share: float, device: torch.device, trunk: Trunk) -> Tensor:
        """Return the summed loss of the pairs of some training sequences, times `share`."""
        return self.fitted.compare(model, rows, self.beta, device, trunk).loss.sum() * share

    def filled(self, size: int) -> EachPair:
        """Return the same over batches that are filled up to so many sequences, with empty ones."""
        fitted, held = (
            replace(side, sequences=replace(side.sequences, fill=size)) for side in (self.fitted, self.held)
        )
        return replace(self, fitted=fitted, held=held)

    @torch.no_grad()
    def measure(
        self, model: GPT2LMHeadModel, at_once: int, device: torch.device, trunk: Trunk, world: ProcessGroup = SINGLE
    ) -> dict[str, float] | None:
        """Return means over the validation pairs: loss, share told right, margin, log-probability of the better."""
        names = ("val_nll", "accuracy", "margin", "chosen", "count")
        sums = torch.zeros(len(names), dtype=torch.float64)
        for rows, count in world.shard(np.arange(len(self.val)), at_once):
            comparison = self.held.compare(model, rows, self.beta, device, trunk)
            ones = torch.ones_like(comparison.loss)
            right = (comparison.margin.sign() + ones) / 2  # a tie, as all pairs are at the start, is half right
            parts = (comparison.loss, right, comparison.margin, comparison.chosen, ones)
            sums += torch.stack([part.sum().cpu().double() for part in parts]) * count
        *totals, pairs = world.sum(sums).tolist()
        return {name: total / pairs for name, total in zip(names, totals, strict=False)} if pairs else None
