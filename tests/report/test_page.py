"""Laws of the report's page: it says the figures, and whatever a model said stays text."""

import copy
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tasks.report.markdown import fenced, printable
from tasks.report.page import render_page


def reply(text: str, end: str = "stopped") -> dict[str, Any]:
    return {"text": text, "end": end, "tokens": len(text)}


REPORT: dict[str, Any] = {
    "models": ["base", "tuned"],
    "split": "test",
    "split_asked": "test",
    "sequences": 12,
    "tokens": 3_456,
    "utf8_bytes": 9_000,
    "nll": {"base": 8.25, "tuned": 0.5},
    "perplexity": {"base": 3_827.63, "tuned": 1.65},
    "bits_per_byte": {"base": 4.57, "tuned": 0.277},
    "stop_rate": {"base": 0.0, "tuned": 0.995},
    "loop_rate": {"base": 0.75, "tuned": 0.0},
    "cut_rate": {"base": 0.25, "tuned": 0.005},
    "pairs": 0,
    "accuracy": None,
    "margin": None,
    "chosen": None,
    "replies": {"facts": 10, "panel": 2},
    "facts": {
        "base": 0.0,
        "tuned": 0.9,
        "n": 10,
        "by_region": {"Africa": {"base": 0.0, "tuned": 1.0, "n": 4}, "Asia": {"base": 0.0, "tuned": 0.8333, "n": 6}},
        "by_family": {"capital": {"base": 0.0, "tuned": 0.9, "n": 10}},
        "wrong": [{"question": "Capital of Laos?", "expected": "Vientiane", "family": "capital", "region": "Asia"}
                  | reply("Hanoi.")],
    },
    "panel": [{"prompt": "Hi?", "seeds": [1], "base": [reply("the the the", "cut")], "tuned": [reply("Hello.\nYou?")]}],
    "sampling": {"max_new_tokens": None, "temperature": 0.7, "top_k": 50, "top_p": None, "seed": 1},
    "start": {"start": "scratch", "repo": None, "layers": 3, "width": 128, "positions": 1_024, "seed": 7},
    "training": {"parameters": 999_424, "steps": 420, "supervised": 77_000, "best_step": 400, "val_nll_start": 8.3,
                 "val_nll_best": 0.51},
    "lineage": {"model": "a" * 64, "tokens": "b" * 64},
}  # fmt: skip


def with_texts(text: str) -> dict[str, Any]:
    """Put a text wherever a stranger's may come."""
    report = copy.deepcopy(REPORT)
    report["panel"] = [{"prompt": text, "seeds": [1], "base": [reply(text)], "tuned": [reply(text, "looping")]}]
    report["facts"]["wrong"][0] |= {"text": text}
    return report


