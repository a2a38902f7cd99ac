"""Trees and messages as rows: every field kept, every fault named, any depth."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from tasks.artifacts import DETOXIFY, LABELS, MESSAGE_COLUMNS
from tasks.oasst.strict_reader import Layout, arrange, messages_in
from tasks.oasst.validators import TOO_DEEP, Fault, instant


def layout(max_text: int = 1_000) -> Layout:
    return Layout(LABELS, DETOXIFY, max_text)


def message(name: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    role = "assistant" if name.startswith("a") else "prompter"
    return {"message_id": name, "text": f"text of {name}", "role": role, "replies": list(replies), **fields}


def tree(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": prompt, **fields}


def table(published: dict[str, Any]) -> list[dict[str, Any]]:
    made = layout()
    return [dict(zip(made.columns, row, strict=True)) for row in arrange(made.rows_of(published))]


def flat_table(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = layout()
    return [dict(zip(made.columns, row, strict=True)) for row in arrange([made.row_of(one) for one in messages])]


def flat(name: str, parent: str | None) -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "text": name, "role": "prompter", "message_tree_id": "t"}


def fault(published: dict[str, Any]) -> Fault:
    with pytest.raises(Fault) as caught:
        table(published)
    return caught.value


def test_a_row_has_the_columns_of_the_messages_artifact_in_their_order() -> None:
    assert layout().columns == tuple(MESSAGE_COLUMNS)


def test_rows_come_depth_first_parents_before_replies_in_the_order_published() -> None:
    prompt = message("p", message("a1", message("p2"), message("p3")), message("a2"))
    rows = table(tree(prompt))
    assert [(row["message_id"], row["parent_id"], row["depth"], row["sibling"]) for row in rows] == [
        ("p", None, 0, 0), ("a1", "p", 1, 0), ("p2", "a1", 2, 0), ("p3", "a1", 2, 1), ("a2", "p", 1, 1),
    ]  # fmt: skip


def test_every_published_field_is_kept() -> None:
    published = message(
        "p", user_id="u", created_date="2023-02-07T19:29:24.727400+02:00", lang="pt-BR", review_count=3,
        review_result=False, deleted=True, rank=2, synthetic=True, model_name="m", emojis={"+1": 2, "_skip_reply": 1},
        labels={"spam": {"value": 0.25, "count": 4}, "humor": {"value": 1, "count": 1}},
        detoxify={"toxicity": 0.5, "insult": 0}, events={"e": [1]},
    )  # fmt: skip
    (row,) = table(tree(published, origin="https://example.org"))
    filled = {name: value for name, value in row.items() if value is not None}
    assert filled == {
        "message_tree_id": "t", "message_id": "p", "tree_state": "ready_for_export", "depth": 0, "sibling": 0,
        "user_id": "u", "created_date": datetime(2023, 2, 7, 17, 29, 24, 727400, tzinfo=UTC), "text": "text of p",
        "role": "prompter", "lang": "pt-BR", "review_count": 3, "review_result": False, "deleted": True, "rank": 2,
        "synthetic": True, "model_name": "m", "emojis": [("+1", 2), ("_skip_reply", 1)],
        "label_spam": 0.25, "label_spam_count": 4, "label_humor": 1.0, "label_humor_count": 1,
        "detoxify_toxicity": 0.5, "detoxify_insult": 0.0, "events": '{"e":[1]}', "origin": '"https://example.org"',
    }  # fmt: skip


def test_a_field_that_is_null_reads_as_one_that_is_absent() -> None:
    names = (*Layout((), ()).columns[6:17], "emojis", "labels", "detoxify", "events", "origin")
    nulls = {name: None for name in names if name not in ("text", "role")}
    assert table(tree(message("p", **nulls), origin=None)) == table(tree(message("p")))
    bare = {"prompt": {"message_id": "t", "text": "", "role": "prompter"}}
    assert table(bare)[0]["message_tree_id"] == "t"


def test_labels_and_emojis_may_come_as_lists_the_hubs_way() -> None:
    names = {"labels": {"spam": {"value": 0.5, "count": 2}, "pii": {"value": 0.0, "count": 1}}, "emojis": {"+1": 3}}
    lists = {
        "labels": {"name": ["spam", "pii"], "value": [0.5, 0.0], "count": [2, 1]},
        "emojis": {"name": ["+1"], "count": [3]},
    }
    assert table(tree(message("p", **lists))) == table(tree(message("p", **names)))


def test_unknown_fields_are_counted_and_kept() -> None:
    made = layout()
    published = message("p", mood="good", labels={"spam": {"value": 0, "count": 1, "by": "x"}, "new": {"value": 3}})
    (row,) = made.rows_of(tree(published, version=2))
    assert orjson.loads(row[-1]) == {
        "mood": "good", "labels": {"new": {"value": 3}, "spam": {"by": "x"}}, "tree.version": 2,
    }  # fmt: skip
    assert made.unknown == {"mood": 1, "labels.new": 1, "labels.spam.by": 1, "tree.version": 1}


def test_names_of_unknown_fields_cannot_fill_the_counts() -> None:
    made = layout()
    for n in range(300):
        made.rows_of(tree(message("p", **{f"field{n}": 1})))
    assert len(made.unknown) == 101
    assert made.unknown["(others)"] == 200


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"text": 5}, "schema.text", "expected string, got integer 5, in message string 'a'"),
        ({"text": None}, "schema.text", "got null"),
        ({"text": []}, "schema.text", "got array"),
        ({"text": "x" * 1_001}, "text.too_long", "at most 1,000 bytes of text, got 1,001"),
        ({"text": "\N{PILE OF POO}" * 251}, "text.too_long", "got 1,004"),
        ({"role": "system"}, "schema.role", "prompter or assistant, got string 'system'"),
        ({"role": ["prompter"]}, "schema.role", "got array"),
        ({"message_id": None}, "schema.message_id", "got null"),
        ({"message_id": ""}, "schema.message_id", "not empty"),
        ({"lang": ""}, "schema.lang", "not empty"),
        ({"rank": -1}, "schema.rank", "from 0 to 2147483647, got integer -1"),
        ({"rank": True}, "schema.rank", "got boolean"),
        ({"review_count": 2**31}, "schema.review_count", "got integer"),
        ({"review_count": 1.5}, "schema.review_count", "got number 1.5"),
        ({"review_result": 1}, "schema.review_result", "expected boolean"),
        ({"deleted": "no"}, "schema.deleted", "expected boolean"),
        ({"created_date": "2023-02-30T00:00:00Z"}, "schema.created_date", "ISO 8601"),
        ({"labels": [1]}, "schema.labels", "expected object, got array"),
        ({"labels": {"spam": 0.5}}, "schema.labels", "spam as object"),
        ({"labels": {"spam": {"value": 1.5}}}, "schema.labels", "from 0 to 1, got number 1.5"),
        ({"labels": {"name": ["spam"], "value": []}}, "schema.labels", "as long as name"),
        ({"labels": {"name": [["spam"]], "value": [1], "count": [1]}}, "schema.labels", "names as strings"),
        ({"emojis": {"+1": "many"}}, "schema.emojis", "got string 'many'"),
        ({"detoxify": {"toxicity": "high"}}, "schema.detoxify", "got string"),
        ({"replies": {}}, "schema.replies", "expected array"),
        ({"replies": [7]}, "schema.replies", "expected objects, got integer"),
        ({"parent_id": "elsewhere"}, "tree.parent", "expected parent_id string 'p', got string 'elsewhere'"),
        ({"message_tree_id": "other"}, "tree.id", "expected message_tree_id string 't'"),
    ],
)
def test_a_bad_field_of_one_message_refuses_the_tree(fields: dict[str, Any], code: str, words: str) -> None:
    found = fault(tree(message("p", message("a", **fields))))
    assert found.code == code
    assert words in found.message


@pytest.mark.parametrize(
    ("published", "code"),
    [
        (tree(None), "schema.prompt"),
        (tree([]), "schema.prompt"),
        (tree(message("p"), message_tree_id=5), "schema.message_tree_id"),
        (tree(message("p", parent_id="x")), "tree.root"),
        (tree(message("p"), tree_state=5), "schema.tree_state"),
        (tree(message("p", message("a"), message("a", text="other"))), "id.duplicate"),
    ],
)
def test_a_bad_tree_is_refused(published: dict[str, Any], code: str) -> None:
    assert fault(published).code == code


@pytest.mark.parametrize(
    "text",
    [
        "2023-02-07",
        "2023-W06-2T17:29:24Z",
        "20230207T172924Z",
        "2023-02-07x17:29:24Z",
        "2023-02-07T17:29:24.1234567Z",  # more than a microsecond can say
        "0001-01-01T00:00:00+01:00",  # before the year 1 in UTC
        "2023-02-07T25:00:00Z",
        " 2023-02-07T17:29:24Z",
        "٢٠٢٣-02-07T17:29:24Z",
    ],
)
def test_an_instant_is_a_date_a_time_and_an_offset_and_nothing_else(text: str) -> None:
    with pytest.raises(Fault, match="created_date"):
        instant("created_date", text)


def test_an_instant_without_an_offset_is_one_of_utc_and_counted() -> None:
    dates = ["2023-02-07T17:29:24", "2023-02-07T17:29:24Z", datetime(2023, 2, 7, 17, 29, 24)]
    made = layout()
    rows = made.rows_of(tree(message("p", *(message(f"a{n}", created_date=date) for n, date in enumerate(dates)))))
    place = made.columns.index("created_date")
    assert [row[place] for row in rows[1:]] == [datetime(2023, 2, 7, 17, 29, 24, tzinfo=UTC)] * 3
    assert made.naive_dates == 2


def test_a_whole_number_may_be_written_as_a_fraction() -> None:
    (row,) = table(tree(message("p", rank=0.0, review_count=3.0, emojis={"+1": 2.0})))
    assert (row["rank"], row["review_count"], row["emojis"]) == (0, 3, [("+1", 2)])
    assert {fault(tree(message("p", rank=rank))).code for rank in (0.5, float("nan"), 1e300)} == {"schema.rank"}


def test_a_value_too_deep_to_write_again_costs_neither_the_text_nor_the_fields_beside_it() -> None:
    deep: Any = 1
    for _ in range(1_000):
        deep = [deep]
    (row,) = table(tree(message("p", events=deep, unknown=deep, other=5)))
    assert orjson.loads(row["events"]) == TOO_DEEP
    assert orjson.loads(row["extra"]) == {"unknown": TOO_DEEP, "other": 5}
    for fields in ({"message_id": deep}, {"parent_id": deep}, {"text": deep}, {"created_date": deep}):
        assert fault(tree(message("p", **fields))).code


def test_an_exact_copy_of_a_message_is_taken_once() -> None:
    copy = message("a", message("p2"))
    rows = table(tree(message("p", copy, copy, message("a3"))))
    assert [(row["message_id"], row["sibling"]) for row in rows] == [("p", 0), ("a", 0), ("p2", 0), ("a3", 1)]


def test_flat_messages_may_come_in_any_order() -> None:
    rows = flat_table([flat("d", "b"), flat("b", "a"), flat("c", "a"), flat("a", None), flat("b", "a")])
    assert [(row["message_id"], row["depth"], row["sibling"]) for row in rows] == [
        ("a", 0, 0), ("b", 1, 0), ("d", 2, 0), ("c", 1, 1),
    ]  # fmt: skip


ROUND = [(f"m{n}", f"m{(n + 1) % 1_000}") for n in range(1_000)]


@pytest.mark.parametrize(
    ("links", "code"),
    [
        ([("a", "gone")], "tree.orphan"),
        ([("a", None), ("b", "gone")], "tree.orphan"),
        ([("a", "a")], "tree.cycle"),
        ([("a", None), ("b", "b")], "tree.cycle"),
        ([("a", None), ("b", "c"), ("c", "b")], "tree.cycle"),
        ([("a", None), *ROUND], "tree.cycle"),
        (ROUND, "tree.cycle"),
        ([("a", None), ("b", None)], "tree.root"),
        ([("a", None), ("b", "a"), ("b", "b")], "id.duplicate"),
    ],
)
def test_flat_messages_that_are_no_tree_are_refused(links: list[tuple[str, str | None]], code: str) -> None:
    with pytest.raises(Fault) as caught:
        flat_table([flat(*link) for link in links])
    assert caught.value.code == code


def test_a_conversation_deeper_than_the_recursion_limit_is_walked() -> None:
    prompt = message("p5000")
    for n in range(4_999, -1, -1):
        prompt = message(f"p{n}", prompt)
    rows = table(tree(prompt))
    assert [row["depth"] for row in rows] == list(range(5_001))
    assert messages_in(tree(prompt)) == 5_001


def test_a_flat_chain_of_100_000_is_walked_in_seconds() -> None:
    made = layout()
    rows = [made.row_of(flat(f"m{n}", f"m{n - 1}" if n else None)) for n in range(100_000)]
    started = time.process_time()
    assert arrange(rows[::-1])[-1][4] == 99_999
    assert time.process_time() - started < 2


def test_messages_are_counted_as_far_as_a_broken_tree_can_be_walked() -> None:
    assert messages_in(tree(message("p", message("a", replies=5), message("b", message("c"))))) == 4
    assert messages_in(tree("nothing")) == 0
