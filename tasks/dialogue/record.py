"""What the parts of curation share: names of rules and splits, the limits of the rules, and the verdicts.

Importing this module loads neither polars nor numpy, because the settings of a step are made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

if TYPE_CHECKING:
    import polars as pl

Split = Literal["train", "val", "test"]
RuleName = Literal[
    "tree_state", "language", "deleted", "synthetic", "rejected", "unreviewed", "empty", "role_break", "spam",
    "lang_mismatch", "pii", "not_appropriate", "hate_speech", "sexual_content", "quality", "toxicity", "paste", "top_k",
    "text_language", "personal", "contaminated",
]  # fmt: skip
RULES: tuple[RuleName, ...] = get_args(RuleName)  # in the order in which they judge: the first that fires is the reason
MESSAGE_RULES, TEXT_RULES = RULES[:-3], RULES[-3:]  # these read what the others left, text by text
PROTECTION: tuple[Split, ...] = ("test", "val", "train")  # a copy in two of them is kept in the one that stands first


Share = Annotated[float, Field(ge=0, le=1)]


class Limits(BaseModel):
    """Which rules filter the messages, and what they compare with. What is unknown (null) never drops a message."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rules: tuple[RuleName, ...] = RULES
    """Rules that judge each message. Their order is fixed; the first that fires names the reason. Empty: no filter."""
    tree_states: tuple[str, ...] = ("ready_for_export",)
    """States of the trees that are kept. Empty: every state."""
    languages: tuple[str, ...] = ("en",)
    """Languages that are kept, as primary subtags: `en` keeps `en-US`, too. Empty: every language."""
    language_of: Literal["message", "prompt"] = "message"
    """Whose language counts: each message's own, or that of the first prompt for the whole tree."""
    require_review: bool = False
    """Whether a first prompt has to be accepted by reviewers; undecided, its tree is dropped, too."""
    spam_above: Share = 0.5
    """Share of votes for `spam`, 0 to 1, above which a message is dropped."""
    lang_mismatch_above: Share = 0.5
    """Share of votes for `lang_mismatch`, 0 to 1, above which a message is dropped."""
    pii_from: Share = 0.5
    """Share of votes for `pii`, 0 to 1, from which on a message is dropped."""
    not_appropriate_from: Share = 0.5
    """Share of votes for `not_appropriate`, 0 to 1, from which on a message is dropped."""
    hate_speech_from: Share = 0.5
    """Share of votes for `hate_speech`, 0 to 1, from which on a message is dropped."""
    sexual_content_from: Share = 0.5
    """Share of votes for `sexual_content`, 0 to 1, from which on a message is dropped."""
    quality_below: Share = 0.4
    """Mean vote for `quality`, 0 to 1, below which a message is dropped."""
    toxicity_above: Share = 0.9
    """Detoxify's toxicity, 0 to 1, above which a message is dropped."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Best-ranked replies to a prompt that are kept; an unranked one only without siblings. None: all."""
    text_language_from: Share = 0.95
    """Share of a text, 0 to 1, from which on it has to be in another language than its tag says, to be dropped."""
    text_language_chars: int = Field(default=100, ge=1, le=2_000)
    """Characters of a text without its code from which on its language is looked at, of which only the first 2,000 are:
    shorter ones say too little."""
    pii: Literal["off", "mask", "drop"] = "mask"
    """What becomes of e-mail addresses, phone, IP and card numbers: nothing, a mask such as [e-mail], or the message
    that holds them is dropped by the rule `personal`."""
    overlap_words: int = Field(default=13, ge=3, le=64)
    """Words in a row that a message may not share with an evaluation's prompt; one with fewer is compared whole."""
    drop_facts: bool = False
    """Whether replies that tell a fact which the evaluation asks for are dropped; they are counted in any case."""

    @field_validator("rules")
    @classmethod
    def _in_order(cls, chosen: tuple[RuleName, ...]) -> tuple[RuleName, ...]:
        return tuple(name for name in RULES if name in chosen)  # one set of rules, one key

    @field_validator("languages")
    @classmethod
    def _primary(cls, chosen: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted({tag.strip().lower().replace("_", "-").split("-")[0] for tag in chosen}))


class CopyLimits(BaseModel):
    """Which copies are dropped, which messages are compared by their own text, and what counts as a near copy."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dedupe: bool = True
    """Whether exact copies are dropped from the train split: the same said after the same."""
    near_dedupe: bool = True
    """Whether near copies of a long reply are dropped from the train split, but for the best: by rank, by quality."""
    repeat_prompts: bool = True
    """Whether first prompts may repeat in the train split, nearly or exactly, where their replies differ."""
    separate_splits: bool = True
    """Whether what two splits hold, nearly or exactly, goes from the less protected one: train, then val."""
    copy_chars: int = Field(default=200, ge=1)
    """Characters, white space folded, from which on a reply or a later prompt is compared with others by its text; one
    of Chinese or Japanese counts as three."""
    near_ngram: int = Field(default=3, ge=1, le=16)
    """Words of an n-gram, by whose sets texts are compared; 5 is usual for web pages, messages are shorter."""
    near_permutations: int = Field(default=128, ge=8, le=1024)
    """MinHash permutations at most, to propose near copies; more allow longer bands, which propose fewer others."""
    near_threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard index of two texts' sets of n-grams, over 0 and up to 1, from which on they are near copies."""


def near_evidence(twin: str, similarity: float) -> str:
    """Return the evidence of a near copy or a leak: the id of the twin that stays, and the Jaccard index."""
    return f"{twin} {similarity:.3f}"


def named_in(reason: str, evidence: str) -> str | None:
    """Return the id of the message that a verdict is about: the twin that stays, or the ancestor that went; or None."""
    if reason in {"near_duplicate", "leak"}:
        return evidence.rpartition(" ")[0]
    return evidence if reason in {"duplicate", "parent"} else None


@dataclass(frozen=True)
class Verdicts:
    """Why each message is dropped, by its row; None where it is kept. A message gets one reason, the first.

    Attributes:
        reasons: (N,) name of the rule.
        evidence: (N,) what the rule saw.
        twins: Row -> the row that it was dropped for, where it was dropped as a copy.
    """

    reasons: list[str | None]
    evidence: list[str | None]
    twins: dict[int, int] = field(default_factory=dict)

    def kept(self) -> list[bool]:
        """Return whether each message is kept so far: (N,)."""
        return [reason is None for reason in self.reasons]

    def drop(self, reason: str, found: Mapping[int, str]) -> None:
        """Drop the rows of `found`, row -> evidence, unless an earlier rule did."""
        for row, seen in found.items():
            if self.reasons[row] is None:
                self.reasons[row], self.evidence[row] = reason, seen

    def drop_copies(self, reason: str, found: Mapping[int, tuple[int, float]], ids: pl.Series) -> None:
        """Drop the rows of `found`, row -> its twin and their similarity, unless an earlier rule did; `ids` of all."""
        self.twins.update((row, twin) for row, (twin, _) in found.items() if self.reasons[row] is None)
        exact = reason == "duplicate"
        self.drop(reason, {
            row: ids[twin] if exact else near_evidence(ids[twin], similarity)
            for row, (twin, similarity) in found.items()
        })  # fmt: skip

    def outlived(self) -> dict[int, int]:
        """Return what was dropped for a twin that went later: row -> the last twin of the chain."""
        found = {}
        for row, twin in self.twins.items():
            last = twin
            while last in self.twins:
                last = self.twins[last]
            if last != twin or self.reasons[last] is not None:
                found[row] = last
        return found
