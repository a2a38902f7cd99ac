from pathlib import Path

import pytest
import torch

from tasks.gpt.device import fast_products, keep_compiled


@pytest.mark.parametrize(("device", "said"), [("cuda", "high"), ("cpu", "highest")])
def test_a_gpu_rounds_products_inside_the_block_only(device: str, said: str) -> None:
    with fast_products(torch.device(device)):
        assert torch.get_float32_matmul_precision() == said
    assert torch.get_float32_matmul_precision() == "highest"


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
