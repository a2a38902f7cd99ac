import json
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.artifacts import (
    DIALOGUE_COLUMNS,
    DROPPED_COLUMNS,
    MESSAGE_COLUMNS,
    Counts,
    Dialogues,
    Messages,
    RawTrees,
    arrow_schema,
    parquet_writer,
)
from tasks.curate import ROWS, CurateParams, CurateRuntime, curate
from tasks.dialogue.language import MIN_CHARS
from tasks.dialogue.settings import RULES, FilterSettings
from tasks.dialogue.split import split_of
from tasks.errors import InputError, ParameterError, SourceChanged
from tasks.notices import of_curate
from tasks.parse import ParseParams, parse
from tasks.sample.dataset import SAMPLE_NAME, planted, sample_bytes
from tasks.store.manifest import FileEntry, Manifest

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
ALL_TRAIN: dict[str, Any] = {"test_fraction": 0.0, "val_fraction": 0.0}
MODERN = "oasst1_en_validation.trees.jsonl.gz"  # every field
OLD = "en_100_tree.jsonl"  # an older export: no labels, no detoxify
AS_PUBLISHED = CurateParams(
    rules=(), pii="off", require_reply=False, dedupe=False, near_dedupe=False, drop_cross_split_duplicates=False
)
GOOD = {"lang": "en", "tree_state": "ready_for_export", "deleted": False, "synthetic": False, "review_result": True}


def sealed(kind: str, *files: str) -> Manifest:
    return Manifest("0" * 64, kind, {}, {name: FileEntry(0, "0" * 64) for name in files}, "0" * 64)


def messages_of(folder: Path, *rows: dict[str, Any]) -> Messages:
    """Write rows of id, parent and other fields; roles take turns, texts are the ids, the tree is named by its root."""
    made: dict[str, dict[str, Any]] = {}
    for row in rows:
        above = made.get(row.get("parent") or "", {"role": "assistant", "depth": -1, "message_tree_id": row["id"]})
        role = "prompter" if above["role"] == "assistant" else "assistant"
        fields = {name: value for name, value in row.items() if name not in {"id", "parent"}}
        made[row["id"]] = {
            **GOOD, "message_tree_id": above["message_tree_id"], "message_id": row["id"], "role": role, "sibling": 0,
            "parent_id": row.get("parent"), "depth": above["depth"] + 1, "text": row["id"], **fields,
        }  # fmt: skip
    folder.mkdir(exist_ok=True)
    with parquet_writer(folder / "messages.parquet", MESSAGE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(list(made.values()), schema=arrow_schema(MESSAGE_COLUMNS)))
    return Messages(folder, sealed("messages"))


def curated(messages: Messages, out: Path, params: CurateParams) -> tuple[Dialogues, Counts]:
    out.mkdir(exist_ok=True)
    counts = curate.function(out, messages, params, CurateRuntime(workers=1))
    return Dialogues(out, sealed("dialogues")), counts


def reasons(tmp: Path, *rows: dict[str, Any], **fields: Any) -> dict[str, tuple[str, str]]:
    """Return what was dropped of these rows: message -> (reason, evidence)."""
    made, _ = curated(messages_of(tmp / "in", *rows), tmp / "out", CurateParams(**{**ALL_TRAIN, **fields}))
    found = made.dropped().select("message_id", "reason", "evidence").collect()
    return {message: (reason, seen) for message, reason, seen in found.iter_rows()}


