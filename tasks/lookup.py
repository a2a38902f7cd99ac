"""Looking up: the artifact of a name that a person gave, or of a content that a file names."""

from __future__ import annotations

from typing import TypeVar

from tasks.artifacts import KINDS, Artifact
from tasks.errors import ParameterError, StoreError
from tasks.step import home
from tasks.store.integrity import Fault
from tasks.store.manifest import Manifest
from tasks.store.store import SHORT, Store

A = TypeVar("A", bound=Artifact)
FEWEST = 4  # digits of a key that may stand for it


def named(kind: type[A], name: str, where: str = "") -> A:
    """Open the artifact of a kind that a setting names, by `kind/hex` or by the first digits of its key.

    Args:
        kind: What it must be; `Artifact` for any.
        name: The name.
        where: The setting or option that gives it, for errors.

    Raises:
        ParameterError: If nothing, or more than one thing, goes by that name, or it is of another kind.
        StoreError: If it is not what was published.
    """
    room, _, digits = name.rpartition("/")
    made = Store(home()).manifests(room or None) if len(digits) >= FEWEST and room in {"", *KINDS} else []
    found = [manifest for _, manifest in made if manifest.key.startswith(digits)]
    if len(found) != 1:
        what = "more than one artifact is" if found else "no artifact is"
        raise ParameterError(f"{what} named {name!r}", where, "`python -m flows ls` lists them", "param.artifact")
    opened = _opened(found[0])
    if not isinstance(opened, kind):
        what = f"expected the id of {kind.kind}, found {opened.id}"
        raise ParameterError(what, where, f"`python -m flows ls {kind.kind}` lists them", "param.artifact")
    return opened


def seen(kind: type[A], name: str, where: str = "") -> A:
    """Open an artifact by its name, or by its kind's the one to look at first: for who looks, not for a setting."""
    return named(kind, (_first_of(name) if name in KINDS else None) or name, where)


def _first_of(kind: str) -> str | None:
    """Return the id of the artifact of a kind that the last run ended with, or else of the youngest; None without any.

    A run that found all it needed made nothing, so the youngest can be another run's.
    """
    store = Store(home())
    made = [f"{kind}/{manifest.key[:SHORT]}" for _, manifest in store.manifests(kind)]  # oldest first
    for recipe in store.latest_runs():
        ended = {*store.last_run(recipe).values()}
        if found := [one for one in made if one in ended]:
            return found[-1]
    return made[-1] if made else None


def of_content(kind: type[A], digest: str) -> A | None:
    """Open the artifact of a content; None where there is none. Of several any will do: their content is the same.

    Raises:
        StoreError: If there are some, and none is what was published.
    """
    made = [manifest for _, manifest in Store(home()).manifests(kind.kind) if manifest.digest == digest]
    for left, manifest in enumerate(reversed(made), 1 - len(made)):
        try:
            return kind(_opened(manifest).path, manifest)
        except StoreError:
            if not left:
                raise
    return None


def _opened(manifest: Manifest) -> Artifact:
    store = Store(home())
    folder = store.folder(manifest.kind, manifest.key)
    fault = store.look(manifest.kind, manifest.key)
    if isinstance(fault, Fault):
        raise StoreError(str(fault), str(folder), "Run its recipe again: it will be rebuilt", code="store.corrupt")
    return KINDS[manifest.kind](folder, manifest)
