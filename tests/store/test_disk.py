"""Laws of the disk: files are written whole, and a refusal says what to do."""

import errno
import os
from pathlib import Path

import pytest

from tasks.errors import PermissionRefused, StoreError, TreelineError
from tasks.store.disk import refusal, write_whole, writing


def test_a_full_disk_says_how_much_is_free() -> None:
    refused = refusal(Path("/"), OSError(errno.ENOSPC, "No space left on device"))
    assert refused.exit_code == 74
    assert "MB free" in str(refused)


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(errno.EACCES, PermissionRefused, "store.permission"), (errno.EROFS, StoreError, "store.create")],
)
def test_what_refuses_to_be_written_is_named_with_what_to_do(
    number: int, kind: type[TreelineError], code: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match="TREELINE_ARTIFACTS") as refused, writing(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "a"))
    assert code in str(refused.value)
    assert str(tmp_path / "a") in str(refused.value)


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note.json"
    write_whole(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        write_whole(path, b"new")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"note.json": b"old"}
