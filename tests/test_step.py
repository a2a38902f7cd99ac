"""Laws of a step: its signature is its key, and the store decides."""

import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest

from tasks.artifacts import Artifact, Counts
from tasks.errors import StoreError
from tasks.step import Outcome, Params, Runtime, Step, session, step
from tasks.store.collect import garbage
from tasks.store.manifest import Notice, read_manifest
from tasks.store.store import Store


@dataclass(frozen=True)
class Letters(Artifact):
    kind = "letters"
    files = ("text",)
    optional = ("log",)
    records = frozenset({"log"})


@dataclass(frozen=True)
class Shouted(Artifact):
    kind = "shouted"
    files = ("text",)


class WriteParams(Params):
    text: str = "hello"
    case: str = "lower"


class ShoutParams(Params):
    marks: int = 1


class ShoutRuntime(Runtime):
    workers: int = 1


ran: list[str] = []


@step("write", version=1, makes=Letters)
def write(out: Path, params: WriteParams) -> Counts:
    """Write the letters."""
    ran.append("write")
    (out / "text").write_text(params.text.lower())
    (out / "log").write_text(str(len(ran)))
    return {"letters": len(params.text)}


@step("shout", version=1, makes=Shouted)
def shout(out: Path, letters: Letters, params: ShoutParams, run: ShoutRuntime) -> Counts:
    """Shout them."""
    ran.append("shout")
    (out / "text").write_text((letters.path / "text").read_text().upper() + "!" * params.marks)
    return {}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path))
    ran.clear()
    return Store(tmp_path)


def chain(text: str = "hello", case: str = "lower", marks: int = 1, workers: int = 1) -> list[Outcome]:
    with session() as run:
        letters = write(WriteParams(text=text, case=case))
        shout(letters, ShoutParams(marks=marks), ShoutRuntime(workers=workers))
        return run.outcomes


def cached(outcomes: list[Outcome]) -> list[bool]:
    return [outcome.cached for outcome in outcomes]


def test_nothing_changed_means_nothing_runs() -> None:
    assert cached(chain()) == [False, False]
    assert cached(chain()) == [True, True]
    assert ran == ["write", "shout"]


def test_a_changed_setting_reruns_its_step_and_names_old_and_new() -> None:
    chain()
    outcomes = chain(marks=3)
    assert cached(outcomes) == [True, False]
    assert outcomes[1].why == "params.marks: 1 -> 3"


def test_equal_bytes_from_an_upstream_rerun_leave_everything_after_it_cached() -> None:
    chain(case="lower")
    outcomes = chain(case="upper")  # another key, the same file; the log differs, but is no content
    assert cached(outcomes) == [False, True]


def test_runtime_settings_change_no_key() -> None:
    chain(workers=1)
    assert cached(chain(workers=8)) == [True, True]


@pytest.mark.parametrize("harm", ["flip", "cut", "delete", "manifest"])
def test_an_altered_artifact_is_rebuilt_and_said(store: Store, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    first = chain()
    path = first[0].artifact.path / ("manifest.json" if harm == "manifest" else "text")
    path.unlink()
    if harm != "delete":
        path.write_text({"flip": "jello", "cut": "hell", "manifest": "{"}[harm])
    second = chain()
    assert cached(second) == [False, True]
    assert path.name in second[0].why
    assert "store.aside" in caplog.text
    assert second[0].artifact.manifest.digest == first[0].artifact.manifest.digest


def test_a_failed_build_leaves_no_artifact_and_the_next_try_is_a_build(store: Store) -> None:
    @step("fail", version=1, makes=Letters)
    def fail(out: Path, params: WriteParams) -> Counts:
        """Fail."""
        (out / "text").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"error\[store.write\].*No space left.*MB free"):
        fail(WriteParams())
    assert store.manifests() == []


def test_a_step_that_forgets_a_file_is_a_bug_that_is_named() -> None:
    @step("forget", version=1, makes=Letters)
    def forget(out: Path, params: WriteParams) -> Counts:
        """Write nothing."""
        return {}

    with pytest.raises(StoreError, match="did not write text"):
        forget(WriteParams())


@pytest.mark.parametrize("name", [".tmpABCDEF", "pytorch_model.bin", "manifest.json", "text2"])
def test_a_file_that_the_artifact_does_not_declare_is_not_published(store: Store, name: str) -> None:
    @step("more", version=1, makes=Letters)
    def more(out: Path, params: WriteParams) -> Counts:
        """Write too much."""
        for one in ("text", "log", name):
            (out / one).write_text("x")
        return {}

    with pytest.raises(StoreError, match=rf"error\[step.files\].*wrote {name}.*Letters.optional"):
        more(WriteParams())
    assert store.manifests() == []


def test_what_a_library_says_of_the_disk_is_said_as_the_disk() -> None:
    @step("save", version=1, makes=Letters)
    def save(out: Path, params: WriteParams) -> Counts:
        """Fail as `tokenizers` does."""
        raise Exception("No space left on device (os error 28)")

    with pytest.raises(StoreError, match=r"error\[store.write\].*No space left") as caught:
        save(WriteParams())
    assert caught.value.exit_code == 74


def test_a_build_whose_folder_was_taken_over_says_so() -> None:
    @step("slow", version=1, makes=Letters, inherits=("checkpoints",))
    def slow(out: Path, params: WriteParams) -> Counts:
        """Wake up when another run has gone on with it."""
        out.rename(out.with_name("taken"))
        (out / "text").write_text("x")
        return {}

    with pytest.raises(StoreError, match=r"error\[store.scratch\].*took this one for dead"):
        slow(WriteParams())


