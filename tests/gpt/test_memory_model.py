"""The plan of memory, against what the system counts; a process each, since a peak never falls."""

import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tasks.gpt.memory_model import ModelShape, flops, largest_micro_batch, memory, seconds
from tests.waiting import run

ADAPTED = pytest.mark.skipif(find_spec("peft") is None, reason="peft comes with the extras `lora` and `test`")
ROOT = Path(__file__).parents[2]
GPT2 = ModelShape(12, 12, 768, 50_304, 124_475_904, 1024, dropout=False, half=False, keeps_best=True)
CODE = """
import json, resource, sys, tempfile, time
from pathlib import Path
import numpy as np
import torch
from tasks.gpt import lora
from tasks.gpt.batches import Split
from tasks.gpt.device import hold_memory, spare_memory
from tasks.gpt.loop import train_model
from tasks.gpt.memory_model import ModelShape, memory
from tasks.gpt.training_run import Machine
from tasks.gpt.weights import build_start, freeze, scratch_spec, set_dropout, trainable_parameters
from tests.gpt.test_loop import MACHINE, SETTINGS
from dataclasses import replace
torch.set_num_threads(1)
layers, heads, width, vocab, block, size = map(int, sys.argv[1:7])
dropout, again, frozen = float(sys.argv[7]), bool(int(sys.argv[8])), int(sys.argv[9])
decay, rank = float(sys.argv[10]) or None, int(sys.argv[11])
(spare_memory if again or rank else hold_memory)()
model = build_start(scratch_spec(layers=layers, heads=heads, width=width, positions=block, vocab_size=vocab, seed=0))
set_dropout(model, dropout)
if rank:
    lora.attach(model, rank, 16.0, seed=0)
freeze(model, frozen)
ids = np.random.default_rng(0).integers(0, vocab, (4 * size, block))
one = np.ones_like(ids)
split = Split(ids, one, np.cumsum(one, 1) - 1, np.full_like(ids, block) - (np.arange(block) < block // 2) * block // 2)
resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
with tempfile.TemporaryDirectory() as folder:
    machine = replace(MACHINE, micro_batch=size, checkpoint_seconds=0.0, activation_checkpointing=again)
    settings = replace(SETTINGS, epochs=1, sequences=2 * size, ema_decay=decay, evals_per_epoch=2)
    train_model(model, split, split, settings=settings, machine=machine, workplace=Path(folder))
status = Path("/proc/self/status").read_text().splitlines()  # `ru_maxrss` would begin with the peak of the parent
(peak,) = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
count = sum(weight.numel() for weight in trainable_parameters(model).values())
table = not frozen and not rank
how = dict(ema=decay is not None, activation_checkpointing=again, holds=not rank)
shape = ModelShape(layers, heads, width, vocab, count, block, dropout > 0, False, True, frozen, table, **how)
print(json.dumps([resident + memory(shape, size), peak]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "shape",
    [
        (3, 4, 128, 1024, 128, 8, 0.0, 0, 0),
        (6, 6, 384, 50_304, 128, 2, 0.0, 0, 0),
        (6, 6, 384, 8_192, 256, 16, 0.0, 0, 0),
        (4, 4, 256, 1024, 1024, 8, 0.0, 0, 0),
        (4, 4, 256, 1024, 4096, 2, 0.0, 0, 0),
        (4, 4, 256, 1024, 512, 4, 0.1, 0, 0),
        (8, 4, 256, 1024, 512, 8, 0.0, 1, 0),
        (8, 4, 256, 1024, 512, 4, 0.1, 1, 0),
        (6, 6, 384, 8_192, 128, 8, 0.0, 0, 4),
        (6, 6, 384, 8_192, 128, 2, 0.0, 0, 0, 0.999),
        pytest.param((6, 6, 384, 8_192, 128, 8, 0.0, 0, 0, 0.0, 16), marks=ADAPTED),
        pytest.param((6, 6, 384, 8_192, 128, 8, 0.1, 0, 0, 0.0, 16), marks=ADAPTED),
    ],
    ids=[
        "narrow",
        "small",
        "many",
        "long",
        "packed",
        "dropout",
        "again",
        "again dropout",
        "frozen",
        "ema",
        "adapters",
        "adapters dropout",
    ],
)
def test_the_plan_is_wrong_by_a_fifth_at_most(shape: tuple[float, ...]) -> None:
    asked = map(str, (*shape, *(0.0, 0)[len(shape) - 9 :]))  # the decay and the adapters' rank may be left out
    done = run([sys.executable, "-c", CODE, *asked], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    planned, peak = json.loads(done.stdout)
    assert planned == pytest.approx(peak, rel=0.2)


def test_the_largest_micro_batch_is_the_largest_that_fits() -> None:
    free = 6 << 30
    size = largest_micro_batch(GPT2, free, 64)
    assert 1 < size < 8
    assert memory(GPT2, size) <= 0.9 * free < memory(GPT2, size + 1)


def test_it_is_never_none_nor_more_than_a_step_or_8192_tokens() -> None:
    assert largest_micro_batch(GPT2, 1, 64) == 1
    assert largest_micro_batch(GPT2, 1 << 50, 3) == 3
    assert largest_micro_batch(GPT2, 1 << 50, 64) == 8


def test_parts_of_a_model_take_less_than_the_whole_and_more_than_their_share() -> None:
    large = replace(GPT2, brought=GPT2.parameters, keeps_best=False)
    whole, half, eighth = (memory(replace(large, parts=parts), 1) for parts in (1, 2, 8))
    held = 16 * GPT2.parameters
    assert whole - held / 2 < half < whole
    assert half - held * 3 / 8 == pytest.approx(eighth)


def test_work_grows_with_what_is_done() -> None:
    assert flops(GPT2, 1.0) == pytest.approx(6 * 124e6, rel=0.15)  # 6 N, attention and positions aside
    once = seconds(GPT2, 1e6, 0, 0.9, 1e11)
    assert seconds(GPT2, 2e6, 0, 0.9, 1e11) == pytest.approx(2 * once)
    assert seconds(GPT2, 1e6, 3e6, 0.9, 1e11) == pytest.approx(2 * once)
    assert flops(replace(GPT2, sequence_length=4_096), 1.0) > 1.2 * flops(GPT2, 1.0)  # a mask hides what is computed
    assert flops(replace(GPT2, sequence_length=4_096, attended_tokens=1_024), 1.0) == flops(GPT2, 1.0)
    again = replace(GPT2, activation_checkpointing=True)
    assert flops(GPT2, 1.0) < flops(again, 1.0) < 4 / 3 * flops(GPT2, 1.0)
    assert (
        memory(again, 4)
        < memory(replace(GPT2, half=True), 4)
        < memory(GPT2, 4)
        < memory(replace(GPT2, dropout=True), 4)
    )
