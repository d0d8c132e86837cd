"""The embedded default: every mechanism of Gemma 3 at a few million parameters, on the corpus in the package.

Sized for under three minutes on two CPU cores, the evaluations before and after included.
"""

from __future__ import annotations

from sealion_configs._embedded import BATCH_SIZE, SEQUENCE_LENGTH_TOKENS, sources
from sealion_jax.checkpoint.orbax import CheckpointConfig
from sealion_jax.data.mixture import MixtureConfig
from sealion_jax.embedded import embedded
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig
from sealion_jax.recipe import TrainConfig

STEPS = 75


def model(vocab_size: int) -> Gemma3Config:
    """A block of six layers and a remainder of two, grouped heads, a window shorter than the sequence, a RoPE
    factor on the global layer, and a query scale that is not the head dimension's."""
    return Gemma3Config(
        vocab_size=vocab_size,
        num_layers=8,
        model_dim=192,
        num_heads=4,
        num_kv_heads=2,
        head_dim=48,
        feed_forward_dim=576,
        query_scale_dim=40,
        sliding_window_tokens=64,
        global_rope_factor=8.0,
        max_context_tokens=2048,
    )


def recipe() -> TrainConfig:
    """Thirteen languages in equal parts, in float32, from freshly drawn weights."""
    corpus = embedded()
    return TrainConfig(
        name="cpt_tiny",
        tokenizer=str(corpus.tokenizer),
        model=model(corpus.vocab_size),
        data=MixtureConfig(sources=sources(corpus.texts)),
        compute=ComputeConfig(dtype="float32", remat="none"),
        sequence_length_tokens=SEQUENCE_LENGTH_TOKENS,
        global_batch_size=BATCH_SIZE,
        steps=STEPS,
        optimizer=OptimizerConfig(
            schedule=CosineSchedule(
                peak_learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=STEPS // 10
            ),
        ),
        checkpoints=CheckpointConfig(interval_steps=STEPS // 2),
        evaluation=EvaluationConfig(
            sets={language: str(file) for language, file in corpus.texts.heldout.items()}, batch_size=8
        ),
    )
