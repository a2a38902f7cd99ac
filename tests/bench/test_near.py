"""Copies and near copies against rensa, datasketch, text-dedup and datatrove.

`python -m pytest -m bench -n 0 -s tests/bench/test_near.py`. The texts are OASST2-sized where $TREELINE_BENCH_TREES
names a file that `shared/bench/make_oasst.py` made, with its truth file beside it; otherwise they are made here, a
tenth of that. All contenders get the same raw texts, n-grams, permutations and threshold. Ours is timed whole: with
normalising, exact copies, counting of every pair and all that is reported; a peer without verifying what it proposes,
and without normalising where it has no such step. CPU seconds of this process, in turns, the best of each taken.
"""

import gzip
import json
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tasks.dialogue.minhash import compute
from tasks.dialogue.near_duplicates import Pairs, Prints, numbered, pairs

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]
NGRAM, PERMUTATIONS, THRESHOLD = 3, 128, 0.8
Links = list[tuple[int, int]]  # rows that are said to be copies or near copies
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
    row_of = {name: row for row, name in enumerate(said)}
    truth = [json.loads(line) for line in Path(f"{trees}.truth.jsonl").read_text().splitlines()]
    near = [one for one in truth if one["kind"] == "near" and one["j3"] >= 0.8]
    return [*said.values()], [(row_of[one["id"]], row_of[one["of"]]) for one in near]


def given() -> tuple[list[str], Planted]:
    trees = os.environ.get("TREELINE_BENCH_TREES")
    return read(Path(trees)) if trees else made_here()


def shingles(texts: list[str]) -> list[list[str]]:
    split = [text.split() for text in texts]
    return [
        [" ".join(words[at : at + NGRAM]) for at in range(max(1, len(words) - NGRAM + 1))] for words in split
    ]  # fmt: skip


def prints_of(texts: pa.Array) -> Prints:
    return Prints.of(compute(texts, NGRAM, PERMUTATIONS, THRESHOLD))


def compared(prints: Prints, texts: pa.Array) -> tuple[np.ndarray, Pairs]:
    """Return of each row the first row of the same text, and pairs of such rows that are alike."""
    number, first = numbered(prints, np.arange(len(texts)))
    found = pairs(prints.take(first), lambda at: texts.take(pa.array(first[at])), NGRAM, THRESHOLD)
    return first[number], replace(found, left=first[found.left], right=first[found.right])


def ours(texts: list[str]) -> Links:
    column = pa.array(texts, pa.large_string())
    same, alike = compared(prints_of(column), column)
    copies = [(row, first) for row, first in enumerate(same.tolist()) if row != first]
    return copies + list(zip(alike.left.tolist(), alike.right.tolist(), strict=True))


def rensa(texts: list[str]) -> Links:
    library = pytest.importorskip("rensa")
    hashed = library.RMinHash.from_token_sets(shingles(texts), PERMUTATIONS, 42)
    index = library.RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=16)
    index.insert_many(hashed)
    return [(one, at) for at, alike in enumerate(index.query_all(hashed)) for one in alike if one < at]


def datasketch(texts: list[str]) -> Links:
    library = pytest.importorskip("datasketch")
    hashing = pytest.importorskip("xxhash").xxh32_intdigest
    index, found = library.MinHashLSH(num_perm=PERMUTATIONS, params=(16, 8)), []
    encoded = [[gram.encode() for gram in grams] for grams in shingles(texts)]
    for at, one in enumerate(library.MinHash.generator(encoded, num_perm=PERMUTATIONS, hashfunc=hashing)):
        found += [(other, at) for other in index.query(one)]
        index.insert(at, one, check_duplication=False)
    return found


def text_dedup(texts: list[str]) -> Links:
    """Its signature of a text, and a dictionary a band; its own driver, which maps over a dataset, is left out."""
    sys.modules.setdefault("pyspark", ModuleType("pyspark"))  # it imports that for another of its commands
    embed = pytest.importorskip("text_dedup.minhash").embed_func
    hashing = pytest.importorskip("text_dedup.utils.hashfunc").xxh3_32hash
    draw, prime = np.random.RandomState(42), np.uint64((1 << 61) - 1)
    drawn = tuple(draw.randint(low, prime, size=(PERMUTATIONS,), dtype=np.uint64) for low in (1, 0))
    ranges = [(at, at + 8) for at in range(0, PERMUTATIONS, 8)]
    tables: list[dict[bytes, int]] = [{} for _ in ranges]
    found = []
    for at, text in enumerate(texts):
        made = embed(content=text, idx=at, num_perm=PERMUTATIONS, ngram_size=NGRAM, min_length=1, hashranges=ranges,
                     permutations=drawn, hash_func=hashing, dtype=np.uint64, max_hash=np.uint32((1 << 32) - 1),
                     modulo_prime=prime)  # fmt: skip
        for key, table in zip(made["__signatures__"], tables, strict=False):
            first = table.setdefault(key, at)
            if first != at:
                found.append((first, at))
    return found


def datatrove(texts: list[str]) -> Links:
    """Its signature of a text, and a dictionary a band; words are split at white space, faster than by its default."""
    library = pytest.importorskip("datatrove.pipeline.dedup.minhash")
    splitting = type("Splitting", (), {"word_tokenize": staticmethod(str.split)})
    library.load_word_tokenizer = lambda *_: splitting
    config = library.MinhashConfig(n_grams=NGRAM, num_buckets=16, hashes_per_bucket=8)
    step = library.MinhashDedupSignature(output_folder="/dev/null", config=config)
    tables: list[dict[tuple[int, ...], int]] = [{} for _ in range(16)]
    found = []
    for at, text in enumerate(texts):
        grams = step.get_shingles(text)
        for key, table in zip(step.get_signature(grams) if grams.size else (), tables, strict=False):
            first = table.setdefault(tuple(key), at)
            if first != at:
                found.append((first, at))
    return found


def recall(links: Links, planted: Planted) -> float:
    """Return the share of the planted pairs that links put into one cluster."""
    above: dict[int, int] = {}

    def root(row: int) -> int:
        while above.get(row, row) != row:
            above[row] = row = above.get(above[row], above[row])
        return row

    for one, other in links:
        above[root(one)] = root(other)
    return sum(root(one) == root(other) for one, other in planted) / len(planted)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF)
    found = work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, found


@pytest.mark.parametrize("peer", [rensa, datasketch, text_dedup, datatrove], ids=lambda peer: peer.__name__)
def test_near_copies_are_found_faster_than_by(peer: Callable[[list[str]], Links]) -> None:
    texts, planted = given()
    best: dict[str, float] = {}
    links: dict[str, Links] = {}
    for work in (ours, peer, ours, peer, ours):
        spent, links[work.__name__] = seconds(partial(work, texts))
        best[work.__name__] = min(spent, best.get(work.__name__, spent))
    found = {name: recall(linked, planted) for name, linked in links.items()}
    assert found["ours"] >= 0.99
    told = ", ".join(f"{name} {spent:.2f} CPU s, recall {found[name]:.3f}" for name, spent in best.items())
    print(f"\n{len(texts):,} texts: {told}: {best[peer.__name__] / best['ours']:.1f} times as fast")
