"""The plan of a run before it starts: how many sequences at once, what memory and time that takes, what to lower."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from transformers import GPT2LMHeadModel

from tasks.errors import TrainingError
from tasks.gpt import need
from tasks.gpt.batches import Plan, Split
from tasks.gpt.device import free_memory, product_rate
from tasks.gpt.loss import supervised_nats
from tasks.gpt.run import Machine, Settings
from tasks.gpt.weights import parameter_count
from tasks.gpt.world import ALONE, World

log = logging.getLogger("treeline.train")
BRIEF = 1.0  # seconds of a micro-batch by the formula, below which one is tried
_SHORT = re.compile("out of memory|can't allocate|not enough memory", re.IGNORECASE)


def planned(
    model: GPT2LMHeadModel,
    splits: Sequence[Split],
    settings: Settings,
    device: torch.device,
    asked: int | Literal["auto"] | None,
    clock: Callable[[], float],
    world: World = ALONE,
) -> int:
    """Return the sequences to take at once; say what the run needs, and warn where that is not there.

    Args:
        model: With its dropout set.
        splits: To train and to validate on.
        settings: Of the run.
        device: Where it will run.
        clock: Seconds since whenever.
        asked: So many; None: as many as hold 8,192 tokens; auto: of these, as many as fit.
        world: Who shares the work; what one of them has memory for, all take.
    """
    (train, val), config = splits, model.config
    half = settings.precision == "bfloat16"
    shape = need.Shape(
        config.n_layer,
        config.n_head,
        config.n_embd,
        config.vocab_size,
        parameter_count(model),
        train.block,
        dropout=config.attn_pdrop > 0,
        half=half,
        keeps_best=bool(len(val)),
    )
    free = free_memory(device)
    auto = need.largest_micro_batch(shape, free or 1 << 62, settings.sequences)
    most = max(1, min(settings.sequences, need.AT_ONCE // train.block))
    size = auto if asked == "auto" else min(asked or most, settings.sequences)
    plan = Plan(len(train), settings.sequences, settings.epochs, settings.seed)
    evaluated = len(plan.evaluations(settings.evals_per_epoch)) * len(val) * train.block
    supervised = train.supervised() / max(1, len(train) * train.block)
    tokens = settings.epochs * len(train) * train.block
    rate = product_rate(device, half, clock)
    took = need.seconds(shape, tokens, evaluated, supervised, rate)
    formula = need.seconds(shape, size * train.block, 0, supervised, rate)
    if formula < BRIEF:  # then calls cost more than their work, which no formula knows
        took *= max(1.0, _timed(model, train, size, half, device, clock) / formula)
    took /= world.size
    if world.first:
        log.info("train.plan: %s", need.said(shape, size, free, took))
    if free is not None and need.memory(shape, size) > free:
        log.warning("train.plan: that is more than is free; set train.micro_batch to auto, or lower encode.block")
    return world.least(size)


def _timed(
    model: GPT2LMHeadModel, train: Split, size: int, half: bool, device: torch.device, clock: Callable[[], float]
) -> float:
    """Return the seconds of one micro-batch forth and back, the second of two; the model is as it was."""
    model.to(device).train()
    batch, took = train.batch(slice(0, size), device), 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for _ in range(2):
            began = clock()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                loss = supervised_nats(model, *batch, share=1 / max(1, int(batch.mask.sum())))
            loss.backward()  # type: ignore[no-untyped-call]
            loss.item()  # waits for the device
            took = clock() - began
    model.zero_grad()
    return took * size / len(batch.ids)


@contextmanager
def memory_named(machine: Machine, block: int) -> Iterator[None]:
    """Turn running out of memory into an error that names what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _SHORT.search(str(error)):
            raise
        told = f"{machine.micro_batch} sequences of {block:,} tokens at once"
        do = "Set train.micro_batch to auto, or to less; at 1, lower encode.pack or block, or take a smaller model"
        raise TrainingError(f"out of memory with {told}", str(machine.device), do, "train.memory") from error
