from __future__ import annotations

import json
from typing import Any

import numpy as np
import polars as pl
import pytest

from tasks.dialogue.texts import opening, own_words


def messages(*extras: Any, parent: str | None = None) -> pl.LazyFrame:
    texts = [None if extra is None else extra if isinstance(extra, str) else json.dumps(extra) for extra in extras]
    return pl.LazyFrame(
        {"parent_id": [parent] * len(texts), "extra": texts}, dict.fromkeys(("parent_id", "extra"), pl.String)
    )


def test_own_words_open_where_extra_says_so() -> None:
    opens = opening(messages(None, {"chars": 7, "other": "x"}, {"other": 3}), "chars")
    assert opens is not None
    assert opens.tolist() == [0, 7, 0]


DEEP = "[" * 250 + "]" * 250


@pytest.mark.parametrize("said", [-3, 0, 1.5, True, None, "x", [], {}, 10**30, 1e300, {"chars": 4}])
def test_no_sense_in_extra_is_no_opening(said: Any) -> None:
    assert opening(messages({"chars": said}, {"x": {"chars": 5}}, '{"chars":', DEEP), "chars") is None


def test_only_first_prompts_have_an_opening() -> None:
    assert opening(messages({"chars": 7}, parent="p"), "chars") is None
    assert opening(messages(), "chars") is None


@pytest.mark.parametrize(
    ("text", "start", "own"),
    [
        ("s\n\nu", 3, "u"), ("\U0001f600\n\nu", 3, "u"), ("s\n\nt\n\nu", 3, "t\n\nu"), ("s\n\nt\n\nu", 6, "u"),
        ("s\n\nu", 2, "s\n\nu"), ("s\n\nu", 4, "s\n\nu"), ("s\n\n", 3, "s\n\n"), ("s\n\nu", 10**8, "s\n\nu"),
        ("", 1, ""),
    ],
)  # fmt: skip
def test_what_stands_before_goes_only_where_an_empty_line_parts_it_from_what_follows(
    text: str, start: int, own: str
) -> None:
    texts = pl.Series(["before", text, "after"])
    assert own_words(texts, np.array([0, start, 0])).to_list() == ["before", own, "after"]
