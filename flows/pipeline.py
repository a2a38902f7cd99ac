"""The flows: `treeline-data` (needs no GPU), `treeline-model` (wants one), and `treeline` = both.

Importing this module imports Prefect; a run with nothing to do never does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import flow
from prefect.runtime import deployment, flow_run

from flows import chain, runners, sweep, ui
from flows.chain import StepName
from flows.child_process import follow_parent
from flows.recipe import Recipe, completed, load, names
from flows.reports import reporting
from tasks.artifacts import Artifact, Tokens
from tasks.lookup import named
from tasks.progress import listener, listening
from tasks.step import Session


@contextmanager
def _run(recipe: Recipe, force: Sequence[str]) -> Iterator[Session]:
    """Open a session that shows itself in the UI; in a flow of a flow, go on with the outer one."""
    follow_parent()
    now = listener()
    shown = now if isinstance(now, ui.UiProgress) else ui.UiProgress(now)
    with (
        reporting(),
        chain.noted(recipe.name, frozenset(force), ui.publish_card) as run,
        listening(shown),
        runners.on(recipe.runtime.runner),
    ):
        yield run


@flow(name="treeline-data", flow_run_name="data {recipe.name}", persist_result=False)
def data(recipe: Recipe, until: StepName = "pair", force: Sequence[StepName] = ()) -> Artifact:
    """Make everything that needs no GPU: from the published trees to token ids on disk, which it returns.

    Args:
        recipe: All settings; only the sections of the first steps matter here.
        until: The last step to run.
        force: Steps to build even where their artifact is there.
    """
    with _run(recipe, force):
        made = chain.run(recipe, chain.until(until, chain.data(recipe)))
        return made.get(Tokens) or list(made.values())[-1]


@flow(name="treeline-model", flow_run_name="model {recipe.name}", persist_result=False)
def model(
    recipe: Recipe,
    tokens: str = "",
    until: StepName = "evaluate",
    force: Sequence[StepName] = (),
    preference_groups: str = "",
) -> Artifact:
    """Tune a model on tokens that are there, and measure it.

    Args:
        recipe: All settings; only the sections of the last steps matter here.
        tokens: Id of the tokens to train on, such as tokens/3f2a5c9d01ab; empty: those that the recipe leads to.
        until: The last step to run.
        force: Steps to build even where their artifact is there.
        preference_groups: With preferences, id of those to learn from; empty: those that the recipe leads to.
    """
    with _run(recipe, force) as run:
        chain.run(recipe, chain.until(until, chain.model(recipe)), chain.encoded(recipe, tokens, preference_groups))
        return run.outcomes[-1].artifact


def _scheduled(recipe: Recipe) -> Recipe:
    """Return the recipe of a run, completed by that of its deployment.

    The form with which the UI makes a schedule sends, in the place of the deployment's whole recipe, only what was
    touched, and None for whatever may be None; without this, a schedule would silently train another model.
    """
    if "name" in recipe.model_fields_set or deployment.name not in names():
        return recipe
    return completed(recipe, load(deployment.name))


def _run_name() -> str:
    return _scheduled(Recipe.model_validate(flow_run.parameters["recipe"])).name


@flow(name="treeline", flow_run_name=_run_name, persist_result=False)
def pipeline(recipe: Recipe, until: StepName = "evaluate", force: Sequence[StepName] = ()) -> Artifact:
    """Turn conversation trees into a tuned GPT-2 and a report, doing only what is not there yet.

    Args:
        recipe: All settings, one section a step; `runtime` changes no result.
        until: The last step to run.
        force: Steps to build even where their artifact is there.
    """
    recipe = _scheduled(recipe)
    with _run(recipe, force) as run:
        in_data = until in [step.name for step in chain.data(recipe)]
        last = data(recipe, until if in_data else "pair", force)
        if not in_data:
            last = model(recipe, last.id, until, force)
        ui.publish_summary(recipe.name, run.outcomes)
        return last


@flow(name="treeline-arm", flow_run_name="{recipe.name}", persist_result=False)
def arm(recipe: Recipe, label: str, judge: str) -> Artifact:
    """Run one arm of a sweep: its data where that differs, its model, and the report on the sweep's tokens.

    Args:
        recipe: All settings of the arm.
        label: The settings that the sweep varies.
        judge: Id of the tokens that its loss is measured on.
    """
    with _run(recipe, ()):
        data(recipe)
        own = chain.encoded(recipe)
        return sweep.run(sweep.Arm(label, recipe.train.seed, recipe), own, named(Tokens, judge, "judge")).report


@flow(name="treeline-sweep", flow_run_name="sweep {recipe.name}", persist_result=False)
def sweep_arms(recipe: Recipe, settings: Sequence[str], seeds: int = 1) -> list[dict[str, Any]]:
    """Train one model for each combination of some settings, and compare them in one table.

    Args:
        recipe: What every arm starts from; all are judged on its tokens, made with the settings that have one value.
        settings: What is varied, such as train.lr=1e-5,3e-5,1e-4; one entry a setting.
        seeds: Seeds that each arm is trained from, to tell a difference from noise.
    """
    recipe = sweep.settled(recipe, settings)
    planned = sweep.arms(recipe, settings, seeds)
    with reporting():
        judge = data(recipe)
        for one in planned:
            arm(one.recipe, one.label, judge.id)
        rows = sweep.comparison(sweep.done(recipe, planned) or ())
        ui.publish_comparison(recipe.name, [sweep.COLUMNS, *map(sweep.cells, rows)])
    return rows
