"""Laws of the figures: small, well-formed, and the same bytes for the same numbers."""

import subprocess
import sys
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from tasks.report.plots import facts_svg, funnel_svg, loss_svg, loss_unit, thinned

TRAIN = [(float(step), 8 / (1 + step / 50)) for step in range(1, 5_001)]
VALIDATION = [(float(step), 8 / (1 + step / 45)) for step in range(0, 5_001, 250)]
SHARES = {"Africa": (0.0, 0.91), "Asia": (0.01, 0.935), "Europe": (0.0, 1.0)}


def words(svg: bytes) -> set[str]:
    return {(node.text or "").strip() for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")}


@pytest.mark.parametrize("svg", [loss_svg(TRAIN, VALIDATION), facts_svg(SHARES), loss_svg([], [])])
def test_a_figure_is_small_and_well_formed(svg: bytes) -> None:
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert len(svg) < 100_000


def test_a_figure_says_what_it_shows() -> None:
    assert {"train", "validation", "optimizer step", "nats per token"} <= words(loss_svg(TRAIN, VALIDATION))
    assert {"base", "tuned", "Africa", "Asia", "Europe", "91", "94", "100"} <= words(facts_svg(SHARES))
    assert "no step was logged" in words(loss_svg([], []))


def test_equal_numbers_make_equal_bytes_whatever_the_users_style() -> None:
    first = loss_svg(TRAIN, VALIDATION), facts_svg(SHARES)
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 20, "svg.hashsalt": None}):
        assert (loss_svg(TRAIN, VALIDATION), facts_svg(SHARES)) == first
    assert loss_svg(TRAIN[:-1], VALIDATION) != first[0]


def test_another_process_makes_the_same_bytes() -> None:
    code = (
        "import sys; from tasks.report.plots import facts_svg; sys.stdout.buffer.write(facts_svg({'A|<b>': (0, .5)}))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert made == facts_svg({"A|<b>": (0, 0.5)})
    assert b"<b>" not in made
    assert b"T00:" not in made  # no date


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    with mpl.rc_context({"font.size": 13}):
        facts_svg(SHARES)
        assert mpl.rcParams["font.size"] == 13


def test_a_thinned_curve_keeps_its_mean_and_its_order() -> None:
    kept = thinned(TRAIN, 100)
    assert len(kept) == 100
    assert sum(y for _, y in kept) / 100 == pytest.approx(sum(y for _, y in TRAIN) / len(TRAIN))
    assert kept == sorted(kept)
    assert thinned(TRAIN[:7], 100) == TRAIN[:7]
    assert thinned([], 100) == []


def test_the_funnel_has_a_bar_for_each_rule_that_dropped_something() -> None:
    counts = {"read": {"messages": 1_234}, "funnel": {"spam": 0, "pa<b>ste": 1_000}, "messages": 234}
    drawn = funnel_svg(counts).decode()
    assert all(text in drawn for text in ("1,234", "1,000", ">234<", "read", "kept", "pa&lt;b&gt;ste"))
    assert "spam" not in drawn
    assert funnel_svg({"read": {"messages": 0}, "funnel": {}, "messages": 0}) == funnel_svg(
        {"read": {"messages": 0}, "funnel": {"spam": 0}, "messages": 0}
    )


def test_the_loss_of_preference_pairs_is_named_in_their_unit() -> None:
    pairs = [{"step": 0, "loss": None, "val_nll": 0.7, "accuracy": 0.5}]
    assert loss_unit(pairs) == "nats per pair"
    assert loss_unit([{"step": 0, "val_nll": 3.0}]) == "nats per token"
    assert b"nats per pair" in loss_svg([], [(0, 0.7)], loss_unit(pairs))
