import itertools
import random
import re
import time

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.dialogue.minhash import compute
from tasks.dialogue.near_duplicates import Pairs, Prints, pairs
from tasks.dialogue.normalize import normalised

PROSE = """The tide is the slow rise and fall of the sea. The moon pulls on the water that faces it more strongly than
on the solid earth, so two bulges form, and most coasts pass through both of them each day."""
RUSSIAN = """Прилив это медленный подъём моря. Луна притягивает обращённую к ней воду сильнее чем твёрдую землю поэтому
возникают два вала и большинство берегов проходит через оба каждый день без исключения."""
CHINESE = "潮汐是海水缓慢的涨落。月球对面向它的海水的引力大于对固体地球的引力，"
CHINESE += "因此形成两个隆起，大多数海岸每天都会经过它们两次。"
THAI = "กระแสน้ำคือการขึ้นและลงอย่างช้าๆของทะเลดวงจันทร์ดึงน้ำที่หันเข้าหามันแรงกว่าที่ดึงพื้นโลกจึงเกิดส่วนนูนสองแห่ง"
CODE = """def tide(moon, sea):
    for wave in sea.waves():
        if wave.height > moon.pull(wave) * 2:
            yield wave.crest(at=moon.phase, of=sea.level)
        else:
            sea.settle(wave, after=moon.day / 2)
    return sea.rest()
"""
EDITS = {
    "prose": (PROSE, PROSE.replace("slow", "steady")),
    "russian": (RUSSIAN, RUSSIAN.replace("медленный", "плавный")),
    "chinese": (CHINESE, CHINESE.replace("固体", "坚固")),
    "thai": (THAI, THAI.replace("ช้าๆ", "ช้า")),
    "code": (CODE, CODE.replace("rest()", "sleep()")),
}


def plain(*texts: str) -> list[str]:
    return normalised(pa.array(texts))


def words_of(text: str) -> list[str]:
    """Split as the docstring says, by a regular expression: white space, or one character of a spaceless script."""
    spaceless = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    return re.findall(f"[{spaceless}]|[^\\s{spaceless}]+", text)


def jaccard(one: str, other: str, ngram: int = 3) -> float:
    """Compare sets of tuples of words."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = words_of(text)
        return {tuple(words[at : at + ngram]) for at in range(max(1, len(words) - ngram + 1))}

    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


def compared(texts: list[str], ngram: int = 3, threshold: float = 0.8) -> Pairs:
    column = pa.array(texts, pa.string())
    prints = Prints.of(compute(column, ngram, 128, threshold))
    return pairs(prints, lambda rows: column.take(pa.array(rows)), ngram, threshold)


def found(texts: list[str], ngram: int = 3, threshold: float = 0.8) -> dict[tuple[int, int], float]:
    alike = compared(texts, ngram, threshold)
    both = zip(alike.left.tolist(), alike.right.tolist(), strict=True)
    return dict(zip(both, alike.similarity.tolist(), strict=True))


def crowd(count: int, seed: int = 0) -> list[str]:
    """Write texts of 12 to 60 words out of 300, each with an edited copy after it."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        words = [f"w{draw.randrange(300)}" for _ in range(draw.randrange(12, 60))]
        edited = list(words)
        edited[draw.choice([0, -1, len(words) // 2])] = "x"
        texts += [" ".join(words), " ".join(edited)]
    return list(dict.fromkeys(texts))


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_text_of_any_script_or_language_is_found_and_nothing_else(kind: str) -> None:
    one, edited = plain(*EDITS[kind])
    others = [text for name, pair in EDITS.items() if name != kind for text in plain(pair[0])]
    assert found([*others, one, edited], threshold=0.6) == {(4, 5): jaccard(one, edited)}


@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_what_is_found_is_what_comparing_every_pair_finds(ngram: int, threshold: float) -> None:
    texts = crowd(40)
    every = {
        (one, other): jaccard(texts[one], texts[other], ngram)
        for one, other in itertools.combinations(range(len(texts)), 2)
    }
    wanted = {pair: similarity for pair, similarity in every.items() if similarity >= threshold}
    assert found(texts, ngram, threshold) == wanted


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab \u4e00\u4e01ค😀é“\0", max_size=40), max_size=12), st.integers(1, 4))
def test_similarity_is_the_jaccard_index_of_sets_of_words(texts: list[str], ngram: int) -> None:
    texts = list(dict.fromkeys(plain(*texts)))
    for (one, other), similarity in found(texts, ngram, 0.3).items():
        assert similarity == jaccard(texts[one], texts[other], ngram)


def test_the_order_of_the_texts_and_their_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = crowd(200)
    mixed = random.Random(1).sample(texts, len(texts))
    once = {frozenset((texts[one], texts[other])): index for (one, other), index in found(texts).items()}
    again = {frozenset((mixed[one], mixed[other])): index for (one, other), index in found(mixed).items()}
    assert once == again
    assert len(once) > 50
    monkeypatch.setattr("tasks.dialogue.normalize._BLOCK", 100)
    monkeypatch.setattr("tasks.dialogue.near_duplicates._PART", 50)
    assert {frozenset((texts[one], texts[other])): index for (one, other), index in found(texts).items()} == once


def test_nothing_and_the_empty_text_and_short_texts_are_compared_whole() -> None:
    assert found([]) == {}
    assert found([""]) == {}
    assert found(["", "a", "a b", "b a", "a b c"], threshold=0.1) == {}


def test_a_text_of_a_million_bytes_and_a_thousand_alike_ones_take_no_time() -> None:
    started = time.process_time()
    words = " ".join(map(str, range(200_000)))
    assert found([words, words + " more", "a " * 200_000]).keys() == {(0, 1)}
    alike = [f"{PROSE} {number}".replace("\n", " ") for number in range(1_000)]
    pairs_of = found(alike)
    assert len({row for pair in pairs_of for row in pair}) == 1_000
    assert time.process_time() - started < 20
