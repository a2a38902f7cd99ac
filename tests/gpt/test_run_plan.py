import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from tasks.errors import TrainingError
from tasks.gpt import run_plan
from tasks.gpt.distributed import ProcessGroup
from tasks.gpt.parallel import should_shard, training_bytes
from tasks.gpt.run_plan import memory_named, planned
from tasks.gpt.weights import freeze, parameter_count
from tests.gpt.test_loop import CPU, MACHINE, SETTINGS, split, start


def plan(asked: object = None) -> int:
    return choice(asked)[0]


def choice(asked: Any = None, checkpointing: Any = False) -> tuple[int, bool]:
    return planned(start(), [split(), split(6)], SETTINGS, CPU, asked, iter(range(99)).__next__, checkpointing)


def test_what_is_asked_is_taken_but_never_more_than_a_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="treeline.train"):
        assert [plan(3), plan(99), plan(None), plan("auto")] == [3, 8, 8, 8]
    assert "micro_batch 3" in caplog.text


def test_little_memory_makes_auto_take_less_and_others_are_warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_plan, "free_memory", lambda device: 1)
    with caplog.at_level(logging.WARNING, logger="treeline.train"):
        assert plan("auto") == 1
        assert plan(8) == 8
    assert (
        "more than is free; set runtime.micro_batch to auto, or lower encode.sequence_length or encode.context_length"
        in caplog.text
    )


def test_blocks_are_computed_again_where_asked_or_where_memory_would_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice(3, True) == (3, True)
    assert choice(3, "auto") == (3, False)
    monkeypatch.setattr(run_plan, "free_memory", lambda device: 1)
    assert (choice(3, "auto"), choice(3, False), choice("auto", "auto")) == ((3, True), (3, False), (1, True))


class Two(ProcessGroup):
    """A group of two ranks, of which the other one always has this one's values."""

    def __init__(self) -> None:
        super().__init__()
        self.size = self.local_size = 2

    def any(self, flag: bool) -> bool:
        return flag

    def min(self, number: int) -> int:
        return number


def of_two(asked: object, sharded: bool = False) -> int:
    clock = iter(range(99)).__next__
    return planned(start(), [split(), split(6)], SETTINGS, CPU, asked, clock, False, Two(), sharded)[0]  # type: ignore[arg-type]


def test_a_rank_takes_no_more_at_once_than_its_share_of_a_step() -> None:
    assert [of_two(3), of_two(99), of_two(None), of_two("auto")] == [3, 4, 4, 4]


def test_ranks_of_one_machine_share_its_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_plan, "free_memory", lambda device: 10 << 30)
    with caplog.at_level(logging.INFO, logger="treeline.train"):
        of_two(3)
    assert "of 5.4 GB free" in caplog.text


def test_a_model_that_is_to_be_parted_is_not_tried_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def timed(*given: Any) -> float:
        tried.append(given[2])
        return 1.0

    monkeypatch.setattr(run_plan, "_timed", timed)
    of_two(3, sharded=True)
    assert tried == []
    of_two(3)
    assert tried == [3]


def test_training_holds_one_number_of_what_is_frozen_and_four_of_what_is_trained() -> None:
    model = start()
    assert training_bytes(model) == 16 * parameter_count(model)
    freeze(model, 1)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert training_bytes(model) == 4 * parameter_count(model) + 12 * trained < 16 * parameter_count(model)


def test_auto_says_so_where_an_average_keeps_a_large_model_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tasks.gpt.parallel.free_memory", lambda device: 1)
    gpu = torch.device("cuda", 0)
    assert [should_shard(start(), gpu, "auto", ema, Two()) for ema in (False, True)] == [True, False]
    assert "not sharded: ema_decay needs whole weights" in caplog.text


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: you tried")],
)
def test_out_of_memory_names_what_to_lower(error: BaseException) -> None:
    with pytest.raises(TrainingError, match=r"3 sequences of 12 tokens at once.*micro_batch to auto"):
        fail(error)


def test_out_of_memory_offers_to_compute_again_what_is_not_so_yet() -> None:
    for activation_checkpointing in (False, True):
        with (
            pytest.raises(TrainingError) as caught,
            memory_named(replace(MACHINE, activation_checkpointing=activation_checkpointing), 12),
        ):
            raise MemoryError
        assert ("runtime.activation_checkpointing to true" in str(caught.value)) is not activation_checkpointing


def test_another_failure_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"):
        fail(RuntimeError("shapes differ"))


def fail(error: BaseException) -> None:
    with memory_named(MACHINE, 12):
        raise error
