"""AdamW with decoupled decay on matrices only, its learning-rate schedules, and clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sealion_jax.checks import check_number
from sealion_jax.errors import UserError

Params = Any
Schedule = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Linear warm-up from 0 to the peak, then half a cosine down to the final rate at the last step."""

    peak_learning_rate: float = 1e-3
    final_learning_rate: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_rates(self.peak_learning_rate, self.final_learning_rate, self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, a constant peak, then a linear decay over the last `decay_steps` steps.

    A run can be prolonged, or cooled down earlier, without changing a step already taken
    (Hu et al. 2024, MiniCPM, arXiv:2404.06395).
    """

    peak_learning_rate: float = 1e-3
    final_learning_rate: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        _check_rates(self.peak_learning_rate, self.final_learning_rate, self.warmup_steps)
        check_number("optimizer.schedule.decay_steps", self.decay_steps, least=0, whole=True)


def _check_rates(peak: float, final: float, warmup_steps: int) -> None:
    check_number("optimizer.schedule.peak_learning_rate", peak, least=0)
    check_number("optimizer.schedule.final_learning_rate", final, least=0)
    if final > peak:
        raise UserError(
            f"learning rates must satisfy 0 <= final ({final}) <= peak ({peak}); "
            "set both in optimizer.schedule"
        )
    check_number("optimizer.schedule.warmup_steps", warmup_steps, least=0, whole=True)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); moments are kept in float32."""

    schedule: CosineSchedule | WarmupStableDecay = field(default_factory=CosineSchedule)
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Per step the decayed weights shrink by learning_rate * weight_decay; norms are never decayed."""
    max_grad_norm: float = 1.0
    """Gradients whose global L2 norm is larger are scaled down to it."""

    def __post_init__(self) -> None:
        check_number("optimizer.beta1", self.beta1, least=0, below=1)
        check_number("optimizer.beta2", self.beta2, least=0, below=1)
        check_number("optimizer.epsilon", self.epsilon, above=0)
        check_number("optimizer.weight_decay", self.weight_decay, least=0)
        check_number("optimizer.max_grad_norm", self.max_grad_norm, above=0)


def learning_rate_schedule(schedule: CosineSchedule | WarmupStableDecay, total_steps: int) -> Schedule:
    """The learning rate as a function of the step's number, counted from 0.

    Step 0 takes `peak / warmup_steps`, step `warmup_steps - 1` the peak, the last step the final rate.
    """
    if schedule.warmup_steps > total_steps:
        raise UserError(
            f"warmup_steps ({schedule.warmup_steps}) is more than the run's steps ({total_steps}); "
            "lower optimizer.schedule.warmup_steps or raise steps"
        )
    peak, final, warmup = schedule.peak_learning_rate, schedule.final_learning_rate, schedule.warmup_steps
    if isinstance(schedule, CosineSchedule):
        first = warmup
    else:
        if warmup + schedule.decay_steps > total_steps:
            raise UserError(
                f"warmup_steps ({warmup}) + decay_steps ({schedule.decay_steps}) is more than the run's "
                f"steps ({total_steps}); lower one of them or raise steps"
            )
        first = total_steps - schedule.decay_steps
    span = max(total_steps - first, 1)

    def rate(step: jax.Array) -> jax.Array:
        number = jnp.asarray(step, jnp.float32)
        # The share of the decay that is done after this step: the last step reaches the final rate.
        done = jnp.clip((number - first + 1) / span, 0.0, 1.0)
        if isinstance(schedule, CosineSchedule):
            decayed = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        else:
            decayed = peak + (final - peak) * done
        warming = peak * (number + 1) / max(warmup, 1)
        return jnp.where(number < warmup, warming, decayed)

    return rate


def decay_mask(params: Params) -> Params:
    """The same tree with True for each matrix and False for each norm scale.

    Chosen by name: a norm's scales stacked over scanned blocks have two dimensions, like a matrix.
    """

    def is_matrix(path: tuple[Any, ...], _leaf: Any) -> bool:
        return path[-1].key != "scale"

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """The update before it is multiplied by minus the learning rate: Adam's direction plus decay."""
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def clip_by_global_norm(gradients: Params, max_norm: float) -> tuple[Params, jax.Array]:
    """The gradients scaled so that their global L2 norm is at most `max_norm`, and the norm before that."""
    norm = optax.global_norm(gradients)
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients), norm
