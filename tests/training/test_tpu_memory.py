"""A step on preferences takes the memory of one of instruction tuning; shown by compiling for a TPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "post_training_memory.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    return importlib.import_module(BENCHMARK.stem)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu: pip install -e '.[tpu]'"
)
def test_dpo_takes_the_memory_of_sft_and_neither_holds_all_logits(tmp_path):
    """Six layers of the 1B, all 262,144 tokens of the vocabulary, a row of 8,192 on one chip."""
    # In a process of its own: with libtpu loaded, JAX looks for TPUs.
    command = [sys.executable, BENCHMARK, "--quick", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / f"{BENCHMARK.stem}.json").read_text())
    sft, dpo = result["table"]
    assert dpo["arguments"] >= sft["arguments"]  # the places of the pairs
    assert dpo["temporary"] <= 1.15 * sft["temporary"]
    for program in result["programs"].values():
        assert program["too_large"] == []
        # A chunk: a 64th of all.
        assert program["largest_logits"] == "f32[8192,4096]"


def test_an_array_of_tokens_x_vocabulary_would_be_found(benchmark):
    """In a loss that holds all logits, before and after compilation."""
    tokens, vocabulary, width = 64, 512, 24

    def loss(hidden, embedding):
        return jax.nn.logsumexp(hidden @ embedding.T, axis=-1).sum()

    lowered = jax.jit(jax.grad(loss)).lower(jnp.ones((tokens, width)), jnp.ones((vocabulary, width)))
    for arrays in (
        benchmark.lowered_arrays(lowered.as_text()),
        benchmark.compiled_arrays(lowered.compile().as_text()),
    ):
        found = benchmark.largest(arrays, tokens, vocabulary)
        assert found["largest"] == found["largest_logits"] == "f32[64,512]"
        assert max(array.elements for array in arrays) >= tokens * vocabulary
