"""A configuration for tests that need one and open nothing that it names."""

from __future__ import annotations

import dataclasses

from sealion_jax.data.mixture import MixtureConfig, SourceConfig, StageConfig
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.model.config import Gemma3Config
from sealion_jax.recipe import TrainConfig

MODEL = Gemma3Config(
    vocab_size=256,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    feed_forward_dim=32,
    max_context_tokens=512,
)


def config(**changes) -> TrainConfig:
    data = MixtureConfig(
        sources=(
            SourceConfig(name="id", store="gs://b/id", weight=0.1),
            SourceConfig(name="th", store="gs://b/th", weight=0.2),
        ),
        stages=(StageConfig(start_step=50, weights={"id": 1.0, "th": 3.0}),),
    )
    base = TrainConfig(
        name="base",
        tokenizer="t.model",
        model=MODEL,
        data=data,
        sequence_length_tokens=128,
        global_batch_size=8,
        steps=100,
        evaluation=EvaluationConfig(sets={"news": "news.jsonl"}),
    )
    return dataclasses.replace(base, **changes)
