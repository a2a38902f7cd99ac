"""How a model is laid out over ranks: on a single one, as a copy on each (DDP), or as a shard on each (FSDP2).

Checkpoints hold whole tensors, so any other layout can read them. Gradients are summed over ranks, not averaged: the
loss is already divided by the units of the whole step.
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
from tasks.gpt.distributed import ProcessGroup
from tasks.gpt.weights import parameter_count, trainable_parameters

log = logging.getLogger("treeline.train")
T = TypeVar("T")
WEIGHT_BYTES = 4  # float32; a trained weight also has a gradient and two moments of that size


class ParallelModel:
    """A model as this rank trains it.

    Attributes:
        model: The one to train: the original, or a copy of it where each rank holds a shard.
        sharded: Whether each rank holds a shard.
    """

    def __init__(
        self, model: GPT2LMHeadModel, world: ProcessGroup, device: torch.device, sharded: bool = False
    ) -> None:
        self.original, self.world, self.device = model, world, device
        self.sharded = sharded and not world.is_single
        self.model: GPT2LMHeadModel = (copy.deepcopy(model) if self.sharded else model).to(device)
        self.module: Any = (
            None if world.is_single else _fsdp(self.model, world, device) if self.sharded else _ddp(self.model)
        )

    def run(self, work: Callable[[], T]) -> T:
        """Do work that needs all of the model's weights; a collective call."""
        if self.module is None or not (self.sharded or torch.is_grad_enabled()):
            return work()
        result: T = self.module(work)
        if self.sharded and not torch.is_grad_enabled():
            self.module.reshard()  # else done by the backward pass
        return result

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Open the block of one micro-batch; DDP sums gradients over ranks in the last one only."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    @torch.no_grad()
    def local_gradients(self) -> list[Tensor]:
        """Return this rank's shard of the gradient of each weight that has one; changing it changes the gradient."""
        gradients = (weight.grad for weight in self.model.parameters() if weight.grad is not None)
        return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]

    def sum_over_shards(self, part: Tensor) -> Tensor:
        """Sum what was computed from shards of weights; of whole weights, each rank has the sum already."""
        return self.world.sum(part) if self.sharded else part

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors on rank 0, nothing on the others; a collective call."""
        if not self.sharded:
            return dict(tensors) if self.world.is_main else {}
        gathered = {}
        for name, tensor in tensors.items():
            self.world.heartbeat()
            full = _full(tensor)
            if self.world.is_main:
                gathered[name] = full.to("cpu")
        return gathered

    @torch.no_grad()
    def scatter(self, target: Tensor, source: Tensor | None) -> None:
        """Set a tensor, whole or sharded, to rank 0's whole `source`; a collective call."""
        self.world.heartbeat()
        if self.world.is_single:
            target.copy_(_required(source))
        elif isinstance(target, DTensor):
            blank = torch.empty(target.shape, dtype=target.dtype, device=self.device)
            full = _required(source).to(blank) if self.world.is_main else blank
            target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
        else:
            if self.world.is_main:
                target.copy_(_required(source))
            dist.broadcast(target, 0)

    def scatter_state(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return state of weights, named `exp_avg/...`, as this rank holds it, from rank 0's whole tensors."""
        if self.world.is_single:
            return dict(saved)
        weights, state = dict(self.model.named_parameters()), {}
        for name, shape in self.world.broadcast({name: list(tensor.shape) for name, tensor in saved.items()}).items():
            weight = weights[name.rpartition("/")[2]]
            # A weight's count of updates has a shape of its own.
            state[name] = (
                torch.zeros_like(weight) if shape == list(weight.shape) else torch.zeros(shape, device=self.device)
            )
            self.scatter(state[name], saved.get(name))
        return state

    @torch.no_grad()
    def update_original(self, weights: Mapping[str, Tensor]) -> None:
        """Set weights of the original model, on rank 0."""
        originals = dict(self.original.named_parameters())
        for name, weight in weights.items():  # none, on the others
            originals[name].copy_(weight)


@contextmanager
def parallel_settings(world: ProcessGroup) -> Iterator[None]:
    """Set torch's process-wide settings for a model on several ranks, inside the block."""
    if world.is_single:
        yield
        return
    # DDP's splitting of a compiled graph does not know FlexAttention. FSDP2 warns of in-place additions to what a
    # block returns; the forward pass makes none.
    with torch._dynamo.config.patch(optimize_ddp=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        yield


def should_shard(model: GPT2LMHeadModel, device: torch.device, sharding: str, ema: bool, world: ProcessGroup) -> bool:
    """Return whether each rank holds a shard of the model: if set so, or, for auto, if it would fill half a GPU.

    An average of the weights is swapped in for them, which FSDP2 does not see: with one, auto keeps the model whole.
    """
    if sharding != "auto" or world.is_single:
        return sharding == "full" and not world.is_single
    free = free_memory(device) if device.type == "cuda" else None
    filled = world.any(free is not None and training_bytes(model) > free / 2)
    if filled and ema and world.is_main:
        log.warning("train.plan: the model fills half a GPU, but is not sharded: ema_decay needs whole weights")
    return filled and not ema


def training_bytes(model: GPT2LMHeadModel) -> int:
    """Return the bytes of weights, gradients and moments in training, whatever the batch."""
    return WEIGHT_BYTES * (
        parameter_count(model) + 3 * sum(weight.numel() for weight in trainable_parameters(model).values())
    )


def scalar(tensor: Tensor) -> float:
    """Return the value of a tensor of one element, whole or sharded."""
    return float(_full(tensor).item())


def _full(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "rank 0 has every tensor"
    return tensor


class _Forward(nn.Module):
    """Does work in `forward`, around which DDP and FSDP2 synchronize and gather the weights of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        """Call `work`."""
        return work()


def _ddp(model: GPT2LMHeadModel) -> DistributedDataParallel:
    """Copy a model from rank 0 to each rank; gradients are summed during the backward pass."""
    replica = DistributedDataParallel(_Forward(model), forward_sync_buffers=False, gradient_as_bucket_view=True)
    replica.register_comm_hook(None, lambda _, bucket: _sum_bucket(bucket))  # torch refuses string annotations
    return replica


def _sum_bucket(bucket: Any) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over ranks; by default, DDP would average."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]


def _fsdp(model: GPT2LMHeadModel, world: ProcessGroup, device: torch.device) -> FSDPModule:
    """Leave a shard of each weight on each rank; a block is gathered when it runs, the embeddings stay gathered.

    The forward pass calls the modules in a block, not the block, so those are what is wrapped.
    """
    mesh, gpt, forward = init_device_mesh(device.type, (world.size,)), model.transformer, _Forward(model)
    for block in gpt.h:
        attention, mlp = block.attn, block.mlp
        fully_shard([block.ln_1, attention.c_attn, attention.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj], mesh=mesh)
    root: FSDPModule = fully_shard(forward, mesh=mesh)
    for module in forward.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
    return root
