"""Which preference losses a run combines, each with its own options and no others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from sealion_jax.errors import UserError
from sealion_jax.objectives.preference_losses import (
    Scores,
    apo_down_loss,
    apo_zero_loss,
    hinge_loss,
    ipo_loss,
    odds_ratio_loss,
    robust_loss,
    scores,
    sft_loss,
    sigmoid_loss,
    simpo_loss,
)


class Answers(NamedTuple):
    """One side of the pairs."""

    log_probs: Scores
    """The policy's, summed over the answer's tokens."""
    tokens: Scores
    """Of the answer, at least 1."""
    reference: Scores | None
    """The reference's log-probabilities, summed likewise; None where no loss asks for them."""


class Pairs(NamedTuple):
    """What losses are computed from."""

    chosen: Answers
    rejected: Answers


def _check(loss: object, name: str, *, low: float, high: float = math.inf, low_allowed: bool = False) -> None:
    value = getattr(loss, name)
    if not (low <= value if low_allowed else low < value) or not value < high:
        least = f"at least {low:g}" if low_allowed else f"more than {low:g}"
        most = "finite" if math.isinf(high) else f"less than {high:g}"
        raise UserError(f"{type(loss).__name__}.{name} is {value}; it must be {least} and {most}")


@dataclass(frozen=True, kw_only=True)
class _Weighted:
    """A term of the weighted sum."""

    weight: float = 1.0
    """The factor of this loss in the sum."""
    normaliser: ClassVar[str] = "pairs"
    """What its sum over the global batch is divided by."""
    needs_reference: ClassVar[bool] = False
    """Whether it compares with the reference's log-probabilities."""

    def __post_init__(self) -> None:
        _check(self, "weight", low=0)


@dataclass(frozen=True, kw_only=True)
class _Anchored(_Weighted):
    """A loss over log-ratios to the reference."""

    beta: float = 0.1
    """Scale of the scores: the larger, the nearer the policy is held to the reference."""
    length_normalised: bool = False
    """Scores are means over the answer's tokens; beta is then chosen larger, 2 to 10."""
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "beta", low=0)

    def scores(self, pairs: Pairs) -> tuple[Scores, Scores]:
        """Of the chosen and the rejected answers."""
        return _scores(pairs, reference=self.needs_reference, mean=self.length_normalised)

    def rewards(self, pairs: Pairs) -> tuple[Scores, Scores]:
        """Implicit rewards of the chosen and the rejected answers: beta times their scores."""
        chosen, rejected = self.scores(pairs)
        return self.beta * chosen, self.beta * rejected


