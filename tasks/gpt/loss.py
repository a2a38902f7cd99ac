"""The loss: summed negative log-likelihood of the supervised tokens, in nats.

Only positions that predict a supervised token reach the head, and they do so in chunks: the logits of a whole batch
(2,048 tokens by 50,304 words are 412 MB, held three times over) never exist.

Legend: B sequences, T tokens in a sequence, D width, V rows of the token table, N supervised tokens, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import GPT2LMHeadModel

from tasks.gpt.attention import by_ends
from tasks.gpt.forward import Trunk, hidden_states
from tasks.gpt.memory_model import CHUNK
from tasks.gpt.tied_embedding import ends_of


def supervised_nats(
    model: GPT2LMHeadModel,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    ends: Tensor,
    *,
    weights: Tensor | None = None,
    share: float = 1.0,
    chunk: int = CHUNK,
    trunk: Trunk = hidden_states,
) -> Tensor:
    """Return the summed loss of a batch, ready for `backward`.

    Args:
        model: The model; its mode (dropout or not) is the caller's business.
        ids: (B, T) int64, token ids.
        mask: (B, T) bool, True where the token is a target; it is predicted from the token before it. Where the rest
            is on a GPU, it should not be: the places of its targets are wanted at once.
        positions: (B, T) int64, place in the conversation.
        ends: (B, T) int64, token q sees token k when `k <= q < ends[k]`.
        weights: (B, T) float32, what each target counts. None: 1.
        share: What the sum is multiplied by: one over what all targets of the optimizer step weigh. Given here, it
            spares a pass over the table's gradient.
        chunk: Rows that reach the head at once; changes memory and speed, not the result beyond rounding.
        trunk: `hidden_states`, or what was compiled of it.

    Returns:
        () float32, nats summed over the N targets, times `share`.
    """
    hidden, targets, table = predictors(model, ids, mask, positions, ends, trunk)
    worth = None if weights is None else _picked(weights[:, 1:, None], mask[:, 1:]).squeeze(1)  # (N,)
    nats: Tensor = _ChunkedNats.apply(hidden, table, targets, worth, share, chunk)  # type: ignore[no-untyped-call]
    return nats


@torch.no_grad()
def token_nats(
    model: GPT2LMHeadModel,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    ends: Tensor,
    *,
    chunk: int = CHUNK,
    trunk: Trunk = hidden_states,
) -> Tensor:
    """Return the loss of each supervised token, without gradients: (N,) float32 nats, row by row of the batch.

    Arguments as in `supervised_nats`.
    """
    hidden, targets, table = predictors(model, ids, mask, positions, ends, trunk)
    nats = [
        _nats(_logits(h, table), t)
        for h, t in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    ]
    return torch.cat(nats)


def predictors(
    model: GPT2LMHeadModel, ids: Tensor, mask: Tensor, positions: Tensor, ends: Tensor, trunk: Trunk = hidden_states
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states that predict a supervised token, (N, D), those tokens, (N,) int64, and the head's table.

    Whoever goes back through the states goes back through that table, too.
    """
    wanted = mask[:, 1:]  # (B, T - 1); a sequence's first token has nothing before it to be predicted from
    # The last token predicts nothing here and nobody looks back at it: it need not go through the model. A GPU does
    # 128 tokens at once, and would rather have it.
    last = -1 if ids.device.type == "cpu" else None
    rows, table = ends_of(model, ids[:, :last])
    inputs = ids[:, :last], positions[:, :last], by_ends(model, ends[:, :last]), rows
    states = trunk(model, *inputs)[:, : wanted.shape[1]]  # (B, T - 1, D)
    return _picked(states, wanted), _picked(ids[:, 1:, None], wanted).squeeze(1), table


def _picked(values: Tensor, wanted: Tensor) -> Tensor:
    """Return the rows (N, D) of values (B, T, D) where `wanted` (B, T) is True, without asking a GPU how many."""
    if values.device == wanted.device:
        return values[wanted]
    places = wanted.flatten().nonzero().squeeze(1).to(values.device, non_blocking=True)  # (N,)
    return values.flatten(0, 1).index_select(0, places)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).float()  # (C, V); under autocast the product is bfloat16, the softmax never


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.logsumexp(dim=1) - logits.gather(1, targets[:, None]).squeeze(1)  # (C,)


def _slopes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each row, (C,), and its gradient with respect to the logits, (C, V), in their memory.

    The log of the softmax's divisor is read off at the likeliest word, whose probability cannot underflow.
    """
    top = logits.amax(dim=1)  # (C,)
    at_target = logits.gather(1, targets[:, None]).squeeze(1)  # (C,)
    torch.softmax(logits, dim=1, out=logits)
    nats = top - logits.amax(dim=1).log() - at_target
    logits.scatter_add_(1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
    return nats, logits


class _ChunkedNats(torch.autograd.Function):
    """Summed cross entropy whose gradients are taken on the way forward, while a chunk's logits are at hand.

    The sum's gradient is one scalar, so what is found forward only needs scaling backward: three products with the
    table instead of the four that recomputing the logits would take, and no logits kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, worth: Tensor | None, share: float, chunk: int
    ) -> Tensor:
        """Sum the loss over (N, D) hidden states and (N,) targets, keeping the gradients of both inputs."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        total = hidden.new_zeros((), dtype=torch.float32)
        to_hidden = torch.empty_like(hidden)  # (N, D)
        # (V, D) float32, also under autocast: it sums over chunks. None for a table that stays as it is.
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        with torch.autocast(kind, enabled=False):
            table = weight.to(dtype)
            room = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=dtype)  # one chunk's logits, for all
            for first in range(0, len(hidden), chunk):
                rows = hidden[first : first + chunk].to(dtype)  # (C, D)
                torch.mm(rows, table.T, out=room[: len(rows)])
                logits = room[: len(rows)].float()  # (C, V)
                nats, slopes = _slopes(logits, targets[first : first + chunk])  # (C,), (C, V)
                if worth is not None:
                    counts = worth[first : first + chunk]  # (C,)
                    nats, slopes = nats * counts, slopes.mul_(counts[:, None])
                total += nats.sum()
                slopes = slopes.to(dtype)
                to_hidden[first : first + chunk] = (slopes @ table).mul_(share)
                if to_weight is not None and dtype == weight.dtype:
                    to_weight.addmm_(slopes.T, rows, alpha=share)
                elif to_weight is not None:
                    to_weight.add_(slopes.T @ rows, alpha=share)
        ctx.gradients = to_hidden, to_weight
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        """Hand over the gradients that were found on the way forward, scaled; they are there once."""
        to_hidden, to_weight = ctx.gradients
        del ctx.gradients
        if scale.device.type != "cpu" or scale.item() != 1.0:  # a GPU is faster than the question
            to_hidden.mul_(scale)
            if to_weight is not None:
                to_weight.mul_(scale)
        return to_hidden, to_weight, None, None, None, None
