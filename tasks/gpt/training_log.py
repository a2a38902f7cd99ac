"""The log of a training run: one JSON object a line, cut back where a resumed run takes over."""

from __future__ import annotations

import json
import math
import os
from itertools import takewhile
from pathlib import Path
from typing import Any

from tasks.jsonfile import parse_json


class Logbook:
    """`log.jsonl`: one JSON object a line, in the order of the steps; only rank 0 of many ranks writes it."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def write(self, entry: dict[str, Any]) -> None:
        """Add an entry."""
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(entry, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Make sure that what was written outlives the machine."""
        if not self.writes:
            return
        with self.path.open("rb") as opened:
            os.fsync(opened.fileno())

    def cut_after(self, step: int) -> None:
        """Drop the entries of steps that a resumed run will do again, and what a kill or the disk spoilt after them."""
        if not self.writes:
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        remaining = "".join(f"{line}\n" for line in takewhile(lambda line: _step(line) <= step, lines))
        draft = self.path.with_name(f".{self.path.name}")
        with draft.open("w", encoding="utf-8") as opened:
            opened.write(remaining)
            opened.flush()
            os.fsync(opened.fileno())
        draft.replace(self.path)


def _step(line: str) -> float:
    """Return the step of an entry; of a line that is none, one that is never reached."""
    try:
        return float(parse_json(line.encode())["step"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return math.inf
