"""Who sees whom: one rule for packed documents and packed trees.

Token q sees token k when `k <= q < ends[k]`; `ends[k]` is one past the last token that may look back at k.
A document is a tree with one branch, so the rule that lets siblings ignore each other keeps documents apart, too.

Legend: B sequences, T tokens in a sequence; dimension 1 of the mask is the heads', which all see the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(ends: Tensor) -> Tensor:
    """Return the attention mask of packed sequences, True where a query sees a key.

    Args:
        ends: (B, T) int64, one past the last token that sees this one.

    Returns:
        (B, 1, T, T) bool, query by key. transformers passes a mask of four dimensions on to SDPA as it is.
    """
    at = torch.arange(ends.shape[1], device=ends.device)  # (T,)
    # Every token sees itself, whatever `ends` says: a row with nothing to look at would be NaN after the softmax.
    ends = torch.maximum(ends, at + 1)  # (B, T)
    causal = at[None, :] <= at[:, None]  # (T, T)
    return (causal & (at[:, None] < ends[:, None, :]))[:, None]  # (B, 1, T, T)
