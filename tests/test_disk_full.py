"""Laws of a full disk: it is said as one, by the first error, wherever it comes up."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows import chain, recipe
from tasks.artifacts import REJECTED_COLUMNS, Dialogues, RawTrees, parquet_writer
from tasks.encode import EncodeParams, EncodeRuntime, encode
from tasks.errors import InputError, StoreError
from tasks.oasst.tables import RowTable
from tasks.parse import ParseParams, parse
from tasks.step import session
from tasks.store.disk import disk_error

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> chain.Made:
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / "store"))
    with session():
        return chain.run(recipe.load("quickstart", ["parse.max_trees=300"]), chain.until("curate"))


def failing(out: Path, name: str, write: Callable[[Path], object]) -> OSError | None:
    """Let one file of a step lie on a full disk, and return what the system said, as the step's error tells it."""
    out.mkdir()
    (out / name).symlink_to(FULL)
    with pytest.raises(Exception, match=r"No space left|os error 28") as caught:
        write(out)
    return disk_error(caught.value)


@pytest.mark.parametrize("name", ["messages.parquet", "rejected.parquet"])
def test_parse_tells_of_the_disk_and_not_of_a_closed_file(tmp_path: Path, made: chain.Made, name: str) -> None:
    raw = made[RawTrees]
    assert isinstance(raw, RawTrees)
    said = failing(tmp_path / "out", name, lambda out: parse.function(out, raw, ParseParams()))
    assert said
    assert said.errno == errno.ENOSPC


@pytest.mark.parametrize("name", ["ids.bin", "index.parquet", "tokenizer.json", "encoding.json"])
def test_encode_tells_of_the_disk_whatever_library_writes(tmp_path: Path, made: chain.Made, name: str) -> None:
    dialogues = made[Dialogues]
    assert isinstance(dialogues, Dialogues)
    asked = EncodeParams(vocab_size=512), EncodeRuntime()
    said = failing(tmp_path / "out", name, lambda out: encode.function(out, dialogues, *asked))
    assert said
    assert said.errno == errno.ENOSPC


@pytest.mark.parametrize(("rows", "error"), [(1_500, None), (500, None), (500, KeyError)])
def test_a_table_that_fails_keeps_its_first_error_and_its_end_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rows: int, error: type[Exception] | None
) -> None:
    def write() -> None:
        with RowTable(parquet_writer(tmp_path / "rows.parquet", REJECTED_COLUMNS), 1_000) as table:
            for number in range(rows):
                table.add(("file", number, 0, "code", "message", os.urandom(32).hex(), "head", None, 1, 0))
            if error:
                raise error

    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, most))
    try:
        with pytest.raises(error or OSError):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert "ignored" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc] . [Errno 28] No space left"),
    ],
)
def test_what_the_system_said_is_found_in_any_error_but_one_of_ours(error: Exception) -> None:
    later = ValueError("Operation on closed file")
    later.__context__ = error
    for one in (error, later):
        found = disk_error(one)
        assert found
        assert found.errno == errno.ENOSPC
    ours = InputError("cut")
    ours.__cause__ = error
    assert disk_error(ours) is None
    assert disk_error(ValueError("a text (os error 999)")) is None


@pytest.fixture
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Mount a disk of so many kB; only root may."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    asked = [mount or "", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    if not mount or os.geteuid() or subprocess.run(asked, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("may not mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("small", [4, 64, 320, 820, 1_600], indirect=True)
def test_a_run_on_a_full_disk_ends_in_74_with_what_to_do(small: Path) -> None:
    environment = {**os.environ, "TREELINE_ARTIFACTS": str(small)}
    code = "from flows import chain, recipe; chain.run(recipe.load('quickstart'), chain.until('encode'))"
    asked = [sys.executable, "-c", code]
    run = subprocess.run(asked, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("tasks.errors.StoreError: error[store.write]: cannot write to the store: No space left")
    assert "free space or set TREELINE_ARTIFACTS" in last
    assert StoreError.exit_code == 74
