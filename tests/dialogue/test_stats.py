"""Laws of the tally: what each rule dropped, by language, and the cases that are shown."""

from tasks.dialogue.stats import cases, summed


def test_rules_and_languages_are_counted_and_the_first_rows_kept() -> None:
    reasons, langs = ["a", None, "b", "a", "a", "a"], ["en", "en", None, "de", "de", "en"]
    assert summed(reasons, langs) == {"a": {"de": 2, "en": 2}, "b": {"unknown": 1}}
    assert cases(reasons, langs) == {"a": [3, 4, 0, 5], "b": [2]}
    assert (summed([], []), cases([], [])) == ({}, {})


def test_cases_are_the_first_three_of_each_of_a_rules_six_most_frequent_languages() -> None:
    langs = [f"l{number}" for number in range(9) for _ in range(9 - number)]
    found = cases(["a"] * len(langs), langs)["a"]
    assert [langs[row] for row in found] == [f"l{number}" for number in range(6) for _ in range(3)]
    assert found[:6] == [0, 1, 2, 9, 10, 11]
