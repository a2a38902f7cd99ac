"""The process group of a run: the ranks that do its steps together; mostly there is just one.

Each rank has a copy or a shard of the model on a device of its own, takes its share of a step's sequences, and sums
with the others. Rank 0 decides, and it alone writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tasks.errors import ConfigurationError
from tasks.gpt.batches import Array

JOB_TIMEOUT = timedelta(days=7)  # under torchrun, ranks wait for a job while rank 0 runs the other steps


class WorkerDone(BaseException):
    """A rank other than 0 has done its part; not an `Exception`, so that nobody takes it for a failure."""


class ProcessGroup:
    """The ranks of a run, seen from one of them.

    Attributes:
        rank: This one's number; rank 0 is the one that writes.
        size: Number of ranks.
        local_rank: This rank's number on its machine, which is that of its GPU.
        local_size: Number of ranks on its machine.
        heartbeats: Rises with each piece of work that begins, so that a supervisor can tell a hang.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.heartbeats = 0
        # Jobs are broadcast in a group of their own: there, waiting for days is no fault.
        self._jobs: Any = dist.new_group(backend="gloo", timeout=JOB_TIMEOUT) if size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    def heartbeat(self) -> None:
        """Note that a piece of work begins, as a sign of progress."""
        self.heartbeats += 1

    def shard(self, rows: Array, batch_size: int) -> Iterator[tuple[Array, bool]]:
        """Yield batches of this rank's share of some rows, and whether they count.

        The shares are as even as can be, and in the order of the rows. All ranks get equally many batches, because
        they meet in each: a rank without rows left takes another rank's row, and must count it as nothing.
        """
        own = rows[self.rank_of_rows(len(rows)) == self.rank]
        batches = math.ceil(math.ceil(len(rows) / self.size) / batch_size)
        for first in range(0, batches * batch_size, batch_size):
            self.heartbeat()
            batch = own[first : first + batch_size]
            yield (batch, True) if len(batch) else (rows[:1], False)

    def rank_of_rows(self, count: int) -> Array:
        """Return the rank that each of some rows is assigned to: (count,) int64."""
        return np.arange(count) * self.size // max(1, count)

    def sum(self, part: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it."""
        self.heartbeat()
        if not self.is_single:
            dist.all_reduce(part)
        return part

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank."""
        return bool(self.sum(torch.tensor(int(flag))).item())

    def min(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        smallest = torch.tensor(number)
        if not self.is_single:
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest.item())

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's JSON value, on every rank."""
        if self.is_single:
            return value
        encoded = torch.tensor(list(json.dumps(value).encode()) if self.is_main else [], dtype=torch.uint8)
        size = torch.tensor(len(encoded))
        dist.broadcast(size, 0, group=self._jobs)
        text = encoded if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self._jobs)
        self.heartbeat()
        return json.loads(bytes(text.tolist()))

    def device(self, device: torch.device) -> torch.device:
        """Return this rank's device of a kind; each rank has a GPU of its own.

        Raises:
            ConfigurationError: If there are GPUs, but none for this rank.
        """
        if self.is_single or device.type != "cuda":
            return device
        count = torch.cuda.device_count()
        index = 0 if count == 1 else self.local_rank  # Slurm can show each process its own GPU, alone
        if index >= count:
            raise ConfigurationError(
                f"expected a GPU for each process of this machine, found {count}",
                f"rank {self.rank}, local rank {self.local_rank}",
                "Start as many processes as there are GPUs",
                "config.device",
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)


SINGLE = ProcessGroup()
_current: ContextVar[ProcessGroup] = ContextVar("treeline_process_group", default=SINGLE)


def current_group() -> ProcessGroup:
    """Return the process group that this process belongs to."""
    return _current.get()


@contextmanager
def join_group(
    rank: int,
    size: int,
    local_rank: int,
    init_method: str = "env://",
    timeout: float = 1800.0,
    local_size: int | None = None,
) -> Iterator[ProcessGroup]:
    """Belong to a process group while the block runs.

    Args:
        rank: This process's number.
        size: Number of ranks.
        local_rank: This process's number on its machine.
        init_method: Where the ranks meet, as for `init_process_group`; env://: as torchrun's variables say.
        timeout: Seconds after which a rank stops waiting for another one.
        local_size: Number of ranks on this machine. None: all.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(seconds=timeout)
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size, timeout=wait)
    token = _current.set(ProcessGroup(rank, size, local_rank, local_size or size))
    try:
        yield current_group()
        with suppress(RuntimeError):  # the ranks leave one by one; that another one is gone no longer matters
            dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone
    finally:
        _current.reset(token)
