"""What is inside an artifact, for people (text) and for programs (rows)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from tasks.artifacts import (
    Artifact,
    Dialogues,
    Messages,
    Model,
    PreferenceGroups,
    RawTrees,
    ReferenceLogprobs,
    Report,
    Tokens,
)
from tasks.dialogue.verdicts import named_in
from tasks.errors import ParameterError
from tasks.step import home
from tasks.store.store import Store

TRAINED = ("«", "»")  # around the text that the loss sees


def rows(artifact: Artifact, count: int) -> Any:
    """Return the first rows of an artifact, or the report, as JSON values."""
    if isinstance(artifact, Report):
        return artifact.figures()
    if isinstance(artifact, Model):
        told = {name: artifact.json(f"{name}.json") for name in ("start", "training")}
        return {**told, "adapters": adapters(artifact) or None, "log": _last(artifact.log(), count)}
    if isinstance(artifact, Tokens):
        return _documents(artifact, count)
    if isinstance(artifact, PreferenceGroups):
        return _ranked(artifact, count)
    if isinstance(artifact, ReferenceLogprobs):
        return [{"reply": reply, "nats": nats} for reply, nats in enumerate(artifact.logps()[:count].tolist())]
    if isinstance(artifact, Messages | Dialogues):
        return [_plain(row) for row in artifact.scan().head(count).collect().to_dicts()]
    return _raw_lines(artifact, count)


def text(artifact: Artifact, count: int) -> str:
    """Return what a person wants to see of an artifact first."""
    shown: Mapping[type[Artifact], Callable[[Any, int], str]] = {
        RawTrees: lambda made, n: "\n".join(line["head"] for line in _raw_lines(made, n)),
        Messages: _messages,
        Dialogues: _conversations,
        Tokens: _marked,
        PreferenceGroups: _preference_groups,
        ReferenceLogprobs: _reference_logprobs,
        Model: _model,
        Report: lambda made, n: made.markdown(),
    }
    manifest = artifact.manifest
    notices = "".join(f"{notice}\n" for notice in manifest.notices)
    head = f"{artifact.id}  {artifact.path}\n{json.dumps(artifact.counts, ensure_ascii=False)}\n{notices}"
    return f"{head}\n{shown[type(artifact)](artifact, count)}"


def aside(artifact: Artifact, which: Literal["rejected", "dropped"], count: int) -> list[dict[str, Any]]:
    """Return the first rows that a step set aside: bad input of messages, or what curation dropped, as JSON values.

    Raises:
        ParameterError: If the artifact has none of that kind.
    """
    if which == "rejected" and isinstance(artifact, Messages):
        return [_plain(row) for row in artifact.rejected().head(count).collect().to_dicts()]
    if which == "dropped" and isinstance(artifact, Dialogues):
        wanted = ("message_tree_id", "message_id", "role", "lang", "reason", "evidence", "text")
        return [_plain(row) for row in artifact.dropped().select(wanted).head(count).collect().to_dicts()]
    kind = {"rejected": Messages, "dropped": Dialogues}[which].kind
    raise ParameterError(f"expected the id of {kind}, found {artifact.id}", f"--{which}", code="param.artifact")


def aside_line(row: Mapping[str, Any]) -> str:
    """Render one entry of `aside`."""
    if "code" in row:
        return f"{row['file']} line {row['line']:,}: {row['code']}: {row['message']}\n    {_line(row['head'])}"
    return verdict(row)


def verdicts(artifact: Dialogues, message: str) -> list[dict[str, Any]]:
    """Return what curation decided about a message, then about the one that its evidence names, and so on.

    Returns:
        One entry a message, as JSON values: `split` of a kept one and what was `masked` in it, `reason` and `evidence`
        of a dropped one. Empty if there is no such message.
    """
    import polars as pl

    wanted = ("message_id", "message_tree_id", "role", "depth", "rank", "text")
    tables = (
        artifact.scan().select(*wanted, "split", "masked"),
        artifact.dropped().select(*wanted, "reason", "evidence"),
    )
    found: list[dict[str, Any]] = []
    asked: str | None = message
    while asked is not None and asked not in {row["message_id"] for row in found}:
        rows = [row for table in tables for row in table.filter(pl.col("message_id") == asked).collect().to_dicts()]
        found += [_plain(row) for row in rows]
        asked = next((named_in(row["reason"], row["evidence"]) for row in rows if "reason" in row), None)
    return found


def verdict(row: Mapping[str, Any]) -> str:
    """Render one entry of `verdicts`: which message, what became of it, and its text."""
    rank = f", rank {row['rank']}" if "rank" in row else ""
    became = (
        f"kept in {row['split']}, tree {row['message_tree_id']}"
        if "split" in row
        else f"dropped by {row['reason']}: {row['evidence']}"
    )
    became += f", masked: {row['masked']}" if "masked" in row else ""
    return f"{row['role']} {row['message_id']}{rank}: {became}\n    {_line(row['text'])}"


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is null: a message has some fifty columns."""
    return {name: str(value) if name == "created_date" else value for name, value in row.items() if value is not None}


