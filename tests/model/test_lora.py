"""Adapters beside weights: the numbers of merged weights, gradients of a and b alone, and their tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.errors import UserError
from sealion_jax.model import config as sizes
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.gemma3 import abstract_params, binder, init_params, parameter_axes
from sealion_jax.model.lora import (
    LoraConfig,
    adapters_by_weight,
    check_adapters,
    joined,
    parted,
    trained_parameters,
)

QUICK = {"xla_backend_optimization_level": 0}
TINY = Gemma3Config(
    vocab_size=50,
    num_layers=5,
    layers_per_block=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    feed_forward_dim=48,
    query_scale_dim=20,
    sliding_window_tokens=12,
)
"""Two blocks of two layers and a rest of one; no activation of 2 x 24 tokens has the shape of a weight."""
SMALL = replace(TINY, num_layers=2, layers_per_block=1, feed_forward_dim=56)
"""Two blocks of one layer: traced and compiled sooner. Not as wide as there are tokens, 48 in all."""
LORA = LoraConfig(rank=3, alpha=5.0)
FLOAT32 = ComputeConfig(dtype="float32", remat="none", attention="dense")
TOKENS = np.random.default_rng(1).integers(1, 50, (2, 24)).astype(np.int32)
POSITIONS = np.tile(np.r_[np.arange(9), np.arange(15)], (2, 1)).astype(np.int32)
SEGMENTS = np.tile(np.repeat([1, 2], [9, 15]), (2, 1)).astype(np.int32)


def draw_params(config: Gemma3Config) -> tuple[Any, Any]:
    """Weights and adapters, with NumPy; no b is zero, and what they add is about as large as the weights."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale, mean = (0.3, 0.5) if path[-1].key == "scale" else (0.2, 0.0)
        return jnp.asarray(mean + scale * rng.normal(size=leaf.shape), leaf.dtype)

    return parted(jax.tree_util.tree_map_with_path(draw, abstract_params(config, lora=LORA)))


def merged(plain: Any, adapters: Any) -> Any:
    """w + alpha / rank * a b of every weight, written as one matrix product a layer."""
    tree = jax.tree.map(lambda leaf: leaf, plain)
    for name, pair in adapters_by_weight(adapters):
        *parents, last = name.split("/")
        level = tree
        for key in parents:
            level = level[key]
        weight, rank = level[last], LORA.rank
        layers = weight.shape[0] if parents[0] == "blocks" else 1
        a, b = pair["a"].reshape(layers, -1, rank), pair["b"].reshape(layers, rank, -1)
        change = jnp.stack([a[k] @ b[k] for k in range(layers)])
        level[last] = weight + LORA.alpha / LORA.rank * change.reshape(weight.shape)
    return tree


def loss_of(bind: Callable[[Any], Any], params: Any) -> jax.Array:
    model = bind(params)
    hidden = model(TOKENS, positions=POSITIONS, segment_ids=SEGMENTS)
    return -model.cross_entropy(hidden, jnp.roll(TOKENS, -1, 1)).log_probs.mean()


def adapted_loss(
    adapters: Any, plain: Any, config: Gemma3Config = TINY, compute: ComputeConfig = FLOAT32
) -> jax.Array:
    return loss_of(binder(config, compute=compute, lora=LORA), joined(plain, adapters))


def merged_loss(adapters: Any, plain: Any, config: Gemma3Config = TINY) -> jax.Array:
    return loss_of(binder(config, compute=FLOAT32), merged(plain, adapters))


def test_values_and_gradients_are_those_of_merged_weights() -> None:
    """In float32: the loss within 1e-6, each gradient within 1e-4 of its largest (1.1e-5 seen)."""
    plain, adapters = draw_params(TINY)
    ours, theirs = (
        jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(adapters, plain)
        for loss in (adapted_loss, merged_loss)
    )
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(theirs[1]):
        found = ours[1]
        for entry in path:
            found = found[entry.key]
        largest = np.abs(gradient).max()
        assert largest > 1e-5, path
        np.testing.assert_allclose(found, gradient, atol=1e-4 * largest, err_msg=str(path))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_a_weights_size_is_computed_in_the_layers(dtype: Any) -> None:
    """No merged weight and no gradient of one; where the weights have the compute dtype, no copy either."""
    plain, adapters = draw_params(SMALL)
    plain = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, plain)
    compute = ComputeConfig(dtype=dtype, remat="block", attention="blockwise")
    whole = {
        shape
        for leaf in jax.tree.leaves(plain["blocks"])
        for shape in (leaf.shape, leaf.shape[1:])
        if np.prod(shape) >= 32 * 32
    }

    def made(loss: Any) -> set[tuple[int, ...]]:
        traced = jax.make_jaxpr(jax.grad(loss))(adapters, plain)
        return {out.aval.shape for equation in equations(traced.jaxpr) for out in equation.outvars}

    ours = made(partial(adapted_loss, config=SMALL, compute=compute))
    assert (2, 24, 56) in ours
    assert not whole & ours
    assert whole & made(partial(merged_loss, config=SMALL))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_no_bit(dtype: Any) -> None:
    plain, adapters = draw_params(SMALL)
    fresh = jax.tree_util.tree_map_with_path(lambda p, x: x * (p[-1].key != "b"), adapters)
    compute = replace(FLOAT32, dtype=dtype)

    def hidden(lora: LoraConfig | None, params: Any) -> np.ndarray:
        bind = binder(SMALL, compute=compute, lora=lora)
        run = lambda p: bind(p)(TOKENS, positions=POSITIONS, segment_ids=SEGMENTS)  # noqa: E731
        return np.asarray(jax.jit(run, compiler_options=QUICK)(params))

    np.testing.assert_array_equal(hidden(LORA, joined(plain, fresh)), hidden(None, plain))


