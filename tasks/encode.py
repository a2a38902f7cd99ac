"""Step 4, encode: turn dialogues into token ids, with what the loss and attention need to know of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
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
from tasks.remembered import PerText, Remembered
from tasks.rows import per_text
from tasks.sequences import SPLITS, encoded, ids_of, spans, write_arrays
from tasks.step import Params, TextsRuntime, step
from tasks.store.canonical import sha256_file
from tasks.store.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    from tasks.text.bpe import Vocabulary
    from tasks.text.chat import Tags, Template
    from tasks.text.lay import Texts, Turns
    from tasks.text.layout import Conversation, Forest

PAD = "<|endoftext|>"
NAMES = ("message_id", "message_tree_id", "role", "split")  # what the index says of a row, besides its rank
FEW = ("role", "split")  # columns that hold few values
GROUP = 1 << 17  # rows of a row group of the index: 10 MB
# What the gate asks of each text alone.
EXPORTED_IDS = Remembered("exported-ids", 1, "tasks.text.gate", ("tokenizers",))


class EncodeParams(Params):
    """Settings of the encode step."""

    tokenizer: Literal["gpt2", "trained"] = "gpt2"
    """Whose byte pairs: GPT-2's own, or a small vocabulary trained on the train split, for a model from scratch."""

    vocab_size: int = Field(default=4_096, ge=260, le=65_536)
    """Most token ids of a trained vocabulary, its 4 special tokens among them; GPT-2's own has 50,260."""

    block: int = Field(default=1_024, ge=16, le=65_535)
    """Most tokens of a conversation, from its start to a reply; GPT-2 knows 1,024 positions."""

    template: Literal["chat", "xml"] = "chat"
    """How turns are written: with role tokens, or with the plain-text tags of the seed."""

    pack: int | None = Field(default=None, ge=16, le=65_535)
    """Tokens of a sequence, at least block: a larger one cuts fewer trees, and costs attention. None: block."""

    layout: Literal["tree", "paths", "top1", "first-reply"] = "tree"
    """How trees become sequences: whole, each message once; as all paths from root to leaf, the best-ranked path, or
    prompt and first replies."""

    @model_validator(mode="after")
    def _holds_a_path(self) -> EncodeParams:
        if self.pack is not None and self.pack < self.block:
            raise ValueError(f"pack {self.pack} is less than block {self.block}, so not every path would fit")
        return self

    def keyed(self) -> dict[str, Any]:
        """Return what enters the key; a pack that is the block is none."""
        kept = super().keyed()
        return {**kept, "pack": None if self.pack == self.block else self.pack}

    @property
    def length(self) -> int:
        """T, tokens of a sequence."""
        return self.pack or self.block


class EncodeRuntime(TextsRuntime):
    """How fast texts become ids, never which."""


