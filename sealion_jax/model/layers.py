"""Gemma 3's layers: norm, rotation, attention, feed-forward, and the block of layers that repeats.

Source: google-deepmind/gemma `nn/_modules.py` and `nn/_layers.py`, Transformers `modeling_gemma3.py`; where
they differ, Transformers' numbers decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sealion_jax.arithmetic import Arithmetic, arithmetic_of
from sealion_jax.layout import Layout
from sealion_jax.model.config import ComputeConfig, Gemma3Config, Implementation
from sealion_jax.model.lora import Adapter, Adapters, LoraConfig
from sealion_jax.model.parameters import Initializer, own_axes
from sealion_jax.shapes import Hidden, TokenIds
from sealion_kernels import AttentionMask

Angles = tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]
"""Cosine and sine for each position and each pair of a head's dimensions."""


AXIS_NAMES = {
    "B": "batch",
    "T": "tokens",
    "D": "model",
    "N": "heads",
    "K": "kv_heads",
    "H": "head_dim",
    "F": "mlp",
}
"""Of activations, by the letters of shapes.py."""


class Attend(Protocol):
    """How queries meet keys and values; `attend_in_rows`, unless some of them come from a cache."""

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        *,
        window: int | None,
        scale: float,
        context: Context,
        memory: Any,
    ) -> tuple[Float[Array, "B T N H"], Any]:
        """The mixed values, and whatever is to be kept of this layer's keys and values (None for nothing).

        Args:
            window: of a local layer; None on a global one.
            memory: what was kept for this layer before, if anything.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the layers of one forward pass share: who sees whom, how far positions turn, and how it runs."""

    segment_ids: TokenIds
    local_angles: Angles
    global_angles: Angles
    attention: Implementation
    arithmetic: Arithmetic
    layout: Layout
    attend: Attend

    @classmethod
    def make(
        cls,
        config: Gemma3Config,
        *,
        positions: TokenIds,
        segment_ids: TokenIds,
        compute: ComputeConfig,
        layout: Layout,
        attend: Attend,
    ) -> Context:
        H = config.head_dim
        return cls(
            segment_ids=segment_ids,
            local_angles=rope_angles(positions, head_dim=H, base=config.local_rope_base),
            global_angles=rope_angles(
                positions, head_dim=H, base=config.global_rope_base, factor=config.global_rope_factor
            ),
            attention=compute.attention,
            arithmetic=arithmetic_of(compute.quantization),
            layout=layout,
            attend=attend,
        )


def attend_in_rows(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    window: int | None,
    scale: float,
    context: Context,
    memory: Any,
) -> tuple[Float[Array, "B T N H"], None]:
    """Values mixed over the tokens of the same rows: causal, inside a segment, inside the window."""
    del memory
    mask = AttentionMask(
        causal=True, window=window, query_segments=context.segment_ids, key_segments=context.segment_ids
    )
    attention = context.layout.attention
    return attention(query, key, value, mask=mask, scale=scale, implementation=context.attention), None


def rope_angles(positions: Int[Array, "B T"], *, head_dim: int, base: float, factor: float = 1.0) -> Angles:
    """Cosine and sine of RoPE's angles, float32 [B, T, 1, H/2]: position / factor * base^(-2i/H)."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim) / factor
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], angles: Angles) -> Float[Array, "B T N H"]:
    """x with each pair (i, i + H/2) turned by its position's angle, in float32."""
    cosine, sine = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def product(
    equation: str,
    x: Float[Array, ...],
    weight: nnx.Param,
    adapter: Adapter | None,
    context: Context,
    *,
    name: str,
) -> Float[Array, ...]:
    """The einsum of x and a weight that is cast to x's dtype, with what the weight's adapter adds to it.

    Args:
        name: of the result, for a rematerialisation policy; see `config.TENSORS`.
    """
    layout = context.layout
    y = layout.product(equation, x, weight[...], own_axes(weight), context.arithmetic)
    if adapter is not None:
        y += adapter(equation, x, layout=layout)
    y = layout.activation(y, tuple(AXIS_NAMES[letter] for letter in equation.split("->")[1]))
    return checkpoint_name(y, name)


