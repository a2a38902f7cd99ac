"""Step 3, curate: keep the messages worth learning from, still as trees, and give each tree a split.

Rules filter message by message, subtrees follow, prompts without a reply go, copies and near copies go. Every message
ends in exactly one of two tables: kept with its split, or dropped with the reason and what the rule saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import model_validator

from tasks import progress
from tasks.artifacts import (
    DETOXIFY,
    DIALOGUE_COLUMNS,
    DROPPED_COLUMNS,
    LABELS,
    MESSAGE_COLUMNS,
    Counts,
    Dialogues,
    Messages,
    arrow_schema,
    parquet_writer,
)
from tasks.dialogue.record import PROTECTION, CopyLimits, Limits, Share, Verdicts, near_evidence
from tasks.errors import InputError
from tasks.step import Params, step

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import pyarrow as pa
    from numpy.typing import NDArray

    from tasks.dialogue.dedupe import Likeness, Twin
    from tasks.dialogue.near import Prints

ROWS = 16_384  # of a row group: some 10 MB of text, so memory stays flat and readers can skip
WINDOW = 4 * ROWS  # messages whose texts are in memory at once
TOP_LANGUAGES = 20  # what a summary can show


class CurateParams(Params, Limits, CopyLimits):
    """Settings of the curate step."""

    require_reply: bool = True
    """Whether prompts with no reply anywhere below them are dropped: there is nothing to train on."""
    dedupe: bool = True
    """Whether exact copies are dropped: the same said after the same, up to case, width and white space."""
    near_dedupe: bool = True
    """Whether near copies of a long reply are dropped, but for the best: by rank, then by quality."""
    repeat_prompts: bool = True
    """Whether first prompts may repeat within a split, nearly or exactly, where their replies differ."""
    separate_splits: bool = True
    """Whether what two splits hold, nearly or exactly, goes from the less protected one: train, then val."""
    test_share: Share = 0.05
    """Share of the trees that only the evaluation sees, 0 to 1."""
    val_share: Share = 0.05
    """Share of the trees that choose the best checkpoint, 0 to 1."""

    @model_validator(mode="after")
    def _leaves_some_to_train_on(self) -> CurateParams:
        if self.test_share + self.val_share >= 1:
            raise ValueError(f"test_share {self.test_share} and val_share {self.val_share} leave nothing to train on")
        return self


@step("curate", version=3, makes=Dialogues)
def curate(out: Path, messages: Messages, params: CurateParams) -> Counts:
    """Write `dialogues.parquet` and `dropped.parquet`, both in the order of the messages.

    Raises:
        InputError: If nothing is left, with the funnel that says where it went.
    """
    from tasks.dialogue.quality import COLUMNS
    from tasks.dialogue.split import splits

    asked = {"message_tree_id", "message_id", "parent_id", "rank", *COLUMNS} - {"text"}
    table = messages.scan().select(name for name in MESSAGE_COLUMNS if name in asked).collect()
    table = table.with_columns(splits(table["message_tree_id"], params.test_share, params.val_share))
    verdicts, shared = decide(table, Texts(messages.scan()), params)
    counts = {**_counts(messages.scan(), table, verdicts, params), "shared_across_splits": shared}
    if not counts["messages"]:
        raise _nothing_left(counts, messages.path)
    _write(out, messages.scan(), table["split"], verdicts)
    return counts


@dataclass(frozen=True)
class Texts:
    """The texts of N messages, read from disk a window at a time: all of them would fill the memory.

    Attributes:
        messages: N rows with text.
    """

    messages: pl.LazyFrame

    def between(self, start: int, stop: int) -> pl.Series:
        """Return the texts of the rows from one on and up to another: (stop - start,)."""
        return self.messages.slice(start, stop - start).select("text").collect()["text"]

    def of(self, rows: NDArray[np.int64]) -> pa.Array:
        """Return the texts of some rows, which stand in order: (rows,)."""
        import pyarrow as pa

        found = [part.gather(within).to_arrow().cast(pa.large_string()) for part, within in self.parts(rows)]
        return pa.concat_arrays(found) if found else pa.array([], pa.large_string())

    def parts(self, rows: NDArray[np.int64]) -> Iterator[tuple[pl.Series, NDArray[np.int64]]]:
        """Yield windows of texts and the places of the asked rows in them; windows without any are not read."""
        import numpy as np

        for window in np.split(rows, np.flatnonzero(np.diff(rows // WINDOW)) + 1) if len(rows) else []:
            start = int(window[0] // WINDOW) * WINDOW
            yield self.between(start, start + WINDOW), window - start


def decide(table: pl.DataFrame, texts: Texts, params: CurateParams) -> tuple[Verdicts, dict[str, int]]:
    """Judge every message.

    Args:
        table: N messages, parents first, with `split` and the columns that the rules ask for, but for the text.
        texts: The texts of these.
        params: The settings.

    Returns:
        One verdict a message, kept only if its parent is; and how many messages the splits share, see `_shared`.
    """
    from tasks.dialogue.dedupe import duplicates, leaks, likeness, near_duplicates, repeated_prompts
    from tasks.dialogue.threads import parent_rows

    parents, ids = parent_rows(table), table["message_id"]
    with progress.bar("curate", 4, "passes") as bar:
        verdicts = _filtered(table, texts, parents, params)
        _settle(table, parents, verdicts, params)
        filtered = verdicts.kept()
        bar.advance(note="filtered")
        prints = _prints(texts, filtered, params)
        alike = likeness(table, prints, texts.of, filtered, params)
        bar.advance(note="compared")
        if params.dedupe:
            twins = duplicates(table, prints, parents, filtered)
            verdicts.drop("duplicate", {row: ids[twin] for row, twin in twins.items()})
        if not params.repeat_prompts:
            verdicts.drop("near_duplicate", _named(repeated_prompts(table, alike, parents, verdicts.kept()), ids))
            _settle(table, parents, verdicts, params)
        if params.near_dedupe:
            verdicts.drop("near_duplicate", _named(near_duplicates(table, alike, parents, verdicts.kept()), ids))
            _settle(table, parents, verdicts, params)
        bar.advance(note="deduplicated")
        for yielding in PROTECTION[1:] if params.separate_splits else ():
            verdicts.drop("leak", _named(leaks(table, alike, verdicts.kept(), yielding), ids))
            _settle(table, parents, verdicts, params)
        bar.advance(note="splits separated")
    return verdicts, _shared(table, alike, filtered, verdicts.kept(), params)


def _filtered(table: pl.DataFrame, texts: Texts, parents: list[int], params: CurateParams) -> Verdicts:
    """Judge every message by the rules, whole trees at a time, so that a message's thread is at hand."""
    from tasks.dialogue.quality import in_thread, judge, rules_of
    from tasks.dialogue.threads import windows

    rules, verdicts = rules_of(params), Verdicts([], [])
    for start, stop in windows(parents, WINDOW):
        part = table.slice(start, stop - start).with_columns(texts.between(start, stop))
        above = [parent - start if parent >= 0 else -1 for parent in parents[start:stop]]
        found = judge(in_thread(part, above), rules)
        verdicts.reasons.extend(found.reasons)
        verdicts.evidence.extend(found.evidence)
    return verdicts


