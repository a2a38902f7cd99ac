"""Which language a text is written in, by CLD2: for finding messages whose tag is wrong.

Only a clear answer counts: most of the prose in one language, by a reliable guess. Short texts and lists of names get
none. Code is English to CLD2, in whatever language one asks about it, so it is left out, rather too much than too
little: less prose only means no verdict. And what holds words in a script of the tag's own is not in another language.

Source: Compact Language Detector 2 (Chrome's), through `pycld2`; how often it errs stands in tasks/README.md.
"""

from __future__ import annotations

import polars as pl
import pyarrow as pa

SEEN = 2_000  # characters of prose that are looked at: enough for any verdict, so that a long text costs no more
READ = 4 * SEEN  # characters in which it is looked for
SCHEMA = pa.schema([("detected", pa.string()), ("share", pa.float32())])

# CLD2 refuses what is not for interchange: control characters and noncharacters.
_ODD = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u{fdd0}-\u{fdef}\p{Cn}]"
MIN_CHARS = 100  # of prose, from which on the language of a text is detected: shorter ones are guesses
# Tags that name one written language, for those who tag and for CLD2, which is old; Scots, a role that English plays.
_SAME = {
    "iw": "he", "in": "id", "ji": "yi", "jw": "jv", "tl": "fil", "no": "nb", "nn": "nb", "hr": "sh", "sr": "sh",
    "bs": "sh", "cmn": "zh", "yue": "zh", "ms": "id", "mo": "ro", "sco": "en",
}  # fmt: skip
# Lines of code, by how they begin, how they end, or what they hold.
_LINES = (
    r"(?m)^(?:"
    r"(?: {4}|\t)\s*[^ \t0-9*+•-].*"  # an indented block, and no list
    r"|\s*(?:#|//|/\*|--\s|<[/!A-Za-z]|\\[A-Za-z]|[{}\[\]()]|[\"'][\w .-]+[\"']\s*:|\"{3}|'{3}|[$>]\s|File \").*"
    r"|\s*(?:import|return|yield|def|const|let|var|function|package|using|namespace|public|private|static|sudo|cd|git"
    r"|docker|npm|pip3?|apt(?:-get)?|curl|mkdir|echo|chmod)\s.*"
    r"|\s*(?:from [\w.]+ import .*|class \w+.*:|else|try|do|done|fi|then|end|break|continue|pass|finally)[:;]?"
    r"|\s*(?:SELECT|FROM|WHERE|AND|OR|ON|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|(?:LEFT|RIGHT|INNER|OUTER)? ?JOIN|SET"
    r"|VALUES|GROUP BY|ORDER BY|HAVING|LIMIT|UNION)\b.*"
    r"|\s*(?:\w+\.)*\w*(?:Error|Exception|Warning)\b.*|During handling of the above exception.*"
    r"|\s*(?:- )?[\w.-]+:(?:\s+[^ \t\n]+)?|\s*- [\"'].*"  # key: value
    r"|.*(?:[;{}\\]|\):|\) ?\{|=>|->|; (?:do|then))\s*"
    r"|.*(?:[A-Za-z_]\w+\(|[a-z]_[a-z]|[A-Z]_[A-Z]|[A-Za-z]\.[a-z]+[A-Z(\[=]| [-+*/|&]?= |[=!]=|\w=\w|&&|\|\|).*"
    r"|.*(?:::|</|/>|\$[{(A-Za-z]|<<|>>|[ \t\"':=]/\w[\w.-]*/\w).*"
    r")$"
)
# What of a text is code. Unicode's classes, which code does not need, would take ten times as long.
_CODE = (
    r"(?s)(?:```|~~~).*?(?:```|~~~|\z)",
    r"`[^`\n]{1,200}`|https?://\S+",
    _LINES.replace(r"\w", "[0-9A-Za-z_]").replace(r"\s", r"[ \t]").replace(r"\b", r"(?-u:\b)"),
)
# Scripts by language, its own one first: a regular expression each. Others are taken for Latin.
_HAN, _KANA, _HANGUL, _CYRILLIC = r"\p{Han}", r"[\p{Hiragana}\p{Katakana}]", r"\p{Hangul}", r"\p{Cyrillic}"
_ARABIC, _DEVANAGARI = r"\p{Arabic}", r"\p{Devanagari}"
_SCRIPTS = {
    "zh": (_HAN,), "ja": (_KANA, _HAN), "ko": (_HANGUL, _HAN), "el": (r"\p{Greek}",), "he": (r"\p{Hebrew}",),
    "yi": (r"\p{Hebrew}",), "th": (r"\p{Thai}",), "hy": (r"\p{Armenian}",), "ka": (r"\p{Georgian}",),
    "bn": (r"\p{Bengali}",), "ta": (r"\p{Tamil}",), "te": (r"\p{Telugu}",), "kn": (r"\p{Kannada}",),
    "ml": (r"\p{Malayalam}",), "gu": (r"\p{Gujarati}",), "pa": (r"\p{Gurmukhi}",), "si": (r"\p{Sinhala}",),
    "km": (r"\p{Khmer}",), "lo": (r"\p{Lao}",), "my": (r"\p{Myanmar}",), "am": (r"\p{Ethiopic}",),
    **dict.fromkeys(("ru", "uk", "bg", "be", "mk", "kk", "mn", "ky", "tg", "tt"), (_CYRILLIC,)),
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ug"), (_ARABIC,)),
    **dict.fromkeys(("hi", "mr", "ne", "sa"), (_DEVANAGARI,)),
}  # fmt: skip
_LEAST = 5  # letters of a script, under which a word is only quoted
_NONE = {"un", "xxx", "la"}  # unknown; Latin is nearly always filler: lorem ipsum


