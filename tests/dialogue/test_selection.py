"""Laws of whole threads."""

from hypothesis import given
from hypothesis import strategies as st

from tasks.dialogue.selection import in_whole_threads


def test_a_fault_spoils_every_thread_through_it_and_no_other() -> None:
    #  0 - 1 - 2 - 3 (faulty)
    #        \ 4 - 5
    parents, replies = [-1, 0, 1, 2, 1, 4], [False, True, False, True, False, True]
    kept = [True, True, True, False, True, True]
    assert in_whole_threads(parents, replies, [0, 0, 0, 0, 1, 0], kept) == [True, True, False, False, True, True]


def test_a_last_prompt_counts_only_as_the_first_of_its_siblings() -> None:
    parents, replies = [-1, 0, 1, 1], [False, True, False, False]
    assert in_whole_threads(parents, replies, [0, 0, 0, 1], [True] * 4) == [True, True, True, False]
    assert in_whole_threads(parents, replies, [0, 0, 0, 1], [True, True, False, True]) == [False] * 4


def test_a_prompt_alone_is_no_thread() -> None:
    assert in_whole_threads([-1], [False], [0], [True]) == [False]


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[bool], list[int], list[bool]]:
    parents = [-1]
    for row in range(1, draw(st.integers(1, 12))):
        parents.append(draw(st.integers(0, row - 1)))
    places = [parents[:row].count(parent) for row, parent in enumerate(parents)]
    return parents, draw(flags(parents)), places, draw(flags(parents))


def flags(rows: list[int]) -> st.SearchStrategy[list[bool]]:
    return st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))


@given(trees())
def test_it_is_the_union_of_the_threads_that_are_whole(
    tree: tuple[list[int], list[bool], list[int], list[bool]],
) -> None:
    parents, replies, places, kept = tree
    held: set[int] = set()
    for leaf in {*range(len(parents))} - {*parents}:
        thread = [leaf]
        while parents[thread[-1]] >= 0:
            thread.append(parents[thread[-1]])
        if len(thread) > 1 and all(kept[row] for row in thread) and (replies[leaf] or places[leaf] == 0):
            held |= {*thread}
    assert in_whole_threads(*tree) == [row in held for row in range(len(parents))]
