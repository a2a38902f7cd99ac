"""Files of prompts that an evaluation asks: one a line, as plain text or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import orjson

from tasks.errors import InputError

# Where known benchmarks and exports keep what they ask; the first that is there counts.
FIELDS = ("prompt", "question", "instruction", "input", "text", "problem", "ctx")


def format_of(name: str) -> Literal["json", "text"]:
    """Return how a file is read, which its name decides: `.jsonl`, `.ndjson` and `.json` hold JSON lines."""
    return "json" if name.lower().endswith((".jsonl", ".ndjson", ".json")) else "text"


def read_prompts(name: str, content: bytes) -> Iterator[tuple[int, str]]:
    """Yield the prompts of a file with the numbers of their lines, from 1; empty lines are passed over.

    A file of JSON lines, by its name, holds texts, objects with one of FIELDS, or chats as `messages`, of which the
    user's are prompts. In any other, a line is a prompt.

    Raises:
        InputError: For a line that is none of that.
    """
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{name} line {number}"
        if line.strip():
            found = _of_json(line, where) if format_of(name) == "json" else [_decoded(line, where)]
            yield from ((number, text) for text in found if text.strip())


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _odd("UTF-8", f"byte {line[error.start]:#04x}", where) from error


def _of_json(line: bytes, where: str) -> list[str]:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _odd("a line of JSON", str(error), where) from error
    if isinstance(found, str):
        return [found]
    if isinstance(found, Mapping) and isinstance(found.get("messages"), list):
        return [_content(turn, where) for turn in found["messages"] if _is_users(turn)]
    texts = [found[name] for name in FIELDS if isinstance(found.get(name), str)] if isinstance(found, Mapping) else []
    if not texts:
        raise _odd(
            f"a text, or an object with {', '.join(FIELDS)} or messages", line[:60].decode(errors="replace"), where
        )
    return texts[:1]


def _is_users(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") in {"user", "prompter", "human"}


def _content(turn: Mapping[str, Any], where: str) -> str:
    content = turn.get("content")
    if not isinstance(content, str):
        raise _odd("a message with text as its content", str(content)[:60], where)
    return content


def _odd(expected: str, found: str, where: str) -> InputError:
    return InputError(f"expected {expected}, found {found!r}", where, "Mend the line, or take it out", "curate.prompts")
