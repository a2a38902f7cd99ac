"""The training loop: batches in, a tuned model and a log out.

    until all steps are done, or the validation loss has stopped falling:
        rows of the step -> summed loss / supervised tokens -> gradients -> finite? -> clip -> AdamW
        now and then: the whole validation split; the best weights, or their best average, are stored
        now and then, and on a request to stop: a checkpoint, from which a killed run continues bit-identically

Nothing random outlives a step: the order of the data and the seed of dropout are functions of seed and step alone.
All ranks go through the same steps: each takes its share of a step's rows, and sums are taken over all of them.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import GPT2LMHeadModel

from tasks.errors import TrainingError
from tasks.gpt.batches import Array, Split
from tasks.gpt.forward import Trunk, hidden_states
from tasks.gpt.interrupt import Interrupted
from tasks.gpt.objective import EachToken, Objective
from tasks.gpt.optim import clip_gradients, grad_norm_squared, set_rate
from tasks.gpt.parallel import parallel_settings, scalar
from tasks.gpt.run_state import RunState, begin_run, restore_state, save_state
from tasks.gpt.schedule import learning_rate
from tasks.gpt.training_run import Machine, Progress, Settings
from tasks.progress import bar

log = logging.getLogger("treeline.train")
MAX_FAILED_SAVES = 2  # checkpoints in a row that cannot be written end a run
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
        workplace: Gets `log.jsonl` and `checkpoints/`; a run that was killed there continues. Only rank 0 uses it.
        objective: What is minimized over the same splits. None: the loss of each supervised token.

    Raises:
        TrainingError: `train.nonfinite`, before any weight is damaged; `train.checkpoint`, for one of another run.
        Interrupted: If the machine's interrupt was asked to stop; a checkpoint was saved.
    """
    devices = [machine.device] if machine.device.type == "cuda" else []
    # Each step seeds the global generators: give them back as they were.
    with torch.random.fork_rng(devices=devices), parallel_settings(machine.world):
        run = begin_run(model, objective or EachToken(train, val), settings, machine, workplace)
        restore_state(run)
        if machine.compile:
            run.objective = run.objective.filled(run.micro_batch)
        try:
            _train(run)
        except Interrupted:
            _save(run)
            raise
        _finish(run)
        return run.progress


def _train(run: RunState) -> None:
    """Take the steps that are left, until the last one or until patience ends."""
    evaluations = run.plan.evaluations(run.settings.evals_per_epoch)
    with bar("train", run.plan.total, "steps") as shown:
        shown.advance(run.progress.step)
        if run.pending is not None:
            _log_step(run, evaluations)
        while run.progress.step < run.plan.total and not _out_of_patience(run):
            began = run.machine.clock()
            rows = run.plan.rows(run.progress.step)
            measured = _update(run, rows)
            speed = len(rows) * run.objective.train.sequence_length / max(run.machine.clock() - began, 1e-9)
            run.pending = {**measured, "tokens_per_second": round(speed, 1)}
            _log_step(run, evaluations)
            _save_if_due(run)
            shown.advance(note=f"loss {measured['loss']:.3f}")
            if run.world.any(run.machine.interrupt.requested):  # on any rank: all of them stop at the same step
                raise Interrupted


def _finish(run: RunState) -> None:
    """Give the original model the best weights; without a validation split, the last ones."""
    progress = run.progress
    if progress.best_nll is not None:
        run.parallel.update_original(run.best)
        return
    if not isfinite(_weight_norm(run)):  # nothing was measured after the last update
        raise _nonfinite(run, progress.step)
    run.ema.swap_in()
    progress.best_step = progress.step
    run.parallel.update_original(run.parallel.gather(run.weights))


def _out_of_patience(run: RunState) -> bool:
    """Tell whether the validation loss has not fallen for too long."""
    return run.settings.patience is not None and run.progress.waited >= run.settings.patience


