"""Laws of collecting: nothing that is needed goes, a dry run tells the truth."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import StoreError
from tasks.store.canonical import sha256_of
from tasks.store.collect import garbage, lineage, remove
from tasks.store.integrity import Fault
from tasks.store.lease import lease
from tasks.store.lock import single_flight
from tasks.store.manifest import FileEntry, Manifest, content_digest
from tasks.store.store import Store, entries

LATER = time.time() + 86_400
KEPT = ("checkpoints",)


def publish(
    store: Store, kind: str, content: str, inputs: dict[str, str], origin: dict[str, Any] | None = None
) -> Manifest:
    recipe = {"step": kind, "version": 1, "params": {"content": content}, "inputs": inputs}
    with store.scratch(kind, sha256_of(recipe)) as out:
        (out / "a.txt").write_text(content)
        files = entries(out)
        return store.publish(
            out, Manifest(sha256_of(recipe), kind, recipe, files, content_digest(files), origin=origin or {})
        )[1]


def name(manifest: Manifest) -> str:
    return f"{manifest.kind}/{manifest.key[:12]}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_the_last_run_of_a_recipe_and_what_it_was_made_from_stay(store: Store) -> None:
    raw = publish(store, "raw", "trees", {})
    old = publish(store, "messages", "old", {"raw": raw.digest})
    new = publish(store, "messages", "new", {"raw": raw.digest})
    store.record_run("quickstart", {"parse": name(new)})
    assert [path.name for path in garbage(store, 0, LATER)] == [old.key[:12]]
    remove(garbage(store, 0, LATER), store)
    assert {name(made) for _, made in store.manifests()} == {name(raw), name(new)}


def test_a_run_that_is_forgotten_keeps_nothing_and_others_keep_what_they_share(store: Store) -> None:
    raw = publish(store, "raw", "trees", {})
    base, arm = (publish(store, "model", word, {"raw": raw.digest}) for word in ("base", "arm"))
    store.record_run("quickstart", {"train": name(base)})
    store.record_run("quickstart-1a2b", {"train": name(arm)})
    assert garbage(store, 0, LATER) == []
    assert [path.name for path in garbage(store, 0, LATER, ["quickstart-1a2b"])] == [arm.key[:12]]
    store.forget(["quickstart-1a2b"])
    assert store.runs() == ["quickstart"]
    assert [path.name for path in garbage(store, 0, LATER)] == [arm.key[:12]]


def test_a_run_that_stopped_early_takes_nothing_away(store: Store) -> None:
    raw, model = publish(store, "raw", "trees", {}), publish(store, "model", "weights", {})
    store.record_run("quickstart", {"download": name(raw), "train": name(model)})
    store.record_run("quickstart", {"download": name(raw)})
    assert garbage(store, 0, LATER) == []


def test_the_results_for_single_texts_of_an_earlier_version_go(store: Store) -> None:
    made = publish(store, "tokens", "ids", {}, {"texts": {".memo/test-0123456789ab": {"asked": 1}}})
    store.record_run("quickstart", {"encode": name(made)})
    part = store.root / ".memo" / "test-0123456789ab" / f"{'0' * 64}.arrow"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"rows")
    (store.root / ".verified").mkdir(exist_ok=True)
    hashes = store.root / ".verified" / "memo-test-0123456789ab.json"
    hashes.write_text("{}")
    assert garbage(store, 0, LATER) == [store.root / ".memo", hashes]
    remove(garbage(store, 0, LATER), store)
    assert not part.exists()
    assert garbage(store, 0, LATER) == []


@pytest.mark.parametrize("recipe", ["../x", "a/b", "", ".x", "x" * 65])
def test_a_recipe_cannot_be_noted_outside_of_the_store(store: Store, recipe: str) -> None:
    with pytest.raises(StoreError):
        store.record_run(recipe, {})


def test_what_a_running_program_holds_stays(store: Store) -> None:
    held, loose = publish(store, "raw", "held", {}), publish(store, "raw", "loose", {})
    with lease(store.root) as mine:
        mine.hold(name(held))
        assert [path.name for path in garbage(store, 0, LATER)] == [loose.key[:12]]


def test_what_a_dead_program_held_goes_and_its_lease_with_it(store: Store) -> None:
    held = publish(store, "raw", "held", {})
    with lease(store.root) as mine:
        mine.hold(name(held))
        dead = mine.path.with_name("0123456789abcdef")
        shutil.copyfile(mine.path, dead)  # nobody holds a lock on the copy, as after a kill
    assert [path.name for path in garbage(store, 0, LATER)] == [held.key[:12], dead.name]


def test_what_a_program_takes_hold_of_while_garbage_is_decided_stays(store: Store) -> None:
    first, second = publish(store, "raw", "first", {}), publish(store, "raw", "second", {})
    unused = garbage(store, 0, LATER)
    with lease(store.root) as mine:
        mine.hold(name(first))
        remove(unused, store)
    assert {path.name for path in unused} == {first.key[:12], second.key[:12]}
    assert [name(made) for _, made in store.manifests()] == [name(first)]


def test_what_is_left_over_in_the_stores_own_folders_goes_and_what_is_in_use_stays(store: Store) -> None:
    made, gone = publish(store, "raw", "trees", {}), publish(store, "raw", "others", {})
    store.record_run("quickstart", {"download": name(made)})
    shutil.rmtree(store.folder("raw", gone.key))
    drafts = [".clock.a", ".refs/.x.json.a", ".verified/.raw-a.json.b", ".leases/.c"]
    (store.root / ".leases").mkdir(exist_ok=True)
    for draft in drafts:
        (store.root / draft).write_text("half")
    free, used = (store.root / ".locks" / f"{word}.lock" for word in ("free", "used"))
    with single_flight(free, ""), single_flight(used, ""):
        pass
    with single_flight(used, ""):
        left = {str(path.relative_to(store.root)) for path in garbage(store, 0, time.time() + 3_600)}
        assert left == {".locks/free.lock", f".verified/raw-{gone.key[:12]}.json"}, "drafts may still be written"
        found = garbage(store, 0, time.time() + 2 * 86_400)
        assert {str(path.relative_to(store.root)) for path in found} == {*left, *drafts}
        remove(found, store)
    assert used.exists()
    assert [path.name for path in (store.root / ".verified").iterdir()] == [f"raw-{made.key[:12]}.json"]


def test_what_was_noted_of_an_artifact_goes_with_it(store: Store) -> None:
    publish(store, "raw", "trees", {})
    remove(garbage(store, 0, LATER), store)
    assert list((store.root / ".verified").iterdir()) == []


def test_what_is_younger_than_the_grace_time_stays(store: Store) -> None:
    publish(store, "raw", "young", {})
    assert garbage(store, grace=3600) == []
    assert len(garbage(store, 3600, now=time.time() + 7200)) == 1


@pytest.mark.parametrize("broken", ["", "{", '{"parse": 5}', '"x"'])
def test_with_unreadable_roots_nothing_is_removed(store: Store, broken: str) -> None:
    publish(store, "raw", "trees", {})
    (store.root / ".refs").mkdir()
    (store.root / ".refs" / "quickstart.json").write_text(broken)
    pytest.raises(StoreError, garbage, store, 0, LATER)


def test_a_checkpoint_is_kept_for_a_week_and_dead_scratch_is_not(store: Store) -> None:
    for folder in ("resume-model-aaaaaaaaaaaa.left", "tokens-bbbbbbbbbbbb.no.such.process"):
        (store.root / ".scratch" / folder).mkdir(parents=True)
    assert [path.name for path in garbage(store, 0, LATER)] == ["tokens-bbbbbbbbbbbb.no.such.process"]


def left(store: Store, recipe: dict[str, Any]) -> Path:
    """What a try left that was cut short."""
    with pytest.raises(KeyError), store.scratch("model", sha256_of(recipe), inherits=KEPT, recipe=recipe):
        raise KeyError
    (folder,) = (store.root / ".scratch").glob(f"resume-model-{sha256_of(recipe)[:12]}.*.left")
    return folder


def test_what_an_unfinished_build_was_begun_with_stays_as_long_as_a_next_try_may_go_on(store: Store) -> None:
    raw = publish(store, "raw", "trees", {})
    tokens, loose = publish(store, "tokens", "ids", {"raw": raw.digest}), publish(store, "tokens", "others", {})
    before = publish(store, "model", "weights", {})
    folder = left(store, {"step": "train", "inputs": {"tokens": tokens.digest}, "params": {"model": before.digest}})
    assert [path.name for path in garbage(store, 0, LATER)] == [loose.key[:12]]
    week = time.time() + 8 * 86_400
    made = [store.folder(one.kind, one.key) for one in (raw, tokens, loose, before)]
    assert sorted(garbage(store, 0, week)) == sorted([*made, folder])


def test_what_a_build_that_lacks_only_its_name_was_begun_with_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = publish(store, "tokens", "ids", {})
    recipe = {"step": "train", "inputs": {"tokens": tokens.digest}}
    monkeypatch.setattr(Store, "_rename", Mock(side_effect=KeyboardInterrupt))
    with (
        pytest.raises(KeyboardInterrupt),
        store.scratch("model", sha256_of(recipe), KEPT, recipe=recipe) as out,
    ):
        store.publish(out, Manifest(sha256_of(recipe), "model", recipe, {}, ""))
    assert garbage(store, 0, LATER) == list((store.root / ".aside").iterdir()), "its checkpoints"


def test_what_was_left_of_a_build_that_is_finished_by_now_goes_and_keeps_nothing(store: Store) -> None:
    tokens = publish(store, "tokens", "ids", {})
    made = publish(store, "model", "weights", {"tokens": tokens.digest})
    other, folder = left(store, {"step": "train"}), left(store, made.recipe)
    finished = [store.folder(one.kind, one.key) for one in (tokens, made)]
    assert sorted(garbage(store, 0, LATER)) == sorted([*finished, folder])
    assert garbage(store, 3600) == [], "not within the grace time"
    store.record_run("quickstart", {"train": name(made)})
    remove(garbage(store, 0, LATER), store)
    assert list((store.root / ".scratch").iterdir()) == [other]


def test_what_a_living_process_builds_by_force_stays_though_that_is_finished(store: Store) -> None:
    made = publish(store, "model", "weights", {})
    store.record_run("quickstart", {"train": name(made)})
    with store.scratch("model", made.key, inherits=KEPT, fresh=True, recipe=made.recipe):
        assert garbage(store, 0, LATER) == []


def test_a_checkpoint_of_this_hour_keeps_a_build_that_began_weeks_ago(store: Store) -> None:
    folder = left(store, {"step": "train"})
    folder.rename(folder.with_name("resume-model-aaaaaaaaaaaa.no.such.process"))
    os.utime(folder.with_name("resume-model-aaaaaaaaaaaa.no.such.process") / "checkpoints", (LATER, LATER))
    assert garbage(store, 0, LATER + 6.5 * 86_400) == []


@pytest.mark.parametrize("broken", ["", "{", "[1]", "5", '"x"'])
def test_with_an_unreadable_recipe_of_an_unfinished_build_nothing_is_removed(store: Store, broken: str) -> None:
    publish(store, "raw", "trees", {})
    (left(store, {"step": "train"}) / "checkpoints" / "recipe.json").write_text(broken)
    pytest.raises(StoreError, garbage, store, 0, LATER)


def test_a_store_stays_usable_after_collecting(store: Store) -> None:
    raw = publish(store, "raw", "trees", {})
    store.record_run("r", {"download": name(raw)})
    remove(garbage(store, 0, LATER), store)
    assert not isinstance(store.look("raw", raw.key), Fault)
    assert json.loads((store.root / ".refs" / "r.json").read_text()) == {"download": name(raw)}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20), st.sets(st.integers(0, 9)))
def test_the_live_set_is_closed_under_what_things_were_made_from(edges: list[tuple[int, int]], roots: set[int]) -> None:
    def manifest(number: int) -> tuple[Path, Manifest]:
        inputs = {str(made_of): f"{made_of:064x}" for maker, made_of in edges if maker == number}
        folder = Path("raw") / f"{number:012x}"
        return folder, Manifest("", "raw", {"inputs": inputs}, {"a": FileEntry(0, "")}, f"{number:064x}")

    live = lineage([manifest(number) for number in range(10)], {f"raw/{number:012x}" for number in roots})
    assert {f"raw/{number:012x}" for number in roots} <= live
    for maker, made_of in edges:
        assert f"raw/{maker:012x}" not in live or f"raw/{made_of:012x}" in live
