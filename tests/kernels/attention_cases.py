"""What every implementation of attention is asked: a product of masks, shapes and dtypes, and its cover."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from sealion_kernels import AttentionMask, Target, flash_attention
from sealion_kernels.block_table import AttentionBlocks
from sealion_kernels.blocks import BlockSizes

SCALE = 0.11
KV_HEADS = 2
ALL = -1


class Case(NamedTuple):
    """One question; the fields are the columns of the product."""

    causal: bool
    window: int | None
    """ALL: as long as the row."""
    packed: bool
    """Rows of three segments, or of one."""
    spans: bool
    """With two images in a row."""
    length: int
    group: int
    """Query heads for each key-value head."""
    head_dim: int
    dtype: str

    def __str__(self) -> str:
        causal = "causal" if self.causal else "both ways"
        window = "" if self.window is None else f", window {'all' if self.window == ALL else self.window}"
        parts = [name for name in ("packed", "spans") if getattr(self, name)]
        shape = f"T {self.length}, G {self.group}, H {self.head_dim}, {self.dtype}"
        return f"{causal}{window}, {' '.join([*parts, ''])}{shape}"


COLUMNS: dict[str, tuple[Any, ...]] = {
    "causal": (True, False),
    "window": (None, 1, 7, 128, ALL),
    "packed": (False, True),
    "spans": (False, True),
    "length": (100, 256, 300),
    "group": (1, 4, 8),
    "head_dim": (64, 128, 256),
    "dtype": ("float32", "bfloat16"),
}


def product() -> list[Case]:
    """Every case."""
    return [Case(*values) for values in itertools.product(*COLUMNS.values())]


def pairwise(count: int = 40, seed: int = 0) -> list[Case]:
    """`count` cases in which every pair of values of two different columns occurs.

    Each next case is, of some hundred drawn ones, that with the most pairs that have not yet occurred.
    """
    draw = random.Random(seed)
    missing = {pair for case in product() for pair in _pairs(case)}
    chosen: list[Case] = []
    while len(chosen) < count:
        candidates = [Case(*(draw.choice(values) for values in COLUMNS.values())) for _ in range(200)]
        best = max(candidates, key=lambda case: len(missing & set(_pairs(case))))
        missing -= set(_pairs(best))
        chosen.append(best)
    assert not missing, f"{len(missing)} pairs are not covered by {count} cases"
    return chosen


def _pairs(case: Case) -> Iterable[tuple[Any, ...]]:
    return itertools.combinations(enumerate(map(str, case)), 2)


def inputs(case: Case, batch: int = 2) -> tuple[jax.Array, ...]:
    """Query, key, value and cotangents of out and log-sum; queries large enough that attention is peaked."""
    rng = np.random.default_rng(0)
    q_shape = (batch, case.length, KV_HEADS * case.group, case.head_dim)
    k_shape = (batch, case.length, KV_HEADS, case.head_dim)
    shapes = (q_shape, k_shape, k_shape, q_shape, q_shape[:-1])
    arrays = [rng.normal(size=shape) for shape in shapes]
    arrays[0] *= 3 * (64 / case.head_dim) ** 0.5
    return *(jnp.asarray(array, case.dtype) for array in arrays[:4]), jnp.asarray(arrays[4], jnp.float32)


def mask_of(case: Case, batch: int = 2) -> AttentionMask:
    """The case's mask; segments and images end elsewhere in each row, and one image crosses a block's end."""
    window = case.length if case.window == ALL else case.window
    index = np.arange(case.length)[None]
    segments = spans = None
    if case.packed:
        cuts = np.array([[9, 40], [20, 77]])[:batch]
        segments = jnp.asarray(1 + (index[..., None] >= cuts[:, None]).sum(-1), jnp.int32)
    if case.spans:
        first, second = np.array([[3], [12]])[:batch], np.array([[55], [60]])[:batch]
        in_first, in_second = (
            (index >= first) & (index < first + 5),
            (index >= second) & (index < second + 30),
        )
        spans = jnp.asarray(np.where(in_first, 1, np.where(in_second, 2, 0)), jnp.int32)
    return AttentionMask(
        causal=case.causal,
        window=window,
        query_segments=segments,
        key_segments=segments,
        query_spans=spans,
        key_spans=spans,
    )


def random_mask(
    draw: Callable, num_queries: int, num_keys: int, *, segments: bool, spans: bool
) -> AttentionMask:
    """Any window and offset; segments in runs (they may come back) and images in runs, in two rows.

    The ids of queries are, one time in two, those of the keys at their places, and else any. With spans it is
    causal, since they lift nothing else.
    """

    def runs(length: int, ids: Sequence[int]) -> np.ndarray:
        rows = []
        for _ in range(2):
            row: list[int] = []
            while len(row) < length:
                row += [draw(st.sampled_from(ids))] * (length - draw(st.integers(0, length - 1)))
            rows.append(row[:length])
        return np.array(rows)

    causal = spans or draw(st.sampled_from([True, False]))
    window = draw(st.none() | st.sampled_from([1, 2, 5, 16, 33, 64]) | st.integers(1, num_keys))
    offset = draw(st.integers(-num_queries, num_keys) | st.integers(0, max(num_keys - num_queries, 0)))
    places = np.clip(offset + np.arange(num_queries), 0, num_keys - 1)
    arrays: dict[str, Any] = {}
    for name, ids, there in (("segments", (0, 1, 2, 3), segments), ("spans", (1, 2, 0), spans)):
        if there:
            keys = runs(num_keys, ids)
            queries = runs(num_queries, ids) if draw(st.booleans()) else keys[:, places]
            arrays |= {f"query_{name}": jnp.asarray(queries), f"key_{name}": jnp.asarray(keys)}
    return AttentionMask(causal=causal, window=window, query_offset=offset, **arrays)


def quick_jit(function: Callable) -> Callable:
    """`jax.jit` without XLA's optimisations: these run once, and compiling them is what takes time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def square(block: int) -> AttentionBlocks:
    """Blocks of so many queries and keys in both passes."""
    sizes = BlockSizes(query=block, key=block)
    return AttentionBlocks(forward=sizes, backward=sizes)


