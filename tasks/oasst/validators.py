"""One published field -> one value, or a Fault that says what was expected and what was found."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

ROLES = ("prompter", "assistant")
# In `extra` of a first prompt: how many of its characters are those of a system message, with the empty line after it.
SYSTEM_CHARS = "system_chars"
LARGEST = 2**31 - 1  # the columns are int32
# datetime.fromisoformat also takes week dates, days alone and any letter for the T: too much for a published instant.
INSTANT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)?", re.ASCII)
OFFSET = re.compile(r"(Z|[+-]\d\d:\d\d)$", re.ASCII)
TOO_DEEP = "(nested too deep to be kept)"  # orjson reads 1,024 levels, and writes 254
NAMES = {
    type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object",
}  # fmt: skip


class Fault(Exception):
    """Why a line or a tree cannot be taken: a verdict that becomes a row of the rejected, not an error of the program.

    Args:
        code: A dotted name for machines, such as `schema.text`.
        message: Expected and found, in words.
        do: What makes it one that can be taken.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(code, message, hint)
        self.code, self.message, self.hint = code, message, hint


def wrong(field: str, expected: str, found: Any) -> Fault:
    """Return the fault of a field that does not hold what was expected."""
    return Fault(f"schema.{field}", f"expected {expected}, got {shown(found)}")


def shown(value: Any) -> str:
    """Return a JSON value's type and, where it is short by nature, the value, in ASCII. Never a container: too deep."""
    kind = NAMES.get(type(value), type(value).__name__)
    if type(value) is str:
        return f"{kind} {value[:60]!a}"
    return f"{kind} {value}" if type(value) in (int, float, bool) else kind


def string(field: str, value: Any) -> str:
    """Take a string."""
    if type(value) is not str:
        raise wrong(field, "string", value)
    return value


def name(field: str, value: Any) -> str:
    """Take a string that is not empty: an id, a language."""
    if type(value) is not str or not value:
        raise wrong(field, "string that is not empty", value)
    return value


def role(field: str, value: Any) -> str:
    """Take one of the two roles."""
    if value not in ROLES or type(value) is not str:
        raise wrong(field, "string prompter or assistant", value)
    return value


def flag(field: str, value: Any) -> bool:
    """Take true or false."""
    if type(value) is not bool:
        raise wrong(field, "boolean", value)
    return value


def count(field: str, value: Any) -> int:
    """Take an integer from 0 that an int32 holds; 3.0 is one, as tables with gaps write it."""
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise wrong(field, f"integer from 0 to {LARGEST}", value)
    return value


def share(field: str, value: Any) -> float:
    """Take a number from 0 to 1."""
    if type(value) not in (float, int) or not 0 <= value <= 1:
        raise wrong(field, "number from 0 to 1", value)
    return float(value)


def instant(field: str, value: Any) -> datetime:
    """Take an ISO 8601 date, time and offset, or a datetime (Parquet), and return it in UTC; naive ones are in UTC."""
    try:
        if type(value) is str and INSTANT.fullmatch(value):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except (ValueError, OverflowError):  # 30 February; an hour before the year 1
        pass
    raise wrong(field, "ISO 8601 date, time and offset", value)


def is_naive(value: Any) -> bool:
    """Tell an instant without an offset or zone."""
    return not value.tzinfo if isinstance(value, datetime) else not OFFSET.search(value)


def as_json(value: Any) -> str | None:
    """Return a value as JSON text, or None for null: bytes in base64, a duration in seconds, a decimal as text."""
    if value is None:
        return None
    try:
        return orjson.dumps(value, default=_as_text).decode()
    except TypeError:
        if type(value) is not dict:
            return f'"{TOO_DEEP}"'
    return orjson.dumps({name: _fragment(part) for name, part in value.items()}).decode()


def _fragment(part: Any) -> orjson.Fragment:
    try:
        return orjson.Fragment(orjson.dumps(part, default=_as_text))
    except TypeError:
        return orjson.Fragment(f'"{TOO_DEEP}"')


def _as_text(value: Any) -> str | float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    return b64encode(value).decode() if type(value) is bytes else str(value)


def by_name(field: str, value: Any, columns: Iterable[str]) -> Mapping[str, Any]:
    """Take an object of names; also in the hub's form, where each of `columns` is a list beside the list `name`.

    `{"name": ["spam"], "value": [0.0], "count": [3]}` is read as `{"spam": {"value": 0.0, "count": 3}}`, and with
    `count` alone as `{"spam": 3}`.
    """
    if value is None:
        return {}
    if type(value) is not dict:
        raise wrong(field, "object", value)
    if type(value.get("name")) is not list:
        return value
    names = value["name"]
    lists = {column: value.get(column) for column in columns}
    for column, found in lists.items():
        if type(found) is not list or len(found) != len(names):
            raise wrong(field, f"{column} as long as name", found)
    if set(map(type, names)) - {str}:
        raise wrong(field, "names as strings", names)
    if list(lists) == ["count"]:
        return dict(zip(names, lists["count"], strict=True))  # type: ignore[arg-type]  # checked to be lists
    rows = zip(*lists.values(), strict=True)
    return {key: dict(zip(lists, row, strict=True)) for key, row in zip(names, rows, strict=True)}


Reader = Callable[[str, Any], Any]
