"""Sweeps: one recipe with some settings varied, each arm trained from several seeds, all judged alike.

    python -m flows sweep RECIPE --set train.lr=1e-5,3e-5,1e-4 --seeds 3

Arms share whatever they have in common: steps are cached by content, so the data half is computed once. The losses of
all arms are measured on the tokens of the recipe itself, since a layout changes what a split's average is over: on the
validation split, because to choose by the test split is to train on it. An arm of other data, vocabulary or template
cannot be compared so: its own split may be another one. It is measured on its own tokens, and its row stands apart.
Importing this module starts neither Prefect nor torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

from flows import chain
from flows.recipe import Recipe, changed, toml
from tasks.artifacts import Model, Report, Tokens
from tasks.errors import ParameterError
from tasks.evaluate import evaluate

MOST = 64  # arms of a sweep: more is a slip of the keyboard, and would keep a machine busy for days


@dataclass(frozen=True)
class Arm:
    """One run of a sweep.

    Attributes:
        label: The settings that it varies, as given: "train.lr=3e-05"; empty where only the seed is varied.
        seed: `train.seed`.
        recipe: All its settings; its name is the sweep's, with some digits of the settings' hash.
    """

    label: str
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Outcome:
    """What an arm ended with.

    Attributes:
        arm: The arm.
        model: What it trained.
        report: What the model was found to be.
        shared: Whether it was judged on the tokens of the sweep; if not, on its own.
    """

    arm: Arm
    model: Model
    report: Report
    shared: bool


def arms(base: Recipe, settings: Sequence[str], seeds: int) -> list[Arm]:
    """Return one arm for each combination of the values, and seed.

    Args:
        base: What every arm starts from.
        settings: `section.name=value,value,...` each; values as `--set` takes them.
        seeds: How many seeds, from the recipe's own on.

    Raises:
        ParameterError: If a setting is unknown or given twice, two arms are equal, or there are too many.
    """
    varied = [_values(setting) for setting in settings]
    names = [name for name, _ in varied]
    _refuse(names, seeds * math.prod(len(values) for _, values in varied))
    made = []
    for values in product(*(found for _, found in varied)):
        chosen = [f"{name}={json.dumps(value)}" for name, value in zip(names, values, strict=True)]
        label = " ".join(f"{name}={_shown(value)}" for name, value in zip(names, values, strict=True))
        for seed in range(base.train.seed, base.train.seed + seeds):
            given = [*chosen, f"train.seed={seed}", "evaluate.split=val"]
            made.append(Arm(label, seed, changed(base, given, f"{base.name[:48]}-{_digest(given)}")))
    if len({arm.recipe.name for arm in made}) < len(made):
        raise ParameterError("two arms have the same settings", "--set", "Give each value once", "param.sweep")
    return made


def settled(base: Recipe, settings: Sequence[str]) -> Recipe:
    """Return what all arms have in common, and are judged by: the recipe, with the settings that have one value."""
    single = [f"{name}={json.dumps(values[0])}" for name, values in map(_values, settings) if len(values) == 1]
    return changed(base, single, base.name) if single else base


def _refuse(names: Sequence[str], arms: int) -> None:
    """Raise an error for settings that make no sweep."""
    odd = [name for name in names if name.startswith("evaluate.")]
    if len({*names}) < len(names) or "train.seed" in names or odd:
        what = "train.seed is varied by --seeds" if "train.seed" in names else "a setting is varied twice"
        raise ParameterError(f"{odd[0]} changes the judge" if odd else what, "--set", code="param.sweep")
    if arms > MOST:
        raise ParameterError(f"{arms:,} arms, at most {MOST} are run", "--set", "Give fewer values", "param.sweep")


def _values(setting: str) -> tuple[str, list[Any]]:
    """Split `section.name=1,2,3`; commas inside of a TOML value do not part."""
    name, equals, text = setting.partition("=")
    if not equals or not text.strip():
        raise ParameterError(f"expected section.name=value,value, found {setting!r}", "--set", code="param.set")
    try:
        values = toml(f"values = [{text}]", f"--set {setting[:60]}")["values"]
        json.dumps(values)  # TOML has dates, too, which no setting is
    except (tomllib.TOMLDecodeError, TypeError):
        values = [part.strip() for part in text.split(",")]
    return name.strip(), values


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _digest(given: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(given).encode()).hexdigest()[:8]


def done(base: Recipe, planned: Sequence[Arm]) -> list[Outcome] | None:
    """Return what all arms ended with, if everything is there; None if something would run."""
    judge = chain.plan(base, chain.DATA)[-1].artifact
    found = [_found(arm, judge) for arm in planned] if isinstance(judge, Tokens) else [None]
    return None if None in found else [one for one in found if one]


def _found(arm: Arm, judge: Tokens) -> Outcome | None:
    *planned, _ = chain.plan(arm.recipe, chain.whole(arm.recipe))
    made: chain.Made = {type(one.artifact): one.artifact for one in planned if one.artifact}
    own, tuned = made.get(Tokens), planned[-1].artifact
    if not isinstance(own, Tokens) or not isinstance(tuned, Model):
        return None
    used = judge_of(own, judge)
    report = chain.plan(arm.recipe, (evaluate,), made={Model: tuned, Tokens: used})[-1].artifact
    return Outcome(arm, tuned, report, used is judge) if isinstance(report, Report) else None


def run(arm: Arm, own: chain.Made, judge: Tokens) -> Outcome:
    """Tune the model of an arm on what its recipe made, and judge it on the sweep's tokens, if it can read them."""
    made = chain.run(arm.recipe, chain.model(arm.recipe)[:-1], own)
    tokens, tuned = made[Tokens], made[Model]
    assert isinstance(tokens, Tokens)
    assert isinstance(tuned, Model)
    used = judge_of(tokens, judge)
    report = chain.run(arm.recipe, (evaluate,), {Model: tuned, Tokens: used})[Report]
    assert isinstance(report, Report)
    return Outcome(arm, tuned, report, used is judge)


