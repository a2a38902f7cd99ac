import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.exporting import export
from flows.ui import card
from flows.views import origin, text
from tasks import initial_weights
from tasks.artifacts import Encoding, Model, Tokens, write_encoding
from tasks.errors import ConfigurationError, InputError, ParameterError, PermissionRefused, StoreError
from tasks.gpt import checkpoint
from tasks.gpt.device import device_of
from tasks.gpt.hf_folder import digests
from tasks.gpt.loss import token_nats
from tasks.gpt.weights import build_start, load_model
from tasks.initial_weights import folder_of
from tasks.progress import listening
from tasks.step import Outcome, home, session
from tasks.store.collect import garbage, lineage, remove
from tasks.store.manifest import Manifest
from tasks.store.store import Store
from tasks.text import bpe
from tasks.text.templates import TEMPLATES, load_dialect, tags
from tasks.train import TrainParams, TrainRuntime, name_messages, train, warn_of_new_words, worth_of
from tasks.tuning import as_begun
from tests.gpt.test_loop import Killed, Killer
from tests.waiting import ended, started, until

BLOCK = 96
TALKS = [
    (f"What is the {what} of {name}?", f"It is {answer}.")
    for name, city, coin in (("Elbonia", "Mudville", "mud"), ("Syldavia", "Klow", "khor"), ("Genovia", "Pyrus", "lira"))
    for what, answer in (("capital", city), ("coin", coin))
]
HUB = TrainParams(start="gpt2")
DTYPES = {"ids": "uint16", "mask": "uint8", "positions": "uint16", "ends": "uint16"}
RUN = TrainRuntime(device="cpu", threads=1, micro_batch=2)
MORE: dict[str, Any] = {
    "layers": 1, "heads": 2, "width": 32, "batch_tokens": 2 * BLOCK, "epochs": 3, "lr": 1e-2, "evals_per_epoch": 1,
}  # fmt: skip
PARAMS = TrainParams(**MORE)


def manifest(kind: str) -> Manifest:
    return Manifest(key="0" * 64, kind=kind, recipe={}, files={}, digest="0" * 64)


