"""Losses over preference pairs: pure functions of the two answers' scores, one number a pair.

A score says how much the policy prefers an answer. Written with `pi` for the policy, `ref` for the reference,
`y` for an answer and `|y|` for its tokens, it is one of

    log pi(y) - log ref(y)              how much likelier than under the reference (the default)
    (log pi(y) - log ref(y)) / |y|      length-normalised
    log pi(y)                           reference-free
    log pi(y) / |y|                     both

and `margin` stands for the chosen answer's score minus the rejected one's. Scores of any shape; losses have
theirs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scores = Float[Array, "*pairs"]
"""Float32, one a pair."""

LEAST_SURPRISE = 1e-7
"""Nats a token below which an answer counts as certain: nearer to probability 1 float32 has no odds."""


def scores(log_probs: Scores, *, reference: Scores | None = None, tokens: Scores | None = None) -> Scores:
    """How much the policy prefers each answer.

    Args:
        log_probs: the policy's, summed over the answer's tokens.
        reference: the reference's, summed likewise; None leaves it out.
        tokens: the answer's; given, the score is a mean over them.
    """
    ratio = log_probs if reference is None else log_probs - reference
    return ratio if tokens is None else ratio / tokens


def sigmoid_loss(chosen: Scores, rejected: Scores, *, beta: float, label_smoothing: float = 0.0) -> Scores:
    """-(1 - e) log sigmoid(beta margin) - e log sigmoid(-beta margin), with e for `label_smoothing`.

    DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7). With e > 0, the share of pairs that are thought to be
    the wrong way round, it is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences and
    relationship to IPO"): least where sigmoid(beta margin) = 1 - e. On length-normalised scores it is that of
    Tülu 3 (Lambert et al. 2024, arXiv:2411.15124), and TRL's `sigmoid_norm`.
    """
    logits = beta * (chosen - rejected)
    agree, disagree = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -(1 - label_smoothing) * agree - label_smoothing * disagree


def robust_loss(chosen: Scores, rejected: Scores, *, beta: float, label_smoothing: float) -> Scores:
    """(-(1 - e) log sigmoid(beta margin) + e log sigmoid(-beta margin)) / (1 - 2 e).

    Where a share e of the pairs is the wrong way round, its mean is that of DPO's loss on the right ones
    (Ray Chowdhury et al. 2024, arXiv:2403.00409). It falls without bound as the margin grows.
    """
    logits = beta * (chosen - rejected)
    agree, disagree = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return (label_smoothing * disagree - (1 - label_smoothing) * agree) / (1 - 2 * label_smoothing)


def ipo_loss(chosen: Scores, rejected: Scores, *, beta: float) -> Scores:
    """(margin - 1 / (2 beta))^2.

    IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17, where beta is called tau). The paper writes sums; its
    authors' experiments, and TRL, take length-normalised scores.
    """
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def hinge_loss(chosen: Scores, rejected: Scores, *, beta: float) -> Scores:
    """max(0, 1 - beta margin).

    SLiC-HF's calibration term (Zhao et al. 2023, arXiv:2305.10425) on reference-free scores; on log-ratios,
    RSO's hinge-norm (Liu et al. 2023, arXiv:2309.06657) and TRL's `hinge`.
    """
    return jax.nn.relu(1 - beta * (chosen - rejected))


def apo_zero_loss(chosen: Scores, rejected: Scores, *, beta: float) -> Scores:
    """1 - sigmoid(beta chosen) + sigmoid(beta rejected): the chosen answer up, the rejected one down.

    APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).
    """
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down_loss(chosen: Scores, rejected: Scores, *, beta: float) -> Scores:
    """sigmoid(beta chosen) + 1 - sigmoid(beta margin): both answers down, the rejected one further.

    APO-down (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8).
    """
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def simpo_loss(chosen: Scores, rejected: Scores, *, beta: float, gamma: float) -> Scores:
    """-log sigmoid(beta margin - gamma), of scores log pi(y) / |y|.

    SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6).
    """
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def odds_ratio_loss(chosen: Scores, rejected: Scores) -> Scores:
    """-log sigmoid(log(odds(chosen) / odds(rejected))), odds(s) = e^s / (1 - e^s), of scores log pi(y) / |y|.

    ORPO's preference term (Hong et al. 2024, arXiv:2403.07691, eqs. 3, 4 and 7).
    """
    return -jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_probs: Scores) -> Scores:
    """log(p / (1 - p)) of p = exp(log_probs); finite for p = 1 too."""
    surprise = jnp.maximum(-log_probs, LEAST_SURPRISE)
    return -surprise - jax.nn.log1mexp(surprise)


def sft_loss(chosen_log_probs: Scores) -> Scores:
    """-log pi(chosen), summed over its tokens: the cross-entropy of instruction tuning.

    To be divided by tokens, not by pairs.
    """
    return -chosen_log_probs
