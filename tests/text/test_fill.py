from collections.abc import Sequence
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from tasks.text.fill import fill
from tasks.text.pack import best_fit
from tasks.text.split_trees import Piece, Sizes, cut
from tests.text.test_split_trees import BLOCK, START, TAIL, in_turns, tokens, tree, trees

Drawn = tuple[list[int], list[int]]
rooms = st.integers(BLOCK, 3 * BLOCK)


def pieces_of(parents: Sequence[int], lengths: Sequence[int], room: int) -> tuple[list[Piece], list[list[Piece]]]:
    """Return trees as they are cut, and as they fill sequences."""
    sizes, trees = Sizes(lengths, START, TAIL, BLOCK, room), tree(parents)
    pieces = cut(trees, in_turns(parents), sizes).pieces
    return pieces, fill(pieces, trees, sizes)


def test_a_piece_is_divided_where_a_part_of_it_fills_the_room_beside_another() -> None:
    # Three trees of a prompt (2) and four replies (3 each), 20 tokens with start and tails; a sequence has 30. One fits
    # with two replies of the next, whose other two, and the third tree, then share a sequence.
    parents = [-1, 0, 0, 0, 0, -1, 5, 5, 5, 5, -1, 10, 10, 10, 10]
    pieces, filled = pieces_of(parents, [2, 3, 3, 3, 3] * 3, 30)
    assert [piece.tokens for piece in pieces] == [20, 20, 20]
    assert filled == [
        [Piece((0, 1, 2, 3, 4), 20)],
        [Piece((5, 6, 7, 8, 9), 20)],
        [Piece((10, 11, 12, 13, 14), 20)],
    ]  # with less room, nothing is saved: context takes it up
    _, filled = pieces_of(parents, [2, 3, 3, 3, 3] * 3, 32)
    assert filled == [
        [Piece((0, 1, 2, 3, 4), 20), Piece((5, 6, 7), 12)],
        [Piece((5, 8, 9), 12, context=1), Piece((10, 11, 12, 13, 14), 20)],
    ]


@given(trees(), rooms)
def test_each_message_is_trained_where_it_was_and_once(drawn: Drawn, room: int) -> None:
    pieces, filled = pieces_of(*drawn, room)
    before, after = (
        sorted(row for piece in some for row in piece.rows[piece.context :])
        for some in (pieces, list(chain.from_iterable(filled)))
    )
    assert before == after


@given(trees(), rooms)
def test_what_fills_a_sequence_fits_and_holds_all_that_is_above_each_message(drawn: Drawn, room: int) -> None:
    parents, lengths = drawn
    for pieces in pieces_of(parents, lengths, room)[1]:
        assert sum(piece.tokens for piece in pieces) <= room
        for piece in pieces:
            assert tokens(piece, parents, lengths) == piece.tokens
            assert parents[piece.rows[0]] == -1
            assert all(
                parents[low] == high for high, low in zip(piece.rows, piece.rows[1 : piece.context], strict=False)
            )
            open_path: list[int] = []
            for row in piece.rows:
                while open_path and open_path[-1] != parents[row]:
                    open_path.pop()
                assert open_path or parents[row] == -1
                open_path.append(row)


@given(trees(), rooms)
def test_nothing_is_divided_unless_that_saves_a_sequence(drawn: Drawn, room: int) -> None:
    pieces, filled = pieces_of(*drawn, room)
    packed = best_fit([piece.tokens for piece in pieces], room)
    assert len(filled) <= len(packed)
    if len(filled) == len(packed):
        assert filled == [[pieces[number] for number in numbers] for numbers in packed]


@given(trees(), rooms)
def test_sequences_and_pieces_stand_in_the_order_of_the_trees(drawn: Drawn, room: int) -> None:
    _, filled = pieces_of(*drawn, room)
    first_trained = [[piece.rows[piece.context] for piece in pieces] for pieces in filled]
    roots = [[piece.rows[0] for piece in pieces] for pieces in filled]
    assert all(some == sorted(some) for some in roots)
    assert len(set(chain.from_iterable(first_trained))) == sum(map(len, filled))


def test_a_tree_of_30_000_leaves_is_filled() -> None:
    count = 30_000
    pieces, filled = pieces_of([-1] + [0] * count, [1] * (count + 1), BLOCK)
    assert sum(len(piece.rows) - piece.context for piece in chain.from_iterable(filled)) == count + 1
    assert len(filled) <= len(pieces)