def _prints(texts: Texts, kept: list[bool], params: CurateParams) -> Prints:
    """Return the fingerprints of the kept messages' texts; zeros stand for those of the others."""
    import numpy as np

    from tasks.dialogue.fingerprint import bands, compute
    from tasks.dialogue.near import Prints

    rows = np.flatnonzero(kept)
    count, _ = bands(params.near_permutations, params.near_threshold)
    made = Prints(
        np.zeros((len(kept), 2), dtype=np.uint64),
        np.zeros(len(kept), dtype=np.int32),
        np.zeros((len(kept), count), dtype=np.uint32),
    )
    done = 0
    for part, within in texts.parts(rows):
        settings = (params.near_ngram, params.near_permutations, params.near_threshold)
        found = Prints.of(compute(part.gather(within).to_arrow(), *settings))
        own = rows[done : done + len(within)]
        made.digests[own], made.chars[own], made.keys[own] = found.digests, found.chars, found.keys
        done += len(within)
    return made


def _named(twins: Mapping[int, Twin], ids: pl.Series) -> dict[int, str]:
    return {row: near_evidence(ids[twin], similarity) for row, (twin, similarity) in twins.items()}


def _shared(
    table: pl.DataFrame, alike: Likeness, filtered: list[bool], kept: list[bool], params: CurateParams
) -> dict[str, int]:
    """Count the first prompts and long replies of which a copy or near copy stands in another split.

    `kept` is what is written, 0 if splits are separated. The others are what three ways to split would share of what
    the filters left: by tree as here, by row at random, and by the order of the file.
    """
    from tasks.dialogue.dedupe import shared
    from tasks.dialogue.split import in_order, splits

    by_tree, shares = table["split"].to_list(), (params.test_share, params.val_share)
    return {
        "kept": shared(alike, by_tree, kept),
        "by_tree": shared(alike, by_tree, filtered),
        "by_row": shared(alike, splits(table["message_id"], *shares).to_list(), filtered),
        "by_file_order": shared(alike, in_order(len(table), *shares), filtered),
    }


def _settle(table: pl.DataFrame, parents: list[int], verdicts: Verdicts, params: CurateParams) -> None:
    """Drop what cannot stay after others were dropped: their descendants, and prompts that no reply is left for."""
    from tasks.dialogue.threads import holds, nearest_above

    ids, kept = table["message_id"].to_list(), verdicts.kept()
    above = nearest_above(parents, [not stays for stays in kept])
    verdicts.drop("parent", {row: ids[gone] for row, gone in enumerate(above) if gone >= 0})
    if params.require_reply:
        kept = verdicts.kept()
        replies = [stays and role == "assistant" for stays, role in zip(kept, table["role"], strict=True)]
        answered = holds(parents, replies)
        verdicts.drop("no_reply", {row: "no reply below" for row, found in enumerate(answered) if not found})


