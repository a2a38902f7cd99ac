"""A Hugging Face model folder as it lies on disk: what it must hold, what it must not, and its content's name.

Only safetensors and JSON are ever read. A pickle (`pytorch_model.bin`) and a config that names code to run
(`auto_map`) are refused, because opening either runs a stranger's program. Torch is not needed to tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks.errors import InputError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ADAPTERS = "adapter_config.json"  # peft's
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a model folder, refusing what must not or cannot be opened.

    Raises:
        InputError: With code `model.unsafe` for a pickle or remote code, `model.missing` for a file that is not
            there, `model.config` for one that is not JSON, `model.type` for anything but a GPT-2.
    """
    where = str(folder)
    refuse_incomplete(folder)
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise InputError(f"{CONFIG} is not JSON: {error}", where, "Fetch it again", "model.config") from error
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{CONFIG}: expected model_type gpt2, found {found!r}", where, "Use a GPT-2", "model.type")
    if "auto_map" in config:
        what = f"{CONFIG} has auto_map, which asks to run code that came with the model"
        raise InputError(what, where, "Remove auto_map if this is a plain GPT-2; else use another", "model.unsafe")
    return config


def refuse_incomplete(folder: Path) -> None:
    """Raise `InputError` unless the folder has weights in one safetensors file, a config, and no adapters."""
    where = str(folder)
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if not (folder / WEIGHTS).is_file() and pickles:
        what = f"{pickles[0]} is a pickle; convert to safetensors"
        do = "Opening a pickle can run any program: where that is safe, load the model and call save_pretrained"
        raise InputError(what, where, do, "model.unsafe")
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise InputError(f"{name} is missing", where, "Put the model there, in one piece", "model.missing")
    if (folder / ADAPTERS).exists():  # transformers would add them, and nothing of them is in the key
        do = "Merge them into the weights (peft: merge_and_unload), or move them elsewhere"
        raise InputError(f"{ADAPTERS} says that adapters lie beside the weights", where, do, "model.adapters")


def digests(folder: Path) -> dict[str, str]:
    """Return what stands for a model folder's content: sha256 of its weights, config_sha256 of its config."""
    refuse_incomplete(folder)
    return {"sha256": _sha256(folder / WEIGHTS), "config_sha256": _sha256(folder / CONFIG)}


def find_folder(wanted: Mapping[str, Any], roots: Iterable[Path]) -> Path | None:
    """Return a folder under `roots` whose content has these `digests` (other names are ignored), or None.

    A tuned model records the content that it started from, never a path, which may be gone or be somebody else's.
    """
    for weights in (path for root in roots for path in sorted(root.rglob(WEIGHTS))):
        config = weights.with_name(CONFIG)
        if config.is_file() and _sha256(config) == wanted["config_sha256"] and _sha256(weights) == wanted["sha256"]:
            return weights.parent
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
