"""Linear cross-entropy against the formula in NumPy's float64, and what it holds in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sealion_kernels import linear_cross_entropy

B, T, D = 2, 12, 16
QUICK = {"xla_backend_optimization_level": 0}


def problem(vocab: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states, an embedding, targets and a cotangent with zeros, as of masked positions, and signs."""
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    embedding = jnp.asarray(rng.normal(size=(vocab, D)), dtype)
    targets = jnp.asarray(rng.integers(vocab, size=(B, T)), jnp.int32)
    targets = targets.at[0, 0].set(0).at[0, 1].set(vocab - 1)
    cotangent = rng.normal(size=(B, T)) * (rng.random((B, T)) < 0.7)
    return hidden, embedding, targets, jnp.asarray(cotangent, jnp.float32)


def formula(hidden: Any, embedding: Any, targets: Any, cotangent: Any) -> tuple[np.ndarray, ...]:
    """Log-probabilities, and the gradients of sum(cotangent * log_probs), all in float64."""
    h, e, g = (np.asarray(x, np.float64) for x in (hidden, embedding, cotangent))
    logits = h @ e.T
    logits -= logits.max(-1, keepdims=True)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    hit = np.eye(e.shape[0])[np.asarray(targets)]
    d_logits = g[..., None] * (hit - np.exp(log_softmax))
    return (log_softmax * hit).sum(-1), d_logits @ e, np.einsum("btv,btd->vd", d_logits, h)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("vocab", "columns"), [(96, 96), (96, 32), (97, 20), (97, 1), (90, 7)])
def test_equals_the_formula(vocab: int, columns: int, dtype: str) -> None:
    """All logits at once, chunks that divide the vocabulary, chunks that do not, one column a chunk."""
    hidden, embedding, targets, cotangent = problem(vocab, dtype)

    def run(hidden: jax.Array, embedding: jax.Array) -> list[jax.Array]:
        out, vjp = jax.vjp(
            lambda h, e: linear_cross_entropy(h, e, targets, chunk_bytes=B * T * columns * 4),
            hidden,
            embedding,
        )
        return [out, *vjp(cotangent)]

    actual = jax.jit(run, compiler_options=QUICK)(hidden, embedding)
    expected = formula(hidden, embedding, targets, cotangent)
    assert [x.dtype for x in actual] == [jnp.float32, jnp.dtype(dtype), jnp.dtype(dtype)]
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-5)
    bound = 2e-6 if dtype == "float32" else 1e-2
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert np.abs(np.asarray(a, np.float64) - b).max() < bound * np.abs(b).max()


def test_bfloat16_hidden_with_a_float32_embedding_keeps_a_float32_gradient() -> None:
    hidden, _, targets, cotangent = problem(96, "bfloat16")
    embedding = problem(96, "float32")[1]
    loss = lambda h, e: (linear_cross_entropy(h, e, targets, chunk_bytes=B * T * 32 * 4) * cotangent).sum()  # noqa: E731
    d_hidden, d_embedding = jax.jit(jax.grad(loss, (0, 1)), compiler_options=QUICK)(hidden, embedding)
    assert (d_hidden.dtype, d_embedding.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = embedding.astype(jnp.bfloat16)
    expected = formula(hidden, rounded, targets, cotangent)[2]
    assert np.abs(d_embedding - expected).max() < 1e-2 * np.abs(expected).max()
    # Sums over tokens are not rounded to bfloat16.
    assert np.any(d_embedding != d_embedding.astype(jnp.bfloat16).astype(jnp.float32))


def sizes(jaxpr: Any) -> Iterator[int]:
    """Elements of every value of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


def gradients(chunk_bytes: int, shape: tuple[int, int, int], vocab: int) -> Any:
    """The traced gradients for these shapes, and what compiling needs."""
    hidden = jax.ShapeDtypeStruct(shape, jnp.float32)
    embedding = jax.ShapeDtypeStruct((vocab, shape[2]), jnp.float32)
    targets = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    loss = lambda h, e, t: linear_cross_entropy(h, e, t, chunk_bytes=chunk_bytes).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=QUICK).trace(hidden, embedding, targets)


def test_no_array_of_all_logits_and_memory_bounded_by_the_chunk() -> None:
    shape, vocab = (4, 256, 8), 8192
    all_logits = 4 * 256 * vocab
    chunk_bytes = 4 * all_logits // 16
    traced = gradients(chunk_bytes, shape, vocab)
    assert max(sizes(traced.jaxpr.jaxpr)) == all_logits // 16
    memory = traced.lower().compile().memory_analysis().temp_size_in_bytes
    # Logits, their exponentials and their gradient, of one chunk, when nothing is fused.
    assert memory < 5 * chunk_bytes < 4 * all_logits
    # The measure sees what it should: all logits, where a chunk may hold them.
    assert max(sizes(gradients(4 * all_logits, shape, vocab).jaxpr.jaxpr)) == all_logits


def test_a_chunk_that_holds_nothing_is_refused() -> None:
    hidden, embedding, targets, _ = problem(96, "float32")
    with pytest.raises(ValueError, match=f"give at least {B * T * 4}"):
        linear_cross_entropy(hidden, embedding, targets, chunk_bytes=B * T * 4 - 1)
    with pytest.raises(ValueError, match="expected hidden"):
        linear_cross_entropy(hidden, embedding.T, targets)


def test_sharded_batch_and_vocabulary_give_the_same() -> None:
    """Batch over fsdp, the embedding over both axes: each pass moves one chunk of the embedding at a time."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    rng = np.random.default_rng(2)
    vocab = 512
    hidden = rng.normal(size=(8, T, D)).astype(np.float32)
    embedding = rng.normal(size=(vocab, D)).astype(np.float32)
    targets = rng.integers(vocab, size=(8, T)).astype(np.int32)
    cotangent = rng.normal(size=(8, T)).astype(np.float32)

    def run(hidden: Any, embedding: Any, targets: Any, cotangent: Any) -> Any:
        log_probs, vjp = jax.vjp(
            lambda h, e: linear_cross_entropy(h, e, targets, chunk_bytes=8 * T * 64 * 4), hidden, embedding
        )
        return log_probs, *vjp(cotangent)

    rows, table = place("fsdp"), place("tensor", "fsdp")
    layout = {"in_shardings": (rows, table, rows, rows), "out_shardings": (rows, rows, table)}
    arrays = (hidden, embedding, targets, cotangent)
    compiled = jax.jit(run, **layout, compiler_options=QUICK).lower(*arrays).compile()
    arguments = map(jax.device_put, arrays, layout["in_shardings"])
    for actual, expected in zip(
        compiled(*arguments), formula(hidden, embedding, targets, cotangent), strict=True
    ):
        assert np.abs(actual - expected).max() < 2e-6 * np.abs(expected).max()
    gathers = [line for line in (compiled.as_text() or "").splitlines() if " all-gather(" in line]
    assert gathers
    assert not any(f"f32[{vocab},{D}]" in line or f"f32[{vocab // 2},{D}]" in line for line in gathers)
