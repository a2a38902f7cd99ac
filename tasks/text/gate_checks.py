"""The rules of encoded data that need no text: who is trained on, who sees whom, what stands around the turns.

Each rule takes a chunk and the dialect, and refuses the first fault that it finds; every token is looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tasks.text.assemble import ranges as spread
from tasks.text.gate_reader import Chunk, Ints, Written, fail
from tasks.text.templates import Dialect


def known_ids(chunk: Chunk, dialect: Dialect) -> None:
    """Every id stands for something: the rows that only pad the table are never used."""
    for token in np.flatnonzero(chunk.ids >= dialect.used)[:1]:
        fail("id", chunk.named(token), f"holds id {chunk.ids[token]}, the vocabulary ends at {dialect.used - 1}")


def ranges(chunk: Chunk, dialect: Dialect) -> None:
    """Messages lie in order, apart, inside one sequence, each after the parent that it names."""
    sequence = chunk.index["sequence"].to_numpy()
    inside = chunk.start // chunk.block == (chunk.stop - 1) // chunk.block
    good = (chunk.start < chunk.stop) & inside
    good[1:] &= chunk.start[1:] >= chunk.stop[:-1]
    good &= (chunk.parent >= -1) & (chunk.parent < np.arange(len(good)))
    replies = np.flatnonzero(good & (chunk.parent >= 0))
    good[replies] = sequence[chunk.parent[replies]] == sequence[replies]
    for message in np.flatnonzero(~good)[:1]:
        row = chunk.index.row(int(message))
        fail("range", chunk.names[message], f"has a range that is empty, overlaps or leaves its sequence: {row}")


def padding(chunk: Chunk, dialect: Dialect) -> None:
    """What belongs to no message is padding, which is never trained on and sees only itself."""
    free = np.ones(len(chunk.ids), np.bool_)
    free[chunk.tokens] = False
    rest = np.flatnonzero(free)
    good = (chunk.ids[rest] == dialect.pad) & (chunk.mask[rest] == 0) & (chunk.positions[rest] == 0)
    good &= chunk.ends[rest] == rest % chunk.block + 1
    for token in rest[~good][:1]:
        place = token % chunk.block
        fail("padding", chunk.named(token), f"is followed by token {place}, which is neither text nor padding")


def only_replies(chunk: Chunk, dialect: Dialect) -> None:
    """Only an assistant's tokens are trained on, and never the first token of a conversation."""
    for message in np.flatnonzero(~chunk.replies & (chunk.targets > 0))[:1]:
        fail("mask", chunk.names[message], "is not an assistant's, and one of its tokens is trained on")
    roots = np.flatnonzero(chunk.parent < 0)
    for message in roots[chunk.mask[chunk.start[roots]] != 0][:1]:
        fail("first", chunk.names[message], "has its first token trained on, which nothing comes before")


def turns_end(chunk: Chunk, dialect: Dialect) -> None:
    """Every conversation teaches something, and every reply teaches to stop."""
    trained = chunk.targets
    document = np.cumsum(chunk.parent < 0) - 1
    roots = np.flatnonzero(chunk.parent < 0)
    for place in np.flatnonzero(np.bincount(document, trained, len(roots)) == 0)[:1]:
        fail("untrained", chunk.names[roots[place]], "opens a conversation with nothing to train on")
    marked = np.append(-1, np.flatnonzero(chunk.mask))
    latest = marked[np.searchsorted(marked, chunk.stop) - 1]
    for message in np.flatnonzero(chunk.taught & ((trained == 0) | (chunk.ids[latest] != dialect.stop)))[:1]:
        found = chunk.ids[latest[message]] if trained[message] else "nothing"
        what = f"must have the end of its turn, id {dialect.stop}, trained on last; found {found}"
        fail("stop", chunk.names[message], what)
    noted = chunk.index["trained"].to_numpy()
    for message in np.flatnonzero(trained != noted)[:1]:
        what = f"has {trained[message]} trained tokens, its index says {noted[message]}"
        fail("mask", chunk.names[message], what)


