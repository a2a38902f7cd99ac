"""What the command line shows: bars on standard error, tables on standard output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tasks.progress import Bar
from tasks.store.folders import SHORT

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from flows.chain import Planned
    from tasks.store.manifest import Manifest

MARKS = {"cached": "[green]cached[/]", "run": "[yellow]run[/]", "unknown": "[dim]unknown[/]"}


def console() -> Console:
    """Return standard output; as wide as a log needs, where it is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move the bar."""
        self.progress.advance(self.task, amount)
        if note:
            self.progress.update(self.task, note=note)


class Bars:
    """Shows progress as bars on standard error."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        texts = [
            TextColumn("{task.description:<22}"),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[note]}", style="cyan"),
        ]
        columns = (texts[0], BarColumn(28), MofNCompleteColumn(), texts[1], TimeElapsedColumn(), Remaining(), texts[2])
        self.progress = Progress(*columns, console=Console(stderr=True), transient=False)

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Bar]:
        """Open a bar."""
        task = self.progress.add_task(label, total=total, unit=unit, note="")
        yield _RichBar(self.progress, task)
        done = self.progress.tasks[self.progress.task_ids.index(task)]
        if done.total is None:
            self.progress.update(task, total=done.completed)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bars while the block runs."""
        with self.progress:
            yield


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Build a table of plain strings."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for name in columns:
        right = name in {"seconds", "bytes"}
        made.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        made.add_row(*row)
    return made


def plan_table(title: str, planned: Sequence[Planned]) -> Table:
    """Show what a run would do."""
    rows = [(entry.step, MARKS[entry.status], (entry.key or "")[:SHORT], entry.why) for entry in planned]
    return table(title, ("step", "status", "key", "why"), rows)


def summary_table(title: str, rows: Sequence[tuple[str, bool, float, str, Mapping[str, Any], Path]]) -> Table:
    """Show what a run did: step, cached or ran, seconds, why, counts, where."""
    cells = [
        (name, "[green]cached[/]" if cached else "[yellow]ran[/]", f"{seconds:.1f}", why, brief(counts), _near(path))
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
