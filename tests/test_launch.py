"""Laws of steps that many processes do: the same outcome, nobody left behind, and a lost one costs no result."""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows import run_commands
from tasks.artifacts import Tokens
from tasks.errors import InputError, ParameterError, RankLost
from tasks.gpt.distributed import ProcessGroup
from tasks.gpt.interrupt import Interrupted
from tasks.launch import _run_jobs, num_processes, run_distributed, torchrun_group
from tasks.progress import listening
from tasks.step import ROOT
from tasks.store.canonical import sha256_of
from tasks.store.manifest import write_manifest
from tasks.train import TrainParams, TrainRuntime, train
from tests.test_train import MORE, RUN, tokens_in
from tests.waiting import ended, run, started, until

PARAMS = TrainParams(**{**MORE, "dropout": 0.0, "epochs": 6})
TWO = RUN.model_copy(update={"num_processes": 2, "checkpoint_seconds": 0.0})
# A process that trains in a folder, by a runtime, on tokens: all from its arguments.
TRAINER = """
import json, sys
from pathlib import Path
from tasks.artifacts import Tokens
from tasks.store.manifest import read_manifest
from tasks.train import TrainParams, TrainRuntime, train
from tasks.launch import torchrun_group
out, tokens, params, run = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
with torchrun_group() as leads:
    if leads:
        train.function(out, Tokens(tokens, read_manifest(tokens)), TrainParams(**params), TrainRuntime(**run))
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    made = tokens_in(tmp_path_factory.mktemp("tokens") / "t")
    write_manifest(made.path, replace(made.manifest, key=sha256_of({})))
    return made


@pytest.fixture(scope="module")
def alone(tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return log_of(trained(tmp_path_factory.mktemp("alone"), tokens, RUN))


def trained(out: Path, tokens: Tokens, run: TrainRuntime = TWO) -> Path:
    train.function(out, tokens, PARAMS, run)
    return out


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry[name] or 0.0 for entry in log for name in ("loss", "val_nll")]


def ranks_of(parent: int) -> list[int]:
    """The processes that train, of those that a process has started."""
    children = Path(f"/proc/{parent}/task").glob("*/children")
    found = [int(child) for path in children for child in path.read_text().split()]
    told = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in found}
    return [child for child, line in told.items() if b"tasks.worker" in line or b"torchrun_group" in line]


class Striking:
    """A listener that does something once, when so many steps are done."""

    def __init__(self, after: int, strike: Callable[[], None]) -> None:
        self.left, self.strike = after, strike

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator["Striking"]:
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.left -= bool(note)  # a step is told with its loss
        if note and self.left == 0:
            self.strike()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_come_to_what_one_comes_to_and_leave_the_same_files(
    tokens: Tokens, alone: list[dict[str, Any]], tmp_path: Path, sharding: str
) -> None:
    out = trained(tmp_path, tokens, TWO.model_copy(update={"sharding": sharding}))
    assert losses(log_of(out)) == pytest.approx(losses(alone), rel=1e-5)
    assert {path.name for path in out.iterdir()} - {"checkpoints"} == set(train.makes.files)


@pytest.mark.slow
def test_a_killed_rank_is_begun_again_and_the_outcome_is_the_same(
    tokens: Tokens, alone: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def strike() -> None:
        os.kill(ranks_of(os.getpid())[1], signal.SIGKILL)

    with listening(Striking(5, strike)):
        log = log_of(trained(tmp_path, tokens))
    assert "rank 1 of 2 was killed by SIGKILL; all ranks resume from the last checkpoint" in caplog.text
    assert losses(log) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_what_the_system_refuses_a_rank_is_raised_here_and_no_rank_prints_a_traceback(
    tokens: Tokens, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="File exists"):
        trained(tmp_path, tokens)
    assert "step 1 could not be saved" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


@contextmanager
def training(out: Path, tokens: Tokens, torchrun: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """A process that lets two others train, once they have saved their second step."""
    long = PARAMS.model_copy(update={"epochs": 5_000.0})
    arguments = [str(out), str(tokens.path), long.model_dump_json(), TWO.model_dump_json()]
    by = [*TORCHRUN, "--no-python"] if torchrun else []
    asked = [*by, sys.executable, "-c", TRAINER, *arguments]
    with started(asked, cwd=ROOT, start_new_session=True) as launcher:
        until(lambda: (out / "checkpoints" / "step-00000002").exists(), launcher)
        yield launcher


def runs(process: int) -> bool:
    """Whether a process runs; one that has ended and was not fetched does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
