"""Process groups for tests: `python -m tests.gpt.process_groups FOLDER NAME ...` loads torch once, forks each rank."""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.errors import TrainingError
from tasks.gpt.batches import Array, Split
from tasks.gpt.distributed import ProcessGroup, join_group
from tasks.gpt.interrupt import Interrupted
from tasks.gpt.loop import train_model
from tasks.gpt.lora import attach
from tasks.gpt.objective import EachToken
from tasks.gpt.preference import EachPair, Replies, Side
from tasks.gpt.training_run import Machine, Settings
from tasks.gpt.weights import freeze
from tests.gpt import test_loop
from tests.waiting import patience

STEP = replace(test_loop.SETTINGS, sequences=8, epochs=2)  # of 21 sequences: steps of 8, 8 and 5
MACHINE = replace(test_loop.MACHINE, micro_batch=2)
FactQuery = dict[str, Any]


def trained(
    folder: Path,
    world: ProcessGroup,
    settings: Settings = STEP,
    machine: Machine = MACHINE,
    rows: int = 21,
    **more: Any,
) -> FactQuery:
    """Train as this rank, and tell what came of it."""
    folder.mkdir(exist_ok=True)
    model = test_loop.start(0.0)
    if rank := more.pop("lora", 0):
        attach(model, rank, 2.0 * rank, seed=0)
    freeze(model, more.pop("frozen", 0))
    train, val = more.pop("train", test_loop.split(rows)), test_loop.split(5, seed=1)
    told: FactQuery = {"rank": world.rank, "torch": [held()]}
    try:
        machine = replace(machine, world=world)
        told["progress"] = vars(
            train_model(model, train, val, settings=settings, machine=machine, workplace=folder, **more)
        )
    except TrainingError as error:
        told["error"] = str(error)
    except Interrupted:
        told["interrupted"] = True
    told["torch"].append(held())
    told["weights"] = {name: weight.detach().flatten().tolist() for name, weight in model.named_parameters()}
    return told


def held() -> str:
    """What torch and Python hold for the whole process, that training sets."""
    return repr((torch._dynamo.config.optimize_ddp, warnings.filters))


def plain(folder: Path, world: ProcessGroup) -> FactQuery:
    return trained(folder, world)


def sharded(folder: Path, world: ProcessGroup) -> FactQuery:
    return trained(folder, world, machine=replace(MACHINE, sharded=True))


def recomputed(folder: Path, world: ProcessGroup) -> FactQuery:
    """Parts of the model, and blocks that are computed again on the way back."""
    return trained(folder, world, machine=replace(MACHINE, sharded=True, activation_checkpointing=True))


def even(folder: Path, world: ProcessGroup) -> FactQuery:
    """Steps that two ranks do in one turn each, and one rank in two."""
    return trained(folder, world, machine=replace(MACHINE, micro_batch=4), rows=16)


def even_sharded(folder: Path, world: ProcessGroup) -> FactQuery:
    return trained(folder, world, machine=replace(MACHINE, micro_batch=4, sharded=True), rows=16)


def averaged(folder: Path, world: ProcessGroup) -> FactQuery:
    return trained(folder, world, replace(STEP, ema_decay=0.999))


def averaged_stopped(folder: Path, world: ProcessGroup) -> FactQuery:
    return stopped(folder, world, settings=replace(STEP, ema_decay=0.999))


def frozen(folder: Path, world: ProcessGroup) -> FactQuery:
    return trained(folder, world, frozen=1)


def frozen_sharded(folder: Path, world: ProcessGroup) -> FactQuery:
    return trained(folder, world, machine=replace(MACHINE, sharded=True), frozen=1)


def adapted(folder: Path, world: ProcessGroup) -> FactQuery:
    return trained(folder, world, lora=2)


def adapted_sharded(folder: Path, world: ProcessGroup) -> FactQuery:
    return trained(folder, world, machine=replace(MACHINE, sharded=True), lora=2)


def lonely(folder: Path, world: ProcessGroup) -> FactQuery:
    """One sequence in the last step: the other ranks have none."""
    return trained(folder, world, rows=17)


