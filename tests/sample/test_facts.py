from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.sample.facts import (
    FAMILIES,
    Fact,
    facts,
    facts_of,
    held_out_questions,
    is_right,
    normalise,
    questions,
    sentence_reply,
    short_reply,
    trained_questions,
)

PLACES = ("capital", "us_state", "indian_state")


def fact(subject: str, family: str = "capital") -> Fact:
    return next(fact for fact in facts() if (fact.family, fact.subject) == (family, subject))


def test_every_country_stands_once_in_its_region() -> None:
    countries = facts_of(["capital"])
    assert len({normalise(country.subject) for country in countries}) == len(countries) == 193 + 2 + 2
    # M49 has 54, 35, 47, 43 and 14 members; Palestine and Taiwan go to Asia, Vatican City and Kosovo to Europe.
    assert Counter(country.region for country in countries) == {
        "Africa": 54,
        "Americas": 35,
        "Asia": 49,
        "Europe": 45,
        "Oceania": 14,
    }


def test_every_state_stands_once() -> None:
    assert len({state.subject for state in facts_of(["us_state"])}) == 50
    assert len({state.subject for state in facts_of(["indian_state"])}) == 28


@pytest.mark.parametrize(
    ("subject", "answer"),
    [
        ("France", "Paris"),
        ("Australia", "Canberra"),
        ("Bolivia", "Sucre"),
        ("Kazakhstan", "Astana"),
        ("Eswatini", "Mbabane"),
        ("Myanmar", "Naypyidaw"),
        ("Burundi", "Gitega"),
        ("the United States", "Washington, D.C."),
    ],
)
def test_a_country_has_the_capital_that_an_atlas_gives(subject: str, answer: str) -> None:
    assert fact(subject).answer == answer


def test_two_places_share_a_capital_only_where_the_world_does() -> None:
    answers = [(answer, f.subject) for f in facts() if f.family in PLACES for answer in {f.answer, *f.aliases}]
    shared = {answer for answer, count in Counter(answer for answer, _ in answers).items() if count > 1}
    assert shared == {"Chandigarh"}


def test_an_alias_says_something_that_the_answer_does_not() -> None:
    for f in facts():
        said = [normalise(answer) for answer in (f.answer, *f.aliases)]
        assert len(set(said)) == len(said), f
        assert all(said), f


def test_a_fact_is_named_once() -> None:
    assert len({(f.family, f.subject) for f in facts()}) == len(facts())
    assert 350 <= len(facts()) <= 450
    assert {f.family for f in facts()} == set(FAMILIES)


def test_no_two_questions_read_alike() -> None:
    texts = [normalise(q.text) for f in facts() for q in questions(f)]
    assert len(set(texts)) == len(texts)


def test_every_fact_is_held_out_in_some_phrasings_and_trained_in_most() -> None:
    for f in facts():
        held = sum(q.held_out for q in questions(f))
        assert 1 <= held <= len(questions(f)) / 4


def test_every_phrasing_is_trained_with_most_facts() -> None:
    for family in FAMILIES:
        asked = [q for f in facts() if f.family == family for q in questions(f)]
        for phrasing in range(len(FAMILIES[family].phrasings)):
            trained = [not q.held_out for q in asked if q.phrasing == phrasing]
            assert sum(trained) > len(trained) / 2, (family, phrasing)


def test_every_question_is_either_trained_or_held_out() -> None:
    trained, held = {q.text for q in trained_questions()}, {q.text for q in held_out_questions()}
    assert not trained & held
    assert len(trained) + len(held) == sum(len(questions(f)) for f in facts())


def test_held_out_questions_are_of_the_families_asked_for() -> None:
    assert {q.fact.family for q in held_out_questions(["us_state", "plural"])} == {"us_state", "plural"}


def test_the_questions_of_the_seed_are_asked() -> None:
    texts = {q.text for f in facts() for q in questions(f)}
    assert {"What's the capitol of France?", "What's the capital of Texas?", "What's the capital of Tripura?"} <= texts


def test_a_question_reads_as_a_person_would_write_it() -> None:
    texts = [q.text for q in questions(fact("the Netherlands"))]
    assert "The Netherlands' capital is which city?" in texts
    assert "What is France's capital?" in [q.text for q in questions(fact("France"))]
    assert not any("{" in q.text or "  " in q.text for f in facts() for q in questions(f))


def test_both_replies_of_every_fact_are_right() -> None:
    for f in facts():
        assert is_right(f, short_reply(f)), f
        assert is_right(f, sentence_reply(f)), f
        assert ".." not in short_reply(f) + " " + sentence_reply(f)


def test_the_reply_to_one_fact_is_wrong_for_every_other_but_where_the_answer_is_shared() -> None:
    capitals = [f for f in facts() if f.family in PLACES]
    taken = {(a.subject, b.subject) for a in capitals for b in capitals if a != b and is_right(a, short_reply(b))}
    shared = {"Haryana", "the Indian state of Punjab"}
    assert taken == {(a, b) for a in shared for b in shared if a != b}


@pytest.mark.parametrize(
    ("subject", "reply"),
    [
        ("France", "Paris"),
        ("France", " paris!\n"),
        ("France", "**Paris**"),
        ("France", "\uff30aris."),  # full-width P
        ("France", "It's Paris."),
        ("France", "The capital city of France is Paris."),
        ("France", "France's capital is Paris"),
        ("France", "Paris is the capital of France."),
        ("Bolivia", "La Paz."),
        ("Cameroon", "Yaounde"),
        ("Chad", "N’Djamena"),
        ("Haiti", "Port au Prince"),
        ("the United States", "Washington DC"),
        ("the United States", "The capital of United States is Washington."),
        ("South Africa", "Cape Town"),
    ],
)
def test_an_answer_is_right_however_it_is_written(subject: str, reply: str) -> None:
    assert is_right(fact(subject), reply)


@pytest.mark.parametrize(
    ("subject", "reply"),
    [
        ("France", ""),
        ("France", "."),
        ("France", "London"),
        ("France", "Paris or London"),
        ("France", "Paris, London"),
        ("France", "Paris. London."),
        ("France", "Not Paris."),
        ("France", "Parish"),
        ("France", "The capital of Spain is Paris."),
        ("France", "The capital of France is Paris. The capital of Spain is Madrid."),
        ("France", "The capital of France is the capital of France."),
        ("France", "Paris is a city in France."),
        ("the Netherlands", "The Hague"),
        ("Guinea", "Bissau"),
        ("Niger", "Abuja"),
    ],
)
def test_anything_else_is_wrong(subject: str, reply: str) -> None:
    assert not is_right(fact(subject), reply)


@given(st.text(min_size=1, max_size=20))
def test_no_words_can_be_added_to_a_right_answer(extra: str) -> None:
    assert not normalise(extra) or not is_right(fact("Peru"), f"Lima {extra}")


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)
