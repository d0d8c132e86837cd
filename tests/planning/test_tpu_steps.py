"""The step of the 27B for 64 TPU v5p: kernels inside, only weights move, no array of all logits."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from sealion_jax.layout import ATTENTION_SCOPE, layout_of
from sealion_jax.planning.collectives import collectives
from sealion_jax.sharding import MeshConfig, make_mesh
from sealion_kernels import AttentionMask

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "tpu_steps.py"
MODEL = SimpleNamespace(
    model_dim=512,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    feed_forward_dim=4096,
    num_layers=2,
    vocab_size=32768,
)


ROWS = 128
"""Of logits that may be alive at a time."""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    return importlib.import_module(BENCHMARK.stem)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu: pip install -e '.[tpu]'"
)
def test_the_27b_on_64_chips(tmp_path):
    """What moves is within a tenth of FSDP's least; all that moves over it has the size of a weight."""
    command = [sys.executable, BENCHMARK, "--quick", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    row = json.loads((tmp_path / "tpu_steps.json").read_text())["table"][0]
    assert row["needed, GiB"] < 95
    # Each layer's weights have to move at all: the measure sees what it should.
    assert 0.98 < row["to the least"] < 1.1
    # Of the six layers of a block and the two that are left: forward, and one or more backward.
    assert row["attention kernels"] >= 8 * 2


def faults(benchmark: Any, text: str | None, *, tensor: int = 1) -> list[str]:
    assert text is not None
    shape = {"data": 1, "fsdp": 8, "tensor": tensor}
    return benchmark.faults(
        text,
        collectives(text, {"fsdp": 8}) if "HloModule" in text else [],
        model=MODEL,
        mesh_shape=shape,
        tokens={8192},
        logits_bytes=ROWS * MODEL.vocab_size * 4 // tensor,
        scope=ATTENTION_SCOPE,
    )


def gathered(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, "fsdp", tiled=True)


def summed(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, "fsdp")


@pytest.mark.parametrize(
    ("moves", "shape", "fault"),
    [
        (gathered, (512, 4096), None),
        (gathered, (8192, 128), "the shape of an activation"),
        (gathered, (2048, 700), "no weight's size"),
        (gathered, (128, 32768), "no weight's size"),  # a chunk of logits
        (summed, (512, 4096), "to every device"),
    ],
)
def test_what_must_not_move_is_found(
    benchmark: Any, moves: Callable, shape: tuple[int, int], fault: str | None
) -> None:
    mesh = make_mesh(MeshConfig(fsdp=8))
    inside = PartitionSpec("fsdp") if moves is gathered else PartitionSpec()
    moved = jax.shard_map(moves, mesh=mesh, in_specs=inside, out_specs=PartitionSpec(), check_vma=False)
    compiled = jax.jit(moved).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    found = faults(benchmark, compiled.as_text())
    if fault is None:
        assert found == []
    else:
        assert len(found) == 1 and fault in found[0]


def test_what_moves_inside_attention_is_found(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of all devices' keys, put into the layout's attention, is told as such."""
    from sealion_jax import layout

    mesh = make_mesh(MeshConfig(fsdp=8))
    query = jax.ShapeDtypeStruct((8, 4096, 4, 64), jnp.float32)
    key = jax.ShapeDtypeStruct((8, 4096, 2, 64), jnp.float32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return layout_of(mesh).attention(
            q, k, v, mask=AttentionMask(window=128), scale=0.1, implementation="blockwise"
        )

    def found() -> list[str]:
        anew = jax.jit(partial(attend))  # another function, so it is traced again
        return faults(benchmark, anew.lower(query, key, key).compile().as_text())

    inside = "inside attention"
    assert not any(inside in fault for fault in found())
    whole = layout.flash_attention
    monkeypatch.setattr(layout, "flash_attention", lambda q, k, v, **more: whole(q, summed(k), v, **more))
    assert any(inside in fault for fault in found())


@pytest.mark.parametrize(
    ("shape", "tensor", "is_found"),
    [
        ("8192,32768", 1, True),
        ("2,1024,32768", 1, True),
        ("8192,8192", 4, True),
        ("128,32768", 1, False),
        ("32768,512", 1, False),  # the embedding
        ("64,32768", 1, False),  # a device's part of it
    ],
)
def test_more_logits_than_are_allowed_are_found(
    benchmark: Any, shape: str, tensor: int, is_found: bool
) -> None:
    found = faults(benchmark, f"f32[{shape}]{{1,0}}", tensor=tensor)
    assert found == ([f"an array of tokens x vocabulary: {shape}"] if is_found else [])
