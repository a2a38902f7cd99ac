"""Stopping where nothing is lost: a request to stop ends interruptible work at once, other work after its step.

A signal handler calls `ask`; the training loop opens `interruptible` around what may be cut off anywhere, since it
changes neither weights nor counters, and looks at `requested` where a step has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """Work was cut off on request; not an `Exception`, so that nobody takes it for a failure."""


class Interrupt:
    """A request to stop, if there was one."""

    def __init__(self) -> None:
        self.requested = self._interruptible = False

    def ask(self) -> None:
        """Request a stop; may be called between any two operations of the work, as a signal handler is.

        Raises:
            Interrupted: If the current work is interruptible.
        """
        self.requested = True
        if self._interruptible:
            self._interruptible = False  # raised once: whoever catches it saves in peace
            raise Interrupted

    def check(self) -> None:
        """Raise `Interrupted` if somebody asked."""
        if self.requested:
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the block be cut off anywhere."""
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
