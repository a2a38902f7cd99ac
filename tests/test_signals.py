import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tasks.signals import kept_signals


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
