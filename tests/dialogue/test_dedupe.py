from typing import Any

import polars as pl
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.dialogue.dedupe import (
    Likeness,
    duplicates,
    leaks,
    likeness,
    near_duplicates,
    repeated_prompts,
    shared,
)
from tasks.dialogue.minhash import compute
from tasks.dialogue.near_duplicates import Prints
from tasks.dialogue.settings import DuplicateSettings
from tasks.dialogue.tree import parent_rows

Row = tuple[str, str | None, str, dict[str, Any]]  # id, parent, text, other fields
FIELDS = {"split": "train", "rank": None, "label_quality": None}


def table(*rows: Row) -> pl.DataFrame:
    """Lay rows out as one table; whether a message is a prompt follows from its depth, its tree from its root."""
    tree: dict[str, str] = {}
    role: dict[str, str] = {}
    made = []
    for own, parent, text, fields in rows:
        tree[own] = tree[parent] if parent else own
        role[own] = "assistant" if parent and role[parent] == "prompter" else "prompter"
        made.append({"message_tree_id": tree[own], "message_id": own, "parent_id": parent, "text": text,
                     "role": role[own], **FIELDS, **fields})  # fmt: skip
    return pl.DataFrame(made, schema_overrides={"parent_id": pl.String, "rank": pl.Int32, "label_quality": pl.Float32})


def gone(messages: pl.DataFrame) -> dict[str, str]:
    """Return message -> twin that stays."""
    ids = messages["message_id"]
    found = duplicates(messages, prints(messages), parent_rows(messages), [True] * len(messages))
    return {ids[row]: ids[twin] for row, twin in found.items()}


def prints(messages: pl.DataFrame) -> Prints:
    return Prints.of(compute(messages["text"].to_arrow(), 3, 128, 0.8))


def compared(messages: pl.DataFrame, chars: int = 5) -> Likeness:
    limits, every = DuplicateSettings(dedupe_min_chars=chars), [True] * len(messages)
    texts = messages["text"].to_arrow().cast(pa.string())
    return likeness(messages, prints(messages), lambda rows: texts.take(pa.array(rows)), every, limits)


def paths(messages: pl.DataFrame) -> list[tuple[Any, ...]]:
    """Return all that is said from the root to each message, spelled out."""
    found: list[tuple[Any, ...]] = []
    for parent, role, text in zip(parent_rows(messages), messages["role"], messages["text"], strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), role, " ".join(text.casefold().split())))
    return found


def leaked(messages: pl.DataFrame, yielding: Any, chars: int = 5) -> dict[str, str]:
    ids, found = messages["message_id"], leaks(messages, compared(messages, chars), [True] * len(messages), yielding)
    return {ids[row]: ids[twin] for row, (twin, _) in found.items()}


def nearly_gone(messages: pl.DataFrame, chars: int = 5) -> dict[str, tuple[str, float]]:
    """Return message -> (twin that stays, similarity)."""
    ids, alike = messages["message_id"], compared(messages, chars)
    found = near_duplicates(messages, alike, parent_rows(messages), [True] * len(messages))
    return {ids[row]: (ids[twin], round(similarity, 3)) for row, (twin, similarity) in found.items()}


def test_a_tree_told_twice_is_kept_once() -> None:
    assert gone(table(("a", None, "Hi", {}), ("b", "a", "Yes", {}), ("c", None, "hi", {}), ("d", "c", "YES ", {}))) == {
        "c": "a", "d": "b",
    }  # fmt: skip


def test_of_equal_siblings_the_best_rank_then_quality_then_first_stays() -> None:
    low, high = {"rank": 1, "label_quality": 0.9}, {"rank": 0, "label_quality": 0.1}
    assert gone(table(("a", None, "Hi", {}), ("b", "a", "x", low), ("c", "a", "x", high))) == {"b": "c"}
    assert gone(table(("a", None, "Hi", {}), ("b", "a", "x", {}), ("c", "a", "x", {"rank": 3}))) == {"b": "c"}
    poor, fine = {"label_quality": 0.2}, {"label_quality": 0.7}
    assert gone(table(("a", None, "Hi", {}), ("b", "a", "x", poor), ("c", "a", "x", fine))) == {"b": "c"}
    assert gone(table(("a", None, "Hi", {}), ("b", "a", "x", {}), ("c", "a", "x", {}))) == {"c": "b"}


def test_the_same_answer_to_another_question_is_no_duplicate() -> None:
    assert gone(table(("a", None, "1+1?", {}), ("b", "a", "2", {}), ("c", None, "4-2?", {}), ("d", "c", "2", {}))) == {}


def test_a_prompt_asked_again_stays_for_its_new_reply_and_lends_it_nothing_twice() -> None:
    messages = table(
        ("a", None, "Hi", {}), ("b", "a", "Yes", {"rank": 1}),
        ("c", None, "Hi", {}), ("d", "c", "Yes", {"rank": 0}), ("e", "c", "No", {}),
    )  # fmt: skip
    assert gone(messages) == {"d": "b"}  # the better rank loses: below the prompt that stays anyway, trees stay whole


