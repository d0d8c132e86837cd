"""How a model computes over a mesh: the same as on one device, wherever tokens, heads and weights lie."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sealion_jax.arithmetic import EXACT, arithmetic_of, to_input, to_weight
from sealion_jax.layout import Layout, layout_of
from sealion_jax.ring import from_half_runs, to_half_runs
from sealion_jax.sharding import MeshConfig, make_mesh
from sealion_kernels import AttentionMask, flash_attention

T, H = 64, 16
QUICK = {"xla_backend_optimization_level": 0}


def rows(kv_heads: int) -> list[jax.Array]:
    """Query, key, value and a cotangent, in float32."""
    rng = np.random.default_rng(0)
    shapes = [(2, T, 4, H), (2, T, kv_heads, H), (2, T, kv_heads, H), (2, T, 4, H)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


SEGMENTS = jnp.asarray([np.repeat([1, 2, 3], [23, 30, 11]), np.repeat([1, 2, 0], [5, 50, 9])], jnp.int32)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(context=8), MeshConfig(data=2, context=4), MeshConfig(context=2, tensor=4)]
)
@pytest.mark.parametrize("window", [None, 1, 5, 9, 20, 60])
@pytest.mark.parametrize("packed", [True, False])
def test_context_parallel_attention_is_that_of_one_device(
    mesh: MeshConfig, window: int | None, packed: bool
) -> None:
    """Windows inside a device's 8, 16 or 32 tokens, of exactly as many, over several devices, and none."""
    layout = layout_of(make_mesh(replace(mesh, fsdp=1)))
    segments = SEGMENTS if packed else None
    mask = AttentionMask(window=window, query_segments=segments, key_segments=segments)
    *arrays, cotangent = rows(1 if mesh.tensor > 1 else 2)

    def run(attend: Any) -> Any:
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask=mask, scale=0.3), *arrays)
        return out, *vjp(cotangent)

    over_mesh = lambda q, k, v, **options: layout.attention(q, k, v, implementation="blockwise", **options)  # noqa: E731
    found = jax.jit(lambda: run(over_mesh), compiler_options=QUICK)()
    expected = jax.jit(lambda: run(flash_attention), compiler_options=QUICK)()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(("tokens", "implementation"), [(40, "blockwise"), (64, "dense")])
def test_what_cannot_go_round_a_ring_is_fetched_whole(tokens: int, implementation: str) -> None:
    """Runs of five tokens, and scores that are all kept."""
    layout = layout_of(make_mesh(MeshConfig(fsdp=1, context=8)))
    q, k, v, _ = (x[:, :tokens] for x in rows(2))
    segments = SEGMENTS[:, :tokens]
    mask = AttentionMask(query_segments=segments, key_segments=segments)
    found = layout.attention(q, k, v, mask=mask, scale=0.3, implementation=implementation)
    np.testing.assert_allclose(found, flash_attention(q, k, v, mask=mask, scale=0.3), atol=2e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_in_bfloat16_as_exact_as_one_device(window: int | None) -> None:
    """But that each part of a softmax is rounded; sums over a ring's devices are taken in float32."""
    layout = layout_of(make_mesh(MeshConfig(fsdp=1, context=8)))
    mask = AttentionMask(window=window, query_segments=SEGMENTS, key_segments=SEGMENTS)

    def run(attend: Any, dtype: Any) -> list[np.ndarray]:
        *arrays, cotangent = (x.astype(jnp.bfloat16).astype(dtype) for x in rows(2))
        blockwise = lambda q, k, v: attend(q, k, v, mask=mask, scale=0.3, implementation="blockwise")  # noqa: E731

        @partial(jax.jit, compiler_options=QUICK)
        def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            out, vjp = jax.vjp(blockwise, q, k, v)
            return out, *vjp(cotangent)

        return [np.asarray(x, np.float64) for x in both(*arrays)]

    truth = run(flash_attention, jnp.float32)
    over_mesh, one_device = (run(attend, jnp.bfloat16) for attend in (layout.attention, flash_attention))
    for found, usual, true in zip(over_mesh, one_device, truth, strict=True):
        ours, theirs = (float(np.sqrt(np.mean((x - true) ** 2))) for x in (found, usual))
        assert ours < 1.5 * theirs


def test_every_device_of_a_ring_has_a_half_run_from_each_end() -> None:
    """So causality gives all the same work; and they come back as they were."""
    mesh = make_mesh(MeshConfig(fsdp=1, context=8))
    run = PartitionSpec(None, "context")
    tokens = jnp.arange(64)[None]
    here, back = jax.shard_map(
        lambda x: (there := to_half_runs(x, "context"), from_half_runs(there, "context")),
        mesh=mesh,
        in_specs=run,
        out_specs=(run, run),
        check_vma=False,
    )(tokens)
    first, last = np.arange(32).reshape(8, 4), np.arange(32, 64).reshape(8, 4)[::-1]
    np.testing.assert_array_equal(here.reshape(8, 8), np.concatenate([first, last], 1))
    np.testing.assert_array_equal(back, tokens)


def test_a_ring_takes_less_memory_than_one_device() -> None:
    """No device has all keys: for rows of the same length, temporaries are a fraction."""

    def temporary_bytes(devices: int) -> int:
        mesh = make_mesh(MeshConfig(fsdp=1, context=devices), jax.devices()[:devices])
        layout, place = layout_of(mesh), NamedSharding(mesh, PartitionSpec(None, "context"))
        arrays = [
            jax.ShapeDtypeStruct((1, 4096, heads, 16), jnp.float32, sharding=place) for heads in (4, 2, 2)
        ]

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            mask = AttentionMask()
            return layout.attention(q, k, v, mask=mask, scale=0.3, implementation="blockwise").sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=QUICK).lower(*arrays).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary_bytes(8) < temporary_bytes(1) / 2


