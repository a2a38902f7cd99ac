"""Asked to stop, a run saves a checkpoint wherever it is, and goes on from it to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.gpt import run_state
from tasks.gpt.forward import hidden_states
from tasks.gpt.interrupt import Interrupt, Interrupted
from tests.gpt.test_loop import MACHINE, STEPS, equal, run


class AskedAt(Interrupt):
    """Asked at the nth look at the clock, or in the nth pass through the model."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def count(self) -> float:
        self.left -= 1
        if self.left == 0:
            self.ask()
        return 0.0


def stopped(folder: Path, interrupt: AskedAt, ticks: bool, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run until the interrupt; tell whether it came before the end."""
    machine = replace(MACHINE, interrupt=interrupt)
    if ticks:
        machine = replace(machine, clock=interrupt.count)
    else:
        passed: Callable[..., object] = lambda *given: (interrupt.count(), hidden_states(*given))[1]  # noqa: E731
        monkeypatch.setattr(run_state, "hidden_states", passed)
    try:
        run(folder, machine=machine)
    except Interrupted:
        return True
    finally:
        monkeypatch.undo()
    return False


@pytest.mark.parametrize("ticks", [True, False], ids=["between", "inside"])
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 6, 9, 12, 15, 20, 25])
def test_asked_anywhere_it_saves_and_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ticks: bool, calls: int
) -> None:
    whole, told, log = run(tmp_path / "whole")
    assert stopped(tmp_path / "cut", AskedAt(calls), ticks, monkeypatch)
    assert list((tmp_path / "cut" / "checkpoints").glob("step-*"))
    resumed, progress, resumed_log = run(tmp_path / "cut")
    assert equal(resumed, whole)
    assert (progress.step, progress.best_nll) == (STEPS, told.best_nll)
    assert [entry["val_nll"] for entry in resumed_log] == [entry["val_nll"] for entry in log]
    assert [entry["loss"] for entry in resumed_log] == [entry["loss"] for entry in log]


def test_work_that_changes_something_is_not_cut_off() -> None:
    interrupt = Interrupt()
    interrupt.ask()
    with pytest.raises(Interrupted):
        interrupt.check()
    with pytest.raises(Interrupted), interrupt.interruptible():
        pytest.fail("asked before, it must not begin")


def test_it_is_raised_once_so_that_saving_is_left_in_peace() -> None:
    interrupt = Interrupt()
    with pytest.raises(Interrupted), interrupt.interruptible():
        interrupt.ask()
    interrupt.ask()
