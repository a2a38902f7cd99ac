"""Published files -> trees and faults, one by one: nested trees as JSONL, or flat messages as JSONL or Parquet.

Nested trees stream by. Flat messages of a tree may lie anywhere, so their rows are held in memory until the last file
was read (OASST2's 135,174 messages: about 0.6 GB), and their trees come then, in the order of their first messages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import orjson

from tasks.errors import InputError
from tasks.oasst.advice import as_messages, listed
from tasks.oasst.fast_reader import (
    Arranged,
    Message,
    Rest,
    arrange_flat,
    arranged,
    message_of,
    read,
    read_flat,
    rest_of,
)
from tasks.oasst.jsonl import Limits, Line, Lines
from tasks.oasst.parquet_rows import is_parquet, parquet_rows
from tasks.oasst.strict_reader import TREE, Layout, arrange, flat_tree_id, messages_in
from tasks.oasst.validators import Fault, as_json, wrong

Form = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # a row of another dataset -> a nested tree; may raise Fault

TOGETHER = 1 << 18  # bytes of lines that are looked at together: some 15 trees, whose objects stay in a cache
ALONE = 1_000  # flat messages that are looked at together


class Place(NamedTuple):
    """Where something was published: index of the file, line (or Parquet row) from 1, byte offset (-1: Parquet)."""

    file: int
    line: int
    offset: int


class Found(NamedTuple):
    """A tree that can be taken: its messages, and how many were left out: exact repeats, and those changed later on."""

    place: Place
    tree_id: str
    content: Arranged
    repeats: int = 0
    conflicts: int = 0


class Bad(NamedTuple):
    """A line or a tree that cannot be taken.

    Attributes:
        place: Where.
        code: A dotted name for machines.
        message: Expected and found, in words.
        tree_id: The tree, where known.
        trees: Trees lost with it.
        messages: Messages lost with it, as far as they could be counted.
        raw: The line; None: `Dump.recall` finds it.
        do: What makes it one that can be taken, where that is known.
    """

    place: Place
    code: str
    message: str
    tree_id: str | None
    trees: int
    messages: int
    raw: bytes | None = None
    hint: str = ""


@dataclass
class _Group:
    """The messages of one tree of a flat dump."""

    tree_id: str
    place: Place
    kept: list[Message] = field(default_factory=list)
    rest: dict[int, Rest] = field(default_factory=dict)  # what few of them have, by place in `kept`
    files: list[int] = field(default_factory=list)  # of each
    messages: int = 0
    fault: tuple[Place, Fault] | None = None

    def keep(self, message: Message, rest: Rest | None, file: int) -> None:
        """Keep a message; the ids are kept once, however often they are named."""
        message.message_tree_id, message.message_id = self.tree_id, intern(message.message_id)
        message.parent_id = message.parent_id and intern(message.parent_id)
        if rest:
            self.rest[len(self.kept)] = rest
        self.kept.append(message)
        self.files.append(file)


class Dump:
    """The trees of some files, nested or flat.

    Attributes:
        bytes: Decompressed bytes read so far; of Parquet, the file's.
        lines: Lines that are not blank, or Parquet rows, read so far.
        unreadable: Lines so far that no tree is known of.
    """

    def __init__(
        self,
        files: Sequence[Path],
        layout: Layout,
        limits: Limits | None = None,
        advance: Callable[[float], None] = lambda _: None,
        forms: Mapping[str, Form] | None = None,
    ) -> None:
        """Prepare to read `files` in this order; `advance` is told of every byte of them that was read.

        Lines and tables of other datasets are known by a field: `forms` says of it how a row becomes a nested tree.
        """
        self._files, self._layout, self._limits, self._advance = files, layout, limits, advance
        self._forms = forms or {}
        self._groups: dict[str, _Group] = {}
        self.bytes, self.lines, self.unreadable = 0, 0, 0

    def __iter__(self) -> Iterator[Found | Bad]:
        """Yield each tree once it is complete, and each fault.

        Raises:
            InputError: If a file as a whole cannot be read.
        """
        if not self._files:
            raise InputError("there is no file to parse", code="input.empty")
        for index, path in enumerate(self._files):
            yield from self._of_parquet(index, path) if is_parquet(path) else self._of_jsonl(index, path)
        while self._groups:
            yield _gathered(self._groups.pop(next(iter(self._groups))))

    def _of_jsonl(self, index: int, path: Path) -> Iterator[Found | Bad]:
        lines, before = Lines(path, self._limits, self._advance), self.bytes
        flat = False  # so far in this file
        for some in _batches(lines, TOGETHER):
            self.bytes = before + lines.bytes
            left = some if flat else (yield from self._of_trees(index, some))
            flat = flat or left is not None
            for first in range(0, len(left or ()), ALONE):
                yield from self._of_messages(index, (left or [])[first : first + ALONE])
        self.bytes = before + lines.bytes

    def _of_trees(self, index: int, lines: Sequence[Line]) -> Generator[Found | Bad, None, Sequence[Line] | None]:
        """Read lines of nested trees; return those after the first flat message, None if there is none."""
        quick = read([line.raw for line in lines], self._layout.max_text)
        for number, (line, good) in enumerate(zip(lines, quick, strict=True), 1):
            self.lines += 1
            place = Place(index, line.number, line.offset)
            if good:
                yield Found(place, *good, 0)
            elif found := self._carefully(place, bytes(line.raw), flat=False):
                yield found
            else:
                return lines[number:]
        return None

    def _of_messages(self, index: int, lines: Sequence[Line]) -> Iterator[Found | Bad]:
        """Read lines of flat messages."""
        for line, good in zip(lines, read_flat([line.raw for line in lines], self._layout.max_text), strict=True):
            self.lines += 1
            place = Place(index, line.number, line.offset)
            if good and good.message_tree_id:
                group = self._group(good.message_tree_id, place)
                group.keep(good, None, index)
            elif found := self._carefully(place, bytes(line.raw), flat=True):
                yield found

    def _group(self, tree_id: str, place: Place) -> _Group:
        """Return the group of a tree, with one message more."""
        group = self._groups.get(tree_id) or self._groups.setdefault(tree_id, _Group(tree_id, place))
        group.messages += 1
        return group

    def _carefully(self, place: Place, raw: bytes, flat: bool) -> Found | Bad | None:
        """Read a line field by field; None for a flat message that was put to its tree."""
        try:
            value = loads(raw, self._forms)
        except Fault as fault:
            self.unreadable += 1
            # a published file holds one tree a line; among flat messages nobody knows whose line this was
            return Bad(place, fault.code, fault.message, None, 0 if flat else 1, 0, raw, fault.hint)
        key = next((key for key in self._forms if key in value), None)
        # rows of another dataset may have a `prompt`, too, of their own kind
        if "prompt" in value and not (key and type(value["prompt"]) is not dict and type(value[key]) is list):
            return self._nested(place, value, raw)
        return self._formed(place, value, raw, key) if key else self._gather(place, value, raw)

    def _formed(self, place: Place, row: Mapping[str, Any], raw: bytes | None, key: str) -> Found | Bad:
        """Read a row of another dataset, known by a field."""
        try:
            tree = self._forms[key](row)
        except Fault as fault:
            lost = row[key]
            return Bad(place, fault.code, fault.message, None, 1, len(lost) if type(lost) is list else 0, raw)
        return self._nested(place, tree, raw, foreign=True)

    def _nested(self, place: Place, tree: Mapping[str, Any], raw: bytes | None, foreign: bool = False) -> Found | Bad:
        try:
            rows = self._layout.rows_of(tree, foreign)
            in_order = arrange(rows)
        except Fault as fault:
            tree_id = tree.get("message_tree_id")
            named = tree_id if type(tree_id) is str else None
            hint = as_messages(tree) if fault.code == "schema.prompt" and not foreign else ""
            return Bad(place, fault.code, fault.message, named, 1, messages_in(tree), raw, hint)
        return Found(place, rows[0][TREE], arranged(in_order), len(rows) - len(in_order))

    def _gather(self, place: Place, message: Mapping[str, Any], raw: bytes | None) -> Bad | None:
        """Put a flat message to its tree; one that names no tree is bad by itself."""
        try:
            tree_id = flat_tree_id(message)
        except Fault as fault:
            self.unreadable += 1
            return Bad(place, fault.code, fault.message, None, 0, 1, raw)
        group = self._group(tree_id, place)
        try:
            row = self._layout.row_of(message)
            group.keep(message_of(row), rest_of(row), place.file)
        except Fault as fault:
            group.fault = group.fault or (place, fault)
        return None

    def _of_parquet(self, index: int, path: Path) -> Iterator[Found | Bad]:
        for number, row in parquet_rows(path, self._forms, self._limits):
            self.lines += 1
            place = Place(index, number, -1)
            key = next((key for key in self._forms if key in row), None)
            found = self._formed(place, row, None, key) if key else self._gather(place, row, None)
            if found:
                yield found
        size = path.stat().st_size
        self.bytes += size
        self._advance(size)

    def recall(self, places: Collection[Place]) -> Iterator[tuple[Place, bytes]]:
        """Read the files once more for the lines at some places; of Parquet, the row as JSON. In the dump's order."""
        for index, path in enumerate(self._files):
            wanted = {place for place in places if place.file == index}
            lines = _raw_lines(index, path, self._limits, self._forms) if wanted else iter(())
            while wanted:
                place, raw = next(lines)
                if place in wanted:
                    wanted.discard(place)
                    yield place, raw


