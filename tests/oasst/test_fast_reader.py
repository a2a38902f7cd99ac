"""Trees read in one call: what is taken so is what the careful reader takes; the rest is left to it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.artifacts import DETOXIFY, LABELS, MESSAGE_COLUMNS
from tasks.oasst import fast_reader
from tasks.oasst.fast_reader import Arranged, Message, Rest, Scores, Votes, arranged, message_of, rest_of
from tasks.oasst.reader import loads
from tasks.oasst.strict_reader import TREE, Layout, arrange
from tasks.oasst.tables import columns
from tasks.oasst.validators import Fault

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
REAL = [SHARED / "data" / name for name in ("oasst1_en_validation.trees.jsonl.gz", "en_100_tree.jsonl")]
JSON_SUITE = sorted((SHARED / "corpora" / "JSONTestSuite" / "test_parsing").glob("*.json"))
MAX_TEXT = 1_000
GOOD = {"message_id": "a", "text": "hello", "role": "prompter"}
DATE = "2023-02-07T17:29:24.727400+00:00"


def carefully(raw: bytes) -> tuple[str, Arranged] | None:
    """Read a line field by field; None for one that is refused."""
    try:
        rows = arrange(Layout(LABELS, DETOXIFY, MAX_TEXT).rows_of(loads(raw)))
    except Fault:
        return None
    return rows[0][TREE], arranged(rows)


def read(raw: bytes, max_text: int) -> tuple[str, Arranged] | None:
    (found,) = fast_reader.read([raw], max_text)
    return found


def line(prompt: Any, **fields: Any) -> bytes:
    return json.dumps({"message_tree_id": "t", "tree_state": "growing", "prompt": prompt, **fields}).encode()


def test_labels_and_scores_are_those_of_the_table() -> None:
    assert Votes.__struct_fields__ == LABELS
    assert Scores.__struct_fields__ == DETOXIFY
    up_to_emojis = [name for name in MESSAGE_COLUMNS if name not in ("depth", "sibling")][:16]
    assert list(Message.__struct_fields__[:16]) == up_to_emojis


@pytest.mark.skipif(not REAL[0].exists(), reason="the real trees (shared/data) are not here")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_every_real_tree_is_read_in_one_call_and_as_the_careful_reader_reads_it(path: Path) -> None:
    content = path.read_bytes()
    for raw in (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines():
        found = read(raw, 1 << 20)
        assert found is not None
        rows = arrange(Layout(LABELS, DETOXIFY).rows_of(loads(raw)))
        assert found == (rows[0][TREE], arranged(rows))


@pytest.mark.skipif(not JSON_SUITE, reason="the bad input (shared/corpora) is not here")
def test_nothing_of_the_json_suite_is_read_here_neither_as_a_line_nor_as_a_field() -> None:
    whole = line({**GOOD, "lang": "VALUE"})
    for file in JSON_SUITE:
        raw = file.read_bytes()
        assert read(raw, MAX_TEXT) is None
        for within in (whole.replace(b'"VALUE"', raw), whole.replace(b'"a"', raw), whole.replace(b"VALUE", raw)):
            if (found := read(within, MAX_TEXT)) is not None:
                assert found == carefully(within), file.name


@pytest.mark.parametrize(
    "fields",
    [
        {"lang": ""}, {"rank": -1}, {"rank": True}, {"rank": 1.0}, {"rank": "1"}, {"review_count": 2**31},
        {"deleted": 1}, {"role": "system"}, {"text": None}, {"text": "x" * 1_001}, {"message_id": ""}, {"mood": 1},
        {"extra": None}, {"depth": 3}, {"events": {}}, {"origin": "here"}, {"parent_id": "elsewhere"},
        {"message_tree_id": "other"},
        {"replies": [7]}, {"replies": [GOOD]}, {"replies": {}}, {"emojis": {"name": ["+1"], "count": [1]}},
        {"labels": {"spam": {"value": 1.5, "count": 1}}}, {"labels": {"spam": {"value": 0.5}}},
        {"labels": {"spam": {"value": True, "count": 1}}}, {"labels": {"new": {"value": 0.5, "count": 1}}},
        {"labels": {"spam": {"value": 0.5, "count": 1, "by": "x"}}}, {"labels": {"spam": None}},
        {"detoxify": {"toxicity": -0.1}}, {"detoxify": {"new": 0.1}}, {"detoxify": {"toxicity": None}},
        *({"created_date": date} for date in (
            "", *(DATE.replace("02-07", day) for day in ("02-30", "02-29", "04-31", "13-01", "00-01", "01-00")),
            DATE.replace("T", " "), DATE.replace("T", "t"), DATE.replace("+00:00", "Z"), DATE.replace("+00", "+01"),
            DATE.replace(".", ","), DATE[:-6], DATE + "\n", DATE.replace("17:", "24:"), DATE.replace(":29", ":60"),
        )),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_odd_is_left_to_the_careful_reader(fields: dict[str, Any]) -> None:
    assert read(line({**GOOD, "message_id": "b", "replies": [{**GOOD, **fields}]}), MAX_TEXT) is None


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b'{"prompt": null}', line(None), line(GOOD, origin="x"), line(GOOD, new=1)]
)
def test_a_line_that_is_no_plain_tree_is_left_to_the_careful_reader(raw: bytes) -> None:
    assert read(raw, MAX_TEXT) is None


@pytest.mark.parametrize("deep", [400, 401, 505, 5_000, 100_000])
def test_a_deep_tree_is_read_here_or_left_but_never_a_crash(deep: int) -> None:
    raw = b'{"prompt":' + b"".join(
        b'{"message_id":"m%d","text":"","role":"prompter","replies":[' % n for n in range(deep)
    )
    raw += b"]}" * deep + b"}"
    found = read(raw, MAX_TEXT)
    assert (found is not None) == (deep <= 401)
    assert found is None or found == carefully(raw)


NOTHING = st.none()
TEXT = st.text(max_size=8)
SHARES = st.sampled_from([0, 1, 0.0, -0.0, 0.1, 1 / 3, 5e-324, 0.30000001192092896])
COUNTS = st.sampled_from([0, 1, 127, 128, 2**31 - 1])
VOTES = st.dictionaries(st.sampled_from(LABELS), st.fixed_dictionaries({"value": SHARES, "count": COUNTS}))
ODD = st.sampled_from([-1, True, "", [], {}, 1.5, 0.0, 3.0, 2**40, "prompter", {"name": [], "value": [], "count": []}])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "user_id": TEXT, "lang": st.sampled_from(["en", "pt-BR"]), "review_count": COUNTS, "rank": COUNTS,
    "created_date": st.datetimes().map(lambda date: date.isoformat(timespec="microseconds") + "+00:00"),
    "review_result": st.booleans(), "deleted": st.booleans(), "synthetic": st.booleans(), "model_name": TEXT,
    "emojis": st.dictionaries(TEXT, COUNTS), "labels": VOTES,
    "detoxify": st.dictionaries(st.sampled_from(DETOXIFY), SHARES),
    "tree_state": TEXT, "message_tree_id": st.just("t"), "events": NOTHING, "origin": NOTHING,
}  # fmt: skip
GIVEN = st.fixed_dictionaries({}, optional={name: NOTHING | value for name, value in FIELDS.items()})
STRANGE = st.dictionaries(st.sampled_from([*FIELDS, "text", "role", "mood", "replies"]), ODD, max_size=1)


def grown(odd: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    """Whole trees with every field; `odd` fields are laid over each message."""
    node = st.tuples(TEXT, st.sampled_from(["prompter", "assistant"]), GIVEN, odd)
    trees: st.SearchStrategy[Any] = st.recursive(
        node.map(lambda own: (own, [])),
        lambda below: st.tuples(node, st.lists(below, max_size=3)),
        max_leaves=8,
    )
    return trees.map(published)


def published(spec: Any) -> bytes:
    numbers = iter(range(1_000))

    def grow(one: Any) -> dict[str, Any]:
        (text, role, given_, odd), below = one
        own = {"message_id": f"m{next(numbers)}", "text": text, "role": role, **given_}
        return {**own, "replies": [grow(reply) for reply in below], **odd}

    return line(grow(spec))


@settings(max_examples=80, deadline=None)
@given(grown(st.just({})))
def test_a_good_tree_is_read_here_as_the_careful_reader_reads_it(raw: bytes) -> None:
    found, expected = read(raw, MAX_TEXT), carefully(raw)
    assert expected is not None
    assert found is None or found == expected
    usual = all(
        not date or (1 <= int(date[0]) <= 2 and date[5:10] != "02-29") for date in dates(json.loads(raw)["prompt"])
    )
    assert (found is not None) == usual


def dates(message: dict[str, Any]) -> list[str | None]:
    return [message.get("created_date"), *(date for reply in message["replies"] for date in dates(reply))]


@settings(max_examples=100, deadline=None)
@given(grown(STRANGE))
def test_whatever_is_read_here_the_careful_reader_reads_alike(raw: bytes) -> None:
    if (found := read(raw, MAX_TEXT)) is not None:
        assert found == carefully(raw)


@settings(max_examples=100, deadline=None)
@given(grown(st.just({})), st.data())
def test_a_damaged_line_is_read_as_the_careful_reader_reads_it_or_not_at_all(raw: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(raw) - 1))
    damaged = raw[:place] + data.draw(st.binary(max_size=2)) + raw[place + data.draw(st.integers(0, 4)) :]
    if (found := read(damaged, MAX_TEXT)) is not None:
        assert found == carefully(damaged)


@settings(max_examples=200, deadline=None)
@given(GIVEN, STRANGE, st.sampled_from([{}, {"parent_id": None}, {"parent_id": "p"}, {"parent_id": ""}]))
def test_a_flat_message_that_is_read_here_is_read_alike_by_the_careful_reader(
    given_: dict[str, Any], odd: dict[str, Any], parent: dict[str, Any]
) -> None:
    raw = json.dumps({**GOOD, **given_, **parent, **odd}).encode()
    (found,) = fast_reader.read_flat([raw], MAX_TEXT)
    if found is not None:
        row = Layout(LABELS, DETOXIFY, MAX_TEXT).row_of(loads(raw))
        assert (found, None) == (message_of(row), rest_of(row))


def test_a_usual_flat_message_is_read_here_and_an_unusual_one_is_left() -> None:
    usual: list[dict[str, Any]] = [
        {},
        {"parent_id": "p", "message_tree_id": "t"},
        {"created_date": DATE, "replies": []},
    ]
    other: list[dict[str, Any]] = [
        {"parent_id": "p"}, {"text": "x" * MAX_TEXT}, {"mood": 1}, {"replies": [GOOD]}, {"message_tree_id": ""},
        {"created_date": "2023-02-07T17:29:24"},
    ]  # fmt: skip
    found = fast_reader.read_flat([json.dumps({**GOOD, **more}).encode() for more in (*usual, *other)], MAX_TEXT)
    assert [one is not None for one in found] == [True] * len(usual) + [False] * len(other)
    assert fast_reader.read_flat([b"", b"\xff", b"[" * 10**5], MAX_TEXT) == [None] * 3


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_the_parts_of_a_tree_are_the_tree(size: int) -> None:
    messages = [Message(message_id=str(n), text="", role="prompter") for n in range(5)]
    rest = {place: Rest(None, None, f"{place}") for place in (0, 3, 4)}
    whole, again = Arranged(messages, [*range(5)], [0] * 5, rest), Arranged([], [], [], {})
    for part in whole.parts(size):
        assert part.size <= size
        again.append(part)
    assert again == whole


@settings(max_examples=40, deadline=None)
@given(st.lists(grown(st.just({})), min_size=1, max_size=3))
def test_columns_hold_what_the_careful_readers_rows_hold(raws: list[bytes]) -> None:
    rows = [row for raw in raws for row in arrange(Layout(LABELS, DETOXIFY, MAX_TEXT).rows_of(loads(raw)))]
    made = [column.to_pylist() if isinstance(column, pa.Array) else column for column in columns(arranged(rows))]
    names = list(MESSAGE_COLUMNS)
    for name, column, expected in zip(names, made, zip(*rows, strict=True), strict=True):
        if name.startswith(("label_", "detoxify_")) and not name.endswith("_count"):
            assert column == [None if share is None else float(np.float32(share)) for share in expected]
        else:
            assert list(column) == list(expected), name


@settings(max_examples=50, deadline=None)
@given(st.lists(grown(STRANGE) | st.binary(max_size=3), max_size=6))
def test_lines_that_are_read_together_are_read_as_each_alone(raws: list[bytes]) -> None:
    assert fast_reader.read(raws, MAX_TEXT) == [read(raw, MAX_TEXT) for raw in raws]
