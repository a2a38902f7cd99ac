"""Progress of long work, told to whoever listens: a terminal's bars, a Prefect artifact, or nobody.

Steps say how far they are; they never print. `flows/` installs a listener with `listening(...)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Bar(Protocol):
    """One piece of work under way."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Go on by `amount` units; `note` is a short fact to show beside the bar (a loss, a speed)."""


class Listener(Protocol):
    """Shows bars."""

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Bar]:
        """Open a bar of `total` units, None where that is not known."""


class _Silent:
    def advance(self, amount: float = 1, note: str = "") -> None:
        """Say nothing."""

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Bar]:
        """Open a bar that nobody sees."""
        yield self


NOBODY = _Silent()
_listener: ContextVar[Listener] = ContextVar("treeline_progress")


@contextmanager
def listening(to: Listener) -> Iterator[None]:
    """Send all progress inside the block to one listener."""
    token = _listener.set(to)
    try:
        yield
    finally:
        _listener.reset(token)


def listener() -> Listener:
    """Return who listens now."""
    return _listener.get(NOBODY)


def bar(label: str, total: float | None = None, unit: str = "") -> AbstractContextManager[Bar]:
    """Open a bar of `total` units; the block gets a `Bar` to advance."""
    return listener().bar(label, total, unit)


def track(items: Iterable[T], label: str, total: float | None = None, unit: str = "") -> Iterator[T]:
    """Yield `items`, moving a bar by one for each."""
    with bar(label, total, unit) as shown:
        for item in items:
            yield item
            shown.advance()
