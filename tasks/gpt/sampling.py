"""Sampling: replies of a GPT-2 to many prompts at once, or to one prompt as a stream, with a key-value cache.

Legend: B rows, L tokens of the longest prompt, T tokens seen so far, V ids that may be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from tasks.errors import ParameterError
from tasks.gpt.forward import hidden_states
from tasks.gpt.kv_cache import Cache
from tasks.gpt.loops import looping
from tasks.progress import bar

# logits (B, V), the rows' places in the batch as it began (B,), step -> token ids (B,)
Chooser = Callable[[Tensor, Tensor, int], Tensor]


End = Literal["stopped", "looping", "cut"]  # by itself, for it had got stuck (see `loops`), or by a limit


@dataclass(frozen=True)
class Reply:
    """What a model replied: token ids without the stop token, and how it ended."""

    ids: tuple[int, ...]
    end: End

    @property
    def stopped(self) -> bool:
        """Whether it ended by itself."""
        return self.end == "stopped"


def generate(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    stop: int,
    max_new: int | None = None,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] | None = None,
    batch: int = 64,
    vocab: int | None = None,
    label: str = "sample",
) -> list[Reply]:
    """Let the model reply to every prompt, up to the stop token, or until it says the same again and again.

    A row's random numbers come from its own seed, so what it says depends on neither its batch nor its neighbours, but
    for the last bits of float sums that a batch's shape moves.

    Args:
        model: In eval mode; prompts go to its device.
        prompts: Token ids, at least one a prompt and fewer than the model has positions.
        stop: Id that ends a reply.
        max_new: Most tokens of a reply, the stop token included; fewer where the model's positions end sooner. None:
            as many as these leave room for.
        temperature: 0 takes the most likely token; above, logits are divided by it and a token is drawn.
        top_k: Draw among this many most likely tokens; None: all.
        top_p: Draw among the fewest tokens that hold this probability together, in (0, 1]; None: all.
        seeds: One a prompt; needed where the temperature is above 0.
        batch: Prompts at once: faster on a GPU, more memory.
        vocab: Ids from here on are never drawn: rows that only pad the embedding table. None: all may be.
        label: Name of the progress bar.

    Returns:
        Replies in the order of the prompts.

    Raises:
        ParameterError: If a prompt is empty or leaves no room, or a setting is out of its range.
    """
    config = SamplingConfig(temperature, top_k, top_p)
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ParameterError("sampling above temperature 0 needs one seed for each prompt", "seeds", "pass them")
    max_new = int(model.config.n_positions) if max_new is None else max_new
    _check(model, prompts, max_new)
    replies: list[list[int]] = [[] for _ in prompts]
    with bar(label, len(prompts), "replies") as shown:
        for rows in _batches(prompts, batch):
            choose = config.chooser([seeds[row] for row in rows] if seeds else [], max_new, model.device)
            for at, token in _decode(model, [prompts[row] for row in rows], stop, max_new, choose, vocab=vocab):
                replies[rows[at]].append(token)
            shown.advance(len(rows))
    return [_reply(ids, stop) for ids in replies]


def stream(
    model: GPT2LMHeadModel,
    prompt: Sequence[int],
    stop: int,
    max_new: int,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    vocab: int | None = None,
) -> Iterator[int]:
    """Yield the tokens of one reply as they come, without the stop token; it ends as those of `generate` do.

    Raises:
        ParameterError: As `generate` does.
    """
    config = SamplingConfig(temperature, top_k, top_p)
    _check(model, [prompt], max_new)
    choose = config.chooser([seed], max_new, model.device)
    for _, token in _decode(model, [prompt], stop, max_new, choose, vocab=vocab):
        if token != stop:
            yield token


def _reply(ids: list[int], stop: int) -> Reply:
    if ids and ids[-1] == stop:
        return Reply(tuple(ids[:-1]), "stopped")
    return Reply(tuple(ids), "looping" if looping(ids) else "cut")


def _check(model: GPT2LMHeadModel, prompts: Sequence[Sequence[int]], max_new: int) -> None:
    if model.training:
        raise ValueError("sampling needs model.eval(): dropout would change what the model says")
    if max_new < 1:
        raise ParameterError(f"a reply has at least 1 new token, not {max_new}", "max_new")
    room = int(model.config.n_positions)
    for prompt in prompts:
        if not 0 < len(prompt) < room:
            what = f"a prompt has {len(prompt):,} tokens; the model reads 1 to {room - 1:,} and replies in what is left"
            raise ParameterError(what, "prompt", "shorten it", code="param.prompt")


def _batches(prompts: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """Yield row numbers, prompts of like length together, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for first in range(0, len(order), batch):
        yield order[first : first + batch]


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen from logits; see `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ParameterError(f"temperature is {self.temperature}, not a number from 0 up", "temperature")
        if self.top_k is not None and self.top_k < 1:
            raise ParameterError(f"top_k is {self.top_k}, not 1 or more", "top_k")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ParameterError(f"top_p is {self.top_p}, not in (0, 1]", "top_p")

    def chooser(self, seeds: Sequence[int], max_new: int, device: torch.device) -> Chooser:
        """Return what chooses the tokens of a batch; each row's random numbers are made beforehand, from its seed."""
        if self.temperature == 0:
            return lambda logits, rows, step: logits.argmax(-1)
        rows = [torch.rand(max_new, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        draws = torch.stack(rows).to(device)  # (B, max_new) float32 in [0, 1)
        return lambda logits, rows, step: self.drawn(logits, draws[rows, step])

    def drawn(self, logits: Tensor, draw: Tensor) -> Tensor:
        """Draw a token for each row by inverting its cumulative distribution, the likeliest token first.

        Source of the cut by `top_p`: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration",
        arXiv:1904.09751.
        """
        count = min(self.top_k or logits.shape[-1], logits.shape[-1])
        best, ids = (logits.float() / self.temperature).topk(count, dim=-1)  # (B, K), sorted
        p = best.softmax(-1)
        reached = p.cumsum(-1)  # (B, K)
        allowed = torch.ones_like(p, dtype=torch.bool) if self.top_p is None else reached - p < self.top_p
        allowed[:, 0] = True  # rounding must not forbid the likeliest token
        mass = (p * allowed).sum(-1, keepdim=True)  # (B, 1)
        at = torch.searchsorted(reached, draw[:, None] * mass, right=True)  # (B, 1)
        last = (allowed & (p > 0)).sum(-1, keepdim=True) - 1  # float sums may end just below the mass
        return ids.gather(-1, at.minimum(last))[:, 0]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return token ids, and True where they are of a prompt, both (B, L): every prompt ends in the last column."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
    is_token = torch.tensor([[False] * pad + [True] * (longest - pad) for pad in pads])
    return ids, is_token


def _decode(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    stop: int,
    max_new: int,
    choose: Chooser,
    *,
    vocab: int | None,
) -> Iterator[tuple[int, int]]:
    """Yield (row, token) until every row reached `stop`, loops, or has no room; a row that ended leaves the batch."""
    ids, is_token = (tensor.to(model.device) for tensor in _left_padded(prompts))  # (B, L)
    rooms = [min(max_new, model.config.n_positions - len(prompt)) for prompt in prompts]
    replies: list[list[int]] = [[] for _ in prompts]
    places = list(range(len(prompts)))  # of the rows that go on, B of them
    rows = torch.arange(len(prompts), device=model.device)  # (B,) the same
    cache = Cache(model, is_token, max(rooms))
    for step in range(max_new):
        tokens = choose(_next_logits(model, ids, cache, vocab), rows, step)  # (B,)
        going = []
        for at, (row, token) in enumerate(zip(places, tokens.tolist(), strict=True)):
            yield row, token
            replies[row].append(token)
            if token != stop and step + 1 < rooms[row] and not looping(replies[row]):
                going.append(at)
        if not going:
            return
        if len(going) < len(places):
            remaining = torch.tensor(going, device=model.device)
            rows, tokens, places = rows[remaining], tokens[remaining], [places[at] for at in going]
            cache.keep(remaining)
        ids = tokens[:, None]  # (B, 1)


@torch.inference_mode()
def _next_logits(model: GPT2LMHeadModel, ids: Tensor, cache: Cache, vocab: int | None) -> Tensor:
    """Read new tokens, (B, T), and return the logits of what comes after the last one: (B, V)."""
    positions = cache.grow(ids.shape[1])  # (B, T)
    last = hidden_states(model, ids, positions, cache.attend)[:, -1]  # (B, D): no other state reaches the head
    logits: Tensor = last @ model.lm_head.weight[:vocab].T
    return logits
