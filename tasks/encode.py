"""Step 4, encode: turn dialogues into token ids, with what the loss and attention need to know of each."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

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
from tasks.progress import track
from tasks.step import Params, step
from tasks.store.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tasks.text.bpe import Vocabulary
    from tasks.text.chat import Document, Tags, Template
    from tasks.text.layout import Conversation, Fitted

SPLITS = ("train", "val", "test")
PAD = "<|endoftext|>"
ARRAYS = ("ids", "mask", "positions", "ends")  # each a file: ids.bin, ...


class EncodeParams(Params):
    """Settings of the encode step."""

    tokenizer: Literal["gpt2", "trained"] = "gpt2"
    """Whose byte pairs: GPT-2's own, or a small vocabulary trained on the train split, for a model from scratch."""

    vocab_size: int = Field(default=4_096, ge=260, le=65_536)
    """Most token ids of a trained vocabulary, its 4 special tokens among them; GPT-2's own has 50,260."""

    block: int = Field(default=1_024, ge=16, le=65_535)
    """Tokens in a sequence; GPT-2 knows 1,024 positions."""

    template: Literal["chat", "xml"] = "chat"
    """How turns are written: with role tokens, or with the plain-text tags of the seed."""

    layout: Literal["paths", "top1", "first-reply"] = "paths"
    """Which paths of a tree are trained on: all from root to leaf, the best-ranked one, or prompt and first replies."""


@step("encode", version=1, makes=Tokens)
def encode(out: Path, dialogues: Dialogues, params: EncodeParams) -> Counts:
    """Write the memmaps, their index, the tokenizer and the encoding; nothing is published that the gate refuses.

    Raises:
        InputError: If nothing is left to train on.
        GateError: If what was written must not reach training.
    """
    from tasks.text.chat import TEMPLATES, tags

    rows, template = _rows(dialogues), TEMPLATES[params.template]
    vocabulary = _vocabulary(rows, template, params)
    pieces = tags(template, vocabulary.specials, vocabulary.encode)
    turns = _turns(rows, vocabulary, pieces, params)
    written = _write(out, rows, turns, params.block, vocabulary.specials[PAD])
    encoding = Encoding(
        block=params.block,
        vocab_size=vocabulary.size_padded,
        template=params.template,
        layout=params.layout,
        specials=vocabulary.specials,
        stop=vocabulary.specials[template.stop],
        pad=vocabulary.specials[PAD],
        splits=_spans(written),
        utf8_bytes={split: written[split].utf8_bytes for split in SPLITS},
    )
    vocabulary.exported().save(str(out / "tokenizer.json"))
    write_encoding(out, encoding)
    return {**_counts(written, turns, encoding), "gated": _gate(out, rows)}


@dataclass(frozen=True)
class _Rows:
    """The dialogues as columns."""

    message_tree_id: list[str]
    message_id: list[str]
    parent_id: list[str | None]
    role: list[str]
    text: list[str]
    rank: list[int | None]
    sibling: list[int]
    split: list[str]


def _rows(dialogues: Dialogues) -> _Rows:
    names = list(_Rows.__dataclass_fields__)
    table = dialogues.scan().select(names).collect()
    return _Rows(*(table[name].to_list() for name in names))


def _vocabulary(rows: _Rows, template: Template, params: EncodeParams) -> Vocabulary:
    """Return the vocabulary; a trained one has seen the train split only."""
    from tasks.text.bpe import gpt2, trained

    if params.tokenizer == "gpt2":
        return gpt2(template.plain())
    texts = [text for text, split in zip(rows.text, rows.split, strict=True) if split == "train"]
    return trained(track(texts, "vocabulary", len(texts), "messages"), params.vocab_size, template.plain())


@dataclass(frozen=True)
class _Turns:
    """Which conversations are written, and the ids of their messages.

    Attributes:
        fitted: The conversations, by row.
        tags: The template's pieces as ids.
        texts: Ids of each distinct text in them.
        lengths: Tokens of each row, tags included; of rows that no layout asks for, the tags alone.
        found: How many conversations the layout gave; the rest was left out (see `Fitted`).
    """

    fitted: Fitted
    tags: Tags
    texts: dict[str, NDArray[np.uint16]]
    lengths: list[int]
    found: int

    def document(self, rows: _Rows, conversation: Conversation) -> Document:
        """Join the messages of a conversation."""
        from tasks.text.chat import ROLES

        return self.tags.document((ROLES[rows.role[row]], self.texts[rows.text[row]].tolist()) for row in conversation)

    def size(self, conversation: Conversation) -> int:
        """Return the tokens of a conversation."""
        return len(self.tags.start) + sum(self.lengths[row] for row in conversation) + len(self.tags.tail)


def _turns(rows: _Rows, vocabulary: Vocabulary, pieces: Tags, params: EncodeParams) -> _Turns:
    """Lay the trees out, encode each distinct text once, and end every conversation on a reply that fits."""
    import numpy as np

    from tasks.text.chat import ROLES
    from tasks.text.layout import LAYOUTS, fit, forest

    trees = forest(rows.message_tree_id, rows.message_id, rows.parent_id, rows.rank, rows.sibling)
    found = list(LAYOUTS[params.layout](trees))
    distinct = dict.fromkeys(rows.text[row] for conversation in found for row in conversation)
    texts = {
        text: np.array(vocabulary.encode(text), np.uint16) for text in track(distinct, "encode", len(distinct), "texts")
    }
    lengths = [
        pieces.around(ROLES[role]) + len(texts.get(text, ())) for role, text in zip(rows.role, rows.text, strict=True)
    ]  # fmt: skip
    replies = [role == "assistant" for role in rows.role]
    room = params.block - len(pieces.start) - len(pieces.tail)
    return _Turns(fit(found, replies, lengths, room), pieces, texts, lengths, len(found))


