"""Linear cross-entropy against the formula in NumPy's float64, and what it holds in memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sealion_kernels import Split, linear_cross_entropy, lookup, vocabulary

B, T, D = 2, 12, 16
LONG = 80
"""Tokens of a row in which 64, which is worth taking the gradient at once on a CPU, are not all."""
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
            lambda h, e: linear_cross_entropy(h, e, targets, chunk_bytes=B * T * columns * 4).log_probs,
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


@pytest.mark.parametrize("most", [1, 7, 12])
def test_groups_of_tokens_give_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 tokens in groups of 1, of 6, of 12, each against a vocabulary in five chunks."""
    monkeypatch.setattr(vocabulary, "MOST_TOKENS", most)
    hidden, embedding, targets, cotangent = problem(97, "float32")

    def run(hidden: jax.Array, embedding: jax.Array) -> list[jax.Array]:
        chunk_bytes = min(most, 6) * 20 * 4
        out, vjp = jax.vjp(
            lambda h, e: linear_cross_entropy(h, e, targets, chunk_bytes=chunk_bytes).log_probs,
            hidden,
            embedding,
        )
        return [out, *vjp(cotangent)]

    actual = jax.jit(run, compiler_options=QUICK)(hidden, embedding)
    for found, expected in zip(actual, formula(hidden, embedding, targets, cotangent), strict=True):
        assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


