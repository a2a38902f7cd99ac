"""Step 6, evaluate: what tuning changed, measured on the tuned model and on the one that it started from.

Where the model was tuned to prefer, too, it is measured beside the one that it was made of: base, tuned, preferred.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from tasks.artifacts import Counts, Model, PreferenceGroups, Report, Tokens
from tasks.errors import InputError, ParameterError
from tasks.initial_weights import folder_of, given_to_prefer, of_training
from tasks.notices import told
from tasks.step import Params, hold, step
from tasks.tuning import ModelRuntime, check_same_encoding, read_split, replies_of, write_json

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from tasks.gpt.batches import Split
    from tasks.gpt.preference import Floats, Replies
    from tasks.report.figures import EvaluationSet, ModelOutputs


# Threads spend more time on waiting for each other than they save where matrices are small: on 2 cores that others use,
# too, 640 answers of a model 128 wide take 2.5 s with one thread and 25-79 s with two; 768 wide, 3.8 s and 2.7 s.
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class EvaluateParams(Params):
    """Settings of the evaluate step."""

    split: Literal["test", "val"] = "test"
    """Split that the loss is measured on. Where it holds nothing, val is taken, and the report says so."""
    fact_families: tuple[str, ...] = ("capital",)
    """Families of facts whose held-out questions are asked: capital, us_state, indian_state, element, ... Empty: none."""  # noqa: E501
    sample_prompts: tuple[str, ...] = (
        "What's the capitol of France?",
        "What's the capital of France?",
        "What's the capital of Texas?",
        "What's the capital of Tripura?",
        "Can you explain why the sky is blue?",
        "Write a short poem about a tree.",
    )
    """Prompts that all models reply to, shown side by side. Empty: none."""
    samples_per_prompt: Count = 2
    """Replies of each model to each prompt of the panel."""
    max_new_tokens: Count | None = None
    """Most tokens of a reply to a question or to the panel, the end of turn included. None: what the model's positions leave room for. A reply that loops ends there."""  # noqa: E501
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    """Of the panel: 0 takes the likeliest token each time; 1 draws as the model finds likely."""
    top_k: Count | None = 50
    """The panel draws among this many likeliest tokens. None: among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    """The panel draws among the fewest tokens that hold this probability together. None: among all."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1337
    """Seed of the panel's draws; the same for all models."""

    @field_validator("fact_families")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from tasks.sample.facts import facts_of

        facts_of(names)
        return names

    @field_validator("sample_prompts")
    @classmethod
    def _said(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("a prompt of the panel is empty")
        return prompts

    def idle(self) -> set[str]:
        """Return the settings that have no say: those of draws where nothing is drawn."""
        how = {"temperature", "top_k", "top_p", "seed", "samples_per_prompt"}
        if not self.sample_prompts:
            return how if self.fact_families else {*how, "max_new_tokens"}
        return set() if self.temperature else how - {"temperature", "samples_per_prompt"}


class EvaluateRuntime(ModelRuntime):
    """How fast, and where. The figures are the same but for rounding."""

    generation_batch: Count = 128
    """Replies that are generated at once; lower it where memory runs out."""


@step("evaluate", version=8, makes=Report)
def evaluate(out: Path, model: Model, tokens: Tokens, params: EvaluateParams, run: EvaluateRuntime) -> Counts:
    """Write the report: `report.json`, `report.md`, plots, and every reply in `samples.jsonl`."""
    from tasks.gpt.device import at_work, device_of
    from tasks.gpt.run_plan import shortage_named
    from tasks.gpt.weights import build_start, load_model
    from tasks.report.figures import figures, samples
    from tasks.report.page import render_page

    check_same_encoding(model, tokens)
    start, stages = model.json("start.json"), tuned_stages(model)
    trainings = {name: stage.json("training.json") for name, stage in stages.items()}
    split, exam = evaluation_set(model, tokens, params)
    refuse_long(exam, start["positions"])
    loads: dict[str, Callable[[], GPT2LMHeadModel]] = {
        "base": lambda: build_start(start, folder_of(start)),
        **{name: partial(load_model, stage.path) for name, stage in stages.items()},
    }
    results: dict[str, ModelOutputs] = {}
    device = device_of(run.device)
    hint = "Set runtime.micro_batch and runtime.generation_batch to less"
    with at_work(device, run.threads, start["width"]), shortage_named("during evaluation", device, hint):
        for name, load in loads.items():  # one after the other: the larger ones fill a GPU
            if trainings.get(name, {}).get("best_step") == 0:  # the very weights of the model before
                results[name] = [*results.values()][-1]
            else:
                results[name] = evaluate_model(load().to(device), exam, params, run, name)
    not_sampling = {"split", "fact_families", "sample_prompts"}
    report = {
        "split": split,
        "split_asked": params.split,
        **figures(results, exam),
        "sampling": {name: value for name, value in params.keyed().items() if name not in not_sampling},
        "start": start,
        "training": trainings["tuned"],
        "preference": trainings.get("preferred"),
        "curation": tokens.curation(),
        "notices": [asdict(notice) for notice in told([model.manifest, tokens.manifest])],
        "lineage": {"model": model.manifest.digest, "tokens": tokens.manifest.digest},
    }
    write_json(out / "report.json", report)
    (out / "report.md").write_text(render_page(report), encoding="utf-8")
    write_plots(out, report, stages["tuned"].log())
    lines = (json.dumps(line) + "\n" for line in samples(results, exam))
    (out / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return report_counts(report)


def tuned_stages(model: Model) -> dict[str, Model]:
    """Return the models that tuning made, by their names in the report: this one, and the one that prefer was given.

    Raises:
        ParameterError: If the latter is no longer there.
    """
    before = given_to_prefer(model)
    if before is None:
        return {"tuned": model}
    hold(before)
    return {"tuned": before, "preferred": model}


def refuse_long(exam: EvaluationSet, positions: int) -> None:
    """Raise an error for a question or prompt that leaves no room for a reply, before any work is done."""
    prompts = {
        "evaluate.fact_families": [question.text for question in exam.questions],
        "evaluate.sample_prompts": exam.panel,
    }
    for setting, texts in prompts.items():
        for text in texts:
            size = len(exam.dialect.prompt([("user", text)]))
            if size >= positions:
                raise ParameterError(
                    f"a prompt of {size:,} tokens leaves no room in the model's {positions:,} positions: {text[:60]!r}",
                    setting,
                    "ask something shorter, or raise encode.context_length",
                    "param.prompt",
                )


def evaluation_set(model: Model, tokens: Tokens, params: EvaluateParams) -> tuple[str | None, EvaluationSet]:
    """Return what all models are evaluated on, and the name of its split."""
    from tasks.report.figures import EvaluationSet
    from tasks.sample.facts import held_out_questions
    from tasks.text.templates import load_dialect

    name, split = measured_split(tokens, params.split)
    utf8_bytes = tokens.encoding().utf8_bytes.get(name, 0) if name else 0
    seeds = range(params.seed, params.seed + params.samples_per_prompt)
    dialect = load_dialect(model.path)
    questions, ranked = held_out_questions(params.fact_families), ranked_of(model, params.split)
    return name, EvaluationSet(dialect, split, utf8_bytes, questions, params.sample_prompts, seeds, ranked)


def ranked_of(model: Model, preferred: str) -> tuple[Split, Replies] | None:
    """Return the ranked replies that models are asked about: those of the split asked for, else of val, else none.

    Raises:
        ParameterError: If the model was tuned to prefer, and the preference groups are no longer there.
    """
    digest = model.json("training.json").get("preference_groups")
    if digest is None:
        return None
    preference_groups = of_training(PreferenceGroups, digest, model)
    hold(preference_groups)
    for name in dict.fromkeys((preferred, "val")):
        if name in preference_groups.encoding().splits and len((replies := replies_of(preference_groups, name)).rank):
            return read_split(preference_groups, name), replies
    return None


def measured_split(tokens: Tokens, preferred: str) -> tuple[str | None, Split | None]:
    """Return the split that the loss is measured on: the one asked for, else val, else none."""
    for name in dict.fromkeys((preferred, "val")):
        if name in tokens.encoding().splits:
            split = read_split(tokens, name)
            if len(split) and split.supervised():
                return name, split
    return None, None


def evaluate_model(
    model: GPT2LMHeadModel, exam: EvaluationSet, params: EvaluateParams, run: EvaluateRuntime, label: str
) -> ModelOutputs:
    """Measure the loss of one model, let it answer the questions and reply to the prompts."""
    from tasks.gpt.sampling import generate
    from tasks.report.figures import ModelOutputs

    model.eval()
    nats = total_nats(model, exam.split, run.rows_at_once, label) if exam.split else None
    dialect, many = exam.dialect, len(exam.seeds)
    how: dict[str, Any] = {"vocab": dialect.used, "batch": run.generation_batch}
    questions = [dialect.prompt([("user", question.text)]) for question in exam.questions]
    answers = generate(model, questions, dialect.stop, params.max_new_tokens, label=f"answers, {label}", **how)
    how |= params.model_dump(include={"temperature", "top_k", "top_p"})
    prompts = [dialect.prompt([("user", prompt)]) for prompt in exam.panel for _ in exam.seeds]
    seeds = [*exam.seeds] * len(exam.panel)
    drawn = generate(model, prompts, dialect.stop, params.max_new_tokens, seeds=seeds, label=f"panel, {label}", **how)
    replies = [drawn[first : first + many] for first in range(0, len(drawn), many)]
    return ModelOutputs(nats, answers, replies, ranked_logps(model, exam, run.rows_at_once, label))


def ranked_logps(model: GPT2LMHeadModel, exam: EvaluationSet, batch: int | None, label: str) -> Floats | None:
    """Return how likely a model finds each ranked reply; None where there are none."""
    from tasks.gpt.memory_model import AT_ONCE
    from tasks.gpt.preference import all_logps

    if exam.ranked is None:
        return None
    split, replies = exam.ranked
    at_once = batch or max(1, AT_ONCE // split.sequence_length)
    return all_logps(model, split, replies, at_once, model.device, label=f"ranked, {label}")


def total_nats(model: GPT2LMHeadModel, split: Split, batch: int | None, label: str) -> float:
    """Return the loss summed over a split, in nats.

    Raises:
        InputError: If it is not finite.
    """
    import torch

    from tasks.gpt.loss import token_nats
    from tasks.gpt.memory_model import AT_ONCE
    from tasks.progress import track

    at_once = batch or max(1, AT_ONCE // split.sequence_length)
    total = torch.zeros((), dtype=torch.float64)
    batches = split.in_order(at_once, model.device)
    for rows in track(batches, f"loss, {label}", -(-len(split) // at_once), "batches"):
        total += token_nats(model, *rows).cpu().double().sum()  # not every device has float64
    if not isfinite(total.item()):
        raise InputError(
            f"the loss of the {label} model is {total.item()}", "evaluate", "Train again", "evaluate.nonfinite"
        )
    return total.item()


def write_plots(out: Path, report: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> None:
    """Write the loss curve, the bars by region where facts with regions were asked, and the funnel of the data."""
    from tasks.report.plots import facts_svg, funnel_svg, loss_svg

    train, validation = (
        [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None] for name in ("loss", "val_nll")
    )
    (out / "loss.svg").write_bytes(loss_svg(train, validation))
    regions = (report["facts"] or {}).get("by_region")
    if regions:
        shares = {name: [rates[which] for which in report["models"]] for name, rates in regions.items()}
        (out / "facts.svg").write_bytes(facts_svg(shares, report["models"]))
    if report["curation"]:
        (out / "funnel.svg").write_bytes(funnel_svg(report["curation"]["counts"]))


def report_counts(report: Mapping[str, Any]) -> Counts:
    """Return the figures that the manifest and a run's summary show."""
    measures = ("nll", "bits_per_byte", "stop_rate", "loop_rate", *(("accuracy",) if report["pairs"] else ()))
    counts = {name: report[name] for name in measures}
    if report["facts"]:
        counts["facts"] = {name: report["facts"][name] for name in (*report["models"], "n")}
    return {"sequences": report["sequences"], "tokens": report["tokens"], **counts}
