"""The one entrance to attention: checks what is asked, picks who computes it, and ties both passes together.

Every implementation but the dense one is a pair of functions, `forward` and `backward`, over the same
arrays, and a function `refusal` that tells what it cannot do. They share one derivative rule, here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sealion_kernels import blockwise, gpu, tpu
from sealion_kernels.block_table import AttentionBlocks, attention_blocks
from sealion_kernels.dense import dense_attention
from sealion_kernels.masks import AttentionMask
from sealion_kernels.softmax import ATTENTION_RESIDUALS
from sealion_kernels.targets import Target

Implementation = Literal["auto", "dense", "blockwise", "tpu", "gpu"]

IMPLEMENTATIONS: dict[str, ModuleType] = {"blockwise": blockwise, "tpu": tpu, "gpu": gpu}

BEST = {"tpu": ("tpu", "blockwise"), "gpu": ("gpu", "blockwise")}
"""For each platform, who is asked, in this order; elsewhere only "blockwise", which can do everything."""

# Scores of one head that are no dearer to keep than to compute again block by block. (On a CPU, blocks win by
# a factor of two at rows of 512, of ten at 4096.)
DENSE_UP_TO_SCORES = 256 * 256


@overload
def flash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: AttentionMask,
    scale: float,
    implementation: Implementation = "auto",
    target: Target | None = None,
    blocks: AttentionBlocks | None = None,
    return_log_sum: Literal[False] = False,
) -> Float[Array, "B T N H"]: ...


@overload
def flash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: AttentionMask,
    scale: float,
    implementation: Implementation = "auto",
    target: Target | None = None,
    blocks: AttentionBlocks | None = None,
    return_log_sum: Literal[True],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]: ...


def flash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: AttentionMask,
    scale: float,
    implementation: Implementation = "auto",
    target: Target | None = None,
    blocks: AttentionBlocks | None = None,
    return_log_sum: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """softmax(scale * q k^T) v over the keys that `mask` shows, in the query's dtype.

    Scores and softmax are float32. Query head n reads key-value head n // (N / K); keys are not repeated. Any
    length: what does not fill a block is padded inside, and where there are no keys, every query sees none.

    Args:
        implementation: "dense" keeps all scores, and is what the others are compared with; "blockwise" is
            plain XLA for any device; "tpu" and "gpu" are Pallas kernels, interpreted (slowly) where the
            target is another device. All but the first have memory linear in the length, and never touch
            blocks that the window, causality, segments or spans hide. "auto" takes the best that can do it.
        target: the device to compute on; None is JAX's first.
        blocks: block sizes; None takes those of the table (see `tune`).
        return_log_sum: also the log of the sum of the exponentials of the seen scores, float32, by which
            attention over parts of the keys can be joined; -inf where a query sees no key. Differentiable.

    Raises:
        ValueError: shapes that do not fit each other, or a combination that the implementation cannot do.
    """
    _check(query, key, value, mask)
    names = ("auto", "dense", *IMPLEMENTATIONS)
    if implementation not in names:
        raise ValueError(f"implementation must be one of {', '.join(names)}, not {implementation!r}")
    target = target or Target.here()
    if 0 in (*query.shape, *key.shape):
        out, log_sum = _of_nothing(query)
        return (out, log_sum) if return_log_sum else out
    chosen = choose(query, key, mask, target=target) if implementation == "auto" else implementation
    if chosen == "dense":
        out, log_sum = dense_attention(query, key, value, mask=mask, scale=scale)
    else:
        passes = Passes.of(query, key, mask, scale=scale, implementation=chosen, target=target, blocks=blocks)
        both: Any = _attend(query, key, value, mask, passes)
        out, log_sum = both
    return (out, log_sum) if return_log_sum else out


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Both passes of one implementation for some shapes: what attention over parts of the keys is made of."""

    name: str
    scale: float
    blocks: AttentionBlocks
    interpret: bool

    @classmethod
    def of(
        cls,
        query: Array,
        key: Array,
        mask: AttentionMask,
        *,
        scale: float,
        implementation: str = "auto",
        target: Target | None = None,
        blocks: AttentionBlocks | None = None,
    ) -> Passes:
        """Those of an implementation, as `flash_attention` takes it, but for "dense", which keeps all scores.

        Raises:
            ValueError: there is none of this name, or it cannot do it.
        """
        target = target or Target.here()
        name = best(query, key, mask, target=target) if implementation == "auto" else implementation
        if name not in IMPLEMENTATIONS:
            names = ", ".join(["auto", *IMPLEMENTATIONS])
            raise ValueError(f"attention over parts of the keys is computed by one of {names}, not {name!r}")
        if reason := IMPLEMENTATIONS[name].refusal(query, key, mask):
            raise ValueError(f"attention implementation {name!r} {reason}")
        blocks = blocks or attention_blocks(
            name,
            target,
            num_queries=query.shape[1],
            num_keys=key.shape[1],
            window=mask.window,
            head_dim=query.shape[3],
            group=query.shape[2] // key.shape[2],
            itemsize=query.dtype.itemsize,
        )
        return cls(name=name, scale=scale, blocks=blocks, interpret=name in BEST and name != target.platform)

    def forward(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        mask: AttentionMask,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """Mixed values in the query's dtype, and the log-sum-exp of the seen scores, float32."""
        return IMPLEMENTATIONS[self.name].forward(
            query, key, value, mask, scale=self.scale, blocks=self.blocks, interpret=self.interpret
        )

    def backward(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        mask: AttentionMask,
        log_sum: Float[Array, "B T N"],
        delta: Float[Array, "B T N"],
        d_out: Float[Array, "B T N H"],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Gradients of query, key and value, each in its dtype; sums over parts of the keys are the whole's.

        Args:
            log_sum: of the scores of all keys, whether they are among these or not.
            delta: what `score_shift` gives, likewise of all keys.
        """
        return IMPLEMENTATIONS[self.name].backward(
            query,
            key,
            value,
            mask,
            log_sum,
            delta,
            d_out,
            scale=self.scale,
            blocks=self.blocks,
            interpret=self.interpret,
        )


def score_shift(
    out: Float[Array, "B T N H"],
    d_out: Float[Array, "B T N H"],
    d_log_sum: Float[Array, "B T N"] | None = None,
) -> Float[Array, "B T N"]:
    """delta, where the gradient of a score is weight * (d_weight - delta); Dao 2023, section 3.1. Float32."""
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    return delta if d_log_sum is None else delta - d_log_sum


def choose(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], mask: AttentionMask, *, target: Target
) -> str:
    """The name of the implementation that "auto" takes for these shapes on this device."""
    if target.platform not in BEST and query.shape[1] * key.shape[1] <= DENSE_UP_TO_SCORES:
        return "dense"
    return best(query, key, mask, target=target)


def best(query: Array, key: Array, mask: AttentionMask, *, target: Target) -> str:
    """Of those that keep no scores, the name of the first that can do it on this device."""
    candidates = BEST.get(target.platform, ("blockwise",))
    return next(name for name in candidates if IMPLEMENTATIONS[name].refusal(query, key, mask) is None)


def _of_nothing(query: Float[Array, "B T N H"]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Where there are no rows, queries, heads or keys: zeros, log-sums of -inf, and gradients of zero."""
    # Made from the queries, so that under `shard_map` they vary over the devices as those do.
    return jnp.zeros_like(query), jnp.full_like(query[..., 0], -jnp.inf, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, mask, passes):
    return passes.forward(query, key, value, mask)


def _forward_rule(query, key, value, mask, passes):
    out, log_sum = passes.forward(query, key, value, mask)
    out, log_sum = map(checkpoint_name, (out, log_sum), ATTENTION_RESIDUALS)
    return (out, log_sum), (query, key, value, mask, out, log_sum)


def _backward_rule(passes, saved, cotangents):
    query, key, value, mask, out, log_sum = saved
    d_out, d_log_sum = cotangents
    delta = score_shift(out, d_out, d_log_sum)
    return *passes.backward(query, key, value, mask, log_sum, delta, d_out), None


_attend.defvjp(_forward_rule, _backward_rule)


def _check(query: Array, key: Array, value: Array, mask: AttentionMask) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"expected query [B, T, N, H] and key, value [B, S, K, H], got query {query.shape}, "
            f"key {key.shape}, value {value.shape}"
        )
    if key.dtype != value.dtype:
        raise ValueError(f"key is {key.dtype} and value {value.dtype}: cast one of them")
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    if key.shape[0] != B or key.shape[3] != H:
        raise ValueError(f"query {query.shape} and key {key.shape} differ in batch or head dim")
    if not K or not H:
        raise ValueError(f"key {key.shape} has no heads, or heads of no dimension")
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key-value heads: use a multiple of {K}")
    for name in ("segments", "spans"):
        queries, keys = getattr(mask, f"query_{name}"), getattr(mask, f"key_{name}")
        if queries is not None and (queries.shape, keys.shape) != ((B, T), (B, S)):
            raise ValueError(
                f"query and key {name} have shapes {queries.shape, keys.shape}, expected {((B, T), (B, S))}"
            )
