"""A lock that spares duplicate work, and nothing else: the store stays right where locks do not work at all.

The kernel lets go of a `flock` when its holder dies, so there is no dead holder to recover from. On file systems
without it, two processes may build the same artifact; the first rename wins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system: work may be done twice, never wrongly
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("treeline.store")
POLL = 0.2  # seconds between two tries
SAY_EVERY = 10.0  # seconds between two messages of one who waits


@contextmanager
def single_flight(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; wait, saying so, while another process holds it."""
    file = _open(path)
    if file is None:
        yield
        return
    with file:
        _wait(file, what)
        yield


def _open(path: Path) -> BinaryIO | None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    return None


def _wait(file: BinaryIO, what: str) -> None:
    said = 0.0
    while try_lock(file.fileno()) is False:
        if time.monotonic() - said > SAY_EVERY:
            log.warning("store.locked: another process is making %s; waiting for it", what)
            said = time.monotonic()
        time.sleep(POLL)


def try_lock(file: int, shared: bool = False) -> bool | None:
    """Lock an open file, without waiting.

    Returns:
        True: it is locked; False: another process holds a lock against that; None: there are no locks here.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
