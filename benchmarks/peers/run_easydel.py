"""A worker that takes EasyDeL's training step of its Gemma 3, jitted as its Trainer jits it."""

from __future__ import annotations

import json
import os
import tempfile

# EasyDeL reads these while it is imported.
os.environ.setdefault("ENABLE_DISTRIBUTED_INIT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from importlib.metadata import version
from pathlib import Path
from typing import Any

import easydel
import jax
import jax.numpy as jnp
import optax
from easydel.infra.loss_utils import LossConfig
from easydel.trainers.trainer._fn import training_step
from turns import Built, Job, serve

CONFIG = "config.json"


def with_its_window(weights: str, folder: Path) -> Path:
    """The same weights with a window one less: of a window of w it lets a query see w keys before its own."""
    for file in Path(weights).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / CONFIG).read_text())
    config["sliding_window"] -= 1
    (folder / CONFIG).unlink()
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def load(job: Job, attention: str, folder: Path) -> Any:
    """The model in float32 with the job's weights, nothing recomputed."""
    assert job.weights is not None
    return easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        str(with_its_window(job.weights, folder)),
        from_torch=True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        precision=jax.lax.Precision.DEFAULT,
        config_kwargs={
            "attn_mechanism": attention,
            "attn_dtype": jnp.float32,
            "attn_softmax_dtype": jnp.float32,
            "gradient_checkpointing": easydel.EasyDeLGradientCheckPointers.NONE,
        },
        verbose=False,
    )


def optimizer(job: Job) -> optax.GradientTransformation:
    """Clipping and AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(job.max_grad_norm),
        optax.adamw(
            job.learning_rate,
            b1=job.beta1,
            b2=job.beta2,
            eps=job.epsilon,
            weight_decay=job.weight_decay,
            mask=lambda params: jax.tree.map(lambda weight: weight.ndim > 1, params),
        ),
    )


def build(job: Job) -> Built:
    """The step, with its state and its batch in place."""
    attention = job.options.get("attention", "sdpa")
    with tempfile.TemporaryDirectory() as folder:
        model = load(job, attention, Path(folder))
    state = easydel.EasyDeLState.create(model=model, tx=optimizer(job), init_opt_state=True)
    arrays = job.read_batch()
    batch = {
        "input_ids": jnp.asarray(arrays["tokens"]),
        "labels": jnp.asarray(arrays["targets"]),
        "attention_mask": jnp.ones_like(jnp.asarray(arrays["tokens"])),
    }
    losses = LossConfig(shift_tokens=False)
    update = jax.jit(training_step, static_argnums=(2, 3, 4, 5, 6), donate_argnums=0)

    def step() -> float:
        nonlocal state
        with model.mesh:
            state, metrics = update(state, batch, losses, None, None, 1, None)
        jax.block_until_ready((state, metrics))
        return float(metrics.loss)

    return Built(
        step=step,
        versions={"easydel": version("easydel"), "jax": jax.__version__},
        settings=f"its Trainer's step, attention {attention}, nothing recomputed",
        same_weights=True,
    )


if __name__ == "__main__":
    serve(build)
