import time
import unicodedata

import polars as pl
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tasks.dialogue.normalize import normalised


def plain(*texts: str) -> list[str]:
    return normalised(pa.array(texts, pa.string()))


def one_at_a_time(texts: list[str]) -> list[str]:
    """Normalise as the definition says, whole text by whole text, in polars and the standard library."""
    folded = pl.Series([text.casefold() for text in pl.Series(texts, dtype=pl.String).str.normalize("NFKC")])
    return [" ".join(text.casefold().split()) for text in folded.cast(pl.String).str.normalize("NFKC")]


def test_case_width_and_white_space_do_not_tell_texts_apart() -> None:
    found = plain("Straße  \n１", "STRASSE 1", "strasse 1 ", "strasse1", "ﬁ\u00a0x", "fi x")
    assert found[0] == found[1] == found[2] == "strasse 1"
    assert found[3] != found[0]
    assert found[4] == found[5] == "fi x"


def test_every_character_alone_and_between_others_is_as_if_normalised_one_at_a_time() -> None:
    points = [chr(point) for point in (*range(0xD800), *range(0xE000, 0x30000))]
    for around in ("{}", "a{}b", "e {0}{0} "):
        texts = [around.format(point) for point in points]
        assert plain(*texts) == one_at_a_time(texts)


@given(st.lists(st.text(), max_size=5))
def test_any_texts_are_as_if_normalised_one_at_a_time(texts: list[str]) -> None:
    assert plain(*texts) == one_at_a_time(texts)


MARKED = st.characters(categories=["Mn", "Mc", "Lo", "Zs", "Cc", "So"], max_codepoint=0x3400)


@given(st.lists(st.text(MARKED, max_size=20), max_size=5))
def test_texts_full_of_marks_are_as_if_normalised_one_at_a_time(texts: list[str]) -> None:
    assert plain(*texts) == one_at_a_time(texts)


@given(st.text())
def test_what_is_normalised_stays_as_it_is(text: str) -> None:
    once = plain(text)
    assert plain(*once) == once
    if text.isascii():
        assert once == [" ".join(text.lower().split())]
    assert unicodedata.is_normalized("NFC", once[0]) or not text.isascii()


def test_a_long_run_of_combining_marks_takes_no_time() -> None:
    started = time.process_time()
    plain("a" + "\u0301\u0316" * 100_000)
    assert time.process_time() - started < 5
