"""The whole encode step beside bare tokenizing by its peers, in CPU seconds of one process each, in one run.

`pytest -m bench -n 0 -s tests/bench`. The peers only make ids (nanoGPT's recipe: a memmap of them); ours makes masks,
templates, packing, the index, reads everything back through the gate, and publishes the artifact.
`$BENCH_DIALOGUES` names a folder with a `dialogues.parquet`; without it, texts are made up, of words drawn by Zipf's
law. `$BENCH_PYTHON` is the interpreter that has the peers, if not this one; `$BENCH_ROUNDS` (1): the least counts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tasks.artifacts import DIALOGUE_COLUMNS, arrow_schema, parquet_writer

ROOT = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "1"))
HEAD = """
import json, os, resource, sys, tempfile, time
from pathlib import Path
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(os.environ.get("BENCH_CPU", min(os.sched_getaffinity(0))))})
import numpy as np
import polars as pl
from tasks.text.bpe import gpt2
data = Path(sys.argv[1])
def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
def texts():
    return pl.read_parquet(data / "dialogues.parquet", columns=["text"])["text"].to_list()
def done(start):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"cpu": cpu() - start, "peak_mb": peak / 1024}))
"""
OURS = """
from tasks.artifacts import Dialogues
from tasks.encode import EncodeParams, EncodeRuntime, encode
from tasks.store.manifest import Manifest
given = Dialogues(data, Manifest(key="0" * 64, kind="dialogues", recipe={}, files={}, digest="0" * 64))
def run(**settings):
    encode(given, EncodeParams(**settings), EncodeRuntime(workers=1))
with tempfile.TemporaryDirectory() as out:
    os.environ["TREELINE_ARTIFACTS"] = out
"""
COLD = OURS + "    start = cpu(); run(); done(start)"
LOOP = """
engine = gpt2()._engine; some = texts(); start = cpu()
made = [np.array(engine.encode_ordinary(text), np.uint16) for text in some]; done(start)
"""
BATCH = """
engine = gpt2()._engine; some = texts(); start = cpu()
made = [np.array(ids, np.uint16) for ids in engine.encode_ordinary_batch(some)]; done(start)
"""
TOKENIZERS = """
engine = gpt2().exported(); some = texts(); start = cpu()
made = [
    np.array(one.ids, np.uint16) for first in range(0, len(some), 1000)
    for one in engine.encode_batch(some[first : first + 1000], add_special_tokens=False)
]; done(start)
"""
NANOGPT = """
import datasets
datasets.disable_progress_bars()
engine = gpt2()._engine; some = texts(); start = cpu()
def process(row):
    ids = engine.encode_ordinary(row["text"]); ids.append(50256)
    return {"ids": ids, "len": len(ids)}
with tempfile.TemporaryDirectory() as folder:
    rows = datasets.Dataset.from_dict({"text": some})
    made = rows.map(process, remove_columns=["text"], cache_file_name=folder + "/c.arrow", new_fingerprint="bench")
    size = int(np.sum(made["len"], dtype=np.uint64)); place = 0
    whole = np.memmap(folder + "/train.bin", dtype=np.uint16, mode="w+", shape=(size,))
    for shard in range(1024):
        part = made.shard(num_shards=1024, index=shard, contiguous=True).with_format("numpy")
        ids = np.concatenate(part["ids"]) if len(part) else np.zeros(0, np.uint16)
        whole[place : place + len(ids)] = ids; place += len(ids)
    whole.flush()
done(start)
"""
PEERS: dict[str, tuple[str, str, float]] = {  # code, package, and how many times as fast we are to be
    "tiktoken's own loop": (LOOP, "tiktoken", 0.95),
    "encode_ordinary_batch": (BATCH, "tiktoken", 1.8),
    "tokenizers": (TOKENIZERS, "tokenizers", 3),
    "nanoGPT's prepare": (NANOGPT, "datasets", 6.5),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if named := os.environ.get("BENCH_DIALOGUES"):
        return Path(named)
    folder = tmp_path_factory.mktemp("dialogues")
    draw = np.random.default_rng(0)
    words = ["".join(map(chr, draw.integers(97, 123, 1 + number % 9))) for number in range(30_000)]
    rows = []
    for tree in range(8_000):
        for depth in range(4):
            chosen = np.minimum(draw.zipf(1.3, int(draw.lognormal(4, 0.8)) + 3), len(words)) - 1
            rows.append(
                {
                    "message_tree_id": f"t{tree}", "message_id": f"t{tree}.{depth}", "depth": depth, "sibling": 0,
                    "parent_id": f"t{tree}.{depth - 1}" if depth else None, "text": " ".join(words[k] for k in chosen),
                    "role": ("prompter", "assistant")[depth % 2], "split": "val" if tree % 20 == 0 else "train",
                }
            )  # fmt: skip
    with parquet_writer(folder / "dialogues.parquet", DIALOGUE_COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=arrow_schema(DIALOGUE_COLUMNS)))
    return folder


def measured(code: str, data: Path, python: str = sys.executable) -> dict[str, float]:
    """Run code in a process of its own, pinned to a core: CPU seconds and peak memory in MB."""
    one = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", HEAD + code, str(data)], cwd=ROOT, env={**os.environ, **one, "PYTHONPATH": str(ROOT)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def has(python: str, package: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


@pytest.mark.bench
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("peer", PEERS)
def test_the_encode_step_beside_bare_tokenizing(peer: str, data: Path) -> None:
    code, package, _ = PEERS[peer]
    python = os.environ.get("BENCH_PYTHON", sys.executable)
    if not has(python, package):
        pytest.skip(f"needs the package {package}")
    pairs = [(measured(COLD, data), measured(code, data, python)) for _ in range(ROUNDS)]
    ours, theirs = (min(pair[side]["cpu"] for pair in pairs) for side in (0, 1))
    peak = max(pair[0]["peak_mb"] for pair in pairs)
    print(f"\nencode {ours:.2f} CPU s (peak {peak:.0f} MB), {peer} {theirs:.2f}: {theirs / ours:.2f} times as fast")
    assert theirs / ours >= PEERS[peer][2]
