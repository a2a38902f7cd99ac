"""A training step on one core beside its peers: same shape, same starting weights, same data, in one run.

    BENCH_NANOGPT=CHECKOUT pytest -m bench -n 0 -s tests/bench/test_train.py

Each is a process of its own, pinned to a core (`$BENCH_CORE`, else the lowest); ours and the peer's take turns
`$BENCH_ROUNDS` times, and the fastest step of all rounds counts: neighbours only ever add. Ours is `fit`, with the log
and the checks that it has; the peers' loops are as bare as they go. Tokens are counted per CPU second. MFU is by
nanoGPT's formula, against the best matrix product seen in the same process.
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROUNDS, STEPS = int(os.environ.get("BENCH_ROUNDS", "2")), int(os.environ.get("BENCH_STEPS", "5"))
# layers, heads, width, block, sequences of a step
SHAPES = {"small": (6, 6, 384, 256, 8), "124M": (12, 12, 768, 512, 2)}
HEAD = """
import contextlib, io, json, os, resource, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(os.environ.get("BENCH_CORE", min(os.sched_getaffinity(0))))})
import numpy as np
import torch
torch.set_num_threads(1)
from tasks.gpt.batches import Plan, Split
from tasks.gpt.weights import build_start, scratch_spec, set_dropout
layers, heads, width, block, size, steps = map(int, sys.argv[1:])
V = 50304
spec = scratch_spec(layers=layers, heads=heads, width=width, positions=block + 1, vocab_size=V, seed=0)
data = (np.random.default_rng(0).zipf(1.2, (size * steps, block + 1)) % V).astype(np.uint16)
plan = Plan(len(data), size, 1, 0)
def batches():
    for step in range(steps):
        rows = torch.from_numpy(data[plan.rows(step)].astype(np.int64))
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
def adamw(model):
    many = [weight for weight in model.parameters() if weight.dim() >= 2]
    few = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": many, "weight_decay": 0.1}, {"params": few, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95))
times, losses = [], []
def timed(model, loss_of):
    optimizer = adamw(model)
    for inputs, targets in batches():
        start = time.process_time()
        loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.process_time() - start)
def mm():
    one, other, best = torch.randn(1536, 1536), torch.randn(1536, 1536), 0.0
    for _ in range(12):
        start = time.process_time()
        torch.mm(one, other)
        best = max(best, 2 * 1536**3 / (time.process_time() - start))
    return best
def done():
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    weights = V * width + 12 * layers * width**2
    flops = (6 * weights + 12 * layers * width * block) * size * block
    best = min(times[1:])
    mean = sum(times[1:]) / len(times[1:])
    told = {"cpu": best, "mean": mean, "rate": size * block / best, "mfu": flops / best / mm()}
    told |= {"peak_mb": peak_mb, "losses": losses}
    print(json.dumps(told))