def test_bfloat16_hidden_with_a_float32_embedding_keeps_a_float32_gradient() -> None:
    hidden, _, targets, cotangent = problem(96, "bfloat16")
    embedding = problem(96, "float32")[1]

    def loss(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        found = linear_cross_entropy(hidden, embedding, targets, chunk_bytes=B * T * 32 * 4)
        return (found.log_probs * cotangent).sum()

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
    loss = lambda h, e, t: linear_cross_entropy(h, e, t, chunk_bytes=chunk_bytes).log_probs.sum()  # noqa: E731
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


def test_what_does_not_fit_is_refused() -> None:
    hidden, embedding, targets, weights = problem(96, "float32")
    for arrays in (
        (hidden, embedding.T, targets, weights),
        (hidden[0], embedding, targets[0], weights[0]),
        (hidden, embedding, targets[0], weights),
        (hidden, embedding, targets, weights[:, 1:]),
        (hidden, embedding[:0], targets, weights),
    ):
        with pytest.raises(ValueError, match="expected hidden"):
            linear_cross_entropy(*arrays[:3], weights=arrays[3])


@pytest.mark.parametrize("shape", [(0, T), (B, 0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_of_no_tokens_come_no_scores_and_gradients_of_zero(shape: tuple[int, int], weighted: bool) -> None:
    hidden, embedding, targets, weights = problem(96, "float32")
    hidden, targets, weights = (x[: shape[0], : shape[1]] for x in (hidden, targets, weights))

    def run(hidden: jax.Array, embedding: jax.Array) -> Any:
        found = linear_cross_entropy(
            hidden, embedding, targets, weights=weights if weighted else None, observe=True
        )
        return found.log_probs.sum() if found.loss is None else found.loss, found

    (loss, found), gradients = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(hidden, embedding)
    assert loss == 0 and (found.loss is not None) is weighted
    assert {x.shape for x in (found.log_probs, found.log_sum, found.entropy, found.matches)} == {shape}
    assert [x.shape for x in gradients] == [hidden.shape, embedding.shape] and not np.any(gradients[1])


@pytest.mark.parametrize("chunk_tokens", [LONG * B, 20], ids=["at once", "chunks of the vocabulary"])
def test_ids_of_weight_zero_may_be_anything(chunk_tokens: int) -> None:
    """97 rows in chunks of which the last is padded; an id that is none must not meet the padding."""
    rng = np.random.default_rng(5)
    hidden = jnp.asarray(rng.normal(size=(B, LONG, D)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(97, D)), jnp.float32)
    targets, weights = rng.integers(97, size=(B, LONG)), rng.random((B, LONG))
    masked = rng.random((B, LONG)) < 0.3
    weights[masked] = 0.0

    @partial(jax.jit, compiler_options=QUICK)
    def run(targets: jax.Array) -> Any:
        def loss(hidden: jax.Array, embedding: jax.Array) -> Any:
            found = linear_cross_entropy(
                hidden,
                embedding,
                targets,
                weights=jnp.asarray(weights),
                z_loss=0.1,
                observe=True,
                chunk_bytes=chunk_tokens * 97 * 4,
            )
            return found.loss, found

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, embedding)

    (loss, scores), gradients = run(jnp.asarray(targets))
    for anything in (-1, -100, 97, 10**6):
        (found, others), found_gradients = run(jnp.asarray(np.where(masked, anything, targets)))
        assert found == loss
        for one, other in zip(gradients, found_gradients, strict=True):
            np.testing.assert_array_equal(one, other)
        assert all(np.isfinite(x).all() for x in others)
        np.testing.assert_array_equal(others.log_probs[~masked], scores.log_probs[~masked])


def test_entropy_matches_and_log_sum_have_their_formulas_and_gradients() -> None:
    hidden, embedding, targets, cotangent = problem(97, "float32")
    logits = np.asarray(hidden, np.float64) @ np.asarray(embedding, np.float64).T
    targets = targets.at[0].set(jnp.asarray(logits.argmax(-1)[0], jnp.int32))

    def by_chunks(hidden: jax.Array, embedding: jax.Array) -> list[jax.Array]:
        found = linear_cross_entropy(hidden, embedding, targets, observe=True, chunk_bytes=B * T * 20 * 4)
        assert found.entropy is not None and found.matches is not None
        return [found.log_sum, found.entropy, found.matches]

    def by_autodiff(hidden: jax.Array, embedding: jax.Array) -> list[jax.Array]:
        logits = jnp.einsum("BTD,VD->BTV", hidden, embedding)
        log_p = jax.nn.log_softmax(logits)
        matches = (logits.argmax(-1) == targets).astype(jnp.float32)
        return [jax.nn.logsumexp(logits, -1), -(jnp.exp(log_p) * log_p).sum(-1), matches]

    def with_gradients(function: Any) -> list[jax.Array]:
        outputs, vjp = jax.vjp(function, hidden, embedding)
        return [*outputs, *vjp([cotangent, 2 * cotangent, jnp.zeros_like(cotangent)])]

    for found, expected in zip(
        *jax.jit(lambda: (with_gradients(by_chunks), with_gradients(by_autodiff)))(), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert 0 < by_autodiff(hidden, embedding)[2].mean() < 1


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(
    "chunk_tokens",
    [2 * LONG, 70, 20],
    ids=["one chunk", "three chunks of tokens", "chunks of the vocabulary"],
)
def test_a_weighted_loss_and_its_gradients(chunk_tokens: int, z_loss: float) -> None:
    """Taken with the logits or in a second pass: the same numbers, by the formula in float64."""
    vocab = 97
    rng = np.random.default_rng(3)
    hidden, embedding = rng.normal(size=(B, LONG, D)), rng.normal(size=(vocab, D))
    targets, weights = (
        rng.integers(vocab, size=(B, LONG)),
        rng.random((B, LONG)) * (rng.random((B, LONG)) < 0.7),
    )

    def loss(hidden: jax.Array, embedding: jax.Array, weights: jax.Array) -> Any:
        found = linear_cross_entropy(
            hidden,
            embedding,
            jnp.asarray(targets),
            weights=weights,
            z_loss=z_loss,
            observe=True,
            chunk_bytes=chunk_tokens * vocab * 4,
        )
        assert found.loss is not None
        return 3 * found.loss, found

    arguments = [jnp.asarray(x, jnp.float32) for x in (hidden, embedding, weights)]
    (value, scores), gradients = jax.jit(
        jax.value_and_grad(loss, (0, 1, 2), has_aux=True), compiler_options=QUICK
    )(*arguments)
    # The primal function, which takes no gradients, gives the same.
    np.testing.assert_allclose(jax.jit(loss)(*arguments)[0], value, rtol=1e-6)
    log_probs, d_hidden, d_embedding = formula(hidden, embedding, targets, -3 * weights)
    logits = hidden @ embedding.T
    log_sum = np.log(np.exp(logits).sum(-1))
    d_logits = (6 * z_loss * weights * log_sum)[..., None] * np.exp(logits - log_sum[..., None])
    assert float(value) == pytest.approx(3 * np.sum(weights * (z_loss * log_sum**2 - log_probs)), rel=1e-6)
    np.testing.assert_allclose(scores.log_probs, log_probs, atol=1e-5)
    np.testing.assert_allclose(scores.log_sum, log_sum, atol=1e-5)
    d_hidden = d_hidden + d_logits @ embedding
    d_embedding = d_embedding + np.einsum("btv,btd->vd", d_logits, hidden)
    for found, expected in zip(gradients, (d_hidden, d_embedding), strict=False):
        assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()
    assert not np.any(gradients[2])


def test_a_loss_holds_no_more_logits_than_it_may() -> None:
    shape, vocab = (4, 256, 8), 8192
    chunk_bytes = 64 * vocab * 4
    hidden = jax.ShapeDtypeStruct(shape, jnp.float32)
    embedding = jax.ShapeDtypeStruct((vocab, shape[2]), jnp.float32)
    targets = jax.ShapeDtypeStruct(shape[:2], jnp.int32)

    def loss(h: jax.Array, e: jax.Array, t: jax.Array) -> Any:
        weights = jnp.ones(t.shape)
        return linear_cross_entropy(h, e, t, weights=weights, chunk_bytes=chunk_bytes).loss

    traced = jax.jit(jax.grad(loss, (0, 1)), compiler_options=QUICK).trace(hidden, embedding, targets)
    assert max(sizes(traced.jaxpr.jaxpr)) == chunk_bytes // 4


def test_a_z_loss_without_weights_is_refused() -> None:
    hidden, embedding, targets, _ = problem(96, "float32")
    with pytest.raises(ValueError, match="z_loss is a part of the loss"):
        linear_cross_entropy(hidden, embedding, targets, z_loss=1e-4)


SPLITS = {
    "rows": {"rows": ("data", "fsdp")},
    "rows and tokens": {"rows": ("data",), "tokens": ("fsdp",)},
    "tokens": {"rows": (), "tokens": ("data", "fsdp")},
}
"""Which axes split the tokens; `fsdp` splits the embedding's columns besides, and `tensor` its rows."""


@pytest.mark.parametrize("layout_of_tokens", SPLITS)
@pytest.mark.parametrize("at_once", [True, False])
def test_over_a_mesh(at_once: bool, layout_of_tokens: str) -> None:
    """Of the embedding's columns one gather, and of their gradient one scatter."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    split = Split(mesh=mesh, vocab=("tensor",), model=("fsdp",), **SPLITS[layout_of_tokens])
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    rng = np.random.default_rng(2)
    vocab, rows = 512, 8
    hidden = rng.normal(size=(rows, T, D)).astype(np.float32)
    embedding = rng.normal(size=(vocab, D)).astype(np.float32)
    targets = rng.integers(vocab, size=(rows, T)).astype(np.int32)
    weights = rng.normal(size=(rows, T)).astype(np.float32)
    # Logits of each device: 24 tokens, 256 of the vocabulary.
    chunk_bytes = 2 * T * 256 * 4 // (1 if at_once else 4)

    def run(hidden: Any, embedding: Any, targets: Any, weights: Any) -> Any:
        def loss(hidden: jax.Array, embedding: jax.Array) -> Any:
            found = linear_cross_entropy(
                hidden,
                embedding,
                targets,
                weights=weights,
                observe=True,
                chunk_bytes=chunk_bytes,
                split=split,
            )
            return found.loss, found._replace(loss=None)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, embedding)

    by_token, table = place(split.rows or None, split.tokens or None), place("tensor", "fsdp")
    layout = (by_token, table, by_token, by_token)
    arrays = (hidden, embedding, targets, weights)
    compiled = (
        jax.jit(
            run,
            in_shardings=layout,
            out_shardings=((None, by_token), (by_token, table)),
            compiler_options=QUICK,
        )
        .lower(*arrays)
        .compile()
    )
    (value, found), gradients = compiled(*map(jax.device_put, arrays, layout))
    log_probs, d_hidden, d_embedding = formula(hidden, embedding, targets, -weights)
    assert float(value) == pytest.approx(-(weights * log_probs).sum(), rel=1e-4)
    for actual, expected in (
        (found.log_probs, log_probs),
        (gradients[0], d_hidden),
        (gradients[1], d_embedding),
    ):
        assert np.abs(actual - expected).max() < 2e-6 * np.abs(expected).max()
    logits = hidden.astype(np.float64) @ embedding.T.astype(np.float64)
    np.testing.assert_array_equal(found.matches, logits.argmax(-1) == targets)
    p = np.exp(logits - found.log_sum[..., None])
    np.testing.assert_allclose(found.entropy, found.log_sum - (p * logits).sum(-1), atol=1e-4)
    lines = (compiled.as_text() or "").splitlines()
    gathers, scatters = ([x for x in lines if f" {name}(" in x] for name in ("all-gather", "reduce-scatter"))
    assert len(gathers) == 1 and f"f32[{vocab // 2},{D}]" in gathers[0]
    assert len(scatters) == 1 and f"f32[{vocab // 2},{D // 2}]" in scatters[0]


@pytest.mark.parametrize("meshed", [False, True])
def test_lookup_and_its_gradient(meshed: bool) -> None:
    """Rows of the table; tokens that come twice add up, in float32 also when the rows are bfloat16."""
    rng = np.random.default_rng(4)
    table = rng.normal(size=(32, D)).astype(np.float32)
    tokens = rng.integers(32, size=(8, T)).astype(np.int32)
    cotangent = jnp.asarray(rng.normal(size=(8, T, D)), jnp.bfloat16)
    split = None
    if meshed:
        mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        split = Split(mesh=mesh, rows=("data", "fsdp"), vocab=("tensor",), model=("fsdp",))
    rows, vjp = jax.vjp(lambda e: lookup(e, jnp.asarray(tokens), jnp.bfloat16, split), jnp.asarray(table))
    np.testing.assert_array_equal(rows, jnp.asarray(table)[tokens].astype(jnp.bfloat16))
    expected = np.zeros(table.shape)
    np.add.at(expected, tokens, np.asarray(cotangent, np.float64))
    np.testing.assert_allclose(vjp(cotangent)[0], expected, atol=1e-5)
