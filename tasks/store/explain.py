"""Explaining: why does a recipe have no artifact? Because it differs from the nearest one that has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.store.manifest import Manifest

NEW = "not built yet"
NAMELESS: Mapping[str, str] = {}


def why_missing(recipe: dict[str, Any], made: list[Manifest], names: Mapping[str, str] = NAMELESS) -> str:
    """Say what sets a recipe apart from the nearest of the artifacts that were made, old value first.

    Args:
        recipe: The key's preimage that has no artifact.
        made: Manifests to compare with, oldest first; among equally near ones the youngest is taken.
        names: Digest of a content -> id of an artifact that holds it, to be shown in its place.
    """
    near = [
        differences(manifest.recipe, recipe, names=names)
        for manifest in reversed(made)
        if manifest.recipe.get("step") == recipe["step"]
    ]
    if not near:
        return NEW
    nearest: list[str] = min(near, key=len)
    return "; ".join(nearest) or "its files are gone"


def differences(old: Any, new: Any, path: str = "", names: Mapping[str, str] = NAMELESS) -> list[str]:
    """List where two JSON values differ, as `params.lr: 0.1 -> 0.2`; digests are named, or else shortened."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = [*new, *(name for name in old if name not in new)]
        below = [(f"{path}.{name}" if path else name, old.get(name, ABSENT), new.get(name, ABSENT)) for name in found]
        return [line for name, before, after in below for line in differences(before, after, name, names)]
    return [] if old == new else [f"{path}: {_shown(old, names)} -> {_shown(new, names)}"]


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


def _shown(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, str):
        if value in names:
            return names[value]
        return f"{value[:12]}…" if len(value) == 64 and value.isalnum() else (value or '""')
    return repr(value)
