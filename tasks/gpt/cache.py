"""The cache: keys and values of the tokens that a model has read, in memory taken once.

Legend: B rows, T new tokens, S tokens read so far, R tokens there is room for, H heads, K numbers of a head, N layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2LMHeadModel


class Cache:
    """What the layers remember of a batch of rows.

    Args:
        model: Its shape, device and number type.
        seen: (B, L) bool, False where a prompt is padded on its left.
        more: Tokens that may follow the L; the last of them is never read.
    """

    def __init__(self, model: GPT2LMHeadModel, seen: Tensor, more: int) -> None:
        self.scales = [block.attn.scaling for block in model.transformer.h]
        config, (rows, length) = model.config, seen.shape
        shape = (2, config.n_layer, rows, config.n_head, length + more, config.n_embd // config.n_head)
        self.keys, self.values = torch.empty(shape, device=model.device, dtype=model.dtype)  # each (N, B, H, R, K)
        self.seen = torch.cat([seen, seen.new_ones(rows, more)], dim=1)  # (B, R)
        self.padded = not bool(seen.all())
        self.rows, self.size = rows, 0
        self.fresh = slice(0, 0)
        self.mask: Tensor | None = None

    def grow(self, count: int) -> Tensor:
        """Make place for T new tokens of each row; return their positions in their own conversations: (B, T)."""
        self.fresh = slice(self.size, self.size + count)
        self.size += count
        self.mask = self._mask() if self.padded else None
        positions = self.seen[:, : self.size].cumsum(1)[:, self.fresh] - 1
        return positions.clamp(min=0)

    def _mask(self) -> Tensor:
        """Return (B, 1, T, S) bool, True where a new token sees another: never padding, unless it is padding itself."""
        at = torch.arange(self.size, device=self.seen.device)  # (S,)
        new = at[self.fresh, None]  # (T, 1)
        return ((at <= new) & (self.seen[:, None, : self.size] | (at == new)))[:, None]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Remember the new tokens' keys and values, and mix all values for them: (B, H, T, K)."""
        place = (layer, slice(self.rows), slice(None), self.fresh)
        self.keys[place], self.values[place] = keys, values
        return scaled_dot_product_attention(
            queries,
            self.keys[layer, : self.rows, :, : self.size],
            self.values[layer, : self.rows, :, : self.size],
            attn_mask=self.mask,
            is_causal=self.mask is None and self.fresh.start == 0,
            scale=self.scales[layer],
        )

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, given in rising order."""
        for kept in (self.keys, self.values):
            kept[:, : len(rows), :, : self.size] = kept[:, rows, :, : self.size]
        self.seen, self.rows = self.seen[rows], len(rows)
        self.padded = not bool(self.seen.all())
