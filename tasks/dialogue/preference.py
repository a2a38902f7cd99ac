"""Preferences: replies to one prompt that people put in an order.

Letters: R rows of the data, parents before their children.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Replies to one prompt, ranked.

    Attributes:
        prompt: Row that they answer.
        replies: Their rows, the best first.
        ranks: Their ranks, 0 the best; equal ones are no preference.
    """

    prompt: int
    replies: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """How many pairs of a better and a worse reply there are."""
        return sum(better < worse for place, worse in enumerate(self.ranks) for better in self.ranks[:place])

    def without(self, row: int) -> Group:
        """Return the group without one of its replies."""
        kept = [pair for pair in zip(self.replies, self.ranks, strict=True) if pair[0] != row]
        return Group(self.prompt, tuple(row for row, _ in kept), tuple(rank for _, rank in kept))


def preference_groups(
    children: Sequence[Sequence[int]], replies: Sequence[bool], ranks: Sequence[int | None]
) -> Iterator[Group]:
    """Yield the preference groups in which one reply is better than another, by prompt.

    Args:
        children: (R,) rows of the replies to each row.
        replies: (R,) whether a row is an assistant's.
        ranks: (R,) rank among siblings, 0 the best; None: nobody ranked it.
    """
    for prompt, below in enumerate(children):
        ranked = sorted((rank, row) for row in below if replies[row] and (rank := ranks[row]) is not None)
        found = Group(prompt, tuple(row for _, row in ranked), tuple(rank for rank, _ in ranked))
        if found.pairs:
            yield found
