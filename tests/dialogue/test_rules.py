from typing import Any

import polars as pl
import pytest

from tasks.dialogue import rules as rules_module
from tasks.dialogue.rules import Rule, columns_of, in_thread, judge, rules_of
from tasks.dialogue.settings import RULES, FilterRule, FilterSettings

GOOD: dict[str, Any] = {
    "tree_state": "ready_for_export", "text": "Hi", "role": "prompter", "lang": "en", "deleted": False,
    "synthetic": False, "review_result": True, "label_spam": 0.0, "label_quality": 0.8, "detoxify_toxicity": 0.0,
}  # fmt: skip
COLUMNS = sorted({"text", *columns_of(rules_of(FilterSettings()))} - {"parent_role", "prompt_lang", "siblings"})
SCHEMA = {
    name: pl.Float32 if name.startswith(("label", "detoxify")) else pl.String for name in COLUMNS
} | {"rank": pl.Int32, "deleted": pl.Boolean, "synthetic": pl.Boolean, "review_result": pl.Boolean}  # fmt: skip


def verdicts(*rows: dict[str, Any], parents: list[int] | None = None, **limits: Any) -> list[tuple[Any, Any]]:
    table = pl.DataFrame([{**dict.fromkeys(COLUMNS), **GOOD, **row} for row in rows], schema=SCHEMA)
    found = judge(in_thread(table, parents or [-1] * len(rows)), rules_of(FilterSettings(**limits)))
    return list(zip(found.reasons, found.evidence, strict=True))


def talk(*texts: str) -> list[Any]:
    """Return the reasons for a chain of texts, prompt and reply in turn."""
    rows = [{"text": text, "role": ("prompter", "assistant")[turn % 2]} for turn, text in enumerate(texts)]
    return [reason for reason, _ in verdicts(*rows, parents=list(range(-1, len(rows) - 1)))]


CASES: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("a good message", {}, None, ""),
    ("a tree in growth", {"tree_state": "growing"}, "tree_state", "tree_state growing is not ready_for_export"),
    ("another language", {"lang": "de-AT"}, "language", "lang de-AT is not en"),
    ("a language that only begins like it", {"lang": "eno"}, "language", "lang eno is not en"),
    ("a region of the language", {"lang": "EN-us"}, None, ""),
    ("a region, with underscore", {"lang": "en_GB"}, None, ""),
    ("deleted", {"deleted": True}, "deleted", "deleted is true"),
    ("synthetic", {"synthetic": True}, "synthetic", "synthetic is true"),
    ("rejected", {"review_result": False}, "rejected", "review_result is false"),
    ("undecided", {"review_result": None}, None, ""),
    ("nothing", {"text": ""}, "empty", "no visible character among 0"),
    ("white space", {"text": " \t\n\u00a0\u3000"}, "empty", "no visible character among 5"),
    ("zero width", {"text": "\u200b\u200d\u2060\ufeff\u3164\x00"}, "empty", "no visible character among 6"),
    ("a full stop", {"text": " ."}, None, ""),
    ("an emoji", {"text": "\u2764\ufe0f"}, None, ""),
    ("a root that is a reply", {"role": "assistant"}, "role_break", "assistant after nothing"),
    ("spam above", {"label_spam": 0.75}, "spam", "label_spam 0.75 > 0.5"),
    ("spam at the limit", {"label_spam": 0.5}, None, ""),
    ("language mismatch above", {"label_lang_mismatch": 1.0}, "lang_mismatch", "label_lang_mismatch 1.0 > 0.5"),
    ("language mismatch at", {"label_lang_mismatch": 0.5}, None, ""),
    ("pii at", {"label_pii": 0.5}, "pii", "label_pii 0.5 >= 0.5"),
    ("pii below", {"label_pii": 0.49}, None, ""),
    ("not appropriate at", {"label_not_appropriate": 0.5}, "not_appropriate", "label_not_appropriate 0.5 >= 0.5"),
    ("hate speech at", {"label_hate_speech": 0.5}, "hate_speech", "label_hate_speech 0.5 >= 0.5"),
    ("sexual content at", {"label_sexual_content": 0.5}, "sexual_content", "label_sexual_content 0.5 >= 0.5"),
    ("low quality", {"label_quality": 0.25}, "quality", "label_quality 0.25 < 0.4"),
    ("quality at, in float32", {"label_quality": 0.4}, None, ""),
    ("toxic", {"detoxify_toxicity": 0.95}, "toxicity", "detoxify_toxicity 0.95 > 0.9"),
    ("toxicity at, in float32", {"detoxify_toxicity": 0.9}, None, ""),
    ("a score that is no number", {"detoxify_toxicity": float("nan"), "label_spam": float("nan")}, None, ""),
]


