"""Laws of naming: equal values have one text, and the text never changes between releases."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.store.canonical import canonical, sha256_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON))
def test_the_order_of_names_does_not_matter(value: dict[str, Any]) -> None:
    try:
        canonical(value)
    except UnicodeEncodeError:
        return  # a lone surrogate has no UTF-8, so no key
    assert canonical(dict(reversed(value.items()))) == canonical(value)


def test_a_number_that_is_not_finite_has_no_key() -> None:
    pytest.raises(ValueError, canonical, {"lr": float("nan")})


def test_the_golden_key_never_changes() -> None:
    """If this fails, every artifact of every user is lost to the cache. That had better be worth it."""
    recipe = {
        "step": "encode", "version": 3, "params": {"block": 1024, "layout": "tree", "lr": 3e-05, "name": "é"},
        "inputs": {"dialogues": "0" * 64},
    }  # fmt: skip
    assert sha256_of(recipe) == "c8cb5ac46feccc8ebe39bb1a4ffc6c9b7fc2aa86f212fe505d61b840e37c46b6"
