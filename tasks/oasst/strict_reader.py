"""A published tree or message -> rows of one flat table, checked, parents first. Nothing here recurses.

A row is a list of values in the order of `Layout.columns`. A tree is refused whole (`Fault`) when one of its messages
is: half a conversation is not what people wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import orjson

from tasks.oasst import validators
from tasks.oasst.validators import SYSTEM_CHARS, Fault, Reader, as_json, by_name, shown, wrong

Row = list[Any]

PLACE = ("message_tree_id", "message_id", "parent_id", "tree_state", "depth", "sibling")
TREE, ID, PARENT, STATE, DEPTH, SIBLING = range(len(PLACE))
FIELDS: Mapping[str, Reader] = {
    "user_id": validators.string,
    "created_date": validators.instant,
    "text": validators.string,
    "role": validators.role,
    "lang": validators.name,
    "review_count": validators.count,
    "review_result": validators.flag,
    "deleted": validators.flag,
    "rank": validators.count,
    "synthetic": validators.flag,
    "model_name": validators.string,
}
REQUIRED = frozenset({"text", "role"})  # of FIELDS; a message_id is asked for, too
OURS = REQUIRED | {"lang"}  # of FIELDS; these mean the same in a row of another dataset
CREATED = len(PLACE) + list(FIELDS).index("created_date")
END = ("events", "origin", "extra")
ORIGIN, EXTRA = -2, -1  # places of the last two columns
KNOWN = dict.fromkeys((*PLACE[:4], *FIELDS, "emojis", "labels", "detoxify", "events", "origin", "replies"))
KNOWN_OF_TREE = dict.fromkeys(("message_tree_id", "tree_state", "prompt", "origin"))
KNOWN_OF_LABEL = dict.fromkeys(("value", "count"))
NAMES_COUNTED = 100  # distinct unknown names; a hostile file could have one for each message


class Layout:
    """The columns of a row, and how a published message fills them.

    Attributes:
        columns: Names of the columns, in the order of a row.
        max_text: Bytes of UTF-8 that a text may have.
        unknown: How often a field was met that this program does not know; its value is kept in column `extra`.
        naive_dates: Instants so far that named no zone, and were read as UTC.
    """

    def __init__(self, labels: Collection[str], detoxify: Collection[str], max_text: int = 1 << 20) -> None:
        """Lay out a table with these labels and scores; a text has at most `max_text` UTF-8 bytes."""
        self._labels, self._scored, self.max_text = dict.fromkeys(labels), dict.fromkeys(detoxify), max_text
        self.columns = (
            *PLACE, *FIELDS, "emojis", *(f"label_{label}" for label in labels),
            *(f"label_{label}_count" for label in labels), *(f"detoxify_{score}" for score in detoxify), *END,
        )  # fmt: skip
        self.unknown: Counter[str] = Counter()
        self.naive_dates = 0

    def rows_of(self, tree: Mapping[str, Any], foreign: bool = False) -> list[Row]:
        """Return a nested tree's messages, depth first, not yet arranged.

        Args:
            tree: As published.
            foreign: Whether it was made of a row of another dataset, whose fields may have the names of ours for
                something else: these are kept as unknown ones are.

        Raises:
            Fault: If the tree or one of its messages is not of the published form.
        """
        prompt, tree_id, state = tree.get("prompt"), _tree_id(tree), tree.get("tree_state")
        rows: list[Row] = []
        stack: list[tuple[Any, str | None]] = [(prompt, None)]
        while stack:
            node, parent = stack.pop()
            _check_place(node, tree_id, parent)
            row = self.row(node, tree_id, state, parent, foreign)
            rows.append(row)
            stack.extend((reply, row[ID]) for reply in reversed(_replies(node)))
        self._keep_of_tree(rows[0], tree)
        return rows

    def row_of(self, message: Mapping[str, Any]) -> Row:
        """Return a flat message's row, not yet arranged.

        Raises:
            Fault: If the message is not of the published form.
        """
        if message.get("replies"):
            raise Fault("schema.replies", "expected no replies in a message that stands alone")
        parent = message.get("parent_id")
        if parent is not None:
            validators.name("parent_id", parent)
        row = self.row(message, flat_tree_id(message), None, parent)
        row[ORIGIN] = as_json(message.get("origin"))
        return row

    def row(
        self, message: Mapping[str, Any], tree_id: str, state: Any, parent: str | None, foreign: bool = False
    ) -> Row:
        """Return one message's row; depth and sibling are 0 until the tree is arranged.

        Args:
            message: As published, nested or flat.
            tree_id: The tree that it belongs to.
            state: The tree's state, where the message does not say it.
            parent: The message that it replies to; None for the root.
            foreign: As in `rows_of`.

        Raises:
            Fault: If a field does not hold what it should; the message is named.
        """
        get = message.get
        try:
            extra = self._strange("", message, KNOWN)
            aside = extra if foreign else None
            message_id = validators.name("message_id", get("message_id"))
            own = get("tree_state")
            state = state if own is None else own
            row: Row = [tree_id, message_id, parent, None, 0, 0]
            if state is not None:
                row[STATE] = self._or_aside("tree_state", state, validators.string, aside)
            for field, read in FIELDS.items():
                value = get(field)
                if aside is not None and field not in OURS:
                    row.append(None if value is None else self._or_aside(field, value, read, aside))
                else:
                    row.append(None if value is None and field not in REQUIRED else read(field, value))
            self._limit_text(message["text"])
            if row[CREATED] is not None and validators.is_naive(get("created_date")):
                self.naive_dates += 1
            row.append(self._or_aside("emojis", get("emojis"), self._emojis, aside))
            votes = self._or_aside("labels", get("labels"), partial(self._votes, extra), aside)
            row.extend(votes or [None] * (2 * len(self._labels)))
            scores = self._or_aside("detoxify", get("detoxify"), partial(self._scores, extra), aside)
            row.extend(scores or [None] * len(self._scored))
            row += (as_json(get("events")), None, as_json(extra or None))
        except Fault as fault:
            raise Fault(fault.code, f"{fault.message}, in message {shown(get('message_id'))}") from None
        return row

    def _or_aside(self, name: str, value: Any, read: Reader, extra: dict[str, Any] | None) -> Any:
        """Read a field; one that holds something else goes to `extra`, if there is one, under another name."""
        try:
            return read(name, value)
        except Fault:
            if extra is None:
                raise
        extra.update(self._strange("", {f"message.{name}": value}, KNOWN))
        return None

    def _limit_text(self, text: str) -> None:
        # a character has at most 4 bytes: most texts need not be encoded to know
        if len(text) * 4 > self.max_text and (size := len(text.encode())) > self.max_text:
            raise Fault("text.too_long", f"expected at most {self.max_text:,} bytes of text, got {size:,}")

    def _emojis(self, _: str, found: Any) -> list[tuple[str, int]] | None:
        if found is None:
            return None
        return [(emoji, validators.count("emojis", n)) for emoji, n in by_name("emojis", found, ("count",)).items()]

    def _votes(self, extra: dict[str, Any], _: str, found: Any) -> list[Any] | None:
        """Return each label's mean, then each label's count of votes."""
        if found is None:
            return None
        labels = by_name("labels", found, ("value", "count"))
        strange = self._strange("labels.", labels, self._labels)
        means: list[float | None] = []
        counts: list[int | None] = []
        for label in self._labels:
            vote = labels.get(label)
            if vote is None:
                means.append(None)
                counts.append(None)
                continue
            if type(vote) is not dict:
                raise wrong("labels", f"{label} as object", vote)
            mean, votes = vote.get("value"), vote.get("count")
            means.append(None if mean is None else validators.share("labels", mean))
            counts.append(None if votes is None else validators.count("labels", votes))
            if not vote.keys() <= KNOWN_OF_LABEL.keys():
                strange[label] = self._strange(f"labels.{label}.", vote, KNOWN_OF_LABEL)
        if strange:
            extra["labels"] = strange
        return [*means, *counts]

    def _scores(self, extra: dict[str, Any], _: str, found: Any) -> list[float | None] | None:
        if found is None:
            return None
        scores = by_name("detoxify", found, ("value",))
        if strange := self._strange("detoxify.", scores, self._scored):
            extra["detoxify"] = strange
        values = map(scores.get, self._scored)
        return [None if value is None else validators.share("detoxify", value) for value in values]

    def _keep_of_tree(self, root: Row, tree: Mapping[str, Any]) -> None:
        """Keep on the root what is said of the whole tree."""
        prompt = tree["prompt"]
        origin = tree.get("origin")
        root[ORIGIN] = as_json(prompt.get("origin") if origin is None else origin)
        if strange := self._strange("tree.", tree, KNOWN_OF_TREE):
            own = {} if root[EXTRA] is None else orjson.loads(root[EXTRA])
            root[EXTRA] = as_json({**own, **{f"tree.{field}": value for field, value in strange.items()}})

    def _strange(self, prefix: str, found: Mapping[str, Any], known: Mapping[str, None]) -> dict[str, Any]:
        """Return and count the fields that this program does not know."""
        if found.keys() <= known.keys():
            return {}
        strange = {field: value for field, value in found.items() if field not in known}
        for field in (field for field in strange if field != SYSTEM_CHARS):
            full = f"{prefix}{field}"[:80]
            self.unknown[full if full in self.unknown or len(self.unknown) < NAMES_COUNTED else "(others)"] += 1
        return strange


def _tree_id(tree: Mapping[str, Any]) -> str:
    """Return a nested tree's id: its own, or else its prompt's."""
    prompt, own = tree.get("prompt"), tree.get("message_tree_id")
    if type(prompt) is not dict:
        raise wrong("prompt", "object", prompt)
    return validators.name("message_tree_id", prompt.get("message_id") if own is None else own)


def flat_tree_id(message: Mapping[str, Any]) -> str:
    """Return the tree that a flat message names; a root without that field is its own.

    Raises:
        Fault: If a reply does not name its tree.
    """
    own = message.get("message_tree_id")
    if own is None and message.get("parent_id") is None:
        own = message.get("message_id")
    return validators.name("message_tree_id", own)


def _check_place(node: Any, tree_id: str, parent: str | None) -> None:
    """Refuse a nested message that claims another place than the one where it stands."""
    if type(node) is not dict:
        raise wrong("replies", "objects", node)
    claimed, owner = node.get("parent_id"), node.get("message_tree_id")
    if claimed is not None and claimed != parent:
        code, expected = ("tree.root", "null") if parent is None else ("tree.parent", shown(parent))
        raise Fault(code, f"expected parent_id {expected}, got {shown(claimed)}")
    if owner is not None and owner != tree_id:
        raise Fault("tree.id", f"expected message_tree_id {shown(tree_id)}, got {shown(owner)}")


def _replies(node: Mapping[str, Any]) -> list[Any]:
    found = node.get("replies")
    if found is not None and type(found) is not list:
        raise wrong("replies", "array", found)
    return found or []


def messages_in(tree: Mapping[str, Any]) -> int:
    """Count the messages of a nested tree as far as it can be walked, whatever else is wrong with it."""
    found, stack = 0, [tree.get("prompt")]
    while stack:
        node = stack.pop()
        if type(node) is dict:
            found += 1
            replies = node.get("replies")
            stack.extend(replies if type(replies) is list else ())
    return found


def arrange(rows: list[Row]) -> list[Row]:
    """Return a tree's rows in the order of `order`; fills depth and sibling.

    Raises:
        Fault: As `order` does.
    """
    places = order(
        [row[ID] for row in rows], [row[PARENT] for row in rows], lambda one, other: rows[one] == rows[other]
    )
    for place, depth, sibling in zip(*places, strict=True):
        rows[place][DEPTH], rows[place][SIBLING] = depth, sibling
    return [rows[place] for place in places[0]]


def order(
    ids: Sequence[str], parents: Sequence[str | None], equal: Callable[[int, int], bool]
) -> tuple[list[int], list[int], list[int]]:
    """Order a tree's messages depth first, parents before replies, replies in the order given.

    A message that is there twice, equal in every field, is taken once.

    Args:
        ids: (N,) of each message.
        parents: (N,) what each replies to; None for the root.
        equal: Tells whether the messages of two places are equal.

    Returns:
        (M,) each: place of a message, its depth, its place among the replies to one message.

    Raises:
        Fault: `id.duplicate`, `tree.orphan`, `tree.root` or `tree.cycle`, naming the message.
    """
    by_id: dict[str, int] = {}
    replies: dict[str | None, list[int]] = {}
    for place, (name, parent) in enumerate(zip(ids, parents, strict=True)):
        first = by_id.setdefault(name, place)
        if first == place:
            replies.setdefault(parent, []).append(place)
        elif not equal(first, place):
            raise Fault("id.duplicate", f"expected each message once, got two that differ as {shown(name)}")
    _check_links(ids, by_id, replies)
    places, depths, siblings = list[int](), list[int](), list[int]()
    stack = [(replies[None][0], 0, 0)]
    while stack:
        place, depth, sibling = stack.pop()
        places.append(place)
        depths.append(depth)
        siblings.append(sibling)
        if below := replies.get(ids[place]):
            stack.extend((below[number], depth + 1, number) for number in range(len(below) - 1, -1, -1))
    if len(places) < len(by_id):
        reached = {*places}
        raise _cycle(next(name for name, place in by_id.items() if place not in reached))
    return places, depths, siblings


def _check_links(ids: Sequence[str], by_id: Mapping[str, int], replies: Mapping[str | None, list[int]]) -> None:
    for parent, below in replies.items():
        if parent is not None and parent not in by_id:
            reply = shown(ids[below[0]])
            raise Fault("tree.orphan", f"expected a parent in this tree, got {shown(parent)} as that of {reply}")
    roots = replies.get(None, [])
    if len(roots) > 1:
        raise Fault("tree.root", f"expected one message without a parent, got {len(roots):,}")
    if not roots:  # each message has a parent that is there: somewhere they go round
        raise _cycle(next(iter(by_id)))


def _cycle(name: str) -> Fault:
    return Fault("tree.cycle", f"expected a way to the root, got parents that go round from {shown(name)}")
