import random
from itertools import product
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from tasks.dialogue.dedupe import Likeness, likeness
from tasks.dialogue.leakage import Compared, crossing
from tasks.dialogue.minhash import compute
from tasks.dialogue.near_duplicates import Prints
from tasks.dialogue.settings import PROTECTION, DuplicateSettings

SPLITS = ("train", "train", "train", "val", "test")


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}


def jaccard(one: str, other: str) -> float:
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


def prompts(texts: list[str], splits: list[str]) -> tuple[Compared, Likeness]:
    """Lay out first prompts, one a tree."""
    table = pl.DataFrame({"parent_id": pl.Series([None] * len(texts), dtype=pl.String), "role": "prompter"})
    column, limits = pa.array(texts), DuplicateSettings()
    prints = Prints.of(compute(column, 3, 128, 0.8))

    def texts_of(rows: Any) -> pa.Array:
        assert (rows[1:] > rows[:-1]).all()
        return column.take(pa.array(rows))

    alike = likeness(table, prints, texts_of, [True] * len(texts), limits)
    replies = (table["role"] == "assistant").to_numpy()
    return Compared(replies, pl.Series(splits), prints, texts_of, limits), alike


def crowd(count: int) -> list[str]:
    """Write texts of thirty words that differ in one or in several."""
    draw = random.Random(0)
    base = [f"w{at}" for at in range(30)]
    texts = []
    for number in range(count):
        words = list(base)
        for at in draw.sample(range(30), draw.choice([0, 1, 1, 2, 3])):
            words[at] = f"x{draw.randrange(4)}"
        texts.append(" ".join([*words, f"n{number % 97}"]))
    return texts


@pytest.mark.parametrize("small", [0, 1 << 12])
def test_what_crosses_is_what_comparing_every_pair_finds(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.dialogue.leakage._SMALL", small)
    monkeypatch.setattr("tasks.dialogue.leakage._BLOCK", 50)
    texts = crowd(400)
    splits = [random.Random(number).choice(SPLITS) for number in range(len(texts))]
    given, alike = prompts(texts, splits)
    assert alike.crowded
    kept = [number % 10 != 0 for number in range(len(texts))]
    for yielding in PROTECTION[1:]:
        guards = PROTECTION[: PROTECTION.index(yielding)]
        every = {
            (one, other): jaccard(texts[one], texts[other])
            for one, other in product(range(len(texts)), repeat=2)
            if kept[one] and kept[other] and splits[one] == yielding and splits[other] in guards
        }
        found = crossing(given, alike, kept, yielding)
        assert set(found) == {one for (one, _), index in every.items() if index >= 0.8}
        assert all(every[row, twin] == pytest.approx(index) for row, (twin, index) in found.items())
        assert 0 < len(found) < splits.count(yielding)


def test_where_more_guards_share_a_bucket_than_can_be_compared_all_that_yields_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.dialogue.leakage._SMALL", 0)
    monkeypatch.setattr("tasks.dialogue.leakage._MOST", 3)
    texts = [" ".join([*(f"w{at}" for at in range(40)), f"name{number}"]) for number in range(60)]
    given, alike = prompts(texts, ["test"] * 4 + ["train"] * 56)
    assert set(crossing(given, alike, [True] * 60, "train")) == set(range(4, 60))
    assert crossing(given, alike, [True] * 60, "val") == {}


def test_a_prompt_does_not_cross_to_a_reply() -> None:
    given, alike = prompts(["the same words"] * 2, ["test", "train"])
    assert crossing(given, alike, [True, True], "train") == {1: (0, 1.0)}
    given.replies[1] = True
    assert crossing(given, alike, [True, True], "train") == {}
