"""AdamW, decay by name, clipping and schedules against NumPy formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.errors import UserError
from sealion_jax.optimizer import (
    CosineSchedule,
    OptimizerConfig,
    WarmupStableDecay,
    adamw,
    clip_by_global_norm,
    decay_mask,
    learning_rate_schedule,
)


def test_cosine_warms_up_peaks_and_ends_at_the_final_rate():
    rate = learning_rate_schedule(
        CosineSchedule(peak_learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4), 14
    )
    rates = np.array([rate(step) for step in range(14)])
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    expected = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(1, 11) / 10))
    np.testing.assert_allclose(rates[4:], expected, rtol=1e-5)
    assert rates[-1] == pytest.approx(0.1)


def test_warmup_stable_decay_is_the_same_until_the_cooldown_when_prolonged():
    schedule = WarmupStableDecay(
        peak_learning_rate=1.0, final_learning_rate=0.0, warmup_steps=2, decay_steps=4
    )
    short, long = learning_rate_schedule(schedule, 10), learning_rate_schedule(schedule, 20)
    np.testing.assert_allclose(
        [short(s) for s in range(10)], [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0], atol=1e-6
    )
    assert [float(short(s)) for s in range(6)] == [float(long(s)) for s in range(6)]


def test_a_schedule_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="decay_steps"):
        learning_rate_schedule(WarmupStableDecay(warmup_steps=5, decay_steps=6), 10)
    with pytest.raises(UserError, match="warmup_steps"):
        learning_rate_schedule(CosineSchedule(warmup_steps=11), 10)


def _tree(rng: np.random.Generator) -> dict:
    return {
        "embedder": {"embedding": rng.normal(size=(5, 4))},
        "blocks": {
            "layer_0": {
                "mlp": {"up": rng.normal(size=(2, 4, 3))},
                "pre_mlp_norm": {"scale": rng.normal(size=(2, 4))},
            }
        },
    }


def test_adamw_equals_the_formula_and_never_decays_a_stacked_norm():
    rng = np.random.default_rng(0)
    params = jax.tree.map(jnp.float32, _tree(rng))
    config = OptimizerConfig(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.5)
    transform = adamw(config)
    state = transform.init(params)
    m = jax.tree.map(np.zeros_like, params)
    v = jax.tree.map(np.zeros_like, params)
    decayed = {"embedding": 0.5, "up": 0.5, "scale": 0.0}
    for t in range(1, 4):
        gradients = jax.tree.map(jnp.float32, _tree(rng))
        direction, state = transform.update(gradients, state, params)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradients)
        v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, v, gradients)

        def expected(path, m, v, p, t=t):
            adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            return adam + decayed[path[-1].key] * p

        want = jax.tree_util.tree_map_with_path(expected, m, v, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), direction, want)


def test_decay_mask_is_by_name():
    mask = decay_mask(_tree(np.random.default_rng(0)))
    assert mask["embedder"]["embedding"] is True
    assert mask["blocks"]["layer_0"]["mlp"]["up"] is True
    assert mask["blocks"]["layer_0"]["pre_mlp_norm"]["scale"] is False


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping(max_norm):
    gradients = jax.tree.map(jnp.float32, _tree(np.random.default_rng(1)))
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])
    clipped, norm = clip_by_global_norm(gradients, max_norm)
    assert float(norm) == pytest.approx(np.linalg.norm(flat), rel=1e-6)
    flat_clipped = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(clipped)])
    np.testing.assert_allclose(flat_clipped, flat * min(1, max_norm / np.linalg.norm(flat)), rtol=1e-5)
