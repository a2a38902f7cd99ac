"""Stopping where nothing is lost: a wish to stop is granted at once inside work that can be thrown away, else later.

Whoever handles signals calls `ask`; the training loop opens `loose` around what may be cut off anywhere, since it
changes neither weights nor counters, and looks at `check` where a step has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """Work was cut off on request; not an `Exception`, so that nobody takes it for a failure."""


class Interrupt:
    """A wish to stop, which nobody may have had yet."""

    def __init__(self) -> None:
        self.asked = self._loose = False

    def ask(self) -> None:
        """Wish to stop; may be called between any two operations of the work, as a signal handler is.

        Raises:
            Interrupted: If the work under way can be thrown away.
        """
        self.asked = True
        if self._loose:
            self._loose = False  # raised once: whoever catches it saves in peace
            raise Interrupted

    def check(self) -> None:
        """Raise `Interrupted` if somebody asked."""
        if self.asked:
            raise Interrupted

    @contextmanager
    def loose(self) -> Iterator[None]:
        """Let the block be cut off anywhere."""
        self.check()
        self._loose = True
        try:
            yield
        finally:
            self._loose = False