def _raw_lines(artifact: Artifact, count: int) -> list[dict[str, Any]]:
    import gzip
    from itertools import islice

    assert isinstance(artifact, RawTrees)
    lines = []
    for path in artifact.data():
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as stream:
            lines += [
                {"file": path.name, "line": number, "head": line[:300].decode(errors="replace").rstrip()}
                for number, line in enumerate(islice(stream, count), 1)
            ]
    return lines


def _messages(artifact: Messages, count: int) -> str:
    found = artifact.scan().head(count).collect()
    return "\n".join(
        f"{'  ' * min(row['depth'], 8)}{row['role']} {row['message_id']} [{row['lang']}"
        f"{'' if row['rank'] is None else ', rank ' + str(row['rank'])}] {_line(row['text'])}"
        for row in found.iter_rows(named=True)
    )


def _conversations(artifact: Dialogues, count: int) -> str:
    """Render the first trees, each reply under what it answers."""
    import polars as pl

    trees = artifact.scan().select("message_tree_id").unique(maintain_order=True).head(count)
    found = artifact.scan().join(trees, on="message_tree_id", how="semi").collect()
    lines = []
    for row in found.filter(pl.col("message_tree_id").is_not_null()).iter_rows(named=True):
        if row["depth"] == 0:
            lines.append(f"\n── tree {row['message_tree_id']} · {row['split']}")
        pad = "    " * min(row["depth"], 10)
        rank = "" if row["rank"] is None else f" (rank {row['rank']})"
        body = row["text"].replace("\n", f"\n{pad}    ")
        lines.append(f"{pad}{row['role']}{rank}: {body}")
    return "\n".join(lines).strip()


def _documents(artifact: Tokens, count: int) -> list[dict[str, Any]]:
    """Decode the messages of the first sequences, with what of each is trained."""
    import polars as pl
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact.path / "tokenizer.json"))
    ids, mask = artifact.ids()[:count], artifact.mask()[:count]
    found = []
    for row in artifact.index().filter(pl.col("sequence") < len(ids)).collect().iter_rows(named=True):
        where = slice(row["start"], row["stop"])
        pieces = _runs(ids[row["sequence"]][where].tolist(), mask[row["sequence"]][where].tolist())
        decoded = [(tokenizer.decode(run, skip_special_tokens=False), trained) for run, trained in pieces]
        marked = [TRAINED[0] + part + TRAINED[1] if on else part for part, on in decoded]
        found.append({**row, "text": "".join(part for part, _ in decoded), "marked": "".join(marked)})
    return found


def _runs(ids: list[int], mask: list[int]) -> list[tuple[list[int], bool]]:
    runs: list[tuple[list[int], bool]] = []
    for token, on in zip(ids, mask, strict=True):
        if not runs or runs[-1][1] != bool(on):
            runs.append(([], bool(on)))
        runs[-1][0].append(token)
    return runs


