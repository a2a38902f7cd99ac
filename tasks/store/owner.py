"""Who holds a scratch folder or a lease: a host and a process, recognised even when its number is used again."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from pathlib import Path

FOREIGN_PATIENCE = 3600.0  # seconds without a change after which another host's holder counts as dead


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "host"


def _started(pid: int) -> str:
    """Return when a process started, in clock ticks since boot; "0" where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"


def mark() -> str:
    """Return a name for this process that no other process has, and a part that differs at each call."""
    pid = os.getpid()
    return f"{_host()}.{pid}.{_started(pid)}.{secrets.token_hex(4)}"


def is_alive(name: str, path: Path) -> bool:
    """Tell whether the process that `mark` named still runs.

    Args:
        name: What `mark` returned.
        path: What it holds; for a process of another host, its age decides.
    """
    try:
        host, pid, started, _ = name.rsplit(".", 3)
        number = int(pid)
    except ValueError:
        return False
    if host != _host():
        return time.time() - _touched(path) < FOREIGN_PATIENCE
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, as somebody else
    return _started(number) == started


def _touched(path: Path) -> float:
    """Return when a path, or anything in it, last changed, in seconds since the epoch."""
    try:
        inside = [entry.lstat() for entry in path.rglob("*")] if path.is_dir() else []
        return max(max(found.st_mtime, found.st_ctime) for found in [path.lstat(), *inside])
    except OSError:
        return 0.0
