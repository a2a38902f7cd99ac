"""Step 5, train: fine-tune a GPT-2 on token ids, and leave it as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.artifacts import Counts, Encoding, Model, Tokens
from tasks.errors import InputError, ParameterError
from tasks.gpt.folder import CONFIG, WEIGHTS, digests
from tasks.signals import kept_signals
from tasks.sources import MODELS
from tasks.start import FOLDER, SCRATCH, allowed_folder, fetch_published
from tasks.step import Params, Runtime, step

if TYPE_CHECKING:
    from tasks.gpt.batches import Split
    from tasks.gpt.run import Progress

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
NAMED = 16  # messages or sequences at most in an error


class TrainParams(Params):
    """Settings of the train step. The defaults suit fine-tuning gpt2-medium."""

    start: Literal["scratch", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "folder"] = "scratch"
    """Where the weights come from: random ones, a published GPT-2, or a local Hugging Face folder."""
    folder: str | None = None
    """Path of that folder (config.json, model.safetensors), under one that $TREELINE_MODEL_ROOTS names. Only for start = folder."""  # noqa: E501
    layers: Count = 3
    """Transformer blocks. Only for start = scratch."""
    heads: Count = 4
    """Attention heads of a block; a divisor of the width. Only for start = scratch."""
    width: Count = 128
    """Numbers in a hidden state. Only for start = scratch."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    """Seed of the initial weights, of the order of the data and of dropout."""
    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3.0
    """How often the data is gone through; a fraction ends in the middle."""
    batch_tokens: Count = 32_768
    """Tokens of an optimizer step, padding included; at least one sequence is taken."""
    lr: Annotated[float, Field(gt=0)] = 3e-5
    """Highest learning rate. From scratch, 1e-3 to 3e-3 is usual."""
    min_lr_share: Share = 0.1
    """Learning rate of the last step, as a share of the highest; a cosine leads there."""
    warmup_share: Share = 0.03
    """Share of the steps in which the learning rate rises to its highest."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of weight matrices and embeddings, per update and unit of learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW: decay of the running mean of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW: decay of the running mean of the squared gradient."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Longest gradient; a longer one is shortened to it. None: as it is."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of numbers dropped after embeddings, attention and both halves of a block."""
    evals_per_epoch: Annotated[int, Field(ge=1, le=1_000)] = 8
    """Evaluations of the whole validation split in an epoch, besides those at the start and the end."""
    patience: Count | None = None
    """Evaluations without a better validation loss after which training ends. None: it goes on."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of products; weights and sums stay float32. bfloat16 is for GPUs and for CPUs that have instructions for it."""

    @model_validator(mode="after")
    def _fits(self) -> TrainParams:
        if (self.folder is not None) != (self.start == FOLDER):
            raise ValueError("start = folder and folder = PATH go together")
        if self.start == SCRATCH and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def keyed(self) -> dict[str, Any]:
        """Return what enters the key: settings that have a say at this start; content in place of names and paths."""
        shape = set() if self.start == SCRATCH else {"layers", "heads", "width"}
        kept = self.model_dump(mode="json", exclude={"folder", *shape})
        if self.start == FOLDER:
            return {**kept, "weights": digests(allowed_folder(self.folder or ""))}
        if self.start in MODELS:
            return {**kept, "weights": {name: MODELS[self.start].files[name] for name in (WEIGHTS, CONFIG)}}
        return kept


class TrainRuntime(Runtime):
    """How fast, and where. The outcome is the same but for rounding and the draws of dropout."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    micro_batch: Count | Literal["auto"] | None = None
    """Sequences that go through the model at once; lower it where memory runs out. None: as many as hold 8,192 tokens; auto: of these, as many as fit into the memory that is free."""  # noqa: E501
    compile: bool = False
    """Compile the model; pays on a GPU, in runs longer than a few minutes."""
    threads: Count | None = None
    """CPU threads. None: one for a model narrower than 512, else as torch finds best."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 120.0
    """Seconds between checkpoints, from which a killed run goes on; more where saving is slow. 0: after each step."""
    keep_checkpoints: Count = 2
    """Checkpoints kept. With one, a disk that spoils it costs the run so far. The best weights are in each."""


