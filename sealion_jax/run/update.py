"""A recipe's training step on a mesh, jitted; it is made without data and without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from sealion_jax.arithmetic import arithmetic_of
from sealion_jax.errors import UserError
from sealion_jax.hardware import Chip, chip_of_kind
from sealion_jax.layout import layout_of
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.gemma3 import Gemma3, binder
from sealion_jax.objectives.base import Objective
from sealion_jax.objectives.causal_lm import CausalLM
from sealion_jax.objectives.preference import Preference
from sealion_jax.objectives.preference_config import PreferenceConfig
from sealion_jax.optimizer import adamw, learning_rate_schedule
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import batch_sharding, check_tokens_divide, microbatches_on
from sealion_jax.training.state import TrainState, abstract_state, state_shardings
from sealion_jax.training.step import make_update
from sealion_kernels import Target


@dataclass(frozen=True, kw_only=True)
class UpdateParts:
    """What the training step is made of."""

    config: TrainConfig
    model: Gemma3Config
    mesh: Mesh
    transform: optax.GradientTransformation
    abstract: TrainState
    bind: Callable[[Any], Gemma3]
    objective: Objective


def update_parts(config: TrainConfig, model: Gemma3Config, mesh: Mesh, *, num_sources: int) -> UpdateParts:
    """What the recipe's step is made of, for a model on a mesh.

    Args:
        num_sources: of the mixture, for metrics by source.

    Raises:
        UserError: an array does not divide over the mesh; the devices cannot do what `compute` asks for.
    """
    check_tokens_divide(config.sequence_length_tokens, mesh)
    arithmetic_of(config.compute.quantization)  # which may not be installed
    target = Target.of(mesh.devices.flat[0])
    check_compute(config.compute, platform=target.platform, chip=chip_of_kind(target.kind))
    transform = adamw(config.optimizer)
    objective = (
        Preference(config=config.objective, num_sources=num_sources)
        if isinstance(config.objective, PreferenceConfig)
        else CausalLM(num_sources=num_sources, z_loss=config.objective.z_loss)
    )
    return UpdateParts(
        config=config,
        model=model,
        mesh=mesh,
        transform=transform,
        abstract=abstract_state(
            model,
            transform,
            mesh,
            lora=config.lora,
            frozen_dtype=config.compute.dtype,
            losses=None if config.spikes.deviations is None else config.spikes.window_steps,
        ),
        bind=binder(model, compute=config.compute, layout=layout_of(mesh), lora=config.lora),
        objective=objective,
    )


def on_mesh(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    """The recipe with as many microbatches as the mesh needs, and has rows for.

    Raises:
        UserError: the global batch does not divide over the mesh.
    """
    microbatches = microbatches_on(
        mesh,
        global_batch_size=config.global_batch_size,
        least=config.microbatches,
        rows_per_device=config.rows_per_device,
    )
    return replace(config, microbatches=microbatches)


def check_compute(compute: ComputeConfig, *, platform: str, chip: Chip | None) -> None:
    """Raises UserError where the devices cannot do what `compute` asks for.

    Args:
        platform: as `Target` has it: cpu, gpu or tpu.
        chip: None where it is not known, and so nothing of its arithmetic; a CPU, which emulates eight bits.
    """
    if compute.attention in ("tpu", "gpu") and compute.attention != platform:
        raise UserError(
            f"compute.attention {compute.attention} is a kernel for a {compute.attention.upper()}, and the "
            f"devices here are of the kind {platform}, which would interpret it, for hours; take auto, "
            "blockwise or dense"
        )
    kind = compute.quantization
    if chip is not None and kind != "none" and kind not in chip.eight_bits:
        raise UserError(
            f"compute.quantization {kind}: {chip.name} is not known to multiply {kind}, and would emulate "
            f"it; take {' or '.join([*chip.eight_bits, 'none'])}"
        )


def jitted_update(parts: UpdateParts) -> Callable:
    """The jitted step: state sharded in and out in the same way, and donated."""
    config = parts.config
    update = make_update(
        parts.objective,
        parts.bind,
        parts.transform,
        schedule=learning_rate_schedule(config.optimizer.schedule, config.steps),
        max_grad_norm=config.optimizer.max_grad_norm,
        microbatches=config.microbatches,
        spike_deviations=config.spikes.deviations,
    )
    shardings = state_shardings(parts.abstract)
    return jax.jit(
        update,
        in_shardings=(shardings, None, batch_sharding(parts.mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
