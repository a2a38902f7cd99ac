"""Trees to be remembered: what a line becomes in the table of messages, a pure function of the line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from tasks.oasst.fast_reader import Arranged, read
from tasks.oasst.tables import PIECE, arrays

TOGETHER = 32  # lines read at a time: their objects stay in a cache


def rows_of(raws: Sequence[bytes | memoryview], max_text: int, schema: pa.Schema) -> pa.RecordBatch:
    """Read good nested trees.

    Args:
        raws: N lines.
        max_text: Bytes of UTF-8 that a text may have.
        schema: Of the table of messages.

    Returns:
        (N,) `messages`: a list of structs, of the columns of the table; null where the careful reader must look.
    """
    sizes = np.zeros(len(raws), np.int64)
    kind = pa.struct(list(schema))
    pieces = [pa.array([], kind), *_pieces(raws, max_text, schema, sizes)]
    ends = np.append(0, np.cumsum(sizes)).astype(np.int32)
    offsets = pa.array(ends, mask=np.append(sizes == 0, False))
    lists = pa.ListArray.from_arrays(offsets, pa.concat_arrays(pieces))
    return pa.record_batch({"messages": lists})


def _pieces(
    raws: Sequence[bytes | memoryview], max_text: int, schema: pa.Schema, sizes: np.ndarray
) -> Iterator[pa.StructArray]:
    """Yield messages, some `PIECE` at a time, and note how many each line has."""
    waiting = Arranged([], [], [], {})
    for first in range(0, len(raws), TOGETHER):
        for place, found in enumerate(read(raws[first : first + TOGETHER], max_text), first):
            if found:
                sizes[place] = len(found[1].messages)
                waiting.append(found[1])
        if len(waiting.messages) >= PIECE:
            yield _struct(waiting, schema)
            waiting = Arranged([], [], [], {})
    if waiting.messages:
        yield _struct(waiting, schema)


def _struct(found: Arranged, schema: pa.Schema) -> pa.StructArray:
    return pa.StructArray.from_arrays(arrays(found, schema.types), fields=list(schema))
