"""Parse beside its peers: CPU seconds of one pinned core, from the packed file to a Parquet file, in one run.

    python -m pytest -m bench -n 0 -s tests/bench/test_parse.py

`$TREELINE_BENCH_TREES` names another file of nested trees than the shared one. Every sample is a process of its own;
the variants take turns, and the least of three samples counts, since noise only ever adds.

All write the same messages and fields with the same codec and level. The peers check less, keep no books and leave
labels as lists; `datasets` keeps whole trees as it reads them, so it is timed twice: until then, and with the flat rows
that the others write.
"""

from __future__ import annotations

import gc
import gzip
import json
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1_800)]

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
TREES = SHARED / "data" / "oasst_bench.realtext_on_real_shapes.trees.jsonl.gz"
ROUNDS = 3


def ours(path: Path, out: Path) -> Callable[[], int]:
    """Treeline's step, bare: checks each field, keeps the books, lists what is bad."""
    import tasks.oasst.id_index
    import tasks.oasst.rewrite
    import tasks.oasst.tables  # noqa: F401  # like the peers' libraries, loaded before the clock starts
    from tasks.artifacts import RawTrees
    from tasks.parse import ParseParams, parse
    from tasks.store.manifest import FileEntry, Manifest

    raw = RawTrees(path.parent, Manifest("0" * 64, "raw", {}, {path.name: FileEntry(0, "")}, "0" * 64))
    out.mkdir()
    return lambda: int(parse.function(out, raw, ParseParams())["messages"])


def from_pylist(path: Path, out: Path) -> Callable[[], int]:
    """`json`, a list of dicts and `Table.from_pylist`: what a first draft does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def run() -> int:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [row for line in file for row in flat(json.loads(line))]
        pq.write_table(pa.Table.from_pylist(rows), out, compression="zstd", compression_level=1)
        return len(rows)

    return run


def oasst_data(path: Path, out: Path) -> Callable[[], int]:
    """The reader of the dataset's authors (their package `oasst_data`): json, then pydantic models; rows as above."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pydantic import BaseModel

    class Vote(BaseModel):
        value: float | None
        count: int

    class Node(BaseModel):
        message_id: str
        parent_id: str | None
        user_id: str | None
        created_date: str | None
        text: str
        role: str
        lang: str | None
        review_count: int | None
        review_result: bool | None
        deleted: bool | None
        rank: int | None
        synthetic: bool | None
        model_name: str | None
        detoxify: dict[str, float] | None = None
        emojis: dict[str, int] | None
        replies: list[Node] | None
        labels: dict[str, Vote] | None

    class Tree(BaseModel):
        message_tree_id: str
        tree_state: str | None
        prompt: Node | None

    Node.model_rebuild(_types_namespace={"Node": Node, "Vote": Vote})
    Tree.model_rebuild(_types_namespace={"Node": Node})

    def run() -> int:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [row for line in file for row in flat(Tree.model_validate(json.loads(line)).model_dump())]
        pq.write_table(pa.Table.from_pylist(rows), out, compression="zstd", compression_level=1)
        return len(rows)

    return run


def datasets_nested(path: Path, out: Path) -> Callable[[], int]:
    """`datasets.load_dataset("json")`, to Parquet: the trees stay nested, which is less work than the others do."""
    return hub_datasets(path, out, flatten=False)


def datasets_flat(path: Path, out: Path) -> Callable[[], int]:
    """`datasets`: read as JSON, one row a message by `map` in batches, to Parquet."""
    return hub_datasets(path, out, flatten=True)


def hub_datasets(path: Path, out: Path, *, flatten: bool) -> Callable[[], int]:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    datasets = import_module("datasets")  # not among our dependencies

    datasets.disable_progress_bars()

    def rows_of(trees: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [
            row for values in zip(*trees.values(), strict=True) for row in flat(dict(zip(trees, values, strict=True)))
        ]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: [row.get(name) for row in rows] for name in names}

    def run() -> int:
        whole = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=f"{out}.cache")
        if flatten:
            whole = whole.map(rows_of, batched=True, batch_size=200, remove_columns=whole.column_names)
        whole.to_parquet(str(out))
        return len(whole) if flatten else 0

    return run


