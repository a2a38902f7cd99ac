"""A Hugging Face model folder as it lies on disk: what it must hold, what it must not, and its content's name.

Only safetensors and JSON are ever read. A pickle (`pytorch_model.bin`) and a config that names code to run
(`auto_map`) are refused, because opening either runs a stranger's program. What the config says is held against the
shapes that stand in front of the weights, before a number of them is read or room is made for one. Torch is not needed
to tell.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from tasks.errors import InputError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ADAPTERS = "adapter_config.json"  # peft's
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
LONGEST = 1 << 20  # bytes of a config; a real one has a thousand
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_BLOCK = re.compile(r"h\.(0|[1-9]\d{0,5})\.")

Size = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Id = Annotated[int, Field(ge=0)]


class Form(BaseModel):
    """What a GPT-2's config may say, with the defaults of transformers; no other name of it is looked at."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    vocab_size: Size = 50_257
    n_positions: Size = 1_024
    n_embd: Size = 768
    n_layer: Size = 12
    n_head: Size = 12
    n_inner: Size | None = None
    activation_function: Literal[
        "gelu_new", "gelu", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh"
    ] = "gelu_new"
    resid_pdrop: Share = 0.1
    embd_pdrop: Share = 0.1
    attn_pdrop: Share = 0.1
    layer_norm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    initializer_range: Share = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True
    bos_token_id: Id | None = 50_256
    eos_token_id: Id | list[Id] | None = 50_256
    pad_token_id: Id | None = None

    @model_validator(mode="after")
    def _has_whole_heads(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        return self

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each weight."""
        width = self.n_embd
        inner = self.n_inner or 4 * width
        block = {
            "ln_1.weight": (width,), "ln_1.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width), "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width), "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,), "ln_2.bias": (width,),
            "mlp.c_fc.weight": (width, inner), "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, width), "mlp.c_proj.bias": (width,),
        }  # fmt: skip
        yield from (("wte.weight", (self.vocab_size, width)), ("wpe.weight", (self.n_positions, width)))
        for number in range(self.n_layer):
            yield from ((f"h.{number}.{name}", shape) for name, shape in block.items())
        yield from (("ln_f.weight", (width,)), ("ln_f.bias", (width,)))
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, width)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a model folder, as `Form` says it, refusing what must not or cannot be opened.

    Raises:
        InputError: With code `model.unsafe` for a pickle or remote code, `model.missing` for a file that is not
            there, `model.config` for one that is not JSON or makes no sense, `model.type` for anything but a GPT-2,
            `model.weights` for weights that are cut, missing or of other shapes than the config says.
    """
    where = str(folder)
    refuse_incomplete(folder)
    try:
        with (folder / CONFIG).open("rb") as file:
            config = json.loads(file.read(LONGEST))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{CONFIG} is not JSON: {error}", where, "Fetch it again", "model.config") from error
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{CONFIG}: expected model_type gpt2, found {kind!r}", where, "Use a GPT-2", "model.type")
    if "auto_map" in config:
        what = f"{CONFIG} has auto_map, which asks to run code that came with the model"
        raise InputError(what, where, "Remove auto_map if this is a plain GPT-2; else use another", "model.unsafe")
    if config.get("quantization_config") is not None:
        what, hint = f"{CONFIG} says that the weights are quantized", "Use the model in 16 or 32 bits"
        raise InputError(what, where, hint, "model.config")
    try:
        form = Form.model_validate(config)
    except ValidationError as error:
        (fault, *_) = error.errors(include_url=False)
        what = f"{CONFIG}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}, found {str(fault['input'])[:60]}"
        raise InputError(what.replace(": : ", ": "), where, "Use a GPT-2", "model.config") from error
    _compare(form, folder)
    return form.model_dump()


def _compare(form: Form, folder: Path) -> None:
    """Raise `InputError` unless the weights have the shapes that the config says."""
    shapes, kinds = _stored(folder)
    faults = []
    blocks = {int(match[1]) for name in shapes if (match := _BLOCK.match(name))}
    if len(blocks) != form.n_layer:  # first: a config could name a million
        faults = [f"{len(blocks):,} blocks, where n_layer is {form.n_layer:,}"]
    else:
        wanted = dict(form.shapes())
        if missing := sorted(wanted.keys() - shapes.keys()):
            faults = ["missing weights: " + ", ".join(map(_full, missing[:3]))]
        elif odd := [name for name, shape in wanted.items() if shapes[name] != shape]:
            faults = [f"mismatched weights: {_full(odd[0])} is {shapes[odd[0]]}, where {wanted[odd[0]]} is meant"]
        elif other := [name for name in wanted if kinds[name] not in FLOATS]:
            faults = [f"{_full(other[0])} as {kinds[other[0]]}, where floats are meant"]
    if faults:
        hint = f"Fetch {WEIGHTS} and {CONFIG} of one and the same model"
        raise InputError(f"{WEIGHTS} has {faults[0]}", str(folder), hint, "model.weights")


def _full(name: str) -> str:
    return name if name.startswith("lm_head") else f"transformer.{name}"


def _stored(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return shape and number format of each weight, from the header of the file."""
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            slices = {name.removeprefix("transformer."): file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: str(piece.get_dtype()) for name, piece in slices.items()}
            return {name: tuple(piece.get_shape()) for name, piece in slices.items()}, kinds
    except (SafetensorError, OSError) as error:
        what = f"{WEIGHTS} cannot be read: {error}"
        raise InputError(what, str(folder), "Fetch it again", "model.weights") from error


def refuse_incomplete(folder: Path) -> None:
    """Raise `InputError` unless the folder has weights in one safetensors file, a config, and no adapters."""
    where = str(folder)
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if not (folder / WEIGHTS).is_file() and pickles:
        what = f"{pickles[0]} is a pickle; convert to safetensors"
        hint = "Opening a pickle can run any program: where that is safe, load the model and call save_pretrained"
        raise InputError(what, where, hint, "model.unsafe")
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise InputError(f"{name} is missing", where, "Put the model there, in one piece", "model.missing")
    if (folder / ADAPTERS).exists():  # transformers would add them, and nothing of them is in the key
        hint = "Merge them into the weights (peft: merge_and_unload), or move them elsewhere"
        raise InputError(f"{ADAPTERS} says that adapters lie beside the weights", where, hint, "model.adapters")


def digests(folder: Path) -> dict[str, str]:
    """Return what stands for a model folder's content: sha256 of its weights, config_sha256 of its config."""
    refuse_incomplete(folder)
    return {"sha256": _sha256(folder / WEIGHTS), "config_sha256": _sha256(folder / CONFIG)}


def find_folder(wanted: Mapping[str, Any], roots: Iterable[Path]) -> Path | None:
    """Return a folder under `roots` whose content has these `digests` (other names are ignored), or None.

    A tuned model records the content that it started from, never a path, which may be gone or be somebody else's.
    """
    candidates = ((root, path) for root in roots for path in sorted(root.rglob(WEIGHTS)))
    for root, weights in candidates:
        config = weights.with_name(CONFIG)
        # a link that leads out, or nowhere, is not looked at
        inside = all(file.is_file() and file.resolve().is_relative_to(root.resolve()) for file in (config, weights))
        if inside and _sha256(config) == wanted["config_sha256"] and _sha256(weights) == wanted["sha256"]:
            return weights.parent
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