@step("train", version=2, makes=Model, resumable=True)
def train(out: Path, tokens: Tokens, params: TrainParams, run: TrainRuntime) -> Counts:
    """Write the tuned model, its tokenizer and chat template, and how training went."""
    from tasks.gpt.device import device_of, threads
    from tasks.gpt.interrupt import Interrupt
    from tasks.gpt.loop import fit
    from tasks.gpt.planning import memory_named, planned
    from tasks.gpt.run import Machine, Settings
    from tasks.gpt.weights import build_start, export, parameter_count, set_dropout

    encoding = tokens.encoding()
    folder = fetch_start(params)
    spec = start_of(params, folder, encoding)
    splits = [split_of(tokens, name) for name in ("train", "val")]
    refuse_unfit(spec, *splits)
    refuse_foreign(params.start, tokens.path / "tokenizer.json")
    model = build_start(spec, folder)
    set_dropout(model, params.dropout)
    chosen = params.model_dump()
    sequences = max(1, params.batch_tokens // encoding.length)
    settings = Settings(sequences=sequences, **{f.name: chosen[f.name] for f in fields(Settings) if f.name in chosen})
    interrupt, device = Interrupt(), device_of(run.device)
    machine = Machine(
        device,
        time.monotonic,
        micro_batch=planned(model, splits, settings, device, run.micro_batch, time.monotonic),
        yielding=run.micro_batch == "auto",
        compile=run.compile,
        checkpoint_seconds=run.checkpoint_seconds,
        keep=run.keep_checkpoints,
        interrupt=interrupt,
        named=lambda rows: name_messages(tokens, rows),
    )
    with threads(run.threads, model.config.n_embd), kept_signals(interrupt.ask), memory_named(machine, encoding.length):
        progress = fit(model, *splits, settings=settings, machine=machine, workplace=out)
    export(model, out, stop=encoding.stop, pad=encoding.pad)
    write_tokenizer(out, tokens.path, encoding, spec["positions"])
    write_json(out / "start.json", spec)
    counts = counts_of(progress, parameter_count(model))
    write_json(out / "training.json", counts)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return counts


def fetch_start(params: TrainParams) -> Path | None:
    """Return the folder of the starting weights, fetched from the hub if they are published ones; None from scratch."""
    if params.start == SCRATCH:
        return None
    return allowed_folder(params.folder or "") if params.start == FOLDER else fetch_published(params.start)


def start_of(params: TrainParams, folder: Path | None, encoding: Encoding) -> dict[str, Any]:
    """Return what start.json says: where the run starts from, so that it can be built again."""
    from tasks.gpt.weights import folder_spec, scratch_spec

    if folder is None:
        return scratch_spec(
            layers=params.layers,
            heads=params.heads,
            width=params.width,
            positions=encoding.block,
            vocab_size=encoding.vocab_size,
            seed=params.seed,
        )
    published = MODELS.get(params.start)
    return folder_spec(
        folder,
        start=params.start,
        vocab_size=encoding.vocab_size,
        seed=params.seed,
        repo=published.repo if published else None,
        revision=published.revision if published else None,
    )


def split_of(tokens: Tokens, name: str) -> Split:
    """Map the sequences of a split."""
    from tasks.gpt.batches import Split

    arrays = [read(name) for read in (tokens.ids, tokens.mask, tokens.positions, tokens.ends)]
    return Split(*arrays)


def name_messages(tokens: Tokens, rows: Sequence[int]) -> str:
    """Say which messages some sequences of the training split hold, the first of them by id."""
    import polars as pl

    first, _ = tokens.encoding().splits["train"]
    index = tokens.index().filter(pl.col("sequence").is_in([first + row for row in rows]))
    ids = index.select(pl.col("message_id").unique(maintain_order=True)).collect()["message_id"].to_list()
    told = ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else "")
    places = ", ".join(str(first + row) for row in rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")
    return f"messages {told}, in sequences {places} of {tokens.id}"


def refuse_unfit(spec: dict[str, Any], train: Split, val: Split) -> None:
    """Raise an error unless there is something to train on, and the model has room for it."""
    if not len(train) or not train.supervised():
        what = f"expected tokens to train on, found {len(train):,} sequences without any"
        raise InputError(what, "the train split", "Loosen the filters of curate, or add data", "train.empty")
    longest = 1 + max(int(split.positions.max()) for split in (train, val) if len(split))
    if longest > spec["positions"]:
        raise ParameterError(
            f"the longest conversation has {longest:,} tokens, the model {spec['positions']:,} positions",
            "encode.block",
            f"Set encode.block to {spec['positions']} or less",
            "param.positions",
        )


def refuse_foreign(start: str, tokenizer: Path) -> None:
    """Raise an error if a published GPT-2 would be tuned on ids that are not GPT-2's: they would mean other words."""
    from tokenizers import Tokenizer

    if start not in MODELS:
        return
    found = Tokenizer.from_file(str(tokenizer)).encode("Hello world", add_special_tokens=False).ids
    if found != [15496, 995]:
        raise ParameterError(
            f"the tokens are not {start}'s: 'Hello world' is {found}, expected [15496, 995]",
            "encode.tokenizer",
            "Set encode.tokenizer to gpt2, or train.start to scratch",
            "param.vocabulary",
        )


def write_tokenizer(out: Path, source: Path, encoding: Encoding, positions: int) -> None:
    """Write what `AutoTokenizer` needs, so that its ids are those of training."""
    from tasks.text.chat import EOT, TEMPLATES

    for name in ("tokenizer.json", "encoding.json"):
        shutil.copyfile(source / name, out / name)
    text_of = {token: text for text, token in encoding.specials.items()}
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOT,
            "eos_token": text_of[encoding.stop],
            "pad_token": text_of[encoding.pad],
            "extra_special_tokens": sorted(encoding.specials, key=encoding.specials.__getitem__),
            "model_max_length": positions,
            "clean_up_tokenization_spaces": False,
        },
    )
    (out / "chat_template.jinja").write_text(TEMPLATES[encoding.template].jinja(), encoding="utf-8")


def counts_of(progress: Progress, parameters: int) -> Counts:
    """Return what training.json and the manifest say of a run: nothing that differs between two equal runs."""
    return {
        "parameters": parameters,
        "steps": progress.step,
        "best_step": progress.best_step,
        "val_nll_start": progress.start_nll,
        "val_nll_best": progress.best_nll,
        "tokens": progress.tokens,
        "supervised": progress.supervised,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small JSON file."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
