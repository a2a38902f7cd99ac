"""Step 3, curate: keep the messages worth learning from, still as trees, and give each tree a split.

Rules filter message by message, first by what the table says of it, then by its text; subtrees follow, prompts without
a reply go, copies and near copies go. Every message ends in exactly one of two tables: kept with its split, or dropped
with the reason and what the rule saw.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr, model_validator

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
from tasks.dialogue.record import (
    PROTECTION,
    CopyLimits,
    Limits,
    Share,
    Verdicts,
    near_evidence,
)  # fmt: skip
from tasks.errors import InputError, SourceChanged
from tasks.remembered import UNICODE, PerText, Remembered
from tasks.rows import per_name, per_text
from tasks.sources import LocalPath, allowed_file
from tasks.step import Params, TextsRuntime, step
from tasks.store.canonical import sha256_file

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import pyarrow as pa
    from numpy.typing import NDArray

    from tasks.dialogue.crossing import Compared
    from tasks.dialogue.dedupe import Likeness
    from tasks.dialogue.near import Count, Prints, Through
    from tasks.dialogue.reading import Reader, Seen
    from tasks.dialogue.texts import Masks, Texts

ROWS = 16_384  # of a row group: some 10 MB of text, so memory stays flat and readers can skip
# What it asks of each text alone, and of two.
LANGUAGE = Remembered("language", 1, "tasks.dialogue.language", ("pycld2", "polars"))
PERSONAL = Remembered("personal", 2, "tasks.dialogue.pii", ("polars", UNICODE))
NEAR_FINGERPRINT = Remembered("near-fingerprint", 1, "tasks.dialogue.fingerprint", ("polars", UNICODE))
NEAR_PAIRS = Remembered("near-pairs", 1, "tasks.dialogue.near", ("polars", UNICODE))
SCORES = {"labels": [f"label_{name}" for name in LABELS], "detoxify": [f"detoxify_{name}" for name in DETOXIFY]}


class CurateParams(Params, Limits, CopyLimits):
    """Settings of the curate step."""

    panel: tuple[str, ...] | None = None
    """Prompts that are not learnt from. None: those of `evaluate.panel`, where a recipe has one."""
    facts: tuple[str, ...] | None = None
    """Families of facts of which is counted what replies tell. None: those of `evaluate.facts`."""
    prompt_files: tuple[LocalPath, ...] = ()
    """More prompts that are not learnt from: text or JSON lines, in a folder named in TREELINE_SOURCE_ROOTS."""
    whole_threads: bool = False
    """Whether a thread, from first prompt to last reply, goes whole where one of its messages goes."""
    require_reply: bool = True
    """Whether prompts with no reply anywhere below them are dropped: there is nothing to train on."""
    dedupe: bool = True
    """Whether exact copies are dropped from the train split: the same said after the same."""
    near_dedupe: bool = True
    """Whether near copies of a long reply are dropped from the train split, but for the best: by rank, by quality."""
    repeat_prompts: bool = True
    """Whether first prompts may repeat in the train split, nearly or exactly, where their replies differ."""
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

    _keyed: tuple[str, ...] = PrivateAttr(default=())  # so that a file that changes after keying is found out

    def keyed(self) -> dict[str, Any]:
        """Return every setting; in place of a path how the file is read, and its content's hash."""
        from tasks.dialogue.prompts import format_of

        self._keyed = tuple(sha256_file(allowed_file(path)) for path in self.prompt_files)
        files = zip(self.prompt_files, self._keyed, strict=True)
        return {**super().keyed(), "prompt_files": [f"{format_of(path)} {digest}" for path, digest in files]}

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Yield where each prompt stands and what it says.

        Raises:
            InputError: For a line that holds none, or a file that changed since its hash entered the key.
        """
        from tasks.dialogue.prompts import read_prompts

        yield from ((f"panel {number}", text) for number, text in enumerate(self.panel or (), 1))
        for at, path in enumerate(self.prompt_files):
            content = allowed_file(path).read_bytes()
            if self._keyed and sha256(content).hexdigest() != self._keyed[at]:
                raise SourceChanged("the prompts changed while the run was at work", path, "Run again")
            for number, text in read_prompts(Path(path).name, content):
                yield f"file {at + 1} line {number}", text


class CurateRuntime(TextsRuntime):
    """How fast texts are read, never what is found in them."""


@step("curate", version=4, makes=Dialogues)
def curate(out: Path, messages: Messages, params: CurateParams, run: CurateRuntime) -> Counts:
    """Write `dialogues.parquet` and `dropped.parquet`, both in the order of the messages, and `curation.json`.

    Raises:
        InputError: If nothing is left, with the funnel that says where it went; for a file of prompts that is none.
    """
    from tasks.dialogue import tally
    from tasks.dialogue.quality import COLUMNS
    from tasks.dialogue.split import splits
    from tasks.dialogue.texts import Texts

    asked = {"message_tree_id", "message_id", "parent_id", "sibling", *COLUMNS} - {"text"}
    table = messages.scan().select(name for name in MESSAGE_COLUMNS if name in asked).collect()
    table = table.with_columns(splits(table["message_tree_id"], params.test_share, params.val_share))
    texts = Texts(messages.scan())
    verdicts, seen, shared = decide(table, texts, params)
    counts = {
        **tally.counts(table, verdicts),
        "funnel": tally.funnel(verdicts, stages(params)),
        "label_coverage": tally.coverage(messages.scan(), SCORES),
        "masked": sum(verdicts.reasons[row] is None for row in seen.masks),
        "facts": {"asked": seen.facts, "told_in_train": tally.told(table, verdicts, seen.told)} if seen.facts else {},
        "shared_across_splits": shared,
    }
    if not counts["messages"]:
        raise _nothing_left(counts, messages.path)
    _write(out, messages.scan(), table["split"], verdicts, seen.masks)
    told = tally.curation(table, texts, verdicts, counts)
    (out / "curation.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    return counts


def decide(table: pl.DataFrame, texts: Texts, params: CurateParams) -> tuple[Verdicts, Seen, dict[str, dict[str, int]]]:
    """Judge every message.

    Args:
        table: N messages, parents first, with `split` and the columns that the rules ask for, but for the text.
        texts: The texts of these.
        params: The settings.

    Returns:
        One verdict a message, kept only if its parent is; what was seen in the texts; and how many messages the splits
        share, see `_shared`.
    """
    from tasks.dialogue.crossing import Compared
    from tasks.dialogue.dedupe import likeness
    from tasks.dialogue.threads import parent_rows

    parents = parent_rows(table)
    with progress.bar("curate", 5, "passes") as bar:
        verdicts = _filtered(table, texts, parents, params)
        bar.advance(note="filtered")
        seen = _read(table, texts, parents, verdicts, params)
        texts = replace(texts, masks=seen.masks)
        if params.whole_threads:
            _keep_whole(table, parents, verdicts)
        _settle(table, parents, verdicts, params)
        filtered = verdicts.kept()
        bar.advance(note="read")
        prints = _prints(texts, filtered, params)
        alike = likeness(table, prints, texts.of, filtered, params, _remembering(params))
        given = Compared((table["role"] == "assistant").to_numpy(), table["split"], prints, texts.of, params)
        bar.advance(note="compared")
        if params.separate_splits:
            _separate(table, given, alike, parents, verdicts, params)
        bar.advance(note="splits separated")
        _thin(table, given, alike, parents, verdicts, params)
        _follow(table, given, parents, verdicts)
        bar.advance(note="deduplicated")
    return verdicts, seen, _shared(table, given, alike, filtered, verdicts.kept(), params)


def _separate(
    table: pl.DataFrame, given: Compared, alike: Likeness, parents: list[int], verdicts: Verdicts, params: CurateParams
) -> None:
    """Drop what two splits share from the less protected one; first, so that no copy goes for one that leaks."""
    from tasks.dialogue.crossing import crossing
    from tasks.dialogue.dedupe import leaks

    ids = table["message_id"].to_list()
    for yielding in PROTECTION[1:]:
        verdicts.drop_copies("leak", leaks(table, alike, verdicts.kept(), yielding), ids)
        if alike.crowded:
            verdicts.drop_copies("leak", crossing(given, alike, verdicts.kept(), yielding), ids)
        _settle(table, parents, verdicts, params)


def _thin(
    table: pl.DataFrame, given: Compared, alike: Likeness, parents: list[int], verdicts: Verdicts, params: CurateParams
) -> None:
    """Drop copies and near copies from the train split; where many are alike, until no more are found."""
    from tasks.dialogue.dedupe import duplicates, likeness, near_duplicates, repeated_prompts

    ids, prints = table["message_id"].to_list(), given.prints
    if not params.repeat_prompts:
        verdicts.drop_copies("near_duplicate", repeated_prompts(table, alike, parents, verdicts.kept()), ids)
        _settle(table, parents, verdicts, params)
    if params.dedupe:
        twins = duplicates(table, prints, parents, verdicts.kept())
        verdicts.drop_copies("duplicate", {row: (twin, 1.0) for row, twin in twins.items()}, ids)
    while params.near_dedupe:
        found = near_duplicates(table, alike, parents, verdicts.kept())
        verdicts.drop_copies("near_duplicate", found, ids)
        _settle(table, parents, verdicts, params)
        if not found or not alike.crowded:
            break
        alike = likeness(table, prints, given.texts_of, verdicts.kept(), params, _remembering(params))


def _follow(table: pl.DataFrame, given: Compared, parents: list[int], verdicts: Verdicts) -> None:
    """Let evidence name messages that are kept: a twin may have gone for its own twin, or with what stood above it."""
    import numpy as np

    from tasks.dialogue.near import jaccard
    from tasks.dialogue.threads import nearest_above

    moved, ids = verdicts.outlived(), table["message_id"]
    if not moved:
        return
    rows, ends = (np.array([*side], dtype=np.int64) for side in (moved.keys(), moved.values()))
    similarity = jaccard(given.texts_of, given.limits.near_ngram, rows, ends).tolist()
    above = nearest_above(parents, [not stays for stays in verdicts.kept()])
    for (row, last), index in zip(moved.items(), similarity, strict=True):
        if verdicts.reasons[last] is None:
            told = "near_duplicate", near_evidence(ids[last], index)
        elif above[row] >= 0:
            told = "parent", ids[above[row]]
        else:
            continue
        verdicts.reasons[row], verdicts.evidence[row] = told


def _filtered(table: pl.DataFrame, texts: Texts, parents: list[int], params: CurateParams) -> Verdicts:
    """Judge every message by the rules, whole trees at a time, so that a message's thread is at hand."""
    from tasks.dialogue.quality import in_thread, judge, rules_of
    from tasks.dialogue.texts import WINDOW
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
    settings: dict[str, Any] = {
        name: getattr(params, f"near_{name}") for name in ("ngram", "permutations", "threshold")
    }
    function, done = NEAR_FINGERPRINT.of(partial(compute, **settings), settings), 0
    for part, within in texts.parts(rows):
        found = Prints.of(per_text(function, part.gather(within)))
        own = rows[done : done + len(within)]
        made.digests[own], made.chars[own], made.keys[own] = found.digests, found.chars, found.keys
        done += len(within)
    return made


