"""Packing 130,000 sequences at 1,024, beside TRL's best-fit, in one run. `pytest -m bench -n 0 -s tests/bench`."""

import resource

import numpy as np
import pyarrow as pa
import pytest

from tasks.text.pack import best_fit

BLOCK = 1_024


def cpu() -> float:
    """Return the CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def lengths() -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Draw lengths spread like those of OASST's messages: median 100 tokens, mean 190."""
    return np.clip(np.random.default_rng(0).lognormal(4.6, 1.1, 130_000).astype(np.int64) + 4, 1, BLOCK)


@pytest.mark.bench
def test_packing_beside_trl() -> None:
    sizes = lengths()
    start = cpu()
    packed = best_fit(sizes.tolist(), BLOCK)
    ours = cpu() - start
    padding = 1 - sizes.sum() / (len(packed) * BLOCK)
    print(f"\nbest_fit: {ours:.2f} CPU s, {len(packed):,} sequences, padding {padding:.3%}")
    assert padding <= 0.001
    utils = pytest.importorskip("trl.data_utils", reason="needs the package trl")
    offsets = np.append(0, np.cumsum(sizes)).astype(np.int32)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int32)))})
    start = cpu()
    theirs = utils._pack_bfd(table, BLOCK, "truncate")
    peer = cpu() - start
    print(f"TRL _pack_bfd: {peer:.2f} CPU s, {len(theirs):,} sequences; ours is {peer / ours:.1f} times as fast")
