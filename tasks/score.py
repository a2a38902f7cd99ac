"""Beside the chain, score: reference log-probabilities of the ranked replies, by the model that prefer starts from.

They do not change while the preferred model is trained, so they are computed once, and the start need not be in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tasks.artifacts import Counts, Model, PreferenceGroups, ReferenceLogprobs
from tasks.errors import TrainingError
from tasks.step import Params, step
from tasks.tuning import ModelRuntime, check_same_encoding, read_split, replies_of


class ScoreParams(Params):
    """Settings of the score step."""

    precision: Literal["float32", "bfloat16"] | None = None
    """Of products. None: that of prefer, which is held to what is found here."""


class ScoreRuntime(ModelRuntime):
    """How fast, and where. The outcome is the same but for rounding."""


@step("score", version=5, makes=ReferenceLogprobs)
def score(
    out: Path, preference_groups: PreferenceGroups, model: Model, params: ScoreParams, run: ScoreRuntime
) -> Counts:
    """Write `logps.bin`.

    Raises:
        ParameterError: If the model speaks another language than the preference groups.
    """
    import numpy as np

    from tasks.gpt.device import at_work, device_of
    from tasks.gpt.memory_model import AT_ONCE
    from tasks.gpt.preference import all_logps
    from tasks.gpt.run_plan import shortage_named
    from tasks.gpt.weights import load_model

    check_same_encoding(model, preference_groups)
    split, replies = read_split(preference_groups, None), replies_of(preference_groups, None)
    device = device_of(run.device)
    loaded = load_model(model.path).to(device)
    at_once = run.rows_at_once or max(1, AT_ONCE // split.sequence_length)
    with at_work(device, run.threads, loaded.config.n_embd):
        logps = None
        while logps is None:
            load = f"with {at_once} sequences of {split.sequence_length:,} tokens at once"
            try:
                with shortage_named(load, device, "Set runtime.micro_batch to auto, or to less"):
                    logps = all_logps(loaded, split, replies, at_once, device, half=params.precision == "bfloat16")
            except TrainingError:
                if run.micro_batch != "auto" or at_once == 1:
                    raise
                at_once //= 2
    logps.astype("<f4").tofile(out / "logps.bin")
    return {"replies": len(logps), "mean_logp": float(np.mean(logps)) if len(logps) else None}
