"""Who sees whom: one rule for packed documents and packed trees.

Token q sees token k when `k <= q < ends[k]`; `ends[k]` is one past the last token that may look back at k.
A document is a tree with one branch, so the rule that lets siblings ignore each other keeps documents apart, too.

Legend: B sequences, T tokens in a sequence; dimension 1 of the mask is the heads', which all see the same.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2LMHeadModel

from tasks.errors import ConfigurationError, ParameterError
from tasks.gpt.attention_cpu import attend as mix
from tasks.gpt.attention_cpu import parts
from tasks.gpt.attention_flex import block_mask
from tasks.gpt.forward import Attend

log = logging.getLogger("treeline.train")
Way = Literal["sdpa", "flex", "parts"]
WAY = "attends"  # an attribute of a model
SHORT = 256  # tokens: torch's kernel is as fast for fewer, on a CPU
LONG = 768  # from here on it is, too, where all before a token is seen: it then takes 256 queries at once, not 64


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
        model: Its mode decides on dropout, and `set_way` on who does it.
        ends: (B, T) int64.
    """
    lower, lowered = torch.get_autocast_dtype(ends.device.type), torch.is_autocast_enabled(ends.device.type)
    way = way_set(model)
    if way == "flex":
        return _by_blocks(model, ends, lower, lowered)
    if way == "parts" and _pays(model, ends):
        return _by_parts(model, ends)
    return _by_mask(model, _mask(ends, lower, lowered))


def _by_mask(model: GPT2LMHeadModel, mask: Tensor | None) -> Attend:
    """Attend by what is added to the scores: SDPA, the reference."""

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attention = model.transformer.h[layer].attn
        dropped = attention.attn_dropout.p if attention.training else 0.0
        return scaled_dot_product_attention(
            queries, keys, values, mask, dropped, is_causal=mask is None, scale=attention.scaling
        )

    return attend


def _by_parts(model: GPT2LMHeadModel, ends: Tensor) -> Attend:
    """Attend some queries at once, to what one of them sees."""
    query_blocks = parts(ends)

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return mix(queries, keys, values, query_blocks, model.transformer.h[layer].attn.scaling)

    return attend


def _pays(model: GPT2LMHeadModel, ends: Tensor) -> bool:
    """Tell whether attending by parts can be done, and is faster than torch's kernel."""
    attention, length = model.transformer.h[0].attn, ends.shape[1]
    dropped = attention.training and attention.attn_dropout.p > 0
    if ends.device.type != "cpu" or dropped or length <= SHORT:
        return False
    return length < LONG or not _plain(ends)


def _plain(ends: Tensor) -> bool:
    """Tell whether a token sees all before it."""
    return bool((ends >= ends.shape[1]).all())


def _by_blocks(model: GPT2LMHeadModel, ends: Tensor, lower: torch.dtype, lowered: bool) -> Attend:
    """Attend by blocks where this is compiled. Elsewhere FlexAttention would write out all scores, so SDPA does it."""
    blocks = block_mask(ends)
    plain = cache(lambda: _by_mask(model, _mask(ends, lower, lowered)))

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return plain()(layer, queries, keys, values)
        scale = model.transformer.h[layer].attn.scaling
        mixed: Tensor = flex_attention(queries, keys, values, block_mask=blocks, scale=scale)
        return mixed

    return attend


def set_way(model: GPT2LMHeadModel, way: Way) -> None:
    """Let a model attend by a mask (SDPA), by blocks where it is compiled (FlexAttention), or by parts on a CPU."""
    setattr(model, WAY, way)


def way_set(model: GPT2LMHeadModel) -> Way:
    """Return how a model attends; by parts unless set."""
    way: Way = getattr(model, WAY, "parts")
    return way


def way_for(choice: Literal["auto", "sdpa", "flex"], device: torch.device, compiled: bool, dropout: float) -> Way:
    """Return the way to attend: what was asked for or, for auto, the fastest that can be done.

    FlexAttention has no backward pass on a CPU, is slower than SDPA unless compiled, and cannot drop anything: under
    dropout of attention's weights it would train another model. Parts are of any size, and compiled code is for one.

    Raises:
        ConfigurationError: If it is asked for where there is no GPU.
        ParameterError: If it is asked for without compiling, or with dropout.
    """
    where = "runtime.attention = flex"
    if choice == "flex" and device.type != "cuda":
        what = f"FlexAttention trains on CUDA devices, and this one is {device.type}"
        raise ConfigurationError(what, where, "Set it to auto or sdpa", "config.attention")
    if choice == "flex" and not compiled:
        hint = "Set runtime.compile, or runtime.attention to auto or sdpa"
        raise ParameterError("FlexAttention pays only where it is compiled", where, hint, "param.attention")
    if choice == "flex" and dropout:
        hint = "Set train.dropout to 0, or runtime.attention to auto or sdpa"
        raise ParameterError(
            f"FlexAttention has no dropout, and {dropout} is asked for", where, hint, "param.attention"
        )
    if choice != "auto":
        return choice
    if device.type == "cpu" and not compiled:
        return "parts"
    possible = device.type == "cuda" and compiled
    if possible and dropout:
        log.info("runtime.attention: by mask (SDPA), as dropout is %s; with 0, FlexAttention would be used", dropout)
    return "flex" if possible and not dropout else "sdpa"


def _mask(ends: Tensor, lower: torch.dtype, lowered: bool) -> Tensor | None:
    """Return what is added to the scores, (B, 1, T, T): 0 or -inf; None where the rule is plain causality.

    SDPA would make the same of a bool mask, but again in each layer. A GPU is not asked whether it is plain: it would
    have to be waited for.
    """
    if ends.device.type == "cpu" and _plain(ends):
        return None
    rule = visible(ends)
    return torch.zeros_like(rule, dtype=lower if lowered else torch.float32).masked_fill_(~rule, -torch.inf)