def _interruptible(run: RunState) -> AbstractContextManager[None]:
    """Open a block that may be cut off anywhere; not where other ranks would wait for this one."""
    return run.machine.interrupt.interruptible() if run.world.is_single else nullcontext()


def _autocast(run: RunState) -> torch.autocast:
    """Open a block whose matrix products are in the precision of the settings."""
    half = run.settings.precision == "bfloat16"
    return torch.autocast(run.machine.device.type, dtype=torch.bfloat16, enabled=half)


def _update(run: RunState, rows: Array) -> dict[str, float]:
    """Change the weights by one step of the optimizer; return its loss, learning rate and gradient norm."""
    settings, progress = run.settings, run.progress
    rate = learning_rate(
        progress.step,
        run.plan.total,
        peak=settings.lr,
        warmup_ratio=settings.warmup_ratio,
        min_share=settings.min_lr_ratio,
    )
    torch.manual_seed(_seed(settings.seed, progress.step, run.world.rank))
    units = run.objective.units(rows)
    with _interruptible(run):
        loss = _accumulate(run, rows, run.objective.weight(rows) or 1.0)
    gradients = run.parallel.local_gradients()
    norm = math.sqrt(run.parallel.sum_over_shards(grad_norm_squared(gradients)).item())
    if not all(isfinite(value) for value in (loss, norm, _weight_norm(run))):
        raise _nonfinite(run, progress.step + 1, loss, norm)
    clip_gradients(gradients, norm, math.inf if settings.max_grad_norm is None else settings.max_grad_norm)
    set_rate(run.optimizer, rate)
    run.optimizer.step()
    run.optimizer.zero_grad()
    progress.step += 1
    run.ema.update(progress.step)
    progress.tokens += len(rows) * run.objective.train.sequence_length
    progress.supervised += units
    return {"loss": loss, "lr": rate, "grad_norm": norm}


def _accumulate(run: RunState, rows: Array, weight: float) -> float:
    """Add up the gradients of a step in micro-batches; return its loss, nats per unit.

    The sum is divided by what the units of the whole step weigh: a token counts the same in any micro-batch.
    """
    run.model.train()
    total = torch.zeros((), device=run.machine.device)
    batches = list(run.world.shard(rows, run.micro_batch))
    for number, (batch, counts) in enumerate(batches, 1):
        with _autocast(run), run.parallel.accumulating(last=number == len(batches)):
            loss = _loss(run, batch, counts / weight, run.trunk)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return run.world.sum(total).item()  # the one wait for the device in a step, with the gradient's norm


def _loss(run: RunState, rows: Array, share: float, trunk: Trunk) -> Tensor:
    """Return the loss of some training sequences, summed over units, times `share`."""
    return run.parallel.run(lambda: run.objective.loss(run.model, rows, share, run.machine.device, trunk))


def _log_step(run: RunState, evaluations: frozenset[int]) -> None:
    """Evaluate if it is time, and write the log entry of the last step; all entries have the same fields."""
    progress = run.progress
    measured: dict[str, Any] = dict(run.pending or {})
    if progress.step in evaluations:
        with run.ema.swapped_in():  # the average, if there is one, is measured and stored; training is unchanged
            measured |= _evaluate(run)
    entry = {
        "step": progress.step,
        "epoch": round(progress.step / run.plan.per_epoch, 4),
        "tokens": progress.tokens,
        **dict.fromkeys(("loss", "lr", "grad_norm", "val_nll")),
        "seconds": round(run.seconds(), 3),
        "tokens_per_second": None,
        **measured,
    }
    run.log.write(entry)
    run.pending = None


