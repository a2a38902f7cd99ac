from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import InputError
from tasks.text.linearize import LAYOUTS, LINKS, Conversation, Fitted, Forest, first_reply, forest, paths, top1
from tasks.text.linearize import fit as fit_arrays

# row: 0    1    2    3    4    5    6
#      P -> a -> p -> b
#           |    +--> c
#           +--> q
#      +--> d
PARENTS = [None, "0", "1", "2", "2", "1", "0"]
REPLIES = [False, True, False, True, True, False, True]


def tree(parents: list[str | None], ranks: list[int | None] | None = None) -> Forest:
    names = [str(row) for row in range(len(parents))]
    siblings = [parents[:row].count(parent) for row, parent in enumerate(parents)]
    return linked(["t"] * len(names), names, parents, ranks or [None] * len(names), siblings)


def linked(*columns: Sequence[object]) -> Forest:
    types = (pl.String, pl.String, pl.String, pl.Int64, pl.Int64)
    return forest(pl.DataFrame(dict(zip(LINKS, columns, strict=True)), dict(zip(LINKS, types, strict=True))))


def fit(found: Iterable[Conversation], replies: list[bool], lengths: list[int], room: int) -> Fitted:
    return fit_arrays(found, np.array(replies), np.array(lengths), room)


def test_paths_go_from_the_root_to_every_leaf_in_order() -> None:
    assert list(paths(tree(PARENTS))) == [(0, 1, 2, 3), (0, 1, 2, 4), (0, 1, 5), (0, 6)]


def test_the_best_rank_wins_then_the_order_of_the_data() -> None:
    assert list(top1(tree(PARENTS))) == [(0, 1, 2, 3)]
    assert list(top1(tree(PARENTS, [None, 1, None, 7, 2, None, 0]))) == [(0, 6)]
    assert list(top1(tree(PARENTS, [None, 0, None, None, 5, None, None]))) == [(0, 1, 2, 4)]


def test_first_replies_make_pairs() -> None:
    assert list(first_reply(tree(PARENTS))) == [(0, 1), (0, 6)]


def test_a_lone_prompt_is_a_path_without_a_reply() -> None:
    assert [list(layout(tree([None]))) for layout in LAYOUTS.values()] == [[(0,)], [(0,)], []]


def test_equal_ids_in_two_trees_are_two_messages() -> None:
    two = linked(["t", "t", "u", "u"], ["0", "1"] * 2, [None, "0"] * 2, [None] * 4, [0] * 4)
    assert list(paths(two)) == [(0, 1), (2, 3)]


def test_a_missing_parent_is_named() -> None:
    with pytest.raises(InputError, match="message 1 answers gone"):
        tree([None, "gone"])


def test_a_conversation_deeper_than_the_recursion_limit_is_walked() -> None:
    assert [len(path) for path in paths(tree([None, *map(str, range(4_999))]))] == [5_000]


def test_conversations_end_on_a_reply_and_are_kept_once() -> None:
    made = fit(paths(tree(PARENTS)), REPLIES, [1] * 7, room=100)
    assert made.conversations == [(0, 1, 2, 3), (0, 1, 2, 4), (0, 1), (0, 6)]
    assert (made.cut, made.skipped, made.repeated, made.too_long) == (0, 0, 0, 0)


def test_a_long_conversation_is_cut_at_whole_turns_and_its_lost_replies_are_counted() -> None:
    made = fit(paths(tree(PARENTS)), REPLIES, [2, 3, 1, 4, 5, 1, 9], room=10)
    assert made.conversations == [(0, 1, 2, 3), (0, 1)]  # the one cut to (0, 1) comes before the one that was so short
    assert (made.cut, made.skipped, made.repeated, made.too_long) == (1, 1, 1, 2)


def test_a_conversation_without_a_reply_is_skipped() -> None:
    made = fit([(0,), ()], [False], [1], room=10)
    assert (made.conversations, made.skipped) == ([], 2)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=12), st.integers(1, 12), st.data())
def test_every_layout_obeys_the_laws_of_fitting(above: list[int], room: int, data: st.DataObject) -> None:
    parents = [None, *(str(place % (row + 1)) for row, place in enumerate(above))]
    depth = [0]
    for parent in parents[1:]:
        depth.append(depth[int(parent or 0)] + 1)
    replies = [level % 2 == 1 for level in depth]
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=len(parents), max_size=len(parents)))
    for layout in LAYOUTS.values():
        found = list(layout(tree(parents)))
        made = fit(found, replies, lengths, room)
        assert len(found) == len(made.conversations) + made.skipped + made.repeated
        assert len(set(made.conversations)) == len(made.conversations)
        kept = {row for conversation in made.conversations for row in conversation}
        seen = {row for conversation in found for row in conversation}
        assert made.too_long == sum(replies[row] for row in seen - kept)
        for conversation in made.conversations:
            assert replies[conversation[-1]]
            assert sum(lengths[row] for row in conversation) <= room
            assert any(conversation == whole[: len(conversation)] for whole in found)
        for whole, size in product(found, range(1, 12)):  # reference: the longest prefix that ends on a reply and fits
            if size <= len(whole) and replies[whole[size - 1]] and sum(lengths[row] for row in whole[:size]) <= room:
                assert any(kept[:size] == whole[:size] for kept in made.conversations)