def kinds(page: str) -> list[str]:
    """Return the kinds of all blocks and pieces of a page, as a CommonMark parser with tables and links sees them."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(page)
    return [token.type for block in tokens for token in (block, *(block.children or []))]


def test_the_page_tells_base_and_tuned_side_by_side() -> None:
    page = render_page(REPORT)
    lines = {re.sub(" +", " ", line) for line in page.splitlines()}
    assert "| NLL, nats per token | 8.250 | 0.500 |" in lines
    assert "| Replies that stop | 0.0% | 99.5% |" in lines
    assert "| Replies that loop | 75.0% | 0.0% |" in lines
    assert "cut after as many tokens as the model's 1,024 positions hold" in page
    assert "| Facts right | 0.0% | 90.0% |" in lines
    assert "| Asia | 6 | 0.0% | 83.3% |" in lines
    assert "![loss](loss.svg)" in lines
    assert "![facts](facts.svg)" in lines
    assert "3 layers × 128 wide, 999,424 parameters" in page
    assert "by family" not in page  # one family is all of them
    assert "a" * 64 in page


def preferred(best_step: int, tuned_step: int = 400) -> str:
    """Return the page of a model that was tuned to prefer, too, with its white space folded."""
    report = copy.deepcopy(REPORT)
    for name in ("nll", "perplexity", "bits_per_byte", "stop_rate", "loop_rate", "cut_rate", "facts"):
        report[name]["preferred"] = report[name]["tuned"]
    for region in (*report["facts"]["by_region"].values(), *report["facts"]["by_family"].values()):
        region["preferred"] = region["tuned"]
    report["panel"][0]["preferred"] = [reply("Hello!")]
    report["training"]["best_step"] = tuned_step
    report |= {
        "models": ["base", "tuned", "preferred"],
        "preference": {"steps": 30, "best_step": best_step, "pairs": 1_200, "loss_start": 0.693, "loss_best": 0.5},
        "pairs": 240,
        "accuracy": {"base": 0.5, "tuned": 0.55, "preferred": 0.61},
        "margin": {"base": 0.0, "tuned": 0.2, "preferred": 0.75},
        "chosen": {"base": -700.0, "tuned": -91.0, "preferred": -92.5},
    }
    return re.sub(" +", " ", render_page(report))


def test_what_prefer_made_stands_beside_what_it_began_with() -> None:
    page = preferred(best_step=20)
    assert page.startswith("# Preferred against tuned and base")
    assert "| | base | tuned | preferred |" in page
    assert "| Better reply found likelier | 50.0% | 55.0% | 61.0% |" in page
    assert "| By how much, nats | 0.000 | 0.200 | 0.750 |" in page
    assert "| Log-probability of the better reply, nats | -700.00 | -91.00 | -92.50 |" in page
    assert "The preferred model is what 30 optimizer steps over 1,200 pairs of ranked replies made of the" in page
    assert "| Asia | 6 | 0.0% | 83.3% | 83.3% |" in page
    assert "By the preferred model" in page
    assert "fell from 0.693 to 0.500 nats, the best at step 20" in page
    assert "changed nothing" not in page


def test_a_step_that_kept_its_start_is_said_to_have_changed_nothing() -> None:
    page = preferred(best_step=0)
    assert "30 optimizer steps over 1,200 pairs of ranked replies changed nothing" in page
    assert "so the preferred model is the tuned one" in page
    assert "fell from 0.693" not in page
    assert "The tuned model is what 420 optimizer steps over 77,000 supervised tokens made of the base one." in page
    page = preferred(best_step=20, tuned_step=0)
    assert "77,000 supervised tokens changed nothing" in page
    assert "so the tuned model is the base one" in page
    assert "Validation NLL fell" not in page


def test_a_long_reply_is_cut_on_the_page_alone() -> None:
    report = copy.deepcopy(REPORT)
    report["panel"][0]["tuned"] = [reply("word " * 500)]
    report["panel"][0]["base"] = [reply("stuck " * 500, "looping")]
    page = render_page(report)
    assert page.count("word") < 500 > page.count("stuck")
    assert re.search(r"word\s+…", page)
    assert re.search(r"stuck\s+↻", page)


def test_a_reply_that_never_stopped_is_marked_and_lines_stay_in_their_column() -> None:
    page = render_page(REPORT)
    assert "user   Hi?\nbase   the the the …\ntuned  Hello.\n       You?\n" in page
    assert "asked   Capital of Laos?\nwanted  Vientiane\nsaid    Hanoi.\n" in page


def test_what_was_not_measured_is_not_told() -> None:
    nothing = {"base": None, "tuned": None}
    page = render_page(REPORT | {"facts": None, "panel": [], "replies": {"facts": 0, "panel": 0}, "stop_rate": nothing})
    assert not re.search("facts|Panel|By the tuned model", page)
    assert re.search(r"Replies that stop *\| *– *\| *– *\|", page)


def test_a_split_that_was_empty_is_said() -> None:
    assert "the test split holds none" in render_page(REPORT | {"split": "val"})
    nothing = {"base": None, "tuned": None}
    bare = {"split": None, "sequences": 0, "tokens": 0, "nll": nothing, "perplexity": nothing, "bits_per_byte": nothing}
    assert "there is no loss to report" in render_page(REPORT | bare)


@pytest.mark.parametrize(
    "text",
    [
        "```\n# Owned\n```",
        "````text\n</code></pre><script>alert(1)</script>",
        "~~~\n[click](javascript:alert(1)) ![x](http://x.example/p.png)",
        "| a | b |\n|---|---|\n| c | d |",
        "</div>\n\n<img src=x onerror=alert(1)>",
        "\n\n---\n\n* item\n> quote\n\n    code",
        "`" * 40,
        "",
    ],
)
def test_what_a_model_says_adds_nothing_to_the_page_but_text(text: str) -> None:
    assert kinds(render_page(with_texts(text))) == kinds(render_page(with_texts("plain")))


@given(st.text(alphabet=st.sampled_from("`~\n\r\t #|<>[]()!*_-\\&;:ab\x0b\x0c\x1c\x85\u2028")))
def test_no_text_gets_out_of_its_fence(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"before\n\n{fenced(printable(text))}\n\nafter\n")
    opening, fence, closing = tokens[:3], tokens[3], tokens[4:]
    assert (fence.type, fence.content) == ("fence", printable(text) + "\n")
    assert [token.type for token in (*opening, *closing)] == ["paragraph_open", "inline", "paragraph_close"] * 2


def test_what_does_not_print_is_spelled_out() -> None:
    assert (
        printable("\x1b[31mred\x07\u202e\r\n\u2028ünï 漢字 🙂")
        == r"\x1b[31mred\x07\u202e\r" + "\n" + r"\u2028ünï 漢字 🙂"
    )
    assert "\x1b" not in render_page(with_texts("\x1b]0;title\x07"))


def test_names_outside_of_fences_stand_as_code() -> None:
    hostile = copy.deepcopy(REPORT)
    hostile["start"] |= {"start": "gpt2", "repo": "a`<b>|[x](y)"}
    hostile["facts"]["by_region"] = {"A|b`<i>": {"base": 0.0, "tuned": 1.0, "n": 4}}
    page = render_page(hostile)
    assert r"is `` a`<b>\x7c[x](y) ``. The tuned" in page
    assert re.search(r"\| `` A\\x7cb`<i> `` +\|", page)
