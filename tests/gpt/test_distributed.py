"""Laws of many ranks, on the CPU over gloo: the outcome is that of one rank, whatever the layout; errors name ranks."""

import json
import math
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tasks.errors import ConfigurationError
from tasks.gpt.distributed import ProcessGroup
from tasks.gpt.parallel import parallel_settings
from tests.waiting import run

ROOT = Path(__file__).parents[2]
# size:work:folder; one that names a folder again goes on from the checkpoint that the other one left there
ORDERS = [
    "1:plain:one",
    "2:plain:two",
    "3:plain:three",
    "2:sharded:parts",
    "2:recomputed:again",
    "1:even:one-even",
    "2:even:two-even",
    "2:even_sharded:parts-even",
    "1:lonely:one-lonely",
    "2:lonely:two-lonely",
    "2:lonely_sharded:parts-lonely",
    "1:preferred:one-preferred",
    "2:preferred:two-preferred",
    "2:preferred_sharded:parts-preferred",
    "2:stopped:shrunk",
    "1:plain:shrunk",
    "1:stopped:grown",
    "2:plain:grown",
    "2:stopped:parted",
    "2:sharded:parted",
    "2:stopped_sharded:gathered",
    "1:plain:gathered",
    "1:averaged:one-averaged",
    "2:averaged:two-averaged",
    "2:averaged_stopped:averaged",
    "2:averaged:averaged",
    "1:frozen:one-frozen",
    "2:frozen:two-frozen",
    "2:frozen_sharded:parts-frozen",
    "1:adapted:one-adapted",
    "2:adapted:two-adapted",
    "2:adapted_sharded:parts-adapted",
    "1:adapted_averaged:one-adapted-averaged",
    "2:adapted_averaged:two-adapted-averaged",
    "1:poisoned:one-poisoned",
    "2:poisoned:two-poisoned",
    "2:poisoned_sharded:parts-poisoned",
]
Reports = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def told(home: Path) -> Reports:
    """What each rank of each world tells; torch is loaded once."""
    asked = [sys.executable, "-m", "tests.gpt.process_groups", str(home), *ORDERS]
    done = run(asked, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stderr
    found: Reports = json.loads(done.stdout)
    return found


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(ranks: list[dict[str, Any]]) -> Any:
    return np.concatenate([np.array(weight) for weight in ranks[0]["weights"].values()])


def test_what_training_sets_for_the_whole_process_is_as_it_was_afterwards(told: Reports) -> None:
    assert all(before == after for ranks in told.values() for before, after in (rank["torch"] for rank in ranks))


def test_only_many_ranks_change_what_torch_holds_for_the_process() -> None:
    for alone in (True, False):
        with parallel_settings(cast(ProcessGroup, SimpleNamespace(is_single=alone))):
            assert torch._dynamo.config.optimize_ddp is alone
            assert any("FSDP2" in str(one[1]) for one in warnings.filters) is not alone
    assert torch._dynamo.config.optimize_ddp


SAME = [
    ("2:plain:two", "1:plain:one"), ("3:plain:three", "1:plain:one"), ("2:sharded:parts", "1:plain:one"),
    ("2:recomputed:again", "1:plain:one"),
    ("2:lonely:two-lonely", "1:lonely:one-lonely"), ("2:lonely_sharded:parts-lonely", "1:lonely:one-lonely"),
    ("2:preferred:two-preferred", "1:preferred:one-preferred"),
    ("2:preferred_sharded:parts-preferred", "1:preferred:one-preferred"),
    ("2:adapted_averaged:two-adapted-averaged", "1:adapted_averaged:one-adapted-averaged"),
    ("1:plain:shrunk", "1:plain:one"), ("2:plain:grown", "1:plain:one"),
    ("2:averaged:two-averaged", "1:averaged:one-averaged"), ("2:averaged:averaged", "1:averaged:one-averaged"),
    ("2:frozen:two-frozen", "1:frozen:one-frozen"), ("2:frozen_sharded:parts-frozen", "1:frozen:one-frozen"),
    ("2:adapted:two-adapted", "1:adapted:one-adapted"), ("2:adapted_sharded:parts-adapted", "1:adapted:one-adapted"),
    ("2:sharded:parted", "1:plain:one"), ("1:plain:gathered", "1:plain:one"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("many", "one"), SAME)
def test_whatever_the_world_the_losses_are_the_same_to_five_digits(
    told: Reports, home: Path, many: str, one: str
) -> None:
    """Also where the last step is short, or leaves a rank nothing; and from a checkpoint of another world."""
    ours, theirs = (log_of(home / order.split(":")[2]) for order in (many, one))
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs] == list(range(7))
    for name in ("loss", "grad_norm", "val_nll", "lr", "tokens"):
        mine, expected = ([entry[name] or 0.0 for entry in log] for log in (ours, theirs))
        assert mine == pytest.approx(expected, rel=1e-5), name
    assert weights(told[many]) == pytest.approx(weights(told[one]), abs=1e-4)
    (first, *_), (lone,) = told[many], told[one]
    assert first["progress"] == pytest.approx(lone["progress"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("many", ["2:even:two-even", "2:even_sharded:parts-even"])
def test_turns_of_two_ranks_are_those_of_one_to_the_bit(told: Reports, home: Path, many: str) -> None:
    """So what else differs between worlds is how a step is cut into micro-batches."""
    ours, theirs = (log_of(home / order.split(":")[2]) for order in (many, "1:even:one-even"))
    assert [entry["loss"] for entry in ours] == [entry["loss"] for entry in theirs]
    assert [entry["grad_norm"] or 0 for entry in ours] == pytest.approx(
        [entry["grad_norm"] or 0 for entry in theirs], rel=1e-14
    )
    assert np.array_equal(weights(told[many]), weights(told["1:even:one-even"]))


@pytest.mark.slow
def test_all_ranks_save_the_same_step_and_stop_when_one_is_asked_to(told: Reports, home: Path) -> None:
    assert [rank.get("interrupted") for rank in told["2:stopped:shrunk"]] == [True, True]
    assert [path.name for path in sorted((home / "shrunk" / "checkpoints").glob("step-*"))][-1] == "step-00000004"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["2:poisoned:two-poisoned", "2:poisoned_sharded:parts-poisoned"])
def test_a_loss_that_is_no_number_on_one_rank_ends_all_with_the_same_error_that_names_rank_and_sequence(
    told: Reports, layout: str
) -> None:
    first, second = (rank["error"] for rank in told[layout])
    assert first == second
    assert re.search(r"loss is nan, .* on rank 1\. sequences 7 of the training split\.", first)
    (alone,) = told["1:poisoned:one-poisoned"]
    assert re.search(r"loss is nan, .* at step 1\. sequences 7 of the training split\.", alone["error"])


@pytest.mark.slow
def test_speed_is_counted_over_all_ranks(told: Reports, home: Path) -> None:
    """The clock of these runs stands still, which counts as a nanosecond: what is left are the tokens of the step."""
    speeds = {order: log_of(home / order)[1]["tokens_per_second"] for order in ("one", "two", "parts")}
    assert len(set(speeds.values())) == 1


def alike(size: int, rank: int, rows: int, at_once: int) -> list[tuple[list[int], bool]]:
    world = ProcessGroup.__new__(ProcessGroup)
    world.rank, world.size, world.heartbeats = rank, size, 0
    return [(some.tolist(), counts) for some, counts in world.shard(np.arange(rows), at_once)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9])
def test_each_row_counts_once_in_order_and_all_ranks_take_equally_many_turns(size: int, rows: int) -> None:
    dealt = [alike(size, rank, rows, at_once=2) for rank in range(size)]
    assert [row for turns in dealt for some, counts in turns if counts for row in some] == list(range(rows))
    assert {len(turns) for turns in dealt} == {math.ceil(math.ceil(rows / size) / 2)}
    assert all(some for turns in dealt for some, _ in turns)


@pytest.mark.parametrize(("there", "number"), [(1, 0), (4, 2)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, there: int, number: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert third().device(torch.device("cuda")) == torch.device("cuda", number)
    assert third().device(torch.device("cpu")) == torch.device("cpu")


def test_a_rank_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=r"expected a GPU for each process of this machine, found 2\. rank 2"):
        third().device(torch.device("cuda"))


def third() -> ProcessGroup:
    world = ProcessGroup(rank=2, local_rank=2)
    world.size = 4
    return world
