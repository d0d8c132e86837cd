"""Metrics of pairs from numbers chosen by hand: ties, intervals, and numbers that are none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from sealion_jax.evaluation.pairs import PairScores, pair_metrics, wilson_interval


def scores_of(*pairs: tuple[float, int, float, int]) -> PairScores:
    """Of (chosen, its tokens, rejected, its tokens)."""
    chosen, chosen_tokens, rejected, rejected_tokens = (
        np.array(column) for column in zip(*pairs, strict=True)
    )
    return PairScores(
        chosen=chosen.astype(np.float64),
        rejected=rejected.astype(np.float64),
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )


# Likelier as a whole, but not per token; equal as a whole; equal per token; less likely either way.
SCORES = scores_of((-4.0, 2, -5.0, 5), (-6.0, 3, -6.0, 2), (-8.0, 4, -2.0, 1), (-9.0, 3, -1.0, 1))


def test_a_tie_counts_as_half() -> None:
    metrics = pair_metrics(SCORES)
    assert metrics == {
        "pairs": 4,
        "accuracy": (1 + 0.5 + 0 + 0) / 4,
        "accuracy_per_token": (0 + 1 + 0.5 + 0) / 4,
        "loss": (4 + 6 + 8 + 9) / (2 + 3 + 4 + 3),
        "tokens": 12,
    }


def test_rewards_are_what_is_gained_over_the_reference() -> None:
    reference = scores_of((-5.0, 2, -5.0, 5), (-6.0, 3, -6.0, 2), (-9.0, 4, -9.0, 1), (-9.0, 3, -1.5, 1))
    metrics = pair_metrics(SCORES, reference)
    # Gains of the chosen answers 1 0 1 0, of the rejected ones 0 0 7 0.5.
    assert metrics["reward_margin"] == (1 + 0 - 6 - 0.5) / 4
    assert metrics["reward_accuracy"] == (1 + 0.5 + 0 + 0) / 4
    low, high = wilson_interval(0.375, 4)
    assert (metrics["reward_accuracy_low"], metrics["reward_accuracy_high"]) == (low, high)
    assert 0 < low < 0.375 < high < 1
    assert pair_metrics(SCORES) == {name: metrics[name] for name in pair_metrics(SCORES)}


@pytest.mark.parametrize("number", [1, 3, 20, 1000])
def test_the_interval_is_that_of_scipy(number: int) -> None:
    for wins in {0, 1, number // 3, number}:
        expected = scipy.stats.binomtest(wins, number).proportion_ci(0.95, method="wilson")
        found = wilson_interval(wins / number, number)
        assert found == pytest.approx((expected.low, expected.high), rel=1e-12, abs=1e-12)
        assert 0 <= found[0] < found[1] <= 1


def test_a_log_probability_that_is_none_is_not_hidden() -> None:
    broken = scores_of((math.nan, 2, -5.0, 5), (-6.0, 3, -7.0, 2))
    metrics = pair_metrics(broken, broken)
    assert math.isnan(metrics["accuracy"]) and math.isnan(metrics["loss"])
    assert math.isnan(metrics["reward_accuracy"]) and math.isnan(metrics["reward_margin"])
    assert metrics["pairs"] == 2


def test_some_of_the_pairs() -> None:
    assert pair_metrics(SCORES.take([1, 3])) == pair_metrics(
        scores_of((-6.0, 3, -6.0, 2), (-9.0, 3, -1.0, 1))
    )
