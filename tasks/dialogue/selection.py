"""Selection: which threads of a tree are learnt from, where a fault spoils more than the message that has it."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.dialogue.tree import holds, is_below


def in_whole_threads(
    parents: Sequence[int], replies: Sequence[bool], siblings: Sequence[int], kept: Sequence[bool]
) -> list[bool]:
    """Return whether a whole thread goes through each message: (N,).

    A thread goes from a root to a leaf and is whole if all of its messages are kept. One that ends on a prompt counts
    only for the first of its siblings: the others end, without their prompts, like it.

    Args:
        parents: (N,) row of each parent, -1 at a root.
        replies: (N,) whether a message is an assistant's.
        siblings: (N,) place of a message among its siblings as published, from 0.
        kept: (N,) whether the rules left it.

    Source: Open-Assistant, model_training/custom_datasets/oasst_dataset.py, `load_oasst_export`.
    """
    gone = [not stays for stays in kept]
    faulty = is_below(parents, gone)
    leaf = [True] * len(parents)
    for parent in parents:
        if parent >= 0:
            leaf[parent] = False
    ends = [
        leaf[row] and parent >= 0 and kept[row] and not faulty[row] and (replies[row] or siblings[row] == 0)
        for row, parent in enumerate(parents)
    ]
    return holds(parents, ends)
