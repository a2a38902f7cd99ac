"""Laws of what replies weigh: over 0, 1 together where they share, less by rank; and spread over their tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.gpt.batches import Split
from tasks.gpt.forward import hidden_states
from tasks.gpt.loss_weights import LEAST, LossWeights, weights_of
from tasks.gpt.objective import EachToken
from tasks.gpt.weights import build_start, scratch_spec

CPU = torch.device("cpu")
replies = st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 60)), min_size=1, max_size=40)
decays = st.floats(0.01, 1.0)


def columns(given: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    prompt, rank = np.array(given, np.int64).T
    return prompt, rank


@given(replies, decays, st.booleans())
def test_every_weight_is_over_0_and_at_most_1(given: list[tuple[int, int]], decay: float, shared: bool) -> None:
    weight = weights_of(*columns(given), decay, shared)
    assert weight.dtype == np.float32
    assert ((weight > 0) & (weight <= 1)).all()


@given(replies, decays)
def test_what_answers_one_prompt_weighs_1_together_where_it_shares(given: list[tuple[int, int]], decay: float) -> None:
    prompt, rank = columns(given)
    weight = weights_of(prompt, rank, decay, shared=True)
    for number in np.unique(prompt):
        assert weight[prompt == number].sum() == pytest.approx(1, abs=1e-5)


@given(replies, st.floats(0.01, 0.99), st.booleans())
def test_a_better_reply_never_weighs_less_and_an_unranked_one_as_much_as_the_best(
    given: list[tuple[int, int]], decay: float, shared: bool
) -> None:
    prompt, rank = columns(given)
    weight = weights_of(prompt, rank, decay, shared)
    for number in np.unique(prompt):
        here, order = weight[prompt == number], np.maximum(rank[prompt == number], 0)
        assert (np.diff(here[np.argsort(order, kind="stable")]) <= 0).all()
        assert len(np.unique(here[order == 0])) <= 1


def test_the_weights_are_powers_of_the_decay_scaled_by_prompt() -> None:
    prompt, rank = np.array([7, 7, 7, 9]), np.array([0, 1, 2, -1])
    assert weights_of(prompt, rank, 0.5, shared=False).tolist() == [1, 0.5, 0.25, 1]
    assert weights_of(prompt, rank, 0.5, shared=True).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7, 1])
    assert weights_of(prompt, rank, 1.0, shared=True).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    assert weights_of(prompt, rank * 40, 0.01, shared=False).tolist() == pytest.approx([1, LEAST, LEAST, 1])


# sequence 0 trains tokens 2-3 and 5, sequence 1 nothing, sequence 2 tokens 1-4; sequence 3 nothing
HELD = LossWeights(
    sequence=np.array([0, 0, 2]), start=np.array([1, 4, 0]), stop=np.array([4, 6, 5]), trained=np.array([2, 1, 4]),
    weight=np.array([0.5, 0.25, 2], np.float32),
)  # fmt: skip
MASK = np.array([[0, 0, 1, 1, 0, 1], [0] * 6, [0, 1, 1, 1, 1, 0], [0] * 6], np.uint8)
IDS = np.arange(24).reshape(4, 6) % 16
SPLIT = Split(IDS, MASK, np.tile(np.arange(6), (4, 1)), np.full((4, 6), 6))


def test_a_message_weighs_at_each_of_its_tokens_whatever_the_order_of_the_batch() -> None:
    spread = HELD.spread(np.array([2, 1, 0]), (3, 6))
    assert spread.tolist() == [[2, 2, 2, 2, 2, 0], [0] * 6, [0, 0.5, 0.5, 0.5, 0.25, 0.25]]


def test_the_total_is_the_sum_over_supervised_tokens() -> None:
    for rows in ([0], [2, 0], [1, 3], [3, 2, 1, 0], []):
        chosen = np.array(rows, np.int64)
        assert HELD.total(chosen) == pytest.approx((HELD.spread(chosen, (len(rows), 6)) * MASK[chosen]).sum())


def test_the_objective_weighs_the_loss_in_training_and_never_in_validation() -> None:
    model = build_start(scratch_spec(layers=1, heads=2, width=16, positions=6, vocab_size=16, seed=0)).eval()
    plain, weighed = EachToken(SPLIT, SPLIT), EachToken(SPLIT, SPLIT, HELD)
    each = [plain.loss(model, np.array([row]), 1.0, CPU, hidden_states).item() for row in (0, 2)]
    rows = np.array([2, 3])
    assert weighed.loss(model, rows, 0.5, CPU, hidden_states).item() == pytest.approx(each[1], rel=1e-5)
    assert weighed.weight(rows) == 8
    assert plain.weight(rows) == plain.units(rows) == weighed.units(rows) == 4
    assert plain.measure(model, 2, CPU, hidden_states) == weighed.measure(model, 2, CPU, hidden_states)
    assert weighed.loss(model, np.array([0]), 1.0, CPU, hidden_states).item() < each[0]
