"""Laws of the recipes that follow others: they keep what these others' loaders keep, on the same files."""

import gzip
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows import recipe
from tasks.artifacts import Dialogues, Messages, RawTrees
from tasks.curate import CurateParams, CurateRuntime, curate
from tasks.parse import ParseParams, parse
from tasks.store.manifest import FileEntry, Manifest

FILES = ("oasst1_en_validation.trees.jsonl.gz", "en_100_tree.jsonl")
Node = dict[str, Any]
Thread = tuple[str, ...]  # ids of messages, from the first prompt on


def trees_of(path: Path) -> list[Node]:
    """Read the trees of a file, each once: some files repeat trees."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    trees = [json.loads(line) for line in content.splitlines()]
    return list({tree["message_tree_id"]: tree for tree in reversed(trees)}.values())[::-1]


def curated(path: Path, folder: Path, params: CurateParams) -> pl.DataFrame:
    """Return what the data half makes of a file."""
    for name in ("raw", "messages", "dialogues"):
        (folder / name).mkdir()
    (folder / "raw" / path.name).write_bytes(path.read_bytes())
    raw = RawTrees(folder / "raw", Manifest("0" * 64, "raw", {}, {path.name: FileEntry(0, "0" * 64)}, "0" * 64))
    parse.function(folder / "messages", raw, ParseParams())
    messages = Messages(folder / "messages", Manifest("0" * 64, "messages", {}, {}, "0" * 64))
    curate.function(folder / "dialogues", messages, params, CurateRuntime(workers=1))
    return Dialogues(folder / "dialogues", Manifest("0" * 64, "dialogues", {}, {}, "0" * 64)).scan().collect()


def kept_threads(kept: pl.DataFrame) -> set[Thread]:
    """Return the way from the root to each kept message that nothing kept answers."""
    above = dict(kept.select("message_id", "parent_id").iter_rows())
    found = set()
    for leaf in {*above} - {*above.values()}:
        way = [leaf]
        while above[way[-1]]:
            way.append(above[way[-1]])
        found.add(tuple(reversed(way)))
    return found


def threads_of(node: Node, above: tuple[Node, ...] = ()) -> Iterator[tuple[Node, ...]]:
    thread = (*above, node)
    if not node.get("replies"):
        yield thread
    for reply in node.get("replies") or []:
        yield from threads_of(reply, thread)


def reference_threads(tree: Node, top_k: int) -> Iterator[Thread]:
    """Yield what Open-Assistant's `load_oasst_export` yields of a tree, written anew from its description."""
    prompt = tree["prompt"]
    if tree["tree_state"] != "ready_for_export" or not prompt.get("review_result") or prompt.get("lang") != "en":
        return
    for thread in threads_of(prompt):
        spoilt = any(node.get("deleted") or node.get("synthetic") for node in thread)
        for above, node in pairwise(thread):
            rank = node.get("rank")
            if node["role"] == "assistant":
                spoilt |= len(above["replies"]) > 1 if rank is None else rank >= top_k
        if spoilt or len(thread) < 2:
            continue
        if thread[-1]["role"] == "prompter" and thread[-2]["replies"][0] is not thread[-1]:
            continue
        ends = len(thread) - (thread[-1]["role"] == "prompter")
        yield tuple(node["message_id"] for node in thread[:ends])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_loader_of_open_assistant_is_followed_thread_by_thread(
    name: str, top_k: int, shared: Path, tmp_path: Path
) -> None:
    wanted = {thread for tree in trees_of(shared / "data" / name) for thread in reference_threads(tree, top_k)}
    longest = wanted - {thread[:end] for thread in wanted for end in range(len(thread))}  # a tree says each part once
    params = recipe.load("open-assistant", [f"curate.top_k={top_k}"]).curate
    kept = curated(shared / "data" / name, tmp_path, params)
    assert kept_threads(kept) == longest
    assert len(longest) > 20
    assert set(kept["message_id"]) == {message for thread in wanted for message in thread}


@pytest.mark.parametrize("name", FILES)
def test_the_seeds_pairs_are_all_there_in_its_order(name: str, shared: Path, tmp_path: Path) -> None:
    wanted = [
        (tree["prompt"]["text"], reply["text"])
        for tree in trees_of(shared / "data" / name)
        for reply in tree["prompt"].get("replies") or []
    ]
    kept = curated(shared / "data" / name, tmp_path, recipe.load("seed").curate)
    text = dict(kept.select("message_id", "text").iter_rows())
    first = kept.filter(depth=1).select("parent_id", "text")
    assert [(text[prompt], reply) for prompt, reply in first.iter_rows()] == wanted
