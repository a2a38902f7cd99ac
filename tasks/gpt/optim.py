"""The optimizer: AdamW, fused, with decay on matrices only; how long a gradient is; and its state by weights' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

BETAS = 0.9, 0.95  # decay of the running means of the gradient and of its square: those of GPT-3 and nanoGPT
FUSED = frozenset({"cpu", "cuda"})  # a fifth of the time of the unfused one, on a CPU with 30 M weights


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> AdamW:
    """Make the optimizer of the weights that are trained.

    Everything with two dimensions decays, the embeddings included, as in nanoGPT, so that losses compare; biases and
    the scales of norms do not: there is no reason for them to be small.

    Args:
        model: On the device where it will be trained.
        lr: Learning rate of the first update.
        weight_decay: Share of a weight that is taken away per update and unit of learning rate.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=BETAS, fused=weights[0].device.type in FUSED)


def set_rate(optimizer: AdamW, lr: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def grad_norm_squared(gradients: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of gradients: () float64, float32 on a device that knows no other.

    torch's own norm adds up a whole tensor in float32: on a CPU, that of 50,304 x 384 random numbers comes out 0.1 %
    short, and otherwise short for each way to share it out over ranks. Rows are few numbers, and added up in float64;
    a rank has whole rows.
    """
    exact = torch.float32 if gradients[0].device.type == "mps" else torch.float64
    rows = (torch.linalg.vector_norm(part.flatten(1), dim=1) if part.dim() > 1 else part for part in gradients)
    return torch.stack([row.to(exact).square().sum() for row in rows]).sum()


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], length: float, most: float) -> None:
    """Clip gradients by global norm, in place."""
    if length > most:
        for gradient in gradients:
            gradient.mul_(most / length)


def moments(optimizer: AdamW, model: nn.Module) -> dict[str, Tensor]:
    """Return the state as named tensors, `exp_avg/transformer.wte.weight`; empty before the first update."""
    names = _names(optimizer, model)
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{moment}/{names[at]}": value for at, values in state.items() for moment, value in values.items()}


def set_moments(optimizer: AdamW, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that `moments` returned."""
    place = {name: at for at, name in enumerate(_names(optimizer, model))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        moment, _, name = key.partition("/")
        state.setdefault(place[name], {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _names(optimizer: AdamW, model: nn.Module) -> list[str]:
    """Return the weights' names in the optimizer's own order, by which its state is numbered."""
    name_of = {weight: name for name, weight in model.named_parameters()}
    return [name_of[weight] for group in optimizer.param_groups for weight in group["params"]]
