import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.gpt.schedule import learning_rate


def rates(total: int, warmup_ratio: float = 0.1, min_share: float = 0.1) -> list[float]:
    return [
        learning_rate(step, total, peak=2.0, warmup_ratio=warmup_ratio, min_share=min_share) for step in range(total)
    ]


def test_the_rate_rises_straight_to_its_peak_and_falls_as_a_cosine_to_its_share() -> None:
    found = rates(101, warmup_ratio=0.0396)  # four steps of warm-up
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert found[-1] == pytest.approx(0.2)
    assert found[52] == pytest.approx(1.1)  # half way between peak and end
    assert found[28] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(10, warmup_ratio=0.0)[0] == 2.0


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_every_rate_lies_above_zero_or_the_share_and_never_above_the_peak(
    total: int, warmup_ratio: float, min_share: float
) -> None:
    found = rates(total, warmup_ratio, min_share)
    assert all(0 <= rate <= 2.0 + 1e-12 for rate in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(found[top:], found[top + 1 :], strict=False))
