from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.gpt.batches import Plan, Split

CPU = torch.device("cpu")


def split(count: int = 5, block: int = 4) -> Split:
    ids = np.arange(count * block, dtype=np.uint16).reshape(count, block)
    mask = np.ones((count, block), dtype=np.uint8)
    return Split(ids, mask, np.tile(np.arange(block, dtype=np.uint16), (count, 1)), np.full_like(ids, block))


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 5))
def test_each_epoch_takes_each_sequence_once_whatever_the_batch(count: int, size: int, seed: int) -> None:
    plan = Plan(count, size, epochs=2, seed=seed)
    for epoch in range(2):
        steps = range(epoch * plan.per_epoch, (epoch + 1) * plan.per_epoch)
        rows = [row for step in steps for row in plan.rows(step)]
        assert sorted(rows) == list(range(count))
        assert all(1 <= len(plan.rows(step)) <= size for step in steps)
    assert plan.total == 2 * plan.per_epoch


def test_epochs_and_seeds_have_orders_of_their_own_and_each_is_the_same_again() -> None:
    plan, other = Plan(100, 100, 2, seed=1), Plan(100, 100, 2, seed=2)
    assert plan.rows(0).tolist() == Plan(100, 100, 2, seed=1).rows(0).tolist()
    assert plan.rows(0).tolist() != plan.rows(1).tolist()
    assert plan.rows(0).tolist() != other.rows(0).tolist()


def test_a_fraction_of_an_epoch_ends_in_its_middle_and_never_before_the_first_step() -> None:
    assert Plan(100, 10, 1.5, seed=0).total == 15
    assert Plan(100, 10, 0.001, seed=0).total == 1


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "expected"),
    [(2, 1, {0, 10, 20}), (1, 4, {0, 2, 5, 8, 10}), (0.5, 2, {0, 5}), (1, 1000, set(range(11)))],
)
def test_evaluations_lie_evenly_and_at_both_ends(epochs: float, per_epoch: int, expected: set[int]) -> None:
    assert Plan(100, 10, epochs, seed=0).evaluations(per_epoch) == expected


def test_a_batch_holds_the_rows_that_were_asked_for_in_their_order_and_in_torchs_types() -> None:
    found = split().batch(np.array([3, 0]), CPU)
    assert found.ids.tolist() == [[12, 13, 14, 15], [0, 1, 2, 3]]
    assert [part.dtype for part in found] == [torch.int64, torch.bool, torch.int64, torch.int64]
    assert found.ends.tolist() == [[4] * 4] * 2


def test_a_batch_from_a_memmap_leaves_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "ids.bin"
    np.arange(8, dtype=np.uint16).tofile(file)
    ids = np.memmap(file, dtype=np.uint16, mode="r").reshape(2, 4)
    found = Split(ids, ids, ids, ids).batch(slice(0, 2), CPU)
    found.ids[0, 0] = 99
    assert np.fromfile(file, dtype=np.uint16).tolist() == list(range(8))


def test_ids_above_the_signed_range_stay_positive() -> None:
    ids = np.array([[65_535, 50_303]], dtype=np.uint16)
    assert Split(ids, ids, ids, ids).batch(slice(0, 1), CPU).ids.tolist() == [[65_535, 50_303]]


def test_in_order_the_last_batch_takes_what_is_left() -> None:
    sizes = [len(batch.ids) for batch in split(5).in_order(2, CPU)]
    assert sizes == [2, 2, 1]


def test_the_first_token_of_a_sequence_is_not_supervised() -> None:
    assert split(5, 4).supervised() == 15
    assert split(5, 4).supervised(np.array([1])) == 3


def test_a_filled_batch_has_empty_sequences_that_train_nothing() -> None:
    full, filled = (replace(split(), fill=fill).batch(np.array([4, 1]), CPU) for fill in (0, 5))
    for plain, more in zip(full, filled, strict=True):
        assert more.shape == (5, 4)
        assert torch.equal(more[:2], plain)
        assert not more[2:].any()
    assert len(replace(split(), fill=2).batch(slice(0, 3), CPU).ids) == 3
