"""How `serve` ends, and what its end leaves: a checkpoint, no process, no run that is under way for ever."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import ROOT, Serve, awaited, clean_environment

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]
UNDER_WAY = {"RUNNING", "PENDING", "CANCELLING"}
LONG = ("train.epochs=2000", "train.evals_per_epoch=1", "runtime.checkpoint_seconds=3600")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def trains(serve: Serve) -> None:
    """Start a training that takes long, and wait until it trains."""
    serve.api.start(*LONG)
    awaited(lambda: serve.engines() and _shown(serve), serve.alive)


def _shown(serve: Serve) -> bool:
    found = serve.api("/artifacts/filter", {"artifacts": {"key": {"any_": ["treeline-training"]}}})
    return any(one["data"] for one in found)


def checkpoints(folder: Path) -> list[Path]:
    return [*folder.glob(".scratch/resume-model-*/checkpoint*/*")]


def interval(serve: Serve) -> list[int]:
    return [int(one["schedule"]["interval"]) for one in serve.api.deployment()["schedules"] if one["active"]]


def test_asked_to_end_it_saves_what_trains_and_keeps_the_schedules(folder: Path) -> None:
    with Serve(folder) as serve:
        made = {"schedule": {"interval": 86_400}, "active": True}
        serve.api(f"/deployments/{serve.api.deployment()['id']}/schedules", [made])
        trains(serve)
        serve.process.send_signal(signal.SIGTERM)
        assert serve.process.wait(120) == 0
        assert not serve.engines()
        assert not serve.servers()
        assert "Traceback" not in serve.said
    assert checkpoints(folder)
    with Serve(folder) as serve:
        assert not serve.api.states() & UNDER_WAY
        assert "CANCELLED" in serve.api.states()
        assert not serve.api.deployment()["paused"]
        assert interval(serve) == [86_400]


def test_killed_it_leaves_no_engine_and_the_next_one_closes_its_runs(folder: Path) -> None:
    with Serve(folder) as serve:
        trains(serve)
        serve.process.kill()
        awaited(lambda: not serve.engines() and not serve.servers())
    assert checkpoints(folder)
    with Serve(folder) as serve:
        assert not serve.api.states() & UNDER_WAY
        assert "CRASHED" in serve.api.states()


def test_the_end_of_its_server_is_said_in_a_line(folder: Path) -> None:
    with Serve(folder) as serve:
        trains(serve)
        (server,) = serve.servers()
        os.kill(server, signal.SIGKILL)
        assert serve.process.wait(60) == 69
        awaited(lambda: not serve.engines())
        assert [line for line in serve.said.splitlines() if line.startswith("error[")] == [
            f"error[prefect.ended]: the Prefect server has ended (signal 9). {folder}/.server.log. "
            "Start it again; a run that was under way goes on from its last checkpoint."
        ]
        assert "Traceback" not in serve.said
    assert checkpoints(folder)


def test_an_error_of_its_servers_services_is_said_once(folder: Path) -> None:
    with Serve(folder) as serve:
        with sqlite3.connect(folder / ".prefect" / "prefect.db") as database:
            database.execute("alter table deployment_schedule rename to gone")
        awaited(lambda: "OperationalError" in serve.said, serve.alive)
        awaited(lambda: (folder / ".server.log").read_text().count("treeline-error: ") > 3, serve.alive)
        said = [line for line in serve.said.splitlines() if line.startswith("error[prefect.server]")]
        assert len(said) == len({re.sub(r"\d+", "", line) for line in said})
        assert any("no such table: deployment_schedule" in line for line in said)


@pytest.mark.parametrize("command", ["serve", "run", "sweep"])
def test_a_server_that_the_user_names_and_does_not_answer(folder: Path, command: str) -> None:
    url = "http://u:secret@127.0.0.1:9/api"
    environment = clean_environment(TREELINE_ARTIFACTS=str(folder), PREFECT_API_URL=url)
    arguments = ["quickstart", "--set", "train.lr=1e-3,2e-3"] if command == "sweep" else []
    asked = [sys.executable, "-m", "flows", command, *arguments]
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 69
    assert done.stderr.splitlines()[-1] == (
        "error[prefect.unreachable]: no Prefect server answers at http://127.0.0.1:9/api. PREFECT_API_URL. "
        "Start it or correct the address; unset, a server is started for you."
    )
    assert "the UI is at" not in done.stdout


def test_a_server_that_cannot_start_says_why(folder: Path) -> None:
    database = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://postgres@127.0.0.1:9/none"}
    environment = clean_environment(TREELINE_ARTIFACTS=str(folder), **database)
    asked = [sys.executable, "-m", "flows", "serve", "--port", "0"]
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 69
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error[prefect.start]: the Prefect server did not start: ")
    assert "Connect" in said
    assert done.stdout == ""
