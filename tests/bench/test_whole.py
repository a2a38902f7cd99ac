"""The data half as a whole: cold, and after each kind of change, in CPU seconds.

    python -m pytest -m bench -n 0 -s tests/bench/test_whole.py

`$TREELINE_BENCH_TREES` names another file of nested trees than the shared one. Every run is a process of its own,
pinned to a core; all of them share one store, but for the cold runs, which prove that what was there changes no byte.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3_600)]

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
TREES = SHARED / "data" / "oasst_bench.realtext_on_real_shapes.trees.jsonl.gz"
RUN = """
import json, os, resource, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(os.environ.get("BENCH_CPU", min(os.sched_getaffinity(0))))})
from flows import chain, recipe
from tasks.step import session
asked = recipe.load("quickstart", ["download.source=file", *sys.argv[1:]])
with session("bench") as now:
    chain.run(asked, chain.DATA)
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({
    "cpu": sum(one.ru_utime + one.ru_stime for one in used),
    "peak_mb": used[0].ru_maxrss / 1024,
    "steps": {one.step: round(one.seconds, 2) for one in now.outcomes if not one.cached},
    "digests": {one.step: one.artifact.manifest.digest for one in now.outcomes},
}))
"""
SETTINGS = ("encode.tokenizer=gpt2", "encode.context_length=1024", "encode.layout=tree", "curate.languages=[]")


def run(store: Path, trees: Path, *settings: str) -> dict[str, Any]:
    """Run the data half in a process of its own."""
    one = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "RAYON_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    named = {"TREELINE_ARTIFACTS": str(store), "TREELINE_SOURCE_ROOTS": str(trees.parent)}
    asked = [sys.executable, "-c", RUN, f"download.path={trees}", *SETTINGS, *settings]
    done = subprocess.run(asked, cwd=ROOT, env={**os.environ, **one, **named}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Give trees without their last hundredth, all of them, and all of them in another order."""
    path = Path(os.environ.get("TREELINE_BENCH_TREES", TREES))
    if not path.exists():
        pytest.skip(f"no trees at {path}")
    folder = tmp_path_factory.mktemp("trees")
    with gzip.open(path, "rb") as file:
        lines = file.readlines()
    shuffled = random.Random(0).sample(lines, len(lines))
    made = []
    for name, some in (("less", lines[: len(lines) * 99 // 100]), ("all", lines), ("shuffled", shuffled)):
        made.append(folder / f"{name}.jsonl.gz")
        with gzip.open(made[-1], "wb", compresslevel=1) as packed:
            packed.writelines(some)
    return made[0], made[1], made[2]


def test_a_change_gives_the_bytes_of_a_cold_run(
    grown: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    less, whole, shuffled = grown
    store = tmp_path / "store"
    runs = {
        "cold": run(store, less),
        "nothing": run(store, less),
        "1 % more trees": run(store, whole),
        "... cold": run(tmp_path / "cold", whole),
        "another order": run(store, shuffled),
        "... cold ": run(tmp_path / "cold shuffled", shuffled),
        "a threshold": run(store, whole, "curate.label_limits.quality=0.5"),
    }
    assert runs["1 % more trees"]["digests"] == runs["... cold"]["digests"]
    assert runs["another order"]["digests"] == runs["... cold "]["digests"]
    with capsys.disabled():
        print()
        for name, figures in runs.items():
            share = figures["cpu"] / runs["... cold"]["cpu"]
            print(
                f"{name:16} {figures['cpu']:6.2f} cpu-s ({share:5.1%} of cold) {figures['peak_mb']:6.0f} MB, "
                f"{figures['steps']}"
            )
    assert runs["nothing"]["steps"] == {}
