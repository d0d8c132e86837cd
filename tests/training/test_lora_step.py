"""The step with adapters: only they move, nothing of the base is copied, and every mesh gives the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.layout import layout_of
from sealion_jax.model.config import ComputeConfig
from sealion_jax.model.gemma3 import abstract_params, binder
from sealion_jax.model.lora import LoraConfig
from sealion_jax.objectives.causal_lm import CausalLM
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig, adamw, learning_rate_schedule
from sealion_jax.sharding import MeshConfig, batch_sharding, make_mesh
from sealion_jax.training.state import (
    TrainState,
    abstract_state,
    init_optimizer,
    random_adapters,
    state_shardings,
)
from sealion_jax.training.step import make_update
from tests.tiny_model import CONFIG

BIG_VOCABULARY = replace(CONFIG, vocab_size=65_536)
"""Its embedding, and so a gradient of it, is larger than all else in a step."""
EMBEDDING_BYTES = 65_536 * 32 * 4
LORA = LoraConfig(rank=4, alpha=8.0)
OPTIMIZER = OptimizerConfig(schedule=CosineSchedule(peak_learning_rate=1e-2))
OBJECTIVE = CausalLM(num_sources=1)


def make_batch(seed: int, rows: int = 16, length: int = 12) -> dict[str, np.ndarray]:
    """Rows that count upwards from anywhere: easily learned."""
    start = np.random.default_rng(seed).integers(4, 60, (rows, 1))
    tokens = (start + np.arange(length + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_mask": np.ones((rows, length), np.float32),
        "source": np.zeros(rows, np.int32),
    }


def make_step(
    mesh_config: MeshConfig,
    devices: int,
    *,
    lora: LoraConfig | None = LORA,
    microbatches: int = 1,
    dtype: Any = "float32",
) -> tuple[Any, TrainState]:
    """The jitted step as a run has it, and the shapes of its state."""
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    transform = adamw(OPTIMIZER)
    abstract = abstract_state(BIG_VOCABULARY, transform, mesh, lora=lora, frozen_dtype=dtype)
    compute = ComputeConfig(
        dtype=dtype, remat="block", attention="dense", logits_bytes_per_device=2**18 // mesh.size
    )
    update = make_update(
        OBJECTIVE,
        binder(BIG_VOCABULARY, compute=compute, layout=layout_of(mesh), lora=lora),
        transform,
        schedule=learning_rate_schedule(OPTIMIZER.schedule, 100),
        max_grad_norm=1.0,
        microbatches=microbatches,
    )
    shardings = state_shardings(abstract)
    step = jax.jit(
        update,
        in_shardings=(shardings, None, batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    return step, abstract


def make_state(abstract: TrainState) -> TrainState:
    """A random base, in the dtypes of `abstract`, with fresh adapters beside it."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.1 if path[-1].key == "scale" else 0.2
        drawn = jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)
        return jax.device_put(drawn, leaf.sharding)

    params = random_adapters(BIG_VOCABULARY, LORA, abstract.params, seed=0)
    return TrainState(
        params=params,
        optimizer=init_optimizer(adamw(OPTIMIZER), params, abstract.optimizer),
        frozen=jax.tree_util.tree_map_with_path(draw, abstract.frozen),
    )


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def losses(step: Any, state: TrainState, count: int) -> tuple[list[float], TrainState]:
    found = []
    for number in range(count):
        state, metrics = step(state, np.int32(number), make_batch(number))
        found.append(float(metrics["loss"].total / metrics["loss"].weight))
    return found, state


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], Any]:
    """Thirty steps on one device: the losses, and what was seen of the state before and after."""
    step, abstract = make_step(MeshConfig(fsdp=1), 1)
    state = make_state(abstract)
    compiled = step.lower(state, np.int32(0), make_batch(0)).compile()
    before = jax.tree.map(np.array, state)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.frozen)]
    found, state = losses(compiled, state, 30)
    return found, (before, places, state, compiled.memory_analysis())


def test_adapters_learn_and_the_base_keeps_every_bit_and_its_place(alone: Any) -> None:
    found, (before, places, after, memory) = alone
    assert found[0] > 11 and found[0] - found[-1] > 3
    for old, new in zip(jax.tree.leaves(before.frozen), jax.tree.leaves(after.frozen), strict=True):
        assert old.tobytes() == np.asarray(new).tobytes()
    for path, old in jax.tree_util.tree_leaves_with_path(before.params):
        new = after.params
        for entry in path:
            new = new[entry.key]
        assert not np.any(old == np.asarray(new)), path
    # Donated and handed on: the same memory all the way.
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.frozen)] == places
    assert memory.alias_size_in_bytes >= bytes_of(before)


@pytest.mark.slow
def test_a_step_needs_no_memory_for_a_gradient_of_the_embedding(alone: Any) -> None:
    """Nor for its moments; the step that trains all weights needs it for all three."""
    _, (_, _, _, memory) = alone
    assert memory.temp_size_in_bytes < EMBEDDING_BYTES
    step, abstract = make_step(MeshConfig(fsdp=1), 1, lora=None)
    assert abstract.frozen is None
    everything = step.lower(abstract, np.int32(0), make_batch(0)).compile().memory_analysis()
    assert everything.temp_size_in_bytes > EMBEDDING_BYTES
    assert everything.argument_size_in_bytes > 2.9 * memory.argument_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "microbatches"), [(MeshConfig(fsdp=8), 2), (MeshConfig(data=2, fsdp=2, tensor=2), 1)]
)
def test_every_mesh_gives_the_same_losses(alone: Any, mesh: MeshConfig, microbatches: int) -> None:
    """Within 1e-5 in float32; weights and adapters are split, the rank is not."""
    step, abstract = make_step(mesh, 8, microbatches=microbatches)
    state = make_state(abstract)
    query = state.params["blocks"]["layer_0"]["attention"]["lora"]["query"]
    parts = {name: leaf.addressable_shards[0].data.shape for name, leaf in query.items()}
    assert parts == {"a": (1, 32 // mesh.fsdp, 4), "b": (1, 4, 4 // mesh.tensor, 8)}
    np.testing.assert_allclose(losses(step, state, 3)[0], alone[0][:3], rtol=1e-5)


def test_the_base_is_held_in_the_compute_dtype_with_float32_norms() -> None:
    _, abstract = make_step(MeshConfig(fsdp=1), 1, dtype="bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.frozen):
        assert leaf.dtype == (jnp.float32 if path[-1].key == "scale" else jnp.bfloat16), path
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract.params)} == {jnp.dtype("float32")}
    assert jax.tree.structure(abstract.frozen) == jax.tree.structure(abstract_params(BIG_VOCABULARY))
    assert jax.tree.structure(abstract.weights) == jax.tree.structure(
        abstract_params(BIG_VOCABULARY, lora=LORA)
    )
    moments = [leaf for leaf in jax.tree.leaves(abstract.optimizer) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(abstract.params))


def test_the_same_seed_draws_the_same_adapters_on_any_mesh() -> None:
    _, one = make_step(MeshConfig(fsdp=1), 1)
    _, eight = make_step(MeshConfig(fsdp=4, tensor=2), 8)
    first, second = (
        random_adapters(BIG_VOCABULARY, LORA, abstract.params, seed=3) for abstract in (one, eight)
    )
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    other = random_adapters(BIG_VOCABULARY, LORA, one.params, seed=4)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
