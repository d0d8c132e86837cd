"""Gemma 3's layers: norm, rotation, attention, feed-forward, and the block of layers that repeats.

Source: google-deepmind/gemma `nn/_modules.py` and `nn/_layers.py`, Transformers `modeling_gemma3.py`; where they
differ, Transformers' numbers decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.shapes import Hidden, TokenIds
from sealion_kernels import AttentionMask, flash_attention


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """Draws parameters, each with the names of its axes; `stack` layers at once where it is set."""

    rngs: nnx.Rngs
    dtype: jax.typing.DTypeLike
    stack: int | None = None

    def matrix(self, shape: tuple[int, ...], axes: tuple[str, ...], *, fan_in: int) -> nnx.Param:
        """Normal with variance 1 / fan_in, so that activations of unit variance stay so."""
        shape, axes = self._stacked(shape, axes)
        value = jax.random.normal(self.rngs.params(), shape, self.dtype) * fan_in**-0.5
        return nnx.Param(value.astype(self.dtype), axes=axes)

    def zeros(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        shape, axes = self._stacked(shape, axes)
        return nnx.Param(jnp.zeros(shape, self.dtype), axes=axes)

    def _stacked(
        self, shape: tuple[int, ...], axes: tuple[str, ...]
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return (shape, axes) if self.stack is None else ((self.stack, *shape), ("layers", *axes))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Context:
    """What every layer of one forward pass shares: who sees whom, and how far each position is rotated."""

    segment_ids: TokenIds
    local_rotation: tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]
    global_rotation: tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]

    @classmethod
    def make(cls, config: Gemma3Config, positions: TokenIds, segment_ids: TokenIds) -> Context:
        return cls(
            segment_ids=segment_ids,
            local_rotation=rotation(positions, head_dim=config.head_dim, base=config.local_rope_base),
            global_rotation=rotation(
                positions,
                head_dim=config.head_dim,
                base=config.global_rope_base,
                factor=config.global_rope_factor,
            ),
        )


def rotation(
    positions: Int[Array, "B T"], *, head_dim: int, base: float, factor: float = 1.0
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Cosine and sine of RoPE's angles, float32 [B, T, 1, H/2]: position / factor * base^(-2i/H)."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim) / factor
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], angles: tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]
) -> Float[Array, "B T N H"]:
    """x with each pair (i, i + H/2) turned by its position's angle, in float32."""
    cosine, sine = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


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

    def __init__(self, config: Gemma3Config, *, compute: ComputeConfig, is_global: bool, init: Initializer):
        D, N, K, H = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.window = None if is_global else config.sliding_window_tokens
        self.scale = config.query_scale_dim**-0.5
        self.compute = compute
        self.query = init.matrix((D, N, H), ("embed", "heads", "head_dim"), fan_in=D)
        self.key = init.matrix((D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
        self.value = init.matrix((D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
        self.output = init.matrix((N, H, D), ("heads", "head_dim", "embed"), fan_in=N * H)
        self.query_norm = RMSNorm(H, "head_dim", epsilon=config.norm_epsilon, init=init)
        self.key_norm = RMSNorm(H, "head_dim", epsilon=config.norm_epsilon, init=init)

    def __call__(self, x: Hidden, context: Context) -> Hidden:
        angles = context.global_rotation if self.window is None else context.local_rotation
        query = self.query_norm(jnp.einsum("BTD,DNH->BTNH", x, self.query[...].astype(x.dtype)))
        key = self.key_norm(jnp.einsum("BTD,DKH->BTKH", x, self.key[...].astype(x.dtype)))
        value = jnp.einsum("BTD,DKH->BTKH", x, self.value[...].astype(x.dtype))
        mask = AttentionMask(
            causal=True,
            window=self.window,
            query_segments=context.segment_ids,
            key_segments=context.segment_ids,
        )
        mixed = flash_attention(
            rotate(query, angles).astype(x.dtype),
            rotate(key, angles).astype(x.dtype),
            value,
            mask=mask,
            scale=self.scale,
            implementation=self.compute.attention,
        )
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.output[...].astype(x.dtype))


class FeedForward(nnx.Module):
    """down(gelu(gate(x)) * up(x)), the tanh form of GELU."""

    def __init__(self, config: Gemma3Config, *, init: Initializer):
        D, F = config.model_dim, config.feed_forward_dim
        self.gate = init.matrix((D, F), ("embed", "mlp"), fan_in=D)
        self.up = init.matrix((D, F), ("embed", "mlp"), fan_in=D)
        self.down = init.matrix((F, D), ("mlp", "embed"), fan_in=F)

    def __call__(self, x: Hidden) -> Hidden:
        gate = jnp.einsum("BTD,DF->BTF", x, self.gate[...].astype(x.dtype))
        up = jnp.einsum("BTD,DF->BTF", x, self.up[...].astype(x.dtype))
        return jnp.einsum(
            "BTF,FD->BTD", nnx.gelu(gate, approximate=True) * up, self.down[...].astype(x.dtype)
        )


class Layer(nnx.Module):
    """Attention, then feed-forward, each with a norm before and after and a residual around."""

    def __init__(self, config: Gemma3Config, *, compute: ComputeConfig, is_global: bool, init: Initializer):
        def norm() -> RMSNorm:
            return RMSNorm(config.model_dim, "norm", epsilon=config.norm_epsilon, init=init)

        self.pre_attention_norm = norm()
        self.attention = Attention(config, compute=compute, is_global=is_global, init=init)
        self.post_attention_norm = norm()
        self.pre_mlp_norm = norm()
        self.mlp = FeedForward(config, init=init)
        self.post_mlp_norm = norm()

    def __call__(self, x: Hidden, context: Context) -> Hidden:
        x = x + self.post_attention_norm(self.attention(self.pre_attention_norm(x), context))
        return x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))


class Block(nnx.Module):
    """The first `num_layers` layers of the pattern (local but the last), as layer_0, layer_1, ...

    With `init.stack` every parameter holds that many blocks, for a scan over them.
    """

    def __init__(self, config: Gemma3Config, *, compute: ComputeConfig, num_layers: int, init: Initializer):
        self.num_layers = num_layers
        for j in range(num_layers):
            layer = Layer(config, compute=compute, is_global=config.is_global(j), init=init)
            setattr(self, f"layer_{j}", layer)

    def __call__(self, x: Hidden, context: Context) -> Hidden:
        for j in range(self.num_layers):
            x = getattr(self, f"layer_{j}")(x, context)
        return x
