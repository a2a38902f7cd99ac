"""The store: finished folders named by kind and key, each written once, published whole, checked before use.

<root>/<kind>/<12 hex of the key>/      a finished artifact: manifest.json and files
<root>/.scratch/<kind>-<12 hex>.<16 hex>  being built, by whom a lease of that name tells; `.left`: for the next try
<root>/.aside/                          what was found broken or was replaced
<root>/.verified/, .locks/, .leases/    hashes remembered; waits spared; who is alive, see `lease`
<root>/.refs/<recipe>.json              the artifacts of the last run of each recipe
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.errors import StoreError
from tasks.jsonfile import read_json
from tasks.store import lease
from tasks.store.canonical import sha256_file
from tasks.store.disk import mark, sync, write_whole, writing
from tasks.store.integrity import Fault, added, examine, forget, remember
from tasks.store.manifest import NAME, FileEntry, Manifest, UnreadableManifest, read_manifest, write_manifest

log = logging.getLogger("treeline.store")
RESUMABLE = "resume-"  # begins the name of a scratch folder that the next try may go on with
# A folder in there that only the next try needs: no part of what is published. A checkpoint is a folder of it, and its
# name sorts after those of earlier ones.
CHECKPOINTS = "checkpoints"
RECIPE = "recipe.json"  # a file of that: what is built there, and of what
SHORT = 12  # hex digits of a key that name a folder: 48 bits, enough for any one store
_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KIND = re.compile(r"[a-z]{1,20}")


class Store:
    """A folder of artifacts."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, kind: str, key: str) -> Path:
        """Return where the artifact of a key lies, once it is finished."""
        if not (_KEY.fullmatch(key) and _KIND.fullmatch(kind)):
            raise StoreError(f"{kind!r}, {key!r} do not name an artifact", code="name.invalid")
        return self.root / kind / key[:SHORT]

    def look(self, kind: str, key: str) -> Manifest | Fault | None:
        """Tell whether a key's artifact can be used: its manifest, what is wrong with it, or None. Changes nothing."""
        folder = self.folder(kind, key)
        if not os.path.lexists(folder) or folder.parent.is_symlink():
            return None
        if folder.is_symlink():  # never followed: it could point anywhere
            return Fault(NAME, "lies behind a link")
        found = examine(folder, self._memory(folder))
        if isinstance(found, Manifest) and found.key != key:
            return Fault(NAME, f"is of key {found.key[:SHORT]}…, not {key[:SHORT]}…")
        return found

    def verify(self, folder: Path) -> list[Fault]:
        """Hash an artifact's files again, and name what is wrong with it, and what was added.

        What was noted of its hashes before is forgotten if anything is wrong: the next use hashes them, too.
        """
        found = examine(folder)
        if isinstance(found, Manifest):
            if f"{found.kind}/{found.key[:SHORT]}" == f"{folder.parent.name}/{folder.name}":
                return [Fault(name, "was added; it is no part of what was published") for name in added(folder, found)]
            found = Fault(NAME, f"is of {found.kind}/{found.key[:SHORT]}")
        forget(self._memory(folder))
        return [found]

    def set_aside(self, folder: Path, why: str) -> None:
        """Move a folder that cannot be used out of the way, and say so; nothing is deleted."""
        place = self.root / ".aside" / f"{folder.parent.name}-{folder.name}.{mark()}"
        with writing(self.root):
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process was first
                folder.rename(place)
        log.warning("store.aside: %s/%s: %s; moved to .aside", folder.parent.name, folder.name, why)

    @contextmanager
    def scratch(
        self,
        kind: str,
        key: str,
        inherits: Collection[str] = (),
        fresh: bool = False,
        recipe: Mapping[str, Any] | None = None,
    ) -> Iterator[Path]:
        """Give an empty folder to build in, on the store's file system; a failed build leaves nothing visible.

        A build that inherits gets back what an earlier try left of that, whether the try failed or was killed; of
        several, the one that got furthest. A folder is claimed by one rename, so two processes never share one. `fresh`
        starts anew even so, and removes what was left: no later try goes back to it. The recipe, the key's preimage, is
        noted in such a build: `gc` keeps what it was begun with, as long as a next try may go on with it.

        Args:
            kind: Of the artifact.
            key: Of the artifact.
            inherits: Names of what an earlier try may leave to this one; all else is removed. None: nothing is left.
            fresh: Whether to inherit nothing even so.
            recipe: The key's preimage.

        Raises:
            StoreError, PermissionRefused: If the store cannot be written.
        """
        if (self.root / kind).is_symlink():
            what = "is a link, and an artifact must lie in the store itself"
            raise StoreError(
                f"{kind} {what}", str(self.root), "remove the link, or set TREELINE_ARTIFACTS to its target"
            )
        name = f"{RESUMABLE if inherits else ''}{kind}-{key[:SHORT]}"
        with lease.lease(self.root) as mine:
            folder = self.root / ".scratch" / f"{name}.{mine.name}"
            with writing(self.root):
                folder.parent.mkdir(parents=True, exist_ok=True)
                claimed = bool(inherits) and self._claim(name, folder, fresh)
                while claimed and fresh:
                    shutil.rmtree(folder)
                    claimed = self._claim(name, folder, fresh)
                if not claimed:
                    folder.mkdir()
                elif not (folder / NAME).exists():  # else it may be `built`
                    _leave_only(folder, inherits)
                if inherits and recipe:
                    write_whole(folder / CHECKPOINTS / RECIPE, json.dumps(recipe, indent=1).encode())
            try:
                yield folder
            finally:
                if folder.exists():  # it was not published
                    if inherits:
                        with suppress(OSError):  # by a name of its own: what another try left may have got less far
                            folder.rename(folder.with_name(f"{folder.name}.left"))
                    shutil.rmtree(folder, ignore_errors=True)

    def _claim(self, name: str, folder: Path, fresh: bool) -> bool:
        """Take over what a try left that failed, or whose process is gone: of several, the one that got furthest."""
        found = [path for path in folder.parent.glob(f"{name}.*") if path.is_dir() and not path.is_symlink()]
        holders = {path: self.root / lease.FOLDER / path.name.removeprefix(f"{name}.") for path in found}
        ended = lease.given_up(holders.values())
        left = [path for path, holder in holders.items() if holder in ended]
        for path in sorted(left, key=_got_to, reverse=True):
            with suppress(OSError):
                path.rename(folder)
                if (last := _got_to(folder)[1]) and not fresh:
                    log.warning("store.resume: %s goes on from %s of an earlier try", name, last)
                return True
        return False

    def built(self, scratch: Path, key: str, inherits: Collection[str]) -> Manifest | None:
        """Return the manifest of a scratch folder that lacks nothing but its name; of any other, leave the inheritance.

        A try that is killed while it publishes has built all, and may have no checkpoints any more. Its seal tells a
        whole manifest from one that was cut short, and every file is hashed.
        """
        found = examine(scratch)
        if isinstance(found, Manifest) and found.key == key and {*_names(scratch)} == {NAME, *found.files}:
            log.warning("store.built: %s/%s was whole when a try was cut off; published now", found.kind, key[:SHORT])
            return found
        with writing(self.root):
            _leave_only(scratch, inherits)
        return None

    def publish(self, scratch: Path, manifest: Manifest, replace: bool = False) -> tuple[Path, Manifest]:
        """Make a built folder visible by one rename, after everything in it is on the disk.

        Returns:
            The finished folder and its manifest; the other's, where another process published the same key first.
            A kill between the two renames of a replacement leaves neither, so a miss; the old one lies in `.aside`.
            What a kill leaves once the manifest is written is `built`: a resumable step's next try publishes it.
        """
        folder = self.folder(manifest.kind, manifest.key)
        with writing(self.root):
            if not (scratch / NAME).exists():  # else it is `built`: a second writing could be cut short
                write_manifest(scratch, manifest)
            sync(scratch / NAME)
            sync(scratch)
            folder.parent.mkdir(parents=True, exist_ok=True)
            if replace and folder.exists():
                self.set_aside(folder, "replaced by a forced rebuild")
            spent = self._spent(scratch)  # not before: until here, a next try would have gone on with them
            winner = self._rename(scratch, folder, manifest)
            sync(folder.parent)
            if spent:
                shutil.rmtree(spent, ignore_errors=True)
        if winner is manifest:
            remember(self._memory(folder), folder, manifest)
        elif winner.digest != manifest.digest:
            log.warning(
                "store.nondeterministic: %s gave two outputs for key %s; the first one stays",
                manifest.kind,
                manifest.key[:SHORT],
            )
        return folder, winner

    def _spent(self, scratch: Path) -> Path | None:
        """Move checkpoints out of a folder that is about to be published, and return where to."""
        place = self.root / ".aside" / f"{CHECKPOINTS}.{mark()}"
        if not (scratch / CHECKPOINTS).exists():
            return None
        place.parent.mkdir(parents=True, exist_ok=True)
        (scratch / CHECKPOINTS).rename(place)
        return place

    def _rename(self, scratch: Path, folder: Path, manifest: Manifest) -> Manifest:
        for _ in range(8):
            try:
                scratch.rename(folder)
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                    raise
            else:
                return manifest
            found = self.look(manifest.kind, manifest.key)
            if isinstance(found, Manifest):
                return found
            if found is not None:
                self.set_aside(folder, str(found))
        raise StoreError("something keeps coming back in place of the artifact", str(folder))

    def manifests(self, kind: str | None = None) -> list[tuple[Path, Manifest]]:
        """List the finished artifacts whose manifest can be read, oldest first; what cannot be used is passed over."""
        found = []
        for folder in self.folders(kind):
            with suppress(UnreadableManifest, OSError):  # moved aside meanwhile
                made, time = read_manifest(folder), folder.stat().st_mtime_ns
                if (made.kind, made.key[:SHORT]) == (folder.parent.name, folder.name):
                    found.append((made.created, time, folder, made))
        return [(folder, made) for _, _, folder, made in sorted(found, key=lambda one: one[:2])]

    def comparable(self, kind: str, recipe: str, step: str) -> list[Manifest]:
        """List the manifests to explain a miss by: that of the recipe's last run or, without one, all of the kind."""
        made = [manifest for _, manifest in self.manifests(kind)]
        last = self.last_run(recipe).get(step)
        return [one for one in made if f"{kind}/{one.key[:SHORT]}" == last] or made

    def names(self) -> dict[str, str]:
        """Return the id of the youngest artifact of each content: digest -> id."""
        return {made.digest: f"{made.kind}/{made.key[:SHORT]}" for _, made in self.manifests()}

    def folders(self, kind: str | None = None) -> list[Path]:
        """List every folder that is named like an artifact, readable or not; links are not followed."""
        kinds = [self.root / kind] if kind else [path for path in self.root.glob("*") if _KIND.fullmatch(path.name)]
        found = [path for place in kinds if not place.is_symlink() for path in place.glob("[0-9a-f]" * SHORT)]
        return sorted(path for path in found if path.is_dir() and not path.is_symlink())

    def links(self) -> list[str]:
        """Name what stands in place of a folder of artifacts, and is a link; nothing behind it is used."""
        return sorted(path.name for path in self.root.glob("*") if _KIND.fullmatch(path.name) and path.is_symlink())

    def passed_over(self) -> list[str]:
        """Say of what is named like an artifact, or a kind of them, and cannot be listed, why that is."""
        listed, said = {folder for folder, _ in self.manifests()}, [f"{kind}: is a link" for kind in self.links()]
        for folder in self.folders():
            if folder not in listed:
                why = "its manifest is another artifact's"
                try:
                    read_manifest(folder)
                except UnreadableManifest as error:
                    why = str(error)
                said.append(f"{folder.parent.name}/{folder.name}: {why}")
        return said

    def record_run(self, recipe: str, ids: dict[str, str]) -> None:
        """Write down which artifacts the last run of a recipe ended with, step -> id; `gc` keeps them.

        What an earlier run ended with stays for the steps that are not named: a run that stopped early, or failed,
        takes nothing away. The file's time is that of the last run, also of one that made nothing new.
        """
        if not _NAME.fullmatch(recipe):
            raise StoreError(f"{recipe!r} is not a recipe's name", code="name.invalid")
        known, note = self.last_run(recipe), self.root / ".refs" / f"{recipe}.json"
        if known | ids != known:
            with writing(self.root):
                write_whole(note, json.dumps(known | ids, indent=1).encode())
        elif known:
            with suppress(OSError):  # a store that only can be read tells less well which run was the last
                os.utime(note)

    def last_run(self, recipe: str) -> dict[str, str]:
        """Read what `record_run` wrote; nothing where that is missing or broken."""
        with suppress(OSError, ValueError):
            found = read_json(self.root / ".refs" / f"{recipe}.json")
            return {str(step): str(made) for step, made in found.items()} if isinstance(found, dict) else {}
        return {}

    def runs(self) -> list[str]:
        """List the recipes whose last run is noted."""
        return sorted(path.stem for path in (self.root / ".refs").glob("*.json"))

    def latest_runs(self) -> list[str]:
        """List the recipes whose last run is noted, that of the most recent run first."""
        times = {}
        for path in (self.root / ".refs").glob("*.json"):
            with suppress(OSError):  # it was forgotten meanwhile
                times[path.stem] = path.stat().st_mtime_ns
        return sorted(times, key=lambda name: (-times[name], name))

    def forget(self, recipes: Iterable[str]) -> None:
        """Forget the last run of some recipes: nothing is kept for their sake any more."""
        with writing(self.root):
            for recipe in recipes:
                (self.root / ".refs" / f"{recipe}.json").unlink(missing_ok=True)

    def _memory(self, folder: Path) -> Path:
        return self.root / ".verified" / f"{folder.parent.name}-{folder.name}.json"