@dataclass(frozen=True, kw_only=True)
class _Margin(_Anchored):
    """A loss over the margin alone, which needs no anchor."""

    reference_free: bool = False
    """Scores are the policy's log-probabilities themselves: no reference is computed."""

    @property
    def needs_reference(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.reference_free


def _scores(pairs: Pairs, *, reference: bool, mean: bool) -> tuple[Scores, Scores]:
    chosen, rejected = (
        scores(
            side.log_probs,
            reference=side.reference if reference else None,
            tokens=side.tokens if mean else None,
        )
        for side in pairs
    )
    return chosen, rejected


@dataclass(frozen=True, kw_only=True)
class SigmoidLoss(_Margin):
    """DPO; with label smoothing, conservative DPO."""

    label_smoothing: float = 0.0
    """Share of the pairs thought to be the wrong way round, in [0, 0.5)."""
    name: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "label_smoothing", low=0, high=0.5, low_allowed=True)

    def __call__(self, pairs: Pairs) -> Scores:
        return sigmoid_loss(*self.scores(pairs), beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class RobustLoss(_Margin):
    """DPO's loss freed from the bias of wrong labels."""

    label_smoothing: float = 0.1
    """Share of the pairs that are the wrong way round, in [0, 0.5)."""
    name: ClassVar[str] = "robust"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "label_smoothing", low=0, high=0.5, low_allowed=True)

    def __call__(self, pairs: Pairs) -> Scores:
        return robust_loss(*self.scores(pairs), beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class IPOLoss(_Margin):
    """Squared distance of the margin from 1 / (2 beta)."""

    length_normalised: bool = True
    """Scores are means over the answer's tokens, as in the authors' experiments and in TRL."""
    name: ClassVar[str] = "ipo"

    def __call__(self, pairs: Pairs) -> Scores:
        return ipo_loss(*self.scores(pairs), beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class HingeLoss(_Margin):
    """SLiC's hinge: nothing is learned from a pair once beta times its margin is 1."""

    name: ClassVar[str] = "hinge"

    def __call__(self, pairs: Pairs) -> Scores:
        return hinge_loss(*self.scores(pairs), beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class APOZeroLoss(_Anchored):
    """The chosen answer up, the rejected one down."""

    name: ClassVar[str] = "apo_zero"

    def __call__(self, pairs: Pairs) -> Scores:
        return apo_zero_loss(*self.scores(pairs), beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class APODownLoss(_Anchored):
    """Both answers down, the rejected one further."""

    name: ClassVar[str] = "apo_down"

    def __call__(self, pairs: Pairs) -> Scores:
        return apo_down_loss(*self.scores(pairs), beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class SimPOLoss(_Weighted):
    """Mean log-probabilities a margin apart; without a reference."""

    beta: float = 2.0
    """Scale of the mean log-probabilities."""
    gamma: float = 1.0
    """The margin that beta times their difference is to exceed; the paper sets gamma / beta about 0.5."""
    name: ClassVar[str] = "simpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "beta", low=0)
        _check(self, "gamma", low=0, low_allowed=True)

    def __call__(self, pairs: Pairs) -> Scores:
        return simpo_loss(*_scores(pairs, reference=False, mean=True), beta=self.beta, gamma=self.gamma)

    def rewards(self, pairs: Pairs) -> tuple[Scores, Scores]:
        """Beta times the mean log-probabilities of the chosen and the rejected answers."""
        chosen, rejected = _scores(pairs, reference=False, mean=True)
        return self.beta * chosen, self.beta * rejected


@dataclass(frozen=True, kw_only=True)
class OddsRatioLoss(_Weighted):
    """ORPO's preference term; ORPO is `(SFTLoss(), OddsRatioLoss())`, the weight here being its lambda."""

    weight: float = 0.1
    """The factor of this loss in the sum: lambda in the paper, `beta` in TRL."""
    name: ClassVar[str] = "odds_ratio"

    def __call__(self, pairs: Pairs) -> Scores:
        return odds_ratio_loss(*_scores(pairs, reference=False, mean=True))

    def rewards(self, pairs: Pairs) -> tuple[Scores, Scores]:
        """Mean log-probabilities of the chosen and the rejected answers."""
        return _scores(pairs, reference=False, mean=True)


@dataclass(frozen=True, kw_only=True)
class SFTLoss(_Weighted):
    """Cross-entropy of the chosen answer, a mean over tokens; beside a preference loss."""

    name: ClassVar[str] = "sft"
    normaliser: ClassVar[str] = "chosen_tokens"

    def __call__(self, pairs: Pairs) -> Scores:
        return sft_loss(pairs.chosen.log_probs)


ComparingLoss = (
    SigmoidLoss | RobustLoss | IPOLoss | HingeLoss | APOZeroLoss | APODownLoss | SimPOLoss | OddsRatioLoss
)
"""Losses that compare the two answers."""
PreferenceLoss = ComparingLoss | SFTLoss


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """A weighted sum of losses over preference pairs."""

    losses: tuple[PreferenceLoss, ...] = (SigmoidLoss(),)
    """The terms, each kind at most once; the first that compares answers defines the reported rewards."""
    reference: str | None = None
    """CHECKPOINT whose log-probabilities the policy's are compared with; None: the weights it starts from."""

    def __post_init__(self) -> None:
        names = [loss.name for loss in self.losses]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the loss {name} is given {names.count(name)} times; give each once")
        if all(isinstance(loss, SFTLoss) for loss in self.losses):
            raise UserError(
                f"losses are {names or 'empty'}: none compares the chosen with the rejected answer; add one, "
                "such as SigmoidLoss(), or fine-tune on the chosen answers alone without pairs"
            )
        if self.reference is not None and not self.needs_reference:
            raise UserError(
                f"a reference is given ({self.reference}), and none of the losses {', '.join(names)} has a "
                "use for one; leave it out"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether batches must carry the reference's log-probabilities."""
        return any(loss.needs_reference for loss in self.losses)

    @property
    def rewarding(self) -> ComparingLoss:
        """The loss whose implicit rewards are reported: the first that compares answers."""
        return next(loss for loss in self.losses if not isinstance(loss, SFTLoss))
