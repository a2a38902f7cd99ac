"""Step 4, encode: turn dialogues into token ids, with what the loss and attention need to know of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from tasks.artifacts import (
    INDEX_COLUMNS,
    Counts,
    Dialogues,
    Encoding,
    Tokens,
    arrow_schema,
    parquet_writer,
    write_encoding,
)
from tasks.errors import InputError
from tasks.notices import of_encode
from tasks.progress import track
from tasks.step import Params, TextsRuntime, step
from tasks.store.manifest import Manifest
from tasks.text_chunks import map_texts
from tasks.token_arrays import SPLITS, encoded, encoder, spans, write_arrays

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    from tasks.text.assemble import MessageLayout, Texts
    from tasks.text.bpe import Vocabulary
    from tasks.text.linearize import Conversation, Forest
    from tasks.text.templates import Tags, Template
    from tasks.text_chunks import TextFunction

NAMES = ("message_id", "message_tree_id", "role", "split")  # what the index says of a row, besides its rank
FEW = ("role", "split")  # columns that hold few values
MOST = 65_535  # tokens of a sequence: places in it are uint16
GROUP = 1 << 17  # rows of a row group of the index: 10 MB


class EncodeParams(Params):
    """Settings of the encode step."""

    tokenizer: Literal["gpt2", "trained"] = "gpt2"
    """Whose byte pairs: GPT-2's own, or a small vocabulary trained on the train split, for a model from scratch."""

    vocab_size: int = Field(default=4_096, ge=261, le=65_536)
    """Most token ids of a trained vocabulary, its 5 special tokens among them. Only for tokenizer = trained."""

    context_length: int = Field(default=1_024, ge=16, le=MOST)
    """Most tokens of a path, from the start of a conversation to a reply: the context that a model must have. GPT-2's is 1,024."""  # noqa: E501

    template: Literal["chat", "xml"] = "chat"
    """How turns are written: with role tokens, or with the plain-text tags of the seed."""

    sequence_length: int | None = Field(default=None, ge=16, le=MOST)
    """Tokens of a sequence, at least block. None: block or, for trees, which hold many paths, 4 times block."""

    layout: Literal["tree", "paths", "top1", "first-reply"] = "tree"
    """How trees become sequences: whole, each message once; as all paths from root to leaf, the best-ranked path, or
    prompt and first replies."""

    @model_validator(mode="after")
    def _holds_a_path(self) -> EncodeParams:
        if self.sequence_length is not None and self.sequence_length < self.context_length:
            raise ValueError(
                f"sequence_length {self.sequence_length} is less than context_length {self.context_length}, "
                "so not every path would fit"
            )
        return self

    def keyed(self) -> dict[str, Any]:
        """Return what enters the key; a pack that is the usual one is none."""
        kept = super().keyed()
        return {**kept, "sequence_length": None if self.sequence_length == self._usual else self.sequence_length}

    def idle(self) -> set[str]:
        """Return the settings that have no say: GPT-2's own vocabulary has its size."""
        return {"vocab_size"} if self.tokenizer == "gpt2" else set()

    @property
    def length(self) -> int:
        """T, tokens of a sequence."""
        return self.sequence_length or self._usual

    @property
    def _usual(self) -> int:
        """Tokens of a sequence where none are set."""
        return min(4 * self.context_length, MOST) if self.layout == "tree" else self.context_length


class EncodeRuntime(TextsRuntime):
    """How fast texts become ids, never which."""


