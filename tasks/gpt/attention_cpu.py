"""Attention on a CPU: some queries at once, with the keys that one of them sees, and no others.

Torch's kernel computes what a mask then throws away: all that lies between a branch and its ancestors, or before a
document. Here the keys that some queries see are laid side by side, and plain products do the rest. They are as fast,
for what they compute, as the kernel is at its best, and twice as fast as it is below 768 tokens, where it takes fewer
queries at once. What a query takes of each key is computed again on the way back: nothing of T x T is kept.

Legend: B sequences, T tokens in a sequence, H heads, K numbers of a head, Q queries at once, S keys that they see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 64  # at once: with 32 and 128, packed trees took 12 and 4 % longer (6 heads, 1,024 tokens)


@dataclass(frozen=True)
class QueryBlock:
    """Some queries of a sequence, and the keys that one of them sees.

    Attributes:
        row: Of the sequence.
        queries: Where the Q queries are.
        keys: Where the S keys are; (S,) int64 where others lie between them.
        bias: (Q, S) float32, added to the scores: 0 where a query sees a key, else -inf.
    """

    row: int
    queries: slice
    keys: slice | Tensor
    bias: Tensor


def parts(ends: Tensor) -> list[QueryBlock]:
    """Return the queries of packed sequences, some at once.

    Args:
        ends: (B, T) int64, one past the last token that sees this one.
    """
    length = ends.shape[1]
    at = torch.arange(length)  # (T,)
    ends = torch.maximum(ends, at + 1)  # every token sees itself, so that no row of scores is empty
    return [
        _part(row, own, at, slice(first, min(first + QUERIES, length)))
        for row, own in enumerate(ends)
        for first in range(0, length, QUERIES)
    ]


def _part(row: int, ends: Tensor, at: Tensor, queries: slice) -> QueryBlock:
    keys = (ends[: queries.stop] > queries.start).nonzero().squeeze(1)  # (S,) some query of these sees
    first, asking = int(keys[0]), at[queries, None]  # (Q, 1)
    hidden = (keys > asking) | (ends[keys] <= asking)  # (Q, S)
    gaps = len(keys) < queries.stop - first
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return QueryBlock(row, queries, keys if gaps else slice(first, queries.stop), bias)


def attend(queries: Tensor, keys: Tensor, values: Tensor, parts: Sequence[QueryBlock], scale: float) -> Tensor:
    """Mix, for each query, the values of the keys that it sees.

    Args:
        queries: (B, H, T, K), on a CPU; what is not float32 is computed in it.
        keys: (B, H, T, K).
        values: (B, H, T, K).
        parts: Of all queries.
        scale: What scores are multiplied by.

    Returns:
        (B, H, T, K), laid out as (B, T, H, K).
    """
    with torch.autocast("cpu", enabled=False):
        mixed: Tensor = _Attention.apply(queries.float(), keys.float(), values.float(), parts, scale)  # type: ignore[no-untyped-call]
    return mixed.to(queries.dtype)


class _Attention(torch.autograd.Function):
    """Attention over parts, there and back."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, parts: Sequence[QueryBlock], scale: float
    ) -> Tensor:
        """Mix the values of (B, H, T, K)."""
        ctx.save_for_backward(queries, keys, values)
        ctx.parts, ctx.scale = parts, scale
        mixed = _like(queries)
        for part in parts:
            q, k, v = _of(queries, part), _seen(keys, part), _seen(values, part)
            _of(mixed, part).copy_(torch.bmm(_weights(q, k, part, scale), v))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values, each (B, H, T, K)."""
        queries, keys, values = ctx.saved_tensors
        to_queries, to_keys, to_values = _like(queries), _like(keys).zero_(), _like(values).zero_()
        for part in ctx.parts:
            q, k, v, g = _of(queries, part), _seen(keys, part), _seen(values, part), _of(slope, part)
            weights = _weights(q, k, part, ctx.scale)  # (H, Q, S)
            _add(to_values, part, torch.bmm(weights.transpose(1, 2), g))
            to_weights = torch.bmm(g, v.transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, torch.float32).mul_(ctx.scale)
            _of(to_queries, part).copy_(torch.bmm(to_scores, k))
            _add(to_keys, part, torch.bmm(to_scores.transpose(1, 2), q))
        return to_queries, to_keys, to_values, None, None


def _weights(queries: Tensor, keys: Tensor, part: QueryBlock, scale: float) -> Tensor:
    """Return how much each query takes of each key: (H, Q, S)."""
    scores = torch.baddbmm(part.bias, queries, keys.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)


def _like(tensor: Tensor) -> Tensor:
    """Return room for (B, H, T, K), laid out as (B, T, H, K), which is how a product wants it next."""
    rows, heads, length, number = tensor.shape
    return tensor.new_empty(rows, length, heads, number).transpose(1, 2)


def _of(tensor: Tensor, part: QueryBlock) -> Tensor:
    """View the queries of a part: (H, Q, K)."""
    return tensor[part.row, :, part.queries]


def _seen(tensor: Tensor, part: QueryBlock) -> Tensor:
    """Return the keys that a part sees: (H, S, K). Whole tokens are copied: heads of tokens take twice the time."""
    if isinstance(part.keys, slice):
        return tensor[part.row, :, part.keys]
    _, heads, _, number = tensor.shape
    tokens = tensor[part.row].transpose(0, 1).flatten(1)  # (T, H K)
    return tokens.index_select(0, part.keys).view(-1, heads, number).transpose(0, 1)


def _add(total: Tensor, part: QueryBlock, more: Tensor) -> None:
    """Add (H, S, K) to the keys that a part sees."""
    if isinstance(part.keys, slice):
        total[part.row, :, part.keys] += more
    else:
        total[part.row].transpose(0, 1).flatten(1).index_add_(0, part.keys, more.transpose(0, 1).flatten(1))
