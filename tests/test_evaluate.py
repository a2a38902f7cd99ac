"""Laws of the evaluate step, on a model that learnt six sentences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tasks.artifacts import Encoding, Model, Report, Tokens, read_encoding, write_encoding
from tasks.errors import InputError, ParameterError, TrainingError
from tasks.evaluate import EvaluateParams, EvaluateRuntime, evaluate
from tasks.gpt.hf_folder import digests
from tasks.gpt.weights import build_start, load_model
from tasks.initial_weights import ROOTS
from tasks.report.funnel import WAYS
from tasks.store.manifest import Manifest
from tasks.text import bpe
from tasks.text.templates import TEMPLATES, load_dialect, tags
from tasks.train import TrainParams, TrainRuntime, train

BLOCK = 96
TALKS = [
    (f"What is the {what} of {name}?", f"It is {answer}.")
    for name, city, coin in (("Elbonia", "Mudville", "mud"), ("Syldavia", "Klow", "khor"), ("Genovia", "Pyrus", "lira"))
    for what, answer in (("capital", city), ("coin", coin))
]
TRAINING: dict[str, Any] = {"layers": 1, "heads": 2, "width": 32, "batch_tokens": 2 * BLOCK, "epochs": 30, "lr": 1e-2,
                            "dropout": 0.0, "evals_per_epoch": 1, "patience": None}  # fmt: skip
PARAMS = EvaluateParams(
    fact_families=("young",), sample_prompts=(TALKS[4][0], "Hello?"), samples_per_prompt=2, max_new_tokens=16
)
RUN = EvaluateRuntime(device="cpu", threads=1)


def manifest(kind: str) -> Manifest:
    return Manifest(key="0" * 64, kind=kind, recipe={}, files={}, digest=kind[0] * 64)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Each talk in a sequence of its own; the last two are held out, as val and as test."""
    folder = tmp_path_factory.mktemp("tokens")
    vocabulary = bpe.trained((text for talk in TALKS * 3 for text in talk), 320, apart=TEMPLATES["chat"].plain())
    pieces = tags(TEMPLATES["chat"], vocabulary.specials, vocabulary.encode)
    stop, pad = vocabulary.specials["<|end|>"], vocabulary.specials["<|pad|>"]
    arrays = {name: np.zeros((len(TALKS), BLOCK), np.uint16) for name in ("ids", "mask", "positions", "ends")}
    for row, (question, answer) in enumerate(TALKS):
        prompt = pieces.prompt([("user", vocabulary.encode(question))])
        ids = [*prompt, *vocabulary.encode(answer), stop]
        arrays["ids"][row] = ids + [pad] * (BLOCK - len(ids))
        arrays["mask"][row, len(prompt) : len(ids)] = 1
        arrays["positions"][row, : len(ids)] = range(len(ids))
        arrays["ends"][row] = [len(ids)] * len(ids) + list(range(len(ids) + 1, BLOCK + 1))
    for name, array in arrays.items():
        array.astype(np.uint8 if name == "mask" else np.uint16).tofile(folder / f"{name}.bin")
    vocabulary.exported().save(str(folder / "tokenizer.json"))
    splits = {"train": (0, 5), "val": (4, 5), "test": (5, 6)}
    sizes = {name: sum(len(answer) for _, answer in TALKS[first:last]) for name, (first, last) in splits.items()}
    specials, size = vocabulary.specials, vocabulary.size_padded
    encoding = Encoding(BLOCK, BLOCK, size, "chat", "paths", specials, stop, pad, splits, sizes)
    write_encoding(folder, encoding)
    return Tokens(folder, manifest("tokens"))


