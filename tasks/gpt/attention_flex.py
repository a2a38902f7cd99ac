"""The rule of `attention` in blocks of 128 tokens, for FlexAttention: what nobody sees is never computed.

Which blocks hold something is read off the least and the greatest end of each: no T x T table is made, as torch's own
`create_block_mask` does. Of a block of keys before the queries, some token is seen if its greatest end is past the
first query, and all are seen if its least end is past the last one. On the diagonal, a token sees itself.

Legend: B sequences, T tokens in a sequence, K blocks of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

BLOCK = 128  # tokens; what FlexAttention's kernels are tuned for


def block_mask(ends: Tensor) -> BlockMask:
    """Return who sees whom, as FlexAttention takes it; nothing in it waits for the device.

    Args:
        ends: (B, T) int64, one past the last token that sees this one.
    """
    length = ends.shape[1]
    at = torch.arange(length, device=ends.device)  # (T,)
    ends = torch.maximum(ends, at + 1).clamp_max(length)  # (B, T)

    # Torch calls the four of it batch, head, query and key.
    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[b, k])

    some, whole = _blocks(ends)  # (B, K, K)
    parts = (*_listed(some & ~whole), *_listed(whole))
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=BLOCK, mask_mod=is_visible, seq_lengths=(length, length))


def _blocks(ends: Tensor) -> tuple[Tensor, Tensor]:
    """Tell of each block of queries and of keys whether some, and whether all, of it is seen: two of (B, K, K)."""
    length = ends.shape[1]
    padded = pad(ends, (0, -length % BLOCK))  # an end of 0: a block that is cut short is never seen as a whole
    in_blocks = padded.view(len(ends), -1, BLOCK)  # (B, K, 128)
    least, greatest = in_blocks.amin(2), in_blocks.amax(2)  # (B, K)
    number = torch.arange(least.shape[1], device=ends.device)  # (K,)
    first, last = number * BLOCK, (number + 1) * BLOCK - 1  # queries of a block
    before, same = number[None, :] < number[:, None], number[None, :] == number[:, None]  # (K, K)
    some = same | (before & (greatest[:, None, :] > first[:, None]))
    whole = before & (least[:, None, :] > last[:, None])
    return some, whole


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys are chosen for each block of queries, and which: those first."""
    counts = chosen.sum(dim=2, dtype=torch.int32)[:, None]  # (B, 1, K)
    order = chosen.int().argsort(dim=2, descending=True, stable=True).to(torch.int32)[:, None]  # (B, 1, K, K)
    return counts, order.contiguous()
