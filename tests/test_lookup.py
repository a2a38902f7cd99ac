"""Laws of looking up: who names no artifact sees that of the last run."""

import os
from pathlib import Path

import pytest

from tasks.artifacts import Dialogues
from tasks.lookup import seen
from tasks.store.canonical import sha256_of
from tasks.store.manifest import Manifest, content_digest
from tasks.store.store import Store, entries

KIND = Dialogues.kind


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path))
    return Store(tmp_path)


def publish(store: Store, content: str) -> str:
    """Publish dialogues, each younger than those before, and return their id."""
    recipe = {"step": "curate", "version": 1, "params": {"say": content}, "inputs": {}}
    key = sha256_of(recipe)
    with store.scratch(KIND, key) as out:
        (out / "dialogues.parquet").write_text(content)
        files = entries(out)
        store.publish(out, Manifest(key, KIND, recipe, files, content_digest(files), {}))
    return f"{KIND}/{key[:12]}"


def age(store: Store, recipe: str, seconds: int) -> None:
    os.utime(store.root / ".refs" / f"{recipe}.json", (seconds, seconds))


def test_what_the_last_run_ended_with_is_seen_though_another_run_made_a_younger_one(store: Store) -> None:
    old, young = publish(store, "old"), publish(store, "young")
    assert seen(Dialogues, KIND).id == young
    store.record_run("first", {"curate": old})
    age(store, "first", 1)
    store.record_run("second", {"curate": young})
    age(store, "second", 2)
    assert seen(Dialogues, KIND).id == young
    store.record_run("first", {"curate": old})  # again, from the store: nothing new to note but the time
    assert seen(Dialogues, KIND).id == old
    assert seen(Dialogues, young).id == young


def test_where_no_run_ended_with_one_that_is_there_the_youngest_is_seen(store: Store) -> None:
    publish(store, "old")
    young = publish(store, "young")
    store.record_run("data", {"parse": "messages/0123456789ab", "curate": f"{KIND}/0123456789ab"})
    (store.root / ".refs" / "broken.json").write_text("{")
    assert seen(Dialogues, KIND).id == young
