"""Laws of loops: what is said again and again is one, what is said twice is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.gpt.loops import REPEATS, SPAN, looping

tokens = st.lists(st.integers(0, 3), max_size=60)


def plainly(ids: list[int]) -> bool:
    """Say the same by trying each n-gram at the end, and counting how often it stands there."""
    for size in range(1, len(ids) + 1):
        covered = size  # tokens at the end that agree with the n-gram, going back, its last repeat perhaps in part
        while covered < len(ids) and ids[-1 - covered] == ids[-1 - covered + size]:
            covered += 1
        if covered >= max(REPEATS * size, SPAN):
            return True
    return False


@pytest.mark.parametrize("size", [1, 3, 8, 40])
def test_an_ngram_said_often_enough_is_a_loop_whatever_stands_before_it(size: int) -> None:
    phrase = list(range(size))
    enough = max(REPEATS, -(-SPAN // size))
    assert looping([7, 7, 9] + phrase * enough)
    assert not looping([7, 7, 9] + phrase * (enough - 1))
    assert not looping(phrase * enough + [99])  # it went on


@pytest.mark.parametrize("ids", [[], [1], [5] * (SPAN - 1), list(range(200)), [*range(90), *range(90), *range(90)]])
def test_what_is_short_or_new_or_said_thrice_is_no_loop(ids: list[int]) -> None:
    assert not looping(ids)


@given(before=tokens, phrase=tokens.filter(bool), times=st.integers(1, 40))
def test_it_agrees_with_the_plain_way(before: list[int], phrase: list[int], times: int) -> None:
    ids = (before + phrase * times)[:400]
    assert looping(ids) == plainly(ids)
