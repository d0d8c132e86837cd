"""`plan` with TPU's compiler: what it compiles is told right. Skipped where libtpu is not installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sealion_jax.layout import Layout
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.gemma3 import abstract_params, binder
from sealion_jax.planning.collectives import collectives
from sealion_jax.planning.environment import WITHOUT_TPU
from sealion_jax.planning.network import places_of, traffic_of
from sealion_jax.planning.topology import parse_topology, plan_mesh, tpu_devices
from sealion_jax.sharding import MeshConfig
from sealion_kernels import Target
from tests.commands import command_environment, start

pytestmark = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu: pip install -e '.[tpu]'"
)

D, F, V, LAYERS, HEADS, KV_HEADS, H, TOKENS, ROWS = 256, 512, 2048, 7, 4, 2, 128, 512, 16

RECIPE = f"""
from sealion_jax.data.mixture import MixtureConfig, SourceConfig
from sealion_jax.model.config import Gemma3Config
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import MeshConfig

def recipe():
    return TrainConfig(
        name="small",
        tokenizer="gs://nowhere/tokenizer.model",
        init_from="gs://nowhere/model",
        model=Gemma3Config(
            vocab_size={V}, num_layers={LAYERS}, model_dim={D}, num_heads={HEADS}, num_kv_heads={KV_HEADS},
            head_dim={H}, feed_forward_dim={F}, sliding_window_tokens=128, max_context_tokens={TOKENS},
        ),
        data=MixtureConfig(sources=(SourceConfig(name="web", store="gs://nowhere/web", weight=1.0),)),
        sequence_length_tokens={TOKENS},
        global_batch_size={ROWS},
        microbatches=2,
        steps=100,
        mesh=MeshConfig(fsdp=-1),
    )
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    file = tmp_path / "small.py"
    file.write_text(RECIPE)
    return file


def planned(recipe: Path, *words: object, code: int = 0) -> tuple[dict, str]:
    """The JSON and the words of a plan, in a process of its own: with libtpu loaded, JAX looks for TPUs."""
    output = recipe.parent / "plan.json"
    done = start("plan", recipe, *words, "--output", output, environment=command_environment())
    said, _ = done.communicate(timeout=900)
    assert done.returncode == code, said[-4000:]
    return json.loads(output.read_text()), said


@pytest.mark.slow
def test_a_small_step_on_four_chips(recipe):
    report, said = planned(recipe, "--topology", "v5e:2x2")
    assert (report["method"], report["fits"], report["mesh"]["fsdp"]) == ("compiled", True, 4)
    assert said.index("Assumed of each v5e") < said.index("Memory of a chip") < said.index("Collectives")
    matrices = LAYERS * (2 * D * H * (HEADS + KV_HEADS) + 3 * D * F) + V * D
    norms = LAYERS * (4 * D + 2 * H) + D
    kinds = report["memory"]["kinds"]
    assert kinds["weights"] == 4 * (matrices / 4 + norms)
    assert kinds["optimizer"] == pytest.approx(2 * kinds["weights"], abs=16)  # and Adam's count
    assert kinds["batch"] == ROWS * (5 * TOKENS + 1) * 4 / 4
    assert report["memory"]["needed"] == pytest.approx(sum(kinds.values()))
    assert report["memory"]["available"] == 15.75 * 2**30
    # Two microbatches each gather a layer's matrices twice in bfloat16 and the embedding once or twice, and
    # scatter the gradients once, in bfloat16 or float32.
    by_kind: dict[str, float] = {}
    for row in report["collectives"]:
        assert row["axes"] == ["fsdp"]
        assert row["seconds_on_network"] == 0
        by_kind[row["kind"]] = by_kind.get(row["kind"], 0) + row["received_bytes"]
    embedding = V * D
    layers = matrices - embedding
    least, most = (2 * (2 * layers + uses * embedding) * 2 * 3 / 4 for uses in (1, 2))
    assert least <= by_kind["all-gather"] <= 1.02 * most
    assert 2 * matrices * 2 * 3 / 4 <= by_kind["reduce-scatter"] <= 1.02 * 2 * matrices * 4 * 3 / 4
    speed = report["speed"]
    assert speed["matmul_seconds"] == pytest.approx(
        (speed["flops_per_token"] + speed["recomputed_flops_per_token"]) * ROWS * TOKENS / (4 * 197e12)
    )
    assert speed["overlapped"]["mfu"] >= speed["in_turn"]["mfu"] > 0
    assert report["analytical"]["memory"]["kinds"]["weights"] == kinds["weights"]


@pytest.mark.slow
def test_slices_reduce_gradients_over_the_network(recipe):
    words = ["--topology", "v5e:2x2", "--num-slices", 2, "--mesh.data", 2]
    report, _ = planned(recipe, *words)
    assert report["chips"] == 8
    between = [row for row in report["collectives"] if row["seconds_on_network"]]
    assert between
    assert all("data" in row["axes"] for row in between)
    matrices = LAYERS * (2 * D * H * (HEADS + KV_HEADS) + 3 * D * F) + V * D
    # Each device's quarter of the gradients, at least once a step and in bfloat16.
    assert sum(row["received_bytes"] for row in between) >= matrices / 4 * 2


@pytest.mark.slow
def test_what_the_compiler_refuses_is_reported(recipe):
    words = ["--topology", "v5e:2x2", "--global-batch-size", 16_384, "--microbatches", 1]
    report, said = planned(recipe, *words, "--compute.remat", "none", code=2)
    assert not report["fits"]
    assert report["speed"] is None
    assert "IT DOES NOT FIT" in said
    assert "error: small does not fit on v5e:2x2" in said
    assert any(line.startswith("--microbatches") for line in report["advice"])


