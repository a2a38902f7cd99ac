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
    FAST,
    LABELS,
    MESSAGE_COLUMNS,
    MESSAGE_DISTINCT,
    Counts,
    Dialogues,
    Messages,
    arrow_schema,
    parquet_writer,
)
from tasks.dialogue.settings import RULES, DuplicateSettings, FilterSettings, Share, deciding_setting
from tasks.dialogue.verdicts import Verdicts
from tasks.errors import InputError, SourceChanged
from tasks.notices import of_curate, spent
from tasks.sources import LocalPath, allowed_file
from tasks.step import Params, TextsRuntime, step
from tasks.store.canonical import sha256_file
from tasks.text_chunks import map_texts

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from tasks.dialogue.text_rules import Reader, Seen
    from tasks.dialogue.texts import Masks, Texts
    from tasks.text_chunks import ChunkFunction

ROWS = 16_384  # of a row group: some 10 MB of text, so memory stays flat and readers can skip
# Columns that are needed whatever the rules; rank and label_quality choose which duplicate stays.
STRUCTURE = ("message_tree_id", "message_id", "parent_id", "sibling", "rank", "label_quality")
SCORES = {"labels": [f"label_{name}" for name in LABELS], "detoxify": [f"detoxify_{name}" for name in DETOXIFY]}


class CurateParams(Params, FilterSettings, DuplicateSettings):
    """Settings of the curate step."""

    sample_prompts: tuple[str, ...] | None = None
    """Prompts that are not learnt from. None: those of `evaluate.sample_prompts`, where a recipe has one."""
    fact_families: tuple[str, ...] | None = None
    """Families of facts of which is counted what replies tell. None: those of `evaluate.fact_families`."""
    prompt_files: tuple[LocalPath, ...] = ()
    """More prompts that are not learnt from: text or JSON lines, in a folder named in TREELINE_SOURCE_ROOTS."""
    whole_threads: bool = False
    """Whether a thread, from first prompt to last reply, goes whole where one of its messages goes."""
    require_reply: bool = True
    """Whether prompts with no reply anywhere below them are dropped: there is nothing to train on."""
    test_fraction: Share = 0.05
    """Share of the trees that only the evaluation sees, 0 to 1."""
    val_fraction: Share = 0.05
    """Share of the trees that choose the best checkpoint, 0 to 1."""

    @model_validator(mode="after")
    def _leaves_some_to_train_on(self) -> CurateParams:
        if self.test_fraction + self.val_fraction >= 1:
            raise ValueError(
                f"test_fraction {self.test_fraction} and val_fraction {self.val_fraction} leave nothing to train on"
            )
        return self

    @model_validator(mode="after")
    def _acts(self) -> CurateParams:
        """Refuse a setting of a rule that `rules` leaves out: it would be thought to act."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        for rule, spec in RULES.items():
            if rule in self.rules:
                continue
            changed = [name for name in spec.settings if getattr(self, name) != defaults[name]]
            if spec.label and self.label_limits[rule] != spec.label.default:
                changed = [deciding_setting(rule)]
            if changed:
                raise ValueError(
                    f'{changed[0]} needs the rule "{rule}", which rules leaves out; leave out one of the two'
                )
        return self

    @model_validator(mode="after")
    def _drops_by_a_rule(self) -> CurateParams:
        if self.pii == "drop" and "personal" not in self.rules:
            raise ValueError('pii "drop" needs the rule "personal", which rules leaves out; add it, or choose "mask"')
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
            InputError: For a line or a file that holds none, or a file that changed since its hash entered the key.
        """
        from tasks.dialogue.prompts import read_prompts

        yield from ((f"panel {number}", text) for number, text in enumerate(self.sample_prompts or (), 1))
        for at, path in enumerate(self.prompt_files):
            content = allowed_file(path).read_bytes()
            if self._keyed and sha256(content).hexdigest() != self._keyed[at]:
                raise SourceChanged("the prompts changed while the run was at work", path, "Run again")
            for number, text in read_prompts(Path(path).name, content):
                yield f"file {at + 1} line {number}", text


