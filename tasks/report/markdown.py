"""Markdown that strangers' texts cannot get out of.

A model says anything, and a prompt is anybody's text: both stand only in fenced blocks, where neither HTML nor links
nor tables are read, and whatever does not print is spelled out: a terminal obeys it no more than a browser does.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

WIDTH = 100  # columns of a fenced block


def fenced(text: str) -> str:
    """Return text as a Markdown code block that it cannot get out of."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def printable(text: str) -> str:
    r"""Return text with everything but line ends that does not print spelled out: an escape becomes `\x1b`."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def entry(lines: Sequence[tuple[str, str]]) -> str:
    """Lay labelled texts out in two columns, the second wrapped."""
    margin = 2 + max(len(label) for label, _ in lines)
    return "\n".join(_hung(label, printable(text), margin) for label, text in lines)


def _hung(label: str, text: str, margin: int) -> str:
    lines = text.split("\n")
    rows = [row for line in lines for row in textwrap.wrap(line, WIDTH - margin, break_on_hyphens=False) or [""]]
    return "\n".join(f"{label if at == 0 else '':<{margin}}{row}".rstrip() for at, row in enumerate(rows))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up as plain text, too: words to the left, numbers to the right."""
    widths = [max(3, *(len(row[column]) for row in (head, *rows))) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def code(text: str) -> str:
    r"""Return text as a code span of one line; it cannot get out of it, nor out of the cell of a table (`\x7c`).

    Escapes and character references would not do: many pages link addresses by themselves, and look for them last.
    """
    line = " ".join(printable(text).split()).replace("|", r"\x7c")
    mark = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    room = " " if "`" in line else ""
    return f"{mark}{room}{line}{room}{mark}" if line else ""


def inline_name(text: str) -> str:
    """Return a name as it may stand outside a fence: plain words as they are, and all else as code."""
    return text if re.fullmatch(r"[^\W_]+([ _-][^\W_]+)*", text) else code(text)
