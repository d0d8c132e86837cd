"""Tiny random models: in Hugging Face directories, by hand and with the safetensors library, and in a step's.

Names and shapes are spelled out here, apart from the table that is tested; Transformers loads them
in test_hf_transformers.py, which shows that they are right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from sealion_jax.checkpoint.arrays import Leaf, write_leaves
from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.checkpoint.hf import model_json
from sealion_jax.checkpoint.layout import Assets, write_assets
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.gemma3 import abstract_params

V, D, N, K, H, F, LAYERS, PATTERN = 704, 32, 4, 2, 16, 48, 8, 3
BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)

CONFIG = Gemma3Config(
    vocab_size=V,
    num_layers=LAYERS,
    model_dim=D,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    feed_forward_dim=F,
    query_scale_dim=24,
    sliding_window_tokens=8,
    layers_per_block=PATTERN,
    local_rope_base=5000.0,
    global_rope_base=500_000.0,
    global_rope_factor=8.0,
    max_context_tokens=256,
)
"""Two blocks of three layers and a rest of two."""

_SIZES: dict[str, Any] = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": H,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": D,
    "intermediate_size": F,
    "max_position_embeddings": 256,
    "num_attention_heads": N,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": K,
    "query_pre_attn_scalar": 24,
    "rms_norm_eps": 1e-6,
    "sliding_window": 8,
    "vocab_size": V,
}
TEXT_VERSION_4: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    **_SIZES,
    "rope_local_base_freq": 5000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 500_000.0,
    "sliding_window_pattern": 3,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
}
TEXT_VERSION_5: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    **_SIZES,
    "_sliding_window_pattern": 6,  # as it is when layer_types was given
    "dtype": "bfloat16",
    "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"factor": 8.0, "rope_theta": 500_000.0, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 5000.0, "rope_type": "default"},
    },
    "transformers_version": "5.23.0",
}


def multimodal(text: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a multimodal model with this language model."""
    dtype_keys = {key: text[key] for key in ("dtype", "torch_dtype") if key in text}
    inner = {key: value for key, value in text.items() if key not in (*dtype_keys, "architectures")}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 700,
        "eoi_token_index": 701,
        "eos_token_id": [1, 106],
        "image_token_index": 702,
        "mm_tokens_per_image": 1,
        "text_config": inner,
        "vision_config": {
            "hidden_size": 16,
            "image_size": 28,
            "intermediate_size": 32,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 14,
            "vision_use_head": False,
        },
        **dtype_keys,
    }


def text_shapes(prefix: str, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a language model's tensors."""
    each = {
        "self_attn.q_proj.weight": (N * H, D),
        "self_attn.k_proj.weight": (K * H, D),
        "self_attn.v_proj.weight": (K * H, D),
        "self_attn.o_proj.weight": (D, N * H),
        "self_attn.q_norm.weight": (H,),
        "self_attn.k_norm.weight": (H,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "pre_feedforward_layernorm.weight": (D,),
        "post_feedforward_layernorm.weight": (D,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (V, D),
        f"{prefix}norm.weight": (D,),
    }
    for layer in range(layers):
        shapes |= {f"{prefix}layers.{layer}.{name}": shape for name, shape in each.items()}
    return shapes


def vision_shapes(prefix: str = "", tower: str = "vision_tower.vision_model.") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a one-layer vision tower and its projector."""
    layer = f"{prefix}{tower}encoder.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}multi_modal_projector.mm_input_projection_weight": (16, D),
        f"{prefix}multi_modal_projector.mm_soft_emb_norm.weight": (16,),
        f"{prefix}{tower}embeddings.patch_embedding.weight": (16, 3, 14, 14),
        f"{prefix}{tower}embeddings.patch_embedding.bias": (16,),
        f"{prefix}{tower}embeddings.position_embedding.weight": (4, 16),
        f"{prefix}{tower}post_layernorm.weight": (16,),
        f"{prefix}{tower}post_layernorm.bias": (16,),
        f"{layer}mlp.fc1.weight": (32, 16),
        f"{layer}mlp.fc1.bias": (32,),
        f"{layer}mlp.fc2.weight": (16, 32),
        f"{layer}mlp.fc2.bias": (16,),
    }
    for part in ("q", "k", "v", "out"):
        shapes |= {
            f"{layer}self_attn.{part}_proj.weight": (16, 16),
            f"{layer}self_attn.{part}_proj.bias": (16,),
        }
    for norm in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{layer}{norm}.weight": (16,), f"{layer}{norm}.bias": (16,)}
    return shapes


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype = BF16, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Normal numbers, small enough that logits stay finite, large enough that norms and attention matter."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes.items()}


def write_directory(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    num_shards: int = 1,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """A directory as Hugging Face lays it out."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, content in (files or {}).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    names = list(tensors)
    if num_shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for k in range(num_shards):
        file = f"model-{k + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = {name: tensors[name] for name in names[k::num_shards]}
        save_file(mine, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_step(step: Path, config: Gemma3Config, assets: Assets) -> Path:
    """A step's directory, in float32, that no Hugging Face directory stands behind."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    shapes = {"/".join(entry.key for entry in path): leaf.shape for path, leaf in leaves}
    arrays = random_tensors(shapes, F32)
    write_leaves(
        step, [Leaf(name, array.shape, array.dtype, [((), array)]) for name, array in arrays.items()]
    )
    write_assets(step, {"model.json": model_json(config), **assets})
    write_digests(step)
    return step


def read_directory(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, through the safetensors library."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Same names, shapes, dtypes and bytes."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name