def _remembering(params: CurateParams) -> Through:
    """Return what counts of pairs of texts only those that were never counted."""
    import pyarrow as pa

    function = NEAR_PAIRS.named({"ngram": params.near_ngram})

    def through(names: NDArray[np.uint64], count: Count) -> NDArray[np.float64]:
        made = per_name(function, names, lambda places: pa.record_batch({"similarity": count(places)}))
        similarity: NDArray[np.float64] = made["similarity"].to_numpy()
        return similarity

    return through


def _read(table: pl.DataFrame, texts: Texts, parents: list[int], verdicts: Verdicts, params: CurateParams) -> Seen:
    """Judge what is left by its text, a window at a time."""
    import polars as pl

    rows = table.select("role", above=pl.Series(parents, dtype=pl.Int64)).with_row_index("row")
    replies = rows.filter(role="assistant").select(pl.col("row").cast(pl.Int64), "above")
    starts = range(0, len(table), ROWS)
    windows = ((at, pl.DataFrame([texts.between(at, at + ROWS), table["lang"].slice(at, ROWS)])) for at in starts)
    return _reader(params).read(windows, replies, verdicts)


def _reader(params: CurateParams) -> Reader:
    from tasks.dialogue import language, pii
    from tasks.dialogue.contamination import Asked, Facts, Index, Told
    from tasks.dialogue.reading import Reader
    from tasks.oasst.facts import facts_of

    chars = params.text_language_chars
    told = [
        Told(f"{fact.family} of {fact.subject}", fact.subject, (fact.answer, *fact.aliases))
        for fact in facts_of(params.facts or ())
    ]
    return Reader(
        params,
        partial(_rows_of, LANGUAGE.of(partial(language.detect, chars=chars), {"chars": chars})),
        partial(_rows_of, PERSONAL.of(pii.scan, {})),
        Index([Asked(where, text) for where, text in params.prompts()], params.overlap_words),
        Facts(told),
    )


