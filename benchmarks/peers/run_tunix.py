"""A worker that takes the training step of Tunix's Gemma 3, as its PeftTrainer jits it (without adapters)."""

from __future__ import annotations

from importlib.metadata import version

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma3 import params_safetensors
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
from turns import Built, Job, serve


def model_config(job: Job) -> gemma3.ModelConfig:
    """The job's model in Tunix's words; its queries are always scaled by the head dim, as the job's are."""
    model = job.model
    assert model.get("query_scale_dim", 256) == model["head_dim"]
    return gemma3.ModelConfig(
        num_layers=model["num_layers"],
        num_embed=model["vocab_size"],
        embed_dim=model["model_dim"],
        hidden_dim=model["feed_forward_dim"],
        num_heads=model["num_heads"],
        head_dim=model["head_dim"],
        num_kv_heads=model["num_kv_heads"],
        sliding_window_size=model["sliding_window_tokens"],
        global_base_frequency=1_000_000,
        param_dtype=jnp.float32,
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


def loss(
    model: nnx.Module, tokens: jax.Array, targets: jax.Array, positions: jax.Array, attention_mask: jax.Array
) -> jax.Array:
    """The mean cross-entropy of all targets."""
    logits, _ = model(tokens, positions, None, attention_mask)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def build(job: Job) -> Built:
    """The trainer's step, with its model, its optimizer and its batch in place."""
    assert job.weights is not None
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        model = params_safetensors.create_model_from_safe_tensors(
            job.weights, model_config(job), mesh, dtype=jnp.float32
        )
        trainer = PeftTrainer(model, optimizer(job), TrainingConfig(eval_every_n_steps=1_000_000))
        trainer.with_loss_fn(loss)
        train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    arrays = job.read_batch()
    arrays["attention_mask"] = model.get_attention_mask(
        arrays["tokens"], inputs_mask=jnp.ones_like(arrays["tokens"], bool)
    )
    inputs = {
        name: jnp.asarray(arrays[name]) for name in ("tokens", "targets", "positions", "attention_mask")
    }

    def step() -> float:
        with mesh:
            value, _, norm = train_step(inputs)
        jax.block_until_ready((norm, nnx.state(model), nnx.state(trainer.optimizer)))
        return float(value)

    return Built(
        step=step,
        versions={"tunix": version("google-tunix"), "jax": jax.__version__},
        settings="PeftTrainer's step, nothing recomputed",
        same_weights=True,
    )


if __name__ == "__main__":
    serve(build)
