"""The job itself beside its peers: every reply of real trees trained once, in CPU seconds of one pinned core.

    BENCH_NANOGPT=CHECKOUT pytest -m bench -n 0 -s tests/bench/test_job.py

Ours goes through packed trees, with each message once. The peers know no trees: they get each path from a root to a
leaf, as `export nanogpt` writes them, and go through that stream once, in blocks. So all train the same replies, and
what an epoch costs is compared: the mean of `$BENCH_JOB_STEPS` steps, times the steps of an epoch. `$BENCH_ROUNDS`
rounds take turns, and each side's least counts. `$TREELINE_BENCH_TREES` names another file of nested trees.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from tasks.artifacts import Tokens
from tasks.store.manifest import read_manifest
from tests.bench.test_train import NANOGPT, OURS, ROOT, ROUNDS, TRL, measured, skip_without

STEPS = int(os.environ.get("BENCH_JOB_STEPS", "8"))
PACK = int(os.environ.get("BENCH_PACK", "2048"))
TREES = ROOT.parent / "shared" / "data" / "oasst1_en_validation.trees.jsonl.gz"
SMALL = (6, 6, 384)  # layers, heads, width
BLOCK, AT_ONCE = 1_024, 2_048  # tokens of a conversation, and of a step
PACKED = """
from tasks.artifacts import Tokens
from tasks.store.manifest import read_manifest
from tasks.tuning import read_split
folder = Path(os.environ["BENCH_TOKENS"])
split = read_split(Tokens(folder, read_manifest(folder)), "train")
size = max(1, size * block // split.sequence_length)
"""
STREAM = """
flat = np.fromfile(os.environ["BENCH_STREAM"], "<u2")
data = flat[: (len(flat) - 1) // block * block].reshape(-1, block)
data = np.concatenate([data, flat[block :: block][: len(data), None]], axis=1)
plan = Plan(len(data), size, 1, 0)
"""
THREADS = "flat = flat.astype(np.int64)\ncuts = np.flatnonzero(flat == flat[0])[1:]\n"
# code, package that it needs, bar
PEERS: dict[str, tuple[str, str, float]] = {
    "nanoGPT": ("COMPILED = False\n" + STREAM + NANOGPT, "nanoGPT", 1.5),
    "nanoGPT compiled": ("COMPILED = True\n" + STREAM + NANOGPT, "nanoGPT", 1.5),
    "TRL SFTTrainer, packing": (STREAM + THREADS + TRL, "trl", 2.8),
}


@dataclass(frozen=True)
class Job:
    """The same replies twice: as packed trees, and as a stream of paths."""

    tokens: Tokens
    stream: Path

    @property
    def packed(self) -> int:
        """Tokens of an epoch over the trees, padding included."""
        return int(self.tokens.ids("train").size)

    @property
    def streamed(self) -> int:
        """Tokens of an epoch over the paths."""
        return int(self.stream.stat().st_size // 2)

    @property
    def replies(self) -> int:
        """Tokens of the replies, each reply once."""
        return int(np.count_nonzero(self.tokens.mask("train")))


def flow(store: Path, *words: str) -> None:
    """Run the command line."""
    path = Path(os.environ.get("TREELINE_BENCH_TREES", TREES))
    env = {**os.environ, "TREELINE_ARTIFACTS": str(store), "TREELINE_SOURCE_ROOTS": str(path.parent)}
    done = subprocess.run([sys.executable, "-m", "flows", *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    path = Path(os.environ.get("TREELINE_BENCH_TREES", TREES))
    if not path.is_file():
        pytest.skip(f"no trees at {path}")
    store = tmp_path_factory.mktemp("job")
    given = {
        "download.source": "file", "download.path": path, "curate.rules": [], "encode.tokenizer": "gpt2",
        "encode.context_length": BLOCK, "encode.sequence_length": PACK, "encode.layout": "tree",
    }  # fmt: skip
    settings = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    flow(store, "run", "quickstart", "--until", "encode", *settings)
    (folder,) = (store / "tokens").iterdir()
    tokens = Tokens(folder, read_manifest(folder))
    flow(store, "export", "nanogpt", tokens.id, str(store / "stream"))
    return Job(tokens, store / "stream" / "train.bin")


@pytest.mark.bench
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("peer", PEERS)
def test_an_epoch_over_trees_beside_one_over_their_paths(peer: str, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    code, package, bar = PEERS[peer]
    skip_without(package)
    monkeypatch.setenv("BENCH_TOKENS", str(job.tokens.path))
    monkeypatch.setenv("BENCH_STREAM", str(job.stream))
    given = (*SMALL, BLOCK, AT_ONCE // BLOCK)
    sides = [
        (measured("from pathlib import Path\n" + PACKED + OURS, given, STEPS), measured(code, given, STEPS))
        for _ in range(ROUNDS)
    ]
    ours, theirs = (min(pair[side]["mean"] for pair in sides) for side in (0, 1))
    took = [mean * tokens / AT_ONCE for mean, tokens in ((ours, job.packed), (theirs, job.streamed))]
    print(
        f"\n{platform.processor() or platform.machine()}, torch {version('torch')}, 6 x 384, block {BLOCK}: "
        f"{job.replies:,} tokens of replies; ours {job.packed:,} tokens in {took[0]:.0f} CPU s, "
        f"{peer} {job.streamed:,} in {took[1]:.0f}: {took[1] / took[0]:.2f} times as fast (bar {bar}), of it "
        f"{job.streamed / job.packed:.2f} by fewer tokens"
    )
