"""Again: lines -> the rows of their trees, to be remembered."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa

from tasks.artifacts import MESSAGE_COLUMNS, arrow_schema
from tasks.oasst.again import rows_of
from tasks.oasst.fast_reader import read
from tasks.oasst.laid import trees_in
from tasks.oasst.tables import arrays
from tasks.sample.dataset import sample_bytes

SCHEMA, MAX_TEXT = arrow_schema(MESSAGE_COLUMNS), 1 << 20
LINES = gzip.decompress(sample_bytes()).splitlines()[:200]


def test_the_rows_of_a_line_depend_on_no_other_line() -> None:
    lines = [*LINES, b"no tree", json.dumps({"prompt": {"message_id": "a", "text": "", "role": "prompter"}}).encode()]
    alone = pa.concat_batches([rows_of([line], MAX_TEXT, SCHEMA) for line in lines])
    assert rows_of(lines, MAX_TEXT, SCHEMA).equals(alone)
    assert rows_of([], MAX_TEXT, SCHEMA).schema == alone.schema
    assert alone.column("messages").null_count == 1


def test_what_is_taken_from_rows_is_what_the_reader_gives_wherever_the_rows_begin() -> None:
    lines = [b"{}", *LINES[:40], b"no tree", *LINES[40:60]]
    rows = rows_of(lines, MAX_TEXT, SCHEMA).column("messages")
    for first in (0, 1, 7, 41, 50):
        for found, line in zip(trees_in(rows[first:]), lines[first:], strict=True):
            (expected,) = read([line], MAX_TEXT)
            if not expected or not found:
                assert (found, expected) == (None, None)
                continue
            (tree, laid), (name, arranged) = found, expected
            assert (tree, laid.ids, laid.last - laid.first) == (name, arranged.ids, len(arranged.messages))
            assert all(map(pa.Array.equals, laid.columns(), arrays(arranged, SCHEMA.types)))


def test_trees_are_joined_only_where_one_ends_and_the_other_begins() -> None:
    (_, one), (_, two), (_, three) = filter(None, trees_in(rows_of(LINES[:3], MAX_TEXT, SCHEMA).column("messages")))
    joined = one.followed_by(two)
    assert joined
    assert (joined.first, joined.last) == (one.first, two.last)
    assert joined.followed_by(three)
    assert one.followed_by(three) is None
    ((_, other),) = filter(None, trees_in(rows_of(LINES[1:2], MAX_TEXT, SCHEMA).column("messages")))
    assert one.followed_by(other._replace(first=one.last)) is None