def chain(*ids: str, **fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": own, "parent": above, **fields.get(own, {})} for above, own in zip([None, *ids], ids, strict=False)]


Open = Callable[[str], Messages]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Return what parses a file of real trees by name, or the embedded sample, once."""

    @cache
    def messages(name: str) -> Messages:
        folder = tmp_path_factory.mktemp("curate")
        raw, out = folder / "raw", folder / "messages"
        raw.mkdir()
        out.mkdir()
        (raw / name).write_bytes(sample_bytes() if name == SAMPLE_NAME else (SHARED / name).read_bytes())
        parse.function(out, RawTrees(raw, sealed("raw", name)), ParseParams())
        return Messages(out, sealed("messages"))

    def found(name: str) -> Messages:
        if name != SAMPLE_NAME and not (SHARED / name).exists():
            pytest.skip(f"{name} is not here: it lies beside the project, not in it")
        return messages(name)

    return found


@pytest.fixture(params=[MODERN, OLD, SAMPLE_NAME])
def real(request: pytest.FixtureRequest, opened: Open) -> Messages:
    """Return the messages of each file in turn."""
    return opened(request.param)


# ---- laws on real trees


def assert_whole(messages: Messages, made: Dialogues, counts: Counts) -> None:
    """Assert what holds of any input: all rows once, in order, unaltered; reasons given; trees closed upwards."""
    before, kept, dropped = messages.scan().collect(), made.scan().collect(), made.dropped().collect()
    assert counts["messages"] == len(kept)
    assert counts["dropped"] == len(dropped) == sum(counts["funnel"].values())
    assert counts["read"]["messages"] == len(before) == len(kept) + len(dropped)
    own = ["message_tree_id", "message_id"]
    for part in (kept, dropped):
        order = before.with_row_index().join(part.select(own), on=own, how="semi", maintain_order="left")
        if "masked" in part.columns:
            order, part = (table.filter(part["masked"].is_null()) for table in (order, part))
        assert order.drop("index").equals(part.select(before.columns))
    assert kept.join(dropped, on=own, how="semi").is_empty()
    assert dropped.filter((pl.col("reason") == "") | (pl.col("evidence") == "")).is_empty()
    orphans = kept.filter(pl.col("parent_id").is_not_null()).join(
        kept, left_on=["message_tree_id", "parent_id"], right_on=own, how="anti"
    )
    assert orphans.is_empty()


def test_every_message_ends_in_exactly_one_table_unaltered_and_in_order(real: Messages, tmp_path: Path) -> None:
    assert_whole(real, *curated(real, tmp_path / "out", CurateParams()))


def test_with_everything_off_every_message_is_kept(real: Messages, tmp_path: Path) -> None:
    made, counts = curated(real, tmp_path / "out", AS_PUBLISHED)
    assert_whole(real, made, counts)
    assert counts["dropped"] == 0
    assert counts["funnel"] == {"parent": 0}


def test_two_runs_write_the_same_bytes_in_the_promised_types(real: Messages, tmp_path: Path) -> None:
    for name in ("a", "b"):
        curated(real, tmp_path / name, CurateParams())
    for file, columns in (("dialogues.parquet", DIALOGUE_COLUMNS), ("dropped.parquet", DROPPED_COLUMNS)):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert sha256(first).digest() == sha256(second).digest()
        assert pq.read_schema(tmp_path / "a" / file).equals(arrow_schema(columns))


def test_every_kept_path_can_be_trained_on(real: Messages, tmp_path: Path) -> None:
    made, _ = curated(real, tmp_path / "out", CurateParams())
    kept = made.scan().collect()
    leaves = kept.join(
        kept, left_on=["message_tree_id", "message_id"], right_on=["message_tree_id", "parent_id"], how="anti"
    )
    assert set(leaves["role"]) == {"assistant"}


def test_a_tree_has_one_split_and_it_is_the_hash_of_its_id(real: Messages, tmp_path: Path) -> None:
    made, counts = curated(real, tmp_path / "out", CurateParams())
    kept = made.scan().collect()
    assert all(
        split_of(tree, 0.05, 0.05) == split for tree, split in kept.select("message_tree_id", "split").iter_rows()
    )
    for name, sizes in counts["splits"].items():
        assert sizes["messages"] == len(kept.filter(pl.col("split") == name))
    assert sum(sizes["trees"] for sizes in counts["splits"].values()) == counts["trees"]


def test_counts_are_plain_json(real: Messages, tmp_path: Path) -> None:
    _, counts = curated(real, tmp_path / "out", CurateParams())
    assert json.loads(json.dumps(counts)) == counts
    assert list(counts["funnel"]) == [*RULES, "parent", "no_reply", "leak", "duplicate", "near_duplicate"]


def test_188_real_trees_give_1176_messages(opened: Open, tmp_path: Path) -> None:
    _, counts = curated(opened(MODERN), tmp_path / "out", CurateParams())
    assert (counts["trees"], counts["messages"], counts["dropped"]) == (164, 1_176, 843)
    assert counts["label_coverage"] == {"labels": 0.9975, "detoxify": 1.0}
    assert counts["languages"] == {"en": 2_019}
    funnel = {name: number for name, number in counts["funnel"].items() if number}
    assert funnel == {
        "deleted": 40, "rejected": 43, "lang_mismatch": 1, "pii": 1, "not_appropriate": 14, "sexual_content": 1,
        "quality": 196, "toxicity": 1, "paste": 18, "parent": 338, "no_reply": 189,
        "near_duplicate": 1,  # a song text that two replies hold
    }  # fmt: skip


def test_the_seeds_333_pairs_are_all_there_without_filters(opened: Open, tmp_path: Path) -> None:
    messages = opened(OLD)
    made, counts = curated(messages, tmp_path / "out", CurateParams(rules=(), near_dedupe=False))
    pairs = made.scan().filter((pl.col("depth") == 1) & (pl.col("role") == "assistant")).collect()
    assert len(pairs) == 333
    assert counts["funnel"] == {"parent": 0, "no_reply": 226, "duplicate": 0, "leak": 0}


def test_the_rules_find_what_was_planted_in_the_sample_and_nothing_else(opened: Open, tmp_path: Path) -> None:
    made, counts = curated(opened(SAMPLE_NAME), tmp_path / "out", CurateParams(**ALL_TRAIN))
    funnel, known = counts["funnel"], planted()
    copies = made.dropped().filter(reason="near_duplicate").collect()
    assert len(copies.filter(role="assistant")) == known["near_duplicate"]
    left = len(copies.filter(role="prompter")) + funnel["no_reply"] - known["unanswered"]
    assert left == known["near_duplicate"]  # each copy's prompt goes with it, for one reason or the other
    funnel["no_reply"] = known["unanswered"]
    same = {"deleted": "deleted", "synthetic": "synthetic", "rejected": "rejected", "role_break": "role_break",
            "pii": "pii", "hate_speech": "hate_speech", "not_appropriate": "not_appropriate", "toxicity": "toxic",
            "quality": "low_quality", "spam": "spam_label", "paste": "ai_paste", "no_reply": "unanswered"}  # fmt: skip
    assert {rule: funnel[rule] for rule in same} == {rule: known[kind] for rule, kind in same.items()}
    assert funnel["empty"] == known["empty"] + known["blank"]
    assert funnel["duplicate"] == 2 * known["duplicate"]  # a prompt and its reply


# ---- laws on small trees


def test_a_dropped_message_takes_its_subtree_along_and_evidence_names_it(tmp_path: Path) -> None:
    rows = [*chain("a", "b", "c", "d", b={"deleted": True}), {"id": "e", "parent": "a"}]
    assert reasons(tmp_path, *rows) == {
        "b": ("deleted", "deleted is true"), "c": ("parent", "b"), "d": ("parent", "b"),
    }  # fmt: skip


def test_a_descendant_that_a_rule_drops_keeps_its_own_reason_and_is_the_one_named_below_it(tmp_path: Path) -> None:
    rows = chain("a", "b", "c", "d", b={"deleted": True}, c={"lang": "de"})
    found = reasons(tmp_path, *rows, {"id": "x"}, {"id": "y", "parent": "x"})
    assert {message: (reason, seen) for message, (reason, seen) in found.items() if message in "cd"} == {
        "c": ("language", "lang de is not en"), "d": ("parent", "c"),
    }  # fmt: skip
    assert found["a"] == ("no_reply", "no reply below")


def test_a_prompt_without_reply_goes_unless_it_is_wanted(tmp_path: Path) -> None:
    rows = chain("a", "b", "c")
    assert reasons(tmp_path, *rows) == {"c": ("no_reply", "no reply below")}
    assert reasons(tmp_path, *rows, require_reply=False) == {}


def test_a_duplicate_names_its_twin_and_can_be_allowed(tmp_path: Path) -> None:
    rows = [*chain("a", "b"), {"id": "c", "parent": "a", "text": "B "}]
    assert reasons(tmp_path, *rows) == {"c": ("duplicate", "b")}
    assert reasons(tmp_path, *rows, dedupe=False) == {}


def test_a_dropped_message_is_nobodys_twin(tmp_path: Path) -> None:
    rows = [*chain("a", "b", b={"deleted": True}), {"id": "c", "parent": "a", "text": "b"}]
    assert set(reasons(tmp_path, *rows)) == {"b"}


def two_splits() -> tuple[str, str]:
    """Return a tree id of the test split and one of the training split, at equal shares of 0.4."""
    ids = [f"tree {number}" for number in range(100)]
    return tuple(next(name for name in ids if split_of(name, 0.4, 0.2) == split) for split in ("test", "train"))  # type: ignore[return-value]


def test_a_prompt_of_the_test_split_is_not_trained_on(tmp_path: Path) -> None:
    test, train = two_splits()
    rows = [
        {"id": train, "text": "Hi"},
        {"id": "b", "parent": train},
        {"id": test, "text": "hi"},
        {"id": "d", "parent": test},
    ]
    assert reasons(tmp_path, *rows, test_fraction=0.4, val_fraction=0.2) == {
        train: ("leak", f"{test} 1.000"), "b": ("parent", train),
    }  # fmt: skip
    assert reasons(tmp_path, *rows, test_fraction=0.4, val_fraction=0.2, drop_cross_split_duplicates=False) == {}


def test_a_prompt_that_loses_its_only_reply_to_the_test_split_goes_with_it(tmp_path: Path) -> None:
    test, train = two_splits()
    rows = [
        {"id": train},
        {"id": "b", "parent": train, "text": "long"},
        {"id": test},
        {"id": "d", "parent": test, "text": "Long"},
    ]
    found = reasons(tmp_path, *rows, test_fraction=0.4, val_fraction=0.2, dedupe_min_chars=4, near_dedupe=False)
    assert found == {train: ("no_reply", "no reply below"), "b": ("leak", "d 1.000")}


def test_a_prompt_without_replies_takes_nothing_from_another_split(tmp_path: Path) -> None:
    test, train = two_splits()
    rows = [{"id": train, "text": "Hi"}, {"id": "b", "parent": train}, {"id": test, "text": "Hi"}]
    assert reasons(tmp_path, *rows, test_fraction=0.4, val_fraction=0.2) == {test: ("no_reply", "no reply below")}


def test_nothing_left_is_an_error_that_says_what_took_it(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"error\[curate\.empty\]: none of 2 .*language 2.*--set curate\.languages="
    ) as found:
        reasons(tmp_path, *chain("a", "b", a={"lang": "de"}, b={"lang": "de"}))
    assert found.value.exit_code == 65
    with pytest.raises(InputError, match="there were none"):
        reasons(tmp_path)
    german = "Alle Menschen sind frei und gleich an Würde und Rechten geboren. " * 2
    with pytest.raises(InputError, match=r"--set curate\.min_language_confidence="):
        reasons(tmp_path, *chain("a", "b", b={"text": german}))


def test_nothing_left_to_train_on_is_said_with_what_took_it(tmp_path: Path) -> None:
    test, train = two_splits()
    rows = [*chain(train, "b"), {"id": test, "text": train}, {"id": "d", "parent": test}]
    params = CurateParams(test_fraction=0.4, val_fraction=0.2)
    _, counts = curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", params)
    said = {notice.code: str(notice) for notice in of_curate(counts, params)}
    assert "(train 0, val 0, test 1; dropped by leak 1)" in said["curate.train"]
    assert "takes 1 of 2 (50.0%) replies" in said["curate.leak"]


def test_a_reply_counts_for_the_rule_that_dropped_what_it_answers(tmp_path: Path) -> None:
    rows = [*chain("a", "b", "c", "d", a={"deleted": True}), *chain("e", "f", f={"deleted": True}), *chain("g", "h")]
    _, counts = curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", CurateParams(**ALL_TRAIN))
    assert counts["read"]["replies"] == 4
    assert counts["replies_dropped"] == {"deleted": 3}


ESSAY = "the tide is the slow rise and fall of the sea and the moon pulls on the water that faces it"


def test_a_near_duplicate_names_its_twin_and_the_similarity_and_can_be_allowed(tmp_path: Path) -> None:
    rows = [
        {"id": "a"}, {"id": "b", "parent": "a", "text": ESSAY}, {"id": "c"},
        {"id": "d", "parent": "c", "text": f"{ESSAY} indeed"},
    ]  # fmt: skip
    wanted = {"c": ("no_reply", "no reply below"), "d": ("near_duplicate", "b 0.950")}
    assert reasons(tmp_path, *rows, dedupe_min_chars=50) == wanted
    assert reasons(tmp_path, *rows, dedupe_min_chars=50, jaccard_threshold=0.96) == {}
    assert reasons(tmp_path, *rows, dedupe_min_chars=50, near_dedupe=False) == {}
    assert reasons(tmp_path, *rows) == {}


def test_first_prompts_repeat_within_a_split_only_where_that_is_wanted(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": ESSAY}, {"id": "b", "parent": "a"}, {"id": "c", "text": ESSAY.upper()}]
    rows += [{"id": "d", "parent": "c"}]
    assert reasons(tmp_path, *rows) == {}
    assert reasons(tmp_path, *rows, keep_duplicate_prompts=False) == {
        "c": ("near_duplicate", "a 1.000"),
        "d": ("parent", "c"),
    }


def essay(*words: int) -> str:
    """Write thirty words, of which some are others than usual."""
    return " ".join(f"other{at}" if at in words else f"word{at}" for at in range(30))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from([(), (0,), (29,), (0, 29), (15,)]), st.booleans(), st.integers(0, 2))))
def test_as_data_grows_no_tree_moves_the_test_split_only_grows_and_nothing_is_shared(
    tmp_path: Path, drawn: list[tuple[tuple[int, ...], bool, int]]
) -> None:
    rows: list[dict[str, Any]] = []
    before: dict[str, str] = {}
    examined: set[str] = set()
    params = CurateParams(test_fraction=0.3, val_fraction=0.3, dedupe_min_chars=20)
    for number, (words, of_prompt, rank) in enumerate([((1, 9, 20), False, 0), *drawn]):
        rows.append({"id": f"p{number}", "text": essay(*words) if of_prompt else f"prompt {number}"})
        rows.append({"id": f"r{number}", "parent": f"p{number}", "rank": rank})
        rows[-1]["text"] = f"reply {number}" if of_prompt else essay(*words)
        if number % 5 and number < len(drawn):
            continue  # looked at now and then: growth by several trees
        made, counts = curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", params)
        kept = dict(made.scan().select("message_tree_id", "split").collect().iter_rows())
        assert all(kept[tree] == split for tree, split in before.items() if tree in kept)
        tested = set(made.scan().filter(pl.col("split") == "test").select("message_id").collect()["message_id"])
        assert examined <= tested
        examined = tested
        assert counts["shared_across_splits"]["kept"] == {"exact": 0, "near": 0}
        before |= kept


def alike(count: int, long: int = 80) -> list[str]:
    """Write texts that are alike but for their last word."""
    return [" ".join([*(f"w{at}" for at in range(long)), f"name{number}"]) for number in range(count)]


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_however_many_prompts_are_alike_no_two_splits_hold_any(tmp_path: Path, share: float) -> None:
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(alike(1_500)):
        rows += [{"id": f"q{number}", "text": text}, {"id": f"r{number}", "parent": f"q{number}"}]
    params = CurateParams(test_fraction=share, val_fraction=share)
    made, counts = curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", params)
    splits = made.scan().filter(pl.col("parent_id").is_null()).collect()["split"].to_list()
    assert splits == ["test"] * sum(split_of(f"q{number}", share, share) == "test" for number in range(1_500))
    assert counts["shared_across_splits"]["kept"] == {"exact": 0, "near": 0}


def test_what_separating_misses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test, train = two_splits()
    rows = [{"id": train, "text": "Hi"}, {"id": "b", "parent": train}, {"id": test, "text": "hi"}]
    rows += [{"id": "d", "parent": test}]
    monkeypatch.setattr("tasks.deduplicate.leaks", lambda *given: {})
    monkeypatch.setattr("tasks.deduplicate.shared", lambda *given: set())
    _, counts = curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", CurateParams(test_fraction=0.4))
    assert counts["shared_across_splits"]["kept"]["near"] == 1


def test_however_many_replies_are_alike_one_stays_and_every_other_names_it(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(alike(1_500)):
        rows += [{"id": f"q{number}"}, {"id": f"r{number}", "parent": f"q{number}", "text": text}]
    made, _ = curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", CurateParams(**ALL_TRAIN))
    (stays,) = made.scan().filter(pl.col("role") == "assistant").collect()["message_id"]
    evidence = made.dropped().filter(pl.col("reason") == "near_duplicate").collect()["evidence"]
    assert set(evidence.str.split(" ").list.first()) == {stays}
    assert (evidence.str.split(" ").list.last().cast(pl.Float64) > 0.9).all()


def test_a_better_twin_that_leaks_does_not_take_its_twin_with_it(tmp_path: Path) -> None:
    test, train = two_splits()
    other = next(name for name in map("other {}".format, range(99)) if split_of(name, 0.4, 0.2) == "train")
    rows: list[dict[str, Any]] = [
        {"id": test, "text": essay()}, {"id": "t", "parent": test},
        {"id": train, "text": essay(29)}, {"id": "better", "parent": train, "text": essay(3, 9, 20), "rank": 0},
        {"id": other}, {"id": "twin", "parent": other, "text": f"{essay(3, 9, 20)} more", "rank": 1},
    ]  # fmt: skip
    found = reasons(tmp_path, *rows, test_fraction=0.4, val_fraction=0.2, dedupe_min_chars=20)
    assert found == {train: ("leak", f"{test} 0.931"), "better": ("parent", train)}


def test_a_copy_of_what_goes_for_a_near_copy_names_the_one_that_stays(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "text": "Hi"}, {"id": "b", "parent": "a", "text": ESSAY, "rank": 1},
        {"id": "c", "text": "hi"}, {"id": "d", "parent": "c", "text": ESSAY, "rank": 1},
        {"id": "e"}, {"id": "f", "parent": "e", "text": f"{ESSAY} indeed", "rank": 0},
    ]  # fmt: skip
    found = reasons(tmp_path, *rows, dedupe_min_chars=50)
    assert found["b"] == found["d"] == ("near_duplicate", "f 0.950")


def test_a_conversation_of_5000_turns_is_curated(tmp_path: Path) -> None:
    made, counts = curated(
        messages_of(tmp_path / "in", *chain(*map(str, range(5_000)))), tmp_path / "out", CurateParams()
    )
    assert (counts["messages"], counts["trees"]) == (5_000, 1)
    assert made.scan().collect()["depth"].to_list() == list(range(5_000))


def test_emojis_dates_and_row_groups_survive(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "emojis": [("+1", n), ("_skip_reply", 1)]} for n in range(ROWS + 1)]
    messages = messages_of(tmp_path / "in", *rows)
    _, counts = curated(messages, tmp_path / "out", AS_PUBLISHED)
    found = pq.ParquetFile(tmp_path / "out" / "dialogues.parquet")
    assert found.num_row_groups == 2
    assert found.read(["emojis"])["emojis"].to_pylist()[7] == [("+1", 7), ("_skip_reply", 1)]
    assert pq.ParquetFile(tmp_path / "out" / "dropped.parquet").num_row_groups == 0
    assert counts["messages"] == ROWS + 1


@st.composite
def forests(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 16))):
        rows.append({
            "id": f"m{number}", "parent": draw(st.sampled_from([None, *(row["id"] for row in rows)])),
            "text": draw(st.sampled_from(["x", "Y", "y ", ""])), "deleted": draw(st.sampled_from([None, False, True])),
            "rank": draw(st.sampled_from([None, 0, 1])), "role": draw(st.sampled_from(["prompter", "assistant"])),
        })  # fmt: skip
    return rows


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forests(), st.sampled_from([(), ("empty",), tuple(RULES)]), st.booleans())
def test_whatever_the_trees_nothing_is_lost_and_nobody_outlives_an_ancestor(
    tmp_path: Path, rows: list[dict[str, Any]], rules: Any, on: bool
) -> None:
    rows.append({"id": "kept", "text": "kept"})  # so that something is left
    rows.append({"id": "reply", "parent": "kept"})
    messages = messages_of(tmp_path / "in", *rows)
    params = CurateParams(rules=rules, require_reply=on, dedupe=on, near_dedupe=on, test_fraction=0.3, val_fraction=0.3,
                          dedupe_min_chars=1, keep_duplicate_prompts=on)  # fmt: skip
    made, counts = curated(messages, tmp_path / "out", params)
    assert_whole(messages, made, counts)
    kept, dropped = made.scan().collect(), made.dropped().collect()
    copies = dropped.filter(pl.col("reason").is_in(["leak", "duplicate", "near_duplicate"]))
    twins = copies["evidence"].str.split(" ").list.first()
    assert set(twins) <= set(kept["message_id"])
    assert counts["shared_across_splits"]["kept"] == {"exact": 0, "near": 0}
    assert set(dropped.filter(reason="parent")["evidence"]) <= set(dropped["message_id"])
    first_prompt = (pl.col("role") == "prompter") & pl.col("parent_id").is_null()
    said = kept.filter(first_prompt | (pl.col("text") != ""))
    texts = said.select("role", pl.col("text").str.to_lowercase().str.strip_chars(), "split").unique()
    assert texts.select("role", "text").is_unique().all()  # nothing that is compared is in two splits


MAIL = "Write to jane.doe@mail.com or call 415-556-0123."


def test_personal_data_are_masked_in_what_is_kept_and_what_was_masked_is_told(tmp_path: Path) -> None:
    rows = chain("a", "b", b={"text": MAIL})
    made, counts = curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", CurateParams(**ALL_TRAIN))
    kept = made.scan().select("text", "masked").collect()
    assert kept.rows() == [("a", None), ("Write to [e-mail] or call [phone].", "e-mail 1, phone 1")]
    assert counts["masked"] == 1


def test_personal_data_can_be_left_or_drop_their_message(tmp_path: Path) -> None:
    rows = [*chain("a", "b", b={"text": MAIL}), {"id": "c", "parent": "a"}]
    assert reasons(tmp_path, *rows, pii="drop") == {"b": ("personal", "e-mail 1, phone 1")}
    made, counts = curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", CurateParams(**ALL_TRAIN, pii="off"))
    assert made.scan().collect()["text"].to_list() == ["a", MAIL, "c"]
    assert counts["masked"] == 0


def test_personal_data_are_not_dropped_without_the_rule_that_drops_them() -> None:
    with pytest.raises(ValueError, match='pii "drop" needs the rule "personal"'):
        CurateParams(pii="drop", rules=("empty",))


def test_texts_that_differ_only_in_what_is_masked_are_copies_and_dropped_ones_stay_as_published(tmp_path: Path) -> None:
    rows = [*chain("a", "b", b={"text": MAIL}), {"id": "c", "parent": "a", "text": MAIL.replace("jane.doe", "joe")}]
    made, counts = curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", CurateParams(**ALL_TRAIN))
    assert made.dropped().select("reason", "text").collect().rows() == [("duplicate", rows[2]["text"])]
    assert counts["masked"] == 1


def test_a_text_in_another_language_than_its_tag_is_dropped_with_what_was_found(tmp_path: Path) -> None:
    german = "Alle Menschen sind frei und gleich an Würde und Rechten geboren. " * 2
    rows = [*chain("a", "b", b={"text": german}), {"id": "c", "parent": "a"}]
    assert reasons(tmp_path, *rows) == {"b": ("text_language", "0.99 of the text is de, tagged en")}
    assert reasons(tmp_path, *chain("a", "b", b={"text": german[: MIN_CHARS - 1]})) == {}


def test_code_and_quotations_are_no_reason_to_drop_a_text_of_its_tags_language(tmp_path: Path) -> None:
    code = (
        "import argparse\n"
        + "def step(values, limit=0):\n    return sum(value for value in values if value > limit)\n" * 3
    )
    english = " All human beings are born free and equal in dignity and rights." * 3
    rows = [
        *chain("a", "b", a={"lang": "es", "text": f"Explica este código y corrige los errores.\n```python\n{code}```"}),
        *chain("c", "d", c={"lang": "pt-BR", "text": f"Explique este código e corrija os erros.\n{code}"}),
        *chain("e", "f", e={"lang": "zh", "text": f"请把这段话翻译成中文：{english}"}),
        *chain("g", "h", g={"lang": "ru", "text": english}),
    ]
    found = reasons(tmp_path, *rows, languages=())
    assert found == {"g": ("text_language", "0.99 of the text is en, tagged ru"), "h": ("parent", "g")}


def test_near_copies_of_150_chinese_characters_are_found(tmp_path: Path) -> None:
    words = "桥师塔椅色路日园门城岛鱼火海笔纸湖井奶树雨夜石风包鸟冬灯食蜜声钟油表家花工窗山泉沙船童烟河床昼"
    said = "".join(words[at * at * 7 % len(words)] + words[at * 3 % len(words)] for at in range(75))
    rows = [
        *chain("a", "b", b={"text": said, "lang": "zh"}),
        *chain("c", "d", d={"lang": "zh", "text": said[:74] + "新" + said[75:]}),
    ]
    assert {reason for reason, _ in reasons(tmp_path, *rows, languages=()).values()} == {"near_duplicate", "no_reply"}


def test_planted_evaluation_prompts_are_found_in_full(opened: Open, tmp_path: Path) -> None:
    messages = opened(MODERN)
    rows = messages.scan().select("message_id", "role", "text").collect()
    prompts = rows.filter(role="prompter").sample(60, seed=3)["text"].to_list()  # long ones and short ones
    plain, _ = curated(messages, tmp_path / "plain", CurateParams(rules=("contaminated",)))
    made, counts = curated(
        messages, tmp_path / "out", CurateParams(rules=("contaminated",), sample_prompts=tuple(prompts))
    )
    planted = rows.filter(pl.col("text").is_in(prompts))
    found = made.dropped().filter(reason="contaminated").collect()
    assert set(planted["message_id"]) <= set(found["message_id"])
    assert counts["funnel"]["contaminated"] == len(found) < 2 * len(planted)
    assert not plain.dropped().filter(reason="contaminated").collect().height


def test_files_of_prompts_are_read_and_keyed_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREELINE_SOURCE_ROOTS", str(tmp_path))
    (tmp_path / "exam.jsonl").write_text('{"question": "What is it?"}\n{"question": "B!"}\n')
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "exam.jsonl").read_bytes())
    params, moved = (
        CurateParams(**ALL_TRAIN, prompt_files=(str(tmp_path / name),)) for name in ("exam.jsonl", "moved.jsonl")
    )
    assert params.keyed() == moved.keyed()
    (tmp_path / "exam.txt").write_bytes((tmp_path / "exam.jsonl").read_bytes())
    assert params.keyed() != CurateParams(**ALL_TRAIN, prompt_files=(str(tmp_path / "exam.txt"),)).keyed()
    rows = [*chain("a", "b"), {"id": "c", "parent": "a"}]
    made, counts = curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", params)
    assert counts["prompts_sought"] == 2
    dropped = made.dropped().select("message_id", "reason", "evidence").collect().rows()
    assert dropped == [("b", "contaminated", "file 1 line 2, the same text")]
    (tmp_path / "exam.jsonl").write_text('"other"')
    with pytest.raises(SourceChanged, match=r"exam\.jsonl.*Run again"):
        curated(messages_of(tmp_path / "in", *rows), tmp_path / "out", params)
    assert params.keyed() != moved.keyed()
    with pytest.raises(ParameterError, match="expected a file under an allowed folder"):
        CurateParams(prompt_files=("/etc/hostname",)).keyed()


def test_facts_that_are_asked_for_are_counted_and_dropped_only_where_that_is_asked(tmp_path: Path) -> None:
    france = {"a": {"text": "What is the capital of France?"}, "b": {"text": "Paris."}}
    rows = [*chain("a", "b", **france), *chain("c", "d")]
    messages = messages_of(tmp_path / "in", *rows)
    made, counts = curated(messages, tmp_path / "out", CurateParams(**ALL_TRAIN, fact_families=("capital",)))
    assert counts["facts"] == {"asked": 197, "told_in_train": 1}
    assert not made.dropped().collect().height
    made, counts = curated(
        messages, tmp_path / "out", CurateParams(**ALL_TRAIN, fact_families=("capital",), drop_facts=True)
    )
    assert counts["facts"]["told_in_train"] == 0
    assert made.dropped().select("message_id", "reason", "evidence").collect().rows() == [
        ("a", "no_reply", "no reply below"), ("b", "fact", "capital of France"),
    ]  # fmt: skip


def test_what_a_report_says_of_the_data_adds_up(opened: Open, tmp_path: Path) -> None:
    made, counts = curated(opened(SAMPLE_NAME), tmp_path / "out", CurateParams())
    told = made.curation()
    assert told["counts"] == counts
    assert {rule: sum(found.values()) for rule, found in told["by_language"].items()} == {
        rule: number for rule, number in counts["funnel"].items() if number
    }
    dropped = made.dropped().collect()
    for rule, cases in told["cases"].items():
        own = dropped.filter(reason=rule).with_columns(pl.col("lang").fill_null("unknown"))
        often = own.group_by("lang").len().sort("len", "lang", descending=[True, False])["lang"].head(6)
        first = pl.concat([own.filter(lang=lang).head(3) for lang in often])
        assert [case["message_id"] for case in cases] == first["message_id"].to_list()
        assert [case["evidence"] for case in cases] == first["evidence"].to_list()


def test_no_personal_data_stand_in_what_a_report_shows_of_any_rule(tmp_path: Path) -> None:
    late = " ".join(["word"] * 14)
    rows = [
        *chain("a", "b", b={"text": MAIL}), {"id": "c", "parent": "a", "text": MAIL.replace("jane.doe", "joe")},
        {"id": "lone", "text": "My card is 4111 1111 1111 1111, ask me@mail.org"},
        *chain("d", "e", e={"text": f"{late} {MAIL}", "deleted": True}),
    ]  # fmt: skip
    for pii in ("mask", "off"):
        made, _ = curated(messages_of(tmp_path / "in", *rows), tmp_path / pii, CurateParams(**ALL_TRAIN, pii=pii))
        shown = json.dumps(made.curation()["cases"])
        assert not any(part in shown for part in ("@", "4111", "0123", "jane"))
        assert all(mask in shown for mask in ("[e-mail]", "[card number]"))


def test_settings_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(ValidationError, match="nothing to train on"):
        CurateParams(test_fraction=0.5, val_fraction=0.5)
    with pytest.raises(ValidationError, match=r"label_limits\.quality"):
        CurateParams(label_limits={"quality": 1.5})
    with pytest.raises(ValidationError, match="there is no rule 'spamm'; did you mean spam"):
        CurateParams(rules=("spamm",))
    with pytest.raises(ValidationError, match="there is no label limit 'top_k'; known are spam, "):
        CurateParams(label_limits={"top_k": 0.5})


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        ("quality", {"label_limits": {"quality": 0.9}}),
        ("top_k", {"top_k": 2}),
        ("contaminated", {"contamination_ngram": 8}),
    ],
)
def test_a_limit_of_a_rule_that_is_left_out_is_refused(rule: str, limit: dict[str, Any]) -> None:
    others = tuple(name for name in RULES if name != rule)
    with pytest.raises(ValidationError, match=f'{next(iter(limit))}.* needs the rule "{rule}", which rules leaves out'):
        CurateParams(rules=others, **limit)
    CurateParams(rules=(rule,), **limit)
    CurateParams.model_validate(CurateParams(rules=others).model_dump())  # as a form sends it, all defaults spelled out


def test_every_rule_with_a_limit_names_its_settings() -> None:
    """What is in no list is a rule without a limit, or a setting of no rule."""
    listed = {name for rule in RULES.values() for name in rule.settings}
    assert listed <= set(CurateParams.model_fields)
    assert {*FilterSettings.model_fields} - listed == {"rules", "label_limits", "pii", "drop_facts"}


def test_a_label_limit_changes_only_what_it_names() -> None:
    changed = CurateParams(label_limits={"quality": 0.5}).label_limits
    assert changed == {**CurateParams().label_limits, "quality": 0.5}
    assert CurateParams(label_limits=changed).keyed() == CurateParams(label_limits={"quality": 0.5}).keyed()


def test_every_setting_is_described_for_the_form() -> None:
    fields = CurateParams.model_json_schema()["properties"]
    assert all(field.get("description") for field in fields.values())
    assert fields["rules"]["items"]["enum"] == list(RULES)
    limits = fields["label_limits"]["properties"]
    assert {name: limit["default"] for name, limit in limits.items()} == CurateParams().label_limits
    assert CurateParams().keyed()["rules"] == list(RULES)
