"""The rules against formulas in NumPy and against Transformers', and the draws against probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.errors import UserError
from sealion_jax.generation import sampling
from sealion_jax.generation.config import SamplingConfig

B, V = 6, 40
DRAW = jax.jit(sampling.sample, static_argnames="config")
KEYS = jax.jit(sampling.row_keys)
LOGITS = np.random.default_rng(0).normal(0, 3, (B, V)).astype(np.float32)


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(np.float64(logits) - np.max(logits, -1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def left(rule: Callable[..., Any], *arguments: float) -> np.ndarray:
    """Which tokens a rule leaves; their logits are untouched, the others' minus infinity."""
    after = np.asarray(rule(jnp.asarray(LOGITS), *arguments))
    is_left = np.isfinite(after)
    np.testing.assert_array_equal(after[is_left], LOGITS[is_left])
    assert np.all(after[~is_left] == -np.inf)
    return is_left


@pytest.mark.parametrize("k", [1, 3, V, V + 5])
def test_top_k(k: int) -> None:
    rank = np.argsort(np.argsort(-LOGITS, axis=-1), axis=-1)
    np.testing.assert_array_equal(left(sampling.keep_top_k, k), rank < k)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 1.0])
def test_top_p(p: float) -> None:
    """Token by token: the likeliest are taken until they have p together."""
    expected = np.zeros((B, V), bool)
    for row, row_probabilities in enumerate(probabilities(LOGITS)):
        total = 0.0
        for token in np.argsort(-row_probabilities):
            expected[row, token] = True
            total += row_probabilities[token]
            if total >= p:
                break
    if p == 1.0:  # float32 may have them sum to 1 before the last
        assert probabilities(LOGITS)[~left(sampling.keep_top_p, p)].sum() < 1e-5
    else:
        np.testing.assert_array_equal(left(sampling.keep_top_p, p), expected)


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.7, 1.0])
def test_min_p(p: float) -> None:
    chances = probabilities(LOGITS)
    expected = chances >= p * chances.max(-1, keepdims=True)
    np.testing.assert_array_equal(left(sampling.keep_min_p, p), expected)


def test_equal_logits_stay_or_go_together() -> None:
    logits = jnp.array([[2.0, 1.0, 2.0, 1.0, 0.0]])
    for rule, argument in ((sampling.keep_top_k, 1), (sampling.keep_top_p, 0.1), (sampling.keep_min_p, 0.9)):
        np.testing.assert_array_equal(np.isfinite(rule(logits, argument))[0], [1, 0, 1, 0, 0])
    np.testing.assert_array_equal(np.isfinite(sampling.keep_top_k(logits, 3))[0], [1, 1, 1, 1, 0])


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_temperature(temperature: float) -> None:
    scaled = np.asarray(sampling.scale_by_temperature(jnp.asarray(LOGITS), temperature))
    np.testing.assert_allclose(
        probabilities(scaled), probabilities(np.float64(LOGITS) / temperature), atol=1e-6
    )


def test_the_rules_together_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    config = SamplingConfig(temperature=0.7, top_k=12, top_p=0.95, min_p=0.02)
    theirs = torch.tensor(LOGITS)
    for warper in (
        logits_process.TemperatureLogitsWarper(0.7),
        logits_process.TopKLogitsWarper(12),
        logits_process.TopPLogitsWarper(0.95),
        logits_process.MinPLogitsWarper(0.02),
    ):
        theirs = warper(None, theirs)
    ours = np.asarray(sampling.filtered(jnp.asarray(LOGITS), config))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))
    assert 1 < np.isfinite(ours).sum(-1).max() < 12  # each rule took something out
    np.testing.assert_allclose(probabilities(ours), probabilities(theirs.numpy()), atol=1e-6)


def test_draws_have_the_probabilities() -> None:
    """20,000 draws of one row: each token's share is within 4.5 standard deviations."""
    config = SamplingConfig(temperature=1.5, top_k=10)
    count = 20_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (count, V))
    keys, positions = KEYS(3, jnp.arange(count)), jnp.full((count,), 7)
    drawn = np.asarray(DRAW(logits, config, keys=keys, positions=positions))
    expected = probabilities(np.asarray(sampling.filtered(logits[:1], config)))[0]
    shares = np.bincount(drawn, minlength=V) / count
    assert np.all(shares[expected == 0] == 0)
    spread = np.sqrt(expected * (1 - expected) / count)
    assert np.all(np.abs(shares - expected) <= 4.5 * spread)


def test_a_draw_depends_on_its_row_alone() -> None:
    """Not on the rows beside it; and it changes with the seed, the prompt's number and the position."""
    config = SamplingConfig(temperature=5.0)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (64, V))

    def draw(seed: int, numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        keys = KEYS(seed, jnp.asarray(numbers))
        return np.asarray(DRAW(logits, config, keys=keys, positions=jnp.asarray(positions)))

    numbers, positions = np.arange(64), np.arange(64) % 5 + 10
    drawn = draw(0, numbers, positions)
    order = np.random.default_rng(1).permutation(64)
    np.testing.assert_array_equal(draw(0, numbers[order], positions[order]), drawn[order])
    for other in (
        draw(1, numbers, positions),
        draw(0, numbers + 64, positions),
        draw(0, numbers, positions + 5),
    ):
        assert (other != drawn).mean() > 0.5


def test_greedy_takes_the_largest_and_of_equal_ones_the_first() -> None:
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, -1.0, 4.0]])
    keys = KEYS(0, jnp.arange(2))
    drawn = DRAW(logits, SamplingConfig(), keys=keys, positions=jnp.array([1, 1]))
    np.testing.assert_array_equal(drawn, [1, 0])


def test_a_tiny_temperature_is_greedy() -> None:
    config = SamplingConfig(temperature=1e-30, top_p=0.9)
    keys = KEYS(0, jnp.arange(B))
    drawn = DRAW(jnp.asarray(LOGITS), config, keys=keys, positions=jnp.arange(B))
    np.testing.assert_array_equal(drawn, LOGITS.argmax(-1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, not 0"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k must be a whole number"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be more than 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p must be at most 1, not 1.1"),
        ({"temperature": 1.0, "min_p": 2}, "min_p must be at most 1, not 2"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**32}, "seed must be less than 4294967296"),
        ({"top_k": 5, "min_p": 0.1}, "top_k and min_p would have no effect"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SamplingConfig(**options)
