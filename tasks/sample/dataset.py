"""The sample dataset: facts as conversation trees in OASST2's published form, made offline, the same everywhere.

Each trained question of `facts` opens one tree; its best reply is the bare answer ("Paris."), which a tiny model
learns best. Some trees go on ("And of Spain?") or hold a second reply. A few hundred carry an impurity that real
dumps have, one each and in a known number (`planted`), so that a test can say what a filter must find. Wrong answers
stand only in deleted and rejected messages: a model that learns one was fed by a broken filter. Nothing depends on a
clock, a random module or a hash seed.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import orjson

from tasks.progress import track
from tasks.sample.facts import (
    FAMILIES,
    Fact,
    Question,
    facts,
    fill_template,
    is_right,
    sentence_reply,
    short_reply,
    table_rows,
    trained_questions,
)

SAMPLE_NAME = "sample.trees.jsonl.gz"

# How many trained questions get which trait, each at most one; the thousands left stay plain.
TRAITS = {
    "sentence": 260,  # a second reply, rank 1: the answer in a sentence
    "follow_up": 300,  # the next question of the same kind
    "follow_ups": 90,  # two next questions side by side, the first with one more below
    "thanks": 60,  # "Thanks!", answered
    "unanswered": 60,  # "Thanks!", unanswered: the path ends on a prompter's turn
    "unranked": 90,
    "deleted": 90,
    "rejected": 70,
    "undecided": 15,
    "synthetic": 60,
    "ai_paste": 30,
    "role_break": 10,
    "empty": 10,
    "blank": 10,
    "unlabelled": 20,
    "other_language_reply": 15,
    "spam_label": 15,
    "low_quality": 15,
    "pii": 15,
    "not_appropriate": 10,
    "hate_speech": 10,
    "toxic": 15,
    "duplicate": 60,  # the whole conversation once more, in another tree
    "not_ready": 40,  # asked once more, in a tree that is not ready for export
}
SPAM_ROOTS = 10

_SHORT_LABELS = ("spam", "lang_mismatch", "quality")
_ALL_LABELS = (
    "spam", "fails_task", "lang_mismatch", "pii", "not_appropriate", "hate_speech", "sexual_content", "quality",
    "toxicity", "humor", "helpfulness", "creativity", "violence",
)  # fmt: skip
_OF_REPLIES = {"fails_task", "helpfulness"}  # a prompt has no task to fulfil
_DETOXIFY = ("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")

_STATES = (
    "initial_prompt_review", "growing", "ranking", "ready_for_scoring", "scoring_failed", "aborted_low_grade",
    "halted_by_moderator", "backlog_ranking", "prompt_lottery_waiting",
)  # fmt: skip

_FLAGGED = {  # replies that only their labels, or detoxify, give away; the insults are mild on purpose
    "spam_label": ("Visit my channel and win a prize today!", {"spam": 1.0}),
    "low_quality": ("idk, look it up", {"quality": 0.0}),
    "pii": ("Ask my neighbour John Doe, his number is 555-0100.", {"pii": 1.0}),
    "not_appropriate": ("That is none of your business.", {"not_appropriate": 1.0}),
    "hate_speech": ("People who ask this should be sent away.", {"hate_speech": 1.0}),
    "other_language_reply": ("Entschuldigung, ich verstehe die Frage nicht.", {"lang_mismatch": 1.0}),
    "toxic": ("What a stupid question, you idiot.", {"toxicity": 1.0}),
}

_SMALL_TALK = """
Hello! > Hello! How can I help you?
Good morning! > Good morning! What can I do for you?
How are you? > I am fine, thank you. How can I help?
Who are you? > I am Treeline, a small language model. Ask me for a capital.
What can you do? > I answer short questions: capitals, chemical symbols, opposites and plurals.
Thank you very much. > You're welcome.
Goodbye! > Goodbye! Come back soon.
Are you a person? > No, I am a small computer program.
Tell me a joke. > Why did the tree go to school? To learn its roots.
What's the capital of nowhere? > Nowhere has no capital.
Say hello in Greek. > Γειά σου!
Say hello in Japanese. > こんにちは
Say hello in Arabic. > مرحبا
Say hello in Hindi. > नमस्ते
Say hello in Korean. > 안녕하세요
Show me a tree. > 🌳
Show me a family. > 👨‍👩‍👧‍👦
Which sign stands for infinity? > ∞
What does <|endoftext|> mean? > It is the token that ends a document in GPT-2.
My text ends in <|endoftext|> Is that a problem? > No. In a message it is plain text.
How is the end of a document marked in GPT-2? > With the token <|endoftext|> between two documents.
"""

_ESSAYS = """
rainbows > A rainbow is made of sunlight and water. When the sun stands low behind you and rain falls in front of you,
light enters each drop, bends, bounces off its back and bends again on the way out. Every colour bends by a slightly
different angle, so the colours leave the drop apart from one another. Red appears on the outer edge of the bow and
violet on the inner edge. A second, fainter bow sometimes shows above the first with its colours in reverse.

