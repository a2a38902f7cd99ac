"""Laws of the store: written once, published whole, checked before use."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import StoreError
from tasks.store.canonical import sha256_file, sha256_of
from tasks.store.collect import garbage
from tasks.store.integrity import Fault, examine, identity
from tasks.store.manifest import Manifest, UnreadableManifest, content_digest, read_manifest
from tasks.store.store import Store, entries

RECIPE = {"step": "parse", "version": 1, "params": {"max_trees": None}, "inputs": {}}
KEY = sha256_of(RECIPE)
KEPT = ("checkpoints", "log", "whose")


def publish(
    store: Store, content: bytes = b"hello", recipe: dict[str, Any] = RECIPE, kind: str = "messages"
) -> tuple[Path, Manifest]:
    key = sha256_of(recipe)
    with store.scratch(kind, key) as out:
        (out / "a.bin").write_bytes(content)
        (out / "b.bin").write_bytes(b"second file")
        files = entries(out)
        return store.publish(out, Manifest(key, kind, recipe, files, content_digest(files), {"rows": 1}))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def test_what_was_published_is_found_again(store: Store) -> None:
    folder, manifest = publish(store)
    assert store.look("messages", KEY) == manifest == read_manifest(folder)
    assert (folder / "a.bin").read_bytes() == b"hello"
    assert [made for _, made in store.manifests()] == [manifest]


def test_a_build_inherits_what_it_names_and_nothing_else(store: Store, tmp_path: Path) -> None:
    leave(store, "left", "step-00000003")
    (tries,) = (store.root / ".scratch").iterdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("stays")
    (tries / ".tmpABCDEF").write_text("of safetensors")
    (tries / ".tmpFOLDER" / "deep").mkdir(parents=True)
    (tries / "link").symlink_to(tmp_path / "mine")
    (tries / "log").mkdir()
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "whose"]
        assert (out / "checkpoints" / "step-00000003").exists()
    assert (tmp_path / "mine" / "file").exists()


def test_what_is_no_folder_of_its_own_is_not_inherited(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("stays")
    (store.root / ".scratch").mkdir(parents=True)
    (store.root / ".scratch" / f"resume-model-{KEY[:12]}.left").symlink_to(tmp_path / "mine")
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert list(out.iterdir()) == []
    assert (tmp_path / "mine" / "file").exists()


def test_a_build_that_fails_leaves_nothing(store: Store) -> None:
    def fail() -> None:
        with store.scratch("messages", KEY) as out:
            (out / "a.bin").write_bytes(b"half")
            raise RuntimeError("boom")

    pytest.raises(RuntimeError, fail)
    assert store.look("messages", KEY) is None
    assert list((store.root / ".scratch").iterdir()) == []


MUTATIONS: dict[str, Callable[[Path], object]] = {
    "one bit flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "same length, other content": lambda path: path.write_bytes(b"y" * path.stat().st_size),
    "deleted": lambda path: path.unlink(),
    "a link to the same bytes": lambda path: path.symlink_to(path.rename(path.parent / "x")),
    "a folder": lambda path: path.rename(path.parent / "x").with_name(path.name).mkdir(),
}


@pytest.mark.parametrize("name", ["a.bin", "b.bin", "manifest.json"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_an_altered_file_is_a_fault_even_where_its_identity_was_remembered(
    store: Store, mutation: str, name: str
) -> None:
    folder, _ = publish(store)
    assert isinstance(store.look("messages", KEY), Manifest)
    if name == "manifest.json" and mutation == "a link to the same bytes":
        pytest.skip("the manifest is sealed by its own hash, wherever it lies")
    MUTATIONS[mutation](folder / name)
    fault = store.look("messages", KEY)
    assert isinstance(fault, Fault)
    assert fault.file == name
    assert isinstance(examine(folder), Fault)


def test_a_bit_flipped_behind_an_unchanged_identity_is_found_by_a_full_check(store: Store) -> None:
    folder, _ = publish(store)
    path = folder / "a.bin"
    before = path.stat()
    path.write_bytes(b"jello")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert isinstance(examine(folder), Fault)
    assert isinstance(store.look("messages", KEY), Fault), "ctime gives it away"


def test_what_is_set_aside_can_be_built_again_and_nothing_is_deleted(store: Store) -> None:
    folder, manifest = publish(store)
    (folder / "a.bin").write_bytes(b"other")
    store.set_aside(folder, "test")
    assert store.look("messages", KEY) is None
    assert publish(store)[1].digest == manifest.digest
    (aside,) = (store.root / ".aside").iterdir()
    assert (aside / "a.bin").read_bytes() == b"other"


def test_the_first_of_two_builds_wins_and_a_different_second_one_is_said(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    _, first = publish(store, b"one")
    _, winner = publish(store, b"two")
    assert winner == first
    assert "store.nondeterministic" in caplog.text
    assert list((store.root / ".scratch").iterdir()) == []


def test_a_broken_artifact_in_the_way_is_replaced(store: Store) -> None:
    folder, _ = publish(store, b"one")
    (folder / "a.bin").unlink()
    _, winner = publish(store, b"two")
    assert store.look("messages", KEY) == winner
    assert (folder / "a.bin").read_bytes() == b"two"


def test_eight_writers_of_one_key_leave_one_whole_artifact(store: Store) -> None:
    found: list[Manifest] = []
    threads = [threading.Thread(target=lambda: found.append(publish(store)[1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({manifest.digest for manifest in found}) == 1
    assert len(found) == 8
    assert len(store.folders()) == 1
    assert isinstance(store.look("messages", KEY), Manifest)


def test_a_resumable_build_gets_back_what_a_failed_try_left(store: Store) -> None:
    def fail() -> None:
        with store.scratch("model", KEY, inherits=KEPT) as out:
            (out / "log").write_text("step 7")
            raise RuntimeError("boom")

    pytest.raises(RuntimeError, fail)
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert (out / "log").read_text() == "step 7"
    with store.scratch("model", "f" * 64, inherits=KEPT) as other:
        assert list(other.iterdir()) == []


def test_checkpoints_are_no_part_of_what_is_published_and_stay_until_everything_else_is_on_the_disk(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> None:
        with store.scratch("model", KEY, inherits=KEPT, recipe={"step": "train"}) as out:
            assert json.loads((out / "checkpoints" / "recipe.json").read_text()) == {"step": "train"}
            (out / "checkpoints" / "step").write_text("3")
            (out / "a.bin").write_bytes(b"hello")
            files = entries(out)
            store.publish(out, Manifest(KEY, "model", {}, files, content_digest(files)))

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tasks.store.store.write_manifest", full)
    pytest.raises(StoreError, build)
    (left,) = (store.root / ".scratch").iterdir()
    assert (left / "checkpoints" / "step").exists()
    monkeypatch.undo()
    build()
    assert {path.name for path in store.folder("model", KEY).iterdir()} == {"a.bin", "manifest.json"}
    assert list((store.root / ".aside").iterdir()) == []


def test_a_resumable_build_gets_back_what_a_killed_process_left(store: Store) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tasks.store.store import Store\n"
        f"with Store(Path({str(store.root)!r})).scratch('model', {KEY!r}, inherits=('checkpoints', 'log'))  as out:\n"
        "    (out / 'log').write_text('step 9'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == -9
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert (out / "log").read_text() == "step 9"


def leave(store: Store, name: str, *checkpoints: str) -> None:
    """Lay out a scratch folder as a try leaves it that failed, or was killed."""
    folder = store.root / ".scratch" / f"resume-model-{KEY[:12]}.{name}"
    for checkpoint in checkpoints:
        (folder / "checkpoints" / checkpoint).mkdir(parents=True)
    (folder / "checkpoints" / "recipe.json").write_text("{}")
    (folder / "whose").write_text(name)


KILLED = "0123456789abcdef"  # its lease is gone


@pytest.mark.parametrize("furthest", ["left", "00000000.left", "ffffffff.left", KILLED])
def test_of_what_several_tries_left_the_next_one_goes_on_with_what_got_furthest(store: Store, furthest: str) -> None:
    names = ["left", "00000000.left", "ffffffff.left", KILLED]
    leave(store, furthest, "step-00000009", "step-00000010")
    for name in set(names) - {furthest}:  # later, so that they are younger
        leave(store, name, "step-00000009", ".step-00000099")
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert (out / "whose").read_text() == furthest


def test_what_was_built_is_further_than_any_checkpoint(store: Store) -> None:
    assert publish_in_a_process(store, "between the renames") == -9
    leave(store, "00000000.left", "step-00000009")
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert store.built(out, KEY, KEPT)


def test_a_try_that_fails_leaves_what_it_has_beside_what_others_left(store: Store) -> None:
    leave(store, "00000000.left", "step-00000003")
    leave(store, KILLED, "step-00000005")
    with pytest.raises(KeyError), store.scratch("model", KEY, inherits=KEPT):
        raise KeyError
    found = sorted(path.name for path in (store.root / ".scratch").glob("*/checkpoints/step-*"))
    assert found == ["step-00000003", "step-00000005"]
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert (out / "whose").read_text() == KILLED


def test_after_a_fresh_build_that_was_not_published_nobody_goes_back_to_what_was_left_before(store: Store) -> None:
    for name in ("left", "00000000.left", KILLED):
        leave(store, name, "step-00000009")
    with store.scratch("model", KEY, inherits=KEPT, fresh=True) as out:
        (out / "checkpoints" / "step-00000001").mkdir(parents=True)
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]


DEATHS = {
    "before the manifest": "folders.write_manifest = die",
    "in the manifest": "folders.write_manifest = lambda out, made: die((out / 'manifest.json').write_text('{'))",
    "before the checkpoints are gone": "folders.Store._spent = die",
    "between the renames": "folders.Store._rename = die",
}


def publish_in_a_process(store: Store, death: str) -> int:
    """Build a model, or finish one, in a process that dies of a signal at some point of publishing."""
    code = f"""
