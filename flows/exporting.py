"""Artifacts for other programs: tokens as nanoGPT reads them, dialogues as Hugging Face `messages` rows, and adapters.

A folder is written beside its place and moved there by one rename, so it is there as a whole or not at all. Nothing is
ever pickled: a pickle runs code when it is opened. nanoGPT's `meta.pkl` therefore has no twin here but `meta.json`.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import Artifact, Counts, Dialogues, Model, Tokens
from tasks.errors import InputError, ParameterError, StoreError
from tasks.initial_weights import base_of
from tasks.store.disk import mark, sync

if TYPE_CHECKING:
    import polars as pl

ADAPTER, BASE = "adapter_config.json", "base"
HOW = """# Adapters of {model}

`peft.AutoPeftModelForCausalLM.from_pretrained` opens this folder where it was written. Anywhere else, name the base:

    base = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(base, ".")
    tokenizer = AutoTokenizer.from_pretrained("{base}")
"""
ROWS = 1_000  # rows, or sequences, that are written at a time
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # ours -> as `datasets` calls it
NOTES = (
    "train.bin and val.bin hold conversations one after another, each opened by <|endoftext|>; padding is left out.",
    "Positions, isolation of conversations and the loss mask do not exist in nanoGPT: it reads windows anywhere and "
    "trains on every token.",
    "Without a meta.pkl, nanoGPT's train.py makes 50,304 rows of embeddings, enough for every id here; set "
    "init_from='scratch'. GPT-2's own weights have 50,257 rows: ids from 50,257 on (role tokens) do not fit them.",
    "nanoGPT's sample.py decodes with GPT-2's vocabulary; to read other ids, load tokenizer.json with `tokenizers`.",
)


def export(form: str, artifact: Artifact, folder: Path) -> Counts:
    """Write an artifact into a new folder in another program's form, and return what was written.

    Raises:
        ParameterError: If the form is for another kind of artifact, or the folder has something in it.
        InputError: If the other program could not use what would be written.
        StoreError: If the folder cannot be written.
    """
    kind, write = FORMS[form]
    if not isinstance(artifact, kind):
        what = f"{form} is a form of {kind.kind}, found {artifact.id}"
        raise ParameterError(what, hint=f"`python -m flows ls {kind.kind}` lists them", code="param.artifact")
    with _whole(folder) as new:
        counts = write(artifact, new)
        if kind is Model:
            name_base(new, folder.absolute())
        return counts


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a new folder that takes the place of `folder` when all is written."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ParameterError("the folder to write is there, and not empty", str(folder), "name another", "param.folder")
    folder = folder.absolute()
    new = folder.with_name(f".{folder.name}.{mark()}")
    try:
        new.mkdir(parents=True)
        yield new
        for path in (*new.rglob("*"), new):
            sync(path)
        new.rename(folder)
        sync(folder.parent)
    except OSError as error:
        what = f"cannot write the export: {error.strerror or error}"
        raise StoreError(what, str(error.filename or folder), "free space, or name another", "export.write") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def nanogpt(tokens: Tokens, folder: Path) -> Counts:
    """Write train.bin and val.bin, uint16 as nanoGPT maps them, with meta.json and the tokenizer."""
    encoding = tokens.encoding()
    counts = {split: _stream(tokens, split, folder / f"{split}.bin") for split in ("train", "val")}
    for split, found in counts.items():
        if found == 0:
            what = f"the {split} split holds no tokens, and nanoGPT cannot open an empty {split}.bin"
            raise InputError(what, tokens.id, "keep more trees in curate, or another share for val", "export.empty")
    meta = {
        "format": "nanoGPT: one stream of uint16 token ids a file, little-endian",
        "tokens": counts,
        "vocab_size": encoding.used,
        "specials": encoding.specials,
        "stop": encoding.stop,
        "template": encoding.template,
        "layout": encoding.layout,
        "block": encoding.context_length,
        "made_from": tokens.id,
        "notes": NOTES,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(tokens.path / "tokenizer.json", folder / "tokenizer.json")
    return counts


def _stream(tokens: Tokens, split: str, path: Path) -> int:
    """Write the ids of a split without its padding, and return how many."""
    import numpy as np
    import polars as pl

    if tokens.encoding().layout == "tree":
        return _threads(tokens, split, path)
    ids, (first, last) = tokens.ids(split), tokens.encoding().splits[split]
    filled = np.zeros(last - first, np.int64)  # tokens before the padding
    stops = tokens.index().filter(pl.col("split") == split).group_by("sequence").agg(pl.col("stop").max()).collect()
    filled[stops["sequence"].to_numpy() - first] = stops["stop"].to_numpy()
    place = np.arange(ids.shape[1])
    with path.open("wb") as file:
        for low in range(0, len(ids), ROWS):
            here = slice(low, low + ROWS)
            file.write(ids[here][place < filled[here, None]].astype("<u2").tobytes())
    return int(filled.sum())


def _threads(tokens: Tokens, split: str, path: Path) -> int:
    """Write each path from a root to a leaf of packed trees: a plain stream has no branches. Return the ids written."""
    import polars as pl

    ids, index = tokens.ids(), tokens.index().with_row_index("place").filter(pl.col("split") == split).collect()
    first = index["place"].min() or 0
    parents = [-1 if above is None else above - first for above in index["parent"]]
    where = list(index.select("sequence", "start", "stop").iter_rows())
    inner, written = {*parents}, 0
    with path.open("wb") as file:
        for leaf in range(len(parents)):
            thread = []
            place = -1 if leaf in inner else leaf
            while place >= 0:
                thread.append(where[place])
                place = parents[place]
            for sequence, start, stop in reversed(thread):
                file.write(ids[sequence, start:stop].astype("<u2").tobytes())
                written += stop - start
    return written


def messages(dialogues: Dialogues, folder: Path) -> Counts:
    """Write every path from a root to a leaf as a row, by split: JSONL, Parquet, and a card for `datasets`."""
    import orjson
    import polars as pl
    import pyarrow as pa

    from tasks.parquet import TableWriter

    names = {name: pa.string() for name in ("id", "tree_id", "split", "lang")}
    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    several = {name: pa.list_(pa.string()) for name in ("message_ids", "langs")}  # one a message, but the system's
    schema = pa.schema({**names, **several, "messages": turns})
    found = dialogues.scan().collect()
    counts: Counts = {}
    for split in SPLITS:
        rows = found.filter(pl.col("split") == split)
        if rows.is_empty():  # `datasets` opens no empty file
            continue
        counts[split] = 0
        with ExitStack() as stack:
            lines = stack.enter_context((folder / f"{split}.jsonl").open("wb"))
            table = stack.enter_context(TableWriter(folder / f"{split}.parquet", schema, compression="zstd"))
            for some in _batches(_paths(rows)):
                lines.writelines(orjson.dumps(row) + b"\n" for row in some)
                table.write_table(pa.Table.from_pylist(some, schema=schema))
                counts[split] += len(some)
    (folder / "README.md").write_text(_card(dialogues, counts), encoding="utf-8")
    return counts


def _paths(rows: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield each path from a root to a leaf as a row; its id and language are those of its last message.

    A system message that stands before the user's words is given back its role; it has no id of its own.
    """
    from tasks.dialogue.texts import BETWEEN, opening, own_words
    from tasks.oasst.validators import SYSTEM_CHARS
    from tasks.text.linearize import forest, paths
    from tasks.text.templates import ROLES

    trees, ids, whole = (rows[name].to_list() for name in ("message_tree_id", "message_id", "text"))
    roles, langs = (rows[name].to_list() for name in ("role", "lang"))
    opens = opening(rows.lazy(), SYSTEM_CHARS)
    said = whole if opens is None else own_words(rows["text"], opens).to_list()
    for path in paths(forest(rows)):
        system = whole[path[0]].removesuffix(said[path[0]]).removesuffix(BETWEEN)
        yield {
            "id": ids[path[-1]],
            "tree_id": trees[path[0]],
            "split": rows["split"][0],
            "lang": langs[path[-1]],
            "message_ids": [ids[row] for row in path],
            "langs": [langs[row] for row in path],
            "messages": [{"role": "system", "content": system}] * bool(system)
            + [{"role": ROLES[roles[row]], "content": said[row]} for row in path],
        }


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    from itertools import islice

    while some := list(islice(rows, ROWS)):
        yield some


