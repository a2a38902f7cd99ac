"""Weights: where a run starts from, and how a model goes to disk and comes back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.utils import logging

from tasks.errors import ParameterError
from tasks.gpt.checkpoint import disk_named
from tasks.gpt.hf_folder import WEIGHTS, digests, read_config

# New rows stay close to the mean of the old: at the mean their logit is bounded by what the model already gives, so
# they take next to nothing from the known words. Source: John Hewitt 2021, "Initializing New Word Embeddings".
SPREAD = 1e-5
# What `generate` does with an exported model where nothing else is asked for: as the panel of an evaluation is drawn.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95}


def scratch_spec(*, layers: int, heads: int, width: int, positions: int, vocab_size: int, seed: int) -> dict[str, Any]:
    """Say that a run starts from random weights of this shape; `start.json` holds what is returned.

    Args:
        layers: Transformer blocks.
        heads: Attention heads of a block.
        width: D, numbers in a hidden state; a multiple of `heads`.
        positions: Rows of the position table.
        vocab_size: V, rows of the token table.
        seed: Of the initial weights.
    """
    shape = {"layers": layers, "heads": heads, "width": width, "positions": positions}
    published = {"repo": None, "revision": None, "sha256": None, "config_sha256": None}
    return {"start": "scratch", **published, **shape, "vocab_size": vocab_size, "seed": seed}


def folder_spec(
    folder: Path, *, start: str, vocab_size: int, seed: int, repo: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Say that a run starts from the weights in a Hugging Face folder, named by content, not by path.

    Args:
        folder: Holds config.json and model.safetensors.
        start: The name of the setting: gpt2, ..., or folder.
        vocab_size: V, rows of the token table that the run needs; at least as many as the folder has.
        seed: Of the rows that are added.
        repo: Where the folder was published, if it was.
        revision: Which commit of `repo`.

    Raises:
        InputError: If the folder is unsafe or not a GPT-2, as `read_config` finds.
    """
    config = read_config(folder)
    names = {"layers": "n_layer", "heads": "n_head", "width": "n_embd", "positions": "n_positions"}
    shape = {name: config[theirs] for name, theirs in names.items()}
    published = {"repo": repo, "revision": revision, **digests(folder)}
    return {"start": start, **published, **shape, "vocab_size": vocab_size, "seed": seed}


def build_start(spec: Mapping[str, Any], folder: Path | None = None) -> GPT2LMHeadModel:
    """Build the model at its starting weights; the same spec and folder give the same weights.

    Args:
        spec: What `scratch_spec` or `folder_spec` returned.
        folder: The Hugging Face folder, unless the start is `scratch`.

    Returns:
        The model in float32, in training mode, with `spec["vocab_size"]` rows in its token table.

    Raises:
        InputError: If the folder is unsafe, not a GPT-2, or lacks weights.
        ParameterError: If the spec asks for fewer rows than the folder has, or names a folder that is not given.
    """
    if spec["start"] == "scratch":
        return _scratch(spec)
    if folder is None:
        raise ParameterError(f"start {spec['start']!r} needs a folder of weights", hint="Pass where it was fetched to")
    model = load_model(folder)
    return grow(model, int(spec["vocab_size"]), int(spec["seed"])).train()


def _scratch(spec: Mapping[str, Any]) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_layer=spec["layers"],
        n_head=spec["heads"],
        n_embd=spec["width"],
        n_positions=spec["positions"],
        vocab_size=spec["vocab_size"],
        bos_token_id=None,  # GPT-2's own ids mean something else in this vocabulary: `save_hf_folder` sets them
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator: give it back as it was
        torch.manual_seed(spec["seed"])
        return _fused(GPT2LMHeadModel(config).train())