def test_local_layers_exchange_a_window_and_no_more() -> None:
    """Bytes that move: those of the window's keys and values; on a global layer those of all."""
    mesh = make_mesh(MeshConfig(fsdp=1, context=8))
    layout = layout_of(mesh)
    q, k, v, _ = rows(2)

    def moved(window: int | None) -> set[str]:
        attend = lambda q, k, v: layout.attention(  # noqa: E731
            q, k, v, mask=AttentionMask(window=window), scale=0.3, implementation="blockwise"
        )
        place = NamedSharding(mesh, PartitionSpec(None, "context"))
        compiled = jax.jit(attend, in_shardings=place, out_shardings=place, compiler_options=QUICK)
        lines = (compiled.lower(q, k, v).compile().as_text() or "").splitlines()
        kinds = (" all-gather(", " collective-permute(", " all-to-all(", " all-reduce(")
        found = [line for line in lines if any(kind in line for kind in kinds)]
        return {line.split("= ")[1].split("{")[0] for line in found if "f32" in line.split("= ")[1]}

    assert moved(4) == {"f32[2,3,2,16]"}  # three keys before the first query
    assert moved(9) == {"f32[2,8,2,16]"}  # eight: all of the device before
    # A run of keys at a time; and queries and keys in half-runs, there and back.
    assert moved(None) == {"f32[2,8,2,16]", "f32[2,4,4,16]", "f32[2,4,2,16]"}


def test_what_context_parallelism_cannot_do_is_refused() -> None:
    layout = layout_of(make_mesh(MeshConfig(fsdp=1, context=8)))
    q, k, v, _ = rows(2)
    spans = jnp.ones((2, T), jnp.int32)
    for mask in (AttentionMask(causal=False), AttentionMask(query_spans=spans, key_spans=spans)):
        with pytest.raises(ValueError, match=r"set mesh\.context to 1"):
            layout.attention(q, k, v, mask=mask, scale=0.3)


