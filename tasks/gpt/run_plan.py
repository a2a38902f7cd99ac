"""The plan of a run before it starts: how many sequences at once, what memory and time that takes, what to lower."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Literal

import torch
from transformers import GPT2LMHeadModel

from tasks.errors import TrainingError
from tasks.gpt import memory_model
from tasks.gpt.attention import way_set
from tasks.gpt.batches import Plan, Split
from tasks.gpt.device import free_memory, product_rate
from tasks.gpt.distributed import SINGLE, ProcessGroup
from tasks.gpt.forward import Trunk, hidden_states, recomputing
from tasks.gpt.loss import supervised_nats
from tasks.gpt.training_run import Machine, Settings
from tasks.gpt.weights import parameter_count, trainable_parameters

log = logging.getLogger("treeline.train")
LESS = "lower encode.sequence_length or encode.context_length, or take a smaller model"
HALF = "bfloat16"
BRIEF = 1.0  # seconds of a micro-batch by the formula, below which one is tried
_SHORT = re.compile("out of memory|can't allocate|not enough memory", re.IGNORECASE)


def planned(
    model: GPT2LMHeadModel,
    splits: Sequence[Split],
    settings: Settings,
    device: torch.device,
    micro_batch: int | Literal["auto"] | None,
    clock: Callable[[], float],
    activation_checkpointing: bool | Literal["auto"] = False,
    world: ProcessGroup = SINGLE,
    sharded: bool = False,
) -> tuple[int, bool]:
    """Return the sequences to take at once, and whether to compute blocks again on the way back.

    Logs what the run needs, with a warning if that is not available.

    Args:
        model: With its dropout set.
        splits: To train and to validate on.
        settings: Of the run.
        device: Where it will run.
        clock: Seconds since whenever.
        micro_batch: So many; None: as many as hold 8,192 tokens; auto: of these, as many as fit.
        activation_checkpointing: auto: only where what is asked, or for auto a single sequence, does not fit without.
        world: Who shares the work; what one of them has memory for, all take.
        sharded: Whether each of them is to hold a part of the model.
    """
    world.heartbeat()
    shape = _shape(model, splits, settings, device, world.size if sharded else 1)
    free = free_memory(device)
    if free is not None and device.type == "cpu":
        free //= world.local_size  # who all take from the same memory
    share = math.ceil(settings.sequences / world.size)  # more at once would be rows that count as nothing
    size, shape = _fitted(shape, free or 1 << 62, share, micro_batch, activation_checkpointing)
    took = _seconds(model, splits, settings, device, clock, shape, size) / world.size
    world.heartbeat()
    if world.is_main:
        log.info("train.plan: %s", memory_model.plan_summary(shape, size, free, took))
    if free is not None and memory_model.memory(shape, size) > free:
        log.warning("train.plan: that is more than is free; set runtime.micro_batch to auto, or %s", LESS)
    return world.min(size), world.any(shape.activation_checkpointing)


def _shape(
    model: GPT2LMHeadModel, splits: Sequence[Split], settings: Settings, device: torch.device, parts: int
) -> memory_model.ModelShape:
    """Return the model's shape, and how it is trained; with many parts, each rank is to hold one."""
    (train, val), config = splits, model.config
    there = next(model.parameters()).device.type == device.type
    masked = config.attn_pdrop or way_set(model) == "sdpa"
    return memory_model.ModelShape(
        config.n_layer,
        config.n_head,
        config.n_embd,
        config.vocab_size,
        sum(weight.numel() for weight in trainable_parameters(model).values()),
        train.sequence_length,
        dropout=config.attn_pdrop > 0,
        half=settings.precision == HALF,
        keeps_best=bool(len(val)),
        frozen=sum(not trainable_parameters(block) for block in model.transformer.h),
        table=model.lm_head.weight.requires_grad,
        ema=settings.ema_decay is not None,
        parts=parts,
        brought=parameter_count(model) if parts > 1 or not there else 0,  # parts are of a copy
        holds=device.type == "cpu" and not any("lora_" in name for name in trainable_parameters(model)),
        short=device.type == "cuda",
        attended_tokens=0 if masked else 1 + round(float(train.positions.mean())),
    )


