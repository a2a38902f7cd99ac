"""The scorecard: what a report says, as a page of Markdown.

What a model says and what stands in the data stands only in fenced blocks, see `markdown.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from tasks.dialogue import funnel
from tasks.dialogue.markdown import entry, fenced, named, table

Figures = Mapping[str, Any]  # report.json, or a part of it
CUT = " …"  # after a reply that never stopped

MEASURES = (  # name in report.json, name on the page, how a value is written
    ("nll", "NLL, nats per token", "{:.3f}"),
    ("perplexity", "Perplexity", "{:,.2f}"),
    ("bits_per_byte", "Bits per byte", "{:.3f}"),
    ("stop_rate", "Replies that stop", "{:.1%}"),
    ("facts", "Facts right", "{:.1%}"),
)


def render(report: Figures, heads: bool = True) -> str:
    """Return report.md for report.json; `heads`: with the beginnings of texts of the data."""
    parts = (_opening, _notices, _measures, _curve, _facts, _wrong, _panel, partial(_data, heads=heads), _lineage)
    return "\n\n".join(line for part in parts for line in part(report)) + "\n"


def _opening(report: Figures) -> Iterator[str]:
    start, training = report["start"], report["training"]
    shape = f"{start['layers']} layers × {start['width']} wide, {_number(training.get('parameters'))} parameters"
    origin = "random weights" if start["start"] == "scratch" else f"`{named(start.get('repo') or start['start'])}`"
    if start.get("model"):
        origin = "a model that was tuned before"
    yield "# Tuned against base"
    yield (
        f"A GPT-2 of {shape}. The base is {origin}; the tuned model is what {_number(training.get('steps'))} optimizer"
        f" steps over {_number(training.get('supervised'))} supervised tokens made of it. {_measured_on(report)}"
    )


def _measured_on(report: Figures) -> str:
    asked, used = report["split_asked"], report["split"]
    if used is None:
        return f"**The {asked} split holds no supervised token, nor does val: there is no loss to report.**"
    told = (
        f"Loss is measured on the {report['tokens']:,} supervised tokens of the {used} split"
        f" ({report['sequences']:,} sequences)"
    )
    return told + (
        "." if asked == used else f"; **the {asked} split holds none**, and training chose its best step by {used}."
    )


def _notices(report: Figures) -> Iterator[str]:
    """Say what was lost on the way, in a fence: names of fields are words of the data."""
    if lost := report.get("notices"):
        yield "## Lost or read otherwise"
        yield fenced("\n\n".join(entry([(one["code"], f"{one['cause']}. {one['setting']}.")]) for one in lost))


def _measures(report: Figures) -> Iterator[str]:
    rows = [
        (label, *(_written(report[name][which], form) for which in ("base", "tuned")))
        for name, label, form in MEASURES
        if report[name] is not None
    ]
    yield table(("", "base", "tuned"), rows)
    cap = report["sampling"]["max_new_tokens"]
    asked = report["replies"]
    if asked["facts"] or asked["panel"]:
        yield (
            f"Replies that stop: of {asked['facts']:,} to questions ({report['sampling']['answer_tokens']} tokens at"
            f" most) and {asked['panel']:,} to the panel ({cap} at most), the share that ended by itself."
        )


def _curve(report: Figures) -> Iterator[str]:
    best, before = report["training"].get("val_nll_best"), report["training"].get("val_nll_start")
    yield "## Training"
    yield "![loss](loss.svg)"
    if best is not None and before is not None:
        step = _number(report["training"].get("best_step"))
        yield f"Validation NLL fell from {before:.3f} to {best:.3f} nats per token, the best at step {step}."


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
        yield _shares("region", facts["by_region"])
    if len(facts["by_family"]) > 1:
        yield _shares("family", facts["by_family"])


def _shares(of: str, found_by: Figures) -> str:
    rows = [
        (named(name), f"{found['n']:,}", f"{found['base']:.1%}", f"{found['tuned']:.1%}")
        for name, found in found_by.items()
    ]
    return table((of, "questions", "base", "tuned"), rows)


def _wrong(report: Figures) -> Iterator[str]:
    wrong = (report["facts"] or {}).get("wrong")
    if not wrong:
        return
    yield "### Answered wrong"
    yield "By the tuned model; the first ones:"
    entries = [
        entry([("asked", case["question"]), ("wanted", case["expected"]), ("said", _said(case))]) for case in wrong
    ]
    yield fenced("\n\n".join(entries))


def _panel(report: Figures) -> Iterator[str]:
    if not report["panel"]:
        return
    drawn = report["sampling"]
    cuts = "".join(f", {name} {drawn[name]}" for name in ("top_k", "top_p") if drawn[name] is not None)
    yield "## Panel"
    yield (
        f"Both models draw with the same seeds, at temperature {drawn['temperature']}{cuts};"
        f" `{CUT.strip()}` marks a reply that did not stop within {drawn['max_new_tokens']} tokens."
    )
    for asked in report["panel"]:
        lines = [("user", asked["prompt"])]
        for base, tuned in zip(asked["base"], asked["tuned"], strict=True):
            lines += [("base", _said(base)), ("tuned", _said(tuned))]
        yield fenced(entry(lines))


def _data(report: Figures, heads: bool) -> Iterator[str]:
    if report.get("curation"):
        yield from funnel.render(report["curation"], heads, "funnel.svg")


def _lineage(report: Figures) -> Iterator[str]:
    start = report["start"]
    known = {
        "start": start["start"], "repository": start.get("repo"), "revision": start.get("revision"),
        "start model": start.get("model"), "start weights": start.get("sha256"), "seed": start.get("seed"),
        **report["lineage"],
    }  # fmt: skip
    yield "## Lineage"
    yield "\n".join(f"- {label}: `{named(str(value))}`" for label, value in known.items() if value is not None)


def _said(reply: Figures) -> str:
    text = reply["text"].strip() or "(nothing)"
    return text if reply["stopped"] else text + CUT


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _written(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