def whole_replies(chunk: Chunk, dialect: Dialect) -> None:
    """A reply that is trained is trained from the first token of its text to the end of its turn, without a gap."""
    tags = dialect.tags
    head = len(tags.opens["assistant"]) + len(tags.start) * (chunk.parent < 0)
    first, last = chunk.start + head, chunk.stop - len(tags.tail) * chunk.leaves
    expected = np.zeros(len(chunk.ids), np.uint8)
    expected[spread(first[chunk.taught], last[chunk.taught])] = 1
    for token in np.flatnonzero(expected != chunk.mask)[:1]:
        what = f"token {token % chunk.block}: expected mask {expected[token]}, found {chunk.mask[token]}"
        fail("mask", chunk.named(token), what)


def no_forged_ids(chunk: Chunk, dialect: Dialect) -> None:
    """No special id comes out of a text: a message holds those of its template and no more."""
    special = np.zeros(1 << 16, np.bool_)
    special[list(dialect.specials.values())] = True
    tags, ours = dialect.tags, set(dialect.specials.values())

    def count(ids: list[int]) -> int:
        return sum(token in ours for token in ids)

    of_role = {role: count(tags.opens[role]) + count(tags.closes[role]) for role in tags.opens}
    expected = np.where(chunk.replies, of_role["assistant"], of_role["user"])
    expected = expected + count(tags.start) * (chunk.parent < 0) + count(tags.tail) * chunk.leaves
    found = chunk.summed(special[chunk.ids])
    for message in np.flatnonzero(found != expected)[:1]:
        what = f"holds {found[message]} special ids, its template writes {expected[message]}"
        fail("special", chunk.names[message], what)


def visibility(chunk: Chunk, dialect: Dialect) -> None:
    """A token sees what came before it in its conversation and nothing else; positions count along that."""
    sizes, above = chunk.stop - chunk.start, chunk.parent.copy()
    depth, end = np.zeros(len(sizes), np.int64), chunk.stop.copy()
    while len(going := np.flatnonzero(above >= 0)):  # a round a level; `ranges` saw to it that parents come before
        depth[going] += sizes[above[going]]
        np.maximum.at(end, above[going], chunk.stop[going])
        above[going] = chunk.parent[above[going]]
    last = end - chunk.start // chunk.block * chunk.block
    expected = {"positions": spread(depth, depth + sizes), "ends": np.repeat(last, sizes)}
    for name, values in expected.items():
        found = getattr(chunk, name)[chunk.tokens]
        for place in np.flatnonzero(found != values)[:1]:
            token = int(chunk.tokens[place])
            what = f"token {token % chunk.block}: expected {name} {values[place]}, found {found[place]}"
            fail(name, chunk.named(token), what)


def trained_as_often(written: Written, row: Ints) -> None:
    """Every reply is trained where it stands; of those that are to be trained once, one is, the others are context.

    Args:
        written: All of it.
        row: (rows of the index,) row of the input of each.
    """
    replies, trained = (written.index["role"] == "assistant").to_numpy(), (written.index["trained"] > 0).to_numpy()
    times = np.bincount(row[trained], minlength=int(row.max(initial=-1)) + 1)[row]
    odd, wanted = (times != 1, "exactly once") if written.once else (~trained, "wherever it stands")
    for place in np.flatnonzero(replies & odd)[:1]:
        found = f"trained {times[place]} times" if written.once else "a place where it is not"
        fail("untrained", written.index["message_id"][int(place)], f"is to be trained {wanted}; found {found}")


RULES: tuple[Callable[[Chunk, Dialect], None], ...] = (
    ranges, known_ids, padding, only_replies, turns_end, no_forged_ids, whole_replies, visibility,
)  # fmt: skip
