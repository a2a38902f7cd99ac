"""Step 2, parse: lay the published trees out as one flat table of messages, and set aside what cannot be read."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from tasks.artifacts import (
    DETOXIFY,
    FAST,
    LABELS,
    MESSAGE_COLUMNS,
    MESSAGE_DISTINCT,
    REJECTED_COLUMNS,
    Counts,
    Messages,
    RawTrees,
    parquet_writer,
)  # fmt: skip
from tasks.errors import InputError, TreelineError
from tasks.notices import of_parse
from tasks.progress import bar
from tasks.step import Params, step

if TYPE_CHECKING:
    from tasks.oasst.merge import Robbed, Row, Verdict, Versions
    from tasks.oasst.reader import Bad, Dump, Found, Place
    from tasks.parquet import TableWriter

GROUP = 20_000  # rows of a row group: what is held in memory, and what a reader can skip
MB = 1 << 20
HEAD = 200  # bytes of a bad line that are shown
NAMED = 3  # bad lines that an error names
WAYS = ("in", "rejected", "repeated")  # in = out + rejected + repeated, of trees and of messages


class ParseParams(Params):
    """Settings of the parse step."""

    max_trees: int | None = Field(default=None, ge=1)
    """Trees to take, from the start of the dump; empty: all of them. A small number makes a smoke run."""

    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of trees, or of lines, from 0 to 1, that may be unusable before the step fails."""

    max_line_mb: float = Field(default=64, gt=0)
    """Longest line, in MiB; a longer one fails the step."""

    max_text_mb: float = Field(default=1, gt=0)
    """Longest text of a message, in MiB of UTF-8; a tree with a longer one is rejected."""

    max_ratio: float = Field(default=200, gt=0)
    """Bytes that one byte of a gzip file may unpack to, counted after 16 MiB; more is a bomb and fails the step."""


