"""Estimate memory and time before training: memory from the shape, time from how fast the device multiplies.

Memory is counted, not tried: what stays for the whole run, and what each token leaves for the way back. It was held
against the peak that the system reports on a CPU, at several shapes (tests/gpt/test_memory_model.py); on a GPU the
same is counted, but nobody has compared it yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

AT_ONCE = 8_192  # tokens of a micro-batch at most, where it is chosen for the user: more gain nothing
# Rows that reach the head at once: fewer re-read the table's gradient too often (128: 3-25 % slower), more cost memory.
CHUNK = 512
SPARE = 0.9  # share of the free memory that is planned with
EFFICIENCY = 0.8  # of the device's products, that a step reaches: 0.75 to 0.9 on a CPU
# What blocks leave for the way back, in a heap that keeps what is freed (`hold_memory`): it falls to pieces between the
# gradients that stay. Fitted to seven shapes of 1,024 to 8,192 tokens.
PIECES = 1.7
ANY = 30 << 20  # bytes: kernels' workspaces, batches, and what the allocator cannot use again


@dataclass(frozen=True)
class ModelShape:
    """A model and how it is trained.

    Attributes:
        layers: Blocks, those that stay as they are among them.
        heads: Of a block.
        width: D.
        vocab: V, rows of the token table.
        parameters: Trained numbers.
        sequence_length: T, tokens of a sequence.
        dropout: Whether any: attention then keeps its T x T weights, on a CPU.
        half: Whether products are in 16 bits.
        keeps_best: Whether a copy of the best weights is held.
        frozen: Lowest blocks that stay as they are: nothing goes back through them.
        table: Whether the head's table is trained.
        ema: Whether an average of the trained weights is held.
        activation_checkpointing: Whether blocks keep only what enters them, and are computed again on the way back.
        parts: How many ranks hold a part of weights, gradients and moments each; 1: this one holds them whole.
        brought: Numbers of the whole model, where it is still to be brought to the device, whole or in parts.
        holds: Whether memory that is freed is kept for what comes next.
        short: Whether attention knows a short way under dropout, too, as kernels of a GPU do.
        attended_tokens: Mean number of keys that a query is multiplied with. 0: its whole sequence, partly masked.
    """

    layers: int
    heads: int
    width: int
    vocab: int
    parameters: int
    sequence_length: int
    dropout: bool
    half: bool
    keeps_best: bool
    frozen: int = 0
    table: bool = True
    ema: bool = False
    activation_checkpointing: bool = False
    parts: int = 1
    brought: int = 0
    holds: bool = False
    short: bool = False
    attended_tokens: int = 0


def memory(shape: ModelShape, micro_batch: int) -> int:
    """Return the bytes that training takes at its peak, besides weights that are on the device already."""
    # Gradients and two moments; on a GPU, the best weights are held elsewhere.
    held = 4 * (shape.parameters * (1 + 2) + shape.brought) // shape.parts + (shape.parts > 1) * _gathered(shape)
    best = 4 * shape.parameters * (shape.keeps_best + shape.ema)
    return held + best + micro_batch * _sequence(shape) + _head(shape, micro_batch) + ANY


def _gathered(shape: ModelShape) -> int:
    """Return the bytes of what a rank that holds parts sees whole: the tables all the time, a block in its turn."""
    return 2 * 4 * shape.width * (shape.vocab + shape.sequence_length + 12 * shape.width)  # and as much in gradients


def _sequence(shape: ModelShape) -> int:
    """Return the bytes that a sequence leaves for the way back."""
    number = 2 if shape.half else 4
    # Of width D a token and layer: states before both norms, both norms' outputs, queries, keys and values, what
    # attention gives; of 4 D: before and after the activation. In half precision the states stay as they are.
    stored = shape.width * (number * (2 + 3 + 1 + 4 + 4) + 4 * 2)
    stored = int(stored * (PIECES if shape.holds and not shape.activation_checkpointing else 1))
    # Attention's weights, where there is no short way: the counts of T x T tables here and on the way back are fitted
    # to measurements, not derived.
    scores = shape.heads * shape.sequence_length * (shape.dropout and not shape.short)
    stored += 2 * shape.width * shape.dropout + scores * (9 * number // 2 + 1)  # what was dropped, at two places
    back = 10 * 4 * shape.width + 4 * number * scores  # through one block
    ends = 6 * 4 * shape.width  # embeddings, the last norm, the states that reach the head, and their gradients
    mask = 4 * shape.sequence_length
    layers = shape.layers - shape.frozen
    held = layers * 4 * shape.width + stored if shape.activation_checkpointing else layers * stored
    return shape.sequence_length * (held + back + ends + mask)


def _head(shape: ModelShape, micro_batch: int) -> int:
    """Return the bytes of a chunk of logits, and of a second gradient of the table where gradients are added up."""
    rows = min(CHUNK, micro_batch * shape.sequence_length)
    return rows * shape.vocab * (4 + 2 * shape.half) + shape.table * 4 * shape.vocab * shape.width


def largest_micro_batch(shape: ModelShape, free: int, sequences: int) -> int:
    """Return how many sequences fit into the free memory at once: at least one, at most those of a step.

    Args:
        shape: The model.
        free: Bytes.
        sequences: Of an optimizer step.
    """
    most = max(1, min(sequences, AT_ONCE // shape.sequence_length))
    return next((size for size in range(most, 1, -1) if memory(shape, size) <= SPARE * free), 1)


def flops(shape: ModelShape, supervised: float) -> float:
    """Return the operations of training on a token, forth and back.

    Args:
        shape: The model.
        supervised: Share of the tokens that reach the head, 0..1.
    """
    block = 12 * shape.width**2 + 2 * shape.width * (shape.attended_tokens or shape.sequence_length)
    back = (4 + 2 * shape.activation_checkpointing) * (shape.layers - shape.frozen)
    head = (4 + 2 * shape.table) * supervised * shape.vocab * shape.width
    return (2 * shape.layers + back) * block + head


def seconds(shape: ModelShape, tokens: float, evaluated: float, supervised: float, rate: float) -> float:
    """Return how long a run takes.

    Args:
        shape: The model.
        tokens: Gone through in training, padding included.
        evaluated: Gone through in evaluations: only forth.
        supervised: Share of them that reach the head.
        rate: Operations a second that a plain product of matrices reaches.
    """
    forth = flops(replace(shape, frozen=0, table=True, activation_checkpointing=False), supervised) / 3
    return (flops(shape, supervised) * tokens + forth * evaluated) / (EFFICIENCY * rate)


def plan_summary(shape: ModelShape, micro_batch: int, free: int | None, took: float) -> str:
    """Return the plan as one line of text: memory, time and micro-batch."""
    room = "" if free is None else f" of {free / 1e9:.1f} GB free"
    minutes = f"{took / 60:.0f} minutes" if took >= 90 else f"{math.ceil(took)} s"
    blocks = ", blocks computed again on the way back" if shape.activation_checkpointing else ""
    return f"about {memory(shape, micro_batch) / 1e9:.2f} GB{room}, {minutes}; micro_batch {micro_batch}{blocks}"
