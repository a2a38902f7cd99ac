"""Settings of curation: the filter rules, and which duplicates are dropped.

Importing this module loads neither polars nor numpy, because the settings of a step are made of it. What a rule drops
is decided by the function of its name in `rules.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator

Split = Literal["train", "val", "test"]
PROTECTION: tuple[Split, ...] = ("test", "val", "train")  # a copy in two of them is kept in the one that stands first
SHINGLE_WORDS = 3  # of an n-gram, by whose sets texts are compared; 5 is usual for web pages, messages are shorter
MINHASH_PERMUTATIONS = 128  # at most; more propose fewer wrong pairs, which are verified anyway, and cost more time
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class LabelLimit:
    """A rule that compares a vote of the annotators, or a classifier's score, with a limit.

    Attributes:
        column: Of messages, float32, 0 to 1.
        sign: A message whose value is `>`, `>=` or `<` than the limit is dropped.
        default: The limit, where `label_limits` names none.
    """

    column: str
    sign: Literal[">", ">=", "<"]
    default: float


@dataclass(frozen=True)
class FilterRule:
    """What the settings need to know of a rule.

    Attributes:
        settings: Names of settings that do nothing without the rule; the first is the one to loosen.
        label: For a rule that is nothing but a comparison with a limit.
        reads_text: Whether it needs what was detected in the text; such rules judge after all others, what these left.
    """

    settings: tuple[str, ...] = ()
    label: LabelLimit | None = None
    reads_text: bool = False


# The rules, in the order in which they judge: the first that fires is the reason.
RULES: Mapping[str, FilterRule] = {
    "tree_state": FilterRule(("tree_states",)),
    "language": FilterRule(("languages", "language_of")),
    "deleted": FilterRule(),
    "synthetic": FilterRule(),
    "rejected": FilterRule(),
    "unreviewed": FilterRule(("require_review",)),
    "empty": FilterRule(),
    "role_break": FilterRule(),
    "spam": FilterRule(label=LabelLimit("label_spam", ">", 0.5)),
    "lang_mismatch": FilterRule(label=LabelLimit("label_lang_mismatch", ">", 0.5)),
    "pii": FilterRule(label=LabelLimit("label_pii", ">=", 0.5)),
    "not_appropriate": FilterRule(label=LabelLimit("label_not_appropriate", ">=", 0.5)),
    "hate_speech": FilterRule(label=LabelLimit("label_hate_speech", ">=", 0.5)),
    "sexual_content": FilterRule(label=LabelLimit("label_sexual_content", ">=", 0.5)),
    "quality": FilterRule(label=LabelLimit("label_quality", "<", 0.4)),
    "toxicity": FilterRule(label=LabelLimit("detoxify_toxicity", ">", 0.9)),
    "paste": FilterRule(),
    "top_k": FilterRule(("top_k",)),
    "text_language": FilterRule(("min_language_confidence",), reads_text=True),
    "personal": FilterRule(reads_text=True),
    "contaminated": FilterRule(("contamination_ngram", "prompt_files"), reads_text=True),
}
LABEL_LIMITS = {name: rule.label.default for name, rule in RULES.items() if rule.label}
# The choices that a form offers, and that the server checks, for what is validated by RULES here.
RuleName = Annotated[str, WithJsonSchema({"type": "string", "enum": [*RULES]})]
LabelLimits = Annotated[
    dict[str, Share],
    WithJsonSchema({
        "type": "object",
        "properties": {
            name: {"type": "number", "minimum": 0, "maximum": 1, "default": limit, "title": name}
            for name, limit in LABEL_LIMITS.items()
        },
        "additionalProperties": False,
    }),
]  # fmt: skip
# What else drops messages, beside the rules, and what decides on it. Personal data may be masked without the rule.
_DECIDED_BY = {
    "personal": "pii", "fact": "drop_facts", "thread": "whole_threads", "leak": "drop_cross_split_duplicates",
    "duplicate": "dedupe", "near_duplicate": "near_dedupe", "no_reply": "require_reply",
}  # fmt: skip


def deciding_setting(reason: str) -> str:
    """Return the setting of curate that decides on a reason for dropping messages, as `--set` takes it."""
    rule = RULES.get(reason)
    if rule and rule.label:
        return f"label_limits.{reason}"
    return _DECIDED_BY.get(reason) or (rule.settings[0] if rule and rule.settings else "rules")


class FilterSettings(BaseModel):
    """Which rules filter the messages, and what they compare with. What is unknown (null) never drops a message."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rules: tuple[RuleName, ...] = tuple(RULES)
    """Rules that judge each message. Their order is fixed; the first that fires names the reason. Empty: no filter."""
    label_limits: LabelLimits = LABEL_LIMITS
    """Limits of the rules on annotators' labels and on Detoxify's toxicity, 0 to 1, by rule; what is not named keeps
    its default. spam, lang_mismatch and toxicity drop what is above the limit, quality what is below, the others what
    reaches it."""
    tree_states: tuple[str, ...] = ("ready_for_export",)
    """States of the trees that are kept. Empty: every state."""
    languages: tuple[str, ...] = ("en",)
    """Languages that are kept, as primary subtags: `en` keeps `en-US`, too. Empty: every language."""
    language_of: Literal["message", "prompt"] = "message"
    """Whose language counts: each message's own, or that of the first prompt for the whole tree."""
    require_review: bool = False
    """Whether a first prompt has to be accepted by reviewers; undecided, its tree is dropped, too."""
    top_k: Annotated[int, Field(ge=1, le=1_000)] | None = None
    """Best-ranked replies to a prompt that are kept; an unranked one only without siblings. None: all."""
    min_language_confidence: Share = 0.95
    """Share of a text, 0 to 1, from which on it has to be in another language than its tag says, to be dropped."""
    pii: Literal["off", "mask", "drop"] = "mask"
    """What becomes of e-mail addresses, phone, IP and card numbers: nothing, a mask such as [e-mail], or the message
    that holds them is dropped by the rule `personal`."""
    contamination_ngram: int = Field(default=13, ge=3, le=64)
    """Words in a row that a message may not share with an evaluation's prompt; one with fewer is compared whole."""
    drop_facts: bool = False
    """Whether replies that state a fact which the evaluation asks for are dropped; they are counted in any case."""

    @field_validator("rules")
    @classmethod
    def _known_in_order(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        _refuse_unknown("rule", names, RULES)
        return tuple(name for name in RULES if name in names)  # one set of rules, one key

    @field_validator("label_limits")
    @classmethod
    def _with_defaults(cls, limits: dict[str, float]) -> dict[str, float]:
        _refuse_unknown("label limit", limits, LABEL_LIMITS)
        return {**LABEL_LIMITS, **limits}

    @field_validator("languages")
    @classmethod
    def _primary(cls, chosen: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted({tag.strip().lower().replace("_", "-").split("-")[0] for tag in chosen}))


def _refuse_unknown(what: str, names: Iterable[str], known: Mapping[str, object]) -> None:
    """Raise `ValueError` for a name that is not known."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}" if near else f"known are {', '.join(known)}"
            raise ValueError(f"there is no {what} {name!r}; {hint}")


class DuplicateSettings(BaseModel):
    """Which copies are dropped, which messages are compared by their own text, and what counts as a near copy."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dedupe: bool = True
    """Whether exact copies are dropped from the train split: the same said after the same."""
    near_dedupe: bool = True
    """Whether near copies of a long reply are dropped from the train split, but for the best: by rank, by quality."""
    keep_duplicate_prompts: bool = True
    """Whether first prompts may repeat in the train split, nearly or exactly, where their replies differ."""
    drop_cross_split_duplicates: bool = True
    """Whether what two splits hold, nearly or exactly, goes from the less protected one: train, then val."""
    dedupe_min_chars: int = Field(default=200, ge=1)
    """Characters, white space folded, from which on a reply or a later prompt is compared with others by its text; one
    of Chinese or Japanese counts as three."""
    jaccard_threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard index of two texts' sets of n-grams, over 0 and up to 1, from which on they are near duplicates."""