def _counts(messages: pl.LazyFrame, table: pl.DataFrame, verdicts: Verdicts, params: CurateParams) -> Counts:
    """Measure what was kept and where the rest went; `trees` and `messages` are the kept ones."""
    import polars as pl

    kept = table.filter(pl.Series(verdicts.kept(), dtype=pl.Boolean))
    return {
        "trees": kept["message_tree_id"].n_unique(),
        "messages": len(kept),
        "dropped": len(table) - len(kept),
        "read": {"trees": table["message_tree_id"].n_unique(), "messages": len(table)},
        "funnel": _funnel(verdicts, params),
        "splits": {name: _sizes(kept.filter(pl.col("split") == name)) for name in reversed(PROTECTION)},
        "label_coverage": _coverage(messages),
        "languages": _languages(table),
    }


def _funnel(verdicts: Verdicts, params: CurateParams) -> dict[str, int]:
    """Return messages dropped by each rule that was asked for, in the order of judgement."""
    stages = {
        "parent": True,
        "no_reply": params.require_reply,
        "duplicate": params.dedupe,
        "near_duplicate": params.near_dedupe or not params.repeat_prompts,
        "leak": params.separate_splits,
    }
    names = [*params.rules, *(name for name, active in stages.items() if active)]
    found = dict.fromkeys(names, 0)
    for reason in verdicts.reasons:
        if reason is not None:
            found[reason] += 1
    return found


def _sizes(kept: pl.DataFrame) -> dict[str, int]:
    replies = int((kept["role"] == "assistant").sum())
    return {"trees": kept["message_tree_id"].n_unique(), "messages": len(kept), "replies": replies}


def _coverage(messages: pl.LazyFrame) -> dict[str, float]:
    """Return the share of messages with at least one label, and with Detoxify's scores: rules on them see no others."""
    import polars as pl

    groups = {"labels": [f"label_{name}" for name in LABELS], "detoxify": [f"detoxify_{name}" for name in DETOXIFY]}
    shares = {
        name: pl.any_horizontal(pl.col(column).is_not_null() for column in columns).mean()
        for name, columns in groups.items()
    }
    found = messages.select(**shares).collect().row(0, named=True)
    return {name: round(share or 0.0, 4) for name, share in found.items()}


def _languages(table: pl.DataFrame) -> dict[str, int]:
    """Return messages read of each of the most frequent languages; `unknown` where none is given."""
    import polars as pl

    table = table.select(pl.col("lang").fill_null("unknown")).group_by("lang").len()
    return dict(table.sort("len", "lang", descending=[True, False]).head(TOP_LANGUAGES).iter_rows())


def _nothing_left(counts: Counts, where: Path) -> InputError:
    spent = ", ".join(f"{name} {number:,}" for name, number in counts["funnel"].items() if number)
    return InputError(
        f"none of {counts['read']['messages']:,} messages is left; dropped by {spent or 'nothing: there were none'}",
        str(where),
        "Loosen the rule that took the most, for example --set curate.languages=[] or --set curate.tree_states=[], "
        "or choose another source",
        "curate.empty",
    )


def _write(out: Path, messages: pl.LazyFrame, splits: pl.Series, verdicts: Verdicts) -> None:
    """Write both tables, reading the messages once more, a row group at a time."""
    import polars as pl

    verdict = pl.DataFrame(
        {"split": splits, "reason": verdicts.reasons, "evidence": verdicts.evidence},
        schema={"split": pl.String, "reason": pl.String, "evidence": pl.String},
    )
    with (
        parquet_writer(out / "dialogues.parquet", DIALOGUE_COLUMNS) as kept,
        parquet_writer(out / "dropped.parquet", DROPPED_COLUMNS) as dropped,
        progress.bar("curate: write", len(verdict), "messages") as bar,
    ):
        for start in range(0, len(verdict), ROWS):
            part = verdict.slice(start, ROWS)
            rows = pl.concat([messages.slice(start, ROWS).collect(), part], how="horizontal")
            for writer, stays, columns in ((kept, True, DIALOGUE_COLUMNS), (dropped, False, DROPPED_COLUMNS)):
                chosen = rows.filter(pl.col("reason").is_null() == stays)
                if len(chosen):
                    writer.write_table(_arrow(chosen, columns))
            bar.advance(len(part))


def _arrow(rows: pl.DataFrame, columns: Mapping[str, str]) -> pa.Table:
    """Return rows in the Arrow types that the artifact promises; polars has wider ones for text."""
    return rows.select(list(columns)).to_arrow().cast(arrow_schema(columns))
