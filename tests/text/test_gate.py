import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from tasks.artifacts import DIALOGUE_COLUMNS, Dialogues, Tokens, arrow_schema, parquet_writer
from tasks.encode import EncodeParams, EncodeRuntime, encode
from tasks.errors import GateError
from tasks.store.manifest import Manifest
from tasks.text import gate, gate_source
from tasks.text import gate_reader as writing
from tasks.text.gate import check
from tasks.text.gate_checks import trained_as_often
from tasks.text.gate_reader import Stored, Written
from tasks.text.templates import Dialect, load_dialect


@dataclass(frozen=True)
class Said:
    """A message as it came in."""

    text: str
    role: str
    parent: str | None
    split: str


# Two conversations in the one sequence of each split: p0 a0 p1 a1, then q0 b0; in val v0 w0.
MESSAGES = {
    "p0": Said("Hello there", "prompter", None, "train"),
    "a0": Said("Hi, <|end|> you", "assistant", "p0", "train"),
    "p1": Said("How now?", "prompter", "a0", "train"),
    "a1": Said("Brown cow.", "assistant", "p1", "train"),
    "q0": Said("Who?", "prompter", None, "train"),
    "b0": Said("Me.", "assistant", "q0", "train"),
    "v0": Said("Where?", "prompter", None, "val"),
    "w0": Said("There.", "assistant", "v0", "val"),
}


def frame(messages: dict[str, Said]) -> pl.LazyFrame:
    """Return messages as the gate reads them."""
    rows = [("t", name, said.parent, said.role, said.split, said.text) for name, said in messages.items()]
    return pl.LazyFrame(rows, schema=dict.fromkeys(gate_source.SAID, pl.String), orient="row")


SAID = frame(MESSAGES)


def tokens_of(folder: Path, template: Literal["chat", "xml"]) -> Tokens:
    rows = [
        {
            "message_tree_id": "t", "message_id": name, "parent_id": said.parent, "depth": 0, "sibling": 0,
            "text": said.text, "role": said.role, "split": said.split,
        }
        for name, said in MESSAGES.items()
    ]  # fmt: skip
    manifest = Manifest("0" * 64, "dialogues", {}, {}, "0" * 64)
    with parquet_writer(folder / "dialogues.parquet", DIALOGUE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=arrow_schema(DIALOGUE_COLUMNS)))
    out = folder / "tokens"
    out.mkdir()
    params = EncodeParams(
        tokenizer="trained", vocab_size=280, context_length=256, sequence_length=256, template=template
    )
    encode.function(out, Dialogues(folder, manifest), params, EncodeRuntime(workers=1))
    return Tokens(out, manifest)


@pytest.fixture(scope="module", params=["chat", "xml"])
def tokens(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return tokens_of(tmp_path_factory.mktemp("gate"), request.param)


@pytest.fixture
def written(tokens: Tokens) -> Written:
    return Written(
        np.array(tokens.ids()), np.array(tokens.mask()), np.array(tokens.positions()), np.array(tokens.ends()),
        tokens.index().collect(), tokens.encoding().splits,
    )  # fmt: skip


@pytest.fixture
def dialect(tokens: Tokens) -> Dialect:
    return load_dialect(tokens.path)


def span(written: Written, name: str) -> tuple[int, slice]:
    """Return where a message lies: its sequence and its tokens."""
    row = written.index.row(by_predicate=pl.col("message_id") == name, named=True)
    return row["sequence"], slice(row["start"], row["stop"])


def last_trained(written: Written, name: str) -> tuple[int, int]:
    sequence, tokens = span(written, name)
    return sequence, tokens.start + int(np.flatnonzero(written.mask[sequence, tokens])[-1])


def test_what_the_step_writes_passes(written: Written, dialect: Dialect) -> None:
    assert check(written, dialect, SAID) == len(MESSAGES)
    assert written.ids.shape == (2, 256)


def test_the_gate_runs_inside_the_step_and_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "RULES", (lambda chunk, dialect: writing.fail("planted", "p0", "is refused"),))
    with pytest.raises(GateError, match="message p0"):
        tokens_of(tmp_path, "chat")


Plant = Callable[[Written, Dialect], None]


def no_target(written: Written, dialect: Dialect) -> None:
    written.mask[span(written, "w0")] = 0


def unknown_id(written: Written, dialect: Dialect) -> None:
    sequence, tokens = span(written, "p1")
    written.ids[sequence, tokens.stop - 1] = dialect.used


