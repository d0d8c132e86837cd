"""Pairs of answers: how often the chosen one is the likelier, by itself and against a reference.

With log pi the log-probability of an answer, summed over its tokens, n its number of tokens, and log ref that
of a reference model:

    accuracy               share of pairs with  log pi(chosen) > log pi(rejected)
    accuracy_per_token     the same with        log pi / n
    reward_accuracy        the same with        log pi - log ref
    reward_margin          mean over pairs of   (log pi - log ref)(chosen) - (log pi - log ref)(rejected)

A tie counts as half a pair in each accuracy, so that a model measured against itself has a reward accuracy of
0.5. The margin is in nats, without the beta that a loss multiplies it with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64, Int64


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Of each pair, both answers' log-probabilities in nats, summed over their tokens, and those tokens."""

    chosen: Float64[np.ndarray, " pairs"]
    rejected: Float64[np.ndarray, " pairs"]
    chosen_tokens: Int64[np.ndarray, " pairs"]
    """The answer's and its <end_of_turn>."""
    rejected_tokens: Int64[np.ndarray, " pairs"]

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, members: Sequence[int]) -> PairScores:
        """Those of some pairs."""
        return PairScores(**{field.name: getattr(self, field.name)[list(members)] for field in fields(self)})


PairReference = PairScores
"""What a reference model gives the same pairs."""


def pair_metrics(scores: PairScores, reference: PairReference | None = None) -> dict[str, float]:
    """pairs, accuracy, accuracy_per_token, loss (nats a token of the chosen answers), tokens (of those).

    With a reference also reward_accuracy, the 95% interval of it as reward_accuracy_low and
    reward_accuracy_high (Wilson), and reward_margin.

    Raises:
        ValueError: the reference's answers are not these answers.
    """
    tokens = int(scores.chosen_tokens.sum())
    metrics: dict[str, float] = {
        "pairs": len(scores),
        "accuracy": _share_above_zero(scores.chosen - scores.rejected),
        "accuracy_per_token": _share_above_zero(
            scores.chosen / scores.chosen_tokens - scores.rejected / scores.rejected_tokens
        ),
        "loss": -float(scores.chosen.sum()) / tokens,
        "tokens": tokens,
    }
    if reference is None:
        return metrics
    _check_same_answers(scores, reference)
    margins = (scores.chosen - reference.chosen) - (scores.rejected - reference.rejected)
    accuracy = _share_above_zero(margins)
    low, high = wilson_interval(accuracy, len(scores))
    return metrics | {
        "reward_accuracy": accuracy,
        "reward_accuracy_low": low,
        "reward_accuracy_high": high,
        "reward_margin": float(margins.mean()),
    }


def wilson_interval(share: float, number: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The interval that a share of so many independent cases stands for.

    Wilson (1927), "Probable inference, the law of succession, and statistical inference", without a
    continuity correction.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _share_above_zero(differences: Float64[np.ndarray, " pairs"]) -> float:
    """Zeros count as half; not a number if one of them is none."""
    return float(np.mean(np.sign(differences) + 1) / 2)


def _check_same_answers(scores: PairScores, reference: PairReference) -> None:
    for name in ("chosen_tokens", "rejected_tokens"):
        if not np.array_equal(getattr(scores, name), getattr(reference, name)):
            raise ValueError(
                f"the reference's {name} are not those of the {len(scores)} pairs that are scored; score the "
                "same set with both models"
            )
