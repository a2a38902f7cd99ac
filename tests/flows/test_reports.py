"""Laws of reports to the UI: they cost a run nothing, and what is not shown is said once."""

import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from flows import recipe, reports, sweep
from flows.reports import reporting, send, surviving
from flows.ui import _Reported
from tasks.artifacts import Report
from tasks.errors import UnavailableError
from tasks.step import Session
from tasks.store.store import Store
from tests.waiting import ended, started, until

ROOT = Path(__file__).parents[2]
TINY = str(Path(__file__).with_name("tiny.toml"))
WHERE: ContextVar[str] = ContextVar("where")


def refuse(*given: object) -> None:
    raise ConnectionError("nobody is there\nat all")


def test_reports_are_sent_in_order_by_another_thread_in_the_context_of_the_caller() -> None:
    seen: list[tuple[str, str, bool]] = []

    def publish(page: str) -> None:
        seen.append((page, WHERE.get(), threading.current_thread() is threading.main_thread()))

    with reporting(), reporting():
        for place in ("here", "there"):
            WHERE.set(place)
            send(f"the page of {place}", publish, lambda: (f"page {WHERE.get()}",))
        until(lambda: len(seen) == 2)
    assert seen == [("page here", "here", False), ("page there", "there", False)]


def test_what_is_not_shown_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with reporting():
        send("the card of train", refuse)
        send("the progress", refuse)
        send("the progress", lambda: None)  # shown in the end
        send("the card of evaluate", print, lambda: (1 / 0,))
    (said,) = caplog.messages
    assert said == (
        "prefect.ui: the UI does not show the card of train, the card of evaluate: nobody is there. No result is lost"
    )


def test_a_server_that_never_answers_is_waited_for_a_moment_at_the_end_and_not_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reports, "PATIENCE", 0.05)
    answered = threading.Event()
    with reporting():
        for number in range(reports.MOST + 3):
            send(f"page {number}", answered.wait)
        caplog.clear()
    assert "page 0, page 1, page 2" in caplog.text
    assert f"page {reports.MOST + 2}: the server does not answer" in caplog.text
    answered.set()


def test_outside_of_a_run_nothing_is_sent() -> None:
    send("a page", refuse)


def test_of_the_progress_of_training_one_report_waits_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("flows.ui.EVERY", 0.0)
    monkeypatch.setattr("flows.reports.send", lambda name, publish: made.append(publish))
    shown = _Reported(200, "train")
    for _ in range(100):
        shown.advance()
    (publish,) = made
    seen: list[float] = []

    def note(*given: float, **more: str) -> float:
        seen.append(given[-1])
        return given[-1]

    for name in ("create", "update"):
        monkeypatch.setattr(f"prefect.artifacts.{name}_progress_artifact", note)
    publish()
    shown.advance(100)
    made[1]()
    assert seen == [50.0, 100.0]


def test_a_run_whose_server_is_lost_goes_on_and_one_that_never_had_it_does_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    went_on: list[bool] = []

    def run(*outcomes: str) -> None:
        session = cast(Session, SimpleNamespace(outcomes=outcomes))
        with surviving(lambda: went_on.append(True), session):
            raise httpx.ConnectError("refused")

    run("download")
    assert went_on == [True]
    assert "the run goes on without it" in caplog.text
    with pytest.raises(UnavailableError, match=r"error\[serve.gone\]: the Prefect server does not answer: refused"):
        run()


@pytest.mark.slow
def test_a_sweep_that_goes_on_alone_makes_what_its_flow_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path))
    base = recipe.load(TINY, ["runtime.threads=1"])
    planned = sweep.arms(base, ["train.lr=1e-3,3e-3"], 1)
    sweep.alone(base, planned)
    outcomes = sweep.done(base, planned)
    assert outcomes
    assert [one.arm.label for one in outcomes] == ["train.lr=0.001", "train.lr=0.003"]
    assert all(isinstance(one.report, Report) for one in outcomes)
    assert Store(tmp_path).last_run(planned[0].recipe.name)["evaluate"] == outcomes[0].report.id


@contextmanager
def served(folder: Path) -> Iterator[tuple[subprocess.Popen[Any], dict[str, str]]]:
    """A server of Prefect's own, and the environment of a run that uses it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TREELINE_"))}
    own = {**kept, "TREELINE_ARTIFACTS": str(folder), "PREFECT_HOME": str(folder / "prefect")}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    asked = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    url = f"http://127.0.0.1:{port}/api"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health"):
                return True
        except OSError:
            return False

    with started(asked, env=own) as server:
        until(answers, server, pause=0.2)
        yield server, {**own, "PREFECT_API_URL": url}


@pytest.mark.slow
@pytest.mark.services
def test_a_server_that_is_killed_while_a_run_trains_costs_it_neither_its_result_nor_half_a_minute(
    tmp_path: Path,
) -> None:
    asked = [sys.executable, "-m", "flows", "run", TINY, "--set", "train.epochs=20", "--force", "train"]
    out, err = tmp_path / "out", tmp_path / "err"
    with (
        served(tmp_path) as (server, environment),
        out.open("w") as stdout,
        err.open("w") as stderr,
        started(asked, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr) as run,
    ):
        until(lambda: any(tmp_path.glob(".scratch/resume-model-*/log.jsonl")), run)
        server.kill()
        server.wait()
        until(lambda: any(tmp_path.glob("report/*/manifest.json")), run)
        assert ended(run, seconds=25) == 0, err.read_text()
    assert re.fullmatch(r"report/[0-9a-f]{12}", out.read_text().splitlines()[-1])
    assert re.search(r"\ntrain +│ ran ", re.sub("│ *(?=train)", "", out.read_text())), out.read_text()
    told = [line for line in err.read_text().splitlines() if "prefect." in line]
    assert len(told) == 2, err.read_text()
    assert "the UI does not show the progress of training, the card of train" in told[0]
    assert "the run goes on without it" in told[1]
    assert "Traceback" not in err.read_text()
