"""Metrics of a language model: what a token costs, what a byte costs, and shares.

Every average over nothing is an error: it is not zero, and a report must not show it as if it were.
"""

from __future__ import annotations

import math


def nll(nats: float, tokens: int) -> float:
    """Return the mean negative log-likelihood, in nats per token.

    Args:
        nats: Cross entropy summed over the supervised tokens.
        tokens: How many they are.

    Raises:
        ValueError: If there are no tokens.
    """
    return _mean(nats, tokens, "supervised tokens")


def perplexity(nats_per_token: float) -> float:
    """Return how many equally likely tokens the model is as unsure as; infinite where a float ends."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, utf8_bytes: int) -> float:
    """Turn a summed loss into bits per UTF-8 byte, which any two tokenizers can be compared by.

    Args:
        nats: Cross entropy summed over the supervised tokens, end-of-turn tokens included: a reply's end is told, too.
        utf8_bytes: Bytes of the text that those tokens stand for; an end-of-turn token stands for none.

    Returns:
        Bits per byte, >= 0; lower is better.

    Raises:
        ValueError: If the tokens stand for no bytes.

    Source: Gao et al. 2020, "The Pile", arXiv:2101.00027.
    """
    return _mean(nats, utf8_bytes, "bytes") / math.log(2)


def fraction(part: int, whole: int) -> float:
    """Return `part / whole`, in 0..1.

    Raises:
        ValueError: If the whole is nothing, or less than the part.
    """
    if not 0 <= part <= max(whole, 0):
        raise ValueError(f"{part} of {whole} is no share")
    return _mean(part, whole, "cases")


def _mean(total: float, count: int, of: str) -> float:
    if count < 1:
        raise ValueError(f"an average over {count} {of} is not a number")
    return total / count
