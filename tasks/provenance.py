"""Origin: where, with what and by which code an artifact was made: recorded, never keyed."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = (
    "numpy",
    "orjson",
    "peft",
    "polars",
    "prefect",
    "pyarrow",
    "tiktoken",
    "tokenizers",
    "torch",
    "transformers",
)


def origin_of(recipe: str, runtime: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest tells of a build besides its seconds and what it asked of texts."""
    return {
        "recipe": recipe,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": dict(_installed()),
        "revision": _revision(),
        "runtime": runtime,
    }


def _installed() -> Iterator[tuple[str, str]]:
    """Yield the version of each package that may have had a say; a step's work may be done in other processes."""
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _revision() -> str:
    """Return the git revision of the code, with a `+` where it was changed since; empty outside a checkout."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