def tokens_in(folder: Path, template: str = "chat", splits: dict[str, tuple[int, int]] | None = None) -> Tokens:
    """Each talk in a sequence of its own, padded; the last two are validated on, too, so that learning shows."""
    folder.mkdir()
    chosen = TEMPLATES[template]
    vocabulary = bpe.trained((text for talk in TALKS * 3 for text in talk), 320, apart=chosen.plain())
    pieces = tags(chosen, vocabulary.specials, vocabulary.encode)
    arrays = {name: np.zeros((len(TALKS), BLOCK), dtype) for name, dtype in DTYPES.items()}
    for row, (question, answer) in enumerate(TALKS):
        asked = pieces.opens["user"] + vocabulary.encode(question) + pieces.closes["user"]
        prompt = pieces.start + asked + pieces.opens["assistant"]
        reply = vocabulary.encode(answer) + pieces.closes["assistant"]
        ids = prompt + reply + pieces.tail
        pad = vocabulary.specials["<|pad|>"]
        arrays["ids"][row] = ids + [pad] * (BLOCK - len(ids))
        arrays["mask"][row, len(prompt) : len(prompt) + len(reply)] = 1
        arrays["positions"][row, : len(ids)] = range(len(ids))
        arrays["ends"][row] = [len(ids)] * len(ids) + list(range(len(ids) + 1, BLOCK + 1))
    for name, array in arrays.items():
        array.tofile(folder / f"{name}.bin")
    vocabulary.exported().save(str(folder / "tokenizer.json"))
    write_encoding(
        folder,
        Encoding(
            context_length=BLOCK,
            sequence_length=BLOCK,
            vocab_size=vocabulary.size_padded,
            template=template,
            layout="paths",
            specials=vocabulary.specials,
            stop=vocabulary.specials[chosen.stop],
            pad=vocabulary.specials["<|pad|>"],
            splits=splits or {"train": (0, 6), "val": (4, 6), "test": (6, 6)},
            utf8_bytes={},
        ),
    )
    return Tokens(folder, manifest("tokens"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return tokens_in(tmp_path_factory.mktemp("tokens") / "t")


@pytest.fixture(scope="module", params=["chat", "xml"])
def worded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Tokens in each of the templates."""
    return tokens_in(tmp_path_factory.mktemp("tokens") / "t", request.param)


@pytest.fixture(scope="module")
def model(worded: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Model:
    out = tmp_path_factory.mktemp("model")
    counts = train.function(out, worded, TrainParams(**{**MORE, "epochs": 50, "dropout": 0.0}), RUN)
    assert counts == json.loads((out / "training.json").read_text())
    return Model(out, manifest("model"))


def trained(out: Path, tokens: Tokens, params: TrainParams = PARAMS, run: TrainRuntime = RUN) -> Path:
    out.mkdir()
    train.function(out, tokens, params, run)
    return out


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "roots"
    folder.mkdir()
    monkeypatch.setenv("TREELINE_MODEL_ROOTS", f"{tmp_path / 'nowhere'}{os.pathsep}{folder}")
    return folder


@pytest.fixture
def folder(roots: Path, tokens: Tokens) -> Path:
    """A small model of somebody else, with fewer words than the tokens have."""
    return trained(roots / "other", tokens)


def test_the_folder_holds_the_artifacts_files_and_checkpoints_that_are_not_published(
    model: Model, earlier: Model
) -> None:
    assert {path.name for path in model.path.iterdir()} - {"checkpoints"} == {*Model.files}
    assert {path.name for path in earlier.path.iterdir()} == {*Model.files, "manifest.json"}
    assert [path for path in home().rglob("checkpoints*") if path.is_dir()] == []


def test_the_validation_loss_falls_and_counts_say_so(model: Model) -> None:
    counts = model.json("training.json")
    assert counts["steps"] == 150
    assert 0 < counts["best_step"] <= 150
    assert counts["val_nll_best"] < counts["val_nll_start"] - 1
    assert counts["parameters"] == sum(weight.numel() for weight in load_model(model.path).parameters())
    assert len(model.log()) == 151


def test_transformers_opens_the_folder_and_gives_replies_like_those_of_training(model: Model) -> None:
    tokenizer, theirs = AutoTokenizer.from_pretrained(model.path), AutoModelForCausalLM.from_pretrained(model.path)
    for question, _ in TALKS:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )
        said = theirs.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert said[-1] == tokenizer.eos_token_id == model.encoding().stop
        assert load_dialect(model.path).decode(said.tolist()) in {answer for _, answer in TALKS}


def test_the_exported_tokenizer_gives_the_ids_of_training(model: Model, worded: Tokens) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    for ids, ends, (question, answer) in zip(worded.ids(), worded.ends(), TALKS, strict=True):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found = tokenizer.apply_chat_template(turns)["input_ids"]
        assert found == ids[: ends[0]].tolist()
    encoding = model.encoding()
    assert tokenizer.convert_tokens_to_ids(list(encoding.specials)) == list(encoding.specials.values())
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (encoding.stop, encoding.pad)
    assert set(encoding.specials.values()) == set(tokenizer.all_special_ids)
    assert tokenizer.model_max_length == encoding.context_length


def test_the_start_can_be_built_again_from_start_json(model: Model, worded: Tokens) -> None:
    base = build_start(model.json("start.json")).eval()
    parts = [torch.from_numpy(read("val").astype(np.int64)) for read in (worded.ids, worded.mask, worded.positions)]
    ends = torch.from_numpy(worded.ends("val").astype(np.int64))
    nats = token_nats(base, parts[0], parts[1].bool(), parts[2], ends)
    assert nats.mean().item() == pytest.approx(model.json("training.json")["val_nll_start"], rel=1e-5)


def test_the_same_settings_give_the_same_bytes(tokens: Tokens, tmp_path: Path) -> None:
    repeats = RUN.model_copy(update={"deterministic": True})  # which asks for no other algorithm on a CPU
    one, other = trained(tmp_path / "a", tokens), trained(tmp_path / "b", tokens, run=repeats)
    for name in set(Model.files) - Model.records:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_try_that_was_cut_short_is_taken_up_and_ends_in_the_same_bytes(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tasks.gpt.weights

    whole, cut = trained(tmp_path / "whole", tokens), tmp_path / "cut"
    cut.mkdir()
    monkeypatch.setattr(tasks.gpt.weights, "save_hf_folder", lambda *_, **__: 1 / 0)
    every = RUN.model_copy(update={"checkpoint_seconds": 0.0})
    with pytest.raises(ZeroDivisionError):
        train.function(cut, tokens, PARAMS, every)
    newest = max((cut / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)  # as if killed before the last step
    monkeypatch.undo()
    train.function(cut, tokens, PARAMS, every)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_local_folder_is_tuned_further_and_its_tables_grow(folder: Path, tokens: Tokens, tmp_path: Path) -> None:
    out = trained(tmp_path / "out", tokens, TrainParams(**MORE, start="folder", folder=str(folder)))
    start = json.loads((out / "start.json").read_text())
    assert start["sha256"] == digests(folder)["sha256"]
    assert str(folder) not in (out / "start.json").read_text()
    assert (start["layers"], start["width"]) == (1, 32)


def test_a_folder_outside_the_allowed_roots_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "roots" / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "roots" / "link", folder / ".." / "..", Path("/etc")):
        with pytest.raises(ParameterError) as caught:
            TrainParams(**MORE, start="folder", folder=str(path)).keyed()
        assert (caught.value.code, caught.value.exit_code) == ("param.path", 2)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("to", ["absolute", "relative", "loop"])
def test_a_file_of_a_folder_that_is_a_link_out_of_the_allowed_roots_is_refused(
    folder: Path, roots: Path, tmp_path: Path, name: str, to: str
) -> None:
    outside = shutil.move(folder / name, tmp_path / name)
    targets = {"absolute": outside, "relative": os.path.relpath(outside, folder), "loop": name}
    (folder / name).symlink_to(targets[to])
    with pytest.raises(PermissionRefused) as caught:
        TrainParams(**MORE, start="folder", folder=str(folder)).keyed()
    assert (caught.value.code, caught.value.exit_code) == ("permission", 77)


def test_a_folder_that_is_a_loop_of_links_is_refused(roots: Path) -> None:
    (roots / "a").symlink_to("b")
    (roots / "b").symlink_to("a")
    with pytest.raises(ParameterError):
        TrainParams(**MORE, start="folder", folder=str(roots / "a")).keyed()


def test_the_key_holds_the_folders_content_and_not_its_path(folder: Path, roots: Path) -> None:
    key = TrainParams(**MORE, start="folder", folder=str(folder)).keyed()
    assert key["weights"] == digests(folder)
    assert str(folder) not in json.dumps(key)
    moved = shutil.move(folder, roots / "moved")
    assert TrainParams(**MORE, start="folder", folder=str(moved)).keyed() == key


def test_the_key_holds_every_setting_that_has_a_say() -> None:
    scratch = PARAMS.keyed()
    idle = {"folder", "model", "lora_alpha"}
    assert set(scratch) == set(TrainParams.model_fields) - idle
    busy = TrainParams(start="gpt2", lora_rank=8, target_tokens=9).keyed()
    assert {"lora_alpha"} <= set(busy)
    assert "epochs" not in busy
    published = HUB.keyed()
    assert set(scratch) - set(published) == {"layers", "heads", "width"}
    assert len(published["weights"]["model.safetensors"]) == 64


def test_every_setting_is_described() -> None:
    for kind in (TrainParams, TrainRuntime):
        assert all(field.description for field in kind.model_fields.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": "folder"},
        {"folder": "x"},
        {"start": "model"},
        {"model": "x"},
        {"width": 10, "heads": 4},
        {"freeze_layers": 1},
        {"lora_rank": 4},
        {"epochs": 0},
        {"lr": -1.0},
        {"dropout": 1.0},
        {"start": "gpt3"},
        {"learning_rate": 1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        TrainParams(**wrong)


def test_published_weights_are_fetched_pinned_and_other_peoples_ids_are_refused(
    folder: Path, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(repo: str, file: str, revision: str, sha256: str) -> Path:
        asked.append((repo, file, len(revision), len(sha256)))
        return folder / file

    monkeypatch.setattr(initial_weights, "fetch_file", fetch)
    with pytest.raises(ParameterError, match=r"the tokens are not gpt2's: 'Hello world' is"):
        trained(tmp_path / "out", tokens, HUB)
    repo = "openai-community/gpt2"
    assert asked == [(repo, "config.json", 40, 64), (repo, "model.safetensors", 40, 64)]


def test_a_model_with_too_few_positions_is_refused(folder: Path, tokens: Tokens, tmp_path: Path) -> None:
    longer = tokens_in(tmp_path / "longer")
    positions = np.fromfile(longer.path / "positions.bin", np.uint16)
    positions[7] = 200
    positions.tofile(longer.path / "positions.bin")
    with pytest.raises(ParameterError, match=r"longest conversation has 201 tokens, the model 96 positions"):
        trained(tmp_path / "out", longer, TrainParams(**MORE, start="folder", folder=str(folder)))


def test_a_train_split_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    empty = tokens_in(tmp_path / "t", splits={"train": (0, 0), "val": (0, 6), "test": (6, 6)})
    with pytest.raises(InputError, match="expected tokens to train on"):
        trained(tmp_path / "out", empty)


def test_without_a_validation_split_the_last_weights_are_exported(tmp_path: Path) -> None:
    given = tokens_in(tmp_path / "t", splits={"train": (0, 6), "val": (6, 6), "test": (6, 6)})
    counts = json.loads((trained(tmp_path / "out", given) / "training.json").read_text())
    assert (counts["best_step"], counts["val_nll_best"]) == (counts["steps"], None)


def test_an_error_names_the_messages_of_the_sequences(tokens: Tokens, tmp_path: Path) -> None:
    given = tokens_in(tmp_path / "t", splits={"train": (2, 6), "val": (0, 2), "test": (6, 6)})
    rows = [(row, f"m{row}.{turn}") for row in range(6) for turn in (0, 1)]
    pl.DataFrame(rows, schema=["sequence", "message_id"], orient="row").write_parquet(given.path / "index.parquet")
    assert name_messages(given, [0, 3]) == f"messages m2.0, m2.1, m5.0, m5.1, in sequences 2, 5 of {given.id}"


@pytest.mark.parametrize(
    ("first", "size", "kept"),
    [
        ({}, 1, ("auto", None, "auto", "auto")),
        ({"threads": 1, "sharding": "full", "num_processes": 2}, 2, ("full", 1, "auto", "auto")),
        ({"threads": 1_000, "sharding": "full", "num_processes": 2}, 1, ("auto", None, "auto", "auto")),
        ({"activation_checkpointing": True, "attention": "sdpa"}, 1, ("auto", None, True, "sdpa")),
        ({"activation_checkpointing": False, "attention": "flex"}, 1, ("auto", None, "auto", "auto")),
    ],
)
def test_what_is_left_to_us_is_kept_as_it_was_chosen_at_first_where_it_can_be(
    first: dict[str, Any], size: int, kept: tuple[Any, ...]
) -> None:
    found = as_begun(TrainRuntime(), first, size)
    assert (found.sharding, found.threads, found.activation_checkpointing, found.attention) == kept
    asked = TrainRuntime(sharding="none", threads=2, activation_checkpointing=False, attention="flex")
    assert as_begun(asked, first, size) == asked


@pytest.mark.parametrize(("free", "then"), [(1 << 40, 1 << 40), (1, 1 << 40), (1 << 40, 1)])
def test_a_run_goes_on_as_it_chose_at_first_or_says_that_it_cannot(
    tokens: Tokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int,
    then: int,
) -> None:
    every = TrainRuntime(device="cpu", micro_batch="auto", checkpoint_seconds=0.0)
    monkeypatch.setattr("tasks.gpt.run_plan.free_memory", lambda device: free)
    whole, cut = trained(tmp_path / "whole", tokens, run=every), tmp_path / "cut"
    with listening(Killer(5)), pytest.raises(Killed):
        trained(cut, tokens, run=every)
    monkeypatch.setattr("tasks.gpt.run_plan.free_memory", lambda device: then)
    train.function(cut, tokens, PARAMS, every)
    told = (
        "continues with other execution settings, so the last digits may differ: micro_batch 2 -> 1, "
        "activation_checkpointing False -> True"
    )
    assert (told in caplog.text) is (then < free)
    assert "device" not in caplog.text.partition("train.resume")[2]
    if then >= free:
        assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert (
            checkpoint.latest_state(cut / "checkpoints")["way"] == checkpoint.latest_state(whole / "checkpoints")["way"]
        )


TERMINATED = """
import os, signal, sys, threading, time
from pathlib import Path
from flows.__main__ import main
from tasks.artifacts import Tokens
from tests.test_train import PARAMS, RUN, manifest
from tasks.train import train
import flows.store_commands
out = Path(sys.argv[2])
endless = PARAMS.model_copy(update={"epochs": 5000.0})
def does(asked):
    train.function(out, Tokens(Path(sys.argv[1]), manifest("tokens")), endless, RUN)
flows.store_commands.ls = does
sys.exit(main(["ls"]))
"""


def test_sigterm_saves_a_checkpoint_and_ends_with_143_within_20_seconds(tokens: Tokens, tmp_path: Path) -> None:
    asked = [sys.executable, "-c", TERMINATED, str(tokens.path), str(tmp_path)]
    log, told = tmp_path / "log.jsonl", tmp_path / "told"
    with told.open("w") as stderr, started(asked, cwd=Path(__file__).parents[1], stderr=stderr) as child:
        until(lambda: log.exists() and log.read_text().count("\n") >= 5, child)
        child.send_signal(signal.SIGTERM)
        code = ended(child, seconds=20)
    said = told.read_text()
    assert code == 143, said
    assert "stopped by SIGTERM" in said
    (saved,) = (tmp_path / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) >= 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_device_that_is_not_there_is_refused_and_auto_takes_what_is() -> None:
    with pytest.raises(ConfigurationError, match="no cuda device"):
        device_of("cuda")
    assert device_of("auto").type in {"cpu", "mps"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.mark.skipif(find_spec("peft") is None, reason="peft comes with the extras `lora` and `test`")
def test_adapters_are_merged_into_the_model_and_lie_beside_it(folder: Path, tokens: Tokens, tmp_path: Path) -> None:
    params = TrainParams(**MORE, start="folder", folder=str(folder), lora_rank=4)
    one, other = trained(tmp_path / "one", tokens, params), trained(tmp_path / "other", tokens, params)
    assert {path.name for path in one.iterdir()} - {"checkpoints"} == {*Model.files, "adapter.tar"}
    for name in ("adapter.tar", "model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    merged, before = load_file(one / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(merged) == set(before)
    assert not torch.equal(merged["transformer.h.0.mlp.c_fc.weight"], before["transformer.h.0.mlp.c_fc.weight"])
    assert torch.equal(merged["transformer.wte.weight"], before["transformer.wte.weight"])
    opened = dict(AutoModelForCausalLM.from_pretrained(one).named_parameters())  # no adapter is added a second time
    assert all(torch.equal(opened[name], weight) for name, weight in merged.items())


@pytest.mark.skipif(find_spec("peft") is None, reason="peft comes with the extras `lora` and `test`")
def test_exported_adapters_over_their_base_are_the_model_that_they_were_merged_into(
    earlier: Model, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tuned = train(tokens, TrainParams(**MORE, start="model", model=earlier.id, lora_rank=4), RUN)
    assert f"adapters lie over {earlier.id}, which started from scratch; " in text(tuned, 0)
    assert f"adapters lie over {earlier.id}" in card(Outcome("train", tuned, True, 0.0, ""))
    export("adapter", tuned, tmp_path / "dir")
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "dir").eval()
    ids = torch.from_numpy(tokens.ids()[:, :20].astype(np.int64))
    ours, theirs, before = (
        AutoModelForCausalLM.from_pretrained(tuned.path)(ids).logits,
        opened(input_ids=ids).logits,
        AutoModelForCausalLM.from_pretrained(tmp_path / "dir" / "base")(ids).logits,
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, ours, rtol=1e-4, atol=1e-3)
    assert torch.equal(before, AutoModelForCausalLM.from_pretrained(earlier.path)(ids).logits)
    with pytest.raises(ParameterError, match=f"{earlier.id} has no adapters"):
        export("adapter", earlier, tmp_path / "other")


def test_tags_that_a_kept_table_has_never_seen_are_warned_of(
    folder: Path, tokens: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(tokens.encoding().specials["<|user|>"])
    model.save_pretrained(folder)
    for params, told in ((PARAMS, False), (PARAMS.model_copy(update={"freeze_layers": 1}), True)):
        warn_of_new_words(tokens.encoding(), folder, params)
        assert ("<|user|>" in caplog.text and "encode.template = xml" in caplog.text) is told


@pytest.mark.parametrize(("batch_tokens", "told"), [(BLOCK, False), (BLOCK - 1, True)])
def test_a_step_of_less_than_a_sequence_takes_one_and_says_so(
    batch_tokens: int, told: bool, tmp_path: Path, tokens: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "m", tokens, PARAMS.model_copy(update={"batch_tokens": batch_tokens, "epochs": 0.1}))
    assert ("96 tokens: more than batch_tokens = 95; lower encode.sequence_length" in caplog.text) is told


@pytest.fixture
def earlier(tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model in a store of its own."""
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / "store"))
    return train(tokens, PARAMS, RUN)


