import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.text.assemble import Laid, Texts, lay, turns
from tasks.text.pack import best_fit
from tasks.text.templates import Tags

BLOCK, PAD = 32, 9
TAGS = Tags([1], {"user": [2], "assistant": [3, 4]}, {"user": [5], "assistant": [6]}, [7])
talks = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=6)


def spelled(texts: list[list[int]]) -> list[tuple[int, int]]:
    """Write a talk out, a user's text first, one token after another: (id, mask)."""
    made = [(1, 0)]
    for place, text in enumerate(texts):
        reply = place % 2
        made += [(token, 0) for token in ([2], [3, 4])[reply]]
        made += [(token, reply) for token in [*text, (5, 6)[reply]]]
    return [*made, (7, 0)]


def laid(sizes: list[list[int]], window: int) -> tuple[Laid, list[list[list[tuple[int, int]]]]]:
    """Lay talks of texts of these sizes; return them beside the same, written out, by sequence."""
    lengths = np.array([size for talk in sizes for size in talk])
    ids = [np.full(size, 100 + row, np.uint16) for row, size in enumerate(lengths)]
    pieces = [range(first, min(first + window, len(ids))) for first in range(0, len(ids), window)]
    starts = np.concatenate([np.cumsum(lengths[piece]) - lengths[piece] for piece in pieces])
    texts = Texts(window, [np.concatenate([ids[row] for row in piece]) for piece in pieces], starts, lengths)
    stops = np.cumsum([len(talk) for talk in sizes]).tolist()
    rows = [tuple(range(stop - len(talk), stop)) for talk, stop in zip(sizes, stops, strict=True)]
    replies = np.array([place % 2 == 1 for talk in sizes for place in range(len(talk))])
    spoken = [spelled([ids[row].tolist() for row in talk]) for talk in rows]
    packed = best_fit([len(talk) for talk in spoken], BLOCK)
    parents = np.array([row - 1 if place else -1 for talk in rows for place, row in enumerate(talk)])
    placed = turns(rows, [0] * len(rows), packed, parents, replies, lengths, TAGS)
    return lay(placed, texts, TAGS, 0, len(packed), BLOCK, PAD), [[spoken[talk] for talk in talks] for talks in packed]


def test_a_sequence_isolates_its_conversations_and_pads_the_rest() -> None:
    made, _ = laid([[2, 1], [0]], window=2)
    assert made.ids[:17].tolist() == [1, 2, 100, 100, 5, 3, 4, 101, 6, 7, 1, 2, 5, 7, PAD, PAD, PAD]
    assert made.mask[:17].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert made.positions[:17].tolist() == [*range(10), *range(4), 0, 0, 0]
    assert made.ends[:17].tolist() == [10] * 10 + [14] * 4 + [15, 16, 17]
    assert [array.dtype for array in (made.ids, made.mask, made.positions, made.ends)] == [
        np.uint16, np.uint8, np.uint16, np.uint16,
    ]  # fmt: skip


@given(talks, st.integers(1, 5))
def test_columns_write_what_a_loop_over_tokens_writes(sizes: list[list[int]], window: int) -> None:
    made, sequences = laid(sizes, window)
    for number, spoken in enumerate(sequences):
        flat = [token for talk in spoken for token in talk]
        here = slice(number * BLOCK, (number + 1) * BLOCK)
        rest = BLOCK - len(flat)
        assert made.ids[here].tolist() == [token for token, _ in flat] + [PAD] * rest
        assert made.mask[here].tolist() == [target for _, target in flat] + [0] * rest
        assert made.positions[here].tolist() == [place for talk in spoken for place in range(len(talk))] + [0] * rest


@given(talks)
def test_a_token_sees_what_came_before_it_in_its_conversation_and_nothing_else(sizes: list[list[int]]) -> None:
    made, sequences = laid(sizes, 4)
    for number, spoken in enumerate(sequences):
        talk_of = [talk for talk, tokens in enumerate(spoken) for _ in tokens]
        talk_of += [1_000 + place for place in range(BLOCK - len(talk_of))]
        ends = made.ends[number * BLOCK :]
        for query in range(BLOCK):
            for key in range(BLOCK):
                assert (key <= query < ends[key]) == (key <= query and talk_of[key] == talk_of[query])


def test_a_tree_is_laid_once_and_its_context_is_not_trained() -> None:
    #  0 -> 1 -> 2,  0 -> 3: laid as a whole; then 0 as context of 3 alone
    lengths, replies = np.array([1, 1, 0, 2]), np.array([False, True, False, True])
    ids = np.concatenate([np.full(size, 100 + row, np.uint16) for row, size in enumerate(lengths)])
    texts = Texts(4, [ids], np.cumsum(lengths) - lengths, lengths)
    whole, part = (0, 1, 2, 3), (0, 3)
    placed = turns([whole, part], [0, 1], [[0], [1]], np.array([-1, 0, 1, 0]), replies, lengths, TAGS)
    made = lay(placed, texts, TAGS, 0, 2, BLOCK, PAD)
    #                        0            1            2          3
    expected = [1, 2, 100, 5, 3, 4, 101, 6, 2, 5, 7, 3, 4, 103, 103, 6, 7]
    assert made.ids[:17].tolist() == expected
    assert made.mask[:17].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0]
    assert made.positions[:17].tolist() == [*range(11), *range(4, 10)]
    assert made.ends[:17].tolist() == [17] * 4 + [11] * 7 + [17] * 6
    assert placed.parent.tolist() == [-1, 0, 1, 0, -1, 4]
    assert made.ids[BLOCK : BLOCK + 10].tolist() == [1, 2, 100, 5, 3, 4, 103, 103, 6, 7]
    again = turns([whole, part], [0, 2], [[0, 1]], np.array([-1, 0, 1, 0]), replies, lengths, TAGS)
    assert again.trained.tolist() == [0, 2, 0, 3, 0, 0]
    assert again.start.tolist()[4:] == [17, 21]