"""
ONE_BRANCH = """
shape = np.ones_like(data)
split = Split(data, shape, np.cumsum(shape, axis=1) - 1, np.full_like(data, block + 1))
"""
OURS = """
import tempfile
from pathlib import Path
from tasks.gpt.device import hold_memory
from tasks.gpt.loop import train_model
from tasks.gpt.training_run import Machine, Settings
from tasks.progress import listening
hold_memory()
model = build_start(spec)
set_dropout(model, 0.0)
none = Split(*(array[:0] for array in (split.ids, split.mask, split.positions, split.ends)))
settings = Settings(
    seed=0, epochs=steps / -(-len(split) // size), sequences=size, lr=3e-4, min_lr_ratio=1.0, warmup_ratio=0.0,
    weight_decay=0.1, max_grad_norm=1.0, evals_per_epoch=1, patience=None, precision="float32",
)
class Stopwatch:
    start = 0.0
    @contextlib.contextmanager
    def bar(self, label, total, unit):
        yield self
    def advance(self, amount=1, note=""):
        now = time.process_time()
        if note:
            times.append(now - self.start)
        self.start = now
with tempfile.TemporaryDirectory() as folder, listening(Stopwatch()):
    machine = Machine(torch.device("cpu"), time.monotonic, micro_batch=size, checkpoint_seconds=1e9)
    train_model(model, split, none, settings=settings, machine=machine, workplace=Path(folder))
    losses = [json.loads(line)["loss"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()][1:]
done()
"""
NANOGPT = """
sys.path.insert(0, os.environ["BENCH_NANOGPT"])
from model import GPT, GPTConfig
with contextlib.redirect_stdout(io.StringIO()):
    model = GPT(GPTConfig(block, V, layers, heads, width, dropout=0.0, bias=True))
flipped = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
given = build_start(spec).state_dict()
with torch.no_grad():
    for name, weight in model.state_dict().items():
        found = given[name][:block] if name == "transformer.wpe.weight" else given[name]
        weight.copy_(found.T if name.endswith(flipped) else found)
del given
whole = torch.compile(model) if COMPILED else model
timed(model, lambda inputs, targets: whole(inputs, targets)[1])
done()
"""
PLAIN = """
from transformers import GPT2LMHeadModel
model = build_start(spec)
model = GPT2LMHeadModel(model.config)  # its own activation, ours being one kernel
model.load_state_dict(build_start(spec).state_dict())
set_dropout(model, 0.0)
model.train()
def loss_of(inputs, targets):
    labels = torch.cat([inputs[:, :1], targets[:, :-1]], 1)  # transformers shifts by itself, and loses one target
    return model(input_ids=inputs, labels=labels, use_cache=False).loss
timed(model, loss_of)
done()
"""
TRAINER = """
import tempfile
import datasets, transformers
from transformers import GPT2LMHeadModel, TrainerCallback
transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
model = GPT2LMHeadModel(build_start(spec).config)
set_dropout(model, 0.0)
class Stopwatch(TrainerCallback):
    def on_step_begin(self, *given, **named):
        self.start = time.process_time()
    def on_step_end(self, *given, **named):
        times.append(time.process_time() - self.start)
how = dict(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size, max_steps=steps, report_to=[], save_strategy="no",
    logging_steps=1000, learning_rate=3e-4, weight_decay=0.1, use_cpu=True, disable_tqdm=True, bf16=False,
    gradient_checkpointing=False,
)
"""
TRAINER_LOOP = (
    TRAINER
    + """
rows = [{"input_ids": torch.from_numpy(row[:-1].astype(np.int64))} for row in data]
def collate(rows):
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}
args = transformers.TrainingArguments(**how)
transformers.Trainer(model=model, args=args, train_dataset=rows, data_collator=collate, callbacks=[Stopwatch()]).train()
done()
"""
)
PIECES = """
flat = np.concatenate([data.reshape(-1)] * 3).astype(np.int64)
cuts = np.cumsum(np.random.default_rng(0).lognormal(5, 0.9, 10_000).astype(int).clip(8, block))
"""
TRL = (
    TRAINER
    + """
from tokenizers import Tokenizer, models
from trl import SFTConfig, SFTTrainer
words = Tokenizer(models.WordLevel({"x": 0, "<|endoftext|>": 50256}, unk_token="x"))
end = "<|endoftext|>"
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end)
pieces = np.split(flat, cuts[cuts < len(flat)])
rows = datasets.Dataset.from_list([{"input_ids": piece.tolist()} for piece in pieces])
args = SFTConfig(**how, max_length=block, packing=True, packing_strategy="wrapped")
SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[Stopwatch()]).train()
done()
"""
)
# code, package that it needs, bar for the small shape and the 124M one, whether it trains on the very same targets
PEERS: dict[str, tuple[str, str, float, float, bool]] = {
    "nanoGPT": ("COMPILED = False\n" + NANOGPT, "nanoGPT", 1.12, 1.15, True),
    "nanoGPT compiled": ("COMPILED = True\n" + NANOGPT, "nanoGPT", 1.12, 1.15, True),
    "a plain transformers loop": (PLAIN, "transformers", 1.2, 1.2, False),
    "Trainer": (TRAINER_LOOP, "accelerate", 1.1, 1.1, False),
    "TRL SFTTrainer, packing": (PIECES + TRL, "trl", 2.0, 2.0, False),
}


def measured(code: str, given: tuple[int, ...], steps: int = STEPS) -> dict[str, Any]:
    """Run code on a shape in a process of its own, pinned to a core."""
    one = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code, *map(str, (*given, steps))],
        cwd=ROOT,
        env={**os.environ, **one},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def skip_without(package: str) -> None:
    """Skip where a peer is not there."""
    if package == "nanoGPT" and not os.environ.get("BENCH_NANOGPT"):
        pytest.skip("set BENCH_NANOGPT to a checkout of nanoGPT")
    if package != "nanoGPT" and find_spec(package) is None:
        pytest.skip(f"needs the package {package}")


@pytest.mark.bench
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", PEERS)
def test_a_training_step_beside_its_peers(peer: str, shape: str) -> None:
    code, package, *bars, same = PEERS[peer]
    skip_without(package)
    ours_code, given = ONE_BRANCH + OURS, SHAPES[shape]
    pairs = [(measured(ours_code, given), measured(code, given)) for _ in range(ROUNDS)]
    ours, theirs = (min((pair[side] for pair in pairs), key=lambda found: found["cpu"]) for side in (0, 1))
    peaks = [min(pair[side]["peak_mb"] for pair in pairs) for side in (0, 1)]
    if same:
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    bar = bars[list(SHAPES).index(shape)]
    print(
        f"\n{platform.processor() or platform.machine()}, torch {version('torch')}, {shape}: "
        f"ours {ours['rate']:.0f} tokens per CPU s (MFU {ours['mfu']:.2f}, {peaks[0]:.0f} MB), "
        f"{peer} {theirs['rate']:.0f} (MFU {theirs['mfu']:.2f}, {peaks[1]:.0f} MB): "
        f"{ours['rate'] / theirs['rate']:.2f} times as fast (bar {bar}), memory {peaks[0] / peaks[1]:.2f}"
    )
