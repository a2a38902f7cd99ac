"""Laws of task runners: wherever texts are worked on, the artifacts are the same bytes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from flows import runners
from flows.runners import _packed, _Sealed, _unpacked, _work
from tasks.errors import ParameterError

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


def data_half(folder: Path, *settings: str, **environment: str) -> dict[str, str]:
    """Run the first four steps; return the content digest of each artifact."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TREELINE_"))}
    environment |= {"TREELINE_ARTIFACTS": str(folder / "artifacts"), "HOME": str(folder), **kept}
    asked = [sys.executable, "-m", "flows", "run", TINY, "--until", "encode", "--verbose"]
    asked += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    manifests = [json.loads(path.read_bytes()) for path in folder.glob("artifacts/*/*/manifest.json")]
    runs = re.findall(r"Task run '(texts-\w+)'", done.stderr)
    return {made["kind"]: made["digest"] for made in manifests} | {"runs": str(len({*runs}))}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_workers_of_a_cluster_make_the_bytes_that_threads_make(scheduler: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("threads", "dask")]
    for folder in folders:
        folder.mkdir()
    here = data_half(folders[0])
    there = data_half(folders[1], "runtime.runner=dask", TREELINE_DASK_SCHEDULER=scheduler)
    assert int(there.pop("runs")) > int(here.pop("runs")) == 0
    assert here == there
    assert {*here} == {"raw", "messages", "dialogues", "tokens"}


def test_chunks_and_rows_survive_the_way_there_and_back() -> None:
    texts = [pa.array(["a", "ü", ""]), pa.array(["b"])]
    rows = _unpacked(_work(_Sealed(partial(doubled, times=2)), _packed(texts)))
    assert [batch.to_pydict() for batch in rows] == [{"said": ["aa", "üü", ""]}, {"said": ["bb"]}]


def test_a_runner_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray.task_runners", None)
    with pytest.raises(ParameterError, match="ray is not installed") as caught, runners.on("ray"):
        pass
    assert "pip install" in str(caught.value)