@pytest.fixture(scope="module")
def model(tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    train.function(folder, tokens, TrainParams(**TRAINING), TrainRuntime(device="cpu", threads=1))
    return Model(folder, manifest("model"))


@pytest.fixture(scope="module")
def report(model: Model, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return reported(tmp_path_factory.mktemp("report"), model, tokens)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def reported(out: Path, model: Model, tokens: Tokens, params: EvaluateParams = PARAMS) -> Report:
    out.mkdir(exist_ok=True)
    evaluate.function(out, model, tokens, params, RUN)
    return Report(out, manifest("report"))


def with_splits(tokens: Tokens, folder: Path, **splits: tuple[int, int]) -> Tokens:
    shutil.copytree(tokens.path, folder)
    write_encoding(folder, replace(read_encoding(folder), splits=splits))
    return Tokens(folder, tokens.manifest)


def plain_nll(model: Any, tokens: Tokens, row: int) -> float:
    """Compute the loss of a sequence's reply by transformers' own means, without padding and masks."""
    dialect = load_dialect(tokens.path)
    question, answer = TALKS[row]
    prompt, reply = dialect.prompt([("user", question)]), [*dialect.encode(answer), dialect.stop]
    labels = torch.tensor([[-100] * len(prompt) + reply])
    with torch.inference_mode():
        return float(model.eval()(torch.tensor([prompt + reply]), labels=labels).loss)


def test_the_loss_is_that_of_the_replies_under_each_model(report: Report, model: Model, tokens: Tokens) -> None:
    found = report.figures()
    tuned, base = load_model(model.path), build_start(model.json("start.json"))
    assert found["nll"]["tuned"] == pytest.approx(plain_nll(tuned, tokens, 5), rel=1e-4)
    assert found["nll"]["base"] == pytest.approx(plain_nll(base, tokens, 5), rel=1e-4)
    count, size = found["tokens"], len(TALKS[5][1])
    assert found["bits_per_byte"]["base"] == pytest.approx(found["nll"]["base"] * count / size / np.log(2))
    assert (found["split"], found["split_asked"], found["sequences"]) == ("test", "test", 1)


def test_what_was_learnt_shows_beside_the_base(report: Report) -> None:
    found = report.figures()
    shown = found["panel"][0]
    assert all(reply["end"] == "stopped" and reply["text"].startswith("It is ") for reply in shown["tuned"])
    assert not any(reply["end"] == "stopped" for reply in shown["base"])
    assert found["stop_rate"]["base"] < 0.05 < found["stop_rate"]["tuned"]


def test_the_report_has_the_figures_that_others_rely_on(report: Report, model: Model) -> None:
    found = report.figures()
    for measure in ("nll", "perplexity", "bits_per_byte", "stop_rate", "loop_rate", "cut_rate"):
        assert set(found[measure]) == {"base", "tuned"}
    assert set(found["facts"]) == {"base", "tuned", "n", "by_region", "by_family", "wrong"}
    assert found["facts"]["n"] == found["facts"]["by_family"]["young"]["n"] == 20
    assert len(found["facts"]["wrong"]) == 20  # it learnt nothing of animals
    assert [shown["prompt"] for shown in found["panel"]] == list(PARAMS.sample_prompts)
    assert found["start"] == model.json("start.json")
    assert found["training"] == model.json("training.json")
    assert set(Report.files) <= {path.name for path in report.path.iterdir()}
    assert "![loss](loss.svg)" in report.markdown()
    assert "facts.svg" not in report.markdown()  # animals have no region
    assert not (report.path / "facts.svg").exists()


def test_every_reply_is_kept(report: Report) -> None:
    lines = [json.loads(line) for line in (report.path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (20 + 2 * 2)


def test_the_same_inputs_make_the_same_bytes(report: Report, model: Model, tokens: Tokens, tmp_path: Path) -> None:
    again = reported(tmp_path / "again", model, tokens)
    for path in report.path.iterdir():
        assert (again.path / path.name).read_bytes() == path.read_bytes(), path.name


def test_one_setting_of_the_panel_changes_the_panel_alone(
    report: Report, model: Model, tokens: Tokens, tmp_path: Path
) -> None:
    changed = PARAMS.model_copy(update={"seed": 99})
    found, before = reported(tmp_path / "r", model, tokens, changed).figures(), report.figures()
    assert found["panel"][0]["base"] != before["panel"][0]["base"]
    assert {name: found[name] for name in ("nll", "facts")} == {name: before[name] for name in ("nll", "facts")}


def test_an_empty_test_split_gives_way_to_val_and_the_report_says_so(
    model: Model, tokens: Tokens, tmp_path: Path
) -> None:
    few = EvaluateParams(fact_families=(), sample_prompts=())
    held = with_splits(tokens, tmp_path / "t", train=(0, 5), val=(4, 5), test=(6, 6))
    found = reported(tmp_path / "r", model, held, few)
    assert (found.figures()["split"], found.figures()["split_asked"]) == ("val", "test")
    assert "the test split holds none" in found.markdown()
    assert (found.figures()["facts"], found.figures()["stop_rate"]["tuned"]) == (None, None)
    bare = with_splits(tokens, tmp_path / "b", train=(0, 6), val=(6, 6), test=(6, 6))
    found = reported(tmp_path / "q", model, bare, few)
    assert (found.figures()["split"], found.figures()["nll"]) == (None, {"base": None, "tuned": None})


def test_regions_are_asked_and_drawn_where_facts_have_them(model: Model, tokens: Tokens, tmp_path: Path) -> None:
    params = EvaluateParams(fact_families=("indian_state",), sample_prompts=(), max_new_tokens=2)
    found = reported(tmp_path / "r", model, tokens, params)
    assert (
        sum(region["n"] for region in found.figures()["facts"]["by_region"].values()) == found.figures()["facts"]["n"]
    )
    assert "![facts](facts.svg)" in found.markdown()
    assert (found.path / "facts.svg").read_bytes().startswith(b"<?xml")


def test_too_little_memory_names_what_to_lower(
    model: Model, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*given: object, **named: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("tasks.gpt.sampling.generate", short)
    with pytest.raises(TrainingError, match=r"runtime\.generation_batch"):
        reported(tmp_path / "r", model, tokens)


def test_a_model_of_another_encoding_is_refused(model: Model, tokens: Tokens, tmp_path: Path) -> None:
    shutil.copytree(tokens.path, tmp_path / "t")
    write_encoding(tmp_path / "t", replace(read_encoding(tokens.path), template="xml"))
    with pytest.raises(ParameterError, match="differs in template"):
        reported(tmp_path / "r", model, Tokens(tmp_path / "t", tokens.manifest))


def test_weights_that_are_not_finite_are_refused(model: Model, tokens: Tokens, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(model.path, folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="the loss of the tuned model is nan"):
        reported(tmp_path / "r", Model(folder, model.manifest), tokens)


def test_the_base_of_a_local_start_is_found_by_its_content(
    model: Model, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was tuned from the fixture's, zero steps long: base and tuned are one."""
    folder = tmp_path / "m"
    shutil.copytree(model.path, folder)
    start = {**model.json("start.json"), "start": "folder", **digests(model.path)}
    (folder / "start.json").write_text(json.dumps(start))
    monkeypatch.setenv(ROOTS, str(tmp_path / "models"))
    with pytest.raises(ParameterError, match="lie under no allowed root"):
        reported(tmp_path / "r", Model(folder, model.manifest), tokens)
    shutil.copytree(model.path, tmp_path / "models" / "renamed")
    found = reported(tmp_path / "r", Model(folder, model.manifest), tokens).figures()
    assert found["nll"]["base"] == found["nll"]["tuned"]
    assert all(shown["base"] == shown["tuned"] for shown in found["panel"])  # same seeds, same words


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValidationError, match="no family of facts is named capitals"):
        EvaluateParams(fact_families=("capitals",))
    with pytest.raises(ValidationError, match="a prompt of the panel is empty"):
        EvaluateParams(sample_prompts=("Hi", " "))


def test_the_data_are_told_of_where_the_tokens_know(model: Model, tokens: Tokens, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    shutil.copytree(tokens.path, folder)
    counts = {
        "trees": 1, "messages": 2, "read": {"trees": 2, "messages": 4}, "masked": 0, "funnel": {"spam": 2},
        "label_coverage": {"labels": 1.0, "detoxify": 1.0}, "facts": {},
        "shared_across_splits": {way: {"exact": 0, "near": 0} for way in WAYS},
    }  # fmt: skip
    told = {"counts": counts, "by_language": {"spam": {"en": 2}}, "cases": {}}
    (folder / "curation.json").write_text(json.dumps(told))
    made = reported(
        tmp_path / "out", model, Tokens(folder, tokens.manifest), EvaluateParams(fact_families=(), sample_prompts=())
    )
    assert "| spam" in made.markdown()
    assert (made.path / "funnel.svg").exists()
    assert made.figures()["curation"] == told
