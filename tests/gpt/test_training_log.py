import json
from pathlib import Path

import pytest

from tasks.gpt.training_log import Logbook


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "odd", ['\0\0\0{"step', "[" * 200_000, '{"step": ' + "1" * 5_000 + "}", '{"step": 1e999}', "5"]
)
def test_a_log_is_cut_after_a_step_and_at_the_first_line_that_is_none(tmp_path: Path, odd: str) -> None:
    book = Logbook(tmp_path / "log.jsonl")
    for step in range(5):
        book.write({"step": step})
    with book.path.open("a") as opened:
        opened.write(odd)
    book.cut_after(10)
    assert steps(book.path) == [0, 1, 2, 3, 4]
    book.cut_after(2)
    assert steps(book.path) == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    book = Logbook(tmp_path / "log.jsonl")
    book.cut_after(-1)
    assert steps(book.path) == []
