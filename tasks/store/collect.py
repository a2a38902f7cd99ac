"""Collecting: which artifacts nobody needs any more, and removing them.

Kept are the artifacts of the last run of each recipe, those that a running program has taken hold of, everything that
these were made from, and whatever was made within the grace time. The rest is garbage, as are what was moved aside and
the scratch folders of dead processes; one that a next try could go on with (a checkpoint) is kept for a week after its
last change, with all that it was begun with, unless what it was to become is finished by now. With them go the leases
of dead processes and what is left over in the store's own folders: drafts of files, locks that nobody holds, and what
was noted of artifacts that are gone.

Times are the file system's own, so no machine's clock matters.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.errors import StoreError
from tasks.jsonfile import read_json
from tasks.store import lease
from tasks.store.disk import clock, mark, writing
from tasks.store.lock import try_lock
from tasks.store.manifest import Manifest, Relied, UnreadableManifest, read_manifest
from tasks.store.store import CHECKPOINTS, RECIPE, RESUMABLE, Store

RESUME_TIME = 7 * 86_400.0  # seconds that an unfinished, resumable build is kept
STOPPED = 86_400.0  # seconds that a process of another host may be stopped, or take to finish a draft


def garbage(
    store: Store, grace: float, now: float | None = None, forgotten: Collection[str] = frozenset()
) -> list[Path]:
    """Decide what to remove: folders and files, in a fixed order. Removes nothing.

    Args:
        store: The store.
        grace: Seconds; whatever changed since then is kept.
        now: Seconds since the epoch; None: the time of the store's file system.
        forgotten: Recipes whose last run keeps nothing.

    Raises:
        StoreError: If a file of roots cannot be read: not knowing what is needed, nothing may be removed.
    """
    now = clock(store.root) if now is None else now
    # Leases are looked at last: whoever made something of this, or uses it, had one by then.
    manifests, scratch = store.manifests(), sorted((store.root / ".scratch").glob("*"))
    leases = lease.leases(store.root)
    ended = lease.given_up(leases, STOPPED)
    alive = [path for path in leases if path not in ended]
    finished = {_id(folder) for folder, _ in manifests}
    wanted = [path for path in scratch if _wanted(path, finished, now, {path.name for path in alive})]
    begun_with = {digest for path in wanted for digest in _digests(_recipe(path))}
    needed = lineage(manifests, {*_roots(store, forgotten), *_in_use(alive), *_made(manifests, begun_with)})
    unused = [folder for folder, _ in manifests if _id(folder) not in needed]
    unused += store.root.glob(".memo")  # results for single texts, which earlier versions kept there
    aside = sorted((store.root / ".aside").glob("*"))
    dead = [path for path in scratch if path not in wanted]
    return [
        path
        for path in [*unused, *aside, *dead, *sorted(ended), *_left_over(store.root, now)]
        if _newest(path) < now - grace
    ]


def _id(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def remove(paths: Sequence[Path], store: Store) -> None:
    """Remove folders and files; each vanishes from sight by one rename first, so that none is ever seen half empty.

    What a program has taken hold of since it was found to be garbage stays.
    """
    if not paths:
        return
    in_use = {*_in_use([path for path in lease.leases(store.root) if path not in paths])}
    with writing(store.root):
        bin_ = store.root / ".aside" / f"removed.{mark()}"
        bin_.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(path for path in paths if _id(path) not in in_use):
            with suppress(FileNotFoundError):
                path.rename(bin_ / str(number))
                hashes = store.root / ".verified" / f"{path.parent.name.removeprefix('.')}-{path.name}.json"
                hashes.unlink(missing_ok=True)
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
    found: Any = _load(path) or {}
    try:
        Relied.model_validate(found)
    except ValueError as error:
        raise _unknown(path, error) from error
    return dict(found)


def _roots(store: Store, forgotten: Collection[str]) -> Iterator[str]:
    for path in sorted((store.root / ".refs").glob("*.json")):
        if path.stem in forgotten:
            continue
        found = _load(path)
        yield from _ids(path, list(found.values()) if isinstance(found, dict) else found)


def _in_use(alive: Collection[Path]) -> Iterator[str]:
    """Yield what running programs have taken hold of."""
    for path in alive:
        try:
            yield from lease.held(path)
        except (OSError, ValueError) as error:
            raise _unknown(path, error) from error


def _load(path: Path) -> object:
    try:
        found: object = read_json(path)
    except FileNotFoundError:
        return []  # it was forgotten meanwhile
    except (OSError, ValueError) as error:
        raise _unknown(path, error) from error
    return found


def _unknown(path: Path, error: Exception) -> StoreError:
    what = f"what is still needed cannot be read: {error}"
    return StoreError(what, str(path), "mend or delete that file; nothing was removed", code="store.roots")


def _ids(path: Path, found: object) -> list[str]:
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return found
    raise StoreError(
        "expected a list of artifact ids", str(path), "delete that file; nothing was removed", code="store.roots"
    )


def _left_over(root: Path, now: float) -> Iterator[Path]:
    """Yield drafts that nobody will finish, free locks, and what was noted of artifacts that are gone."""
    places = [root / ".refs", root / ".verified", root / lease.FOLDER]
    drafts = [path for place in places for path in sorted(place.glob(".*"))]
    yield from (path for path in [*drafts, *sorted(root.glob(".clock.*"))] if _newest(path) < now - STOPPED)
    yield from (path for path in sorted((root / ".locks").glob("*.lock")) if _free(path))
    for path in sorted((root / ".verified").glob("[!.]*")):
        if not (root / path.stem.replace("-", "/", 1)).exists():
            yield path


def _free(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            return try_lock(file.fileno(), shared=True) is True
    except OSError:
        return False


def _wanted(path: Path, finished: Collection[str], now: float, alive: Collection[str]) -> bool:
    """Tell whether a scratch folder is in use, or holds a checkpoint that may still be gone on with."""
    build, _, holder = path.name.partition(".")
    resumable = build.startswith(RESUMABLE) and now - _newest(path) < RESUME_TIME
    # Not even a forced build goes on with what was left of a finished artifact: it starts anew.
    goes_on = resumable and build.removeprefix(RESUMABLE).replace("-", "/") not in finished
    return goes_on or holder in alive


def _newest(path: Path) -> float:
    """Return when a folder or its checkpoints last changed, in seconds, by either of two clocks."""
    newest = 0.0
    for one in (path, path / CHECKPOINTS):
        with suppress(OSError):
            found = one.lstat()
            newest = max(newest, found.st_mtime, found.st_ctime)
    return newest
