import random
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.dialogue.minhash import bands, compute, ngrams
from tasks.dialogue.near_duplicates import Prints

ALPHABET = st.sampled_from(
    [*"abAB \n\t\0.,", "é", "ß", "…", "Σ", "\u0301", "的", "字", "ｱ", "ค", "“", "😀", "\U00020000"]
)
TEXTS = st.lists(st.text(ALPHABET, max_size=60), max_size=12)
SETTINGS = (3, 128, 0.8)


def prints(texts: list[str], ngram: int = 3) -> pa.RecordBatch:
    return compute(pa.array(texts, pa.string()), ngram, 128, 0.8)


@given(TEXTS, st.integers(1, 4), st.randoms())
def test_a_fingerprint_depends_on_its_text_alone(texts: list[str], ngram: int, draw: random.Random) -> None:
    order = draw.sample(range(len(texts)), len(texts))
    mixed = prints([texts[row] for row in order], ngram)
    whole = prints(texts, ngram)
    assert mixed.equals(whole.take(pa.array(order, pa.int64())))
    assert all(prints([text], ngram).equals(whole.slice(row, 1)) for row, text in enumerate(texts))


def test_blocks_of_any_size_and_arrays_of_any_kind_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    texts = ["".join(draw.choices("ab ߐ的…é\u0301", k=draw.randrange(80))) for _ in range(300)]
    whole = prints(texts)
    assert compute(pa.array(["", *texts], pa.large_string())[1:], *SETTINGS).equals(whole)
    monkeypatch.setattr("tasks.dialogue.normalize._BLOCK", 64)
    assert prints(texts).equals(whole)


@given(TEXTS)
def test_equal_digests_mean_equal_normalised_texts(texts: list[str]) -> None:
    from tasks.dialogue.normalize import normalised

    plain = normalised(pa.array(texts, pa.string()))
    made = prints(texts)
    digests = made["digest"].to_pylist()
    assert len(set(digests)) == len(set(plain))
    assert len(set(zip(digests, plain, strict=True))) == len(set(plain))
    spans = ((0x3040, 0x3100), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000))
    dense = [sum(any(first <= ord(c) < end for first, end in spans) for c in text) for text in plain]
    assert made["chars"].to_pylist() == [len(text) + 2 * more for text, more in zip(plain, dense, strict=True)]


def test_a_character_that_is_a_word_counts_as_three_letters() -> None:
    texts = ["abc", "的一是", "かな", "한국", "ไทย", "é", "a的b"]
    assert prints(texts)["chars"].to_pylist() == [3, 9, 6, 2, 3, 1, 5]


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "ab", "a" * 9, "b" * 64, "a" * 63, "", "的"]), max_size=9), max_size=9)
)
def test_ngrams_are_told_apart_as_tuples_of_words_are(texts: list[list[str]]) -> None:
    texts = [[word for word in words if word] for words in texts]
    grams: dict[tuple[str, ...], int] = {}
    data = "".join(" ".join(words) + "\n" for words in [["x"], *texts]).encode()
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    hashes, offsets = ngrams(data, ends, 3)
    for words, start, stop in zip(texts, offsets[1:-1].tolist(), offsets[2:].tolist(), strict=True):
        own = [tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))]
        assert len(own) == stop - start
        for gram, value in zip(own, hashes[start:stop].tolist(), strict=True):
            assert grams.setdefault(gram, value) == value
    assert len(set(grams.values())) == len(grams)


def test_what_is_stored_of_a_message_is_small() -> None:
    made = Prints.of(prints(["one two three four"] * 10))
    assert made.digests.shape == (10, 2)
    assert made.keys.shape == (10, 18)
    assert prints(["x"] * 1000).nbytes <= 40e6 / 130_000 * 1000


def test_bands_miss_hardly_a_pair_at_the_threshold() -> None:
    import itertools

    assert bands(128, 0.8) == (18, 5)
    for permutations, threshold in itertools.product((64, 128, 256), (0.7, 0.8, 0.9, 1.0)):
        count, rows = bands(permutations, threshold)
        assert count * rows <= permutations
        assert (1 - threshold**rows) ** count <= 1e-3


@pytest.mark.parametrize(
    "text",
    ["a" * 1_000_000, "a" + "\u0301\u0316" * 500_000, "word " * 200_000, " " * 1_000_000 + "x", "的" * 333_333,
     "…" * 333_333, "ß\u0301" * 250_000, "\n" * 1_000_000, "a\0" * 500_000],
    ids=["letters", "marks", "words", "spaces", "han", "expanding", "both", "lines", "nulls"],
)  # fmt: skip
def test_a_text_of_a_megabyte_takes_no_more_than_its_length(text: str) -> None:
    prints(["tables are made once"])
    started = time.process_time()
    prints([text])
    assert time.process_time() - started < 8  # 0.5 s on an idle core; a square would take hours
