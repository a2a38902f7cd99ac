"""Signals that end a program, kept until work that wants to end tidily has done so, and then sent on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def kept_signals(ask: Callable[[], None]) -> Iterator[None]:
    """Call `ask` when a signal asks the block to end; after the block, send the signal to whom it was meant for.

    Args:
        ask: Makes the block end soon. What it raises is raised in the block, and passes over whoever catches only
            `Exception`; once the block has ended by it, the signal itself takes its place.

    Only the main thread can catch signals: in another one, the block runs as it would without.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) == 1:  # those that follow change nothing: the block is ending
            ask()

    before = {number: signal.signal(number, keep) for number in ENDING}
    try:
        yield
    except BaseException as error:
        if not caught or isinstance(error, Exception):
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])
        raise SystemExit(128 + caught[0])  # where the handler before was content to do nothing
