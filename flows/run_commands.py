"""The commands that run a recipe, or say what a run would do: each prints, and returns its exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from flows import chain, recipe
from flows.chain import STEP_NAMES
from flows.reports import bound_patience, surviving
from flows.terminal import (
    Bars,
    console,
    plan_table,
    print_json,
    print_notices,
    summary_table,
    table,
)
from tasks.artifacts import Artifact
from tasks.errors import ParameterError, PermissionRefused, StoreError
from tasks.launch import torchrun_group
from tasks.notices import told
from tasks.progress import listening
from tasks.step import Session, Step, home, session
from tasks.store.store import Store


@dataclass(frozen=True)
class _Wanted:
    """What `run`, `plan` and `why` are asked about."""

    recipe: recipe.Recipe
    steps: tuple[Step[Any, Any], ...]
    force: frozenset[str]
    given: chain.Made

    def plan(self) -> list[chain.Planned]:
        return chain.plan(self.recipe, self.steps, self.force, self.given)


def _wanted(asked: argparse.Namespace) -> _Wanted:
    settings = recipe.load(asked.recipe, asked.settings)
    given = chain.encoded(settings, asked.tokens, asked.preference_groups) if asked.tokens else {}
    steps = chain.until(asked.until, chain.model(settings) if given else chain.whole(settings))
    names = {step.name for step in steps}
    odd = [name for name in (*asked.force, asked.until) if name and chain.until(name) and name not in names]
    if odd or not steps:
        what = f"--force {odd[0]}" if odd and odd[0] in asked.force else f"--until {asked.until}"
        raise ParameterError(
            f"{what} names a step that is not among those to run",
            "the command line",
            "see `plan` with the same arguments for what is",
            code="param.step",
        )
    return _Wanted(settings, steps, frozenset(asked.force), given)


def run(asked: argparse.Namespace) -> int:
    """Run a recipe; its last line on standard output is the id of what it ends with."""
    with torchrun_group() as leads:  # as all but rank 0 of torchrun's processes, nothing is left to do afterwards
        return _run(asked) if leads else 0


def _run(asked: argparse.Namespace) -> int:
    wanted, started = _wanted(asked), time.monotonic()
    planned = wanted.plan()
    if chain.done(planned):
        made = [(entry.step, True, 0.0, entry.why, entry.artifact) for entry in planned if entry.artifact]
        with suppress(StoreError, PermissionRefused):  # a store that cannot be written needs no protection from `gc`
            Store(home()).record_run(wanted.recipe.name, {step: artifact.id for step, _, _, _, artifact in made})
    else:
        made = _work(wanted, asked)
    rows = [(step, cached, seconds, why, one.counts, one.path) for step, cached, seconds, why, one in made]
    console().print(summary_table(f"{wanted.recipe.name}: {time.monotonic() - started:.1f} s", rows))
    print_notices(told(one.manifest for *_, one in made))
    print(made[-1][-1].id)
    return 0


def sweep(asked: argparse.Namespace) -> int:
    """Run the arms of a sweep, and print the table that compares them."""
    with torchrun_group() as leads:
        return _sweep(asked) if leads else 0


def _sweep(asked: argparse.Namespace) -> int:
    from flows import sweep as sweeps

    base = sweeps.settled(recipe.load(asked.recipe), asked.settings)
    planned = sweeps.arms(base, asked.settings, asked.seeds)
    if (outcomes := sweeps.done(base, planned)) is None:
        with _prefect(asked.verbose) as ready:
            from flows.pipeline import sweep_arms

            with ready(), surviving(lambda: sweeps.alone(base, planned)):
                sweep_arms(base, asked.settings, asked.seeds)
        if (outcomes := sweeps.done(base, planned)) is None:
            raise StoreError("an arm's artifact is gone", str(home()), "run it again", code="sweep.gone")
    rows = sweeps.comparison(outcomes)
    if asked.json:
        print_json(rows)
    else:
        console().print(table(f"sweep of {base.name}", sweeps.COLUMNS, [sweeps.cells(row) for row in rows]))
    return 0


def _work(wanted: _Wanted, asked: argparse.Namespace) -> list[tuple[str, bool, float, str, Artifact]]:
    """Run the flow in this process, on a server that lives as long unless PREFECT_API_URL names one."""
    until = next(step for step in reversed(STEP_NAMES) if step == asked.until or not asked.until)
    forced = [step for step in STEP_NAMES if step in wanted.force]
    with _prefect(asked.verbose) as ready:
        from flows.pipeline import model, pipeline
        from flows.ui import publish_card

        with (
            ready(),
            session(wanted.recipe.name, wanted.force, publish_card) as run,
            surviving(lambda: _alone(wanted, run), run),
        ):
            if asked.tokens:
                model(wanted.recipe, asked.tokens, until, forced, asked.preference_groups)
            else:
                pipeline(wanted.recipe, until, forced)
    first = {one.step: one for one in reversed(run.outcomes)}  # without a server, steps that were done are called again
    return [(one.step, one.cached, one.seconds, one.why, one.artifact) for one in [*first.values()][::-1]]


def _alone(wanted: _Wanted, run: Session) -> None:
    """Go on without flows; steps that were done are found in the store."""
    run.force -= {one.step for one in run.outcomes}
    with chain.noted(wanted.recipe.name):
        chain.run(wanted.recipe, wanted.steps, wanted.given)


@contextmanager
def _prefect(verbose: bool) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Set Prefect's environment, which its modules read once, when they are imported, and start its server.

    Flows can be imported in the block, and run in the context that it yields.
    """
    from flows import server

    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "1")  # five, the default, ask a dead server for a minute
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    for name in ("PREFECT_LOGGING_LEVEL", "PREFECT_INTERNAL_LOGGING_LEVEL", "PREFECT_SERVER_LOGGING_LEVEL"):
        os.environ.setdefault(name, "INFO" if verbose else "CRITICAL")
    ours = logging.getLogger("treeline")
    if verbose:  # Prefect's own handler, at the root, then prints what we log, too
        ours.handlers.clear()
    else:
        ours.propagate = False
    server.configure(os.environ)
    print("starting Prefect (the first time, it makes a database) ...", file=sys.stderr)

    @contextmanager
    def ready() -> Iterator[None]:
        wait()
        bound_patience()
        bars = Bars()
        with bars.shown(), listening(bars):
            yield

    with server.for_run() as wait:
        yield ready


def plan(asked: argparse.Namespace) -> int:
    """Print what a run would do."""
    planned = _wanted(asked).plan()
    if asked.json:
        print_json([_as_json(one) for one in planned])
    else:
        console().print(plan_table(f"{asked.recipe}: what a run would do", planned))
    return 0


def _as_json(planned: chain.Planned) -> dict[str, Any]:
    """Return what a run would do with a step, and what the artifact that is there tells of losses."""
    notices = told([planned.artifact.manifest]) if planned.artifact else ()
    said = {"step": planned.step, "status": planned.status, "key": planned.key, "why": planned.why}
    return {**said, "notices": [asdict(one) for one in notices if one.step == planned.step]}


def why(asked: argparse.Namespace) -> int:
    """Print why steps would run."""
    planned = [one for one in _wanted(asked).plan() if one.status != "cached"]
    if asked.json:
        print_json([_as_json(one) for one in planned])
        return 0
    for one in planned:
        print(f"{one.step} would run: {one.why}" if one.status == "run" else f"{one.step} may run: it {one.why}")
    if not planned:
        print("nothing would run: every artifact is there, and nothing changed")
    return 0
