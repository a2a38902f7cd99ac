"""Execution settings that affect floating-point rounding but not the result.

They are fixed when a run begins and stored in its checkpoints. A resumed run reuses those that were chosen
automatically, so that it ends bit-identical; a warning lists those that cannot be reused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from tasks.gpt.attention import way_set
from tasks.gpt.training_run import Machine


def execution_settings(model: GPT2LMHeadModel, machine: Machine, micro_batch: int) -> dict[str, Any]:
    """Return how a run is computed, as JSON values.

    Args:
        model: With its attention chosen.
        machine: Where, and how fast.
        micro_batch: Sequences at once.
    """
    device = machine.device
    return {
        "torch": torch.__version__,
        "device": _name(device),
        "threads": torch.get_num_threads(),
        "num_processes": machine.world.size,
        "sharding": "full" if machine.sharded else "none",
        "micro_batch": micro_batch,
        "activation_checkpointing": machine.activation_checkpointing,
        "compile": machine.compile,
        "attention": way_set(model),
    }


def _name(device: torch.device) -> str:
    """Return what must be the same for products to be summed in the same order."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def changed_settings(first: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return which settings differ from the original run, in words; empty if none do or none were stored."""
    changed = {name: was for name, was in first.items() if name in now and now[name] != was}
    return ", ".join(f"{name} {was} -> {now[name]}" for name, was in changed.items())
