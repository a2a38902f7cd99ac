"""The split of a tree: a hash of its id decides, so that new data never moves an old tree."""

from __future__ import annotations

from hashlib import sha256

import polars as pl

from tasks.dialogue.settings import Split

_SALT = "treeline-split:"  # other programs hash tree ids, too; a draw of our own is independent of theirs


def draw(tree: str) -> float:
    """Return the number that decides a tree's split, uniform in [0, 1)."""
    head = sha256((_SALT + tree).encode("utf-8", "surrogatepass")).digest()[:8]
    return (int.from_bytes(head, "big") >> 11) / 2**53  # 53 bits: all that a float holds, so it never rounds to 1


def split_of(tree: str, test_fraction: float, val_fraction: float) -> Split:
    """Return the split of a tree; a larger share takes trees in and lets none go."""
    number = draw(tree)
    if number < test_fraction:
        return "test"
    return "val" if number < test_fraction + val_fraction else "train"


def splits(trees: pl.Series, test_fraction: float, val_fraction: float) -> pl.Series:
    """Return the split of each message from its tree's id: (N,) string, named `split`."""
    names = trees.unique().to_list()
    chosen = [split_of(name, test_fraction, val_fraction) for name in names]
    return trees.replace_strict(names, chosen, return_dtype=pl.String).rename("split")


def in_order(count: int, test_fraction: float, val_fraction: float) -> list[Split]:
    """Return the splits of rows cut in the order of a file, train first, as many programs do; for comparison."""
    cuts = (count * (1 - test_fraction - val_fraction), count * (1 - test_fraction))
    return ["train" if row < cuts[0] else "val" if row < cuts[1] else "test" for row in range(count)]
