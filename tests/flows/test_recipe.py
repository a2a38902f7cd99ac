"""Laws of recipes: the unknown is an error with advice, runtime settings are led to their place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import recipe, sweep
from tasks.encode import EncodeRuntime
from tasks.errors import ParameterError
from tasks.evaluate import EvaluateRuntime
from tasks.score import ScoreRuntime
from tasks.train import TrainRuntime


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_that_comes_with_treeline_is_valid_and_says_what_it_is_for(name: str) -> None:
    assert recipe.load(name).name == name
    assert (recipe.FOLDER / f"{name}.toml").read_text(encoding="utf-8").startswith("# ")


def test_a_setting_is_changed_by_its_name() -> None:
    made = recipe.load(
        "quickstart", ["encode.context_length=256", 'encode.layout="top1"', "curate.languages=['de', 'en']"]
    )
    assert (made.encode.context_length, made.encode.layout, made.curate.languages) == (256, "top1", ("de", "en"))


def test_several_inputs_are_a_list_of_tables() -> None:
    made = recipe.load("quickstart", ['download.source="oasst1"', 'download.also=[{source="oasst2"}]'])
    assert [one.source for one in made.download.inputs] == ["oasst1", "oasst2"]


def test_text_needs_no_quotes() -> None:
    assert recipe.load("quickstart", ["encode.layout=first-reply"]).encode.layout == "first-reply"


def test_a_runtime_setting_stands_once_for_all_steps() -> None:
    runtime = recipe.load("quickstart", ["runtime.device=cpu", "runtime.workers=3"]).runtime
    assert runtime.of(TrainRuntime).device == runtime.of(EvaluateRuntime).device == "cpu"
    assert runtime.of(EncodeRuntime).workers == 3
    with pytest.raises(ParameterError, match=r"did you mean runtime\.device"):
        recipe.load("quickstart", ["train.device=cpu"])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("encode.context_lenth=5", "did you mean context_length"),
        ("encod.context_length=5", "did you mean encode"),
        ("encode.context_length=five", "encode.context_length: .*found 'five'"),
        ("encode.context_length=-1", "greater than or equal"),
        ("encode.layout=zigzag", "encode.layout"),
        ("encode", "expected section.name=value"),
        ("=5", "expected section.name=value"),
        ("name.x=5", "holds a value"),
        ('download.also=[{source="oasst1", fil="x"}]', "did you mean file"),
        ('download.also=[{source="nowhere"}]', "download.also.0: source: expected one of"),
    ],
)
def test_a_wrong_setting_is_refused_with_advice(setting: str, says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        recipe.load("quickstart", [setting])


@pytest.mark.parametrize(
    "value",
    ["[" * 200_000, "{a=" * 200_000, "9" * 5_000, "[1, -" + "9" * 5_000 + "]", "0x" + "f" * 10**6, "a" * 10**6],
    ids=["lists", "tables", "number", "number within", "hex", "text"],
)
def test_a_value_that_is_nested_or_long_without_end_is_refused_in_a_setting_a_recipe_and_a_sweep(
    tmp_path: Path, value: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"[encode]\nblock = {value}\n")
    setting = f"encode.context_length={value}"
    ways: list[Callable[[], object]] = [
        lambda: recipe.load("quickstart", [setting]),
        lambda: recipe.load(str(file)),
        lambda: sweep.settled(recipe.load("quickstart"), [setting]),
    ]
    for load in ways:
        with pytest.raises(ParameterError) as caught:
            load()
        assert len(str(caught.value)) < 1_000


def test_a_name_of_many_parts_is_refused() -> None:
    with pytest.raises(ParameterError, match="there is no such setting"):
        recipe.load("quickstart", ["a." * 200_000 + "b=1"])


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ParameterError, match="did you mean quickstart"):
        recipe.load("quikstart")


def test_a_file_of_ones_own_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine & co.toml").write_text("[encode]\ncontext_length = 64\n")
    made = recipe.load(str(tmp_path / "mine & co.toml"))
    assert (made.name, made.encode.context_length) == ("mine---co", 64)
    (tmp_path / "broken.toml").write_text("[encode\n")
    with pytest.raises(ParameterError, match=r"broken\.toml"):
        recipe.load(str(tmp_path / "broken.toml"))


def test_refer_works_in_the_numbers_of_prefer_unless_it_was_told_otherwise() -> None:
    def numbers(*settings: str) -> str:
        return str(
            recipe.load("quickstart", ["preferences=true", *settings]).section("score").model_dump()["precision"]
        )

    half = "prefer.precision=bfloat16"
    assert (numbers(), numbers(half), numbers(half, "score.precision=float32")) == ("float32", "bfloat16", "float32")


@pytest.mark.parametrize("setting", ["prefer.beta=0.3", "pair.max_replies=4"])
def test_settings_of_a_step_that_does_not_run_are_refused(setting: str) -> None:
    with pytest.raises(ParameterError, match="need preferences = true"):
        recipe.load("quickstart", [setting])
    assert recipe.load("quickstart", [setting, "preferences=true"]).preferences


def test_score_takes_the_settings_that_it_heeds_and_no_others() -> None:
    assert set(ScoreRuntime.model_fields) == {"device", "micro_batch", "threads"}


def test_a_setting_without_a_say_is_in_no_key() -> None:
    def keys(*settings: str) -> list[dict[str, Any]]:
        made = recipe.load("gpt2", settings)
        return [made.section(step).keyed() for step in ("encode", "evaluate")]

    assert keys("encode.vocab_size=8192") == keys()
    assert keys("encode.tokenizer=trained", "encode.vocab_size=8192") != keys("encode.tokenizer=trained")
    assert keys("evaluate.temperature=0", "evaluate.top_k=3", "evaluate.seed=1") == keys("evaluate.temperature=0")
    assert keys("evaluate.sample_prompts=[]", "evaluate.seed=1") == keys("evaluate.sample_prompts=[]")
    assert keys("evaluate.seed=1") != keys() != keys("evaluate.max_new_tokens=9")


def test_curation_is_told_what_the_evaluation_asks_unless_it_was_told_otherwise() -> None:
    made = recipe.load("quickstart", ['evaluate.sample_prompts=["Who?"]'])
    told = made.section("curate").model_dump()
    assert (told["sample_prompts"], told["fact_families"]) == (("Who?",), ("capital", "us_state", "indian_state"))
    own = (
        recipe.load("quickstart", ["curate.sample_prompts=[]", 'curate.fact_families=["plural"]'])
        .section("curate")
        .model_dump()
    )
    assert (own["sample_prompts"], own["fact_families"]) == ((), ("plural",))
    assert made.section("encode") is made.encode


def test_what_a_schedule_made_in_the_ui_leaves_out_or_empty_is_taken_from_the_recipe_of_its_deployment() -> None:
    whole = recipe.load("quickstart", ["train.target_tokens=1000"])
    partial = recipe.Recipe.model_validate(
        {
            "train": {"seed": 7, "target_tokens": None, "lr": 0.5},
            "curate": {"top_k": None},
            "runtime": {"threads": None},
        }
    )
    assert recipe.completed(partial, whole) == recipe.changed(whole, ["train.seed=7", "train.lr=0.5"], whole.name)
