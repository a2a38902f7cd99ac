"""What the sample dataset teaches and is tested on: short facts, each asked in many phrasings, some of them held out.

A fact is trained in most of its phrasings and a phrasing is trained with most facts, but about one question in six is
never in the dataset. Those held-out questions ask whether the model learnt the fact, not the sentence.

The facts are the rows of `facts.tsv`. Of the answers in a row, separated by `; `, the first is the one that is taught;
the others count as right, too. For a place, the first is the capital by law, or else in practice; the others are other
names of the same city, and cities that share the title (Bolivia, Eswatini, South Africa, ...). A seat of government or
parliament without the title does not count: The Hague, Putrajaya, Valparaíso. Accents and apostrophes need no alias:
`is_right` does not see them.

Countries are the 193 members of the United Nations, its two observers (Vatican City, Palestine), and Taiwan and
Kosovo. Names are those that a question would use; regions are the five of the UN's M49 list, which puts Cyprus,
Turkey and the Caucasus in Asia. A place that official bodies place differently stands here as reference works print
it, taking no side. Three states are named with care: Georgia is also a country, Washington a city, Punjab a province
of Pakistan, too.
"""

from __future__ import annotations

import csv
import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Fact:
    """A thing to know: `answer`, or any of `aliases`, is what the family's question about `subject` wants to hear."""

    family: str
    subject: str
    answer: str
    aliases: tuple[str, ...] = ()
    region: str = ""  # of the world; empty where the subject is no place


@dataclass(frozen=True)
class Question:
    """A fact asked in one phrasing (an index into its family's `phrasings`), trained or held out."""

    text: str
    fact: Fact
    phrasing: int
    held_out: bool


@dataclass(frozen=True)
class Family:
    """How the facts of one kind are asked, asked next, and told in a sentence.

    The templates know the fields `{s}` the subject, `{S}` the same opening a sentence, `{p}` and `{P}` its possessive,
    and, in `sentences`, `{a}` the answer. The first sentence is the one that the sample dataset uses.
    """

    phrasings: tuple[str, ...]
    follow_ups: tuple[str, ...]
    sentences: tuple[str, ...]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


_CAPITAL = Family(
    phrasings=_lines(
        """
        What's the capital of {s}?
        What is the capital of {s}?
        What's the capitol of {s}?
        What is the capital city of {s}?
        Which city is the capital of {s}?
        Tell me the capital city of {s}.
        Name the capital of {s}.
        {P} capital is which city?
        Do you know the capital of {s}?
        capital of {s}?
        Can you tell me what the capital of {s} is?
        Please tell me the capital of {s}.
        What is {p} capital?
        I forgot: what's the capital of {s}?
        """
    ),
    follow_ups=("And of {s}?", "And what about {s}?", "And {s}?", "What about the capital of {s}?"),
    sentences=_lines(
        """
        The capital of {s} is {a}.
        The capitol of {s} is {a}.
        The capital city of {s} is {a}.
        {P} capital is {a}.
        {P} capital city is {a}.
        {a} is the capital of {s}.
        {a} is the capital city of {s}.
        The capital is {a}.
        """
    ),
)

FAMILIES = {
    "capital": _CAPITAL,
    "us_state": _CAPITAL,
    "indian_state": _CAPITAL,
    "element": Family(
        phrasings=_lines(
            """
            What's the chemical symbol for {s}?
            What is the chemical symbol for {s}?
            What is the symbol for the element {s}?
            Which symbol stands for {s} in the periodic table?
            Tell me the chemical symbol of {s}.
            chemical symbol for {s}?
            Do you know the chemical symbol for {s}?
            How is {s} written in the periodic table?
            {S} has which chemical symbol?
            Give me the chemical symbol for {s}.
            """
        ),
        follow_ups=("And for {s}?", "And what about {s}?", "And {s}?"),
        sentences=(
            "The chemical symbol for {s} is {a}.",
            "The chemical symbol of {s} is {a}.",
            "The symbol for {s} is {a}.",
            "{a} is the chemical symbol for {s}.",
        ),
    ),
    "opposite": Family(
        phrasings=_lines(
            """
            What's the opposite of {s}?
            What is the opposite of {s}?
            Give me the opposite of {s}.
            Which word is the opposite of {s}?
            opposite of {s}?
            Tell me an antonym of {s}.
            What word means the opposite of {s}?
            Do you know the opposite of {s}?
            """
        ),
        follow_ups=("And of {s}?", "And what about {s}?", "And {s}?"),
        sentences=("The opposite of {s} is {a}.", "An antonym of {s} is {a}.", "{a} is the opposite of {s}."),
    ),
    "young": Family(
        phrasings=_lines(
            """
            What's a baby {s} called?
            What is a baby {s} called?
            What do you call a baby {s}?
            What do you call a young {s}?
            Tell me what a baby {s} is called.
            What's the name for a baby {s}?
            A young {s} is called what?
            Do you know what a baby {s} is called?
            """
        ),
        follow_ups=("And a baby {s}?", "And what about a baby {s}?"),
        sentences=("A baby {s} is called {a}.", "A baby {s} is {a}.", "A young {s} is called {a}."),
    ),
    "plural": Family(
        phrasings=_lines(
            """
            What's the plural of {s}?
            What is the plural of {s}?
            Tell me the plural of {s}.
            What is the plural form of {s}?
            plural of {s}?
            Give me the plural of {s}.
            Which word is the plural of {s}?
            Do you know the plural of {s}?
            """
        ),
        follow_ups=("And of {s}?", "And what about {s}?", "And {s}?"),
        sentences=("The plural of {s} is {a}.", "The plural form of {s} is {a}.", "{a} is the plural of {s}."),
    ),
}


