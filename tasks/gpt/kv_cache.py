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
        is_token: (B, L) bool, False where a prompt is padded on its left.
        more: Tokens that may follow the L; the last of them is never read.
    """

    def __init__(self, model: GPT2LMHeadModel, is_token: Tensor, more: int) -> None:
        self.scales = [block.attn.scaling for block in model.transformer.h]
        config, (rows, length) = model.config, is_token.shape
        shape = (2, rows, config.n_head, length + min(more, STRETCH), config.n_embd // config.n_head)
        self.keys_values = [  # of each layer its keys and values, (2, B, H, R, K)
            torch.empty(shape, device=model.device, dtype=model.dtype) for _ in range(config.n_layer)
        ]
        self.is_token = torch.cat([is_token, is_token.new_ones(rows, more)], dim=1)  # (B, L + more)
        self.padded = not bool(is_token.all())
        self.rows, self.size = rows, 0
        self.fresh = slice(0, 0)
        self.mask: Tensor | None = None

    def grow(self, count: int) -> Tensor:
        """Make place for T new tokens of each row; return their positions in their own conversations: (B, T)."""
        if self.size + count > self.keys_values[0].shape[3]:
            self._widen(self.size + count)
        self.fresh = slice(self.size, self.size + count)
        self.size += count
        self.mask = self._mask() if self.padded else None
        positions = self.is_token[:, : self.size].cumsum(1)[:, self.fresh] - 1
        return positions.clamp(min=0)

    def _widen(self, needed: int) -> None:
        """Make room for twice the tokens, one layer after the other, so that no two copies of all are there at once."""
        room = min(max(needed, 2 * self.size), self.is_token.shape[1])
        for layer, stored in enumerate(self.keys_values):
            wider = stored.new_empty(2, self.rows, stored.shape[2], room, stored.shape[4])
            wider[..., : self.size, :] = stored[:, : self.rows, :, : self.size]
            self.keys_values[layer] = wider

    def _mask(self) -> Tensor:
        """Return (B, 1, T, S) bool, True where a new token sees another: never padding, unless it is padding itself."""
        at = torch.arange(self.size, device=self.is_token.device)  # (S,)
        new = at[self.fresh, None]  # (T, 1)
        return ((at <= new) & (self.is_token[:, None, : self.size] | (at == new)))[:, None]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Remember the new tokens' keys and values, and mix all values for them: (B, H, T, K)."""
        stored = self.keys_values[layer][:, : self.rows]  # (2, B, H, R, K)
        stored[0, :, :, self.fresh], stored[1, :, :, self.fresh] = keys, values
        return scaled_dot_product_attention(
            queries,
            stored[0, :, :, : self.size],
            stored[1, :, :, : self.size],
            attn_mask=self.mask,
            is_causal=self.mask is None and self.fresh.start == 0,
            scale=self.scales[layer],
        )

    @torch.inference_mode()  # as it is read: such tensors change in such a mode only
    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, given in rising order."""
        for stored in self.keys_values:
            stored[:, : len(rows), :, : self.size] = stored[:, rows, :, : self.size]
        self.is_token, self.rows = self.is_token[rows], len(rows)
        self.padded = not bool(self.is_token.all())