def test_first_adapters_keep_the_variance_and_have_no_effect() -> None:
    config = replace(TINY, num_layers=1, model_dim=256, feed_forward_dim=512)
    lora = LoraConfig(rank=16)
    draw = jax.jit(lambda key: init_params(key, config, lora=lora), compiler_options=QUICK)
    pairs = dict(adapters_by_weight(parted(draw(jax.random.key(0)))[1]))
    for name, fan_in in (("attention/query", 256), ("attention/output", 64), ("mlp/down", 512)):
        pair = pairs[f"rest/layer_0/{name}"]
        assert np.std(pair["a"]) == pytest.approx(fan_in**-0.5, rel=0.1)
        assert not np.any(pair["b"])


def test_adapters_lie_beside_their_weights_with_labelled_axes() -> None:
    lora = LoraConfig(rank=3, targets=("query", "output", "down"))
    expected = {
        "attention/lora/query/a": ((32, 3), ("embed", "rank")),
        "attention/lora/query/b": ((3, 4, 16), ("rank", "heads", "head_dim")),
        "attention/lora/output/a": ((4, 16, 3), ("heads", "head_dim", "rank")),
        "attention/lora/output/b": ((3, 32), ("rank", "embed")),
        "mlp/lora/down/a": ((48, 3), ("mlp", "rank")),
        "mlp/lora/down/b": ((3, 32), ("rank", "embed")),
    }
    tree, axes = abstract_params(TINY, lora=lora), parameter_axes(TINY, lora=lora)
    plain, adapters = parted(tree)
    assert jax.tree.structure(plain) == jax.tree.structure(abstract_params(TINY))
    assert joined(plain, adapters) == tree and parted(axes)[0] == parameter_axes(TINY)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        names = axes
        for entry in path:
            names = names[entry.key]
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = (leaf.shape, names)
    for name, (shape, names) in expected.items():
        assert found.pop(f"rest/layer_0/{name}") == (shape, names)
        for layer in (0, 1):
            assert found.pop(f"blocks/layer_{layer}/{name}") == ((2, *shape), ("layers", *names))
    assert not found


@pytest.mark.parametrize(
    ("size", "trained"),
    # rank 16 on all seven: layers * 16 * (2 (D + NH) + 2 (D + KH) + 3 (D + F)), by hand.
    [("gemma3_1b", 13_045_760), ("gemma3_4b", 29_802_496), ("gemma3_27b", 113_516_544)],
)
def test_the_trained_parameters_are_counted(size: str, trained: int) -> None:
    config, lora = getattr(sizes, size)(), LoraConfig(rank=16)
    assert trained_parameters(config, lora) == trained
    _, adapters = parted(abstract_params(config, lora=lora))
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == trained
    check_adapters(adapters, config, lora)


def test_adapters_that_are_not_those_of_the_configuration_are_an_error() -> None:
    lora = LoraConfig(rank=3, targets=("query", "down"))
    _, adapters = parted(abstract_params(TINY, lora=lora))
    check_adapters(adapters, TINY, lora)
    for wrong in (replace(lora, targets=("query", "up")), replace(lora, rank=4)):
        with pytest.raises(ValueError, match="LoRA of rank"):
            check_adapters(adapters, TINY, wrong)
    with pytest.raises(ValueError, match="adapters on nothing with 0 parameters"):
        check_adapters({}, TINY, lora)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1"),
        ({"rank": 1.5}, "lora.rank must be a whole number"),
        ({"alpha": 0}, "lora.alpha must be more than 0"),
        ({"targets": ()}, "must name at least one weight"),
        ({"targets": ("query", "query")}, "each only once"),
        ({"targets": ("queries",)}, "has 'queries'; expected some of query, key, .*; did you mean query"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoraConfig(**options)