@step("encode", version=5, makes=Tokens, notices=of_encode)
def encode(out: Path, dialogues: Dialogues, params: EncodeParams, run: EncodeRuntime) -> Counts:
    """Write the memmaps, their index, the tokenizer and the encoding; nothing is published that the gate refuses.

    Raises:
        InputError: If nothing is left to train on.
        GateError: If what was written must not reach training.
    """
    from tasks.text.templates import PAD, TEMPLATES, tags

    template = TEMPLATES[params.template]
    vocabulary = _vocabulary(dialogues, template, params)
    pieces = tags(template, vocabulary.specials, vocabulary.encode)
    talks = _talks(dialogues, encoder(vocabulary, run.workers), pieces, params)
    written = _write(out, dialogues, talks, params, vocabulary.specials[PAD])
    encoding = Encoding(
        context_length=params.context_length,
        sequence_length=params.length,
        vocab_size=vocabulary.size_padded,
        template=params.template,
        layout=params.layout,
        specials=vocabulary.specials,
        stop=vocabulary.specials[template.stop],
        pad=vocabulary.specials[PAD],
        splits=spans({split: tally.sequences for split, tally in written.items()}),
        utf8_bytes={split: written[split].utf8_bytes for split in SPLITS},
    )
    vocabulary.exported().save(str(out / "tokenizer.json"))
    write_encoding(out, encoding)
    if (told := dialogues.path / "curation.json").exists():
        (out / told.name).write_bytes(told.read_bytes())
    counts = _counts(written, talks, encoding)
    del talks, vocabulary  # the gate reads everything anew
    return {**counts, "gated": _gate(out, dialogues, run.workers)}


def _trees(dialogues: Dialogues) -> tuple[Forest, NDArray[np.bool_], pl.Series]:
    """Link the trees, and tell of each row whether it is an assistant's and what its split is."""
    from tasks.text.linearize import LINKS, forest

    rows = _read(dialogues, *LINKS, "role", "split")
    return forest(rows), (rows["role"] == "assistant").to_numpy(), rows["split"]


def _read(dialogues: Dialogues, *names: str) -> pl.DataFrame:
    """Read some columns of all rows; what has a few values only, as their numbers."""
    import polars as pl

    few = [name for name in names if name in FEW]
    return dialogues.scan().select(names).with_columns(pl.col(few).cast(pl.Categorical)).collect()


def _vocabulary(dialogues: Dialogues, template: Template, params: EncodeParams) -> Vocabulary:
    """Return the vocabulary; a trained one has seen the train split only."""
    import polars as pl

    from tasks.text.bpe import gpt2, trained

    if params.tokenizer == "gpt2":
        return gpt2(template.plain())
    texts = dialogues.scan().filter(pl.col("split") == "train").select("text").collect()["text"]
    return trained(track(texts, "vocabulary", len(texts), "messages"), params.vocab_size, template.plain())


@dataclass(frozen=True)
class _Talks:
    """Which conversations are written, and the ids of their messages.

    Attributes:
        conversations: Rows of each, depth first: a path, or as much of a tree as fits.
        contexts: How many rows at the start of each are not trained: another conversation trains them.
        packed: Numbers of the conversations of each sequence, by split.
        tags: The template's pieces as ids.
        texts: Ids of the texts in them.
        parents: (rows,) row of each row's parent, -1 at a root.
        replies: (rows,) whether a row is an assistant's.
        utf8: (rows,) bytes of each text in them.
        splits: (rows,) the split of each.
        counts: What the layout did: how many conversations it found, and what of them was left out.
    """

    conversations: list[Conversation]
    contexts: list[int]
    packed: Packed
    tags: Tags
    texts: Texts
    parents: NDArray[np.int64]
    replies: NDArray[np.bool_]
    utf8: NDArray[np.int64]
    splits: pl.Series
    counts: Counts


def _talks(dialogues: Dialogues, encode_texts: TextFunction, tags: Tags, params: EncodeParams) -> _Talks:
    """Lay the trees out, encode the texts that are asked for, and end every conversation on a reply that fits.

    Raises:
        InputError: If the train split has no conversation.
    """
    import numpy as np

    from tasks.text.assemble import around
    from tasks.text.linearize import LAYOUTS, flat

    trees, replies, splits = _trees(dialogues)
    found = None if params.layout == "tree" else list(LAYOUTS[params.layout](trees))
    asked = np.full(len(replies), found is None)
    if found is not None:
        asked[flat(found)[0]] = True
    texts, utf8 = encoded(dialogues, asked, encode_texts, "encode")
    nowhere = np.zeros(len(replies), np.bool_)  # what stands at the ends of a conversation is counted apart
    lengths = texts.lengths + sum(around(replies, nowhere, nowhere, tags))
    laid = (
        _whole(trees, replies, splits, lengths, tags, params)
        if found is None
        else _paths(found, replies, splits, lengths, tags, params)
    )
    counts = {**laid[3], "room": _room(trees, replies & asked, lengths, tags, params.context_length)}
    if not laid[2]["train"]:
        what = f"the train split holds no reply that fits, with all above it, {params.context_length:,} tokens"
        where = f"{len(splits):,} messages came in, {(splits == 'train').sum():,} of them to train on"
        needed = counts["room"]["needed"]
        hint = f"Keep more messages in curate, or raise encode.context_length: {needed} fit so many trees"
        raise InputError(what, where, hint, "encode.empty")
    parents = np.array(trees.parents, np.int64)
    return _Talks(*laid[:3], tags, texts, parents, replies, utf8, splits, counts)


