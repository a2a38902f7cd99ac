"""Laws of the chain: what a plan says is what a run does, and a kill at any moment costs nothing that was finished."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from flows import chain, recipe
from flows.views import adapters
from tasks.artifacts import Artifact, Model, Report
from tasks.initial_weights import base_of
from tasks.step import Step, session
from tasks.store.store import Store
from tests.waiting import ended, started, until

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
    planned = chain.plan(recipe.load(TINY, ["curate.label_limits.quality=0.9"]), DATA)
    assert [entry.status for entry in planned] == ["cached", "cached", "run", "unknown"]
    assert planned[2].why == "params.label_limits.quality: 0.4 -> 0.9"
    assert run("curate.label_limits.quality=0.9")[:3] == [True, True, False]


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


def start(folder: Path, *settings: str, before: Sequence[str] = ()) -> AbstractContextManager[subprocess.Popen[bytes]]:
    values = ["runtime.threads=1", *settings]
    code = f"from flows import chain, recipe; chain.run(recipe.load({TINY!r}, {values!r}), chain.CHAIN)"
    environment = {**os.environ, "TREELINE_ARTIFACTS": str(folder)}
    return started([*before, sys.executable, "-c", code], cwd=ROOT, env=environment, start_new_session=True)


@pytest.mark.slow
def test_training_that_was_killed_goes_on_under_another_host_name_and_publishes_what_it_would_have(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other_host = ("unshare", "--uts", "sh", "-c", 'hostname pod-b; exec "$0" "$@"')
    if not shutil.which("unshare") or subprocess.run([*other_host, "true"]).returncode:
        pytest.skip("may not take another host name")
    whole, killed, setting = Store(tmp_path / "whole"), Store(tmp_path / "killed"), "runtime.checkpoint_seconds=0"
    steps = "resume-model-*/checkpoints/step-*[1-9]"
    with start(killed.root, setting) as process:
        checkpoints = until(lambda: [*(killed.root / ".scratch").glob(steps)], process, pause=0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (checkpoints[0].parents[1] / ".tmpABCDEF").write_text("of safetensors")
    (checkpoints[0].parents[1] / "left-over").mkdir()
    with start(killed.root, setting, before=other_host) as process:
        assert ended(process) == 0
    assert "goes on from step-" in capfd.readouterr().err
    with start(whole.root, setting) as process:
        assert ended(process) == 0
    assert digests(killed) == digests(whole)
    (model,) = killed.folders("model")
    assert killed.verify(model) == []
    assert not [path for path in model.iterdir() if path.name.startswith(".") or path.is_dir()]


@pytest.mark.slow
def test_a_kill_in_the_middle_of_any_step_leaves_no_half_artifact_and_the_rerun_ends_equal(tmp_path: Path) -> None:
    whole, killed = Store(tmp_path / "whole"), Store(tmp_path / "killed")
    with start(whole.root) as process:
        assert ended(process) == 0
    for step in chain.CHAIN:
        _kill_during(step, killed)
        assert step.makes.kind not in digests(killed)
    with start(killed.root) as process:
        assert ended(process) == 0
    assert digests(killed) == digests(whole)
    assert set(digests(killed)) == {step.makes.kind for step in chain.CHAIN}


def _kill_during(step: Step[..., Artifact], store: Store) -> None:
    mine = f"{'resume-' if step.inherits else ''}{step.makes.kind}-*"
    before = {*(store.root / ".scratch").glob(mine)}
    with start(store.root) as process:
        until(lambda: {*(store.root / ".scratch").glob(mine)} - before, process, pause=0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_recipe_with_preferences_has_three_steps_more(store: Store) -> None:
    asked = recipe.load(TINY, ["preferences=true"])
    names = [step.name for step in chain.whole(asked)]
    assert names == ["download", "parse", "curate", "encode", "pair", "train", "score", "prefer", "evaluate"]
    assert [step.name for step in chain.whole(recipe.load(TINY))] == [step.name for step in chain.CHAIN]


@pytest.mark.slow
def test_a_model_that_prefers_is_made_of_the_one_that_was_trained(store: Store) -> None:
    settings = ["preferences=true", "train.epochs=0.3", "prefer.epochs=0.3", "prefer.lora_rank=2", "runtime.threads=1"]
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
    report = made["evaluate"].json("report.json")
    assert report["models"] == ["base", "tuned", "preferred"]
    assert report["training"] == made["train"].json("training.json")
    assert report["preference"] == made["prefer"].json("training.json")
    assert report["pairs"] > 0
    assert report["nll"]["base"] > report["nll"]["tuned"] != report["nll"]["preferred"]


@pytest.mark.slow
def test_a_step_that_kept_its_start_is_told_as_one_that_changed_nothing(store: Store) -> None:
    """At such a learning rate no weight changes, so no loss is better than the first one."""
    settings = [
        "preferences=true",
        "train.epochs=0.3",
        "prefer.lr=1e-30",
        "curate.val_fraction=0.3",
        "runtime.threads=1",
    ]
    asked = recipe.load(TINY, settings)
    with session():
        made = chain.run(asked, chain.whole(asked))
    written = made[Report]
    assert isinstance(written, Report)
    page, report, training = written.markdown(), written.figures(), made[Model].json("training.json")
    assert training["best_step"] == 0
    assert training["accuracy_start"] == training["accuracy_best"] == pytest.approx(0.5, abs=0.2)  # no pair is told
    assert "pairs of ranked replies changed nothing" in page
    for name in ("nll", "stop_rate", "accuracy", "margin", "chosen"):
        assert report[name]["preferred"] == report[name]["tuned"]
    assert report["nll"]["tuned"] != report["nll"]["base"]


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
