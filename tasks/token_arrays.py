"""Sequences: what steps share that lay texts out as arrays of tokens: ids of texts, the files, the splits' places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.artifacts import ARRAYS, Dialogues
from tasks.progress import bar, track
from tasks.text_chunks import map_texts

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    from tasks.text.assemble import MessageLayout, Texts
    from tasks.text.bpe import Vocabulary
    from tasks.text.templates import Tags
    from tasks.text_chunks import TextFunction

SPLITS = ("train", "val", "test")  # in this order they lie in the files
WINDOW = 1 << 16  # rows whose texts are in memory at a time: 40 MB
CHUNK = 256  # sequences laid at a time: 2 MB an array at a block of 1,024, which caches hold


def encoder(vocabulary: Vocabulary, workers: int = 0) -> TextFunction:
    """Return what gives the `ids` of texts.

    Args:
        vocabulary: Theirs.
        workers: Threads, as in `map_texts`.
    """
    from tasks.text import bpe

    gpt2 = bpe.is_gpt2(vocabulary)  # which every worker of a cluster has: only its special texts are sent there
    function = partial(bpe.gpt2_ids, vocabulary.apart) if gpt2 else partial(bpe.ids_of, vocabulary)
    return partial(map_texts, function=function, workers=workers)


def encoded(
    dialogues: Dialogues, wanted: NDArray[np.bool_], encode: TextFunction, label: str
) -> tuple[Texts, NDArray[np.int64]]:
    """Encode the texts of the wanted rows.

    Args:
        dialogues: R rows.
        wanted: (R,) which of them.
        encode: Gives `ids`, a list of uint16 for each text.
        label: What the progress bar says.

    Returns:
        The ids, and (R,) the UTF-8 bytes of each text, 0 where it is not wanted.
    """
    import numpy as np

    from tasks.text.assemble import Texts

    ids: list[NDArray[np.uint16]] = []
    starts, lengths, utf8 = (np.zeros(len(wanted), np.int64) for _ in range(3))
    with bar(label, int(wanted.sum()), "messages") as shown:
        for number, window in enumerate(_texts(dialogues, len(wanted))):
            chosen = np.flatnonzero(wanted[number * WINDOW : number * WINDOW + len(window)])
            texts = window.gather(chosen)
            lists = encode(texts).column("ids").combine_chunks()
            ids.append(lists.flatten().to_numpy())
            rows, ends = number * WINDOW + chosen, lists.offsets.to_numpy().astype(np.int64)
            starts[rows], lengths[rows] = ends[:-1] - ends[0], np.diff(ends)
            utf8[rows] = texts.str.len_bytes().to_numpy()
            shown.advance(len(chosen))
    return Texts(WINDOW, ids, starts, lengths), utf8


def _texts(dialogues: Dialogues, rows: int) -> Iterator[pl.Series]:
    """Yield the texts of `WINDOW` rows at a time."""
    for first in range(0, rows, WINDOW):
        yield dialogues.scan().select("text").slice(first, WINDOW).collect()["text"]


def write_arrays(out: Path, placed: MessageLayout, texts: Texts, tags: Tags, length: int, pad: int) -> None:
    """Write the files `ARRAYS`: sequences of `length` tokens, a few at a time.

    Args:
        out: The folder.
        placed: Where every message lies.
        texts: Ids of their texts.
        tags: What stands around a text.
        length: T, tokens of a sequence.
        pad: Id that fills the rest of a sequence.
    """
    from tasks.text.assemble import lay

    count = int(placed.sequence[-1]) + 1 if len(placed.sequence) else 0
    with ExitStack() as stack:
        files = {Path(name).stem: stack.enter_context((out / name).open("wb")) for name in ARRAYS}
        for first in track(range(0, count, CHUNK), "pack", -(-count // CHUNK), f"times {CHUNK} sequences"):
            laid = lay(placed, texts, tags, first, min(first + CHUNK, count), length, pad)
            for name, file in files.items():
                file.write(getattr(laid, name))


def spans(sequences: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return which sequences are a split's, (first, one past the last), from how many each has."""
    found, first = {}, 0
    for split, count in sequences.items():
        found[split] = (first, first + count)
        first += count
    return found
