"""Laws of the memo: what it holds is what was computed, whatever happens to its files."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tasks.store import memo as memos
from tasks.store import parts as store_parts
from tasks.store.collect import garbage
from tasks.store.memo import Keys, Memo, first_places, taken
from tasks.store.parts import fault, parts
from tasks.store.store import Store
from tests.waiting import ended, started

ROOT = Path(__file__).parents[2]


def keys(*numbers: int) -> Keys:
    """Return keys whose first halves are often equal."""
    return np.array([(number // 3, number) for number in numbers], np.uint64).reshape(-1, 2)


def rows(*numbers: int) -> pa.RecordBatch:
    """Return what a function would give for texts named by numbers: lists, as token ids are."""
    return pa.record_batch({"ids": pa.array([[number] * (number % 4) for number in numbers], pa.list_(pa.uint16()))})


def opened(root: Path, settings: int = 0) -> Memo:
    return Memo(root, "test", 1, {"n": settings})


def remember(root: Path, *numbers: int) -> Memo:
    memo = opened(root)
    memo.add(keys(*numbers), rows(*numbers))
    memo.close()
    return memo


def known(memo: Memo, *numbers: int) -> dict[int, list[int]]:
    """Ask for numbers; return the rows found."""
    found: dict[int, list[int]] = {}
    for places, batch in memo.find(keys(*numbers)):
        assert batch is not None
        found |= dict(zip(np.array(numbers)[places].tolist(), batch.column("ids").to_pylist(), strict=True))
    return found


def right(*numbers: int) -> dict[int, list[int]]:
    return {number: [number] * (number % 4) for number in numbers}


def test_what_was_added_is_found_at_once_after_closing_and_by_others(tmp_path: Path) -> None:
    memo = opened(tmp_path)
    memo.add(keys(5, 3, 4), rows(5, 3, 4))
    assert known(memo, 1, 4, 5, 9, 3) == right(4, 5, 3)
    memo.close()
    assert known(memo, 1, 4, 5, 9, 3) == known(opened(tmp_path), 3, 1, 4, 5, 9) == right(4, 5, 3)
    assert known(opened(tmp_path, settings=1), 3, 4, 5) == {}


def test_many_keys_with_equal_halves_are_told_apart(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).permutation(3_000).tolist()
    memo = remember(tmp_path, *numbers[:2_000])
    assert known(memo, *range(3_000)) == right(*sorted(numbers[:2_000]))


def test_distinct_keys_are_those_of_a_dict() -> None:
    numbers = np.random.default_rng(1).integers(0, 50, 200).tolist()
    first, which = first_places(keys(*numbers))
    expected = {number: place for place, number in reversed(list(enumerate(numbers)))}
    assert first.tolist() == sorted(expected.values())
    assert [numbers[first[place]] for place in which] == numbers


MUTATIONS: dict[str, Callable[[Path], object]] = {
    "one bit flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[300] ^ 1]).join(halves(path, 300))),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: path.write_bytes(b""),
    "another's content": lambda path: path.write_bytes(b"ARROW1" + b"y" * 400),
    "a link to the same bytes": lambda path: path.symlink_to(path.rename(path.parent / "x")),
}


def halves(path: Path, at: int) -> tuple[bytes, bytes]:
    content = path.read_bytes()
    return content[:at], content[at + 1 :]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_part_that_is_not_what_was_written_is_a_miss_moved_aside_and_said(
    tmp_path: Path, mutation: str, caplog: pytest.LogCaptureFixture
) -> None:
    (bad,) = parts(remember(tmp_path, 1, 2, 3).folder)
    remember(tmp_path, 7, 8)
    MUTATIONS[mutation](bad)
    memo = opened(tmp_path)
    assert known(memo, 1, 2, 3, 7, 8) == right(7, 8)
    assert "computed again" in caplog.text
    assert len(list((tmp_path / ".aside").iterdir())) == 1
    memo.add(keys(1, 2, 3), rows(1, 2, 3))
    memo.close()
    assert known(opened(tmp_path), 1, 2, 3, 7, 8) == right(1, 2, 3, 7, 8)


def test_an_unchanged_part_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (part,) = parts(remember(tmp_path, 1).folder)
    monkeypatch.setattr(store_parts, "sha256_file", lambda path: pytest.fail("hashed again"))
    assert known(opened(tmp_path), 1) == right(1)
    os.utime(part)
    with pytest.raises(pytest.fail.Exception):
        opened(tmp_path)


def test_verifying_hashes_again(tmp_path: Path) -> None:
    (part,) = parts(remember(tmp_path, 1).folder)
    assert fault(part) is None
    MUTATIONS["one bit flipped"](part)
    assert fault(part) == "is not what was written"


def test_many_parts_are_merged_and_nothing_is_lost(tmp_path: Path) -> None:
    for number in range(memos.MOST + 5):
        remember(tmp_path, number, number + 1)  # each key twice
    memo = opened(tmp_path)
    assert len(parts(memo.folder)) <= memos.MOST
    everything = range(memos.MOST + 6)
    assert known(memo, *everything) == right(*everything)


def test_a_merge_unites_small_batches(tmp_path: Path) -> None:
    for number in range(memos.MOST + 1):
        remember(tmp_path, number)
    memo = opened(tmp_path)
    assert len(parts(memo.folder)) == memos.KEPT + 1
    assert [len(batches) for batches in memo._parts.values()] == [1] * (memos.KEPT + 1)


def test_parts_of_full_size_are_not_copied_again_while_they_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memos, "PART_BYTES", 1)
    memo = opened(tmp_path)
    for number in range(memos.MOST + 9):
        memo.add(keys(number), rows(number))
    memo.close()
    assert len(parts(memo.folder)) == memos.MOST + 9
    monkeypatch.setattr(memos, "FULL", memos.MOST)
    opened(tmp_path).close()
    assert len(parts(memo.folder)) == memos.KEPT + 1
    everything = range(memos.MOST + 9)
    assert known(opened(tmp_path), *everything) == right(*everything)


def test_of_a_batch_of_which_too_little_is_asked_nothing_is_read_but_its_keys(tmp_path: Path) -> None:
    remember(tmp_path, *range(10))
    asked = keys(40, 3, 5, 41)
    for least, read in ((0.0, True), (0.2, True), (0.21, False)):
        ((places, batch),) = opened(tmp_path).find(asked, least)
        assert places.tolist() == [1, 2]
        assert batch == rows(3, 5) if read else batch is None


def test_opening_reads_keys_and_not_rows(tmp_path: Path) -> None:
    wide = pa.record_batch({"text": pa.array(["x" * 1_000] * 5_000)})
    memo = opened(tmp_path)
    memo.add(keys(*range(5_000)), wide)
    memo.close()
    before = bytes_read()
    opened(tmp_path)
    assert bytes_read() - before < wide.nbytes / 10


def bytes_read() -> int:
    """Return what this process has read from files, ever, in bytes."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_merge_does_not_disturb_a_reader(tmp_path: Path) -> None:
    for number in range(memos.MOST):
        remember(tmp_path, number)
    reader = opened(tmp_path)
    remember(tmp_path, 100)
    assert len(parts(reader.folder)) < memos.MOST
    assert known(reader, *range(memos.MOST)) == right(*range(memos.MOST))


