"""Tuning: what every step that changes a model's weights asks for, and what it leaves beside them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tasks.artifacts import Encoding, Model, PreferenceGroups, Sequences
from tasks.errors import ParameterError
from tasks.signals import kept_signals
from tasks.step import Params, Runtime
from tasks.store.store import CHECKPOINTS

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    from tasks.gpt.batches import Split
    from tasks.gpt.interrupt import Interrupt
    from tasks.gpt.objective import Objective
    from tasks.gpt.preference import Replies
    from tasks.gpt.training_run import Machine, Progress, Settings

log = logging.getLogger("treeline.train")
COMPILED = "treeline/compiled"  # under the user's own cache: it is code, so never in a store that others may write
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Device = Literal["auto", "cpu", "cuda", "mps"]
MicroBatch = Count | Literal["auto"] | None


class TuningParams(Params):
    """What decides how weights are changed."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    """Seed of the initial weights, of the order of the data and of dropout."""
    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3.0
    """How often the data is gone through; a fraction ends in the middle."""
    target_tokens: Annotated[int, Field(ge=1)] | None = None
    """Targets of the loss to train on in all, in place of epochs: what layouts are compared at. None: epochs."""
    batch_tokens: Count = 32_768
    """Tokens of an optimizer step, padding included; at least one sequence is taken."""
    lr: Annotated[float, Field(gt=0)] = 3e-5
    """Highest learning rate. From scratch, 1e-3 to 3e-3 is usual."""
    min_lr_ratio: Share = 0.1
    """Learning rate of the last step, as a share of the highest; a cosine leads there."""
    warmup_ratio: Share = 0.03
    """Share of the steps in which the learning rate rises to its highest."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of weight matrices and embeddings, per update and unit of learning rate."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Longest gradient; a longer one is shortened to it. None: as it is."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of numbers dropped after embeddings, attention and both halves of a block."""
    freeze_layers: Annotated[int, Field(ge=0, le=1_000)] = 0
    """Lowest blocks that stay as they are, with the embeddings and a head that shares their table, and adapters beside these blocks. 0: everything is trained. Tokens that were added for the chat template are then never learnt."""  # noqa: E501
    lora_rank: Annotated[int, Field(ge=0, le=1_024)] = 0
    """Rank of LoRA adapters beside every matrix of the blocks: they alone are trained, then merged, and kept apart as adapter.tar, too. 0: none, all weights are trained. They want ten times the learning rate."""  # noqa: E501
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """What adapters add is scaled by lora_alpha / lora_rank."""
    evals_per_epoch: Annotated[int, Field(ge=1, le=1_000)] = 8
    """Evaluations of the whole validation split in an epoch, besides those at the start and the end."""
    patience: Count | None = None
    """Evaluations without a better validation loss after which training ends. None: it goes on."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay per update of an exponential moving average of the weights, which is then validated, kept as the best and exported in their place; it spans about 1 / (1 - decay) updates. Training itself is the same. None: no average. Typical: 0.999."""  # noqa: E501
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of products; weights and sums stay float32. float32: a GPU rounds factors to 10 bits (TF32), here and in the evaluation. bfloat16 is for GPUs and for CPUs that have instructions for it."""  # noqa: E501

    def idle(self) -> set[str]:
        """Return the settings that have no say beside the others."""
        found = set() if self.lora_rank else {"lora_alpha"}
        return found if self.target_tokens is None else found | {"epochs"}

    def keeps_table(self) -> bool:
        """Tell whether the token table stays as it is."""
        return self.freeze_layers > 0 or self.lora_rank > 0

    def settings(self, length: int, supervised: int) -> Settings:
        """Return them as the training loop takes them.

        Args:
            length: Tokens of a sequence.
            supervised: Targets of the loss in an epoch.
        """
        from tasks.gpt.training_run import Settings

        chosen = self.model_dump()
        if self.target_tokens is not None:
            chosen["epochs"] = self.target_tokens / max(1, supervised)
        sequences = max(1, self.batch_tokens // length)
        return Settings(sequences=sequences, **{f.name: chosen[f.name] for f in fields(Settings) if f.name in chosen})


class ModelRuntime(Runtime):
    """Where a model is computed, and how much at once."""

    device: Device = "auto"
    """Where models are computed; auto takes a GPU where there is one."""
    micro_batch: MicroBatch = None
    """Sequences that go through the model at once; lower it where memory runs out. None: as many as hold 8,192 tokens; auto: of these, in training, as many as fit into the memory that is free."""  # noqa: E501
    threads: Count | None = None
    """CPU threads. None: one for a model narrower than 512, else as torch finds best."""

    @property
    def rows_at_once(self) -> int | None:
        """Sequences of a pass without gradients; None: as many as hold 8,192 tokens."""
        return self.micro_batch if isinstance(self.micro_batch, int) else None


class TuningRuntime(ModelRuntime):
    """How fast, and where. The outcome is the same but for rounding and the draws of dropout."""

    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Keep only what enters each block and compute the block again on the way back: far less memory for a quarter to a third more time, the same gradients. auto: where memory would run out."""  # noqa: E501
    compile: bool = False
    """Compile the model; pays on a GPU, in runs longer than a few minutes."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """How tokens look back: by a mask (SDPA), or by blocks that leave out what nobody sees (FlexAttention; CUDA, compiled, without dropout). auto: by blocks where that can be done; on a CPU, the same in plain products."""  # noqa: E501
    deterministic: bool = False
    """On a GPU, take only algorithms that give the same bits each time; slower. A CPU always does: with as many threads and as much at once, a run repeats to the bit."""  # noqa: E501
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 120.0
    """Seconds between checkpoints, from which a killed run goes on; more where saving is slow. 0: after each step."""
    num_processes: Count | Literal["auto"] = 1
    """Processes that train together, each on a GPU of its own; auto: one a GPU. On the CPU, one is best. Those of torchrun, where it started this one; on several machines, only it can."""  # noqa: E501
    sharding: Literal["auto", "none", "full"] = "auto"
    """With many processes, whether each holds the whole model (none) or a part of it (full), which takes less memory and more talk. auto: full where the whole would fill half a GPU. full and ema_decay exclude each other; with ema_decay, auto means none."""  # noqa: E501
    max_restarts: Annotated[int, Field(ge=0, le=1_000)] = 2
    """With several processes, how often all resume from the last checkpoint after one was lost. Under torchrun, its own --max-restarts counts."""  # noqa: E501
    heartbeat_timeout: Annotated[float, Field(ge=30, le=604_800)] = 900.0
    """With several processes, seconds without progress after which they count as hung. Progress is a micro-batch, a sum or a file of a checkpoint that begins; loading the weights and compiling must each take less than this."""  # noqa: E501


def tune(
    model: GPT2LMHeadModel,
    splits: tuple[Split, Split],
    params: TuningParams,
    run: TuningRuntime,
    workplace: Path,
    *,
    named: Callable[[Sequence[int]], str] | None = None,
    objective: Objective | None = None,
) -> Progress:
    """Plan a run, then go through it; asked to stop, it saves first. Of many ranks, only rank 0 returns.

    Args:
        model: At its starting weights; dropout, and what stays as it is, are set here.
        splits: To train and to validate on.
        params: What decides the outcome.
        run: Where and how fast.
        workplace: Gets the log and the checkpoints.
        named: Says where training sequences, given by row, come from: for errors.
        objective: What is made small. None: the loss of each supervised token.

    Raises:
        WorkerDone: On all other ranks, when training has ended.
    """
    from tasks.gpt import lora
    from tasks.gpt.checkpoint import latest_state
    from tasks.gpt.device import at_work, device_of, keep_compiled
    from tasks.gpt.distributed import WorkerDone, current_group
    from tasks.gpt.interrupt import Interrupt
    from tasks.gpt.loop import train_model
    from tasks.gpt.run_plan import memory_named

    world, interrupt = current_group(), Interrupt()
    world.heartbeat()  # the weights are there
    adapters = _set_up(model, params)
    settings, block = params.settings(splits[0].sequence_length, splits[0].supervised()), splits[0].sequence_length
    if world.is_main and block > params.batch_tokens:
        what = (
            "train: a step takes a whole sequence, %s tokens: more than batch_tokens = %s; lower encode.sequence_length"
        )
        log.warning(what, f"{block:,}", f"{params.batch_tokens:,}")
    device = world.device(device_of(run.device))
    first = world.broadcast(latest_state(workplace / CHECKPOINTS).get("way", {}) if world.is_main else None)
    run = as_begun(run, first, world.size)
    if run.compile:
        keep_compiled(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / COMPILED)
    at_it = at_work(device, run.threads, model.config.n_embd, repeats=run.deterministic)
    with at_it, kept_signals(interrupt.ask):
        machine = _machine(model, splits, settings, params, run, device, interrupt, first)
        if named:
            machine = replace(machine, named=named)
        with memory_named(machine, block):
            progress = train_model(
                model, *splits, settings=settings, machine=machine, workplace=workplace, objective=objective
            )
    if not world.is_main:
        raise WorkerDone
    if adapters:
        lora.pack(adapters, workplace)
        lora.merge(adapters)
    return progress


def _set_up(model: GPT2LMHeadModel, params: TuningParams) -> PeftModel | None:
    """Set dropout and what stays as it is, and put adapters beside it, which are returned, if any are asked for."""
    from tasks.gpt import lora
    from tasks.gpt.weights import freeze, set_dropout

    set_dropout(model, params.dropout)
    how = params.lora_rank, params.lora_alpha
    adapters = lora.attach(model, *how, params.seed) if params.lora_rank else None
    freeze(model, params.freeze_layers)
    return adapters


def as_begun(run: TuningRuntime, first: Mapping[str, Any], size: int) -> TuningRuntime:
    """Return how to go on with a run: what is left to us is kept as it was first chosen, where that can be done.

    Args:
        run: What is asked for.
        first: How the run began, as `execution_settings` said; empty for a new one.
        size: How many processes there are.
    """
    kept: dict[str, Any] = {}
    if run.threads is None and 0 < first.get("threads", 0) <= (os.cpu_count() or 1):
        kept["threads"] = first["threads"]
    if run.sharding == "auto" and first.get("num_processes") == size:
        kept["sharding"] = first["sharding"]
    checkpointed = first.get("activation_checkpointing")
    if run.activation_checkpointing == "auto" and checkpointed:  # without, unless memory has become short
        kept["activation_checkpointing"] = True
    if run.attention == "auto" and first.get("attention") == "sdpa":  # another way, unless it can no longer be gone
        kept["attention"] = "sdpa"
    return run.model_copy(update=kept)


def _machine(
    model: GPT2LMHeadModel,
    splits: tuple[Split, Split],
    settings: Settings,
    params: TuningParams,
    run: TuningRuntime,
    device: torch.device,
    interrupt: Interrupt,
    first: Mapping[str, Any],
) -> Machine:
    """Return where the run goes on and how, with the plan of its memory and time said."""
    from tasks.gpt.attention import set_way, way_for
    from tasks.gpt.device import spare_memory
    from tasks.gpt.distributed import current_group
    from tasks.gpt.parallel import should_shard
    from tasks.gpt.run_plan import memory_named, planned
    from tasks.gpt.training_run import Machine

    world, block = current_group(), splits[0].sequence_length
    set_way(model, way_for(run.attention, device, run.compile, params.dropout))
    machine = Machine(
        device,
        time.monotonic,
        compile=run.compile,
        checkpoint_seconds=run.checkpoint_seconds,
        interrupt=interrupt,
        world=world,
        sharded=should_shard(model, device, run.sharding, params.ema_decay is not None, world),
    )
    with memory_named(machine, block):
        asked = run.micro_batch, time.monotonic, run.activation_checkpointing
        size, activation_checkpointing = planned(model, splits, settings, device, *asked, world, machine.sharded)
    if run.micro_batch == "auto":
        size = min(size, first.get("micro_batch", size))
    if (activation_checkpointing or params.lora_rank) and device.type == "cpu":
        spare_memory()
    return replace(machine, micro_batch=size, activation_checkpointing=activation_checkpointing)


def read_split(tokens: Sequences, name: str | None) -> Split:
    """Map the sequences of a split; None: all of them."""
    from tasks.gpt.batches import Split

    arrays = [read(name) for read in (tokens.ids, tokens.mask, tokens.positions, tokens.ends)]
    return Split(*arrays)


def replies_of(preference_groups: PreferenceGroups, name: str | None) -> Replies:
    """Read where the replies of a split lie in its sequences; None: those of all."""
    import numpy as np

    from tasks.gpt.preference import Replies

    table = preference_groups.replies().collect()
    first = 0
    if name is not None:
        table, first = table.filter(table["split"] == name), preference_groups.encoding().splits[name][0]
    columns = [table[column].to_numpy().astype(np.int64) for column in ("sequence", "trained", "group", "rank")]
    return Replies(columns[0] - first, *columns[1:])


def check_same_encoding(model: Model, tokens: Sequences) -> None:
    """Raise an error unless the tokens are in the language of the model."""
    same_words = (model.path / "tokenizer.json").read_bytes() == (tokens.path / "tokenizer.json").read_bytes()
    ours, theirs = (
        {
            name: value
            for name, value in asdict(encoding).items()
            if name in {"template", "specials", "stop", "context_length"}
        }
        for encoding in (model.encoding(), tokens.encoding())
    )
    if same_words and ours == theirs:
        return
    odd = [name for name in ours if ours[name] != theirs[name]] or ["tokenizer.json"]
    raise ParameterError(
        f"the model was trained on another encoding; it differs in {', '.join(odd)}",
        f"model {model.id}, tokens {tokens.id}",
        "Use tokens that were encoded as its own were: with its vocabulary, template and block",
        "param.encoding",
    )


def write_tokenizer(out: Path, source: Path, encoding: Encoding, positions: int) -> None:
    """Write what `AutoTokenizer` needs, so that its ids are those of training."""
    from tasks.text.templates import EOT, TEMPLATES

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
            "padding_side": "left",  # where a reply goes on, no padding may stand
            "extra_special_tokens": sorted(encoding.specials, key=encoding.specials.__getitem__),
            "model_max_length": positions,
            "clean_up_tokenization_spaces": False,
        },
    )
    (out / "chat_template.jinja").write_text(TEMPLATES[encoding.template].jinja(), encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small JSON file; a number that is not finite is a bug, not a value."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")