def _rows_of(function: PerText, texts: pl.Series) -> pl.DataFrame:
    """Return what a function gives for texts, of which it remembers those that it has seen."""
    import polars as pl

    return pl.DataFrame(per_text(function, texts))


def _keep_whole(table: pl.DataFrame, parents: list[int], verdicts: Verdicts) -> None:
    """Drop what no whole thread goes through."""
    from tasks.dialogue.selection import in_whole_threads

    replies = (table["role"] == "assistant").to_list()
    held = in_whole_threads(parents, replies, table["sibling"].to_list(), verdicts.kept())
    verdicts.drop("thread", {row: "no thread through it is whole" for row, whole in enumerate(held) if not whole})


def _shared(
    table: pl.DataFrame,
    given: Compared,
    alike: Likeness,
    filtered: list[bool],
    kept: list[bool],
    params: CurateParams,
) -> dict[str, dict[str, int]]:
    """Count the first prompts and long replies of which a copy, or else a near copy, stands in another split.

    `kept` is what is written, 0 if splits are separated: what is kept is compared once more, in every bucket, so that
    this would find what separating missed. The others are what three ways to split would share of what the filters
    left: by tree as here, by row at random, and by the order of the file.
    """
    from tasks.dialogue.crossing import crossing
    from tasks.dialogue.dedupe import shared
    from tasks.dialogue.split import in_order, splits

    equal, shares = replace(alike, near={}), (params.test_share, params.val_share)
    by_tree = table["split"].to_list()
    ways = {
        "kept": (by_tree, kept),
        "by_tree": (by_tree, filtered),
        "by_row": (splits(table["message_id"], *shares).to_list(), filtered),
        "by_file_order": (in_order(len(table), *shares), filtered),
    }
    exact = {way: len(shared(equal, *one)) for way, one in ways.items()}
    near = {way: shared(alike, *one) for way, one in ways.items()}
    for yielding in PROTECTION[1:]:
        near["kept"] |= crossing(given, alike, kept, yielding).keys()
    return {way: {"exact": exact[way], "near": len(near[way]) - exact[way]} for way in ways}


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


