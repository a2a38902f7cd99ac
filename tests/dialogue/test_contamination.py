"""Laws of the search for what an evaluation asks: all of it is found, and only it."""

import re
from itertools import pairwise

import polars as pl
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.dialogue.contamination import _APOSTROPHE, _COMPOSED, _SPACELESS, Asked, FactQuery, Facts, Index, words

LONG = "Write a short story about a lighthouse keeper who finds a bottle with a letter in it one winter morning"
SHORT = "What's the capital of France?"


def index(*prompts: str, ngram: int = 13) -> Index:
    return Index([Asked(f"panel {number}", text) for number, text in enumerate(prompts, 1)], ngram)


def found(prompts: Index, *texts: str) -> list[str | None]:
    return prompts.found(words(pl.Series(texts, dtype=pl.String)))


def test_a_long_prompt_is_found_by_any_13_words_of_it_in_a_row() -> None:
    parts = LONG.split()
    inside = [" ".join(["So:", *parts[at : at + 13], "and more"]) for at in range(len(parts) - 12)]
    assert found(index(LONG), *inside) == ["panel 1, 13 words in a row"] * len(inside)
    assert found(index(LONG), " ".join(parts[:12]), " ".join(parts[:12] + parts[13:])) == [None, None]


def test_a_short_prompt_is_found_as_the_whole_message_only() -> None:
    texts = (
        "whats THE capital of france",
        "“What’s the capital of France?!”\n",
        f"{SHORT} Paris.",
        "The capital of France",
    )
    assert found(index("Hi", SHORT), *texts) == ["panel 2, the same text"] * 2 + [None] * 2


def test_case_punctuation_and_form_of_a_character_hide_nothing() -> None:
    hidden = re.sub(" ", " -- ", LONG.upper()).replace("A", "Ａ")  # full width
    assert found(index(LONG), hidden) == ["panel 1, 13 words in a row"]
    assert found(index("Où est l'été ?"), "où est l’e\u0301te\u0301") == ["panel 1, the same text"]


def test_in_scripts_without_spaces_each_character_is_a_word() -> None:
    prompt = "すべての人間は、生れながらにして自由である"
    assert found(index(prompt), f"ところで{prompt[3:]}。") == ["panel 1, 13 words in a row"]
    assert found(index("日本の首都は?"), "日本の首都は") == ["panel 1, the same text"]


def test_runs_do_not_cross_from_one_text_to_the_next() -> None:
    parts = LONG.split()
    assert found(index(LONG), " ".join(parts[:10]), " ".join(parts[10:])) == [None, None]


def test_prompts_without_a_word_are_never_found_and_no_prompts_find_nothing() -> None:
    assert found(index("?!", ""), "", "?!", "...") == [None] * 3
    assert not index("?!", "")
    assert found(index(), LONG) == [None]


TOKENS = st.lists(st.sampled_from("ab"), max_size=9)


@given(st.lists(TOKENS, max_size=3), st.lists(TOKENS, min_size=1, max_size=4))
def test_it_finds_what_comparing_all_runs_one_by_one_finds(prompts: list[list[str]], texts: list[list[str]]) -> None:
    def runs(said: list[str]) -> set[tuple[str, ...]]:
        return {tuple(said[at : at + 4]) for at in range(len(said) - 3)}

    hits = found(index(*map(" ".join, prompts), ngram=4), *map(" ".join, texts))
    for text, hit in zip(texts, hits, strict=True):
        same = any(prompt == text and 0 < len(text) < 4 for prompt in prompts)
        assert (hit is not None) == (same or any(runs(prompt) & runs(text) for prompt in prompts))


@given(st.text(), st.text(alphabet=st.sampled_from("aB é\u0301'’.-\n漢字")))
@example("", "a'\u0301")
def test_words_are_one_space_apart_and_stay_when_taken_again(one: str, other: str) -> None:
    for text in (one, other):
        said = words(pl.Series([text]))[0]
        assert said == " ".join(said.split(" ")).strip()
        assert all(left + right != "  " for left, right in pairwise(said))
        assert words(pl.Series([said]))[0] == said


FACTS = Facts([FactQuery("capital of France", "France", ("Paris",)), FactQuery("capital of Peru", "Peru", ("Lima",)),
               FactQuery("capital of the US", "the United States", ("Washington", "Washington, D.C."))])  # fmt: skip


def told(*rows: tuple[int, str]) -> list[tuple[int, int]]:
    """Return the facts that the odd rows tell, each a reply to the row that it names."""
    texts = pl.Series([text for _, text in rows])
    replies = pl.DataFrame({"row": range(1, len(rows), 2), "above": [rows[at][0] for at in range(1, len(rows), 2)]},
                           schema={"row": pl.Int64, "above": pl.Int64})  # fmt: skip
    return [*FACTS.told(FACTS.named(words(texts), range(len(rows))), replies).iter_rows()]


def test_a_reply_tells_a_fact_with_what_it_answers_or_alone() -> None:
    assert told((-1, "What's the capital of France?"), (0, "Paris.")) == [(1, 0)]
    assert told((-1, "Tell me a city"), (0, "PARIS is in France, and Lima in Peru")) == [(1, 0), (1, 1)]
    assert told((-1, "Capital of the United States?"), (0, "Washington D.C.!")) == [(1, 2)]


def test_a_prompt_tells_nothing_and_words_count_only_whole() -> None:
    assert told((-1, "Is Paris the capital of France?"), (0, "Yes.")) == []
    assert told((-1, "France?"), (0, "The comparison limps: Parisians, Limassol")) == []


def reference(texts: list[str]) -> list[str]:
    """Return the words of texts the plain way: every text is brought to its normal form."""
    wide = pl.Series(texts).str.normalize("NFKC").str.to_lowercase().str.replace_all(_APOSTROPHE, "")
    apart = wide.str.normalize("NFKC").str.replace_all(_SPACELESS, " $1 ")
    return apart.str.replace_all(r"[^\p{L}\p{M}\p{N}]+", " ").str.strip_chars(" ").to_list()


def composed() -> list[str]:
    edges = re.findall(r"\\(?:x|u\{)([0-9a-f]+)\}?(?:-\\(?:x|u\{)([0-9a-f]+)\}?)?", _COMPOSED)
    return [chr(code) for first, last in edges for code in range(int(first, 16), int(last or first, 16) + 1)]


@given(st.lists(st.text(st.sampled_from(composed())), max_size=4), st.sampled_from(["", "\u0301", "ﬁ", "²", "ᄒ"]))
def test_words_are_those_of_the_normal_form_whether_or_not_a_text_has_to_be_brought_to_it(
    parts: list[str], odd: str
) -> None:
    text = odd.join(parts)
    assert words(pl.Series([text])).to_list() == reference([text])


def test_characters_that_are_not_normalised_need_not_be() -> None:
    texts = [f"x{one}x" for one in composed()]
    assert words(pl.Series(texts)).to_list() == reference(texts)