def _seconds(
    model: GPT2LMHeadModel,
    splits: Sequence[Split],
    settings: Settings,
    device: torch.device,
    clock: Callable[[], float],
    shape: memory_model.ModelShape,
    size: int,
) -> float:
    """Return how long one process would take for the run, with `size` sequences at once."""
    train, val = splits
    plan = Plan(len(train), settings.sequences, settings.epochs, settings.seed)
    evaluated = len(plan.evaluations(settings.evals_per_epoch)) * len(val) * train.sequence_length
    supervised = train.supervised() / max(1, len(train) * train.sequence_length)
    rate = product_rate(device, shape.half, clock)
    took = memory_model.seconds(
        shape, settings.epochs * len(train) * train.sequence_length, evaluated, supervised, rate
    )
    formula = memory_model.seconds(shape, size * train.sequence_length, 0, supervised, rate)
    # Then calls cost more than their work, which no formula knows; a model that is to be parted need not fit whole.
    if formula < BRIEF and shape.parts == 1:
        trunk = recomputing if shape.activation_checkpointing else hidden_states
        took *= max(1.0, _timed(model, train, size, shape.half, device, clock, trunk) / formula)
    return took


def _fitted(
    shape: memory_model.ModelShape,
    free: int,
    sequences: int,
    micro_batch: int | Literal["auto"] | None,
    activation_checkpointing: bool | Literal["auto"],
) -> tuple[int, memory_model.ModelShape]:
    """Return the sequences to take at once, and the shape with what was decided on recomputing."""
    most = max(1, min(sequences, memory_model.AT_ONCE // shape.sequence_length))

    def size_of(shape: memory_model.ModelShape) -> int:
        return (
            memory_model.largest_micro_batch(shape, free, sequences)
            if micro_batch == "auto"
            else min(micro_batch or most, sequences)
        )

    size = size_of(shape)
    if activation_checkpointing is False or (
        activation_checkpointing == "auto" and memory_model.memory(shape, size) <= free
    ):
        return size, shape
    saving = replace(shape, activation_checkpointing=True)
    return size_of(saving), saving


def _timed(
    model: GPT2LMHeadModel,
    train: Split,
    size: int,
    half: bool,
    device: torch.device,
    clock: Callable[[], float],
    trunk: Trunk,
) -> float:
    """Return the seconds of one micro-batch forth and back, the second of two; the model is, and lies, as it was."""
    before = next(model.parameters()).device
    model.to(device).train()
    batch, took = train.batch(slice(0, size), device), 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for _ in range(2):
            began = clock()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                loss = supervised_nats(model, *batch, share=1 / max(1, int(batch.mask.sum())), trunk=trunk)
            loss.backward()  # type: ignore[no-untyped-call]
            loss.item()  # waits for the device
            took = clock() - began
    model.zero_grad()
    model.to(before)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else torch keeps what it took, and nobody sees it as free
    return took * size / len(batch.ids)


def memory_named(machine: Machine, block: int) -> AbstractContextManager[None]:
    """Turn running out of memory in training into an error that names what to lower."""
    many = "the first" if machine.micro_batch is None else str(machine.micro_batch)
    load = f"with {many} sequences of {block:,} tokens at once"
    first = "Set runtime.micro_batch to auto, or to less; at 1, "
    hint = first + ("" if machine.activation_checkpointing else "set runtime.activation_checkpointing to true, ") + LESS
    return shortage_named(load, machine.device, hint)


@contextmanager
def shortage_named(load: str, device: torch.device, hint: str) -> Iterator[None]:
    """Turn running out of memory into an error that says with what, and what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _SHORT.search(str(error)):
            raise
        raise TrainingError(f"out of memory {load}", str(device), hint, "train.memory") from error
