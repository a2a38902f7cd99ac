"""Where starting weights lie: a published GPT-2, a model of the store, or a local folder that the user allows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from tasks.artifacts import Artifact, Model
from tasks.errors import ParameterError, PermissionRefused
from tasks.gpt.hf_folder import CONFIG, WEIGHTS, find_folder
from tasks.hub import fetch_file
from tasks.lookup import named, of_content
from tasks.sources import MODELS

A = TypeVar("A", bound=Artifact)
ROOTS = "TREELINE_MODEL_ROOTS"  # folders that local models may be taken from, separated like PATH
SCRATCH, FOLDER, MODEL = "scratch", "folder", "model"  # a start that is not the name of a published model


def roots() -> list[Path]:
    """Return the folders that `$TREELINE_MODEL_ROOTS` names, all links resolved."""
    return [Path(root).resolve() for root in os.environ.get(ROOTS, "").split(os.pathsep) if root]


def allowed_folder(path: str) -> Path:
    """Return a folder with all links resolved, if it lies under one of `$TREELINE_MODEL_ROOTS`.

    Raises:
        ParameterError: If it does not, or is no folder.
        PermissionRefused: If a file of the model is a link that leads out.
    """
    found = _resolved(Path(path))
    if found is None or not _is_allowed(found):
        allowed = ", ".join(map(str, roots())) or "none"
        raise ParameterError(
            f"the model folder {path!r} lies under none of the allowed roots ({allowed})",
            "train.folder",
            f"Name a folder above it in ${ROOTS}",
            "param.path",
        )
    if not found.is_dir():
        raise ParameterError(f"{path!r} is not a folder", "train.folder", "Give a Hugging Face folder", "param.path")
    for file in (found / CONFIG, found / WEIGHTS):
        if not _is_allowed(file):
            what = f"{file.name} is a link that leads out of the allowed roots"
            raise PermissionRefused(
                what, f"train.folder {path}", f"Copy the file there, or name its folder in ${ROOTS}"
            )
    return found


def _is_allowed(path: Path) -> bool:
    found = _resolved(path)
    return found is not None and any(found.is_relative_to(root) for root in roots())


def _resolved(path: Path) -> Path | None:
    """Follow all links; None where they go round."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return None


def fetch_published(start: str) -> Path:
    """Return the folder of a published model's weights and config, fetched where the hub's cache has them not."""
    model = MODELS[start]
    paths = [fetch_file(model.repo, name, model.revision, model.files[name]) for name in (CONFIG, WEIGHTS)]
    return paths[-1].parent  # the cache lays the files of one revision side by side


def model_of(name: str) -> Model:
    """Open the model that `train.model` names, by `model/hex` or by the first digits of its key.

    Raises:
        ParameterError: If none, or more than one, goes by that name.
        StoreError: If it is not what was published.
    """
    return named(Model, name, "train.model")


def folder_of(spec: Mapping[str, Any]) -> Path | None:
    """Return the folder of the weights that a tuned model started from; None where it started from scratch.

    Args:
        spec: What the model's start.json says.

    Raises:
        ParameterError: If a local folder, or a model of the store, with that content is no longer there.
    """
    if spec["start"] == SCRATCH:
        return None
    if spec["start"] == MODEL:
        if made := of_content(Model, spec["model"]):
            return made.path
    elif spec["start"] != FOLDER:
        return fetch_published(spec["start"])
    found = find_folder(spec, roots())
    if found is None:
        raise ParameterError(
            f"the weights that the model started from (sha256 {spec['sha256'][:12]}…) lie under no allowed root"
            + (", nor in the store" if spec["start"] == MODEL else ""),
            ", ".join(map(str, roots())) or "none is allowed",
            f"Name a folder above them in ${ROOTS}",
            "param.path",
        )
    return found


def base_of(model: Model) -> tuple[Mapping[str, Any], Path | None]:
    """Return what the adapters of a model lie over: a start as start.json tells it, and the folder of its weights.

    Those of the train step lie over what the model started from, those of prefer over the model that it was given.

    Raises:
        ParameterError: If that is no longer there.
    """
    start, given = model.json("start.json"), given_to_prefer(model)
    return ({**start, "start": MODEL}, given.path) if given else (start, folder_of(start))


def given_to_prefer(model: Model) -> Model | None:
    """Return the model that the prefer step made this one of; None for a model that it did not make.

    Raises:
        ParameterError: If that model is no longer there.
    """
    digest = model.json("training.json").get("from")
    return of_training(Model, digest, model) if digest else None


def of_training(kind: type[A], digest: str, model: Model) -> A:
    """Return the artifact, of this content, that a model was made of.

    Raises:
        ParameterError: If it is no longer there.
    """
    found = of_content(kind, digest)
    if found is None:
        what = f"the {kind.kind} that it was made of (content {digest[:12]}…) is not in the store"
        raise ParameterError(what, model.id, "Run its recipe again, or copy its folder here", "param.artifact")
    return found
