"""Gemma 3's sizes as data, and how a forward pass is computed.

Source of the numbers: google/gemma_pytorch `gemma/config.py`, google-deepmind/gemma `nn/_gemma.py` and the
configurations that Transformers' checkpoints carry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sealion_jax.arithmetic import Quantization
from sealion_jax.checks import check_number
from sealion_jax.errors import UserError

FLOAT16_NAMES = ("float16", "fp16", "f16", "half")

Remat = Literal["none", "dots", "layer", "block"]

Implementation = Literal["auto", "dense", "blockwise", "tpu", "gpu"]
"""Of attention, see `sealion_kernels.flash_attention`."""

ATTENTION = "attention"
TENSORS = ("query", "key", "value", ATTENTION, "output", "gate", "up", "down")
"""Of a layer, that can be kept by name: products, by the weight's name, and what attention gives."""


@dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """Shapes and constants of a Gemma 3 text model; nothing here depends on hardware.

    Layers repeat a pattern of `layers_per_block`: all local (sliding window) but the last, which is global.
    Layers left over at the end follow the pattern from its start, so they are local.
    """

    vocab_size: int
    """Rows of the tied embedding; Transformers pads 262,144 to 262,208 for 4B and larger."""
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward_dim: int
    query_scale_dim: float = 256
    """Queries are multiplied by `query_scale_dim ** -0.5`. Not always the head dim: 168 at 27B."""
    sliding_window_tokens: int = 1024
    """Keys a local query sees, itself included: 0 <= q - k < window."""
    layers_per_block: int = 6
    local_rope_base: float = 10_000.0
    global_rope_base: float = 1_000_000.0
    global_rope_factor: float = 1.0
    """Linear scaling: global positions are divided by this before rotation."""
    max_context_tokens: int = 131_072
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_layers",
            "model_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "feed_forward_dim",
            "sliding_window_tokens",
            "layers_per_block",
            "max_context_tokens",
        ):
            check_number(f"model.{name}", getattr(self, name), least=1, whole=True)
        for name in (
            "query_scale_dim",
            "local_rope_base",
            "global_rope_base",
            "global_rope_factor",
            "norm_epsilon",
        ):
            check_number(f"model.{name}", getattr(self, name), above=0)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads ({self.num_heads}) must be a multiple of "
                f"model.num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim must be even for RoPE, not {self.head_dim}")

    @property
    def num_blocks(self) -> int:
        """Whole pattern repeats, scanned over."""
        return self.num_layers // self.layers_per_block

    @property
    def num_rest_layers(self) -> int:
        """Layers after the last whole block."""
        return self.num_layers % self.layers_per_block

    def is_global(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) sees the whole context."""
        return layer % self.layers_per_block == self.layers_per_block - 1


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the forward and backward passes are computed: changes speed and memory, not the model."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and matmul inputs. Norms, softmax, RoPE angles and log-sum-exp are always float32."""
    remat: Remat = "block"
    """What is kept for the backward pass; the rest is computed again, for about a third more time.

    none: everything. dots: each layer's products with weights, and its attention. layer: each layer's input.
    block: each block's input; least of all when there are many blocks, but all of a block's layers are then
    alive together.
    """
    keep: tuple[str, ...] = ()
    """Tensors that are kept in spite of `remat`: query, key, value, attention, output, gate, up, down."""
    offload: tuple[str, ...] = ()
    """Of the same, those that are kept in the host's memory, and fetched back for the backward pass."""
    quantization: Quantization = "none"
    """Of products with weights, forward and to their inputs: int8 or fp8 (e4m3, gradients e5m2), for devices
    that multiply them faster. Needs the extra `quantization`."""
    attention: Implementation = "auto"
    """auto takes the fastest that is exact on the device; the others are for comparing."""
    logits_bytes_per_device: int = 128 * 2**20
    """Most bytes of float32 logits alive at a time. With room for 1,024 tokens (1 GiB) on a GPU or TPU, the
    gradient of a next-token loss is taken along, which saves one of four products with the embedding."""

    def __post_init__(self) -> None:
        if str(self.dtype).lower() in FLOAT16_NAMES:
            raise UserError(
                f"compute.dtype {self.dtype}: float16 overflows in Gemma 3 (its activations exceed 65,504); "
                "use bfloat16, or float32 on a CPU"
            )
        for name, allowed in (
            ("dtype", ("bfloat16", "float32")),
            ("remat", get_args(Remat)),
            ("attention", get_args(Implementation)),
            ("quantization", get_args(Quantization)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"compute.{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        check_number("compute.logits_bytes_per_device", self.logits_bytes_per_device, least=1, whole=True)
        self._check_names()

    def _check_names(self) -> None:
        for field in ("keep", "offload"):
            for name in getattr(self, field):
                if name not in TENSORS:
                    raise UserError(f"compute.{field}: {name!r} is none of {', '.join(TENSORS)}")
        both = set(self.keep) & set(self.offload)
        if both:
            raise UserError(
                f"compute.keep and compute.offload both name {', '.join(sorted(both))}; choose one"
            )
        if (self.keep or self.offload) and self.remat not in ("layer", "block"):
            raise UserError(
                f"compute.keep and compute.offload are for compute.remat layer and block; {self.remat} keeps "
                "what it keeps. Set compute.remat to one of them, or leave both empty"
            )


def gemma3_270m() -> Gemma3Config:
    """Gemma 3 270M, text only."""
    return Gemma3Config(
        vocab_size=262_144,
        num_layers=18,
        model_dim=640,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        feed_forward_dim=2048,
        sliding_window_tokens=512,
        max_context_tokens=32_768,
    )


def gemma3_1b() -> Gemma3Config:
    """Gemma 3 1B, text only."""
    return Gemma3Config(
        vocab_size=262_144,
        num_layers=26,
        model_dim=1152,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        feed_forward_dim=6912,
        sliding_window_tokens=512,
        max_context_tokens=32_768,
    )


def gemma3_4b() -> Gemma3Config:
    """The language model of Gemma 3 4B."""
    return Gemma3Config(
        vocab_size=262_208,
        num_layers=34,
        model_dim=2560,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        feed_forward_dim=10_240,
        global_rope_factor=8.0,
    )


def gemma3_12b() -> Gemma3Config:
    """The language model of Gemma 3 12B."""
    return Gemma3Config(
        vocab_size=262_208,
        num_layers=48,
        model_dim=3840,
        num_heads=16,
        num_kv_heads=8,
        head_dim=256,
        feed_forward_dim=15_360,
        global_rope_factor=8.0,
    )


def gemma3_27b() -> Gemma3Config:
    """The language model of Gemma 3 27B."""
    return Gemma3Config(
        vocab_size=262_208,
        num_layers=62,
        model_dim=5376,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        feed_forward_dim=21_504,
        query_scale_dim=168,
        global_rope_factor=8.0,
    )
