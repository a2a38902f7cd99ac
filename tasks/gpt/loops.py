"""Loops: whether a reply has got stuck and says one and the same again and again."""

from __future__ import annotations

from collections.abc import Sequence

REPEATS = 4  # times in a row that the last tokens are said: a poem has its refrain, a list its "and then"
SPAN = 32  # tokens that they take together: a rule of dashes, "ha ha ha" and an indentation are shorter


def looping(ids: Sequence[int]) -> bool:
    """Tell whether tokens end in an n-gram that stands there REPEATS times in a row or more, over SPAN tokens or more.

    Args:
        ids: Token ids of a reply; a list, or whatever slices as fast and compares by value.
    """
    for size in range(1, len(ids) // REPEATS + 1):
        span = max(REPEATS * size, SPAN)
        if span > len(ids):
            return False
        # The first comparison settles nearly all sizes; the second says that all of the span has this period.
        if ids[-1] == ids[-1 - size] and ids[len(ids) - span + size :] == ids[len(ids) - span : len(ids) - size]:
            return True
    return False
