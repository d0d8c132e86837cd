"""The TPU kernels as they compile for TPUs that are not there: every generation, and memory by length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

LENGTHS = (4096, 8192, 16384)

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc
from jax.sharding import SingleDeviceSharding
from sealion_kernels import AttentionMask, Target, flash_attention

def temporary_bytes(topology, T, N, K, H, window, dtype, spans):
    device = get_topology_desc(topology, platform="tpu").devices[0]
    place = SingleDeviceSharding(device)
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    q, k, ids = array(1, T, N, H), array(1, T, K, H), array(1, T, dtype=jnp.int32)

    def loss(q, k, v, ids):
        spanning = {"query_spans": ids, "key_spans": ids} if spans else {}
        mask = AttentionMask(window=window, query_segments=ids, key_segments=ids, **spanning)
        target = Target.of(device)
        return flash_attention(q, k, v, mask=mask, scale=0.1, target=target).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, ids).compile()
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    return {"bytes": compiled.memory_analysis().temp_size_in_bytes, "kernels": kernels}

print(json.dumps([temporary_bytes(*case) for case in json.loads(sys.argv[1])]))
"""


def compiled(cases: list[Any]) -> list[dict[str, int]]:
    """Temporary memory and kernels of forward and backward, of each case."""
    from sealion_jax.planning.environment import WITHOUT_TPU

    command = [sys.executable, "-c", PROGRAM, json.dumps(cases)]
    environment = {**os.environ, **WITHOUT_TPU, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_they_compile_for_every_generation_and_memory_is_linear_in_the_length() -> None:
    """Heads of 1B on a v5e, of 27B on a v6e and, at three lengths, on a v5p; a short, ragged row."""
    found = compiled(
        [
            ["v5e:2x2", 4096, 4, 1, 256, 512, "bfloat16", True],
            ["v6e:2x2", 4096, 32, 16, 128, None, "bfloat16", False],
            ["v5p:2x2x1", 1000, 8, 1, 64, 7, "float32", False],
            *(["v5p:2x2x1", T, 32, 16, 128, None, "bfloat16", False] for T in LENGTHS),
        ]
    )
    assert all(one["kernels"] >= 2 for one in found)
    by_token = [one["bytes"] / length for one, length in zip(found[3:], LENGTHS, strict=True)]
    # Some few arrays of the queries' size (8 KiB a token); all scores would be 256 KiB a token and more.
    assert max(by_token) < 32 * 2**10
    assert max(by_token) < 1.3 * min(by_token)
