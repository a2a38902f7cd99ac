"""Trees: the part of parsing that remembers what a line became, so that new data costs only its new lines.

No step, but the parse step's own: it stands between the nouns, which read lines, and `rows`, which remembers.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from tasks.oasst.again import rows_of
from tasks.oasst.laid import trees_in
from tasks.remembered import Remembered
from tasks.rows import is_remembering, per_name

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.oasst.laid import Laid
    from tasks.oasst.reader import Quick


LEAST = 0.01  # of some 900 trees, 8 MB, that are remembered together: to read them takes as long as to parse 10


def remembering(trees: Remembered, max_text: int, schema: pa.Schema) -> Quick | None:
    """Return what reads only the lines that were never read; None where nothing is remembered.

    Args:
        trees: The function as it is declared.
        max_text: Bytes of UTF-8 that a text may have.
        schema: Of the table of messages.
    """
    function = trees.named({"max_text": max_text, "columns": [f"{one.name} {one.type}" for one in schema]}, LEAST)

    def quick(raws: Sequence[bytes | memoryview]) -> list[tuple[str, Laid] | None]:
        names = np.frombuffer(b"".join(sha256(raw).digest() for raw in raws), np.uint64).reshape(-1, 4)
        found = per_name(function, names, lambda places: rows_of([raws[place] for place in places], max_text, schema))
        return trees_in(found.column("messages"))

    return quick if is_remembering() else None
