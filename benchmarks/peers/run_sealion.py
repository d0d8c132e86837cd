"""A worker that takes sealion_jax's training step: the one that `train` jits, built from a recipe."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from turns import Built, Job, serve

from sealion_jax.checkpoint.hf import load_hf_params
from sealion_jax.data.mixture import MixtureConfig, SourceConfig
from sealion_jax.hardware import set_matmul_precision
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig
from sealion_jax.recipe import TrainConfig
from sealion_jax.run.update import UpdateParts, jitted_update, update_parts
from sealion_jax.sharding import batch_sharding, make_mesh
from sealion_jax.training.state import TrainState, init_optimizer, random_params

SCHEDULED_STEPS = 1_000_000


def recipe(job: Job) -> TrainConfig:
    """The job as a recipe; its data is never read, since the batch comes with the job."""
    schedule = CosineSchedule(peak_learning_rate=job.learning_rate, final_learning_rate=job.learning_rate)
    compute = ComputeConfig(dtype="bfloat16" if job.on_gpu else "float32", remat="none")
    return TrainConfig(
        name="training_step",
        tokenizer="none",
        model=Gemma3Config(**job.model),
        data=MixtureConfig(sources=(SourceConfig(name="batch", store="none", weight=1.0),)),
        compute=replace(compute, **job.options),
        sequence_length_tokens=job.tokens,
        global_batch_size=job.rows,
        steps=SCHEDULED_STEPS,
        optimizer=OptimizerConfig(
            schedule=schedule,
            beta1=job.beta1,
            beta2=job.beta2,
            epsilon=job.epsilon,
            weight_decay=job.weight_decay,
            max_grad_norm=job.max_grad_norm,
        ),
    )


def first_state(parts: UpdateParts, weights: str | None) -> TrainState:
    """The state that the run begins with."""
    wanted = parts.abstract.params
    params = (
        random_params(parts.model, wanted, seed=0) if weights is None else load_hf_params(weights, wanted)
    )
    optimizer = init_optimizer(parts.transform, params, parts.abstract.optimizer)
    return TrainState(params=params, optimizer=optimizer)


def build(job: Job) -> Built:
    """The jitted step, with its state and its batch in place."""
    config = recipe(job)
    assert config.model is not None
    set_matmul_precision(config.compute.dtype)
    mesh = make_mesh(config.mesh)
    parts = update_parts(config, config.model, mesh, num_sources=1)
    state = first_state(parts, job.weights)
    arrays = job.read_batch()
    arrays["loss_mask"] = np.ones((job.rows, job.tokens), np.float32)
    arrays["source"] = np.zeros(job.rows, np.int32)
    batch = {name: jax.device_put(array, batch_sharding(mesh)) for name, array in arrays.items()}
    update, number = jitted_update(parts), 0

    def step() -> float:
        nonlocal state, number
        state, metrics = jax.block_until_ready(update(state, jnp.int32(number), batch))
        number += 1
        return float(metrics["loss"].total / metrics["loss"].weight)

    device = jax.devices()[0]
    compute = config.compute
    return Built(
        step=step,
        versions={name: version(name) for name in ("sealion_jax", "jax", "flax", "optax")},
        settings=f"{compute.dtype}, remat {compute.remat}, attention {compute.attention}",
        same_weights=job.weights is not None,
        peak_bytes=lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"),
    )


if __name__ == "__main__":
    serve(build)