def _card(dialogues: Dialogues, counts: Counts) -> str:
    """Return the README that tells `datasets` which file is which split; it opens one kind of file in a folder."""
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in counts:
        lines += [f"  - split: {SPLITS[split]}", f"    path: {split}.parquet"]
    about = (
        f"One path from root to leaf a row; made by Treeline from {dialogues.id}. The JSONL files hold the same rows."
    )
    return "\n".join([*lines, "---", "", about, ""])


def adapter(model: Model, folder: Path) -> Counts:
    """Write the adapters of a model as peft reads them, and in `base/` the very model that they lie over.

    A published start would not do in its place: rows were added to its token table for this vocabulary.
    """
    from tasks.gpt.lora import ARCHIVE
    from tasks.gpt.weights import build_start, parameter_count, save_hf_folder

    if not (model.path / ARCHIVE).exists():
        what = f"{model.id} has no adapters: all of its weights were trained"
        raise ParameterError(
            what, hint="Open its folder with transformers, or train with train.lora_rank", code="param"
        )
    base, encoding = build_start(*base_of(model)).eval(), model.encoding()
    (folder / BASE).mkdir()
    save_hf_folder(base, folder / BASE, stop=encoding.stop, pad=encoding.pad, used=encoding.used)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model.path / name, folder / BASE / name)
    with tarfile.open(model.path / ARCHIVE) as archive:
        for name in (ADAPTER, "adapter_model.safetensors"):
            found = archive.extractfile(name)
            assert found is not None, f"{ARCHIVE} holds files"
            (folder / name).write_bytes(found.read())
    (folder / "README.md").write_text(HOW.format(model=model.id, base=BASE), encoding="utf-8")
    return {"base": parameter_count(base), "rank": json.loads((folder / ADAPTER).read_bytes())["r"]}


def name_base(new: Path, folder: Path) -> None:
    """Tell peft where the base will lie, once the export has its name."""
    config = json.loads((new / ADAPTER).read_bytes())
    text = json.dumps({**config, "base_model_name_or_path": str(folder / BASE)}, indent=1)
    (new / ADAPTER).write_text(text, encoding="utf-8")


FORMS: Mapping[str, tuple[type[Artifact], Callable[[Any, Path], Counts]]] = {
    "nanogpt": (Tokens, nanogpt),
    "messages": (Dialogues, messages),
    "adapter": (Model, adapter),
}
