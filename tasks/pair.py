"""Beside the chain, pair: lay out replies that people ranked, so that a model can be tuned to prefer the better ones.

All replies of a group share one sequence with what stands above them, by the rule of packed trees: the prompt is
there once, each reply sees it, and none sees another. So a group of K replies costs the prompt once, not twice for
each of its K (K - 1) / 2 pairs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tasks.artifacts import (
    REPLY_COLUMNS,
    Counts,
    Dialogues,
    PreferenceGroups,
    Tokens,
    arrow_schema,
    parquet_writer,
    write_encoding,
)
from tasks.errors import InputError
from tasks.step import Params, step
from tasks.token_arrays import SPLITS, encoded, encoder, spans, write_arrays

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    from tasks.dialogue.preference import Group
    from tasks.text.assemble import MessageLayout, Texts
    from tasks.text.linearize import Forest
    from tasks.text.templates import Dialect
    from tasks.text_chunks import TextFunction


class PairParams(Params):
    """Settings of the pair step."""

    max_replies: int = Field(default=8, ge=2, le=64)
    """Most replies of a group; of more, those in the middle are left out: the best and the worst teach the most."""


@step("pair", version=3, makes=PreferenceGroups)
def pair(out: Path, dialogues: Dialogues, tokens: Tokens, params: PairParams) -> Counts:
    """Write the preference groups of the dialogues, in the vocabulary, template and lengths of the tokens.

    Raises:
        InputError: If no two replies of the train split were put in an order.
    """
    from tasks.text.bpe import loaded
    from tasks.text.linearize import LINKS
    from tasks.text.templates import load_dialect

    dialect, encoding = load_dialect(tokens.path), tokens.encoding()
    vocabulary = loaded(tokens.path / "tokenizer.json", dialect.template.plain())
    rows = dialogues.scan().select(*LINKS, "role", "split").collect()
    table = _Table.of(
        dialogues, rows, dialect, encoder(vocabulary), (encoding.context_length, encoding.sequence_length)
    )
    found = list(table.preference_groups(params.max_replies))
    kept = {split: [one for one in found if table.splits[one.prompt] == split] for split in SPLITS}
    if not kept["train"]:
        what = f"no two replies to one prompt of the train split are ranked, of {rows.height:,} messages"
        raise InputError(what, str(dialogues.path), "Keep more messages, or take a source with ranks", "pair.empty")
    packed = {split: table.packed(some, first=sum(map(len, _before(kept, split)))) for split, some in kept.items()}
    placed = table.turns(
        [one for some in kept.values() for one in some], [one for some in packed.values() for one in some]
    )
    write_arrays(out, placed, table.texts, dialect.tags, encoding.sequence_length, dialect.pad)
    _write_replies(out / "replies.parquet", rows, placed)
    shutil.copyfile(tokens.path / "tokenizer.json", out / "tokenizer.json")
    splits = spans({split: len(sequences) for split, sequences in packed.items()})
    write_encoding(out, replace(encoding, layout="preference_groups", splits=splits, utf8_bytes={}))
    return {
        "sequences": sum(map(len, packed.values())),
        "preference_groups": sum(map(len, kept.values())),
        "replies": sum(len(one.replies) for some in kept.values() for one in some),
        "pairs": sum(one.pairs for some in kept.values() for one in some),
        "splits": {
            split: {"preference_groups": len(some), "pairs": sum(one.pairs for one in some)}
            for split, some in kept.items()
        },
    }


def _before(kept: dict[str, list[Group]], split: str) -> list[list[Group]]:
    return [kept[other] for other in SPLITS[: SPLITS.index(split)]]


@dataclass(frozen=True)
class _Table:
    """The messages of the dialogues, R rows, and how they are written.

    Attributes:
        trees: How they are linked.
        replies: (R,) whether a row is an assistant's.
        ranks: (R,) rank among siblings; None: unranked.
        splits: (R,) split of each row.
        texts: Ids of the texts that preference groups hold.
        sizes: (R,) tokens of a row, with all that stands around it but the start of its conversation.
        dialect: Vocabulary and template.
        block: Most tokens from a start to the end of a reply.
        length: T, tokens of a sequence.
    """

    trees: Forest
    replies: NDArray[np.bool_]
    ranks: list[int | None]
    splits: list[str]
    texts: Texts
    sizes: list[int]
    dialect: Dialect
    block: int
    length: int

    @classmethod
    def of(
        cls, dialogues: Dialogues, rows: pl.DataFrame, dialect: Dialect, encode: TextFunction, sizes: tuple[int, int]
    ) -> _Table:
        """Read the dialogues, and encode what any group may hold."""
        import numpy as np

        from tasks.dialogue.preference import preference_groups
        from tasks.text.assemble import around
        from tasks.text.linearize import forest

        trees = forest(rows)
        replies, ranks = (rows["role"] == "assistant").to_numpy(), rows["rank"].to_list()
        asked = np.zeros(rows.height, np.bool_)
        for one in preference_groups(trees.children, replies.tolist(), ranks):
            asked[[*trees.path(one.prompt), *one.replies]] = True
        texts, _ = encoded(dialogues, asked, encode, "pair: encode")
        nowhere = np.zeros(rows.height, np.bool_)  # what stands at the ends of a conversation is counted apart
        each = (texts.lengths + sum(around(replies, nowhere, nowhere, dialect.tags))).tolist()
        return cls(trees, replies, ranks, rows["split"].to_list(), texts, each, dialect, *sizes)

    def preference_groups(self, most: int) -> Iterator[Group]:
        """Yield the preference groups as far as they fit: replies that are too long go, then those in the middle."""
        from tasks.dialogue.preference import preference_groups

        for found in preference_groups(self.trees.children, self.replies.tolist(), self.ranks):
            above, group = self.above(found), found
            for row in found.replies:
                if above + self.leaf(row) > self.block:
                    group = group.without(row)
            while len(group.replies) > most or (group.pairs and self.size(group) > self.length):
                group = group.without(group.replies[len(group.replies) // 2])
            if group.pairs:
                yield group

    def leaf(self, row: int) -> int:
        """Tokens of a row that nothing is below."""
        return self.sizes[row] + len(self.dialect.tags.tail)

    def above(self, group: Group) -> int:
        """Tokens from the start of a conversation to the end of the prompt."""
        return len(self.dialect.tags.start) + sum(self.sizes[row] for row in self.trees.path(group.prompt))

    def size(self, group: Group) -> int:
        """Tokens of a group."""
        return self.above(group) + sum(self.leaf(row) for row in group.replies)

    def packed(self, some: list[Group], first: int) -> list[list[int]]:
        """Return the numbers of the preference groups of each sequence; the first of `some` has number `first`."""
        from tasks.text.pack import best_fit

        return [[first + place for place in places] for places in best_fit([*map(self.size, some)], self.length)]

    def turns(self, order: list[Group], packed: list[list[int]]) -> MessageLayout:
        """Give every message its place; what is above the replies is context."""
        import numpy as np

        from tasks.text.assemble import turns

        paths = [self.trees.path(one.prompt) for one in order]
        conversations = [(*path, *one.replies) for path, one in zip(paths, order, strict=True)]
        parents = np.array(self.trees.parents, np.int64)
        contexts = [*map(len, paths)]
        return turns(conversations, contexts, packed, parents, self.replies, self.texts.lengths, self.dialect.tags)


def _write_replies(path: Path, rows: pl.DataFrame, placed: MessageLayout) -> None:
    """Write where the replies lie, by sequence; a group's replies answer one message in one place."""
    import numpy as np
    import polars as pl

    at = np.flatnonzero(placed.trained > 0)
    columns = {
        "sequence": placed.sequence[at],
        "start": placed.start[at],
        "stop": (placed.start + placed.size)[at],
        "trained": placed.trained[at],
        "group": np.unique(placed.parent[at], return_inverse=True)[1],
    }
    named = rows[placed.row[at]].select("rank", "message_id", "message_tree_id", "split")
    table = pl.DataFrame(columns).cast(pl.Int32).with_columns(named).select(list(REPLY_COLUMNS))
    with parquet_writer(path, REPLY_COLUMNS) as writer:
        writer.write_table(table.to_arrow().cast(arrow_schema(REPLY_COLUMNS)))
