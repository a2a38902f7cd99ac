"""Plots of a report, as SVG whose bytes depend on the numbers alone: no date, no random ids, no user's style file.

matplotlib is used through its objects, never `pyplot`, which keeps every figure in a global list and picks a window
system.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Point = tuple[float, float]  # step, loss
GREY, LIGHT, BLUE, GREEN = "#8c959f", "#a8c7ea", "#1f5fa8", "#2f8f5b"  # base; the noisy curve; tuned; preferred
MOST_POINTS = 400  # of a curve: more than a screen's pixels show nothing but make the file large


def loss_unit(log: Sequence[Mapping[str, Any]]) -> str:
    """Return what the losses of a training log are measured in: that of preference pairs has an accuracy beside it."""
    return "nats per pair" if any("accuracy" in entry for entry in log) else "nats per token"


def loss_svg(train: Sequence[Point], validation: Sequence[Point], unit: str = "nats per token") -> bytes:
    """Draw the training and the validation loss over optimizer steps.

    Args:
        train: (step, loss), in order of steps; a long log is drawn as means of equal stretches.
        validation: (step, loss), in order of steps.
        unit: What the losses are measured in, as `loss_unit` returns it.
    """
    with _canvas(7.0, 3.4) as (axes, drawn):
        if train:
            axes.plot(*zip(*thinned(train), strict=True), color=LIGHT, linewidth=1.2, label="train")
        if validation:
            points = list(zip(*thinned(validation), strict=True))
            axes.plot(*points, color=BLUE, linewidth=1.6, marker="o", markersize=3, label="validation")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        if train or validation:
            axes.legend(frameon=False)
        else:
            axes.text(0.5, 0.5, "no step was logged", ha="center", va="center", transform=axes.transAxes)
    return drawn.getvalue()


def facts_svg(shares: Mapping[str, Sequence[float]], models: Sequence[str] = ("base", "tuned")) -> bytes:
    """Draw the share of facts answered right, a bar a model for each region.

    Args:
        shares: Region -> share of each model, in 0..1; drawn from the top in this order.
        models: Names of the models, three at most.
    """
    with _canvas(7.0, 0.9 + 0.5 * max(1, len(shares))) as (axes, drawn):
        names = list(shares)
        rows = range(len(names))
        step = 0.72 / len(models)
        for place, (label, colour) in enumerate(zip(models, (GREY, BLUE, GREEN), strict=False)):
            values = [100 * shares[name][place] for name in names]
            offset = (place - (len(models) - 1) / 2) * step
            bars = axes.barh([row + offset for row in rows], values, height=step - 0.02, color=colour, label=label)
            axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axes.set_yticks(list(rows), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 108)
        axes.set_xlabel("held-out questions answered right, %")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(models))
    return drawn.getvalue()


def funnel_svg(counts: Mapping[str, Any]) -> bytes:
    """Draw where the messages went: a bar for what was read, one for each rule that dropped any, one for what is kept.

    Args:
        counts: As the curate step measures them: `read`, `funnel` and `messages`.
    """
    bars = {"read": counts["read"]["messages"], **{rule: gone for rule, gone in counts["funnel"].items() if gone}}
    bars["kept"] = counts["messages"]
    with _canvas(7.0, 0.9 + 0.25 * len(bars)) as (axes, drawn):
        ends = {"read", "kept"}
        drawn_bars = axes.barh([*bars], [*bars.values()], color=[BLUE if name in ends else GREY for name in bars])
        axes.bar_label(drawn_bars, labels=[f"{number:,}" for number in bars.values()], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, max(1, 1.12 * bars["read"]))
        axes.set_xlabel("messages")
    return drawn.getvalue()


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return the means of at most `most` equal stretches of a curve; a short curve as it is."""
    stride = -(-len(points) // most) if points else 1
    parts = (points[first : first + stride] for first in range(0, len(points), stride))
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


@contextmanager
def _canvas(width: float, height: float) -> Iterator[tuple[Axes, io.BytesIO]]:
    """Open empty axes of a size in inches; what was drawn on them is in the buffer when the block ends."""
    drawn = io.BytesIO()
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's matplotlibrc would change the bytes
        mpl.rcParams.update({"svg.hashsalt": "treeline", "svg.fonttype": "none", "font.size": 9})
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#d0d7de", linewidth=0.5)
        axes.set_axisbelow(True)
        yield axes, drawn
        FigureCanvasSVG(figure).print_svg(drawn, metadata={"Date": None, "Creator": None})