def alone(base: Recipe, planned: Sequence[Arm]) -> None:
    """Do without flows what the flow of a sweep does; what is there is found in the store."""
    with chain.noted(base.name):
        judge = chain.run(base, chain.data(base))[Tokens]
    assert isinstance(judge, Tokens)
    for arm in planned:
        with chain.noted(arm.recipe.name):
            chain.run(arm.recipe, chain.data(arm.recipe))
            run(arm, chain.encoded(arm.recipe), judge)


def judge_of(own: Tokens, judge: Tokens) -> Tokens:
    """Return the tokens that a model trained on `own` can be judged on: those of the sweep, if they mean the same.

    They do if both were made of the same dialogues, so that no message that is judged was trained on.
    """
    same_split = own.manifest.recipe["inputs"] == judge.manifest.recipe["inputs"]
    same_words = own.manifest.files["tokenizer.json"] == judge.manifest.files["tokenizer.json"]
    if not (same_split and same_words):
        return own
    ours, theirs = own.encoding(), judge.encoding()
    return judge if (ours.template, ours.context_length) == (theirs.template, theirs.context_length) else own


Measure = Callable[[Outcome], float | None]


def _figure(name: str) -> Measure:
    """Return what reads a figure of the model that an arm ended with: the last that its report compares."""

    def read(outcome: Outcome) -> float | None:
        report = outcome.report.figures()
        found: float | None = (report[name] or {}).get(report["models"][-1])
        return found

    return read


MEASURES: Mapping[str, tuple[Measure, str]] = {  # column -> what of an outcome, and how it is written
    "trained tokens": (lambda outcome: outcome.model.counts.get("supervised"), ",.0f"),
    "tokens computed": (lambda outcome: outcome.model.counts.get("tokens"), ",.0f"),
    "best step": (lambda outcome: outcome.model.counts.get("best_step"), ",.0f"),
    "NLL": (_figure("nll"), ".4f"),
    "bits/byte": (_figure("bits_per_byte"), ".4f"),
    "facts": (_figure("facts"), ".1%"),
    "stops": (_figure("stop_rate"), ".1%"),
}


def comparison(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Compare arms: a row each, over its seeds, the lowest NLL first; then those that cannot be compared.

    Returns:
        `arm`, `seeds`, `compared`, and for each of MEASURES `mean`, `low` and `high` over the seeds, or None.
    """
    by_label: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_label.setdefault(outcome.arm.label, []).append(outcome)
    first_of: dict[tuple[str, ...], str] = {}
    for label, found in by_label.items():
        first_of.setdefault(_models(found), label)
    rows = [_row(label, found, first_of[_models(found)]) for label, found in by_label.items()]
    return sorted(rows, key=lambda row: (not row["compared"], row["NLL"]["mean"] if row["NLL"] else math.inf))


def _models(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    return tuple(outcome.model.id for outcome in outcomes)


def _row(label: str, outcomes: Sequence[Outcome], first: str) -> dict[str, Any]:
    compared = all(outcome.shared for outcome in outcomes)
    apart = "" if compared else " (on its own tokens: not to be compared)"
    same = "" if label == first else f" (the very models of {first or 'as it is'}: the setting has no say here)"
    row: dict[str, Any] = {"arm": (label or "as it is") + apart + same, "seeds": len(outcomes), "compared": compared}
    for name, (measure, _) in MEASURES.items():
        values = [value for value in map(measure, outcomes) if value is not None]
        row[name] = {"mean": fmean(values), "low": min(values), "high": max(values)} if values else None
    return row


def cells(row: Mapping[str, Any]) -> list[str]:
    """Write a row of a comparison: the mean over the seeds, with the band from the lowest to the highest."""
    made = [str(row["arm"]), str(row["seeds"])]
    for name, (_, form) in MEASURES.items():
        found = row[name]
        if found is None:
            made.append("-")
        elif found["low"] == found["high"]:
            made.append(format(found["mean"], form))
        else:
            made.append(f"{found['mean']:{form}} ({found['low']:{form}}-{found['high']:{form}})")
    return made


COLUMNS = ("arm", "seeds", *MEASURES)