def _fused(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Compute GPT-2's activation in one kernel: the eight that transformers takes were a third of a small CPU step.

    The config keeps saying `gelu_new`; the two agree to rounding.
    """
    for block in model.transformer.h:
        if isinstance(block.mlp.act, NewGELUActivation):
            block.mlp.act = nn.GELU(approximate="tanh")
    return model


def load_model(folder: Path) -> GPT2LMHeadModel:
    """Read a GPT-2 from a Hugging Face folder, in float32, in evaluation mode.

    Raises:
        InputError: If the folder is unsafe, not a GPT-2, or its weights do not fit its config.
    """
    config = GPT2Config(**read_config(folder))
    logging.disable_progress_bar()  # ours says what is under way
    # A copy: a file that is mapped and cut later ends the process.
    weights = {name: weight.to(torch.float32, copy=True) for name, weight in load_file(folder / WEIGHTS).items()}
    model: GPT2LMHeadModel = GPT2LMHeadModel.from_pretrained(  # of the folder it reads nothing by itself
        None, config=config, state_dict=weights, dtype=torch.float32, attn_implementation="sdpa"
    )
    return _fused(model.eval())


def grow(model: GPT2LMHeadModel, vocab_size: int, seed: int) -> GPT2LMHeadModel:
    """Give the token table (and an untied head) `vocab_size` rows; the new ones are drawn around the old rows' mean.

    Raises:
        ParameterError: If the model has more rows than that: its ids would then mean other words.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if vocab_size < old:
        raise ParameterError(
            f"the tokens have a vocabulary of {vocab_size:,}, the model one of {old:,}",
            "train.start",
            "Encode with the model's own vocabulary, or start from scratch",
            code="param.vocabulary",
        )
    if vocab_size == old:
        return model
    tables: list[Any] = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        tables.append(model.get_output_embeddings())
    generator = torch.Generator().manual_seed(seed)
    added = [_rows_like(table.weight.detach(), vocab_size - old, generator) for table in tables]
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[old:] = added[0]
        if len(added) > 1:
            model.get_output_embeddings().weight[old:] = added[1]
    return model


def _rows_like(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw (count, D) rows from a normal distribution with the mean and SPREAD times the covariance of (V, D) rows.

    A random mix of the centred rows has exactly their covariance, also where that is singular and has no Cholesky root.
    """
    rows = table.double()  # single precision loses the small directions of 50,257 rows
    mean = rows.mean(dim=0)  # (D,)
    mix = torch.randn(count, len(rows), generator=generator, dtype=torch.float64)  # (count, V)
    drawn: Tensor = mean + (SPREAD / len(rows)) ** 0.5 * (mix @ (rows - mean))  # (count, D)
    return drawn.to(table.dtype)


def set_dropout(model: GPT2LMHeadModel, share: float) -> None:
    """Set the share of numbers dropped after embeddings, attention and both halves of each block."""
    model.config.embd_pdrop = model.config.attn_pdrop = model.config.resid_pdrop = share
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share


def freeze(model: GPT2LMHeadModel, blocks: int) -> None:
    """Keep the embeddings and the lowest blocks as they are, and with a tied table the head; 0 freezes nothing.

    Raises:
        ParameterError: If the model has fewer blocks, or nothing is left to train.
    """
    gpt = model.transformer
    if blocks > len(gpt.h):
        raise ParameterError(
            f"{blocks} blocks are to stay as they are, the model has {len(gpt.h)}",
            "freeze_layers",
            f"Set it to {len(gpt.h)} or less",
            code="param.freeze_layers",
        )
    for part in (gpt.wte, gpt.wpe, *gpt.h[:blocks]) if blocks else ():
        part.requires_grad_(False)
    if not trainable_parameters(model):
        what = f"with {blocks} blocks as they are, nothing is left to train: adapters beside them stay as they are, too"
        raise ParameterError(what, "freeze_layers", f"Set it to less than {len(gpt.h)}", code="param.freeze_layers")


def parameter_count(model: nn.Module) -> int:
    """Count the numbers of the weights; tied tables count once."""
    return sum(weight.numel() for weight in model.parameters())


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that training changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save_hf_folder(model: GPT2LMHeadModel, folder: Path, *, stop: int, pad: int, used: int | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors, so that `AutoModelForCausalLM` opens the folder.

    Its `generate` then says what `sample.generate` says: it ends where that ends, and draws from the same ids.

    Args:
        model: What to write; its config is given the two ids.
        folder: Where to; it exists.
        stop: Id of the end-of-turn token; generation ends at it.
        pad: Id that fills sequences; in no prompt, since transformers hides it there.
        used: Ids that stand for something; those from here on are never generated. None: all do.
    """
    ids = {"bos_token_id": None, "eos_token_id": stop, "pad_token_id": pad}
    model.config.update(ids)
    rows, room = model.config.vocab_size, model.config.n_positions
    unused = [*range(rows if used is None else used, rows)] or None
    model.generation_config = GenerationConfig(**ids, **SAMPLING, max_length=room, suppress_tokens=unused)
    logging.disable_progress_bar()
    with disk_named(folder):
        model.save_pretrained(
            folder, max_shard_size="1TB"
        )  # one file, whatever the size: names are part of the artifact
