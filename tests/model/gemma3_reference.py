"""Transformers' Gemma 3 as the reference: small random models, and their weights in this project's tree.

The mapping of names here is independent of the one that checkpoints are converted with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from sealion_jax.model.config import Gemma3Config


def reference_model(config: Gemma3Config, *, seed: int) -> Any:
    """A random float32 Gemma3ForCausalLM of these shapes, in which every weight matters.

    Norm weights are drawn at random, those of queries and keys around 0.5 (a factor of 1.5): scores have a
    standard deviation of about 2, so that attention is peaked and a wrong norm, scale, mask or rotation
    changes the logits. (With a factor of 2.5 eighteen layers amplify float32's own rounding to 5e-4.)
    """
    options: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.feed_forward_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "query_pre_attn_scalar": config.query_scale_dim,
        "sliding_window": config.sliding_window_tokens,
        "max_position_embeddings": config.max_context_tokens,
        "rms_norm_eps": config.norm_epsilon,
        # Version 4's names, which version 5 still reads.
        "rope_theta": config.global_rope_base,
        "rope_local_base_freq": config.local_rope_base,
        "rope_scaling": {"rope_type": "linear", "factor": config.global_rope_factor},
        "attn_implementation": "eager",
    }
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if "q_norm" in name or "k_norm" in name:
                weight.copy_(0.5 + 0.3 * drawn)
            elif "norm" in name:
                weight.copy_(0.3 * drawn)
            else:
                weight.copy_(drawn * weight.shape[-1] ** -0.5)
    return model.eval()


def to_tree(named: dict[str, torch.Tensor], config: Gemma3Config) -> dict[str, Any]:
    """Weights (or their gradients) under Transformers' names as this project's parameter tree."""
    arrays = {name.removeprefix("model."): tensor.float().numpy() for name, tensor in named.items()}
    p = config.layers_per_block
    tree: dict[str, Any] = {
        "embedder": {"embedding": arrays["embed_tokens.weight"]},
        "final_norm": {"scale": arrays["norm.weight"]},
    }
    layers = [_layer(arrays, f"layers.{i}.", config) for i in range(config.num_layers)]
    whole = config.num_blocks * p
    if whole:
        tree["blocks"] = {f"layer_{j}": _stack(layers[j:whole:p]) for j in range(p)}
    if layers[whole:]:
        tree["rest"] = {f"layer_{j}": layer for j, layer in enumerate(layers[whole:])}
    return tree


def _layer(arrays: dict[str, np.ndarray], prefix: str, config: Gemma3Config) -> dict[str, Any]:
    D, H = config.model_dim, config.head_dim

    def weight(name: str) -> np.ndarray:
        return arrays[f"{prefix}{name}.weight"]

    def heads(name: str) -> np.ndarray:
        return weight(name).reshape(-1, H, D).transpose(2, 0, 1)

    return {
        "attention": {
            "query": heads("self_attn.q_proj"),
            "key": heads("self_attn.k_proj"),
            "value": heads("self_attn.v_proj"),
            "output": weight("self_attn.o_proj").T.reshape(-1, H, D),
            "query_norm": {"scale": weight("self_attn.q_norm")},
            "key_norm": {"scale": weight("self_attn.k_norm")},
        },
        "mlp": {
            "gate": weight("mlp.gate_proj").T,
            "up": weight("mlp.up_proj").T,
            "down": weight("mlp.down_proj").T,
        },
        "pre_attention_norm": {"scale": weight("input_layernorm")},
        "post_attention_norm": {"scale": weight("post_attention_layernorm")},
        "pre_mlp_norm": {"scale": weight("pre_feedforward_layernorm")},
        "post_mlp_norm": {"scale": weight("post_feedforward_layernorm")},
    }


def _stack(trees: list[dict[str, Any]]) -> dict[str, Any]:
    first = trees[0]
    return {
        name: _stack([tree[name] for tree in trees])
        if isinstance(first[name], dict)
        else np.stack([tree[name] for tree in trees])
        for name in first
    }