def trained_prompt(written: Written, dialect: Dialect) -> None:
    sequence, tokens = span(written, "p1")
    written.mask[sequence, tokens.start + 1] = 1


def untrained_end(written: Written, dialect: Dialect) -> None:
    written.mask[last_trained(written, "a0")] = 0


def wrong_end(written: Written, dialect: Dialect) -> None:
    written.ids[last_trained(written, "a0")] = 7


def untrained_reply(written: Written, dialect: Dialect) -> None:
    written.mask[span(written, "a0")] = 0


def hole_in_a_reply(written: Written, dialect: Dialect) -> None:
    sequence, end = last_trained(written, "a1")
    written.mask[sequence, end - 2] = 0
    fewer = pl.col("trained") - (pl.col("message_id") == "a1").cast(pl.Int32)
    object.__setattr__(written, "index", written.index.with_columns(trained=fewer))


def wrong_count(written: Written, dialect: Dialect) -> None:
    more = pl.col("trained") + (pl.col("message_id") == "b0").cast(pl.Int32)
    object.__setattr__(written, "index", written.index.with_columns(trained=more))


def forged_id(written: Written, dialect: Dialect) -> None:
    sequence, tokens = span(written, "q0")
    written.ids[sequence, tokens.stop - 2] = dialect.specials["<|end|>"]


def other_prompt(written: Written, dialect: Dialect) -> None:
    sequence, tokens = span(written, "p1")
    written.ids[sequence, tokens.start + len(dialect.tags.opens["user"])] ^= 1


def other_reply(written: Written, dialect: Dialect) -> None:
    sequence, end = last_trained(written, "b0")
    written.ids[sequence, end - len(dialect.tags.closes["assistant"])] ^= 1


def trained_padding(written: Written, dialect: Dialect) -> None:
    written.mask[0, -1] = 1


def seeing_padding(written: Written, dialect: Dialect) -> None:
    written.ends[0, -2] = 256


def seen_neighbour(written: Written, dialect: Dialect) -> None:
    sequence, tokens = span(written, "a0")
    written.ends[sequence, tokens.start] = span(written, "b0")[1].stop


def hidden_prompt(written: Written, dialect: Dialect) -> None:
    sequence, tokens = span(written, "p0")
    written.ends[sequence, tokens] = tokens.stop


def wrong_position(written: Written, dialect: Dialect) -> None:
    sequence, tokens = span(written, "q0")
    written.positions[sequence, tokens] += 1


def wrong_parent(written: Written, dialect: Dialect) -> None:
    object.__setattr__(written, "index", written.index.with_columns(parent=pl.col("parent").replace(2, 0)))


def wrong_role(written: Written, dialect: Dialect) -> None:
    object.__setattr__(written, "index", written.index.with_columns(role=pl.lit("assistant")))


def overlap(written: Written, dialect: Dialect) -> None:
    later = pl.col("stop") + (pl.col("message_id") == "a0").cast(pl.Int32)
    object.__setattr__(written, "index", written.index.with_columns(stop=later))


FAULTS: dict[Plant, tuple[str, str]] = {
    no_target: ("untrained", "v0"),
    unknown_id: ("id", "p1"),
    trained_prompt: ("mask", "p1"),
    untrained_end: ("stop", "a0"),
    wrong_end: ("stop", "a0"),
    untrained_reply: ("stop", "a0"),
    hole_in_a_reply: ("mask", "a1"),
    wrong_count: ("mask", "b0"),
    forged_id: ("special", "q0"),
    other_prompt: ("prefix", "p1"),
    other_reply: ("tokenizer", "b0"),
    trained_padding: ("padding", "b0"),
    seeing_padding: ("padding", "b0"),
    seen_neighbour: ("ends", "a0"),
    hidden_prompt: ("ends", "p0"),
    wrong_position: ("positions", "q0"),
    wrong_parent: ("source", "a1"),
    wrong_role: ("source", "p0"),
    overlap: ("range", "p1"),
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: str(plant.__name__))
def test_a_planted_fault_is_refused_and_its_message_named(plant: Plant, written: Written, dialect: Dialect) -> None:
    code, name = FAULTS[plant]
    plant(written, dialect)
    with pytest.raises(GateError) as caught:
        check(written, dialect, SAID)
    assert caught.value.code == f"gate.{code}"
    assert caught.value.where == f"message {name}"


