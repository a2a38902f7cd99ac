"""Exact resume, with processes that are really killed: `kill -9` runs no `finally`, flushes nothing, asks nobody."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.gpt.batches import Split
from tasks.gpt.loop import train_model
from tasks.gpt.weights import build_start, scratch_spec, set_dropout
from tests.gpt.test_loop import BLOCK, MACHINE, SETTINGS, split
from tests.waiting import run

ROOT = Path(__file__).parents[2]
POINTS = 30
# Torch is loaded once; each run is a fork, killed by a listener or left to end.
TRIALS = """
import hashlib, json, os, signal, sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
import torch
from tasks.progress import listening
from tests.gpt.test_loop import MACHINE, SETTINGS, run
torch.set_num_threads(1)
settings = replace(SETTINGS, epochs=int(sys.argv[2]) / 3, evals_per_epoch=1, ema_decay=float(sys.argv[3]) or None)
machine = replace(MACHINE, checkpoint_seconds=0.0)

class Killer:
    def __init__(self, after): self.left = after + 1
    @contextmanager
    def bar(self, label, total, unit): yield self
    def advance(self, amount=1, note=""):
        self.left -= 1  # the first call comes before the first step
        if self.left == 0: os.kill(os.getpid(), signal.SIGKILL)

def forked(folder, after):
    child = os.fork()
    if child == 0:
        with nullcontext() if after is None else listening(Killer(after)):
            weights, progress, log = run(folder, settings, machine)
        numbers = [entry[name] for entry in log for name in ("loss", "grad_norm", "val_nll")]
        digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
        exact = [number if number is None else float(number).hex() for number in numbers]
        (folder / "end.json").write_text(json.dumps([exact, digest]))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

here, points = Path(sys.argv[1]), int(sys.argv[2])
told = []
for point in [None, *range(points)]:
    folder = here / str(point)
    killed = None if point is None else forked(folder, point)
    told.append([killed, forked(folder, None), json.loads((folder / "end.json").read_text())])
print(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "points"), [(0.0, POINTS), (0.9, 6)])
def test_killed_with_nine_after_any_step_it_ends_the_same_to_the_bit(tmp_path: Path, decay: float, points: int) -> None:
    asked = [sys.executable, "-c", TRIALS, str(tmp_path), str(points), str(decay)]
    done = run(asked, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (_, _, whole), *cut = json.loads(done.stdout)
    assert len(whole[0]) == 3 * (points + 1)
    assert [(killed, ended) for killed, ended, _ in cut] == [(-9, 0)] * points
    assert [end == whole for _, _, end in cut] == [True] * points


# The whole step, down to the file of weights: trained whole, then killed after each of some steps and resumed.
STEP_TRIALS = """
import hashlib, json, os, signal, sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tasks.progress import listening
from tasks.train import TrainParams, train
from tests.test_train import MORE, RUN, tokens_in
here = Path(sys.argv[1])
tokens, params = tokens_in(here / "tokens"), TrainParams(**MORE)
run = RUN.model_copy(update={"checkpoint_seconds": 0.0})

class Killer:
    def __init__(self, after): self.left = after
    @contextmanager
    def bar(self, label, total, unit): yield self
    def advance(self, amount=1, note=""):
        self.left -= bool(note)  # a step is told with its loss
        if self.left == 0: os.kill(os.getpid(), signal.SIGKILL)

def forked(out, after):
    out.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        with nullcontext() if after is None else listening(Killer(after)):
            train.function(out, tokens, params, run)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

reports = []
for after in [None, 2, 4]:
    out = here / str(after)
    killed = None if after is None else forked(out, after)
    resumed_from = max((path.name for path in (out / "checkpoints").glob("step-*")), default="") if after else ""
    ended = forked(out, None)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    exact = [float(entry[name] or 0).hex() for entry in log for name in ("loss", "grad_norm", "val_nll")]
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    reports.append([killed, resumed_from, ended, exact, digest])
print(json.dumps(reports))
"""


@pytest.mark.slow
def test_a_train_step_that_is_killed_and_resumed_writes_the_same_model_to_the_bit(tmp_path: Path) -> None:
    asked = [sys.executable, "-c", STEP_TRIALS, str(tmp_path)]
    done = run(asked, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    whole, *resumed = json.loads(done.stdout)
    assert [report[:3] for report in resumed] == [[-9, "step-00000002", 0], [-9, "step-00000004", 0]]
    assert [report[3:] for report in resumed] == [whole[3:]] * 2


def test_across_thread_counts_losses_agree_to_five_digits(tmp_path: Path) -> None:
    spec = scratch_spec(layers=2, heads=2, width=128, positions=BLOCK * 4, vocab_size=512, seed=0)
    train, losses = repeated(split(), 4), {}
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = build_start(spec)
        set_dropout(model, 0.0)
        (tmp_path / str(threads)).mkdir()
        settings = replace(SETTINGS, lr=1e-3)
        machine = replace(MACHINE, micro_batch=8)
        train_model(model, train, split(0), settings=settings, machine=machine, workplace=tmp_path / str(threads))
        lines = (tmp_path / str(threads) / "log.jsonl").read_text().splitlines()
        losses[threads] = [json.loads(line)["loss"] for line in lines[1:]]
    torch.set_num_threads(before)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)


def repeated(given: Split, times: int) -> Split:
    """The same sequences, several in one row: wide enough for torch to share the work out."""
    ids, mask, positions = (
        array.repeat(times, axis=0).reshape(len(given), -1) for array in (given.ids, given.mask, given.positions)
    )
    offsets = BLOCK * np.arange(times)[None, :, None]
    ends = given.ends.repeat(times, axis=0).reshape(len(given), times, -1) + offsets
    return Split(ids, mask, positions, ends.reshape(len(given), -1))
