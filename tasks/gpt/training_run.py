"""A training run in three records: what decides its outcome, where it runs, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tasks.gpt.distributed import SINGLE, ProcessGroup
from tasks.gpt.interrupt import Interrupt


@dataclass(frozen=True)
class Settings:
    """What decides the outcome.

    Attributes:
        seed: Of the data's order and of dropout.
        epochs: How often to go through the data.
        sequences: Of an optimizer step.
        lr: Highest learning rate.
        min_lr_ratio: Learning rate of the last step as a share of the highest.
        warmup_ratio: Share of the steps that lead up to the highest.
        weight_decay: On matrices.
        max_grad_norm: Longest gradient; a longer one is shortened to it. None: as it is.
        evals_per_epoch: Evaluations of the validation split in an epoch.
        patience: Evaluations without a better loss after which the run ends. None: it goes on.
        ema_decay: Decay per update of the average that is measured and kept. None: the weights are.
        precision: float32, or bfloat16 in products with weights and sums in float32.
    """

    seed: int
    epochs: float
    sequences: int
    lr: float
    min_lr_ratio: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float | None
    evals_per_epoch: int
    patience: int | None
    precision: str
    ema_decay: float | None = None


def _numbers(rows: Sequence[int]) -> str:
    """Name sequences by their numbers: the 16 first ones."""
    return f"sequences {', '.join(map(str, rows[:16]))}{', ...' if len(rows) > 16 else ''} of the training split"


@dataclass(frozen=True)
class Machine:
    """Where it runs, and how fast: never the outcome, but for rounding and the draws of dropout.

    Attributes:
        device: Holds weights and batches.
        clock: Seconds since whenever.
        micro_batch: Sequences at once. None: as many as hold 8,192 tokens.
        compile: Compile the transformer's blocks.
        activation_checkpointing: Keep only what enters each block, and compute the block again on the way back.
        checkpoint_seconds: Between two checkpoints, more where saving is slow; 0: after each step.
        interrupt: Asked to stop, the run saves a checkpoint and raises `Interrupted`.
        world: Who else does the same run.
        sharded: Leave a part of the model on each of its ranks, in place of a copy.
        named: Says where training sequences, given by row, come from: for errors.
    """

    device: torch.device
    clock: Callable[[], float]
    micro_batch: int | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    checkpoint_seconds: float = 120.0
    interrupt: Interrupt = field(default_factory=Interrupt)
    world: ProcessGroup = SINGLE
    sharded: bool = False
    named: Callable[[Sequence[int]], str] = _numbers


@dataclass
class Progress:
    """How far a run is, and how good.

    Attributes:
        step: Updates done.
        tokens: Tokens gone through, padding included.
        supervised: Of them, those that the loss was over.
        seconds: Spent, evaluation included, over all tries.
        start_nll: Validation loss before the first update, nats per token; None without a validation split.
        best_nll: Lowest validation loss so far.
        best_step: When that was; without a validation split, the last update.
        waited: Evaluations since.
    """

    step: int = 0
    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0
    start_nll: float | None = None
    best_nll: float | None = None
    best_step: int = 0
    waited: int = 0
