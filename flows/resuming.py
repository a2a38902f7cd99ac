"""Kill and compare: does a training run that is killed and resumed end the same to the bit, on this machine?

Each trial is a process in a session of its own, on a short run of the recipe's train step. The one that is to die sends
itself `kill -9`, which nothing can catch or tidy up after, and a second one goes on in the folder that it left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks.artifacts import Tokens, write_encoding
from tasks.errors import TrainingError, TreelineError
from tasks.progress import listening, track
from tasks.step import ROOT
from tasks.store.canonical import sha256_file
from tasks.store.folders import CHECKPOINTS
from tasks.store.manifest import read_manifest
from tasks.train import TrainParams, TrainRuntime, train


@dataclass(frozen=True)
class Ending:
    """What a run came to: each loss and gradient norm in full, and the digest of its weights."""

    losses: tuple[str, ...]
    weights: str


@dataclass(frozen=True)
class Trial:
    """One comparison with the uninterrupted run.

    Attributes:
        killed: After which step; None where nothing was killed: that only tells whether the machine repeats itself.
        resumed: The step of the checkpoint that was there to go on from.
        losses: Whether every loss and gradient norm was the same, to the bit.
        weights: Whether the final weights were.
    """

    killed: int | None
    resumed: int | None
    losses: bool
    weights: bool

    @property
    def same(self) -> bool:
        """Whether nothing differed."""
        return self.losses and self.weights


def trials(tokens: Tokens, params: TrainParams, run: TrainRuntime, points: int, scratch: Path) -> list[Trial]:
    """Train uninterrupted, again, and with a kill at each of some points; compare.

    Args:
        tokens: To train on; only read.
        params: Of the train step; the run is cut to two steps a point and two more.
        run: Where to train; checkpoints are taken after each step.
        points: How many kills, spread evenly.
        scratch: An empty folder; needs room for some checkpoints.

    Raises:
        TrainingError: If a trial ended other than planned.
    """
    steps = 2 * points + 2
    given = shortened(tokens, params, scratch / "tokens")
    order = {
        "tokens": str(given.path),
        "params": short(params, given, steps).model_dump(mode="json"),
        "run": run.model_copy(update={"checkpoint_seconds": 0.0}).model_dump(mode="json"),
    }
    whole = _ended(order, scratch / "whole")
    kills = [None, *(2 * point for point in range(1, points + 1))]
    return [
        _tried(order, scratch / f"trial-{kill}", kill, whole) for kill in track(kills, "verify", len(kills), "runs")
    ]


def shortened(tokens: Tokens, params: TrainParams, folder: Path) -> Tokens:
    """Return the same tokens with a validation split of one step's size: a trial is about training."""
    folder.mkdir()
    for file in tokens.files:
        if file != "encoding.json":
            (folder / file).symlink_to(tokens.path.absolute() / file)
    encoding = tokens.encoding()
    first, last = encoding.splits["val"]
    last = min(last, first + max(1, params.batch_tokens // encoding.length))
    write_encoding(folder, replace(encoding, splits={**encoding.splits, "val": (first, last)}))
    (folder / "manifest.json").symlink_to(tokens.path.absolute() / "manifest.json")
    return Tokens(folder, tokens.manifest)


def short(params: TrainParams, tokens: Tokens, steps: int) -> TrainParams:
    """Return the same settings for so many steps."""
    encoding = tokens.encoding()
    first, last = encoding.splits["train"]
    per_epoch = -(-(last - first) // max(1, params.batch_tokens // encoding.length))
    return params.model_copy(update={"epochs": steps / max(1, per_epoch), "targets": None, "patience": None})


def _tried(order: dict[str, Any], out: Path, kill: int | None, whole: Ending) -> Trial:
    resumed = None
    if kill is not None:
        _process({**order, "out": str(out), "kill": kill}, expected=-signal.SIGKILL)
        found = sorted((out / "checkpoints").glob("step-*"))
        resumed = int(found[-1].name.removeprefix("step-")) if found else 0
    end = _ended(order, out)
    return Trial(kill, resumed, end.losses == whole.losses, end.weights == whole.weights)


def _ended(order: dict[str, Any], out: Path) -> Ending:
    _process({**order, "out": str(out), "kill": None}, expected=0)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    numbers = [entry[name] for entry in entries for name in ("loss", "grad_norm", "val_nll")]
    exact = tuple("" if number is None else float(number).hex() for number in numbers)
    weights = sha256_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()  # large, and told
    shutil.rmtree(out / CHECKPOINTS)
    return Ending(exact, weights)


def _process(order: dict[str, Any], expected: int) -> None:
    """Run one trial in a session of its own, so that nobody's signals but its own reach it."""
    asked = [sys.executable, "-m", "flows.resuming"]
    child = subprocess.Popen(
        asked, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = child.communicate(json.dumps(order))
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode != expected:
        last = next(iter(reversed(said.strip().splitlines())), "")
        raise TrainingError(
            f"a trial ended with code {child.returncode}, expected {expected}: {last}",
            str(order["out"]),
            "Train the recipe first: what stops that stops this",
            "resume.trial",
        )


class _Killer:
    """A listener that kills its own process when training has done so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[_Killer]:
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.left -= bool(note)  # a step is told with its loss
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def trial(order: dict[str, Any]) -> None:
    """Train as ordered, up to the end or to the kill."""
    out, folder = Path(order["out"]), Path(order["tokens"])
    out.mkdir(exist_ok=True)
    given = Tokens(folder, read_manifest(folder))
    with nullcontext() if order["kill"] is None else listening(_Killer(order["kill"])):
        train.function(out, given, TrainParams(**order["params"]), TrainRuntime(**order["run"]))


if __name__ == "__main__":
    try:
        trial(json.load(sys.stdin))
    except TreelineError as error:
        sys.exit(str(error))
