"""Sampling from a 124M-shaped model on one core beside its peers: same weights, same prompt, greedy.

    BENCH_NANOGPT=CHECKOUT pytest -m bench -n 0 -s tests/bench/test_generate.py

All in one process, pinned to a core (`$BENCH_CORE`, else the lowest), taking turns; the fastest of `$BENCH_ROUNDS`
counts, and the prompt's own pass with it. The tokens must be the same.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "2"))
# tokens of the prompt, new ones, bar against nanoGPT, bar against transformers
CASES = {"64 + 32": (64, 32, 5.0, 1.0), "448 + 32": (448, 32, 12.0, 1.0)}
CODE = """
import contextlib, io, json, os, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(os.environ.get("BENCH_CORE", min(os.sched_getaffinity(0))))})
import torch
torch.set_num_threads(1)
from tasks.gpt.sampling import generate
from tasks.gpt.weights import build_start, scratch_spec
prompt, new, rounds = map(int, sys.argv[1:])
V = 50257
model = build_start(scratch_spec(layers=12, heads=12, width=768, positions=1024, vocab_size=V, seed=0)).eval()
with torch.no_grad():
    for block in model.transformer.h:  # random weights of a start repeat one token for ever
        block.mlp.c_proj.weight.mul_(20)
        block.attn.c_proj.weight.mul_(20)
ids = torch.randint(0, V, (1, prompt), generator=torch.Generator().manual_seed(1))
def ours():
    return list(generate(model, [ids[0].tolist()], -1, new)[0].ids)
def theirs():
    more = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **more)[0, prompt:].tolist()
ways = {"ours": ours, "transformers": theirs}
if "BENCH_NANOGPT" in os.environ:
    sys.path.insert(0, os.environ["BENCH_NANOGPT"])
    from model import GPT, GPTConfig
    with contextlib.redirect_stdout(io.StringIO()):
        nano = GPT(GPTConfig(1024, V, 12, 12, 768, dropout=0.0, bias=True)).eval()
    with torch.no_grad():
        for name, weight in nano.state_dict().items():
            found = model.state_dict()[name]
            weight.copy_(found.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else found)
    @torch.no_grad()
    def nanogpt():
        seen = ids
        for _ in range(new):  # nanoGPT's own loop, but for drawing: the likeliest token
            seen = torch.cat([seen, nano(seen[:, -1024:])[0][:, -1].argmax(-1, keepdim=True)], 1)
        return seen[0, prompt:].tolist()
    ways["nanoGPT"] = nanogpt
best, said = dict.fromkeys(ways, float("inf")), {}
for _ in range(rounds):
    for name, way in ways.items():
        start = time.process_time()
        said[name] = way()
        best[name] = min(best[name], time.process_time() - start)
print(json.dumps({"rates": {name: new / took for name, took in best.items()}, "said": said}))
"""


@pytest.mark.bench
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("case", CASES)
def test_greedy_replies_beside_peers(case: str) -> None:
    prompt, new, *bars = CASES[case]
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(prompt), str(new), str(ROUNDS)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len({tuple(ids) for ids in found["said"].values()}) == 1
    assert len(set(found["said"]["ours"])) > 5  # or equality would say little
    rates = found["rates"]
    for peer, bar in zip(("nanoGPT", "transformers"), bars, strict=True):
        if peer in rates:
            print(
                f"\n{case} tokens: ours {rates['ours']:.1f} per CPU s, {peer} {rates[peer]:.1f}: "
                f"{rates['ours'] / rates[peer]:.1f} times as fast (bar {bar})"
            )