@step("encode", version=4, makes=Tokens, notices=of_encode)
def encode(out: Path, dialogues: Dialogues, params: EncodeParams, run: EncodeRuntime) -> Counts:
    """Write the memmaps, their index, the tokenizer and the encoding; nothing is published that the gate refuses.

    Raises:
        InputError: If nothing is left to train on.
        GateError: If what was written must not reach training.
    """
    from tasks.text.chat import TEMPLATES, tags

    template = TEMPLATES[params.template]
    vocabulary = _vocabulary(dialogues, template, params)
    pieces = tags(template, vocabulary.specials, vocabulary.encode)
    talks = _talks(dialogues, ids_of(vocabulary), pieces, params)
    written = _write(out, dialogues, talks, params, vocabulary.specials[PAD])
    encoding = Encoding(
        block=params.block,
        length=params.length,
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
    return {**counts, "gated": _gate(out, dialogues)}


def _trees(dialogues: Dialogues) -> tuple[Forest, NDArray[np.bool_], pl.Series]:
    """Link the trees, and tell of each row whether it is an assistant's and what its split is."""
    from tasks.text.layout import LINKS, forest

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
        tags: The template's pieces as ids.
        texts: Ids of the texts in them.
        parents: (rows,) row of each row's parent, -1 at a root.
        replies: (rows,) whether a row is an assistant's.
        sizes: (conversations,) tokens of each.
        utf8: (rows,) bytes of each text in them.
        splits: (rows,) the split of each.
        counts: What the layout did: how many conversations it found, and what of them was left out.
    """

    conversations: list[Conversation]
    contexts: list[int]
    tags: Tags
    texts: Texts
    parents: NDArray[np.int64]
    replies: NDArray[np.bool_]
    sizes: NDArray[np.int64]
    utf8: NDArray[np.int64]
    splits: pl.Series
    counts: Counts


def _talks(dialogues: Dialogues, function: PerText, tags: Tags, params: EncodeParams) -> _Talks:
    """Lay the trees out, encode the texts that are asked for, and end every conversation on a reply that fits."""
    import numpy as np

    from tasks.text.lay import around
    from tasks.text.layout import LAYOUTS, flat

    trees, replies, splits = _trees(dialogues)
    found = None if params.layout == "tree" else list(LAYOUTS[params.layout](trees))
    asked = np.full(len(replies), found is None)
    if found is not None:
        asked[flat(found)[0]] = True
    texts, utf8 = encoded(dialogues, asked, function, "encode")
    nowhere = np.zeros(len(replies), np.bool_)  # what stands at the ends of a conversation is counted apart
    lengths = texts.lengths + sum(around(replies, nowhere, nowhere, tags))
    laid = (
        _whole(trees, replies, lengths, tags, params)
        if found is None
        else _paths(found, replies, lengths, tags, params)
    )
    counts = {**laid[3], "room": _room(trees, replies & asked, lengths, tags, params.block)}
    return _Talks(*laid[:2], tags, texts, np.array(trees.parents, np.int64), replies, laid[2], utf8, splits, counts)


def _room(trees: Forest, asked: NDArray[np.bool_], lengths: NDArray[np.int64], tags: Tags, block: int) -> Counts:
    """Count the trees of which not every reply that is asked for fits, and the blocks that most would fit."""
    import numpy as np

    from tasks.text.layout import longest

    needed = np.sort(longest(trees, asked, lengths)) + len(tags.start) + len(tags.tail)
    at = {share: int(needed[-(-len(needed) * share // 100) - 1]) if len(needed) else 0 for share in (90, 99, 100)}
    return {
        "conversations": len(needed),
        "too_long": int(np.count_nonzero(needed > block)),
        "needed": {f"{share}%": tokens for share, tokens in at.items()},
    }


_Laid = tuple[list["Conversation"], list[int], "NDArray[np.int64]", Counts]  # conversations, contexts, sizes, counts


def _whole(
    trees: Forest, replies: NDArray[np.bool_], lengths: NDArray[np.int64], tags: Tags, params: EncodeParams
) -> _Laid:
    """Take trees as they are, or as much of one as fits a sequence."""
    import numpy as np

    from tasks.text.branches import Sizes, cut

    sizes = Sizes(lengths.tolist(), len(tags.start), len(tags.tail), params.block, params.length)
    made = cut(trees, replies.tolist(), sizes)
    counts = {
        "found": made.trees + made.skipped,
        "cut": made.divided,
        "skipped": made.skipped,
        "too_long": made.too_long,
        "context": sum(sizes.rows[row] for piece in made.pieces for row in piece.rows[: piece.context]),
    }
    pieces = made.pieces
    tokens = np.array([piece.tokens for piece in pieces], np.int64)
    return [piece.rows for piece in pieces], [piece.context for piece in pieces], tokens, counts


def _paths(
    found: list[Conversation],
    replies: NDArray[np.bool_],
    lengths: NDArray[np.int64],
    tags: Tags,
    params: EncodeParams,
) -> _Laid:
    """Take paths, each to its last reply that fits."""
    import numpy as np

    from tasks.text.layout import fit, flat

    outer = len(tags.start) + len(tags.tail)
    fitted = fit(found, replies, lengths, params.block - outer)
    inside, stops = flat(fitted.conversations)
    sizes = np.diff(np.cumsum(lengths[inside])[stops - 1], prepend=0) + outer
    counts = {
        "found": len(found),
        "cut": fitted.cut,
        "skipped": fitted.skipped,
        "repeated": fitted.repeated,
        "too_long": fitted.too_long,
    }
    return fitted.conversations, [0] * len(sizes), sizes, counts


@dataclass
class _Tally:
    """What was written of one split."""

    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    utf8_bytes: int = 0


def _write(out: Path, dialogues: Dialogues, talks: _Talks, params: EncodeParams, pad: int) -> dict[str, _Tally]:
    """Pack each split, write the arrays and the index, and return what was written."""
    import pyarrow as pa

    from tasks.text.lay import turns

    packed = _packed(talks, params)
    plan = [numbers for sequences in packed.values() for numbers in sequences]
    placed = turns(
        talks.conversations, talks.contexts, plan, talks.parents, talks.replies, talks.texts.lengths, talks.tags
    )
    write_arrays(out, placed, talks.texts, talks.tags, params.length, pad)
    talks.texts.ids.clear()  # of ten times OASST2, half a GB, which Arrow would keep for itself
    pa.default_memory_pool().release_unused()
    _write_index(out / "index.parquet", _read(dialogues, *NAMES, "rank"), placed)
    written, first = {}, 0
    for split, sequences in packed.items():
        here = placed.of(first, first + len(sequences))
        first += len(sequences)
        spoken = int(talks.utf8[here.row[here.trained > 0]].sum())
        written[split] = _Tally(len(sequences), int(here.size.sum()), int(here.trained.sum()), spoken)
    return written


def _packed(talks: _Talks, params: EncodeParams) -> dict[str, list[list[int]]]:
    """Return the numbers of the conversations of each sequence, by split.

    Raises:
        InputError: If the train split has no conversation.
    """
    import numpy as np

    from tasks.text.pack import best_fit

    of_each = talks.splits.gather([conversation[0] for conversation in talks.conversations])
    of_split = {split: np.flatnonzero((of_each == split).to_numpy()) for split in SPLITS}
    if not len(of_split["train"]):
        what = f"the train split holds no reply that fits, with all above it, {params.block:,} tokens"
        where = f"{len(talks.splits):,} messages came in, {(talks.splits == 'train').sum():,} of them to train on"
        do = f"Keep more messages in curate, or raise encode.block: {talks.counts['room']['needed']} fit so many trees"
        raise InputError(what, where, do, "encode.empty")
    return {
        split: [numbers[places].tolist() for places in best_fit(talks.sizes[numbers].tolist(), params.length)]
        for split, numbers in of_split.items()
    }


def _write_index(path: Path, rows: pl.DataFrame, placed: Turns) -> None:
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
        "padding": sequences * encoding.length - tokens,
        "conversations": len(talks.conversations),
        **talks.counts,
        "vocab_size": encoding.vocab_size,
        "splits": {split: asdict(tally) for split, tally in written.items()},
    }


def _gate(out: Path, dialogues: Dialogues) -> int:
    """Read everything back as a reader of the artifact would, and check it."""
    import polars as pl

    from tasks.text.chat import load_dialect
    from tasks.text.gate import check, engine, ids_again
    from tasks.text.said import SAID
    from tasks.text.written import Stored, Written

    tokens = Tokens(out, Manifest(key="", kind=Tokens.kind, recipe={}, files={}, digest=""))
    ids, mask, positions, ends = map(Stored, (tokens.ids(), tokens.mask(), tokens.positions(), tokens.ends()))
    encoding = tokens.encoding()
    once = encoding.layout == "tree"
    few = pl.col(FEW).cast(pl.Categorical)
    index = tokens.index().with_columns(few).collect()
    written = Written(ids, mask, positions, ends, index, encoding.splits, once)
    tokenizer = (out / "tokenizer.json").read_text(encoding="utf-8")
    settings = {"tokenizer": sha256_file(out / "tokenizer.json")}
    again = EXPORTED_IDS.of(partial(ids_again, tokenizer), settings)
    dialect, said = load_dialect(out, engine(tokenizer)), dialogues.scan().select(SAID).with_columns(few)
    return check(written, dialect, said, partial(per_text, again))
