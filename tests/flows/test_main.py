"""Laws of the command line: one run end to end on Prefect's in-process API, then everything that looks at it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tasks.store.integrity import identity
from tests.waiting import ended, run, started, until

ROOT = Path(__file__).parents[2]
TINY = str(Path(__file__).with_name("tiny.toml"))
KINDS = ["raw", "messages", "dialogues", "tokens", "model", "report"]


class Shell:
    """Runs commands against one store, as a user with an empty home would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TREELINE_"))}
        self.environment = {**kept, "TREELINE_ARTIFACTS": str(folder / "artifacts"), "HOME": str(self.home)}

    def __call__(self, *arguments: str, code: int = 0, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        asked = [sys.executable, *flags, "-m", "flows", *arguments]
        done = run(asked, cwd=ROOT, env=self.environment)
        assert done.returncode == code, done.stderr[-3000:]
        return done

    def json(self, *arguments: str, code: int = 0) -> object:
        return json.loads(self(*arguments, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shell, subprocess.CompletedProcess[str]]:
    shell = Shell(tmp_path_factory.mktemp("cli"))
    return shell, shell("run", TINY)


@pytest.fixture
def shell(ran: tuple[Shell, subprocess.CompletedProcess[str]]) -> Shell:
    return ran[0]


def test_a_run_ends_with_the_reports_id(ran: tuple[Shell, subprocess.CompletedProcess[str]]) -> None:
    _, done = ran
    assert re.fullmatch(r"report/[0-9a-f]{12}", done.stdout.splitlines()[-1])
    assert all(step in done.stdout for step in ("download", "parse", "curate", "encode", "train", "evaluate", "ran"))
    assert done.stderr.count("train.plan: about") == 1  # Prefect does not say again what we say


def test_a_run_touches_no_home_but_its_own(ran: tuple[Shell, subprocess.CompletedProcess[str]]) -> None:
    shell, _ = ran
    assert not (shell.home / ".prefect").exists()
    assert (shell.folder / "artifacts" / ".prefect" / "run" / "prefect.db").exists()


def test_a_second_run_starts_neither_prefect_nor_torch(shell: Shell) -> None:
    done = shell("run", TINY, flags=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "pydantic" in imported
    assert not imported & {"prefect", "torch", "transformers", "polars", "pyarrow", "matplotlib", "huggingface_hub"}
    assert re.fullmatch(r"report/[0-9a-f]{12}", done.stdout.splitlines()[-1])
    assert "ran" not in done.stdout.split()


@pytest.mark.parametrize("command", [("plan", TINY), ("why", TINY), ("ls",), ("show", "messages")])
def test_looking_starts_neither_prefect_nor_torch(shell: Shell, command: tuple[str, ...]) -> None:
    done = shell(*command, flags=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"prefect", "torch", "transformers"}


def test_the_plan_for_programs(shell: Shell) -> None:
    planned = shell.json("plan", TINY)
    assert isinstance(planned, list)
    assert [set(entry) for entry in planned] == [{"step", "status", "key", "why", "notices"}] * 6
    assert {entry["status"] for entry in planned} == {"cached"}
    changed = shell.json("plan", TINY, "--set", "encode.context_length=96")
    assert isinstance(changed, list)
    assert [entry["status"] for entry in changed] == ["cached"] * 3 + ["run", "unknown", "unknown"]


def test_why_names_the_setting_with_old_and_new(shell: Shell) -> None:
    assert (
        "encode would run: params.context_length: 64 -> 96"
        in shell("why", TINY, "--set", "encode.context_length=96").stdout
    )
    assert "nothing would run" in shell("why", TINY).stdout


def test_the_list_for_programs(shell: Shell) -> None:
    found = shell.json("ls")
    assert isinstance(found, list)
    assert sorted(entry["kind"] for entry in found) == sorted(KINDS)
    counts = {entry["kind"]: entry["counts"] for entry in found}
    assert {"trees", "messages", "rejected"} <= set(counts["messages"])
    assert {"trees", "messages", "dropped"} <= set(counts["dialogues"])
    assert {"sequences", "tokens", "trained", "padding"} <= set(counts["tokens"])
    assert {"parameters", "steps"} <= set(counts["model"])
    assert all({"id", "kind", "key", "created", "bytes", "counts", "recipe"} == set(entry) for entry in found)
    assert shell.json("ls", "tokens") == [entry for entry in found if entry["kind"] == "tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_shown_to_people_and_to_programs(shell: Shell, kind: str) -> None:
    assert kind in shell("show", kind, "-n", "2").stdout
    assert shell.json("show", kind, "-n", "2")


def test_tokens_show_what_is_trained(shell: Shell) -> None:
    text = shell("show", "tokens", "-n", "1").stdout
    assert re.search(r"<\|user\|>.*<\|end\|>", text)
    assert re.search(r"<\|assistant\|>«.*<\|end\|>»", text)


def test_the_report_has_the_figures_that_others_rely_on(shell: Shell) -> None:
    report = shell.json("show", "report")
    assert isinstance(report, dict)
    for measure in ("nll", "stop_rate", "facts"):
        assert {"base", "tuned"} <= set(report[measure])
    assert report["nll"]["tuned"] < report["nll"]["base"]
    assert "by_region" in report["facts"]


def test_a_dropped_message_says_why_and_where_it_is_kept_if_it_is(shell: Shell) -> None:
    import polars as pl

    (path,) = (shell.folder / "artifacts" / "dialogues").glob("*/dropped.parquet")
    dropped = pl.read_parquet(path, columns=["message_id", "reason", "evidence"])
    told = dropped.filter(pl.col("reason").is_in(["deleted", "spam", "quality"])).row(0)
    said = shell("why-dropped", told[0]).stdout
    assert said.startswith(f"in dialogues/{path.parent.name}\n")
    assert told[0] in said
    assert f"dropped by {told[1]}: {told[2]}" in said
    copied = dropped.filter(reason="duplicate").row(0)
    copy, twin = json.loads(shell("why-dropped", copied[0], "--json").stdout)
    assert (copy["message_id"], copy["reason"], copy["evidence"]) == copied
    assert twin["message_id"] == copied[2]
    assert twin["split"] in {"train", "val", "test"}
    assert "error[param.message]" in shell("why-dropped", "nobody", code=2).stderr


def test_what_was_set_aside_can_be_shown(shell: Shell) -> None:
    told = shell("show", "dialogues", "--dropped", "-n", "3").stdout
    rows = shell.json("show", "dialogues", "--dropped", "-n", "3")
    assert told.startswith("dialogues/")
    assert isinstance(rows, list)
    assert [row["message_id"] in told and row["reason"] in told for row in rows] == [True] * 3
    assert shell.json("show", "messages", "--rejected") == []
    assert "error[param.artifact]" in shell("show", "messages", "--dropped", code=2).stderr


def test_the_report_tells_where_the_data_went(shell: Shell) -> None:
    told = shell("show", "report").stdout
    assert "## Data" in told
    assert "dropped by" in told
    assert "what was written" in told


def test_verify_finds_a_flipped_bit_and_the_next_run_mends_it(shell: Shell) -> None:
    clean = {"checked": 6, "corrupt": []}
    assert shell.json("verify") == clean
    path = next((shell.folder / "artifacts" / "dialogues").glob("*/dialogues.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = shell.json("verify", code=65)
    assert isinstance(found, dict)
    assert [entry["file"] for entry in found["corrupt"]] == ["dialogues.parquet"]
    done = shell("run", TINY)
    assert "moved to .aside" in done.stderr
    assert shell.json("verify") == clean
    assert done.stdout.split().count("ran") == 1


def test_after_verify_found_a_bit_flipped_below_the_file_system_the_plan_is_a_miss(shell: Shell) -> None:
    path = next((shell.folder / "artifacts" / "tokens").glob("*/ids.bin"))
    noted = shell.folder / "artifacts" / ".verified" / f"tokens-{path.parent.name}.json"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    hashed = json.loads(noted.read_bytes())
    hashed["ids.bin"][1] = identity(path)  # as if nothing had changed
    noted.write_text(json.dumps(hashed))
    assert "ids.bin" not in shell("why", TINY).stdout, "an unchanged identity is trusted"
    found = shell.json("verify", code=65)
    assert isinstance(found, dict)
    assert [entry["file"] for entry in found["corrupt"]] == ["ids.bin"]
    assert "encode would run: ids.bin has sha256" in shell("why", TINY).stdout
    path.write_bytes(content)
    assert "ids.bin" not in shell("why", TINY).stdout


def test_one_bad_artifact_stops_no_command_and_is_named(shell: Shell, tmp_path: Path) -> None:
    root = shell.folder / "artifacts"
    bad, link = root / "messages" / ("a" * 12), root / "groups"
    bad.mkdir()
    (bad / "manifest.json").write_bytes(b"[" * 200_000)
    link.symlink_to(tmp_path)
    try:
        for asked in (("plan", TINY), ("show", "messages", "-n", "1"), ("run", TINY)):
            shell(*asked)
        for said in (shell("ls").stderr, shell("gc", "--dry-run").stderr):
            assert "passed over: messages/aaaaaaaaaaaa: manifest cannot be read" in said
            assert "passed over: groups: is a link" in said
        found = shell.json("verify", code=65)
        assert isinstance(found, dict)
        assert [entry["id"] for entry in found["corrupt"]] == ["messages/aaaaaaaaaaaa", "groups"]
    finally:
        shutil.rmtree(bad)
        link.unlink()


def test_a_dry_collection_tells_the_truth_and_removes_nothing(shell: Shell) -> None:
    shell("run", TINY, "--set", "parse.max_trees=300", "--until", "encode")
    shell("run", TINY)
    dry = shell("gc", "--dry-run", "--grace", "0").stdout
    assert dry.count("would remove tokens/") == 1
    done = shell("gc", "--grace", "0").stdout
    assert done.replace("removed", "would remove") == dry
    assert shell.json("verify") == {"checked": 6, "corrupt": []}


def test_tokens_alone_are_enough_to_go_on_with_on_another_machine(shell: Shell, tmp_path: Path) -> None:
    (made,) = (shell.folder / "artifacts" / "tokens").iterdir()
    other = Shell(tmp_path)
    shutil.copytree(made, other.folder / "artifacts" / "tokens" / made.name)
    done = other("run", TINY, "--tokens", f"tokens/{made.name}", "--until", "train")
    assert re.fullmatch(r"model/[0-9a-f]{12}", done.stdout.splitlines()[-1])
    assert other("run", TINY, "--tokens", f"tokens/{made.name}", "--until", "train").stdout.count(" ran ") == 0


def test_tokens_and_dialogues_are_exported_by_kind_or_id(shell: Shell, tmp_path: Path) -> None:
    done = shell("export", "nanogpt", "tokens", str(tmp_path / "gpt"))
    assert done.stdout.splitlines()[-1] == str(tmp_path / "gpt")
    assert (tmp_path / "gpt" / "train.bin").stat().st_size > 0
    shell("export", "messages", "dialogues", str(tmp_path / "chat"))
    assert (tmp_path / "chat" / "train.jsonl").stat().st_size > 0
    assert "error[param.folder]" in shell("export", "messages", "dialogues", str(tmp_path / "chat"), code=2).stderr


def test_chat_answers(shell: Shell) -> None:
    assert shell("chat", "--prompt", "What's the capital of Assam?").stdout.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("run", "nothing"), 2, r"error\[param.recipe\]: there is no recipe 'nothing'"),
        (("plan", TINY, "--set", "encode.layuot=1"), 2, r"error\[param.recipe\]: .*did you mean layout"),
        (("run", TINY, "--until", "bake"), 2, r"error\[param.step\]"),
        (("run", TINY, "--until", "encode", "--force", "train"), 2, r"error\[param.step\]: --force train"),
        (("run", TINY, "--set", "name=../../x"), 2, r"error\[param.recipe\]: name: "),
        (("plan", TINY, "--set", "train.lr=inf"), 2, r"error\[param.recipe\]: train.lr: .*finite"),
        (("plan", TINY, "--set", "train.epochs=1e18"), 2, r"error\[param.recipe\]: train.epochs: "),
        (("show", "messages", "-n", "-1"), 2, r"error\[param.usage\]: .*whole number"),
        (("gc", "--grace", "nan"), 2, r"error\[param.usage\]: .*hours"),
        (("bake",), 2, r"error\[param.usage\]: .*invalid choice"),
        (("show", "tokens/ffffffffffff"), 2, r"error\[param.artifact\]"),
        (("plan", TINY, "--set", "download.source=file", "--set", "download.path=/etc/passwd"), 2, r"error\[param"),
    ],
)
def test_an_error_is_one_line_with_a_code_and_a_way_out(
    shell: Shell, arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = shell(*arguments, code=code)
    assert re.match(says, done.stderr)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("number", "code", "says"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_to_the_whole_group_ends_a_run_soon_with_one_line(
    shell: Shell, tmp_path: Path, number: int, code: int, says: str
) -> None:
    asked = [sys.executable, "-m", "flows", "run", TINY, "--set", "train.epochs=2000", "--set", "train.seed=7"]
    scratch, told = shell.folder / "artifacts" / ".scratch", tmp_path / "told"
    with (
        told.open("w") as stderr,
        started(asked, cwd=ROOT, env=shell.environment, stderr=stderr, start_new_session=True) as process,
    ):
        until(lambda: any(scratch.glob("resume-model-*/log.jsonl")), process)
        os.killpg(process.pid, number)
        assert ended(process, seconds=30) == code, "Prefect's own patience would be minutes"
    said = told.read_text()
    assert [line for line in said.splitlines() if "error[" in line][-1].startswith(f"error[{says}]")
    assert "Traceback" not in said
    assert list(scratch.glob("resume-model-*.left")), "the next try goes on from there"
    for left in scratch.glob("resume-model-*.left"):
        shutil.rmtree(left)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_with_nine_a_run_leaves_no_process_behind_and_the_next_one_goes_on(shell: Shell, processes: int) -> None:
    more = ("--set", f"train.seed={processes}", "--set", f"runtime.num_processes={processes}")
    asked = [
        sys.executable,
        "-m",
        "flows",
        "run",
        TINY,
        "--until",
        "train",
        *more,
        "--set",
        "runtime.checkpoint_seconds=0",
    ]
    third = ".scratch/resume-*/checkpoints/step-00000003"
    with started(asked, cwd=ROOT, env=shell.environment, start_new_session=True) as process:
        until(lambda: any((shell.folder / "artifacts").glob(third)), process)
        assert len(of_store(shell)) >= processes + 1  # Prefect's server, too
        process.kill()
        process.wait()
        until(lambda: not of_store(shell), seconds=10)
    shell(*asked[3:])
    told = shell.json("show", "model", "-n", "100")
    assert isinstance(told, dict)
    assert [entry["step"] for entry in told["log"]] == list(range(told["training"]["steps"] + 1))


def of_store(shell: Shell) -> list[int]:
    """The processes that work for a store, by their environment."""
    sought, found = f"TREELINE_ARTIFACTS={shell.folder / 'artifacts'}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if sought in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


AGENT = [sys.executable, "-m", "torch.distributed.run", "--no-python"]


def agents(nodes: int, folder: Path) -> list[list[str]]:
    """The launchers of two ranks: one with both, or two that meet, as on two machines, with one each."""
    logs = [[f"--log-dir={folder / str(node)}", "--redirects=3"] for node in range(nodes)]
    if nodes == 1:
        return [[*AGENT, *logs[0], "--standalone", "--nproc-per-node=2"]]
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    met = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", meeting, "--local-addr=127.0.0.1"]
    return [[*AGENT, *log, *met] for log in logs]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_under_torchrun_leaves_one_model_of_the_same_losses_and_only_rank_0_speaks(
    shell: Shell, tmp_path: Path, nodes: int
) -> None:
    model = trained(shell)
    store, wanted = shell.folder / "artifacts", losses(shell, model)
    before = {path: path.stat().st_mtime_ns for path in store.glob("[a-z]*/*/manifest.json")}
    left = unfinished(store)  # by what other tests killed
    asked = [sys.executable, "-m", "flows", "run", TINY, "--until", "train", "--force", "train"]
    environment = {**shell.environment, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with ExitStack() as both:
        crew = [
            both.enter_context(started([*agent, *asked], cwd=ROOT, env=environment))
            for agent in agents(nodes, tmp_path)
        ]
        assert [ended(one) for one in crew] == [0] * nodes
    assert losses(shell, model) == pytest.approx(wanted, rel=1e-5)
    after = {path: path.stat().st_mtime_ns for path in store.glob("[a-z]*/*/manifest.json")}
    assert [path.parent.parent.name for path in after if after[path] != before.get(path)] == ["model"]
    assert len(after) == len(before)
    assert unfinished(store) <= left
    spoken = {path: path.read_text() for path in tmp_path.rglob("std???.log")}
    told = [text.splitlines()[-1] for path, text in spoken.items() if path.name == "stdout.log" and text]
    assert told == [model]
    assert len([text for text in spoken.values() if "train.plan" in text]) == 1


def trained(shell: Shell) -> str:
    """The id of the recipe's model; in this store other tests leave theirs, too."""
    shell("run", TINY)
    return shell("run", TINY, "--until", "train").stdout.splitlines()[-1]


def unfinished(store: Path) -> set[Path]:
    return {*store.glob(".scratch/*"), *store.glob(".leases/*")}


def losses(shell: Shell, model: str) -> list[float]:
    """Every loss of a model's log, with those of the validation split."""
    told = shell.json("show", model, "-n", "1000")
    assert isinstance(told, dict)
    return [entry[name] or 0.0 for entry in told["log"] for name in ("loss", "val_nll")]


def test_a_run_that_stops_early_takes_no_root_from_the_collector(shell: Shell) -> None:
    model = trained(shell)
    shell("run", TINY, "--until", "download")
    assert f"would remove {model}" not in shell("gc", "--dry-run", "--grace", "0").stdout
    forgetting = ("gc", "--grace", "0", "--forget", "ti*")
    assert f"would remove {model}" in (dry := shell(*forgetting, "--dry-run").stdout)
    assert shell(*forgetting).stdout == dry.replace("would remove", "removed").replace("would forget", "forgot")
    assert "error[param.run]" in shell(*forgetting, code=2).stderr


def test_bad_input_in_a_run_ends_with_one_line_and_its_code(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"message_tree_id": 5}\n' * 20)
    shell.environment["TREELINE_SOURCE_ROOTS"] = str(tmp_path)
    source = ("--set", "download.source=file", "--set", f"download.path={tmp_path / 'bad.jsonl'}")
    done = shell("run", TINY, *source, code=65)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error[")]
    assert "bad.jsonl" in line
    assert "Traceback" not in done.stderr