@pytest.mark.parametrize(("row", "reason", "evidence"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_rule_drops_what_it_names_and_says_what_it_saw(
    row: dict[str, Any], reason: str | None, evidence: str
) -> None:
    assert verdicts(row) == [(reason, evidence or None)]


def test_what_is_unknown_drops_nothing() -> None:
    assert verdicts({**dict.fromkeys(COLUMNS), "text": "Hi", "role": "prompter"}) == [(None, None)]


def test_every_rule_has_a_case_here_and_a_function_of_its_name_or_a_limit() -> None:
    elsewhere = {
        "paste",
        "unreviewed",
        "top_k",
        *(name for name, spec in RULES.items() if spec.reads_text),
    }  # these have laws of their own below
    assert {reason for _, _, reason, _ in CASES if reason} | elsewhere == set(RULES)
    assert {*rules_module._DROPS} == {name for name, spec in RULES.items() if not spec.label}


@pytest.mark.parametrize("reads_text", [False, True])
def test_a_rule_that_is_appended_at_the_end_just_works(monkeypatch: pytest.MonkeyPatch, reads_text: bool) -> None:
    """Also where it reads columns, although those before it read texts."""
    linked = pl.col("text").str.contains("https?://")
    monkeypatch.setitem(RULES, "links", FilterRule(reads_text=reads_text))
    monkeypatch.setitem(rules_module._DROPS, "links", lambda _: Rule("links", linked, pl.lit("holds a URL")))
    settings = {"rules": ("contaminated", "links")}
    verdict = read if reads_text else lambda row, **more: verdicts(row, **more)[0]
    assert verdict({"text": "see https://example.org"}, **settings) == ("links", "holds a URL")
    assert verdict({"text": "see there"}, **settings) == (None, None)


def test_a_speaker_does_not_follow_himself() -> None:
    rows = [{"role": role} for role in ("prompter", "assistant", "assistant", "prompter")]
    found = verdicts(*rows, parents=[-1, 0, 1, 1])
    assert found == [(None, None), (None, None), ("role_break", "assistant after assistant"), (None, None)]


def test_the_first_rule_that_fires_names_the_reason_whatever_order_was_asked() -> None:
    row = {"deleted": True, "lang": "de", "label_spam": 1.0}
    assert verdicts(row)[0][0] == "language"
    assert verdicts(row, rules=("spam", "deleted"))[0] == ("deleted", "deleted is true")
    assert FilterSettings(rules=("spam", "deleted", "spam")).rules == ("deleted", "spam")


def test_no_rules_drop_nothing() -> None:
    assert verdicts({"deleted": True, "text": "", "lang": "de"}, rules=()) == [(None, None)]


def test_a_rule_that_is_left_out_drops_nothing() -> None:
    for case in CASES:
        if case[2]:
            rest = tuple(name for name in RULES if name != case[2])
            assert verdicts(case[1], rules=rest) == [(None, None)], case[0]


def test_empty_lists_of_states_and_languages_let_everything_through() -> None:
    row = {"tree_state": "growing", "lang": "de"}
    assert verdicts(row, tree_states=(), languages=()) == [(None, None)]


def test_languages_are_settings_in_any_spelling() -> None:
    assert FilterSettings(languages=("pt-BR", "EN", "en_US")).languages == ("en", "pt")
    assert verdicts({"lang": "pt-BR"}, languages=("pt",)) == [(None, None)]


def test_a_limit_is_a_setting() -> None:
    assert verdicts({"label_spam": 0.3}, label_limits={"spam": 0.25}) == [("spam", "label_spam 0.3 > 0.25")]
    assert verdicts({"label_quality": 0.3}, label_limits={"quality": 0.3}) == [(None, None)]


PASTES = [
    "As an AI language model, I cannot.", "Sorry, but as a large language model I can't.", "as a language model, no",
    "As an AI language model trained by OpenAI in San Francisco, I do not know.",
    "Remember: as a language model AI, I am",
    "I am ChatGPT.", "I’m ChatGPT, and I was", "My name is ChatGPT.", "I was made by OpenAI.",
    "I am a large model developed by OpenAI", "OpenAI trained me to be kind.", "My creators at OpenAI",
    "ChatGPT: here you are",
]  # fmt: skip
NO_PASTES = [
    "A language model predicts words.", "I am Treeline, a small language model.", "Use the OpenAI Gym for that.",
    "openai.Completion.create()", "Ask the OpenAirways desk.", "GPT-3 was made by OpenAI and announced in 2020.",
    "Use a client library:\n```python\nfrom openai import OpenAI\nclient = OpenAI()\n```",
    "He is an American businessman who leads OpenAI.", "I am not ChatGPT, I am Open Assistant.",
    "BERT is trained with masks; used as a language model it cannot write from left to right.",
    "It is open source; here is how it differs from ChatGPT: anyone may run it.", "I was surprised by OpenAI.",
]  # fmt: skip


@pytest.mark.parametrize("reply", PASTES)
def test_a_reply_pasted_from_another_service_is_dropped(reply: str) -> None:
    assert talk("Can you travel?", reply) == [None, "paste"]


@pytest.mark.parametrize("reply", NO_PASTES)
def test_a_reply_that_only_names_a_service_or_its_maker_stays(reply: str) -> None:
    assert talk("Can you travel?", reply) == [None, None]


def test_what_a_prompt_says_of_itself_is_no_paste() -> None:
    assert talk("Hi", "Hello", "As an AI language model, I would say that ChatGPT lies.", "Yes.") == [None] * 4


def test_a_model_that_speaks_of_itself_is_a_paste_even_where_one_asks() -> None:
    assert talk("What is ChatGPT?", "As an AI language model, I am ChatGPT.")[1] == "paste"


def test_an_undecided_first_prompt_goes_only_where_a_review_is_asked_for() -> None:
    rows: list[dict[str, Any]] = [
        {"review_result": None},
        {"role": "assistant", "review_result": None},
        {"review_result": True},
    ]
    undecided = ("unreviewed", "review_result of the first prompt is null")
    assert verdicts(*rows, parents=[-1, 0, -1], require_review=True) == [undecided, (None, None), (None, None)]
    assert verdicts({"review_result": False}, rules=("unreviewed",), require_review=True)[0][0] == "unreviewed"
    assert verdicts(*rows, parents=[-1, 0, -1]) == [(None, None)] * 3


def test_the_language_of_the_first_prompt_can_speak_for_its_tree() -> None:
    rows = [{"lang": "de"}, {"lang": "en", "role": "assistant"}, {"lang": "en"}, {"lang": "de", "role": "assistant"}]
    own, trees = (
        [reason for reason, _ in verdicts(*rows, parents=[-1, 0, -1, 2], language_of=name)]
        for name in ("message", "prompt")
    )
    assert own == ["language", None, None, "language"]
    assert trees == ["language", "language", None, None]


def test_the_best_replies_stay_and_an_unranked_one_only_where_it_is_alone() -> None:
    reply = {"role": "assistant", "rank": None}
    rows: list[dict[str, Any]] = [{}, *({**reply, "rank": rank} for rank in (0, 1, 2, None)), {}, {**reply}]
    parents = [-1, 0, 0, 0, 0, -1, 5]
    assert verdicts(*rows, parents=parents) == [(None, None)] * 7
    assert verdicts(*rows, parents=parents, top_k=2) == [
        (None, None), (None, None), (None, None), ("top_k", "rank 2 is not among the best 2"),
        ("top_k", "rank null is not among the best 2"), (None, None), (None, None),
    ]  # fmt: skip


def read(row: dict[str, Any], **limits: Any) -> tuple[Any, Any]:
    """Return the verdict of the rules that judge what was read in a text."""
    seen = {"text": "x", "detected": None, "share": None, "tagged": "en", "personal": None, "overlap": None} | row
    found = judge(
        pl.DataFrame([seen], schema_overrides={"share": pl.Float32}),
        rules_of(FilterSettings(**limits), reading_text=True),
    )
    return found.reasons[0], found.evidence[0]


def test_a_text_that_is_clearly_in_another_language_than_its_tag_is_dropped() -> None:
    german = {"detected": "de", "share": 0.97}
    assert read(german) == ("text_language", "0.97 of the text is de, tagged en")
    assert read(german | {"share": 0.94}) == read(german | {"tagged": "de"}) == (None, None)
    assert read(german | {"tagged": None}) == read({"detected": None}) == (None, None)
    assert read(german, min_language_confidence=0.98) == (None, None)


def test_personal_data_drop_a_message_only_where_they_are_not_masked() -> None:
    assert read({"personal": "e-mail 1"}, pii="drop") == ("personal", "e-mail 1")
    assert read({"personal": "e-mail 1"}, pii="mask") == (None, None)


def test_what_an_evaluation_asks_is_dropped() -> None:
    assert read({"overlap": "panel 1, the same text"}) == ("contaminated", "panel 1, the same text")
