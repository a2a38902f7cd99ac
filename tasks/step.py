"""A step declares itself by its signature: signature -> key -> store -> Prefect state.

    @step("encode", version=3, makes=Tokens)
    def encode(out: Path, dialogues: Dialogues, params: EncodeParams, run: EncodeRuntime) -> Counts: ...

`Artifact` arguments are inputs and enter the key by content; the one `Params` enters it whole; the one `Runtime` says
how fast, never what, and stays out. Calling the step looks its key up and builds only on a miss. Inside a Prefect flow
the call is a task run, and a hit is shown as state Cached. Prefect is imported there and nowhere else in `tasks/`.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field

from tasks.artifacts import Artifact, Counts
from tasks.errors import StoreError
from tasks.provenance import origin_of
from tasks.store.canonical import sha256_of
from tasks.store.disk import disk_error, refusal
from tasks.store.explain import why_missing
from tasks.store.integrity import Fault
from tasks.store.lease import Lease, lease
from tasks.store.lock import single_flight
from tasks.store.manifest import Manifest, Notice, content_digest
from tasks.store.store import SHORT, Store, entries

log = logging.getLogger("treeline.step")
P = ParamSpec("P")
Notices = Callable[[Counts, Any], Iterable[Notice]]  # counts and Params of a step -> what it lost
A = TypeVar("A", bound=Artifact)
ROOT = Path(__file__).resolve().parent.parent


class Params(BaseModel):
    """Settings that decide what a step makes. All of them enter its key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def keyed(self) -> dict[str, Any]:
        """Return what enters the key: each setting that has a say, defaults spelled out; content in place of a path."""
        return self.model_dump(mode="json", exclude=self.idle())

    def idle(self) -> set[str]:
        """Return the settings that have no say beside the others: to change one of them must not cost a run."""
        return set()


class Runtime(BaseModel):
    """Settings that decide how fast a step works, never what it makes. None of them enters its key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class TextsRuntime(Runtime):
    """How a step works on texts."""

    workers: int = Field(default=0, ge=0, le=1_024)
    """Threads that work on texts; 0: one a core. Any number gives the same files."""


def home() -> Path:
    """Return the store's folder: `$TREELINE_ARTIFACTS`, read at each call, or `artifacts/` of this project."""
    return Path(os.environ.get("TREELINE_ARTIFACTS") or ROOT / "artifacts").absolute()


@dataclass(frozen=True)
class Outcome:
    """What became of one step of a run."""

    step: str
    artifact: Artifact
    cached: bool
    seconds: float
    why: str


@dataclass
class Session:
    """One run of the chain: what it is to do, and what it did so far.

    Attributes:
        recipe: Name of the recipe, recorded in manifests.
        force: Steps to build even where their artifact is there.
        shown: Called with each outcome, inside the step's task run; must not raise.
        outcomes: One a step that was called, in order.
        lease: Keeps what was resolved from being collected meanwhile.
    """

    recipe: str = ""
    force: frozenset[str] = frozenset()
    shown: Callable[[Outcome], None] = lambda outcome: None
    outcomes: list[Outcome] = field(default_factory=list)
    lease: Lease | None = None


_session: ContextVar[Session] = ContextVar("treeline_session")


@contextmanager
def session(
    recipe: str = "", force: frozenset[str] = frozenset(), shown: Callable[[Outcome], None] = lambda outcome: None
) -> Iterator[Session]:
    """Open a session; inside another one, go on with that."""
    outer = _session.get(None)
    if outer is not None:
        yield outer
        return
    with lease(home()) as held:
        opened = Session(recipe, force, shown, lease=held)
        token = _session.set(opened)
        try:
            yield opened
        finally:
            _session.reset(token)


def hold(artifact: Artifact) -> None:
    """Keep an artifact that a setting names from being collected, as inputs are, while the run lasts."""
    run = _session.get(None)
    if run is not None and run.lease:
        run.lease.hold(artifact.id)


