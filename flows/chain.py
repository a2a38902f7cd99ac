"""The chain: the steps in order, and what a run of them would do, decided without Prefect and without torch.

Six steps, and three more beside them for a recipe with preferences:

    download  parse  curate  encode (pair)  |  train (score  prefer)  evaluate
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from flows.recipe import Recipe
from tasks.artifacts import Artifact, PreferenceGroups, Tokens
from tasks.curate import curate
from tasks.download import download
from tasks.encode import encode
from tasks.errors import ParameterError
from tasks.evaluate import evaluate
from tasks.initial_weights import model_of
from tasks.lookup import seen
from tasks.pair import pair
from tasks.parse import parse
from tasks.prefer import prefer
from tasks.score import score
from tasks.step import Outcome, Session, Step, hold, home, session
from tasks.store.canonical import sha256_of
from tasks.store.explain import why_missing
from tasks.store.integrity import Fault
from tasks.store.manifest import Manifest
from tasks.store.store import Store
from tasks.train import train

DATA: tuple[Step[Any, Any], ...] = (download, parse, curate, encode)  # needs no GPU
MODEL: tuple[Step[Any, Any], ...] = (train, evaluate)
CHAIN = (*DATA, *MODEL)
STEPS = (*DATA, pair, train, score, prefer, evaluate)  # those of a recipe with preferences, too
StepName = Literal["download", "parse", "curate", "encode", "pair", "train", "score", "prefer", "evaluate"]
STEP_NAMES: tuple[StepName, ...] = get_args(StepName)

Made = dict[type[Artifact], Artifact]
A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class Planned:
    """What a run would do with one step: take its artifact, build it, or nobody knows yet."""

    step: str
    status: Literal["cached", "run", "unknown"]
    key: str | None
    why: str
    artifact: Artifact | None = None


def data(recipe: Recipe) -> tuple[Step[Any, Any], ...]:
    """Return the steps of a recipe that need no GPU."""
    return (*DATA, pair) if recipe.preferences else DATA


def model(recipe: Recipe) -> tuple[Step[Any, Any], ...]:
    """Return the steps of a recipe that want one."""
    return (train, score, prefer, evaluate) if recipe.preferences else MODEL


def whole(recipe: Recipe) -> tuple[Step[Any, Any], ...]:
    """Return all steps of a recipe."""
    return (*data(recipe), *model(recipe))


def until(last: str | None, chain: Sequence[Step[Any, Any]] = CHAIN) -> tuple[Step[Any, Any], ...]:
    """Return the steps of a chain up to the one named; all of them for None.

    Raises:
        ParameterError: If there is no such step.
    """
    known = [step.name for step in STEPS]
    if last is not None and last not in known:
        raise ParameterError(f"there is no step {last!r}", hint=f"take one of {', '.join(known)}", code="param.step")
    end = known.index(last) + 1 if last else len(known)
    return tuple(step for step in chain if known.index(step.name) < end)


def settings(step: Step[Any, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the arguments that a recipe gives to a step: its Params, and its Runtime where it takes one."""
    given: dict[str, Any] = {step.params_name: recipe.section(step.name)}
    if step.runtime_name:
        given[step.runtime_name] = recipe.runtime.of(step.runtime_type)
    return given


def run(recipe: Recipe, steps: Sequence[Step[Any, Any]], made: Mapping[type[Artifact], Artifact] | None = None) -> Made:
    """Call steps in order, each on what the ones before it made; inside a flow each call is a task run."""
    have: Made = dict(made or {})
    for given in have.values():
        hold(given)
    if recipe.train.model:  # for hours, the data half may be at work before training asks for it
        hold(model_of(recipe.train.model))
    for step in steps:
        inputs = {arg: have[kind] for arg, kind in step.inputs.items()}
        have[step.makes] = step(**inputs, **settings(step, recipe))
    return have


@contextmanager
def noted(
    recipe: str, force: frozenset[str] = frozenset(), shown: Callable[[Outcome], None] = lambda outcome: None
) -> Iterator[Session]:
    """Open a session, as `session` does, and note at its end what the run of a recipe came to: `gc` keeps that."""
    with session(recipe, force, shown) as run:
        yield run
        Store(home()).record_run(recipe, {outcome.step: outcome.artifact.id for outcome in run.outcomes})


def plan(
    recipe: Recipe,
    steps: Sequence[Step[Any, Any]] = CHAIN,
    force: frozenset[str] = frozenset(),
    made: Mapping[type[Artifact], Artifact] | None = None,
) -> list[Planned]:
    """Say of each step whether its artifact is there, would be built and why, or cannot be known yet.

    A key needs the content of the inputs, so the steps after one that would run are unknown: equal bytes may come out.
    """
    store = Store(home())
    have: Made = dict(made or {})
    planned = []
    for step in steps:
        missing = next((kind.kind for kind in step.inputs.values() if kind not in have), None)
        if missing:
            planned.append(Planned(step.name, "unknown", None, f"depends on {missing}"))
            continue
        found = _planned(step, recipe, have, store, step.name in force)
        if found.artifact:
            have[step.makes] = found.artifact
        planned.append(found)
    return planned


def _planned(step: Step[Any, Any], recipe: Recipe, have: Made, store: Store, forced: bool) -> Planned:
    digests = {arg: have[kind].manifest.digest for arg, kind in step.inputs.items()}
    preimage = step.recipe(digests, recipe.section(step.name))
    key = sha256_of(preimage)
    found = store.look(step.makes.kind, key)
    if forced:
        return Planned(step.name, "run", key, "forced")
    if isinstance(found, Manifest):
        return Planned(step.name, "cached", key, "nothing changed", step.makes(store.folder(found.kind, key), found))
    if isinstance(found, Fault):
        return Planned(step.name, "run", key, str(found))
    near = store.comparable(step.makes.kind, recipe.name, step.name)
    return Planned(step.name, "run", key, why_missing(preimage, near, store.names()))


def done(planned: Sequence[Planned]) -> bool:
    """Tell whether a run would find everything cached."""
    return all(entry.status == "cached" for entry in planned)


def encoded(recipe: Recipe, tokens: str = "", preference_groups: str = "") -> Made:
    """Return what the model half of a recipe begins with: the artifacts of those ids, or else those it leads to.

    Raises:
        ParameterError: If they are not in the store.
    """
    made: Made = {Tokens: tokens_of(recipe, tokens)}
    if recipe.preferences:
        made[PreferenceGroups] = (
            seen(PreferenceGroups, preference_groups, "preference_groups")
            if preference_groups
            else _led_to(recipe, data(recipe), PreferenceGroups)
        )
    return made


def tokens_of(recipe: Recipe, name: str = "") -> Tokens:
    """Return the tokens of that id, or else those that a recipe leads to.

    Raises:
        ParameterError: If they are not in the store.
    """
    return seen(Tokens, name, "tokens") if name else _led_to(recipe, DATA, Tokens)


def _led_to(recipe: Recipe, steps: Sequence[Step[Any, Any]], kind: type[A]) -> A:
    last = plan(recipe, steps)[-1]
    if not isinstance(last.artifact, kind):
        raise ParameterError(
            f"the {kind.kind} of recipe {recipe.name} are not in the store: {last.why}",
            str(home()),
            "run flow treeline-data first, or copy the artifact's folder here and name its id",
            code=f"param.{kind.kind}",
        )
    return last.artifact
