"""The training state: what is updated by a step, how it is sharded, and how it begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.gemma3 import (
    Params,
    abstract_params,
    init_params,
    parameter_axes,
    with_matrices_in,
)
from sealion_jax.model.lora import LoraConfig, check_adapters, joined, parted
from sealion_jax.sharding import param_shardings, replicated, with_shardings


class TrainState(NamedTuple):
    """What a step updates, and what it only reads; the step's number is kept by the loop."""

    params: Any
    """Float32 master weights; with LoRA those of the adapters alone."""
    optimizer: Any
    """Of these."""
    frozen: Any = None
    """With LoRA the weights that the adapters stand beside: never updated, never saved."""
    losses: Any = None
    """[W] of the last updates, oldest first, where the run looks for spikes (spikes.py)."""

    @property
    def weights(self) -> Params:
        """The whole model's parameters, as `bind` wants them."""
        return whole_model(self.params, self.frozen)


def whole_model(params: Any, frozen: Any) -> Params:
    """What is trained, together with what is not (None where everything is)."""
    return params if frozen is None else joined(frozen, params)


def abstract_weights(config: Gemma3Config, mesh: Mesh, *, lora: LoraConfig | None = None) -> Any:
    """Shapes, dtypes and shardings of float32 parameters."""
    params = abstract_params(config, jnp.float32, lora=lora)
    return with_shardings(params, param_shardings(params, parameter_axes(config, lora=lora), mesh))


def abstract_state(
    config: Gemma3Config,
    transform: optax.GradientTransformation,
    mesh: Mesh,
    *,
    lora: LoraConfig | None = None,
    frozen_dtype: jax.typing.DTypeLike = jnp.float32,
    losses: int | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of the whole state, without making any of it.

    Adam's moments lie where their parameters lie; its counters are copied to every device.

    Args:
        frozen_dtype: of the matrices that LoRA leaves as they are: the compute dtype, to which they would be
            cast anyway. Norms stay float32.
        losses: of so many updates are kept; None keeps none.
    """
    params, frozen = abstract_weights(config, mesh, lora=lora), None
    if lora is not None:
        frozen, params = parted(params)
        check_adapters(params, config, lora)
        frozen = with_matrices_in(frozen, frozen_dtype)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
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
    window = None
    if losses is not None:
        window = jax.ShapeDtypeStruct((losses,), jnp.float32, sharding=replicated(mesh))
    return TrainState(params=params, optimizer=optimizer, frozen=frozen, losses=window)


def state_shardings(abstract: TrainState) -> TrainState:
    """The sharding of each leaf of an abstract state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def random_params(config: Gemma3Config, abstract: Any, *, seed: int) -> Any:
    """Freshly drawn weights, made where they lie; the same for every mesh."""
    return _draw(lambda key: init_params(key, config), abstract, seed)


def random_adapters(config: Gemma3Config, lora: LoraConfig, abstract: Any, *, seed: int) -> Any:
    """Freshly drawn adapters, which do nothing yet; the weights beside them are not made."""
    return _draw(lambda key: parted(init_params(key, config, lora=lora))[1], abstract, seed)


def _draw(make: Callable[[jax.Array], Any], abstract: Any, seed: int) -> Any:
    """What `make` gives for a key of this seed, as `abstract` wants it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # On a CPU, compiling the draws with optimisation takes ten times as long as without, to run once.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    draw = jax.jit(make, out_shardings=shardings, compiler_options=options)
    return draw(jax.random.key(seed))


def init_optimizer(transform: optax.GradientTransformation, params: Any, abstract: Any) -> Any:
    """The optimizer's first state, made where it lies."""
    return jax.jit(transform.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(params)
