"""Every preference loss against its paper's formula in NumPy's float64, finite differences, and TRL."""

from __future__ import annotations

import itertools
from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.errors import UserError
from sealion_jax.objectives.preference_config import (
    Answers,
    APODownLoss,
    APOZeroLoss,
    HingeLoss,
    IPOLoss,
    OddsRatioLoss,
    Pairs,
    PreferenceConfig,
    PreferenceLoss,
    RobustLoss,
    SFTLoss,
    SigmoidLoss,
    SimPOLoss,
)
from tests.objectives.formulas import CASES, slopes


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def losses_and_gradients(pairs: Pairs) -> dict[str, Any]:
    """Of every case: the losses of the pairs, and their gradients by (chosen, rejected) log-probabilities."""

    def one(loss: PreferenceLoss) -> Any:
        def total(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = loss(
                Pairs(
                    chosen=pairs.chosen._replace(log_probs=chosen),
                    rejected=pairs.rejected._replace(log_probs=rejected),
                )
            )
            return jnp.sum(values), values

        gradients, values = jax.grad(total, (0, 1), has_aux=True)(
            pairs.chosen.log_probs, pairs.rejected.log_probs
        )
        return values, gradients

    return {name: one(loss) for name, (loss, _) in CASES.items()}


def make_pairs(*numbers: Any) -> tuple[Pairs, list[np.ndarray]]:
    """Float32 pairs of (c, r, rc, rr, nc, nr), and the same numbers in float64."""
    arrays = [np.asarray(x, np.float32) for x in np.broadcast_arrays(*numbers)]
    c, r, rc, rr, nc, nr = arrays
    pairs = Pairs(
        chosen=Answers(log_probs=c, reference=rc, tokens=nc),
        rejected=Answers(log_probs=r, reference=rr, tokens=nr),
    )
    return jax.tree.map(jnp.asarray, pairs), [x.astype(np.float64) for x in arrays]


def random_pairs(count: int = 64) -> tuple[Pairs, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60, (2, count))
    log_probs = -tokens * rng.uniform(0.05, 3, (2, count))
    return make_pairs(*log_probs, *(log_probs + rng.normal(0, 8, (2, count))), *tokens)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_paper_and_finite_differences(name: str) -> None:
    pairs, numbers = random_pairs()
    values, gradients = losses_and_gradients(pairs)[name]
    formula = CASES[name][1]
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, formula(*numbers), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients, slopes(formula, numbers), rtol=1e-4, atol=1e-5)


# Sums over answers at their worst: certain, nearly so, thousands of nats; float32 holds their differences.
EXTREMES = np.array([*itertools.product((0.0, -(2.0**-10), -1.0, -256.0, -8192.0), repeat=4)]).T


