"""Parquet: rows of any columns, and no file that takes more than it is worth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.errors import InputError
from tasks.oasst.jsonl import Limits
from tasks.oasst.parquet_rows import parquet_rows
from tasks.oasst.validators import as_json
from tests.memory import taken

MB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TEXT = "x" * 900_000


def named(count: int) -> pa.Array:
    """Return a text that is stored once and stands many times."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([TEXT]))


def flat(path: Path) -> None:
    count = 3_000
    ids = [str(number) for number in range(count)]
    columns = {"message_id": ids, "text": named(count), "role": ["prompter"] * count}
    pq.write_table(pa.table(columns), path, compression="zstd")


def chats(path: Path, each: int = 1) -> None:
    count = 3_000
    turns = pa.StructArray.from_arrays([named(count), pa.array(["user"] * count)], ["content", "role"])
    lists = pa.ListArray.from_arrays(pa.array(range(0, count + 1, each), pa.int32()), turns)
    pq.write_table(pa.table({"messages": lists}), path, compression="zstd")


def one_row(path: Path) -> None:
    chats(path, each=3_000)


def plain(path: Path) -> None:
    columns = {"message_id": ["a"] * 3_000, "text": [TEXT] * 3_000, "role": ["prompter"] * 3_000}
    pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=False)


def numbers(path: Path) -> None:
    lists = pa.ListArray.from_arrays(pa.array([0, 50_000_000], pa.int32()), pa.array([7] * 50_000_000, pa.int8()))
    pq.write_table(pa.table({"messages": lists}), path, compression="zstd")


def read(path: Path) -> str:
    """Read a file, and return the code of its error."""
    try:
        for _ in parquet_rows(path, ["messages"]):
            pass
    except InputError as error:
        return error.code
    return "none"


@linux
@pytest.mark.parametrize("write", [flat, chats, one_row, plain, numbers])
def test_a_bomb_is_stopped_before_it_fills_the_memory(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "bomb.parquet"
    write(path)
    assert path.stat().st_size < MB
    code, took = taken(read, path)
    assert code == "parquet.ratio"
    assert took < 200 * MB


def test_a_file_that_is_trusted_is_read_in_little_memory(tmp_path: Path) -> None:
    flat(tmp_path / "bomb.parquet")
    rows = parquet_rows(tmp_path / "bomb.parquet", limits=Limits(ratio=1e9))
    assert [next(rows)[1]["text"] == TEXT for _ in range(100)] == [True] * 100


def test_a_row_over_the_limit_ends_the_reading(tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": [["x" * 20 * MB]]}), tmp_path / "a.parquet", compression="none")
    with pytest.raises(InputError, match=r"line.too_long.*max_line_mb"):
        list(parquet_rows(tmp_path / "a.parquet", ["messages"], Limits(line=MB)))


def values(tmp_path: Path, column: pa.Array, **options: Any) -> list[Any]:
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet", **options)
    return [row["messages"] for _, row in parquet_rows(tmp_path / "a.parquet", ["messages"])]


SECOND = 10**9
ODD: list[tuple[pa.Array, list[Any]]] = [
    (pa.array([SECOND + 1, None], pa.timestamp("ns")), [datetime(1970, 1, 1, 0, 0, 1), None]),
    (pa.array([SECOND + 1], pa.timestamp("ns", "UTC")), [datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)]),
    (pa.array([300 * SECOND], pa.timestamp("ms")), [datetime(1979, 7, 5, 5, 20)]),
    (pa.array([300_000 * SECOND, 0], pa.timestamp("ms")), ["300000000000000 timestamp[ms]", datetime(1970, 1, 1)]),
    (pa.array([0], pa.timestamp("us", "Mars/Base")), ["0 timestamp[us, tz=Mars/Base]"]),
    (pa.array([1_001], pa.duration("ns")), [timedelta(microseconds=1)]),
    (pa.array([2**60], pa.duration("s")), [f"{2**60} duration[s]"]),
    (pa.array([1_001], pa.time64("ns")), [time(0, 0, 0, 1)]),
    (pa.array([1], pa.date32()), [date(1970, 1, 2)]),
    (pa.array([10**8], pa.date32()), ["100000000 date32[day]"]),
    (pa.array([Decimal("1.10")], pa.decimal128(5, 2)), [Decimal("1.10")]),
    (pa.array([b"\0\xff"]), [b"\0\xff"]),
    (pa.array([b"\xff", b"good"]).view(pa.string()), [b"\xff", "good"]),
    (pa.array([[{"at": SECOND + 1}], None], pa.list_(pa.struct({"at": pa.timestamp("ns")}))),
     [[{"at": datetime(1970, 1, 1, 0, 0, 1)}], None]),
    (pa.array([[("a", 1_001)]], pa.map_(pa.string(), pa.duration("ns"))), [[("a", timedelta(microseconds=1))]]),
]  # fmt: skip


@pytest.mark.parametrize(("column", "expected"), ODD, ids=[str(column.type) for column, _ in ODD])
def test_a_column_of_any_type_is_read_and_written_as_json(
    tmp_path: Path, column: pa.Array, expected: list[Any]
) -> None:
    found = values(tmp_path, column)
    assert found == expected
    assert [as_json({"side": value}) for value in found]


def test_what_json_has_no_form_for_is_kept_as_text() -> None:
    kept = {"price": Decimal("1.10"), "raw": b"\0\xff", "took": timedelta(seconds=1.5)}
    assert as_json(kept) == '{"price":"1.10","raw":"AP8=","took":1.5}'


@pytest.mark.parametrize("group", [7, 1_000])
def test_rows_come_as_arrow_itself_reads_them(tmp_path: Path, group: int) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n % 13}" * n}] * (n % 3) or None, "source": None if n % 5 else "x"}
        for n in range(300)
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group, dictionary_pagesize_limit=1_000)
    assert list(parquet_rows(path, ["messages"])) == list(enumerate(rows, 1))