def _batches(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    """Yield lines, about so many bytes at a time."""
    some, held = list[Line](), 0
    for line in lines:
        some.append(line)
        held += len(line.raw)
        if held >= size:
            yield some
            some, held = [], 0
    yield some


def _gathered(group: _Group) -> Found | Bad:
    place, fault = group.fault or (group.place, None)
    try:
        if fault:
            raise fault
        kept, rest, conflicts = _latest(group)
        content = arrange_flat(kept, rest)
    except Fault as found:
        return Bad(place, found.code, found.message, group.tree_id, 1, group.messages)
    return Found(place, group.tree_id, content, len(group.kept) - content.size - conflicts, conflicts)


def _latest(group: _Group) -> tuple[list[Message], dict[int, Rest], int]:
    """Return a tree's messages without those that a later file says again, and of how many it says something else."""
    latest = {message.message_id: file for message, file in zip(group.kept, group.files, strict=True)}
    stays = [latest[message.message_id] == file for message, file in zip(group.kept, group.files, strict=True)]
    if all(stays):
        return group.kept, group.rest, 0

    def said(place: int) -> tuple[Message, str | None, str | None]:
        rest = group.rest.get(place)
        return group.kept[place], rest and rest.events, rest and rest.origin

    places = [place for place, stay in enumerate(stays) if stay]
    told = {group.kept[place].message_id: said(place) for place in places}
    earlier = [place for place, stay in enumerate(stays) if not stay]
    conflicts = sum(said(place) != told[group.kept[place].message_id] for place in earlier)
    rest = {new: group.rest[old] for new, old in enumerate(places) if old in group.rest}
    return [group.kept[place] for place in places], rest, conflicts


def loads(raw: bytes, forms: Collection[str] = ()) -> dict[str, Any]:
    """Read one line of JSON that must hold a tree (`prompt`), a message (`message_id`) or a field of `forms`.

    Of a key that stands twice in one object the last is taken; neither this reader nor the quick one sees the first.

    Raises:
        Fault: `utf8.invalid`, `json.depth`, `json.number`, `json.syntax` or `schema.line`.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _unreadable(raw, error) from None
    if type(value) is not dict:
        raise wrong("line", "object", value)
    if "prompt" not in value and "message_id" not in value and not any(key in value for key in forms):
        others = "".join(f" or a row with `{key}`" for key in forms)
        expected = f"expected a tree with `prompt` or a message with `message_id`{others}"
        raise Fault("schema.line", f"{expected}, got {listed(value) or 'no field'}", as_messages(value))
    return value


def _unreadable(raw: bytes, error: orjson.JSONDecodeError) -> Fault:
    try:
        raw.decode()
    except UnicodeDecodeError as invalid:
        return Fault("utf8.invalid", f"column {invalid.start + 1}: {invalid.reason}")
    kinds = {"depth limit": "json.depth", "number is infinity": "json.number"}  # orjson has words, but no codes
    code = next((code for words, code in kinds.items() if words in error.msg), "json.syntax")
    return Fault(code, f"column {error.colno}: {error.msg}")


def _raw_lines(index: int, path: Path, limits: Limits | None, forms: Collection[str]) -> Iterator[tuple[Place, bytes]]:
    if is_parquet(path):
        for number, row in parquet_rows(path, forms, limits):
            yield Place(index, number, -1), (as_json(row) or "").encode()
    else:
        for line in Lines(path, limits):
            yield Place(index, line.number, line.offset), bytes(line.raw)
