"""Rows of untrusted Parquet files as Python values, within limits and whatever types the columns have.

A few bytes can stand for a terabyte: a text is stored once and named a million times. So texts are read as names of
their dictionary, in lists and structs, too; what they unpack to is counted before it is unpacked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.errors import InputError
from tasks.oasst.advice import as_messages, listed
from tasks.oasst.jsonl import RATIO_COUNTS_FROM, Limits

PARQUET = b"PAR1"
BATCH = 1_000  # rows read at a time
TOGETHER = 16 << 20  # unpacked bytes turned into Python objects at a time, if there is more than one row
NEEDED = ("message_id", "text", "role")  # columns that a flat table must have


def is_parquet(path: Path) -> bool:
    """Tell a Parquet file by its first bytes."""
    with path.open("rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def parquet_rows(
    path: Path, forms: Collection[str] = (), limits: Limits | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a flat Parquet file, or of one that has a column of `forms`, numbered from 1.

    Raises:
        InputError: If the file is corrupt, empty, over a limit or lacks a column.
    """
    number = 0
    try:
        for piece in _pieces(path, forms, limits or Limits()):
            names, columns = piece.schema.names, [_values(column) for column in piece.columns]
            for row in zip(*columns, strict=True):
                number += 1
                yield number, dict(zip(names, row, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path.name} is not a whole Parquet file ({error})", f"Seen after {number:,} rows",
            "Copy or download it again", "parquet.corrupt",
        ) from error  # fmt: skip
    if not number:
        raise InputError(f"{path.name} has no rows", code="input.empty")


def _pieces(path: Path, forms: Collection[str], limits: Limits) -> Iterator[pa.RecordBatch]:
    """Yield the rows in pieces that are small once they are unpacked."""
    with pq.ParquetFile(path) as file:
        _refuse_other(path, file.schema_arrow.names, forms)
        _limit_ratio(path, _claimed(file.metadata), limits)
        names = _of_texts(file.schema)
    unpacked = 0
    with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=names) as file:
        for group in range(file.num_row_groups):  # one by one: each has dictionaries of its own, and lists mix none
            for batch in file.iter_batches(BATCH, row_groups=[group]):
                unpacked += _unpacked(batch)
                _limit_ratio(path, unpacked, limits)
                yield from _halved(path, batch, limits)


def _refuse_other(path: Path, names: list[str], forms: Collection[str]) -> None:
    missing = [name for name in NEEDED if name not in names]
    if missing and not any(key in names for key in forms):
        others = "".join(f"`{key}`, or " for key in forms)
        what = f"{path.name} has the columns {listed(names)}; expected {others}{', '.join(NEEDED)}"
        raise InputError(what, hint=as_messages(names, table=True), code="parquet.schema")


def _claimed(about: pq.FileMetaData) -> int:
    """Return the bytes, or else the values, that the file says to hold, as it stores them."""
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(max(chunk.total_uncompressed_size, chunk.num_values) for chunk in chunks)


def _limit_ratio(path: Path, unpacked: int, limits: Limits) -> None:
    if unpacked > RATIO_COUNTS_FROM and unpacked > limits.ratio * path.stat().st_size:
        raise InputError(
            f"{path.name} unpacks to more than {limits.ratio:,.0f} times its size",
            hint="If you trust the file, raise parse.max_ratio",
            code="parquet.ratio",
        )


def _of_texts(schema: pq.ParquetSchema) -> list[str]:
    """Return the paths of columns of texts and bytes."""
    columns = [schema.column(number) for number in range(len(schema))]
    return [
        column.path
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type != "DECIMAL"
    ]


def _halved(path: Path, batch: pa.RecordBatch, limits: Limits) -> Iterator[pa.RecordBatch]:
    size, half = _unpacked(batch), len(batch) // 2
    if size <= TOGETHER or not half:
        if size > max(limits.line, TOGETHER):
            what = f"{path.name} has a row of more than {limits.line:,} bytes"
            raise InputError(what, hint="Raise parse.max_line_mb", code="line.too_long")
        yield batch
    else:
        yield from _halved(path, batch[:half], limits)
        yield from _halved(path, batch[half:], limits)


def _unpacked(found: pa.RecordBatch | pa.Array) -> int:
    """Return about how many bytes a batch or a column takes when each text stands where it is named."""
    if isinstance(found, pa.RecordBatch):
        return sum(map(_unpacked, found.columns))
    if isinstance(found, pa.DictionaryArray):
        sizes = pc.take(pc.binary_length(found.dictionary), found.indices)
        return len(found) + (pc.sum(sizes).as_py() or 0)
    if isinstance(found, pa.StructArray):
        return len(found) + sum(map(_unpacked, found.flatten()))
    if isinstance(found, pa.MapArray):
        held = slice(found.offsets[0].as_py(), found.offsets[-1].as_py())
        return len(found) + _unpacked(found.keys[held]) + _unpacked(found.items[held])
    if isinstance(found, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return len(found) + _unpacked(found.flatten())
    return len(found) + int(found.nbytes)


def _values(column: pa.Array) -> list[Any]:
    """Return a column as Python values, the same whether pandas is there or not."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if "[ns" not in str(column.type):
        try:
            values: list[Any] = column.to_pylist()
            return values
        except (ValueError, ArithmeticError, LookupError):  # a date of the year 11476, an unknown zone, no UTF-8
            pass
    return [_value(one) for one in column]


def _value(one: pa.Scalar) -> Any:
    """Return a value; what Python has no form for as text, what is no UTF-8 as bytes."""
    if not one.is_valid:
        return None
    if isinstance(one, pa.DictionaryScalar):
        return _value(one.value)
    if isinstance(one, pa.StructScalar):
        return {name: _value(part) for name, part in one.items()}
    if isinstance(one, pa.MapScalar):
        return [(_value(entry["key"]), _value(entry["value"])) for entry in one.values]
    if isinstance(one, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return [_value(part) for part in one.values]
    try:
        return (one.cast(_in_us(one.type), safe=False) if getattr(one.type, "unit", "") == "ns" else one).as_py()
    except UnicodeDecodeError:
        return one.as_buffer().to_pybytes()
    except (ValueError, ArithmeticError, LookupError):
        return f"{one.value} {one.type}"


def _in_us(kind: pa.DataType) -> pa.DataType:
    """Return a type of microseconds for one of nanoseconds, which Python does not count."""
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")