def flat(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a tree's messages as rows, labels and emojis as lists: their names differ from row to row."""
    stack = [tree["prompt"]]
    while stack:
        row = stack.pop()
        stack.extend(reversed(row.pop("replies", None) or []))
        labels, emojis = row["labels"] or {}, row["emojis"] or {}
        row["labels"] = [{"name": name, **vote} for name, vote in labels.items() if vote]
        row["emojis"] = [{"name": name, "count": count} for name, count in emojis.items() if count is not None]
        yield {**row, "message_tree_id": tree["message_tree_id"], "tree_state": tree["tree_state"]}


VARIANTS = {
    "ours": ours,
    "json + from_pylist": from_pylist,
    "oasst_data": oasst_data,
    "datasets, nested": datasets_nested,
    "datasets, flat": datasets_flat,
}


def sample(name: str, path: Path, out: Path) -> tuple[float, float, int]:
    """Return CPU seconds, peak RSS in MB, and rows, of one run in this process."""
    os.sched_setaffinity(0, {0})
    run = VARIANTS[name](path, out)
    import pyarrow as pa

    pa.array(["x"])  # imports pandas where it is installed: up to a second that is nobody's work
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF)
    rows = run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, after.ru_maxrss / 1024, rows


def in_a_process(name: str, path: Path, out: Path) -> tuple[float, float, int]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(sample, (name, path, out))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to a core")
def test_parse_beside_its_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(os.environ.get("TREELINE_BENCH_TREES", TREES))
    if not path.exists():
        pytest.skip(f"no trees at {path}")
    names = [name for name in VARIANTS if "datasets" not in name or find_spec("datasets")]
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    for turn in range(ROUNDS):
        for name in names:
            taken[name].append(in_a_process(name, path, tmp_path / f"{name} {turn}"))
    with gzip.open(path) as file:
        size = sum(map(len, iter(lambda: file.read(1 << 20), b""))) / 1e6
    least = {name: min(samples) for name, samples in taken.items()}
    assert least["ours"][2] == least["json + from_pylist"][2] == least["oasst_data"][2]
    with capsys.disabled():
        print(f"\n{path.name}, {size:.0f} MB of JSON, {least['ours'][2]:,} messages")
        for name, (spent, peak, _) in least.items():
            ratio = spent / least["ours"][0]
            print(f"{name:20} {spent:6.2f} cpu-s {size / spent:6.1f} MB/cpu-s {peak:6.0f} MB   {ratio:5.1f} x ours")
        if not find_spec("datasets"):
            print("datasets is not installed: not compared")


def test_memory_is_flat_and_time_is_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten times the input: `$TREELINE_BENCH_TENFOLD` names such a file; else the trees are written ten times over."""
    path = Path(os.environ.get("TREELINE_BENCH_TREES", TREES))
    if not path.exists():
        pytest.skip(f"no trees at {path}")
    given = os.environ.get("TREELINE_BENCH_TENFOLD")
    big = Path(given) if given else tenfold(path, tmp_path / "tenfold.jsonl.gz")
    ones, tens = [], []
    for turn in range(ROUNDS):
        ones.append(in_a_process("ours", path, tmp_path / f"one {turn}"))
        tens.append(in_a_process("ours", big, tmp_path / f"ten {turn}"))
    (spent, peak, rows), (longer, higher, more) = min(ones), min(tens)
    with capsys.disabled():
        print(f"\n{rows:,} messages: {spent:.2f} cpu-s, {peak:.0f} MB")
        print(f"{more:,} messages: {longer:.2f} cpu-s, {higher:.0f} MB")
        print(
            f"for {more / rows:.2f} x the messages {longer / spent:.2f} x the time and {higher / peak:.2f} x the memory"
        )


def tenfold(path: Path, big: Path) -> Path:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    with gzip.open(big, "wt", encoding="utf-8", compresslevel=1) as packed:
        for copy in range(10):
            packed.writelines(renamed(line, copy) for line in lines)
    return big


def renamed(line: str, copy: int) -> str:
    """Give a tree and its messages ids of their own."""
    tree = json.loads(line)
    tree["message_tree_id"] = f"{copy}{tree['message_tree_id'][1:]}"
    stack = [(tree["prompt"], None)]
    while stack:
        node, parent = stack.pop()
        node["message_id"], node["parent_id"] = f"{copy}{node['message_id'][1:]}", parent
        node["message_tree_id"] = None
        stack.extend((reply, node["message_id"]) for reply in node["replies"])
    return json.dumps(tree) + "\n"
