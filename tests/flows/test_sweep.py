"""Laws of a sweep: every combination once, what is shared is computed once, and all arms are judged alike."""

import json
from pathlib import Path

import pytest

from flows import recipe, sweep
from flows.__main__ import main
from tasks.artifacts import Model, Report, Tokens
from tasks.errors import ParameterError
from tasks.store.manifest import FileEntry, Manifest
from tasks.store.store import Store

TINY = str(Path(__file__).with_name("tiny.toml"))
BASE = recipe.load(TINY)


def labels(*settings: str, seeds: int = 1) -> list[tuple[str, int]]:
    return [(arm.label, arm.seed) for arm in sweep.arms(BASE, settings, seeds)]


def test_each_combination_is_an_arm_with_each_seed() -> None:
    made = sweep.arms(BASE, ["train.lr=1e-3,3e-3", "encode.layout=paths,top1"], 2)
    assert [arm.label for arm in made[::2]] == [
        f"train.lr={lr} encode.layout={layout}" for lr in ("0.001", "0.003") for layout in ("paths", "top1")
    ]
    assert [arm.seed for arm in made[:2]] == [BASE.train.seed, BASE.train.seed + 1]
    assert made[0].recipe.train.lr == 1e-3
    said = made[0].recipe.model_dump() | {"name": BASE.name, "train": BASE.train.model_dump()}
    judged = BASE.evaluate.model_dump() | {"split": "val"}
    assert said == BASE.model_dump() | {"encode": made[0].recipe.encode.model_dump(), "evaluate": judged}
    assert len({arm.recipe.name for arm in made}) == 8


def test_a_comma_within_a_value_does_not_part() -> None:
    assert labels('curate.languages=["en","de"],["fr"]') == [
        ('curate.languages=["en", "de"]', 1337),
        ('curate.languages=["fr"]', 1337),
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.lr"], "section.name=value"),
        (["train.lr=1e-3", "train.lr=3e-3"], "varied twice"),
        (["train.seed=1,2"], "--seeds"),
        (["evaluate.split=val,test"], "changes the judge"),
        (["train.lr=2020-01-01"], "valid number"),
        (["train.lr=1e-3,1e-3"], "same settings"),
        (["train.rate=1"], "no such setting"),
        ([f"train.epochs={','.join(map(str, range(1, 70)))}"], "at most 64"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        sweep.arms(BASE, settings, 1)


def test_arms_share_their_data_and_are_judged_on_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path))
    base = recipe.load(TINY, ["encode.vocab_size=512"])
    planned = sweep.arms(base, ["encode.layout=tree,top1", "train.epochs=0.2,0.4"], 1)
    from flows import chain
    from tasks.step import session

    assert sweep.done(base, planned) is None
    with session() as now:
        judge = chain.run(base, chain.DATA)[Tokens]
        assert isinstance(judge, Tokens)
        for arm in planned:
            own = chain.run(arm.recipe, chain.DATA)
            assert sweep.run(arm, own, judge).shared
        built = [outcome.step for outcome in now.outcomes if not outcome.cached]
    assert sorted(built) == sorted(["download", "parse", "curate", "encode", "encode", *["train", "evaluate"] * 4])
    assert len(Store(tmp_path).manifests("report")) == 4
    outcomes = sweep.done(base, planned)
    assert outcomes is not None
    assert len({outcome.report.figures()["tokens"] for outcome in outcomes}) == 1
    rows = sweep.comparison(outcomes)
    assert [row["NLL"]["mean"] for row in rows] == sorted(row["NLL"]["mean"] for row in rows)
    assert all(len(sweep.cells(row)) == len(sweep.COLUMNS) for row in rows)
    arguments = ["sweep", TINY, "--set", "encode.layout=tree,top1", "--set", "train.epochs=0.2,0.4", "--json"]
    assert main(arguments) == 0  # nothing is left to do: the table, without Prefect
    assert "not to be compared" not in capsys.readouterr().out


def test_what_all_arms_have_in_common_is_settled_before_they_are_judged() -> None:
    settings = ["encode.vocab_size=300", "train.lr=1e-3,3e-3"]
    base = sweep.settled(BASE, settings)
    assert (base.name, base.encode.vocab_size, base.train.lr) == (BASE.name, 300, BASE.train.lr)
    assert all(arm.recipe.encode == base.encode for arm in sweep.arms(base, settings, 2))
    assert sweep.settled(BASE, settings[1:]) is BASE


def test_arms_that_came_to_the_very_same_models_are_said_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "MEASURES", {"NLL": (lambda outcome: 1.0, ".4f")})

    def outcome(label: str, key: str) -> sweep.Outcome:
        model = Model(Path(), Manifest(key * 64, "model", {}, {}, key))
        return sweep.Outcome(sweep.Arm(label, 0, BASE), model, Report(Path(), model.manifest), shared=True)

    told = sweep.comparison([outcome("prefer.beta=0.1", "a"), outcome("prefer.beta=0.3", "a"), outcome("other", "b")])
    first, second, third = (row["arm"] for row in told)
    assert (first, third) == ("prefer.beta=0.1", "other")
    assert second == "prefer.beta=0.3 (the very models of prefer.beta=0.1: the setting has no say here)"


@pytest.mark.parametrize("models", [["base", "tuned"], ["base", "tuned", "preferred"]])
def test_an_arm_is_measured_by_the_model_that_it_ended_with(tmp_path: Path, models: list[str]) -> None:
    each = {which: float(place) for place, which in enumerate(models)}
    figures = {"models": models, "nll": each, "bits_per_byte": each, "facts": None, "stop_rate": each}
    (tmp_path / "report.json").write_text(json.dumps(figures))
    manifest = Manifest("0" * 64, "report", {}, {}, "a")
    outcome = sweep.Outcome(sweep.Arm("", 0, BASE), Model(tmp_path, manifest), Report(tmp_path, manifest), shared=True)
    (row,) = sweep.comparison([outcome])
    last = len(models) - 1
    assert [row[name] and row[name]["mean"] for name in ("NLL", "stops", "facts")] == [last, last, None]


def test_an_arm_of_other_data_is_not_judged_on_what_it_may_have_seen() -> None:
    def tokens(dialogues: str) -> Tokens:
        entry = FileEntry(1, "f" * 64)
        inputs = {"inputs": {"dialogues": dialogues}}
        return Tokens(Path(), Manifest("0" * 64, "tokens", inputs, {"tokenizer.json": entry}, dialogues))

    own, judge = tokens("a"), tokens("b")
    assert sweep.judge_of(own, judge) is own
