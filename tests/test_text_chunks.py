"""Laws of per-text work: the rows are those of the function, however texts are cut and wherever they are computed."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from tasks import text_chunks
from tasks.text_chunks import map_texts, text_executor

if TYPE_CHECKING:
    from tasks.text_chunks import ChunkFunction


def lengths(factor: int, texts: pa.StringArray) -> pa.RecordBatch:
    """Give each text's length, times a factor, and its characters, doubled."""
    words = texts.to_pylist()
    columns = {
        "size": pa.array([factor * len(text) for text in words], pa.int64()),
        "twice": pa.array([text + text for text in words], pa.string()),
    }
    return pa.record_batch(columns)


def expected(texts: list[str]) -> list[dict[str, Any]]:
    return [{"size": 2 * len(text), "twice": text + text} for text in texts]


def texts_of(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return ["".join(draw.choice(list("aé中🙂 \n"), draw.integers(0, 6))) for _ in range(count)]


def rows_of(texts: list[str], workers: int = 1) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = map_texts(pl.Series(texts, dtype=pl.String), partial(lengths, 2), workers).to_pylist()
    return rows


@pytest.mark.parametrize("workers", [1, 3, 0])
@pytest.mark.parametrize("limits", [{"CHUNK_ROWS": 7}, {"CHUNK_BYTES": 20}, {"CHUNK_BYTES": 1}, {}], ids=str)
def test_the_rows_are_those_of_the_function(
    limits: dict[str, int], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(text_chunks, name, value)
    texts = texts_of(300)
    assert rows_of(texts, workers) == expected(texts)
    sliced = pl.Series(texts)[100:200]  # its first text does not begin its buffer
    assert map_texts(sliced, partial(lengths, 2), workers).to_pylist() == expected(texts[100:200])


def test_no_texts_give_no_rows_of_the_right_columns() -> None:
    rows = map_texts(pl.Series([], dtype=pl.String), partial(lengths, 2))
    assert (rows.num_rows, rows.column_names) == (0, ["size", "twice"])


def test_a_text_that_is_null_is_refused_by_its_place() -> None:
    with pytest.raises(ValueError, match="text 1 of 3 is null"):
        map_texts(pl.Series(["a", None, "b"]), partial(lengths, 2))


def test_a_function_that_loses_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="gave 1 rows for 2 texts"):
        map_texts(pl.Series(["a", "b"]), lambda texts: lengths(1, texts)[:1])


@pytest.mark.parametrize("workers", [2, 3])
def test_every_worker_has_a_chunk(workers: int) -> None:
    sizes: list[int] = []

    def size(texts: pa.StringArray) -> pa.RecordBatch:
        sizes.append(len(texts))
        return lengths(1, texts)

    map_texts(pl.Series(map(str, range(text_chunks.CHUNK_ROWS))), size, workers)
    assert len(sizes) == workers
    assert max(sizes) - min(sizes) < workers


def test_another_executor_gets_what_can_be_pickled_and_gives_the_same_rows() -> None:
    texts, sizes = texts_of(50), list[int]()

    def elsewhere(function: ChunkFunction, chunks: Iterable[pa.StringArray]) -> Iterator[pa.RecordBatch]:
        for chunk in chunks:
            function_there, chunk_there = pickle.loads(pickle.dumps((function, chunk)))
            sizes.append(len(chunk_there))
            yield pickle.loads(pickle.dumps(function_there(chunk_there)))

    with text_executor(elsewhere, 10):
        assert rows_of(texts) == expected(texts)
    assert sizes == [10] * 5
    assert rows_of(texts) == expected(texts)
    assert sizes == [10] * 5
