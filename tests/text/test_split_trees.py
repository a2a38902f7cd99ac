from collections.abc import Sequence

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from tasks.text.linearize import Forest, forest
from tasks.text.split_trees import Cut, Piece, Sizes, cut

START, TAIL, BLOCK = 2, 1, 24


def tree(parents: Sequence[int]) -> Forest:
    """Link rows by the number of their parent; -1 opens a tree."""
    names = [str(row) for row in range(len(parents))]
    siblings = [parents[:row].count(parent) for row, parent in enumerate(parents)]
    above = [None if parent < 0 else str(parent) for parent in parents]
    columns = {"message_tree_id": ["t"] * len(names), "message_id": names, "parent_id": above, "sibling": siblings}
    return forest(
        pl.DataFrame(columns, schema_overrides={"parent_id": pl.String}).with_columns(rank=pl.lit(None, pl.Int32))
    )


def in_turns(parents: Sequence[int]) -> list[bool]:
    """Say who speaks where prompts and replies alternate: an assistant on every second level."""
    replies: list[bool] = []
    for parent in parents:
        replies.append(parent >= 0 and not replies[parent])
    return replies


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw parents and lengths of up to 40 rows."""
    count = draw(st.integers(1, 40))
    parents = [-1, *(draw(st.integers(-1, row - 1)) for row in range(1, count))]
    return parents, [draw(st.integers(1, 9)) for _ in parents]


def tokens(piece: Piece, parents: Sequence[int], lengths: Sequence[int]) -> int:
    above = {parents[row] for row in piece.rows}
    leaves = sum(row not in above for row in piece.rows)
    return START + sum(lengths[row] for row in piece.rows) + TAIL * leaves


def cut_of(parents: Sequence[int], lengths: Sequence[int], room: int = BLOCK) -> Cut:
    return cut(tree(parents), in_turns(parents), Sizes(lengths, START, TAIL, BLOCK, room))


def test_a_tree_that_fits_is_one_piece_in_depth_first_order() -> None:
    #          0 -> 1 -> 2 -> 3,   2 -> 4,   0 -> 5
    made = cut_of([-1, 0, 1, 2, 2, 0], [1] * 6)
    assert made.pieces == [Piece((0, 1, 2, 3, 4, 5), tokens=2 + 6 + 3)]
    assert (made.trees, made.divided, made.too_long) == (1, 0, 0)


def test_a_larger_tree_is_cut_between_subtrees_below_repeated_ancestors() -> None:
    made = cut_of([-1, 0, 0, 0], [5, 9, 8, 7])
    assert made.pieces == [Piece((0, 1), 17), Piece((0, 2, 3), 24, context=1)]
    assert (made.trees, made.divided) == (1, 1)


def test_a_prompt_that_no_fitting_reply_is_below_is_left_out() -> None:
    made = cut_of([-1, 0, 1, 2], [5, 5, 5, 9])
    assert made.pieces == [Piece((0, 1), 13)]
    assert made.too_long == 1
    assert cut_of([-1], [3]).skipped == 1


@given(trees(), st.integers(BLOCK, 3 * BLOCK))
def test_every_reply_that_fits_is_trained_in_exactly_one_piece(drawn: tuple[list[int], list[int]], room: int) -> None:
    parents, lengths = drawn
    replies = in_turns(parents)
    trained = [row for piece in cut_of(parents, lengths, room).pieces for row in piece.rows[piece.context :]]
    assert len(trained) == len(set(trained))
    path = [0] * len(parents)
    for row, parent in enumerate(parents):
        path[row] = lengths[row] + (path[parent] if parent >= 0 else START)
    fitting = [row for row, reply in enumerate(replies) if reply and path[row] + TAIL <= BLOCK]
    assert [row for row in sorted(trained) if replies[row]] == fitting


@given(trees(), st.integers(BLOCK, 3 * BLOCK))
def test_a_piece_fits_and_holds_all_that_is_above_each_message(drawn: tuple[list[int], list[int]], room: int) -> None:
    parents, lengths = drawn
    for piece in cut_of(parents, lengths, room).pieces:
        assert tokens(piece, parents, lengths) == piece.tokens <= room
        assert parents[piece.rows[0]] == -1
        assert all(parents[row] in piece.rows[:place] for place, row in enumerate(piece.rows) if place)
        assert all(parents[low] == high for high, low in zip(piece.rows, piece.rows[1 : piece.context], strict=False))


@given(trees())
def test_a_piece_is_depth_first(drawn: tuple[list[int], list[int]]) -> None:
    parents, lengths = drawn
    for piece in cut_of(parents, lengths, 2 * BLOCK).pieces:
        open_path: list[int] = []
        for row in piece.rows:
            while open_path and open_path[-1] != parents[row]:
                open_path.pop()
            assert open_path or parents[row] == -1
            open_path.append(row)


@given(trees())
def test_with_room_enough_no_tree_is_divided_and_nothing_repeats(drawn: tuple[list[int], list[int]]) -> None:
    parents, lengths = drawn
    made = cut_of(parents, lengths, room=10_000)
    assert made.divided == 0
    assert all(piece.context == 0 for piece in made.pieces)
    assert len(made.pieces) == made.trees
