"""The cache: keys and values of the tokens that a model has read, in memory that grows with them.

Most rows end long before there is no more room, so this much at once would be many times of what is needed: 26 GB for
128 replies of gpt2-medium.

Legend: B rows, T new tokens, S tokens read so far, R tokens there is room for, H heads, K numbers of a head, N layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2LMHeadModel

STRETCH = 64  # tokens that there is room for at first, besides the prompt


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
        shape = (2, rows, config.n_head, length + min(more, STRETCH), config.n_embd // config.n_head)
        self.kept = [  # of each layer its keys and values, (2, B, H, R, K)
            torch.empty(shape, device=model.device, dtype=model.dtype) for _ in range(config.n_layer)
        ]
        self.seen = torch.cat([seen, seen.new_ones(rows, more)], dim=1)  # (B, L + more)
        self.padded = not bool(seen.all())
        self.rows, self.size = rows, 0
        self.fresh = slice(0, 0)
        self.mask: Tensor | None = None

    def grow(self, count: int) -> Tensor:
        """Make place for T new tokens of each row; return their positions in their own conversations: (B, T)."""
        if self.size + count > self.kept[0].shape[3]:
            self._widen(self.size + count)
        self.fresh = slice(self.size, self.size + count)
        self.size += count
        self.mask = self._mask() if self.padded else None
        positions = self.seen[:, : self.size].cumsum(1)[:, self.fresh] - 1
        return positions.clamp(min=0)

    def _widen(self, needed: int) -> None:
        """Make room for twice the tokens, one layer after the other, so that no two copies of all are there at once."""
        room = min(max(needed, 2 * self.size), self.seen.shape[1])
        for layer, kept in enumerate(self.kept):
            wider = kept.new_empty(2, self.rows, kept.shape[2], room, kept.shape[4])
            wider[..., : self.size, :] = kept[:, : self.rows, :, : self.size]
            self.kept[layer] = wider

    def _mask(self) -> Tensor:
        """Return (B, 1, T, S) bool, True where a new token sees another: never padding, unless it is padding itself."""
        at = torch.arange(self.size, device=self.seen.device)  # (S,)
        new = at[self.fresh, None]  # (T, 1)
        return ((at <= new) & (self.seen[:, None, : self.size] | (at == new)))[:, None]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Remember the new tokens' keys and values, and mix all values for them: (B, H, T, K)."""
        kept = self.kept[layer][:, : self.rows]  # (2, B, H, R, K)
        kept[0, :, :, self.fresh], kept[1, :, :, self.fresh] = keys, values
        return scaled_dot_product_attention(
            queries,
            kept[0, :, :, : self.size],
            kept[1, :, :, : self.size],
            attn_mask=self.mask,
            is_causal=self.mask is None and self.fresh.start == 0,
            scale=self.scales[layer],
        )

    @torch.inference_mode()  # as it is read: such tensors change in such a mode only
    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, given in rising order."""
        for kept in self.kept:
            kept[:, : len(rows), :, : self.size] = kept[:, rows, :, : self.size]
        self.seen, self.rows = self.seen[rows], len(rows)
        self.padded = not bool(self.seen.all())