def test_a_reply_said_twice_stays_twice_where_its_followers_differ() -> None:
    messages = table(
        ("a", None, "Hi", {}), ("b", "a", "Yes", {}), ("c", "b", "Why?", {}),
        ("d", "a", "Yes", {}), ("e", "d", "How?", {}), ("f", "d", "why?", {}),
    )  # fmt: skip
    assert gone(messages) == {"f": "c"}


def test_of_twins_in_two_splits_the_more_protected_stays() -> None:
    best = {"rank": 0, "split": "train"}
    messages = table(("a", None, "Hi", best), ("b", None, "Hi", {"split": "val"}), ("c", None, "Hi", {"split": "test"}))
    assert gone(messages) == {"a": "c"}


def test_nothing_goes_from_test_or_val_for_a_copy() -> None:
    for split in ("val", "test"):
        other = {"split": split}
        messages = table(
            ("a", None, "Hi", other), ("b", "a", LONG, other), ("c", None, "hi", other), ("d", "c", LONG, other),
            ("e", None, NEAR, other), ("f", "e", NEAR, other), ("g", None, NEAR, other),
        )  # fmt: skip
        assert gone(messages) == {}
        assert nearly_gone(messages) == {}
        assert not repeated_prompts(messages, compared(messages), parent_rows(messages), [True] * len(messages))


@st.composite
def forests(draw: st.DrawFn) -> pl.DataFrame:
    rows: list[Row] = []
    for number in range(draw(st.integers(1, 14))):
        above = draw(st.sampled_from([None, *(row[0] for row in rows)]))
        fields = {"rank": draw(st.sampled_from([None, 0, 1])), "label_quality": draw(st.sampled_from([None, 0.5]))}
        rows.append((f"m{number}", above, draw(st.sampled_from("xy")), fields))
    return table(*rows)


@settings(deadline=None)
@given(forests())
def test_no_path_is_lost_no_message_is_orphaned_and_a_second_pass_finds_nothing(messages: pl.DataFrame) -> None:
    parents = parent_rows(messages)
    keys = paths(messages)
    found = duplicates(messages, prints(messages), parents, [True] * len(messages))
    stays = [row for row in range(len(messages)) if row not in found]
    assert {keys[row] for row in stays} == set(keys)
    assert all(parents[row] < 0 or parents[row] not in found for row in stays)
    assert all(twin not in found and keys[twin] == keys[row] for row, twin in found.items())
    assert gone(messages[stays]) == {}


def test_a_first_prompt_in_two_splits_goes_from_the_less_protected() -> None:
    messages = table(("a", None, "Hi", {}), ("b", None, "HI", {"split": "val"}), ("c", None, "hi", {"split": "test"}))
    assert leaked(messages, "val") == {"b": "c"}
    assert leaked(messages, "train") == {"a": "b"}


def test_a_reply_or_a_later_prompt_leaks_only_where_it_is_long() -> None:
    long, test = "a reply of some length", {"split": "test"}
    messages = table(
        ("a", None, "1", {}), ("b", "a", long, {}), ("c", "b", long, {}), ("d", "a", "two", {}),
        ("e", None, "2", test), ("f", "e", long, test), ("g", "f", long, test), ("h", "e", "two", test),
    )  # fmt: skip
    assert leaked(messages, "train") == {"b": "f", "c": "g"}
    assert leaked(messages, "train", chars=3) == {"b": "f", "c": "g", "d": "h"}
    assert leaked(messages, "train", chars=100) == {}


def test_a_long_later_prompt_leaks_nearly_too_and_to_a_first_one_and_a_short_follow_up_never() -> None:
    test = {"split": "test"}
    rows: list[Row] = [("a", None, "1", {}), ("b", "a", "two", {}), ("c", "b", LONG, {}), ("d", "b", "thanks", {})]
    later: list[Row] = [("f", "e", "three", test), ("g", "f", NEAR, test), ("h", "f", "thanks", test)]
    assert leaked(table(*rows, ("e", None, "2", test), *later), "train", chars=20) == {"c": "g"}
    assert leaked(table(*rows, ("e", None, NEAR, test)), "train", chars=20) == {"c": "e"}


def test_within_a_split_a_later_prompt_never_goes_for_its_text_nor_makes_a_first_one_go() -> None:
    messages = table(
        ("a", None, "1", {}), ("b", "a", "two", {}), ("c", "b", LONG, {}), ("d", "c", "four", {}),
        ("e", None, "2", {}), ("f", "e", "three", {}), ("g", "f", NEAR, {}), ("h", "g", "five", {}),
        ("i", None, LONG, {}),
    )  # fmt: skip
    parents, every = parent_rows(messages), [True] * len(messages)
    assert nearly_gone(messages, chars=20) == {}
    assert repeated_prompts(messages, compared(messages, chars=20), parents, every) == {}


