"""Laws of the launcher, with workers that load nothing: a lost one is named, and none is left running."""

import logging
import os
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
folder, rank = os.environ["TREELINE_WORKER_FOLDER"], int(os.environ["RANK"])
pipe = open(f"{folder}/{os.environ['TORCHELASTIC_RESTART_COUNT']}-{rank}.pipe", "w")
job = json.load(open(f"{folder}/job.json"))
def send(**report): print(json.dumps(report), file=pipe, flush=True)
def forever(heartbeats=lambda: 0):
    while True: send(heartbeats=heartbeats()); time.sleep(0.1)
here = job["here"]
open(f"{here}/{rank}-{os.getpid()}", "w").close()
attempts = len([name for name in os.listdir(here) if name.startswith(f"{rank}-")])
"""


def run(here: Path, body: str, interrupt: Interrupt | None = None, **settings: Any) -> Any:
    command = [sys.executable, "-c", WORKER + body]
    settings = {"max_restarts": 0, "heartbeat_timeout": patience(30), **settings}
    job = {"here": str(here), "grace": launcher.GRACE_SECONDS}
    return run_workers(command, job, 2, location="here", interrupt=interrupt or Interrupt(), **settings)


def nobody_is_left(here: Path) -> bool:
    return not any(Path(f"/proc/{path.name.split('-')[1]}").exists() for path in here.glob("?-*"))


class Screen:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator["Screen"]:
        self.seen.append((label, total, unit))
        yield self
        self.seen.append("closed")

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.seen.append((amount, note))


def test_the_result_and_the_progress_are_those_of_rank_0(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    body = """
if rank == 0:
    send(open=["train", 2, "steps"]); send(advance=[1, "loss 2"]); send(close=None)
    send(log=[20, "logged"]); send(result={"steps": int(os.environ["WORLD_SIZE"])})
"""
    with listening(screen := Screen()):
        assert run(tmp_path, body) == {"steps": 2}
    assert screen.seen == [("train", 2, "steps"), (1, "loss 2"), "closed"]
    assert "logged" in caplog.messages


def test_after_a_rank_was_killed_all_begin_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = """
if rank == 1 and attempts == 1: os.kill(os.getpid(), signal.SIGKILL)
if attempts == 1: forever()
if rank == 0: send(result=attempts)
"""
    assert run(tmp_path, body, max_restarts=1) == 2
    assert "rank 1 of 2 was killed by SIGKILL; all ranks resume from the last checkpoint" in caplog.text


def test_once_restarts_are_used_up_the_error_says_what_the_rank_said(tmp_path: Path) -> None:
    body = """
if rank == 1: send(error={"time": 1.0, "message": "RuntimeError: the cat sat on it"}); sys.exit(70)
send(error={"time": 2.0, "message": "RuntimeError: connection closed by peer"}); sys.exit(70)
"""
    with pytest.raises(RankLost, match="rank 1 of 2 exited with code 70: RuntimeError: the cat sat on it") as caught:
        run(tmp_path, body, max_restarts=2)
    assert (caught.value.exit_code, caught.value.code) == (75, "train.rank")
    assert len(list(tmp_path.glob("1-*"))) == 3


def test_a_rank_that_is_frozen_is_named_and_ended(tmp_path: Path) -> None:
    body = "os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else forever()"
    with pytest.raises(RankLost, match=r"rank 1 of 2 made no progress for [\d.]+ s; the other ranks are blocked on it"):
        run(tmp_path, body, heartbeat_timeout=patience(1))
    assert nobody_is_left(tmp_path)


def test_of_ranks_that_wait_for_each_other_the_one_behind_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match=r"rank 1 of 2 made no progress for [\d.]+ s; the other ranks are blocked on it"):
        run(tmp_path, "forever(lambda: 7 - rank)", heartbeat_timeout=patience(1))
    assert nobody_is_left(tmp_path)


def test_an_error_of_ours_is_raised_as_it_was_and_not_tried_again(tmp_path: Path) -> None:
    body = """
if rank == 0: forever()
send(error={"time": 1.0, "message": "x", "type": "InputError", "arguments": ["odd", "line 3", "mend it", "train.odd"]})
sys.exit(65)
"""
    with pytest.raises(InputError) as caught:
        run(tmp_path, body, max_restarts=2)
    assert type(caught.value) is InputError
    assert str(caught.value) == "error[train.odd]: odd. line 3. mend it."
    assert len(list(tmp_path.glob("1-*"))) == 1
    assert nobody_is_left(tmp_path)


def test_an_error_of_the_system_is_raised_as_it_was(tmp_path: Path) -> None:
    body = """
