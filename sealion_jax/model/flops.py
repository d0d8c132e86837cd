"""Floating-point operations of a training step, counted from the configuration."""

from __future__ import annotations

from sealion_jax.model.config import Gemma3Config


def flops_per_token(
    config: Gemma3Config, sequence_length: int, *, backward: bool = True, frozen: bool = False
) -> float:
    """Operations a token of unpacked rows of `sequence_length`, forward and (unless told not to) backward.

    Counted: matrix products (a multiply and an add each), the logits among them; of attention only the causal
    half, and on local layers only the window. Left out: norms, rotation, softmax, recomputation. The backward
    pass costs twice the forward.

    Args:
        frozen: without the gradients of the weights, as under low-rank adapters, which are not counted.
    """
    D, N, K, H = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
    weights = D * N * H + 2 * D * K * H + N * H * D + 3 * D * config.feed_forward_dim
    keys = sum(_mean_keys(config, layer, sequence_length) for layer in range(config.num_layers))
    products = 2 * (config.num_layers * weights + config.vocab_size * D)
    mixing = 4 * N * H * keys
    if not backward:
        return products + mixing
    return (2 if frozen else 3) * products + 3 * mixing


def _mean_keys(config: Gemma3Config, layer: int, length: int) -> float:
    """Keys that a query sees on this layer, averaged over a row: min(t + 1, window) over t."""
    window = length if config.is_global(layer) else min(config.sliding_window_tokens, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