def answer(
    implementation: Any,
    case: Case,
    *,
    dtype: str,
    blocks: AttentionBlocks | None = None,
    target: Target | None = None,
) -> dict[str, np.ndarray]:
    """Output, log-sum-exp and the gradients of query, key and value, in float64."""
    *arrays, d_log_sum = inputs(case)
    q, k, v, d_out = (x.astype(dtype) for x in arrays)

    # All as arguments: constants would be folded, which takes seconds.
    def run(
        q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, d_log_sum: jax.Array, mask: Any
    ) -> Any:
        outputs, vjp = jax.vjp(
            lambda q, k, v: flash_attention(
                q,
                k,
                v,
                mask=mask,
                scale=SCALE,
                implementation=implementation,
                blocks=blocks,
                target=target,
                return_log_sum=True,
            ),
            q,
            k,
            v,
        )
        return [*outputs, *vjp((d_out, d_log_sum))]

    found = quick_jit(run)(q, k, v, d_out, d_log_sum, mask_of(case))
    return {
        name: np.asarray(x, np.float64)
        for name, x in zip(("out", "log_sum", "d_query", "d_key", "d_value"), found, strict=True)
    }


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest error over the largest value that is finite; none where both have the same infinity.

    Over at least 5: with a single key the gradient is a difference of equal terms, some of them larger than
    that, and their rounding is left.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    apart = np.subtract(actual, expected, where=actual != expected, out=np.zeros_like(actual))
    return float(np.abs(apart).max() / np.abs(expected[np.isfinite(expected)]).max(initial=5.0))


BOUNDS = {"float32": 1e-5, "bfloat16": 1.5e-2}
"""Of the relative error, by the dtype of the inputs."""


def true_answer(case: Case) -> dict[str, np.ndarray]:
    """Of the dense path, which works in float32 on the inputs as the case's dtype rounds them."""
    return answer("dense", case, dtype="float32")


def errors(
    implementation: Any,
    case: Case,
    *,
    truth: dict[str, np.ndarray] | None = None,
    blocks: AttentionBlocks | None = None,
    target: Target | None = None,
) -> dict[str, float]:
    """The relative error of each output against `truth`: `true_answer(case)`, if not given."""
    found = answer(implementation, case, dtype=case.dtype, blocks=blocks, target=target)
    truth = true_answer(case) if truth is None else truth
    return {name: relative_error(found[name], truth[name]) for name in truth}