send(error={"time": 1.0, "message": "x", "type": "OSError", "arguments": [28, "No space left", "/x"]}); sys.exit(70)
"""
    with pytest.raises(OSError, match="No space left") as caught:
        run(tmp_path, body)
    assert (caught.value.errno, caught.value.filename) == (28, "/x")


def asked_when_ready(folder: Path) -> Interrupt:
    """Return an interrupt that is asked once both processes have said that they are ready."""
    interrupt = Interrupt()

    def ask() -> None:
        until(lambda: len(list(folder.glob("ready-*"))) == 2)
        interrupt.ask()

    threading.Thread(target=ask, daemon=True).start()
    return interrupt


def test_asked_to_stop_all_may_save_first(tmp_path: Path) -> None:
    body = """
def save(*_): open(f"{here}/saved-{rank}", "w").close(); sys.exit(143)
signal.signal(signal.SIGTERM, save)
open(f"{here}/ready-{rank}", "w").close()
forever()
"""
    with pytest.raises(Interrupted):
        run(tmp_path, body, asked_when_ready(tmp_path))
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_listener_that_fails_leaves_nobody_behind(tmp_path: Path) -> None:
    class Broken(Screen):
        def advance(self, amount: float = 1, note: str = "") -> None:
            raise TrainingError("broken")

    with pytest.raises(TrainingError, match="broken"), listening(Broken()):
        run(tmp_path, 'send(open=["train", 2, "steps"]); send(advance=[1, ""]); forever()')
    assert nobody_is_left(tmp_path)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(70)", "forever()"])
def test_once_rank_0_has_told_the_result_nobody_can_spoil_it(tmp_path: Path, end: str) -> None:
    body = f"""
if rank == 0: send(result="made"); time.sleep(0.1)
else:
    while not os.path.exists(here + "/told"): time.sleep(0.02)
{end}
"""

    class Told(Screen):
        def advance(self, amount: float = 1, note: str = "") -> None:
            (tmp_path / "told").touch()

    told = 'if rank == 0: send(open=["train", 1, ""]); send(advance=[1, ""])\n'
    with listening(Told()):
        assert run(tmp_path, told + body) == "made"
    assert nobody_is_left(tmp_path)


def test_whoever_has_done_its_part_may_end_as_it_likes_while_rank_0_goes_on_in_silence(tmp_path: Path) -> None:
    silence = patience(0.8)
    body = f"""
if rank == 1:
    send(error={{"time": 1.0, "message": "x", "type": "InputError", "arguments": ["odd", "", "", "train.odd"]}})
    send(done=None)
    sys.exit(70)
for _ in range(15): send(heartbeats=7); time.sleep({silence / 8})
send(result="made")
"""
    assert run(tmp_path, body, heartbeat_timeout=silence) == "made"


def test_a_worker_that_exits_before_it_reads_its_job_is_named_with_its_code(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match="rank 0 of 2 exited with code 3"):
        run_workers(
            [sys.executable, "-c", "import os; os._exit(3)"], {}, 2,
            location="here", interrupt=Interrupt(), max_restarts=0,
        )  # fmt: skip


def test_workers_that_exit_without_a_result_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match="rank 0 of 2 exited without a result"):
        run(tmp_path, "")


def test_the_signal_handlers_and_the_environment_of_this_process_stay_as_they_were(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)]
    variables = dict(os.environ)
    run(tmp_path, "send(result=1)")
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)]
    assert (after, dict(os.environ)) == (before, variables)


# Saving begins where the step ends, as in training: inside the handler, a line might be cut into another one.
SLOW = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
open(f"{here}/ready-{rank}", "w").close()
while not asked: send(heartbeats=0); time.sleep(0.05)
"""
SAVING = """
for beat in range(1, 11): send(heartbeats=beat); time.sleep(job["grace"] / 7)
open(f"{here}/saved-{rank}", "w").close(); sys.exit(143)
"""


@pytest.mark.parametrize(("after", "saved"), [(SAVING, 2), ("forever()", 0)])
def test_asked_to_stop_who_gets_on_is_waited_for_and_who_does_not_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: str, saved: int
) -> None:
    monkeypatch.setattr(launcher, "GRACE_SECONDS", patience(0.7))
    with pytest.raises(Interrupted):
        run(tmp_path, SLOW + after, asked_when_ready(tmp_path))
    assert len(list(tmp_path.glob("saved-*"))) == saved
    assert ("still saving" if saved else "not all ranks stopped") in caplog.text
    assert nobody_is_left(tmp_path)
