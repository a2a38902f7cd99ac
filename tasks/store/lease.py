"""Leases: which runs are alive, told by files that they renew.

<root>/.leases/<16 hex>   of one run, or of one build: a line about its kernel, then the artifacts in use, one a line

Who has a lease holds a lock on its file, which the kernel lets go of when the process dies. So on one kernel, the lock
tells at once: also of another PID namespace, under another host name, or of a process that is stopped. Where it cannot
tell (another host, a restart, no locks on the disk), a watcher looks by its own clock whether the file is renewed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from typing import Any, BinaryIO

from tasks.jsonfile import MOST, parse_json
from tasks.store.disk import clock, mark, writing
from tasks.store.lock import try_lock

log = logging.getLogger("treeline.store")
FOLDER = ".leases"
BEAT = 3.0  # seconds between two renewals
SILENCE = 15.0  # seconds of watching without a renewal, after which a lease that no lock tells of counts as given up
POLL = 0.5  # seconds between two looks


class Lease:
    """A sign that this process is alive, and which artifacts it uses; `lease` gives one."""

    def __init__(self, root: Path) -> None:
        self.name, self.ids, self._root = mark(), list[str](), root
        self.path = root / FOLDER / self.name
        draft = self.path.with_name(f".{self.name}")
        with writing(root):
            draft.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
            try:
                # Locked and written before it has its name: nobody ever sees one that is not.
                self._add(json.dumps({"kernel": _kernel(draft), "locked": try_lock(self._file) is True}))
                draft.rename(self.path)
            except OSError:
                os.close(self._file)
                draft.unlink(missing_ok=True)
                raise

    def hold(self, artifact_id: str) -> None:
        """Keep an artifact from being collected while the lease lasts.

        Raises:
            StoreError: If that cannot be written down: `gc` would not know of it.
        """
        if artifact_id not in self.ids:
            with writing(self._root):
                self._add(artifact_id)
            self.ids.append(artifact_id)

    def _add(self, line: str) -> None:
        content = f"{line}\n".encode()
        if os.write(self._file, content) != len(content):
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(self.path))
        os.fsync(self._file)  # else another host might not see it

    def renew_until(self, ended: threading.Event) -> None:
        """Renew the lease every `BEAT` seconds until it ends; say once if that fails."""
        said = False
        while not ended.wait(BEAT):
            try:
                os.utime(self.path)
            except OSError as error:
                if not said:
                    log.warning("store.lease: %s: %s; another host may take this run for dead", self.path, error)
                said = True

    def end(self) -> None:
        """Give it up."""
        with suppress(OSError):  # the store is gone, or cannot be written any more: the lock still is let go of
            self.path.unlink()
        os.close(self._file)


@contextmanager
def lease(root: Path) -> Iterator[Lease]:
    """Show that this process is alive, to every other one that uses the store, while the block runs.

    Raises:
        StoreError, PermissionRefused: If that cannot be written down.
    """
    held, ended = Lease(root), threading.Event()
    renewing = threading.Thread(target=held.renew_until, args=(ended,), name="lease", daemon=True)
    renewing.start()
    try:
        yield held
    finally:
        ended.set()
        renewing.join()
        held.end()


def leases(root: Path) -> list[Path]:
    """List the leases, of runs that are alive or not."""
    return sorted((root / FOLDER).glob("[!.]*"))


def given_up(found: Collection[Path], rest: float = 0.0) -> set[Path]:
    """Tell which leases are of nobody any more: their process ended, or they were removed.

    Args:
        found: The leases. Where no lock tells of one, this watches for up to `SILENCE` seconds, and says so.
        rest: Seconds, by the file system's clock, that such a lease must have gone without renewal besides: a process
            that is stopped renews nothing, and may go on.
    """
    ended = {path for path in found if _locked(path) is False}
    silent = {path: seen for path in {*found} - ended if _locked(path) is None and (seen := _renewed(path))}
    if rest and silent:
        now = clock(next(iter(silent)).parent)
        silent = {path: seen for path, seen in silent.items() if seen / 1e9 < now - rest}
    if silent:
        log.warning("store.lease: another host, or this one before a restart, may be at work; watching %g s", SILENCE)
    until = time.monotonic() + SILENCE
    while silent and time.monotonic() < until:
        time.sleep(POLL)
        silent = {path: seen for path, seen in silent.items() if _renewed(path) in {seen, None}}
    return ended | {*silent}


def held(path: Path) -> list[str]:
    """Read which artifacts a lease keeps; nothing where it ended meanwhile.

    Raises:
        OSError, ValueError: If that cannot be read.
    """
    try:
        with _opened(path) as file:
            content = file.read(MOST)
    except FileNotFoundError:
        return []
    _about(content)
    return content.decode().split("\n")[1:-1]  # what follows the last end of a line is being written


def _opened(path: Path) -> BinaryIO:
    # Opened, a network file system asks its server for the time of a file; and nobody waits for a named pipe.
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")


def _about(content: bytes) -> dict[str, Any]:
    found = parse_json(content.partition(b"\n")[0])
    if not isinstance(found, dict):
        raise ValueError("it is no lease")
    return found


def _locked(path: Path) -> bool | None:
    """Tell whether a lease is held by somebody, as its lock tells; None where that tells nothing."""
    try:
        with _opened(path) as file:
            free = try_lock(file.fileno(), shared=True)
            if free is False:
                return True
            about = _about(file.read(MOST))
            return False if free and about["locked"] and about["kernel"] == _kernel(path) is not None else None
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError):
        return None


def _kernel(path: Path) -> list[Any] | None:
    """Return what two processes have in common that see each other's locks on a file; None where nothing tells."""
    try:
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), path.stat().st_dev]
    except OSError:
        return None


def _renewed(path: Path) -> int | None:
    """Return when a lease was renewed, in nanoseconds; None where it is gone."""
    try:
        with _opened(path) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:  # it is gone, or another user's
        return path.lstat().st_mtime_ns if os.path.lexists(path) else None
