"""A real server and a served deployment, end to end, as the UI's form would start it."""

import asyncio
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows import recipe
from tests.serving import ROOT, TINY, Api, Serve, awaited

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    with Serve(tmp_path_factory.mktemp("served") / "store") as serve:
        yield serve


@pytest.fixture
def database() -> Iterator[str]:
    """Make a PostgreSQL database for a test, or skip; give its address."""
    asyncpg = pytest.importorskip("asyncpg")
    name = f"treeline_{os.getpid()}"

    async def ask(what: str) -> None:
        line = await asyncpg.connect(host="127.0.0.1", user="postgres", database="test", timeout=10)
        try:
            await line.execute(what)
        finally:
            await line.close()

    try:
        asyncio.run(ask(f"create database {name}"))
    except OSError:
        pytest.skip("no PostgreSQL on this machine")
    try:
        yield f"postgresql+asyncpg://postgres@127.0.0.1:5432/{name}"
    finally:
        asyncio.run(ask(f"drop database {name} with (force)"))


@pytest.fixture
def api(served: Serve) -> Api:
    return served.api


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


def schedule(api: Api, **parameters: Any) -> None:
    """Make a schedule as the UI does, whose first run is due in some seconds, and the next one much later."""
    parameters["recipe"] = recipe.load(TINY).model_dump(mode="json")
    due = (datetime.now(UTC) + timedelta(seconds=20)).isoformat()
    made = {"schedule": {"interval": 86_400, "anchor_date": due}, "active": True, "parameters": parameters}
    api(f"/deployments/{api.deployment()['id']}/schedules", [made])


def scheduled(api: Api) -> dict[str, Any]:
    """Wait for the run that the server's scheduler has made, and that what is served has picked up."""

    def look() -> str | None:
        runs = api("/flow_runs/filter", {"flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}}})
        return next((run["id"] for run in runs if run["auto_scheduled"]), None)

    return api.ended(awaited(look))


def test_the_form_explains_itself(api: Api) -> None:
    deployment = api.deployment()
    schema = deployment["parameter_openapi_schema"]
    train = schema["definitions"]["TrainParams"]["properties"]
    assert all("description" in field for field in train.values())
    assert "force" in schema["properties"]
    assert deployment["parameters"]["recipe"]["encode"]["tokenizer"] == "trained"
    assert deployment["description"]


def test_a_run_started_from_the_form_makes_everything_and_a_second_one_shows_cached(api: Api) -> None:
    first = api.ended(api.start())
    assert first["state_name"] == "Completed", first["state"]
    names = [task["name"] for task in tasks(api, first)]
    assert [name.split()[0] for name in names] == ["download", "parse", "curate", "encode", "train", "evaluate"]
    cards = {artifact["key"] for artifact in api("/artifacts/filter", {})}
    steps = {f"treeline-{step}" for step in ("download", "parse", "curate", "encode", "train", "evaluate", "run")}
    assert steps | {"treeline-training"} <= cards
    second = api.ended(api.start())
    again = tasks(api, second)
    assert {task["state_name"] for task in again} == {"Cached"}
    assert all(task["name"].endswith(" cached") for task in again)


def test_a_schedule_made_in_the_ui_fires(api: Api) -> None:
    schedule(api)
    run = scheduled(api)
    assert run["state_name"] == "Completed", run["state"]


def test_a_schedule_fires_on_postgresql_and_a_run_keeps_to_its_own_database(tmp_path: Path, database: str) -> None:
    with Serve(tmp_path / "store", PREFECT_SERVER_DATABASE_CONNECTION_URL=database) as serve:
        schedule(serve.api, until="download")
        run = scheduled(serve.api)
        assert run["state_name"] == "Completed", run["state"]
        asked = [sys.executable, "-m", "flows", "run", TINY, "--until", "parse"]
        subprocess.run(asked, cwd=ROOT, env=serve.environment, check=True)
        assert len([one for one in serve.api("/flow_runs/filter", {}) if one["state_type"] == "COMPLETED"]) == 2
    assert (tmp_path / "store" / ".prefect" / "run" / "prefect.db").exists()
    assert not (tmp_path / "store" / ".prefect" / "prefect.db").exists()


def test_the_prefect_command_works_with_what_env_prints(served: Serve) -> None:
    asked = [sys.executable, "-m", "flows", "env"]
    done = subprocess.run(asked, cwd=ROOT, env=served.environment, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [word for word, _ in lines] == ["export", "export"]
    variables = dict(one.split("=", 1) for _, one in lines)
    prefect = [sys.executable, "-m", "prefect", "deployment", "ls"]
    environment = {**served.environment, **variables, "PREFECT_HOME": str(served.folder / "elsewhere")}
    assert "quickstart" in subprocess.run(prefect, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_second_serve_of_a_store_names_the_first(served: Serve) -> None:
    asked = [sys.executable, "-m", "flows", "serve", "--port", "0"]
    done = subprocess.run(asked, cwd=ROOT, env=served.environment, capture_output=True, text=True)
    assert done.returncode == 69
    assert served.api.url in done.stderr


def test_the_port_of_another_is_refused(served: Serve, tmp_path: Path) -> None:
    port = served.api.url.rpartition(":")[2].split("/")[0]
    environment = {**served.environment, "TREELINE_ARTIFACTS": str(tmp_path)}
    asked = [sys.executable, "-m", "flows", "serve", "--port", port]
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error[serve.port]: port {port} of this machine cannot be had")


def test_a_run_on_a_server_whose_password_it_lacks_says_where_that_is(served: Serve, tmp_path: Path) -> None:
    environment = {**served.environment, "TREELINE_ARTIFACTS": str(tmp_path), "PREFECT_API_URL": served.api.url}
    asked = [sys.executable, "-m", "flows", "run", TINY]
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 77
    assert "error[prefect.password]" in done.stderr
    assert "python -m flows env" in done.stderr


def test_the_store_the_database_and_the_log_are_the_users_alone(served: Serve) -> None:
    found = [served.folder, *(path for path in served.folder.rglob("*") if ".prefect/ui" not in str(path))]
    assert len(found) > 5
    assert {path for path in found if path.stat().st_mode & 0o077} == set()


def test_what_others_could_read_is_taken_from_them(tmp_path: Path) -> None:
    from flows.server import configure

    database = tmp_path / ".prefect" / "prefect.db"
    database.parent.mkdir()
    for path in (database, tmp_path / ".server.log"):
        path.touch(0o644)
    before = os.umask(0o022)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TREELINE_ARTIFACTS", str(tmp_path))
            configure({})
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path, database.parent, database, tmp_path / ".server.log")]
    assert modes == [0o700, 0o700, 0o600, 0o600]


def test_the_secret_is_in_no_log_state_manifest_or_process_list(served: Serve) -> None:
    secret = (served.folder / ".prefect" / "auth").read_bytes().strip()
    assert len(secret) > 30
    texts = [path for path in served.folder.rglob("*") if path.is_file() and path.name != "auth"]
    assert [path for path in [*texts, served.file] if secret in path.read_bytes()] == []
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(secret in command for command in commands)
