"""The update: microbatches add up to the batch, meshes agree, and what is not finite changes nothing."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sealion_jax.hardware import set_matmul_precision
from sealion_jax.layout import layout_of
from sealion_jax.model.config import ComputeConfig
from sealion_jax.model.gemma3 import binder, init_params
from sealion_jax.objectives.causal_lm import CausalLM
from sealion_jax.optimizer import OptimizerConfig, adamw, learning_rate_schedule
from sealion_jax.sharding import MeshConfig, batch_sharding, make_mesh
from sealion_jax.training.state import abstract_state, init_optimizer, random_params, state_shardings
from sealion_jax.training.step import loss_and_gradients, make_update, split_microbatches
from tests.tiny_model import CONFIG

OBJECTIVE = CausalLM(num_sources=3)
BIND = binder(CONFIG, compute=ComputeConfig(dtype="float32", remat="none"))


def make_batch(rows: int = 8, length: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two segments and padding, with very unequal numbers of learned tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 96, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[:, 7:] = 2
    positions = np.broadcast_to(np.r_[np.arange(7), np.arange(length - 7)], (rows, length)).astype(np.int32)
    mask = np.ones((rows, length), np.float32)
    mask[:, 6] = 0
    for row in range(rows):
        padding = int(rng.integers(0, length - 1)) if row % 2 else 0
        segments[row, length - padding :] = 0
        mask[row, length - padding :] = 0
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments,
        "positions": positions,
        "loss_mask": mask,
        "source": np.arange(rows, dtype=np.int32) % 3,
    }


def relative(a, b) -> float:
    return max(
        float(jnp.max(jnp.abs(x - y)) / (jnp.max(jnp.abs(x)) + 1e-12))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


def test_microbatches_keep_rows_on_their_devices():
    batch = split_microbatches({"x": jnp.arange(8)}, 2)["x"]
    np.testing.assert_array_equal(batch, [[0, 2, 4, 6], [1, 3, 5, 7]])


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_equal_one_batch_with_unequal_token_counts(params, microbatches):
    batch = make_batch()
    one = jax.jit(lambda p: loss_and_gradients(OBJECTIVE, BIND, p, batch, microbatches=1))(params)
    many = jax.jit(lambda p: loss_and_gradients(OBJECTIVE, BIND, p, batch, microbatches=microbatches))(params)
    assert float(one[0]) == pytest.approx(float(many[0]), rel=1e-6)
    assert relative(one[1], many[1]) < 1e-5
    assert relative(one[2], many[2]) < 1e-6
    # A mean of the microbatches' means is another number: the token counts differ.
    loss = jax.jit(lambda p, part: OBJECTIVE.loss(BIND(p), part, OBJECTIVE.normalisers(part))[0])
    split = split_microbatches(batch, microbatches)
    parts = [loss(params, {name: a[m] for name, a in split.items()}) for m in range(microbatches)]
    assert abs(float(np.mean(parts)) - float(one[0])) > 1e-3


def _all_log_probs(params, batch):
    model = BIND(params)
    hidden = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    return jax.nn.log_softmax(model.logits(hidden))


def test_loss_is_the_mean_over_learned_tokens_and_by_source(params):
    batch = make_batch()
    loss, _, metrics = jax.jit(lambda p: loss_and_gradients(OBJECTIVE, BIND, p, batch, microbatches=1))(
        params
    )
    log_probs = np.asarray(jax.jit(_all_log_probs)(params, batch), np.float64)
    nats = -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0] * batch["loss_mask"]
    assert float(loss) == pytest.approx(nats.sum() / batch["loss_mask"].sum(), rel=1e-5)
    for source in range(3):
        rows = batch["source"] == source
        total, weight = (part[source] for part in metrics["loss_by_source"])
        assert float(total) == pytest.approx(nats[rows].sum(), rel=1e-5)
        assert float(weight) == batch["loss_mask"][rows].sum()


OPTIMIZER = OptimizerConfig()


def _updater(mesh_config: MeshConfig, devices: int, microbatches: int = 1, dtype: str = "float32"):
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    transform = adamw(OPTIMIZER)
    abstract = abstract_state(CONFIG, transform, mesh)
    update = make_update(
        OBJECTIVE,
        binder(
            CONFIG,
            compute=ComputeConfig(dtype=dtype, remat="none"),
            layout=layout_of(mesh),
        ),
        transform,
        schedule=learning_rate_schedule(OPTIMIZER.schedule, 100),
        max_grad_norm=1.0,
        microbatches=microbatches,
    )
    shardings = state_shardings(abstract)
    jitted = jax.jit(
        update,
        in_shardings=(shardings, None, batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    params = random_params(CONFIG, abstract.params, seed=0)
    return jitted, abstract._replace(
        params=params, optimizer=init_optimizer(transform, params, abstract.optimizer)
    )


def _three_losses(mesh_config: MeshConfig, devices: int, microbatches: int = 1) -> list[float]:
    update, state = _updater(mesh_config, devices, microbatches)
    losses = []
    for step in range(3):
        state, metrics = update(state, np.int32(step), make_batch(16, seed=step))
        losses.append(float(metrics["loss"].total / metrics["loss"].weight))
    return losses


def test_every_mesh_gives_the_same_losses():
    alone = _three_losses(MeshConfig(fsdp=1), 1)
    for mesh, microbatches in (
        (MeshConfig(fsdp=8), 2),
        (MeshConfig(fsdp=4, tensor=2), 1),
        (MeshConfig(data=2, fsdp=4), 1),
        (MeshConfig(fsdp=4, context=2), 2),
    ):
        np.testing.assert_allclose(_three_losses(mesh, 8, microbatches), alone, rtol=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    update, state = _updater(MeshConfig(), 1)
    batch = make_batch()
    state, metrics = update(state, np.int32(0), batch)
    assert int(metrics["nonfinite"]) == 0
    good = jax.tree.map(np.asarray, state)
    # An infinite weight of the loss stands for an overflow anywhere in the step.
    broken = {**batch, "loss_mask": batch["loss_mask"].copy()}
    broken["loss_mask"][0, 0] = np.inf
    for step in range(1, 12):
        state, metrics = update(state, np.int32(step), broken)
        assert int(metrics["nonfinite"]) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), good)
    state, metrics = update(state, np.int32(12), batch)
    assert int(metrics["nonfinite"]) == 0
    assert relative(state.params, good.params) > 0


@pytest.fixture
def precision():
    """JAX's matmul precision, set back after the test."""
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.usefixtures("precision")
def test_float32_means_float32_in_every_matmul_of_the_step():
    """Forward and backward, of the kernels' own rules too; JAX alone takes TF32 on GPUs, bfloat16 on TPUs."""

    def precisions(dtype: str) -> set[str]:
        set_matmul_precision(dtype)
        update, state = _updater(MeshConfig(), 1, dtype=dtype)
        text = update.lower(state, np.int32(0), make_batch()).as_text()
        products = re.findall(r"stablehlo\.dot_general.*", text)
        assert len(products) > 30
        return {"".join(re.findall(r"precision = \[(\w+), \1\]", product)) for product in products}

    assert precisions("float32") == {"HIGHEST"}
    assert precisions("bfloat16") == {"DEFAULT"}


