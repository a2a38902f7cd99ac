"""Step 6, evaluate: what tuning changed, measured on the tuned model and on the one that it started from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from tasks.artifacts import Counts, Model, Report, Tokens
from tasks.errors import InputError, ParameterError
from tasks.start import folder_of
from tasks.step import Params, Runtime, step
from tasks.tuning import refuse_strangers

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from tasks.gpt.batches import Split
    from tasks.gpt.report import Exam, Result


# Threads spend more time on waiting for each other than they save where matrices are small: on 2 cores that others use,
# too, 640 answers of a model 128 wide take 2.5 s with one thread and 25-79 s with two; 768 wide, 3.8 s and 2.7 s.
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class EvaluateParams(Params):
    """Settings of the evaluate step."""

    split: Literal["test", "val"] = "test"
    """Split that the loss is measured on. Where it holds nothing, val is taken, and the report says so."""
    facts: tuple[str, ...] = ("capital",)
    """Families of facts whose held-out questions are asked: capital, us_state, indian_state, element, ... Empty: none."""  # noqa: E501
    answer_tokens: Count = 32
    """Most tokens of an answer to such a question, the end of turn included."""
    panel: tuple[str, ...] = (
        "What's the capitol of France?",
        "What's the capital of France?",
        "What's the capital of Texas?",
        "What's the capital of Tripura?",
        "Can you explain why the sky is blue?",
        "Write a short poem about a tree.",
    )
    """Prompts that both models reply to, shown side by side. Empty: none."""
    samples_per_prompt: Count = 2
    """Replies of each model to each prompt of the panel."""
    max_new_tokens: Count = 64
    """Most tokens of a reply to the panel, the end of turn included."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    """Of the panel: 0 takes the likeliest token each time; 1 draws as the model finds likely."""
    top_k: Count | None = 50
    """The panel draws among this many likeliest tokens. None: among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    """The panel draws among the fewest tokens that hold this probability together. None: among all."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1337
    """Seed of the panel's draws; the same for both models."""

    @field_validator("facts")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from tasks.oasst.facts import facts_of

        facts_of(names)
        return names

    @field_validator("panel")
    @classmethod
    def _said(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("a prompt of the panel is empty")
        return prompts


class EvaluateRuntime(Runtime):
    """How fast, and where. The figures are the same but for rounding."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to evaluate; auto takes a GPU where there is one. As in training, a GPU rounds the factors of products to 10 bits (TF32)."""  # noqa: E501
    batch: Count | None = None
    """Sequences that go through the model at once; lower it where memory runs out. None: as many as hold 8,192 tokens."""  # noqa: E501
    replies: Count = 128
    """Replies that are made at once; lower it where memory runs out."""
    threads: Count | None = None
    """CPU threads. None: one for a model narrower than 512, else as torch finds best."""


@step("evaluate", version=7, makes=Report)
def evaluate(out: Path, model: Model, tokens: Tokens, params: EvaluateParams, run: EvaluateRuntime) -> Counts:
    """Write the report: `report.json`, `report.md`, plots, and every reply in `samples.jsonl`."""
    from tasks.dialogue.scorecard import render
    from tasks.gpt.device import at_work, device_of
    from tasks.gpt.planning import shortage_named
    from tasks.gpt.report import figures, samples
    from tasks.gpt.weights import build_start, load_model

    refuse_strangers(model, tokens)
    start = model.json("start.json")
    split, exam = exam_of(model, tokens, params)
    refuse_long(exam, start["positions"])
    loads: Mapping[str, Callable[[], GPT2LMHeadModel]] = {
        "base": lambda: build_start(start, folder_of(start)),
        "tuned": lambda: load_model(model.path),
    }
    device = device_of(run.device)
    less = "Set evaluate.batch and evaluate.replies to less"
    with at_work(device, run.threads, start["width"]), shortage_named("a model at its exam", device, less):
        # One model after the other: the larger ones fill a GPU.
        results = {which: examine(load().to(device), exam, params, run, which) for which, load in loads.items()}
    report = {
        "split": split,
        "split_asked": params.split,
        **figures(results, exam),
        "sampling": params.model_dump(mode="json", exclude={"split", "facts", "panel"}),
        "start": start,
        "training": model.json("training.json"),
        "curation": tokens.curation(),
        "lineage": {"model": model.manifest.digest, "tokens": tokens.manifest.digest},
    }
    write_json(out / "report.json", report)
    (out / "report.md").write_text(render(report), encoding="utf-8")
    write_plots(out, report, model.log())
    lines = (json.dumps(line) + "\n" for line in samples(results, exam))
    (out / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return counts_of(report)


def refuse_long(exam: Exam, positions: int) -> None:
    """Raise an error for a question or prompt that leaves no room for a reply, before any work is done."""
    asked = {"evaluate.facts": [question.text for question in exam.questions], "evaluate.panel": exam.panel}
    for setting, texts in asked.items():
        for text in texts:
            size = len(exam.dialect.prompt([("user", text)]))
            if size >= positions:
                raise ParameterError(
                    f"a prompt of {size:,} tokens leaves no room in the model's {positions:,} positions: {text[:60]!r}",
                    setting,
                    "ask something shorter, or raise encode.block",
                    "param.prompt",
                )


def exam_of(model: Model, tokens: Tokens, params: EvaluateParams) -> tuple[str | None, Exam]:
    """Return what both models are put to, and the name of its split."""
    from tasks.gpt.report import Exam
    from tasks.oasst.facts import held_out_questions
    from tasks.text.chat import load_dialect

    name, split = split_of(tokens, params.split)
    utf8_bytes = tokens.encoding().utf8_bytes.get(name, 0) if name else 0
    seeds = range(params.seed, params.seed + params.samples_per_prompt)
    dialect = load_dialect(model.path)
    return name, Exam(dialect, split, utf8_bytes, held_out_questions(params.facts), params.panel, seeds)


def split_of(tokens: Tokens, asked: str) -> tuple[str | None, Split | None]:
    """Return the split that the loss is measured on: the one asked for, else val, else none."""
    from tasks.gpt.batches import Split

    splits = tokens.encoding().splits
    for name in dict.fromkeys((asked, "val")):
        if name in splits:
            split = Split(*(read(name) for read in (tokens.ids, tokens.mask, tokens.positions, tokens.ends)))
            if len(split) and split.supervised():
                return name, split
    return None, None


def examine(model: GPT2LMHeadModel, exam: Exam, params: EvaluateParams, run: EvaluateRuntime, label: str) -> Result:
    """Put one model to the exam."""
    from tasks.gpt.report import Result
    from tasks.gpt.sample import generate

    model.eval()
    nats = total_nats(model, exam.split, run.batch, label) if exam.split else None
    dialect, many = exam.dialect, len(exam.seeds)
    how: dict[str, Any] = {"vocab": dialect.used, "batch": run.replies}
    asked = [dialect.prompt([("user", question.text)]) for question in exam.questions]
    answers = generate(model, asked, dialect.stop, params.answer_tokens, label=f"answers, {label}", **how)
    how |= params.model_dump(include={"temperature", "top_k", "top_p"})
    prompts = [dialect.prompt([("user", prompt)]) for prompt in exam.panel for _ in exam.seeds]
    seeds = [*exam.seeds] * len(exam.panel)
    said = generate(model, prompts, dialect.stop, params.max_new_tokens, seeds=seeds, label=f"panel, {label}", **how)
    return Result(nats, answers, [said[first : first + many] for first in range(0, len(said), many)])


def total_nats(model: GPT2LMHeadModel, split: Split, batch: int | None, label: str) -> float:
    """Return the loss summed over a split, in nats.

    Raises:
        InputError: If it is not finite.
    """
    import torch

    from tasks.gpt.loss import token_nats
    from tasks.gpt.need import AT_ONCE
    from tasks.progress import track

    at_once = batch or max(1, AT_ONCE // split.block)
    total = torch.zeros((), dtype=torch.float64)
    batches = split.in_order(at_once, model.device)
    for one in track(batches, f"loss, {label}", -(-len(split) // at_once), "batches"):
        total += token_nats(model, *one).cpu().double().sum()  # not every device has float64
    if not isfinite(total.item()):
        raise InputError(
            f"the loss of the {label} model is {total.item()}", "evaluate", "Train again", "evaluate.nonfinite"
        )
    return total.item()


def write_plots(out: Path, report: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> None:
    """Write the loss curve, the bars by region where facts with regions were asked, and the funnel of the data."""
    from tasks.gpt.figures import facts_svg, funnel_svg, loss_svg

    train, validation = (
        [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None] for name in ("loss", "val_nll")
    )
    (out / "loss.svg").write_bytes(loss_svg(train, validation))
    regions = (report["facts"] or {}).get("by_region")
    if regions:
        shares = {name: (found["base"], found["tuned"]) for name, found in regions.items()}
        (out / "facts.svg").write_bytes(facts_svg(shares))
    if report["curation"]:
        (out / "funnel.svg").write_bytes(funnel_svg(report["curation"]["counts"]))


def counts_of(report: Mapping[str, Any]) -> Counts:
    """Return the figures that the manifest and a run's summary show."""
    measures = ("nll", "bits_per_byte", "stop_rate")
    counts = {name: report[name] for name in measures}
    if report["facts"]:
        counts["facts"] = {name: report["facts"][name] for name in ("base", "tuned", "n")}
    return {"sequences": report["sequences"], "tokens": report["tokens"], **counts}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file; a number that is not finite is a bug, not a value."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")
