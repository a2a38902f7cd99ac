"""Laws of the report's figures, on replies that are written down here."""

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from tasks.gpt.batches import Split
from tasks.gpt.preference import Replies
from tasks.gpt.sampling import End, Reply
from tasks.report.figures import EvaluationSet, ModelOutputs, figures, samples
from tasks.sample.facts import Fact, Question
from tasks.text.templates import Dialect


class Letters:
    """A dialect whose ids are code points."""

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))


def says(text: str, end: End = "stopped") -> Reply:
    return Reply(tuple(map(ord, text)), end)


def question(subject: str, answer: str, region: str, family: str = "capital") -> Question:
    return Question(f"capital of {subject}?", Fact(family, subject, answer, (), region), 0, True)


QUESTIONS = (
    question("France", "Paris", "Europe"),
    question("Spain", "Madrid", "Europe"),
    question("Kenya", "Nairobi", "Africa"),
    question("gold", "Au", "", "element"),
)
BASE = ModelOutputs(12.0, [says("", "looping")] * 4, [[says("um", "cut"), says("uh")]])
TUNED = ModelOutputs(
    3.0, [says("Paris."), says("Paris."), says("Nairobi", "cut"), says("Au")], [[says("Hi!"), says("Hi.")]]
)


def exam(**changed: Any) -> EvaluationSet:
    mask = np.array([[1, 0, 1, 1], [0, 0, 0, 1]])  # the first token of a sequence has nothing before it: 3 count
    split = Split(*(np.zeros((2, 4), int), mask, np.zeros((2, 4), int), np.zeros((2, 4), int)))
    whole = {"dialect": cast("Dialect", Letters()), "split": split, "utf8_bytes": 8, "questions": QUESTIONS,
             "panel": ("Hello",), "seeds": (5, 6)}  # fmt: skip
    return EvaluationSet(**{**whole, **changed})


def test_losses_are_means_over_what_was_supervised() -> None:
    found = figures({"base": BASE, "tuned": TUNED}, exam())
    assert (found["sequences"], found["tokens"], found["utf8_bytes"]) == (2, 3, 8)
    assert found["nll"] == {"base": 4.0, "tuned": 1.0}
    assert found["perplexity"] == {"base": math.exp(4), "tuned": math.e}
    assert found["bits_per_byte"]["tuned"] == pytest.approx(3 / 8 / math.log(2))


def test_an_answer_is_right_that_is_right_and_stops() -> None:
    facts = figures({"base": BASE, "tuned": TUNED}, exam())["facts"]
    assert {name: facts[name] for name in ("base", "tuned", "n")} == {"base": 0.0, "tuned": 0.5, "n": 4}
    assert facts["by_region"] == {
        "Africa": {"base": 0.0, "tuned": 0.0, "n": 1},
        "Europe": {"base": 0.0, "tuned": 0.5, "n": 2},
    }
    assert facts["by_family"]["element"] == {"base": 0.0, "tuned": 1.0, "n": 1}
    assert [(case["expected"], case["text"], case["end"]) for case in facts["wrong"]] == [
        ("Madrid", "Paris.", "stopped"),
        ("Nairobi", "Nairobi", "cut"),
    ]


def test_how_replies_end_is_told_of_all_to_questions_and_panel() -> None:
    found = figures({"base": BASE, "tuned": TUNED}, exam())
    assert found["stop_rate"] == {"base": 1 / 6, "tuned": 5 / 6}
    assert found["loop_rate"] == {"base": 4 / 6, "tuned": 0}
    assert found["cut_rate"] == {"base": 1 / 6, "tuned": 1 / 6}
    assert found["replies"] == {"facts": 4, "panel": 2}


def test_the_panel_pairs_the_replies_of_one_seed() -> None:
    (shown,) = figures({"base": BASE, "tuned": TUNED}, exam())["panel"]
    assert (shown["prompt"], shown["seeds"]) == ("Hello", [5, 6])
    assert [reply["text"] for reply in shown["base"]] == ["um", "uh"]
    assert shown["tuned"][0] == {"text": "Hi!", "end": "stopped", "tokens": 3}


def test_what_was_not_asked_is_null() -> None:
    silent = ModelOutputs(None, [], [])
    found = figures({"base": silent, "tuned": silent}, exam(split=None, utf8_bytes=0, questions=(), panel=()))
    nothing = {"base": None, "tuned": None}
    assert [found[name] for name in ("nll", "perplexity", "bits_per_byte", "stop_rate", "loop_rate")] == [nothing] * 5
    assert [found[name] for name in ("pairs", "accuracy", "margin", "chosen")] == [0, None, None, None]
    assert (found["facts"], found["panel"]) == (None, [])


def test_a_perplexity_beyond_floats_is_null() -> None:
    lost = ModelOutputs(1e6, BASE.answers, BASE.replies)
    assert figures({"base": lost, "tuned": TUNED}, exam())["perplexity"]["base"] is None


def test_every_reply_is_a_line_of_the_samples() -> None:
    lines = list(samples({"base": BASE, "tuned": TUNED}, exam()))
    assert len(lines) == 2 * (4 + 2)
    assert [line["right"] for line in lines if line["model"] == "tuned" and line["set"] == "facts"] == [
        True, False, False, True,
    ]  # fmt: skip
    assert [line["seed"] for line in lines if line["set"] == "panel"] == [5, 6, 5, 6]


def test_a_pair_is_right_where_the_better_reply_is_likelier_and_a_tie_is_half_right() -> None:
    """One group of three ranks: pairs 0-1, 0-2 and 1-2."""
    group = Replies(*(np.array(column) for column in ([0, 0, 0], [5, 5, 5], [0, 0, 0], [0, 1, 2])))
    logps = {"base": [-9.0, -9.0, -9.0], "tuned": [-4.0, -6.0, -5.0], "preferred": [-1.0, -2.0, -4.0]}
    results = {which: replace(BASE, logps=np.array(found, np.float32)) for which, found in logps.items()}
    asked = exam(ranked=(exam().split, group))
    found = figures(results, asked)
    assert (found["models"], found["pairs"]) == (["base", "tuned", "preferred"], 3)
    assert found["accuracy"] == {"base": 0.5, "tuned": pytest.approx(2 / 3), "preferred": 1.0}
    assert found["margin"] == {"base": 0.0, "tuned": pytest.approx(2 / 3), "preferred": 2.0}
    assert found["chosen"] == {"base": -9.0, "tuned": pytest.approx(-14 / 3), "preferred": pytest.approx(-4 / 3)}
    assert set(found["facts"]["by_region"]["Africa"]) == {*logps, "n"}
    assert set(found["panel"][0]) == {"prompt", "seeds", *logps}
