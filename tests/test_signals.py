import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import cast

import pytest

from flows import store_commands
from flows.__main__ import main
from tasks.signals import kept_signals
from tests.waiting import until


class Ended(BaseException):
    """What the handler of the program raises."""


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_signal_reaches_the_program_once_the_block_has_ended() -> None:
    done = []

    def work() -> None:
        with kept_signals(lambda: done.append("asked")):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("tidy")

    with pytest.raises(Ended):
        work()
    assert done == ["asked", "tidy"]


def test_what_asking_raises_gives_way_to_the_signal() -> None:
    class Cut(BaseException):
        pass

    def ask() -> None:
        raise Cut

    with pytest.raises(Ended), kept_signals(ask):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_failure_is_not_hidden_by_a_signal() -> None:
    def work() -> None:
        with kept_signals(lambda: None):
            os.kill(os.getpid(), signal.SIGTERM)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


def test_a_handler_that_does_nothing_does_not_let_half_done_work_go_on() -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)
    with pytest.raises(SystemExit) as caught, kept_signals(lambda: None):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143


@pytest.mark.parametrize(("number", "code", "says"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_that_comes_again_while_the_command_ends_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, number: int, code: int, says: str
) -> None:
    """Raised in the midst of an end, it would cut that off, and print a traceback."""

    class FactQuery(io.StringIO):
        def write(self, text: str) -> int:
            os.kill(os.getpid(), number)
            return super().write(text)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(store_commands, "ls", lambda asked: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "stderr", told := FactQuery())
    try:
        ended = main(["ls"])
    except SystemExit as stopped:
        ended = cast(int, stopped.code)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (signal.SIG_DFL, signal.SIG_DFL)
    signal.signal(signal.SIGINT, before)
    assert ended == code
    assert told.getvalue().count(f"error[{says}]") == 1


def test_a_signal_that_was_swallowed_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.__main__.AGAIN", 0.1)

    def swallow(asked: object) -> int:
        with suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: False, seconds=5)
        return 0

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(store_commands, "ls", swallow)
    with pytest.raises(SystemExit) as caught:
        main(["ls"])
    signal.signal(signal.SIGINT, before)
    assert caught.value.code == 143


def test_handlers_are_given_back_and_another_thread_leaves_them_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with kept_signals(lambda: None):
        assert signal.getsignal(signal.SIGTERM) is not before
        found = []

        def look() -> None:
            with kept_signals(lambda: None):
                found.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert found == [signal.getsignal(signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) is before