@pytest.mark.slow
def test_a_search_compiles_its_candidates_in_processes(recipe):
    words = ["--topology", "v5e:2x2", "--search", "--candidates", 2, "--processes", 2]
    found, said = planned(recipe, *words)
    assert "1/2: " in said
    assert "2/2: " in said
    assert [report["method"] for report in found["search"]] == ["compiled"] * 2
    settings = {(*r["mesh"].values(), r["microbatches"], r["remat"]) for r in found["search"]}
    assert len(settings) == 2
    steps = [report["speed"]["overlapped"]["step_seconds"] for report in found["search"] if report["fits"]]
    assert steps == sorted(steps)


@pytest.mark.slow
def test_a_program_of_known_traffic(monkeypatch):
    """Nine layers of bfloat16 weights gathered over fsdp in a loop, a sum scattered, a maximum reduced."""
    for name, value in WITHOUT_TPU.items():
        monkeypatch.setenv(name, value)
    pod = parse_topology("v5p:2x2x1")
    mesh = plan_mesh(MeshConfig(data=2, fsdp=2), pod, tpu_devices(pod))
    layers, width = 9, 512

    def function(x, weights):
        def layer(x, weight):
            whole = jax.lax.all_gather(weight, "fsdp", axis=0, tiled=True)
            return jnp.tanh(x @ whole), None

        x = jax.lax.scan(layer, x, weights)[0]
        product = (x.T @ x).astype(jnp.float32)
        return jax.lax.psum_scatter(product, "fsdp", tiled=True), jax.lax.pmax(jnp.max(x, axis=0), "data")

    mapped = jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(P(("data", "fsdp")), P(None, "fsdp")),
            out_specs=(P("fsdp"), P()),
            check_vma=False,
        )
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((64, width), P(("data", "fsdp"))), ((layers, width, width), P(None, "fsdp")))
    ]
    found = collectives(mapped.lower(*arguments).compile().as_text(), dict(mesh.shape))
    traffic = {row.kind: row for row in traffic_of(found, places_of(mesh.devices.ravel().tolist()), pod)}
    assert traffic["all-gather"].count == layers
    assert traffic["all-gather"].axes == ("fsdp",)
    assert traffic["all-gather"].received_bytes == layers * width * width * 2 / 2
    assert traffic["reduce-scatter"].received_bytes == width * width * 4 / 2
    assert traffic["all-reduce"].axes == ("data",)
    # Two chips that are neighbours in a slice without rings: one link.
    assert traffic["all-gather"].seconds.links == pytest.approx(layers * width * width / 100e9)


@pytest.mark.slow
def test_offloaded_tensors_lie_in_the_hosts_memory(monkeypatch):
    """Gate and up of 24 layers, in bfloat16: all of them there, and less on the chip than if kept."""
    for name, value in WITHOUT_TPU.items():
        monkeypatch.setenv(name, value)
    device = tpu_devices(parse_topology("v5e:2x2"))[0]
    rows, wide = 4, 1024
    config = Gemma3Config(
        vocab_size=512,
        num_layers=24,
        model_dim=D,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=H,
        feed_forward_dim=wide,
        sliding_window_tokens=128,
        max_context_tokens=TOKENS,
    )

    def on_device(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))

    def gradient(**named):
        bind = binder(config, compute=ComputeConfig(remat="layer", **named), layout=Layout(Target.of(device)))

        def loss(params, row):
            return bind(params)(row, positions=row, segment_ids=row).astype(jnp.float32).sum()

        row = on_device(jax.ShapeDtypeStruct((rows, TOKENS), jnp.int32))
        return jax.jit(jax.grad(loss)).lower(jax.tree.map(on_device, abstract_params(config)), row).compile()

    names = ("gate", "up")
    kept, offloaded = gradient(keep=names), gradient(offload=names)
    size = 24 * len(names) * rows * TOKENS * wide * 2
    there, here = kept.memory_analysis(), offloaded.memory_analysis()
    assert (there.host_temp_size_in_bytes, here.host_temp_size_in_bytes) == (0, size)
    # What is fetched back has a place on the chip while it is used.
    assert here.temp_size_in_bytes <= there.temp_size_in_bytes - 0.6 * size
    in_host_memory = "S(5)"  # a layout's memory space
    assert in_host_memory not in kept.as_text()
    # In a loop over blocks of six layers each result is written there, and read from there.
    lines = [line for line in offloaded.as_text().splitlines() if in_host_memory in line]
    for transfer in ("dynamic-update-slice-start", "dynamic-slice-start"):
        assert sum(f" {transfer}(" in line for line in lines) == 6 * len(names)


@pytest.mark.parametrize("tensor", [2, 4])
def test_axes_may_share_a_direction_of_the_torus(tensor: int) -> None:
    """Where none of both has whole directions: the chips of a `tensor` group are one line of neighbours."""
    topology = parse_topology("v6e:16x16")
    mesh = plan_mesh(MeshConfig(fsdp=-1, tensor=tensor), topology, tpu_devices(topology))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 256 // tensor, "context": 1, "tensor": tensor}
    for group in mesh.devices.reshape(-1, tensor):
        steps = np.abs(np.diff([device.coords for device in group], axis=0))
        assert (steps.sum(axis=1) == 1).all()