def _evaluate(run: RunState) -> dict[str, float]:
    """Measure the whole validation split, and store the weights if they are the best; empty without a split."""
    run.model.eval()
    with _interruptible(run), _autocast(run), torch.no_grad():
        measured = run.parallel.run(
            lambda: run.objective.measure(run.model, run.micro_batch, run.machine.device, run.trunk, run.world)
        )
    if measured is None:
        return {}
    nll, progress = measured["val_nll"], run.progress
    if not isfinite(nll):
        raise TrainingError(
            f"validation loss is {nll} after step {progress.step}",
            "the validation split",
            "Lower train.lr; if this is at step 0, check the starting weights and the data",
            "train.nonfinite",
        )
    if progress.step == 0:
        progress.start_nll = nll
    if progress.best_nll is None or nll < progress.best_nll:
        progress.best_nll, progress.best_step, progress.waited = nll, progress.step, 0
        for name, weight in run.parallel.gather(run.weights).items():  # in place: two copies at once are too many
            run.best.setdefault(name, torch.empty(weight.shape, dtype=weight.dtype)).copy_(weight.detach())
    else:
        progress.waited += 1
    return measured


def _save_if_due(run: RunState) -> None:
    """Write a checkpoint if the last one is old enough; a second failure in a row ends the run."""
    began, pause = run.machine.clock(), run.machine.checkpoint_seconds
    due = began - run.saved_at >= (pause and max(pause, run.save_seconds / SAVING_SHARE))
    if not run.world.any(due and run.world.is_main):
        return
    try:
        _save(run)
        run.failed_saves = 0
    except OSError as error:  # on rank 0, which alone writes: hours of training are worth a second try
        run.failed_saves += 1
        if run.failed_saves == MAX_FAILED_SAVES:
            raise
        message = "train.checkpoint: step %d could not be saved: %s; training continues, but a second failure ends it"
        log.warning(message, run.progress.step, error)
    run.saved_at = run.machine.clock()
    run.save_seconds = run.saved_at - began


def _save(run: RunState) -> None:
    """Save the step that was done last, unless it was saved already."""
    if run.saved_step == run.progress.step:
        return
    if not isfinite(_weight_norm(run)):  # only reached if the last update made it so: the checkpoint before it stands
        raise _nonfinite(run, run.progress.step)
    save_state(run)


def _nonfinite(run: RunState, step: int, loss: float = 0.0, norm: float = 0.0) -> TrainingError:
    """Return an error that names what is not finite, and the sequences of a step, counted from 1, that cause it."""
    rows = run.plan.rows(step - 1)
    run.optimizer.zero_grad()
    causes = [f"{name} is {value}" for name, value in (("loss", loss), ("gradient norm", norm)) if not isfinite(value)]
    ruined = [name for name, weight in run.model.named_parameters() if not isfinite(scalar(weight.norm()))]
    causes += [f"weight {name} is not finite" for name in ruined[:1]]
    culprits = _nonfinite_rows(run, rows)
    ranks = sorted({int(rank) for rank in run.world.rank_of_rows(len(rows))[culprits]}) if culprits.any() else []
    which = f" on rank {', '.join(map(str, ranks))}" if ranks and not run.world.is_single else ""
    return TrainingError(
        f"{', '.join(causes)} at step {step}{which}",
        run.machine.named([int(row) for row in rows[culprits]] or sorted(int(row) for row in rows)),
        "The last checkpoint is unchanged; check these sequences, and if they look right, lower train.lr",
        "train.nonfinite",
    )


def _weight_norm(run: RunState) -> float:
    """Return the norm of all weights: finite if they are; finding the largest one takes 16 times as long."""
    return scalar(get_total_norm(list(run.model.parameters())))


@torch.no_grad()
def _nonfinite_rows(run: RunState, rows: Array) -> Array:
    """Return which of some training sequences have a loss that is not finite, as the model stands: bool."""
    run.model.eval()
    failures = torch.zeros(len(rows))
    for places, counts in run.world.shard(np.arange(len(rows)), 1):
        loss = _loss(run, rows[places], 1.0, hidden_states).item()
        failures[places] += float(counts and not isfinite(loss))
    mask: Array = run.world.sum(failures).numpy() > 0
    return mask


def _seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's dropout on a rank: neighbouring steps and seeds get unrelated ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
