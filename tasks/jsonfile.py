"""JSON from a disk: read within bounds, so that no file takes more than its size, or ends in an odd error."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from pydantic_core import from_json

MOST = 16 << 20  # bytes of a file; ours are far smaller


def parse_json(content: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If it is none, is nested more than 200 deep, or has a number of more than 4,300 digits.
    """
    return from_json(content, allow_inf_nan=False)


def read_json(path: Path, most: int = MOST) -> Any:
    """Return the value of a JSON file.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no regular file, is too large, or is not JSON as `parse_json` takes it.
    """
    # Without waiting: to open a named pipe would last until somebody writes to it.
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return parse_json(content)
