"""What work runs on: the device asked for, or the best there is; and the CPU threads that pay."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from tasks.errors import ConfigurationError

# Below this width a second thread gains 15 % at best; on busy cores, where OpenMP's threads wait by spinning, it cost a
# factor of 10 to 35 (3 layers x 128 on two vCPUs).
NARROW = 512
TRIM, THRESHOLD, MAPPINGS, MOST = -1, -3, -4, 2**31 - 1  # mallopt's names, and the largest int


def device_of(name: str) -> torch.device:
    """Return a device by name: cpu, cuda, mps, or auto for a GPU where there is one.

    Raises:
        ConfigurationError: If what was asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, available in there.items() if available))
    if not there[name]:
        raise ConfigurationError(f"no {name} device is there", "device", "Set it to auto or cpu", "config.device")
    return torch.device(name)


def count_of(device: torch.device) -> int:
    """Return how many devices of a kind this machine has."""
    return torch.cuda.device_count() if device.type == "cuda" else 1


@contextmanager
def at_work(device: torch.device, threads: int | None, width: int, *, repeats: bool = False) -> Iterator[None]:
    """Let torch compute as every step does it inside the block, whether it trains, evaluates or scores replies.

    A GPU rounds the factors of float32 products to 10 bits (TF32), which is several times as fast: everywhere, since
    what is compared must be computed alike.

    Args:
        device: Where.
        threads: Of the CPU. None: one for a narrow model, else as torch finds best.
        width: D, numbers in a hidden state.
        repeats: Whether a GPU takes only algorithms that give the same bits each time; a CPU always does.
    """
    hold_memory()
    before, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads or (1 if width < NARROW else before))
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else products)
    try:
        with repeating() if repeats else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(products)


@contextmanager
def repeating() -> Iterator[None]:
    """Let torch take only algorithms that repeat to the bit; one that has none raises an error.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU's first product is computed
    cudnn, before = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    kernels = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        cudnn.deterministic, cudnn.benchmark = kernels


def keep_compiled(folder: Path) -> None:
    """Let what is compiled stay in a folder for the next run, unless $TORCHINDUCTOR_CACHE_DIR names one.

    By default that is one in /tmp, which a restart of the machine empties. Nobody else may write into this one: what
    lies there is run.
    """
    with suppress(OSError):  # a home that cannot be written keeps nothing
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def hold_memory() -> None:
    """Let the C library keep memory that is freed: the next step wants the same again.

    By default, glibc gives each large tensor pages of its own and gives them back; fetching and blanking them anew,
    385,000 times a step, took an eighth of the training time (6 layers x 384 on one core of a virtual machine). Only
    for Linux with glibc; elsewhere nothing happens.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(MAPPINGS, 0)
        library.mallopt(TRIM, MOST)


def spare_memory() -> None:
    """Let the C library give each large tensor pages of its own, and give them back: where memory is short.

    Blocks that are computed again leave gradients in the midst of what they free, adapters small tensors. Kept memory
    fell to pieces so that 1.4 GB were taken where 0.7 are enough (12 layers x 256); the pages cost up to a fifth more
    CPU time.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(MAPPINGS, 1 << 16)  # the library's own default
        library.mallopt(THRESHOLD, 1 << 18)
        library.malloc_trim(0)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that a device has left; None where that cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    lines = meminfo.read_text(encoding="ascii").splitlines()
    kilobytes = next(line for line in lines if line.startswith("MemAvailable"))
    return min(int(kilobytes.split()[1]) * 1024, *_left_in_groups(), 1 << 62)


# What a container may use, and what it uses: the files of both versions of Linux's control groups.
GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes that this process's container has left, where it has a limit."""
    for limit, used in GROUPS:
        try:
            yield max(0, int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
        except (OSError, ValueError):  # not there, or "max"
            continue


def product_rate(device: torch.device, half: bool, clock: Callable[[], float], size: int = 1024) -> float:
    """Return the operations a second of a plain product of matrices, the best of some."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        left, right, took = torch.randn(size, size, device=device), torch.randn(size, size, device=device), []
        for _ in range(6):
            began = clock()
            (left @ right)[0, 0].item()  # waits for the device
            took.append(clock() - began)
    return 2 * size**3 / max(1e-9, min(took))
