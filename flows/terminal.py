"""What the command line shows: bars on standard error, tables on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.progress import NOBODY, Bar
from tasks.report.markdown import printable
from tasks.store.store import SHORT

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from flows.chain import Planned
    from tasks.store.manifest import Manifest, Notice

COLOURS = {"cached": "green", "ran": "yellow", "run": "yellow", "unknown": "dim", "the same": "green", "other": "red"}


def console(stderr: bool = False) -> Console:
    """Return standard output, or standard error; texts that it prints are never read as markup."""
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.is_terminal:
        made.width = 160  # as wide as a log needs
    return made


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID, total: float | None, unit: str) -> None:
        self.progress, self.task, self.total, self.unit, self.done = progress, task, total, unit, 0.0

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move the bar."""
        self.done += amount
        self.progress.update(self.task, advance=amount, amount=amount_of(self.done, self.total, self.unit))
        if note:
            self.progress.update(self.task, note=note)


class Bars:
    """Shows progress as bars on standard error."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = [
            TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[amount]", "fields[note]")
        ]
        self.progress = Progress(columns[0], BarColumn(16), *columns[1:2], TimeElapsedColumn(), columns[2],
                                 console=console(stderr=True))  # fmt: skip

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Bar]:
        """Open a bar; for nothing to do, none."""
        if total == 0:
            yield NOBODY
            return
        task = self.progress.add_task(label, total=total, amount=amount_of(0, total, unit), note="")
        bar = _RichBar(self.progress, task, total, unit)
        yield bar
        self.progress.update(task, total=bar.done or 1, completed=bar.done or 1)  # it ended, wherever that is

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bars while the block runs."""
        with self.progress:
            yield


def amount_of(done: float, total: float | None, unit: str) -> str:
    """Say how much of how much is done; bytes in MB."""
    scale, name, form = (1e6, "MB", ",.1f") if unit == "bytes" else (1.0, unit, ",.0f")
    return f"{done / scale:{form}}{'' if total is None else f'/{total / scale:{form}}'} {name}"


def json_text(value: Any, on_terminal: bool) -> str:
    """Return a value as JSON; for a terminal in plain ASCII: one would obey the control characters of strangers."""
    said = json.dumps(value, ensure_ascii=on_terminal, indent=1)
    return said.replace("\x7f", "\\u007f") if on_terminal else said


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json_text(value, sys.stdout.isatty()))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Build a table of texts: what does not print is spelled out, and words that say what became of a step coloured."""
    made = Table(title=Text(printable(title)), title_justify="left", header_style="bold")
    for name in columns:
        right = name in {"seconds", "bytes"}
        made.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        made.add_row(*(Text(printable(cell), style=COLOURS.get(cell, "")) for cell in row))
    return made


def plan_table(title: str, planned: Sequence[Planned]) -> Table:
    """Show what a run would do."""
    rows = [(entry.step, entry.status, (entry.key or "")[:SHORT], entry.why) for entry in planned]
    return table(title, ("step", "status", "key", "why"), rows)


def summary_table(title: str, rows: Sequence[tuple[str, bool, float, str, Mapping[str, Any], Path]]) -> Table:
    """Show what a run did: step, cached or ran, seconds, why, counts, where."""
    cells = [
        (name, "cached" if cached else "ran", f"{seconds:.1f}", why, brief(counts), _near(path))
        for name, cached, seconds, why, counts, path in rows
    ]
    return table(title, ("step", "", "seconds", "why", "counts", "artifact"), cells)


def artifact_table(manifests: Sequence[Manifest]) -> Table:
    """Show the finished artifacts."""
    rows = [
        (
            f"{made.kind}/{made.key[:SHORT]}",
            made.created,
            f"{size(made):,}",
            brief(made.counts),
            str(made.origin.get("recipe", "")),
        )
        for made in manifests
    ]
    return table("", ("id", "created", "bytes", "counts", "recipe"), rows)


def size(manifest: Manifest) -> int:
    """Return the bytes of an artifact's files."""
    return sum(entry.bytes for entry in manifest.files.values())


def print_notices(notices: Iterable[Notice]) -> None:
    """Print what a run lost, a line each; names of fields in it are strangers' words."""
    for notice in notices:
        console().print(printable(str(notice)), markup=False, highlight=False, soft_wrap=True, style="yellow")


def brief(counts: Mapping[str, Any], most: int = 4) -> str:
    """Return the first few plain counts as text."""
    plain = [(name, value) for name, value in counts.items() if isinstance(value, int | float)]
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}" for name, value in plain[:most]
    )


def _near(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
