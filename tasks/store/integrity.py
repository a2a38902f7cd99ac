"""Finding: is a finished folder still what its manifest says?

No file format of the chain protects itself: one flipped bit is read back silently in most cases. So SHA-256 is checked
before an artifact is used. A file whose identity (inode, size, mtime, ctime) has not changed since it was hashed is not
hashed again, so what changes below the file system is not seen; `verify` ignores that memory, and so does every use
where `TREELINE_REHASH` is set.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tasks.jsonfile import read_json
from tasks.store.canonical import sha256_file
from tasks.store.disk import write_whole
from tasks.store.manifest import NAME, Manifest, UnreadableManifest, read_manifest

log = logging.getLogger("treeline.store")


@dataclass(frozen=True)
class Fault:
    """Why a folder cannot be used: the file and what is wrong with it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


Identity = list[int]  # inode, size in bytes, mtime and ctime in ns


def identity(path: Path) -> Identity:
    """Return what changes whenever a file's content may have changed."""
    return _identity(path.lstat())


def _identity(found: os.stat_result) -> Identity:
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def examine(folder: Path, memory: Path | None = None) -> Manifest | Fault:
    """Return a folder's manifest if every file is as it was published, else what is wrong.

    Args:
        folder: The artifact's folder.
        memory: File that remembers the identities of hashed files; None: hash everything.
    """
    try:
        manifest = read_manifest(folder)
    except UnreadableManifest as error:
        return Fault(NAME, str(error).removeprefix("manifest "))
    known, seen = recall(memory) if memory else {}, dict[str, tuple[str, Identity]]()
    for name, entry in manifest.files.items():
        what = _wrong(folder / name, entry.bytes, entry.sha256, known.get(name), seen)
        if what:
            return Fault(name, what)
    if memory:
        remember_files(memory, seen)
    return manifest


def added(folder: Path, manifest: Manifest) -> list[str]:
    """Name what lies in a folder though it was not published; hidden files, as systems leave them, are passed over."""
    found = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    return sorted({*found} - {NAME, *manifest.files})


def _wrong(
    path: Path, size: int, sha256: str, known: tuple[str, Identity] | None, seen: dict[str, tuple[str, Identity]]
) -> str | None:
    """Say what is wrong with a file; its identity, of before it was hashed, is put among those that were seen."""
    try:
        found = path.lstat()
    except OSError:
        return "is missing"
    if not stat.S_ISREG(found.st_mode):  # a link is never followed: it could point anywhere
        return "is not a regular file"
    if found.st_size != size:
        return f"has {found.st_size:,} bytes, not {size:,}"
    seen[path.name] = sha256, _identity(found)
    if known == seen[path.name]:
        return None
    try:
        digest = sha256_file(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == sha256 else f"has sha256 {digest[:12]}, not {sha256[:12]}"


def recall(memory: Path) -> dict[str, tuple[str, Identity]]:
    """Read which file identities were hashed before; nothing where that is missing or broken, or is not to be used."""
    if os.environ.get("TREELINE_REHASH", "") not in {"", "0"}:
        return {}
    try:
        found = read_json(memory)
        return {str(name): (str(sha256), list(seen)) for name, (sha256, seen) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def forget(memory: Path) -> None:
    """Let the files be hashed at their next use; say so where that cannot be written down."""
    try:
        memory.unlink(missing_ok=True)
    except OSError as error:
        log.warning("store.verify: %s stays: %s; set TREELINE_REHASH=1, or the next use trusts it", memory, error)


def remember(memory: Path, folder: Path, manifest: Manifest) -> None:
    """Write down the identities of files that were just found right."""
    remember_files(memory, {name: (entry.sha256, identity(folder / name)) for name, entry in manifest.files.items()})


def remember_files(memory: Path, seen: dict[str, tuple[str, Identity]]) -> None:
    """Write down the hash and identity of files; a store that cannot be written goes without."""
    if recall(memory) == seen:
        return
    with suppress(OSError):
        write_whole(memory, json.dumps(seen).encode())
