"""The six artifacts: everything that flows between steps, with its files, columns, dtypes and units.

    RawTrees -> Messages -> Dialogues -> Tokens -> Model -> Report

An artifact is a handle: a folder and its manifest. Data stays on disk until `scan()`, `ids()` and their like are asked.
Importing this module is cheap on purpose: `plan` and `ls` must start neither polars nor torch.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.errors import StoreError
from tasks.jsonfile import parse_json, read_json
from tasks.store.manifest import NAME, Manifest

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import pyarrow as pa

    from tasks.parquet import TableWriter

Counts = dict[str, Any]  # what a step measured: names to numbers, or to tables of numbers such as the funnel

# The names of the published labels and scores: one float column each, null where absent (shared/oasst2 form).
LABELS = (
    "spam", "fails_task", "lang_mismatch", "pii", "not_appropriate", "hate_speech", "sexual_content",
    "moral_judgement", "political_content", "quality", "toxicity", "humor", "helpfulness", "creativity", "violence",
)  # fmt: skip
DETOXIFY = ("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")

# column -> Arrow type. A trailing "!" means: never null.
MESSAGE_COLUMNS: Mapping[str, str] = {
    "message_tree_id": "string!",
    "message_id": "string!",
    "parent_id": "string",  # null on the root only
    "tree_state": "string",
    "depth": "int32!",  # 0 for the root
    "sibling": "int32!",  # place among its siblings as published, from 0
    "user_id": "string",
    "created_date": "timestamp",  # UTC
    "text": "string!",
    "role": "string!",  # prompter | assistant
    "lang": "string",  # BCP 47
    "review_count": "int32",
    "review_result": "bool",  # null: undecided; false: rejected by reviewers
    "deleted": "bool",
    "rank": "int32",  # 0 = best among siblings; null: unranked
    "synthetic": "bool",
    "model_name": "string",
    "emojis": "map<string,int32>",
    **{f"label_{name}": "float32" for name in LABELS},  # mean of the votes, 0..1
    **{f"label_{name}_count": "int32" for name in LABELS},  # votes
    **{f"detoxify_{name}": "float32" for name in DETOXIFY},  # 0..1
    "events": "string",  # JSON as published
    "origin": "string",  # JSON as published; of the tree, on its root
    "extra": "string",  # JSON object of fields that this program does not know
}
# Columns of messages whose values hardly ever come again.
MESSAGE_DISTINCT = ("message_id", "parent_id", "created_date", "text", *(f"detoxify_{name}" for name in DETOXIFY))
REJECTED_COLUMNS: Mapping[str, str] = {
    "file": "string!",
    "line": "int64!",  # from 1; for parquet input: the row, from 1
    "byte_offset": "int64!",  # of the line's start in the decompressed stream; for parquet input: -1
    "code": "string!",  # json.syntax, schema.text, tree.orphan, ...
    "message": "string!",  # expected and found, in words
    "line_sha256": "string!",  # of the raw line
    "head": "string!",  # first 200 bytes, escaped to ASCII
    "message_tree_id": "string",
    "trees": "int32!",  # trees lost with this row: 1, or 0 where the loss is counted on another row
    "messages": "int32!",  # messages lost with this row; 0 where the line could not be read
}
DIALOGUE_COLUMNS: Mapping[str, str] = {
    **MESSAGE_COLUMNS,
    "split": "string!",  # train | val | test
    "masked": "string",  # personal data that `text` no longer holds: "e-mail 2, phone 1"; null: it is as published
}
DROPPED_COLUMNS: Mapping[str, str] = {
    **MESSAGE_COLUMNS,
    "reason": "string!",  # the rule's name, or `parent` where an ancestor was dropped
    "evidence": "string!",  # what the rule saw: "label_spam 0.83 > 0.50", the twin's message_id, ...
}
INDEX_COLUMNS: Mapping[str, str] = {
    "sequence": "int32!",  # row of the memmaps
    "start": "int32!",  # first token of the message in that row
    "stop": "int32!",  # one past its last token
    "parent": "int64",  # row of this table that holds the parent's tokens in the same sequence; null at a root
    "message_id": "string!",
    "message_tree_id": "string!",
    "role": "string!",
    "split": "string!",
    "trained": "int32!",  # supervised tokens in the range
    "rank": "int32",  # 0 = best among siblings; null: unranked
}

REPLY_COLUMNS: Mapping[str, str] = {
    "sequence": "int32!",  # row of the memmaps
    "start": "int32!",  # first token of the reply in that row
    "stop": "int32!",  # one past its last token
    "trained": "int32!",  # tokens in the range that its probability is taken over
    "group": "int32!",  # replies of one number answer one prompt
    "rank": "int32!",  # 0 = best; within a group, a lesser rank is preferred
    "message_id": "string!",
    "message_tree_id": "string!",
    "split": "string!",
}

FAST = 1  # level of zstd for tables of messages: two thirds of the time of 3, for a seventh more bytes
ARRAYS = ("ids.bin", "mask.bin", "positions.bin", "ends.bin")
_ARROW = {
    "string": "string", "int32": "int32", "int64": "int64", "float32": "float32", "bool": "bool_",
}  # fmt: skip


def arrow_schema(columns: Mapping[str, str]) -> pa.Schema:
    """Return the Arrow schema of a table of columns such as MESSAGE_COLUMNS."""
    import pyarrow as pa

    def field(name: str, kind: str) -> pa.Field:
        plain = kind.rstrip("!")
        if plain == "timestamp":
            made = pa.timestamp("us", tz="UTC")
        elif plain == "map<string,int32>":
            made = pa.map_(pa.string(), pa.int32())
        else:
            made = getattr(pa, _ARROW[plain])()
        return pa.field(name, made, nullable=not kind.endswith("!"))

    return pa.schema([field(name, kind) for name, kind in columns.items()])


def parquet_writer(
    path: Path, columns: Mapping[str, str], level: int = 3, distinct: Collection[str] = ()
) -> TableWriter:
    """Open a Parquet file for writing with the house's settings: explicit schema, zstd, page checksums.

    Args:
        path: The file.
        columns: A table of columns such as MESSAGE_COLUMNS.
        level: Of zstd.
        distinct: Columns whose values hardly ever come again: no dictionary is tried for them.
    """
    from tasks.parquet import TableWriter

    return TableWriter(
        path,
        arrow_schema(columns),
        compression="zstd",
        compression_level=level,
        use_dictionary=[name for name in columns if name not in distinct] if distinct else True,
        write_page_checksum=True,
    )


@dataclass(frozen=True)
class Artifact:
    """A finished folder of the store and its manifest.

    Attributes:
        path: The folder.
        manifest: What it holds, what made it, and how.
    """

    path: Path
    manifest: Manifest
    kind: ClassVar[str] = ""
    files: ClassVar[tuple[str, ...]] = ()  # names that must be there
    optional: ClassVar[tuple[str, ...]] = ()  # names, with wildcards, that may be there, too
    records: ClassVar[frozenset[str]] = frozenset()  # tell how the build went (times): verified, but not content

    @classmethod
    def declares(cls, name: str) -> bool:
        """Tell whether a file of this name may be part of such an artifact."""
        return name != NAME and any(fnmatch.fnmatchcase(name, pattern) for pattern in (*cls.files, *cls.optional))

    @property
    def id(self) -> str:
        """`kind/12 hex of the key`, as the command line prints it."""
        return f"{self.kind}/{self.manifest.key[:12]}"

    @property
    def counts(self) -> Counts:
        """What the step measured."""
        return self.manifest.counts

    def json(self, name: str) -> Any:
        """Read a small JSON file of the folder.

        Raises:
            StoreError: If it is none.
        """
        return _json(self.path / name)

    def table(self, name: str) -> pl.LazyFrame:
        """Scan a Parquet file of the folder, without reading it yet."""
        import polars as pl

        return pl.scan_parquet(self.path / name, glob=False)  # a store's path may hold brackets


@dataclass(frozen=True)
class RawTrees(Artifact):
    """The file or files as published, byte for byte."""

    kind = "raw"
    optional = ("*",)  # as the source names it

    def data(self) -> list[Path]:
        """Return the data files, by name."""
        return sorted(self.path / name for name in self.manifest.files)


@dataclass(frozen=True)
class Messages(Artifact):
    """Every message as a row, parents first, in the order of the dump; and what could not be read."""

    kind = "messages"
    files = ("messages.parquet", "rejected.parquet")

    def scan(self) -> pl.LazyFrame:
        """Scan the messages: MESSAGE_COLUMNS."""
        return self.table("messages.parquet")

    def rejected(self) -> pl.LazyFrame:
        """Scan what was bad in the input: REJECTED_COLUMNS."""
        return self.table("rejected.parquet")


@dataclass(frozen=True)
class Dialogues(Artifact):
    """The messages that are kept, still trees, each with its split; and every dropped one with its reason.

    curation.json is what a report says of it: the counts, the funnel by language, the first cases of each rule.
    """

    kind = "dialogues"
    files = ("dialogues.parquet", "dropped.parquet", "curation.json")

    def scan(self) -> pl.LazyFrame:
        """Scan the kept messages: DIALOGUE_COLUMNS."""
        return self.table("dialogues.parquet")

    def curation(self) -> dict[str, Any]:
        """Read what a report says of the data."""
        found: dict[str, Any] = self.json("curation.json")
        return found

    def dropped(self) -> pl.LazyFrame:
        """Scan the dropped messages: DROPPED_COLUMNS."""
        return self.table("dropped.parquet")


@dataclass(frozen=True)
class Encoding:
    """How texts became token ids: everything that a reader of the memmaps or of a tuned model needs to know.

    Attributes:
        context_length: Most tokens of a conversation, so positions are less than this.
        sequence_length: T, tokens in a sequence; at least `context_length`.
        vocab_size: V, rows of the embedding table; a multiple of 64, so the last ones may stand for nothing.
        template: Name of the chat template.
        layout: Name of the layout.
        specials: Text of each special token and its id.
        stop: Id of the end-of-turn token; generation stops at it.
        pad: Id that fills the rest of a sequence; never trained on.
        splits: Rows of the memmaps that a split owns: name -> (first, one past the last).
        utf8_bytes: UTF-8 bytes of the supervised text of each split, for bits per byte.
    """

    context_length: int
    sequence_length: int
    vocab_size: int
    template: str
    layout: str
    specials: dict[str, int]
    stop: int
    pad: int
    splits: dict[str, tuple[int, int]]
    utf8_bytes: dict[str, int]

    @property
    def used(self) -> int:
        """Ids that stand for something, <= V: the special tokens are the last of them."""
        return max(self.specials.values()) + 1


@dataclass(frozen=True)
class Sequences(Artifact):
    """Token ids and what the loss and attention need, as memmaps of S sequences of T tokens.

    ids.bin        (S, T) uint16  token ids
    mask.bin       (S, T) uint8   1 where this token is a target of the loss (predicted from the one before it)
    positions.bin  (S, T) uint16  position in its conversation, for the position embedding
    ends.bin       (S, T) uint16  token q sees token k when k <= q < ends[k]; padding sees only itself
    tokenizer.json                the same encoding for the `tokenizers` library
    encoding.json                 the fields of `Encoding`
    curation.json                 what a report says of the data, as the dialogues have it: tokens travel alone
    """

    def encoding(self) -> Encoding:
        """Read how the tokens were made."""
        return read_encoding(self.path)

    def ids(self, split: str | None = None) -> np.ndarray:
        """Map the token ids of a split, or of all: (S, T) uint16."""
        return self._map("ids.bin", "uint16", split)

    def mask(self, split: str | None = None) -> np.ndarray:
        """Map the loss mask: (S, T) uint8."""
        return self._map("mask.bin", "uint8", split)

    def positions(self, split: str | None = None) -> np.ndarray:
        """Map the positions: (S, T) uint16."""
        return self._map("positions.bin", "uint16", split)

    def ends(self, split: str | None = None) -> np.ndarray:
        """Map the visibility ends: (S, T) uint16."""
        return self._map("ends.bin", "uint16", split)

    def _map(self, name: str, dtype: str, split: str | None) -> np.ndarray:
        import numpy as np

        encoding = self.encoding()
        size = (self.path / name).stat().st_size
        if size == 0:  # an empty file cannot be mapped
            return np.zeros((0, encoding.sequence_length), dtype=dtype)
        whole = np.memmap(self.path / name, dtype=dtype, mode="r").reshape(-1, encoding.sequence_length)
        first, last = encoding.splits[split] if split else (0, len(whole))
        return whole[first:last]


@dataclass(frozen=True)
class Tokens(Sequences):
    """Conversations as token ids, and where each message lies.

    index.parquet                 token ranges back to messages: INDEX_COLUMNS
    curation.json                 what a report says of the data, where the dialogues told: a record, not content
    """

    kind = "tokens"
    records = frozenset({"curation.json"})
    optional = ("curation.json",)
    files = (*ARRAYS, "index.parquet", "tokenizer.json", "encoding.json")

    def curation(self) -> dict[str, Any] | None:
        """Read what a report says of the data; None where the dialogues did not tell."""
        found: dict[str, Any] | None = self.json("curation.json") if (self.path / "curation.json").exists() else None
        return found

    def index(self) -> pl.LazyFrame:
        """Scan the token ranges of messages: INDEX_COLUMNS."""
        return self.table("index.parquet")


@dataclass(frozen=True)
class PreferenceGroups(Sequences):
    """Replies to one prompt that people ranked, as token ids: each prompt once, its replies blind to each other.

    replies.parquet               which tokens are which reply, and its rank: REPLY_COLUMNS
    """

    kind = "groups"
    files = (*ARRAYS, "replies.parquet", "tokenizer.json", "encoding.json")

    def replies(self) -> pl.LazyFrame:
        """Scan the replies, by sequence and start: REPLY_COLUMNS."""
        return self.table("replies.parquet")


@dataclass(frozen=True)
class ReferenceLogprobs(Artifact):
    """Log-probability of each ranked reply: logps.bin, (R,) float32 nats, in the order of replies.parquet."""

    kind = "logprobs"
    files = ("logps.bin",)

    def logps(self) -> np.ndarray:
        """Read them: (R,) float32."""
        import numpy as np

        return np.fromfile(self.path / "logps.bin", np.float32)


@dataclass(frozen=True)
class Model(Artifact):
    """A tuned GPT-2 as a Hugging Face folder, with its tokenizer, chat template and the log of its training.

    start.json says what it started from; training.json what came of it; log.jsonl each step. Where adapters were
    trained, adapter.tar holds them as peft does, and model.safetensors the start with them added.
    """

    kind = "model"
    files = (
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "encoding.json", "start.json", "training.json", "log.jsonl",
    )  # fmt: skip
    records = frozenset({"log.jsonl"})
    optional = ("adapter.tar",)

    def encoding(self) -> Encoding:
        """Read how the texts it was trained on were encoded."""
        return read_encoding(self.path)

    def log(self) -> list[dict[str, Any]]:
        """Read the training log, one entry a line."""
        lines = (self.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [parse_json(line.encode()) for line in lines if line]


@dataclass(frozen=True)
class Report(Artifact):
    """What tuning changed: figures, plots and samples of the tuned model beside the one it started from."""

    kind = "report"
    files = ("report.json", "report.md", "loss.svg")
    optional = ("samples.jsonl", "facts.svg", "funnel.svg")

    def figures(self) -> dict[str, Any]:
        """Read report.json."""
        found: dict[str, Any] = self.json("report.json")
        return found

    def markdown(self) -> str:
        """Read report.md."""
        return (self.path / "report.md").read_text(encoding="utf-8")


KINDS: Mapping[str, type[Artifact]] = {
    made.kind: made
    for made in (RawTrees, Messages, Dialogues, Tokens, Model, Report, PreferenceGroups, ReferenceLogprobs)
}


def write_encoding(folder: Path, encoding: Encoding) -> None:
    """Write `encoding.json` into a folder."""
    (folder / "encoding.json").write_text(json.dumps(asdict(encoding), indent=1, sort_keys=True), encoding="utf-8")


def read_encoding(folder: Path) -> Encoding:
    """Read `encoding.json` from a folder.

    Raises:
        StoreError: If it is none, or of an earlier Treeline, which named its fields otherwise.
    """
    path = folder / "encoding.json"
    values, known = _json(path), {field.name for field in fields(Encoding)}
    if not isinstance(values, dict) or {*values} != known:
        odd = ", ".join(sorted({*values} ^ known)) if isinstance(values, dict) else type(values).__name__
        what = f"expected the fields of an encoding, found these missing or unknown: {odd}"
        raise StoreError(what, str(path), "Run encode again: another version of Treeline wrote it", "artifact.encoding")
    return Encoding(**{**values, "splits": {name: tuple(rows) for name, rows in values["splits"].items()}})


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"not JSON: {error}", str(path), "Run its recipe with --force", "artifact.json") from error
