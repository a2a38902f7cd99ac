"""The memory that a call takes, in a process of its own: a peak never falls."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def taken(call: Callable[..., T], *given: object) -> tuple[T, int]:
    """Return what a call returns, and the bytes by which it raised the peak of its process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (call, given))


def _measured(call: Callable[..., T], given: tuple[object, ...]) -> tuple[T, int]:
    before = _peak()
    return call(*given), _peak() - before


def _peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()  # `ru_maxrss` would begin with the peak of the parent
    (peak,) = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    return peak
