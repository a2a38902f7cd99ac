"""A recipe: one named TOML file and `--set section.name=value` make one frozen model of all settings of a run."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flows.runners import Runner
from tasks.curate import CurateParams
from tasks.download import DownloadParams, DownloadRuntime
from tasks.encode import EncodeParams
from tasks.errors import ParameterError
from tasks.evaluate import EvaluateParams, EvaluateRuntime
from tasks.pair import PairParams
from tasks.parse import ParseParams
from tasks.prefer import PreferParams
from tasks.score import ScoreParams
from tasks.step import Params, Runtime, TextsRuntime
from tasks.train import TrainParams, TrainRuntime

R = TypeVar("R", bound=Runtime)
FOLDER = Path(__file__).parent / "recipes"


class RuntimeSettings(DownloadRuntime, TextsRuntime, TrainRuntime, EvaluateRuntime):
    """How fast the steps work, and where, never what they make: none of these asks for a rerun."""

    runner: Runner = "threads"
    """Where texts are worked on: threads of this machine, or the workers of a Dask or Ray cluster."""

    def of(self, runtime: type[R]) -> R:
        """Return the settings that a step takes."""
        return runtime(**self.model_dump(include={*runtime.model_fields}))


class Recipe(BaseModel):
    """All settings of a run, one section a step, and `runtime` for what changes no result."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] = "quickstart"
    """Name of the recipe; runs are listed under it."""
    download: DownloadParams = DownloadParams()
    """Step 1: where the conversation trees come from."""
    parse: ParseParams = ParseParams()
    """Step 2: how the published trees are read."""
    curate: CurateParams = CurateParams()
    """Step 3: what is kept, and how it is split."""
    encode: EncodeParams = EncodeParams()
    """Step 4: how texts become token ids."""
    train: TrainParams = TrainParams()
    """Step 5: what is tuned, and how."""
    evaluate: EvaluateParams = EvaluateParams()
    """Step 6: what is measured."""
    pair: PairParams = PairParams()
    """With preferences, after encode: which ranked replies are compared."""
    score: ScoreParams = ScoreParams()
    """With preferences, after train: how likely the model finds them."""
    prefer: PreferParams = PreferParams()
    """With preferences, before evaluate: how the model learns to prefer the better ones."""
    preferences: bool = False
    """Whether the model is tuned further, by how people ranked replies: steps pair, score and prefer."""
    runtime: RuntimeSettings = RuntimeSettings()
    """How fast, never what."""

    @model_validator(mode="after")
    def _acts(self) -> Recipe:
        """Refuse settings of steps that the recipe does not have: they would be thought to act."""
        if not self.preferences:
            for name in ("pair", "score", "prefer"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"settings of {name} need preferences = true, without which it does not run")
        return self

    def section(self, step: str) -> Params:
        """Return the settings of a step, with what other steps decide unless it was told otherwise.

        Curation is told what the evaluation asks, and score in what numbers prefer works.
        """
        told: dict[str, dict[str, Any]] = {
            "curate": {"sample_prompts": self.evaluate.sample_prompts, "fact_families": self.evaluate.fact_families},
            "score": {"precision": self.prefer.precision},
        }
        found: Params = getattr(self, step)
        left = {name: value for name, value in told.get(step, {}).items() if getattr(found, name) is None}
        return found.model_copy(update=left) if left else found


def names() -> list[str]:
    """List the recipes that come with Treeline."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str = "quickstart", settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change some of its settings.

    Args:
        name: One of `names()`, or the path of a TOML file.
        settings: `section.name=value` each; a value is TOML, or else plain text.

    Raises:
        ParameterError: If the recipe or a setting is unknown, or a value is out of its range.
    """
    data = _read(_find(name))
    for setting in settings:
        _put(data, setting)
    return build(data, where=name)


def changed(base: Recipe, settings: Sequence[str], name: str) -> Recipe:
    """Return a recipe with some settings changed, under another name.

    Raises:
        ParameterError: If a setting is unknown, or a value is out of its range.
    """
    data = base.model_dump(mode="python")
    for setting in settings:
        _put(data, setting)
    return build({**data, "name": name}, where=name)


def build(data: dict[str, Any], where: str) -> Recipe:
    """Validate plain data as a recipe, saying each fault in one line.

    Raises:
        ParameterError: If it is none.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {_said(fault)}" for fault in error.errors()]
        raise ParameterError("; ".join(faults), f"recipe {where}", _advice(error), code="param.recipe") from error


def completed(partial: Recipe, whole: Recipe) -> Recipe:
    """Return a recipe with what it does not set, or sets to None, taken from another one.

    Raises:
        ParameterError: If the two do not go together.
    """
    values = partial.model_dump(mode="json", exclude_unset=True)
    return build(_overlaid(whole.model_dump(mode="json"), values), where=whole.name)


def _overlaid(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values that are not None, section by section."""
    changes = {
        name: _overlaid(base.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }
    return {**base, **changes}


def _find(name: str) -> Path:
    if name in names():
        return FOLDER / f"{name}.toml"
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    near = difflib.get_close_matches(name, names(), 1)
    raise ParameterError(
        f"there is no recipe {name!r}",
        hint=f"did you mean {near[0]}" if near else f"take one of {', '.join(names())}, or the path of a .toml file",
        code="param.recipe",
    )


def toml(text: str, where: str) -> dict[str, Any]:
    """Read TOML that others wrote.

    Args:
        text: What they wrote.
        where: Where it stands.

    Raises:
        tomllib.TOMLDecodeError: If it is none.
        ParameterError: If it is nested too deep, or has a number of thousands of digits.
    """
    try:
        found = tomllib.loads(text)
        json.dumps(found, default=str)  # a hexadecimal number of any length is read, but cannot be said
        return found
    except tomllib.TOMLDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        what = "a value is nested too deep" if isinstance(error, RecursionError) else f"a number is too long: {error}"
        raise ParameterError(what, where, "Give another value", "param.set") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = toml(path.read_text(encoding="utf-8"), str(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ParameterError(f"not TOML: {error}", str(path), code="param.recipe") from error
    return {"name": re.sub(r"[^A-Za-z0-9_-]", "-", path.stem).lstrip("-_")[:64] or "recipe", **data}


def _put(data: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise ParameterError(f"expected section.name=value, found {setting!r}", "--set", code="param.set")
    for part in parts[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ParameterError(f"{part!r} holds a value, not settings", f"--set {setting}", code="param.set")
    data[parts[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    try:
        return toml(f"value = {text}", f"--set ...={text[:60]}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _said(fault: Any) -> str:
    """Say a fault in the house's words; what was found only where it is a plain value."""
    if fault["type"] == "extra_forbidden":
        return "there is no such setting"
    found = "" if isinstance(fault["input"], dict | list | tuple) else f" (found {str(fault['input'])[:60]!r})"
    message: str = fault["msg"]
    return message.removeprefix("Value error, ").removesuffix(".") + found


def _advice(error: ValidationError) -> str:
    """Name the setting that an unknown one was probably meant to be."""
    for fault in error.errors():
        if fault["type"] == "extra_forbidden":
            *sections, unknown = map(str, fault["loc"])
            model: Any = Recipe
            for section in sections:
                default = model.model_fields[section].default if section in model.model_fields else None
                model = type(default) if isinstance(default, BaseModel) else model  # one of `also` is like its section
            if sections and unknown in RuntimeSettings.model_fields:
                return f"did you mean runtime.{unknown}"
            near = difflib.get_close_matches(unknown, model.model_fields, 1)
            return f"did you mean {near[0]}" if near else f"known are {', '.join(model.model_fields)}"
    return "give another value"