def _room(trees: Forest, asked: NDArray[np.bool_], lengths: NDArray[np.int64], tags: Tags, block: int) -> Counts:
    """Count the trees of which not every reply that is asked for fits, and the blocks that most would fit."""
    import numpy as np

    from tasks.text.linearize import longest

    needed = np.sort(longest(trees, asked, lengths)) + len(tags.start) + len(tags.tail)
    at = {share: int(needed[-(-len(needed) * share // 100) - 1]) if len(needed) else 0 for share in (90, 99, 100)}
    return {
        "conversations": len(needed),
        "too_long": int(np.count_nonzero(needed > block)),
        "needed": {f"{share}%": tokens for share, tokens in at.items()},
    }


Packed = dict[str, list[list[int]]]
_Laid = tuple[list["Conversation"], list[int], Packed, Counts]  # conversations, contexts, sequences, counts


def _whole(
    trees: Forest,
    replies: NDArray[np.bool_],
    splits: pl.Series,
    lengths: NDArray[np.int64],
    tags: Tags,
    params: EncodeParams,
) -> _Laid:
    """Take trees as they are, or in pieces that fit and fill sequences."""
    from tasks.text.fill import fill
    from tasks.text.split_trees import Sizes, cut

    sizes = Sizes(lengths.tolist(), len(tags.start), len(tags.tail), params.context_length, params.length)
    made = cut(trees, replies.tolist(), sizes)
    of_split = _numbers([piece.rows for piece in made.pieces], splits, params)
    filled = {split: fill([made.pieces[at] for at in numbers], trees, sizes) for split, numbers in of_split.items()}
    pieces = [piece for sequences in filled.values() for sequence in sequences for piece in sequence]
    number = count()
    packed = {split: [[next(number) for _ in one] for one in sequences] for split, sequences in filled.items()}
    counts = {
        "found": made.trees + made.skipped,
        "cut": sum(many > 1 for many in Counter(piece.rows[0] for piece in pieces).values()),
        "skipped": made.skipped,
        "too_long": made.too_long,
        "context": sum(sizes.rows[row] for piece in pieces for row in piece.rows[: piece.context]),
    }
    return [piece.rows for piece in pieces], [piece.context for piece in pieces], packed, counts


def _paths(
    found: list[Conversation],
    replies: NDArray[np.bool_],
    splits: pl.Series,
    lengths: NDArray[np.int64],
    tags: Tags,
    params: EncodeParams,
) -> _Laid:
    """Take paths, each to its last reply that fits."""
    import numpy as np

    from tasks.text.linearize import fit, flat
    from tasks.text.pack import best_fit

    outer = len(tags.start) + len(tags.tail)
    fitted = fit(found, replies, lengths, params.context_length - outer)
    inside, stops = flat(fitted.conversations)
    sizes = np.diff(np.cumsum(lengths[inside])[stops - 1], prepend=0) + outer
    packed = {
        split: [numbers[places].tolist() for places in best_fit(sizes[numbers].tolist(), params.length)]
        for split, numbers in _numbers(fitted.conversations, splits, params).items()
    }
    counts = {
        "found": len(found),
        "cut": fitted.cut,
        "skipped": fitted.skipped,
        "repeated": fitted.repeated,
        "too_long": fitted.too_long,
    }
    return fitted.conversations, [0] * len(sizes), packed, counts


def _numbers(
    conversations: list[Conversation], splits: pl.Series, params: EncodeParams
) -> dict[str, NDArray[np.int64]]:
    """Return which conversations each split has."""
    import numpy as np

    of_each = splits.gather([conversation[0] for conversation in conversations])
    return {split: np.flatnonzero((of_each == split).to_numpy()) for split in SPLITS}


@dataclass
class _Tally:
    """What was written of one split."""

    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    utf8_bytes: int = 0


def _write(out: Path, dialogues: Dialogues, talks: _Talks, params: EncodeParams, pad: int) -> dict[str, _Tally]:
    """Write the arrays and the index, and return what was written of each split."""
    import pyarrow as pa

    from tasks.text.assemble import turns

    plan = [numbers for sequences in talks.packed.values() for numbers in sequences]
    placed = turns(
        talks.conversations, talks.contexts, plan, talks.parents, talks.replies, talks.texts.lengths, talks.tags
    )
    write_arrays(out, placed, talks.texts, talks.tags, params.length, pad)
    talks.texts.ids.clear()  # of ten times OASST2, half a GB, which Arrow would keep for itself
    pa.default_memory_pool().release_unused()
    _write_index(out / "index.parquet", _read(dialogues, *NAMES, "rank"), placed)
    written, first = {}, 0
    for split, sequences in talks.packed.items():
        here = placed.of(first, first + len(sequences))
        first += len(sequences)
        spoken = int(talks.utf8[here.row[here.trained > 0]].sum())
        written[split] = _Tally(len(sequences), int(here.size.sum()), int(here.trained.sum()), spoken)
    return written


def _write_index(path: Path, rows: pl.DataFrame, placed: MessageLayout) -> None:
    """Write the token ranges of messages, and which one each goes on from."""
    import polars as pl
    import pyarrow as pa

    schema = arrow_schema(INDEX_COLUMNS)
    with parquet_writer(path, INDEX_COLUMNS) as writer:
        for first in range(0, len(placed.row), GROUP):
            here = slice(first, first + GROUP)
            named = rows[placed.row[here]]
            numbers = {
                "sequence": placed.sequence[here],
                "start": placed.start[here],
                "stop": (placed.start + placed.size)[here],
                "trained": placed.trained[here],
            }
            columns = {name: pa.array(values, pa.int32()) for name, values in numbers.items()}
            columns["parent"] = pa.array(placed.parent[here], pa.int64(), mask=placed.opens[here])
            for name in NAMES:
                columns[name] = named[name].cast(pl.String).to_arrow().cast(pa.string())
            columns["rank"] = named["rank"].to_arrow()
            writer.write_table(pa.table([columns[name] for name in INDEX_COLUMNS], schema=schema))


def _counts(written: dict[str, _Tally], talks: _Talks, encoding: Encoding) -> Counts:
    sequences, tokens, trained = (
        sum(getattr(tally, name) for tally in written.values()) for name in ("sequences", "tokens", "trained")
    )
    return {
        "sequences": sequences,
        "tokens": tokens,
        "trained": trained,
        "padding": sequences * encoding.sequence_length - tokens,
        "conversations": len(talks.conversations),
        **talks.counts,
        "vocab_size": encoding.vocab_size,
        "splits": {split: asdict(tally) for split, tally in written.items()},
    }


def _gate(out: Path, dialogues: Dialogues, workers: int) -> int:
    """Read everything back as a reader of the artifact would, and check it."""
    import polars as pl

    from tasks.text.gate import check, engine, ids_again
    from tasks.text.gate_reader import Stored, Written
    from tasks.text.gate_source import SAID
    from tasks.text.templates import load_dialect

    tokens = Tokens(out, Manifest(key="", kind=Tokens.kind, recipe={}, files={}, digest=""))
    ids, mask, positions, ends = map(Stored, (tokens.ids(), tokens.mask(), tokens.positions(), tokens.ends()))
    encoding = tokens.encoding()
    once = encoding.layout == "tree"
    few = pl.col(FEW).cast(pl.Categorical)
    index = tokens.index().with_columns(few).collect()
    written = Written(ids, mask, positions, ends, index, encoding.splits, once)
    tokenizer = (out / "tokenizer.json").read_text(encoding="utf-8")
    encode_again = partial(map_texts, function=partial(ids_again, tokenizer), workers=workers)
    dialect, said = load_dialect(out, engine(tokenizer)), dialogues.scan().select(SAID).with_columns(few)
    return check(written, dialect, said, encode_again)