@step("parse", version=5, makes=Messages, notices=of_parse)
def parse(out: Path, raw: RawTrees, params: ParseParams) -> Counts:
    """Write `messages.parquet`, trees in the order of the dump, and `rejected.parquet`.

    The messages of a tree lie together, depth first, so parents come first; replies in the order published. A tree
    whose id came before, in the same file or an earlier one, is a repeat if it says nothing new. Else it takes the
    place of the earlier version: the later one of each message wins, and what only the earlier version had stays. A
    message that a later file has in another tree moves there, out of its old one.

    Raises:
        InputError: If a file is cut, corrupt or empty, or more than `max_bad_fraction` of trees or lines are unusable.
    """
    from tasks.chats import rows
    from tasks.oasst.jsonl import Limits
    from tasks.oasst.reader import Dump, Found
    from tasks.oasst.strict_reader import Layout

    files = raw.data()
    layout = Layout(LABELS, DETOXIFY, int(params.max_text_mb * MB))
    limits = Limits(int(params.max_line_mb * MB), params.max_ratio)
    with (
        bar("parse", sum(file.stat().st_size for file in files), "bytes") as shown,
        _no_collection(),
        _Intake(out, files) as intake,
    ):
        dump = Dump(files, layout, limits, shown.advance, {rows.KEY: rows.tree_of})
        for found in dump:
            intake.take(found) if isinstance(found, Found) else intake.reject(found)
            if intake.trees == params.max_trees:
                break
        intake.merge_versions()
        intake.finish(dump)
    intake.refuse_if_bad(params.max_bad_fraction, dump)
    return {**intake.counts(dump, layout.unknown), "naive_dates": layout.naive_dates}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector: no row refers in a circle, and to look at each again takes 5 % of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Intake:
    """Takes each tree or rejects it, keeps the books, and settles in the end what came more than once."""

    def __init__(self, out: Path, files: Sequence[Path]) -> None:
        from tasks.oasst.id_index import Seen
        from tasks.oasst.tables import MessageTable, RowTable

        self._path, self._files, self._seen = out / "messages.parquet", files, Seen()
        self._tables = ExitStack()
        self._messages = self._tables.enter_context(MessageTable(_writer(self._path), GROUP))
        rejected = RowTable(parquet_writer(out / "rejected.parquet", REJECTED_COLUMNS), GROUP)
        self._rejected = self._tables.enter_context(rejected)
        self._late: dict[Place, list[Bad]] = {}  # rejected, but the line is not at hand any more
        self._out: tuple[int, int] | None = None  # trees and messages, once settled
        self._named: list[str] = []
        self._do = "Mend the file, copy or download it again, or raise parse.max_bad_fraction"
        self._books: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tables.__exit__(kind, error, trace)

    @property
    def trees(self) -> int:
        """Trees taken so far."""
        return len(self._seen)

    def take(self, tree: Found) -> None:
        """Write a tree's messages."""
        books, total = self._books, tree.content.size
        books["trees_in"] += 1
        books["messages_in"] += total + tree.repeats + tree.conflicts
        books["messages_repeated"] += tree.repeats
        if tree.conflicts:
            self._replace_rows(tree)
        self._seen.note(tree)
        self._messages.add(tree.content)

    def _replace_rows(self, tree: Found) -> None:
        from tasks.oasst.reader import Bad

        found = tree.conflicts
        self._books.update(conflicts=found, messages_replaced=found, messages_rejected=found)
        said = f"{tree.conflicts} messages of this tree differ in a later file, and were taken from there"
        self._list(Bad(tree.place, "tree.replaced", said, tree.tree_id, 0, tree.conflicts))

    def reject(self, bad: Bad) -> None:
        """Note a line or tree that cannot be taken."""
        from tasks.oasst.advice import AS_LINES

        if not self._named and bad.hint:
            self._do = bad.hint
        if not self._named and bad.raw and bad.raw[:HEAD].lstrip().startswith(b"["):
            name = self._files[bad.place.file].name
            self._do = f"{name} looks like one JSON array; write one object a line (JSON Lines): {AS_LINES}"
        self._books.update(trees_in=bad.trees, messages_in=bad.messages)
        self._reject(bad)

    def _reject(self, bad: Bad) -> None:
        self._books.update(trees_rejected=bad.trees, messages_rejected=bad.messages, bad=1)
        if len(self._named) < NAMED:
            self._named.append(f"{self._named_place(bad.place)} {bad.code}: {bad.message}")
        self._list(bad)

    def merge_versions(self) -> None:
        """Unite the versions of each tree, and reject trees that share a message with an earlier one."""
        from tasks.oasst.merge import Versions
        from tasks.oasst.rewrite import rearrange, told

        self._messages.close()
        versions, placed = Versions(), {}  # version -> its rows, once united
        doubtful = self._seen.doubtful()
        spans = [self._seen.rows(version) for version in doubtful]
        found = dict(zip(doubtful, told(self._path, spans), strict=True))
        taken: list[tuple[int, str]] = []
        for version in sorted(doubtful, key=self._seen.place):  # flat trees were written last, wherever they stood
            if self._judge(versions, version, found[version]):
                taken.append((version, found[version][0].tree_id))
        for version, tree_id in taken:
            if rows := versions.placed(tree_id, version):
                placed[version] = rows
        left = self._messages.rows - sum(map(len, spans)) + sum(map(len, placed.values()))
        self._out = self._seen.versions - len(doubtful) + len(placed), left
        if left < self._messages.rows:
            moves = [(span, placed.get(version, [])) for version, span in zip(doubtful, spans, strict=True)]
            rearrange(self._path, moves, _writer, GROUP)

    def _judge(self, versions: Versions, version: int, rows: list[Row]) -> bool:
        """Judge a version, and put it in the books; False if it is rejected."""
        from tasks.oasst.reader import Bad
        from tasks.oasst.validators import Fault

        place, books = self._seen.place(version), self._books
        try:
            verdict = versions.judge(version, place.file, rows)
        except Fault as fault:
            self._reject(Bad(place, fault.code, fault.message, rows[0].tree_id, 1, len(rows)))
            return False
        if verdict.repeats:
            books.update(trees_repeated=1, messages_repeated=len(rows))
        elif verdict.replaces is not None:
            books.update(messages_repeated=verdict.same, conflicts=verdict.differ)
            self._replace(self._seen.place(verdict.replaces), place, rows[0].tree_id, verdict)
        for robbed in verdict.robbed:
            self._rob(robbed, place, rows[0].tree_id)
        return True

    def _rob(self, robbed: Robbed, later: Place, tree_id: str) -> None:
        """Put in the books what a tree of an earlier file lost to one of a later file."""
        from tasks.oasst.reader import Bad
        from tasks.oasst.validators import shown

        trees, messages = int(robbed.empty), robbed.moved + robbed.lost
        self._books.update(conflicts=robbed.moved, messages_replaced=messages, messages_rejected=messages)
        self._books.update(trees_rejected=trees, trees_replaced=trees)
        said = f"{robbed.moved} messages of this tree are in tree {shown(tree_id)} of {self._named_place(later)}"
        said += f", {robbed.lost} lost what they reply to" if robbed.lost else ""
        self._list(Bad(self._seen.place(robbed.version), "tree.replaced", said, robbed.tree_id, trees, messages))

    def _named_place(self, place: Place) -> str:
        return f"{self._files[place.file].name}:{place.line}"

    def _replace(self, earlier: Place, later: Place, tree_id: str, verdict: Verdict) -> None:
        from tasks.oasst.reader import Bad

        if not verdict.differ + verdict.lost:  # the later version only adds to it
            self._books.update(trees_repeated=1)
            return
        messages = verdict.differ + verdict.lost
        self._books.update(trees_rejected=1, trees_replaced=1, messages_replaced=messages, messages_rejected=messages)
        ahead, behind = map(self._named_place, (earlier, later))
        said = f"another version of this tree came later, in {behind}: {verdict.differ} messages differ there"
        said += f", {verdict.lost} lost what they reply to" if verdict.lost else ""
        self._list(Bad(earlier, "tree.replaced", said, tree_id, 1, messages))
        said = f"this version was taken; the one in {ahead} differs"
        self._list(Bad(later, "tree.replaces", said, tree_id, 0, 0))

    def _list(self, bad: Bad) -> None:
        if bad.raw is None:
            self._late.setdefault(bad.place, []).append(bad)
        else:
            self._rejected.add(_rejected_row(self._files[bad.place.file].name, bad, bad.raw))

    def finish(self, dump: Dump) -> None:
        """Find the lines of late rejections."""
        for place, raw in dump.recall(self._late):
            for bad in self._late[place]:
                self._rejected.add(_rejected_row(self._files[place.file].name, bad, raw))

    def refuse_if_bad(self, most: float, dump: Dump) -> None:
        """Fail if too much could not be used; versions that were replaced are no fault.

        Raises:
            InputError: Naming the first bad lines.
        """
        books = self._books
        bad = books["trees_rejected"] - books["trees_replaced"]
        parts = [(bad, books["trees_in"], "trees"), (dump.unreadable, dump.lines, "lines")]
        found, total, what = max(parts, key=lambda part: part[0] / max(part[1], 1))
        if found > most * total:
            raise InputError(
                f"{found:,} of {total:,} {what} cannot be used ({found / total:.1%}, at most {most:.1%} may be bad)",
                "; ".join(self._named),
                self._do,
                "input.bad",
            )

    def counts(self, dump: Dump, unknown: Counter[str]) -> Counts:
        """Return what was measured, the books balanced: in = out + rejected + repeated.

        A message in a line that could not be read is not counted at all: nobody knows how many there were.
        """
        books = self._books
        trees, messages = self._out or (0, 0)
        for unit, out in (("trees", trees), ("messages", messages)):
            if books[f"{unit}_in"] != out + books[f"{unit}_rejected"] + books[f"{unit}_repeated"]:
                raise TreelineError(f"parse lost count of {unit}: {out} out, {dict(books)}", code="parse.books")
        return {
            "trees": trees,
            "messages": messages,
            "rejected": self._rejected.rows,  # rows of rejected.parquet
            **{f"{unit}_{way}": books[f"{unit}_{way}"] for unit in ("trees", "messages") for way in WAYS},
            "trees_replaced": books["trees_replaced"],  # of the rejected: versions that came again, changed
            "messages_replaced": books["messages_replaced"],
            "bad": books["bad"],  # rows of rejected.parquet, but for versions that came again, changed
            "conflicts": books["conflicts"],  # messages of which a later version says something else
            "lines": dump.lines,
            "bytes": dump.bytes,
            "unknown_fields": dict(unknown.most_common()),
        }


def _rejected_row(file: str, bad: Bad, raw: bytes) -> tuple[Any, ...]:
    head = ascii(raw[:HEAD].decode("utf-8", "backslashreplace"))[1:-1]
    place = bad.place
    digest = sha256(raw).hexdigest()
    return file, place.line, place.offset, bad.code, bad.message, digest, head, bad.tree_id, bad.trees, bad.messages


def _writer(path: Path) -> TableWriter:
    return parquet_writer(path, MESSAGE_COLUMNS, FAST, MESSAGE_DISTINCT)
