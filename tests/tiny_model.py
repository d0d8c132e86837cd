"""A model small enough to compile in a moment: one local layer and one global."""

from __future__ import annotations

from sealion_jax.model.config import Gemma3Config

CONFIG = Gemma3Config(
    vocab_size=96,
    num_layers=2,
    layers_per_block=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    feed_forward_dim=48,
    query_scale_dim=8,
    sliding_window_tokens=5,
)