@pytest.mark.parametrize("name", CASES)
def test_extreme_values_stay_finite_and_right(name: str) -> None:
    pairs, numbers = make_pairs(*EXTREMES, 1.0, 7.0)
    values, gradients = losses_and_gradients(pairs)[name]
    assert np.all(np.isfinite(values))
    assert np.all(np.isfinite(gradients[0])) and np.all(np.isfinite(gradients[1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = CASES[name][1](*numbers)
    if name == "odds_ratio":  # the odds of what is certain are infinite: ours are those of nearly certain
        certain = (numbers[0] == 0) | (numbers[1] == 0)
        assert np.all(np.isfinite(expected[~certain]))
        values, expected = np.asarray(values)[~certain], expected[~certain]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_no_margin_costs_log_two() -> None:
    pairs, _ = make_pairs([-3.0, -400.0], [-5.0, -7.0], [-3.0, -400.0], [-5.0, -7.0], [2, 90], [4, 3])
    found = losses_and_gradients(pairs)
    for name in ("sigmoid", "conservative", "sigmoid of means", "robust"):
        np.testing.assert_allclose(found[name][0], np.log(2), atol=1e-7)
    np.testing.assert_allclose(found["ipo"][0], 25, rtol=1e-6)
    for name in ("hinge", "apo_zero", "apo_down"):
        np.testing.assert_allclose(found[name][0], 1, atol=1e-7)


def test_robust_over_flipped_labels_is_dpo_on_the_right_ones() -> None:
    pairs, _ = random_pairs()
    flipped = Pairs(chosen=pairs.rejected, rejected=pairs.chosen)
    loss = RobustLoss(beta=0.1, label_smoothing=0.3)
    mean = 0.7 * loss(pairs) + 0.3 * loss(flipped)
    np.testing.assert_allclose(mean, SigmoidLoss(beta=0.1)(pairs), rtol=1e-5, atol=1e-5)


def test_rewards_are_the_scaled_scores() -> None:
    pairs, (c, r, rc, rr, nc, nr) = random_pairs()
    for loss, chosen, rejected in (
        (SigmoidLoss(beta=0.2), 0.2 * (c - rc), 0.2 * (r - rr)),
        (HingeLoss(beta=0.2, reference_free=True), 0.2 * c, 0.2 * r),
        (IPOLoss(beta=0.2), 0.2 * (c - rc) / nc, 0.2 * (r - rr) / nr),
        (SimPOLoss(beta=3.0), 3 * c / nc, 3 * r / nr),
        (OddsRatioLoss(), c / nc, r / nr),
    ):
        np.testing.assert_allclose(loss.rewards(pairs), (chosen, rejected), rtol=1e-4, atol=1e-5)


def test_options_without_meaning_are_refused() -> None:
    for loss, option in (
        (APOZeroLoss, "label_smoothing"),
        (APODownLoss, "reference_free"),
        (SimPOLoss, "length_normalised"),
        (OddsRatioLoss, "beta"),
        (SFTLoss, "beta"),
        (SigmoidLoss, "gamma"),
    ):
        with pytest.raises(TypeError, match=option):
            loss(**{option: 1})
    with pytest.raises(UserError, match=r"SigmoidLoss.beta is 0; it must be more than 0"):
        SigmoidLoss(beta=0)
    with pytest.raises(UserError, match=r"RobustLoss.label_smoothing is 0.5; .* less than 0.5"):
        RobustLoss(label_smoothing=0.5)
    with pytest.raises(UserError, match=r"SimPOLoss.gamma is nan"):
        SimPOLoss(gamma=float("nan"))
    with pytest.raises(UserError, match=r"SFTLoss.weight is inf"):
        SFTLoss(weight=float("inf"))
    with pytest.raises(UserError, match="sigmoid is given 2 times"):
        PreferenceConfig(losses=(SigmoidLoss(), SigmoidLoss(beta=0.2)))
    for losses in ((), (SFTLoss(),)):
        with pytest.raises(UserError, match="none compares"):
            PreferenceConfig(losses=losses)


def test_only_losses_over_log_ratios_need_a_reference() -> None:
    free = (SimPOLoss(), OddsRatioLoss(), SFTLoss(), HingeLoss(reference_free=True))
    assert not PreferenceConfig(losses=free).needs_reference
    for loss in (SigmoidLoss(), RobustLoss(), IPOLoss(), HingeLoss(), APOZeroLoss(), APODownLoss()):
        assert PreferenceConfig(losses=(SFTLoss(), loss)).needs_reference
        assert PreferenceConfig(losses=(SFTLoss(), loss)).rewarding is loss


# The same loss as TRL's `DPOTrainer` calls it: our terms, its loss_type, loss_weights, beta and smoothing.
IN_TRL: dict[str, tuple[tuple[PreferenceLoss, ...], list[str], list[float], float, float]] = {
    "sigmoid": ((SigmoidLoss(beta=0.1),), ["sigmoid"], [1.0], 0.1, 0.0),
    "sigmoid of means": ((SigmoidLoss(beta=5.0, length_normalised=True),), ["sigmoid_norm"], [1.0], 5.0, 0.0),
    "robust": ((RobustLoss(beta=0.2, label_smoothing=0.1),), ["robust"], [1.0], 0.2, 0.1),
    "ipo": ((IPOLoss(beta=0.1),), ["ipo"], [1.0], 0.1, 0.0),
    "hinge": ((HingeLoss(beta=0.1),), ["hinge"], [1.0], 0.1, 0.0),
    "apo_zero": ((APOZeroLoss(beta=0.1),), ["apo_zero"], [1.0], 0.1, 0.0),
    "apo_down": ((APODownLoss(beta=0.1),), ["apo_down"], [1.0], 0.1, 0.0),
    "a weighted sum": (
        (SigmoidLoss(beta=0.3, weight=0.8), SFTLoss(weight=0.5), APOZeroLoss(beta=0.3, weight=0.2)),
        ["sigmoid", "sft", "apo_zero"],
        [0.8, 0.5, 0.2],
        0.3,
        0.0,
    ),
}


def trl_trainer(loss_types: list[str], loss_weights: list[float], beta: float, label_smoothing: float) -> Any:
    """What TRL's `DPOTrainer._compute_loss` asks of its trainer, on one process; it leaves metrics there."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=loss_weights,
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_TRL)
def test_equals_trl(name: str) -> None:
    """TRL's own loss, from log-probabilities of tokens on: value, gradient by them, and rewards."""
    pytest.importorskip("trl", minversion="1.16")
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer

    rng = np.random.default_rng(3)
    count, length = 16, 25
    begins = rng.integers(1, 10, (2 * count, 1))
    ends = begins + rng.integers(1, 15, (2 * count, 1))
    answer = (np.arange(length) >= begins) & (np.arange(length) < ends)
    # A model's are of its targets: a column less.
    log_probs = np.where(answer, -rng.uniform(0, 4, answer.shape), 0)[:, 1:].astype(np.float32)
    tokens = answer.sum(1).astype(np.float32)
    reference = (log_probs.sum(1) + rng.normal(0, 5, 2 * count)).astype(np.float32)

    losses, *options = IN_TRL[name]
    trainer, leaf = trl_trainer(*options), torch.tensor(log_probs, requires_grad=True)
    unused = torch.zeros(log_probs.shape)
    outputs = SimpleNamespace(log_probs=leaf, entropy=unused, mean_logits=unused, is_top1=unused.bool())
    inputs = {
        "input_ids": torch.zeros(answer.shape, dtype=torch.long),
        "attention_mask": torch.ones(answer.shape, dtype=torch.long),
        "completion_mask": torch.tensor(answer.astype(np.int64)),
        "ref_chosen_logps": torch.tensor(reference[:count]),
        "ref_rejected_logps": torch.tensor(reference[count:]),
    }
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    theirs.backward()

    def pairs_of(log_probs: jax.Array) -> Pairs:
        sides = (slice(count), slice(count, None))
        return Pairs(*(Answers(log_probs[x].sum(1), tokens[x], reference[x]) for x in sides))

    def ours(log_probs: jax.Array) -> jax.Array:
        counts = {"pairs": count, "chosen_tokens": tokens[:count].sum()}
        pairs = pairs_of(log_probs)
        return sum((x.weight * x(pairs).sum() / counts[x.normaliser] for x in losses), start=jnp.zeros(()))

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(log_probs))
    assert float(value) == pytest.approx(theirs.item(), abs=1e-5)
    answered = answer[:, 1:]
    np.testing.assert_allclose(gradient[answered], leaf.grad.numpy()[answered], rtol=1e-5, atol=1e-7)
    if name not in {"ipo", "sigmoid of means"}:  # there TRL learns from means, but reports sums
        chosen, rejected = PreferenceConfig(losses=losses).rewarding.rewards(pairs_of(jnp.asarray(log_probs)))
        reported = {name: values[0] for name, values in trainer._metrics["train"].items()}
        assert float(chosen.mean()) == pytest.approx(reported["rewards/chosen"], abs=1e-5)
        assert float((chosen - rejected).mean()) == pytest.approx(reported["rewards/margins"], abs=1e-5)
        assert float((chosen > rejected).mean()) == pytest.approx(reported["rewards/accuracies"])


@pytest.mark.slow
def test_equals_trl_where_other_trainers_have_it() -> None:
    """Label smoothing and SimPO as `CPOTrainer`, the odds ratio as `ORPOTrainer` computes them."""
    pytest.importorskip("trl", minversion="1.16")
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    pairs, (c, r, rc, rr, nc, nr) = random_pairs()
    on_cpu = SimpleNamespace(device="cpu")

    def cpo(loss_type: str, chosen: np.ndarray, rejected: np.ndarray, **options: float) -> np.ndarray:
        trainer = SimpleNamespace(accelerator=on_cpu, alpha=0.0, loss_type=loss_type, **options)
        return CPOTrainer.cpo_loss(trainer, torch.tensor(chosen), torch.tensor(rejected))[0].numpy()

    conservative = cpo("sigmoid", c - rc, r - rr, beta=0.3, label_smoothing=0.2)
    np.testing.assert_allclose(
        SigmoidLoss(beta=0.3, label_smoothing=0.2)(pairs), conservative, rtol=1e-5, atol=1e-5
    )
    simpo = cpo("simpo", c / nc, r / nr, beta=2.0, label_smoothing=0.0, simpo_gamma=0.8)
    np.testing.assert_allclose(SimPOLoss(beta=2.0, gamma=0.8)(pairs), simpo, rtol=1e-5, atol=1e-5)
    trainer = SimpleNamespace(accelerator=on_cpu, beta=1.0)
    log_ratio = ORPOTrainer.odds_ratio_loss(trainer, torch.tensor(c / nc), torch.tensor(r / nr))[0]
    np.testing.assert_allclose(OddsRatioLoss()(pairs), -log_ratio.numpy(), rtol=1e-5, atol=1e-5)
