"""Laws of the chain: what a plan says is what a run does, and a kill at any moment costs nothing that was finished."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from flows import chain, recipe
from flows.showing import adapters
from tasks.artifacts import Artifact, Model
from tasks.start import base_of
from tasks.step import Step, session
from tasks.store.folders import Store

ROOT = Path(__file__).parents[2]
TINY = str(Path(__file__).with_name("tiny.toml"))
DATA = chain.DATA


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path))
    return Store(tmp_path)


def statuses(*settings: str) -> list[str]:
    return [entry.status for entry in chain.plan(recipe.load(TINY, settings), DATA)]


def run(*settings: str) -> list[bool]:
    with session() as now:
        chain.run(recipe.load(TINY, settings), DATA)
        return [outcome.cached for outcome in now.outcomes]


def test_what_comes_after_a_step_that_would_run_is_unknown(store: Store) -> None:
    assert statuses() == ["run", "unknown", "unknown", "unknown"]


def test_nothing_changed_means_all_cached(store: Store) -> None:
    assert run() == [False] * 4
    assert statuses() == ["cached"] * 4
    assert run() == [True] * 4


def test_one_setting_changed_runs_that_step_and_those_after_it_and_why_names_it(store: Store) -> None:
    run()
    planned = chain.plan(recipe.load(TINY, ["curate.quality_below=0.9"]), DATA)
    assert [entry.status for entry in planned] == ["cached", "cached", "run", "unknown"]
    assert planned[2].why == "params.quality_below: 0.4 -> 0.9"
    assert run("curate.quality_below=0.9")[:3] == [True, True, False]


def test_an_upstream_rerun_with_equal_bytes_leaves_everything_after_it_cached(store: Store) -> None:
    run()
    assert run("parse.max_text_mb=2") == [True, False, True, True]


def test_forcing_a_step_runs_it_and_equal_bytes_end_there(store: Store) -> None:
    run()
    with session(force=frozenset({"parse"})) as now:
        chain.run(recipe.load(TINY), DATA)
        assert [outcome.cached for outcome in now.outcomes] == [True, False, True, True]


@pytest.mark.parametrize("kind", ["raw", "messages", "dialogues", "tokens"])
def test_a_deleted_artifact_is_rebuilt_alone(store: Store, kind: str) -> None:
    run()
    (made,) = store.folders(kind)
    next(iter(sorted(made.glob("*.bin")) or sorted(made.glob("*.parquet")) or sorted(made.glob("*.gz")))).unlink()
    assert run().count(False) == 1
    assert statuses() == ["cached"] * 4


def digests(store: Store) -> dict[str, str]:
    return {manifest.kind: manifest.digest for _, manifest in store.manifests()}


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Hold what a test starts, and end it with the test."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for one in started:
        if one.poll() is None:
            os.killpg(one.pid, signal.SIGKILL)
            one.wait()


def start(folder: Path, *settings: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    asked = ["train.threads=1", *settings]
    code = f"from flows import chain, recipe; chain.run(recipe.load({TINY!r}, {asked!r}), chain.CHAIN)"
    environment = {**os.environ, "TREELINE_ARTIFACTS": str(folder)}
    return subprocess.Popen([*before, sys.executable, "-c", code], cwd=ROOT, env=environment, start_new_session=True)


@pytest.mark.slow
def test_training_that_was_killed_goes_on_under_another_host_name_and_publishes_what_it_would_have(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    other_host = ("unshare", "--uts", "sh", "-c", 'hostname pod-b; exec "$0" "$@"')
    if not shutil.which("unshare") or subprocess.run([*other_host, "true"]).returncode:
        pytest.skip("may not take another host name")
    whole, killed, asked = Store(tmp_path / "whole"), Store(tmp_path / "killed"), "runtime.train.checkpoint_seconds=0"
    processes.append(start(killed.root, asked))
    deadline = time.monotonic() + 600
    while not (found := [*(killed.root / ".scratch").glob("resume-model-*/checkpoints/step-*[1-9]")]):
        assert processes[0].poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(processes[0].pid, signal.SIGKILL)
    processes[0].wait()
    (found[0].parents[1] / ".tmpABCDEF").write_text("of safetensors")
    (found[0].parents[1] / "left-over").mkdir()
    processes.append(start(killed.root, asked, before=other_host))
    assert processes[1].wait() == 0
    assert "goes on from step-" in capfd.readouterr().err
    processes.append(start(whole.root, asked))
    assert processes[2].wait() == 0
    assert digests(killed) == digests(whole)
    (model,) = killed.folders("model")
    assert killed.verify(model) == []
    assert not [path for path in model.iterdir() if path.name.startswith(".") or path.is_dir()]


@pytest.mark.slow
def test_a_kill_in_the_middle_of_any_step_leaves_no_half_artifact_and_the_rerun_ends_equal(tmp_path: Path) -> None:
    whole, killed = Store(tmp_path / "whole"), Store(tmp_path / "killed")
    assert start(whole.root).wait(200) == 0
    for step in chain.CHAIN:
        _kill_during(step, killed)
        assert step.makes.kind not in digests(killed)
    assert start(killed.root).wait(200) == 0
    assert digests(killed) == digests(whole)
    assert set(digests(killed)) == {step.makes.kind for step in chain.CHAIN}


def _kill_during(step: Step[..., Artifact], store: Store) -> None:
    mine = f"{'resume-' if step.inherits else ''}{step.makes.kind}-*"
    before = {*(store.root / ".scratch").glob(mine)}
    process = start(store.root)
    deadline = time.monotonic() + 100
    while not {*(store.root / ".scratch").glob(mine)} - before:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_recipe_with_preferences_has_three_steps_more(store: Store) -> None:
    asked = recipe.load(TINY, ["preferences=true"])
    names = [step.name for step in chain.whole(asked)]
    assert names == ["download", "parse", "curate", "encode", "pair", "train", "refer", "prefer", "evaluate"]
    assert [step.name for step in chain.whole(recipe.load(TINY))] == [step.name for step in chain.CHAIN]


@pytest.mark.slow
def test_a_model_that_prefers_is_made_of_the_one_that_was_trained(store: Store) -> None:
    settings = ["preferences=true", "train.epochs=0.3", "prefer.epochs=0.3", "prefer.lora_rank=2", "train.threads=1"]
    asked = recipe.load(TINY, settings)
    with session() as now:
        chain.run(asked, chain.whole(asked))
        made = {outcome.step: outcome.artifact for outcome in now.outcomes}
    assert made["prefer"].json("training.json")["from"] == made["train"].manifest.digest
    assert made["evaluate"].manifest.recipe["inputs"]["model"] == made["prefer"].manifest.digest
    assert isinstance(tuned := made["prefer"], Model)
    assert base_of(tuned)[1] == made["train"].path  # what its adapters lie over, though start.json says scratch
    assert adapters(tuned).startswith(f"adapters lie over {made['train'].id};")
    assert all(entry.status == "cached" for entry in chain.plan(asked, chain.whole(asked)))
    plain = chain.plan(recipe.load(TINY, ["train.epochs=0.3"]), chain.CHAIN)
    assert [entry.status for entry in plain] == ["cached"] * 5 + ["run"]


def test_a_store_named_like_a_pattern_reads_its_own_files_and_not_those_of_a_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}
    for name, trees in (("exp1", 60), ("exp[1]*?#%20", 40)):
        monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / name))
        run(f"parse.max_trees={trees}")
        made[name] = digests(Store(tmp_path / name))
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / "plain"))
    run("parse.max_trees=40")
    assert made["exp[1]*?#%20"] == digests(Store(tmp_path / "plain")) != made["exp1"]
