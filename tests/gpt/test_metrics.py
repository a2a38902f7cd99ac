"""Laws of the metrics."""

import math

import pytest

from tasks.gpt.metrics import bits_per_byte, fraction, nll, perplexity


def test_a_model_that_knows_nothing_is_as_unsure_as_its_vocabulary_is_large() -> None:
    nats = 10 * math.log(512)  # ten tokens, each one of 512
    assert nll(nats, 10) == pytest.approx(math.log(512))
    assert perplexity(nll(nats, 10)) == pytest.approx(512)
    assert bits_per_byte(nats, 30) == pytest.approx(9 * 10 / 30)  # 9 bits a token, 3 bytes a token


def test_bits_per_byte_do_not_depend_on_how_a_text_is_cut_into_tokens() -> None:
    text = b"Paris, the capital"
    by_byte = [math.log(256)] * len(text)
    by_two = [2 * math.log(256)] * (len(text) // 2)
    assert bits_per_byte(sum(by_byte), len(text)) == pytest.approx(bits_per_byte(sum(by_two), len(text)))
    assert nll(sum(by_byte), len(by_byte)) != pytest.approx(nll(sum(by_two), len(by_two)))


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    assert perplexity(1e6) == math.inf


def test_an_average_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 supervised tokens"):
        nll(0.0, 0)
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, 0)
    with pytest.raises(ValueError, match="0 cases"):
        fraction(0, 0)


def test_a_share_is_a_part_of_its_whole() -> None:
    assert fraction(3, 4) == 0.75
    for part, whole in [(-1, 4), (5, 4)]:
        with pytest.raises(ValueError, match="no share"):
            fraction(part, whole)