def test_much_is_written_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memos, "PART_BYTES", 1)
    memo = opened(tmp_path)
    memo.add(keys(5), rows(5))
    assert known(opened(tmp_path), 5) == known(memo, 5) == right(5)


def test_a_store_that_cannot_be_written_is_said_once_and_costs_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    memo = opened(tmp_path / "file")
    for number in range(3):
        memo.add(keys(number), rows(number))
        memo.close()
    assert caplog.text.count("cannot be written") == 1


PROCESS = """
import os, signal, sys
from pathlib import Path
from tasks.store import memo as memos, parts as store_parts
from tests.store.test_memo import keys, opened, rows
root, first, count, kill = Path(sys.argv[1]), *map(int, sys.argv[2:])
if kill:
    memos.sha256_file = lambda path: os.kill(os.getpid(), signal.SIGKILL)
for number in range(first, first + count):
    memo = opened(root)
    memo.add(keys(number, number + 1), rows(number, number + 1))
    memo.close()
"""


def process(root: Path, first: int, count: int, kill: int = 0) -> "AbstractContextManager[subprocess.Popen[bytes]]":
    return started([sys.executable, "-c", PROCESS, str(root), *map(str, (first, count, kill))], cwd=ROOT)


def test_processes_write_and_merge_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    reading = threading.Event()

    def read() -> None:
        while not reading.is_set():
            found = known(opened(tmp_path), *range(100))
            seen.append(found.items() <= right(*range(100)).items())

    reader = threading.Thread(target=read)
    with process(tmp_path, 0, 60) as one, process(tmp_path, 30, 60) as other:
        reader.start()
        try:
            assert (ended(one), ended(other)) == (0, 0)
        finally:
            reading.set()
            reader.join()
    assert all(seen)
    assert known(opened(tmp_path), *range(91)) == right(*range(91))
    assert len(parts(opened(tmp_path).folder)) <= 2 * memos.MOST


def test_a_kill_in_the_middle_of_writing_leaves_what_was_there(tmp_path: Path) -> None:
    remember(tmp_path, 1, 2)
    with process(tmp_path, 5, 1, kill=1) as killed:
        assert ended(killed) == -signal.SIGKILL
    memo = opened(tmp_path)
    assert len(list(memo.folder.glob(".*.part"))) == 1
    assert known(memo, 1, 2, 5, 6) == right(1, 2)
    memo.close()
    (part,) = memo.folder.glob(".*.part")
    assert part not in garbage(Store(tmp_path), 0, time.time() + 3600), "it may still be written"
    assert part in garbage(Store(tmp_path), 0, time.time() + 2 * 86_400)


@pytest.mark.parametrize("places", [[2], [1, 2, 3], [3, 2, 1], [0, 2, 3], [1, 1, 3], [1, 3, 2, 4]])
def test_rows_that_are_taken_are_those_of_the_places_wherever_these_stand(places: list[int]) -> None:
    rows = pa.record_batch({"said": ["a", "b", None, "", "é"], "ids": [[1], [], None, [2, 3], [4]]})
    assert taken(rows, np.array(places)).equals(rows.take(pa.array(places)))
