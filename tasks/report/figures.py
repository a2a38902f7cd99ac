"""The figures of a report: of each model, the base first, from its outputs on one and the same evaluation set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, get_args

import numpy as np

from tasks.gpt.batches import Split
from tasks.gpt.metrics import bits_per_byte, fraction, nll, perplexity
from tasks.gpt.preference import Floats, Replies
from tasks.gpt.sampling import End, Reply
from tasks.sample.facts import Question, is_right
from tasks.text.templates import Dialect

RATES: Mapping[End, str] = {"stopped": "stop_rate", "looping": "loop_rate", "cut": "cut_rate"}
WRONG = 20  # wrong answers that a report shows


@dataclass(frozen=True)
class EvaluationSet:
    """What all models are evaluated on.

    Attributes:
        dialect: How texts become ids, and ids texts.
        split: Sequences that the loss is measured on; None where there are none.
        utf8_bytes: Bytes of their supervised text; 0 where that is not known.
        questions: Facts asked, one greedy answer each.
        panel: Prompts replied to by drawing.
        seeds: One for each reply to a prompt; the same for every prompt, so that adding one changes no other.
        ranked: Replies that people put in an order, and the sequences that they lie in; None where there are none.
    """

    dialect: Dialect
    split: Split | None
    utf8_bytes: int
    questions: Sequence[Question]
    panel: Sequence[str]
    seeds: Sequence[int]
    ranked: tuple[Split, Replies] | None = None


@dataclass(frozen=True)
class ModelOutputs:
    """What one model made of the evaluation set.

    Attributes:
        nats: Loss summed over the split's supervised tokens; None without a split.
        answers: One a question.
        replies: For each prompt of the panel, one a seed.
        logps: (R,) log-probability of each ranked reply, nats; None where there are none.
    """

    nats: float | None
    answers: Sequence[Reply]
    replies: Sequence[Sequence[Reply]]
    logps: Floats | None = None

    @property
    def all_replies(self) -> list[Reply]:
        """All answers and replies."""
        return [*self.answers, *(reply for group in self.replies for reply in group)]


Results = Mapping[
    str, ModelOutputs
]  # by the names of the models: base, tuned and, where people ranked replies, preferred


def figures(results: Results, exam: EvaluationSet) -> dict[str, Any]:
    """Return the measured part of report.json, null where there was nothing to measure."""
    return {
        "models": [*results],
        **loss_figures(results, exam),
        **endings(results),
        **preferences(results, exam),
        "replies": {"facts": len(exam.questions), "panel": len(exam.panel) * len(exam.seeds)},
        "facts": fact_figures(results, exam) if exam.questions else None,
        "panel": [panel(results, exam, at) for at in range(len(exam.panel))],
    }


def loss_figures(results: Results, exam: EvaluationSet) -> dict[str, Any]:
    """Return loss, perplexity and bits per byte of each model; null also for a perplexity beyond floats."""
    tokens, size = exam.split.supervised() if exam.split else 0, exam.utf8_bytes

    def each(measure: Callable[[float], float], over: int) -> dict[str, float | None]:
        nats = {which: result.nats for which, result in results.items()}
        values = {which: measure(total) if total is not None and over else None for which, total in nats.items()}
        return {which: value if value is not None and isfinite(value) else None for which, value in values.items()}

    return {
        "sequences": len(exam.split) if exam.split else 0,
        "tokens": tokens,
        "utf8_bytes": size,
        "nll": each(lambda nats: nll(nats, tokens), tokens),
        "perplexity": each(lambda nats: perplexity(nll(nats, tokens)), tokens),
        "bits_per_byte": each(lambda nats: bits_per_byte(nats, size), size),
    }


def endings(results: Results) -> dict[str, dict[str, float | None]]:
    """Return the shares of all replies, to questions and to the panel, by how they ended; null without any."""

    def rate(result: ModelOutputs, end: End) -> float | None:
        replies = result.all_replies
        return fraction(sum(reply.end == end for reply in replies), len(replies)) if replies else None

    return {RATES[end]: {which: rate(result, end) for which, result in results.items()} for end in get_args(End)}


def preferences(results: Results, exam: EvaluationSet) -> dict[str, Any]:
    """Return what each model makes of the pairs of a better and a worse reply; null where nobody ranked any.

    accuracy: Share of the pairs whose better reply it finds likelier; a tie is half right.
    margin: How much likelier than the worse one, mean over the pairs, nats.
    chosen: Log-probability of the better reply, mean over the pairs, nats.
    """
    replies = exam.ranked[1] if exam.ranked else None
    better, worse = replies.pairs(np.arange(len(replies.rank))) if replies else ((), ())
    if not len(better):
        return {"pairs": 0, "accuracy": None, "margin": None, "chosen": None}
    logps = {which: result.logps.astype(np.float64) for which, result in results.items() if result.logps is not None}
    margins = {which: values[better] - values[worse] for which, values in logps.items()}
    return {
        "pairs": len(better),
        "accuracy": {which: float((1 + np.sign(margin)).mean() / 2) for which, margin in margins.items()},
        "margin": {which: float(margin.mean()) for which, margin in margins.items()},
        "chosen": {which: float(values[better].mean()) for which, values in logps.items()},
    }


def is_answer(question: Question, reply: Reply, dialect: Dialect) -> bool:
    """Tell whether a reply is right and ended by itself: what runs on is no answer."""
    return reply.stopped and is_right(question.fact, dialect.decode(reply.ids))


def fact_figures(results: Results, exam: EvaluationSet) -> dict[str, Any]:
    """Return the shares answered right, in all, by region and by family, and what the last model got wrong first."""
    questions, dialect = exam.questions, exam.dialect
    right = {
        which: [is_answer(*pair, dialect) for pair in zip(questions, result.answers, strict=True)]
        for which, result in results.items()
    }
    *_, last = results

    def shares(rows: Sequence[int]) -> dict[str, Any]:
        return {
            **{which: fraction(sum(right[which][row] for row in rows), len(rows)) for which in right},
            "n": len(rows),
        }

    def by(names: Sequence[str]) -> dict[str, Any]:
        return {
            name: shares([row for row, label in enumerate(names) if label == name]) for name in sorted({*names} - {""})
        }

    wrong = [row for row, correct in enumerate(right[last]) if not correct][:WRONG]
    return {
        **shares(range(len(questions))),
        "by_region": by([question.fact.region for question in questions]),
        "by_family": by([question.fact.family for question in questions]),
        "wrong": [
            {**question_fields(questions[row]), **reply_fields(results[last].answers[row], dialect)} for row in wrong
        ],
    }


def panel(results: Results, exam: EvaluationSet, at: int) -> dict[str, Any]:
    """Return the replies of all models to one prompt, side by side."""
    replies = {
        which: [reply_fields(reply, exam.dialect) for reply in result.replies[at]] for which, result in results.items()
    }
    return {"prompt": exam.panel[at], "seeds": list(exam.seeds), **replies}


def samples(results: Results, exam: EvaluationSet) -> Iterator[dict[str, Any]]:
    """Yield every answer and reply of all models: the lines of samples.jsonl."""
    for which, result in results.items():
        for question, reply in zip(exam.questions, result.answers, strict=True):
            right = is_answer(question, reply, exam.dialect)
            yield {
                "model": which,
                "set": "facts",
                **question_fields(question),
                **reply_fields(reply, exam.dialect),
                "right": right,
            }
        for prompt, replies in zip(exam.panel, result.replies, strict=True):
            for seed, reply in zip(exam.seeds, replies, strict=True):
                yield {
                    "model": which,
                    "set": "panel",
                    "prompt": prompt,
                    "seed": seed,
                    **reply_fields(reply, exam.dialect),
                }


def question_fields(question: Question) -> dict[str, str]:
    """Return what a question asks and wants to hear, as JSON values."""
    fact = question.fact
    return {"question": question.text, "expected": fact.answer, "family": fact.family, "region": fact.region}


def reply_fields(reply: Reply, dialect: Dialect) -> dict[str, Any]:
    """Return a reply as JSON values; `tokens` leaves out the end of turn."""
    return {"text": dialect.decode(reply.ids), "end": reply.end, "tokens": len(reply.ids)}
