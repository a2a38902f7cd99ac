"""Step 5, train: fine-tune a GPT-2 on token ids, and leave it as a Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.artifacts import Counts, Encoding, Model, Tokens
from tasks.errors import InputError, ParameterError
from tasks.gpt.hf_folder import CONFIG, WEIGHTS, digests, read_config
from tasks.initial_weights import FOLDER, MODEL, SCRATCH, allowed_folder, fetch_published, model_of
from tasks.launch import run_distributed
from tasks.sources import MODELS
from tasks.step import Params, hold, step
from tasks.store.store import CHECKPOINTS
from tasks.tuning import (
    Count,
    TuningParams,
    TuningRuntime,
    check_same_encoding,
    read_split,
    tune,
    write_json,
    write_tokenizer,
)

if TYPE_CHECKING:
    from tasks.gpt.batches import Split
    from tasks.gpt.loss_weights import LossWeights
    from tasks.gpt.training_run import Progress

log = logging.getLogger("treeline.train")
NAMED = 16  # messages or sequences at most in an error


class StartParams(Params):
    """Where the weights come from."""

    start: Literal["scratch", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "folder", "model"] = "scratch"
    """Where the weights come from: random ones, a published GPT-2, a local Hugging Face folder, or a model that was tuned before."""  # noqa: E501
    folder: str | None = None
    """Path of that folder (config.json, model.safetensors), under one that $TREELINE_MODEL_ROOTS names. Only for start = folder."""  # noqa: E501
    model: str | None = None
    """Id of the model to go on from, such as model/3f2a5c9d01ab; it must know the same words, tags and block. Only for start = model."""  # noqa: E501
    layers: Count = 3
    """Transformer blocks. Only for start = scratch."""
    heads: Count = 4
    """Attention heads of a block; a divisor of the width. Only for start = scratch."""
    width: Count = 128
    """Numbers in a hidden state. Only for start = scratch."""


class TrainParams(TuningParams, StartParams):
    """Settings of the train step. The defaults suit fine-tuning gpt2-medium."""

    reply_weighting: Literal["each", "shared"] = "each"
    """What replies to one prompt weigh in the loss: each 1, or all of them 1 together, so that prompts count alike however many replies they have. The validation loss weighs nothing."""  # noqa: E501
    rank_weight_decay: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """What a reply weighs in the loss against the one that people ranked just above it. 1: ranks do not count. An unranked reply weighs as much as the best."""  # noqa: E501

    @model_validator(mode="after")
    def _fits(self) -> TrainParams:
        if (self.folder is not None) != (self.start == FOLDER):
            raise ValueError("start = folder and folder = PATH go together")
        if (self.model is not None) != (self.start == MODEL):
            raise ValueError("start = model and model = ID go together")
        if self.start == SCRATCH and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.start == SCRATCH and self.keeps_table():
            raise ValueError("start = scratch has random weights: with freeze_layers or lora_rank, they would stay so")
        return self

    def idle(self) -> set[str]:
        """Return the settings that have no say: also the shape, where the start has one."""
        return super().idle() | (set() if self.start == SCRATCH else {"layers", "heads", "width"})

    def keyed(self) -> dict[str, Any]:
        """Return what enters the key: settings that have a say; content in place of names and paths."""
        kept = self.model_dump(mode="json", exclude={"folder", "model", *self.idle()})
        if self.start == FOLDER:
            return {**kept, "weights": digests(allowed_folder(self.folder or ""))}
        if self.start == MODEL:
            return {**kept, "model": model_of(self.model or "").manifest.digest}
        if self.start in MODELS:
            return {**kept, "weights": {name: MODELS[self.start].files[name] for name in (WEIGHTS, CONFIG)}}
        return kept


class TrainRuntime(TuningRuntime):
    """How fast, and where. The outcome is the same but for rounding and the draws of dropout."""


@step("train", version=7, makes=Model, inherits=(CHECKPOINTS, "log.jsonl"))
def train(out: Path, tokens: Tokens, params: TrainParams, run: TrainRuntime) -> Counts:
    """Write the tuned model, its tokenizer and chat template, and how training went."""
    from tasks.gpt.objective import EachToken
    from tasks.gpt.weights import build_start, parameter_count, save_hf_folder

    encoding = tokens.encoding()
    earlier = model_of(params.model) if params.model else None
    if earlier:
        hold(earlier)  # the evaluation will want it, too
        check_same_encoding(earlier, tokens)
    folder = earlier.path if earlier else fetch_start(params)
    spec = start_of(params, folder, encoding)
    if earlier:
        spec |= {"model": earlier.manifest.digest, "from": earlier.json("start.json")}
    splits = read_split(tokens, "train"), read_split(tokens, "val")
    refuse_unfit(spec, *splits)
    refuse_foreign(params.start, tokens.path / "tokenizer.json")
    if (counts := run_distributed("train", out, {"tokens": tokens}, params, run)) is not None:
        return counts
    model = build_start(spec, folder)
    warn_of_new_words(encoding, folder, params)
    aim = EachToken(*splits, worth_of(tokens, params))
    progress = tune(model, splits, params, run, out, named=lambda rows: name_messages(tokens, rows), objective=aim)
    save_hf_folder(model, out, stop=encoding.stop, pad=encoding.pad, used=encoding.used)
    write_tokenizer(out, tokens.path, encoding, spec["positions"])
    write_json(out / "start.json", spec)
    counts = training_counts(progress, parameter_count(model))
    write_json(out / "training.json", counts)
    return counts


def warn_of_new_words(encoding: Encoding, folder: Path | None, params: TrainParams) -> None:
    """Say so where tokens were added to a table that stays as it is: the model can then hardly tell them apart."""
    from tasks.text.templates import TEMPLATES

    if folder is None or not params.keeps_table():
        return
    known = read_config(folder)["vocab_size"]
    pieces = TEMPLATES[encoding.template].pieces()
    added = sorted(text for text, token in encoding.specials.items() if token >= known and text in pieces)
    if added:
        what = "train: the table stays as it is, so %s are hardly told apart; encode.template = xml adds no tokens"
        log.warning(what, ", ".join(added))


def worth_of(tokens: Tokens, params: TrainParams) -> LossWeights | None:
    """Return what the replies of the training split weigh; None where each weighs 1.

    Raises:
        InputError: If ranks are asked for, and the tokens are of before they were noted.
    """
    import numpy as np
    import polars as pl

    from tasks.gpt.loss_weights import UNRANKED, LossWeights, weights_of

    if params.reply_weighting == "each" and params.rank_weight_decay == 1:
        return None
    index = tokens.index()
    if "rank" not in index.collect_schema():
        raise InputError("the index has no column rank", tokens.id, "Run the encode step again", "train.rank")
    first, _ = tokens.encoding().splits["train"]
    # A tree that was cut repeats a prompt in each sequence that answers it: its id tells that it is one.
    prompts = pl.coalesce(pl.col("message_id").gather(pl.col("parent")), "message_id")
    rows = index.with_columns(prompt=prompts.rank("dense"), rank=pl.col("rank").fill_null(UNRANKED))
    rows = rows.filter(pl.col("split") == "train", pl.col("trained") > 0)
    names = ("sequence", "start", "stop", "trained", "prompt", "rank")
    sequence, start, stop, trained, prompt, rank = (
        column.to_numpy().astype(np.int64) for column in rows.select(names).collect()
    )
    weight = weights_of(prompt, rank, params.rank_weight_decay, params.reply_weighting == "shared")
    return LossWeights(sequence - first, start, stop, trained, weight)


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
            positions=encoding.context_length,
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
            "encode.context_length",
            f"Set encode.context_length to {spec['positions']} or less",
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


def training_counts(progress: Progress, parameters: int) -> Counts:
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
