"""Notices: what steps say of data that they lost, or took otherwise than it stood.

Each function makes them of what a step measured and of its settings; `@step` names it, and manifests keep what it says.
Little losses are in the counts alone: a run over clean data prints no notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tasks.artifacts import Counts
from tasks.dialogue.settings import deciding_setting
from tasks.store.manifest import Manifest, Notice

if TYPE_CHECKING:
    from tasks.curate import CurateParams
    from tasks.encode import EncodeParams
    from tasks.parse import ParseParams

MOST_DROPPED = 0.1  # share of all replies that one rule may take without a notice
MOST_UNFIT = 0.01  # share of the conversations that may be cut or left out
FEWEST = 20  # replies of a split, under which its loss says little
NAMED = 10  # fields that a notice names
WHY = {
    "leak": "they, or the prompts above them, nearly repeat what stands in a more protected split, as texts of one "
    "template do",
    "near_duplicate": "another reply nearly says the same",
}
# What to do about a field, by the end of its name.
FOR_FIELD = {
    "system": "write a system text as the first of `messages`, with the role system",
    "split": "the splits are made anew, by curate.test_fraction and curate.val_fraction",
    "weight": "every reply is trained on alike",
    "train": "every reply is trained on alike",
}
USED = "tree.tree_id"  # which `extra` keeps, though it made the ids


def of_parse(counts: Counts, params: ParseParams) -> Iterator[Notice]:
    """Say which fields no step reads, and what of the input was rejected, or came again changed."""
    fields = {name: count for name, count in counts["unknown_fields"].items() if name != USED}
    if fields:
        named = ", ".join(f"{name} {count:,}" for name, count in [*fields.items()][:NAMED])
        others = f" and {len(fields) - NAMED:,} others" if len(fields) > NAMED else ""
        found = [hint for end, hint in FOR_FIELD.items() if any(name.rpartition(".")[2] == end for name in fields)]
        yield Notice(
            "parse.fields",
            sum(fields.values()),
            f"no step reads these fields (name and count): {named}{others}; they are kept aside, in column extra",
            _sentence(dict.fromkeys(found)) or "Only what stands in `messages`, or in OASST's own fields, is read",
        )
    if counts["naive_dates"]:
        yield Notice(
            "parse.naive_dates",
            counts["naive_dates"],
            f"{counts['naive_dates']:,} dates name no offset, and are read as UTC",
            "Write dates with their offset where they are of another zone",
        )
    if counts["messages_replaced"] > params.max_bad_fraction * counts["messages_in"]:
        yield Notice(
            "parse.replaced",
            counts["messages_replaced"],
            f"later versions took the place of {_share(counts['messages_replaced'], counts['messages_in'])} messages",
            "`python -m flows show messages --rejected` names them; up to parse.max_bad_fraction they are not reported",
        )
    if counts["bad"]:
        messages = counts["messages_rejected"] - counts["messages_replaced"]
        yield Notice(
            "parse.rejected",
            counts["bad"],
            f"{counts['bad']:,} lines or trees are rejected, {messages:,} messages known in them",
            "`python -m flows show messages --rejected` says why; parse.max_bad_fraction is the share that may be",
        )


def of_curate(counts: Counts, params: CurateParams) -> Iterator[Notice]:
    """Say which rules took much, which splits hold little, and how many messages have no language."""
    read, dropped = counts["read"]["replies"], counts["replies_dropped"]
    for rule, number in dropped.items():
        if number > MOST_DROPPED * read:
            why = f": {WHY[rule]}" if rule in WHY else ""
            yield Notice(
                f"curate.{rule}",
                number,
                f"the rule {rule} takes {_share(number, read)} replies, with those below them{why}",
                f"curate.{deciding_setting(rule)} decides; `python -m flows show dialogues --dropped` names them",
            )
    yield from _splits(counts, params)
    if params.languages and "language" in params.rules and counts["untagged"]:
        yield Notice(
            "curate.untagged",
            counts["untagged"],
            f"{_share(counts['untagged'], counts['read']['messages'])} messages have no language, and are kept whatever"
            f" they are written in, though curate.languages is {', '.join(params.languages)}",
            "Give each a `lang`, or set curate.languages=[] if every language is welcome",
        )


def _splits(counts: Counts, params: CurateParams) -> Iterator[Notice]:
    """Say which splits that are asked for hold no reply, or hardly any."""
    shares = {
        "train": 1 - params.test_fraction - params.val_fraction,
        "val": params.val_fraction,
        "test": params.test_fraction,
    }
    lacks = {
        "train": "there is hardly anything to learn from",
        "val": "the choice of the best checkpoint is chance",
        "test": "the loss that the report gives is chance",
    }
    kept = {name: sizes["replies"] for name, sizes in counts["splits"].items()}
    for name, number in kept.items():
        if shares[name] > 0 and number < FEWEST:
            sizes = ", ".join(f"{other} {size:,}" for other, size in kept.items())
            took = spent(counts["replies_dropped"]) if name == "train" else ""
            yield Notice(
                f"curate.{name}",
                number,
                f"of the replies, the {name} split holds {number:,}, so {lacks[name]} ({sizes}"
                + (f"; dropped by {took})" if took else ")"),
                "Loosen the rule that takes the most, or with few trees lower curate.test_fraction and val_fraction"
                if name == "train"
                else f"Raise curate.{name}_fraction, or bring more trees",
            )


def of_encode(counts: Counts, params: EncodeParams) -> Iterator[Notice]:
    """Say how many conversations do not fit, and what context most would."""
    room = counts["room"]
    if room["too_long"] > MOST_UNFIT * room["conversations"]:
        share, block = next(named for named in room["needed"].items() if named[1] > params.context_length)
        yield Notice(
            "encode.context_length",
            room["too_long"],
            f"{_share(room['too_long'], room['conversations'])} conversations do not fit "
            f"encode.context_length={params.context_length}; their replies beyond it are not trained on",
            f"encode.context_length={block} would fit {share} of them",
        )


def told(manifests: Iterable[Manifest]) -> tuple[Notice, ...]:
    """Return what the artifacts of one run tell, each notice once; of a step among them, what its own manifest says."""
    found = [(made.recipe.get("step"), made.notices) for made in manifests]
    steps = {step for step, _ in found}
    own = (one for step, notices in found for one in notices if one.step == step or one.step not in steps)
    return tuple(dict.fromkeys(own))


def _share(number: int, total: int) -> str:
    return f"{number:,} of {total:,} ({number / max(total, 1):.1%})"


def spent(dropped: Mapping[str, int]) -> str:
    """Name what dropped messages, what took the most first."""
    most = sorted(dropped.items(), key=lambda one: -one[1])
    return ", ".join(f"{name} {number:,}" for name, number in most if number)


def _sentence(parts: Any) -> str:
    joined = "; ".join(parts)
    return joined[:1].upper() + joined[1:]
