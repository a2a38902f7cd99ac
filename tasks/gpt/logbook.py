"""The log of a training run: one JSON object a line, cut back where a resumed run takes over."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Logbook:
    """`log.jsonl`: one JSON object a line, in the order of the steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, entry: dict[str, Any]) -> None:
        """Add an entry."""
        with self.path.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(entry, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Make sure that what was written outlives the machine."""
        with self.path.open("rb") as opened:
            os.fsync(opened.fileno())

    def cut_after(self, step: int) -> None:
        """Drop the entries of steps that a resumed run will do again, and a line that a kill cut short."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(kept), encoding="utf-8")
