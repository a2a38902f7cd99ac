"""Rows of `messages`, as most chats are kept (Hugging Face's and OpenAI's form) -> trees as OASST publishes them.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

A row is one path, and becomes a tree with one branch. Ids: `message_ids` and `tree_id` where the row gives them, as
`export messages` does; else the id of a message is a hash of all that was said up to and with it, and of `tree_id`.
Rows that begin alike then have their first ids in common, and parse unites them: a tree whose branches part where the
rows do. Rows of one `tree_id` that begin otherwise are trees of their own, which their first messages name: what makes
a tree is one first message, and without `message_ids` nothing says which is meant. The `tree_id` is kept in `extra`.

A system message is put before the first message of the user, with an empty line between, because trees have no third
role. `langs` are those of the messages, else `lang` is that of all; `id` and `split` are left out, since a path has no
id and a split is made here. All else is kept: of a row in column `extra` of the root, and of a message as the published
field of that name, if there is one (`rank`, `labels`, ...), else in `extra`.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from tasks.oasst import fields
from tasks.oasst.fields import Fault, wrong

KEY = "messages"  # a line or a table that has it is of this form
ROLES = {"user": "prompter", "assistant": "assistant"}
SYSTEM = "system"
TREE = "tree_id"
OWN = frozenset({KEY, "message_ids", TREE, "id", "split", "lang", "langs"})


def tree_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as a nested tree.

    Raises:
        Fault: If there are no messages, one has neither of the roles or no text, or ids or languages are not as many.
    """
    said = _with_system([_message(one) for one in _list(KEY, row.get(KEY))])
    given, tree_id = _as_many("message_ids", row.get("message_ids"), said), row.get(TREE)
    if tree_id is not None:
        fields.name(TREE, tree_id)
    ids = _made(said, tree_id or "") if given is None else [fields.name("message_ids", one) for one in given]
    langs = _as_many("langs", row.get("langs"), said) or [row.get("lang")] * len(said)
    replies: list[dict[str, Any]] = []
    for (role, content, rest), message_id, lang in zip(said[::-1], ids[::-1], langs[::-1], strict=True):
        own = {"message_id": message_id, "text": content, "role": ROLES[role], "replies": replies}
        replies = [{"lang": lang, **rest, **own}]
    others = {name: value for name, value in row.items() if name not in OWN}
    if given is None and tree_id is not None:
        others[TREE] = tree_id
    own_name = ids[0] if given is None or tree_id is None else tree_id
    return {**others, "message_tree_id": own_name, "prompt": replies[0]}


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
    content = fields.string("content", found.get("content"))
    return role, content, {name: value for name, value in found.items() if name not in ("role", "content")}


def _with_system(said: list[tuple[str, str, dict[str, Any]]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Put a system message that stands first before the user's; elsewhere there must be none."""
    if said[0][0] == SYSTEM:
        (_, system, _), *said = said
        if not said or said[0][0] != "user":
            raise Fault("schema.role", "expected a message of the user after that of the system")
        (role, content, rest), *later = said
        said = [(role, f"{system}\n\n{content}" if system else content, rest), *later]
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
