import time

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.dialogue.tree import holds, is_below, nearest_above, parent_rows, windows
from tasks.errors import InputError

DEEP = 100_000


def table(*rows: tuple[str, str, str | None]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["message_tree_id", "message_id", "parent_id"], orient="row")


@st.composite
def forests(draw: st.DrawFn) -> tuple[list[int], list[bool]]:
    """Draw (parents, marks) of up to 12 messages, parents first."""
    size = draw(st.integers(0, 12))
    parents = [draw(st.integers(-1, row - 1)) for row in range(size)]
    return parents, draw(st.lists(st.booleans(), min_size=size, max_size=size))


def ancestors(parents: list[int], row: int) -> list[int]:
    return [] if parents[row] < 0 else [parents[row], *ancestors(parents, parents[row])]


def test_parents_are_found_within_their_own_tree() -> None:
    rows = table(("t", "a", None), ("u", "a", None), ("t", "b", "a"), ("u", "b", "a"), ("u", "c", "b"))
    assert parent_rows(rows) == [-1, -1, 0, 1, 3]


def test_a_parent_that_does_not_come_first_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"curate\.order.*parent z of message b.*tree t, row 1"):
        parent_rows(table(("t", "a", None), ("t", "b", "z")))


@given(forests())
def test_relations_equal_those_of_a_walk_up_from_every_message(forest: tuple[list[int], list[bool]]) -> None:
    parents, marked = forest
    lines = [ancestors(parents, row) for row in range(len(parents))]
    assert is_below(parents, marked) == [any(marked[above] for above in line) for line in lines]
    assert nearest_above(parents, marked) == [next((above for above in line if marked[above]), -1) for line in lines]
    assert holds(parents, marked) == [
        any(marked[other] and row in (other, *lines[other]) for other in range(len(parents)))
        for row in range(len(parents))
    ]


@given(forests(), st.integers(1, 5))
def test_windows_hold_every_row_once_with_all_its_ancestors_and_are_no_longer_than_they_must(
    forest: tuple[list[int], list[bool]], size: int
) -> None:
    parents, _ = forest
    found = list(windows(parents, size))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(len(parents)))
    assert all(parents[row] < 0 or parents[row] >= start for start, stop in found for row in range(start, stop))
    for start, stop in found:  # no earlier cut would do
        assert all(any(0 <= above < cut for above in parents[cut:]) for cut in range(start + size, stop))


def test_a_chain_costs_no_more_than_its_length() -> None:
    parents = list(range(-1, DEEP - 1))
    started = time.process_time()
    assert nearest_above(parents, [True] + [False] * (DEEP - 1))[-1] == 0
    assert holds(parents, [False] * (DEEP - 1) + [True])[0]
    assert is_below(parents, [True] + [False] * (DEEP - 1))[-1]
    assert time.process_time() - started < 5
