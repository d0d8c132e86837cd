"""The model's own promises: its tree, packing, rematerialisation, meshes, a graph as deep as one block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.errors import UserError
from sealion_jax.layout import Layout, layout_of
from sealion_jax.model import config as sizes
from sealion_jax.model.config import TENSORS, ComputeConfig, Gemma3Config, Remat
from sealion_jax.model.gemma3 import abstract_params, binder, init_params, parameter_axes
from sealion_jax.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings

QUICK = {"xla_backend_optimization_level": 0}
T = 140

TINY = Gemma3Config(
    vocab_size=50,
    num_layers=5,
    layers_per_block=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    feed_forward_dim=48,
    query_scale_dim=20,
    sliding_window_tokens=12,
    global_rope_factor=8.0,
)


@pytest.fixture(scope="module")
def params() -> Any:
    """Drawn with NumPy (which needs no compiling), norms among them, attention peaked."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale, mean = (0.3, 0.5) if "scale" in jax.tree_util.keystr(path) else (0.2, 0.0)
        return jnp.asarray(mean + scale * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(TINY))


def hidden_of(attention: Any) -> Callable[..., np.ndarray]:
    """Hidden states, in float32, of any rows; compiled once a shape."""
    bind = binder(TINY, compute=ComputeConfig(dtype="float32", remat="none", attention=attention))

    @jax.jit
    def run(params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        return bind(params)(tokens, positions=positions, segment_ids=segments)

    return lambda params, *rows: np.asarray(run(params, *map(jnp.asarray, rows)))


def packed_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row of documents of 31, 70, 22 and 1 tokens and 16 of padding; one of a single document."""
    lengths = [31, 70, 22, 1]
    segments = np.repeat([1, 2, 3, 4, 0], [*lengths, T - sum(lengths)])
    positions = np.concatenate([np.arange(n) for n in [*lengths, T - sum(lengths)]])
    tokens = np.random.default_rng(1).integers(1, 50, size=(2, T))
    tokens[0, segments == 0] = 0
    positions, segments = np.stack([positions, np.arange(T)]), np.stack([segments, np.ones(T, int)])
    return tokens.astype(np.int32), positions.astype(np.int32), segments.astype(np.int32)


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
def test_packed_documents_equal_documents_alone(params: Any, attention: Any) -> None:
    """Position by position; and no bit of one document depends on another, or on the padding."""
    run = hidden_of(attention)
    tokens, positions, segments = packed_rows()
    packed = run(params, tokens, positions, segments)
    for document in (1, 2, 3, 4):
        inside = segments[0] == document
        alone = np.zeros((2, T), np.int32)
        alone[0, : inside.sum()] = tokens[0, inside]
        row = np.arange(T, dtype=np.int32)[None].repeat(2, 0)
        whole = run(params, alone, row, (row < inside.sum()).astype(np.int32))
        np.testing.assert_allclose(packed[0, inside], whole[0, : inside.sum()], atol=2e-5)

    other = tokens.copy()
    changed = (segments == 2) | (segments == 0)
    other[changed] = (other[changed] + 7) % 50
    after = run(params, other, positions, segments)
    np.testing.assert_array_equal(packed[~changed], after[~changed])
    assert np.abs(packed[changed] - after[changed]).max() > 0.1


@pytest.mark.slow
def test_every_remat_policy_gives_the_same_gradients(params: Any) -> None:
    """And `dots` computes no product and no attention again; `layer` and `block` do, but not what is kept by
    name or offloaded."""
    tokens, positions, segments = map(jnp.asarray, packed_rows())

    def gradients(remat: Remat, **options: Any) -> tuple[Any, int, int]:
        compute = ComputeConfig(dtype="float32", remat=remat, attention="blockwise", **options)
        bind = binder(TINY, compute=compute)
        weights = jnp.cos(jnp.arange(TINY.model_dim))

        def loss(params: Any) -> jax.Array:
            return (bind(params)(tokens, positions=positions, segment_ids=segments) * weights).sum()

        compiled = jax.jit(jax.grad(loss), compiler_options=QUICK).lower(params).compile()
        text = compiled.as_text() or ""
        return compiled(params), text.count(" while("), text.count(" dot(")

    expected, loops, products = gradients("none")

    def assert_close(actual: Any) -> None:
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())

    policies: tuple[Remat, ...] = ("dots", "layer", "block")
    for remat in policies:
        actual, *counts = gradients(remat)
        assert (counts == [loops, products]) == (remat == "dots")
        assert_close(actual)
    # With attention and what it reads kept by name, it is not computed again; with all named, nothing is.
    by_layer = gradients("layer")
    attention = gradients("layer", keep=("query", "key", "value", "attention"))
    everything = gradients("layer", keep=TENSORS)
    offloaded = gradients("layer", offload=TENSORS)
    assert attention[1] == loops < by_layer[1]
    assert everything[1:] == offloaded[1:] == (loops, products)
    assert products < attention[2] < by_layer[2]
    for actual, *_ in (attention, everything, offloaded):
        assert_close(actual)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": ("querry",)}, "compute.keep: 'querry' is none of query"),
        ({"keep": ("query",), "offload": ("query",)}, "both name query"),
        ({"remat": "dots", "keep": ("query",)}, "are for compute.remat layer and block"),
    ],
)
def test_what_cannot_be_kept_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ComputeConfig(**wrong)


@pytest.mark.slow
def test_a_mesh_gives_the_same_gradients(params: Any) -> None:
    """Weights and activations split over both axes, the single key-value head copied."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices()[:8])
    config = replace(TINY, vocab_size=48)
    params = {**params, "embedder": {"embedding": params["embedder"]["embedding"][:48]}}
    rows = tuple(np.tile(row % 48, (2, 1)) for row in packed_rows())
    compute = ComputeConfig(
        dtype="float32", remat="layer", attention="blockwise", logits_bytes_per_device=4 * T * 16 * 4
    )

    def gradients(layout: Any) -> Callable[..., Any]:
        bind = binder(config, compute=compute, layout=layout)

        def loss(params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
            model = bind(params)
            hidden = model(tokens, positions=positions, segment_ids=segments)
            return model.cross_entropy(hidden, tokens).log_probs.mean()

        return jax.grad(loss)

    expected = jax.jit(gradients(None), compiler_options=QUICK)(params, *rows)
    shardings = param_shardings(params, parameter_axes(config), mesh)
    places = (shardings, *[batch_sharding(mesh)] * 3)
    step = jax.jit(
        gradients(layout_of(mesh)),
        in_shardings=places,
        out_shardings=shardings,
        compiler_options=QUICK,
    )
    actual = step(*map(jax.device_put, (params, *rows), places))
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def traced_equations(config: Gemma3Config, compute: ComputeConfig) -> int:
    bind = binder(config, compute=compute)
    rows = jax.ShapeDtypeStruct((1, T), jnp.int32)
    loss = lambda p, x: bind(p)(x, positions=x, segment_ids=x).astype(jnp.float32).sum()  # noqa: E731
    return str(jax.make_jaxpr(jax.grad(loss))(abstract_params(config), rows)).count("\n")


def test_the_graph_does_not_grow_with_depth() -> None:
    compute = ComputeConfig(remat="block")
    shallow, deep = (
        traced_equations(replace(TINY, num_layers=n, layers_per_block=2), compute) for n in (4, 40)
    )
    assert deep == shallow


def saved_bytes(params: Any, remat: Remat) -> int:
    """Bytes that the forward pass hands to the backward pass; parameters, the same for all, among them."""
    bind = binder(TINY, compute=ComputeConfig(dtype="float32", remat=remat, attention="blockwise"))
    tokens, positions, segments = map(jnp.asarray, packed_rows())
    model_loss = lambda p: bind(p)(tokens, positions=positions, segment_ids=segments).sum()  # noqa: E731
    _, vjp = jax.eval_shape(lambda p: jax.vjp(model_loss, p), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))


def test_each_remat_policy_keeps_less_than_the_one_before(params: Any) -> None:
    kept = [saved_bytes(params, remat) for remat in ("none", "dots", "layer", "block")]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


def test_parameters_are_named_shaped_and_labelled_as_agreed() -> None:
    """TINY is two blocks of two and a rest of one."""
    layer = {
        "attention/query": ((32, 4, 16), ("embed", "heads", "head_dim")),
        "attention/key": ((32, 1, 16), ("embed", "kv_heads", "head_dim")),
        "attention/value": ((32, 1, 16), ("embed", "kv_heads", "head_dim")),
        "attention/output": ((4, 16, 32), ("heads", "head_dim", "embed")),
        "attention/query_norm/scale": ((16,), ("head_dim",)),
        "attention/key_norm/scale": ((16,), ("head_dim",)),
        "mlp/gate": ((32, 48), ("embed", "mlp")),
        "mlp/up": ((32, 48), ("embed", "mlp")),
        "mlp/down": ((48, 32), ("mlp", "embed")),
        "pre_attention_norm/scale": ((32,), ("norm",)),
        "post_attention_norm/scale": ((32,), ("norm",)),
        "pre_mlp_norm/scale": ((32,), ("norm",)),
        "post_mlp_norm/scale": ((32,), ("norm",)),
    }
    expected = {"embedder/embedding": ((50, 32), ("vocab", "embed")), "final_norm/scale": ((32,), ("norm",))}
    for name, (shape, axes) in layer.items():
        expected[f"rest/layer_0/{name}"] = (shape, axes)
        for j in (0, 1):
            expected[f"blocks/layer_{j}/{name}"] = ((2, *shape), ("layers", *axes))

    def named(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

    shapes = named(abstract_params(TINY, jnp.bfloat16))
    axes = named(parameter_axes(TINY), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert {name: (leaf.shape, axes[name]) for name, leaf in shapes.items()} == expected
    assert {leaf.dtype for leaf in shapes.values()} == {jnp.dtype(jnp.bfloat16)}


def test_blocks_or_rest_are_absent_where_there_are_none() -> None:
    assert "rest" not in abstract_params(replace(TINY, num_layers=4))
    assert "blocks" not in abstract_params(replace(TINY, num_layers=1))


@pytest.mark.parametrize(
    ("size", "parameters"),
    # The counts of Transformers' models of the published configurations.
    [
        ("gemma3_270m", 268_098_176),
        ("gemma3_1b", 999_885_952),
        ("gemma3_4b", 3_880_263_168),
        ("gemma3_12b", 11_766_034_176),
        ("gemma3_27b", 27_009_346_304),
    ],
)
def test_all_five_sizes_have_the_published_number_of_parameters(size: str, parameters: int) -> None:
    tree = abstract_params(getattr(sizes, size)())
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters


def test_first_parameters_give_unit_variance() -> None:
    config = replace(TINY, vocab_size=400, num_layers=1)
    draw = jax.jit(lambda key: init_params(key, config), compiler_options=QUICK)
    tree = draw(jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, tree) == jax.tree.map(
        lambda leaf: leaf.shape, abstract_params(config)
    )
    assert not any(
        np.any(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "scale" in str(path[-1])
    )
    assert np.std(tree["embedder"]["embedding"]) == pytest.approx(32**-0.5, rel=0.05)
    assert np.std(tree["rest"]["layer_0"]["mlp"]["down"]) == pytest.approx(48**-0.5, rel=0.1)
    assert np.std(tree["rest"]["layer_0"]["attention"]["output"]) == pytest.approx(64**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("width", "factor"), [(640, 25.25), (1152, 34.0), (2560, 50.5), (3840, 62.0), (5376, 73.5)]
)
def test_the_embedding_factor_is_rounded_to_bfloat16(width: int, factor: float) -> None:
    config = replace(TINY, vocab_size=2, num_layers=1, model_dim=width)
    model = binder(config)(jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), abstract_params(config)))
    assert (
        float(model.embedder(jnp.zeros((1, 1), jnp.int32), dtype="bfloat16", layout=Layout())[0, 0, 0])
        == factor
    )


def test_float16_is_refused() -> None:
    options: Any = {"dtype": "float16"}
    with pytest.raises(UserError, match="float16 overflows"):
        ComputeConfig(**options)