def test_a_model_is_tuned_further_and_says_from_which_it_started(earlier: Model, tokens: Tokens) -> None:
    params = TrainParams(**MORE, start="model", model=earlier.id)
    with session() as run:
        found = train(tokens, params, RUN)
        assert run.lease
        assert earlier.id in run.lease.ids  # a `gc` meanwhile leaves it there
    assert found.id != earlier.id
    start = found.json("start.json")
    assert (start["start"], start["model"], start["from"]) == (
        "model", earlier.manifest.digest, earlier.json("start.json")
    )  # fmt: skip
    assert found.json("training.json")["val_nll_start"] == pytest.approx(
        earlier.json("training.json")["val_nll_best"], rel=1e-5
    )
    assert folder_of(start) == earlier.path
    assert origin(start) == f"{earlier.id}, which started from scratch"
    assert lineage(Store(home()).manifests(), {found.id}) == {found.id, earlier.id}  # gc keeps what it needs


def test_a_run_that_was_cut_short_is_taken_up_after_a_collection_and_its_earlier_model_is_still_there(
    earlier: Model, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = TrainParams(**MORE, start="model", model=earlier.id)
    monkeypatch.setattr("tasks.gpt.weights.save_hf_folder", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tokens, params, RUN.model_copy(update={"checkpoint_seconds": 0.0}))
    monkeypatch.undo()
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(earlier.path.parents[1]))
    store, later = Store(home()), time.time() + 86_400
    remove(garbage(store, 0, later), store)
    found = train(tokens, params, RUN)
    assert found.json("start.json")["model"] == earlier.manifest.digest
    assert [entry["step"] for entry in found.log()] == list(range(10))  # nothing was done twice
    assert garbage(store, 0, later)  # once it is made, and noted in no run