def test_a_first_token_is_never_trained_on(written: Written, dialect: Dialect) -> None:
    """Planted where roles cannot tell: a conversation that an assistant opens."""
    opened = frame({**MESSAGES, "q0": replace(MESSAGES["q0"], role="assistant")})
    role = pl.when(pl.col("message_id") == "q0").then(pl.lit("assistant")).otherwise(pl.col("role"))
    sequence, tokens = span(written, "q0")
    written.mask[sequence, tokens.start] = 1
    with pytest.raises(GateError, match="q0") as caught:
        check(replace(written, index=written.index.with_columns(role=role)), dialect, opened)
    assert caught.value.code == "gate.first"


def test_a_message_in_the_sequences_of_another_split_is_refused(written: Written, dialect: Dialect) -> None:
    swapped = replace(written, splits={"train": (0, 0), "val": (0, 2)})
    with pytest.raises(GateError, match="p0") as caught:
        check(swapped, dialect, SAID)
    assert caught.value.code == "gate.split"


def test_a_message_that_nobody_wrote_is_refused(written: Written, dialect: Dialect) -> None:
    with pytest.raises(GateError, match="b0") as caught:
        check(written, dialect, SAID.filter(pl.col("message_id") != "b0"))
    assert caught.value.code == "gate.source"


def test_a_sequence_may_lie_in_a_chunk_of_its_own(
    written: Written, dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CHUNK", 1)
    monkeypatch.setattr(gate_source, "SLICE", 1)
    assert check(written, dialect, SAID) == len(MESSAGES)
    other_reply(written, dialect)
    with pytest.raises(GateError, match="b0"):
        check(written, dialect, SAID)


def test_what_is_stored_is_read_in_slices_as_it_was_written(tokens: Tokens) -> None:
    for array in (tokens.ids(), tokens.mask()):
        for rows in (slice(0, 1), slice(1, 2), slice(0, 9)):
            assert np.array_equal(Stored(array)[rows], array[rows])
    assert Stored(tokens.ids()).shape == (2, 256)


def test_of_much_text_a_sample_is_read_and_of_little_all(
    written: Written, dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_source, "SAMPLE", 30)
    assert 0 < check(written, dialect, SAID) < len(MESSAGES)


@pytest.mark.parametrize("name", ["p1", "b0"])
def test_a_text_that_was_not_drawn_is_still_checked_for_its_bytes(
    name: str, written: Written, dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_source, "SAMPLE", -1)
    assert check(written, dialect, SAID) == 0
    {"p1": other_prompt, "b0": other_reply}[name](written, dialect)
    with pytest.raises(GateError) as caught:
        check(written, dialect, SAID)
    assert (caught.value.code, caught.value.where) == ("gate.bytes", f"message {name}")


def test_the_tokenizer_file_counts_not_the_one_in_memory(tokens: Tokens, written: Written, tmp_path: Path) -> None:
    """A vocabulary exported wrongly is found, however right the arrays are."""
    shutil.copytree(tokens.path, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    assert '"H"' in text
    file.write_text(text.replace('"H":', '"\\u0000swap":').replace('"I":', '"H":').replace('"\\u0000swap":', '"I":'))
    with pytest.raises(GateError):
        check(written, load_dialect(tmp_path / "copy"), SAID)


def test_a_reply_that_is_trained_nowhere_is_refused(written: Written, dialect: Dialect) -> None:
    sequence, tokens = span(written, "a0")
    written.mask[sequence, tokens.start : tokens.stop] = 0
    index = written.index.with_columns(
        trained=pl.when(pl.col("message_id") == "a0").then(0).otherwise(pl.col("trained")).cast(pl.Int32)
    )
    with pytest.raises(GateError, match="a0") as caught:
        check(replace(written, index=index), dialect, SAID)
    assert caught.value.code == "gate.untrained"


@pytest.mark.parametrize(("trained", "good"), [([0, 4, 0, 0], True), ([0, 4, 0, 4], False), ([0, 0, 0, 0], False)])
def test_a_reply_of_a_tree_is_trained_once_wherever_else_it_is_context(
    written: Written, trained: list[int], good: bool
) -> None:
    index = pl.DataFrame({"message_id": list("qaqa"), "role": ["prompter", "assistant"] * 2, "trained": trained})
    tree, row = replace(written, index=index, once=True), np.array([0, 1, 0, 1])
    if good:
        trained_as_often(tree, row)
    else:
        with pytest.raises(GateError, match="exactly once"):
            trained_as_often(tree, row)
    with pytest.raises(GateError, match="wherever it stands") if 0 in trained[1::2] else nullcontext():
        trained_as_often(replace(tree, once=False), row)