bread > Bread is one of the oldest prepared foods. You need flour, water, salt and yeast. Mix them, knead the dough
until it feels smooth, and leave it in a warm place until it has doubled in size. The yeast eats sugar from the flour
and gives off gas, which fills the dough with bubbles. Shape the loaf, let it rest once more, and bake it in a hot
oven until the crust sounds hollow when you knock on it. Let it cool before you cut the first slice.

tides > The tide is the slow rise and fall of the sea. The moon pulls on the water that faces it more strongly than on
the solid earth, and more weakly on the water at the far side, so two bulges form. As the earth turns, most coasts
pass through both of them each day and see two high waters and two low ones. When sun and moon pull along one line, at
new and full moon, the tides are strongest. Between those days they are weaker, and harbours are easier to enter.

bees > A honey bee is a small insect that lives in a large family. One queen lays all the eggs, thousands of workers
build combs of wax, feed the young and guard the entrance, and a few hundred drones wait for a new queen. Workers that
have found flowers dance on the comb to tell the others which way to fly and how far. While they gather nectar they
carry pollen from flower to flower, and so many fruits and seeds could not grow without their visits.
"""

_VARIANTS = (  # one word more at the start, at the end, in the middle: the prompt, and what becomes of the essay
    ("Please write a short text about {}.", lambda text: f"Well, {text}"),
    ("Can you write a short text about {}?", lambda text: f"{text} Enjoy!"),
    ("I need a short text about {}.", lambda text: text.replace(" is ", " is indeed ", 1)),
)


_OTHER_LANGUAGES = {  # the question for a country's capital, and the end of the reply
    "de": ("Was ist die Hauptstadt von {}?", "."),
    "es": ("¿Cuál es la capital de {}?", "."),
    "fr": ("Quelle est la capitale {} ?", "."),
    "it": ("Qual è la capitale {}?", "."),
    "pt-BR": ("Qual é a capital {}?", "."),
    "ru": ("Назовите столицу {}.", "."),
    "ja": ("{}の首都はどこですか?", "。"),
    "zh": ("{}的首都是哪里？", "。"),
}


@dataclass(frozen=True)
class Turn:
    """A message to be: its text, what follows, what was planted in it, and how it differs from a usual one.

    A reply's `rank` counts from 0 among its siblings; its role alternates unless `fields` says otherwise.
    """

    text: str
    replies: tuple[Turn, ...] = ()
    planted: tuple[str, ...] = ()
    rank: int | None = None
    lang: str = "en"
    labels: tuple[tuple[str, float], ...] = ()
    fields: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class PlannedTree:
    """A tree to be: a name that no other tree has, its state, and its first message."""

    name: str
    root: Turn
    state: str = "ready_for_export"


def _dice(*names: object) -> bytes:
    """Return 32 bytes that look random and follow from the names alone."""
    return hashlib.sha256("|".join(map(str, names)).encode()).digest()


def _other(fact: Fact, *names: object) -> Fact:
    """Return another fact of the same family whose answer would be wrong here."""
    family = [other for other in facts() if other.family == fact.family]
    start = int.from_bytes(_dice("other", fact.subject, *names)[:4]) % len(family)
    return next(other for other in family[start:] + family if not is_right(fact, other.answer))


def _best(text: str, *replies: Turn, lang: str = "en") -> Turn:
    return Turn(text, replies, rank=0, lang=lang)


def _beside(trait: str, question: Question) -> Turn | None:
    """Return the second reply that a trait sets beside the right answer, if it sets one."""
    sentence = sentence_reply(question.fact)
    if trait in _FLAGGED:
        text, labels = _FLAGGED[trait]
        fields = (("detoxify", dict.fromkeys(_DETOXIFY, 0.97)),) if trait == "toxic" else ()
        return Turn(
            text, (), (trait,), 1, "de" if trait == "other_language_reply" else "en", tuple(labels.items()), fields
        )
    if trait in {"deleted", "rejected"}:
        field = ("deleted", True) if trait == "deleted" else ("review_result", False)
        return Turn(short_reply(_other(question.fact, question.phrasing)), (), (trait, "wrong"), fields=(field,))
    return {
        "sentence": Turn(sentence, (), (trait,), 1),
        "unranked": Turn(sentence, (), (trait,)),
        "undecided": Turn(sentence, (), (trait,), fields=(("review_result", None),)),
        "synthetic": Turn(sentence, (), (trait,), 1, fields=(("synthetic", True), ("model_name", "chip20b"))),
        "ai_paste": Turn(f"As an AI language model, I cannot travel. {sentence}", (), (trait,), 1),
        "empty": Turn("", (), (trait,), 1),
        "blank": Turn(" \n\t ", (), (trait,), 1),
    }.get(trait)


def _next(question: Question, *salt: object, below: tuple[Turn, ...] = ()) -> Turn:
    """Return the next question of the same kind with its answer, and what follows on that."""
    fact = _other(question.fact, question.phrasing, *salt)
    forms = FAMILIES[fact.family].follow_ups
    form = forms[_dice("form", question.text, *salt)[0] % len(forms)]
    return Turn(fill_template(form, fact), (_best(short_reply(fact), *below),), ("next_question",))


def _below(trait: str, question: Question) -> tuple[Turn, ...]:
    """Return what a trait lets follow on the right answer."""
    match trait:
        case "follow_up":
            return (_next(question),)
        case "follow_ups":
            return (_next(question, 1, below=(_next(question, 3),)), _next(question, 2))
        case "thanks":
            return (Turn("Thanks!", (_best("You're welcome."),)),)
        case "unanswered":
            return (Turn("Thanks!", (), (trait,)),)
        case "role_break":
            return (Turn("I hope this helps.", (), (trait,), fields=(("role", "assistant"),)),)
    return ()


def _asked(question: Question, trait: str = "") -> Turn:
    """Return a trained question with its best reply and the trait that it was drawn for."""
    best = _best(short_reply(question.fact), *_below(trait, question))
    if trait == "unlabelled":
        best = replace(best, planted=(trait,), fields=(("labels", None),))
    beside = _beside(trait, question)
    return Turn(question.text, (best, beside) if beside else (best,))


def _again(question: Question, trait: str, number: int) -> Iterator[PlannedTree]:
    """Ask a question in a second tree, if its trait is about trees."""
    if trait == "duplicate":
        yield PlannedTree(f"duplicate|{number}", replace(_asked(question), planted=(trait,)))
    if trait == "not_ready":
        state = _STATES[number % len(_STATES)]
        waiting = state in {"initial_prompt_review", "prompt_lottery_waiting"}
        replies = () if waiting else (_best(short_reply(question.fact)),)
        yield PlannedTree(f"not_ready|{number}", Turn(f"Quick question: {question.text}", replies, (trait,)), state)


def _drawn() -> Iterator[tuple[Question, str]]:
    """Pair every trained question with its trait, empty for most, in the order of a hash."""
    order = sorted(trained_questions(), key=lambda q: _dice("trait", q.fact.family, q.text))
    traits = [trait for trait, count in TRAITS.items() for _ in range(count)]
    return zip(order, traits + [""] * (len(order) - len(traits)), strict=True)


def _question_plans() -> Iterator[PlannedTree]:
    for number, (question, trait) in enumerate(_drawn()):
        yield PlannedTree(f"question|{question.fact.family}|{question.text}", _asked(question, trait))
        yield from _again(question, trait, number)


def _other_plans() -> Iterator[PlannedTree]:
    """Yield what is no fact: small talk, other languages, long texts with near duplicates, spam."""
    for line in _SMALL_TALK.strip().splitlines():
        prompt, reply = line.split(" > ")
        kinds = ("endoftext",) if "<|endoftext|>" in line else ("unicode",) if max(line) > "\u02ff" else ()
        yield PlannedTree(f"talk|{prompt}", Turn(prompt, (_best(reply),), kinds))
    for row in table_rows("other_languages.tsv"):
        lang, country = row["lang"], row["country"]
        question, stop = _OTHER_LANGUAGES[lang]
        best = _best(row["capital"] + stop, lang=lang)
        yield PlannedTree(
            f"world|{lang}|{country}", Turn(question.format(country), (best,), ("other_language",), lang=lang)
        )
    for topic, essay in _essays():
        yield PlannedTree(f"essay|{topic}", Turn(f"Write a short text about {topic}.", (_best(essay),)))
        for prompt, change in _VARIANTS:
            near = replace(_best(change(essay)), planted=("near_duplicate",))
            yield PlannedTree(f"essay|{topic}|{prompt}", Turn(prompt.format(topic), (near,)))
    for number in range(SPAM_ROOTS):
        spam = f"Cheap watches, offer {number}! Order now, only today!"
        yield PlannedTree(f"spam|{number}", Turn(spam, (), ("rejected",), fields=(("review_result", False),)))


def _essays() -> Iterator[tuple[str, str]]:
    for block in _ESSAYS.strip().split("\n\n"):
        topic, essay = block.split(" > ")
        yield topic, essay.replace("\n", " ")


@cache
def _plans() -> tuple[PlannedTree, ...]:
    return (*_question_plans(), *_other_plans())


def _turns(turn: Turn) -> Iterator[Turn]:
    yield turn
    for reply in turn.replies:
        yield from _turns(reply)


def planted() -> dict[str, int]:
    """Count what was put into the dataset: trees, messages, and each trait and impurity by name.

    `deleted`, `rejected` and `wrong` count messages (every wrong answer is deleted or rejected), `other_language`,
    `unicode`, `endoftext`, `duplicate` and `not_ready` trees, the others messages. `unranked` is right, reviewed and
    without a rank.
    """
    turns = [turn for plan in _plans() for turn in _turns(plan.root)]
    kinds = Counter(kind for turn in turns for kind in turn.planted)
    return {"trees": len(_plans()), "messages": len(turns), **dict(sorted(kinds.items()))}


def _uuid(digest: bytes) -> str:
    return str(uuid.UUID(bytes=digest[:16], version=4))


@cache
def _user(number: int) -> str:
    return _uuid(_dice("user", number))


def _labels(turn: Turn, role: str, dice: bytes) -> dict[str, dict[str, float]]:
    """Return a review: good marks, but for those given; most reviews are short, to keep the file small."""
    given = dict(turn.labels)
    good = round(0.75 + dice[29] % 4 / 12, 4)
    marks = {"quality": good, "helpfulness": good, "humor": 0.25, "creativity": 0.25} | given
    names: tuple[str, ...] = _ALL_LABELS if given or dice[30] < 48 else _SHORT_LABELS
    if role == "prompter":
        names = tuple(name for name in names if name not in _OF_REPLIES)
    return {name: {"value": marks.get(name, 0.0), "count": 3} for name in names}


def _node(turn: Turn, name: str, parent: str | None, role: str, date: datetime) -> dict[str, Any]:
    """Return a message and all below it in the published form: every key, in its order."""
    dice = _dice(name)
    own, date = _uuid(dice), date + timedelta(microseconds=int.from_bytes(dice[16:21]) % 10**11)  # up to 28 hours later
    answering = "prompter" if role == "assistant" else "assistant"
    usual = {
        "message_id": own,
        "parent_id": parent,
        "user_id": _user(dice[21]),
        "created_date": date.isoformat(timespec="microseconds"),
        "text": turn.text,
        "role": role,
        "lang": turn.lang,
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": turn.rank,
        "synthetic": False,
        "model_name": None,
        "emojis": {"+1": dice[22] % 4 + 1} if dice[23] < 96 else {"_skip_labeling": 1} if dice[23] < 112 else {},
        "replies": [_node(reply, f"{name}|{at}", own, answering, date) for at, reply in enumerate(turn.replies)],
        "labels": _labels(turn, role, dice),
        "events": None,
        "detoxify": {key: round(1e-4 + byte / 1e5, 5) for key, byte in zip(_DETOXIFY, dice[22:29], strict=True)},
        "message_tree_id": None,
        "tree_state": None,
    }
    return usual | dict(turn.fields)  # keeps the order of the keys


def sample_trees() -> Iterator[dict[str, Any]]:
    """Yield every tree, ordered by its id, so that families and impurities lie mixed as in a real dump."""
    start = datetime(2023, 2, 1, tzinfo=UTC)
    nodes = ((_node(plan.root, plan.name, None, "prompter", start), plan.state) for plan in _plans())
    for prompt, state in sorted(nodes, key=lambda pair: str(pair[0]["message_id"])):
        yield {"message_tree_id": prompt["message_id"], "tree_state": state, "prompt": prompt, "origin": None}


def _gzip(data: bytes) -> bytes:
    """Wrap bytes in a gzip container without compressing them.

    Compressed bytes differ from one build of zlib to the next (zlib, zlib-ng, Intel's), and this file is pinned by its
    sha256. Stored blocks, no name and no time leave nothing to choose. Source: RFC 1951, 3.2.4; RFC 1952, 2.3.
    """
    size = 65_535  # the most that a stored block holds
    parts = [b"\x1f\x8b\x08\0" + bytes(4) + b"\0\xff"]  # deflate, no flags, time 0, no hint, system unknown
    for at in range(0, max(1, len(data)), size):
        block = data[at : at + size]
        parts += [struct.pack("<BHH", at + size >= len(data), len(block), len(block) ^ 0xFFFF), block]
    return b"".join([*parts, struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)])


def sample_bytes() -> bytes:
    """Return the file `SAMPLE_NAME`: gzip around one JSON tree a line, the same bytes on every machine."""
    trees = track(sample_trees(), "write the sample", unit="trees")
    return _gzip(b"".join(orjson.dumps(tree) + b"\n" for tree in trees))
