"""Laws of the language check: only a clear answer counts."""

import time

import pyarrow as pa
import pytest

from tasks.dialogue.language import SCHEMA, detect, primary

# Article 1 of the Universal Declaration of Human Rights.
ARTICLES = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience"
    " and should act towards one another in a spirit of brotherhood.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt"
    " und sollen einander im Geiste der Brüderlichkeit begegnen.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y"
    " conciencia, deben comportarse fraternalmente los unos con los otros.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de"
    " conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и"
    " должны поступать в отношении друг друга в духе братства.",
    "ja": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。"
    "人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神互相对待。",
}  # fmt: skip


def found(*texts: str, chars: int = 20) -> list[str | None]:
    batch = detect(pa.array(texts, pa.string()), chars)
    assert batch.schema == SCHEMA
    languages: list[str | None] = batch["detected"].to_pylist()
    return languages


def test_the_language_of_a_long_text_is_found() -> None:
    assert found(*ARTICLES.values()) == list(ARTICLES)


def test_short_texts_names_code_and_filler_get_no_verdict() -> None:
    assert found("Guten Morgen!", "", "\n" * 100, chars=20) == [None] * 3
    assert (
        found("ok " * 9, "{{{[[[]]]}}} += 0x1f3a; >>> 7 / 3 == 2.333", "Lima, Peru; Paris, France; Rome, Italy")
        == [None] * 3
    )
    assert found(
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit. Vestibulum quis dolor non nibh sodales."
    ) == [None]


def test_what_white_space_is_around_a_text_makes_it_no_longer() -> None:
    assert found(f"Guten Morgen, wie geht es?{' ' * 100}", chars=60) == [None]


def test_a_result_is_of_its_own_text_alone() -> None:
    alone = [found(text)[0] for text in ARTICLES.values()]
    assert found(*list(ARTICLES.values())[::-1]) == alone[::-1]


@pytest.mark.parametrize("odd", ["\x00", "\x1b[31m", "\ufffe", "\ufdd0", "\U0001fffe", "\x85", "\u0378"])
def test_characters_that_are_not_for_interchange_do_no_harm(odd: str) -> None:
    assert found(odd + ARTICLES["de"] + odd) == ["de"]


def test_a_text_of_a_megabyte_costs_no_more_than_its_beginning() -> None:
    started = time.process_time()
    assert found(ARTICLES["de"] * 6_000, "a" * 10**6, "\u0301" * 10**6)[0] == "de"
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("tag", "name"),
    [("pt-BR", "pt"), ("EN_us", "en"), ("zh-Hant", "zh"), ("nn", "nb"), ("iw", "he"), ("uk-UA", "uk"), (" de ", "de")],
)
def test_tags_of_one_written_language_have_one_name(tag: str, name: str) -> None:
    assert primary(tag) == name
