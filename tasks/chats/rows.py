"""Rows of `messages`, as most chats are kept (Hugging Face's and OpenAI's form) -> trees as OASST publishes them.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

A row is one path, and becomes a tree with one branch. Ids: `message_ids` and `tree_id` where the row gives them, as
`export messages` does; else the id of a message is a hash of all that was said up to and with it, and of `tree_id`.
Rows that begin alike then have their first ids in common, and parse unites them: a tree whose branches part where the
rows do. Rows of one `tree_id` that begin otherwise are trees of their own, which their first messages name: what makes
a tree is one first message, and without `message_ids` nothing says which is meant. The `tree_id` is kept in `extra`.

A system message is put before the first message of the user, with an empty line between, because trees have no third
role. How many characters that adds is noted in `extra` as `system_chars`: curate compares what the user said.

`langs` are those of the messages, else `lang` is that of all; `id` is left out, since a path has none. All else is
kept: as the published field of that name, if there is one (of a row `tree_state` and `origin`, of a message `rank`,
`labels`, ...), else in column `extra`. There, names of a row have `row.` before them, and stand with its last message,
as rows that begin alike share the others; names that a tree needs for itself have `message.`, those of a system message
`system.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from tasks.oasst import validators
from tasks.oasst.validators import SYSTEM_CHARS, Fault, wrong

KEY = "messages"  # a line or a table that has it is of this form
ROLES = {"user": "prompter", "assistant": "assistant"}
SYSTEM = "system"
BETWEEN = "\n\n"  # the words of the system and the user's
TREE = "tree_id"
OWN = frozenset({KEY, "message_ids", TREE, "id", "lang", "langs"})
OF_TREE = frozenset({"tree_state", "origin"})  # what a row says of the tree that it becomes
ADDED = ("system.", "row.", "tree.")  # what stands before other names in `extra`
# Names of a message of a tree that one of a row may have for something else.
OF_MESSAGE = frozenset({"message_tree_id", "message_id", "parent_id", "text", "replies", SYSTEM_CHARS})


def tree_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as a nested tree.

    Raises:
        Fault: If there are no messages, one has neither of the roles or no text, or ids or languages are not as many.
    """
    said = _with_system([_message(one) for one in _list(KEY, row.get(KEY))])
    given, tree_id = _as_many("message_ids", row.get("message_ids"), said), _tree_id(row.get(TREE))
    ids = _made(said, tree_id or "") if given is None else [validators.name("message_ids", one) for one in given]
    langs = _as_many("langs", row.get("langs"), said) or [row.get("lang")] * len(said)
    others = {name: value for name, value in row.items() if name not in OWN | OF_TREE}
    said[-1][-1].update((f"row.{name}", value) for name, value in others.items())
    replies: list[dict[str, Any]] = []
    for (role, content, rest), message_id, lang in zip(said[::-1], ids[::-1], langs[::-1], strict=True):
        own = {"message_id": message_id, "text": content, "role": ROLES[role], "replies": replies}
        replies = [{"lang": lang, **rest, **own}]
    of_tree = {name: row[name] for name in OF_TREE & row.keys()}
    if given is None and tree_id is not None:
        of_tree[TREE] = row[TREE]
    own_name = ids[0] if given is None or tree_id is None else tree_id
    return {**of_tree, "message_tree_id": own_name, "prompt": replies[0]}


def _tree_id(found: Any) -> str | None:
    """Take a string that is not empty, or a whole number, as tables often have for an id."""
    return None if found is None else validators.name(TREE, str(found) if type(found) is int else found)


def _apart(name: str, prefix: str, taken: frozenset[str]) -> str:
    """Return a name under which no other is kept: one that is taken gets the prefix, or that has it already."""
    return prefix + name if name in taken or name.startswith((prefix, *ADDED)) else name


def _list(field: str, found: Any) -> list[Any]:
    if type(found) is not list or not found:
        raise wrong(field, "array that is not empty", found)
    return found


def _message(found: Any) -> tuple[str, str, dict[str, Any]]:
    """Return role, text and what else a message says."""
    if type(found) is not dict:
        raise wrong(KEY, "objects", found)
    role = found.get("role")
    if type(role) is not str or role not in (*ROLES, SYSTEM):
        raise wrong("role", "string user, assistant or system", role)
    content = validators.string("content", found.get("content"))
    prefix, taken = ("system.", frozenset(found)) if role == SYSTEM else ("message.", OF_MESSAGE)
    rest = {name: value for name, value in found.items() if name not in ("role", "content")}
    return role, content, {_apart(name, prefix, taken): value for name, value in rest.items()}


def _with_system(said: list[tuple[str, str, dict[str, Any]]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Put a system message that stands first before the user's; elsewhere there must be none."""
    if said[0][0] == SYSTEM:
        (_, system, told), *said = said
        if not said or said[0][0] != "user":
            raise Fault("schema.role", "expected a message of the user after that of the system")
        (role, content, rest), *later = said
        before = system + BETWEEN if system else ""
        if before and content.strip():  # where the user says nothing, all is compared
            told[SYSTEM_CHARS] = len(before)
        said = [(role, before + content, {**rest, **told}), *later]
    if any(role == SYSTEM for role, *_ in said):
        raise Fault("schema.role", "expected a message of the system in first place only")
    return said


def _as_many(field: str, found: Any, said: list[tuple[str, str, dict[str, Any]]]) -> list[Any] | None:
    """Take a list with a value for each message, or None where there is none."""
    if found is not None and len(_list(field, found)) != len(said):
        raise Fault(f"schema.{field}", f"expected one for each of {len(said):,} messages, got {len(found):,}")
    return found  # type: ignore[no-any-return]  # checked to be a list


def _made(said: list[tuple[str, str, dict[str, Any]]], before: str) -> list[str]:
    """Return a hash for each message, of all up to it and of what comes before all."""
    made = list[str]()
    for role, content, _ in said:
        before = sha256("\0".join((before, role, content)).encode()).hexdigest()[:32]
        made.append(before)
    return made