def test_the_key_holds_the_earlier_models_content_and_not_its_name(earlier: Model) -> None:
    digits = earlier.manifest.key[:6]
    keys = [TrainParams(**MORE, start="model", model=name).keyed() for name in (earlier.id, digits)]
    assert keys[0] == keys[1]
    assert keys[0]["model"] == earlier.manifest.digest
    assert not {"layers", "heads", "width", "folder"} & set(keys[0])


@pytest.mark.parametrize("name", ["model", "model/000000000000", "tokens/00", "", "../..", "nothing/0000"])
def test_a_model_that_is_not_there_is_refused(earlier: Model, name: str) -> None:
    with pytest.raises(ParameterError, match=r"no artifact is named .* train\.model"):
        TrainParams(**MORE, start="model", model=name).keyed()


def test_a_model_that_was_altered_is_refused(earlier: Model) -> None:
    (earlier.path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        TrainParams(**MORE, start="model", model=earlier.id).keyed()


def test_of_equal_models_one_that_is_sound_is_taken(earlier: Model, tokens: Tokens) -> None:
    """A patience that never ends makes another key, and the same content."""
    twin = train(tokens, PARAMS.model_copy(update={"patience": 1000}), RUN)
    assert twin.manifest.digest == earlier.manifest.digest
    start = train(tokens, TrainParams(**MORE, start="model", model=earlier.id), RUN).json("start.json")
    for altered, found in ((twin, earlier), (earlier, None)):
        (altered.path / "model.safetensors").write_bytes(b"other")
        if found:
            assert folder_of(start) == found.path
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        folder_of(start)


def test_a_model_of_other_tags_is_refused(earlier: Model, tmp_path: Path) -> None:
    other = tokens_in(tmp_path / "other", "xml")
    with pytest.raises(ParameterError, match="the model was trained on another encoding; it differs in template"):
        trained(tmp_path / "out", other, TrainParams(**MORE, start="model", model=earlier.id))


def test_the_earlier_model_may_be_gone_if_its_weights_lie_under_an_allowed_root(
    earlier: Model, tokens: Tokens, roots: Path
) -> None:
    start = train(tokens, TrainParams(**MORE, start="model", model=earlier.id), RUN).json("start.json")
    moved = shutil.move(earlier.path, roots / "moved")
    assert folder_of(start) == Path(moved)
    shutil.rmtree(moved)
    with pytest.raises(ParameterError, match="lie under no allowed root, nor in the store"):
        folder_of(start)


def test_frozen_embeddings_and_blocks_leave_with_the_bytes_that_they_came_with(
    folder: Path, tokens: Tokens, tmp_path: Path
) -> None:
    out = trained(tmp_path / "out", tokens, TrainParams(**MORE, start="folder", folder=str(folder), freeze_layers=1))
    before, after = (load_file(place / "model.safetensors") for place in (folder, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_targets_take_the_place_of_epochs() -> None:
    assert TrainParams(target_tokens=900, epochs=7).settings(64, supervised=600).epochs == 1.5
    assert TrainParams(epochs=7).settings(64, supervised=600).epochs == 7


def test_weights_change_a_run_only_where_they_are_asked_for(tokens: Tokens) -> None:
    index = pl.DataFrame(
        {
            "sequence": range(6), "start": [0] * 6, "stop": [BLOCK] * 6, "parent": [None] * 6,
            "message_id": [f"m{row}" for row in range(6)], "split": ["train"] * 6, "rank": [0, 1, 2, None, 0, 1],
            "trained": tokens.mask().sum(axis=1, dtype=np.int32),
        },
        schema_overrides={"parent": pl.Int64},
    )  # fmt: skip
    index.write_parquet(tokens.path / "index.parquet")
    assert worth_of(tokens, PARAMS) is None
    found = worth_of(tokens, PARAMS.model_copy(update={"rank_weight_decay": 0.5}))
    assert found is not None
    assert found.weight.tolist() == [1, 0.5, 0.25, 1, 1, 0.5]
    index.drop("rank").write_parquet(tokens.path / "index.parquet")
    with pytest.raises(InputError, match=r"train\.rank.*encode"):
        worth_of(tokens, PARAMS.model_copy(update={"reply_weighting": "shared"}))
