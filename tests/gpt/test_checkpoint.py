import errno
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tasks.gpt.checkpoint import Checkpoint, disk_named, latest, save


def made(step: int) -> Checkpoint:
    weights = {"wte": torch.full((3, 2), float(step)), "bias": torch.arange(4.0)}
    return Checkpoint(step, {"nll": 0.1 + step}, {"model": weights, "best": {}})


def newest(folder: Path) -> int | None:
    found = latest(folder)
    return found.step if found else None


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, made(7))
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (7, {"nll": 7.1})
    assert torch.equal(found.tensors["model"]["wte"], torch.full((3, 2), 7.0))
    assert found.tensors["best"] == {}


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "checkpoints") is None


def test_the_last_two_are_kept_and_the_newest_is_pointed_to(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, made(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000002", "step-00000010"]
    assert (tmp_path / "LATEST").read_text().strip() == "step-00000010"
    assert newest(tmp_path) == 10


def test_however_few_are_kept_there_is_always_a_whole_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, made(step), keep=0)
        assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{step:08}"]
        assert newest(tmp_path) == step


@pytest.mark.parametrize("when", ["save_file", "_seal", "_sync"])
def test_a_save_that_fails_leaves_nothing_of_its_own_and_the_one_before_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*given: Any) -> None:
        if when == "save_file":
            given[1].write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, made(1))
    monkeypatch.setattr(f"tasks.gpt.checkpoint.{when}", full)
    pytest.raises(OSError, save, tmp_path, made(2))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000001"]
    assert newest(tmp_path) == 1


def test_a_broken_one_of_a_later_step_takes_no_good_ones_place(tmp_path: Path) -> None:
    save(tmp_path, made(1))
    spoil_by_cutting(save(tmp_path, made(9)))
    for step in (2, 3):
        save(tmp_path, made(step))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]


def spoil_by_flipping_a_bit(place: Path) -> None:
    content = bytearray((place / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (place / "model.safetensors").write_bytes(content)


def spoil_by_cutting(place: Path) -> None:
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def spoil_by_removing(place: Path) -> None:
    (place / "model.safetensors").unlink()


def spoil_the_state(place: Path) -> None:
    file = place / "checkpoint.json"
    body = json.loads(file.read_bytes())
    body["state"]["nll"] = 0.0
    file.write_text(json.dumps(body))


def spoil_by_nesting(place: Path) -> None:
    (place / "checkpoint.json").write_text("[" * 200_000)


def spoil_by_emptying(place: Path) -> None:
    (place / "checkpoint.json").write_bytes(b"")


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_by_flipping_a_bit,
        spoil_by_cutting,
        spoil_by_removing,
        spoil_the_state,
        spoil_by_emptying,
        spoil_by_nesting,
    ],
)
def test_a_broken_one_is_said_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    save(tmp_path, made(1))
    spoil(save(tmp_path, made(2)))
    with caplog.at_level(logging.WARNING, logger="treeline.train"):
        assert newest(tmp_path) == 1
    assert "step-00000002 is broken and passed over" in caplog.text


def test_a_broken_one_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save(tmp_path, made(1))
    spoil_by_cutting(save(tmp_path, made(2)))
    save(tmp_path, made(2))
    assert newest(tmp_path) == 2


def test_a_draft_that_a_kill_left_is_no_checkpoint_and_in_nobodys_way(tmp_path: Path) -> None:
    place = save(tmp_path, made(1))
    draft = tmp_path / ".step-00000002"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:10])
    assert newest(tmp_path) == 1
    save(tmp_path, made(2))
    assert newest(tmp_path) == 2
    assert not draft.exists()


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    place = save(tmp_path / "checkpoints", made(1))
    for name in ("model.safetensors", "checkpoint.json"):
        (place / name).write_bytes(pickle.dumps(Bomb()))
    assert newest(tmp_path / "checkpoints") is None
    assert not canary.exists()


def test_what_stands_in_the_way_of_a_checkpoint_goes(tmp_path: Path) -> None:
    for name in ("step-00000003", ".step-00000099"):
        (tmp_path / name).write_text("no folder")
    (tmp_path / ".step-00000007").mkdir()
    save(tmp_path, made(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000003"]


@pytest.mark.parametrize("odd", ["null", "[" * 200_000, '{"seal": ' + "1" * 5_000 + "}"], ids=lambda odd: odd[:9])
def test_a_state_that_is_no_object_is_passed_over(tmp_path: Path, odd: str) -> None:
    save(tmp_path, made(1))
    (save(tmp_path, made(2)) / "checkpoint.json").write_text(odd)
    assert newest(tmp_path) == 1


def test_a_disk_that_refuses_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught, disk_named(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC


def test_who_supervises_sees_each_file_written_read_and_hashed(tmp_path: Path) -> None:
    begun: list[None] = []
    save(tmp_path / "c", made(1), begin=lambda: begun.append(None))
    assert len(begun) == 2 * 2 + 4  # two tables, their hashes; flushed: both, what names them, the folder
    latest(tmp_path / "c", begin=lambda: begun.append(None))
    assert len(begun) == 8 + 2 * 2
