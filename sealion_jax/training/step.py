"""The pure update: gradients of an objective over microbatches, clipping, AdamW, and a guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sealion_jax.model.gemma3 import Gemma3
from sealion_jax.objectives.base import Batch, Metric, Objective
from sealion_jax.optimizer import Schedule, clip_by_global_norm
from sealion_jax.training.spikes import spike_limit, with_loss
from sealion_jax.training.state import TrainState, whole_model

Bind = Callable[[Any], Gemma3]
"""From parameters, as a nested dict, to the model that computes with them."""


def split_microbatches(batch: Batch, microbatches: int) -> Batch:
    """The batch [B, ...] as [microbatches, B / microbatches, ...].

    Microbatch m takes rows m, m + microbatches, ...: each device's rows are then spread over all microbatches
    and none has to move.
    """

    def split(array: jax.Array) -> jax.Array:
        rows = array.shape[0] // microbatches
        return array.reshape(rows, microbatches, *array.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def loss_and_gradients(
    objective: Objective, bind: Bind, params: Any, batch: Batch, *, microbatches: int, frozen: Any = None
) -> tuple[jax.Array, Any, dict[str, Metric]]:
    """The global batch's loss, its gradients and metrics, summed over microbatches in turn.

    Args:
        frozen: the rest of the model, of which no gradients are taken; None where there is no rest.
    """
    normalisers = objective.normalisers(batch)

    def share(params: Any, microbatch: Batch) -> tuple[jax.Array, dict[str, Metric]]:
        return objective.loss(bind(whole_model(params, frozen)), microbatch, normalisers)

    value_and_grad = jax.value_and_grad(share, has_aux=True)
    if microbatches == 1:
        (loss, metrics), gradients = value_and_grad(params, batch)
        return loss, gradients, metrics

    split = split_microbatches(batch, microbatches)

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        (loss, metrics), gradients = value_and_grad(params, microbatch)
        return jax.tree.map(jnp.add, total, (loss, gradients, metrics)), None

    first = jax.tree.map(lambda array: array[0], split)
    shapes = jax.eval_shape(value_and_grad, params, first)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0][0], shapes[1], shapes[0][1])
    )
    (loss, gradients, metrics), _ = jax.lax.scan(add, zeros, split)
    return loss, gradients, metrics


def make_update(
    objective: Objective,
    bind: Bind,
    transform: optax.GradientTransformation,
    *,
    schedule: Schedule,
    max_grad_norm: float,
    microbatches: int,
    spike_deviations: float | None = None,
) -> Callable[[TrainState, jax.Array, Batch], tuple[TrainState, dict[str, Any]]]:
    """The function (state, number of the step from 0, batch) -> (next state, metrics).

    A loss or gradient norm that is not finite leaves the state as it was and is told as `nonfinite` = 1.
    (`optax.apply_if_finite` lets such an update through after a number of them.) So does a spike, as `spike`
    = 1, where `state.losses` has the losses before.

    Args:
        spike_deviations: what a spike is, see `SpikeConfig`; None where none is looked for.
    """

    def update(state: TrainState, step: jax.Array, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        loss, gradients, metrics = loss_and_gradients(
            objective, bind, state.params, batch, microbatches=microbatches, frozen=state.frozen
        )
        gradients, grad_norm = clip_by_global_norm(gradients, max_grad_norm)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        limit = jnp.inf if spike_deviations is None else spike_limit(state.losses, spike_deviations)
        accepted = finite & (loss <= limit)
        learning_rate = schedule(step)
        direction, optimizer = transform.update(gradients, state.optimizer, state.params)
        params = jax.tree.map(lambda p, d: p - (learning_rate * d).astype(p.dtype), state.params, direction)
        losses = None if spike_deviations is None else with_loss(state.losses, loss)
        proposed = TrainState(params, optimizer, losses=losses)
        before = state._replace(frozen=None)
        kept = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposed, before)
        numbers = {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "nonfinite": 1 - finite.astype(jnp.int32),
            "tokens": jnp.sum(batch["segment_ids"] > 0),
        }
        if spike_deviations is not None:
            numbers |= {"spike": (finite & ~accepted).astype(jnp.int32), "spike_limit": limit}
        return kept._replace(frozen=state.frozen), {**numbers, **metrics}

    return update
