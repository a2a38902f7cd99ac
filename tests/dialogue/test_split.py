from hashlib import sha256

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from tasks.dialogue.split import draw, split_of, splits

TREES = [f"tree-{number}" for number in range(4_000)]
SHARE = st.floats(0, 0.45)


@given(st.lists(st.text(), min_size=1), st.lists(st.text()))
def test_new_trees_never_move_old_ones(old: list[str], new: list[str]) -> None:
    before = splits(pl.Series(old, dtype=pl.String), 0.2, 0.3).to_list()
    after = splits(pl.Series([*new, *old], dtype=pl.String), 0.2, 0.3).to_list()
    assert after[len(new) :] == before


@given(st.text(), SHARE, SHARE)
def test_a_larger_test_share_lets_no_tree_go(tree: str, small: float, large: float) -> None:
    small, large = sorted((small, large))
    assert split_of(tree, small, 0.1) != "test" or split_of(tree, large, 0.1) == "test"


@given(st.text())
def test_a_share_of_nothing_takes_nothing(tree: str) -> None:
    assert split_of(tree, 0, 0) == "train"
    assert 0 <= draw(tree) < 1


def test_shares_come_out_as_asked() -> None:
    found = splits(pl.Series(TREES), 0.05, 0.1).value_counts(normalize=True)
    share = dict(found.iter_rows())
    assert abs(share["test"] - 0.05) < 0.015  # four standard deviations
    assert abs(share["val"] - 0.1) < 0.02


def test_all_messages_of_a_tree_have_one_split_named_so() -> None:
    found = splits(pl.Series("message_tree_id", ["a", "b", "a", "b"]), 0.5, 0.2)
    assert found.name == "split"
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_the_draw_is_the_hash_that_the_docs_promise() -> None:
    digest = sha256(b"treeline-split:e0cf4fa2-e944-44fb-b502-11f155062092").hexdigest()
    assert abs(draw("e0cf4fa2-e944-44fb-b502-11f155062092") - int(digest, 16) / 2**256) < 1e-15
