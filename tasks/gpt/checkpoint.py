"""Checkpoints: folders of safetensors and JSON from which a killed run goes on, to the bit.

A checkpoint is written beside its place, flushed, sealed with the hash of each file, and renamed; so one that has its
name is whole, unless the disk changed it later, which the hashes tell. No pickle is written or read.

    checkpoints/LATEST                    name of the newest, for people; a reader looks for the newest whole one itself
    checkpoints/step-00000120/*.safetensors
    checkpoints/step-00000120/checkpoint.json   last: {"seal", "state", "files": {name: sha256}}
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.jsonfile import read_json

log = logging.getLogger("treeline.train")
NAME = "checkpoint.json"
PIECE = 1 << 26  # bytes that are hashed between two signs of getting on
BROKEN = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what reading a spoiled checkpoint raises
Begin = Callable[[], None]  # called with each thing that is begun: a large checkpoint on a slow disk takes minutes


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on.

    Attributes:
        step: Updates done.
        state: JSON values: counters, and the settings that they belong to.
        tensors: Tables of tensors: file name without ending -> name -> tensor.
    """

    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def save(folder: Path, checkpoint: Checkpoint, keep: int = 2, begin: Begin = lambda: None) -> Path:
    """Write a checkpoint into the folder of checkpoints, whole or not at all, and drop all but the last `keep`.

    Those of later steps are dropped, too, and do not count: had they been whole, the run had gone on from there. An old
    one goes only after the new one is on the disk, so there is always one. Two are kept by default: the disk may spoil
    the newest one.
    """
    folder.mkdir(exist_ok=True)
    place = folder / f"step-{checkpoint.step:08}"
    draft = folder / f".{place.name}"
    # A place that is taken holds a broken checkpoint: a good one would have been resumed. Drafts are of killed runs.
    for old in (place, *folder.glob(".step-*")):
        _remove(old)
    draft.mkdir()
    try:
        _write(draft, checkpoint, begin)
    except BaseException:
        _remove(draft)  # on a full disk, half a checkpoint is in the way
        raise
    draft.rename(place)
    _point_to(folder, place.name)
    _sync(folder)
    recent = [path for path in _newest_first(folder) if path.name <= place.name][: max(1, keep)]
    for old in set(_newest_first(folder)) - set(recent):
        _remove(old)
    return place


def _write(draft: Path, checkpoint: Checkpoint, begin: Begin) -> None:
    """Write all files of a checkpoint, the one that seals them last, and flush them to the disk."""
    for name, tensors in checkpoint.tensors.items():
        file = draft / f"{name}.safetensors"
        whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        begin()
        with disk_named(file):
            save_file(whole, file)
    files = {path.name: _sha256(path, begin) for path in sorted(draft.iterdir())}
    body = {"step": checkpoint.step, "state": dict(checkpoint.state), "files": files}
    (draft / NAME).write_text(json.dumps({"seal": _seal(body), **body}, indent=1), encoding="utf-8")
    for path in (*draft.iterdir(), draft):
        begin()
        _sync(path)


@contextmanager
def disk_named(path: Path) -> Iterator[None]:
    """Turn what safetensors says of the disk into an OSError: the library hides which of its errors are the disk's."""
    try:
        yield
    except SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))
        raise OSError(int(match[1]) if match else errno.EIO, str(error), str(path)) from error


def _remove(path: Path) -> None:
    """Remove a checkpoint, or whatever else has taken its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def latest(
    folder: Path, begin: Begin = lambda: None, understand: Callable[[Mapping[str, Any]], object] = lambda state: None
) -> Checkpoint | None:
    """Read the newest checkpoint that is whole and understood; say which ones were passed over.

    Args:
        folder: Of the checkpoints.
        begin: Called with each thing that is begun.
        understand: Given a state, raises a KeyError or TypeError if the run cannot go on from it: other code wrote it.
    """
    for place in _newest_first(folder):
        try:
            candidate = _read(place, begin)
        except (*BROKEN, SafetensorError) as error:
            log.warning("train.checkpoint: %s is broken and passed over: %s", place, error)
            continue
        try:
            understand(candidate.state)
            return candidate
        except (KeyError, TypeError) as error:
            log.warning("train.checkpoint: %s is of another version and passed over: %s", place, error)
    return None


def latest_state(folder: Path) -> Mapping[str, Any]:
    """Read the newest state that is as it was written, without its tensors; empty where there is none."""
    for place in _newest_first(folder):
        with suppress(*BROKEN):
            state: Mapping[str, Any] = _note(place)["state"]
            return state
    return {}


def _note(place: Path) -> dict[str, Any]:
    body = read_json(place / NAME)
    if not isinstance(body, dict):
        raise ValueError(f"{NAME} holds no object")
    if body.pop("seal") != _seal(body):
        raise ValueError(f"{NAME} was altered: its seal does not match")
    return body


def _read(place: Path, begin: Begin) -> Checkpoint:
    body = _note(place)
    for name, expected in body["files"].items():
        if (actual := _sha256(place / name, begin)) != expected:
            raise ValueError(f"{name} has sha256 {actual}, expected {expected}")
    tensors = {}
    for name in body["files"]:
        begin()
        tensors[Path(name).stem] = load_file(place / name)
    return Checkpoint(body["step"], body["state"], tensors)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _point_to(folder: Path, name: str) -> None:
    draft = folder / ".LATEST"
    draft.write_text(name + "\n", encoding="utf-8")
    _sync(draft)
    draft.rename(folder / "LATEST")


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path, begin: Begin) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while piece := opened.read(PIECE):
            begin()
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
