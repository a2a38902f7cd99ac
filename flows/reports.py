"""Reports to the Prefect UI, sent by a thread of their own: a server that is slow or dead costs a run nothing.

Prefect's database is a view, never the truth. What could not be sent is dropped, and said once, at the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from queue import Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

from tasks.errors import UnavailableError

if TYPE_CHECKING:
    from tasks.step import Session

log = logging.getLogger("treeline.flows")
MOST = 100  # reports that may wait: a run sends a dozen
PATIENCE = 2.0  # seconds that the end of a run waits for what was not sent yet
NOT_TO_SERVER = {"send_to_api": False}  # read by Prefect's handler
_survives: ContextVar[bool] = ContextVar("treeline_survives", default=False)  # the run would go on without a server


class _Reports:
    """A bounded queue, and the thread that sends what is in it, in order."""

    def __init__(self) -> None:
        self.survives = _survives.get()
        self.queue: Queue[tuple[Future[None], Callable[[], Any]] | None] = Queue(MOST)
        self.last: dict[str, Future[None]] = {}  # by name: a later report takes the place of an earlier one
        Thread(target=self.send_all, name="treeline-reports", daemon=True).start()

    def add(self, name: str, publish: Callable[..., Any], render: Callable[[], tuple[Any, ...]]) -> None:
        sent: Future[None] = Future()
        self.last[name] = sent
        try:  # Prefect's context says whose report it is
            self.queue.put_nowait((sent, partial(copy_context().run, publish, *render())))
        except Exception as error:  # the queue is full, or the page cannot be drawn
            sent.set_exception(error)

    def send_all(self) -> None:
        import httpx
        from prefect.settings import get_current_settings

        while report := self.queue.get():
            sent, publish = report
            try:
                publish()
                sent.set_result(None)
            except Exception as error:  # whatever the server or the network may raise
                sent.set_exception(error)
                if self.survives and isinstance(error, httpx.ConnectError):
                    get_current_settings().client.max_retries = 0  # also Prefect's own calls need not wait for it

    def close(self) -> None:
        """Wait a moment for what was not sent yet, and say what is not shown."""
        wait(self.last.values(), PATIENCE)
        with suppress(Full):  # then the thread ends with the process
            self.queue.put_nowait(None)
        lost = {name: _reason(sent) for name, sent in self.last.items()}
        if missing := [name for name, reason in lost.items() if reason]:
            reason = next(reason for reason in lost.values() if reason)
            told = "prefect.ui: the UI does not show %s: %s. No result is lost"
            log.warning(told, ", ".join(missing), reason, extra=NOT_TO_SERVER)


def _reason(sent: Future[None]) -> str:
    """Say why a report was not sent; nothing if it was."""
    if not sent.done():
        return "the server does not answer"
    error = sent.exception()
    return _line(error) if error else ""


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def surviving(go_on: Callable[[], Any], run: Session | None = None) -> Iterator[None]:
    """Call `go_on`, outside of any flow, where the block's flow fails because its server does not answer any more.

    Raises:
        UnavailableError: If it did not answer from the beginning of the run.
    """
    import httpx

    token = _survives.set(True)
    try:
        yield
    except httpx.HTTPError as error:
        if run and not run.outcomes:
            url = os.environ.get("PREFECT_API_URL", "")
            hint = "Start it, or unset PREFECT_API_URL"
            what = f"the Prefect server does not answer: {_line(error)}"
            raise UnavailableError(what, url, hint, "serve.gone") from error
        told = "prefect.server: it is gone (%s); the run goes on without it, and the UI does not show its end"
        log.warning(told, _line(error), extra=NOT_TO_SERVER)
        go_on()
    finally:
        _survives.reset(token)


def bound_patience() -> None:
    """Let this process give up soon what a dead server does not take: events, of which each takes eight seconds."""
    from prefect.events.clients import PrefectEventsClient
    from prefect.events.worker import EventsWorker

    if os.environ.get("PREFECT_API_URL"):  # three attempts, without a pause
        EventsWorker.set_client_override(PrefectEventsClient, reconnection_attempts=2)
    logging.raiseExceptions = False  # else Prefect prints two lines for each log that it cannot send


_reports: ContextVar[_Reports] = ContextVar("treeline_reports")


@contextmanager
def reporting() -> Iterator[None]:
    """Send what is reported in the block; a block inside another one goes on with the outer one's thread."""
    if _reports.get(None):
        yield
        return
    opened = _Reports()
    token = _reports.set(opened)
    try:
        yield
    finally:
        _reports.reset(token)
        opened.close()


def send(name: str, publish: Callable[..., Any], render: Callable[[], tuple[Any, ...]] = tuple) -> None:
    """Let something be published soon, by another thread; where nothing is reported, never.

    Args:
        name: Says in a sentence what would be missing in the UI.
        publish: Calls Prefect, in a copy of the caller's context.
        render: Returns what `publish` is called with; runs here, since two threads must not draw at once.
    """
    if reports := _reports.get(None):
        reports.add(name, publish, render)
