"""A `python -m flows serve` of a test's own, and a client of its API."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from flows import recipe
from tests.waiting import ended, patience, started, until

ROOT = Path(__file__).parents[1]
TINY = str(Path(__file__).with_name("flows") / "tiny.toml")
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
PATIENCE = 200.0  # seconds of an idle machine; a hung test is what this ends, not a slow one
T = TypeVar("T")


def awaited(look: Callable[[], T | None], alive: Callable[[], bool] = lambda: True) -> T:
    """Return what `look` finds, as soon as it does; `alive` says whether it still can."""
    return until(lambda: look() if alive() else None, seconds=PATIENCE, pause=0.3)


def clean_environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without settings of Prefect and of ours, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TREELINE_"))}
    return {**kept, **variables}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Api:
    """Asks a Prefect server, with its password and a CSRF token."""

    def __init__(self, url: str, password: str) -> None:
        self.url = url
        self.headers = {"Authorization": "Basic " + base64.b64encode(password.encode()).decode()}

    def __call__(self, path: str, body: Any = None) -> Any:
        if body is not None and "Prefect-Csrf-Token" not in self.headers:
            token = self(f"/csrf-token?client={'0' * 32}")["token"]
            self.headers |= {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "0" * 32}
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **self.headers})

        def answered() -> list[Any] | None:
            try:
                with urllib.request.urlopen(asked, timeout=patience(60)) as answer:
                    return [json.load(answer)]
            except urllib.error.HTTPError as error:
                if error.code != 503:  # its database is locked for now: Prefect's client asks again, too
                    raise
                return None

        return awaited(answered)[0]

    def deployment(self) -> dict[str, Any]:
        found: dict[str, Any] = self("/deployments/name/treeline/quickstart")
        return found

    def start(self, *settings: str, **parameters: Any) -> str:
        """Start the quickstart deployment with a small recipe in its form."""
        parameters["recipe"] = recipe.load(TINY, settings).model_dump(mode="json")
        created = self(f"/deployments/{self.deployment()['id']}/create_flow_run", {"parameters": parameters})
        return str(created["id"])

    def ended(self, run: str) -> dict[str, Any]:
        """Wait for the end of a run."""

        def look() -> dict[str, Any] | None:
            found: dict[str, Any] = self(f"/flow_runs/{run}")
            return found if found["state_type"] in ENDED else None

        return awaited(look)

    def states(self) -> set[str]:
        """Name the states of all flow runs."""
        return {run["state_type"] for run in self("/flow_runs/filter", {})}


class Serve:
    """A served store; what it says is in `said`. It and what it started end with the block."""

    def __init__(self, folder: Path, port: int = 0, **environment: str) -> None:
        kept = clean_environment()
        self.folder, self.port, self.file = folder, port, folder.parent / f"{folder.name}.said"
        own = {
            "TREELINE_ARTIFACTS": str(folder),
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",  # in place of 60
        }
        self.environment: Mapping[str, str] = {**kept, **own, **environment}

    def __enter__(self) -> Self:
        asked = [sys.executable, "-m", "flows", "serve", "--port", str(self.port)]
        with ExitStack() as stack, self.file.open("wb") as said:
            command = started(asked, cwd=ROOT, env=self.environment, stdout=said, stderr=said)
            self.process = stack.enter_context(command)
            page = awaited(lambda: re.search(r"the UI is at (\S+);(?s:.*)python -m flows env", self.said), self.alive)
            self.api = Api(f"{page[1]}/api", (self.folder / ".prefect" / "auth").read_text())
            awaited(self._served, self.alive)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self.stack, suppress(AssertionError):  # the stack kills what is left
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            ended(self.process, seconds=60)

    @property
    def said(self) -> str:
        return self.file.read_text()

    def alive(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(self.said[-3000:])
        return True

    def _served(self) -> bool:
        with suppress(OSError):
            return len(self.api("/deployments/filter", {})) == 2
        return False

    def engines(self) -> list[int]:
        """Number the processes that run flows of this store."""
        return self._running(b"prefect.engine")

    def servers(self) -> list[int]:
        """Number the Prefect servers of this store."""
        return self._running(b"flows.server_app")

    def _running(self, what: bytes) -> list[int]:
        found = []
        for one in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                ours = f"TREELINE_ARTIFACTS={self.folder}\0".encode() in (one / "environ").read_bytes()
                if ours and what in (one / "cmdline").read_bytes():
                    found.append(int(one.name))
        return found
