import os
from pathlib import Path

import pytest
import torch

from tasks.gpt.device import at_work, keep_compiled


@pytest.mark.parametrize(("device", "said"), [("cuda", "high"), ("cpu", "highest")])
def test_a_gpu_rounds_products_inside_the_block_only(device: str, said: str) -> None:
    with at_work(torch.device(device), None, 32):
        assert torch.get_float32_matmul_precision() == said
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("threads", "width", "said"), [(3, 32, 3), (None, 511, 1), (None, 512, 2)], ids=["asked", "narrow", "wide"]
)
def test_a_narrow_model_gets_one_thread_unless_more_are_asked_for(threads: int | None, width: int, said: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with at_work(torch.device("cpu"), threads, width):
        assert torch.get_num_threads() == said
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_what_repeats_to_the_bit_is_asked_for_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with at_work(torch.device("cpu"), 1, 32, repeats=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_what_is_compiled_is_kept_in_the_folder_unless_the_environment_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_compiled(tmp_path / "kept")
    assert cache_dir() == str(tmp_path / "kept")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    keep_compiled(tmp_path / "kept")
    assert cache_dir() == str(tmp_path / "mine")