class RMSNorm(nnx.Module):
    """x / rms(x) * (1 + scale) over the last axis, in float32, cast after."""

    def __init__(self, dim: int, axis: str, *, epsilon: float, init: Initializer):
        self.epsilon = epsilon
        self.scale = init.zeros((dim,), (axis,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; queries and keys are normalised per head, then rotated, then scaled."""

    def __init__(
        self, config: Gemma3Config, *, is_global: bool, init: Initializer, lora: LoraConfig | None = None
    ):
        D, N, K, H = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.window = None if is_global else config.sliding_window_tokens
        self.scale = config.query_scale_dim**-0.5
        self.query = init.matrix((D, N, H), ("embed", "heads", "head_dim"), fan_in=D)
        self.key = init.matrix((D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
        self.value = init.matrix((D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
        self.output = init.matrix((N, H, D), ("heads", "head_dim", "embed"), fan_in=N * H)
        self.query_norm = RMSNorm(H, "head_dim", epsilon=config.norm_epsilon, init=init)
        self.key_norm = RMSNorm(H, "head_dim", epsilon=config.norm_epsilon, init=init)
        self.lora = Adapters(
            {"query": self.query, "key": self.key, "value": self.value, "output": self.output},
            lora,
            init=init,
        )

    def __call__(self, x: Hidden, context: Context, memory: Any = None) -> tuple[Hidden, Any]:
        """What the layer adds to x, and what `context.attend` keeps of its keys and values."""
        query = product("BTD,DNH->BTNH", x, self.query, self.lora.query, context, name="query")
        key = product("BTD,DKH->BTKH", x, self.key, self.lora.key, context, name="key")
        value = product("BTD,DKH->BTKH", x, self.value, self.lora.value, context, name="value")
        angles = context.global_angles if self.window is None else context.local_angles
        mixed, kept = context.attend(
            rotate(self.query_norm(query), angles).astype(x.dtype),
            rotate(self.key_norm(key), angles).astype(x.dtype),
            value,
            window=self.window,
            scale=self.scale,
            context=context,
            memory=memory,
        )
        mixed = context.layout.activation(mixed, ("batch", "tokens", "heads", "head_dim"))
        output = product("BTNH,NHD->BTD", mixed, self.output, self.lora.output, context, name="output")
        return output, kept


class FeedForward(nnx.Module):
    """down(gelu(gate(x)) * up(x)), the tanh form of GELU."""

    def __init__(self, config: Gemma3Config, *, init: Initializer, lora: LoraConfig | None = None):
        D, F = config.model_dim, config.feed_forward_dim
        self.gate = init.matrix((D, F), ("embed", "mlp"), fan_in=D)
        self.up = init.matrix((D, F), ("embed", "mlp"), fan_in=D)
        self.down = init.matrix((F, D), ("mlp", "embed"), fan_in=F)
        self.lora = Adapters({"gate": self.gate, "up": self.up, "down": self.down}, lora, init=init)

    def __call__(self, x: Hidden, context: Context) -> Hidden:
        gate = product("BTD,DF->BTF", x, self.gate, self.lora.gate, context, name="gate")
        up = product("BTD,DF->BTF", x, self.up, self.lora.up, context, name="up")
        hidden = nnx.gelu(gate, approximate=True) * up
        return product("BTF,FD->BTD", hidden, self.down, self.lora.down, context, name="down")


class Layer(nnx.Module):
    """Attention, then feed-forward, each with a norm before and after and a residual around."""

    def __init__(
        self, config: Gemma3Config, *, is_global: bool, init: Initializer, lora: LoraConfig | None = None
    ):
        def norm() -> RMSNorm:
            return RMSNorm(config.model_dim, "norm", epsilon=config.norm_epsilon, init=init)

        self.pre_attention_norm = norm()
        self.attention = Attention(config, is_global=is_global, init=init, lora=lora)
        self.post_attention_norm = norm()
        self.pre_mlp_norm = norm()
        self.mlp = FeedForward(config, init=init, lora=lora)
        self.post_mlp_norm = norm()

    def __call__(self, x: Hidden, context: Context, memory: Any = None) -> tuple[Hidden, Any]:
        """x after the layer, and what its attention keeps."""
        mixed, kept = self.attention(self.pre_attention_norm(x), context, memory)
        x = x + self.post_attention_norm(mixed)
        return x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x), context)), kept


class Block(nnx.Module):
    """The first `num_layers` layers of the pattern (local but the last), as layer_0, layer_1, ...

    With `init.stack` every parameter holds that many blocks, for a scan over them.
    """

    def __init__(
        self, config: Gemma3Config, *, num_layers: int, init: Initializer, lora: LoraConfig | None = None
    ):
        self.num_layers = num_layers
        for j in range(num_layers):
            setattr(self, f"layer_{j}", Layer(config, is_global=config.is_global(j), init=init, lora=lora))

    def layers(self) -> list[Layer]:
        return [getattr(self, f"layer_{j}") for j in range(self.num_layers)]
