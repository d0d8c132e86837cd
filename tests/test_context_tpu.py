"""Attention over `context` as it compiles for TPUs that are not there: kernels inside, memory by devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc
from jax.sharding import NamedSharding, PartitionSpec
from sealion_jax.layout import layout_of
from sealion_jax.sharding import MeshConfig, make_mesh
from sealion_kernels import AttentionMask

chips = get_topology_desc("v5p:2x2x2", platform="tpu").devices

def compiled(devices, window, T=16384):
    mesh = make_mesh(MeshConfig(fsdp=1, context=devices), chips[:devices])
    place = NamedSharding(mesh, PartitionSpec(None, "context"))
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, T, *shape), dtype, sharding=place)

    def loss(q, k, v, ids):
        mask = AttentionMask(window=window, query_segments=ids, key_segments=ids)
        return layout_of(mesh).attention(q, k, v, mask=mask, scale=0.1).astype(jnp.float32).sum()

    arrays = array(32, 128), array(16, 128), array(16, 128), array(dtype=jnp.int32)
    found = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
    kernels = found.as_text().count('custom_call_target="tpu_custom_call"')
    return {"kernels": kernels, "bytes": found.memory_analysis().temp_size_in_bytes}

print(json.dumps([compiled(4, None), compiled(8, None), compiled(8, 1024)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_twice_the_devices_take_half_the_memory_each() -> None:
    """The heads of the 27B, rows of 16,384 tokens, forward and backward."""
    from sealion_jax.planning.environment import WITHOUT_TPU

    environment = {**os.environ, **WITHOUT_TPU, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    on_four, on_eight, local = json.loads(done.stdout.splitlines()[-1])
    assert min(one["kernels"] for one in (on_four, on_eight, local)) >= 2
    assert on_eight["bytes"] < 0.6 * on_four["bytes"]
    assert local["bytes"] < on_eight["bytes"]
