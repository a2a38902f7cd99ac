"""Who sees whom: one rule for packed documents and packed trees.

Token q sees token k when `k <= q < ends[k]`; `ends[k]` is one past the last token that may look back at k.
A document is a tree with one branch, so the rule that lets siblings ignore each other keeps documents apart, too.

Legend: B sequences, T tokens in a sequence; dimension 1 of the mask is the heads', which all see the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2LMHeadModel

from tasks.gpt.trunk import Attend


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
        model: Its mode decides on dropout.
        ends: (B, T) int64.
    """
    mask = _mask(ends, torch.get_autocast_dtype(ends.device.type), torch.is_autocast_enabled(ends.device.type))

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attention = model.transformer.h[layer].attn
        return scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=attention.attn_dropout.p if attention.training else 0.0,
            is_causal=mask is None,
            scale=attention.scaling,
        )

    return attend


def _mask(ends: Tensor, lower: torch.dtype, lowered: bool) -> Tensor | None:
    """Return what is added to the scores, (B, 1, T, T): 0 or -inf; None where the rule is plain causality.

    SDPA would make the same of a bool mask, but again in each layer. A GPU is not asked whether it is plain: it would
    have to be waited for.
    """
    if ends.device.type == "cpu" and bool((ends >= ends.shape[1]).all()):
        return None
    seen = visible(ends)
    return torch.zeros_like(seen, dtype=lower if lowered else torch.float32).masked_fill_(~seen, -torch.inf)
