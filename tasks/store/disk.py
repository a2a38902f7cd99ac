"""The disk: what is flushed to it, files written whole, and its refusals as errors that say what to do."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.errors import PermissionRefused, StoreError, TreelineError


def mark() -> str:
    """Return a name that nothing else has, on any machine."""
    return secrets.token_hex(8)


def clock(folder: Path) -> float:
    """Return the time by which the file system of a folder dates files, in seconds since the epoch.

    On a disk that is shared it is the disk's, not this machine's. Where nothing can be written, it is this machine's.
    """
    probe = folder / f".clock.{mark()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{mark()}")
    try:
        new.write_bytes(content)
        sync(new)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


# What the system says when it is the disk, not the program, that is at fault.
_NAMES = ("ENOSPC", "EDQUOT", "EROFS", "EIO", "EFBIG", "EMFILE", "EACCES", "EPERM")
_DISK = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}
# Libraries written in Rust or C++ hide which of their errors are the system's, but quote it.
_QUOTED = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)


def disk_error(error: BaseException | None) -> OSError | None:
    """Find what the system said of the disk in an error, or in what led to it; None where it said nothing.

    An error that we raise on purpose says what it means, whatever led to it.
    """
    while error is not None and not isinstance(error, TreelineError):
        if isinstance(error, OSError) and error.errno in _DISK:
            return error
        quoted = [int(number) for number in _QUOTED.findall(str(error))]
        if found := [number for number in quoted if number in _DISK]:
            return OSError(found[0], os.strerror(found[0]))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn the system's refusals to write into errors that say what to do."""
    try:
        yield
    except OSError as error:
        raise refusal(root, error) from error


def refusal(root: Path, error: OSError) -> StoreError | PermissionRefused:
    """Say why the store could not be written, and how much room there is."""
    what, where = f"cannot write to the store: {error.strerror or error}", str(error.filename or root)
    if error.errno in {errno.EACCES, errno.EPERM}:
        return PermissionRefused(
            what, str(error.filename or root), "check who owns it, or set TREELINE_ARTIFACTS", code="store.permission"
        )
    if error.errno in {errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.EROFS, errno.ELOOP}:
        refused = StoreError(what, where, "set TREELINE_ARTIFACTS to a folder that can be written", code="store.create")
        refused.exit_code = 73
        return refused
    return StoreError(
        f"{what}, {room(root)} free",
        where,
        "free space or set TREELINE_ARTIFACTS, then rerun; finished steps are kept",
        code="store.write",
    )


def room(root: Path) -> str:
    """Return the free space where a folder lies or would lie, in MB."""
    while not root.exists() and root != root.parent:
        root = root.parent
    return f"{shutil.disk_usage(root).free / 1e6:,.0f} MB"
