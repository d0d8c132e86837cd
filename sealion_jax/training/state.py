"""The training state: what is updated by a step, how it is sharded, and how it begins."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.gemma3 import abstract_params, init_params, parameter_axes
from sealion_jax.sharding import param_shardings, replicated, with_shardings


class TrainState(NamedTuple):
    """Float32 master weights and the optimizer's state; the step's number is kept by the loop."""

    params: Any
    optimizer: Any


def abstract_state(config: Gemma3Config, transform: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the whole state, without making any of it.

    Adam's moments lie where their parameters lie; its counters are copied to every device.
    """
    params = abstract_params(config, jnp.float32)
    shardings = param_shardings(params, parameter_axes(config), mesh)
    params = with_shardings(params, shardings)
    optimizer = jax.eval_shape(transform.init, params)
    optimizer = optax.tree_map_params(
        transform,
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        optimizer,
        shardings,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=replicated(mesh)
        ),
    )
    return TrainState(params=params, optimizer=optimizer)


def state_shardings(abstract: TrainState) -> TrainState:
    """The sharding of each leaf of an abstract state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def random_params(config: Gemma3Config, abstract: Any, *, seed: int) -> Any:
    """Freshly drawn weights, made where they lie; the same for every mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # On a CPU, compiling the draws with optimisation takes ten times as long as without, to run once.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    draw = jax.jit(lambda key: init_params(key, config), out_shardings=shardings, compiler_options=options)
    return draw(jax.random.key(seed))


def init_optimizer(transform: optax.GradientTransformation, params: Any, abstract: Any) -> Any:
    """The optimizer's first state, made where it lies."""
    return jax.jit(transform.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(params)
