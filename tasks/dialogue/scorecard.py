"""The scorecard: what a report says, as a page of Markdown.

A model says anything, and a prompt is anybody's text: both stand only in fenced blocks, where neither HTML nor links
nor tables are read, and whatever does not print is spelled out: a terminal obeys it no more than a browser does.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]  # report.json, or a part of it
WIDTH = 100  # columns of a fenced block
CUT = " …"  # after a reply that never stopped

MEASURES = (  # name in report.json, name on the page, how a value is written
    ("nll", "NLL, nats per token", "{:.3f}"),
    ("perplexity", "Perplexity", "{:,.2f}"),
    ("bits_per_byte", "Bits per byte", "{:.3f}"),
    ("stop_rate", "Replies that stop", "{:.1%}"),
    ("facts", "Facts right", "{:.1%}"),
)


def render(report: Figures) -> str:
    """Return report.md for report.json."""
    parts = (_opening, _measures, _curve, _facts, _wrong, _panel, _lineage)
    return "\n\n".join(line for part in parts for line in part(report)) + "\n"


def _opening(report: Figures) -> Iterator[str]:
    start, training = report["start"], report["training"]
    shape = f"{start['layers']} layers × {start['width']} wide, {_number(training.get('parameters'))} parameters"
    origin = "random weights" if start["start"] == "scratch" else f"`{_name(start.get('repo') or start['start'])}`"
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


def _measures(report: Figures) -> Iterator[str]:
    rows = [
        (label, *(_written(report[name][which], form) for which in ("base", "tuned")))
        for name, label, form in MEASURES
        if report[name] is not None
    ]
    yield _table(("", "base", "tuned"), rows)
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


def _shares(of: str, table: Figures) -> str:
    rows = [
        (_name(name), f"{found['n']:,}", f"{found['base']:.1%}", f"{found['tuned']:.1%}")
        for name, found in table.items()
    ]
    return _table((of, "questions", "base", "tuned"), rows)


def _wrong(report: Figures) -> Iterator[str]:
    wrong = (report["facts"] or {}).get("wrong")
    if not wrong:
        return
    yield "### Answered wrong"
    yield "By the tuned model; the first ones:"
    entries = [
        _entry([("asked", case["question"]), ("wanted", case["expected"]), ("said", _said(case))]) for case in wrong
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
        yield fenced(_entry(lines))


def _lineage(report: Figures) -> Iterator[str]:
    start = report["start"]
    known = {
        "start": start["start"], "repository": start.get("repo"), "revision": start.get("revision"),
        "start weights": start.get("sha256"), "seed": start.get("seed"), **report["lineage"],
    }  # fmt: skip
    yield "## Lineage"
    yield "\n".join(f"- {label}: `{_name(str(value))}`" for label, value in known.items() if value is not None)


def fenced(text: str) -> str:
    """Return text as a Markdown code block that it cannot get out of."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def printable(text: str) -> str:
    r"""Return text with everything but line ends that does not print spelled out: an escape becomes `\x1b`."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _said(reply: Figures) -> str:
    text = reply["text"].strip() or "(nothing)"
    return text if reply["stopped"] else text + CUT


def _entry(lines: Sequence[tuple[str, str]]) -> str:
    """Lay labelled texts out in two columns, the second wrapped."""
    margin = 2 + max(len(label) for label, _ in lines)
    return "\n".join(_hung(label, printable(text), margin) for label, text in lines)


def _hung(label: str, text: str, margin: int) -> str:
    lines = text.split("\n")
    rows = [row for line in lines for row in textwrap.wrap(line, WIDTH - margin, break_on_hyphens=False) or [""]]
    return "\n".join(f"{label if at == 0 else '':<{margin}}{row}".rstrip() for at, row in enumerate(rows))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up as plain text, too: words to the left, numbers to the right."""
    widths = [max(3, *(len(row[column]) for row in (head, *rows))) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def _name(text: str) -> str:
    """Return a name as it may stand outside a fence: what Markdown or HTML could read as more than a letter is gone."""
    return re.sub(r"[^\w .,()/:+-]", "?", text)


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _written(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