def _marked(artifact: Tokens, count: int) -> str:
    lines, sequence = [f"text that is trained on stands between {TRAINED[0]} and {TRAINED[1]}"], None
    for row in _documents(artifact, count):
        if row["sequence"] != sequence:
            sequence = row["sequence"]
            lines.append(f"\n── sequence {sequence} · {row['split']}")
        lines.append(row["marked"])
    return "\n".join(lines)


def _ranked(artifact: PreferenceGroups, count: int) -> list[dict[str, Any]]:
    """Decode the first preference groups: what is asked, and the replies to it, in the order in which they lie."""
    import numpy as np
    import polars as pl
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact.path / "tokenizer.json"))
    ids, positions = artifact.ids(), artifact.positions()

    def read(sequence: int, start: int, stop: int) -> str:
        return str(tokenizer.decode(ids[sequence][start:stop].tolist(), skip_special_tokens=False))

    found: dict[int, dict[str, Any]] = {}
    for row in artifact.replies().filter(pl.col("group") < count).collect().iter_rows(named=True):
        where = row["sequence"], row["start"], row["stop"]
        if row["group"] not in found:  # what is above its first reply begins where positions do
            begin = int(np.flatnonzero(positions[where[0]][: where[1]] == 0)[-1])
            asked = {"sequence": where[0], "split": row["split"], "prompt": read(where[0], begin, where[1])}
            found[row["group"]] = {"group": row["group"], **asked, "replies": []}
        reply = {"message_id": row["message_id"], "rank": row["rank"], "text": read(*where)}
        found[row["group"]]["replies"].append(reply)
    return list(found.values())


def _preference_groups(artifact: PreferenceGroups, count: int) -> str:
    lines = []
    for group in _ranked(artifact, count):
        lines.append(f"\n── group {group['group']} · {group['split']}\n{group['prompt']}")
        best_first = sorted(group["replies"], key=lambda reply: int(reply["rank"]))
        lines += [f"rank {reply['rank']} {reply['message_id']}: {reply['text']}" for reply in best_first]
    return "\n".join(lines).strip()


def _reference_logprobs(artifact: ReferenceLogprobs, count: int) -> str:
    found = "\n".join(
        f"reply {reply:,}: {nats:.3f} nats" for reply, nats in enumerate(artifact.logps()[:count].tolist())
    )
    return f"log-probability of each reply, in the order of the preference groups' replies.parquet\n{found}"


def _model(artifact: Model, count: int) -> str:
    last = "\n".join(json.dumps(entry) for entry in _last(artifact.log(), count))
    told = json.dumps(artifact.json("training.json"), indent=1)
    beside = f"\n{line}" if (line := adapters(artifact)) else ""
    return f"started from {origin(artifact.json('start.json'))}{beside}\n\n{told}\n\nthe log's end:\n{last}"


def adapters(model: Model) -> str:
    """Say what the adapters of a model lie over, and how to use them; empty where it has none."""
    if "adapter.tar" not in model.manifest.files:
        return ""
    given = model.json("training.json").get("from")  # prefer says what it was given, train only what it started from
    over = Store(home()).names().get(given, given[:12] + "…") if given else origin(model.json("start.json"))
    return f"adapters lie over {over}; `python -m flows export adapter {model.id} DIR` writes both for peft"


def origin(start: Mapping[str, Any]) -> str:
    """Say what a model started from, and what that started from, by its start.json."""
    if "from" not in start:
        return str(start.get("repo") or start["start"])
    digest = start["model"]
    return f"{Store(home()).names().get(digest, digest[:12] + '…')}, which started from {origin(start['from'])}"


def _last(entries: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return entries[-count:] if count else []


def _line(value: str) -> str:
    flat = " ".join(value.split())
    return flat if len(flat) <= 100 else flat[:99] + "…"
