"""Logits and gradients against Transformers' eager Gemma 3, float32 and bfloat16."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.gemma3 import abstract_params, binder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.model.gemma3_reference import reference_model, to_tree  # noqa: E402 (needs torch)

B, T, V = 2, 140, 97
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
QUICK = {"xla_backend_optimization_level": 0}

# A block of six and a remainder of two, two query heads to a key-value head, a window much shorter than the
# sequence, RoPE factor 8, a query scale that is not the head dim's.
EIGHT_LAYERS = Gemma3Config(
    vocab_size=V,
    num_layers=8,
    model_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    feed_forward_dim=96,
    query_scale_dim=24,
    sliding_window_tokens=20,
    global_rope_factor=8.0,
)
# Three blocks and no remainder, one key-value head, heads wider together than the model.
EIGHTEEN_LAYERS = Gemma3Config(
    vocab_size=V,
    num_layers=18,
    model_dim=48,
    num_heads=4,
    num_kv_heads=1,
    head_dim=32,
    feed_forward_dim=80,
    query_scale_dim=32,
    sliding_window_tokens=7,
)
CONFIGS = {"8 layers": EIGHT_LAYERS, "18 layers": EIGHTEEN_LAYERS}


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """No padding (0) among them: PyTorch leaves that row's gradient out where it is embedded."""
    return np.random.default_rng(0).integers(1, V, size=(B, T + 1)).astype(np.int32)


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request: pytest.FixtureRequest, tokens: np.ndarray) -> dict[str, Any]:
    """A random model of Transformers with its weights, logits, mean loss and gradients."""
    config = CONFIGS[request.param]
    model = reference_model(config, seed=3)
    logits = model(torch.tensor(tokens[:, :-1])).logits
    targets = torch.tensor(tokens[:, 1:]).long()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return {
        "config": config,
        "model": model,
        "params": to_tree({name: p.detach() for name, p in model.named_parameters()}, config),
        "gradients": to_tree({name: p.grad for name, p in model.named_parameters()}, config),
        "logits": logits.detach().numpy(),
        "loss": loss.item(),
    }


def loss_logits_gradients(
    config: Gemma3Config, compute: ComputeConfig, params: Any, tokens: np.ndarray
) -> Any:
    compute = replace(compute, logits_bytes_per_device=B * T * 40 * 4)
    bind = binder(config, compute=compute)
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])

    def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        model = bind(params)
        hidden = model(inputs, positions=jnp.asarray(POSITIONS), segment_ids=jnp.ones_like(inputs))
        log_probs = model.cross_entropy(hidden, targets).log_probs
        return -log_probs.mean(), model.logits(hidden)

    run = jax.jit(jax.value_and_grad(mean_loss, has_aux=True), compiler_options=QUICK)
    (loss, logits), gradients = run(jax.tree.map(jnp.asarray, params))
    return float(loss), np.asarray(logits), gradients


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
def test_float32_logits_and_every_gradient(
    reference: dict[str, Any], tokens: np.ndarray, attention: Any
) -> None:
    """Logits within 1e-4; each parameter's gradient within 1e-4 of that parameter's largest."""
    config = reference["config"]
    compute = ComputeConfig(dtype="float32", remat="none", attention=attention)
    loss, logits, gradients = loss_logits_gradients(config, compute, reference["params"], tokens)
    assert np.abs(reference["logits"]).max() > 2  # a comparison of zeros would show nothing
    assert np.abs(logits - reference["logits"]).max() < 1e-4
    assert abs(loss - reference["loss"]) < 1e-5
    assert jax.tree.structure(gradients) == jax.tree.structure(abstract_params(config))
    errors = jax.tree.map(
        lambda ours, theirs: float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        gradients,
        reference["gradients"],
    )
    wrong = {name: e for name, e in jax.tree_util.tree_leaves_with_path(errors) if not e < 1e-4}
    assert not wrong


def test_bfloat16_is_no_further_from_the_truth_than_transformers(tokens: np.ndarray) -> None:
    """Truth: float32 compute on the same weights, rounded to bfloat16. Logits have a deviation of about 1."""
    config = EIGHT_LAYERS
    model = reference_model(config, seed=4).bfloat16()
    inputs = torch.tensor(tokens[:, :-1])
    with torch.no_grad():
        theirs = model(inputs).logits.float().numpy()
        truth = copy.deepcopy(model).float()(inputs).logits.numpy()
    params = to_tree({name: p.detach() for name, p in model.named_parameters()}, config)
    bind = binder(config, compute=ComputeConfig(dtype="bfloat16", remat="none", attention="blockwise"))
    ids = jnp.asarray(tokens[:, :-1])

    def run(params: Any) -> jax.Array:
        bound = bind(params)
        hidden = bound(ids, positions=jnp.asarray(POSITIONS), segment_ids=jnp.ones_like(ids))
        assert hidden.dtype == jnp.bfloat16
        return bound.logits(hidden)

    ours = np.asarray(jax.jit(run, compiler_options=QUICK)(jax.tree.map(jnp.asarray, params)))

    def rms(error: np.ndarray) -> float:
        return float(np.sqrt(np.mean(error**2)))

    assert rms(ours - truth) < 1.1 * rms(theirs - truth)
    assert rms(ours - truth) < 0.04 * rms(truth)
    assert np.abs(ours - truth).max() < 0.3
