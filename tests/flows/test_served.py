"""One run of a real server and a served deployment, end to end, as the UI's form would start it."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import recipe
from tests.waiting import ended, patience, started, until

ROOT = Path(__file__).parents[2]
TINY = str(Path(__file__).with_name("tiny.toml"))
pytestmark = [pytest.mark.services, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Api:
    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url, self.process = url, process
        self.csrf: dict[str, str] = {}

    def __call__(self, path: str, body: Any = None) -> Any:
        if body is not None and not self.csrf:
            token = self(f"/csrf-token?client={'0' * 32}")["token"]
            self.csrf = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "0" * 32}
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **self.csrf})
        with urllib.request.urlopen(asked, timeout=patience(20)) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TREELINE_"))}
    environment = {**kept, "TREELINE_ARTIFACTS": str(folder), "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    asked = [sys.executable, "-m", "flows", "serve", "--port", str(port)]
    with started(asked, cwd=ROOT, env=environment) as process:
        made = Api(f"http://127.0.0.1:{port}/api", process)
        until(lambda: _served(made), process, pause=0.5)
        yield made
        process.send_signal(signal.SIGINT)
        ended(process, seconds=60)


def _served(api: Api) -> bool:
    try:
        return len(api("/deployments/filter", {})) == 2
    except OSError:
        return False


def start(api: Api) -> dict[str, Any]:
    """Start the quickstart deployment with a small recipe in its form, and wait for its end."""
    deployment = api("/deployments/name/treeline/quickstart")
    parameters = {"recipe": recipe.load(TINY).model_dump(mode="json")}
    created = api(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
    return until(lambda: _over(api(f"/flow_runs/{created['id']}")), api.process, pause=0.5)


def _over(run: dict[str, Any]) -> dict[str, Any] | None:
    return run if run["state_type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} else None


def tasks(api: Api, run: dict[str, Any]) -> list[dict[str, Any]]:
    flows = [run["id"]]
    parents = api("/task_runs/filter", {"flow_runs": {"id": {"any_": flows}}})
    parent_ids = [parent["id"] for parent in parents]
    children = api("/flow_runs/filter", {"flow_runs": {"parent_task_run_id": {"any_": parent_ids}}})
    ids = [child["id"] for child in children]
    found: list[dict[str, Any]] = api(
        "/task_runs/filter", {"flow_runs": {"id": {"any_": ids}}, "sort": "EXPECTED_START_TIME_ASC"}
    )
    return found


def test_the_form_explains_itself(api: Api) -> None:
    deployment = api("/deployments/name/treeline/quickstart")
    schema = deployment["parameter_openapi_schema"]
    train = schema["definitions"]["TrainParams"]["properties"]
    assert all("description" in field for field in train.values())
    assert "force" in schema["properties"]
    assert deployment["parameters"]["recipe"]["encode"]["tokenizer"] == "trained"
    assert deployment["description"]


def test_a_run_started_from_the_form_makes_everything_and_a_second_one_shows_cached(api: Api) -> None:
    first = start(api)
    assert first["state_name"] == "Completed", first["state"]
    names = [task["name"] for task in tasks(api, first)]
    assert [name.split()[0] for name in names] == ["download", "parse", "curate", "encode", "train", "evaluate"]
    cards = {artifact["key"] for artifact in api("/artifacts/filter", {})}
    steps = {f"treeline-{step}" for step in ("download", "parse", "curate", "encode", "train", "evaluate", "run")}
    assert steps | {"treeline-training"} <= cards
    second = start(api)
    again = tasks(api, second)
    assert {task["state_name"] for task in again} == {"Cached"}
    assert all(task["name"].endswith(" cached") for task in again)


def test_a_web_page_from_elsewhere_cannot_start_a_run(api: Api) -> None:
    asked = urllib.request.Request(
        f"{api.url}/flows/", b'{"name": "evil"}', {"Content-Type": "application/json", "Origin": "https://evil.example"}
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(asked, timeout=patience(10))
