"""Who sees whom: one rule for packed documents and packed trees.

Token q sees token k when `k <= q < ends[k]`; `ends[k]` is one past the last token that may look back at k.
A document is a tree with one branch, so the rule that lets siblings ignore each other keeps documents apart, too.

Legend: B sequences, T tokens in a sequence; dimension 1 of the mask is the heads', which all see the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2LMHeadModel

from tasks.errors import ConfigurationError, ParameterError
from tasks.gpt.blocks import block_mask
from tasks.gpt.trunk import Attend

log = logging.getLogger("treeline.train")
BY_BLOCKS = "attends_by_blocks"  # an attribute of a model
QUERIES = 256  # at once, on a CPU: 128 and 512 were slower by 3 and 14 % (6 heads, 2,048 tokens)


def visible(ends: Tensor) -> Tensor:
    """Return the attention mask of packed sequences, True where a query sees a key.

    Args:
        ends: (B, T) int64, one past the last token that sees this one.

    Returns:
        (B, 1, T, T) bool, query by key, as SDPA takes it.
    """
    at = torch.arange(ends.shape[1], device=ends.device)  # (T,)
    # Every token sees itself, whatever `ends` says: a row with nothing to look at would be NaN after the softmax.
    ends = torch.maximum(ends, at + 1)  # (B, T)
    causal = at[None, :] <= at[:, None]  # (T, T)
    return (causal & (at[:, None] < ends[:, None, :]))[:, None]  # (B, 1, T, T)


def by_ends(model: GPT2LMHeadModel, ends: Tensor) -> Attend:
    """Return attention under the rule, for all layers of one pass over a batch.

    Args:
        model: Its mode decides on dropout, and `set_blocks` on what a compiled pass uses.
        ends: (B, T) int64.
    """
    lower, lowered = torch.get_autocast_dtype(ends.device.type), torch.is_autocast_enabled(ends.device.type)
    if getattr(model, BY_BLOCKS, False):
        return _by_blocks(model, ends, lower, lowered)
    mask = _mask(ends, lower, lowered)
    return _by_mask(model, mask, _parts(ends) if mask is not None and ends.device.type == "cpu" else [])


def _by_mask(model: GPT2LMHeadModel, mask: Tensor | None, parts: Sequence[tuple[slice, slice]]) -> Attend:
    """Attend by what is added to the scores: SDPA, the reference; some queries at once, with the keys they may see."""

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attention = model.transformer.h[layer].attn
        dropped = attention.attn_dropout.p if attention.training else 0.0
        if len(parts) < 2 or dropped or torch.compiler.is_compiling():  # compiled code is for one shape
            return scaled_dot_product_attention(
                queries, keys, values, mask, dropped, is_causal=mask is None, scale=attention.scaling
            )
        assert mask is not None
        mixed = [
            scaled_dot_product_attention(
                queries[:, :, some],
                keys[:, :, seen],
                values[:, :, seen],
                mask[:, :, some, seen],
                scale=attention.scaling,
            )
            for some, seen in parts
        ]
        return torch.cat(mixed, dim=2)

    return attend


def _parts(ends: Tensor) -> list[tuple[slice, slice]]:
    """Return runs of at most `QUERIES` queries, each with all keys that any of it sees, in any sequence.

    A mask alone spares a CPU nothing: above the diagonal, and between documents, it computes what it then throws away.
    """
    length, found = ends.shape[1], []
    for first in range(0, length, QUERIES):
        last = min(first + QUERIES, length)
        alive = (ends[:, :first] > first).any(dim=0)  # (first,) keys before, that some query of the run sees
        found.append((slice(first, last), slice(int(alive.int().argmax()) if alive.any() else first, last)))
    return found


def _by_blocks(model: GPT2LMHeadModel, ends: Tensor, lower: torch.dtype, lowered: bool) -> Attend:
    """Attend by blocks where this is compiled. Elsewhere FlexAttention would write out all scores, so SDPA does it."""
    blocks = block_mask(ends)
    plain = cache(lambda: _by_mask(model, _mask(ends, lower, lowered), []))

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return plain()(layer, queries, keys, values)
        scale = model.transformer.h[layer].attn.scaling
        mixed: Tensor = flex_attention(queries, keys, values, block_mask=blocks, scale=scale)
        return mixed

    return attend


def set_blocks(model: GPT2LMHeadModel, wanted: bool) -> None:
    """Let compiled passes of a model attend by blocks (FlexAttention), or by a mask as all others do (SDPA)."""
    setattr(model, BY_BLOCKS, wanted)


def by_blocks(asked: Literal["auto", "sdpa", "flex"], device: torch.device, compiled: bool, dropout: float) -> bool:
    """Tell whether to attend by blocks: where asked to, or, for auto, where it can be done and pays.

    FlexAttention has no backward pass on a CPU, is slower than SDPA unless compiled, and cannot drop anything: under
    dropout of attention's weights it would train another model.

    Raises:
        ConfigurationError: If it is asked for where there is no GPU.
        ParameterError: If it is asked for without compiling, or with dropout.
    """
    where = "train.attention = flex"
    if asked == "flex" and device.type != "cuda":
        what = f"FlexAttention trains on CUDA devices, and this one is {device.type}"
        raise ConfigurationError(what, where, "Set it to auto or sdpa", "config.attention")
    if asked == "flex" and not compiled:
        do = "Set train.compile, or train.attention to auto or sdpa"
        raise ParameterError("FlexAttention pays only where it is compiled", where, do, "param.attention")
    if asked == "flex" and dropout:
        do = "Set train.dropout to 0, or train.attention to auto or sdpa"
        raise ParameterError(f"FlexAttention has no dropout, and {dropout} is asked for", where, do, "param.attention")
    possible = device.type == "cuda" and compiled
    if asked == "auto" and possible and dropout:
        log.info("train.attention: by mask (SDPA), as dropout is %s; with 0, FlexAttention would be used", dropout)
    return asked == "flex" or (asked == "auto" and possible and not dropout)


def _mask(ends: Tensor, lower: torch.dtype, lowered: bool) -> Tensor | None:
    """Return what is added to the scores, (B, 1, T, T): 0 or -inf; None where the rule is plain causality.

    SDPA would make the same of a bool mask, but again in each layer. A GPU is not asked whether it is plain: it would
    have to be waited for.
    """
    if ends.device.type == "cpu" and bool((ends >= ends.shape[1]).all()):
        return None
    seen = visible(ends)
    return torch.zeros_like(seen, dtype=lower if lowered else torch.float32).masked_fill_(~seen, -torch.inf)
