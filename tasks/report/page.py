"""The page of a report: what it says of some models, the base first, in Markdown.

What a model says and what stands in the data stands only in fenced blocks, see `markdown.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tasks.report import funnel
from tasks.report.markdown import code, entry, fenced, inline_name, markdown_table

Figures = Mapping[str, Any]  # report.json, or a part of it
MARKS = {"stopped": "", "cut": " …", "looping": " ↻"}  # after a reply, by how it ended
MOST = 600  # characters of a reply on the page: samples.jsonl holds it whole

MEASURES = (  # name in report.json, name on the page, how a value is written
    ("nll", "NLL, nats per token", "{:.3f}"),
    ("perplexity", "Perplexity", "{:,.2f}"),
    ("bits_per_byte", "Bits per byte", "{:.3f}"),
    ("stop_rate", "Replies that stop", "{:.1%}"),
    ("loop_rate", "Replies that loop", "{:.1%}"),
    ("cut_rate", "Replies that are cut", "{:.1%}"),
    ("facts", "Facts right", "{:.1%}"),
    ("accuracy", "Better reply found likelier", "{:.1%}"),
    ("margin", "By how much, nats", "{:.3f}"),
    ("chosen", "Log-probability of the better reply, nats", "{:.2f}"),
)


def render_page(report: Figures, heads: bool = True) -> str:
    """Return report.md for report.json; `heads`: with the beginnings of texts of the data."""
    parts = (_opening, _notices, _measures, _curve, _facts, _wrong, _panel, partial(_data, heads=heads), _lineage)
    return "\n\n".join(line for part in parts for line in part(report)) + "\n"


def _opening(report: Figures) -> Iterator[str]:
    start, training = report["start"], report["training"]
    shape = f"{start['layers']} layers × {start['width']} wide, {_number(training.get('parameters'))} parameters"
    origin = "random weights" if start["start"] == "scratch" else code(start.get("repo") or start["start"])
    if start.get("model"):
        origin = "a model that was tuned before"
    preference = report.get("preference")
    yield "# Preferred against tuned and base" if preference else "# Tuned against base"
    work = f"{_steps(training)} over {_number(training.get('supervised'))} supervised tokens"
    sentences = [f"A GPT-2 of {shape}. The base is {origin}.", _work("tuned", "base", work, training)]
    if preference:
        work = f"{_steps(preference)} over {_number(preference.get('pairs'))} pairs of ranked replies"
        sentences.append(_work("preferred", "tuned", work, preference))
    yield " ".join([*sentences, _measured_on(report)])


def _steps(training: Figures) -> str:
    count = training.get("steps")
    return f"{_number(count)} optimizer step{'' if count == 1 else 's'}"


def _work(name: str, of: str, work: str, training: Figures) -> str:
    """Say what a step did, or that it did nothing: where its best weights are those that it began with."""
    if training.get("best_step") == 0:
        return f"**{work} changed nothing: the validation loss never fell, so the {name} model is the {of} one.**"
    return f"The {name} model is what {work} made of the {of} one."


def _measured_on(report: Figures) -> str:
    wanted, used = report["split_asked"], report["split"]
    if used is None:
        return f"**The {wanted} split holds no supervised token, nor does val: there is no loss to report.**"
    sentence = (
        f"Loss is measured on the {report['tokens']:,} supervised tokens of the {used} split"
        f" ({report['sequences']:,} sequences)"
    )
    return sentence + (
        "." if wanted == used else f"; **the {wanted} split holds none**, and training chose its best step by {used}."
    )


def _notices(report: Figures) -> Iterator[str]:
    notices = [(notice["code"], f"{notice['cause']}. {notice['setting']}.") for notice in report.get("notices", ())]
    if notices:
        yield "## Lost or read otherwise"
        yield render_notices(notices)


def render_notices(notices: Sequence[tuple[str, str]]) -> str:
    """Say what was lost, code and sentence of each, in a fence: names of fields in them are words of the data."""
    return fenced("\n\n".join(entry([notice]) for notice in notices))


def _measures(report: Figures) -> Iterator[str]:
    rows = [
        (label, *(_written(report[name][which], form) for which in report["models"]))
        for name, label, form in MEASURES
        if report.get(name) is not None
    ]
    yield markdown_table(("", *report["models"]), rows)
    replies = report["replies"]
    if replies["facts"] or replies["panel"]:
        yield (
            f"Of {replies['facts']:,} replies to questions and {replies['panel']:,} to the panel, those that stop end"
            " by themselves, those that loop say the same again and again, and the others are cut after"
            f" {_limit(report)}."
        )
    if report["pairs"]:
        yield (
            f"Of {report['pairs']:,} pairs of replies that people ranked and no model was trained on: the share whose"
            " better reply the model itself finds likelier than the worse one, and by how much. A short reply is"
            " likelier than a long one to any model, so compare the columns, the base's too."
        )


def _limit(report: Figures) -> str:
    cap = report["sampling"].get("max_new_tokens")
    return (
        f"{cap:,} tokens" if cap else f"as many tokens as the model's {report['start']['positions']:,} positions hold"
    )


def _curve(report: Figures) -> Iterator[str]:
    best, before = report["training"].get("val_nll_best"), report["training"].get("val_nll_start")
    yield "## Training"
    yield "![loss](loss.svg)"
    if best is not None and before is not None and report["training"].get("best_step"):
        step = _number(report["training"].get("best_step"))
        yield f"Validation NLL fell from {before:.3f} to {best:.3f} nats per token, the best at step {step}."
    preference = report.get("preference") or {}
    if preference.get("loss_best") is not None and preference.get("best_step"):
        yield (
            f"Then the loss of validation pairs fell from {preference['loss_start']:.3f} to"
            f" {preference['loss_best']:.3f} nats, the best at step {_number(preference['best_step'])}."
        )


def _facts(report: Figures) -> Iterator[str]:
    facts = report["facts"]
    if facts is None:
        return
    yield "## Facts"
    yield (
        f"{facts['n']:,} questions in phrasings that the sample dataset never asks, answered greedily; right is the"
        " answer or an alias, alone or in a plain sentence."
    )
    if facts["by_region"]:
        yield "![facts](facts.svg)"
        yield _shares("region", facts["by_region"], report["models"])
    if len(facts["by_family"]) > 1:
        yield _shares("family", facts["by_family"], report["models"])


def _shares(of: str, groups: Figures, models: Sequence[str]) -> str:
    rows = [
        (inline_name(name), f"{rates['n']:,}", *(f"{rates[which]:.1%}" for which in models))
        for name, rates in groups.items()
    ]
    return markdown_table((of, "questions", *models), rows)


def _wrong(report: Figures) -> Iterator[str]:
    wrong = (report["facts"] or {}).get("wrong")
    if not wrong:
        return
    yield "### Answered wrong"
    yield f"By the {report['models'][-1]} model; the first ones:"
    entries = [
        entry([("asked", case["question"]), ("wanted", case["expected"]), ("said", _said(case))]) for case in wrong
    ]
    yield fenced("\n\n".join(entries))


def _panel(report: Figures) -> Iterator[str]:
    if not report["panel"]:
        return
    drawn = report["sampling"]
    cuts = "".join(f", {name} {drawn[name]}" for name in ("top_k", "top_p") if drawn.get(name) is not None)
    yield "## Panel"
    yield (
        f"All models draw with the same seeds, at temperature {drawn['temperature']}{cuts}. `{MARKS['cut'].strip()}`"
        f" marks a reply that was cut, here or by its limit, `{MARKS['looping'].strip()}` one that loops;"
        " `samples.jsonl` holds them whole."
    )
    for prompt in report["panel"]:
        lines = [("user", prompt["prompt"])]
        for replies in zip(*(prompt[which] for which in report["models"]), strict=True):
            lines += [(which, _said(reply)) for which, reply in zip(report["models"], replies, strict=True)]
        yield fenced(entry(lines))


def _data(report: Figures, heads: bool) -> Iterator[str]:
    if report.get("curation"):
        yield from funnel.render_funnel(report["curation"], heads, "funnel.svg")


def _lineage(report: Figures) -> Iterator[str]:
    start = report["start"]
    known = {
        "start": start["start"], "repository": start.get("repo"), "revision": start.get("revision"),
        "start model": start.get("model"), "start weights": start.get("sha256"), "seed": start.get("seed"),
        **report["lineage"],
    }  # fmt: skip
    yield "## Lineage"
    yield "\n".join(f"- {label}: {code(str(value))}" for label, value in known.items() if value is not None)


def _said(reply: Figures) -> str:
    text = reply["text"].strip() or "(nothing)"
    return text[:MOST] + MARKS["cut" if len(text) > MOST and reply["end"] == "stopped" else reply["end"]]


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _written(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
