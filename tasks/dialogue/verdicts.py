"""Verdicts: why each message is dropped, and what the rule saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


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
