"""Beside the chain, prefer: tune a model to find better replies likelier than worse ones, by what people ranked.

Source: Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tasks.artifacts import Counts, Model, PreferenceGroups, ReferenceLogprobs
from tasks.errors import InputError, ParameterError
from tasks.launch import run_distributed
from tasks.step import step
from tasks.store.store import CHECKPOINTS
from tasks.tuning import TuningParams, TuningRuntime, check_same_encoding, read_split, replies_of, tune, write_json

if TYPE_CHECKING:
    from tasks.gpt.preference import Side
    from tasks.gpt.training_run import Progress

KEPT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "encoding.json", "start.json")


class PreferParams(TuningParams):
    """Settings of the prefer step."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How hard the model is held to its start: larger is harder."""
    lr: Annotated[float, Field(gt=0)] = 5e-6
    """Highest learning rate; far lower than for fine-tuning, or the model unlearns to speak."""
    epochs: Annotated[float, Field(gt=0, le=10_000)] = 1.0
    """How often the preference groups are gone through; a fraction ends in the middle."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of numbers dropped. The start was asked without, so anything else adds noise to the comparison."""


class PreferRuntime(TuningRuntime):
    """How fast, and where. The outcome is the same but for rounding and the draws of dropout."""


@step("prefer", version=6, makes=Model, inherits=(CHECKPOINTS, "log.jsonl"))
def prefer(
    out: Path,
    preference_groups: PreferenceGroups,
    reference_logprobs: ReferenceLogprobs,
    model: Model,
    params: PreferParams,
    run: PreferRuntime,
) -> Counts:
    """Write the model that prefers, as a folder like that of the train step.

    Adapters, if any, lie over the model that `from` in training.json names, not over what start.json tells.

    Raises:
        ParameterError: If the model speaks another language than the preference groups.
        InputError: If the reference log-probabilities are of other preference groups.
    """
    from tasks.gpt.preference import EachPair
    from tasks.gpt.weights import load_model, parameter_count, save_hf_folder

    check_same_encoding(model, preference_groups)
    refuse_other_precision(reference_logprobs, params)
    inputs = {"preference_groups": preference_groups, "reference_logprobs": reference_logprobs, "model": model}
    if (counts := run_distributed("prefer", out, inputs, params, run)) is not None:
        return counts
    fitted, held = (_side(preference_groups, reference_logprobs, name) for name in ("train", "val"))
    aim = EachPair(fitted, held, params.beta)
    tuned, encoding = load_model(model.path), preference_groups.encoding()
    progress = tune(tuned, (aim.train, aim.val), params, run, out, objective=aim)
    save_hf_folder(tuned, out, stop=encoding.stop, pad=encoding.pad, used=encoding.used)
    for name in KEPT:
        shutil.copyfile(model.path / name, out / name)
    counts = preference_counts(progress, parameter_count(tuned), out)
    write_json(
        out / "training.json",
        {**counts, "from": model.manifest.digest, "preference_groups": preference_groups.manifest.digest},
    )
    return counts


def refuse_other_precision(reference_logprobs: ReferenceLogprobs, params: PreferParams) -> None:
    """Raise `ParameterError` where the start was asked in other numbers than it is tuned in: it would seem to move."""
    asked = reference_logprobs.manifest.recipe.get("params", {}).get("precision") or "float32"
    if asked != params.precision:
        what = f"the reference log-probabilities are in {asked}, and prefer.precision is {params.precision}"
        raise ParameterError(what, "score.precision", "Leave score.precision out", "param.precision")


def _side(preference_groups: PreferenceGroups, reference_logprobs: ReferenceLogprobs, name: str) -> Side:
    """Return a split of the preference groups with what the start makes of it."""
    from tasks.gpt.preference import Side

    of_each, logps = preference_groups.replies().select("split").collect()["split"], reference_logprobs.logps()
    if len(logps) != len(of_each):
        what = f"expected reference log-probabilities of {len(of_each):,} replies, found {len(logps):,}"
        raise InputError(
            what,
            reference_logprobs.id,
            "Run the score step again on these preference groups",
            "prefer.reference_logprobs",
        )
    return Side(
        read_split(preference_groups, name), replies_of(preference_groups, name), logps[(of_each == name).to_numpy()]
    )


def preference_counts(progress: Progress, parameters: int, out: Path) -> Counts:
    """Return what came of it: losses per pair, and of the best weights the share of validation pairs told right."""
    import json

    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[int, dict[str, Any]] = {entry["step"]: entry for entry in map(json.loads, filter(None, lines))}
    measured = {
        f"{name}_{when}": entry.get(name)
        for when, entry in (("start", found.get(0, {})), ("best", found.get(progress.best_step, {})))
        for name in ("accuracy", "margin", "chosen")
    }
    return {
        "parameters": parameters,
        "steps": progress.step,
        "best_step": progress.best_step,
        "loss_start": progress.start_nll,
        "loss_best": progress.best_nll,
        "pairs": progress.supervised,
        "tokens": progress.tokens,
        **measured,
    }
