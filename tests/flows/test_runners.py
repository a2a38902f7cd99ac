"""Laws of task runners: wherever texts are worked on, the artifacts are the same bytes."""

import json
import os
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from flows import chain, recipe, runners
from flows.runners import _packed, _Sealed, _unpacked, _work
from tasks.errors import ParameterError
from tasks.store.store import Store
from tests.waiting import run

ROOT = Path(__file__).parents[2]
TINY = str(Path(__file__).with_name("tiny.toml"))


def doubled(texts: pa.StringArray, times: int) -> pa.RecordBatch:
    return pa.record_batch({"said": pa.array([text * times for text in texts.to_pylist()])})


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Start a cluster of two workers, each a process of its own."""
    distributed = pytest.importorskip("distributed")
    pytest.importorskip("prefect_dask")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def work_done(scheduler: str) -> dict[str, int]:
    """Return how often each worker's tasks have changed their state, ever."""
    from distributed import Client

    with Client(scheduler) as client:  # type: ignore[no-untyped-call]
        found: dict[str, int] = client.run(lambda dask_worker: dask_worker.state.transition_counter)
        return found


def chats(path: Path, count: int) -> Path:
    """Write chats of their own words: enough that a call's texts are several task runs."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(5_000)]
    said = [{"role": role, "content": ""} for role in ("user", "assistant")]
    rows = ([{**one, "content": " ".join(draw.choices(words, k=5))} for one in said] for _ in range(count))
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def digests(folder: Path) -> dict[str, str]:
    return {manifest.kind: manifest.digest for _, manifest in Store(folder).manifests()}


def run_on(runner: str, folder: Path, given: list[str], **named: str) -> None:
    """Run the data half of the tiny recipe, into a store of its own in the folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TREELINE_"))}
    named |= {"TREELINE_ARTIFACTS": str(folder / runner), "HOME": str(folder), "TREELINE_SOURCE_ROOTS": str(folder)}
    settings = [word for one in (f"runtime.runner={runner}", *given) for word in ("--set", one)]
    asked = [sys.executable, "-m", "flows", "run", TINY, "--until", "encode", *settings]
    done = run(asked, cwd=ROOT, env={**kept, **named})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_ray_makes_the_bytes_that_threads_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prefect_ray", reason="Ray comes with the extra `ray` only")
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / "threads"))
    chain.run(recipe.load(TINY), chain.DATA)
    run_on("ray", tmp_path, [])
    assert digests(tmp_path / "ray") == digests(tmp_path / "threads")


@pytest.mark.slow
def test_two_workers_of_a_cluster_make_the_bytes_that_threads_make(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = chats(tmp_path / "chats.jsonl", runners.ROWS)
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / "threads"))
    monkeypatch.setenv("TREELINE_SOURCE_ROOTS", str(tmp_path))
    given = ["download.source=file", f"download.path={source}", "parse.max_trees=100000", "curate.languages=[]"]
    given += ["encode.context_length=256"]
    chain.run(recipe.load(TINY, given), chain.DATA)
    before = work_done(scheduler)
    run_on("dask", tmp_path, given, TREELINE_DASK_SCHEDULER=scheduler)
    after = work_done(scheduler)
    assert len(after) == 2
    assert all(after[worker] > before[worker] for worker in after), "both workers had texts"
    assert digests(tmp_path / "dask") == digests(tmp_path / "threads")
    assert {*digests(tmp_path / "dask")} == {"raw", "messages", "dialogues", "tokens"}


def test_chunks_and_rows_survive_the_way_there_and_back() -> None:
    texts = [pa.array(["a", "ü", ""]), pa.array(["b"])]
    rows = _unpacked(_work(_Sealed(partial(doubled, times=2)), _packed(texts)))
    assert [batch.to_pydict() for batch in rows] == [{"said": ["aa", "üü", ""]}, {"said": ["bb"]}]


def test_a_runner_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray.task_runners", None)
    with pytest.raises(ParameterError, match="ray is not installed") as caught, runners.on("ray"):
        pass
    assert "pip install" in str(caught.value)
