import random
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.text.pack import best_fit, lay

BLOCK = 32
lengths_of = st.lists(st.integers(1, BLOCK))


@given(lengths_of)
def test_every_document_is_packed_once_and_none_is_cut(lengths: list[int]) -> None:
    packed = best_fit(lengths, BLOCK)
    assert sorted(chain.from_iterable(packed)) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in numbers) <= BLOCK for numbers in packed)


@given(lengths_of)
def test_no_two_sequences_could_be_one(lengths: list[int]) -> None:
    """Best fit opens a sequence only where no other has room, so any two are together more than one block."""
    filled = sorted(sum(lengths[number] for number in numbers) for numbers in best_fit(lengths, BLOCK))
    assert len(filled) < 2 or filled[0] + filled[1] > BLOCK


@given(lengths_of)
def test_the_bitset_finds_what_a_search_finds(lengths: list[int]) -> None:
    bins: list[int] = []  # reference: best-fit decreasing by looking at every bin
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, filled in enumerate(bins) if filled + length <= BLOCK]
        if fitting:
            bins[max(fitting, key=bins.__getitem__)] += length
        else:
            bins.append(length)
    found = [sum(lengths[number] for number in numbers) for numbers in best_fit(lengths, BLOCK)]
    assert sorted(found) == sorted(bins)


@given(lengths_of)
def test_documents_stay_in_the_order_of_the_data(lengths: list[int]) -> None:
    packed = best_fit(lengths, BLOCK)
    assert packed == sorted(sorted(numbers) for numbers in packed)


def test_padding_of_real_lengths_is_below_a_thousandth() -> None:
    draw = random.Random(0)
    lengths = [min(1_024, int(draw.lognormvariate(5.9, 0.9)) + 8) for _ in range(5_000)]
    packed = best_fit(lengths, 1_024)
    assert len(packed) * 1_024 - sum(lengths) < sum(lengths) / 1_000 + 1_024


@pytest.mark.parametrize("lengths", [[BLOCK + 1], [0]])
def test_a_document_that_fits_no_sequence_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="1 to 32"):
        best_fit(lengths, BLOCK)


def test_nothing_packs_into_nothing() -> None:
    assert best_fit([], BLOCK) == []


def test_a_sequence_isolates_its_documents_and_pads_the_rest() -> None:
    laid = lay([([5, 6, 7], [0, 0, 1]), ([8, 9], [0, 1])], block=7, pad=3)
    assert laid.ids.tolist() == [5, 6, 7, 8, 9, 3, 3]
    assert laid.mask.tolist() == [0, 0, 1, 0, 1, 0, 0]
    assert laid.positions.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert laid.ends.tolist() == [3, 3, 3, 5, 5, 6, 7]
    assert laid.starts == [0, 3]
    assert [array.dtype for array in (laid.ids, laid.mask, laid.positions, laid.ends)] == [
        np.uint16, np.uint8, np.uint16, np.uint16,
    ]  # fmt: skip


@given(st.lists(st.integers(1, 6), max_size=5))
def test_a_token_sees_what_came_before_it_in_its_document_and_nothing_else(sizes: list[int]) -> None:
    laid = lay([([1] * size, [0] * size) for size in sizes], BLOCK, 0)
    document = [number for number, size in enumerate(sizes) for _ in range(size)]
    document += [1_000 + place for place in range(BLOCK - len(document))]
    for query in range(BLOCK):
        for key in range(BLOCK):
            sees = key <= query < laid.ends[key]
            assert sees == (key <= query and document[key] == document[query])
