"""What the Prefect UI shows of a run: a card a step, a moving progress artifact, a page for the whole run."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from flows import reports
from flows.views import adapters
from tasks.artifacts import Dialogues, Model, Report
from tasks.notices import told
from tasks.progress import Bar, Listener
from tasks.report.markdown import inline_name
from tasks.step import Outcome
from tasks.store.manifest import Notice

if TYPE_CHECKING:
    from uuid import UUID

EVERY = 5.0  # seconds between two updates of a progress artifact: each is a request


def publish_card(outcome: Outcome) -> None:
    """Leave a step's card in the run, hit or miss; outside a Prefect run, nothing."""
    from prefect.artifacts import create_markdown_artifact
    from prefect.context import TaskRunContext

    if TaskRunContext.get() is not None:
        publish = partial(create_markdown_artifact, key=f"treeline-{outcome.step}")
        reports.send(f"the card of {outcome.step}", publish, lambda: (card(outcome),))


def publish_summary(recipe: str, outcomes: Sequence[Outcome]) -> None:
    """Leave the page of a whole run."""
    from prefect.artifacts import create_markdown_artifact

    publish = partial(create_markdown_artifact, key="treeline-run")
    reports.send("the run's page", publish, lambda: (summary(recipe, outcomes),))


def publish_comparison(recipe: str, rows: Sequence[Sequence[str]]) -> None:
    """Leave the table that compares the arms of a sweep; its first row is the head."""
    from prefect.artifacts import create_markdown_artifact

    lines = [f"| {' | '.join(map(inline_name, row))} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    page = f"# Sweep of {inline_name(recipe)}\n\nThe mean over the seeds, and the band.\n\n" + "\n".join(lines)
    reports.send("the sweep's page", partial(create_markdown_artifact, page, key="treeline-sweep"))


def card(outcome: Outcome) -> str:
    """Render one step's card: what it made, its counts, and its picture where it has one."""
    artifact = outcome.artifact
    head = f"# {outcome.step}: `{artifact.id}` {'cached' if outcome.cached else 'made'}"
    parts = [head, f"{inline_name(outcome.why)}; {outcome.seconds:.1f} s; in {inline_name(str(artifact.path))}"]
    parts += notices(notice for notice in artifact.manifest.notices if notice.step == outcome.step)
    parts.append(_with_pictures(artifact) if isinstance(artifact, Report) else counts_table(artifact.counts))
    if isinstance(artifact, Model):
        parts += [inline_name(line) for line in [adapters(artifact)] if line]
        parts.append(_losses(artifact))
    if isinstance(artifact, Dialogues):
        parts.append(_funnel(artifact))
    return "\n\n".join(parts)


def summary(recipe: str, outcomes: Sequence[Outcome]) -> str:
    """Render the page of a run: the chain as a graph, and a row a step."""
    arrows = " --> ".join(f'{one.step}["{one.artifact.id}"]' for one in outcomes)
    state = {True: "cached", False: "ran"}
    rows = [
        f"| {one.step} | {state[one.cached]} | {one.seconds:.1f} | {inline_name(one.why)} | `{one.artifact.id}` |"
        for one in outcomes
    ]
    head = "| step | | seconds | why | artifact |\n|---|---|---:|---|---|"
    page = f"# Treeline: {inline_name(recipe)}\n\n```mermaid\ngraph LR\n{arrows}\n```\n\n{head}\n" + "\n".join(rows)
    return "\n\n".join([page, *notices(told(outcome.artifact.manifest for outcome in outcomes))])


def notices(found: Iterable[Notice]) -> list[str]:
    """Say what was lost, in one block; for nothing, none."""
    from tasks.report.page import render_notices

    said = [(one.code, f"{one.cause}. {one.setting}.") for one in found]
    return [render_notices(said)] if said else []


def counts_table(counts: Mapping[str, Any], name: str = "count") -> str:
    """Render counts as a Markdown table; tables of counts, such as the funnel, follow in their own."""
    plain = {key: value for key, value in counts.items() if value is not None and not isinstance(value, dict)}
    parts = []
    if plain:
        rows = [f"| {inline_name(key)} | {_cell(value)} |" for key, value in plain.items()]
        parts.append("\n".join([f"| {inline_name(name)} | |", "|---|---:|", *rows]))
    parts += [counts_table(value, key) for key, value in counts.items() if isinstance(value, dict) and value]
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return inline_name(str(value))


def _with_pictures(report: Report) -> str:
    """Return the report without texts of the data, and with its pictures inside: the UI cannot reach files."""
    from tasks.report.page import render_page

    page = render_page(report.figures(), heads=False)
    for name in report.manifest.files:
        if name.endswith(".svg"):
            page = page.replace(f"]({name})", f"]({_inline((report.path / name).read_bytes())})")
    return page


def _inline(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _funnel(dialogues: Dialogues) -> str:
    """Return the funnel by rule and language, with ids and evidence of the first cases; texts stay in the store."""
    from tasks.report.funnel import render_funnel
    from tasks.report.plots import funnel_svg

    return "\n\n".join(render_funnel(dialogues.curation(), heads=False, picture=_inline(funnel_svg(dialogues.counts))))


def _losses(model: Model) -> str:
    """Return the loss curve, and the validation losses as a table."""
    from tasks.report.plots import loss_svg, loss_unit

    log, unit = model.log(), loss_unit(model.log())
    train, validation = (
        [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None] for name in ("loss", "val_nll")
    )
    rows = [f"| {step:,} | {nats:.4f} |" for step, nats in validation]
    table = "\n".join([f"| step | validation, {unit} |", "|---:|---:|", *rows]) if rows else ""
    return f"![training and validation loss]({_inline(loss_svg(train, validation, unit))})\n\n{table}"


class _Reported:
    """A bar that moves a progress artifact; of its reports, one waits at most."""

    def __init__(self, total: float, about: str) -> None:
        self.total, self.about, self.done, self.last = total, about, 0.0, time.monotonic()
        self.artifact: UUID | None = None
        self.waits = False
        self.update()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        if time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            self.update()

    def update(self) -> None:
        if not self.waits:
            self.waits = True
            reports.send("the progress of training", self.publish)

    def publish(self) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        self.waits = False
        percent = min(100.0, 100.0 * self.done / self.total)
        if self.artifact:
            update_progress_artifact(self.artifact, percent)
        else:
            made = create_progress_artifact(percent, key="treeline-training", description=self.about)
            self.artifact = cast("UUID", made)  # no coroutine: this is no coroutine either


class _Both:
    def __init__(self, bars: Sequence[Bar]) -> None:
        self.bars = bars

    def advance(self, amount: float = 1, note: str = "") -> None:
        for one in self.bars:
            one.advance(amount, note)


class UiProgress:
    """Shows the progress of training in the Prefect UI, and passes everything on to another listener."""

    def __init__(self, other: Listener) -> None:
        self.other = other

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Bar]:
        """Open a bar; for training, a progress artifact too."""
        from prefect.context import TaskRunContext

        with self.other.bar(label, total, unit) as bar:
            if label != "train" or not total or TaskRunContext.get() is None:
                yield bar
                return
            reported = _Reported(total, f"{label}, {unit}")
            yield _Both([bar, reported])
            reported.update()
