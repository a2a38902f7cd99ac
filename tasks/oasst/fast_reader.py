"""Good trees at full speed: the published form as types, so that a whole line is decoded and checked in one call.

`read` takes a line only where every field is known, of its type and in its range; of anything else it knows nothing,
and says so: the careful reader (`tree.Layout`) decides then, and explains. On what both take they agree, and both end
in the `Message` of this module: it is what a table is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from msgspec import DecodeError, Meta, Struct
from msgspec.json import Decoder

from tasks.oasst.strict_reader import DEPTH, FIELDS, PLACE, SIBLING, Row, order
from tasks.oasst.timestamps import microseconds, since_1970
from tasks.oasst.validators import LARGEST

Name = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0, le=LARGEST)]
Share = Annotated[float, Meta(ge=0, le=1)]

DEEPEST = (
    400  # messages above each other that are read here: orjson ends at 1,024 levels of JSON, this at Python's limit
)
MISSING = -1.0  # stands for no mean, no count, no score: numbers that are there are never negative


class Vote(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What people said of one label: their mean, and how many they were. Either may be MISSING."""

    value: Share
    count: Count


NO_VOTE = Vote(MISSING, int(MISSING))


class Votes(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """The labels of a message: `artifacts.LABELS`, in that order."""

    spam: Vote = NO_VOTE
    fails_task: Vote = NO_VOTE
    lang_mismatch: Vote = NO_VOTE
    pii: Vote = NO_VOTE
    not_appropriate: Vote = NO_VOTE
    hate_speech: Vote = NO_VOTE
    sexual_content: Vote = NO_VOTE
    moral_judgement: Vote = NO_VOTE
    political_content: Vote = NO_VOTE
    quality: Vote = NO_VOTE
    toxicity: Vote = NO_VOTE
    humor: Vote = NO_VOTE
    helpfulness: Vote = NO_VOTE
    creativity: Vote = NO_VOTE
    violence: Vote = NO_VOTE


class Scores(Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """The scores of a message: `artifacts.DETOXIFY`, in that order."""

    toxicity: Share = MISSING
    severe_toxicity: Share = MISSING
    obscene: Share = MISSING
    identity_attack: Share = MISSING
    insult: Share = MISSING
    threat: Share = MISSING
    sexual_explicit: Share = MISSING


NO_VOTES, NO_SCORES = Votes(), Scores()


class Message(Struct, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """A message, as published and then as it stands in its tree: `_place` fills in what only the tree says.

    Nothing said is always None: no labels or no scores are not an empty object. Once placed, a message refers to no
    other, so the garbage collector need not know of it (`gc=False`). The fields up to `emojis` are in the order of the
    table's columns.
    """

    message_tree_id: str | None = None
    message_id: Name
    parent_id: str | None = None
    tree_state: str | None = None
    user_id: str | None = None
    created_date: str | None = None  # once placed: microseconds since 1970, an integer
    text: str
    role: Literal["prompter", "assistant"]
    lang: Name | None = None
    review_count: Count | None = None
    review_result: bool | None = None
    deleted: bool | None = None
    rank: Count | None = None
    synthetic: bool | None = None
    model_name: str | None = None
    emojis: dict[str, Count] | None = None
    labels: Votes | None = None
    detoxify: Scores | None = None
    replies: list[Message] | None = None  # once placed: None
    events: None = None  # these two are read carefully, or not there
    origin: None = None


class Tree(Struct, gc=False, forbid_unknown_fields=True):
    """A nested tree as published."""

    prompt: Message
    message_tree_id: Name | None = None
    tree_state: str | None = None
    origin: None = None


class Rest(NamedTuple):
    """The columns that hardly any message fills, as JSON text."""

    events: str | None
    origin: str | None
    extra: str | None


class Arranged(NamedTuple):
    """The messages of a tree, depth first, parents before replies: M of them.

    Attributes:
        messages: (M,) each as it stands in the tree.
        depths: (M,) 0 at the root.
        siblings: (M,) place among the replies to one message, from 0.
        rest: What few messages have, by place in `messages`.
    """

    messages: list[Message]
    depths: list[int]
    siblings: list[int]
    rest: dict[int, Rest]

    @property
    def size(self) -> int:
        """M, its messages."""
        return len(self.messages)

    @property
    def ids(self) -> list[str]:
        """(M,) id of each message."""
        return [message.message_id for message in self.messages]

    def parts(self, size: int) -> Iterator[Arranged]:
        """Yield these messages, at most so many at a time."""
        if self.size <= size:
            yield self
            return
        for first in range(0, self.size, size):
            held = slice(first, first + size)
            rest = {place: found for place in range(size) if (found := self.rest.get(first + place))}
            yield Arranged(self.messages[held], self.depths[held], self.siblings[held], rest)

    def append(self, other: Arranged) -> None:
        """Put the messages of another tree behind these."""
        if other.rest:
            first = len(self.messages)
            self.rest.update((first + place, rest) for place, rest in other.rest.items())
        self.messages.extend(other.messages)
        self.depths.extend(other.depths)
        self.siblings.extend(other.siblings)


_decode, _decode_message = Decoder(Tree).decode, Decoder(Message).decode


class _Odd(Exception):
    """A tree that the careful reader must look at."""


def read(raws: Sequence[bytes | memoryview], max_text: int) -> list[tuple[str, Arranged] | None]:
    """Return id and messages of each good nested tree among some lines; None where the careful reader must look.

    Args:
        raws: Lines; several at a time are cheaper, since dates are looked at together.
        max_text: Bytes of UTF-8 that a text may have.
    """
    found = [_read(raw, max_text) for raw in raws]
    if _dated([message for one in found if one for message in one[1].messages]):
        return found
    return [one if one and _dated(one[1].messages) else None for one in found]


def read_flat(raws: Sequence[bytes | memoryview], max_text: int) -> list[Message | None]:
    """Return each good message that stands alone on its line, and names its tree; as `read` does, in all else."""
    found = [_read_flat(raw, max_text) for raw in raws]
    if _dated([one for one in found if one]):
        return found
    return [one if one and _dated([one]) else None for one in found]


def _read_flat(raw: bytes | memoryview, max_text: int) -> Message | None:
    try:
        message = _decode_message(raw)
    except (DecodeError, UnicodeDecodeError, RecursionError):
        return None
    parent = message.parent_id
    if message.message_tree_id is None and parent is None:
        message.message_tree_id = message.message_id
    if message.replies or not message.message_tree_id or parent == "" or len(message.text) > max_text // 4:
        return None
    _settle(message)
    return message


def _dated(messages: Sequence[Message]) -> bool:
    """Turn the dates of messages into microseconds; False if one is not in the usual form, and nothing is done."""
    dated = [message for message in messages if message.created_date is not None]
    instants = microseconds([message.created_date for message in dated])  # type: ignore[misc]  # None was left out
    if instants is None:
        return False
    for message, instant in zip(dated, instants.tolist(), strict=True):
        message.created_date = instant  # in the place of its text, which nobody needs any more
    return True


def _read(raw: bytes | memoryview, max_text: int) -> tuple[str, Arranged] | None:
    found = Arranged([], [], [], {})
    try:
        tree = _decode(raw)
        tree_id = tree.message_tree_id or tree.prompt.message_id
        _lay((tree.prompt,), None, 0, tree_id, tree.tree_state, found)
    except (DecodeError, UnicodeDecodeError, RecursionError, _Odd):
        return None
    messages = found.messages
    short = max_text // 4  # a character has at most 4 bytes; a text is shorter than its line
    if len(raw) > short and any(len(message.text) > short for message in messages):
        return None
    if len({message.message_id for message in messages}) < len(messages):
        return None
    return tree_id, found


def _lay(
    replies: Sequence[Message], above: str | None, depth: int, tree_id: str, state: str | None, found: Arranged
) -> None:
    """Lay out the replies to one message, and all below them; a call for each message that has some.

    Raises:
        _Odd: If they are too deep, or one of them claims another place.
    """
    if depth > DEEPEST:
        raise _Odd
    messages, depths, siblings, _ = found
    for sibling, message in enumerate(replies):
        if message.parent_id != above:
            if message.parent_id is not None:
                raise _Odd
            message.parent_id = above
        if message.message_tree_id is not None and message.message_tree_id != tree_id:
            raise _Odd
        message.message_tree_id = tree_id
        if message.tree_state is None:
            message.tree_state = state
        messages.append(message)
        depths.append(depth)
        siblings.append(sibling)
        if below := message.replies:
            _lay(below, message.message_id, depth + 1, tree_id, state, found)
        _settle(message)


def _settle(message: Message) -> None:
    """Let a placed message refer to no other, and say nothing in one way."""
    if message.labels == NO_VOTES:
        message.labels = None
    if message.detoxify == NO_SCORES:
        message.detoxify = None
    message.replies = None


def arranged(rows: Sequence[Row]) -> Arranged:
    """Return what the careful reader made of a tree, its rows arranged, in the form of this module."""
    rest = {place: found for place, row in enumerate(rows) if (found := rest_of(row))}
    depths, siblings = [row[DEPTH] for row in rows], [row[SIBLING] for row in rows]
    return Arranged([message_of(row) for row in rows], depths, siblings, rest)


def arrange_flat(messages: Sequence[Message], rest: Mapping[int, Rest]) -> Arranged:
    """Arrange the messages of a tree, as `tree.order` does.

    Args:
        messages: (N,) in any order, each with its parent.
        rest: What few of them have, by place in `messages`.

    Raises:
        Fault: As `tree.order` does.
    """

    def equal(one: int, other: int) -> bool:
        return messages[one] == messages[other] and rest.get(one) == rest.get(other)

    ids, parents = [message.message_id for message in messages], [message.parent_id for message in messages]
    places, depths, siblings = order(ids, parents, equal)
    moved = {new: rest[old] for new, old in enumerate(places) if old in rest} if rest else {}
    return Arranged([messages[place] for place in places], depths, siblings, moved)


def rest_of(row: Row) -> Rest | None:
    """Return what of a careful reader's row hardly any has."""
    return Rest(*row[_REST]) if any(row[_REST]) else None


_FIRST, _EMOJIS = len(PLACE), len(PLACE) + len(FIELDS)  # places in a careful reader's row
_MEANS = slice(_EMOJIS + 1, _EMOJIS + 1 + len(Votes.__struct_fields__))
_COUNTS = slice(_MEANS.stop, _MEANS.stop + len(Votes.__struct_fields__))
_SCORES = slice(_COUNTS.stop, _COUNTS.stop + len(Scores.__struct_fields__))
_REST = slice(_SCORES.stop, None)
_CREATED = _FIRST + list(FIELDS).index("created_date")


def message_of(row: Row) -> Message:
    """Return a careful reader's row in the form of this module, all but its `rest_of`."""
    means, scored = ([MISSING if share is None else share for share in row[part]] for part in (_MEANS, _SCORES))
    counts = [int(MISSING) if count is None else count for count in row[_COUNTS]]
    votes, scores = Votes(*map(Vote, means, counts)), Scores(*scored)
    emojis = row[_EMOJIS]
    fields = zip(Message.__struct_fields__, (*row[:DEPTH], *row[_FIRST:_EMOJIS]), strict=False)  # emojis and on follow
    made = Message(**dict(fields))
    if made.created_date is not None:
        made.created_date = since_1970(row[_CREATED])  # type: ignore[assignment]  # as `_dated` does
    made.emojis = None if emojis is None else dict(emojis)
    made.labels = None if votes == NO_VOTES else votes
    made.detoxify = None if scores == NO_SCORES else scores
    return made