@dataclass
class _Tally:
    """What was written of one split."""

    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    utf8_bytes: int = 0


def _write(out: Path, rows: _Rows, turns: _Turns, block: int, pad: int) -> dict[str, _Tally]:
    """Pack each split, write the arrays and the index, and return what was written."""
    import pyarrow as pa

    from tasks.text.pack import lay

    plan = _plan(rows, turns, block)
    index: dict[str, list[Any]] = {name: [] for name in INDEX_COLUMNS}
    written = {split: _Tally() for split in SPLITS}
    with ExitStack() as stack:
        files = {name: stack.enter_context((out / f"{name}.bin").open("wb")) for name in ARRAYS}
        for sequence, (split, conversations) in enumerate(track(plan, "pack", len(plan), "sequences")):
            documents = [turns.document(rows, conversation) for conversation in conversations]
            packed = lay([(document.ids, document.mask) for document in documents], block, pad)
            for name, file in files.items():
                file.write(getattr(packed, name).tobytes())
            written[split].sequences += 1
            for conversation, document, start in zip(conversations, documents, packed.starts, strict=True):
                _tally(written[split], rows, conversation, document)
                _note(index, rows, conversation, document, sequence=sequence, start=start)
    with parquet_writer(out / "index.parquet", INDEX_COLUMNS) as writer:
        writer.write_table(pa.table(index, schema=arrow_schema(INDEX_COLUMNS)))
    return written


def _plan(rows: _Rows, turns: _Turns, block: int) -> list[tuple[str, list[Conversation]]]:
    """Return the split and the conversations of each sequence, splits one after another.

    Raises:
        InputError: If the train split has no conversation.
    """
    from tasks.text.pack import best_fit

    of_split: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    for conversation in turns.fitted.conversations:
        of_split[rows.split[conversation[0]]].append(conversation)
    if not of_split["train"]:
        what = f"the train split holds no reply that fits a block of {block:,} tokens"
        where = f"{len(rows.text):,} messages came in, {rows.split.count('train'):,} of them to train on"
        raise InputError(what, where, "Keep more messages in curate, or raise encode.block", "encode.empty")
    return [
        (split, [found[number] for number in numbers])
        for split, found in of_split.items()
        for numbers in best_fit([turns.size(conversation) for conversation in found], block)
    ]


def _tally(tally: _Tally, rows: _Rows, conversation: Conversation, document: Document) -> None:
    tally.tokens += len(document.ids)
    tally.trained += sum(document.trained)
    replies = [row for row, trained in zip(conversation, document.trained, strict=True) if trained]
    tally.utf8_bytes += sum(len(rows.text[row].encode()) for row in replies)


def _note(
    index: dict[str, list[Any]],
    rows: _Rows,
    conversation: Conversation,
    document: Document,
    *,
    sequence: int,
    start: int,
) -> None:
    """Add the messages of a document to the index; each goes on from the one before it."""
    places = zip(conversation, [0, *document.stops], document.stops, document.trained, strict=False)
    for place, (row, first, stop, trained) in enumerate(places):
        parent = len(index["parent"]) - 1 if place else None
        values = (
            sequence, start + first, start + stop, parent, rows.message_id[row], rows.message_tree_id[row],
            rows.role[row], rows.split[row], trained,
        )  # fmt: skip
        for name, value in zip(INDEX_COLUMNS, values, strict=True):
            index[name].append(value)


def _spans(written: dict[str, _Tally]) -> dict[str, tuple[int, int]]:
    """Return the sequences of each split: (first, one past the last)."""
    spans, first = {}, 0
    for split, tally in written.items():
        spans[split] = (first, first + tally.sequences)
        first += tally.sequences
    return spans


def _counts(written: dict[str, _Tally], turns: _Turns, encoding: Encoding) -> Counts:
    sequences, tokens, trained = (
        sum(getattr(tally, name) for tally in written.values()) for name in ("sequences", "tokens", "trained")
    )
    return {
        "sequences": sequences,
        "tokens": tokens,
        "trained": trained,
        "padding": sequences * encoding.block - tokens,
        "found": turns.found,
        "conversations": len(turns.fitted.conversations),
        "cut": turns.fitted.cut,
        "skipped": turns.fitted.skipped,
        "repeated": turns.fitted.repeated,
        "too_long": turns.fitted.too_long,
        "distinct_texts": len(turns.texts),
        "vocab_size": encoding.vocab_size,
        "splits": {split: asdict(tally) for split, tally in written.items()},
    }


def _gate(out: Path, rows: _Rows) -> int:
    """Read everything back as a reader of the artifact would, and check it."""
    from tasks.text.chat import load_dialect
    from tasks.text.gate import Said, Written, check

    tokens = Tokens(out, Manifest(key="", kind=Tokens.kind, recipe={}, files={}, digest=""))
    arrays = (tokens.ids(), tokens.mask(), tokens.positions(), tokens.ends())
    written = Written(*arrays, tokens.index().collect(), tokens.encoding().splits)
    names = zip(rows.message_tree_id, rows.message_id, strict=True)
    said = map(Said, rows.text, rows.role, rows.parent_id, rows.split)
    return check(written, load_dialect(out), dict(zip(names, said, strict=True)))