def test_update_equals_optax_on_the_plain_loss(params):
    update, state = _updater(MeshConfig(), 1)
    batch = make_batch()

    def plain(params):
        picked = jnp.take_along_axis(_all_log_probs(params, batch), batch["targets"][..., None], -1)[..., 0]
        return -jnp.sum(picked * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])

    initial = jax.tree.map(jnp.array, state.params)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            learning_rate_schedule(OPTIMIZER.schedule, 100),
            b1=OPTIMIZER.beta1,
            b2=OPTIMIZER.beta2,
            eps=OPTIMIZER.epsilon,
            weight_decay=OPTIMIZER.weight_decay,
            mask=lambda p: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", p),
        ),
    )

    @jax.jit
    def expected_params(params):
        updates, _ = reference.update(jax.grad(plain)(params), reference.init(params), params)
        return optax.apply_updates(params, updates)

    expected = expected_params(initial)
    state, _ = update(state, np.int32(0), batch)
    moved = jax.tree.map(lambda a, b: a - b, state.params, initial)
    wanted = jax.tree.map(lambda a, b: a - b, expected, initial)
    # Adam's first step is about the gradient's sign: only where the gradient is not near zero.
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True):
        close = np.isclose(a, b, rtol=1e-3, atol=1e-6)
        assert close.mean() > 0.999
