"""The filter rules: each a small function from the settings to what it drops and what it saw.

A rule judges one message by its own row and by its thread (`in_thread`); those that read texts, by what was detected
in them. `RULES` in settings.py lists all; those on labels are there alone. What is unknown never drops a message: older
exports have no labels, and a missing vote is no evidence. Descendants of a dropped message are not the rules' business.

Source of the limits: the reference loader of Open-Assistant (states, review, deleted, synthetic), and the recipe that
this project starts from.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from tasks.dialogue.settings import RULES, FilterSettings, LabelLimit
from tasks.dialogue.tree import roots
from tasks.dialogue.verdicts import Verdicts

# A character that a reader sees. Default-ignorable ones (zero-width space, joiners, BOM, Hangul filler) are not.
_VISIBLE = r"[^\s\p{Default_Ignorable_Code_Point}\p{Cc}]"
# What chat services say of themselves: as a language model, I ...; I am ChatGPT; I was made by OpenAI.
_AS = r"as an? (?:(?:ai|artificial intelligence|large|trained) )*language model(?: ai)?"
_MAKES = r"(?:made|created|developed|trained|built|designed|programmed)"
_CLAUSE = r"[^.!?\n]{0,80}"  # the rest of it
_SELF = (
    rf"(?im)(\b{_AS}(?: {_MAKES}\b{_CLAUSE})?,? (?:I|my)\b|\bI(?: a|['’])m (?:called |named )?chatgpt\b"
    rf"|\bI(?: was|['’]ve been| have been| am|['’]m)\b{_CLAUSE}\b{_MAKES} by openai\b|\bopenai (?:has )?{_MAKES} me\b"
    rf"|\bmy (?:creator|developer|maker)s?\b{_CLAUSE}\bopenai\b|\bmy name is chatgpt\b|^[ \t]*chatgpt:)"
)
# Where a clause begins so, it is of whoever speaks; after other words (`used as a language model`) of another.
_OPENS = rf"(?im)(?:^|[^\w\s]\s*|\b(?:but|and|because|since|that|so|sorry|however) )(?:just )?({_AS}(?:,|[.!]?$))"
_COMPARE: dict[str, Callable[[pl.Expr, pl.Expr], pl.Expr]] = {">": operator.gt, ">=": operator.ge, "<": operator.lt}


@dataclass(frozen=True)
class Rule:
    """One filter rule.

    Attributes:
        name: The reason that a dropped message gets.
        drops: bool; null counts as no.
        evidence: string, what the rule saw; never null where it drops.
    """

    name: str
    drops: pl.Expr
    evidence: pl.Expr


_DROPS: dict[str, Callable[[FilterSettings], Rule]] = {}


def _drops(function: Callable[[FilterSettings], Rule]) -> Callable[[FilterSettings], Rule]:
    """Register what the rule of the function's name drops; RULES in settings.py says when it judges."""
    _DROPS[function.__name__] = function
    return function


@_drops
def tree_state(settings: FilterSettings) -> Rule:
    """Drop messages of trees that were not finished."""
    state, wanted = pl.col("tree_state"), settings.tree_states
    seen = pl.format("tree_state {} is not {}", state, pl.lit(" or ".join(wanted)))
    return Rule("tree_state", pl.lit(bool(wanted)) & ~state.is_in(list(wanted)), seen)


@_drops
def language(settings: FilterSettings) -> Rule:
    """Drop messages in other languages; a message's own language can differ from its first prompt's."""
    lang, wanted = pl.col("lang" if settings.language_of == "message" else "prompt_lang"), settings.languages
    primary = lang.str.to_lowercase().str.extract(r"^\s*([^\s_-]*)")
    seen = pl.format("lang {} is not {}", lang, pl.lit(" or ".join(wanted)))
    return Rule("language", pl.lit(bool(wanted)) & ~primary.is_in(list(wanted)), seen)


@_drops
def deleted(_: FilterSettings) -> Rule:
    """Drop what was deleted; ready trees still hold some."""
    return Rule("deleted", pl.col("deleted"), pl.lit("deleted is true"))


@_drops
def synthetic(_: FilterSettings) -> Rule:
    """Drop what a model wrote."""
    return Rule("synthetic", pl.col("synthetic"), pl.lit("synthetic is true"))


@_drops
def rejected(_: FilterSettings) -> Rule:
    """Drop what reviewers rejected; undecided (null) stays."""
    return Rule("rejected", ~pl.col("review_result"), pl.lit("review_result is false"))


@_drops
def unreviewed(settings: FilterSettings) -> Rule:
    """Drop first prompts that reviewers did not accept, undecided ones too, where that is asked for."""
    seen = pl.format(
        "review_result of the first prompt is {}", pl.col("review_result").cast(pl.String).fill_null("null")
    )
    lacks = pl.col("parent_role").is_null() & ~pl.col("review_result").fill_null(value=False)
    return Rule("unreviewed", pl.lit(settings.require_review) & lacks, seen)


@_drops
def empty(_: FilterSettings) -> Rule:
    """Drop texts without a visible character."""
    text = pl.col("text")
    seen = pl.format("no visible character among {}", text.str.len_chars())
    return Rule("empty", ~text.str.contains(_VISIBLE), seen)