class CurateRuntime(TextsRuntime):
    """How fast texts are read, never what is found in them."""


@step("curate", version=8, makes=Dialogues, notices=of_curate)
def curate(out: Path, messages: Messages, params: CurateParams, run: CurateRuntime) -> Counts:
    """Write `dialogues.parquet` and `dropped.parquet`, both in the order of the messages, and `curation.json`.

    Raises:
        InputError: If nothing is left, with the funnel that says where it went; for a file of prompts that is none.
    """
    from tasks.dialogue import stats
    from tasks.dialogue.rules import columns_of, rules_of
    from tasks.dialogue.split import splits
    from tasks.dialogue.texts import Texts

    needed = {*STRUCTURE, *columns_of(rules_of(params))}
    table = messages.scan().select(name for name in MESSAGE_COLUMNS if name in needed - {"text"}).collect()
    table = table.with_columns(splits(table["message_tree_id"], params.test_fraction, params.val_fraction))
    texts = Texts(messages.scan())
    verdicts, seen, shared = decide(table, texts, params, run.workers)
    counts = {
        **stats.counts(table, verdicts),
        "funnel": stats.funnel(verdicts, stages(params)),
        "replies_dropped": stats.replies_dropped(table, verdicts),
        "label_coverage": stats.coverage(messages.scan(), SCORES),
        "masked": sum(verdicts.reasons[row] is None for row in seen.masks),
        "untagged": table["lang"].null_count(),
        "prompts_sought": seen.prompts,
        "facts": {"asked": seen.facts, "told_in_train": stats.told(table, verdicts, seen.told)} if seen.facts else {},
        "shared_across_splits": shared,
    }
    if not counts["messages"]:
        raise _nothing_left(counts, messages.path)
    _write(out, messages.scan(), texts, table["split"], verdicts, seen.masks)
    told = stats.curation(table, texts, verdicts, counts)
    (out / "curation.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    return counts


def decide(
    table: pl.DataFrame, texts: Texts, params: CurateParams, workers: int = 0
) -> tuple[Verdicts, Seen, dict[str, dict[str, int]]]:
    """Judge every message.

    Args:
        table: N messages, parents first, with `split` and the columns that the rules ask for, but for the text.
        texts: The texts of these.
        params: The settings.
        workers: Threads that work on texts; 0: one a core.

    Returns:
        One verdict a message, kept only if its parent is; what was seen in the texts; and how many messages the splits
        share, see `shared_across_splits`.
    """
    from tasks.deduplicate import Copies, prints_of, shared_across_splits
    from tasks.dialogue.dedupe import likeness
    from tasks.dialogue.leakage import Compared
    from tasks.dialogue.texts import compared, opening
    from tasks.dialogue.tree import parent_rows
    from tasks.oasst.validators import SYSTEM_CHARS

    parents = parent_rows(table)
    with progress.bar("curate", 5, "passes") as bar:
        verdicts = _filtered(table, texts, parents, params)
        bar.advance(note="filtered")
        own = replace(texts, opens=opening(texts.messages, SYSTEM_CHARS))
        reader = _reader(params, workers)
        seen = _read(table, texts, own, parents, verdicts, reader)
        own = compared(own, seen.masks, reader.personal)
        if params.whole_threads:
            _keep_whole(table, parents, verdicts)
        drop_stranded = partial(_drop_stranded, table, parents, verdicts, params)
        drop_stranded()
        filtered = verdicts.kept()
        bar.advance(note="read")
        replies = (table["role"] == "assistant").to_numpy()
        prints = prints_of(own, filtered, params, workers)
        given = Compared(replies, table["split"], prints, own.of, params)
        alike = likeness(table, prints, own.of, filtered, params)
        copies = Copies(table, parents, verdicts, given, alike, drop_stranded)
        bar.advance(note="compared")
        if params.drop_cross_split_duplicates:
            copies.separate()
        bar.advance(note="splits separated")
        copies.thin()
        copies.follow()
        bar.advance(note="deduplicated")
    return verdicts, seen, shared_across_splits(copies, filtered, (params.test_fraction, params.val_fraction))


def _filtered(table: pl.DataFrame, texts: Texts, parents: list[int], params: CurateParams) -> Verdicts:
    """Judge every message by the rules, whole trees at a time, so that a message's thread is at hand."""
    from tasks.dialogue.rules import in_thread, judge, rules_of
    from tasks.dialogue.texts import WINDOW
    from tasks.dialogue.tree import windows

    rules, verdicts = rules_of(params), Verdicts([], [])
    for start, stop in windows(parents, WINDOW):
        part = table.slice(start, stop - start).with_columns(texts.between(start, stop))
        above = [parent - start if parent >= 0 else -1 for parent in parents[start:stop]]
        found = judge(in_thread(part, above), rules)
        verdicts.reasons.extend(found.reasons)
        verdicts.evidence.extend(found.evidence)
    return verdicts


def _read(
    table: pl.DataFrame, texts: Texts, own: Texts, parents: list[int], verdicts: Verdicts, reader: Reader
) -> Seen:
    """Judge what is left by its text, a window at a time; `own` gives what the user said of it."""
    import polars as pl

    from tasks.dialogue.texts import said

    rows = table.select("role", above=pl.Series(parents, dtype=pl.Int64)).with_row_index("row")
    replies = rows.filter(role="assistant").select(pl.col("row").cast(pl.Int64), "above")
    starts = range(0, len(table), ROWS)
    windows = ((at, said(texts, own, at, at + ROWS).with_columns(table["lang"].slice(at, ROWS))) for at in starts)
    return reader.read(windows, replies, verdicts)


def _reader(params: CurateParams, workers: int) -> Reader:
    from tasks.dialogue import contamination, language, pii
    from tasks.dialogue.contamination import Asked, FactQuery, Facts
    from tasks.dialogue.text_rules import Reader
    from tasks.sample.facts import facts_of

    told = tuple(
        FactQuery(f"{fact.family} of {fact.subject}", fact.subject, (fact.answer, *fact.aliases))
        for fact in facts_of(params.fact_families or ())
    )
    prompts = tuple(Asked(where, text) for where, text in params.prompts())
    if "contaminated" not in params.rules:
        prompts = ()
    overlap = partial(contamination.scan, prompts, params.contamination_ngram, told)
    return Reader(
        params,
        partial(_rows_of, language.detect, workers),
        partial(_rows_of, pii.scan, workers),
        partial(_rows_of, overlap, workers) if prompts or told else None,
        Facts(told),
        len(prompts),
    )


def _rows_of(function: ChunkFunction, workers: int, texts: pl.Series) -> pl.DataFrame:
    """Return what a function gives for texts."""
    import polars as pl

    return pl.DataFrame(map_texts(texts, function, workers))


def _keep_whole(table: pl.DataFrame, parents: list[int], verdicts: Verdicts) -> None:
    """Drop what no whole thread goes through."""
    from tasks.dialogue.selection import in_whole_threads

    replies = (table["role"] == "assistant").to_list()
    held = in_whole_threads(parents, replies, table["sibling"].to_list(), verdicts.kept())
    verdicts.drop("thread", {row: "no thread through it is whole" for row, whole in enumerate(held) if not whole})


def _drop_stranded(table: pl.DataFrame, parents: list[int], verdicts: Verdicts, params: CurateParams) -> None:
    """Drop what cannot stay after others were dropped: their descendants, and prompts that no reply is left for."""
    from tasks.dialogue.tree import holds, nearest_above

    kept = verdicts.kept()
    above = nearest_above(parents, [not stays for stays in kept])
    verdicts.drop("parent", _naming(table["message_id"], [gone if kept[row] else -1 for row, gone in enumerate(above)]))
    if params.require_reply:
        kept, replies = verdicts.kept(), (table["role"] == "assistant").to_list()
        answered = holds(parents, [stays and reply for stays, reply in zip(kept, replies, strict=True)])
        lone = (row for row, stays in enumerate(kept) if stays and not answered[row])
        verdicts.drop("no_reply", dict.fromkeys(lone, "no reply below"))


def _naming(ids: pl.Series, named: list[int]) -> dict[int, str]:
    """Return row -> the id of the row that it names, for those that name one, and none -1."""
    found = {row: other for row, other in enumerate(named) if other >= 0}
    return dict(zip(found, ids.gather([*found.values()]).to_list(), strict=True))


def stages(params: CurateParams) -> list[str]:
    """Return the names of what may drop a message under these settings, in the order of judgement."""
    others = {
        "fact": params.drop_facts,
        "thread": params.whole_threads,
        "parent": True,
        "no_reply": params.require_reply,
        "leak": params.drop_cross_split_duplicates,
        "duplicate": params.dedupe,
        "near_duplicate": params.near_dedupe or not params.keep_duplicate_prompts,
    }
    return [*params.rules, *(name for name, active in others.items() if active)]


def _nothing_left(counts: Counts, where: Path) -> InputError:
    took = spent(counts["funnel"]) or "nothing: there were none"
    most = max(counts["replies_dropped"], key=counts["replies_dropped"].__getitem__, default="no_reply")
    return InputError(
        f"none of {counts['read']['messages']:,} messages is left; dropped by {took}",
        str(where),
        f"Loosen the rule that took the most, for example by --set curate.{deciding_setting(most)}=..., or choose "
        "another source",
        "curate.empty",
    )


def _write(
    out: Path, messages: pl.LazyFrame, texts: Texts, splits: pl.Series, verdicts: Verdicts, masks: Masks
) -> None:
    """Write both tables, reading the messages once more, a row group at a time; only what is kept is masked."""
    import polars as pl

    from tasks.dialogue.texts import noted, opening_once_masked
    from tasks.oasst.validators import SYSTEM_CHARS

    stay = {row: mask for row, mask in masks.items() if verdicts.reasons[row] is None}
    told = {"reason": verdicts.reasons, "evidence": verdicts.evidence}
    verdict = pl.DataFrame({"split": splits, **told}, dict.fromkeys(("split", *told), pl.String)).with_columns(
        masked=pl.Series([None], dtype=pl.String)
        .new_from_index(0, len(splits))
        .scatter([*stay], pl.Series([what for _, what in stay.values()], dtype=pl.String))
    )
    opens = opening_once_masked(texts, stay, SYSTEM_CHARS)
    texts, others = replace(texts, masks=stay), messages.drop("text")
    with (
        parquet_writer(out / "dialogues.parquet", DIALOGUE_COLUMNS, FAST, MESSAGE_DISTINCT) as kept,
        parquet_writer(out / "dropped.parquet", DROPPED_COLUMNS, FAST, MESSAGE_DISTINCT) as dropped,
        progress.bar("curate: write", len(verdict), "messages") as bar,
    ):
        for start in range(0, len(verdict), ROWS):
            part = verdict.slice(start, ROWS)
            rows = others.slice(start, ROWS).collect().with_columns(texts.between(start, start + len(part)), *part)
            rows = rows.with_columns(noted(rows["extra"], opens, start, SYSTEM_CHARS))
            for writer, stays, columns in ((kept, True, DIALOGUE_COLUMNS), (dropped, False, DROPPED_COLUMNS)):
                chosen = rows.filter(pl.col("reason").is_null() == stays)
                if len(chosen):
                    writer.write_table(_arrow(chosen, columns))
            bar.advance(len(part))


def _arrow(rows: pl.DataFrame, columns: Mapping[str, str]) -> pa.Table:
    """Return rows in the Arrow types that the artifact promises; polars has wider ones for text."""
    return rows.select(list(columns)).to_arrow().cast(arrow_schema(columns))
