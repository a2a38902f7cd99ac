import random
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.text.pack import best_fit

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