@_drops
def role_break(_: FilterSettings) -> Rule:
    """Drop a message that has its parent's role, and a root that is no prompt: speakers take turns."""
    role, above = pl.col("role"), pl.col("parent_role")
    breaks = pl.when(above.is_null()).then(role != "prompter").otherwise(role == above)
    return Rule("role_break", breaks, pl.format("{} after {}", role, above.fill_null("nothing")))


@_drops
def paste(_: FilterSettings) -> Rule:
    """Drop replies pasted from another chat service: where a model speaks of itself, whoever asked.

    What only names a service or its maker stays: it may be asked about, or be right to tell. Prompts are never pastes.
    """
    said = pl.coalesce(pl.col("text").str.extract(pattern, 1) for pattern in (_SELF, _OPENS))
    return Rule("paste", (pl.col("role") == "assistant") & said.is_not_null(), pl.format('says "{}"', said))


@_drops
def top_k(settings: FilterSettings) -> Rule:
    """Drop replies but for the best ranked; an unranked one stays only where it has no siblings."""
    rank, most = pl.col("rank"), settings.top_k
    beyond = pl.when(rank.is_null()).then(pl.col("siblings") > 1).otherwise(rank >= (most or 0))
    seen = pl.format("rank {} is not among the best {}", rank.cast(pl.String).fill_null("null"), pl.lit(most))
    return Rule("top_k", pl.lit(most is not None) & (pl.col("role") == "assistant") & beyond, seen)


@_drops
def text_language(settings: FilterSettings) -> Rule:
    """Drop texts that are clearly in another language than their tag says."""
    found, share = pl.col("detected"), pl.col("share")
    seen = pl.format("{} of the text is {}, tagged {}", share.round(2), found, pl.col("tagged"))
    clear = share >= pl.lit(settings.min_language_confidence, dtype=pl.Float32)
    return Rule("text_language", clear & (found != pl.col("tagged")), seen)


@_drops
def personal(settings: FilterSettings) -> Rule:
    """Drop texts with personal data, where they are not to be masked."""
    return Rule("personal", pl.lit(settings.pii == "drop") & pl.col("personal").is_not_null(), pl.col("personal"))


@_drops
def contaminated(_: FilterSettings) -> Rule:
    """Drop what an evaluation asks."""
    return Rule("contaminated", pl.col("overlap").is_not_null(), pl.col("overlap"))


def rules_of(settings: FilterSettings, *, reading_text: bool = False) -> list[Rule]:
    """Return the rules that the settings ask for, in their order: those that read texts, or all others."""
    chosen = [(name, RULES[name]) for name in settings.rules if RULES[name].reads_text == reading_text]
    return [
        _compared(name, spec.label, settings.label_limits[name]) if spec.label else _DROPS[name](settings)
        for name, spec in chosen
    ]


def columns_of(rules: Sequence[Rule]) -> set[str]:
    """Return the columns that rules and `in_thread` read."""
    names = (name for rule in rules for part in (rule.drops, rule.evidence) for name in part.meta.root_names())
    return {"role", "lang", *names}


def in_thread(messages: pl.DataFrame, parents: Sequence[int]) -> pl.DataFrame:
    """Add what the rules ask about a message's thread.

    Args:
        messages: N rows with text, role and lang.
        parents: (N,) row of each parent, -1 at a root.

    Returns:
        The messages with `parent_role` (null at a root), `prompt_lang`: the language of the first prompt, and
        `siblings`: how many answer the same one, itself counted.
    """
    roles, langs = messages["role"].to_list(), messages["lang"].to_list()
    replies = Counter(parents)
    return messages.with_columns(
        pl.Series("parent_role", [roles[parent] if parent >= 0 else None for parent in parents], dtype=pl.String),
        pl.Series("prompt_lang", [langs[root] for root in roots(parents)], dtype=pl.String),
        pl.Series("siblings", [replies[parent] for parent in parents], dtype=pl.Int64),
    )


def judge(messages: pl.DataFrame, rules: Sequence[Rule]) -> Verdicts:
    """Judge each message on its own; the first rule that fires names the reason.

    Args:
        messages: N rows as `in_thread` returns them, with the columns of these rules (`columns_of`).
        rules: The rules, in their order.
    """
    nothing = pl.lit(None, dtype=pl.String)
    reasons = pl.coalesce(*(pl.when(rule.drops).then(pl.lit(rule.name)) for rule in rules), nothing)
    evidence = pl.coalesce(*(pl.when(rule.drops).then(rule.evidence) for rule in rules), nothing)
    verdicts = messages.lazy().select("text", reason=reasons, evidence=evidence).collect()
    return Verdicts(verdicts["reason"].to_list(), verdicts["evidence"].to_list())


def _compared(name: str, label: LabelLimit, limit: float) -> Rule:
    """Return a rule that compares a column of float32 with a limit."""
    value = pl.col(label.column).fill_nan(None)  # unknown; polars would have it larger than any number
    bound = pl.lit(limit, dtype=pl.Float32)  # in the column's own precision: a vote of 0.4 is not below 0.4
    evidence = pl.format(f"{label.column} {{}} {label.sign} {limit}", value)
    return Rule(name, _COMPARE[label.sign](value, bound), evidence)
