"""What to do with files and rows of a form that is not read here: the command that makes one that is."""

from __future__ import annotations

from collections.abc import Collection

FIELDS_SHOWN = 10
AS_LINES = "jq -c '.[]' FILE > FILE.jsonl"  # makes JSON Lines of a JSON array
TABLE_AS_LINES = """python -c "import polars; polars.read_parquet('FILE').write_ndjson('FILE.jsonl')\""""
ARROW_AS_LINES = TABLE_AS_LINES.replace("read_parquet", "read_ipc")
_PAIRS = [
    ("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"),
    ("input", "output"),
]  # fmt: skip
_TURNS = {"conversations": ("from", "value"), "conversation": ("role", "content"), "dialogue": ("role", "content")}
_ROLES = '{human:"user",user:"user",gpt:"assistant",assistant:"assistant",system:"system"}'


def listed(names: Collection[str]) -> str:
    """Return some names of fields as text, in ASCII."""
    some = [f"`{name[:60]!a}`".replace("'", "") for name in list(names)[:FIELDS_SHOWN]]
    return ", ".join(some) + (f" and {len(names) - len(some):,} more" if len(names) > len(some) else "")


def as_messages(names: Collection[str], table: bool = False) -> str:
    """Say how rows with these fields are made rows of `messages`.

    Args:
        names: Fields of a row.
        table: Whether they are columns of a Parquet file, of which JSON Lines must be made first.
    """
    first, file = (f"Make JSON Lines of it: {TABLE_AS_LINES}; then make", "FILE.jsonl") if table else ("Make", "FILE")
    for name, (role, text) in _TURNS.items():
        if name in names:
            turn = f"{{role: {_ROLES}[.{role}], content: .{text}}}"
            return f"{first} `messages` of `{name}`: jq -c '{{messages: [.{name}[] | {turn}]}}' {file} > NEW.jsonl"
    for asked, said in _PAIRS:
        if asked in names and said in names:
            turns = f'{{role: "user", content: .{asked}}}, {{role: "assistant", content: .{said}}}'
            return f"{first} `messages` of `{asked}`, `{said}`: jq -c '{{messages: [{turns}]}}' {file} > NEW.jsonl"
    return 'Write each row as {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