def test_what_a_step_works_on_is_not_collected_meanwhile(store: Store) -> None:
    @step("look", version=1, makes=Shouted)
    def look(out: Path, letters: Letters, params: ShoutParams) -> Counts:
        """Look at what gc would remove."""
        (out / "text").write_text(" ".join(path.name for path in garbage(store, 0, time.time() + 3600)))
        return {}

    letters = write(WriteParams())
    found = (look(letters, ShoutParams()).path / "text").read_text()
    assert found == f"{letters.id.replace('/', '-')}.lock", "a lock that nobody holds, but no input"
    assert letters.path in garbage(store, 0, time.time() + 3600), "nobody uses it any more"


def test_a_run_that_cannot_say_that_it_is_alive_fails_before_it_works(store: Store) -> None:
    (store.root / ".leases").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"error\[store\."):
        chain()
    assert ran == []


def test_forcing_rebuilds_and_replaces() -> None:
    chain()
    with session(force=frozenset({"write"})) as run:
        write(WriteParams())
    assert [(outcome.cached, outcome.why) for outcome in run.outcomes] == [(False, "forced")]
    assert cached(chain()) == [True, True]


@step("learn", version=1, makes=Letters, inherits=("checkpoints",))
def learn(out: Path, params: WriteParams) -> Counts:
    """Write the letters, after hours."""
    ran.append("learn")
    (out / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    (out / "text").write_text(params.text)
    return {"letters": len(params.text)}


@pytest.fixture(params=["_spent", "_rename"])
def cut_short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the step that ended when all was written: before its checkpoints were gone, or before it had a name."""
    with monkeypatch.context() as patched:
        patched.setattr(Store, request.param, Mock(side_effect=KeyboardInterrupt))
        pytest.raises(KeyboardInterrupt, learn, WriteParams())


@pytest.mark.usefixtures("cut_short")
def test_what_was_built_when_its_publishing_was_cut_short_is_not_built_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.manifests() == []
    made = learn(WriteParams()).manifest
    assert ran == ["learn"]
    assert "store.built" in caplog.text
    assert made == store.look("letters", made.key)
    assert made.counts == {"letters": 5}


@pytest.mark.usefixtures("cut_short")
def test_what_was_built_and_then_altered_is_built_again(store: Store) -> None:
    (text,) = (store.root / ".scratch").glob("*/text")
    text.write_text("jello")
    made = learn(WriteParams()).manifest
    assert ran == ["learn", "learn"]
    assert made == store.look("letters", made.key)
    assert set(made.files) == {"text"}


@pytest.mark.usefixtures("cut_short")
def test_forcing_builds_again_what_was_built_when_its_publishing_was_cut_short() -> None:
    with session(force=frozenset({"learn"})):
        learn(WriteParams())
    assert ran == ["learn", "learn"]


def test_a_version_enters_the_key() -> None:
    newer: Step[..., Letters] = Step("write", 2, Letters, (), write.function)
    assert newer.recipe({}, WriteParams()) != write.recipe({}, WriteParams())


def test_defaults_are_spelled_out_in_the_key() -> None:
    assert write.recipe({}, WriteParams())["params"] == {"text": "hello", "case": "lower"}


def wrong_first(folder: Path, params: WriteParams) -> Counts:
    return {}


def no_params(out: Path, letters: Letters) -> Counts:
    return {}


def odd_type(out: Path, params: WriteParams, size: int) -> Counts:
    return {}


def two_params(out: Path, params: WriteParams, more: ShoutParams) -> Counts:
    return {}


@pytest.mark.parametrize("function", [wrong_first, no_params, odd_type, two_params])
def test_a_signature_that_says_too_much_or_too_little_raises_at_import(function: object) -> None:
    with pytest.raises(TypeError):
        step("odd", version=1, makes=Letters)(function)  # type: ignore[arg-type]


def test_the_manifest_records_where_it_was_made_but_the_key_does_not() -> None:
    manifest = chain()[1].artifact.manifest
    assert manifest.origin["runtime"] == {"workers": 1}
    assert {"host", "python", "seconds", "revision"} <= set(manifest.origin)
    assert set(manifest.recipe) == {"step", "version", "params", "inputs"}


SILENT = Notice("mute.silent", 2, "2 of 5 letters are silent", "Raise mute.most")


def silent(counts: Counts, params: ShoutParams) -> list[Notice]:
    return [SILENT] * (counts["silent"] > params.marks)


@step("mute", version=1, makes=Letters, notices=silent)
def mute(out: Path, params: ShoutParams) -> Counts:
    """Write letters, some of them silent."""
    (out / "text").write_text("knigh")
    (out / "log").write_text("")
    return {"silent": 2}


def test_a_manifest_keeps_what_was_lost_up_to_its_artifact_and_a_cached_one_has_it_still() -> None:
    for _ in range(2):
        muted = mute(ShoutParams())
        loud = shout(muted, ShoutParams(marks=3), ShoutRuntime())
        assert muted.manifest.notices == loud.manifest.notices == (SILENT,)
        assert read_manifest(loud.path).notices == (SILENT,)
    assert mute(ShoutParams(marks=2)).manifest.notices == ()


def test_a_notice_names_its_step_the_cause_and_the_setting() -> None:
    assert str(SILENT) == "warning[mute.silent]: 2 of 5 letters are silent. Raise mute.most."
    assert SILENT.step == "mute"
