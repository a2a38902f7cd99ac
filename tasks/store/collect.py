"""Collecting: which artifacts nobody needs any more, and removing them.

Kept are the artifacts of the last run of each recipe, those that a running program has taken hold of, everything that
these were made from, what is remembered of texts and was asked for these, and whatever was made or used within the
grace time. The rest is garbage, as are what was moved aside and the scratch folders of dead processes; one that a next
try could go on with (a checkpoint) is kept for a week after its last change, with all that it was begun with, unless
what it was to become is finished by now.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.errors import StoreError
from tasks.store.disk import write_whole, writing
from tasks.store.folders import CHECKPOINTS, RECIPE, RESUMABLE, Store
from tasks.store.manifest import Manifest, UnreadableManifest, read_manifest
from tasks.store.owner import is_alive, mark
from tasks.store.parts import ABOUT, memos

RESUME_TIME = 7 * 86_400.0  # seconds that an unfinished, resumable build is kept


class Lease:
    """The artifacts that a running program has resolved, on disk, so that a concurrent `gc` keeps them."""

    def __init__(self, store: Store) -> None:
        self.path = store.root / ".leases" / f"{mark()}.json"
        self.ids: list[str] = []

    def hold(self, artifact_id: str) -> None:
        """Add an artifact; a store that cannot be written is not collected either."""
        if artifact_id not in self.ids:
            self.ids.append(artifact_id)
            with suppress(OSError):
                write_whole(self.path, json.dumps(self.ids).encode())


@contextmanager
def lease(store: Store) -> Iterator[Lease]:
    """Keep what the block resolves from being collected while it runs."""
    held = Lease(store)
    try:
        yield held
    finally:
        with suppress(OSError):  # on a store that cannot be written there is none
            held.path.unlink()


def garbage(
    store: Store, grace: float, now: float | None = None, forgotten: Collection[str] = frozenset()
) -> list[Path]:
    """Decide what to remove: folders, in a fixed order. Removes nothing.

    Args:
        store: The store.
        grace: Seconds; whatever changed since then is kept.
        now: Seconds since the epoch; None: the clock's.
        forgotten: Recipes whose last run keeps nothing.

    Raises:
        StoreError: If a file of roots cannot be read: not knowing what is needed, nothing may be removed.
    """
    now = time.time() if now is None else now
    manifests, scratch = store.manifests(), sorted((store.root / ".scratch").glob("*"))
    finished = {_id(folder) for folder, _ in manifests}
    wanted = [path for path in scratch if _wanted(path, finished, now)]
    begun_with = {digest for path in wanted for digest in _digests(_recipe(path))}
    needed = lineage(manifests, {*_roots(store, forgotten), *_made(manifests, begun_with)})
    needed |= {name for folder, made in manifests if _id(folder) in needed for name in made.origin.get("texts", {})}
    unused = [
        folder for folder in [*(folder for folder, _ in manifests), *memos(store.root)] if _id(folder) not in needed
    ]
    aside = sorted((store.root / ".aside").glob("*"))
    dead = [path for path in scratch if path not in wanted]
    return [path for path in [*unused, *aside, *dead] if _newest(path) < now - grace]


def _id(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def remove(paths: Sequence[Path], store: Store) -> None:
    """Remove folders; each vanishes from sight by one rename first, so that none is ever seen half empty."""
    if not paths:
        return
    with writing(store.root):
        bin_ = store.root / ".aside" / f"removed.{mark()}"
        bin_.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(paths):
            with suppress(FileNotFoundError):
                path.rename(bin_ / str(number))
        shutil.rmtree(bin_, ignore_errors=True)


def lineage(manifests: list[tuple[Path, Manifest]], ids: set[str]) -> set[str]:
    """Return the ids and those of everything they were made from, by content digest."""
    by_digest: dict[str, list[str]] = {}
    inputs: dict[str, list[str]] = {}
    for folder, manifest in manifests:
        name = _id(folder)
        by_digest.setdefault(manifest.digest, []).append(name)
        inputs[name] = _digests(manifest.recipe)
    needed: set[str] = set()
    waiting = list(ids)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting.extend(made for digest in inputs.get(name, []) for made in by_digest.get(digest, []))
    return needed


def _digests(recipe: Mapping[str, Any]) -> list[str]:
    """Return the content digests that a recipe may name, and other words."""
    # A setting may hold a digest, too: train.model does, of what a model started from.
    params = [value for value in recipe.get("params", {}).values() if isinstance(value, str)]
    return [*recipe.get("inputs", {}).values(), *params]


def _made(manifests: list[tuple[Path, Manifest]], digests: Collection[str]) -> Iterator[str]:
    """Yield the ids of the artifacts that have one of these contents."""
    return (_id(folder) for folder, manifest in manifests if manifest.digest in digests)


def _recipe(scratch: Path) -> dict[str, Any]:
    """Read what is built in a scratch folder, and of what; nothing where that was not noted."""
    with suppress(UnreadableManifest):  # all is built, and the checkpoints, with the note among them, may be gone
        return read_manifest(scratch).recipe
    path = scratch / CHECKPOINTS / RECIPE
    found = _load(path) or {}
    if not isinstance(found, dict):
        raise StoreError("expected a recipe", str(path), "delete that folder; nothing was removed", code="store.roots")
    return found


def _roots(store: Store, forgotten: Collection[str]) -> Iterator[str]:
    for path in sorted((store.root / ".refs").glob("*.json")):
        if path.stem in forgotten:
            continue
        found = _load(path)
        yield from _ids(path, list(found.values()) if isinstance(found, dict) else found)
    for path in sorted((store.root / ".leases").glob("*.json")):
        if is_alive(path.stem, path):
            yield from _ids(path, _load(path))


def _load(path: Path) -> object:
    try:
        found: object = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []  # a lease that ended meanwhile
    except (OSError, ValueError) as error:
        raise StoreError(
            f"what is still needed cannot be read: {error}",
            str(path),
            "mend or delete that file; nothing was removed",
            code="store.roots",
        ) from error
    return found


def _ids(path: Path, found: object) -> list[str]:
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return found
    raise StoreError(
        "expected a list of artifact ids", str(path), "delete that file; nothing was removed", code="store.roots"
    )


def _wanted(path: Path, finished: Collection[str], now: float) -> bool:
    """Tell whether a scratch folder is in use, or holds a checkpoint that may still be gone on with."""
    build, _, holder = path.name.partition(".")
    resumable = build.startswith(RESUMABLE) and now - _newest(path) < RESUME_TIME
    # Not even a forced build goes on with what was left of a finished artifact: it starts anew.
    goes_on = resumable and build.removeprefix(RESUMABLE).replace("-", "/") not in finished
    return goes_on or is_alive(holder, path)


def _newest(path: Path) -> float:
    """Return when a folder or its checkpoints last changed, or a memo was used, in seconds, by either of two clocks."""
    newest = 0.0
    for one in (path, path / ABOUT, path / CHECKPOINTS):
        with suppress(OSError):
            found = one.lstat()
            newest = max(newest, found.st_mtime, found.st_ctime)
    return newest
