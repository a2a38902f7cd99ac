"""Laws of reading JSON: bounded, and only two kinds of errors."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.jsonfile import parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(VALUES)
def test_what_the_standard_library_writes_is_read_to_the_bit(value: object) -> None:
    assert repr(parse_json(json.dumps(value).encode())) == repr(value)
    assert repr(parse_json(json.dumps(value, ensure_ascii=False, indent=1).encode())) == repr(value)


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"a":' * 200_000, b"1" * 5_000, b"-" + b"1" * 5_000, b"", b"{", b"\xff", b"NaN", b"1 2"],
    ids=lambda content: f"{content[:6]!r} of {len(content)}",
)
def test_what_is_no_json_or_too_deep_or_long_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    pytest.raises(ValueError, read_json, tmp_path / "a.json")


def test_a_file_of_more_bytes_than_allowed_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[1]" + b" " * 10)
    assert read_json(tmp_path / "a.json", most=13) == [1]
    with pytest.raises(ValueError, match="more than 12 bytes"):
        read_json(tmp_path / "a.json", most=12)


def test_what_is_no_regular_file_is_refused_and_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(ValueError, match="not a regular file"):
            read_json(tmp_path / name)
    pytest.raises(OSError, read_json, tmp_path)
    pytest.raises(OSError, read_json, tmp_path / "none")
