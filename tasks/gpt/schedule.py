"""The learning rate of each step: a straight warm-up, then half a cosine."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, *, peak: float, warmup_ratio: float, min_share: float) -> float:
    """Return the learning rate of a step.

    Args:
        step: Which update, 0 <= step < total.
        total: Updates of the whole run.
        peak: Highest rate, reached at the end of the warm-up.
        warmup_ratio: Share of the updates that lead up to it, 0..1.
        min_share: Rate of the last update as a share of the peak, 0..1.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    through = (step - warmup) / max(1, total - 1 - warmup)  # 0 at the peak, 1 at the last update
    return peak * (min_share + (1 - min_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, through))))