import os
from pathlib import Path
from tasks.store import store as folders
from tasks.store.manifest import Manifest, content_digest
die = lambda *given: os.kill(os.getpid(), 9)
{DEATHS[death]}
store = folders.Store(Path({str(store.root)!r}))
with store.scratch("model", {KEY!r}, inherits={KEPT!r}, recipe={RECIPE!r}) as out:
    made = store.built(out, {KEY!r}, {KEPT!r})
    if not made:
        (out / "checkpoints" / "step-7").mkdir()
        (out / "a.bin").write_bytes(b"hello")
        files = folders.entries(out)
        made = Manifest({KEY!r}, "model", {RECIPE!r}, files, content_digest(files))
    store.publish(out, made)
"""
    return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode


@pytest.mark.parametrize("death", ["before the checkpoints are gone", "between the renames"])
def test_what_was_built_when_a_kill_cut_its_publishing_short_is_published_as_it_is(store: Store, death: str) -> None:
    assert publish_in_a_process(store, death) == -9
    assert store.look("model", KEY) is None
    assert publish_in_a_process(store, death) == -9, "the second try, too, is killed while it publishes"
    with store.scratch("model", KEY, inherits=KEPT, recipe=RECIPE) as out:
        made = store.built(out, KEY, KEPT)
        assert made
        folder, _ = store.publish(out, made)
    assert store.look("model", KEY) == made
    assert {path.name for path in folder.iterdir()} == {"a.bin", "manifest.json"} == {*made.files, "manifest.json"}
    assert list((store.root / ".scratch").iterdir()) == []


def test_a_manifest_is_not_written_again_by_who_finishes_the_publishing(store: Store) -> None:
    assert publish_in_a_process(store, "between the renames") == -9
    assert publish_in_a_process(store, "in the manifest") == 0
    assert isinstance(store.look("model", KEY), Manifest)


@pytest.mark.parametrize("death", ["before the manifest", "in the manifest"])
def test_a_kill_before_the_manifest_is_whole_leaves_the_checkpoints_and_nothing_to_publish(
    store: Store, death: str
) -> None:
    assert publish_in_a_process(store, death) == -9
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert store.built(out, KEY, KEPT) is None
        assert {path.name for path in out.iterdir()} == {"checkpoints"}
        assert (out / "checkpoints" / "step-7").exists()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_was_built_and_then_altered_is_not_published(store: Store, mutation: str) -> None:
    assert publish_in_a_process(store, "between the renames") == -9
    (scratch,) = (store.root / ".scratch").iterdir()
    MUTATIONS[mutation](scratch / "a.bin")
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert store.built(out, KEY, KEPT) is None
        assert not {path.name for path in out.iterdir()} - {*KEPT}, "or it would be taken for a file of the artifact"


@pytest.mark.parametrize("name", [".tmpABCDEF", "pytorch_model.bin"])
def test_what_was_built_is_not_published_with_a_file_beside(store: Store, name: str) -> None:
    assert publish_in_a_process(store, "between the renames") == -9
    (scratch,) = (store.root / ".scratch").iterdir()
    (scratch / name).write_text("x")
    with store.scratch("model", KEY, inherits=KEPT) as out:
        assert store.built(out, KEY, KEPT) is None
        assert not (out / name).exists()


def test_what_was_built_of_another_key_with_the_same_first_digits_is_not_published(store: Store) -> None:
    assert publish_in_a_process(store, "between the renames") == -9
    with store.scratch("model", KEY[:12] + "f" * 52, inherits=KEPT) as out:
        assert store.built(out, KEY[:12] + "f" * 52, KEPT) is None


def test_a_fresh_build_does_not_see_what_was_built_before(store: Store) -> None:
    assert publish_in_a_process(store, "between the renames") == -9
    with store.scratch("model", KEY, inherits=KEPT, fresh=True) as out:
        assert list(out.iterdir()) == []


def test_a_living_process_keeps_its_scratch_folder_to_itself(store: Store) -> None:
    with store.scratch("model", KEY, inherits=KEPT) as first, store.scratch("model", KEY, inherits=KEPT) as second:
        assert first != second


@pytest.mark.parametrize("name", ["..", "/etc", "a/b", "A", "", "x\0", "." * 64, "F" * 64, "f" * 63])
def test_names_cannot_leave_the_store(store: Store, name: str) -> None:
    pytest.raises(StoreError, store.folder, "messages", name)
    if name != "x":
        pytest.raises(StoreError, store.folder, name, KEY)


@pytest.mark.parametrize(
    "broken",
    [
        b"", b"{", b"[]", b"null", b'{"schema": 99, "seal": ""}', b'{"seal": 1, "schema": "x"}', b"\xff\xfe",
        b"[" * 200_000, b'{"seal":' * 200_000, b'{"seal": 1, "schema": 1' + b"1" * 5_000 + b"}", b" " * (17 << 20),
    ],
    ids=lambda content: f"{content[:8]!r} of {len(content)}",
)  # fmt: skip
def test_a_broken_manifest_is_unreadable_and_never_a_crash(store: Store, broken: bytes) -> None:
    folder, _ = publish(store)
    (folder / "manifest.json").write_bytes(broken)
    pytest.raises(UnreadableManifest, read_manifest, folder)
    assert isinstance(store.look("messages", KEY), Fault)
    assert store.manifests() == []


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../secret": {"bytes": 1, "sha256": ""}}},
        {"files": {"manifest.json": {"bytes": 1, "sha256": ""}}},
        {"files": []},
        {"files": {"a": {"bytes": -1, "sha256": ""}}},
        {"created": 5},
        {"counts": []},
        {"origin": []},
        {"more": 1},
        {"recipe": {"inputs": []}},
        {"recipe": {"step": 5}},
        {"recipe": {"params": []}},
        {"kind": "tokens"},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_passed_over_and_named_though_its_seal_is_right(
    store: Store, change: dict[str, Any]
) -> None:
    """A seal is only a hash: who makes up a manifest can make it up, too."""
    folder, _ = publish(store)
    body = {**json.loads((folder / "manifest.json").read_bytes()), **change}
    body["key"] = sha256_of(body["recipe"])
    del body["seal"]
    (folder / "manifest.json").write_text(json.dumps({"seal": sha256_of(body), **body}))
    assert store.manifests() == []
    assert [line.partition(":")[0] for line in store.passed_over()] == [f"messages/{KEY[:12]}"]
    assert len(store.verify(folder)) == 1
    assert garbage(store, 0, time.time() + 86_400) == []


def test_a_manifest_that_could_not_be_read_again_is_not_written(store: Store) -> None:
    counts = {"words": ["x" * 1000] * 20_000}
    with pytest.raises(StoreError, match="at most 16,777,216 are read"), store.scratch("messages", KEY) as out:
        store.publish(out, Manifest(KEY, "messages", RECIPE, {}, "", counts))


def test_a_kind_that_is_a_link_is_named_and_nothing_behind_it_is_used(store: Store, tmp_path: Path) -> None:
    folder, _ = publish(store)
    folder.parent.rename(tmp_path / "elsewhere")
    folder.parent.symlink_to(tmp_path / "elsewhere")
    (store.root / "model").symlink_to(store.root / "model")
    assert store.look("messages", KEY) is None
    assert (store.folders(), store.folders("messages"), store.manifests()) == ([], [], [])
    assert store.passed_over() == ["messages: is a link", "model: is a link"]
    assert garbage(store, 0, time.time() + 86_400) == [], "what was noted of its hashes stays, too"
    with pytest.raises(StoreError, match="is a link"):
        publish(store)
    assert publish(store, recipe={"step": "parse", "version": 2}, kind="tokens")[0].exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_config.json", "folder", "link"])
def test_verifying_names_what_was_added(store: Store, name: str) -> None:
    folder, _ = publish(store)
    assert store.verify(folder) == []
    path = folder / name
    {"folder": path.mkdir, "link": lambda: path.symlink_to("a.bin")}.get(name, path.touch)()
    assert [fault.file for fault in store.verify(folder)] == [name]


def flip_below(path: Path, memory: Path) -> None:
    """Alter a file so that nothing tells, as the disk below the file system can: its identity is noted as hashed."""
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    noted = json.loads(memory.read_bytes())
    noted[path.name][1] = identity(path)
    memory.write_text(json.dumps(noted))


def test_after_verifying_found_a_fault_the_next_use_finds_it_too(store: Store) -> None:
    folder, _ = publish(store)
    flip_below(folder / "a.bin", store.root / ".verified" / f"messages-{KEY[:12]}.json")
    assert isinstance(store.look("messages", KEY), Manifest), "a use trusts an unchanged identity"
    assert [fault.file for fault in store.verify(folder)] == ["a.bin"]
    assert isinstance(store.look("messages", KEY), Fault)


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again_at_the_next_use(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store)
    (store.root / ".verified" / f"messages-{KEY[:12]}.json").unlink()

    def hash_then_change(path: Path) -> str:
        digest = sha256_file(path)
        path.write_bytes(b"jello" if path.name == "a.bin" else path.read_bytes())
        return digest

    monkeypatch.setattr("tasks.store.integrity.sha256_file", hash_then_change)
    assert isinstance(store.look("messages", KEY), Manifest)
    monkeypatch.undo()
    assert isinstance(store.look("messages", KEY), Fault)


def test_every_use_hashes_again_where_that_is_asked_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = publish(store)
    flip_below(folder / "a.bin", store.root / ".verified" / f"messages-{KEY[:12]}.json")
    monkeypatch.setenv("TREELINE_REHASH", "0")
    assert isinstance(store.look("messages", KEY), Manifest)
    monkeypatch.setenv("TREELINE_REHASH", "1")
    assert isinstance(store.look("messages", KEY), Fault)


def test_a_manifest_with_one_altered_number_is_refused(store: Store) -> None:
    folder, _ = publish(store)
    body = json.loads((folder / "manifest.json").read_bytes())
    body["counts"]["rows"] = 2
    (folder / "manifest.json").write_text(json.dumps(body))
    pytest.raises(UnreadableManifest, read_manifest, folder)


def test_odd_files_in_the_store_are_passed_over(store: Store) -> None:
    publish(store)
    for name in ("lost+found", ".DS_Store", ".nfs0001", "messages/.nfs0001", "messages/notes"):
        path = store.root / name
        path.mkdir() if name == "lost+found" else path.write_text("x")
    (store.folders()[0] / ".DS_Store").write_text("x")
    assert len(store.manifests()) == 1
    assert isinstance(store.look("messages", KEY), Manifest)


def test_a_disk_that_refuses_is_said_with_what_to_do(store: Store) -> None:
    store.root.parent.mkdir(exist_ok=True)
    store.root.write_text("a file where the store should be")
    with pytest.raises(StoreError, match=r"error\[store.create\].*TREELINE_ARTIFACTS") as refused:
        publish(store)
    assert refused.value.exit_code == 73
