"""The trunk: from token ids to hidden states, over the weights of a transformers GPT-2, without what it does not need.

The same modules in the same order as `model.transformer`, so the states are the same to rounding; what is left out is
what transformers does for other models' sake. Who sees whom is the caller's business: training attends by a mask,
sampling to a cache of keys and values.

Legend: B sequences, T tokens in a sequence, D width, H heads, K = D / H.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel

# layer, queries, keys, values, each (B, H, T, K) -> (B, H, T, K)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Trunk = Callable[..., Tensor]  # `hidden_states`, or what was compiled of it


def hidden_states(
    model: GPT2LMHeadModel,
    ids: Tensor,
    positions: Tensor,
    attend: Attend,
    rows: Tensor | None = None,
    *,
    activation_checkpointing: bool = False,
) -> Tensor:
    """Return the states that the head reads.

    Args:
        model: The model; its mode decides on dropout.
        ids: (B, T) int64, token ids.
        positions: (B, T) int64, place in the conversation.
        attend: Mixes the values of a layer's tokens.
        rows: (B, T, D) of the table of words, where they were looked up before.
        activation_checkpointing: Keep only what enters each block, and compute the block again on the way back.

    Returns:
        (B, T, D).
    """
    gpt: Any = model.transformer
    states = (gpt.wte(ids) if rows is None else rows) + gpt.wpe(positions)  # (B, T, D)
    states = gpt.drop(states)
    through = _again if activation_checkpointing and torch.is_grad_enabled() else _through
    for layer, block in enumerate(gpt.h):
        states = through(block, layer, states, attend)
        if states.requires_grad and not torch.compiler.is_compiling():
            states.register_hook(_signal_point)  # type: ignore[no-untyped-call]
    final: Tensor = gpt.ln_f(states)
    return final


recomputing: Trunk = partial(hidden_states, activation_checkpointing=True)


def _through(block: Any, layer: int, states: Tensor, attend: Attend) -> Tensor:
    """Return what leaves a block: (B, T, D)."""
    states = states + _mixed(block, layer, states, attend)
    return states + _fed(block, states)


def _again(block: Any, layer: int, states: Tensor, attend: Attend) -> Tensor:
    """Return what leaves a block, and forget what its way back needs: (B, T, D)."""
    # To draw the same again, the generators are read, and a GPU is waited for: only where there is something to draw.
    drawn = any(part.p > 0 for part in block.modules() if isinstance(part, Dropout))
    left: Tensor = checkpoint(_through, block, layer, states, attend, use_reentrant=False, preserve_rng_state=drawn)
    return left


def _mixed(block: Any, layer: int, states: Tensor, attend: Attend) -> Tensor:
    """Return what attention adds: (B, T, D)."""
    attention = block.attn
    rows, length, width = states.shape
    parts = attention.c_attn(block.ln_1(states)).view(rows, length, 3, attention.num_heads, -1)  # (B, T, 3, H, K)
    queries, keys, values = (part.transpose(1, 2) for part in parts.unbind(2))  # (B, H, T, K)
    mixed = attend(layer, queries, keys, values).transpose(1, 2).reshape(rows, length, width)
    added: Tensor = attention.resid_dropout(attention.c_proj(mixed))
    return added


def _fed(block: Any, states: Tensor) -> Tensor:
    """Return what the wide layer adds: (B, T, D)."""
    mlp = block.mlp
    wide = mlp.act(mlp.c_fc(block.ln_2(states)))  # (B, T, 4 D)
    added: Tensor = mlp.dropout(mlp.c_proj(wide))
    return added


def _signal_point(gradient: Tensor) -> None:
    """No-op hook so that Python can handle signals during the backward pass."""
