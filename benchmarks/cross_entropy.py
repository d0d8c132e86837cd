"""Cross-entropy from hidden states beside the plain one, which has all logits: time and memory.

    python benchmarks/cross_entropy.py [--output DIR] [--repetitions N]

Loss and gradients, on whatever device is at hand. Three take turns, so that what else the machine does falls
on all: ours with the gradient taken along with the logits (a next-token loss), ours with the logits computed
twice (preferences), and log_softmax of all logits under jit. Ratios are medians over the turns; memory is
what the compiler sets aside beside inputs and results. Fails if losses or gradients differ by more than
rounding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiments import report

from sealion_kernels import Target, linear_cross_entropy

MIB = 2**20
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of a gradient, over its largest value."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape."""

    tokens: int
    model_dim: int
    vocab_size: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, D {self.model_dim}, V {self.vocab_size:,}"

    def inputs(self) -> tuple[jax.Array, ...]:
        """Hidden states, embedding (float32, as it is trained), targets and weights."""
        rng = np.random.default_rng(0)
        hidden = rng.standard_normal((1, self.tokens, self.model_dim), np.float32)
        embedding = rng.standard_normal((self.vocab_size, self.model_dim), np.float32) * self.model_dim**-0.5
        targets = rng.integers(self.vocab_size, size=(1, self.tokens))
        weights = np.full((1, self.tokens), 1 / self.tokens, np.float32)
        return (
            jnp.asarray(hidden, self.dtype),
            jnp.asarray(embedding),
            jnp.asarray(targets, jnp.int32),
            jnp.asarray(weights),
        )


CASES = {
    "cpu": (
        Case(tokens=512, model_dim=640, vocab_size=32_768, dtype="float32"),
        Case(tokens=2048, model_dim=640, vocab_size=32_768, dtype="float32"),
        Case(tokens=1024, model_dim=640, vocab_size=262_144, dtype="float32"),
    ),
    "accelerator": (
        Case(tokens=8192, model_dim=1152, vocab_size=262_144, dtype="bfloat16"),
        Case(tokens=8192, model_dim=2560, vocab_size=262_144, dtype="bfloat16"),
    ),
}

Loss = Callable[..., jax.Array]


def at_once(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The mean negative log-probability, its gradient taken along with the logits."""
    return linear_cross_entropy(hidden, embedding, targets, weights=weights).loss


def twice(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The same from log-probabilities, whose gradient needs the logits once more."""
    return -jnp.sum(weights * linear_cross_entropy(hidden, embedding, targets).log_probs)


def plain(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The same from all logits."""
    logits = jnp.einsum(
        "BTD,VD->BTV", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -jnp.sum(weights * log_probs)


CONTENDERS: dict[str, Loss] = {"plain": plain, "at once": at_once, "twice": twice}


def main() -> None:
    """Parses, measures, prints, and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a folder for cross_entropy.json")
    args = parser.parse_args()
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    target = Target.here()
    cases = CASES["cpu" if target.platform == "cpu" else "accelerator"]
    rows = [measured(case, args.repetitions) for case in cases]
    facts = {"device": target.kind, "jax": jax.__version__, "repetitions": args.repetitions}
    report("cross_entropy", {"table": rows, **facts}, args.output)


def measured(case: Case, repetitions: int) -> dict[str, Any]:
    """A case's row of the table."""
    inputs = case.inputs()
    programs = {
        name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
        for name, loss in CONTENDERS.items()
    }
    results = {name: jax.device_get(program(*inputs)) for name, program in programs.items()}
    for name in ("at once", "twice"):
        check(name, results[name], results["plain"], TOLERANCE[case.dtype])
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            seconds[name].append(time.perf_counter() - began)
    row: dict[str, Any] = {"case": str(case), "at once, ms": statistics.median(seconds["at once"]) * 1e3}
    for name in ("at once", "twice"):
        ratios = [theirs / ours for theirs, ours in zip(seconds["plain"], seconds[name], strict=True)]
        row[f"plain / {name}"] = statistics.median(ratios)
    for name, program in programs.items():
        row[f"{name}, MiB"] = program.memory_analysis().temp_size_in_bytes / MIB
    print(row, flush=True)
    return row


def check(name: str, ours: Any, theirs: Any, tolerance: float) -> None:
    """Fails unless loss and gradients are the plain ones, up to rounding."""
    difference = partial(jax.tree.map, lambda a, b: np.abs(np.float32(a) - np.float32(b)).max())
    sizes = jax.tree.map(lambda a: np.abs(np.float32(a)).max(), theirs)
    for off, size in zip(jax.tree.leaves(difference(ours, theirs)), jax.tree.leaves(sizes), strict=True):
        assert off <= tolerance * size, f"{name}: off by {off} of {size}"


if __name__ == "__main__":
    main()