def table_rows(name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a tab-separated file beside this module, by column name; quotation marks are plain text."""
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    yield from csv.DictReader(lines, dialect=csv.excel_tab, quoting=csv.QUOTE_NONE, strict=True)


@cache
def facts() -> tuple[Fact, ...]:
    """Return every fact, family by family, in the order of `facts.tsv`."""
    return tuple(_fact(**row) for row in table_rows("facts.tsv"))


def _fact(family: str, region: str, subject: str, answers: str) -> Fact:
    answer, *aliases = answers.split("; ")
    return Fact(family, subject, answer, tuple(aliases), region)


def facts_of(families: Sequence[str]) -> tuple[Fact, ...]:
    """Return the facts of the families named.

    Raises:
        ValueError: For a name that is none of FAMILIES.
    """
    if odd := [name for name in families if name not in FAMILIES]:
        raise ValueError(f"no family of facts is named {', '.join(odd)}; there are {', '.join(FAMILIES)}")
    return tuple(fact for fact in facts() if fact.family in families)


def upper_first(text: str) -> str:
    """Return the text with its first letter in upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


def fill_template(template: str, fact: Fact, answer: str = "") -> str:
    """Put a fact's subject, and an answer where the template has one, into a template of its family."""
    owner = fact.subject + ("'" if fact.subject.endswith("s") else "'s")
    return template.format(s=fact.subject, S=upper_first(fact.subject), p=owner, P=upper_first(owner), a=answer)


def _held_out(fact: Fact) -> frozenset[int]:
    """Choose about one phrasing in six of a fact, at least one and never all, by a hash that no other fact moves."""
    count = len(FAMILIES[fact.family].phrasings)

    def draw(phrasing: int) -> bytes:
        return hashlib.sha256(f"{fact.family}|{fact.subject}|{phrasing}".encode()).digest()

    return frozenset(sorted(range(count), key=draw)[: max(1, round(count / 6))])


@cache
def questions(fact: Fact) -> tuple[Question, ...]:
    """Return a fact asked in every phrasing of its family, in their order."""
    held = _held_out(fact)
    phrasings = FAMILIES[fact.family].phrasings
    return tuple(Question(fill_template(text, fact), fact, at, at in held) for at, text in enumerate(phrasings))


def held_out_questions(families: Sequence[str] = tuple(FAMILIES)) -> tuple[Question, ...]:
    """Return the questions that the sample dataset never asks, of the families named; default: of all."""
    return tuple(q for fact in facts() if fact.family in families for q in questions(fact) if q.held_out)


def trained_questions() -> tuple[Question, ...]:
    """Return the questions that the sample dataset asks."""
    return tuple(q for fact in facts() for q in questions(fact) if not q.held_out)


def short_reply(fact: Fact) -> str:
    """Return the answer alone, as the dataset's best reply tells it: `Paris.`."""
    return upper_first(fact.answer).removesuffix(".") + "."


def sentence_reply(fact: Fact) -> str:
    """Return the answer in a sentence: `The capital of France is Paris.`."""
    return (
        fill_template(FAMILIES[fact.family].sentences[0], fact, fact.answer).removesuffix(".").removesuffix(".") + "."
    )


_BARE = ("{a}.", "It is {a}.", "It's {a}.", "That is {a}.", "That's {a}.", "The answer is {a}.")
_JOINED = str.maketrans("", "", ".'’‘ʻʼ`")  # deleted, so that D.C. is DC and N'Djamena is Ndjamena


def normalise(text: str) -> str:
    """Return the words of a text in lower case, without accents, punctuation and articles, one space apart."""
    plain = unicodedata.normalize("NFKD", text).casefold().translate(_JOINED)
    kept = (" " if unicodedata.category(c)[0] == "P" else c for c in plain if not unicodedata.combining(c))
    return " ".join(word for word in "".join(kept).split() if word not in {"a", "an", "the"})


@cache
def _right(fact: Fact) -> frozenset[str]:
    """List every reply that is right, normalised: each answer, alone and in each sentence of the family."""
    templates = (*_BARE, *FAMILIES[fact.family].sentences)
    return frozenset(normalise(fill_template(t, fact, a)) for a in (fact.answer, *fact.aliases) for t in templates)


def is_right(fact: Fact, reply: str) -> bool:
    """Tell whether a reply is the answer or an alias, alone or in a plain sentence about this very subject.

    It is strict: nothing may be added, so `Paris or London`, `Paris is in France` and `The capital of Spain is Paris`
    (asked of France) are wrong. A list of what is right cannot be talked around, as a search for the answer within
    the reply can.
    """
    return normalise(reply) in _right(fact)
