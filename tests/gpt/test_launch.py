"""Laws of the launcher, with processes that load nothing: who is lost is named, who is left is ended."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InputError, RankLost, TrainingError
from tasks.gpt import launch
from tasks.gpt.interrupt import Interrupt, Interrupted
from tasks.gpt.launch import done_by_many
from tasks.progress import listening
from tests.waiting import patience, until

RANK = """
import json, os, signal, sys, time
mouth, order = os.fdopen(int(os.environ["TREELINE_TELL"]), "w"), json.loads(sys.stdin.readline())
def say(**one): print(json.dumps(one), file=mouth, flush=True)
def forever(beats=lambda: 0):
    while True: say(beat=beats()); time.sleep(0.1)
rank, here = order["rank"], order["here"]
open(f"{here}/{rank}-{os.getpid()}", "w").close()
tries = len([name for name in os.listdir(here) if name.startswith(f"{rank}-")])
"""


def many(here: Path, body: str, interrupt: Interrupt | None = None, **more: Any) -> Any:
    order = {"here": str(here), "grace": launch.GRACE}
    command = [sys.executable, "-c", RANK + body]
    given: dict[str, Any] = {"restarts": 0, "silence": patience(30), **more}
    return done_by_many(command, order, 2, where="here", folder=here, interrupt=interrupt or Interrupt(), **given)


@pytest.fixture(autouse=True)
def _aftermath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "AFTERMATH", patience(launch.AFTERMATH))


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
    say(open=["train", 2, "steps"]); say(advance=[1, "loss 2"]); say(close=None)
    say(log=[20, "told"]); say(result={"steps": order["size"]})
"""
    with listening(screen := Screen()):
        assert many(tmp_path, body) == {"steps": 2}
    assert screen.seen == [("train", 2, "steps"), (1, "loss 2"), "closed"]
    assert "told" in caplog.messages


def test_after_a_rank_was_killed_all_begin_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = """
if rank == 1 and tries == 1: os.kill(os.getpid(), signal.SIGKILL)
if tries == 1: forever()
if rank == 0: say(result=tries)
"""
    assert many(tmp_path, body, restarts=1) == 2
    assert "rank 1 of 2 was killed by SIGKILL; all go on from the last checkpoint" in caplog.text


def test_once_restarts_are_used_up_the_error_says_what_the_rank_said(tmp_path: Path) -> None:
    body = """
if rank == 1: say(error={"at": 1.0, "what": "RuntimeError: the cat sat on it"}); sys.exit(70)
say(error={"at": 2.0, "what": "RuntimeError: connection closed by peer"}); sys.exit(70)
"""
    with pytest.raises(RankLost, match="rank 1 of 2 ended with code 70: RuntimeError: the cat sat on it") as caught:
        many(tmp_path, body, restarts=2)
    assert (caught.value.exit_code, caught.value.code) == (75, "train.rank")
    assert len(list(tmp_path.glob("1-*"))) == 3


def test_a_rank_that_is_frozen_is_named_and_ended(tmp_path: Path) -> None:
    body = "os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else forever()"
    with pytest.raises(RankLost, match=r"rank 1 of 2 gave no sign of life for [\d.]+ s"):
        many(tmp_path, body, silence=patience(1))
    assert nobody_is_left(tmp_path)


def test_of_ranks_that_wait_for_each_other_the_one_behind_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match=r"rank 1 of 2 got no further for [\d.]+ s; others wait"):
        many(tmp_path, "forever(lambda: 7 - rank)", silence=patience(1))
    assert nobody_is_left(tmp_path)


def test_an_error_of_ours_is_raised_as_it_was_and_not_tried_again(tmp_path: Path) -> None:
    body = """
if rank == 0: forever()
say(error={"at": 1.0, "what": "x", "kind": "InputError", "parts": ["odd", "line 3", "mend it", "train.odd"]})
sys.exit(65)
"""
    with pytest.raises(InputError) as caught:
        many(tmp_path, body, restarts=2)
    assert type(caught.value) is InputError
    assert str(caught.value) == "error[train.odd]: odd. line 3. mend it."
    assert len(list(tmp_path.glob("1-*"))) == 1
    assert nobody_is_left(tmp_path)


def test_an_error_of_the_system_is_raised_as_it_was(tmp_path: Path) -> None:
    body = 'say(error={"at": 1.0, "what": "x", "kind": "OSError", "parts": [28, "No space left", "/x"]}); sys.exit(70)'
    with pytest.raises(OSError, match="No space left") as caught:
        many(tmp_path, body)
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
        many(tmp_path, body, asked_when_ready(tmp_path))
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_listener_that_fails_leaves_nobody_behind(tmp_path: Path) -> None:
    class Broken(Screen):
        def advance(self, amount: float = 1, note: str = "") -> None:
            raise TrainingError("broken")

    with pytest.raises(TrainingError, match="broken"), listening(Broken()):
        many(tmp_path, 'say(open=["train", 2, "steps"]); say(advance=[1, ""]); forever()')
    assert nobody_is_left(tmp_path)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(70)", "forever()"])
def test_once_rank_0_has_told_the_result_nobody_can_spoil_it(tmp_path: Path, end: str) -> None:
    body = f"""
if rank == 0: say(result="made"); time.sleep(0.1)
else:
    while not os.path.exists(here + "/told"): time.sleep(0.02)
{end}
"""

    class Told(Screen):
        def advance(self, amount: float = 1, note: str = "") -> None:
            (tmp_path / "told").touch()

    told = 'if rank == 0: say(open=["train", 1, ""]); say(advance=[1, ""])\n'
    with listening(Told()):
        assert many(tmp_path, told + body) == "made"
    assert nobody_is_left(tmp_path)


def test_whoever_has_done_its_part_may_end_as_it_likes_while_rank_0_goes_on_in_silence(tmp_path: Path) -> None:
    silence = patience(0.8)
    body = f"""
if rank == 1:
    say(error={{"at": 1.0, "what": "x", "kind": "InputError", "parts": ["odd", "", "", "train.odd"]}})
    say(done=None)
    sys.exit(70)
for _ in range(15): say(beat=7); time.sleep({silence / 8})
say(result="made")
"""
    assert many(tmp_path, body, silence=silence) == "made"


def test_one_that_ends_before_its_order_is_named_by_its_code(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match="rank 0 of 2 ended with code 3"):
        done_by_many(
            [sys.executable, "-S", "-c", "import os; os.close(0); os._exit(3)"], {"long": "x" * (1 << 20)}, 2,
            where="here", folder=tmp_path, interrupt=Interrupt(), restarts=0,
        )  # fmt: skip


# Saving begins where the step ends, as in training: inside the handler, a line might be cut into another one.
SLOW = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
open(f"{here}/ready-{rank}", "w").close()
while not asked: say(beat=0); time.sleep(0.05)
"""
SAVING = """
for beat in range(1, 11): say(beat=beat); time.sleep(order["grace"] / 7)
open(f"{here}/saved-{rank}", "w").close(); sys.exit(143)
"""


@pytest.mark.parametrize(("after", "saved"), [(SAVING, 2), ("forever()", 0)])
def test_asked_to_stop_who_gets_on_is_waited_for_and_who_does_not_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: str, saved: int
) -> None:
    monkeypatch.setattr(launch, "GRACE", patience(0.7))
    with pytest.raises(Interrupted):
        many(tmp_path, SLOW + after, asked_when_ready(tmp_path))
    assert len(list(tmp_path.glob("saved-*"))) == saved
    assert ("still saving, and waited for" if saved else "not all ranks did in") in caplog.text
    assert nobody_is_left(tmp_path)