@pytest.mark.parametrize("torchrun", [False, True])
def test_when_the_launcher_is_killed_no_rank_outlives_it_by_five_seconds(
    tokens: Tokens, tmp_path: Path, torchrun: bool
) -> None:
    with training(tmp_path, tokens, torchrun) as launcher:
        ranks = ranks_of(launcher.pid)
        assert len(ranks) == 2
        launcher.kill()
        until(lambda: not any(runs(rank) for rank in ranks), seconds=5.0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_of_one_machine_listen_on_the_loopback_alone(tokens: Tokens, tmp_path: Path) -> None:
    with training(tmp_path, tokens) as launcher:
        addresses = [address for pid in (launcher.pid, *ranks_of(launcher.pid)) for address in listening_addresses(pid)]
    assert addresses  # gloo's
    assert {*addresses} <= {"0100007F", "0" * 24 + "01000000"}  # 127.0.0.1 and ::1, as the kernel prints them


def listening_addresses(pid: int) -> list[str]:
    """The local addresses that a process listens on, as /proc/net/tcp prints them."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_asked_to_stop_all_ranks_save_the_same_step_and_the_launcher_ends_by_the_signal(
    tokens: Tokens, tmp_path: Path, torchrun: bool
) -> None:
    with training(tmp_path, tokens, torchrun) as launcher:
        ranks = ranks_of(launcher.pid)
        launcher.terminate()
        assert ended(launcher, seconds=20) == (1 if torchrun else -signal.SIGTERM)
        assert not any(runs(rank) for rank in ranks)
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
    assert json.loads((newest / "checkpoint.json").read_text())["step"] == log_of(tmp_path)[-1]["step"]


@pytest.mark.slow
def test_under_torchrun_rank_0_trains_and_writes_and_the_other_follows(
    tokens: Tokens, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Also where the runtime asks for no more than one process."""
    arguments = [str(tmp_path), str(tokens.path), PARAMS.model_dump_json(), RUN.model_dump_json()]
    asked = [*TORCHRUN, "--no-python", sys.executable, "-c", TRAINER, *arguments]
    done = run(asked, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert losses(log_of(tmp_path)) == pytest.approx(losses(alone), rel=1e-5)


def test_of_torchruns_processes_only_rank_0_runs_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_commands, "torchrun_group", lambda: nullcontext(False))
    monkeypatch.setattr(run_commands, "_run", lambda asked: 70)
    assert run_commands.run(Namespace()) == 0
    monkeypatch.setattr(run_commands, "torchrun_group", lambda: nullcontext(True))
    assert run_commands.run(Namespace()) == 70


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert num_processes(TrainRuntime(device="cuda", num_processes="auto")) == 2
    assert num_processes(TrainRuntime(device="cpu", num_processes="auto")) == 1
    with pytest.raises(ParameterError, match="expected at most 2 processes, one a GPU, found 3"):
        num_processes(TrainRuntime(device="cuda", num_processes=3))


@pytest.mark.parametrize("step", ["train", "prefer"])
def test_an_average_of_shards_is_refused_before_anything_is_started(tokens: Tokens, tmp_path: Path, step: str) -> None:
    params, run = PARAMS.model_copy(update={"ema_decay": 0.999}), TWO.model_copy(update={"sharding": "full"})
    with pytest.raises(ParameterError, match=rf"runtime\.sharding = full\. .*leave {step}\.ema_decay out"):
        run_distributed(step, tmp_path, {"tokens": tokens}, params, run)


@pytest.mark.parametrize(
    ("raised", "found"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), RankLost),
        (RuntimeError("shapes differ"), RuntimeError),
        (InputError("odd"), InputError),
    ],
)
def test_a_follower_says_of_a_lost_rank_that_it_is_lost_and_of_anything_else_what_it_is(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, found: type[Exception]
) -> None:
    def fail(job: Any) -> None:
        raise raised

    monkeypatch.setattr("tasks.launch.run_job", fail)
    monkeypatch.setattr(ProcessGroup, "broadcast", lambda self: {})
    with pytest.raises(found) as caught:
        _run_jobs()
    assert type(caught.value) is found


def test_a_rank_of_torchrun_that_another_one_stopped_ends_as_if_it_had_been_asked_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tasks.launch.exit_with_parent", lambda parent: None)
    monkeypatch.setattr("tasks.gpt.distributed.join_group", lambda *given, **more: nullcontext())
    with pytest.raises(SystemExit) as ended, torchrun_group():
        raise Interrupted
    assert ended.value.code == 143


def test_relative_paths_are_absolute_in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: Tokens) -> None:
    monkeypatch.chdir(tmp_path)
    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr("tasks.launch._launch", lambda job, *rest: jobs.append(job))
    params = PARAMS.model_copy(update={"folder": "m/gpt"})
    run_distributed("train", Path("out"), {"tokens": tokens}, params, TWO)
    assert (jobs[0]["params"]["folder"], jobs[0]["out"]) == (f"{tmp_path}/m/gpt", f"{tmp_path}/out")