def step(
    name: str,
    *,
    version: int,
    makes: type[A],
    inherits: Collection[str] = (),
    notices: Notices = lambda counts, params: (),
) -> Callable[[Callable[Concatenate[Path, P], Counts]], Step[P, A]]:
    """Turn a function that writes files into a folder into a cached step.

    Args:
        name: The step's name; it enters the key.
        version: Raised by a person when the code makes other files than before; `test_version_guard.py` reminds.
        makes: The artifact that the files are.
        inherits: Names of what a build may go on with that a failed or killed one left in its folder.
        notices: Says of what was measured, and the settings, what was lost.

    Raises:
        TypeError: At import, if the signature holds anything but `out: Path`, artifacts, one Params and one Runtime.
    """
    return lambda function: Step(name, version, makes, inherits, function, notices)


class Step(Generic[P, A]):
    """A function from artifacts and settings to an artifact, cached by what enters it."""

    def __init__(
        self,
        name: str,
        version: int,
        makes: type[A],
        inherits: Collection[str],
        function: Callable[Concatenate[Path, P], Counts],
        notices: Notices = lambda counts, params: (),
    ) -> None:
        self.name, self.version, self.makes, self.inherits, self.function = name, version, makes, inherits, function
        self.notices = notices
        self.__doc__, self.__module__ = function.__doc__, function.__module__
        hints = get_type_hints(function)
        hints.pop("return", None)
        if list(hints)[:1] != ["out"] or hints.pop("out") is not Path:
            raise TypeError(f"step {name}: the first argument must be `out: Path`")
        self.inputs = {arg: kind for arg, kind in hints.items() if issubclass(kind, Artifact)}
        settings = {arg: kind for arg, kind in hints.items() if issubclass(kind, Params)}
        runtimes = {arg: kind for arg, kind in hints.items() if issubclass(kind, Runtime)}
        odd = set(hints) - set(self.inputs) - set(settings) - set(runtimes)
        if odd or len(settings) != 1 or len(runtimes) > 1:
            raise TypeError(f"step {name}: an argument is an Artifact, the one Params or the one Runtime; odd: {odd}")
        (self.params_name, self.params_type), *_ = settings.items()
        self.runtime_name: str = next(iter(runtimes), "")
        self.runtime_type: type[Runtime] = runtimes.get(self.runtime_name, Runtime)

    def recipe(self, digests: Mapping[str, str], params: Params) -> dict[str, Any]:
        """Return the key's preimage for inputs given by content digest."""
        return {
            "step": self.name,
            "version": self.version,
            "params": params.keyed(),
            "inputs": {arg: digests[arg] for arg in self.inputs},
        }

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> A:
        """Return the artifact of these arguments: the one in the store, or a new one."""
        bound = self._bind(*args, **kwargs)
        with session() as run:
            call = _Call(self, bound, run)
            outcome = _as_task(call) if _in_flow() else call.resolve()
            run.outcomes.append(outcome)
            made: A = outcome.artifact  # type: ignore[assignment]
            return made

    def _bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Name the arguments; a Runtime that is left out takes its defaults."""
        signature = inspect.signature(self.function)
        given = signature.bind_partial(None, *args, **kwargs).arguments
        if self.runtime_name:
            given.setdefault(self.runtime_name, self.runtime_type())
        bound = dict(signature.bind(**given).arguments)
        del bound["out"]
        return bound


class _Call:
    """One call of a step: its key, and the way from key to artifact."""

    def __init__(self, made_by: Step[Any, Any], bound: dict[str, Any], run: Session) -> None:
        self.step, self.bound, self.run = made_by, bound, run
        digests = {arg: bound[arg].manifest.digest for arg in made_by.inputs}
        self.recipe = made_by.recipe(digests, bound[made_by.params_name])
        self.key = sha256_of(self.recipe)
        self.store = Store(home())
        self.kind = made_by.makes.kind
        self.forced = made_by.name in run.force
        self.fault = ""

    def look(self) -> Manifest | None:
        """Return the manifest of a usable artifact; one that is broken is moved aside, and that is said."""
        found = None if self.forced else self.store.look(self.kind, self.key)
        if isinstance(found, Fault):
            self.fault = str(found)
            self.store.set_aside(self.store.folder(self.kind, self.key), self.fault)
            return None
        return found

    def resolve(self) -> Outcome:
        """Look the artifact up; build it where it is not there."""
        started = time.monotonic()
        if self.run.lease:
            for artifact_id in (f"{self.kind}/{self.key[:SHORT]}", *(self.bound[arg].id for arg in self.step.inputs)):
                self.run.lease.hold(artifact_id)
        lock = self.store.root / ".locks" / f"{self.kind}-{self.key[:SHORT]}.lock"
        manifest, cached, why = self.look(), True, "nothing changed"
        if manifest is None:
            with single_flight(lock, f"{self.kind}/{self.key[:SHORT]}"):
                manifest = self.look()  # another process may have made it while we waited
                if manifest is None:
                    cached, why = False, self.why()
                    manifest = self.build()
        artifact = self.step.makes(self.store.folder(self.kind, self.key), manifest)
        outcome = Outcome(self.step.name, artifact, cached, time.monotonic() - started, why)
        self.run.shown(outcome)
        return outcome

    def why(self) -> str:
        """Say why this call has no artifact."""
        if self.forced or self.fault:
            return self.fault or "forced"
        near = self.store.comparable(self.kind, self.run.recipe, self.step.name)
        return why_missing(self.recipe, near, self.store.names())

    def build(self) -> Manifest:
        """Publish what the step's function writes into a scratch folder; or what a try wrote that ended just before."""
        inherits = self.step.inherits
        with self.store.scratch(self.kind, self.key, inherits, self.forced, self.recipe) as out:
            manifest = self.store.built(out, self.key, inherits) or self.write(out)
            return self.store.publish(out, manifest, replace=self.forced)[1]

    def write(self, out: Path) -> Manifest:
        """Run the step's function in a scratch folder, and tell what it wrote."""
        started = time.time()
        try:
            counts = self.step.function(out, **self.bound)
            files = entries(out)
        except Exception as error:
            if not out.exists():
                what = (
                    f"the scratch folder of step {self.step.name} is gone: a run of another host took this one for dead"
                )
                raise StoreError(what, str(out), "Run it again", "store.scratch") from error
            if disk := disk_error(error):
                raise refusal(self.store.root, disk) from error
            raise
        self.refuse_others(files)
        digest = content_digest(files, self.step.makes.records)
        origin = {
            **origin_of(self.run.recipe, self.runtime()),
            "seconds": round(time.time() - started, 3),
        }
        return Manifest(self.key, self.kind, self.recipe, files, digest, counts, origin, notices=self.notices(counts))

    def notices(self, counts: Counts) -> tuple[Notice, ...]:
        """Return what was lost up to here: a manifest keeps all of it, as an artifact may travel alone."""
        inputs = [notice for arg in self.step.inputs for notice in self.bound[arg].manifest.notices]
        return (*dict.fromkeys(inputs), *self.step.notices(counts, self.bound[self.step.params_name]))

    def refuse_others(self, files: Collection[str]) -> None:
        """Raise an error unless these are the files that the artifact declares."""
        makes = self.step.makes
        missing = sorted({*makes.files} - {*files})
        odd = sorted(name for name in files if not makes.declares(name))
        if missing:
            raise StoreError(f"step {self.step.name} did not write {', '.join(missing)}", code="step.files")
        if odd:
            what = f"step {self.step.name} wrote {', '.join(odd)}, which {self.kind} does not declare"
            raise StoreError(what, "", f"declare it in tasks/artifacts.py ({makes.__name__}.optional)", "step.files")

    def runtime(self) -> dict[str, Any]:
        """Return how fast it was asked to work, as JSON values."""
        given: Runtime | None = self.bound.get(self.step.runtime_name)
        return given.model_dump(mode="json") if given else {}


def _in_flow() -> bool:
    """Tell whether a Prefect flow is running, without importing Prefect where it is not."""
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext, TaskRunContext

    return FlowRunContext.get() is not None and TaskRunContext.get() is None


def _as_task(call: _Call) -> Outcome:
    """Run a call as a Prefect task, called directly so that a cancellation reaches it; the store decides."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    cached = call.look() is not None
    name = f"{call.step.name} {call.key[:SHORT]}{' cached' if cached else ''}"

    def run(inputs: dict[str, str], params: dict[str, Any]) -> Any:
        outcome = call.resolve()
        if not outcome.cached:
            return outcome
        return Completed(name="Cached", message=f"{outcome.artifact.id}: {outcome.why}", data=outcome)

    named = task(
        name=call.step.name,
        task_run_name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        description=inspect.getdoc(call.step),
    )
    inputs = {arg: call.bound[arg].id for arg in call.step.inputs}
    state = named(run)(inputs, call.recipe["params"], return_state=True)
    outcome: Outcome = state.result()
    return outcome
