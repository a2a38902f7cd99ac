"""What is served: deployments whose form in the Prefect UI starts a run, and how that ends."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.states import Crashed

from flows.child_process import PARENT
from flows.pipeline import pipeline
from flows.recipe import FOLDER, load
from tasks.signals import ENDING

SERVED = ("quickstart", "gpt2-medium")


def deployments() -> list[RunnerDeployment]:
    """Build the deployments: the whole chain for each served recipe, its form filled in."""
    made = [
        RunnerDeployment.from_flow(
            pipeline,
            name=name,
            parameters={"recipe": load(name).model_dump(mode="json")},
            tags=["treeline"],
            description=_about(name),
        )
        for name in SERVED
    ]
    for one in made:
        one.model_fields_set.discard("schedules")  # an empty list that is sent deletes those that were made in the UI
    return made


def _about(name: str) -> str:
    """Return the comment that opens a recipe file."""
    lines = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    opening = []
    for line in lines:
        if not line.startswith("#"):
            break
        opening.append(line.lstrip("# "))
    return "\n".join(opening)


def serve() -> None:
    """Serve the deployments until SIGINT or SIGTERM; a run that is under way is cancelled, and saves what it has."""
    os.environ[PARENT] = str(os.getpid())
    logging.setLogRecordFactory(partial(_without_traceback, logging.getLogRecordFactory()))
    runner = Runner(pause_on_shutdown=False, limit=1)
    for one in deployments():
        runner.add_deployment(one)
    asyncio.run(_serve(runner))


def _without_traceback(make: Callable[..., logging.LogRecord], *fields: Any, **more: Any) -> logging.LogRecord:
    """Let a warning of Prefect's be a line: when a server ends, it is a page of its code that nobody can act on.

    Prefect sets its handlers anew when the runner starts, so a filter of a handler would be gone.
    """
    record = make(*fields, **more)
    if record.levelno <= logging.WARNING and record.name.startswith("prefect"):
        record.exc_info = None
    return record


async def _serve(runner: Runner) -> None:
    serving = asyncio.create_task(runner.start())
    await asyncio.sleep(0)  # it sets a handler of its own
    asked = asyncio.Event()
    for number in ENDING:
        asyncio.get_running_loop().add_signal_handler(number, asked.set)  # a second one changes nothing
    stop = asyncio.create_task(asked.wait())
    await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
    if stop.done() and runner.started:
        await runner.astop()
    elif stop.done():
        serving.cancel()
    await asyncio.wait({serving})
    if not serving.cancelled():
        serving.result()


def close_lost() -> None:
    """Tell the server that what the last `serve` ran has ended; it could not, if it was killed.

    For a server that nobody else serves from: the runs of another one would be closed, too.
    """
    under_way = FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    )
    with get_client(sync_client=True) as client:
        lost = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=under_way),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[*SERVED])),
        )
        parents = FlowRunFilterParentFlowRunId(any_=[run.id for run in lost])
        lost += client.read_flow_runs(flow_run_filter=FlowRunFilter(state=under_way, parent_flow_run_id=parents))
        for run in lost:
            ended: State[None] = Crashed(
                message="It ended with the `serve` that ran it; start it again, and it goes on"
            )
            client.set_flow_run_state(run.id, ended, force=True)
