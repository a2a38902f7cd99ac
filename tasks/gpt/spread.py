"""How a model lies over the ranks of a world: on one rank, whole on each (DDP), or a part on each (FSDP2).

Whoever holds a part sees whole tensors only by asking; checkpoints hold whole ones, so that any other layout can read
them. Gradients are summed over ranks, not averaged: the loss is already divided by the units of the whole step.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2LMHeadModel

from tasks.gpt.device import free_memory
from tasks.gpt.weights import parameter_count, trained
from tasks.gpt.world import World

log = logging.getLogger("treeline.train")
T = TypeVar("T")
NUMBER = 4  # bytes of a weight, float32; one that is trained has a gradient and two means of that size besides


class Spread:
    """A model as it is trained on this rank.

    Attributes:
        model: The one to train: what was given, or where each rank holds a part, a copy of it.
        sharded: Whether each rank holds a part.
    """

    def __init__(self, model: GPT2LMHeadModel, world: World, device: torch.device, sharded: bool = False) -> None:
        self.given, self.world, self.device = model, world, device
        self.sharded = sharded and not world.alone
        self.model: GPT2LMHeadModel = (copy.deepcopy(model) if self.sharded else model).to(device)
        self.module: Any = (
            None if world.alone else _sharded(self.model, world, device) if self.sharded else _whole(self.model)
        )

    def within(self, work: Callable[[], T]) -> T:
        """Do work that asks all of the model's weights; each rank must come here at the same time."""
        if self.module is None or not (self.sharded or torch.is_grad_enabled()):
            return work()
        done: T = self.module(work)
        if self.sharded and not torch.is_grad_enabled():
            self.module.reshard()  # else done by the backward pass
        return done

    def adding(self, last: bool) -> AbstractContextManager[None]:
        """Open a block of one micro-batch; copies of the model wait for the last one to add up their gradients."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Return this rank's part of the gradient of each weight that has one; changing it changes the gradient."""
        found = (weight.grad for weight in self.model.parameters() if weight.grad is not None)
        return [one.to_local() if isinstance(one, DTensor) else one for one in found]

    def united(self, part: Tensor) -> Tensor:
        """Add up what is made of parts of weights; of whole ones, each rank has it already."""
        return self.world.total(part) if self.sharded else part

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors in full, on rank 0; nothing on the others. Each rank must come here at the same time."""
        if not self.sharded:
            return dict(tensors) if self.world.first else {}
        found = {}
        for name, tensor in tensors.items():
            self.world.begin()
            full = _full(tensor)
            if self.world.first:
                found[name] = full.to("cpu")
        return found

    @torch.no_grad()
    def put(self, place: Tensor, whole: Tensor | None) -> None:
        """Set a tensor to what rank 0 gives in full."""
        self.world.begin()
        if self.world.alone:
            place.copy_(_given(whole))
        elif isinstance(place, DTensor):
            blank = torch.empty(place.shape, dtype=place.dtype, device=self.device)
            full = _given(whole).to(blank) if self.world.first else blank
            place.copy_(distribute_tensor(full, place.device_mesh, place.placements))
        else:
            if self.world.first:
                place.copy_(_given(whole))
            dist.broadcast(place, 0)

    def received(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what belongs to weights, named `exp_avg/...`, as this rank holds it; rank 0 gives it in full."""
        if self.world.alone:
            return dict(saved)
        weights, places = dict(self.model.named_parameters()), {}
        for name, shape in self.world.told({name: list(one.shape) for name, one in saved.items()}).items():
            weight = weights[name.rpartition("/")[2]]
            # A weight's count of updates has a shape of its own.
            places[name] = (
                torch.zeros_like(weight) if shape == list(weight.shape) else torch.zeros(shape, device=self.device)
            )
            self.put(places[name], saved.get(name))
        return places

    @torch.no_grad()
    def leave(self, weights: Mapping[str, Tensor]) -> None:
        """Set weights of the model that was given, on rank 0."""
        given = dict(self.given.named_parameters())
        for name, weight in weights.items():  # none, on the others
            given[name].copy_(weight)


@contextmanager
def suited(world: World) -> Iterator[None]:
    """Set what torch holds for the whole process as a model that lies over many ranks wants it, inside the block."""
    if world.alone:
        yield
        return
    # DDP's way to split a compiled graph knows no FlexAttention, and so is off. FSDP2 fears additions in place to what
    # a block returns; the trunk makes none.
    with torch._dynamo.config.patch(optimize_ddp=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        yield


def parted(model: GPT2LMHeadModel, device: torch.device, asked: str, average: str, world: World) -> bool:
    """Tell whether each rank is to hold a part of the model: if asked to, or, for auto, if it would fill half a GPU.

    An average of the weights takes their place, which FSDP2 does not see: with one, auto leaves the model whole.
    """
    if asked != "auto" or world.alone:
        return asked == "full" and not world.alone
    free = free_memory(device) if device.type == "cuda" else None
    filled = world.any(free is not None and held(model) > free / 2)
    if filled and average != "none" and world.first:
        what = "train.plan: the model fills half a GPU and stays whole all the same: average = %s is of whole weights"
        log.warning(what, average)
    return filled and average == "none"


def held(model: GPT2LMHeadModel) -> int:
    """Return the bytes that training holds of a model, whatever the batch: only trained weights have more than one."""
    return NUMBER * (parameter_count(model) + 3 * sum(weight.numel() for weight in trained(model).values()))


def number(tensor: Tensor) -> float:
    """Return the one number of a tensor, whatever the ranks hold of it."""
    return float(_full(tensor).item())


def _full(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _given(whole: Tensor | None) -> Tensor:
    assert whole is not None, "rank 0 has every tensor"
    return whole


class _Work(nn.Module):
    """Does work in a `forward`, around which torch prepares and gathers the weights of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        """Do it."""
        return work()


def _whole(model: GPT2LMHeadModel) -> DistributedDataParallel:
    """Copy a model to each rank, from rank 0; gradients are summed while the backward pass goes on."""
    copied = DistributedDataParallel(_Work(model), forward_sync_buffers=False, gradient_as_bucket_view=True)
    copied.register_comm_hook(None, lambda _, bucket: _summed(bucket))  # torch refuses annotations that are strings
    return copied


def _summed(bucket: Any) -> torch.futures.Future[Tensor]:
    """Add up a bucket of gradients; by itself, DDP would average."""
    added = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return added.then(lambda done: done.value()[0])  # type: ignore[no-any-return]


def _sharded(model: GPT2LMHeadModel, world: World, device: torch.device) -> FSDPModule:
    """Leave a part of each weight on each rank; a block's are gathered when it is their turn, the tables' all the time.

    The trunk calls what is in a block, not the block: so that is what torch is told to look at.
    """
    mesh, gpt, work = init_device_mesh(device.type, (world.size,)), model.transformer, _Work(model)
    for block in gpt.h:
        attention, mlp = block.attn, block.mlp
        fully_shard([block.ln_1, attention.c_attn, attention.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj], mesh=mesh)
    whole: FSDPModule = fully_shard(work, mesh=mesh)
    for module in work.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
    return whole
