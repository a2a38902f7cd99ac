"""Files of prompts that an evaluation asks: one a line, as plain text or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import orjson

from tasks.errors import InputError

# Where known benchmarks and exports keep what they ask. A row is asked with all that it has of them: the instruction
# alone says little where the text that it is about stands in `input`.
FIELDS = ("prompt", "question", "instruction", "input", "text", "problem", "ctx")
_UTF8_MARK = b"\xef\xbb\xbf"
_EXPECTED = f"a text, or an object with text in {', '.join(FIELDS)} or a user's in messages"


def format_of(name: str) -> Literal["json", "text"]:
    """Return how a file is read, which its name decides: `.jsonl`, `.ndjson` and `.json` hold JSON lines."""
    return "json" if name.lower().endswith((".jsonl", ".ndjson", ".json")) else "text"


def read_prompts(name: str, content: bytes) -> Iterator[tuple[int, str]]:
    """Yield the prompts of a file with the numbers of their lines, from 1; empty lines are passed over.

    A file of JSON lines, by its name, holds texts, objects, or chats as `messages`, of which the user's are prompts.
    Of an object, each of FIELDS that holds text is a prompt. In any other file, a line is a prompt.

    Raises:
        InputError: For a line that is none of that or asks nothing, and for a file without a prompt.
    """
    asked = False
    for number, line in enumerate(content.removeprefix(_UTF8_MARK).split(b"\n"), 1):
        where = f"{name} line {number}"
        if line.strip():
            found = _of_json(line, where) if format_of(name) == "json" else [_decoded(line, where)]
            yield from ((number, text) for text in found)
            asked = asked or bool(found)
    if not asked:
        expected = f"{_EXPECTED} on each line" if format_of(name) == "json" else "a prompt a line"
        hint = "Put prompts into it, or take it out of curate.prompt_files"
        raise InputError(f"expected {expected}, found none", name, hint, "curate.prompts")


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _odd("UTF-8", f"byte {line[error.start]:#04x}", where) from error


def _of_json(line: bytes, where: str) -> list[str]:
    """Return what a line asks: one text at least."""
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _odd("a line of JSON", str(error), where) from error
    texts = [text for text in _asked(found, where) if text.strip()]
    if not texts:
        raise _odd(_EXPECTED, line[:60].decode(errors="replace"), where)
    return texts


def _asked(found: Any, where: str) -> list[str]:
    if isinstance(found, str):
        return [found]
    if not isinstance(found, Mapping):
        return []
    turns = found.get("messages")
    said = [_content(turn, where) for turn in turns if _is_users(turn)] if isinstance(turns, list) else []
    return [*said, *(found[name] for name in FIELDS if isinstance(found.get(name), str))]


def _is_users(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") in {"user", "prompter", "human"}


def _content(turn: Mapping[str, Any], where: str) -> str:
    content = turn.get("content")
    if not isinstance(content, str):
        raise _odd("a message with text as its content", str(content)[:60], where)
    return content


def _odd(expected: str, found: str, where: str) -> InputError:
    return InputError(f"expected {expected}, found {found!r}", where, "Mend the line, or take it out", "curate.prompts")
