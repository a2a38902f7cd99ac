"""The state of a training run: what its steps share, how far it is, and how a checkpoint holds and restores it.

Only rank 0 reads and writes checkpoints, with whole tensors; gathering and scattering them are collective calls.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GPT2LMHeadModel

from tasks.errors import TrainingError
from tasks.gpt import checkpoint
from tasks.gpt.batches import Plan
from tasks.gpt.distributed import ProcessGroup
from tasks.gpt.ema import WeightEma
from tasks.gpt.execution import changed_settings, execution_settings
from tasks.gpt.forward import Trunk, hidden_states, recomputing
from tasks.gpt.memory_model import AT_ONCE
from tasks.gpt.objective import Objective
from tasks.gpt.optim import adamw, moments, set_moments
from tasks.gpt.parallel import ParallelModel
from tasks.gpt.training_log import Logbook
from tasks.gpt.training_run import Machine, Progress, Settings
from tasks.gpt.weights import trainable_parameters

log = logging.getLogger("treeline.train")


@dataclass
class RunState:
    """A run in progress.

    Attributes:
        settings: What decides the outcome.
        machine: Where and how fast.
        objective: What is minimized.
        parallel: The model as this rank trains it.
        weights: Those that are trained, by name.
        optimizer: Of these weights.
        ema: Their average.
        plan: The sequences of each step.
        micro_batch: Sequences at once.
        trunk: The transformer's forward pass, compiled if the machine asks for it.
        log: One entry a step.
        checkpoints: Folder of the checkpoints.
        started: Clock when this process began the run, seconds.
        saved_at: Clock when the last checkpoint was written, seconds.
        progress: How far the run is.
        pending: Measured in a step whose evaluation and log entry are still to come; empty before the first step.
        best: Weights with the lowest validation loss so far, whole, on rank 0.
        saved_step: Step that was saved last, or could not be; -1: none.
        save_seconds: How long the last checkpoint took.
        failed_saves: Checkpoints in a row that could not be written.
    """

    settings: Settings
    machine: Machine
    objective: Objective
    parallel: ParallelModel
    weights: dict[str, nn.Parameter]
    optimizer: AdamW
    ema: WeightEma
    plan: Plan
    micro_batch: int
    trunk: Trunk
    log: Logbook
    checkpoints: Path
    started: float
    saved_at: float
    progress: Progress = field(default_factory=Progress)
    pending: dict[str, Any] | None = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    saved_step: int = -1
    save_seconds: float = 0.0
    failed_saves: int = 0

    @property
    def model(self) -> GPT2LMHeadModel:
        """The model that is trained: the original, or this rank's copy of it."""
        return self.parallel.model

    @property
    def world(self) -> ProcessGroup:
        """The ranks of the run."""
        return self.machine.world

    def seconds(self) -> float:
        """Return the time spent so far, over all tries."""
        return self.progress.seconds + self.machine.clock() - self.started

    def execution(self) -> dict[str, Any]:
        """Return what decides how sums are rounded."""
        return execution_settings(self.model, self.machine, self.micro_batch)


def begin_run(
    model: GPT2LMHeadModel, objective: Objective, settings: Settings, machine: Machine, workplace: Path
) -> RunState:
    """Return the state of a run before its first step."""
    parallel = ParallelModel(model, machine.world, machine.device, machine.sharded)
    weights = trainable_parameters(parallel.model)
    trunk: Trunk = recomputing if machine.activation_checkpointing else hidden_states
    now = machine.clock()
    return RunState(
        settings,
        machine,
        objective,
        parallel,
        weights,
        adamw(parallel.model, lr=settings.lr, weight_decay=settings.weight_decay),
        WeightEma(weights, settings.ema_decay),
        Plan(len(objective.train), settings.sequences, settings.epochs, settings.seed),
        machine.micro_batch or max(1, AT_ONCE // objective.train.sequence_length),
        torch.compile(trunk) if machine.compile else trunk,
        Logbook(workplace / "log.jsonl", machine.world.is_main),
        workplace / "checkpoints",
        started=now,
        saved_at=now,
    )


def save_state(run: RunState) -> None:
    """Write a checkpoint of the step that was done last."""
    progress = Progress(**{**asdict(run.progress), "seconds": run.seconds()})
    state: dict[str, Any] = {"progress": asdict(progress), "settings": asdict(run.settings)}
    state |= {"pending": run.pending, "way": run.execution()}
    tensors = {"model": run.parallel.gather(run.weights)}
    tensors |= {"optimizer": run.parallel.gather(moments(run.optimizer, run.model)), "best": run.best}
    if average := run.parallel.gather(run.ema.average):
        tensors["ema"] = average
    run.saved_step = progress.step  # on all ranks alike: they gather what is saved together
    if run.world.is_main:
        run.log.flush()
        snapshot = checkpoint.Checkpoint(progress.step, state, tensors)
        checkpoint.save(run.checkpoints, snapshot, begin=run.world.heartbeat)


def restore_state(run: RunState) -> None:
    """Continue from the last whole checkpoint; without one, from the start.

    Raises:
        TrainingError: `train.checkpoint`, if it is of a run with other settings.
    """
    newest = checkpoint.latest(run.checkpoints, run.world.heartbeat, _progress) if run.world.is_main else None
    state, tensors = run.world.broadcast(newest and newest.state), newest.tensors if newest else {}
    if state is None:
        run.log.cut_after(-1)
        return
    if state["settings"] != asdict(run.settings):
        raise TrainingError(
            "checkpoint of a run with other settings", str(run.checkpoints), "Remove it", "train.checkpoint"
        )
    for name, weight in run.weights.items():
        run.parallel.scatter(weight, tensors.get("model", {}).get(name))
    set_moments(run.optimizer, run.model, run.parallel.scatter_state(tensors.get("optimizer", {})))
    run.best = dict(tensors.get("best", {}))
    run.ema.load(run.parallel.scatter_state(tensors.get("ema", {})))
    run.progress, run.pending = _progress(state)
    run.saved_step = run.progress.step
    if (changed := changed_settings(state.get("way", {}), run.execution())) and run.world.is_main:
        log.warning("train.resume: continues with other execution settings, so the last digits may differ: %s", changed)
    run.log.cut_after(run.saved_step - (run.pending is not None))


def _progress(state: Mapping[str, Any]) -> tuple[Progress, Any]:
    """Return how far a checkpoint is, and what was measured for the log entry that is still to come.

    Raises:
        KeyError, TypeError: If other code wrote it.
    """
    Settings(**state["settings"])
    return Progress(**state["progress"]), state["pending"]
