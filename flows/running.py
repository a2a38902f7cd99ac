"""The commands that run a recipe, or say what a run would do: each prints, and returns its exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from flows import chain, recipe
from flows.chain import STEP_NAMES
from flows.terminal import Bars, asked_of_texts, console, plan_table, print_json, summary_table, table
from tasks.artifacts import Artifact
from tasks.errors import ParameterError, PermissionRefused, StoreError
from tasks.launch import torchrun_group
from tasks.step import Step, home, session
from tasks.store.folders import Store


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
    given = chain.encoded(settings, asked.tokens, asked.contests) if asked.tokens else {}
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
            Store(home()).note_run(wanted.recipe.name, {step: artifact.id for step, _, _, _, artifact in made})
    else:
        made = _work(wanted, asked)
    rows = [(step, cached, seconds, why, one.counts, one.path) for step, cached, seconds, why, one in made]
    console().print(summary_table(f"{wanted.recipe.name}: {time.monotonic() - started:.1f} s", rows))
    for step, cached, *_, one in made:
        for line in [] if cached else asked_of_texts(one.manifest):
            console().print(f"{step}: {line}", highlight=False)
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
        _prefect(asked.verbose)
        from flows.pipeline import sweep_arms

        with _in_process():
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
    """Run the flow in this process, on Prefect's in-process API unless PREFECT_API_URL names a server."""
    _prefect(asked.verbose)
    from flows.cards import publish_card
    from flows.pipeline import model, pipeline

    until = next(step for step in reversed(STEP_NAMES) if step == asked.until or not asked.until)
    forced = [step for step in STEP_NAMES if step in wanted.force]
    with _in_process(), session(wanted.recipe.name, wanted.force, publish_card) as run:
        if asked.tokens:
            model(wanted.recipe, asked.tokens, until, forced, asked.contests)
        else:
            pipeline(wanted.recipe, until, forced)
    return [(one.step, one.cached, one.seconds, one.why, one.artifact) for one in run.outcomes]


def _prefect(verbose: bool) -> None:
    """Set Prefect's environment; its modules read it once, when they are imported."""
    from flows.deployments import configure

    for name in ("PREFECT_LOGGING_LEVEL", "PREFECT_INTERNAL_LOGGING_LEVEL", "PREFECT_SERVER_LOGGING_LEVEL"):
        os.environ.setdefault(name, "INFO" if verbose else "CRITICAL")
    ours = logging.getLogger("treeline")
    if verbose:  # Prefect's own handler, at the root, then prints what we log, too
        ours.handlers.clear()
    else:
        ours.propagate = False
    configure(os.environ)
    print("starting Prefect (the first time, its database takes half a minute) ...", file=sys.stderr)


@contextmanager
def _in_process() -> Iterator[None]:
    """Show bars while flows run in this process, and keep Ctrl-C from Prefect's own server."""
    from flows.deployments import server_apart
    from tasks.progress import listening

    bars = Bars()
    server_apart()
    with bars.shown(), listening(bars):
        yield


def plan(asked: argparse.Namespace) -> int:
    """Print what a run would do."""
    planned = _wanted(asked).plan()
    if asked.json:
        print_json([{"step": one.step, "status": one.status, "key": one.key, "why": one.why} for one in planned])
    else:
        console().print(plan_table(f"{asked.recipe}: what a run would do", planned))
    return 0


def why(asked: argparse.Namespace) -> int:
    """Print why steps would run."""
    planned = [one for one in _wanted(asked).plan() if one.status != "cached"]
    if asked.json:
        print_json([{"step": one.step, "status": one.status, "key": one.key, "why": one.why} for one in planned])
        return 0
    for one in planned:
        print(f"{one.step} would run: {one.why}" if one.status == "run" else f"{one.step} may run: it {one.why}")
    if not planned:
        print("nothing would run: every artifact is there, and nothing changed")
    return 0
