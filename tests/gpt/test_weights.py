import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from tasks.errors import InputError, ParameterError
from tasks.gpt.hf_folder import digests, find_folder
from tasks.gpt.weights import (
    SPREAD,
    build_start,
    folder_spec,
    grow,
    load_model,
    parameter_count,
    save_hf_folder,
    scratch_spec,
    set_dropout,
)

SORTER = Path(__file__).parents[2].parent / "shared" / "data" / "gpt_nano_sort_hf"
needs_sorter = pytest.mark.skipif(not SORTER.is_dir(), reason="shared/data/gpt_nano_sort_hf is not here")


def spec(**changed: Any) -> dict[str, Any]:
    return scratch_spec(
        **{"layers": 2, "heads": 2, "width": 16, "positions": 8, "vocab_size": 32, "seed": 0, **changed}
    )


def exported(folder: Path, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_hf_folder(build_start(spec(**changed)), folder, stop=3, pad=0)
    return folder


def state(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def same(one: GPT2LMHeadModel, other: GPT2LMHeadModel) -> bool:
    ours, theirs = state(one), state(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_sorter
def test_a_real_checkpoint_sorts_all_729_inputs() -> None:
    model = load_model(SORTER)
    letters = torch.tensor(list(itertools.product(range(3), repeat=6)))  # (729, 6)
    said = letters
    for _ in range(6):
        said = torch.cat([said, model(said).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(said[:, 6:], letters.sort(dim=1).values)


@needs_sorter
def test_an_untied_head_stays_untied_and_both_tables_grow() -> None:
    wanted = folder_spec(SORTER, start="folder", vocab_size=64, seed=5)
    grown, before = build_start(wanted, SORTER), load_model(SORTER)
    assert grown.lm_head.weight is not grown.transformer.wte.weight
    for new, old in ((grown.lm_head, before.lm_head), (grown.transformer.wte, before.transformer.wte)):
        assert new.weight.shape == (64, 48)
        assert torch.equal(new.weight[:3], old.weight)
    assert same(grown, build_start(wanted, SORTER))


def test_a_start_from_scratch_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    assert same(build_start(spec()), build_start(spec()))
    assert not same(build_start(spec()), build_start(spec(seed=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_residual_projections_start_smaller_by_the_root_of_their_number() -> None:
    block = build_start(spec(width=128, layers=8)).transformer.h[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attn.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_the_fused_activation_is_gpt2s_own() -> None:
    x = torch.linspace(-6, 6, 1_001)
    ours = build_start(spec()).transformer.h[0].mlp.act
    assert not isinstance(ours, NewGELUActivation)
    torch.testing.assert_close(ours(x), NewGELUActivation()(x), rtol=1e-5, atol=1e-6)
    assert build_start(spec()).config.activation_function == "gelu_new"


def test_new_rows_have_the_mean_and_the_shrunk_covariance_of_the_old() -> None:
    model = build_start(spec(vocab_size=40))
    with torch.no_grad():
        model.transformer.wte.weight += torch.linspace(-1, 1, 16)
    old = model.transformer.wte.weight.detach().clone().double()
    new = grow(model, 20_000, seed=1).transformer.wte.weight.detach()[40:].double()
    assert torch.equal(model.transformer.wte.weight[:40].double(), old)
    assert model.lm_head.weight is model.transformer.wte.weight
    covariance = torch.cov(old.T, correction=0)
    noise = (SPREAD * covariance.diagonal().max() / len(new)).sqrt() * 5
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=float(noise))
    torch.testing.assert_close(
        torch.cov(new.T), SPREAD * covariance, rtol=0, atol=float(SPREAD * covariance.diagonal().max() * 0.05)
    )


def test_a_smaller_vocabulary_is_refused() -> None:
    with pytest.raises(ParameterError, match="vocabulary of 31, the model one of 32"):
        grow(build_start(spec()), 31, seed=0)


def test_an_exported_model_comes_back_here_and_in_transformers(tmp_path: Path) -> None:
    model = build_start(spec())
    save_hf_folder(model, tmp_path, stop=3, pad=0)
    assert same(load_model(tmp_path), model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id) == (3, 0)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(theirs(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_the_same_model_is_exported_to_the_same_bytes(tmp_path: Path) -> None:
    assert digests(exported(tmp_path / "a")) == digests(exported(tmp_path / "b"))


def test_a_folder_is_found_again_by_its_content_wherever_it_moved(tmp_path: Path) -> None:
    exported(tmp_path / "other", seed=1)
    wanted = folder_spec(exported(tmp_path / "here"), start="folder", vocab_size=64, seed=0)
    shutil.move(tmp_path / "here", tmp_path / "deep" / "there")
    assert find_folder(wanted, [tmp_path / "nowhere", tmp_path]) == tmp_path / "deep" / "there"
    assert find_folder({**wanted, "sha256": "0" * 64}, [tmp_path]) is None


def test_a_pickle_is_refused_and_never_opened(tmp_path: Path) -> None:
    folder, canary = exported(tmp_path / "model"), tmp_path / "canary"
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle; convert to safetensors") as caught:
        load_model(folder)
    assert (caught.value.code, caught.value.exit_code) == ("model.unsafe", 65)
    assert not canary.exists()


def test_adapters_beside_weights_are_refused_and_nothing_is_added_to_a_model_unseen(tmp_path: Path) -> None:
    exported(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge_and_unload") as caught:
        load_model(tmp_path)
    assert caught.value.code == "model.adapters"


@pytest.mark.parametrize(
    ("changed", "code"),
    [({"auto_map": {"AutoModel": "evil.Model"}}, "model.unsafe"), ({"model_type": "llama"}, "model.type")],
)
def test_a_config_that_is_not_a_plain_gpt2_is_refused(tmp_path: Path, changed: dict[str, Any], code: str) -> None:
    file = exported(tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    assert caught.value.code == code


ODD = [
    {"n_layer": 10**6}, {"n_layer": 10**15}, {"n_layer": 0}, {"n_layer": -1}, {"n_layer": "2"}, {"n_layer": 2.0},
    {"n_layer": True}, {"n_layer": None}, {"n_layer": [2]}, {"n_layer": 1}, {"n_layer": 3},
    {"n_positions": 10**9}, {"n_positions": 10**30}, {"n_positions": float("nan")}, {"n_positions": 0},
    {"vocab_size": 10**9}, {"vocab_size": -5}, {"vocab_size": 31}, {"n_inner": 10**9}, {"n_inner": 0},
    {"n_embd": 10**6}, {"n_embd": 0}, {"n_embd": 32}, {"n_head": 0}, {"n_head": 3}, {"n_head": -2}, {"n_head": 32},
    {"layer_norm_epsilon": float("nan")}, {"layer_norm_epsilon": float("inf")}, {"layer_norm_epsilon": "small"},
    {"layer_norm_epsilon": -1}, {"resid_pdrop": 2}, {"attn_pdrop": "x"}, {"initializer_range": float("-inf")},
    {"activation_function": "evil"}, {"activation_function": 5}, {"tie_word_embeddings": "no"},
    {"tie_word_embeddings": False}, {"add_cross_attention": True}, {"scale_attn_weights": 1}, {"eos_token_id": "x"},
    {"quantization_config": {"quant_method": "bitsandbytes"}},
]  # fmt: skip


@pytest.mark.parametrize("changed", ODD, ids=str)
def test_a_config_of_other_sizes_than_the_weights_or_of_none_is_refused_before_room_is_made(
    tmp_path: Path, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = exported(tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    monkeypatch.setattr(GPT2LMHeadModel, "__init__", lambda *_: pytest.fail("room was made"))
    for read in (load_model, lambda folder: folder_spec(folder, start="folder", vocab_size=64, seed=0)):
        with pytest.raises(InputError) as caught:
            read(tmp_path)
        assert caught.value.code in {"model.config", "model.weights"}
        assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    "named", ["hidden_size", "num_hidden_layers", "num_labels", "pruned_heads", "dtype", "id2label"]
)
def test_other_names_of_a_config_say_nothing(tmp_path: Path, named: str) -> None:
    file = exported(tmp_path) / "config.json"
    before = state(load_model(tmp_path))
    file.write_text(json.dumps({**json.loads(file.read_text()), named: 10**9}))
    (tmp_path / "generation_config.json").write_text("[" * 200_000)
    after = state(load_model(tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"model_type": "gpt2", "n_layer": ' + "9" * 5_000 + "}",
        '{"model_type": "gpt2", "a": ' + '{"a": ' * 100_000,
        " " * (2 << 20) + "{}",
        "[]",
        "\x00",
        "",
    ],
    ids=["nested", "long number", "nested within", "large", "list", "zero", "empty"],
)
def test_a_config_that_is_no_json_of_a_sensible_size_is_refused(tmp_path: Path, content: str) -> None:
    (exported(tmp_path) / "config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    assert caught.value.code in {"model.config", "model.type"}


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 7, (10**18).to_bytes(8, "little"), header("[" * 200_000), header('{"a": 9' + "9" * 5_000 + "}"),
        header('{"wte.weight": {"dtype": "F32", "shape": [1000000, 1000000000], "data_offsets": [0, 4]}}') + bytes(4),
        header('{"wte.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16000000000]}}') + bytes(16),
        header('{"h.999999999999999.ln_1.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
    ],
    ids=range(8),
)  # fmt: skip
def test_weights_whose_header_makes_no_sense_are_refused(tmp_path: Path, content: bytes) -> None:
    (exported(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    assert caught.value.code == "model.weights"


def test_weights_that_are_whole_numbers_are_refused(tmp_path: Path) -> None:
    file = exported(tmp_path) / "model.safetensors"
    save_file({name: weight.to(torch.int8) for name, weight in state(load_model(tmp_path)).items()}, file)
    with pytest.raises(InputError, match=r"transformer.wte.weight as I8, where floats are meant"):
        load_model(tmp_path)


def test_a_folder_whose_weights_are_a_link_that_leads_out_is_not_found(tmp_path: Path) -> None:
    exported(tmp_path / "outside")
    (tmp_path / "root" / "model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "root" / "model" / name).symlink_to(tmp_path / "outside" / name)
    assert find_folder(digests(tmp_path / "outside"), [tmp_path / "root"]) is None
    assert find_folder(digests(tmp_path / "outside"), [tmp_path]) is not None


def test_weights_that_are_cut_missing_or_of_another_shape_are_refused(tmp_path: Path) -> None:
    file = exported(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        load_model(tmp_path)
    weights = state(build_start(spec()))
    save_file({name: weight for name, weight in weights.items() if "ln_f" not in name}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"missing weights: transformer.ln_f.bias"):
        load_model(tmp_path)
    save_file(state(build_start(spec(width=32))), file, {"format": "pt"})
    with pytest.raises(InputError, match="mismatched weights"):
        load_model(tmp_path)


def test_dropout_is_set_everywhere() -> None:
    model = build_start(spec())
    set_dropout(model, 0.0)
    ids = torch.arange(8)[None]
    assert torch.equal(model.train()(ids).logits, model.train()(ids).logits)
    set_dropout(model, 0.5)
    assert not torch.equal(model.train()(ids).logits, model.train()(ids).logits)


def test_tied_tables_count_once() -> None:
    # tables 32 x 16 and 8 x 16; a block: two norms, 16 -> 48, 16 -> 16, 16 -> 64 -> 16; a last norm
    block = 2 * 32 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)
    assert parameter_count(build_start(spec())) == 32 * 16 + 8 * 16 + 2 * block + 32