def lonely_sharded(folder: Path, world: ProcessGroup) -> FactQuery:
    return trained(folder, world, machine=replace(MACHINE, sharded=True), rows=17)


def adapted_averaged(folder: Path, world: ProcessGroup) -> FactQuery:
    return trained(folder, world, replace(STEP, ema_decay=0.999), lora=2)


def preferred_sharded(folder: Path, world: ProcessGroup) -> FactQuery:
    return preferred(folder, world, replace(MACHINE, sharded=True))


def preferred(folder: Path, world: ProcessGroup, machine: Machine = MACHINE) -> FactQuery:
    """Two replies to each of some prompts, the first one better."""
    sides: list[Side] = []
    for rows in (21, 5):
        given = replace(test_loop.split(rows), mask=np.tile(np.arange(12) % 6 > 0, (rows, 1)))
        twice = np.arange(rows).repeat(2)
        replies = Replies(twice, np.full(2 * rows, 5), twice, np.tile([0, 1], rows))
        sides.append(Side(given, replies, np.full(2 * rows, -16, np.float32)))
    aim = EachPair(sides[0], sides[1], 0.1)
    return trained(folder, world, machine=machine, train=aim.train, objective=aim)


def stopped(folder: Path, world: ProcessGroup, sharded: bool = False, settings: Settings = STEP) -> FactQuery:
    """Stop all at the fourth step, because one rank was asked to."""
    machine = replace(MACHINE, sharded=sharded, interrupt=type(MACHINE.interrupt)())
    saving = replace(machine, checkpoint_seconds=0.0)
    return trained(folder, world, settings, machine=saving, objective=Asking(machine, world))


def stopped_sharded(folder: Path, world: ProcessGroup) -> FactQuery:
    return stopped(folder, world, sharded=True)


def poisoned(folder: Path, world: ProcessGroup) -> FactQuery:
    """The loss of one sequence is no number."""
    return trained(folder, world, objective=Poisoned(test_loop.split(21), test_loop.split(5, seed=1), 7))


def poisoned_sharded(folder: Path, world: ProcessGroup) -> FactQuery:
    machine = replace(MACHINE, sharded=True)
    return trained(folder, world, machine=machine, objective=Poisoned(test_loop.split(21), test_loop.split(5), 7))


class Asking(EachToken):
    """Asks to stop in the middle of the fourth step, on the last rank."""

    def __init__(self, machine: Machine, world: ProcessGroup) -> None:
        super().__init__(test_loop.split(21), test_loop.split(5, seed=1))
        object.__setattr__(self, "asks", (machine.interrupt, world, []))

    def weight(self, rows: Array) -> float:
        interrupt, world, steps = self.asks  # type: ignore[attr-defined]
        steps.append(rows)
        if len(steps) == 4 and world.rank == world.size - 1:
            interrupt.ask()
        return super().weight(rows)


class Poisoned(EachToken):
    """Makes the loss of one sequence no number."""

    def __init__(self, train: Split, val: Split, row: int) -> None:
        super().__init__(train, val)
        object.__setattr__(self, "row", row)

    def loss(self, model: Any, rows: Array, share: float, *rest: Any) -> torch.Tensor:
        found = super().loss(model, rows, share, *rest)
        return found * torch.nan if self.row in rows and share else found  # type: ignore[attr-defined]


def in_group(size: int, folder: Path, work: Callable[[Path, ProcessGroup], FactQuery]) -> list[FactQuery]:
    """Do some work on each rank of a process group of its own, and return what each reports."""
    children, meeting = [], folder.with_suffix(".meeting")
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with join_group(rank, size, rank, f"file://{meeting}", timeout=patience(60)) as world:
                    told = work(folder, world)
                folder.with_suffix(f".{rank}").write_text(json.dumps(told))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    meeting.unlink(missing_ok=True)
    assert not any(ended), ended
    return [json.loads(folder.with_suffix(f".{rank}").read_text()) for rank in range(size)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    home, told = Path(sys.argv[1]), {}
    for order in sys.argv[2:]:  # size:work:folder
        number, name, place = order.split(":")
        told[order] = in_group(int(number), home / place, globals()[name])
    print(json.dumps(told))