def test_rows_that_do_not_divide_over_context_stay_whole() -> None:
    """A decoded token is such a row; gradients of the embedding are not counted once for each copy."""
    layout = layout_of(make_mesh(MeshConfig(fsdp=2, context=4)))
    rng = np.random.default_rng(0)
    embedding = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(2, 7, 16)), jnp.float32)
    tokens = jnp.asarray(rng.integers(32, size=(2, 7)), jnp.int32)

    def loss(layout: Layout, embedding: jax.Array) -> jax.Array:
        x = hidden + layout.embed(embedding, tokens, jnp.float32)
        mask = AttentionMask()
        heads = x[:, :, None]
        x += layout.attention(heads, heads, heads, mask=mask, scale=0.3)[:, :, 0]
        return layout.cross_entropy(x, embedding, tokens).log_probs.sum()

    for ours, theirs in zip(
        jax.jit(jax.value_and_grad(lambda e: loss(layout, e)))(embedding),
        jax.jit(jax.value_and_grad(lambda e: loss(Layout(), e)))(embedding),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kv_heads", "heads"), [(2, 4), (2, 8), (1, 4), (4, 8)])
def test_key_value_heads_that_cannot_be_split(kv_heads: int, heads: int) -> None:
    """Over tensor 4: two heads of keys, each for two devices; one for all; four are split as they are."""
    layout = layout_of(make_mesh(MeshConfig(fsdp=2, tensor=4)))
    rng = np.random.default_rng(0)
    shapes = [(2, 12, heads, H), (2, 12, kv_heads, H), (2, 12, kv_heads, H), (2, 12, heads, H)]
    *arrays, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def run(attend: Any) -> Any:
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask=AttentionMask(window=5), scale=0.3), *arrays)
        return out, *vjp(cotangent)

    found = jax.jit(lambda: run(layout.attention), compiler_options=QUICK)()
    for ours, theirs in zip(found, run(flash_attention), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("equation", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF"])
def test_a_product_and_its_gradients_are_those_of_einsum(equation: str) -> None:
    sizes = {"B": 8, "T": 6, "D": 16, "N": 2, "H": 4, "F": 24}
    names = {"D": "embed", "N": "heads", "H": "head_dim", "F": "mlp"}
    of_x, of_weight = equation.split("->", maxsplit=1)[0].split(",")
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=[sizes[n] for n in s]), jnp.float32) for s in (of_x, of_weight))
    axes = tuple(names[letter] for letter in of_weight)

    def run(product: Any) -> Any:
        y, vjp = jax.vjp(product, x, weight)
        return y, *vjp(jnp.cos(y))

    expected = run(lambda x, w: jnp.einsum(equation, x, w))
    for layout in (Layout(), layout_of(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))):
        found = jax.jit(lambda layout=layout: run(lambda x, w: layout.product(equation, x, w, axes)))()
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_gradients_of_weights_are_summed_in_float32() -> None:
    """Of a bfloat16 product with float32 master weights: not rounded to bfloat16 on the way."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 100, 16)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)
    loss = lambda w: Layout().product("BTD,DF->BTF", x, w, ("embed", "mlp")).astype(jnp.float32).sum()  # noqa: E731
    found = np.asarray(jax.grad(loss)(weight))
    expected = np.asarray(x, np.float64).sum((0, 1))[:, None]
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.02), ("fp8", 0.06)])
def test_quantised_products_are_near_exact_ones(quantization: Any, bound: float) -> None:
    """In relative Frobenius norm; with a scale for each token and channel, a large one drowns no other."""
    pytest.importorskip("qwix")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 64)) * np.array([1.0, 1e3] * 4)[None, :, None]
    weight = rng.normal(size=(64, 4, 16)) * np.array([1.0, 1e-3, 1.0, 1e3])[None, :, None]
    x, weight = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)
    d_y = jnp.asarray(rng.normal(size=(2, 8, 4, 16)), jnp.bfloat16)
    equation = "BTD,DNH->BTNH"
    arithmetic = arithmetic_of(quantization)

    def all_three(arithmetic: Any) -> list[np.ndarray]:
        y = arithmetic.forward(equation, x, weight)
        results = (
            y,
            to_input(arithmetic, equation, d_y, weight),
            to_weight(arithmetic, equation, x, d_y),
        )
        return [np.asarray(result, np.float64) for result in results]

    y, d_x, d_weight = all_three(arithmetic)
    exact = all_three(EXACT)
    for token in range(8):
        for head in range(4):
            found, expected = y[:, token, head], exact[0][:, token, head]
            assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)
    assert 1e-4 < np.linalg.norm(d_x - exact[1]) / np.linalg.norm(exact[1]) < 2 * bound
    np.testing.assert_array_equal(d_weight, exact[2])
