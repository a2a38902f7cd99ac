"""Contamination: messages that say what an evaluation asks, and facts that it asks for.

A long prompt is found by any run of its words in a message, usually 13; a short one only as the whole message, because
what it says in a few words is said everywhere. Words are compared without case, accents' encoding and punctuation;
in scripts without spaces each character is a word.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C, for 13 words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
SCHEMA = pa.schema([("overlap", pa.string()), ("names", pa.list_(pa.string()))])

_APOSTROPHE = "['’ʼ`]"
_SPACELESS = (
    r"([\u{e00}-\u{109f}\u{1780}-\u{17ff}\u{3040}-\u{30ff}\u{3400}-\u{4dbf}\u{4e00}-\u{9fff}\u{f900}-\u{faff}"
    r"\u{20000}-\u{3ffff}])"
)
# Characters that stand alone and are their own NFKC form, or like the ellipsis have one that is no more of a word than
# they are: European letters, Hebrew, Arabic, kana, Han, Hangul, punctuation. Few texts have others; to normalise the
# rest, too, would take half of the time.
_COMPOSED = (
    r"\x00-\x7f\u{a0}-\u{a7}\u{a9}\u{ab}-\u{ae}\u{b0}\u{b1}\u{b6}\u{b7}\u{bb}\u{bf}-\u{12f}\u{131}\u{134}-\u{13e}"
    r"\u{141}-\u{148}\u{14a}-\u{17e}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-\u{3ce}\u{400}-\u{482}"
    r"\u{48a}-\u{52f}\u{5d0}-\u{5ea}\u{621}-\u{63a}\u{641}-\u{64a}\u{1ea0}-\u{1ef9}\u{2000}-\u{2016}\u{2018}-\u{2027}"
    r"\u{202f}\u{2030}-\u{2032}\u{2190}-\u{21ff}\u{2500}-\u{25ff}\u{3000}-\u{3003}\u{3008}-\u{3011}\u{3041}-\u{3096}"
    r"\u{30a1}-\u{30fa}\u{30fc}-\u{30fe}\u{3400}-\u{4dbf}\u{4e00}-\u{9fff}\u{ac00}-\u{d7a3}\u{ff01}-\u{ff06}"
    r"\u{ff08}-\u{ff0f}\u{ff1a}-\u{ff20}"
)
_ODD = np.uint64(0x9E3779B97F4A7C15)  # the base of a polynomial modulo 2**64. Source: Knuth, golden ratio


@dataclass(frozen=True)
class Asked:
    """A prompt of an evaluation: `where` it stands, such as `panel 3`, and what it says."""

    where: str
    text: str


@dataclass(frozen=True)
class FactQuery:
    """A fact that an evaluation asks for: `name` it, such as `capital of France`, its subject, and any answer."""

    name: str
    subject: str
    answers: tuple[str, ...]


def scan(prompts: tuple[Asked, ...], ngram: int, facts: tuple[FactQuery, ...], texts: pa.StringArray) -> pa.RecordBatch:
    """Find what an evaluation asks, and what its facts are about.

    Args:
        prompts: What is asked.
        ngram: Words in a row that a text may not share with a prompt that has as many.
        facts: What wants to be known.
        texts: (N,) any texts.

    Returns:
        (N,) `overlap`: which prompt a text holds, and how, null where it holds none; and `names`: the subjects and
        answers of facts that it names.
    """
    index, known = _sought(prompts, ngram, facts)
    said = words(pl.Series(texts, dtype=pl.String))
    overlap = index.found(said) if index else [None] * len(said)
    named = known.named(said, range(len(said)))
    ends = np.cumsum(np.bincount(named["row"].to_numpy(), minlength=len(said)))
    offsets = pa.array(np.concatenate(([0], ends)).astype(np.int32))
    names = pa.ListArray.from_arrays(offsets, named["name"].to_arrow().cast(pa.string()))
    return pa.RecordBatch.from_arrays([pa.array(overlap, pa.string()), names], schema=SCHEMA)


@lru_cache(maxsize=2)
def _sought(prompts: tuple[Asked, ...], ngram: int, facts: tuple[FactQuery, ...]) -> tuple[Index, Facts]:
    return Index(prompts, ngram), Facts(facts)


def words(texts: pl.Series) -> pl.Series:
    """Return the words of each text in lower case, one space apart, without punctuation: (N,)."""
    odd = texts.str.contains(f"[^{_COMPOSED}]").arg_true()
    found = _apart(texts.str.to_lowercase().str.replace_all(_APOSTROPHE, ""))
    if not len(odd):
        return found
    wide = texts.gather(odd).str.normalize("NFKC").str.to_lowercase().str.replace_all(_APOSTROPHE, "")
    # once more: without its apostrophe a mark may join the letter before it
    return found.scatter(odd, _apart(wide.str.normalize("NFKC")))


def _apart(texts: pl.Series) -> pl.Series:
    """Put one space between words, and leave out all else."""
    spaced = texts.str.replace_all(_SPACELESS, " $1 ").str.replace_all(r"[^\p{L}\p{M}\p{N}]+", " ")
    return spaced.str.strip_chars(" ")


class Index:
    """Prompts, ready to be looked for.

    Args:
        prompts: Of evaluations; one without a word is never found.
        ngram: Words in a row that a message may not share with a prompt that has as many.
    """

    def __init__(self, prompts: Sequence[Asked], ngram: int) -> None:
        self.prompts, self.ngram = prompts, ngram
        said = words(pl.Series([prompt.text for prompt in prompts], dtype=pl.String))
        self.short: dict[str, int] = {}
        for at, text in enumerate(said):
            if text and text.count(" ") + 1 < ngram:
                self.short.setdefault(text, at)
        keys, owners = _ngrams(said, ngram)
        self.keys, first = np.unique(keys, return_index=True)  # of prompts that share a run, the first is named
        self.owners = owners[first]

    def __bool__(self) -> bool:
        return bool(self.short) or len(self.keys) > 0

    def found(self, said: pl.Series) -> list[str | None]:
        """Return which prompt each text holds, and how: (N,); None where it holds none.

        Args:
            said: (N,) the `words` of each text.
        """
        seen: list[str | None] = [None] * len(said)
        if len(self.keys):
            keys, rows = _ngrams(said, self.ngram)
            places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            hits = np.flatnonzero(self.keys[places] == keys)
            for row, owner in zip(rows[hits].tolist(), self.owners[places[hits]].tolist(), strict=True):
                seen[row] = seen[row] or f"{self.prompts[owner].where}, {self.ngram} words in a row"
        same = said.is_in([*self.short])
        for row in same.arg_true():
            seen[row] = f"{self.prompts[self.short[said[row]]].where}, the same text"
        return seen


def _ngrams(said: pl.Series, ngram: int) -> tuple[U64, NDArray[np.int64]]:
    """Return a hash of every run of words of texts and the text it stands in: (S,) and (S,)."""
    long = said.str.count_matches(" ", literal=True) + 1 >= ngram
    lists = said.filter(long).str.split(" ")
    values = lists.explode().hash().to_numpy()
    if not len(values):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    rows = np.repeat(long.arg_true().to_numpy(), lists.list.len().to_numpy()).astype(np.int64)
    count = len(values) - ngram + 1
    keys = np.zeros(count, np.uint64)
    for at in range(ngram):
        keys = keys * _ODD + values[at : at + count]
    whole = rows[:count] == rows[ngram - 1 :]
    return keys[whole], rows[:count][whole]


class Facts:
    """Facts, ready to be looked for: a reply tells one where it, or it and what it answers, name subject and answer."""

    def __init__(self, facts: Sequence[FactQuery]) -> None:
        self.facts = facts
        pairs = [(at, fact.subject, answer) for at, fact in enumerate(facts) for answer in fact.answers]
        table = pl.DataFrame(pairs, {"fact": pl.Int64, "subject": pl.String, "answer": pl.String}, orient="row")
        self.pairs = table.with_columns((" " + words(table[name]) + " ").alias(name) for name in ("subject", "answer"))
        self.names = sorted({*self.pairs["subject"], *self.pairs["answer"]} - {"  "})

    def named(self, said: pl.Series, rows: Sequence[int]) -> pl.DataFrame:
        """Return which subjects and answers texts name, as whole words: `row` and `name`.

        Args:
            said: (N,) the `words` of each text.
            rows: (N,) its row.
        """
        texts = pl.DataFrame({"row": pl.Series(rows, dtype=pl.Int64), "name": " " + said + " "})
        if not self.names:
            return texts.clear()
        found = pl.col("name").str.extract_many(self.names, overlapping=True)
        return texts.with_columns(found).explode("name").drop_nulls().unique(maintain_order=True)

    def told(self, named: pl.DataFrame, replies: pl.DataFrame) -> pl.DataFrame:
        """Return which facts replies tell: `row` and `fact`, in this order, each pair once.

        Args:
            named: Of all messages, as `named` returns it.
            replies: `row` of each reply, and `above`, the row that it answers.
        """
        own = replies.join(named, on="row").select("row", "name")
        above = replies.join(named, left_on="above", right_on="row").select("row", "name")
        asked = pl.concat([own, above])
        found = asked.join(self.pairs, left_on="name", right_on="subject")
        right = found.join(own, left_on=["row", "answer"], right_on=["row", "name"], how="semi")
        return right.select("row", "fact").unique().sort("row", "fact")
