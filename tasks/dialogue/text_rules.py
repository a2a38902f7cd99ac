"""Reading: judge messages by their texts, a window at a time, and mask what is personal in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from tasks.dialogue.contamination import Facts
from tasks.dialogue.language import in_own_script, primary
from tasks.dialogue.rules import judge, rules_of
from tasks.dialogue.settings import FilterSettings
from tasks.dialogue.verdicts import Verdicts

PerText = Callable[[pl.Series], pl.DataFrame]  # N texts -> N rows, each of its own text alone
LANGUAGE = pl.Schema({"detected": pl.String, "share": pl.Float32})
PERSONAL = pl.Schema({"personal": pl.String, "masked": pl.String})
ASKED = pl.Schema([("overlap", pl.String), ("names", pl.List(pl.String))])


@dataclass(frozen=True)
class Seen:
    """What was found in the texts of what is kept.

    Attributes:
        masks: Row -> the text without what is personal, and what that was.
        told: `row` of a reply and the number of a `fact` that it tells, in this order.
        facts: How many facts were looked for.
        prompts: How many prompts of an evaluation were.
    """

    masks: dict[int, tuple[str, str]]
    told: pl.DataFrame
    facts: int
    prompts: int


@dataclass(frozen=True)
class Reader:
    """Reads texts.

    Attributes:
        settings: Which rules judge, and what they compare with.
        language: Gives the columns of LANGUAGE; called only if a rule asks for it.
        personal: Gives the columns of PERSONAL; called only if it is to be masked or dropped.
        asked: Gives the columns of ASKED; None: no evaluation asks anything.
        facts: What an evaluation wants to hear.
        prompts: How many prompts `asked` looks for.
    """

    settings: FilterSettings
    language: PerText
    personal: PerText
    asked: PerText | None
    facts: Facts
    prompts: int

    def read(self, windows: Iterable[tuple[int, pl.DataFrame]], replies: pl.DataFrame, verdicts: Verdicts) -> Seen:
        """Judge by their texts the messages that are kept so far.

        Args:
            windows: The row of a window's first message, and of the window `text`, `own`, which is the part of it
                that the user said, null where that is all, and `lang`.
            replies: `row` of each reply, and `above`, the row that it answers.
            verdicts: Of all rows; the rules drop from it.
        """
        rules = rules_of(self.settings, reading_text=True)
        named = [pl.DataFrame(schema={"row": pl.Int64, "name": pl.String})]
        masks: dict[int, tuple[str, str]] = {}
        for first, part in windows:
            rows = [first + at for at in range(len(part)) if verdicts.reasons[first + at] is None]
            kept = part[[row - first for row in rows]]
            kept = self.columns(kept)
            found = judge(kept, rules)
            for row, reason, evidence in zip(rows, found.reasons, found.evidence, strict=True):
                if reason is not None:
                    verdicts.drop(reason, {row: evidence or ""})
            if self.settings.pii == "mask":
                masks |= _masks(rows, kept)
            named.append(_named(rows, kept["names"]))
        told = self.facts.told(pl.concat(named), replies)
        if self.settings.drop_facts:
            for row, fact in told.iter_rows():  # of several facts the first is named
                verdicts.drop("fact", {row: self.facts.facts[fact].name})
        return Seen(masks, told, len(self.facts.facts), self.prompts)

    def columns(self, kept: pl.DataFrame) -> pl.DataFrame:
        """Add to text, own and lang of N messages what the rules ask: LANGUAGE, PERSONAL, ASKED and `tagged`.

        Columns are null where none asks.
        """
        texts, rules = kept["text"], self.settings.rules
        asked = (
            (self.language if "text_language" in rules else None, LANGUAGE),
            (self.personal if self.settings.pii != "off" else None, PERSONAL),
        )
        found = [ask(texts) if ask else pl.DataFrame(schema=schema).clear(len(kept)) for ask, schema in asked]
        read = pl.concat([kept, *found, self._asked(kept)], how="horizontal").with_columns(tagged(kept["lang"]))
        return read.with_columns(detected=pl.when(~in_own_script(read)).then("detected"))

    def _asked(self, kept: pl.DataFrame) -> pl.DataFrame:
        """Return the columns of ASKED: of the whole text, or else of the part of it that the user said."""
        if not self.asked:
            return pl.DataFrame(schema=ASKED).clear(len(kept))
        found = self.asked(kept["text"])
        at = kept["own"].is_not_null().arg_true()
        if at.is_empty():
            return found
        own = self.asked(kept["own"].gather(at))["overlap"]
        whole = found["overlap"].gather(at)
        return found.with_columns(found["overlap"].scatter(at, whole.zip_with(whole.is_not_null(), own)))


def tagged(langs: pl.Series) -> pl.Series:
    """Return the language that each tag names, as `language.detect` does: (N,) `tagged`."""
    names = langs.drop_nulls().unique().to_list()
    known = {name: primary(name) or None for name in names}
    return langs.replace_strict(list(known), list(known.values()), default=None, return_dtype=pl.String).alias("tagged")


def _named(rows: Sequence[int], names: pl.Series) -> pl.DataFrame:
    """Return which subjects and answers rows name, one at a time: `row` and `name`."""
    each = pl.DataFrame({"row": pl.Series(rows, dtype=pl.Int64), "name": names.cast(pl.List(pl.String))})
    return each.explode("name").drop_nulls()


def _masks(rows: Sequence[int], kept: pl.DataFrame) -> dict[int, tuple[str, str]]:
    hit = kept["masked"].is_not_null().arg_true()
    found = kept.select("masked", "personal")[hit].iter_rows()
    return {rows[at]: (text, what) for at, (text, what) in zip(hit.to_list(), found, strict=True)}
