"""LoRA: the model stays as it is, and small matrices beside its own are trained; in the end they are added to these.

The matrices are those of `peft`, put into the model's blocks, so everything that calls these goes through them.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from transformers import GPT2LMHeadModel

from tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from peft import PeftModel

TARGETS = ("c_attn", "c_fc", "c_proj")  # every product of a block
# One file, not peft's two: where a folder has adapter_config.json, transformers adds the adapter to the weights beside
# it, and these hold it already.
ARCHIVE = "adapter.tar"


def attach(model: GPT2LMHeadModel, rank: int, alpha: float, seed: int) -> PeftModel:
    """Put adapters beside every product of the model's blocks; only they are trained, and they are initialised to zero.

    Args:
        model: Changed in place; it computes what it did.
        rank: Of the adapters' product.
        alpha: What is added is scaled by `alpha / rank`.
        seed: Of the adapters' first weights.

    Returns:
        The same model, as peft holds it: for `pack` and `merge`.

    Raises:
        ConfigurationError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        what = "peft is not installed, which train.lora_rank needs"
        raise ConfigurationError(what, "train.lora_rank", "pip install '.[lora]'", "config.peft") from error
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=list(TARGETS),
        fan_in_fan_out=True,  # GPT-2's matrices are stored the other way round
    )
    # peft draws from the global generator: give it back as it was. It also asks transformers for an old name.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    config.base_model_name_or_path = None  # a path of this machine; what they lie over is told by its content
    return adapted


def pack(adapted: PeftModel, folder: Path) -> None:
    """Write the adapters as `adapter.tar`; unpacked, `PeftModel.from_pretrained` opens them over the model given.

    That is what start.json tells of where the train step wrote them, and `from` in training.json where prefer did.
    """
    from peft import get_peft_model_state_dict

    # Unless told, peft asks the hub whether the vocabulary has grown.
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    weights = save({name: weight.detach().cpu().contiguous() for name, weight in state.items()}, {"format": "pt"})
    files = {"adapter_config.json": _config(adapted), "adapter_model.safetensors": weights}
    with tarfile.open(folder / ARCHIVE, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)  # of 1970, and nobody's: the same adapters are the same bytes
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _config(adapted: PeftModel) -> bytes:
    """Return peft's own config file, its sets in order."""
    with tempfile.TemporaryDirectory() as folder:
        adapted.peft_config["default"].save_pretrained(folder)
        config: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_bytes())
    return json.dumps({**config, "target_modules": sorted(config["target_modules"])}, indent=1).encode()


def merge(adapted: PeftModel) -> None:
    """Add the adapters to the matrices beside them, and take them out: the model is a plain GPT-2 again."""
    adapted.merge_and_unload()
