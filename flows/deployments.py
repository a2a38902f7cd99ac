"""What is served: deployments whose form in the Prefect UI starts a run, and the server's own settings."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flows.recipe import load
from flows.tied import tied
from tasks.errors import UnavailableError
from tasks.step import home
from tasks.store.disk import writing

SERVED = ("quickstart", "gpt2-medium")
START_TIME = 120.0  # seconds; the first start migrates the database, 23-41 s were measured


def configure(environment: MutableMapping[str, str]) -> None:
    """Give Prefect and OpenMP their settings, where the user has not: a home of the project's own, quiet, patient."""
    folder = home() / ".prefect"
    defaults = {
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "treeline",
        # On busy cores OpenMP's threads wait by spinning: 560 tokens/s in place of 9,300 were measured on two vCPUs.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # never unpickle what lies in a folder
    }
    for name, value in defaults.items():
        environment.setdefault(name, value)
    with writing(home()):
        Path(environment["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect makes no parents
        with tempfile.TemporaryFile(dir=environment["PREFECT_HOME"]):
            pass  # a folder that cannot be written would show as a thousand lines of its database's traceback


def server_apart() -> None:
    """Let the server that Prefect starts for this process run in a session of its own, and end with this process.

    A killed run would leave it behind, with 200 MB, for ever. And a Ctrl-C at the terminal reaches the whole process
    group: were the server in it, it would be gone before the run could tell it how it ended, and Prefect would ask for
    it for two and a half minutes (3.8.8).
    """
    from prefect.server.api import server as module

    vars(module)["subprocess"] = SimpleNamespace(Popen=tied, TimeoutExpired=subprocess.TimeoutExpired)


def deployments() -> list[Any]:
    """Build the deployments: the whole chain for each served recipe, its form filled in."""
    from flows.pipeline import pipeline

    return [
        pipeline.to_deployment(
            name=name,
            parameters={"recipe": load(name).model_dump(mode="json")},
            tags=["treeline"],
            description=_about(name),
        )
        for name in SERVED
    ]


def _about(name: str) -> str:
    """Return the comment that opens a recipe file."""
    from flows.recipe import FOLDER

    lines = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    opening = []
    for line in lines:
        if not line.startswith("#"):
            break
        opening.append(line.lstrip("# "))
    return "\n".join(opening)


@contextmanager
def server(port: int) -> Iterator[str]:
    """Run a Prefect server on this machine's loopback while the block runs, unless the user has one; give its API URL.

    Raises:
        UnavailableError: If it does not answer in time.
    """
    own = os.environ.get("PREFECT_API_URL")
    if own:
        yield own
        return
    page = f"http://127.0.0.1:{port}"
    settings = {
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_UI_API_URL": f"{page}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": page,  # the default lets any web page start flows
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }
    asked = [sys.executable, "-m", "prefect", "server", "start"]
    with (home() / ".server.log").open("ab") as log:
        child = tied(asked, env={**os.environ, **settings}, stdout=log, stderr=log)
        try:
            _wait(f"{page}/api/health", child)
            os.environ["PREFECT_API_URL"] = f"{page}/api"
            yield f"{page}/api"
        finally:
            os.environ.pop("PREFECT_API_URL", None)
            child.terminate()
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()


def _wait(url: str, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIME
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310  our own server, over http
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise UnavailableError(
        "the Prefect server did not start",
        str(home() / ".server.log"),
        "read its log; is the port taken? `serve --port` takes another",
        code="serve.start",
    )
