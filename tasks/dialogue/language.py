"""Which language a text is written in, by CLD2: for finding messages whose tag is wrong.

Only a clear answer counts: most of the text in one language, by a reliable guess. Short texts, lists of names and code
get none.

Source: Compact Language Detector 2 (Chrome's), through `pycld2`. Of 27,939 real texts of 100 characters and more that
are tagged as English, it finds 148 in another language with a share of 95 %; all but 1 (a list of countries) are right,
two of these Scots.
"""

from __future__ import annotations

import polars as pl
import pyarrow as pa

SEEN = 2_000  # characters that are looked at: enough for any verdict, so that a long text costs no more
SCHEMA = pa.schema([("detected", pa.string()), ("share", pa.float32())])

# CLD2 refuses what is not for interchange: control characters and noncharacters.
_ODD = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u{fdd0}-\u{fdef}\p{Cn}]"
# Tags that name one written language, for those who tag and for CLD2, which is old; Scots, a role that English plays.
_SAME = {
    "iw": "he", "in": "id", "ji": "yi", "jw": "jv", "tl": "fil", "no": "nb", "nn": "nb", "hr": "sh", "sr": "sh",
    "bs": "sh", "cmn": "zh", "yue": "zh", "ms": "id", "mo": "ro", "sco": "en",
}  # fmt: skip
_NONE = {"un", "xxx", "la"}  # unknown; Latin is nearly always filler: lorem ipsum


def primary(tag: str) -> str:
    """Return the language of a tag such as `pt-BR` or `zh_Hant`, one name for those that are written alike."""
    found = tag.strip().lower().replace("_", "-").split("-")[0]
    return _SAME.get(found, found)


def detect(texts: pa.StringArray, chars: int) -> pa.RecordBatch:
    """Find the language that most of each text is in.

    Args:
        texts: (N,) any texts.
        chars: Characters from which on a text is looked at.

    Returns:
        (N,) `detected`, as `primary` names it, and `share` of the text that is in it, 0..1; both null where a text is
        too short or the guess is not reliable.
    """
    heads = pl.Series(texts, dtype=pl.String).str.slice(0, SEEN).str.replace_all(_ODD, " ")
    long = (heads.str.strip_chars().str.len_chars() >= chars).to_list()
    found = [_guess(head) if enough else None for head, enough in zip(heads, long, strict=True)]
    columns = [[guess and guess[at] for guess in found] for at in (0, 1)]
    return pa.RecordBatch.from_arrays(
        [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA
    )


def _guess(text: str) -> tuple[str, float] | None:
    import pycld2

    try:
        reliable, _, (first, *_) = pycld2.detect(text)
    except pycld2.error:  # a character newer than our table of what is for interchange
        return None
    return (primary(first[1]), first[2] / 100) if reliable and first[1] not in _NONE else None