def primary(tag: str) -> str:
    """Return the language of a tag such as `pt-BR` or `zh_Hant`, one name for those that are written alike."""
    found = tag.strip().lower().replace("_", "-").split("-")[0]
    return _SAME.get(found, found)


def detect(texts: pa.StringArray, chars: int = MIN_CHARS) -> pa.RecordBatch:
    """Find the language that most of the prose of each text is in.

    Args:
        texts: (N,) any texts.
        chars: Characters of prose from which on a text is looked at.

    Returns:
        (N,) `detected`, as `primary` names it, and `share` of the text that is in it, 0..1; both null where a text is
        too short or the guess is not reliable.
    """
    heads = prose(pl.Series(texts, dtype=pl.String).str.slice(0, READ)).str.slice(0, SEEN).str.replace_all(_ODD, " ")
    long = (heads.str.strip_chars().str.len_chars() >= chars).to_list()
    found = [_guess(head) if enough else None for head, enough in zip(heads, long, strict=True)]
    columns = [[guess and guess[at] for guess in found] for at in (0, 1)]
    return pa.RecordBatch.from_arrays(
        [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA
    )


def prose(texts: pl.Series) -> pl.Series:
    """Return texts without code, as far as that can be told: (N,)."""
    for pattern in _CODE:
        texts = texts.str.replace_all(pattern, " ")
    return texts


def in_own_script(texts: pl.DataFrame) -> pl.Series:
    """Tell which texts have words in their tag's own script, though another language was detected: (N,) bool.

    Where the detected language uses that script, too, the script tells nothing.

    Args:
        texts: (N,) `text`, and as `primary` names them `tagged` and `detected`.
    """
    odd = texts.with_row_index("row").filter(
        pl.col("tagged").is_in([*_SCRIPTS]), pl.col("tagged") != pl.col("detected")
    )
    rows: list[int] = []
    for (tag, other), part in odd.group_by("tagged", "detected"):
        own = _SCRIPTS[str(tag)][0]
        if own not in _SCRIPTS.get(str(other), ()):
            rows += part.filter(pl.col("text").str.slice(0, READ).str.count_matches(own) >= _LEAST)["row"].to_list()
    return pl.Series([False], dtype=pl.Boolean).new_from_index(0, len(texts)).scatter(rows, True)


def _guess(text: str) -> tuple[str, float] | None:
    import pycld2

    try:
        reliable, _, (first, *_) = pycld2.detect(text)
    except pycld2.error:  # a character newer than our table of what is for interchange
        return None
    return (primary(first[1]), first[2] / 100) if reliable and first[1] not in _NONE else None