def stages(params: CurateParams) -> list[str]:
    """Return the names of what may drop a message under these settings, in the order of judgement."""
    others = {
        "fact": params.drop_facts,
        "thread": params.whole_threads,
        "parent": True,
        "no_reply": params.require_reply,
        "leak": params.separate_splits,
        "duplicate": params.dedupe,
        "near_duplicate": params.near_dedupe or not params.repeat_prompts,
    }
    return [*params.rules, *(name for name, active in others.items() if active)]


def _nothing_left(counts: Counts, where: Path) -> InputError:
    spent = ", ".join(f"{name} {number:,}" for name, number in counts["funnel"].items() if number)
    return InputError(
        f"none of {counts['read']['messages']:,} messages is left; dropped by {spent or 'nothing: there were none'}",
        str(where),
        "Loosen the rule that took the most, for example --set curate.languages=[] or --set curate.tree_states=[], "
        "or choose another source",
        "curate.empty",
    )


def _write(out: Path, messages: pl.LazyFrame, splits: pl.Series, verdicts: Verdicts, masks: Masks) -> None:
    """Write both tables, reading the messages once more, a row group at a time; only what is kept is masked."""
    import polars as pl

    from tasks.dialogue.texts import masked

    stay = {row: mask for row, mask in masks.items() if verdicts.reasons[row] is None}
    told = {"reason": verdicts.reasons, "evidence": verdicts.evidence}
    verdict = pl.DataFrame({"split": splits, **told}, dict.fromkeys(("split", *told), pl.String)).with_columns(
        masked=pl.Series([None], dtype=pl.String)
        .new_from_index(0, len(splits))
        .scatter([*stay], pl.Series([what for _, what in stay.values()], dtype=pl.String))
    )
    with (
        parquet_writer(out / "dialogues.parquet", DIALOGUE_COLUMNS) as kept,
        parquet_writer(out / "dropped.parquet", DROPPED_COLUMNS) as dropped,
        progress.bar("curate: write", len(verdict), "messages") as bar,
    ):
        for start in range(0, len(verdict), ROWS):
            part = verdict.slice(start, ROWS)
            rows = messages.slice(start, ROWS).collect()
            rows = pl.concat([rows.with_columns(masked(rows["text"], stay, start)), part], how="horizontal")
            for writer, stays, columns in ((kept, True, DIALOGUE_COLUMNS), (dropped, False, DROPPED_COLUMNS)):
                chosen = rows.filter(pl.col("reason").is_null() == stays)
                if len(chosen):
                    writer.write_table(_arrow(chosen, columns))
            bar.advance(len(part))


def _arrow(rows: pl.DataFrame, columns: Mapping[str, str]) -> pa.Table:
    """Return rows in the Arrow types that the artifact promises; polars has wider ones for text."""
    return rows.select(list(columns)).to_arrow().cast(arrow_schema(columns))