def _got_to(scratch: Path) -> tuple[bool, str]:
    """Return how far a try got, greater for further: whether it has a manifest, and its last checkpoint's name.

    Clocks are not asked: of two tries, the younger one may have got less far.
    """
    checkpoints = [path.name for path in (scratch / CHECKPOINTS).glob("[!.]*") if path.is_dir()]
    return (scratch / NAME).exists(), max(checkpoints, default="")


def _names(folder: Path) -> list[str]:
    """Name what lies in a folder that is being built, its checkpoints aside."""
    return [path.name for path in folder.iterdir() if path.name != CHECKPOINTS]


def _leave_only(folder: Path, names: Collection[str]) -> None:
    """Remove from a folder all but what has one of these names: checkpoints, a folder, or else a plain file."""
    for path in folder.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        fit = is_folder if path.name == CHECKPOINTS else path.is_file() and not path.is_symlink()
        if not (fit and path.name in names):
            shutil.rmtree(path) if is_folder else path.unlink()


def entries(folder: Path) -> dict[str, FileEntry]:
    """Hash every file of a built folder, its checkpoints aside, and flush it to the disk.

    Raises:
        StoreError: If there is something else than plain files in it.
    """
    found = {}
    for path in (folder / name for name in sorted(_names(folder))):
        if path.is_symlink() or not path.is_file():
            raise StoreError("an artifact holds plain files only", str(path))
        sync(path)
        found[path.name] = FileEntry(path.stat().st_size, sha256_file(path))
    return found
