"""The papers' formulas in NumPy's float64, next to the losses that are to equal them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sealion_jax.objectives.preference_config import (
    APODownLoss,
    APOZeroLoss,
    HingeLoss,
    IPOLoss,
    OddsRatioLoss,
    PreferenceLoss,
    RobustLoss,
    SFTLoss,
    SigmoidLoss,
    SimPOLoss,
)


def minus_log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def log_odds(log_p: np.ndarray) -> np.ndarray:
    """log(p / (1 - p))."""
    return log_p - np.log(-np.expm1(log_p))


def dpo(margin: np.ndarray, beta: float, e: float = 0.0) -> np.ndarray:
    return (1 - e) * minus_log_sigmoid(beta * margin) + e * minus_log_sigmoid(-beta * margin)


def robust(margin: np.ndarray, beta: float, e: float) -> np.ndarray:
    right, wrong = minus_log_sigmoid(beta * margin), minus_log_sigmoid(-beta * margin)
    return ((1 - e) * right - e * wrong) / (1 - 2 * e)


# Of (c, r, rc, rr, nc, nr): chosen and rejected log-probabilities, the reference's, and tokens.
Formula = Callable[..., np.ndarray]
CASES: dict[str, tuple[PreferenceLoss, Formula]] = {
    "sigmoid": (SigmoidLoss(beta=0.1), lambda c, r, rc, rr, nc, nr: dpo((c - rc) - (r - rr), 0.1)),
    "conservative": (
        SigmoidLoss(beta=0.3, label_smoothing=0.2),
        lambda c, r, rc, rr, nc, nr: dpo((c - rc) - (r - rr), 0.3, 0.2),
    ),
    "sigmoid of means": (
        SigmoidLoss(beta=5.0, length_normalised=True),
        lambda c, r, rc, rr, nc, nr: dpo((c - rc) / nc - (r - rr) / nr, 5.0),
    ),
    "sigmoid without reference": (
        SigmoidLoss(beta=0.1, reference_free=True),
        lambda c, r, rc, rr, nc, nr: dpo(c - r, 0.1),
    ),
    "robust": (
        RobustLoss(beta=0.1, label_smoothing=0.1),
        lambda c, r, rc, rr, nc, nr: robust((c - rc) - (r - rr), 0.1, 0.1),
    ),
    "ipo": (
        IPOLoss(beta=0.1),
        lambda c, r, rc, rr, nc, nr: ((c - rc) / nc - (r - rr) / nr - 1 / (2 * 0.1)) ** 2,
    ),
    "ipo of sums": (
        IPOLoss(beta=0.05, length_normalised=False),
        lambda c, r, rc, rr, nc, nr: ((c - rc) - (r - rr) - 1 / (2 * 0.05)) ** 2,
    ),
    "hinge": (
        HingeLoss(beta=0.1),
        lambda c, r, rc, rr, nc, nr: np.maximum(0, 1 - 0.1 * ((c - rc) - (r - rr))),
    ),
    "hinge of means without reference": (
        HingeLoss(beta=0.7, length_normalised=True, reference_free=True),
        lambda c, r, rc, rr, nc, nr: np.maximum(0, 1 - 0.7 * (c / nc - r / nr)),
    ),
    "apo_zero": (
        APOZeroLoss(beta=0.1),
        lambda c, r, rc, rr, nc, nr: 1 - sigmoid(0.1 * (c - rc)) + sigmoid(0.1 * (r - rr)),
    ),
    "apo_down": (
        APODownLoss(beta=0.1),
        lambda c, r, rc, rr, nc, nr: sigmoid(0.1 * (c - rc)) + 1 - sigmoid(0.1 * (c - rc) - 0.1 * (r - rr)),
    ),
    "apo_down of means": (
        APODownLoss(beta=2.0, length_normalised=True),
        lambda c, r, rc, rr, nc, nr: (
            sigmoid(2 * (c - rc) / nc) + 1 - sigmoid(2 * (c - rc) / nc - 2 * (r - rr) / nr)
        ),
    ),
    "simpo": (
        SimPOLoss(beta=2.0, gamma=0.8),
        lambda c, r, rc, rr, nc, nr: minus_log_sigmoid(2.0 / nc * c - 2.0 / nr * r - 0.8),
    ),
    "odds_ratio": (
        OddsRatioLoss(),
        lambda c, r, rc, rr, nc, nr: minus_log_sigmoid(log_odds(c / nc) - log_odds(r / nr)),
    ),
    "sft": (SFTLoss(), lambda c, r, rc, rr, nc, nr: -c),
}


def slopes(formula: Formula, numbers: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives by chosen and by rejected log-probabilities, as central differences."""

    def slope(which: int) -> np.ndarray:
        up, down = [*numbers], [*numbers]
        up[which], down[which] = numbers[which] + 1e-5, numbers[which] - 1e-5
        return (formula(*up) - formula(*down)) / 2e-5

    return slope(0), slope(1)
