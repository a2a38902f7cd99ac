"""Laws of the launcher, with workers that load nothing: a lost one is named, and none is left running."""

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InputError, RankLost, TrainingError
from tasks.gpt import launcher
from tasks.gpt.interrupt import Interrupt, Interrupted
from tasks.gpt.launcher import run_workers
from tasks.progress import listening
from tests.waiting import patience, until

WORKER = """
import json, os, signal, sys, time
folder, rank, attempt = sys.argv[-1], int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
pipe = open(f"{folder}/{attempt}-{rank}.pipe", "w")
here = json.load(open(f"{folder}/job.json"))["here"]
def send(**report): print(json.dumps(report), file=pipe, flush=True)
def forever(heartbeats=lambda: 0):
    while True: send(heartbeats=heartbeats()); time.sleep(0.1)
open(f"{here}/{rank}-{os.getpid()}", "w").close()
"""


def run(here: Path, body: str, interrupt: Interrupt | None = None, **settings: Any) -> Any:
    command = [sys.executable, "-c", WORKER + body]
    settings = {"max_restarts": 0, "heartbeat_timeout": patience(30), **settings}
    return run_workers(command, {"here": str(here)}, 2, interrupt=interrupt or Interrupt(), **settings)


def none_is_left(here: Path) -> bool:
    return not any(Path(f"/proc/{path.name.split('-')[1]}").exists() for path in here.glob("?-*"))


class Screen:
    def __init__(self) -> None:
        self.events: list[Any] = []

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator["Screen"]:
        self.events.append((label, total, unit))
        yield self
        self.events.append("closed")

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.events.append((amount, note))


def test_progress_log_and_result_of_rank_0_are_handed_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    body = """
if rank == 0: send(bar=["train", 2, "steps"]); send(advance=[1, "loss 2"]); send(log=[20, "logged"]); send(result=2)
"""
    with listening(screen := Screen()):
        assert run(tmp_path, body) == 2
    assert screen.events == [("train", 2, "steps"), (1, "loss 2"), "closed"]
    assert "logged" in caplog.messages


def test_the_signal_handlers_of_this_process_stay_as_they_were(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    run(tmp_path, "send(result=1)")
    assert [signal.getsignal(number) for number in numbers] == before


def test_after_a_worker_was_killed_all_are_restarted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = """
if rank == 1 and attempt == 0: os.kill(os.getpid(), signal.SIGKILL)
if attempt == 0: forever()
if rank == 0: send(result=attempt)
"""
    assert run(tmp_path, body, max_restarts=1) == 1
    assert "rank 1 of 2 was killed by SIGKILL; all ranks resume from the last checkpoint" in caplog.text


def test_once_restarts_are_used_up_the_error_names_the_earliest_report(tmp_path: Path) -> None:
    body = """
send(error={"time": 2.0 - rank, "message": ["RuntimeError: closed by peer", "RuntimeError: the cause"][rank]})
sys.exit(70)
"""
    with pytest.raises(RankLost, match="rank 1 of 2 exited with code 70: RuntimeError: the cause") as caught:
        run(tmp_path, body, max_restarts=1)
    assert (caught.value.exit_code, caught.value.code) == (75, "train.rank")
    assert len(list(tmp_path.glob("1-*"))) == 2


@pytest.mark.parametrize(
    "body", ["os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else forever()", "forever(lambda: 7 - rank)"]
)
def test_of_ranks_without_progress_the_one_behind_is_named_and_all_are_killed(tmp_path: Path, body: str) -> None:
    what = r"rank 1 of 2 made no progress for [\d.]+ s; the other ranks are blocked on it"
    with pytest.raises(RankLost, match=what):
        run(tmp_path, body, heartbeat_timeout=patience(1))
    assert none_is_left(tmp_path)


def test_an_error_of_ours_is_raised_as_it_was_and_not_tried_again(tmp_path: Path) -> None:
    body = """
if rank == 0: forever()
send(error={"class": "InputError", "arguments": ["odd", "line 3", "mend it", "train.odd"]}); sys.exit(65)
"""
    with pytest.raises(InputError) as caught:
        run(tmp_path, body, max_restarts=2)
    assert type(caught.value) is InputError
    assert str(caught.value) == "error[train.odd]: odd. line 3. mend it."
    assert len(list(tmp_path.glob("1-*"))) == 1
    assert none_is_left(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left", "/x"), InputError("odd", "x", "mend", "train.odd")])
def test_an_error_survives_the_way_up(error: Exception) -> None:
    passed = launcher.error_from_json(launcher.error_to_json(error))
    assert (type(passed), str(passed)) == (type(error), str(error))


@pytest.mark.parametrize(("body", "what"), [("sys.exit(3)", "exited with code 3"), ("", "exited without a result")])
def test_workers_that_exit_without_a_word_are_an_error(tmp_path: Path, body: str, what: str) -> None:
    with pytest.raises(RankLost, match=what):
        run(tmp_path, body)


def asked_when_ready(folder: Path) -> Interrupt:
    """Return an interrupt that is asked once both workers are ready."""
    interrupt = Interrupt()

    def ask() -> None:
        until(lambda: len(list(folder.glob("ready-*"))) == 2)
        interrupt.ask()

    threading.Thread(target=ask, daemon=True).start()
    return interrupt


# Saving begins where the step ends, as in training: inside the handler, a line might be cut into another one.
STEP = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
open(f"{here}/ready-{rank}", "w").close()
while not asked: send(heartbeats=0); time.sleep(0.05)
if rank == 1: sys.exit(143)
"""
SAVE = """
for count in range(1, 11): send(heartbeats=count); time.sleep({pause})
open(here + "/saved", "w").close(); sys.exit(143)
"""


@pytest.mark.parametrize(("after", "saved"), [(SAVE, True), ("forever()", False)])
def test_asked_to_stop_who_makes_progress_is_waited_for_and_who_does_not_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: str, saved: bool
) -> None:
    grace = patience(1.5)
    monkeypatch.setattr(launcher, "GRACE_SECONDS", grace)
    with pytest.raises(Interrupted):
        run(tmp_path, STEP + after.format(pause=grace / 8), asked_when_ready(tmp_path))
    assert (tmp_path / "saved").exists() == saved
    assert ("killed" in caplog.text) is not saved
    assert none_is_left(tmp_path)


def test_a_listener_that_fails_leaves_no_worker_behind(tmp_path: Path) -> None:
    class Broken(Screen):
        def advance(self, amount: float = 1, note: str = "") -> None:
            raise TrainingError("broken")

    with pytest.raises(TrainingError, match="broken"), listening(Broken()):
        run(tmp_path, 'send(bar=["train", 2, "steps"]); send(advance=[1, ""]); forever()')
    assert none_is_left(tmp_path)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(70)", "forever()"])
def test_once_rank_0_has_sent_the_result_no_worker_can_spoil_it(tmp_path: Path, end: str) -> None:
    body = f"""
if rank == 0: send(result="trained"); open(here + "/sent", "w").close()
while not os.path.exists(here + "/sent"): time.sleep(0.02)
{end}
"""
    assert run(tmp_path, body) == "trained"
    assert none_is_left(tmp_path)


def test_rank_0_may_finish_in_silence_once_the_others_have_done_their_part(tmp_path: Path) -> None:
    silence = patience(1)
    body = f"""
if rank == 1: sys.exit(0)
time.sleep({1.5 * silence}); send(result="trained")
"""
    assert run(tmp_path, body, heartbeat_timeout=silence) == "trained"
