"""The plan of a run beside the run: the seconds that were said before against those it then took.

    pytest -m bench -n 0 -s tests/bench/test_plan.py

Each shape in a process of its own, on one thread. On a machine that does other work meanwhile, both the measured rate
of products, on which the plan stands, and the run move; only a calm one tells.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# layers, heads, width, block, sequences of a step, steps, activation_checkpointing
SHAPES = {
    "narrow": (3, 4, 128, 128, 16, 40, 0),
    "small": (6, 6, 384, 256, 8, 12, 0),
    "small, computed again": (6, 6, 384, 256, 8, 10, 1),
    "124M": (12, 12, 768, 512, 2, 4, 0),
}
RUN = """
import json, logging, re, sys, tempfile, time
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from tasks.gpt.batches import Split
from tasks.gpt.device import hold_memory, spare_memory
from tasks.gpt.loop import train_model
from tasks.gpt.run_plan import planned
from tasks.gpt.training_run import Machine, Settings
from tasks.gpt.weights import build_start, scratch_spec, set_dropout
layers, heads, width, block, size, steps, activation_checkpointing = map(int, sys.argv[1:])
model = build_start(scratch_spec(layers=layers, heads=heads, width=width, positions=block, vocab_size=50304, seed=0))
set_dropout(model, 0.0)
spare_memory() if activation_checkpointing else hold_memory()
data = (np.random.default_rng(0).zipf(1.2, (size * steps, block)) % 50304).astype(np.uint16)
every = np.ones_like(data)
split = Split(data, every, np.cumsum(every, axis=1) - 1, np.full_like(data, block))
none = Split(*(array[:0] for array in (data, every, every, every)))
settings = Settings(
    seed=0, epochs=1, sequences=size, lr=3e-4, min_lr_ratio=1.0, warmup_ratio=0.0, weight_decay=0.1,
    max_grad_norm=1.0, evals_per_epoch=1, patience=None, precision="float32",
)
said = []
class Ear(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
log = logging.getLogger("treeline.train")
log.addHandler(Ear())
log.setLevel(logging.INFO)
device = torch.device("cpu")
at_once, again = planned(model, (split, none), settings, device, None, time.monotonic, bool(activation_checkpointing))
count, unit = re.search(r"about [0-9.]+ GB.*?, ([0-9]+) (s|minutes)", said[0]).groups()
with tempfile.TemporaryDirectory() as folder:
    how = {"micro_batch": at_once, "activation_checkpointing": again, "checkpoint_seconds": 1e9}
    machine = Machine(device, time.monotonic, **how)
    began = time.monotonic()
    train_model(model, split, none, settings=settings, machine=machine, workplace=Path(folder))
    took = time.monotonic() - began
print(json.dumps({"said": int(count) * (60 if unit == "minutes" else 1), "took": took}))
"""


@pytest.mark.bench
@pytest.mark.timeout(1_200)
def test_a_run_takes_the_time_that_its_plan_said() -> None:
    print("\n| shape | said, s | took, s | said / took |")
    for name, shape in SHAPES.items():
        asked = [sys.executable, "-c", RUN, *map(str, shape)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {found['said']} | {found['took']:.1f} | {found['said'] / found['took']:.2f} |")
