"""Laws of functions of one text: the rows are the same, however they come about."""

import hashlib
import logging
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from tasks import rows
from tasks.remembered import Function, PerText
from tasks.rows import Tally, keys_of, mapping, per_name, per_text, remembering
from tasks.store import memo
from tasks.store.memo import Keys
from tasks.store.parts import parts


def lengths(factor: int, texts: pa.StringArray) -> pa.RecordBatch:
    """Give each text's length, times a factor, and its characters, doubled."""
    said = texts.to_pylist()
    columns = {
        "size": pa.array([factor * len(text) for text in said], pa.int64()),
        "twice": pa.array([text + text for text in said], pa.string()),
    }
    return pa.record_batch(columns)


def counted(factor: int = 2, version: int = 1) -> PerText:
    return PerText("lengths", version, {"factor": factor}, partial(lengths, factor))


def expected(texts: list[str], factor: int = 2) -> list[dict[str, Any]]:
    return [{"size": factor * len(text), "twice": text + text} for text in texts]


def texts_of(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(list("aé中🙂 \n"), draw.integers(0, 6))) for _ in range(count)]


def asked(root: Path | None, texts: list[str], function: PerText | None = None, workers: int = 1) -> tuple[Any, Tally]:
    with remembering(root, workers, lambda name: None) as desk:
        found = per_text(function or counted(), pl.Series(texts, dtype=pl.String))
    return found.to_pylist(), next(iter(desk.tallies.values()), Tally())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut windows and chunks where texts of the tests come to several."""
    for name, value in {"WINDOW_ROWS": 40, "WINDOW_BYTES": 150, "CHUNK_ROWS": 7, "CHUNK_BYTES": 20}.items():
        monkeypatch.setattr(rows, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("workers", [1, 3, 0])
def test_the_rows_are_those_of_the_function_with_and_without_a_memo(tmp_path: Path, workers: int) -> None:
    texts = texts_of(300)
    for root in (None, tmp_path, tmp_path):
        assert asked(root, texts, workers=workers)[0] == expected(texts)


@pytest.mark.usefixtures("small")
def test_a_text_is_computed_once_however_the_texts_are_sorted(tmp_path: Path) -> None:
    texts = list(dict.fromkeys(texts_of(300)))
    count = len(texts)
    assert asked(tmp_path, texts)[1] == Tally(count, 0, count)
    assert asked(tmp_path, texts[::-1])[1] == Tally(count, count, 0)
    found, tally = asked(tmp_path, [*texts[:100], "new", *texts[100:]])
    assert (found[100], tally) == ({"size": 6, "twice": "newnew"}, Tally(count + 1, count, 1))


def test_other_settings_and_another_version_share_nothing(tmp_path: Path) -> None:
    texts = ["one", "two"]
    for function in (counted(), counted(factor=3), counted(version=2)):
        found, tally = asked(tmp_path, texts, function)
        assert found == expected(texts, function.settings["factor"])
        assert tally.computed == 2


def test_equal_texts_are_computed_once() -> None:
    assert asked(None, ["a", "b", "a", "a"]) == (expected(["a", "b", "a", "a"]), Tally(2, 0, 2))


def test_no_texts_give_no_rows_of_the_right_columns() -> None:
    found = per_text(counted(), pl.Series([], dtype=pl.String))
    assert (found.num_rows, found.column_names) == (0, ["size", "twice"])


def test_a_text_that_is_null_is_refused() -> None:
    with pytest.raises(ValueError, match="null"):
        asked(None, ["a", None])  # type: ignore[list-item]


def test_a_key_is_the_hash_of_the_bytes_of_the_text() -> None:
    texts = texts_of(50)
    column = pa.array(["before", *texts], pa.large_string())[1:]
    made = [hashlib.sha256(text.encode()).digest()[:16] for text in texts]
    assert [key.tobytes() for key in keys_of(column)] == made


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert asked(tmp_path, ["a", "b"])[0] == expected(["a", "b"])


def test_a_memo_that_goes_away_while_it_is_used_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked(tmp_path, ["a", "b"])
    with remembering(tmp_path, 1, lambda name: None) as desk:
        kept = desk.memo(counted())
        assert kept is not None
        for part in parts(kept.folder):
            part.write_bytes(b"")  # the same file, emptied under the open reader
        found = per_text(counted(), pl.Series(["a", "b"])).to_pylist()
    assert found == expected(["a", "b"])


def test_columns_that_changed_without_a_version_are_said_and_computed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked(tmp_path, ["a"])
    fewer = PerText("lengths", 1, {"factor": 2}, only_size)
    assert asked(tmp_path, ["a", "b"], fewer)[0] == [{"size": 1}, {"size": 1}]
    assert "raise its version" in caplog.text


def test_columns_that_changed_are_said_even_if_no_text_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked(tmp_path, ["a"])
    assert asked(tmp_path, ["a"], PerText("lengths", 1, {"factor": 2}, only_size))[0] == [{"size": 1}]
    assert "raise its version" in caplog.text


def test_what_is_computed_because_columns_changed_is_counted(tmp_path: Path) -> None:
    asked(tmp_path, ["a"])
    assert asked(tmp_path, ["a", "b"], PerText("lengths", 1, {"factor": 2}, only_size))[1] == Tally(2, 0, 2)


def test_texts_are_hashed_once_for_all_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counted_keys(texts: pa.LargeStringArray) -> Keys:
        hashed.append(len(texts))
        return keys_of(texts)

    monkeypatch.setattr(rows, "keys_of", counted_keys)
    texts, others = pl.Series(["a", "bb"]), pl.Series(["a", "bb"])
    with remembering(tmp_path, 1, lambda name: None):
        for asked_about, factor in ((texts, 2), (texts, 3), (others, 2), (texts, 2)):
            assert per_text(counted(factor), asked_about).to_pylist() == expected(["a", "bb"], factor)
    assert hashed == [2, 2, 2]


def test_a_fresh_desk_computes_and_mends_what_is_remembered_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["a", "bb", "ccc"]
    wrong = PerText("lengths", 1, {"factor": 2}, partial(lengths, 3))
    assert asked(tmp_path, texts, wrong)[0] == expected(texts, 3)
    assert asked(tmp_path, texts)[0] == expected(texts, 3)  # nobody raised its version
    for said in (True, False):
        caplog.clear()
        with remembering(tmp_path, 1, lambda name: None, fresh=True) as desk:
            assert per_text(counted(), pl.Series([*texts, "new"])).to_pylist() == expected([*texts, "new"])
            assert [tally.computed for tally in desk.tallies.values()] == [4]
        assert ("does not give" in caplog.text) == said
    assert asked(tmp_path, [*texts, "new"]) == (expected([*texts, "new"]), Tally(4, 4, 0))


@pytest.mark.parametrize("workers", [2, 3])
def test_every_worker_has_a_chunk(workers: int) -> None:
    sizes: list[int] = []

    def size(texts: pa.StringArray) -> pa.RecordBatch:
        sizes.append(len(texts))
        return only_size(texts)

    with remembering(None, workers, lambda name: None):
        per_text(PerText("sizes", 1, {}, size), pl.Series(map(str, range(rows.CHUNK_ROWS))))
    assert len(sizes) == workers
    assert max(sizes) - min(sizes) < workers


@pytest.mark.usefixtures("small")
def test_a_batch_is_read_once_for_a_column_however_it_is_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, numbers = memo._read, list[int]()

    def counting(reader: Any, number: int) -> pa.RecordBatch:
        numbers.append(number)
        return read(reader, number)

    monkeypatch.setattr(memo, "_read", counting)
    texts = [str(number) for number in range(1_000)]
    asked(tmp_path, texts)
    assert asked(tmp_path, np.random.default_rng(0).permutation(texts).tolist())[1] == Tally(1_000, 1_000, 0)
    assert len(numbers) == len(set(numbers)) > 20


def only_size(texts: pa.StringArray) -> pa.RecordBatch:
    return lengths(1, texts).select(["size"])


def test_another_executor_gets_what_can_be_pickled_and_gives_the_same_rows(tmp_path: Path) -> None:
    texts = texts_of(50)

    def elsewhere(compute: Any, chunks: Any) -> Any:
        for chunk in chunks:
            function, there = pickle.loads(pickle.dumps((compute, chunk)))
            yield pickle.loads(pickle.dumps(function(there)))

    with mapping(elsewhere, 10):
        assert asked(tmp_path, texts)[0] == expected(texts)
    assert asked(tmp_path, texts) == (expected(texts), Tally(len(set(texts)), len(set(texts)), 0))


def test_a_failing_function_fails_and_what_was_computed_before_stays(tmp_path: Path) -> None:
    def ask() -> None:
        with remembering(tmp_path, 1, lambda name: None):
            per_text(counted(), pl.Series(["kept"]))
            raise RuntimeError("boom")

    pytest.raises(RuntimeError, ask)
    assert asked(tmp_path, ["kept"])[1] == Tally(1, 1, 0)


def test_nothing_is_said_where_all_is_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        asked(tmp_path, texts_of(20))
        asked(tmp_path, texts_of(20))
    assert caplog.text == ""


def test_what_has_a_name_is_computed_once_wherever_it_stands(tmp_path: Path) -> None:
    names = np.random.default_rng(0).integers(0, 1 << 63, (50, 4), np.uint64)
    computed: list[int] = []

    def asked(names: np.ndarray) -> tuple[list[float], Tally]:
        def sums(places: np.ndarray) -> pa.RecordBatch:
            computed.append(len(places))
            return pa.record_batch({"sum": names[places].astype(np.float64).sum(axis=1)})

        with remembering(tmp_path, 1, lambda name: None) as desk:
            made = per_name(Function("sums", 1, {}), names, sums)
        return made["sum"].to_pylist(), next(iter(desk.tallies.values()), Tally())

    for order, tally in ((names[:40], Tally(40, 0, 40)), (names[::-1], Tally(50, 40, 10)), (names, Tally(50, 50, 0))):
        assert asked(order) == (order.astype(np.float64).sum(axis=1).tolist(), tally)
    assert asked(names[:0]) == ([], Tally())
    assert [count for count in computed if count] == [40, 10]  # none is asked for the columns alone


def test_what_costs_more_to_read_than_to_compute_is_computed_and_remembered_once(tmp_path: Path) -> None:
    names = np.arange(100, dtype=np.uint64).reshape(-1, 1)

    def asked(some: Any, least: float) -> tuple[list[float], Tally]:
        def doubled(places: Any) -> pa.RecordBatch:
            return pa.record_batch({"twice": some[places, 0].astype(np.float64) * 2})

        with remembering(tmp_path, 1, lambda name: None) as desk:
            made = per_name(Function("twice", 1, {}, least=least), some, doubled)
        return made["twice"].to_pylist(), next(iter(desk.tallies.values()))

    def held() -> int:
        opened = (pa.ipc.open_file(str(path)) for path in tmp_path.glob(".memo/*/*.arrow"))
        return sum(one.read_all().num_rows for one in opened)

    for some, least, remembered in (
        (names[:90], 0.5, 0),  # all of them are new
        (names[40:0:-1], 0.5, 0),  # too few to be read
        (names[45:0:-1], 0.5, 45),
        (names[85:], 0.5, 0),  # some new, the others too few
        (names, 0.5, 100),
        (names[:1], 0.0, 1),
    ):
        numbers = (some[:, 0] * 2.0).tolist()
        assert asked(some, least) == (numbers, Tally(len(some), remembered, len(some) - remembered))
    assert held() == 100
