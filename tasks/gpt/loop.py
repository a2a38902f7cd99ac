"""The training loop: batches in, a tuned model and a log out.

    until all steps are done, or nothing gets better:
        rows of the step -> summed loss / supervised tokens -> gradients -> finite? -> clip -> AdamW
        now and then: the whole validation split; the best weights, or their best average, are kept
        now and then: a checkpoint, from which a killed run goes on to the bit; also when asked to stop

Nothing random outlives a step: the order of the data and the seed of dropout are functions of seed and step alone.
Many ranks go through the same steps: each does its share of a step's rows, and sums are taken over all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import GPT2LMHeadModel

from tasks.errors import TrainingError
from tasks.gpt import checkpoint
from tasks.gpt.batches import Array, Plan, Split
from tasks.gpt.ema import WeightEma
from tasks.gpt.execution import changed_settings, execution_settings
from tasks.gpt.forward import Trunk, hidden_states, recomputing
from tasks.gpt.interrupt import Interrupted
from tasks.gpt.memory_model import AT_ONCE
from tasks.gpt.objective import EachToken, Objective
from tasks.gpt.optim import adamw, clip_gradients, grad_norm_squared, moments, set_moments, set_rate
from tasks.gpt.parallel import ParallelModel, parallel_settings, scalar
from tasks.gpt.schedule import learning_rate
from tasks.gpt.training_log import Logbook
from tasks.gpt.training_run import Machine, Progress, Settings
from tasks.gpt.weights import trainable_parameters
from tasks.progress import bar

log = logging.getLogger("treeline.train")
PATIENT = 2  # checkpoints that cannot be written, one after another, end a run
SAVING_SHARE = 0.1  # of the time at most: a large model on a slow disk is saved less often than asked for


def train_model(
    model: GPT2LMHeadModel,
    train: Split,
    val: Split,
    *,
    settings: Settings,
    machine: Machine,
    workplace: Path,
    objective: Objective | None = None,
) -> Progress:
    """Tune a model; afterwards it holds, on rank 0, the weights that were best on the validation split.

    Args:
        model: At its starting weights, with its dropout set.
        train: At least one sequence.
        val: May be empty: then the last weights are the best.
        settings: What decides the outcome.
        machine: Where and how fast.
        workplace: Gets `log.jsonl` and `checkpoints/`; a run that was killed there goes on. Only rank 0 uses it.
        objective: What is made small over the same splits. None: the loss of each supervised token.

    Raises:
        TrainingError: `train.nonfinite`, before any weight takes harm; `train.checkpoint`, for one of another run.
        Interrupted: When the machine's interrupt is asked; a checkpoint was saved.
    """
    devices = [machine.device] if machine.device.type == "cuda" else []
    # Each step seeds the global generators: give them back as they were.
    with torch.random.fork_rng(devices=devices), parallel_settings(machine.world):
        aim = objective or EachToken(train, val)
        return _Run(model, aim, settings=settings, machine=machine, workplace=workplace).to_the_end()


class _Run:
    """One run: the objects that its steps share."""

    def __init__(
        self, model: GPT2LMHeadModel, objective: Objective, *, settings: Settings, machine: Machine, workplace: Path
    ) -> None:
        self.objective, self.settings, self.machine, self.world = objective, settings, machine, machine.world
        self.parallel = ParallelModel(model, self.world, machine.device, machine.sharded)
        self.model = model = self.parallel.model
        self.train = train = objective.train
        self.plan = Plan(len(train), settings.sequences, settings.epochs, settings.seed)
        self.evaluations = self.plan.evaluations(settings.evals_per_epoch)
        self.weights = trainable_parameters(model)
        self.ema = WeightEma(self.weights, settings.ema_decay)
        self.optimizer = adamw(model, lr=settings.lr, weight_decay=settings.weight_decay)
        self.at_once = machine.micro_batch or max(1, AT_ONCE // train.sequence_length)
        self.progress = Progress()
        self.pending: dict[str, Any] | None = {}  # measured in a step whose evaluation and entry are still to come
        self.kept = -1  # step that was saved last, or could not be
        self.unsaved = 0  # how many could not be saved, one after another
        self.best: dict[str, Tensor] = {}
        self.log = Logbook(workplace / "log.jsonl", self.world.is_main)
        self.checkpoints = workplace / "checkpoints"
        self.started = self.saved = machine.clock()
        self.saving = 0.0
        self.trunk: Trunk = recomputing if machine.activation_checkpointing else hidden_states
        if machine.compile:
            self.trunk = torch.compile(self.trunk)

    def to_the_end(self) -> Progress:
        """Go through all steps, or until patience ends."""
        self.resume()
        if self.machine.compile:
            self.objective = self.objective.filled(self.at_once)
        try:
            self.go_on()
        except Interrupted:
            self.save()
            raise
        if self.progress.best_nll is not None:
            self.parallel.update_original(self.best)
        elif not isfinite(self.length()):  # nothing was measured after the last update
            raise self.nonfinite(self.progress.step)
        else:
            self.ema.swap_in()
            self.progress.best_step = self.progress.step
            self.parallel.update_original(self.parallel.gather(self.weights))
        return self.progress

    def go_on(self) -> None:
        """Do what is left to do."""
        progress = self.progress
        with bar("train", self.plan.total, "steps") as shown:
            shown.advance(progress.step)
            if self.pending is not None:
                self.complete()
            while progress.step < self.plan.total and not self.out_of_patience():
                entry = self.advance()
                shown.advance(note=f"loss {entry['loss']:.3f}")
                self.check()

    def check(self) -> None:
        """Raise `Interrupted` if somebody asked, on any rank: all of them stop at the same step."""
        if self.world.any(self.machine.interrupt.asked):
            raise Interrupted

    def loose(self) -> AbstractContextManager[None]:
        """Open a block that may be cut off anywhere; not where other ranks would wait for this one."""
        return self.machine.interrupt.loose() if self.world.is_single else nullcontext()

    def out_of_patience(self) -> bool:
        """Tell whether the validation loss has not fallen for too long."""
        return self.settings.patience is not None and self.progress.waited >= self.settings.patience

    def advance(self) -> dict[str, Any]:
        """Do one step with all that belongs to it, and return its entry in the log."""
        began = self.machine.clock()
        rows = self.plan.rows(self.progress.step)
        measured = self.update(rows)
        took = self.machine.clock() - began
        speed = len(rows) * self.train.sequence_length / max(took, 1e-9)
        self.pending = {**measured, "tokens_per_second": round(speed, 1)}
        entry = self.complete()
        self.save_now_and_then()
        return entry

    def complete(self) -> dict[str, Any]:
        """Evaluate if it is time, and write down what a step has come to."""
        found = self.evaluate() if self.progress.step in self.evaluations else {}
        entry = self.entry(**(self.pending or {}), **found)
        self.log.write(entry)
        self.pending = None
        return entry

    def update(self, rows: Array) -> dict[str, float]:
        """Change the weights by one step of the optimizer."""
        settings, progress = self.settings, self.progress
        rate = learning_rate(
            progress.step,
            self.plan.total,
            peak=settings.lr,
            warmup_ratio=settings.warmup_ratio,
            min_share=settings.min_lr_ratio,
        )
        torch.manual_seed(_seed(settings.seed, progress.step, self.world.rank))
        wanted = self.objective.units(rows)
        with self.loose():
            loss = self.accumulate(rows, self.objective.weight(rows) or 1.0)
        gradients = self.parallel.local_gradients()
        norm = math.sqrt(self.parallel.sum_over_shards(grad_norm_squared(gradients)).item())
        if not all(isfinite(found) for found in (loss, norm, self.length())):
            raise self.nonfinite(progress.step + 1, loss, norm)
        clip_gradients(gradients, norm, math.inf if settings.max_grad_norm is None else settings.max_grad_norm)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        self.ema.update(progress.step)
        progress.tokens += len(rows) * self.train.sequence_length
        progress.supervised += wanted
        return {"loss": loss, "lr": rate, "grad_norm": norm}

    def accumulate(self, rows: Array, weight: float) -> float:
        """Add up the gradients of a step in micro-batches; return its loss, nats per unit.

        The sum is divided by what the units of the whole step weigh: a token counts the same in any micro-batch.
        """
        self.model.train()
        total = torch.zeros((), device=self.machine.device)
        turns = list(self.world.shard(rows, self.at_once))
        for turn, (some, counts) in enumerate(turns, 1):
            with self.autocast(), self.parallel.accumulating(last=turn == len(turns)):
                loss = self.loss_of(some, counts / weight, self.trunk)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return self.world.sum(total).item()  # the one wait for the device in a step, with the gradient's norm

    def loss_of(self, rows: Array, share: float, trunk: Trunk) -> Tensor:
        """Return the loss of some training sequences, summed over units, times `share`."""
        return self.parallel.run(lambda: self.objective.loss(self.model, rows, share, self.machine.device, trunk))

    def evaluate(self) -> dict[str, float]:
        """Measure the whole validation split, and keep the weights if they are the best; nothing without a split.

        Where an average is asked for, it is measured and kept, not the weights that training goes on from.
        """
        with self.ema.swapped_in():
            return self.measure()

    def measure(self) -> dict[str, float]:
        """Measure the validation split as the weights stand, and keep them if they are the best."""
        self.model.eval()
        with self.loose(), self.autocast():
            measured = self.asked()
        if measured is None:
            return {}
        nll, progress = measured["val_nll"], self.progress
        if not isfinite(nll):
            raise TrainingError(
                f"validation loss is {nll} after step {progress.step}",
                "the validation split",
                "Lower train.lr; if it was so at step 0, look at the starting weights and at the data",
                "train.nonfinite",
            )
        if progress.step == 0:
            progress.start_nll = nll
        if progress.best_nll is None or nll < progress.best_nll:
            progress.best_nll, progress.best_step, progress.waited = nll, progress.step, 0
            found = self.parallel.gather(self.weights)
            for name, weight in found.items():  # into the memory of those before: two copies at once are too many
                self.best.setdefault(name, torch.empty(weight.shape, dtype=weight.dtype)).copy_(weight.detach())
        else:
            progress.waited += 1
        return measured

    @torch.no_grad()
    def asked(self) -> dict[str, float] | None:
        """Return what the objective finds in the validation split."""
        device = self.machine.device
        return self.parallel.run(
            lambda: self.objective.measure(self.model, self.at_once, device, self.trunk, self.world)
        )

    def autocast(self) -> torch.autocast:
        """Open a block in which products are in the precision that is asked for."""
        return torch.autocast(
            self.machine.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bfloat16"
        )

    def entry(self, **measured: float | None) -> dict[str, Any]:
        """Return an entry of the log: one shape, whether before the first step, at a step or at an evaluation."""
        progress = self.progress
        blank = dict.fromkeys(("loss", "lr", "grad_norm", "val_nll"))
        told = {
            "step": progress.step,
            "epoch": round(progress.step / self.plan.per_epoch, 4),
            "tokens": progress.tokens,
        }
        seconds = round(progress.seconds + self.machine.clock() - self.started, 3)
        return {**told, **blank, "seconds": seconds, "tokens_per_second": None, **measured}

    def nonfinite(self, step: int, loss: float = 0.0, norm: float = 0.0) -> TrainingError:
        """Say what is no finite number, and which sequences of a step, counted from 1, made it so."""
        rows = self.plan.rows(step - 1)
        self.optimizer.zero_grad()
        found = [
            f"{name} is {value}" for name, value in (("loss", loss), ("gradient norm", norm)) if not isfinite(value)
        ]
        ruined = [name for name, weight in self.model.named_parameters() if not isfinite(scalar(weight.norm()))]
        found += [f"weight {name} is not finite" for name in ruined[:1]]
        guilty = self.guilty(rows)
        ranks = sorted({int(rank) for rank in self.world.rank_of_rows(len(rows))[guilty]}) if guilty.any() else []
        which = f" on rank {', '.join(map(str, ranks))}" if ranks and not self.world.is_single else ""
        named = [int(row) for row in rows[guilty]] or sorted(int(row) for row in rows)
        return TrainingError(
            f"{', '.join(found)} at step {step}{which}",
            self.machine.named(named),
            "The last checkpoint is as it was; look at these, and if nothing is odd there, lower train.lr",
            "train.nonfinite",
        )

    def length(self) -> float:
        """Return the length of the weights as one vector: finite if they are; their largest takes 16 times as long."""
        return scalar(get_total_norm(list(self.model.parameters())))

    @torch.no_grad()
    def guilty(self, rows: Array) -> Array:
        """Tell of each of some training sequences whether its loss is no finite number as the model stands: bool."""
        self.model.eval()
        odd = torch.zeros(len(rows))
        for places, counts in self.world.shard(np.arange(len(rows)), 1):
            loss = self.loss_of(rows[places], 1.0, hidden_states).item()
            odd[places] += float(counts and not isfinite(loss))
        found: Array = self.world.sum(odd).numpy() > 0
        return found

    def save_now_and_then(self) -> None:
        """Write a checkpoint if the last one is long enough ago."""
        began, pause = self.machine.clock(), self.machine.checkpoint_seconds
        due = began - self.saved >= (pause and max(pause, self.saving / SAVING_SHARE))
        if self.world.any(due and self.world.is_main):
            try:
                self.save()
                self.unsaved = 0
            except OSError as error:  # on rank 0, which alone writes: hours of training are worth a second try
                self.unsaved += 1
                if self.unsaved == PATIENT:
                    raise
                what = "train.checkpoint: step %d could not be saved: %s; training goes on, but not a second time"
                log.warning(what, self.progress.step, error)
            self.saved = self.machine.clock()
            self.saving = self.saved - began

    def save(self) -> None:
        """Write a checkpoint of the step that was done last, unless there is one."""
        if self.kept == self.progress.step:
            return
        if not isfinite(self.length()):  # only reached if the last update made it so: the checkpoint before it stands
            raise self.nonfinite(self.progress.step)
        seconds = self.progress.seconds + self.machine.clock() - self.started
        now = Progress(**{**asdict(self.progress), "seconds": seconds})
        state: dict[str, Any] = {"progress": asdict(now), "settings": asdict(self.settings)}
        state |= {"pending": self.pending, "way": self.way()}
        tensors = {"model": self.parallel.gather(self.weights)}
        tensors |= {"optimizer": self.parallel.gather(moments(self.optimizer, self.model)), "best": self.best}
        if ema := self.parallel.gather(self.ema.average):
            tensors["ema"] = ema
        self.kept = now.step  # on all ranks alike: they gather what is saved together
        if self.world.is_main:
            self.log.flush()
            found = checkpoint.Checkpoint(now.step, state, tensors)
            checkpoint.save(self.checkpoints, found, begin=self.world.heartbeat)

    def way(self) -> dict[str, Any]:
        """Return how the run is computed."""
        return execution_settings(self.model, self.machine, self.at_once)

    def resume(self) -> None:
        """Go on from the last whole checkpoint; without one, from the start."""
        found = checkpoint.latest(self.checkpoints, self.world.heartbeat, _progress) if self.world.is_main else None
        state, tensors = self.world.broadcast(found and found.state), found.tensors if found else {}
        if state is None:
            self.log.cut_after(-1)
            return
        if state["settings"] != asdict(self.settings):
            raise TrainingError(
                "checkpoint of a run with other settings", str(self.checkpoints), "Remove it", "train.checkpoint"
            )
        for name, weight in self.weights.items():
            self.parallel.scatter(weight, tensors.get("model", {}).get(name))
        set_moments(self.optimizer, self.model, self.parallel.scatter_state(tensors.get("optimizer", {})))
        self.best = dict(tensors.get("best", {}))
        self.ema.load(self.parallel.scatter_state(tensors.get("ema", {})))
        self.progress, self.pending = _progress(state)
        self.kept = self.progress.step
        if (otherwise := changed_settings(state.get("way", {}), self.way())) and self.world.is_main:
            log.warning("train.resume: goes on otherwise than it began, so its last digits may differ: %s", otherwise)
        self.log.cut_after(self.kept - (self.pending is not None))


def _progress(state: Mapping[str, Any]) -> tuple[Progress, Any]:
    """Return how far a checkpoint is, and the entry of the log that is still to come.

    Raises:
        KeyError, TypeError: If other code wrote it.
    """
    Settings(**state["settings"])
    return Progress(**state["progress"]), state["pending"]


def _seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's dropout on a rank: neighbouring steps and seeds get unrelated ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
