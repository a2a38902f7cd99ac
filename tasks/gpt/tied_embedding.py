"""Tied token embedding: one gradient buffer for the input lookup and the output head.

Autograd would add two gradients of the whole table, of which one is zeros but for some rows: 154 MB made, filled and
added in each pass (V = 50,304, D = 768), and no less where that one is sparse. Here, rows are added to the other one.

Legend: B sequences, T tokens in a sequence, D width, V rows of the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import GPT2LMHeadModel


def ends_of(model: GPT2LMHeadModel, ids: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the rows of some tokens, and the table for the head; to be used together, as one gradient goes back.

    Args:
        model: On a CPU, and tied. Else the rows are None: a GPU adds tables in no time, and others have two.
        ids: (B, T) int64.

    Returns:
        (B, T, D), or None, and (V, D).
    """
    weight: Tensor = model.lm_head.weight
    if ids.device.type != "cpu" or not model.config.tie_word_embeddings or not torch.is_grad_enabled():
        return None, weight
    rows, table = _Ends.apply(weight, ids)  # type: ignore[no-untyped-call]
    return rows, table


class _Ends(torch.autograd.Function):
    """Rows of a table, and the table; one node of the graph, so that both gradients are there at once."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Look (B, T) ids up in a (V, D) table."""
        ctx.ids = ids
        return torch.nn.functional.embedding(ids, table), table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_rows: Tensor, to_table: Tensor) -> tuple[Tensor, None]:
        """Add the rows' gradient to the table's, which nobody else holds."""
        return to_table.index_add_(0, ctx.ids.flatten(), to_rows.flatten(0, 1)), None
