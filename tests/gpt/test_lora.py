"""LoRA, held against peft and transformers on their own: the same step, the same file, the same model in the end."""

import builtins
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel

from tasks.errors import ConfigurationError
from tasks.gpt import checkpoint, lora
from tasks.gpt.forward import hidden_states, recomputing
from tasks.gpt.loop import train_model
from tasks.gpt.loss import supervised_nats
from tasks.gpt.weights import trainable_parameters
from tasks.progress import listening
from tests.gpt.test_loop import CPU, MACHINE, SETTINGS, Killed, Killer, split, start

peft: Any = pytest.importorskip("peft", reason="peft comes with the extras `lora` and `test`")
RANK = 4


def adapted(dropout: float = 0.0) -> tuple[GPT2LMHeadModel, Any]:
    model = start(dropout)
    return model, lora.attach(model, RANK, 8.0, seed=3)


def moved(model: GPT2LMHeadModel) -> None:
    """Give adapters weights that do something: they begin as nothing."""
    drawn = torch.Generator().manual_seed(1)
    for name, weight in trainable_parameters(model).items():
        weight.data = 0.1 * torch.randn(weight.shape, generator=drawn) if "lora_B" in name else weight.data


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder


def test_adapters_begin_as_nothing_and_the_same_seed_gives_the_same() -> None:
    batch = split().batch(slice(0, 4), CPU)
    (one, _), (other, _), plain = adapted(), adapted(), start(0.0)
    nats = [supervised_nats(model.eval(), *batch).item() for model in (one, plain)]
    assert nats[0] == pytest.approx(nats[1], rel=1e-6)
    assert all(
        torch.equal(weight, trainable_parameters(other)[name]) for name, weight in trainable_parameters(one).items()
    )
    assert len(trainable_parameters(one)) == 2 * 4  # A and B beside c_attn, c_fc and both c_proj
    assert all("lora_" in name for name in trainable_parameters(one))


@pytest.mark.parametrize("trunk", [hidden_states, recomputing])
def test_loss_and_gradients_are_those_of_peft_and_transformers(trunk: Any) -> None:
    model, _ = adapted()
    moved(model)
    ids, mask, positions, ends = split().batch(slice(0, 6), CPU)
    ends = torch.full_like(ends, ids.shape[1])
    at = torch.arange(ids.shape[1]).expand_as(positions)
    nats = supervised_nats(model, ids, mask, at, ends, trunk=trunk)
    nats.backward()  # type: ignore[no-untyped-call]
    ours = {name: weight.grad for name, weight in trainable_parameters(model).items()}

    theirs = start(0.0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    wrapped = peft.get_peft_model(theirs, config)
    state = {name: weight for name, weight in model.state_dict().items() if "lora_" in name}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    logits = wrapped(input_ids=ids).logits[:, :-1]
    wanted = ids.masked_fill(~mask, -100)[:, 1:]
    expected = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=-100)
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=0)
    for name, weight in trainable_parameters(theirs).items():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-4, atol=1e-5)


def test_merged_weights_are_the_start_with_the_adapters_added_and_peft_opens_the_archive(tmp_path: Path) -> None:
    batch = split().batch(slice(0, 4), CPU)
    model, held = adapted()
    moved(model)
    matrices = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    lora.pack(held, tmp_path)
    lora.merge(held)
    merged, before = dict(model.named_parameters()), dict(start(0.0).named_parameters())
    assert set(merged) == set(before)
    for name, weight in merged.items():
        stem = name.removesuffix(".weight")
        expected = before[name].detach()
        if f"{stem}.lora_A.default.weight" in matrices:
            down, up = (matrices[f"{stem}.lora_{side}.default.weight"] for side in "AB")
            expected = expected + (8.0 / RANK) * (up @ down).T
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-6)
    opened = peft.PeftModel.from_pretrained(start(0.0), unpacked(tmp_path / lora.ARCHIVE, tmp_path / "adapter"))
    theirs = opened.eval()(input_ids=batch.ids).logits
    torch.testing.assert_close(model.eval()(input_ids=batch.ids).logits, theirs, rtol=1e-5, atol=1e-5)


def test_the_archive_names_no_path_and_is_the_same_each_time(tmp_path: Path) -> None:
    found = []
    for name in "ab":
        (tmp_path / name).mkdir()
        model, held = adapted()
        model.__dict__["name_or_path"] = str(tmp_path)
        lora.pack(held, tmp_path / name)
        found.append((tmp_path / name / lora.ARCHIVE).read_bytes())
    assert found[0] == found[1]
    folder = unpacked(tmp_path / "a" / lora.ARCHIVE, tmp_path / "c")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["target_modules"]) == (None, RANK, [*lora.TARGETS])


def fitted(folder: Path, **machine: Any) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    model, held = adapted(0.1)
    kept = replace(MACHINE, checkpoint_seconds=0.0, **machine)
    train_model(model, split(), split(6, seed=1), settings=SETTINGS, machine=kept, workplace=folder)
    lora.merge(held)
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_killed_and_resumed_it_ends_the_same_to_the_bit_and_checkpoints_hold_adapters_only(
    tmp_path: Path, activation_checkpointing: bool
) -> None:
    whole = fitted(tmp_path / "whole")
    with listening(Killer(5)), pytest.raises(Killed):
        fitted(tmp_path / "cut", activation_checkpointing=activation_checkpointing)
    found = checkpoint.latest(tmp_path / "cut" / "checkpoints")
    assert found is not None
    for table in found.tensors.values():
        assert table
        assert all("lora_" in name for name in table)
    resumed = fitted(tmp_path / "cut", activation_checkpointing=activation_checkpointing)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    before = dict(start(0.0).named_parameters())
    same = {name for name in whole if torch.equal(whole[name], before[name])}
    products = {name for name in whole if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))}
    assert same == set(whole) - products


def test_without_peft_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    known = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return known(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match=r"peft is not installed.*pip install '\.\[lora\]'"):
        adapted()


def test_the_model_is_a_plain_one_again(tmp_path: Path) -> None:
    model, held = adapted()
    lora.merge(held)
    assert not [part for part in model.modules() if type(part).__module__.startswith("peft")]
    assert isinstance(model.transformer.h[0].mlp.act, nn.GELU)