def test_a_prompt_that_is_a_reply_elsewhere_does_not_leak() -> None:
    messages = table(("a", None, "same words", {}), ("b", None, "2", {"split": "test"}), ("c", "b", "same words", {}))
    assert leaked(messages, "train") == {}


# ---- near copies

LONG = "one two three four five six seven eight nine ten eleven twelve"
NEAR = f"{LONG} thirteen"  # 10 n-grams of 11
FAR = "something else altogether is what this reply says to whoever asked it"


def test_of_near_copies_the_best_rank_then_quality_stays_and_similarity_is_told() -> None:
    low, high = {"rank": 1, "label_quality": 0.9}, {"rank": 0, "label_quality": 0.1}
    messages = table(("a", None, "1", {}), ("b", "a", LONG, low), ("c", None, "2", {}), ("d", "c", NEAR, high))
    assert nearly_gone(messages) == {"b": ("d", 0.909)}
    poor, fine = {"label_quality": 0.2}, {"label_quality": 0.7}
    messages = table(("a", None, "1", {}), ("b", "a", LONG, poor), ("c", "a", NEAR, fine))
    assert nearly_gone(messages) == {"b": ("c", 0.909)}


def test_short_replies_are_never_copies_by_their_own_text() -> None:
    messages = table(("a", None, "1", {}), ("b", "a", LONG, {}), ("c", None, "2", {}), ("d", "c", LONG, {}))
    assert nearly_gone(messages) == {"d": ("b", 1.0)}
    assert nearly_gone(messages, chars=len(LONG) + 1) == {}


def test_a_near_copy_stays_where_another_reply_below_it_stays() -> None:
    messages = table(
        ("a", None, "1", {}), ("b", "a", LONG, {}), ("c", None, "2", {}), ("d", "c", NEAR, {}), ("e", "d", "More!", {}),
        ("f", "e", FAR, {}),
    )  # fmt: skip
    assert nearly_gone(messages) == {}
    assert nearly_gone(messages[:-1]) == {"d": ("b", 0.909)}


def test_a_reply_may_repeat_one_of_its_own_conversation_but_not_its_sibling() -> None:
    messages = table(("a", None, "1", {}), ("b", "a", LONG, {}), ("c", "b", "Longer!", {}), ("d", "c", NEAR, {}))
    assert nearly_gone(messages) == {}
    assert nearly_gone(table(("a", None, "1", {}), ("b", "a", LONG, {}), ("c", "a", NEAR, {}))) == {"c": ("b", 0.909)}


def test_a_first_prompt_goes_with_its_replies_and_names_a_prompt_like_it() -> None:
    messages = table(("a", None, LONG, {}), ("b", "a", FAR, {}), ("c", None, NEAR, {}), ("d", "c", f"{FAR} now", {}))
    assert nearly_gone(messages) == {"c": ("a", 0.909), "d": ("b", 0.909)}
    messages = table(("a", None, LONG, {}), ("b", "a", FAR, {}), ("c", None, NEAR, {}), ("d", "c", LONG, {}))
    assert nearly_gone(messages) == {}


def test_a_prompt_that_repeats_can_go_whatever_stands_below_it() -> None:
    messages = table(("a", None, LONG, {}), ("b", "a", "x", {}), ("c", None, NEAR, {}), ("d", "c", "y", {}))
    found = repeated_prompts(messages, compared(messages), parent_rows(messages), [True] * 4)
    assert found == {2: (0, 10 / 11)}


def test_a_near_copy_in_two_splits_goes_from_the_less_protected() -> None:
    messages = table(
        ("a", None, LONG, {}), ("b", "a", FAR, {}),
        ("c", None, NEAR, {"split": "test"}), ("d", "c", f"{FAR} now", {"split": "test"}),
    )  # fmt: skip
    assert leaked(messages, "train") == {"a": "c", "b": "d"}
    assert shared(compared(messages), messages["split"].to_list(), [True] * 4) == {0, 1, 2, 3}
    assert shared(compared(messages), messages["split"].to_list(), [True, True, False, False]) == set()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)))
def test_the_order_of_the_trees_does_not_decide_which_near_copy_stays(order: list[int]) -> None:
    texts = [LONG, NEAR, f"zero {LONG}", FAR, f"{FAR} now", f"{FAR} and then"]
    trees: list[tuple[Row, Row]] = [
        ((f"p{at:02}", None, f"{at}", {}), (f"r{at:02}", f"p{at:02}", texts[at % 6], {"rank": at % 2}))
        for at in range(12)
    ]
    mixed = table(*(row for at in order for row in trees[at]))
    assert nearly_gone(mixed) == nearly_gone(table(*(row for tree in trees for row in tree)))
