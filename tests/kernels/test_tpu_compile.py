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
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from sealion_kernels import AttentionMask, Target, flash_attention

def temporary_bytes(topology, T, N, K, H, window, dtype, spans, chips=1):
    # With several chips, rows and heads are spread over them.
    devices = np.array(get_topology_desc(topology, platform="tpu").devices[:chips])
    shape = (2, chips // 2) if chips > 1 else (1, 1)
    mesh = Mesh(devices.reshape(shape), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    heads, tokens = PartitionSpec("rows", None, "heads"), PartitionSpec("rows")
    array = lambda spec, *shape, dtype=dtype: jax.ShapeDtypeStruct(
        (mesh.shape["rows"], *shape), dtype, sharding=NamedSharding(mesh, spec)
    )
    q, k, ids = array(heads, T, N, H), array(heads, T, K, H), array(tokens, T, dtype=jnp.int32)

    def attend(q, k, v, ids):
        spanning = {"query_spans": ids, "key_spans": ids} if spans else {}
        mask = AttentionMask(window=window, query_segments=ids, key_segments=ids, **spanning)
        target = Target.of(devices[0])
        return flash_attention(q, k, v, mask=mask, scale=0.1, target=target)

    spread = jax.shard_map(attend, mesh=mesh, in_specs=(heads,) * 3 + (tokens,), out_specs=heads)
    loss = lambda *arrays: spread(*arrays).astype(jnp.float32).sum()
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
    """Heads of 1B on a v5e, of 27B on a v6e and, at three lengths, on a v5p; of 4B, spread over four chips;
    a short, ragged row in float32."""
    found = compiled(
        [
            ["v5p:2x2x1", 8192, 8, 4, 256, 1024, "bfloat16", True, 4],
            ["v5e:2x2", 4096, 4, 1, 256, 512, "bfloat16", True],
            ["v6e:2x2", 4096, 32, 16, 128, None, "bfloat16", False],
            ["v5p:2x2x1", 1000, 8, 1, 64, 7, "float32", False],
            *(["v5p:2x2x1", T, 32, 16, 128, None, "bfloat16", False] for T in LENGTHS),
        ]
    )
    assert all(one["kernels"] >= 2 for one in found)
    by_token = [one["bytes"] / length for one, length in zip(found[4:], LENGTHS, strict=True)]
    # Some few arrays of the queries' size (8 KiB a token); all scores would be 256 KiB a token and more.
    assert max(by_token) < 32 * 2**10
    assert max(by_token) < 1.3 * min(by_token)
