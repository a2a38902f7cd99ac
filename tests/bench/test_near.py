"""Near copies against rensa and datasketch: the same normalised texts, n-grams, permutations and threshold, one run.

`python -m pytest -m bench -n 0 -s tests/bench/test_near.py`. The texts are OASST2-sized where $TREELINE_BENCH_TREES
names a file that `shared/bench/make_oasst.py` made, with its truth file beside it; otherwise they are made here, a
tenth of that. CPU seconds of this process, each contender twice, in turns, the better taken.
"""

import gzip
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.dialogue.dedupe import normalised
from tasks.dialogue.near import pairs

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]
NGRAM, PERMUTATIONS, THRESHOLD = 3, 128, 0.8
Planted = list[tuple[int, int]]  # texts that are near copies by the truth file, or by how they were made


def made_here() -> tuple[list[str], Planted]:
    """Write 13,000 texts of up to 200 words out of 20,000, every tenth with an edited copy."""
    draw = random.Random(0)
    texts: list[str] = []
    planted = []
    for number in range(13_000):
        words = [f"word{int(20_000 * draw.random() ** 3)}" for _ in range(draw.randrange(20, 200))]
        texts.append(" ".join(words))
        if number % 10 == 0:
            words[-1] = "edited"
            texts.append(" ".join(words))
            planted.append((len(texts) - 2, len(texts) - 1))
    return texts, planted


def messages_of(node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    waiting = [node]
    while waiting:
        found = waiting.pop()
        yield found["message_id"], found["text"]
        waiting.extend(found["replies"])


def read(trees: Path) -> tuple[list[str], Planted]:
    with gzip.open(trees) as lines:
        said = dict(message for line in lines for message in messages_of(json.loads(line)["prompt"]))
    number: dict[str, int] = {}
    plain = normalised(pl.Series(said.values()))
    text_of = {name: number.setdefault(text, len(number)) for name, text in zip(said, plain, strict=True)}
    truth = [json.loads(line) for line in Path(f"{trees}.truth.jsonl").read_text().splitlines()]
    near = [(text_of[one["id"]], text_of[one["of"]]) for one in truth if one["kind"] == "near" and one["j3"] >= 0.8]
    return [*number], [(min(pair), max(pair)) for pair in near if pair[0] != pair[1]]


def shingles(texts: list[str]) -> list[list[str]]:
    split = [text.split(" ") for text in texts]
    return [
        [" ".join(words[at : at + NGRAM]) for at in range(max(1, len(words) - NGRAM + 1))] for words in split
    ]  # fmt: skip


def ours(texts: list[str]) -> set[tuple[int, int]]:
    left, right, _ = pairs(texts, NGRAM, PERMUTATIONS, THRESHOLD)
    return set(zip(left.tolist(), right.tolist(), strict=True))


def rensa(texts: list[str]) -> set[tuple[int, int]]:
    library = pytest.importorskip("rensa")
    hashed = library.RMinHash.from_token_sets(shingles(texts), PERMUTATIONS, 42)
    index = library.RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=16)
    index.insert_many(hashed)
    return {(one, at) for at, alike in enumerate(index.query_all(hashed)) for one in alike if one < at}


def datasketch(texts: list[str]) -> set[tuple[int, int]]:
    library = pytest.importorskip("datasketch")
    hashing = pytest.importorskip("xxhash").xxh32_intdigest
    index, found = library.MinHashLSH(num_perm=PERMUTATIONS, params=(16, 8)), set()
    encoded = [[gram.encode() for gram in grams] for grams in shingles(texts)]
    for at, one in enumerate(library.MinHash.generator(encoded, num_perm=PERMUTATIONS, hashfunc=hashing)):
        found |= {(other, at) for other in index.query(one)}
        index.insert(at, one, check_duplication=False)
    return found


def seconds(work: Callable[[list[str]], set[tuple[int, int]]], texts: list[str]) -> tuple[float, set[tuple[int, int]]]:
    before = resource.getrusage(resource.RUSAGE_SELF)
    found = work(texts)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, found


@pytest.mark.parametrize("peer", [rensa, datasketch], ids=["rensa", "datasketch"])
def test_near_copies_are_found_faster_than_by(peer: Callable[[list[str]], set[tuple[int, int]]]) -> None:
    trees = os.environ.get("TREELINE_BENCH_TREES")
    texts, planted = read(Path(trees)) if trees else made_here()
    best: dict[str, float] = {}
    for name, work in [("ours", ours), ("peer", peer)] * 2:
        spent, found = seconds(work, texts)
        best[name] = min(spent, best.get(name, spent))
        if name == "ours":
            assert sum(pair in found for pair in planted) >= 0.99 * len(planted)
    recall = sum(pair in found for pair in planted) / len(planted)
    print(
        f"\n{len(texts):,} texts: ours {best['ours']:.2f} CPU s, recall >= .99, verified; {peer.__name__} "
        f"{best['peer']:.2f} CPU s, recall {recall:.3f}, not verified: {best['peer'] / best['ours']:.1f} times as fast"
    )
