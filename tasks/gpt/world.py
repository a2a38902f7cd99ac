"""The world of a run: the processes, called ranks, that do its steps together; mostly there is just one.

Each rank has a copy or a part of the model on a device of its own, takes its share of a step's sequences, and adds
up its sums with those of the others. What is decided, and what is written, is up to rank 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tasks.errors import ConfigurationError
from tasks.gpt.batches import Array

IDLE = timedelta(days=7)  # a rank that waits for an order does so while rank 0 does other steps


class Done(BaseException):
    """A rank has done its part, and rank 0 goes on alone; not an `Exception`, so that nobody takes it for a failure."""


class World:
    """The ranks of a run, seen from one of them.

    Attributes:
        rank: This one's number; 0 is the one that writes.
        size: How many there are.
        local: This one's number on its machine: that of its GPU.
        neighbours: How many there are on its machine, this one among them.
        beats: Goes up with each thing that is begun; who supervises sees by it that a rank has come to a halt.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, neighbours: int = 1) -> None:
        self.rank, self.size, self.local, self.neighbours = rank, size, local, neighbours
        self.beats = 0
        # Orders come by a way of their own: there, waiting for days is no fault.
        self.idle: Any = dist.new_group(backend="gloo", timeout=IDLE) if size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    def begin(self) -> None:
        """Note that something is begun: a sign that this rank gets on."""
        self.beats += 1

    def dealt(self, rows: Array, at_once: int) -> Iterator[tuple[Array, bool]]:
        """Yield this rank's share of some rows, `at_once` at a time, and whether they count.

        The shares are as even as can be, and lie in the order of the rows. All ranks get equally many turns, because
        they meet in each: who has no rows left takes one that is somebody else's, and must count it as nothing.
        """
        mine = rows[self.owners(len(rows)) == self.rank]
        turns = math.ceil(math.ceil(len(rows) / self.size) / at_once)
        for first in range(0, turns * at_once, at_once):
            self.begin()
            some = mine[first : first + at_once]
            yield (some, True) if len(some) else (rows[:1], False)

    def owners(self, count: int) -> Array:
        """Return which rank each of some rows is dealt to: (count,) int64."""
        return np.arange(count) * self.size // max(1, count)

    def total(self, part: Tensor) -> Tensor:
        """Add up what each rank has; the tensor is changed and returned."""
        self.begin()
        if not self.alone:
            dist.all_reduce(part)
        return part

    def any(self, mine: bool) -> bool:
        """Tell whether it is so on any rank."""
        return bool(self.total(torch.tensor(int(mine))).item())

    def least(self, mine: int) -> int:
        """Return the smallest of the ranks' numbers."""
        found = torch.tensor(mine)
        if not self.alone:
            dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found.item())

    def told(self, value: Any = None) -> Any:
        """Return the JSON value that rank 0 gives, on every rank."""
        if self.alone:
            return value
        said = torch.tensor(list(json.dumps(value).encode()) if self.first else [], dtype=torch.uint8)
        size = torch.tensor(len(said))
        dist.broadcast(size, 0, group=self.idle)
        text = said if self.first else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self.idle)
        self.begin()
        return json.loads(bytes(text.tolist()))

    def device(self, device: torch.device) -> torch.device:
        """Return this rank's device of a kind; of GPUs, each rank has its own.

        Raises:
            ConfigurationError: If there are some, but none for this rank.
        """
        if self.alone or device.type != "cuda":
            return device
        there = torch.cuda.device_count()
        number = 0 if there == 1 else self.local  # Slurm can show each process its own, alone
        if number >= there:
            raise ConfigurationError(
                f"expected a GPU for each process of this machine, found {there}",
                f"rank {self.rank}, number {self.local} of its machine",
                "Start as many processes as there are GPUs",
                "config.device",
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)


ALONE = World()
_here: ContextVar[World] = ContextVar("treeline_world", default=ALONE)


def here() -> World:
    """Return the world that this process is in."""
    return _here.get()


@contextmanager
def joined(
    rank: int,
    size: int,
    local: int,
    meeting: str = "env://",
    patience: float = 1800.0,
    neighbours: int | None = None,
) -> Iterator[World]:
    """Be a rank of a world while the block runs.

    Args:
        rank: Which one.
        size: Of how many.
        local: Which one of this machine.
        meeting: Where they find each other, as torch's `init_method`; env://: where torchrun says.
        patience: Seconds after which a rank that waits for another one gives up.
        neighbours: How many of them are on this machine. None: all.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(seconds=patience)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, timeout=wait)
    token = _here.set(World(rank, size, local, neighbours or size))
    try:
        yield here()
        dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone
    finally:
        _here.reset(token)
