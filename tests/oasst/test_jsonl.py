"""Lines: what a stream may hold, and how each of its faults is named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.errors import InputError
from tasks.oasst.jsonl import Limits, Line, Lines

ROWS = b"".join(b'{"n": %d}\n' % n for n in range(1_000))
PACKED = gzip.compress(ROWS, mtime=0)


def read(folder: Path, content: bytes, limits: Limits | None = None) -> list[Line]:
    path = folder / "trees.jsonl.gz"
    path.write_bytes(content)
    return list(Lines(path, limits))


def fault(folder: Path, content: bytes, limits: Limits | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        read(folder, content, limits)
    return caught.value


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place:][1:]


def test_a_gzip_file_and_its_plain_content_give_the_same_lines_whatever_the_name_says(tmp_path: Path) -> None:
    plain = read(tmp_path, ROWS)
    assert read(tmp_path, PACKED) == plain
    assert [line.raw for line in plain] == ROWS.splitlines()


def test_a_line_says_its_number_and_where_it_starts(tmp_path: Path) -> None:
    lines = read(tmp_path, b"\xef\xbb\xbfab\r\n\n  \ncd")
    assert lines == [Line(1, 3, b"ab\r"), Line(4, 11, b"cd")]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    text = "a\u2028b\x0b\x0c\x85\rc".encode()
    assert [line.raw for line in read(tmp_path, text + b"\nd\n")] == [text, b"d"]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.booleans())
def test_lines_are_the_pieces_between_newlines(tmp_path: Path, content: bytes, packed: bool) -> None:
    content = b"{}\n" + content
    pieces = [piece for piece in content.split(b"\n") if piece.strip(b" \t\r")]
    assert [line.raw for line in read(tmp_path, gzip.compress(content) if packed else content)] == pieces


def test_long_lines_over_many_chunks_come_whole(tmp_path: Path) -> None:
    long = b"x" * 3_000_000
    for content in (long + b"\n" + long, gzip.compress(long + b"\n" + long, 1)):
        assert [line.raw for line in read(tmp_path, content)] == [long, long]


@pytest.mark.parametrize("padding", [b"", b"\0", b"\0" * 100_000])
def test_members_follow_each_other_and_zeros_are_padding(tmp_path: Path, padding: bytes) -> None:
    content = PACKED + padding + PACKED + padding
    assert len(read(tmp_path, content)) == 2_000


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (PACKED[:2], "gzip.truncated"),
        (PACKED[:5], "gzip.truncated"),
        (PACKED[: len(PACKED) // 2], "gzip.truncated"),
        (PACKED[:-8], "gzip.truncated"),
        (PACKED[:-1], "gzip.truncated"),
        (PACKED + PACKED[:-1], "gzip.truncated"),
        (flipped(PACKED, -5), "gzip.corrupt"),  # CRC
        (flipped(PACKED, -4), "gzip.corrupt"),  # size
        (PACKED + b"garbage", "gzip.corrupt"),
        (b"\x1f\x8b\x07" + PACKED[3:], "gzip.corrupt"),
        (gzip.compress(PACKED, mtime=0), "gzip.nested"),
        (b"", "input.empty"),
        (gzip.compress(b"", mtime=0), "input.empty"),
        (b"\n \r\n\n", "input.empty"),
        (b"\xef\xbb\xbf", "input.empty"),
        ('{"a": 1}\n'.encode("utf-16"), "input.utf16"),
        ('{"a": 1}\n'.encode("utf-16-le"), "input.utf16"),
        ('{"a": 1}\n'.encode("utf-16-be"), "input.utf16"),
        (gzip.compress('{"a": 1}\n'.encode("utf-16"), mtime=0), "input.utf16"),
    ],
)
def test_a_fault_of_the_stream_is_an_error_with_its_own_code(tmp_path: Path, content: bytes, code: str) -> None:
    assert fault(tmp_path, content).code == code


def archive(kind: str) -> bytes:
    """Return some rows in an archive or another packing."""
    made = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(made, "w") as packed:
            packed.writestr("rows.jsonl", ROWS)
    elif kind in ("ustar", "pax", "gnu"):
        form = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}[kind]
        with tarfile.open(fileobj=made, mode="w", format=form) as rolled:
            entry = tarfile.TarInfo("rows.jsonl")
            entry.size = len(ROWS)
            rolled.addfile(entry, io.BytesIO(ROWS))
    elif kind in ("file", "stream"):
        table = pa.table({"messages": ["x"]})
        writer = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with writer(made, table.schema) as arrow:
            arrow.write_table(table)
    elif kind == "zstd":
        return bytes(pa.compress(ROWS, codec="zstd", asbytes=True))
    else:
        return bz2.compress(ROWS) if kind == "bz2" else lzma.compress(ROWS)
    return made.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("zip", "is a zip archive.*unzip"),
        ("ustar", "is a tar archive.*tar xf"),
        ("pax", "is a tar archive.*tar xf"),
        ("gnu", "is a tar archive.*tar xf"),
        ("file", r"is an Arrow \(Feather\) file.*read_ipc"),
        ("stream", "is a stream of Arrow.*read_ipc_stream"),
        ("zstd", "is compressed by zstd.*unzstd"),
        ("bz2", "is compressed by bzip2.*bunzip2"),
        ("xz", "is compressed by xz.*unxz"),
    ],
)
def test_an_archive_is_named_by_its_bytes_and_what_to_do_is_said(
    tmp_path: Path, kind: str, words: str, packed: bool
) -> None:
    content = archive(kind)
    with pytest.raises(InputError, match=words) as caught:
        read(tmp_path, gzip.compress(content) if packed else content)
    assert caught.value.code == "input.kind"


def test_no_flipped_bit_of_the_packed_bytes_goes_unseen(tmp_path: Path) -> None:
    for place in range(10, len(PACKED), 97):  # after the header, whose time and system stand for nothing
        assert fault(tmp_path, flipped(PACKED, place)).code.startswith("gzip.")


def test_an_error_says_the_file_the_rows_and_the_byte(tmp_path: Path) -> None:
    packed = zlib.compressobj(wbits=31)
    cut = packed.compress(ROWS) + packed.flush(zlib.Z_SYNC_FLUSH)
    said = str(fault(tmp_path, cut))
    assert "trees.jsonl.gz" in said
    assert "after 1,000 rows" in said
    assert f"byte {len(cut):,}" in said


def test_a_line_over_the_limit_ends_the_reading(tmp_path: Path) -> None:
    limits = Limits(line=10)
    assert len(read(tmp_path, b"x" * 10 + b"\nab\n", limits)) == 2
    assert fault(tmp_path, b"ab\n" + b"x" * 11 + b"\n", limits).code == "line.too_long"
    assert fault(tmp_path, b"x" * 3_000_000, limits).code == "line.too_long"


def test_a_bomb_is_stopped_by_its_ratio_before_it_fills_the_memory(tmp_path: Path) -> None:
    packed = zlib.compressobj(9, wbits=31)
    zeros = b"0" * (1 << 20)
    bomb = b"".join(packed.compress(zeros) for _ in range(100)) + packed.flush()
    tracemalloc.start()
    assert fault(tmp_path, bomb).code == "gzip.ratio"
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "limits", "setting"),
    [
        (b"x" * 11, Limits(line=10), "parse.max_line_mb"),
        (gzip.compress(b"0" * (20 << 20)), Limits(), "parse.max_ratio"),
    ],
)
def test_over_a_limit_the_setting_that_raises_it_is_named(
    tmp_path: Path, content: bytes, limits: Limits, setting: str
) -> None:
    assert setting in fault(tmp_path, content, limits).hint


def test_an_empty_file_may_be_a_local_one(tmp_path: Path) -> None:
    assert fault(tmp_path, b"").hint.startswith("Name another file, or copy")


def test_progress_adds_up_to_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl.gz"
    path.write_bytes(PACKED)
    told: list[float] = []
    lines = Lines(path, advance=told.append)
    assert len(list(lines)) == lines.rows == 1_000
    assert sum(told) == len(PACKED)
    assert lines.bytes == len(ROWS)
